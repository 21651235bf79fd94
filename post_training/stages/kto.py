"""kto: Kahneman-Tversky optimisation (Ethayarajh 2024) on single answers, each marked good or bad."""

from __future__ import annotations

from transformers import Trainer
from trl import KTOConfig, KTOTrainer

from post_training import data
from post_training.adapters import lora_config
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class KtoTrainer(ExactResume, KTOTrainer):
    """TRL's KTOTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Every pass goes over the rows in one order, which the data's seed has shuffled.

    The KL term compares each prompt with its neighbour's answer within a batch, and TRL pairs them up beforehand.
    """
    cfg = stage.cfg
    assert stage.model_path is not None
    args = KTOConfig(
        **trainer_arguments(stage, cfg.kto.lr),
        beta=cfg.kto.beta,
        desirable_weight=cfg.kto.desirable_weight,
        undesirable_weight=cfg.kto.undesirable_weight,
        max_length=cfg.training.max_length,
    )
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return KtoTrainer(
        model=model,
        ref_model=load_causal_lm(cfg, stage.reference_path or stage.model_path, stage.tokenizer),
        args=args,
        train_dataset=data.load(cfg.data).unpaired("train"),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
