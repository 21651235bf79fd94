"""Transforms: functions from one record, as its publisher writes it, to samples that stages can train on.

    @transform("mine")
    def mine(record):
        return {"messages": [user(record["question"]), assistant(record["reply"])]}

A sample is a dict with the keys of one view or of several:

    documents       text
    demonstrations  messages, or prompt and completion
    preferences     prompt, chosen and rejected; or whole conversations as chosen and rejected, which share the prompt;
                    score_chosen and score_rejected may be added, and must say the same
    problems        prompt and answer

`messages` is a list of {"role", "content"}; a prompt or an answer may be plain text as well. `category` may be added
(data.quality.max_per_category). A transform may return a list of samples, or None or `raise Drop("why")` for a record
that gives none; drops are counted by reason. Your own are put in a file named by `data.transform_file`.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from conf.check import nearest
from conf.datasets import KNOWN
from conf.schema import Data
from post_training.data.source import DataError, Row, assistant, system, think_answer, user

Function = Callable[[Row], Row | Iterable[Row] | None]


class Drop(Exception):
    """This record gives no sample, for the reason in the text: it is counted, and the others go on."""


class BadRecord(ValueError):
    """A record that is not what its transform reads: the run ends. Args: the key, and what is wrong with it."""


@dataclass(frozen=True)
class Transform:
    """One transform."""

    name: str
    function: Function
    fields: tuple[str, ...]  # of records: text that each must have
    file: str | None  # where it was written; None: built in

    def samples(self, record: Row) -> list[Row]:
        """The samples of a record. Raises Drop, BadRecord, and whatever the function raises."""
        for name in self.fields:
            text(record, name)
        made = self.function(record)
        if made is None:
            raise Drop("the transform gave none")
        return [made] if isinstance(made, dict) else list(made)


TRANSFORMS: dict[str, Transform] = {}
_loading: list[str] = []  # the user's file that is being imported


def transform(name: str, fields: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Make a function a transform. fields: keys whose values must be text in every record, checked before it is called.

    Raises ValueError for the name of a built-in one.
    """

    def register(function: Function) -> Function:
        known = TRANSFORMS.get(name)
        file = _loading[-1] if _loading else None
        if known is not None and known.file in (None, file):
            raise ValueError(f"there is a transform {name!r} already; choose another name")
        TRANSFORMS[name] = Transform(name, function, tuple(fields), file)
        return function

    return register


def find(cfg: Data) -> Transform:
    """The transform that `data` names, from the user's file where there is one. Raises DataError."""
    name = cfg.transform or KNOWN[cfg.name].transform
    assert name is not None
    if cfg.transform_file is not None:
        _load(cfg.transform_file)
    found = TRANSFORMS.get(name)
    if found is None:
        raise DataError(f"data.transform={name}: no such transform\n  fix: {nearest(name, TRANSFORMS)}")
    return found


def own_file(path: str) -> Path:
    """Where a transform file is: a frozen config names the copy in the run's code."""
    frozen = Path(__file__).resolve().parents[2] / path
    return frozen if not Path(path).is_absolute() and frozen.exists() else Path(path).expanduser().absolute()


@cache
def _load(path: str) -> ModuleType:
    file = own_file(path)
    try:
        spec = importlib.util.spec_from_file_location(f"transforms_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _loading.append(str(file))
        spec.loader.exec_module(module)
    except Exception as error:
        fix = "give a file that can be read" if isinstance(error, OSError) else "mend the file"
        raise DataError(f"data.transform_file={path}: {said(error, str(file))}\n  fix: {fix}") from error
    finally:
        _loading.clear()
    return module


def said(error: BaseException, file: str | None) -> str:
    """An exception in one line, with its line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{what} (line {lines[-1]})" if lines else what


# -------------------------------------------------------------------------------------- samples to rows


def text(record: Row, name: str) -> str:
    """The text at a key. Raises BadRecord."""
    value = record.get(name)
    if value is None:
        raise BadRecord(name, "is missing")
    if not isinstance(value, str):
        raise BadRecord(name, f"is {_kind(value)}, and must be text")
    return value


def optional(record: Row, name: str) -> str:
    """The text at a key that may be empty, null or absent."""
    return text(record, name) if record.get(name) is not None else ""


def turns(value: Any, name: str, role: str = "role", content: str = "content") -> list[Row]:
    """A list of {role, content} under other names. Raises BadRecord for anything else."""
    if value is None:
        raise BadRecord(name, "is missing")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRecord(name, f"is {_kind(value)}, and must be a list of {{{role}, {content}}}")
    found = []
    for number, turn in enumerate(value, 1):
        for key in (role, content):
            if not isinstance(turn.get(key), str):
                what = "is missing" if turn.get(key) is None else f"is {_kind(turn[key])}, and must be text"
                raise BadRecord(name, f"turn {number}: {key} {what}")
        found.append({"role": turn[role], "content": turn[content]})
    return found


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _said_by(sample: Row, name: str, who: Callable[[str], Row]) -> list[Row]:
    """A prompt or an answer as messages."""
    value = sample.get(name)
    return [who(value)] if isinstance(value, str) else turns(value, name)


def _conversation(messages: list[Row], last: str) -> list[Row]:
    """The messages, if they are a conversation: perhaps a system message, then user and assistant in turn."""
    roles = [m["role"] for m in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != expected[: len(roles)] or roles[-1] != last:
        raise Drop("turns out of order")
    if not all(m["content"].strip() for m in messages):
        raise Drop("an empty turn")
    return messages


KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "documents": (("text",),),
    "demonstrations": (("messages",), ("prompt", "completion")),
    "preferences": (("chosen", "rejected"),),
    "problems": (("prompt", "answer"),),
}
"""What a sample must have for each view: one of these sets of keys."""


def as_row(view: str, sample: Any) -> Row:
    """The row of a view that a sample gives.

    Raises Drop for what is well-formed but not to be trained on, BadRecord for what the sample lacks.
    """
    if not isinstance(sample, dict):
        raise BadRecord("sample", f"is {_kind(sample)}, and must be a dict")
    if not any(all(sample.get(key) is not None for key in keys) for keys in KEYS[view]):
        wanted = " or ".join(" and ".join(keys) for keys in KEYS[view])
        raise BadRecord(KEYS[view][0][0], f"is missing: {view} need {wanted}, and there is {', '.join(sample)}")
    if view == "documents":
        if not text(sample, "text").strip():
            raise Drop("empty text")
        return {"text": sample["text"]}
    if view == "demonstrations":
        if sample.get("messages") is not None:
            messages = turns(sample["messages"], "messages")
        else:
            messages = _said_by(sample, "prompt", user) + _said_by(sample, "completion", assistant)
        return {"messages": _conversation(messages, "assistant")}
    if view == "problems":
        answer = sample["answer"]
        answer = str(answer) if isinstance(answer, int | float) else text(sample, "answer")
        if not answer.strip():
            raise Drop("no answer to verify")
        return {"prompt": _conversation(_said_by(sample, "prompt", user), "user"), "answer": answer}
    sides = {side: _said_by(sample, side, assistant) for side in ("chosen", "rejected")}
    better, worse = sample.get("score_chosen"), sample.get("score_rejected")
    if isinstance(better, int | float) and isinstance(worse, int | float) and not better > worse:
        raise Drop("the chosen answer is not scored higher")
    # beside a prompt they may be whole conversations all the same, as in ultrafeedback_binarized
    whole = all(said and said[0]["role"] != "assistant" for said in sides.values())
    if whole or sample.get("prompt") is None:
        prompts = [said[:-1] for said in sides.values()]
        if prompts[0] != prompts[1]:
            raise Drop("chosen and rejected answer different prompts")
        prompt, sides = prompts[0], {side: said[-1:] for side, said in sides.items()}
    else:
        prompt = _said_by(sample, "prompt", user)
    for said in sides.values():
        if not said or not said[-1]["content"].strip():
            raise Drop("an empty answer")
        _conversation(prompt + said, "assistant")
    if sides["chosen"] == sides["rejected"]:
        raise Drop("chosen and rejected are the same")
    return {"prompt": prompt, **sides}


# ------------------------------------------------------------------------------------ the built-in ones


@transform("custom")
def custom(record: Row) -> Row:
    return record


@transform("text", fields=("text",))
def plain_text(record: Row) -> Row:
    meta = record.get("meta")
    return {"text": record["text"], "category": meta.get("pile_set_name") if isinstance(meta, dict) else None}


def instruction(asked: str, material: str, answer: str) -> Row:
    """An instruction with the text that it is about, if any, after a blank line."""
    return {"messages": [user(f"{asked}\n\n{material}" if material.strip() else asked), assistant(answer)]}


@transform("alpaca", fields=("instruction", "output"))
def alpaca(record: Row) -> Row:
    return instruction(record["instruction"], optional(record, "input"), record["output"])


@transform("dolly", fields=("instruction", "response"))
def dolly(record: Row) -> Row:
    sample = instruction(record["instruction"], optional(record, "context"), record["response"])
    return {**sample, "category": record.get("category")}


@transform("ultrachat")
def ultrachat(record: Row) -> Row:
    return {"messages": record.get("messages")}


SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def shared_gpt(record: Row) -> list[Row]:
    """Messages of {"conversations": [{"from", "value"}]}. An empty system message is none."""
    said = turns(record.get("conversations"), "conversations", "from", "value")
    for number, turn in enumerate(said, 1):
        if turn["role"] not in SPEAKERS:
            raise BadRecord("conversations", f"turn {number}: from {turn['role']}, none of {', '.join(SPEAKERS)}")
    messages = [{"role": SPEAKERS[turn["role"]], "content": turn["content"]} for turn in said]
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


@transform("slimorca")
def slimorca(record: Row) -> Row:
    return {"messages": shared_gpt(record)}


TRACE = re.compile(
    r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*)?",
    re.DOTALL,
)


@transform("openthoughts")
def openthoughts(record: Row) -> Row:
    """The system prompt, which asks for the marks, goes with them."""
    messages = []
    for turn in shared_gpt(record):
        if turn["role"] == "assistant":
            trace = TRACE.fullmatch(turn["content"])
            if trace is None:
                raise Drop("a trace without thought or solution")
            thought, solution = (part.strip() for part in trace.groups())
            if not thought or not solution:
                raise Drop("a trace without thought or solution")
            turn = assistant(think_answer(thought, solution))
        messages.append(turn)
    return {"messages": messages}


def gsm8k_solution(record: Row) -> tuple[str, str]:
    """Reasoning without its <<3*4=12>> notes, and the final number. Raises BadRecord for one without '#### N'."""
    thought, mark, answer = record["answer"].rpartition("####")
    if not mark:
        raise BadRecord("answer", f"no '#### N' in {record['answer'][-60:]!r}")
    return re.sub(r"<<[^>]*>>", "", thought).strip(), answer.strip().replace(",", "")


@transform("gsm8k", fields=("question", "answer"))
def gsm8k(record: Row) -> Row:
    question, (thought, answer) = record["question"], gsm8k_solution(record)
    return {
        "text": f"{question}\n{thought}\n#### {answer}",
        "messages": [user(question), assistant(think_answer(thought, answer))],
        "prompt": [user(question)],
        "answer": answer,
    }


def transcript(said: str) -> list[Row]:
    """Turns of '\\n\\nHuman: ...\\n\\nAssistant: ...'."""
    parts = re.split(r"\n\n(Human|Assistant):", said)[1:]
    roles = {"Human": user, "Assistant": assistant}
    return [roles[who](words.strip()) for who, words in zip(parts[::2], parts[1::2], strict=True)]


@transform("hh_rlhf", fields=("chosen", "rejected"))
def hh_rlhf(record: Row) -> Row:
    chosen = transcript(record["chosen"])
    return {
        "text": record["chosen"].strip(),
        "messages": chosen,
        "chosen": chosen,
        "rejected": transcript(record["rejected"]),
    }


@transform("ultrafeedback")
def ultrafeedback(record: Row) -> Row:
    names = ("chosen", "rejected", "score_chosen", "score_rejected")
    return {"messages": record.get("chosen"), **{name: record.get(name) for name in names}}


@transform("orca_dpo", fields=("question", "chosen", "rejected"))
def orca_dpo(record: Row) -> Row:
    asked = optional(record, "system")
    prompt = [*([system(asked)] if asked.strip() else []), user(record["question"])]
    return {
        "messages": [*prompt, assistant(record["chosen"])],
        "prompt": prompt,
        "chosen": [assistant(record["chosen"])],
        "rejected": [assistant(record["rejected"])],
    }
