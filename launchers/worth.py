"""What the stages of a pipeline are worth: their evaluations read, compared, and made into plain rows. No printing.

Two figures differ where their 95 % intervals do not overlap (`outside`); `launchers.compare` and `launchers.report`
show the same rows (`rows_of`).
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launchers.runs import Look, ask_slurm, looks_of, real
from launchers.runs import rows_of as states_of
from launchers.table import near
from post_training.run import results
from post_training.run.directory import is_there
from post_training.run.results import Figure, Results


@dataclass(frozen=True)
class Judged:
    """A stage and what its evaluations found; `samples` are the answers to the same problems."""

    stage: str
    parent: str | None  # the stage that it started from
    model: Path
    results: Results
    samples: list[dict[str, Any]]
    line: tuple[str, ...] = ()  # the stages that it comes from, the nearest first
    judges: tuple[str, ...] = ()  # the eval stages
    asked: str = ""  # which problems and texts: two stages are comparable where both were asked the same


@dataclass(frozen=True)
class Undone:
    """An evaluation that has no whole results: not there yet, or damaged (then `fix` says what to do)."""

    stage: str  # whose model it judges
    judge: str
    state: str
    reason: str | None
    fix: str | None = None

    def line(self) -> str:
        """For a person."""
        said = f"{self.stage}: {self.judge} is {self.state}" + (f" ({self.reason})" if self.reason else "")
        return f"{said}; fix: {self.fix}" if self.fix else said


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, its judged stages in the pipeline's order, and evaluations without whole results."""

    folder: Path
    judged: list[Judged] = field(default_factory=list)
    undone: list[Undone] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name


TEST_SET = ("name", "path", "eval_path", "subset", "split", "eval_split", "transform", "datasets")
"""Keys of an eval's `data` that say which problems and texts it is asked; seeds draw others of the same kind."""


def judged_stages(looks: list[Look]) -> list[Judged]:
    """The stages of one pipeline that have been judged, in the pipeline's order. Raises ValueError for damage."""
    judged, damaged, _ = _read(looks)
    if damaged:
        raise ValueError("; ".join(f"{one.judge}: {one.reason}" for one in damaged))
    return judged


def judged_and_damaged(looks: list[Look]) -> tuple[list[Judged], list[Undone]]:
    """The same, and the evaluations whose results are damaged."""
    judged, damaged, _ = _read(looks)
    return judged, damaged


def _read(looks: list[Look]) -> tuple[list[Judged], list[Undone], list[tuple[str, Look]]]:
    """Judged stages, evaluations whose results are damaged, and evaluations without a whole output.

    A start model that no stage of the pipeline made has its evaluation's name: `base` for eval_base.
    """
    evals = [look for look in looks if look.config.get("stage") == "eval"]
    elsewhere = _from_elsewhere(looks, evals)
    of = _start_models(looks, elsewhere)
    models = {look.name: look.run.model for look in looks} | {n: Path(path) for path, n in elsewhere.items()}
    found: dict[str, list[Judged]] = {}
    damaged, waiting = [], []
    for judge in evals:
        stage = of.get(judge.name)
        if stage is None:
            continue  # a config without a model is damaged; status tells
        if judge.output_problem is not None:
            waiting.append((stage, judge))
            continue
        try:
            theirs = results.read(judge.run)
        except (OSError, ValueError, RecursionError) as error:
            damaged.append(Undone(stage, judge.name, "damaged", one_line(str(error)), _again(judge, error)))
            continue
        line: list[str] = []
        while (parent := of.get(line[-1] if line else stage)) is not None and parent not in line:
            line.append(parent)
        asked = {key: value for key in TEST_SET if (value := judge.section("data").get(key)) is not None}
        one = Judged(
            stage, line[0] if line else None, models[stage], theirs, _samples(judge.run.samples),
            tuple(line), (judge.name,), json.dumps(asked, sort_keys=True, default=str),
        )  # fmt: skip
        of_stage = found.setdefault(stage, [])
        for i, other in enumerate(of_stage):
            if not other.results.figures.keys() & theirs.figures.keys():
                of_stage[i] = _together(other, one)
                break
        else:
            of_stage.append(one)
    order = [*elsewhere.values(), *(look.name for look in looks)]
    return [one for name in order for one in found.get(name, [])], damaged, waiting


def _from_elsewhere(looks: list[Look], evals: list[Look]) -> dict[str, str]:
    """Judged models that no stage of the pipeline made: a name for each by its path or hub id."""
    taken = {look.name for look in looks}
    found: dict[str, str] = {}
    for judge in evals:
        if _maker(judge, looks) is None and (path := _path(judge)):
            name = judge.name.removeprefix("eval_")
            found.setdefault(path, judge.name if name in taken else name)
    return found


def _start_models(looks: list[Look], elsewhere: dict[str, str]) -> dict[str, str]:
    """By stage, whose model it starts from or judges; without those that start from one nobody judged."""
    found = {look.name: _maker(look, looks) or elsewhere.get(_path(look)) for look in looks}
    return {name: start for name, start in found.items() if start is not None}


def _maker(look: Look, looks: list[Look]) -> str | None:
    """The stage that made a run's start model; found by its last two folders where outputs were moved or copied."""
    folder = look.inputs().get("model", "")
    same = [other.name for other in looks if real(other.run.root) == folder]
    moved = [other for other in looks if other.run.root.parts[-2:] == Path(folder).parts[-2:]]
    if not same and is_there(Path(folder)):  # then this is a copy, or the model is another pipeline's
        source = look.section("inputs").get("model")
        identity = source.get("identity") if isinstance(source, dict) else None
        moved = [other for other in moved if identity in (None, other.config.get("identity"))]
    return next(iter(same or [other.name for other in moved]), None)


def _path(look: Look) -> str:
    """Path or hub id of a run's start model; empty where it has none."""
    source = look.section("inputs").get("model")
    path = source.get("path") if isinstance(source, dict) else None
    return path if isinstance(path, str) else ""


def _together(first: Judged, second: Judged) -> Judged:
    """Two evaluations of one stage that found different figures, as one; the headline is that of the first."""
    a, b = first.results, second.results
    main = first if a.score is not None or b.score is None else second
    merged = Results(main.results.headline, a.figures | b.figures, b.settings | a.settings, a.seconds)
    return replace(main, results=merged, samples=first.samples or second.samples, judges=first.judges + second.judges)


def _again(judge: Look, error: Exception) -> str:
    if "has version" in str(error):
        return "read it with the code that wrote it, a newer one"
    return f"remove {near(judge.run.model)} and give the pipeline's command again"


def _samples(path: Path) -> list[dict[str, Any]]:
    """Answers that can be shown; none where the file has others."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    keys = {"prompt", "answer", "completion", "correct"}
    good = all(isinstance(sample, dict) and sample.keys() >= keys for sample in found)
    return found if good else []


def read_pipeline(folder: Path) -> Pipeline:
    """A pipeline as its run directories tell it. SLURM is asked only where an evaluation is not done."""
    looks = looks_of(folder)
    judged, undone, waiting = _read(looks)
    if waiting:
        of = {judge.name: stage for stage, judge in waiting}
        for row in states_of(looks, ask_slurm([judge for _, judge in waiting]), time.time()):
            if row["stage"] in of:
                undone.append(Undone(of[row["stage"]], row["stage"], row["state"], row["reason"]))
    return Pipeline(folder, judged, undone)


# ------------------------------------------------------------------------------------------ differences


def outside(ours: Figure, theirs: Figure) -> bool | None:
    """Whether the difference of two figures lies outside the error bars: their 95 % intervals do not overlap.

    None where an interval is not known. A careful rule: for equal standard errors it asks for a difference of
    2 x 1.96 / sqrt(2) = 2.77 standard errors of the difference, which equal models reach in 0.6 % of comparisons, not
    in 5 %. Intervals that overlap do not show that two models are equal.
    """
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return None
    return ours.low > theirs.high or ours.high < theirs.low


def mark(is_outside: bool | None) -> str:
    """`*` outside the error bars, `~` within them, nothing where they are not known."""
    return "" if is_outside is None else "*" if is_outside else "~"


def forgotten(stage: Judged, stages: list[Judged]) -> dict[str, Any] | None:
    """What a stage lost on the held-out text of the first judged stage of its line, in nats a token.

    log(perplexity_text) minus that of the first: positive is lost. None for the first itself, and where the two were
    not judged on the same text.
    """
    ours = _log(stage.results.figures.get("perplexity_text"))
    for name in reversed(stage.line):
        for first in stages:
            theirs = _log(first.results.figures.get("perplexity_text"))
            if first.stage == name and theirs is not None:
                if ours is None or not _same_text(stage, first):
                    return None
                return _plain_difference(ours.value - theirs.value, outside(ours, theirs), first.stage)
    return None


def _log(figure: Figure | None) -> Figure | None:
    if figure is None or not figure.value > 0:
        return None
    low, high = (math.log(x) if x is not None and x > 0 else None for x in (figure.low, figure.high))
    return Figure(math.log(figure.value), low, high, figure.count)


def _same_text(a: Judged, b: Judged) -> bool:
    told = a.results.settings.get("text"), b.results.settings.get("text")
    return a.asked == b.asked if None in told else told[0] == told[1]


def _parents(stage: Judged, stages: list[Judged]) -> list[Judged]:
    """What a stage is compared with: the nearest judged stage that it comes from; several where it has several rows."""
    for name in stage.line or ((stage.parent,) if stage.parent else ()):
        if found := [s for s in stages if s.stage == name]:
            return found
    return []


def _difference(stage: Judged, others: Iterable[Judged], name: str | None) -> dict[str, Any] | None:
    """The figure `name` of a stage minus that of the first of the others with which it can be compared.

    They were asked the same, and a headline is compared with a headline.
    """
    if name is None or (ours := stage.results.figures.get(name)) is None:
        return None
    for other in others:
        theirs = other.results.figures.get(name)
        same = _same_text(stage, other) if name == "perplexity_text" else stage.asked == other.asked
        if theirs is None or not same or (stage.results.headline == name != other.results.headline):
            continue
        return _plain_difference(ours.value - theirs.value, outside(ours, theirs), other.stage)
    return None


def _plain_difference(value: float, is_outside: bool | None, against: str) -> dict[str, Any]:
    return {"value": value, "outside": is_outside, "mark": mark(is_outside), "against": against}


def best(stages: list[Judged]) -> Judged | None:
    """The model that is worth most, by accuracy, else by the headline that most stages have; reward models aside."""
    found = [s for s in stages if s.results.score is not None and s.results.headline != "preference_accuracy"]
    counts = Counter(s.results.headline for s in found)
    headline = "accuracy" if counts["accuracy"] else max(counts, key=lambda name: counts[name], default=None)
    if headline is None or not (sign := results.metric(headline).better):
        return None
    return max(
        (s for s in found if s.results.headline == headline),
        key=lambda s: sign * s.results.score.value if s.results.score else 0.0,
    )


# -------------------------------------------------------------------------------------------- plain rows


def rows_of(pipelines: Sequence[Pipeline]) -> list[dict[str, Any]]:
    """One row a judged stage: what every form of the table is made from. Plain data.

    `change`: the headline's against `against`, the nearest judged stage that it comes from; `figures` hold theirs.
    `beside`: against the same stage of the first pipeline. `forgot`: nats a token, against the line's first stage.
    """
    rows = []
    firsts = pipelines[0].judged if pipelines else []
    for i, pipeline in enumerate(pipelines):
        counts = Counter(s.stage for s in pipeline.judged)
        for stage in pipeline.judged:
            others = _parents(stage, pipeline.judged)
            twins = [s for s in firsts if s.stage == stage.stage] if i else []
            figures = {
                name: {k: v for k, v in asdict(figure).items() if v is not None}
                | {"change": _difference(stage, others, name)}
                for name, figure in stage.results.figures.items()
            }
            headline = stage.results.headline
            rows.append(
                {
                    "pipeline": pipeline.name,
                    "stage": stage.stage,
                    "row": stage.stage if counts[stage.stage] == 1 else f"{stage.stage} ({', '.join(stage.judges)})",
                    "parent": stage.parent,
                    "model": str(stage.model),
                    "judges": list(stage.judges),
                    "headline": headline,
                    "score": figures.get(headline) if headline is not None else None,
                    "beside": _difference(stage, twins, headline),
                    "forgot": forgotten(stage, pipeline.judged),
                    "figures": figures,
                    "settings": stage.results.settings,
                    "seconds": stage.results.seconds,
                }
            )
    return rows


def telling(stages: list[Judged], count: int) -> list[int]:
    """The problems on which the stages disagree most: those tell more than ones that all get right."""
    problems = range(min((len(s.samples) for s in stages), default=0))
    right = {i: sum(bool(s.samples[i]["correct"]) for s in stages) for i in problems}
    return sorted(problems, key=lambda i: abs(2 * right[i] - len(stages)))[:count]


def one_line(text: str, width: int | None = 110) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if width is None or len(flat) <= width else f"{flat[: width - 3]}..."
