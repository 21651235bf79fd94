"""What every data set offers to the stages. A set that lacks a kind says so with the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from conf.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "held_out"]
Row = dict[str, Any]


class DataError(ValueError):
    """Records that cannot be used; its text names key, file or row, and the fix."""


class Source:
    """Records of one data set in the forms that stages train on, each for `train` and `held_out`."""

    def __init__(self, cfg: Data) -> None:
        self.cfg = cfg

    def documents(self, split: Split) -> Dataset:
        """{"text"}: for base."""
        raise self._lacks("plain text")

    def demonstrations(self, split: Split) -> Dataset:
        """{"messages": [{role, content}, ...]}: for sft."""
        raise self._lacks("demonstrations")

    def preferences(self, split: Split) -> Dataset:
        """{"prompt", "chosen", "rejected"}, each a list of messages: for rm, dpo and orpo."""
        raise self._lacks("preference pairs")

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
        raise self._lacks("prompts with answers")

    def _lacks(self, kind: str) -> DataError:
        return DataError(
            f"data.name={self.cfg.name}: has no {kind}\n  fix: give this stage another data set, as in sft.data=gsm8k"
        )


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def think_answer(thought: str, answer: str) -> str:
    """The form that demonstrations teach and the verifier reads."""
    return f"<think>{thought}</think><answer>{answer}</answer>"
