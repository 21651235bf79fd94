"""Real records through every stage that can take them: GSM8K, HH-RLHF, the seed tasks of Alpaca."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TECHNIQUES
from post_training.run import manifest, results
from post_training.run.directory import RunDirectory
from tests.shim import python_without_imports
from tests.slurm_fixture import short_folder
from tests.test_data_sets import SEED_TASKS
from tests.training import ROOT, metrics, real_data, weights

STEPS = {"base": 8, "sft": 8}  # others: 3
TRAINED = ("base", "sft", "distill", "rm", "ppo", "dpo", "orpo", "kto", "grpo", "rloo", "best")
ON_PAIRS = ("rm", "dpo", "orpo", "kto")


@dataclass
class Records:
    """pipeline=records, done. `command` runs another command as it was run."""

    folder: Path
    python: Path

    def run(self, stage: str, pipeline: str = "records") -> RunDirectory:
        return RunDirectory(self.folder / pipeline / stage)

    def command(self, module: str, *tokens: str) -> None:
        argv = [sys.executable, "-m", module, "cluster=local", f"cluster.python={self.python}", *tokens]
        argv.append(f"paths.output_base={self.folder}")
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    data = real_data("gsm8k").parent
    assert real_data("hh_rlhf").parent == data
    short = short_folder()
    try:
        with python_without_imports(short) as python:
            made = Records(tmp_path_factory.mktemp("records"), python)
            steps = [f"{stage}.training.max_steps={count}" for stage, count in STEPS.items()]
            made.command(
                "launchers.pipeline", "pipeline=records", f"paths.data={data}", "training.max_steps=3", *steps,
                "logging.steps=1", "eval.num_problems=16", "eval.max_new_tokens=16", "eval_rm.eval.num_problems=64",
                f"distill.data.path={data}/gsm8k/test.jsonl", "distill.data.eval_path=null",
                "training.effective_batch_size=4", "grpo.num_generations=4", "rloo.num_generations=4",
                "sample.num_prompts=6",
                "grpo.reward.random=1", "rloo.reward.random=1",  # no answer is right, and equal rewards teach nothing
            )  # fmt: skip
            yield made
    finally:
        shutil.rmtree(short, ignore_errors=True)


def graph(records: Records) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((records.folder / "records" / "pipeline.json").read_text())["stages"]
    return stages


def said(run: RunDirectory) -> str:
    return "".join(path.read_text() for path in run.slurm.glob("slurm-*"))


def test_every_stage_takes_real_records(records: Records) -> None:
    stages = graph(records)
    assert {entry["stage"] for entry in stages.values()} == set(TECHNIQUES) - {"merge"}, "merge takes no records"
    for name, entry in stages.items():
        run = records.run(name)
        assert manifest.problem(run.model) is None, said(run)
        data = run.read_config()["data"]
        if entry["stage"] != "prepare":
            assert data["name"] == ("hh_rlhf" if name in (*ON_PAIRS, "eval_rm") else "gsm8k")
            assert Path(data["path"]).is_relative_to(real_data("gsm8k").parent)


@pytest.mark.parametrize("stage", TRAINED)
def test_it_trains(records: Records, stage: str) -> None:
    run = records.run(stage)
    lines = metrics(run)
    assert lines[-1]["step"] == STEPS.get(stage, 3)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS.get(stage, 3) and all(map(math.isfinite, losses))
    assert any(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)
    if stage in STEPS:
        assert losses[-1] < losses[0]
    if stage != "base":
        start = Path(run.read_config()["inputs"]["model"]["run_dir"])
        assert weights(run) != weights(RunDirectory(start))
    if stage in ON_PAIRS:
        held_out = json.loads(run.held_out.read_text())
        assert held_out["rows"] % 4 == 0 and math.isfinite(held_out["margin" if stage == "rm" else "rewards/margins"])


def test_a_reward_model_is_judged_on_held_out_pairs(records: Records) -> None:
    judged = results.read(records.run("eval_rm"))
    assert (judged.headline, judged.score.count) == ("preference_accuracy", 64)


def test_prepared_rows_are_those_of_the_files(records: Records) -> None:
    made = json.loads((records.run("prepare").model / "prepared.json").read_text())["stages"]
    assert made["base"]["rows"] == 7473
    assert 7300 < made["sft"]["rows"] < 7473, "a question that fills max_length leaves no room for an answer"
    assert 1000 < made["rm"]["rows"] < made["dpo"]["rows"] < 2312 - 64, "rm: all of both texts must fit"
    assert all(Path(entry["folder"]).parent == records.folder / ".prepared" for entry in made.values())
    for name in ("sft", "rm", "dpo"):
        (report,) = json.loads(records.run(name).data_report.read_text())
        assert report["too_long"] == report["rows"] - made[name]["rows"]


def test_distill_takes_whole_traces_alone(records: Records) -> None:
    (line,) = [line for line in said(records.run("distill")).splitlines() if line.startswith("distill: ")]
    assert f" of {1319 - 64} traces" in line and "longer than training.max_length=512" in line


def test_samples_are_answers_to_real_questions(records: Records) -> None:
    sample = records.run("sample")
    report = json.loads((sample.model / "results.json").read_text())
    kept = [json.loads(line) for line in (sample.model / "records.jsonl").read_text().splitlines()]
    questions = {json.loads(line)["question"] for line in (real_data("gsm8k") / "train.jsonl").read_text().splitlines()}
    assert report["prompts"] == 6 and 0 < len(kept) == report["kept"] <= 6
    assert all(record["messages"][0]["content"] in questions for record in kept)
    assert records.run("best").read_config()["inputs"]["data"]["run_dir"] == str(sample.root)


def test_seed_tasks_by_a_transform_of_ones_own_under_lora_and_merged(records: Records, tmp_path: Path) -> None:
    """A data set that the package does not know trains an adapter; the merge stage makes the same model from it."""
    path = real_data("self_instruct") / "seed_tasks.jsonl"
    (tmp_path / "mine.py").write_text(SEED_TASKS)
    start = records.run("base").model
    common = ["run_name=seeds", f"inputs.model={start}"]
    records.command(
        "launchers.submit", "stage=sft", *common, "data=custom", f"data.path={path}", "data.eval_path=null",
        "data.held_out=16", f"data.transform_file={tmp_path}/mine.py", "data.transform=seed_tasks", "lora.r=4",
        "training.max_steps=3", "training.effective_batch_size=8", "training.per_device_train_batch_size=4",
        "training.max_length=512", "logging.steps=1",
    )  # fmt: skip
    adapted = records.run("sft", "seeds")
    (source,) = json.loads(adapted.data_report.read_text())[0]["sources"]
    assert source["records"] == 175 - 16 and source["dropped"]["a classification"] > 0
    assert len([line for line in metrics(adapted) if "loss" in line]) == 3
    records.command("launchers.submit", "stage=merge", *common, f"merge.adapter={adapted.model / 'adapter'}")
    assert weights(records.run("merge", "seeds")) == weights(adapted) != weights(records.run("base"))
