"""grpo: group-relative policy optimisation with verifiable rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from post_training import data
from post_training.adapters import lora_config
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm, trainer_arguments
from post_training.stages.exact import ExactResume


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


class GrpoTrainer(ExactResume, GRPOTrainer):
    """TRL's GRPOTrainer, resumed exactly: also past the first epoch, and while a generation is in use."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        args = self.args
        prompts = args.generation_batch_size // self.num_generations
        repeats = self.num_iterations * args.steps_per_generation
        dataset = self.train_dataset if dataset is None else dataset
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


def build_trainer(stage: Stage) -> Trainer:
    """By default one generation serves one optimizer step: its whole effective batch at once."""
    cfg = stage.cfg
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.grpo.reward)
    args = GRPOConfig(
        **trainer_arguments(stage, cfg.grpo.lr),
        num_generations=cfg.grpo.num_generations,
        num_iterations=cfg.grpo.num_iterations,
        steps_per_generation=cfg.grpo.steps_per_generation,
        max_completion_length=cfg.grpo.max_completion_length,
        temperature=cfg.grpo.temperature,
        beta=cfg.grpo.beta,
        loss_type=cfg.grpo.loss_type,
        reward_weights=weights,
    )
    model = load_causal_lm(cfg, stage.model_path, stage.tokenizer, trained=True)
    return GrpoTrainer(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage, model),
    )
