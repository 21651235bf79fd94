"""The local supervisor: runs the job scripts that SLURM would run, on this machine.

Each job is `bash slurm/job.sh` in a process group of its own. Wall time and SIGUSR1 come as SLURM sends them,
a script that ends with `life.REQUEUE` is started again under the same id, and a failed run takes its dependents
with it while the other branches go on.

Two supervisors never run one run directory: whoever runs it holds a lock on `slurm/.supervisor.lock`. The job
inherits the lock's descriptor, so the lock lives as long as any process of the job, also after the supervisor
was killed; the next supervisor finds such a job and waits for its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import graphlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import gate_fix
from launchers.table import read_history, tail
from post_training.run import ledger, life, manifest, notify
from post_training.run.directory import ATTEMPT_MARK, RunDirectory
from post_training.run.history import History

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

GRACE_SECONDS = 10
"""Between SIGTERM at the wall time and SIGKILL."""
TICK_SECONDS = 0.5
"""Between looks where no signal wakes the supervisor: the display, and locks held by others."""
DEBOUNCE_SECONDS = 0.5
"""A second Ctrl-C this soon is the first one, passed on by a wrapper."""
STOPPED_BY_USER = "stopped by the user"
VANISHED = "its job and its supervisor were gone: killed, or the machine restarted"


@dataclass(frozen=True)
class LocalRun:
    """One run to be supervised; its script is `run.script`."""

    run: RunDirectory
    after: tuple[str, ...]  # names of other runs in the list that must be done first
    cpus: int  # cores that it fills
    wall_time: int  # seconds of one attempt
    signal_time: int  # seconds before the wall time at which it is asked to save and leave


def lock_path(run: RunDirectory) -> Path:
    """Locked (flock) while a supervisor or a process of the job owns the run."""
    return run.slurm / ".supervisor.lock"


def owned(run: RunDirectory) -> bool:
    """Whether a supervisor or a process of the job has this run, without disturbing them."""
    try:
        descriptor = os.open(lock_path(run), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@dataclass
class _Job:
    """A run under supervision."""

    spec: LocalRun
    chain: int  # runs that wait for it, one after the other: the longest chain starts first
    cpus: int
    job_id: str = ""
    state: str = "new"  # new, elsewhere, queued, running, then done, gated, failed, cancelled or stopped
    reason: str = ""
    root_cause: str = ""  # the failed run that took this one with it, and why
    lock: int | None = None
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None  # of the batch shell, which leads its process group
    started: float = 0.0  # monotonic, as is first_started
    started_epoch: float = 0.0
    first_started: float | None = None
    asked: bool = False
    terminated: bool = False
    killed: bool = False
    seconds: float = 0.0
    metrics: tuple[tuple[int, int] | None, Any] = field(default=(None, None))

    @property
    def name(self) -> str:
        return self.spec.run.name

    @property
    def ended(self) -> bool:
        return self.state in ("done", "gated", "failed", "cancelled", "stopped")

    @property
    def busy(self) -> bool:
        return self.pid is not None

    def history(self) -> History:
        return read_history(self.spec.run).history


def _take_lock(run: RunDirectory) -> int | None:
    """The locked descriptor, or None where somebody else has it."""
    run.slurm.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_path(run), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for patience in (0.02, 0.02, 0.0):  # `owned` holds it for a moment
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(patience)
        else:
            os.ftruncate(descriptor, 0)
            return descriptor
    os.close(descriptor)
    return None


def _orphan(run: RunDirectory) -> tuple[int, float] | None:
    """Batch shell and start (seconds since the epoch) of a job whose supervisor is gone."""
    import psutil

    try:
        owner = json.loads(lock_path(run).read_text())
        pid, supervisor, started = int(owner["pid"]), int(owner["supervisor"]), float(owner["started"])
        try:
            shell = psutil.Process(pid)
            if shell.ppid() == supervisor or abs(shell.create_time() - started) > 5:
                return None
        except psutil.NoSuchProcess:
            if not psutil.pid_exists(supervisor):
                _signal_group(pid, signal.SIGTERM)  # ranks without their script: nobody will record their end
            return None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return pid, started


def shell_of(run: RunDirectory) -> int | None:
    """The process of the batch shell that runs this run on this machine; None where there is none."""
    import psutil

    if not owned(run):
        return None
    try:
        owner = json.loads(lock_path(run).read_text())
        shell = psutil.Process(int(owner["pid"]))
        return shell.pid if abs(shell.create_time() - float(owner["started"])) <= 5 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _next_number(runs: list[LocalRun]) -> int:
    """One more than the highest local job id in the pipelines of these runs."""
    highest = 0
    for folder in {spec.run.root.parent for spec in runs}:
        for path in folder.glob("*/ledger.jsonl"):
            for event in ledger.read(path):
                match = re.fullmatch(r"local-(\d{1,9})", str(event.get("job_id")))
                highest = max(highest, int(match[1]) if match else 0)
    return highest + 1


def _chains(runs: list[LocalRun]) -> dict[str, int]:
    """The length of the longest chain of dependents of each run. Raises CycleError on a cycle."""
    names = {spec.run.name for spec in runs}
    graph = {spec.run.name: [n for n in spec.after if n in names] for spec in runs}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    chains = dict.fromkeys(order, 0)
    for name in reversed(order):
        for parent in graph[name]:
            chains[parent] = max(chains[parent], chains[name] + 1)
    return chains


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _same_command() -> str:
    """The command line of this process, as one types it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    head = ["python", "-m", spec.name] if spec is not None and spec.name else ["python", sys.argv[0]]
    return shlex.join([*head, *sys.argv[1:]])


def _ending_text(code: int, job: _Job) -> str:
    """Why a job script ended that recorded no end of its own."""
    if code < 0 and job.terminated:
        return f"killed at the wall time of {job.spec.wall_time} s"
    if code < 0:
        return f"the job script was killed by {signal.Signals(-code).name}"
    said = (line.strip() for line in reversed(tail(job.spec.run.stderr(job.job_id))))
    last = next((line for line in said if line and not ATTEMPT_MARK.match(line)), "")
    return f"the job script ended with status {code}" + (f": {last[:300]}" if last else "")


class Wakeup:
    """Wakes the supervisor when a child ends or a stop is wanted. Handlers only note the signal."""

    STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.stops: list[float] = []

    def __enter__(self) -> Wakeup:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old: dict[signal.Signals, Any] = {}
        for number in (*self.STOP, signal.SIGCHLD):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, frame: object) -> None:
        if number in self.STOP:
            self.stops.append(time.monotonic())

    def wait(self, seconds: float | None) -> None:
        select.select([self._read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 512):
                pass


class _Screen:
    """What the supervisor shows: a live table on a terminal, a line an event elsewhere."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.live: Live | None = None

    def open(self) -> None:
        if self.progress and sys.stdout.isatty():
            from rich.live import Live

            # no thread of its own: it draws when the supervisor looks
            self.live = Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.live.start()

    def close(self) -> None:
        if self.live is not None:
            with contextlib.suppress(OSError):
                self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        try:
            if self.live is not None:
                from rich.text import Text

                self.live.console.print(Text(text))  # options here would reach the table too
            elif self.progress:
                print(text, flush=True)
        except OSError:  # the terminal or the pipe is gone: the jobs go on
            self.live, self.progress = None, False

    def draw(self, jobs: list[_Job], now: float) -> None:
        if self.live is None:
            return
        console = self.live.console
        try:
            self.live.update(self.table(jobs, now, console.width, console.encoding), refresh=True)
        except OSError:
            self.live, self.progress = None, False

    def table(self, jobs: list[_Job], now: float, width: int, encoding: str = "utf-8") -> Table:
        from rich.table import Table
        from rich.text import Text

        from launchers import table

        grid = Table(box=None, pad_edge=False)
        for title in ("stage", "state", "progress", "", "elapsed", "eta"):
            grid.add_column(title, no_wrap=True, justify="right" if title in ("elapsed", "eta") else "left")
        wide = width >= 72
        for job in jobs:
            metrics = self._metrics(job)
            shown = job.state
            if job.state == "running" and job.asked:
                shown = "stopping"
            if job.state == "queued":
                shown = "waiting" if job.reason else "queued"
            step = metrics.step if job.first_started is not None or job.state == "done" else None
            done = "" if step is None else f"{step}/{metrics.max_steps or '?'}"
            picture = table.bar(step, metrics.max_steps, 16 if wide else 8, "utf" not in encoding.lower())
            elapsed = now - job.first_started if job.busy and job.first_started else job.seconds
            eta = metrics.eta_seconds if job.busy and step else None
            grid.add_row(
                job.name, Text(shown, table.STYLES.get(shown, "yellow")), f"{picture} {done}".strip(),
                table.loss_or_reward(metrics.loss, metrics.reward) if step is not None else "",
                table.duration(elapsed) if elapsed else "", table.duration(eta),
            )  # fmt: skip
        return grid

    @staticmethod
    def _metrics(job: _Job) -> Any:
        from launchers import table

        try:
            stat = job.spec.run.metrics.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            return table.Metrics()
        if job.metrics[0] != stamp:
            job.metrics = (stamp, table.read_metrics(job.spec.run.metrics))
        return job.metrics[1]


class _Supervisor:
    def __init__(self, runs: list[LocalRun], capacity: int, progress: bool) -> None:
        chains = _chains(runs)
        self.capacity = max(1, capacity)
        self.jobs = [_Job(s, chains[s.run.name], min(max(1, s.cpus), self.capacity)) for s in runs]
        self.by_name = {job.name: job for job in self.jobs}
        self.screen = _Screen(progress)
        self.next_number = _next_number(runs)
        self.stopping_since: float | None = None
        self.stops_seen = 0

    # ------------------------------------------------------------------------------------ the loop

    def run(self) -> int:
        with Wakeup() as self.wakeup:  # to the end: an impatient third Ctrl-C must not cut the report short
            try:
                self.screen.open()
                self.screen.say(f"{len(self.jobs)} stages on this machine, {self.capacity} cores")
                while True:
                    self.look()
                    if all(job.ended for job in self.jobs):
                        break
                    self.wakeup.wait(self.patience())
                self.screen.draw(self.jobs, time.monotonic())
            finally:
                for job in self.jobs:  # empty unless something unforeseen happened
                    if job.process is not None and job.pid is not None:
                        _signal_group(job.pid, signal.SIGKILL)
                        job.process.wait()
                    self.release(job)
                self.screen.close()
            with contextlib.suppress(OSError):
                self.report()
        return self.exit_code()

    def look(self) -> None:
        """One look at everything: what ended, what is due, what may start."""
        for job in self.jobs:
            if job.process is not None and self.has_ended(job):
                self.finish(job)
            elif job.state in ("new", "elsewhere") or (job.state == "queued" and job.lock is None):
                self.take_up(job)
        self.heed_stops()
        self.watch_the_clock()
        self.cancel_dependents()
        self.start_ready()
        self.screen.draw(self.jobs, time.monotonic())

    def patience(self) -> float | None:
        """Seconds until something is due; None where only a signal can bring news."""
        due = [TICK_SECONDS] if self.screen.live is not None else []
        if any(job.lock is None and not job.ended for job in self.jobs):
            due.append(TICK_SECONDS)
        now = time.monotonic()
        for job in self.jobs:
            if job.busy and not job.killed:
                due.append(max(0.0, job.started + self.deadline(job) - now))
        return min(due, default=None)

    @staticmethod
    def deadline(job: _Job) -> float:
        """Seconds after its start at which the job gets its next signal."""
        if not job.asked:
            return job.spec.wall_time - job.spec.signal_time
        return job.spec.wall_time + (GRACE_SECONDS if job.terminated else 0)

    # ------------------------------------------------------------------------------ taking runs up

    def take_up(self, job: _Job) -> None:
        """Own the run: lock it, see what it is in, and queue it if it is not done."""
        run, came_from = job.spec.run, job.state
        job.lock = _take_lock(run)
        if job.lock is None:
            self.wait_for_other(job)
            return
        if came_from == "queued":
            return  # a requeue: the last process of the attempt before has gone
        job.pid = None
        history = job.history()
        job.job_id = history.job_id or ""
        if manifest.problem(run.model) is None:
            if (why := life.held_back(run)) is not None:
                self.gated(job, f"gate: {why}")
            elif came_from == "elsewhere":
                self.screen.say(f"{job.name}: done")
            else:
                self.screen.say(f"{job.name}: already done")
            if not job.ended:
                self.settle(job, "done")
            return
        if history.running:
            # neither finished nor crashed by itself, as far as anyone can tell: not counted as a failure
            outcome = "stopped" if history.stop_signal == "TERM" else "node_lost"
            self.close(history, run, 137, life.Ending(outcome, "requeue", reason=VANISHED))
        elif came_from == "elsewhere" and history.gave_up:
            self.fail(job, history.reason or "failed")
            return
        if self.stopping_since is not None:
            self.stop_queued(job)
            return
        job.state = "queued"
        self.name_and_submit(job, history)

    def wait_for_other(self, job: _Job) -> None:
        """Somebody else has this run: its old job, whose supervisor was killed, or another supervisor."""
        if job.state == "queued":
            return
        orphan = _orphan(job.spec.run) if job.pid is None else None
        if orphan is not None:
            job.pid, started = orphan
            job.started = time.monotonic() - max(0.0, time.time() - started)
            job.first_started = job.started
            job.job_id = job.history().job_id or ""
        if job.state == "new":
            job.state = "elsewhere"
            whose = (
                f"its job of an earlier supervisor still runs (process {job.pid})"
                if orphan
                else "another supervisor or a process of an earlier job has it"
            )
            self.screen.say(f"{job.name}: {whose}: waiting for it")

    def name_and_submit(self, job: _Job, history: History) -> None:
        if history.cluster == "local" and history.job_id:
            job.job_id = history.job_id
        else:
            job.job_id = f"local-{self.next_number}"
            self.next_number += 1
        ledger.append(job.spec.run.ledger, "submitted", job_id=job.job_id, cluster="local")

    # ------------------------------------------------------------------------------------ starting

    def start_ready(self) -> None:
        """Start what may start, the longest chain of dependents first.

        A run that finds too few free cores keeps its place: nothing behind it may take them, or a wide
        stage would starve.
        """
        if self.stopping_since is not None:
            return
        free = self.capacity - sum(job.cpus for job in self.jobs if job.busy)
        for job in sorted(self.jobs, key=lambda job: -job.chain):
            if job.state != "queued" or job.lock is None:
                continue
            missing = [n for n in job.spec.after if n in self.by_name and self.by_name[n].state != "done"]
            job.reason = f"waits for {', '.join(missing)}" if missing else ""
            if missing:
                continue
            if job.cpus > free:
                return
            self.start(job)
            free -= job.cpus if job.busy else 0

    def start(self, job: _Job) -> None:
        run, lock = job.spec.run, job.lock
        assert lock is not None
        environment = {**os.environ, "POST_TRAINING_JOB_ID": job.job_id}
        try:
            with run.stdout(job.job_id).open("ab") as out, run.stderr(job.job_id).open("ab") as err:
                job.process = subprocess.Popen(
                    ["bash", str(run.script)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                    cwd=run.root, start_new_session=True, pass_fds=(lock,),
                )  # fmt: skip
        except OSError as error:
            self.fail(job, f"could not start: {error}")
            return
        job.pid = job.process.pid
        job.started, job.started_epoch = time.monotonic(), time.time()
        again = job.first_started is not None
        job.first_started = job.first_started or job.started
        job.asked = job.terminated = job.killed = False
        job.state, job.reason = "running", ""
        owner = {"pid": job.pid, "supervisor": os.getpid(), "started": job.started_epoch}
        os.pwrite(lock, json.dumps(owner).encode(), 0)
        self.screen.say(f"{job.name}: started{' again' if again else ''} as {job.job_id}")

    # -------------------------------------------------------------------------------------- ending

    @staticmethod
    def has_ended(job: _Job) -> bool:
        """Whether the batch shell ended. It stays unreaped, so that its number still names its group."""
        assert job.process is not None
        return os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self, job: _Job) -> None:
        """The job script ended: end what it left behind, and decide what follows."""
        assert job.process is not None and job.pid is not None
        _signal_group(job.pid, signal.SIGKILL)  # late ranks
        code = job.process.wait()
        job.process = job.pid = None
        job.seconds = time.monotonic() - (job.first_started or job.started)
        self.release(job)
        history, run = job.history(), job.spec.run
        if history.running and self.stopping_since is None and self.guard(run, history):
            code = life.REQUEUE
        history = job.history()
        recorded = not history.running and (history.attempt_ended or 0) > job.started_epoch - 0.001
        gave_up = recorded and history.gave_up
        if code == 0:
            self.screen.say(f"{job.name}: done in {job.seconds:.0f} s")
            self.settle(job, "done")
        elif code == life.GATED and manifest.problem(run.model) is None:
            self.gated(job, f"gate: {life.held_back(run)}")
        elif self.stopping_since is not None and not gave_up:
            if history.running:
                self.close(history, run, code, life.Ending("stopped", "exit", reason=STOPPED_BY_USER))
            self.screen.say(f"{job.name}: stopped; newest checkpoint: step {history.checkpoint_step}")
            self.stop_queued(job)
        elif history.cancelled and history.cancel_wish is not None:
            self.screen.say(f"{job.name}: {history.reason}")
            job.root_cause = f"upstream {job.name} was cancelled by {history.cancel_wish}"
            self.settle(job, "cancelled", str(history.reason))
        elif code == life.REQUEUE:
            self.screen.say(f"{job.name}: requeued ({history.reason or 'saved before its wall time'})")
            job.state = "queued"
            self.take_up(job)
        elif recorded:
            self.fail(job, history.reason or _ending_text(code, job))
        else:
            why = _ending_text(code, job)
            self.close(history, run, code, life.Ending("crashed", "exit", reason=why, gave_up=True))
            self.fail(job, why)
        if job.ended and self.stopping_since is None:
            notify.tell(run)  # where the script itself could not

    @staticmethod
    def guard(run: RunDirectory, history: History) -> bool:
        """Whether a run whose job script was killed starts again: what a cluster's guard step decides there."""
        try:
            return life.guard(run, history.attempts)
        except (OSError, RuntimeError, KeyError):
            return False

    @staticmethod
    def close(history: History, run: RunDirectory, code: int, ending: life.Ending) -> None:
        """Record the end of an attempt whose script could not."""
        attempt = history.attempts if history.running else history.attempts + 1
        life.record_end(run, history, attempt, code, ending)

    def fail(self, job: _Job, why: str) -> None:
        self.screen.say(f"{job.name}: failed: {why}")
        job.root_cause = f"upstream {job.name} failed: {why}"
        self.settle(job, "failed", why)

    def gated(self, job: _Job, why: str) -> None:
        """An evaluation is done, and its gate holds back the runs that come after it."""
        self.screen.say(f"{job.name}: done; {why}")
        job.root_cause = f"gate of {job.name}: {why.removeprefix('gate: ')}"
        self.settle(job, "gated", why)

    def settle(self, job: _Job, state: str, reason: str = "") -> None:
        job.state, job.reason = state, reason
        self.release(job)

    @staticmethod
    def release(job: _Job) -> None:
        if job.lock is not None:
            os.close(job.lock)
            job.lock = None

    def cancel_dependents(self) -> None:
        """A run that failed takes those that need it with it."""
        found = True
        while found:
            found = False
            for job in self.jobs:
                causes = [self.by_name[n].root_cause for n in job.spec.after if n in self.by_name]
                cause = next((c for c in causes if c), None)
                if job.state == "queued" and cause and not job.busy:
                    ledger.append(job.spec.run.ledger, "cancelled", reason=cause)
                    notify.tell(job.spec.run)
                    job.root_cause = cause
                    self.screen.say(f"{job.name}: cancelled: {cause}")
                    self.settle(job, "cancelled", cause)
                    found = True

    # ------------------------------------------------------------------------------ time and stops

    def watch_the_clock(self) -> None:
        """Signals at the wall time, as SLURM sends them."""
        now = time.monotonic()
        for job in self.jobs:
            if not job.busy or job.killed or now < job.started + self.deadline(job):
                continue
            assert job.pid is not None
            if not job.asked:
                job.asked = True
                self.signal_shell(job, signal.SIGUSR1)
                self.screen.say(f"{job.name}: asked to save, {job.spec.signal_time} s before its wall time")
            elif not job.terminated:
                job.terminated = True
                _signal_group(job.pid, signal.SIGTERM)
                self.screen.say(f"{job.name}: wall time reached")
            else:
                job.killed = True
                _signal_group(job.pid, signal.SIGKILL)

    @staticmethod
    def signal_shell(job: _Job, number: signal.Signals) -> None:
        """To the batch shell alone, as `--signal=B:USR1@...` does."""
        assert job.pid is not None
        if job.process is None and _orphan(job.spec.run) is None:
            return  # an adopted shell that ended meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, number)

    def heed_stops(self) -> None:
        """The first Ctrl-C asks all jobs to save and leave, the second kills them."""
        stops = self.wakeup.stops
        if len(stops) == self.stops_seen:
            return
        newest, self.stops_seen = stops[-1], len(stops)
        if self.stopping_since is None:
            self.stopping_since = newest
            if any(job.busy for job in self.jobs):
                self.screen.say("saving, Ctrl-C again to kill")
            for job in self.jobs:
                if job.busy:
                    self.signal_shell(job, signal.SIGTERM)
                    job.asked = True
                elif job.state == "elsewhere":
                    self.settle(job, "stopped", "left to the other supervisor")
                elif not job.ended:
                    self.stop_queued(job)
        elif newest - self.stopping_since > DEBOUNCE_SECONDS:
            for job in self.jobs:
                if job.busy and job.pid is not None:
                    _signal_group(job.pid, signal.SIGKILL)

    def stop_queued(self, job: _Job) -> None:
        ledger.append(job.spec.run.ledger, "cancelled", reason=STOPPED_BY_USER)
        self.settle(job, "stopped", STOPPED_BY_USER)

    # -------------------------------------------------------------------------------------- report

    def report(self) -> None:
        """What failed, why and how to go on."""
        failed = [job for job in self.jobs if job.state == "failed"]
        for job in failed:
            print(f"\n{job.name} failed: {job.reason}", file=sys.stderr)
            err = job.spec.run.stderr(job.job_id)
            lines = tail(err)
            if lines:
                print(f"  the end of {err}:", file=sys.stderr)
                print("\n".join(f"    {line}" for line in lines), file=sys.stderr)
        for job in self.jobs:
            if job.state == "gated":
                print(f"\n{job.name}: {job.reason}\n  fix: {gate_fix(job.name)}", file=sys.stderr)
        if failed or self.stopping_since is not None or any(job.state == "cancelled" for job in self.jobs):
            print(
                f"\nTo go on from here, give the same command again:\n  {_same_command()}", file=sys.stderr, flush=True
            )

    def exit_code(self) -> int:
        if self.stopping_since is not None:
            return 130
        return 0 if all(job.state == "done" for job in self.jobs) else 1


def supervise(runs: list[LocalRun], capacity: int | None = None, progress: bool = True) -> int:
    """Run these stages on this machine in graph order, branches side by side where cores allow.

    capacity: cores to fill; None: all of this machine's. progress: False says nothing but failures.
    Returns 0 when all are done, 1 when some failed, 130 after Ctrl-C. Must be called from the main thread,
    because it handles signals while it runs.
    """
    return _Supervisor(runs, capacity or os.cpu_count() or 1, progress).run()
