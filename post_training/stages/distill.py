"""distill: supervised fine-tuning on reasoning traces in think/answer form, whole ones alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from post_training.data.source import DataError
from post_training.rewards.steps import thought
from post_training.rewards.verify import has_format
from post_training.stages.common import Stage
from post_training.stages.sft import build, demonstrations

if TYPE_CHECKING:
    from datasets import Dataset


def build_trainer(stage: Stage) -> Trainer:
    """As sft with the section `distill`, on what `traces` keeps. Raises DataError where that is nothing."""
    return build(stage, stage.cfg.distill, lambda: traces(stage, demonstrations(stage)))


def traces(stage: Stage, rows: Dataset) -> Dataset:
    """The rows that teach a whole reasoning: a thought and an answer in form, and within training.max_length.

    A trace that is cut has no answer, and would teach to go on thinking. Says what was left out, and why.
    """
    longest = stage.cfg.training.max_length

    def problem(row: dict[str, Any]) -> str:
        messages = row["messages"]
        said = messages[-1]["content"]
        if messages[-1]["role"] != "assistant" or not has_format(said):
            return "not in the form <think>...</think><answer>...</answer>"
        if not thought(said):
            return "without a thought"
        tokens = len(stage.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        return f"longer than training.max_length={longest}" if tokens > longest else ""

    problems = rows.map(lambda row: {"problem": problem(row)}, load_from_cache_file=False)["problem"]
    kept = rows.select([i for i, why in enumerate(problems) if not why])
    counts = {why: problems[:].count(why) for why in sorted(set(problems)) if why}
    left_out = "; ".join(f"{count} {why}" for why, count in counts.items())
    if not len(kept):
        raise DataError(
            f"data.name={stage.cfg.data.name}: no trace to distill in {len(rows)} records: {left_out}\n"
            "  fix: data with a transform into think/answer form, or a longer training.max_length"
        )
    without = f"; left out: {left_out}" if counts else ""
    print(f"distill: {len(kept)} of {len(rows)} traces{without}", file=sys.stderr)
    return kept
