"""Serving a stage's model: what is refused, the script and every way it ends, and transformers' own server, here and
on a real SLURM.

UPDATE_GOLDEN=1 writes the golden files anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from conf.check import ConfigError, check_serve
from conf.schema import Cluster, Config, Serve, Slurm
from launchers import devcluster as dc
from launchers import runs, serve, slurm, submission
from launchers.errors import LaunchError
from launchers.serve import Endpoint, Order, Served, Server
from post_training.run import manifest
from tests.slurm_fixture import wait_for

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
NASTY = 'it\'s 100% "quoted" $HOME `x` & %j'


def order(scheduler: str, served: Served, engine: str, page: bool = False, **given: object) -> Order:
    asks = {"gpus_per_node": 0, "cpus_per_gpu": 2, "wall_time": "04:00:00"}
    cfg = Config(
        cluster=Cluster(name=scheduler, scheduler=scheduler, python="/opt/py thon/bin/python"),
        slurm=Slurm(**{**asks, **{k: v for k, v in given.items() if k in Slurm.__annotations__}}),  # type: ignore[arg-type]
        serve=Serve(**{k: v for k, v in given.items() if k in Serve.__annotations__}),  # type: ignore[arg-type]
    )
    return Order(served, cfg, engine, Path("/data/outputs"), page)


LOCAL = Served("full/sft", "/data/outputs/full/sft/model", local=True, chat=True)
CASES = {
    "serve_local": (order("local", LOCAL, "transformers"), "/data/outputs/.serve/full-sft-1a2b"),
    "serve_slurm": (
        order(
            "slurm", replace(LOCAL, name="x y/b", model=f"/data/{NASTY}/model", chat=False), "vllm", page=True,
            partition="gpu", account="a b", qos="high", gpus_per_node=2, gpu_type="h100", cpus_per_gpu=24, mem="500G",
            constraint="a&b", exclude="n[1-2]", modules=["cuda/12.4", "my module"], setup=["ulimit -n 4096"],
            env={"TEXT": "it's $X"}, port=8123, dtype="bfloat16", arguments=["--max-model-len=8192", "it's $X"],
        ),
        f"/data/{NASTY}/.serve/x",
    ),
    "serve_hub": (order("slurm", Served("a/b", "a/b", local=False, chat=True), "transformers"), "/data/.serve/x"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SOURCE", Path("/opt/post training"))
    text = serve.script(CASES[name][0], Path(CASES[name][1]))
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"UPDATE_GOLDEN=1 pytest {__file__} where the change is meant"


@pytest.mark.parametrize("name", CASES)
def test_shellcheck(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        (pytest.fail if os.environ.get("CI", "").lower() in ("true", "1") else pytest.skip)("shellcheck is missing")
    script = tmp_path / "job.sh"
    script.write_text(serve.script(CASES[name][0], Path(CASES[name][1])))
    done = subprocess.run(["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "slurm_env", "said"),
    [
        ({"engine": "vlm"}, {}, r"serve.engine=vlm: must be one of auto, vllm.*did you mean 'vllm'"),
        ({"dtype": "fp8"}, {}, "serve.dtype=fp8: must be one of"),
        ({"gpus": 0}, {}, "serve.gpus=0: must be at least 1"),
        ({"port": 80}, {}, "serve.port=80: is no port"),
        ({"page_port": 70000}, {}, "serve.page_port=70000: is no port"),
        ({"wall_time": "4hours"}, {}, "serve.wall_time=4hours: not a time limit"),
        ({"arguments": ["--api-key=secret"]}, {}, "serve.arguments=--api-key: a secret.*VLLM_API_KEY"),
        ({"arguments": ["--hf-token", "x"]}, {}, "serve.arguments=--hf-token: a secret"),
        ({"arguments": ["--host=0.0.0.0"]}, {}, r"serve.arguments=--host=0.0.0.0: it answers on 127.0.0.1 alone"),
        ({}, {"HF_TOKEN": "secret"}, "slurm.env.HF_TOKEN=...: a secret"),
    ],
)
def test_what_cannot_be_served_so_is_refused(given: dict[str, object], slurm_env: dict[str, str], said: str) -> None:
    cfg = Config(serve=Serve(**given), slurm=Slurm(env=slurm_env))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"(?s){said}") as error:
        check_serve(cfg)
    assert "\n  fix: " in str(error.value) and "secret" not in str(error.value).replace("a secret must", "")


def test_what_is_served_changes_no_run() -> None:
    a, b = Config(), Config(serve=Serve(engine="vllm", gpus=4))
    assert submission.freeze(a, "sft", "full", {}) == submission.freeze(b, "sft", "full", {})


def make_run(root: Path, stage: str, architecture: str = "LlamaForCausalLM", whole: bool = True) -> Path:
    """A run directory with an output that looks like a model; returns the output's folder."""
    model = root / "model"
    model.mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump({"stage": stage}))
    (model / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (model / "chat_template.jinja").write_text("...")
    if whole:
        manifest.write(model)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """outputs/ with two pipelines."""
    base = tmp_path / "outputs"
    for stage in ("base", "sft", "rm", "dpo"):
        make_run(base / "first" / stage, stage, whole=stage != "dpo")
    make_run(base / "first" / "eval_sft", "eval", whole=False)
    make_run(base / "second" / "sft", "sft")
    elsewhere = make_run(base / "second" / "elsewhere", "grpo").parent
    described = {"stages": {"grpo": {"run_dir": str(elsewhere), "stage": "grpo", "after": []}}}
    (base / "second" / "pipeline.json").write_text(json.dumps(described))
    return base


def test_a_stages_model_is_found(base: Path) -> None:
    served = serve.of_stage(base, "first", "sft")
    assert served == Served("first/sft", str(base / "first" / "sft" / "model"), local=True, chat=True)
    assert not serve.of_stage(base, None, "base").chat
    # a stage whose run is reused from elsewhere, by the name that the pipeline gives it
    assert serve.of_stage(base, None, "grpo").model == str(base / "second" / "elsewhere" / "model")


def test_a_stage_that_others_reuse_or_never_started_is_one(base: Path) -> None:
    """A pipeline that took a finished run from another one, and one in which a gate held the stage back."""
    for name, run_dir in (("third", base / "first" / "base"), ("held", base / "held" / "base")):
        (base / name).mkdir()
        described = {"stages": {"base": {"run_dir": str(run_dir), "stage": "base", "after": []}}}
        (base / name / "pipeline.json").write_text(json.dumps(described))
    assert serve.of_stage(base, None, "base").model == str(base / "first" / "base" / "model")


def test_a_port_that_is_taken_is_known_before_anything_starts() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert serve._taken(port)
    assert not serve._taken(port)


@pytest.mark.parametrize(
    ("run_name", "stage", "said"),
    [
        (None, "sft", "run_name=null: several pipelines in .* have a stage sft: first, second.*fix: run_name=second"),
        ("first", "stf", "stage=stf: the pipeline first has no such stage.*did you mean 'sft'"),
        (None, "nothing", "stage=nothing: no pipeline in .* has such a stage"),
        ("first", "rm", "stage=rm: is a reward model, which scores answers.*one of: base, dpo, sft"),
        ("first", "eval_sft", "stage=eval_sft: is the output of eval, no model"),
        ("first", "dpo", "stage=dpo: has no complete output in .*no manifest.json.*launchers.submit stage=dpo"),
    ],
)
def test_a_stage_without_a_model_to_talk_to_is_refused(base: Path, run_name: str | None, stage: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        serve.of_stage(base, run_name, stage)


def test_models_from_outside(tmp_path: Path) -> None:
    model = make_run(tmp_path / "a pipe" / "sft", "sft")
    assert serve.of_path(str(model)) == serve.of_path(str(model.parent)) and serve.of_path(str(model)).chat
    assert not serve.of_path(str(make_run(tmp_path / "b" / "base", "base"))).chat  # whatever template it brings
    (make_run(tmp_path / "b" / "sft", "sft", whole=False) / "chat_template.jinja").unlink()
    assert not serve.of_path(str(tmp_path / "b" / "sft")).chat
    assert serve.of_path(str(model)).name == "a-pipe/sft"
    assert serve.of_path("Qwen/Qwen3-0.6B") == Served("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", local=False, chat=True)
    with pytest.raises(ConfigError, match="no such folder"):
        serve.of_path(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"holds no model: its config.json is missing"):
        serve.of_path(str(tmp_path))
    with pytest.raises(ConfigError, match="holds a LlamaForSequenceClassification"):
        serve.of_path(str(make_run(tmp_path / "p" / "x", "sft", "LlamaForSequenceClassification")))
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not complete: config.json has 2 bytes"):
        serve.of_path(str(model))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter.*\n.*stage=merge"):
        serve.of_path(str(model))


def test_vllm_is_taken_where_there_are_gpus_and_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    assert serve.choose_engine(Config(), gpus=1) == "transformers"
    assert serve.choose_engine(Config(cluster=Cluster(python="/other/python")), gpus=1) == "vllm"
    there.add("vllm")
    assert serve.choose_engine(Config(), gpus=1) == "vllm"
    assert serve.choose_engine(Config(), gpus=0) == "transformers"
    assert serve.choose_engine(Config(serve=Serve(engine="vllm")), gpus=0) == "vllm"
    with pytest.raises(
        LaunchError, match=r"not installed: gradio, openai\n  fix: pip install '\.\[serve\]' in the project's folder"
    ):
        serve.missing(Config(), "vllm", page=True)
    with pytest.raises(LaunchError, match="not installed: fastapi, uvicorn, openai"):
        serve.missing(Config(), "transformers", page=False)


# ------------------------------------------------------------------------------ what is said of a server

SERVER = Server(
    id="full-sft-1a2b", name="full/sft", model="/m", engine="vllm", gpus=1, chat=True, page=False, scheduler="slurm",
    cluster="h100", slurm_conf=None, host="login", created=0.0, job_id="17",
)  # fmt: skip


def job(state: str, reason: str = "None") -> slurm.JobRecord:
    return slurm.JobRecord("17", state, reason, 5, 60, 1, "node7", "gpu", "N/A", "N/A", "", "")


@pytest.mark.parametrize(
    ("seen", "answers", "word", "text"),
    [
        (job("PENDING", "Resources"), False, "queued", "queued: "),
        (job("RUNNING"), False, "loading", "loading full/sft on node7"),
        (job("RUNNING"), True, "answers", ""),
        (job("COMPLETING"), True, "ending", ""),
        (job("TIMEOUT"), True, "ended", "its wall time is over"),
        (job("FAILED"), False, "ended", "it failed"),
        (None, True, "ended", "SLURM does not know its job"),
        (slurm.Unknown("squeue: timed out"), True, "unknown", "SLURM does not answer: squeue: timed out"),
    ],
)
def test_a_jobs_state(seen: slurm.JobRecord | slurm.Unknown | None, answers: bool, word: str, text: str) -> None:
    state = serve.judge(SERVER, seen, False, answers)
    assert state.word == word and state.text.startswith(text)


def test_what_a_person_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("node7", 23456, 7861, 0)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    far = serve.shown(SERVER, endpoint, False, "me", "login1", "Ctrl-C")
    assert "ssh -N -L 8000:127.0.0.1:23456 -L 7860:127.0.0.1:7861 node7\n" in far
    assert "ssh -N -L 8000:127.0.0.1:23456 -L 7860:127.0.0.1:7861 -J me@login1 me@node7\n" in far
    assert "http://127.0.0.1:8000/v1/chat/completions" in far and "http://127.0.0.1:7860\n" in far
    assert "Authorization" not in far
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    near = serve.shown(replace(SERVER, chat=False), endpoint, True, "me", "login1", "Ctrl-C")
    assert "http://127.0.0.1:23456/v1/completions" in near and "ssh" not in near and "7861" in near
    assert '"Authorization: Bearer $VLLM_API_KEY"' in near and "abc" not in near  # the shell puts it in


def test_which_server_is_meant() -> None:
    servers = {
        Path("a"): SERVER,
        Path("b"): replace(SERVER, id="full-dpo-1", name="full/dpo", job_id="18"),
        Path("c"): replace(SERVER, id="x-dpo-1", name="x/dpo", job_id="19"),
    }
    for wanted, found in {"17": "a", "full-dpo-1": "b", "x/dpo": "c", "sft": "a"}.items():
        assert serve.find(servers, wanted) == Path(found)
    with pytest.raises(LaunchError, match="several servers: full-dpo-1, x-dpo-1"):
        serve.find(servers, "dpo")
    with pytest.raises(LaunchError, match="no such server\n  fix: one of: full-sft-1a2b"):
        serve.find(servers, "nothing")


# -------------------------------------------------------------------------- the command, with a stub engine

STUB = f"""#!{sys.executable}
import http.server, os, signal, sys, time
args = sys.argv[1:]
if "-m" in args and args[args.index("-m") + 1] == "launchers.page":
    sys.exit("no gradio here")
print("stub", *args, flush=True)
behave = os.environ["STUB"]
if behave == "crash":
    sys.exit("ValueError: no such weights")
port = int(args[args.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *_): pass
if behave == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behave == "late":
    while not os.path.exists("go"):
        time.sleep(0.02)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def left_over(folder: Path) -> list[str]:
    """Processes that know of a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                texts = [*process.cmdline(), process.cwd()]
                found += [f"{process.pid} {texts}"] if any(str(folder) in text for text in texts) else []
    return found


class Bench:
    """A folder with outputs/ in it, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "outputs"
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "STUB": "good"}
        stub = folder / "stub"
        stub.write_text(STUB)
        stub.chmod(0o755)
        self.stub = f'cluster.python="{stub}"'

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "launchers.serve", *args]

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(*args), cwd=self.folder, env=self.env, capture_output=True, text=True)

    @contextlib.contextmanager
    def foreground(self, *args: str) -> Iterator[subprocess.Popen[str]]:
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen(
                self.argv(*args), cwd=self.folder, env=self.env, stdout=said, stderr=subprocess.STDOUT, text=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def servers(self) -> list[dict[str, object]]:
        done = self("--list", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, object]] = json.loads(done.stdout)["servers"]
        return found

    def endpoint(self) -> Endpoint:
        def look() -> Endpoint | None:
            return next(filter(None, map(serve.read_endpoint, self.base.glob(".serve/*"))), None)

        return wait_for("endpoint.json", look, 120)  # type: ignore[return-value]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    folder = tmp_path / "it's a place"
    folder.mkdir()
    bench = Bench(folder)
    make_run(bench.base / "p" / "sft", "sft")
    yield bench
    for server in serve.read_servers(bench.base).values():
        if server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_detached_it_stays_is_listed_and_stopped(bench: Bench) -> None:
    bench.env["VLLM_API_KEY"] = "top-secret"
    done = bench("stage=sft", "cluster=local", bench.stub, "serve.engine=vllm", "--detach", "--page")
    assert done.returncode == 0, done.stderr
    assert "p/sft answers" in done.stdout and "Bearer $VLLM_API_KEY" in done.stdout
    assert "the chat page did not start" in done.stderr and "no gradio here" in done.stderr
    [row] = bench.servers()
    port = row["port"]
    assert row["state"] == "answers" and isinstance(port, int) and taken(port)
    table = bench("--list").stdout.splitlines()
    assert table[0].split()[:3] == ["ID", "JOB", "STATE"] and str(port) in table[1] and str(row["id"]) in table[1]
    folder = Path(str(row["folder"]))
    out = (folder / "server.out").read_text()
    argv = f"-m vllm.entrypoints.cli.main serve {bench.base}/p/sft/model --served-model-name p/sft --host 127.0.0.1"
    assert argv in out
    assert not any("top-secret" in path.read_text() for path in folder.iterdir() if path.is_file())
    # it is no run of the pipeline
    assert [look.name for look in runs.looks_of(bench.base / "p")] == ["sft"]
    assert [path.name for path in runs.find_pipelines(bench.base, [])] == ["p"]
    stopped = bench("--stop", "sft")
    assert stopped.returncode == 0 and "p/sft (process" in stopped.stdout, stopped.stderr
    assert not taken(port) and not folder.exists() and not left_over(bench.base)
    assert bench("--stop", "sft").returncode == 2 and bench.servers() == []


def test_a_server_that_dies_while_it_loads(bench: Bench) -> None:
    bench.env["STUB"] = "crash"
    done = bench("stage=sft", "cluster=local", bench.stub)
    assert done.returncode == 1
    assert (
        "ValueError: no such weights" in done.stderr
        and "error: the server ended by itself, with status 1" in done.stderr
    )
    [row] = bench.servers()  # its folder stays for its logs, until it is stopped
    assert row["state"] == "ended" and str(row["folder"]) in done.stderr
    assert bench("--stop", str(row["id"])).returncode == 0 and bench.servers() == []


def test_a_stop_while_it_loads_and_a_server_that_does_not_listen_to_it(bench: Bench) -> None:
    bench.env["STUB"] = "late"
    with bench.foreground("stage=sft", "cluster=local", bench.stub) as process:
        wait_for("loading", lambda: "loading" in bench.said())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, bench.said()
    assert "p/sft is stopped" in bench.said() and not left_over(bench.base)
    assert not list(bench.base.glob(".serve/*"))
    bench.env["STUB"] = "deaf"
    with bench.foreground("stage=sft", "cluster=local", bench.stub) as process:
        wait_for("an answer", lambda: "p/sft answers" in bench.said())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, bench.said()
    assert not left_over(bench.base) and not list(bench.base.glob(".serve/*"))


def test_a_server_ends_with_who_reads_about_it(bench: Bench) -> None:
    """`... | head -1`"""
    argv = bench.argv("stage=sft", "cluster=local", bench.stub)
    process = subprocess.Popen(argv, cwd=bench.folder, env=bench.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("p/sft: transformers, on CPUs, process")
    process.stdout.close()
    assert process.wait(60) == 141
    assert not left_over(bench.base) and not list(bench.base.glob(".serve/*"))


def test_another_programs_answer_is_not_taken_for_the_servers(bench: Bench) -> None:
    """Another program takes the port between the look for a free one and the server's own start."""
    bench.env["STUB"] = "late"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with bench.foreground("stage=sft", "cluster=local", bench.stub, f"serve.port={port}") as process:
        folder = wait_for(
            "the engine", lambda: [p.parent for p in bench.base.glob(".serve/*/server.out") if p.read_text()]
        )[0]
        other = subprocess.Popen([sys.executable, "-c", STUB, "--port", str(port)], env={**bench.env, "STUB": "good"})
        try:
            wait_for("the other program", lambda: taken(port))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
            (folder / "go").touch()
            assert process.wait(60) == 1
        finally:
            other.kill()
            other.wait()
    assert "answers" not in bench.said() and "Address already in use" in bench.said()
    assert serve.read_endpoint(folder) is None
    with socket.socket() as mine:  # and one that is taken before
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        done = bench("stage=sft", "cluster=local", bench.stub, f"serve.port={mine.getsockname()[1]}")
    assert done.returncode == 2 and "has it already" in done.stderr and "fix: serve.port=null" in done.stderr
    assert [p for p in bench.base.glob(".serve/*") if p.is_dir()] == [folder]  # nothing was made for it


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["stage=sft", "serve.engin=vllm"], "serve.engin=vllm: no such key\n  fix: did you mean 'serve.engine'"),
        (
            ["stage=sft", "sft.slurm.mem=1G"],
            "sft.slurm.mem=1G: a server is no stage of a pipeline\n  fix: slurm.mem=1G",
        ),
        (["stage=sft", "inputs.model=outputs/p/sft"], "stage=sft: inputs.model says what is served"),
        ([], "stage=null: says what is served"),
        (["stage=sft", "slurm.num_nodes=2"], "slurm.num_nodes=2: a server runs on one node"),
        (["--list", "stage=sft"], "stage=sft: not a setting of --list and --stop"),
    ],
)
def test_refusals_leave_nothing(
    bench: Bench, args: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    assert serve.main([*args, *([] if "--list" in args else ["cluster=local", bench.stub])]) == 2
    assert said in capsys.readouterr().err and not (bench.base / ".serve").exists()


def test_a_dry_run_prints_the_script_alone(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    assert serve.main(["stage=sft", "cluster=h100", bench.stub, "dry_run=true", "serve.gpus=2"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=2" in text and "--tensor-parallel-size 2" in text
    assert "#SBATCH --cpus-per-task=24" in text and "#SBATCH --time=04:00:00" in text and "#SBATCH --no-requeue" in text
    assert not (bench.base / ".serve").exists()


# ------------------------------------------------------------------------------- transformers' own server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output: a random model with our tokenizer and its template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from post_training.data.tokenizer import bytes_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    model, tokenizer = root / "sft" / "model", bytes_tokenizer()
    (root / "sft").mkdir()
    (root / "sft" / "config.yaml").write_text("stage: sft\n")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(model)  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    manifest.write(model)
    return root


@pytest.fixture
def real(tmp_path: Path, tiny: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    shutil.copytree(tiny, bench.base / "p")
    yield bench
    for server in serve.read_servers(bench.base).values():
        if server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def test_transformers_server_here_until_ctrl_c(real: Bench) -> None:
    import openai

    with real.foreground("stage=sft", "cluster=local") as process:
        endpoint = real.endpoint()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{endpoint.port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["p/sft"]
        text = client.completions.create(model="p/sft", prompt="1+1=", max_tokens=4, temperature=0)
        assert text.usage is not None and text.usage.completion_tokens == 4
        client.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, real.said()
    assert not taken(endpoint.port) and not left_over(real.base) and not list(real.base.glob(".serve/*"))
    lines = real.said().splitlines()
    assert lines[0].startswith("p/sft: transformers, on CPUs, process ") and lines[-1] == "p/sft is stopped"


@pytest.mark.slurm
def test_transformers_server_as_a_slurm_job(real: Bench, devcluster: dc.Cluster) -> None:
    import openai

    real.env |= {**devcluster.env, "POST_TRAINING_DEVCLUSTER": str(devcluster.dir), "SQUEUE_FORMAT": "%A"}
    try:
        refused = real("stage=sft", "cluster=dev", "slurm.partition=gpus")
        assert refused.returncode == 2 and "did you mean 'gpu'" in refused.stderr
        assert not (real.base / ".serve").exists()
        with real.foreground("stage=sft", "cluster=dev", "serve.wall_time=10") as process:
            endpoint = real.endpoint()
            [row] = real.servers()
            seen = slurm.jobs([str(row["job"])], conf=str(devcluster.conf))
            assert not isinstance(seen, slurm.Unknown)
            assert seen[str(row["job"])].folder == str(row["folder"]) and seen[str(row["job"])].limit == 600
            assert row["state"] == "answers" and row["port"] == endpoint.port
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{endpoint.port}/v1", api_key="none", max_retries=0)
            ask = {"model": "p/sft", "messages": [{"role": "user", "content": "26+27=?"}], "temperature": 0}
            whole = client.chat.completions.create(**ask, max_tokens=8).choices[0].message.content
            parts = client.chat.completions.create(**ask, max_tokens=8, stream=True)
            assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole
            client.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(90) == 0, real.said()
        assert "p/sft answers" in real.said() and f"http://127.0.0.1:{endpoint.port}/v1" in real.said()
        found = slurm.jobs([str(row["job"])], conf=str(devcluster.conf))
        assert not isinstance(found, slurm.Unknown) and not any(job.live for job in found.values())
        assert not taken(endpoint.port) and not left_over(real.base) and real.servers() == []
    finally:
        devcluster.run("scancel", "-u", "root")
        wait_for("an empty queue", lambda: not devcluster.run("squeue", "-h"), timeout=60)
