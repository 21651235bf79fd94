"""Records in; text, demonstrations, preference pairs and verifiable prompts out."""

from __future__ import annotations

from conf.schema import Data
from post_training.data.arithmetic import Arithmetic
from post_training.data.records import Gsm8k, HhRlhf
from post_training.data.source import DataError, Source

SOURCES: dict[str, type[Source]] = {"arithmetic": Arithmetic, "gsm8k": Gsm8k, "hh_rlhf": HhRlhf}


def load(cfg: Data) -> Source:
    """The data set named by `data.name`."""
    return SOURCES[cfg.name](cfg)


__all__ = ["SOURCES", "DataError", "Source", "load"]
