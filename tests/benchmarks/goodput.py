"""Goodput under a planned stop every two minutes, on the emulated cluster.

    python -m tests.benchmarks.goodput [--steps 3000]

The quickstart's base stage with a wall time of 3 minutes and a lead of 1: each attempt is asked to stop after two.
Prints what `launchers.status --json` says of it when it is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time

from launchers import devcluster as dc
from tests.slurm_fixture import short_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    folder = short_folder()
    try:
        cluster = dc.up(folder)
        where = [f"paths.output_base={folder}/outputs"]
        subprocess.run(
            [sys.executable, "-m", "launchers.submit", "pipeline=quickstart", "stage=base", "cluster=dev",
             f"cluster.slurm_conf={cluster.conf}", f"base.training.max_steps={args.steps}", "slurm.wall_time=3",
             "slurm.signal_time_seconds=60", "base.checkpointing.save_steps=100000", *where],
            env=cluster.env, check=True,
        )  # fmt: skip
        row = {"state": "queued"}
        while row["state"] not in ("done", "failed", "cancelled"):
            time.sleep(5)
            said = subprocess.run(
                [sys.executable, "-m", "launchers.status", "--json", *where],
                env=cluster.env, check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            row = json.loads(said)["runs"][0]
        keys = ("state", "attempts", "failures", "goodput", "held_seconds", "seconds", "lost_by_cause")
        print(json.dumps({key: row[key] for key in keys}, indent=1))
    finally:
        dc.down(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if row["state"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
