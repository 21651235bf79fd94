"""The hands of a drill: each kind of fault, done from outside to real processes of a dev cluster.

A fault is a context manager. Entered, it waits for its moment and strikes; while its body runs the drill waits for
the run to recover; left, it tidies up what would not tidy itself up (a node comes back, a time limit is restored).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from launchers import devcluster as dc
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise
from tests.drill.plan import Fault, Stage

T = TypeVar("T")
WALL_MINUTES = 60
FILLER = ".drill-filler"


class Missed(Exception):
    """The run was done before the fault found its moment."""


class Gone(Exception):
    """The attempt that was to be struck has ended meanwhile: another one may come."""


class Stopped(Exception):
    """The drill ends."""


class View:
    """One run as everybody sees it: its directory. Reads only."""

    def __init__(self, run: RunDirectory, stage: Stage) -> None:
        self.run, self.stage = run, stage

    @property
    def history(self) -> History:
        return summarise(ledger.read(self.run.ledger))

    @property
    def done(self) -> bool:
        return manifest.problem(self.run.model) is None

    def step(self) -> int:
        """The newest step in metrics.jsonl; 0 where there is none."""
        with contextlib.suppress(OSError), self.run.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            for line in reversed(file.read().split(b"\n")[:-1]):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return int(json.loads(line)["step"])
        return 0

    def saving(self, attempt: int) -> bool:
        """Whether this attempt is writing a checkpoint: its folder is there, and not yet among the whole ones."""
        with contextlib.suppress(OSError):
            return any(entry.name.startswith("checkpoint-") for entry in os.scandir(self.run.staging(attempt)))
        return False

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, whole or not."""
        found = [p for p in self.run.checkpoints.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


class Target:
    """What one fault strikes: a run's newest attempt, its processes and nodes."""

    def __init__(self, cluster: dc.Cluster, view: View, fault: Fault, ends: threading.Event) -> None:
        self.cluster, self.view, self.fault, self.ends = cluster, view, fault, ends
        self.attempt = 0

    # -- the moment

    def approach(self) -> None:
        """Wait until the run is where the fault wants it. Raises Missed where it is done before."""
        wanted = max(1, round(self.fault.at * self.view.stage.steps))
        while True:
            self._check(0.02)
            history = self.view.history
            if not history.running or history.stopping:
                continue
            self.attempt = history.attempts
            if self.fault.moment == "startup":
                self._sleep(6 * self.fault.delay)
                return
            if history.training and self.view.step() >= wanted:
                return

    def moment(self) -> None:
        """Wait for the very moment, when all is prepared. Raises Gone where the attempt ended meanwhile."""
        if self.fault.moment == "step":
            self._sleep(0.5 * self.fault.delay)
        elif self.fault.moment == "save":
            looks = 0
            while not self.view.saving(self.attempt):  # a save takes a few hundredths of a second
                looks += 1
                time.sleep(0.003)
                if looks % 50 == 0:
                    self.check_alive()

    def check_alive(self) -> None:
        """Raises Gone unless the attempt still runs."""
        self._check()
        history = self.view.history
        if not history.running or history.attempts != self.attempt:
            raise Gone

    def _check(self, pause: float = 0.0) -> None:
        if self.ends.wait(pause):
            raise Stopped
        if self.view.done:
            raise Missed

    def _sleep(self, seconds: float) -> None:
        if self.ends.wait(seconds):
            raise Stopped

    # -- what there is to strike

    @property
    def job_id(self) -> str:
        job_id = self.view.history.job_id
        assert job_id is not None
        return job_id

    def slurm(self, *argv: str) -> str:
        """A SLURM command, tried again while the controller is away."""
        for _ in range(4):
            with contextlib.suppress(dc.DevClusterError):
                return self.cluster.run(*argv, timeout=20)
            self._sleep(2)
        return self.cluster.run(*argv, timeout=20)

    def nodes(self) -> list[str]:
        """The job's nodes, the batch shell's first. Raises Gone where it has none."""
        names = self.slurm("squeue", "-h", "-t", "R", "-j", self.job_id, "-o", "%N").strip()
        if not names:
            raise Gone
        return self.slurm("scontrol", "show", "hostnames", names).split()

    def processes(self, wanted: Callable[[psutil.Process, dict[str, str]], bool]) -> list[psutil.Process]:
        """The job's processes that are wanted, oldest first; waits for one. Raises Gone where the attempt ends."""
        job_id = self.job_id
        for _ in range(100):
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    env = process.environ()
                    mine = env.get("SLURM_CONF") == str(self.cluster.conf) and env.get("SLURM_JOB_ID") == job_id
                    if mine and wanted(process, env):
                        found.append(process)
            if found:
                return sorted(found, key=lambda process: process.create_time())
            self.check_alive()
            self._sleep(0.1)
        raise Gone

    def ranks(self) -> list[psutil.Process]:
        """The attempt's training processes, rank 0 first."""
        number = str(self.attempt)
        ranks = []
        for process in self.processes(lambda p, env: env.get("POST_TRAINING_ATTEMPT") == number and _is_training(p)):
            parent = process.parent()
            if parent is None or not _is_training(parent):  # a DataLoader worker has its rank's command line
                ranks.append(process)
        return sorted(ranks, key=lambda process: int(process.environ().get("SLURM_PROCID", 0)))

    def one(self, items: list[T]) -> T:
        """The one that the plan's number means."""
        return items[min(int(self.fault.victim * len(items)), len(items) - 1)]


def _is_training(process: psutil.Process) -> bool:
    return process.cmdline()[1:3] == ["-m", "post_training.train"]


def _starts_training(process: psutil.Process) -> bool:
    argv = process.cmdline()
    return argv[:1] == ["srun"] and "post_training.train" in argv


def _is_guard(process: psutil.Process) -> bool:
    argv = process.cmdline()
    return bool(argv) and Path(argv[0]).name == "bash" and any("run.life guard" in arg for arg in argv)


def _is_script(process: psutil.Process | None) -> bool:
    return process is not None and any(Path(arg).name == "slurm_script" for arg in process.cmdline())


def _name(process: psutil.Process) -> str:
    rank = process.environ().get("SLURM_PROCID", "?")
    return f"rank {rank} (pid {process.pid})"


def _strike(target: Target, victims: list[psutil.Process], number: signal.Signals) -> None:
    target.moment()
    try:
        for victim in victims:
            victim.send_signal(number)
    except psutil.NoSuchProcess:
        raise Gone from None


# --------------------------------------------------------------------------------------------- the kinds


@contextlib.contextmanager
def stop(target: Target) -> Iterator[str]:
    target.moment()
    target.slurm("scancel", "--batch", "--signal=USR1", target.job_id)
    yield "USR1 to the batch shell"


@contextlib.contextmanager
def wall_time(target: Target) -> Iterator[str]:
    job_id = target.job_id
    elapsed = _seconds(target.slurm("squeue", "-h", "-j", job_id, "-o", "%M").strip())
    # whole minutes; not so near that SLURM kills before it warns
    minutes = int(elapsed + 25) // 60 + 1
    target.slurm("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
    try:
        while target.view.history.running and target.view.history.attempts == target.attempt:
            target._sleep(0.2)
    finally:  # the next attempt has its time again
        with contextlib.suppress(dc.DevClusterError):
            target.slurm("scontrol", "update", f"JobId={job_id}", f"TimeLimit={WALL_MINUTES}")
    yield f"TimeLimit={minutes} min after {elapsed:.0f} s"


def _seconds(text: str) -> float:
    seconds = 0
    for part in text.replace("-", ":").split(":"):
        seconds = seconds * 60 + int(part or 0)
    return float(seconds)


@contextlib.contextmanager
def preempt(target: Target) -> Iterator[str]:
    node = target.one(target.nodes())
    target.moment()
    options = ("--parsable", "-p", "high", "-w", node, "--gpus-per-node=1", "--mem=1", "-t", "2", "-o", "/dev/null")
    other = target.slurm("sbatch", *options, "--wrap", "sleep 1").strip()
    yield f"job {other} in high wants {node}"


@contextlib.contextmanager
def node_death(target: Target) -> Iterator[str]:
    node = target.one(target.nodes())
    target.moment()
    target.cluster.stop_node(node)
    try:
        yield f"slurmd of {node} killed, its processes live on"
    finally:
        target.cluster.start_node(node)


@contextlib.contextmanager
def power_cut(target: Target) -> Iterator[str]:
    node = target.one(target.nodes())
    target.moment()
    target.cluster.fail_node(node)
    try:
        yield f"{node} and all on it gone"
    finally:
        target.cluster.start_node(node)


@contextlib.contextmanager
def kill_rank(target: Target) -> Iterator[str]:
    victim = target.one(target.ranks())
    name = _name(victim)
    _strike(target, [victim], signal.SIGKILL)
    yield f"{name} killed"


@contextlib.contextmanager
def kill_worker(target: Target) -> Iterator[str]:
    rank = target.one(target.ranks())
    workers = [child for child in rank.children() if _is_training(child)]
    if not workers:
        raise Gone
    victim = target.one(workers)
    _strike(target, [victim], signal.SIGKILL)
    yield f"a worker (pid {victim.pid}) of {_name(rank)} killed"


@contextlib.contextmanager
def kill_srun(target: Target) -> Iterator[str]:
    number = str(target.attempt)
    found = target.processes(lambda p, env: env.get("POST_TRAINING_ATTEMPT") == number and _starts_training(p))
    _strike(target, found[:1], signal.SIGKILL)  # its child, which passes signals on, ends with it
    yield f"srun (pid {found[0].pid}) killed"


@contextlib.contextmanager
def kill_shell(target: Target) -> Iterator[str]:
    # until its guard is up, in a job's first second or two, nobody could requeue it
    number = str(target.attempt)
    target.processes(lambda p, env: env.get("POST_TRAINING_ATTEMPT") == number and _is_guard(p))
    # not the script's own background processes, nor an earlier attempt's shell on a node that was given up
    shell = target.processes(lambda p, env: _is_script(p) and not _is_script(p.parent()))[-1]
    _strike(target, [shell], signal.SIGKILL)
    yield f"batch shell (pid {shell.pid}) killed"


@contextlib.contextmanager
def controller(target: Target) -> Iterator[str]:
    target.moment()
    target.cluster.restart_controller()
    yield "slurmctld restarted"


@contextlib.contextmanager
def truncate(target: Target) -> Iterator[str]:
    victims = target.ranks()
    folder = target.view.newest_checkpoint()
    while folder is None or manifest.problem(folder) is not None:
        target.check_alive()
        time.sleep(0.05)
        folder = target.view.newest_checkpoint()
    # stopped first: else the next save may come between the two blows
    for victim in victims:
        victim.send_signal(signal.SIGSTOP)
    folder = target.view.newest_checkpoint()
    assert folder is not None
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    size = largest.stat().st_size
    os.truncate(largest, int(size * target.fault.delay))
    for victim in victims:
        victim.kill()
    yield f"{folder.name}/{largest.name} cut from {size} to {int(size * target.fault.delay)} bytes, ranks killed"


@contextlib.contextmanager
def full_disk(target: Target) -> Iterator[str]:
    ranks = target.ranks()
    filler = target.view.run.root / FILLER
    left = int(target.fault.victim * 512 * 1024)
    target.moment()
    try:
        with filler.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, max(0, file.tell() - left))
        gone, alive = psutil.wait_procs(ranks, timeout=90)
        target._sleep(3 * target.fault.delay)
        what = "no rank" if not gone else "every rank" if not alive else "some ranks"
    finally:
        filler.unlink(missing_ok=True)
    yield f"disk full but for {left // 1024} KiB until {what} had ended"


@contextlib.contextmanager
def hang_rank(target: Target) -> Iterator[str]:
    victim = target.one(target.ranks())
    name = _name(victim)
    _strike(target, [victim], signal.SIGSTOP)
    yield f"{name} stopped"


@contextlib.contextmanager
def hang_all(target: Target) -> Iterator[str]:
    ranks = target.ranks()
    _strike(target, ranks, signal.SIGSTOP)
    yield f"all {len(ranks)} ranks stopped"


HANDS: dict[str, Callable[[Target], contextlib.AbstractContextManager[str]]] = {
    hand.__name__: hand
    for hand in (
        stop, wall_time, preempt, node_death, power_cut, kill_rank, kill_worker, kill_srun, kill_shell, controller,
        truncate, full_disk, hang_rank, hang_all,
    )
}  # fmt: skip
OF_THE_CLUSTER = frozenset({"preempt", "node_death", "power_cut", "controller"})
"""Faults that strike more than one run's processes: one of them at a time."""
