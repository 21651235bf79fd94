"""The card of an output: what it is, where it comes from, what it is worth, for people (Markdown) and hubs (YAML).

`lineage`, `evaluations` and `gather` read run directories; the rest is pure. What is not known is said, never guessed:
an ancestor whose folder was removed, an evaluation that is not whole. What is local (paths, nodes, secrets) is in
nothing made here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf.datasets import KNOWN
from conf.schema import Config
from launchers import runs, status, table, worth
from launchers.preflight import HUB_ID
from post_training.run import accounting, environment, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure, Results

if TYPE_CHECKING:
    import jinja2

    from launchers.runs import Look

LINEAGE_VERSION = 1
CONFIG_FILE, LINEAGE_FILE, CARD_FILE = "training_config.yaml", "lineage.json", "README.md"
TECHNIQUES = {
    "base": "pretraining", "sft": "supervised fine-tuning", "distill": "fine-tuning on reasoning traces",
    "merge": "merging an adapter into its model", "rm": "Bradley-Terry reward modelling", "ppo": "PPO", "dpo": "DPO",
    "orpo": "ORPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO", "sample": "rejection sampling",
}  # fmt: skip
"""What stages do, in words."""
UNPUBLISHED = ("eval", "prepare")
"""Stages whose output is nothing to publish by itself."""
NOT_OF_TRL = ("ppo", "merge", "sample")
NUM_SAMPLES = 3


# ------------------------------------------------------------------------------------------------------ escaping


class Markdown(str):
    """Text that is Markdown already."""


def flat(text: object, width: int = 300) -> str:
    """One line of printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


_SPECIAL = re.compile(r"[^\w\s.,:;=+/%()'\"?-]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")


def escape(value: object) -> Markdown:
    """Text that means nothing to Markdown or HTML, in one line. How a line begins is the template's."""
    return Markdown(_SPECIAL.sub(lambda found: f"&#{ord(found[0])};", flat(value)))


def code(value: object) -> Markdown:
    """Text in the shape of code."""
    line = flat(value)
    if line and not re.search(r"[`|\\<>&]", line):
        return Markdown(f"`{line}`")
    return Markdown(f"<code>{escape(line)}</code>")


def quoted(value: object) -> Markdown:
    """A string of Python's, for a block of code."""
    return Markdown(json.dumps(flat(value)).replace("`", "\\u0060"))


# ------------------------------------------------------------------------------------------------ what is private

_SECRET_NAME = re.compile(r"(?i)(^|_)(\w*key|secret|password|passwd|credentials?|auth|token)(_\w+)?$")
_SECRET_KEY = re.compile(r"(?i)(^|_)(api_?key|access_?key|secret|password|passwd|credentials?|auth|token)$")
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|AKIA)[A-Za-z0-9_-]{12,}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_ABSOLUTE = re.compile(r"(?<![\w.:/<~-])(?:~|/[^\s/'\"`,;:<>|(){}\[\]]+)(?:/[^\s/'\"`,;:<>|(){}\[\]]+)+/?")


class Cleaner:
    """Takes out of published text what is this machine's or its user's: secrets, and all of a path but its end."""

    def __init__(self, environment: Mapping[str, str], configs: Iterable[Mapping[str, Any]] = ()) -> None:
        configs = list(configs)
        given = {v for k, v in environment.items() if _SECRET_NAME.search(k)}
        for config in configs:  # nothing of slurm.env is published, wherever it stands
            env = _part(_part(config, "slurm"), "env")
            given |= {str(v) for k, v in env.items() if _SECRET_NAME.search(str(k)) or len(str(v)) >= 16}
        # a short one ("1", "true") is no secret, and is in every text
        self.secrets = sorted((v for v in given if len(v) >= 8 and not v.startswith("/")), key=len, reverse=True)
        places = {str(Path.home()), str(Path.cwd()), *(str(_part(c, "paths").get("output_base")) for c in configs)}
        self.places = sorted((p for p in places if p.startswith("/") and len(p) > 1), key=len, reverse=True)

    def text(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        text = _CREDENTIALS.sub("", _SECRET_VALUE.sub("***", text))
        if re.match(r"[/~]", text) and "\n" not in text and "/" in text.strip("/"):
            return Path(text).name
        for place in self.places:
            text = re.sub(rf"(?<![\w.~-]){re.escape(place.rstrip('/'))}(?:/|(?![\w.-]))", "", text)
        return _ABSOLUTE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)

    def value(self, value: Any) -> Any:
        """Plain data with every text cleaned, and without keys that are called like a secret."""
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if not _SECRET_KEY.search(str(k))}
            return {(self.text(k) if isinstance(k, str) else k): self.value(v) for k, v in kept.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def secret_in(self, text: str) -> bool:
        return any(secret in text for secret in self.secrets) or _SECRET_VALUE.search(text) is not None


def _part(value: object, name: str) -> dict[str, Any]:
    """A section of plain data that may be damaged."""
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------------------------------------- lineage


@dataclass
class Member:
    """A run that an output descends from, or the output's own, as far as it is known."""

    key: str  # its folder's real path, or what is given in its place
    name: str
    pipeline: str
    identity: str | None
    run: RunDirectory | None = None  # None: its folder is gone, or holds something else
    problem: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # role -> key of a member, or hub:<id>, or local:<name>

    @property
    def technique(self) -> str:
        return str(self.config.get("stage", "?"))


def hub_id(path: str | None) -> str | None:
    """The hub's name of a model or data set that a config's value points to, in the hub's cache too."""
    if path is None:
        return None
    if found := re.search(r"(?:^|/)(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/\w+/?$", path):
        return f"{found[1]}/{found[2]}"
    if path.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(path) or Path(path).exists():
        return None
    return path


def _run_of(source: Mapping[str, Any]) -> str | None:
    """The run directory that an input of a frozen config comes from."""
    folder, path = source.get("run_dir"), source.get("path")
    if isinstance(folder, str) and folder:
        return folder
    if isinstance(path, str) and path.startswith("/"):  # a model folder that was given by its path
        for parent in list(Path(path).parents)[:2]:
            if (parent / "config.yaml").is_file():
                return str(parent)
    return None


def lineage(look: Look) -> list[Member]:
    """The runs that an output descends from, ancestors first, its own last."""
    members: dict[str, Member] = {}

    def visit(key: str, folder: Path, identity: str | None) -> None:
        if key in members:
            return
        member = members[key] = _member(key, folder, identity, look.run.root)
        for role, source in _part(member.config, "inputs").items():
            if not isinstance(source, dict):
                continue
            run_dir = _run_of(source)
            if run_dir is not None:
                own = source.get("identity")
                member.inputs[str(role)] = runs.real(run_dir)
                visit(runs.real(run_dir), Path(run_dir), own if isinstance(own, str) else None)
            elif isinstance(path := source.get("path"), str):
                found = hub_id(path)
                member.inputs[str(role)] = f"hub:{found}" if found else f"local:{Path(path).name}"
        members[key] = members.pop(key)  # behind those that it comes from

    visit(runs.real(look.run.root), look.run.root, None)
    return list(members.values())


def _member(key: str, folder: Path, identity: str | None, own: Path) -> Member:
    """What is known of a run; where its folder was moved with the whole pipeline, it is found beside `own`."""
    member = Member(key, folder.name, folder.parent.name, identity)
    beside = (own.parent / folder.name, own.parent.parent / folder.parent.name / folder.name)
    member.problem = "its folder is gone"
    for place in dict.fromkeys((folder, *beside)):
        there = runs.Look(place.parent.name, place.name, RunDirectory(place)).read()
        if there.config_problem:
            member.problem = there.config_problem
        if not there.config:
            continue
        found = there.config.get("identity")
        if identity is not None and found != identity:
            member.problem = "its folder holds another run now"
            continue
        member.run, member.config, member.problem = there.run, there.config, None
        member.identity = found if isinstance(found, str) else identity
        break
    return member


def origin(members: list[Member]) -> str | None:
    """The pretrained model that the last member goes back to: hub:<id>, local:<name>, or None."""
    by_key = {m.key: m for m in members}
    at: Member | None = members[-1]
    for _ in members:
        source = at.inputs.get("model") if at else None
        if source is None or source.startswith(("hub:", "local:")):
            return source
        at = by_key.get(source)
    return None


def lineage_file(members: list[Member], cleaner: Cleaner) -> str:
    """lineage.json: every run with its identity, its inputs, and the hash of its output's manifest."""
    names = {m.key: m.identity or m.name for m in members}
    runs = []
    for m in members:
        entry: dict[str, Any] = {"name": m.name, "pipeline": m.pipeline, "stage": m.config.get("stage")}
        entry |= {"identity": m.identity, "inputs": {r: names.get(k, k) for r, k in m.inputs.items()}}
        if m.run is not None:
            try:
                text = (m.run.model / manifest.NAME).read_bytes()
                entry["manifest_sha256"] = hashlib.sha256(text).hexdigest()
            except OSError:
                m.problem = m.problem or "it has no complete output any more"
        if m.problem:
            entry["not_known"] = m.problem
        runs.append(cleaner.value(entry))
    return json.dumps({"version": LINEAGE_VERSION, "runs": runs}, indent=1) + "\n"


PUBLISHED = ("version", "name", "stage", "pipeline", "identity", "seed", "model", "data", "training", "lora",
             "checkpointing", "parallel", "guardrails", "eval")  # fmt: skip
"""Parts of a frozen config that are published, beside the stage's own. What a cluster is called, who pays and where the
files are is not: a part that is added to the config later is not published until it is named here."""


def config_file(config: Mapping[str, Any], cleaner: Cleaner) -> str:
    """training_config.yaml: the frozen config without what is this machine's or its user's."""
    own = str(config.get("stage"))
    kept = {k: v for k, v in config.items() if k in PUBLISHED or (k == own and own in TECHNIQUES)}
    slurm = _part(config, "slurm")
    kept["slurm"] = {k: slurm[k] for k in ("num_nodes", "gpus_per_node", "gpu_type") if k in slurm}
    return yaml.safe_dump(cleaner.value(kept), sort_keys=False, allow_unicode=True)


# --------------------------------------------------------------------------------------------------- evaluations


@dataclass(frozen=True)
class Evaluation:
    """What a stage of the lineage is worth."""

    member: Member
    results: Results
    samples: list[dict[str, Any]]
    config: dict[str, Any]  # the eval stage's
    asked: str = ""  # what it was asked, as compare says it: only what was asked the same is compared


def evaluations(members: list[Member]) -> tuple[dict[str, Evaluation], list[str]]:
    """What is known of each member's worth, by key; and what is not shown, with the reason."""
    found: dict[str, Evaluation] = {}
    left_out: list[str] = []
    by_model = {runs.real(m.run.model): m for m in members if m.run is not None}
    by_root = {runs.real(m.run.root): m for m in members if m.run is not None}
    by_identity = {m.identity: m for m in members if m.run is not None and m.identity is not None}  # outputs that moved
    for folder in dict.fromkeys(m.run.root.parent for m in members if m.run is not None):
        looks = runs.looks_of(folder)
        good, judges = [], {}
        for look in looks:
            judged = by_root.get(look.inputs().get("model", "")) or by_identity.get(_model_identity(look) or "")
            if look.config.get("stage") != "eval":
                good.append(look)
            elif judged is None:
                continue  # of a stage that is no ancestor
            elif (problem := _problem_of(look, judged)) is not None:
                left_out.append(f"{look.name}: {problem}")
            else:
                good.append(look)
                judges[judged.key] = look.config
        for one in worth.judged_stages(good):
            member = by_model.get(runs.real(one.model))
            if member is not None and member.key in judges:
                found[member.key] = Evaluation(member, one.results, one.samples, judges[member.key], one.asked)
    return found, left_out


def _model_identity(look: Look) -> str | None:
    found = _part(_part(look.config, "inputs"), "model").get("identity")
    return found if isinstance(found, str) else None


def _problem_of(look: Look, judged: Member) -> str | None:
    """Why what an eval stage found is not shown."""
    if look.output_problem is not None:
        return f"it is not whole ({look.output_problem})"
    try:
        if (problem := manifest.problem(look.run.model, hashes=True)) is not None:
            return f"its output is damaged ({problem})"
        results.read(look.run)
        for line in look.run.samples.read_text(encoding="utf-8").splitlines():
            json.loads(line)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        return f"its output cannot be read ({type(error).__name__})"
    source = _part(_part(look.config, "inputs"), "model")
    if judged.identity is not None and source.get("identity") not in (None, judged.identity):
        return "it judged another run that was in this folder"
    return None


def interval(name: str, figure: Figure | None) -> str:
    """A figure with its 95 % interval where it is known."""
    if figure is None or figure.low is None or figure.high is None:
        return results.shown(name, figure)
    low, high = (results.shown(name, Figure(end)).removesuffix(" %") for end in (figure.low, figure.high))
    return f"{results.shown(name, figure)} ({low} to {high})"


def against(ours: Figure | None, theirs: Figure | None, scale: float) -> str:
    """A change as the table shows it, marked as compare marks it."""
    if ours is None or theirs is None:
        return ""
    return f"{scale * (ours.value - theirs.value):+.1f} {worth.mark(worth.outside(ours, theirs))}".rstrip()


def worth_table(
    members: list[Member], found: Mapping[str, Evaluation], own: Evaluation | None = None
) -> list[list[str]]:
    """The across-stages table, its titles first; empty where nothing was judged.

    Columns: what `own` has been judged by, None: any stage; and what each stage is worth.
    """
    judged = [found[m.key] for m in members if m.key in found]
    if not judged:
        return []
    heads = {e.results.headline for e in judged}
    wanted = {n for e in ([own] if own else judged) for n in e.results.figures if "/" not in n}
    wanted |= {n for e in judged for n in e.results.figures if n in heads}
    names = [n for n in results.METRICS if n in wanted] + sorted(wanted - results.METRICS.keys())
    names.sort(key=lambda n: n not in heads)  # what a model is worth stands first
    rows = [["stage", *(results.metric(n).title for n in names), "vs parent"]]
    for e in judged:
        figures, head = e.results.figures, e.results.headline
        parent = found.get(e.member.inputs.get("model", ""))
        delta = ""
        if head is not None and parent is not None and (parent.results.headline, parent.asked) == (head, e.asked):
            delta = against(figures.get(head), parent.results.figures.get(head), results.metric(head).scale)
        rows.append([e.member.name, *(interval(n, figures.get(n)) for n in names), delta])
    return rows


def benchmark_rows(found: Evaluation | None) -> list[list[str]]:
    """Benchmarks' figures of the pushed stage: task, metric, value, number of problems."""
    rows = []
    for name, figure in (found.results.figures if found else {}).items():
        if "/" in name:
            task, _, metric = name.partition("/")
            rows.append([task, metric, interval(name, figure), "" if figure.count is None else str(figure.count)])
    return rows


# --------------------------------------------------------------------------------------------- how it was trained


UNSHAPING = ("dataloader_num_workers", "gradient_checkpointing", "per_device_train_batch_size")
"""Settings that say how fast a stage was, not what came out."""


@cache
def _defaults() -> dict[str, Any]:
    return asdict(Config())


def settings_of(config: Mapping[str, Any]) -> list[str]:
    """key=value of what is not as by default and shapes the output; the learning rate always."""
    own = str(config.get("stage"))
    found = []
    for section in ("training", own, "lora", "parallel"):
        defaults = _defaults().get(section)
        if not isinstance(defaults, dict) or (section == "lora" and _part(config, "lora").get("r") is None):
            continue
        for key, value in _flat(_part(config, section)).items():
            usual = _flat(defaults).get(key)
            if key in UNSHAPING or (section == "parallel" and key not in ("strategy", "offload")):
                continue
            if key == "lr" or value != usual:
                shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                found.append(f"{section}.{key}={flat(shown, 60)}")
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flattened: dict[str, Any] = {}
    for key, item in value.items():
        flattened |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return flattened


def data_of(member: Member) -> list[tuple[str, str | None, bool]]:
    """The data sets that a stage trains on: what it is called, its id on the hub, and whether its publisher's own."""
    if member.technique in ("merge", "prepare", "?"):
        return []
    if source := member.inputs.get("data"):
        return [(f"records of {Path(source).name}", None, False)]
    found = []
    for part in _parts(_part(member.config, "data")):
        name, path = str(part.get("name")), part.get("path")
        known = KNOWN.get(name)
        if isinstance(path, str):
            found.append((f"{name}: {Path(path).name}", hub_id(path), False))
        else:
            found.append((name, known.hub_id if known else None, known is not None))
    return found


def _parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets of a frozen config's data section: those of a mix, or the one."""
    given = data.get("datasets")
    return [part for part in given if isinstance(part, dict)] if isinstance(given, list) and given else [data]


def rows_of(member: Member) -> str:
    """How many rows of each data set a stage trained on, where it wrote that down."""
    if member.run is None:
        return ""
    try:
        reports = json.loads(member.run.data_report.read_text(encoding="utf-8"))
        sources = [s for report in reports for s in report["sources"]]
        return ", ".join(f"{s['name']} {int(s['rows'])}" for s in sources)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def tokens_of(run: RunDirectory) -> int | None:
    """The newest count of tokens in a run's metrics."""
    try:
        lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if '"num_tokens"' in line:
            try:
                found = table.number(json.loads(line)["num_tokens"])
            except (ValueError, KeyError, TypeError):
                continue
            if found is not None:
                return int(found)
    return None


def _story(member: Member) -> dict[str, Any]:
    """A row of the table of how it was trained."""
    row: dict[str, Any] = {"name": member.name, "technique": TECHNIQUES.get(member.technique, member.technique)}
    starts = []
    for role, key in member.inputs.items():
        what = key.removeprefix("hub:").removeprefix("local:") if ":" in key[:6] else Path(key).name
        starts.append(what if role == "model" else f"{role.replace('_', ' ')} {what}")
    row["from"] = ", ".join(starts) or ("" if member.problem else "random weights")
    row["data"] = ", ".join(name for name, _, _ in data_of(member))
    row["settings"], row["problem"] = settings_of(member.config), member.problem
    row["steps"] = row["tokens"] = ""
    if member.run is not None:
        about = manifest.read(member.run.model)
        step = about.get("step") if isinstance(about, dict) else None
        row["steps"] = str(step) if isinstance(step, int) else ""
        if (tokens := tokens_of(member.run)) is not None:
            row["tokens"] = f"{tokens:,}"
    return row


def effort(members: list[Member]) -> str | None:
    """Attempts, failures and goodput of the whole lineage in a line; None where no ledger tells."""
    accounts, attempts = [], 0
    for member in members:
        if member.run is not None:
            story = table.read_history(member.run)
            attempts += story.history.attempts
            accounts.append(accounting.account(story.events))
    if not attempts:
        return None
    total = accounting.together(accounts)
    said = f"{_count(attempts, 'attempt')} in {_count(len(accounts), 'run')}"
    said += f" ({_count(attempts - len(accounts), 'requeue')}, {_count(total.failures, 'failure')})"
    goodput = "" if total.goodput is None else f", goodput {status.percent(total.goodput)}"
    return f"{said}; {table.duration(total.held)} of job time{goodput}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------ the card


@dataclass(frozen=True)
class Card:
    """What is published beside the model's own files."""

    readme: str
    config: str
    lineage: str
    kind: str  # policy, reward or dataset


def kind_of(folder: Path, technique: str) -> str:
    """What an output is: a policy, a reward model, or records."""
    if technique == "sample":
        return "dataset"
    architectures = _read_json(folder / "config.json").get("architectures") or []
    return "reward" if any("SequenceClassification" in str(a) for a in architectures) else "policy"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make(
    look: Look, folder: Path, repo: str | None, license: str | None, step: int | None, environment: Mapping[str, str]
) -> Card:
    """The card of the output in `folder`, of a run or of its inference checkpoint at `step`."""
    members = lineage(look)
    cleaner = Cleaner(environment, [m.config for m in members])
    found, left_out = evaluations(members)
    kind = kind_of(folder, members[-1].technique)
    own = None if step is not None else found.get(members[-1].key)  # of a checkpoint nothing was judged
    facts = gather(members, found, own, left_out, folder, kind, step)
    facts["repo"] = repo or "user/name"
    data = card_data(members, own, kind, license, str(facts["title"]))
    body = environment_of_cards().get_template("model_card.md.j2").render(**_cleaned(facts, cleaner))
    text = f"---\n{data}\n---\n\n{body.strip()}\n"
    return Card(text, config_file(members[-1].config, cleaner), lineage_file(members, cleaner), kind)


def _cleaned(value: Any, cleaner: Cleaner) -> Any:
    if isinstance(value, dict):
        return {k: _cleaned(v, cleaner) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(v, cleaner) for v in value]
    return cleaner.text(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def gather(
    members: list[Member], found: Mapping[str, Evaluation], own: Evaluation | None, left_out: list[str], folder: Path,
    kind: str, step: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What the template shows."""
    last = members[-1]
    start = origin(members)
    unjudged = [m.name for m in members if m.run is not None and m.key not in found and m.technique != "sample"]
    asked = {k: _part(own.config, "eval").get(k) for k in ("num_problems", "max_new_tokens", "backend")} if own else {}
    settings = asked | (dict(own.results.settings) if own else {})
    return {
        "title": f"{last.pipeline}/{last.name}" + (f", step {step}" if step is not None else ""),
        "kind": kind, "step": step, "technique": TECHNIQUES.get(last.technique, last.technique),
        "is_base": last.technique == "base",
        "origin": None if start is None else start.partition(":")[2],
        "origin_is_local": bool(start and start.startswith("local:")),
        "has_template": (folder / "chat_template.jinja").is_file()
        or "chat_template" in _read_json(folder / "tokenizer_config.json"),
        "prompt": _example(own), "max_new_tokens": _max_new_tokens(own.config if own else last.config),
        "worth": (worth := worth_table(members, found, own)),
        "help": _help(worth[0] if worth else []), "benchmarks": benchmark_rows(own),
        "judged": own is not None, "judged_on": _judged_on(own),
        "settings": [f"{k}={flat(v, 80)}" for k, v in settings.items() if v is not None],
        "left_out": left_out, "unjudged": unjudged,
        "story": [_story(m) for m in members], "effort": effort(members),
        "data": _data_rows(members), "samples": _answers(own),
        "report": _sample_report(folder) if kind == "dataset" else [],
        "identity": last.identity, "versions": _versions(last),
        "config_file": CONFIG_FILE, "lineage_file": LINEAGE_FILE,
    }  # fmt: skip


def _help(titles: list[str]) -> list[tuple[str, str]]:
    return [(m.title, m.help) for m in results.METRICS.values() if m.title in titles]


def _max_new_tokens(config: Mapping[str, Any]) -> int:
    given = table.number(_part(config, "eval").get("max_new_tokens"))
    return int(given) if given else 256


def _judged_on(own: Evaluation | None) -> str:
    """The data set of an evaluation, and how many problems."""
    if own is None:
        return ""
    parts = _parts(_part(own.config, "data"))
    count = own.results.score.count if own.results.score else None
    names = ", ".join(str(p.get("name")) for p in parts)
    return f"{count} held-out problems of {names}" if count else f"held-out records of {names}"


def _is_published(data: dict[str, Any]) -> bool:
    """Whether records are a publisher's own or generated, so that a card may show some of them."""
    parts = _parts(data)
    known = all(str(p.get("name")) in KNOWN and p.get("name") not in ("custom", "text") for p in parts)
    return known and not any(p.get("path") for p in parts) and not data.get("eval_path")


def _answers(own: Evaluation | None) -> list[dict[str, str]]:
    """The first held-out problems with the model's answers, where the problems are public anyway."""
    if own is None or not _is_published(_part(own.config, "data")):
        return []
    shown = []
    for sample in own.samples[:NUM_SAMPLES]:
        if isinstance(sample, dict) and {"prompt", "completion"} <= sample.keys():
            right = {True: "yes", False: "no"}.get(sample.get("correct"), "")  # type: ignore[arg-type]
            shown.append({"prompt": sample["prompt"], "completion": sample["completion"], "right": right})
    return shown


def _example(own: Evaluation | None) -> Markdown:
    answers = _answers(own)
    return quoted(answers[0]["prompt"] if answers else "What is 26 + 27?")


def _data_rows(members: list[Member]) -> list[dict[str, Any]]:
    """Each data set of the lineage once: who trained on it, how many rows, its licence where it is known."""
    rows: dict[str, dict[str, Any]] = {}
    for member in members:
        for name, hub, own in data_of(member):
            known = KNOWN.get(name.partition(":")[0])
            licence = getattr(known, "licence", None) or getattr(known, "license", None) if own else None
            new: dict[str, Any] = {
                "name": name,
                "hub": hub,
                "stages": [],
                "rows": [],
                "licence": licence or "not known here",
            }
            if known is not None and own and hub is None and not licence:
                new["licence"] = "generated by this pipeline"
            row = rows.setdefault(name, new)
            row["stages"].append(member.name)
            if counted := rows_of(member):
                row["rows"].append(f"{member.name}: {counted}")
    return list(rows.values())


def _sample_report(folder: Path) -> list[tuple[str, str]]:
    """The figures of a sample stage's output."""
    words = {
        "prompts": "prompts asked", "answered": "prompts with a completion that was kept", "kept": "completions kept",
        "completions": "completions sampled", "reward": "mean reward of all completions",
    }  # fmt: skip
    found = _read_json(folder / "results.json")
    return [(word, f"{value:g}") for key, word in words.items() if (value := table.number(found.get(key))) is not None]


VERSIONS = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "vllm")
"""Packages that a card names."""


def _versions(last: Member) -> str:
    """What the output was made with, as its newest attempt wrote it down; where none did, that is said."""
    lines = environment.read(last.run) if last.run is not None else []
    packages = _part(lines[-1], "packages") if lines else {}
    found = [f"{name} {packages[name]}" for name in VERSIONS if isinstance(packages.get(name), str)]
    if not found:
        return "not recorded"
    python = lines[-1].get("python")
    return ", ".join([*found, *([f"Python {python}"] if isinstance(python, str) else [])])


def card_data(members: list[Member], own: Evaluation | None, kind: str, license: str | None, title: str) -> str:
    """The YAML at the card's top, as huggingface_hub writes it."""
    from huggingface_hub import DatasetCardData, ModelCardData

    last = members[-1]
    techniques = dict.fromkeys(m.technique for m in members if m.technique in TECHNIQUES)
    tags = [last.technique, *(["trl"] if last.technique not in NOT_OF_TRL else []), "post-training"]
    if kind == "dataset":
        files = [{"config_name": "default", "data_files": [{"split": "train", "path": "records.jsonl"}]}]
        return DatasetCardData(license=license, tags=tags, configs=files).to_yaml()
    start = origin(members) or ""
    sets = [hub for m in members for _, hub, _ in data_of(m) if hub is not None]
    data = ModelCardData(
        library_name="transformers",
        base_model=start.removeprefix("hub:") if start.startswith("hub:") else None,
        datasets=list(dict.fromkeys(sets)) or None,
        license=license,
        pipeline_tag="text-classification" if kind == "reward" else "text-generation",
        tags=list(dict.fromkeys([*tags, *techniques])),
        model_name=flat(title, 100),
        eval_results=_eval_results(own, kind) or None,
    )
    if data.eval_results is None:
        data.pop("model_name")
    return data.to_yaml()


def _eval_results(own: Evaluation | None, kind: str) -> list[Any]:
    from huggingface_hub import EvalResult

    if own is None:
        return []
    data = _part(own.config, "data")
    name = flat(data.get("name") or "held-out", 100)
    known = KNOWN.get(name)
    dataset = (known.hub_id if known and not data.get("path") else None) or name
    found = []
    for metric, figure in own.results.figures.items():
        task, slash, own_name = metric.partition("/")
        found.append(EvalResult(
            task_type="text-classification" if kind == "reward" else "text-generation",
            dataset_type=flat(task, 100) if slash else dataset,
            dataset_name=flat(task, 100) if slash else f"{name} (held out)",
            metric_type=flat(own_name if slash else metric, 100),
            metric_name=flat(own_name if slash else results.metric(metric).help, 100),
            metric_value=figure.value,
        ))  # fmt: skip
    return found


@cache
def environment_of_cards() -> jinja2.Environment:
    """Templates of Markdown: whatever is put in is escaped, unless it says that it is Markdown."""
    import jinja2

    from launchers.render import TEMPLATES

    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters["code"] = code
    return result
