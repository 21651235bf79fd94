"""The live figures of an attempt: which phase it is in, for how long, and which step it has done.

Rank 0 keeps them and writes slurm/progress.json about once a second. The job script reads them when the attempt has
ended, however it ended, and puts them into the ledger; status reads them while it runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from post_training.run.directory import RunDirectory

VERSION = 1
PHASES = ("startup", "steps", "redone", "saving", "evaluation")
EVERY_S = 1.0


@dataclass
class Figures:
    """What progress.json holds."""

    attempt: int
    step: int | None = None  # highest step done
    time: float = 0.0  # seconds since the epoch when this was written
    phase: str = "startup"
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    longest_step: float | None = None  # seconds
    save: float | None = None  # seconds of the longest save
    version: int = VERSION


class Progress:
    """Counts the seconds of each phase since it was made. `writes`: this is rank 0, which keeps the file."""

    def __init__(self, run: RunDirectory, attempt: int, reached: int, writes: bool) -> None:
        """reached: highest step that an earlier attempt has done; steps up to it are done again."""
        self.run, self.reached, self.writes = run, reached, writes
        self.figures = Figures(attempt)
        self._entered = time.monotonic()
        self._step_began = self._entered
        self._saving = 0.0  # within the current step or save
        self._written = -EVERY_S
        self.write(force=True)

    def enter(self, phase: str) -> None:
        """The phase until now ends here."""
        now = time.monotonic()
        self.figures.seconds[self.figures.phase] += now - self._entered
        if self.figures.phase == "saving":
            self.figures.save = max(self.figures.save or 0.0, now - self._entered)
        self._entered, self.figures.phase = now, phase
        self.write(force=True)

    def training(self, step: int) -> None:
        """The step after `step` begins."""
        self.enter("redone" if step < self.reached else "steps")
        self._step_began = self._entered

    def stepped(self, step: int) -> None:
        """A step is done; the next one begins unless a phase is entered."""
        now = time.monotonic()
        self.figures.seconds[self.figures.phase] += now - self._entered
        self.figures.longest_step = max(self.figures.longest_step or 0.0, now - self._step_began)
        self.figures.step = step
        self.figures.phase = "redone" if step < self.reached else "steps"
        self._entered = self._step_began = now
        self.write()

    def write(self, force: bool = False) -> None:
        """Replace progress.json. A figure lost is no harm: a full disk must not end a step."""
        if not self.writes or not (force or time.monotonic() - self._written >= EVERY_S):
            return
        self._written = time.monotonic()
        self.figures.time = round(time.time(), 3)
        text = json.dumps(asdict(self.figures))
        temporary = self.run.progress.with_name(f".progress-{self.figures.attempt}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            if self.run.newest_attempt() > self.figures.attempt:
                temporary.unlink()
            else:
                temporary.replace(self.run.progress)


def read(run: RunDirectory, attempt: int | None = None) -> dict[str, Any] | None:
    """The figures of the newest attempt, or of `attempt` alone; None where there are none."""
    try:
        found = json.loads(run.progress.read_text())
        good = isinstance(found["seconds"], dict) and isinstance(found["time"], int | float)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if good and attempt in (None, found.get("attempt")) else None
