"""The run directory: the one place that knows how it is laid out.

    <paths.output_base>/<pipeline>/<stage>/
      config.yaml                 frozen: what this run does, fully resolved
      code/                       snapshot of the code it was submitted with
      checkpoints/checkpoint-N/   full state; manifest.json written last
      inference_checkpoints/step-N/
      model/                      the output, manifest last
      logs/                       metrics.jsonl, TensorBoard
      slurm/                      job.sh, slurm-<jobid>.out/.err (appended), failure_count, stop_request
      ledger.jsonl                attempts and events

Both sides use it: the login node to write and look, the compute node to run. No torch here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def fsync_directory(folder: Path) -> None:
    """Make a rename or a new name in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_yaml(text: str) -> Any:
    """Parse YAML, through libyaml where it is there: ten times faster, and status reads many configs."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


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
    def slurm(self) -> Path:
        return self.root / "slurm"

    @property
    def script(self) -> Path:
        return self.slurm / "job.sh"

    @property
    def stop_request(self) -> Path:
        return self.slurm / "stop_request"

    @property
    def failure_count(self) -> Path:
        return self.slurm / "failure_count"

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
        if not self.stop_request.exists():
            self.stop_request.write_text("0\n")

    def read_config(self) -> dict[str, Any]:
        """The frozen config as plain data. Raises FileNotFoundError where this is no run directory."""
        return cast("dict[str, Any]", load_yaml(self.config.read_text(encoding="utf-8")))

    def request_stop(self, attempt: int) -> None:
        """Ask the attempt to save and leave.

        Written in place, not renamed: NFS clients see new content of a known file at its next open, but may
        go on seeing an old directory entry for a minute. The attempt's number keeps an old request from
        stopping a later attempt.
        """
        with self.stop_request.open("r+") as file:
            file.write(f"{attempt}\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def stop_requested(self, attempt: int) -> bool:
        """Whether this attempt was asked to save and leave. One open and read of a few bytes."""
        try:
            return self.stop_request.read_text().strip() == str(attempt)
        except OSError:
            return False
