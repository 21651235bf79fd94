"""The across-stages table: what each stage's model is worth on held-out problems, what it gained, what it forgot.

    python -m launchers.compare [run_name=NAME ...|sweep=NAME] [paths.output_base=outputs] [--markdown|--csv|--json]
                                [--all]

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
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import points
from launchers.errors import LaunchError
from launchers.runs import find_pipelines, looks_of, real, which
from launchers.table import near
from launchers.worth import Judged, Pipeline, best, judged_and_damaged, one_line, read_pipeline, rows_of, telling
from post_training.run import results
from post_training.run.results import Figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

VERSION = 1
"""Of what --json prints."""
NUM_SAMPLES = 3
"""Problems shown with every stage's answer."""
MANY = 4
"""Of more pipelines than these, nobody having named them, each one's own table comes with --all alone."""


# --------------------------------------------------------------------------------- for programs


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
    unit = "" if name == "accuracy" else f" {one_line(results.metric(name).title)}"
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
        Column("stage", [Cell(one_line(row["row"])) for row in rows]),
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
            marked = "*" if (difference or {}).get("outside") else ""  # `~` at each figure would hide what differs
            cells.append(Cell(_shown(name, figure), marked, good) if figure else Cell("-"))
        columns.append(Column(one_line(results.metric(name).title), cells))
    firsts = dict.fromkeys(f["against"] for f in forgot if f)
    notes = [line for row in rows if (line := _of_reward_model(row)) is not None]
    return Sheet(
        f"{one_line(pipeline.name)}: held-out, greedy; +- is the half width of a 95 % interval",
        [c for c in columns if any(cell.text for cell in c.cells)],
        [*_legend(columns, firsts), *notes],
    )


def _legend(columns: list[Column], firsts: Iterable[str]) -> list[str]:
    lines = []
    if firsts := ", ".join(one_line(name) for name in firsts):
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
    return f"{one_line(row['row'])} : {', '.join(found)}" if found else None


def side_by_side(rows: list[dict[str, Any]]) -> Sheet:
    """Stages as rows, a score for each pipeline, and how it differs from the first's. rows: of all pipelines."""
    names = list(dict.fromkeys(row["pipeline"] for row in rows))
    stages = list(dict.fromkeys(row["row"] for row in rows))
    found = {(row["pipeline"], row["row"]): row for row in rows}
    columns = [Column("stage", [Cell(one_line(stage)) for stage in stages])]
    for i, name in enumerate(names):
        scores, differences = [], []
        for stage in stages:
            row = found.get((name, stage))
            score, half = _score_cells(row) if row else (Cell("-"), Cell())
            scores.append(Cell(f"{score.text} +- {half.text}" if half.text else score.text))
            differences.append(_difference_cell(row["headline"], row["beside"]) if row else Cell())
        columns.append(Column(one_line(name), scores))
        if i:
            columns.append(Column("vs first", differences))
    return Sheet(
        f"side by side: scores with the half widths of their 95 % intervals; vs first: minus {one_line(names[0])}'s",
        columns, _legend(columns, []),
    )  # fmt: skip


def sweep_sheet(name: str, ranking: points.Ranking) -> Sheet:
    """The points of a sweep, the best first: what differs, and the scores of the stages in which they differ."""
    found = ranking.points
    keys = list(dict.fromkeys(key for point in found for key in point.keys))
    columns = [Column("", [Cell(str(point.rank or "-")) for point in found])]
    columns += [Column(one_line(key), [Cell(one_line(point.keys.get(key, "-"))) for point in found]) for key in keys]
    for stage in ranking.stages:
        cells = []
        for point in found:
            of = point.scores.get(stage)
            if of is None or of.score is None or of.headline is None:
                cells.append(Cell("-"))
                continue
            figure = {key: value for key, value in asdict(of.score).items() if value is not None}
            plain = {"score": figure, "headline": of.headline}
            score, half = _score_cells(plain)
            cells.append(Cell(f"{score.text} +- {half.text}" if half.text and of.score.low is not None else score.text))
        columns.append(Column(one_line(stage), cells))
    columns.append(Column("pipeline", [Cell(one_line(point.folder)) for point in found]))
    title = f"{one_line(name)}: {len(found)} points"
    if ranking.by is not None and ranking.metric is not None:
        title += f", the best {one_line(results.metric(ranking.metric).title)} of {one_line(ranking.by)} first"
    waiting = sum(point.rank is None for point in found)
    notes = [f"not judged yet: {waiting} of {len(found)} points"] if waiting else []
    return Sheet(f"{title}; +- is the half width of a 95 % interval", columns, notes)


def sweep_csv(ranking: points.Ranking) -> str:
    """RFC 4180: a line a point."""
    lines: list[dict[str, Any]] = []
    for point in ranking.points:
        line: dict[str, Any] = {"rank": point.rank, "pipeline": point.folder, **point.keys}
        for stage, found in point.scores.items():
            score = found.score
            line |= {f"{stage}_headline": found.headline, f"{stage}_score": score.value if score else None}
            line |= {f"{stage}_low": score.low if score else None, f"{stage}_high": score.high if score else None}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def show_sweep(output_base: Path, name: str, form: str | None = None) -> int:
    """Print one table of a sweep's points. Asks no SLURM: what is not judged yet status tells. The exit status."""
    known = points.read(output_base, name)
    pipelines = []
    for folder in find_pipelines(output_base, list(known)) if known else ():
        judged, damaged = judged_and_damaged(looks_of(folder))
        pipelines.append(Pipeline(folder, judged, damaged))
    ranking = points.rank(known, pipelines, *points.metric_of(output_base, name))
    if form == "json":
        print(json.dumps(points.as_plain(name, ranking), indent=1, allow_nan=False))
    elif form == "csv":
        sys.stdout.write(sweep_csv(ranking))
    elif form == "markdown":
        sys.stdout.write(markdown(sweep_sheet(name, ranking)))
    else:
        _print_sheet(*_terminal(), sweep_sheet(name, ranking))
        for pipeline in pipelines:
            for undone in pipeline.undone:
                print(f"not read: {one_line(pipeline.name)}/{one_line(undone.line(), None)}")
    sys.stdout.flush()
    return _status(pipelines)


def _terminal() -> tuple[Console, int]:
    """Where tables are printed, and its width: a pipe has none: one line a stage, however long."""
    from rich.console import Console

    width = shutil.get_terminal_size(fallback=(100_000, 24)).columns
    return Console(highlight=False, soft_wrap=True, width=width), width


def _print_sheet(console: Console, width: int, shown: Sheet) -> None:
    def say(text: str) -> None:
        lines = textwrap.wrap(text, max(20, width), subsequent_indent="  ")
        console.print("\n".join(lines), markup=False)

    say(shown.title)
    for i, table in enumerate(terminal(shown, width)):
        if i:
            console.print()
        for line in table:
            console.print(line)
    for note in shown.notes:
        say(note)


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
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", one_line(text, width=None))


def terminal(sheet: Sheet, width: int) -> Iterator[list[Text]]:
    """The sheet as tables of lines no longer than `width`: columns that do not fit go on in the next table, uncut."""
    first, *rest = sheet.columns
    while rest:
        count = len(rest)
        while count > 1 and sum(_width(column) + 2 for column in [first, *rest[:count]]) - 2 > width:
            count -= 1
        yield _lines([first, *rest[:count]])
        rest = rest[count:]


def _texts(column: Column) -> list[str]:
    """Title and cells, with room for marks in all of them where one has a mark: numbers stand below each other."""
    marked = any(cell.mark for cell in column.cells)
    texts = [f"{cell.text} {cell.mark or ' '}" if marked else cell.text for cell in column.cells]
    return [f"{column.title}  " if marked else column.title, *texts]


def _width(column: Column) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, _texts(column)))


def _lines(columns: list[Column]) -> list[Text]:
    from rich.cells import cell_len
    from rich.text import Text

    styles = {1: "green", -1: "red", 0: ""}
    lines = [Text() for _ in range(len(columns[0].cells) + 1)]
    for i, column in enumerate(columns):
        width = _width(column)
        for j, text in enumerate(_texts(column)):
            pad = " " * (width - cell_len(text))
            style = styles[column.cells[j - 1].good] if j else "bold"
            lines[j].append(f"  {pad}" if i else "").append(text, style).append("" if i else pad)
    for line in lines:
        line.rstrip()
    return lines


def sample_lines(stages: list[Judged], count: int, width: int = 120) -> list[str]:
    """The answers of every stage to the same few problems, one after the other."""
    lines = []
    with_samples = [s for s in stages if s.samples]
    # another set of problems has no answers to these
    with_samples = [s for s in with_samples if s.samples[0]["prompt"] == with_samples[0].samples[0]["prompt"]]
    longest = max((len(s.stage) for s in with_samples), default=0)
    for i in telling(with_samples, count):
        first = with_samples[0].samples[i]
        answer = f"   (answer {one_line(str(first['answer']), 40)})"
        lines.append(f"{one_line(str(first['prompt']), max(20, width - len(answer)))}{answer}")
        for stage in with_samples:
            sign = "+" if stage.samples[i]["correct"] else "-"
            said = one_line(str(stage.samples[i]["completion"]), max(20, width - longest - 5))
            lines.append(f"  {sign} {stage.stage:{longest}} {said}")
    return lines


# ------------------------------------------------------------------------------------- what to do next


def commands(pipelines: Sequence[Pipeline]) -> list[tuple[str, str]]:
    """What to do next, each as words and a command that works from the current folder."""
    python = shlex.quote(near(sys.executable))
    found = []
    winner = best([stage for p in pipelines for stage in p.judged])
    if winner is not None:
        folder = winner.model.parent if winner.model.name == "model" else winner.model
        run = shlex.quote(f"run={near(folder) if folder.exists() else folder}")  # else: a hub id
        asked = (str(s["prompt"]) for s in winner.samples[:50])
        prompt = next((text for text in asked if text == one_line(text, 60) and not text.startswith("-")), None)
        more = f" --prompt {shlex.quote(prompt)}" if prompt is not None else ""
        found.append((f"talk to the best one ({winner.stage})", f"{python} -m post_training.chat {run}{more}"))
    for pipeline in pipelines:
        where = [f"run_name={pipeline.name}"]
        if pipeline.folder.parent.absolute() != Path("outputs").absolute():
            where.append(f"paths.output_base={near(pipeline.folder.parent)}")
        found.append(("all of it on one page", f"{python} -m launchers.report {' '.join(map(shlex.quote, where))}"))
    return found


def _models(pipeline: Pipeline) -> str:
    """Where a pipeline's models are; finished stages of another pipeline lie in its folder."""
    own = [s for s in pipeline.judged if real(s.model) == real(pipeline.folder / s.stage / "model")]
    others = [f"{s.stage} {near(s.model)}" for s in pipeline.judged if s not in own]
    return ", ".join([*([f"{near(pipeline.folder)}/<stage>/model"] if own else []), *others])


# ------------------------------------------------------------------------------------------- the command


def show(folder: Path) -> int:
    """Print a pipeline's table, samples, where the models are and what to do next. Returns an exit status."""
    return _show([read_pipeline(folder)], own_tables=True)


def _show(pipelines: list[Pipeline], own_tables: bool) -> int:
    console, width = _terminal()

    def say(text: str = "", wrap: bool = False) -> None:
        lines = textwrap.wrap(text, max(20, width), subsequent_indent="  ") if wrap else [text]
        console.print("\n".join(lines) or "", markup=False)

    rows = rows_of(pipelines)
    for pipeline in pipelines:
        if own_tables:
            own = [row for row in rows if row["pipeline"] == pipeline.name]
            if own:
                _print_sheet(console, width, sheet(pipeline, own))
            else:
                say(f"{one_line(pipeline.name)}: no stage has been judged yet")
        for undone in pipeline.undone:
            name = "" if own_tables else f"{one_line(pipeline.name)}/"
            said = "not read" if undone.fix else "not judged yet"
            say(f"{said}: {name}{one_line(undone.line(), None)}", wrap=True)
        if own_tables:
            say()
    if len({row["pipeline"] for row in rows}) > 1:
        _print_sheet(console, width, side_by_side(rows))
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
    sweep: str | None = None  # of which one table is wanted


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=, sweep=, paths.output_base=")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="tables for a document")
    forms.add_argument("--csv", dest="form", action="store_const", const="csv", help="one line a stage, whole numbers")
    forms.add_argument("--json", dest="form", action="store_const", const="json", help="the same as JSON")
    parser.add_argument("--all", action="store_true", dest="every",
                        help=f"each pipeline's own table, also where there are more than {MANY}")  # fmt: skip
    given = parser.parse_intermixed_args(argv)
    sweeps = [setting.partition("=")[2] for setting in given.settings if setting.startswith("sweep=")]
    alone = len(sweeps) == 1 and not given.every and not any(s.startswith("run_name=") for s in given.settings)
    return Arguments(*which(given.settings, "compare"), given.form, given.every, sweeps[0] if alone else None)


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.sweep is not None:
            return show_sweep(arguments.output_base, arguments.sweep, arguments.form)
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
