"""What the tests on a real SLURM share: the ``devcluster`` fixture, and waiting for events.

In conftest.py: ``from tests.slurm_fixture import devcluster``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from launchers import devcluster as dc

T = TypeVar("T")


def require_slurm(accounting: bool = False) -> None:
    """Skips the test where SLURM is missing, and fails it in CI: there, a skipped test proves nothing."""
    why = dc.missing_message(accounting)
    if why and os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI needs a real SLURM: {why}", pytrace=False)
    if why:
        pytest.skip(why)


def short_folder() -> Path:
    """An empty folder with a short path: the paths of Unix sockets below it hold 107 characters."""
    return Path(tempfile.mkdtemp(prefix="ptdc-", dir="/tmp"))


@pytest.fixture(scope="session")
def devcluster() -> Iterator[dc.Cluster]:
    """A real SLURM of four nodes for the whole session; ``.env`` is the environment of its clients.

    Leave it as you found it: no drained nodes, no jobs that go on.
    """
    require_slurm()
    folder = short_folder()
    try:
        yield dc.up(folder)
    finally:
        dc.down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(what: str, probe: Callable[[], T], timeout: float = 30.0) -> T:
    """Polls until the probe returns something true, and returns that."""
    deadline = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what} (last seen: {value!r})")
        time.sleep(0.1)


def submit(cluster: dc.Cluster, script: Path, text: str, *options: str) -> str:
    """Writes a batch script, submits it with its output beside it (``<script>.out``), returns the job id."""
    script.write_text(f"#!/bin/bash\n{text}\n")
    out = script.with_suffix(".out")
    return cluster.run("sbatch", "--parsable", "--open-mode=append", "-o", str(out), *options, str(script)).strip()


def job(cluster: dc.Cluster, job_id: str) -> dict[str, str]:
    """What scontrol says of a job, by field."""
    text = cluster.run("scontrol", "-o", "show", "job", job_id)
    # A value may hold blanks; what follows then has no "=" and is not needed here.
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait_state(cluster: dc.Cluster, job_id: str, *states: str, timeout: float = 30.0) -> dict[str, str]:
    """Waits until a job is in one of these states and returns what scontrol says of it."""

    def probe() -> dict[str, str]:
        seen = job(cluster, job_id)
        return seen if seen["JobState"] in states else {}

    try:
        return wait_for(f"job {job_id} {' or '.join(states)}", probe, timeout)
    except AssertionError as error:
        seen = {key: job(cluster, job_id)[key] for key in ("JobState", "Reason", "Restarts", "ExitCode")}
        raise AssertionError(f"{error}; the job: {seen}") from None
