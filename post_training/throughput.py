"""How fast training is: real tokens a second on each GPU, and how much of the GPU's arithmetic that is (MFU).

Tokens are counted from each batch as the model gets it, padding left out, and added up between two log lines. Time is
that of the steps between them: generation and scoring belong to a step, saving and evaluation do not. Both begin anew
with each attempt, so the first line after a resume is about what was done since.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 and float16 operations a second, by a part of the GPU's name: NVIDIA's data sheets."""


def row_lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """Tokens of each row that the trained model sees, padding left out: [rows]; None for a batch of unknown form.

    Rows that are packed into one, as `position_ids` show, count one by one. In kto the answers that only serve its KL
    term are not trained on, and not counted.
    """
    if "prompt_mask" in batch and "completion_mask" in batch:  # grpo
        return batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1)
    if "chosen_attention_mask" in batch:  # orpo
        return torch.cat([batch[f"{side}_attention_mask"].sum(1) for side in ("chosen", "rejected")])
    if "position_ids" in batch:
        positions = batch["position_ids"].flatten()
        starts = (positions == 0).nonzero().flatten()
        return torch.diff(starts, append=starts.new_tensor([positions.numel()]))
    return None


def training_flops(model: nn.Module, tokens: float, pairs: float) -> float:
    """Operations of forward and backward passes over rows of `tokens` in all; pairs: sum of their squared lengths.

    PaLM (Chowdhery 2022), appendix B: 6 N + 12 L H Q T a token, for N parameters, L layers, H heads of width Q and
    rows of T tokens. 4 N + 2 N' where only N' parameters are trained, since the frozen ones get no gradients. N leaves
    out an embedding that is only looked up in. Computing activations again, generation, and the forward passes of
    reference and reward models are not counted: MFU is about the trained model's passes.
    """
    policy: Any = getattr(model, "policy", model)  # ppo holds it beside its value head
    looked_up = policy.get_input_embeddings().weight
    head = policy.get_output_embeddings() if hasattr(policy, "get_output_embeddings") else None
    tied = head is not None and head.weight is looked_up
    multiplied = [p for p in model.parameters() if p is not looked_up or tied]
    n = sum(map(_numel, multiplied))
    trained = sum(_numel(p) for p in multiplied if p.requires_grad)
    config = policy.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * width
    return (4 * n + 2 * trained) * tokens + attention * pairs


def _numel(parameter: Tensor) -> int:
    """Numbers in a parameter: under ZeRO-3 a rank holds a part of it, and 4-bit weights are two in a byte."""
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    return 2 * size if type(parameter).__name__ == "Params4bit" else size


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a GPU of this name can do at most; None where that is not known, as on a CPU."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device), None)


class Meter(TrainerCallback):
    """Counts tokens and time of one attempt between its log lines."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None
        self._counts: Tensor | None = None  # tokens, squared lengths, generated tokens; on the model's device

    def count(self, batch: Mapping[str, Any]) -> None:
        """A batch that is being trained on. Waits for no device."""
        lengths = row_lengths(batch)
        if lengths is not None:
            lengths = lengths.double()
            self._add(torch.stack([lengths.sum(), (lengths * lengths).sum(), torch.zeros_like(lengths.sum())]))

    def generated(self, mask: Tensor) -> None:
        """Tokens that were sampled: ones in `mask`."""
        total = mask.sum().double()
        self._add(torch.stack([torch.zeros_like(total), torch.zeros_like(total), total]))

    def _add(self, counts: Tensor) -> None:
        self._counts = counts if self._counts is None else self._counts + counts

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self.seconds += now - self._began
        self._began = now

    def interrupt(self) -> None:
        """Something that is no step took time: the clock goes on with the next step."""
        self._began = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interrupt()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interrupt()

    def figures(self, trainer: Trainer) -> dict[str, float]:
        """Figures since the last ones, of all ranks together: every rank asks. None where nothing was counted."""
        if self._counts is None or not self.seconds:
            return {}
        counts, seconds = self._counts, self.seconds
        self._counts, self.seconds = None, 0.0
        if trainer.args.world_size > 1:
            counts = trainer.accelerator.reduce(counts, reduction="sum")
        tokens, pairs, generated = counts.tolist()
        each = seconds * trainer.args.world_size
        found = {"tokens_per_second_per_gpu": tokens / each}
        if generated:
            found["generated_tokens_per_second_per_gpu"] = generated / each
        device = torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu"
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32
        peak = peak_flops(device, dtype)
        if peak is not None:
            found["mfu"] = training_flops(trainer.model, tokens, pairs) / each / peak
        return {name: float(f"{value:.4g}") for name, value in found.items()}
