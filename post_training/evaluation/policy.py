"""Judging a policy: what its data can ask it, and the figures that come out of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from conf.datasets import VIEWS
from conf.schema import Config, Data, Eval, Reward
from post_training import data
from post_training.data.source import DataError
from post_training.evaluation import answers, figures, rules, scoring
from post_training.evaluation.models import (
    config_of,
    first,
    loaded,
    require_positions,
    require_template,
    say,
    unusable,
)  # fmt: skip
from post_training.evaluation.work import Part, Work
from post_training.rewards import verify
from post_training.rewards.steps import step_figures
from post_training.run.results import Figure
from post_training.stages.common import Stage, load_causal_lm, that_fit

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

Samples = list[dict[str, Any]]


class Policy:
    """One policy's evaluation: `plan` says what is asked; once it was, `figures` and `samples` tell what came out."""

    def __init__(self, stage: Stage, config: PretrainedConfig, work: Work) -> None:
        assert stage.model_path is not None
        self.stage, self.config, self.work = stage, config, work
        self.cfg, self.how, self.tokenizer = stage.cfg, stage.cfg.eval, stage.tokenizer
        path, reference = stage.model_path, stage.reference_path
        self.model = cache(lambda: loaded(load_causal_lm, stage, path, work.pulse))
        self.start = cache(lambda: loaded(load_causal_lm, stage, str(reference), work.pulse))
        self.source = data.load(self.cfg.data)
        self.settings: dict[str, Any] = {"data": self.cfg.data.name, "seed": self.cfg.seed}
        self.problem: DataError | None = None  # the first one with the data
        self.problems: Dataset | None = None
        self.instructions: list[rules.Instruction] = []
        self.greedy: Part | None = None
        self.sampled: Part | None = None
        self.followed: Part | None = None
        self.likelihoods: dict[str, Part] = {}
        self.kl: Part | None = None
        self.pairs: Part | None = None

    # -- what is asked

    def plan(self) -> None:
        """Add what the data can ask to the work."""
        self._ask()
        self._read()
        self._compare()

    def nothing(self) -> DataError:
        """Why the data can ask nothing."""
        problem = "has no held-out problems, answers or documents"
        return self.problem or DataError(f"data.name={self.cfg.data.name}: {problem}\n  fix: another data set")

    def answer(self, prompts: Sequence[str], longest: int) -> list[str]:
        """Greedy answers of at most `longest` tokens to questions from outside, such as the judge's."""
        require_template(self.stage)
        room = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        how = replace(self.how, max_new_tokens=min(longest, room // 2) if room else longest)
        texts = answers.rendered(self.tokenizer, [[data.user(p)] for p in prompts])
        found: list[str] = [""] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ask = self._answerer(how, texts)
        for i in range(0, len(order), how.batch_size):
            batch = order[i : i + how.batch_size]
            for number, said in zip(batch, ask([texts[n] for n in batch], 1, 0.0, 0), strict=True):
                found[number] = self.text(said[0])
        return found

    def _answerer(self, how: Eval, texts: Sequence[str]) -> answers.Answerer:
        """Who answers these texts."""
        if how.backend == "vllm":
            longest = max(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
            return answers.by_vllm(self.model, self.tokenizer, how, longest, self.work.pulse)
        return partial(answers.by_transformers, self.model, self.tokenizer, how.max_new_tokens)

    def view(self, view: str, source: data.Source) -> Dataset | None:
        """The held-out rows of a view, at most eval.num_problems; None where the data set has none of them."""
        if view not in source.views:
            return None
        try:
            return first(source.view(view, "held_out"), self.how.num_problems)
        except DataError as error:  # records of a user's own may have one view, and lack the others
            self.problem = self.problem or error
            say(f"{VIEWS[view]} are left out: {str(error).splitlines()[0]}")
            return None

    def _ask(self) -> None:
        """Problems, greedily and by sampling, and instructions."""
        how, tokenizer = self.how, self.tokenizer
        self.problems = self.view("problems", self.source)
        self.instructions = rules.instructions(how.num_instructions, self.cfg.seed)
        if self.problems is None and not self.instructions:
            return
        require_template(self.stage)
        self.settings |= {"backend": how.backend, "max_new_tokens": how.max_new_tokens}
        asked = [] if self.problems is None else answers.rendered(tokenizer, self.problems["prompt"])
        told = answers.rendered(tokenizer, [[data.user(i.prompt)] for i in self.instructions])
        longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in [*asked, *told])
        room = getattr(self.config, "n_positions", 0) - longest
        fix = f"eval.max_new_tokens={room}" if room > 0 else "data with shorter prompts, or another model"
        require_positions(self.config, "eval.max_new_tokens", how.max_new_tokens, longest + how.max_new_tokens, fix)
        answer = self._answerer(how, [*asked, *told])
        # vLLM batches by itself; with more at hand it waits less for the longest
        size = how.batch_size * (4 if how.backend == "vllm" else 1)

        def greedily(_: int, batch: list[str]) -> list[Any]:
            return [found[0] for found in answer(batch, 1, 0.0, 0)]

        def sampling(number: int, batch: list[str]) -> list[Any]:
            return answer(batch, how.num_samples, how.temperature, (self.cfg.seed * 1_000_003 + number) % 2**32)

        if asked:
            self.greedy = self.work.add("greedy", asked, size, greedily, length=len)
            if how.num_samples:
                at_once = max(1, size // how.num_samples)
                self.sampled = self.work.add("sampled", asked, at_once, sampling, length=len)
                self.settings |= {"num_samples": how.num_samples, "temperature": how.temperature}
        if told:
            self.followed = self.work.add("instructions", told, size, greedily, length=len)

    def _read(self) -> None:
        """Likelihoods of held-out documents and answers."""
        width = self.cfg.training.max_length
        self.rows: dict[str, list[scoring.Row]] = {}
        about, source = text_source(self.cfg)
        if self.how.text.name is not None:
            texts: Dataset | None = first(source.documents("held_out"), self.how.num_problems)
        else:
            texts = self.view("documents", source)
        if texts is not None:
            self.rows["perplexity_text"] = scoring.documents(texts["text"], self.tokenizer, width)
            self.settings["text"] = about
        if (answered := self.view("demonstrations", self.source)) is not None:
            require_template(self.stage)
            rows = scoring.demonstrations(answered["messages"], self.tokenizer, width)
            if any(any(mask[1:]) for _, mask in rows):
                self.rows["perplexity_answers"] = rows
            else:
                say("perplexity_answers is left out: the chat template marks no answers with {% generation %}")
        for name, rows in self.rows.items():
            longest = max(len(ids) for ids, _ in rows)
            fix = f"training.max_length={getattr(self.config, 'n_positions', 0)}"
            require_positions(self.config, "training.max_length", width, longest, fix)
            self.likelihoods[name] = self.work.add(
                name, rows, self.at_once(longest), lambda _, batch: scoring.likelihoods(self.model(), batch, self.pad)
            )

    def _compare(self) -> None:
        """Distance from the start model, and which answers became likelier since."""
        if self.stage.reference_path is None:
            return
        if (why := self._incomparable(self.stage.reference_path)) is not None:
            say(f"kl_start and implicit_accuracy are left out: {why}")
            return
        width = self.cfg.training.max_length
        if self.greedy is not None:
            asked = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.greedy.items]
            longest = max(map(len, asked)) + self.how.max_new_tokens
            self.settings["kl_start"] = "own greedy answers"
            self.kl = self.work.add(
                "kl_start", range(len(asked)), self.at_once(longest),
                lambda _, batch: self._divergences([self._own(asked[i], i) for i in batch]),
                length=lambda i: len(asked[i]),
            )  # fmt: skip
        elif "perplexity_answers" in self.rows:
            rows = self.rows["perplexity_answers"]
            self.settings["kl_start"] = "held-out answers"
            size = self.at_once(max(len(ids) for ids, _ in rows))
            self.kl = self.work.add("kl_start", rows, size, lambda _, batch: self._divergences(batch))
        given = self.view("preferences", self.source)
        if given is None or not len(given := that_fit(self.stage, given)):
            return
        require_template(self.stage)
        two = scoring.pairs(given, self.tokenizer, width)
        longest = max(len(ids) for both in two for ids, _ in both)
        require_positions(self.config, "training.max_length", width, longest, "training.max_length=<positions>")
        self.pairs = self.work.add(
            "implicit_accuracy", two, max(1, self.at_once(longest) // 2),
            lambda _, batch: scoring.preferred(self.model(), self.start(), batch, self.pad),
        )  # fmt: skip

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def at_once(self, longest: int) -> int:
        """Rows of one forward pass."""
        return scoring.at_once(self.how.batch_size, longest, self.config.get_text_config().vocab_size)

    def _own(self, prompt: list[int], number: int) -> scoring.Row:
        """The model's own greedy answer to a prompt, its end included, as a row."""
        assert self.greedy is not None
        ids, cut = self.greedy.found[number]
        said = ids if cut else [*ids, self.tokenizer.eos_token_id]
        return [[*prompt, *said], [0] * len(prompt) + [1] * len(said)]

    def _divergences(self, rows: list[scoring.Row]) -> list[list[float]]:
        return scoring.divergences(self.model(), self.start(), rows, self.pad)

    def _incomparable(self, reference: str) -> str | None:
        """Why the start model cannot be compared with token by token; None where it can."""
        from transformers import AutoTokenizer

        if (why := unusable(Path(reference))) is not None:
            return f"the start model {reference} {why}"
        if crowded(reference, self.how):
            return "two models at once do not fit into the GPU"
        try:
            theirs = config_of(reference)
            paths = (self.stage.model_path, reference)
            tokenizers = [AutoTokenizer.from_pretrained(path).get_vocab() for path in paths]
        except (OSError, ValueError) as error:
            return f"the start model {reference} cannot be read: {str(error).strip().splitlines()[0]}"
        if any("SequenceClassification" in a for a in theirs.architectures or []):
            return f"the start model {reference} is a reward model"
        sizes = [c.get_text_config().vocab_size for c in (self.config, theirs)]
        if sizes[0] != sizes[1]:
            return f"the start model {reference} has another vocabulary ({sizes[1]} tokens, not {sizes[0]})"
        return None if tokenizers[0] == tokenizers[1] else f"the start model {reference} has another tokenizer"

    # -- what came out

    def figures(self) -> dict[str, Figure]:
        """Every figure, once the work has run."""
        found: dict[str, Figure] = {}
        if self.greedy is not None:
            found |= self._of_answers()
        if self.sampled is not None:
            found |= self._of_samples()
        if self.followed is not None:
            found["instructions"] = figures.share([i.kept(self.text(a)) for i, a in self._followed()])
        for name, part in self.likelihoods.items():
            nll, tokens = zip(*part.found, strict=True)
            found[name] = figures.perplexity(nll, tokens)
        if self.kl is not None:
            kl, tokens = zip(*self.kl.found, strict=True)
            mean = figures.ratio(kl, tokens)
            found["kl_start"] = replace(mean, low=None if mean.low is None else max(0.0, mean.low))
        if self.pairs is not None:
            found["implicit_accuracy"] = figures.share([gain > 0 for gain in self.pairs.found])
        return found

    def text(self, answer: answers.Answer) -> str:
        return answers.text_of(self.tokenizer, answer)

    def _of_answers(self) -> dict[str, Figure]:
        assert self.greedy is not None and self.problems is not None
        said = self.greedy.found
        texts, ids = [self.text(a) for a in said], [a[0] for a in said]
        right = [verify.is_correct(text, answer) for text, answer in zip(texts, self.problems["answer"], strict=True)]
        form = [verify.has_format(text) for text in texts]
        weights = Reward()
        distinct = {f"distinct_{n}": figures.distinct(ids, n) for n in (1, 2)}
        return {
            "accuracy": figures.share(right),
            "format": figures.share(form),
            "reward": figures.average(
                [weights.correct * r + weights.format * f for r, f in zip(right, form, strict=True)]
            ),
            "repetition": figures.average([figures.repetition(one) for one in ids]),
            "length": figures.average([float(len(one)) for one in ids]),
            "truncated": figures.share([a[1] for a in said]),
            **{k: Figure(v, count=len(said)) for k, v in (distinct | step_figures(texts)).items() if v is not None},
        }

    def _of_samples(self) -> dict[str, Figure]:
        assert self.sampled is not None and self.problems is not None
        count = self.how.num_samples
        right, agreed = [], []
        for said, answer in zip(self.sampled.found, self.problems["answer"], strict=True):
            texts = [self.text(a) for a in said]
            right.append(sum(verify.is_correct(text, answer) for text in texts))
            vote = figures.majority([verify.parse_answer(text) for text in texts])
            agreed.append(vote is not None and vote == verify.number(answer))
        passed = {f"pass@{k}": figures.pass_figure(right, count, k) for k in figures.powers_of_two(count)}
        return {**passed, "majority": figures.share(agreed)}

    def _followed(self) -> list[tuple[rules.Instruction, answers.Answer]]:
        return list(zip(self.instructions, self.followed.found, strict=True)) if self.followed is not None else []

    def samples(self) -> Samples:
        """Lines of samples.jsonl: a problem each, then an instruction each."""
        lines: Samples = []
        if self.greedy is not None and self.problems is not None:
            for number, (said, problem) in enumerate(zip(self.greedy.found, self.problems, strict=True)):
                text = self.text(said)
                line = {
                    "prompt": problem["prompt"][-1]["content"], "answer": problem["answer"],
                    "completion": text, "correct": verify.is_correct(text, problem["answer"]),
                }  # fmt: skip
                if self.sampled is not None:
                    line["samples"] = [self.text(a) for a in self.sampled.found[number]]
                lines.append(line)
        for asked, said in self._followed():
            text = self.text(said)
            kinds = [rule.kind for rule in asked.rules]
            line = {"prompt": asked.prompt, "answer": ", ".join(r.text for r in asked.rules), "completion": text}
            lines.append(line | {"correct": asked.kept(text), "rules": kinds})
        return lines


def crowded(path: str, how: Eval) -> bool:
    """Whether the GPU has no room for two models as large as the one in this folder, beside what vLLM takes."""
    if not torch.cuda.is_available():
        return False
    weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    share = how.gpu_memory_utilization if how.backend == "vllm" else 0.0
    return 2.2 * weights > (1 - share) * torch.cuda.get_device_properties(0).total_memory


def text_source(cfg: Config) -> tuple[dict[str, Any], data.Source]:
    """The text on which forgetting is measured, its name and path first: eval.text, the base stage's, or the data's."""
    how, own = cfg.eval, cfg.data
    if how.text.name is not None:
        given = asdict(how.text)
        held_out = given.pop("held_out") or own.held_out
        plain = replace(own, datasets=[], eval_path=None, eval_split=None, **given, held_out=held_out)
    elif how.base_text:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), how.base_text))
        assert isinstance(merged, Data)
        plain = merged
    else:
        plain = own
    named = [p.name for p in plain.datasets] or [plain.name]
    return {"name": ", ".join(named), "path": plain.path}, data.load(plain)
