"""What a ledger says about its run so far. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from post_training.run.ledger import Event

FAILED = ("crashed", "out_of_memory", "hung", "failed")
"""Outcomes that count against slurm.max_failures; "failed" is what ledgers of version 0.1 say."""


@dataclass
class History:
    """A run's story up to its ledger's last line."""

    job_id: str | None = None  # of the newest submission
    cluster: str | None = None
    attempts: int = 0
    failures: int = 0  # attempts that failed since the last progress
    attempts_without_progress: int = 0  # ended ones, however they ended
    running: bool = False  # an attempt began and has not ended, as far as the ledger knows
    stopping: bool = False  # the running attempt was asked to stop
    stop_signal: str | None = None  # by which signal: USR1 or TERM
    answered: bool = False  # the running attempt saved and left on request
    training: bool = False  # the running attempt has reached its first step
    nodes: list[str] = field(default_factory=list)  # of the newest attempt; the job script runs on the first
    slurm_cluster: str = ""  # SLURM's name of the cluster of the newest attempt
    attempt_started: float | None = None  # seconds since the epoch, newest attempt
    attempt_ended: float | None = None
    submitted: float | None = None
    checkpoint_step: int = 0  # newest complete checkpoint
    last_step: int = 0  # highest step that any attempt is known to have done
    lost_nodes: Counter[str] = field(default_factory=Counter)  # how often each node was lost, or failed its check
    outcome: str | None = None  # of the last ended attempt, see run.life
    action: str | None = None  # what followed: requeue or exit
    gave_up: bool = False  # the run ended itself: no further attempt follows by itself
    reason: str | None = None  # why the run was cancelled or gave up
    cancelled: bool = False
    cancel_wish: str | None = None  # who asked for the newest submission to be cancelled; stands until the next one
    cancel_job: str | None = None  # the job that this was about
    held_by: str | None = None  # who asked for it to be held, and did not release it

    @property
    def failed(self) -> bool:
        """Whether the last ended attempt counts as a failure."""
        return self.outcome in FAILED

    def _forget_the_end(self) -> None:
        self.cancelled, self.reason, self.outcome, self.action, self.gave_up = False, None, None, None, False

    def _not_running(self) -> None:
        self.running = self.stopping = self.training = self.answered = False
        self.stop_signal = None


FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "submitted": {"job_id": str, "cluster": str, "time": (int, float)},
    "attempt_started": {"attempt": int, "job_id": str, "time": (int, float)},
    "checkpoint_saved": {"step": int},
    "attempt_ended": {"outcome": str, "action": str, "reason": (str, type(None)), "time": (int, float)},
    "cancelled": {"reason": str},
    "asked": {"what": str, "user": str, "job_id": str},
}
"""What an event must have to be folded; one that lacks it (damaged, of another version) is passed over."""


def is_sound(event: Event) -> bool:
    """Whether an event has what `summarise` takes from it."""
    needs = FIELDS.get(event["event"])
    if needs is None:
        return True
    for name, kind in needs.items():  # noqa: SIM110 (`all` of a generator takes twice the time, and status asks often)
        if not isinstance(event.get(name), kind):
            return False
    return True


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def summarise(events: Iterable[Event], sound: bool = False) -> History:
    """Fold a ledger's events into one History. sound: all of them are known to be."""
    history = History()
    for event in events:
        if not (sound or is_sound(event)):
            continue
        match event["event"]:
            case "submitted":
                history.submitted, history.cluster = event["time"], event["cluster"]
                if history.running and history.job_id == event["job_id"]:
                    continue  # the job began before its submission was written down
                if history.cancel_job != event["job_id"] or event["cluster"] == "local":
                    history.cancel_wish = history.cancel_job = history.held_by = None
                history.failures = 0  # whoever submits a run again wants all of its attempts
                history.attempts_without_progress = 0
                history.job_id = event["job_id"]
                history._forget_the_end()
                history._not_running()
            case "restarted":
                history.checkpoint_step = 0
            case "attempt_started":
                history.attempts = event["attempt"]
                history.job_id = event["job_id"]
                history.nodes = _names(event.get("nodes"))
                history.slurm_cluster = str(event.get("slurm_cluster") or "")
                history.attempt_started, history.attempt_ended = event["time"], None
                history._forget_the_end()
                history._not_running()
                history.running = True
            case "training_started":
                history.training = True
            case "stop_requested":
                history.stopping, history.stop_signal = True, event.get("signal") or history.stop_signal
            case "stopped":
                history.answered = True
            case "checkpoint_saved":
                history.last_step = max(history.last_step, event["step"])
                if event["step"] > history.checkpoint_step:
                    history.checkpoint_step = event["step"]
                    history.failures = 0
                    # the attempt that saved has made progress; its own end is not counted either
                    history.attempts_without_progress = -1 if history.running else 0
            case "attempt_ended":
                history._not_running()
                history.attempt_ended = event["time"]
                history.outcome, history.action = event["outcome"], event["action"]
                history.reason = event.get("reason")
                history.attempts_without_progress += 1
                history.failures += event["outcome"] in FAILED
                history.gave_up = event.get("gave_up", event["outcome"] in FAILED and event["action"] == "exit") is True
                history.lost_nodes.update(_names(event.get("lost_nodes")))
                if isinstance(event.get("step"), int):
                    history.last_step = max(history.last_step, event["step"])
            case "asked":
                if event["what"] == "cancel":
                    history.cancel_wish, history.cancel_job = event["user"], event["job_id"]
                elif event["what"] in ("hold", "release"):
                    history.held_by = event["user"] if event["what"] == "hold" else None
            case "cancelled":
                history.cancelled, history.reason = True, event.get("reason")
                history._not_running()
    return history
