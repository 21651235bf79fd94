"""rloo: REINFORCE with a leave-one-out baseline (Ahmadian 2024) and verifiable rewards."""

from __future__ import annotations

from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer

from post_training import data
from post_training.adapters import lora_config
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm
from post_training.stages.grpo import Groups, generate_by_vllm, group_arguments


class RlooTrainer(Groups, RLOOTrainer):
    """TRL's RLOOTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Each completion's baseline is the mean reward of the others of its prompt. The KL is part of the reward."""
    cfg = stage.cfg
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.rloo.reward, stage.run)
    args = RLOOConfig(
        **group_arguments(stage, cfg.rloo),
        normalize_advantages=cfg.rloo.normalize_advantages,
        reward_weights=weights,
    )
    model = load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True)
    trainer = RlooTrainer(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
    generate_by_vllm(stage, trainer)
    return trainer
