"""The drill: its plan and its rules without a cluster, and a fixed drill on a real SLURM."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.compose import rewrite
from launchers.selection import select
from tests.drill import plan, verdict
from tests.drill.__main__ import STAGES, chain, main, overrides
from tests.drill.verdict import Evidence, Result, Sighting
from tests.slurm_fixture import require_slurm

ROOT = Path(__file__).resolve().parent.parent
KINDS = tuple(plan.KINDS)


# The plan.


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_a_seed_gives_one_plan(seed: int, count: int) -> None:
    faults = plan.draw(seed, count, STAGES, KINDS)
    assert faults == plan.draw(seed, count, STAGES, KINDS)
    assert [fault.number for fault in faults] == list(range(1, count + 1))
    by_name = {stage.name: stage for stage in STAGES}
    for fault in faults:
        assert plan.can_hit(fault.kind, by_name[fault.stage])
        assert fault.moment in plan.KINDS[fault.kind].moments
    for name in by_name:
        here = [fault.at for fault in faults if fault.stage == name]
        assert here == sorted(here)


def test_every_kind_comes_before_one_comes_twice() -> None:
    faults = plan.draw(7, len(KINDS), STAGES, KINDS)
    assert sorted(fault.kind for fault in faults) == sorted(KINDS)
    places = [fault.stage for fault in plan.draw(7, 50, STAGES, ["stop"])]
    assert {places.count(stage.name) for stage in STAGES} == {10}


def test_seeds_differ() -> None:
    assert plan.draw(1, 12, STAGES, KINDS) != plan.draw(2, 12, STAGES, KINDS)


def test_a_fault_that_came_too_late_is_drawn_anew() -> None:
    (fault,) = plan.draw(3, 1, STAGES[:1], ["kill_worker"])
    again = plan.redraw(3, fault, 1, STAGES[1:])
    assert again == plan.redraw(3, fault, 1, STAGES[1:])
    assert again is not None and again.kind == fault.kind and again.stage == "dpo", "only dpo has workers"
    assert plan.redraw(3, fault, 1, [stage for stage in STAGES if not stage.workers]) is None


def test_a_kind_that_can_strike_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="kill_worker: none of the stages ppo"):
        plan.draw(1, 1, [stage for stage in STAGES if stage.name == "ppo"], ["kill_worker"])


def test_stages_come_with_what_they_need() -> None:
    assert [stage.name for stage in chain(["grpo"])] == ["base", "sft", "ppo", "grpo"]
    assert [stage.name for stage in chain(["dpo", "base"])] == ["base", "sft", "dpo"]


def test_the_pipeline_command_takes_the_overrides(tmp_path: Path) -> None:
    given = [*overrides(STAGES), "cluster=dev", "cluster.slurm_conf=/nowhere", f"paths.output_base={tmp_path}"]
    selection = select([rewrite(token) for token in given], only_one=False)
    assert set(selection.wanted) == {stage.name for stage in STAGES}
    for stage in STAGES:
        cfg = selection.config(stage.name)
        assert (cfg.training.max_steps, cfg.checkpointing.save_steps) == (stage.steps, stage.save_steps)
        assert cfg.slurm.num_nodes == stage.ranks
        assert selection.stages[stage.name].model == stage.after


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "1", "--stages", "rm"], "choose from base, sft"),
        (["--seed", "1", "--kinds", "flood"], "choose from stop,"),
        (["--seed", "1", "--faults", "-1"], "at least 0"),
        (["--seed", "1", "--steps", "3"], "at least 20"),
        (["--seed", "1", "--stages", "base", "--kinds", "wall_time"], "none of the stages base"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "5", "--faults", "3", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan of seed 5:" and len(lines) == 5


# The verdict: a drill that passes, and each rule broken in turn.

T0 = 1_000_000.0
FILES = {"model.safetensors": "ab", "config.json": "cd"}


def event(time: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": T0 + time, "event": name, **fields}


def ended(time: float, attempt: int, outcome: str, **fields: Any) -> dict[str, Any]:
    action = "exit" if outcome == "finished" else "requeue"
    return event(time, "attempt_ended", attempt=attempt, outcome=outcome, action=action, **fields)


LEDGER = [
    event(0, "submitted", job_id="7"),
    event(1, "attempt_started", attempt=1, job_id="7"),
    event(5, "training_started", attempt=1, step=0),
    event(8, "checkpoint_saved", attempt=1, step=2),
    ended(10, 1, "stopped"),
    event(16, "attempt_started", attempt=2, job_id="7"),
    event(20, "training_started", attempt=2, step=2),
    ended(22, 2, "crashed"),
    event(30, "attempt_started", attempt=3, job_id="7"),
    event(34, "training_started", attempt=3, step=2),
    ended(40, 3, "finished"),
]
METRICS = [{"step": n, "loss": 1.0 / n, "time": T0 + n} for n in range(1, 7)] + [{"step": 6, "train_loss": 0.5}]

SFT = Evidence(
    stage="sft", after=None, root="/r/sft", steps=6, save_steps=2, events=LEDGER, metrics=METRICS, files=FILES,
    reference_metrics=[line | {"time": 0.0} for line in METRICS], reference_files=FILES, output_time=T0 + 39,
    seen_steps={1: 2, 2: 4, 3: 6}, accounted=40.0, wall=40.5,
)  # fmt: skip
DPO = Evidence(
    stage="dpo", after="sft", root="/r/dpo", steps=6, save_steps=2, metrics=METRICS, files=FILES,
    events=[
        event(0, "submitted", job_id="8"),
        event(41, "attempt_started", attempt=1, job_id="8"),
        event(45, "training_started", attempt=1, step=0),
        ended(60, 1, "finished"),
    ],
    reference_metrics=METRICS, reference_files=FILES, output_time=T0 + 59, seen_steps={1: 6},
)  # fmt: skip
SIGHTINGS = [
    Sighting(T0 + t, job_id, state, f"/r/{name}")
    for t in range(0, 60, 10)
    for name, job_id, state in (("sft", "7", "RUNNING" if t < 40 else "COMPLETED"), ("dpo", "8", "PENDING"))
]
RESULTS = [Result(1, "stop", "sft", "recovered"), Result(2, "kill_rank", "sft", "recovered")]


def broken(
    sft: dict[str, Any] | None = None,
    dpo: dict[str, Any] | None = None,
    sightings: list[Sighting] | None = None,
    results: list[Result] | None = None,
) -> list[tuple[str, str | None]]:
    """The rules that are broken when some of the good drill's evidence is replaced."""
    stages = [dataclasses.replace(SFT, **(sft or {})), dataclasses.replace(DPO, **(dpo or {}))]
    findings = verdict.judge(stages, [*SIGHTINGS, *(sightings or [])], [*RESULTS, *(results or [])])
    assert all(finding.detail for finding in findings)
    return [(finding.rule, finding.stage) for finding in findings]


def without(name: str, attempt: int) -> list[dict[str, Any]]:
    return [e for e in LEDGER if (e["event"], e.get("attempt")) != (name, attempt)]


def test_a_good_drill_passes() -> None:
    assert broken() == []
    assert verdict.lost_steps(SFT) == {1: 0, 2: 2}


def test_rule_weights() -> None:
    assert broken(sft={"files": FILES | {"model.safetensors": "xx"}}) == [("weights", "sft")]
    assert broken(dpo={"files": None}) == [("weights", "dpo")]
    assert broken(sft={"reference_files": None}) == [("weights", "sft")]
    assert broken(sft={"files": {"model.safetensors": "ab"}}) == [("weights", "sft")]


def test_rule_one_job() -> None:
    double = [Sighting(T0 + 10, "9", "PENDING", "/r/sft")]
    assert broken(sightings=double) == [("one job", "sft")] * 2, "another id, and both live at the same time"
    later = [Sighting(T0 + 55, "9", "RUNNING", "/r/sft")]
    assert broken(sightings=later) == [("one job", "sft")], "another id, after the first"
    resubmitted = [*LEDGER[:5], event(12, "submitted", job_id="7"), *LEDGER[5:]]
    assert broken(sft={"events": resubmitted}) == [("one job", "sft")]


def test_rule_attempts() -> None:
    rule = ("one attempt at a time", "sft")
    assert rule in broken(sft={"events": without("attempt_ended", 1)}), "the next began before it ended"
    assert rule in broken(sft={"events": without("attempt_started", 2)})
    assert rule in broken(sft={"events": LEDGER[:-1]}), "never ended"
    zombie = [*LEDGER[:-1], event(36, "checkpoint_saved", attempt=2, step=4), LEDGER[-1]]
    assert broken(sft={"events": zombie}) == [rule], "an earlier attempt wrote after the next had begun"
    alive = [*LEDGER[:5], event(12, "checkpoint_saved", attempt=1, step=2), *LEDGER[5:]]
    assert broken(sft={"events": alive}) == [], "its node was given up, and no other attempt has begun"


def test_rule_samples() -> None:
    rule = [("samples", "sft")]
    assert broken(sft={"metrics": METRICS[:3] + METRICS[4:]}) == rule, "a step is missing"
    assert broken(sft={"metrics": METRICS[:4] + METRICS[3:]}) == rule, "a step is there twice"
    assert broken(sft={"metrics": [METRICS[1], METRICS[0], *METRICS[2:]]}) == rule, "out of order"
    assert broken(sft={"metrics": [*METRICS[:5], METRICS[5] | {"loss": 0.17}, METRICS[6]]}) == rule, "another loss"


def test_rule_steps_lost() -> None:
    rule = [("steps lost", "sft")]
    assert broken(sft={"seen_steps": {1: 3, 2: 4, 3: 6}}) == rule, "a planned stop lost a step"
    assert broken(sft={"seen_steps": {1: 2, 2: 5, 3: 6}}) == rule, "a kill lost more than a save interval"
    assert broken(sft={"seen_steps": {1: 2, 2: 5, 3: 6}, "damaged": {2: 1}}) == []
    told = [e | {"step": 5} if e["event"] == "attempt_ended" and e["attempt"] == 2 else e for e in LEDGER]
    assert broken(sft={"events": told}) == rule, "the ledger knows of steps that nobody saw"


def test_rule_sum() -> None:
    assert broken(sft={"accounted": 33.0}) == [("ledger's sum", "sft")]
    assert broken(sft={"accounted": 48.0}) == [("ledger's sum", "sft")]
    assert broken(sft={"accounted": None}) == []


def test_rule_dependents() -> None:
    assert broken(sft={"output_time": T0 + 42}) == [("dependents", "dpo")], "it started on half an output"
    assert broken(sft={"files": None, "output_time": None}) == [("weights", "sft"), ("dependents", "dpo")]
    assert ("dependents", "dpo") in broken(dpo={"events": [*DPO.events, *DPO.events[1:]]}), "it started twice"
    assert ("dependents", "dpo") in broken(dpo={"events": DPO.events[:1], "files": None}), "it never started"


def test_faults_without_recovery_and_without_target() -> None:
    assert broken(results=[Result(3, "kill_shell", "dpo", "failed")]) == [("recovery", "dpo")]
    assert broken(results=[Result(3, "kill_shell", "dpo", "missed")]) == [("faults", "dpo")]


# On a real SLURM.

FIXED = ("stop", "kill_rank", "preempt", "power_cut", "kill_shell", "truncate")


@pytest.mark.slurm
def test_a_fixed_drill() -> None:
    """Six faults on base and sft (two ranks on two nodes)."""
    require_slurm()
    argv = ["--seed", "4", "--faults", "6", "--stages", "sft", "--steps", "30", "--kinds", ",".join(FIXED)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.drill", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.rstrip().splitlines()[-1].startswith("PASS")
