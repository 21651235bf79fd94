"""Submission through submitit's SlurmExecutor, with our script in the place of its own, and without pickles."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from filelock import FileLock, Timeout
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, UncompletedJobError

from launchers import slurm
from launchers.errors import Full, LaunchError, Unanswered
from launchers.render import Array
from launchers.table import tail
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.history import summarise

LOCK_TIMEOUT_S = 60
ENDED = {"finished": "COMPLETED", "stopped": "CANCELLED", "cancelled": "CANCELLED"}


class RunPaths(JobPaths):
    """Where a run keeps what submitit asks for."""

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(Path(self._folder).parent)

    @property
    def folder(self) -> Path:
        return Path(self._folder)

    @property
    def submission_file(self) -> Path:
        return self.run.script

    @property
    def stdout(self) -> Path:
        return self.run.stdout(str(self.job_id))

    @property
    def stderr(self) -> Path:
        return self.run.stderr(str(self.job_id))


class RunJob(submitit.SlurmJob):  # type: ignore[misc]
    """The job of a run: submitit's interface on our run directory. `folder` is the run's slurm/ folder.

    States come from squeue, and from the ledger when SLURM has forgotten the job; sacct is not needed.
    """

    def __init__(self, folder: str | Path, job_id: str, tasks: Sequence[int] = (0,)) -> None:
        super().__init__(folder=folder, job_id=job_id, tasks=(0,))
        self._paths = RunPaths(folder, job_id=job_id, task_id=0)

    def _register_in_watcher(self) -> None:
        """Nothing to register: submitit's watcher asks sacct, which many clusters lack."""

    @property
    def run(self) -> RunDirectory:
        run: RunDirectory = self._paths.run
        return run

    @property
    def _conf(self) -> str | None:
        conf: str | None = self.run.read_config()["cluster"]["slurm_conf"]
        return conf

    def _record(self) -> slurm.JobRecord | slurm.Unknown | None:
        found = slurm.jobs([self.job_id], conf=self._conf)
        return found if isinstance(found, slurm.Unknown) else found.get(self.job_id)

    @property
    def state(self) -> str:
        """SLURM's word for the job's state; UNKNOWN where neither SLURM nor the ledger knows."""
        record = self._record()
        if isinstance(record, slurm.JobRecord):
            return record.state
        if isinstance(record, slurm.Unknown):
            return "UNKNOWN"
        history = summarise(ledger.read(self.run.ledger))
        if history.cancelled:
            return "CANCELLED"
        if history.job_id != self.job_id:
            return "UNKNOWN"
        return "FAILED" if history.gave_up else ENDED.get(history.outcome or "", "UNKNOWN")

    def get_info(self, mode: str = "force") -> dict[str, str]:
        """What squeue shows of the job, as text."""
        record = self._record()
        return {k: str(v) for k, v in vars(record).items()} if isinstance(record, slurm.JobRecord) else {}

    def done(self, force_check: bool = False) -> bool:
        """Whether the job has ended, well or not. A requeued job has not."""
        record = self._record()
        if isinstance(record, slurm.Unknown):
            return False  # not known is not done
        return record is None or not record.live

    def wait(self) -> None:
        """Wait for the job's end, through every requeue."""
        while not self.done():
            time.sleep(2)

    def cancel(self, check: bool = True) -> None:
        """Cancel the job. check: raise where SLURM did not take the request."""
        refused = slurm.cancel([self.job_id], conf=self._conf)
        if refused is not None and check:
            raise LaunchError(f"job {self.job_id}: {refused.why}")

    def exception(self) -> UncompletedJobError | FailedJobError | None:
        """Wait, and return what result() would raise."""
        self.wait()
        problem = manifest.problem(self.run.model)
        if problem is None:
            return None
        history = summarise(ledger.read(self.run.ledger))
        state = self.state
        said = "\n".join(tail(self.paths.stderr, 20)) or "(no error stream)"
        text = (
            f"Job {self.job_id} of {self.run.root} has no complete output ({problem}; state {state})"
            + (f": {history.reason}" if history.reason else "")
            + f"\n{'-' * 40}\n{said}\n{'-' * 40}\n"
            + f"full logs: {self.paths.stderr} and {self.paths.stdout}"
        )
        failed = history.gave_up or state in ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        return FailedJobError(text) if failed else UncompletedJobError(text)

    def results(self) -> list[Any]:
        """[result()]"""
        if (error := self.exception()) is not None:
            raise error
        return [self.run.model]

    def result(self) -> Path:
        """Wait for the job, and return the folder of the run's output.

        Raises submitit's FailedJobError or UncompletedJobError, with the end of stderr.
        """
        model: Path = self.results()[0]
        return model


def take(script: Path, folder: Path, name: str, conf: str | None) -> str:
    """Have SLURM take a job script, once. Returns the job's id.

    The job's comment says its folder, and a token of this one submission: where the answer is lost, that tells its job
    from an earlier one of the same folder. Raises LaunchError with SLURM's words where it is refused, Unanswered where
    the job may be in the queue.
    """
    comment = f"{os.path.realpath(folder)}{slurm.TOKEN}{secrets.token_hex(4)}"
    answer = slurm.sbatch(str(script), comment, conf=conf)
    if isinstance(answer, slurm.Refused):
        problem = f"{name}: SLURM refused the job: {answer.why}"
        raise Full(problem) if slurm.at_limit(answer) else LaunchError(problem)
    if isinstance(answer, str):
        try:
            return str(submitit.SlurmExecutor._get_job_id_from_submission_command(answer))
        except FailedSubmissionError:  # a wrapper that says nothing of the job
            answer = slurm.Unknown(f"sbatch printed no job id: {answer.strip()!r}")
    found = slurm.find_submitted(comment, conf=conf)
    if isinstance(found, slurm.JobRecord):
        return found.job_id.partition("_")[0]  # of an array: whichever element was seen
    shows = f"and squeue does not answer: {found.why}" if found else "and squeue does not show it"
    raise Unanswered(
        f"{name}: SLURM did not say whether it took the job ({answer.why}), {shows}", "the same command again"
    )


class RunExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submits one run's slurm/job.sh."""

    job_class = RunJob

    def __init__(self, run: RunDirectory, script: str, cluster: str, slurm_conf: str | None) -> None:
        super().__init__(folder=run.slurm)
        self.run, self.script, self.cluster, self.slurm_conf = run, script, cluster, slurm_conf

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def _num_tasks(self) -> int:
        return 1

    def _submit_command(self, command: str) -> RunJob:
        """submitit's, but the script is slurm/job.sh: its own copy would go above a folder with a % in its name.

        The job's comment says its run directory, by which the job is found whoever submitted it.
        """
        write_atomic(self.run.script, self._make_submission_file_text(command, ""), durable=False)
        return RunJob(self.run.slurm, take(self.run.script, self.run.root, self.run.name, self.slurm_conf))

    def submit_run(self) -> RunJob:
        """Write slurm/job.sh, submit it, record the job.

        Raises LaunchError with SLURM's words where it is refused, Unanswered where the job may be in the queue.
        """
        try:
            with FileLock(self.run.lock, timeout=LOCK_TIMEOUT_S):
                write_atomic(self.run.failure_count, "0\n", durable=False)  # as the ledger counts after `submitted`
                job = self._submit_command("")
                ledger.append(self.run.ledger, "submitted", job_id=job.job_id, cluster=self.cluster)
                return job
        except Timeout as error:
            raise LaunchError(
                f"{self.run.root} is being submitted by another command", "wait for it and look again"
            ) from error


def submit_array(array: Array, script: str, cluster: str, slurm_conf: str | None) -> dict[int, str]:
    """Submit several runs as one job array: write its folder, submit it, record the jobs. Ids by the elements' numbers.

    Raises as submit_run; then the folder is gone, unless the jobs may be in the queue.
    """
    array.folder.mkdir(parents=True)
    own = array.folder / "job.sh"
    with contextlib.ExitStack() as stack:
        try:
            for run in array.runs.values():
                stack.enter_context(FileLock(run.lock, timeout=LOCK_TIMEOUT_S))
        except Timeout as error:
            shutil.rmtree(array.folder, ignore_errors=True)
            raise LaunchError(
                f"{array.name}: a run of it is being submitted by another command", "wait for it and look again"
            ) from error
        write_atomic(own, script)
        for number, run in array.runs.items():
            (array.folder / str(number)).symlink_to(os.path.relpath(run.slurm, array.folder))
            run.failure_count.write_text("0\n")  # as the ledger counts after `submitted`
            run.script.unlink(missing_ok=True)
            run.script.symlink_to(os.path.relpath(own, run.slurm))
        try:
            number_of_all = take(own, array.folder, array.name, slurm_conf)
        except LaunchError as error:
            if not isinstance(error, Unanswered):
                shutil.rmtree(array.folder, ignore_errors=True)
            raise
        ids = {number: f"{number_of_all}_{number}" for number in array.runs}
        for number, run in array.runs.items():
            ledger.append(run.ledger, "submitted", job_id=ids[number], cluster=cluster)
        return ids
