"""base: a causal language model trained from scratch on documents, one document a row."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from post_training import data
from post_training.stages.common import Stage, build_model, load_causal_lm, trainer_arguments
from post_training.stages.exact import ExactResume


class BaseTrainer(ExactResume, SFTTrainer):
    """TRL's SFTTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Training on plain text: every token is trained, the end of the document included."""
    cfg = stage.cfg
    args = SFTConfig(
        **trainer_arguments(stage, cfg.base.lr), dataset_text_field="text", max_length=cfg.training.max_length
    )
    model = (
        load_causal_lm(cfg, stage.model_path, stage.tokenizer)
        if stage.model_path
        else build_model(cfg, stage.tokenizer)
    )
    return BaseTrainer(
        model=model,
        args=args,
        train_dataset=data.load(cfg.data).documents("train"),
        processing_class=stage.tokenizer,
    )
