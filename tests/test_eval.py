"""Evaluation: intervals, estimators, likelihoods, divergences and answers against written-out references."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from decimal import Decimal, getcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from post_training.data.tokenizer import bytes_tokenizer
from post_training.evaluation import answers, figures, scoring


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
    assert figures.wilson_interval(successes, trials, z=1.959964) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 5000), share=st.floats(0, 1), z=st.floats(0.5, 4))
def test_wilson_bounds_solve_their_equation(trials: int, share: float, z: float) -> None:
    """Each bound p solves (k/n - p)^2 = z^2 p (1 - p) / n: the normal test that just does not reject p."""
    getcontext().prec = 40
    successes = round(trials * share)
    low, high = figures.wilson_interval(successes, trials, z)
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
    low, high = figures.wilson_interval(successes, trials)
    assert figures.wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


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
    assert figures.repetition(ids, n) == pytest.approx(share)


@given(st.lists(st.integers(0, 3)), st.integers(1, 5))
def test_repetition_counts_what_occurred_before(ids: list[int], n: int) -> None:
    grams = [ids[i : i + n] for i in range(len(ids)) if i + n <= len(ids)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert figures.repetition(ids, n) == pytest.approx(again / len(grams) if grams else 0.0)


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


def in_batches(ask: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any], size: int) -> list[Any]:
    return [found for i in range(0, len(items), size) for found in ask(items[i : i + size])]


ROWS = [
    [[1, 2, 3, 4, 5, 257], [1] * 6],
    [[9, 8, 7], [1] * 3],
    [[5] * 12, [0] * 6 + [1] * 6],
    [[4, 200, 31, 77, 257], [0, 0, 1, 0, 1]],
    [[11, 12], [0, 0]],
    [[42], [1]],
]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_perplexity_is_that_of_all_kept_tokens_together(model: LlamaForCausalLM, batch_size: int) -> None:
    sums = [nll(model, ids, mask) for ids, mask in ROWS]
    expected = math.exp(sum(t for t, _ in sums) / sum(c for _, c in sums))
    found = in_batches(lambda rows: scoring.likelihoods(model, rows, 256), ROWS, batch_size)
    assert [(pytest.approx(t, rel=1e-5, abs=1e-5), c) for t, c in sums] == [tuple(one) for one in found]
    # judged in float32 at the end, hence the tolerance
    assert figures.perplexity(*zip(*found, strict=True)).value == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_an_even_guess_is_the_vocabulary() -> None:
    model = LlamaForCausalLM(config()).double().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    even = figures.perplexity(*zip(*scoring.likelihoods(model, ROWS, 256), strict=True))
    assert (even.value, even.low, even.high) == pytest.approx((265, 265, 265), rel=1e-5) and even.count == 4


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
    found = greedy(model, tokenizer, batch_size)
    assert [ids for ids, _ in found] == one_by_one
    assert [cut for _, cut in found] == [len(ids) == 24 for ids in one_by_one]
    texts = [answers.text_of(tokenizer, one) for one in found]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in one_by_one]


def greedy(model: LlamaForCausalLM, tokenizer, batch_size: int) -> list[answers.Answer]:
    texts = answers.rendered(tokenizer, chats(PROMPTS))
    ask = partial(answers.by_transformers, lambda: model, tokenizer, 24)
    return in_batches(lambda batch: [a[0] for a in ask(batch, 1, 0.0, 0)], texts, batch_size)


def test_greedy_answers_are_those_of_generate(model: LlamaForCausalLM, tokenizer) -> None:
    for chat, (ids, _) in zip(chats(PROMPTS), greedy(model, tokenizer, 4), strict=True):
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
        found = in_batches(lambda batch: scoring.rewards(model, tokenizer, batch, 128), texts, batch_size)
        assert found == pytest.approx(expected, abs=1e-5)


def test_sampled_answers_are_drawn_from_the_model_and_its_seed(model: LlamaForCausalLM, tokenizer) -> None:
    """The same seed draws the same; the first token's frequencies are the softmax at that temperature."""
    texts = answers.rendered(tokenizer, chats(PROMPTS[:1]))
    ask = partial(answers.by_transformers, lambda: model, tokenizer, 1)
    first, again, other = (ask(texts, 4000, 0.7, seed)[0] for seed in (5, 5, 6))
    assert first == again != other
    ids = tokenizer(texts, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    likeliest = int(expected.argmax())
    p = float(expected[likeliest])
    seen = sum((ids or [257])[0] == likeliest for ids, _ in first) / 4000
    assert 0.02 < p < 0.98 and abs(seen - p) < 5 * math.sqrt(p * (1 - p) / 4000)


# ---------------------------------------------------------------------------------- two models compared


@pytest.fixture(scope="module")
def start() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(config(tie_word_embeddings=True)).double().eval()


def by_hand(model: LlamaForCausalLM, ids: list[int]) -> list[list[float]]:
    """log p of every token of the vocabulary after each token, in float64, one row and one token at a time."""
    found = []
    for i in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].tolist()
        highest = max(logits)
        norm = highest + math.log(math.fsum(math.exp(x - highest) for x in logits))
        found.append([x - norm for x in logits])
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_divergence_is_the_sum_over_the_vocabulary(
    model: LlamaForCausalLM, start: LlamaForCausalLM, batch_size: int
) -> None:
    expected = []
    for ids, mask in ROWS:
        p, q = by_hand(model, ids), by_hand(start, ids)
        kl = [math.fsum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        expected.append((sum(k for k, kept in zip(kl, mask[1:], strict=True) if kept), sum(mask[1:])))
    found = in_batches(lambda rows: scoring.divergences(model, start, rows, 256), ROWS, batch_size)
    assert [(pytest.approx(total, rel=1e-4, abs=1e-6), count) for total, count in expected] == list(map(tuple, found))
    assert sum(t for t, _ in expected) > 1, "the models differ"
    assert all(total == 0 for total, _ in scoring.divergences(model, model, ROWS, 256))


def test_what_became_likelier_since_the_start(model: LlamaForCausalLM, start: LlamaForCausalLM) -> None:
    pairs = [[ROWS[0], ROWS[3]], [ROWS[2], ROWS[1]], [ROWS[3], ROWS[0]]]

    def gain(row: scoring.Row) -> float:
        return nll(start, *row)[0] - nll(model, *row)[0]

    expected = [gain(chosen) - gain(rejected) for chosen, rejected in pairs]
    assert expected[0] == -expected[2] != 0
    assert scoring.preferred(model, start, pairs, 256) == pytest.approx(expected, rel=1e-4)


def test_rows_at_once_are_bounded_by_their_logits() -> None:
    assert scoring.at_once(256, 64, 265) == 64
    assert scoring.at_once(1, 64, 265) == 1
    assert scoring.at_once(256, 1024, 128_256) * 1024 * 128_256 <= 2**28
    assert scoring.at_once(256, 8192, 151_936) == 1


# ------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (4, 1), (5, 2), (6, 6), (6, 0)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, right: int) -> None:
    """By enumeration: all ways to take k of the samples."""
    answers = [i < right for i in range(samples)]
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(answers, k))
        assert figures.pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert figures.powers_of_two(6) == [1, 2, 4] and figures.powers_of_two(8) == [1, 2, 4, 8]


def test_the_interval_of_pass_at_k_is_over_problems() -> None:
    binary = figures.pass_figure([0, 4, 4, 0, 4], 4, 2)
    assert (binary.low, binary.high) == pytest.approx(figures.wilson_interval(3, 5)) and binary.count == 5
    spread, same = figures.pass_figure([1, 3, 2, 2], 4, 1), figures.pass_figure([2, 2, 2, 2], 4, 1)
    assert spread.value == same.value == 0.5
    assert (same.low, same.high) == pytest.approx(figures.wilson_interval(8, 16)), "no more than all samples tell"
    assert figures.wilson_interval(2, 4)[0] < spread.low < spread.value < spread.high
    for right in (0, 4):  # nothing varies, and yet nothing is certain
        alike = figures.pass_figure([right] * 4, 4, 1)
        assert (alike.low, alike.high) == pytest.approx(figures.wilson_interval(right, 4))


def test_the_interval_of_pass_at_1_holds_the_truth_as_often_as_it_says() -> None:
    draw, covered = random.Random(0), 0
    for _ in range(1000):  # problems of many difficulties, 0.5 on average
        right = [sum(draw.random() < p for _ in range(8)) for p in [draw.random() for _ in range(30)]]
        found = figures.pass_figure(right, 8, 1)
        covered += found.low <= 0.5 <= found.high
    assert 920 < covered < 980


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [([], None), ([None, None], None), ([3, 5, 5], 5), ([7, 3, 3, 7], 7), ([None, 3, None], 3), ([1, 2, 3], 1)],
)
def test_majority_takes_the_earliest_of_equals(votes: list[int | None], chosen: int | None) -> None:
    assert figures.majority(votes) == chosen


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [([[1, 2, 3]], 1, 1.0), ([[1, 1], [1]], 1, 1 / 3), ([[1, 2, 1, 2], [1, 2]], 2, 2 / 4), ([[1], []], 2, None)],
)
def test_distinct(texts: list[list[int]], n: int, share: float | None) -> None:
    assert figures.distinct(texts, n) == (None if share is None else pytest.approx(share))


def test_the_interval_of_a_perplexity_is_that_of_a_bootstrap_over_documents() -> None:
    draw = random.Random(1)
    tokens = [draw.randint(5, 80) for _ in range(300)]
    nll = [n * draw.gauss(2.0, 0.4) for n in tokens]
    found = figures.perplexity(nll, tokens)
    means = []
    for _ in range(2000):
        drawn = draw.choices(range(300), k=300)
        means.append(math.exp(sum(nll[i] for i in drawn) / sum(tokens[i] for i in drawn)))
    means.sort()
    assert found.low < found.value < found.high and found.count == 300
    assert found.value == pytest.approx(math.exp(sum(nll) / sum(tokens)))
    assert (found.low, found.high) == pytest.approx((means[50], means[1949]), rel=0.01)


def test_a_ratio_and_a_mean_written_out() -> None:
    found = figures.ratio([2.0, 9.0, 5.0, 0.0], [1, 3, 2, 0])  # R = 16 / 6
    residuals = [2 - 16 / 6, 9 - 3 * 16 / 6, 5 - 2 * 16 / 6]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 6
    assert (found.low, found.high) == pytest.approx((16 / 6 - 1.96 * error, 16 / 6 + 1.96 * error)) and found.count == 3
    one = figures.perplexity([2.0], [2])
    assert (one.value, one.low, one.high, one.count) == (math.e, None, None, 1)
    with pytest.raises(ValueError, match="nothing was counted"):
        figures.ratio([0.0], [0])
    average = figures.average([1.0, 2.0, 6.0])
    assert average.high - average.value == pytest.approx(1.96 * math.sqrt(7 / 3))
    assert figures.average([4.0]).low is None


# ----------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand() -> None:
    """Two pairs of confidence 0.9, one of them right; one of 0.6, which is right: (0.8 + 0.4) / 3, as written out."""
    margins = [math.log(9), -math.log(9), math.log(1.5)]
    found = figures.calibration(margins)
    assert found["calibration_error"] == pytest.approx((abs(1 - 0.9 + 0 - 0.9) + abs(1 - 0.6)) / 3)
    assert found["brier"] == pytest.approx((0.1**2 + 0.9**2 + 0.4**2) / 3)
    assert figures.calibration([0.0, 0.0]) == {"brier": 0.25, "calibration_error": 0.0}
    assert figures.calibration([1000.0, -1000.0]) == {"brier": 0.5, "calibration_error": 0.5}


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
    assert figures.calibration(margins, bins)["calibration_error"] == pytest.approx(total, abs=1e-9)
