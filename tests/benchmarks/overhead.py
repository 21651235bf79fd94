"""What stop checks, live figures, metrics.jsonl, ledger and manifests cost a training step.

    python -m tests.benchmarks.overhead [--steps 2000]

One trainer in one process, an sft run of the quickstart's size, which logs at every step. Our callback hears of half
of the steps, drawn by chance, and of every second save (without it the trainer saves all the same, but nobody makes
the checkpoint complete). Printed: medians of a step's and a save's time with and without; the ratio of the steps, with
the spread of its medians over ten parts of the run; and the ratio with a save every 500 steps, the default.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAVE_EVERY = 50  # here
SAVE_STEPS = 500  # checkpointing.save_steps by default
PARTS = 10


class Turns:
    """Hands the trainer's events to the follower in every second step and save, and takes their times."""

    def __init__(self, follower: Any, steps: int) -> None:
        from transformers import TrainerCallback

        outer, draw = self, random.Random(0)
        chance = [draw.random() < 0.5 for _ in range(steps + 1)]
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.saves: dict[bool, list[float]] = {True: [], False: []}

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                follower.on_train_begin(args, state, control, **more)
                outer.began = time.perf_counter()

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                now = time.perf_counter()
                # from one step's begin to the next: batch, forward, backward, update, log and our part in it
                if state.global_step % SAVE_EVERY != 0:
                    outer.steps[self.on(state)].append(now - outer.began)
                outer.began = now

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if self.on(state):
                    follower.on_step_end(args, state, control, **more)
                outer.save_began = time.perf_counter()

            def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if self.on(state):
                    follower.on_log(args, state, control, **more)

            def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                on = state.global_step // SAVE_EVERY % 2 == 0
                if on:
                    follower.on_save(args, state, control, **more)
                outer.saves[on].append(time.perf_counter() - outer.save_began)

            @staticmethod
            def on(state: Any) -> bool:
                return chance[state.global_step]

        self.callback = Callback()
        self.began = self.save_began = 0.0


def measure(steps: int) -> dict[str, float]:
    """Milliseconds of a step and of a save with and without, and their ratios."""
    from post_training.attempt import AttemptCallback, StopFlag, Watchdog
    from post_training.run.progress import Progress
    from post_training.stages.common import open_stage
    from post_training.stages.sft import build_trainer
    from tests.training import Attempt, make_run

    size = ["model.hidden_size=128", "model.intermediate_size=384", "model.num_layers=2", "model.num_heads=4"]
    with tempfile.TemporaryDirectory() as folder:
        start = make_run(Path(folder), "base", *size, "training.max_steps=1", name="start")
        Attempt(start).finish()
        run = make_run(
            Path(folder), "sft", *size, "data.num_demonstrations=8000", "training.effective_batch_size=32",
            "training.per_device_train_batch_size=32", f"training.max_steps={steps}",
            f"checkpointing.save_steps={SAVE_EVERY}", "logging.steps=1", model=start.model,
        )  # fmt: skip
        run.announce(1)
        stage = open_stage(run)
        trainer = build_trainer(stage)
        trainer.args.output_dir = str(run.staging(1))
        watchdog = Watchdog(run.stacks(1, 0), 1800)
        follower = AttemptCallback(
            run, 1, stage.cfg.checkpointing, StopFlag(), Progress(run, 1, 0, writes=True), watchdog
        )
        follower.trainer = trainer
        turns = Turns(follower, steps)
        trainer.add_callback(turns.callback)
        trainer.train()
    without, with_ours = turns.steps[False][SAVE_EVERY:], turns.steps[True][SAVE_EVERY:]
    part = min(len(without), len(with_ours)) // PARTS
    parts = [slice(i * part, (i + 1) * part) for i in range(PARTS)]
    ratios = sorted(statistics.median(with_ours[p]) / statistics.median(without[p]) for p in parts)
    step, ours = statistics.median(without), statistics.median(with_ours)
    save, our_save = (statistics.median(turns.saves[on]) for on in (False, True))
    return {
        "step_without_ms": 1000 * step, "step_with_ms": 1000 * ours,
        "ratio": ours / step, "lowest": ratios[0], "highest": ratios[-1],
        "save_without_ms": 1000 * save, "save_with_ms": 1000 * our_save,
        "ratio_with_saves": (ours + our_save / SAVE_STEPS) / (step + save / SAVE_STEPS),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure(args.steps)
    print(json.dumps({k: round(v, 4) for k, v in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
