"""PPO for language models, on `transformers.Trainer`.

TRL 1.16 has no PPO. This is ours, laid out as TRL lays out GRPO: the rollout happens in
`_prepare_inputs`, is buffered, and is handed to the training loop one micro-batch at a time. The
Trainer keeps everything else: optimizer, schedule, DDP and DeepSpeed, logging, checkpoints, resume.

The file reads from top to bottom: the mathematics (pure functions), the module (policy and value
head), the arguments, the trainer.

Letters in shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded),
L = P + T, V vocabulary. `mask` is [B, T] and has the form of a prefix: ones on the completion's
tokens up to and with the first EOS, zeros after it.

Sources: Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage
Estimation"; Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences"; Stiennon et al. 2020, "Learning to summarize
from human feedback"; Schulman 2020, "Approximating KL Divergence" (the names k1 and k3).
"""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from post_training import data
from post_training.adapters import FOLDER, lora_config, merge_own
from post_training.data.source import DataError
from post_training.rewards.verify import reward_functions
from post_training.stages.common import Stage, load_causal_lm, load_reward_model, trainer_arguments
from post_training.stages.exact import ExactResume
from post_training.stages.grpo import require_prompts

if TYPE_CHECKING:
    from peft import LoraConfig

Reduce = Callable[[Tensor], Tensor]
RewardFunc = Callable[..., Sequence[float | None]]


# ---- the mathematics ---------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum of `x` over the mask divided by `count`, by default the mask's own count. x, mask: [...] -> []

    `count` lets micro-batches of unequal length add up to one mean over all their tokens.
    """
    # where, not multiplication: what lies under the padding may be inf or nan.
    total = torch.where(mask.bool(), x, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if count is None else count)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """`x` with unit variance (Bessel's) over the mask, and with mean zero, or its own without `shift_mean`.

    x, mask: [B, T] -> [B, T], zero outside the mask. `reduce` sums a tensor over all ranks; with it,
    mean and variance are those of all ranks' tokens. Two passes, since E[x²]-E[x]² cancels badly.
    """
    x = torch.where(mask.bool(), x, 0.0)
    total, count = reduce(torch.stack([x.sum(), mask.sum().to(x.dtype)])).unbind()
    mean = total / count.clamp(min=1)
    squares = reduce((((x - mean) ** 2) * mask).sum())
    whitened = (x - mean) * torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman 2015, eq. 16) over ragged episodes.

    rewards, values, mask: [B, T] -> advantages, returns: [B, T], zero outside the mask.
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = sum_l (gamma lam)^l delta_{t+l};  returns = A + V.
    The last token ends the episode: V after it is 0, also where the length limit cut it off (a
    completion that was cut off gets its score like any other, so there is nothing left to bootstrap).
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # past the mask: deltas are 0, so it stays 0
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1) * mask
    return advantages, advantages + values


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> tuple[Tensor, Tensor]:
    """A KL penalty on every token and the score on the last one (Ziegler 2019, Stiennon 2020).

    scores: [B]; logprobs, ref_logprobs, mask: [B, T] -> rewards, kl: [B, T], zero outside the mask.
    kl estimates KL(policy || reference) from the sampled tokens: "k1" is log p - log q (unbiased, may
    be negative), "k3" is exp(log q - log p) - 1 - (log q - log p) (unbiased, never negative).
    """
    log_ratio = logprobs - ref_logprobs
    if kl_estimator == "k1":
        kl = log_ratio
    elif kl_estimator == "k3":
        kl = torch.exp(-log_ratio) - 1 + log_ratio
    else:
        raise ValueError(f"kl_estimator is {kl_estimator!r}; it must be one of k1, k3")
    kl = torch.where(mask.bool(), kl, 0.0)
    last = (mask.sum(dim=1).long() - 1).clamp(min=0).unsqueeze(1)
    rewards = (-kl_coef * kl).scatter_add(1, last, scores.unsqueeze(1).to(kl.dtype))
    return rewards, kl


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate (Schulman 2017, eq. 7), negated. All inputs [B, T] -> three scalars.

    Returns the loss (sum over the mask / `count`), the fraction of tokens on which the clip is what
    counts, and approx_kl = mean(ratio - 1 - log ratio), an estimate of KL(old || new).
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(plain, clipped), mask, count)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(ratio.dtype), mask)
        approx_kl = masked_mean(ratio - 1 - log_ratio, mask)
    return loss, clip_fraction, approx_kl


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    count: Tensor | None = None,
) -> Tensor:
    """Half the squared error, clipped around the rollout's values. All inputs [B, T] -> [].

    Not in the paper, but in OpenAI's code for it (baselines `ppo2`) and in Ziegler 2019's.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask, count)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the softmax, in nats. logits: [..., V] -> [...]"""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    # A token excluded by -inf has probability 0 and adds 0, not 0 · inf.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def logprobs_from_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id. logits: [B, T, V], ids: [B, T] -> [B, T], float32."""
    # cross_entropy never holds log-probabilities of the whole vocabulary for the backward pass.
    return -F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask. All inputs [B, T] -> []

    1: the values predict everything; 0: no better than a constant; below 0: worse. nan if the returns
    do not vary.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total, torch.nan)


class AdaptiveKL:
    """The proportional controller of Ziegler 2019 (section 2.2) for the KL coefficient.

    It multiplies the coefficient by 1 + n / horizon · clip(kl / target - 1, -0.2, 0.2) after n episodes.
    `coef` is all of its state. Without a target the coefficient is fixed.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: mean over the episodes of the KL summed over each one's tokens, in nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


# ---- the module --------------------------------------------------------------------------------


class PolicyWithValue(PreTrainedModel):
    """A causal LM and a value head on its last hidden state, as one module.

    One trunk for both, not a second model for the values: half the memory and one forward for both,
    and one module is one optimizer, one set of files and one `accelerator.prepare`, which is why
    checkpoints, DDP, ZeRO and resume come with the Trainer unchanged. The price is that the value
    loss moves the policy's trunk; `value_coef` keeps it small.

    It is a `PreTrainedModel` since `Trainer._save` writes others with a plain safetensors dump, which
    refuses tied embeddings.
    """

    base_model_prefix = "policy"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is computed (and scaled) by PPOTrainer
    # The wrapped model has chosen its attention already; the wrapper has none to refuse.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        policy: PreTrainedModel,
        reward_model: PreTrainedModel | None = None,
        value_init: str = "policy",
        adapters: "LoraConfig | None" = None,
    ):
        """value_init: "policy" starts all values at 0; "rm" starts from the reward model's score head.

        adapters: of the policy, whose own weights are frozen then; the value head is trained whole.
        """
        # A copy, since the Trainer writes into it (use_cache=False), and the policy's is exported.
        super().__init__(deepcopy(policy.config))
        hidden = policy.get_output_embeddings().in_features  # under ZeRO-3 the weight itself is elsewhere
        self.has_adapters = adapters is not None
        self.policy = policy
        if adapters is not None:
            from peft import get_peft_model

            # ZeRO-3 wants one type for all parameters; else adapters beside bf16 weights are float32
            self.policy = get_peft_model(policy, adapters, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
            policy.enable_input_require_grads()  # else gradient checkpointing finds nothing to go back to
        # float32 also beside a bf16 policy: values are regressed, and bf16 has three digits. ZeRO-3 wants one type
        # for all parameters, and updates a float32 copy of each.
        dtype = policy.dtype if is_deepspeed_zero3_enabled() else torch.float32
        self.value_head = nn.Linear(hidden, 1, device=policy.device, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if value_init == "rm":
            head = getattr(reward_model, "score", None)
            with _gathered([] if head is None else [head.weight]):
                if head is None or head.weight.shape != self.value_head.weight.shape:
                    shape = None if head is None else tuple(head.weight.shape)
                    raise DataError(
                        f"ppo.value_init=rm: needs a reward model with a score head of shape {(1, hidden)}, found "
                        f"{shape}\n  fix: ppo.value_init=policy, which starts the values at zero"
                    )
                self.value_head.weight.data.copy_(head.weight.data)
        elif value_init != "policy":
            raise ValueError(f"value_init is {value_init!r}; it must be one of policy, rm")
        self.post_init()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The policy as transformers knows it, with the adapters in its layers."""
        return self.policy.get_base_model() if self.has_adapters else self.policy

    def init_weights(self) -> None:
        """Nothing: the policy comes with its weights. `post_init` would draw new ones for a fresh module."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask, position_ids: [B, L] -> logits [B, K, V], values [B, K] (float32).

        K is `logits_to_keep`, the last positions only; 0 means all L.
        """
        # The value head reads what the LM head reads. Catching it there works for every architecture,
        # also those that scale or cap the logits afterwards, and keeps no other layer's states alive.
        head_inputs: list[Tensor] = []
        handle = self.causal_lm.get_output_embeddings().register_forward_pre_hook(
            lambda _module, args: head_inputs.append(args[0])
        )
        try:
            logits = self.causal_lm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                use_cache=False,
            ).logits
        finally:
            handle.remove()
        values = self.value_head(head_inputs[0].to(self.value_head.weight.dtype)).squeeze(-1)
        return logits, values.float()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As its parent does, under a model type of its own.

        With the policy's type AutoModelForCausalLM would load a checkpoint of ours with a warning and
        random weights, since no name matches. Use `export` for a plain causal LM. With adapters: what is
        trained, and no more.
        """
        if self.has_adapters:
            state_dict = kwargs.get("state_dict") or self.state_dict()
            trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
            kwargs["state_dict"] = {name: state_dict[name] for name in trained}
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"model_type": "policy_with_value"}, indent=2) + "\n"
        )

    def export(
        self,
        path: str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the plain causal LM, without the value head, and its tokenizer; adapters beside it, and merged.

        state_dict: this module's state, where it does not lie in the module itself (ZeRO-3).
        """
        if state_dict is not None:
            state_dict = {  # each tied weight once: DeepSpeed hands over copies
                k.removeprefix("policy."): v
                for k, v in state_dict.items()
                if k.startswith("policy.") and k not in self.all_tied_weights_keys
            }
        if self.has_adapters:
            assert tokenizer is not None
            self.policy.save_pretrained(Path(path) / FOLDER, state_dict=state_dict)
            merge_own(self.policy, Path(path), tokenizer)
            return
        self.policy.save_pretrained(path, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)


@contextlib.contextmanager
def _gathered(weights: list[Tensor]) -> Iterator[None]:
    """The whole weights, also where ZeRO-3 has shared them out."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights):
        yield


# ---- the arguments -----------------------------------------------------------------------------


@dataclass
class PPOArguments(TrainingArguments):
    """TrainingArguments and PPO's own. `max_steps` counts optimizer steps, as everywhere in the Trainer."""

    max_completion_length: int = field(
        default=256, metadata={"help": "Most tokens to sample per completion."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; divides all logits, as in GRPO."}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Nucleus sampling. Below 1 the log-probabilities still are those of the whole softmax."
        },
    )
    rollout_batches: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that one rollout makes, per process; a multiple of "
            "gradient_accumulation_steps, which is the default."
        },
    )
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over each rollout."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalized advantage estimation."})
    clip_range: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    value_clip_range: float = field(
        default=0.2, metadata={"help": "Clip of the values around the rollout's values."}
    )
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    kl_coef: float = field(
        default=0.05, metadata={"help": "KL penalty per token; the start value if adaptive_kl."}
    )
    kl_estimator: str = field(
        default="k1", metadata={"help": "Estimator of the KL: k1 or k3.", "choices": ["k1", "k3"]}
    )
    adaptive_kl: bool = field(
        default=False, metadata={"help": "Steer kl_coef towards kl_target (Ziegler 2019)."}
    )
    kl_target: float = field(default=6.0, metadata={"help": "adaptive_kl: wanted KL per sequence, in nats."})
    kl_horizon: float = field(default=10_000, metadata={"help": "adaptive_kl: episodes it takes to react."})
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Scale the advantages of each rollout to mean 0 and variance 1, over all ranks."},
    )
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Scale the token rewards of each rollout to variance 1, keeping the mean."},
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a completion without EOS, after reward_clip."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip the summed score to ± this."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: the reward functions need the dataset's columns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_batches is None:
            self.rollout_batches = self.gradient_accumulation_steps
        rules = {
            "rollout_batches must be a multiple of gradient_accumulation_steps, so that an optimizer step "
            "lies within one pass over a rollout": self.rollout_batches % self.gradient_accumulation_steps
            == 0,
            "rollout_batches, num_ppo_epochs and max_completion_length must be at least 1": min(
                self.rollout_batches, self.num_ppo_epochs, self.max_completion_length
            )
            >= 1,
            "temperature must be above 0: PPO learns from samples": self.temperature > 0,
            "kl_estimator must be one of k1, k3": self.kl_estimator in ("k1", "k3"),
            "kl_target and kl_horizon must be above 0": min(self.kl_target, self.kl_horizon) > 0,
            "remove_unused_columns must be false": not self.remove_unused_columns,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)


# ---- the trainer -------------------------------------------------------------------------------


class RolloutSampler(Sampler[int]):
    """Indices of whole rollouts, each one repeated for the micro-steps that use it.

    Every pass over the data is a permutation of its own, drawn from (seed, epoch); what does not fill a
    rollout is left out of that pass. `epoch` is asked at the start of each pass, and not set through
    `set_epoch`: accelerate does not hand that on to a sampler inside a resumed, sharded loader, and the
    run would go on with another order of the data.
    """

    def __init__(self, size: int, rollout_size: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.size, self.rollout_size, self.repeats, self.seed, self.epoch = (
            size,
            rollout_size,
            repeats,
            seed,
            epoch,
        )

    def __len__(self) -> int:
        return self.size // self.rollout_size * self.rollout_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch())).permutation(self.size).tolist()
        for start in range(0, self.size - self.rollout_size + 1, self.rollout_size):
            for _ in range(self.repeats):
                yield from order[start : start + self.rollout_size]


def rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator: prompts are tokenized at their rollout. A function, so that workers can pickle it."""
    return rows


class PPOTrainer(ExactResume):
    """PPO with whole-sequence scores from reward functions and a reward model.

    train_dataset: rows `{"prompt": messages or text, ...}`; the other columns go to the reward functions.
    reward_funcs: TRL's signature, `f(prompts=, completions=, **columns) -> list[float]`; for prompts of
    messages a completion is `[{"role": "assistant", "content": text}]`, else the text. None in the list
    means that the function does not apply to that completion.
    reward_model: a sequence classifier with one label and the policy's tokenizer. It sees prompt and
    completion, always with an EOS at the end, as it was trained.

    ref_model: the frozen reference; None: the policy without its adapters.

    The score of a completion is the weighted sum of all of them. One rollout is `rollout_batches`
    micro-batches per process, used for `num_ppo_epochs` passes; optimizer steps never straddle passes.
    """

    def __init__(
        self,
        model: PolicyWithValue,
        ref_model: PreTrainedModel | None,
        reward_funcs: Sequence[RewardFunc],
        reward_weights: list[float],
        args: PPOArguments,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        reward_model: PreTrainedModel | None = None,
        reward_model_weight: float = 0.0,
        callbacks: list[TrainerCallback] | None = None,
    ):
        tokenizer = processing_class
        if len(reward_funcs) != len(reward_weights):
            raise ValueError(f"{len(reward_funcs)} reward functions but {len(reward_weights)} reward weights")
        if ref_model is None and not model.has_adapters:
            raise ValueError("PPO needs a reference model, or adapters: without them the policy is the reference")
        if not reward_funcs and reward_model is None:
            raise ValueError("PPO needs a reward function or a reward model")
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("PPO needs a tokenizer with a pad token and an EOS token")
        if args.n_gpu > 1:
            raise ValueError("PPO runs one process per GPU: start it with torchrun or srun")
        if reward_model is not None and reward_model.config.num_labels != 1:
            raise ValueError(f"the reward model has {reward_model.config.num_labels} labels; it must have 1")

        super().__init__(
            model=model,
            args=args,
            data_collator=rows_as_they_are,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        assert not self.is_fsdp_enabled, "conf.check refuses it"
        self.args: PPOArguments = args
        self.tokenizer = tokenizer
        self.reward_funcs, self.reward_weights = reward_funcs, reward_weights
        self.reward_names = [getattr(f, "__name__", type(f).__name__) for f in reward_funcs]
        self.reward_model_weight = reward_model_weight
        self.ref_model = None if ref_model is None else self._frozen(ref_model)
        self.reward_model = None
        if reward_model is not None:
            if reward_model.config.pad_token_id is None:
                # transformers finds the token to score by this id, and refuses batches without it.
                reward_model.config.pad_token_id = tokenizer.pad_token_id
            self.reward_model = self._frozen(reward_model)
        self.generation_config = GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,  # None would mean 50
            max_new_tokens=args.max_completion_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            use_cache=True,
        )
        # The Trainer has seeded all ranks alike: they would all draw the same noise.
        set_seed(args.seed, device_specific=True)

        # All state beyond the Trainer's: where we are, what we are working on, and the KL coefficient.
        self._micro_step = 0
        self._rollout: dict[str, Tensor] | None = None
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target if args.adaptive_kl else None, args.kl_horizon)

        self._rollout_batches = int(args.rollout_batches or 1)
        self._micro_steps_per_rollout = self._rollout_batches * args.num_ppo_epochs
        self._step_tokens = torch.tensor(1.0)
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)

    def _frozen(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            from trl.models import prepare_deepspeed

            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # -- data: one whole rollout of prompts for every micro-step that works on it --

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self._rollout_batches,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        size = len(self.train_dataset if train_dataset is None else train_dataset)
        rollout_size = self._train_batch_size * self._rollout_batches * self.args.world_size
        require_prompts(size, rollout_size)
        steps = size // rollout_size * self._micro_steps_per_rollout // self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RolloutSampler(
            size,
            rollout_size,
            self._micro_steps_per_rollout,
            seed,
            epoch=lambda: self.state.global_step // steps,
        )

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:  # type: ignore[override]
        """The micro-batch that is due, of the rollout made from these prompts; rolls out where one starts."""
        within = self._micro_step % self._micro_steps_per_rollout
        if within == 0 or self._rollout is None:
            self._rollout = self._make_rollout(inputs)
        rollout, size = self._rollout, self._train_batch_size
        epoch, batch = divmod(within, self._rollout_batches)
        step, micro_batch = divmod(batch, self.args.gradient_accumulation_steps)
        rng = np.random.default_rng(
            (self.args.seed, self._micro_step // self._micro_steps_per_rollout, epoch)
        )
        order = torch.from_numpy(rng.permutation(len(rollout["mask"]))).to(self.args.device)
        rows = order.view(-1, self.args.gradient_accumulation_steps * size)[step]
        lengths = rollout["mask"][rows].sum(1)
        # The step is one mean over its tokens, so its micro-batches may share its rows out as they like:
        # by length, there is least padding.
        rows = rows[lengths.argsort(stable=True)].view(-1, size)[micro_batch]
        if micro_batch == 0:
            # What the loss is divided by: the tokens of the whole optimizer step, over all ranks.
            self._step_tokens = self._sum_over_ranks(lengths.sum().float())
        self._micro_step += 1
        return trimmed({k: v[rows] for k, v in rollout.items()})

    # -- the rollout --

    @torch.no_grad()
    def _make_rollout(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Sample completions, score them, work out advantages and returns. Values are [B, ...]."""
        args = self.args
        was_training = self.model.training
        self.model.eval()  # no dropout in sampling, old log-probabilities and values
        with self.accelerator.autocast():
            input_ids, attention_mask, mask, terminated = self._generate([row["prompt"] for row in rows])
            rollout = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask}
            scores = self._scores(rows, input_ids, attention_mask, mask, terminated)
            logprobs, values, entropy = self._by_length(self._evaluate_policy, rollout)
            (ref_logprobs,) = self._by_length(self._evaluate_reference, rollout)
        self.model.train(was_training)

        rewards, kl = token_rewards(scores, logprobs, ref_logprobs, mask, self.kl.coef, args.kl_estimator)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=self._sum_over_ranks)
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask, reduce=self._sum_over_ranks)

        sequence_kl = kl.sum(1)
        lengths = mask.sum(1).float()
        self.meter.generated(mask)
        self._record("reward", scores)
        self._record("reward_std", scores.std(correction=0))
        self._record("kl", sequence_kl)
        self._record("kl_coef", torch.tensor(self.kl.coef, device=scores.device))
        self._record("explained_variance", explained_variance(values, returns, mask))
        self._record("entropy", masked_mean(entropy, mask))
        self._record("completion_length", lengths)
        self._record("terminated", terminated.float())
        totals = self._sum_over_ranks(torch.stack([sequence_kl.sum(), attention_mask.sum().float()]))
        kl_sum, tokens = totals.tolist()
        episodes = len(rows) * args.world_size
        self.kl.update(kl_sum / episodes, episodes)
        self.state.num_input_tokens_seen += int(tokens)
        return rollout | {
            "old_logprobs": logprobs,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
        }

    def _tokenize(self, prompts: list[Any]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and attention mask of the prompts: [B, P] each."""
        if isinstance(prompts[0], str):
            encoded = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        else:
            encoded = self.tokenizer.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                return_dict=True,
                padding=True,
                return_tensors="pt",
                tokenizer_kwargs={"padding_side": "left"},  # as an argument of its own it is silently ignored
            )
        return encoded["input_ids"].to(self.args.device), encoded["attention_mask"].to(self.args.device)

    def _generate(self, prompts: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One completion each -> input_ids [B, L], attention_mask [B, L], mask [B, T], terminated [B]."""
        prompt_ids, prompt_mask = self._tokenize(prompts)
        with self._policy_to_sample_from() as policy:
            own, policy.generation_config = policy.generation_config, self.generation_config
            try:  # generate() fills gaps from the model's own: a repetition penalty would bias the ratio
                input_ids = policy.generate(input_ids=prompt_ids, attention_mask=prompt_mask)
            finally:
                policy.generation_config = own
        is_eos = input_ids[:, prompt_ids.shape[1] :] == self.tokenizer.eos_token_id
        mask = (is_eos.cumsum(1) - is_eos.long()) == 0
        return input_ids, torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], dim=1), mask, is_eos.any(1)

    @contextlib.contextmanager
    def _policy_to_sample_from(self) -> Iterator[Any]:
        if not self.is_deepspeed_enabled:
            yield self.model.causal_lm
            return
        from trl.models.utils import unwrap_model_for_generation

        # ZeRO-3: gathers the weights, or every token would gather them anew.
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            yield model.causal_lm

    def _by_length(
        self, forward: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]], rollout: dict[str, Tensor]
    ) -> list[Tensor]:
        """`forward(ids [b, l], attention_mask [b, l], t)` in chunks -> each of its outputs [b, t] as [B, T].

        Chunks of the training's size, so that the rollout's forwards take no more memory than training does;
        of completions of like length, so that little of them is padding.
        """
        mask = rollout["mask"]
        order = mask.sum(1).argsort(stable=True)
        parts = []
        for rows in order.split(self._train_batch_size):
            chunk = trimmed({k: v[rows] for k, v in rollout.items()})
            t = chunk["mask"].shape[1]
            outputs = forward(chunk["input_ids"], chunk["attention_mask"], t)
            parts.append([F.pad(x, (0, mask.shape[1] - t)) for x in outputs])
        return [torch.cat(column)[order.argsort()] for column in zip(*parts, strict=True)]

    def _evaluate_policy(self, ids: Tensor, attention_mask: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies of the completions' tokens: [b, t] each."""
        logits, values = self.model_wrapped(
            ids, attention_mask, position_ids_of(attention_mask), logits_to_keep=t + 1
        )
        logits = logits[:, :-1] / self.args.temperature
        return logprobs_from_logits(logits, ids[:, -t:]), values[:, :-1], entropy_from_logits(logits)

    def _evaluate_reference(self, ids: Tensor, attention_mask: Tensor, t: int) -> tuple[Tensor]:
        """Log-probabilities under the reference: [b, t]."""
        if self.ref_model is None:
            with self.model.policy.disable_adapter():
                return self._evaluate_policy(ids, attention_mask, t)[:1]
        logits = self.ref_model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids_of(attention_mask),
            logits_to_keep=t + 1,
            use_cache=False,
        ).logits
        return (logprobs_from_logits(logits[:, :-1] / self.args.temperature, ids[:, -t:]),)

    def _scores(
        self,
        rows: list[dict[str, Any]],
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        terminated: Tensor,
    ) -> Tensor:
        """One score per completion: [B], float32."""
        device = input_ids.device
        scores = torch.zeros(len(rows), device=device)
        if self.reward_funcs:
            prompts = [row["prompt"] for row in rows]
            columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
            lengths = mask.sum(1).tolist()
            ids = [row[:n] for row, n in zip(input_ids[:, -mask.shape[1] :].tolist(), lengths, strict=True)]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            completions: list[Any] = texts
            if not isinstance(prompts[0], str):
                completions = [[{"role": "assistant", "content": text}] for text in texts]
            for name, weight, func in zip(
                self.reward_names, self.reward_weights, self.reward_funcs, strict=True
            ):
                values = func(prompts=prompts, completions=completions, completion_ids=ids, **columns)
                if len(values) != len(rows):
                    raise ValueError(
                        f"reward function {name} gave {len(values)} rewards for {len(rows)} completions"
                    )
                rewards = torch.tensor([torch.nan if v is None else float(v) for v in values], device=device)
                self._record(f"rewards/{name}", rewards)
                scores += weight * rewards.nan_to_num()
        if self.reward_model is not None:
            # A completion that was cut off gets the EOS it lacks: the reward model has seen nothing else.
            eos = torch.full_like(input_ids[:, :1], self.tokenizer.eos_token_id)
            pad = torch.full_like(eos, self.tokenizer.pad_token_id)
            rm_ids = torch.cat([input_ids, torch.where(terminated.unsqueeze(1), pad, eos)], dim=1)
            rm_mask = torch.cat([attention_mask, (~terminated).unsqueeze(1).to(attention_mask.dtype)], dim=1)
            parts = [
                self.reward_model(
                    input_ids=i, attention_mask=m, position_ids=position_ids_of(m), use_cache=False
                ).logits
                for i, m in zip(
                    rm_ids.split(self._train_batch_size), rm_mask.split(self._train_batch_size), strict=True
                )
            ]
            score_rm = torch.cat(parts).squeeze(-1).float()
            self._record("score_rm", score_rm)
            scores += self.reward_model_weight * score_rm
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~terminated).float()
        return scores

    # -- the loss --

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of one micro-batch, scaled so that the optimizer step is one mean over all its tokens."""
        self.meter.count(inputs)
        args, mask = self.args, inputs["mask"]
        width = mask.shape[1]
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        logits, values = model(ids, attention_mask, position_ids_of(attention_mask), logits_to_keep=width + 1)
        logits, values = logits[:, :-1] / args.temperature, values[:, :-1]
        logprobs = logprobs_from_logits(logits, ids[:, -width:])
        # The Trainer divides by the accumulation steps, DDP and DeepSpeed by the ranks: undo both.
        count = self._step_tokens / (self.current_gradient_accumulation_steps * args.world_size)
        loss_policy, clip_fraction, approx_kl = policy_loss(
            logprobs, inputs["old_logprobs"], inputs["advantages"], mask, args.clip_range, count
        )
        loss_value = value_loss(
            values, inputs["old_values"], inputs["returns"], mask, args.value_clip_range, count
        )
        loss = loss_policy + args.value_coef * loss_value
        if args.entropy_coef != 0:
            loss = loss - args.entropy_coef * masked_mean(entropy_from_logits(logits), mask, count)
        self._record("policy_loss", loss_policy)
        self._record("value_loss", loss_value)
        self._record("clip_fraction", clip_fraction)
        self._record("approx_kl", approx_kl)
        return loss

    # -- metrics --

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum") if self.args.world_size > 1 else x

    def _record(self, name: str, x: Tensor) -> None:
        self._metrics[name].append(x.detach().float().flatten())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, to the training loop's own logs only: all ranks write those."""
        if self._metrics and "loss" in logs:
            names = sorted(self._metrics)
            columns = [torch.cat(self._metrics[name]) for name in names]
            sums = torch.stack([torch.stack([x.nansum(), (~x.isnan()).sum().float()]) for x in columns])
            for name, (total, count) in zip(names, self._sum_over_ranks(sums).tolist(), strict=True):
                if count:
                    logs[name] = total / count
            self._metrics.clear()
        super().log(logs, start_time)

    # -- saving and resuming --

    def rank_state(self) -> dict[str, Any]:
        underway = self._micro_step % self._micro_steps_per_rollout != 0
        # Between two rollouts there is none to save.
        return super().rank_state() | {"kl_coef": self.kl.coef, "rollout": self._rollout if underway else None}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        super().restore_rank_state(state)
        self.kl.coef = state["kl_coef"]
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        # On other ranks than before the prompts are at hand: the rest of the rollout's steps get a rollout anew.
        same_ranks = state["world_size"] == self.args.world_size
        self._rollout = state["rollout"] if same_ranks else None

    def save_policy(self, path: str | os.PathLike) -> None:
        """Write the policy as a plain causal LM with its tokenizer. Call it on all ranks (ZeRO-3 gathers)."""
        state_dict = (
            self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None
        )
        if self.args.should_save:
            self.model.export(path, self.tokenizer, state_dict)
        self.accelerator.wait_for_everyone()


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Positions that start at 0 with the first token after the left padding. [B, L] -> [B, L]"""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The micro-batch without the columns that are padding in all of its rows, on either side."""
    width = batch["mask"].shape[1]
    left, right = torch.stack(
        [batch["attention_mask"].argmax(1).min(), width - batch["mask"].sum(1).max()]
    ).tolist()
    end = width - right
    full = {
        k: v[:, left : v.shape[1] - right] for k, v in batch.items() if k in ("input_ids", "attention_mask")
    }
    return full | {k: v[:, :end] for k, v in batch.items() if k not in full}


# ---- the stage ---------------------------------------------------------------------------------


def build_trainer(stage: Stage) -> Trainer:
    """PPO from a run's config: verifiable rewards, a reward model's score, or both, each with its weight."""
    cfg, tokenizer = stage.cfg, stage.tokenizer
    assert stage.model_path is not None
    functions, weights = reward_functions(cfg.ppo.reward, stage.run)
    args = PPOArguments(
        **trainer_arguments(stage, cfg.ppo.lr),
        max_completion_length=cfg.ppo.max_completion_length,
        temperature=cfg.ppo.temperature,
        num_ppo_epochs=cfg.ppo.num_ppo_epochs,
        gamma=cfg.ppo.gamma,
        lam=cfg.ppo.lam,
        clip_range=cfg.ppo.clip_range,
        value_clip_range=cfg.ppo.value_clip_range,
        value_coef=cfg.ppo.value_coef,
        kl_coef=cfg.ppo.kl_coef,
        kl_estimator=cfg.ppo.kl_estimator,
        adaptive_kl=cfg.ppo.adaptive_kl,
        kl_target=cfg.ppo.kl_target,
        kl_horizon=cfg.ppo.kl_horizon,
        whiten_advantages=cfg.ppo.whiten_advantages,
        whiten_rewards=cfg.ppo.whiten_rewards,
        reward_clip=cfg.ppo.reward_clip,
        missing_eos_penalty=cfg.ppo.missing_eos_penalty,
        entropy_coef=cfg.ppo.entropy_coef,
    )
    reward_model = None
    if cfg.ppo.reward_model_weight or cfg.ppo.value_init == "rm":
        assert stage.reward_model_path is not None
        reward_model = load_reward_model(cfg, stage.reward_model_path, tokenizer)
    policy = load_causal_lm(cfg, stage.model_path, tokenizer, trained=True)
    adapters = lora_config(stage, policy)
    reference = stage.reference_path or stage.model_path
    own = adapters is not None and reference == stage.model_path  # the policy without its adapters
    return PPOTrainer(
        model=PolicyWithValue(policy, reward_model, cfg.ppo.value_init, adapters),
        ref_model=None if own else load_causal_lm(cfg, reference, tokenizer),
        reward_funcs=functions,
        reward_weights=weights,
        args=args,
        train_dataset=data.load(cfg.data).problems("train"),
        processing_class=tokenizer,
        reward_model=reward_model if cfg.ppo.reward_model_weight else None,  # else it lent its head, no more
        reward_model_weight=cfg.ppo.reward_model_weight,
    )
