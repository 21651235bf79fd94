"""launchers.plan: what it knows, what it measures, what it says it does not know; table and JSON alike."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import devcluster as dc
from launchers import plan, slurm
from launchers.compose import rewrite, rewrite_stage
from launchers.selection import Selection, select
from launchers.submission import freeze
from post_training.run import manifest
from post_training.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
WIDE = ["stage=sft", "cluster=h100", "model=qwen3_8b", "parallel=zero3", "slurm.num_nodes=4",
        "training.per_device_train_batch_size=2"]  # fmt: skip


def chosen(tmp_path: Path, *settings: str) -> Selection:
    given = [*settings, f"paths.output_base={tmp_path}/outputs"]
    return select([rewrite_stage(rewrite(s)) for s in given], only_one=any(s.startswith("stage=") for s in given))


def told(tmp_path: Path, *settings: str, **assumed: Any) -> dict[str, Any]:
    selection = chosen(tmp_path, *settings)
    cfgs = selection.configs
    runs = plan.earlier_runs(selection.output_base, {cfg.stage for cfg in cfgs.values()})
    return plan.estimate(selection, plan.Assumed(**assumed), runs, {}, 121.0)


def row(said: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in said["stages"] if one["stage"] == name)


def earlier(tmp_path: Path, stage: str, *settings: str, steps: int = 100, step: float = 0.5) -> RunDirectory:
    """A run that is done, as it would lie there."""
    cfg = chosen(tmp_path, f"stage={stage}", *settings).config(stage)
    run = RunDirectory(tmp_path / "outputs" / "before" / stage)
    run.create()
    frozen = freeze(cfg, stage, "before", {})
    run.config.write_text(yaml.safe_dump(frozen))
    lines = [{"step": n, "max_steps": steps, "time": 1020.0 + step * n} for n in range(10, steps + 1, 10)]
    run.metrics.parent.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = 1020.0 + steps * step
    events: list[dict[str, Any]] = [
        {"time": 1000.0, "event": "attempt_started", "attempt": 1, "job_id": "7"},
        {"time": 1020.0, "event": "training_started", "attempt": 1, "step": 0},
        {"time": end + 3, "event": "checkpoint_saved", "attempt": 1, "step": steps, "seconds": 3.0},
        {"time": end + 7, "event": "attempt_ended", "attempt": 1, "outcome": "finished", "action": "exit"},
    ]
    run.ledger.write_text("".join(json.dumps({**event, "version": 1}) + "\n" for event in events))
    return run


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path: Path) -> None:
    said = told(tmp_path, "pipeline=full", "cluster=dev")
    assert row(said, "base")["steps"]["value"] == 200
    for name in ("base", "sft", "rm", "ppo", "dpo", "grpo"):
        one = row(said, name)
        assert (one["step_seconds"]["value"], one["step_seconds"]["source"]) == (None, "unknown")
        assert one["goodput"] is one["held_seconds"] is one["gpu_hours"] is None
    assert said["whole"]["wall_seconds"] is None
    assert set(said["whole"]["not_counted"]) == {one["stage"] for one in said["stages"]}
    text = "\n".join(plan.lines(said, 80))
    assert "step's seconds (ppo, grpo)" in text and "--step-seconds STAGE=SECONDS" in text


def test_operations_are_estimated_as_they_are_counted(tmp_path: Path) -> None:
    """6 N T and PaLM's attention term; the assumed MFU is said."""
    said = told(tmp_path, *WIDE, "training.max_steps=1000")
    one = row(said, "sft")
    n, layers, queries, length, rows = 7.57e9, 36, 4096, 1024, 64
    flops = (6 * n + 12 * layers * queries * length) * rows * length
    assert one["step_seconds"]["source"] == "estimated"
    assert one["step_seconds"]["value"] == pytest.approx(flops / (32 * 989e12 * 0.4), rel=0.01)
    assert one["gpu_hours"] == pytest.approx(32 * one["held_seconds"] / 3600)
    assert "40 % of 989 TFLOPS" in "\n".join(plan.lines(said, 200))
    half = row(told(tmp_path, *WIDE, "training.max_steps=1000", mfu=0.2), "sft")
    assert half["step_seconds"]["value"] == pytest.approx(2 * one["step_seconds"]["value"])
    frozen_base = row(told(tmp_path, *WIDE, "training.max_steps=1000", "lora.r=16"), "sft")
    assert frozen_base["step_seconds"]["value"] < 0.75 * one["step_seconds"]["value"]
    assert frozen_base["checkpoint"]["bytes"] < 0.05 * one["checkpoint"]["bytes"]


def test_generating_stages_are_never_estimated(tmp_path: Path) -> None:
    settings = [*WIDE[1:5], "stage=grpo", "training.max_steps=10", "training.per_device_train_batch_size=2"]
    assert row(told(tmp_path, *settings), "grpo")["step_seconds"]["value"] is None
    assert row(told(tmp_path, *settings, step_seconds={"grpo": 9.0}), "grpo")["step_seconds"]["value"] == 9.0


def test_an_earlier_run_is_believed_before_estimates(tmp_path: Path) -> None:
    run = earlier(tmp_path, "sft", "cluster=dev")
    one = row(told(tmp_path, "stage=sft", "cluster=dev"), "sft")
    assert one["step_seconds"] == {"value": 0.5, "source": "measured", "about": f"in {run.root}"}
    assert (one["startup_seconds"]["value"], one["save_seconds"]["value"]) == (20.0, 3.0)
    assert (one["teardown_seconds"]["value"], one["teardown_seconds"]["source"]) == (4.0, "measured")
    assert one["steps"]["value"] == 100  # of the same data and length
    assert one["goodput"]["p50"] == pytest.approx(50 / (20 + 50 + 3 + 4))


@pytest.mark.parametrize(
    "other", ["model.num_layers=4", "slurm.num_nodes=2", "cluster=h100", "training.max_length=64", "stage=dpo"]
)
def test_a_run_of_another_kind_is_not_believed(tmp_path: Path, other: str) -> None:
    earlier(tmp_path, "sft", "cluster=dev")
    settings = {"stage": "stage=sft", "cluster": "cluster=dev"} | {other.partition("=")[0]: other}
    one = told(tmp_path, *settings.values(), "training.per_device_train_batch_size=4")["stages"][0]
    assert one["step_seconds"]["source"] != "measured"


@pytest.mark.parametrize("damage", ["config.yaml", "ledger.jsonl", "logs/metrics.jsonl"])
def test_damage_is_passed_over(tmp_path: Path, damage: str) -> None:
    run = earlier(tmp_path, "sft", "cluster=dev")
    (run.root / damage).write_bytes(b"\xff\x00{[: \n1e999")
    said = told(tmp_path, "stage=sft", "cluster=dev")
    assert (row(said, "sft")["startup_seconds"]["source"] == "measured") == (damage == "logs/metrics.jsonl")


def test_a_stage_that_takes_no_steps_is_as_long_as_its_like(tmp_path: Path) -> None:
    earlier(tmp_path, "eval", "cluster=dev", "inputs.model=a/b")
    said = told(tmp_path, "pipeline=full", "cluster=dev", step_seconds=dict.fromkeys(
        ("base", "sft", "rm", "ppo", "dpo", "grpo"), 1.0))  # fmt: skip
    one = row(said, "eval_sft")
    assert one["held_seconds"] == pytest.approx(77.0) and one["held"]["source"] == "measured"
    longer = told(tmp_path, "stage=eval_sft", "cluster=dev", "inputs.model=a/b", "eval.max_new_tokens=1000")
    assert row(longer, "eval_sft")["held_seconds"] is None
    whole = said["whole"]
    assert whole["not_counted"] == [] and whole["critical_path"][:2] == ["base", "sft"]
    assert whole["wall_seconds"] < sum(one["wall_seconds"] for one in said["stages"])
    assert whole["gpu_hours"] == pytest.approx(sum(one["gpu_hours"] for one in said["stages"]))


def test_what_is_done_takes_nothing_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    settings = ["pipeline=full", "cluster=dev", "run_name=before"]
    selection = chosen(tmp_path, *settings)
    base = earlier(tmp_path, "base", *settings[1:], "run_name=before", steps=200)
    there, refused = plan.what_is_there(selection)
    assert refused is None and there["base"] == ("again", 200) and there["sft"] == ("new", 0)
    base.model.mkdir(exist_ok=True)
    (base.model / "weights").write_text("w")
    manifest.write(base.model, identity=base.read_config()["identity"])
    there, _ = plan.what_is_there(selection)
    assert there["base"][0] == "done"
    seconds = dict.fromkeys(("base", "sft", "rm", "ppo", "dpo", "grpo"), 1.0)
    there = {**there, "sft": ("again", 300)}
    said = plan.estimate(selection, plan.Assumed(step_seconds=seconds), [], {}, 121.0, there)
    assert row(said, "base")["held_seconds"] == 0 and "base" not in said["whole"]["critical_path"]
    assert row(said, "sft")["seconds"]["steps"] == 75
    text = "\n".join(plan.lines(said, 80))
    assert re.search(r"base .* done", text) and "goes on: sft from step 300" in text
    base.config.write_text(yaml.safe_dump(base.read_config() | {"identity": "0"}))
    assert "another config" in str(plan.what_is_there(selection)[1])


GRAPHS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 100), min_size=n, max_size=n),
        st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n),
    )
)


@settings(max_examples=100, deadline=None)
@given(GRAPHS)
def test_the_critical_path_is_the_longest(graph: tuple[list[float], list[set[int]]]) -> None:
    times, above = graph
    needs = {str(i): [str(up) for up in above[i] if up < i] for i in range(len(times))}
    path, length = plan.longest(needs, {str(i): time for i, time in enumerate(times)})
    assert length == pytest.approx(sum(times[int(name)] for name in path))

    def before(name: str) -> set[str]:
        return {name}.union(*(before(up) for up in needs[name]))

    assert all(up in before(down) for up, down in pairwise(path))  # what takes no time is not named

    def end(name: str) -> float:
        return times[int(name)] + max((end(up) for up in needs[name]), default=0.0)

    assert length == pytest.approx(max(end(name) for name in needs))


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_and_says_what_the_json_says(tmp_path: Path, width: int) -> None:
    seconds = dict.fromkeys(("base", "sft", "rm", "ppo", "dpo", "grpo"), 12.0)
    said = told(tmp_path, "pipeline=full", "cluster=dev", "sft.slurm.num_nodes=2", step_seconds=seconds)
    one = row(said, "grpo")
    said["nodes"] = [{"stage": "grpo", "points": plan.over_nodes(one, [1, 1000])}]
    lines = list(plan.lines(json.loads(json.dumps(said)), width, 10**9))
    assert all(len(line) <= width for line in lines)
    table = next(line for line in lines if line.startswith("grpo"))
    assert "500" in table and f"{100 * one['goodput']['p50']:.0f} %" in table and "12 g" in table
    assert f"{one['requeues']:.1f}".removesuffix(".0") in table.split()
    assert any(re.match(r"1,000 +30 min", line) for line in lines)
    thousand = said["nodes"][0]["points"][1]
    assert thousand["mttf_seconds"] == 1800 and thousand["gpu_hours"] == pytest.approx(
        1000 * thousand["held_seconds"] / 3600
    )


def test_saves_that_come_too_often_are_told(tmp_path: Path) -> None:
    said = told(tmp_path, *WIDE, "training.max_steps=20000", "checkpointing.save_steps=10")
    text = " ".join(plan.lines(said, 500))
    one = row(said, "sft")
    assert one["checkpoint"]["goodput_at_best"] > one["goodput"]["mean"] + 0.3
    assert "checkpointing.save_steps=20000" in text  # not more than it has
    assert "save_minutes=auto" not in text  # which would add saves
    rare = told(tmp_path, *WIDE, "training.max_steps=400000", "checkpointing.save_steps=400000", mttf_hours=20.0)
    at = row(rare, "sft")["checkpoint"]["best_seconds"] / row(rare, "sft")["step_seconds"]["value"]
    assert f"checkpointing.save_steps={round(at)}, or save_minutes=auto" in " ".join(plan.lines(rare, 500))
    auto = row(told(tmp_path, *WIDE, "training.max_steps=20000", "checkpointing.save_minutes=auto"), "sft")
    assert auto["goodput"]["mean"] < one["checkpoint"]["goodput_at_best"]  # save_steps=500 still holds beside it
    settings = [*WIDE, "training.max_steps=20000", "checkpointing.save_steps=20000", "checkpointing.save_minutes=auto"]
    alone = row(told(tmp_path, *settings), "sft")
    assert alone["goodput"]["mean"] == pytest.approx(one["checkpoint"]["goodput_at_best"], abs=0.03)


def test_a_wall_time_too_short_to_get_on(tmp_path: Path) -> None:
    said = told(tmp_path, *WIDE, "training.max_steps=2000", "slurm.wall_time=1:00:00", mttf_hours=0.05)
    assert row(said, "sft")["gave_up"] > 0.9
    assert "gave up without progress" in "\n".join(plan.lines(said, 80))


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("sbatch: Job 12 to start at 2026-11-22T01:20:00 using 8 processors on nodes n1 in partition gpu", True),
        ("sbatch: Job 12 to start at Unknown using 8 processors on nodes (null)", False),
        ("sbatch: allocation failure", False),
        ("", False),
    ],
)
def test_sbatchs_words(text: str, known: bool) -> None:
    found = slurm.parse_test(text)
    assert found == (time.mktime((2026, 11, 22, 1, 20, 0, 0, 0, -1)) if known else None)


@given(st.text(max_size=200))
@settings(max_examples=30, deadline=None)
def test_any_words_of_sbatch_are_survived(text: str) -> None:
    slurm.parse_test(text)
    slurm.parse_test(f"Job 1 to start at {text} using")


def test_a_span_is_never_far_from_its_seconds() -> None:
    assert [plan.span(s) for s in (0, 119, 120, 7140, 18720, 86400 * 2, 86400 * 3 + 4 * 3600)] == [
        "0 s", "119 s", "2 min", "119 min", "5 h 12 min", "2 d", "3 d 4 h"
    ]  # fmt: skip


def run_plan(tmp_path: Path, *argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launchers.plan", *argv, f"paths.output_base={tmp_path}/outputs"], cwd=ROOT, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--step-seconds", "nope=1"], ["--step-seconds nope", "base"]),
        (["--step-seconds", "sft=-1"], ["--step-seconds"]),
        (["--mttf-hours", "nan"], ["--mttf-hours"]),
        (["--nodes", "0"], ["--nodes"]),
        (["--nodes", "1,1000"], ["--nodes", "--step-seconds STAGE=SECONDS"]),
        (["slurm.nodes=4"], ["slurm.nodes", "num_nodes"]),
    ],
)
def test_bad_input_is_refused_in_words(
    tmp_path: Path, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = plan.main(["cluster=dev", "--no-queue", f"paths.output_base={tmp_path}/outputs", *argv])
    except SystemExit as error:
        status = int(str(error.code))
    said = capsys.readouterr().err
    assert status == 2 and all(word in said for word in words)


@pytest.mark.slurm
def test_nothing_is_written_and_slurm_is_asked(tmp_path: Path, devcluster: dc.Cluster) -> None:
    """One question for each different request; a request that SLURM refuses is told."""
    argv = ["pipeline=quickstart", "cluster=dev", f"cluster.slurm_conf={devcluster.conf}", "--json"]
    before = devcluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    done = run_plan(tmp_path, *argv, "eval_base.slurm.num_nodes=3", "grpo.slurm.mem=900T", env=devcluster.env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert row(said, "base")["queue"]["wait_seconds"] < 60 and row(said, "base")["queue"]["starts_at"] > 0
    assert row(said, "grpo")["queue"]["refused"] and row(said, "grpo")["queue"]["wait_seconds"] is None
    assert list(tmp_path.iterdir()) == []
    assert devcluster.run("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_silence_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 1.0)
    gone = tmp_path / "slurm.conf"
    gone.write_text("ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n")
    answer = slurm.expected_start("#!/bin/bash\n", str(gone))
    assert isinstance(answer, slurm.Unknown)
    assert answer.why
