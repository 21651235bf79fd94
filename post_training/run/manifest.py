"""The manifest: the last file written into a checkpoint or an output. Without it the folder is not complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from post_training.run.directory import fsync_path, write_atomic

NAME = "manifest.json"
VERSION = 1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME and not p.name.endswith(".tmp"))


def write(folder: Path, **about: Any) -> None:
    """Declare `folder` complete: sizes and hashes of its files, and what the caller says about it.

    All that is in it reaches the disk before the manifest does: it may be what an older folder is removed for.
    """
    files = {}
    for path in _files(folder):
        # safetensors makes 0600 files; give every file what the folder grants, so that a group can read them
        path.chmod((folder.stat().st_mode & 0o666) | 0o600)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        fsync_path(path)
    for directory in {folder, *(p.parent for p in map(folder.joinpath, files))}:
        fsync_path(directory)
    write_atomic(folder / NAME, json.dumps({"version": VERSION, **about, "files": files}, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is no readable one."""
    try:
        return cast("dict[str, Any]", json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def problem(folder: Path, hashes: bool = False) -> str | None:
    """Why the folder is not complete, or None where it is. Sizes always; contents when `hashes`."""
    manifest = read(folder)
    if manifest is None:
        return f"no {NAME}"
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError):
        return f"{NAME} is damaged"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if hashes and _sha256(path) != sha256:
            return f"{name} is damaged"
    return None
