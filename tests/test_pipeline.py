"""The quickstart, as a newcomer runs it: the whole pipeline with real training on this machine, once for all tests."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from post_training.run.directory import RunDirectory
from post_training.run.results import read
from tests.training import ROOT

TRAINED = ("base", "sft", "rm", "ppo", "dpo", "grpo")


def command(module: str, *tokens: str) -> str:
    """Run a command to its end; returns what it printed. A failure shows everything."""
    argv = [sys.executable, "-m", module, *tokens]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def status(output_base: Path, name: str = "quickstart") -> dict[str, dict[str, Any]]:
    printed = command("launchers.status", f"run_name={name}", f"paths.output_base={output_base}", "--json")
    return {row["stage"]: row for row in json.loads(printed)["runs"]}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quickstart's folder, and what it printed."""
    base = tmp_path_factory.mktemp("quickstart")
    return base, command("launchers.pipeline", "pipeline=quickstart", "cluster=local", f"paths.output_base={base}")


def test_the_quickstart_gets_better_stage_by_stage(quickstart: tuple[Path, str]) -> None:
    base, printed = quickstart
    results = {
        name: read(RunDirectory(base / "quickstart" / f"eval_{name}")) for name in TRAINED
    }
    scores = {name: found.score for name, found in results.items()}
    assert all(score.count >= 500 for score in scores.values())

    def better(worse: str, than: str) -> None:
        assert scores[than].low > scores[worse].high, (worse, than)

    better("base", "sft")
    better("sft", "ppo")
    better("sft", "dpo")
    better("sft", "grpo")
    assert results["rm"].headline == "preference_accuracy"
    assert scores["rm"].low > 0.5
    for name in ("base", "sft", "ppo", "dpo", "grpo"):
        assert f"{100 * scores[name].value:.1f} %" in printed
    assert "post_training.chat" in printed
    rows = status(base)
    assert {row["state"] for row in rows.values()} == {"done"}
    assert rows["sft"]["score"] == scores["sft"].value
    assert rows["sft"]["step"] == rows["sft"]["max_steps"] == 250


def test_gates_judge_what_real_evaluations_found(quickstart: tuple[Path, str]) -> None:
    base, _ = quickstart
    where = ("cluster=local", f"paths.output_base={base}")
    printed = command("launchers.pipeline", "pipeline=gated", *where)  # all gates hold: the quickstart's runs are taken
    assert printed.count("reused from quickstart") == 12 and "nothing to submit" in printed
    tokens = ("pipeline=quickstart", "stage=eval_sft", "run_name=closed", "eval.num_problems=32", *where)
    argv = [sys.executable, "-m", "launchers.submit", *tokens, "eval_sft.gate.at_least=0.99"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is below at_least 0.99" in done.stderr, done.stdout + done.stderr
    row = status(base, "closed")["eval_sft"]
    assert (row["state"], row["failures"]) == ("gated", 0) and row["score"] < 0.99


def test_the_best_model_answers(quickstart: tuple[Path, str]) -> None:
    """By the command that the quickstart's end prints, to the letter."""
    base, printed = quickstart
    line = next(line for line in printed.splitlines() if " -m post_training.chat " in line)
    done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = shlex.split(line)[-1]
    winner = next(word for word in shlex.split(line) if word.startswith("run=")).rpartition("/")[2]
    samples = (base / "quickstart" / f"eval_{winner}" / "model" / "samples.jsonl").read_text().splitlines()
    answers = {sample["prompt"]: sample["completion"] for sample in map(json.loads, samples)}
    assert done.stdout == f"{answers[asked]}\n", "what the evaluation heard"


def test_every_form_of_the_table_says_the_same(quickstart: tuple[Path, str]) -> None:
    base, _ = quickstart
    where = (f"paths.output_base={base}", "run_name=quickstart")
    rows = json.loads(command("launchers.compare", *where, "--json"))["stages"]
    lines = list(csv.DictReader(io.StringIO(command("launchers.compare", *where, "--csv"))))
    assert [row["stage"] for row in rows] == [line["stage"] for line in lines] == list(TRAINED)
    assert [str(row["score"]["value"]) for row in rows] == [line["score"] for line in lines]
    forgot = {row["stage"]: row["forgot"]["value"] for row in rows if row["forgot"]}
    assert set(forgot) == {"sft", "ppo", "dpo", "grpo"} and all(lost > 1 for lost in forgot.values())
    document = command("launchers.compare", *where, "--markdown")
    assert all(f"| {100 * row['score']['value']:.1f} %" in document for row in rows)


def test_the_same_command_again_runs_nothing(quickstart: tuple[Path, str]) -> None:
    base, _ = quickstart
    before = {path: path.read_bytes() for path in base.glob("quickstart/*/ledger.jsonl")}
    printed = command("launchers.pipeline", "pipeline=quickstart", "cluster=local", f"paths.output_base={base}")
    assert "nothing to submit" in printed
    assert {path: path.read_bytes() for path in base.glob("quickstart/*/ledger.jsonl")} == before
