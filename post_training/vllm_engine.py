"""vLLM's engine, in this process or in one of its own. Neither opens a port, and neither outlives who started it.

    engine = Engine(folder, settings)       vLLM here: no thread or process of it is left when this one ends
    engine = Engines(folder, settings, 2)   two child processes, on the last two GPUs that this one sees
    engine.load(weights); engine.generate(prompts, sampling, seed)

A child is spoken to through a pipe, and given weights through memory that it shares: nobody else on the node can
reach it, as one could reach vLLM's own server, whose commands for new weights ask for no password. SLURM signals
every process of a job; children ignore what asks a job to save and leave, since the step in work still needs them.
They end when the pipe is closed, and at the latest when the kernel sees their parent gone (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from post_training.adapters import randomness_kept
from post_training.data.source import DataError

Weights = Iterator[tuple[str, torch.Tensor]]
Samples = tuple[list[list[int]], list[list[float]]]
"""Token ids of the completions, and the log-probability that vLLM gave each of them, after temperature."""


class Engine:
    """vLLM in this process. Its weights are random until `load`, so that weights which never arrive are noticed.

    folder: a model's config.json. settings: of vllm.LLM. Raises DataError where vLLM cannot be used.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_cpu = not torch.cuda.is_available()
        threads = torch.set_num_threads, torch.get_num_threads()
        # an engine of before has made a group as well, and is no rank
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized() and "RANK" in os.environ)
        with randomness_kept(), vllm_usable():
            self.llm = self.start(
                model=str(folder),
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",  # after temperature, as the trainer computes them
                # several ranks: each one's engine keeps to the rank's own GPU, within the ranks' process group
                distributed_executor_backend="uni" if alone else "external_launcher",
                enforce_eager=on_cpu,
                max_num_batched_tokens=4096,  # as TRL: at the default it overrates what it needs beside the cache
                disable_log_stats=True,
                **({"kv_cache_memory_bytes": CPU_CACHE} if on_cpu else {}),
                **settings,
            )
        # its end of the process would take apart groups of torch.distributed's that are gone by then
        self.llm.llm_engine.engine_core._finalizer.detach()
        torch.set_num_threads = threads[0]  # vLLM forbids it on CPUs
        torch.set_num_threads(threads[1])

    def start(self, **settings: Any) -> Any:
        """A vllm.LLM."""
        from vllm import LLM

        return LLM(**settings)

    def load(self, weights: Weights) -> None:
        """Take these weights, under the names of transformers. They may be freed or changed once the next is asked."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(_repack_head)
        self.llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], seed: int) -> Samples:
        """A completion of each prompt. sampling: of vllm.SamplingParams, whose stop_token_ids alone end a completion.
        The same seed draws the same ones again, as far as vLLM computes the same probabilities again."""
        from transformers import set_seed
        from vllm import SamplingParams

        with randomness_kept():
            set_seed(seed % 2**32)
            found = self.llm.generate(
                [{"prompt_token_ids": list(p)} for p in prompts],
                SamplingParams(**sampling, ignore_eos=True, logprobs=0, detokenize=False),
                use_tqdm=False,
            )
        ids = [list(f.outputs[0].token_ids) for f in found]
        steps = [f.outputs[0].logprobs for f in found]
        return ids, [[at[i].logprob for i, at in zip(row, s, strict=True)] for row, s in zip(ids, steps, strict=True)]

    def before_each_step(self, call: Callable[[], None]) -> None:
        """Have it called before every step of generation."""
        core = self.llm.llm_engine
        step = core.step

        def called() -> Any:
            call()
            return step()

        core.step = called


def _repack_head(model: Any) -> None:
    """On CPUs vLLM computes with packed copies of weights; a head that is tied to the embedding keeps its old copy."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def write_config(model: Any, folder: Path) -> None:
    """What an engine needs to know of a model: its config, with the vocabulary that it has by now."""
    model.config.architectures = model.config.architectures or [type(model).__name__]
    model.config.save_pretrained(str(folder))


CPU_CACHE = 256 * 1024**2
"""Bytes of KV cache on a CPU."""


@contextlib.contextmanager
def vllm_usable() -> Iterator[None]:
    """Turn the absence of vLLM, or of a part of it, into a message."""
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"backend=vllm: vLLM cannot be used here: {str(error).splitlines()[0]}\n"
            "  fix: pip install '.[vllm]' in the project's folder, or backend=transformers"
        ) from error


class Engines:
    """Engines in child processes, as one. On a machine without GPUs there is one, on its CPU."""

    def __init__(self, folder: Path | str, settings: dict[str, Any], count: int) -> None:
        """Starts them; `wait` until they have."""
        self.memory: mmap.mmap | None = None
        self.memory_fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        gpus: Sequence[str | None] = [None]
        if torch.cuda.is_available():
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = (shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())])[-count:]
        self.children = [self._start(gpu, {"folder": str(folder), "settings": settings}) for gpu in gpus]

    def _start(self, gpu: str | None, request: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Connection]:
        of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {k: v for k, v in os.environ.items() if k not in of_ranks}
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        ours, theirs = Pipe()
        passed = theirs.fileno(), self.memory_fd
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "post_training.vllm_engine", *map(str, passed), str(os.getpid())],
                env=env, pass_fds=passed, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        channel = process, ours
        self._send(channel, request)
        return channel

    def wait(self) -> None:
        """Until all have started. Raises DataError where vLLM cannot be used."""
        for child in self.children:
            self._answer(child)

    def load(self, weights: Weights) -> None:
        """As Engine's: they are copied into the shared memory first, which is as large as the model."""
        if self.memory is None:
            found = [(name, value.cpu()) for name, value in weights]
            os.ftruncate(self.memory_fd, sum(_padded(v.nbytes) for _, v in found))
            self.memory = mmap.mmap(self.memory_fd, 0)
            weights = iter(found)
        tensors, offset = [], 0
        for name, value in weights:
            _view(self.memory, value.dtype, list(value.shape), offset).copy_(value.detach())
            tensors.append((name, str(value.dtype).removeprefix("torch."), list(value.shape), offset))
            offset += _padded(value.nbytes)
        self._ask([{"load": tensors}] * len(self.children))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], seed: int) -> Samples:
        """As Engine's, the prompts shared out evenly."""
        size = -(-len(prompts) // len(self.children))
        parts = [[list(p) for p in prompts[i * size : (i + 1) * size]] for i in range(len(self.children))]
        answers = self._ask(
            [{"prompts": part, "sampling": sampling, "seed": seed + 7919 * i} for i, part in enumerate(parts)]
        )
        return [ids for a in answers for ids in a["ids"]], [row for a in answers for row in a["logprobs"]]

    def close(self) -> None:
        """End them, and wait for it."""
        for process, channel in self.children:
            channel.close()
            process.kill()
            process.wait()

    def _ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        for child, request in zip(self.children, requests, strict=True):
            self._send(child, request)
        return [self._answer(child) for child in self.children]

    def _send(self, child: tuple[subprocess.Popen[bytes], Connection], request: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer, which does not come, says so
            child[1].send_bytes(json.dumps(request).encode())

    def _answer(self, child: tuple[subprocess.Popen[bytes], Connection]) -> dict[str, Any]:
        process, channel = child
        try:
            answer = json.loads(channel.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"vLLM's process ended with status {process.wait()}; what it said is above") from None
        if "unusable" in answer:
            raise DataError(answer["unusable"])
        return answer


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> torch.Tensor:
    count = 1
    for n in shape:
        count *= n
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


# ------------------------------------------------------------------------------------- in the child process


def serve(channel: Connection, memory_fd: int) -> None:
    """Answer one request after the other until the parent closes its end."""

    def answer(value: dict[str, Any]) -> None:
        channel.send_bytes(json.dumps(value).encode())

    start = json.loads(channel.recv_bytes())
    try:
        engine = Engine(start["folder"], start["settings"])
    except DataError as error:
        answer({"unusable": str(error)})
        return
    answer({})
    memory: mmap.mmap | None = None
    while True:
        request = json.loads(channel.recv_bytes())
        if "load" in request:
            memory = memory or mmap.mmap(memory_fd, 0)
            engine.load((n, _view(memory, getattr(torch, d), shape, at)) for n, d, shape, at in request["load"])
            answer({})
        else:
            prompts = request["prompts"]
            ids, logprobs = engine.generate(prompts, request["sampling"], request["seed"]) if prompts else ([], [])
            answer({"ids": ids, "logprobs": logprobs})


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that
        os._exit(1)


def main() -> None:
    channel_fd, memory_fd, parent = map(int, sys.argv[1:])
    end_with(parent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        serve(Connection(channel_fd), memory_fd)


if __name__ == "__main__":
    main()
