"""What a command is going to do, decided before anything is written: into which run directory each stage goes, and
what happens to the runs that are there already.

`decide` is pure; `look` and `make_plan` read files and ask SLURM once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.chat import is_text
from conf.check import ConfigError, nearest, split_function
from conf.schema import CONFIG_VERSION, PREPARABLE, TEMPLATES, Cluster, Config, Node
from launchers import graph, slurm
from launchers.errors import LaunchError, gate_fix
from launchers.preflight import read_own
from launchers.selection import Selection, sources
from post_training.run import gate, ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise

PIPELINE_FILE = "pipeline.json"
NEVER = "DependencyNeverSatisfied"
"""SLURM's reason of a job that waits for one that failed."""
Frozen = dict[str, Any]
SECTIONS = (
    "model", "data", "training", "lora", "checkpointing", "slurm", "cluster", "parallel", "logging", "guardrails",
    "notify", "container",
)  # fmt: skip


# ------------------------------------------------------------------------------------ the frozen config


def absolute(text: str | None) -> str | None:
    """A path that exists, absolute; a hub id (or anything else) as it is."""
    if text is None:
        return None
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def _frozen_template(given: str | None) -> str | None:
    """A chat template's name, or a file's text: an edit of the file must not change a run that is submitted."""
    path = Path(given or "").expanduser()
    if given is None or given in TEMPLATES or is_text(given) or not path.is_file():
        return given
    return path.read_text(encoding="utf-8")


def own_files(cfg: Config) -> dict[str, tuple[str, bytes]]:
    """The user's own Python files that a stage runs: given path -> the copy's place in the run's code, and the text.

    The place has the hash of the text: what a file says counts, not where it was. Raises ConfigError.
    """
    reward = getattr(getattr(cfg, cfg.stage), "reward", None)
    given = {split_function(f.path)[0]: f"{cfg.stage}.reward.functions" for f in (reward.functions if reward else [])}
    if cfg.data.transform_file is not None:
        given[cfg.data.transform_file] = "data.transform_file"
    texts = {path: read_own(key, path) for path, key in given.items()}
    return {
        path: (f"functions/{hashlib.sha256(text).hexdigest()[:16]}/{Path(path).name}", text)
        for path, text in texts.items()
    }


def freeze(cfg: Config, name: str, run_name: str, inputs: Mapping[str, Any]) -> Frozen:
    """What is written as a run's config.yaml: plain data, resolved, with absolute paths, and its identity."""
    plain = asdict(cfg)
    for section, keys in {
        "model": ("name_or_path", "tokenizer"),
        "data": ("path", "eval_path"),
        "merge": ("adapter",),
        "eval": ("tasks_path",),
    }.items():
        for key in keys:
            if plain[section][key] not in ("bytes", "train"):  # tokenizers, though files may be called so
                plain[section][key] = absolute(plain[section][key])
    for key in ("questions", "reference"):
        plain["eval"]["judge"][key] = absolute(plain["eval"]["judge"][key])
    plain["model"]["chat_template"] = _frozen_template(cfg.model.chat_template)
    for part in plain["data"]["datasets"]:
        part["path"] = absolute(part["path"])
    plain["eval"]["text"]["path"] = absolute(plain["eval"]["text"]["path"])
    own = own_files(cfg)
    if cfg.data.transform_file is not None:
        plain["data"]["transform_file"] = own[cfg.data.transform_file][0]
    for function in plain[cfg.stage].get("reward", {}).get("functions", []):
        file, name_in_it = split_function(function["path"])
        function["path"] = f"{own[file][0]}:{name_in_it}"
    frozen: Frozen = {
        "version": CONFIG_VERSION, "name": name, "stage": cfg.stage, "pipeline": run_name, "identity": "",
        "seed": cfg.seed, "offline": cfg.offline,
        **{section: plain[section] for section in SECTIONS},
        "paths": {"output_base": str(Path(cfg.paths.output_base).expanduser().absolute())},
        "inputs": {role: inputs.get(role) for role in graph.ROLES},
        cfg.stage: plain[cfg.stage],
        "eval": plain["eval"],
    }  # fmt: skip
    frozen["identity"] = identity(frozen)
    return frozen


def folders_of(frozen: Frozen) -> list[str]:
    """Folders and files outside the run that a frozen config names: a container must see them. Pure."""
    data, evaluation = frozen["data"], frozen["eval"]
    named = [
        frozen["model"]["name_or_path"], frozen["model"]["tokenizer"], data["path"], data["eval_path"],
        *(part["path"] for part in data["datasets"]),
        *((source or {}).get("path") for source in frozen["inputs"].values()),
        (frozen.get("merge") or {}).get("adapter"), evaluation["tasks_path"], evaluation["text"]["path"],
        evaluation["judge"]["questions"], evaluation["judge"]["reference"],
    ]  # fmt: skip
    return sorted({path for path in named if path is not None and path.startswith("/")})


def determining(frozen: Frozen) -> dict[str, Any]:
    """The part of a frozen config that determines the output: where and how fast it runs is not in it."""
    stage = frozen["stage"]
    inputs = {role: source and (source["identity"] or source["path"]) for role, source in frozen["inputs"].items()}
    if stage == "eval" and (frozen["inputs"].get("reference") or {}).get("derived"):
        inputs["reference"] = None  # it follows from the model
    if inputs.get("data") is None:  # as above
        inputs.pop("data", None)
    parts = {section: frozen[section] for section in ("stage", "seed", "model", "data", "training", stage)}
    if frozen.get("lora", {}).get("r") is not None:  # configs of before it existed stay what they are
        parts["lora"] = frozen["lora"]
    parts[stage] = _without_engine(stage, frozen[stage])
    training = parts["training"]
    dropped = {"dataloader_num_workers"} | (set() if training.get("torch_compile") else {"torch_compile"})  # as lora
    parts["training"] = {k: v for k, v in training.items() if k not in dropped}
    if "lower_lr" in frozen.get("guardrails", {}).values():  # else they change no weight
        parts["guardrails"] = frozen["guardrails"]
    shared = {key: frozen["parallel"].get(key, False) for key in ("strategy", "offload")}
    return {**parts, "parallel": shared, "inputs": inputs}


def _without_engine(stage: str, section: dict[str, Any]) -> dict[str, Any]:
    """A stage's section with nothing on vLLM but that it generates, where it does: how it is run changes no output."""
    if stage == "eval":
        dropped = {"gpu_memory_utilization", "base_text"}  # the model's identity says on which base it stands
        dropped |= {"backend"} if section.get("backend") == "transformers" else set()
        dropped |= {key for key in ("num_samples", "num_instructions") if not section.get(key)}
        dropped |= {"text"} if (section.get("text") or {}).get("name") is None else set()
        dropped |= {"temperature"} if "num_samples" in dropped else set()
        return _without_outside({k: v for k, v in section.items() if k not in dropped})
    how = section.get("generation", {}).get("backend", "transformers")
    rest = {k: v for k, v in section.items() if k != "generation"}
    return rest if how == "transformers" else rest | {"generation": {"backend": how}}


def _without_outside(section: dict[str, Any]) -> dict[str, Any]:
    """An eval's section with nothing on benchmarks and the judge but what is asked of them, where they are asked."""
    rest = {k: v for k, v in section.items() if k not in ("tasks", "tasks_path", "num_fewshot", "task_limit", "judge")}
    if section.get("tasks"):
        rest |= {k: section.get(k) for k in ("tasks", "tasks_path", "num_fewshot", "task_limit")}
    judge = section.get("judge") or {}
    if judge.get("base_url") is not None:  # where the judge listens, and how patiently it is asked, changes no verdict
        rest["judge"] = {k: judge.get(k) for k in ("model", "questions", "reference", "max_new_tokens")}
    return rest


def identity(frozen: Frozen) -> str:
    """Equal for runs that make the same output."""
    text = json.dumps(determining(frozen), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def changes(old: Frozen, new: Frozen) -> dict[str, tuple[Any, Any]]:
    """Keys that determine the output and differ, with the old and the new value."""
    before, after = _flat(determining(old)), _flat(determining(new))
    both = list(dict.fromkeys([*before, *after]))
    return {key: (before.get(key), after.get(key)) for key in both if before.get(key) != after.get(key)}


# --------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Found:
    """A run directory as it was found."""

    config: Frozen | None = None
    whole: bool = False  # its output is complete
    history: History = field(default_factory=History)
    live: bool | slurm.Unknown = False  # its job is queued or running
    job: slurm.JobRecord | None = None  # that job
    supervised: bool = False  # by a local supervisor on this machine


def decide(name: str, wanted: Frozen, found: Found, root: Path) -> str:
    """What to do about one run: `new`, `done` (reuse), `live` (leave it alone) or `again` (continue it). Pure.

    Raises ConfigError where the directory holds a run with another config, LaunchError where its state is unknown or
    its directory was removed under a job that is queued or running.
    """
    if found.config is None and found.job is not None:
        raise LaunchError(
            f"{name}: job {found.job.job_id} is to run or runs in {root}, and its config is gone from there",
            f"scancel {found.job.job_id}, then the same command again",
        )
    if found.config is not None and found.config["identity"] != wanted["identity"]:
        raise _differs(name, found.config, wanted, root)
    if found.whole:
        return "done"
    if found.supervised or found.live is True:
        return "live"
    if isinstance(found.live, slurm.Unknown):
        which = f"job {found.history.job_id}" if found.history.job_id else "a job"
        raise LaunchError(
            f"{name}: cannot tell whether {which} of {root} is queued or running: {found.live.why}",
            "try again when SLURM answers; a second job must not write the same run directory",
        )
    return "new" if found.config is None else "again"


def stale(job: slurm.JobRecord, needs: Iterable[str]) -> bool:
    """Whether a queued job waits for jobs that can no longer end well, and not for those that will. Pure.

    needs: jobs of its upstream runs that are not done.
    """
    if job.state != "PENDING":
        return False
    return job.reason == NEVER or not waits_for(job).issuperset(needs)


def waits_for(job: slurm.JobRecord) -> set[str]:
    """Ids of the jobs that a queued job waits for; of an array that it follows element by element, the one. Pure."""
    element = job.job_id.partition("_")[2]
    return {
        f"{number}_{element}" if rest == "_*" else f"{number}{rest}"
        for number, rest in re.findall(r":(\d+)(_\*|_\d+|)", job.dependency)
    }


def _differs(name: str, old: Frozen, new: Frozen, root: Path) -> ConfigError:
    changed = changes(old, new)
    inputs = [key for key in changed if key.startswith("inputs.")]
    shown = ", ".join(f"{key}: {_short(a)} -> {_short(b)}" for key, (a, b) in changed.items() if key not in inputs)
    if inputs:
        shown = ", ".join([*([shown] if shown else []), *(f"{key}: another model" for key in inputs)])
    return ConfigError(
        "run_name", new["pipeline"], f"{root} holds a {name} run with another config ({shown})",
        f"run_name={new['pipeline']}-2 for a new pipeline, or the old values to go on with this one",
    )  # fmt: skip


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def ended(history: History) -> bool:
    """Whether the ledger alone shows that no job of this run is queued or running.

    An attempt that was asked to stop by SIGTERM is no such end: SLURM requeues preempted jobs by itself.
    """
    if history.job_id is None or history.cancelled:
        return True
    return history.gave_up or (history.outcome == "finished" and history.action == "exit")


def look(roots: Iterable[Path], cluster: Cluster | None = None) -> dict[Path, Found]:
    """What is in these run directories. cluster: where folders that hold no run may have jobs; None asks no SLURM."""
    configs: dict[Path, Frozen | None] = {}
    questions: dict[str | None, list[Path]] = {}  # by slurm.conf: a job may be on another cluster than the next one
    for root in roots:
        try:
            configs[root] = RunDirectory(root).read_config()
        except (FileNotFoundError, NotADirectoryError):
            configs[root] = None
        where = (configs[root] or {}).get("cluster") or (asdict(cluster) if cluster else {"scheduler": "local"})
        if where["scheduler"] == "slurm":
            questions.setdefault(where["slurm_conf"], []).append(root)
    histories = {root: summarise(ledger.read(RunDirectory(root).ledger)) for root in configs}
    jobs: dict[Path, slurm.JobRecord | slurm.Unknown] = {}
    for conf, asked in questions.items() if cluster is not None else ():
        jobs |= live_jobs({root: histories[root] for root in asked}, conf)
    return {root: _found(root, config, histories[root], jobs.get(root)) for root, config in configs.items()}


def _found(root: Path, config: Frozen | None, history: History, job: slurm.JobRecord | slurm.Unknown | None) -> Found:
    from launchers.local import owned

    return Found(
        config=config,
        whole=config is not None and manifest.problem(RunDirectory(root).model) is None,
        history=history,
        live=job if isinstance(job, slurm.Unknown) else job is not None,
        job=job if isinstance(job, slurm.JobRecord) else None,
        supervised=owned(RunDirectory(root)),
    )


def live_jobs(histories: Mapping[Path, History], conf: str | None) -> dict[Path, slurm.JobRecord | slurm.Unknown]:
    """The queued or running jobs of these run directories; Unknown where SLURM did not answer and one may be there.

    Jobs are known by the folder in their comment: so one is found although the command that submitted it died before
    it wrote the ledger, and no other cluster's job of the same number is taken for it. Where a site puts comments of
    its own on jobs, the number alone has to do.
    """
    folders = {os.path.realpath(root): root for root in histories}  # one folder may be named in several ways
    found: dict[Path, slurm.JobRecord | slurm.Unknown] = {}
    seen = slurm.jobs(user=",".join(sorted(_submitters(histories))), conf=conf)
    if isinstance(seen, slurm.Unknown):
        return {root: seen for root, history in histories.items() if history.job_id is None or not ended(history)}
    known = {history.job_id: root for root, history in histories.items() if history.job_id is not None}
    live = [job for job in seen.values() if job.live]
    for job in sorted(live, key=lambda job: job.job_id in known):  # last: the one that the ledger knows
        root = folders.get(os.path.realpath(job.folder)) if job.folder else known.get(job.job_id)
        if root is not None:
            found[root] = job
    missing = {
        root: history.job_id
        for root, history in histories.items()
        if root not in found and history.job_id is not None and history.job_id not in seen and not ended(history)
    }
    others = slurm.jobs(list(missing.values()), conf=conf) if missing else {}
    for root, job_id in missing.items():  # submitted by somebody who does not own the script any more
        if isinstance(others, slurm.Unknown):
            found[root] = others
        elif job_id in others and others[job_id].live and _belongs(others[job_id], root):
            found[root] = others[job_id]
    return found


def _belongs(job: slurm.JobRecord, root: Path) -> bool:
    return not job.folder or os.path.realpath(job.folder) == os.path.realpath(root)


def _submitters(roots: Iterable[Path]) -> set[str]:
    """Users whose jobs these folders' jobs may be: whoever runs this, and who wrote the job scripts."""
    users = {pwd.getpwuid(os.getuid()).pw_name}
    for root in roots:
        with contextlib.suppress(OSError, KeyError):
            users.add(pwd.getpwuid(RunDirectory(root).script.stat().st_uid).pw_name)
    return users


def finished_runs(output_base: Path) -> dict[str, Path]:
    """Run directories with a complete output, by identity, over all pipelines."""
    found: dict[str, Path] = {}
    for path in sorted(output_base.glob(f"*/*/model/{manifest.NAME}")):
        key = (manifest.read(path.parent) or {}).get("identity")
        if key and key not in found and manifest.problem(path.parent) is None:
            found[key] = path.parent.parent
    return found


# --------------------------------------------------------------------------------------------- the plan


@dataclass
class Planned:
    """One stage of a plan."""

    name: str
    cfg: Config
    frozen: Frozen
    run: RunDirectory
    decision: str  # new, again, live, done, shared (`owner` is it), or held (to be submitted, if a gate upstream held)
    after: list[str]  # upstream stages whose outputs it needs or that it comes after
    job: slurm.JobRecord | None = None  # its job, where it is live
    job_id: str | None = None  # of its job, where it is live or was submitted
    replaces: str | None = None  # job to be cancelled: it waits for an upstream job that can no longer end well
    waits_for: list[str] = field(default_factory=list)  # job ids from outside this plan
    history: History = field(default_factory=History)  # of what is there
    gate_problem: str | None = None  # it is an evaluation that is done, and why its gate does not hold
    held_by: str | None = None  # the eval stage whose gate holds it back
    owner: Planned | None = None  # another point of the sweep submits this very run

    @property
    def started(self) -> bool:
        """Whether an attempt was made: its code is frozen."""
        return self.history.attempts > 0

    @property
    def from_scratch(self) -> bool:
        """Whether what earlier attempts made is to be set aside."""
        return self.decision == "again" and self.cfg.restart

    @property
    def to_submit(self) -> bool:
        return self.decision in ("new", "again")

    @property
    def anew(self) -> bool:
        """Whether this command submits it, here or as another point's."""
        return self.to_submit or self.owner is not None

    @property
    def waits_on(self) -> str | None:
        """The job that makes its output, where there is one."""
        return self.job_id if self.owner is None else self.owner.job_id

    @property
    def elsewhere(self) -> bool:
        """Whether a run of another pipeline is used in this one's place."""
        return self.run.pipeline != self.frozen["pipeline"]


@dataclass
class Plan:
    """Stages, upstream first."""

    name: str  # of the pipeline's folder
    output_base: Path
    stages: dict[str, Planned]
    keep: dict[str, Any] = field(default_factory=dict)  # stages in pipeline.json that this plan says nothing about

    @property
    def folder(self) -> Path:
        return self.output_base / self.name

    @property
    def cluster(self) -> str:
        return next(iter(self.stages.values())).cfg.cluster.name

    @property
    def scheduler(self) -> str:
        return next(iter(self.stages.values())).cfg.cluster.scheduler

    @property
    def slurm_conf(self) -> str | None:
        return next(iter(self.stages.values())).cfg.cluster.slurm_conf

    def description(self) -> dict[str, Any]:
        """What pipeline.json says: the graph, for whoever looks later."""
        stages = {
            p.name: {"run_dir": str(p.run.root), "stage": p.cfg.stage, "after": p.after}
            | {"identity": p.frozen["identity"]}
            | ({"gate": p.frozen["gate"]} if "gate" in p.frozen else {})
            for p in self.stages.values()
        }
        return {"version": 1, "name": self.name, "cluster": self.cluster, "stages": {**self.keep, **stages}}


def _path_input(path: str) -> dict[str, Any]:
    where = absolute(path)
    about = manifest.read(Path(where)) if where else None
    return {"path": where, "run_dir": None, "identity": (about or {}).get("identity")}


def _run_input(root: Path, identity: str | None) -> dict[str, Any]:
    return {"path": str(RunDirectory(root).model), "run_dir": str(root), "identity": identity}


def expected_identity(selection: Selection, name: str) -> str:
    """The identity that a stage would have if this command ran it. Composes its upstream stages."""
    inputs: dict[str, Any] = {}
    for role, source in sources(selection, name).items():
        kind, _, value = (source or "").partition(":")
        if kind == "path":
            inputs[role] = _path_input(value)
        elif kind == "stage":
            inputs[role] = _run_input(selection.output_base, expected_identity(selection, value))
    return str(freeze(_completed(selection, name), name, selection.run_name, inputs)["identity"])


SHAPES_ROWS = ("packing", "packing_strategy", "random_templates")
"""Keys of techniques' own sections on which prepared rows depend."""


def prepare_targets(selection: Selection, name: str) -> dict[str, Any]:
    """What the data of each stage that a prepare stage prepares for depends on, by name.

    `lineage`: what the stage's start model brings, from its first ancestor on: the templates that each stage sets.
    Raises ConfigError for a stage that is not there or has nothing to prepare.
    """
    asked, functions = selection.config(name).prepare.stages, selection.config(name).data.transform_file
    able = [
        other
        for other, node in selection.stages.items()
        if node.stage in PREPARABLE
        and node.data is None
        and selection.config(other).data.transform_file in (None, functions)
        and not _trains_tokenizer(selection, other)
    ]  # what does not exist yet, or is not in the job's code, a stage prepares for itself
    for other in asked:
        if other not in able:
            raise ConfigError("prepare.stages", other, "no stage whose data can be prepared", nearest(other, able))
    targets = {}
    for other in asked or able:
        frozen = freeze(selection.config(other), other, selection.run_name, {})
        section = {k: v for k, v in frozen[frozen["stage"]].items() if k in SHAPES_ROWS}
        path, before = lineage(selection, other)
        targets[other] = {
            "stage": frozen["stage"], "seed": frozen["seed"] if section.get("random_templates") else 0,
            "model": {"tokenizer": frozen["model"]["tokenizer"], "chat_template": frozen["model"]["chat_template"]},
            "data": frozen["data"], "training": {"max_length": frozen["training"]["max_length"]},
            frozen["stage"]: section, "start_model": path, "lineage": before,
        }  # fmt: skip
    return targets


def lineage(selection: Selection, name: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Path of the model that a stage's line begins with (None: from scratch), and the stages before it on that line."""
    kind, _, value = (sources(selection, name)["model"] or "").partition(":")
    if kind == "stage":
        path, before = lineage(selection, value)
        frozen = freeze(selection.config(value), value, selection.run_name, {})
        return path, [*before, {k: frozen["model"][k] for k in ("tokenizer", "chat_template")}]
    return (absolute(value) if kind == "path" else None), []


def _trains_tokenizer(selection: Selection, name: str) -> bool:
    path, before = lineage(selection, name)
    return path is None and [*(m["tokenizer"] for m in before), selection.config(name).model.tokenizer][0] == "train"


def base_text(selection: Selection, name: str) -> dict[str, Any]:
    """The data, frozen, of the base stage that an eval's line begins with: all models of the line are measured on its
    text. {}: there is none, or it is the eval's own data, or takes transforms of the user's that the eval lacks."""
    first, mine = name, selection.config(name)
    while (source := sources(selection, first)["model"] or "").startswith("stage:"):
        first = source.removeprefix("stage:")
    base = selection.config(first)
    if base.stage != "base" or base.data.transform_file not in (None, mine.data.transform_file):
        return {}
    theirs, ours = (freeze(cfg, name, selection.run_name, {})["data"] for cfg in (base, mine))
    return theirs if theirs != ours else {}


def _start_model(judged: Frozen | None) -> dict[str, Any] | None:
    """The model that a judged policy's stage started from, as an eval's reference; None where there is none."""
    start = ((judged or {}).get("inputs") or {}).get("model")
    return {**start, "derived": True} if start and (judged or {}).get("stage") not in ("rm", "sample") else None


def _completed(selection: Selection, name: str) -> Config:
    """A stage's config; of a prepare stage with its targets, of an eval with the base stage's text."""
    cfg = selection.config(name)
    if cfg.stage == "eval" and cfg.eval.text.name is None:
        return replace(cfg, eval=replace(cfg.eval, base_text=base_text(selection, name)))
    if cfg.stage != "prepare":
        return cfg
    return replace(cfg, prepare=replace(cfg.prepare, targets=prepare_targets(selection, name)))


def frozen_gate(node: Node, run_dir: Callable[[str], Path]) -> dict[str, Any] | None:
    """A stage's gate as plain data; None where it has none. run_dir: of the eval stage that it compares with."""
    given = graph.gate_of(node)
    if given is None:
        return None
    parent = {"name": given.parent, "run_dir": str(run_dir(given.parent))} if given.parent is not None else None
    return {**asdict(given), "parent": parent}


def _check_same_gate(name: str, here: Found, now: Mapping[str, Any] | None) -> None:
    """A job in the queue has the gate that it was submitted with."""
    was = (here.config or {}).get("gate")
    if was == now or here.whole:
        return
    shown = [gate.describe(one) if one else "none" for one in (was, now)]
    job = f"scancel {here.job.job_id} first" if here.job is not None else "stop it first"
    raise LaunchError(f"{name}: its gate would change ({shown[0]} -> {shown[1]}), and it is queued or running",
                      f"{job}, or give the same command again when it is done")  # fmt: skip


def _check_gate_outside(name: str, upstream: str, found: Found, root: Path, held: Mapping[str, Any] | None) -> None:
    """Refuse a stage that comes after an evaluation outside the plan whose gate does not hold."""
    if found.whole and (why := gate.failure(RunDirectory(root), held)) is not None:
        problem = f"comes after {upstream}, whose gate does not hold: {why}"
        raise ConfigError("stage", name, problem, gate_fix(upstream))


def make_plan(selection: Selection, ask: bool = True) -> Plan:
    """Decide about every stage. Raises ConfigError and LaunchError; writes nothing. ask: False asks no SLURM."""
    return make_plans([selection], ask)[0]


def make_plans(selections: Sequence[Selection], ask: bool = True) -> list[Plan]:
    """Decide about every stage of several pipelines, which are points of one sweep; SLURM is asked once for all.

    Runs that are the same in several points are planned once, in the first of them; where other pipelines below the
    output folder have them done, or on SLURM queued or running, those are taken. Raises as `make_plan`.
    """
    scopes = [_scope(selection) for selection in selections]
    cluster = selections[0].config(selections[0].wanted[0]).cluster  # one for all
    asked = cluster if ask else None
    found = look([root for scope in scopes for root in scope.roots.values()], asked)
    there = _There(selections[0].output_base, asked if len(selections) > 1 else None)
    return [_plan(scope, found, there) for scope in scopes]


@dataclass(frozen=True)
class _Scope:
    """What a plan is about: the stages, and the run directories to look into."""

    selection: Selection
    described: dict[str, Any]  # stages of pipeline.json, as an earlier command wrote it
    origins: dict[str, dict[str, str | None]]
    needed: dict[str, list[str]]
    outside: list[str]  # upstream stages that are not in the plan
    roots: dict[str, Path]


def _scope(selection: Selection) -> _Scope:
    folder = selection.output_base / selection.run_name
    described = read_description(folder)
    origins = {name: sources(selection, name) for name in selection.wanted}
    needed = {name: _upstream_names(origins[name], selection.stages[name]) for name in selection.wanted}
    outside = list(dict.fromkeys(up for ups in needed.values() for up in ups if up not in selection.wanted))
    # a stage's run directory; of another pipeline, where an earlier command found its finished run there
    roots = {up: Path(described[up]["run_dir"]) if up in described else folder / up for up in outside}
    roots |= {name: folder / name for name in selection.wanted}
    return _Scope(selection, described, origins, needed, outside, roots)


def _kind(frozen: Frozen) -> tuple[str, str]:
    """Equal for runs of which one is enough: a queued evaluation has the gate that it was submitted with."""
    return frozen["identity"], json.dumps(frozen.get("gate"), sort_keys=True)


class _There:
    """Runs that other pipelines have, or earlier points of the same sweep will have."""

    def __init__(self, output_base: Path, cluster: Cluster | None) -> None:
        """cluster: where runs of other pipelines may be queued or running; None: such runs are not shared."""
        self.output_base, self.cluster = output_base, cluster
        self.planned: dict[tuple[str, str], Planned] = {}

    @cached_property
    def finished(self) -> dict[str, Path]:
        """Looked for once, if at all."""
        return finished_runs(self.output_base)

    @cached_property
    def live(self) -> dict[tuple[str, str], tuple[Path, Found]]:
        """Runs of all pipelines that are queued or running on SLURM, and that this user may write a note into."""
        if self.cluster is None or self.cluster.scheduler != "slurm":
            return {}
        described = (read_description(path.parent) for path in sorted(self.output_base.glob(f"*/{PIPELINE_FILE}")))
        roots = {Path(entry["run_dir"]) for stages in described for entry in stages.values() if entry.get("identity")}
        alive: dict[tuple[str, str], tuple[Path, Found]] = {}
        ours = sorted(root for root in roots if os.access(RunDirectory(root).ledger, os.W_OK))
        for root, found in look(ours, self.cluster).items() if ours else ():
            if found.config is None or found.whole or found.job is None or found.job.reason == NEVER:
                continue
            if found.config["cluster"]["slurm_conf"] == self.cluster.slurm_conf:
                alive.setdefault(_kind(found.config), (root, found))
        return alive


def _plan(scope: _Scope, found: Mapping[Path, Found], there_are: _There) -> Plan:
    selection, described, origins, needed, outside = (
        scope.selection, scope.described, scope.origins, scope.needed, scope.outside
    )  # fmt: skip
    folder = selection.output_base / selection.run_name
    roots = dict(scope.roots)

    upstream: dict[str, tuple[Path, str | None, list[str]]] = {}  # run directory, identity, jobs to wait for
    configs: dict[str, Frozen | None] = {}
    gates_outside: dict[str, dict[str, Any] | None] = {}
    for up in outside:
        there = found.get(roots[up], Found())
        if there.config is None:
            identity = expected_identity(selection, up)
            if (same := there_are.finished.get(identity)) is not None:
                roots[up], there = same, Found(RunDirectory(same).read_config(), whole=True)
            elif (alive := there_are.live.get((identity, "null"))) is not None:
                roots[up], there = alive
        user = next(name for name in selection.wanted if up in needed[name])
        jobs = _wait_for(user, up, there, roots[up], selection.config(user))
        upstream[up], configs[up] = (roots[up], (there.config or {}).get("identity"), jobs), there.config
        gates_outside[up] = frozen_gate(
            selection.stages[up],
            lambda parent: Path(described[parent]["run_dir"]) if parent in described else folder / parent,
        )
        if there.live is True or there.supervised:
            _check_same_gate(up, there, gates_outside[up])
        _check_gate_outside(user, up, there, roots[up], gates_outside[up])

    planned: dict[str, Planned] = {}
    for name in selection.wanted:
        cfg = _completed(selection, name)
        inputs: dict[str, Any] = {}
        judged: Frozen | None = None
        for role, source in origins[name].items():
            kind, _, value = (source or "").partition(":")
            if kind == "path":
                inputs[role] = _path_input(value)
            elif kind == "stage":
                inputs[role] = _run_input(*upstream[value][:2])
                if cfg.stage == "eval" and role == "model":
                    judged = configs[value]
        if cfg.stage == "eval" and inputs.get("reference") is None:
            inputs["reference"] = _start_model(judged)
        frozen = freeze(cfg, name, selection.run_name, inputs)
        if (own_gate := frozen_gate(selection.stages[name], lambda parent: upstream[parent][0])) is not None:
            frozen["gate"] = own_gate
        root = roots[name]
        here, replaces, owner = found.get(root, Found()), None, None
        decision = decide(name, frozen, here, root)
        if decision == "new" and (same := there_are.finished.get(frozen["identity"])) is not None:
            root, decision, here = same, "done", found.get(same, Found())
        elif decision == "new" and (owner := there_are.planned.get(_kind(frozen))) is not None:
            root, decision = owner.run.root, "shared"
            if owner.decision == "live":
                decision, here, owner = "live", Found(job=owner.job, history=owner.history), None
        elif decision == "new" and (alive := there_are.live.get(_kind(frozen))) is not None:
            (root, here), decision = alive, "live"
        elif decision == "live":
            _check_same_scheduler(name, here, cfg, root)
            _check_same_gate(name, here, own_gate)
            needs = [job for up in needed[name] for job in upstream[up][2]]
            anew = any(up in planned and planned[up].anew for up in needed[name])
            if here.job is not None and (stale(here.job, needs) or (anew and here.job.state == "PENDING")):
                decision, replaces = "again", here.job.job_id
        held_by = next((planned[up].held_by for up in needed[name] if up in planned and planned[up].held_by), None)
        if held_by is not None and decision in ("new", "again", "shared"):
            decision, replaces, owner = "held", None, None
        why = gate.failure(RunDirectory(root), own_gate) if decision == "done" else None
        planned[name] = Planned(
            name=name, cfg=cfg, frozen=frozen, run=RunDirectory(root), decision=decision, after=needed[name],
            job=here.job if decision == "live" else None,
            job_id=here.job.job_id if decision == "live" and here.job is not None else None, replaces=replaces,
            waits_for=list(dict.fromkeys(job for up in needed[name] if up in outside for job in upstream[up][2])),
            history=here.history, gate_problem=why,
            held_by=name if why is not None else held_by if decision == "held" else None, owner=owner,
        )  # fmt: skip
        if decision in ("new", "again", "live"):
            there_are.planned.setdefault(_kind(frozen), planned[name])
        own = planned[name].job_id
        upstream[name], configs[name] = (root, frozen["identity"], [own] if own is not None else []), frozen
    _check_restart(planned)
    keep = {name: entry for name, entry in described.items() if name not in planned} if selection.only_one else {}
    for up in outside:
        if up not in keep:
            after = _upstream_names(sources(selection, up), selection.stages[up])
            keep[up] = {"run_dir": str(roots[up]), "stage": selection.stages[up].stage, "after": after}
        keep[up].pop("gate", None)
        keep[up] |= {"gate": gates_outside[up]} if gates_outside[up] is not None else {}
    return Plan(selection.run_name, selection.output_base, planned, keep)


def _check_restart(planned: Mapping[str, Planned]) -> None:
    """Refuse restart=true where it would do nothing, rather than leave a run as it is in silence."""
    asked = {name: p.decision for name, p in planned.items() if p.cfg.restart}
    if not asked or not {"done", "live"} & set(asked.values()) or {"again", "new", "shared"} & set(asked.values()):
        return
    words = {"done": "done", "live": "queued or running", "held": "held back by a gate"}
    shown = ", ".join(f"{name} is {words[decision]}" for name, decision in asked.items())
    jobs = [p.job_id for name, p in planned.items() if name in asked and p.job_id is not None]
    cancel = f"scancel {' '.join(jobs)} first, or " if jobs else ""
    raise ConfigError(
        "restart", "true", f"there is nothing to start from scratch: {shown}",
        f"{cancel}run_name={next(iter(planned.values())).frozen['pipeline']}-2 for a new run of the same",
    )  # fmt: skip


def read_description(folder: Path) -> dict[str, Any]:
    """The stages in a pipeline's pipeline.json; none where there is no readable one."""
    try:
        stages = json.loads((folder / PIPELINE_FILE).read_text())["stages"]
        return {name: entry for name, entry in stages.items() if isinstance(entry.get("run_dir"), str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _upstream_names(origins: Mapping[str, str | None], node: Node) -> list[str]:
    named = [source.removeprefix("stage:") for source in origins.values() if source and source.startswith("stage:")]
    return list(dict.fromkeys([*named, *node.after]))


def _wait_for(name: str, upstream: str, found: Found, root: Path, cfg: Config) -> list[str]:
    """Job ids to wait for, for an upstream stage outside the plan. Raises ConfigError where it has no output."""
    if found.whole:
        return []
    if found.live is True and cfg.cluster.scheduler == "slurm" and found.config is not None:
        same = found.config["cluster"]["slurm_conf"] == cfg.cluster.slurm_conf
        if same and found.job is not None:
            return [found.job.job_id]
    if isinstance(found.live, slurm.Unknown):
        problem = f"is to use the output of {upstream}, of which SLURM does not say whether it runs: {found.live.why}"
    elif found.supervised or found.live is True:
        problem = f"is to use the output of {upstream}, which is not done yet ({root})"
    else:
        problem = f"is to use the output of {upstream}, and there is none in {root}"
    fix = f"python -m launchers.submit stage={upstream}, the whole chain with launchers.pipeline, or inputs.model=..."
    raise ConfigError("stage", name, problem, fix)


def _check_same_scheduler(name: str, found: Found, cfg: Config, root: Path) -> None:
    was = (found.config or {})["cluster"]
    where = "local" if found.supervised else was["name"]
    if found.supervised != (cfg.cluster.scheduler == "local") or (
        not found.supervised and was["slurm_conf"] != cfg.cluster.slurm_conf
    ):
        raise LaunchError(
            f"{name}: {root} is queued or running on cluster={where}, not on {cfg.cluster.name}",
            f"cluster={where}, or cancel it there first",
        )
