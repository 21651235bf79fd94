"""The across-stages table: what each stage's model is worth on held-out problems, what it gained, what it forgot.

    python -m launchers.compare [run_name=NAME ...] [paths.output_base=outputs] [--markdown|--csv|--json] [--all]

Several pipelines are also set side by side, each against the first. Exit status: 0; 1 where an evaluation's results
are damaged (the others are shown), or where no stage has been judged yet; 2 for bad input.

All forms are made from the same plain rows (`rows_of`). A difference is marked `*` where it lies outside the error bars
and `~` where it does not (`outside`).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from launchers.status import Look, ask_slurm, find_pipelines, looks_of, real
from launchers.status import rows_of as states_of
from post_training.run import results
from post_training.run.results import Figure, Results

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1
"""Of what --json prints."""
NUM_SAMPLES = 3
"""Problems shown with every stage's answer."""
MANY = 4
"""Of more pipelines than these, nobody having named them, each one's own table comes with --all alone."""


# --------------------------------------------------------------------------------- what was found, by stage


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
    """The stages of one pipeline that have been judged, in the pipeline's order. Damaged results are left out."""
    return _read(looks)[0]


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
            damaged.append(Undone(stage, judge.name, "damaged", _one_line(str(error)), _again(judge, error)))
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
    """The stage that made a run's start model; found by its last two folders where outputs were moved."""
    folder = look.inputs().get("model", "")
    same = [other.name for other in looks if real(other.run.root) == folder]
    moved = [other.name for other in looks if other.run.root.parts[-2:] == Path(folder).parts[-2:]]
    return next(iter(same or ([] if Path(folder).exists() else moved)), None)


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
    return f"remove {_here(judge.run.model)} and give the pipeline's command again"


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


def change(stage: Judged, stages: list[Judged]) -> tuple[float, bool] | None:
    """Score minus the parent's, and whether it lies outside both 95 % intervals; None where they cannot be compared."""
    found = _difference(stage, _against(stage, stages), stage.results.headline)
    return None if found is None or found["outside"] is None else (found["value"], found["outside"])


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


def _against(stage: Judged, stages: list[Judged]) -> Judged | None:
    """What a stage is compared with: the nearest judged one that it comes from, asked the same."""
    for name in stage.line or ((stage.parent,) if stage.parent else ()):
        of_parent = [s for s in stages if s.stage == name]
        if of_parent:
            return next((s for s in of_parent if s.asked == stage.asked), None)
    return None


def _difference(stage: Judged, other: Judged | None, name: str | None) -> dict[str, Any] | None:
    """The figure `name` of a stage minus another's; of a headline, where it is the headline of both."""
    if other is None or name is None or other.asked != stage.asked:
        return None
    if stage.results.headline == name and other.results.headline != name:
        return None
    ours, theirs = stage.results.figures.get(name), other.results.figures.get(name)
    if ours is None or theirs is None:
        return None
    return _plain_difference(ours.value - theirs.value, outside(ours, theirs), other.stage)


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
            other = _against(stage, pipeline.judged)
            twin = next((s for s in firsts if s.stage == stage.stage and s.asked == stage.asked), None) if i else None
            figures = {
                name: {k: v for k, v in asdict(figure).items() if v is not None}
                | {"change": _difference(stage, other, name)}
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
                    "beside": _difference(stage, twin, headline),
                    "forgot": forgotten(stage, pipeline.judged),
                    "figures": figures,
                    "settings": stage.results.settings,
                    "seconds": stage.results.seconds,
                }
            )
    return rows


def as_json(pipelines: Sequence[Pipeline]) -> str:
    """All rows, and what is not judged, with the version of this form."""
    undone = [{"pipeline": p.name} | asdict(u) for p in pipelines for u in p.undone]
    found = {
        "version": VERSION, "pipelines": [p.name for p in pipelines], "stages": rows_of(pipelines),
        "not_judged": undone,
    }  # fmt: skip
    return json.dumps(found, indent=1, allow_nan=False)


def as_csv(pipelines: Sequence[Pipeline]) -> str:
    """RFC 4180: a line a judged stage with whole numbers, and one for each evaluation that has no whole results."""
    rows = rows_of(pipelines)
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("pipeline", "stage")} | {"state": "judged"}
        line |= {"judges": " ".join(row["judges"]), "parent": row["parent"], "model": row["model"]}
        line |= {"headline": row["headline"]} | _flat("score", row["score"])
        line |= {"against": ((row["score"] or {}).get("change") or {}).get("against")}
        for name in ("beside", "forgot"):
            line |= _flat_difference(name, row[name]) | {f"{name}_against": (row[name] or {}).get("against")}
        for name in _figure_order(row["figures"] for row in rows):
            line |= _flat(name, row["figures"].get(name))
        lines.append(line)
    for pipeline in pipelines:
        for undone in pipeline.undone:
            lines.append(
                {"pipeline": pipeline.name, "stage": undone.stage, "state": undone.state, "judges": undone.judge}
            )
    columns = list(dict.fromkeys(key for line in lines for key in line))
    # a column without a value in any line is left out
    columns = [key for key in columns if any(line.get(key) not in (None, "") for line in lines)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(name: str, figure: dict[str, Any] | None) -> dict[str, Any]:
    figure = figure or {}
    found = {name: figure.get("value")} | {f"{name}_{key}": figure.get(key) for key in ("low", "high", "count")}
    return found | _flat_difference(f"{name}_change", figure.get("change"))


def _flat_difference(name: str, difference: dict[str, Any] | None) -> dict[str, Any]:
    difference = difference or {}
    return {name: difference.get("value"), f"{name}_mark": difference.get("mark")}


# ---------------------------------------------------------------------------------------- tables for people


@dataclass(frozen=True)
class Cell:
    """A cell's text, the mark behind it, and whether what it tells is good (1) or bad (-1)."""

    text: str = ""
    mark: str = ""
    good: int = 0


@dataclass(frozen=True)
class Column:
    title: str
    cells: list[Cell]


@dataclass(frozen=True)
class Sheet:
    """A table for people: the first column names the rows and is repeated where the others are folded."""

    title: str
    columns: list[Column]
    notes: list[str] = field(default_factory=list)


ORDER = (
    "majority", "instructions", "judge", "judge_win_rate", "implicit_accuracy", "*", "perplexity_text",
    "perplexity_answers", "kl_start", "repetition", "distinct_1", "distinct_2", "reward", "length", "truncated",
    "format", "steps", "steps_right", "margin", "brier", "calibration_error", "mean_reward",
)  # fmt: skip
"""The figures' order in a table, what matters first; `*`: those of benchmarks. pass@k comes before all."""
OF_REWARD_MODELS = ("margin", "brier", "calibration_error", "mean_reward")
"""Told in a line of their own: few stages are reward models."""


def _figure_order(found: Iterable[Iterable[str]]) -> list[str]:
    """All names, in the table's order."""
    names = dict.fromkeys(name for one in found for name in one)

    def place(name: str) -> tuple[int, int]:
        if matched := re.fullmatch(r"pass@(\d{1,9})", name):
            return -1, int(matched[1])
        return ORDER.index(name if name in ORDER else "*"), 0

    return sorted(names, key=place)


def _number(name: str, value: float, sign: str = "") -> str:
    """A value of a figure in the units it is shown in, without the unit."""
    how = results.metric(name)
    return how.form.split(" ")[0].replace("{:", f"{{:{sign}").format(how.scale * value)


def _difference_cell(name: str, difference: dict[str, Any] | None, none: str = "") -> Cell:
    if difference is None:
        return Cell(none)
    good = results.metric(name).better * (1 if difference["value"] > 0 else -1) if difference["outside"] else 0
    return Cell(_number(name, difference["value"], "+"), difference["mark"], good)


def _score_cells(row: dict[str, Any]) -> tuple[Cell, Cell]:
    """The headline's figure and half the width of its interval."""
    score, name = row["score"], row["headline"]
    if score is None:
        return Cell("-"), Cell()
    unit = "" if name == "accuracy" else f" {_one_line(results.metric(name).title)}"
    half = Cell()
    if "low" in score and "high" in score:
        half = Cell(_number(name, (score["high"] - score["low"]) / 2))
    return Cell(f"{_shown(name, score)}{unit}"), half


def _shown(name: str, figure: dict[str, Any]) -> str:
    return results.shown(name, Figure(figure["value"]))


def sheet(pipeline: Pipeline, rows: list[dict[str, Any]]) -> Sheet:
    """One pipeline's table. rows: its own, of `rows_of`."""
    scores = [_score_cells(row) for row in rows]
    columns = [
        Column("stage", [Cell(_one_line(row["row"])) for row in rows]),
        Column("score", [score for score, _ in scores]),
        Column("+-", [half for _, half in scores]),
        Column("vs parent", [_difference_cell(row["headline"], (row["score"] or {}).get("change")) for row in rows]),
    ]
    forgot = [row["forgot"] for row in rows]
    if any(forgot):
        lost = [
            Cell(f"{f['value']:+.2f}", f["mark"], (-1 if f["value"] > 0 else 1) if f["outside"] else 0)
            if f else Cell("-")
            for f in forgot
        ]  # fmt: skip
        columns.append(Column("forgot", lost))
    for name in _figure_order(row["figures"] for row in rows):
        holders = [row for row in rows if name in row["figures"]]
        if name in OF_REWARD_MODELS or all(row["headline"] == name for row in holders):
            continue
        cells = []
        for row in rows:
            figure = row["figures"].get(name)
            difference = (figure or {}).get("change")
            good = _difference_cell(name, difference).good
            cells.append(Cell(_shown(name, figure), (difference or {}).get("mark", ""), good) if figure else Cell("-"))
        columns.append(Column(_one_line(results.metric(name).title), cells))
    firsts = dict.fromkeys(f["against"] for f in forgot if f)
    notes = [line for row in rows if (line := _of_reward_model(row)) is not None]
    return Sheet(
        f"{_one_line(pipeline.name)}: held-out, greedy; +- is the half width of a 95 % interval",
        [c for c in columns if any(cell.text for cell in c.cells)],
        [*_legend(columns, firsts), *notes],
    )


def _legend(columns: list[Column], firsts: Iterable[str]) -> list[str]:
    lines = []
    if firsts := ", ".join(_one_line(name) for name in firsts):
        lines.append(f"forgot : nats a token lost on held-out text: log perplexity minus that of {firsts}")
    marks = {cell.mark for column in columns for cell in column.cells}
    if marks - {""}:
        lines.append(
            "* : differs by more than the error bars (the 95 % intervals do not overlap); ~ : within the error bars"
        )
    return lines


def _of_reward_model(row: dict[str, Any]) -> str | None:
    """What the table has no column for; None where the stage is no reward model."""
    names = {
        "margin": "margin", "brier": "Brier", "calibration_error": "calibration error", "mean_reward": "mean reward",
    }  # fmt: skip
    found = [f"{word} {_shown(k, row['figures'][k])}" for k, word in names.items() if k in row["figures"]]
    return f"{_one_line(row['row'])} : {', '.join(found)}" if found else None


def side_by_side(rows: list[dict[str, Any]]) -> Sheet:
    """Stages as rows, a score for each pipeline, and how it differs from the first's. rows: of all pipelines."""
    names = list(dict.fromkeys(row["pipeline"] for row in rows))
    stages = list(dict.fromkeys(row["row"] for row in rows))
    found = {(row["pipeline"], row["row"]): row for row in rows}
    columns = [Column("stage", [Cell(_one_line(stage)) for stage in stages])]
    for i, name in enumerate(names):
        scores, differences = [], []
        for stage in stages:
            row = found.get((name, stage))
            score, half = _score_cells(row) if row else (Cell("-"), Cell())
            scores.append(Cell(f"{score.text} +- {half.text}" if half.text else score.text))
            differences.append(_difference_cell(row["headline"], row["beside"]) if row else Cell())
        columns.append(Column(_one_line(name), scores))
        if i:
            columns.append(Column("vs first", differences))
    return Sheet(
        f"side by side: scores with the half widths of their 95 % intervals; vs first: minus {_one_line(names[0])}'s",
        columns, _legend(columns, []),
    )  # fmt: skip


def markdown(sheet: Sheet) -> str:
    """A table of GitHub's Markdown, its notes below. Every cell is shown to the letter."""
    lines = [f"**{_escaped(sheet.title)}**", ""]
    lines.append("| " + " | ".join(_escaped(column.title) for column in sheet.columns) + " |")
    lines.append("|" + "|".join(" --- " if i == 0 else " ---: " for i, _ in enumerate(sheet.columns)) + "|")
    for cells in zip(*(column.cells for column in sheet.columns), strict=True):
        lines.append("| " + " | ".join(_escaped(_joined(cell)) for cell in cells) + " |")
    lines += ["", *(f"- {_escaped(note)}" for note in sheet.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _joined(cell: Cell) -> str:
    return f"{cell.text} {cell.mark}" if cell.mark else cell.text


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", _one_line(text, width=None))


def terminal(sheet: Sheet, width: int) -> Iterator[Table]:
    """The sheet as tables of rich, none wider than `width`: what does not fit goes on in the next one, uncut."""
    first, *rest = sheet.columns
    while True:
        count = len(rest)
        while count > 1 and _measure([first, *rest[:count]]) > width:
            count -= 1
        yield _rich([first, *rest[:count]])
        rest = rest[count:]
        if not rest:
            return


def _texts(column: Column) -> list[str]:
    """The cells' texts, with room for marks in all of them where one has a mark: numbers stand below each other."""
    marked = any(cell.mark for cell in column.cells)
    return [f"{cell.text} {cell.mark or ' '}" if marked and cell.text else cell.text for cell in column.cells]


def _measure(columns: list[Column]) -> int:
    from rich.cells import cell_len

    return sum(max(map(cell_len, [column.title, *_texts(column)])) + 2 for column in columns) - 2


def _rich(columns: list[Column]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        marked = i > 0 and any(cell.mark for cell in column.cells)
        title = Text(f"{column.title}  " if marked else column.title)
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    styles = {1: "green", -1: "red", 0: ""}
    texts = [_texts(column) for column in columns]
    for j in range(len(columns[0].cells)):
        table.add_row(
            *(Text(t[j], style=styles[column.cells[j].good]) for t, column in zip(texts, columns, strict=True))
        )
    return table


def telling(stages: list[Judged], count: int) -> list[int]:
    """The problems on which the stages disagree most: those tell more than ones that all get right."""
    problems = range(min((len(s.samples) for s in stages), default=0))
    right = {i: sum(bool(s.samples[i]["correct"]) for s in stages) for i in problems}
    return sorted(problems, key=lambda i: abs(2 * right[i] - len(stages)))[:count]


def sample_lines(stages: list[Judged], count: int, width: int = 120) -> list[str]:
    """The answers of every stage to the same few problems, one after the other."""
    lines = []
    with_samples = [s for s in stages if s.samples]
    # another set of problems has no answers to these
    with_samples = [s for s in with_samples if s.samples[0]["prompt"] == with_samples[0].samples[0]["prompt"]]
    longest = max((len(s.stage) for s in with_samples), default=0)
    for i in telling(with_samples, count):
        first = with_samples[0].samples[i]
        answer = f"   (answer {_one_line(str(first['answer']), 40)})"
        lines.append(f"{_one_line(str(first['prompt']), max(20, width - len(answer)))}{answer}")
        for stage in with_samples:
            sign = "+" if stage.samples[i]["correct"] else "-"
            said = _one_line(str(stage.samples[i]["completion"]), max(20, width - longest - 5))
            lines.append(f"  {sign} {stage.stage:{longest}} {said}")
    return lines


def _one_line(text: str, width: int | None = 110) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if width is None or len(flat) <= width else f"{flat[: width - 3]}..."


# ------------------------------------------------------------------------------------- what to do next


def _here(path: Path | str) -> str:
    """A path as it is shortest from the current folder, where it lies below it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def commands(pipelines: Sequence[Pipeline]) -> list[tuple[str, str]]:
    """What to do next, each as words and a command that works from the current folder."""
    python = shlex.quote(_here(sys.executable))
    found = []
    winner = best([stage for p in pipelines for stage in p.judged])
    if winner is not None:
        folder = winner.model.parent if winner.model.name == "model" else winner.model
        run = shlex.quote(f"run={_here(folder) if folder.exists() else folder}")  # else: a hub id
        asked = (str(s["prompt"]) for s in winner.samples[:50])
        prompt = next((text for text in asked if text == _one_line(text, 60) and not text.startswith("-")), None)
        more = f" --prompt {shlex.quote(prompt)}" if prompt is not None else ""
        found.append((f"talk to the best one ({winner.stage})", f"{python} -m post_training.chat {run}{more}"))
    for pipeline in pipelines:
        where = [f"run_name={pipeline.name}"]
        if pipeline.folder.parent.absolute() != Path("outputs").absolute():
            where.append(f"paths.output_base={_here(pipeline.folder.parent)}")
        found.append(("all of it on one page", f"{python} -m launchers.report {' '.join(map(shlex.quote, where))}"))
    return found


def _models(pipeline: Pipeline) -> str:
    """Where a pipeline's models are; finished stages of another pipeline lie in its folder."""
    own = [s for s in pipeline.judged if real(s.model) == real(pipeline.folder / s.stage / "model")]
    others = [f"{s.stage} {_here(s.model)}" for s in pipeline.judged if s not in own]
    return ", ".join([*([f"{_here(pipeline.folder)}/<stage>/model"] if own else []), *others])


# ------------------------------------------------------------------------------------------- the command


def show(folder: Path) -> int:
    """Print a pipeline's table, samples, where the models are and what to do next. Returns an exit status."""
    return _show([read_pipeline(folder)], own_tables=True)


def _show(pipelines: list[Pipeline], own_tables: bool) -> int:
    from rich.console import Console

    # a pipe has no width: one line a stage, however long. A terminal's tables are folded
    width = shutil.get_terminal_size(fallback=(100_000, 24)).columns
    console = Console(highlight=False, soft_wrap=True, width=width)

    def say(text: str = "", wrap: bool = False) -> None:
        lines = textwrap.wrap(text, max(20, width), subsequent_indent="  ") if wrap else [text]
        console.print("\n".join(lines) or "", markup=False)

    def print_sheet(shown: Sheet) -> None:
        say(shown.title, wrap=True)
        for i, table in enumerate(terminal(shown, width)):
            if i:
                say()
            console.print(table)
        for note in shown.notes:
            say(note, wrap=True)

    rows = rows_of(pipelines)
    for pipeline in pipelines:
        if own_tables:
            own = [row for row in rows if row["pipeline"] == pipeline.name]
            if own:
                print_sheet(sheet(pipeline, own))
            else:
                say(f"{_one_line(pipeline.name)}: no stage has been judged yet")
        for undone in pipeline.undone:
            name = "" if own_tables else f"{_one_line(pipeline.name)}/"
            said = "not read" if undone.fix else "not judged yet"
            say(f"{said}: {name}{_one_line(undone.line(), None)}", wrap=True)
        if own_tables:
            say()
    if len({row["pipeline"] for row in rows}) > 1:
        print_sheet(side_by_side(rows))
        say()
    if len(pipelines) == 1 and (lines := sample_lines(pipelines[0].judged, NUM_SAMPLES, min(width, 120))):
        say("answers to problems on which the stages disagree:")
        for line in lines:
            say(line)
        say()
    if not own_tables:
        say("each one's own table: --all, or run_name=...")
    for pipeline in pipelines if own_tables else []:
        if pipeline.judged:
            say(f"models: {_models(pipeline)}")
    last = None
    for words, command in commands(pipelines if own_tables else pipelines[:0]) if rows else []:
        if words != last:
            say(f"{words}:")
        say(f"  {command}")
        last = words
    return _status(pipelines)


def _status(pipelines: Sequence[Pipeline]) -> int:
    damaged = any(undone.fix for p in pipelines for undone in p.undone)
    return 1 if damaged or not any(p.judged for p in pipelines) else 0


def as_markdown(pipelines: Sequence[Pipeline], own_tables: bool = True) -> str:
    """All tables, and what is not judged."""
    rows = rows_of(pipelines)
    parts = []
    for pipeline in pipelines:
        own = [row for row in rows if row["pipeline"] == pipeline.name]
        if own and own_tables:
            parts.append(markdown(sheet(pipeline, own)))
        if pipeline.undone or not own:
            lines = [f"- not {'read' if u.fix else 'judged yet'}: {_escaped(u.line())}" for u in pipeline.undone]
            parts.append(f"{_escaped(pipeline.name)}:\n\n" + "\n".join(lines or ["- no stage has been judged"]) + "\n")
    if len({row["pipeline"] for row in rows}) > 1:
        parts.append(markdown(side_by_side(rows)))
    return "\n".join(parts)


@dataclass(frozen=True)
class Arguments:
    output_base: Path
    names: list[str]
    form: str | None  # markdown, csv or json; None: for a person
    every: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="tables for a document")
    forms.add_argument("--csv", dest="form", action="store_const", const="csv", help="one line a stage, whole numbers")
    forms.add_argument("--json", dest="form", action="store_const", const="json", help="the same as JSON")
    parser.add_argument("--all", action="store_true", dest="every",
                        help=f"each pipeline's own table, also where there are more than {MANY}")  # fmt: skip
    given = parser.parse_intermixed_args(argv)
    output_base, names = Path("outputs"), []
    for setting in given.settings:
        name, equals, value = setting.partition("=")
        if name == "run_name" and value:
            names.append(value)
        elif name == "paths.output_base" and value:
            output_base = Path(value)
        else:
            problem = "no value" if equals and not value else "not a setting of compare"
            raise LaunchError(f"{setting}: {problem}", "run_name=NAME or paths.output_base=FOLDER")
    split = [part for name in names for part in ([name] if (output_base / name).exists() else name.split(",")) if part]
    return Arguments(output_base, split, given.form, given.every)


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        pipelines = [read_pipeline(f) for f in find_pipelines(arguments.output_base, arguments.names)]
        own_tables = arguments.every or bool(arguments.names) or len(pipelines) <= MANY
        forms: dict[str, Callable[[], str]] = {
            "json": lambda: as_json(pipelines) + "\n",
            "csv": lambda: as_csv(pipelines),
            "markdown": lambda: as_markdown(pipelines, own_tables),
        }
        if arguments.form is None:
            status = _show(pipelines, own_tables)
        else:
            sys.stdout.write(forms[arguments.form]())
            status = _status(pipelines)
        sys.stdout.flush()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(main())
