"""What is in the Hugging Face cache, without asking the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_of(env: Mapping[str, str]) -> Path:
    """The folder of the hub's cache, as huggingface_hub reads it from an environment."""
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(env.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def in_cache(kind: str, repo: str, cache: Path) -> bool:
    """Whether a job finds this without the hub: a snapshot is there, and no download of it was broken off."""
    folder = cache / f"{'dataset' if kind == 'dataset' else 'model'}s--{repo.replace('/', '--')}"
    whole = not any((folder / "blobs").glob("*.incomplete"))
    return whole and (folder / "refs" / "main").is_file() and any((folder / "snapshots").glob("*/*"))
