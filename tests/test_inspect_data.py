"""inspect_data: what it shows is what is trained, and its figures are those of the tokens counted by hand."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from post_training import inspect_data
from post_training.data.tokenizer import bytes_tokenizer

SMALL = ("data.num_demonstrations=30", "data.num_pairs=20", "data.num_documents=20", "data.num_prompts=20")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` caches stays out of the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def inspected(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: str) -> dict[str, Any]:
    assert inspect_data.main(["--json", *argv, *SMALL, f"paths.output_base={tmp_path}"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_figures_are_those_counted_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    longest = 24
    found = inspected(capsys, tmp_path, "stage=sft", f"training.max_length={longest}", "--samples", "30")
    tokenizer = bytes_tokenizer()
    lengths, trained, kept = [], 0, 0
    for sample in found["samples"]:
        user, assistant = sample["record"]["messages"]
        asked, said = (len(tokenizer(m["content"])["input_ids"]) for m in (user, assistant))
        lengths.append(1 + asked + 1 + said + 1)
        kept += min(lengths[-1], longest)
        trained += min(lengths[-1], longest) - (1 + asked + 1)
    ordered, figures = sorted(lengths), found["figures"]
    assert len(lengths) == found["records"] == found["looked_at"] == 30
    assert figures["tokens"] == sum(lengths) and figures["mean"] == sum(lengths) / 30
    assert [figures[k] for k in ("min", "p5", "p50", "p95", "max")] == [ordered[i] for i in (0, 1, 14, 28, 29)]
    assert figures["too_long"] == sum(n > longest for n in lengths) / 30 and 0 < figures["too_long"] < 1
    assert figures["trained"] == trained / kept
    order = list(range(30))
    random.Random(0).shuffle(order)
    cut = [min(lengths[i], longest) for i in order]
    batches = [cut[n : n + 8] for n in range(0, 30, 8)]
    assert figures["padding"] == pytest.approx(1 - sum(cut) / sum(max(b) * len(b) for b in batches))
    assert found["packing"]["efficiency"] <= 1 and found["packing"]["rows"] * longest >= sum(cut)
    assert not found["packing"]["on"]
    assert [source["name"] for source in found["mix"][0]["sources"]] == ["arithmetic"]


def test_packing_is_as_the_stage_packs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from conf.schema import Config
    from post_training.data import prepared
    from post_training.stages.common import load_config
    from tests.training import make_config

    overrides = ("sft.packing=true", "training.max_length=96")
    found = inspected(capsys, tmp_path, "stage=sft", *overrides)
    cfg: Config = load_config(make_config("sft", *overrides, *SMALL, "data.held_out=1024"))
    rows = prepared.make(cfg, bytes_tokenizer(), prepared.preparation_of(cfg))
    tokens = sum(map(len, rows["input_ids"]))
    assert found["packing"] == {
        "on": True, "rows": len(rows), "samples": 30, "efficiency": tokens / (96 * len(rows)),
    }  # fmt: skip


def test_samples_after_each_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = inspected(capsys, tmp_path, "stage=sft", "data.system_prompt=Be kind.", "model.chat_template=chatml")
    for sample in found["samples"]:
        user, assistant = sample["record"]["messages"]
        assert [m["content"] for m in sample["messages"]] == ["Be kind.", user["content"], assistant["content"]]
        before, said, after = sample["rendered"]["text"]
        start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        assert before == [f"{start}{user['content']}<|im_end|>\n<|im_start|>assistant\n", False]
        assert said == [f"{assistant['content']}<|im_end|>", True] and after == ["\n", False]
        tokens = sample["tokens"]["text"]
        assert "".join(t["text"] for t in tokens) == before[0] + said[0] + after[0]
        assert "".join(t["text"] for t in tokens if t["trained"]) == said[0]


@pytest.mark.parametrize(
    ("stage", "texts", "trains"),
    [
        ("base", ["text"], True),
        ("rm", ["chosen", "rejected"], True),
        ("dpo", ["chosen", "rejected"], True),
        ("orpo", ["chosen", "rejected"], False),
        ("kto", ["completion"], False),
        ("grpo", ["prompt"], False),
    ],
)
def test_every_kind_of_stage(
    stage: str, texts: list[str], trains: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = inspected(capsys, tmp_path, f"stage={stage}", "--samples", "2")
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        assert list(sample["rendered"]) == texts
    assert (found["figures"]["trained"] is not None) == trains


def test_words_with_and_without_colour(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["stage=sft", "--samples=1", *SMALL, f"paths.output_base={tmp_path}", "training.max_length=20"]
    assert inspect_data.main(argv) == 0
    plain = capsys.readouterr().out
    assert re.search(r"<\|assistant\|>\[\[<think>.*</answer><\|end\|>\]\]", plain) and "\033" not in plain
    for figure in ("p95 ", "of samples, cut", "trained: ", "padding: ", "packing (off) would make: 30 samples in"):
        assert figure in plain
    assert "data: 30 demonstrations: arithmetic 30 of 30 records" in plain
    found = inspected(capsys, tmp_path, "stage=sft")
    coloured = inspect_data.in_words(found, colour=True)
    assert "<|assistant|>\033[32m<think>" in coloured and "[[<think>" not in coloured


def test_some_of_many_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = inspected(capsys, tmp_path, "stage=sft", "--limit", "7")
    assert (found["records"], found["looked_at"], found["packing"]["samples"]) == (30, 7, 7)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["stage=sft", "traning.max_length=3"], "error: traning.max_length=3: no such key"),
        (["stage=merge", "merge.adapter=."], "error: stage=merge: reads no samples itself"),
        (["stage=sft", "data=gsm8k", "data.path={}/none.jsonl"], "none.jsonl: no such file"),
        (["stage=sft", "model.chat_template={}/bad.jinja"], "has no {% generation %} marks"),
    ],
)
def test_what_is_wrong_is_said(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert inspect_data.main([*(a.format(tmp_path) for a in argv), f"paths.output_base={tmp_path}"]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "fix:" in shown.err and shown.out == ""
