"""Ask a cluster what runs need to know of it, and keep the answers where submit uses them.

    python -m launchers.doctor [cluster=dev|h100|<site>] [paths.output_base=outputs] [key=value ...]
                               [--no-job] [--wait SECONDS] [--json]

Looks at SLURM's settings, limits and partitions, at the folders, at the Python; and, by a job of two minutes at most
on two nodes, at what compute nodes see. Each finding says what was seen, why it matters and what to do. What submit
uses is written to <paths.output_base>/.sites/<cluster.name>.json. Exit status 1 where there is a problem.

  --no-job         ask no compute node
  --wait SECONDS   how long the job may wait in the queue (default 300); then it is cancelled
  --json           the same as JSON
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import grp
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.check import ConfigError, check_job, gpus_per_node
from conf.schema import Config
from launchers import slurm
from launchers.diagnosis import (
    Asked,
    Finding,
    Job,
    is_up,
    judge,
    judge_folder,
    judge_job,
    judge_machine,
    judge_python,
    own_python,
    parse_config,
    parse_nodes,
    parse_quota,
    parse_records,
    site_of,
)
from launchers.errors import LaunchError
from launchers.site import Site, load, place, write
from launchers.table import near, tail
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.environment import PACKAGES

FOLDER = ".doctor"
SOURCE = Path(__file__).resolve().parent.parent
WAIT_S = 300.0
WALL_TIME = "00:02:00"
WALL_S = 120
MEMORY = "8G"
SILENT_S = 60.0
"""How long squeue may be silent while the job is looked after."""
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Order:
    """What the command asks for."""

    cfg: Config
    output_base: Path
    job: bool
    wait_s: float
    as_json: bool


# -------------------------------------------------------------------------------------------- questions


def ask(conf: str | None) -> Asked:
    """All that SLURM says. Where no controller answers, that is all: every question would wait in vain."""
    if conf is not None and not Path(conf).exists():  # SLURM's programs would look for it for a minute
        silent = slurm.Unknown(f"there is no {conf}")
        return Asked.nothing(silent, silent, silent, 0.0)
    version = slurm.show_version(conf)
    begin = time.monotonic()
    ping = slurm.ping(conf)
    seconds = time.monotonic() - begin
    if isinstance(ping, slurm.Unknown) or " UP" not in ping:
        silent = slurm.Unknown("no controller answers")
        return Asked.nothing(silent, version, ping, seconds)
    config = slurm.show_config(conf)
    none = slurm.Unknown("there is no accounting")
    accounts = isinstance(config, str) and "slurmdbd" in parse_config(config).get("AccountingStorageType", "")
    return Asked(
        version, ping, seconds, config,
        partitions=slurm.show_partitions(conf), nodes=slurm.show_nodes(conf),
        qos=slurm.show_qos(conf) if accounts else none,
        associations=slurm.show_associations(conf) if accounts else none,
        sacct=slurm.show_accounting(conf) if accounts else none,
        groups=slurm.partitions(conf), reservations=slurm.show_reservations(conf), now=time.time(), mine=_my_groups(),
    )  # fmt: skip


def _my_groups() -> tuple[str, ...]:
    names = []
    for number in os.getgroups():
        with contextlib.suppress(KeyError):
            names.append(grp.getgrgid(number).gr_name)
    return tuple(names)


def mount_of(path: Path, table: str) -> tuple[str, str, str]:
    """Type, source and mount point of a path's file system, from the text of /proc/self/mountinfo. Pure."""
    best = ("not known", "", "")
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 2:
            continue
        point = left[4].encode().decode("unicode_escape")
        if path.is_relative_to(point) and len(point) >= len(best[2]):
            best = (right[0], right[1], point)
    return best


def _quota(path: Path, kind: str, source: str, point: str) -> dict[str, Any] | None:
    """The user's quota where a tool says one; None: not known."""
    if kind == "lustre" and shutil.which("lfs"):
        argv, places = ["lfs", "quota", "-u", str(os.getuid()), point], [point]
    elif shutil.which("quota"):
        argv, places = ["quota", "-w"], [source, point]
    else:
        return None
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=15, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = parse_quota(done.stdout, places)
    return None if found is None else asdict(found)


def probe_folder(path: Path) -> dict[str, Any]:
    """What a folder is like from here: room, and whether renaming, appending, syncing and locking work."""
    facts: dict[str, Any] = {"path": str(path)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        kind, source, point = mount_of(path.resolve(), Path("/proc/self/mountinfo").read_text(errors="replace"))
        found = os.statvfs(path)
        facts |= {
            "type": kind, "room": found.f_bavail * found.f_frsize,
            "inodes": found.f_favail if found.f_files else None, "quota": _quota(path, kind, source, point),
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as folder:
            _try_out(Path(folder), facts)
    except OSError as error:
        facts["error"] = f"{error.filename or path}: {error.strerror or error}"
    return facts


def _try_out(folder: Path, facts: dict[str, Any]) -> None:
    from launchers.doctor_job import skew

    place, other = folder / "file", folder / "other"
    place.write_text("old")
    other.write_text("new")
    other.replace(place)
    facts["rename"] = place.read_text() == "new" and not other.exists()
    begin = time.monotonic()
    with place.open("a") as first, place.open("a") as second:
        for i in range(10):
            (first, second)[i % 2].write(f"{i}\n")
            (first, second)[i % 2].flush()
        os.fsync(first.fileno())
        facts["fsync_s"] = time.monotonic() - begin
        facts["append"] = place.read_text() == "new" + "".join(f"{i}\n" for i in range(10))
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                facts["flock"] = "two at once"
            except BlockingIOError:
                facts["flock"] = "works"
        except OSError as error:
            facts["flock"] = error.strerror
    facts["skew_s"] = skew(folder, "skew")


def python_here() -> dict[str, Any]:
    """This Python: version, packages, and what pyproject.toml wants that is missing or another version."""
    wrong: list[str] | None
    try:
        wrong = _wrong_packages()
    except (OSError, ValueError, KeyError, metadata.PackageNotFoundError):
        wrong = None
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "executable": sys.executable, "packages": found, "wrong": wrong}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wrong_packages() -> list[str]:
    import tomllib

    from packaging.requirements import Requirement

    wanted = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["dependencies"]
    wrong = []
    for requirement in map(Requirement, wanted):
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'} ({requirement.specifier} wanted)")
    return wrong


def machine_here() -> dict[str, Any]:
    """Cores, memory (bytes) and GPUs of this machine."""
    import psutil

    from launchers.serve import gpus_here

    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "memory": psutil.virtual_memory().total, "gpus": gpus_here()}


def _boot_id() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


# ---------------------------------------------------------------------------------------------- the job


def job_nodes(cfg: Config, asked: Asked, site: Site) -> int:
    """On how many nodes to look: two where there are two that a job may have, else one. Pure."""
    asks = cfg.slurm
    if asks.num_nodes > 1:
        return 2
    names = (asks.partition or site.default_partition or "").split(",")
    groups = [] if isinstance(asked.nodes, slurm.Unknown) else parse_nodes(asked.nodes)
    up = sum(group.count for group in groups if group.partition in names and is_up(group.state))
    records = {} if isinstance(asked.partitions, slurm.Unknown) else parse_records(asked.partitions)
    most = [records.get(name, {}).get("MaxNodes", "") for name in names]
    limits = (site.limit(name, asks.partition, asks.qos) for name in ("gpus_per_job", "gpus_per_user"))
    few = gpus_per_node(cfg) > 0 and any(limit is not None and limit[0] < 2 for limit in limits)
    return 1 if up < 2 or "1" in most or few else 2


def job_script(cfg: Config, folder: Path, nodes: int) -> str:
    """The text of the job's script. Pure."""
    from launchers.render import container, environment, python_of, whole

    asks = cfg.slurm
    gpus = 1 if gpus_per_node(cfg) else 0
    output = str(folder).replace("%", "%%")
    given = {
        "job-name": "doctor", "partition": asks.partition, "account": asks.account, "qos": asks.qos, "nodes": nodes,
        "ntasks-per-node": 1, "gpus-per-node": (f"{asks.gpu_type}:1" if asks.gpu_type else 1) if gpus else None,
        "cpus-per-task": asks.cpus_per_gpu, "mem": MEMORY, "time": WALL_TIME, "constraint": asks.constraint,
        "exclude": asks.exclude, "output": f"{output}/doctor.out", "error": f"{output}/doctor.err",
    }  # fmt: skip
    sbatch = {name: value for name, value in given.items() if value is not None} | {"no-requeue": None}
    return environment().get_template("doctor.sh.j2").render(
        sbatch=sbatch, folder=str(folder), python=python_of(cfg), nodes=nodes,
        venv=None if asks.venv is None else whole(asks.venv), conda=asks.conda,
        container=container(cfg, RunDirectory(folder), []),
        cpus=asks.cpus_per_gpu, modules=list(asks.modules), env=dict(asks.env), setup=list(asks.setup),
    )  # fmt: skip


@contextlib.contextmanager
def _job_folder(output_base: Path) -> Iterator[Path]:
    """A folder for the job, gone at the end; and those of commands that were killed go with it."""
    folder = output_base / FOLDER / secrets.token_hex(4)
    folder.mkdir(parents=True)
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > 86400:
                shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def run_job(order: Order, nodes: int, say: Callable[[str], None]) -> Job:
    """Have a job look at its nodes, and return what it saw. Whatever happens, no job of this command goes on.

    Raises OSError where its folder cannot be made.
    """
    from launchers.executor import take

    cfg = order.cfg
    conf = cfg.cluster.slurm_conf
    with _job_folder(order.output_base) as folder:
        shutil.copyfile(SOURCE / "launchers" / "doctor_job.py", folder / "doctor_job.py")
        hub = cfg.slurm.env.get("HF_ENDPOINT") or os.environ.get("HF_ENDPOINT") or HUB
        request = {"packages": list(PACKAGES), "hub": hub, "ranks": nodes, "deadline_s": 40}
        (folder / "request.json").write_text(json.dumps(request))
        write_atomic(folder / "job.sh", job_script(cfg, folder, nodes))
        job_id = None
        try:
            job_id = take(folder / "job.sh", folder, "doctor", conf)
            return _attend(folder, job_id, nodes, order, say)
        except LaunchError as error:
            return Job(nodes, problem=error.problem)
        finally:
            _leave(folder, job_id, conf)


def _attend(folder: Path, job_id: str, nodes: int, order: Order, say: Callable[[str], None]) -> Job:
    conf, begin = order.cfg.cluster.slurm_conf, time.monotonic()
    heard = begin
    started = None
    record: slurm.JobRecord | None = None
    while True:
        found = slurm.jobs([job_id], conf=conf)
        now = time.monotonic()
        if isinstance(found, slurm.Unknown):
            if now - heard > SILENT_S:
                return _seen(folder, Job(nodes, job_id, problem=f"SLURM fell silent: {found.why}"))
        else:
            heard, record = now, found.get(job_id, record)
            if started is None and (folder / "started").exists():
                started = now
            if job_id not in found or not found[job_id].live:
                break
            if record is not None and record.state != "PENDING":
                started = started or now
        waited = now - begin
        if started is None and waited > order.wait_s:
            reason = record.reason if record is not None else "None"
            start = record.start_time if record is not None else "N/A"
            return Job(nodes, job_id, waited=waited, queued=reason, expected=start)
        if started is not None and now - started > WALL_S + 60:
            return _seen(folder, Job(nodes, job_id, problem=f"still there {now - started:.0f} s after its start"))
        if started is None:
            why = f" ({record.reason})" if record is not None and record.reason != "None" else ""
            say(f"job {job_id} waits for {nodes} node{'s' * (nodes > 1)}{why}: {waited:.0f} of {order.wait_s:.0f} s")
        else:
            step = _step(folder)
            say(f"job {job_id} looks around{f' ({step})' if step else ''}: {now - started:.0f} s")
        time.sleep(0.5 if waited < 10 else 2.0)
    return _seen(folder, Job(nodes, job_id, waited=time.monotonic() - begin, state=record.state if record else None))


def _step(folder: Path) -> str | None:
    facts = _read_facts(folder)
    return next((str(one["at"]) for one in facts if one.get("at")), None)


def _read_facts(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("node-*.json")):
        try:
            facts = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(facts, dict):
            found.append(facts)
    return sorted(found, key=lambda facts: int(facts.get("rank") or 0))


def _seen(folder: Path, job: Job) -> Job:
    """The job, with what it left in its folder."""
    no_python = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("no-python-*"))]
    return replace(
        job, facts=tuple(_read_facts(folder)), no_python=tuple(no_python), started=(folder / "started").exists(),
        said=tuple(tail(folder / "doctor.err", 5)),
    )  # fmt: skip


def _leave(folder: Path, job_id: str | None, conf: str | None) -> None:
    """Cancel the job where it is still there, also one whose id was not heard of, and wait until it is gone."""
    ids = [job_id] if job_id is not None else []
    if job_id is None and (folder / "job.sh").exists():
        found = slurm.jobs(conf=conf)
        here = os.path.realpath(folder)
        ids = [] if isinstance(found, slurm.Unknown) else [i for i, job in found.items() if job.folder == here]
    live = slurm.jobs(ids, conf=conf) if ids else {}
    if isinstance(live, slurm.Unknown) or any(job.live for job in live.values()):
        slurm.cancel(ids, conf=conf)
        slurm.wait_gone(ids, conf=conf)


# ------------------------------------------------------------------------------------------- the report


MARKS = {"ok": "ok", "note": "note", "unknown": "not known", "warning": "warning", "problem": "PROBLEM"}
_ANSI = {"ok": "32", "note": "36", "unknown": "33", "warning": "1;33", "problem": "1;31"}


def lines(findings: Sequence[Finding], width: int, color: bool = False) -> Iterator[str]:
    """The report's lines, none longer than `width` (but for words that are)."""
    size = max((len(finding.name) for finding in findings), default=0)
    size = min(size, 22)
    topic = None
    for finding in findings:
        if finding.topic != topic:
            if topic is not None:
                yield ""
            topic = finding.topic
            yield topic
        mark = MARKS[finding.level].ljust(9)
        head = f"  {mark}  {_one_line(finding.name).ljust(size)}  "
        rows = _wrapped(finding.seen, max(20, width - len(head))) or [""]
        if color:
            head = head.replace(mark, f"\x1b[{_ANSI[finding.level]}m{mark}\x1b[0m", 1)
        yield f"{head}{rows[0]}".rstrip()
        yield from (" " * (15 + size) + row for row in rows[1:])
        if finding.level != "ok":
            for word, text in (("why", finding.why), ("fix", finding.fix)):
                rows = _wrapped(text, max(20, width - 18)) or [""]
                yield f"{' ' * 13}{word}: {rows[0]}"
                yield from (" " * 18 + row for row in rows[1:])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(_one_line(text), width, break_long_words=False, break_on_hyphens=False)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def summary(findings: Sequence[Finding]) -> str:
    """How many findings there are of each level, the worst first."""
    words = {"problem": ("problem", "problems"), "warning": ("warning", "warnings"), "unknown": ("not known",) * 2,
             "note": ("note", "notes"), "ok": ("ok", "ok")}  # fmt: skip
    counts = {level: sum(f.level == level for f in findings) for level in words}
    return ", ".join(f"{n} {words[level][n != 1]}" for level, n in counts.items() if n) or "nothing was looked at"


# ------------------------------------------------------------------------------------------ the command


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m launchers.doctor", usage=str(__doc__), add_help=False)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--no-job", action="store_true")
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="SECONDS")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args(list(argv))
    if not 1 <= given.wait <= 86400:
        raise LaunchError(f"--wait={given.wait:g}: not a time to wait", "1 to 86400 seconds")
    return given, list(given.settings)


def select(tokens: Sequence[str]) -> Config:
    """The config that jobs would have. Raises ConfigError. Asks SLURM under cluster=auto only."""
    from launchers.compose import Composer, Layers, rewrite, rewrite_stage, split
    from launchers.selection import resolve_cluster

    written = [rewrite_stage(rewrite(token)) for token in tokens]
    layers, composer = Layers.of(written), Composer()
    for stage, given in layers.alone.items():
        key, value = split(given[0])[1:]
        raise ConfigError(f"{stage}.{key}", value, "doctor looks for all stages at once", f"{key}={value}")
    mine = [token for token in written if split(token)[1] not in ("cluster", "stages.selected")]
    cfg = composer.config([*mine, f"cluster={resolve_cluster(composer, layers, composer.config(written))}"])
    check_job(cfg)
    return cfg


def examine(order: Order, say: Callable[[str], None]) -> tuple[list[Finding], Site | None]:
    """Look at everything. Returns the findings, and for a SLURM cluster what submit will use of them."""
    cfg, findings, site = order.cfg, list[Finding](), None
    on_slurm = cfg.cluster.scheduler == "slurm"
    asked = None
    if on_slurm:
        say("asking SLURM")
        asked = ask(cfg.cluster.slurm_conf)
        findings += judge(asked, cfg)
    say("trying out the folders")
    base = probe_folder(order.output_base)
    findings += judge_folder("paths.output_base", base)
    findings += judge_folder("temporary folder", probe_folder(Path(tempfile.gettempdir())), runs=False)
    here = python_here()
    findings += judge_python(here, other=own_python(cfg) if on_slurm else None)
    if not on_slurm:
        return findings + judge_machine(machine_here(), cfg), None
    assert asked is not None
    answered = isinstance(asked.config, str)
    site = site_of(asked, cfg, time.time())
    if not order.job:
        job = Job(0, skipped="--no-job")
    elif not answered:
        job = Job(0, skipped="no controller answers")
    elif any(f.topic == "partition" and f.level == "problem" for f in findings):
        job = Job(0, skipped="jobs of this config cannot run: see partition")
    elif "error" in base:
        job = Job(0, skipped="paths.output_base cannot be written")
    else:
        job = run_job(order, job_nodes(cfg, asked, site), say)
    login = {**here, "machine": _boot_id(), "host": socket.gethostname(), "skew_s": base.get("skew_s")}
    findings += judge_job(job, cfg, login)
    reached = [facts["internet"].get("reached") for facts in job.facts if isinstance(facts.get("internet"), dict)]
    return findings, replace(site, internet=reached[0] if reached else None) if answered else None


def report(order: Order, findings: Sequence[Finding], kept: Path | None, why_not: str | None) -> None:
    """Print what was found."""
    cfg = order.cfg
    if order.as_json:
        counts = {level: sum(f.level == level for f in findings) for level in MARKS}
        print(json.dumps({
            "version": 1, "cluster": cfg.cluster.name, "output_base": str(order.output_base),
            "site": str(kept) if kept else None, "counts": counts, "findings": [asdict(f) for f in findings],
        }, indent=1))  # fmt: skip
        return
    tty = sys.stdout.isatty()
    columns = os.environ.get("COLUMNS", "")
    width = (
        os.get_terminal_size(sys.stdout.fileno()).columns or 80 if tty else int(columns) if columns.isdecimal() else 80
    )
    for line in lines(findings, max(40, width), tty and "NO_COLOR" not in os.environ):
        print(line)
    print(f"\ncluster={cfg.cluster.name}: {summary(findings)}")
    for level, word in (("problem", "problems"), ("warning", "warnings")):
        if names := [f"{finding.name} ({finding.topic})" for finding in findings if finding.level == level]:
            print("\n".join(_wrapped(f"{word}: {', '.join(names)}", max(40, width))))
    if kept:
        print(f"written where submit uses it: {near(kept)}")
    elif why_not:
        print(f"nothing is written for submit: {why_not}")


class _Progress:
    """What is being done, on stderr: in one line of a terminal, else a line for each new thing."""

    def __init__(self) -> None:
        self.tty, self.last, self.wrote = sys.stderr.isatty(), "", False

    def __call__(self, text: str) -> None:
        if self.tty:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\x1b[2K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
            self.wrote = True
        elif (kind := text.partition(":")[0]) != self.last:
            self.last = kind
            print(kind, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.wrote:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        print(str(__doc__).strip())
        return 0
    progress = _Progress()
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # the job goes, whoever ends this command
        given, settings = parse_arguments(args)
        with contextlib.redirect_stdout(sys.stderr):  # cluster=auto says what it takes
            cfg = select(settings)
        base = Path(cfg.paths.output_base).expanduser().absolute()
        order = Order(cfg, base, not given.no_job, given.wait, given.json)
        try:
            findings, site = examine(order, progress)
        finally:
            progress.clear()
        kept, why_not = None, None
        if site is not None:
            try:
                kept = write(base, cfg.cluster.name, _merged(site, load(place(base, cfg.cluster.name))))
            except OSError as error:
                why_not = f"{error.filename or base}: {error.strerror or error}"
        elif cfg.cluster.scheduler == "slurm":
            why_not = "SLURM did not answer"
        report(order, findings, kept, why_not)
        sys.stdout.flush()
        return 1 if any(finding.level == "problem" for finding in findings) else 0
    except (ConfigError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _merged(site: Site, before: Site) -> Site:
    """What was found now, and of what only a job can see the answer from before where none ran."""
    return replace(site, internet=before.internet) if site.internet is None else site


if __name__ == "__main__":
    sys.exit(main())
