"""stage=prepare: what it puts there is what the stages after it look for, and it leaves when it is asked."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.check import ConfigError
from launchers.compose import rewrite
from launchers.selection import select
from launchers.submission import Plan, make_plan
from post_training import train
from post_training.data import assistant, mix, prepared, user
from post_training.data.prepared import folder_of, preparation_of
from post_training.data.tokenizer import bytes_tokenizer, load_tokenizer
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.stages.common import build_model, load_config
from tests.in_process import here  # noqa: F401  (a fixture)
from tests.records import write
from tests.training import TINY, make_config, make_run

PREPARED = ("base", "sft", "rm", "dpo")


def plan(folder: Path, *overrides: str) -> Plan:
    common = [o for o in TINY if not o.startswith(("cluster.", "slurm."))]
    tokens = ["pipeline=prepared", "cluster=local", f"paths.output_base={folder}", *common, *overrides]
    return make_plan(select([rewrite(token) for token in tokens], only_one=False), ask=False)


def begin(planned: Any) -> RunDirectory:
    """Its run directory, as submission leaves it, with the first attempt begun."""
    run: RunDirectory = planned.run
    run.root.mkdir(parents=True, exist_ok=True)
    run.create()
    run.config.write_text(yaml.safe_dump(planned.frozen))
    ledger.append(run.ledger, "attempt_started", attempt=1, job_id="1", node="here")
    return run


@pytest.fixture(autouse=True)
def handlers() -> Any:
    """What an attempt does to this process's signals is undone."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.max_steps=2",),
        ("training.max_steps=2", "data.system_prompt=Hi", "model.chat_template=chatml", "sft.packing=true",
         "dpo.model.chat_template=llama3", "sft.random_templates=[tulu3]",
         "model.max_position_embeddings=512", "training.max_length=512", "rm.training.max_length=300"),
    ],
    ids=["plain", "with everything"],
)  # fmt: skip
def test_stages_find_what_was_prepared(overrides: tuple[str, ...], tmp_path: Path) -> None:
    made = plan(tmp_path, *overrides)
    assert all("prepare" in made.stages[name].after for name in PREPARED)
    run = begin(made.stages["prepare"])
    assert train.run_attempt(run, 1) == 0
    assert manifest.problem(run.model) is None
    report = json.loads((run.model / "prepared.json").read_text())["stages"]
    assert set(report) == set(PREPARED)

    start = None  # as training does it: each stage saves its tokenizer with its model
    for name in PREPARED:
        if name in ("rm", "dpo"):
            start = str(tmp_path / "tokenizer-sft")
        cfg = load_config(made.stages[name].frozen)
        tokenizer = load_tokenizer(cfg.model, start, cfg.data.system_prompt)
        folder = folder_of(cfg, tokenizer, preparation_of(cfg), tmp_path)
        assert report[name] == {"folder": str(folder), "rows": len(prepared.load(folder, hashes=True)[0] or [])}, name
        tokenizer.save_pretrained(tmp_path / f"tokenizer-{name}")
        start = str(tmp_path / f"tokenizer-{name}")


@pytest.mark.usefixtures("here")
def test_what_became_of_the_records_is_told_by_both_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preparing one and the one that finds its rows prepared, as by one that prepares for itself."""
    cfg, start = load_config(make_config("base")), tmp_path / "start"
    build_model(cfg, bytes_tokenizer()).save_pretrained(start)
    bytes_tokenizer().save_pretrained(start)
    same = [{"messages": [user(f"{i // 2}?"), assistant("yes")]} for i in range(40)]
    path = write(tmp_path / "twice.jsonl", same)
    records = ("data.name=custom", f"data.path={path}", "data.quality.dedup=exact", "data.held_out=2")
    wanted = [f"sft.{override}" for override in records]
    told = []
    for name in ("prepare", "after it", "by itself"):
        monkeypatch.setattr(mix, "REPORTS", [])  # each is a process of its own
        if name == "prepare":
            run = begin(plan(tmp_path / "both", "training.max_steps=1", "prepare.stages=[sft]", *wanted).stages[name])
        else:
            base = tmp_path / ("both" if name == "after it" else "alone")
            run = make_run(base / name, "sft", "training.max_steps=1", *records, model=start)
        assert train.run_attempt(run, 1) == 0
        assert ("rows from" in capsys.readouterr().err) == (name == "after it")
        told.append(json.loads(run.data_report.read_text()))
    assert told[0] == told[1] == told[2]
    ((source,),) = (report["sources"] for report in told[0])
    assert source["records"] == 38 and sum(source["dropped"].values()) >= 18


def test_it_asks_for_no_gpu(tmp_path: Path) -> None:
    tokens = ["pipeline=prepared", "cluster=h100", f"paths.output_base={tmp_path}"]
    frozen = make_plan(select(tokens, only_one=False), ask=False).stages["prepare"].frozen
    assert (frozen["slurm"]["num_nodes"], frozen["slurm"]["gpus_per_node"]) == (1, 0)


def test_its_identity_is_of_what_shapes_the_rows(tmp_path: Path) -> None:
    def identity(*overrides: str) -> str:
        return str(plan(tmp_path, "training.max_steps=2", *overrides).stages["prepare"].frozen["identity"])

    first = identity()
    assert identity("sft.lr=1", "sft.training.max_steps=9", "seed=0") == first
    assert identity("sft.training.max_length=32") != first
    assert identity("sft.packing=true") != first
    assert identity("prepare.prepare.stages=[sft]") != first


def test_stages_that_cannot_be_prepared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.stages=grpo: no stage whose data can be prepared"):
        plan(tmp_path, "training.max_steps=2", "prepare.stages=[grpo]")
    with pytest.raises(ConfigError, match=r"prepares data and has no model"):
        plan(tmp_path, "training.max_steps=2", "pipeline.stages.sft.model=prepare")


@pytest.mark.parametrize("how", ["SIGTERM", "stop request"])
def test_it_leaves_in_the_middle_when_asked(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(plan(tmp_path, "training.max_steps=2", "prepare.stages=[base,sft]").stages["prepare"])
    made = prepared.make

    def make(cfg: Any, *args: Any) -> Any:
        if cfg.stage == "sft":
            os.kill(os.getpid(), signal.SIGTERM) if how == "SIGTERM" else run.request_stop(1)
            signal.pause()  # until the signal comes
        return made(cfg, *args)

    monkeypatch.setattr(prepared, "make", make)
    assert train.run_attempt(run, 1) == life.STOPPED
    assert not run.model.exists() and [e["event"] for e in ledger.read(run.ledger)][-1] == "stopped"
    kept = list((tmp_path / prepared.FOLDER).iterdir())
    assert len(kept) == 1 and manifest.problem(kept[0]) is None, "what was done stays"
