"""Where a run's time went: a name for every second of its ledger, goodput, and how often to save. Pure.

The names, from the first submission on:

    queued      submitted, and no attempt began yet; waiting for upstream stages included
    hold        between an attempt that is to go on and the next one: requeue hold and queue
    startup     an attempt's start to its first step
    steps       steps that count: the first time that each was done
    redone      steps that an earlier attempt had done and lost
    saving      checkpoints
    evaluation  evaluation
    teardown    after the last record of an attempt that left in order, to its end
    lost        after the last record of an attempt that did not: half a step, a hang, a node's unnoticed death
    stopped     nobody means to go on: after giving up or being cancelled, until the run is submitted again

An attempt measures startup to evaluation itself (`seconds` of attempt_ended or progress.json); the rest follows from
the ledger's times. Where the two disagree (clocks of several nodes), nothing gets negative and the sum stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from post_training.run.history import is_sound
from post_training.run.ledger import Event

MEASURED = ("startup", "steps", "redone", "saving", "evaluation")
NAMES = ("queued", "hold", *MEASURED, "teardown", "lost", "stopped")
CAUSES = {"stopped": "planned_stop", "failed": "crashed"}
"""What an attempt's outcome is called as a cause, where it is not called by its own name."""
ENDED_BY_ITSELF = ("crashed", "hung", "out_of_memory", "node_lost", "unknown")
"""Causes that nobody asked for. unknown: the attempt's end was never recorded."""


@dataclass(frozen=True)
class Account:
    """The time of a run, or of several. Seconds; `seconds` holds every name and sums to `wall`.

    lost_by_cause names all time that was no step, no evaluation, no queue and no stop. Hold, start-up and redone
    steps of an attempt are charged to the end of the one before (planned_stop, preempted, node_lost, out_of_memory,
    crashed, hung, cancelled, restarted, unknown), what an attempt lost at its end to that end; the rest stands under
    first_startup, saving and teardown.
    """

    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    lost_by_cause: dict[str, float] = field(default_factory=dict)
    held: float = 0.0  # inside attempts
    failures: int = 0  # attempts that ended unasked: crashes, hangs, lost nodes, preemptions without a save
    outcome: str | None = None  # of the newest attempt; None while it runs

    @property
    def goodput(self) -> float | None:
        """Share of the held time that went into steps that count and evaluation; None where nothing was held."""
        useful = self.seconds["steps"] + self.seconds["evaluation"]
        return useful / self.held if self.held > 0 else None


@dataclass(frozen=True)
class Span:
    """What a run was doing between two moments: one attempt, or a wait between two."""

    start: float  # seconds since the epoch
    end: float
    seconds: dict[str, float]  # by name; adds up to end - start
    attempt: int | None = None  # None: no attempt ran
    cause: str | None = None  # how the attempt ended, as in Account.lost_by_cause, or finished; None while it runs


@dataclass
class _Attempt:
    """One attempt as the ledger tells it; times in milliseconds."""

    number: int
    job_id: str
    restarted: bool  # the run began anew with it
    sign: int  # its last sign of life
    training: int | None = None  # when it came to its first step
    saving: int = 0
    saved: bool = False
    answered: bool = False  # it saved and left on request
    cancelled: bool = False
    superseded: bool = False  # it was never closed, and the run was submitted again
    outcome: str | None = None
    seconds: dict[str, int] | None = None
    measured_until: int | None = None
    phase: str = "startup"

    @property
    def cause(self) -> str:
        if self.cancelled and self.outcome != "finished":
            return "cancelled"
        return CAUSES.get(self.outcome or "unknown", self.outcome or "unknown")

    def measure(self, report: Mapping[str, Any], until: object) -> None:
        """Take over what rank 0 measured."""
        seconds = report.get("seconds")
        if isinstance(seconds, dict):
            self.seconds = {name: _milliseconds(seconds.get(name)) or 0 for name in MEASURED}
            self.measured_until = _milliseconds(until)

    def shares(self, start: int, end: int, tail: str | None) -> dict[str, int]:
        """Its time by name; `tail` names what came after its last sign of life."""
        if self.seconds is None:
            phases = self._from_events(start)
            until = self.sign
        else:
            phases = self.seconds
            until = max(self.measured_until or self.sign, start + sum(phases.values()))
        until = min(max(until, start), end)
        total = sum(phases.values())
        if total > until - start:
            phases = {name: value * (until - start) // total for name, value in phases.items()}
        shares = dict.fromkeys(NAMES, 0) | phases
        # before the process had a clock: the script, and the start of the interpreter
        shares["startup"] += until - start - sum(phases.values())
        shares[tail or self._tail()] += end - until
        return shares

    def _from_events(self, start: int) -> dict[str, int]:
        """An estimate for an attempt that measured nothing: what it did until its last event."""
        if self.training is None:
            return {"startup": max(0, self.sign - start)}
        steps = max(0, self.sign - self.training - self.saving)
        return {"startup": max(0, self.training - start), "saving": self.saving, "steps": steps}

    def _tail(self) -> str:
        if self.outcome == "finished" and self.seconds is None and not self.saved:
            return "evaluation"  # trainers save their last step: only an evaluation finishes without
        return "teardown" if self.outcome == "finished" or self.answered else "lost"


def account(
    events: Iterable[Event],
    progress: Mapping[str, Any] | None = None,
    now: float | None = None,
    since_last_sign: str | None = None,
    sound: bool = False,
) -> Account:
    """Name every second from the first submission to the end, or to `now`. Pure.

    events: a ledger's; ones that are not sound are passed over.
    progress: progress.json of the running attempt.
    now: epoch seconds; None: as far as the events tell.
    since_last_sign: what the time since the run's last sign of life is, where that is known from elsewhere: "stopped"
    (SLURM has forgotten the job) or "lost" (it was requeued, and its attempt is not closed); None: what it did then.
    sound: all events are known to be.
    """
    return _tally(_marks(events, progress, now, sound), since_last_sign)


def spans(
    events: Iterable[Event],
    progress: Mapping[str, Any] | None = None,
    now: float | None = None,
    since_last_sign: str | None = None,
) -> list[Span]:
    """The same time as `account`'s in its order: attempts, and what lies between them. Arguments as there. Pure."""
    found = []
    for start, end, state, shares, live in _pieces(_marks(events, progress, now), since_last_sign):
        seconds = {name: value / 1000 for name, value in shares.items() if value}
        if isinstance(state, _Attempt):
            found.append(Span(start / 1000, end / 1000, seconds, state.number, None if live else state.cause))
        elif end > start:
            found.append(Span(start / 1000, end / 1000, seconds))
    return found


def _marks(
    events: Iterable[Event], progress: Mapping[str, Any] | None, now: float | None, sound: bool = False
) -> list[_Mark]:
    """What the run was doing from which moment on, with the moment at which the telling ends as the last one."""
    limit = _milliseconds(now)
    marks, latest = _timeline(events, limit, sound)
    if not marks:
        return []
    last = marks[-1][1]
    attempts = {state.number: state for _, state in marks if isinstance(state, _Attempt)}
    if progress is not None and isinstance(number := progress.get("attempt"), int) and number in attempts:
        attempt = attempts[number]
        if attempt.seconds is None:
            attempt.measure(progress, progress.get("time"))
            if progress.get("phase") in MEASURED:
                attempt.phase = progress["phase"]
    end = latest if limit is None else limit
    if limit is None and isinstance(last, _Attempt) and last.measured_until is not None:
        end = max(end, last.measured_until)
    if last != "over":
        marks.append((end, "over"))
    return marks


_Mark = tuple[int, "str | _Attempt"]


def _timeline(events: Iterable[Event], limit: int | None, sound: bool = False) -> tuple[list[_Mark], int]:
    """What the run was doing from which moment on, and the newest moment. Clocks that go back stand still."""
    marks: list[_Mark] = []
    clock, restarted = 0, False
    for event in events:
        time = _milliseconds(event.get("time"))
        if time is None or not (sound or is_sound(event)):
            continue
        if limit is not None and time > limit:
            time = limit
        if time > clock:
            clock = time
        state = marks[-1][1] if marks else None
        running = state if type(state) is _Attempt else None
        if running is not None and event.get("attempt", running.number) == running.number:
            own = running  # what an earlier attempt's surviving ranks write is not the newest one's
        else:
            own = None
        match event["event"]:
            case "submitted":
                if running is not None:
                    if running.job_id == event["job_id"]:
                        continue  # the job began before its submission was written down
                    running.superseded = True
                marks.append((clock, "queued"))
            case "restarted":
                restarted = True
            case "attempt_started":
                if state == "stopped" and _newest(marks, None, "stopped") is not None:
                    marks[-1] = (marks[-1][0], "hold")  # asked to leave, and requeued by SLURM: a preemption
                attempt = _Attempt(event["attempt"], event["job_id"], restarted, clock)
                marks.append((clock, attempt))
                restarted = False
            case "training_started" if own is not None:
                own.training = own.sign = clock
                own.phase = "steps"
            case "checkpoint_saved" if own is not None:
                own.sign, own.saved = clock, True
                own.saving += _milliseconds(event.get("seconds")) or 0
            case "stopped" if own is not None:
                own.sign, own.answered = clock, True
            case "attempt_ended":
                ended = _newest(marks, event.get("attempt"))
                if ended is None:
                    continue
                ended.outcome = event["outcome"]
                ended.measure(event, event.get("measured_until"))
                if ended is running:
                    marks.append((clock, _after(ended, event["action"])))
            case "cancelled":
                if running is not None:
                    running.cancelled = True
                elif marks and state != "over":
                    marks.append((clock, "stopped"))
    return marks, clock


def _newest(marks: list[_Mark], number: object, outcome: str | None = None) -> _Attempt | None:
    """The newest attempt, or the one of this number; None where it is not there or ended otherwise."""
    attempts = [s for _, s in marks if isinstance(s, _Attempt) and (not isinstance(number, int) or s.number == number)]
    return attempts[-1] if attempts and outcome in (None, attempts[-1].outcome) else None


def _after(attempt: _Attempt, action: str) -> str:
    if attempt.outcome == "finished":
        return "over"
    return "hold" if action == "requeue" or attempt.outcome == "preempted" else "stopped"


_Piece = tuple[int, int, "str | _Attempt", dict[str, int], bool]


def _pieces(marks: list[_Mark], since_last_sign: str | None) -> Iterator[_Piece]:
    """Between each two marks: start, end, what the run was doing, its milliseconds by name, and whether it still is."""
    for index, ((start, state), (end, following)) in enumerate(pairwise(marks)):
        newest = index == len(marks) - 2 and following == "over"
        if not isinstance(state, _Attempt):
            name = "stopped" if state == "over" else state
            if newest and name in ("queued", "hold") and since_last_sign == "stopped":
                name = "stopped"
            yield start, end, state, {name: end - start}, newest
            continue
        live = newest and state.outcome is None
        tail = None
        if state.superseded or (live and state.cancelled):
            tail = "stopped"
        elif live:
            tail = since_last_sign or state.phase
        yield start, end, state, state.shares(start, end, tail), live


def _tally(marks: list[_Mark], since_last_sign: str | None) -> Account:
    """Add up the time between the marks, each under its name and each loss under its cause."""
    if not marks:
        return Account()
    total = dict.fromkeys(NAMES, 0)
    lost: dict[str, int] = {}
    held = failures = 0
    before: str | None = None  # cause of the last attempt's end
    outcome = None

    def charge(cause: str, value: int) -> None:
        if value:
            lost[cause] = lost.get(cause, 0) + value

    for start, end, state, shares, live in _pieces(marks, since_last_sign):
        for name, value in shares.items():
            total[name] += value
        if not isinstance(state, _Attempt):
            charge(before or "unknown", shares.get("hold", 0))
            continue
        held += end - start - shares["stopped"]
        charged = "restarted" if state.restarted else before
        charge(charged or "first_startup", shares["startup"])
        charge(charged or "unknown", shares["redone"])
        charge(state.cause, shares["lost"])
        charge("saving", shares["saving"])
        charge("teardown", shares["teardown"])
        before, outcome = state.cause, state.outcome
        if not live or state.cancelled:
            failures += before in ENDED_BY_ITSELF or (before == "preempted" and not state.answered)
    return Account(
        wall=(marks[-1][0] - marks[0][0]) / 1000,
        seconds={name: value / 1000 for name, value in total.items()},
        lost_by_cause={cause: value / 1000 for cause, value in sorted(lost.items(), key=lambda item: -item[1])},
        held=held / 1000,
        failures=failures,
        outcome=outcome,
    )


def _milliseconds(value: object) -> int | None:
    """Seconds as whole milliseconds, so that sums are exact; None for what is no time."""
    if type(value) is not float and type(value) is not int:  # no isinstance: a look asks a million times; no bool
        return None
    return round(value * 1000) if 0 <= value < 1e300 else None  # not: NaN, infinity


def together(accounts: Iterable[Account]) -> Account:
    """The accounts of several runs as one: every second of each counts the same."""
    wall = held = 0.0
    failures = 0
    seconds = dict.fromkeys(NAMES, 0.0)
    lost: dict[str, float] = {}
    for one in accounts:
        wall, held, failures = wall + one.wall, held + one.held, failures + one.failures
        for name, value in one.seconds.items():
            seconds[name] = round(seconds[name] + value, 3)
        for cause, value in one.lost_by_cause.items():
            lost[cause] = round(lost.get(cause, 0.0) + value, 3)
    lost = dict(sorted(lost.items(), key=lambda item: -item[1]))
    return Account(round(wall, 3), seconds, lost, round(held, 3), failures)


# -------------------------------------------------------------------------------- how often to save


def save_interval(save_seconds: float, mttf_seconds: float) -> float:
    """Seconds of work between two saves that waste the least time on saves and on redone steps.

    save_seconds: time of one save. mttf_seconds: mean time to failure; failures come at random (exponential).
    Young's first order (1974), sqrt(2 d M), in Daly's higher-order form (2006), which holds for d < 2 M; beyond that
    the interval is M. It wastes at most 0.2 % more than the best one. Raises ValueError for a negative save or no mttf.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006, eq. 37.
    """
    if not (save_seconds >= 0 and mttf_seconds > 0):
        raise ValueError(f"save_seconds={save_seconds}, mttf_seconds={mttf_seconds}: must be at least 0, and above 0")
    if save_seconds >= 2 * mttf_seconds:
        return mttf_seconds
    half = save_seconds / (2 * mttf_seconds)
    return math.sqrt(2 * save_seconds * mttf_seconds) * (1 + math.sqrt(half) / 3 + half / 9) - save_seconds


def mttf(held_seconds: float, failures: int, prior_seconds: float) -> float:
    """Mean time to failure from what was seen: `prior_seconds` before the first failure, then more and more the data.

    The prior counts as one failure in that time (the mean of a gamma prior's rate, inverted).
    """
    return (prior_seconds + held_seconds) / (1 + failures)


def seconds_between_saves(events: Iterable[Event], prior_seconds: float, now: float | None = None) -> float | None:
    """The save interval that a ledger's saves and failures ask for; None before the first measured save."""
    events = list(events)
    saves = [
        milliseconds / 1000
        for event in events
        if event["event"] == "checkpoint_saved" and (milliseconds := _milliseconds(event.get("seconds"))) is not None
    ]
    if not saves:
        return None
    seen = account(events, now=now)
    return save_interval(statistics.median(saves), mttf(seen.held, seen.failures, prior_seconds))
