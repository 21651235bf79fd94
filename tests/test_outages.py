"""Submission on a real SLURM that answers late, wrongly or not at all; and more than one hand on a run.

Wrappers named sbatch, squeue and scancel stand before the real programs on PATH and do what their mode says.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launchers import devcluster as dc
from launchers import slurm
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from tests.slurm_fixture import wait_for
from tests.test_submit import Bench, bench, cluster, job_of

__all__ = ["bench", "cluster"]
pytestmark = pytest.mark.slurm

# `mode-<program>` holds "<mode> [<call>]": what to do at every call, or at that one alone. Arguments are logged.
SHIM = """#!/bin/bash
here=@HERE@ program=@PROGRAM@ real=@REAL@
read -r mode at <"$here/mode-$program" || mode=ok
printf '%s\\n' "$*" >>"$here/calls-$program"
if [ -n "$at" ] && [ "$(wc -l <"$here/calls-$program")" -ne "$at" ]; then mode=ok; fi
lost() { echo "$program: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1; }
case $mode in
  fail) echo "$program: error: Unable to contact slurm controller (connect failure)" >&2; exit 1 ;;
  refuse) echo "$program: error: Batch job submission failed: Invalid account" >&2; exit 1 ;;
  hang) exec sleep 300 ;;
  lose) "$real" "$@" >/dev/null; lost ;;
  take-and-hang) "$real" "$@" >/dev/null; exec sleep 300 ;;
  never) lost ;;
  decoy) # an older job of the same run, which the controller shows first
    "$real" --begin=now+3600 --comment="$(cat "$here/folder")" --wrap=true >/dev/null
    "$real" "$@" >/dev/null; lost ;;
  murder) "$real" "$@" >/dev/null; kill -9 "$PPID"; exit 1 ;;
  gate) touch "$here/reached"; until [ -e "$here/go" ]; do sleep 0.1; done; exec "$real" "$@" ;;
esac
exec "$real" "$@"
"""


class Shims:
    """Wrappers around SLURM's programs."""

    def __init__(self, bench: Bench) -> None:
        self.here = bench.folder / "bin"
        self.here.mkdir()
        for program in ("sbatch", "squeue", "scancel"):
            real = shutil.which(program, path=bench.env["PATH"])
            assert real is not None
            text = SHIM.replace("@HERE@", str(self.here)).replace("@PROGRAM@", program).replace("@REAL@", real)
            (self.here / program).write_text(text)
            (self.here / program).chmod(0o755)
        self.set()
        bench.env["PATH"] = f"{self.here}:{bench.env['PATH']}"

    def set(self, **modes: str) -> None:
        """Modes by program; the others do as the real ones. Calls are counted anew."""
        for program in ("sbatch", "squeue", "scancel"):
            (self.here / f"mode-{program}").write_text(modes.get(program, "ok") + "\n")
            (self.here / f"calls-{program}").write_text("")

    def calls(self, program: str) -> list[str]:
        return (self.here / f"calls-{program}").read_text().splitlines()


@pytest.fixture
def shims(cluster: Bench) -> Shims:
    return Shims(cluster)


def impatient(bench: Bench, command: str, *tokens: str) -> subprocess.Popen[str]:
    """The command, started; it waits a second where it would wait half a minute."""
    code = (
        f"import sys; from launchers import slurm, {command}; slurm.LOOK_S = slurm.SUBMIT_TIMEOUT_S = 1.0\n"
        f"sys.argv[0] = 'launchers.{command}'; sys.exit({command}.main())"
    )
    argv = [
        sys.executable, "-c", code, f"cluster={bench.cluster}", f"paths.output_base='{bench.quoted}'",
        f"cluster.python={bench.stub}/python", *tokens,
    ]  # fmt: skip
    return subprocess.Popen(
        argv, cwd=bench.folder, env=bench.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ran(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Its end and what it said."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def all_jobs(bench: Bench, devcluster: dc.Cluster) -> list[slurm.JobRecord]:
    """Every job of the bench's runs, ended ones too, oldest first."""
    found = slurm.jobs(user="root", conf=str(devcluster.conf))
    assert not isinstance(found, slurm.Unknown)
    mine = [job for job in found.values() if job.folder.startswith(f"{bench.base}/")]
    return sorted(mine, key=lambda job: int(job.job_id))


def names(jobs: list[slurm.JobRecord]) -> Counter[str]:
    return Counter(Path(job.folder).name for job in jobs)


def events(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    return [event for event in ledger.read(run.ledger) if event["event"] == name]


def finish(bench: Bench, pipeline: str, *stages: str) -> None:
    """Let the stages go on, and see that each did its work once."""
    bench.behave("base", None)
    for stage in stages:
        run = bench.run(pipeline, stage)
        wait_for(f"{stage} is done", lambda run=run: manifest.problem(run.model) is None, 90)
        assert len(events(run, "submitted")) == len(events(run, "attempt_started")) == 1


DPO = ("base", "sft", "dpo", "grpo", "eval_base", "eval_sft", "eval_dpo", "eval_grpo")


# ----------------------------------------------------------------------------------- sbatch's answer is lost


@pytest.mark.parametrize("mode", ["lose", "decoy", "take-and-hang"])
def test_a_job_whose_answer_was_lost_is_found(
    cluster: Bench, devcluster: dc.Cluster, shims: Shims, mode: str
) -> None:  # fmt: skip
    cluster.behave("base", "wait")
    base = cluster.run("full", "base")
    (shims.here / "folder").write_text(str(base.root))
    shims.set(sbatch=mode)
    done = ran(impatient(cluster, "submit", "stage=base"))
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = next(job for job in all_jobs(cluster, devcluster) if slurm.TOKEN in job.comment)
    assert job_of(base).job_id == theirs.job_id
    assert len(shims.calls("sbatch")) == 1
    shims.set()
    again = cluster("submit", "stage=base")
    assert f"{theirs.job_id} queued or running already" in " ".join(again.stdout.split()), again.stdout + again.stderr
    finish(cluster, "full", "base")


def test_a_job_that_is_taken_late_is_taken_over(cluster: Bench, devcluster: dc.Cluster, shims: Shims) -> None:
    cluster.behave("base", "wait")
    shims.set(sbatch="never 2")
    done = ran(impatient(cluster, "pipeline", "pipeline=dpo"))
    assert done.returncode == 2 and "did not say whether it took the job" in done.stderr, done.stdout + done.stderr
    assert "submitted before: base as" in done.stderr and "the same command again" in done.stderr
    assert names(all_jobs(cluster, devcluster)) == Counter(["base"])
    # now the controller gets round to it
    second = shims.calls("sbatch")[1]
    comment, _, script = second.removeprefix("--comment=").rpartition(f" {cluster.base}")
    late = subprocess.run(
        ["sbatch", "--parsable", f"--comment={comment}", f"{cluster.base}{script}"],
        env={**devcluster.env, "SBATCH_PARTITION": "gpu"}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    shims.set()
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = all_jobs(cluster, devcluster)
    assert names(jobs) == Counter(DPO)
    assert late in {job.job_id for job in jobs}
    sft = Path(next(job.folder for job in jobs if job.job_id == late)).name
    assert job_of(cluster.run("dpo", sft)).job_id == late  # written down by the second command
    finish(cluster, "dpo", *DPO)


def test_what_sbatch_refuses_leaves_nothing_and_what_it_cannot_cancel_stays(
    cluster: Bench, devcluster: dc.Cluster, shims: Shims
) -> None:  # fmt: skip
    cluster.behave("base", "wait")
    shims.set(sbatch="refuse 3")
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 2 and "Invalid account" in done.stderr, done.stderr
    assert not any(job.live for job in all_jobs(cluster, devcluster)) and not cluster.base.exists()
    shims.set(sbatch="refuse 3", scancel="fail")
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 2 and "may not be cancelled" in done.stderr, done.stderr
    before = [job for job in all_jobs(cluster, devcluster) if job.live]
    assert len(before) == 2 and all(Path(job.folder).is_dir() for job in before)  # no job without its folder
    shims.set()
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert names([job for job in all_jobs(cluster, devcluster) if job.live]) == Counter(DPO)
    finish(cluster, "dpo", *DPO)


# -------------------------------------------------------------------------------- the command or SLURM dies


def test_a_killed_command_is_completed_by_the_next(cluster: Bench, devcluster: dc.Cluster, shims: Shims) -> None:
    cluster.behave("base", "wait")
    for count in (1, 3):
        shims.set(sbatch=f"murder {max(1, count - 1)}")  # taken, and not written down
        assert cluster("pipeline", "pipeline=dpo").returncode == -9
        newest = RunDirectory(Path(all_jobs(cluster, devcluster)[-1].folder))
        assert len(all_jobs(cluster, devcluster)) == count and not events(newest, "submitted")
        shims.set(squeue="fail")  # nothing is known of its job: nothing is submitted
        done = cluster("pipeline", "pipeline=dpo")
        assert done.returncode == 2 and "cannot tell whether" in done.stderr, done.stderr
        assert not shims.calls("sbatch")
    shims.set()
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = all_jobs(cluster, devcluster)
    assert names(jobs) == Counter(DPO)
    ids = {Path(job.folder).name: job.job_id for job in jobs}
    assert {stage: job_of(cluster.run("dpo", stage)).job_id for stage in DPO} == ids
    finish(cluster, "dpo", *DPO)


def test_a_controller_that_goes_away_half_way(cluster: Bench, devcluster: dc.Cluster, shims: Shims) -> None:
    cluster.behave("base", "wait")
    shims.set(sbatch="gate 3")
    command = impatient(cluster, "pipeline", "pipeline=dpo")
    try:
        wait_for("two are submitted", (shims.here / "reached").exists, 60)
        base = cluster.run("dpo", "base")
        out = base.stdout(wait_for("the first has its job", lambda: job_of(base).job_id, 60))
        # a step that is just being made would fail for want of the controller, and the run be started again
        wait_for("the first works", lambda: out.exists() and "rank 0" in out.read_text(), 60)
        devcluster.stop_controller()
        (shims.here / "go").touch()
        done = ran(command)
        assert done.returncode == 2 and "did not say whether" in done.stderr, done.stdout + done.stderr
        assert "submitted before: base as" in done.stderr
        # down: no state is invented, nothing is submitted
        down = cluster("pipeline", "pipeline=dpo")
        assert down.returncode == 2 and "SLURM does not answer" in down.stderr, down.stderr
        assert states(cluster, "dpo")["base"] == "unknown"
    finally:
        command.kill()
        command.wait()
        devcluster.start_controller()
    devcluster.wait_nodes(states=("idle", "mixed", "allocated"))
    shims.set()
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(all_jobs(cluster, devcluster)) == Counter(DPO)
    finish(cluster, "dpo", *DPO)


def states(bench: Bench, pipeline: str) -> dict[str, str]:
    argv = [
        sys.executable,
        "-m",
        "launchers.status",
        "--json",
        f"run_name={pipeline}",
        f"paths.output_base={bench.base}",
    ]
    done = subprocess.run(argv, cwd=bench.folder, env=bench.env, capture_output=True, text=True, check=True)
    return {row["stage"]: row["state"] for row in json.loads(done.stdout)["runs"]}


@pytest.mark.parametrize("mode", ["fail", "hang"])
def test_a_silent_squeue_makes_nothing_twice_and_no_state_up(
    cluster: Bench, devcluster: dc.Cluster, shims: Shims, mode: str
) -> None:  # fmt: skip
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    shims.set(squeue=mode)
    done = cluster("submit", "stage=base")
    assert done.returncode == 2 and "cannot tell whether" in done.stderr, done.stderr
    assert states(cluster, "full") == {"base": "unknown"}
    assert not shims.calls("sbatch")
    shims.set()
    assert states(cluster, "full")["base"] in ("queued", "running")
    assert names(all_jobs(cluster, devcluster)) == Counter(["base"])
    finish(cluster, "full", "base")


# --------------------------------------------------------------------------------- several hands on one run


def test_a_job_submitted_by_hand_leaves_a_run_alone_that_has_one(cluster: Bench, devcluster: dc.Cluster) -> None:
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    base = cluster.run("full", "base")
    wait_for("it runs", lambda: events(base, "attempt_started"))
    by_hand = devcluster.run("sbatch", "--parsable", str(base.script)).strip()
    wait_for("it ends", lambda: not job(cluster, devcluster, by_hand).live, 60)
    assert job(cluster, devcluster, by_hand).state == "FAILED"
    theirs = job_of(base)
    assert f"job {theirs.job_id} has this run" in base.stderr(by_hand).read_text()
    assert theirs.state == "RUNNING" and len(events(base, "attempt_started")) == 1
    # and what is queued by hand is found, though no command of ours submitted it
    theirs.cancel()
    wait_for("cancelled", theirs.done, 60)
    by_hand = devcluster.run("sbatch", "--parsable", "--begin=now+3600", str(base.script)).strip()
    again = cluster("submit", "stage=base")
    assert f"{by_hand} queued or running already" in " ".join(again.stdout.split()), again.stdout + again.stderr


def job(bench: Bench, devcluster: dc.Cluster, job_id: str) -> slurm.JobRecord:
    return next(job for job in all_jobs(bench, devcluster) if job.job_id == job_id)


def test_a_folder_by_another_name_is_the_same_run(cluster: Bench, devcluster: dc.Cluster) -> None:
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    cluster.run("full", "base").ledger.unlink()  # the ledger does not know of it: the queue must
    other = cluster.folder / "link"
    other.symlink_to(cluster.base)
    true_base = cluster.base
    for name in (other, Path("link"), Path("stub") / ".." / "link"):
        cluster.base = name
        again = cluster("submit", "stage=base")
        assert "queued or running already" in again.stdout, again.stdout + again.stderr
    cluster.base = true_base
    assert names(all_jobs(cluster, devcluster)) == Counter(["base"])
    finish(cluster, "full", "base")


def test_a_run_with_a_job_on_one_cluster_is_refused_on_another(
    cluster: Bench, devcluster: dc.Cluster, tmp_path: Path
) -> None:  # fmt: skip
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    other = tmp_path / "other.conf"
    other.write_text(devcluster.conf.read_text())
    done = cluster("submit", "stage=base", f"cluster.slurm_conf={other}")
    assert done.returncode == 2 and "is queued or running on cluster=dev" in done.stderr, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "launchers.submit", "stage=base", "cluster=local",
         f"paths.output_base='{cluster.quoted}'"],
        cwd=cluster.folder, env=cluster.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "is queued or running on cluster=dev" in done.stderr, done.stdout + done.stderr
    assert names(all_jobs(cluster, devcluster)) == Counter(["base"])


def test_a_removed_folder_with_a_job_is_refused(cluster: Bench, devcluster: dc.Cluster) -> None:
    cluster.behave("base", "wait")
    assert cluster("pipeline", "pipeline=dpo").returncode == 0
    sft = cluster.run("dpo", "sft")
    job_id = job_of(sft).job_id
    shutil.rmtree(sft.root)
    done = cluster("pipeline", "pipeline=dpo")
    assert done.returncode == 2 and f"fix: scancel {job_id}" in done.stderr, done.stdout + done.stderr
    assert names(all_jobs(cluster, devcluster)) == Counter(DPO)


# ------------------------------------------------------------------------------------ going on after a give-up


def test_what_waits_for_a_dead_parent_is_replaced(cluster: Bench, devcluster: dc.Cluster) -> None:
    tokens = ("pipeline=dpo", "slurm.max_failures=1")
    cluster.behave("sft", "crash")
    assert cluster("pipeline", *tokens).returncode == 0
    dead = job_of(cluster.run("dpo", "sft"))
    wait_for("it gives up", dead.done, 60)
    wait_for("its dependents end", lambda: not any(j.live for j in all_jobs(cluster, devcluster)), 60)
    for stage in ("dpo", "grpo", "eval_sft"):
        (cancelled,) = events(cluster.run("dpo", stage), "cancelled")
        assert "upstream sft failed: exit status 7" in cancelled["reason"]
    assert states(cluster, "dpo")["grpo"] == "cancelled" and states(cluster, "dpo")["sft"] == "failed"
    # without this line, which a site's own rules may undo, dependents stay in the queue for ever
    line = "#SBATCH --kill-on-invalid-dep=yes\n"
    text = cluster.run("dpo", "dpo").script.read_text()
    assert line in text
    (cluster.folder / "job.sh").write_text(text.replace(line, ""))
    waits = f"--dependency=afterok:{dead.job_id}"
    old = devcluster.run("sbatch", "--parsable", waits, str(cluster.folder / "job.sh")).strip()
    wait_for("SLURM sees it", lambda: job(cluster, devcluster, old).reason == "DependencyNeverSatisfied")
    assert job(cluster, devcluster, old).state == "PENDING"
    cluster.behave("sft", None)
    count = len(all_jobs(cluster, devcluster))
    done = cluster("pipeline", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    assert job(cluster, devcluster, old).state == "CANCELLED"
    new = all_jobs(cluster, devcluster)[count:]
    assert names(new) == Counter(["sft", "dpo", "grpo", "eval_sft", "eval_dpo", "eval_grpo"])
    assert job_of(cluster.run("dpo", "eval_grpo")).result() == cluster.run("dpo", "eval_grpo").model
    sft = cluster.run("dpo", "sft")
    assert [event["job_id"] for event in events(sft, "attempt_started")] == [dead.job_id, job_of(sft).job_id]
    assert sft.failure_count.read_text() == "0\n"
    assert len(events(cluster.run("dpo", "base"), "submitted")) == 1
