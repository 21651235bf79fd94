"""What a command means: which stages, each with its config and its inputs, before it is known what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conf.check import ConfigError, check_run, nearest
from conf.schema import Config, Node
from launchers import graph, slurm
from launchers.compose import Composer, Layers, groups, split, stage_overrides
from launchers.preflight import check_memory, check_paths, check_places, check_webhook, naming
from post_training.run import results


@dataclass(frozen=True)
class Selection:
    """The stages that a command means, composed and checked, before it is known what is there."""

    run_name: str
    output_base: Path
    only_one: bool  # submit: one stage, whose upstream stages are there already
    stages: dict[str, Node]  # the whole graph
    wanted: tuple[str, ...]  # the stages to be done, upstream first
    config: Callable[[str], Config]  # of any stage of the graph
    freed: Mapping[str, tuple[str, ...]]  # roles taken by the pretrained model, by stage
    explicit: frozenset[str]  # stages for which the command names model.name_or_path itself
    dry_run: bool

    @property
    def configs(self) -> dict[str, Config]:
        return {name: self.config(name) for name in self.wanted}


def resolve_cluster(composer: Composer, layers: Layers, root: Config) -> str:
    """The file in conf/cluster to take. For `auto`: SLURM where sbatch is found and the controller answers."""
    if root.cluster.scheduler != "auto":
        return layers.choices.get("cluster", "auto")
    wanted = root.cluster.slurm_cluster
    if wanted not in groups()["cluster"]:
        raise ConfigError(
            "cluster.slurm_cluster", wanted, "no such file in conf/cluster", nearest(wanted, groups()["cluster"])
        )
    choice, why = _automatic(wanted, composer.config([f"cluster={wanted}"]).cluster.slurm_conf)
    if why not in _said:  # once for all points of a sweep
        _said.add(why)
        print(f"cluster=auto: {why}", flush=True)
    return choice


_said: set[str] = set()


@cache
def _automatic(wanted: str, conf: str | None) -> tuple[str, str]:
    if not slurm.installed():
        return "local", "no sbatch on PATH; running on this machine (cluster=local)"
    if not slurm.controller_up(conf):
        return "local", "no SLURM controller answers; running on this machine (cluster=local)"
    return wanted, f"SLURM answers; taking cluster={wanted}"


composer = cache(Composer)
"""The one that all points of a command share: it keeps what it composed."""


def select(tokens: Sequence[str], only_one: bool) -> Selection:
    """Compose and check the stages that a command means: `stage=` alone (submit), or the whole pipeline.

    Raises ConfigError. Reads files; asks SLURM under cluster=auto only.
    """
    made, layers = composer(), Layers.of(tokens)
    root = _root(made, tokens)
    written: dict[str, Node] = dict(root.pipeline.stages)
    if not written:
        raise ConfigError(
            "pipeline", root.pipeline.name, "has no stages", f"choose one of {', '.join(groups()['pipeline'])}"
        )
    graph.check(written)
    written = graph.with_gates(written)
    stages, freed = (written, {}) if root.model.name_or_path is None else graph.without_base(written)
    if only_one:
        name, node = graph.find({**written, **stages}, layers.selected or root.stage, groups()["stage"])
        stages, wanted = {**stages, name: node}, [name]
    else:
        wanted = graph.order(stages)
        _refuse_for_all(layers)
    _check_names(layers, written, stages)
    choice, cluster = layers.choices.get("pipeline", "full"), resolve_cluster(made, layers, root)

    def config(name: str) -> Config:
        return made.config(stage_overrides(layers, choice, cluster, name, stages[name], stages))

    explicit = set()
    for name in wanted:
        cfg = config(name)
        own = (*layers.everywhere, *layers.alone.get(name, ()), *layers.alone.get(stages[name].stage, ()))
        if any(split(token)[1] == "model.name_or_path" for token in own):
            explicit.add(name)
        with naming(name):
            check_run(cfg)
            check_paths(cfg)
            check_places(cfg)
            check_webhook(cfg)
            check_memory(cfg)
        _check_gate(stages, name, config)
    return Selection(
        run_name=root.run_name or root.pipeline.name,
        output_base=Path(root.paths.output_base).expanduser().absolute(),
        only_one=only_one, stages=stages, wanted=tuple(wanted), config=config,
        freed=freed, explicit=frozenset(explicit), dry_run=root.dry_run,
    )  # fmt: skip


def _root(composer: Composer, tokens: Sequence[str]) -> Config:
    """The pipeline's own config. Raises ConfigError, for a gate of a stage that is not there with those that are."""
    try:
        return composer.config(list(tokens))
    except ConfigError as error:
        parts = error.key.split(".")
        if parts[:2] != ["pipeline", "stages"] or parts[3:4] != ["gate"]:
            raise
        stages = composer.config([t for t in tokens if not split(t)[1].startswith("pipeline.stages.")]).pipeline.stages
        if parts[2] in stages:
            raise
        evals = [name for name, node in stages.items() if node.stage == "eval"]
        problem = f"the pipeline has no stage {parts[2]}"
        raise ConfigError(".".join(parts[2:]), error.value, problem, nearest(parts[2], evals)) from None


ASKED = ("name", "path", "subset", "split", "eval_path", "eval_split", "held_out", "datasets", "transform", "seed")
"""Keys of `data` that say which problems an evaluation asks."""


def _check_gate(stages: Mapping[str, Node], name: str, config: Callable[[str], Config]) -> None:
    """Refuse a gate on a figure that is not asked for, or that compares with an evaluation on other data."""
    gate = graph.gate_of(stages[name])
    if gate is None:
        return
    for judge in (name, *([gate.parent] if gate.parent is not None else [])):
        lacks = _lacks(gate.metric, config(judge))
        if lacks is not None:
            key, value, fix = lacks
            problem = f"without it {judge} finds no {gate.metric}, the metric of {name}.gate"
            raise ConfigError(f"{judge}.{key}", value, problem, f"{judge}.{key}={fix}")
    if gate.parent is None:
        return
    ours, theirs = config(name).data, config(gate.parent).data
    other = next((k for k in ASKED if getattr(ours, k) != getattr(theirs, k)), None)
    if other is not None:
        raise ConfigError(
            f"{name}.gate.parent", gate.parent,
            f"is on other data: data.{other}={getattr(theirs, other)}, here {getattr(ours, other)}",
            f"the same data for both, {name}.gate.parent=<an eval on the same data>, or {name}.gate.at_least=...",
        )  # fmt: skip


def check_metric(selection: Selection, value: str | None) -> tuple[str, str]:
    """Eval stage and figure of `sweep.metric`. Raises ConfigError for what no evaluation of the pipeline will find."""
    evals = [name for name in selection.wanted if selection.stages[name].stage == "eval"]
    known = [f"{name}/accuracy" for name in evals]
    stage, _, figure = (value or "").partition("/")
    if stage not in evals or not figure:
        if value is None:
            raise ConfigError("sweep.metric", None, "a sampler needs to know what to make better",
                              f"sweep.metric={known[-1]}" if known else "a pipeline with an eval stage")  # fmt: skip
        raise ConfigError("sweep.metric", value, "is no <eval stage>/<figure> of this pipeline", nearest(value, known))
    if not results.metric(figure).better:
        problem = "of this figure neither more nor less is better"
        raise ConfigError("sweep.metric", value, problem, f"sweep.metric={stage}/accuracy")
    lacks = _lacks(figure, selection.config(stage))
    if lacks is not None:
        key, now, fix = lacks
        raise ConfigError(f"{stage}.{key}", now, f"without it {stage} finds no {figure}", f"{stage}.{key}={fix}")
    return stage, figure


def _lacks(metric: str | None, cfg: Config) -> tuple[str, object, str] | None:
    """The key, its value and a better one where an evaluation so configured does not look for a figure. Pure."""
    asked = cfg.eval
    if metric is not None and "/" in metric and not asked.tasks:
        return "eval.tasks", asked.tasks, f"[{metric.partition('/')[0]}]"
    draws = 1 if metric == "majority" else int(metric[5:]) if metric is not None and metric.startswith("pass@") else 0
    if draws > asked.num_samples:
        return "eval.num_samples", asked.num_samples, str(max(draws, 8))
    if metric == "instructions" and not asked.num_instructions:
        return "eval.num_instructions", 0, "64"
    if metric in ("judge", "judge_win_rate") and asked.judge.base_url is None:
        return "eval.judge.base_url", None, "http://..."
    if metric == "judge_win_rate" and asked.judge.reference is None:
        return "eval.judge.reference", None, "<JSONL of {prompt, completion}, or an eval's folder>"
    return None


def _refuse_for_all(layers: Layers) -> None:
    """What makes sense for one stage and not for a whole pipeline."""
    if layers.selected is not None:
        raise ConfigError(
            "stage", layers.selected, "a pipeline submits all of its stages", "python -m launchers.submit stage=..."
        )
    for token in layers.everywhere:
        _, key, value = split(token)
        if key == "inputs.model" and value != "null":
            raise ConfigError(key, value, "every stage would start from it", "say which one: <stage>.inputs.model=...")


def _check_names(layers: Layers, full: Mapping[str, Node], stages: Mapping[str, Node]) -> None:
    valid = {*full, *stages, *(node.stage for node in (*full.values(), *stages.values()))}
    for name, tokens in layers.alone.items():
        if name not in valid:
            key, value = split(tokens[0])[1:]
            raise ConfigError(f"{name}.{key}", value, f"the pipeline has no stage {name}", nearest(name, valid))


def sources(selection: Selection, name: str) -> dict[str, str | None]:
    """For each input of a stage: `stage:<name>` from the graph, `path:<path or hub id>` from the config, or None."""
    cfg, node = selection.config(name), selection.stages[name]
    pretrained = (
        f"path:{cfg.model.name_or_path}" if cfg.model.name_or_path is not None and cfg.stage != "base" else None
    )
    result: dict[str, str | None] = {}
    for role in graph.ROLES:
        given, upstream = getattr(cfg.inputs, role), getattr(node, role)
        freed = role in selection.freed.get(name, ())
        # for one stage, a model that the command names wins over the graph
        asked = role == "model" and (upstream is None or (selection.only_one and name in selection.explicit))
        if given is not None:
            result[role] = f"path:{given}"
        elif pretrained is not None and (freed or asked):
            result[role] = pretrained
        else:
            result[role] = f"stage:{upstream}" if upstream is not None else None
    if not (cfg.stage == "ppo" and (cfg.ppo.reward_model_weight or cfg.ppo.value_init == "rm")):
        result["reward_model"] = None
    elif result["reward_model"] is None:
        key = "reward_model_weight" if cfg.ppo.reward_model_weight else "value_init"
        problem = f"no stage of the pipeline is {name}'s reward model"
        fix = f"inputs.reward_model=<folder>, pipeline.stages.{name}.reward_model=<stage>, or leave ppo.{key} out"
        raise ConfigError(f"ppo.{key}", getattr(cfg.ppo, key), problem, fix)
    if result["data"] is None:  # most stages read a data set
        del result["data"]
    return result
