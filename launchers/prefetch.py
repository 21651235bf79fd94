"""Download what stages need, on a node that has internet:  python -m launchers.prefetch [stage=...] [key=value ...]

The models, tokenizers and data sets of one stage (stage=...) or of the whole pipeline go into the Hugging Face cache,
where jobs with offline=true find them. huggingface_hub alone is imported, when there is something to download.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.datasets import KNOWN
from conf.schema import Config
from launchers import cli
from launchers.hub import cache_of, in_cache
from launchers.preflight import HUB_ID
from launchers.selection import Selection, select, sources

USAGE = """
usage: python -m launchers.prefetch [stage=<stage>] [pipeline=<pipeline>] [<key>=<value> ...] [dry_run=true]

Downloads the models, tokenizers and data sets that a stage, or without stage= a whole pipeline, gets from the hub, into
the Hugging Face cache (HF_HUB_CACHE, HF_HOME; slurm.env's where it names one). Then submit the same with offline=true.
dry_run=true says what would be downloaded.
"""
WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ckpt", "original/*", "onnx/*")
"""Left out beside safetensors: the same weights in other forms."""
TOKENIZER = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Wanted:
    """Something on the hub."""

    kind: str  # model, tokenizer or dataset
    repo: str
    key: str  # of the config that names it


def on_hub(value: str | None) -> bool:
    """Whether a config value is a hub id and not a path."""
    if value is None or value.startswith(("/", ".", "~")) or Path(value).expanduser().exists():
        return False
    return HUB_ID.fullmatch(value) is not None


def wanted(selection: Selection) -> list[Wanted]:
    """What the stages of a command take from the hub, each once."""
    found: dict[tuple[str, str], Wanted] = {}

    def want(kind: str, value: str | None, key: str) -> None:
        if value is not None and on_hub(value):
            found.setdefault((kind, value), Wanted(kind, value, key))

    for name in selection.wanted:
        cfg = selection.config(name)
        origins = sources(selection, name)
        for role, source in origins.items():
            kind, _, value = (source or "").partition(":")
            if kind == "path":
                given = getattr(cfg.inputs, role, None)
                want("model", value, f"{name}.inputs.{role}" if given else "model.name_or_path")
        if origins["model"] is None and cfg.stage != "prepare" and cfg.model.tokenizer not in ("bytes", "train"):
            want("tokenizer", cfg.model.tokenizer, "model.tokenizer")
        if cfg.stage == "merge":
            want("model", cfg.merge.adapter, "merge.adapter")
        for key, repo in data_of(cfg).items():
            want("dataset", repo, key)
    models = {w.repo for w in found.values() if w.kind == "model"}
    return [w for w in found.values() if not (w.kind == "tokenizer" and w.repo in models)]


def data_of(cfg: Config) -> dict[str, str | None]:
    """Where a stage's records come from, by the config's key."""
    if cfg.stage in ("prepare", "merge"):  # those of a prepare stage are its stages'
        return {}
    parts = {f"data.datasets[{i}]": (part.name, part.path) for i, part in enumerate(cfg.data.datasets)}
    places = parts or {"data": (cfg.data.name, cfg.data.path)}
    found = {f"{key}.{'path' if path else 'name'}": path or KNOWN[name].hub_id for key, (name, path) in places.items()}
    if cfg.stage == "eval" and cfg.eval.text.name is not None:
        found["eval.text"] = cfg.eval.text.path or KNOWN[cfg.eval.text.name].hub_id
    return {**found, "data.eval_path": cfg.data.eval_path}


def fetch(item: Wanted, cache: Path) -> Path:
    """Download it, or what is missing of it. Returns its folder; raises what huggingface_hub raises."""
    from huggingface_hub import HfApi, snapshot_download

    choice: dict[str, Any] = {}
    if item.kind == "tokenizer":
        choice["allow_patterns"] = list(TOKENIZER)
    if item.kind == "model":
        files = HfApi().list_repo_files(item.repo)
        if any(name.endswith(".safetensors") for name in files):
            choice["ignore_patterns"] = list(WEIGHTS)
    kind = "dataset" if item.kind == "dataset" else "model"
    return Path(snapshot_download(item.repo, repo_type=kind, cache_dir=cache, **choice))


def why_not(item: Wanted, error: Exception) -> str:
    """What a failed download means, and what helps."""
    from huggingface_hub import errors

    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        problem, fix = "its owner lets nobody in without asking", "accept its terms on the hub, then `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        problem, fix = "the hub has none of this name, or not for you", f"mend {item.key}, or `hf auth login`"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        problem, fix = "HF_HUB_OFFLINE is set in this shell", "unset HF_HUB_OFFLINE, on a node that has internet"
    elif isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError | ConnectionError):
        problem, fix = first, "a cache with room that you can write: export HF_HOME=<folder>"
    else:
        problem, fix = f"the hub does not answer: {first}", "run this on a node that has internet, or try again"
    return f"error: {item.key}={item.repo}: {problem}\n  fix: {fix}"


def act(selection: Selection) -> int:
    """Download everything, say what was done. Exit status 1 where something could not be had."""
    first = selection.config(selection.wanted[0])
    cache = cache_of({**os.environ, **first.slurm.env})
    items = wanted(selection)
    stages = ", ".join(selection.wanted)
    if not items:
        print(f"nothing to download: {stages} take all from local files")
        return 0
    if selection.dry_run:
        for item in items:
            there = "there already" if in_cache(item.kind, item.repo, cache) else "to download"
            print(f"{item.kind:9} {item.repo}  {there} ({item.key})")
        return 0
    print(f"cache: {cache} (jobs must see it under this path)", flush=True)
    failed = 0
    for item in items:
        before = size_of(cache, item)
        try:
            folder = fetch(item, cache)
        except Exception as error:
            failed += 1
            print(why_not(item, error), file=sys.stderr, flush=True)
            continue
        new = size_of(cache, item) - before
        done = f"{_bytes(new)} downloaded" if new else "there already"
        print(f"{item.kind:9} {item.repo}  {done}: {folder}", flush=True)
    if failed:
        print(f"{failed} of {len(items)} could not be downloaded", file=sys.stderr)
        return 1
    print(f"{stages}: everything is there; now the same with offline=true")
    return 0


def size_of(cache: Path, item: Wanted) -> int:
    """Bytes held of it, in whole files."""
    kind = "dataset" if item.kind == "dataset" else "model"
    blobs = (cache / f"{kind}s--{item.repo.replace('/', '--')}" / "blobs").glob("*")
    return sum(path.stat().st_size for path in blobs if not path.name.endswith(".incomplete"))


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def names_a_stage(tokens: Iterable[str]) -> bool:
    return any(re.match(r"(\+\+)?(stage|stages\.selected)=", token) for token in tokens)


def main(argv: list[str] | None = None) -> int:
    """The command line."""

    def choose(tokens: list[str]) -> Selection:
        online = [token for token in tokens if not token.startswith("offline=")]
        return select(online, only_one=names_a_stage(tokens))

    return cli.run(choose, act, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
