"""Time of a step beside a plain TRL script's, and real tokens a second with packing beside TRL's defaults.

    python -m tests.benchmarks.step_time [--stages sft dpo grpo] [--steps 30] [--rounds 4] [--records FOLDER]

The first part trains the same model on the same records with the same settings: our stage as an attempt runs it (stop
checks, live figures, metrics, ledger), and TRL's own trainer on the same arguments, by turns, in one process. The
second part gives GSM8K's records (--records: a folder with train.jsonl) to our sft with packing and to TRL's
SFTTrainer with its defaults but in float32, and counts real tokens: those that are no padding.

Each figure comes twice: by the clock on the wall, and by this process's CPU time, which other work on the machine
disturbs less. On one thread of a CPU nothing else is waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

SIZE = ["model.hidden_size=128", "model.intermediate_size=384", "model.num_layers=2", "model.num_heads=4"]
SETTINGS = [
    "data.num_demonstrations=4000", "data.num_pairs=2000", "data.num_prompts=2000", "training.max_length=64",
    "training.effective_batch_size=32", "training.per_device_train_batch_size=32", "checkpointing.save_steps=100000",
    "logging.steps=10", "grpo.num_generations=8", "grpo.max_completion_length=24",
]  # fmt: skip
WARM_UP = 5
"""Steps at the start of each turn that are not counted."""


Steps = list[tuple[float, float]]
"""Seconds of each step: on the wall, and of the CPU."""


def clock(steps: Steps) -> Any:
    """A callback that notes how long each step took, from the end of the one before."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        last = (0.0, 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = (time.perf_counter(), time.process_time())
            if state.global_step > WARM_UP:
                steps.append((now[0] - self.last[0], now[1] - self.last[1]))
            self.last = now

    return Clock()


def medians(steps: Steps) -> list[float]:
    return [statistics.median(column) for column in zip(*steps, strict=True)]


def tokens_a_step(lines: list[dict[str, Any]], steps: int) -> float:
    """Real tokens of a step, from TRL's own running count in the log."""
    found = [(line["step"], line["num_tokens"]) for line in lines if "num_tokens" in line]
    return (found[-1][1] - found[0][1]) / (found[-1][0] - found[0][0])


def ours(base: Path, start: Path, stage: str, steps: int, *more: str) -> tuple[Steps, float]:
    """Seconds of each step of our stage, and its real tokens."""
    import importlib

    from post_training.attempt import AttemptCallback, StopFlag, Watchdog
    from post_training.run.progress import Progress
    from post_training.stages.common import open_stage
    from tests.training import make_run, metrics

    shutil.rmtree(base / stage, ignore_errors=True)
    run = make_run(base, stage, *SIZE, *SETTINGS, f"training.max_steps={steps}", *more, model=start)
    run.announce(1)
    taken: Steps = []
    opened = open_stage(run)
    trainer = importlib.import_module(f"post_training.stages.{stage}").build_trainer(opened)
    trainer.args.output_dir = str(run.staging(1))
    trainer.args.save_strategy = "no"
    follower = AttemptCallback(
        run, 1, opened.cfg.checkpointing, StopFlag(), Progress(run, 1, 0, writes=True), Watchdog(run.stacks(1, 0), 1800)
    )
    follower.trainer = trainer
    for callback in (trainer.meter, follower, clock(taken)):
        trainer.add_callback(callback)
    trainer.train()
    return taken, tokens_a_step(metrics(run), steps)


def theirs(
    base: Path, start: Path, stage: str, steps: int, *more: str, defaults: bool = False
) -> tuple[Steps, float]:
    """The same of a plain script: TRL's trainer on the same records. defaults: with TRL's own settings."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from post_training import data
    from post_training.rewards.verify import reward_functions
    from post_training.stages.common import load_config, open_stage, trainer_arguments
    from tests.training import make_run

    name = f"{stage}-plain"
    shutil.rmtree(base / name, ignore_errors=True)
    run = make_run(base, stage, *SIZE, *SETTINGS, f"training.max_steps={steps}", *more, name=name, model=start)
    cfg = load_config(run.read_config())
    records = data.load(cfg.data)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    settings = trainer_arguments(open_stage(run), getattr(cfg, stage).lr) | {"save_strategy": "no"}
    if defaults:
        kept = ("output_dir", "max_steps", "use_cpu", "report_to", "disable_tqdm", "save_strategy", "logging_steps")
        settings = {name: settings[name] for name in kept} | {"bf16": False}  # a CPU only emulates it, ten times slower
    taken: Steps = []
    common = {"model": model, "processing_class": tokenizer, "callbacks": [clock(taken)]}
    trainer: Any
    if stage == "sft":
        special = {} if defaults else {"assistant_only_loss": True, "max_length": 64}
        trainer = trl.SFTTrainer(
            args=trl.SFTConfig(**settings, **special), train_dataset=records.demonstrations("train"), **common
        )
    elif stage == "dpo":
        reference = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
        trainer = trl.DPOTrainer(
            ref_model=reference, args=trl.DPOConfig(**settings, beta=cfg.dpo.beta, max_length=64),
            train_dataset=records.preferences("train"), **common,
        )  # fmt: skip
    else:
        functions, weights = reward_functions(cfg.grpo.reward)
        trainer = trl.GRPOTrainer(
            reward_funcs=functions, train_dataset=records.problems("train"),
            args=trl.GRPOConfig(
                **settings, num_generations=8, max_completion_length=24, reward_weights=weights, beta=0.0,
                temperature=cfg.grpo.temperature, loss_type=cfg.grpo.loss_type,
            ), **common,
        )  # fmt: skip
    trainer.train()
    return taken, tokens_a_step(trainer.state.log_history, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", default=["sft", "dpo", "grpo"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--records")
    args = parser.parse_args()
    import torch

    from tests.training import Attempt, make_run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        start = Attempt(make_run(base, "base", *SIZE, "training.max_steps=1", name="start")).finish().model
        for stage in args.stages:
            rounds = []
            for turn in range(args.rounds):
                both = (ours, theirs) if turn % 2 else (theirs, ours)
                found = {which.__name__: medians(which(base, start, stage, args.steps)[0]) for which in both}
                rounds.append([*found["ours"], *found["theirs"]])
            columns = [statistics.median(column) for column in zip(*rounds, strict=True)]
            cpu = [r[1] / r[3] for r in rounds]
            print(json.dumps({
                "stage": stage, "ours_cpu_ms": round(1000 * columns[1], 1), "trl_cpu_ms": round(1000 * columns[3], 1),
                "ratio_cpu": round(statistics.median(cpu), 3), "lowest": round(min(cpu), 3),
                "highest": round(max(cpu), 3), "ratio_wall": round(statistics.median(r[0] / r[2] for r in rounds), 3),
            }), flush=True)  # fmt: skip
        if args.records:
            gsm8k = ("data.name=gsm8k", f"data.path={args.records}/train.jsonl", "training.max_length=1024")
            packing = ("sft.packing=true", "training.effective_batch_size=2", "training.per_device_train_batch_size=1")
            rates = []
            for _ in range(args.rounds):
                (mine, tokens), (plain, trl_tokens) = (
                    ours(base, start, "sft", args.steps, *gsm8k, *packing),
                    theirs(base, start, "sft", args.steps, *gsm8k, defaults=True),
                )
                rates.append([n / x for n, steps in ((tokens, mine), (trl_tokens, plain)) for x in medians(steps)])
            print(json.dumps({
                "stage": "sft of GSM8K, packed, against TRL's defaults",
                "ours_tokens_per_cpu_second": round(statistics.median(r[1] for r in rates)),
                "trl_tokens_per_cpu_second": round(statistics.median(r[3] for r in rates)),
                "ratio_cpu": round(statistics.median(r[1] / r[3] for r in rates), 3),
                "ratio_wall": round(statistics.median(r[0] / r[2] for r in rates), 3),
            }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
