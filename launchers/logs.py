"""What a run says: the right file, the right attempt, all ranks, each line with its rank.

    python -m launchers.logs [<stage> | <pipeline>/<stage> | run_name=NAME] [-f] [--attempt N] [--rank R] [--lines N]
    python -m launchers.logs <stage> --why

Without a stage: the run that said something last. All attempts of a job append to slurm/slurm-<jobid>.out and .err;
a line of the job script's tells them apart (run.directory.ATTEMPT_MARK), and `srun --label` the ranks. Files are read
from their ends, however long they are. Without --why and -f, SLURM is not asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from launchers import runs, site, states, table, why
from launchers.errors import LaunchError
from launchers.local import owned
from launchers.why import Line
from post_training.run import ledger, manifest
from post_training.run.directory import ATTEMPT_MARK, RunDirectory, is_there

LINES = 40
"""Lines shown where nobody says how many."""
CHUNK = 1 << 16
LONGEST_LINE = 1 << 14
"""Bytes of one line that are kept: its beginning, which names the rank, and its end."""
SEARCHED = 64 << 20
"""Bytes looked through, from the end, for the lines of one rank or the beginning of the newest attempt."""
EXPLAINED = 4 << 20
"""Bytes of each stream that --why reads."""
POLL_SECONDS = 0.5
ASK_SECONDS = 60.0
"""Between questions to SLURM while a followed run says nothing."""

PIECE = 4 << 20
_MARKED = b"=== attempt "
_MARK = re.compile(ATTEMPT_MARK.pattern.encode(), re.MULTILINE)
_LABEL = re.compile(r"^ {0,6}(\d{1,6}): ?")
_TORCH_LABEL = re.compile(r"^\[rank(\d{1,6})\]: ?")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?")


# ----------------------------------------------------------------------------------------- lines, pure


def clean(text: str) -> str:
    """A line as a terminal ends up with it: the last state of a progress bar, and no control characters."""
    text = _ESCAPES.sub("", text.rstrip("\r\n"))
    states_of_bar = [part for part in text.split("\r") if part.strip()]
    text = (states_of_bar[-1] if states_of_bar else "").replace("\t", "    ")
    return text if text.isprintable() else "".join(c for c in text if c.isprintable())


def parse_line(data: bytes, stream: str, ranks: int) -> Line:
    """One line of a file. ranks: 2 or more where each line of a rank begins with its number."""
    text, rank = data.decode(errors="replace"), 0 if ranks == 1 else None
    if ranks > 1 and (match := _LABEL.match(text)) and int(match[1]) < ranks:
        rank, text = int(match[1]), text[match.end() :]
    text = clean(text)
    if match := _TORCH_LABEL.match(text):  # torch says the rank itself where an exception ends a process
        rank, text = int(match[1]), text[match.end() :]
    if why.SLURM_SAYS.match(text):
        rank = None
    return Line(text, rank, stream)


_TIME = re.compile(r"^[\[(]?(?:[A-Z]+[|:\s]\s*)?(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?")


def time_of(text: str) -> str | None:
    """The time that a line begins with, as text that sorts; None where it has none."""
    match = _TIME.match(text)
    return f"{match[1].replace(' ', 'T')}.{(match[2] or '').ljust(6, '0')}" if match else None


def merge(out: list[Line], err: list[Line]) -> tuple[list[Line], str]:
    """Both streams as one, and how they were put together: by their own times where both have them from their first
    line on, else one after the other."""
    if not out or not err:
        return out + err, "as written"

    def timed(lines: list[Line]) -> list[tuple[str, Line]] | None:
        found, newest = [], None
        for line in lines:
            newest = max(filter(None, (time_of(line.text), newest)), default=None)
            if newest is None:
                return None
            found.append((newest, line))
        return found

    first, second = timed(out), timed(err)
    if first is None or second is None:
        return out + err, "stdout, then stderr: their lines bear no times"
    return [line for _, line in sorted(first + second, key=lambda pair: pair[0])], "by the times in the lines"


# ------------------------------------------------------------------------------------ files, backwards


def lines_back(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line, from `end` back to `start`. Of a long line its beginning and its end."""
    rest, position = b"", end
    first = True
    while position > start:
        size = min(CHUNK, position - start)
        position -= size
        file.seek(position)
        data = file.read(size) + rest
        pieces = data.split(b"\n")
        offset = position + size + len(rest)  # nominal: pieces of a long line are left out of it
        for piece in reversed(pieces[1:]):
            offset -= len(piece)
            if not (first and not piece):  # the file's last line ends with a newline
                yield offset, piece
            first = False
            offset -= 1
        rest = pieces[0]
        if len(rest) > LONGEST_LINE:
            rest = rest[:200] + b"\r" + rest[-(LONGEST_LINE - 201) :]
    if rest or not first:
        yield start, rest


def marks_back(file: BinaryIO, end: int, stop: int = 0) -> Iterator[tuple[int, re.Match[bytes]]]:
    """Where attempts begin, the last first. Looks no further back than `stop`."""
    position = end
    while position > stop:
        begin = max(stop, position - PIECE)
        file.seek(begin)
        data = file.read(min(end, position + 4096) - begin)  # the rest of a mark that begins before `position`
        at = data.rfind(_MARKED, 0, position - begin + len(_MARKED) - 1)
        while at >= 0:
            whole = data[at - 1 : at] == b"\n" if at else begin == 0
            if whole and (match := _MARK.match(data, at)):
                yield begin + at, match
            elif at == 0 and begin > stop:
                break  # the next piece ends with it, and with what stands before it
            at = data.rfind(_MARKED, 0, at)
        position = begin + 1 if begin > stop else begin


@dataclass(frozen=True)
class Part:
    """Where in a file an attempt's output lies."""

    start: int
    end: int
    ranks: int | None = None  # as its mark says; None: there is none
    nodes: str | None = None
    marked: bool = True  # False: written before there were marks, so that attempts cannot be told apart


def part_of(file: BinaryIO, size: int, attempt: int, newest: bool) -> Part | None:
    """The part of an attempt; None where it said nothing yet. newest: no later attempt is known."""
    end = size
    stop = max(0, size - SEARCHED) if newest else 0
    found: Part | None = None
    seen = False
    for offset, match in marks_back(file, size, stop):
        seen = True
        number = int(match["attempt"])
        if number == attempt:  # a start that was sent away from its nodes has the number of the next
            ranks, nodes = int(match["ranks"]), match["nodes"].decode(errors="replace")
            found = Part(offset, end, found.ranks if found else ranks, found.nodes if found else nodes)
        elif found is not None:
            return found
        elif number < attempt:
            return None
        else:
            end = offset
    if found is not None:
        return found
    if not seen and stop:  # so much of one attempt: its mark is further up
        file.seek(0)
        head = _MARK.search(file.read(CHUNK))
        return Part(stop, end, int(head["ranks"]) if head else None, None, head is not None)
    return Part(0, end, None, None, False) if end else None


@dataclass(frozen=True)
class Read:
    """The last lines of one stream of an attempt."""

    path: Path
    lines: list[Line]
    part: Part | None = None
    problem: str | None = None  # why it cannot be read
    cut: bool = False  # there is more of it before these lines
    size: int = 0  # of the file, when it was read

    @property
    def ranks(self) -> int | None:
        """As many as the part's mark says."""
        return self.part.ranks if self.part is not None else None


def last_lines(
    path: Path, stream: str, attempt: int, newest: bool, ranks: int, count: int, rank: int | None = None,
    searched: int = SEARCHED,
) -> Read:  # fmt: skip
    """The last `count` lines of an attempt, of one rank or of all. ranks: of the run, where the file does not say."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            part = part_of(file, size, attempt, newest)
            if part is None:
                return Read(path, [], size=size)
            labelled = part.ranks or (1 if ranks == 1 else 0)
            found: deque[Line] = deque()
            cut = False
            for offset, data in lines_back(file, part.start, part.end):
                if len(found) >= count or part.end - offset > searched:
                    cut = True
                    break
                if _MARK.match(data):
                    continue
                line = parse_line(data, stream, labelled)
                if line.text.strip() and (rank is None or line.rank == rank):
                    found.appendleft(line)
            return Read(path, list(found), part, None, cut, size)
    except FileNotFoundError:
        return Read(path, [], problem="not there yet")
    except OSError as error:
        return Read(path, [], problem=f"cannot be read: {error.strerror or error}")


# ------------------------------------------------------------------------------------------ the run


@dataclass
class Attempt:
    """One attempt as the ledger tells it."""

    number: int
    job_id: str | None = None
    nodes: tuple[str, ...] = ()
    started: float | None = None
    end: dict[str, Any] | None = None  # its attempt_ended
    stop_signal: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def attempts_of(events: tuple[ledger.Event, ...]) -> dict[int, Attempt]:
    """The attempts of a ledger by number; one that ended before it could begin is among them."""
    found: dict[int, Attempt] = {}
    job_id: str | None = None
    for event in events:
        match event["event"]:
            case "submitted":
                job_id = event["job_id"]
            case "attempt_started":
                job_id = event["job_id"]
                nodes = event.get("nodes")
                names = tuple(name for name in nodes if isinstance(name, str)) if isinstance(nodes, list) else ()
                if not names and isinstance(event.get("node"), str) and event["node"]:
                    names = (event["node"],)
                found[event["attempt"]] = Attempt(event["attempt"], job_id, names, event["time"])
            case "attempt_ended" if isinstance(event.get("attempt"), int):
                found.setdefault(event["attempt"], Attempt(event["attempt"], job_id)).end = event
            case "stop_requested" if event.get("attempt") in found:
                found[event["attempt"]].stop_signal = event.get("signal")
    return found


@dataclass(frozen=True)
class Target:
    """A run and the attempt of it that is meant."""

    look: runs.Look
    attempts: dict[int, Attempt]
    attempt: Attempt
    newest: bool

    @property
    def run(self) -> RunDirectory:
        return self.look.run

    @property
    def name(self) -> str:
        return f"{self.look.pipeline}/{self.look.name}"

    @property
    def ranks(self) -> int:
        return ranks_of(self.look)

    def read(self, lines: int, rank: int | None, searched: int = SEARCHED) -> tuple[Read, Read]:
        job_id = self.attempt.job_id or ""
        args = (self.attempt.number, self.newest, self.ranks, lines, rank, searched)
        return last_lines(self.run.stdout(job_id), "out", *args), last_lines(self.run.stderr(job_id), "err", *args)


def ranks_of(look: runs.Look) -> int:
    """Processes of one attempt, from the frozen config; 1 where it does not say."""
    slurm = look.section("slurm")
    nodes, gpus = table.number(slurm.get("num_nodes")), table.number(slurm.get("gpus_per_node"))
    if look.config.get("stage") in ("eval", "sample", "prepare", "merge"):
        return max(1, int(nodes or 1))
    return max(1, int(nodes or 1)) * max(1, int(gpus or 1))


def target_of(look: runs.Look, attempt: int | None) -> Target:
    """The attempt that is meant: the newest, or that one. Raises LaunchError where there is none."""
    attempts = attempts_of(look.story.events)
    name = f"{look.pipeline}/{look.name}"
    if not attempts and attempt is None:
        job_id = look.story.history.job_id
        return Target(look, attempts, Attempt(1, job_id), True)  # what it says before it begins, if it says anything
    number = max(attempts) if attempt is None else attempt
    if number not in attempts:
        known = f"attempts 1 to {max(attempts)}" if len(attempts) > 1 else "attempt 1" if attempts else None
        raise LaunchError(f"{name}: no attempt {number}", f"it has {known}" if known else "none has begun")
    jobs = {number for number, other in attempts.items() if other.job_id == attempts[number].job_id}
    return Target(look, attempts, attempts[number], number == max(jobs))


def newest_of(looks: list[runs.Look]) -> list[runs.Look]:
    """The run that said something last."""
    begun = [look for look in looks if look.story.events]
    if not begun:
        where = f"run_name={looks[0].pipeline}: nothing was submitted" if looks else "no runs"
        raise LaunchError(where, "submit something first")
    begun.sort(key=lambda look: (look.story.history.attempts > 0, float(look.story.events[-1]["time"])))
    return begun[-1:]


def rows_of(looks: list[runs.Look]) -> list[dict[str, Any]]:
    """The rows that status shows of the pipeline that these runs are of; SLURM is asked once."""
    whole = runs.looks_of(looks[0].run.root.parent) if looks else []
    names = {look.name for look in whole}
    found = [*whole, *(look for look in looks if look.name not in names)]
    return runs.rows_of(found, runs.ask_slurm(found), time.time())


# ------------------------------------------------------------------------------------------ --why


def snapshot(look: runs.Look, row: dict[str, Any], attempt: int | None) -> why.Snapshot:
    """All that is known of an attempt's end. Without a number: of the last one that ended, or began and vanished."""
    history, attempts = look.story.history, attempts_of(look.story.events)
    settings = {
        f"{section}.{key}": value
        for section in ("training", "slurm", "parallel", "cluster")
        for key, value in look.section(section).items()
    }
    base = why.Snapshot(
        name=f"{look.pipeline}/{look.name}", state=row["state"], reason=row["reason"], job_id=history.job_id,
        attempts=max(attempts, default=0), checkpoint_step=history.checkpoint_step, ranks=ranks_of(look),
        settings=settings, local=states.is_local(history),
    )  # fmt: skip
    if attempt is None:
        begun_since = [n for n, a in attempts.items() if history.submitted is None or
                       (a.started or (a.end or {}).get("time", 0)) >= history.submitted]  # fmt: skip
        ended = [n for n in begun_since if attempts[n].end is not None]
        gone = row["state"] in ("failed", "cancelled") and history.running
        attempt = max(attempts) if gone and attempts else max(ended, default=None)
        if history.cancelled or (row["state"] in ("waiting", "queued", "cancelled") and attempt is None):
            return base
    if attempt is None:
        return base
    target = target_of(look, attempt)
    out, err = target.read(100_000, None, EXPLAINED)
    end = target.attempt.end or {}
    until = [event for event in look.story.events if event["time"] <= end.get("time", event["time"])]
    saved = [event["step"] for event in until if event["event"] == "checkpoint_saved"]
    asked = [event for event in until if event["event"] == "asked" and event["time"] >= (target.attempt.started or 0)]
    return dataclasses.replace(
        base, checkpoint_step=max(saved, default=0), attempt=attempt,
        asked=f"{asked[-1]['what']}, by {asked[-1]['user']}" if asked else None,
        job_id=target.attempt.job_id, nodes=target.attempt.nodes,
        running=target.attempt.end is None, outcome=end.get("outcome"), ended_for=end.get("reason"),
        action=end.get("action"), code=_whole(end.get("code")), gave_up=end.get("gave_up") is True,
        lost_nodes=_names(end.get("lost_nodes")), stop_signal=target.attempt.stop_signal, step=_whole(end.get("step")),
        error=_text(look.run.error(attempt), 2000), lines=(*out.lines[-200:], *err.lines),
        stacks=_stacks(look.run, attempt, base.ranks), ranks=(err.part and err.part.ranks) or base.ranks,
    )  # fmt: skip


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _text(path: Path, most: int) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(most).decode(errors="replace")
    except OSError:
        return None
    return "\n".join(clean(line) for line in text.splitlines()).strip() or None


def _stacks(run: RunDirectory, attempt: int, ranks: int) -> dict[int, str]:
    found: dict[int, str] = {}
    pattern = run.stacks(attempt, "*")
    try:
        for path in pattern.parent.glob(pattern.name):
            number = path.stem.rpartition("-")[2]
            if number.isdecimal() and len(found) < 4096 and (text := _text(path, 1 << 18)):
                found[int(number)] = text
    except OSError:
        pass
    return found


def shown_why(seen: why.Snapshot, told: why.Explanation, width: int) -> list[str]:
    """An explanation as lines of text."""
    lines = textwrap.wrap(told.words, width, break_long_words=False, break_on_hyphens=False)
    if told.lines:
        lines += ["", *(f"  {_cut(line, width - 2)}" for line in told.lines)]
    if told.frame:
        file, colon, rest = told.frame.partition(":")
        frame = f"{table.near(file)}{colon}{rest}" if file.startswith("/") else told.frame
        lines += textwrap.wrap(f"in {frame}", width, initial_indent="  ", subsequent_indent="    ",
                               break_on_hyphens=False)  # fmt: skip
    lines += ["", "what to do:"]
    for item in told.do:
        lines += textwrap.wrap(item, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                               break_on_hyphens=False)  # fmt: skip
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


# ------------------------------------------------------------------------------------- what is shown


def prefix(line: Line, ranks: int) -> str:
    """The rank before a line, where there are several; a blank one for what the job script and SLURM say."""
    if ranks < 2:
        return ""
    width = len(str(ranks - 1)) + 2
    return ("" if line.rank is None else f"[{line.rank}]").rjust(width) + " "


def head(target: Target, reads: tuple[Read, Read]) -> list[str]:
    """What is shown: which attempt of which job, how it stands, and where its files are."""
    history, attempt = target.look.story.history, target.attempt
    number = f"attempt {attempt.number} of {max(target.attempts, default=1)}"
    where = f" on {', '.join(attempt.nodes[:4])}{' ...' if len(attempt.nodes) > 4 else ''}" if attempt.nodes else ""
    job = f", job {attempt.job_id}" if attempt.job_id else ""
    if not target.attempts:
        state = f"cancelled: {history.reason}" if history.cancelled else "has not begun"
        number = "no attempt yet"
    else:
        state = ended_words(attempt) if attempt.end else "running, as far as the ledger knows"
    lines = [f"{target.name}, {number}{job}{where}: {state}"]
    for read in reads:
        note = f" ({read.problem})" if read.problem else ""
        if read.part is not None and not read.part.marked and len(target.attempts) > 1:
            note = " (from before attempts were marked: all of them)"
        lines.append(f"  {table.near(read.path)}{note}")
    return [clean(line) for line in lines]


def ended_words(attempt: Attempt) -> str:
    """How an attempt ended and what followed, in a line."""
    end = attempt.end or {}
    outcome = str(end.get("outcome"))
    words = {"finished": "done", "stopped": "planned stop" if attempt.stop_signal == "USR1" else "stopped"}.get(
        outcome, why.KINDS.get(outcome, outcome)
    )
    step = _whole(end.get("step"))
    at = f" at step {step}" if step is not None else ""
    reason = f": {end['reason']}" if end.get("reason") else ""
    follows = "; requeued" if end.get("action") == "requeue" else ""
    return f"{words}{at}{reason}{follows}"


def report(target: Target, reads: tuple[Read, Read], count: int, rank: int | None) -> tuple[list[str], dict[str, Any]]:
    """The newest lines of an attempt as text, and the same facts as data."""
    ranks = max(target.ranks, *(read.ranks or 1 for read in reads))
    if rank is not None and not 0 <= rank < ranks:
        raise LaunchError(f"{target.name}: no rank {rank}", f"0 to {ranks - 1}" if ranks > 1 else "it has one: 0")
    out, err = reads
    for read in reads:
        if rank is not None and ranks > 1 and read.part is not None and not read.part.marked:
            raise LaunchError(
                f"{table.near(read.path)}: from before lines named their ranks", "without --rank it is shown whole"
            )
    half = count // 2
    err_lines = err.lines[-max(half, count - len(out.lines)) :]
    out_lines = out.lines[-max(count - len(err_lines), 0) :] if len(err_lines) < count else []
    lines, order = merge(out_lines, err_lines)
    failed = (target.attempt.end or {}).get("outcome") in why.FAILURES
    trace = None
    if failed:
        whole = target.read(100_000, rank, EXPLAINED)[1].lines
        trace = why.first_failure(whole, _text(target.run.error(target.attempt.number), 2000))
    said = head(target, reads)
    if trace is not None:
        who = f" of rank {trace.rank}" if trace.rank is not None and ranks > 1 else ""
        said += ["", f"the error{who} that ended it:", *trace.lines]
    cut = out.cut or err.cut or len(lines) < len(out.lines) + len(err.lines)
    title = f"the last {len(lines)} lines" if cut else "all lines" if lines else "it has said nothing"
    both = bool(out_lines and err_lines)
    said += ["", f"{title} ({order}):" if both else f"{title}:" if lines else title]
    separate = both and order.startswith("stdout")
    for index, line in enumerate(lines):
        if separate and (index == 0 or line.stream != lines[index - 1].stream):
            said.append("-- stdout" if line.stream == "out" else "-- stderr")
        said.append(prefix(line, ranks) + line.text)
    facts = {
        "run": target.name, "attempt": target.attempt.number if target.attempts else None,
        "attempts": max(target.attempts, default=0), "job_id": target.attempt.job_id,
        "nodes": list(target.attempt.nodes), "ranks": ranks,
        "end": target.attempt.end, "files": [str(read.path) for read in reads],
        "problems": {str(read.path): read.problem for read in reads if read.problem},
        "attempts_marked": all(read.part.marked for read in reads if read.part is not None), "order": order, "cut": cut,
        "error": None if trace is None else {"rank": trace.rank, "lines": list(trace.lines), "frame": trace.frame},
        "lines": [dataclasses.asdict(line) for line in lines],
    }  # fmt: skip
    return said, facts


# ------------------------------------------------------------------------------------------ following


class Tail:
    """New lines of a growing file, from a place on. It may not be there yet, and may be cut or replaced."""

    def __init__(self, path: Path, stream: str, offset: int, ranks: int) -> None:
        self.path, self.stream, self.offset, self.ranks = path, stream, offset, ranks
        self.rest = b""
        self.identity: tuple[int, int] | None = None

    def read(self) -> list[Line | re.Match[bytes]]:
        """Whole lines since the last call, and the marks of attempts among them."""
        found: list[Line | re.Match[bytes]] = []
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if stat.st_size < self.offset or self.identity not in (None, identity):
                    self.offset, self.rest = 0, b""
                    found.append(Line(f"-- {self.path.name} was cut or replaced: from its beginning", None, "logs"))
                self.identity = identity
                if stat.st_size > self.offset:
                    file.seek(self.offset)
                    data = file.read(1 << 20)
                    self.offset += len(data)
                    found += self._split(data)
        except OSError:
            pass  # not there yet, or away for a moment: NFS
        return found

    def _split(self, data: bytes) -> Iterator[Line | re.Match[bytes]]:
        *whole, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > LONGEST_LINE:
            self.rest = self.rest[:200] + b"\r" + self.rest[-(LONGEST_LINE - 201) :]
        for piece in whole:
            if match := _MARK.match(piece):
                self.ranks = int(match["ranks"])
                yield match
            else:
                line = parse_line(piece, self.stream, self.ranks)
                if line.text.strip():
                    yield line

    def flush(self) -> list[Line]:
        """What stands there without an end of line: nothing follows it any more."""
        rest, self.rest = self.rest, b""
        return [line] if (line := parse_line(rest, self.stream, self.ranks)).text.strip() else []


class Follower:
    """Shows what a run says until it is over, over all of its attempts."""

    def __init__(self, look: runs.Look, rank: int | None, to: TextIO) -> None:
        self.look, self.rank, self.to = look, rank, to
        self.ranks = ranks_of(look)
        self.unlabelled = 1 if self.ranks == 1 else 0  # until a mark says otherwise
        self.told: set[int] = set()  # attempts whose end was told
        self.begun: set[int] = set()
        self.job_id: str | None = None
        self.tails: list[Tail] = []
        self.stamp: object = None
        self.asked = time.monotonic()
        self.waits_for: str | None = None

    def say(self, text: str) -> None:
        print(clean(text), file=self.to, flush=True)

    def line(self, line: Line) -> None:
        if line.stream == "logs" or self.rank is None or line.rank == self.rank:
            self.say(prefix(line, self.ranks) + line.text)

    def begin(self, target: Target, reads: tuple[Read, Read]) -> None:
        """Go on from what was shown already."""
        self.reload()
        self.job_id = target.attempt.job_id
        # a line that is being written was shown as far as it went: it is shown again when it is whole
        self.tails = [
            Tail(read.path, stream, _line_start(read.path, read.size), read.ranks or self.unlabelled)
            for read, stream in zip(reads, ("out", "err"), strict=True)
        ]
        self.begun = set(target.attempts)
        self.told = {number for number, attempt in target.attempts.items() if attempt.end is not None}

    def reload(self) -> bool:
        """Read the ledger where it has changed; whether it has."""
        try:
            stat = self.look.run.ledger.stat()
            stamp: object = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except OSError:
            stamp = None
        if stamp == self.stamp:
            return False
        self.stamp = stamp
        self.look.story = table.read_history(self.look.run)
        return True

    def tell_ends(self, before: int | None = None) -> None:
        """Say how attempts ended that ended since; `before`: those before this one."""
        for number, attempt in sorted(attempts_of(self.look.story.events).items()):
            if attempt.end is None or number in self.told or (before is not None and number >= before):
                continue
            self.told.add(number)
            follows = ""
            if attempt.end.get("action") == "requeue" and not states.is_local(self.look.story.history):
                name = str(self.look.section("cluster").get("name") or "")
                hold = site.read(self.look.run.root.parent.parent, name).requeue_hold
                follows = f"; SLURM holds it for about {hold:.0f} s"
            self.say(f"--- attempt {number} ended: {ended_words(attempt)}{follows}")

    def poll(self) -> bool:
        """Show what is new; whether anything was."""
        changed = self.reload()
        history = self.look.story.history
        if history.job_id != self.job_id or not self.tails:
            self.job_id = history.job_id
            if self.job_id is not None:
                self.drain(flush=True)
                self.tails = [
                    Tail(self.look.run.stdout(self.job_id), "out", 0, self.unlabelled),
                    Tail(self.look.run.stderr(self.job_id), "err", 0, self.unlabelled),
                ]
        said = self.drain()
        if changed:
            self.tell_ends()
        return said or changed

    def drain(self, flush: bool = False) -> bool:
        """All new lines, attempt by attempt: of each stdout, then stderr."""
        parts: list[list[list[Line | re.Match[bytes]]]] = []
        for tail in self.tails:
            split: list[list[Line | re.Match[bytes]]] = [[]]
            while found := tail.read():
                for item in found:
                    if isinstance(item, re.Match):
                        split.append([item])
                    else:
                        split[-1].append(item)
            if flush:
                split[-1] += tail.flush()
            parts.append(split)
        said = False
        by_number: dict[int, re.Match[bytes]] = {}
        for split in parts:
            for line in split[0]:
                assert isinstance(line, Line)
                self.line(line)
                said = True
            for piece in split[1:]:
                assert isinstance(piece[0], re.Match)
                by_number.setdefault(int(piece[0]["attempt"]), piece[0])
        for number in sorted(by_number):
            said = True
            self.mark(number, by_number[number])
            for split in parts:
                for piece in split[1:]:
                    if isinstance(piece[0], re.Match) and int(piece[0]["attempt"]) == number:
                        for line in piece[1:]:
                            assert isinstance(line, Line)
                            self.line(line)
        return said

    def mark(self, number: int, match: re.Match[bytes]) -> None:
        if number in self.begun:
            return  # it was shown, or stood in the other stream too
        self.reload()
        self.tell_ends(before=number)
        nodes = match["nodes"].decode(errors="replace")
        self.begun.add(number)
        attempts = attempts_of(self.look.story.events)
        before = attempts.get(number - 1)
        ended = (before.end or {}).get("time") if before is not None else None
        started = attempts[number].started if number in attempts else None
        later = f", {table.duration(started - ended)} after attempt {number - 1}" if started and ended else ""
        self.say(f"--- attempt {number} began on {nodes}{later}")

    def over(self, quiet: bool) -> int | None:
        """The exit status where nothing follows any more; None while the run may go on. Asks SLURM rarely."""
        if is_there(self.look.run.model / manifest.NAME) and self.look.read().done:
            return 0
        history = self.look.story.history
        if history.gave_up or history.cancelled or history.outcome == "cancelled":
            return 1
        if history.outcome == "stopped" and history.action == "exit" and not history.running:
            return 1
        if states.is_local(history):
            return None if owned(self.look.run) or history.submitted is None else 1
        if quiet and time.monotonic() - self.asked > ASK_SECONDS:
            self.asked = time.monotonic()
            row = next((row for row in rows_of([self.look]) if row["stage"] == self.look.name), None)
            if row is not None:
                if row["state"] in ("failed", "cancelled"):
                    self.say(f"--- {row['state']}: {row['reason'] or ''}")
                    return 1
                waits = f"{row['state']}: {row['reason']}" if row["reason"] else None
                if waits and waits != self.waits_for and row["state"] not in ("running", "unknown"):
                    self.say(f"--- {waits}")
                self.waits_for = waits
        return None

    def follow(self) -> int:
        """Until the run is over: 0 where it is done, else 1."""
        last_news = time.monotonic()
        silent_ends = 0
        while True:
            news = self.poll()
            if news:
                last_news = time.monotonic()
            status = self.over(quiet=time.monotonic() - last_news > 5)
            # SLURM's own words come a moment after the ledger's; a local supervisor leaves its lock for a moment
            silent_ends = silent_ends + 1 if status is not None and not news else 0
            if status is not None and silent_ends >= 3:
                self.drain(flush=True)
                self.tell_ends()
                self.finish(status)
                return status
            time.sleep(POLL_SECONDS)

    def finish(self, status: int) -> None:
        name = f"{self.look.pipeline}/{self.look.name}"
        self.say(f"--- {name}: " + ("done" if status == 0 else f"over; why: python -m launchers.logs {name} --why"))


def _line_start(path: Path, end: int) -> int:
    """Where the line that stands at `end` begins."""
    try:
        with path.open("rb") as file:
            begin = max(0, end - LONGEST_LINE)
            file.seek(begin)
            data = file.read(end - begin)
    except OSError:
        return end
    return begin + data.rfind(b"\n") + 1


# -------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Arguments:
    words: list[str]
    follow: bool
    attempt: int | None
    rank: int | None
    why: bool
    lines: int
    as_json: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for what does not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.logs", description="What a run says, and why it ended: all ranks, attempt by attempt."
    )
    parser.add_argument("words", nargs="*", metavar="RUN", help="a stage, pipeline/stage, run_name=NAME, "
                        "paths.output_base=FOLDER; without a stage: the run that said something last")  # fmt: skip
    parser.add_argument("-f", "--follow", action="store_true",
                        help="go on showing what comes, over requeues, until the run is over")  # fmt: skip
    parser.add_argument("--attempt", type=int, metavar="N", help="this attempt (default: the newest)")
    parser.add_argument("--rank", type=int, metavar="R", help="this rank alone (default: all)")
    parser.add_argument("--why", action="store_true", help="why it ended, and what to do about it")
    parser.add_argument("-n", "--lines", type=int, default=LINES, metavar="N", help=f"lines shown (default {LINES})")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_intermixed_args(argv)
    if given.lines < 0:
        raise LaunchError(f"--lines={given.lines}: fewer than none", "a number from 0")
    if given.follow and (given.why or given.json or given.attempt is not None):
        other = "--why" if given.why else "--json" if given.json else "--attempt"
        raise LaunchError(f"-f and {other} do not go together", "-f follows the newest attempt and those after it")
    return Arguments(given.words, given.follow, given.attempt, given.rank, given.why, given.lines, given.json)


def explain(arguments: Arguments, looks: list[runs.Look], width: int) -> list[str]:
    """--why of these runs; without a stage: of those that did not end well."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for pipeline in dict.fromkeys(look.pipeline for look in looks):
        for row in rows_of([look for look in looks if look.pipeline == pipeline]):
            rows[pipeline, row["stage"]] = row
    if all("=" in word for word in arguments.words):
        bad = [one for one in looks if rows[one.pipeline, one.name]["state"] in ("failed", "gated", "unknown")]
        looks = bad or newest_of(looks)
    lines: list[str] = []
    facts = []
    for look in looks:
        seen = snapshot(look, rows[look.pipeline, look.name], arguments.attempt)
        told = why.explain(seen)
        lines += [*([""] if lines else []), *shown_why(seen, told, width)]
        facts.append({
            "run": seen.name, "state": seen.state, "attempt": seen.attempt, "attempts": seen.attempts,
            "job_id": seen.job_id, "nodes": list(seen.nodes), "outcome": seen.outcome, "code": seen.code,
            "code_words": why.exit_words(seen.code), "step": seen.step, "checkpoint_step": seen.checkpoint_step,
            **dataclasses.asdict(told),
        })  # fmt: skip
    return [json.dumps(facts, indent=1)] if arguments.as_json else lines


def act(arguments: Arguments) -> int:
    looks = runs.choose(arguments.words, "logs", newest=True)
    if arguments.why:
        width = shutil.get_terminal_size((100, 24)).columns
        print("\n".join(explain(arguments, looks, max(40, width))))
        return 0
    if all("=" in word for word in arguments.words):
        looks = newest_of(looks)
    if arguments.follow and len(looks) > 1:
        shown = ", ".join(look.name for look in looks)
        raise LaunchError(f"-f follows one run, not {shown}", "name one stage")
    facts = []
    for index, look in enumerate(looks):
        target = target_of(look, arguments.attempt)
        reads = target.read(arguments.lines, arguments.rank)
        lines, fact = report(target, reads, arguments.lines, arguments.rank)
        facts.append(fact)
        if not arguments.as_json:
            print("\n".join([*([""] if index else []), *lines]), flush=True)
            if arguments.follow:
                follower = Follower(look, arguments.rank, sys.stdout)
                follower.begin(target, reads)
                return follower.follow()
            if (target.attempt.end or {}).get("outcome") in why.FAILURES:
                print(f"\nwhy, and what to do: python -m launchers.logs {target.name} --why")
    if arguments.as_json:
        print(json.dumps(facts, indent=1))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        status = act(parse_arguments(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
