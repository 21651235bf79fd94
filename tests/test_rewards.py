"""Verifiable rewards: what counts as an answer, and how TRL calls the functions."""

from __future__ import annotations

import hashlib
import itertools
import signal
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.check import ConfigError, _check_reward
from conf.schema import Config, Grpo, Reward, RewardFunction
from post_training.data.source import DataError
from post_training.rewards import mathematics, verify
from post_training.run.directory import RunDirectory

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
        (Reward(0.0, 0.1, 0.0, math_verify=2.0), [verify.math_verify, verify.format], [2.0, 0.1]),
        (Reward(correct=0.0, format=0.0, random=1.0), [verify.random], [1.0]),
        (Reward(1.0, -0.5, 0.25), [verify.correct, verify.format, verify.random], [1.0, -0.5, 0.25]),
        (Reward(0.0, 0.0, 0.0), [], []),
    ],
)
def test_functions_without_weight_are_left_out(weights: Reward, functions: list, numbers: list[float]) -> None:
    assert verify.reward_functions(weights) == (functions, numbers)


# ------------------------------------------------------------------------------ formulas, and functions of one's own


@pytest.mark.parametrize(
    ("written", "expected", "equal"),
    [
        ("<answer>72</answer>", "72", True),
        ("<answer>72.</answer>", "72", True),  # as the parser of numbers reads it
        (r"<think>x</think><answer>\frac{1}{2}</answer>", "0.5", True),
        (r"<answer>$2\sqrt{2}$</answer>", r"\sqrt{8}", True),
        ("<answer>x+1</answer>", "1+x", True),
        ("<answer>71</answer>", "72", False),
        ("72", "72", False),  # outside the tag
        ("<answer>}{</answer>", "1", False),
        ("<answer></answer>", "72", False),
    ],
)
def test_math_verify_compares_what_stands_in_the_tag(written: str, expected: str, equal: bool) -> None:
    assert verify.math_verify(["p"], [written], answer=[expected]) == [float(equal)]


def test_math_verify_touches_no_signal_and_works_in_any_thread() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(verify.math_verify, ["p"], [r"<answer>\frac{4}{2}</answer>"], answer=["2"]).result()
    assert found == [1.0]
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


def test_a_formula_that_never_ends_counts_as_wrong_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = mathematics.Worker()
    try:
        assert worker.equal("2", "2")
        monkeypatch.setattr(mathematics, "SECONDS", 0.3)
        assert not worker.equal("9^{9^{9^{9}}}", "9^{9^{9^{9}}}+1")
        monkeypatch.setattr(mathematics, "SECONDS", 60.0)
        assert worker.equal("3", "3")
        assert worker._process is not None
        worker._process.kill()  # for its memory, say
        worker._process.wait()
        assert worker.equal("x+1", "1+x")
        assert not worker.equal("1" * (mathematics.LONGEST + 1), "1")
    finally:
        worker.close()


def put_function(run: RunDirectory, source: str) -> str:
    """Put a file of the user's own where a submission puts it; `path` of its function f in a frozen config."""
    place = f"functions/{hashlib.sha256(source.encode()).hexdigest()[:16]}/mine.py"
    (run.code / place).parent.mkdir(parents=True, exist_ok=True)
    (run.code / place).write_text(source)
    return f"{place}:f"


def own_function(tmp_path: Path, body: str) -> Callable[..., list[float | None]]:
    """A user's reward function f, loaded from a run's copy of its file."""
    run = RunDirectory(tmp_path / "run")
    source = f"def f(prompts, completions, answer, **_):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    named = RewardFunction(put_function(run, source), 0.5)
    functions, weights = verify.reward_functions(Reward(0.0, 0.0, 0.0, functions=[named]), run)
    assert weights == [0.5]
    return functions[0]


def test_a_function_of_ones_own_is_called_as_trl_calls_it(tmp_path: Path) -> None:
    f = own_function(tmp_path, "return [float(len(c)) if a != 'skip' else None for c, a in zip(completions, answer)]")
    assert f.__name__ == "f"
    assert f(prompts=["p", "p"], completions=["abc", "d"], answer=["7", "skip"], completion_ids=[[1], [2]]) == [3, None]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1 / (c != 'bad') for c in completions]",
         ["raised ZeroDivisionError: division by zero (line 2) for completion 'bad' of prompt 'second'"]),
        ("assert len(completions) < 2, 'too many'\nreturn [1.0]",
         ["raised AssertionError: too many (line 2) for a batch"]),
        ("return [float('nan') if c == 'bad' else 1.0 for c in completions]",
         ["gave nan for completion 'bad' of prompt 'second'", "fix: return a finite number"]),
        ("return [float('inf')] * 3", ["gave inf for completion 'good'"]),
        ("return ['1'] * 3", ["gave '1' for"]),
        ("return [1.0]", ["gave 1 values for 3 completions"]),
        ("return 1.0", ["gave float for 3 completions"]),
        ("return None", ["gave NoneType for 3 completions"]),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_used_is_named_with_the_sample(tmp_path: Path, body: str, says: list[str]) -> None:
    f = own_function(tmp_path, body)
    with pytest.raises(DataError) as error:
        f(prompts=["first", "second", "third"], completions=["good", "bad", "good"], answer=["1", "2", "3"])
    for text in ["reward function mine.py:f: ", "fix: ", *says]:
        assert text in str(error.value)


def test_a_changed_copy_and_a_file_that_fails_are_refused(tmp_path: Path) -> None:
    own_function(tmp_path, "return [0.0] * len(completions)")
    run = RunDirectory(tmp_path / "run")
    (copy,) = (run.code / "functions").glob("*/mine.py")
    reward = Reward(functions=[RewardFunction(f"{copy.relative_to(run.code)}:f", 1.0)])
    copy.write_bytes(copy.read_bytes() + b"# edited")
    with pytest.raises(DataError, match=r"mine\.py:f: its copy .* is gone or was changed"):
        verify.reward_functions(reward, run)
    reward.functions[0].path = put_function(run, "import nothing_of_that_name\n")
    with pytest.raises(DataError, match=r"cannot be loaded: ModuleNotFoundError.*line 1"):
        verify.reward_functions(reward, run)


@given(st.floats(0, 100), st.floats(-1, 200), st.lists(st.text()))
def test_form_never_pays_as_much_as_an_answer(right: float, form: float, texts: list[str]) -> None:
    """Whatever the config lets through: a right answer out of form is worth more than the best form without it."""
    config = Config(stage="grpo", grpo=Grpo(reward=Reward(correct=right, format=form)))
    try:
        _check_reward(config)
    except ConfigError:
        return
    assert right == 0 or form < right
