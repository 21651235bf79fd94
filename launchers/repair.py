"""Find what stands in the way of runs, show what would be done about it, and do it.

    python -m launchers.repair [run_name=NAME ...] [paths.output_base=outputs] [--apply] [--json]

Found are jobs that wait for what can no longer come, jobs that are held, jobs without a run and several jobs of one,
runs whose job is gone, and what commands left behind that died. Without --apply nothing is changed; with it, everything
is looked at again first, with the pipeline locked against commands that submit. What is complete is never removed, no
job that has started is cancelled, and where SLURM does not answer its jobs are left alone.

`plan` is a pure function of a frozen Snapshot.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launchers import site, slurm, table
from launchers.errors import LaunchError
from launchers.local import owned
from launchers.runs import Look, conf_of, find_pipelines, looks_of, real, which
from launchers.states import is_local
from launchers.steer import held, queued, refresh
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory, is_there
from post_training.run.history import History, summarise

OLD_S = 3600.0
"""What a dead command left behind is taken for that when nobody has touched it for so long."""
ONWARD = "the pipeline's command goes on from there"


@dataclass(frozen=True)
class Run:
    """One run directory."""

    folder: str  # real path
    name: str  # pipeline/stage
    conf: str | None = None  # its slurm.conf
    here: bool = True  # one that was asked about, and not only one whose output another one needs
    local: bool = False
    owned: bool = False  # a supervisor or a process of its job has it
    elsewhere: str | None = None  # another cluster, which this SLURM knows nothing of
    done: bool = False
    job_id: str | None = None
    running: bool = False  # an attempt of it has not ended, says the ledger
    attempts: int = 0
    expected: bool = False  # a job of it should be queued or running, says the ledger
    cancelled: bool = False
    cancel_job: str | None = None  # a user wants this job of it gone
    held_by: str | None = None
    upstream: tuple[str, ...] = ()  # folders


@dataclass(frozen=True)
class Snapshot:
    """What there is to know. jobs: by slurm.conf, ended ones too, as far as SLURM remembers them."""

    base: tuple[str, ...]  # folders below which a job's folder is one of ours
    runs: tuple[Run, ...] = ()
    jobs: Mapping[str | None, tuple[slurm.JobRecord, ...] | slurm.Unknown] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()  # ids of other users' jobs
    folders: frozenset[str] = frozenset()  # real paths of job folders that are there, with a config
    leftovers: tuple[str, ...] = ()  # temporary files of writers that died
    half_made: tuple[str, ...] = ()  # run directories without config, ledger or anything made


@dataclass(frozen=True)
class Act:
    """What is to be done, in words that a simulation understands too."""

    do: str  # cancel, wait_for, release, adopt, close, finish, lost, unlink, rmtree
    target: str  # folder of the run, or the path; of a job without a run, its id
    conf: str | None = None
    job_id: str | None = None
    ids: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that stands in the way. act: None where only a person can mend it."""

    kind: str
    where: str
    what: str
    fix: str
    act: Act | None = None


# ------------------------------------------------------------------------------------------ deciding, pure


def _live(snapshot: Snapshot, conf: str | None) -> dict[str, slurm.JobRecord]:
    answer = snapshot.jobs.get(conf, ())
    return {} if isinstance(answer, slurm.Unknown) else {job.job_id: job for job in answer if job.live}


def _by_run(live: Mapping[str, slurm.JobRecord]) -> dict[str, list[slurm.JobRecord]]:
    """Live jobs by their folder, or by their id where that has to do."""
    found: dict[str, list[slurm.JobRecord]] = {}
    for job in live.values():
        found.setdefault(job.job_id if "_" in job.job_id or not job.folder else _folder(job), []).append(job)
    return found


def _job_of(
    run: Run, known: Mapping[str, list[slurm.JobRecord]]
) -> tuple[slurm.JobRecord | None, list[slurm.JobRecord]]:  # fmt: skip
    """The live job that this run has, and further ones. The ledger's comes first, then one that runs.

    The tasks of an array may share a comment: those are known by their ids alone.
    """
    own = [*known.get(run.folder, ()), *known.get(run.job_id or "", ())]
    own.sort(key=lambda job: (job.job_id != run.job_id, queued(job), len(job.job_id), job.job_id))
    if own and queued(own[0]) and _unwanted(run, own[0]):  # it is to go: one that runs has the run
        own.sort(key=queued)
    return (own[0], own[1:]) if own else (None, [])


@functools.lru_cache(maxsize=100_000)
def _real(folder: str) -> str:
    return real(folder)


def _folder(job: slurm.JobRecord) -> str:
    return _real(job.folder) if job.folder else ""


def plan(snapshot: Snapshot) -> list[Finding]:
    """What is wrong, and what would be done about it: upstream first. Pure. Empty where all is well."""
    found: list[Finding] = []
    for conf, answer in snapshot.jobs.items():
        if isinstance(answer, slurm.Unknown):
            where = conf or "SLURM"
            found.append(Finding("unknown", where, f"does not answer: {answer.why}", "its jobs are left alone"))
    live = {conf: _live(snapshot, conf) for conf in snapshot.jobs}
    silent = {conf for conf, answer in snapshot.jobs.items() if isinstance(answer, slurm.Unknown)}
    runs = {run.folder: run for run in snapshot.runs}
    known = {conf: _by_run(some) for conf, some in live.items()}
    jobs = {run.folder: _job_of(run, known.get(run.conf, {})) for run in snapshot.runs}
    lost: set[str] = set()  # runs that will have no job and no output
    for run in snapshot.runs:
        if run.local or run.conf in silent or run.elsewhere:
            found += _closed(run) if run.local and run.here else []
            if not run.local:
                continue
            if not run.done and not run.owned:
                lost.add(run.folder)
            continue
        job, others = jobs[run.folder]
        if run.here:
            found += [_duplicate(run, job, other, snapshot) for other in others if job is not None]
            found += _vanished(run, job)
        if not run.done and job is None:
            lost.add(run.folder)
    for _ in snapshot.runs:  # what waits for a run that is lost is lost
        before = len(lost)
        for run in snapshot.runs:
            job, _others = jobs[run.folder]
            ours = run.here and not run.done and not run.local and not run.elsewhere and run.folder not in lost
            if ours and job is not None and queued(job):
                gone = [up for up in run.upstream if up in lost] or (["itself"] if _unwanted(run, job) else [])
                if gone and _allowed(job, snapshot):
                    lost.add(run.folder)
        if len(lost) == before:
            break
    for run in snapshot.runs:
        job, _others = jobs[run.folder]
        if run.elsewhere or run.local:  # a job of this cluster's is not what its ledger tells of
            continue
        if run.here and run.folder not in lost:
            found += _adopted(run, job, snapshot)
        if run.here and not run.done and job is not None and queued(job):
            wrong = _waiting(run, job, runs, jobs, lost, silent, snapshot)
            found += wrong
            if run.running and any(finding.act is not None and finding.act.do == "cancel" for finding in wrong):
                found += _vanished(run, None)  # its last attempt has no end in the ledger either
    found += _orphans(snapshot, live)
    found += [
        Finding("leftover", path, "a temporary file of a command that died", "remove it", Act("unlink", path))
        for path in snapshot.leftovers
    ]
    live_folders = {_folder(job) for some in live.values() for job in some.values()}
    for folder in snapshot.half_made:
        if folder not in live_folders and not silent:
            what = "a run directory that a command began to make, and nothing in it"
            found.append(Finding("half made", folder, what, "remove it", Act("rmtree", folder)))
    return found


def _allowed(job: slurm.JobRecord, snapshot: Snapshot) -> bool:
    return job.job_id not in snapshot.foreign


def _unwanted(run: Run, job: slurm.JobRecord) -> bool:
    """Whether a queued job should not be there: a user cancelled it, or its run was cancelled."""
    return job.job_id == run.job_id and (run.cancelled or run.cancel_job == job.job_id)


def _closed(run: Run) -> list[Finding]:
    """A local run whose supervisor and processes are gone."""
    if not run.running or run.owned:
        return []
    if run.done:
        return [_finish(run)]
    what = f"attempt {run.attempts} was never closed: its supervisor and its job are gone"
    return [Finding("vanished", run.name, what, f"close it; {ONWARD}", Act("close", run.folder, reason=what))]


def _finish(run: Run) -> Finding:
    what = f"attempt {run.attempts} was never closed, and its output is complete"
    return Finding("not closed", run.name, what, "close it as finished", Act("finish", run.folder))


def _vanished(run: Run, job: slurm.JobRecord | None) -> list[Finding]:
    if job is not None:
        return []
    if run.running:
        if run.done:
            return [_finish(run)]
        what = f"attempt {run.attempts} was never closed: job {run.job_id} is gone"
        return [Finding("vanished", run.name, what, f"close it; {ONWARD}", Act("close", run.folder, reason=what))]
    if run.expected and not run.done:
        what = f"job {run.job_id} is gone, and the run was to start"
        return [Finding("vanished", run.name, what, f"write that down; {ONWARD}", Act("lost", run.folder, reason=what))]
    return []


def _adopted(run: Run, job: slurm.JobRecord | None, snapshot: Snapshot) -> list[Finding]:
    """A job that the ledger does not know: the command died that submitted it, or it was submitted by hand."""
    if job is None or job.job_id == run.job_id or run.done or not _allowed(job, snapshot):
        return []
    what = f"job {job.job_id} is to run it, and its ledger does not know it"
    return [
        Finding("unknown job", run.name, what, "write it down", Act("adopt", run.folder, run.conf, job.job_id))
    ]  # fmt: skip


def _duplicate(
    run: Run, job: slurm.JobRecord | None, other: slurm.JobRecord, snapshot: Snapshot
) -> Finding:  # fmt: skip
    assert job is not None
    what = f"job {other.job_id} is a second one: job {job.job_id} has the run"
    if not queued(other):
        return Finding("duplicate", run.name, f"{what}; it runs", "nothing: it leaves the run alone and ends")
    return _cancel("duplicate", run.name, what, run.conf, other, snapshot, target=other.job_id)


def _cancel(
    kind: str, where: str, what: str, conf: str | None, job: slurm.JobRecord, snapshot: Snapshot,
    target: str, onward: str = "", reason: str = "",
) -> Finding:  # fmt: skip
    """Cancel a queued job, where that is ours to do."""
    if not _allowed(job, snapshot):
        return Finding(kind, where, what, f"its owner can: scancel {job.job_id}")
    return Finding(kind, where, what, f"cancel it{onward}", Act("cancel", target, conf, job.job_id, reason=reason))


def _waiting(
    run: Run, job: slurm.JobRecord, runs: Mapping[str, Run],
    jobs: Mapping[str, tuple[slurm.JobRecord | None, list[slurm.JobRecord]]], lost: set[str],
    silent: set[str | None], snapshot: Snapshot,
) -> list[Finding]:  # fmt: skip
    """What is wrong with a queued job."""
    if _unwanted(run, job):
        what = f"job {job.job_id} is queued, and the run was cancelled"
        return [_cancel("cancelled", run.name, what, run.conf, job, snapshot, run.folder, reason=what)]
    dead = [up for up in run.upstream if up in lost]
    if dead:
        names = ", ".join(runs[up].name.rpartition("/")[2] for up in dead)
        what = f"job {job.job_id} can never start: {names} {'is' if len(dead) == 1 else 'are'} not done and not queued"
        onward, reason = f"; {ONWARD}", f"waited for {names}, which ended"
        return [_cancel("never starts", run.name, what, run.conf, job, snapshot, run.folder, onward, reason)]
    found = []
    known = [runs[up] for up in run.upstream if up in runs]
    sure = not any(up.conf in silent or up.elsewhere or up.local for up in known if not up.done)
    needs = {j.job_id for up in known if not up.done and (j := jobs[up.folder][0]) is not None}
    waits = slurm.upstream_jobs(job)
    if run.upstream and sure and (job.reason == "DependencyNeverSatisfied" or needs - waits):
        what = f"job {job.job_id} waits for jobs that ended" if waits else f"job {job.job_id} waits for no job"
        fix = f"have it wait for {', '.join(sorted(needs))}" if needs else "have it wait for none: all it needs is done"
        if _allowed(job, snapshot):
            act = Act("wait_for", run.folder, run.conf, job.job_id, tuple(sorted(needs)))
            found.append(Finding("waits in vain", run.name, what, fix, act))
        else:
            found.append(Finding("waits in vain", run.name, what, "its owner can repair it"))
    match held(job):
        case "launch_failed_requeued_held" if _allowed(job, snapshot):
            what = f"job {job.job_id} is held, since its start failed"
            act = Act("release", run.folder, run.conf, job.job_id)
            found.append(Finding("held", run.name, what, "release it", act))
        case "JobHeldAdmin":
            what = f"job {job.job_id} is held by an administrator"
            found.append(Finding("held", run.name, what, "only they can release it"))
        case None:
            pass
        case _ if run.held_by is None:
            what = f"job {job.job_id} is held, and not by launchers.hold"
            found.append(Finding("held", run.name, what, f"where that is not meant: launchers.release {run.name}"))
    return found


def _orphans(
    snapshot: Snapshot, live: Mapping[str | None, Mapping[str, slurm.JobRecord]]
) -> list[Finding]:  # fmt: skip
    """Jobs below the looked-at folders whose run directory is gone."""
    found, known = [], {run.folder for run in snapshot.runs} | snapshot.folders
    for conf, some in live.items():
        for job in some.values():
            folder = _folder(job)
            if not any(folder.startswith(f"{base}/") for base in snapshot.base) or folder in known:
                continue
            if "_" in job.job_id:
                continue  # a task of an array: its comment does not name it
            what = f"job {job.job_id} has no run: {table.near(folder)} is gone"
            if queued(job):
                found.append(_cancel("orphan", job.job_id, what, conf, job, snapshot, target=job.job_id))
            else:
                found.append(Finding("orphan", job.job_id, what, f"it runs: scancel {job.job_id}"))
    return found


# ------------------------------------------------------------------------------------------------ looking


def _expected(history: History) -> bool:
    """Whether the ledger means the run to go on by itself."""
    if history.job_id is None or history.cancelled or history.gave_up or history.running:
        return False
    return history.outcome is None or history.action == "requeue" or history.outcome == "preempted"


def _upstream(look: Look, siblings: Mapping[str, str]) -> tuple[str, ...]:
    """The run directories that must be done before this run. siblings: of its pipeline's stages, by name."""
    if look.after is not None:
        return tuple(dict.fromkeys(siblings[name] for name in look.after if name in siblings))
    derived = {name for name, source in look.section("inputs").items() if source and source.get("derived")}
    return tuple(dict.fromkeys(folder for name, folder in look.inputs().items() if name not in derived))


def _run(
    look: Look, output_base: Path, here: bool, upstream: tuple[str, ...],
    clusters: dict[str | None, str | slurm.Unknown],
) -> Run:  # fmt: skip
    history, conf = look.story.history, conf_of(look)
    theirs = history.slurm_cluster or site.read(output_base, str(look.section("cluster").get("name"))).slurm_cluster
    ours = clusters.get(conf)
    other = theirs if theirs and isinstance(ours, str) and ours != theirs else None
    local = is_local(history) or look.section("cluster").get("scheduler") != "slurm"
    return Run(
        folder=real(look.run.root), name=f"{look.run.pipeline}/{look.run.name}", conf=conf, here=here, local=local,
        owned=local and owned(look.run), elsewhere=other, done=look.done, job_id=history.job_id,
        running=history.running, attempts=history.attempts, expected=_expected(history), cancelled=history.cancelled,
        cancel_job=history.cancel_job if history.cancel_wish else None, held_by=history.held_by,
        upstream=upstream,
    )  # fmt: skip


def take(output_base: Path, names: list[str], now: float | None = None) -> Snapshot:
    """Look at pipelines and their jobs. Two squeue calls a cluster. Raises LaunchError where a folder is not there.

    The queue is asked before the runs are read: a run that ends meanwhile is seen as done, not as lost.
    """
    folders = find_pipelines(output_base, names)
    looks: dict[str, Look] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for folder in folders:
        found = [look for look in looks_of(folder) if look.config]
        siblings = {look.name: real(look.run.root) for look in found}
        for look in found:
            place = real(look.run.root)
            if place not in looks or look.run.root.parent.name == look.pipeline:  # a sweep's points share runs
                looks[place], needs[place] = look, _upstream(look, siblings)
    here = set(looks)
    for place in [up for ups in needs.values() for up in ups]:
        if place not in looks and is_there(Path(place)):
            run = RunDirectory(Path(place))
            looks[place] = Look(run.pipeline, run.name, run).read()
    on_slurm = [look for look in looks.values() if look.section("cluster").get("scheduler") == "slurm"]
    confs = dict.fromkeys(conf_of(look) for look in on_slurm)
    jobs: dict[str | None, tuple[slurm.JobRecord, ...] | slurm.Unknown] = {}
    clusters: dict[str | None, str | slurm.Unknown] = {}
    foreign: set[str] = set()
    for conf in confs:
        mine = slurm.jobs(conf=conf)
        if isinstance(mine, slurm.Unknown):
            jobs[conf] = mine
            continue
        for look in on_slurm:
            if conf_of(look) == conf and not look.done:
                refresh(look)
        ids = [
            look.story.history.job_id
            for look in looks.values()
            if conf_of(look) == conf and not is_local(look.story.history) and look.story.history.job_id
        ]
        others = slurm.jobs([job_id for job_id in ids if job_id not in mine], conf=conf)
        if isinstance(others, slurm.Unknown):
            jobs[conf] = others
            continue
        jobs[conf] = (*mine.values(), *others.values())
        clusters[conf] = slurm.cluster_name(conf)
        foreign |= set(others) if os.getuid() != 0 else set()
    named = {_folder(j) for some in jobs.values() if not isinstance(some, slurm.Unknown) for j in some if j.live}
    leftovers, half_made = _left_behind(folders, time.time() if now is None else now)
    return Snapshot(
        base=tuple(real(folder) for folder in folders) if names else (real(output_base),),
        runs=tuple(
            _run(look, output_base, folder in here, needs.get(folder, ()), clusters) for folder, look in looks.items()
        ),
        jobs=jobs, foreign=frozenset(foreign),
        folders=frozenset(folder for folder in named if folder and is_there(Path(folder) / "config.yaml")),
        leftovers=tuple(leftovers), half_made=tuple(half_made),
    )  # fmt: skip


def _left_behind(folders: Sequence[Path], now: float) -> tuple[list[str], list[str]]:
    """Temporary files that nobody has written to for long, and run directories with nothing in them."""
    leftovers, half_made = [], []
    for folder in folders:
        places = [folder, *_children(folder)]
        for place in [*places, *[place / "slurm" for place in places]]:
            for path in _children(place, files=True):
                if path.name.startswith(".") and path.name.endswith(".tmp") and _age(path, now) > OLD_S:
                    leftovers.append(str(path))
        for place in places[1:]:
            begun = any(is_there(place / name) for name in ("config.yaml", "ledger.jsonl"))
            if is_there(place / "slurm") and not begun:
                made = [p for name in ("checkpoints", "model", "logs") for p in _children(place / name, both=True)]
                strange = {p.name for p in _children(place, both=True)} - {"checkpoints", "logs", "slurm", "code"}
                if not made and not strange and _age(place, now) > OLD_S and _age(place / "slurm", now) > OLD_S:
                    half_made.append(real(place))
    return leftovers, half_made


def _children(folder: Path, files: bool = False, both: bool = False) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
        return found if both else [p for p in found if not p.is_symlink() and (p.is_file() if files else p.is_dir())]
    except OSError:
        return []


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0


# -------------------------------------------------------------------------------------------------- doing


def apply(output_base: Path, names: list[str], findings: Sequence[Finding]) -> list[tuple[Finding, str]]:
    """Do what was planned, where it is still to be done. Returns what came of each."""
    done: list[tuple[Finding, str]] = []
    by_folder: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.act is not None:
            by_folder.setdefault(_pipeline(finding.act, output_base), []).append(finding)
    for folder, some in by_folder.items():
        try:
            with _lock(folder):
                still = plan(take(output_base, names))
                for finding in some:
                    assert finding.act is not None
                    if any(other.act == finding.act for other in still):
                        done.append((finding, _do(finding.act) or "done"))
                    else:
                        done.append((finding, "left alone: no longer so"))
        except LaunchError as error:
            done += [(finding, error.problem) for finding in some]
    return done


def _pipeline(act: Act, output_base: Path) -> Path:
    """The folder to lock for an act."""
    path = Path(act.target)
    if act.do == "unlink":
        path = path.parent if path.parent.name != "slurm" else path.parent.parent
        return path if is_there(path / "pipeline.json") else path.parent
    return path.parent if act.target.startswith("/") else output_base


@contextlib.contextmanager
def _lock(folder: Path):  # type: ignore[no-untyped-def]
    """No command submits there meanwhile. Raises LaunchError."""
    from filelock import FileLock, Timeout

    made = not is_there(folder / ".submit.lock")
    try:
        with FileLock(folder / ".submit.lock", timeout=30):
            yield
    except Timeout:
        raise LaunchError(f"not done: another command has been submitting in {folder}") from None
    except OSError as error:
        raise LaunchError(f"not done: {folder}: {error.strerror or error}") from None
    finally:
        if made and not is_there(folder / "pipeline.json"):
            with contextlib.suppress(OSError):
                (folder / ".submit.lock").unlink()


def _do(act: Act) -> str | None:
    """Do it. Why that failed, or None."""
    try:
        return _on_disk(act) if act.do in ("close", "finish", "lost", "unlink", "rmtree") else _on_cluster(act)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        return f"not done: {error}"


def _on_cluster(act: Act) -> str | None:
    assert act.job_id is not None
    run = RunDirectory(Path(act.target)) if act.target.startswith("/") else None
    if act.do == "adopt":
        assert run is not None
        cluster = str(run.read_config()["cluster"]["name"])
        ledger.append(run.ledger, "submitted", job_id=act.job_id, cluster=cluster)
        return None
    if act.do == "wait_for":
        refused = slurm.wait_for(act.job_id, act.ids, act.conf)
    elif act.do == "release":
        refused = slurm.release([act.job_id], act.conf)
    else:
        refused = slurm.cancel([act.job_id], act.conf, only_pending=True)
    if refused is not None:
        return f"not done: {refused.why}"
    if act.do == "cancel":
        left = slurm.jobs([act.job_id], conf=act.conf)
        if isinstance(left, slurm.Unknown):
            return f"not known: {left.why}"
        if act.job_id in left and left[act.job_id].state == "RUNNING":
            return "left alone: it has started"
        if run is not None:
            ledger.append(run.ledger, "cancelled", reason=act.reason)
    return None


def _on_disk(act: Act) -> str | None:
    path = Path(act.target)
    if act.do == "unlink":
        path.unlink(missing_ok=True)
        return None
    if act.do == "rmtree":
        shutil.rmtree(path)
        return None
    run = RunDirectory(path)
    with run.exclusive():
        history = summarise(ledger.read(run.ledger))
        if act.do == "lost":
            if not _expected(history):
                return "left alone: no longer so"
            ledger.append(run.ledger, "cancelled", reason=f"{act.reason}; the same command goes on")
            return None
        if not history.running:
            return "left alone: no longer so"
        if act.do == "finish":
            if manifest.problem(run.model) is not None:
                return "left alone: its output is not complete"
            life.record_end(run, history, history.attempts, 0, life.Ending("finished", "exit"))
            return None
        outcome = "stopped" if history.stop_signal == "TERM" else "crashed"
        reason = f"{act.reason}; the same command goes on"
        life.record_end(run, history, history.attempts, 137, life.Ending(outcome, "exit", reason=reason, gave_up=True))
    life.cancel_dependents(run, f"upstream {run.name} vanished with its job")
    return None


# ------------------------------------------------------------------------------------------------ showing


def show(findings: Sequence[Finding], results: Mapping[Finding, str], width: int) -> str:
    """The plan, or what came of it, as text: a line what is wrong, a line what is done about it."""
    lines = []
    for finding in findings:
        where = finding.where if not finding.where.startswith("/") else table.near(finding.where)
        lines += _wrapped(f"{where}  {finding.kind}: {finding.what}", width, "")
        if finding in results:
            lines += _wrapped(f"{finding.fix}: {results[finding]}", width, "    ")
        else:
            lines += _wrapped(finding.fix if finding.act else f"(for you) {finding.fix}", width, "    ")
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    import textwrap

    clean = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(clean, max(20, width), initial_indent=indent, subsequent_indent="    ", break_on_hyphens=False)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.repair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m launchers.repair [run_name=NAME ...] [paths.output_base=FOLDER] [--apply] [--json]",
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="run_name=NAME, paths.output_base=FOLDER")
    parser.add_argument("--apply", action="store_true", help="do what the plan says")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. 0: nothing to repair, or all repaired; 1: something is left; 2: bad input."""
    try:
        given = parse_arguments(sys.argv[1:] if argv is None else argv)
        output_base, names = which(given.settings, "repair")
        findings = plan(take(output_base, names))
        results = dict(apply(output_base, names, findings)) if given.apply else {}
        width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 10_000
        todo = [finding for finding in findings if finding.act is not None]
        if given.json:
            told = [asdict(f) | {"result": results.get(f)} for f in findings]
            print(json.dumps({"findings": told, "applied": given.apply}, indent=1))
        elif not findings:
            print(f"nothing to repair in {output_base}")
        else:
            print(show(findings, results, width or 80))
            if todo and not given.apply:
                print(f"\n{len(todo)} to repair: the same command with --apply does it")
        if given.apply:
            return 0 if all(result == "done" or "no longer" in result for result in results.values()) else 1
        return 1 if todo else 0
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
