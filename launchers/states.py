"""The state of a run in one word and a reason in plain words, from what the sources say. Pure."""

from __future__ import annotations

import time

from launchers import slurm
from post_training.run.history import History

STATES = ("waiting", "queued", "running", "stopping", "requeued", "done", "gated", "failed", "cancelled", "unknown")

PENDING = {
    "None": "SLURM has not looked at it yet",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "Dependency": "waits for other jobs",
    "DependencyNeverSatisfied": "an upstream job failed: can never start",
    "BeginTime": "held for a moment after a requeue",
    "JobHeldUser": "held by the user: python -m launchers.release",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "the sweep's limit of jobs at a time is reached",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "NodeDown": "a node it needs is down",
    "BadConstraints": "no node has what it asks for",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionNodeLimit": "asks for more nodes than the partition gives",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "QOSMaxCpuPerUserLimit": "you use as many CPUs as the QOS allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the QOS allows",
    "QOSMaxNodePerUserLimit": "you use as many nodes as the QOS allows",
    "QOSMaxWallDurationPerJobLimit": "asks for more time than the QOS gives",
    "AssocMaxJobsLimit": "you run as many jobs as your account allows",
    "AssocGrpGRES": "your account's GPUs are all in use",
    "MaxGRESPerAccount": "your account's GPUs are all in use",
    "AssocGrpNodeLimit": "your account's nodes are all in use",
    "AssocGrpCpuLimit": "your account's CPUs are all in use",
    "AssocGrpGRESMinutes": "your account's GPU hours are used up",
    "AssocGrpCPUMinutesLimit": "your account's CPU hours are used up",
    "AssocGrpBillingMinutes": "your account's budget is used up",
    "JobLaunchFailure": "its last start failed; SLURM tries again",
    "launch_failed_requeued_held": "its start failed: held; python -m launchers.repair",
    "job_requeued_in_held_state": "requeued and held: python -m launchers.release",
    "Prolog": "the nodes are being made ready",
    "Cleaning": "its last attempt is being cleaned up",
    "NodeFailure": "a node failed; SLURM starts it again",
}
"""SLURM's reasons of a pending job in plain words."""

ENDED = {
    "FAILED": "failed",
    "TIMEOUT": "was killed at its wall time",
    "OUT_OF_MEMORY": "ran out of memory on a node",
    "NODE_FAIL": "lost a node, and SLURM did not requeue it",
    "BOOT_FAIL": "found its nodes not able to boot",
    "DEADLINE": "passed its deadline",
}
"""SLURM's states of a job that ended badly in plain words."""

OUTCOMES = {
    "preempted": "was preempted",
    "node_lost": "lost a node",
    "out_of_memory": "ran out of memory",
    "crashed": "crashed",
    "failed": "crashed",
    "hung": "hung",
    "cancelled": "was cancelled",
}
"""How an attempt ended, in plain words, where it neither finished nor left because its time was up."""


def pending_reason(reason: str) -> str:
    """SLURM's reason of a pending job in plain words."""
    word = reason.split(",")[0].strip().replace(" ", "_")  # SLURM writes some with blanks
    if word.startswith("Nodes_required_for_job_are"):
        word = "ReqNodeNotAvail"
    if word in PENDING:
        return PENDING[word]
    if word.startswith("QOS"):
        return f"a limit of the QOS is reached ({word})"
    if word.startswith(("Assoc", "MaxCpuPerAccount")):
        return f"a limit of your account is reached ({word})"
    return f"SLURM says: {reason}"


def clock(moment: float, now: float) -> str:
    """A moment as local time: 14:30 today, otherwise with its day."""
    try:
        there, here = time.localtime(moment), time.localtime(now)
    except (OverflowError, ValueError, OSError):
        return "a time far off"
    same_day = there[:3] == here[:3]
    return time.strftime("%H:%M" if same_day else "%a %H:%M" if abs(moment - now) < 6 * 86400 else "%Y-%m-%d", there)


def roughly(seconds: float) -> str:
    """A duration in its greatest unit: 40 s, 12 min, 2 h, 3 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "days" else 1) * size - size / 120:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def expected(start: float, now: float) -> str:
    """When SLURM means to start a pending job, in plain words."""
    if start <= now:
        return "SLURM expects to start it at any moment"
    return f"SLURM expects to start it at {clock(start, now)}, in {roughly(start - now)}"


# ------------------------------------------------------------------------------------------ the state


def row_state(
    history: History,
    output_problem: str | None,
    job: slurm.JobRecord | slurm.Unknown | None,
    local_alive: bool,
    waits_for: tuple[str, ...] = (),
) -> tuple[str, str | None]:
    """A run's state and why, from what the sources say. Pure.

    output_problem: why its output is not complete; None where it is.
    job: what squeue says; None where SLURM does not know the job.
    local_alive: a local supervisor or its job has the run.
    waits_for: upstream runs that are not done.
    """
    if output_problem is None:
        return "done", None
    if history.job_id is None and not history.cancelled:
        if isinstance(job, slurm.Unknown):
            return "unknown", f"{_first_line(job.why)} (the ledger says: not submitted yet)"
        return "waiting", "not submitted yet"
    if is_local(history):
        return _local_state(history, output_problem, waits_for) if local_alive else _gone(history, output_problem)
    if isinstance(job, slurm.Unknown):
        if history.cancelled or history.gave_up:
            return _gone(history, output_problem)
        last = "running" if history.running else history.outcome or "submitted"
        return "unknown", f"{_first_line(job.why)} (the ledger says: {last})"
    if job is None:
        return _gone(history, output_problem)
    return _slurm_state(history, output_problem, job, waits_for)


def _first_line(why: str) -> str:
    return why.splitlines()[0] if why else "SLURM did not answer"


def last_end(history: History) -> str | None:
    """How the last attempt ended, in plain words; None where that needs no word."""
    words = OUTCOMES.get(history.outcome or "")
    if words is None:
        return history.reason if history.action == "requeue" else None
    return f"the last attempt {words}" + (f": {history.reason}" if history.reason else "")


def _again(history: History, reason: str) -> str:
    """Why a run that is to go on does not yet, and what its last attempt came to."""
    return f"{reason}; {why}" if (why := last_end(history)) else reason


def is_local(history: History) -> bool:
    """Whether the run's newest submission was to a local supervisor."""
    return history.cluster == "local" or (history.job_id or "").startswith("local-")


def _starting(history: History) -> str | None:
    return None if history.training else "starting"


def _local_state(history: History, output_problem: str, waits_for: tuple[str, ...]) -> tuple[str, str | None]:
    if history.running:
        return ("stopping", "asked to save and leave") if history.stopping else ("running", _starting(history))
    if history.action == "requeue":
        return "requeued", last_end(history) or "starts again at once"
    if history.cancelled or history.outcome is not None:
        return _gone(history, output_problem)
    if waits_for:
        return "waiting", f"waits for {', '.join(waits_for)}"
    return "queued", "waits for free cores"


def _gone(history: History, output_problem: str) -> tuple[str, str | None]:
    """The state of a run that nothing runs any more: what the ledger ends with."""
    local, job = is_local(history), history.job_id
    who = "its supervisor and its job are gone" if local else f"SLURM no longer knows job {job}"
    onward = "; the same command goes on" if local else ""
    if history.cancelled:
        return "cancelled", history.reason
    if history.running:
        return "failed", f"{who} and the run did not finish{onward}"
    if history.gave_up:
        return "failed", _end(history)
    if history.outcome in ("stopped", "cancelled") and history.action == "exit":
        return "cancelled", history.reason or "stopped on request"
    if history.outcome == "finished":
        return "failed", f"it finished, but its output is not complete: {output_problem}"
    if history.action == "requeue" or history.outcome == "preempted":
        return "failed", _again(history, f"{who} and it was to be started again{onward}")
    return "cancelled", f"{who} and it never started{onward}"


def _end(history: History) -> str | None:
    """Why a run gave up."""
    words = OUTCOMES.get(history.outcome or "")
    if words in (None, "crashed"):
        return history.reason or words
    return f"{words}: {history.reason}" if history.reason else words


def _slurm_state(
    history: History, output_problem: str, job: slurm.JobRecord, waits_for: tuple[str, ...]
) -> tuple[str, str | None]:
    begun = history.attempt_started is not None and history.attempt_started >= (history.submitted or 0)
    ended = history.gave_up
    if history.cancelled and not job.live:
        return _gone(history, output_problem)
    match job.state:
        case "PENDING":
            if job.reason == "DependencyNeverSatisfied":
                return "waiting", PENDING[job.reason]
            if begun:
                return "requeued", _again(history, pending_reason(job.reason))
            if job.reason == "Dependency":
                return "waiting", f"waits for {', '.join(waits_for)}" if waits_for else PENDING["Dependency"]
            return "queued", pending_reason(job.reason)
        case "CONFIGURING":
            return "queued", "the nodes are being made ready"
        case "REQUEUED" | "REQUEUE_FED":
            return "requeued", "SLURM is requeueing it"
        case "REQUEUE_HOLD" | "SPECIAL_EXIT":
            return "requeued", "held: python -m launchers.release"
        case "PREEMPTED":
            return "requeued", "preempted by a job that comes first"
        case "RUNNING" | "SUSPENDED" | "STOPPED" | "RESIZING" | "SIGNALING" | "STAGE_OUT":
            if history.cancelled or history.stopping or history.cancel_wish:
                return "stopping", "asked to save and leave"
            if job.state != "RUNNING":
                return "running", f"{job.state.lower().replace('_', ' ')} by SLURM"
            if not history.running and history.action == "requeue":
                return "requeued", "SLURM is about to requeue it"
            return "running", _starting(history)
        case "COMPLETING":
            if ended or history.cancelled:
                return _gone(history, output_problem)
            return ("requeued", "SLURM is requeueing it") if history.action == "requeue" else ("stopping", "ending")
        case "CANCELLED":
            return _gone(history, output_problem) if ended or history.cancelled else ("cancelled", "scancel")
        case "COMPLETED":
            return "failed", f"job {job.job_id} ended without a complete output: {output_problem}"
        case state if state in ENDED:
            return "failed", (_end(history) if ended else None) or f"job {job.job_id} {ENDED[state]}"
        case _:
            return "unknown", f"SLURM says: {job.state}"
