"""The work of an evaluation as fixed batches, each done once however often the attempt is stopped.

    work = Work(journal, pulse, tell)
    greedy = work.add("greedy", prompts, 64, ask)     ask(number, batch) -> an answer (JSON) for each item
    work.run()                                         asks what the journal does not hold
    greedy.found                                       an answer for each prompt, in order

Batches are cut before anything is asked, so that a requeue changes neither what is padded together nor a batch's seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.attempt import StopFlag, Watchdog
from post_training.evaluation.journal import Journal, key
from post_training.run import ledger
from post_training.run.directory import RunDirectory
from post_training.run.progress import Progress

SAY_EVERY_S = 10.0
"""Seconds between the ledger's lines on progress, so that many small batches do not fill it."""


class Asked(Exception):
    """The attempt is to leave: the next one goes on from the journal."""


def make_pulse(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> Callable[..., None]:
    """What to call before each forward pass: alive, and ready to leave, by Asked, in the middle of a long answer."""
    stop_flag = StopFlag()
    looked = 0.0

    def pulse(*_: object) -> None:
        nonlocal looked
        watchdog.beat()
        progress.write()
        if stop_flag.is_set or (time.monotonic() - looked > 1 and run.stop_requested(attempt)):
            raise Asked
        looked = max(looked, time.monotonic() - 1)

    return pulse


def _done(number: int, items: list[Any]) -> list[Any]:
    raise AssertionError("all is answered")


def _answered(number: int, batch: list[Any]) -> list[Any]:
    raise RuntimeError("all of it has been asked")


@dataclass
class Part:
    """One kind of question; `found` holds an answer for each item once the work has run."""

    name: str
    items: list[Any]
    batches: list[list[int]]  # of items' numbers
    ask: Callable[[int, list[Any]], list[Any]]
    found: list[Any] = field(default_factory=list)

    def key(self, number: int) -> str:
        return key(self.name, number, [self.items[i] for i in self.batches[number]])


class Work:
    """Parts, done in the order in which they were added.

    pulse: called before each batch; may raise Asked. tell: told how many batches of all are done, when that changes.
    """

    def __init__(
        self, journal: Journal, pulse: Callable[..., None], tell: Callable[[int, int], None] | None = None
    ) -> None:
        self.journal, self.pulse, self.tell = journal, pulse, tell or (lambda done, total: None)
        self.parts: list[Part] = []
        self._started = time.monotonic()

    def add(
        self, name: str, items: Sequence[Any], size: int, ask: Callable[[int, list[Any]], list[Any]],
        length: Callable[[Any], int] | None = None,
    ) -> Part:  # fmt: skip
        """A part of `items` (JSON), asked `size` together.

        ask: given a batch's number and items, returns an answer (JSON) for each. It may use earlier parts' `found`.
        length: items are batched by it, so that little is padded; their order in `found` stays.
        """
        order = list(range(len(items)))
        if length is not None:
            order.sort(key=lambda i: length(items[i]))
        part = Part(name, list(items), [order[i : i + size] for i in range(0, len(order), size)], ask)
        self.parts.append(part)
        return part

    def run(self) -> None:
        """Ask what is missing. Raises Asked, Fenced, and what `ask` raises; what was found by then is kept."""
        done = {part.name: [part.key(n) for n in range(len(part.batches))] for part in self.parts}
        total = sum(map(len, done.values()))
        count = sum(k in self.journal for keys in done.values() for k in keys)
        self.tell(count, total)
        for part in self.parts:
            part.found = [None] * len(part.items)
            for number, name in enumerate(done[part.name]):
                if name not in self.journal:
                    self.pulse()
                    answers = part.ask(number, [part.items[i] for i in part.batches[number]])
                    assert len(answers) == len(part.batches[number])
                    seconds = round(time.monotonic() - self._started, 3)
                    self.journal.add({name: answers, f"seconds {self.journal.attempt}": seconds})
                    count += 1
                    self.tell(count, total)
                for item, answer in zip(part.batches[number], self.journal[name], strict=True):
                    part.found[item] = answer
        for part in self.parts:
            part.ask = _answered  # who answered may hold a GPU's memory: vLLM's engine does
        for part in self.parts:
            part.ask = _done  # what answered may take most of a GPU's memory

    @property
    def seconds(self) -> float:
        """What the work took, over all attempts."""
        return round(sum(v for k, v in self.journal.known.items() if k.startswith("seconds ")), 1)


class Told:
    """Where an evaluation's progress is seen: progress.json, metrics.jsonl (status, the local table) and the ledger.

    Lines of the ledger count as progress, as a trainer's checkpoints do: an evaluation that gets on is not given up.
    """

    def __init__(self, run: RunDirectory, attempt: int, progress: Progress) -> None:
        self.run, self.attempt, self.progress = run, attempt, progress
        self.done = self.said = 0
        self._said_at = time.monotonic()
        self._started = False

    def __call__(self, done: int, total: int) -> None:
        from json import dumps

        self.done = done
        self.progress.figures.step = done
        line = {"step": done, "max_steps": total, "time": round(time.time(), 3)}
        with self.run.writing_as(self.attempt), self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(dumps(line) + "\n")
        if not self._started:
            self._started, self.said = True, done
            with self.run.writing_as(self.attempt):
                ledger.append(self.run.ledger, "training_started", attempt=self.attempt, step=done)
        elif time.monotonic() - self._said_at > SAY_EVERY_S:
            self.say()

    def say(self) -> None:
        """Note in the ledger what is done by now."""
        if self.done > self.said:
            with self.run.writing_as(self.attempt):
                ledger.append(self.run.ledger, "checkpoint_saved", attempt=self.attempt, step=self.done, seconds=0.0)
            self.said, self._said_at = self.done, time.monotonic()
