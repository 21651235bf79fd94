"""The eval stage as a whole: what it finds, how it goes on after a stop, what it refuses, and rules that it checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from launchers import runs, status, worth
from post_training import train
from post_training.data.tokenizer import bytes_tokenizer
from post_training.evaluation import answers, policy, rules, scoring
from post_training.run import life, manifest, results
from tests.in_process import here, own_cache, refused, training_here  # noqa: F401  (fixtures)
from tests.records import write
from tests.training import events, make_run, metrics

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("line")


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Path, Path]:
    """A start model that ends some answers, and what a stage made of it."""
    steps = ("training.max_steps=2", "model.initializer_range=0.5", "sft.lr=3e-2")
    with training_here():
        start = make_run(folder, "base", *steps, name="start")
        assert train.run_attempt(start, 1) == 0
        sft = make_run(folder, "sft", *steps, name="sft", model=start.model)
        assert train.run_attempt(sft, 1) == 0
    return start.model, sft.model


ASKED = ("eval.num_problems=6", "eval.batch_size=4", "eval.num_samples=2", "eval.num_instructions=5")


class Killed(BaseException):
    """As kill -9: nothing is tidied up."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Counts batches that are asked, by kind; `before` is called with the count before each."""
    seen: dict[str, Any] = {"count": 0, "kinds": [], "before": lambda count: None}

    def counting(kind: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            seen["count"] += 1
            seen["kinds"].append(kind)
            seen["before"](seen["count"])
            return ask(*arguments)

        return counted

    monkeypatch.setattr(answers, "by_transformers", counting("answers", answers.by_transformers))
    for kind in ("likelihoods", "divergences", "rewards"):
        monkeypatch.setattr(scoring, kind, counting(kind, getattr(scoring, kind)))
    yield seen


def test_a_stopped_and_killed_evaluation_finds_what_an_undisturbed_one_finds(
    folder: Path, models: tuple[Path, Path], calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    start, sft = models
    calm = make_run(folder, "eval", *ASKED, name="calm", model=sft, reference=start)
    assert train.run_attempt(calm, 1) == 0
    total, kinds = calls["count"], calls["kinds"]
    batches = metrics(calm)[-1]["max_steps"]
    assert metrics(calm)[-1]["step"] == batches and set(kinds) == {"answers", "likelihoods", "divergences"}

    line = folder / "line"
    run = make_run(line, "eval", *ASKED, name="torn", model=sft, reference=start)
    interrupted = [2, 5, kinds.index("divergences") + 3]  # while greedy answers, samples, and divergences are made
    kills = interrupted[2:]
    done_before = 0
    for attempt, stop in enumerate(interrupted, 1):
        def leave(count: int, at: int = stop - done_before, kill: bool = stop in kills) -> None:
            if count == at and kill:
                raise Killed
            if count == at:
                os.kill(os.getpid(), signal.SIGTERM)  # seen before the next forward pass, in the middle of the batch

        calls.update(count=0, before=leave)
        if stop in kills:
            with pytest.raises(Killed):
                train.run_attempt(run, attempt)
        else:
            assert train.run_attempt(run, attempt) == life.STOPPED
            assert events(run, "stopped")[-1]["step"] == stop - 1 == events(run, "checkpoint_saved")[-1]["step"]
        assert not run.model.exists()
        done_before = stop - 1

    journal = run.checkpoints / "evaluation.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')  # killed while it wrote
    partial = run.root / "model.partial-3"
    partial.mkdir()
    results.write(partial, results.read(calm))  # or just before the end
    (row,) = json_of(capsys, "torn", line)
    assert row["score"] is None and row["state"] != "done"
    assert (row["step"], row["max_steps"]) == (interrupted[2] - 1, batches)
    assert worth.judged_stages(runs.looks_of(line)) == []

    calls.update(count=0, before=lambda count: None)
    assert train.run_attempt(run, 4) == 0
    assert calls["count"] == total - (interrupted[2] - 1), "what was known was asked again"
    one, other = results.read(calm), results.read(run)
    assert (one.headline, one.figures, one.settings) == (other.headline, other.figures, other.settings)
    assert run.samples.read_bytes() == calm.samples.read_bytes()
    assert manifest.problem(run.model) is None
    (row,) = json_of(capsys, "torn", line)
    assert row["state"] == "done" and row["step"] == row["max_steps"] == batches


def json_of(capsys: pytest.CaptureFixture[str], stage: str, line: Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert status.main([f"run_name={line.name}", f"paths.output_base={line.parent}", "--json"]) == 0
    return [row for row in json.loads(capsys.readouterr().out)["runs"] if row["stage"] == stage]


def test_the_figures_are_those_of_the_samples(folder: Path, models: tuple[Path, Path]) -> None:
    start, sft = models
    run = make_run(folder, "eval", *ASKED, "eval.temperature=0.5", name="figures", model=sft, reference=start)
    assert train.run_attempt(run, 1) == 0
    found, lines = results.read(run), [json.loads(line) for line in run.samples.read_text().splitlines()]
    problems, followed = lines[:6], lines[6:]
    assert len(followed) == 5 and all(len(line["samples"]) == 2 for line in problems)
    assert len({text for line in problems for text in line["samples"]}) > 6, "samples differ"
    wanted = {
        "accuracy", "format", "reward", "repetition", "length", "truncated", "distinct_1", "distinct_2", "steps",
        "pass@1", "pass@2", "majority", "instructions", "perplexity_text", "perplexity_answers", "kl_start",
        "implicit_accuracy",
    }  # fmt: skip
    assert wanted <= set(found.figures)
    for name in wanted - {"distinct_1", "distinct_2", "steps"}:
        figure = found.figures[name]
        assert figure.low <= figure.value <= figure.high, name
    assert found.figures["kl_start"].value > 1e-3 and found.figures["instructions"].count == 5
    assert found.settings["num_samples"] == 2 and found.settings["temperature"] == 0.5
    assert found.settings["text"] == {"name": "arithmetic", "path": None}
    metric = {name: results.metric(name).help for name in found.figures}
    assert not [name for name, help in metric.items() if "lm-eval" in help], "a figure without a name of its own"


def test_without_a_start_model_or_with_another_vocabulary_nothing_is_compared(
    folder: Path, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sft = models
    alone = make_run(folder, "eval", "eval.num_problems=2", name="alone", model=sft)
    assert train.run_attempt(alone, 1) == 0
    assert "left out" not in capsys.readouterr().err
    bigger = make_run(tmp_path, "base", "training.max_steps=1", "model.vocab_size=300", name="bigger")
    assert train.run_attempt(bigger, 1) == 0
    for number, reference, why in (
        (1, bigger.model, "another vocabulary (300 tokens, not 265)"), (2, tmp_path / "gone", "cannot be read"),
    ):  # fmt: skip
        run = make_run(folder, "eval", "eval.num_problems=2", name=f"other-{number}", model=sft, reference=reference)
        assert train.run_attempt(run, 1) == 0
        assert "kl_start and implicit_accuracy are left out" in (said := capsys.readouterr().err) and why in said
        assert results.read(run).figures == results.read(alone).figures
    assert not {"kl_start", "implicit_accuracy"} & set(results.read(alone).figures)


def test_a_start_model_that_was_removed_does_not_keep_an_evaluation_from_starting(tmp_path: Path) -> None:
    gone = {"path": str(tmp_path / "gone"), "run_dir": str(tmp_path)}
    assert life._input_problem({"inputs": {"model": None, "reference": {**gone, "derived": True}}}) is None
    why = life._input_problem({"inputs": {"model": None, "reference": gone}})
    assert why is not None and "inputs.reference" in why


def test_forgetting_is_measured_on_the_base_stages_text(folder: Path, models: tuple[Path, Path]) -> None:
    texts = write(folder / "texts.jsonl", [{"text": f"line {i} of a text"} for i in range(40)])
    found = []
    given = [(), (f"eval.text={{name: text, path: {texts}, held_out: 5}}",),
             ("eval.base_text={name: text, path: " + str(texts) + ", held_out: 5, seed: 0}",)]  # fmt: skip
    for number, options in enumerate(given):
        run = make_run(folder, "eval", "eval.num_problems=4", *options, name=f"text-{number}", model=models[1])
        assert train.run_attempt(run, 1) == 0
        found.append(results.read(run))
    own, asked, derived = found
    assert asked.figures == derived.figures and asked.settings["text"] == {"name": "text", "path": str(texts)}
    differ = {name for name in own.figures if own.figures[name] != asked.figures[name]}
    assert differ == {"perplexity_text"}


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    bytes_tokenizer().save_pretrained(folder)
    about = {"vocab_size": 265, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**about)).save_pretrained(folder)
    return folder


def test_more_tokens_than_learned_positions(
    tmp_path: Path, gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, make_run(tmp_path, "eval", "eval.max_new_tokens=60", name="answers", model=gpt2))
    assert "eval.max_new_tokens=60: up to 69 tokens, and the model has positions for 64" in said
    assert "fix: eval.max_new_tokens=55" in said
    path = write(tmp_path / "long.jsonl", [{"prompt": "a" * 90, "answer": f"{i}"} for i in range(20)])
    custom = ("data.name=custom", f"data.path={path}", "data.held_out=4")
    said = refused(capsys, make_run(tmp_path, "eval", *custom, name="prompts", model=gpt2))
    assert "positions for 64" in said and "fix: data with shorter prompts" in said
    path = write(tmp_path / "texts.jsonl", [{"text": "a" * 90} for i in range(20)])
    long = ("data.name=text", f"data.path={path}", "data.held_out=4", "training.max_length=80")
    said = refused(capsys, make_run(tmp_path, "eval", *long, name="texts", model=gpt2))
    assert "training.max_length=80" in said and "fix: training.max_length=64" in said
    fits = make_run(tmp_path, "eval", *long[:3], "training.max_length=64", name="fits", model=gpt2)
    assert train.run_attempt(fits, 1) == 0
    assert list(results.read(fits).figures) == ["perplexity_text"]


def test_a_model_without_a_chat_template_is_asked_nothing(
    tmp_path: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = shutil.copytree(models[0], tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json", "*.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    said = refused(capsys, make_run(tmp_path, "eval", name="asked", model=plain))
    assert f"model.chat_template=null: {plain} has no chat template" in said and "fix: model.chat_template=" in said
    path = write(tmp_path / "texts.jsonl", [{"text": f"text {i}"} for i in range(20)])
    texts = ("data.name=text", f"data.path={path}", "data.held_out=4")
    for name, options in (("read", texts), ("given", ("model.chat_template=think_answer",))):
        assert train.run_attempt(make_run(tmp_path, "eval", *options, name=name, model=plain), 1) == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("manifest", "model.safetensors has"),
        ("weights", "has no weights"),
        ("config", "has no config.json"),
        ("cut", "weights cannot be read"),
        ("shard", "model-2-of-2.safetensors is missing"),
    ],
)
def test_a_model_that_is_not_whole(
    tmp_path: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], damage: str, words: str
) -> None:
    broken = shutil.copytree(models[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    if damage != "manifest":
        (broken / "manifest.json").unlink()
    if damage in ("manifest", "cut"):
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (broken / "config.json").unlink()
    else:
        tensors = load_file(weights)
        weights.unlink()
        if damage == "shard":
            names = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(tensors)}
            first = {name: tensor for name, tensor in tensors.items() if "-1-" in names[name]}
            save_file(first, broken / "model-1-of-2.safetensors", metadata={"format": "pt"})
            (broken / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    run = make_run(tmp_path, "eval", model=broken)
    said = refused(capsys, run)
    assert f"inputs.model={broken}" in said and words in said and "  fix: " in said
    assert not list(run.root.glob("model*"))


def test_data_of_which_nothing_can_be_asked(
    tmp_path: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "eval", "data.name=custom", f"data.path={tmp_path / 'none.jsonl'}", model=models[0])
    assert "no such file or folder" in refused(capsys, run)


def test_what_a_gpu_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        total_memory = 1000

    monkeypatch.setattr(policy.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(policy.torch.cuda, "get_device_properties", lambda _: Gpu)
    how = policy.Eval()
    for size, crowded in ((400, False), (500, True)):
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
        assert policy.crowded(str(tmp_path), how) is crowded
    (tmp_path / "model.safetensors").write_bytes(bytes(400))
    assert policy.crowded(str(tmp_path), policy.Eval(backend="vllm", gpu_memory_utilization=0.5))


# ------------------------------------------------------------------------------------------------ rules

KEPT: dict[str, tuple[Callable[[rules.Rule], str], Callable[[rules.Rule], str]]] = {
    # an answer that keeps the rule, and one that does not, from the rule's own words
    "words": (lambda r: " ".join(["word"] * number(r)), lambda r: " ".join(["word"] * (number(r) + 1))),
    "at_most": (lambda r: " ".join(["word"] * number(r)), lambda r: "word " * (number(r) + 1)),
    "sentences": (lambda r: "It is. " * number(r), lambda r: "It is. " * (number(r) - 1)),
    "lower": (lambda r: "all is low: 3.", lambda r: "Not all."),
    "upper": (lambda r: "IT IS HIGH, 3.", lambda r: "IT Is"),
    "no_comma": (lambda r: "one; two", lambda r: "one, two"),
    "end": (lambda r: f"It ends: {quoted(r)[0].title()}.", lambda r: f"{quoted(r)[0]} is not last"),
    "start": (lambda r: f'"{quoted(r)[0].upper()}" it is', lambda r: f"The {quoted(r)[0]}"),
    "include": (lambda r: "{0}s and {0} or {1}!".format(*quoted(r)), lambda r: "{} and {}s".format(*quoted(r))),
    "exclude": (lambda r: f"un{quoted(r)[0]}", lambda r: f"So {quoted(r)[0].title()}, it is"),
    "bullets": (lambda r: "\n\n".join(["- a line"] * number(r)), lambda r: "\n".join(["- a line"] * number(r)) + "\nx"),
    "json": (lambda r: '```json\n{"a": [1]}\n```', lambda r: 'Here it is: {"a": 1}'),
}


def quoted(rule: rules.Rule) -> list[str]:
    return rule.text.split('"')[1::2]


def number(rule: rules.Rule) -> int:
    found = [word.strip(".,") for word in rule.text.split()]
    numbers = {word: n for n, word in enumerate(rules.SMALL, 1)} | {word: int(word) for word in found if word.isdigit()}
    return next(numbers[word] for word in found if word in numbers)


def test_rules_tell_answers_that_keep_them_from_those_that_do_not() -> None:
    asked = rules.instructions(300, seed=0)
    seen = set()
    for instruction in asked:
        assert all(rule.text in instruction.prompt for rule in instruction.rules)
        for rule in instruction.rules:
            good, bad = (make(rule) for make in KEPT[rule.kind])
            assert rule.kept(good), (rule, good)
            assert not rule.kept(bad), (rule, bad)
            seen.add(rule.kind)
    assert seen == set(KEPT)
    assert rules.instructions(300, seed=0)[:40] != rules.instructions(40, seed=1)
    assert [i.prompt for i in asked[:40]] == [i.prompt for i in rules.instructions(40, seed=0)]
    both = next(i for i in asked if [r.kind for r in i.rules] == ["lower", "no_comma"])
    assert both.kept("low and plain") and not both.kept("low, and plain") and not both.kept("Low and plain")
    assert not both.kept("") and not both.kept("...")
    assert both.kept("<think>Thinking, loudly.</think><answer>low and plain</answer>")
    assert both.kept("<think>Thinking, loudly.</think> low and plain")
    words = [[w for r in i.rules for w in quoted(r)] for i in asked]
    assert all(len(set(some)) == len(some) for some in words), "rules that speak of one word may contradict each other"
