"""Frozen configs read fast are what the YAML parser reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launchers import frozen
from post_training.run.directory import load_yaml

ROOT = Path(__file__).resolve().parent.parent
ODD = [
    "", " ", "no", "Yes", "null", "~", "01:00:00", "24:00:00", "1e5", "1.5e-5", ".5", "-.inf", "0x1F", "017", "1_000",
    "0b1010101010101010", "00fa885bc706f54c", "123456789012345a", "2026-11-22", "a: b", "a #b", "#", "- a", "&a", "*a",
    "!x", "[1, 2]", "{a: 1}", "'", '"', "a\nb", "é", "/a b/c", "-", "?", "|", ">", "a:", "=", "<<", "\t", "-1", "+1",
    "1:30", "@x",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.sampled_from(ODD)
)
KEYS = st.sampled_from(["a", "b_1", "lr", "no", "y", "null", "run_dir", "1", "a b", "x-y"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
PIECES = st.builds(
    lambda indent, dash, key, value: " " * indent + dash + key + value,
    st.integers(0, 5), st.sampled_from(["", "", "", "- ", "-"]), st.sampled_from(["a:", "b:", "no:", "a-b:", ""]),
    st.sampled_from(["", " ", *(f" {odd}" for odd in ODD)]),
)  # fmt: skip


def parsed(text: str) -> Any:
    try:
        return load_yaml(text)
    except Exception as error:
        return type(error)


def fast(text: str) -> Any:
    try:
        return frozen.load(text)
    except Exception as error:
        return type(error)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_dumped_is_read(value: dict[str, Any]) -> None:
    text = yaml.dump(value, sort_keys=False, allow_unicode=True)
    assert repr(fast(text)) == repr(parsed(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=6).map("\n".join))
@example("a:\n  - x\n  b: 1")
@example("a: 1\n  b: 2")
@example("a: 1\na: 2")
@example("a:\n- b: 1\n  c: 2\n- d\ne: 3")
@example("a: x\n  y")
@example("a: [1\nb: }")
def test_damage_is_damage(text: str) -> None:
    assert repr(fast(text)) == repr(parsed(text))


def test_our_configs_need_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "load_yaml", lambda text: pytest.fail(text) if "\n" in text else load_yaml(text))
    config = {
        "version": 1, "identity": "00fa885bc706f54c", "training": {"num_train_epochs": 1.0, "lr": 1e-05, "x": None},
        "slurm": {"wall_time": "24:00:00", "modules": ["cuda/12.4"], "env": {}, "setup": ["source ~/env/bin/activate"]},
        "data": [{"path": "/a/b", "weight": 0.5}, {"path": "org/name", "weight": 0.5}], "on": {"true_one": True},
    }  # fmt: skip
    config.pop("on")
    assert frozen.load(yaml.dump(config, sort_keys=False)) == config
