"""The tokenizer of from-scratch models, and the pipeline's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

THINK_ANSWER = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Turns between role tokens; `{% generation %}` marks what is trained: what the assistant says, its end included."""


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


def load_tokenizer(cfg: Model, start_model: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a stage's start model, or a new one where there is none.

    A tokenizer with a chat template keeps it; one without gets `model.chat_template`. Raises ValueError when
    it has neither padding nor an end-of-text token.
    """
    from transformers import AutoTokenizer

    if start_model is None and cfg.tokenizer == "bytes":
        return bytes_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(start_model or cfg.tokenizer)
    if tokenizer.eos_token is None:
        raise ValueError(f"model.tokenizer={cfg.tokenizer}: has no end-of-text token; set one in its files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and cfg.chat_template is not None:
        if cfg.chat_template == "think_answer":
            missing = [t for t in (USER, ASSISTANT, SYSTEM, END, *TAGS) if t not in tokenizer.get_vocab()]
            tokenizer.add_special_tokens({"additional_special_tokens": [t for t in missing if t not in TAGS]})
            tokenizer.add_tokens([t for t in missing if t in TAGS])
            tokenizer.eos_token = END
            tokenizer.chat_template = THINK_ANSWER
        else:
            tokenizer.chat_template = Path(cfg.chat_template).read_text(encoding="utf-8")
    return tokenizer
