"""dpo: direct preference optimisation against a frozen reference."""

from __future__ import annotations

from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from conf.schema import Config
from post_training.adapters import lora_config
from post_training.data.prepared import Preparation, Prepared, train_rows
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class DpoTrainer(ExactResume, Prepared, DPOTrainer):
    """TRL's DPOTrainer, resumed exactly."""


def preparation(cfg: Config) -> Preparation:
    """Prompt and both answers of each pair; pairs whose prompt fills max_length are left out."""
    return Preparation("preferences", DPOTrainer, DPOConfig, {"max_length": cfg.training.max_length})


def build_trainer(stage: Stage) -> Trainer:
    """The reference is always loaded from its own path, so that a resumed attempt keeps it."""
    cfg = stage.cfg
    assert stage.model_path is not None
    how = preparation(cfg)
    args = DPOConfig(
        **trainer_arguments(stage, cfg.dpo.lr),
        beta=cfg.dpo.beta,
        loss_type=[cfg.dpo.loss_type],
        **how.arguments,
    )
    rows = train_rows(cfg, stage.tokenizer, how, args, stage.output_base)
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return DpoTrainer(
        model=model,
        ref_model=load_causal_lm(cfg, stage.reference_path or stage.model_path, stage.tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
