"""Verifiable rewards, and the one answer parser that rewards and evaluation share. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from conf.schema import Reward
from post_training.rewards.mathematics import math_verify
from post_training.run.directory import RunDirectory

RewardFunction = Callable[..., Sequence[float | None]]

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)  # the tag nearest to its end
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_FORMAT = re.compile(r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>[^<]+</answer>\s*", re.DOTALL)


def number(text: str) -> Decimal | None:
    """The number that `text` is, with $ signs, thousands commas and a final dot taken off; None if it is none."""
    match = _NUMBER.fullmatch(text.strip().rstrip("."))
    if match is None:
        return None
    try:
        return Decimal(match.group().replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None


def answer_text(text: str) -> str | None:
    """What stands in the last <answer>...</answer> of a completion, stripped; None without one."""
    answers = _ANSWER.findall(text)
    return answers[-1].strip() if answers else None


def parse_answer(text: str) -> Decimal | None:
    """The number in the last <answer>...</answer> of a completion; None where there is no such number."""
    found = answer_text(text)
    return None if found is None else number(found)


def is_correct(text: str, answer: str) -> bool:
    """Whether a completion's answer equals the expected one as a number."""
    expected = number(answer)
    return expected is not None and parse_answer(text) == expected


def has_format(text: str) -> bool:
    """Whether a completion is exactly one <think>...</think> and one <answer>...</answer>."""
    return _FORMAT.fullmatch(text) is not None


def text_of(completion: Any) -> str:
    """The text of a completion, conversational ([{role, content}]) or plain."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correct(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right answer, else 0."""
    return [float(is_correct(text_of(c), a)) for c, a in zip(completions, answer, strict=True)]


def format(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for think/answer form, else 0: bounded, so that form alone never beats an answer."""
    return [float(has_format(text_of(c))) for c in completions]


def random(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """A coin flip drawn from the texts, the same in every attempt: a control that must not teach anything."""

    def flip(prompt: Any, completion: Any) -> float:
        digest = hashlib.sha256(f"{text_of(prompt)}\0{text_of(completion)}".encode()).digest()
        return float(digest[0] & 1)

    return [flip(p, c) for p, c in zip(prompts, completions, strict=True)]


def reward_functions(weights: Reward, run: RunDirectory | None = None) -> tuple[list[RewardFunction], list[float]]:
    """The functions with a weight other than 0, and their weights.

    run: where the copies of the user's own functions are. Raises DataError for one that cannot be loaded.
    """
    from post_training.rewards import custom

    known: list[tuple[RewardFunction, float]] = [
        (correct, weights.correct),
        (math_verify, weights.math_verify),
        (format, weights.format),
        (random, weights.random),
    ]
    chosen = [(function, weight) for function, weight in known if weight]
    for named in weights.functions:
        assert run is not None
        if named.weight:
            chosen.append((custom.load(named, run), named.weight))
    return [f for f, _ in chosen], [w for _, w in chosen]
