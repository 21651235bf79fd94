"""A real SLURM on one machine: four emulated nodes with eight emulated H100s each.

    python -m launchers.devcluster up|status|down [--dir DIR]

For tests, and for anyone who wants to try the project without a cluster. Everything lives below
one folder (own munge, ports, state, logs), so clusters run side by side, and whoever sets SLURM_CONF
to ``<dir>/slurm.conf`` talks to this one. /proc tells which processes are a cluster's, so stale
pid files and daemons killed from outside do no harm. Needs root, and Debian's packages (``APT``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

VERSION = 1
MARKER = "cluster.json"
MADE_BY = "launchers.devcluster"
NODES = ("n1", "n2", "n3", "n4")
ADDRESS = "127.0.0.1"
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
APT = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
APT_ACCOUNTING = APT + " slurmdbd mariadb-server"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")
PROGRAMS_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")

# Processes of these programs are the cluster's own when they refer to its folder; their children too.
_DAEMONS = frozenset({"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd"})
_NOT_ROOT = "a dev cluster needs root: its daemons run as root and its GPUs are devices made by mknod"
# Without the cluster these would wait for ever. Not salloc: killing it strands the user's shell.
_CLIENTS = frozenset({"srun", "sbatch", "sattach"})
# What sinfo calls a node that answers; the busy ones and those that somebody drained too.
_IN_SERVICE = (
    "idle", "mixed", "allocated", "completing", "planned", "reserved", "maint", "draining", "drained",
)  # fmt: skip
# The longest thing below the folder is a step's socket, spool/n1/n1_<job>.<step>; a Unix socket's path
# holds 107 characters.
_LONGEST_DIR = 107 - len("/spool/n1/n1_4294967295.4294967295.4294967295")
_ENV_PREFIXES = (
    "SLURM_", "SLURMD_", "SLURMCTLD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_",
    "SCONTROL_", "SPRIO_", "SCANCEL_", "SACCTMGR_", "SSHARE_", "MUNGE_",
)  # fmt: skip


class DevClusterError(Exception):
    """What went wrong, for people; ``code`` is the exit status (2: cannot be tried, 1: tried and failed)."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class DaemonStatus:
    """One daemon; ``pid`` is None where it does not run."""

    name: str
    pid: int | None
    alive: bool
    port: int | None


@dataclass(frozen=True)
class NodeStatus:
    """One node as the controller sees it; ``state`` is sinfo's, such as ``idle`` or ``down*``."""

    name: str
    state: str
    gres: str
    reason: str


@dataclass(frozen=True)
class Status:
    """What runs in a folder; ``running`` when every daemon does."""

    dir: Path
    conf: Path
    running: bool
    accounting: bool
    daemons: tuple[DaemonStatus, ...]
    nodes: tuple[NodeStatus, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        data = dataclasses.asdict(self)
        return data | {"dir": str(self.dir), "conf": str(self.conf)}


@dataclass(frozen=True)
class Cluster:
    """One dev cluster: what its configuration depends on, and the hands that stop and start its parts."""

    dir: Path
    ports: Mapping[str, int]
    accounting: bool = False
    nodes: tuple[str, ...] = NODES
    gpus: int = 8
    cpus: int = 96
    memory_mb: int = 1_920_000
    grace_s: int = 20
    kill_wait_s: int = 10
    slurmd_timeout_s: int = 30
    cred_expire_s: int = 5
    kill_over_memory: bool = False

    @property
    def conf(self) -> Path:
        """The slurm.conf to set SLURM_CONF to."""
        return self.dir / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """A whole environment for clients of this cluster: the caller's, without its SLURM settings."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(_ENV_PREFIXES)}
        env["SLURM_CONF"] = str(self.conf)
        env["PATH"] = _path()
        return env

    @property
    def daemons(self) -> tuple[str, ...]:
        """The names of the daemons, in the order in which they start."""
        accounting = ("mariadbd", "slurmdbd") if self.accounting else ()
        return ("munged", *accounting, "slurmctld", *self.nodes)

    def run(self, *argv: str, timeout: float = 60.0, check: bool = True) -> str:
        """Runs a command as a client of this cluster and returns its standard output."""
        try:
            done = subprocess.run(
                argv, env=self.env, capture_output=True, text=True, timeout=timeout, check=False,
                stdin=subprocess.DEVNULL, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DevClusterError(f"{argv[0]} did not answer within {timeout:g} s", code=1) from error
        if check and done.returncode != 0:
            raise DevClusterError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.strip()}", code=1)
        return done.stdout

    def pids(self) -> dict[str, int]:
        """The pids of the daemons that run now, by name."""
        found: dict[str, int] = {}
        for process, program, argv in _processes(self.dir):
            # slurmscriptd is a child of slurmctld with the same program, but not the same command line.
            if program == "slurmd":
                name = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "-N"), "")
            elif program in _DAEMONS - {"slurmstepd"} and Path(argv[0]).name == program:
                name = program
            else:
                continue
            if name in self.daemons:
                found.setdefault(name, process.pid)
        return found

    def node_states(self) -> tuple[NodeStatus, ...]:
        """The nodes as the controller sees them; empty where it does not answer."""
        try:
            lines = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N|%T|%G|%E", timeout=15).splitlines()
        except DevClusterError:
            return ()
        return tuple(NodeStatus(*line.split("|", 3)) for line in lines)

    def wait_nodes(self, *names: str, states: Sequence[str] = ("idle",), timeout: float = 60.0) -> None:
        """Waits until the controller sees these nodes (all by default) in one of these states."""
        wanted = names or self.nodes

        def ready() -> bool:
            seen = {node.name: node.state for node in self.node_states()}
            return all(seen.get(name) in states for name in wanted)

        self._wait(f"nodes {', '.join(wanted)} are not {' or '.join(states)}", ready, timeout, "slurmctld")

    def stop_node(self, name: str, with_jobs: bool = False) -> None:
        """Kills a node's slurmd, as a crash does; with_jobs also what ran on the node, as a power cut does."""
        self._check_node(name)
        found = _processes(self.dir)
        kill = [process for process, _, argv in found if _is_slurmd_of(argv, name)]
        if with_jobs:
            tasks = [process for process, _, _ in found if _environ(process).get("SLURMD_NODENAME") == name]
            # A step's supervisor hides its environment; it is the parent of the step's tasks.
            steps = [process for process, program, _ in found if program == "slurmstepd"]
            kill += [step for step in steps if any(task in _offspring(step) for task in tasks)]
            kill += tasks
        _kill(kill)

    def fail_node(self, name: str) -> None:
        """A power cut, and the controller knows at once: by itself it would notice after SlurmdTimeout.

        A node that is back before that looks healthy, and its dead job RUNNING, for minutes.
        """
        self.stop_node(name, with_jobs=True)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=fail_node")

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd again and waits until the controller has heard from it."""
        self._check_node(name)
        self._start([name])
        self.wait_nodes(name, states=_IN_SERVICE)

    def stop_controller(self) -> None:
        """Stops slurmctld, which saves its state first; jobs go on."""
        pid = self.pids().get("slurmctld")
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self._wait("slurmctld does not stop", lambda: "slurmctld" not in self.pids(), 60, "slurmctld")

    def start_controller(self) -> None:
        """Starts slurmctld on its saved state and waits until it answers."""
        self._start(["slurmctld"])

    def restart_controller(self) -> None:
        """Stops and starts slurmctld."""
        self.stop_controller()
        self.start_controller()

    def _check_node(self, name: str) -> None:
        if name not in self.nodes:
            raise DevClusterError(f"no node {name!r}; the nodes are {', '.join(self.nodes)}")

    def _command(self, name: str) -> list[str]:
        run = self.dir / "run"
        if name == "munged":
            # --force: a folder below /tmp counts as insecure for munged.
            return [
                "munged", "--foreground", "--force", f"--key-file={self.dir}/etc/munge.key",
                f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
                f"--seed-file={run}/munged.seed", f"--log-file={self.dir}/log/munged.log",
            ]  # fmt: skip
        if name == "mariadbd":
            # --user=root: another user could not enter a private folder, and everything here is root's.
            return [
                "mariadbd", "--no-defaults", "--user=root", f"--datadir={self.dir}/db", "--skip-networking",
                f"--socket={run}/db.socket", f"--pid-file={run}/mariadbd.pid", "--skip-log-bin",
                "--innodb-buffer-pool-size=32M", "--innodb-lock-wait-timeout=900",
            ]  # fmt: skip
        if name == "slurmdbd":
            return ["slurmdbd", "-D"]
        if name == "slurmctld":
            # -i: after a power cut the last state file may be torn, and half a state is better than none.
            return ["slurmctld", "-D", "-i", "-f", str(self.conf)]
        return ["slurmd", "-D", "-N", name, "-f", str(self.conf)]

    def _ready(self, name: str, pid: int) -> bool:
        if name in ("munged", "mariadbd"):
            return _connects(self.dir / "run" / ("munge.socket" if name == "munged" else "db.socket"))
        if not _listens(pid, self.ports[name]):
            return False
        # The port opens before the controller can answer.
        return name != "slurmctld" or bool(self.node_states())

    def _start(self, names: Sequence[str]) -> None:
        """Starts those of these daemons that do not run, and waits until they answer."""
        running = self.pids()
        started: dict[str, subprocess.Popen[bytes]] = {}
        for name in names:
            if name not in running:
                if name == "mariadbd" and not (self.dir / "db").exists():
                    self._install_database()
                started[name] = self._spawn(name)
            if name not in self.nodes or name == names[-1]:  # the nodes start at the same time
                for other, process in started.items():
                    ready = partial(self._ready, other, process.pid)
                    self._wait(f"{other} does not answer", ready, 60, other, process)

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        env = self.env | {"MYSQL_UNIX_PORT": f"{self.dir}/run/db.socket"}
        command = self._command(name)
        program = _find(command[0])
        if program is None:
            raise DevClusterError(f"{command[0]} is not installed: {APT_ACCOUNTING}")
        # A session and files of its own: it outlives the caller and holds none of its pipes.
        with (self.dir / "log" / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [program, *command[1:]], env=env, cwd=self.dir / "log", stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True, umask=0o022,
            )  # fmt: skip
        _children.append(process)
        return process

    def _install_database(self) -> None:
        new = self.dir / "db.new"
        shutil.rmtree(new, ignore_errors=True)
        command = [
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={new}",
            "--auth-root-authentication-method=socket", "--skip-test-db",
        ]  # fmt: skip
        self.run(*command, timeout=180)
        new.rename(self.dir / "db")  # whole or not at all

    def _wait(
        self,
        what: str,
        probe: Callable[[], bool],
        timeout: float,
        log: str,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Polls until the probe holds; where the process ends or time is up, tells what its log says."""
        deadline = time.monotonic() + timeout
        while True:
            ended = process.poll() if process is not None else None
            if ended is None and probe():
                return
            if ended is not None or time.monotonic() > deadline:
                why = f"{log} ended with status {ended}" if ended is not None else f"{what} after {timeout:g} s"
                raise DevClusterError(f"{why}; its log ends with:\n{_tail(self.dir, log)}", code=1)
            time.sleep(0.05)

    def _save(self) -> None:
        data = {key: value for key, value in dataclasses.asdict(self).items() if key != "dir"}
        data |= {"made_by": MADE_BY, "version": VERSION, "dir": str(self.dir), "pids": self.pids()}
        new = self.dir / (MARKER + ".new")
        new.write_text(json.dumps(data, indent=2) + "\n")
        new.replace(self.dir / MARKER)


def default_dir() -> Path:
    """The folder that is used where none is named."""
    named = os.environ.get("POST_TRAINING_DEVCLUSTER")
    return Path(named).expanduser() if named else Path.home() / ".local/state/post_training/devcluster"


def render(cluster: Cluster, hostname: str) -> dict[str, str]:
    """The configuration files' texts by name. Pure: the same cluster and host name give the same texts."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    jinja = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    values = {field.name: getattr(cluster, field.name) for field in dataclasses.fields(cluster)}
    names = ["slurm.conf", "gres.conf", *(["slurmdbd.conf"] if cluster.accounting else [])]
    values |= {"hostname": hostname, "address": ADDRESS}
    return {name: jinja.get_template(f"{name}.j2").render(values) for name in names}


def missing_message(accounting: bool = False) -> str | None:
    """Why no cluster can be made here (programs, root), with the remedy; None where one can."""
    missing = [name for name in PROGRAMS + (PROGRAMS_ACCOUNTING if accounting else ()) if _find(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}. Try: {APT_ACCOUNTING if accounting else APT}"
    return None if os.geteuid() == 0 else _NOT_ROOT


def load(dir: str | Path) -> Cluster | None:
    """The cluster of a folder, running or not; None where there is none."""
    folder = _resolve(dir)
    data = _marker(folder)
    if data is None:
        return None
    if data.get("version") != VERSION:
        raise DevClusterError(f"{folder} was made by another version of this program: `down` first")
    fields = {field.name for field in dataclasses.fields(Cluster)}
    values = {key: value for key, value in data.items() if key in fields}
    return Cluster(**(values | {"dir": folder, "nodes": tuple(values["nodes"])}))


def up(dir: str | Path | None = None, accounting: bool = False, **settings: Any) -> Cluster:
    """Brings a cluster up and waits until its nodes are idle. One that is up already is returned as it is.

    settings: numbers of a new cluster other than the defaults, named as Cluster's fields (``grace_s``, ``gpus``, ...).
    Where some or all daemons of a known cluster are gone (killed, machine restarted), starts them on the
    state they left. What fails here is taken down again.
    """
    folder = _resolve(default_dir() if dir is None else dir)
    why = missing_message(accounting)
    if why:
        raise DevClusterError(why)
    existed = folder.exists()
    with _locked(folder, create=True):
        known = load(folder)
        if known is not None:
            return _restart(known, accounting)
        if any(folder.iterdir()):
            raise DevClusterError(f"{folder} holds files that are not a dev cluster's: name another --dir")
        try:
            return _create(folder, accounting, settings)
        except BaseException:
            _kill_all(folder)
            _remove(folder, keep=existed)
            raise


def down(dir: str | Path | None = None) -> bool:
    """Ends every process of a cluster and removes its folder; False where there was none."""
    folder = _resolve(default_dir() if dir is None else dir)
    _need_root()
    with contextlib.suppress(FileNotFoundError), _locked(folder):
        if _marker(folder) is not None:
            _kill_all(folder)
            _remove(folder)
            return True
        if any(folder.iterdir()):
            raise DevClusterError(f"{folder} is not a dev cluster's folder: nothing was removed")
    return _kill_all(folder)  # someone may have removed the folder under a running cluster


def status(dir: str | Path | None = None) -> Status:
    """What runs now of the cluster in a folder."""
    folder = _resolve(default_dir() if dir is None else dir)
    cluster = load(folder)
    if cluster is None:
        return Status(folder, folder / "slurm.conf", False, False, (), ())
    _need_root()
    pids = cluster.pids()
    daemons = tuple(
        DaemonStatus(name, pids.get(name), name in pids, cluster.ports.get(name)) for name in cluster.daemons
    )
    nodes = cluster.node_states() if "slurmctld" in pids and "munged" in pids else ()
    running = all(daemon.alive for daemon in daemons)
    return Status(folder, cluster.conf, running, cluster.accounting, daemons, nodes)


def _create(folder: Path, accounting: bool, settings: Mapping[str, Any]) -> Cluster:
    _kill_all(folder)  # daemons whose folder was removed under them
    cluster = dataclasses.replace(Cluster(folder, {}, accounting=accounting), **settings)
    cluster = dataclasses.replace(cluster, ports=_free_ports(cluster))
    cluster._save()  # first of all: from here on `down` knows the folder
    return _bring_up(cluster)


def _restart(cluster: Cluster, accounting: bool) -> Cluster:
    if accounting and not cluster.accounting:
        raise DevClusterError(f"the cluster in {cluster.dir} has no accounting: `down` first")
    running = cluster.pids()
    if set(running) == set(cluster.daemons):
        return cluster
    before = {process.pid for process, _, _ in _processes(cluster.dir)}
    if not running and not all(_is_free(port) for port in cluster.ports.values()):
        cluster = dataclasses.replace(cluster, ports=_free_ports(cluster))
        cluster._save()
    try:
        return _bring_up(cluster)
    except BaseException:
        _kill([process for process, _, _ in _processes(cluster.dir) if process.pid not in before])
        raise


def _bring_up(cluster: Cluster) -> Cluster:
    # Each step does what is not done yet: an earlier `up` may have been killed at any point.
    for name in ("etc", "run", "log", "state", "dev", *(f"spool/{node}" for node in cluster.nodes)):
        (cluster.dir / name).mkdir(parents=True, exist_ok=True)
    key = cluster.dir / "etc/munge.key"
    if not key.exists() or key.stat().st_size == 0:
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    _make_devices(cluster)
    for name, text in render(cluster, socket.gethostname()).items():
        path = cluster.dir / name
        if name == "slurmdbd.conf":
            path.touch(mode=0o600)  # slurmdbd refuses a readable one
        path.write_text(text)
    cluster._start(cluster.daemons)
    # A restarted cluster may have jobs on its nodes, or nodes that someone drained.
    cluster.wait_nodes(states=_IN_SERVICE)
    cluster._save()
    return cluster


def _make_devices(cluster: Cluster) -> None:
    for node in cluster.nodes:
        for index in range(cluster.gpus):
            path = cluster.dir / "dev" / f"{node}-nvidia{index}"
            try:
                # Another name for /dev/null, which is what an emulated GPU is.
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
            except FileExistsError:
                continue
            except OSError as error:
                raise DevClusterError(f"mknod {path}: {error.strerror}: this machine makes no devices") from error


def _free_ports(cluster: Cluster) -> dict[str, int]:
    """A free port for each daemon that listens, below the range from which the kernel gives ports out."""
    names = [name for name in cluster.daemons if name not in ("munged", "mariadbd")]
    candidates = random.SystemRandom().sample(range(20000, 32000), 2000)
    free = (port for port in candidates if _is_free(port))
    return dict(zip(names, free, strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _listens(pid: int, port: int) -> bool:
    import psutil

    # Looked up rather than tried: each probing connection would leave an error in the daemon's log.
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _path() -> str:
    # An ordinary user's PATH, and root's after `su`, lack the folders of the daemons.
    return os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"


def _find(program: str) -> str | None:
    return shutil.which(program, path=_path())


def _resolve(dir: str | Path) -> Path:
    folder = Path(dir).expanduser().resolve()
    if not re.fullmatch(r"[A-Za-z0-9._/+@-]+", str(folder)):
        raise DevClusterError(f"{folder}: slurm.conf takes no blanks or special characters in a path")
    if len(str(folder)) > _LONGEST_DIR:
        raise DevClusterError(f"{folder}: sockets lie below it, so at most {_LONGEST_DIR} characters, please")
    if folder.exists() and not folder.is_dir():
        raise DevClusterError(f"{folder} is not a folder")
    return folder


def _marker(folder: Path) -> dict[str, Any] | None:
    """The marker's content; None where the folder is not one that this program made."""
    try:
        data = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    # A copied folder is not ours to remove.
    ours = isinstance(data, dict) and data.get("made_by") == MADE_BY and data.get("dir") == str(folder)
    return data if ours else None


def _remove(folder: Path, keep: bool = False) -> None:
    """Removes what the folder holds, and the folder unless it is to be kept."""
    for path in folder.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    # The marker goes last: until then `down` can be tried again.
    (folder / MARKER).unlink(missing_ok=True)
    if not keep:
        folder.rmdir()


def _need_root() -> None:
    if os.geteuid() != 0:
        raise DevClusterError(_NOT_ROOT)


@contextlib.contextmanager
def _locked(folder: Path, create: bool = False, timeout: float = 120.0) -> Iterator[None]:
    """One `up` or `down` at a time: a lock on the folder itself, which leaves no file behind."""
    deadline = time.monotonic() + timeout
    while True:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino:
                    yield
                    return
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            raise DevClusterError(f"another `up` or `down` holds {folder}", code=1)
        time.sleep(0.05)


# Daemons are children of the process that started them: kept here so that they can be reaped.
_children: list[subprocess.Popen[bytes]] = []


def _program(process: psutil.Process) -> str:
    # Debian's slurmd is an alternative, so that its process is called slurmd-wlm.
    return Path(process.exe().removesuffix(" (deleted)")).name.removesuffix("-wlm")


def _environ(process: psutil.Process) -> dict[str, str]:
    import psutil

    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _offspring(process: psutil.Process) -> list[psutil.Process]:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _is_slurmd_of(argv: Sequence[str], node: str) -> bool:
    return bool(argv) and Path(argv[0]).name == "slurmd" and "-N" in argv and argv[argv.index("-N") + 1] == node


def _belongs(process: psutil.Process, program: str, argv: Sequence[str], folder: Path) -> bool:
    inside = f"{folder}/"
    env = _environ(process)
    ours = env.get("SLURM_CONF") == f"{folder}/slurm.conf"
    if program in _CLIENTS:
        return ours
    if program not in _DAEMONS:
        # SLURM_CONF alone is not enough: users export it in the shell from which they start their editor.
        return ours and "SLURMD_NODENAME" in env
    if ours or any(inside in arg for arg in argv):
        return True
    # slurmstepd and slurmscriptd overwrite their command line and environment with a title.
    return f"{process.cwd()}/".startswith(inside) or any(f.path.startswith(inside) for f in process.open_files())


def _processes(folder: Path) -> list[tuple[psutil.Process, str, list[str]]]:
    """The cluster's daemons, steps and jobs' processes, with program and argv: daemons first."""
    import psutil

    for started in _children:
        started.poll()
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    found: dict[int, tuple[psutil.Process, str, list[str]]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            program, argv = _program(process), process.cmdline()
            if process.pid not in spared and _belongs(process, program, argv, folder):
                found[process.pid] = (process, program, argv)
    for process, program, _ in list(found.values()):
        if program not in _CLIENTS:
            for child in _offspring(process):
                if child.pid not in found and child.pid not in spared:
                    with contextlib.suppress(psutil.Error, OSError):
                        found[child.pid] = (child, _program(child), child.cmdline())
    return sorted(found.values(), key=lambda item: (item[1] not in _DAEMONS, item[0].pid))


def _kill(processes: Sequence[psutil.Process], timeout: float = 30.0) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + timeout
    while any(_lives(process) for process in processes):
        if time.monotonic() > deadline:
            raise DevClusterError(f"processes survive SIGKILL: {[p.pid for p in processes if _lives(p)]}", code=1)
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    import psutil

    for started in _children:
        started.poll()
    try:
        # A zombie is dead; whether its parent collects it is not ours to wait for.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill_all(folder: Path) -> bool:
    """Kills until nothing is left, since what is killed may just have started something."""
    any_found = False
    while found := [process for process, _, _ in _processes(folder)]:
        any_found = True
        _kill(found)
    return any_found


def _tail(folder: Path, name: str, lines: int = 15) -> str:
    # What a daemon logs goes to its standard error as well, here only since its last start.
    with contextlib.suppress(OSError):
        text = (folder / "log" / f"{name}.out").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in text[-lines:]) or "  (nothing)"
    return "  (no log)"


def _show(seen: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    daemons, nodes = Table("daemon", "pid", "alive", "port"), Table("node", "state", "GPUs", "reason")
    for daemon in seen.daemons:
        alive = "yes" if daemon.alive else "[red]no[/]"
        daemons.add_row(daemon.name, str(daemon.pid or "-"), alive, str(daemon.port or "-"))
    for node in seen.nodes:
        nodes.add_row(node.name, node.state, node.gres, "" if node.reason == "none" else node.reason)
    console.print(daemons)
    console.print(nodes if seen.nodes else "The controller does not answer.")
    # Plain: to be copied, or evaluated.
    print(f"export SLURM_CONF={seen.conf}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.devcluster",
        description="A real SLURM on this machine: 4 emulated nodes, 8 emulated H100s each. Needs root.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|status|down")
    parsers = {
        "up": commands.add_parser("up", help="bring the cluster up, or what is missing of it"),
        "status": commands.add_parser("status", help="show daemons and nodes; exit status 1 unless all run"),
        "down": commands.add_parser("down", help="end every process of the cluster and remove its folder"),
    }
    folder_help = "the cluster's folder (default: $POST_TRAINING_DEVCLUSTER, else %(default)s)"
    for sub in parsers.values():
        sub.add_argument("--dir", type=Path, default=default_dir(), metavar="DIR", help=folder_help)
    for name in ("up", "status"):
        parsers[name].add_argument("--json", action="store_true", help="print JSON")
    parsers["up"].add_argument(
        "--accounting",
        action="store_true",
        help="with slurmdbd and MariaDB, for sacct (needs their packages)",
    )
    return parser


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # so that a terminated `up` cleans up


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "down":
            print(f"{args.dir}: gone" if down(args.dir) else f"{args.dir}: no dev cluster")
            return 0
        if args.command == "up":
            signal.signal(signal.SIGTERM, _terminate)
            if status(args.dir).running and not args.json:
                print("already running")
            up(args.dir, accounting=args.accounting)
        seen = status(args.dir)
        if args.json:
            print(json.dumps(seen.as_json(), indent=2))
        elif seen.daemons:
            _show(seen)
        else:
            print(f"{seen.dir}: no dev cluster; `up` makes one")
        return 0 if seen.running else 1
    except DevClusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
