"""LoRA and QLoRA (Hu 2021; Dettmers 2023): a stage trains small adapters, and hands on a plain model with them merged.

Checkpoints hold the adapters alone, and the start model is read again by every attempt. The output is made by merging
into the start model as it is in its files: under QLoRA too, where only training saw it in four bits.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.schema import Config
from post_training.data.source import DataError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from post_training.stages.common import Stage

FOLDER = "adapter"
"""Where the adapter lies in an output, beside the merged model."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def quantization(cfg: Config) -> dict[str, Any]:
    """Keyword arguments with which from_pretrained holds the start model in four bits; none where it shall not."""
    if cfg.lora.r is None or cfg.lora.quantize is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"lora.quantize={cfg.lora.quantize}: bitsandbytes cannot be used here: {str(error).splitlines()[0]}\n"
            "  fix: pip install '.[qlora]' in the project's folder, or lora.quantize=null"
        ) from error
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    return {
        "device_map": {"": PartialState().local_process_index if torch.cuda.is_available() else "cpu"},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=cfg.lora.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, cfg.model.dtype),
        ),
    }


def lora_config(stage: Stage, model: PreTrainedModel, task: str = "CAUSAL_LM") -> LoraConfig | None:
    """TRL's `peft_config` of a stage; None where all weights are trained. task: CAUSAL_LM or SEQ_CLS.

    Tokens that the start model has never seen (a chat template's) have random embeddings: their rows are trained too.
    Raises DataError for layers that the model does not have.
    """
    cfg = stage.cfg.lora
    if cfg.r is None:
        return None
    from peft import LoraConfig

    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or _is_conv(m)}
    wanted = cfg.target_modules
    if wanted != "all-linear":
        unknown = [name for name in wanted if name not in linear]
        if unknown:
            raise DataError(
                f"lora.target_modules={', '.join(unknown)}: {stage.model_path} has no such layer; it has "
                f"{', '.join(sorted(linear))}\n  fix: lora.target_modules=all-linear, or a list of these"
            )
    new = new_tokens(stage)
    rows: dict[str, list[int]] = {}
    if new:
        names = {id(module): name for name, module in model.named_modules()}
        rows[names[id(model.get_input_embeddings())]] = new
        head = model.get_output_embeddings()
        if head is not None and not model.config.tie_word_embeddings:
            rows[names[id(head)]] = new
    return LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        trainable_token_indices=rows or None,
        task_type=task,
    )


def _is_conv(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layers


def new_tokens(stage: Stage) -> list[int]:
    """Ids of tokens in the stage's tokenizer that the start model's own tokenizer lacks."""
    from transformers import AutoTokenizer

    assert stage.model_path is not None
    before = AutoTokenizer.from_pretrained(stage.model_path).get_vocab()
    return sorted(i for token, i in stage.tokenizer.get_vocab().items() if token not in before)


# ------------------------------------------------------------------------------------------------ merging


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Whatever is drawn inside, training goes on as if it had not been."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


def save_merged(trainer: Trainer, folder: Path) -> None:
    """Write a plain model into `folder`, and the adapter into its `adapter/`. Every rank calls it.

    The model in training is left as it is: merging into it and out again would change its bits.
    """
    trainer.save_model(str(folder / FOLDER))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        merge_own(trainer.accelerator.unwrap_model(trainer.model), folder, trainer.processing_class)


def merge_own(trained: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the start model of `trained` into `folder`, with the adapter merged that lies in its `adapter/`."""
    for name in ("training_args.bin", "README.md"):
        (folder / FOLDER / name).unlink(missing_ok=True)
    about: Any = trained.peft_config["default"]
    path, task = about.base_model_name_or_path, about.task_type
    merge(path, folder / FOLDER, folder, dtype=trained.dtype, tokenizer=tokenizer, task=task)


def merge(
    path: str,
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    task: str = "CAUSAL_LM",
) -> None:
    """Write the model at `path` with the adapter merged into it, in `dtype`, and the tokenizer, into `folder`.

    Raises DataError where the adapter is of another model, or holds infinities or NaNs.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader, more = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if task == "SEQ_CLS" else (AutoModelForCausalLM, {})
    )
    with randomness_kept(), _whole_models():
        model = loader.from_pretrained(path, dtype=dtype, **more)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        if task != "SEQ_CLS":
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        check_fits(adapter, model, path)
        try:
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
        except ValueError as error:  # peft's word for NaNs
            raise DataError(
                f"{adapter}: cannot be merged into {path}: {str(error).splitlines()[0]}\n"
                "  fix: train it again with a smaller learning rate"
            ) from error
        merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def check_fits(adapter: Path, model: PreTrainedModel, path: str) -> None:
    """Refuse an adapter whose layers the model does not have, or has in other shapes. Raises DataError."""
    import json

    from safetensors import safe_open

    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise DataError(
            f"{adapter}: holds no adapter ({CONFIG} and {WEIGHTS})\n  fix: the folder that peft or an sft stage wrote"
        )
    made_for = json.loads((adapter / CONFIG).read_text()).get("base_model_name_or_path")
    fix = f"inputs.model={made_for}, the model it was trained on" if made_for else "the model that it was trained on"
    modules = dict(model.named_modules())
    with safe_open(adapter / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            layer, side, _ = name.removeprefix("base_model.model.").rpartition(".lora_A.")
            if not side:
                layer, side, _ = name.removeprefix("base_model.model.").rpartition(".lora_B.")
            if not side:
                continue
            theirs = file.get_slice(name).get_shape()
            weight = getattr(modules.get(layer), "weight", None)
            if weight is None:
                problem = f"has no layer {layer}"
            else:
                ours = list(weight.shape)[::-1] if _is_conv(modules[layer]) else list(weight.shape)  # (out, in)
                wanted, found = (ours[1], theirs[1]) if side == ".lora_A." else (ours[0], theirs[0])
                if wanted == found:
                    continue
                what = "inputs" if side == ".lora_A." else "outputs"
                problem = f"has {wanted} {what} in {layer}, the adapter {found}"
            raise DataError(f"{adapter}: is an adapter for another model: {path} {problem}\n  fix: {fix}")


@contextlib.contextmanager
def _whole_models() -> Iterator[None]:
    """Under ZeRO-3 transformers would load a model in parts on all ranks; here one rank loads all of it."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
