"""What a look at a run reads and shows: its history, newest metrics, bars and durations.

Shared by status and the local supervisor. Files that people or power cuts damaged are read as far as they go.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.run import ledger
from post_training.run.directory import RunDirectory
from post_training.run.history import History, is_sound, summarise

TAIL_BYTES, TREND_BYTES = 4096, 16384
STYLES = {
    "running": "cyan", "stopping": "yellow", "requeued": "yellow", "done": "green", "failed": "bold red",
    "cancelled": "magenta", "unknown": "yellow", "waiting": "dim", "queued": "blue",
}  # fmt: skip


@dataclass(frozen=True)
class Story:
    """A run's history, what is wrong with the ledger that tells it, and the ledger's good events."""

    history: History
    problem: str | None = None
    events: tuple[ledger.Event, ...] = ()


def read_history(run: RunDirectory) -> Story:
    """What the ledger says. Events that lack what they must have are left out and counted."""
    try:
        text = run.ledger.read_text(encoding="utf-8", errors="replace")
        entries, lines = ledger.parse_lines(text)
    except FileNotFoundError:
        return Story(History())
    except (OSError, RecursionError) as error:
        return Story(History(), f"ledger.jsonl cannot be read: {getattr(error, 'strerror', None) or error}")
    good = tuple(
        entry
        for entry in entries
        if isinstance(entry.get("event"), str) and number(entry.get("time")) is not None and is_sound(entry)
    )
    if len(good) == lines:
        return Story(summarise(good, sound=True), None, good)
    return Story(summarise(good, sound=True), f"ledger.jsonl: {lines - len(good)} of {lines} lines are damaged", good)


def read_progress(run: RunDirectory) -> dict[str, Any] | None:
    """The running attempt's figures; None where there are none."""
    try:
        found = json.loads((run.slurm / "progress.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Metrics:
    """The newest figures of a run's metrics.jsonl; None where it has none."""

    step: int | None = None
    max_steps: int | None = None
    time: float | None = None
    loss: float | None = None
    reward: float | None = None
    tokens_per_second_per_gpu: float | None = None
    mfu: float | None = None
    seconds_per_step: float | None = None
    trend: tuple[float, ...] = ()  # of what is optimised, oldest first: the reward where there is one, else the loss

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the rate of the newest ones."""
        if self.step is None or self.max_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.max_steps - self.step) * self.seconds_per_step


def number(value: Any) -> float | None:
    """A finite number as it is, anything else as None."""
    return value if (type(value) is float or type(value) is int) and -1e300 < value < 1e300 else None


def _parse(data: bytes) -> list[dict[str, Any]]:
    return ledger.parse_lines(data.decode(errors="replace"))[0]


def read_metrics(path: Path, tail_bytes: int = TAIL_BYTES) -> Metrics:
    """The newest figures, from the file's last bytes; its first line may hold `max_steps`."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - tail_bytes)
            file.seek(start)
            data = file.read()
            records = _parse(data[data.find(b"\n") + 1 :] if start else data)  # the first line is a piece
            if start and not any("max_steps" in entry for entry in records):
                file.seek(0)
                records = _parse(file.readline(tail_bytes)) + records
    except (OSError, ValueError):  # ValueError: a damaged file named a path that cannot be one
        return Metrics()
    return summarise_metrics(records)


def summarise_metrics(records: list[dict[str, Any]]) -> Metrics:
    """The newest of each figure, and the median time of a step. Pure."""

    def newest(name: str) -> float | None:
        return next((v for entry in reversed(records) if (v := number(entry.get(name))) is not None), None)

    rates = []
    t0 = s0 = None
    for entry in records:
        t1, s1 = number(entry.get("time")), number(entry.get("step")) or 0
        if t0 is not None and t1 is not None and s0 is not None and s1 > s0 and t1 >= t0:
            rates.append((t1 - t0) / (s1 - s0))
        t0, s0 = t1, s1
    step, max_steps = newest("step"), newest("max_steps")
    reward = newest("reward")
    optimised = "loss" if reward is None else "reward"
    return Metrics(
        trend=tuple(v for entry in records if (v := number(entry.get(optimised))) is not None),
        step=None if step is None else int(step),
        max_steps=None if max_steps is None else int(max_steps),
        time=newest("time"), loss=newest("loss"), reward=reward,
        tokens_per_second_per_gpu=newest("tokens_per_second_per_gpu"), mfu=newest("mfu"),
        seconds_per_step=statistics.median(rates) if rates else None,
    )  # fmt: skip


def bar(step: float | None, total: float | None, width: int = 10, ascii_only: bool = False) -> str:
    """A bar of `width` characters; empty where the total is not known."""
    if step is None or not total or total <= 0:
        return ""
    full = round(width * min(1.0, max(0.0, step / total)))
    done, rest = ("#", ".") if ascii_only else ("█", "░")
    return done * full + rest * (width - full)


def spark(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The newest values as a line of at most `width` characters, from the least to the greatest of them."""
    marks = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    shown = list(values)[-width:] if width > 0 else []
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[round((value - low) * scale)] for value in shown)


def duration(seconds: float | None) -> str:
    """A duration as squeue writes it: M:SS, H:MM:SS or D-HH:MM:SS."""
    if seconds is None:
        return ""
    whole = max(0, int(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{secs:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def rounded(seconds: float) -> str:
    """An estimated duration, no finer than it is worth: 40 s, 12 min, 2 h 05, 3 d 04 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(0, seconds):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60:02}" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def figure(value: float | None) -> str:
    """Three or four digits that matter."""
    if value is None:
        return ""
    return f"{value:.3g}" if value and (abs(value) < 0.01 or abs(value) >= 1e4) else f"{value:.3f}"


def loss_or_reward(loss: float | None, reward: float | None) -> str:
    """What is being optimised: the reward where there is one."""
    if reward is not None:
        return f"reward {figure(reward)}"
    return f"loss {figure(loss)}" if loss is not None else ""


def tail(path: Path, lines: int = 15) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def near(path: Path | str) -> str:
    """A path as it is shortest from the current folder, where it lies below it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
