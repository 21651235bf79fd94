"""What every run of a pipeline is doing, as a table or as JSON.

    python -m launchers.status [run_name=NAME ...] [paths.output_base=outputs] [--watch [SECONDS]] [--json]
        [--state running,failed] [--stage sft,dpo] [--since 2h] [--mine] [--sort eta] [--sacct]

Without run_name it shows all pipelines below paths.output_base.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import gc
import json
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import table
from launchers.errors import LaunchError
from launchers.runs import Files, collect, pipelines_of, which
from launchers.states import STATES, clock, roughly

WATCH_SECONDS = 5.0

CAUSES = {
    "planned_stop": "planned stops",
    "preempted": "preemptions",
    "node_lost": "lost nodes",
    "out_of_memory": "running out of memory",
    "crashed": "crashes",
    "hung": "hangs",
    "cancelled": "cancellations",
    "restarted": "restarts",
    "unknown": "ends nobody recorded",
    "first_startup": "first start-up",
    "saving": "saving",
    "teardown": "teardown",
}
"""What took time from the steps, in plain words."""


def goodput_line(pipeline: Mapping[str, Any]) -> str | None:
    """A pipeline's goodput and what the rest went to, in plain words; None where nothing was held yet."""
    if pipeline["goodput"] is None:
        return None
    held = pipeline["held_seconds"]
    useful = pipeline["seconds"]["steps"] + pipeline["seconds"]["evaluation"]
    said = f"goodput {percent(pipeline['goodput'])}: {table.duration(useful)} of {table.duration(held)} held"
    lost = [f"{CAUSES.get(cause, cause)} {table.duration(s)}" for cause, s in pipeline["lost_by_cause"].items()]
    return f"{said}; lost to {', '.join(lost)}" if lost else said


def eta_text(found: Mapping[str, Any]) -> str:
    """When a run or a pipeline will be done, as in `2:04:00 (3 requeues)`; "" where that is not known, or done."""
    if not found.get("eta_seconds"):
        return ""
    more = "+" if found["eta_at_least"] else ""
    requeues = found["requeues_needed"]
    return table.rounded(found["eta_seconds"]) + more + (f" ({requeues} rq)" if requeues else "")


def headline(pipeline: Mapping[str, Any], now: float) -> str:
    """A pipeline's name, and when it will be done."""
    name = f"pipeline {_one_line(str(pipeline['pipeline']))}"
    seconds = pipeline.get("eta_seconds")
    if not seconds:
        return name
    requeues = pipeline["requeues_needed"]
    more = f", {requeues} requeue{'s' if requeues > 1 else ''} still needed" if requeues else ""
    when = f"{'not before' if pipeline['eta_at_least'] else 'about'} {clock(now + seconds, now)}"
    return f"{name}: done {when}, in {roughly(seconds)}{' or more' if pipeline['eta_at_least'] else ''}{more}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


# ----------------------------------------------------------------------------------------- the table

Column = tuple[str, str, int]  # title, key of a cell, 1 where it stands to the right
COLUMNS: tuple[Column, ...] = (
    ("PIPELINE", "pipeline", 0), ("STAGE", "stage", 0), ("JOBID", "job", 0), ("STATE", "state", 0),
    ("NODES", "nodes", 1), ("TIME", "time", 1), ("", "bar", 0), ("STEP", "step", 1), ("ETA", "eta", 1),
    ("LOSS/REWARD", "value", 0), ("TOK/S/GPU", "tokens", 1), ("MFU", "mfu", 1), ("ATT", "attempts", 1),
    ("FAIL", "failures", 1), ("GOODPUT", "goodput", 1), ("SCORE", "score", 1),
)  # fmt: skip
LEFT_OUT_EMPTY = ("bar", "step", "eta", "value", "tokens", "mfu", "goodput", "score")
"""Columns that do not stand there where no run has anything in them."""
DROPPED_FIRST = ("tokens", "mfu", "goodput", "nodes", "bar", "failures", "attempts", "job", "value", "eta")
"""What a narrow terminal does without, in this order."""
_ANSI = {
    "running": "36", "stopping": "33", "requeued": "33", "done": "32", "gated": "1;33",
    "failed": "1;31", "cancelled": "35", "unknown": "33", "waiting": "2", "queued": "34",
}  # fmt: skip


def cells(row: Mapping[str, Any], ascii_only: bool = False) -> dict[str, str]:
    """A row's cells as text."""

    def text(key: str) -> str:
        return "" if row[key] is None else _one_line(str(row[key]))

    elapsed, limit = table.duration(row["elapsed_seconds"]), table.duration(row["limit_seconds"])
    total = f"/{row['max_steps']}" if row["max_steps"] is not None else ""
    return {
        "pipeline": text("pipeline"),
        "stage": text("stage"),
        "job": text("job_id"),
        "state": text("state"),
        "nodes": text("nodes"),
        "time": f"{elapsed}/{limit}" if elapsed and limit else elapsed,
        "bar": table.bar(row["step"], row["max_steps"], 10, ascii_only),
        "step": f"{row['step']}{total}" if row["step"] is not None else "",
        "eta": eta_text(row),
        "value": table.loss_or_reward(row["loss"], row["reward"]),
        "tokens": "" if row["tokens_per_second_per_gpu"] is None else f"{row['tokens_per_second_per_gpu']:.0f}",
        "mfu": percent(row["mfu"]),
        "attempts": text("attempts"),
        "failures": text("failures"),
        "goodput": percent(row["goodput"]),
        "score": table.figure(row["score"]),
    }


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def lines(
    rows: list[dict[str, Any]], width: int, color: bool = False, ascii_only: bool = False,
    pipelines: list[dict[str, Any]] | None = None, flat: bool = False, now: float | None = None,
) -> Iterator[str]:  # fmt: skip
    """The table's lines, none longer than `width`. Reasons stand behind their rows, or below where space is short.

    pipelines: `pipelines_of` all their rows, where `rows` are only some. flat: one table, in the rows' order.
    """
    now = time.time() if now is None else now
    texts = [cells(row, ascii_only) for row in rows]
    reasons = [_one_line(row["reason"] or "") for row in rows]
    columns = [c for c in COLUMNS if c[1] not in LEFT_OUT_EMPTY or any(t[c[1]] for t in texts)]
    columns = [c for c in columns if flat or c[1] != "pipeline"]
    sizes = {key: max([len(title), *(len(t[key]) for t in texts)]) for title, key, _ in columns}

    def total() -> int:
        return sum(sizes[key] + 2 for _, key, _ in columns) - 2

    for name in DROPPED_FIRST:
        if total() > width:
            columns = [c for c in columns if c[1] != name]
    beside = total() + 2 + max(map(len, reasons), default=0) <= width

    def line(values: Mapping[str, str], state: str | None, reason: str) -> str:
        parts, used = [], 0
        for _, key, right in columns:
            cell = values[key].rjust(sizes[key]) if right else values[key].ljust(sizes[key])
            cell = cell[: max(0, width - used)]
            used += len(cell) + 2
            parts.append(f"\x1b[{_ANSI[state]}m{cell}\x1b[0m" if color and key == "state" and state in _ANSI else cell)
        return ("  ".join(parts) + (f"  {reason}" if reason else "")).rstrip()

    titles = {key: title for title, key, _ in COLUMNS}
    known = {one["pipeline"]: one for one in pipelines or pipelines_of(rows)}

    def summary(name: str) -> list[str]:
        return textwrap.wrap(_one_line(goodput_line(known[name]) or ""), max(4, width), subsequent_indent="  ")

    pipeline = None
    if flat:
        yield line(titles, None, "REASON" if beside and any(reasons) else "")
    for row, text, reason in zip(rows, texts, reasons, strict=True):
        if row["pipeline"] != pipeline and not flat:
            if pipeline is not None:
                yield from summary(pipeline)
                yield ""
            pipeline = row["pipeline"]
            yield _cut(headline(known[pipeline], now), width)
            yield line(titles, None, "REASON" if beside and any(reasons) else "")
        yield line(text, row["state"], reason if beside else "")
        if reason and not beside:
            yield _cut(f"  {'-' if ascii_only else '└'} {reason}", width)
    if pipeline is not None:
        yield from summary(pipeline)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


# -------------------------------------------------------------------------------------- the command


SORTS = ("pipeline", "state", "stage", "time", "eta", "goodput", "changed")
INTEREST = (
    "failed", "unknown", "stopping", "requeued", "running", "gated", "queued", "waiting", "cancelled", "done",
)  # fmt: skip
"""States in the order in which one wants to know of them."""


@dataclass(frozen=True)
class Wanted:
    """Which runs are shown."""

    states: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()  # names, or techniques
    since: float | None = None  # changed since, seconds since the epoch
    user: int | None = None  # number of the user who owns the run directory


@dataclass(frozen=True)
class Arguments:
    output_base: Path
    names: list[str]
    watch: float | None = None
    as_json: bool = False
    wanted: Wanted = Wanted()
    sort: str | None = None
    sacct: bool = False


def parse_since(text: str, now: float) -> float:
    """Seconds since the epoch of `30m`, `2h`, `3d`, `1w` ago, or of an ISO date. Raises LaunchError."""
    text = text.strip()
    if text[:-1].isdecimal() and text[-1] in "smhdw" and len(text) < 9:
        return now - int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[text[-1]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise LaunchError(f"--since={text}: no time", "as in 30m, 2h, 3d, 1w, 2026-11-21 or 2026-11-21T08:00") from None


def select(rows: list[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    """The rows that are wanted. Raises LaunchError for a stage that no run has."""
    for stage in wanted.stages if rows else ():
        there = dict.fromkeys(row[key] for row in rows for key in ("stage", "technique") if row[key])
        if stage not in there:
            raise LaunchError(f"--stage={stage}: no run of that stage", nearest(stage, list(there)))
    return [
        row
        for row in rows
        if (not wanted.states or row["state"] in wanted.states)
        and (not wanted.stages or row["stage"] in wanted.stages or row["technique"] in wanted.stages)
        and (wanted.since is None or (row["changed"] is not None and row["changed"] >= wanted.since))
        and (wanted.user is None or _owner(row["run_dir"]) == wanted.user)
    ]


def _owner(folder: str) -> int | None:
    try:
        return Path(folder).stat().st_uid
    except (OSError, ValueError):
        return None  # a stage that was never submitted is nobody's


def order(rows: list[dict[str, Any]], by: str | None) -> list[dict[str, Any]]:
    """The rows in an order; None: as the pipelines' graphs have them. What is not known comes last."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        match by:
            case "state":
                return (INTEREST.index(row["state"]),)
            case "changed":
                return (-(row["changed"] or 0.0),)
            case "time":
                return (-(row["elapsed_seconds"] or -1),)
            case "eta":
                return (row["eta_seconds"] is None, row["eta_seconds"] or 0.0)
            case "goodput":
                return (row["goodput"] is None, row["goodput"] or 0.0)
            case _:
                return (str(row[str(by)]),)

    return sorted(rows, key=key) if by is not None else rows


def nearest(given: str, names: list[str]) -> str:
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(names)}"


def _words(given: list[str] | None) -> tuple[str, ...]:
    return tuple(word for text in given or () for word in text.split(",") if word)


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.status", description="What every run of a pipeline is doing."
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", const=WATCH_SECONDS, type=float,
                        help=f"look again every so many seconds (default {WATCH_SECONDS:g}); q leaves")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--state", metavar="STATES", action="append", help=f"only these, by commas: {', '.join(STATES)}"
    )
    parser.add_argument("--stage", metavar="STAGES", action="append", help="only these stages or techniques, by commas")
    parser.add_argument("--since", metavar="TIME", help="only what changed since: 30m, 2h, 3d ago, or an ISO date")
    parser.add_argument("--mine", action="store_true", help="only runs whose folders you own")
    parser.add_argument("--sort", metavar="KEY", help=f"one table, ordered by one of: {', '.join(SORTS)}")
    parser.add_argument("--sacct", action="store_true", help="ask accounting about jobs that SLURM has forgotten")
    following = [*argv[1:], ""][: len(argv)]
    # a setting behind a bare --watch is no number of seconds
    argv = [
        f"--watch={WATCH_SECONDS}" if a == "--watch" and "=" in b else a for a, b in zip(argv, following, strict=True)
    ]
    given = parser.parse_intermixed_args(argv)
    if given.watch is not None and not given.watch >= 0.1:
        raise LaunchError(f"--watch={given.watch:g}: too short", "at least 0.1 seconds")
    for state in _words(given.state):
        if state not in STATES:
            raise LaunchError(f"--state={state}: no such state", nearest(state, list(STATES)))
    if given.sort is not None and given.sort not in SORTS:
        raise LaunchError(f"--sort={given.sort}: no such order", nearest(given.sort, list(SORTS)))
    wanted = Wanted(
        states=_words(given.state),
        stages=_words(given.stage),
        since=None if given.since is None else parse_since(given.since, time.time()),
        user=os.getuid() if given.mine else None,
    )
    output_base, names = which(given.settings, "status")
    return Arguments(output_base, names, given.watch, given.json, wanted, given.sort, given.sacct)


@dataclass(frozen=True)
class View:
    """What one look shows."""

    rows: list[dict[str, Any]]
    pipelines: list[dict[str, Any]]  # the shown ones, of all their rows
    of: int  # how many runs there are


def look(arguments: Arguments, files: Files | None = None) -> View:
    """One look."""
    everything = collect(arguments.output_base, arguments.names, arguments.sacct, files)
    rows = order(select(everything, arguments.wanted), arguments.sort)
    shown = {row["pipeline"] for row in rows}
    pipelines = [one for one in pipelines_of(everything) if one["pipeline"] in shown]
    return View(rows, pipelines, len(everything))


def show(arguments: Arguments, width: int | None, color: bool, files: Files | None = None) -> str:
    """One look as text."""
    view = look(arguments, files)
    if arguments.as_json:
        return json.dumps({"runs": view.rows, "pipelines": view.pipelines}, indent=1, allow_nan=False)
    if not view.rows:
        return (
            f"none of {view.of} runs in {arguments.output_base}" if view.of else f"no runs in {arguments.output_base}"
        )
    text = "\n".join(
        lines(view.rows, width or 10_000, color, _ascii_only(), view.pipelines, arguments.sort is not None)
    )
    return text + (f"\n{len(view.rows)} of {view.of} runs" if len(view.rows) < view.of else "")


def fit(view: View, width: int, height: int, color: bool, ascii_only: bool, flat: bool) -> list[str]:
    """One look as `height` lines: all of it where it fits, else the runs that one wants to know of, and the others
    counted by their states."""
    text = list(lines(view.rows, width, color, ascii_only, view.pipelines, flat))
    if len(text) <= height:
        return text
    rows = view.rows if flat else order(view.rows, "state")
    kept = min(len(rows), max(1, height - 2))
    while kept > 1 and len(list(lines(rows[:kept], width, color, ascii_only, view.pipelines, True))) > height - 1:
        kept -= 1
    counts = Counter(row["state"] for row in rows[kept:])
    rest = ", ".join(f"{counts[state]} {state}" for state in INTEREST if counts[state])
    shown = list(lines(rows[:kept], width, color, ascii_only, view.pipelines, True))
    return [*shown, _cut(f"... {len(rows) - kept} more: {rest}", width)][:height]


def _ascii_only() -> bool:
    return "utf" not in (sys.stdout.encoding or "").lower()


def _terminal() -> tuple[int | None, bool]:
    """Width and colour of the terminal; no width where the output goes elsewhere."""
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        return (int(columns) if columns.isdecimal() and columns != "0" else None), False
    return os.get_terminal_size(sys.stdout.fileno()).columns or 80, "NO_COLOR" not in os.environ


def watch(arguments: Arguments, seconds: float) -> None:
    """Look again and again, until q or Ctrl-C."""
    if not sys.stdout.isatty() or arguments.as_json:
        while True:
            width, color = _terminal()
            print(show(arguments, width, color), flush=True)
            time.sleep(seconds)
    from rich.live import Live
    from rich.text import Text

    files, flat = Files(keep=True), arguments.sort is not None
    with _keys() as pressed, Live(auto_refresh=False) as live:
        while True:
            width, color = _terminal()
            height = os.get_terminal_size(sys.stdout.fileno()).lines or 24
            view = look(arguments, files)
            text = fit(view, width or 80, max(1, height - 2), color, _ascii_only(), flat)
            text = text or [f"none of {view.of} runs in {arguments.output_base}"]
            stamp = f"{len(view.rows)} runs, {time.strftime('%H:%M:%S')}, every {seconds:g} s, q leaves"
            live.update(Text.from_ansi("\n".join([*text, _cut(stamp, width or 80)])), refresh=True)
            if pressed(seconds) == "q":
                return


class _keys:
    """Keys as they are pressed, without Enter; the terminal is given back as it was."""

    def __enter__(self) -> _keys:
        self.terminal: list[Any] | None = None
        if sys.stdin.isatty():
            import termios
            import tty

            self.terminal = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno())
        return self

    def __exit__(self, *exc: object) -> None:
        if self.terminal is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self.terminal)

    def __call__(self, seconds: float) -> str | None:
        """The key pressed within so many seconds."""
        if self.terminal is None:
            time.sleep(seconds)
            return None
        import select

        ready, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace").lower() if ready else None


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.watch is not None:
            watch(arguments, arguments.watch)
        else:
            gc.disable()  # a look makes a million objects and no cycles, and then it is over
            print(show(arguments, *_terminal()))
        sys.stdout.flush()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if "--watch" in " ".join(sys.argv if argv is None else argv) else 130
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
