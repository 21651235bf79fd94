"""The life of a job, as its script lives it: begin, perhaps a stop request, end.

`templates/job.sh.j2` calls this module's three commands around the training processes:

    python -m post_training.run.life begin RUN_DIR --job-id ID --node HOST    prints the attempt's number
    python -m post_training.run.life stop  RUN_DIR --attempt N --signal USR1
    python -m post_training.run.life end   RUN_DIR --attempt N --code C --signal USR1   prints what to do next

Only the standard library and YAML: the commands start in well under a second and run on every node.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.history import summarise

STOPPED = 85
"""Exit code of a training process that saved and left because it was asked to."""
REQUEUE = 75
"""Exit code of a local job script that wants to be started again (EX_TEMPFAIL of sysexits.h)."""
DONE = 3
"""Exit code of `begin` where the run is finished already: there is nothing to do."""
ASKED = 143
"""Exit code of a job script whose attempt was asked to stop for good: 128 + SIGTERM."""
DEADLINE = 124
"""The code given to `end` when a stop request was not answered in time (the code of timeout(1))."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended and what its script does next."""

    outcome: str  # finished, stopped or failed
    action: str  # exit or requeue
    exit_code: int  # of the job script, where the action is exit
    reason: str | None = None


def decide(code: int, signal: str | None, whole: bool, failures: int, max_failures: int) -> Ending:
    """What follows the end of an attempt. Pure.

    code: exit status of the training processes (DEADLINE: they did not answer a stop request).
    signal: USR1 (wall time), TERM (preempted, cancelled) or None, when nobody asked it to stop.
    whole: the run's output has its manifest.
    failures: failed attempts since the last progress, before this one.
    """
    if whole:
        # the manifest is written last: what breaks after it (a thread at interpreter exit, say) costs nothing
        return Ending("finished", "exit", 0)
    if signal == "USR1":
        # planned: never a failure, whether the processes answered or the deadline came first
        late = code not in (STOPPED, 0)
        return Ending("stopped", "requeue", 0, f"left without saving (status {code})" if late else None)
    if signal is not None or code == STOPPED:
        # preempted jobs are requeued by SLURM itself; cancelled ones are to end
        return Ending("stopped", "exit", ASKED, "stopped on request")
    reason = f"exit status {code}" if code else "ended without a complete output"
    if failures + 1 < max_failures:
        return Ending("failed", "requeue", 0, reason)
    return Ending("failed", "exit", code or 1, f"{reason}; gave up after {failures + 1} failures without progress")


def begin(run: RunDirectory, job_id: str, node: str) -> int | None:
    """Open the next attempt in the ledger and return its number; None where the run is finished.

    Raises RuntimeError when an input of the run is not a complete output.
    """
    if manifest.problem(run.model) is None:
        return None
    for name, source in run.read_config()["inputs"].items():
        folder = Path(source["path"]) if source and source.get("run_dir") else None
        if folder is not None and (why := manifest.problem(folder)):
            raise RuntimeError(f"inputs.{name}={folder}: not a complete output ({why})")
    attempt = summarise(ledger.read(run.ledger)).attempts + 1
    ledger.append(run.ledger, "attempt_started", attempt=attempt, job_id=job_id, node=node)
    return attempt


def end(run: RunDirectory, attempt: int, code: int, signal: str | None) -> Ending:
    """Close the attempt in the ledger and decide what follows."""
    history = summarise(ledger.read(run.ledger))
    whole = manifest.problem(run.model) is None
    max_failures = run.read_config()["slurm"]["max_failures"]
    ending = decide(code, signal, whole, history.failures, max_failures)
    failures = history.failures + 1 if ending.outcome == "failed" else history.failures
    write_atomic(run.failure_count, f"{failures}\n")
    ledger.append(
        run.ledger, "attempt_ended", attempt=attempt, code=code, outcome=ending.outcome, action=ending.action,
        reason=ending.reason,
    )  # fmt: skip
    return ending


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "stop", "end"):
        command = commands.add_parser(name)
        command.add_argument("run_dir", type=Path)
        if name == "begin":
            command.add_argument("--job-id", required=True)
            command.add_argument("--node", required=True)
            continue
        command.add_argument("--attempt", type=int, required=True)
        command.add_argument("--signal", default="")
        if name == "end":
            command.add_argument("--code", type=int, required=True)
    args = parser.parse_args(argv)
    run = RunDirectory(args.run_dir)
    if args.command == "begin":
        try:
            attempt = begin(run, args.job_id, args.node)
        except (RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if attempt is None:
            print(f"{run.root} is finished: nothing to do", file=sys.stderr)
            return DONE
        print(attempt)
    elif args.command == "stop":
        run.request_stop(args.attempt)
        ledger.append(run.ledger, "stop_requested", attempt=args.attempt, signal=args.signal)
    else:
        ending = end(run, args.attempt, args.code, args.signal or None)
        print(ending.action if ending.action == "requeue" else f"exit {ending.exit_code}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
