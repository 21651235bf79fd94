"""Look at a stage's data:  python -m post_training.inspect_data stage=sft [key=value ...] [--samples N] [--json]

Shows samples after each step (record, conversation, rendered text, tokens) with what is trained in colour, or in
[[...]] where the output is no terminal; then lengths, what is cut or left out, padding, packing, and the mix of data
sets as realised. Overrides are those of launchers.submit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.check import ConfigError
from conf.schema import Config

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VERSION = 1
GREEN, RESET = "\033[32m", "\033[0m"
PERCENTILES = (5, 50, 95, 99)
FORMS = {
    "orpo": "preferences", "kto": "unpaired", "ppo": "problems", "grpo": "problems", "rloo": "problems",
    "sample": "problems", "eval": "problems", "distill": "demonstrations",
}  # fmt: skip
"""What stages read that do not prepare through post_training.data.prepared."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for launchers.submit; stage=<stage>")
    parser.add_argument("--samples", type=int, default=3, help="samples shown (default 3)")
    parser.add_argument("--limit", type=int, default=10000, help="records that figures are made from (default 10000)")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    args = parser.parse_intermixed_args(argv)  # options may stand between overrides
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from launchers.errors import LaunchError
    from post_training.data.source import DataError

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what loading says is in the figures
            cfg, tokenizer = resolve(args.overrides)
            found = inspect(cfg, tokenizer, args.samples, args.limit)
    except (ConfigError, LaunchError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else in_words(found, sys.stdout.isatty()))
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def resolve(overrides: Sequence[str]) -> tuple[Config, PreTrainedTokenizerBase]:
    """The config that submitting a stage would freeze, and the tokenizer that it would begin with."""
    from launchers.compose import rewrite, rewrite_stage
    from launchers.selection import select
    from launchers.submission import freeze, lineage
    from post_training.data.prepared import tokenizer_of
    from post_training.stages.common import load_config

    cluster = [] if any(token.startswith("cluster=") for token in overrides) else ["cluster=local"]
    selection = select([rewrite_stage(rewrite(token)) for token in (*overrides, *cluster)], only_one=True)
    name = selection.wanted[0]
    given = selection.config(name)
    cfg = load_config(freeze(given, name, selection.run_name, {}))
    if given.data.transform_file is not None:  # there is no job, in whose code it would be
        cfg.data.transform_file = str(Path(given.data.transform_file).expanduser().absolute())
    start, before = lineage(selection, name)
    return cfg, tokenizer_of(cfg, start, before)


def inspect(cfg: Config, tokenizer: PreTrainedTokenizerBase, samples: int, limit: int) -> dict[str, Any]:
    """Samples and figures of a stage's training data, as plain data. Raises DataError."""
    from post_training import data
    from post_training.data import mix, prepared

    if cfg.stage in ("prepare", "merge"):
        raise prepared.DataError(f"stage={cfg.stage}: reads no samples itself\n  fix: stage=sft, dpo, ...")
    try:
        how: prepared.Preparation | None = prepared.preparation_of(cfg)
    except prepared.DataError:
        how = None
    form = how.form if how is not None else FORMS.get(cfg.stage, "demonstrations")
    known = len(mix.REPORTS)
    records = getattr(data.load(cfg.data), form)("train")
    reports = mix.REPORTS[known:]
    count = len(records)
    if limit < count:  # spread over the whole, in its order
        records = records.select(sorted(random.Random(cfg.seed).sample(range(count), limit)))
    if how is not None:
        rows = _tokenised(cfg, tokenizer, replace(how, records=lambda: records))
    else:
        rows = _prompts(tokenizer, records)
    pieces = [_pieces(row) for row in rows]
    return {
        "version": VERSION,
        "stage": cfg.stage,
        "view": form,
        "records": count,
        "looked_at": len(records),
        "samples": [
            {"record": records[i], **_steps(cfg, tokenizer, records[i], pieces[i])}
            for i in range(min(samples, len(records)))
        ],
        "figures": figures(cfg, pieces, how is not None),
        "packing": _packing(cfg, tokenizer, how, records, pieces),
        "mix": reports,
    }


def _tokenised(cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Any) -> Dataset:
    """One row a record, uncut and unpacked."""
    from post_training.data import prepared

    arguments = {**how.arguments, "max_length": None, **({"packing": False} if "packing" in how.arguments else {})}
    return prepared.make(cfg, tokenizer, replace(how, arguments=arguments))


def _prompts(tokenizer: PreTrainedTokenizerBase, records: Dataset) -> list[dict[str, Any]]:
    """Rows of stages that train on their own samples, or that tokenise for themselves: prompts and answers."""

    def ids(messages: list[dict[str, str]], **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])

    rows = []
    for record in records:
        if "messages" in record:
            rows.append({"prompt_ids": [], "completion_ids": ids(record["messages"])})
            continue
        prompt = ids(record["prompt"], add_generation_prompt=True)
        answers = {k: ids(record["prompt"] + record[k])[len(prompt) :] for k in ANSWERS if k in record}
        rows.append({"prompt_ids": prompt, **{f"{k}_ids": v for k, v in answers.items()}})
    return rows


ANSWERS = ("completion", "chosen", "rejected")
Piece = tuple[str, list[int], list[bool]]


def _pieces(row: dict[str, Any]) -> list[Piece]:
    """The texts of a row: name, tokens, and which of them are trained."""
    if "labels" in row:
        return [("text", row["input_ids"], [label != -100 for label in row["labels"]])]
    prompt = row.get("prompt_ids", [])
    names = [name for name in ANSWERS if f"{name}_ids" in row]
    if not names:
        return [("prompt", prompt, [False] * len(prompt))]
    return [
        (name, prompt + row[f"{name}_ids"], [False] * len(prompt) + [True] * len(row[f"{name}_ids"])) for name in names
    ]


def _steps(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], pieces: list[Piece]
) -> dict[str, Any]:
    """A sample after each step. `rendered`: what the template makes of it, in runs of trained and untrained text."""
    conversations = [record[k] for k in ("messages", "prompt") if k in record]
    if conversations and cfg.data.system_prompt is not None and conversations[0][0]["role"] != "system":
        conversations = [[{"role": "system", "content": cfg.data.system_prompt}, *conversations[0]]]
    return {
        "messages": conversations[0] if conversations else None,
        "rendered": {name: _runs(tokenizer, ids, trained) for name, ids, trained in pieces},
        "tokens": {
            name: [
                {"id": i, "text": tokenizer.decode([i]), "trained": t, "cut": n >= cfg.training.max_length}
                for n, (i, t) in enumerate(zip(ids, trained, strict=True))
            ]
            for name, ids, trained in pieces
        },
    }


def _runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> list[tuple[str, bool]]:
    """Text in runs that are trained throughout, or not at all."""
    runs: list[tuple[list[int], bool]] = []
    for token, mark in zip(ids, trained, strict=True):
        if not runs or runs[-1][1] != mark:
            runs.append(([], mark))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), mark) for tokens, mark in runs]


# ------------------------------------------------------------------------------------------------ figures


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that `share` per cent of the values do not exceed (nearest rank)."""
    rank = -(-len(ordered) * share // 100)
    return ordered[max(0, int(rank) - 1)]


def figures(cfg: Config, samples: list[list[Piece]], trains: bool) -> dict[str, Any]:
    """Lengths in tokens, of the longest text of each sample; shares are of samples or tokens, 0 to 1.

    padding: of the tokens in batches of training.per_device_train_batch_size unpacked samples, shuffled by the seed.
    """
    longest = cfg.training.max_length
    lengths = [max(len(ids) for _, ids, _ in pieces) for pieces in samples]
    ordered = sorted(lengths)
    kept = [(min(len(ids), longest), sum(trained[:longest])) for pieces in samples for _, ids, trained in pieces]
    cut = sum(length > longest for length in lengths)
    order = list(range(len(lengths)))
    random.Random(cfg.seed).shuffle(order)
    size = cfg.training.per_device_train_batch_size
    batches = [[min(lengths[i], longest) for i in order[n : n + size]] for n in range(0, len(order), size)]
    real, held = sum(map(sum, batches)), sum(max(batch) * len(batch) for batch in batches)
    return {
        "max_length": longest,
        "tokens": sum(len(ids) for pieces in samples for _, ids, _ in pieces),
        "mean": sum(lengths) / len(lengths),
        "min": ordered[0],
        **{f"p{share}": percentile(ordered, share) for share in PERCENTILES},
        "max": ordered[-1],
        "too_long": cut / len(lengths),
        "too_long_are": "left out" if cfg.stage == "rm" else "cut",
        "trained": sum(t for _, t in kept) / max(1, sum(n for n, _ in kept)) if trains else None,
        "padding": 1 - real / held if held else 0.0,
        "batch_size": size,
    }


def _packing(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Any, records: Dataset, samples: list[list[Piece]]
) -> dict[str, Any] | None:
    """What packing makes of these samples: rows, and the share of their room that tokens fill. None: no such stage."""
    if how is None or "packing" not in how.arguments:
        return None
    from post_training.data import prepared

    packed = replace(how, arguments={**how.arguments, "packing": True}, records=lambda: copy.copy(records))
    rows = prepared.make(cfg, tokenizer, packed)
    tokens = sum(len(ids) for ids in rows["input_ids"])
    return {
        "on": bool(how.arguments["packing"]),
        "rows": len(rows),
        "samples": len(samples),
        "efficiency": tokens / (len(rows) * cfg.training.max_length),
    }


# ------------------------------------------------------------------------------------------------- words


def in_words(found: dict[str, Any], colour: bool) -> str:
    """What `inspect` found, for a person. colour: trained text in green, else in [[...]]."""
    begin, end = (GREEN, RESET) if colour else ("[[", "]]")

    def marked(runs: list[tuple[str, bool]]) -> str:
        return "".join(f"{begin}{text}{end}" if trained else text for text, trained in runs)

    lines = [f"stage={found['stage']}: {found['records']} {found['view']}; {begin}trained{end}, not trained"]
    for number, sample in enumerate(found["samples"]):
        lines += ["", f"--- sample {number}: record", json.dumps(sample["record"], ensure_ascii=False)]
        if sample["messages"]:
            lines += ["--- conversation", *(f"{m['role']:>9}: {m['content']}" for m in sample["messages"])]
        for name, runs in sample["rendered"].items():
            lines += [f"--- rendered: {name}", marked(runs)]
        for name, tokens in sample["tokens"].items():
            past = sum(token["cut"] for token in tokens)
            lines += [f"--- tokens: {name}, {len(tokens)}{f', {past} past max_length' if past else ''}"]
            lines += [" ".join(marked([(f"{t['id']}:{t['text']!r}", t["trained"])]) for t in tokens if not t["cut"])]
    f = found["figures"]
    lines += ["", f"lengths of {found['looked_at']} samples, tokens"]
    lines += ["  " + "  ".join(f"{k} {f[k]:.0f}" for k in ("mean", "min", *(f"p{s}" for s in PERCENTILES), "max"))]
    too_long = f"{_percent(f['too_long'])} of samples, {f['too_long_are']}"
    lines += [f"  over training.max_length={f['max_length']}: {too_long}"]
    if f["trained"] is not None:
        lines += [f"  trained: {_percent(f['trained'])} of tokens"]
    lines += [f"  padding: {_percent(f['padding'])} of the tokens in batches of {f['batch_size']}"]
    packing = found["packing"]
    if packing is not None:
        would = "packing" if packing["on"] else "packing (off) would make"
        full = f"{_percent(packing['efficiency'])} full"
        lines += [f"  {would}: {packing['samples']} samples in {packing['rows']} rows, {full}"]
    if found["mix"]:
        from post_training.data.mix import in_words as mix_in_words

        lines += ["", *(mix_in_words(report) for report in found["mix"])]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
