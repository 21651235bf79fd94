"""Distillation and its judgement by steps; rejection sampling, and sft on what it keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from conf.check import ConfigError
from conf.schema import Node, Sample
from launchers import graph
from launchers.compose import Composer, rewrite
from launchers.selection import select, sources
from launchers.submission import freeze
from post_training import train
from post_training.data.source import DataError, assistant, think_answer, user
from post_training.data.tokenizer import bytes_tokenizer
from post_training.rewards.steps import step_figures, steps, thought
from post_training.run import ledger, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from post_training.run.life import STOPPED
from post_training.stages import common, distill
from post_training.stages.sample import best, read_samples
from post_training.stages.sample import select as select_samples
from tests.in_process import here  # noqa: F401  (a fixture)
from tests.training import events, make_run, metrics, weights

# ------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 7+5=12 4+8+1=13", [True, True]),
        ("7+5=13 and then 4 + 8 = 12.", [False, True]),
        ("2+3*4=14, 2*3+4=10, 20-6/3=18, 7-2-1=4", [True] * 4),
        ("2+3*4=20", [False]),
        ("She pays $1,200 - $200 = $1,000 in 2 x 3 = 6 days", [True, True]),
        ("10/3=3.33, 10/3=3.3, 10/3=3.4, 10/4=2.5", [True, True, False, True]),
        ("5/0=1", [False]),
        ("3-5=-2", [True]),
        ("no equation, x=3, 12=12, and v1.2+3=4", []),
        ("", []),
    ],
)
def test_steps_are_the_equations_of_a_thought(text: str, expected: list[bool]) -> None:
    assert steps(think_answer(text, "1+1=3")) == expected, "what the answer says is no step"
    assert steps(text) == [], "no thought, no steps"


def test_thoughts_and_their_figures() -> None:
    assert thought("<think> a </think><answer>1</answer>") == "a"
    assert thought("<think>a") is None
    texts = [think_answer("1+1=2 2+2=5", "5"), think_answer("", "1"), "3"]
    assert step_figures(texts) == {"thought": pytest.approx(1 / 3), "steps": pytest.approx(2 / 3), "steps_right": 0.5}
    assert step_figures(["3"]) == {"thought": 0.0, "steps": 0.0, "steps_right": None}


# ---------------------------------------------------------------------------------------------------- distill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """A model that has learnt to answer in form, and ends its answers."""
    base = make_run(folder, "base", "training.max_steps=2", "base.lr=1e-2", name="base")
    assert train.run_attempt(base, 1) == 0
    run = make_run(
        folder, "sft", "training.max_steps=60", "sft.lr=1e-2", "data.num_demonstrations=400", "logging.steps=20",
        "checkpointing.save_steps=60", "model.hidden_size=64", name="start", model=base.model,
    )  # fmt: skip
    assert train.run_attempt(run, 1) == 0
    return run.model


def chat(said: str) -> dict[str, Any]:
    return {"messages": [user("1+1=?"), assistant(said)]}


@pytest.mark.usefixtures("here")
def test_distill_takes_whole_traces_alone(folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(folder, "distill", "training.max_steps=1", "training.max_length=40", name="traces", model=start)
    stage = common.open_stage(run)
    good = think_answer("1+1=2", "2")
    rows = Dataset.from_list([chat(good), chat("2"), chat(think_answer("", "2")), chat(think_answer("1" * 40, "2")),
                              {"messages": [user("1"), assistant(good), user("2")]}])  # fmt: skip
    assert distill.traces(stage, rows)["messages"][:] == [chat(good)["messages"]]
    said = capsys.readouterr().err
    assert "distill: 1 of 5 traces" in said
    for why in ("2 not in the form", "1 without a thought", "1 longer than training.max_length=40"):
        assert why in said
    with pytest.raises(DataError, match="no trace to distill in 1 records: 1 not in the form"):
        distill.traces(stage, rows.select([1]))


@pytest.mark.usefixtures("here")
def test_distill_with_adapters_and_its_evaluation(
    folder: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in pipeline=reasoning: arithmetic traces, merged at the end, judged by steps and answers beside its start."""
    options = ("training.max_steps=2", "distill.lr=1e-2", "lora.r=4")
    run = make_run(folder, "distill", *options, name="distill", model=start)
    assert train.run_attempt(run, 1) == 0
    assert (run.model / "adapter" / "adapter_model.safetensors").is_file() and (run.model / "config.json").is_file()
    figures = []
    for name, model in (("eval_start", start), ("eval_distill", run.model)):
        judge = make_run(folder, "eval", "eval.max_new_tokens=40", name=name, model=model)
        assert train.run_attempt(judge, 1) == 0
        figures.append(results.read(judge).figures)
        samples = [json.loads(line)["completion"] for line in judge.samples.read_text().splitlines()]
        expected = {name: value for name, value in step_figures(samples).items() if value is not None}
        assert {name: figures[-1][name].value for name in expected} == expected
    assert figures[0] != figures[1]
    from post_training.evaluation import answers

    said = think_answer("1+1=2 2+2=5", "4")  # a model so small never thinks
    ids = bytes_tokenizer()(said)["input_ids"]
    monkeypatch.setattr(answers, "by_transformers", lambda m, t, n, prompts, *_: [[[ids, False]]] * len(prompts))
    judge = make_run(folder, "eval", name="eval_thinks", model=start)
    assert train.run_attempt(judge, 1) == 0
    found = results.read(judge).figures
    assert [found[name].value for name in ("thought", "steps", "steps_right")] == [1.0, 2.0, 0.5]


# ----------------------------------------------------------------------------------------------------- sample


def completion(text: str, reward: float, tokens: int = 5, whole: bool = True) -> dict[str, Any]:
    return {"text": text, "tokens": tokens, "whole": whole, "reward": reward}


def test_the_best_are_kept() -> None:
    some = [completion("a", 1.0, 9), completion("b", 1.0, 3), completion(" b ", 1.0, 4), completion("c", 0.2),
            completion("d", 2.0, whole=False), completion("e", 1.5, 99)]  # fmt: skip
    assert [c["text"] for c in best(some, 2, 1.0)] == ["e", "b"]
    assert [c["text"] for c in best(some, 9, 1.0)] == ["e", "b", "a"], "no two alike, none cut, none below the least"
    assert best(some, 9, 3.0) == []


def test_what_is_kept_is_a_conversation() -> None:
    asked = [
        {"prompt": [user("1+1=?")], "answer": "2", "completions": [completion("2", 1.0), completion("3", 0.0)]},
        {"prompt": [user("1+2=?")], "answer": "3", "completions": [completion("7", 0.0), completion("8", 0.0)]},
    ]
    kept, report = select_samples(asked, Sample())
    assert kept == [{"messages": [user("1+1=?"), assistant("2")], "reward": 1.0}]
    expected = {"prompts": 2, "answered": 1, "completions": 4, "kept": 1, "whole": 1.0, "reward": 0.25, "tokens": 20}
    assert {k: report[k] for k in expected} == expected


SAMPLING = ("sample.num_prompts=10", "sample.batch_size=3", "sample.num_samples=3", "sample.reward.correct=0",
            "sample.reward.format=1", "sample.max_completion_length=40")  # fmt: skip


@pytest.fixture(scope="module")
def sampled(folder: Path, start: Path) -> Iterator[RunDirectory]:
    run = make_run(folder, "sample", *SAMPLING, "sample.keep=2", name="sample", model=start)
    assert train.run_attempt(run, 1) == 0
    yield run


@pytest.mark.usefixtures("here")
def test_samples_are_judged_and_the_best_written(sampled: RunDirectory) -> None:
    from post_training.data.arithmetic import Arithmetic

    assert manifest.problem(sampled.model, hashes=True) is None
    records = [json.loads(line) for line in (sampled.model / "records.jsonl").read_text().splitlines()]
    report = json.loads((sampled.model / "results.json").read_text())
    assert (report["prompts"], report["completions"], report["kept"]) == (10, 30, len(records))
    assert 0 < len(records) <= 20
    prompts = Arithmetic(common.load_config(sampled.read_config()).data).problems("train")["prompt"][:10]
    asked = [r["messages"][:-1] for r in records]
    assert all(p in prompts for p in asked) and asked == sorted(asked, key=prompts.index)
    assert all(r["reward"] == 1.0 and r["messages"][-1]["role"] == "assistant" for r in records)
    pairs = [json.dumps(r["messages"]) for r in records]
    assert len(set(pairs)) == len(pairs)
    # shards are progress: a run that is stopped often does not give up
    history = summarise(ledger.read(sampled.ledger))
    assert (history.checkpoint_step, history.attempts_without_progress) == (4, 0)


@pytest.mark.usefixtures("here")
def test_a_stop_and_several_ranks_change_no_record(
    folder: Path, start: Path, sampled: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (sampled.model / "records.jsonl").read_bytes()
    stopped = make_run(folder, "sample", *SAMPLING, "sample.keep=2", name="stopped", model=start)
    shards = stopped.checkpoints / "shards"
    from post_training.stages import sample as module

    whole = module.sample_shard

    def stop_in_the_second(stage: Any, model: Any, rows: Any, shard: int) -> Any:
        if shard == 1:
            stopped.request_stop(1)
        return whole(stage, model, rows, shard)

    monkeypatch.setattr(module, "sample_shard", stop_in_the_second)
    monkeypatch.setattr(module, "make_pulse", without_pause(module.make_pulse))
    assert train.run_attempt(stopped, 1) == STOPPED
    assert [p.name for p in sorted(shards.iterdir())] == ["shard-000000.jsonl"]
    assert not stopped.model.exists()
    monkeypatch.setattr(module, "sample_shard", whole)
    first = (shards / "shard-000000.jsonl").stat().st_mtime_ns
    assert train.run_attempt(stopped, 2) == 0
    assert (shards / "shard-000000.jsonl").stat().st_mtime_ns == first, "what is finished is not done again"
    assert [e["step"] for e in events(stopped, "training_started")] == [0, 1]
    assert (stopped.model / "records.jsonl").read_bytes() == expected

    pair = make_run(folder, "sample", *SAMPLING, "sample.keep=2", name="pair", model=start)
    for rank in ("1", "0"):  # the second first: rank 0 waits for all
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert train.run_attempt(pair, 1) == 0
        assert pair.model.exists() is (rank == "0")
    assert (pair.model / "records.jsonl").read_bytes() == expected


def without_pause(make: Any) -> Any:
    """Pulses that look for a stop request each time, and not once a second."""

    def made(run: RunDirectory, attempt: int, *rest: Any) -> Any:
        pulse = make(run, attempt, *rest)

        def every_time(*_: object) -> None:
            from post_training.evaluation.work import Asked

            pulse()
            if run.stop_requested(attempt):
                raise Asked

        return every_time

    return made


@pytest.mark.usefixtures("here")
def test_sft_trains_on_samples(folder: Path, start: Path, sampled: RunDirectory) -> None:
    runs = [
        make_run(folder, "sft", "training.max_steps=2", "training.effective_batch_size=4", "sft.lr=1e-2", name=name,
                 model=start, **more)
        for name, more in (("best", {"data": sampled.model}), ("usual", {}))
    ]  # fmt: skip
    stage = common.open_stage(runs[0])
    from post_training.stages.sft import build_trainer

    said = {stage.tokenizer.decode([i for i in row["labels"] if i != -100])
            for row in build_trainer(stage).train_dataset}  # fmt: skip
    assert said == {row[-1]["content"] + "<|end|>" for row in read_samples(str(sampled.model))["messages"]}
    assert all(train.run_attempt(run, 1) == 0 for run in runs)
    assert weights(runs[0]) != weights(runs[1]) and metrics(runs[0])[0]["loss"] != metrics(runs[1])[0]["loss"]


@pytest.mark.usefixtures("here")
def test_nothing_kept_and_nothing_there(folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(folder, "sample", *SAMPLING, "sample.num_prompts=2", "sample.max_completion_length=1", name="none",
                   model=start)  # fmt: skip
    assert train.run_attempt(run, 1) == 2
    said = capsys.readouterr().err
    assert "none of 6 completions is worth it: 0% were whole" in said and "fix: " in said
    assert not run.model.exists()
    other = make_run(folder, "sft", "training.max_steps=1", name="no-records", model=start, data=start)
    assert train.run_attempt(other, 1) == 2
    assert "has no records.jsonl" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- pipelines


PIPELINES = {
    "reasoning": ["base", "distill", "grpo"],
    "rejection": ["base", "sft", "sample", "best"],
    "safety": ["base", "sft", "safety"],
    "instructgpt": ["base", "sft", "rm", "ppo"],
    "pretrain": ["base"],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_compose(name: str) -> None:
    tokens = [f"pipeline={name}", "cluster=local", "slurm.gpus_per_node=0"]
    if name == "safety":
        tokens.append(rewrite("safety.data.path=/"))
    chosen = select(tokens, only_one=False)
    assert [s for s in chosen.wanted if not s.startswith("eval")] == PIPELINES[name]
    assert all(chosen.config(s).stage == chosen.stages[s].stage for s in chosen.wanted)
    if name == "rejection":
        taken = {role: source for role, source in sources(chosen, "best").items() if source is not None}
        assert taken == {"model": "stage:sft", "data": "stage:sample"}
    if name == "safety":
        assert chosen.config("safety").data.name == "hh_rlhf" and chosen.config("sft").data.name == "arithmetic"
    if name == "instructgpt":
        sft = chosen.config("sft")
        assert (sft.sft.lr, sft.sft.kl_coef, sft.training.lr_scheduler) == (2e-5, 0.1, "cosine")
    if name == "pretrain":
        base = chosen.config("base")
        assert (base.model.hidden_size, base.model.num_layers, base.base.packing) == (1024, 24, "wrapped")


def test_only_samples_are_records() -> None:
    nodes = {"base": Node(stage="base"), "s": Node(stage="sample", model="base"), "sft": Node(stage="sft", data="s")}
    graph.check(nodes)
    assert graph.order(nodes) == ["base", "s", "sft"]
    for node, key, word in (
        (Node(stage="sft", data="base"), "pipeline.stages.x.data", "makes no records"),
        (Node(stage="dpo", data="s"), "pipeline.stages.x.data", "takes no other stage's records"),
        (Node(stage="sft", data="nowhere"), "pipeline.stages.x.data", "no such stage"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            graph.check({**nodes, "x": node})
        assert caught.value.key == key


def test_adapters_and_samples_are_part_of_what_a_run_is() -> None:
    composer = Composer()

    def identity(*overrides: str, stage: str = "sft", **inputs: Any) -> str:
        cfg = composer.config([f"stage={stage}", *overrides])
        return str(freeze(cfg, stage, "p", inputs)["identity"])

    plain = identity()
    assert identity("lora.alpha=8") == plain, "without lora.r nothing else of lora says anything"
    records = {"path": "/x", "run_dir": "/", "identity": "a"}
    different = {plain, identity("lora.r=4"), identity("lora.r=8"), identity("lora.r=8", "lora.alpha=8"),
                 identity("sft.kl_coef=0.1"), identity(data=records), identity(data={**records, "identity": "b"}),
                 identity("lora.r=4", "lora.quantize=nf4")}  # fmt: skip
    assert len(different) == 8
    assert identity("sample.keep=2", stage="sample") != identity(stage="sample")
