"""Cancel, requeue, hold and release runs: what `scancel` and `scontrol` do, without losing a step.

`python -m launchers.cancel`, `.requeue`, `.hold` and `.release` are its commands. A running run is asked to save and to
leave as before its wall time: USR1 to its job script. That a run is cancelled stands in its ledger before SLURM hears
of it, and holds until the run is submitted again, so that neither a requeue that comes in between nor the end of this
command brings it back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers import site, slurm, table
from launchers.errors import LaunchError
from launchers.local import owned, shell_of
from launchers.runs import Look, ask_slurm, choose, conf_of, output_problem, real, rows_of
from launchers.states import is_local, pending_reason
from post_training.run import ledger, life
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise

LOCK_S = 60.0
AGAIN_S = 5.0
"""A run that runs and was asked, and whose script has not heard of it, is asked again so often."""
LOOK_S = 2.0
"""Between looks while a command waits."""
HELD = ("JobHeldUser", "JobHeldAdmin", "job_requeued_in_held_state", "launch_failed_requeued_held")

Word = slurm.JobRecord | slurm.Unknown | None


def me() -> str:
    """The user who runs this command."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


@dataclass
class Said:
    """What was done about one run."""

    look: Look
    text: str
    ok: bool = True
    waits: str | None = None  # what the command may wait for: gone, requeued
    attempt: int = 0  # the one that was asked to leave

    @property
    def name(self) -> str:
        return f"{self.look.pipeline}/{self.look.name}"


def refresh(look: Look) -> Look:
    """Read again what may have changed: a config is frozen."""
    look.story, look.output_problem = table.read_history(look.run), output_problem(look.run.model)
    return look


def held(job: slurm.JobRecord) -> str | None:
    """SLURM's word for why a queued job is held; None where it is not."""
    word = job.reason.split(",")[0].strip().replace(" ", "_")
    if job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "job_requeued_in_held_state"
    return word if job.state == "PENDING" and word in HELD else None


def queued(job: Word) -> bool:
    """Whether a job waits to start."""
    return isinstance(job, slurm.JobRecord) and job.state in (
        "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"
    )  # fmt: skip


def dependents(ids: Iterable[str], jobs: Iterable[slurm.JobRecord]) -> list[slurm.JobRecord]:
    """The queued jobs that can never start once these jobs are cancelled, in the order of the queue. Pure."""
    lost, waiting = set(ids), [job for job in jobs if queued(job)]
    found: dict[str, slurm.JobRecord] = {}
    for _ in waiting:
        new = [j for j in waiting if j.job_id not in lost and slurm.upstream_jobs(j) & lost]
        if not new:
            break
        lost |= {job.job_id for job in new}
        found |= {job.job_id: job for job in new}
    return list(found.values())


# -------------------------------------------------------------------------------------------- the looks


class _Scene:
    """Some runs, their jobs, and who owns them; locked against commands that submit."""

    def __init__(self, looks: Sequence[Look], command: str) -> None:
        self.looks, self.command = list(looks), command
        self.jobs = ask_slurm(self.looks)
        self.owners: dict[str, str] = {}
        if os.getuid() != 0:  # root may do all that SLURM lets anybody do
            for conf, ids in self.by_conf((look, self.job(look)) for look in self.looks).items():
                answer = slurm.owners(ids, conf)
                self.owners |= {} if isinstance(answer, slurm.Unknown) else answer

    def job(self, look: Look) -> Word:
        """Its job, as SLURM last said."""
        answer = self.jobs.get(conf_of(look))
        if isinstance(answer, slurm.Unknown):
            return answer
        return (answer or {}).get(look.story.history.job_id or "")

    @staticmethod
    def by_conf(pairs: Iterable[tuple[Look, Word]]) -> dict[str | None, list[str]]:
        """Ids of jobs by slurm.conf."""
        found: dict[str | None, list[str]] = {}
        for look, job in pairs:
            if isinstance(job, slurm.JobRecord):
                found.setdefault(conf_of(look), []).append(job.job_id)
        return found

    def again(self, looks: Sequence[Look]) -> None:
        """Look again at these runs and their jobs."""
        for look in looks:
            refresh(look)
        self.jobs = ask_slurm(list(looks))

    def not_for_us(self, look: Look) -> str | None:
        """Why this run is none of ours to steer; None where it is."""
        if look.config_problem:  # nor is it known which cluster has its job
            return f"left alone: {look.config_problem}"
        job = self.job(look)
        if isinstance(job, slurm.JobRecord) and (user := self.owners.get(job.job_id, me())) != me():
            return f"job {job.job_id} is {user}'s: only {user} can {self.command} it"
        if look.run.ledger.exists() and not os.access(look.run.ledger, os.W_OK):
            return f"{look.run.ledger} cannot be written to: ask its owner"
        return None

    def nothing(self, look: Look) -> str | None:
        """Why there is nothing to be done about a run; None where it is queued or running, or that is not known."""
        history, job = look.story.history, self.job(look)
        if look.done:
            return "done already"
        if is_local(history) and owned(look.run):
            return None
        if not is_local(history) and (isinstance(job, slurm.Unknown) or (job is not None and job.live)):
            return None
        row = rows_of([look], self.jobs, time.time())[0]
        return f"nothing to {self.command}: {row['state']}" + (f" ({row['reason']})" if row["reason"] else "")


@contextlib.contextmanager
def _no_submission(looks: Sequence[Look]) -> Iterator[None]:
    """No command submits these pipelines meanwhile. Raises LaunchError."""
    from filelock import FileLock, Timeout

    folders = dict.fromkeys(path.parent for look in looks if is_dir(path := look.run.root))
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders):
            try:
                stack.enter_context(FileLock(folder / ".submit.lock", timeout=LOCK_S))
            except Timeout:
                problem = f"another command has been submitting in {folder} for a minute"
                raise LaunchError(problem, "wait for it, then try again") from None
            except OSError as error:
                problem = f"{folder}: {error.strerror or error}"
                raise LaunchError(problem, "only who may write there can steer its runs") from None
        yield


def is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _ask(look: Look, what: str, user: str) -> None:
    """Write a wish into the ledger. An attempt that is about to begin has begun before it, or finds it."""
    with look.run.exclusive():
        ledger.append(look.run.ledger, "asked", what=what, user=user, job_id=look.story.history.job_id or "")
    refresh(look)


def _nudge(look: Look) -> str | None:
    """Ask the running attempt to save and leave. Why that could not be done, or None.

    One that is cancelled may be asked past its script, which finds the wish at its end; it then has no deadline.
    """
    history = look.story.history
    if not history.running or history.stopping:
        return None  # it is starting, and finds the wish; or it is asked already
    if is_local(history):
        shell = shell_of(look.run)
        if shell is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(shell, signal.SIGUSR1)
                return None
        refused: slurm.Unknown | None = slurm.Unknown("its supervisor is on another machine, or gone")
    else:
        refused = slurm.ask_to_save([history.job_id or ""], conf=conf_of(look))
    if refused is not None and history.cancel_wish is not None:
        life.stop(look.run, history.attempts, "USER", life.Word())
        return None
    return None if refused is None else refused.why


# ------------------------------------------------------------------------------------------- the commands


def cancel(looks: list[Look], now: bool = False) -> list[str]:
    """Cancel runs: running ones save first, unless `now`. Returns a line a run. Raises LaunchError."""
    return lines(_cancel(looks, now))


def requeue(looks: list[Look]) -> list[str]:
    """Have running runs save and start again under their job ids. Returns a line a run. Raises LaunchError."""
    return lines(_requeue(looks))


def hold(looks: list[Look]) -> list[str]:
    """Hold runs back: running ones save and leave first. Returns a line a run. Raises LaunchError."""
    return lines(_hold(looks))


def release(looks: list[Look]) -> list[str]:
    """Let held runs go on. Returns a line a run. Raises LaunchError."""
    return lines(_release(looks))


def lines(said: Sequence[Said]) -> list[str]:
    """One line a run, its name first."""
    several = len({item.look.pipeline for item in said}) > 1
    names = [item.name if several else item.look.name for item in said]
    width = max(map(len, names), default=0)
    return [f"{name.ljust(width)}  {item.text}" for name, item in zip(names, said, strict=True)]


def _cancel(looks: list[Look], now: bool = False) -> list[Said]:
    user, said = me(), []
    with _no_submission(looks):
        scene = _Scene(looks, "cancel")
        wished: list[Look] = []
        for look in looks:
            if (why := scene.nothing(look)) is not None:
                said.append(Said(look, why))
            elif (why := scene.not_for_us(look)) is not None:
                said.append(Said(look, why, ok=False))
            else:
                _ask(look, "cancel", user)
                wished.append(look)
        pairs = [(look, scene.job(look)) for look in wished if not is_local(look.story.history)]
        waiting = _dependents(scene, wished)
        refused = {
            conf: slurm.cancel(ids, conf, only_pending=not now)
            for conf, ids in scene.by_conf((look, job) for look, job in pairs if now or queued(job)).items()
        }
        scene.again(wished)
        for look in wished:
            said.append(_cancelled(look, scene.job(look), now, refused.get(conf_of(look)), user))
    left = [item.look for item in said if item.waits is None and item.ok and item.look in wished]
    said += _take_along(left, waiting, user)
    order = {id(look): place for place, look in enumerate(looks)}
    return sorted(said, key=lambda item: order.get(id(item.look), len(order)))


def _cancelled(look: Look, job: Word, now: bool, refused: slurm.Unknown | None, user: str) -> Said:
    """What became of a wish to cancel this run, and the next step towards it."""
    history = look.story.history
    attempt = history.attempts if history.running else 0
    if is_local(history):
        if not history.running:
            return Said(look, "cancelled: ends as soon as its turn comes")
        if now and (shell := shell_of(look.run)) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(shell, signal.SIGKILL)
            return Said(look, f"{history.job_id} killed", waits="gone", attempt=attempt)
        _nudge(look)
        return Said(look, f"{history.job_id} saves and leaves", waits="gone", attempt=attempt)
    if isinstance(job, slurm.Unknown):
        if history.running:
            life.stop(look.run, history.attempts, "USER", life.Word())
            return Said(look, f"asked to save and leave; SLURM does not answer: {job.why}", ok=False)
        return Said(look, f"noted: it ends when it starts; SLURM does not answer: {job.why}", ok=False)
    if job is None or not job.live:
        if not history.cancelled:
            ledger.append(look.run.ledger, "cancelled", reason=f"cancelled by {user}")
        return Said(look, f"job {history.job_id} cancelled")
    if refused is not None:
        return Said(look, f"noted; SLURM does not cancel job {job.job_id}: {refused.why}", ok=False)
    if queued(job):  # the answer may be older than the deed
        return Said(look, f"job {job.job_id} is being cancelled", waits="gone", attempt=attempt)
    if now:
        return Said(look, f"job {job.job_id} ends at once", waits="gone", attempt=attempt)
    _nudge(look)
    how = "saves and leaves" if history.running else "ends as soon as it has started"
    return Said(look, f"job {job.job_id} {how}", waits="gone", attempt=attempt)


Waiting = list[tuple[str | None, slurm.JobRecord, str]]  # slurm.conf, job, name of the run that it waits for


def _dependents(scene: _Scene, looks: Sequence[Look]) -> Waiting:
    """The jobs that wait for these runs and are none of them, also of other pipelines."""
    found: Waiting = []
    own = {look.story.history.job_id for look in looks}
    for conf in dict.fromkeys(conf_of(look) for look in looks if isinstance(scene.job(look), slurm.JobRecord)):
        seen = slurm.jobs(conf=conf)
        if isinstance(seen, slurm.Unknown):
            continue  # SLURM ends them by itself, or repair does
        for look in looks:
            if conf_of(look) == conf and look.story.history.job_id:
                known = {job.job_id for _, job, _ in found} | own
                waiting = dependents([look.story.history.job_id], seen.values())
                found += [(conf, job, look.name) for job in waiting if job.job_id not in known]
    return found


def _take_along(gone: Sequence[Look], waiting: Waiting, user: str) -> list[Said]:
    """Cancel the jobs that waited for runs that are cancelled, and write down why."""
    names, said = {look.name for look in gone}, []
    for conf, job, upstream in waiting:
        if upstream not in names:
            continue
        refused = slurm.cancel([job.job_id], conf, only_pending=True)
        run = RunDirectory(Path(job.folder)) if job.folder else None
        if run is not None and run.ledger.exists() and refused is None:
            with contextlib.suppress(OSError):
                if not summarise(ledger.read(run.ledger)).cancelled:
                    ledger.append(run.ledger, "cancelled", reason=f"upstream {upstream} was cancelled by {user}")
        if run is not None:
            text = f"job {job.job_id} cancelled: waited for {upstream}" if refused is None else refused.why
            said.append(Said(Look(run.pipeline, run.name, run), text, ok=refused is None))
    return said


def _requeue(looks: list[Look]) -> list[Said]:
    user, said = me(), []
    with _no_submission(looks):
        scene = _Scene(looks, "requeue")
        for look in looks:
            job = scene.job(look)
            if (why := scene.nothing(look)) is not None:
                onward = "" if look.done else "; the pipeline's command goes on"
                said.append(Said(look, why + onward))
            elif (why := scene.not_for_us(look)) is not None:
                said.append(Said(look, why, ok=False))
            elif isinstance(job, slurm.Unknown):
                said.append(Said(look, f"nothing done: {job.why}", ok=False))
            elif job is not None and queued(job):
                held_back = "; python -m launchers.release lets it go" if held(job) else ""
                said.append(Said(look, f"nothing to requeue: {pending_reason(job.reason)}{held_back}"))
            else:
                said.append(_save_and_leave(look, "requeue", "saves and is requeued", user))
    return said


def _save_and_leave(look: Look, what: str, how: str, user: str) -> Said:
    """Ask the running attempt of a run that is to come back."""
    history = look.story.history
    who = history.job_id if is_local(history) else f"job {history.job_id}"
    if not history.running and what == "hold":
        return Said(look, f"{who} is only starting, or ending: held from its next requeue on")
    if not history.running:
        return Said(look, f"{who} is only starting, or ending: look again in a moment", ok=False)
    if what == "requeue":
        _ask(look, what, user)
    stopping = history.stopping
    if (why := _nudge(look)) is not None:
        return Said(look, f"{who} could not be asked to save: {why}", ok=False)
    text = f"{who} {how}" + (" (asked before)" if stopping else "")
    return Said(look, text, waits="requeued", attempt=history.attempts)


def _hold(looks: list[Look]) -> list[Said]:
    user, said = me(), []
    with _no_submission(looks):
        scene = _Scene(looks, "hold")
        wanted: list[Look] = []
        for look in looks:
            job = scene.job(look)
            if (why := scene.nothing(look)) is not None:
                said.append(Said(look, why))
            elif is_local(look.story.history):
                text = "runs on this machine, where nothing queues: cancel it, and go on later with the same command"
                said.append(Said(look, text, ok=False))
            elif (why := scene.not_for_us(look)) is not None:
                said.append(Said(look, why, ok=False))
            elif isinstance(job, slurm.Unknown):
                said.append(Said(look, f"nothing done: {job.why}", ok=False))
            elif job is not None and held(job):
                said.append(Said(look, f"job {job.job_id} is held already"))
            else:
                wanted.append(look)
        ids = scene.by_conf((look, scene.job(look)) for look in wanted)
        refused = {conf: slurm.hold(jobs, conf) for conf, jobs in ids.items()}
        scene.again(wanted)
        for look in wanted:
            job, why_not = scene.job(look), refused.get(conf_of(look))
            if not isinstance(job, slurm.JobRecord) or not job.live:
                said.append(Said(look, "ended meanwhile"))
            elif "JobHeld" not in job.reason and not held(job):  # of a running one squeue shows it too
                why = why_not.why if why_not else f"squeue says: {job.reason}"
                said.append(Said(look, f"SLURM does not hold job {job.job_id}: {why}", ok=False))
            else:
                _ask(look, "hold", user)
                if queued(job):
                    said.append(Said(look, f"job {job.job_id} held"))
                else:
                    said.append(_save_and_leave(look, "hold", "saves, and is then held", user))
    order = {id(look): place for place, look in enumerate(looks)}
    return sorted(said, key=lambda item: order[id(item.look)])


def _release(looks: list[Look]) -> list[Said]:
    user, said = me(), []
    with _no_submission(looks):
        scene = _Scene(looks, "release")
        for look in looks:
            history, job = look.story.history, scene.job(look)
            if (why := scene.nothing(look)) is not None:
                said.append(Said(look, why))
            elif is_local(history):
                said.append(Said(look, "not held"))
            elif (why := scene.not_for_us(look)) is not None:
                said.append(Said(look, why, ok=False))
            elif isinstance(job, slurm.Unknown):
                said.append(Said(look, f"nothing done: {job.why}", ok=False))
            elif job is None or not ("JobHeld" in job.reason or held(job)):
                said.append(Said(look, "not held"))
            elif "JobHeldAdmin" in job.reason and os.getuid() != 0:
                text = f"job {job.job_id} is held by an administrator: only they can release it"
                said.append(Said(look, text, ok=False))
            elif (refused := slurm.release([job.job_id], conf_of(look))) is not None:
                said.append(Said(look, f"SLURM does not release job {job.job_id}: {refused.why}", ok=False))
            else:
                _ask(look, "release", user)
                said.append(Said(look, f"job {job.job_id} released"))
    return said


# -------------------------------------------------------------------------------------- waiting for the end


def patience(looks: Sequence[Look]) -> float:
    """Seconds within which runs that were asked to save and leave have done so: the longest lead, and SLURM's own
    patience with what does not leave."""
    longest = 60.0
    for look in looks:
        lead = table.number(look.section("slurm").get("signal_time_seconds")) or 0.0
        known = site.read(Path(look.run.root).parent.parent, str(look.section("cluster").get("name")))
        longest = max(longest, lead + (known.kill_wait_seconds or 30) + 30)
    return longest


def wait(said: Sequence[Said], show: Callable[[str], None], seconds: float) -> list[Said]:
    """Wait until runs have left that were asked to. Returns what became of each.

    A run whose job was requeued in spite of a wish to cancel it is cancelled here; one that has not heard is asked
    again.
    """
    started, asked = time.monotonic(), time.monotonic()
    left, told = [item for item in said if item.waits], []
    while left:
        looks = [item.look for item in left]
        for look in looks:
            refresh(look)
        jobs = ask_slurm(looks)
        again = time.monotonic() - asked > AGAIN_S
        for item in list(left):
            answer = jobs.get(conf_of(item.look))
            known = answer if isinstance(answer, slurm.Unknown) else (answer or {})
            job = known if isinstance(known, slurm.Unknown) else known.get(item.look.story.history.job_id or "")
            over = _left(item, job)
            if over is not None:
                left.remove(item)
                told.append(over)
            elif again and isinstance(job, slurm.JobRecord) and job.state == "RUNNING":
                _nudge(item.look)
            elif item.waits == "gone" and queued(job) and isinstance(job, slurm.JobRecord):
                slurm.cancel([job.job_id], conf_of(item.look), only_pending=True)
        if again:
            asked = time.monotonic()
        passed = time.monotonic() - started
        if passed > seconds:
            break
        if left:
            show(f"waiting {table.duration(passed)} of {table.duration(seconds)}: " + ", ".join(map(_doing, left)))
            time.sleep(min(LOOK_S, 0.2 + passed / 5))
    for item in left:
        more = "; --now ends it at once" if item.waits == "gone" else ""
        told.append(Said(item.look, f"has not left yet: the wish stands{more}", ok=False))
    return told


def _doing(item: Said) -> str:
    if not item.look.story.history.running or item.look.story.history.answered:
        return f"{item.look.name} (has saved, and leaves)"
    step = table.read_metrics(item.look.run.metrics).step
    return item.look.name + (f" (step {step})" if step is not None else "")


def _left(item: Said, job: Word) -> Said | None:
    """What became of a run that was asked to leave; None where it has not left yet."""
    look, history = item.look, item.look.story.history
    if isinstance(job, slurm.Unknown):
        return None
    if look.done:
        return Said(look, "finished before it could leave")
    saved = f"saved at step {history.checkpoint_step}" if history.checkpoint_step else "nothing was saved"
    if item.waits == "requeued":
        if history.running and history.attempts == item.attempt:
            return None
        if history.gave_up or history.cancelled:
            return Said(look, f"{saved}; {history.reason}", ok=False)
        if job is not None and queued(job) and (held(job) or "JobHeld" in job.reason):
            return Said(look, f"{saved}; job {job.job_id} is held: {_command('release', look)} lets it go on")
        if history.running or is_local(history):
            return Said(look, f"{saved}; goes on")
        if job is None or not queued(job):
            return None  # being requeued
        known = site.read(look.run.root.parent.parent, str(look.section("cluster").get("name")))
        return Said(look, f"{saved}; job {job.job_id} is queued again, and held for about {known.requeue_hold:.0f} s")
    if is_local(history):
        if owned(look.run):
            return None
    elif job is not None and job.live:
        return None
    if not history.cancelled:
        if history.running:  # not even its end could be recorded
            life.close_lost_attempt(look.run, history, same_job=False)
        if not refresh(look).story.history.cancelled:
            reason = f"cancelled by {history.cancel_wish or me()}"
            ledger.append(look.run.ledger, "cancelled", reason=reason)
    return Said(look, f"cancelled; {saved}")


def _command(name: str, look: Look) -> str:
    base = look.run.root.parent.parent
    words = [f"{look.pipeline}/{look.name}"]
    if real(base) != real("outputs"):
        words.append(f"paths.output_base={table.near(base)}")
    return f"python -m launchers.{name} {shlex.join(words)}"


# ------------------------------------------------------------------------------------- the command lines

HELP = {
    "cancel": "Cancel runs. Running ones save and leave first; what waits for them is cancelled too. The command that "
    "submitted them goes on from there.",
    "requeue": "Have running runs save, leave their nodes and start again under the same job ids.",
    "hold": "Hold runs back: queued ones stay queued, running ones save, leave their nodes and stay queued.",
    "release": "Let runs go on that were held.",
}
ACTS: dict[str, Callable[..., list[Said]]] = {
    "cancel": _cancel, "requeue": _requeue, "hold": _hold, "release": _release,
}  # fmt: skip


def parse_arguments(command: str, argv: list[str]) -> argparse.Namespace:
    """The command line. Raises LaunchError where it names no run."""
    usage = f"python -m launchers.{command} STAGE | PIPELINE/STAGE | run_name=NAME ... [paths.output_base=FOLDER]"
    parser = argparse.ArgumentParser(
        prog=f"python -m launchers.{command}", description=HELP[command],
        usage=usage + (" [--now]" if command == "cancel" else "") + ("" if command == "release" else " [--no-wait]"),
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="RUN", help="a stage, pipeline/stage, or run_name=NAME for all")
    if command == "cancel":
        parser.add_argument("--now", action="store_true", help="do not save: lose the steps since the last checkpoint")
    if command != "release":
        parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait until the runs have left")
    given = parser.parse_intermixed_args(argv)
    if all(word.startswith("paths.output_base=") for word in given.words):
        raise LaunchError(f"say what to {command}", "a stage, pipeline/stage, or run_name=NAME for all of a pipeline")
    return given


def own_runs(looks: list[Look], words: Sequence[str]) -> list[Look]:
    """Without those that other pipelines made, unless their stages are named."""
    named = {word.rstrip("/").rpartition("/")[2] for word in words}
    return [look for look in looks if look.name in named or look.run.root.parent.name == look.pipeline]


def run_command(command: str, argv: list[str] | None = None) -> int:
    """One of the four commands. Returns 0 where all was done, 1 where something could not be, 2 for bad input."""
    shown = _Line()
    try:
        given = parse_arguments(command, sys.argv[1:] if argv is None else argv)
        looks = own_runs(chosen := choose(given.words, command), given.words)
        if not looks:
            owners = ", ".join(dict.fromkeys(look.run.pipeline for look in chosen))
            problem = f"all runs of {chosen[0].pipeline} are those of {owners}"
            raise LaunchError(problem, f"name the stages that you want to {command}, or run_name={owners}")
        said = ACTS[command](looks, **({"now": given.now} if command == "cancel" else {}))
        print("\n".join(lines(said)), flush=True)
        waiting = [item for item in said if item.waits]
        if waiting and not given.no_wait:
            try:
                told = wait(waiting, shown, patience([item.look for item in waiting]))
            except KeyboardInterrupt:
                shown("")
                print("not waited for; the wish stands", file=sys.stderr)
                return 130
            shown("")
            print("\n".join(lines(told)), flush=True)
            said = [item for item in said if not item.waits] + told
        if any(item.ok and not item.look.done and item.look.story.history.cancel_wish for item in said):
            print("the command that submitted them goes on from there")
        return 0 if all(item.ok for item in said) else 1
    except LaunchError as error:
        shown("")
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        shown("")
        print(f"error: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Line:
    """One line that is written over, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self.there = sys.stderr.isatty()
        self.used = False

    def __call__(self, text: str) -> None:
        if self.there and (text or self.used):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\033[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
            self.used = bool(text)
