"""Submitting six chained stages, against submitit's own chain of six trivial jobs; and one look with status.

    python -m tests.benchmarks.submit_chain [--rounds 5]

Both run on one emulated cluster, in turn (A B A B ...), each from the start of its Python to its end. What counts
is the ratio of each pair: the machine's speed drifts, the ratio does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launchers import devcluster

PROJECT = Path(__file__).resolve().parents[2]
SIX = """
name: six
stages:
  base: {stage: base}
  sft: {stage: sft, model: base}
  rm: {stage: rm, model: sft}
  dpo: {stage: dpo, model: sft, after: [rm]}
  ppo: {stage: ppo, model: dpo}
  grpo: {stage: grpo, model: ppo}
"""
SUBMITIT = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
job = None
for i in range(6):
    more = {"dependency": f"afterok:{job.job_id}"} if job else {}
    executor.update_parameters(partition="gpu", time=60, **more)
    job = executor.submit(print, i)
"""


def seconds(argv: list[str], env: dict[str, str], cwd: Path) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(argv, env=env, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp(prefix="ptb-", dir="/tmp"))
    try:
        cluster = devcluster.up(folder / "c")
        copy = folder / "project"
        for part in ("conf", "launchers", "post_training", "templates"):
            shutil.copytree(PROJECT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "conf" / "pipeline" / "six.yaml").write_text(SIX)
        env = {**cluster.env, "PYTHONPATH": str(copy)}
        conf = f"cluster.slurm_conf={cluster.conf}"
        ours, theirs, look = [], [], []
        for i in range(rounds + 1):  # the first round compiles and warms up, and is not counted
            base = f"paths.output_base={folder}/ours{i}"
            argv = [sys.executable, "-m", "launchers.pipeline", "pipeline=six", "cluster=dev", conf, base]
            a = seconds(argv, env, copy)
            b = seconds([sys.executable, "-c", SUBMITIT, f"{folder}/theirs{i}"], env, copy)
            c = seconds([sys.executable, "-m", "launchers.status", base], env, copy)
            if i:
                ours.append(a)
                theirs.append(b)
                look.append(c)
            ids = cluster.run("squeue", "--noheader", "--format=%i").split()
            if ids:
                cluster.run("scancel", *ids)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        for name, values, unit in (
            ("launchers.pipeline, six stages", ours, " s"),
            ("submitit, six trivial jobs", theirs, " s"),
            ("ratio, pair by pair", ratios, ""),
            ("launchers.status, one pipeline", look, " s"),
        ):
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"{name:32} median {middle:.2f}{unit}  (min {low:.2f}, max {high:.2f}; {rounds} rounds)")
        print(f"machine: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        return 0
    finally:
        devcluster.down(folder / "c")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
