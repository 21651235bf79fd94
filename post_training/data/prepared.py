"""Prepared data: records tokenised and packed once, kept by content, read by every stage and attempt.

    <paths.output_base>/.prepared/<hash>/     what datasets.save_to_disk writes; manifest.json last

The hash is of all that determines the rows: the data's config with the contents of the files that it names, the
tokenizer with its chat template, how TRL's trainer is asked to prepare, the code of post_training/data and the versions
of the libraries. TRL's own preparation makes the rows, so they are those that its trainer would have made. A folder may
be removed at any time; it is made again when it is missed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from conf.schema import Config
from post_training import data
from post_training.data import mix
from post_training.data.source import DataError
from post_training.data.templates import choose, draw, mixed, set_system_prompt
from post_training.data.tokenizer import load_tokenizer
from post_training.run import manifest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VERSION = 1
FOLDER = ".prepared"
COLUMNS = (
    "input_ids", "labels", "seq_lengths",  # base, sft; seq_lengths where packed
    "prompt_ids", "chosen_ids", "rejected_ids", "margin",  # rm, dpo
)  # fmt: skip
LIBRARIES = ("trl", "transformers", "tokenizers", "datasets")
STALE_S = 24 * 3600


@dataclass(frozen=True)
class Preparation:
    """How a stage's records become rows: `preparation(cfg)` in post_training/stages/<stage>.py says it."""

    form: str  # which of the data's forms: documents, demonstrations or preferences
    trainer: Any  # the TRL trainer that trains on the rows
    config: Any  # its config class
    arguments: dict[str, Any]  # of the config: what the rows depend on
    formats: tuple[str, ...] = ()  # chat templates drawn per sample, beside the tokenizer's own
    records: Callable[[], Dataset] | None = None  # in the place of the data's own
    origin: Any = None  # what those depend on, beside the data's config; paths count by content


class Prepared:
    """To be mixed in before a TRL trainer: rows that are prepared already are taken as they are."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if {"labels", "chosen_ids"} & set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ the key


def recipe(cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Preparation) -> dict[str, Any]:
    """All that determines the rows of a stage, as plain data."""
    return {
        "version": VERSION,
        "trainer": how.trainer.__name__,
        "form": how.form,
        "arguments": how.arguments,
        "data": _by_content(asdict(cfg.data)),
        "origin": _by_content(how.origin),
        "formats": [cfg.seed, *how.formats] if how.formats else [],
        "tokenizer": fingerprint(tokenizer),
        "code": _by_content(str(Path(__file__).parent)),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def digest(recipe: dict[str, Any]) -> str:
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that make the same tokens of the same messages, whether new or read from a folder."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    about = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    about["chat_template"] = tokenizer.chat_template
    about |= {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _by_content(value: Any) -> Any:
    """Plain data, each path of a file or folder that is there replaced by a hash of its contents."""
    if isinstance(value, dict):
        return {key: _by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(item) for item in value]
    if isinstance(value, str):
        name, mark, rest = value.rpartition(":")  # `file.py:function`, or a plain path
        for given, suffix in ((value, ""), (name, mark + rest)):
            with contextlib.suppress(OSError, ValueError):
                path = Path(given).expanduser()
                if given and path.exists():
                    return _hash_of(path) + suffix
    return value


def _hash_of(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    inside = [f"{p.relative_to(path).as_posix()} {_hash_of(p)}" for p in files]
    return hashlib.sha256("\n".join(inside).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ the rows


def tokenizer_of(cfg: Config, start_model: str | None, lineage: list[dict[str, Any]]) -> PreTrainedTokenizerBase:
    """The tokenizer that a stage will have whose start model may not be trained yet.

    start_model: where the line of its start models begins (None: from scratch); lineage: what is in the `model`
    section of each stage on that line, as launchers.submission.lineage gives it.
    """
    first, *rest = [*(replace(cfg.model, **model) for model in lineage), cfg.model]
    tokenizer = load_tokenizer(first, start_model)
    for model in rest:
        choose(tokenizer, model.chat_template)
    set_system_prompt(tokenizer, cfg.data.system_prompt)
    return tokenizer


def preparation_of(cfg: Config) -> Preparation:
    """How the stage of this config prepares. Raises DataError for a stage that has nothing to prepare."""
    module = importlib.import_module(f"post_training.stages.{cfg.stage}")
    if not hasattr(module, "preparation"):
        raise DataError(f"stage={cfg.stage}: has no data to prepare\n  fix: stage=base, sft, rm or dpo")
    found: Preparation = module.preparation(cfg)
    return found


def train_rows(cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Preparation, args: Any, base: Path) -> Dataset:
    """The rows a trainer is to be given, on each of its ranks: the first one prepares them where nobody has.

    args: the trainer's config; base: paths.output_base, which all ranks can read.
    """
    from accelerate import PartialState

    state = PartialState()
    folder = folder_of(cfg, tokenizer, how, base)
    error, rows = None, None
    if state.is_main_process:
        try:
            rows = kept(folder, cfg, tokenizer, how, args)
        except Exception as caught:  # the other ranks wait: they are to come to the same end
            error = caught
    state.wait_for_everyone()
    if error is not None:
        raise error
    if rows is None:
        rows = load(folder)[0] or make(cfg, tokenizer, how, args)
    return rows


def folder_of(cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Preparation, base: Path) -> Path:
    return base / FOLDER / digest(recipe(cfg, tokenizer, how))


def load(folder: Path, hashes: bool = False) -> tuple[Dataset | None, str]:
    """The rows in a folder; or None, and why not. hashes: read every byte, to be sure of it."""
    from datasets import Dataset

    why = manifest.problem(folder, hashes)
    if why is not None:
        return None, why
    try:
        return Dataset.load_from_disk(str(folder)), ""
    except Exception as error:  # whatever a damaged Arrow file raises
        return None, f"{type(error).__name__}: {error}"


def kept(
    folder: Path, cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Preparation, args: Any = None,
    num_proc: int | None = None,
) -> Dataset:  # fmt: skip
    """The rows from a folder of prepared data; made and put there where it is missing or damaged.

    Two jobs may do so at once: each writes a folder of its own, and the first one's rename counts.
    """
    rows, why = load(folder, hashes=True)
    if rows is not None:
        mix.REPORTS += (manifest.read(folder) or {}).get("reports", [])
        print(f"prepared data: {len(rows)} rows from {folder}", file=sys.stderr)
        return rows
    if folder.exists():
        print(f"prepared data: {folder} cannot be used ({why}): made again", file=sys.stderr)
        with contextlib.suppress(OSError):  # another job was faster
            broken = folder.with_name(f"{folder.name}.broken-{uuid.uuid4().hex}")
            folder.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)
    began = time.monotonic()
    known = len(mix.REPORTS)
    rows = make(cfg, tokenizer, how, args, num_proc)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        rows.save_to_disk(str(partial))
        about = {"rows": len(rows), "reports": mix.REPORTS[known:], "recipe": recipe(cfg, tokenizer, how)}
        manifest.write(partial, stage=cfg.stage, **about)
        with contextlib.suppress(OSError):  # another job was faster, and its rows are the same
            partial.rename(folder)
    except OSError as error:
        print(f"prepared data: cannot be kept in {folder.parent} ({error}): the next attempt prepares again",
              file=sys.stderr)  # fmt: skip
    finally:
        _remove_partials(folder, partial)
    print(f"prepared data: {len(rows)} rows made in {time.monotonic() - began:.1f} s: {folder}", file=sys.stderr)
    return load(folder)[0] or rows


def _remove_partials(folder: Path, own: Path) -> None:
    """Our own, and what killed jobs left of the same data."""
    for path in folder.parent.glob(f"{folder.name}.*"):
        with contextlib.suppress(OSError):
            if path == own or time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


def make(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, how: Preparation, args: Any = None, num_proc: int | None = None
) -> Dataset:
    """Records in, rows out, by TRL's own preparation. Raises DataError where nothing is left, or trains nothing."""
    known = len(mix.REPORTS)
    records = how.records() if how.records is not None else getattr(data.load(cfg.data), how.form)("train")
    if len(records) == 0:
        raise DataError(f"data.name={cfg.data.name}: no records are left\n  fix: other filters, or another data.path")
    template = None
    if how.formats:
        records = records.map(draw(list(how.formats), cfg.seed), with_indices=True, load_from_cache_file=False)
        template = mixed(tokenizer, list(how.formats))
    if args is None:
        args = how.config(output_dir=os.devnull, use_cpu=True, bf16=False, report_to=[], **how.arguments)
    args = copy.copy(args)
    args.dataset_num_proc = num_proc
    try:
        rows = _by_trl(how, args, tokenizer, records, template)
    except RuntimeError as error:
        if "no assistant tokens" not in str(error):
            raise
        raise _untrained(records, tokenizer, template) from error
    if len(rows) == 0:
        raise DataError(
            f"training.max_length={cfg.training.max_length}: all {len(records)} records are longer, or have nothing to "
            "train within it\n  fix: a longer training.max_length; python -m post_training.inspect_data shows lengths"
        )
    if len(rows) < len(records) and not getattr(args, "packing", False):  # packed rows are fewer in any case
        count = len(records) - len(rows)
        print(f"prepared data: {count} of {len(records)} records do not fit into training.max_length="
              f"{cfg.training.max_length}", file=sys.stderr)  # fmt: skip
        for report in mix.REPORTS[known:]:
            report["too_long"] = count
    rows = rows.select_columns([name for name in COLUMNS if name in rows.column_names])
    rows.info.description = str(len(records))  # goes to disk with them
    return rows


def records_of(rows: Dataset) -> int:
    """How many records prepared rows were made of."""
    return int(rows.info.description)


def _by_trl(
    how: Preparation, args: Any, tokenizer: PreTrainedTokenizerBase, records: Dataset, template: str | None
) -> Dataset:
    """TRL's trainers prepare in a method that reads three things of the trainer: no model is needed."""
    prepare = how.trainer._prepare_dataset
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=False)
    with _alone(prepare):
        if not getattr(args, "packing", False):
            more = (False, None) if hasattr(args, "packing") else ()
            return prepare(trainer, records, tokenizer, args, *more, "train")
        # packing fills rows from a batch of samples at a time: in one process, so that it makes the same rows
        tokenised = copy.copy(args)
        tokenised.packing, tokenised.max_length = False, None
        rows = prepare(trainer, records, tokenizer, tokenised, False, None, "train")
        args.dataset_num_proc = None
        return prepare(trainer, rows, tokenizer, args, True, None, "train")


@contextlib.contextmanager
def _alone(prepare: Any) -> Iterator[None]:
    """Without TRL's waiting for the other ranks: one rank prepares for all of them."""
    with mock.patch.dict(prepare.__globals__, global_then_local_main_first=contextlib.nullcontext):
        yield


def _untrained(records: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | None) -> DataError:
    """The first record without a token to be trained, in words."""
    for number, record in enumerate(records):
        options = record.get("chat_template_kwargs") or {}
        out = tokenizer.apply_chat_template(
            record["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        if 1 not in out["assistant_masks"]:
            text = tokenizer.decode(out["input_ids"])
            return DataError(
                f"record {number}: has nothing to train, no assistant says anything in {text[:200]!r}\n"
                "  fix: leave it out, or model.chat_template with {% generation %} around all that assistants say"
            )
    return DataError("a record has nothing to train\n  fix: python -m post_training.inspect_data shows records")
