"""orpo: odds-ratio preference optimisation (Hong 2024), which needs no reference."""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from post_training import data
from post_training.adapters import lora_config
from post_training.stages.common import Stage, held_out, load_causal_lm, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class OrpoTrainer(ExactResume, ORPOTrainer):
    """TRL's ORPOTrainer, resumed exactly, without pairs whose prompt fills max_length: their loss would be NaN."""

    train_dataset: Dataset
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_dataset = with_answers(self.train_dataset)
        if self.eval_dataset is not None:
            self.eval_dataset = with_answers(self.eval_dataset)


def with_answers(rows: Dataset) -> Dataset:
    """Tokenised pairs of which both answers have a token to be trained."""
    labels = zip(rows["chosen_labels"], rows["rejected_labels"], strict=True)
    kept = [i for i, both in enumerate(labels) if all(any(label != -100 for label in one) for one in both)]
    if len(kept) == len(rows):
        return rows
    print(f"orpo: {len(rows) - len(kept)} pairs left out: the prompt fills training.max_length", file=sys.stderr)
    return rows.select(kept)


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
    model = without_dropout(load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True))
    return OrpoTrainer(
        model=model,
        args=args,
        train_dataset=source.preferences("train"),
        eval_dataset=held_out(stage, source.preferences("held_out")),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
