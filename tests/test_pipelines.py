"""Every named pipeline from its submission to its end: on a real SLURM, with tiny models and a few steps a stage.

All are submitted with the command's own code and run side by side. `full` trains in processes that start as they do on
a cluster, others in forked ones (tests.shim). The second ones find their first stages finished by the first ones.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers import compare
from launchers import devcluster as dc
from launchers.cli import run as run_command
from launchers.pipeline import main as pipeline
from launchers.selection import select
from launchers.submit import launch
from post_training.rewards.steps import step_figures
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from post_training.run.results import Results
from post_training.run.results import read as read_results
from tests.records import PUBLISHED, write
from tests.shim import python_without_imports
from tests.slurm_fixture import short_folder, wait_for
from tests.training import ROOT, TINY, metrics, weights

pytestmark = pytest.mark.slurm

SHORT = [
    *(o for o in TINY if not o.startswith(("cluster.", "slurm."))), "training.max_steps=2", "eval.max_new_tokens=16",
]  # fmt: skip
FIRST: dict[str, list[str]] = {
    "full": [],
    "rlhf": [],
    "reasoning": [],
    "instructgpt": [],
    "pretrain": [
        *(f"{name}.data{token}" for name in ("base", "eval_base") for token in ("=text", ".path={records}/text.jsonl")),
        "model.dtype=bfloat16", "model.vocab_size=280",
    ],
}  # fmt: skip
SECOND: dict[str, list[str]] = {
    "prepared": [],
    "dpo": [],
    "safety": ["safety.data.path={records}/harmless.jsonl.gz", "safety.data.held_out=4"],
    # so small a model is never right: of its whole answers a coin says which are good
    "rejection": ["sample.reward.correct=0", "sample.reward.random=1", "sample.max_completion_length=48"],
    "curriculum": [
        f"{name}.data.{token}" for name in ("grpo", "eval_sft", "eval_sums", "eval_grpo")
        for token in ("path={records}/sevens.jsonl", "held_out=8")
    ],
}  # fmt: skip
"""What each needs beside SHORT: its records, and what a tiny model can do."""
PIPELINES = {**FIRST, **SECOND}
OWN = {
    "full": ["base", "sft", "rm", "ppo", "dpo", "grpo"],
    "rlhf": ["base", "sft", "rm", "ppo"],
    "reasoning": ["base", "distill", "grpo"],
    "instructgpt": ["base", "sft", "rm", "ppo"],
    "pretrain": ["base"],
    "prepared": ["prepare"],
    "dpo": ["dpo", "grpo"],
    "safety": ["safety"],
    "rejection": ["sample", "best"],
    "curriculum": ["sums", "grpo"],
}
"""The stages, evaluations aside, that run in the pipeline's own folder; others are finished ones of FIRST."""


class Done:
    """All pipelines, run to their ends. `local`: `prepared`, which is `full` with a stage more, without SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.local = folder, folder / "local"
        self.waiting = ""  # what squeue said after `full` was submitted
        self.two_nodes = RunDirectory(folder / "two_nodes" / "quickstart" / "base")
        self.nodes = ""  # what squeue said of all jobs

    def output_base(self, name: str) -> Path:
        """Each of FIRST has its own, so that which stages run does not depend on which are done first."""
        return self.folder / (name if name in FIRST else "full" if name == "prepared" else "rlhf")

    def graph(self, name: str) -> dict[str, Any]:
        """The stages of pipeline.json."""
        described = self.output_base(name) / name / "pipeline.json"
        stages: dict[str, Any] = json.loads(described.read_text())["stages"]
        return stages

    def run(self, name: str, stage: str) -> RunDirectory:
        return RunDirectory(Path(self.graph(name)[stage]["run_dir"]))


def given(name: str, records: Path) -> list[str]:
    return [f"pipeline={name}", *SHORT, *(token.format(records=records) for token in PIPELINES[name])]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, devcluster: dc.Cluster) -> Iterator[Done]:
    made = Done(tmp_path_factory.mktemp("pipelines"))
    records = made.folder / "records"
    question, pair, text = (PUBLISHED[name][0] for name in ("gsm8k", "hh_rlhf", "text"))
    write(records / "sevens.jsonl", [{**question, "question": f"{i} times 7?"} for i in range(32)])
    write(records / "harmless.jsonl.gz", [{k: f"{v} {i}" for k, v in pair.items()} for i in range(32)])
    write(records / "text.jsonl", [{"text": f"{text['text']} Day {i}. " * 20} for i in range(48)])
    where = ["cluster=dev", f"cluster.slurm_conf={devcluster.conf}"]
    # one job a node: all at once would need the memory of all at once
    where.append("slurm.mem=1800G")
    short = short_folder()
    try:
        with (
            python_without_imports(short) as python,
            _cancelled_at_the_end(devcluster),
            pytest.MonkeyPatch.context() as environment,
        ):
            for key, value in devcluster.env.items():
                environment.setenv(key, value)
            forked, real = f"cluster.python={python}", short / "real"
            judges_forked = f'case "$3" in */eval_*) exec {python} "$@" ;; esac'
            real.write_text(f'#!/bin/bash\n{judges_forked}\nexec {shlex.quote(sys.executable)} "$@"\n')
            real.chmod(0o755)
            for name in FIRST:
                start = f"cluster.python={real}" if name == "full" else forked
                _quietly(pipeline, [*given(name, records), *where, start, _output(made, name)])
                if name == "full":
                    made.waiting = devcluster.run("squeue", "--noheader", "--format=%i %E")
            _quietly(
                lambda argv: run_command(lambda tokens: select(tokens, only_one=True), launch, "", argv),
                ["stage=base", "pipeline=quickstart", *where, forked, "slurm.num_nodes=2", "slurm.gpus_per_node=2",
                 "slurm.mem=null", "training.max_steps=3", "training.per_device_train_batch_size=4",
                 "data.num_documents=200", f"paths.output_base={made.folder / 'two_nodes'}"],
            )  # fmt: skip
            argv = [sys.executable, "-m", "launchers.pipeline", *given("prepared", records), forked]
            argv += ["cluster=local", f"paths.output_base={made.local}"]
            here = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
            assert here.returncode == 0, here.stdout + here.stderr
            wait_for("the ends of the first jobs", lambda: not _jobs(devcluster), timeout=1200)
            for name in SECOND:
                _quietly(pipeline, [*given(name, records), *where, forked, _output(made, name)])
            wait_for("the ends of the second jobs", lambda: not _jobs(devcluster), timeout=600)
            made.nodes = devcluster.run("squeue", "--noheader", "--states=all", "--format=%i %D")
            yield made
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _output(made: Done, name: str) -> str:
    return f"paths.output_base={made.output_base(name)}"


def _quietly(command: Any, argv: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(argv)
    assert code == 0, f"{argv}\n{said.getvalue()}"


def _jobs(cluster: dc.Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%i").split()


@contextlib.contextmanager
def _cancelled_at_the_end(cluster: dc.Cluster) -> Iterator[None]:
    """What a failure leaves on the cluster ends with it."""
    try:
        yield
    finally:
        if jobs := _jobs(cluster):
            cluster.run("scancel", "--signal=KILL", *jobs, check=False)
            cluster.run("scancel", *jobs, check=False)
            wait_for("the cancelled jobs to be gone", lambda: not _jobs(cluster), timeout=60)


def attempt(run: RunDirectory) -> tuple[float, float]:
    """When the run's only attempt began and ended."""
    events = ledger.read(run.ledger)
    times = {event["event"]: event["time"] for event in events}
    assert summarise(events).attempts == 1, events
    return times["attempt_started"], times["attempt_ended"]


def results(run: RunDirectory) -> Results:
    return dataclasses.replace(read_results(run), seconds=None)


def samples(judge: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in judge.samples.read_text().splitlines()]


def start_of(run: RunDirectory, role: str = "model") -> Path:
    """The run directory whose output was this run's input."""
    return Path(run.read_config()["inputs"][role]["run_dir"])


def without_the_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("step", "loss", "reward", "kl", "grad_norm", "train_loss", "eval_loss")
    return [{k: v for k, v in line.items() if k in kept} for line in lines]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_is_done_once_and_in_order(done: Done, name: str) -> None:
    graph = done.graph(name)
    own = done.output_base(name) / name
    ran = [stage for stage, entry in graph.items() if Path(entry["run_dir"]).parent == own]
    assert [stage for stage in ran if graph[stage]["stage"] != "eval"] == OWN[name]
    for stage, entry in graph.items():
        run = done.run(name, stage)
        said = [path.read_text()[-3000:] for path in run.slurm.glob("slurm-*")]
        assert manifest.problem(run.model) is None, "\n".join([stage, *said])
        if stage in ran:
            began = attempt(run)[0]
            assert all(attempt(done.run(name, upstream))[1] < began for upstream in entry["after"]), stage
        if entry["stage"] == "eval":
            assert "perplexity_text" in results(run).figures if name == "pretrain" else results(run).score.count == 8
        elif entry["stage"] not in ("prepare", "sample"):
            lines = metrics(run)
            assert lines[-1]["step"] == 2
            losses = [line["loss"] for line in lines if "loss" in line]
            assert len(losses) == 2 and all(map(math.isfinite, losses))
            source = run.read_config()["inputs"]["model"]
            assert source is None or weights(run) != weights(RunDirectory(Path(source["run_dir"])))


def test_slurm_trains_the_same_models(done: Done) -> None:
    """Through sbatch and afterok, or under the local supervisor: the same weights, bit for bit."""
    graph = done.graph("full")
    ids = {stage: summarise(ledger.read(done.run("full", stage).ledger)).job_id for stage in graph}
    assert f"{ids['grpo']} afterok:{ids['ppo']}" in done.waiting
    for stage, entry in graph.items():
        here, there = RunDirectory(done.local / "prepared" / stage), done.run("full", stage)
        if entry["stage"] == "eval":
            assert results(here) == results(there)
            assert here.samples.read_bytes() == there.samples.read_bytes()
        else:
            assert weights(here) == weights(there), stage
            assert without_the_clock(metrics(here)) == without_the_clock(metrics(there))


def test_two_nodes_with_two_tasks_each(done: Done) -> None:
    run = done.two_nodes
    assert manifest.problem(run.model) is None, [path.read_text()[-3000:] for path in run.slurm.glob("slurm-*")]
    checkpoint = manifest.read(run.checkpoints / "checkpoint-3")
    assert checkpoint is not None
    assert checkpoint["world_size"] == 4
    assert f"{summarise(ledger.read(run.ledger)).job_id} 2" in done.nodes.split("\n")


def test_rlhf_is_scored_by_its_own_reward_model(done: Done) -> None:
    ppo = done.run("rlhf", "ppo")
    assert start_of(ppo, "reward_model") == done.run("rlhf", "rm").root
    assert start_of(ppo, "reference") == start_of(ppo) == done.run("rlhf", "sft").root
    config = ppo.read_config()["ppo"]
    steps = [line for line in metrics(ppo) if "score_rm" in line]
    assert len(steps) == 2 and config["reward_model_weight"] == 0.5
    for line in steps:
        paid = sum(config["reward"][name.removeprefix("rewards/")] * value
                   for name, value in line.items() if name.startswith("rewards/"))  # fmt: skip
        assert line["reward"] == pytest.approx(paid + 0.5 * line["score_rm"], abs=1e-4)
    assert results(done.run("rlhf", "eval_rm")).headline == "preference_accuracy"


def test_dpo_begins_at_its_reference_and_grpo_with_its_model(done: Done) -> None:
    dpo, grpo = done.run("dpo", "dpo"), done.run("dpo", "grpo")
    assert start_of(dpo, "reference") == start_of(dpo) == done.run("rlhf", "sft").root
    assert metrics(dpo)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert start_of(grpo) == dpo.root
    assert any("rewards/random/mean" in line for line in metrics(grpo))


def test_reasoning_is_judged_by_steps_and_answers(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ("base", "distill", "grpo")
    assert [start_of(done.run("reasoning", stage)).name for stage in chain[1:]] == ["base", "distill"]
    where = f"paths.output_base={done.output_base('reasoning')}"
    assert compare.main([where]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in lines if line[:2] == ["stage", "score"])
    assert header[-2:] == ["form", "steps"]  # no step of an answer of so small a model has an equation
    assert compare.main([where, "--csv"]) == 0
    rows = {row["stage"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert set(rows) == set(chain)
    for stage in chain:
        judge = done.run("reasoning", f"eval_{stage}")
        figures = step_figures([sample["completion"] for sample in samples(judge)])
        found = results(judge).figures
        assert {k: found[k].value if k in found else None for k in figures} == figures
        assert rows[stage]["score"] == str(results(judge).score.value)
        assert float(rows[stage]["steps"]) == figures["steps"]


def test_safety_prefers_harmless_answers_and_counts_what_it_costs(done: Done) -> None:
    safety = done.run("safety", "safety")
    config = safety.read_config()
    assert (config["stage"], config["data"]["name"]) == ("dpo", "hh_rlhf")
    assert start_of(safety, "reference") == start_of(safety) == done.run("rlhf", "sft").root
    (report,) = json.loads(safety.data_report.read_text())
    (source,) = report["sources"]
    assert (report["view"], report["rows"]) == ("preferences", 28), "of 32 pairs, 4 are held out"
    assert source["path"].endswith("harmless.jsonl.gz")
    assert all("rewards/margins" in line for line in metrics(safety) if "loss" in line)
    asked = [[sample["prompt"] for sample in samples(done.run("safety", f"eval_{name}"))] for name in ("sft", "safety")]
    assert asked[0] == asked[1], "both are judged on sft's problems"
    assert done.run("safety", "eval_safety").read_config()["data"]["name"] == "arithmetic"


def test_rejection_trains_on_the_best_samples(done: Done) -> None:
    sample, best = done.run("rejection", "sample"), done.run("rejection", "best")
    report = json.loads((sample.model / "results.json").read_text())
    kept = [json.loads(line) for line in (sample.model / "records.jsonl").read_text().splitlines()]
    assert 0 < len(kept) == report["kept"] <= report["prompts"]
    assert 0 < report["reward"] < 1 and all(record["reward"] == 1 for record in kept), "the coin's better side alone"
    assert start_of(sample) == start_of(best) == done.run("rlhf", "sft").root
    assert start_of(best, "data") == sample.root
    passes = 2 * 2 / math.ceil(len(kept) / 4)  # two steps of two forward passes with four records each
    assert metrics(best)[-1]["epoch"] == pytest.approx(passes, abs=1e-3), "its records are the kept ones"


def test_curriculum_goes_from_sums_to_the_real_set(done: Done) -> None:
    sums, grpo = done.run("curriculum", "sums"), done.run("curriculum", "grpo")
    assert (sums.read_config()["data"]["name"], grpo.read_config()["data"]["name"]) == ("arithmetic", "gsm8k")
    assert start_of(sums) == done.run("rlhf", "sft").root and start_of(grpo) == sums.root
    for stage in ("sft", "sums", "grpo"):
        asked = [sample["prompt"] for sample in samples(done.run("curriculum", f"eval_{stage}"))]
        assert len(asked) == 8 and all("times 7?" in prompt for prompt in asked), "all are judged on the real set"


def test_instructgpt_keeps_to_the_start_model(done: Done) -> None:
    sft = done.run("instructgpt", "sft")
    config = sft.read_config()
    assert (config["sft"]["kl_coef"], config["sft"]["lr"], config["training"]["lr_scheduler"]) == (0.1, 2e-5, "cosine")
    distances = [line["kl"] for line in metrics(sft) if "loss" in line]
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[1] < 1e-3, "it has hardly begun to move"
    assert start_of(done.run("instructgpt", "ppo"), "reward_model") == done.run("instructgpt", "rm").root


def test_pretrain_makes_its_tokenizer_and_full_rows(done: Done) -> None:
    base = done.run("pretrain", "base")
    config = base.read_config()
    assert (config["base"]["packing"], config["model"]["tokenizer"], config["base"]["lr"]) == ("wrapped", "train", 3e-4)
    assert len(json.loads((base.model / "tokenizer.json").read_text())["model"]["vocab"]) > 256
    about = json.loads((base.model / "config.json").read_text())
    assert (about["vocab_size"], about["dtype"]) == (280, "bfloat16")
    assert results(done.run("pretrain", "eval_base")).figures["perplexity_text"].value > 1


def test_prepared_data_is_what_its_stages_read(done: Done) -> None:
    """On SLURM a job without a GPU finds what `full` made for itself; here it comes first, and nobody makes more."""
    assert done.run("prepared", "prepare").read_config()["slurm"]["gpus_per_node"] == 0
    assert done.run("prepared", "base").root == done.run("full", "base").root
    local = {stage: RunDirectory(done.local / "prepared" / stage) for stage in done.graph("prepared")}
    for prepare, base in ((done.run("prepared", "prepare"), done.output_base("full")), (local["prepare"], done.local)):
        made = json.loads((prepare.model / "prepared.json").read_text())["stages"]
        assert set(made) == {"base", "sft", "rm", "dpo"}
        there = {str(path) for path in (base / ".prepared").iterdir() if not path.name.startswith(".")}
        assert there == {entry["folder"] for entry in made.values()}
    end = attempt(local["prepare"])[1]
    assert all(attempt(local[stage])[0] > end for stage in made)
