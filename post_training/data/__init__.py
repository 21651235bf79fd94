"""Records in; text, demonstrations, preference pairs and verifiable prompts out."""

from __future__ import annotations

from conf.datasets import KNOWN
from conf.schema import Data
from post_training.data.arithmetic import Arithmetic
from post_training.data.mix import Mix, Part, configs, reports_as_json
from post_training.data.records import Records
from post_training.data.source import DataError, Source, assistant, system, think_answer, user
from post_training.data.transforms import Drop, transform


def load(cfg: Data) -> Source:
    """The data set named by `data.name`, or the mix of `data.datasets`."""
    parts = []
    for own, weight in configs(cfg):
        kind = Arithmetic if KNOWN[own.name].transform is None else Records
        parts.append(Part(own.name, kind(own), weight))
    return Mix(cfg, parts)


__all__ = [
    "DataError", "Drop", "Source", "assistant", "load", "reports_as_json", "system", "think_answer", "transform", "user"
]  # fmt: skip
