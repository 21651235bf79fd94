"""Which pipelines are the points of a sweep, and what they are worth beside each other.

<paths.output_base>/.sweeps/<name>/sweep.json is written at submission. `rank` is what all forms of the table show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from post_training.run import results
from post_training.run.directory import write_atomic

if TYPE_CHECKING:
    from launchers.worth import Judged, Pipeline

VERSION = 1
Points = dict[str, dict[str, str]]
"""The keys and values in which the points of a sweep differ, by the point's folder below the output folder."""


def folder(output_base: Path, name: str) -> Path:
    """Where a sweep keeps what is not its points'."""
    return output_base / ".sweeps" / name


def read(output_base: Path, name: str) -> Points:
    """The points of a sweep that have a folder. Raises LaunchError where there is no such sweep."""
    found = _read(output_base, name)
    return {name: keys for name, keys in found.items() if name == Path(name).name and (output_base / name).is_dir()}


def _read(output_base: Path, name: str) -> Points:
    known = sweeps(output_base)
    path = folder(output_base, name) / "sweep.json"
    if name not in known:
        fix = f"one of: {', '.join(known[:10])}" if known else "python -m launchers.pipeline -m <key>=<value>,<value>"
        raise LaunchError(f"sweep={name}: not in {output_base}", fix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise LaunchError(f"{path} has version {found['version']}; this code reads {VERSION}", "use the newer code")
        return {str(name): {str(k): str(v) for k, v in keys.items()} for name, keys in found["points"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LaunchError(f"{path} cannot be read", "give the sweep's command again: it writes the file anew") from None


def sweeps(output_base: Path) -> list[str]:
    """The names of the sweeps below an output folder."""
    return sorted(path.parent.name for path in (output_base / ".sweeps").glob("*/sweep.json"))


def metric_of(output_base: Path, name: str) -> tuple[str | None, str | None]:
    """Stage and figure that a sampler looked at; None, None where there was none."""
    try:
        text = json.loads((folder(output_base, name) / "sweep.json").read_text(encoding="utf-8")).get("metric")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None, None
    stage, _, metric = text.partition("/") if isinstance(text, str) else ("", "", "")
    return (stage, metric) if metric else (None, None)


def record(
    output_base: Path, name: str, points: Mapping[str, Mapping[str, str]], metric: str | None = None
) -> None:  # fmt: skip
    """Add points to a sweep: a later command may bring more values of the same keys.

    metric: `<stage>/<figure>`, of a judged stage, that a sampler looks at.
    """
    try:
        known = _read(output_base, name)
    except LaunchError:
        known = {}
    place = folder(output_base, name)
    place.mkdir(parents=True, exist_ok=True)
    about = {"version": VERSION, "name": name} | ({"metric": metric} if metric is not None else {})
    text = json.dumps({**about, "points": {**known, **points}}, indent=1)
    write_atomic(place / "sweep.json", text + "\n")


# ------------------------------------------------------------------------------------ beside each other


@dataclass(frozen=True)
class Ranked:
    """One point, with the scores of its judged stages that are not the same run in all points."""

    rank: int | None  # from 1; None: the stage that decides has no score here
    folder: str
    keys: dict[str, str]
    scores: dict[str, results.Results]  # by stage


@dataclass(frozen=True)
class Ranking:
    """The points of a sweep, the best first, and what decides."""

    by: str | None  # a stage
    metric: str | None  # the name of its figure
    stages: tuple[str, ...]  # those with scores, in the pipelines' order
    points: list[Ranked]


def rank(points: Points, pipelines: Sequence[Pipeline], by: str | None = None, metric: str | None = None) -> Ranking:
    """Sort a sweep's points by the score of the last judged stage in which they differ. Pure.

    by, metric: another stage (or the evaluation that judges it), and another figure than its headline.
    """
    judged: dict[str, dict[str, Judged]] = {}  # by stage and folder
    for pipeline in pipelines:
        for one in pipeline.judged:
            judged.setdefault(one.stage, {}).setdefault(pipeline.name, one)
    shared = {
        stage for stage, found in judged.items()
        if len(found) > 1 and len({os.path.realpath(one.model) for one in found.values()}) == 1
    }  # fmt: skip
    order = [stage for stage in _order(pipelines) if stage not in shared or stage == by]
    of = next((stage for stage, found in judged.items() for one in found.values() if by in one.judges), by)
    by = of if by not in judged else by
    able = [stage for stage in order if any(_figure(one, metric) is not None for one in judged[stage].values())]
    by = by if by in able else (able[-1] if able and by is None else None)
    deciding = judged.get(by, {}) if by is not None else {}
    if metric is None:
        metric = next((one.results.headline for one in deciding.values() if one.results.score is not None), None)
    sign = results.metric(metric).better or 1 if metric is not None else 1
    values = {name: figure.value for name, one in deciding.items() if (figure := _figure(one, metric)) is not None}
    names = sorted(points, key=lambda name: (name not in values, -sign * values.get(name, 0.0)))
    found = []
    for place, name in enumerate(names, 1):
        scores = {stage: judged[stage][name].results for stage in order if name in judged[stage]}
        found.append(Ranked(place if name in values else None, name, points[name], scores))
    return Ranking(by, metric if by is not None else None, tuple(order), found)


def _order(pipelines: Sequence[Pipeline]) -> list[str]:
    return list(dict.fromkeys(one.stage for pipeline in pipelines for one in pipeline.judged))


def _figure(one: Judged, metric: str | None) -> results.Figure | None:
    return one.results.score if metric is None else one.results.figures.get(metric)


def as_plain(name: str, ranking: Ranking) -> dict[str, Any]:
    """A ranking for programs."""
    points = []
    for point in ranking.points:
        scores = {
            stage: {"headline": found.headline, "score": found.score.value if found.score else None}
            | ({"low": found.score.low, "high": found.score.high} if found.score else {})
            for stage, found in point.scores.items()
        }
        points.append({"rank": point.rank, "pipeline": point.folder, "keys": point.keys, "scores": scores})
    return {"version": VERSION, "sweep": name, "by": ranking.by, "metric": ranking.metric, "points": points}
