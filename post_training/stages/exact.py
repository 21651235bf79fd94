"""Exact resume: what transformers.Trainer leaves out of a checkpoint, saved beside the rest by every rank.

The Trainer saves weights, optimizer, learning-rate schedule and random states. It leaves out what was summed up
since the last log line, so that the first line after a stop would be the mean of fewer steps, and what a trainer
of its own kind is working on.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from post_training.stages.zero import fsdp_on_cpu
from post_training.throughput import Meter

logger = logging.getLogger(__name__)

LOSS_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
"""The Trainer's own: summed loss of the steps since the last log line, of all steps before, and that line's step."""

METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")
"""TRL's and PPO's: values since the last log line, by name, and the tokens seen."""


class ExactResume(Trainer):
    """To be mixed in before a trainer, as in `class Exact(ExactResume, SFTTrainer)`."""

    _loss_sums: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is not None and not hasattr(head, "bias"):
            head.bias = None  # TRL's fused head reads it; peft's wrapper of a head with trained tokens lacks it

    @cached_property
    def meter(self) -> Meter:
        """Tokens and time between log lines; to be added as a callback."""
        return Meter()

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.meter.count(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def rank_state(self) -> dict[str, Any]:
        """This rank's state beyond the Trainer's: numbers, tensors, lists and dictionaries of them."""
        return {name: _plain(getattr(self, name)) for name in (*LOSS_SUMS, *METRICS) if hasattr(self, name)}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Take up the state that `rank_state` gave. The optimizer is loaded by then, the first step not taken."""
        self._loss_sums = {name: state[name] for name in LOSS_SUMS}
        for name in METRICS:
            if hasattr(self, name):
                setattr(self, name, _merged(getattr(self, name), state[name]))

    # -- the Trainer's hooks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without the Trainer's summary at the end of a training that was stopped before its end."""
        if "loss" in logs:
            logs = logs | self.meter.figures(self)
        if "train_runtime" not in logs or self.state.global_step >= self.state.max_steps:
            super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {"world_size": self.args.world_size, **self.rank_state()}
        torch.save(state, state_file(folder, self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """With each weight in its own type again: peft reads adapters, which QLoRA trains in bfloat16, as float32."""
        loaded = model if model is not None else self.model
        types = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in loaded.named_parameters():
            parameter.data = parameter.data.to(types[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called on resume, after `self.state` has been read."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = state_file(checkpoint, self.args.process_index)
        if not path.exists() and self.args.process_index > 0:  # more ranks than there were
            path = state_file(checkpoint, 0)
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        if state["world_size"] != self.args.world_size:
            logger.warning("resumed on %d ranks, saved on %d: not exact", self.args.world_size, state["world_size"])
        self.restore_rank_state(state)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Its workers outlive the SIGTERM that SLURM sends to every process of a job that it preempts: the trainer
        asks them for the rest of the step that it stops after, and a worker that dies takes it along."""
        loader = super()._get_dataloader(*args, **kwargs)
        iterated = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell around it
        iterated.worker_init_fn = partial(_outlive_sigterm, iterated.worker_init_fn)
        return loader

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            fsdp_on_cpu(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also whole under FSDP, in the type that the model is computed in; checkpoints hold each rank's part."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            held = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            state_dict = {}
            for name, value in self.model.state_dict().items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if self.args.should_save:
                    state_dict[name] = whole.to("cpu", held if whole.is_floating_point() else None)
            if self.args.should_save:
                self._save(output_dir, state_dict)
                config = Path(output_dir or self.args.output_dir) / "config.json"  # it names the type of the parts
                about = json.loads(config.read_text()) | {"dtype": str(held).removeprefix("torch.")}
                config.write_text(json.dumps(about, indent=2) + "\n")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Each tied weight once: DeepSpeed hands over copies, of which save_pretrained cannot see it."""
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if k not in self.model.all_tied_weights_keys}
        super()._save(output_dir, state_dict)

    def _run_epoch(self, **kwargs: Any) -> None:
        """The Trainer has set its sums to 0 just before the first pass, whether it resumes or not."""
        if self._loss_sums is not None:
            for name, value in self._loss_sums.items():
                setattr(self, name, value)
            self._loss_sums = None
        super()._run_epoch(**kwargs)


def _outlive_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """Runs in each DataLoader worker at its start, before the Trainer's own function for that, if there is one.

    Workers end when their trainer tells them to or is gone, which they look for every few seconds.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


def state_file(checkpoint: str | Path, rank: int) -> Path:
    """Where a rank's state is in a checkpoint."""
    return Path(checkpoint) / f"rank_state_{rank}.pt"


def _plain(value: Any) -> Any:
    """Without defaultdicts, which torch.load(weights_only=True) refuses, and gradients."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def _merged(into: Any, value: Any) -> Any:
    """`value`, in the dictionaries that `into` has, since they may be defaultdicts."""
    if not isinstance(into, dict):
        return value
    for k, v in value.items():
        into[k] = _merged(into[k], v) if isinstance(v, dict) else v
    return into
