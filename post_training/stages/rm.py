"""rm: a Bradley-Terry reward model, a scalar head on the start model's trunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from post_training import data
from post_training.stages.common import Stage, load_reward_model, trainer_arguments

if TYPE_CHECKING:
    from transformers import Trainer


def build_trainer(stage: Stage) -> Trainer:
    """TRL's RewardTrainer on preference pairs: -log sigmoid(r(chosen) - r(rejected))."""
    from trl import RewardConfig, RewardTrainer

    cfg = stage.cfg
    assert stage.model_path is not None
    args = RewardConfig(
        **trainer_arguments(stage, cfg.rm.lr),
        center_rewards_coefficient=cfg.rm.center_rewards_coefficient,
        max_length=cfg.training.max_length,
    )
    return RewardTrainer(
        model=load_reward_model(cfg, stage.model_path, stage.tokenizer),
        args=args,
        train_dataset=data.load(cfg.data).preferences("train"),
        processing_class=stage.tokenizer,
    )
