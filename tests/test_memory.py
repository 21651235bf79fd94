"""The memory estimate against real models, real optimizers and what autograd really keeps; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conf import memory
from conf.check import LORA_STAGES, ConfigError
from conf.memory import GIB, Shape
from conf.schema import Config, Model
from launchers.compose import CONF, Composer, groups
from launchers.selection import select

COMPOSER = Composer()
PUBLISHED = {
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "llama3_2_1b": 1_235_814_400, "llama3_1_8b": 8_030_261_248, "gpt2": 124_439_808,
}  # fmt: skip
"""Parameters of the published checkpoints."""


def model_file(name: str) -> Model:
    return Model(**yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()))


def config(*overrides: str, cluster: str = "h100") -> Config:
    return COMPOSER.config([f"cluster={cluster}", *overrides])


def transformers_config(model: Model) -> Any:
    if model.architecture == "gpt2":
        return GPT2Config(
            vocab_size=model.vocab_size, n_embd=model.hidden_size, n_layer=model.num_layers, n_head=model.num_heads,
            n_positions=model.max_position_embeddings, n_inner=model.intermediate_size,
        )  # fmt: skip
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[model.architecture](
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
        tie_word_embeddings=model.tie_word_embeddings,
    )  # fmt: skip


CLASSES = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gpt2": GPT2LMHeadModel}
SMALL = {
    "llama": Model(hidden_size=64, intermediate_size=192, num_layers=4, num_heads=8, num_kv_heads=4, vocab_size=128),
    "qwen3": Model(architecture="qwen3", hidden_size=64, intermediate_size=192, num_layers=4, num_heads=8,
                   num_kv_heads=4, head_dim=16, vocab_size=128, tie_word_embeddings=False),
    "gpt2": Model(architecture="gpt2", hidden_size=64, intermediate_size=256, num_layers=4, num_heads=8,
                  vocab_size=128, max_position_embeddings=128),
}  # fmt: skip


def small(family: str, dtype: torch.dtype = torch.float32) -> tuple[Shape, PreTrainedModel]:
    made = transformers_config(SMALL[family])
    made._attn_implementation = "sdpa"
    shape = memory.shape_of(SMALL[family])
    assert shape is not None
    return shape, CLASSES[family](made).to(dtype)


# --------------------------------------------------------------------------------- against what is real


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    model = model_file(name)
    shape = memory.shape_of(model)
    assert shape is not None and shape.parameters == PUBLISHED[name]
    about = transformers_config(model)
    with torch.device("meta"):
        built = CLASSES[model.architecture](about)
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED[name]
    assert memory.shape_from_json(about.to_dict()) == shape


def test_every_model_file_but_the_tiny_one_has_its_numbers() -> None:
    pretrained = {name for name in groups()["model"] if model_file(name).name_or_path is not None}
    assert pretrained == set(PUBLISHED)


@pytest.mark.parametrize("vocab", [None, 100, 320])
def test_from_scratch_the_model_has_the_shape_of_its_keys(vocab: int | None) -> None:
    """Grouped queries, a head width of its own, and an embedding padded beyond the tokenizer's 265 tokens."""
    from post_training.data.tokenizer import bytes_tokenizer
    from post_training.stages.common import build_model

    keys = ("model.num_heads=8", "model.num_kv_heads=2", "model.head_dim=24", f"model.vocab_size={vocab or 'null'}")
    cfg = config("stage=base", "model.dtype=float32", *keys)
    built = build_model(cfg, bytes_tokenizer())
    assert built.get_input_embeddings().num_embeddings == max(265, vocab or 0)
    assert built.model.layers[0].self_attn.k_proj.out_features == 2 * 24
    shape = memory.shape_of(cfg.model)
    assert shape is not None
    if vocab != 100:  # fewer than the tokenizer has are not believed
        assert shape.parameters == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (("model.num_heads=8", "model.num_kv_heads=3"), "model.num_kv_heads", "model.num_kv_heads=2"),
        (("model.architecture=qwen3",), "model.architecture", "model.architecture=llama"),
        (("model.architecture=qwen4",), "model.architecture", "qwen3"),
    ],
)
def test_shapes_that_cannot_be_are_refused(overrides: tuple[str, ...], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(["cluster=local", "stage=base", "pipeline=full", *overrides], only_one=True)
    assert caught.value.key == key and fix in caught.value.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SMALL)
def test_weights_gradients_and_optimizer_state_are_exact(family: str, dtype: torch.dtype) -> None:
    shape, model = small(family, dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(32).view(2, 16), labels=torch.arange(32).view(2, 16)).loss.backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    cfg = config("stage=sft", "slurm.gpus_per_node=1", f"model.dtype={str(dtype).removeprefix('torch.')}")
    states, gradients = memory._states(cfg, shape, dtype.itemsize)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert states == {"weights": size(model.parameters()), "optimizer state": size(moments)}
    assert gradients == {"gradients": size(p.grad for p in model.parameters() if p.grad is not None)}


def kept_for_backward(model: PreTrainedModel, tokens: torch.Tensor) -> int:
    """Bytes of all tensors that autograd keeps in a forward pass, weights left out; of the head, what goes into it."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(family: str, dtype: torch.dtype, checkpointing: bool) -> None:
    shape, model = small(family, dtype)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.arange(128).view(2, 64)
    measured = kept_for_backward(model, tokens)
    estimated = memory.activation_bytes(shape, tokens.numel(), dtype.itemsize, checkpointing)
    assert 0.95 * measured < estimated <= measured


def test_activations_of_gpt2_are_a_lower_bound() -> None:
    shape, model = small("gpt2")
    model.train()
    tokens = torch.arange(128).view(2, 64)
    estimated = memory.activation_bytes(shape, tokens.numel(), 4, checkpointing=False)
    assert 0.3 * kept_for_backward(model, tokens) < estimated < kept_for_backward(model, tokens)


@pytest.mark.parametrize("family", SMALL)
def test_kv_cache_is_exact(family: str) -> None:
    shape, model = small(family)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(48).view(2, 24), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.kv_cache_bytes(shape, 48, 4) == held


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora_trains_what_peft_trains(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    shape, model = small(family)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    cfg = config("stage=sft", "slurm.gpus_per_node=1", "lora.r=4")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.trained_parameters(cfg, shape) == trained
    states, gradients = memory._states(cfg, shape, 4)
    assert states["optimizer state"] == 8 * trained and gradients["gradients"] == 4 * trained
    assert states["weights"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stage", memory.ESTIMATED)
def test_adapters_count_where_a_stage_takes_them(stage: str) -> None:
    shape = memory.shape_of(SMALL["llama"])
    assert shape is not None
    few = memory.trained_parameters(config(f"stage={stage}", "lora.r=4"), shape)
    assert (few < shape.parameters) == (stage in LORA_STAGES)


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        (["stage=sft"], []),
        (["stage=sft", "sft.kl_coef=0.1"], ["reference model"]),
        (["stage=sft", "sft.kl_coef=0.1", "lora.r=4"], []),
        (["stage=distill", "sft.kl_coef=0.1"], []),
        (["stage=distill", "distill.kl_coef=0.1"], ["reference model"]),
        (["stage=distill", "distill.kl_coef=0.1", "lora.r=4"], []),
        (["stage=rm"], []),
        (["stage=orpo"], []),
        (["stage=dpo"], ["reference model"]),
        (["stage=dpo", "lora.r=4"], []),
        (["stage=dpo", "dpo.precompute_ref_log_probs=true"], []),
        (["stage=kto"], ["reference model"]),
        (["stage=kto", "kto.precompute_ref_log_probs=true"], []),
        (["stage=grpo", "grpo.beta=0"], []),
        (["stage=grpo", "grpo.beta=0.1"], ["reference model"]),
        (["stage=rloo", "rloo.beta=0.1"], ["reference model"]),
        (["stage=ppo"], ["reference model"]),
        (["stage=ppo", "lora.r=4"], []),
        (["stage=ppo", "ppo.reward_model_weight=1"], ["reference model", "reward model"]),
        (["stage=ppo", "ppo.reward_model_weight=0", "ppo.value_init=rm"], ["reference model"]),  # it lends its head
    ],
)
def test_models_beside_the_trained_one(overrides: list[str], held: list[str]) -> None:
    assert memory.frozen_models(config(*overrides)) == held


def test_zero_is_as_in_its_paper() -> None:
    """Rajbhandari 2020, figure 1: 7.5 B parameters on 64 GPUs take 16.6 GB under stage 2 and 1.9 GB under stage 3."""
    shape = Shape("llama", 1, 1, 1, 1, 1, 1, vocab=7_500_000_000, tied=True)
    gigabytes = {}
    for strategy in ("zero2", "zero3", "fsdp2", "zero3_offload"):
        cfg = config("stage=sft", "slurm.num_nodes=8", f"parallel={strategy}")
        states, gradients = memory._states(cfg, shape, 2)
        states.pop("gathered layers", None)
        gigabytes[strategy] = (sum(states.values()) + sum(gradients.values())) / 1e9
    assert gigabytes["zero2"] == pytest.approx(16.6, abs=0.05)
    assert gigabytes["zero3"] == pytest.approx(1.9, abs=0.05)
    assert gigabytes["fsdp2"] == pytest.approx(1.9, abs=0.05)
    assert gigabytes["zero3_offload"] == 0


# ------------------------------------------------------------------------------------- what is refused


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        select(["cluster=h100", "pipeline=full", *overrides], only_one=True)
    assert caught.value.key == "cluster.gpu_memory_gb"
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (("stage=sft", "model=qwen3_8b"), "activations"),
        (("stage=sft", "model=qwen3_8b", "slurm.gpus_per_node=1", "training.max_length=64",
          "cluster.gpu_memory_gb=48"), "optimizer state"),
        (("stage=dpo", "model=qwen3_8b", "parallel=zero3", "training.max_length=8192"), "activations"),
        (("stage=dpo", "model=llama3_1_8b", "parallel=zero2", "training.max_length=64",
          "cluster.gpu_memory_gb=32"), "reference model"),
        (("stage=ppo", "model=qwen3_4b", "inputs.reward_model=.", "ppo.reward_model_weight=1",
          "training.max_length=64", "ppo.max_completion_length=64", "parallel=zero2", "cluster.gpu_memory_gb=24",
          ), "reward model"),
        (("stage=grpo", "model=qwen3_8b", "parallel=zero3", "grpo.max_completion_length=32768",
          "training.gradient_checkpointing=true", "training.per_device_train_batch_size=1",
          "training.effective_batch_size=256"), "KV cache"),
        (("stage=eval", "model=qwen3_8b", "eval.max_new_tokens=8192"), "KV cache"),
        (("stage=orpo", "model=qwen3_0_6b", "training.max_length=4096"), "logits and head"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_and_the_fix_fits(overrides: tuple[str, ...], largest: str) -> None:
    error = refusal(*overrides)
    assert f"{largest} " in error.problem and "at least" in error.problem
    fixes = error.fix.split()
    assert all("=" in fix for fix in fixes), error.fix
    fixed = {fix.split("=")[0]: fix for fix in (*overrides, *fixes)}
    selection = select(["cluster=h100", "pipeline=full", *fixed.values()], only_one=True)
    assert len(selection.wanted) == 1


def test_where_nothing_would_fit_it_says_so() -> None:
    error = refusal("stage=sft", "model=qwen3_8b", "training.max_length=4000000", "training.effective_batch_size=8",
                    "training.per_device_train_batch_size=1")  # fmt: skip
    assert "smaller model" in error.fix and "training.max_length" in error.fix and "lora.r=16" in error.fix
    error = refusal("stage=base", "model=decoder_1_3b", "training.effective_batch_size=8", "cluster.gpu_memory_gb=0.1",
                    "training.per_device_train_batch_size=1")  # fmt: skip
    assert "smaller model" in error.fix and "lora" not in error.fix


def test_nothing_is_refused_that_is_not_known() -> None:
    for overrides in (
        ("model=qwen3_8b", "slurm.gpus_per_node=0"),  # no GPU
        ("model=qwen3_8b", "cluster.gpu_memory_gb=null"),
        ("model=qwen3_8b", "model.vocab_size=null"),  # of whatever shape the named model is
        ("model=qwen3_8b", "training.gradient_checkpointing=true"),
        ("model=qwen3_0_6b",),
    ):
        select(["cluster=h100", "pipeline=full", "stage=sft", *overrides], only_one=True)


def test_a_local_model_s_own_config_is_believed(tmp_path: Path) -> None:
    about = transformers_config(model_file("qwen3_8b")).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(about))
    folder = f"model.name_or_path={tmp_path}"
    assert "8.19 B" in refusal("stage=sft", "model=tiny", folder).problem
    assert "8.19 B" in refusal("stage=sft", "model=tiny", f"inputs.model={tmp_path}").problem
    for text in (json.dumps(about | {"model_type": "qwen3_moe"}), "{", "[]", '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(text)
        select(["cluster=h100", "pipeline=full", "stage=sft", "model=qwen3_8b", folder], only_one=True)


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "ppo", "kto"])
def test_more_sharing_never_needs_more_and_larger_batches_never_less(stage: str, model: str) -> None:
    shape = memory.shape_of(model_file(model))
    assert shape is not None

    def total(*overrides: str) -> int:
        found = memory.estimate(config(f"stage={stage}", "training.effective_batch_size=64", *overrides), shape)
        assert found is not None
        return found.total

    plain = ("training.per_device_train_batch_size=4",)
    sharing = [total(*plain, f"parallel={p}") for p in ("zero2", "zero3_offload")]
    assert sharing[0] >= sharing[1]
    assert total("training.per_device_train_batch_size=2") <= total(*plain)
    assert total(*plain, "training.gradient_checkpointing=true") <= total(*plain)


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", groups()["recipe"])
def test_every_recipe_composes_and_fits_without_a_hub(name: str) -> None:
    selection = select([f"recipe={name}", "cluster=h100", "pipeline=rlhf", "offline=false"], only_one=True)
    stage = name.split("_")[-1] if not name.endswith("nodes") else name.split("_")[-2]
    (only,) = selection.wanted
    cfg = selection.config(only)
    nodes = int(name.split("_")[-1].removesuffix("nodes")) if name.endswith("nodes") else 1
    assert (cfg.stage, cfg.slurm.num_nodes, cfg.slurm.gpus_per_node) == (stage, nodes, 8)
    shape = memory.shape_of(cfg.model)
    assert shape is not None and name.startswith(next(n for n in PUBLISHED if name.startswith(n)))
    found = memory.estimate(cfg, shape)
    assert found is not None and found.total < 0.8 * 80 * GIB


def test_a_recipe_for_one_stage_of_a_pipeline_and_keys_over_it() -> None:
    tokens = ["cluster=h100", "model=qwen3_8b", "parallel=zero3", "training.gradient_checkpointing=true",
              "training.per_device_train_batch_size=2", "++stages.sft.choices.recipe=qwen3_8b_sft_2nodes",
              "++stages.sft.training.max_length=1024", "pipeline=dpo"]  # fmt: skip
    selection = select(tokens, only_one=False)
    assert selection.config("sft").slurm.num_nodes == 2 and selection.config("dpo").slurm.num_nodes == 1
    assert selection.config("sft").training.max_length == 1024
    from launchers.compose import rewrite

    assert rewrite("sft.recipe=qwen3_8b_sft_2nodes") == "++stages.sft.choices.recipe=qwen3_8b_sft_2nodes"
