"""rm: a Bradley-Terry reward model, a scalar head on the start model's trunk."""

from __future__ import annotations

from transformers import Trainer
from trl import RewardConfig, RewardTrainer

from post_training import data
from post_training.stages.common import Stage, held_out, load_reward_model, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class RmTrainer(ExactResume, RewardTrainer):
    """TRL's RewardTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Training on preference pairs: -log sigmoid(r(chosen) - r(rejected))."""
    cfg = stage.cfg
    assert stage.model_path is not None
    source = data.load(cfg.data)
    args = RewardConfig(
        **trainer_arguments(stage, cfg.rm.lr),
        center_rewards_coefficient=cfg.rm.center_rewards_coefficient,
        max_length=cfg.training.max_length,
    )
    return RmTrainer(
        model=without_dropout(load_reward_model(cfg, stage.model_path, stage.tokenizer)),
        args=args,
        train_dataset=source.preferences("train"),
        eval_dataset=held_out(stage, source.preferences("held_out")),
        processing_class=stage.tokenizer,
    )
