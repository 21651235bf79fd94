"""What a command will cost and how it will go, before it is submitted:  python -m launchers.plan [key=value ...]

`estimate` is pure: it puts a stage's config and what is known of its seconds into launchers.simulate. `known_of` finds
what earlier runs measured, `act` asks SLURM when a job would start and prints. Nothing is written or submitted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf import memory
from conf.check import SAMPLING, ConfigError, gpus_per_node, parse_wall_time, world_size
from conf.schema import UNTRAINED, Config
from launchers import cli, graph, site, slurm, table
from launchers.errors import LaunchError
from launchers.preflight import shape_known
from launchers.selection import Selection, select
from launchers.simulate import EARLY_S, Life, best_interval, forecast, quantiles, with_nodes
from post_training.run import accounting
from post_training.run.directory import RunDirectory, load_yaml

USAGE = """
usage: python -m launchers.plan [stage=<stage>] [pipeline=<pipeline>] [<key>=<value> ...] [options]

Says what a stage, or without stage= a whole pipeline, will take: steps, seconds a step, requeues, goodput, GPU-hours,
memory, room on the disk, and when SLURM would start it. Nothing is written or submitted.

What runs below paths.output_base have measured is taken from them; the rest is estimated or assumed, and says so.

options:
  --step-seconds STAGE=SECONDS   seconds of an optimizer step, where you know them; may be given again
  --steps STAGE=STEPS            optimizer steps, where the length of the data is not known; may be given again
  --mttf-hours HOURS             mean time to failure of one node (500)
  --preempted-every-hours HOURS  mean time until an attempt is preempted; 0: never (0)
  --detect-seconds SECONDS       from a failure to the end of its attempt (300, SlurmdTimeout's default)
  --startup-seconds SECONDS      an attempt's start-up, where none was measured (120)
  --mfu SHARE                    share of the GPUs' peak that steps reach, where none was measured (0.4)
  --peak-tflops TFLOPS           the peak of one GPU, dense in the model's dtype (989, an H100 in bfloat16)
  --write-gb-per-second GB       rate at which checkpoints are written, where no save was measured (1)
  --nodes 1,8,125,1000           the longest stage's goodput at these numbers of nodes, saving as often as is best
  --no-queue                     SLURM is not asked when it would start the jobs
  --json                         the same as JSON
"""
TEARDOWN_S = 10.0
"""From an attempt's last save to its end, where none was measured."""
NEWEST_RUNS = 300
"""So many runs below paths.output_base are looked into, the newest."""
ESTIMABLE = ("base", "sft", "distill", "rm", "dpo", "orpo", "kto")
"""Stages whose steps are passes of the trained model; ppo, grpo and rloo also generate, at a rate nobody knows yet."""
GENERATED = {
    "base": "num_documents", "sft": "num_demonstrations", "rm": "num_pairs", "dpo": "num_pairs", "orpo": "num_pairs",
    "kto": "num_pairs", "ppo": "num_prompts", "grpo": "num_prompts", "rloo": "num_prompts",
}  # fmt: skip
"""How many samples data.name=arithmetic makes for a stage: the key of `data`."""


@dataclass(frozen=True)
class Value:
    """A figure and where it is from: measured, estimated, assumed, given, or the config. None: not known, and why."""

    value: float | None
    source: str
    about: str = ""

    def json(self) -> dict[str, Any]:
        return {"value": self.value, "source": self.source, "about": self.about}


@dataclass(frozen=True)
class Assumed:
    """What the command line gives, and assumes where nothing was measured."""

    step_seconds: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    mttf_hours: float = 500.0
    preempted_every_hours: float = 0.0
    detect_seconds: float = 300.0
    startup_seconds: float = 120.0
    mfu: float = 0.4
    peak_tflops: float = 989.0
    write_gb_per_second: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What one earlier run says of its like. Seconds; None where it measured none."""

    run_dir: Path
    config: Mapping[str, Any]  # frozen
    step: float | None = None
    startup: float | None = None
    save: float | None = None
    teardown: float | None = None
    max_steps: int | None = None
    whole: float | None = None  # held from its first start to its end, where it is done


# -------------------------------------------------------------------------------------------- measured


def earlier_runs(output_base: Path, techniques: set[str]) -> list[Measured]:
    """What runs of these techniques below a folder measured, the newest first. Damaged ones are passed over."""
    found: list[tuple[float, Path]] = []
    for path in output_base.glob("*/*/ledger.jsonl"):
        try:
            found.append((path.stat().st_mtime, path.parent))
        except OSError:
            continue
    runs = []
    for _, folder in sorted(found, reverse=True)[:NEWEST_RUNS]:
        run = RunDirectory(folder)
        try:
            config = load_yaml(run.config.read_text(encoding="utf-8"))
        except Exception:  # a YAML parser has many ways to say no
            continue
        if isinstance(config, dict) and config.get("stage") in techniques:
            runs.append(read_measured(run, config))
    return runs


def read_measured(run: RunDirectory, config: Mapping[str, Any]) -> Measured:
    """What this run's ledger and metrics say."""
    story, metrics = table.read_history(run), table.read_metrics(run.metrics)
    startups, saves, began = [], [], None
    for event in story.events:
        match event["event"]:
            case "attempt_started":
                began = event["time"]
            case "training_started" if began is not None:
                startups.append(max(0.0, event["time"] - began))
                began = None
            case "checkpoint_saved":
                if (seconds := table.number(event.get("seconds"))) is not None:
                    saves.append(seconds)
    spans = [s for s in accounting.spans(story.events) if s.cause in ("finished", "planned_stop")]
    held = accounting.account(story.events)
    return Measured(
        run.root, config, metrics.seconds_per_step, _middle(startups), _middle(saves),
        _middle([s.seconds.get("teardown", 0.0) for s in spans]), metrics.max_steps,
        held.held if held.outcome == "finished" else None,
    )  # fmt: skip


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


STEP_KEYS = ("effective_batch_size", "per_device_train_batch_size", "max_length", "gradient_checkpointing",
             "torch_compile")  # fmt: skip
"""Keys of `training` on which a step's seconds depend."""
SAMPLING_KEYS = ("max_completion_length", "num_generations", "num_iterations", "steps_per_generation", "generation")


def alike(cfg: Config, earlier: Mapping[str, Any], exact: bool) -> bool:
    """Whether a run's seconds say something of this one's: technique, model, cluster and world are the same, and, where
    `exact`, what else its time depends on. Keys that a config of before does not have do not count."""

    def same(section: str, keys: Sequence[str]) -> bool:
        there, here = earlier.get(section), getattr(cfg, section)
        return isinstance(there, dict) and all(there[key] == _plain(getattr(here, key)) for key in keys if key in there)

    model = [key for key in vars(cfg.model) if key not in ("tokenizer", "chat_template", "initializer_range")]
    own = vars(getattr(cfg, cfg.stage))
    matters = [key for key in own if key in SAMPLING_KEYS] if cfg.stage in SAMPLING else []
    if cfg.stage in UNTRAINED:
        matters = [key for key in own if key not in ("text", "base_text")]
    return (
        earlier.get("stage") == cfg.stage
        and same("model", model)
        and same("slurm", ("num_nodes", "gpus_per_node", "gpu_type"))
        and same("cluster", ("name",))
        and same("parallel", ("strategy", "offload"))
        and (not exact or (same("training", () if cfg.stage in UNTRAINED else STEP_KEYS) and same(cfg.stage, matters)))
    )


def _plain(value: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _same_data(cfg: Config, earlier: Mapping[str, Any]) -> bool:
    data, training = earlier.get("data"), earlier.get("training")
    here = _plain(cfg.data)
    lengths = ("max_steps", "num_training_samples", "num_training_tokens", "num_train_epochs", "effective_batch_size")
    return (
        isinstance(data, dict) and isinstance(training, dict)
        and all(data[key] == here[key] for key in here if key in data and key != "path")
        and Path(str(data.get("path"))).name == Path(str(cfg.data.path)).name
        and all(training.get(key) == getattr(cfg.training, key) for key in lengths)
    )  # fmt: skip


# ------------------------------------------------------------------------------------- steps and seconds


def steps_of(cfg: Config, name: str, given: Mapping[str, float], runs: Sequence[Measured]) -> Value:
    """Optimizer steps of a stage."""
    training, ask = cfg.training, "say --steps STAGE=STEPS"
    for word in (name, cfg.stage):
        if word in given:
            return Value(given[word], "given")
    if training.max_steps is not None:
        return Value(training.max_steps, "config", "training.max_steps")
    batch = training.effective_batch_size // getattr(getattr(cfg, cfg.stage), "num_generations", 1)
    packed = getattr(getattr(cfg, cfg.stage), "packing", "none") not in ("none", False)
    seen = next((run for run in runs if run.max_steps and _same_data(cfg, run.config)), None)
    if training.num_training_samples is not None and not packed:
        return Value(math.ceil(training.num_training_samples / batch), "config", "training.num_training_samples")
    if seen is not None:
        return Value(seen.max_steps, "measured", f"in {table.near(seen.run_dir)}")
    if training.num_train_epochs is not None and not packed:
        samples = samples_of(cfg)
        if samples is None:
            return Value(None, "unknown", f"how many records {cfg.data.name} keeps is known after preparation; {ask}")
        steps = math.ceil(training.num_train_epochs * math.ceil(samples / batch))
        return Value(steps, "config", f"{training.num_train_epochs:g} epochs of {samples} samples")
    return Value(None, "unknown", f"how many rows the records fill is known after preparation; {ask}")


def samples_of(cfg: Config) -> int | None:
    """Training samples, where the config alone says how many there are: of the generated sums."""
    data = cfg.data
    key = GENERATED.get(cfg.stage)
    filters = data.quality.dedup != "none" or any(
        value is not None for value in (data.quality.min_chars, data.quality.max_chars, data.quality.max_per_category)
    )
    if data.name != "arithmetic" or data.datasets or filters or data.transform or key is None:
        return None
    count = int(getattr(data, key))
    return count if data.max_samples is None else min(count, data.max_samples)


def flops_per_step(cfg: Config, shape: memory.Shape) -> float:
    """Operations of one optimizer step, on all GPUs together, where every row is training.max_length long.

    PaLM (Chowdhery 2022), appendix B, as post_training.throughput counts: 6 N + 12 L H Q T a token; 4 N + 2 N' where
    only N' parameters are trained. A reference model's forward pass is a third of that.
    """
    rows = cfg.training.effective_batch_size * (2 if cfg.stage in memory.PAIRS else 1)
    n = shape.parameters - (0 if shape.tied else shape.embedding_parameters) - shape.positions * shape.hidden
    trained = min(n, memory.trained_parameters(cfg, shape))
    length = cfg.training.max_length
    attention = 12 * shape.layers * shape.queries * length
    forward = 2 * n + attention / 3
    reference = forward if "reference model" in memory.frozen_models(cfg) else 0
    return (4 * n + 2 * trained + attention + reference) * rows * length


def step_seconds_of(
    cfg: Config, name: str, assumed: Assumed, shape: memory.Shape | None, runs: Sequence[Measured]
) -> Value:
    """Seconds of an optimizer step: given, measured, or estimated; never made up."""
    for word in (name, cfg.stage):
        if word in assumed.step_seconds:
            return Value(assumed.step_seconds[word], "given")
    seen = next((run for run in runs if run.step and alike(cfg, run.config, exact=True)), None)
    if seen is not None:
        return Value(seen.step, "measured", f"in {table.near(seen.run_dir)}")
    ask = "say --step-seconds STAGE=SECONDS"
    if cfg.stage not in ESTIMABLE:
        return Value(None, "unknown", f"it generates, and no run like it was measured; {ask}")
    if gpus_per_node(cfg) == 0 or cfg.cluster.name == "dev":
        where = "emulated GPUs" if gpus_per_node(cfg) else "CPUs"
        return Value(None, "unknown", f"no run like it was measured on these {where}; {ask}")
    if shape is None:
        return Value(None, "unknown", f"the model's shape is not known; {ask}, or model.vocab_size and its like")
    rate = world_size(cfg) * assumed.peak_tflops * 1e12 * assumed.mfu
    about = f"{shape.parameters / 1e9:.2f} B parameters, full rows of {cfg.training.max_length} tokens"
    return Value(flops_per_step(cfg, shape) / rate, "estimated", about)


def checkpoint_bytes(cfg: Config, shape: memory.Shape) -> int:
    """Bytes of one full checkpoint: what is trained, and AdamW's state, as conf.memory counts them on all ranks."""
    width, trained = memory.BYTES[cfg.model.dtype], memory.trained_parameters(cfg, shape)
    each = {"ddp": 3 * width, "zero2": width + 12, "zero3": width + 12, "fsdp2": 12}[cfg.parallel.strategy]
    return trained * each


def life_of(
    cfg: Config, name: str, assumed: Assumed, shape: memory.Shape | None, runs: Sequence[Measured], hold: float
) -> tuple[Life | None, dict[str, Value]]:
    """A stage's life, and its figures with their sources. None where its steps or their seconds are not known."""
    near = [run for run in runs if alike(cfg, run.config, exact=False)]

    def measured(key: str, otherwise: Value) -> Value:
        seen = next((run for run in near if getattr(run, key) is not None), None)
        where = f"in {table.near(seen.run_dir)}" if seen else ""
        return Value(getattr(seen, key), "measured", where) if seen else otherwise

    figures = {
        "steps": steps_of(cfg, name, assumed.steps, runs),
        "step_seconds": step_seconds_of(cfg, name, assumed, shape, runs),
        "startup_seconds": measured("startup", Value(assumed.startup_seconds, "assumed", "--startup-seconds")),
        "teardown_seconds": measured("teardown", Value(TEARDOWN_S, "assumed")),
    }
    if shape is not None:
        rate = 1e9 * assumed.write_gb_per_second
        save = Value(checkpoint_bytes(cfg, shape) / rate, "estimated", f"written at {rate / 1e9:g} GB/s")
    else:
        save = Value(60.0, "assumed", "the model's shape is not known")
    figures["save_seconds"] = measured("save", save)
    steps, step = figures["steps"].value, figures["step_seconds"].value
    if not steps or not step:
        return None, figures
    mttf = 3600 * assumed.mttf_hours / cfg.slurm.num_nodes
    minutes = cfg.checkpointing.save_minutes
    seconds = {key: figures[key].value or 0.0 for key in ("startup_seconds", "save_seconds", "teardown_seconds")}
    if minutes == "auto":  # it goes from checkpointing.mttf_hours to what the run has seen: as it stands half-way
        half, prior = steps * step / 2, 3600 * cfg.checkpointing.mttf_hours
        every = accounting.save_interval(seconds["save_seconds"], accounting.mttf(half, round(half / mttf), prior))
    else:
        every = math.inf if minutes is None else 60 * float(minutes)
    local = cfg.cluster.scheduler == "local"
    return Life(
        steps=int(steps), step_seconds=step, **seconds,
        save_steps=cfg.checkpointing.save_steps, save_every_seconds=every,
        wall_seconds=parse_wall_time(cfg.slurm.wall_time), lead_seconds=cfg.slurm.signal_time_seconds,
        early_seconds=0.0 if local else EARLY_S, hold_seconds=0.0 if local else hold,
        nodes=cfg.slurm.num_nodes, node_mttf_seconds=3600 * assumed.mttf_hours, detect_seconds=assumed.detect_seconds,
        preempted_every_seconds=3600 * assumed.preempted_every_hours or math.inf,
        max_attempts_without_progress=cfg.slurm.max_attempts_without_progress,
    ), figures  # fmt: skip


# --------------------------------------------------------------------------------------------- the rows


Queue = Mapping[str, Any]
There = Mapping[str, tuple[str, int]]
"""By stage: what submit would do about it (launchers.submission.decide), and the step it would go on from."""


def what_is_there(selection: Selection) -> tuple[There, str | None]:
    """What submit would find in the run directories, and why it would refuse the command, if so. SLURM is not asked."""
    from launchers.submission import make_plan

    try:
        planned = make_plan(selection, ask=False)
    except (ConfigError, LaunchError) as error:
        return {}, str(error).replace("\n  fix:", "; fix:")
    return {
        name: (one.decision, 0 if one.from_scratch else one.history.checkpoint_step or 0)
        for name, one in planned.stages.items()
    }, None


def estimate(
    selection: Selection, assumed: Assumed, runs: Sequence[Measured], queues: Mapping[str, Queue], hold: float,
    there: There | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the table and the JSON show. queues: by stage, what SLURM said of its start. Asks nobody."""
    stages, walls = [], {}
    for name, cfg in selection.configs.items():
        decision, done = (there or {}).get(name, ("new", 0))
        queue = queues.get(name, {"wait_seconds": None, "why": "not asked"})
        row, lived = _row(name, cfg, assumed, runs, queue, hold, decision, done)
        stages.append(row)
        walls[name] = lived
    needs = {n: [up for up in graph.upstream(selection.stages[n]) if up in walls] for n in selection.wanted}
    return {
        "pipeline": selection.run_name, "stages": stages, "whole": _whole(stages, walls, needs),
        "assumed": {key: value for key, value in vars(assumed).items() if not isinstance(value, Mapping)}
        | {"requeue_hold_seconds": hold},
    }  # fmt: skip


def _row(
    name: str, cfg: Config, assumed: Assumed, runs: Sequence[Measured], queue: Queue, hold: float, decision: str,
    done: int,
) -> tuple[dict[str, Any], tuple[float, ...]]:  # fmt: skip
    """One stage's row, and the wall times of its simulated lives; none where they are not known."""
    shape = shape_known(cfg)
    gpus = cfg.slurm.num_nodes * gpus_per_node(cfg)
    needed = memory.estimate(cfg, shape) if shape is not None and gpus else None
    row: dict[str, Any] = {
        "stage": name, "technique": cfg.stage, "nodes": cfg.slurm.num_nodes, "gpus": gpus, "queue": dict(queue),
        "wall_time_seconds": parse_wall_time(cfg.slurm.wall_time),
        "memory": None if needed is None else {
            "bytes": needed.total, "moment": needed.moment, "text": needed.text(),
            "limit_bytes": cfg.cluster.gpu_memory_gb and cfg.cluster.gpu_memory_gb * memory.GIB,
        },
        "disk_bytes": None, "unknown": [], "decision": decision, "goes_on_from": done,
    }  # fmt: skip
    if decision == "done":
        nothing = {"steps": None, "step_seconds": None, "life": None, "checkpoint": None}
        return row | nothing | _plainly(0.0, gpus, {"wait_seconds": 0.0}), ()
    if cfg.stage in UNTRAINED:
        seen = next((run for run in runs if run.whole is not None and alike(cfg, run.config, exact=True)), None)
        row |= {"steps": None, "step_seconds": None, "life": None, "checkpoint": None}
        if seen is None or seen.whole is None:
            row["unknown"].append({"what": "how long it takes", "why": "no run like it was measured"})
        else:
            row["held"] = Value(seen.whole, "measured", f"in {table.near(seen.run_dir)}").json()
            return row | _plainly(seen.whole, gpus, queue), (seen.whole,)
        return row | _plainly(None, gpus, queue), ()
    life, figures = life_of(cfg, name, assumed, shape, runs, hold)
    row |= {key: value.json() for key, value in figures.items()}
    row["unknown"] += [
        {"what": key.replace("_seconds", "'s seconds"), "why": value.about}
        for key, value in figures.items()
        if value.value is None
    ]
    size = checkpoint_bytes(cfg, shape) if shape is not None else None
    if size is not None and shape is not None:
        model = memory.BYTES[cfg.model.dtype] * memory.trained_parameters(cfg, shape)
        row["disk_bytes"] = (cfg.checkpointing.save_total_limit + 1) * size + model  # a new one before the oldest goes
    if life is None:
        return row | {"life": None, "checkpoint": {"bytes": size}} | _plainly(None, gpus, queue), ()
    wait = queue.get("wait_seconds")
    life = replace(life, queue_seconds=wait or 0.0, steps=max(1, life.steps - done))
    result = forecast(life)
    best = best_interval(life)
    cycle = life.cycle_steps
    better = forecast(replace(life, save_steps=None, save_every_seconds=max(best, life.step_seconds)))
    row["life"] = {key: _finite(value) for key, value in vars(life).items()}
    row["checkpoint"] = {
        "bytes": size, "every_steps": cycle, "every_seconds": cycle and cycle * life.step_seconds,
        "best_seconds": _finite(best), "goodput_at_best": better.mean_goodput,
    }  # fmt: skip
    low, middle, high = result.goodput
    return row | {
        "held_seconds": result.held, "gpu_hours": gpus * result.held / 3600, "wall_seconds": result.wall,
        "wall_with_queue_seconds": None if wait is None else result.wall + result.queue,
        "requeues": result.requeues, "stops": result.stops, "failures": result.failures, "gave_up": result.gave_up,
        "goodput": {"mean": result.mean_goodput, "p10": low, "p50": middle, "p90": high},
        "seconds": dict(result.seconds), "trials": result.trials,
    }, result.walls  # fmt: skip


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plainly(held: float | None, gpus: int, queue: Queue) -> dict[str, Any]:
    """The figures of a stage that was not simulated."""
    wait = queue.get("wait_seconds")
    return {
        "held_seconds": held, "gpu_hours": None if held is None else gpus * held / 3600, "wall_seconds": held,
        "wall_with_queue_seconds": None if held is None or wait is None else held + wait,
        "requeues": None, "stops": None, "failures": None, "gave_up": None, "goodput": None, "seconds": None,
        "trials": 0,
    }  # fmt: skip


def _whole(
    stages: Sequence[Mapping[str, Any]], walls: Mapping[str, tuple[float, ...]], needs: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Sums over the stages that are known, and the longest way through the graph. Pure."""
    known = [row for row in stages if row["held_seconds"] is not None]
    trained = [row for row in known if row["seconds"] is not None]
    held = sum(row["held_seconds"] for row in trained)
    parts = {key: sum(row["seconds"][key] for row in trained) for key in accounting.NAMES}
    means = {row["stage"]: row["wall_seconds"] for row in known}
    queued = {row["stage"]: row["wall_with_queue_seconds"] for row in known}
    path, length = longest(needs, means)
    waits = longest(needs, {name: value for name, value in queued.items() if value is not None})[1]
    trials = max((len(one) for one in walls.values()), default=0)
    lives = [longest(needs, {n: one[i % len(one)] for n, one in walls.items() if one})[1] for i in range(trials)]
    return {
        "gpu_hours": sum(row["gpu_hours"] for row in known), "critical_path": path,
        "wall_seconds": length if known else None,
        "wall_quantiles": dict(zip(("p10", "p50", "p90"), quantiles(lives), strict=True)) if lives else None,
        "wall_with_queue_seconds": waits if known and None not in queued.values() else None,
        "goodput": parts["steps"] / held if held else None, "seconds": parts, "held_seconds": held,
        "requeues": sum(row["requeues"] for row in trained),
        "disk_bytes": sum(row["disk_bytes"] or 0 for row in stages),
        "not_counted": [row["stage"] for row in stages if row["held_seconds"] is None],
    }  # fmt: skip


def longest(needs: Mapping[str, Sequence[str]], seconds: Mapping[str, float]) -> tuple[list[str], float]:
    """The longest way through a graph given upstream first: its stages, and its length. Unknown ones take nothing."""
    ends: dict[str, tuple[float, list[str]]] = {}
    for name, above in needs.items():
        before = max((ends[up] for up in above), key=lambda end: end[0], default=(0.0, []))
        ends[name] = (before[0] + seconds.get(name, 0.0), [*before[1], name])
    length, path = max(ends.values(), key=lambda end: end[0], default=(0.0, []))
    return [name for name in path if seconds.get(name)], length


def over_nodes(row: Mapping[str, Any], counts: Sequence[int]) -> list[dict[str, Any]]:
    """A stage's goodput at numbers of nodes, each with the save interval that is best there."""
    plain: dict[str, Any] = {
        key: math.inf if value is None and key != "save_steps" else value for key, value in row["life"].items()
    }
    each = row["gpus"] // max(1, row["nodes"])
    found = []
    for count in counts:
        life = with_nodes(Life(**plain), count)
        result = forecast(life)
        low, middle, high = result.goodput
        found.append(
            {
                "nodes": count, "mttf_seconds": _finite(life.mttf_seconds),
                "save_every_seconds": _finite(life.save_every_seconds), "requeues": result.requeues,
                "failures": result.failures, "held_seconds": result.held, "gave_up": result.gave_up,
                "gpu_hours": each * count * result.held / 3600,
                "goodput": {"mean": result.mean_goodput, "p10": low, "p50": middle, "p90": high},
            }
        )  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------- the queue


def ask_queues(selection: Selection) -> dict[str, Queue]:
    """What SLURM says of each stage's start if it were submitted now: one question for each different request."""
    from launchers.render import job_script, python_of, sbatch_options

    answers: dict[str, Queue] = {}
    found: dict[str, Queue] = {}
    for name, cfg in selection.configs.items():
        if cfg.cluster.scheduler != "slurm":
            found[name] = {"wait_seconds": 0.0, "why": "no queue: this machine"}
            continue
        run = RunDirectory(selection.output_base / selection.run_name / name)
        options = sbatch_options(cfg, run, [])
        own = ("job-name", "comment", "output", "error")
        request = json.dumps({key: value for key, value in options.items() if key not in own}, default=str)
        if request not in answers:
            script = job_script(cfg, run, python_of(cfg))
            answers[request] = _queue(slurm.expected_start(script, cfg.cluster.slurm_conf))
        found[name] = answers[request]
    return found


def _queue(answer: float | slurm.Refused | slurm.Unknown) -> Queue:
    if isinstance(answer, slurm.Unknown):
        return {"wait_seconds": None, "why": f"SLURM did not say: {_line(answer.why)}"}
    if isinstance(answer, slurm.Refused):
        return {"wait_seconds": None, "refused": True, "why": f"SLURM would refuse it: {_line(answer.why)}"}
    return {"wait_seconds": max(0.0, round(answer - time.time())), "starts_at": answer, "why": None}


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ------------------------------------------------------------------------------------------- the table

SHORT = {"measured": "m", "estimated": "e", "given": "g", "assumed": "a"}
LEGEND = {"m": "measured by an earlier run", "e": "estimated from operations", "g": "given"}
TITLES = ("STAGE", "NODES", "STEPS", "S/STEP", "HELD", "GPU-H", "REQ", "GOODPUT", "SAVES", "GPU MEM", "QUEUE")
LEFT = (0,)
DROPPED_FIRST = ("QUEUE", "GPU MEM", "NODES")
"""What a narrow terminal does without, in this order; it is in the JSON."""


def _cells(row: Mapping[str, Any]) -> list[str]:
    steps, step = row.get("steps"), row.get("step_seconds")
    unknown = "?" if row["technique"] not in UNTRAINED else ""
    nodes = f"{row['nodes']}x{row['gpus'] // row['nodes']}" if row["gpus"] else str(row["nodes"])
    seconds = ""
    if step is not None:
        seconds = "?" if step["value"] is None else f"{_three(step['value'])} {SHORT[step['source']]}"
    goodput = row["goodput"]
    shown = "" if goodput is None else _spread(goodput)
    point = row["checkpoint"] or {}
    every = point.get("every_seconds")
    if every and steps is not None and (steps["value"] or 0) <= point["every_steps"]:
        every = None  # it saves at its end alone
    counted = "done" if row["decision"] == "done" else ""
    if steps is not None:
        counted = "?" if steps["value"] is None else f"{steps['value']:.0f}"
    needed, wait = row["memory"], row["queue"].get("wait_seconds")
    memory_shown = ""
    if needed is not None:
        limit = needed["limit_bytes"]
        memory_shown = f"{needed['bytes'] / memory.GIB:.1f}" + (f"/{limit / memory.GIB:.0f}" if limit else "")
    return [
        row["stage"], nodes, counted, seconds,
        "?" if row["held_seconds"] is None else span(row["held_seconds"]),
        "" if not row["gpus"] else "?" if row["gpu_hours"] is None else _three(row["gpu_hours"]),
        unknown if row["requeues"] is None else f"{row['requeues']:.1f}".removesuffix(".0"),
        shown or unknown, "" if not every else span(every), memory_shown, "?" if wait is None else span(wait),
    ]  # fmt: skip


def _three(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else f"{value:.1e}"


def _spread(goodput: Mapping[str, float]) -> str:
    """The middle, and 10 and 90 % where they differ."""
    low, middle, high = (_percent(goodput[key]) for key in ("p10", "p50", "p90"))
    return f"{middle} %" if low == high else f"{middle} % ({low}-{high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if 0.99 < share < 0.9995 else f"{100 * share:.0f}"


def span(seconds: float) -> str:
    """A duration for people: 42 s, 18 min, 5 h 12 min, 3 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest and hours < 10 else f"{round(minutes / 60)} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def lines(told: Mapping[str, Any], width: int, room: int | None = None) -> Iterator[str]:
    """What a person reads; no line is longer than `width`. room: bytes free where the runs will be."""
    rows = [_cells(row) for row in told["stages"]]
    yield _line(f"plan for {told['pipeline']}")[:width]
    yield from _columns(TITLES, rows, width, DROPPED_FIRST)
    used = {row["step_seconds"]["source"] for row in told["stages"] if row.get("step_seconds")}
    legend = [f"{SHORT[word]}: {LEGEND[SHORT[word]]}" for word in SHORT if word in used and SHORT[word] in LEGEND]

    def wrap(text: str) -> list[str]:
        return textwrap.wrap(_line(text), max(20, width), subsequent_indent="  ")

    for about, text in (*_said(told, room), ("", "; ".join(legend))):
        if text:
            yield from wrap(f"{about}: {text}" if about else text)
    for point in told.get("nodes") or ():
        yield from point_lines(point, width)


def _columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int, dropped: Sequence[str] = ()
) -> Iterator[str]:
    """A table's lines: empty columns left out, then those that a narrow terminal does without."""
    keep = [i for i, _ in enumerate(titles) if any(row[i] for row in rows)]
    sizes = [max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(titles)]
    for title in dropped:
        if sum(sizes[i] + 2 for i in keep) - 2 > width and titles.index(title) in keep:
            keep.remove(titles.index(title))
    for row in (titles, *rows):
        cells = [row[i].ljust(sizes[i]) if i in LEFT else row[i].rjust(sizes[i]) for i in keep]
        yield "  ".join(cells).rstrip()[:width]


def _said(told: Mapping[str, Any], room: int | None) -> Iterator[tuple[str, str]]:
    """The lines below the table: what about, and what."""
    stages = told["stages"]
    if told.get("refused"):
        yield "warning", f"submitted now, it would be refused: {told['refused']}"
    undone = [row for row in stages if row["goes_on_from"] and row["decision"] != "done"]
    if undone:
        yield "goes on", ", ".join(f"{row['stage']} from step {row['goes_on_from']}" for row in undone)
    unknown: dict[tuple[str, str], list[str]] = {}
    for row in stages:
        for one in row["unknown"]:
            unknown.setdefault((one["what"], one["why"]), []).append(row["stage"])
    for (what, why), names in unknown.items():
        yield "unknown", f"{what} ({', '.join(names)}): {why}"
    yield from _said_in_all(told["whole"])
    for row in stages:
        yield from _said_of_saves(row)
    yield from _said_of_the_queue(stages)
    needed = told["whole"]["disk_bytes"]
    if needed:
        free = "" if room is None else f", {memory.gib(room)} free"
        yield ("disk" if room is None or room > needed else "warning"), f"{memory.gib(needed)} on disk at most{free}"
    if told["whole"]["held_seconds"]:
        yield "assumed", _said_assumed(told["assumed"], stages)


def _said_in_all(whole: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if whole["wall_seconds"] is None:
        return
    least = "at least " if whole["not_counted"] else ""
    missing = f"; not counted: {', '.join(whole['not_counted'])}" if whole["not_counted"] else ""
    q, queue, parts = whole["wall_quantiles"], whole["wall_with_queue_seconds"], whole["seconds"]
    spread = f" (10-90 %: {span(q['p10'])} to {span(q['p90'])})" if q and span(q["p10"]) != span(q["p90"]) else ""
    length = f"{' > '.join(whole['critical_path'])}: {span(whole['wall_seconds'])}{spread} without the queue"
    queued = "unknown with it" if queue is None else f"{span(queue)} with it"
    yield "in all", f"{least}{_three(whole['gpu_hours'])} GPU-hours; {length}, {queued}{missing}"
    if whole["held_seconds"]:
        lost = [f"{NAMED[key]} {span(parts[key])}" for key in NAMED if parts[key] >= 0.5]
        hold = f"; between attempts {span(parts['hold'])} of hold" if parts["hold"] else ""
        yield (
            "goodput",
            f"{_percent(whole['goodput'])} % of {span(whole['held_seconds'])} held; {', '.join(lost)}{hold}",
        )


def _said_of_saves(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    point, now = row["checkpoint"] or {}, row["goodput"]
    best, every = point.get("best_seconds"), point.get("every_seconds")
    if best and now and point["goodput_at_best"] - now["mean"] > WORTH_SAYING:
        steps = min(max(1, round(best / row["step_seconds"]["value"])), round(row["steps"]["value"]))
        gain = f"{_percent(point['goodput_at_best'])} % instead of {_percent(now['mean'])} %"
        how = f"checkpointing.save_steps={steps}"
        if every is None or best < every:  # save_minutes adds saves to those of save_steps
            how += ", or save_minutes=auto"
        yield "checkpoints", f"{row['stage']}: a save every {span(best)} is best (Young, Daly): {gain}; {how}"
    if row["gave_up"]:
        share = f"{_percent(row['gave_up'])} % of the simulated runs gave up without progress"
        often = f"saves every {span(every)}" if every else "no saves"
        yield "warning", f"{row['stage']}: {share}: wall time {span(row['wall_time_seconds'])}, {often}"


def _said_of_the_queue(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    refused = {row["queue"]["why"]: row["stage"] for row in stages if row["queue"].get("refused")}
    for why, stage in refused.items():
        yield "warning", f"{stage}: {why}"
    for row in stages:
        if row["queue"].get("starts_at") is not None:
            wait = span(row["queue"]["wait_seconds"])
            again = "; requeued, a job is taken to wait as long again"
            yield "queue", f"submitted now, {row['stage']} would start in {wait}, SLURM expects{again}"
            break
    whys = {row["queue"]["why"] for row in stages if row["queue"]["wait_seconds"] is None} - refused.keys()
    for why in sorted(whys):
        yield "queue", f"unknown: {why}"


def _said_assumed(about: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    def anywhere(key: str, source: str) -> bool:
        return any((row.get(key) or {}).get("source") == source for row in stages)

    said = [f"each node fails every {about['mttf_hours']:g} h", f"noticed after {about['detect_seconds']:g} s"]
    if anywhere("startup_seconds", "assumed"):
        said.append(f"start-up {about['startup_seconds']:g} s")
    if anywhere("step_seconds", "estimated"):
        said.append(f"steps reach {_percent(about['mfu'])} % of {about['peak_tflops']:g} TFLOPS a GPU, on full rows")
    if anywhere("save_seconds", "estimated"):
        said.append(f"saves at {about['write_gb_per_second']:g} GB/s")
    if about["preempted_every_hours"]:
        said.append(f"preempted every {about['preempted_every_hours']:g} h")
    return ", ".join(said)


WORTH_SAYING = 0.005
"""Share of goodput from which on another save interval is worth a line."""
NAMED = {"startup": "start-up", "redone": "steps redone", "lost": "lost in failures", "saving": "saving",
         "teardown": "teardown"}  # fmt: skip


def point_lines(point: Mapping[str, Any], width: int) -> Iterator[str]:
    """The table of one stage over numbers of nodes."""
    yield ""
    said = f"{point['stage']} over nodes: as many steps, each as long as now (the batch grows with the nodes)"
    yield from textwrap.wrap(said, max(20, width), subsequent_indent="  ")
    titles = ("NODES", "JOB'S MTTF", "SAVE EVERY", "FAILURES", "HELD", "GPU-HOURS", "GOODPUT (10-90 %)")
    rows = []
    for one in point["points"]:
        shown = _spread(one["goodput"])
        if one["gave_up"]:
            share = f"{_percent(one['gave_up'])} % give up"
            shown = share if one["gave_up"] > 0.5 else f"{shown}, {share}"
        every, mttf = one["save_every_seconds"], one["mttf_seconds"]
        rows.append([
            f"{one['nodes']:,}", "never" if mttf is None else span(mttf), "" if every is None else span(every),
            _three(one["failures"]), span(one["held_seconds"]), _three(one["gpu_hours"]), shown,
        ])  # fmt: skip
    yield from _columns(titles, rows, width, ("FAILURES", "HELD"))


# ---------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    usage = "python -m launchers.plan [<key>=<value> ...] [options]; --help says more"
    parser = argparse.ArgumentParser("python -m launchers.plan", usage, add_help=False, allow_abbrev=False)
    for name in ("--step-seconds", "--steps"):
        parser.add_argument(name, action="append", default=[], type=_of_stage)
    for key, default in vars(Assumed()).items():
        if isinstance(default, float):
            least_zero = key in ("preempted_every_hours", "detect_seconds", "startup_seconds")
            parser.add_argument(f"--{key.replace('_', '-')}", type=_number(least_zero), default=default)
    parser.add_argument("--nodes", type=_counts, default=[])
    parser.add_argument("--no-queue", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def _number(zero: bool) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError
        return value

    return number


def _of_stage(text: str) -> tuple[str, float]:
    stage, _, value = text.partition("=")
    if not stage:
        raise ValueError
    return stage, _number(False)(value)


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1 or max(counts) > 1_000_000:
        raise ValueError
    return counts


def _check_names(selection: Selection, assumed: Assumed) -> None:
    known = {*selection.wanted, *(cfg.stage for cfg in selection.configs.values())}
    for option, given in (("--step-seconds", assumed.step_seconds), ("--steps", assumed.steps)):
        for name in given:
            if name not in known:
                raise LaunchError(f"{option} {name}=...: the command has no such stage", f"one of: {', '.join(known)}")


def act(selection: Selection, args: argparse.Namespace) -> int:
    """Read what was measured, ask SLURM, simulate and print."""
    numbers = {key: getattr(args, key) for key in vars(Assumed()) if key not in ("step_seconds", "steps")}
    assumed = Assumed(step_seconds=dict(args.step_seconds), steps=dict(args.steps), **numbers)
    _check_names(selection, assumed)
    cfgs = selection.configs
    first = next(iter(cfgs.values()))
    runs = earlier_runs(selection.output_base, {cfg.stage for cfg in cfgs.values()})
    queues = {} if args.no_queue else ask_queues(selection)
    hold = site.read(selection.output_base, first.cluster.name).requeue_hold
    there, refused = what_is_there(selection)
    told = estimate(selection, assumed, runs, queues, hold, there) | {"refused": refused}
    simulated = [row for row in told["stages"] if row["life"] is not None]
    if args.nodes and not simulated:
        problem = "--nodes: the steps of no stage, and their seconds, are known"
        raise LaunchError(problem, "--step-seconds STAGE=SECONDS, and --steps STAGE=STEPS")
    if args.nodes:
        row = max(simulated, key=lambda row: row["held_seconds"])
        told["nodes"] = [{"stage": row["stage"], "points": over_nodes(row, args.nodes)}]
    room = _room(selection.output_base)
    told["disk_free_bytes"] = room
    if args.json:
        print(json.dumps(told, indent=1))
    else:
        for line in lines(told, shutil.get_terminal_size((80, 24)).columns, room):
            print(line)
    return 0


def _room(folder: Path) -> int | None:
    """Bytes free where the runs will be; None where that is not known."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    from launchers.prefetch import names_a_stage

    args, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)

    def choose(tokens: list[str]) -> Selection:
        # cluster=auto says what it took: not between the lines of a program's JSON
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            return select(tokens, names_a_stage(tokens))

    return cli.run(choose, lambda selection: act(selection, args), USAGE, rest)


if __name__ == "__main__":
    sys.exit(main())
