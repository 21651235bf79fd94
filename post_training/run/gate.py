"""Gates: whether what an evaluation found lets the stages that take the judged model start.

A gate names one figure of results.json and one bound for it. In a frozen config and in pipeline.json it is plain data:

    {"metric": "accuracy", "at_least": 0.3, "at_most": null, "max_drop": null, "parent": null}

metric null: the evaluation's headline figure. max_drop: `parent` is the evaluation that it is compared with, as
{"name": ..., "run_dir": ...}. Values are compared as they are, in the figure's own unit (a share is from 0 to 1); the
intervals stand in the reason only. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.run import results
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure, Results

BOUNDS = ("at_least", "at_most", "max_drop")
ROUNDING = 1e-9
"""Differences of shares are not exact in binary: 0.8 - 0.7 is above 0.1."""


def decide(gate: Mapping[str, Any], found: Results, parent: Results | None = None) -> str | None:
    """Why the gate does not hold; None where it holds. Pure.

    parent: what the evaluation that `max_drop` compares with found.
    """
    name = gate.get("metric") or found.headline
    if name is None:
        return "the evaluation has no headline figure, and the gate names none"
    ours = found.figures.get(name)
    if ours is None:
        return f"the evaluation found no {name} ({_list(found)})"
    if gate.get("at_least") is not None and ours.value < gate["at_least"]:
        return f"{name} {told(ours, gate['at_least'])} is below at_least {gate['at_least']:g}"
    if gate.get("at_most") is not None and ours.value > gate["at_most"]:
        return f"{name} {told(ours, gate['at_most'])} is above at_most {gate['at_most']:g}"
    most = gate.get("max_drop")
    if most is None:
        return None
    who = (gate.get("parent") or {}).get("name") or "the parent's evaluation"
    theirs = parent.figures.get(name) if parent is not None else None
    if theirs is None:
        return f"{who} found no {name} to compare with" + (f" ({_list(parent)})" if parent is not None else "")
    better = results.metric(name).better
    if better == 0:
        return f"of {name} neither more nor less is better, so it cannot drop"
    drop = (theirs.value - ours.value) * better
    if drop <= most + ROUNDING:
        return None
    return f"{name} {told(ours)} is worse than {who}'s {told(theirs)} by {drop:.4g}, more than max_drop {most:g}"


def told(figure: Figure, bound: float | None = None) -> str:
    """A figure with its interval, as in `0.213 (0.18 to 0.25)`; with all digits where it would look like the bound."""
    value = f"{figure.value:.3g}"
    if bound is not None and float(value) == bound:
        value = repr(figure.value)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({figure.low:.2g} to {figure.high:.2g})"


def _list(found: Results) -> str:
    return f"it found: {', '.join(found.figures)}" if found.figures else "it found nothing"


def describe(gate: Mapping[str, Any]) -> str:
    """A gate in few words, as in `accuracy at_least 0.3`."""
    bound = next((f"{name} {gate[name]:g}" for name in BOUNDS if gate.get(name) is not None), "no bound")
    parent = (gate.get("parent") or {}).get("name")
    return f"{gate.get('metric') or 'headline'} {bound}" + (f" from {parent}" if parent else "")


def failure(run: RunDirectory, gate: Mapping[str, Any] | None) -> str | None:
    """Why the gate of an evaluation whose output is whole does not hold; None where it holds, or there is no gate.

    Results that are missing or damaged hold no gate. Raises OSError where the disk does not answer.
    """
    if gate is None:
        return None
    try:
        found = _read(run)
        parent = gate.get("parent")
        return decide(gate, found, _read(RunDirectory(Path(parent["run_dir"]))) if parent else None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return str(error) or repr(error)


def _read(run: RunDirectory) -> Results:
    try:
        return results.read(run)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no {run.results}") from None
    except ValueError as error:
        raise ValueError(f"{run.results} cannot be read: {error}") from None
