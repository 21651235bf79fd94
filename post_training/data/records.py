"""Data sets read from files (JSON, JSONL, .gz, CSV, Parquet, .txt, folders) or a hub, through `datasets`."""

from __future__ import annotations

import bisect
import csv
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from conf.datasets import KNOWN, VIEWS, views_of
from conf.schema import Data
from post_training.data import transforms
from post_training.data.source import DataError, Row, Samples, Source, Split, features
from post_training.data.transforms import BadRecord, Drop, Transform

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
BESIDE_THE_RECORDS = re.compile(r"\..*|.*\.md|LICEN[CS]E.*", re.IGNORECASE)
"""Names of files that a folder of records may hold, and that are none."""


@dataclass(frozen=True)
class Place:
    """Where records are read from."""

    path: str  # file, folder or hub id
    subset: str | None = None
    split: str = "train"
    subset_is_folder: bool = False
    key: str = "data.path"  # what the user gave it as

    def __str__(self) -> str:
        return f"{self.key}={self.path}"

    @cached_property
    def files(self) -> list[Path] | None:
        """Local files, in order; None for a hub id. Raises DataError where there are none of one kind."""
        location = Path(self.path).expanduser()
        if not location.exists():
            if self.path.startswith(("/", ".", "~")):
                raise DataError(f"{self}: no such file or folder\n  fix: give an existing path")
            return None
        if not location.is_dir():
            return [location]
        found = sorted(p for p in location.rglob("*") if p.is_file())
        hidden = [
            p for p in found if any(BESIDE_THE_RECORDS.fullmatch(part) for part in p.relative_to(location).parts)
        ]
        return [p for p in found if p not in hidden]

    @cached_property
    def kind(self) -> str:
        """The `datasets` builder for the local files."""
        files = self.files or []
        kinds = {FORMATS.get(Path(f.name.removesuffix(".gz")).suffix) for f in files}
        kind = next(iter(kinds)) if len(kinds) == 1 else None
        if kind is None:
            found = ", ".join(sorted({"".join(f.suffixes) or f.name for f in files})) or "nothing"
            raise DataError(f"{self}: found {found}\n  fix: files of one kind: {', '.join(FORMATS)}, each also as .gz")
        return kind

    def read(self) -> Dataset:
        """The records, in the files' order. Raises DataError where they cannot be read or there are none."""
        from datasets import load_dataset

        try:
            if self.files is not None:
                files = [str(f) for f in self.files]
                records = load_dataset(self.kind, data_files=files, split=self.split, **self._options())
            elif self.subset_is_folder and self.subset is not None:
                records = load_dataset(offline_folder(self.path), data_dir=self.subset, split=self.split)
            else:
                records = load_dataset(offline_folder(self.path), self.subset, split=self.split)
        except DataError:
            raise
        except Exception as error:
            if _passes(error):
                raise
            raise self._unreadable(error) from error
        if len(records) == 0:
            raise DataError(f"{self}: has no records (split {self.split})\n  fix: give one that has")
        return records

    def _options(self) -> dict[str, Any]:
        """Of the `datasets` builder. All of a CSV file is text: else the answer "None" would be missing."""
        if self.kind == "text":
            return {"sample_by": "paragraph"}
        if self.kind == "csv" and self.files:
            with _open(self.files[0]) as lines:
                names = next(csv.reader(lines), [])
            return {"na_filter": False, "converters": dict.fromkeys(names, str)}
        return {}

    def _unreadable(self, error: Exception) -> DataError:
        for file in self.files or []:
            problem = _json_problem(file) if self.kind == "json" else None
            if problem is not None:
                return DataError(f"{self}: {file}, {problem}\n  fix: mend or remove it")
        cause = error.__cause__ or error
        if isinstance(error, StopIteration) or not str(cause):
            return DataError(f"{self}: has no records\n  fix: give a file that has")
        if isinstance(error, ValueError) and "split" in str(error):
            return DataError(f"{self}: {error}\n  fix: data.split=<one of them>")
        fix = "mend the file" if self.files is not None else "mend the id, or give a local file or folder"
        return DataError(f"{self}: cannot be read: {type(cause).__name__}: {cause}\n  fix: {fix}")

    def row(self, index: int) -> str:
        """The file and row (from 1, blank lines not counted) of a record, for a message."""
        if self.files is None or self.split != "train":
            return f"record {index + 1} of {self.path} (split {self.split})"
        if len(self.files) == 1:
            return f"{self.files[0]}, row {index + 1}"
        ends = list(accumulate(len(Place(str(file), key=self.key).read()) for file in self.files))
        which = bisect.bisect_right(ends, index)
        return f"{self.files[which]}, row {index + 1 - (ends[which - 1] if which else 0)}"


def _passes(error: BaseException | None) -> bool:
    """Whether another attempt may succeed: no network, a full disk, no memory. Such an error is a crash."""
    while error is not None:
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and not isinstance(error, FileNotFoundError | gzip.BadGzipFile)
        ):
            return True
        error = error.__cause__
    return False


def _open(file: Path) -> TextIO:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _json_problem(file: Path) -> str | None:
    """The first line of a JSON or JSON Lines file that is no record, and why."""
    try:
        with _open(file) as lines:
            start = lines.read(4096).lstrip()
            lines.seek(0)
            if not start:
                return "no records"
            if start[0] == "[" and ".json" in file.suffixes:
                json.load(lines)
                return None
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        return f"line {number}: is no record, which is an object as in {{\"text\": ...}}"
    except json.JSONDecodeError as error:
        bad = error.lineno if start[0] == "[" and ".json" in file.suffixes else number
        return f"line {bad}: is not JSON: {error.msg} at column {error.colno}"
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        return f"is damaged: {error}"
    return None


# --------------------------------------------------------------------------------------- records to rows


def place(cfg: Data) -> Place:
    """Where the training records of one data set are."""
    known = KNOWN[cfg.name]
    path = cfg.path or known.hub_id
    if path is None:
        raise DataError(f"data.name={cfg.name}: has no records of its own\n  fix: data.path=<file, folder or hub id>")
    own = path == known.hub_id
    return Place(
        path,
        cfg.subset or (known.subset if own else None),
        cfg.split or (known.split if own else "train"),
        known.subset_is_folder and own,
        "data.path" if cfg.path else f"data.name={cfg.name}, data.path",
    )


def held_out_place(cfg: Data) -> Place | None:
    """Where held-out records are; None: they are kept from the training records."""
    known, training = KNOWN[cfg.name], place(cfg)
    own = known.eval_split if training.path == known.hub_id and cfg.split is None else None
    split = cfg.eval_split or (own if cfg.eval_path is None else None)
    if cfg.eval_path is None and split is None:
        return None
    path = cfg.eval_path or training.path
    same = path == training.path
    key = "data.eval_path" if cfg.eval_path else training.key
    return Place(path, training.subset if same else None, split or "train", training.subset_is_folder and same, key)


@dataclass
class Chosen:
    """Some records of a place, and where in it each was."""

    place: Place
    records: Dataset
    origins: list[int]


class Records(Source):
    """Records through a transform, with held-out ones from a place of their own or kept from the training records."""

    def __init__(self, cfg: Data) -> None:
        super().__init__(cfg)
        self.transform: Transform = transforms.find(cfg)
        self.views = views_of(cfg.name, cfg.transform) or tuple(VIEWS)

    @cached_property
    def splits(self) -> dict[Split, Chosen]:
        """Shuffled by the seed: every view, whatever it is used for, has the same records held out."""
        cfg = self.cfg
        records = self._shuffled(place(cfg))
        where = held_out_place(cfg)
        if where is not None:
            held_out = self._shuffled(where)
        else:
            count = len(records.records)
            if cfg.held_out >= count:
                raise DataError(
                    f"data.held_out={cfg.held_out}: {records.place.path} has only {count} records\n"
                    f"  fix: data.held_out={max(1, count // 10)}"
                )
            held_out, records = _part(records, 0, cfg.held_out), _part(records, cfg.held_out, count)
        return {"train": records, "held_out": _part(held_out, 0, cfg.held_out)}

    def _shuffled(self, where: Place) -> Chosen:
        import numpy

        records = where.read()
        missing = [f for f in self.transform.fields if f not in records.column_names]
        if missing:
            raise DataError(
                f"{where}: records lack {', '.join(missing)}; they have {', '.join(records.column_names)}\n"
                f"  fix: give {self.cfg.name} records, or set data.name to what they are"
            )
        order = numpy.random.default_rng(self.cfg.seed).permutation(len(records)).tolist()  # as Dataset.shuffle
        return Chosen(where, records.select(order), order)

    def samples(self, view: str, split: Split) -> Samples:
        chosen = self.splits[split]
        columns = features(view)
        made = chosen.records.map(
            _batches(view, self.transform, chosen, self.cfg.name),
            batched=True,
            with_indices=True,
            remove_columns=chosen.records.column_names,
            features=_with_notes(columns),
            load_from_cache_file=False,
            # ours, since hashing the function would pickle all that it knows
            new_fingerprint=_fingerprint(chosen.records._fingerprint, view, self.transform),
            desc=f"{self.cfg.name} as {view}",
        )
        dropped = made["_dropped"][:]
        categories = made["_category"][:]
        kept = [i for i, reason in enumerate(dropped) if reason is None]
        rows = made.select_columns(list(columns))
        return Samples(
            rows if len(kept) == len(rows) else rows.select(kept),
            [categories[i] for i in kept],
            len(chosen.records),
            Counter(reason for reason in dropped if reason is not None),
        )


def _part(chosen: Chosen, start: int, end: int) -> Chosen:
    end = min(end, len(chosen.records))
    return Chosen(chosen.place, chosen.records.select(range(start, end)), chosen.origins[start:end])


def _fingerprint(records: str, view: str, transform: Transform) -> str:
    content = Path(transform.file).read_bytes() if transform.file else b""
    parts = (records.encode(), view.encode(), transform.name.encode(), content)
    return hashlib.sha256(b" ".join(parts)).hexdigest()[:16]


def _with_notes(columns: Any) -> Any:
    from datasets import Features, Value

    return Features({**columns, "_dropped": Value("string"), "_category": Value("string")})


def _batches(view: str, transform: Transform, chosen: Chosen, name: str) -> Callable[..., Row]:
    """What `Dataset.map` calls: columns of records in; columns of the view's rows out, with a note on each.

    A row with a note in `_dropped` holds nothing else.
    """
    empty = {column: ("" if column in ("text", "answer") else []) for column in features(view)}

    def rows(record: Row, index: int) -> Iterator[Row]:
        try:
            for sample in transform.samples(record):
                category = sample.get("category") if isinstance(sample, dict) else None
                try:
                    row = {**transforms.as_row(view, sample), "_dropped": None}
                except Drop as drop:
                    row = {**empty, "_dropped": str(drop)}
                yield {**row, "_category": None if category is None else str(category)}
        except Drop as drop:
            yield {**empty, "_dropped": str(drop), "_category": None}
        except Exception as error:
            raise _refused(transform, error, chosen.place.row(chosen.origins[index]), name) from error

    def batch(columns: dict[str, list[Any]], indices: list[int]) -> Row:
        out: dict[str, list[Any]] = {key: [] for key in (*empty, "_dropped", "_category")}
        for place_in_batch, index in enumerate(indices):
            record = {key: values[place_in_batch] for key, values in columns.items()}
            for row in rows(record, index):
                for key, values in out.items():
                    values.append(row[key])
        return out

    return batch


def _refused(transform: Transform, error: Exception, where: str, name: str) -> DataError:
    if isinstance(error, BadRecord):
        key, problem = error.args
        return DataError(
            f"data.name={name}: {where}: {key} {problem}\n"
            f"  fix: mend or remove the record, or set data.name or data.transform to what it is"
        )
    return DataError(
        f"data.transform={transform.name}: {where}: {transforms.said(error, transform.file)}\n"
        f"  fix: mend {transform.file or 'the record'}, or `raise Drop(\"why\")` for records that it cannot take"
    )


def offline_folder(hub_id: str) -> str:
    """Where no hub may be asked: the folder of this data set that launchers.prefetch downloaded. Else the id itself."""
    from huggingface_hub import constants, errors, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return hub_id
    try:
        return snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
    except errors.LocalEntryNotFoundError:  # `datasets` may have it in a cache of its own
        return hub_id
