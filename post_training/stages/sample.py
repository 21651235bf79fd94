"""sample: rejection sampling. A model answers each prompt several times; the verified best become records for sft.

Prompts are sampled in shards of `sample.batch_size`, each with a seed of its own from (seed, shard), and each finished
shard is a file. So the records are the same however often the run was stopped and on how many ranks it ran, given one
machine type and one set of versions.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.schema import Sample
from post_training import data
from post_training.attempt import Watchdog
from post_training.data.source import DataError, assistant
from post_training.evaluation.work import Asked, make_pulse
from post_training.rewards.verify import reward_functions
from post_training.run import ledger, life
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.progress import Progress
from post_training.stages.common import Stage, finish, load_causal_lm, open_stage

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

RECORDS, REPORT = "records.jsonl", "results.json"
Row = dict[str, Any]


def read_samples(folder: str) -> Dataset:
    """{"messages"}: the records in a sample stage's output. Raises DataError where there are none."""
    from datasets import Dataset

    path = Path(folder) / RECORDS
    if not path.is_file():
        raise DataError(f"inputs.data={folder}: has no {RECORDS}\n  fix: give the model/ folder of a sample stage")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"messages": row["messages"]} for row in rows])


def best(completions: Sequence[Row], keep: int, min_reward: float) -> list[Row]:
    """The `keep` best of one prompt's completions: whole, different, worth `min_reward`; of equals the shortest.

    completions: {"text", "tokens", "whole", "reward"} each. Pure.
    """
    different: dict[str, Row] = {}
    for completion in completions:
        if completion["whole"] and completion["reward"] >= min_reward:
            different.setdefault(completion["text"].strip(), completion)
    return sorted(different.values(), key=lambda c: (-c["reward"], c["tokens"]))[:keep]


def sample(run: RunDirectory, attempt: int, progress: Progress, watchdog: Watchdog) -> int:
    """Sample, verify and write the run's output: records.jsonl and results.json. Returns the exit code."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    pulse = make_pulse(run, attempt, progress, watchdog)
    stage = open_stage(run)
    how = stage.cfg.sample
    if stage.model_path is None:
        raise DataError("inputs.model=null: sample needs a model\n  fix: inputs.model=<a model>")
    problems = data.load(stage.cfg.data).problems("train")
    problems = problems.select(range(min(len(problems), how.num_prompts or len(problems))))
    shards = range(-(-len(problems) // how.batch_size))
    folder = run.checkpoints / "shards"  # where restart=true sets aside what earlier attempts made
    folder.mkdir(parents=True, exist_ok=True)

    def path(shard: int) -> Path:
        return folder / f"shard-{shard:06d}.jsonl"

    def done() -> int:
        return sum(path(shard).exists() for shard in shards)

    def record(event: str, **about: Any) -> None:
        if rank == 0:
            with run.writing_as(attempt):
                ledger.append(run.ledger, event, attempt=attempt, **about)

    record("training_started", step=done())
    progress.training(done())
    mine = [shard for shard in shards if shard % world == rank]
    try:
        model = None
        for shard in mine:
            if path(shard).exists():
                continue
            model = model or _ready(stage, pulse)
            rows = problems.select(range(shard * how.batch_size, min(len(problems), (shard + 1) * how.batch_size)))
            lines = "".join(json.dumps(row) + "\n" for row in sample_shard(stage, model, rows, shard))
            with run.writing_as(attempt):
                write_atomic(path(shard), lines)
            progress.stepped(done())
            record("checkpoint_saved", step=done(), seconds=0.0)
        while rank == 0 and done() < len(shards):  # those of other ranks
            pulse()
            time.sleep(0.2)
    except Asked:
        record("stopped", step=done())
        return life.STOPPED
    if rank != 0:
        return 0
    progress.enter("saving")
    asked = [json.loads(line) for shard in shards for line in path(shard).read_text(encoding="utf-8").splitlines()]
    kept, report = select(asked, how)
    if not kept:
        raise DataError(
            f"sample.min_reward={how.min_reward}: none of {report['completions']} completions is worth it: "
            f"{report['whole']:.0%} were whole, the mean reward is {report['reward']:.3f}\n"
            "  fix: a better model, more sample.num_samples or sample.max_completion_length, or a lower min_reward"
        )
    partial = run.model.with_name(f"model.partial-{attempt}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_atomic(partial / RECORDS, "".join(json.dumps(row) + "\n" for row in kept))
    write_atomic(partial / REPORT, json.dumps(report, indent=1) + "\n")
    with run.writing_as(attempt):
        finish(run, partial)
    progress.enter("saving")
    return 0


def select(asked: Sequence[Row], how: Sample) -> tuple[list[Row], Row]:
    """The records kept, and figures on all. asked: {"prompt": messages, "completions"} each. Pure."""
    kept: list[Row] = []
    answered = 0
    for row in asked:
        chosen = best(row["completions"], how.keep, how.min_reward)
        answered += bool(chosen)
        kept += [{"messages": [*row["prompt"], assistant(c["text"])], "reward": c["reward"]} for c in chosen]
    completions = [c for row in asked for c in row["completions"]]
    count = len(completions)
    report = {
        "version": 1,
        "prompts": len(asked),
        "answered": answered,  # prompts with a completion that was kept
        "completions": count,
        "kept": len(kept),
        "whole": sum(c["whole"] for c in completions) / max(1, count),
        "reward": sum(c["reward"] for c in completions) / max(1, count),
        "tokens": sum(c["tokens"] for c in completions),
    }
    return kept, report


def _ready(stage: Stage, pulse: Callable[..., None]) -> PreTrainedModel:
    assert stage.model_path is not None
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(stage.cfg, stage.model_path, stage.tokenizer)
    model.register_forward_pre_hook(pulse)
    return model.eval().to(device)  # type: ignore[arg-type]


@torch.no_grad()
def sample_shard(stage: Stage, model: PreTrainedModel, problems: Dataset, shard: int) -> list[Row]:
    """Completions of these problems, judged: {"prompt", "answer", "completions": [{text, tokens, whole, reward}]}."""
    from transformers import set_seed

    how, tokenizer = stage.cfg.sample, stage.tokenizer
    functions, weights = reward_functions(how.reward, stage.run)
    tokenizer.padding_side = "left"
    prompts = list(problems["prompt"])
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    set_seed((stage.cfg.seed * 1_000_003 + shard) % 2**32)
    out = model.generate(
        **batch,
        do_sample=True,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=0,
        num_return_sequences=how.num_samples,
        max_new_tokens=how.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    completions: list[Row] = []
    for ids in out[:, batch["input_ids"].shape[1] :].tolist():
        whole = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id)] if whole else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        completions.append({"text": text, "tokens": len(ids), "whole": whole})
    # each problem's columns once for each of its completions, as TRL hands them to reward functions
    columns = {name: [v for v in problems[name] for _ in range(how.num_samples)] for name in problems.column_names}
    said = [[assistant(c["text"])] for c in completions]
    scores = [f(**{**columns, "prompts": columns["prompt"], "completions": said}) for f in functions]
    for i, completion in enumerate(completions):
        completion["reward"] = sum(w * (s[i] or 0.0) for w, s in zip(weights, scores, strict=True))
    return [
        {"prompt": row["prompt"], "answer": row["answer"],
         "completions": completions[i * how.num_samples : (i + 1) * how.num_samples]}
        for i, row in enumerate(problems)
    ]  # fmt: skip
