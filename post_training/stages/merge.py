"""merge: a LoRA adapter merged into the model that it was trained on. Stages with `lora.r` do so at their end."""

from __future__ import annotations

import shutil
from pathlib import Path

from post_training.adapters import FOLDER, merge
from post_training.data.source import DataError
from post_training.run import ledger
from post_training.run.directory import RunDirectory
from post_training.run.progress import Progress
from post_training.stages.common import dtype, finish, open_stage


def merge_adapter(run: RunDirectory, attempt: int, progress: Progress) -> int:
    """Write the run's output: the plain model, and the adapter beside it. Returns the exit code.

    Short, and without steps: whoever is asked to stop meanwhile starts again. Raises DataError for an adapter of
    another model.
    """
    stage = open_stage(run)
    adapter = Path(stage.cfg.merge.adapter or "").expanduser()
    if stage.model_path is None:
        raise DataError("inputs.model=null: merge needs a model\n  fix: inputs.model=<the adapter's own start model>")
    with run.writing_as(attempt):
        ledger.append(run.ledger, "training_started", attempt=attempt, step=0)
    progress.enter("saving")
    partial = run.model.with_name(f"model.partial-{attempt}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        merge(stage.model_path, adapter, partial, dtype(stage.cfg), stage.tokenizer)
        shutil.copytree(adapter, partial / FOLDER, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth"))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with run.writing_as(attempt):
        finish(run, partial)
    progress.enter("saving")
    return 0
