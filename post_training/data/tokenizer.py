"""The tokenizer of a stage: of its start model, or that of from-scratch models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import Model
from post_training.data.source import DataError
from post_training.data.templates import ASSISTANT, END, SYSTEM, TAGS, THINK_ANSWER, USER, choose, set_system_prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PAD = "<|pad|>"


def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes, five role tokens and the four think/answer tags: reads any text and needs no file.

    The tags are ordinary tokens, so they stay in decoded text, where the verifier looks for them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most `vocab_size` tokens, trained on `texts`: the same tokenizer for the same texts.

    Digits stay single, so that numbers are written in one way; role tokens and tags are as in `bytes_tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len((PAD, END, USER, ASSISTANT, SYSTEM, *TAGS)),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        ),
    )
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """With role tokens, tags, and the chat template that uses them."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, END, USER, ASSISTANT, SYSTEM)])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        chat_template=THINK_ANSWER,
    )


def load_tokenizer(cfg: Model, start_model: str | None, system_prompt: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a stage's start model, or a new one where there is none.

    Its chat template is what `model.chat_template` says (templates.choose), with the system prompt in it. Raises
    DataError when there is no tokenizer, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if start_model is None and cfg.tokenizer == "bytes":
        tokenizer = bytes_tokenizer()
    else:
        key, path = ("model.tokenizer", cfg.tokenizer) if start_model is None else ("the start model", start_model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            if not (Path(path).exists() or os.environ.get("HF_HUB_OFFLINE")):
                raise  # a hub that does not answer may answer the next attempt
            first = str(error).strip().splitlines()[0]
            raise DataError(
                f"{key}={path}: its tokenizer cannot be loaded: {first}\n"
                "  fix: a folder or hub id with tokenizer files; with offline=true: python -m launchers.prefetch first"
            ) from error
    if tokenizer.eos_token is None:
        path = start_model or cfg.tokenizer
        raise DataError(
            f"{path}: its tokenizer has no end-of-text token\n"
            f'  fix: give "eos_token" in {path}/tokenizer_config.json, or another model'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    choose(tokenizer, cfg.chat_template)
    set_system_prompt(tokenizer, system_prompt)
    return tokenizer
