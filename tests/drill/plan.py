"""Which faults a drill injects, where and when: drawn from the seed alone, so that a drill can be repeated. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random


@dataclass(frozen=True)
class Stage:
    """One stage of the drilled pipeline."""

    name: str
    after: str | None  # the stage whose output it starts from
    steps: int
    save_steps: int
    ranks: int = 1  # each on a node of its own
    workers: int = 0  # DataLoader workers of each rank
    overrides: tuple[str, ...] = ()
    long: bool = False  # trains long enough for faults that SLURM takes half a minute to notice


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `planned`: SLURM asks the job to leave, so no step may be lost."""

    name: str
    help: str
    planned: bool = False
    slow: bool = False  # half a minute may pass until SLURM does something about it, and the run goes on meanwhile
    moments: tuple[str, ...] = ("step",)  # step: between saves or in one, as it comes; save: inside; startup: before


KINDS = {
    kind.name: kind
    for kind in (
        Kind("stop", "USR1 to the batch shell, as --signal=B:USR1 sends it", planned=True),
        Kind("wall_time", "the time limit is lowered: SLURM itself warns the job", planned=True, slow=True),
        Kind("preempt", "a job in partition high takes the node", planned=True),
        Kind("node_death", "slurmd killed, the step's processes live on; the node is back later", slow=True),
        Kind("power_cut", "a node and all that ran on it are gone at once", moments=("step", "save", "startup")),
        Kind("kill_rank", "kill -9 of a training process", moments=("step", "save", "startup")),
        Kind("kill_worker", "kill -9 of a DataLoader worker"),
        Kind("kill_srun", "kill -9 of srun", moments=("step", "save", "startup")),
        Kind("kill_shell", "kill -9 of the batch shell", moments=("step", "save", "startup")),
        Kind("controller", "slurmctld restarted"),
        Kind("truncate", "the newest checkpoint is truncated, then a rank is killed"),
        Kind("full_disk", "the run's disk is full at the next save; there is room again once that failed"),
        Kind("hang_rank", "SIGSTOP of one rank", moments=("step", "save")),
        Kind("hang_all", "SIGSTOP of every rank"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault of a plan. `at`, `victim` and `delay` are shares, 0 to 1, of whatever there is to choose from."""

    number: int
    kind: str
    stage: str
    moment: str
    at: float  # of the stage's steps
    victim: float  # which rank, node, worker or file
    delay: float  # between the moment seen and the fault


def can_hit(kind: str, stage: Stage) -> bool:
    """Whether a stage has what this kind of fault strikes."""
    return (kind != "kill_worker" or stage.workers > 0) and (stage.long or not KINDS[kind].slow)


def _deal(random: Random, cards: Sequence[str], count: int) -> list[str]:
    """`count` cards from shuffled decks, one deck after the other: every card comes before one comes twice."""
    dealt: list[str] = []
    while len(dealt) < count:
        deck = list(cards)
        random.shuffle(deck)
        dealt += deck
    return dealt[:count]


def draw(seed: int, count: int, stages: Sequence[Stage], kinds: Sequence[str]) -> list[Fault]:
    """The plan: `count` faults over these stages, in the order in which each stage meets them.

    Raises ValueError where a kind can strike none of the stages.
    """
    random = Random(seed)
    order = {stage.name: i for i, stage in enumerate(stages)}
    faults = []
    places: list[str] = []
    for number, kind in enumerate(_deal(random, kinds, count), start=1):
        possible = [stage.name for stage in stages if can_hit(kind, stage)]
        if not possible:
            raise ValueError(f"{kind}: none of the stages {', '.join(order)} has what it strikes")
        fewest = min(places.count(name) for name in possible)  # spread: each stage gets its share
        place = random.choice([name for name in possible if places.count(name) == fewest])
        places.append(place)
        faults.append(_draw_one(random, number, kind, place))
    faults.sort(key=lambda fault: (order[fault.stage], fault.at, fault.number))
    return [replace(fault, number=i) for i, fault in enumerate(faults, start=1)]


def _draw_one(random: Random, number: int, kind: str, stage: str) -> Fault:
    moment = random.choice(KINDS[kind].moments)
    # not in the last steps: between seeing a step and striking, others pass
    latest = 0.2 if KINDS[kind].slow else 0.75
    at, victim, delay = random.uniform(0.05, latest), random.random(), random.random()
    return Fault(number, kind, stage, moment, 0.0 if moment == "startup" else at, victim, delay)


def redraw(seed: int, fault: Fault, turn: int, stages: Sequence[Stage]) -> Fault | None:
    """The fault drawn anew for one of `stages`, since its stage was done; None where none can be struck.

    turn: how often this fault was drawn again before.
    """
    random = Random(f"{seed}/{fault.number}/{turn}")
    possible = [stage.name for stage in stages if can_hit(fault.kind, stage)]
    return _draw_one(random, fault.number, fault.kind, random.choice(possible)) if possible else None
