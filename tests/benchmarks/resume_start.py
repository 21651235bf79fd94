"""How long a resumed attempt takes to its first new step, beside a fresh one.

    python -m tests.benchmarks.resume_start [--pairs 5]

Real attempts of an sft run of the quickstart's size, by turns: a fresh one, and one that goes on from a checkpoint
(hashes checked, optimizer and random state read, data skipped). Seconds from the process's start to the time at which
the first new step was logged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    from tests.training import Attempt, hold, make_run, metrics

    size = ["model.hidden_size=128", "model.intermediate_size=384", "model.num_layers=2", "model.num_heads=4"]
    sft = [
        *size, "data.num_demonstrations=8000", "training.effective_batch_size=32",
        "training.per_device_train_batch_size=32", "training.max_steps=100", "checkpointing.save_steps=500",
    ]  # fmt: skip
    found: dict[str, list[float]] = {"fresh": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        start = Attempt(make_run(base, "base", *size, "training.max_steps=1", name="start")).finish().model
        stopped = hold(make_run(base, "sft", *sft, name="stopped", model=start))
        first = Attempt(stopped)
        first.stop_at(50, lambda: stopped.request_stop(1))
        first.finish(85)
        done = metrics(stopped)[-1]["step"]
        for number in range(args.pairs):
            for kind in found:
                run = make_run(base, "sft", *sft, name=f"{kind}-{number}", model=start)
                if kind == "resumed":
                    shutil.copytree(stopped.checkpoints, run.checkpoints, dirs_exist_ok=True)
                began = time.time()
                attempt = Attempt(run, fork=False)  # with its imports, as a job starts it
                after = done if kind == "resumed" else 0
                attempt.wait_until(lambda run=run, after=after: any(m["step"] > after for m in metrics(run)), "a step")
                logged = next(m["time"] for m in metrics(run) if m["step"] > after)
                attempt.kill()
                found[kind].append(logged - began)
    ratios = sorted(b / a for a, b in zip(found["fresh"], found["resumed"], strict=True))
    print(json.dumps({
        **{f"{kind}_s": round(statistics.median(values), 2) for kind, values in found.items()},
        "ratio": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3), "highest": round(ratios[-1], 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
