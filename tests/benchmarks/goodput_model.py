"""Goodput as launchers.simulate foretells it, beside goodput as real runs on the emulated cluster had it.

    python -m tests.benchmarks.goodput_model [--seeds 12] [--trained] [--record FILE] [--recorded FILE]

Job script, SLURM, requeues, ledger and its account are the real ones. The training process is a paced one: it sleeps
for its start, its steps and its saves, and otherwise does as the trainer does (it stops on request, saves, leaves, and
goes on from its newest save), so that many runs fit on one machine and its load changes little.

    calibration    killed 40 s after each start; all of the model's seconds are measured here, and nowhere else
    planned-<n>    a wall time of n minutes and a lead of 1: stop after stop, no kill
    kill-<seed>    kill -9 of the training process, exponential in the seconds since the attempt began
    both-<seed>    kills, and a wall time of 3 minutes

All runs are alive at once, so that the machine's load is the same for all: it changes start-up by seconds. Each run is
foretold from the calibration's seconds and the settings alone: `mean` over draws of the model's own, and `foretold`
with the kill times that the run's seed drew. Measured is the ledger's account (post_training.run.accounting).

--trained has the quickstart's base stage train instead, one run after the other: then what the calibration measured
before holds as far as the machine's load stays. --record keeps the ledgers; --recorded compares kept ones and starts
no cluster (tests/golden/goodput.json was recorded so, fields that nobody reads left out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

from conf.schema import Cluster, Config, Slurm
from launchers import devcluster as dc
from launchers import simulate
from launchers.executor import RunExecutor
from launchers.render import job_script
from launchers.submit import snapshot
from post_training.run import accounting, ledger, manifest
from post_training.run.directory import RunDirectory
from tests.slurm_fixture import short_folder

ROOT = Path(__file__).resolve().parent.parent.parent
PACE = {"startup": 5.0, "step": 0.2, "save": 0.5}
STEPS, SAVE_STEPS, MTTF_S = 600, 50, 90.0
CALIBRATION_KILL_S = 40.0
PLANNED_ONLY = 10**6
"""Steps between saves of the runs that are not killed: they save when they are stopped."""

PACED = """
import json, os, sys, time
from pathlib import Path
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from post_training.run.progress import Progress

run, attempt = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"])
pace = json.loads((run.root / "pace.json").read_text())
saved = run.root / "saved"
reached = summarise(ledger.read(run.ledger)).last_step
progress = Progress(run, attempt, reached, writes=True)
(run.root / f"pid-{attempt}").write_text(str(os.getpid()))
time.sleep(pace["startup"])
step = int(saved.read_text()) if saved.exists() else 0

def record(event, **fields):
    with run.writing_as(attempt):
        ledger.append(run.ledger, event, attempt=attempt, step=step, **fields)

record("training_started")
progress.training(step)
while step < pace["steps"]:
    time.sleep(pace["step"])
    step += 1
    progress.stepped(step)
    asked = run.stop_requested(attempt)
    if asked or step % pace["save_steps"] == 0 or step == pace["steps"]:
        progress.enter("saving")
        began = time.monotonic()
        time.sleep(pace["save"])
        partial = saved.with_name("saved.partial")
        partial.write_text(str(step))
        partial.replace(saved)
        record("checkpoint_saved", seconds=round(time.monotonic() - began, 3))
        progress.training(step)
    if asked and step < pace["steps"]:
        record("stopped")
        progress.write(force=True)
        sys.exit(life.STOPPED)
progress.write(force=True)
run.model.mkdir(exist_ok=True)
(run.model / "weights").write_text("w")
manifest.write(run.model, identity="x")
"""


class Paced:
    """A run whose job is submitted as the launcher does, with a paced training process."""

    def __init__(
        self, cluster: dc.Cluster, base: Path, name: str, kills: list[float], wall_minutes: int = 60,
        save_steps: int = SAVE_STEPS, steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.name, self.kills, self.struck = name, kills, set[int]()
        self.about = {"steps": steps, "save_steps": save_steps, "wall_minutes": wall_minutes}
        self.run = RunDirectory(base / name / "sft")
        cfg = Config(
            cluster=Cluster(name="dev", scheduler="slurm", slurm_conf=str(cluster.conf)),
            slurm=Slurm(
                partition="gpu", gpus_per_node=1, cpus_per_gpu=1, wall_time=str(wall_minutes), signal_time_seconds=60,
                max_failures=1000, max_attempts_without_progress=1000,
            ),
        )  # fmt: skip
        self.run.create()
        for file, content in snapshot().items():
            if file.startswith("post_training/run/") or file == "post_training/__init__.py":
                path = self.run.code / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (self.run.code / "post_training/train.py").write_text(PACED)
        (self.run.root / "pace.json").write_text(json.dumps({**PACE, "steps": steps, "save_steps": save_steps}))
        frozen = {"slurm": vars(cfg.slurm), "cluster": vars(cfg.cluster), "inputs": {"model": None}, "stage": "sft"}
        self.run.config.write_text(yaml.safe_dump(frozen))
        RunExecutor(self.run, job_script(cfg, self.run, sys.executable), "dev", str(cluster.conf)).submit_run()

    def done(self) -> bool:
        """Whether it is; kills its training process where that is due."""
        events = ledger.read(self.run.ledger)
        started = [event for event in events if event["event"] == "attempt_started"]
        if events and events[-1]["event"] == "attempt_ended" and events[-1]["outcome"] == "finished":
            return manifest.problem(self.run.model) is None
        if started and started[-1]["attempt"] not in self.struck:
            attempt, began = started[-1]["attempt"], started[-1]["time"]
            due = self.kills[attempt - 1] if attempt <= len(self.kills) else float("inf")
            if time.time() - began >= due and (pid := self._pid(attempt)) is not None:
                self.struck.add(attempt)
                with contextlib.suppress(ProcessLookupError):  # it had left by itself
                    os.kill(pid, signal.SIGKILL)
                    print(f"{self.name}: attempt {attempt} killed after {due:.1f} s", file=sys.stderr, flush=True)
        return False

    def _pid(self, attempt: int) -> int | None:
        """Of its training process, once that is there."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.run.root / f"pid-{attempt}").read_text())
        return None

    def record(self) -> dict[str, Any]:
        return {"name": self.name, **self.about, "kills": self.kills, "events": ledger.read(self.run.ledger)}


class Trained(Paced):
    """A run of the quickstart's base stage, submitted with the launcher's own command.

    Each with a seed of its own: else the second would be taken for done, as the first one's like.
    """

    def __init__(
        self, cluster: dc.Cluster, base: Path, name: str, kills: list[float], wall_minutes: int = 60,
        save_steps: int = SAVE_STEPS, steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.name, self.kills, self.struck = name, kills, set[int]()
        self.about = {"steps": 2 * steps, "save_steps": save_steps, "wall_minutes": wall_minutes}
        self.run = RunDirectory(base / name / "base")
        subprocess.run(
            [sys.executable, "-m", "launchers.submit", "pipeline=quickstart", "stage=base", f"run_name={name}",
             f"seed={int.from_bytes(name.encode()) % 10**6}",
             "cluster=dev", f"cluster.slurm_conf={cluster.conf}", f"paths.output_base={base}",
             f"base.training.max_steps={2 * steps}", f"slurm.wall_time={wall_minutes}",
             "slurm.signal_time_seconds=60", f"base.checkpointing.save_steps={save_steps}", "logging.report_to=[]",
             "slurm.max_failures=1000", "slurm.max_attempts_without_progress=1000"],
            cwd=ROOT, env=cluster.env, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def _pid(self, attempt: int) -> int | None:
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command[1:] == ["-m", "post_training.train", str(self.run.root)] and "python" in command[0]:
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("POST_TRAINING_ATTEMPT") == str(attempt):
                        return int(process.pid)
        return None


def measure_training(seeds: int) -> list[dict[str, Any]]:
    """Real training, which keeps the machine busy: one run after the other."""
    folder = short_folder()
    found = []
    try:
        cluster, base = dc.up(folder), folder / "outputs"
        settings: list[tuple[str, list[float], int, int]] = [
            ("calibration", [CALIBRATION_KILL_S], 60, 2 * SAVE_STEPS),
            ("planned-3", [], 3, PLANNED_ONLY),
            *((f"kill-{n}", drawn(f"kill-{n}"), 60, 2 * SAVE_STEPS) for n in range(1, seeds + 1)),
        ]
        for name, kills, minutes, save_steps in settings:
            one = Trained(cluster, base, name, kills, minutes, save_steps)
            _wait([one])
            found.append(one.record())
        return found
    finally:
        dc.down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def measure(seeds: int) -> list[dict[str, Any]]:
    """Run everything side by side on a cluster of its own."""
    folder = short_folder()
    try:
        cluster, base = dc.up(folder), folder / "outputs"
        together = [Paced(cluster, base, "calibration", [CALIBRATION_KILL_S] * 60)]
        for minutes in (2, 3):
            together.append(Paced(cluster, base, f"planned-{minutes}", [], minutes, PLANNED_ONLY))
        for seed in range(1, seeds + 1):
            together.append(Paced(cluster, base, f"kill-{seed}", drawn(f"kill-{seed}")))
        for seed in range(1, seeds // 2 + 1):
            together.append(Paced(cluster, base, f"both-{seed}", drawn(f"both-{seed}"), 3))
        _wait(together)
        return [one.record() for one in together]
    finally:
        dc.down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def drawn(name: str) -> list[float]:
    """Seconds into each attempt at which it is killed, if it lives that long."""
    random = Random(name)
    return [round(random.expovariate(1 / MTTF_S), 3) for _ in range(60)]


def _wait(runs: list[Paced]) -> None:
    told = 0.0
    while waiting := [one for one in runs if not one.done()]:
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"waiting for {', '.join(one.name for one in waiting)}", file=sys.stderr, flush=True)
        time.sleep(0.1)


# --------------------------------------------------------------------------------------- the comparison


def calibrate(run: dict[str, Any]) -> dict[str, float]:
    """The model's seconds, from the calibration run alone: all of its attempts but the last were killed."""
    *killed, done = (span for span in accounting.spans(run["events"]) if span.attempt is not None)
    began = {e["attempt"]: e["time"] for e in run["events"] if e["event"] == "attempt_started"}
    training = {e["attempt"]: e["time"] for e in run["events"] if e["event"] == "training_started"}
    last = next(e["step"] for e in run["events"] if e["event"] == "training_started" and e["attempt"] == done.attempt)
    return {
        "startup_seconds": statistics.mean(training[n] - began[n] for n in training),
        "step_seconds": (done.seconds["steps"] + done.seconds.get("redone", 0.0)) / (run["steps"] - last),
        "save_seconds": statistics.mean(e["seconds"] for e in run["events"] if e["event"] == "checkpoint_saved"),
        "teardown_seconds": done.seconds.get("teardown", 0.0),
        "detect_seconds": statistics.mean(max(0.0, one.end - one.start - CALIBRATION_KILL_S) for one in killed),
    }


def life_for(run: dict[str, Any], seconds: dict[str, float]) -> simulate.Life:
    """The model of a run: the calibration's seconds, and its own settings."""
    save_steps = None if run["save_steps"] == PLANNED_ONLY else run["save_steps"]
    return simulate.Life(
        steps=run["steps"], **seconds, save_steps=save_steps, wall_seconds=60 * run["wall_minutes"], lead_seconds=60,
        hold_seconds=0.0, node_mttf_seconds=MTTF_S if run["kills"] else math.inf, max_attempts_without_progress=1000,
    )  # fmt: skip


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run but the calibration: goodput foretold, with its own kill times and on average, and measured."""
    seconds = calibrate(runs[0])
    rows = []
    for run in runs[1:]:
        life = life_for(run, seconds)
        measured = accounting.account(run["events"])
        if run["kills"]:
            told = [simulate.live(life, Random(i), chain(run["kills"], repeat(math.inf))) for i in range(200)]
            drawn_ones = sum(one.seconds["steps"] for one in told) / sum(one.held for one in told)
        else:
            drawn_ones = None
        mean = simulate.forecast(life).mean_goodput
        rows.append({
            "name": run["name"], "held": measured.held, "steps": measured.seconds["steps"],
            "attempts": sum(e["event"] == "attempt_started" for e in run["events"]),
            "measured": measured.goodput, "drawn": drawn_ones, "mean": mean, "seconds": measured.seconds,
        })  # fmt: skip
    return rows


def show(runs: list[dict[str, Any]]) -> None:
    print("calibration: " + ", ".join(f"{key} {value:.3f}" for key, value in calibrate(runs[0]).items()))
    rows = compare(runs)
    print(f"{'RUN':12}{'ATTEMPTS':>9}{'HELD':>7}{'MEASURED':>10}{'FORETOLD':>10}{'OFF BY':>8}{'MEAN':>8}")
    for row in rows:
        told = row["mean"] if row["drawn"] is None else row["drawn"]
        figures = f"{100 * row['measured']:>8.1f} %{100 * told:>8.1f} %{100 * (told - row['measured']):>+8.1f}"
        print(f"{row['name']:12}{row['attempts']:>9}{row['held']:>7.0f}{figures}{100 * row['mean']:>6.1f} %")
    for kind in KINDS:
        if any(row["name"].startswith(kind) for row in rows):
            measured, told = together(rows, kind)
            off = f"{100 * (told - measured):+.1f} points"
            print(f"{kind}: measured {100 * measured:.1f} %, foretold {100 * told:.1f} %, off by {off}")


KINDS = ("planned", "kill", "both")


def together(rows: list[dict[str, Any]], kind: str) -> tuple[float, float]:
    """Goodput of all runs of a kind as one: measured, and foretold for the same runs. A forecast's steps are the
    run's, so its held time is their seconds over its goodput."""
    group = [row for row in rows if row["name"].startswith(kind)]
    measured = sum(row["steps"] for row in group) / sum(row["held"] for row in group)
    told = [row["mean"] if row["drawn"] is None else row["drawn"] for row in group]
    return measured, len(told) / sum(1 / share for share in told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="runs that are killed; half as many get both")
    parser.add_argument("--trained", action="store_true", help="real training, one run after the other; no both-<seed>")
    parser.add_argument("--record", type=Path, help="keep the ledgers in this file")
    parser.add_argument("--recorded", type=Path, help="compare these ledgers; no cluster is started")
    args = parser.parse_args()
    if args.recorded:
        runs = json.loads(args.recorded.read_text())
    else:
        runs = (measure_training if args.trained else measure)(args.seeds)
    if args.record:
        args.record.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n", encoding="utf-8")
    show(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
