"""prepare: the data of other stages, tokenised and packed before they start; a job that needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from typing import Any

from post_training.attempt import Watchdog
from post_training.data import reports_as_json
from post_training.data.prepared import folder_of, kept, preparation_of, tokenizer_of
from post_training.data.templates import require_masks
from post_training.run import ledger, life
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.progress import Progress
from post_training.stages.common import finish, load_config

VERSION = 1


class Asked(BaseException):
    """The attempt is to leave; what is prepared by then is kept."""


def prepare(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> int:
    """Prepare for each of `prepare.targets`, and write the output: prepared.json. Returns the exit code.

    Nobody can tell a long tokenisation from a hang, so the watchdog rests: the wall time is the bound.
    """
    done = threading.Event()

    def leave(*_: object) -> None:
        raise Asked

    def listen() -> None:
        """A stop request becomes the signal that interrupts whatever the main thread does."""
        while not done.wait(1.0):
            progress.write()
            if run.stop_requested(attempt):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watchdog.end()
    with run.writing_as(attempt):
        ledger.append(run.ledger, "training_started", attempt=attempt, step=0)
    progress.enter("evaluation")
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=listen, daemon=True).start()
    try:
        report = {name: _one(run, target) for name, target in run.read_config()["prepare"]["targets"].items()}
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the output is left to be written
    except Asked:
        with run.writing_as(attempt):
            ledger.append(run.ledger, "stopped", attempt=attempt, step=0)
        return life.STOPPED
    finally:
        done.set()
    progress.enter("saving")
    partial = run.model.with_name(f"model.partial-{attempt}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_atomic(partial / "prepared.json", json.dumps({"version": VERSION, "stages": report}, indent=1) + "\n")
    with run.writing_as(attempt):
        if (reports := reports_as_json()) is not None:
            write_atomic(run.data_report, reports)
        finish(run, partial)
    progress.enter("saving")
    return 0


def _one(run: RunDirectory, target: dict[str, Any]) -> dict[str, Any]:
    """Prepare for one stage."""
    cfg = load_config({name: value for name, value in target.items() if name not in ("start_model", "lineage")})
    tokenizer = tokenizer_of(cfg, target["start_model"], target["lineage"])
    if cfg.stage == "sft":
        require_masks(tokenizer)
    how = preparation_of(cfg)
    folder = folder_of(cfg, tokenizer, how, run.root.parent.parent)
    num_proc = run.read_config()["prepare"]["num_proc"] or len(os.sched_getaffinity(0))
    rows = kept(folder, cfg, tokenizer, how, num_proc=num_proc if num_proc > 1 else None)
    return {"folder": str(folder), "rows": len(rows)}
