"""The steps of a reasoning: the equations in a completion's thought, and which of them hold. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_NUMBER = r"\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\w.,])({_NUMBER}(?:\s*[-+*/x×÷]\s*{_NUMBER})+)\s*=\s*(-?{_NUMBER})")
_TERM = re.compile(rf"({_NUMBER})\s*([-+*/x×÷]?)")


def thought(text: str) -> str | None:
    """What is between <think> and </think>; None where a completion has no such part."""
    match = _THOUGHT.search(text)
    return match[1].strip() if match else None


def steps(text: str) -> list[bool]:
    """For each equation in the thought, as in 12 + 3*4 = 24, whether it holds, rounded as its right side is."""
    return [_holds(left, right) for left, right in _EQUATION.findall(thought(text) or "")]


def _value(text: str) -> Fraction:
    return Fraction(text.replace("$", "").replace(",", ""))


def _holds(left: str, right: str) -> bool:
    """Products and quotients before sums and differences."""
    total, product, sign, operator = Fraction(0), Fraction(1), 1, "*"
    for number, following in _TERM.findall(left):
        value = _value(number)
        if operator in "/÷" and value == 0:
            return False
        product = product / value if operator in "/÷" else product * value
        if following in ("+", "-", ""):
            total += sign * product
            product, sign, operator = Fraction(1), -1 if following == "-" else 1, "*"
        else:
            operator = following
    places = len(right.partition(".")[2])
    return abs(total - _value(right)) * 2 <= Fraction(1, 10**places) if places else total == _value(right)


def step_figures(completions: Sequence[str]) -> dict[str, float | None]:
    """`steps`: equations in a completion's thought on average; `steps_right`: the share of them that hold.

    `thought`: share of completions with a thought that is not empty. completions: at least one.
    """
    found = [steps(text) for text in completions]
    count = sum(map(len, found))
    return {
        "thought": sum(bool(thought(text)) for text in completions) / len(completions),
        "steps": count / len(found),
        "steps_right": sum(map(sum, found)) / count if count else None,
    }
