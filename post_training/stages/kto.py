"""kto: Kahneman-Tversky optimisation (Ethayarajh 2024) on single answers, each marked good or bad."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import KTOConfig, KTOTrainer

from post_training import data
from post_training.adapters import lora_config
from post_training.stages.common import Stage, held_out, load_causal_lm, trainer_arguments, with_room, without_dropout
from post_training.stages.dpo import ReferenceOnce, reference


class KtoTrainer(ReferenceOnce, KTOTrainer):
    """TRL's KTOTrainer, resumed exactly; judged on pairs of answers to one prompt, of which TRL knows nothing."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A batch of `blocks_of_pairs`: its first half are the good answers to the second half's prompts."""
        outputs = super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        known = inputs["ref_logps"] if self.precompute_ref_logps else None
        frozen = self.compute_ref_log_probs(self.ref_model or model, inputs)[0] if known is None else known
        reference, self.ref_model = self.ref_model, model  # without one, an adapter would be left out
        try:
            policy, _ = self.compute_ref_log_probs(model, inputs)
        finally:
            self.ref_model = reference
        good, bad = (self.beta * (policy - frozen)).chunk(2)
        right = self.accelerator.gather((good > bad).float())
        self._metrics["eval"]["rewards/accuracies"].append(right.mean().item())
        return outputs


def blocks_of_pairs(pairs: Dataset, half: int) -> Dataset:
    """Rows of kto from preference pairs: `half` good answers, then the bad ones to the same prompts, and so on."""
    rows = []
    for start in range(0, len(pairs) // half * half, half):
        block = list(pairs.select(range(start, start + half)))
        for side, label in (("chosen", True), ("rejected", False)):
            rows += [{"prompt": pair["prompt"], "completion": pair[side], "label": label} for pair in block]
    return Dataset.from_list(rows)


def build_trainer(stage: Stage) -> Trainer:
    """Every pass goes over the rows in one order, which the data's seed has shuffled.

    The KL term compares each prompt with its neighbour's answer within a batch, and TRL pairs them up beforehand.
    """
    cfg = stage.cfg
    assert stage.model_path is not None
    args = KTOConfig(
        **trainer_arguments(stage, cfg.kto.lr),
        beta=cfg.kto.beta,
        loss_type=cfg.kto.loss_type,
        desirable_weight=cfg.kto.desirable_weight,
        undesirable_weight=cfg.kto.undesirable_weight,
        precompute_ref_log_probs=cfg.kto.precompute_ref_log_probs,
        max_length=cfg.training.max_length,
    )
    args.per_device_eval_batch_size -= args.per_device_eval_batch_size % 2  # pairs stay together
    source = data.load(cfg.data)
    rows = with_room(stage, source.unpaired("train"))
    pairs = held_out(stage, source.preferences("held_out"))
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return KtoTrainer(
        model=model,
        ref_model=reference(stage, cfg.kto.precompute_ref_log_probs),
        args=args,
        train_dataset=rows,
        eval_dataset=None if pairs is None else blocks_of_pairs(pairs, args.per_device_eval_batch_size // 2),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
        reference_folder=stage.run.reference_log_probs,
    )
