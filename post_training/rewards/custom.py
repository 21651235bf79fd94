"""Reward functions of the user's own: any function in a Python file that the config names.

The file is copied into the run's code at submission, and its hash is part of the run's identity. It stands alone: what
it imports comes from the Python of the job. No torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conf.check import split_function
from conf.schema import RewardFunction as Named
from post_training.data.source import DataError
from post_training.run.directory import RunDirectory

Function = Callable[..., list[float | None]]


def load(named: Named, run: RunDirectory) -> Function:
    """The function from the run's own copy of its file, with what it returns checked. Raises DataError."""
    place, name = split_function(named.path)
    file, shown = run.code / place, Path(named.path).name
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        source = b""
    if hashlib.sha256(source).hexdigest()[:16] != file.parent.name:
        raise DataError(f"{shown}: its copy {file} is gone or was changed\n  fix: submit the run again")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise DataError(f"{shown}: cannot be loaded: {_said(error, file)}\n  fix: mend the file") from error
    return checked(function, shown, file)


def checked(function: Callable[..., Any], path: str, file: Path) -> Function:
    """`function`, whose errors and unusable rewards end the run with words: which function, which sample, what to do.

    A reward is a finite number, or None where the function does not apply to the sample.
    """

    @functools.wraps(function)
    def rewards(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        count = len(completions)
        try:
            values = function(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            culprit = _culprit(function, prompts, completions, columns)
            where = "a batch" if culprit is None else _shown(prompts[culprit], completions[culprit])
            raise DataError(
                f"reward function {path}: raised {_said(error, file)} for {where}\n"
                "  fix: mend the function, or let it return None where it does not apply"
            ) from error
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
            raise DataError(
                f"reward function {path}: gave {got} for {count} completions\n"
                "  fix: return a list of one number for each completion"
            )
        for value, prompt, completion in zip(values, prompts, completions, strict=True):
            usable = value is None or (isinstance(value, int | float) and math.isfinite(value))
            if not usable:
                raise DataError(
                    f"reward function {path}: gave {value!r} for {_shown(prompt, completion)}\n"
                    "  fix: return a finite number, or None where it does not apply"
                )
        return list(values)

    return rewards


def _culprit(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> int | None:
    """The first sample for which the function raises when it is given alone; None where none does."""
    for i in range(len(completions)):
        own = {
            k: [v[i]] if isinstance(v, list) and len(v) == len(completions) else v for k, v in columns.items()
        }
        try:
            function(prompts=[prompts[i]], completions=[completions[i]], **own)
        except Exception:
            return i
    return None


def _said(error: Exception, file: Path) -> str:
    """The exception in one line, with its line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{text} (line {lines[-1]})" if lines else text


def _shown(prompt: Any, completion: Any) -> str:
    from post_training.rewards.verify import text_of

    return f"completion {text_of(completion)[:80]!r} of prompt {text_of(prompt)[:80]!r}"
