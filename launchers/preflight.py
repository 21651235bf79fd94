"""What can be known to fail before the queue does: refused with key, value and fix, before anything is written."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf import memory
from conf.chat import check as check_template
from conf.check import (
    REWARDED,
    ConfigError,
    beyond,
    gpus_per_node,
    nearest,
    parse_wall_time,
    split_function,
    tasks_per_node,
)
from conf.datasets import KNOWN, TRANSFORMS
from conf.schema import UNTRAINED, Config
from launchers import benchmarks, graph, site, slurm
from launchers.errors import LaunchError
from launchers.hub import cache_of, in_cache
from post_training.run import ledger, life, manifest, notify
from post_training.run.directory import RunDirectory, is_there

if TYPE_CHECKING:
    from launchers.submission import Plan


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in which stage a config is wrong."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{error.problem} (stage {name})", error.fix) from None


def check_paths(cfg: Config) -> None:
    """Refuse models and records that are not there, hub ids where offline, and folders that cannot be written."""
    base = cfg.paths.output_base
    if "\n" in base or "\\" in base:
        raise ConfigError(
            "paths.output_base", repr(base), "SLURM cannot write its output below such a path", "choose another folder"
        )
    parent = Path(base).expanduser().absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError("paths.output_base", base, f"{parent} is not a folder", "choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError("paths.output_base", base, f"{parent} cannot be written", "choose a folder of yours")
    cache = cache_of({**os.environ, **cfg.slurm.env}) if cfg.offline else None
    sources = {
        "data.path": cfg.data.path,
        "data.eval_path": cfg.data.eval_path,
        "model.name_or_path": cfg.model.name_or_path,
        **{f"inputs.{role}": getattr(cfg.inputs, role) for role in graph.ROLES},
    }
    if cfg.stage == "merge":
        sources["merge.adapter"] = cfg.merge.adapter
    if cfg.model.name_or_path is None and cfg.model.tokenizer not in ("bytes", "train"):
        sources["model.tokenizer"] = cfg.model.tokenizer
    if cfg.stage == "eval" and cfg.eval.text.name is not None:
        sources["eval.text.path"] = cfg.eval.text.path or KNOWN[cfg.eval.text.name].hub_id
    for key, value in sources.items():
        if value is not None:
            _check_source(key, value, cache)
    check_template("model.chat_template", cfg.model.chat_template, masked=cfg.stage in ("sft", "distill"))
    parts = {f"data.datasets[{i}]": (p.name, p.path, p.subset) for i, p in enumerate(cfg.data.datasets)}
    for key, (name, path, subset) in (parts or {"data": (cfg.data.name, cfg.data.path, cfg.data.subset)}).items():
        if path is not None and parts:
            _check_source(f"{key}.path", path, cache)
        if path is not None and subset is not None and Path(path).expanduser().exists():
            problem, fix = "is a hub's, and the records are local files", f"{key}.path=<the file or folder itself>"
            raise ConfigError(f"{key}.subset", subset, problem, fix)
        own = KNOWN[name].hub_id
        if own is not None and path is None and cache is not None and not in_cache("dataset", own, cache):
            raise ConfigError(
                f"{key}.path", None, f"{name} would come from its hub, is not in {cache}, and offline=true asks none",
                f"python -m launchers.prefetch first, {key}.path=<a local file or folder>, or offline=false",
            )  # fmt: skip
    if cfg.data.transform_file is not None:
        _check_transforms(cfg)
    if cfg.stage == "eval":
        benchmarks.check(cfg)
        for name in ("questions", "reference"):
            path = getattr(cfg.eval.judge, name)
            if path is not None and not Path(path).expanduser().exists():
                raise ConfigError(f"eval.judge.{name}", path, "no such file", f"eval.judge.{name}=<a JSONL file>")
    if cfg.stage in REWARDED:
        for function in getattr(cfg, cfg.stage).reward.functions:
            _check_function(f"{cfg.stage}.reward.functions", function.path)


def read_own(key: str, path: str) -> bytes:
    """The text of a Python file of the user's own. Raises ConfigError."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(key, path, error.strerror or str(error), "give a file that can be read") from None


def _parse_own(key: str, path: str) -> ast.Module:
    try:
        return ast.parse(read_own(key, path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        problem = f"is no Python{f': line {line}' if line else ''}: {getattr(error, 'msg', error)}"
        raise ConfigError(key, path, problem, "mend the file") from None


def _check_transforms(cfg: Config) -> None:
    """Refuse a transform file that is not there or cannot be parsed, and a transform that is not in it."""
    value = cfg.data.transform_file
    wanted = {
        f"data.datasets[{i}].transform": part.transform for i, part in enumerate(cfg.data.datasets)
    } or {"data.transform": cfg.data.transform}  # fmt: skip
    if not any(wanted.values()):
        raise ConfigError("data.transform_file", value, "none of its transforms is asked for", "data.transform=<name>")
    tree = _parse_own("data.transform_file", str(value))
    decorators = [d for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for d in node.decorator_list]
    calls = [d for d in decorators if isinstance(d, ast.Call) and ast.unparse(d.func).split(".")[-1] == "transform"]
    names = [d.args[0].value if d.args and isinstance(d.args[0], ast.Constant) else None for d in calls]
    if None in names:  # made at run time: only the job can tell
        return
    for key, name in wanted.items():
        if name is not None and name not in TRANSFORMS and name not in names:
            fix = nearest(name, [str(n) for n in names]) if names else f'@transform("{name}") above a function'
            raise ConfigError(key, name, f"{value} has no such transform", fix)


def _check_function(key: str, path: str) -> None:
    """Refuse a Python file that is not there or cannot be parsed, and a function that it does not define."""
    file, name = split_function(path)
    functions = [node.name for node in _parse_own(key, file).body if isinstance(node, ast.FunctionDef)]
    if name not in functions:
        raise ConfigError(key, path, f"{file} defines no function {name}", nearest(name, functions))


def check_places(cfg: Config) -> None:
    """Refuse a virtual environment and an image that are not where the config says: jobs look there too."""
    if cfg.slurm.venv is not None:
        venv = Path(cfg.slurm.venv).expanduser()
        if not (venv / "bin" / "activate").is_file():
            fix = f"python3 -m venv {venv}; of one that is on the nodes alone: slurm.setup=['source .../activate']"
            raise ConfigError("slurm.venv", cfg.slurm.venv, "holds no virtual environment", fix)
    image = cfg.container.image
    a_file = image is not None and (cfg.container.runtime != "pyxis" or image.startswith(("/", ".", "~")))
    if image is not None and a_file and not is_there(Path(image).expanduser()):
        fix = "container.image=<a file or folder that the nodes see too>"
        raise ConfigError("container.image", image, "there is no such file", fix)


def check_webhook(cfg: Config) -> None:
    """Refuse a webhook whose address is in nobody's environment."""
    if cfg.notify.webhook and not os.environ.get(notify.ADDRESS):
        problem = f"{notify.ADDRESS} is not set in this shell, and jobs get its environment"
        raise ConfigError(
            "notify.webhook", "true", problem, f"export {notify.ADDRESS}=https://..., or notify.webhook=false"
        )


def shape_known(cfg: Config) -> memory.Shape | None:
    """The model's shape; a local model's config.json is believed before the config's keys. None: not known."""
    for source in (cfg.inputs.model, cfg.model.name_or_path):
        about = Path(source).expanduser() / "config.json" if source is not None else None
        if about is not None and about.is_file():
            try:
                found = json.loads(about.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = {}
            return memory.shape_from_json(found) if isinstance(found, dict) else None
    return memory.shape_of(cfg.model)


def check_memory(cfg: Config) -> None:
    """Refuse what cannot fit into the GPUs, and rows that learned positions (gpt2) cannot hold."""
    shape = shape_known(cfg)
    learned = shape.positions if shape is not None and cfg.stage not in UNTRAINED else 0
    longer = beyond(cfg, learned) if learned else None
    if longer is not None:
        key, value, fits = longer
        raise ConfigError(key, value, f"the model has positions for {learned} tokens", f"{key}={fits}")
    memory.check(cfg, shape)


HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".txt", ".jinja", ".safetensors")


def _check_source(key: str, value: str, cache: Path | None) -> None:
    """cache: of the hub, where it is not to be asked."""
    path = Path(value).expanduser()
    if path.exists():
        if key.startswith(("inputs.", "model.")):
            _check_model_folder(key, value, path)
        return
    if value.startswith(("/", ".", "~")) or value.endswith(FILE_SUFFIXES) or not HUB_ID.fullmatch(value):
        raise ConfigError(
            key, value, "no such file or folder", f"{key}=<a path that exists>, or a hub id such as Qwen/Qwen3-0.6B"
        )
    kind = "dataset" if key.startswith(("data.", "eval.text.")) else "model"
    if cache is not None and not in_cache(kind, value, cache):
        raise ConfigError(
            key, value, f"is no local path and not in {cache}, and offline=true asks no hub",
            f"python -m launchers.prefetch first, {key}=<a local path>, or offline=false",
        )  # fmt: skip


def _check_model_folder(key: str, value: str, path: Path) -> None:
    if (path / "config.yaml").is_file() and (path / "ledger.jsonl").exists():
        raise ConfigError(key, value, "is a run directory, not a model", f"{key}={path / 'model'}")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        fix = f"stage=merge merge.adapter={value} inputs.model=<the model it was trained on> makes a model of it"
        raise ConfigError(key, value, "is an adapter, not a model", fix)
    if (path / manifest.NAME).exists() and (why := manifest.problem(path)):
        raise ConfigError(key, value, f"is not complete: {why}", "wait for its run to finish, or choose another model")


def check_cluster(configs: Mapping[str, Config]) -> None:
    """Refuse what the cluster does not have, and what launchers.doctor found that it does not allow.

    Asks SLURM once; raises LaunchError without an answer. Warns on stderr.
    """
    cfg = next(iter(configs.values()))
    if cfg.cluster.scheduler != "slurm":
        return
    if not slurm.installed():
        raise ConfigError(
            "cluster",
            cfg.cluster.name,
            "is a SLURM cluster, and there is no sbatch on PATH",
            "run this on a login node, or cluster=local",
        )
    found = slurm.partitions(cfg.cluster.slurm_conf)
    if isinstance(found, slurm.Unknown):
        raise LaunchError(f"cluster={cfg.cluster.name}: SLURM does not answer: {found.why}", wake(cfg))
    there = site.read(Path(cfg.paths.output_base).expanduser().absolute(), cfg.cluster.name)
    warned = set[str]()
    for name, stage in configs.items():
        known = there.charged_to(stage.slurm.account)
        with naming(name):
            check_request(stage, found, over_time=known.over_partition_time(stage.slurm.qos))
            check_limits(stage, known)
        for text in warnings_of(stage, known):
            if text not in warned:  # once for all stages
                warned.add(text)
                print(f"warning: {text}", file=sys.stderr)


def check_limits(cfg: Config, known: site.Site) -> None:
    """Refuse a wall time and GPUs that QOS or association do not allow: such a job waits for ever. Pure."""
    asks = cfg.slurm
    again = "python -m launchers.doctor looks anew"
    wall = known.limit("max_wall_seconds", asks.partition, asks.qos)
    if wall is not None and parse_wall_time(asks.wall_time) > wall[0]:
        shown = f"{wall[0] // 3600:02}:{wall[0] % 3600 // 60:02}:{wall[0] % 60:02}"
        problem = f"{wall[1]} allows {shown}"
        raise ConfigError("slurm.wall_time", asks.wall_time, problem, f"slurm.wall_time={shown} ({again})")
    per_node = gpus_per_node(cfg)
    for name, what in (("gpus_per_job", "a job"), ("gpus_per_user", "a user"), ("gpus_in_all", "all jobs together")):
        limit = known.limit(name, asks.partition, asks.qos)
        if limit is not None and asks.num_nodes * per_node > limit[0]:
            problem = f"{asks.num_nodes} x {per_node} GPUs; {limit[1]} allows {what} {limit[0]}"
            if per_node > limit[0]:
                raise ConfigError("slurm.gpus_per_node", per_node, problem, f"slurm.gpus_per_node={limit[0]} ({again})")
            fix = f"slurm.num_nodes={limit[0] // per_node} ({again})"
            raise ConfigError("slurm.num_nodes", asks.num_nodes, problem, fix)


def warnings_of(cfg: Config, known: site.Site) -> list[str]:
    """What may go wrong on this cluster, as launchers.doctor found it. Pure, but for a look whether paths exist."""
    found = []
    asks = cfg.slurm
    preempted = known.preemption(asks.partition, asks.qos)
    if preempted is not None and preempted[1] is not None and preempted[1] < asks.signal_time_seconds:
        where = asks.partition or known.default_partition
        found.append(
            f"jobs of partition {where} are preempted with {preempted[1]} s to save, and slurm.signal_time_seconds="
            f"{asks.signal_time_seconds} says that a save may need more: then the steps since the last one are lost\n"
            "  fix: checkpointing.save_minutes=<what you can afford to lose>, or a partition that is not preempted"
        )
    if known.internet is False and not cfg.offline and _from_hub(cfg):
        found.append(
            f"compute nodes of cluster={cfg.cluster.name} did not reach the hub when launchers.doctor looked\n"
            "  fix: python -m launchers.prefetch, then offline=true"
        )
    return found


def _from_hub(cfg: Config) -> bool:
    """Whether a stage would load a model or records from a hub."""
    models = (cfg.model.name_or_path, cfg.inputs.model, cfg.inputs.reference, cfg.inputs.reward_model)
    if any(value is not None and not Path(value).expanduser().exists() for value in models):
        return True
    if cfg.stage == "merge" or cfg.inputs.data is not None:
        return False
    parts = [(p.name, p.path) for p in cfg.data.datasets] or [(cfg.data.name, cfg.data.path)]
    return any(KNOWN[name].hub_id is not None if path is None else not Path(path).expanduser().exists()
               for name, path in parts)  # fmt: skip


def wake(cfg: Config) -> str:
    """What to do where SLURM does not answer."""
    return (
        "python -m launchers.devcluster up"
        if cfg.cluster.name == "dev"
        else "see whether `scontrol ping` answers, or cluster=local"
    )


def check_request(cfg: Config, partitions: Mapping[str, slurm.Partition], over_time: bool = False) -> None:
    """Refuse a partition, GPUs, nodes or a wall time that the cluster does not have. Pure.

    over_time: the job's QOS lets it take longer than its partition allows.
    """
    wanted = cfg.slurm
    if wanted.partition is None:
        default = [p for p in partitions.values() if p.default]
        if not default:
            raise ConfigError(
                "slurm.partition", None, "the cluster has no default partition", f"one of {', '.join(partitions)}"
            )
        partition = default[0]
    elif wanted.partition not in partitions:
        if all(name in partitions for name in wanted.partition.split(",")):
            return  # a list: SLURM takes the first that fits
        raise ConfigError(
            "slurm.partition",
            wanted.partition,
            "the cluster has no such partition",
            nearest(wanted.partition, partitions),
        )
    else:
        partition = partitions[wanted.partition]
    where = f"partition {partition.name}"
    kinds = sorted({str(kind) for group in partition.groups for kind in group.gpus if kind is not None})
    count = gpus_per_node(cfg)
    if count and wanted.gpu_type is not None and wanted.gpu_type not in kinds:
        fix = nearest(wanted.gpu_type, kinds) if kinds else "slurm.gpu_type=null"
        raise ConfigError("slurm.gpu_type", wanted.gpu_type, f"{where} has no such GPUs", fix)

    def gpus(group: slurm.NodeGroup) -> int:
        return group.gpus.get(wanted.gpu_type, 0) if wanted.gpu_type else sum(group.gpus.values())

    most = max((gpus(group) for group in partition.groups), default=0)
    if count > most:
        raise ConfigError(
            "slurm.gpus_per_node",
            wanted.gpus_per_node,
            f"the nodes of {where} have at most {most}",
            f"slurm.gpus_per_node={most}",
        )
    cpus = wanted.cpus_per_gpu * tasks_per_node(cfg)
    fitting = [group for group in partition.groups if gpus(group) >= count]
    if cpus > (cores := max(group.cpus for group in fitting)):
        fix = f"slurm.cpus_per_gpu={max(1, cores // tasks_per_node(cfg))}"
        raise ConfigError(
            "slurm.cpus_per_gpu", wanted.cpus_per_gpu, f"{cpus} cores a node; those of {where} have {cores}", fix
        )
    fitting = [group for group in fitting if group.cpus >= cpus]
    if wanted.mem is not None and (memory := _megabytes(wanted.mem)) > (
        most_mb := max(group.memory_mb for group in fitting)
    ):
        raise ConfigError(
            "slurm.mem", wanted.mem, f"{memory} MB; the nodes of {where} have {most_mb} MB", f"slurm.mem={most_mb}M"
        )
    available = sum(group.nodes for group in fitting)
    if wanted.num_nodes > available:
        raise ConfigError(
            "slurm.num_nodes", wanted.num_nodes, f"{where} has {available} such nodes", f"slurm.num_nodes={available}"
        )
    limit = None if over_time else partition.max_seconds
    if limit is not None and parse_wall_time(wanted.wall_time) > limit:
        shown = f"{limit // 3600:02}:{limit % 3600 // 60:02}:{limit % 60:02}"
        raise ConfigError("slurm.wall_time", wanted.wall_time, f"{where} allows {shown}", f"slurm.wall_time={shown}")


def _megabytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", text).groups()  # type: ignore[union-attr]  # check_run has matched it
    return int(int(number) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[unit])


# ------------------------------------------------------------------------------- was the lead long enough


def check_leads(plans: Sequence[Plan]) -> None:
    """Warn on stderr where stages to submit get less time to save and leave than such a run was seen to need.

    plans: of one pipeline, or of a sweep's points, which are not warned of one after the other.
    """
    waiting = [(name, planned) for plan in plans for name, planned in plan.stages.items() if planned.to_submit]
    kinds = [_kind(planned.frozen) for _, planned in waiting]
    measured = measured_leads(plans[0].output_base, set(kinds))
    told = set()
    for (name, planned), kind in zip(waiting, kinds, strict=True):
        seen = measured.get(kind)
        given = planned.cfg.slurm.signal_time_seconds
        if seen is None or seen[1]["needed"] <= given or (name, kind, given) in told:
            continue
        told.add((name, kind, given))
        root, lead = seen
        parts = (f"{word} {lead[key]:.0f} s" for key, word in LEAD_PARTS.items() if lead.get(key) is not None)
        fix = f"{name}.slurm.signal_time_seconds={life.enough(lead['needed'])}"
        if life.enough(lead["needed"]) >= parse_wall_time(planned.cfg.slurm.wall_time):
            fix += ", and a slurm.wall_time that is longer than that"
        print(
            f"warning: slurm.signal_time_seconds={given} (stage {name}): to save and leave took {lead['needed']:.0f} s "
            f"in {root} ({', '.join(parts)})\n  fix: {fix}",
            file=sys.stderr,
        )


LEAD_PARTS = {"longest_step": "longest step", "save": "save", "teardown": "teardown"}
Kind = tuple[str, str, int]


def _kind(frozen: Mapping[str, Any]) -> Kind:
    """What a run's lead depends on most: technique, model and world size."""
    model = {key: value for key, value in frozen["model"].items() if key not in ("tokenizer", "chat_template")}
    ranks = frozen["slurm"]["num_nodes"] * max(1, frozen["slurm"]["gpus_per_node"])
    return frozen["stage"], repr(sorted(model.items())), ranks


def measured_leads(output_base: Path, kinds: Collection[Kind]) -> dict[Kind, tuple[Path, dict[str, float]]]:
    """The newest measured lead (seconds) of runs of these kinds below a folder, and the run directory it is from."""
    found: dict[Kind, tuple[float, Path, dict[str, float]]] = {}
    for path in output_base.glob("*/*/ledger.jsonl") if kinds else ():
        newest = next((event for event in reversed(ledger.read(path)) if _needed(event) is not None), None)
        if newest is None:
            continue
        try:
            kind = _kind(RunDirectory(path.parent).read_config())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # no run of ours, or damaged
        if kind in kinds and (kind not in found or found[kind][0] < newest["time"]):
            found[kind] = (newest["time"], path.parent, newest["lead"])
    return {kind: (root, lead) for kind, (_, root, lead) in found.items()}


def _needed(event: Mapping[str, Any]) -> float | None:
    lead = event.get("lead") if event["event"] == "attempt_ended" else None
    needed = lead.get("needed") if isinstance(lead, dict) else None
    return needed if isinstance(needed, int | float) else None
