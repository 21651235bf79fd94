"""Evaluation: the interval, repetition, perplexity and greedy answers against written-out references."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from post_training.data.tokenizer import bytes_tokenizer
from post_training.stages import eval as judge


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------- interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(successes: int, trials: int, low: float, high: float) -> None:
    assert judge.wilson_interval(successes, trials, z=1.959964) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 5000), share=st.floats(0, 1), z=st.floats(0.5, 4))
def test_wilson_bounds_solve_their_equation(trials: int, share: float, z: float) -> None:
    """Each bound p solves (k/n - p)^2 = z^2 p (1 - p) / n: the normal test that just does not reject p."""
    getcontext().prec = 40
    successes = round(trials * share)
    low, high = judge.wilson_interval(successes, trials, z)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1
    for bound in (low, high):
        p, n = Decimal(bound), Decimal(trials)
        difference = (Decimal(successes) / n - p) ** 2 - Decimal(z) ** 2 * p * (1 - p) / n
        slope = 2 * abs(Decimal(successes) / n - p) + Decimal(z) ** 2 * abs(1 - 2 * p) / n
        assert abs(difference) <= Decimal("1e-13") * max(slope, Decimal(1))
    assert high - low > 1e-6  # and they are the two solutions, not one twice


@given(trials=st.integers(1, 1000), share=st.floats(0, 1))
def test_wilson_interval_mirrors(trials: int, share: float) -> None:
    successes = round(trials * share)
    low, high = judge.wilson_interval(successes, trials)
    assert judge.wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


# ------------------------------------------------------------------------------------------ repetition


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([], 4, 0.0),
        ([1, 2, 3], 4, 0.0),
        ([1, 2, 3, 4], 4, 0.0),
        ([1, 2, 3, 4, 5, 6], 4, 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),
        ([7] * 10, 4, 6 / 7),
        ([1, 2, 1, 2, 1, 2], 2, 3 / 5),
        ([1, 1, 2, 2], 1, 2 / 4),
    ],
)
def test_repetition(ids: list[int], n: int, share: float) -> None:
    assert judge.repetition(ids, n) == pytest.approx(share)


@given(st.lists(st.integers(0, 3)), st.integers(1, 5))
def test_repetition_counts_what_occurred_before(ids: list[int], n: int) -> None:
    grams = [ids[i : i + n] for i in range(len(ids)) if i + n <= len(ids)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert judge.repetition(ids, n) == pytest.approx(again / len(grams) if grams else 0.0)


# ------------------------------------------------------------------------------------------ tiny models


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def config(**changes: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=265, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.4, pad_token_id=256, eos_token_id=257, bos_token_id=None,
        attn_implementation="sdpa", **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """In float64, so that padding moves no logit by as much as two differ."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(config(tie_word_embeddings=True)).double().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[257] *= 2.5  # the end's logit varies most, so that some answers end soon
    return model


def nll(model: LlamaForCausalLM, ids: list[int], mask: list[int]) -> tuple[float, int]:
    """Written out: one row, one token at a time, no padding and no batch."""
    total, count = 0.0, 0
    for i in range(1, len(ids)):
        if not mask[i]:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].tolist()
        highest = max(logits)
        total -= logits[ids[i]] - highest - math.log(sum(math.exp(x - highest) for x in logits))
        count += 1
    return total, count


ROWS = [
    ([1, 2, 3, 4, 5, 257], [1] * 6),
    ([9, 8, 7], [1] * 3),
    ([5] * 12, [0] * 6 + [1] * 6),
    ([4, 200, 31, 77, 257], [0, 0, 1, 0, 1]),
    ([11, 12], [0, 0]),
    ([42], [1]),
]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_perplexity_is_that_of_all_kept_tokens_together(model: LlamaForCausalLM, batch_size: int) -> None:
    sums = [nll(model, ids, mask) for ids, mask in ROWS]
    expected = math.exp(sum(t for t, _ in sums) / sum(c for _, c in sums))
    # judged in float32 at the end, hence the tolerance
    assert judge.perplexity(model, ROWS, batch_size, pad_token_id=256) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_an_even_guess_is_the_vocabulary() -> None:
    model = LlamaForCausalLM(config()).double().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert judge.perplexity(model, ROWS, 8, pad_token_id=256) == pytest.approx(265, rel=1e-5)


PROMPTS = ["1+1=?", "12+34=?", "a much longer question than the others, which pads them all: 99+99=?", "7", "", "é日本"]


def chats(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": t}] for t in texts]


@pytest.fixture(scope="module")
def one_by_one(model: LlamaForCausalLM, tokenizer) -> list[list[int]]:
    """Greedy decoding written out: the whole text again for each token, no cache, no padding."""
    found = []
    for chat in chats(PROMPTS):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) - start < 24:
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        found.append(ids[start:])
    lengths = {len(ids) for ids in found}
    assert 24 in lengths and len(lengths) > 2, "the model must end some answers, at different lengths"
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_greedy_answers_do_not_depend_on_the_batch(
    model: LlamaForCausalLM, tokenizer, one_by_one: list[list[int]], batch_size: int
) -> None:
    answers = judge.greedy_answers(model, tokenizer, chats(PROMPTS), max_new_tokens=24, batch_size=batch_size)
    assert [ids for _, ids in answers] == one_by_one
    assert [text for text, _ in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in one_by_one]


def test_greedy_answers_are_those_of_generate(model: LlamaForCausalLM, tokenizer) -> None:
    answers = judge.greedy_answers(model, tokenizer, chats(PROMPTS), max_new_tokens=24, batch_size=4)
    for chat, (_, ids) in zip(chats(PROMPTS), answers, strict=True):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**batch, do_sample=False, max_new_tokens=24, eos_token_id=257, pad_token_id=256)
        alone = out[0, batch["input_ids"].shape[1] :].tolist()
        assert ids == (alone[: alone.index(257)] if 257 in alone else alone)


def test_reward_scores_do_not_depend_on_the_batch(tokenizer) -> None:
    torch.manual_seed(4)
    model = LlamaForSequenceClassification(config(num_labels=1)).double().eval()
    texts = [
        tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "7"}], tokenize=False)
        for chat in chats(PROMPTS)
    ]
    expected = []
    for text in texts:  # written out: the head on the last token's hidden state
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            expected.append(float(model.score(model.model(input_ids=ids).last_hidden_state[0, -1])))
    for batch_size in (1, 3, 100):
        assert judge._reward_scores(model, tokenizer, texts, batch_size, 128) == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_chunks_are_the_whole_in_order(items: list[int], size: int) -> None:
    chunks = list(judge._chunks(items, size))
    assert [i for chunk in chunks for i in chunk] == items
    assume(items)
    assert all(len(c) == size for c in chunks[:-1]) and 0 < len(chunks[-1]) <= size


# ----------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand() -> None:
    """Two pairs of confidence 0.9, one of them right; one of 0.6, which is right: (0.8 + 0.4) / 3, as written out."""
    margins = [math.log(9), -math.log(9), math.log(1.5)]
    figures = judge.calibration(margins)
    assert figures["calibration_error"] == pytest.approx((abs(1 - 0.9 + 0 - 0.9) + abs(1 - 0.6)) / 3)
    assert figures["brier"] == pytest.approx((0.1**2 + 0.9**2 + 0.4**2) / 3)
    assert judge.calibration([0.0, 0.0]) == {"brier": 0.25, "calibration_error": 0.0}
    assert judge.calibration([1000.0, -1000.0]) == {"brier": 0.5, "calibration_error": 0.5}


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=60), st.integers(1, 15))
def test_calibration_error_bin_by_bin(margins: list[float], bins: int) -> None:
    total = 0.0
    for k in range(bins):
        low, high = 0.5 + k / (2 * bins), 0.5 + (k + 1) / (2 * bins)
        inside = []
        for m in margins:
            confidence = 1 / (1 + math.exp(-abs(m)))
            assume(all(abs(confidence - edge) > 1e-9 for edge in (low, high)) or m == 0)
            if low <= confidence < high or (k == bins - 1 and confidence >= high):
                inside.append((confidence, 1.0 if m > 0 else 0.5 if m == 0 else 0.0))
        if inside:
            accuracy, mean = (sum(x[i] for x in inside) / len(inside) for i in (1, 0))
            total += len(inside) / len(margins) * abs(accuracy - mean)
    assert judge.calibration(margins, bins)["calibration_error"] == pytest.approx(total, abs=1e-9)
