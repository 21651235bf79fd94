"""Serve a stage's model:  python -m launchers.serve stage=grpo [key=value ...] [--page] [--detach]

An engine's own OpenAI-compatible server (vLLM on GPUs, transformers' on CPUs) in a job script, as a SLURM job or as a
process of this machine. A server is a folder <paths.output_base>/.serve/<id>/:

    server.json     what was started, and as which job or process
    job.sh          the script; server.out and server.err are its output, page.err the chat page's
    endpoint.json   node and port, written by the script once the server answers

It is no run of the pipeline: it has no ledger, is not requeued, and its folder goes when it is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.check import ConfigError, check_serve, nearest, runs_here
from conf.schema import UNTRAINED, Config
from launchers import cli, slurm
from launchers.errors import LaunchError, Unanswered
from launchers.table import tail
from post_training.run import manifest
from post_training.run.directory import RunDirectory, write_atomic

if TYPE_CHECKING:
    import psutil

    from launchers.local import Wakeup

USAGE = """
usage: python -m launchers.serve stage=<stage> [run_name=<pipeline>] [<key>=<value> ...] [--page] [--detach]
       python -m launchers.serve inputs.model=<folder or hub id> [<key>=<value> ...]
       python -m launchers.serve --list [--json]
       python -m launchers.serve --stop <id, job, name or stage>

Serves a stage's model behind OpenAI's API, as a SLURM job or on this machine, until Ctrl-C. It answers on its node's
127.0.0.1 alone; the ssh line that is printed brings it to yours. Keys: serve.*, cluster=, slurm.*, run_name=.

  --page     with a chat page beside it (gradio)
  --detach   leave it running and return when it answers
"""
FOLDER = ".serve"
VERSION = 1
SOURCE = Path(__file__).resolve().parent.parent
POLL_S = {"slurm": 2.0, "local": 0.2}
WATCH_S = {"slurm": 15.0, "local": 1.0}
"""Seconds between looks, before and after the server answers; a look is one squeue."""
LEAVE_S = 20.0
"""How long a local server may take to leave; its script kills it after ten."""


# ------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Served:
    """A model to be served."""

    name: str  # of the model in requests: <run_name>/<stage>, or the hub id
    model: str  # absolute folder, or hub id
    local: bool  # a folder
    chat: bool  # it knows a chat template; else it goes on with texts, as a base stage's model does in any case


def in_folder(folder: Path, name: str, key: str, value: str) -> Served:
    """The model in a folder. Raises ConfigError, about this key and value, where none can be served from there."""
    if (folder / "adapter_config.json").exists():
        fix = "python -m launchers.submit stage=merge merge.adapter=..., and serve what it makes"
        raise ConfigError(key, value, f"{folder} holds an adapter, not a whole model", fix)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        architectures = [str(a) for a in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError):
        problem = f"{folder} holds no model: its config.json is missing or damaged"
        raise ConfigError(key, value, problem, "a folder with config.json, weights and tokenizer") from None
    if (folder / manifest.NAME).exists() and (why := manifest.problem(folder)) is not None:
        raise ConfigError(key, value, f"{folder} is not complete: {why}", "python -m launchers.status says more")
    if not any("CausalLM" in a or "LMHeadModel" in a or "ConditionalGeneration" in a for a in architectures):
        shown = ", ".join(architectures) or "no architecture"
        raise ConfigError(key, value, f"{folder} holds a {shown}, which answers nothing", "a stage that makes a policy")
    return Served(name, str(folder), local=True, chat=_has_template(folder) and _technique(folder.parent) != "base")


def _technique(root: Path) -> str | None:
    """The stage of a run; None where there is no run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(RunDirectory(root).read_config().get("stage"))
    return None


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def of_path(given: str) -> Served:
    """The model that `inputs.model` names: a run directory, a folder or a hub id. Raises ConfigError."""
    folder = Path(given).expanduser().absolute()
    if not folder.exists():
        if given.startswith(("/", ".", "~")) or given.count("/") > 1:
            raise ConfigError("inputs.model", given, "no such folder", "a model's folder, or a hub id")
        return Served(given, given, local=False, chat=True)
    if (folder / "config.yaml").exists():
        folder = RunDirectory(folder).model
    parts = folder.parent.parts[-2:] if folder.name == "model" else folder.parts[-1:]
    name = "/".join(re.sub(r"[^A-Za-z0-9._=,+-]+", "-", part).strip("-") or "model" for part in parts)
    return in_folder(folder, name, "inputs.model", given)


def stages_in(folder: Path) -> dict[str, Path]:
    """Run directories of a pipeline, by stage: those that its pipeline.json names, and what else is in its folder."""
    from launchers.submission import read_description

    named = {name: Path(entry["run_dir"]) for name, entry in read_description(folder).items()}
    there = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.yaml"))}
    return {**there, **named}


def of_stage(output_base: Path, run_name: str | None, stage: str) -> Served:
    """A stage's complete output. Without run_name: of the one pipeline that has such a stage. Raises ConfigError."""
    from launchers.runs import find_pipelines

    pipelines = {
        folder.name: stages_in(folder) for folder in find_pipelines(output_base, [run_name] if run_name else [])
    }
    having = [name for name, stages in pipelines.items() if stage in stages]
    # a stage that was never submitted (held back by a gate, say) is no choice where another pipeline has done it
    having = [name for name in having if _technique(pipelines[name][stage]) is not None] or having
    # one run that several pipelines use is one
    having = list({os.path.realpath(pipelines[name][stage]): name for name in reversed(having)}.values())[::-1]
    if not having:
        where = f"the pipeline {run_name} has" if run_name else f"no pipeline in {output_base} has"
        known = {name for stages in pipelines.values() for name, path in stages.items() if _answers(path)}
        fix = nearest(stage, known) if known else "python -m launchers.pipeline first, or inputs.model=<folder>"
        raise ConfigError("stage", stage, f"{where} no such stage" if run_name else f"{where} such a stage", fix)
    if len(having) > 1:
        problem = f"several pipelines in {output_base} have a stage {stage}: {', '.join(having)}"
        raise ConfigError("run_name", None, problem, f"run_name={having[-1]}")
    run = RunDirectory(pipelines[having[0]][stage])
    if (technique := _technique(run.root)) is None:
        problem = f"{run.root} holds no run"
        raise ConfigError("stage", stage, problem, f"python -m launchers.submit stage={stage} first")
    if technique == "rm" or (technique in UNTRAINED and technique != "merge"):
        policies = [name for name, path in pipelines[having[0]].items() if _answers(path)]
        what = "a reward model, which scores answers" if technique == "rm" else f"the output of {technique}, no model"
        raise ConfigError("stage", stage, f"is {what}", f"one of: {', '.join(policies)}")
    if (why := manifest.problem(run.model)) is not None:
        fix = f"wait for it (python -m launchers.status), or python -m launchers.submit stage={stage}"
        raise ConfigError("stage", stage, f"has no complete output in {run.root} ({why})", fix)
    return in_folder(run.model, f"{having[0]}/{stage}", "stage", stage)


def _answers(root: Path) -> bool:
    return (technique := _technique(root)) == "merge" or technique not in (None, "rm", *UNTRAINED)


# ------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Order:
    """A server to be started."""

    served: Served
    cfg: Config  # slurm: what the job asks for
    engine: str  # vllm or transformers
    output_base: Path
    page: bool

    @property
    def gpus(self) -> int:
        return self.cfg.slurm.gpus_per_node


def gpus_here() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def choose_engine(cfg: Config, gpus: int) -> str:
    """vllm or transformers. Where the job's Python is another one, it is taken to have what it needs."""
    if cfg.serve.engine != "auto":
        return cfg.serve.engine
    there = not runs_here(cfg) or importlib.util.find_spec("vllm") is not None
    return "vllm" if gpus and there else "transformers"


def missing(cfg: Config, engine: str, page: bool) -> None:
    """Refuse a server for which a package is missing here. Another Python's packages are known in its job."""
    needed = ["gradio", "openai"] if page else []
    needed += ["fastapi", "uvicorn", "openai"] if engine == "transformers" else []
    absent = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if absent and runs_here(cfg):
        raise LaunchError(f"not installed: {', '.join(absent)}", "pip install '.[serve]' in the project's folder")


def select(tokens: Sequence[str], page: bool) -> Order:
    """What a command means. Raises ConfigError, LaunchError. Reads files; asks SLURM under cluster=auto only."""
    from launchers.compose import Composer, Layers, split
    from launchers.preflight import check_paths, check_places
    from launchers.selection import resolve_cluster

    layers, composer = Layers.of(tokens), Composer()
    for stage, given in layers.alone.items():
        key, value = split(given[0])[1:]
        raise ConfigError(f"{stage}.{key}", value, "a server is no stage of a pipeline", f"{key}={value}")
    mine = [t for t in tokens if split(t)[1] not in ("stage", "stages.selected", "cluster")]
    root = composer.config([t for t in tokens if split(t)[1] not in ("stage", "stages.selected")])
    cfg = composer.config([*mine, f"cluster={resolve_cluster(composer, layers, root)}"])
    check_serve(cfg)
    check_paths(cfg)
    check_places(cfg)
    if cfg.container.image is not None:
        fix = "container.image=null, and cluster.python, slurm.venv or slurm.conda for a Python of the node"
        raise ConfigError("container.image", cfg.container.image, "servers run outside of containers", fix)
    output_base = Path(cfg.paths.output_base).expanduser().absolute()
    if cfg.inputs.model is not None:
        if layers.selected is not None:
            raise ConfigError("stage", layers.selected, "inputs.model says what is served", "give one of the two")
        served = of_path(cfg.inputs.model)
    elif layers.selected is not None:
        served = of_stage(output_base, cfg.run_name, layers.selected)
    else:
        raise ConfigError("stage", None, "says what is served", "stage=<stage>, or inputs.model=<folder or hub id>")
    if cfg.slurm.num_nodes > 1:
        problem = "a server runs on one node"
        raise ConfigError("slurm.num_nodes", cfg.slurm.num_nodes, problem, "slurm.num_nodes=1, and serve.gpus=<more>")
    if cfg.cluster.scheduler == "local" and cfg.serve.port is not None and _taken(cfg.serve.port):
        problem = "a program on this machine has it already"
        raise ConfigError("serve.port", cfg.serve.port, problem, "serve.port=null takes a free one")
    has_gpus = gpus_here() if cfg.cluster.scheduler == "local" else cfg.slurm.gpus_per_node > 0
    gpus = cfg.serve.gpus if has_gpus else 0
    engine = choose_engine(cfg, gpus)
    missing(cfg, engine, page)
    # what the job asks for: one task, which has all of its GPUs and the cores that come with them
    asks = replace(
        cfg.slurm, num_nodes=1, gpus_per_node=gpus, wall_time=cfg.serve.wall_time, health_check=None,
        cpus_per_gpu=cfg.slurm.cpus_per_gpu * max(1, gpus),
    )  # fmt: skip
    return Order(served, replace(cfg, slurm=asks), engine, output_base, page)


def _taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def check_slurm(order: Order) -> None:
    """Refuse what the cluster does not have. Asks SLURM once."""
    from launchers.preflight import check_cluster

    asks = order.cfg.slurm
    per_gpu = asks.cpus_per_gpu // max(1, order.gpus)
    try:
        offline = order.cfg.offline or order.served.local
        cfg = replace(order.cfg, offline=offline, slurm=replace(asks, cpus_per_gpu=per_gpu))
        check_cluster({order.served.name: cfg})
    except ConfigError as error:  # in the words of the command
        words = {"slurm.gpus_per_node": "serve.gpus", "slurm.wall_time": "serve.wall_time"}
        key, fix = words.get(error.key, error.key), error.fix
        raise ConfigError(key, error.value, error.problem, fix.replace(error.key, key)) from None


def script(order: Order, folder: Path) -> str:
    """The text of a server's job.sh. Pure."""
    from launchers.render import environment, python_of, whole

    cfg, asks, served = order.cfg, order.cfg.slurm, order.served
    sbatch: dict[str, Any] = {}
    if cfg.cluster.scheduler == "slurm":
        kind = f"{asks.gpu_type}:{order.gpus}" if asks.gpu_type else str(order.gpus)
        given = {
            "job-name": f"serve/{served.name}",
            "partition": asks.partition, "account": asks.account, "qos": asks.qos, "nodes": 1, "ntasks": 1,
            "gpus-per-node": kind if order.gpus else None, "cpus-per-task": asks.cpus_per_gpu, "mem": asks.mem,
            "time": asks.wall_time, "constraint": asks.constraint, "exclude": asks.exclude,
            "output": str(folder).replace("%", "%%") + "/server.out",
            "error": str(folder).replace("%", "%%") + "/server.err",
        }  # fmt: skip
        # started again elsewhere it would be behind no tunnel any more
        sbatch = {name: value for name, value in given.items() if value is not None} | {"no-requeue": None}
    return environment().get_template("serve.sh.j2").render(
        title=f"serve/{served.name}", sbatch=sbatch, folder=str(folder), source=str(SOURCE),
        python=python_of(cfg), model=served.model, name=served.name, local_model=served.local,
        chat=served.chat, modules=list(asks.modules), env=dict(asks.env), setup=list(asks.setup),
        venv=None if asks.venv is None else whole(asks.venv), conda=asks.conda,
        offline=cfg.offline or served.local, cpus=asks.cpus_per_gpu, gpus=order.gpus, port=cfg.serve.port,
        page_port=cfg.serve.page_port if order.page else None, engine=order.engine, dtype=cfg.serve.dtype,
        arguments=list(cfg.serve.arguments),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Server:
    """What server.json says."""

    id: str  # the folder's name
    name: str
    model: str
    engine: str
    gpus: int
    chat: bool
    page: bool
    scheduler: str  # slurm or local
    cluster: str
    slurm_conf: str | None
    host: str  # where the command ran
    created: float  # epoch seconds
    job_id: str | None = None  # SLURM's; None while its answer is not known
    pid: int | None = None  # of a local script, which leads its process group
    pid_started: float | None = None  # epoch seconds

    @property
    def job(self) -> str:
        return self.job_id or (f"process {self.pid}" if self.pid is not None else "-")


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers."""

    node: str
    port: int
    page_port: int | None
    started: int  # epoch seconds


def read_servers(output_base: Path) -> dict[Path, Server]:
    """All servers below a folder, by their own folders."""
    found = {}
    for path in sorted((output_base / FOLDER).glob("*/server.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            plain = json.loads(path.read_bytes())
            if plain.pop("version") == VERSION:
                found[path.parent] = Server(**plain)
    return found


def read_endpoint(folder: Path) -> Endpoint | None:
    """Where a server answers; None before it does."""
    try:
        os.listdir(folder)  # noqa: PTH208  (an NFS client looks at a folder anew when it is opened)
        plain = json.loads((folder / "endpoint.json").read_bytes())
        return Endpoint(plain["node"], plain["port"], plain["page_port"], plain["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_server(folder: Path, server: Server) -> None:
    write_atomic(folder / "server.json", json.dumps({"version": VERSION, **asdict(server)}, indent=1) + "\n")


def process_of(server: Server) -> psutil.Process | None:
    """A local server's script, where it runs; None also on another machine."""
    import psutil

    if server.pid is None or server.host != socket.gethostname():
        return None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server.pid)
        same = server.pid_started is not None and abs(process.create_time() - server.pid_started) < 1
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


@dataclass(frozen=True)
class State:
    """What a server is doing."""

    word: str  # queued, loading, answers, ending, ended or unknown
    text: str = ""  # the same for people
    job_id: str | None = None


def judge(server: Server, job: slurm.JobRecord | slurm.Unknown | None, runs: bool, answers: bool) -> State:
    """A server's state from what SLURM says of its job, or from whether its local script runs. Pure."""
    from launchers.states import pending_reason

    if server.scheduler == "local":
        if not runs:
            return State("ended", "its script has ended")
        return State("answers") if answers else State("loading", f"loading {server.name}")
    if isinstance(job, slurm.Unknown):
        return State("unknown", f"SLURM does not answer: {job.why}", server.job_id)
    if job is None:
        return State("ended", "SLURM does not know its job", server.job_id)
    if job.state == "COMPLETING":
        return State("ending", "its processes are being ended", job.job_id)
    if not job.live:
        words = {"TIMEOUT": "its wall time is over", "CANCELLED": "cancelled", "PREEMPTED": "preempted",
                 "NODE_FAIL": "its node was lost", "FAILED": "it failed", "OUT_OF_MEMORY": "out of memory"}  # fmt: skip
        return State("ended", words.get(job.state, f"SLURM says {job.state}"), job.job_id)
    if job.state == "PENDING":
        return State("queued", f"queued: {pending_reason(job.reason)}", job.job_id)
    if answers and job.state == "RUNNING":
        return State("answers", "", job.job_id)
    return State("loading", f"loading {server.name} on {job.node_list}", job.job_id)


def states(servers: Mapping[Path, Server]) -> dict[Path, State]:
    """The state of each server. One squeue for each cluster."""
    answers: dict[str | None, dict[str, slurm.JobRecord] | slurm.Unknown] = {}
    result = {}
    for folder, server in servers.items():
        job: slurm.JobRecord | slurm.Unknown | None = None
        runs = False
        if server.scheduler == "slurm":
            conf = server.slurm_conf
            if conf not in answers:
                answers[conf] = slurm.jobs(conf=conf)
            seen = answers[conf]
            if isinstance(seen, slurm.Unknown):
                job = seen
            else:  # known by the folder in its comment; by its number where a site puts comments of its own on jobs
                mine = [j for j in seen.values() if j.folder and j.folder == os.path.realpath(folder)]
                job = mine[-1] if mine else seen.get(server.job_id or "")
        else:
            runs = process_of(server) is not None
        result[folder] = judge(server, job, runs, read_endpoint(folder) is not None)
    return result


# -------------------------------------------------------------------------------------------- starting


@contextlib.contextmanager
def _folder(order: Order) -> Iterator[Path]:
    """A new server's folder, which is gone where the block fails, unless a job may be in it."""
    base = order.output_base / FOLDER
    made = [path for path in (base, order.output_base) if not path.exists()]
    folder = base / f"{order.served.name.replace('/', '-')}-{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except Unanswered:
        raise
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            problem = f"{error.filename or folder}: {error.strerror or error}"
            raise LaunchError(problem, "paths.output_base=<a folder of yours>") from error
        raise


def start(order: Order) -> tuple[Path, Server]:
    """Make a server's folder and start its script. Raises LaunchError; then nothing is left of it."""
    cfg, served = order.cfg, order.served
    with _folder(order) as folder:
        server = Server(
            folder.name, served.name, served.model, order.engine, order.gpus, served.chat, order.page,
            cfg.cluster.scheduler, cfg.cluster.name, cfg.cluster.slurm_conf, socket.gethostname(), time.time(),
        )  # fmt: skip
        path = folder / "job.sh"
        write_atomic(path, script(order, folder))
        _write_server(folder, server)
        if cfg.cluster.scheduler == "slurm":
            from launchers.executor import take

            try:
                server = replace(server, job_id=take(path, folder, served.name, cfg.cluster.slurm_conf))
            except Unanswered as error:
                look = f"python -m launchers.serve --list{_base_hint(order.output_base)}"
                raise Unanswered(error.problem, f"{look}, which finds it if it was taken") from None
        else:
            server = _spawn(folder, path, server)
        try:
            _write_server(folder, server)
        except OSError:
            stop(folder, server, states({folder: server})[folder])
            raise
        return folder, server


def _spawn(folder: Path, path: Path, server: Server) -> Server:
    """Run the script here, as the leader of a process group that no terminal's Ctrl-C reaches."""
    import psutil

    with (folder / "server.out").open("wb") as out, (folder / "server.err").open("wb") as err:
        process = subprocess.Popen(
            ["bash", str(path)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
    _children[process.pid] = process
    return replace(server, pid=process.pid, pid_started=psutil.Process(process.pid).create_time())


_children: dict[int, subprocess.Popen[bytes]] = {}
"""Scripts that this process started, to be waited for."""


# -------------------------------------------------------------------------------------------- stopping


def stop(folder: Path, server: Server, state: State) -> str | None:
    """End a server and remove its folder. Why that was not possible, or None."""
    if state.word == "unknown":
        return state.text
    if server.scheduler == "slurm":
        ids = [job_id for job_id in (state.job_id or server.job_id,) if job_id is not None]
        if state.word != "ended" and ids:
            refused = slurm.cancel(ids, conf=server.slurm_conf)
            if refused is not None:
                return f"job {ids[0]} is not cancelled: {refused.why}"
            if not slurm.wait_gone(ids, conf=server.slurm_conf, timeout=60):
                return f"job {ids[0]} was cancelled, and SLURM does not say that it is gone"
    elif server.host != socket.gethostname():
        return f"it runs on {server.host}: stop it there"
    else:
        _end_group(server)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _end_group(server: Server) -> None:
    """Ask a local script to leave; what is left of its process group after LEAVE_S is killed."""
    import psutil

    process = process_of(server)
    if process is not None:
        with contextlib.suppress(psutil.Error):
            process.terminate()
        child = _children.get(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
            if child is not None:
                child.wait(LEAVE_S)
            else:
                process.wait(LEAVE_S)
    for member in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if server.pid is not None and process is not None and os.getpgid(member.pid) == server.pid:
                member.kill()


# --------------------------------------------------------------------------------------------- showing


def is_here(node: str) -> bool:
    """Whether a node is this machine."""
    return node.partition(".")[0] == socket.gethostname().partition(".")[0]


def shown(server: Server, endpoint: Endpoint, here: bool, user: str, login: str, stop_with: str) -> str:
    """What a person needs to talk to a server. Pure."""
    port = endpoint.port if here else 8000
    url = f"http://127.0.0.1:{port}/v1"
    lines = [f"{server.name} answers"]
    if here:
        lines += [f"  URL      {url}"]
    else:
        pages = f" -L 7860:127.0.0.1:{endpoint.page_port}" if endpoint.page_port else ""
        tunnel = f"ssh -N -L {port}:127.0.0.1:{endpoint.port}{pages}"
        lines += [
            f"  on {endpoint.node}: http://127.0.0.1:{endpoint.port}/v1",
            f"  tunnel   {tunnel} {endpoint.node}",
            f"  from your own machine, through this one:\n           {tunnel} -J {user}@{login} {user}@{endpoint.node}",
            f"  URL      {url}   (while the tunnel is open)",
        ]
    if endpoint.page_port:
        lines.append(f"  page     http://127.0.0.1:{endpoint.page_port if here else 7860}")
    body: dict[str, Any] = {"model": server.name}
    if server.chat:
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "26+27=?"}]}
    else:
        path, body = "completions", body | {"prompt": "26+27=", "max_tokens": 64}
        lines.append("  it is a base model: it goes on with texts (/v1/completions) and knows no chat")
    key = (
        ' -H "Authorization: Bearer $VLLM_API_KEY"' if server.engine == "vllm" and "VLLM_API_KEY" in os.environ else ""
    )
    lines += [
        f"  try      curl -s {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}",
        f"  stop     {stop_with}",
    ]
    return "\n".join(lines)


def _base_hint(output_base: Path) -> str:
    if output_base == Path("outputs").absolute():
        return ""
    return f" {shlex.quote(f'paths.output_base={output_base}')}"


def _report_end(folder: Path, server: Server, state: State) -> None:
    """Why a server ended that nobody stopped."""
    print(f"error: {server.name}: {state.text}", file=sys.stderr)
    for line in tail(folder / "server.err"):
        print(f"  {line}", file=sys.stderr)
    print(f"  all of it: {folder}/server.err and server.out", file=sys.stderr)


# ------------------------------------------------------------------------------------------- foreground


def serve(order: Order, detach: bool) -> int:
    """Start a server, wait until it answers, and stay with it until it ends or is to stop. The exit status."""
    if order.cfg.dry_run:
        print(script(order, order.output_base / FOLDER / f"{order.served.name.replace('/', '-')}-<id>"), end="")
        return 0
    if order.cfg.cluster.scheduler == "slurm":
        check_slurm(order)
    from launchers.local import Wakeup

    with Wakeup() as wakeup:
        folder, server = start(order)
        gpus = f", {order.gpus} GPU{'s' if order.gpus > 1 else ''}" if order.gpus else ", on CPUs"
        print(f"{server.name}: {server.engine}{gpus}, {'job ' if server.job_id else ''}{server.job}", flush=True)
        try:
            return _attend(order, folder, server, wakeup, detach)
        except BaseException:  # nobody reads the output any more (`| head`), or worse
            stop(folder, server, states({folder: server})[folder])
            raise


def _attend(order: Order, folder: Path, server: Server, wakeup: Wakeup, detach: bool) -> int:
    """Wait for a server's answer, then for its end or the order to stop it. The exit status."""
    began, said, said_at, ready = time.monotonic(), "", 0.0, False
    while True:
        state = states({folder: server})[folder]
        if wakeup.stops:
            problem = stop(folder, server, state)
            if problem is not None:
                print(f"error: {server.name}: {problem}\n  fix: {_stop_command(order, server)}", file=sys.stderr)
                return 1
            print(f"{server.name} is stopped", flush=True)
            return 0 if ready else 130
        if state.word == "ended":
            if not folder.exists():
                print(f"{server.name} was stopped by another command", flush=True)
                return 0
            _report_end(folder, server, state)
            return 1
        endpoint = read_endpoint(folder)
        if endpoint is not None and not ready:
            ready = True
            print(f"after {time.monotonic() - began:.0f} s:")
            _say_ready(order, folder, server, endpoint, detach)
            if detach:
                return 0
        elif not ready and (state.text != said or time.monotonic() - said_at > 30):
            said, said_at = state.text, time.monotonic()
            print(f"{said} ({said_at - began:.0f} s)", flush=True)
        wakeup.wait((WATCH_S if ready else POLL_S)[server.scheduler])


def _stop_command(order: Order, server: Server) -> str:
    return f"python -m launchers.serve --stop {server.id}{_base_hint(order.output_base)}"


def _say_ready(order: Order, folder: Path, server: Server, endpoint: Endpoint, detach: bool) -> None:
    stop_with = _stop_command(order, server)
    stop_with = stop_with if detach else f"Ctrl-C, or {stop_with}"
    text = shown(server, endpoint, is_here(endpoint.node), getpass.getuser(), socket.gethostname(), stop_with)
    print(text, flush=True)
    if server.page and endpoint.page_port is None:
        print("warning: the chat page did not start:", *tail(folder / "page.err", 5), sep="\n  ", file=sys.stderr)


# ----------------------------------------------------------------------------------------- list and stop


def rows(servers: Mapping[Path, Server]) -> list[dict[str, Any]]:
    """What --list shows, as plain data."""
    found = states(servers)
    result = []
    for folder, server in servers.items():
        state, endpoint = found[folder], read_endpoint(folder)
        answers = endpoint is not None and state.word == "answers"
        result.append(
            {
                "id": server.id, "name": server.name, "model": server.model, "engine": server.engine,
                "gpus": server.gpus, "cluster": server.cluster, "job": state.job_id or server.job,
                "state": state.word, "reason": state.text or None,
                "node": endpoint.node if endpoint and answers else None,
                "port": endpoint.port if endpoint and answers else None,
                "page_port": endpoint.page_port if endpoint and answers else None,
                "created": server.created, "folder": str(folder),
            }
        )  # fmt: skip
    return result


def show_list(output_base: Path, as_json: bool) -> None:
    """Print the servers there are."""
    found = rows(read_servers(output_base))
    if as_json:
        print(json.dumps({"servers": found}, indent=1))
        return
    if not found:
        print(f"no servers in {output_base}")
        return
    table: list[tuple[str, ...]] = [("ID", "JOB", "STATE", "ENGINE", "NODE", "PORT", "PAGE", "REASON")]
    for row in found:
        cells = (row["id"], row["job"], row["state"], row["engine"], row["node"], row["port"], row["page_port"])
        reason = row["reason"] or ""
        if row["state"] == "ended":
            reason += f"; why: {row['folder']}/server.err"
        table.append((*("-" if cell is None else str(cell) for cell in cells), reason))
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def find(servers: Mapping[Path, Server], wanted: str) -> Path:
    """The one server that an id, a job, a name or a stage means. Raises LaunchError."""
    for name in ("id", "job_id", "name"):
        found = [folder for folder, server in servers.items() if getattr(server, name) == wanted]
        if found:
            break
    else:
        found = [folder for folder, server in servers.items() if server.name.rpartition("/")[2] == wanted]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(servers[folder].id for folder in (found or servers))
    if found:
        raise LaunchError(f"--stop {wanted}: several servers: {ids}", "give the id of one")
    raise LaunchError(f"--stop {wanted}: no such server", f"one of: {ids}" if ids else "none is there: see --list")


def stop_one(output_base: Path, wanted: str) -> int:
    servers = read_servers(output_base)
    folder = find(servers, wanted)
    server = servers[folder]
    problem = stop(folder, server, states({folder: server})[folder])
    if problem is not None:
        raise LaunchError(f"{server.id}: {problem}", "the same command again")
    print(f"{server.name} ({server.job}) is stopped")
    return 0


def _output_base(settings: Sequence[str]) -> Path:
    """The only setting that --list and --stop take."""
    base = Path("outputs")
    for setting in settings:
        name, _, value = setting.partition("=")
        if name != "paths.output_base" or not value:
            raise LaunchError(f"{setting}: not a setting of --list and --stop", "paths.output_base=FOLDER")
        base = Path(value)
    return base.expanduser().absolute()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        return cli.run(lambda tokens: tokens, lambda _: 0, USAGE, args)
    parser = argparse.ArgumentParser(prog="python -m launchers.serve", usage=USAGE.strip(), add_help=False)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stop", metavar="WHICH")
    given = parser.parse_intermixed_args(args)
    if not given.list and given.stop is None:
        return cli.run(
            lambda tokens: select(tokens, given.page), lambda order: serve(order, given.detach), USAGE, given.settings
        )
    try:
        output_base = _output_base(given.settings)
        if given.stop is not None:
            return stop_one(output_base, given.stop)
        show_list(output_base, given.json)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
