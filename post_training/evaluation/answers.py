"""Who answers: transformers or vLLM, greedily or by sampling. An answer is [token ids, whether it was cut]."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.schema import Eval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = list[Any]
"""[ids, cut]: token ids up to the end of the turn; cut: it ended at eval.max_new_tokens without an end of its own."""
Answerer = Callable[[Sequence[str], int, float, int], list[list[Answer]]]
"""(texts of prompts, answers to each, temperature, seed) -> the answers to each; at temperature 0 greedily."""


def rendered(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[str]:
    """Prompts, each a list of messages, as the chat template writes them, with the answer's start."""
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    return str(tokenizer.decode(answer[0], skip_special_tokens=True))


def _answer(ids: list[int], eos: int) -> Answer:
    return [ids[: ids.index(eos)], False] if eos in ids else [ids, True]


@torch.no_grad()
def by_transformers(
    model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int,
    texts: Sequence[str], count: int, temperature: float, seed: int,
) -> list[list[Answer]]:  # fmt: skip
    """An Answerer once its first three arguments are bound. All of `texts` are one batch, padded on the left.

    Sampled answers depend on the batch and its seed: the same batch and seed give the same answers.
    """
    from transformers import set_seed

    tokenizer.padding_side = "left"
    batch = tokenizer(list(texts), add_special_tokens=False, padding=True, return_tensors="pt").to(model().device)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature:
        set_seed(seed)
        # top_k, top_p: those of the model's generation_config would make pass@k another figure for each model
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": count}
    out = model().generate(
        **batch, **drawn, max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    eos = tokenizer.eos_token_id
    found = [_answer(ids, eos) for ids in out[:, batch["input_ids"].shape[1] :].tolist()]
    return [found[i : i + count] for i in range(0, len(found), count)]


def by_vllm(
    model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, how: Eval, longest: int,
    pulse: Callable[..., None],
) -> Answerer:  # fmt: skip
    """An Answerer by vLLM, which is given the model's weights when it is first asked. It batches as its memory allows.

    longest: tokens of the longest prompt. pulse: called before each of its steps.
    """

    @cache
    def engine() -> Any:
        from post_training.vllm_engine import Engine, write_config

        ready = model()
        settings = {
            "dtype": str(ready.dtype).removeprefix("torch."),
            "gpu_memory_utilization": how.gpu_memory_utilization,
            "max_model_len": longest + how.max_new_tokens,
            "max_num_seqs": how.batch_size,
        }
        with tempfile.TemporaryDirectory(prefix="engine-") as folder:
            write_config(ready, Path(folder))
            made = Engine(folder, settings)
        made.load((name, value.detach()) for name, value in ready.named_parameters())
        made.before_each_step(pulse)
        return made

    def ask(texts: Sequence[str], count: int, temperature: float, seed: int) -> list[list[Answer]]:
        eos = tokenizer.eos_token_id
        asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts for _ in range(count)]
        sampling = {"temperature": temperature, "max_tokens": how.max_new_tokens, "stop_token_ids": [eos]}
        found = [_answer(ids, eos) for ids in engine().generate(asked, sampling, seed)[0]]
        return [found[i : i + count] for i in range(0, len(found), count)]

    return ask
