"""What an evaluation asks by others' means: benchmarks through lm-eval, and a language model as the judge.

    outside = Outside(cfg)                              before the model is loaded: what fails, fails early
    figures |= outside.ask(model, tokenizer, journal, pulse, answer)
    outside.write(folder)                               beside results.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import Config
from post_training.evaluation import benchmarks, judge
from post_training.evaluation.journal import Journal
from post_training.run.directory import write_atomic
from post_training.run.results import Figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Outside:
    """Benchmarks and the judge of one evaluation, where `eval.tasks` and `eval.judge` ask for them."""

    def __init__(self, cfg: Config) -> None:
        """Raises DataError for a judge that does not answer, files that cannot be read, tasks that cannot be had."""
        self.cfg = cfg
        self.files: dict[str, list[dict[str, Any]]] = {}
        if cfg.eval.judge.base_url is not None:
            judge.reference(cfg.eval.judge, judge.questions(cfg.eval.judge))
            judge.check(cfg.eval.judge)
        self.tasks = benchmarks.load(cfg) if cfg.eval.tasks else None

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        return self.tasks is not None or self.cfg.eval.judge.base_url is not None

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
        pulse: Callable[..., None],
        answer: Callable[[list[str], int], list[str]],
    ) -> dict[str, Figure]:
        """Their figures. answer: the model's answers to prompts, of at most so many tokens. Raises DataError."""
        figures: dict[str, Figure] = {}
        if self.tasks is not None:
            found, self.files[benchmarks.SAMPLES] = benchmarks.run(
                model, tokenizer, self.tasks, self.cfg, journal, pulse
            )
            figures |= found
        if self.cfg.eval.judge.base_url is not None:
            longest = self.cfg.eval.judge.max_new_tokens
            found, self.files[judge.SAMPLES] = judge.run(lambda p: answer(p, longest), self.cfg, journal, pulse)
            figures |= found
        return figures

    def write(self, folder: Path) -> None:
        """What was asked and answered, into an output that is being made."""
        for name, rows in self.files.items():
            write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
