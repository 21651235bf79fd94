"""What every run of a pipeline is doing: read from the run directories, and from one squeue call.

    python -m launchers.status [run_name=NAME ...] [paths.output_base=outputs] [--watch [SECONDS]] [--json]

Without run_name it shows all pipelines below paths.output_base. Hydra is not started: a look should take no
longer than squeue does. A source that does not answer makes a state unknown, never fine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers import slurm, table
from launchers.errors import LaunchError
from launchers.local import owned
from post_training.run import accounting, gate, ledger, manifest, results
from post_training.run.directory import RunDirectory, is_there, load_yaml
from post_training.run.history import History

STATES = ("waiting", "queued", "running", "stopping", "requeued", "done", "gated", "failed", "cancelled", "unknown")
WATCH_SECONDS = 5.0

PENDING = {
    "None": "SLURM has not looked at it yet",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "Dependency": "waits for other jobs",
    "DependencyNeverSatisfied": "an upstream job failed: can never start",
    "BeginTime": "held for a moment after a requeue",
    "JobHeldUser": "held by the user: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "the sweep's limit of jobs at a time is reached",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "NodeDown": "a node it needs is down",
    "BadConstraints": "no node has what it asks for",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionNodeLimit": "asks for more nodes than the partition gives",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "QOSMaxCpuPerUserLimit": "you use as many CPUs as the QOS allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the QOS allows",
    "QOSMaxNodePerUserLimit": "you use as many nodes as the QOS allows",
    "QOSMaxWallDurationPerJobLimit": "asks for more time than the QOS gives",
    "AssocMaxJobsLimit": "you run as many jobs as your account allows",
    "AssocGrpGRES": "your account's GPUs are all in use",
    "MaxGRESPerAccount": "your account's GPUs are all in use",
    "AssocGrpNodeLimit": "your account's nodes are all in use",
    "AssocGrpCpuLimit": "your account's CPUs are all in use",
    "AssocGrpGRESMinutes": "your account's GPU hours are used up",
    "AssocGrpCPUMinutesLimit": "your account's CPU hours are used up",
    "AssocGrpBillingMinutes": "your account's budget is used up",
    "JobLaunchFailure": "its last start failed; SLURM tries again",
    "launch_failed_requeued_held": "its start failed: held until scontrol release",
    "Prolog": "the nodes are being made ready",
    "Cleaning": "its last attempt is being cleaned up",
    "NodeFailure": "a node failed; SLURM starts it again",
}
"""SLURM's reasons of a pending job in plain words."""

ENDED = {
    "FAILED": "failed",
    "TIMEOUT": "was killed at its wall time",
    "OUT_OF_MEMORY": "ran out of memory on a node",
    "NODE_FAIL": "lost a node, and SLURM did not requeue it",
    "BOOT_FAIL": "found its nodes not able to boot",
    "DEADLINE": "passed its deadline",
}
"""SLURM's states of a job that ended badly in plain words."""

OUTCOMES = {
    "preempted": "was preempted",
    "node_lost": "lost a node",
    "out_of_memory": "ran out of memory",
    "crashed": "crashed",
    "failed": "crashed",
    "hung": "hung",
    "cancelled": "was cancelled",
}
"""How an attempt ended, in plain words, where it neither finished nor left because its time was up."""

CAUSES = {
    "planned_stop": "planned stops",
    "preempted": "preemptions",
    "node_lost": "lost nodes",
    "out_of_memory": "running out of memory",
    "crashed": "crashes",
    "hung": "hangs",
    "cancelled": "cancellations",
    "restarted": "restarts",
    "unknown": "ends nobody recorded",
    "first_startup": "first start-up",
    "saving": "saving",
    "teardown": "teardown",
}
"""What took time from the steps, in plain words."""


def pending_reason(reason: str) -> str:
    """SLURM's reason of a pending job in plain words."""
    word = reason.split(",")[0].strip()
    if word in PENDING:
        return PENDING[word]
    if word.startswith("QOS"):
        return f"a limit of the QOS is reached ({word})"
    if word.startswith(("Assoc", "MaxCpuPerAccount")):
        return f"a limit of your account is reached ({word})"
    return f"SLURM says: {reason}"


# ------------------------------------------------------------------------------------------ the state


def row_state(
    history: History,
    output_problem: str | None,
    job: slurm.JobRecord | slurm.Unknown | None,
    local_alive: bool,
    waits_for: tuple[str, ...] = (),
) -> tuple[str, str | None]:
    """A run's state and why, from what the sources say. Pure.

    output_problem: why its output is not complete; None where it is.
    job: what squeue says; None where SLURM does not know the job.
    local_alive: a local supervisor or its job has the run.
    waits_for: upstream runs that are not done.
    """
    if output_problem is None:
        return "done", None
    if history.job_id is None and not history.cancelled:
        if isinstance(job, slurm.Unknown):
            return "unknown", f"{_first_line(job.why)} (the ledger says: not submitted yet)"
        return "waiting", "not submitted yet"
    if is_local(history):
        return _local_state(history, output_problem, waits_for) if local_alive else _gone(history, output_problem)
    if isinstance(job, slurm.Unknown):
        if history.cancelled or history.gave_up:
            return _gone(history, output_problem)
        last = "running" if history.running else history.outcome or "submitted"
        return "unknown", f"{_first_line(job.why)} (the ledger says: {last})"
    if job is None:
        return _gone(history, output_problem)
    return _slurm_state(history, output_problem, job, waits_for)


def _first_line(why: str) -> str:
    return why.splitlines()[0] if why else "SLURM did not answer"


def last_end(history: History) -> str | None:
    """How the last attempt ended, in plain words; None where that needs no word."""
    words = OUTCOMES.get(history.outcome or "")
    if words is None:
        return history.reason if history.action == "requeue" else None
    return f"the last attempt {words}" + (f": {history.reason}" if history.reason else "")


def _again(history: History, reason: str) -> str:
    """Why a run that is to go on does not yet, and what its last attempt came to."""
    return f"{reason}; {why}" if (why := last_end(history)) else reason


def is_local(history: History) -> bool:
    """Whether the run's newest submission was to a local supervisor."""
    return history.cluster == "local" or (history.job_id or "").startswith("local-")


def _starting(history: History) -> str | None:
    return None if history.training else "starting"


def _local_state(history: History, output_problem: str, waits_for: tuple[str, ...]) -> tuple[str, str | None]:
    if history.running:
        return ("stopping", "asked to save and leave") if history.stopping else ("running", _starting(history))
    if history.action == "requeue":
        return "requeued", last_end(history) or "starts again at once"
    if history.cancelled or history.outcome is not None:
        return _gone(history, output_problem)
    if waits_for:
        return "waiting", f"waits for {', '.join(waits_for)}"
    return "queued", "waits for free cores"


def _gone(history: History, output_problem: str) -> tuple[str, str | None]:
    """The state of a run that nothing runs any more: what the ledger ends with."""
    local, job = is_local(history), history.job_id
    who = "its supervisor and its job are gone" if local else f"SLURM no longer knows job {job}"
    onward = "; the same command goes on" if local else ""
    if history.cancelled:
        return "cancelled", history.reason
    if history.running:
        return "failed", f"{who} and the run did not finish{onward}"
    if history.gave_up:
        return "failed", _end(history)
    if history.outcome in ("stopped", "cancelled") and history.action == "exit":
        return "cancelled", history.reason or "stopped on request"
    if history.outcome == "finished":
        return "failed", f"it finished, but its output is not complete: {output_problem}"
    if history.action == "requeue" or history.outcome == "preempted":
        return "failed", _again(history, f"{who} and it was to be started again{onward}")
    return "cancelled", f"{who} and it never started{onward}"


def _end(history: History) -> str | None:
    """Why a run gave up."""
    words = OUTCOMES.get(history.outcome or "")
    if words in (None, "crashed"):
        return history.reason or words
    return f"{words}: {history.reason}" if history.reason else words


def _slurm_state(
    history: History, output_problem: str, job: slurm.JobRecord, waits_for: tuple[str, ...]
) -> tuple[str, str | None]:
    begun = history.attempt_started is not None and history.attempt_started >= (history.submitted or 0)
    ended = history.gave_up
    match job.state:
        case "PENDING":
            if job.reason == "DependencyNeverSatisfied":
                return "waiting", PENDING[job.reason]
            if begun:
                return "requeued", _again(history, pending_reason(job.reason))
            if job.reason == "Dependency":
                return "waiting", f"waits for {', '.join(waits_for)}" if waits_for else PENDING["Dependency"]
            return "queued", pending_reason(job.reason)
        case "CONFIGURING":
            return "queued", "the nodes are being made ready"
        case "REQUEUED" | "REQUEUE_FED":
            return "requeued", "SLURM is requeueing it"
        case "REQUEUE_HOLD" | "SPECIAL_EXIT":
            return "requeued", f"held: scontrol release {job.job_id}"
        case "PREEMPTED":
            return "requeued", "preempted by a job that comes first"
        case "RUNNING" | "SUSPENDED" | "STOPPED" | "RESIZING" | "SIGNALING" | "STAGE_OUT":
            if history.cancelled or history.stopping:
                return "stopping", "asked to save and leave"
            if job.state != "RUNNING":
                return "running", f"{job.state.lower().replace('_', ' ')} by SLURM"
            if not history.running and history.action == "requeue":
                return "requeued", "SLURM is about to requeue it"
            return "running", _starting(history)
        case "COMPLETING":
            if ended or history.cancelled:
                return _gone(history, output_problem)
            return ("requeued", "SLURM is requeueing it") if history.action == "requeue" else ("stopping", "ending")
        case "CANCELLED":
            return _gone(history, output_problem) if ended or history.cancelled else ("cancelled", "scancel")
        case "COMPLETED":
            return "failed", f"job {job.job_id} ended without a complete output: {output_problem}"
        case state if state in ENDED:
            return "failed", (_end(history) if ended else None) or f"job {job.job_id} {ENDED[state]}"
        case _:
            return "unknown", f"SLURM says: {job.state}"


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
    import difflib

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
        from launchers.plan import live_jobs  # rarely needed, and brings Hydra

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


def goodput_line(pipeline: Mapping[str, Any]) -> str | None:
    """A pipeline's goodput and what the rest went to, in plain words; None where nothing was held yet."""
    if pipeline["goodput"] is None:
        return None
    held = pipeline["held_seconds"]
    useful = pipeline["seconds"]["steps"] + pipeline["seconds"]["evaluation"]
    said = f"goodput {percent(pipeline['goodput'])}: {table.duration(useful)} of {table.duration(held)} held"
    lost = [f"{CAUSES.get(cause, cause)} {table.duration(s)}" for cause, s in pipeline["lost_by_cause"].items()]
    return f"{said}; lost to {', '.join(lost)}" if lost else said


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


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


# ----------------------------------------------------------------------------------------- the table

Column = tuple[str, str, int]  # title, key of a cell, 1 where it stands to the right
COLUMNS: tuple[Column, ...] = (
    ("STAGE", "stage", 0), ("JOBID", "job", 0), ("STATE", "state", 0), ("NODES", "nodes", 1), ("TIME", "time", 1),
    ("", "bar", 0), ("STEP", "step", 1), ("LOSS/REWARD", "value", 0),
    ("TOK/S/GPU", "tokens", 1), ("MFU", "mfu", 1), ("ATT", "attempts", 1), ("FAIL", "failures", 1),
    ("GOODPUT", "goodput", 1), ("SCORE", "score", 1),
)  # fmt: skip
LEFT_OUT_EMPTY = ("bar", "step", "value", "tokens", "mfu", "goodput", "score")
"""Columns that do not stand there where no run has anything in them."""
DROPPED_FIRST = ("tokens", "mfu", "goodput", "nodes", "bar", "failures", "attempts", "job", "value")
"""What a narrow terminal does without, in this order."""
_ANSI = {
    "running": "36", "stopping": "33", "requeued": "33", "done": "32", "gated": "1;33",
    "failed": "1;31", "cancelled": "35", "unknown": "33", "waiting": "2", "queued": "34",
}  # fmt: skip


def cells(row: Mapping[str, Any], ascii_only: bool = False) -> dict[str, str]:
    """A row's cells as text."""

    def text(key: str) -> str:
        return "" if row[key] is None else _one_line(str(row[key]))

    elapsed, limit = table.duration(row["elapsed_seconds"]), table.duration(row["limit_seconds"])
    total = f"/{row['max_steps']}" if row["max_steps"] is not None else ""
    return {
        "stage": text("stage"),
        "job": text("job_id"),
        "state": text("state"),
        "nodes": text("nodes"),
        "time": f"{elapsed}/{limit}" if elapsed and limit else elapsed,
        "bar": table.bar(row["step"], row["max_steps"], 10, ascii_only),
        "step": f"{row['step']}{total}" if row["step"] is not None else "",
        "value": table.loss_or_reward(row["loss"], row["reward"]),
        "tokens": "" if row["tokens_per_second_per_gpu"] is None else f"{row['tokens_per_second_per_gpu']:.0f}",
        "mfu": percent(row["mfu"]),
        "attempts": text("attempts"),
        "failures": text("failures"),
        "goodput": percent(row["goodput"]),
        "score": table.figure(row["score"]),
    }


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def lines(rows: list[dict[str, Any]], width: int, color: bool = False, ascii_only: bool = False) -> Iterator[str]:
    """The table's lines, none longer than `width`. Reasons stand behind their rows, or below where space is short."""
    texts = [cells(row, ascii_only) for row in rows]
    reasons = [_one_line(row["reason"] or "") for row in rows]
    columns = [c for c in COLUMNS if c[1] not in LEFT_OUT_EMPTY or any(t[c[1]] for t in texts)]
    sizes = {key: max([len(title), *(len(t[key]) for t in texts)]) for title, key, _ in columns}

    def total() -> int:
        return sum(sizes[key] + 2 for _, key, _ in columns) - 2

    for name in DROPPED_FIRST:
        if total() > width:
            columns = [c for c in columns if c[1] != name]
    beside = total() + 2 + max(map(len, reasons), default=0) <= width

    def line(values: Mapping[str, str], state: str | None, reason: str) -> str:
        parts, used = [], 0
        for _, key, right in columns:
            cell = values[key].rjust(sizes[key]) if right else values[key].ljust(sizes[key])
            cell = cell[: max(0, width - used)]
            used += len(cell) + 2
            parts.append(f"\x1b[{_ANSI[state]}m{cell}\x1b[0m" if color and key == "state" and state in _ANSI else cell)
        return ("  ".join(parts) + (f"  {reason}" if reason else "")).rstrip()

    titles = {key: title for title, key, _ in COLUMNS}
    goodputs = {one["pipeline"]: goodput_line(one) for one in pipelines_of(rows)}

    def summary(name: str) -> list[str]:
        return textwrap.wrap(_one_line(goodputs[name] or ""), max(4, width), subsequent_indent="  ")

    pipeline = None
    for row, text, reason in zip(rows, texts, reasons, strict=True):
        if row["pipeline"] != pipeline:
            if pipeline is not None:
                yield from summary(pipeline)
                yield ""
            pipeline = row["pipeline"]
            yield _cut(f"pipeline {_one_line(str(pipeline))}", width)
            yield line(titles, None, "REASON" if beside and any(reasons) else "")
        yield line(text, row["state"], reason if beside else "")
        if reason and not beside:
            yield _cut(f"  {'-' if ascii_only else '└'} {reason}", width)
    if pipeline is not None:
        yield from summary(pipeline)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


# -------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Arguments:
    output_base: Path
    names: list[str]
    watch: float | None
    as_json: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.status", description="What every run of a pipeline is doing."
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", const=WATCH_SECONDS, type=float,
                        help=f"look again every so many seconds (default {WATCH_SECONDS:g}); q leaves")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    following = [*argv[1:], ""][: len(argv)]
    # a setting behind a bare --watch is no number of seconds
    argv = [
        f"--watch={WATCH_SECONDS}" if a == "--watch" and "=" in b else a for a, b in zip(argv, following, strict=True)
    ]
    given = parser.parse_intermixed_args(argv)
    if given.watch is not None and not given.watch >= 0.1:
        raise LaunchError(f"--watch={given.watch:g}: too short", "at least 0.1 seconds")
    return Arguments(*which(given.settings, "status"), given.watch, given.json)


def which(settings: list[str], command: str) -> tuple[Path, list[str]]:
    """Output base and pipelines' names from `key=value` settings. Raises LaunchError for another key."""
    output_base, names = Path("outputs"), []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name == "run_name" and value:
            names.append(value)
        elif name == "paths.output_base" and value:
            output_base = Path(value)
        else:
            problem = "no value" if equals and not value else f"not a setting of {command}"
            raise LaunchError(f"{setting}: {problem}", "run_name=NAME or paths.output_base=FOLDER")
    split = [part for name in names for part in ([name] if (output_base / name).exists() else name.split(",")) if part]
    return output_base, split


def show(arguments: Arguments, width: int | None, color: bool) -> str:
    """One look as text."""
    rows = collect(arguments.output_base, arguments.names)
    if arguments.as_json:
        return json.dumps({"runs": rows, "pipelines": pipelines_of(rows)}, indent=1, allow_nan=False)
    if not rows:
        return f"no runs in {arguments.output_base}"
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    return "\n".join(lines(rows, width or 10_000, color, ascii_only))


def _terminal() -> tuple[int | None, bool]:
    """Width and colour of the terminal; no width where the output goes elsewhere."""
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        return (int(columns) if columns.isdecimal() and columns != "0" else None), False
    return os.get_terminal_size(sys.stdout.fileno()).columns or 80, "NO_COLOR" not in os.environ


def watch(arguments: Arguments, seconds: float) -> None:
    """Look again and again, until q or Ctrl-C."""
    if not sys.stdout.isatty() or arguments.as_json:
        while True:
            width, color = _terminal()
            print(show(arguments, width, color), flush=True)
            time.sleep(seconds)
    from rich.live import Live
    from rich.text import Text

    with _keys() as pressed, Live(auto_refresh=False) as live:
        while True:
            width, color = _terminal()
            stamp = f"{time.strftime('%H:%M:%S')}, every {seconds:g} s, q leaves"
            live.update(Text.from_ansi(f"{show(arguments, width, color)}\n\n{stamp}"), refresh=True)
            if pressed(seconds) == "q":
                return


class _keys:
    """Keys as they are pressed, without Enter; the terminal is given back as it was."""

    def __enter__(self) -> _keys:
        self.terminal: list[Any] | None = None
        if sys.stdin.isatty():
            import termios
            import tty

            self.terminal = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno())
        return self

    def __exit__(self, *exc: object) -> None:
        if self.terminal is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self.terminal)

    def __call__(self, seconds: float) -> str | None:
        """The key pressed within so many seconds."""
        if self.terminal is None:
            time.sleep(seconds)
            return None
        import select

        ready, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace").lower() if ready else None


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.watch is not None:
            watch(arguments, arguments.watch)
        else:
            print(show(arguments, *_terminal()))
        sys.stdout.flush()
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if "--watch" in " ".join(sys.argv if argv is None else argv) else 130
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
