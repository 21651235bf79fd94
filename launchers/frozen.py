"""Frozen configs read fast: the plain lines that they are made of here, anything else by the YAML parser.

A look reads the config of every run, and a YAML parser takes longer for it than for all the rest together.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from post_training.run.directory import load_yaml

_LINE = re.compile(r"( *)((?:- )?)(?:([A-Za-z_]\w*):(?: ([^ \t].*))?|([^ \t].*))", re.ASCII)
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
# what is sure to be a string: the words that YAML reads as something else are looked for besides
_STRING = re.compile(r"/[\w/.-]*|[A-Za-z][\w/.-]*|(?!0b)(?=[0-9]*[a-f])[0-9a-f]{16}", re.ASCII)
_INT = re.compile(r"-?(?:0|[1-9][0-9]{0,15})", re.ASCII)
_EMPTY: dict[str, type] = {"{}": dict, "[]": list}
_SCALAR = (str, int, float, bool, type(None))


class _NotPlain(Exception):
    pass


def load(text: str) -> Any:
    """What `load_yaml` makes of the text. Raises what it raises."""
    try:
        return _plain(text)
    except _NotPlain:
        return load_yaml(text)


def _scalar(text: str) -> Any:
    if _STRING.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return int(text) if _INT.fullmatch(text) else _other_scalar(text)


@functools.lru_cache(4096)
def _other_scalar(text: str) -> Any:
    if text[0] in "&*!|>%@`#-?:,[]{}" or " #" in text or ": " in text or text.endswith(":") or not text.isprintable():
        raise _NotPlain
    try:
        value = load_yaml(text)
    except Exception:
        raise _NotPlain from None
    if not isinstance(value, _SCALAR):
        raise _NotPlain
    return value


@functools.lru_cache(16384)
def _line(line: str) -> tuple[int, str, str | None, str | None, Any]:
    """Indentation, dash, key, the value's text and the value. Configs are much alike, so few lines are parsed."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise _NotPlain
    spaces, dash, key, text, item = match.groups()
    text = item if key is None else text
    if key is not None and key.lower() in _WORDS:
        raise _NotPlain
    return len(spaces), dash, key, text, None if text is None or text in _EMPTY else _scalar(text)


def _plain(text: str) -> dict[str, Any]:
    """Mappings, lists and scalars, one a line, indented as YAML's own dump indents them. Raises _NotPlain."""
    root: dict[str, Any] = {}
    # open containers from the outside in: indentation of their keys or dashes, and themselves
    stack: list[tuple[int, dict[str, Any] | list[Any]]] = [(0, root)]
    waiting: tuple[int, dict[str, Any], str] | None = None  # a key without a value: its lines may follow
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise _NotPlain
    for line in lines:
        indent, dash, key, written, value = _line(line)
        if written in _EMPTY:
            value = _EMPTY[written]()
        if waiting is not None:
            above, holder, name = waiting
            waiting = None
            if dash and indent >= above:
                entries: list[Any] = []
                holder[name] = entries
                stack.append((indent, entries))
            elif not dash and indent > above:
                opened: dict[str, Any] = {}
                holder[name] = opened
                stack.append((indent, opened))
        depth, container = stack[-1]
        while depth > indent or (depth == indent and not dash and type(container) is list):
            stack.pop()
            if not stack:
                raise _NotPlain
            depth, container = stack[-1]
        if depth != indent:
            raise _NotPlain
        if dash:
            if not isinstance(container, list):
                raise _NotPlain
            if key is None:
                container.append(value)
                continue
            indent += 2
            container.append({})
            container = container[-1]
            stack.append((indent, container))
        elif key is None or not isinstance(container, dict):
            raise _NotPlain
        container[key] = value
        if written is None:
            waiting = (indent, container, key)
    return root
