"""Whether a drill was passed, judged on what was recorded of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]

COMPARED = ("loss", "grad_norm", "learning_rate", "reward", "rewards/chosen", "completion_length", "num_tokens")
"""Logged values that are equal to the bit in two runs that see the same samples with the same weights."""
PLANNED = ("stopped", "preempted")
"""Outcomes of attempts that were asked to leave."""
CLOCK_SECONDS = 3.0
"""How far the drill's clock (it looks at squeue every second) may be from the ledger's sum."""
LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "SIGNALING"})


@dataclass(frozen=True)
class Sighting:
    """One job as squeue showed it once."""

    time: float  # seconds since the epoch
    job_id: str
    state: str
    root: str  # the run directory that its comment names


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    number: int
    kind: str
    stage: str
    state: str  # recovered; outlived (it struck, and the run ended well regardless); missed (nothing to strike); failed
    at: float | None = None  # seconds since the drill's start
    what: str = ""  # what was done to whom
    attempt: int | None = None  # the attempt that was struck
    outcome: str | None = None  # that attempt's, in the ledger
    seconds: float | None = None  # from the fault to the first step of the next attempt


@dataclass(frozen=True)
class Evidence:
    """What was recorded of one stage."""

    stage: str
    after: str | None
    root: str  # the run directory
    steps: int
    save_steps: int
    events: Sequence[Event]  # the ledger
    metrics: Sequence[Mapping[str, Any]]
    files: Mapping[str, str] | None  # the output's files with their sha256; None: no whole output
    reference_metrics: Sequence[Mapping[str, Any]]
    reference_files: Mapping[str, str] | None
    output_time: float | None = None  # when the output's manifest was written
    seen_steps: Mapping[int, int] = field(default_factory=dict)  # attempt -> highest step seen in metrics.jsonl
    damaged: Mapping[int, int] = field(default_factory=dict)  # attempt -> checkpoints the drill itself destroyed
    accounted: float | None = None  # the ledger's sum, seconds; None: not known
    wall: float | None = None  # the drill's own clock, submission to the job's end


@dataclass(frozen=True)
class Finding:
    """One rule broken."""

    rule: str
    stage: str | None
    detail: str


def judge(stages: Sequence[Evidence], sightings: Sequence[Sighting], results: Sequence[Result]) -> list[Finding]:
    """Every broken promise; none where the drill is passed."""
    by_name = {evidence.stage: evidence for evidence in stages}
    found = [
        Finding("recovery", r.stage, f"fault {r.number} ({r.kind}): {r.what}") for r in results if r.state == "failed"
    ]
    found += [
        Finding("faults", r.stage, f"fault {r.number} ({r.kind}) found nothing to strike")
        for r in results
        if r.state == "missed"
    ]
    for evidence in stages:
        rules = (
            ("weights", _weights(evidence)),
            ("one job", _one_job(evidence, sightings)),
            ("one attempt at a time", _attempts(evidence)),
            ("samples", _samples(evidence)),
            ("steps lost", _steps_lost(evidence)),
            ("ledger's sum", _sum(evidence)),
            ("dependents", _dependents(evidence, by_name.get(evidence.after or ""))),
        )
        found += [Finding(rule, evidence.stage, detail) for rule, details in rules for detail in details]
    return found


def _of(events: Sequence[Event], name: str) -> list[Event]:
    return [event for event in events if event["event"] == name]


def _weights(evidence: Evidence) -> list[str]:
    ours, theirs = evidence.files, evidence.reference_files
    if ours is None:
        return ["no whole output"]
    if theirs is None:
        return ["the undisturbed run has no whole output"]
    differ = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return [f"differ from the undisturbed run's: {', '.join(differ)}"] if differ else []


def _one_job(evidence: Evidence, sightings: Sequence[Sighting]) -> list[str]:
    mine = [s for s in sightings if s.root == evidence.root]
    ids = {e["job_id"] for e in evidence.events if "job_id" in e} | {s.job_id for s in mine}
    found = [] if len(ids) == 1 else [f"job ids {', '.join(sorted(ids)) or 'none'}, not one for life"]
    submitted = len(_of(evidence.events, "submitted"))
    if submitted != 1:
        found.append(f"submitted {submitted} times")
    live: dict[float, set[str]] = {}
    for sighting in mine:
        if sighting.state in LIVE:
            live.setdefault(sighting.time, set()).add(sighting.job_id)
    doubles = {tuple(sorted(ids)) for ids in live.values() if len(ids) > 1}
    return found + [f"jobs {', '.join(ids)} lived at the same time" for ids in sorted(doubles)]


def _attempts(evidence: Evidence) -> list[str]:
    """Attempts are numbered 1, 2, ...; each ends once, before the next begins, and leaves no trace after that.

    On a node that SLURM has given up an attempt may live on and save, until the next one begins.
    """
    found = []
    running: int | None = None
    last = 0
    for event in evidence.events:
        if event["event"] == "attempt_started":
            if running is not None:
                found.append(f"attempt {event['attempt']} began before attempt {running} had ended")
            if event["attempt"] != last + 1:
                found.append(f"attempt {event['attempt']} began after attempt {last}")
            running = last = event["attempt"]
        elif event["event"] == "attempt_ended":
            if event["attempt"] != running:
                found.append(f"attempt {event['attempt']} ended while {running or 'none'} was running")
            else:
                running = None
        elif "attempt" in event and event["attempt"] != last:
            found.append(f"{event['event']} of attempt {event['attempt']} after attempt {last} had begun")
    if running is not None:
        found.append(f"attempt {running} never ended")
    return found


def _samples(evidence: Evidence) -> list[str]:
    """Each step is logged once, with the values of the undisturbed run."""
    ours = [line for line in evidence.metrics if "loss" in line]
    steps = [line["step"] for line in ours]
    found = []
    expected = list(range(1, evidence.steps + 1))
    if steps != expected:
        missing, double = sorted(set(expected) - set(steps)), sorted({s for s in steps if steps.count(s) > 1})
        found.append(f"steps missing: {missing}, repeated: {double}, in order: {steps == sorted(steps)}")
    theirs = {line["step"]: line for line in evidence.reference_metrics if "loss" in line}
    for line in ours:
        other = theirs.get(line["step"], {})
        differ = [k for k in COMPARED if k in line and not _equal(line[k], other.get(k))]
        if differ:
            found.append(f"step {line['step']}: {', '.join(f'{k} {line[k]} not {other.get(k)}' for k in differ)}")
            break  # what follows a wrong step is wrong too
    return found


def _equal(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def lost_steps(evidence: Evidence) -> dict[int, int]:
    """Steps that had to be done again after each attempt that another one followed, by its number."""
    resumed = {e["attempt"]: e["step"] for e in _of(evidence.events, "training_started")}
    done = dict(evidence.seen_steps)
    for event in _of(evidence.events, "attempt_ended"):
        if event.get("step") is not None:
            done[event["attempt"]] = max(done.get(event["attempt"], 0), event["step"])
    lost: dict[int, int] = {}
    for attempt in sorted(done):
        after = next((resumed[n] for n in sorted(resumed) if n > attempt), None)
        if after is not None:
            lost[attempt] = max(0, done[attempt] - after)
    return lost


def _steps_lost(evidence: Evidence) -> list[str]:
    outcomes = {e["attempt"]: e.get("outcome") for e in _of(evidence.events, "attempt_ended")}
    found = []
    for attempt, lost in lost_steps(evidence).items():
        planned = outcomes.get(attempt) in PLANNED
        allowed = 0 if planned else evidence.save_steps * (1 + evidence.damaged.get(attempt, 0))
        if lost > allowed:
            found.append(f"attempt {attempt} ({outcomes.get(attempt)}) lost {lost} steps, at most {allowed} may be")
    return found


def _sum(evidence: Evidence) -> list[str]:
    if evidence.accounted is None or evidence.wall is None:
        return []
    off = evidence.accounted - evidence.wall
    if abs(off) <= CLOCK_SECONDS:
        return []
    return [f"{evidence.accounted:.1f} s in the ledger, {evidence.wall:.1f} s by the drill's clock ({off:+.1f} s)"]


def _dependents(evidence: Evidence, upstream: Evidence | None) -> list[str]:
    started = _of(evidence.events, "attempt_started")
    first = [e for e in started if e["attempt"] == 1]
    if len(first) != 1:
        return [f"started {len(first)} times for the first time"]
    if upstream is None:
        return []
    if upstream.output_time is None:
        return [f"started although {upstream.stage} has no whole output"]
    early = upstream.output_time - first[0]["time"]
    return [f"started {early:.1f} s before the output of {upstream.stage} was whole"] if early > 0 else []
