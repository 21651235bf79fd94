"""One or several data sets as one: filtered, mixed by weight, shuffled, cut; and a report of what became of them.

Data are always read whole (there is no streaming): the order of samples is drawn once from the seed, so a resumed run
finds the sample it stopped at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.datasets import VIEWS
from conf.schema import Data
from post_training.data import quality
from post_training.data.source import DataError, Samples, Source, Split

REPORTS: list[dict[str, Any]] = []
"""What this process made for training, for whoever writes it down."""


@dataclass(frozen=True)
class Part:
    """One data set of a mix."""

    name: str
    source: Source
    weight: float


class Mix(Source):
    """Data sets mixed. With one of them, of weight 1 and without filters: that one as it is."""

    def __init__(self, cfg: Data, parts: Sequence[Part]) -> None:
        super().__init__(cfg)
        self.parts = list(parts)
        self.views = tuple(v for v in VIEWS if any(v in part.source.views for part in parts))

    def check_view(self, view: str) -> None:
        if view not in self.views:
            self.parts[0].source.check_view(view)

    def samples(self, view: str, split: Split) -> Samples:
        if split == "held_out":
            return self._held_out(view)
        from datasets import concatenate_datasets

        for part in self.parts:
            part.source.check_view(view)
        cfg = self.cfg
        made = [part.source.samples(view, split) for part in self.parts]
        rows = concatenate_datasets([m.rows for m in made]) if len(made) > 1 else made[0].rows
        owner = [number for number, m in enumerate(made) for _ in range(len(m.rows))]
        kinds = list(zip(owner, [c for m in made for c in m.categories], strict=True))
        dropped = [Counter(m.dropped) for m in made]
        kept: list[list[int]] = [[] for _ in made]
        if quality.filters(cfg.quality):
            held_out = self._held_out(view).rows if cfg.quality.dedup != "none" else []
            for index, reason in enumerate(quality.reasons(rows, kinds, cfg.quality, held_out)):
                if reason is None:
                    kept[owner[index]].append(index)
                else:
                    dropped[owner[index]][reason] += 1
        else:
            for index, number in enumerate(owner):
                kept[number].append(index)
        taken = [
            repeat(indices, part.weight, f"{cfg.seed} {number} {part.name}")
            for number, (part, indices) in enumerate(zip(self.parts, kept, strict=True))
        ]
        order = [index for indices in taken for index in indices]
        if len(self.parts) > 1 or self.parts[0].weight != 1:
            random.Random(f"mix {cfg.seed}").shuffle(order)
        order = order[: cfg.max_samples]
        used = Counter(owner[index] for index in order)
        report = {
            "view": view,
            "rows": len(order),
            "sources": [
                {
                    "name": part.name,
                    "path": part.source.cfg.path,
                    "records": m.records,
                    "samples": len(indices),
                    "weight": part.weight,
                    "rows": used[number],
                    "dropped": dict(sorted(lost.items(), key=lambda item: (-item[1], item[0]))),
                }
                for number, (part, m, indices, lost) in enumerate(zip(self.parts, made, kept, dropped, strict=True))
            ],
        }
        self._refuse_empty(view, report)
        REPORTS.append(report)
        if os.environ.get("RANK", "0") == "0":
            print(in_words(report), flush=True)
        if order != list(range(len(rows))):
            rows = rows.select(order)
        return Samples(rows, [kinds[i][1] for i in order], sum(m.records for m in made), sum(dropped, Counter()))

    def _held_out(self, view: str) -> Samples:
        """Of all data sets that have the view, shuffled where there are several: evaluation takes the first ones."""
        from datasets import concatenate_datasets

        made = [part.source.samples(view, "held_out") for part in self.parts if view in part.source.views]
        if not any(len(m.rows) for m in made):
            lost = ", ".join(f"{n} {reason}" for m in made for reason, n in m.dropped.items())
            raise DataError(
                f"data.held_out={self.cfg.held_out}: no {VIEWS[view]} are left of those records; dropped: {lost}\n"
                "  fix: more data.held_out, or data.eval_path=<records that can be used>"
            )
        if len(made) == 1:
            return made[0]
        rows = concatenate_datasets([m.rows for m in made])
        order = list(range(len(rows)))
        random.Random(f"held out {self.cfg.seed}").shuffle(order)
        categories = [c for m in made for c in m.categories]
        dropped: Counter[str] = sum((m.dropped for m in made), Counter())
        return Samples(rows.select(order), [categories[i] for i in order], sum(m.records for m in made), dropped)

    def _refuse_empty(self, view: str, report: dict[str, Any]) -> None:
        for source in report["sources"]:
            lost = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items())
            where = f"data.name={source['name']}" + (f", data.path={source['path']}" if source["path"] else "")
            if source["samples"] == 0:
                raise DataError(
                    f"{where}: no {VIEWS[view]} are left of {source['records']} records; dropped: {lost}\n"
                    "  fix: look at the records, loosen data.quality, or give another data set"
                )
            if source["weight"] * source["samples"] < 0.5:
                raise DataError(
                    f"{where}: weight={source['weight']:g} takes none of its {source['samples']} samples\n"
                    "  fix: a larger weight, or leave the data set out"
                )


def repeat(indices: Sequence[int], weight: float, seed: str) -> list[int]:
    """Each index floor(weight) times, and a seeded choice of the rest of the weight once more; each pass in order."""
    whole = int(weight)
    extra = round((weight - whole) * len(indices))
    chosen = sorted(random.Random(seed).sample(range(len(indices)), extra))
    return [*list(indices) * whole, *(indices[i] for i in chosen)]


def in_words(report: dict[str, Any]) -> str:
    """A report in one line."""
    parts = []
    for source in report["sources"]:
        words = f"{source['name']} {source['rows']}"
        if source["weight"] != 1:
            words += f" (x {source['weight']:g})"
        words += f" of {source['records']} records"
        if source["dropped"]:
            words += ", dropped " + ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items())
        parts.append(words)
    return f"data: {report['rows']} {VIEWS[report['view']]}: " + "; ".join(parts)


def reports_as_json() -> str | None:
    """All reports of this process, for the run directory; None: it made no samples."""
    return json.dumps(REPORTS, indent=1) + "\n" if REPORTS else None


def configs(cfg: Data) -> list[tuple[Data, float]]:
    """The data sets of a config, each as a config of its own, with its weight."""
    if not cfg.datasets:
        return [(cfg, 1.0)]
    made = []
    for part in cfg.datasets:
        own = {key: getattr(part, key) for key in ("name", "path", "subset", "split", "transform")}
        held_out = cfg.held_out if part.held_out is None else part.held_out
        made.append((dataclasses.replace(cfg, datasets=[], **own, held_out=held_out), part.weight))
    return made
