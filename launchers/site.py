"""What launchers.doctor found out about a cluster, kept where submit, status and plan look it up.

One file a cluster: <paths.output_base>/.sites/<cluster.name>.json. What nobody asked, or SLURM did not say, is None.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from post_training.run.directory import write_atomic

VERSION = 1
REQUEUE_HOLD_S = 121.0
"""How long SLURM holds a requeued job back where nobody has asked: its default cred_expire of 120 s, and one."""
OLD_S = 30 * 86400.0
"""What was asked longer ago is not believed any more: clusters change."""


@dataclass(frozen=True)
class Limits:
    """What a QOS, an association or a partition sets for a job; None where it sets nothing."""

    max_wall_seconds: int | None = None
    max_submit_jobs: int | None = None  # of one user, queued and running
    max_jobs: int | None = None  # of one user, running
    gpus_per_job: int | None = None
    gpus_per_user: int | None = None
    gpus_in_all: int | None = None  # of the QOS or association, everybody's jobs together
    grace_seconds: int | None = None  # between SIGTERM and the end of a preempted job, before KillWait
    preempt_mode: str | None = None  # OFF, REQUEUE, CANCEL, SUSPEND, ...; None: as the cluster's
    qos: str | None = None  # partition: the QOS whose limits hold for all of its jobs
    flags: tuple[str, ...] = ()  # of a QOS: OverPartQOS, PartitionTimeLimit, ...


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
    limits_enforced: bool | None = None  # whether SLURM holds jobs to the limits of QOS and association
    preempts: bool | None = None  # whether the cluster preempts jobs at all
    default_partition: str | None = None
    default_qos: str | None = None  # of the user's association
    partitions: Mapping[str, Limits] | None = None  # by name
    qos: Mapping[str, Limits] | None = None  # by name
    association: Limits | None = None  # of the user with the account that jobs are charged to
    account: str | None = None  # slurm.account that doctor was asked about; None: the user's default
    internet: bool | None = None  # whether a compute node reached the hub
    version: int = VERSION

    @property
    def requeue_hold(self) -> float:
        """Seconds that a requeued job waits before it can start again; SLURM's default where it is not known."""
        return REQUEUE_HOLD_S if self.requeue_hold_seconds is None else self.requeue_hold_seconds

    def _layers(self, partition: str | None, qos: str | None) -> list[tuple[str, Limits]]:
        """Where limits of a job come from, the first that sets one wins (SLURM's resource limits, "hierarchy")."""
        of_qos = self.qos or {}
        where = partition or self.default_partition
        job = qos or self.default_qos or ""
        own = [(f"QOS {job}", of_qos[job])] if job in of_qos else []
        part = (self.partitions or {}).get(where or "", Limits()).qos or ""
        above = [(f"QOS {part} of partition {where}", of_qos[part])] if part in of_qos else []
        layers = [*own, *above] if own and "OverPartQOS" in own[0][1].flags else [*above, *own]
        return [*layers, *([("your association", self.association)] if self.association else [])]

    def limit(self, name: str, partition: str | None, qos: str | None) -> tuple[int, str] | None:
        """A limit that SLURM enforces for jobs of this partition and QOS, and who sets it. None: none, or not known."""
        if not self.limits_enforced:
            return None
        found = ((getattr(limits, name), who) for who, limits in self._layers(partition, qos))
        return next(((int(value), who) for value, who in found if value is not None), None)

    def charged_to(self, account: str | None) -> Site:
        """The same, for jobs of an account: what is known of another account's association does not hold for them."""
        return self if account == self.account else replace(self, association=None, default_qos=None)

    def over_partition_time(self, qos: str | None) -> bool:
        """Whether jobs of this QOS may take longer than their partition allows."""
        job = qos or self.default_qos
        return bool(self.limits_enforced) and "PartitionTimeLimit" in (self.qos or {}).get(job or "", Limits()).flags

    def preemption(self, partition: str | None, qos: str | None) -> tuple[str, int | None] | None:
        """How jobs of this partition and QOS are preempted, and seconds from SIGTERM to SIGKILL (None: not known).

        None: they are not preempted, or nobody knows.
        """
        part = (self.partitions or {}).get(partition or self.default_partition or "")
        own = (self.qos or {}).get(qos or self.default_qos or "", Limits())
        mode = own.preempt_mode or (part.preempt_mode if part else None)
        if not self.preempts or mode is None or mode.upper() in ("OFF", "DISABLED"):
            return None
        grace = max(own.grace_seconds or 0, (part.grace_seconds if part else None) or 0)
        return mode.upper(), None if self.kill_wait_seconds is None else grace + self.kill_wait_seconds


def place(output_base: Path, cluster: str) -> Path:
    """The file of a cluster, by its name in conf/cluster/."""
    return output_base / ".sites" / f"{cluster}.json"


def read(output_base: Path, cluster: str) -> Site:
    """What doctor found. Nothing known where it was not asked, or longer than 30 days ago, or its file is damaged."""
    found = load(place(output_base, cluster))
    old = found.asked is None or not time.time() - OLD_S < found.asked < time.time() + 86400
    return Site() if old else found


def load(path: Path) -> Site:
    """What a file says, whatever its age; single values that cannot be right count as not known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Site()
    if not isinstance(found, dict) or found.get("version") != VERSION:
        return Site()
    values = {item.name: _sound(item.name, str(item.type), found.get(item.name)) for item in fields(Site)}
    return Site(**{**values, "version": VERSION})


def _sound(name: str, kind: str, value: Any) -> Any:
    """The value where it is what the field's annotation says, else None."""
    if name in ("partitions", "qos"):
        return {str(k): _limits(v) for k, v in value.items()} if isinstance(value, dict) else None
    if name == "association":
        return _limits(value) if isinstance(value, dict) else None
    wanted = kind.split(" ")[0]
    if wanted == "bool":
        return value if isinstance(value, bool) else None
    if wanted in ("int", "float"):
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
        return (int(value) if wanted == "int" else float(value)) if number else None
    return value if isinstance(value, str) else None


def _limits(value: Any) -> Limits:
    if not isinstance(value, dict):
        return Limits()
    flags = value.get("flags")
    values = {f.name: _sound(f.name, str(f.type), value.get(f.name)) for f in fields(Limits) if f.name != "flags"}
    return Limits(**{**values, "qos": value.get("qos") if isinstance(value.get("qos"), str) else None},
                  flags=tuple(str(flag) for flag in flags) if isinstance(flags, list) else ())  # fmt: skip


def write(output_base: Path, cluster: str, site: Site) -> Path:
    """Keep what was found. Raises OSError."""
    path = place(output_base, cluster)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(site), indent=1) + "\n")
    return path
