"""What a report's sections show, as plain data and drawings: read from a pipeline's folders, never raised about.

Damage is noted in `Pipeline.problems`; all text goes through the template's escaping (launchers.report).
"""

from __future__ import annotations

import graphlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.datasets import KNOWN
from conf.schema import UNTRAINED, Config
from launchers import charts, runs, status, table, worth
from launchers.runs import Look, real
from post_training.run import accounting, environment, results
from post_training.run.accounting import Span
from post_training.run.history import is_sound
from post_training.run.ledger import Event
from post_training.run.results import Figure
from post_training.run.secrets import without_secrets

if TYPE_CHECKING:
    from launchers.worth import Judged

NUM_PROMPTS = 6
LONGEST_ANSWER = 1200
"""Characters of an answer that are shown."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What reading a damaged file can raise."""


# ---------------------------------------------------------------------------------------- what is there


@dataclass
class Pipeline:
    """What is known of a pipeline when its report is made."""

    name: str
    now: float
    looks: list[Look]
    rows: dict[str, dict[str, Any]]  # status's, by stage
    techniques: dict[str, str]
    judged: list[Judged]
    scores: list[dict[str, Any]]  # compare's, one for each of `judged`
    problems: list[str]

    def look(self, name: str) -> Look:
        return next(look for look in self.looks if look.name == name)

    def is_eval(self, look: Look) -> bool:
        return self.techniques.get(look.name) == "eval"

    def parents(self, look: Look) -> list[str]:
        """Stages that it comes after, as far as they are in this pipeline."""
        names = {other.name for other in self.looks}
        if look.after is not None:
            return [name for name in look.after if name in names and name != look.name]
        folders = {real(other.run.root): other.name for other in self.looks}
        found = dict.fromkeys(folders[path] for path in look.inputs().values() if path in folders)
        return [name for name in found if name != look.name]

    def start(self, look: Look) -> str | None:
        """The stage whose model it starts from."""
        folders = {real(other.run.root): other.name for other in self.looks}
        return folders.get(look.inputs().get("model", ""))

    def judge_of(self, look: Look) -> str | None:
        """The stage that an eval judges."""
        if not self.is_eval(look):
            return None
        parents = self.parents(look)
        return self.start(look) or (parents[0] if parents else None)


def read_pipeline(folder: Path, now: float) -> Pipeline:
    """Everything but logs and samples. Asks SLURM once, where runs are not done."""
    looks = runs.looks_of(folder)
    rows = {row["stage"]: row for row in runs.rows_of(looks, runs.ask_slurm(looks), now)}
    techniques: dict[str, str] = {}
    problems = []
    try:
        stages = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))["stages"]
        techniques = {str(name): str(node["stage"]) for name, node in stages.items()}
    except DAMAGE:
        problems.append("pipeline.json is missing or damaged: the graph is taken from the runs' own configs")
    techniques |= {look.name: look.config["stage"] for look in looks if isinstance(look.config.get("stage"), str)}
    for look in looks:
        problems += [f"{look.name}: {why}" for why in (look.config_problem, look.story.problem) if why]
    judged, damaged = worth.judged_and_damaged(looks)
    problems += [one.line() for one in damaged]
    scores = worth.rows_of([worth.Pipeline(folder, judged)])
    return Pipeline(folder.name, now, looks, rows, techniques, judged, scores, problems)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file, and how many lines are none."""
    try:
        texts = [text for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    except (OSError, ValueError):
        return [], 0
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found.append(line)
    return found, len(texts) - len(found)


# --------------------------------------------------------------------------------- did it help: scores


def points(name: str, difference: float) -> str:
    """A difference of two values of a figure, as it is shown: of shares in points."""
    how = results.metric(name)
    return f"{how.scale * difference:+.1f}" if how.scale == 100 else f"{difference:+.3g}"


def interval(name: str, figure: Figure) -> str:
    """`54.0 to 62.0`; empty where none is known."""
    if figure.low is None or figure.high is None:
        return ""
    how = results.metric(name)
    return " to ".join(how.form.replace(" %", "").format(how.scale * edge) for edge in (figure.low, figure.high))


def score_table(pipeline: Pipeline) -> dict[str, Any]:
    """The across-stages table as cells."""
    headlines = {row["headline"] for row in pipeline.scores}
    present = dict.fromkeys(name for row in pipeline.scores for name in row["figures"])
    order = {name: place for place, name in enumerate(results.METRICS)}
    names = sorted((n for n in present if n not in headlines), key=lambda n: (order.get(n, len(order)), n))
    rows = []
    for row in pipeline.scores:
        headline, forgot = row["headline"], row["forgot"]
        rows.append({
            "stage": row["row"], "parent": row["parent"],
            "score": _cell(headline, row["score"]) if row["score"] else None,
            "metric": results.metric(headline).title if headline else "",
            "forgotten": None if forgot is None else f"{forgot['value']:+.2f}",
            "forgot": forgot is not None and forgot["value"] > 0 and forgot["outside"] is not False,
            "cells": [_cell(name, row["figures"].get(name)) for name in names],
        })  # fmt: skip
    heads = [{"title": results.metric(n).title, "help": results.metric(n).help} for n in names]
    return {"rows": rows, "heads": heads, "forgets": any(row["forgotten"] is not None for row in rows)}


def figure_of(plain: Mapping[str, Any]) -> Figure:
    """A figure from one of compare's rows."""
    return Figure(*(plain.get(key) for key in ("value", "low", "high", "count")))  # type: ignore[arg-type]


def _cell(name: str, plain: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A figure, its interval, and how it changed against the parent's."""
    if plain is None:
        return None
    how, figure, change = results.metric(name), figure_of(plain), plain["change"]
    cell: dict[str, Any] = {
        "value": results.shown(name, figure), "interval": interval(name, figure), "count": figure.count,
        "change": None, "low": None, "high": None,
    }  # fmt: skip
    if how.scale == 100 and figure.low is not None and figure.high is not None:
        cell |= {"low": _percent(figure.low), "high": _percent(figure.high)}
    if change is not None and change["outside"] is not None:
        rose, outside = change["value"] > 0, change["outside"]
        cell |= {
            "change": points(name, change["value"]), "outside": outside,
            "mark": ("▲" if rose else "▼") if outside else "~",
            "tone": {1: "good", -1: "bad"}.get(how.better * (1 if rose else -1), "muted") if outside else "muted",
        }  # fmt: skip
    return cell


def _percent(share: float) -> float:
    return round(min(100.0, max(0.0, 100 * share)), 2)


def score_charts(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One drawing for each figure that is the headline of some stages."""
    found = []
    for headline in dict.fromkeys(j.results.headline for j in pipeline.judged if j.results.score is not None):
        assert headline is not None
        how = results.metric(headline)
        scores = []
        for row in pipeline.scores:
            if row["headline"] == headline and row["score"] is not None:
                score = figure_of(row["score"])
                low, high = (None if edge is None else edge * how.scale for edge in (score.low, score.high))
                scores.append((row["row"], score.value * how.scale, low, high))
        svg = charts.draw_scores(scores, "%" if how.scale == 100 else "", f"scores {headline}")
        found.append({"title": how.title, "help": how.help, "svg": svg})
    return found


def verdict(pipeline: Pipeline) -> dict[str, Any]:
    """What a reader should know first."""
    said: dict[str, Any] = {"best": None, "worse": [], "forgot": None}
    for judged, row in zip(pipeline.judged, pipeline.scores, strict=True):
        change = (row["score"] or {}).get("change")
        if change is not None and change["outside"] and results.metric(row["headline"]).better * change["value"] < 0:
            difference = points(row["headline"], change["value"])
            said["worse"].append(f"{row['row']} ({difference} against {change['against']})")
        if judged is not worth.best(pipeline.judged):
            continue
        name, score = row["headline"], figure_of(row["score"])
        gains = [(change["against"], change["value"], change["outside"])] if change is not None else []
        for first in (s for start in reversed(judged.line) for s in pipeline.judged if s.stage == start):
            theirs = first.results.score
            if theirs is not None and first.results.headline == name and first.asked == judged.asked:
                if first.stage not in [against for against, _, _ in gains]:
                    gains.append((first.stage, score.value - theirs.value, worth.outside(score, theirs)))
                break
        said["best"] = {
            "stage": row["row"], "score": results.shown(name, score), "interval": interval(name, score),
            "metric": results.metric(name).title,
            "gains": [
                {"over": over, "points": points(name, value), "certain": bool(certain),
                 "good": results.metric(name).better * value > 0}
                for over, value, certain in gains
            ],
        }  # fmt: skip
        if row["forgot"] is not None:
            lost = row["forgot"]["value"]
            said["forgot"] = f"{lost:+.2f} nats a token on held-out text (perplexity × {math.exp(min(700, lost)):.3g})"
    return said


# ------------------------------------------------------------------------------------------- the graph

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 178, 50, 26, 30


def depths(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The longest way from a start to each stage; all 0 where there is a cycle."""
    try:
        order = list(graphlib.TopologicalSorter(parents).static_order())
    except graphlib.CycleError:
        return dict.fromkeys(parents, 0)
    found: dict[str, int] = {}
    for name in order:
        found[name] = max((found[parent] + 1 for parent in parents.get(name, ())), default=0)
    return found


def graph(pipeline: Pipeline) -> dict[str, Any]:
    """Boxes and arrows, pixels. Evals stand in the boxes of the stages that they judge."""
    judges: dict[str, list[Look]] = {}
    for look in pipeline.looks:
        if (judged := pipeline.judge_of(look)) is not None:
            judges.setdefault(judged, []).append(look)
    inside = {look.name for group in judges.values() for look in group}
    shown = [look for look in pipeline.looks if look.name not in inside]
    names = {look.name for look in shown}
    parents = {look.name: [name for name in pipeline.parents(look) if name in names] for look in shown}
    depth = depths(parents)
    levels: dict[int, list[str]] = {}
    centre: dict[str, float] = {}
    for level in sorted(set(depth.values())):
        there = [look.name for look in shown if depth[look.name] == level]
        place = {name: i for i, name in enumerate(there)}

        def mean(name: str) -> float:
            known = [centre[parent] for parent in parents[name] if parent in centre]
            return sum(known) / len(known) if known else 0.0

        levels[level] = sorted(there, key=lambda name: (mean(name), place[name]))
        for i, name in enumerate(levels[level]):
            centre[name] = (i - (len(there) - 1) / 2) * (BOX_WIDTH + GAP_X)
    width = max((len(there) for there in levels.values()), default=1) * (BOX_WIDTH + GAP_X) + 2 * GAP_X
    boxes = []
    for look in shown:
        row = pipeline.rows[look.name]
        x, y = centre[look.name] + width / 2, depth[look.name] * (BOX_HEIGHT + GAP_Y) + 4
        technique = pipeline.techniques.get(look.name, "")
        found = next((j.results for j in pipeline.judged if j.stage == look.name), None)
        if found is not None and (score := found.score) is not None:
            headline = found.headline or ""
            below = f"{results.metric(headline).title} {results.shown(headline, score)}"
        elif judges.get(look.name):
            below = f"eval: {', '.join(dict.fromkeys(pipeline.rows[j.name]['state'] for j in judges[look.name]))}"
        else:
            below = "" if technique in UNTRAINED else "no eval"
        boxes.append({
            "x": round(x - BOX_WIDTH / 2, 1), "y": y, "name": _cut(look.name, 18 if row["state"] == "done" else 12),
            "state": row["state"], "mark": "✓" if row["state"] == "done" else row["state"],
            "below": _cut(below, 27), "technique": technique if technique != look.name else "",
            "title": ": ".join(filter(None, (look.name, row["state"], row["reason"]))),
        })  # fmt: skip
    arrows = [
        _arrow(parent, name, centre, depth, levels, width / 2) for name, above in parents.items() for parent in above
    ]
    height = (max(depth.values(), default=0) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 8
    return {"boxes": boxes, "arrows": arrows, "width": width, "height": height, "w": BOX_WIDTH, "h": BOX_HEIGHT}


def _arrow(
    start: str, end: str, centre: Mapping[str, float], depth: Mapping[str, int], levels: Mapping[int, list[str]],
    middle: float,
) -> str:  # fmt: skip
    """An SVG path from one box's lower edge to the other's upper edge, around the boxes in between."""

    def top(level: int) -> float:
        return level * (BOX_HEIGHT + GAP_Y) + 4

    step = BOX_WIDTH + GAP_X
    x0, x1 = centre[start], centre[end]
    stops = [(x0, top(depth[start]) + BOX_HEIGHT)]
    for level in range(depth[start] + 1, depth[end]):
        straight = x0 + (x1 - x0) * (level - depth[start]) / (depth[end] - depth[start])
        boxes = [centre[name] for name in levels[level]]
        gaps = [x + side * step / 2 for x in boxes for side in (-1, 1)]
        if any(abs(straight - x) < step / 2 for x in boxes):
            straight = min(gaps, key=lambda gap: (abs(gap - straight), gap))
        stops += [(straight, top(level) - 2), (straight, top(level) + BOX_HEIGHT + 2)]
    stops.append((x1, top(depth[end]) - 5))
    path = f"M{stops[0][0] + middle:.1f},{stops[0][1]:.1f}"
    for (xa, ya), (xb, yb) in pairwise(stops):
        half = (ya + yb) / 2
        path += f"C{xa + middle:.1f},{half:.1f} {xb + middle:.1f},{half:.1f} {xb + middle:.1f},{yb:.1f}"
    return path


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---------------------------------------------------------------------------------------- the timeline

NAMES = {
    "startup": "start-up", "redone": "steps redone", "steps": "steps that count", "evaluation": "evaluation",
    "saving": "saving", "teardown": "leaving", "lost": "lost at an end", "hold": "requeue hold", "queued": "queue",
}  # fmt: skip
"""What the parts of the time are called, in the order in which an attempt's are drawn."""
ENDS = {
    "planned_stop": ("s", "planned stop"), "preempted": ("p", "preempted"), "node_lost": ("n", "node lost"),
    "crashed": ("c", "crashed"), "out_of_memory": ("m", "out of memory"), "hung": ("h", "hung"),
    "cancelled": ("x", "cancelled"), "unknown": ("?", "end not recorded"), "finished": ("", "finished"),
}  # fmt: skip
"""A letter for each way in which an attempt ends, and its words."""


def words_of(cause: str | None) -> str:
    """How an attempt ended, in words; empty where it has not."""
    return ENDS.get(cause or "", ("", cause or ""))[1]


CLOSE = 2.4
"""Letters nearer than this, percent of the width, become one with a number."""


def timeline(pipeline: Pipeline) -> dict[str, Any] | None:
    """When each run did what; None where none was submitted."""
    told = {}
    for look in pipeline.looks:
        spans = [s for s in runs.spans(look, pipeline.rows[look.name]["state"], pipeline.now) if s.end > s.start]
        if spans:
            told[look.name] = spans
    if not told:
        return None
    start = min(spans[0].start for spans in told.values())
    # a run that was given up stands still until now: the clock of a pipeline ends with what was done last
    whole = max(_told_until(span) for spans in told.values() for span in spans) - start
    if whole <= 0:
        return None
    rows = [
        {"stage": name, "state": pipeline.rows[name]["state"], "attempts": sum(s.attempt is not None for s in spans),
         "bars": list(_bars(spans, start, whole)), "ends": _ends(spans, start, whole)}
        for name, spans in told.items()
    ]  # fmt: skip
    used = {bar["name"] for row in rows for bar in row["bars"]}
    letters = dict(pair for row in rows for end in row["ends"] for pair in end["letters"])
    return {
        "rows": rows, "start": start, "seconds": whole,
        "ticks": [{"at": round(100 * at / whole, 2), "text": text} for at, text in charts.time_ticks(whole)],
        "legend": [{"name": name, "word": word} for name, word in NAMES.items() if name in used],
        "letters": letters,
    }  # fmt: skip


def _told_until(span: Span) -> float:
    return span.start + sum(seconds for name, seconds in span.seconds.items() if name in NAMES)


def _bars(spans: Sequence[Span], start: float, whole: float) -> Iterator[dict[str, Any]]:
    """Rectangles of one row, thousandths of the width."""
    for span in spans:
        at = span.start
        head = f"attempt {span.attempt}, {words_of(span.cause) or 'runs'}: " if span.attempt else ""
        for name, word in NAMES.items():
            seconds = span.seconds.get(name, 0.0)
            if seconds > 0:
                yield {
                    "name": name, "x": round(1000 * (at - start) / whole, 2),
                    "w": round(max(0.6, 1000 * seconds / whole), 2), "title": f"{head}{word} {table.duration(seconds)}",
                }  # fmt: skip
                at += seconds


def _ends(spans: Sequence[Span], start: float, whole: float) -> list[dict[str, Any]]:
    """The letters below a row; near ones are one."""
    groups: list[dict[str, Any]] = []
    for span in spans:
        if span.attempt is None or span.cause in (None, "finished"):
            continue
        letter, word = ENDS.get(span.cause or "", ("?", words_of(span.cause)))
        at = 100 * (span.end - start) / whole
        if groups and at - groups[-1]["last"] < CLOSE:
            groups[-1]["causes"][(letter, word)] += 1
            groups[-1]["last"] = at
        else:
            groups.append({"at": at, "last": at, "causes": Counter({(letter, word): 1})})
    found = []
    for group in groups:
        count = sum(group["causes"].values())
        title = ", ".join(f"{n} × {w}" if n > 1 else w for (_, w), n in group["causes"].most_common())
        shown = "".join(dict.fromkeys(mark for mark, _ in group["causes"]))
        found.append({
            "at": round((group["at"] + group["last"]) / 2, 2), "title": title,
            "text": shown + (f"×{count}" if count > 1 else ""),
            "letters": list(group["causes"]), "planned": set(shown) <= set("sx"),
        })  # fmt: skip
    return found


def lost_time(pipeline: Pipeline) -> dict[str, Any]:
    """Held time, goodput and lost time by cause, a row a stage and one for all of them."""
    accounts = {
        name: accounting.Account(
            seconds=row["seconds"], lost_by_cause=row["lost_by_cause"], held=row["held_seconds"]
        )
        for name, row in pipeline.rows.items()
        if row["held_seconds"] > 0 or row["lost_by_cause"]
    }
    everything = accounting.together(accounts.values())
    causes = list(everything.lost_by_cause)

    def cells(account: accounting.Account) -> dict[str, Any]:
        return {
            "held": table.duration(account.held), "goodput": status.percent(account.goodput),
            "queued": table.duration(account.seconds["queued"]),
            "lost": [table.duration(account.lost_by_cause[c]) if account.lost_by_cause.get(c) else "" for c in causes],
        }  # fmt: skip

    rows = [
        {"stage": name, "attempts": pipeline.rows[name]["attempts"], "failures": _failures(pipeline.look(name)),
         **cells(account)}
        for name, account in accounts.items()
    ]  # fmt: skip
    total = {key: sum(row[key] for row in rows) for key in ("attempts", "failures")} | cells(everything)
    inside = {n: s for n, s in everything.seconds.items() if n in NAMES and n not in ("queued", "hold") and s > 0}
    shares = [
        {"name": name, "word": word, "time": table.duration(inside[name]),
         "share": round(100 * inside[name] / everything.held, 2)}
        for name, word in NAMES.items() if name in inside and everything.held > 0
    ]  # fmt: skip
    return {"rows": rows, "total": total, "causes": [status.CAUSES.get(c, c) for c in causes], "shares": shares,
            "largest": {"cause": status.CAUSES.get(causes[0], causes[0]), "time": table.duration(
                everything.lost_by_cause[causes[0]])} if causes else None}  # fmt: skip


def _failures(look: Look) -> int:
    return accounting.account(look.story.events).failures


def gpu_hours(pipeline: Pipeline) -> float | None:
    """Held time times the GPUs that the jobs had; None where none had any."""
    total = 0.0
    for look in pipeline.looks:
        slurm = look.section("slurm")
        nodes, gpus = table.number(slurm.get("num_nodes")), table.number(slurm.get("gpus_per_node"))
        if look.section("cluster").get("scheduler") == "slurm" and nodes and gpus:
            total += pipeline.rows[look.name]["held_seconds"] * nodes * gpus / 3600
    return total or None


# ---------------------------------------------------------------------------------- attempts and curves


@dataclass
class Attempt:
    """One attempt as the ledger tells it."""

    number: int
    job_id: str
    started: float
    nodes: str = ""
    ended: float | None = None
    step: int | None = None  # after which it went on; None: it came to no step
    reached: int | None = None  # highest step that it did
    cause: str | None = None
    reason: str | None = None
    after_restart: bool = False
    notes: list[str] = field(default_factory=list)


def attempts_of(events: Iterable[Event]) -> list[Attempt]:
    """The attempts of a ledger."""
    found: dict[int, Attempt] = {}
    restarted = False
    for event in events:
        if not is_sound(event):
            continue
        number = event.get("attempt")
        attempt = found.get(number) if isinstance(number, int) else None
        step = event.get("step") if isinstance(event.get("step"), int) else None
        match event["event"]:
            case "restarted":
                restarted = True
            case "attempt_started":
                nodes = event.get("nodes")
                names = [n for n in nodes if isinstance(n, str)] if isinstance(nodes, list) else []
                found[event["attempt"]] = Attempt(
                    event["attempt"], event["job_id"], event["time"], ", ".join(names) or str(event.get("node") or ""),
                    after_restart=restarted,
                )  # fmt: skip
                restarted = False
            case "training_started" if attempt is not None:
                attempt.step = step
            case "checkpoint_saved" | "stopped" if attempt is not None and step is not None:
                attempt.reached = max(attempt.reached or 0, step)
            case "attempt_ended" if attempt is not None:
                attempt.ended, attempt.reason = event["time"], event["reason"]
                attempt.cause = accounting.CAUSES.get(event["outcome"], event["outcome"])
                if step is not None:
                    attempt.reached = max(attempt.reached or 0, step)
            case "guardrail" | "not_exact" | "set_aside" if attempt is not None:
                words = [event["event"].replace("_", " "), event.get("rule"), event.get("folder"), event.get("reason")]
                where = f"step {step}" if step is not None else None
                attempt.notes.append(": ".join(str(word) for word in (*words, where) if word))
    return list(found.values())


def onward(attempts: Sequence[Attempt]) -> list[charts.Onward]:
    """Where attempts went on, since the run last began from scratch. The first attempt begins and is none of them."""
    last = max((i for i, attempt in enumerate(attempts) if attempt.after_restart), default=0)
    found = []
    reached: int | None = None
    before: Attempt | None = None
    for attempt in attempts[last:]:
        if before is not None and attempt.step is not None:
            cause = before.cause or "unknown"
            kept = reached is not None and reached <= attempt.step and cause != "unknown"
            planned = cause == "planned_stop" or kept
            found.append(charts.Onward(attempt.step, reached, planned, attempt.number, words_of(cause)))
        if attempt.reached is not None:
            reached = max(reached or 0, attempt.reached)
        before = attempt
    return found


def training(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The curves of every stage that logged figures."""
    found = []
    for look in pipeline.looks:
        lines, bad = read_lines(look.run.metrics)
        if bad:
            pipeline.problems.append(f"{look.name}: {bad} of {bad + len(lines)} lines of metrics.jsonl are damaged")
        series = charts.curves(lines)
        if not series:
            if pipeline.techniques.get(look.name) not in (*UNTRAINED, None) and look.done:
                pipeline.problems.append(f"{look.name}: no figures in logs/metrics.jsonl: no curves")
            continue
        ways = onward(attempts_of(look.story.events))
        last = max(step for line in lines if (step := table.number(line.get("step"))) is not None)
        most = max(len(curve.points) for curve in series)
        found.append({
            "stage": look.name, "last": int(last), "max_steps": pipeline.rows[look.name]["max_steps"],
            "charts": [
                {"name": curve.name, "svg": charts.draw_curve(curve, ways, last, f"{look.name} {curve.name}")}
                for curve in series
            ],
            "thinned": most if most > charts.MOST_POINTS else None, "drawn": charts.MOST_POINTS,
            "onward": [
                {"attempt": way.attempt, "step": way.step, "cause": way.cause, "planned": way.planned,
                 "redone": max(0, (way.reached or 0) - way.step)}
                for way in ways
            ],
            "held_out": any(c.held_out for c in series),
        })  # fmt: skip
    return found


def attempt_table(pipeline: Pipeline) -> list[dict[str, Any]]:
    """All attempts of all runs."""
    rows = []
    for look in pipeline.looks:
        for attempt in attempts_of(look.story.events):
            end = attempt.ended
            rows.append({
                "stage": look.name, "number": attempt.number, "job": attempt.job_id, "nodes": attempt.nodes,
                "started": clock(attempt.started), "took": table.duration(end - attempt.started) if end else "",
                "steps": "" if attempt.step is None else f"{attempt.step} → {attempt.reached or '?'}",
                "end": words_of(attempt.cause) or "not ended",
                "planned": attempt.cause in ("finished", "planned_stop", "cancelled", None),
                "reason": attempt.reason or "", "notes": attempt.notes,
            })  # fmt: skip
    return rows


def clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


# ------------------------------------------------------------------------------------------- the answers


def answers(pipeline: Pipeline) -> dict[str, Any] | None:
    """The same problems with every stage's answer, those first on which the stages disagree; None: no samples."""
    keyed = {}
    for judged, row in zip(pipeline.judged, pipeline.scores, strict=True):
        counts: Counter[str] = Counter()
        there = {}
        for sample in judged.samples:
            if not (isinstance(sample, dict) and all(isinstance(sample.get(k), str) for k in ("prompt", "completion"))):
                continue
            counts[sample["prompt"]] += 1
            there[(sample["prompt"], counts[sample["prompt"]])] = sample | {"correct": bool(sample.get("correct"))}
        if there:
            keyed[row["row"]] = (replace(judged, stage=row["row"]), there)
    if not keyed:
        return None
    first = next(iter(keyed.values()))[1]
    common = [key for key in first if all(key in there for _, there in keyed.values())]
    aligned = [replace(judged, samples=[there[key] for key in common]) for judged, there in keyed.values()]
    problems = []
    for i in worth.telling(aligned, NUM_PROMPTS):
        problems.append({
            "prompt": _shortened(aligned[0].samples[i]["prompt"]), "answer": aligned[0].samples[i].get("answer"),
            "cards": [
                {"stage": judged.stage, "right": sample["correct"], **_shortened(sample["completion"])}
                for judged in aligned
                for sample in (judged.samples[i],)
            ],
        })  # fmt: skip
    without = [row["row"] for row in pipeline.scores if row["row"] not in keyed]
    return {"problems": problems, "common": len(common), "stages": list(keyed), "without": without}


def _shortened(text: str) -> dict[str, Any]:
    return {"text": text[:LONGEST_ANSWER], "more": max(0, len(text) - LONGEST_ANSWER)}


# ------------------------------------------------------------------------------------------- the configs

LEFT_OUT = {"version", "name", "stage", "pipeline", "identity", "inputs", "paths", "eval", "seed", "offline", "cluster"}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Keys with dots."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def written(value: Any) -> str:
    """A value as a config has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 of a file and 1 of the schema
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _cut(text, 300)


def defaults() -> dict[str, str]:
    """The schema's defaults by key."""
    def plain(value: Any) -> Any:
        if hasattr(value, "__dataclass_fields__"):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return value

    return {key: written(value) for key, value in flat(plain(Config())).items()}


def configs(pipeline: Pipeline) -> dict[str, Any]:
    """What is set for all stages, and what differs between them. Values of the environment are never shown."""
    usual = defaults()
    there: dict[str, dict[str, str]] = {}
    hidden: dict[str, list[str]] = {}
    for look in pipeline.looks:
        if not look.config or pipeline.is_eval(look):
            continue
        config = {k: v for k, v in look.config.items() if k == look.config.get("stage") or k not in LEFT_OUT}
        shown = flat(without_secrets(config))
        there[look.name] = {key: written(value) for key, value in shown.items() if key}
        names, setup = look.section("slurm").get("env"), look.section("slurm").get("setup")
        words = [f"slurm.env: {', '.join(map(str, names))}"] if isinstance(names, dict) and names else []
        words += [f"slurm.setup: {len(setup)} lines"] if isinstance(setup, list) and setup else []
        if words:
            hidden[look.name] = words
    own = {name: pipeline.techniques.get(name, "") for name in there}
    keys = dict.fromkeys(key for shown in there.values() for key in shown)
    common, differ, alone = [], [], []
    for key in keys:
        section = key.partition(".")[0]
        values = {name: shown[key] for name, shown in there.items() if key in shown}
        unlike = [value for value in values.values() if value != usual.get(key)]
        if section in own.values():
            alone += [{"stage": name, "key": key, "value": value, "default": usual.get(key, "")}
                      for name, value in values.items() if value != usual.get(key)]  # fmt: skip
        elif len(set(values.values())) > 1 or (len(values) < len(there) and unlike):
            most = Counter(values.values()).most_common(1)[0][0]
            cells = [{"value": values.get(name, ""), "odd": values.get(name, most) != most} for name in there]
            differ.append({"key": key, "default": usual.get(key, ""), "cells": cells})
        elif unlike:
            common.append({"key": key, "value": unlike[0], "default": usual.get(key, "")})
    return {"stages": list(there), "common": common, "differ": differ, "alone": alone, "hidden": hidden}


# ------------------------------------------------------------------------------ environment and data


def environments(pipeline: Pipeline) -> dict[str, Any]:
    """The different sets of software, and the machines; and the runs that recorded neither."""
    software: dict[str, dict[str, Any]] = {}
    machines: dict[str, dict[str, Any]] = {}
    silent = []
    for look in pipeline.looks:
        lines = environment.read(look.run)
        if not lines and look.story.history.attempts:
            silent.append(look.name)
        for line in lines:
            given = line.get("packages")
            packages = given if isinstance(given, dict) else {}
            commit = f"{line.get('commit') or ''}{' with changes' if line.get('changed') else ''}"
            parts = {"python": str(line.get("python", "?")), **{str(k): str(v) for k, v in packages.items()}}
            _count(software, json.dumps([parts, commit]), look.name, {"parts": parts, "commit": commit})
            names = line.get("gpus")
            gpus = Counter(name for name in names if isinstance(name, str)) if isinstance(names, list) else Counter()
            machine = {
                "host": str(line.get("host", "?")), "system": str(line.get("system", "")),
                "driver": str(line.get("driver") or ""),
                "gpus": ", ".join(f"{n} × {gpu}" for gpu, n in gpus.items()) or "none",
            }  # fmt: skip
            _count(machines, json.dumps(machine), look.name, machine)
    return {"software": list(software.values()), "machines": list(machines.values()), "silent": silent}


def _count(found: dict[str, dict[str, Any]], key: str, stage: str, about: dict[str, Any]) -> None:
    found.setdefault(key, about | {"used": Counter()})["used"][stage] += 1


def data_sets(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What each stage trained on: rows as reported, licence and source."""
    found = []
    for look in pipeline.looks:
        technique = pipeline.techniques.get(look.name)
        if pipeline.is_eval(look) or technique == "merge" or not look.config:
            continue
        sources: list[dict[str, Any]] = []
        view = ""
        try:
            for report in json.loads(look.run.data_report.read_text(encoding="utf-8")):
                view = str(report.get("view") or view)
                sources += [source for source in report["sources"] if isinstance(source, dict)]
        except DAMAGE:
            data = look.section("data")
            parts = data.get("datasets")
            mixed = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            sources = mixed or ([dict(data)] if data else [])
        inputs = look.section("inputs").get("data")
        if isinstance(inputs, dict):
            writer = Path(str(inputs.get("run_dir") or "?")).name
            found.append({"stage": look.name, "name": f"samples of {writer}", "view": view, "path": "", "records": "",
                          "rows": "", "dropped": "", "weight": "", "licence": "as the model that wrote them",
                          "source": None})  # fmt: skip
            continue
        for source in sources:
            name = str(source.get("name"))
            known = KNOWN.get(name)
            path = source.get("path")
            dropped = source.get("dropped")
            rows, weight = table.number(source.get("rows")), table.number(source.get("weight"))
            records = table.number(source.get("records"))
            licence = known.licence if known else None
            found.append({
                "stage": look.name, "name": name, "view": view, "path": str(path) if path else "",
                "records": "not recorded" if records is None else f"{records:,.0f}",
                "rows": "" if rows is None else f"{rows:,.0f}",
                "weight": f"× {weight:g}" if weight not in (None, 1) else "",
                "dropped": ", ".join(f"{n} {why}" for why, n in dropped.items()) if isinstance(dropped, dict) else "",
                "licence": licence or "your own records: see where they come from",
                "source": known.source if known else None,
            })  # fmt: skip
    return found
