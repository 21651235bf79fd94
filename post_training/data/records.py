"""Data sets read from files (JSON, JSONL, .gz, CSV, Parquet, folders) or a hub, through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.data.source import DataError, Row, Source, Split, assistant, think_answer, user

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_records(path: str, hub_config: str | None = None) -> Dataset:
    """The records of a file, a folder of files or a hub id. Raises DataError when there are none to read."""
    from datasets import load_dataset

    location = Path(path).expanduser()
    if not location.exists():
        if path.startswith(("/", ".", "~")):
            raise DataError(f"data.path={path}: no such file or folder\n  fix: give an existing path")
        return load_dataset(path, hub_config, split="train")
    files = sorted(p for p in location.rglob("*") if p.is_file()) if location.is_dir() else [location]
    kinds = {FORMATS.get(Path(f.name.removesuffix(".gz")).suffix) for f in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({"".join(f.suffixes) or f.name for f in files})) or "nothing"
        raise DataError(
            f"data.path={path}: found {found}\n  fix: files of one kind: {', '.join(FORMATS)}, each also as .gz"
        )
    return load_dataset(kinds.pop(), data_files=[str(f) for f in files], split="train")


class Records(Source):
    """Records from data.path, with held-out ones from data.eval_path or kept from data.path."""

    fields: tuple[str, ...] = ()
    hub_id = ""
    hub_config: str | None = None

    @cached_property
    def splits(self) -> dict[Split, Dataset]:
        cfg = self.cfg
        records = self._checked(cfg.path or self.hub_id).shuffle(seed=cfg.seed)
        if cfg.eval_path is not None:
            held_out = self._checked(cfg.eval_path).shuffle(seed=cfg.seed)
        else:
            if cfg.held_out >= len(records):
                raise DataError(
                    f"data.held_out={cfg.held_out}: {cfg.path} has only {len(records)} records\n"
                    f"  fix: data.held_out={max(1, len(records) // 10)}"
                )
            held_out = records.select(range(cfg.held_out))
            records = records.select(range(cfg.held_out, len(records)))
        if cfg.max_samples is not None:
            records = records.select(range(min(cfg.max_samples, len(records))))
        return {"train": records, "held_out": held_out.select(range(min(cfg.held_out, len(held_out))))}

    def _checked(self, path: str) -> Dataset:
        records = read_records(path, self.hub_config if path == self.hub_id else None)
        missing = [f for f in self.fields if f not in records.column_names]
        if missing:
            raise DataError(
                f"data.path={path}: records lack {', '.join(missing)}; they have {', '.join(records.column_names)}\n"
                f"  fix: give {self.cfg.name} records, or set data.name to what they are"
            )
        return records

    def _map(self, split: Split, row: Callable[[Row], Row]) -> Dataset:
        records = self.splits[split]
        return records.map(row, remove_columns=records.column_names, load_from_cache_file=False)


class Gsm8k(Records):
    """openai/gsm8k: {"question", "answer"}, the answer's reasoning holding <<3*4=12>> notes and ending in '#### N'."""

    fields = ("question", "answer")
    hub_id = "openai/gsm8k"
    hub_config = "main"

    @staticmethod
    def solution(record: Row) -> tuple[str, str]:
        """Reasoning and final number. Raises DataError for a record without '#### N'."""
        thought, mark, answer = record["answer"].rpartition("####")
        if not mark:
            raise DataError(
                f"data.name=gsm8k: no '#### N' in the answer of {record['question'][:60]!r}\n  fix: mend the record"
            )
        return re.sub(r"<<[^>]*>>", "", thought).strip(), answer.strip().replace(",", "")

    def documents(self, split: Split) -> Dataset:
        return self._map(split, lambda r: {"text": f"{r['question']}\n" + "\n#### ".join(self.solution(r))})

    def demonstrations(self, split: Split) -> Dataset:
        def row(r: Row) -> Row:
            return {"messages": [user(r["question"]), assistant(think_answer(*self.solution(r)))]}

        return self._map(split, row)

    def problems(self, split: Split) -> Dataset:
        return self._map(split, lambda r: {"prompt": [user(r["question"])], "answer": self.solution(r)[1]})


class HhRlhf(Records):
    """Anthropic/hh-rlhf: {"chosen", "rejected"}, transcripts that share all but the last assistant turn."""

    fields = ("chosen", "rejected")
    hub_id = "Anthropic/hh-rlhf"

    @staticmethod
    def messages(transcript: str) -> list[Row]:
        """Turns of '\\n\\nHuman: ...\\n\\nAssistant: ...'."""
        turns = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
        roles = {"Human": user, "Assistant": assistant}
        return [roles[who](text.strip()) for who, text in zip(turns[::2], turns[1::2], strict=True)]

    @staticmethod
    def well_formed(messages: list[Row]) -> bool:
        """Whether user and assistant take turns, the assistant last, and neither says nothing: some records fail."""
        roles = [m["role"] for m in messages]
        alternate = bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)
        return alternate and all(m["content"] for m in messages)

    def documents(self, split: Split) -> Dataset:
        return self._map(split, lambda r: {"text": r["chosen"].strip()})

    def demonstrations(self, split: Split) -> Dataset:
        rows = self._map(split, lambda r: {"messages": self.messages(r["chosen"])})
        return rows.filter(lambda r: self.well_formed(r["messages"]), load_from_cache_file=False)

    def preferences(self, split: Split) -> Dataset:
        def row(r: Row) -> Row:
            chosen = self.messages(r["chosen"])
            return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": self.messages(r["rejected"])[-1:]}

        def usable(r: Row) -> bool:
            """One prompt, two different answers."""
            chosen, rejected = self.messages(r["chosen"]), self.messages(r["rejected"])
            return (
                self.well_formed(chosen)
                and self.well_formed(rejected)
                and chosen[:-1] == rejected[:-1]
                and chosen[-1] != rejected[-1]
            )

        records = self.splits[split].filter(usable, load_from_cache_file=False)
        return records.map(row, remove_columns=records.column_names, load_from_cache_file=False)
