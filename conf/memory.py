"""How much memory of one GPU a stage needs at least, from its config alone. Pure: reads no file, imports no torch.

The estimate is a lower bound for rows as long as the config allows: what it leaves out (the CUDA context, the
allocator's gaps, the optimizer's temporaries, prompts whose length nobody knows yet) only adds to it. So a run that
it refuses would have run out of memory on its longest rows, and nothing is refused that fits.

Bytes, for P parameters of which T are trained, b bytes each (4 or 2), on W ranks:

    strategy  weights     gradients  optimizer state
    ddp       b P         b T (1)    2 b T            AdamW's two moments have the weights' type
    zero2     b P         b T / W    12 T / W         float32 copy and moments: Rajbhandari 2020 (ZeRO), section 3
    zero3     b P / W     b T / W    12 T / W         and the gathered weights of the largest layer
    fsdp2     4 T / W     4 T / W    8 T / W          accelerate holds them in float32; and gathered layers
    offload: optimizer state and gradients, under zero3 the weights too, lie in the node's memory instead

    QLoRA: frozen weights are half a byte each. Reference and reward models are shared out as the weights are.
    (1) and as much again for DDP's buckets where W > 1 (torch's DistributedDataParallel, `gradient_as_bucket_view`)

Activations are counted in `activation_bytes`, the KV cache in `kv_cache_bytes`. Gradients and activations are held
together where gradients are accumulated; otherwise one goes as the other comes, and the larger sum counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.check import (
    LORA_STAGES,
    SAMPLING,
    ConfigError,
    accumulation_steps,
    server_gpus,
    vllm_share,
    world_size,
)
from conf.schema import Config, Model

GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BYTES_TOKENIZER = 265
"""Tokens of the 'bytes' tokenizer (post_training.data.tokenizer)."""
PAIRS = ("rm", "dpo", "orpo")
"""Stages whose samples are two rows."""
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
"""Tokens and words of the tile in which TRL's fused LM head makes logits (trl.kernels.chunked_logprob)."""
ROOM = 0.9
"""Advice is to fit with what the estimate leaves out: into this share of the memory."""


# ------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """The numbers of a dense decoder that its memory and its arithmetic follow from."""

    family: str  # llama, qwen3 or gpt2
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int = 0  # learned ones (gpt2)

    @property
    def queries(self) -> int:
        """Width of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads of keys; of values as well."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        if self.family == "gpt2":  # biases everywhere, two MLP matrices, LayerNorm
            biases = 4 * self.hidden + self.intermediate + self.hidden
            return attention + 2 * self.hidden * self.intermediate + biases + 4 * self.hidden
        norms = 2 * self.hidden + (2 * self.head_dim if self.family == "qwen3" else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, a tied one once. Exact for the three families."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2) + self.positions * self.hidden
        final_norm = self.hidden * (2 if self.family == "gpt2" else 1)
        return self.layers * self.layer_parameters + embeddings + final_norm


def shape_of(model: Model) -> Shape | None:
    """The shape that the config's keys give; None for a pretrained model whose numbers nobody gave."""
    vocab = model.vocab_size
    if vocab is None:
        if model.name_or_path is not None:
            return None
        vocab = BYTES_TOKENIZER if model.tokenizer == "bytes" else 0
    return Shape(
        family=model.architecture, layers=model.num_layers, hidden=model.hidden_size, heads=model.num_heads,
        kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_heads,
        intermediate=model.intermediate_size, vocab=vocab, tied=model.tie_word_embeddings,
        positions=model.max_position_embeddings if model.architecture == "gpt2" else 0,
    )  # fmt: skip


def shape_from_json(found: Mapping[str, Any]) -> Shape | None:
    """The shape in a model folder's config.json; None where it is not one of a dense decoder that we know."""
    kind = found.get("model_type")
    try:
        if kind == "gpt2":
            hidden = int(found["n_embd"])
            return Shape(
                "gpt2", int(found["n_layer"]), hidden, int(found["n_head"]), int(found["n_head"]),
                hidden // int(found["n_head"]), int(found.get("n_inner") or 4 * hidden), int(found["vocab_size"]),
                bool(found.get("tie_word_embeddings", True)), int(found["n_positions"]),
            )  # fmt: skip
        if kind not in ("llama", "qwen3", "qwen2", "mistral"):
            return None
        hidden, heads = int(found["hidden_size"]), int(found["num_attention_heads"])
        return Shape(
            "qwen3" if kind == "qwen3" else "llama", int(found["num_hidden_layers"]), hidden, heads,
            int(found.get("num_key_value_heads") or heads), int(found.get("head_dim") or hidden // heads),
            int(found["intermediate_size"]), int(found["vocab_size"]), bool(found.get("tie_word_embeddings", False)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


# -------------------------------------------------------------------------------- activations and cache


def layer_bytes(shape: Shape, tokens: int, width: int) -> int:
    """What one decoder layer keeps for the backward pass of `tokens` tokens.

    width: bytes of a number. llama and qwen3, per token, as transformers computes them with sdpa or flash attention:
    each RMSNorm keeps its input in float32, the normalised input and its output; attention keeps queries, keys,
    values and its output; the MLP keeps gate, silu(gate), up and their product. gpt2: 17 numbers of the hidden width,
    Korthikanti 2022 ("Reducing Activation Recomputation"), section 4.1, without the attention scores.
    """
    h, q, k = shape.hidden, shape.queries, shape.keys
    if shape.family == "gpt2":
        return tokens * 17 * width * h
    layer = 2 * (4 * h + 2 * width * h) + width * (2 * q + 2 * k) + 4 * width * shape.intermediate
    if shape.family == "qwen3":  # queries and keys are normalised as well
        layer += (4 + width) * (q + k)
    return tokens * layer


def activation_bytes(shape: Shape, tokens: int, width: int, checkpointing: bool) -> int:
    """What the decoder keeps for the backward pass; the head is counted elsewhere. With checkpointing each layer keeps
    its input alone, and is computed again when its turn comes."""
    final_norm = tokens * (4 + 2 * width) * shape.hidden
    each = tokens * width * shape.hidden if checkpointing else layer_bytes(shape, tokens, width)
    return shape.layers * each + final_norm


def kv_cache_bytes(shape: Shape, tokens: int, width: int) -> int:
    """Keys and values of `tokens` tokens in all layers."""
    return 2 * shape.layers * shape.keys * width * tokens


def head_bytes(cfg: Config, shape: Shape, rows: int, width: int) -> int:
    """What turning the last hidden states into a loss takes beside them.

    TRL's fused head (all of its stable trainers) makes logits in tiles, and the head's gradient in float32. orpo and
    ppo hold logits, their softmax and its gradient: of all positions, and of the completions alone.
    """
    if cfg.stage == "rm":
        return 0
    if cfg.stage == "orpo":
        return 3 * width * rows * cfg.training.max_length * shape.vocab
    if cfg.stage == "ppo":
        return (width + 8) * rows * cfg.ppo.max_completion_length * shape.vocab
    tile = min(HEAD_TOKENS, rows * _row_tokens(cfg)) * min(HEAD_WORDS, shape.vocab) * width
    return tile + (0 if _lora_rank(cfg) else 4 * shape.embedding_parameters)


def _row_tokens(cfg: Config) -> int:
    """Tokens of the longest row. What a prompt adds to a completion is not known at submission."""
    if cfg.stage in SAMPLING:
        return int(getattr(cfg, cfg.stage).max_completion_length)
    return cfg.training.max_length


# ---------------------------------------------------------------------------------------- the estimate


def _lora_rank(cfg: Config) -> int | None:
    """Rank of LoRA adapters where the stage trains those alone."""
    return cfg.lora.r if cfg.stage in LORA_STAGES else None


def trained_parameters(cfg: Config, shape: Shape) -> int:
    """Parameters with gradients. LoRA on all linear layers (Hu 2021): r (in + out) each."""
    rank = _lora_rank(cfg)
    if rank is None:
        return shape.parameters
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    mlp = 2 * (h + i) if shape.family == "gpt2" else 3 * (h + i)
    return shape.layers * rank * (2 * (h + q) + 2 * (h + k) + mlp)


def frozen_models(cfg: Config) -> list[str]:
    """Models beside the trained one: reference and reward model. LoRA's reference is the model without adapters.

    ppo.value_init=rm alone counts for nothing: that reward model lends its head and never gets to the GPU.
    """
    section: Any = getattr(cfg, cfg.stage)
    compared = (
        cfg.stage == "ppo"
        or (cfg.stage in ("dpo", "kto") and not section.precompute_ref_log_probs)
        or (cfg.stage in ("grpo", "rloo") and section.beta != 0)
        or (cfg.stage in ("sft", "distill") and section.kl_coef != 0)
    )
    held = ["reference model"] if compared and _lora_rank(cfg) is None else []
    if cfg.stage == "ppo" and cfg.ppo.reward_model_weight:
        held.append("reward model")
    return held


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU by what they are for, at the moment when they are most."""

    moment: str  # the backward pass, the optimizer step or generation
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def text(self, most: int = 4) -> str:
        """The largest terms in words."""
        largest = sorted(self.terms.items(), key=lambda item: -item[1])[:most]
        return ", ".join(f"{name} {gib(n)}" for name, n in largest if n)


def gib(number: int) -> str:
    """An amount of memory in words."""
    return f"{number / GIB:.1f} GiB" if number >= 0.05 * GIB else f"{number / 1024**2:.1f} MiB"


ESTIMATED = ("base", "sft", "distill", "rm", "ppo", "dpo", "orpo", "kto", "grpo", "rloo", "eval")


def estimate(cfg: Config, shape: Shape) -> Estimate | None:
    """The least that one GPU must hold, at its worst moment; None for a stage without a model."""
    if cfg.stage not in ESTIMATED:
        return None
    width = BYTES[cfg.model.dtype]
    if cfg.stage == "eval":
        weights = width * shape.parameters
        if vllm_share(cfg) is not None:
            return Estimate("generation", {"weights": weights, "vLLM": _vllm_bytes(cfg)})
        new = cfg.eval.batch_size * cfg.eval.max_new_tokens
        return Estimate("generation", {"weights": weights, "KV cache": kv_cache_bytes(shape, new, width)})
    states, gradients = _states(cfg, shape, width)
    if vllm_share(cfg) is not None and not server_gpus(cfg):
        states["vLLM"] = _vllm_bytes(cfg)
    training = cfg.training
    rows = training.per_device_train_batch_size * (2 if cfg.stage in PAIRS else 1)
    tokens = rows * _row_tokens(cfg)
    backward = states | {"activations": activation_bytes(shape, tokens, width, training.gradient_checkpointing)}
    head, again = head_bytes(cfg, shape, rows, width), layer_bytes(shape, tokens, width)
    if training.gradient_checkpointing and again > head:  # one after the other
        backward["a layer computed again"] = again
    else:
        backward["logits and head"] = head
    moments = [Estimate("the optimizer step", states | gradients)]
    accumulation = accumulation_steps(cfg)
    moments.append(Estimate("the backward pass", backward | (gradients if accumulation > 1 else {})))
    if cfg.stage in SAMPLING:
        section = getattr(cfg, cfg.stage)
        batches = getattr(section, "steps_per_generation", None) or accumulation
        answers = training.per_device_train_batch_size * batches
        if vllm_share(cfg) is None:
            cache = kv_cache_bytes(shape, answers * section.max_completion_length, width)
            moments.append(Estimate("generation", states | {"KV cache": cache}))
    return max(moments, key=lambda e: e.total)


def _vllm_bytes(cfg: Config) -> int:
    """What vLLM takes of each GPU it is on: a share of all of it, for weights, activations and KV cache together."""
    return int((vllm_share(cfg) or 0) * (cfg.cluster.gpu_memory_gb or 0) * GIB)


def _states(cfg: Config, shape: Shape, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """What is held all the time, and gradients: bytes on one GPU by name."""
    strategy, ranks = cfg.parallel.strategy, world_size(cfg)
    trained = trained_parameters(cfg, shape)
    adapters = _lora_rank(cfg) is not None
    frozen = shape.parameters if adapters else 0  # of the trained model
    frozen_width = 0.5 if adapters and cfg.lora.quantize else width
    others = dict.fromkeys(frozen_models(cfg), width * shape.parameters)
    layer = width * max(shape.layer_parameters, shape.embedding_parameters)
    if strategy == "ddp":
        states = {"weights": width * trained + frozen_width * frozen, "optimizer state": 2 * width * trained}
        if ranks > 1:
            states["DDP's buckets"] = width * trained
        gradients = float(width * trained)
    elif strategy == "zero2":
        states = {"weights": width * trained + frozen_width * frozen, "optimizer state": 12 * trained / ranks}
        gradients = width * trained / ranks
    elif strategy == "zero3":
        states = {
            "weights": (width * trained + frozen_width * frozen) / ranks, "optimizer state": 12 * trained / ranks,
            "gathered layers": layer,
        }  # fmt: skip
        gradients = width * trained / ranks
        others = {name: n // ranks for name, n in others.items()}
    else:  # fsdp2
        states = {
            "weights": (4 * trained + frozen_width * frozen) / ranks, "optimizer state": 8 * trained / ranks,
            "gathered layers": layer,
        }  # fmt: skip
        gradients = 4 * trained / ranks
        others = {name: n // ranks for name, n in others.items()}
    if cfg.parallel.offload:
        states["optimizer state"] = gradients = 0
        if strategy == "zero3":
            states["weights"] = 0
            others = dict.fromkeys(others, 0)
    return {k: int(v) for k, v in (states | others).items()}, {"gradients": int(gradients)}


# ------------------------------------------------------------------------------------------- the check


def check(cfg: Config, shape: Shape | None) -> None:
    """Refuse what cannot fit into the cluster's GPUs. Raises ConfigError with the largest terms and what would fit."""
    limit = cfg.cluster.gpu_memory_gb
    if shape is None or limit is None or cfg.slurm.gpus_per_node == 0:
        return
    share, weights = vllm_share(cfg), BYTES[cfg.model.dtype] * shape.parameters
    if share is not None and weights > share * limit * GIB:
        where = f"{cfg.stage}{'' if cfg.stage == 'eval' else '.generation'}"
        problem = f"vLLM's share of {limit:g} GiB does not hold the weights alone, {gib(weights)}"
        least = math.ceil(100 * weights / (ROOM * limit * GIB)) / 100
        fix = f"{where}.gpu_memory_utilization={least:g}" if least <= 1 else f"{where}.backend=transformers"
        raise ConfigError(f"{where}.gpu_memory_utilization", share, problem, fix)
    needed = estimate(cfg, shape)
    if needed is None or needed.total <= limit * GIB:
        return
    problem = (
        f"{cfg.stage} of {shape.parameters / 1e9:.2f} B parameters needs at least {gib(needed.total)} on each GPU in "
        f"{needed.moment} ({needed.text()})"
    )
    raise ConfigError("cluster.gpu_memory_gb", f"{limit:g}", problem, what_fits(cfg, shape, limit))


def what_fits(cfg: Config, shape: Shape, limit: float) -> str:
    """The settings nearest to the given ones under which the estimate fits, as overrides."""
    for changed, overrides in _alternatives(cfg):
        found = estimate(changed, shape)
        if found is not None and found.total <= ROOM * limit * GIB:
            return " ".join(overrides)
    return "a smaller model, or a shorter training.max_length" + (
        "" if _lora_rank(cfg) or cfg.stage not in LORA_STAGES else ", or LoRA: lora.r=16"
    )


def _alternatives(cfg: Config) -> Iterator[tuple[Config, list[str]]]:
    """Other settings for the same training, those that cost least first: smaller forward passes, activations computed
    again, a model shared out further, more nodes."""
    if cfg.stage == "eval":
        size = cfg.eval.batch_size
        while size > 1:
            size //= 2
            yield _with(cfg, eval={"batch_size": size}), [f"eval.batch_size={size}"]
        return
    training, batch = cfg.training, cfg.training.effective_batch_size
    least = 2 if cfg.stage == "kto" else 1
    nodes = cfg.slurm.num_nodes
    sharing = [("ddp", False), ("zero2", False), ("zero3", False), ("zero3", True)]
    now = ("zero3" if cfg.parallel.strategy == "fsdp2" else cfg.parallel.strategy, cfg.parallel.offload)
    further = sharing[sharing.index(now) + 1 :] if now in sharing else [("zero3", True)]
    while nodes <= 64:
        ranks = nodes * (cfg.slurm.gpus_per_node - server_gpus(cfg))
        sizes = [d for d in range(training.per_device_train_batch_size, least - 1, -1) if batch % (d * ranks) == 0]
        for strategy, offload in [(cfg.parallel.strategy, cfg.parallel.offload), *(further if ranks > 1 else [])]:
            for checkpointing in dict.fromkeys((training.gradient_checkpointing, True)):
                for size in sizes:
                    overrides = []
                    if nodes != cfg.slurm.num_nodes:
                        overrides.append(f"slurm.num_nodes={nodes}")
                    if (strategy, offload) != (cfg.parallel.strategy, cfg.parallel.offload):
                        overrides.append(f"parallel={strategy}{'_offload' if offload else ''}")
                    if checkpointing != training.gradient_checkpointing:
                        overrides.append("training.gradient_checkpointing=true")
                    if size != training.per_device_train_batch_size:
                        overrides.append(f"training.per_device_train_batch_size={size}")
                    changed = _with(
                        cfg, slurm={"num_nodes": nodes}, parallel={"strategy": strategy, "offload": offload},
                        training={"gradient_checkpointing": checkpointing, "per_device_train_batch_size": size},
                    )  # fmt: skip
                    yield changed, overrides
        nodes *= 2
        if cfg.cluster.scheduler == "local":
            return


def _with(cfg: Config, **sections: Mapping[str, Any]) -> Config:
    return dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **values) for name, values in sections.items()}
    )
