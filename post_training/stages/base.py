"""base: a causal language model trained from scratch on documents."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from conf.schema import Config
from post_training.data.prepared import Preparation, Prepared, records_of, train_rows
from post_training.stages.common import Stage, build_model, load_causal_lm, steps_for_samples, trainer_arguments
from post_training.stages.exact import ExactResume


class BaseTrainer(ExactResume, Prepared, SFTTrainer):
    """TRL's SFTTrainer, resumed exactly."""


def preparation(cfg: Config) -> Preparation:
    """Documents, the end token behind each: one a row, or wrapped."""
    arguments = {
        "dataset_text_field": "text",
        "max_length": cfg.training.max_length,
        "packing": cfg.base.packing == "wrapped",
        "packing_strategy": "wrapped",
    }
    return Preparation("documents", SFTTrainer, SFTConfig, arguments)


def build_trainer(stage: Stage) -> Trainer:
    """Training on plain text: every token is trained, the end of the document included.

    base.packing=wrapped: documents follow each other across rows, each of which is max_length tokens but for the last.
    """
    cfg = stage.cfg
    how = preparation(cfg)
    args = SFTConfig(**trainer_arguments(stage, cfg.base.lr), **how.arguments)
    rows = train_rows(cfg, stage.tokenizer, how, args, stage.output_base)
    model = (
        load_causal_lm(cfg, stage.model_path, stage.tokenizer)
        if stage.model_path
        else build_model(cfg, stage.tokenizer)
    )
    trainer = BaseTrainer(model=model, args=args, train_dataset=rows, processing_class=stage.tokenizer)
    if cfg.base.packing == "wrapped" and cfg.training.num_training_samples is not None:
        args.max_steps = steps_for_samples(cfg, records_of(rows) / len(rows))
    return trainer
