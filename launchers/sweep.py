"""Submit the points of a sweep: all planned before the first job, what is the same in several of them run once.

    python -m launchers.pipeline -m dpo.beta=0.1,0.3

Every point is a pipeline with a folder of its own, whose pipeline.json names shared runs where they are.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.check import ConfigError
from launchers import points, render, site, slurm, submit
from launchers.cli import Sweep
from launchers.errors import Full, LaunchError
from launchers.preflight import check_cluster, check_leads
from launchers.selection import Selection
from launchers.submission import PIPELINE_FILE, Plan, Planned, make_plans
from launchers.submit import Undo
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory

SHOWN = 20
"""Points that are listed one by one."""


def launch(sweep: Sweep, selections: Sequence[Selection]) -> int:
    """Plan, write and submit every point; or print what would be done. Returns the exit status.

    Raises as submit.launch does, and leaves as little behind. 1: SLURM took a part of the jobs, or a gate is closed.
    """
    _check_alike(selections)
    status = 0
    for together in _rounds(selections):
        first = together[0]
        if first.dry_run:
            plans = make_plans(together, ask=False)
            check_leads(plans)
            print("\n".join(map(submit.preview, plans)), end="")
            show(sweep, plans)
        elif first.config(first.wanted[0]).cluster.scheduler == "local":
            status = max(status, _launch_here(sweep, together))
        else:
            status = max(status, _launch_on_slurm(sweep, together))
        sys.stdout.flush()
    return status


def _rounds(selections: Sequence[Selection]) -> list[list[Selection]]:
    """What is submitted at once: several stages of one pipeline (-m stage=sft,dpo) come one after the other."""
    rounds: list[dict[str, Selection]] = []
    for selection in selections:
        free = next((one for one in rounds if selection.run_name not in one), None)
        if free is None:
            rounds.append(free := {})
        free[selection.run_name] = selection
    return [list(one.values()) for one in rounds]


def _check_alike(selections: Sequence[Selection]) -> None:
    """Refuse points on several clusters, or in several output folders: they could share nothing."""
    for key, value in {
        "cluster": lambda s: s.config(s.wanted[0]).cluster.name, "paths.output_base": lambda s: str(s.output_base),
    }.items():  # fmt: skip
        several = list(dict.fromkeys(map(value, selections)))
        if len(several) > 1:
            raise ConfigError(key, ",".join(several), "is one for all points of a sweep", f"a sweep for each {key}")


def _launch_here(sweep: Sweep, selections: Sequence[Selection]) -> int:
    """Run the points on this machine, in the foreground, one after the other."""
    plans = make_plans(selections)
    points.record(selections[0].output_base, sweep.name, sweep.points)
    status = 0
    for i, (selection, plan) in enumerate(zip(selections, plans, strict=True), 1):
        print(f"point {i} of {len(plans)}: {plan.name}", flush=True)
        shared = [p for p in plan.stages.values() if p.owner is not None]
        failed = next((p for p in shared if manifest.problem(p.run.model) is not None), None)
        if failed is not None:
            print(f"{plan.name}: left out: {failed.name} of {failed.run.pipeline} did not finish", file=sys.stderr)
            status = max(status, 1)
            continue
        status = max(status, submit.launch(selection, table=False))
        if status == 130:
            return status
    from launchers import compare

    print()
    compare.show_sweep(selections[0].output_base, sweep.name)
    print(_next_steps(sweep, plans[0]))
    return status


def _launch_on_slurm(sweep: Sweep, selections: Sequence[Selection]) -> int:
    taken = put(sweep, selections)
    show(sweep, taken.plans)
    status = max(submit.tell_gates(plan) for plan in taken.plans)
    if taken.left:
        total = taken.submitted + taken.left
        print(
            f"{taken.submitted} of {total} jobs submitted: {taken.why}\n"
            "  fix: the same command when some have ended: it adds those that are missing", file=sys.stderr,
        )  # fmt: skip
        return 1
    return status


@dataclass(frozen=True)
class Taken:
    """What SLURM took of a sweep's jobs."""

    plans: list[Plan]
    submitted: int
    left: int  # jobs that it did not take, for a limit of their number
    why: str


def put(sweep: Sweep, selections: Sequence[Selection], metric: str | None = None) -> Taken:
    """Plan and submit points on SLURM. Raises as `launch`; Full where no job was taken."""
    distinct = {repr(s.config(name).slurm): (name, s.config(name)) for s in selections for name in s.wanted}
    check_cluster(dict(distinct.values()))
    left: list[Planned] = []
    why = ""
    with _locked(selections):
        plans = make_plans(selections)
        check_leads(plans)
        with submit.undo_on_failure(plans) as undo:
            code = submit.Code(shared=True)
            for plan in plans:
                submit.write(plan, undo, code, durable=False)
            os.sync()  # once for all files, where one by one takes as long as SLURM does
            tell_owners(plans)
            submit.cancel_stale(plans)
            try:
                _submit(sweep.name, plans, undo)
            except Full as error:
                left, why = _drop(plans, undo), error.problem
                if not undo.submitted:
                    raise
        points.record(selections[0].output_base, sweep.name, sweep.points, metric)
    return Taken(plans, len(undo.submitted), len(left), why)


@contextlib.contextmanager
def _locked(selections: Sequence[Selection]) -> Iterator[None]:
    """Hold the locks of all points' folders, in one order for all commands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * len(selections) + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    with contextlib.ExitStack() as stack:
        for folder in sorted(s.output_base / s.run_name for s in selections):
            stack.enter_context(submit.pipeline_lock(folder))
        yield


def tell_owners(plans: Sequence[Plan]) -> None:
    """Write into the ledgers of runs that are not done which other pipelines use them: what fails takes those along."""
    users: dict[Path, list[Planned]] = {}
    names: dict[Path, list[str]] = {}
    for plan in plans:
        for planned in plan.stages.values():
            if planned.elsewhere and planned.decision in ("shared", "live"):
                users.setdefault(planned.run.root, []).append(planned)
                names.setdefault(planned.run.root, []).append(plan.name)
    for root, using in users.items():
        known = {folder.name for folder in life.pipelines_of(using[0].run)}
        new = [name for name in names[root] if name not in known]
        if new:
            ledger.append(using[0].run.ledger, "shared", pipelines=new)


def _submit(name: str, plans: Sequence[Plan], undo: Undo) -> None:
    """Submit what these plans are to, upstream first. Raises LaunchError; Full where SLURM takes no more."""
    for plan in plans:
        for planned in plan.stages.values():
            if planned.decision == "live" and planned.job_id != planned.history.job_id:
                submit.submit_one(plan, planned, undo)  # only writes it down
    waiting = [(i, planned) for i, plan in enumerate(plans) for planned in plan.stages.values() if planned.to_submit]
    arrays = any(planned.cfg.slurm.array_parallelism for _, planned in waiting)
    size = _array_size(plans[0]) if arrays else 1
    with _progress(len(waiting)) as tell:
        for i, planned in waiting if not arrays else ():  # a whole chain at a time, should a limit be reached
            submit.submit_one(plans[i], planned, undo)
            tell(len(undo.submitted))
        while arrays and waiting:
            groups: dict[Any, list[tuple[int, Planned]]] = {}
            later = []
            for i, planned in waiting:
                if all(_is_submitted(plans[i].stages[up]) for up in planned.after if up in plans[i].stages):
                    groups.setdefault(_alike(plans[i], planned, i, size), []).append((i, planned))
                else:
                    later.append((i, planned))
            for members in groups.values():
                if len(members) > 1:
                    _submit_array(name, plans, members, size, undo)
                else:
                    submit.submit_one(plans[members[0][0]], members[0][1], undo)
                tell(len(undo.submitted))
            waiting = later


def _is_submitted(planned: Planned) -> bool:
    source = planned if planned.owner is None else planned.owner
    return not source.to_submit or source.job_id is not None


def _array_size(plan: Plan) -> int:
    """How many elements an array may have, as doctor found it, or SLURM says. Raises ConfigError, LaunchError."""
    size: int | slurm.Unknown | None = site.read(plan.output_base, plan.cluster).max_array_size
    if size is None:
        size = slurm.max_array_size(plan.slurm_conf)
    if isinstance(size, slurm.Unknown):
        raise LaunchError(f"how long an array may be SLURM does not say: {size.why}", "slurm.array_parallelism=null")
    if size < 2:
        problem = f"the cluster takes no job arrays (MaxArraySize={size})"
        raise ConfigError("slurm.array_parallelism", "", problem, "slurm.array_parallelism=null")
    return size


def _alike(plan: Plan, planned: Planned, i: int, size: int) -> Hashable:
    """Equal for runs that can be elements of one array: one script, one size of array, the same to wait for. Pure.

    A point's number in the sweep is its number in all arrays, so that an element follows that of the same point.
    """
    if not planned.cfg.slurm.array_parallelism:
        return plan.name, planned.name
    script = submit.script_of(replace(planned, run=RunDirectory(planned.run.root.parents[1] / "run" / planned.name)))
    afterok, follows = waits(submit.dependencies(plan, planned), i % size)
    return planned.name, planned.cfg.slurm.array_parallelism, i // size, script, tuple(afterok), tuple(follows)


def waits(ids: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    """Jobs that an element waits for as a whole, and arrays of which it waits for the element of its number. Pure."""
    follows = [array for job_id in ids for array, _, element in [job_id.partition("_")] if element == str(number)]
    return [job_id for job_id in ids if job_id.partition("_")[2] != str(number)], follows


def _submit_array(
    name: str, plans: Sequence[Plan], members: Sequence[tuple[int, Planned]], size: int, undo: Undo
) -> None:
    """Submit runs that are alike as one array; where SLURM takes no more jobs, as many of them as it takes."""
    from launchers.executor import submit_array

    i, first = members[0]
    plan = plans[i]
    folder = points.folder(plan.output_base, name) / f"{first.name}-{secrets.token_hex(4)}"
    runs = {number % size: planned.run for number, planned in members}
    afterok, follows = waits(submit.dependencies(plan, first), i % size)
    limit = first.cfg.slurm.array_parallelism
    assert limit is not None
    array = render.Array(f"{name}/{first.name}", folder, runs, limit, tuple(follows))
    script = submit.script_of(first, afterok, array)
    undo.asked = True
    try:
        ids = submit_array(array, script, plan.cluster, plan.slurm_conf)
    except Full:
        if len(members) == 1:
            raise
        half = len(members) // 2
        _submit_array(name, plans, members[:half], size, undo)
        _submit_array(name, plans, members[half:], size, undo)
        return
    undo.made.append(folder)
    for number, planned in members:
        planned.job_id = ids[number % size]
        undo.submitted.append(planned)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Say on a terminal how many of so many jobs are submitted."""
    quiet = total < SHOWN or not sys.stderr.isatty()

    def tell(done: int) -> None:
        if not quiet:
            print(f"\rsubmitted {done} of {total} jobs", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if not quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _drop(plans: Sequence[Plan], undo: Undo) -> list[Planned]:
    """Remove the folders of what was not submitted. Returns what that is."""
    left = []
    for plan in plans:
        missing = [p for p in plan.stages.values() if p.to_submit and p.job_id is None]
        left += missing
        for planned in missing:
            if planned.run.root in undo.made:
                undo.made.remove(planned.run.root)
                shutil.rmtree(planned.run.root, ignore_errors=True)
        if missing and not any(p.to_submit and p.job_id is not None for p in plan.stages.values()):
            submit.put_back(plan.folder / PIPELINE_FILE, undo.descriptions[plan.folder / PIPELINE_FILE])
    return left


# --------------------------------------------------------------------------------------------- showing


def show(sweep: Sweep, plans: Sequence[Plan]) -> None:
    """One line a point: its own jobs, and what it shares."""
    jobs = sum(planned.to_submit for plan in plans for planned in plan.stages.values())
    print(f"sweep {sweep.name}: {len(plans)} points, {jobs} {'job' if jobs == 1 else 'jobs'} to submit")
    rows = [("point", "own", "jobs", "shared", "before")]
    for plan in plans:
        stages = plan.stages.values()
        own = [planned for planned in stages if planned.to_submit]
        ids = list(dict.fromkeys(planned.job_id for planned in own if planned.job_id is not None))
        shared = sum(p.decision == "shared" or (p.decision == "live" and p.elsewhere) for p in stages)
        rows.append(
            (
                plan.name, str(len(own)), f"{ids[0]} to {ids[-1]}" if len(ids) > 1 else "".join(ids) or "-",
                str(shared), str(sum(p.decision in ("done", "live") for p in stages) - sum(
                    p.decision == "live" and p.elsewhere for p in stages)),
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows if len(rows) <= SHOWN else [*rows[: SHOWN - 2], *rows[-1:]]:
        if len(rows) > SHOWN and row is rows[-1]:
            print(f"... {len(rows) - SHOWN} more")
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for plan in plans:
        if len(plans) > 1 and plan is not plans[0] and all(p.owner is not None for p in plan.stages.values()):
            whose = next(iter(plan.stages.values())).run.pipeline
            print(f"{plan.name} is the same as {whose}: what differs changes no output")
    print(_next_steps(sweep, plans[0]), flush=True)


def _next_steps(sweep: Sweep, plan: Plan) -> str:
    which = submit.hint(plan, f"sweep={sweep.name}")
    return f"look:     python -m launchers.status {which}\ncompare:  python -m launchers.compare {which}"
