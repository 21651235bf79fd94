"""What stop checks, live figures, metrics.jsonl, ledger and manifests cost a training step.

    python -m tests.benchmarks.overhead [--pairs 8] [--steps 40]

One trainer in one process, an sft run of the quickstart's size. Blocks of `--steps` steps, each with one save at its
end, run by turns with our callback and without it (then the trainer saves all the same, but nobody makes the
checkpoint complete). Printed: median time of a block's steps with and without, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Turns:
    """Hands the trainer's events to the follower in every second block, and takes the blocks' times."""

    def __init__(self, follower: Any, steps: int) -> None:
        from transformers import TrainerCallback

        outer = self
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                follower.on_train_begin(args, state, control, **more)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % steps == 0:
                    outer.began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if self.on(state):
                    follower.on_step_end(args, state, control, **more)

            def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if self.on(state):
                    follower.on_log(args, state, control, **more)

            def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                on = self.on(state)
                if on:
                    follower.on_save(args, state, control, **more)
                outer.seconds[on].append(time.perf_counter() - outer.began)

            @staticmethod
            def on(state: Any) -> bool:
                return (state.global_step - 1) // steps % 2 == 1

        self.callback = Callback()
        self.began = 0.0


def measure(pairs: int, steps: int) -> dict[str, float]:
    """Seconds of a step with and without, saves included, and the paired ratio."""
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
            "training.per_device_train_batch_size=32", f"training.max_steps={2 * (pairs + 1) * steps}",
            f"checkpointing.save_steps={steps}", "logging.steps=10", model=start.model,
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
    without, with_ours = turns.seconds[False][1:], turns.seconds[True][1:]  # the first pair warms up
    ratios = sorted(b / a for a, b in zip(without, with_ours, strict=False))
    return {
        "step_without_ms": 1000 * statistics.median(without) / steps,
        "step_with_ms": 1000 * statistics.median(with_ours) / steps,
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1], "pairs": len(ratios),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure(args.pairs, args.steps)
    print(json.dumps({k: round(v, 4) for k, v in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
