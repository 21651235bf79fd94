"""What SLURM says of itself in, findings out. Pure: asks nothing, reads no file.

Every finding says what was seen, why that matters to runs of this project, and what to do about it. A source that did
not answer is `unknown`, never fine. What SLURM's settings mean: man slurm.conf, man sacctmgr.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from conf.check import ConfigError, gpus_per_node, nearest, parse_wall_time, tasks_per_node
from conf.schema import Config
from launchers import slurm
from launchers.preflight import check_request, wake
from launchers.site import REQUEUE_HOLD_S, Limits, Site
from launchers.slurm import Unknown
from launchers.table import duration

Level = Literal["ok", "note", "unknown", "warning", "problem"]
TESTED = (22, 5)
"""The oldest SLURM that this project was tested with."""
SLOW_S = 5.0
SAVE_S = 30
"""What a small model needs to save: less time than this between SIGTERM and SIGKILL is too little for any."""
NOTHING = "nothing to do"
ADMIN = "ask the cluster's administrators"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    name: str
    level: Level
    seen: str
    why: str
    fix: str = NOTHING


@dataclass(frozen=True)
class Asked:
    """What SLURM answered, as text."""

    version: str | Unknown
    ping: str | Unknown
    seconds: float  # that `scontrol ping` took
    config: str | Unknown
    partitions: str | Unknown
    nodes: str | Unknown
    qos: str | Unknown
    associations: str | Unknown
    sacct: str | Unknown
    groups: Mapping[str, slurm.Partition] | Unknown
    reservations: str | Unknown
    now: float = 0.0  # when it was asked, seconds since the epoch
    mine: tuple[str, ...] = ()  # the user's Unix groups

    @classmethod
    def nothing(cls, why: Unknown, version: str | Unknown, ping: str | Unknown, seconds: float) -> Asked:
        """Where no controller answers."""
        return cls(version, ping, seconds, why, why, why, why, why, why, why, why)


# ------------------------------------------------------------------------------------------------ parsing


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: name -> value; "(null)" and the like are ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z]\w*(?:\[\d+\])?)\s*=\s?(.*)$", line)
        if match:
            value = match[2].strip()
            found.setdefault(match[1], "" if value in ("(null)", "N/A", "none", "None") else value)
    return found


def whole(text: str | None) -> int | None:
    """The number at the beginning of `30 sec`, `1001`; None where there is none."""
    match = re.match(r"\s*(\d+)\b", text or "")
    return int(match[1]) if match and len(match[1]) < 15 else None


def parse_records(text: str, first: str = "PartitionName") -> dict[str, dict[str, str]]:
    """`scontrol show partition`, with or without --oneliner: name -> its fields."""
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if key == first and equals:
            current = found.setdefault(value, {})
        elif equals:
            current.setdefault(key, value)
    return found


@dataclass(frozen=True)
class Nodes:
    """Nodes of one partition that are alike."""

    partition: str
    state: str  # idle, mixed, allocated, down*, drained, ...
    count: int
    gpus: Mapping[str | None, int]
    features: frozenset[str]


def parse_nodes(text: str) -> list[Nodes]:
    """sinfo's lines: partition|state|nodes|GRES|features."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|", 4)]
        if len(parts) == 5 and parts[2].isdigit():
            features = frozenset(parts[4].split(",")) - {"(null)", ""}
            name = parts[0].removesuffix("*")
            found.append(Nodes(name, parts[1], int(parts[2]), slurm.parse_gres(parts[3]), features))
    return found


def gpus_of(tres: str) -> int | None:
    """GPUs in `cpu=8,gres/gpu=4` or `gres/gpu:h100=4`; None where no GPUs are mentioned."""
    counts = [(item[1] or "", int(item[2])) for item in re.finditer(r"gres/gpu(:[^=,]+)?=(\d{1,9})", tres)]
    untyped = [count for kind, count in counts if not kind]
    return (untyped[0] if untyped else sum(count for _, count in counts)) if counts else None


def _limits(grace: str, mode: str, wall: str, jobs: str, submit: str, job: str, user: str, in_all: str, flags: str,
            group_submit: str) -> Limits:  # fmt: skip
    submits = [n for n in (whole(submit), whole(group_submit)) if n is not None]
    return Limits(
        max_wall_seconds=slurm.seconds(wall), max_jobs=whole(jobs), max_submit_jobs=min(submits, default=None),
        gpus_per_job=gpus_of(job), gpus_per_user=gpus_of(user), gpus_in_all=gpus_of(in_all),
        grace_seconds=slurm.seconds(grace) or None, preempt_mode=None if mode in ("", "cluster") else mode.upper(),
        flags=tuple(flag for flag in flags.split(",") if flag),
    )  # fmt: skip


def parse_qos(text: str) -> dict[str, Limits]:
    """sacctmgr's lines of slurm.QOS_FIELDS."""
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 11 and parts[0]:
            name, flags, grace, mode, wall, jobs, submit, job, user, in_all, group_submit = parts
            found[name] = _limits(grace, mode, wall, jobs, submit, job, user, in_all, flags, group_submit)
    return found


@dataclass(frozen=True)
class Association:
    """An account that the user may charge jobs to."""

    cluster: str
    account: str
    partition: str  # "": any
    qos: tuple[str, ...]
    default_qos: str | None
    limits: Limits


def parse_associations(text: str) -> list[Association]:
    """sacctmgr's lines of slurm.ASSOCIATION_FIELDS."""
    found = []
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 11 and parts[1]:
            cluster, account, partition, qos, default, jobs, submit, wall, job, in_all, group_submit = parts
            limits = _limits("", "", wall, jobs, submit, job, "", in_all, "", group_submit)
            names = tuple(name for name in qos.split(",") if name)
            found.append(Association(cluster, account, partition, names, default or None, limits))
    return found


_UNITS = {"": 1024, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4, "P": 1024**5}


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"\[?(\d+(?:\.\d+)?)([kKMGTP]?)\*?\]?\*?", text)  # plain numbers are kilobytes
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None


@dataclass(frozen=True)
class Quota:
    """How much of a quota is used, bytes and files; a limit of None is none."""

    used: int
    limit: int | None
    files: int | None
    file_limit: int | None


def parse_quota(text: str, places: Sequence[str]) -> Quota | None:
    """`quota` or `lfs quota`: the line of the file system that has one of these names. None where none has.

    Columns: file system, used, quota, limit, [grace], files, quota, limit, [grace]. A grace that is empty is left out
    by `quota`, and written `-` by `lfs quota`. The first of soft and hard limit that is set counts.
    """
    words: list[str] = []
    for line in text.splitlines():
        found = line.split()
        if len(words) == 1 and not line[:1].isalnum():  # a long name stands on a line of its own
            words += found
        else:
            words = found
        if not words or words[0] not in places or len(words) < 2:
            continue
        rest = words[1:]
        sizes = [_bytes(word) for word in rest[:3]]
        if len(sizes) < 3 or None in sizes:
            continue
        used, soft, hard = (size or 0 for size in sizes)
        tail = rest[3:]
        counts = [(w.strip("[]*")) for w in tail if re.fullmatch(r"\[?\d+k?\*?\]?\*?", w)]
        numbers = [int(w.rstrip("k")) * (1000 if w.endswith("k") else 1) for w in counts[:3]]
        files, limits = (numbers[0], numbers[1:]) if numbers else (None, [])
        return Quota(used, soft or hard or None, files, next((n for n in limits if n), None))
    return None


def requeue_hold(config: Mapping[str, str]) -> float:
    """Seconds that a requeued job waits: cred_expire of AuthInfo, and one."""
    match = re.search(r"cred_expire=(\d{1,9})", config.get("AuthInfo", ""))
    return float(match[1]) + 1 if match else REQUEUE_HOLD_S


def version_of(text: str | None) -> tuple[int, ...] | None:
    """`slurm-wlm 22.05.8` as (22, 5, 8)."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return tuple(int(part) for part in match.groups() if part) if match else None


# ------------------------------------------------------------------------------------- what submit will use


def association_of(associations: Sequence[Association], cfg: Config, cluster: str | None) -> Association | None:
    """The one that jobs of this config are charged to, as far as that can be told."""
    fitting = [
        a for a in associations
        if (not cluster or not a.cluster or a.cluster == cluster)
        and (not cfg.slurm.account or a.account == cfg.slurm.account)
        and (not a.partition or a.partition == cfg.slurm.partition)
    ]  # fmt: skip
    return max(fitting, key=lambda a: bool(a.partition)) if fitting else None


def site_of(asked: Asked, cfg: Config, now: float) -> Site:
    """What is worth keeping of the answers."""
    config = {} if isinstance(asked.config, Unknown) else parse_config(asked.config)
    partitions = None
    default = None
    if not isinstance(asked.partitions, Unknown):
        records = parse_records(asked.partitions)
        default = next((name for name, record in records.items() if record.get("Default") == "YES"), None)
        partitions = {
            name: Limits(
                max_wall_seconds=slurm.seconds(record.get("MaxTime", "")),
                grace_seconds=whole(record.get("GraceTime")) or None,
                preempt_mode=record.get("PreemptMode", "").split(",")[-1] or None,
                qos=None if record.get("QoS", "N/A") == "N/A" else record["QoS"],
            )
            for name, record in records.items()
        }
    qos = None if isinstance(asked.qos, Unknown) else parse_qos(asked.qos)
    found = [] if isinstance(asked.associations, Unknown) else parse_associations(asked.associations)
    mine = association_of(found, cfg, config.get("ClusterName"))
    enforced = _enforced(config) if config else None
    version = version_of(None if isinstance(asked.version, Unknown) else asked.version)
    site = Site(
        asked=now,
        slurm_cluster=config.get("ClusterName"),
        slurm_version=config.get("SLURM_VERSION") or (".".join(map(str, version)) if version else None),
        requeue_hold_seconds=requeue_hold(config) if config else None,
        kill_wait_seconds=whole(config.get("KillWait")),
        min_job_age_seconds=whole(config.get("MinJobAge")),
        job_requeue=config.get("JobRequeue") == "1" if config else None,
        accounting=None if not config else not isinstance(asked.sacct, Unknown) and _accounting(config),
        max_array_size=whole(config.get("MaxArraySize")),
        max_jobs=whole(config.get("MaxJobCount")),
        limits_enforced=None if enforced is None else "limits" in enforced,
        preempts=_preempts(config) if config else None,
        default_partition=default,
        default_qos=mine.default_qos or (mine.qos[0] if len(mine.qos) == 1 else None) if mine else None,
        partitions=partitions, qos=qos, association=mine.limits if mine else None,
    )  # fmt: skip
    submits = [limit[0] for limit in (site.limit("max_submit_jobs", cfg.slurm.partition, cfg.slurm.qos),) if limit]
    own = mine.limits.max_submit_jobs if mine and site.limits_enforced else None
    return replace(site, max_submit_jobs=min([*submits, *([own] if own is not None else [])], default=None))


def _accounting(config: Mapping[str, str]) -> bool:
    return "slurmdbd" in config.get("AccountingStorageType", "")


def _enforced(config: Mapping[str, str]) -> set[str]:
    """What AccountingStorageEnforce comes to: `safe` and `qos` bring what they need with them (man slurm.conf)."""
    words = {word.strip().lower() for word in config.get("AccountingStorageEnforce", "").split(",")} - {""}
    if words & {"all", "safe"}:
        words |= {"limits", "associations"}
    if "all" in words:
        words |= {"qos"}
    return words | ({"associations"} if words & {"limits", "qos", "wckeys"} else set())


def _preempts(config: Mapping[str, str]) -> bool:
    kind = config.get("PreemptType", "").removeprefix("preempt/")
    return kind not in ("", "none")


# ------------------------------------------------------------------------------------------------- judging


def judge(asked: Asked, cfg: Config) -> list[Finding]:
    """All findings on what SLURM answered, for jobs of this config."""
    return [
        *judge_controller(asked, cfg),
        *judge_settings(asked.config, cfg),
        *judge_preemption(asked, cfg),
        *judge_partition(asked, cfg),
        *judge_limits(asked, cfg),
    ]


def _unknown(topic: str, name: str, source: Unknown, why: str) -> Finding:
    fix = "look whether `scontrol ping` answers, then ask again"
    return Finding(topic, name, "unknown", f"not known: {source.why}", why, fix)


def judge_controller(asked: Asked, cfg: Config) -> list[Finding]:
    """Versions, and whether and how fast the controller answers."""
    topic = "SLURM"
    text = asked.version if not isinstance(asked.version, Unknown) else ""
    version = version_of(text)
    why = "the job scripts rely on how SLURM requeues, signals and chains jobs"
    if isinstance(asked.version, Unknown):
        fix = f"run this on a login node of the cluster; {wake(cfg)}"
        first = Finding(topic, "version", "problem", f"sinfo does not work: {asked.version.why}", why, fix)
    elif version is None:
        first = Finding(topic, "version", "unknown", f"not known: {text.strip()[:60]!r}", why, ADMIN)
    elif version < TESTED:
        fix = "a chain of small stages first (cluster=... pipeline=quickstart): older versions are not tested"
        first = Finding(topic, "version", "warning", f"{text.strip()}, older than the tested 22.05", why, fix)
    else:
        first = Finding(topic, "version", "ok", text.strip(), why)
    why = "nothing can be submitted or requeued while no controller answers"
    if isinstance(asked.ping, Unknown):
        return [first, Finding(topic, "controller", "problem", f"no answer: {asked.ping.why}", why, wake(cfg))]
    up = [line.strip() for line in asked.ping.splitlines() if re.search(r"\bUP\b", line)]
    if not up:
        seen = " ".join(asked.ping.split()) or "no controller is UP"
        return [first, Finding(topic, "controller", "problem", seen, why, ADMIN)]
    seen = f"{up[0]}, answers in {asked.seconds:.2f} s"
    if asked.seconds > SLOW_S:
        fix = "submit in larger pieces and look less often (status --watch 60)"
        return [first, Finding(topic, "controller", "warning", seen, "a busy controller answers sbatch late", fix)]
    return [first, Finding(topic, "controller", "ok", seen, why)]


Rule = Callable[[str, Mapping[str, str], Config], tuple[Level, str, str, str]]
"""Value, all settings and config in; level, what was seen, why and fix out."""


def _plain(why: str) -> Rule:
    return lambda value, config, cfg: ("ok", value, why, NOTHING)


def _job_requeue(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "jobs are requeued under their id at the wall time and after preemption"
    if value == "1":
        return "ok", "1", why, NOTHING
    return "note", f"{value}: not by default", why, "nothing to do: our scripts say --requeue themselves"


def _hold(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    hold = requeue_hold(config)
    named = "cred_expire" in value
    seen = f"{hold:.0f} s ({'cred_expire' if named else 'default cred_expire of 120 s'} + 1)"
    why = "a requeued job waits that long before it may start: no hang, and counted in plans"
    if hold > 300:
        return "warning", seen, why, f"{ADMIN} for a smaller cred_expire in AuthInfo, or take longer wall times"
    return "ok", seen, why, NOTHING


def _kill_wait(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    seconds, why = whole(value), "what a cancelled or preempted job has between SIGTERM and SIGKILL, besides a grace"
    if seconds is None:
        return "unknown", f"not known: {value!r}", why, ADMIN
    if seconds < SAVE_S:
        fix = "save often where jobs are preempted (checkpointing.save_minutes=10); planned stops are not concerned"
        return "note", f"{seconds} s, too short for a save", why, fix
    return "ok", f"{seconds} s", why, NOTHING


def _min_job_age(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    seconds, why = whole(value), "how long SLURM remembers an ended job; sbatch refuses to depend on a forgotten one"
    if seconds is None:
        return "unknown", f"not known: {value!r}", why, ADMIN
    if 0 < seconds < 60:
        return "warning", f"{seconds} s", why, f"submit whole chains at once, or {ADMIN} for MinJobAge=300"
    return "ok", f"{seconds} s" if seconds else "0: ended jobs are kept", why, NOTHING


def _array(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    size, why = whole(value), "the highest index of a job array, plus one"
    if size is not None and size < 2:
        return "note", f"{size}: job arrays are switched off", why, "submit sweeps as single jobs"
    return "ok", value, why, NOTHING


def _slurmd_timeout(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    seconds, why = whole(value), "after that a silent node counts as lost, and its jobs go on elsewhere"
    if seconds == 0:
        return "warning", "0: never", why, f"requeue such jobs by hand, or {ADMIN} for SlurmdTimeout=300"
    if seconds is not None and seconds > 900:
        return (
            "note",
            value,
            why,
            f"nothing to do: the watchdog of a run ends it after {cfg.slurm.watchdog_minutes:g} min",
        )
    return "ok", value, why, NOTHING


def _unkillable(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    seconds, why = whole(value), "a step that SIGKILL does not end by then drains its node"
    if seconds is not None and seconds < 60:
        return "note", value, why, "name that to the administrators where nodes drain with 'Kill task failed'"
    return "ok", value, why, NOTHING


def _over_time(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    minutes, why = whole(value), "how far a job may run over its wall time"
    if value.upper().startswith("UNLIM") or (minutes or 0) > 0:
        return "note", value, why, "nothing to do: runs are asked to stop before their own wall time"
    return "ok", value, why, NOTHING


def _enforce_parts(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "whether sbatch refuses a job that its partition can never run"
    if value.upper() in ("NO", ""):
        seen = f"{value or 'NO'}: a job that can never run waits for ever"
        return "note", seen, why, "nothing to do: submit checks requests itself"
    return "ok", value, why, NOTHING


def _plugins(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "the site's own rules may change or refuse a job"
    if value:
        return "note", value, why, "read what sbatch says, and `scontrol show job` of a first small one"
    return "ok", "none", why, NOTHING


def _accounts(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "sacct remembers jobs that squeue has forgotten"
    if not _accounting(config):
        return "note", f"{value or 'none'}: no sacct", why, "nothing to do: each run's ledger remembers by itself"
    enforced = ",".join(sorted(_enforced(config))) or "nothing"
    return "ok", f"{value.removeprefix('accounting_storage/')}, enforces {enforced}", why, NOTHING


def _proctrack(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "how SLURM finds the processes of a job when it ends it"
    if value.endswith("cgroup"):
        return "ok", value, why, NOTHING
    fix = "watch for stray processes that hold a GPU (slurm.health_check), or ask for proctrack/cgroup"
    return "warning", f"{value}: processes that leave their parent survive the job", why, fix


def _task_plugin(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "whether a job is held to its own cores, memory and GPUs"
    if "cgroup" not in value:
        fix = "on nodes that jobs share, ask for whole nodes (slurm.gpus_per_node), or for task/cgroup"
        return "note", f"{value or 'none'}: jobs are not held to what they got", why, fix
    if config.get("ConstrainDevices", "").lower() == "no":
        return "note", f"{value}, but ConstrainDevices=no", why, "never set CUDA_VISIBLE_DEVICES in slurm.env or setup"
    return "ok", value, why, NOTHING


def _select(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "--gpus-per-node needs select/cons_tres"
    if value.endswith("cons_tres"):
        return "ok", value, why, NOTHING
    if gpus_per_node(cfg):
        return "problem", value, why, f"slurm.gpus_per_node=0 for CPU stages, or {ADMIN} for select/cons_tres"
    return "note", value, why, "nothing to do: no GPUs are asked for"


def _invalid_depend(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "whether jobs whose upstream failed leave the queue by themselves"
    if "kill_invalid_depend" in value:
        return "ok", "kill_invalid_depend", why, NOTHING
    return "ok", "no, but our scripts ask for it (--kill-on-invalid-dep)", why, NOTHING


def _requeue_exit(value: str, config: Mapping[str, str], cfg: Config) -> tuple[Level, str, str, str]:
    why = "SLURM requeues jobs that end with such a status by itself, also runs that gave up"
    if value:
        return "warning", value, why, f"look at status for runs that come back, or {ADMIN} why it is set"
    return "ok", "none", why, NOTHING


SETTINGS: dict[str, Rule] = {
    "JobRequeue": _job_requeue,
    "AuthInfo": _hold,
    "KillWait": _kill_wait,
    "MinJobAge": _min_job_age,
    "MaxArraySize": _array,
    "MaxJobCount": _plain("jobs of all users that the controller keeps; sbatch refuses more"),
    "SlurmdTimeout": _slurmd_timeout,
    "BatchStartTimeout": _plain("a job whose script does not start by then is put back into the queue"),
    "UnkillableStepTimeout": _unkillable,
    "OverTimeLimit": _over_time,
    "EnforcePartLimits": _enforce_parts,
    "DependencyParameters": _invalid_depend,
    "RequeueExit": _requeue_exit,
    "JobSubmitPlugins": _plugins,
    "AccountingStorageType": _accounts,
    "ProctrackType": _proctrack,
    "TaskPlugin": _task_plugin,
    "SelectType": _select,
}
"""Settings of the controller that matter here, in the order in which they are shown."""
SHOWN = {"AuthInfo": "requeue hold", "DependencyParameters": "invalid dependencies"}
MAY_BE_ABSENT = ("JobSubmitPlugins", "DependencyParameters", "RequeueExit", "AuthInfo", "AccountingStorageType")
"""Settings that some versions do not print where they are not set."""


def judge_settings(answer: str | Unknown, cfg: Config) -> list[Finding]:
    """The controller's settings. A setting that the answer lacks is not known."""
    topic = "settings"
    if isinstance(answer, Unknown):
        return [_unknown(topic, "scontrol show config", answer, "how SLURM requeues, signals and forgets jobs")]
    config = parse_config(answer)
    found = []
    for name, rule in SETTINGS.items():
        shown = SHOWN.get(name, name)
        absent = name not in config and (name not in MAY_BE_ABSENT or "SLURM_VERSION" not in config)
        level, seen, why, fix = rule(config.get(name, ""), config, cfg)
        if absent:
            level, seen, fix = "unknown", "not known: this SLURM does not say", f"{ADMIN}, if it matters to you"
        found.append(Finding(topic, shown, level, seen, why, fix))
    return found


def _partition_of(asked: Asked, cfg: Config) -> tuple[str | None, dict[str, dict[str, str]]]:
    records = {} if isinstance(asked.partitions, Unknown) else parse_records(asked.partitions)
    default = next((name for name, record in records.items() if record.get("Default") == "YES"), None)
    return cfg.slurm.partition or default, records


def judge_preemption(asked: Asked, cfg: Config) -> list[Finding]:
    """Whether, how, and with how much warning jobs of this config are preempted."""
    topic, name = "settings", "preemption"
    why = "a preempted job saves what it can and goes on later under the same id"
    for source in (asked.config, asked.partitions):
        if isinstance(source, Unknown):
            return [_unknown(topic, name, source, why)]
    site = site_of(asked, cfg, 0.0)
    where, _ = _partition_of(asked, cfg)
    config = parse_config(str(asked.config))
    kind = config.get("PreemptType", "").removeprefix("preempt/") or "none"
    if not site.preempts:
        return [Finding(topic, name, "ok", "nobody is preempted (PreemptType none)", why)]
    found = site.preemption(cfg.slurm.partition, cfg.slurm.qos)
    if found is None:
        return [Finding(topic, name, "ok", f"by {kind}; jobs of partition {where} are not", why)]
    mode, seconds = found
    given = "an unknown time" if seconds is None else f"{seconds} s (GraceTime and KillWait)"
    seen = f"by {kind}, {mode}; a job of partition {where} has {given} to save"
    if mode == "CANCEL":
        fix = "a partition that requeues or does not preempt; else `launchers.pipeline` again continues the run"
        return [Finding(topic, name, "warning", seen, "a preempted job is cancelled, not requeued", fix)]
    if mode in ("SUSPEND", "GANG", "SUSPEND,GANG"):
        fix = "a partition that is not suspended, or a longer slurm.watchdog_minutes"
        return [Finding(topic, name, "warning", seen, "a suspended job stands still while its wall time goes on", fix)]
    if seconds is None:
        return [Finding(topic, name, "unknown", seen, why, ADMIN)]
    if seconds < cfg.slurm.signal_time_seconds:
        why = f"slurm.signal_time_seconds={cfg.slurm.signal_time_seconds} says that a save may need longer"
        fix = "checkpointing.save_minutes=<what you can afford to lose>, or a partition that is not preempted"
        return [Finding(topic, name, "warning", seen, why, fix)]
    return [Finding(topic, name, "ok", seen, why)]


DEAD = ("down", "drain", "fail", "maint", "unknown", "inval", "reserved", "reboot")


def is_up(state: str) -> bool:
    """Whether nodes in this state of sinfo's run jobs, now or once they are free."""
    text = state.lower()
    if "powered_down" in text or "powering_down" in text:
        return True  # switched on on demand
    return not text.endswith(("*", "$")) and not any(word in text for word in DEAD)


def judge_partition(asked: Asked, cfg: Config) -> list[Finding]:
    """The partition, its nodes and whether the config's request can ever run there."""
    topic = "partition"
    why = "jobs of this config go there"
    found: list[Finding] = []
    where, records = _partition_of(asked, cfg)
    if isinstance(asked.partitions, Unknown):
        found.append(_unknown(topic, "partitions", asked.partitions, why))
    else:
        names = ", ".join(f"{name}{'*' if r.get('Default') == 'YES' else ''}" for name, r in records.items())
        found.append(Finding(topic, "partitions", "ok", names, "where jobs can go; * is the default"))
        for name in (where or "").split(",") if where else []:
            if name in records:
                found.append(_state(name, records[name], cfg, asked.mine))
    if isinstance(asked.nodes, Unknown):
        found.append(_unknown(topic, "nodes", asked.nodes, "nodes that are up run the jobs"))
    else:
        nodes = parse_nodes(asked.nodes)
        here = [group for group in nodes if group.partition in (where or "").split(",")]
        if here:
            found.append(_nodes(str(where), here))
        if cfg.slurm.constraint is not None and here:
            found.append(_constraint(cfg.slurm.constraint, here))
    found.append(_maintenance(asked, cfg))
    why = "what slurm.* asks for must be there"
    if isinstance(asked.groups, Unknown):
        found.append(_unknown(topic, "request", asked.groups, why))
        return found
    try:
        site = site_of(asked, cfg, 0.0)
        check_request(cfg, asked.groups, over_time=site.over_partition_time(cfg.slurm.qos))
    except ConfigError as error:
        shown = "null" if error.value is None else error.value
        seen = f"{error.key}={shown}: {error.problem}"
        return [*found, Finding(topic, "request", "problem", seen, why, _set(error.key, error.fix))]
    asks = f"{cfg.slurm.num_nodes} x {gpus_per_node(cfg)} GPUs, {cfg.slurm.cpus_per_gpu} cores each"
    return [*found, Finding(topic, "request", "ok", f"{asks}, {cfg.slurm.wall_time}: can run", why)]


def _set(key: str, fix: str) -> str:
    return fix if "=" in fix else f"{key}: {fix}"


def _state(name: str, record: Mapping[str, str], cfg: Config, mine: Iterable[str]) -> Finding:
    """Whether a partition takes jobs of this user and config."""
    why = "jobs of this config go there"
    state = record.get("State", "")
    seen = f"{state or 'state not known'}, at most {record.get('MaxTime', 'not known')}"
    topic = "partition"
    if state and state != "UP":
        fix = f"another slurm.partition, or wait: {ADMIN} until when"
        return Finding(topic, name, "problem", f"{seen}: it starts no jobs", why, fix)
    groups = record.get("AllowGroups", "ALL")
    if groups != "ALL" and mine and not set(groups.split(",")) & set(mine):
        return Finding(
            topic, name, "problem", f"only for the groups {groups}", why, f"another slurm.partition, or {ADMIN}"
        )
    for field, key, value in (("Accounts", "account", cfg.slurm.account), ("Qos", "qos", cfg.slurm.qos)):
        allowed, denied = record.get(f"Allow{field}", "ALL"), record.get(f"Deny{field}", "")
        if value and allowed != "ALL" and value not in allowed.split(","):
            seen = f"does not take slurm.{key}={value}, only {allowed}"
            return Finding(topic, name, "problem", seen, why, f"slurm.{key}: {nearest(value, allowed.split(','))}")
        if value and value in denied.split(","):
            fix = f"another slurm.{key} or slurm.partition"
            return Finding(topic, name, "problem", f"does not take slurm.{key}={value}", why, fix)
    most = record.get("MaxNodes", "UNLIMITED")
    if most.isdigit() and cfg.slurm.num_nodes > int(most):
        seen = f"slurm.num_nodes={cfg.slurm.num_nodes}: at most {most} nodes a job"
        return Finding(topic, name, "problem", seen, why, f"slurm.num_nodes={most}")
    if record.get("ReqResv") == "YES":
        return Finding(topic, name, "problem", "takes only jobs of a reservation", why, "another slurm.partition")
    return Finding(topic, name, "ok", seen, why)


def _nodes(name: str, here: Sequence[Nodes]) -> Finding:
    topic, why = "partition", "only nodes that are up run jobs"
    up, total = sum(g.count for g in here if is_up(g.state)), sum(g.count for g in here)
    kinds: dict[str, int] = {}
    for group in here:
        for kind, count in group.gpus.items():
            kinds[kind or "no type"] = kinds.get(kind or "no type", 0) + count * group.count
    gpus = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no"
    states: dict[str, int] = {}
    for group in here:
        states[group.state] = states.get(group.state, 0) + group.count
    seen = f"{up} of {total} up ({', '.join(f'{n} {state}' for state, n in states.items())}); {gpus} GPUs"
    if up == 0:
        return Finding(topic, "nodes", "problem", seen, why, f"another slurm.partition than {name}, or {ADMIN}")
    if up < total / 2:
        return Finding(topic, "nodes", "warning", seen, why, f"reckon with a long queue, or {ADMIN}")
    return Finding(topic, "nodes", "ok", seen, why)


def _maintenance(asked: Asked, cfg: Config) -> Finding:
    """Reservations for maintenance, of any nodes: whose they are, a user cannot tell from the node list alone."""
    topic, name = "partition", "maintenance"
    why = "a job whose wall time reaches into it does not start before its end"
    if isinstance(asked.reservations, Unknown):
        return _unknown(topic, name, asked.reservations, why)
    coming = []
    for title, record in parse_records(asked.reservations, "ReservationName").items():
        try:
            start = datetime.fromisoformat(record.get("StartTime", "")).timestamp()
            end = datetime.fromisoformat(record.get("EndTime", "")).timestamp()
        except (ValueError, OverflowError, OSError):
            continue
        if "MAINT" in record.get("Flags", "").split(",") and end > asked.now:
            coming.append((start, f"{title}: {record['StartTime']} to {record['EndTime']} on {record.get('Nodes')}"))
    if not coming:
        return Finding(topic, name, "ok", "none is announced", why)
    start, seen = min(coming)
    left = max(0, int(start - asked.now) // 60)
    if start - asked.now < parse_wall_time(cfg.slurm.wall_time):
        fix = f"slurm.wall_time={left} (minutes) or less until then: runs are requeued and go on" if left else "wait"
        return Finding(topic, name, "warning", seen, why, fix)
    return Finding(topic, name, "note", seen, why, "nothing to do yet: jobs of this wall time end before it")


def _constraint(wanted: str, here: Sequence[Nodes]) -> Finding:
    there = frozenset[str]().union(*(group.features for group in here))
    why = "nodes must have the features asked for"
    names = re.findall(r"[A-Za-z_][\w.:-]*", re.sub(r"\*\d+", "", wanted))
    missing = [name for name in names if name not in there]
    if missing:
        fix = f"slurm.constraint: {nearest(missing[0], there)}" if there else "slurm.constraint=null: no node has any"
        seen = f"no node has {', '.join(missing)}"
        return Finding("partition", "constraint", "problem", seen, why, fix)
    return Finding("partition", "constraint", "ok", wanted, why)


def judge_limits(asked: Asked, cfg: Config) -> list[Finding]:
    """Accounts, QOS, and their limits for jobs of this config."""
    topic = "limits"
    if isinstance(asked.config, Unknown):
        return [_unknown(topic, "accounts and QOS", asked.config, "limits of accounts and QOS hold jobs back")]
    config = parse_config(asked.config)
    why = "limits of accounts and QOS hold jobs back or refuse them"
    if "AccountingStorageType" in config and not _accounting(config):
        return [Finding(topic, "accounts and QOS", "ok", "none: there is no accounting", why)]
    found: list[Finding] = []
    if isinstance(asked.sacct, Unknown):
        fix = "look again later: the accounting database is down, or not for you"
        seen = f"does not answer: {asked.sacct.why}"
        found.append(Finding(topic, "sacct", "warning", seen, "sacct remembers jobs that squeue has forgotten", fix))
    else:
        found.append(Finding(topic, "sacct", "ok", "answers", "sacct remembers jobs that squeue has forgotten"))
    for source in (asked.qos, asked.associations):
        if isinstance(source, Unknown):
            return [*found, _unknown(topic, "accounts and QOS", source, why)]
    qos, associations = parse_qos(str(asked.qos)), parse_associations(str(asked.associations))
    enforced = _enforced(config)
    found += [_account(associations, enforced, cfg), _qos(qos, associations, enforced, cfg, config.get("ClusterName"))]
    if "limits" not in enforced:
        return [*found, Finding(topic, "limits", "ok", "not enforced (AccountingStorageEnforce)", why)]
    site = site_of(asked, cfg, 0.0)
    return [*found, *_enforced_limits(site, cfg)]


def _account(associations: Sequence[Association], enforced: set[str], cfg: Config) -> Finding:
    topic, why = "limits", "jobs are charged to an account that you may use"
    accounts = sorted({a.account for a in associations})
    shown = ", ".join(accounts) or "none"
    wrong: Level = "problem" if "associations" in enforced else "note"
    if cfg.slurm.account is None:
        if not accounts:
            return Finding(topic, "account", wrong, "you have none on this cluster", why, ADMIN)
        return Finding(topic, "account", "ok", f"your default of: {shown}", why)
    if cfg.slurm.account not in accounts:
        fix = f"slurm.account: {nearest(cfg.slurm.account, accounts)}" if accounts else ADMIN
        return Finding(
            topic, "account", wrong, f"slurm.account={cfg.slurm.account} is none of yours: {shown}", why, fix
        )
    return Finding(topic, "account", "ok", cfg.slurm.account, why)


def _qos(
    qos: Mapping[str, Limits], associations: Sequence[Association], enforced: set[str], cfg: Config, cluster: str | None
) -> Finding:
    topic, why = "limits", "a QOS sets priority and limits"
    mine = association_of(associations, cfg, cluster)
    allowed = sorted(mine.qos) if mine else []
    shown = ", ".join(allowed or sorted(qos)) or "none"
    wanted = cfg.slurm.qos
    if wanted is None:
        default = f"your default{f' ({mine.default_qos})' if mine and mine.default_qos else ''}"
        return Finding(topic, "QOS", "ok", f"{default} of: {shown}", why)
    if wanted not in qos:
        fix = f"slurm.qos: {nearest(wanted, allowed or qos)}" if qos else "slurm.qos=null"
        return Finding(topic, "QOS", "problem", f"slurm.qos={wanted}: there is no such QOS", why, fix)
    if "associations" in enforced and allowed and wanted not in allowed:
        fix = f"slurm.qos: {nearest(wanted, allowed)}"
        return Finding(topic, "QOS", "problem", f"slurm.qos={wanted}: not for you, only {shown}", why, fix)
    return Finding(topic, "QOS", "ok", wanted, why)


def _enforced_limits(site: Site, cfg: Config) -> list[Finding]:
    topic, asks = "limits", cfg.slurm
    found = []
    if wall := site.limit("max_wall_seconds", asks.partition, asks.qos):
        seconds, who = wall
        why = "a job that asks for more waits for ever, or is refused"
        if parse_wall_time(asks.wall_time) > seconds:
            seen = f"slurm.wall_time={asks.wall_time}: {who} allows {duration(seconds)}"
            found.append(Finding(topic, "wall time", "problem", seen, why, f"slurm.wall_time={duration(seconds)}"))
        else:
            found.append(Finding(topic, "wall time", "ok", f"{who} allows {duration(seconds)}", why))
    gpus = asks.num_nodes * gpus_per_node(cfg)
    for name, what in (("gpus_per_job", "a job"), ("gpus_per_user", "a user"), ("gpus_in_all", "all jobs together")):
        if limit := site.limit(name, asks.partition, asks.qos):
            most, who = limit
            why = "a job that asks for more waits for ever, or is refused"
            if gpus > most:
                seen = f"{asks.num_nodes} x {asks.gpus_per_node} GPUs: {who} allows {what} {most}"
                fix = f"slurm.num_nodes and slurm.gpus_per_node that make {most} at most, or another slurm.qos"
                found.append(Finding(topic, f"GPUs of {what}", "problem", seen, why, fix))
            else:
                found.append(Finding(topic, f"GPUs of {what}", "ok", f"{who} allows {most}", why))
    if submit := site.limit("max_submit_jobs", asks.partition, asks.qos):
        most, who = submit
        stages = len(cfg.pipeline.stages)
        why = "sbatch refuses more; a pipeline is one job a stage"
        seen = f"{who} allows {most} in the queue at a time"
        if stages > most:
            fix = f"submit {most} stages at a time (launchers.submit stage=...), or ask for a larger MaxSubmitJobs"
            found.append(
                Finding(topic, "queued jobs", "problem", f"{seen}; the pipeline has {stages} stages", why, fix)
            )
        else:
            found.append(Finding(topic, "queued jobs", "ok", seen, why))
    if running := site.limit("max_jobs", asks.partition, asks.qos):
        why = "further jobs wait, whatever is free"
        found.append(Finding(topic, "running jobs", "ok", f"{running[1]} allows {running[0]} at a time", why))
    if not found:
        found.append(Finding(topic, "limits", "ok", "none for jobs of this config", "limits hold jobs back"))
    return found


# ------------------------------------------------------------------------------------- folders and Python

GB = 1e9
SKEW_S = 5.0
HUNG_SKEW_S = 60.0


def size(count: float | None) -> str:
    """Bytes as MB, GB or TB."""
    if count is None:
        return "not known"
    unit, name = next((u for u in ((1e12, "TB"), (1e9, "GB")) if count >= u[0]), (1e6, "MB"))
    return f"{count / unit:.1f} {name}"


def judge_folder(name: str, facts: Mapping[str, Any], runs: bool = True) -> list[Finding]:
    """A folder as launchers.doctor.probe_folder saw it. runs: whether runs live there, or short-lived files alone."""
    topic = name
    key = "paths.output_base" if runs else "TMPDIR"
    if "error" in facts:
        why = "runs, their checkpoints and records live there" if runs else "programs put short-lived files there"
        fix = f"{key}=<a folder of yours with room>"
        return [Finding(topic, "writing", "problem", str(facts["error"]), why, fix)]
    found = [_room(topic, key, facts, runs)]
    if not runs:
        return found
    if facts.get("inodes") is not None:
        why, seen = "a run makes some hundred files, a checkpoint some dozens", f"{facts['inodes']} free"
        level: Level = "ok" if facts["inodes"] >= 100_000 else "warning" if facts["inodes"] >= 5_000 else "problem"
        fix = NOTHING if level == "ok" else "remove old files, or another paths.output_base"
        found.append(Finding(topic, "files (inodes)", level, seen, why, fix))
    found.append(_quota(topic, facts.get("quota")))
    why = "a reader sees an old file or a new one, never half of one: manifests, configs, records"
    if not facts["rename"]:
        fix = "another paths.output_base: this file system cannot keep runs"
        found.append(Finding(topic, "atomic rename", "problem", "a renamed file was not in its place", why, fix))
    else:
        found.append(Finding(topic, "atomic rename", "ok", "works", why))
    why = "several processes append to a run's ledger and logs"
    if not facts["append"]:
        fix = "another paths.output_base: lines of ledgers would be lost"
        found.append(Finding(topic, "appending", "problem", "lines of two writers were lost", why, fix))
    else:
        found.append(Finding(topic, "appending", "ok", "works", why))
    why = "two commands never work on one run at once"
    if facts["flock"] != "works":
        fix = "a mount with locks (NFS: no nolock; Lustre: -o flock), or another paths.output_base"
        found.append(Finding(topic, "locks (flock)", "problem", str(facts["flock"]), why, fix))
    else:
        found.append(Finding(topic, "locks (flock)", "ok", "work between processes of this machine", why))
    why, seen = "each record is synced before it counts", f"{1000 * facts['fsync_s']:.0f} ms"
    if facts["fsync_s"] > 1:
        fix = "nothing breaks; a faster file system makes saves and records quicker"
        found.append(Finding(topic, "fsync", "warning", seen, why, fix))
    else:
        found.append(Finding(topic, "fsync", "ok", seen, why))
    return [*found, _skew(topic, "clock of file server", facts["skew_s"])]


def _room(topic: str, key: str, facts: Mapping[str, Any], runs: bool) -> Finding:
    room, seen = facts["room"], f"{size(facts['room'])} free in {facts['path']} ({facts['type']})"
    if not runs:
        why = "programs put short-lived files there"
        if room < GB:
            return Finding(topic, "room", "warning", seen, why, "export TMPDIR=<a folder with room>")
        return Finding(topic, "room", "ok", seen, why)
    why = "a checkpoint of 1 billion parameters takes some 14 GB with its optimizer, and two are kept"
    if room < GB:
        return Finding(topic, "room", "problem", seen, why, f"{key}=<a folder with room>, or remove old runs")
    if room < 100 * GB:
        return Finding(topic, "room", "warning", seen, why, "enough for small models; for others another folder")
    return Finding(topic, "room", "ok", seen, why)


def _quota(topic: str, quota: Mapping[str, Any] | None) -> Finding:
    why = "a job that runs out of its quota fails at its next save"
    if quota is None:
        fix = "ask how the site shows quotas; there is no `quota` or `lfs quota` for this folder"
        return Finding(topic, "quota", "unknown", "not known", why, fix)
    parts, worst = [], 0.0
    for used, limit, show in (
        (quota["used"], quota["limit"], size), (quota["files"], quota["file_limit"], lambda n: f"{n} files")
    ):  # fmt: skip
        if used is not None and limit:
            parts.append(f"{show(used)} of {show(limit)}")
            worst = max(worst, used / limit)
    seen = "; ".join(parts) or "none is set for you"
    if worst >= 1:
        return Finding(topic, "quota", "problem", seen, why, "remove old runs, or ask for more")
    if worst > 0.9:
        return Finding(topic, "quota", "warning", seen, why, "remove old runs, or ask for more")
    return Finding(topic, "quota", "ok", seen, why)


def _skew(topic: str, name: str, seconds: float | None) -> Finding:
    why = "files' times tell a hung run from a busy one, and events of several machines are put in order"
    if seconds is None:
        return Finding(topic, name, "unknown", "not known", why, "look why the folder could not be tried out")
    seen = "the same" if abs(seconds) < 0.1 else f"{abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
    if abs(seconds) > HUNG_SKEW_S:
        return Finding(topic, name, "problem", seen, why, f"{ADMIN} to set the clocks (chrony, NTP)")
    if abs(seconds) > SKEW_S:
        return Finding(topic, name, "warning", seen, why, f"{ADMIN} to set the clocks (chrony, NTP)")
    return Finding(topic, name, "ok", seen, why)


def own_python(cfg: Config) -> str | None:
    """Where the jobs' Python comes from, where it is not the one that submits."""
    keys = {
        "cluster.python": cfg.cluster.python, "container.image": cfg.container.image,
        "slurm.venv": cfg.slurm.venv, "slurm.conda": cfg.slurm.conda,
    }  # fmt: skip
    return next((f"{key}={value}" for key, value in keys.items() if value is not None), None)


def judge_python(facts: Mapping[str, Any], other: str | None) -> list[Finding]:
    """This machine's Python. other: the Python of the jobs, where that is another one."""
    topic, why = "Python here", "this project is tested with these versions"
    version = version_of(facts["python"]) or (0,)
    seen = f"{facts['python']} ({facts['executable']})"
    found = [Finding(topic, "version", "ok", seen, why)]
    if version < (3, 11):
        found = [Finding(topic, "version", "problem", seen, why, "a virtual environment with Python 3.11 or later")]
    wrong = facts["wrong"]
    if wrong is None:
        fix = "run this in the project's folder"
        return [*found, Finding(topic, "packages", "unknown", "not known: no pyproject.toml to compare with", why, fix)]
    if wrong:
        level: Level = "note" if other else "problem" if any("missing" in one for one in wrong) else "warning"
        fix = "make install, or pip install . in the project's folder"
        if other:
            fix = f"nothing to do: jobs use {other}"
        return [*found, Finding(topic, "packages", level, "; ".join(wrong), why, fix)]
    return [*found, Finding(topic, "packages", "ok", "all there, in versions that fit pyproject.toml", why)]


def judge_machine(facts: Mapping[str, Any], cfg: Config) -> list[Finding]:
    """This machine, where jobs run without SLURM."""
    topic = "this machine"
    wanted = cfg.slurm.cpus_per_gpu * tasks_per_node(cfg)
    why = "each stage takes slurm.cpus_per_gpu cores a task"
    cores = Finding(topic, "cores", "ok", f"{facts['cores']}, {wanted} asked for", why)
    if facts["cores"] < wanted:
        cores = replace(cores, level="warning", fix=f"slurm.cpus_per_gpu={max(1, facts['cores'])}")
    why = "Python with torch takes 1 GB before any model"
    memory = Finding(topic, "memory", "ok", size(facts["memory"]), why)
    if facts["memory"] < 4 * GB:
        memory = replace(memory, level="warning", fix="the smallest models alone (model=tiny), or a larger machine")
    gpus = Finding(topic, "GPUs", "ok", "there are some" if facts["gpus"] else "none", "GPUs train faster than cores")
    if not facts["gpus"]:
        gpus = replace(gpus, level="note", fix="nothing to do: model=tiny and pipeline=quickstart are made for CPUs")
    return [cores, memory, gpus]


# ----------------------------------------------------------------------------------------- compute nodes


@dataclass(frozen=True)
class Job:
    """What became of the job that looks at compute nodes, and what it left."""

    nodes: int
    job_id: str | None = None
    skipped: str | None = None  # why none was submitted
    problem: str | None = None  # why it could not be, or was lost
    waited: float = 0.0  # seconds
    queued: str | None = None  # SLURM's reason, where it did not start in time and was cancelled
    expected: str = "N/A"  # its start, as SLURM expected it
    state: str | None = None
    started: bool = False
    facts: tuple[dict[str, Any], ...] = ()  # of each rank that wrote some
    no_python: tuple[str, ...] = ()
    said: tuple[str, ...] = ()  # the end of its stderr


def judge_job(job: Job, cfg: Config, login: Mapping[str, Any]) -> list[Finding]:
    """What compute nodes saw. login: the same of this machine."""
    topic, why = "compute nodes", "runs live there: what is right here may be wrong there"
    if job.skipped:
        fix = "without --no-job" if job.skipped.startswith("--") else "mend that, then ask again"
        return [Finding(topic, "job", "unknown", f"not asked: {job.skipped}", why, fix)]
    if job.queued is not None:
        expected = f"; SLURM expects it to start at {job.expected}" if job.expected not in ("N/A", "") else ""
        seen = f"not within {job.waited:.0f} s: {job.queued}{expected}. Job {job.job_id} is cancelled"
        return [
            Finding(topic, "job", "unknown", seen, why, "--wait <more seconds>, or when the partition is less full")
        ]
    if job.problem and not job.facts:
        return [Finding(topic, "job", "problem", job.problem, why, "what sbatch says names the setting; mend it")]
    if job.no_python:
        python = own_python(cfg) or login["executable"]
        fix = "cluster.python=<a Python that compute nodes see>, on a shared file system"
        return [Finding(topic, "Python", "problem", f"{python} does not start. {job.no_python[0]}", why, fix)]
    if not job.facts:
        if not job.started:
            seen = f"job {job.job_id} ended ({job.state or 'unknown'}) and left nothing in paths.output_base"
            fix = "paths.output_base=<a folder that compute nodes see and may write>"
        else:
            seen = f"job {job.job_id} ended ({job.state or 'unknown'}): {' '.join(job.said) or 'no word why'}"
            fix = "mend slurm.modules, slurm.setup or cluster.python"
        return [Finding(topic, "job", "problem", seen, why, fix)]
    return _judge_facts(job, cfg, login)


def _judge_facts(job: Job, cfg: Config, login: Mapping[str, Any]) -> list[Finding]:
    topic = "compute nodes"
    abouts = [one["about"] for one in job.facts if "error" not in _part(one, "about")]
    names = ", ".join(str(about.get("node") or about.get("host")) for about in abouts)
    why = "runs live there: what is right here may be wrong there"
    found = [Finding(topic, "job", "ok", f"job {job.job_id} on {names}: {job.waited:.0f} s in all", why)]
    silent = job.nodes - len(job.facts)
    hung = [f"rank {one.get('rank')} at {one['at']}" for one in job.facts if one.get("at")]
    if silent or hung or job.problem:
        said = [job.problem or "", f"{silent} of {job.nodes} nodes said nothing" if silent else "", "; ".join(hung)]
        seen = "; ".join(part for part in [*said, *job.said[-1:]] if part)
        fix = "the findings below say how far it came; look at the node named, or exclude it (slurm.exclude)"
        found = [Finding(topic, "job", "problem", f"job {job.job_id} was not finished: {seen}", why, fix)]
    shared_machine = len({about["machine"] for about in abouts}) < len(abouts) or any(
        about["machine"] == login.get("machine") for about in abouts
    )
    found += _python_there(abouts, login, cfg)
    found += [_scontrol(abouts, cfg), _limits_there(abouts), _room_there(abouts)]
    found += _master(job.facts)
    found += _gpus_there(job.facts, cfg, shared_machine)
    return [*found, _all_reduce(job.facts), *_internet(job.facts, cfg), *_shared(job.facts, login)]


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A step's result; {"error": ...} where it failed or never came."""
    part = facts.get(name)
    return part if isinstance(part, dict) else {"error": "not reached"}


def _python_there(abouts: Sequence[Mapping[str, Any]], login: Mapping[str, Any], cfg: Config) -> list[Finding]:
    topic, why = "compute nodes", "jobs import what they find there, not what is installed here"
    found = []
    for about in abouts[:1]:
        seen = f"{about['python']} ({about['executable']})"
        same = own_python(cfg) is not None or about["python"] == login["python"]
        fix = NOTHING if same else "cluster.python=<one Python for both>, on a shared file system"
        found.append(Finding(topic, "Python", "ok" if same else "warning", seen, why, fix))
    different = []
    for about in abouts:
        for name, version in about["packages"].items():
            here = login["packages"].get(name)
            if version != here and f"{name} {version} there, {here} here" not in different:
                different.append(f"{name} {version} there, {here} here")
    if not abouts:
        return [Finding(topic, "Python", "unknown", "not known", why, "look at the job above")]
    torch = abouts[0]["packages"].get("torch")
    if torch is None:
        fix = "cluster.python=<an environment with this project's packages>"
        found.append(Finding(topic, "packages", "problem", "no torch there", why, fix))
    elif different:
        seen, fix = "; ".join(different), "one environment for both, or know why they differ"
        found.append(Finding(topic, "packages", "note" if own_python(cfg) else "warning", seen, why, fix))
    else:
        found.append(Finding(topic, "packages", "ok", f"torch {torch} and the others as here", why))
    return found


def _scontrol(abouts: Sequence[Mapping[str, Any]], cfg: Config) -> Finding:
    topic, name, why = "compute nodes", "scontrol", "a job requeues itself with it, before it ends"
    for about in abouts:
        seen = about["scontrol"]
        if seen.get("path") is None and cfg.container.image is not None:
            said = "not known: it is not in the container, and runs call it outside"
            fix = "ask without container.image, with the node's own Python (cluster.python)"
            return Finding(topic, name, "unknown", said, why, fix)
        if seen.get("path") is None:
            fix = "put it on PATH in slurm.setup, or load its module (slurm.modules)"
            return Finding(topic, name, "problem", f"not on PATH on {about['node']}", why, fix)
        if not seen.get("answers"):
            said = f"{about['node']}: {seen.get('said') or 'the controller does not answer'}"
            return Finding(topic, name, "problem", said, why, f"{ADMIN}: jobs must reach the controller")
    if not abouts:
        return Finding(topic, name, "unknown", "not known", why, "look at the job above")
    return Finding(topic, name, "ok", "there, and the controller answers it", why)


def _limits_there(abouts: Sequence[Mapping[str, Any]]) -> Finding:
    topic, name = "compute nodes", "limits (ulimit)"
    why = "NCCL pins memory (memlock), data loaders and checkpoints open many files (nofile)"
    if not abouts:
        return Finding(topic, name, "unknown", "not known", why, "look at the job above")
    memlock = [about["limits"]["memlock"] for about in abouts]
    nofile = [about["limits"]["nofile"] for about in abouts]
    lowest = min((n for n in memlock if n is not None), default=None)
    files = min((n for n in nofile if n is not None), default=None)
    seen = f"memlock {'unlimited' if lowest is None else size(lowest)}, nofile {files or 'unlimited'}"
    if files is not None and files < 1024:
        return Finding(topic, name, "warning", seen, why, "slurm.setup=['ulimit -n 65536']")
    if lowest is not None and lowest < GB:
        fix = f"slurm.setup=['ulimit -l unlimited']; where that is refused, {ADMIN} (InfiniBand needs it)"
        return Finding(topic, name, "note", seen, why, fix)
    return Finding(topic, name, "ok", seen, why)


def _room_there(abouts: Sequence[Mapping[str, Any]]) -> Finding:
    topic, name = "compute nodes", "room"
    why = "data loaders and NCCL share memory in /dev/shm; programs put short-lived files into TMPDIR"
    if not abouts:
        return Finding(topic, name, "unknown", "not known", why, "look at the job above")
    shm = min(about["shm_bytes"] or 0 for about in abouts)
    tmp = min(about["tmp_bytes"] or 0 for about in abouts)
    seen = f"/dev/shm {size(shm)}, {abouts[0]['tmp']} {size(tmp)}"
    if shm < GB:
        return Finding(topic, name, "warning", seen, why, f"{ADMIN} for a larger /dev/shm; NCCL and vLLM need it")
    if tmp < GB:
        return Finding(topic, name, "warning", seen, why, "slurm.env.TMPDIR=<a folder with room>")
    return Finding(topic, name, "ok", seen, why)


def _master(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    topic, name, why = "compute nodes", "MASTER_ADDR", "ranks find each other by the first node's name"
    for one in facts:
        part = _part(one, "master")
        if "error" in part:
            fix = f"{ADMIN}: nodes must know each other's names; slurm.setup can export another MASTER_ADDR"
            return [Finding(topic, name, "problem", f"rank {one.get('rank')}: {part['error']}", why, fix)]
    first = _part(facts[0], "master")
    seen = f"{first['name']} is {', '.join(first['addresses'])}; port {first['port']} is free"
    return [Finding(topic, name, "ok", seen, why)]


def _gpus_there(facts: Sequence[Mapping[str, Any]], cfg: Config, shared_machine: bool) -> list[Finding]:
    topic, name, why = "compute nodes", "GPUs", "one GPU a node was asked for"
    if not gpus_per_node(cfg):
        return []
    for one in facts:
        part, torch = _part(one, "gpus"), _part(one, "torch")
        node = _part(one, "about").get("node", f"rank {one.get('rank')}")
        if "error" in part:
            return [Finding(topic, name, "unknown", f"{node}: {part['error']}", why, "look at nvidia-smi there")]
        if part["visible"] is None:
            seen = f"{node}: SLURM sets no CUDA_VISIBLE_DEVICES"
            return [Finding(topic, name, "problem", seen, why, f"{ADMIN}: GRES of GPUs are not set up (gres.conf)")]
        if shared_machine and part["driver"] is None and not torch.get("gpus"):
            seen = f"CUDA_VISIBLE_DEVICES={part['visible']}, but this machine has none: SLURM emulates them"
            return [Finding(topic, name, "note", seen, why, "nothing to do: stages run on CPUs here")]
        if "error" in torch:
            return [
                Finding(topic, name, "unknown", f"{node}: torch says {torch['error']}", why, "mend the Python there")
            ]
        if not torch["gpus"]:
            said = "; ".join(part["names"]) or part.get("said") or "no nvidia-smi"
            seen = f"{node}: torch {torch['version']} sees none ({said})"
            return [
                Finding(topic, name, "problem", seen, why, "a torch built for CUDA, and a driver new enough for it")
            ]
    part = _part(facts[0], "gpus")
    return [Finding(topic, name, "ok", "; ".join(part["names"]) or f"CUDA_VISIBLE_DEVICES={part['visible']}", why)]


def _shared(facts: Sequence[Mapping[str, Any]], login: Mapping[str, Any]) -> list[Finding]:
    topic = "shared folder"
    parts = [(one.get("rank"), _part(one, "shared")) for one in facts]
    why = "all nodes of a run, and this machine, work in its folder"
    for rank, part in parts:
        if "error" in part:
            fix = "paths.output_base=<a folder on a file system that all nodes share>"
            return [Finding(topic, "between nodes", "problem", f"rank {rank}: {part['error']}", why, fix)]
    found = []
    here = login.get("skew_s")
    skews = [part["skew_s"] for _, part in parts]
    # the file server's clock against theirs, less the same against ours: their clock against ours
    worst = max(skews, key=abs)
    found.append(_skew(topic, "clock of nodes", None if here is None else here - worst))
    if len(facts) < 2:
        return found
    readers = [part for rank, part in parts if rank != 0]
    first = next(part for rank, part in parts if rank == 0) if parts[0][0] == 0 else {}
    torn, missing = sum(part["torn"] for part in readers), sum(part["missing"] for part in readers)
    reads = sum(part["reads"] for part in readers)
    why = "a reader on another node sees an old file or a new one, never half of one"
    if torn:
        fix = "another paths.output_base: this file system cannot keep runs of several nodes"
        found.append(Finding(topic, "atomic rename", "problem", f"{torn} of {reads} reads were torn", why, fix))
    elif missing:
        seen, fix = f"{missing} of {reads} reads found nothing (NFS)", "nothing breaks: readers look again"
        found.append(Finding(topic, "atomic rename", "note", seen, why, fix))
    else:
        found.append(Finding(topic, "atomic rename", "ok", f"{reads} reads, all whole", why))
    why = "only rank 0 and its job script write a ledger; other ranks' lines would be lost"
    if first:
        lost = first["lines_written"] - first["lines"]
        seen = f"{first['lines']} of {first['lines_written']} lines whole"
        fix = "nothing to do: runs append from one node at a time (NFS cannot do better)"
        found.append(Finding(topic, "appending", "note" if lost else "ok", seen, why, fix if lost else NOTHING))
    seconds = max(part["notice_s"] for part in readers)
    why = "ranks learn of a stop request by reading a file"
    seen = f"a change is seen after {seconds:.2f} s" if seconds >= 0.01 else "a change is seen at once"
    if seconds > 10:
        fix = f"slurm.signal_time_seconds longer by {seconds:.0f}, or a mount with a shorter actimeo"
        found.append(Finding(topic, "freshness", "warning", seen, why, fix))
    else:
        found.append(Finding(topic, "freshness", "ok", seen, why))
    why = "two commands or jobs never work on one run at once"
    if not all(part["lock_kept"] for part in readers):
        fix = "submit from one login node at a time; a mount with locks between machines (Lustre: -o flock)"
        found.append(Finding(topic, "locks (flock)", "warning", "do not hold between nodes", why, fix))
    else:
        found.append(Finding(topic, "locks (flock)", "ok", "hold between nodes", why))
    return found


def _internet(facts: Sequence[Mapping[str, Any]], cfg: Config) -> list[Finding]:
    topic, name, why = (
        "compute nodes",
        "internet",
        "models and data of a hub are loaded from there, unless offline=true",
    )
    part = _part(facts[0], "internet")
    if "error" in part:
        fix = "nothing to do, if models and data are local"
        return [Finding(topic, name, "unknown", f"not known: {part['error']}", why, fix)]
    if part["reached"]:
        return [Finding(topic, name, "ok", f"{part['url']} answers", why)]
    seen = f"{part['url']} is not reached: {part['said']}"
    if cfg.offline:
        return [Finding(topic, name, "ok", f"{seen}; offline=true asks none", why)]
    fix = "python -m launchers.prefetch here, then offline=true; or a proxy in slurm.env (HTTPS_PROXY)"
    return [Finding(topic, name, "warning", seen, why, fix)]


SLOW_GB_S = {"nccl": 5.0, "gloo": 0.05}
"""GB/s below which something is wrong between nodes: NCCL without InfiniBand or RoCE, gloo on a management network."""


def _all_reduce(facts: Sequence[Mapping[str, Any]]) -> Finding:
    topic, name, why = "compute nodes", "all-reduce", "gradients are summed over all ranks at every step"
    fix = (
        "slurm.env.NCCL_DEBUG=INFO shows what NCCL takes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network"
    )
    for one in facts:
        torch, part = _part(one, "torch"), _part(one, "all_reduce")
        if "error" in torch:
            mend = "cluster.python=<an environment in which `import torch` works there>"
            return Finding(topic, name, "problem", f"rank {one.get('rank')}: torch: {torch['error']}", why, mend)
        if "error" in part:
            return Finding(topic, name, "problem", f"rank {one.get('rank')}: {part['error']}", why, fix)
        if not part["right"]:
            return Finding(topic, name, "problem", f"rank {one.get('rank')}: a wrong sum", why, fix)
    part, torch = _part(facts[0], "all_reduce"), _part(facts[0], "torch")
    ranks = part["ranks"]
    begun = f"{part['backend']} over {ranks} ranks; import {torch['seconds']:.0f} s, start {part['first_s']:.1f} s"
    if ranks == 1:
        return Finding(topic, name, "ok", f"{part['backend']}, one rank alone", why)
    seen = f"{part['gb_per_s']:.2f} GB/s with {begun}"
    if part["gb_per_s"] < SLOW_GB_S.get(part["backend"], 0):
        return Finding(topic, name, "warning", seen, why, fix)
    return Finding(topic, name, "ok", seen, why)
