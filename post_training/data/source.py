"""What every data set offers to the stages. A set that lacks a kind says so with the fix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from conf.datasets import VIEWS, having
from conf.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset, Features

Split = Literal["train", "held_out"]
Row = dict[str, Any]


class DataError(ValueError):
    """Records that cannot be used; its text names key, file or row, and the fix."""


def features(view: str) -> Features:
    """Columns of a view, the same for every data set, so that they can be mixed."""
    from datasets import Features, List, Value

    text = Value("string")
    messages = List({"role": text, "content": text})
    columns = {
        "documents": {"text": text},
        "demonstrations": {"messages": messages},
        "preferences": {"prompt": messages, "chosen": messages, "rejected": messages},
        "problems": {"prompt": messages, "answer": text},
    }
    return Features(columns[view])


@dataclass
class Samples:
    """What one data set gives of one view, before anything is chosen among its samples."""

    rows: Dataset
    categories: list[str | None]  # one a row
    records: int  # that they were made of
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> samples that cannot be used


class Source(ABC):
    """Records of one data set in the forms that stages train on, each for `train` and `held_out`."""

    views: tuple[str, ...] = tuple(VIEWS)

    def __init__(self, cfg: Data) -> None:
        self.cfg = cfg

    def documents(self, split: Split) -> Dataset:
        """{"text"}: for base."""
        return self.view("documents", split)

    def demonstrations(self, split: Split) -> Dataset:
        """{"messages": [{role, content}, ...]}: for sft."""
        return self.view("demonstrations", split)

    def preferences(self, split: Split) -> Dataset:
        """{"prompt", "chosen", "rejected"}, each a list of messages: for rm, dpo and orpo."""
        return self.view("preferences", split)

    def unpaired(self, split: Split) -> Dataset:
        """{"prompt", "completion", "label": bool}: both answers of every preference pair, shuffled: for kto."""

        def both(pairs: dict[str, list[Any]]) -> dict[str, list[Any]]:
            answers = [answer for pair in zip(pairs["chosen"], pairs["rejected"], strict=True) for answer in pair]
            prompts = [prompt for prompt in pairs["prompt"] for _ in range(2)]
            return {"prompt": prompts, "completion": answers, "label": [True, False] * len(pairs["prompt"])}

        pairs = self.preferences(split)
        rows = pairs.map(both, batched=True, remove_columns=["chosen", "rejected"], load_from_cache_file=False)
        return rows.shuffle(seed=self.cfg.seed)

    def problems(self, split: Split) -> Dataset:
        """{"prompt": messages, "answer": str}: verifiable prompts for ppo, grpo and eval."""
        return self.view("problems", split)

    def view(self, view: str, split: Split) -> Dataset:
        """The rows of one of conf.datasets.VIEWS. Raises DataError where it has no such view."""
        self.check_view(view)
        return self.samples(view, split).rows

    def check_view(self, view: str) -> None:
        """Raise DataError where it has no such view."""
        if view not in self.views:
            raise DataError(
                f"data.name={self.cfg.name}: has no {VIEWS[view]}\n"
                f"  fix: give this stage one of {', '.join(having(view))}, as in sft.data={having(view)[0]}"
            )

    @abstractmethod
    def samples(self, view: str, split: Split) -> Samples:
        """The same with what became of the records. Called only for views that it has."""


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def think_answer(thought: str, answer: str) -> str:
    """The form that demonstrations teach and the verifier reads."""
    return f"<think>{thought}</think><answer>{answer}</answer>"
