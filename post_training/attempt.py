"""What an attempt does between the trainer's steps: stop requests, saves, manifests, metrics, the ledger."""

from __future__ import annotations

import enum
import faulthandler
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from conf.schema import Checkpointing
from post_training import resume
from post_training.adapters import save_merged
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.progress import Progress

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


ASSUMED_SAVE_S = 30.0
"""What save_minutes=auto takes a save to cost until one was measured, seconds."""


class StopFlag:
    """SIGTERM as a flag: SLURM sends it to every task on preemption and cancel. Saving happens between steps."""

    def __init__(self) -> None:
        self.is_set = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: object) -> None:
        self.is_set = True


class Watchdog(threading.Thread):
    """Ends this process when nothing was done for too long, after writing what every thread was doing.

    All ranks do: one that hangs makes the others wait for it. Each gives the others a moment to write too, since
    the first one that ends takes the rest with it.
    """

    MOMENT_S = 5.0

    def __init__(self, stacks: Path, seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.stacks, self.seconds = stacks, seconds
        self._beat = time.monotonic()
        self._armed = -math.inf
        self._ended = threading.Event()

    def beat(self) -> None:
        """Something was done: a step, a save, a batch of answers."""
        self._beat = time.monotonic()
        if self._beat - self._armed > self.seconds / 4:
            # a thread of its own, without Python's lock: for code that hangs while it holds that lock
            self._armed = self._beat
            faulthandler.dump_traceback_later(1.25 * self.seconds + 3 * self.MOMENT_S, exit=True, file=2)

    def end(self) -> None:
        """The attempt is over: from here on nothing is watched."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        while (left := self._beat + self.seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w") as file:
                file.write(f"no step for {self.seconds:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(self.MOMENT_S)
        finally:
            os._exit(life.HUNG)


class Wish(enum.IntEnum):
    """What is to happen after a step; where ranks differ, the greatest holds."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class AttemptCallback(TrainerCallback):
    """Follows one attempt of one run; `trainer` is set once it exists."""

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        checkpointing: Checkpointing,
        stop_flag: StopFlag,
        progress: Progress,
        watchdog: Watchdog,
    ) -> None:
        self.run, self.attempt, self.checkpointing, self.stop_flag = run, attempt, checkpointing, stop_flag
        self.progress, self.watchdog = progress, watchdog
        self.trainer: Trainer | None = None
        self.stopped = False
        self._save_started = self._last_save = time.monotonic()
        self._seconds_between_saves = self._save_interval()

    # -- events of transformers.Trainer, in the order of a step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.run.writing_as(self.attempt):
                self._cut_metrics(state.global_step)
            self._record("training_started", step=state.global_step)
        self.watchdog.beat()
        self.progress.training(state.global_step)
        self._last_save = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stepped(state.global_step)
        self.watchdog.beat()
        wish = self._wish_of_all_ranks(state)
        if wish == Wish.STOP and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        if wish == Wish.SAVE:
            control.should_save = True
        every = self.checkpointing.inference_checkpoint_steps
        if control.should_save or (every and state.global_step % every == 0):
            self.progress.enter("saving")
        self._save_started = time.monotonic()
        if every and state.global_step % every == 0:
            self._save_inference_checkpoint(state)
            if not control.should_save:
                self.progress.training(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        line = {"step": state.global_step, "max_steps": state.max_steps, "time": round(time.time(), 3), **values}
        with self.run.writing_as(self.attempt), self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All ranks have written their parts: the manifest makes the checkpoint complete, then old ones go."""
        assert self.trainer is not None
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            staged = self.run.staging(self.attempt) / name
            with self.run.metrics.open("ab") as metrics:
                os.fsync(metrics.fileno())  # what was logged up to here belongs to the checkpoint
            manifest.write(staged, step=state.global_step, attempt=self.attempt, world_size=args.world_size)
            with self.run.writing_as(self.attempt):
                resume.install(staged, self.run.checkpoints / name)
            seconds = time.monotonic() - self._save_started
            self._record("checkpoint_saved", step=state.global_step, seconds=round(seconds, 3))
            resume.rotate(self.run, self.checkpointing.save_total_limit)
            self._seconds_between_saves = self._save_interval()
        self._last_save = time.monotonic()
        self.watchdog.beat()
        self.progress.training(state.global_step)

    # -- helpers

    def _wish_of_all_ranks(self, state: TrainerState) -> Wish:
        """What the ranks agree on for this step: every rank gets the same answer."""
        wish = Wish.STOP if self.stop_flag.is_set else Wish.GO_ON
        if state.is_world_process_zero:
            wish = max(wish, self._wish_of_rank_0())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            assert self.trainer is not None
            flag = torch.tensor([int(wish)], device=self.trainer.accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            return Wish(int(flag.item()))
        return wish

    def _wish_of_rank_0(self) -> Wish:
        if self.run.stop_requested(self.attempt):
            return Wish.STOP
        due = time.monotonic() - self._last_save >= self._seconds_between_saves
        return Wish.SAVE if due else Wish.GO_ON

    def _save_interval(self) -> float:
        """Seconds between saves as checkpointing.save_minutes says; infinite where it says nothing."""
        minutes = self.checkpointing.save_minutes
        if minutes is None:
            return math.inf
        if minutes != "auto":
            return 60 * float(minutes)
        from post_training.run.accounting import save_interval, seconds_between_saves

        prior = 3600 * self.checkpointing.mttf_hours
        events = ledger.read(self.run.ledger)
        return seconds_between_saves(events, prior, time.time()) or save_interval(ASSUMED_SAVE_S, prior)

    def _save_inference_checkpoint(self, state: TrainerState) -> None:
        assert self.trainer is not None
        folder = self.run.inference_checkpoints / f"step-{state.global_step}"
        partial = folder.with_name(f"{folder.name}.partial-{self.attempt}")
        save_for_inference(self.trainer, partial)
        if state.is_world_process_zero:
            manifest.write(partial, step=state.global_step)
            with self.run.writing_as(self.attempt):
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that got here before
                partial.rename(folder)

    def _record(self, event: str, **fields: Any) -> None:
        with self.run.writing_as(self.attempt):
            ledger.append(self.run.ledger, event, attempt=self.attempt, **fields)

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
    elif hasattr(trainer.model, "peft_config"):
        save_merged(trainer, folder)
    else:
        trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle: no business of who uses the model
