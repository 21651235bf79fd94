"""What depends on what. Pure."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from dataclasses import replace

from conf.check import ConfigError, nearest
from conf.schema import TECHNIQUES, Node

ROLES = ("model", "reference", "reward_model", "data")
"""What the output of an upstream stage can be to a stage."""

TRAIN_ON_SAMPLES = ("sft", "distill")


def upstream(node: Node) -> list[str]:
    """Names of the stages whose outputs the node names, and that it comes after; each once."""
    named = [getattr(node, role) for role in ROLES]
    return list(dict.fromkeys([*(name for name in named if name is not None), *node.after]))


def check(stages: Mapping[str, Node]) -> None:
    """Refuse a graph with an unknown technique, an unknown upstream stage, a self reference or a cycle."""
    for name, node in stages.items():
        key = f"pipeline.stages.{name}"
        if node.stage not in TECHNIQUES:
            raise ConfigError(f"{key}.stage", node.stage, "no such stage", nearest(node.stage, TECHNIQUES))
        for role in (*ROLES, "after"):
            value = getattr(node, role)
            for other in value if isinstance(value, list) else [value] if value is not None else []:
                if other == name:
                    raise ConfigError(
                        f"{key}.{role}",
                        other,
                        "a stage cannot depend on itself",
                        f"name another stage, or {key}.{role}=null",
                    )
                if other not in stages:
                    raise ConfigError(
                        f"{key}.{role}", other, "no such stage in this pipeline", nearest(other, set(stages) - {name})
                    )
                if role != "after" and stages[other].stage == "prepare":
                    problem = "prepares data and has no model"
                    raise ConfigError(f"{key}.{role}", other, problem, f"{key}.after=[{other}]")
        if node.data is not None and (node.stage not in TRAIN_ON_SAMPLES or stages[node.data].stage != "sample"):
            problem = (
                f"a {node.stage} stage takes no other stage's records" if node.stage not in TRAIN_ON_SAMPLES
                else f"is a {stages[node.data].stage} stage, which makes no records"
            )  # fmt: skip
            raise ConfigError(f"{key}.data", node.data, problem, "a sample stage's name, on an sft or distill stage")
    try:
        order(stages)
    except graphlib.CycleError as error:
        # graphlib lists the cycle from the upstream to what depends on it
        cycle = list(error.args[1])
        first = cycle[1]
        raise ConfigError(
            f"pipeline.stages.{first}",
            " -> ".join(cycle),
            "the graph has a cycle",
            f"take {cycle[0]} out of what {first} depends on",
        ) from error


def order(stages: Mapping[str, Node]) -> list[str]:
    """Upstream stages first; otherwise as they are written. Raises graphlib.CycleError."""
    sorter = graphlib.TopologicalSorter({name: upstream(node) for name, node in stages.items()})
    sorter.prepare()
    result: list[str] = []
    position = {name: i for i, name in enumerate(stages)}
    ready = list(sorter.get_ready())
    while ready:
        ready.sort(key=position.__getitem__)
        name = ready.pop(0)
        result.append(name)
        sorter.done(name)
        ready += sorter.get_ready()
    return result


def without_base(stages: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, tuple[str, ...]]]:
    """The graph for a pretrained model: no `base` stages. Also, by stage, the roles that a base stage's output had.

    What depended on a base stage takes the pretrained model; an eval of it evaluates that model.
    """
    gone = {name for name, node in stages.items() if node.stage == "base"}
    kept, freed = {}, {}
    for name, node in stages.items():
        if name not in gone:
            roles = tuple(role for role in ROLES if getattr(node, role) in gone)
            if roles:
                freed[name] = roles
            after = [other for other in node.after if other not in gone]
            kept[name] = replace(node, after=after)
            for role in roles:
                setattr(kept[name], role, None)
    return kept, freed


def find(stages: Mapping[str, Node], wanted: str, files: tuple[str, ...]) -> tuple[str, Node]:
    """The stage that `submit stage=<wanted>` means: a name in the graph, or a technique on its own."""
    if wanted in stages:
        return wanted, stages[wanted]
    if wanted in files:
        return wanted, Node(stage=wanted)
    raise ConfigError(
        "stage", wanted, "neither a stage of the pipeline nor a file in conf/stage", nearest(wanted, {*stages, *files})
    )
