"""results.json and the journal of an evaluation: what is written is read, damage is said, nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.evaluation.journal import NAME, Journal, key
from post_training.run import results
from post_training.run.directory import Fenced, RunDirectory
from post_training.run.results import Figure, Results

numbers = st.floats(allow_nan=False, allow_infinity=False)
figures = st.builds(Figure, numbers, st.none() | numbers, st.none() | numbers, st.none() | st.integers(0, 10**6))


@given(st.dictionaries(st.text(min_size=1), figures), st.none() | st.sampled_from(["accuracy"]), st.none() | numbers)
def test_what_is_written_is_read(found: dict[str, Figure], headline: str | None, seconds: float | None) -> None:
    written = Results(headline, found, {"num_samples": 4}, seconds)
    assert results.from_plain(json.loads(json.dumps(results.as_plain(written)))) == written


def test_a_figure_that_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="accuracy=nan is no finite number"):
        results.as_plain(Results("accuracy", {"accuracy": Figure(float("nan"))}))


def test_version_1_is_read() -> None:
    found = results.from_plain(
        {"version": 1, "metric": "accuracy", "score": 0.5, "score_low": 0.4, "score_high": 0.6, "count": 8,
         "format": 1.0, "steps_right": None, "perplexity_text": 3.5, "seconds": 2.0}
    )
    assert found.score == Figure(0.5, 0.4, 0.6, 8) and found.seconds == 2.0
    assert found.figures.keys() == {"accuracy", "format", "perplexity_text"}
    assert results.from_plain({"version": 1, "metric": None, "score": None}).score is None


@pytest.mark.parametrize(
    "damaged",
    [{"version": 3}, {"version": 2}, {"metric": "accuracy", "score": float("nan")},
     {"version": 2, "figures": []}, {"version": 2, "figures": {"accuracy": 0.5}},
     {"version": 2, "figures": {"accuracy": {"value": "much"}}}, {"version": 2, "figures": {"accuracy": {}}},
     {"version": 2, "figures": {"accuracy": {"value": float("nan")}}},
     {"version": 2, "figures": {"accuracy": {"value": 0.5, "low": float("-inf")}}}],
)  # fmt: skip
def test_damage_is_said(damaged: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"results\.json"):
        results.from_plain(damaged)


def test_how_figures_are_shown() -> None:
    assert results.shown("accuracy", Figure(0.583)) == "58.3 %"
    assert results.shown("pass@8", Figure(0.5)) == "50.0 %"
    assert results.shown("gsm8k/exact_match", Figure(0.25)) == "0.250"
    assert results.shown("perplexity_text", None) == "-"
    names = ("accuracy", "perplexity_text", "length", "wikitext/word_perplexity")
    assert [results.metric(name).better for name in names] == [1, -1, 0, -1]


# --------------------------------------------------------------------------------------------- the journal


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "eval")
    made.create()
    made.announce(1)
    return made


def test_what_was_found_is_there_for_the_next_attempt(run: RunDirectory) -> None:
    first = Journal(run, 1)
    first.add({key("greedy", "2+2="): "4"})
    first.add({key("greedy", "3+3="): ["6", [54]], "b": None})
    run.announce(2)
    second = Journal(run, 2)
    assert second.resumed == 3 and second[key("greedy", "3+3=")] == ["6", [54]] and "b" in second
    assert key("sampled", "2+2=") not in second


def test_a_torn_line_is_asked_again(run: RunDirectory) -> None:
    Journal(run, 1).add({"a": 1, "b": 2})
    path = run.checkpoints / NAME
    path.write_bytes(path.read_bytes()[:-4])
    torn = Journal(run, 1)
    assert torn.known == {"a": 1}
    torn.add({"b": 3})
    assert Journal(run, 1).known == {"a": 1, "b": 3}


def test_an_old_attempt_writes_nothing(run: RunDirectory) -> None:
    old = Journal(run, 1)
    run.announce(2)
    with pytest.raises(Fenced):
        old.add({"a": 1})
    assert Journal(run, 2).known == {}
