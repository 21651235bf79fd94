"""base: a causal language model trained from scratch on documents, one document a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from post_training import data
from post_training.stages.common import Stage, build_model, load_causal_lm, trainer_arguments

if TYPE_CHECKING:
    from transformers import Trainer


def build_trainer(stage: Stage) -> Trainer:
    """TRL's SFTTrainer on plain text: every token is trained, the end of the document included."""
    from trl import SFTConfig, SFTTrainer

    cfg = stage.cfg
    model = (
        load_causal_lm(cfg, stage.model_path, stage.tokenizer)
        if stage.model_path
        else build_model(cfg, stage.tokenizer)
    )
    args = SFTConfig(
        **trainer_arguments(stage, cfg.base.lr), dataset_text_field="text", max_length=cfg.training.max_length
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=data.load(cfg.data).documents("train"),
        processing_class=stage.tokenizer,
    )
