"""The data sets there are: where they come from and what stages can train on them. One file each in conf/data/.

The transforms that read their records are in post_training/data/transforms.py. Nothing here imports `datasets`.
"""

from __future__ import annotations

from dataclasses import dataclass

VIEWS = {
    "documents": "plain text",
    "demonstrations": "demonstrations",
    "preferences": "preference pairs",
    "problems": "prompts with answers",
}
"""The forms that stages train on, each in words."""

STAGE_VIEWS = {
    "base": "documents", "sft": "demonstrations", "distill": "demonstrations",
    "rm": "preferences", "dpo": "preferences", "orpo": "preferences", "kto": "preferences",
    "ppo": "problems", "grpo": "problems", "rloo": "problems", "sample": "problems",
}  # fmt: skip
"""What a technique trains on. Those that are not here take what there is."""


@dataclass(frozen=True)
class Known:
    """A data set: what it gives, and where its publisher has it."""

    views: tuple[str, ...]
    transform: str | None  # name of the built-in transform that reads its records; None: generated
    hub_id: str | None = None  # None: data.path must say where the records are
    subset: str | None = None  # the hub's configuration
    split: str = "train"  # on the hub; local files are all one split, train
    eval_split: str | None = None  # held-out records on the hub; None: they are kept from `split`
    subset_is_folder: bool = False  # the hub has folders and no configurations


PAIRS, CHAT = ("preferences",), ("demonstrations",)
KNOWN: dict[str, Known] = {
    "arithmetic": Known(tuple(VIEWS), None),
    "text": Known(("documents",), "text"),
    "alpaca": Known(CHAT, "alpaca", "tatsu-lab/alpaca"),
    "alpaca_cleaned": Known(CHAT, "alpaca", "yahma/alpaca-cleaned"),
    "dolly": Known(CHAT, "dolly", "databricks/databricks-dolly-15k"),
    "ultrachat": Known(CHAT, "ultrachat", "HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft"),
    "slimorca": Known(CHAT, "slimorca", "Open-Orca/SlimOrca"),
    "openthoughts": Known(CHAT, "openthoughts", "open-thoughts/OpenThoughts-114k"),
    "gsm8k": Known(("documents", *CHAT, "problems"), "gsm8k", "openai/gsm8k", "main", "train", "test"),
    "hh_rlhf": Known(
        ("documents", *CHAT, *PAIRS), "hh_rlhf", "Anthropic/hh-rlhf", None, "train", "test", subset_is_folder=True
    ),
    "ultrafeedback": Known(
        (*CHAT, *PAIRS), "ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"
    ),
    "orca_dpo": Known((*CHAT, *PAIRS), "orca_dpo", "Intel/orca_dpo_pairs"),
    "custom": Known(tuple(VIEWS), "custom"),
}

TRANSFORMS = tuple(dict.fromkeys(known.transform for known in KNOWN.values() if known.transform))
"""Names of the built-in transforms."""


def having(view: str) -> list[str]:
    """Names of the data sets that give a view."""
    return [name for name, known in KNOWN.items() if view in known.views]


def views_of(name: str, transform: str | None) -> tuple[str, ...] | None:
    """What a data set gives through a transform, null: its own. None: not known here, the transform is the user's."""
    if transform is None:
        return KNOWN[name].views
    return next((known.views for known in KNOWN.values() if known.transform == transform), None)
