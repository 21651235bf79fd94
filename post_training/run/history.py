"""What a ledger says about its run so far. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from post_training.run.ledger import Event


@dataclass
class History:
    """A run's story up to its ledger's last line."""

    job_id: str | None = None  # of the newest submission
    cluster: str | None = None
    attempts: int = 0
    failures: int = 0  # attempts that failed since the last progress
    running: bool = False  # an attempt began and has not ended, as far as the ledger knows
    stopping: bool = False  # the running attempt was asked to stop
    training: bool = False  # the running attempt has reached its first step
    attempt_started: float | None = None  # seconds since the epoch, newest attempt
    attempt_ended: float | None = None
    submitted: float | None = None
    checkpoint_step: int = 0  # newest complete checkpoint
    outcome: str | None = None  # of the last ended attempt: finished, stopped, failed
    action: str | None = None  # what followed: requeue or exit
    reason: str | None = None  # why the run was cancelled or gave up
    cancelled: bool = False


FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "submitted": {"job_id": str, "cluster": str, "time": (int, float)},
    "attempt_started": {"attempt": int, "job_id": str, "time": (int, float)},
    "checkpoint_saved": {"step": int},
    "attempt_ended": {"outcome": str, "action": str, "reason": (str, type(None)), "time": (int, float)},
    "cancelled": {"reason": str},
}
"""What an event must have to be folded; one that lacks it (damaged, of another version) is passed over."""


def is_sound(event: Event) -> bool:
    """Whether an event has what `summarise` takes from it."""
    needs = FIELDS.get(event["event"], {})
    return all(isinstance(event.get(name), kind) for name, kind in needs.items())


def summarise(events: Iterable[Event]) -> History:
    """Fold a ledger's events into one History."""
    history = History()
    for event in events:
        if not is_sound(event):
            continue
        match event["event"]:
            case "submitted":
                history.failures = 0  # whoever submits a run again wants all of its attempts
                history.job_id, history.cluster = event["job_id"], event["cluster"]
                history.submitted = event["time"]
                history.cancelled, history.reason, history.outcome, history.action = False, None, None, None
                history.running = history.stopping = history.training = False
            case "attempt_started":
                history.attempts = event["attempt"]
                history.job_id = event["job_id"]
                history.attempt_started, history.attempt_ended = event["time"], None
                history.running, history.stopping, history.training = True, False, False
                history.cancelled, history.reason, history.outcome, history.action = False, None, None, None
            case "training_started":
                history.training = True
            case "stop_requested":
                history.stopping = True
            case "checkpoint_saved":
                if event["step"] > history.checkpoint_step:
                    history.checkpoint_step = event["step"]
                    history.failures = 0
            case "attempt_ended":
                history.running = history.stopping = history.training = False
                history.attempt_ended = event["time"]
                history.outcome, history.action = event["outcome"], event["action"]
                history.reason = event.get("reason")
                if event["outcome"] == "failed":
                    history.failures += 1
            case "cancelled":
                history.cancelled, history.reason = True, event.get("reason")
                history.running = history.stopping = history.training = False
    return history
