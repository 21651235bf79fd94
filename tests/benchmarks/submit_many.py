"""Submitting a thousand chains that stay queued, as one sweep: seconds a job, with and without job arrays.

    python -m tests.benchmarks.submit_many [--chains 1000] [--profile]

On an emulated cluster of its own whose nodes are drained. A chain is two stages, none of which is shared. What is
timed is the whole command, from the start of its Python to its end; then one look with status at all of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from launchers import devcluster
from tests.benchmarks.submit_chain import PROJECT, seconds

TWO = """
name: two
stages:
  base: {stage: base}
  sft: {stage: sft, model: base}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by cProfile")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ptb-", dir="/tmp"))
    try:
        cluster = devcluster.up(folder / "c")
        cluster.run("scontrol", "update", "nodename=ALL", "state=drain", "reason=benchmark")
        copy = folder / "project"
        for part in ("conf", "launchers", "post_training", "templates"):
            shutil.copytree(PROJECT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "conf" / "pipeline" / "two.yaml").write_text(TWO)
        env = {**cluster.env, "PYTHONPATH": str(copy)}
        python = [sys.executable, *(["-m", "cProfile", "-s", "tottime"] if args.profile else [])]
        for how, more in (("a job each", []), ("arrays", ["slurm.array_parallelism=50"])):
            base = f"paths.output_base={folder}/{how.replace(' ', '-')}"
            argv = [
                *python, "-m", "launchers.pipeline", "-m", "pipeline=two", "cluster=dev",
                f"cluster.slurm_conf={cluster.conf}", base, f"seed=range(0,{args.chains})", *more,
            ]  # fmt: skip
            if args.profile:
                text = subprocess.run(argv, env=env, cwd=copy, check=True, capture_output=True, text=True).stdout
                print("\n".join(text.splitlines()[:70]))
            else:
                took = seconds(argv, env, copy)
                ids = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
                jobs = 2 * args.chains
                assert len(ids) == jobs, f"{len(ids)} of {jobs} jobs are in the queue"
                print(f"{how:11} {jobs} jobs in {took:.1f} s: {took / jobs:.4f} s a job", flush=True)
                look = seconds([sys.executable, "-m", "launchers.status", base], env, copy)
                print(f"{'':11} status of all of it: {look:.2f} s", flush=True)
            cluster.run("scancel", "--user=root")
        print(f"machine: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        return 0
    finally:
        devcluster.down(folder / "c")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
