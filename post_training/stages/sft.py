"""sft: supervised fine-tuning on demonstrations; loss on assistant tokens only."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from post_training import data
from post_training.data.source import DataError
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments
from post_training.stages.exact import ExactResume


class SftTrainer(ExactResume, SFTTrainer):
    """TRL's SFTTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Training with masks from the chat template's `{% generation %}` marks.

    Raises DataError for a template without marks: it would train on the user's words as well.
    """
    cfg = stage.cfg
    assert stage.model_path is not None
    if "{% generation %}" not in (stage.tokenizer.chat_template or ""):
        raise DataError(
            "model.chat_template: has no {% generation %} marks, so assistant tokens cannot be told from the user's\n"
            "  fix: model.chat_template=think_answer, or a Jinja file with marks"
        )
    args = SFTConfig(
        **trainer_arguments(stage, cfg.sft.lr),
        assistant_only_loss=True,
        packing=cfg.sft.packing,
        max_length=cfg.training.max_length,
    )
    return SftTrainer(
        model=load_causal_lm(cfg, stage.model_path, stage.tokenizer),
        args=args,
        train_dataset=data.load(cfg.data).demonstrations("train"),
        processing_class=stage.tokenizer,
    )
