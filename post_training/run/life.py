"""The life of a job, as its script lives it: begin, perhaps a stop request, end.

`templates/job.sh.j2` calls this module's commands around the training processes:

    python -m post_training.run.life begin RUN_DIR --job-id ID --nodes n1,n2     prints the attempt's number
    python -m post_training.run.life stop  RUN_DIR --attempt N --signal USR1
    python -m post_training.run.life end   RUN_DIR --attempt N --code C --signal USR1   prints what to do next
    python -m post_training.run.life guard RUN_DIR --attempt N                   after the script itself was killed

How an attempt ended, its outcome, is told from exit codes, the ledger and what SLURM said to the script:

    finished        the output is whole; of an evaluation whose gate does not hold with that as its reason
    stopped         saved and left before its wall time, or because a user asked
    preempted       SLURM gave its nodes to another job, and requeues it
    node_lost       a node died or failed its health check; SLURM requeues the job
    cancelled       scancel
    out_of_memory, hung, crashed      failures: they count against slurm.max_failures until there is progress

Only the standard library and YAML: the commands start in well under a second and run on every node.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from post_training.run import gate, ledger, manifest, notify, progress
from post_training.run.directory import ATTEMPT_MARK, Fenced, RunDirectory, write_atomic
from post_training.run.history import FAILED, History, summarise

T = TypeVar("T")

STOPPED = 85
"""Exit code of a training process that saved and left because it was asked to."""
HUNG = 86
"""Exit code of a training process that ended itself because no step was done for slurm.watchdog_minutes."""
OUT_OF_MEMORY = 87
"""Exit code of a training process that ran out of memory."""
UNUSABLE = 2
"""Exit code of a training process whose config or data cannot be used: trying again does not help."""
REQUEUE = 75
"""Exit code of a local job script that wants to be started again (EX_TEMPFAIL of sysexits.h)."""
DONE = 3
"""Exit code of `begin` where the run is finished already: there is nothing to do."""
GATED = 88
"""Exit code of an eval's job script, and of `begin`, where the output is whole and the gate does not hold."""
BUSY = 4
"""Exit code of `begin` where another job has the run, as far as the ledger knows; prints that job's id."""
CANCELLED = 6
"""Exit code of `begin` where a user cancelled the job: no attempt begins."""
AVOID = 5
"""Exit code of `begin` on a node that failed this run before; prints the nodes to avoid."""
ASKED = 143
"""Exit code of a job script whose attempt was asked to stop for good: 128 + SIGTERM."""
DEADLINE = 124
"""The code given to `end` when a stop request was not answered in time (the code of timeout(1))."""
TOO_OFTEN = 2
"""A node that failed a run so often is avoided by its next attempt."""
PATIENCE_S = 600.0
"""How long `begin` and `end` wait for room on a full disk, or for a file system that went away."""
DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE))


# ------------------------------------------------------------------------------------ deciding, pure


@dataclass(frozen=True)
class Word:
    """What SLURM says of the job while it ends."""

    cause: str | None = None  # preempted, node_lost, cancelled, running (nobody ends it), or None: not known
    lost_nodes: tuple[str, ...] = ()


def parse_word(job: str, nodes: str, restart_count: int) -> Word:
    """SLURM's word from `scontrol -o show job` and `sinfo -h -N -o %N:%t` of the job's nodes. Pure.

    Seen with 22.05: Restarts is already counted up while a job that SLURM requeues (preemption without grace or at
    its end, node failure) is being ended; a cancelled job keeps its count. PreemptTime is set during the grace.
    """
    fields = dict(part.split("=", 1) for part in job.split() if "=" in part)
    states = (item.split(":", 1) for item in nodes.split() if ":" in item)
    lost = tuple(sorted({name for name, state in states if re.match(r"down|fail|unk|boot", state)}))
    if not fields.get("JobState"):
        return Word(None, lost)
    if lost or fields["JobState"] == "NODE_FAIL":
        return Word("node_lost", lost)
    restarts = fields.get("Restarts", "")
    if (restarts.isdigit() and int(restarts) > restart_count) or fields.get("PreemptTime", "None") != "None":
        return Word("preempted")
    if fields["JobState"] in ("CANCELLED", "COMPLETING"):
        return Word("cancelled")
    return Word("running" if fields["JobState"] == "RUNNING" else None)


@dataclass(frozen=True)
class Evidence:
    """What is known of an attempt's end."""

    code: int  # exit status of the training processes; DEADLINE: they did not answer a stop request
    signal: str | None = None  # USR1 (wall time), TERM (preempted, cancelled) or None: nobody asked it to stop
    word: Word = Word()
    answered: bool = False  # it saved and left on request
    whole: bool = False  # the run's output has its manifest
    hung: bool = False  # a rank dumped its stacks
    error: str | None = None  # why a rank says it failed
    stderr: str = ""  # the end of the job's error stream


ON_REQUEST = "stopped on request"
SLURM_OOM = re.compile(r"oom[-_]kill|Out Of Memory|[Ee]xceeded (job |step )?memory limit")
"""What slurmstepd and srun print where a task was killed for its memory."""


def classify(seen: Evidence) -> tuple[str, str | None]:
    """The outcome of an attempt and, where there is something to say, the reason. Pure."""
    unsaved = None if seen.answered else f"left without saving (status {seen.code})"
    if seen.whole:
        # the manifest is written last: what breaks after it (a thread at interpreter exit, say) costs nothing
        return "finished", None
    if seen.signal == "USR1":
        return "stopped", unsaved  # planned: never a failure, also where the deadline came before the answer
    if seen.word.cause == "node_lost":
        return "node_lost", f"lost {', '.join(seen.word.lost_nodes) or 'a node'}"
    if seen.word.cause in ("preempted", "cancelled"):
        return seen.word.cause, unsaved
    if seen.signal is not None or seen.code == STOPPED:
        return "stopped", ON_REQUEST if seen.answered else unsaved
    if seen.hung or seen.code == HUNG:
        return "hung", "no step for slurm.watchdog_minutes; what each rank was doing is in logs/stacks"
    if seen.code == OUT_OF_MEMORY or SLURM_OOM.search(seen.stderr):
        return "out_of_memory", seen.error or "killed for its memory"
    if seen.code == 0:
        return "crashed", "ended without a complete output"
    return "crashed", seen.error or f"exit status {seen.code}"


@dataclass(frozen=True)
class Limits:
    max_failures: int
    max_attempts_without_progress: int


@dataclass(frozen=True)
class Ending:
    """How an attempt ended and what follows."""

    outcome: str
    action: str  # exit or requeue
    exit_code: int = 0  # of the job script, where it ends
    reason: str | None = None
    gave_up: bool = False
    by_slurm: bool = False  # SLURM itself requeues or ends the job: the script waits for it
    cancelled: bool = False  # by a user, who let it save first: the script has SLURM cancel the job


def decide(
    outcome: str, reason: str | None, code: int, word: Word, signal: str | None, history: History, limits: Limits
) -> Ending:
    """What follows an outcome. Pure. history: before this end was recorded."""
    if outcome == "finished":
        return Ending(outcome, "exit", 0)
    if history.cancel_wish is not None:  # whoever else wants to end or requeue it meanwhile
        by = f"cancelled by {history.cancel_wish}"
        reason = f"{by}; {reason}" if reason and outcome != "cancelled" and reason != ON_REQUEST else by
        return Ending(outcome if outcome in FAILED else "cancelled", "exit", ASKED, reason, cancelled=True)
    if word.cause in ("preempted", "node_lost") and outcome == word.cause:
        return Ending(outcome, "requeue", ASKED, reason, by_slurm=True)
    if outcome == "cancelled":
        return Ending(outcome, "exit", ASKED, reason, by_slurm=True)
    if outcome == "stopped" and signal != "USR1" and word.cause != "running":
        # a user's wish on this machine; on a cluster SLURM did not say what it wants, and ends the script itself
        return Ending(outcome, "exit", ASKED, reason, by_slurm=True)
    if outcome in FAILED:
        failures = history.failures + 1
        if code == UNUSABLE:
            return Ending(outcome, "exit", code, reason, gave_up=True)
        if failures >= limits.max_failures:
            reason = f"{reason}; gave up after {failures} failures without progress (slurm.max_failures)"
            return Ending(outcome, "exit", code or 1, reason, gave_up=True)
    if (why := futile(history.attempts_without_progress + 1, limits)) is not None:
        return Ending(outcome, "exit", 1, f"{reason}; {why}" if reason else why, gave_up=True)
    return Ending(outcome, "requeue", 0, reason)


def futile(attempts: int, limits: Limits) -> str | None:
    """Why a run that made no progress in so many attempts gives up; None where it may go on."""
    if attempts < limits.max_attempts_without_progress:
        return None
    return f"gave up after {attempts} attempts without progress (slurm.max_attempts_without_progress)"


def lead(figures: dict[str, Any] | None, teardown: float | None) -> dict[str, float | None]:
    """Seconds that a stop takes: the longest step, a save, and the time from there to the script's last line."""
    found = figures or {}
    parts = {"longest_step": found.get("longest_step"), "save": found.get("save"), "teardown": teardown}
    needed = sum(value for value in parts.values() if value is not None) if parts["longest_step"] is not None else None
    return {k: None if v is None else round(v, 3) for k, v in {**parts, "needed": needed}.items()}


def enough(needed: float) -> int:
    """slurm.signal_time_seconds for a stop that takes so long: a tenth (30 s at most) of it is the requeue's own."""
    return math.ceil((needed + min(30, needed / 9) + 1) / 10) * 10


# ------------------------------------------------------------------------------------------ the hands


@dataclass(frozen=True)
class Begun:
    """What `begin` found: the number of the new attempt, or why there is none."""

    attempt: int | None = None
    code: int = 0  # DONE, GATED, BUSY, CANCELLED or AVOID
    says: str = ""  # why the gate does not hold, another job's id, or the nodes to avoid


def begin(
    run: RunDirectory, job_id: str, nodes: list[str], restart_count: int = 0, sole: bool = False, gone: str = "",
    cluster: str = "",
) -> Begun:  # fmt: skip
    """Open the next attempt in the ledger.

    sole: the caller knows that nobody else has the run, since it holds its lock. gone: another job that SLURM no
    longer runs. cluster: SLURM's name of the cluster. Raises RuntimeError when an input of the run is not a complete
    output, the run has given up, or an attempt of it runs on another cluster.
    """
    if manifest.problem(run.model) is None:
        # finished before, as when SLURM requeues a job that ended within its preemption grace
        if (why := held_back(run)) is None:
            return Begun(code=DONE)
        cancel_dependents(run, f"gate of {run.name}: {why}")
        return Begun(code=GATED, says=f"gate: {why}")
    config = run.read_config()
    with run.exclusive():
        history = summarise(ledger.read(run.ledger))
        if history.running and history.slurm_cluster not in ("", cluster) and not sole:
            where = f"cluster {history.slurm_cluster}"
            raise RuntimeError(f"{run.root}: an attempt of job {history.job_id} runs on {where}")
        if history.job_id not in (None, job_id, gone) and not sole:
            return Begun(code=BUSY, says=str(history.job_id))
        if history.running:
            close_lost_attempt(run, history, same_job=history.job_id == job_id)
            history = summarise(ledger.read(run.ledger))
        if history.cancel_wish is not None and history.cancel_job == job_id:
            _cancelled(run, history.cancel_wish)
            return Begun(code=CANCELLED, says=f"cancelled by {history.cancel_wish}")
        avoid = _avoid(history, config)
        if not sole and set(nodes) & set(avoid):
            ledger.append(run.ledger, "avoided", job_id=job_id, nodes=sorted(set(nodes) & set(avoid)))
            return Begun(code=AVOID, says=",".join(avoid))
        why = _input_problem(config) or futile(history.attempts_without_progress, _limits(config))
        if why is not None:
            _give_up(run, history, why)
            raise RuntimeError(why)
        attempt = history.attempts + 1
        run.announce(attempt)  # first of all: from here on an older attempt can write nothing
        ledger.append(
            run.ledger, "attempt_started", attempt=attempt, job_id=job_id, node=nodes[0] if nodes else "", nodes=nodes,
            restart_count=restart_count, slurm_cluster=cluster,
        )  # fmt: skip
        return Begun(attempt)


def _cancelled(run: RunDirectory, user: str) -> None:
    """Write down that a user's wish was followed, here and for what waits for this run."""
    cancel_dependents(run, f"upstream {run.name} was cancelled by {user}")
    ledger.append(run.ledger, "cancelled", reason=f"cancelled by {user}")


def held_back(run: RunDirectory) -> str | None:
    """Why the gate that a whole run was submitted with does not hold; None where it holds, or there is none."""
    try:
        config = run.read_config()
    except FileNotFoundError:
        return None
    return gate.failure(run, config.get("gate"))


def _input_problem(config: dict[str, Any]) -> str | None:
    for name, source in config["inputs"].items():
        needed = source and source.get("run_dir") and not source.get("derived")  # an eval can do without that one
        folder = Path(source["path"]) if needed else None
        if folder is not None and (why := manifest.problem(folder)):
            return f"inputs.{name}={folder}: not a complete output ({why})"
    return None


def _limits(config: dict[str, Any]) -> Limits:
    slurm = config["slurm"]
    return Limits(slurm["max_failures"], slurm.get("max_attempts_without_progress", 10))


def _avoid(history: History, config: dict[str, Any]) -> list[str]:
    """The nodes that this run must not get again: those of slurm.exclude and those that failed it too often."""
    bad = sorted(name for name, times in history.lost_nodes.items() if times >= TOO_OFTEN)
    given = config["slurm"].get("exclude")
    return [*([given] if given and bad else []), *bad]


def close_lost_attempt(run: RunDirectory, history: History, same_job: bool) -> None:
    """Record the end of an attempt whose script could not."""
    reason: str | None
    if same_job and history.stop_signal == "TERM":
        word = Word("preempted")
        reason = "its script was killed before it could record the end"
    elif same_job:
        word = Word("node_lost", tuple(history.nodes[:1]))
        reason = f"the job script vanished with its node {', '.join(history.nodes[:1])}".rstrip()
    else:
        word, reason = Word(), f"job {history.job_id} is gone and did not record its end"
    outcome: str = word.cause or ("stopped" if history.stop_signal == "TERM" else "crashed")
    record_end(run, history, history.attempts, 137, Ending(outcome, "requeue", reason=reason), word)


def stop(run: RunDirectory, attempt: int, signal: str, word: Word) -> None:
    """Ask the attempt to save and leave, and write down who asked."""
    run.request_stop(attempt)
    ledger.append(
        run.ledger, "stop_requested", attempt=attempt, signal=signal, cause=word.cause, lost_nodes=list(word.lost_nodes)
    )


def end(
    run: RunDirectory, attempt: int, code: int, signal: str | None, word: Word = Word(), unhealthy: str = ""
) -> Ending:
    """Close the attempt in the ledger and decide what follows. Raises Fenced where a newer one has begun.

    unhealthy: nodes that failed slurm.health_check, by commas.
    """
    if run.newest_attempt() > attempt:
        raise Fenced(f"attempt {attempt} of {run.root}: a newer attempt has begun")
    config = run.read_config()
    history = summarise(ledger.read(run.ledger))
    reason: str | None
    if unhealthy:
        nodes = unhealthy.split(",")
        # counted as often as it takes to avoid them at once
        word, reason = Word(None, tuple(nodes * TOO_OFTEN)), f"slurm.health_check failed on {unhealthy}"
        ending = decide("node_lost", reason, code, word, None, history, _limits(config))
    else:
        seen = Evidence(
            code=code, signal=signal, word=word, answered=history.answered or code in (STOPPED, 0),
            whole=manifest.problem(run.model) is None,
            hung=any(p.stat().st_size for p in run.stacks(attempt, 0).parent.glob(run.stacks(attempt, "*").name)),
            error=_error(run, attempt), stderr=_said(run, history.job_id or ""),
        )  # fmt: skip
        outcome, reason = classify(seen)
        ending = decide(outcome, reason, code, word, signal, history, _limits(config))
    if ending.outcome == "finished" and (why := gate.failure(run, config.get("gate"))) is not None:
        cancel_dependents(run, f"gate of {run.name}: {why}")
        ending = Ending("finished", "exit", GATED, f"gate: {why}")
    if ending.gave_up or (ending.outcome == "cancelled" and not ending.cancelled):
        cancel_dependents(run, f"upstream {run.name} {'failed' if ending.gave_up else 'was cancelled'}"
                          + (f": {ending.reason}" if ending.reason else ""))  # fmt: skip
    # last, so that on a full disk all of this can be tried again
    record_end(run, history, attempt, code, ending, word)
    if signal == "USR1":
        _warn_of_short_lead(run, config["slurm"].get("signal_time_seconds"))
    if ending.cancelled:
        _cancelled(run, str(history.cancel_wish))
    return ending


def record_end(
    run: RunDirectory, history: History, attempt: int, code: int, ending: Ending, word: Word = Word()
) -> None:
    """Write `attempt_ended` with what rank 0 measured, and the failure count. history: before this end."""
    figures = progress.read(run, attempt)
    until = figures["time"] if figures else None
    in_order = ending.outcome == "finished" or history.answered
    teardown = max(0.0, time.time() - until) if until is not None and in_order else None
    write_atomic(run.failure_count, f"{history.failures + (ending.outcome in FAILED)}\n")
    ledger.append(
        run.ledger, "attempt_ended", attempt=attempt, code=code, outcome=ending.outcome, action=ending.action,
        reason=ending.reason, gave_up=ending.gave_up, lost_nodes=list(word.lost_nodes),
        step=figures.get("step") if figures else None, seconds=figures["seconds"] if figures else None,
        measured_until=until, lead=lead(figures, teardown),
    )  # fmt: skip


def _give_up(run: RunDirectory, history: History, why: str) -> None:
    """The run ends before its next attempt could begin."""
    ledger.append(
        run.ledger, "attempt_ended", attempt=history.attempts + 1, code=UNUSABLE, outcome="crashed", action="exit",
        reason=why, gave_up=True,
    )  # fmt: skip
    cancel_dependents(run, f"upstream {run.name} failed: {why}")


def cancel_dependents(run: RunDirectory, reason: str) -> None:
    """Write the reason into the ledgers of all runs that wait for this one; SLURM cancels their jobs.

    On this machine the supervisor does both.
    """
    if run.read_config().get("cluster", {}).get("scheduler") != "slurm":
        return
    told = {run.root}
    for folder in pipelines_of(run):
        for root in _after(run.root, folder):
            other = RunDirectory(root)
            if root in told or not other.ledger.exists() or manifest.problem(other.model) is None:
                continue
            told.add(root)
            history = summarise(ledger.read(other.ledger))
            if history.job_id is not None and not history.running and not history.cancelled:
                ledger.append(other.ledger, "cancelled", reason=reason)


def pipelines_of(run: RunDirectory) -> list[Path]:
    """The folders of the pipelines that use a run: its own, and those that it is shared with."""
    shared = (event.get("pipelines") for event in ledger.read(run.ledger) if event["event"] == "shared")
    names = [name for given in shared if isinstance(given, list) for name in given if isinstance(name, str)]
    sound = [name for name in names if name == Path(name).name]
    return [run.root.parent.parent / name for name in dict.fromkeys([run.pipeline, *sound])]


def _after(root: Path, folder: Path) -> list[Path]:
    """Run directories of a pipeline's stages that come after the one in `root`, as its pipeline.json says."""
    try:
        stages = json.loads((folder / "pipeline.json").read_text())["stages"]
        roots = {name: Path(entry["run_dir"]) for name, entry in stages.items()}
        lost = {name for name, other in roots.items() if other == root}
        for _ in stages:
            lost |= {name for name, entry in stages.items() if lost & set(entry.get("after") or ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [roots[name] for name in stages if name in lost]


def guard(run: RunDirectory, attempt: int) -> bool:
    """After the job script itself was killed: record it, and tell whether the job is to be requeued.

    Not where the script had recorded an end without requeue, where SLURM was ending the job (then the script was
    killed by SLURM), or where a newer attempt has begun.
    """
    history = summarise(ledger.read(run.ledger))
    if run.newest_attempt() > attempt or history.attempts != attempt:
        return False
    if not history.running:
        return history.action == "requeue" and history.outcome not in ("preempted", "node_lost")
    if history.stop_signal == "TERM":
        return False
    return end(run, attempt, 137, history.stop_signal).action == "requeue"


def _error(run: RunDirectory, attempt: int) -> str | None:
    try:
        return run.error(attempt).read_text(errors="replace").strip()[:500] or None
    except OSError:
        return None


def _said(run: RunDirectory, job_id: str) -> str:
    """The end of the job's error stream, and nothing of earlier attempts."""
    try:
        with run.stderr(job_id).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    marks = list(ATTEMPT_MARK.finditer(text))
    return text[marks[-1].end() :] if marks else text


def _warn_of_short_lead(run: RunDirectory, given: int | None) -> None:
    needed = (ledger.read(run.ledger)[-1].get("lead") or {}).get("needed")
    if needed is not None and given is not None and needed > given:
        print(
            f"warning: slurm.signal_time_seconds={given}: this attempt needed {needed:.0f} s to stop "
            f"(longest step, save and teardown)\n  fix: slurm.signal_time_seconds={enough(needed)}",
            file=sys.stderr,
        )


def patiently(do: Callable[[], T], patience: float) -> T:
    """Do it, and where the disk has no room or went away, try again for so many seconds. Raises the last OSError."""
    deadline = time.monotonic() + patience
    said = False
    while True:
        try:
            return do()
        except OSError as error:
            if error.errno not in DISK or time.monotonic() > deadline:
                raise
            if not said:
                print(f"waiting for the disk: {error}", file=sys.stderr, flush=True)
            said = True
            time.sleep(min(5.0, max(0.2, patience / 20)))


# ------------------------------------------------------------------------------------ the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "stop", "end", "guard"):
        command = commands.add_parser(name)
        command.add_argument("run_dir", type=Path)
        command.add_argument("--restart-count", type=int, default=0)
        if name == "begin":
            command.add_argument("--job-id", required=True)
            command.add_argument("--nodes", default="", help="by commas or blanks, the script's own first")
            command.add_argument("--sole", action="store_true", help="nobody else can have the run")
            command.add_argument("--cluster", default="", help="SLURM's name of the cluster")
            command.add_argument("--gone", default="", help="another job of the run, which SLURM no longer runs")
            continue
        command.add_argument("--attempt", type=int, required=True)
        if name == "guard":
            continue
        command.add_argument("--signal", default="")
        command.add_argument("--job", default="", help="scontrol's line of the job")
        command.add_argument("--node-states", default="", help="sinfo's name:state of the job's nodes")
        if name == "end":
            command.add_argument("--code", type=int, required=True)
            command.add_argument("--unhealthy", default="", help="nodes that failed the health check, by commas")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    run = RunDirectory(args.run_dir)
    try:
        if args.command == "begin":
            nodes = re.split(r"[,\s]+", args.nodes.strip()) if args.nodes.strip() else []
            try:
                begun = patiently(
                    lambda: begin(run, args.job_id, nodes, args.restart_count, args.sole, args.gone, args.cluster),
                    PATIENCE_S,
                )
            except RuntimeError:
                notify.tell(run)  # it gave up before it began
                raise
            if begun.attempt is not None or begun.code in (DONE, GATED):  # else another job has the run
                notify.tell(run)
            if begun.code == DONE:
                print(f"{run.root} is finished: nothing to do", file=sys.stderr)
            elif begun.code == GATED:
                print(f"{run.root} is finished; {begun.says}", file=sys.stderr)
            elif begun.code == CANCELLED:
                print(f"{run.root}: {begun.says}: nothing begins", file=sys.stderr)
            else:
                print(begun.attempt if begun.attempt is not None else begun.says)
            return begun.code
        if args.command == "guard":
            print("requeue" if patiently(lambda: guard(run, args.attempt), 5.0) else "exit", flush=True)
            notify.tell(run)
            return 0
        word = parse_word(args.job, args.node_states, args.restart_count)
        if args.command == "stop":
            stop(run, args.attempt, args.signal, word)
            return 0
        print(_end(run, args, word))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _end(run: RunDirectory, args: argparse.Namespace, word: Word) -> str:
    """What the script is to do: `requeue [nodes to avoid]`, `wait` (SLURM ends it), `cancel` or `exit CODE`."""
    signal = args.signal or None
    try:
        # after a stop request there is no time to wait for room
        patience = 5.0 if signal else PATIENCE_S
        ending = patiently(lambda: end(run, args.attempt, args.code, signal, word, args.unhealthy), patience)
    except OSError as error:
        # not recorded; the next attempt closes this one, and waits for room itself
        print(f"the end of attempt {args.attempt} could not be recorded: {error}", file=sys.stderr)
        return "wait" if signal == "TERM" else "requeue"
    notify.tell(run)  # nothing where the job is to be requeued: that must not wait
    if ending.cancelled:
        return "cancel"
    if ending.by_slurm:
        return "wait"
    if ending.action == "exit":
        return f"exit {ending.exit_code}"
    return " ".join(["requeue", ",".join(_avoid(summarise(ledger.read(run.ledger)), run.read_config()))]).strip()


if __name__ == "__main__":
    sys.exit(main())
