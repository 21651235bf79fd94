"""Records in, the four forms out: generated sums, real files, the tokenizer, and what is refused."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conf.schema import Data, Model
from post_training import data
from post_training.data import arithmetic
from post_training.data.arithmetic import Arithmetic, work
from post_training.data.records import Place
from post_training.data.source import DataError, Source
from post_training.data.templates import ASSISTANT, END, SYSTEM, TAGS, USER
from post_training.data.tokenizer import PAD, bytes_tokenizer, load_tokenizer
from post_training.rewards.verify import has_format, is_correct, number, parse_answer
from tests.in_process import own_cache  # noqa: F401  (a fixture)
from tests.training import real_data

FORMS = ("documents", "demonstrations", "preferences", "problems")


def small(**changes: Any) -> Data:
    counts = {"held_out": 40, "num_documents": 300, "num_demonstrations": 200, "num_pairs": 150, "num_prompts": 120}
    return Data(**(counts | changes))


# ------------------------------------------------------------------------------------------ arithmetic


def summed(columns: str) -> int:
    """The sum that worked columns stand for: each equation is checked, its carry too, and its digit taken."""
    carry, total, place = 0, 0, 1
    for column in columns.split():
        terms, _, result = column.partition("=")
        digits = [int(t) for t in terms.split("+")]
        assert sum(digits) == int(result)
        assert digits[2:] == ([1] if carry else []), f"the carry of {columns}"
        carry = int(result) // 10
        total += int(result) % 10 * place
        place *= 10
    return total + carry * place


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_worked_columns_add_up(a: int, b: int) -> None:
    columns = work(a, b)
    assert columns.startswith(" ")
    assert summed(columns) == a + b
    digits = [[int(d) for d in c.partition("=")[0].split("+")] for c in columns.split()]
    assert sum(d[0] * 10**i for i, d in enumerate(digits)) == a
    assert sum(d[1] * 10**i for i, d in enumerate(digits)) == b


def test_worked_columns_as_documented() -> None:
    assert work(47, 85) == " 7+5=12 4+8+1=13"


@given(st.integers(0, 999), st.integers(0, 999))
def test_carries_looks_at_the_ones(a: int, b: int) -> None:
    assert arithmetic.carries(a, b) == (work(a, b).split()[0].partition("=")[2] >= "10" and a % 10 + b % 10 > 9)
    assert arithmetic.carries(a, b) == ((a + b) % 10 < a % 10)


def pair_of(text: str) -> tuple[int, int]:
    """The sum that a text asks, whichever way round."""
    match = re.match(r"(\d+)\+(\d+)=", text)
    assert match, text
    low, high = sorted(int(g) for g in match.groups())
    return low, high


def asked(form: str, row: dict[str, Any]) -> str:
    if form == "documents":
        return row["text"]
    return (row["messages"] if form == "demonstrations" else row["prompt"])[0]["content"]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_held_out_sums_are_in_no_training_form_in_either_order(seed: int) -> None:
    source = Arithmetic(small(seed=seed, held_out=1000, num_documents=2000, num_demonstrations=2000, num_pairs=2000))
    held_out = {pair_of(asked("problems", r)) for r in source.problems("held_out")}
    assert len(held_out) == 1000
    for form in FORMS:
        assert {pair_of(asked(form, r)) for r in getattr(source, form)("held_out")} == held_out
        trained = {pair_of(asked(form, r)) for r in getattr(source, form)("train")}
        assert not trained & held_out
        assert len(trained) > 50


def test_held_out_sums_are_asked_in_both_orders() -> None:
    questions = [asked("problems", r) for r in Arithmetic(small(held_out=200)).problems("held_out")]
    ascending = sum(int(a) < int(b) for a, b in (q.removesuffix("=?").split("+") for q in questions))
    assert 50 < ascending < 150


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_gives_its_rows(form: str) -> None:
    rows = {seed: list(getattr(Arithmetic(small(seed=seed)), form)("train")) for seed in (0, 1)}
    assert rows[0] == list(getattr(Arithmetic(small(seed=0)), form)("train"))
    assert rows[0] != rows[1]
    held_out = [
        {pair_of(asked(form, r)) for r in getattr(Arithmetic(small(seed=seed)), form)("held_out")} for seed in (0, 1)
    ]
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize(
    ("form", "count"), [("documents", 300), ("demonstrations", 200), ("preferences", 150), ("problems", 120)]
)
def test_counts(form: str, count: int) -> None:
    assert len(getattr(Arithmetic(small()), form)("train")) == count
    assert len(getattr(Arithmetic(small()), form)("held_out")) == 40
    capped = Arithmetic(small(max_samples=7))
    assert len(getattr(capped, form)("train")) == 7
    assert len(getattr(capped, form)("held_out")) == 40


def test_documents_are_right_and_worked_as_often_as_asked() -> None:
    for fraction in (0.0, 0.7, 1.0):
        texts = Arithmetic(small(num_documents=2000, worked_fraction=fraction)).documents("train")["text"]
        worked = [re.fullmatch(r"(\d+)\+(\d+)=\?((?: [\d+]+=\d+)+) (\d+)", t) for t in texts]
        for text, match in zip(texts, worked, strict=True):
            a, b = pair_of(text)
            assert text.split("=" if match is None else " ")[-1] == str(a + b)
            assert match is None or summed(match[3]) == a + b
        assert abs(sum(m is not None for m in worked) / 2000 - fraction) < 0.06


def test_demonstrations_are_right_and_in_form() -> None:
    rows = list(Arithmetic(small(num_demonstrations=2000)).demonstrations("train"))
    thoughts = Counter()
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        a, b = pair_of(question["content"])
        assert is_correct(answer["content"], str(a + b)) and has_format(answer["content"])
        thought = answer["content"].removeprefix("<think>").partition("</think>")[0]
        assert not thought or summed(thought) == a + b
        thoughts[bool(thought)] += 1
    assert min(thoughts.values()) > 400  # some are worked out, some just answered


def test_preferences_are_right_against_wrong() -> None:
    rows = list(Arithmetic(small(num_pairs=1000)).preferences("train"))
    for row in rows:
        a, b = pair_of(row["prompt"][-1]["content"])
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert is_correct(chosen, str(a + b)) and has_format(chosen)
        assert not is_correct(rejected, str(a + b)) and parse_answer(rejected) is not None


def test_problems_carry_their_answers() -> None:
    for row in Arithmetic(small()).problems("train"):
        assert sum(pair_of(row["prompt"][0]["content"])) == int(row["answer"])


@pytest.mark.parametrize("held_out", [4095, 5000])
def test_more_held_out_sums_than_there_are(held_out: int) -> None:
    with pytest.raises(DataError, match=rf"data\.held_out={held_out}: .*4095(.|\n)*fix: data\.held_out=\d+"):
        Arithmetic(small(held_out=held_out))


# ------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


PIECES = st.one_of(
    st.text(), st.sampled_from([*TAGS, "<", ">", "</", "<think", " ", "\n", "é", "日本", "🙂‍", "\u0301"])
)


@given(pieces=st.lists(PIECES))
def test_bytes_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> None:
    text = "".join(pieces)
    assume(not any(role in text for role in (USER, ASSISTANT, SYSTEM, END, PAD)))  # those are tokens of their own
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    outside = re.sub("|".join(map(re.escape, TAGS)), "", text)
    assert len(ids) == len(outside.encode()) + len(re.findall("|".join(map(re.escape, TAGS)), text))


def test_tags_are_single_tokens_and_stay_while_roles_go(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{USER}3+4=?{ASSISTANT}<think> 3+4=7</think><answer>7</answer>{END}{PAD}{SYSTEM}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 + 5 + 2 + 6 + 2 + 1 + 3 + 2 - 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3+4=?<think> 3+4=7</think><answer>7</answer>"
    for token in (*TAGS, USER, ASSISTANT, SYSTEM, END, PAD):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert len(tokenizer) == 256 + 5 + 4


ROLES = st.sampled_from(["user", "assistant", "system"])
SAID = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)


@given(turns=st.lists(st.tuples(ROLES, SAID), min_size=1, max_size=6))
def test_mask_covers_what_the_assistant_says_and_its_end(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    expected: list[tuple[int, int]] = []  # written out: role token, bytes, end token, each with its mask
    for role, text in turns:
        speaks = int(role == "assistant")
        expected.append((tokenizer.convert_tokens_to_ids(f"<|{role}|>"), 0))
        expected += [(i, speaks) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if speaks:
            expected.append((tokenizer.eos_token_id, 1))
    assert list(zip(ids, mask, strict=True)) == expected


def test_generation_starts_after_the_assistants_role(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [{"role": "user", "content": "3+4=?"}]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "7"}], tokenize=False)
    assert whole == f"{asked}7{END}"


def test_tokenizer_comes_back_from_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(Model(), str(tmp_path))
    text = f"{USER}é日本<think>a</think>{END}"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.eos_token) == (PAD, END)


def test_foreign_tokenizer_gets_template_and_roles(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    loaded = load_tokenizer(Model(), str(tmp_path))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    out = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert loaded.convert_ids_to_tokens(out["input_ids"]) == [USER, "hello", ASSISTANT, "hello", END]
    assert out["assistant_masks"] == [0, 0, 0, 1, 1]
    assert loaded.pad_token is not None and loaded.eos_token == END


def test_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no end-of-text token\n  fix: .*/tokenizer_config\.json"):
        load_tokenizer(Model(), str(tmp_path))


# ------------------------------------------------------------------------------------------ real files


def test_every_gsm8k_demonstration_is_right() -> None:
    folder = real_data("gsm8k")
    cfg = Data(name="gsm8k", path=str(folder / "train.jsonl"), eval_path=str(folder / "test.jsonl"), held_out=10_000)
    source = data.load(cfg)
    for split, count in (("train", 7473), ("held_out", 1319)):
        demonstrations, problems = source.demonstrations(split), source.problems(split)
        assert len(demonstrations) == len(problems) == count
        for row, problem in zip(demonstrations, problems, strict=True):
            question, answer = row["messages"]
            assert number(problem["answer"]) is not None, problem
            assert is_correct(answer["content"], problem["answer"])
            assert has_format(answer["content"]), answer
            assert "<<" not in answer["content"] and "####" not in answer["content"]
            assert problem["prompt"] == [question] and question["role"] == "user"


def test_gsm8k_answers_are_the_files_own() -> None:
    path = real_data("gsm8k") / "test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written = {r["question"]: int(r["answer"].split("#### ")[1].replace(",", "")) for r in lines}
    source = data.load(Data(name="gsm8k", path=str(path), held_out=100, seed=3))
    rows = [*source.problems("train"), *source.problems("held_out")]
    assert {r["prompt"][0]["content"]: int(r["answer"]) for r in rows} == written
    assert len(source.problems("held_out")) == 100
    held_out = {r["prompt"][0]["content"] for r in source.problems("held_out")}
    assert not held_out & {r["prompt"][0]["content"] for r in source.problems("train")}


def test_hh_rlhf_pairs() -> None:
    path = real_data("hh_rlhf") / "harmless-base-test.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    source = data.load(Data(name="hh_rlhf", path=str(path), held_out=300))
    rows = [*source.preferences("train"), *source.preferences("held_out")]
    assert len(lines) * 0.99 < len(rows) < len(lines)  # a few have two prompts, or a turn inside a turn
    for row in rows:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        assert [m["role"] for m in prompt] == (["user", "assistant"] * len(prompt))[: len(prompt)]
        assert prompt[-1]["role"] == "user"
        assert [m["role"] for m in chosen + rejected] == ["assistant", "assistant"]
        assert chosen[0]["content"] != rejected[0]["content"]
        assert all(m["content"] for m in prompt + chosen + rejected)
    # every pair is one of the file's, word for word but for the space around turns
    squeezed = {tuple("".join(r[k].split()) for k in ("chosen", "rejected")) for r in lines}
    names = {"user": "Human:", "assistant": "Assistant:"}
    for row in rows:
        texts = (
            "".join(names[m["role"]] + m["content"] for m in row["prompt"] + row[k]) for k in ("chosen", "rejected")
        )
        assert tuple("".join(t.split()) for t in texts) in squeezed
    for row in source.demonstrations("train"):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert all(m["content"] for m in row["messages"])


def transcript(*turns: str) -> str:
    return "".join(
        f"\n\n{who}: {text}" for who, text in zip(itertools.cycle(("Human", "Assistant")), turns, strict=False)
    )


def hh(tmp_path: Path, rows: list[tuple[str, str]]) -> Source:
    filler = [(transcript("a", "b"), transcript("a", "c"))]
    for name, pairs in (("pairs", rows + filler), ("held_out", filler)):
        lines = (json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in pairs)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return data.load(Data(name="hh_rlhf", path=f"{tmp_path}/pairs.jsonl", eval_path=f"{tmp_path}/held_out.jsonl"))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (transcript("hi", "x"), transcript("ho", "y")),  # two prompts
        (transcript("hi", "x", "why", "z"), transcript("hi", "y")),  # one goes on longer
        (transcript("hi", "x"), transcript("hi", "x")),  # one answer
        (transcript("hi", ""), transcript("hi", "y")),  # an empty one
        (transcript("hi", "x"), transcript("hi", "")),
        (transcript("hi"), transcript("hi")),  # none
        ("\n\nHuman: hi\n\nHuman: ho\n\nAssistant: x", "\n\nHuman: hi\n\nHuman: ho\n\nAssistant: y"),
        ("no turns", "at all"),
    ],
)
def test_hh_rlhf_pairs_that_are_none_are_dropped(tmp_path: Path, chosen: str, rejected: str) -> None:
    assert len(hh(tmp_path, [(chosen, rejected)]).preferences("train")) == 1


def test_hh_rlhf_transcripts_become_turns(tmp_path: Path) -> None:
    source = hh(tmp_path, [(transcript("hi\nthere", "x: y", "why", "z"), transcript("hi\nthere", "x: y", "why", "w"))])
    row = next(r for r in source.preferences("train") if len(r["prompt"]) == 3)
    assert row == {
        "prompt": [
            {"role": "user", "content": "hi\nthere"},
            {"role": "assistant", "content": "x: y"},
            {"role": "user", "content": "why"},
        ],
        "chosen": [{"role": "assistant", "content": "z"}],
        "rejected": [{"role": "assistant", "content": "w"}],
    }


# --------------------------------------------------------------------------------- files and their kinds

ROWS = [{"question": f"{a}+{a}=? é", "answer": f"{a} and {a}\n#### {2 * a}"} for a in range(1, 13)]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))


def write_gz(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in ROWS)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def write_folder(path: Path) -> None:
    (path / "deeper").mkdir(parents=True)
    for name, rows in (("a.jsonl", ROWS[:5]), ("deeper/b.jsonl", ROWS[5:])):
        (path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.json", write_json),
        ("r.jsonl", write_jsonl),
        ("r.jsonl.gz", write_gz),
        ("r.json.gz", write_gz),
        ("r.csv", write_csv),
        ("r.parquet", write_parquet),
        ("folder", write_folder),
    ],
)
def test_files_of_every_kind_read_alike(tmp_path: Path, name: str, write: Any) -> None:
    path = tmp_path / "with space" / name
    path.parent.mkdir()
    write(path)
    assert list(Place(str(path)).read()) == ROWS
    source = data.load(Data(name="gsm8k", path=str(path), held_out=2))
    again = data.load(Data(name="gsm8k", path=str(path), held_out=2))
    assert list(source.problems("train")) == list(again.problems("train"))
    assert len(source.problems("train")) == 10
    found = {r["answer"] for split in ("train", "held_out") for r in source.problems(split)}
    assert found == {str(2 * a) for a in range(1, 13)}


def refused(cfg: Data, form: str = "problems") -> str:
    with pytest.raises(DataError) as caught:
        getattr(data.load(cfg), form)("train")
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def test_refused_missing_path(tmp_path: Path) -> None:
    assert f"data.path={tmp_path}/none.jsonl: no such file" in refused(Data("gsm8k", path=f"{tmp_path}/none.jsonl"))


def test_refused_folder_of_several_kinds(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    write_jsonl(tmp_path / "b.jsonl")
    message = refused(Data("gsm8k", path=str(tmp_path)))
    assert f"data.path={tmp_path}: found .csv, .jsonl" in message and ".parquet" in message


def test_refused_empty_folder_and_unknown_kind(tmp_path: Path) -> None:
    assert "found nothing" in refused(Data("gsm8k", path=str(tmp_path)))
    (tmp_path / "a.xml").write_text("<a/>")
    assert "found .xml" in refused(Data("gsm8k", path=str(tmp_path)))


def test_refused_missing_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "solution": "s"}\n' * 3)
    message = refused(Data("gsm8k", path=str(tmp_path / "a.jsonl"), held_out=1))
    assert "records lack answer; they have question, solution" in message and "data.name" in message


@pytest.mark.parametrize("held_out", [12, 13])
def test_refused_more_held_out_than_records(tmp_path: Path, held_out: int) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    message = refused(Data("gsm8k", path=str(tmp_path / "a.jsonl"), held_out=held_out))
    assert f"data.held_out={held_out}" in message and "12 records" in message and "fix: data.held_out=1" in message


def test_refused_record_without_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "how many?", "answer": "forty"}\n' * 3)
    message = refused(Data("gsm8k", path=str(tmp_path / "a.jsonl"), held_out=1))
    assert f"data.name=gsm8k: {tmp_path}/a.jsonl, row " in message and "no '#### N' in 'forty'" in message


@pytest.mark.parametrize(("name", "form"), [("gsm8k", "preferences"), ("hh_rlhf", "problems")])
def test_refused_form_that_a_set_lacks(name: str, form: str) -> None:
    assert f"data.name={name}: has no" in refused(Data(name), form)


def test_held_out_records_from_a_file_of_their_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 1,000"}) + "\n")
    cfg = Data("gsm8k", path=f"{tmp_path}/train.jsonl", eval_path=f"{tmp_path}/test.jsonl", max_samples=5)
    source = data.load(cfg)
    assert len(source.problems("train")) == 5
    assert list(source.problems("held_out")) == [{"prompt": [{"role": "user", "content": "q"}], "answer": "1000"}]


def test_hub_data_sets_are_asked_for_by_id_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((*args, kwargs))
        said = transcript("a", "b")
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1", "chosen": said, "rejected": said}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.load(Data("gsm8k", held_out=1)).problems("train")
    data.load(Data("hh_rlhf", held_out=1, subset="harmless-base")).documents("train")
    data.load(Data("gsm8k", path="mine/other", held_out=1)).problems("train")
    data.load(Data("gsm8k", path="mine/other", subset="big", split="train[:50%]", eval_split="test")).problems("train")
    assert calls == [
        ("openai/gsm8k", "main", {"split": "train"}),
        ("openai/gsm8k", "main", {"split": "test"}),
        ("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "train"}),
        ("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"}),
        ("mine/other", None, {"split": "train"}),
        ("mine/other", "big", {"split": "train[:50%]"}),
        ("mine/other", "big", {"split": "test"}),
    ]
