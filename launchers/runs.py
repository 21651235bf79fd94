"""What is known of the runs of pipelines: read from the run directories, and from one squeue call.

`collect` gives one row a run, which status shows and other commands build on. Hydra is not started: a look should
take no longer than squeue does. A source that does not answer makes a state unknown, never fine.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launchers import eta, frozen, points, site, slurm, table
from launchers.errors import LaunchError
from launchers.local import owned
from launchers.states import expected, is_local, row_state
from post_training.run import accounting, gate, ledger, manifest, results
from post_training.run.directory import RunDirectory, is_there
from post_training.run.history import History

# ------------------------------------------------------------------------------------------ the rows

T = TypeVar("T")


class Files:
    """What was read from files. `keep`: for looking again and again: reads again only what has changed since.

    A file has changed where its time, size or inode has; of an output, that is its folder and its manifest.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._kept: dict[tuple[str, str], tuple[object, Any]] = {}

    def __call__(self, what: str, path: Path, read: Callable[[], T], *beside: Path) -> T:
        """What `read` makes of a file. Raises what it raises."""
        if not self.keep:
            return read()
        seen = tuple(_stamp(place) for place in (path, *beside))
        key = (what, str(path))
        known = self._kept.get(key)
        if known is None or known[0] != seen:
            known = self._kept[key] = (seen, read())
        return known[1]  # type: ignore[no-any-return]

    def once(self, what: str, path: Path, given: object, make: Callable[[], T]) -> T:
        """What `make` makes of `given`, which is the same object where nothing has changed."""
        if not self.keep:
            return make()
        key = (what, str(path))
        known = self._kept.get(key)
        if known is None or known[0] is not given:
            known = self._kept[key] = (given, make())
        return known[1]  # type: ignore[no-any-return]


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        return type(error)
    return found.st_mtime_ns, found.st_size, found.st_ino


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
    files: Files = field(default_factory=Files)

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
        self.config, self.config_problem = self.files("config", self.run.config, lambda: _read_config(self.run.config))
        self.story = self.files("story", self.run.ledger, lambda: table.read_history(self.run))
        model = self.run.model
        self.output_problem = self.files("output", model / manifest.NAME, lambda: output_problem(model), model)
        return self


def _read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        config = frozen.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None  # a stage of the pipeline that is not submitted yet
    except Exception as error:  # a YAML parser has many ways to say no
        return {}, f"config.yaml cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
    return (config, None) if isinstance(config, dict) else ({}, "config.yaml is damaged: no mapping")


def output_problem(folder: Path) -> str | None:
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
        if output_base == Path("outputs"):
            fix = "python -m launchers.pipeline first, or paths.output_base=FOLDER where that was"
            raise LaunchError("nothing was run here yet: there is no folder outputs", fix)
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


def looks_of(folder: Path, files: Files | None = None) -> list[Look]:
    """The runs of a pipeline, in its graph's order; further runs in its folder come last."""
    files = files or Files()
    looks: dict[str, Look] = {}
    try:
        path = folder / "pipeline.json"
        stages = files("graph", path, lambda: json.loads(path.read_text(encoding="utf-8")))["stages"]
        for name, node in stages.items():
            run_dir = Path(node["run_dir"])
            if is_there(folder / name / "config.yaml") or not is_there(run_dir):
                run_dir = folder / name  # not there yet, or the outputs were moved or copied
            after = tuple(str(parent) for parent in node.get("after") or ())
            held = node.get("gate")
            looks[name] = Look(
                folder.name, name, RunDirectory(run_dir), after, held if isinstance(held, dict) else None, files=files
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # without it the folders speak for themselves
    plainly = {str(look.run.root) for look in looks.values()}
    beside = [path for path in _runs_in(folder) if str(path) not in plainly]
    others = [Look(folder.name, path.name, RunDirectory(path), files=files) for path in beside]
    known = {real(look.run.root) for look in looks.values()} if others else set()
    others = [look.read() for look in others if real(look.run.root) not in known]
    others.sort(key=lambda look: (look.story.history.submitted or float("inf"), look.name))
    return [look.read() for look in looks.values()] + others


def survey(
    output_base: Path, names: list[str], sacct: bool = False, files: Files | None = None
) -> list[tuple[Look, dict[str, Any]]]:
    """Every run and its row. Asks SLURM once, for the runs that are not done.

    sacct: ask accounting too, for the runs that SLURM has forgotten. files: for looking again and again.
    """
    pipelines = [looks_of(folder, files) for folder in find_pipelines(output_base, names)]
    looks = [look for found in pipelines for look in found]
    jobs = ask_slurm(looks)
    ended = ask_accounting(looks, jobs) if sacct else {}
    now = time.time()
    return list(zip(looks, [row for found in pipelines for row in rows_of(found, jobs, now, ended)], strict=True))


def collect(
    output_base: Path, names: list[str], sacct: bool = False, files: Files | None = None
) -> list[dict[str, Any]]:
    """One row a run: what the table and the JSON show. Arguments as of `survey`."""
    return [row for _, row in survey(output_base, names, sacct, files)]


_JOB_ID = re.compile(r"[0-9]{1,12}(_[0-9]{1,12})?")
Jobs = dict[str | None, dict[str, slurm.JobRecord] | slurm.Unknown]
EndedJobs = dict[str | None, dict[str, slurm.Ended] | slurm.Unknown]


def ask_slurm(looks: list[Look]) -> Jobs:
    """squeue's answers by slurm.conf: one call, unless runs of several clusters are looked at.

    A run whose ledger names no job may have one: the command that submitted it died before it wrote that down, or is
    about to. Then all jobs are asked for, which costs SLURM the same; it is found by its folder, and its job id taken
    from there.
    """
    ids: dict[str | None, list[str]] = {}
    unnamed: dict[str | None, list[Look]] = {}
    for look in looks:
        history = look.story.history
        if look.done or is_local(history):
            continue
        if history.job_id and _JOB_ID.fullmatch(history.job_id):
            ids.setdefault(conf_of(look), []).append(history.job_id)
        elif history.job_id is None and look.section("cluster").get("scheduler") == "slurm":
            unnamed.setdefault(conf_of(look), []).append(look)
    answers: Jobs = {}
    for conf in {**ids, **unnamed}:
        answer = slurm.jobs(everyone=True, conf=conf) if conf in unnamed else slurm.jobs(ids[conf], conf=conf)
        answers[conf] = answer
        if not isinstance(answer, slurm.Unknown):
            by_folder = {real(job.folder): job for job in answer.values() if job.live and job.folder}
            for look in unnamed.get(conf, ()):
                if (job := by_folder.get(real(look.run.root))) is not None:
                    # not in the story itself, which may be kept: the ledger does not say so
                    look.story = replace(look.story, history=replace(look.story.history, job_id=job.job_id))
    return answers


def ask_accounting(looks: list[Look], jobs: Jobs) -> EndedJobs:
    """sacct's answers by slurm.conf, for the runs that are not done and whose jobs squeue does not show."""
    ids: dict[str | None, list[str]] = {}
    for look in looks:
        job_id, answer = look.story.history.job_id, jobs.get(conf_of(look))
        if look.done or not job_id or not _JOB_ID.fullmatch(job_id) or is_local(look.story.history):
            continue
        if isinstance(answer, slurm.Unknown) or job_id not in (answer or {}):
            ids.setdefault(conf_of(look), []).append(job_id)
    return {conf: slurm.accounting(wanted, conf=conf) for conf, wanted in ids.items()}


def conf_of(look: Look) -> str | None:
    conf = look.section("cluster").get("slurm_conf")
    return conf if isinstance(conf, str) and conf else None


def rows_of(looks: list[Look], jobs: Jobs, now: float, ended: EndedJobs | None = None) -> list[dict[str, Any]]:
    """The rows of one pipeline."""
    nameless = any(look.after is None for look in looks)
    by_folder = {real(look.run.root): look.name for look in looks} if nameless else {}
    undone = {look.name for look in looks if not look.done}
    scores = _scores(looks)
    gates, held = _gates(looks)
    rows = []
    own: dict[str, eta.Estimate | None] = {}
    graph: dict[str, tuple[str, ...]] = {}
    for look in looks:
        history = look.story.history
        after = look.after
        if after is None:
            after = tuple(dict.fromkeys(by_folder[path] for path in look.inputs().values() if path in by_folder))
        waits_for = tuple(name for name in after if name in undone)
        answer = jobs.get(conf_of(look))
        if history.job_id and not _JOB_ID.fullmatch(history.job_id):
            answer = slurm.Unknown(f"{history.job_id} is no job id of SLURM's")
        job = answer if isinstance(answer, slurm.Unknown) else (answer or {}).get(history.job_id or "")
        local = is_local(history)
        if local or not look.config:
            job = None
        record = job if isinstance(job, slurm.JobRecord) else None
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
        start = start_of(record)
        if start is not None:
            reason = f"{reason}; {expected(start, now)}" if reason else expected(start, now)
        kept = (ended or {}).get(conf_of(look))
        past: slurm.Ended | None = None
        if isinstance(kept, slurm.Unknown) and state not in ("done", "gated") and record is None and history.job_id:
            reason = f"{reason or state} ({kept.why})"
        elif kept is not None and not isinstance(kept, slurm.Unknown):
            past = kept.get(history.job_id or "")
            if past is not None:
                said = f"accounting says {past.state}, status {past.exit_code}, at {past.end.replace('T', ' ')}"
                reason = f"{reason}; {said}" if reason else said
        row, rest = _row(look, state, reason, record, scores, now)
        row["expected_start"] = start
        row["accounting"] = asdict(past) if past is not None else None
        rows.append(row)
        graph[look.name] = waits_for
        if state not in ("done", "gated"):
            own[look.name] = rest
    over = {row["stage"] for row in rows if row["state"] in OVER}
    times = eta.finishes(own, graph, over)
    for row in rows:
        found = times.get(row["stage"])
        row["eta_seconds"] = None if found is None else round(found.seconds, 1)
        row["eta_at_least"] = found is not None and found.at_least
        row["requeues_needed"] = None if found is None else found.requeues
    return rows


OVER = ("failed", "cancelled", "gated")
"""States of runs that do not become done by themselves."""


def start_of(job: slurm.JobRecord | None) -> float | None:
    """When SLURM expects to start a pending job, in seconds since the epoch; None where it does not say, or where the
    job is held: then squeue goes on showing the time of the past requeue's end."""
    if job is None or job.state != "PENDING" or "held" in job.reason.lower():
        return None
    try:
        return datetime.datetime.fromisoformat(job.start_time).timestamp()  # squeue tells local time
    except (ValueError, OverflowError, OSError):
        return None


@functools.lru_cache(64)
def _site(output_base: Path, cluster: str, _stamp: object) -> site.Site:
    return site.read(output_base, cluster)


def _hold(look: Look) -> float:
    """Seconds that its cluster holds a requeued job back."""
    cluster = look.section("cluster").get("name")
    if not isinstance(cluster, str):
        return site.REQUEUE_HOLD_S
    base = look.run.root.parent.parent
    return _site(base, cluster, _stamp(site.place(base, cluster))).requeue_hold


def own_time(
    look: Look, state: str, job: slurm.JobRecord | None, metrics: table.Metrics, progress: Mapping[str, Any] | None,
    max_steps: int | None, wall: float | None, spent: accounting.Account, now: float,
) -> eta.Estimate | None:  # fmt: skip
    """How long a run still takes by itself; None where it cannot be estimated, as before its first steps."""
    rate, history = metrics.seconds_per_step, look.story.history
    if rate is None or max_steps is None or state in (*OVER, "unknown"):
        return None
    runs = state in ("running", "stopping") and history.running
    step: float = history.checkpoint_step  # where the next attempt goes on
    if runs and progress is not None and progress.get("attempt") == history.attempts:
        done = table.number(progress.get("step"))
        step = step if done is None else done
    elif runs and history.training and metrics.step is not None:
        step = metrics.step
    attempts = max(1, history.attempts)
    worked = spent.seconds["steps"] + spent.seconds["redone"]
    beside = (spent.seconds["saving"] + spent.seconds["evaluation"]) / worked if worked > 0 else 0.0
    lead = table.number(look.section("slurm").get("signal_time_seconds")) or 0.0
    elapsed = None
    if runs:
        elapsed = (
            float(job.elapsed)
            if job is not None and job.elapsed is not None
            else now - (history.attempt_started or now)
        )
    mine = eta.stage(
        max(0.0, max_steps - step) * rate * (1 + beside), wall=wall, lead=lead, hold=_hold(look),
        startup=spent.seconds["startup"] / attempts, teardown=spent.seconds["teardown"] / attempts,
        elapsed=elapsed, training=runs and history.training,
    )  # fmt: skip
    if mine is None or runs:
        return mine
    start = start_of(job)
    if start is not None:
        return replace(mine, seconds=mine.seconds + max(0.0, start - now))
    if state == "requeued" and job is not None and job.reason == "BeginTime" and history.attempt_ended is not None:
        return replace(mine, seconds=mine.seconds + max(0.0, _hold(look) - (now - history.attempt_ended)))
    # a run that waits for nothing but its upstream starts with it; how long a queue is, only SLURM can say
    return mine if state == "waiting" or is_local(history) else replace(mine, at_least=True)


def _row(
    look: Look, state: str, reason: str | None, job: slurm.JobRecord | None,
    scores: dict[str, tuple[float | None, str | None]], now: float,
) -> tuple[dict[str, Any], eta.Estimate | None]:  # fmt: skip
    history = look.story.history
    metrics = metrics_of(look)
    progress = table.read_progress(look.run) if history.running else None
    if state in ("done", "gated"):  # what is over does not change with the clock
        time = look.files.once("account", look.run.root, look.story, lambda: account(look, state, now))
    else:
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
    limit = job.limit if job is not None else wall_seconds(look.section("slurm").get("wall_time"))
    if is_local(history):
        limit = None
    count = job.nodes if job is not None and job.nodes else (int(nodes) if nodes is not None else None)
    gpus = table.number(look.section("slurm").get("gpus_per_node"))
    held = state in ("running", "stopping") and not is_local(history) and count is not None and gpus is not None
    row = {
        "pipeline": look.pipeline,
        "stage": look.name,
        "technique": look.config["stage"] if isinstance(look.config.get("stage"), str) else None,
        "run_dir": str(look.run.root),
        "job_id": history.job_id,
        "cluster": history.cluster,
        "state": state,
        "reason": reason,
        "nodes": count,
        "node_list": job.node_list or None if job is not None else None,
        "gpus_held": int(count * gpus) if held else 0,  # type: ignore[operator]
        "elapsed_seconds": elapsed,
        "limit_seconds": limit,
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
        "changed": _changed(look, metrics, progress, now),
        **_times(time),
        "score": score,
        "metric": metric,
    }
    return row, own_time(look, state, job, metrics, progress, max_steps, limit, time, now)


def metrics_of(look: Look) -> table.Metrics:
    """The run's newest figures."""
    path, size = look.run.metrics, table.TREND_BYTES if look.files.keep else table.TAIL_BYTES
    return look.files("metrics", path, lambda: table.read_metrics(path, size))


def _changed(look: Look, metrics: table.Metrics, progress: Mapping[str, Any] | None, now: float) -> float | None:
    """When the run last gave a sign of life, in seconds since the epoch. A clock that was ahead counts as now."""
    events = look.story.events
    signs = [metrics.time, table.number((progress or {}).get("time")), events[-1]["time"] if events else None]
    return min(now, max((sign for sign in signs if sign is not None), default=-1.0)) if any(signs) else None


def account(look: Look, state: str, now: float) -> accounting.Account:
    """Where the run's time went, as far as it is known: an unknown state is told up to its last sign of life."""
    return accounting.account(*_told(look, state, now), sound=True)


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
    """Goodput, time by name and lost time by cause of each pipeline: its rows added up, an hour of each run alike.

    And when it will be done (eta_seconds; eta_at_least: not before then), with how many requeues.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["pipeline"], []).append(row)
    found = []
    for name, own in by_name.items():
        runs = [
            accounting.Account(seconds=row["seconds"], lost_by_cause=row["lost_by_cause"], held=row["held_seconds"])
            for row in own
        ]
        rest = [_estimate(row) for row in own if row["state"] != "done"]
        whole = eta.whole(rest, dead=any(row["state"] in OVER for row in own))
        found.append(
            {
                "pipeline": name,
                "eta_seconds": None if whole is None else whole.seconds,
                "eta_at_least": whole is not None and whole.at_least,
                "requeues_needed": None if whole is None else whole.requeues,
                **_times(accounting.together(runs)),
            }
        )
    return found


def _estimate(row: Mapping[str, Any]) -> eta.Estimate | None:
    if row.get("eta_seconds") is None:
        return None
    return eta.Estimate(row["eta_seconds"], row["requeues_needed"], row["eta_at_least"])


def _scores(looks: list[Look]) -> dict[str, tuple[float | None, str | None]]:
    """Score and metric by stage: an eval's own, and that of the eval which judged a stage's output."""
    found: dict[str, tuple[float | None, str | None]] = {}
    places: dict[str, str] = {}
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
        if not places:
            places.update((other.name, real(other.run.root)) for other in looks)
        for other in looks:
            if judged == places[other.name] and other is not look:
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
        if name == "run_name" and value.strip(","):
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
    for word in words:
        if not word.strip().strip("/"):  # of an unset variable in a script: not "all"
            raise LaunchError(f"{word!r}: not a run", "a stage, pipeline/stage, or run_name=NAME for all of a pipeline")
    given = list(dict.fromkeys(words))
    settings = [w for w in given if w.startswith(("run_name=", "paths.output_base=")) or ("=" in w and "/" not in w)]
    output_base, names = which(settings, command)
    given = [_short(w, output_base) for w in given if w not in settings]
    pairs = [tuple(w.rsplit("/", 1)) for w in given if "/" in w]  # a point's name may hold a '='
    stages = [w for w in given if "/" not in w]
    if pairs and stages and not names:
        names = list(dict.fromkeys(name for name, _ in pairs))
        if len(names) > 1:
            raise LaunchError(f"{', '.join(stages)}: of which pipeline?", f"{names[0]}/{stages[0]}")
    found: dict[Path, list[Look]] = {}
    wanted: dict[Path, set[str]] = {}  # no stage: all of them
    for name, stage in pairs:
        (folder,) = find_pipelines(output_base, [name])
        found.setdefault(folder, looks_of(folder))
        _check_stages([stage], found[folder], f"run_name={name}", output_base)
        wanted.setdefault(folder, set()).add(stage)
    if names or not pairs:
        folders = find_pipelines(output_base, names)
        found |= {folder: looks_of(folder) for folder in folders if folder not in found}
        if names:
            for folder in folders:
                _check_stages(stages, found[folder], f"run_name={folder.name}", output_base)
        else:
            folders = _having(stages, {folder: found[folder] for folder in folders}, output_base, newest)
        for folder in folders:
            wanted[folder] = wanted.get(folder, set()) | set(stages) if stages else set()
    chosen = [look for folder, some in wanted.items() for look in found[folder] if not some or look.name in some]
    if not chosen:
        raise LaunchError(f"no runs in {', '.join(str(folder) for folder in wanted)}")
    return chosen


def _short(word: str, output_base: Path) -> str:
    """A run's directory as `<pipeline>/<stage>`; any other word as it is."""
    path, base = Path(word).absolute(), output_base.absolute()
    if "/" in word and path.is_dir() and path != base and path.is_relative_to(base):
        return str(path.relative_to(base))
    return word.rstrip("/")


def _having(stages: list[str], found: Mapping[Path, list[Look]], output_base: Path, newest: bool) -> list[Path]:
    """The one pipeline that has all of these stages. Raises LaunchError where there is none, or more than one."""
    having = [folder for folder, looks in found.items() if {look.name for look in looks} >= set(stages)]
    if not having:
        if not found:
            raise LaunchError(f"no runs in {output_base}")
        _check_stages(stages, [look for looks in found.values() for look in looks], str(output_base), output_base)
        raise LaunchError(f"{', '.join(stages)}: no pipeline of {output_base} has all of these")
    if len(having) > 1 and not newest:
        several = ", ".join(f"run_name={folder.name}" for folder in having)
        what = f"{' and '.join(stages)}: in several pipelines" if stages else "several pipelines"
        raise LaunchError(f"{what} of {output_base}", f"say which one: {several}")
    return having[-1:]


def _check_stages(stages: list[str], looks: list[Look], where: str, output_base: Path) -> None:
    there = list(dict.fromkeys(look.name for look in looks))
    missing = next((stage for stage in stages if stage not in there), None)
    if missing is not None:
        close = difflib.get_close_matches(missing, there, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(there)}" if there else None
        if (output_base / missing).is_dir():
            fix = f"run_name={missing} for all of that pipeline, or {missing}/<stage>"
        raise LaunchError(f"{missing}: no such stage in {where}", fix)
