"""A run's config in, the text of its job script out. Pure: writes nothing, asks no SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from conf.check import gpus_per_node, tasks_per_node
from conf.schema import Config
from post_training.run import life
from post_training.run.directory import RunDirectory

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


@cache
def environment() -> jinja2.Environment:
    """Templates in which a forgotten variable is an error and `| q` quotes a value for the shell."""
    import jinja2

    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    result.filters["q"] = lambda value: shlex.quote(str(value))
    return result


@dataclass(frozen=True)
class Array:
    """Several runs as one job array: the same script for all, which finds its run by its element's number."""

    name: str
    folder: Path  # of its script; a link <number> leads to each run's slurm/
    runs: Mapping[int, RunDirectory]  # by the element's number
    limit: int  # elements that run at a time
    follows: tuple[str, ...] = ()  # ids of arrays: each element comes after theirs of the same number

    @property
    def numbers(self) -> str:
        """As --array wants them: 0-3,7%2."""
        return f"{ranges(self.runs)}%{self.limit}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as SLURM writes them: 0-3,7. Pure."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def sbatch_options(
    cfg: Config, run: RunDirectory, dependency: list[str], array: Array | None = None
) -> dict[str, str | int | None]:
    """sbatch's options for a run, in the order they are written; a value of None is a bare flag.

    dependency: job ids that must end well before this job starts. array: of which the run is one.
    """
    slurm, tasks = cfg.slurm, tasks_per_node(cfg)
    gpus = None
    if (count := gpus_per_node(cfg)) > 0:
        gpus = f"{slurm.gpu_type}:{count}" if slurm.gpu_type else str(count)
    # SLURM puts values in the place of %j and the like, also in a folder's name
    logs = str(run.slurm).replace("%", "%%") + "/slurm-%j"
    if array is not None:
        logs = str(array.folder).replace("%", "%%") + "/%a/slurm-%A_%a"
    waits = [f"afterok:{':'.join(dependency)}"] if dependency else []
    waits += [f"aftercorr:{other}" for other in array.follows] if array is not None else []
    options: dict[str, str | int | None] = {
        "job-name": f"{run.pipeline}/{run.name}" if array is None else array.name,
        "comment": str(run.root if array is None else array.folder),
        "array": None if array is None else array.numbers,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": slurm.num_nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm.cpus_per_gpu,
        "mem": slurm.mem,
        "time": slurm.wall_time,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "output": f"{logs}.out",
        "error": f"{logs}.err",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_time_seconds}",
        "dependency": ",".join(waits) or None,
        # a job whose upstream failed can never start: without this it stays pending for ever
        "kill-on-invalid-dep": "yes" if waits else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, "requeue": None}


def job_script(
    cfg: Config, run: RunDirectory, python: str, dependency: list[str] | None = None, array: Array | None = None
) -> str:
    """The job script of a run, for SLURM or for the local supervisor as `cfg.cluster.scheduler` says.

    array: the script is that of all its runs, of which `run` is one.
    """
    template = f"{cfg.cluster.scheduler}.sh.j2"
    # later than the ranks' own watchdogs, which can say what they were doing
    watchdog_s = 60 * cfg.slurm.watchdog_minutes
    hung_seconds = int(1.25 * watchdog_s + min(30, watchdog_s / 2))
    return (
        environment()
        .get_template(template)
        .render(
            title=f"{run.pipeline}/{run.name}" if array is None else array.name,
            template=template,
            sbatch=sbatch_options(cfg, run, dependency or [], array),
            run_dir=str(run.root),
            run_dirs={number: str(one.root) for number, one in array.runs.items()} if array is not None else None,
            job="$SLURM_JOB_ID" if array is None else "$JOB_ID",
            python=python,
            modules=list(cfg.slurm.modules),
            setup=list(cfg.slurm.setup),
            env=dict(cfg.slurm.env),
            offline=cfg.offline,
            num_nodes=cfg.slurm.num_nodes,
            tasks_per_node=tasks_per_node(cfg),
            cpus_per_task=cfg.slurm.cpus_per_gpu,
            # leave a tenth of the lead, at most 30 s, for the requeue itself
            answer_seconds=max(1, cfg.slurm.signal_time_seconds - min(30, cfg.slurm.signal_time_seconds // 10 + 1)),
            done_code=life.DONE,
            asked_code=life.ASKED,
            stopped_code=life.STOPPED,
            deadline_code=life.DEADLINE,
            requeue_code=life.REQUEUE,
            busy_code=life.BUSY,
            avoid_code=life.AVOID,
            hung_code=life.HUNG,
            hung_seconds=hung_seconds,
            watch_seconds=max(1, min(30, hung_seconds // 8)),
            health_check=cfg.slurm.health_check,
        )
    )
