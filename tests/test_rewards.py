"""Verifiable rewards: what counts as an answer, and how TRL calls the functions."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Reward
from post_training.rewards import verify

NUMBERS = [
    ("72", 72),
    (" 72 ", 72),
    ("\n72\n", 72),
    ("-72", -72),
    ("+72", 72),
    ("0", 0),
    ("-0", 0),
    ("007", 7),
    ("72.", 72),
    ("1,234", 1234),
    ("1,234,567", 1234567),
    ("12,345.", 12345),
    ("$5", 5),
    ("-$5", -5),
    ("$1,234.50", Decimal("1234.5")),
    ("3.14", Decimal("3.14")),
    ("-0.5", Decimal("-0.5")),
    ("3.10", Decimal("3.1")),
    ("9" * 60, int("9" * 60)),
]
NO_NUMBERS = [
    "", " ", ".", "$", "-", ",", "seventy-two", "72 apples", "7 2", "1.2.3", "--5", "1e3", "0x10", "72%", "NaN",
    "Infinity", "1,5", "1,,234", "12,34", ",123", "1234,567", "<answer>72", "6*12", "7=7",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_number_reads(text: str, value: Decimal) -> None:
    assert verify.number(text) == value


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_number_reads_nothing_else(text: str) -> None:
    assert verify.number(text) is None


ANSWERS = [
    ("<answer>72</answer>", 72),
    ("<think>6*12</think><answer>72</answer>", 72),
    ("<think>x</think>\n<answer>\n72\n</answer>\n", 72),
    ("<answer>$1,072.00</answer>", 1072),
    ("<answer>71</answer> no, <answer>72</answer>", 72),  # several: the last
    ("<answer>72</answer> or <answer>a dozen</answer>", None),  # the last, though it is no number
    ("<think>I use <answer> tags.</think><answer>72</answer>", 72),  # a tag that is only talked about
    ("<answer><answer>72</answer></answer>", 72),
    ("<answer>72</answer> and <answer>", 72),
    ("<answer></answer>", None),
    ("<answer> </answer>", None),
    ("<answer>72", None),
    ("72</answer>", None),
    ("72", None),
    ("", None),
    ("<Answer>72</Answer>", None),
    ("<answer>72 apples</answer>", None),
]


@pytest.mark.parametrize(("text", "value"), ANSWERS)
def test_parse_answer(text: str, value: int | None) -> None:
    assert verify.parse_answer(text) == value


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("<answer>72</answer>", "72", True),
        ("<answer>72.0</answer>", "72", True),
        ("<answer>$1,000</answer>", "1000", True),
        ("<answer>1000</answer>", "1,000", True),
        ("<answer>-7</answer>", "7", False),
        ("<answer>7</answer>", "72", False),
        ("<answer>72</answer>", "", False),
        ("<answer></answer>", "", False),  # two things that are no numbers are not equal
        ("<answer>x</answer>", "x", False),
        ("", "72", False),
    ],
)
def test_is_correct(text: str, answer: str, right: bool) -> None:
    assert verify.is_correct(text, answer) is right


WRITTEN = ["{0}", " {0}\n", "{0:,}", "{0}.", "{0:,}.", "{0}.0", "{0:,}.00"]


@given(n=st.integers(-(10**15), 10**15), form=st.sampled_from(WRITTEN), dollars=st.booleans(), thought=st.text())
def test_an_integer_comes_back_however_it_is_written(n: int, form: str, dollars: bool, thought: str) -> None:
    written = form.format(n)
    if dollars:
        written = written.replace("-", "-$") if n < 0 else written.replace(str(n)[0], f"${str(n)[0]}", 1)
    text = f"<think>{thought}</think><answer>{written}</answer>"
    assert verify.parse_answer(text) == n
    assert verify.is_correct(text, str(n))
    assert not verify.is_correct(text, str(n + 1))


@given(st.decimals(-(10**9), 10**9, places=3))
def test_a_decimal_comes_back(d: Decimal) -> None:
    assert verify.number(f"{d:,f}") == d


PIECES = [*"0123456789,.$-+ a<>/\n", "<answer>", "</answer>", "<think>", "</think>"]


@given(st.lists(st.sampled_from(PIECES)))
def test_no_text_breaks_the_parser(pieces: list[str]) -> None:
    value = verify.parse_answer("".join(pieces))
    assert value is None or value.is_finite()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("<think></think><answer>7</answer>", True),
        (" \n<think>a\nb</think>\n\n<answer>7\n</answer> \n", True),
        ("<think>a</think><answer></answer>", False),
        ("<answer>7</answer>", False),
        ("<think>a</think>", False),
        ("<answer>7</answer><think>a</think>", False),
        ("<think>a</think> so <answer>7</answer>", False),
        ("<think>a</think><answer>7</answer> done", False),
        ("<think>a</think><answer>7</answer><answer>8</answer>", False),
        ("<think>a</think><think>b</think><answer>7</answer>", False),
        ("<think><think>a</think></think><answer>7</answer>", False),
        ("<think>a<answer>6</answer></think><answer>7</answer>", False),
        ("<think>a</think><answer><b>7</b></answer>", False),
        ("<think>a<answer>7</answer>", False),
        ("", False),
    ],
)
def test_has_format(text: str, good: bool) -> None:
    assert verify.has_format(text) is good


def conversational(texts: list[str], role: str) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": t}] for t in texts]


def test_functions_take_what_trl_passes_conversational_or_plain() -> None:
    prompts = ["3+4=?", "3+4=?", "3+4=?", "3+4=?"]
    texts = [
        "<think>x</think><answer>7</answer>",
        "<answer>7</answer>",
        "<think>x</think><answer>8</answer>",
        "seven",
    ]
    columns = {"answer": ["7"] * 4, "completion_ids": [[1], [2], [3], [4]], "trainer_state": None, "other": [0] * 4}
    for p, c in ((prompts, texts), (conversational(prompts, "user"), conversational(texts, "assistant"))):
        assert verify.correct(prompts=p, completions=c, **columns) == [1.0, 1.0, 0.0, 0.0]
        assert verify.format(prompts=p, completions=c, **columns) == [1.0, 0.0, 1.0, 0.0]
    plain = verify.random(prompts=prompts, completions=texts, **columns)
    marked = verify.random(
        prompts=conversational(prompts, "user"), completions=conversational(texts, "assistant"), **columns
    )
    assert plain == marked


def test_answers_of_another_count_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        verify.correct(["p", "p"], ["c", "c"], answer=["7"])


@given(st.lists(st.text()))
def test_every_reward_is_zero_or_one_for_each_completion(texts: list[str]) -> None:
    """Bounded: form, repeated or prolonged, never adds up to more than one."""
    for function in (verify.correct, verify.format, verify.random):
        rewards = function(prompts=texts, completions=texts, answer=["7"] * len(texts))
        assert len(rewards) == len(texts)
        assert set(rewards) <= {0.0, 1.0}


def test_random_is_a_coin_flip_that_stays_the_same() -> None:
    texts = [f"<answer>{n}</answer>" for n in range(4000)]
    flips = verify.random(prompts=["p"] * 4000, completions=texts)
    assert flips == verify.random(prompts=["p"] * 4000, completions=texts)
    assert flips != verify.random(prompts=["q"] * 4000, completions=texts)
    assert flips[::-1] == verify.random(prompts=["p"] * 4000, completions=texts[::-1])  # no matter in which order
    assert abs(sum(flips) - 2000) < 5 * (4000 * 0.25) ** 0.5  # five standard deviations of 4000 fair coins
    changes = sum(a != b for a, b in itertools.pairwise(flips))
    assert abs(changes - 2000) < 5 * (4000 * 0.25) ** 0.5  # neighbours do not hang together


@pytest.mark.parametrize(
    ("weights", "functions", "numbers"),
    [
        (Reward(), [verify.correct, verify.format], [1.0, 0.1]),
        (Reward(correct=2.0, format=0.0), [verify.correct], [2.0]),
        (Reward(correct=0.0, format=0.0, random=1.0), [verify.random], [1.0]),
        (Reward(1.0, -0.5, 0.25), [verify.correct, verify.format, verify.random], [1.0, -0.5, 0.25]),
        (Reward(0.0, 0.0, 0.0), [], []),
    ],
)
def test_functions_without_weight_are_left_out(weights: Reward, functions: list, numbers: list[float]) -> None:
    assert verify.reward_functions(weights) == (functions, numbers)
