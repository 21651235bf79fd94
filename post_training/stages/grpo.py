"""grpo: group-relative policy optimisation with verifiable rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from post_training import data
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments

if TYPE_CHECKING:
    from transformers import Trainer


def build_trainer(stage: Stage) -> Trainer:
    """TRL's GRPOTrainer. One generation serves one optimizer step: its whole effective batch at once."""
    from trl import GRPOConfig, GRPOTrainer

    cfg = stage.cfg
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.grpo.reward)
    args = GRPOConfig(
        **trainer_arguments(stage, cfg.grpo.lr),
        num_generations=cfg.grpo.num_generations,
        max_completion_length=cfg.grpo.max_completion_length,
        temperature=cfg.grpo.temperature,
        beta=cfg.grpo.beta,
        loss_type=cfg.grpo.loss_type,
        reward_weights=weights,
    )
    return GRPOTrainer(
        model=load_causal_lm(cfg, stage.model_path, stage.tokenizer),
        reward_funcs=functions,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=stage.tokenizer,
    )
