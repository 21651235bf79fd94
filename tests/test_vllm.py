"""Generation by real vLLM, on the CPU. `make test` runs what is marked `vllm` by itself, with vLLM on the path."""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from conf import memory
from conf.check import ConfigError, check_run, tasks_per_node, world_size
from conf.schema import Config
from launchers.render import job_script
from launchers.submission import identity
from post_training import train
from post_training.data.source import DataError
from post_training.run import results
from post_training.run.directory import RunDirectory
from post_training.run.life import STOPPED, UNUSABLE
from post_training.stages.common import load_config
from post_training.vllm_engine import Engines
from tests.forkserver import ForkedProcess, ForkServer
from tests.training import (
    DEADLINE,
    IMPORTED_ONCE,
    ROOT,
    Attempt,
    base_environment,
    events,
    hold,
    make_config,
    make_run,
    metrics,
    weights,
)

needs_vllm = pytest.mark.vllm
HERE = importlib.util.find_spec("vllm")
EXACT = 1e-4
"""Nats by which float32's log-probabilities differ at most when all is right; those of other weights differ more."""
OPTIONS = (
    "training.max_steps=4", "checkpointing.save_steps=100", "training.effective_batch_size=8", "grpo.lr=1e-2",
    "rloo.lr=1e-2", "grpo.reward.correct=0", "grpo.reward.format=0", "training.warmup_steps=0",
)  # fmt: skip


def by_vllm(stage: str, backend: str = "vllm") -> tuple[str, ...]:
    how = f"{stage}.generation"
    return (*OPTIONS, f"{how}.backend={backend}", f"{how}.max_logprob_difference={EXACT}")


@cache
def vllm_server() -> ForkServer:
    """It has imported vLLM too."""
    modules = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.v1.engine.core", "post_training.generation")
    started = ForkServer((*IMPORTED_ONCE, *modules), vllm_environment())
    atexit.register(started.close)
    return started


def vllm_environment() -> dict[str, str]:
    assert HERE is not None and HERE.origin is not None, "vLLM is not on the path: make .venv/vllm; see the Makefile"
    return base_environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(HERE.origin).parent.parent}"}


class VllmAttempt(Attempt):
    """An attempt that finds vLLM."""

    module = "post_training.train"

    def _start(self, env: dict[str, str], output: BinaryIO, fork: bool) -> ForkedProcess | subprocess.Popen[bytes]:
        env = env | {"PYTHONPATH": vllm_environment()["PYTHONPATH"]}
        return vllm_server().start(self.module, [str(self.run.root)], env, self.run.root, output)


class BrokenSync(VllmAttempt):
    module = "tests.broken_sync"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    run = make_run(
        folder, "base", "training.max_steps=8", "base.lr=1e-2", "model.hidden_size=64", "training.warmup_steps=0",
        "model.max_position_embeddings=256", name="start",
    )  # fmt: skip
    return Attempt(run).finish().model


def differences(run: RunDirectory) -> list[float]:
    return [line["generation/logprob_difference"] for line in metrics(run) if "loss" in line]


# ----------------------------------------------------------------------------------------- with vLLM itself


@needs_vllm
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_s_engine_samples_from_the_trained_weights(folder: Path, start: Path, ranks: int) -> None:
    """With adapters on two ranks. Also after a stop, which loses no step; here, on one machine's CPU, the weights come
    out the same to the bit."""
    several = ("slurm.gpus_per_node=2", "lora.r=4", "lora.alpha=16") if ranks > 1 else ()
    options = (*by_vllm("grpo"), *several)
    calm = make_run(folder, "grpo", *options, name=f"calm-{ranks}", model=start)
    whole = VllmAttempt(calm, world_size=ranks)
    whole.finish()
    assert "Traceback" not in whole.output()
    assert len(differences(calm)) == 4 and max(differences(calm)) < EXACT
    assert weights(calm) != weights(RunDirectory(start.parent))
    assert any(line["grad_norm"] > 0 for line in metrics(calm) if "loss" in line)
    stopped = hold(make_run(folder, "grpo", *options, name=f"stopped-{ranks}", model=start))
    first = VllmAttempt(stopped, world_size=ranks)
    first.stop_at(1, first.terminate if ranks == 1 else lambda: stopped.request_stop(1))  # seen at the next step
    first.finish(STOPPED)
    VllmAttempt(stopped, 2, world_size=ranks).finish()
    assert [e["step"] for e in events(stopped, "training_started")] == [0, 2]
    assert [line["step"] for line in metrics(stopped) if "loss" in line] == [1, 2, 3, 4]
    (said,) = events(stopped, "not_exact")
    assert "vLLM" in said["reason"] and "seed" in said["reason"]
    assert weights(stopped) == weights(calm)


@needs_vllm
@pytest.mark.parametrize("syncs", [0, 1])
def test_weights_that_do_not_arrive_end_the_run(folder: Path, start: Path, syncs: int) -> None:
    """Be it from the start on, or from the first update on."""
    run = make_run(folder, "grpo", *by_vllm("grpo"), name=f"broken-{syncs}", model=start)
    attempt = BrokenSync(run, SYNCS=str(syncs))
    attempt.finish(UNUSABLE)
    said = attempt.output()
    assert f"at step {syncs} vLLM's" in said and "does not sample from the trained weights" in said
    assert "fix: grpo.generation.backend=transformers" in said and "Traceback" not in said
    assert "grpo.generation.max_logprob_difference" in run.error(1).read_text()
    assert len(metrics(run)) == syncs and not run.model.exists()


@needs_vllm
def test_the_server_lives_and_dies_with_the_attempt(folder: Path, start: Path) -> None:
    """SLURM's SIGTERM reaches it as well, and must not end it before the save. ZeRO-3's parts are gathered for it."""
    options = (*by_vllm("rloo", "vllm_server"), "slurm.gpus_per_node=3", "parallel.strategy=zero3")
    run = hold(make_run(folder, "rloo", *options, name="server", model=start))
    assert tasks_per_node(load_config(run.read_config())) == 2
    first = VllmAttempt(run, world_size=2)
    servers: list[int] = []

    def ask() -> None:
        servers.append(os.pidfd_open(server_of(first.processes[0].pid)))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.pidfd_send_signal(servers[-1], number)
        run.request_stop(1)  # seen at the next step, which the server samples for

    first.stop_at(1, ask)
    first.finish(STOPPED)
    second = VllmAttempt(hold(run), 2, world_size=2)
    second.first_step = 3

    def kill() -> None:
        servers.append(os.pidfd_open(server_of(second.processes[0].pid)))
        second.kill()

    second.stop_at(3, kill)
    assert second.codes() == [-signal.SIGKILL] * 2
    for server in servers:
        assert select.select([server], [], [], DEADLINE)[0], "outlives its rank"
        os.close(server)
    VllmAttempt(run, 3, world_size=2).finish()
    assert [e["step"] for e in events(run, "training_started")] == [0, 2, 2]
    assert len(differences(run)) == 4 and max(differences(run)) < EXACT


def server_of(rank: int) -> int:
    """The pid of the process with vLLM that a rank has started."""
    children = [int(p) for p in Path(f"/proc/{rank}/task/{rank}/children").read_text().split()]
    (found,) = [p for p in children if b"post_training.vllm_engine" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return found


@needs_vllm
def test_evaluation_by_vllm_gives_the_same_answers(folder: Path) -> None:
    drawn = make_run(
        folder, "base", "training.max_steps=1", "base.lr=1e-9", "model.hidden_size=64", "model.initializer_range=0.5",
        name="drawn",
    )  # fmt: skip
    Attempt(drawn).finish()
    asked = ("eval.num_problems=16", "eval.max_new_tokens=16")
    plain = make_run(folder, "eval", *asked, name="eval-plain", model=drawn.model)
    Attempt(plain).finish()
    run = make_run(folder, "eval", *asked, "eval.backend=vllm", name="eval-vllm", model=drawn.model)
    VllmAttempt(run).finish()
    ours, theirs = ((r.model / "samples.jsonl").read_text() for r in (run, plain))
    assert ours == theirs and len({json.loads(line)["completion"] for line in ours.splitlines()}) > 8
    figures = [results.read(r).figures for r in (run, plain)]
    assert figures[0] == figures[1]


# ------------------------------------------------------------------------------------------- without vLLM


@pytest.fixture
def in_process() -> Iterator[None]:
    """An attempt in this process leaves a handler and variables behind."""
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, before)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("stage", ["grpo", "rloo", "eval"])
def test_a_job_without_vllm_says_so(
    tmp_path: Path, start: Path, in_process: None, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    where = "eval" if stage == "eval" else f"{stage}.generation"
    run = make_run(tmp_path, stage, *OPTIONS, f"{where}.backend=vllm", model=start)
    assert train.run_attempt(run, 1) == UNUSABLE
    said = capsys.readouterr().err
    assert "vLLM cannot be used here: No module named 'vllm'" in said and "Traceback" not in said
    assert "fix: pip install '.[vllm]' in the project's folder" in said and not run.model.exists()


def config(*overrides: str, stage: str = "grpo") -> Config:
    return load_config(make_config(stage, "cluster.python=/elsewhere/python", *overrides))


BY_VLLM, SERVER = "grpo.generation.backend=vllm", "grpo.generation.backend=vllm_server"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["grpo.generation.backend=vlm"], "grpo.generation.backend"),
        ([BY_VLLM, "cluster.python=null"], "grpo.generation.backend"),
        ([BY_VLLM, "lora.r=4", "lora.quantize=nf4"], "grpo.generation.backend"),
        ([BY_VLLM, "model.dropout=0.1"], "model.dropout"),
        ([BY_VLLM, "grpo.generation.gpu_memory_utilization=1.5"], "grpo.generation.gpu_memory_utilization"),
        ([BY_VLLM, "grpo.generation.max_model_length=8"], "grpo.generation.max_model_length"),
        ([BY_VLLM, "grpo.generation.max_logprob_difference=-1"], "grpo.generation.max_logprob_difference"),
        ([SERVER, "slurm.gpus_per_node=2", "grpo.generation.server_gpus=2"], "grpo.generation.server_gpus"),
        ([SERVER, "slurm.gpus_per_node=2", "slurm.num_nodes=2", "cluster.scheduler=slurm"], "grpo.generation.backend"),
    ],
)
def test_what_cannot_be_is_refused_at_submission(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(config(*overrides))
    assert error.value.key == key and error.value.fix


def test_the_server_s_gpus_do_not_train(tmp_path: Path) -> None:
    cfg = config(SERVER, "slurm.gpus_per_node=8", "grpo.generation.server_gpus=4", "grpo.num_generations=2")
    assert world_size(cfg) == 4
    check_run(dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, per_device_train_batch_size=2)))
    script = job_script(cfg, RunDirectory(tmp_path / "p" / "grpo"), "python")
    assert "WORLD_SIZE=4" in script
    on_cpu = config(SERVER, "slurm.gpus_per_node=0")
    assert world_size(on_cpu) == 1


def test_vllm_s_share_of_the_gpu_is_part_of_the_estimate() -> None:
    gpu = ("slurm.gpus_per_node=8", "cluster.gpu_memory_gb=80", "model.dtype=bfloat16")
    shape = memory.Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, False)  # 8 B parameters
    small = dataclasses.replace(shape, layers=4)

    def most(*overrides: str) -> dict[str, int]:
        found = memory.estimate(config(*gpu, *overrides), small)
        assert found is not None
        return dict(found.terms)

    assert "vLLM" not in most() and "vLLM" not in most(SERVER)
    assert most(BY_VLLM)["vLLM"] == pytest.approx(0.3 * 80 * memory.GIB)
    share = "grpo.generation.gpu_memory_utilization=0.1"
    assert most(BY_VLLM, share)["vLLM"] == pytest.approx(0.1 * 80 * memory.GIB)
    with pytest.raises(ConfigError, match="does not hold the weights alone") as error:
        memory.check(config(*gpu, BY_VLLM, share), shape)
    assert error.value.fix == "grpo.generation.gpu_memory_utilization=0.21"
    judged = memory.estimate(config(*gpu, "eval.backend=vllm", stage="eval"), small)
    assert judged is not None and judged.terms["vLLM"] == 40 * memory.GIB


def test_an_engine_that_ends_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no vLLM says so before."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    engines = Engines(tmp_path, {}, 1)
    with pytest.raises(DataError, match="vLLM cannot be used here: No module named 'vllm'"):
        engines.wait()
    with pytest.raises(RuntimeError, match="vLLM's process ended with status 0"):
        engines.generate([[1]], {}, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged_for_vllm_as_peft_merges_them(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from post_training.generation import merged_weights

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip
    rows = {"model.embed_tokens": [1, 2]} | ({} if tied else {"lm_head": [1, 2]})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=rows))
    for name, value in adapted.named_parameters():
        if "lora_" in name or "delta" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(len(name)))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    ours = {name: value.clone() for name, value in merged_weights(adapted)}
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    theirs = dict(adapted.merge_and_unload().named_parameters())
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.data)


def test_a_run_is_another_one_by_vllm_but_not_by_how_vllm_is_run() -> None:
    def known(*overrides: str, stage: str = "grpo") -> str:
        inputs = {"inputs": {"model": None}}
        return identity(make_config(stage, *overrides) | inputs)

    plain = make_config("grpo") | {"inputs": {"model": None}}
    of_before = {**plain, "grpo": {k: v for k, v in plain["grpo"].items() if k != "generation"}}
    assert identity(plain) == identity(of_before), "runs of before there was a choice go on"
    assert known(BY_VLLM) != known() and known(SERVER) != known(BY_VLLM)
    assert known(BY_VLLM, "grpo.generation.gpu_memory_utilization=0.2") == known(BY_VLLM)
    assert known("eval.backend=vllm", stage="eval") != known(stage="eval")


def test_a_child_ends_with_its_parent() -> None:
    """Also where the parent has no time to say so."""
    child = (
        "import os, signal; from post_training.vllm_engine import end_with; end_with({}); "
        "print(os.getpid(), flush=True); signal.pause()"
    )
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}.format(os.getpid())])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    orphan = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    process.wait()
    assert select.select([orphan], [], [], DEADLINE)[0], "outlives its parent"
    os.close(orphan)
    process.stdout.close()
