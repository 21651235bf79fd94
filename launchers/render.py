"""A run's config in, the text of its job script out. Pure: writes nothing, asks no SLURM."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from conf.check import ConfigError, gpus_per_node, tasks_per_node
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
        "mail-user": slurm.mail_user,
        "mail-type": ",".join(slurm.mail_type) if slurm.mail_user is not None else None,
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


def whole(path: str) -> str:
    """A path from the root on; links in it stay what they are."""
    return str(Path(path).expanduser().absolute())


def python_of(cfg: Config) -> str:
    """The Python of the jobs: the one that submits, unless the config says otherwise."""
    if cfg.cluster.python is not None:
        return cfg.cluster.python
    if cfg.container.image is not None:
        return "python3"
    if cfg.slurm.venv is not None:
        return f"{whole(cfg.slurm.venv)}/bin/python"
    return "python" if cfg.slurm.conda is not None else sys.executable


def mounts(given: Sequence[str], folders: Sequence[str]) -> list[str]:
    """What a container sees of the node: what the user gave, and the folders that a run needs. Pure.

    A folder inside another one, or that the user gave, is not named again. Raises ConfigError for a path that no
    runtime can take: it has a comma or a colon.
    """
    kept = list(given)
    for folder in sorted(set(folders)):
        inside = [m for m in kept if (folder + "/").startswith(m.split(":")[0].rstrip("/") + "/") and ":" not in m]
        if inside or any(m.split(":")[0] == folder for m in given):
            continue
        if re.search("[,:]", folder):
            problem = "is needed inside the container, and no path with a comma or colon can be"
            raise ConfigError("container.image", folder, problem, "container.mounts=[<a folder above it>]")
        kept.append(folder)
    return kept


def container(cfg: Config, run: RunDirectory, folders: Sequence[str]) -> dict[str, list[str]] | None:
    """Words before a command that is to run in the container, by who says them: `command` before the program, and
    `srun` among srun's options. None without a container.

    folders: what the run needs beside its own and paths.output_base.
    """
    how = cfg.container
    if how.image is None:
        return None
    image, local = how.image, how.runtime != "pyxis" or how.image.startswith(("/", ".", "~"))
    if local:
        image = whole(image)
    base = whole(cfg.paths.output_base)
    bound = mounts(how.mounts, [base, *([] if str(run.root).startswith(base + "/") else [str(run.root)]), *folders])
    if how.runtime == "pyxis":
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in bound]
        return {
            "command": [],
            "srun": [f"--container-image={image}", f"--container-mounts={','.join(pairs)}", *how.arguments],
        }
    gpus = ["--nv"] if gpus_per_node(cfg) and not {"--rocm", "--nvccli"} & set(how.arguments) else []
    command = [how.runtime, "--silent", "exec", *gpus, "--bind", ",".join(bound), "--pwd", str(run.root)]
    return {"command": [*command, *how.arguments, image], "srun": []}


def job_script(
    cfg: Config, run: RunDirectory, python: str, dependency: list[str] | None = None, folders: Sequence[str] = (),
    array: Array | None = None,
) -> str:  # fmt: skip
    """The job script of a run, for SLURM or for the local supervisor as `cfg.cluster.scheduler` says.

    folders: what a container has to see beside paths.output_base. array: the script is that of all its runs.
    """
    template = f"{cfg.cluster.scheduler}.sh.j2"
    inside = container(cfg, run, folders)
    words = '"$PYTHON"' if inside is None else '"${python[@]}"'
    if inside is not None and inside["srun"]:
        words = f'"${{container[@]}}" {words}'
    host_python = cfg.container.host_python if inside is not None else None
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
            venv=None if cfg.slurm.venv is None else whole(cfg.slurm.venv),
            conda=cfg.slurm.conda,
            container=inside,
            host_python=host_python,
            python_words=words,
            guarded=inside is None or not inside["srun"] or host_python is not None,
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
            cancelled_code=life.CANCELLED,
            hung_code=life.HUNG,
            hung_seconds=hung_seconds,
            watch_seconds=max(1, min(30, hung_seconds // 8)),
            health_check=cfg.slurm.health_check,
        )
    )
