"""What a model makes of given tokens: their negative log-likelihood, its distance from another model, its rewards.

Rows are [token ids, mask]; a mask's 1 marks a token that is judged. The first token of a row is never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = list[list[int]]
LOGITS = 2**28
"""Logits of one forward pass: 1 GiB of them in float32."""


# ------------------------------------------------------------------------------------------------- rows


def documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int) -> list[Row]:
    """Documents, each with its end, cut at `width` tokens."""
    rows = [(tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])[:width] for t in texts]
    return [[ids, [1] * len(ids)] for ids in rows]


def demonstrations(conversations: Sequence[Any], tokenizer: PreTrainedTokenizerBase, width: int) -> list[Row]:
    """Conversations, each a list of messages, whose answers are judged; cut at `width` tokens."""
    rows = []
    for messages in conversations:
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        rows.append([list(marked["input_ids"])[:width], list(marked["assistant_masks"])[:width]])
    return rows


def pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, width: int) -> list[list[Row]]:
    """[chosen, rejected] of each preference pair, each a row whose answer is judged, cut at `width` as in training."""

    def row(prompt: Any, answer: Any) -> Row:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"][:width]
        return [list(ids), [int(i >= len(before)) for i in range(len(ids))]]

    return [[row(r["prompt"], r[side]) for side in ("chosen", "rejected")] for r in rows]


def at_once(batch_size: int, longest: int, vocabulary: int) -> int:
    """Rows of one forward pass: a quarter of those that are generated together, and no more than LOGITS allows."""
    return max(1, min(batch_size // 4, LOGITS // max(1, longest * vocabulary)))


# ---------------------------------------------------------------------------------------------- policies


def _batch(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and mask of the judged ones, each [rows, longest], padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    lists = (
        [ids + [pad] * (width - len(ids)) for ids, _ in rows],
        [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
        [mask + [0] * (width - len(mask)) for _, mask in rows],
    )
    ids, attention, keep = (torch.tensor(values, device=model.device) for values in lists)
    return ids, attention, keep


@torch.no_grad()
def likelihoods(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> list[list[float]]:
    """[negative log-likelihood, nats, of a row's judged tokens; how many these are] of each row of a batch."""
    ids, attention, keep = _batch(model, rows, pad)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    found = []
    for i in range(len(rows)):  # a row at a time: float32 copies of a whole batch of logits take gigabytes
        nll = torch.nn.functional.cross_entropy(logits[i].float(), ids[i, 1:], reduction="none")
        kept = keep[i, 1:]
        found.append([float((nll * kept).sum()), int(kept.sum())])
    return found


@torch.no_grad()
def divergences(model: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[Row], pad: int) -> list[list[float]]:
    """[KL(model || reference), nats, summed over a row's judged tokens; how many these are] of each row of a batch.

    Exact at each token: sum over the whole vocabulary of p (log p - log q), in float32 from both models' logits.
    """
    ids, attention, keep = _batch(model, rows, pad)
    ours, theirs = (m(input_ids=ids, attention_mask=attention).logits[:, :-1] for m in (model, reference))
    found = []
    for i in range(len(rows)):
        where = keep[i, 1:].bool()
        log_p, log_q = (logits[i][where].float().log_softmax(-1) for logits in (ours, theirs))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # below it by rounding alone
        found.append([float(kl.sum()), int(where.sum())])
    return found


def preferred(
    model: PreTrainedModel, reference: PreTrainedModel, two: Sequence[Sequence[Row]], pad: int
) -> list[float]:
    """By how many nats the model prefers chosen to rejected more than the reference does, for each of these pairs.

    log p(c) - log q(c) - (log p(r) - log q(r)): DPO's implicit reward, over beta (arXiv:2305.18290, eq. 5).
    """
    rows = [row for both in two for row in both]
    ours, theirs = ([-nll for nll, _ in likelihoods(m, rows, pad)] for m in (model, reference))
    gains = [p - q for p, q in zip(ours, theirs, strict=True)]
    return [gains[i] - gains[i + 1] for i in range(0, len(gains), 2)]


# ------------------------------------------------------------------------------------------ reward models


@torch.no_grad()
def rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[float]:
    """A reward model's scores of a batch of texts."""
    batch = tokenizer(
        list(texts), add_special_tokens=False, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return model(**batch.to(model.device)).logits[:, 0].float().tolist()  # type: ignore[no-any-return]
