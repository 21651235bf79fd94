"""Answers that are formulas, compared by the package math-verify in a process of its own.

math-verify reads LaTeX with sympy, which may take for ever on a text that a model made up, inside C code that no
signal interrupts; and its own time limit is signal.alarm, which only a main thread may use. So one worker a rank
does the comparing. One that does not answer in time is killed, and the answer counts as wrong.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 10.0
"""Longest time for one answer. Real ones take milliseconds: the limit does not make rewards depend on the clock."""
LONGEST = 500
"""Characters of an answer; a longer one counts as wrong."""
START_SECONDS = 120.0
"""Longest time for a worker's start, which imports sympy from a file system that may be slow."""


class Worker:
    """A child process that answers whether two formulas are equal."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, expected: str) -> bool:
        """Whether two formulas, in LaTeX or plain, are equal; False where they cannot be read or compared in time."""
        if len(answer) > LONGEST:
            return False
        for _ in range(2):  # a worker that died since (killed for its memory, say) is started once more
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([answer, expected]).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                self.close()
                continue
            line = _line(process, SECONDS)
            if line is None:
                self.close()
                return False
            if line:
                return bool(json.loads(line))
            self.close()
        return False

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "post_training.rewards.mathematics"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            if not _line(self._process, START_SECONDS):
                self.close()
                raise RuntimeError("the worker of math_verify does not start; what it printed is above")
        return self._process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The worker's next line; empty where it ended, None where it took too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(seconds) else None


_worker = Worker()


def math_verify(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where what stands in <answer>...</answer> equals the expected formula or number, else 0."""
    from post_training.rewards.verify import answer_text, is_correct, text_of

    def right(completion: Any, expected: str) -> bool:
        text = text_of(completion)
        found = answer_text(text)
        return found is not None and (is_correct(text, expected) or _worker.equal(found, expected))

    return [float(right(c, a)) for c, a in zip(completions, answer, strict=True)]


def main() -> None:
    """The worker: pairs of formulas in, one JSON list a line; true or false out."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # SLURM's word is for the trainer
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print must not mix with the answers

    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # it warns on each call that its own time limit is off

    def formula(text: str) -> Any:
        marked = text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"
        return parse(marked, parsing_timeout=None)

    answers.write("ready\n")
    for line in sys.stdin:
        found, expected = json.loads(line)
        try:
            equal = bool(verify(formula(expected), formula(found), timeout_seconds=None))
        except Exception:
            equal = False
        answers.write(f"{json.dumps(equal)}\n")


if __name__ == "__main__":
    main()
