"""The exactness table: every stage x ranks x ZeRO, undisturbed and disturbed, ends with the same bits.

    python -m tests.test_exact          # the table as the README carries it

Each cell trains one config twice: never stopped; and asked to stop where it is awkward (in the second pass over the
data, while a generation or rollout is half used, between two log lines), killed with SIGKILL a step after a save
(now at the end of a pass), and finished by a third attempt. Weights are compared by hash, logged numbers line by line.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from post_training.run.directory import RunDirectory
from post_training.run.life import STOPPED
from tests.training import Attempt, events, hold, make_run, metrics, weights

STEPS = 8
"""Optimizer steps of every run. Its data make a pass of three steps, or of four where two use one generation."""


@dataclass(frozen=True)
class Row:
    """A stage, or a way of running it."""

    name: str
    stage: str
    overrides: tuple[str, ...]  # {twice}: twice the accumulation steps
    dropout: bool = True
    sampled: bool = False  # it trains on its own samples, which need not be the same under ZeRO
    columns: tuple[str, ...] = ("1 rank", "2 ranks", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks")  # which are tests

    def text(self, column: str) -> str:
        return ("exact" if self.dropout else "exact, dropout off") if column in self.columns else "not tested"


ROWS = (
    Row("base", "base", ("data.num_documents=24",)),
    Row("base, wrapped, own tokenizer, compiled", "base", ("data.num_documents=64", "base.packing=wrapped",
        "model.tokenizer=train", "model.vocab_size=300", "training.torch_compile=true"), columns=("1 rank",)),
    Row("sft", "sft", ("data.num_demonstrations=24",)),
    Row("sft, packed", "sft", ("data.num_demonstrations=50", "sft.packing=true")),  # a pass ends with half a step
    Row("sft, LoRA", "sft", ("data.num_demonstrations=24", "lora.r=4", "lora.dropout=0.1", "sft.lr=1e-2"),
        columns=("1 rank", "ZeRO-3, 2 ranks")),
    Row("sft, KL and NEFTune", "sft", ("data.num_demonstrations=24", "sft.kl_coef=0.1", "sft.neftune_noise_alpha=5"),
        columns=("1 rank", "ZeRO-2, 2 ranks")),
    Row("rm", "rm", ("data.num_pairs=24",), dropout=False),
    Row("dpo", "dpo", ("data.num_pairs=24",), dropout=False),
    Row("orpo", "orpo", ("data.num_pairs=24",), dropout=False),
    Row("kto, reference asked once", "kto", ("data.num_pairs=12", "kto.precompute_ref_log_probs=true"), dropout=False),
    Row("ppo, two passes a rollout", "ppo", ("data.num_prompts=20", "ppo.num_ppo_epochs=2", "ppo.value_init=rm"),
        sampled=True),
    Row("ppo, LoRA", "ppo", ("data.num_prompts=20", "ppo.num_ppo_epochs=2", "lora.r=4", "lora.dropout=0.1",
        "ppo.lr=1e-2"), sampled=True, columns=("1 rank", "ZeRO-3, 2 ranks")),
    Row("grpo", "grpo", ("data.num_prompts=6",), sampled=True),
    Row("grpo, num_iterations=2", "grpo", ("data.num_prompts=4", "grpo.num_iterations=2", "grpo.beta=0.1"),
        sampled=True),
    Row("grpo, two steps a generation", "grpo", ("data.num_prompts=8", "grpo.steps_per_generation={twice}"),
        sampled=True),
    Row("rloo", "rloo", ("data.num_prompts=6",), sampled=True),
)  # fmt: skip

COLUMNS = {
    "1 rank": (1, "ddp"),
    "2 ranks": (2, "ddp"),
    "ZeRO-2, 2 ranks": (2, "zero2"),
    "ZeRO-3, 2 ranks": (2, "zero3"),
}


def table() -> str:
    """The table in Markdown."""
    lines = [["stage", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[row.name, *(row.text(column) for column in COLUMNS)] for row in ROWS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """The model that all stages but base start from."""
    run = make_run(folder, "base", "training.max_steps=2", "model.dropout=0.1", "seed=5", name="start")
    return Attempt(run).finish().model


@pytest.fixture(scope="module")
def scorer(folder: Path, start: Path) -> Path:
    """The reward model that scores ppo's samples."""
    return Attempt(make_run(folder, "rm", "training.max_steps=2", name="scorer", model=start)).finish().model


class Cells:
    """Runs of the table's cells, each made when it is first asked for."""

    def __init__(self, folder: Path, start: Path, scorer: Path) -> None:
        self.folder, self.start, self.scorer = folder, start, scorer
        self.calm: dict[tuple[str, str], RunDirectory] = {}

    def make(self, row: Row, column: str, name: str) -> RunDirectory:
        ranks, strategy = COLUMNS[column]
        inputs = {} if row.stage == "base" else {"model": self.start}
        return make_run(
            self.folder, row.stage,
            f"training.max_steps={STEPS}", "training.effective_batch_size=8", "training.per_device_train_batch_size=2",
            "checkpointing.save_steps=3", "logging.steps=2", "model.dropout=0.1",
            f"slurm.gpus_per_node={ranks if ranks > 1 else 0}", f"parallel.strategy={strategy}",
            "ppo.reward_model_weight=0.5", *(o.format(twice=8 // ranks) for o in row.overrides),
            name=f"{row.name}-{column}-{name}".replace(" ", "_"), **inputs,
            **({"reward_model": self.scorer} if row.stage == "ppo" else {}),
        )  # fmt: skip

    def undisturbed(self, row: Row, column: str) -> RunDirectory:
        key = (row.name, column)
        if key not in self.calm:
            self.calm[key] = self.make(row, column, "calm")
            Attempt(self.calm[key], world_size=COLUMNS[column][0]).finish()
        return self.calm[key]

    def disturbed(self, row: Row, column: str, fork_last: bool = True) -> RunDirectory:
        """Stopped after step 5, killed after step 7, which was not saved, and finished from step 6."""
        ranks = COLUMNS[column][0]
        run = hold(self.make(row, column, "disturbed"))
        first = Attempt(run, world_size=ranks)
        first.stop_at(4, lambda: run.request_stop(1))
        first.finish(STOPPED)
        second = Attempt(hold(run), 2, world_size=ranks)
        second.first_step = 6
        second.stop_at(7, second.kill)
        assert second.codes() == [-signal.SIGKILL] * ranks
        Attempt(run, 3, world_size=ranks, fork=fork_last).finish()
        assert [e["step"] for e in events(run, "training_started")] == [0, 5, 6]
        return run


@pytest.fixture(scope="module")
def cells(folder: Path, start: Path, scorer: Path) -> Cells:
    return Cells(folder, start, scorer)


OF_THE_CLOCK = ("time", "step_time", "tokens_per_second_per_gpu", "generated_tokens_per_second_per_gpu", "mfu",
                "train_runtime", "train_samples_per_second", "train_steps_per_second",
                "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip


def numbers(run: RunDirectory) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    return [{k: v for k, v in line.items() if k not in OF_THE_CLOCK} for line in metrics(run)]


def check(disturbed: RunDirectory, undisturbed: RunDirectory) -> None:
    logged = numbers(undisturbed)
    assert [line["step"] for line in logged if "eval_loss" not in line] == [1, 2, 4, 6, 8, 8], "two a line, the summary"
    assert numbers(disturbed) == logged
    assert weights(disturbed) == weights(undisturbed)


def named(row: Row, column: str) -> Any:
    return pytest.param(row, column, id=f"{row.name}-{column}")


@pytest.mark.parametrize(("row", "column"), [named(row, column) for row in ROWS for column in row.columns])
def test_cell(cells: Cells, row: Row, column: str) -> None:
    undisturbed = cells.undisturbed(row, column)
    steps_a_pass = STEPS / numbers(undisturbed)[-1]["epoch"]
    assert steps_a_pass < 5 and 5 % steps_a_pass >= 1, "the stop is to be within the second pass"
    check(cells.disturbed(row, column), undisturbed)


WITH_TWO_RANKS = [row for row in ROWS if "2 ranks" in row.columns]


@pytest.mark.parametrize(("row", "column"), [named(r, c) for r in WITH_TWO_RANKS for c in r.columns if "ZeRO" in c])
def test_zero_learns_what_ddp_learns(cells: Cells, row: Row, column: str) -> None:
    """Sums in another order, nothing else; and the output is whole, not one rank's part of it."""
    shared, whole = (cells.undisturbed(row, c) for c in (column, "2 ranks"))
    ours, theirs = (load_file(run.model / "model.safetensors") for run in (shared, whole))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    if not row.sampled:
        losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (shared, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert all(v.allclose(theirs[k], atol=1e-4) for k, v in ours.items())


IN_BFLOAT16 = [("ppo, two passes a rollout", "ZeRO-3, 2 ranks"), ("grpo, num_iterations=2", "ZeRO-2, 2 ranks")]


@pytest.mark.parametrize(("name", "column"), IN_BFLOAT16)
def test_in_bfloat16(cells: Cells, name: str, column: str) -> None:
    """What is half used is saved in its own types, not in the model's."""
    row = next(row for row in ROWS if row.name == name)
    row = replace(row, name=f"{name}, bfloat16", overrides=(*row.overrides, "model.dtype=bfloat16"))
    check(cells.disturbed(row, column), cells.undisturbed(row, column))


def test_with_a_worker_process_and_resumed_by_a_fresh_interpreter(cells: Cells) -> None:
    """The worker that prepares batches changes nothing, nor does what forked attempts share."""
    row = next(row for row in ROWS if row.name == "sft")
    with_worker = replace(row, name="sft, worker", overrides=(*row.overrides, "training.dataloader_num_workers=1"))
    check(cells.disturbed(with_worker, "1 rank", fork_last=False), cells.undisturbed(row, "1 rank"))


if __name__ == "__main__":
    print(table())
