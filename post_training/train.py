"""One stage from a run directory alone: the life of an attempt, top to bottom.

    python -m post_training.train RUN_DIR

The job script starts one such process a GPU. Exit codes: 0 the output is complete; run.life.STOPPED saved and
left on request; run.life.HUNG and OUT_OF_MEMORY as they say; 2 the config or data cannot be used; anything else is a
crash.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.distributed import set_rank_environment
from post_training.run import environment, ledger, life, manifest
from post_training.run.directory import Fenced, RunDirectory, write_atomic
from post_training.run.history import summarise
from post_training.run.progress import Progress

if TYPE_CHECKING:
    from transformers import Trainer

    from post_training.attempt import AttemptCallback, Watchdog
    from post_training.stages.common import Stage


def train(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> int:
    """Train until done or asked to stop; returns the exit code."""
    from post_training.attempt import AttemptCallback, StopFlag, save_for_inference
    from post_training.data import DataError, reports_as_json
    from post_training.guardrails import Guard
    from post_training.stages.common import finish, open_stage, steps_for_tokens, token_counts
    from post_training.tracking import callbacks

    stop_flag = StopFlag()
    stage = open_stage(run)
    trainer: Trainer = importlib.import_module(f"post_training.stages.{stage.cfg.stage}").build_trainer(stage)
    if not len(trainer.train_dataset):  # prepared rows are never empty; the others TRL has tokenised and cut by now
        raise DataError(
            f"data.name={stage.cfg.data.name}, data.path={stage.cfg.data.path or 'null'}: nothing is left to train "
            f"within training.max_length={stage.cfg.training.max_length}\n"
            "  fix: a longer training.max_length; python -m post_training.inspect_data shows lengths"
        )
    if (report := reports_as_json()) is not None and trainer.is_world_process_zero():
        with run.writing_as(attempt):
            write_atomic(run.data_report, report)
    trainer.args.output_dir = str(run.staging(attempt))  # from there each checkpoint is renamed once it is whole
    follower = AttemptCallback(run, attempt, stage.cfg.checkpointing, stop_flag, progress, watchdog)
    follower.trainer = trainer
    trainer.add_callback(trainer.meter)
    for callback in (*callbacks(stage.cfg, run, attempt), follower):  # what trackers wrote is safe before the manifest
        trainer.add_callback(callback)
    trainer.add_callback(Guard(stage.cfg.guardrails, run, attempt, trainer))
    if stage.cfg.training.num_training_tokens is not None:
        trainer.args.max_steps = steps_for_tokens(stage.cfg, token_counts(trainer.train_dataset))

    checkpoint = find_checkpoint(run, attempt, trainer, stage)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if follower.stopped:
        if trainer.is_world_process_zero():
            with run.writing_as(attempt):
                ledger.append(run.ledger, "stopped", attempt=attempt, step=step)
            shutil.rmtree(run.staging(attempt), ignore_errors=True)  # TRL's README
        return life.STOPPED

    figures = judge(trainer, follower, progress)
    progress.enter("saving")
    partial = run.model.with_name(f"model.partial-{attempt}")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    save_for_inference(trainer, partial)
    if trainer.is_world_process_zero():
        if figures:
            write_atomic(partial / run.held_out.name, json.dumps(figures, indent=1) + "\n")
        with run.writing_as(attempt):
            finish(run, partial, step=step)
        shutil.rmtree(run.staging(attempt), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    progress.enter("saving")
    return 0


def judge(trainer: Trainer, follower: AttemptCallback, progress: Progress) -> dict[str, float]:
    """Figures on the held-out rows of the trainer, once, after its last step; {} where it has none.

    They are logged as eval_... too. An attempt that is asked to leave meanwhile does without: its steps are worth more.
    """
    from post_training.attempt import CutShort

    if not trainer.eval_dataset:
        return {}
    progress.enter("evaluation")
    follower.judging = True
    try:
        logged = trainer.evaluate()
    except CutShort:
        print("asked to leave: the held-out figures are left out", file=sys.stderr)
        return {}
    of_the_clock = ("runtime", "per_second", "epoch", "num_tokens")
    figures = {k.removeprefix("eval_"): v for k, v in logged.items() if not any(word in k for word in of_the_clock)}
    return {"rows": len(trainer.eval_dataset), **figures}


def find_checkpoint(run: RunDirectory, attempt: int, trainer: Trainer, stage: Stage) -> Path | None:
    """The checkpoint to go on from. What is not whole is set aside first, with its reason in the ledger.

    Raises DataError where the checkpoint is of another world size and cannot be read by this one.
    """
    from post_training import resume
    from post_training.data.source import DataError

    trainer.accelerator.wait_for_everyone()  # all look before rank 0 moves anything
    checkpoint, broken = resume.newest_complete(run)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        broken += [(folder, "its attempt ended while it was written") for folder in resume.leftovers(run)]
        with run.writing_as(attempt):
            for folder, reason in broken:
                print(f"set aside {folder.name}: {reason}", file=sys.stderr)
                moved = resume.set_aside(run, folder, attempt)
                ledger.append(run.ledger, "set_aside", attempt=attempt, folder=moved.name, reason=reason)
    was = (manifest.read(checkpoint) or {}).get("world_size") if checkpoint else None
    now = trainer.args.world_size
    if was not in (None, now):
        if stage.cfg.parallel.strategy != "ddp":
            raise DataError(
                f"slurm.gpus_per_node x slurm.num_nodes={now} ranks: {checkpoint} was written by {was} ranks, and "
                f"parallel.strategy={stage.cfg.parallel.strategy} cannot read it\n"
                f"  fix: {was} ranks, or restart=true to begin again"
            )
        if trainer.is_world_process_zero():
            why = (
                f"goes on with {now} ranks from a checkpoint of {was}: weights, optimizer and the order of samples are "
                "kept; dropout, sampling and the order of summation differ, so the weights will not be the same bits"
            )
            print(f"not exact: {why}", file=sys.stderr)
            with run.writing_as(attempt):
                ledger.append(run.ledger, "not_exact", attempt=attempt, reason=why)
    if checkpoint and getattr(trainer, "use_vllm", False) and trainer.is_world_process_zero():
        from post_training.generation import NOT_EXACT

        print(f"not exact: {NOT_EXACT}", file=sys.stderr)
        with run.writing_as(attempt):
            ledger.append(run.ledger, "not_exact", attempt=attempt, reason=NOT_EXACT)
    trainer.accelerator.wait_for_everyone()
    return checkpoint


def run_attempt(run: RunDirectory, attempt: int) -> int:
    """What every stage has around it: live figures, the watchdog, and words for what went wrong."""
    from post_training.attempt import Watchdog
    from post_training.data.source import DataError

    rank = int(os.environ.get("RANK", "0"))
    history = summarise(ledger.read(run.ledger))
    progress = Progress(run, attempt, history.last_step, writes=rank == 0)
    config = run.read_config()
    watchdog = Watchdog(run.stacks(attempt, rank), 60 * float(config["slurm"].get("watchdog_minutes", 30)))
    watchdog.beat()
    watchdog.start()
    try:
        if rank == 0:
            environment.record(run, attempt)
        if config["stage"] == "eval":
            from post_training.stages.eval import evaluate

            return evaluate(run, attempt, progress, watchdog)
        if config["stage"] == "prepare":
            from post_training.stages.prepare import prepare

            return prepare(run, attempt, progress, watchdog)
        if config["stage"] == "merge":
            from post_training.stages.merge import merge_adapter

            return merge_adapter(run, attempt, progress)
        if config["stage"] == "sample":
            from post_training.stages.sample import sample

            return sample(run, attempt, progress, watchdog)
        return train(run, attempt, progress, watchdog)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        _say_why(run, attempt, str(error).splitlines()[0])
        return life.UNUSABLE
    except Fenced as error:
        print(f"leaves without writing: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        _say_why(run, attempt, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return life.OUT_OF_MEMORY if is_out_of_memory(error) else 1
    finally:
        watchdog.end()
        _leave_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory ran out; torch's CPU allocator says so in a RuntimeError."""
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _say_why(run: RunDirectory, attempt: int, text: str) -> None:
    """For the ledger: the first rank that fails says why, the others follow from it."""
    with contextlib.suppress(OSError), run.error(attempt).open("x") as file:
        file.write(f"{text}\n")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m post_training.train RUN_DIR", file=sys.stderr)
        return 2
    run = RunDirectory(Path(sys.argv[1]).absolute())
    set_rank_environment()
    attempt = int(os.environ.get("POST_TRAINING_ATTEMPT") or summarise(ledger.read(run.ledger)).attempts)
    return run_attempt(run, attempt)


def _leave_process_group() -> None:
    """End torch.distributed in order, where it was started; torch itself is imported by then, if at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
