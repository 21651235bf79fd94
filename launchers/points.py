"""Which pipelines are the points of a sweep: <paths.output_base>/.sweeps/<name>/sweep.json, written at submission."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from launchers.errors import LaunchError
from post_training.run.directory import write_atomic

VERSION = 1
Points = dict[str, dict[str, str]]
"""The keys and values in which the points of a sweep differ, by the point's folder below the output folder."""


def folder(output_base: Path, name: str) -> Path:
    """Where a sweep keeps what is not its points'."""
    return output_base / ".sweeps" / name


def read(output_base: Path, name: str) -> Points:
    """The points of a sweep that have a folder. Raises LaunchError where there is no such sweep."""
    found = _read(output_base, name)
    return {name: keys for name, keys in found.items() if name == Path(name).name and (output_base / name).is_dir()}


def _read(output_base: Path, name: str) -> Points:
    known = sweeps(output_base)
    path = folder(output_base, name) / "sweep.json"
    if name not in known:
        fix = f"one of: {', '.join(known[:10])}" if known else "python -m launchers.pipeline -m <key>=<value>,<value>"
        raise LaunchError(f"sweep={name}: not in {output_base}", fix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise LaunchError(f"{path} has version {found['version']}; this code reads {VERSION}", "use the newer code")
        return {str(name): {str(k): str(v) for k, v in keys.items()} for name, keys in found["points"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LaunchError(f"{path} cannot be read", "give the sweep's command again: it writes the file anew") from None


def sweeps(output_base: Path) -> list[str]:
    """The names of the sweeps below an output folder."""
    return sorted(path.parent.name for path in (output_base / ".sweeps").glob("*/sweep.json"))


def record(output_base: Path, name: str, points: Mapping[str, Mapping[str, str]]) -> None:
    """Add points to a sweep: a later command may bring more values of the same keys."""
    try:
        known = _read(output_base, name)
    except LaunchError:
        known = {}
    place = folder(output_base, name)
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, "name": name, "points": {**known, **points}}, indent=1)
    write_atomic(place / "sweep.json", text + "\n")
