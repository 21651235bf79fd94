"""When things will be done: against an attempt-by-attempt count, and along the graph."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launchers import eta
from launchers.eta import Estimate

SPANS = st.floats(0, 1e5)


def counted(
    work: float, wall: float, lead: float, startup: float, teardown: float, hold: float, elapsed: float | None
) -> tuple[float, int]:
    """The same as `stage`, one attempt after the other."""
    clock, requeues = 0.0, 0
    gone = elapsed or 0.0
    while True:
        begin = max(0.0, startup - gone)
        able = max(0.0, wall - lead - gone - begin)
        clock += begin + min(work, able) + teardown
        if work <= able + 1e-6:
            return clock, requeues
        work -= able
        clock, requeues, gone = clock + hold, requeues + 1, 0.0


@given(
    work=SPANS, wall=st.floats(1000, 1e5), lead=st.floats(0, 100), startup=st.floats(0, 100),
    teardown=st.floats(0, 100), hold=st.floats(0, 1000), elapsed=st.none() | st.floats(0, 2000),
)  # fmt: skip
def test_an_attempt_after_the_other_comes_to_the_same(
    work: float, wall: float, lead: float, startup: float, teardown: float, hold: float, elapsed: float | None
) -> None:
    assume(elapsed is None or elapsed <= wall)
    mine = eta.stage(
        work, wall=wall, lead=lead, startup=startup, teardown=teardown, hold=hold, elapsed=elapsed
    )  # fmt: skip
    seconds, requeues = counted(work, wall, lead, startup, teardown, hold, elapsed)
    assert mine is not None
    if mine.requeues != requeues:  # the last attempt's work is within rounding of nothing
        assert abs(mine.requeues - requeues) == 1
        return
    assert mine.seconds == pytest.approx(seconds, abs=1e-3)


@given(work=SPANS, more=SPANS, wall=st.none() | st.floats(10, 1e5), startup=st.floats(0, 100), hold=SPANS)
def test_more_work_never_takes_less(work: float, more: float, wall: float | None, startup: float, hold: float) -> None:
    first = eta.stage(work, wall=wall, startup=startup, hold=hold)
    second = eta.stage(work + more, wall=wall, startup=startup, hold=hold)
    if first is None:
        assert second is None
    elif second is not None:
        assert second.seconds >= first.seconds >= work and second.requeues >= first.requeues


def test_a_days_work_at_four_hours_of_wall_time() -> None:
    # 10 h left, 4 h a job of which 10 min are for leaving and 5 for starting: 3 h 45 a job, 2 h of this one are gone
    h = 3600.0
    mine = eta.stage(
        10 * h, wall=4 * h, lead=600, startup=300, teardown=30, hold=121, elapsed=2 * h, training=True
    )  # fmt: skip
    assert mine == Estimate(10 * h + 30 + 3 * (30 + 121 + 300), 3)  # 1:50 now, then 3:45, 3:45 and 0:40
    assert eta.stage(10 * h, wall=h, lead=1800, startup=1800) is None  # stops before it has begun
    assert eta.stage(10.0) == Estimate(10.0)


GRAPHS = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdefx"), max_size=3), max_size=6)


@given(
    GRAPHS, st.dictionaries(st.sampled_from("abcdef"), st.none() | st.builds(Estimate, SPANS)),
    st.sets(st.sampled_from("abcdef"), max_size=1),
)  # fmt: skip
def test_nothing_is_done_before_what_it_waits_for(
    after: dict[str, list[str]], own: dict[str, Estimate | None], dead: set[str]
) -> None:
    found = eta.finishes(own, after, dead)
    assert found.keys() == own.keys()
    for name, mine in found.items():
        assert not (mine is not None and (own[name] is None or name in dead))
        if mine is not None and own[name] is not None:
            assert mine.seconds >= own[name].seconds
    acyclic = all(up > name for name, ups in after.items() for up in ups if up in own)
    if acyclic:
        for name, ups in after.items():
            for up in set(ups) & found.keys():
                mine, theirs = found.get(name), found[up]
                if mine is not None and theirs is not None:
                    assert mine.seconds >= theirs.seconds
                    assert mine.at_least or not theirs.at_least
                elif mine is not None:
                    assert mine.at_least and up not in dead


def test_the_longest_way_counts() -> None:
    own = {"sft": Estimate(10, 1), "rm": Estimate(5), "dpo": Estimate(2, 2), "ppo": Estimate(1), "grpo": None}
    after = {"rm": ["sft"], "dpo": ["sft"], "ppo": ["sft", "rm"], "grpo": ["ppo"], "eval": ["dpo"]}
    found = eta.finishes(own, after)
    assert {name: one and one.seconds for name, one in found.items()} == {
        "sft": 10, "rm": 15, "dpo": 12, "ppo": 16, "grpo": None,
    }  # fmt: skip
    assert eta.whole(list(found.values())) == Estimate(16, 3, at_least=True)
    assert eta.whole([one for one in found.values() if one]) == Estimate(16, 3)
    assert eta.whole([None, None]) is None and eta.whole([Estimate(1)], dead=True) is None
    assert eta.whole([]) == Estimate(0)
    assert eta.finishes(own, after, {"rm"})["ppo"] is None and eta.finishes(own, after, {"rm"})["dpo"] is not None
    assert math.isfinite(eta.finishes({"a": Estimate(1), "b": Estimate(2)}, {"a": ["b"], "b": ["a"]})["a"].seconds)  # type: ignore[union-attr]
