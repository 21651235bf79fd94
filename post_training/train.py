"""One stage from a run directory alone: the life of an attempt, top to bottom.

    python -m post_training.train RUN_DIR

The job script starts one such process a GPU. Exit codes: 0 the output is complete; run.life.STOPPED saved and
left on request; 2 the config or data cannot be used; anything else is a crash.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.distributed import set_rank_environment
from post_training.run import ledger, life
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise

if TYPE_CHECKING:
    from transformers import Trainer


def train(run: RunDirectory, attempt: int) -> int:
    """Train until done or asked to stop; returns the exit code."""
    from post_training import resume
    from post_training.attempt import AttemptCallback, StopFlag, save_for_inference
    from post_training.stages.common import finish, open_stage, steps_for_tokens, token_counts

    stop_flag = StopFlag()
    stage = open_stage(run)
    trainer: Trainer = importlib.import_module(f"post_training.stages.{stage.cfg.stage}").build_trainer(stage)
    follower = AttemptCallback(run, attempt, stage.cfg.checkpointing, stop_flag)
    follower.trainer = trainer
    trainer.add_callback(follower)
    if stage.cfg.training.num_training_tokens is not None:
        trainer.args.max_steps = steps_for_tokens(stage.cfg, token_counts(trainer.train_dataset))

    checkpoint, broken = resume.newest_complete(run)
    if trainer.is_world_process_zero():
        for folder, reason in broken:
            print(f"set aside {folder.name}: {reason}", file=sys.stderr)
            resume.set_aside(folder, attempt)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if follower.stopped:
        if trainer.is_world_process_zero():
            ledger.append(run.ledger, "stopped", attempt=attempt, step=step)
        return life.STOPPED

    partial = run.model.with_name("model.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    save_for_inference(trainer, partial)
    if trainer.is_world_process_zero():
        finish(run, partial, step=step)
    trainer.accelerator.wait_for_everyone()
    return 0


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m post_training.train RUN_DIR", file=sys.stderr)
        return 2
    run = RunDirectory(Path(sys.argv[1]).absolute())
    set_rank_environment()
    attempt = int(os.environ.get("POST_TRAINING_ATTEMPT") or summarise(ledger.read(run.ledger)).attempts)
    from post_training.data.source import DataError

    try:
        if run.read_config()["stage"] == "eval":
            from post_training.stages.eval import evaluate

            return evaluate(run, attempt)
        return train(run, attempt)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    """End torch.distributed in order, where it was started; torch itself is imported by then, if at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
