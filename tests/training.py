"""Tiny run directories, made by hand, and attempts on them as processes of their own. No launchers here."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
import yaml
from omegaconf import OmegaConf

from conf.schema import TECHNIQUES, Config
from post_training.run import ledger
from post_training.run.directory import RunDirectory
from tests.forkserver import ForkedProcess, ForkServer

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
DEADLINE = 180.0
"""Seconds after which a process that hangs is killed and its test fails; no test depends on it otherwise."""

TINY = [
    "model.dtype=float32",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.max_position_embeddings=128",
    "data.held_out=16",
    "data.num_documents=64",
    "data.num_demonstrations=48",
    "data.num_pairs=32",
    "data.num_prompts=64",
    "training.num_train_epochs=null",
    "training.effective_batch_size=8",
    "training.per_device_train_batch_size=4",
    "training.max_length=64",
    "training.warmup_steps=2",
    "checkpointing.save_steps=2",
    "logging.steps=1",
    "logging.report_to=[]",
    "cluster.scheduler=local",
    "slurm.gpus_per_node=0",
    "ppo.max_completion_length=8",
    "ppo.lr=1e-3",
    "grpo.num_generations=4",
    "grpo.max_completion_length=8",
    "grpo.lr=1e-3",
    "rloo.num_generations=4",
    "rloo.max_completion_length=8",
    "rloo.lr=1e-3",
    "rloo.reward.random=1",
    "ppo.reward.random=1",  # the tiny model is never right, and without a reward nothing is learnt
    "grpo.reward.random=1",
    "eval.max_new_tokens=8",
    "sample.max_completion_length=8",
    "eval.num_problems=8",
]


def real_data(name: str) -> Path:
    """A folder of real records. Where they are absent the test is skipped, but under CI it fails."""
    folder = REAL_DATA / name
    if not folder.exists():
        why = f"real records are not at {folder}; put them there to run this test"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return folder


def make_config(stage: str, *overrides: str) -> dict[str, Any]:
    """A stage's config as the launcher freezes it, tiny unless overridden, as plain data."""
    merged = OmegaConf.merge(
        OmegaConf.structured(Config),
        OmegaConf.load(ROOT / "conf" / "stage" / f"{stage}.yaml"),
        OmegaConf.from_dotlist([*TINY, *overrides]),
    )
    config = OmegaConf.to_container(merged)
    assert isinstance(config, dict)
    others = {t for t in TECHNIQUES if t not in (stage, "eval")}  # frozen configs hold eval too
    dropped = {"pipeline", "stages", "dry_run", "run_name", "restart", *others}
    return {str(k): v for k, v in config.items() if k not in dropped}


def make_run(root: Path, stage: str, *overrides: str, name: str = "", **inputs: Path) -> RunDirectory:
    """A new run directory of a stage; `inputs` (model, reference, reward_model) are outputs of other runs."""
    name = name or stage
    run = RunDirectory(root / name)
    run.create()
    sources: dict[str, Any] = {"model": None, "reference": None, "reward_model": None, "data": None}
    sources |= {k: {"path": str(p), "run_dir": str(p.parent)} for k, p in inputs.items()}
    config = make_config(stage, *overrides)
    config |= {"version": 1, "name": name, "identity": f"id-{name}", "pipeline": root.name, "inputs": sources}
    run.config.write_text(yaml.safe_dump(config))
    return run


def hold(run: RunDirectory) -> RunDirectory:
    """Make the run's next attempt wait at the end of each step until `Attempt.stop_at` lets it go on.

    The file that rank 0 reads there becomes a pipe, and reading a pipe waits for a writer. Tests then decide
    between which steps a request comes, however slow or fast the machine is.
    """
    run.stop_request.unlink()
    os.mkfifo(run.stop_request)
    return run


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def base_environment() -> dict[str, str]:
    """What every attempt of a test sees."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


IMPORTED_ONCE = (
    "deepspeed", "datasets", "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer", "trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer", "trl.trainer.kto_trainer",
    "trl.trainer.rloo_trainer", "trl.experimental.orpo", "post_training.attempt", "post_training.stages.ppo",
)  # fmt: skip
"""What attempts import and takes long. deepspeed as well: accelerate imports it where it is installed."""


COMPILER = ("deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx")
"""What DeepSpeed imports when it makes an engine, which brings much of torch's compiler, and the rest of that."""


@cache
def server(compiler: bool) -> ForkServer:
    """The server of plain attempts, or of those under ZeRO or torch.compile; started by the first of them."""
    started = ForkServer((*IMPORTED_ONCE, *(COMPILER if compiler else ())), base_environment())
    atexit.register(started.close)
    return started


class Attempt:
    """One attempt of a run: `world_size` training processes, their output in the run's slurm/ folder.

    They are forked from a server that has done the imports, or with `fork=False` started from nothing.
    """

    def __init__(
        self, run: RunDirectory, attempt: int = 1, world_size: int = 1, fork: bool = True, **env: str
    ) -> None:
        self.run, self.number, self.first_step = run, attempt, 1
        ledger.append(run.ledger, "attempt_started", attempt=attempt, job_id="1", node="here")
        base = base_environment() | {
            "POST_TRAINING_ATTEMPT": str(attempt), "TORCHINDUCTOR_CACHE_DIR": str(run.root.parent / ".compiled"),
        }  # fmt: skip
        if world_size > 1:
            base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        self.processes: list[ForkedProcess | subprocess.Popen[bytes]] = []
        for rank in range(world_size):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            with self._output(rank).open("wb") as output:
                self.processes.append(self._start(base | ranks | env, output, fork))

    def _start(self, env: dict[str, str], output: BinaryIO, fork: bool) -> ForkedProcess | subprocess.Popen[bytes]:
        module, args, cwd = "post_training.train", [str(self.run.root)], self.run.root
        if fork:
            config = self.run.read_config()
            compiler = config["parallel"]["strategy"] != "ddp" or config["training"]["torch_compile"]
            return server(compiler).start(module, args, env, cwd, output)
        command = [sys.executable, "-m", module, *args]
        return subprocess.Popen(command, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)

    def _output(self, rank: int) -> Path:
        return self.run.slurm / f"out-{self.number}-{rank}"

    def output(self) -> str:
        """What the processes printed, rank after rank."""
        return "".join(self._output(r).read_text(errors="replace") for r in range(len(self.processes)))

    def codes(self) -> list[int]:
        """Exit status of each rank, once all have ended."""
        try:
            return [p.wait(timeout=DEADLINE) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs:\n{self.output()[-4000:]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to whatever still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def finish(self, code: int = 0) -> RunDirectory:
        """Wait for the end, which must have this exit status on every rank."""
        assert self.codes() == [code] * len(self.processes), self.output()[-6000:]
        return self.run

    def terminate(self) -> None:
        """SIGTERM to every rank and every process that it started, as SLURM sends it."""
        ranks = [psutil.Process(process.pid) for process in self.processes]
        for process in [*(child for rank in ranks for child in rank.children(recursive=True)), *ranks]:
            process.send_signal(signal.SIGTERM)

    def wait_for_step(self, step: int) -> None:
        """Return once metrics or ledger show that the step was taken, or fail when the processes end before."""

        def taken() -> bool:
            return any(line["step"] >= step for line in [*metrics(self.run), *events(self.run, "checkpoint_saved")])

        self.wait_until(taken, f"step {step}")

    def stop_at(self, step: int, ask: Callable[[], object]) -> None:
        """Let steps pass, and `ask` while rank 0 is held at the end of `step`: the run was made with `hold`."""
        for passed in range(self.first_step, step + 1):
            writer = self._at_gate()
            if passed == step:
                regular = self.run.slurm / "no_stop"
                regular.write_text("0\n")
                regular.replace(self.run.stop_request)
                ask()
            with contextlib.suppress(BrokenPipeError):  # `ask` killed it
                os.write(writer, b"0\n")
            os.close(writer)
            if passed < step:
                self.wait_for_step(passed)  # logged after the look at the gate: nobody reads there any more

    def _at_gate(self) -> int:
        """The pipe's other end, once rank 0 has opened it to read."""
        found: list[int] = []

        def opened() -> bool:
            try:
                found.append(os.open(self.run.stop_request, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            return bool(found)

        self.wait_until(opened, "a step")
        return found[0]

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Return once it happened; woken by the end of a process, looking again every few milliseconds."""
        end = time.monotonic() + DEADLINE
        descriptors = [os.pidfd_open(p.pid) for p in self.processes if p.poll() is None]
        try:
            with selectors.DefaultSelector() as selector:
                for descriptor in descriptors:
                    selector.register(descriptor, selectors.EVENT_READ)
                while not happened():
                    if selector.select(timeout=0.005) and not happened():
                        raise AssertionError(f"ended before {what}:\n{self.output()[-4000:]}")
                    if time.monotonic() > end:
                        self.kill()
                        raise AssertionError(f"no {what}:\n{self.output()[-4000:]}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    if not run.metrics.exists():
        return []
    text = run.metrics.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def events(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    """The ledger's events of one name."""
    return [e for e in ledger.read(run.ledger) if e["event"] == name]


def weights(run: RunDirectory) -> str:
    """sha256 of the output's weights."""
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()
