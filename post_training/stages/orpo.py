"""orpo: odds-ratio preference optimisation (Hong 2024), which needs no reference."""

from __future__ import annotations

import sys

from transformers import Trainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from post_training import data
from post_training.adapters import lora_config
from post_training.data.source import DataError
from post_training.stages.common import Stage, held_out, load_causal_lm, that_fit, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class OrpoTrainer(ExactResume, ORPOTrainer):
    """TRL's ORPOTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Training on preference pairs: the loss on the chosen answer, and `orpo.beta` times the log odds ratio's."""
    cfg = stage.cfg
    assert stage.model_path is not None
    source = data.load(cfg.data)
    args = ORPOConfig(
        **trainer_arguments(stage, cfg.orpo.lr),
        beta=cfg.orpo.beta,
        max_length=cfg.training.max_length,
        remove_unused_columns=False,  # its collator picks its columns itself
    )
    pairs = source.preferences("train")
    rows = that_fit(stage, pairs)
    if len(rows) < len(pairs):
        why = f"leaves out {len(pairs) - len(rows)} of {len(pairs)} pairs, whose prompt alone fills it"
        if not len(rows):
            raise DataError(f"training.max_length={cfg.training.max_length}: {why}\n  fix: a longer one")
        print(f"orpo: training.max_length {why}", file=sys.stderr)
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return OrpoTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out(stage, source.preferences("held_out")),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
