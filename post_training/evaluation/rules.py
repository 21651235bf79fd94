"""Instructions whose keeping a program can check, in the manner of IFEval (arXiv:2311.07911), made from a seed. Pure.

Each prompt asks for a few words on something and sets one or two rules. It counts where every rule is kept (strict
accuracy, by prompt). What a model thinks before it answers is no part of the answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from post_training.rewards.verify import answer_text


@dataclass(frozen=True)
class Rule:
    """One rule in words, and whether an answer keeps it."""

    kind: str
    text: str
    kept: Callable[[str], bool]


@dataclass(frozen=True)
class Instruction:
    prompt: str
    rules: tuple[Rule, ...]

    def kept(self, completion: str) -> bool:
        """Whether the answer in a completion keeps every rule. An answer without a word keeps none."""
        text = final(completion)
        return bool(words(text)) and all(rule.kept(text) for rule in self.rules)


TOPICS = (
    "a river", "the moon", "bread", "a bicycle", "winter", "a library", "an old bridge", "the sea", "a garden",
    "a train", "music", "a kitchen", "the desert", "a dog", "a market", "a lighthouse", "rain", "a school",
    "a mountain", "coffee",
)  # fmt: skip
TASKS = ("Write about {}.", "Tell me something about {}.", "Describe {}.", "Say what you like about {}.")
WORDS = (
    "bright", "quiet", "stone", "morning", "water", "slowly", "window", "green", "always", "voice", "paper", "north",
)  # fmt: skip
SMALL = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def final(completion: str) -> str:
    """The answer in a completion: what stands in its last <answer> tag, else what follows its thought, stripped."""
    tagged = answer_text(completion)
    return tagged if tagged is not None else completion.rpartition("</think>")[2].strip()


def words(text: str) -> list[str]:
    """Words: runs of letters and digits, with the apostrophes and hyphens inside them."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def sentences(text: str) -> int:
    """Sentences: pieces with a word in them that end with . ! or ?, and what is left after the last of these."""
    return sum(bool(words(piece)) for piece in re.split(r"[.!?]+(?:\s|$)", text))


def is_json(text: str) -> bool:
    """Whether it is JSON and nothing else, but for a fence of three backticks around it."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n```", text, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _has(text: str, word: str) -> bool:
    return word.lower() in map(str.lower, words(text))


def rule(kind: str, draw: random.Random, pool: list[str]) -> Rule:
    """A rule of a kind, its numbers drawn, its words taken off the pool: no two rules of a prompt speak of the same."""
    word, other = pool.pop(), pool.pop()
    match kind:
        case "words":
            n = draw.randint(1, 10)
            return Rule(kind, f"Answer in exactly {SMALL[n - 1]} word{'s' * (n > 1)}.", lambda t: len(words(t)) == n)
        case "at_most":
            n = draw.choice((10, 20, 30))
            return Rule(kind, f"Use at most {n} words.", lambda t: len(words(t)) <= n)
        case "sentences":
            n = draw.randint(2, 5)
            return Rule(kind, f"Write at least {SMALL[n - 1]} sentences.", lambda t: sentences(t) >= n)
        case "lower":
            return Rule(kind, "Write in lower case only.", lambda t: t == t.lower())
        case "upper":
            return Rule(kind, "Write in capital letters only.", lambda t: t == t.upper())
        case "no_comma":
            return Rule(kind, "Do not use any comma.", lambda t: "," not in t)
        case "end":
            return Rule(kind, f'End with the word "{word}".', lambda t: words(t)[-1].lower() == word)
        case "start":
            return Rule(kind, f'Begin with the word "{word}".', lambda t: words(t)[0].lower() == word)
        case "include":
            return Rule(kind, f'Include the words "{word}" and "{other}".', lambda t: _has(t, word) and _has(t, other))
        case "exclude":
            return Rule(kind, f'Do not use the word "{word}".', lambda t: not _has(t, word))
        case "bullets":
            n = draw.randint(2, 4)
            text = f'Answer with exactly {SMALL[n - 1]} lines, each of which begins with "- ".'
            return Rule(kind, text, lambda t: [x[:2] for x in t.splitlines() if x.strip()] == ["- "] * n)
        case "json":
            return Rule(kind, "Answer with valid JSON and nothing else.", is_json)
    raise ValueError(kind)


ALONE = ("words", "json", "bullets")
TOGETHER = (
    ("at_most", "sentences"), ("lower", "upper"), ("no_comma",), ("end",), ("start",), ("include",), ("exclude",),
)  # fmt: skip
"""Kinds that do not contradict each other are in different groups: of each group a prompt has one at most."""


def instructions(count: int, seed: int) -> list[Instruction]:
    """`count` instructions, the first ones the same for any count; kinds take turns, so that few show them all."""
    made = []
    for number in range(count):
        draw = random.Random(f"instructions {seed} {number}")
        groups = (*((kind,) for kind in ALONE), *TOGETHER)
        first = groups[number % len(groups)]
        chosen = [draw.choice(first)]
        if first in TOGETHER and draw.random() < 0.5:
            chosen.append(draw.choice(draw.choice([g for g in TOGETHER if g != first])))
        pool = draw.sample(WORDS, len(WORDS))
        rules = tuple(rule(kind, draw, pool) for kind in chosen)
        task = draw.choice(TASKS).format(draw.choice(TOPICS))
        made.append(Instruction(" ".join((task, *(r.text for r in rules))), rules))
    return made
