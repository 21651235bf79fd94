"""sft: supervised fine-tuning on demonstrations; loss on assistant tokens only."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from conf.schema import Config
from post_training.data.prepared import Preparation, Prepared, train_rows
from post_training.data.templates import require_masks
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments
from post_training.stages.exact import ExactResume


class SftTrainer(ExactResume, Prepared, SFTTrainer):
    """TRL's SFTTrainer, resumed exactly."""


def preparation(cfg: Config) -> Preparation:
    """Conversations, of which what the assistant says is trained."""
    arguments = {
        "assistant_only_loss": True,
        "packing": cfg.sft.packing,
        "max_length": cfg.training.max_length,
    }
    return Preparation("demonstrations", SFTTrainer, SFTConfig, arguments)


def build_trainer(stage: Stage) -> Trainer:
    """Training with masks from the chat template's `{% generation %}` marks.

    Raises DataError for a template that cannot mask: it would train on the user's words as well.
    """
    cfg = stage.cfg
    assert stage.model_path is not None
    require_masks(stage.tokenizer)
    how = preparation(cfg)
    args = SFTConfig(**trainer_arguments(stage, cfg.sft.lr), **how.arguments)
    rows = train_rows(cfg, stage.tokenizer, how, args, stage.output_base)
    args.assistant_only_loss = False  # the rows' labels say what is trained; TRL would look for messages
    return SftTrainer(
        model=load_causal_lm(cfg, stage.model_path, stage.tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=stage.tokenizer,
    )
