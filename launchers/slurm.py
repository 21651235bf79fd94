"""The one module that talks to SLURM: argv lists, timeouts, one batched query, a cleaned environment.

Answers are frozen snapshots. A source that fails gives `Unknown`, never an empty answer: to not know a job
is not to know that it is gone.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Settings of the user's own session, or of a job that this command runs in, must not reach what we ask or submit.
# SLURM_CONF names the cluster and stays.
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
LIVE = frozenset(
    (
        "PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
        "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "PREEMPTED",
    )
)  # fmt: skip
"""States of jobs that may still run. PREEMPTED is one: while squeue shows it, the requeue may be to come."""
TOKEN = " token="
"""Between run directory and token in a job's comment."""
TIMEOUT_S = 15.0
LOOK_S = 30.0
SUBMIT_TIMEOUT_S = 120.0
"""How long sbatch may take: a busy controller answers late, and an answer that we did not wait for is looked up."""
CHUNK = 500
LONGEST_LIST = 100_000
"""Characters of job ids that one squeue is asked for: Linux takes 131,072 in one argument."""
_FIELDS = "%i|%T|%r|%M|%l|%D|%N|%P|%V|%S|%E|%k"  # the comment comes last: it is the one that may hold a '|'


@dataclass(frozen=True)
class Unknown:
    """SLURM did not say."""

    why: str


@dataclass(frozen=True)
class Refused:
    """SLURM said no."""

    why: str


@dataclass(frozen=True)
class JobRecord:
    """One job as squeue shows it."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED, ...
    reason: str  # why it waits or ended, SLURM's word; "None" where there is none
    elapsed: int | None  # seconds
    limit: int | None  # seconds; None: unlimited
    nodes: int
    node_list: str
    partition: str
    submit_time: str  # ISO, or N/A
    start_time: str  # ISO, when it started or is expected to; or N/A
    dependency: str
    comment: str  # for jobs of ours: the run directory, or the array's folder, and a token of the submission

    @property
    def folder(self) -> str:
        """The run directory that its comment names; "" where it names none.

        An array's folder has a link to each run's slurm/: of an element the path goes through it, for realpath.
        """
        folder, element = self.comment.partition(TOKEN)[0], self.job_id.partition("_")[2]
        if not folder.startswith("/"):
            return ""
        return f"{folder}/{element}/.." if element else folder

    @property
    def live(self) -> bool:
        """Whether it is queued or running."""
        return self.state in LIVE


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one partition that are alike."""

    nodes: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str | None, int]  # by type; None: the GRES names no type


@dataclass(frozen=True)
class Partition:
    name: str
    default: bool
    up: bool
    max_seconds: int | None  # None: unlimited
    groups: tuple[NodeGroup, ...]


def clean_environment(conf: str | None) -> dict[str, str]:
    """The environment for SLURM's commands, and of the jobs that they submit. conf: path for SLURM_CONF."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN) or name == "SLURM_CONF"}
    if conf is not None:
        env["SLURM_CONF"] = conf
    return env


def _ask(*argv: str, conf: str | None, timeout: float = TIMEOUT_S) -> str | Unknown:
    try:
        done = subprocess.run(
            argv, env=clean_environment(conf), capture_output=True, text=True, errors="replace", timeout=timeout,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Unknown(f"{argv[0]} did not answer within {timeout:g} s")
    except OSError as error:
        return Unknown(f"{argv[0]}: {error.strerror}")
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.partition("\n")[0].strip()  # scontrol ping says DOWN on stdout
        return Unknown(f"{argv[0]}: {said or f'status {done.returncode}'}")
    return done.stdout


def installed() -> bool:
    """Whether `sbatch` is on PATH."""
    return shutil.which("sbatch") is not None


def controller_up(conf: str | None = None, timeout: float = 5.0) -> bool:
    """Whether a controller answers `scontrol ping`."""
    answer = _ask("scontrol", "ping", conf=conf, timeout=timeout)
    # "Slurmctld(primary) at host is UP"; with a backup there are two lines, or "UP/DOWN" in one
    return isinstance(answer, str) and re.search(r"\bUP\b", answer) is not None


def seconds(text: str) -> int | None:
    """Seconds of squeue's and sinfo's [D-][H:]M:S; None for UNLIMITED, INVALID, infinite and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, secs = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + secs


def parse_jobs(text: str) -> dict[str, JobRecord]:
    """squeue's lines in our format. Pure."""
    records = {}
    for line in text.splitlines():
        parts = line.split("|", 11)
        if len(parts) != 12:
            continue
        job_id, state, reason, elapsed, limit, nodes, node_list, partition, submitted, start, dependency, comment = (
            parts
        )
        records[job_id] = JobRecord(
            job_id=job_id, state=state, reason=reason, elapsed=seconds(elapsed), limit=seconds(limit),
            nodes=int(nodes) if nodes.isdigit() else 0, node_list=node_list, partition=partition,
            submit_time=submitted, start_time=start, dependency=dependency,
            comment="" if comment == "(null)" else comment,
        )  # fmt: skip
    return records


def jobs(
    ids: Sequence[str] | None = None, *, user: str | None = None, everyone: bool = False, conf: str | None = None,
    timeout: float = TIMEOUT_S,
) -> dict[str, JobRecord] | Unknown:  # fmt: skip
    """What squeue knows of these jobs, of all of some users' (by commas; by default: yours), or of all jobs. One call.

    Each element of an array (`123_4`) is a job of its own. A job that is not in the answer is one that SLURM has
    forgotten, or never knew.
    """
    argv = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FIELDS}"]
    if ids is None:
        argv += [] if everyone else [f"--user={user or getpass.getuser()}"]
        answer = _ask(*argv, conf=conf, timeout=timeout)
        return answer if isinstance(answer, Unknown) else parse_jobs(answer)
    wanted = set(ids)
    if not wanted:
        return {}
    listed = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}))
    answer = _ask(*argv, *([f"--jobs={listed}"] if len(listed) <= LONGEST_LIST else []), conf=conf, timeout=timeout)
    if isinstance(answer, Unknown):
        return {} if "Invalid job id" in answer.why else answer  # all of them forgotten
    return {job_id: job for job_id, job in parse_jobs(answer).items() if job_id in wanted}


@dataclass(frozen=True)
class Ended:
    """One job as accounting keeps it."""

    job_id: str
    state: str  # COMPLETED, TIMEOUT, "CANCELLED by 1000", ...
    exit_code: str  # status:signal
    end: str  # ISO, or Unknown
    node_list: str


def parse_ended(text: str) -> dict[str, Ended]:
    """sacct's lines in our format; of a job that was requeued, the newest. Pure."""
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 5:
            found[parts[0]] = Ended(*parts)
    return found


def accounting(ids: Sequence[str], conf: str | None = None, timeout: float = TIMEOUT_S) -> dict[str, Ended] | Unknown:
    """What accounting keeps of these jobs. One call."""
    if not ids:
        return {}
    fields = "--format=JobID,State,ExitCode,End,NodeList"
    argv = ("sacct", "--noheader", "--parsable2", "--allocations", fields)
    answer = _ask(*argv, f"--jobs={','.join(sorted(set(ids)))}", conf=conf, timeout=timeout)
    return answer if isinstance(answer, Unknown) else parse_ended(answer)


# What sbatch says where its request or the answer was lost on the way: the controller may have taken the job.
# The words are those of SLURM's error numbers for communication, and of the C library's.
_LOST = re.compile(
    r"timed? ?out|contact slurm controller|zero bytes|transport endpoint|connection (refused|reset)|broken pipe|"
    r"communication|send/recv|unexpected message|temporarily (unable|unavailable)|no route to host|standby mode",
    re.IGNORECASE,
)


def sbatch(script: str, comment: str, conf: str | None = None, timeout: float | None = None) -> str | Refused | Unknown:
    """Submit a job script and return what sbatch printed. Unknown: the job may have been taken; see `find_submitted`.

    comment: replaces the script's own. timeout: seconds, SUBMIT_TIMEOUT_S by default.
    """
    argv = ["sbatch", f"--comment={comment}", script]
    patience = SUBMIT_TIMEOUT_S if timeout is None else timeout
    try:
        done = subprocess.run(
            argv, env=clean_environment(conf), capture_output=True, text=True, errors="replace", timeout=patience,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Unknown(f"sbatch did not answer within {patience:g} s")
    except OSError as error:
        return Refused(f"sbatch: {error.strerror}")
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or f"sbatch: status {done.returncode}"
    return Unknown(said) if done.returncode < 0 or _LOST.search(said) else Refused(said)


def parse_test(text: str) -> float | None:
    """When `sbatch --test-only` expects a job to start, seconds since the epoch; None where it does not say. Pure."""
    match = re.search(r"Job \S+ to start at (\S+) using", text)
    if match is None:
        return None
    try:
        return time.mktime(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))  # SLURM's clock is the site's
    except (ValueError, OverflowError):
        return None


def expected_start(script: str, conf: str | None = None) -> float | Refused | Unknown:
    """When SLURM would start a job with this script's text if it were submitted now. Submits nothing.

    Seconds since the epoch; it is the backfill scheduler's guess from the wall times of all jobs.
    """
    argv = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(
            argv, env=clean_environment(conf), capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S,
            input=script, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Unknown(f"sbatch did not answer within {TIMEOUT_S:g} s")
    except OSError as error:
        return Unknown(f"sbatch: {error.strerror}")
    said = done.stderr.strip() or done.stdout.strip()
    if done.returncode == 0:
        start = parse_test(said)
        return Unknown(f"sbatch did not say when: {said[:200]}") if start is None else start
    # else it never came to judge the request: no configuration, no controller
    return Refused(said) if "allocation failure" in said else Unknown(said or f"sbatch: status {done.returncode}")


def at_limit(refused: Refused) -> bool:
    """Whether a job was refused for the number of jobs that are in the queue already: later it may be taken. Pure."""
    return re.search(r"MaxSubmit|job submit limit|MaxJobCount", refused.why) is not None


def find_submitted(comment: str, conf: str | None = None) -> JobRecord | Unknown | None:
    """Your job with exactly this comment, whatever its state. Looks again for LOOK_S: a controller too busy to answer
    sbatch may also take the job late, and squeue may be as silent as sbatch was."""
    deadline = time.monotonic() + LOOK_S
    while True:
        found = jobs(conf=conf)
        if not isinstance(found, Unknown):
            job = next((job for job in found.values() if job.comment == comment), None)
            if job is not None:
                return job
        if time.monotonic() > deadline:
            return found if isinstance(found, Unknown) else None
        time.sleep(1)


def max_array_size(conf: str | None = None) -> int | Unknown:
    """The cluster's MaxArraySize: an element's highest number, plus one."""
    answer = _ask("scontrol", "show", "config", conf=conf)
    if isinstance(answer, Unknown):
        return answer
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
    return int(found[1]) if found else Unknown("scontrol show config names no MaxArraySize")


def parse_gres(text: str) -> dict[str | None, int]:
    """GPUs by type of `gpu:h100:8(S:0-1),gpu:2`. Pure."""
    gpus: dict[str | None, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = item.strip().split(":")
        if name != "gpu" or not rest or not rest[-1].isdigit():
            continue
        kind = rest[0] if len(rest) > 1 else None
        gpus[kind] = gpus.get(kind, 0) + int(rest[-1])
    return gpus


def _number(text: str) -> int:
    match = re.match(r"\d+", text)  # "96+" where nodes differ
    return int(match[0]) if match else 0


def parse_partitions(text: str) -> dict[str, Partition]:
    """sinfo's lines in our format. Pure."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        parts = line.split("|", 6)
        if len(parts) != 7:
            continue
        shown, avail, limit, nodes, cpus, memory, gres = (part.strip() for part in parts)
        name = shown.removesuffix("*")
        group = NodeGroup(_number(nodes), _number(cpus), _number(memory), parse_gres(gres))
        known = found.get(name)
        groups = (*known.groups, group) if known else (group,)
        found[name] = Partition(name, shown.endswith("*"), avail == "up", seconds(limit), groups)
    return found


def partitions(conf: str | None = None) -> dict[str, Partition] | Unknown:
    """The cluster's partitions, for checking a request before the queue does."""
    answer = _ask("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%c|%m|%G", conf=conf)
    return answer if isinstance(answer, Unknown) else parse_partitions(answer)


# ------------------------------------------------------------------ what launchers.doctor asks about the cluster

QOS_FIELDS = "Name,Flags,GraceTime,PreemptMode,MaxWall,MaxJobsPU,MaxSubmitPU,MaxTRES,MaxTRESPU,GrpTRES,GrpSubmit"
ASSOCIATION_FIELDS = "Cluster,Account,Partition,QOS,DefaultQOS,MaxJobs,MaxSubmit,MaxWall,MaxTRES,GrpTRES,GrpSubmit"


def show_version(conf: str | None = None) -> str | Unknown:
    """What `sinfo --version` prints."""
    return _ask("sinfo", "--version", conf=conf)


def ping(conf: str | None = None) -> str | Unknown:
    """What `scontrol ping` prints: one line a controller."""
    return _ask("scontrol", "ping", conf=conf)


def show_config(conf: str | None = None) -> str | Unknown:
    """The controller's settings, a line each."""
    return _ask("scontrol", "show", "config", conf=conf, timeout=LOOK_S)


def show_partitions(conf: str | None = None) -> str | Unknown:
    """The partitions' settings, a line each."""
    return _ask("scontrol", "--oneliner", "show", "partition", conf=conf, timeout=LOOK_S)


def show_nodes(conf: str | None = None) -> str | Unknown:
    """partition|state|nodes|GRES|features, a line for nodes that are alike."""
    return _ask("sinfo", "--noheader", "--exact", "--format=%P|%T|%D|%G|%f", conf=conf, timeout=LOOK_S)


def show_reservations(conf: str | None = None) -> str | Unknown:
    """The reservations, a line each; a line of words where there are none."""
    return _ask("scontrol", "--oneliner", "show", "reservation", conf=conf)


def show_qos(conf: str | None = None) -> str | Unknown:
    """QOS_FIELDS of each QOS. Asks the accounting database."""
    return _ask("sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={QOS_FIELDS}", conf=conf)


def show_associations(conf: str | None = None) -> str | Unknown:
    """ASSOCIATION_FIELDS of what the user may charge jobs to. Asks the accounting database."""
    argv = ("sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}")
    return _ask(*argv, f"format={ASSOCIATION_FIELDS}", conf=conf)


def show_accounting(conf: str | None = None) -> str | Unknown:
    """Your jobs since midnight as sacct knows them: whether it answers at all."""
    argv = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID")
    return _ask(*argv, f"--user={getpass.getuser()}", conf=conf)


def cancel(ids: Sequence[str], conf: str | None = None, only_pending: bool = False) -> Unknown | None:
    """Cancel jobs. Unknown where SLURM did not take the request; jobs that are gone already are no error.

    only_pending: leave those alone that have started meanwhile.
    """
    if not ids:
        return None
    options = ["--quiet", *(["--state=PENDING"] if only_pending else [])]
    answer = _ask("scancel", *options, *ids, conf=conf)
    return answer if isinstance(answer, Unknown) else None


def ask_to_save(ids: Sequence[str], conf: str | None = None) -> Unknown | None:
    """USR1 to the job scripts, as SLURM sends it before the wall time. Unknown where SLURM did not take the request,
    as for a job that does not run."""
    answer = _ask("scancel", "--quiet", "--batch", "--signal=USR1", *ids, conf=conf) if ids else ""
    return answer if isinstance(answer, Unknown) else None


def hold(ids: Sequence[str], conf: str | None = None) -> Unknown | None:
    """Hold jobs as their user, who may release them again; a running one is held from its next requeue on."""
    answer = _ask("scontrol", "uhold", ",".join(ids), conf=conf) if ids else ""
    return answer if isinstance(answer, Unknown) else None


def release(ids: Sequence[str], conf: str | None = None) -> Unknown | None:
    """Let held jobs go on."""
    answer = _ask("scontrol", "release", ",".join(ids), conf=conf) if ids else ""
    return answer if isinstance(answer, Unknown) else None


def wait_for(job_id: str, ids: Sequence[str], conf: str | None = None) -> Unknown | None:
    """Make a queued job wait for the good end of these jobs, and of no others."""
    dependency = f"Dependency={':'.join(['afterok', *ids]) if ids else ''}"
    answer = _ask("scontrol", "update", f"JobId={job_id}", dependency, conf=conf)
    return answer if isinstance(answer, Unknown) else None


def owners(ids: Sequence[str], conf: str | None = None) -> dict[str, str] | Unknown:
    """The users of these jobs."""
    found: dict[str, str] = {}
    for start in range(0, len(ids), CHUNK):
        wanted = f"--jobs={','.join(ids[start : start + CHUNK])}"
        answer = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%u", wanted, conf=conf)
        if isinstance(answer, str):
            found |= dict(line.split("|", 1) for line in answer.splitlines() if "|" in line)
        elif "Invalid job id" not in answer.why:
            return answer
    return found


def cluster_name(conf: str | None = None) -> str | Unknown:
    """The controller's name of the cluster."""
    answer = _ask("scontrol", "show", "config", conf=conf)
    if isinstance(answer, Unknown):
        return answer
    match = re.search(r"^ClusterName\s*=\s*(\S+)", answer, re.MULTILINE)
    return match[1] if match else Unknown("scontrol show config names no cluster")


def upstream_jobs(job: JobRecord) -> set[str]:
    """The jobs whose good end a queued job waits for; of an array that it follows task by task, the one. Pure."""
    task = job.job_id.partition("_")[2]
    return {
        f"{number}_{task}" if rest == "_*" else f"{number}{rest}"
        for part in re.split(r"[,?]", job.dependency)
        if part.startswith(("afterok:", "aftercorr:"))
        for number, rest in re.findall(r":(\d+)(_\*|_\d+|)", part)
    }


def wait_gone(ids: Sequence[str], conf: str | None = None, timeout: float = 30.0) -> bool:
    """Wait until none of the jobs is live; False where that is not so, or not known, in time."""
    deadline = time.monotonic() + timeout
    while True:
        found = jobs(ids, conf=conf)
        if not isinstance(found, Unknown) and not any(job.live for job in found.values()):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
