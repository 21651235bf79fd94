"""What the stages share: the config and models of a run, the trainer's arguments, the finished output."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from conf.check import accumulation_steps, beyond, world_size
from conf.schema import Config
from post_training import data
from post_training.adapters import is_adapter, quantization
from post_training.data.source import DataError
from post_training.data.tokenizer import load_tokenizer, train_tokenizer
from post_training.run import manifest
from post_training.run.directory import RunDirectory, fsync_path
from post_training.stages.zero import fsdp_arguments, prepare_zero, zero_config

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Stage:
    """One stage to run: its config, its run directory and where its models come from."""

    cfg: Config
    run: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    model_path: str | None  # start model; None: from scratch
    reference_path: str | None  # frozen reference; None: the start model
    reward_model_path: str | None
    data_path: str | None = None  # output of a sample stage to train on; None: the data set

    @property
    def output_base(self) -> Path:
        """The folder of all pipelines, where prepared data is kept."""
        return self.run.root.parent.parent


NOT_IN_SCHEMA = ("version", "name", "identity", "inputs", "pipeline", "gate")
"""Keys of a frozen config that say what the run is, beside the Config that it was made from."""


def load_config(frozen: dict[str, Any]) -> Config:
    """The typed config of a frozen one. Raises OmegaConf's errors where it does not fit the schema."""
    values = {k: v for k, v in frozen.items() if k not in NOT_IN_SCHEMA}
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(cfg, Config)
    return cfg


def open_stage(run: RunDirectory) -> Stage:
    """Config, tokenizer and model paths of a run."""
    frozen = run.read_config()
    cfg = load_config(frozen)
    paths = {name: (source or {}).get("path") for name, source in frozen["inputs"].items()}
    train_own = paths["model"] is None and cfg.model.tokenizer == "train"
    if train_own:
        tokenizer = _own_tokenizer(cfg, run)
    else:
        tokenizer = load_tokenizer(cfg.model, paths["model"], cfg.data.system_prompt)
    return Stage(cfg, run, tokenizer, paths["model"], paths["reference"], paths["reward_model"], paths.get("data"))


def _own_tokenizer(cfg: Config, run: RunDirectory) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the stage's documents: by the first to come, and kept for all ranks and attempts."""
    folder = run.checkpoints / "tokenizer"  # where restart=true sets it aside
    if not folder.is_dir():
        assert cfg.model.vocab_size is not None
        texts = data.load(cfg.data).documents("train")["text"]
        partial = folder.with_name(f".tokenizer-{os.environ.get('RANK', '0')}-{os.getpid()}")
        train_tokenizer(iter(texts), cfg.model.vocab_size).save_pretrained(str(partial))
        try:
            partial.rename(folder)
        except OSError:  # another rank was first, with the same one
            shutil.rmtree(partial)
    return load_tokenizer(cfg.model, str(folder), cfg.data.system_prompt)


def finish(run: RunDirectory, partial: Path, **about: Any) -> None:
    """Turn a fully written folder into the run's output: manifest, then one rename."""
    frozen = run.read_config()
    manifest.write(partial, stage=frozen["stage"], identity=frozen["identity"], **about)
    partial.rename(run.model)
    fsync_path(run.root)


def dtype(cfg: Config) -> torch.dtype:
    return getattr(torch, cfg.model.dtype)


def build_model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Llama from `model.hidden_size` and its fellows, with random weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    model = cfg.model
    set_seed(cfg.seed)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), model.vocab_size or 0),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=model.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attention_dropout=model.dropout,
        attn_implementation=model.attn_implementation,
    )
    return LlamaForCausalLM(config).to(dtype(cfg))


def load_causal_lm(
    cfg: Config, path: str, tokenizer: PreTrainedTokenizerBase, trained: bool = False
) -> PreTrainedModel:
    """A causal LM from a folder or hub id, its embedding grown where the tokenizer has new tokens.

    trained: it is the one that the stage trains, so `lora.quantize` is for it. Raises DataError for an adapter.
    """
    from transformers import AutoModelForCausalLM, set_seed

    if is_adapter(path):
        raise DataError(
            f"inputs.model={path}: is an adapter, not a model\n  fix: merge it first, as in "
            f"python -m launchers.submit stage=merge merge.adapter={path} inputs.model=<its base>"
        )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype(cfg), attn_implementation=cfg.model.attn_implementation,
        **(quantization(cfg) if trained else {}),
    )  # fmt: skip
    if trained:
        require_positions(cfg, model, path)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        set_seed(cfg.seed)  # new rows are drawn; where they are not in checkpoints, every attempt draws the same
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def require_positions(cfg: Config, model: PreTrainedModel, path: str) -> None:
    """Refuse rows longer than a model with learned positions (gpt2) can read. Raises DataError."""
    learned = getattr(model.config, "n_positions", None)
    found = None if learned is None else beyond(cfg, learned)
    if found is not None:
        key, value, fits = found
        raise DataError(f"{key}={value}: {path} has positions for {learned} tokens\n  fix: {key}={fits}")


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its attention dropout off; its config keeps it, for the stages after this one.

    TRL switches dropout off where a reference or a margin is compared with, but reaches only nn.Dropout modules:
    in Llama and its like the dropout of attention is a number.
    """
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def load_reward_model(
    cfg: Config, path: str, tokenizer: PreTrainedTokenizerBase, trained: bool = False
) -> PreTrainedModel:
    """A scalar reward model: a causal LM's trunk with one output. A new head starts from the seed.

    trained: as for load_causal_lm.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(cfg.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=dtype(cfg), attn_implementation=cfg.model.attn_implementation,
        **(quantization(cfg) if trained else {}),
    )  # fmt: skip
    if trained:
        require_positions(cfg, model, path)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def trainer_arguments(stage: Stage, lr: float) -> dict[str, Any]:
    """Keyword arguments that every trainer's config takes, TrainingArguments and TRL's alike.

    To be made, and made into a config, before the models: under ZeRO-3 they are loaded in parts.
    Checkpoint rotation is ours (post_training.resume), since Trainer's own deletes the old checkpoint before
    the new one has its manifest.
    """
    cfg, training = stage.cfg, stage.cfg.training
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else each rank would be on a device "cpu:<rank>", which torch.load refuses on resume
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    zero = zero_config(cfg)
    if zero is not None:
        prepare_zero(cfg)
    precision = cfg.model.dtype  # autocast in the type that the weights are held in
    length: dict[str, Any] = {}
    if training.max_steps is not None:
        length["max_steps"] = training.max_steps
    elif training.num_training_samples is not None:
        # grpo and rloo ask each prompt several times: their batch counts completions, their length prompts
        samples_per_step = training.effective_batch_size // getattr(getattr(cfg, cfg.stage), "num_generations", 1)
        length["max_steps"] = -(-training.num_training_samples // samples_per_step)
    elif training.num_train_epochs is not None:
        length["num_train_epochs"] = training.num_train_epochs
    return {
        "output_dir": str(stage.run.checkpoints),
        **length,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation_steps(cfg),
        "learning_rate": lr,
        "lr_scheduler_type": training.lr_scheduler,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "torch_compile": training.torch_compile,
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "seed": cfg.seed,
        "logging_steps": cfg.logging.steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is nan is logged as such: a guardrail looks for it
        "report_to": [],  # post_training.tracking reports
        "run_name": f"{stage.run.pipeline}/{stage.run.name}",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": cfg.checkpointing.save_steps,
        "save_total_limit": None,
        "use_cpu": on_cpu,
        "deepspeed": zero,
        **fsdp_arguments(cfg),
        # a backend named in a single process makes accelerate look for a process group that is not there
        "ddp_backend": (cfg.parallel.backend or ("gloo" if on_cpu else "nccl")) if "WORLD_SIZE" in os.environ else None,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": cfg.parallel.timeout_minutes * 60,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_num_workers": cfg.training.dataloader_num_workers,
    }


def that_fit(stage: Stage, pairs: Dataset) -> Dataset:
    """The pairs for which training.max_length has room: for rm for all of both texts, else for prompt and some answer.

    TRL leaves the others out in rm, dpo and kto, and not in orpo, where the mean over no token of an answer is nan.
    """
    longest, tokenizer = stage.cfg.training.max_length, stage.tokenizer

    def count(messages: list[dict[str, str]], **how: Any) -> int:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]
        return len(ids) + (ids[:1] != [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)

    def fits(pair: dict[str, Any]) -> bool:
        if stage.cfg.stage == "rm":
            return all(count(pair["prompt"] + pair[side]) <= longest for side in ("chosen", "rejected"))
        return count(pair["prompt"], add_generation_prompt=True) < longest

    return pairs.select([number for number, pair in enumerate(pairs) if fits(pair)])


def with_room(stage: Stage, rows: Dataset) -> Dataset:
    """The rows to train on that fit. Says how many do not, in the data report too; DataError where none is left."""
    from post_training.data import mix

    kept = that_fit(stage, rows)
    if len(kept) < len(rows):
        why = f"leaves out {len(rows) - len(kept)} of {len(rows)} rows, whose prompt alone fills it"
        if not len(kept):
            raise DataError(f"training.max_length={stage.cfg.training.max_length}: {why}\n  fix: a longer one")
        print(f"{stage.cfg.stage}: training.max_length {why}", file=sys.stderr)
        report = mix.REPORTS[-1]
        report["too_long"] = report["rows"] * (len(rows) - len(kept)) // len(rows)  # kto has two rows a pair
    return kept


def held_out(stage: Stage, rows: Dataset) -> Dataset | None:
    """At most `eval.num_problems` pairs, judged once at the end of training; None where there is less than a batch.

    They fill whole batches on all ranks, so that the mean of the batches' figures is the mean of the rows'. Pairs that
    TRL would leave out, and thereby shift the others, are left out before.
    """
    training = stage.cfg.training
    rows = that_fit(stage, rows)
    at_once = training.per_device_train_batch_size * world_size(stage.cfg)
    count = min(len(rows), stage.cfg.eval.num_problems) // at_once * at_once
    return rows.select(range(count)) if count else None


def token_counts(rows: Dataset) -> list[int]:
    """Tokens of each prepared row; for a pair, of both texts, each with its prompt."""
    columns = next(c for c in TOKEN_COLUMNS if set(c) <= set(rows.column_names))
    return [sum(map(len, texts)) for texts in zip(*(rows[name] for name in columns), strict=True)]


TOKEN_COLUMNS = (
    ("input_ids",),  # base, sft
    ("prompt_ids", "completion_ids"),  # kto
    ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids"),  # dpo
    ("chosen_ids", "rejected_ids"),  # rm: they hold the prompt
    ("chosen_input_ids", "rejected_input_ids"),  # orpo: as in rm
)


def steps_for_tokens(cfg: Config, lengths: list[int]) -> int:
    """Optimizer steps until `training.num_training_tokens` prepared tokens were seen, at the mean row's length."""
    assert cfg.training.num_training_tokens is not None
    tokens_per_step = cfg.training.effective_batch_size * sum(lengths) / len(lengths)
    return max(1, round(cfg.training.num_training_tokens / tokens_per_step))


def samples_per_row(rows: Dataset) -> float:
    """Samples in a row of packed samples, on average."""
    return sum(map(len, rows["seq_lengths"])) / len(rows)


def steps_for_samples(cfg: Config, per_row: float) -> int:
    """Optimizer steps until `training.num_training_samples` samples were seen, where a row holds `per_row` of them."""
    assert cfg.training.num_training_samples is not None
    return max(1, math.ceil(cfg.training.num_training_samples / (cfg.training.effective_batch_size * per_row)))
