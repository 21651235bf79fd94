"""Data and models that stages cannot use, where it shows only in the job: exit status 2, words, nothing half-made.

Records, transforms and templates that cannot be used are in test_data_sets, test_data, test_templates and
test_prepared, reward functions in test_rewards and test_rl, adapters for another model in test_sft.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from conf.check import ConfigError
from launchers.selection import select
from post_training import train
from post_training.data.tokenizer import bytes_tokenizer
from post_training.run import manifest
from tests.in_process import here, own_cache, refused  # noqa: F401  (fixtures)
from tests.records import write
from tests.training import make_run

pytestmark = pytest.mark.usefixtures("here")
SHORT = ("training.max_steps=1", "data.name=custom", "data.held_out=4")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("bad"), "base", "training.max_steps=1", name="start")
    assert train.run_attempt(run, 1) == 0
    return run.model


def pair(question: str) -> dict[str, str]:
    return {"prompt": question, "chosen": "yes, it is", "rejected": "no"}


@pytest.mark.parametrize("stage", ["orpo", "kto"])
def test_prompts_that_leave_no_room_for_an_answer(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """rm, dpo and sft take prepared rows: see test_prepared; where some fit, test_rl."""
    path = write(tmp_path / "long.jsonl", [pair(f"{i} " + "a" * 99) for i in range(16)])
    run = make_run(tmp_path, stage, *SHORT, f"data.path={path}", model=start)
    said = refused(capsys, run)
    assert "training.max_length=64" in said and "  fix: a longer" in said
    assert "training.max_length" in run.error(1).read_text()


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_fewer_prompts_than_one_generation_asks(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    path = write(tmp_path / "few.jsonl", [{"prompt": f"{i}+1=?", "answer": f"{i + 1}"} for i in range(5)])
    said = refused(capsys, make_run(tmp_path, stage, *SHORT, f"data.path={path}", model=start))
    assert "1 prompts" in said and "training.effective_batch_size" in said


@pytest.mark.parametrize(
    ("stage", "longer", "fix"),
    [
        ("sft", "training.max_length=41", "training.max_length=40"),
        ("rm", "training.max_length=41", "training.max_length=40"),
        ("ppo", "ppo.max_completion_length=40", "ppo.max_completion_length=20"),
    ],
)
def test_rows_longer_than_learned_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, longer: str, fix: str
) -> None:
    """At submission where the model's numbers are known, else in the job."""
    folder = tmp_path / "gpt2"
    bytes_tokenizer().save_pretrained(folder)
    about = {"vocab_size": 265, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
    GPT2LMHeadModel(GPT2Config(**about)).save_pretrained(folder)
    said = refused(capsys, make_run(tmp_path, stage, "training.max_steps=1", longer, model=folder))
    assert f"{longer}: {folder} has positions for 40 tokens" in said and f"fix: {fix}" in said
    tokens = ["cluster=local", "pipeline=full", f"stage={stage}", f"inputs.model={folder}", longer,
              "ppo.reward_model_weight=0"]  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{longer}: the model has positions for 40 tokens(.|\n)*fix: {fix}"):
        select(tokens, only_one=True)


@pytest.mark.parametrize("stage", ["sft", "eval"])
def test_a_tokenizer_without_an_end(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    folder = shutil.copytree(start, tmp_path / "endless")
    file = folder / "tokenizer_config.json"
    about: dict[str, Any] = json.loads(file.read_text())
    del about["eos_token"]
    file.write_text(json.dumps(about))
    manifest.write(folder)
    said = refused(capsys, make_run(tmp_path, stage, "training.max_steps=1", model=folder))
    assert f"{folder}: its tokenizer has no end-of-text token" in said and str(file) in said
