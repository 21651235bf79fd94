"""rloo: REINFORCE with a leave-one-out baseline (Ahmadian 2024) and verifiable rewards."""

from __future__ import annotations

from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer

from post_training import data
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments
from post_training.stages.grpo import Groups, generate_by_vllm


class RlooTrainer(Groups, RLOOTrainer):
    """TRL's RLOOTrainer, resumed exactly."""


def build_trainer(stage: Stage) -> Trainer:
    """Each completion's baseline is the mean reward of the others of its prompt. The KL is part of the reward."""
    cfg = stage.cfg
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.rloo.reward, stage.run)
    args = RLOOConfig(
        **trainer_arguments(stage, cfg.rloo.lr),
        num_generations=cfg.rloo.num_generations,
        num_iterations=cfg.rloo.num_iterations,
        steps_per_generation=cfg.rloo.steps_per_generation,
        max_completion_length=cfg.rloo.max_completion_length,
        temperature=cfg.rloo.temperature,
        beta=cfg.rloo.beta,
        epsilon=cfg.rloo.epsilon,
        epsilon_high=cfg.rloo.epsilon_high,
        normalize_advantages=cfg.rloo.normalize_advantages,
        mask_truncated_completions=cfg.rloo.mask_truncated_completions,
        reward_weights=weights,
    )
    trainer = RlooTrainer(
        model=load_causal_lm(cfg, stage.model_path, stage.tokenizer),
        reward_funcs=functions,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=stage.tokenizer,
    )
    generate_by_vllm(stage, trainer)
    return trainer
