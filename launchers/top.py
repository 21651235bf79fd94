"""All runs on one live screen:  python -m launchers.top [run_name=NAME ...] [paths.output_base=outputs]

Runs with state, bar, GPUs held, throughput and the course of the loss or reward; the chosen run's last events; keys to
read its logs, cancel it, requeue it and hold it back. Looks are made off the screen's thread, so that keys work while
squeue does not answer, and no faster than a few per cent of one core allow.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from launchers import runs, status, table
from launchers.errors import LaunchError
from launchers.states import clock, roughly

EVERY_S = 5.0
SHARE = 0.03
"""Seconds between looks, and the share of a core that they may take: of many runs, looks are made less often."""
LOG_EVERY_S = 2.0
LOG_LINES = 1000
ORDERS = ("state", "pipeline", "changed", "eta", "goodput", "time")

Row = Mapping[str, Any]


# ------------------------------------------------------------------------------------- text, pure


def plain(text: str, ascii_only: bool) -> str:
    """One line without control characters; without what an ASCII terminal cannot show."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line.encode("ascii", "replace").decode() if ascii_only else line


def cell(text: str, width: int, right: bool = False) -> str:
    """Text in exactly so many characters."""
    cut = text if len(text) <= width else text[: max(0, width - 1)] + "~"[:width]
    return cut.rjust(width) if right else cut.ljust(width)


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    width: int
    right: bool
    text: Callable[[Row, Sequence[float], int, bool], str]  # row, trend, width, ascii only


def _count(value: float | None) -> str:
    return "" if not value else f"{value:.0f}"


COLUMNS = {
    "run": Column("RUN", 20, False, lambda row, *_: f"{row['pipeline']}/{row['stage']}"),
    "state": Column("STATE", 9, False, lambda row, *_: str(row["state"])),
    "bar": Column("", 8, False, lambda row, _, width, a: table.bar(row["step"], row["max_steps"], width, a)),
    "step": Column("STEP", 6, True, lambda row, *_: "" if row["step"] is None else str(row["step"])),
    "eta": Column("ETA", 9, True, lambda row, *_: eta_cell(row)),
    "gpus": Column("GPUS", 4, True, lambda row, *_: _count(row["gpus_held"])),
    "tokens": Column("TOK/S", 6, True, lambda row, *_: _count(row["tokens_per_second_per_gpu"])),
    "trend": Column("TREND", 9, False, lambda _, trend, width, a: table.spark(trend, width, a)),
    "value": Column("LOSS/REWARD", 13, False, lambda row, *_: table.loss_or_reward(row["loss"], row["reward"])),
    "goodput": Column("GOODPUT", 7, True, lambda row, *_: status.percent(row["goodput"])),
    "attempts": Column("ATT", 3, True, lambda row, *_: _count(row["attempts"])),
    "time": Column("TIME", 11, True, lambda row, *_: table.duration(row["elapsed_seconds"])),
    "job": Column("JOBID", 10, False, lambda row, *_: row["job_id"] or ""),
    "reason": Column("REASON", 20, False, lambda row, *_: row["reason"] or ""),
}
NARROW = ("run", "state", "bar", "step", "eta", "gpus", "tokens", "trend")
MORE = ("value", "job", "time", "attempts", "goodput", "reason")
"""What a wider terminal shows besides, in this order."""


def eta_cell(row: Row) -> str:
    if not row["eta_seconds"]:
        return ""
    return table.rounded(row["eta_seconds"]) + ("+" if row["eta_at_least"] else "")


def layout(width: int) -> list[tuple[Column, int]]:
    """The columns that fit, and their widths: what is left over goes to the reason and the run's name."""
    names = list(NARROW)
    used = sum(COLUMNS[name].width + 1 for name in names) - 1
    for name in MORE:
        if used + COLUMNS[name].width + 1 <= width:
            names.append(name)
            used += COLUMNS[name].width + 1
    widths = {name: COLUMNS[name].width for name in names}
    spare = max(0, width - used)
    if "reason" in widths:
        for name, share in (("run", 20), ("trend", 10), ("bar", 4)):
            more = min(share, spare)
            widths[name], spare = widths[name] + more, spare - more
        widths["reason"] += spare
    else:
        widths["run"] += spare
    return [(COLUMNS[name], widths[name]) for name in names]


def row_cells(row: Row, trend: Sequence[float], columns: list[tuple[Column, int]], ascii_only: bool) -> list[str]:
    """A row's cells, each of its column's width."""
    return [cell(plain(c.text(row, trend, w, ascii_only), ascii_only), w, c.right) for c, w in columns]


def event_text(event: Mapping[str, Any], now: float) -> str:
    """One event of a ledger in one line."""
    left_out = ("time", "event", "version", "seconds", "nodes", "slurm_cluster", "measured_until", "gave_up", "code")
    facts = [f"{k}={v}" for k, v in event.items() if k not in left_out and v not in (None, "", [])]
    if isinstance(seconds := event.get("seconds"), float | int):
        facts.append(f"{seconds:.1f} s")
    when = f"{clock(event['time'], now)} ({roughly(max(0.0, now - event['time']))} ago)"
    return f"{when}  {str(event['event']).replace('_', ' ')}  {', '.join(facts)}"


def matches(row: Row, words: str) -> bool:
    """Whether a row has each of the words in its name, state, technique, job or reason."""
    text = " ".join(str(row[key] or "") for key in ("pipeline", "stage", "state", "technique", "job_id", "reason"))
    text = f"{row['pipeline']}/{text}".lower()
    return all(word in text for word in words.lower().split())


@dataclasses.dataclass
class Shot:
    """What one look found."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trends: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # by run directory
    events: dict[str, tuple[Mapping[str, Any], ...]] = dataclasses.field(default_factory=dict)
    time: float = 0.0
    took: float = 0.0  # seconds
    problem: str | None = None


def summary(shot: Shot, shown: int, order: str, words: str, pause: float, width: int) -> str:
    """The first line: how many runs in which state, GPUs held, when the look was made."""
    if not shot.time:
        return shot.problem or "looking ..."
    counts = Counter(row["state"] for row in shot.rows)
    told = ", ".join(f"{counts[state]} {state}" for state in status.INTEREST if counts[state]) or "no runs"
    gpus = sum(row["gpus_held"] for row in shot.rows)
    parts = [time.strftime("%H:%M:%S", time.localtime(shot.time)), f"{gpus} GPUs", told]
    if words:
        parts.insert(1, f"/{words}: {shown} of {len(shot.rows)}")
    if width >= 120:
        parts.append(f"by {order}, every {pause:.0f} s")
    return shot.problem or " | ".join(parts)


def details(row: Row, trend: Sequence[float], past: Sequence[Mapping[str, Any]], now: float, width: int, height: int,
            ascii_only: bool) -> list[str]:  # fmt: skip
    """The chosen run in so many lines: what it is, what it needs, and its last events."""
    facts = [f"{row['pipeline']}/{row['stage']}"]
    facts += [f"job {row['job_id']}"] if row["job_id"] else []
    facts += [f"on {row['node_list']}"] if row["node_list"] else []
    facts += [f"attempt {row['attempts']}"] if row["attempts"] else []
    facts += [f"{row['failures']} failed in a row"] if row["failures"] else []
    if row["step"] is not None:
        facts.append(f"step {row['step']}" + (f" of {row['max_steps']}" if row["max_steps"] else ""))
    if row["checkpoint_step"]:
        facts.append(f"saved {row['checkpoint_step']}")
    facts += [f"goodput {status.percent(row['goodput'])}"] if row["goodput"] is not None else []
    facts += [f"score {table.figure(row['score'])}"] if row["score"] is not None else []
    if row["eta_seconds"]:
        word = "not before" if row["eta_at_least"] else "about"
        more = f", {row['requeues_needed']} requeues still needed" if row["requeues_needed"] else ""
        facts.append(f"done {word} {clock(now + row['eta_seconds'], now)}{more}")
    lines = [" ".join(facts[:1]) + ": " + str(row["state"]) + (f", {row['reason']}" if row["reason"] else "")]
    lines.append(", ".join(facts[1:]))
    if trend:
        value = table.loss_or_reward(row["loss"], row["reward"])
        room = max(0, width - len(value) - 30)
        line = table.spark(trend, room, ascii_only)
        lines.append(f"{value}  {line}  {table.figure(min(trend))} to {table.figure(max(trend))}")
    lines += [event_text(event, now) for event in reversed(past)]
    return [cell(plain(line, ascii_only), width) for line in lines[:height]]


# ---------------------------------------------------------------------------------------- the looks


class Looker(threading.Thread):
    """Looks again and again, and hands over what it saw."""

    def __init__(self, output_base: Path, names: list[str], deliver: Callable[[Shot], None]) -> None:
        super().__init__(name="look", daemon=True)
        self.output_base, self.names, self.deliver = output_base, names, deliver
        self.files = runs.Files(keep=True)
        self.wake, self.over = threading.Event(), False
        self.pause = EVERY_S

    def look(self) -> Shot:
        """One look. What stands in its way is shown."""
        began = time.time()
        try:
            found = runs.survey(self.output_base, self.names, files=self.files)
        except LaunchError as error:
            return Shot(time=0.0, problem=str(error).replace("\n", " "))
        except OSError as error:
            return Shot(time=0.0, problem=f"{error.filename or self.output_base}: {error.strerror}")
        return Shot(
            rows=[row for _, row in found],
            trends={row["run_dir"]: runs.metrics_of(look).trend[-80:] for look, row in found},
            events={row["run_dir"]: look.story.events[-40:] for look, row in found},
            time=began,
            took=time.time() - began,
        )

    def run(self) -> None:
        first = True
        while not self.over:
            self.wake.clear()
            spent = _cpu()
            shot = self.look()
            if not first:  # the first look reads everything, the others what has changed
                self.pause = max(EVERY_S, (_cpu() - spent) / SHARE)
            first = False
            if self.over:
                return
            self.deliver(shot)
            gc.collect()
            gc.freeze()  # what is kept would be gone through again and again
            self.wake.wait(self.pause)

    def stop(self) -> None:
        self.over = True
        self.wake.set()


def _cpu() -> float:
    """Seconds of a core that this thread and its children took."""
    children = os.times()
    return time.thread_time() + children.children_user + children.children_system


def folder_look(row: Row) -> runs.Look:
    """The run of a row as it is now. Raises LaunchError."""
    for look in runs.looks_of(Path(row["run_dir"]).parent):
        if runs.real(look.run.root) == runs.real(row["run_dir"]):
            return look
    raise LaunchError(f"{row['run_dir']}: no run any more", "look again")


# --------------------------------------------------------------------------------------- the screen


class RunList(Widget):
    """The runs that fit, the chosen one among them. Draws only what is seen."""

    DEFAULT_CSS = "RunList { height: 1fr; }"

    def __init__(self, ascii_only: bool) -> None:
        super().__init__()
        self.ascii_only = ascii_only
        self.rows: list[dict[str, Any]] = []
        self.trends: Mapping[str, Sequence[float]] = {}
        self.chosen = self.first = 0

    def put(self, rows: list[dict[str, Any]], trends: Mapping[str, Sequence[float]], chosen: int) -> None:
        self.rows, self.trends = rows, trends
        self.choose(chosen)

    def choose(self, index: int) -> None:
        """Choose a row, and scroll as little as it takes to show it."""
        self.chosen = max(0, min(index, len(self.rows) - 1))
        page = max(1, self.size.height - 1)
        self.first = max(0, min(max(self.chosen - page + 1, min(self.first, self.chosen)), len(self.rows) - page))
        self.refresh()

    def on_resize(self) -> None:
        self.choose(self.chosen)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        columns = layout(width)
        if y == 0:
            titles = " ".join(cell(c.title, w, c.right) for c, w in columns)
            return Strip([Segment(cell(titles, width), Style(bold=True))], width)
        index = self.first + y - 1
        if index >= len(self.rows):
            return Strip.blank(width)
        row = self.rows[index]
        chosen = Style(reverse=True) if index == self.chosen else Style.null()
        cells = row_cells(row, self.trends.get(row["run_dir"], ()), columns, self.ascii_only)
        state = next(i for i, (c, _) in enumerate(columns) if c.title == "STATE")
        segments = []
        for i, text in enumerate(cells):
            color = Style.parse(table.STYLES.get(row["state"], "none")) if i == state else Style.null()
            segments += [Segment(text, color + chosen), Segment(" ", chosen)]
        return Strip(segments).adjust_cell_length(width, chosen)


HELP = """
  up down j k     choose a run; also page up, page down, home, end
  enter l         its logs: tab changes to stderr, q goes back
  c               cancel it: it saves first; what waits for it goes too
  r               requeue it now: it saves, and starts again
  h u             hold it back; release it
  /               filter by words in name, state, job or reason
  escape          no filter any more
  s               sort by state, pipeline, changed, eta, goodput, time
  q               quit                           any key closes this
"""


class Asked(ModalScreen[bool]):
    """Some text, and whether the key that closes it was y."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.closed = text, False

    def compose(self) -> ComposeResult:
        yield Static(self.text, markup=False)

    def on_key(self, event: events.Key) -> None:
        event.stop()
        if not self.closed:  # keys may come faster than it goes away
            self.closed = True
            self.dismiss(event.key == "y")


class Logs(Screen[None]):
    """The end of what a run's newest attempt says, all ranks, as it grows."""

    BINDINGS: ClassVar[list[Any]] = [
        Binding("q,escape,left", "back"), Binding("up,k", "move(-1)"), Binding("down,j", "move(1)"),
        Binding("pageup,b", "page(-1)"), Binding("pagedown,space", "page(1)"), Binding("home,g", "ends(-1)"),
        Binding("end,G", "ends(1)"), Binding("tab", "other"),
    ]  # fmt: skip

    def __init__(self, row: Row, ascii_only: bool) -> None:
        super().__init__()
        self.row, self.ascii_only = row, ascii_only
        self.lines: list[str] = ["reading ..."]
        self.place = ""
        self.first, self.follow, self.errors = 0, True, False
        self.over = threading.Event()
        self.again = threading.Event()

    def compose(self) -> ComposeResult:
        yield Static("", id="title", markup=False)
        yield Static("", id="text", markup=False)

    def on_mount(self) -> None:
        threading.Thread(target=self._read, name="logs", daemon=True).start()

    def on_unmount(self) -> None:
        self.over.set()
        self.again.set()

    def on_resize(self) -> None:
        self.draw()

    def _read(self) -> None:
        from launchers import logs

        while not self.over.is_set():
            self.again.clear()
            title, lines = "", []
            try:
                target = logs.target_of(folder_look(self.row), None)
                read = target.read(LOG_LINES, None)[int(self.errors)]
                ranks = max(target.ranks, read.ranks or 1)
                lines = [logs.prefix(line, ranks) + line.text for line in read.lines]
                title = f"attempt {target.attempt.number}, {table.near(read.path)}"
                lines = lines or [f"({read.problem or 'it has said nothing'})"]
            except (LaunchError, OSError) as error:
                lines = str(error).splitlines()
            deliver(self.app, self._got, lines, title)
            self.again.wait(LOG_EVERY_S)

    def _got(self, lines: list[str], place: str) -> None:
        if (lines, place) != (self.lines, self.place):
            self.lines, self.place = lines, place
            self.draw()

    def draw(self) -> None:
        width, page = self.size.width, max(1, self.size.height - 1)
        last = max(0, len(self.lines) - page)
        self.first = last if self.follow else max(0, min(self.first, last))
        kind = "stderr" if self.errors else "stdout"
        title = f"{kind} of {self.row['pipeline']}/{self.row['stage']}: {self.place}"
        keys = "  tab: the other, q: back"
        self.query_one("#title", Static).update(
            Text(cell(plain(title, self.ascii_only), width - len(keys)) + keys, Style(reverse=True))
        )
        shown = self.lines[self.first : self.first + page]
        text = "\n".join(cell(plain(line.expandtabs(), self.ascii_only), width) for line in shown)
        self.query_one("#text", Static).update(Text(text, no_wrap=True))

    def action_back(self) -> None:
        if not self.over.is_set():
            self.over.set()
            self.dismiss()

    def action_move(self, lines: int) -> None:
        page = max(1, self.size.height - 1)
        self.first = max(0, self.first + lines)
        self.follow = self.first >= len(self.lines) - page
        self.draw()

    def action_page(self, pages: int) -> None:
        self.action_move(pages * max(1, self.size.height - 2))

    def action_ends(self, end: int) -> None:
        self.action_move(end * len(self.lines))

    def action_other(self) -> None:
        self.errors, self.follow = not self.errors, True
        self.lines = ["reading ..."]
        self.draw()
        self.again.set()


def deliver(app: App[Any], call: Callable[..., None], *given: object) -> None:
    """Call something in the screen's thread, unless the screen is gone."""
    try:
        app.call_later(call, *given) if app._thread_id == threading.get_ident() else app.call_from_thread(call, *given)
    except RuntimeError:  # it has ended
        return


QUESTIONS = {
    "cancel": "Cancel {}?\n  It saves first, if it runs; what waits for it goes too.",
    "requeue": "Requeue {} now?\n  It saves, and starts again under its job id.",
    "hold": "Hold {} back?\n  If it runs, it saves and leaves first.",
    "release": "Release {}?",
}


class Top(App[None]):
    """The screen."""

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    CSS = """
    Screen { layout: vertical; background: ansi_default; color: ansi_default; }
    #head, #foot, #title { height: 1; }
    #details { height: 7; }
    #text { height: 1fr; }
    Asked { align: center middle; background: transparent; }
    Asked Static { width: auto; max-width: 100%; height: auto; background: ansi_blue; color: ansi_bright_white; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("q", "quit"), Binding("up,k", "move(-1)"), Binding("down,j", "move(1)"),
        Binding("pageup", "page(-1)"), Binding("pagedown", "page(1)"), Binding("home,g", "move(-1000000000)"),
        Binding("end,G", "move(1000000000)"), Binding("enter,l", "logs"), Binding("c", "steer('cancel')"),
        Binding("r", "steer('requeue')"), Binding("h", "steer('hold')"), Binding("u", "steer('release')"),
        Binding("slash", "filter"), Binding("s", "sort"), Binding("question_mark", "help"),
        Binding("escape", "clear"),
    ]  # fmt: skip

    def __init__(self, output_base: Path, names: list[str], ascii_only: bool = False) -> None:
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self.ascii_only = ascii_only
        self.shot, self.order, self.words, self.said = Shot(), ORDERS[0], "", ""
        self.typing = False
        self.looker = Looker(output_base, names, lambda shot: deliver(self, self.got, shot))

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static("looking ...", id="head", markup=False)
            yield RunList(self.ascii_only)
            yield Static("", id="details", markup=False)
            yield Static("", id="foot", markup=False)

    def on_mount(self) -> None:
        self.looker.start()
        self.draw()

    def on_unmount(self) -> None:
        self.looker.stop()

    @property
    def runs(self) -> RunList:
        return self.screen_stack[0].query_one(RunList)

    @property
    def chosen(self) -> dict[str, Any] | None:
        shown = self.runs.rows
        return shown[self.runs.chosen] if shown else None

    # -- what is shown

    def got(self, shot: Shot) -> None:
        if shot.problem is not None:  # what was seen last stays
            shot = dataclasses.replace(self.shot, problem=shot.problem)
        self.shot = shot
        self.arrange()

    def arrange(self) -> None:
        """Filter and sort anew; the chosen run stays chosen."""
        chosen = self.chosen
        rows = status.order([row for row in self.shot.rows if matches(row, self.words)], self.order)
        index = self.runs.chosen
        if chosen is not None:
            index = next((i for i, row in enumerate(rows) if row["run_dir"] == chosen["run_dir"]), index)
        self.runs.put(rows, self.shot.trends, index)
        self.draw()

    def draw(self) -> None:
        base = self.screen_stack[0]
        width = self.size.width
        head = summary(self.shot, len(self.runs.rows), self.order, self.words, self.looker.pause, width)
        base.query_one("#head", Static).update(Text(cell(plain(head, self.ascii_only), width), Style(reverse=True)))
        place = base.query_one("#details", Static)
        row = self.chosen
        if row is None:
            place.update("")
        else:
            trend, past = self.shot.trends.get(row["run_dir"], ()), self.shot.events.get(row["run_dir"], ())
            height = self.details_height()
            lines = details(row, trend, past, time.time(), width, height, self.ascii_only)
            place.update(Text("\n".join(lines), no_wrap=True))
        keys = "? help  enter logs  c cancel  r requeue  h hold  / filter  s sort  q quit"
        last = f"/{self.words}_  enter: keep it  escape: no filter" if self.typing else self.said or keys
        base.query_one("#foot", Static).update(Text(cell(plain(last, self.ascii_only), width), Style(reverse=True)))

    def details_height(self) -> int:
        return max(3, min(18, self.size.height // 3))

    def on_resize(self) -> None:
        self.screen_stack[0].query_one("#details", Static).styles.height = self.details_height()
        self.call_after_refresh(self.draw)

    # -- keys

    def action_move(self, rows: int) -> None:
        self.said = ""
        self.runs.choose(self.runs.chosen + rows)
        self.draw()

    def action_page(self, pages: int) -> None:
        self.action_move(pages * max(1, self.runs.size.height - 2))

    def action_sort(self) -> None:
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self.said = f"by {self.order}"
        self.arrange()

    def action_help(self) -> None:
        self.push_screen(Asked(HELP))

    def action_logs(self) -> None:
        if self.chosen is not None:
            self.push_screen(Logs(self.chosen, self.ascii_only))

    def action_filter(self) -> None:
        self.typing = True
        self.draw()

    def action_clear(self) -> None:
        """Escape: no filter."""
        self.typing, self.words, self.said = False, "", ""
        self.arrange()

    async def on_event(self, event: events.Event) -> None:
        """While the filter is typed, no key is a command: taken here, where keys come one after the other."""
        if not (self.typing and isinstance(event, events.Key)):
            await super().on_event(event)
        elif event.key == "escape":
            self.action_clear()
        elif event.key == "enter":
            self.typing = False
            self.draw()
        elif event.key == "ctrl+c":
            self.exit()
        else:
            if event.key == "backspace":
                self.words = self.words[:-1]
            elif event.character is not None and event.is_printable:
                self.words += event.character
            self.arrange()

    def action_steer(self, what: str) -> None:
        """Ask, then do it off the screen's thread, and say what was done."""
        row = self.chosen
        if row is None:
            return
        name = plain(f"{row['pipeline']}/{row['stage']}", self.ascii_only)

        def answered(yes: bool | None) -> None:
            self.say(f"{what} {name} ..." if yes else "")
            if yes:
                threading.Thread(target=self._steer, args=(what, row), name=what, daemon=True).start()

        text = QUESTIONS[what].format(name)
        self.push_screen(Asked(f"\n  {text}  \n\n  y: yes    any other key: no\n"), answered)

    def _steer(self, what: str, row: Row) -> None:
        from launchers import steer

        try:
            said = getattr(steer, what)([folder_look(row)])
        except (LaunchError, OSError) as error:
            said = [str(error)]
        deliver(self, self.say, " | ".join(said).replace("\n", " "))
        self.looker.wake.set()

    def say(self, text: str) -> None:
        self.said = text
        self.draw()


# -------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers.top", description="All runs on one live screen.")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    given = parser.parse_args(argv)
    try:
        output_base, names = runs.which(given.settings, "top")
        runs.find_pipelines(output_base, names)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise LaunchError("top needs a terminal", "python -m launchers.status")
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    encoding = getattr(sys.__stderr__, "encoding", None) or ""  # Textual writes there
    Top(output_base, names, "utf" not in encoding.lower()).run(mouse=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
