"""Mixing and quality: what is drawn from which data set, what is dropped and why, in which order."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Data, Quality
from conf.schema import Dataset as Part
from post_training import data
from post_training.data import mix, quality
from post_training.data.source import DataError, Samples, Source, Split, assistant, features, user
from tests.in_process import own_cache  # noqa: F401  (a fixture)
from tests.records import PUBLISHED, write
from tests.training import Attempt, hold, make_run, weights


class Texts(Source):
    """A data set of these texts."""

    views = ("documents",)

    def __init__(self, texts: list[str], held_out: list[str] = [], categories: list[str | None] | None = None) -> None:  # noqa: B006
        super().__init__(Data("text"))
        self.texts: dict[Split, list[str]] = {"train": texts, "held_out": held_out or ["held out"]}
        self.categories = categories

    def samples(self, view: str, split: Split) -> Samples:
        texts = self.texts[split]
        rows = datasets.Dataset.from_list([{"text": t} for t in texts], features=features("documents"))
        categories = self.categories if self.categories and split == "train" else [None] * len(texts)
        return Samples(rows, categories, len(texts) + 1, Counter({"empty text": 1}))


def mixed(parts: list[tuple[list[str], float]], **changes: Any) -> list[str]:
    made = [mix.Part(f"set{i}", Texts(texts), weight) for i, (texts, weight) in enumerate(parts)]
    return list(mix.Mix(Data("text", **changes), made).documents("train")["text"])


def own(number: int, count: int) -> list[str]:
    return [f"{number} {i}" for i in range(count)]


# ------------------------------------------------------------------------------------------------- mixing

WEIGHTS = st.floats(0.01, 4).map(lambda w: round(w, 2))


@given(count=st.integers(1, 40), weight=WEIGHTS, seed=st.text(max_size=3))
def test_each_sample_comes_as_often_as_the_weight_says(count: int, weight: float, seed: str) -> None:
    indices = list(range(100, 100 + count))
    drawn = Counter(mix.repeat(indices, weight, seed))
    whole, extra = int(weight), round((weight - int(weight)) * count)
    assert sum(drawn.values()) == whole * count + extra
    assert set(drawn) <= set(indices)
    assert all(drawn[i] in (whole, whole + 1) for i in indices)
    assert sum(drawn[i] == whole + 1 for i in indices) == extra % count or extra == count
    assert mix.repeat(indices, weight, seed) == mix.repeat(indices, weight, seed)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5])), min_size=1, max_size=3),
    seed=st.integers(0, 5),
)
def test_a_mix_is_its_parts_in_a_seeded_order(parts: list[tuple[int, float]], seed: int) -> None:
    texts = [(own(number, count), weight) for number, (count, weight) in enumerate(parts)]
    if any(count * weight < 0.5 for count, weight in parts):
        return
    rows = mixed(texts, seed=seed)
    assert rows == mixed(texts, seed=seed)
    for number, (count, weight) in enumerate(parts):
        drawn = Counter(row for row in rows if row.startswith(f"{number} "))
        assert sum(drawn.values()) == int(weight) * count + round((weight % 1) * count)
        assert all(drawn[text] in (int(weight), int(weight) + 1) for text in own(number, count))
    assert mixed(texts, seed=seed, max_samples=5) == rows[:5]


def test_another_seed_is_another_order_and_another_half() -> None:
    parts = [(own(0, 40), 0.5), (own(1, 40), 1.0)]
    first, second = (mixed(parts, seed=seed) for seed in (0, 1))
    assert first != second and set(first) != set(second)
    owners = [row[0] for row in first]
    assert "1" in owners[:10] and "0" in owners[:10], "the sets are shuffled, not one after the other"


def test_one_set_alone_stays_as_it_is() -> None:
    assert mixed([(own(0, 20), 1.0)]) == own(0, 20)


def test_the_mix_as_realised_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    mix.REPORTS.clear()
    rows = mixed([(own(0, 10), 0.5), (own(1, 4), 2.5)], max_samples=12)
    (report,) = mix.REPORTS
    counts = Counter(row[0] for row in rows)
    assert [s["rows"] for s in report["sources"]] == [counts["0"], counts["1"]] and report["rows"] == 12
    assert [s["samples"] for s in report["sources"]] == [10, 4]
    assert report["sources"][0]["dropped"] == {"empty text": 1} and report["sources"][0]["records"] == 11
    said = capsys.readouterr().out
    assert said.startswith(f"data: 12 plain text: set0 {counts['0']} (x 0.5) of 11 records, dropped 1 empty text; ")
    assert str(data.reports_as_json()).count('"view": "documents"') == 1


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    mixed([(own(0, 3), 1.0)])
    assert capsys.readouterr().out == ""


def test_a_weight_that_takes_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.name=set1: weight=0\.1 takes none of its 3 samples\n  fix: "):
        mixed([(own(0, 10), 1.0), (own(1, 3), 0.1)])


def test_a_mix_of_data_sets_from_files(tmp_path: Any) -> None:
    words = ["one", "two", "three", "four", "five", "six"]
    alpaca = [{**PUBLISHED["alpaca"][0], "instruction": f"Say {word}."} for word in words]
    gsm8k = [{**PUBLISHED["gsm8k"][0], "question": f"{i} times 7?"} for i in range(9)]
    parts = [
        Part("arithmetic", weight=0.1),
        Part("alpaca", path=write(tmp_path / "a.jsonl", alpaca), weight=2.0, held_out=1),
        Part("gsm8k", path=write(tmp_path / "g.jsonl", gsm8k)),
    ]
    source = data.load(Data(datasets=parts, held_out=2, num_demonstrations=50))
    asked = [row["messages"][0]["content"] for row in source.demonstrations("train")]
    kinds = Counter("say" if a.startswith("Say") else "times" if "times" in a else "sum" for a in asked)
    assert kinds == {"sum": 5, "say": 10, "times": 7}
    held_out = [row["messages"][0]["content"] for row in source.demonstrations("held_out")]
    assert len(held_out) == 2 + 1 + 2 and not set(held_out) & set(asked)
    # evaluation takes those that have the view; training needs it of all
    assert len(source.problems("held_out")) == 4
    with pytest.raises(DataError, match=r"data\.name=alpaca: has no prompts with answers"):
        source.problems("train")
    with pytest.raises(DataError, match=r"data\.name=alpaca: has no preference pairs"):
        data.load(Data(datasets=[parts[1]])).preferences("held_out")
    # what is held out in a mix is held out from each of its sets alone, too
    alone = data.load(Data("gsm8k", path=parts[2].path, held_out=2)).demonstrations("held_out")
    assert {r["messages"][0]["content"] for r in alone} <= set(held_out)


def test_a_stage_on_a_mix_reports_it_and_is_resumed_exactly(tmp_path: Any) -> None:
    start = Attempt(make_run(tmp_path, "base", "training.max_steps=1", name="start")).finish().model
    records = [{"question": f"{i} times 7?", "answer": f"So.\n#### {7 * i}"} for i in range(20)]
    path = write(tmp_path / "g.jsonl", records + records[:5])
    options = (
        f"data.datasets=[{{name: arithmetic, weight: 0.25}}, {{name: gsm8k, path: {path}, weight: 1.5, held_out: 4}}]",
        "data.quality.dedup=near", "training.max_steps=6", "training.effective_batch_size=8",
        "training.per_device_train_batch_size=4",
    )  # fmt: skip
    calm = Attempt(make_run(tmp_path, "sft", *options, name="calm", model=start)).finish()
    disturbed = hold(make_run(tmp_path, "sft", *options, name="disturbed", model=start))
    first = Attempt(disturbed)
    first.stop_at(5, first.kill)  # in the second pass over the mix; step 4 was saved
    assert first.codes() == [-signal.SIGKILL]
    Attempt(disturbed, 2).finish()
    assert weights(disturbed) == weights(calm)
    reports = [json.loads(run.data_report.read_text()) for run in (calm, disturbed)]
    assert reports[0] == reports[1]
    ((report,),) = reports[:1]
    lost = sum(report["sources"][1]["dropped"].values())
    assert lost >= 1 and report["sources"][1]["samples"] == 21 - lost
    assert report["sources"][0]["rows"] == 12 and report["rows"] == 12 + report["sources"][1]["rows"]


# ------------------------------------------------------------------------------------------------ quality


def reasons(texts: list[str], held_out: list[str] = [], kinds: Any = None, **changes: Any) -> list[str | None]:  # noqa: B006
    rows = [{"text": text} for text in texts]
    kinds = kinds if kinds is not None else [None] * len(rows)
    return list(quality.reasons(rows, kinds, Quality(**changes), [{"text": text} for text in held_out]))


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=3)
SPACED = st.tuples(WORDS, st.sampled_from([" ", "  ", "\n", " \t"])).map(lambda pair: pair[1].join(pair[0]))


@given(texts=st.lists(SPACED, max_size=20), held_out=st.lists(SPACED, max_size=3))
def test_exact_duplicates(texts: list[str], held_out: list[str]) -> None:
    """Against a list that is searched from its start."""
    expected: list[str | None] = []
    before: list[str] = []
    for text in texts:
        same = " ".join(text.split())
        if same in [" ".join(h.split()) for h in held_out]:
            expected.append("exact duplicate of a held-out sample")
        elif same in before:
            expected.append("exact duplicate")
        else:
            expected.append(None)
            before.append(same)
    assert reasons(texts, held_out, dedup="exact") == expected


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=9), max_size=12),
    low=st.none() | st.integers(0, 9), high=st.none() | st.integers(1, 9), cap=st.none() | st.integers(1, 4),
    kinds=st.data(),
)  # fmt: skip
def test_lengths_and_balance(texts: list[str], low: int | None, high: int | None, cap: int | None, kinds: Any) -> None:
    of = kinds.draw(st.lists(st.sampled_from("xyz"), min_size=len(texts), max_size=len(texts)))
    found = reasons(texts, kinds=of, min_chars=low, max_chars=high, max_per_category=cap)
    right = [(low is None or len(t) >= low) and (high is None or len(t) <= high) for t in texts]
    kept = Counter()
    for text, kind, reason, fits in zip(texts, of, found, right, strict=True):
        if not fits:
            short = low is not None and len(text) < low
            assert reason == f"{'shorter' if short else 'longer'} than data.quality.{'min' if short else 'max'}_chars"
        else:
            assert (reason is None) == (cap is None or kept[kind] < cap)
            kept[kind] += reason is None
    assert found == reasons(texts, kinds=of, min_chars=low, max_chars=high, max_per_category=cap)


def test_what_is_measured() -> None:
    pair = {"prompt": [user("12345")], "chosen": [assistant("123")], "rejected": [assistant("1")]}
    chat = {"messages": [user("12345"), assistant("123"), user("1"), assistant("12")]}
    problem = {"prompt": [user("12345")], "answer": "1"}
    rows = [pair, chat, problem, {"text": "1234"}]
    assert [quality.answer_chars(row) for row in rows] == [1, 2, 5, 4]
    assert [quality.whole_chars(row) for row in rows] == [8, 11, 6, 4]


def essay(rng: random.Random, length: int) -> list[str]:
    return [f"{rng.choice(['rain', 'sun', 'snow', 'wind', 'fog'])}{rng.randrange(99)}" for _ in range(length)]


def jaccard(a: list[str], b: list[str]) -> float:
    left, right = quality.shingles(a), quality.shingles(b)
    return len(left & right) / len(left | right)


def test_near_duplicates_are_those_with_a_high_jaccard_similarity() -> None:
    """Against the similarity itself; MinHash estimates it within a few hundredths."""
    rng = random.Random(5)
    texts, expected = [], []
    for _ in range(60):
        words = essay(rng, 120)
        other = list(words)
        changed = rng.choice([1, 1, 8])
        for place in rng.sample(range(120), changed):
            other[place] = "changed"
        similar = jaccard(words, other)
        assert not 0.7 < similar < 0.9, "too near the threshold for an estimate"
        texts += [" ".join(words), " ".join(other).upper()]
        expected += [None, "near duplicate" if similar > 0.8 else None]
    assert expected.count("near duplicate") > 20 and expected.count(None) > 70
    assert reasons(texts, dedup="near") == expected
    assert reasons(texts, dedup="near") == reasons(texts, dedup="near")
    assert reasons(texts, dedup="exact") == [None] * 120
    assert reasons(texts[1::2], texts[::2], dedup="near") == [
        reason and f"{reason} of a held-out sample" for reason in expected[1::2]
    ]


def test_short_texts_are_compared_whole() -> None:
    assert quality.shingles(["A", "b", "c"]) == {"a b c"}
    assert reasons(["2+2?", "2+3?", "2+2?", "2+2 ?"], dedup="near") == [None, None, "exact duplicate", None]


def test_filters_in_a_mix_come_before_the_weights() -> None:
    mix.REPORTS.clear()
    parts = [(["same", "a", "same"], 2.0), (["same", "b", "held out"], 1.0)]
    rows = mixed(parts, quality=Quality(dedup="exact"))
    assert sorted(rows) == ["a", "a", "b", "same", "same"]
    assert [s["dropped"] for s in mix.REPORTS[0]["sources"]] == [
        {"empty text": 1, "exact duplicate": 1},
        {"empty text": 1, "exact duplicate": 1, "exact duplicate of a held-out sample": 1},
    ]


def test_balance_is_of_each_category_of_each_set() -> None:
    sets = [Texts(own(0, 6), categories=["x", "x", "x", "y", "y", None]), Texts(own(1, 3), categories=["x"] * 3)]
    parts = [mix.Part(f"set{i}", source, 1.0) for i, source in enumerate(sets)]
    rows = mix.Mix(Data("text", quality=Quality(max_per_category=2)), parts).documents("train")["text"]
    assert sorted(rows) == ["0 0", "0 1", "0 3", "0 4", "0 5", "1 0", "1 1"]


def test_categories_come_from_the_records(tmp_path: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{**PUBLISHED["dolly"][i % 2], "instruction": f"q{i}"} for i in range(12)])
    cfg = Data("dolly", path=path, eval_path=path, quality=Quality(max_per_category=2))
    said = Counter(row["messages"][1]["content"] for row in data.load(cfg).demonstrations("train"))
    assert said == {"In 1969.": 2, "Ada.": 2}


def test_nothing_left_is_refused_with_the_reasons() -> None:
    with pytest.raises(DataError) as caught:
        mixed([(own(0, 3), 1.0)], quality=Quality(max_chars=1))
    words = "no plain text are left of 4 records; dropped: 3 longer than data.quality.max_chars, 1 empty text\n  fix: "
    assert words in str(caught.value)
