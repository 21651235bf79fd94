"""grpo: group-relative policy optimisation with verifiable rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from conf.check import generation
from conf.schema import Grpo, Rloo
from post_training import data
from post_training.adapters import lora_config
from post_training.data.source import DataError
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments
from post_training.stages.exact import ExactResume
from post_training.vllm_engine import vllm_usable


class EpochSampler(RepeatSampler):
    """TRL's RepeatSampler, whose order in each pass over the data is drawn from (seed, epoch) alone.

    TRL's goes on drawing from one generator, which a new process has at its start. `epoch` is asked at the start
    of each pass, and not set through `set_epoch`: accelerate does not hand that on to a sampler inside a
    resumed, sharded loader.
    """

    def __init__(self, *args: Any, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def require_prompts(given: int, at_once: int) -> None:
    """Raise DataError where not even the first generation has all of its prompts."""
    if given < at_once:
        raise DataError(
            f"data: there are {given} prompts, fewer than the {at_once} that one generation asks\n"
            "  fix: more records (data.path, data.num_prompts), or a smaller training.effective_batch_size"
        )


class Groups(ExactResume):
    """To be mixed in before TRL's GRPOTrainer and RLOOTrainer, which sample groups of completions of one prompt.

    They are resumed exactly, also past the first epoch and while a generation is in use; and what a group's rewards
    look like is logged: a group whose rewards are all equal teaches nothing.
    """

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rewards by function, of all ranks: [completions, functions]; nan where a function does not apply."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.model.training:
            weights = self.reward_weights.to(rewards.device)
            figures = group_figures((rewards * weights).nansum(dim=1).view(-1, self.num_generations))
            for name, value in figures.items():
                self._metrics["train"][f"groups/{name}"].append(value)
        return rewards

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        args = self.args
        prompts = args.generation_batch_size // self.num_generations
        repeats = self.num_iterations * args.steps_per_generation
        dataset = self.train_dataset if dataset is None else dataset
        require_prompts(len(dataset), prompts)
        micro_steps = len(dataset) // prompts * repeats
        steps = -(-micro_steps // args.gradient_accumulation_steps)
        return EpochSampler(
            dataset,
            mini_repeat_count=self.num_generations,
            batch_size=prompts,
            repeat_count=repeats,
            seed=args.seed,
            epoch=lambda: self.state.global_step // steps,
        )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        made = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.meter.generated(made["completion_mask"])
        return made

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Where vLLM has just sampled: its word on the samples is compared with the trained model's, asked first."""
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.use_vllm and self.vllm_generation.sampled is not None:
            self._metrics["train"]["generation/logprob_difference"].append(self.vllm_generation.check(found[0]))
        return found

    def rank_state(self) -> dict[str, Any]:
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return super().rank_state() | {
            "_step": self._step,
            "_buffered_inputs": self._buffered_inputs if in_use else None,
        }

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        super().restore_rank_state(state)
        self._step = state["_step"]
        same_ranks = state["world_size"] == self.args.world_size
        self._buffered_inputs = state["_buffered_inputs"] if same_ranks else None  # None: generated anew


class GrpoTrainer(Groups, GRPOTrainer):
    """TRL's GRPOTrainer, resumed exactly."""


def group_figures(rewards: torch.Tensor) -> dict[str, float]:
    """Of the summed rewards of groups, [groups, completions of one prompt]: the means over groups of each one's mean,
    sample standard deviation and best, and the fraction of groups that are informative: not all rewards equal."""
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(dim=1).mean().item(),
        "reward_best": rewards.amax(dim=1).mean().item(),
        "informative": (rewards.amax(dim=1) - rewards.amin(dim=1) > 1e-6).float().mean().item(),
    }


SAME = (
    "num_generations", "num_iterations", "steps_per_generation", "max_completion_length", "temperature", "beta",
    "epsilon", "epsilon_high", "mask_truncated_completions",
)  # fmt: skip
"""Keys of ours that GRPOConfig and RLOOConfig both have, under the same names."""


def group_arguments(stage: Stage, how: Grpo | Rloo) -> dict[str, Any]:
    """Arguments of GRPOConfig and RLOOConfig alike."""
    return trainer_arguments(stage, how.lr) | {name: getattr(how, name) for name in SAME}


def build_trainer(stage: Stage) -> Trainer:
    """By default one generation serves one optimizer step: its whole effective batch at once."""
    cfg = stage.cfg
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.grpo.reward, stage.run)
    args = GRPOConfig(
        **group_arguments(stage, cfg.grpo),
        loss_type=cfg.grpo.loss_type,
        scale_rewards=cfg.grpo.scale_rewards,
        importance_sampling_level=cfg.grpo.importance_sampling_level,
        reward_weights=weights,
    )
    model = load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True)
    trainer = GrpoTrainer(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
    generate_by_vllm(stage, trainer)
    return trainer


def generate_by_vllm(stage: Stage, trainer: Trainer) -> None:
    """Have vLLM sample, where the config says so. It is imported only then."""
    how = generation(stage.cfg)
    if how is not None and how.backend != "transformers":
        with vllm_usable():
            import vllm  # noqa: F401
        from post_training.generation import VllmGeneration

        trainer.vllm_generation = VllmGeneration(stage, trainer)
        trainer.use_vllm, trainer._last_loaded_step = True, -1
