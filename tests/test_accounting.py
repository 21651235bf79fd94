"""Every second of a run has one name: against a clock of the test's own, skewed clocks, old ledgers; save intervals."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.run.accounting import (
    MEASURED,
    NAMES,
    Account,
    account,
    mttf,
    save_interval,
    seconds_between_saves,
    together,
)

T0 = 1_800_000_000.0


class Told:
    """A run that is told and timed at once: each call lets time pass, notes under which name, and writes the ledger."""

    def __init__(self) -> None:
        self.time = T0
        self.events: list[dict[str, Any]] = []
        self.truth = dict.fromkeys(NAMES, 0.0)
        self.attempts = 0
        self.phases = dict.fromkeys(MEASURED, 0.0)

    def event(self, event: str, **fields: Any) -> None:
        self.events.append({"time": round(self.time, 3), "event": event, **fields})

    def passes(self, name: str, seconds: float) -> None:
        self.time += seconds
        self.truth[name] += seconds

    def submit(self, queued: float) -> Told:
        self.event("submitted", job_id=str(self.attempts), cluster="dev")
        self.passes("queued", queued)
        return self

    def attempt(
        self, outcome: str, action: str, startup: float = 0, steps: float = 0, redone: float = 0, saving: float = 0,
        evaluation: float = 0, tail: float = 0, script: float = 0, answered: bool = False, measured: bool = True,
    ) -> Told:  # fmt: skip
        """One attempt to its end; `script` is the time before the process has a clock, `tail` what follows it."""
        self.attempts += 1
        number = self.attempts
        self.event("attempt_started", attempt=number, job_id="1", node="n1", nodes=["n1"])
        self.passes("startup", script + startup)
        if steps or redone or evaluation:
            self.event("training_started", attempt=number, step=0)
        self.passes("redone", redone)
        self.passes("steps", steps)
        self.passes("evaluation", evaluation)
        self.passes("saving", saving)
        if saving:
            self.event("checkpoint_saved", attempt=number, step=number, seconds=saving)
        if answered:
            self.event("stopped", attempt=number, step=number)
        until = self.time
        self.passes("teardown" if outcome == "finished" or answered else "lost", tail)
        seconds = {"startup": startup, "steps": steps, "redone": redone, "saving": saving, "evaluation": evaluation}
        more = {"seconds": seconds, "measured_until": until, "step": number} if measured else {}
        self.event("attempt_ended", attempt=number, code=0, outcome=outcome, action=action, reason=None, **more)
        return self

    def hold(self, seconds: float) -> Told:
        self.passes("hold", seconds)
        return self


def sums(told: Account) -> None:
    """What holds for every account."""
    assert set(told.seconds) == set(NAMES)
    assert all(value >= 0 for value in told.seconds.values())
    assert round(sum(told.seconds.values()) * 1000) == round(told.wall * 1000)
    lost = sum(told.seconds[name] for name in ("hold", "startup", "redone", "lost", "saving", "teardown"))
    assert round(sum(told.lost_by_cause.values()) * 1000) == round(lost * 1000)
    inside = sum(told.seconds[name] for name in (*MEASURED, "teardown", "lost"))
    assert round(told.held * 1000) == round(inside * 1000)
    assert told.goodput is None or 0 <= told.goodput <= 1


def test_a_night_with_a_planned_stop_a_dead_node_and_a_crash() -> None:
    run = Told().submit(queued=30)
    run.attempt("stopped", "requeue", script=2, startup=8, steps=100, saving=5, tail=3, answered=True).hold(121)
    run.attempt("node_lost", "requeue", script=2, startup=9, steps=50, saving=5, tail=300).hold(60)
    run.attempt("crashed", "requeue", script=2, startup=9, redone=20, steps=30, tail=1).hold(121)
    run.attempt("finished", "exit", script=2, startup=9, redone=10, steps=70, saving=5, evaluation=15, tail=4)
    told = account(run.events)
    sums(told)
    assert told.seconds == pytest.approx(run.truth)
    assert told.wall == pytest.approx(run.time - T0)
    assert told.lost_by_cause == pytest.approx({
        "first_startup": 10, "planned_stop": 121 + 11, "node_lost": 300 + 60 + 11 + 20, "crashed": 1 + 121 + 11 + 10,
        "saving": 15, "teardown": 3 + 4,
    })  # fmt: skip
    assert told.held == pytest.approx(118 + 366 + 62 + 115)
    assert told.goodput == pytest.approx((100 + 50 + 30 + 70 + 15) / told.held)
    assert (told.failures, told.outcome) == (2, "finished")
    assert account(run.events, now=run.time + 5000) == told  # a finished run's clock stands


@pytest.mark.parametrize("outcome", ["crashed", "hung", "out_of_memory", "node_lost", "preempted"])
def test_each_end_is_charged_to_itself(outcome: str) -> None:
    run = Told().submit(queued=1).attempt(outcome, "requeue", startup=1, steps=10, tail=7).hold(3)
    told = account(run.events, now=run.time)
    assert told.lost_by_cause == {outcome: 7 + 3, "first_startup": 1} and told.failures == 1
    run.attempt("finished", "exit", startup=2, redone=4, steps=1)
    assert account(run.events).lost_by_cause == {outcome: 7 + 3 + 2 + 4, "first_startup": 1}


def test_a_preemption_that_saved_is_no_failure() -> None:
    run = Told().submit(queued=1)
    run.attempt("preempted", "exit", startup=1, steps=10, saving=1, tail=2, answered=True).hold(9)
    told = account(run.events, now=run.time)  # SLURM requeues it by itself: the script only exits
    assert (told.failures, told.seconds["hold"], told.seconds["teardown"], told.seconds["stopped"]) == (0, 9, 2, 0)
    assert told.lost_by_cause["preempted"] == 9


def test_giving_up_is_stopped_until_it_is_submitted_again() -> None:
    run = Told().submit(queued=5).attempt("crashed", "exit", startup=1, steps=2)
    run.passes("stopped", 1000)
    told = account(run.events, now=run.time)
    assert told.seconds == run.truth and told.lost_by_cause == {"first_startup": 1} and told.held == 3
    run.submit(queued=7).attempt("finished", "exit", startup=2, redone=2, steps=5)
    told = account(run.events)
    sums(told)
    assert told.seconds == run.truth and told.lost_by_cause == {"crashed": 4, "first_startup": 1}


def test_a_cancelled_run_is_stopped() -> None:
    run = Told().submit(queued=5)
    run.event("cancelled", reason="upstream rm failed")
    run.passes("stopped", 50)
    assert account(run.events, now=run.time).seconds == run.truth
    run = Told().submit(queued=5)
    run.event("attempt_started", attempt=1, job_id="0", node="n")
    run.passes("startup", 3)
    run.event("training_started", attempt=1, step=0)
    run.event("cancelled", reason="Ctrl-C")
    run.passes("stopped", 50)  # nobody wrote that the attempt ended
    told = account(run.events, now=run.time)
    assert told.seconds == run.truth and told.held == 3


def test_restarted_from_scratch_is_not_charged_to_the_end_before() -> None:
    run = Told().submit(queued=1).attempt("crashed", "exit", startup=1, steps=2)
    run.event("restarted")
    run.submit(queued=1).attempt("finished", "exit", startup=3, redone=2, steps=5)
    assert account(run.events).lost_by_cause == {"restarted": 5, "first_startup": 1}


def test_an_attempt_that_was_never_closed_is_closed_by_the_next() -> None:
    run = Told().submit(queued=1)
    run.event("attempt_started", attempt=1, job_id="0", node="n")
    died = run.time + 40
    run.passes("startup", 10)
    run.passes("steps", 30)
    run.passes("lost", 200)
    measured = {"seconds": {"startup": 10, "steps": 30}, "measured_until": died}
    run.event("attempt_ended", attempt=1, code=None, outcome="node_lost", action="requeue", reason="", **measured)
    run.attempts = 1
    run.attempt("finished", "exit", startup=3, redone=5, steps=2)
    told = account(run.events)
    sums(told)
    assert told.seconds == run.truth and told.lost_by_cause == {"node_lost": 208, "first_startup": 10}


def test_days_between_an_unnoticed_death_and_a_new_submission_were_not_held() -> None:
    run = Told().submit(queued=1)
    run.event("attempt_started", attempt=1, job_id="0", node="n")
    died = run.time + 40
    run.passes("startup", 10)
    run.passes("steps", 30)
    run.passes("stopped", 300_000)
    run.submit(queued=5)
    measured = {"seconds": {"startup": 10, "steps": 30}, "measured_until": died}
    run.event("attempt_ended", attempt=1, code=None, outcome="node_lost", action="requeue", reason="", **measured)
    run.events[2]["job_id"] = "2"  # the submission's, which is another job
    run.attempts = 1
    run.attempt("finished", "exit", startup=3, steps=2)
    told = account(run.events)
    sums(told)
    assert told.seconds == run.truth and told.held == 45


def test_a_job_that_began_before_its_submission_was_written_down() -> None:
    run = Told()
    run.event("attempt_started", attempt=1, job_id="7", node="n")
    run.passes("startup", 1)
    run.event("submitted", job_id="7", cluster="dev")
    run.passes("startup", 4)
    run.event("training_started", attempt=1, step=0)
    run.passes("steps", 6)
    assert account(run.events, now=run.time).seconds == run.truth


def test_the_running_attempt_is_told_by_its_progress() -> None:
    run = Told().submit(queued=10)
    run.event("attempt_started", attempt=1, job_id="0", node="n")
    seconds = {"startup": 5.0, "steps": 20.0, "redone": 0.0, "saving": 2.0, "evaluation": 0.0}
    progress = {"version": 1, "attempt": 1, "step": 9, "time": run.time + 30, "phase": "saving", "seconds": seconds}
    now = run.time + 34
    told = account(run.events, progress, now)
    sums(told)
    assert told.seconds == dict.fromkeys(NAMES, 0.0) | {"queued": 10, "startup": 8, "steps": 20, "saving": 2 + 4}
    assert told.outcome is None and told.failures == 0 and told.goodput == pytest.approx(20 / 34)
    gone = account(run.events, progress, now, since_last_sign="stopped")
    assert gone.seconds["stopped"] == 4 and gone.held == 30
    assert account(run.events, progress).wall == 40  # as far as the last sign of life
    stale = account(run.events, {**progress, "attempt": 0}, now)
    assert stale.seconds["startup"] == 34


def test_what_a_surviving_rank_of_an_older_attempt_writes_is_not_the_newer_ones() -> None:
    run = Told().submit(queued=1).attempt("node_lost", "requeue", startup=1, steps=5).hold(2)
    run.event("attempt_started", attempt=2, job_id="0", node="n")
    run.passes("startup", 9)
    run.event("checkpoint_saved", attempt=1, step=8, seconds=4)
    run.event("training_started", attempt=1, step=0)
    assert account(run.events, now=run.time).seconds == run.truth


def test_a_ledger_of_the_first_version() -> None:
    """Its attempts measured nothing and their failures were only `failed`."""
    text = """
    {"time":1000.0,"event":"submitted","job_id":"5","cluster":"dev","version":1}
    {"time":1010.0,"event":"attempt_started","attempt":1,"job_id":"5","node":"n1","version":1}
    {"time":1018.0,"event":"training_started","attempt":1,"step":0,"version":1}
    {"time":1030.0,"event":"checkpoint_saved","attempt":1,"step":10,"seconds":2.0,"version":1}
    {"time":1035.0,"event":"attempt_ended","attempt":1,"code":1,"outcome":"failed","action":"requeue","reason":"1"}
    {"time":1155.0,"event":"attempt_started","attempt":2,"job_id":"5","node":"n1","version":1}
    {"time":1162.0,"event":"training_started","attempt":2,"step":10,"version":1}
    {"time":1180.0,"event":"stop_requested","attempt":2,"signal":"TERM","version":1}
    {"time":1183.0,"event":"checkpoint_saved","attempt":2,"step":20,"seconds":2.0,"version":1}
    {"time":1183.5,"event":"stopped","attempt":2,"step":20,"version":1}
    {"time":1185.0,"event":"attempt_ended","attempt":2,"code":85,"outcome":"stopped","action":"exit","reason":"asked"}
    {"time":1300.0,"event":"attempt_started","attempt":3,"job_id":"5","node":"n2","version":1}
    {"time":1307.0,"event":"training_started","attempt":3,"step":20,"version":1}
    {"time":1320.0,"event":"checkpoint_saved","attempt":3,"step":30,"seconds":2.0,"version":1}
    {"time":1321.0,"event":"attempt_ended","attempt":3,"code":0,"outcome":"finished","action":"exit","reason":null}
    """
    told = account([json.loads(line) for line in text.split("\n") if line.strip()])
    sums(told)
    assert told.seconds == {
        "queued": 10, "hold": 120 + 115, "startup": 8 + 7 + 7, "steps": 10 + 19.5 + 11, "redone": 0, "saving": 6,
        "evaluation": 0, "teardown": 1.5 + 1, "lost": 5, "stopped": 0,
    }  # fmt: skip
    assert told.lost_by_cause["crashed"] == 5 + 120 + 7 and told.lost_by_cause["planned_stop"] == 115 + 7


def test_an_evaluation_of_the_first_version() -> None:
    events = [
        {"time": 10.0, "event": "submitted", "job_id": "1", "cluster": "dev"},
        {"time": 12.0, "event": "attempt_started", "attempt": 1, "job_id": "1"},
        {"time": 15.0, "event": "training_started", "attempt": 1, "step": 0},
        {"time": 40.0, "event": "attempt_ended", "attempt": 1, "outcome": "finished", "action": "exit", "reason": None},
    ]
    assert account(events).seconds["evaluation"] == 25


def test_no_ledger_no_time() -> None:
    for events in ([], [{"time": 1.0, "event": "cancelled", "reason": "x"}], [{"time": "x", "event": "submitted"}]):
        told = account(events, now=9.0)
        assert told == Account() and told.goodput is None


# ------------------------------------------------------------------------ any sound sequence of events

SPAN = st.integers(0, 5_000_000).map(lambda ms: ms / 1000)
ENDS = st.sampled_from([
    ("finished", "exit"), ("stopped", "requeue"), ("stopped", "exit"), ("preempted", "exit"), ("preempted", "requeue"),
    ("node_lost", "requeue"), ("out_of_memory", "requeue"), ("crashed", "requeue"), ("crashed", "exit"),
    ("hung", "requeue"), ("hung", "exit"), ("cancelled", "exit"),
])  # fmt: skip


@st.composite
def nights(draw: st.DrawFn) -> Told:
    """A run of any number of attempts, told without fault."""
    run = Told().submit(draw(SPAN))
    goes_on = False
    for i in range(draw(st.integers(0, 5))):
        if i and goes_on:
            run.hold(draw(SPAN))
        elif i:
            run.passes("stopped", draw(SPAN))
            run.submit(draw(SPAN))
        outcome, action = draw(ENDS)
        spans = {name: draw(SPAN) for name in (*MEASURED, "tail", "script")}
        run.attempt(outcome, action, answered=outcome == "stopped", **spans)
        goes_on = action == "requeue" or outcome == "preempted"
    return run


@settings(deadline=None)
@given(nights())
def test_every_second_has_its_name(run: Told) -> None:
    told = account(run.events, now=run.time)
    sums(told)
    assert told.seconds == pytest.approx(run.truth, abs=0.002)
    assert told.wall == pytest.approx(run.time - T0, abs=0.002)


@settings(deadline=None, max_examples=300)
@given(nights(), st.randoms(use_true_random=False), st.none() | st.floats(-1e5, 1e7))
def test_no_clock_makes_a_second_negative_or_lost(run: Told, rng: random.Random, now: float | None) -> None:
    """Clocks that differ, go back or jump, figures that lack, exceed the attempt or are none, lost lines."""
    for event in run.events:
        if rng.random() < 0.3:
            event["time"] += rng.choice([-1e4, -7.3, 0.001, 5e3])
        if "seconds" in event and rng.random() < 0.5:
            damaged = {"steps": 1e9, "redone": -5, "saving": math.nan, "startup": True}
            event["seconds"] = rng.choice([None, {}, damaged, dict.fromkeys(MEASURED, 3.3), 4, math.inf])
        if "measured_until" in event and rng.random() < 0.5:
            event["measured_until"] = rng.choice([None, 0, event["time"] + 99, event["time"] - 1e6, math.nan, "x"])
    events = [event for event in run.events if rng.random() > 0.15]
    progress = rng.choice([None, {"attempt": run.attempts, "seconds": {"steps": 7.0}, "time": run.time, "phase": "x"}])
    told = account(events, progress, None if now is None else T0 + now, rng.choice([None, "stopped", "lost"]))
    sums(told)
    times = [event["time"] for event in events]
    if now is not None and told.wall:
        assert told.wall <= T0 + now - min(times) + 0.001
    assert sum(1 for _ in events) < 2 or told.wall <= max([*times, run.time, T0 + (now or 0)]) - min(times) + 0.001


def test_several_runs_add_up() -> None:
    first = account(Told().submit(10).attempt("finished", "exit", startup=5, steps=15).events)
    second = Told().submit(1).attempt("crashed", "requeue", startup=5, steps=5, tail=2).hold(8)
    both = together([first, account(second.events, now=second.time)])
    sums(both)
    assert both.goodput == pytest.approx(20 / 32)
    assert both.lost_by_cause == {"first_startup": 10, "crashed": 10} and both.failures == 1
    assert together([]).goodput is None


# ------------------------------------------------------------------------------------- save interval


def waste(interval: float, save: float, m: float) -> float:
    """Expected time over useful time, failures exponential (Daly 2006, eq. 20, without the restart's constant factor).

    A stretch of work and its save take m (exp((interval + save) / m) - 1) in the mean, begun again at each failure.
    """
    return m * math.expm1((interval + save) / m) / interval


def best(save: float, m: float) -> float:
    """The interval with the least waste, by golden-section search."""
    low, high = 1e-6 * m, 10 * m
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7 * m:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if waste(a, save, m) < waste(b, save, m) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("m", [600.0, 86_400.0])
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.01, 0.1, 0.5, 1.0, 1.9, 2.0, 4.0])
def test_the_interval_is_the_one_that_wastes_least(share: float, m: float) -> None:
    save = share * m
    found, least = save_interval(save, m), best(save, m)
    assert waste(found, save, m) <= waste(least, save, m) * 1.002
    if share <= 0.1:
        assert found == pytest.approx(least, rel=0.01)
        assert waste(found, save, m) <= waste(math.sqrt(2 * save * m), save, m) * (1 + 1e-9)


def simulate(interval: float, save: float, m: float, seed: int, work: float) -> float:
    """Wall time ÷ work of one run whose failures come at random and cost what was not saved."""
    rng = random.Random(seed)
    wall = done = 0.0
    failure = rng.expovariate(1 / m)
    while done < work:
        if wall + interval + save <= failure:
            wall += interval + save
            done += interval
        else:
            wall = failure
            failure = wall + rng.expovariate(1 / m)
    return wall / done


def test_a_simulated_run_agrees() -> None:
    save, m = 30.0, 3600.0
    found = save_interval(save, m)

    def mean(interval: float) -> float:
        return statistics.mean(simulate(interval, save, m, seed, 500 * m) for seed in range(8))

    assert mean(found) == pytest.approx(waste(found, save, m), rel=0.01)  # the model is the one that is simulated
    for factor in (0.25, 4.0):
        assert mean(found) < mean(found * factor)


def test_the_interval_of_nonsense_is_refused() -> None:
    assert save_interval(0, 100) == 0 and save_interval(1000, 100) == 100
    for save, m in ((-1, 10), (1, 0), (1, -5), (math.nan, 1), (1, math.nan)):
        with pytest.raises(ValueError, match="save_seconds="):
            save_interval(save, m)


def test_intervals_rise_with_the_save_and_the_mttf() -> None:
    grid = [save_interval(save, 1e5) for save in (1, 10, 100, 1000)]
    assert all(a < b for a, b in pairwise(grid))
    assert all(a < b for a, b in pairwise(save_interval(10, m) for m in (1e3, 1e4, 1e5)))


def test_the_mttf_moves_from_the_prior_to_what_was_seen() -> None:
    assert mttf(0, 0, 86_400) == 86_400
    assert mttf(86_400, 0, 86_400) == 2 * 86_400  # a day without a failure
    assert mttf(86_400, 3, 86_400) == 43_200
    assert mttf(1e9, 99, 86_400) == pytest.approx(1e7, rel=0.001)


def test_the_ledger_says_how_often_to_save() -> None:
    run = Told().submit(10)
    assert seconds_between_saves(run.events, 86_400) is None
    run.attempt("stopped", "requeue", steps=1000, saving=10, answered=True).hold(100)
    assert seconds_between_saves(run.events, 86_400, run.time) == save_interval(10, 86_400 + 1010)
    run.attempt("crashed", "requeue", steps=990, saving=12, tail=8).hold(100)
    run.attempt("preempted", "requeue", steps=986, saving=14).hold(100)
    held = 1010 + 1010 + 1000
    assert seconds_between_saves(run.events, 86_400, run.time) == save_interval(12, (86_400 + held) / 3)
    run.events.append({"time": run.time, "event": "checkpoint_saved", "attempt": 9, "step": 9, "seconds": None})
    assert seconds_between_saves(run.events, 86_400, run.time) == save_interval(12, (86_400 + held) / 3)
