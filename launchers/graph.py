"""What depends on what. Pure."""

from __future__ import annotations

import graphlib
import re
from collections.abc import Mapping
from dataclasses import replace

from conf.check import ConfigError, nearest
from conf.schema import TECHNIQUES, Gate, Node
from post_training.run import results
from post_training.run.gate import BOUNDS

ROLES = ("model", "reference", "reward_model", "data")
"""What the output of an upstream stage can be to a stage."""

TRAIN_ON_SAMPLES = ("sft", "distill")


def upstream(node: Node) -> list[str]:
    """Names of the stages whose outputs the node names, and that it comes after; each once."""
    named = [getattr(node, role) for role in ROLES]
    return list(dict.fromkeys([*(name for name in named if name is not None), *node.after]))


def check(stages: Mapping[str, Node]) -> None:
    """Refuse a graph with an unknown technique, an unknown upstream stage, a wrong gate or a cycle."""
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
    for name in stages:
        _check_gate(stages, name)
    try:
        order(with_gates(stages))
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


# ------------------------------------------------------------------------------------------------ gates

OF_REWARD_MODELS = ("preference_accuracy", "margin", "brier", "calibration_error", "mean_reward")
OF_POLICIES = ("accuracy", "majority", "instructions", "format", "reward")


def gate_of(node: Node) -> Gate | None:
    """A stage's gate; None where it has none."""
    return node.gate if node.gate is not None and node.gate != Gate() else None


def with_gates(stages: Mapping[str, Node]) -> dict[str, Node]:
    """The graph with its gates as edges: what takes the output of a judged stage comes after its gated evals too.

    An eval stage is held back by no gate but one that it names itself. An eval whose gate compares comes after the
    eval that it is compared with, whose name is filled in as gate.parent.
    """
    held: dict[str, list[str]] = {}
    for name, node in stages.items():
        if gate_of(node) is not None and node.model is not None:
            held.setdefault(node.model, []).append(name)
    result = {}
    for name, node in stages.items():
        taken = [getattr(node, role) for role in ROLES] if node.stage != "eval" else []
        more = [gate for up in dict.fromkeys(taken) for gate in held.get(up, ())]
        gate = gate_of(node)
        if gate is not None and gate.max_drop is not None:
            gate = replace(gate, parent=parent_eval(stages, name))
            more.append(str(gate.parent))
        after = list(dict.fromkeys([*node.after, *more]))
        result[name] = replace(node, after=after, gate=gate)
    return result


def parent_eval(stages: Mapping[str, Node], name: str) -> str:
    """The eval stage that a gate with max_drop compares with. Raises ConfigError where there is none, or several."""
    node, gate = stages[name], stages[name].gate
    assert gate is not None
    if gate.parent is not None:
        return gate.parent
    judged = stages[node.model] if node.model is not None else None
    start = judged.model if judged is not None else None
    found = [other for other, n in stages.items() if n.stage == "eval" and start is not None and n.model == start]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"{' and '.join(found)} judge {start}, from which {node.model} started"
        raise ConfigError(f"{name}.gate.max_drop", gate.max_drop, problem, f"{name}.gate.parent={found[0]}")
    if start is None:
        problem = f"{node.model or 'its model'} started from no stage of this pipeline"
        fix = f"{name}.gate.at_least=..., or the eval stage to compare with: {name}.gate.parent=..."
    else:
        problem = f"no eval stage judges {start}, from which {node.model} started"
        fix = f"add eval_{start}: {{stage: eval, model: {start}}}, or {name}.gate.at_least=..."
    raise ConfigError(f"{name}.gate.max_drop", gate.max_drop, problem, fix)


def _check_gate(stages: Mapping[str, Node], name: str) -> None:
    gate, node, key = gate_of(stages[name]), stages[name], f"{name}.gate"
    if gate is None:
        return
    given = {bound: getattr(gate, bound) for bound in BOUNDS if getattr(gate, bound) is not None}
    shown = ", ".join(f"{k}: {v}" for k, v in vars(gate).items() if v is not None)
    if node.stage != "eval":
        judges = [other for other, n in stages.items() if n.stage == "eval" and n.model == name]
        fix = f"{judges[0]}.gate={{{shown}}}" if judges else f"add eval_{name}: {{stage: eval, model: {name}}}"
        raise ConfigError(key, f"{{{shown}}}", f"a gate belongs to an eval stage, and {name} is {node.stage}", fix)
    if len(given) != 1:
        first = next(iter(given), "at_least")
        fix = ", ".join(f"{key}.{bound}=null" for bound in given if bound != first) or f"{key}.at_least=0.3"
        problem = f"has {len(given)} bounds, and needs one of {', '.join(BOUNDS)}" if given else "has no bound"
        raise ConfigError(key, f"{{{shown}}}", problem, fix)
    ((bound, value),) = given.items()
    if gate.metric is not None:
        _check_metric(stages, name, gate.metric, bound, value)
    if bound == "max_drop":
        if value < 0:
            raise ConfigError(f"{key}.max_drop", value, "must be at least 0", f"{key}.max_drop=0")
        parent = parent_eval(stages, name)
        evals = [other for other, n in stages.items() if n.stage == "eval" and other != name]
        if parent not in evals:
            raise ConfigError(f"{key}.parent", parent, "no other eval stage of this pipeline", nearest(parent, evals))
    elif gate.parent is not None:
        problem = f"says what max_drop compares with, and the bound is {bound}"
        raise ConfigError(f"{key}.parent", gate.parent, problem, f"{key}.parent=null")


def _check_metric(stages: Mapping[str, Node], name: str, metric: str, bound: str, value: float) -> None:
    key = f"{name}.gate"
    if metric not in results.METRICS and not re.fullmatch(r"pass@[1-9]\d*|[^/\s]+/\S+", metric):
        fix = nearest(metric, [*results.METRICS, "pass@K", "<task>/<metric>"])
        raise ConfigError(f"{key}.metric", metric, "no figure of an evaluation", fix)
    how = results.metric(metric)
    if bound == "max_drop" and how.better == 0:
        problem = f"of {metric} neither more nor less is better, so it cannot drop"
        raise ConfigError(f"{key}.max_drop", value, problem, f"{key}.at_least=... or {key}.at_most=...")
    if how.scale == 100 and value > 1:
        raise ConfigError(f"{key}.{bound}", value, f"{metric} is a share from 0 to 1", f"{key}.{bound}={value / 100:g}")
    judged = stages[name].model
    while judged is not None and stages[judged].stage == "merge":
        judged = stages[judged].model
    rewards = judged is not None and stages[judged].stage == "rm"
    if judged is not None and metric in (OF_POLICIES if rewards else OF_REWARD_MODELS):
        problem = f"is not found of {judged}, which is {'a' if rewards else 'no'} reward model"
        fix = f"{key}.metric={'preference_accuracy' if rewards else 'accuracy'}"
        raise ConfigError(f"{key}.metric", metric, problem, fix)


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
