"""The model that is judged: whether it can be, and how it is loaded. What cannot be is a DataError, with the fix."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from post_training.data.source import DataError
from post_training.run import manifest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel

    from post_training.stages.common import Stage


def config_of(path: str) -> PretrainedConfig:
    """A model's config. Raises DataError for a folder that is not a whole model."""
    from transformers import AutoConfig

    if (why := unusable(Path(path))) is not None:
        raise DataError(f"inputs.model={path}: {why}\n  fix: give a complete model, or let its stage finish")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if not Path(path).is_dir():
            raise  # a hub that does not answer may answer the next attempt
        first = str(error).strip().splitlines()[0]
        raise DataError(f"inputs.model={path}: config.json: {first}\n  fix: give a complete model") from error


def unusable(folder: Path) -> str | None:
    """Why a local folder is no whole model; None where it is one, or no folder."""
    if not folder.is_dir() or (folder / "adapter_config.json").is_file():  # an adapter: load_causal_lm has better words
        return None
    if (folder / manifest.NAME).is_file() and (why := manifest.problem(folder)) is not None:
        return f"is not whole: {why}"
    if not (folder / "config.json").is_file():
        return "has no config.json"
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is damaged"
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"is not whole: {missing[0]} is missing"
    return None if [*folder.glob("*.safetensors"), *folder.glob("*.bin")] else "has no weights (*.safetensors)"


def loaded(
    load: Callable[..., PreTrainedModel], stage: Stage, path: str, pulse: Callable[..., None]
) -> PreTrainedModel:
    """A model ready to be asked. Raises DataError where its weights are cut off."""
    from safetensors import SafetensorError

    try:
        model = load(stage.cfg, path, stage.tokenizer)
    except SafetensorError as error:
        raise DataError(f"inputs.model={path}: its weights cannot be read: {error}\n  fix: a complete model") from error
    model.register_forward_pre_hook(pulse)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]


def require_template(stage: Stage) -> None:
    """Raise DataError where questions are to be asked of a model whose tokenizer says not how.

    Training gives such a model a template, and learns its tokens; to judge it by tokens that it never saw says nothing.
    """
    assert stage.model_path is not None
    if stage.cfg.model.chat_template is None and not _own_template(stage.model_path):
        raise DataError(
            f"model.chat_template=null: {stage.model_path} has no chat template, and data.name={stage.cfg.data.name} "
            "asks it questions\n  fix: model.chat_template=chatml, or another one that it was trained with; "
            "or data=text data.path=<documents>, which are read and not asked"
        )


@cache
def _own_template(path: str) -> bool:
    from transformers import AutoTokenizer

    return bool(AutoTokenizer.from_pretrained(path).chat_template)


def require_positions(config: PretrainedConfig, key: str, value: object, longest: int, fix: str) -> None:
    """Raise DataError where `longest` tokens are more than a model with learned positions (gpt2) can read."""
    learned = getattr(config, "n_positions", None)
    if learned is not None and longest > learned:
        problem = f"up to {longest} tokens, and the model has positions for {learned}"
        raise DataError(f"{key}={value}: {problem}\n  fix: {fix}")


def first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(len(rows), count)))


def say(text: str) -> None:
    print(f"eval: {text}", file=sys.stderr, flush=True)
