"""eval: the held-out judgement of one model, in seconds, offline.

A policy is asked the held-out problems and judged by the same parser as the rewards; a reward model is judged on
held-out pairs. What a data set cannot ask is left out of the results, not guessed. All that is asked goes through
evaluation.work: an attempt that is stopped, or dies, loses the batch it was at.
"""

from __future__ import annotations

import json
import shutil
import time
from functools import cache
from typing import TYPE_CHECKING

from post_training import data
from post_training.attempt import Watchdog
from post_training.data.source import DataError
from post_training.evaluation import figures, scoring
from post_training.evaluation.journal import Journal
from post_training.evaluation.models import config_of, first, loaded, require_positions, require_template
from post_training.evaluation.outside import Outside
from post_training.evaluation.policy import Policy, Samples
from post_training.evaluation.work import Asked, Told, Work, make_pulse
from post_training.run import ledger, life, results
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.progress import Progress
from post_training.run.results import Figure, Results
from post_training.stages.common import Stage, finish, load_reward_model, open_stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def evaluate(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> int:
    """Judge the run's input model and write its output: results.json and samples.jsonl. Returns the exit code."""
    pulse = make_pulse(run, attempt, progress, watchdog)
    path = (run.read_config()["inputs"]["model"] or {}).get("path")
    if path is None:
        raise DataError("inputs.model=null: eval needs a model\n  fix: inputs.model=<a model>")
    config = config_of(path)
    stage = open_stage(run)
    told = Told(run, attempt, progress)
    work = Work(Journal(run, attempt), pulse, told)
    progress.enter("evaluation")
    is_reward_model = any("SequenceClassification" in a for a in config.architectures or [])
    outside = None if is_reward_model else Outside(stage.cfg)
    try:
        if outside is None:
            found, samples = judge_reward_model(stage, config, work)
        else:
            found, samples = judge_policy(stage, config, work, outside)
    except Asked:
        told.say()
        with run.writing_as(attempt):
            ledger.append(run.ledger, "stopped", attempt=attempt, step=told.done)
        return life.STOPPED
    told.say()
    progress.enter("saving")
    folder = run.model.with_name(f"model.partial-{attempt}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    results.write(folder, found)
    write_atomic(folder / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    if outside is not None:
        outside.write(folder)
    with run.writing_as(attempt):
        finish(run, folder)
    progress.enter("saving")
    return 0


def judge_reward_model(stage: Stage, config: PretrainedConfig, work: Work) -> tuple[Results, Samples]:
    """Held-out preference accuracy, margin, mean reward and calibration of a reward model."""
    cfg, tokenizer, path = stage.cfg, stage.tokenizer, stage.model_path
    assert path is not None
    require_template(stage)
    longest = cfg.training.max_length
    require_positions(config, "training.max_length", longest, longest, "training.max_length=<positions>")
    pairs = first(data.load(cfg.data).preferences("held_out"), cfg.eval.num_problems)
    said = [r["prompt"] + r[side] for side in ("chosen", "rejected") for r in pairs]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in said]
    model = cache(lambda: loaded(load_reward_model, stage, path, work.pulse))
    scored = work.add(
        "rewards", texts, cfg.eval.batch_size, lambda _, batch: scoring.rewards(model(), tokenizer, batch, longest),
        length=len,
    )  # fmt: skip
    work.run()
    scores: list[float] = scored.found
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    found = {
        "preference_accuracy": figures.share([m > 0 for m in margins]),
        "margin": figures.average(margins),
        "mean_reward": figures.average(scores),
        **{name: Figure(value, count=len(margins)) for name, value in figures.calibration(margins).items()},
    }
    settings = {"data": cfg.data.name, "seed": cfg.seed}
    return Results("preference_accuracy", found, settings, work.seconds), []


def judge_policy(
    stage: Stage, config: PretrainedConfig, work: Work, outside: Outside
) -> tuple[Results, Samples]:
    """All that the data can ask a policy (answers, likelihoods, its distance from its start model), then `outside`."""
    policy = Policy(stage, config, work)
    policy.plan()
    if not work.parts and not outside.asks:
        raise policy.nothing()
    work.run()
    found, started = policy.figures(), time.monotonic()
    theirs: dict[str, Figure] = {}
    if outside.asks:
        theirs = outside.ask(policy.model(), stage.tokenizer, work.journal, work.pulse, policy.answer)
    headline = next((name for name in ("accuracy", "instructions", *theirs) if name in found | theirs), None)
    seconds = round(work.seconds + time.monotonic() - started, 1)
    return Results(headline, found | theirs, policy.settings, seconds), policy.samples()
