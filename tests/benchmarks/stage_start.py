"""How long a stage takes from Python's start to its first step, beside a plain TRL script.

    python -m tests.benchmarks.stage_start [--pairs 4]

By turns: an attempt of sft as a job starts it (`python -m post_training.train`), and a script that imports TRL, loads
the same model and records, and trains. Seconds from the process's start to the end of its first step, by the clock on
the wall, and of the process's CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import json, sys, time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model, records, out = sys.argv[1:4]
class First(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print(json.dumps({"first_step": time.time(), "cpu": time.process_time()}), flush=True)
        control.should_training_stop = True

tokenizer = AutoTokenizer.from_pretrained(model)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"), processing_class=tokenizer,
    train_dataset=Dataset.from_list([json.loads(line) for line in open(records)]), callbacks=[First()],
    args=SFTConfig(output_dir=out, per_device_train_batch_size=32, max_length=64, assistant_only_loss=True, bf16=False,
                   gradient_checkpointing=False, use_cpu=True, report_to=[], max_steps=100, disable_tqdm=True),
)
trainer.train()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    args = parser.parse_args()
    import psutil

    from post_training import data
    from post_training.stages.common import load_config
    from tests.training import Attempt, base_environment, make_run, metrics

    size = ["model.hidden_size=128", "model.intermediate_size=384", "model.num_layers=2", "model.num_heads=4"]
    sft = [
        *size, "data.num_demonstrations=8000", "training.effective_batch_size=32",
        "training.per_device_train_batch_size=32", "training.max_steps=100", "checkpointing.save_steps=500",
    ]  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "plain_trl": []}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        start = Attempt(make_run(base, "base", *size, "training.max_steps=1", name="start")).finish().model
        records = base / "records.jsonl"
        rows = data.load(load_config(make_run(base, "sft", *sft, name="records", model=start).read_config()).data)
        with records.open("w") as file:
            file.writelines(json.dumps({"messages": row["messages"]}) + "\n" for row in rows.demonstrations("train"))
        for number in range(args.pairs):
            run = make_run(base, "sft", *sft, name=f"sft-{number}", model=start)
            began = time.time()
            attempt = Attempt(run, fork=False)  # with its imports, as a job starts it
            attempt.wait_until(lambda run=run: any("loss" in m for m in metrics(run)), "a step")
            cpu = psutil.Process(attempt.processes[0].pid).cpu_times()
            found["ours"].append((metrics(run)[0]["time"] - began, cpu.user + cpu.system))
            attempt.kill()
            began = time.time()
            command = [sys.executable, "-c", PLAIN, str(start), str(records), str(base / f"plain-{number}")]
            done = subprocess.run(command, env=base_environment(), capture_output=True, text=True, check=True)
            first = next(line for line in done.stdout.splitlines() if line.startswith('{"first_step"'))
            told = json.loads(first)
            found["plain_trl"].append((told["first_step"] - began, told["cpu"]))
    for which, name in enumerate(("wall", "cpu")):
        mine, plain = ([times[which] for times in found[kind]] for kind in ("ours", "plain_trl"))
        ratios = sorted(a / b for a, b in zip(mine, plain, strict=True))
        print(json.dumps({
            "clock": name, "ours_s": round(statistics.median(mine), 2), "trl_s": round(statistics.median(plain), 2),
            "ratio": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
