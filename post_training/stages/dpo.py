"""dpo: direct preference optimisation against a frozen reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer

from conf.check import dpo_losses
from conf.schema import Config
from post_training import data
from post_training.adapters import lora_config
from post_training.data.prepared import Preparation, Prepared, train_rows
from post_training.stages.common import Stage, held_out, load_causal_lm, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class ReferenceOnce(ExactResume):
    """To be mixed in before TRL's DPOTrainer and KTOTrainer: what the reference says may be worked out beforehand.

    TRL keeps it in a temporary folder of each rank's own, where other ranks and later attempts do not find it. Here
    it is a file of the run, so that every attempt trains on the very same numbers.
    """

    ref_model: Any

    def __init__(self, *args: Any, reference_folder: Path, **kwargs: Any) -> None:
        self.reference_folder = reference_folder
        super().__init__(*args, **kwargs)
        if self.args.precompute_ref_log_probs and self.ref_model is not None:
            self.accelerator._models = [m for m in self.accelerator._models if m is not self.ref_model]
            self.ref_model = None  # it has said all that it is asked for

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        file = self.reference_folder / f"{name}-{len(dataset)}.arrow"  # held-out rows are fewer on more ranks
        if self.accelerator.is_main_process:
            self.reference_folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        dataset = dataset.flatten_indices()  # or it would be done beside the file, by every attempt
        dataset._get_cache_file_path = lambda fingerprint: str(file)
        with_reference = super()._precompute_ref_logps(dataset, name, batch_size)
        self.accelerator.wait_for_everyone()
        return with_reference


class DpoTrainer(ReferenceOnce, Prepared, DPOTrainer):
    """TRL's DPOTrainer, resumed exactly."""


def reference(stage: Stage, precomputed: bool) -> PreTrainedModel | None:
    """The frozen reference, loaded from its own path, so that a resumed attempt keeps it.

    None where that is the start model: asked beforehand, before its first step; or under LoRA without its adapters.
    """
    assert stage.model_path is not None
    path = stage.reference_path or stage.model_path
    if path == stage.model_path and (precomputed or stage.cfg.lora.r is not None):
        return None
    return without_dropout(load_causal_lm(stage.cfg, path, stage.tokenizer))


def preparation(cfg: Config) -> Preparation:
    """Prompt and both answers of each pair; pairs whose prompt fills max_length are left out."""
    return Preparation("preferences", DPOTrainer, DPOConfig, {"max_length": cfg.training.max_length})


def build_trainer(stage: Stage) -> Trainer:
    """One loss of TRL's, or several with their weights."""
    cfg = stage.cfg
    assert stage.model_path is not None
    how = preparation(cfg)
    args = DPOConfig(
        **trainer_arguments(stage, cfg.dpo.lr),
        beta=cfg.dpo.beta,
        loss_type=dpo_losses(cfg),
        loss_weights=cfg.dpo.loss_weights,
        label_smoothing=cfg.dpo.label_smoothing,
        precompute_ref_log_probs=cfg.dpo.precompute_ref_log_probs,
        **how.arguments,
    )
    rows = train_rows(cfg, stage.tokenizer, how, args, stage.output_base)
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return DpoTrainer(
        model=model,
        ref_model=reference(stage, cfg.dpo.precompute_ref_log_probs),
        args=args,
        train_dataset=rows,
        eval_dataset=held_out(stage, data.load(cfg.data).preferences("held_out")),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
        reference_folder=stage.run.reference_log_probs,
    )
