"""eval: the held-out judgement of one model, in seconds, offline.

A policy is asked the held-out problems greedily and judged by the same parser as the rewards; a reward model is
judged on held-out pairs. What a data set cannot ask is left out of the results, not guessed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.schema import Eval, Reward
from post_training import data
from post_training.attempt import StopFlag, Watchdog
from post_training.data.source import DataError
from post_training.evaluation.journal import Journal
from post_training.evaluation.outside import Outside
from post_training.rewards.steps import step_figures
from post_training.rewards.verify import has_format, is_correct
from post_training.run import ledger, life, results
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.progress import Progress
from post_training.run.results import Figure, Results
from post_training.stages.common import Stage, finish, load_causal_lm, load_reward_model, open_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): for z=1.96, 95 %.

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
    """
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(margins: Sequence[float], bins: int = 10) -> dict[str, float]:
    """How well sigmoid(margin), a Bradley-Terry model's probability that the chosen answer is the better one, is met.

    margins: reward(chosen) - reward(rejected), [pairs]. `brier`: mean of (1 - sigmoid(margin))^2 (Brier 1950).
    `calibration_error`: expected calibration error (Guo 2017), the mean over pairs of |accuracy - confidence| of the
    pair's bin. Confidence is sigmoid(|margin|), that of the answer which the model prefers, in equal bins of 0.5 to 1;
    a margin of 0 is half right.
    """
    confident = [_sigmoid(abs(m)) for m in margins]
    right = [0.5 if m == 0 else float(m > 0) for m in margins]
    gaps = [0.0] * bins
    for confidence, ok in zip(confident, right, strict=True):
        gaps[min(int((confidence - 0.5) * 2 * bins), bins - 1)] += ok - confidence
    return {
        "brier": _mean([(1 - _sigmoid(m)) ** 2 for m in margins]),
        "calibration_error": sum(map(abs, gaps)) / len(margins),
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before: 0 where none repeats."""
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


class Asked(Exception):
    """The attempt is to leave: an evaluation has nothing to save, and starts again."""


def make_pulse(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> Callable[..., None]:
    """What to call before each forward pass: alive, and ready to leave, by Asked, in the middle of a long answer."""
    stop_flag = StopFlag()
    looked = 0.0

    def pulse(*_: object) -> None:
        nonlocal looked
        watchdog.beat()
        progress.write()
        if stop_flag.is_set or (time.monotonic() - looked > 1 and run.stop_requested(attempt)):
            raise Asked
        looked = max(looked, time.monotonic() - 1)

    return pulse


def evaluate(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> int:
    """Judge the run's input model and write its output: results.json and samples.jsonl. Returns the exit code."""
    pulse = make_pulse(run, attempt, progress, watchdog)
    stage = open_stage(run)
    assert stage.model_path is not None
    with run.writing_as(attempt):
        ledger.append(run.ledger, "training_started", attempt=attempt, step=0)
    progress.enter("evaluation")
    config = json.loads((Path(stage.model_path) / "config.json").read_text()) if Path(stage.model_path).is_dir() else {}
    is_reward_model = any("SequenceClassification" in a for a in config.get("architectures") or [])
    outside = None if is_reward_model else Outside(stage.cfg)
    try:
        if outside is None:
            found, samples = judge_reward_model(stage, pulse)
        else:
            found, samples = judge_policy(stage, pulse, outside, Journal(run, attempt))
    except Asked:
        with run.writing_as(attempt):
            ledger.append(run.ledger, "stopped", attempt=attempt, step=0)
        return life.STOPPED
    progress.enter("saving")
    partial = run.model.with_name(f"model.partial-{attempt}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    results.write(partial, found)
    write_atomic(partial / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    if outside is not None:
        outside.write(partial)
    with run.writing_as(attempt):
        finish(run, partial)
    progress.enter("saving")
    return 0


def judge_reward_model(
    stage: Stage, pulse: Callable[..., None] | None = None
) -> tuple[Results, list[dict[str, Any]]]:
    """Held-out preference accuracy, margin, mean reward and calibration of a reward model.

    pulse: called before each forward pass.
    """
    cfg, tokenizer = stage.cfg, stage.tokenizer
    assert stage.model_path is not None
    model = _ready(load_reward_model(cfg, stage.model_path, tokenizer), pulse)
    pairs = data.load(cfg.data).preferences("held_out")
    pairs = pairs.select(range(min(len(pairs), cfg.eval.num_problems)))
    scores: dict[str, list[float]] = {}
    for side in ("chosen", "rejected"):
        texts = [tokenizer.apply_chat_template(r["prompt"] + r[side], tokenize=False) for r in pairs]
        scores[side] = _reward_scores(model, tokenizer, texts, cfg.eval.batch_size, cfg.training.max_length)
    margins = [c - r for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
    wins = sum(m > 0 for m in margins)
    low, high = wilson_interval(wins, len(margins))
    others = {
        "margin": sum(margins) / len(margins),
        "mean_reward": _mean(scores["chosen"] + scores["rejected"]),
        **calibration(margins),
    }
    figures = {"preference_accuracy": Figure(wins / len(margins), low, high, len(margins))}
    figures |= {name: Figure(value) for name, value in others.items()}
    return Results("preference_accuracy", figures), []


@torch.no_grad()
def _reward_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int, max_length: int
) -> list[float]:
    scores: list[float] = []
    for chunk in _chunks(texts, batch_size):
        batch = tokenizer(
            chunk, add_special_tokens=False, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        scores += model(**batch.to(model.device)).logits[:, 0].float().tolist()
    return scores


def _ready(model: PreTrainedModel, pulse: Callable[..., None] | None) -> PreTrainedModel:
    if pulse is not None:
        model.register_forward_pre_hook(pulse)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]


def judge_policy(
    stage: Stage,
    pulse: Callable[..., None] | None = None,
    outside: Outside | None = None,
    journal: Journal | None = None,
) -> tuple[Results, list[dict[str, Any]]]:
    """Greedy accuracy, form, repetition and length on held-out problems; perplexity of held-out text and answers.

    pulse: called before each forward pass.
    """
    cfg, tokenizer = stage.cfg, stage.tokenizer
    assert stage.model_path is not None
    model = _ready(load_causal_lm(cfg, stage.model_path, tokenizer), pulse)
    source = data.load(cfg.data)
    limit = cfg.eval.num_problems
    figures: dict[str, Figure] = {}
    samples: list[dict[str, Any]] = []
    started = time.monotonic()

    try:
        problems = source.problems("held_out")
    except DataError:
        problems = None
    if problems is not None:
        problems = problems.select(range(min(len(problems), limit)))
        asked, how = problems["prompt"], cfg.eval
        if how.backend == "vllm":
            answers = answers_by_vllm(model, tokenizer, asked, how, pulse)
        else:
            answers = greedy_answers(model, tokenizer, asked, how.max_new_tokens, how.batch_size)
        right = [is_correct(text, a) for (text, _), a in zip(answers, problems["answer"], strict=True)]
        form = [has_format(text) for text, _ in answers]
        weights = Reward()
        low, high = wilson_interval(sum(right), len(right))
        figures["accuracy"] = Figure(sum(right) / len(right), low, high, len(right))
        others = {
            "format": sum(form) / len(form),
            "reward": _mean([weights.correct * r + weights.format * f for r, f in zip(right, form, strict=True)]),
            "repetition": _mean([repetition(ids) for _, ids in answers]),
            "length": _mean([float(len(ids)) for _, ids in answers]),
            **step_figures([text for text, _ in answers]),
        }
        figures |= {name: Figure(value) for name, value in others.items() if value is not None}
        samples = [
            {"prompt": p[-1]["content"], "answer": a, "completion": text, "correct": ok}
            for p, a, (text, _), ok in zip(problems["prompt"], problems["answer"], answers, right, strict=True)
        ]

    for name, rows in (("perplexity_text", _documents), ("perplexity_answers", _demonstrations)):
        try:
            tokens = rows(source, tokenizer, limit, cfg.training.max_length)
        except DataError:
            continue
        figures[name] = Figure(perplexity(model, tokens, cfg.eval.batch_size, tokenizer.pad_token_id))
    headline = "accuracy" if "accuracy" in figures else None
    if outside is not None and journal is not None and pulse is not None:

        def answer(prompts: list[str], longest: int) -> list[str]:
            how = replace(cfg.eval, max_new_tokens=min(longest, model.config.max_position_embeddings // 2))
            asked = [[{"role": "user", "content": p}] for p in prompts]
            if how.backend == "vllm":
                found = answers_by_vllm(model, tokenizer, asked, how, pulse)
            else:
                found = greedy_answers(model, tokenizer, asked, how.max_new_tokens, how.batch_size)
            return [text for text, _ in found]

        theirs = outside.ask(model, tokenizer, journal, pulse, answer)
        figures |= theirs
        headline = headline or next(iter(theirs), None)
    return Results(headline, figures, seconds=round(time.monotonic() - started, 1)), samples


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[str, list[int]]]:
    """Greedy completions, as text and as token ids up to the end of the turn, in the prompts' order.

    Prompts of a batch are padded on the left; sorting them by length keeps the padding small.
    """
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, tuple[str, list[int]]] = {}
    for chunk in _chunks(order, batch_size):
        batch = tokenizer([texts[i] for i in chunk], add_special_tokens=False, padding=True, return_tensors="pt")
        out = model.generate(
            **batch.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, ids in zip(chunk, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id)]
            found[i] = (tokenizer.decode(ids, skip_special_tokens=True), ids)
    return [found[i] for i in range(len(texts))]


def answers_by_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    how: Eval,
    pulse: Callable[..., None] | None = None,
) -> list[tuple[str, list[int]]]:
    """As `greedy_answers`, by vLLM, which is given the model's weights. It batches as its memory allows.

    pulse: called before each of its steps.
    """
    from post_training.vllm_engine import Engine, write_config

    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "gpu_memory_utilization": how.gpu_memory_utilization,
        "max_model_len": max(map(len, asked)) + how.max_new_tokens,
        "max_num_seqs": how.batch_size,
    }
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        write_config(model, Path(folder))
        engine = Engine(folder, settings)
    engine.load((name, value.detach()) for name, value in model.named_parameters())
    if pulse is not None:
        engine.before_each_step(pulse)
    eos = tokenizer.eos_token_id
    sampling = {"temperature": 0.0, "max_tokens": how.max_new_tokens, "stop_token_ids": [eos]}
    found, _ = engine.generate(asked, sampling, seed=0)
    whole = [ids[: ids.index(eos)] if eos in ids else ids for ids in found]
    return [(tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in whole]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], batch_size: int, pad_token_id: int
) -> float:
    """exp of the mean negative log-likelihood of the tokens whose mask is 1, over all rows together.

    rows: (token ids, mask) of one length each; the first token of a row is never predicted.
    """
    total, count = 0.0, 0
    for chunk in _chunks(rows, max(1, batch_size // 4)):
        width = max(len(ids) for ids, _ in chunk)
        ids = torch.tensor([r + [pad_token_id] * (width - len(r)) for r, _ in chunk], device=model.device)
        keep = torch.tensor([m + [0] * (width - len(m)) for _, m in chunk], device=model.device)
        attention = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in chunk], device=model.device)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        kept = keep[:, 1:].flatten()
        total += float((nll * kept).sum())
        count += int(kept.sum())
    return math.exp(min(total / max(count, 1), 50.0))


def _documents(
    source: data.Source, tokenizer: PreTrainedTokenizerBase, limit: int, width: int
) -> list[tuple[list[int], list[int]]]:
    texts = source.documents("held_out")["text"][:limit]
    rows = [(tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])[:width] for t in texts]
    return [(ids, [1] * len(ids)) for ids in rows]


def _demonstrations(
    source: data.Source, tokenizer: PreTrainedTokenizerBase, limit: int, width: int
) -> list[tuple[list[int], list[int]]]:
    rows = []
    for messages in source.demonstrations("held_out")["messages"][:limit]:
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        rows.append((list(marked["input_ids"])[:width], list(marked["assistant_masks"])[:width]))
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
