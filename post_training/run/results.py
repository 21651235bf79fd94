"""results.json: what an evaluation found, as named figures with their intervals. Both sides read it here alone.

    {"version": 2, "headline": "accuracy", "figures": {"accuracy": {"value": 0.58, "low": 0.54, "high": 0.62,
     "count": 512}, ...}, "settings": {...}, "seconds": 4.1}

Version 1 (flat keys, `metric` and `score`) is read too. It is written into an output whose manifest comes last: an
evaluation that was cut short has no results.json that anybody reads.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from post_training.run.directory import RunDirectory, write_atomic

VERSION = 2


@dataclass(frozen=True)
class Figure:
    """One figure; where they are known its 95 % interval and how many problems, records or pairs it is from."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    headline: str | None = None  # name of the figure that says what the model is worth
    figures: dict[str, Figure] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # how it was asked: samples, temperature, backend, ...
    seconds: float | None = None

    @property
    def score(self) -> Figure | None:
        """The headline's figure."""
        return self.figures.get(self.headline) if self.headline is not None else None


@dataclass(frozen=True)
class Metric:
    """How a figure is named and shown."""

    title: str  # of a table's column
    form: str  # of str.format
    better: int  # 1: higher is better, -1: lower is better, 0: neither
    help: str
    scale: float = 1.0  # of what is shown to what is kept


def _share(title: str, help: str, better: int = 1) -> Metric:
    return Metric(title, "{:.1f} %", better, help, 100.0)


METRICS: dict[str, Metric] = {
    "accuracy": _share("accuracy", "held-out problems answered rightly, greedily"),
    "preference_accuracy": _share("pairs", "held-out pairs whose chosen answer the reward model scores higher"),
    "implicit_accuracy": _share("likelier", "held-out pairs whose chosen answer became likelier against the other"),
    "majority": _share("majority", "problems on which the most frequent of the sampled answers is right"),
    "instructions": _share("follows", "prompts whose rules, checked by a program, the answer keeps"),
    "format": Metric("form", "{:.2f}", 1, "share of answers of the form <think>...</think><answer>...</answer>"),
    "reward": Metric("reward", "{:.3f}", 1, "mean reward of the greedy answers, at the rewards' default weights"),
    "perplexity_text": Metric("ppl text", "{:.2f}", -1, "perplexity of held-out documents"),
    "perplexity_answers": Metric("ppl answers", "{:.2f}", -1, "perplexity of held-out answers, given their prompts"),
    "kl_start": Metric("KL start", "{:.3f}", 0, "nats a token from the model that the stage started from"),
    "repetition": Metric("repeat", "{:.3f}", -1, "share of an answer's 4-grams that occurred in it before"),
    "distinct_1": Metric("dist-1", "{:.3f}", 0, "different tokens in all answers, of all tokens"),
    "distinct_2": Metric("dist-2", "{:.3f}", 0, "different pairs of tokens in all answers, of all pairs"),
    "length": Metric("tokens", "{:.1f}", 0, "tokens of an answer"),
    "truncated": Metric("cut", "{:.2f}", -1, "share of answers that ended at eval.max_new_tokens"),
    "thought": Metric("thinks", "{:.2f}", 0, "share of answers with a thought that is not empty"),
    "steps": Metric("steps", "{:.1f}", 0, "steps of reasoning in an answer"),
    "steps_right": Metric("right", "{:.2f}", 1, "share of steps with an equation whose equations hold"),
    "margin": Metric("margin", "{:.2f}", 1, "reward of the chosen answer minus that of the other"),
    "brier": Metric("Brier", "{:.3f}", -1, "mean squared error of sigmoid(margin) as a probability"),
    "calibration_error": Metric("calib.", "{:.3f}", -1, "expected calibration error of sigmoid(margin)"),
    "mean_reward": Metric("mean r", "{:.2f}", 0, "mean reward of all held-out answers"),
    "judge": Metric("judge", "{:.2f}", 1, "mean score by the judge, 1 to 10"),
    "judge_win_rate": _share("wins", "questions on which the judge prefers the answer to the reference's"),
    "judge_unread": Metric("unread", "{:.0f}", -1, "verdicts of the judge that could not be read, and were left out"),
}
"""Every figure that an evaluation of ours can find; beside these `pass@<k>`, and `<task>/<metric>` of a benchmark."""


def metric(name: str) -> Metric:
    """How a figure is shown; benchmarks' figures under their own names."""
    if name in METRICS:
        return METRICS[name]
    if re.fullmatch(r"pass@\d+", name):
        return _share(name, f"problems that one of {name[5:]} sampled answers solves, the unbiased estimate")
    lower = any(word in name for word in ("perplexity", "error", "bits_per_byte"))
    return Metric(name, "{:.3f}", -1 if lower else 1, "a benchmark's own figure (lm-eval)")


def shown(name: str, figure: Figure | None) -> str:
    """A figure as tables show it; `-` where there is none."""
    if figure is None:
        return "-"
    how = metric(name)
    return how.form.format(how.scale * figure.value)


def from_plain(found: dict[str, Any]) -> Results:
    """Results from what results.json holds, of version 1 or 2. Raises ValueError where it is neither."""
    try:
        if found.get("version", 1) == 1:
            return _from_version_1(found)
        if found["version"] != VERSION:
            raise ValueError(f"results.json has version {found['version']}; this code reads 1 to {VERSION}")
        figures = {str(name): Figure(**_numbers(figure)) for name, figure in found["figures"].items()}
        return Results(found.get("headline"), figures, dict(found.get("settings") or {}), found.get("seconds"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results.json is damaged: {error!r}") from None


def _numbers(figure: dict[str, Any]) -> dict[str, Any]:
    found = {key: figure.get(key) for key in ("value", "low", "high", "count")}
    for key, value in found.items():
        if value is None and key != "value":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise TypeError(f"{key}={value!r} is no finite number")
    return found


def _from_version_1(found: dict[str, Any]) -> Results:
    figures = {
        name: Figure(float(value))
        for name, value in found.items()
        if name in METRICS and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    headline = found.get("metric")
    if headline is not None and found.get("score") is not None:
        keys = {"value": "score", "low": "score_low", "high": "score_high", "count": "count"}
        figures = {headline: Figure(**_numbers({ours: found.get(theirs) for ours, theirs in keys.items()}))} | figures
    return Results(headline, figures, {}, found.get("seconds"))


def as_plain(results: Results) -> dict[str, Any]:
    """What results.json holds. Raises ValueError for a figure that is no finite number."""
    for name, figure in results.figures.items():
        if not math.isfinite(figure.value):
            raise ValueError(f"{name}={figure.value} is no finite number")
    figures = {
        name: {key: value for key, value in asdict(figure).items() if value is not None}
        for name, figure in results.figures.items()
    }
    return {"version": VERSION, **asdict(results), "figures": figures}


def write(folder: Path, results: Results) -> None:
    """Write results.json into an output that is being made."""
    write_atomic(folder / "results.json", json.dumps(as_plain(results), indent=1) + "\n")


def read(run: RunDirectory) -> Results:
    """What an evaluation's run found. Raises OSError and ValueError; whether the output is whole its manifest says."""
    found = json.loads(run.results.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("results.json is damaged: no mapping")
    return from_plain(found)
