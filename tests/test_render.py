"""Job scripts: golden texts, shellcheck, and the local script run for every way an attempt can end.

UPDATE_GOLDEN=1 writes the golden files anew.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.schema import Cluster, Config, Container, Paths, Slurm
from launchers.render import job_script, sbatch_options
from launchers.submit import SOURCE, snapshot
from post_training.run import ledger, life, manifest
from post_training.run.directory import ATTEMPT_MARK, RunDirectory
from post_training.run.history import History, summarise

GOLDEN = Path(__file__).parent / "golden"
NASTY = 'it\'s 100% "quoted" $HOME `x` & %j'


def cfg(scheduler: str, **slurm: object) -> Config:
    return Config(cluster=Cluster(name=scheduler, scheduler=scheduler), slurm=Slurm(**slurm))  # type: ignore[arg-type]


def contained(scheduler: str, env: dict[str, str] | None = None, **container: Any) -> Config:
    given = {"image": "/data/it's mine/train.sif", "mounts": ["/hf", "/scratch/me:/scratch:ro"], **container}
    config = cfg(scheduler, env=env or {}, gpus_per_node=8 if scheduler == "slurm" else 0)
    return replace(config, container=Container(**given), paths=Paths(output_base="/data/outputs"))


CASES: dict[str, tuple[Config, str, list[str]]] = {
    "local": (cfg("local", gpus_per_node=0, cpus_per_gpu=1), "/data/outputs/full/sft", []),
    "slurm": (cfg("slurm"), "/data/outputs/full/sft", []),
    "slurm_everything": (
        replace(
            cfg(
                "slurm", partition="gpu", account="a b", qos="high", num_nodes=2, gpus_per_node=4, gpu_type="h100",
                mem="500G", constraint="a&b", exclude="n[1-2]", modules=["cuda/12.4", "my module"],
                setup=["ulimit -n 4096"], env={"NCCL_DEBUG": "INFO", "TEXT": "it's $X"},
                health_check="nvidia-smi -q > '/tmp/it is' && test -e \"$HOME\"",
            ),
            offline=True,
        ),
        f"/data/{NASTY}/full/ppo",
        ["17", "18"],
    ),
    "slurm_venv": (cfg("slurm", venv="/data/it's mine/venv", modules=["cuda/12.4"]), "/data/outputs/full/sft", []),
    "slurm_conda": (
        cfg("slurm", conda="it's mine", setup=["export PATH=/opt/conda/bin:$PATH"]), "/data/outputs/full/sft", [],
    ),
    "slurm_apptainer": (contained("slurm", env={"HF_HOME": "/hf"}), "/data/outputs/full/sft", []),
    "slurm_pyxis": (
        contained(
            "slurm", image="nvcr.io#nvidia/pytorch:25.01-py3", runtime="pyxis", arguments=["--container-remap-root"]
        ),
        f"/data/{NASTY}/full/sft", [],
    ),
    "slurm_pyxis_host_python": (
        contained("slurm", image="/data/images/train.sqsh", runtime="pyxis", host_python="/usr/bin/python3"),
        "/data/outputs/full/sft", [],
    ),
    "local_apptainer": (contained("local"), "/data/outputs/full/sft", []),
    "slurm_cpu": (cfg("slurm", gpus_per_node=0, num_nodes=2, cpus_per_gpu=2), "/data/outputs/full/eval", ["3"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    config, root, dependency = CASES[name]
    text = job_script(config, RunDirectory(Path(root)), "/opt/py thon/bin/python", dependency)
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"UPDATE_GOLDEN=1 pytest {__file__} where the change is meant"


@pytest.mark.parametrize("name", CASES)
def test_shellcheck(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        (pytest.fail if os.environ.get("CI", "").lower() in ("true", "1") else pytest.skip)("shellcheck is missing")
    config, root, dependency = CASES[name]
    script = tmp_path / "job.sh"
    script.write_text(job_script(config, RunDirectory(Path(root)), "/opt/py thon/bin/python", dependency))
    done = subprocess.run(["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_values_reach_the_shell_as_they_are(tmp_path: Path) -> None:
    config, root, _ = CASES["slurm_everything"]
    text = job_script(config, RunDirectory(Path(root)), NASTY)
    lines = [line for line in text.splitlines() if line.startswith(("RUN_DIR=", "PYTHON=", "export TEXT="))]
    done = subprocess.run(["bash", "-c", "\n".join([*lines, 'printf "%s\\n" "$RUN_DIR" "$PYTHON" "$TEXT"'])], capture_output=True, text=True)  # fmt: skip # noqa: E501
    assert done.stdout.splitlines() == [root, NASTY, "it's $X"]


def test_a_signal_while_slurm_is_asked_loses_neither_the_word_nor_the_signal(tmp_path: Path) -> None:
    """bash 5.2 forgets a trap that comes while it reads $( ): a job cancelled at that moment was requeued."""
    text = job_script(cfg("slurm"), RunDirectory(tmp_path), sys.executable, [])
    found = [re.search(rf"^{name}\(\) .*?^}}", text, re.M | re.S) for name in ("line_of", "hear", "ask")]
    pipes = next((line for line in text.splitlines() if line.startswith("exec {answers}")), "")
    for name, says in {"scontrol": "JobState=COMPLETING", "sinfo": "n1:alloc\nn2:alloc"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nkill -TERM $SCRIPT; echo '{says}'\n")
        (tmp_path / name).chmod(0o755)
    script = [
        "set -u", "export SCRIPT=$$ SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1,n2", 'life() { echo "$*" >>"$SAID"; }',
        'starts=0 signal="" asking=0 word=() line="" attempt=1 RUN_DIR=/data aside=()', "pause() { :; }", pipes,
        *(function[0] for function in found if function), "trap 'ask TERM' TERM", "trap '' USR2", "hear",
        'printf "%s|" "$signal" "${word[@]}"',
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path / "said")}
    done = subprocess.run(["bash", "-c", "\n".join(script)], env=env, capture_output=True, text=True, timeout=60)
    word = "--restart-count|0|--job|JobState=COMPLETING|--node-states|n1:alloc n2:alloc|"
    assert done.stdout == f"TERM|{word}", done.stderr
    assert (tmp_path / "said").read_text().strip() == "stop /data --attempt 1 --signal TERM"


def test_a_port_that_another_job_listens_on_is_passed_over() -> None:
    text = job_script(cfg("slurm"), RunDirectory(Path("/data/x")), sys.executable, [])
    function = next(line for line in text.splitlines() if line.startswith("free_port()"))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def found() -> int:
            argv = ["bash", "-c", f"set -u; {function}\nfree_port {port}"]
            return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)

        assert found() > port
        taken.close()
        assert found() == port


def test_percent_signs_of_folders_are_not_slurms() -> None:
    options = sbatch_options(cfg("slurm"), RunDirectory(Path("/a %j/full/sft")), [])
    assert options["output"] == "/a %%j/full/sft/slurm/slurm-%j.out"


@pytest.mark.parametrize(("given", "asked"), [(8, "h100:1"), (1, "h100:1"), (0, None)])
def test_an_evaluation_is_one_process_with_one_gpu(given: int, asked: str | None) -> None:
    """It is not distributed: on a cluster of 8 GPUs a node, eight of it would write one output."""
    run = RunDirectory(Path("/data/outputs/full/eval_sft"))
    config = replace(cfg("slurm", gpus_per_node=given, gpu_type="h100"), stage="eval")
    options = sbatch_options(config, run, [])
    assert (options["ntasks-per-node"], options.get("gpus-per-node")) == (1, asked)
    assert "--ntasks=1 --ntasks-per-node=1" in job_script(config, run, "python")


def test_dependencies_end_well_or_take_the_job_with_them() -> None:
    options = sbatch_options(cfg("slurm"), RunDirectory(Path("/a/full/sft")), ["1", "2"])
    assert options["dependency"] == "afterok:1:2" and options["kill-on-invalid-dep"] == "yes"
    assert "dependency" not in sbatch_options(cfg("slurm"), RunDirectory(Path("/a/full/sft")), [])


# ------------------------------------------------------------------------------------ the script at work

STUB = """
import os, signal, sys, time
from pathlib import Path
from post_training.run import ledger, manifest
from post_training.run.directory import ATTEMPT_MARK, RunDirectory

run, attempt, behave = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"]), os.environ["STUB"]
print("attempt", attempt, "rank", os.environ["RANK"], flush=True)
if behave == "crash":
    sys.exit(7)
if behave in ("answer", "deaf"):
    term = []
    signal.signal(signal.SIGTERM, lambda *_: term.append(1))
    (run.root / f"ready-{os.environ['RANK']}").touch()
    for _ in range(600):
        if behave == "answer" and (run.stop_requested(attempt) or term):
            sys.exit(85)
        time.sleep(0.05)
if behave == "half":
    sys.exit(0)
if os.environ["RANK"] == "0":
    run.model.mkdir(exist_ok=True)
    (run.model / "weights").write_text("w")
    manifest.write(run.model, identity="x")
"""


def without_mark(text: str) -> str:
    """What an attempt said after its first line, which is in both streams."""
    assert ATTEMPT_MARK.match(text.removeprefix("\n")), text
    return text.split("\n", 2)[2]


class Script:
    """A run directory with a stub for the training side, and its script."""

    def __init__(self, root: Path, **slurm: object) -> None:
        config = cfg("local", gpus_per_node=0, cpus_per_gpu=1, max_failures=2, **slurm)
        self.run = RunDirectory(root)
        self.run.create()
        for name, content in snapshot().items():
            if name.startswith("post_training/run/") or name == "post_training/__init__.py":
                path = self.run.code / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (self.run.code / "post_training/train.py").write_text(STUB)
        self.run.config.write_text(yaml.safe_dump({"slurm": {"max_failures": 2}, "inputs": {"model": None}}))
        self.run.script.write_text(job_script(config, self.run, sys.executable))

    def start(self, behave: str) -> subprocess.Popen[str]:
        env = {**os.environ, "POST_TRAINING_JOB_ID": "local-1", "STUB": behave}
        for name in list(env):
            if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
                del env[name]
        return subprocess.Popen(
            ["bash", str(self.run.script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], timeout: float = 40) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, without_mark(out), without_mark(err)

    def history(self) -> History:
        return summarise(ledger.read(self.run.ledger))

    def wait_ready(self, ranks: int = 1) -> None:
        self.wait(lambda: all((self.run.root / f"ready-{rank}").exists() for rank in range(ranks)))

    @staticmethod
    def wait(condition: Callable[[], bool], timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / NASTY / "full" / "sft", signal_time_seconds=40)


def test_finish_and_a_second_start(script: Script) -> None:
    code, out, err = script.finish(script.start("finish"))
    assert (code, out) == (0, "attempt 1 rank 0\n"), err
    assert script.history().outcome == "finished" and manifest.problem(script.run.model) is None
    code, out, _ = script.finish(script.start("crash"))  # nothing runs: the run is done
    assert (code, out, script.history().attempts) == (0, "", 1)


def test_usr1_saves_and_asks_to_be_started_again(script: Script) -> None:
    process = script.start("answer")
    script.wait_ready()
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as SLURM's B: does
    code, _, err = script.finish(process)
    assert code == life.REQUEUE, err
    history = script.history()
    assert (history.outcome, history.action, history.failures, history.reason) == ("stopped", "requeue", 0, None)
    assert script.finish(script.start("finish"))[0] == 0
    assert script.history().attempts == 2


def test_usr1_without_an_answer_is_requeued_all_the_same(tmp_path: Path) -> None:
    script = Script(tmp_path / "run", signal_time_seconds=2)
    process = script.start("deaf")
    script.wait_ready()
    process.send_signal(signal.SIGUSR1)
    started = time.monotonic()
    script.wait(lambda: process.poll() is not None)
    assert time.monotonic() - started < 15
    os.killpg(process.pid, signal.SIGKILL)  # what the supervisor does with deaf ranks
    code, _, _ = script.finish(process)
    assert code == life.REQUEUE
    assert (script.history().outcome, script.history().failures) == ("stopped", 0)
    assert "without saving" in str(script.history().reason)


def test_crashes_are_started_again_until_they_are_too_many(script: Script) -> None:
    assert script.finish(script.start("crash"))[0] == life.REQUEUE
    assert (script.history().failures, script.run.failure_count.read_text()) == (1, "1\n")
    code, _, _ = script.finish(script.start("crash"))
    assert code == 7
    assert script.history().action == "exit" and "gave up after 2 failures" in str(script.history().reason)


def test_an_end_without_output_is_a_failure(script: Script) -> None:
    assert script.finish(script.start("half"))[0] == life.REQUEUE
    assert script.history().reason == "ended without a complete output"


def test_term_ends(script: Script) -> None:
    process = script.start("answer")
    script.wait_ready()
    os.killpg(process.pid, signal.SIGTERM)  # to every process, as on preemption and cancel
    code, _, err = script.finish(process)
    assert code == 143, err
    assert (script.history().outcome, script.history().failures) == ("stopped", 0)


def test_an_incomplete_input_is_no_start(script: Script, tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "nothing"), "run_dir": str(tmp_path)}
    script.run.config.write_text(yaml.safe_dump({"slurm": {"max_failures": 2}, "inputs": {"model": source}}))
    code, out, err = script.finish(script.start("finish"))
    assert (code, out) == (2, "") and "inputs.model" in err and "Traceback" not in err


def test_the_script_imports_its_snapshot_and_not_the_checkout(script: Script) -> None:
    (script.run.code / "post_training/train.py").write_text(
        "import post_training.run.life, sys; print(post_training.run.life.__file__); sys.exit(1)"
    )
    _, out, _ = script.finish(script.start("finish"))
    assert out.startswith(str(script.run.code)) and str(SOURCE / "post_training") not in out
