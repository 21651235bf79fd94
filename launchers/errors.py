"""What a command refuses to do, said to a person. Entry points print the text alone and exit with status 2."""

from __future__ import annotations


class LaunchError(Exception):
    """Something outside the config stands in the way. Its text says what, and how to mend it."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n  fix: {fix}" if fix else problem)


class Unanswered(LaunchError):
    """SLURM did not say whether it did what it was asked: what was made stays, and the same command looks first."""


class Full(LaunchError):
    """SLURM takes no further job for now: a limit on how many may be in its queue is reached."""


def gate_fix(name: str) -> str:
    """What to do where the gate of an eval stage does not hold."""
    return f"another bound, as in {name}.gate.at_least=..., no gate ({name}.gate=null), or a new run_name to train anew"
