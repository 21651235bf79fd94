"""What every run of a pipeline is doing, as a table or as JSON.

    python -m launchers.status [run_name=NAME ...] [paths.output_base=outputs] [--watch [SECONDS]] [--json]

Without run_name it shows all pipelines below paths.output_base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import table
from launchers.errors import LaunchError
from launchers.runs import collect, pipelines_of, which

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


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


# ----------------------------------------------------------------------------------------- the table

Column = tuple[str, str, int]  # title, key of a cell, 1 where it stands to the right
COLUMNS: tuple[Column, ...] = (
    ("STAGE", "stage", 0), ("JOBID", "job", 0), ("STATE", "state", 0), ("NODES", "nodes", 1), ("TIME", "time", 1),
    ("", "bar", 0), ("STEP", "step", 1), ("LOSS/REWARD", "value", 0),
    ("TOK/S/GPU", "tokens", 1), ("MFU", "mfu", 1), ("ATT", "attempts", 1), ("FAIL", "failures", 1),
    ("GOODPUT", "goodput", 1), ("SCORE", "score", 1),
)  # fmt: skip
LEFT_OUT_EMPTY = ("bar", "step", "value", "tokens", "mfu", "goodput", "score")
"""Columns that do not stand there where no run has anything in them."""
DROPPED_FIRST = ("tokens", "mfu", "goodput", "nodes", "bar", "failures", "attempts", "job", "value")
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
        "stage": text("stage"),
        "job": text("job_id"),
        "state": text("state"),
        "nodes": text("nodes"),
        "time": f"{elapsed}/{limit}" if elapsed and limit else elapsed,
        "bar": table.bar(row["step"], row["max_steps"], 10, ascii_only),
        "step": f"{row['step']}{total}" if row["step"] is not None else "",
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


def lines(rows: list[dict[str, Any]], width: int, color: bool = False, ascii_only: bool = False) -> Iterator[str]:
    """The table's lines, none longer than `width`. Reasons stand behind their rows, or below where space is short."""
    texts = [cells(row, ascii_only) for row in rows]
    reasons = [_one_line(row["reason"] or "") for row in rows]
    columns = [c for c in COLUMNS if c[1] not in LEFT_OUT_EMPTY or any(t[c[1]] for t in texts)]
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
    goodputs = {one["pipeline"]: goodput_line(one) for one in pipelines_of(rows)}

    def summary(name: str) -> list[str]:
        return textwrap.wrap(_one_line(goodputs[name] or ""), max(4, width), subsequent_indent="  ")

    pipeline = None
    for row, text, reason in zip(rows, texts, reasons, strict=True):
        if row["pipeline"] != pipeline:
            if pipeline is not None:
                yield from summary(pipeline)
                yield ""
            pipeline = row["pipeline"]
            yield _cut(f"pipeline {_one_line(str(pipeline))}", width)
            yield line(titles, None, "REASON" if beside and any(reasons) else "")
        yield line(text, row["state"], reason if beside else "")
        if reason and not beside:
            yield _cut(f"  {'-' if ascii_only else '└'} {reason}", width)
    if pipeline is not None:
        yield from summary(pipeline)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


# -------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Arguments:
    output_base: Path
    names: list[str]
    watch: float | None
    as_json: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.status", description="What every run of a pipeline is doing."
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", const=WATCH_SECONDS, type=float,
                        help=f"look again every so many seconds (default {WATCH_SECONDS:g}); q leaves")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    following = [*argv[1:], ""][: len(argv)]
    # a setting behind a bare --watch is no number of seconds
    argv = [
        f"--watch={WATCH_SECONDS}" if a == "--watch" and "=" in b else a for a, b in zip(argv, following, strict=True)
    ]
    given = parser.parse_intermixed_args(argv)
    if given.watch is not None and not given.watch >= 0.1:
        raise LaunchError(f"--watch={given.watch:g}: too short", "at least 0.1 seconds")
    return Arguments(*which(given.settings, "status"), given.watch, given.json)


def show(arguments: Arguments, width: int | None, color: bool) -> str:
    """One look as text."""
    rows = collect(arguments.output_base, arguments.names)
    if arguments.as_json:
        return json.dumps({"runs": rows, "pipelines": pipelines_of(rows)}, indent=1, allow_nan=False)
    if not rows:
        return f"no runs in {arguments.output_base}"
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    return "\n".join(lines(rows, width or 10_000, color, ascii_only))


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

    with _keys() as pressed, Live(auto_refresh=False) as live:
        while True:
            width, color = _terminal()
            stamp = f"{time.strftime('%H:%M:%S')}, every {seconds:g} s, q leaves"
            live.update(Text.from_ansi(f"{show(arguments, width, color)}\n\n{stamp}"), refresh=True)
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
            print(show(arguments, *_terminal()))
        sys.stdout.flush()
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if "--watch" in " ".join(sys.argv if argv is None else argv) else 130
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
