"""What an attempt does between the trainer's steps: stop requests, manifests, metrics, the ledger."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from conf.schema import Checkpointing
from post_training import resume
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory, write_atomic

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class StopFlag:
    """SIGTERM as a flag: SLURM sends it to every task on preemption and cancel. Saving happens between steps."""

    def __init__(self) -> None:
        self.is_set = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: object) -> None:
        self.is_set = True


class AttemptCallback(TrainerCallback):
    """Follows one attempt of one run; `trainer` is set once it exists."""

    def __init__(self, run: RunDirectory, attempt: int, checkpointing: Checkpointing, stop_flag: StopFlag) -> None:
        self.run, self.attempt, self.checkpointing, self.stop_flag = run, attempt, checkpointing, stop_flag
        self.trainer: Trainer | None = None
        self.stopped = False
        self._save_started = 0.0

    # -- events of transformers.Trainer, in the order of a step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._cut_metrics(state.global_step)
            ledger.append(self.run.ledger, "training_started", attempt=self.attempt, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps and self._all_ranks_stop(state):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        self._save_started = time.monotonic()
        every = self.checkpointing.inference_checkpoint_steps
        if every and state.global_step % every == 0:
            assert self.trainer is not None
            folder = self.run.inference_checkpoints / f"step-{state.global_step}"
            partial = folder.with_name(f"{folder.name}.partial")
            save_for_inference(self.trainer, partial)
            if state.is_world_process_zero:
                manifest.write(partial, step=state.global_step)
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that got here before
                partial.rename(folder)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        line = {"step": state.global_step, "max_steps": state.max_steps, "time": round(time.time(), 3), **values}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All ranks have written their parts: the manifest makes the checkpoint complete, then old ones go."""
        assert self.trainer is not None
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = self.run.checkpoints / f"checkpoint-{state.global_step}"
        manifest.write(folder, step=state.global_step, attempt=self.attempt, world_size=args.world_size)
        ledger.append(
            self.run.ledger,
            "checkpoint_saved",
            attempt=self.attempt,
            step=state.global_step,
            seconds=round(time.monotonic() - self._save_started, 3),
        )
        resume.rotate(self.run, self.checkpointing.save_total_limit)

    # -- helpers

    def _all_ranks_stop(self, state: TrainerState) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer for the same step."""
        asked = self.stop_flag.is_set
        if state.is_world_process_zero:
            asked = asked or self.run.stop_requested(self.attempt)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            assert self.trainer is not None
            flag = torch.tensor([int(asked)], device=self.trainer.accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            return bool(flag.item())
        return asked

    def _cut_metrics(self, step: int) -> None:
        """Drop lines past the step that this attempt goes on from: they are run, and logged, again."""
        if not self.run.metrics.exists():
            return
        lines = self.run.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            write_atomic(self.run.metrics, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a torn line counts as newer than anything


def save_for_inference(trainer: Trainer, folder: Path) -> None:
    """The model that others use: weights as safetensors, config and tokenizer. Every rank calls it."""
    save_policy = getattr(trainer, "save_policy", None)
    if save_policy is not None:  # ppo trains policy and value head as one; others want the policy alone
        save_policy(str(folder))
    else:
        trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle: no business of who uses the model
