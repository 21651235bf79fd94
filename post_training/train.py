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
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from conf.schema import Config
from post_training.distributed import set_rank_environment
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory, fsync_directory
from post_training.run.history import summarise

if TYPE_CHECKING:
    from transformers import Trainer

    from post_training.stages.common import Stage

NOT_IN_SCHEMA = ("version", "name", "identity", "inputs", "pipeline")
"""Keys of a frozen config that say what the run is, beside the Config that it was made from."""


def load_config(frozen: dict[str, Any]) -> Config:
    """The typed config of a frozen one. Raises OmegaConf's errors where it does not fit the schema."""
    values = {k: v for k, v in frozen.items() if k not in NOT_IN_SCHEMA}
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(cfg, Config)
    return cfg


def open_stage(run: RunDirectory) -> Stage:
    """Config, tokenizer and model paths of a run."""
    from post_training.data.tokenizer import load_tokenizer
    from post_training.stages.common import Stage

    frozen = run.read_config()
    cfg = load_config(frozen)
    paths = {name: (source or {}).get("path") for name, source in frozen["inputs"].items()}
    tokenizer = load_tokenizer(cfg.model, paths["model"])
    return Stage(cfg, run, tokenizer, paths["model"], paths["reference"], paths["reward_model"])


def train(run: RunDirectory, attempt: int) -> int:
    """Train until done or asked to stop; returns the exit code."""
    from post_training import resume
    from post_training.attempt import AttemptCallback, StopFlag, save_for_inference

    stop_flag = StopFlag()
    stage = open_stage(run)
    trainer: Trainer = importlib.import_module(f"post_training.stages.{stage.cfg.stage}").build_trainer(stage)
    follower = AttemptCallback(run, attempt, stage.cfg.checkpointing, stop_flag)
    follower.trainer = trainer
    trainer.add_callback(follower)
    if stage.cfg.training.num_training_tokens is not None:
        from post_training.stages.common import steps_for_tokens, token_counts

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


def finish(run: RunDirectory, partial: Path, **about: Any) -> None:
    """Turn a fully written folder into the run's output: manifest, then one rename."""
    frozen = run.read_config()
    manifest.write(partial, stage=frozen["stage"], identity=frozen["identity"], **about)
    partial.rename(run.model)
    fsync_directory(run.root)


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
