"""sft: supervised fine-tuning on demonstrations; loss on assistant tokens only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer

from conf.schema import Config, Sft
from post_training import data
from post_training.adapters import lora_config
from post_training.data.prepared import Preparation, Prepared, train_rows
from post_training.data.templates import require_masks
from post_training.stages.common import Stage, load_causal_lm, samples_per_row, steps_for_samples, trainer_arguments
from post_training.stages.exact import ExactResume
from post_training.stages.sample import read_samples

if TYPE_CHECKING:
    from datasets import Dataset


def divergence(logits: torch.Tensor, start_logits: torch.Tensor) -> torch.Tensor:
    """KL(model || start model) in nats at each position, over the whole vocabulary.

    logits: (positions, vocabulary) each. KL = sum_v p(v) (log p(v) - log q(v)).
    """
    log_p, log_q = logits.float().log_softmax(-1), start_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class SftTrainer(ExactResume, Prepared, SFTTrainer):
    """TRL's SFTTrainer, resumed exactly, with an optional KL to the start model.

    With `kl_coef` the loss of a trained token is its own (nll or dft) + kl_coef * KL(model || start model) there. It
    needs whole rows of logits, which TRL's fused head does not build: `compute_loss` is our own then.
    """

    def __init__(self, *args: Any, kl_coef: float = 0.0, start_model: PreTrainedModel | None = None, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.kl_coef, self.start_model = kl_coef, start_model
        if start_model is not None:
            start_model.requires_grad_(False)
            if self.is_deepspeed_enabled:
                from trl.models import prepare_deepspeed

                self.start_model = prepare_deepspeed(start_model, self.accelerator)
            elif self.is_fsdp_enabled:
                from trl.models import prepare_fsdp

                self.start_model = prepare_fsdp(start_model, self.accelerator)
            else:
                self.start_model = self.accelerator.prepare_model(start_model, evaluation_mode=True)
            self.start_model.eval()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.kl_coef:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.meter.count(inputs)
        labels = inputs["labels"][:, 1:]
        seen = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        trained = labels != -100
        with torch.no_grad(), self._start_of(model) as start:
            start_logits = start(**seen).logits[:, :-1][trained]
        outputs = model(**seen)
        logits = outputs.logits[:, :-1][trained].float()
        log_probs = logits.log_softmax(-1)
        taken = log_probs.gather(-1, labels[trained][:, None])[:, 0]
        losses = -taken * taken.exp().detach() if self.args.loss_type == "dft" else -taken
        kl = divergence(logits, start_logits)
        count = trained.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses + self.kl_coef * kl).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks, and count is of all of them
        self._keep_metrics(seen, log_probs.detach(), logits.argmax(-1) == labels[trained], kl.detach())
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _start_of(self, model: Any) -> Iterator[Any]:
        """The start model: the frozen copy, or under LoRA the same weights without adapters, and without dropout."""
        if self.start_model is not None:
            yield self.start_model
            return
        was_training = model.training
        model.eval()
        with self.accelerator.unwrap_model(model).disable_adapter():
            yield model
        model.train(was_training)

    def _keep_metrics(
        self, seen: dict[str, Any], log_probs: torch.Tensor, right: torch.Tensor, kl: torch.Tensor
    ) -> None:
        """What TRL's compute_loss logs, and the KL: means over trained tokens of all ranks."""
        entropy = -(log_probs.exp() * log_probs).sum()
        tokens = seen["attention_mask"].sum() if "attention_mask" in seen else seen["position_ids"].numel()
        counts = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=kl.device)
                              for x in (len(kl), entropy, right.sum(), kl.sum(), tokens)])  # fmt: skip
        total, entropies, rights, kls, all_tokens = self.accelerator.reduce(counts, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in (("entropy", entropies), ("mean_token_accuracy", rights), ("kl", kls)):
            metrics[name].append(value / max(total, 1))
        self._total_train_tokens += round(all_tokens)
        metrics["num_tokens"] = [self._total_train_tokens]


def preparation(cfg: Config) -> Preparation:
    """Conversations, of which what the assistant says is trained."""
    return preparation_as(cfg, cfg.sft)


def preparation_as(cfg: Config, how: Sft) -> Preparation:
    """The same for sft's relatives."""
    arguments = {"assistant_only_loss": True, "packing": how.packing, "max_length": cfg.training.max_length}
    return Preparation("demonstrations", SFTTrainer, SFTConfig, arguments, tuple(how.random_templates))


def build_trainer(stage: Stage) -> Trainer:
    """Training with masks from the chat template's `{% generation %}` marks, or on what a sample stage kept.

    Raises DataError for a template that cannot mask: it would train on the user's words as well.
    """
    return build(stage, stage.cfg.sft, lambda: demonstrations(stage))


def demonstrations(stage: Stage) -> Dataset:
    """{"messages"}: of the data set, or what a sample stage kept."""
    if stage.data_path is not None:
        return read_samples(stage.data_path)
    return data.load(stage.cfg.data).demonstrations("train")


def build(stage: Stage, how: Sft, records: Callable[[], Dataset]) -> Trainer:
    """The trainer of sft and of its relatives. Raises DataError as `build_trainer` says.

    records: gives {"messages"}; asked only where the rows are not prepared yet.
    """
    cfg = stage.cfg
    assert stage.model_path is not None
    source = replace(preparation_as(cfg, how), records=records)
    if cfg.stage != "sft" or stage.data_path is not None:  # rows that no data set gives as they are
        source = replace(source, origin=[cfg.stage, stage.data_path, str(Path(__file__).parent.parent)])
    require_masks(stage.tokenizer)
    args = SFTConfig(
        **trainer_arguments(stage, how.lr),
        **source.arguments,
        loss_type=how.loss_type,
        neftune_noise_alpha=how.neftune_noise_alpha,
    )
    rows = train_rows(cfg, stage.tokenizer, source, args, stage.output_base)
    args.assistant_only_loss = False  # the rows' labels say what is trained; TRL would look for messages
    model = load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True)
    adapters = lora_config(stage, model)
    copied = how.kl_coef and adapters is None  # with adapters, the start model is this one without them
    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=stage.tokenizer,
        peft_config=adapters,
        kl_coef=how.kl_coef,
        start_model=load_causal_lm(cfg, stage.model_path, stage.tokenizer) if copied else None,
    )
    if how.packing and cfg.training.num_training_samples is not None:
        args.max_steps = steps_for_samples(cfg, samples_per_row(trainer.train_dataset))
    return trainer
