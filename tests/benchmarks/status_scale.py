"""Seconds and memory of a look at many runs:  python -m tests.benchmarks.status_scale [--pipelines 200] [--keep FOLDER]

Makes pipelines of five runs with ten attempts each, with ledgers, metrics and configs as real runs leave them, and a
stand-in for squeue that knows their jobs. Then runs the command as a process, and prints the median of the seconds
from the start of Python (and of its CPU seconds: the figure that a busy machine leaves alone), the peak memory and the
number of squeue's calls.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = {"base": (), "sft": ("base",), "rm": ("sft",), "ppo": ("sft", "rm"), "grpo": ("ppo",)}
ATTEMPTS, SAVES, STEPS = 10, 4, 4000


def config(base: Path, pipeline: str, name: str) -> dict[str, Any]:
    """A frozen config, as long as real ones are."""
    folder = base / pipeline
    inputs: dict[str, Any] = {
        role: {"path": str(folder / up / "model"), "run_dir": str(folder / up), "identity": "2feee70932afc798"}
        for role, up in zip(("model", "reward_model"), STAGES[name], strict=False)
    }
    return {
        "version": 1, "name": name, "stage": name, "pipeline": pipeline, "identity": "00fa885bc706f54c", "seed": 0,
        "offline": False,
        "model": {
            "name_or_path": None, "dtype": "bfloat16", "attn_implementation": "sdpa", "tokenizer": "bytes",
            "chat_template": "think_answer", "hidden_size": 128, "intermediate_size": 384, "num_layers": 2,
            "num_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.08, "tie_word_embeddings": True,
        },
        "data": {
            "name": "arithmetic", "path": None, "eval_path": None, "held_out": 1024, "max_samples": None,
            "num_documents": 25600, "num_demonstrations": 8000, "num_pairs": 2000, "num_prompts": 4000,
            "worked_fraction": 0.7, "seed": 0,
        },
        "training": {
            "max_steps": STEPS, "num_training_samples": None, "num_training_tokens": None, "num_train_epochs": 1.0,
            "effective_batch_size": 32, "per_device_train_batch_size": 32, "max_length": 64, "lr_scheduler": "cosine",
            "warmup_steps": 20, "weight_decay": 0.0, "adam_beta2": 0.98, "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
        },
        "checkpointing": {"save_steps": 100, "save_total_limit": 2, "inference_checkpoint_steps": None},
        "slurm": {
            "partition": "gpu", "account": None, "qos": None, "num_nodes": 2, "gpus_per_node": 8, "gpu_type": "h100",
            "cpus_per_gpu": 8, "mem": None, "wall_time": "24:00:00", "signal_time_seconds": 600, "max_failures": 3,
            "modules": ["cuda/12.4"], "setup": ["source ~/env/bin/activate"], "env": {"NCCL_DEBUG": "WARN"},
            "constraint": None, "exclude": None,
        },
        "cluster": {
            "name": "h100", "scheduler": "slurm", "slurm_cluster": "h100", "slurm_conf": None, "python": None,
        },
        "parallel": {"strategy": "ddp", "backend": None, "timeout_minutes": 30},
        "logging": {"steps": 10, "report_to": ["tensorboard"]},
        "paths": {"output_base": str(base)},
        "inputs": {"model": None, "reference": None, "reward_model": None} | inputs,
        "sft": {"lr": 0.002, "packing": False},
        "eval": {"max_new_tokens": 256, "batch_size": 256, "num_problems": 512},
    }  # fmt: skip


def ledger(job: str, start: float, attempts: int, state: str) -> tuple[list[dict[str, Any]], int]:
    """The events of a run of so many attempts, each stopped at its wall time, and the last step it did."""
    events: list[dict[str, Any]] = [{"time": start, "event": "submitted", "job_id": job, "cluster": "h100"}]
    day, step = 80000.0, 0
    for number in range(1, attempts + 1):
        begun = start + 300 + (number - 1) * (day + 200)
        nodes = ["gpu-001", "gpu-002"]
        job_fields = {"job_id": job, "node": nodes[0], "nodes": nodes, "slurm_cluster": "h100"}

        def add(after: float, event: str, begun: float = begun, number: int = number, **fields: Any) -> None:
            events.append({"time": round(begun + after, 3), "event": event, "attempt": number, **fields})

        add(0, "attempt_started", restart_count=number - 1, **job_fields)
        add(90.5, "training_started", step=step)
        for save in range(1, SAVES + 1):
            step += STEPS // (attempts * SAVES)
            add(90 + save * day / (SAVES + 1), "checkpoint_saved", step=step, seconds=21.43)
        last = number == attempts
        if last and state == "running":
            break
        finished = last and state == "done"
        if not finished:
            add(day - 120, "stop_requested", signal="USR1")
            add(day - 60, "stopped", step=step)
        ends = ("finished", "exit") if finished else ("crashed", "exit") if last and state == "failed" else (
            "stopped", "requeue")  # fmt: skip
        add(day, "attempt_ended", code=0 if finished else 85, outcome=ends[0], action=ends[1], reason=None, step=step,
            seconds={"startup": 88.1, "steps": day - 300.0, "redone": 0.0, "saving": 85.7, "evaluation": 30.2},
            measured_until=round(begun + day - 50, 3), gave_up=ends[0] == "crashed")  # fmt: skip
    return events, step


def make(base: Path, pipelines: int) -> dict[str, int]:
    """The tree, and squeue's answer beside it. Returns how many runs are in which state."""
    counts: dict[str, int] = {}
    answer, number, now = [], 1000, time.time()
    for p in range(pipelines):
        pipeline, graph = f"run-{p:04}", {}
        for s, (name, after) in enumerate(STAGES.items()):
            here = p % 5  # how far this pipeline has come
            state = "done" if s < here else "waiting" if s > here else ("failed" if p % 20 == 5 else "running")
            counts[state] = counts.get(state, 0) + 1
            number += 1
            job, run = str(number), base / pipeline / name
            for folder in (run / "logs", run / "slurm", run / "checkpoints"):
                folder.mkdir(parents=True)
            (run / "config.yaml").write_text(yaml.dump(config(base, pipeline, name), sort_keys=False))
            (run / "slurm" / "job.sh").write_text("#!/bin/bash\n")
            start = now - 10 * 80200 - 4000
            events, step = ledger(job, start, ATTEMPTS, state)
            if state == "waiting":  # it ran before, and was submitted again: as many attempts as the others have
                events.append(events[0] | {"time": start + 10 * 80200 + 400})
                answer.append(f"{job}|PENDING|Dependency|0:00|1-00:00:00|2||gpu|N/A|N/A|afterok:1|{run} token=ab")
            elif state == "running":
                answer.append(f"{job}|RUNNING|None|1:05:00|1-00:00:00|2|gpu-[001-002]|gpu|N/A|N/A||{run} token=ab")
            (run / "ledger.jsonl").write_text(
                "".join(json.dumps({**event, "version": 1}, separators=(",", ":")) + "\n" for event in events)
            )
            lines = [
                {"step": i, "max_steps": STEPS, "time": round(now - 4000 + i, 3), "loss": 2.345678 - i / STEPS,
                 "grad_norm": 5.6656036376953125, "learning_rate": 0.0009000000000000001, "entropy": 0.8163590464327,
                 "mean_token_accuracy": 0.35022247499889797, "num_tokens": 7822.0 * i, "epoch": 0.04,
                 "tokens_per_second_per_gpu": 4123.25, "mfu": 0.41}
                for i in range(10, max(step - 40, 20), 10)
            ]  # fmt: skip
            (run / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if state == "running":
                figures = {"attempt": ATTEMPTS, "step": step, "time": now, "phase": "steps", "longest_step": 1.5,
                           "seconds": {"startup": 88.0, "steps": 3000.0, "redone": 0.0, "saving": 80.0,
                                       "evaluation": 0.0}, "save": 21.0, "version": 1}  # fmt: skip
                (run / "slurm" / "progress.json").write_text(json.dumps(figures))
            if state == "done":
                files = {}
                (run / "model").mkdir()
                for file in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json",
                             *(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5))):  # fmt: skip
                    (run / "model" / file).write_text("x")
                    files[file] = {"bytes": 1, "sha256": "0" * 64}
                text = json.dumps({"version": 1, "stage": name, "step": step, "files": files}, indent=1)
                (run / "model" / "manifest.json").write_text(text)
            graph[name] = {"run_dir": str(run), "stage": name, "after": list(after)}
        text = json.dumps({"version": 1, "name": pipeline, "cluster": "h100", "stages": graph}, indent=1)
        (base / pipeline / "pipeline.json").write_text(text)
    tools = base.parent / "bin"
    tools.mkdir()
    (tools / "answer").write_text("".join(line + "\n" for line in answer))
    (tools / "squeue").write_text(f'#!/bin/sh\necho >>"{tools}/calls"\nexec cat "{tools}/answer"\n')
    (tools / "squeue").chmod(0o755)
    return counts


def once(base: Path, *argv: str) -> tuple[float, float, float, int]:
    """One look: seconds, CPU seconds, peak MB, squeue's calls."""
    tools = base.parent / "bin"
    (tools / "calls").write_text("")
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "launchers.status", f"paths.output_base={base}", *argv]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"status ended with {process.returncode}")
    seconds = time.monotonic() - begun
    calls = len((tools / "calls").read_text().splitlines())
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", type=int, default=200, help="of five runs each")
    parser.add_argument("--looks", type=int, default=7, help="of which the median is told")
    parser.add_argument("--keep", type=Path, help="make the tree here and leave it")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="status-scale-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / "outputs"
        if not base.exists():
            counts = make(base, given.pipelines)
            print(f"{sum(counts.values())} runs of {ATTEMPTS} attempts: {counts}")
        for argv in ([], ["--json"]):
            looks = [once(base, *argv) for _ in range(given.looks)]
            seconds, cpu, memory, calls = (statistics.median(column) for column in zip(*looks, strict=True))
            least = min(look[0] for look in looks)
            print(f"status {' '.join(argv):7} {seconds:5.2f} s (least {least:.2f} s; CPU {cpu:.2f} s), "
                  f"{memory:.0f} MB, {calls:g} squeue")  # fmt: skip
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
