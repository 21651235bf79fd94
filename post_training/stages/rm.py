"""rm: a Bradley-Terry reward model, a scalar head on the start model's trunk."""

from __future__ import annotations

from transformers import Trainer
from trl import RewardConfig, RewardTrainer

from conf.schema import Config
from post_training.adapters import lora_config
from post_training.data.prepared import Preparation, Prepared, train_rows
from post_training.stages.common import Stage, load_reward_model, trainer_arguments, without_dropout
from post_training.stages.exact import ExactResume


class RmTrainer(ExactResume, Prepared, RewardTrainer):
    """TRL's RewardTrainer, resumed exactly."""


def preparation(cfg: Config) -> Preparation:
    """Both texts of each pair, each with its prompt; pairs with a longer one are left out."""
    return Preparation("preferences", RewardTrainer, RewardConfig, {"max_length": cfg.training.max_length})


def build_trainer(stage: Stage) -> Trainer:
    """Training on preference pairs: -log sigmoid(r(chosen) - r(rejected))."""
    cfg = stage.cfg
    assert stage.model_path is not None
    how = preparation(cfg)
    args = RewardConfig(
        **trainer_arguments(stage, cfg.rm.lr),
        center_rewards_coefficient=cfg.rm.center_rewards_coefficient,
        **how.arguments,
    )
    rows = train_rows(cfg, stage.tokenizer, how, args, stage.output_base)
    model = without_dropout(load_reward_model(cfg, stage.model_path, stage.tokenizer, trained=True))
    return RmTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model, "SEQ_CLS"),
    )
