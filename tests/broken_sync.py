"""A training process whose vLLM gets new weights so many times ($SYNCS), and no more after, without a word."""

from __future__ import annotations

import os
import sys

from post_training import train
from post_training.vllm_engine import Engine, Weights

syncs, load = int(os.environ["SYNCS"]), Engine.load


def broken(self: Engine, weights: Weights) -> None:
    global syncs
    if syncs > 0:
        load(self, weights)
    syncs -= 1


if __name__ == "__main__":
    Engine.load = broken  # type: ignore[method-assign]
    sys.exit(train.main())
