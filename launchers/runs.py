"""What is known of the runs of pipelines: read from the run directories, and from one squeue call.

`collect` gives one row a run, which status shows and other commands build on. Hydra is not started: a look should
take no longer than squeue does. A source that does not answer makes a state unknown, never fine.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers import points, slurm, table
from launchers.errors import LaunchError
from launchers.local import owned
from launchers.states import is_local, row_state
from post_training.run import accounting, gate, ledger, manifest, results
from post_training.run.directory import RunDirectory, is_there, load_yaml
from post_training.run.history import History

# ------------------------------------------------------------------------------------------ the rows


@dataclass
class Look:
    """What is known of one run before SLURM is asked."""

    pipeline: str
    name: str
    run: RunDirectory
    after: tuple[str, ...] | None = None
    gate: dict[str, Any] | None = None  # of an eval stage
    config: dict[str, Any] = field(default_factory=dict)
    config_problem: str | None = None
    story: table.Story = field(default_factory=lambda: table.Story(History()))
    output_problem: str | None = "no manifest.json"

    @property
    def done(self) -> bool:
        return self.output_problem is None

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def inputs(self) -> dict[str, str]:
        """Run directories of its inputs, by the input's name."""
        found = {}
        for name, source in self.section("inputs").items():
            folder = source.get("run_dir") if isinstance(source, dict) else None
            if isinstance(folder, str) and folder:
                found[str(name)] = real(folder)
        return found

    def read(self) -> Look:
        """Fill in what the run directory says. Damage is noted, never raised."""
        try:
            config = load_yaml(self.run.config.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                self.config = config
            else:
                self.config_problem = "config.yaml is damaged: no mapping"
        except FileNotFoundError:
            pass  # a stage of the pipeline that is not submitted yet
        except Exception as error:  # a YAML parser has many ways to say no
            self.config_problem = f"config.yaml cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        self.story = table.read_history(self.run)
        self.output_problem = _output_problem(self.run.model)
        return self


def _output_problem(folder: Path) -> str | None:
    try:
        return manifest.problem(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{manifest.NAME} is damaged"


def real(path: Path | str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL in a damaged file's path
        return str(path)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def find_pipelines(output_base: Path, names: list[str]) -> list[Path]:
    """The folders of these pipelines, or of all. Raises LaunchError where one does not exist."""
    if not output_base.is_dir():
        raise LaunchError(f"paths.output_base={output_base}: no such folder", _nearest(output_base))
    if names:
        for name in names:
            if not (output_base / name).is_dir():
                raise LaunchError(f"run_name={name}: not in {output_base}", _nearest(output_base / name))
            if not os.access(output_base / name, os.R_OK | os.X_OK):
                problem = f"run_name={name}: {output_base / name} cannot be read"
                raise LaunchError(problem, "ask its owner, or another run_name")
        return [output_base / name for name in dict.fromkeys(names)]
    # another user's folder that cannot be looked into is none of ours, and no error
    found = [folder for folder in _list(output_base) if is_there(folder / "pipeline.json") or _runs_in(folder)]
    return sorted(found, key=lambda folder: is_there(folder / "pipeline.json") and folder.stat().st_mtime)


def _runs_in(folder: Path) -> list[Path]:
    return [path for path in _list(folder) if is_there(path / "config.yaml")]


def _nearest(path: Path) -> str:
    """What to give in the place of a path that does not exist, from what is beside it."""
    parent = path.parent
    if not parent.is_dir():
        return f"give its path; there is no {parent} either"
    there = [folder.name for folder in _list(parent) if not folder.name.startswith(".")]
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
    return f"one of: {shown}" if there else f"{parent} is empty; submit something first"


def looks_of(folder: Path) -> list[Look]:
    """The runs of a pipeline, in its graph's order; further runs in its folder come last."""
    looks: dict[str, Look] = {}
    try:
        stages = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))["stages"]
        for name, node in stages.items():
            run_dir = Path(node["run_dir"])
            if is_there(folder / name / "config.yaml") or not is_there(run_dir):
                run_dir = folder / name  # not there yet, or the outputs were moved or copied
            after = tuple(str(parent) for parent in node.get("after") or ())
            held = node.get("gate")
            looks[name] = Look(
                folder.name, name, RunDirectory(run_dir), after, held if isinstance(held, dict) else None
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # without it the folders speak for themselves
    known = {real(look.run.root) for look in looks.values()}
    others = [Look(folder.name, path.name, RunDirectory(path)) for path in _runs_in(folder)]
    others = [look.read() for look in others if real(look.run.root) not in known]
    others.sort(key=lambda look: (look.story.history.submitted or float("inf"), look.name))
    return [look.read() for look in looks.values()] + others


def collect(output_base: Path, names: list[str]) -> list[dict[str, Any]]:
    """One row a run: what the table and the JSON show. Asks SLURM once, for the runs that are not done."""
    pipelines = [looks_of(folder) for folder in find_pipelines(output_base, names)]
    jobs = ask_slurm([look for looks in pipelines for look in looks])
    now = time.time()
    return [row for looks in pipelines for row in rows_of(looks, jobs, now)]


_JOB_ID = re.compile(r"[0-9]{1,12}(_[0-9]{1,12})?")
Jobs = dict[str | None, dict[str, slurm.JobRecord] | slurm.Unknown]


def ask_slurm(looks: list[Look]) -> Jobs:
    """squeue's answers by slurm.conf: one call, unless runs of several clusters are looked at.

    A run whose ledger names no job may have one: the command that submitted it died before it wrote that down, or is
    about to. Then one more call looks for it by its folder, and its job id is taken from there.
    """
    ids: dict[str | None, list[str]] = {}
    unnamed: dict[str | None, list[Look]] = {}
    for look in looks:
        history = look.story.history
        if look.done or is_local(history):
            continue
        if history.job_id and _JOB_ID.fullmatch(history.job_id):
            ids.setdefault(_conf(look), []).append(history.job_id)
        elif history.job_id is None and look.section("cluster").get("scheduler") == "slurm":
            unnamed.setdefault(_conf(look), []).append(look)
    answers: Jobs = {conf: slurm.jobs(wanted, conf=conf) for conf, wanted in ids.items()}
    for conf, lookers in unnamed.items():
        from launchers.submission import live_jobs  # rarely needed, and brings Hydra

        answer = answers.setdefault(conf, {})
        live = live_jobs({look.run.root: look.story.history for look in lookers}, conf)
        for look in lookers:
            job = live.get(look.run.root)
            if isinstance(job, slurm.Unknown):
                answers[conf] = job
            elif job is not None and not isinstance(answer, slurm.Unknown):
                look.story.history.job_id = job.job_id
                answer[job.job_id] = job
    return answers


def _conf(look: Look) -> str | None:
    conf = look.section("cluster").get("slurm_conf")
    return conf if isinstance(conf, str) and conf else None


def rows_of(looks: list[Look], jobs: Jobs, now: float) -> list[dict[str, Any]]:
    """The rows of one pipeline."""
    by_folder = {real(look.run.root): look.name for look in looks}
    undone = {look.name for look in looks if not look.done}
    scores = _scores(looks)
    gates, held = _gates(looks)
    rows = []
    for look in looks:
        history = look.story.history
        after = look.after
        if after is None:
            after = tuple(dict.fromkeys(by_folder[path] for path in look.inputs().values() if path in by_folder))
        waits_for = tuple(name for name in after if name in undone)
        answer = jobs.get(_conf(look))
        if history.job_id and not _JOB_ID.fullmatch(history.job_id):
            answer = slurm.Unknown(f"{history.job_id} is no job id of SLURM's")
        job = answer if isinstance(answer, slurm.Unknown) else (answer or {}).get(history.job_id or "")
        local = is_local(history)
        if local or not look.config:
            job = None
        state, reason = row_state(
            history, look.output_problem, job, local and not look.done and owned(look.run), waits_for
        )
        if state == "done" and look.name in gates:
            state, reason = "gated", f"gate: {gates[look.name]}"
        elif look.name in held and (state == "waiting" or (state == "cancelled" and not history.cancelled)):
            reason = held[look.name]
        if look.config_problem:
            state, reason = "unknown", look.config_problem
        elif look.story.problem and history.job_id is None and state != "done":
            state, reason = "unknown", look.story.problem
        elif look.story.problem:
            reason = f"{reason} ({look.story.problem})" if reason else look.story.problem
        rows.append(_row(look, state, reason, job if isinstance(job, slurm.JobRecord) else None, scores, now))
    return rows


def _row(
    look: Look, state: str, reason: str | None, job: slurm.JobRecord | None,
    scores: dict[str, tuple[float | None, str | None]], now: float,
) -> dict[str, Any]:  # fmt: skip
    history, metrics = look.story.history, table.read_metrics(look.run.metrics)
    time = account(look, state, now)
    elapsed: float | None = None
    if job is not None and job.state != "PENDING" and job.live:
        elapsed = job.elapsed
    elif history.attempt_started is not None and not (job is not None and job.live):
        ended = history.attempt_ended or (now if state in ("running", "stopping") else None)
        elapsed = max(0, round(ended - history.attempt_started)) if ended is not None else None
    nodes = table.number(look.section("slurm").get("num_nodes"))
    score, metric = scores.get(look.name, (None, None))
    max_steps = metrics.max_steps
    if max_steps is None and (given := table.number(look.section("training").get("max_steps"))) is not None:
        max_steps = int(given)
    return {
        "pipeline": look.pipeline,
        "stage": look.name,
        "technique": look.config["stage"] if isinstance(look.config.get("stage"), str) else None,
        "run_dir": str(look.run.root),
        "job_id": history.job_id,
        "cluster": history.cluster,
        "state": state,
        "reason": reason,
        "nodes": job.nodes if job is not None and job.nodes else (int(nodes) if nodes is not None else None),
        "node_list": job.node_list or None if job is not None else None,
        "elapsed_seconds": elapsed,
        "limit_seconds": job.limit if job is not None else wall_seconds(look.section("slurm").get("wall_time")),
        "step": metrics.step,
        "max_steps": max_steps,
        "checkpoint_step": history.checkpoint_step,
        "loss": metrics.loss,
        "reward": metrics.reward,
        "tokens_per_second_per_gpu": metrics.tokens_per_second_per_gpu,
        "mfu": metrics.mfu,
        "attempts": history.attempts,
        "failures": history.failures,
        "outcome": history.outcome,
        **_times(time),
        "score": score,
        "metric": metric,
    }


def account(look: Look, state: str, now: float) -> accounting.Account:
    """Where the run's time went, as far as it is known: an unknown state is told up to its last sign of life."""
    return accounting.account(*_told(look, state, now))


def spans(look: Look, state: str, now: float) -> list[accounting.Span]:
    """The time of `account` in its order, attempt by attempt."""
    return accounting.spans(*_told(look, state, now))


def _told(
    look: Look, state: str, now: float
) -> tuple[tuple[ledger.Event, ...], dict[str, Any] | None, float | None, str | None]:
    """What the accounting of a run is told."""
    running = look.story.history.running
    progress = table.read_progress(look.run) if running else None
    since = None
    if state in ("failed", "cancelled"):
        since = "stopped"
    elif state in ("requeued", "queued", "waiting") and running:
        since = "lost"  # SLURM requeued it; its next attempt will close this one
    over = state in ("done", "gated", "unknown")
    return look.story.events, progress, None if over else now, since


def _times(time: accounting.Account) -> dict[str, Any]:
    goodput = None if time.goodput is None else round(time.goodput, 4)
    return {"goodput": goodput, "held_seconds": time.held, "seconds": time.seconds, "lost_by_cause": time.lost_by_cause}


def pipelines_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goodput, time by name and lost time by cause of each pipeline: its rows added up, an hour of each run alike."""
    names = dict.fromkeys(row["pipeline"] for row in rows)
    found = []
    for name in names:
        runs = [
            accounting.Account(seconds=row["seconds"], lost_by_cause=row["lost_by_cause"], held=row["held_seconds"])
            for row in rows
            if row["pipeline"] == name
        ]
        found.append({"pipeline": name, **_times(accounting.together(runs))})
    return found


def _scores(looks: list[Look]) -> dict[str, tuple[float | None, str | None]]:
    """Score and metric by stage: an eval's own, and that of the eval which judged a stage's output."""
    found: dict[str, tuple[float | None, str | None]] = {}
    for look in looks:
        if look.config.get("stage") != "eval" or look.output_problem is not None:
            continue
        try:
            found_there = results.read(look.run)
        except (OSError, ValueError, RecursionError):
            continue
        score = (found_there.score.value if found_there.score else None, found_there.headline)
        found[look.name] = score
        judged = look.inputs().get("model")
        for other in looks:
            if judged == real(other.run.root) and other is not look:
                found[other.name] = score
    return found


def _gates(looks: list[Look]) -> tuple[dict[str, str], dict[str, str]]:
    """Why gates of evaluations that are done do not hold, by stage; and the gate that holds a stage back, by stage."""
    closed: dict[str, str] = {}
    for look in looks:
        if look.gate is not None and look.done:
            try:
                why = gate.failure(look.run, look.gate)
            except OSError as error:
                why = f"{look.run.results} cannot be read: {error.strerror}"
            if why is not None:
                closed[look.name] = why
    held = {name: f"gate of {name}: {why}" for name, why in closed.items()}
    for _ in looks if closed else ():  # the graph may be damaged: no more rounds than there are stages
        for look in looks:
            cause = next((held[up] for up in look.after or () if up in held), None)
            if cause is not None and not look.done:
                held.setdefault(look.name, cause)
    return closed, {name: cause for name, cause in held.items() if name not in closed}


def wall_seconds(value: Any) -> int | None:
    """Seconds of a frozen config's wall time."""
    text = str(value).strip()
    if text.isdecimal() and len(text) < 9:
        return int(text) * 60
    if (usual := slurm.seconds(text[:40])) is not None or value is None:
        return usual
    from conf.check import ConfigError, parse_wall_time  # the rare forms: D-H, D-H:M

    try:
        return parse_wall_time(text)
    except ConfigError:
        return None


def which(settings: list[str], command: str) -> tuple[Path, list[str]]:
    """Output base and pipelines' names from `key=value` settings. Raises LaunchError for another key."""
    output_base, names, sweeps = Path("outputs"), [], []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name == "run_name" and value:
            names.append(value)
        elif name == "sweep" and value:
            sweeps.append(value)
        elif name == "paths.output_base" and value:
            output_base = Path(value)
        else:
            problem = "no value" if equals and not value else f"not a setting of {command}"
            raise LaunchError(f"{setting}: {problem}", "run_name=NAME, sweep=NAME or paths.output_base=FOLDER")
    split = [part for name in names for part in ([name] if (output_base / name).exists() else name.split(",")) if part]
    return output_base, [*split, *(point for name in sweeps for point in points.read(output_base, name))]


def choose(words: list[str], command: str, newest: bool = False) -> list[Look]:
    """The runs that a command line means: `<stage>`, `<pipeline>/<stage>`, run_name=, paths.output_base=.

    Without a stage, all runs of the pipelines. Without a pipeline, the one that has these stages; `newest`: where
    several have them, the one that was touched last. Raises LaunchError where nothing, or not one pipeline, is meant.
    """
    stages = [word for word in words if "=" not in word]
    output_base, names = which([word for word in words if "=" in word], command)
    for name, _, stage in [word.partition("/") for word in stages if "/" in word]:
        names, stages = [*names, name], [*stages, stage]
    stages = list(dict.fromkeys(word for word in stages if "/" not in word and word))
    folders = find_pipelines(output_base, names)
    looks = {folder: looks_of(folder) for folder in folders}
    having = [folder for folder in folders if {look.name for look in looks[folder]} >= set(stages)]
    if not having:
        there = list(dict.fromkeys(look.name for found in looks.values() for look in found))
        missing = next((stage for stage in stages if stage not in there), ", ".join(stages))
        close = difflib.get_close_matches(missing, there, n=1)
        where = f"run_name={','.join(names)}" if names else str(output_base)
        fix = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(there)}" if there else None
        raise LaunchError(f"{missing}: no such stage in {where}" if stages else f"no runs in {output_base}", fix)
    if not names and len(having) > 1:
        if not newest:
            several = ", ".join(f"run_name={folder.name}" for folder in having)
            what = f"{' and '.join(stages)}: in several pipelines" if stages else "several pipelines"
            raise LaunchError(f"{what} of {output_base}", f"say which one: {several}")
        having = having[-1:]
    return [look for folder in having for look in looks[folder] if not stages or look.name in stages]
