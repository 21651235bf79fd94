"""What launchers.doctor found out about a cluster, kept where submit, status and plan look it up.

One file a cluster: <paths.output_base>/.sites/<cluster.name>.json. What nobody asked, or SLURM did not say, is None.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from post_training.run.directory import write_atomic

VERSION = 1
REQUEUE_HOLD_S = 121.0
"""How long SLURM holds a requeued job back where nobody has asked: its default cred_expire of 120 s, and one."""


@dataclass(frozen=True)
class Site:
    """A cluster's limits and settings; None where they are not known."""

    asked: float | None = None  # when doctor asked, seconds since the epoch
    slurm_cluster: str | None = None  # SLURM's own name of it
    slurm_version: str | None = None
    requeue_hold_seconds: float | None = None
    kill_wait_seconds: int | None = None
    min_job_age_seconds: int | None = None
    job_requeue: bool | None = None
    accounting: bool | None = None
    max_array_size: int | None = None  # highest index of an array, plus one; 0 or 1: no arrays
    max_submit_jobs: int | None = None  # jobs of one user in the queue at a time, of association and QOS the smaller
    max_jobs: int | None = None  # jobs of all users that the controller keeps (MaxJobCount)
    version: int = VERSION

    @property
    def requeue_hold(self) -> float:
        """Seconds that a requeued job waits before it can start again; SLURM's default where it is not known."""
        return REQUEUE_HOLD_S if self.requeue_hold_seconds is None else self.requeue_hold_seconds


def place(output_base: Path, cluster: str) -> Path:
    """The file of a cluster, by its name in conf/cluster/."""
    return output_base / ".sites" / f"{cluster}.json"


def read(output_base: Path, cluster: str) -> Site:
    """What doctor found; nothing known where it was not asked, or its file is damaged or of a later version."""
    try:
        found = json.loads(place(output_base, cluster).read_text(encoding="utf-8"))
        known = {item.name for item in fields(Site)}
        return Site(**{name: value for name, value in found.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return Site()


def write(output_base: Path, cluster: str, site: Site) -> Path:
    """Keep what was found. Raises OSError."""
    path = place(output_base, cluster)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(site), indent=1) + "\n")
    return path
