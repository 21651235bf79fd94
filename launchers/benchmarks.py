"""Which benchmarks there are, read from lm-eval's task files as text: importing lm-eval takes seconds, and their YAML
needs its own loader.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from conf.check import ConfigError, nearest
from conf.schema import Config

NAMED = re.compile(r"^[\"']?(task|group|tag)[\"']?:[ \t]*(.*?)[ \t]*(?:#.*)?$((?:\n[ \t]*- .*)*)", re.MULTILINE)
UNSAFE = re.compile(r"^unsafe_code:[ \t]*true\b", re.MULTILINE | re.IGNORECASE)
INCLUDED = re.compile(r"^[\"']?include[\"']?:[ \t]*[\"']?([^\"'#\n]+?)[\"']?[ \t]*$", re.MULTILINE)


@dataclass
class Known:
    """Names of tasks, groups and tags, and the tasks that run what the model wrote."""

    names: set[str] = field(default_factory=set)
    unsafe: set[str] = field(default_factory=set)


def names_in(text: str) -> dict[str, list[str]]:
    """The names that one task file gives, by their kind: task, group, tag."""
    found: dict[str, list[str]] = {}
    for kind, value, items in NAMED.findall(text):
        if value.startswith("["):
            parts = value.strip("[]").split(",")
        else:
            parts = [value] if value else re.findall(r"- (.*)", items)
        found.setdefault(kind, []).extend(p.strip().strip("\"'") for p in parts if p.strip() and ":" not in p)
    if "group" in found:
        found.pop("task", None)  # what it is made of
    return found


def scan(folder: Path, known: Known, wanted: set[str]) -> None:
    """Add what a folder's files name, the likeliest ones first, until all that is wanted is found."""

    def likely(path: Path) -> bool:
        return any(name.startswith(path.name.split("_")[0]) for name in wanted)

    folders = sorted((p for p in _entries(folder) if p.is_dir()), key=lambda p: (not likely(p), p.name))
    for part in (None, *folders):
        if wanted <= known.names:
            return
        for path in sorted(folder.glob("*.yaml") if part is None else part.rglob("*.yaml")):
            _read(path, known)


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _read(path: Path, known: Known) -> None:
    text = _text(path)
    found = names_in(text)
    known.names.update(name for names in found.values() for name in names)
    unsafe = UNSAFE.search(text) is not None
    included, seen = [path.parent / name for name in INCLUDED.findall(text)], {path}
    while included:
        other = included.pop()
        if other in seen:
            continue
        seen.add(other)
        text = _included(other)
        known.names.update(names_in(text).get("tag", ()))
        unsafe = unsafe or UNSAFE.search(text) is not None
        included += [other.parent / name for name in INCLUDED.findall(text)]
    if unsafe:
        known.unsafe.update(found.get("task", ()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_included = cache(_text)  # one file is included by many


@cache
def known(wanted: frozenset[str], own: str | None) -> Known | None:
    """What there is, as far as it was looked for; None where lm-eval's own files are not on this machine."""
    found = Known()
    if own is not None:
        scan(Path(own).expanduser(), found, set(wanted))
    if wanted <= found.names:
        return found
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return None
    scan(Path(spec.origin).parent / "tasks", found, set(wanted))
    return found


def check(cfg: Config) -> None:
    """Refuse a task that is unknown, or that runs what the model wrote; a folder of tasks that is none."""
    own = cfg.eval.tasks_path
    if own is not None and not Path(own).expanduser().is_dir():
        fix = "eval.tasks_path=<the folder that the YAML files are in>"
        raise ConfigError("eval.tasks_path", own, "no such folder", fix)
    found = known(frozenset(cfg.eval.tasks), own)
    if found is None:
        return
    for name in cfg.eval.tasks:
        if name not in found.names:
            fix = nearest(name, found.names) if len(found.names) < 20 else _near(name, found.names)
            raise ConfigError("eval.tasks", name, "lm-eval has no such task", fix)
        if name in found.unsafe:
            problem = "it runs code that the model wrote, with your rights, on the node"
            raise ConfigError("eval.tasks", name, problem, "leave it out; lm-eval itself runs it, in a container")


def _near(name: str, names: set[str]) -> str:
    """As `nearest`, of thousands, which are not listed."""
    hint = nearest(name, names)
    return hint if hint.startswith("did you mean") else "a name that `lm-eval ls tasks` lists"
