"""Every way in which an attempt can end, on a real SLURM: the job script, the ledger and SLURM's own states.

The training processes are a stub that answers as the trainer does, so that each case takes seconds; the drill
(tests/drill.py) does the same to real training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from conf.schema import Cluster, Config, Slurm
from launchers import devcluster as dc
from launchers.executor import RunExecutor
from launchers.render import job_script
from launchers.submit import snapshot
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise
from tests.slurm_fixture import job, require_slurm, short_folder, wait_for, wait_state

pytestmark = pytest.mark.slurm

STUB = """
import os, signal, sys, time
from pathlib import Path
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.run.progress import Progress

run, attempt = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"])
behave = (run.root / "behave").read_text().split()
behave = behave[min(attempt, len(behave)) - 1]
rank = int(os.environ.get("SLURM_PROCID", "0"))
term = []
signal.signal(signal.SIGTERM, lambda *_: term.append(1))
progress = Progress(run, attempt, 0, writes=rank == 0)
(run.root / f"rank-{attempt}-{rank}").write_text(str(os.getpid()))
if behave == "crash":
    run.error(attempt).write_text("ValueError: of its own\\n")
    sys.exit(7)
if behave == "unusable":
    sys.exit(life.UNUSABLE)
if behave == "memory":
    run.error(attempt).write_text("OutOfMemoryError: CUDA out of memory\\n")
    sys.exit(life.OUT_OF_MEMORY)
if behave == "killed-for-memory":
    print("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
          file=sys.stderr, flush=True)
    while "oom_kill" not in run.stderr(os.environ["SLURM_JOB_ID"]).read_text():
        time.sleep(0.05)  # srun may end before it has passed on what a killed task has said; its own words it has
    os.kill(os.getpid(), signal.SIGKILL)
if behave == "greed":
    taken = bytearray(os.urandom(2 << 20) * 150)
    while True:
        time.sleep(0.05)
if behave == "hang":
    progress.enter("steps")
while behave in ("wait", "deaf", "hang"):
    if behave == "wait" and (term or run.stop_requested(attempt)):
        if rank == 0:
            with run.writing_as(attempt):
                ledger.append(run.ledger, "checkpoint_saved", attempt=attempt, step=attempt, seconds=0.1)
                ledger.append(run.ledger, "stopped", attempt=attempt, step=attempt)
        sys.exit(life.STOPPED)
    if behave == "wait":
        progress.write()
    time.sleep(0.05)
if behave == "zombie":  # goes on although its node is given up, and tries to hand something on
    while not (run.root / "rank-2-0").exists():
        time.sleep(0.05)
    try:
        with run.writing_as(attempt):
            ledger.append(run.ledger, "checkpoint_saved", attempt=attempt, step=99, seconds=0.1)
    except RuntimeError as error:
        (run.root / "fenced").write_text(str(error))
    sys.exit(0)
if rank == 0:
    run.model.mkdir(exist_ok=True)
    (run.model / "weights").write_text("w")
    manifest.write(run.model, identity="x")
"""


class SlurmRun:
    """A run directory whose job is submitted as the launcher does, with a stub for the training side."""

    def __init__(self, cluster: dc.Cluster, root: Path, behave: str, **slurm: Any) -> None:
        self.cluster, self.run = cluster, RunDirectory(root)
        options = {
            "partition": "gpu", "gpus_per_node": 1, "cpus_per_gpu": 1, "wall_time": "10", "signal_time_seconds": 60,
            **slurm,
        }  # fmt: skip
        self.cfg = Config(
            cluster=Cluster(name="dev", scheduler="slurm", slurm_conf=str(cluster.conf)), slurm=Slurm(**options)
        )
        self.run.create()
        for name, content in snapshot().items():
            if name.startswith("post_training/run/") or name == "post_training/__init__.py":
                path = self.run.code / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (self.run.code / "post_training/train.py").write_text(STUB)
        (self.run.root / "behave").write_text(behave)
        frozen = {
            "slurm": vars(self.cfg.slurm), "cluster": vars(self.cfg.cluster), "inputs": {"model": None},
            "stage": "sft",
        }  # fmt: skip
        self.run.config.write_text(yaml.safe_dump(frozen))
        self.job_id = ""

    def submit(self, *after: str, python: str = sys.executable) -> SlurmRun:
        script = job_script(self.cfg, self.run, python, list(after))
        self.job_id = RunExecutor(self.run, script, "dev", str(self.cluster.conf)).submit_run().job_id
        return self

    def rank(self, attempt: int, rank: int = 0) -> int:
        """The pid of a rank, once its attempt runs."""
        path = self.run.root / f"rank-{attempt}-{rank}"
        return int(wait_for(f"rank {rank} of attempt {attempt}", lambda: path.exists() and path.read_text(), 60))

    def shell(self) -> int:
        """The pid of the job script. Its subshells have its command line, other clusters jobs of its number."""
        argv = f"{self.cluster.dir}/spool/", f"job{int(self.job_id):05d}/slurm_script"
        found = [p for p in psutil.process_iter() if any(all(part in a for part in argv) for a in _argv(p))]
        return min(found, key=lambda process: process.create_time()).pid

    def ends(self, count: int = 1, timeout: float = 90) -> list[dict[str, Any]]:
        """The ends of the first attempts, once there are so many."""

        def found() -> list[dict[str, Any]]:
            ended = [e for e in ledger.read(self.run.ledger) if e["event"] == "attempt_ended"]
            return ended if len(ended) >= count else []

        return wait_for(f"{count} ends of {self.run.name}", found, timeout)

    def history(self) -> History:
        return summarise(ledger.read(self.run.ledger))

    def finish(self, timeout: float = 120) -> None:
        """It ends well, under its first job id, with one submission."""
        wait_state(self.cluster, self.job_id, "COMPLETED", timeout=timeout)
        assert manifest.problem(self.run.model) is None
        events = ledger.read(self.run.ledger)
        assert {e["job_id"] for e in events if "job_id" in e} == {self.job_id}
        assert sum(e["event"] == "submitted" for e in events) == 1


def _argv(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture
def runs(devcluster: dc.Cluster, tmp_path: Path) -> Iterator[Any]:
    """Makes runs; what is left of them is cancelled."""
    made: list[SlurmRun] = []

    def make(behave: str, name: str = "sft", **slurm: Any) -> SlurmRun:
        made.append(SlurmRun(devcluster, tmp_path / "it's 1 pipe" / name, behave, **slurm))
        return made[-1]

    yield make
    devcluster.run("scancel", *[r.job_id for r in made if r.job_id], check=False)
    for r in made:
        if r.job_id:
            wait_state(devcluster, r.job_id, "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", timeout=60)
        for path in r.run.root.glob("rank-*"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
    devcluster.wait_nodes(timeout=90)


def waiting(run: SlurmRun) -> bool:
    return job(run.cluster, run.job_id)["JobState"] == "PENDING"


def test_a_planned_stop_keeps_the_job_and_its_dependents(runs: Any) -> None:
    first = runs("wait finish").submit()
    second = runs("finish", "dpo").submit(first.job_id)
    first.rank(1)
    first.cluster.run("scancel", "--batch", "--signal=USR1", first.job_id)  # what --signal=B:USR1 sends
    end = first.ends()[0]
    assert (end["outcome"], end["action"], end["reason"]) == ("stopped", "requeue", None)
    assert end["lead"]["teardown"] is not None
    first.finish()
    assert first.history().failures == 0
    second.finish()
    assert second.history().attempts == 1
    assert second.history().attempt_started >= first.history().attempt_ended


@pytest.mark.parametrize("term_comes", ["at any time", "while the guard is at work"])
def test_the_killed_job_script_is_requeued_by_its_guard(runs: Any, term_comes: str, tmp_path: Path) -> None:
    """By itself the job would end as failed, and SLURM would cancel its dependents.

    SLURM ends the steps of a job without a script: SIGTERM to all their processes, KillWait later SIGKILL.
    """
    python = tmp_path / "python"
    at_work = "true" if term_comes == "at any time" else "kill -TERM 0"
    python.write_text(f'#!/bin/bash\nif [[ $* == *"life guard"* ]]; then {at_work}; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    first = runs("deaf finish").submit(python=str(python))
    second = runs("finish", "dpo").submit(first.job_id)
    first.rank(1)
    mine = str(first.run.root)
    wait_for("the guard", lambda: any(
        mine in argv and "life guard" in str(argv) and "srun" not in argv[0]
        for argv in map(_argv, psutil.process_iter())
    ))  # fmt: skip
    os.kill(first.shell(), signal.SIGKILL)
    end = first.ends()[0]
    assert (end["outcome"], end["action"]) == ("crashed", "requeue")
    first.finish()
    second.finish()


def test_crashes_are_counted_and_bounded_and_take_the_dependents_along(runs: Any) -> None:
    first = runs("crash crash", max_failures=2).submit()
    second = runs("finish", "dpo").submit(first.job_id)
    stages = {"sft": (first, []), "dpo": (second, ["sft"])}
    (first.run.root.parent / "pipeline.json").write_text(
        json.dumps({"stages": {n: {"run_dir": str(r.run.root), "after": a} for n, (r, a) in stages.items()}})
    )
    ends = first.ends(2)
    assert [(e["outcome"], e["action"]) for e in ends] == [("crashed", "requeue"), ("crashed", "exit")]
    assert ends[1]["reason"] == (
        "ValueError: of its own; gave up after 2 failures without progress (slurm.max_failures)"
    )
    assert first.run.failure_count.read_text() == "2\n"
    assert job(first.cluster, first.job_id)["Restarts"] == "1"
    wait_state(first.cluster, first.job_id, "FAILED")
    wait_state(first.cluster, second.job_id, "CANCELLED", timeout=60)
    assert second.history().cancelled and "ValueError: of its own" in str(second.history().reason)


def test_what_cannot_be_used_is_not_tried_again(runs: Any) -> None:
    run = runs("unusable", max_failures=5).submit()
    assert [(e["outcome"], e["action"]) for e in run.ends()] == [("crashed", "exit")]
    assert job(run.cluster, run.job_id)["Restarts"] == "0"


def test_lack_of_memory_has_its_name(runs: Any) -> None:
    run = runs("memory killed-for-memory finish", max_failures=9).submit()
    ends = run.ends(2)
    assert [e["outcome"] for e in ends] == ["out_of_memory", "out_of_memory"]
    assert [e["reason"] for e in ends] == ["OutOfMemoryError: CUDA out of memory", "killed for its memory"]
    run.finish()


def test_slurm_kills_for_memory(tmp_path: Path) -> None:
    """slurmstepd itself ends a step that takes more than its job has, as it does where memory is limited by cgroups."""
    require_slurm()
    folder = short_folder()
    try:
        run = SlurmRun(dc.up(folder, kill_over_memory=True), tmp_path / "pipe" / "sft", "greed finish", mem="200M")
        run.submit()
        end = run.ends()[0]
        assert (end["outcome"], end["action"], end["reason"]) == ("out_of_memory", "requeue", "killed for its memory")
        run.finish()
        assert run.run.failure_count.read_text() == "1\n"
    finally:
        dc.down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def test_processes_that_do_nothing_are_ended_and_requeued(runs: Any) -> None:
    """Even the watchdog inside them is stopped: the script notices that their figures stand still."""
    run = runs("hang finish", watchdog_minutes=0.05).submit()
    os.kill(run.rank(1), signal.SIGSTOP)
    end = run.ends()[0]
    assert (end["outcome"], end["action"], end["code"]) == ("hung", "requeue", 86)
    run.finish()
    assert run.run.failure_count.read_text() == "1\n"


def test_a_preempted_run_goes_on_under_its_id(runs: Any) -> None:
    run = runs("wait finish", partition="low", gpus_per_node=8).submit()
    run.rank(1)
    node = job(run.cluster, run.job_id)["NodeList"]
    other = run.cluster.run(
        "sbatch", "--parsable", "-p", "high", "-w", node, "--gpus-per-node=h100:8", "-o", "/dev/null", "--wrap=true"
    ).strip()  # fmt: skip
    end = run.ends()[0]
    assert (end["outcome"], end["action"]) == ("preempted", "requeue")
    run.finish(timeout=180)
    assert run.history().failures == 0
    wait_state(run.cluster, other, "COMPLETED")


def test_scancel_is_no_failure_and_is_not_followed_by_a_requeue(runs: Any) -> None:
    run = runs("wait").submit()
    run.rank(1)
    run.cluster.run("scancel", run.job_id)
    end = run.ends()[0]
    assert (end["outcome"], end["action"]) == ("cancelled", "exit")
    wait_state(run.cluster, run.job_id, "CANCELLED", timeout=60)
    assert run.history().failures == 0


def test_a_lost_node_is_no_failure_and_its_processes_can_write_nothing(runs: Any) -> None:
    """slurmd dies, the controller gives the node up, and the ranks live on there."""
    run = runs("zombie wait finish").submit()
    run.rank(1)
    node = job(run.cluster, run.job_id)["NodeList"]
    shell, cluster = run.shell(), run.cluster
    try:
        cluster.stop_node(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        run.rank(2)  # on another node
        end = run.ends()[0]
        assert (end["attempt"], end["outcome"], end["action"]) == (1, "node_lost", "requeue")
        assert end["lost_nodes"] == [node]
        fenced = run.run.root / "fenced"
        assert "a newer attempt has begun" in wait_for("the zombie", lambda: fenced.exists() and fenced.read_text())
        assert not any(e.get("step") == 99 for e in ledger.read(run.run.ledger))
        cluster.run("scancel", "--batch", "--signal=USR1", run.job_id)
        run.finish()
    finally:
        for process in (shell,):  # the job script of the lost node, where it still waits for its srun
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        cluster.wait_nodes(timeout=90)
    assert run.history().failures == 0 and run.history().attempts == 3


def test_a_node_that_fails_its_health_check_is_left(runs: Any) -> None:
    run = runs("finish", health_check="test $SLURMD_NODENAME != n1").submit()
    run.finish()
    (end, *_), starts = run.ends(2), [e for e in ledger.read(run.run.ledger) if e["event"] == "attempt_started"]
    assert (end["outcome"], end["lost_nodes"]) == ("node_lost", ["n1", "n1"])
    assert starts[0]["node"] == "n1" != starts[1]["node"]
    assert run.history().failures == 0


def test_a_second_job_leaves_a_run_that_is_not_its_own_alone(runs: Any) -> None:
    """`sbatch slurm/job.sh` by hand, while the run's own job runs; and again when that is gone."""
    run = runs("wait finish").submit()
    run.rank(1)
    other = run.cluster.run("sbatch", "--parsable", "--dependency=", str(run.run.script)).strip()
    wait_state(run.cluster, other, "FAILED")
    assert f"job {run.job_id} has this run" in run.run.stderr(other).read_text()
    assert run.history().attempts == 1 and not run.history().stopping
    run.cluster.run("scancel", run.job_id)
    wait_state(run.cluster, run.job_id, "CANCELLED", timeout=60)
    third = run.cluster.run("sbatch", "--parsable", str(run.run.script)).strip()
    wait_state(run.cluster, third, "COMPLETED", timeout=60)
    assert manifest.problem(run.run.model) is None and run.history().attempts == 2


def test_a_run_that_gets_nowhere_gives_up(runs: Any) -> None:
    run = runs("deaf", signal_time_seconds=2, max_attempts_without_progress=2).submit()
    for attempt in (1, 2):
        run.rank(attempt)
        run.cluster.run("scancel", "--batch", "--signal=USR1", run.job_id)
        run.ends(attempt)
    ends = run.ends(2)
    assert [(e["outcome"], e["action"]) for e in ends] == [("stopped", "requeue"), ("stopped", "exit")]
    assert "max_attempts_without_progress" in ends[1]["reason"]
    wait_state(run.cluster, run.job_id, "FAILED", timeout=60)


def test_the_controller_is_away_when_a_stop_wants_its_requeue(runs: Any) -> None:
    run = runs("wait finish").submit()
    shell = run.rank(1) and run.shell()
    run.cluster.stop_controller()
    try:
        os.kill(shell, signal.SIGUSR1)
        run.ends()
    finally:
        run.cluster.start_controller()
    run.finish()
    assert run.history().attempts == 2
