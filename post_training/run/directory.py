"""The run directory: the one place that knows how it is laid out.

    <paths.output_base>/<pipeline>/<stage>/
      config.yaml                 frozen: what this run does, fully resolved
      code/                       snapshot of the code it was submitted with
      checkpoints/checkpoint-N/   full state; manifest.json written last
      checkpoints/.attempt-N/     where an attempt writes them, until they are whole
      inference_checkpoints/step-N/
      model/                      the output, manifest last
      logs/                       metrics.jsonl, environment.jsonl, data.json, TensorBoard, stacks of a hang
      slurm/                      job.sh, slurm-<jobid>.out/.err (appended, see ATTEMPT_MARK), failure_count,
                                  stop_request, newest_attempt, progress.json (live figures), error-N (why attempt N
                                  failed)
      ledger.jsonl                attempts and events

Both sides use it: the login node to write and look, the compute node to run. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

ATTEMPT_MARK = re.compile(
    r"^=== attempt (?P<attempt>\d{1,9}) of job (?P<job_id>\S+): (?P<ranks>\d{1,6}) ranks? on (?P<nodes>.*) "
    r"at (?P<time>\S+)$",
    re.MULTILINE,
)
"""The line with which a job script begins its part of slurm-<jobid>.out and .err (templates/job.sh.j2). With several
ranks each line that a rank wrote has its number before it: `3: ...`."""


def write_atomic(path: Path, text: str, durable: bool = True) -> None:
    """Write a file so that a reader sees the old text or the new one: temporary file, fsync, rename.

    durable: False leaves it to the system when it is on the disk, for files that a power cut may take.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a rename or a new name in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Whether a path exists and can be reached: False, not an error, in a folder that only its owner may look into."""
    return os.access(path, os.F_OK)


def load_yaml(text: str) -> Any:
    """Parse YAML, through libyaml where it is there: ten times faster, and status reads many configs."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _write_in_place(path: Path, text: str) -> None:
    """Not renamed: NFS clients see new content of a known file at its next open, but may go on seeing an old
    directory entry for a minute."""
    with path.open("r+") as file:
        file.write(text)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


class Fenced(RuntimeError):
    """A newer attempt has begun: this one may write nothing any more."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Creating the object touches nothing."""

    root: Path

    @property
    def name(self) -> str:
        """The stage's name in its pipeline."""
        return self.root.name

    @property
    def pipeline(self) -> str:
        return self.root.parent.name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def staging(self, attempt: int) -> Path:
        """Where an attempt writes its checkpoints; each is renamed into `checkpoints` once it is whole."""
        return self.checkpoints / f".attempt-{attempt}"

    @property
    def reference_log_probs(self) -> Path:
        """What the reference says of each row, where that was asked once before training."""
        return self.checkpoints / "reference_log_probs"

    @property
    def inference_checkpoints(self) -> Path:
        return self.root / "inference_checkpoints"

    @property
    def model(self) -> Path:
        """The output: a model, or for eval its results."""
        return self.root / "model"

    @property
    def results(self) -> Path:
        """An eval stage's figures, inside its output."""
        return self.model / "results.json"

    @property
    def held_out(self) -> Path:
        """Figures on held-out rows of a stage that trained, inside its output."""
        return self.model / "held_out.json"

    @property
    def samples(self) -> Path:
        """An eval stage's questions and answers, one JSON object a line, inside its output."""
        return self.model / "samples.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def data_report(self) -> Path:
        """What became of the records: how many of each data set are trained on, and why others are not."""
        return self.logs / "data.json"

    @property
    def environment(self) -> Path:
        """What each attempt ran on (run.environment): packages, machine, commit."""
        return self.logs / "environment.jsonl"

    def stacks(self, attempt: int, rank: int | str) -> Path:
        """Where a rank that hangs writes the stacks of its threads."""
        return self.logs / "stacks" / f"attempt-{attempt}-rank-{rank}.txt"

    @property
    def slurm(self) -> Path:
        return self.root / "slurm"

    @property
    def script(self) -> Path:
        return self.slurm / "job.sh"

    @property
    def stop_request(self) -> Path:
        return self.slurm / "stop_request"

    @property
    def newest_attempt_file(self) -> Path:
        return self.slurm / "newest_attempt"

    @property
    def failure_count(self) -> Path:
        return self.slurm / "failure_count"

    @property
    def progress(self) -> Path:
        """Figures of the running attempt (run.progress), rewritten about once a second."""
        return self.slurm / "progress.json"

    def error(self, attempt: int) -> Path:
        """One line: why a rank of this attempt failed."""
        return self.slurm / f"error-{attempt}"

    @property
    def lock(self) -> Path:
        """Held by whoever submits this run, so that two at once submit one job."""
        return self.slurm / ".submit.lock"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    def stdout(self, job_id: str) -> Path:
        return self.slurm / f"slurm-{job_id}.out"

    def stderr(self, job_id: str) -> Path:
        return self.slurm / f"slurm-{job_id}.err"

    def create(self) -> None:
        """Make the folders of a new run, and the stop-request file that its attempts keep reading."""
        for folder in (self.checkpoints, self.logs, self.slurm):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (self.stop_request, self.newest_attempt_file):
            if not path.exists():
                path.write_text("0\n")

    def read_config(self) -> dict[str, Any]:
        """The frozen config as plain data. Raises FileNotFoundError where this is no run directory."""
        return cast("dict[str, Any]", load_yaml(self.config.read_text(encoding="utf-8")))

    # -- two small files that processes on other nodes keep reading: who is the newest, and who is to stop

    def announce(self, attempt: int) -> None:
        """Make this the newest attempt: whatever is left of older ones can write nothing from here on.

        To be called within `exclusive`.
        """
        _write_in_place(self.newest_attempt_file, f"{attempt}\n")

    def newest_attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        return _read_number(self.newest_attempt_file)

    @contextlib.contextmanager
    def writing_as(self, attempt: int) -> Iterator[None]:
        """Around what an attempt writes: no newer one begins meanwhile. Raises Fenced where one has begun.

        A node that SLURM has given up may live on, with the ranks of an old attempt still running.
        """
        with self.exclusive():
            if self.newest_attempt() > attempt:
                raise Fenced(f"attempt {attempt} of {self.root}: a newer attempt has begun")
            yield

    def request_stop(self, attempt: int) -> None:
        """Ask the attempt to save and leave. Its number keeps an old request from stopping a later attempt."""
        _write_in_place(self.stop_request, f"{attempt}\n")

    def stop_requested(self, attempt: int) -> bool:
        """Whether this attempt was asked to save and leave. One open and read of a few bytes."""
        return _read_number(self.stop_request) == attempt

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One process at a time: flock, which Linux carries over NFS; without locks there, a moment of luck remains."""
        descriptor = os.open(self.slurm / ".write.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
