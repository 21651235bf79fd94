"""When a run and a pipeline will be done, from measured times, requeues included. Pure; all times in seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Seconds until something is done, and how many requeues that still takes."""

    seconds: float
    requeues: int = 0
    at_least: bool = False  # something on the way there cannot be estimated


def stage(
    work: float, *, wall: float | None = None, lead: float = 0.0, startup: float = 0.0, teardown: float = 0.0,
    hold: float = 0.0, elapsed: float | None = None, training: bool = False,
) -> Estimate | None:  # fmt: skip
    """How long a run takes for so much work (steps, and the saves and evaluations among them), from now or its start.

    An attempt starts up, works until `lead` before its wall time (None: it has none), and leaves. Each requeue costs
    its hold. elapsed: of the running attempt; None: none runs. training: it has started up.
    None where no attempt comes to work before it must stop: it would go on for ever.
    """
    gone = 0.0 if elapsed is None else elapsed
    begin = 0.0 if training else max(0.0, startup - gone)
    if wall is None:
        return Estimate(begin + work + teardown)
    left = max(0.0, wall - lead - gone - begin)
    if work <= left:
        return Estimate(begin + work + teardown)
    window = wall - lead - startup
    if window <= 0:
        return None
    requeues = max(1, math.ceil((work - left) / window - 1e-9))
    return Estimate(begin + work + teardown + requeues * (teardown + hold + startup), requeues)


def finishes(
    own: Mapping[str, Estimate | None], after: Mapping[str, Collection[str]], dead: Collection[str] = ()
) -> dict[str, Estimate | None]:
    """When each stage that is not done will be, along the graph: its own time after that of all that it waits for.

    own: of every stage that is not done; None: it cannot be estimated. after: what it waits for; names that are not
    in `own` are done. dead: stages that have ended without being done: what comes after them never will be.
    None where a stage cannot be estimated itself, or never will be done. A graph with a cycle (damage) is cut.
    """
    found: dict[str, tuple[float, bool, bool]] = {}  # lower bound, whether it is only that, whether it never will be

    def finish(name: str, above: frozenset[str]) -> tuple[float, bool, bool]:
        if name not in found:
            before = [
                finish(up, above | {name}) for up in after.get(name, ()) if up in own and up not in above | {name}
            ]
            mine = own[name]
            found[name] = (
                max((seconds for seconds, _, _ in before), default=0.0) + (mine.seconds if mine else 0.0),
                mine is None or mine.at_least or any(only for _, only, _ in before),
                name in dead or any(never for _, _, never in before),
            )
        return found[name]

    result: dict[str, Estimate | None] = {}
    for name, mine in own.items():
        seconds, at_least, never = finish(name, frozenset())
        result[name] = None if mine is None or never else Estimate(seconds, mine.requeues, at_least)
    return result


def whole(stages: Collection[Estimate | None], dead: bool = False) -> Estimate | None:
    """When the last of these stages will be done, whose own times include what they wait for (`finishes`).

    None where nothing is known of it, or one of them never will be done.
    """
    known = [one for one in stages if one is not None]
    if dead or (stages and not known):
        return None
    at_least = len(known) < len(stages) or any(one.at_least for one in known)
    return Estimate(max((one.seconds for one in known), default=0.0), sum(one.requeues for one in known), at_least)
