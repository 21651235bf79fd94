"""Generated sums: text, demonstrations, preference pairs and verifiable prompts from one seed.

Held-out problems are pairs {a, b} that no form shows in training, in either order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from conf.schema import Data
from post_training.data.source import DataError, Row, Samples, Source, Split, assistant, features, think_answer, user

SMALLEST, LARGEST = 10, 99
PAIRS = (LARGEST - SMALLEST + 1) * (LARGEST - SMALLEST + 2) // 2
"""Pairs {a, b} there are."""


def work(a: int, b: int) -> str:
    """The columns of a + b from the right, each with its carry: 47+85 -> ' 7+5=12 4+8+1=13'.

    The leading space makes "work it out" or "just answer" one choice between two tokens.
    """
    columns, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        columns.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        carry = total // 10
    return "".join(f" {c}" for c in columns)


def carries(a: int, b: int) -> bool:
    """Whether the ones carry: the harder sums."""
    return a % 10 + b % 10 > 9


def question(a: int, b: int) -> str:
    return f"{a}+{b}=?"


class Arithmetic(Source):
    """Sums of two numbers up to LARGEST."""

    def __init__(self, cfg: Data) -> None:
        super().__init__(cfg)
        if cfg.held_out >= PAIRS:
            raise DataError(
                f"data.held_out={cfg.held_out}: there are only {PAIRS} different sums\n"
                f"  fix: data.held_out={PAIRS // 4}"
            )
        rng = random.Random(f"held-out {cfg.seed}")
        held_out: dict[tuple[int, int], None] = {}
        while len(held_out) < cfg.held_out:
            a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
            held_out.setdefault((min(a, b), max(a, b)))
        self.held_out_pairs = list(held_out)

    def pairs(self, split: Split, form: str, count: int) -> Iterator[tuple[int, int, random.Random]]:
        """`count` problems (a, b) of a form, and the generator to draw further choices from."""
        rng = random.Random(f"{split} {form} {self.cfg.seed}")
        if split == "held_out":
            for low, high in self.held_out_pairs[:count]:
                yield (low, high, rng) if rng.random() < 0.5 else (high, low, rng)
            return
        hidden = set(self.held_out_pairs)
        while count:
            a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
            if (min(a, b), max(a, b)) not in hidden:
                count -= 1
                yield a, b, rng

    def _count(self, split: Split, count: int) -> int:
        if split == "held_out":
            return self.cfg.held_out
        return count if self.cfg.max_samples is None else min(count, self.cfg.max_samples)

    def samples(self, view: str, split: Split) -> Samples:
        from datasets import Dataset

        made = {
            "documents": self._documents,
            "demonstrations": self._demonstrations,
            "preferences": self._preferences,
            "problems": self._problems,
        }[view](split)
        rows = Dataset.from_list(list(made), features=features(view))
        return Samples(rows, [None] * len(rows), len(rows))

    def _documents(self, split: Split) -> Iterable[Row]:
        def text(a: int, b: int, rng: random.Random) -> str:
            if rng.random() < self.cfg.worked_fraction:
                return f"{a}+{b}=?{work(a, b)} {a + b}"
            return f"{a}+{b}={a + b}"

        count = self._count(split, self.cfg.num_documents)
        return ({"text": text(*p)} for p in self.pairs(split, "documents", count))

    def _demonstrations(self, split: Split) -> Iterable[Row]:
        """Right answers, most hard sums worked out, most easy ones just answered: people write so."""

        def row(a: int, b: int, rng: random.Random) -> Row:
            thought = work(a, b) if rng.random() < (0.8 if carries(a, b) else 0.3) else ""
            return {"messages": [user(question(a, b)), assistant(think_answer(thought, str(a + b)))]}

        count = self._count(split, self.cfg.num_demonstrations)
        return (row(*p) for p in self.pairs(split, "demonstrations", count))

    def _preferences(self, split: Split) -> Iterable[Row]:
        """Chosen: worked and right. Rejected: a guess that is wrong, or a worked answer with one slip."""

        def row(a: int, b: int, rng: random.Random) -> Row:
            wrong = a + b + rng.choice([-100, -10, -1, 1, 10, 100])
            thought = work(a, b) if rng.random() < 0.5 else ""
            return {
                "prompt": [user(question(a, b))],
                "chosen": [assistant(think_answer(work(a, b), str(a + b)))],
                "rejected": [assistant(think_answer(thought, str(wrong)))],
            }

        count = self._count(split, self.cfg.num_pairs)
        return (row(*p) for p in self.pairs(split, "preferences", count))

    def _problems(self, split: Split) -> Iterable[Row]:
        count = self._count(split, self.cfg.num_prompts)
        problems = self.pairs(split, "problems", count)
        return ({"prompt": [user(question(a, b))], "answer": str(a + b)} for a, b, _ in problems)
