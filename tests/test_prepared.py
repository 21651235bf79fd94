"""Prepared data: TRL's own rows, made once, found by what determines them, and made again where they are damaged."""

from __future__ import annotations

import copy
import importlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from conf.schema import Config
from post_training import data
from post_training.data import prepared
from post_training.data.prepared import digest, fingerprint, folder_of, kept, preparation_of, recipe
from post_training.data.source import DataError, Samples, Source, Split
from post_training.data.tokenizer import bytes_tokenizer, load_tokenizer
from post_training.stages.common import build_model, load_config
from tests.in_process import own_cache  # noqa: F401  (a fixture)
from tests.training import make_config

CASES = {
    "base": ("base",),
    "sft": ("sft",),
    "sft, cut": ("sft", "training.max_length=22"),
    "sft, packed": ("sft", "sft.packing=true"),
    "rm": ("rm",),
    "rm, left out": ("rm", "training.max_length=28"),
    "dpo": ("dpo",),
}


def config(stage: str, *overrides: str) -> Config:
    return load_config(make_config(stage, *overrides))


def rows_of(cfg: Config, base: Path, **options: Any) -> Dataset:
    """What a stage's trainer would be given."""
    tokenizer = load_tokenizer(cfg.model, None, cfg.data.system_prompt)
    how = preparation_of(cfg)
    return kept(folder_of(cfg, tokenizer, how, base), cfg, tokenizer, how, **options)


def folders(base: Path) -> list[Path]:
    return sorted((base / prepared.FOLDER).iterdir())


def content(rows: Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_trls_trainer(case: str, tmp_path: Path) -> None:
    cfg = config(*CASES[case])
    how = preparation_of(cfg)
    tokenizer = bytes_tokenizer()
    model: Any = build_model(cfg, tokenizer)
    if cfg.stage == "rm":
        from transformers import LlamaForSequenceClassification

        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    args = how.config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **how.arguments)
    records = getattr(data.load(cfg.data), how.form)("train")
    more = {"ref_model": copy.deepcopy(model)} if cfg.stage == "dpo" else {}
    plain = how.trainer(model=model, args=args, train_dataset=records, processing_class=tokenizer, **more).train_dataset
    ours = rows_of(cfg, tmp_path, num_proc=2)
    assert set(ours.column_names) == set(prepared.COLUMNS) & set(plain.column_names)
    assert content(ours) == content(plain.select_columns(ours.column_names))
    if "left out" in case:
        assert 0 < len(ours) < len(records)
    if "cut" in case:
        assert max(map(len, ours["input_ids"])) == 22
    if "packed" in case:
        assert max(map(len, ours["seq_lengths"])) > 1

    stage = importlib.import_module(f"post_training.stages.{cfg.stage}")
    taken = next(value for name, value in vars(stage).items() if name.endswith("Trainer") and name != "Trainer")
    given = stage.Prepared._prepare_dataset(object.__new__(taken), ours, tokenizer, args)
    assert given is ours, "our trainer takes them as they are"


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = rows_of(config("sft"), tmp_path)
    assert "rows made in" in capsys.readouterr().err
    monkeypatch.setattr(data, "load", lambda cfg: pytest.fail("records were read again"))
    second = rows_of(config("sft", "sft.lr=1", "training.max_steps=5", "seed=3"), tmp_path)
    assert content(first) == content(second)
    assert f"{len(first)} rows from {folders(tmp_path)[0]}" in capsys.readouterr().err
    assert len(folders(tmp_path)) == 1


def key(*overrides: str, stage: str = "sft") -> str:
    cfg = config(stage, *overrides)
    tokenizer = load_tokenizer(cfg.model, None, cfg.data.system_prompt)
    return digest(recipe(cfg, tokenizer, preparation_of(cfg)))


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.max_length=63",),
        ("sft.packing=true",),
        ("data.seed=1",),
        ("data.max_samples=3",),
        ("data.system_prompt=Hi",),
        ("model.chat_template=chatml",),
        ("sft.random_templates=[chatml]",),
    ],
)
def test_whatever_determines_the_rows_is_in_the_key(overrides: tuple[str, ...]) -> None:
    assert key(*overrides) != key()


def test_stages_and_seeds_have_keys_of_their_own() -> None:
    assert len({key(stage=stage) for stage in ("base", "sft", "rm", "dpo")}) == 4
    assert key("seed=1") == key("seed=2")
    drawn = "sft.random_templates=[chatml]"
    assert key(drawn, "seed=1") != key(drawn, "seed=2")


def test_records_count_by_their_content_wherever_they_are(tmp_path: Path) -> None:
    def of(name: str, text: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "records.jsonl").write_text(text)
        return key("data.name=gsm8k", f"data.path={tmp_path}/{name}/records.jsonl")

    assert of("here", "a") == of("there", "a") != of("there", "b")
    transform = tmp_path / "mine.py"
    transform.write_text("one")
    before = prepared._by_content([f"{transform}:f", f"{transform}:g", "openai/gsm8k"])
    transform.write_text("two")
    after = prepared._by_content([f"{transform}:f", f"{transform}:g", "openai/gsm8k"])
    assert before[0] != before[1] and before[0] != after[0] and before[2] == after[2] == "openai/gsm8k"


def test_code_of_the_preparation_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    (tmp_path / "prepared.py").write_text("other code")
    monkeypatch.setattr(prepared, "__file__", str(tmp_path / "prepared.py"))
    assert key() != before


@pytest.mark.parametrize("name", ["think_answer", "qwen3"])
def test_a_saved_tokenizer_is_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    """The base stage's output has the tokenizer that `stage=prepare` made anew."""
    new = load_tokenizer(replace(Config().model, chat_template=name), None)
    new.save_pretrained(tmp_path)
    read = load_tokenizer(Config().model, str(tmp_path))
    read(["a", "bc"], padding=True)  # leaves its mark in the backend
    assert fingerprint(read) == fingerprint(new)
    read.add_tokens(["<more>"])
    assert fingerprint(read) != fingerprint(new)


def flip(folder: Path) -> None:
    path = next(folder.glob("*.arrow"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut": lambda folder: next(folder.glob("*.arrow")).write_bytes(b""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no file": lambda folder: next(folder.glob("*.arrow")).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_made_again(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(rows_of(config("dpo"), tmp_path))
    DAMAGE[damage](folders(tmp_path)[0])
    assert content(rows_of(config("dpo"), tmp_path)) == before
    said = capsys.readouterr().err
    assert "cannot be used (" in said and "made again" in said
    assert content(rows_of(config("dpo"), tmp_path)) == before
    assert len(folders(tmp_path)) == 1 and "rows from" in capsys.readouterr().err


def test_two_jobs_prepare_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, both = prepared.make, threading.Barrier(2)

    def make(*args: Any) -> Dataset:
        both.wait(60)  # neither found anything
        return made(*args)

    monkeypatch.setattr(prepared, "_alone", prepared.contextlib.nullcontext)  # it is one process here
    monkeypatch.setattr(prepared, "make", make)
    results: list[Any] = []
    jobs = [threading.Thread(target=lambda: results.append(rows_of(config("rm"), tmp_path))) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(results) == 2 and content(results[0]) == content(results[1])
    assert len(folders(tmp_path)) == 1 and prepared.manifest.problem(folders(tmp_path)[0], hashes=True) is None


def test_what_cannot_be_kept_is_used_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / prepared.FOLDER).write_text("in the way")
    assert len(rows_of(config("sft"), tmp_path)) == 48
    assert "cannot be kept" in capsys.readouterr().err


def test_what_a_killed_job_left_goes_when_it_is_old(tmp_path: Path) -> None:
    import os

    rows_of(config("sft"), tmp_path)
    folder = folders(tmp_path)[0]
    old, young = (folder.with_name(f"{folder.name}.partial-{age}") for age in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    flip(folder)
    rows_of(config("sft"), tmp_path)
    assert not old.exists() and young.exists()


def test_several_formats_are_in_the_rows(tmp_path: Path) -> None:
    cfg = config("sft", "sft.random_templates=[chatml,alpaca]", "training.max_length=512")
    tokenizer = bytes_tokenizer()
    rows = rows_of(cfg, tmp_path)
    texts = [tokenizer.decode(ids) for ids in rows["input_ids"]]
    kinds = [
        "chatml" if "<|im_start|>" in text else "alpaca" if "### Instruction" in text else "own" for text in texts
    ]
    assert min(map(kinds.count, ("chatml", "alpaca", "own"))) > 5
    for row in rows:
        trained = [i for i in row["labels"] if i != -100]
        text = tokenizer.decode(trained)
        assert text.startswith("<think>") and "=?" not in text.partition("</think>")[2]
        assert tokenizer.eos_token_id in trained


# ------------------------------------------------------------------------------------------ what is refused


class Given(Source):
    """Demonstrations as they are written in a test."""

    def __init__(self, talks: list[list[dict[str, str]]]) -> None:
        self.talks = talks

    def samples(self, view: str, split: Split) -> Samples:
        return Samples(Dataset.from_dict({"messages": self.talks}), [None] * len(self.talks), len(self.talks))


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("talks", "said"),
    [
        (
            [[turn("user", "a"), turn("assistant", "b")], [turn("user", "who answers?")]],
            "record 1: has nothing to train, no assistant says anything in '<|user|>who answers?'",
        ),
        ([[turn("user", "a" * 99), turn("assistant", "b")]], "training.max_length=64: all 1 records are longer"),
        ([], "no records are left"),
    ],
)
def test_records_that_train_nothing_are_refused(
    talks: list[list[dict[str, str]]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda cfg: Given(talks))
    with pytest.raises(DataError) as error:
        rows_of(config("sft"), tmp_path)
    assert said in str(error.value) and "\n  fix: " in str(error.value)
    assert not (tmp_path / prepared.FOLDER).exists(), "nothing half-made is left"


def test_manifest_says_what_the_rows_are_made_of(tmp_path: Path) -> None:
    rows_of(config("sft"), tmp_path)
    about = json.loads((folders(tmp_path)[0] / "manifest.json").read_text())
    assert about["rows"] == 48 and about["recipe"]["arguments"]["max_length"] == 64
    assert digest(about["recipe"]) == folders(tmp_path)[0].name
