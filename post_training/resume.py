"""Checkpoints on disk: which is the newest complete one, what is set aside, what is removed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from post_training.run import manifest
from post_training.run.directory import RunDirectory, fsync_path

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_steps(run: RunDirectory) -> list[tuple[int, Path]]:
    """Every checkpoint folder with its step, oldest first, whole or not."""
    if not run.checkpoints.is_dir():
        return []
    found = ((_NAME.fullmatch(p.name), p) for p in run.checkpoints.iterdir() if p.is_dir())
    return sorted((int(m.group(1)), p) for m, p in found if m)


def newest_complete(run: RunDirectory) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose files are all there and undamaged, and the newer ones that are not, with reasons."""
    broken: list[tuple[Path, str]] = []
    for _, folder in reversed(checkpoint_steps(run)):
        problem = manifest.problem(folder, hashes=True)
        if problem is None:
            return folder, broken
        broken.append((folder, problem))
    return None, broken


def leftovers(run: RunDirectory) -> list[Path]:
    """Checkpoints that earlier attempts were writing when they died: in the staging folders, never renamed."""
    return sorted(p for p in run.checkpoints.glob(".attempt-*/*") if p.is_dir())


def set_aside(run: RunDirectory, folder: Path, attempt: int) -> Path:
    """Keep a checkpoint that is not whole out of the way of later saves under the same step; nothing is deleted."""
    target = run.checkpoints / f"broken-{folder.name}-attempt-{attempt}"
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"broken-{folder.name}-attempt-{attempt}-{number}")
    moved = folder.rename(target)
    if folder.parent != run.checkpoints and not any(p.is_dir() for p in folder.parent.iterdir()):
        shutil.rmtree(folder.parent)  # TRL's README
    return moved


def install(staged: Path, target: Path) -> None:
    """Give a complete checkpoint its name, in the place of one of the same step if there is one."""
    if target.exists():  # of an attempt that saved this step and then was set back behind it
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        staged.rename(target)
        shutil.rmtree(old)
    else:
        staged.rename(target)
    fsync_path(target.parent)


def rotate(run: RunDirectory, limit: int) -> None:
    """Remove the oldest complete checkpoints beyond `limit`. Called only after the newest has its manifest."""
    complete = [folder for _, folder in checkpoint_steps(run) if manifest.problem(folder) is None]
    for folder in complete[:-limit]:
        (folder / manifest.NAME).unlink()  # first, so that a half-removed folder is not taken for a whole one
        shutil.rmtree(folder)
