"""A run's life as it will be lived: starts, steps, saves, stops, losses. A Monte-Carlo model of one run. Pure.

An attempt starts up, steps, saves every so often, and leaves in one of four ways: it is done; it is asked to stop
before its wall time, or because it is preempted, ends its step, saves and leaves; or something fails, and what it did
since its last save is done again by the next attempt. Between two attempts lie the requeue hold and the queue. The
names of time, and goodput, are those of post_training.run.accounting, so that a forecast stands beside a ledger.

What it leaves out: failures while an attempt leaves (seconds), failures that come together (a switch, a file system),
times that change along a run, ends in which not even the last save is whole, and nodes that fail again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from post_training.run.accounting import NAMES, save_interval

EARLY_S = 30.0
"""SLURM looks for jobs to warn every 30 s (PERIODIC_TIMEOUT of slurmctld), and warns those whose time comes until its
next look: so a warning is 0 to 30 s early. sbatch(1) promises no more than 60 s."""
TRIALS = 400
MOST_ATTEMPTS = 20_000
"""Over all trials of one forecast: a run that hardly gets on must not keep its user waiting."""


@dataclass(frozen=True)
class Life:
    """What a run's life follows from. Seconds, unless a name says otherwise; inf: never."""

    steps: int  # optimizer steps to do, 1 or more
    step_seconds: float  # above 0
    startup_seconds: float  # from an attempt's start to its first step, loading the checkpoint included
    save_seconds: float  # of one full checkpoint, while no step is done
    teardown_seconds: float  # from the last record of an attempt that leaves in order to its end
    save_steps: int | None = None  # steps between saves: at their multiples, as checkpointing.save_steps; None: never
    save_every_seconds: float = math.inf  # seconds between saves, beside save_steps: as checkpointing.save_minutes
    wall_seconds: float = math.inf  # wall time of one attempt
    lead_seconds: float = 0.0  # slurm.signal_time_seconds: so long before the wall time it is asked to stop
    early_seconds: float = EARLY_S  # and up to so much earlier, evenly
    hold_seconds: float = 121.0  # from an attempt's end until its job may start again
    queue_seconds: float = 0.0  # wait of each start after that, on average (exponential); the first one's included
    nodes: int = 1
    node_mttf_seconds: float = math.inf  # mean time to failure of one node; exponential, so nodes have no age
    detect_seconds: float = 0.0  # from a failure to the attempt's end: nobody works, all are held
    preempted_every_seconds: float = math.inf  # mean time of an attempt to its preemption; exponential
    max_attempts_without_progress: int = 10  # then the run gives up

    @property
    def mttf_seconds(self) -> float:
        """Of the job: the first of its nodes to fail ends the attempt."""
        return self.node_mttf_seconds / self.nodes

    @property
    def cycle_steps(self) -> int | None:
        """Steps between two saves, as the settings say; None where there is none but at stops and at the end."""
        by_time = _steps_in(self.save_every_seconds, self.step_seconds)
        return min((n for n in (self.save_steps, by_time) if n is not None), default=None)


@dataclass(frozen=True)
class Lived:
    """One life. Seconds by accounting's names, hold and queue apart."""

    seconds: Mapping[str, float]
    queue: float
    attempts: int
    stops: int  # planned stops and preemptions
    failures: int
    finished: bool  # else it gave up

    @property
    def held(self) -> float:
        """Seconds inside attempts."""
        return sum(value for name, value in self.seconds.items() if name != "hold")

    @property
    def goodput(self) -> float:
        """Share of the held time that went into steps that count."""
        return self.seconds["steps"] / self.held if self.held > 0 else 0.0


def _steps_in(seconds: float, step: float) -> int | None:
    """Steps after which so many seconds are over; None: never."""
    return None if math.isinf(seconds) else max(1, math.ceil(seconds / step - 1e-9))


def live(life: Life, random: Random, failures: Iterator[float] | None = None) -> Lived:
    """One life. failures: seconds into the 1st, 2nd, ... attempt at which it fails; None: drawn as `life` says."""
    seconds = dict.fromkeys(NAMES, 0.0)
    attempts = stops = failed = idle = done = reached = 0
    queue = 0.0
    finished = False
    while True:
        attempts += 1
        if life.queue_seconds > 0:
            queue += random.expovariate(1 / life.queue_seconds)
        fails = next(failures, math.inf) if failures is not None else _after(random, life.mttf_seconds)
        warned = life.wall_seconds - life.lead_seconds - random.uniform(0, life.early_seconds)
        asked = min(max(0.0, warned), _after(random, life.preempted_every_seconds))
        end, saved, reached = _attempt(life, done, reached, asked, fails, seconds)
        idle = 0 if saved > done else idle + 1
        done = saved
        stops, failed = stops + (end == "stopped"), failed + (end == "failed")
        if end == "finished":
            finished = True
            break
        if idle >= life.max_attempts_without_progress or attempts >= MOST_ATTEMPTS:
            break
        seconds["hold"] += life.hold_seconds
    return Lived(seconds, queue, attempts, stops, failed, finished)


def _after(random: Random, mean: float) -> float:
    return math.inf if math.isinf(mean) else random.expovariate(1 / mean)


def _attempt(
    life: Life, done: int, reached: int, asked: float, fails: float, seconds: dict[str, float]
) -> tuple[str, int, int]:
    """One attempt from step `done` on; adds its time to `seconds`. How it ends, the step it saved, the highest done.

    asked, fails: when it is asked to stop and when it fails, seconds after its start. A failure wins where both come.
    """
    step, save = life.step_seconds, life.save_seconds
    by_time = _steps_in(life.save_every_seconds, step)

    def work(first: int, count: int) -> None:
        again = min(count, max(0, reached - first))
        seconds["redone"] += again * step
        seconds["steps"] += (count - again) * step

    def lose(rest: float) -> tuple[str, int, int]:
        seconds["lost"] += rest + life.detect_seconds
        return "failed", saved, max(reached, at)

    at = saved = done
    since = 0  # steps since the last save of this attempt, or since it began
    if fails < life.startup_seconds:
        seconds["startup"] += fails
        return lose(0.0)
    seconds["startup"] += life.startup_seconds
    clock = life.startup_seconds
    while True:
        # steps to the next event
        to_end = life.steps - at
        to_save = life.save_steps - at % life.save_steps if life.save_steps is not None else to_end
        if by_time is not None:
            to_save = min(to_save, max(1, by_time - since))
        to_stop = max(1, math.ceil((asked - clock) / step - 1e-9)) if asked < math.inf else to_end
        count = min(to_end, to_save, to_stop)
        # whole cycles of steps and a save at once, where all of them are alike
        cycle = _whole_cycle(life, at, since, by_time)
        if cycle is not None and count == cycle:
            length = cycle * step + save
            whole = min((to_end - 1) // cycle, math.floor((min(asked, fails) - clock) / length) - 1
                        if min(asked, fails) < math.inf else to_end)  # fmt: skip
            if whole > 0:
                work(at, whole * cycle)
                seconds["saving"] += whole * save
                at, clock = at + whole * cycle, clock + whole * length
                saved, reached = at, max(reached, at)
                continue
        if fails < clock + count * step:
            whole = max(0, min(count, int((fails - clock) / step)))
            work(at, whole)
            at, clock = at + whole, clock + whole * step
            return lose(max(0.0, fails - clock))
        work(at, count)
        at, since, clock = at + count, since + count, clock + count * step
        ends, leaves = at == life.steps, clock >= asked - 1e-9
        if not (ends or leaves or count == to_save):
            continue
        if fails < clock + save:
            seconds["saving"] += fails - clock
            return lose(0.0)
        seconds["saving"] += save
        clock += save
        saved, since, reached = at, 0, max(reached, at)
        if ends or leaves:
            seconds["teardown"] += life.teardown_seconds
            return "finished" if ends else "stopped", saved, reached


def _whole_cycle(life: Life, at: int, since: int, by_time: int | None) -> int | None:
    """Steps from here to a save and from there to the next, where these are as many; else None."""
    if life.save_steps is not None and at % life.save_steps == 0 and (by_time is None or by_time >= life.save_steps):
        return life.save_steps
    return by_time if life.save_steps is None and since == 0 else None


# ------------------------------------------------------------------------------------------ forecasts


@dataclass(frozen=True)
class Forecast:
    """Many lives. Means, and quantiles at 10, 50 and 90 %."""

    trials: int
    seconds: Mapping[str, float]  # by name, mean
    queue: float  # mean
    held: float  # mean
    attempts: float  # mean
    stops: float
    failures: float
    gave_up: float  # share of the lives
    goodput: tuple[float, float, float]
    mean_goodput: float  # of all lives' time together
    walls: tuple[float, ...]  # of each life: held and hold, without the queue

    @property
    def wall(self) -> float:
        """Held and hold, without the queue: mean."""
        return self.held + self.seconds["hold"]

    @property
    def requeues(self) -> float:
        return self.attempts - 1


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """At 10, 50 and 90 %: values that occurred, the nearest by rank."""
    ordered = sorted(values)
    low, mid, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.1, 0.5, 0.9))
    return low, mid, high


def forecast(life: Life, trials: int = TRIALS, seed: int = 0) -> Forecast:
    """Live many times. The same seed gives the same forecast; fewer trials where lives take very many attempts."""
    lives: list[Lived] = []
    attempts = 0
    sure = math.isinf(life.mttf_seconds) and math.isinf(life.preempted_every_seconds)
    if sure and (math.isinf(life.wall_seconds) or not life.early_seconds) and not life.queue_seconds:
        trials = 1  # nothing is left to chance
    for trial in range(trials):
        lives.append(live(life, Random(f"{seed}/{trial}")))
        attempts += lives[-1].attempts
        if attempts > MOST_ATTEMPTS and trial >= 20:
            break
    count = len(lives)
    seconds = {name: sum(one.seconds[name] for one in lives) / count for name in NAMES}
    held = sum(one.held for one in lives) / count
    return Forecast(
        trials=count, seconds=seconds, held=held,
        queue=sum(one.queue for one in lives) / count,
        attempts=attempts / count,
        stops=sum(one.stops for one in lives) / count,
        failures=sum(one.failures for one in lives) / count,
        gave_up=sum(not one.finished for one in lives) / count,
        goodput=quantiles([one.goodput for one in lives]),
        mean_goodput=seconds["steps"] / held if held else 0.0,
        walls=tuple(one.held + one.seconds["hold"] for one in lives),
    )  # fmt: skip


def best_interval(life: Life) -> float:
    """Seconds of work between saves that waste least (Young and Daly), for all nodes together; inf: nothing fails."""
    if math.isinf(life.mttf_seconds):
        return math.inf
    return save_interval(life.save_seconds, life.mttf_seconds)


def with_nodes(life: Life, nodes: int) -> Life:
    """The same run on so many nodes, saving as often as is best there. Steps take as long as before: the batch grows
    with the nodes, as in weak scaling."""
    wider = replace(life, nodes=nodes)
    return replace(wider, save_steps=None, save_every_seconds=max(best_interval(wider), life.step_seconds))
