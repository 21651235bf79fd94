"""The whole pipeline with real training: on this machine, on a real SLURM, and on real records.

These are the long tests. The quickstart runs once on this machine for the whole module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers import devcluster as dc
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests.slurm_fixture import wait_for

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ("base", "sft", "rm", "ppo", "dpo", "grpo")
RECORDS = ROOT.parent / "shared" / "data"


def pipeline(*overrides: str, env: dict[str, str] | None = None, module: str = "launchers.pipeline") -> str:
    """Run a command to its end; returns what it printed. A failure shows everything."""
    argv = [sys.executable, "-m", module, *overrides]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def status(output_base: Path, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    printed = pipeline(f"paths.output_base={output_base}", "--json", env=env, module="launchers.status")
    return {row["stage"]: row for row in json.loads(printed)["runs"]}


def weights(run: Path) -> str:
    """The hash of a run's weights, as its manifest has it."""
    found = manifest.read(run / "model")
    assert found is not None, f"{run} has no output"
    return str(found["files"]["model.safetensors"]["sha256"])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The quickstart's folder, and what it printed."""
    base = tmp_path_factory.mktemp("quickstart")
    yield base, pipeline("pipeline=quickstart", "cluster=local", f"paths.output_base={base}")


def test_the_quickstart_gets_better_stage_by_stage(quickstart: tuple[Path, str]) -> None:
    base, printed = quickstart
    results = {
        name: json.loads(RunDirectory(base / "quickstart" / f"eval_{name}").results.read_text()) for name in TRAINED
    }
    assert all(r["count"] >= 500 for r in results.values())

    def better(worse: str, than: str) -> None:
        assert results[than]["score_low"] > results[worse]["score_high"], (worse, than)

    better("base", "sft")
    better("sft", "ppo")
    better("sft", "dpo")
    better("sft", "grpo")
    assert results["rm"]["metric"] == "preference_accuracy"
    assert results["rm"]["score_low"] > 0.5
    for name in ("base", "sft", "ppo", "dpo", "grpo"):
        assert f"{100 * results[name]['score']:.1f} %" in printed
    assert "post_training.chat" in printed
    rows = status(base)
    assert {row["state"] for row in rows.values()} == {"done"}
    assert rows["sft"]["score"] == results["sft"]["score"]
    assert rows["sft"]["step"] == rows["sft"]["max_steps"] == 250


def test_the_best_model_answers(quickstart: tuple[Path, str]) -> None:
    base, _ = quickstart
    answer = pipeline(
        str(base / "quickstart" / "dpo"), "--prompt", "40+30=?", module="post_training.chat"
    )  # 40 + 30 may be a held-out or a trained sum: what counts is that it answers in form
    assert "<answer>" in answer


def test_the_same_command_again_runs_nothing(quickstart: tuple[Path, str]) -> None:
    base, _ = quickstart
    before = {path: path.read_bytes() for path in base.glob("quickstart/*/ledger.jsonl")}
    printed = pipeline("pipeline=quickstart", "cluster=local", f"paths.output_base={base}")
    assert "nothing to submit" in printed
    assert {path: path.read_bytes() for path in base.glob("quickstart/*/ledger.jsonl")} == before


@pytest.mark.slurm
def test_slurm_trains_the_same_models(quickstart: tuple[Path, str], tmp_path: Path, devcluster: dc.Cluster) -> None:
    """The full chain through sbatch and afterok ends with the same weights as on this machine, bit for bit."""
    local, _ = quickstart
    where = [f"paths.output_base={tmp_path}", "cluster=dev", f"cluster.slurm_conf={devcluster.conf}"]
    pipeline("pipeline=quickstart", *where, env=devcluster.env)
    ids = {row["stage"]: row["job_id"] for row in status(tmp_path, devcluster.env).values()}
    waiting = devcluster.run("squeue", "--noheader", "--format=%i %E")
    assert f"{ids['grpo']} afterok:{ids['ppo']}" in waiting

    def ended() -> bool:
        rows = status(tmp_path, devcluster.env).values()
        bad = [row for row in rows if row["state"] in ("failed", "cancelled", "unknown")]
        assert not bad, bad
        return all(row["state"] == "done" for row in rows)

    wait_for("the chain to be done", ended, timeout=900)
    runs = {name: tmp_path / "quickstart" / name for name in ids}
    for name in TRAINED:
        assert weights(runs[name]) == weights(local / "quickstart" / name), name
        ours, theirs = (
            json.loads(RunDirectory(base / "quickstart" / f"eval_{name}").results.read_text())
            for base in (tmp_path, local)
        )
        for each in (ours, theirs):
            each.pop("seconds", None)
        assert ours == theirs
    events = {name: ledger.read(RunDirectory(run).ledger) for name, run in runs.items()}
    assert all(summarise(e).attempts == 1 for e in events.values())
    times = {n: {e["event"]: e["time"] for e in found} for n, found in events.items()}
    for upstream, dependent in (("base", "sft"), ("sft", "rm"), ("rm", "ppo"), ("sft", "dpo"), ("ppo", "grpo")):
        assert times[upstream]["attempt_ended"] < times[dependent]["attempt_started"]


@pytest.mark.slurm
def test_two_nodes_with_two_tasks_each(tmp_path: Path, devcluster: dc.Cluster) -> None:
    pipeline(
        "stage=base", "pipeline=quickstart", "cluster=dev", f"cluster.slurm_conf={devcluster.conf}",
        f"paths.output_base={tmp_path}", "slurm.num_nodes=2", "slurm.gpus_per_node=2", "training.max_steps=3",
        "training.per_device_train_batch_size=4", "data.num_documents=200",
        env=devcluster.env, module="launchers.submit",
    )  # fmt: skip
    run = RunDirectory(tmp_path / "quickstart" / "base")
    wait_for(
        "base on two nodes", lambda: status(tmp_path, devcluster.env)["base"]["state"] not in ("queued", "running"), 300
    )
    assert status(tmp_path, devcluster.env)["base"]["state"] == "done", run.slurm
    checkpoint = manifest.read(run.checkpoints / "checkpoint-3")
    assert checkpoint is not None
    assert checkpoint["world_size"] == 4
    nodes = devcluster.run("squeue", "--noheader", "--states=all", "--format=%i %D").split("\n")
    assert f"{summarise(ledger.read(run.ledger)).job_id} 2" in nodes


def test_real_records_run_through_every_stage(tmp_path: Path) -> None:
    """GSM8K for base, sft, ppo, grpo and their judgement; HH-RLHF for rm and dpo."""
    if not RECORDS.is_dir():
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"CI needs the real records in {RECORDS}")
        pytest.skip(f"no real records in {RECORDS}")
    pipeline("pipeline=records", "cluster=local", f"paths.data={RECORDS}", f"paths.output_base={tmp_path}")
    rows = status(tmp_path)
    assert {row["state"] for row in rows.values()} == {"done"}
    for name in TRAINED:
        run = RunDirectory(tmp_path / "records" / name)
        logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert logged[-1]["step"] == 20
        assert run.read_config()["data"]["name"] == ("hh_rlhf" if name in ("rm", "dpo") else "gsm8k")
    losses = {
        name: [
            x["loss"]
            for x in map(json.loads, (tmp_path / "records" / name / "logs/metrics.jsonl").read_text().splitlines())
            if "loss" in x
        ]
        for name in ("base", "sft")
    }
    assert all(values[-1] < values[0] for values in losses.values()), losses
    judged = json.loads(RunDirectory(tmp_path / "records" / "eval_rm").results.read_text())
    assert (judged["metric"], judged["count"]) == ("preference_accuracy", 64)
