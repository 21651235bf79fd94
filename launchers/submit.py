"""Submit one stage:  python -m launchers.submit stage=sft [key=value ...]

Also the hands of launchers.pipeline: `launch` writes the run directories of a plan and submits them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from conf.check import ConfigError, gpus_per_node, parse_wall_time, split_function
from launchers import cli, slurm
from launchers.errors import LaunchError, Unanswered, gate_fix
from launchers.preflight import check_cluster, check_leads
from launchers.render import Array, job_script, python_of
from launchers.selection import Selection, select
from launchers.submission import PIPELINE_FILE, Plan, Planned, folders_of, live_jobs, make_plan, own_files
from launchers.table import near
from post_training.run import environment, gate, ledger, life
from post_training.run.directory import RunDirectory, fsync_path, write_atomic
from post_training.run.history import History, summarise

USAGE = """
usage: python -m launchers.submit stage=<stage> [<key>=<value> ...] [dry_run=true] [-m]

Submits one stage of a pipeline: a name in its graph, or a technique. Its inputs are the outputs of the
pipeline's upstream stages, or what inputs.* and model.name_or_path say.
"""
SOURCE = Path(__file__).resolve().parent.parent
SNAPSHOT = ("conf", "launchers", "post_training", "templates")
SUFFIXES = (".py", ".yaml", ".j2")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    def sweep(points: cli.Sweep, selections: list[Selection]) -> int:
        from launchers.sweep import launch

        return launch(points, selections)

    return cli.run(lambda tokens: select(tokens, only_one=True), launch, USAGE, argv, sweep)


def launch(selection: Selection, table: bool = True) -> int:
    """Plan, write and submit; or print what would be done. Returns the exit status. table: of what was run here.

    Raises ConfigError and LaunchError; then no job and no new file is left, unless SLURM stopped answering half-way:
    then what it took stays, and the same command adds the rest.
    """
    if selection.dry_run:
        plan = make_plan(selection, ask=False)
        check_leads([plan])
        print(preview(plan), end="")
        return 0
    check_cluster(selection.configs)
    with pipeline_lock(selection.output_base / selection.run_name):
        plan = make_plan(selection)
        check_leads([plan])
        with undo_on_failure([plan]) as undo:
            write(plan, undo, Code())
            if plan.scheduler == "slurm":
                submit(plan, undo)
    _show(plan)
    held = tell_gates(plan)
    if plan.scheduler != "local":
        return held
    status = max(supervise(plan), held)
    if status == 0 and table and not selection.only_one:
        from launchers import compare

        print()
        compare.show(plan.folder)
    return status


# -------------------------------------------------------------------------------------------- writing


class Undo:
    """What this command has made so far."""

    def __init__(self) -> None:
        self.made: list[Path] = []
        self.asked = False  # sbatch was, so there may be jobs
        self.submitted: list[Planned] = []
        self.descriptions: dict[Path, str | None] = {}  # pipeline.json of before, by its path


@contextlib.contextmanager
def pipeline_lock(folder: Path) -> Iterator[None]:
    """One command at a time plans and submits in a pipeline's folder: whoever comes second finds the first's jobs.

    A folder in which nothing was made is gone afterwards.
    """
    from filelock import FileLock, Timeout

    missing = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".submit.lock", timeout=60)
        with lock:
            yield
    except Timeout as error:
        raise LaunchError(
            f"another command has been submitting in {folder} for a minute", "wait for it, then try again"
        ) from error
    except OSError as error:
        raise ConfigError(
            "paths.output_base", error.filename or folder, error.strerror or str(error), "choose a folder of yours"
        ) from error
    finally:
        if missing is not None and [p.name for p in _listing(folder)] in ([".submit.lock"], []):
            with contextlib.suppress(OSError):
                (folder / ".submit.lock").unlink(missing_ok=True)
                while folder != missing.parent:
                    folder.rmdir()
                    folder = folder.parent


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@contextlib.contextmanager
def undo_on_failure(plans: Sequence[Plan]) -> Iterator[Undo]:
    """Where the block fails, cancel the jobs and remove the folders that it made.

    A job must not lose its folder: where SLURM does not answer, all that was made stays.
    """
    undo = Undo()
    try:
        yield undo
    except Unanswered:
        raise
    except BaseException:
        if undo.asked and (left := _cancel(plans, undo)):
            print(f"warning: {left}; the same command goes on from there", file=sys.stderr)
            raise
        for folder in undo.made:
            shutil.rmtree(folder, ignore_errors=True)
        for planned in undo.submitted:
            if planned.run.root not in undo.made:
                ledger.append(
                    planned.run.ledger, "cancelled", reason="another stage of the chain could not be submitted"
                )
        for path, text in undo.descriptions.items():
            put_back(path, text)
        raise


def put_back(description: Path, text: str | None) -> None:
    """Make a pipeline.json what it was before a command that has failed; None: there was none."""
    if text is not None:
        write_atomic(description, text)
    else:
        description.unlink(missing_ok=True)


def _cancel(plans: Sequence[Plan], undo: Undo) -> str | None:
    """Cancel the jobs that this command made, also one whose id it did not get to know. Why that failed, or None."""
    ids = {planned.job_id for planned in undo.submitted if planned.job_id is not None}
    plan = plans[0]
    wanted = [planned for one in plans for planned in one.stages.values() if planned.to_submit]
    there = live_jobs({planned.run.root: History() for planned in wanted}, plan.slurm_conf)
    for job in there.values():
        if isinstance(job, slurm.Unknown):
            return f"what was submitted is not cancelled: {job.why}"
        ids.add(job.job_id)
    refused = slurm.cancel(sorted(ids), conf=plan.slurm_conf)
    if refused is not None or (ids and not slurm.wait_gone(sorted(ids), conf=plan.slurm_conf)):
        return f"jobs {', '.join(sorted(ids))} may not be cancelled{f': {refused.why}' if refused else ''}"
    return None


def snapshot() -> dict[str, bytes]:
    """The code that runs are frozen with, by relative path, read once for all runs of a command; and its commit."""
    commit = environment.commit_of(SOURCE)
    return ({environment.COMMIT: f"{commit}\n".encode()} if commit else {}) | {
        str(path.relative_to(SOURCE)): path.read_bytes()
        for part in SNAPSHOT
        for path in sorted((SOURCE / part).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }


class Code:
    """The snapshot that runs of one command are frozen with.

    shared: a sweep's runs have hard links to the files of its first one, which nobody may write: two hundred files for
    each of a thousand runs take longer than SLURM does. Where there can be no link, a run has its own copy.
    """

    def __init__(self, shared: bool = False) -> None:
        self.files, self.shared = snapshot(), shared
        self.folders = sorted({str(folder) for name in self.files for folder in Path(name).parents})
        self.first: Path | None = None

    def write(self, run: RunDirectory) -> None:
        shutil.rmtree(run.code, ignore_errors=True)
        for folder in self.folders:  # parents first
            (run.code / folder).mkdir(exist_ok=True)
        if self.first is not None:
            with contextlib.suppress(OSError):
                source, target = str(self.first), str(run.code)
                for name in self.files:
                    os.link(f"{source}/{name}", f"{target}/{name}")
                return
            self.first = None
        for name, content in self.files.items():
            path = run.code / name
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            if self.shared:
                path.chmod(0o444)
        if self.shared:
            self.first = run.code


def _write_own_files(planned: Planned) -> None:
    """Copy the user's own Python files into the run's code, as they were when the plan was made."""
    functions = planned.frozen[planned.cfg.stage].get("reward", {}).get("functions", [])
    known = {planned.frozen["data"]["transform_file"], *(split_function(f["path"])[0] for f in functions)}
    for given, (place, text) in own_files(planned.cfg).items():
        if place not in known:
            raise LaunchError(f"{given} was changed while it was submitted", "the same command again")
        target = planned.run.code / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)


def script_of(planned: Planned, dependency: list[str] | None = None, array: Array | None = None) -> str:
    """The text of a run's job script, or of that of an array of which it is an element."""
    return job_script(planned.cfg, planned.run, python_of(planned.cfg), dependency, folders_of(planned.frozen), array)


def write(plan: Plan, undo: Undo, code: Code, durable: bool = True) -> None:
    """Make the run directories of the stages to submit, and pipeline.json. Their scripts follow at submission.

    durable: False where the caller sees to it that all is on the disk.
    """
    for planned in plan.stages.values():
        if not planned.to_submit:
            continue
        run = planned.run
        if not run.root.exists():
            undo.made.append(run.root)
        run.create()
        if planned.history.running and plan.scheduler == "slurm":
            life.close_lost_attempt(run, planned.history, same_job=False)  # its job is gone
        if planned.from_scratch:
            set_aside(run)
        if not planned.started:
            code.write(run)
            _write_own_files(planned)
        dumped = yaml.dump(
            planned.frozen, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True
        )
        write_atomic(run.config, dumped, durable)
        if plan.scheduler == "local":
            write_atomic(run.script, script_of(planned))
    description = plan.folder / PIPELINE_FILE
    undo.descriptions[description] = None
    with contextlib.suppress(OSError):
        undo.descriptions[description] = description.read_text()
    write_atomic(description, json.dumps(plan.description(), indent=1) + "\n", durable)


def set_aside(run: RunDirectory) -> Path | None:
    """Move what earlier attempts made into a folder restarted-N: the next attempt starts from scratch.

    Returns that folder, or None where there was nothing. One rename each, the checkpoints first: whatever happens in
    between, no checkpoint is resumed after its logs are gone. The run must have no job.
    """
    made = [p for p in (run.checkpoints, run.inference_checkpoints, run.model, run.logs) if _listing(p)]
    if not made:
        return None
    run.announce(summarise(ledger.read(run.ledger)).attempts + 1)  # what is left of old attempts writes nothing more
    number = 1
    while (folder := run.root / f"restarted-{number}").exists():
        number += 1
    folder.mkdir()
    for path in made:
        path.rename(folder / path.name)
    run.create()
    fsync_path(run.root)
    ledger.append(run.ledger, "restarted", folder=folder.name)
    return folder


# ------------------------------------------------------------------------------------------ submitting


def dependencies(plan: Plan, planned: Planned) -> list[str]:
    """Job ids that must end well before this stage starts."""
    ids = [job_id for up in planned.after if up in plan.stages and (job_id := plan.stages[up].waits_on) is not None]
    return list(dict.fromkeys([*ids, *planned.waits_for]))


def submit(plan: Plan, undo: Undo) -> None:
    """Submit a plan's stages, upstream first, each after the jobs that it needs. Raises LaunchError."""
    cancel_stale([plan])
    for planned in plan.stages.values():
        submit_one(plan, planned, undo)


def cancel_stale(plans: Sequence[Plan]) -> None:
    """Cancel queued jobs that wait for jobs that failed: these plans submit their runs again. Raises LaunchError."""
    stale = [planned.replaces for plan in plans for planned in plan.stages.values() if planned.replaces is not None]
    if stale and (refused := slurm.cancel(stale, conf=plans[0].slurm_conf)):
        raise LaunchError(f"jobs {', '.join(stale)} wait for jobs that failed, and cannot be cancelled: {refused.why}")


def submit_one(plan: Plan, planned: Planned, undo: Undo) -> None:
    """Submit one stage of a plan, if it is to be; its upstream stages have been. Raises LaunchError."""
    from launchers.executor import RunExecutor

    if planned.to_submit:
        script = script_of(planned, dependencies(plan, planned))
        undo.asked = True
        try:
            job = RunExecutor(planned.run, script, plan.cluster, plan.slurm_conf).submit_run()
        except Unanswered as error:
            before = ", ".join(f"{p.name} as {p.job_id}" for p in undo.submitted)
            raise Unanswered(
                error.problem + (f"; submitted before: {before}" if before else ""), error.fix
            ) from None
        planned.job_id = job.job_id
        undo.submitted.append(planned)
    elif planned.decision == "live" and planned.job_id not in _submitted(planned.run):
        # by a command that died before it could write this down, or by hand
        ledger.append(planned.run.ledger, "submitted", job_id=planned.job_id, cluster=plan.cluster)


def _submitted(run: RunDirectory) -> set[str]:
    """Ids of all jobs that the ledger says were submitted for a run."""
    return {str(event.get("job_id")) for event in ledger.read(run.ledger) if event["event"] == "submitted"}


def supervise(plan: Plan) -> int:
    """Run a plan's stages on this machine, in the foreground."""
    from launchers.local import LocalRun, supervise

    waiting = [p for p in plan.stages.values() if p.decision not in ("done", "held", "shared")]
    if not waiting:
        return 0
    names = {p.name for p in waiting}
    return supervise(
        [
            LocalRun(
                run=p.run,
                after=tuple(up for up in p.after if up in names),
                cpus=max(1, gpus_per_node(p.cfg)) * p.cfg.slurm.cpus_per_gpu,
                wall_time=parse_wall_time(p.cfg.slurm.wall_time),
                signal_time=p.cfg.slurm.signal_time_seconds,
            )
            for p in waiting
        ]
    )


# --------------------------------------------------------------------------------------------- showing

WORDS = {
    "new": "submitted", "again": "submitted again", "live": "queued or running already", "done": "done before",
    "held": "left out",
}  # fmt: skip


def _show(plan: Plan) -> None:
    local = plan.scheduler == "local"
    rows = [("stage", "job", "", "after", "run directory")]
    for planned in plan.stages.values():
        what = WORDS[planned.decision]
        if local and planned.to_submit:
            what = "to run" if planned.decision == "new" else "to go on"
        if planned.from_scratch:
            what += " from scratch"
        if planned.elsewhere:
            what = f"{'shared with' if planned.decision == 'live' else 'reused from'} {planned.run.pipeline}"
        if planned.held_by is not None:
            what += "; its gate does not hold" if planned.gate_problem else f": gate of {planned.held_by}"
        after = [up for up in planned.after if up not in plan.stages or plan.stages[up].decision != "done"]
        rows.append((planned.name, planned.job_id or "-", what, ", ".join(after) or "-", near(planned.run.root)))
    # plain text: one line a stage whatever the terminal's width, for eyes and for grep
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not any(planned.to_submit for planned in plan.stages.values()):
        print("nothing to submit")
    print(f"look:  python -m launchers.status {hint(plan, f'run_name={plan.name}')}", flush=True)


def tell_gates(plan: Plan) -> int:
    """Say which gates of evaluations that are done do not hold and what was left out for them; 1 where there is one."""
    status = 0
    for planned in plan.stages.values():
        if planned.gate_problem is None:
            continue
        out = [p.name for p in plan.stages.values() if p.decision == "held" and p.held_by == planned.name]
        behind = f"; left out: {', '.join(out)}" if out else ""
        print(f"{planned.name}: gate: {planned.gate_problem}{behind}\n  fix: {gate_fix(planned.name)}", file=sys.stderr)
        status = 1
    return status


def hint(plan: Plan, which: str) -> str:
    """What status and compare need to find a pipeline or a sweep."""
    base = near(plan.output_base)
    return " ".join([*([f"paths.output_base={shlex.quote(base)}"] if base != "outputs" else []), shlex.quote(which)])


def preview(plan: Plan) -> str:
    """What a plan would do: the graph, and each script. SLURM was not asked, so job ids stand as <job of ...>."""
    width = max(len(name) for name in plan.stages)
    lines = [f"pipeline {plan.name} on cluster={plan.cluster}, in {plan.folder}", ""]
    for planned in plan.stages.values():
        after = f" after {', '.join(planned.after)}" if planned.after else ""
        word = {"done": "done before", "live": "running already", "held": f"left out (gate of {planned.held_by})"}.get(
            planned.decision, "to submit"
        )
        if planned.from_scratch:
            word += " from scratch"
        if planned.elsewhere:
            word = f"{'reused from' if planned.decision == 'done' else 'shared with'} {planned.run.root}"
        if planned.gate_problem is not None:
            after += f"; its gate does not hold: {planned.gate_problem}"
        elif "gate" in planned.frozen:
            after += f"; gate: {gate.describe(planned.frozen['gate'])}"
        lines.append(f"  {planned.name:{width}}  {planned.cfg.stage:4}  {word}{after}")
    for planned in plan.stages.values():
        if planned.to_submit:
            ups = [up for up in planned.after if up in plan.stages and plan.stages[up].decision != "done"]
            waits = [*(f"<job of {up}>" for up in ups), *planned.waits_for]
            script = script_of(planned, waits)
            lines += ["", f"# {'-' * 20} {planned.run.script}", script.rstrip()]
    return os.linesep.join(lines) + os.linesep


if __name__ == "__main__":
    sys.exit(main())
