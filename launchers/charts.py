"""Charts of a report: numbers in, inline SVG out. Pure; matplotlib is imported when the first one is drawn.

Colours are CSS variables of the page, so that one drawing serves light, dark and print. Equal numbers give equal text.
"""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = {
    "fg": "#010101", "muted": "#020202", "line": "#030303", "bad": "#040404", "good": "#050505", "grid": "#060606",
    "lost": "#070707",
}  # fmt: skip
"""What is drawn in, and which variable of the page (--fg, ...) it stands for."""
MOST_POINTS = 600
"""A longer curve is drawn as the means of so many stretches, in a band from their lowest to their highest points."""
FEW_POINTS = 30
"""A curve of so few shows each of them."""
MANY_ONWARD = 30
"""More requeues than these are marked at the foot of a drawing alone, or they would hide the curve."""


@dataclass(frozen=True)
class Curve:
    """One figure over the steps."""

    name: str  # of metrics.jsonl
    title: str
    points: list[tuple[float, float]]  # step, value
    held_out: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Onward:
    """Where an attempt went on: after which step, and the highest step that the one before it had done."""

    step: int
    reached: int | None
    planned: bool
    attempt: int
    cause: str


WANTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward", ("reward", "mean_reward")),
    ("KL to the reference, nats", ("kl", "objective/kl", "approx_kl")),
    ("entropy, nats", ("entropy", "policy/entropy_avg")),
    ("answer length, tokens", ("completions/mean_length", "completion_length")),
    ("pairs told apart", ("rewards/accuracies", "accuracy")),
    ("margin chosen - rejected", ("rewards/margins", "margin")),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens/s on each GPU", ("tokens_per_second_per_gpu",)),
)
"""Titles of the curves, and the names under which TRL's trainers and ours log them: the first that is there counts."""

LONGEST_NAME = 20
FROM_ZERO = ("learning_rate", "grad_norm", "tokens_per_second_per_gpu")
"""Curves whose scale begins at 0: how they move in small says nothing."""


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves that a metrics.jsonl has."""
    series: dict[str, dict[float, float]] = {}
    for line in lines:
        if (step := _number(line.get("step"))) is None:
            continue
        for name, value in line.items():
            if (y := _number(value)) is not None:
                series.setdefault(name, {})[step] = y  # of one step logged twice: the later one
    found = []
    for title, names in WANTED:
        for name in names:
            points, held_out = (sorted(series.get(key, {}).items()) for key in (name, f"eval_{name}"))
            if points or held_out:
                found.append(Curve(name, title, points, held_out))
                break
    return found


def _number(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
    return float(value) if good else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points as one."""

    step: float  # of the middle one
    mean: float
    low: float
    high: float


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[Stretch]:
    """At most `most` stretches of equally many points; each by itself where there are no more than that."""
    count = min(most, len(points))
    found = []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        values = [y for _, y in part]
        found.append(Stretch(part[len(part) // 2][0], statistics.fmean(values), min(values), max(values)))
    return found


# ------------------------------------------------------------------------------------------- drawing


def draw_curve(curve: Curve, onward: Sequence[Onward], last_step: float, key: str) -> str:
    """One curve, 3.5 x 2 inches at 72 an inch, with a line where each attempt went on and the steps lost before it.

    key: what tells this drawing from the others of its page.
    """
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    with _drawing(key) as make:
        figure, axes = make(3.5, 2.0, left=0.55, top=0.36)
        _mark(axes, onward)
        points = thinned(curve.points)
        steps = [p.step for p in points]
        if len(points) < len(curve.points):
            band = [p.low for p in points], [p.high for p in points]
            axes.fill_between(steps, *band, color=INK["line"], alpha=0.3, linewidth=0)
        if points:
            axes.plot(steps, [p.mean for p in points], color=INK["line"], linewidth=1.3,
                      marker="o" if len(points) <= FEW_POINTS else None, markersize=2.2)  # fmt: skip
        if curve.held_out:
            axes.plot(*zip(*curve.held_out, strict=True), color=INK["good"], marker="D", markersize=3.5,
                      linewidth=0.8, linestyle=(0, (1, 2)))  # fmt: skip
        values = [y for _, y in (*curve.points, *curve.held_out)]
        log = min(values) > 0 and max(values) > 20 * statistics.median(values)
        if log:
            axes.set_yscale("log")
            few_decades = max(values) < 100 * min(values)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,), numticks=5))
            axes.yaxis.set_minor_locator(NullLocator())
        elif curve.name in FROM_ZERO and min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))  # no power of ten apart from its axis
        axes.set_xlim(0, max(last_step, 1))
        # no set_title: to place it above everything costs more than to draw everything
        figure.text(0.55 / 3.5, 0.91, curve.title + (" (log scale)" if log else ""), color=INK["fg"], fontsize=10)
        return _svg(figure, f"{curve.title} over {int(last_step)} steps; last: {_short(values[-1])}")


def _mark(axes: Axes, onward: Sequence[Onward]) -> None:
    """The steps that were lost, and a line where each attempt went on: one path of each kind, however many."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    across = axes.get_xaxis_transform()  # steps, and 0 to 1 from below to above
    top = 1 if len(onward) <= MANY_ONWARD else 0.08
    lost = [(way.step, way.reached) for way in onward if way.reached is not None and way.reached > way.step]
    if lost:
        corners = [corner for a, b in lost for corner in ((a, 0), (b, 0), (b, top), (a, top), (a, 0))]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(lost)
        shade = PathPatch(Path(corners, codes), transform=across, facecolor=INK["lost"], alpha=0.25, linewidth=0)
        shade.set_clip_path(axes.patch)
        axes.add_artist(shade)
    for planned, style in ((True, {"linestyle": (0, (3, 2)), "color": INK["muted"]}), (False, {"color": INK["bad"]})):
        steps = [way.step for way in onward if way.planned == planned]
        if steps:
            x = [value for step in steps for value in (step, step, math.nan)]
            axes.plot(x, [0, top, math.nan] * len(steps), transform=across, linewidth=0.9, **style)  # type: ignore[arg-type]


def _short(value: float) -> str:
    return f"{value:.4g}"


def draw_scores(scores: Sequence[tuple[str, float, float | None, float | None]], unit: str, key: str) -> str:
    """Scores with their 95 % intervals, one below the other: name, value, low, high."""
    with _drawing(key) as make:
        names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name, *_ in scores]
        left = 0.2 + 0.085 * max(map(len, names))
        figure, axes = make(4.2, 0.4 + 0.27 * len(scores), left, top=0.06)
        for place, (_, value, low, high) in enumerate(scores):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=INK["line"], linewidth=2, solid_capstyle="butt")
                for edge in (low, high):
                    axes.plot([edge, edge], [place - 0.22, place + 0.22], color=INK["line"], linewidth=1.3)
            axes.plot([value], [place], marker="o", markersize=5, color=INK["line"])
        axes.set_yticks(range(len(scores)), names)
        axes.tick_params(axis="y", labelsize=9, labelcolor=INK["fg"])
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        if unit == "%":
            axes.set_xlim(-2, 102)
            axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        said = ", ".join(f"{name} {_short(value)}" for name, value, _, _ in scores)
        return _svg(figure, f"scores with 95 % intervals: {said}")


class _drawing:
    """Settings of all drawings, given back after; a figure with the axes that they share."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> _drawing:
        import matplotlib
        from matplotlib.figure import Figure

        self._figure = Figure
        self._context = matplotlib.rc_context({
            "svg.hashsalt": self.key, "svg.fonttype": "none", "text.parse_math": False, "path.simplify": True,
            "font.size": 9, "axes.linewidth": 0.8, "axes.unicode_minus": False,
        })  # fmt: skip
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __call__(self, width: float, height: float, left: float, top: float) -> tuple[Figure, Axes]:
        """Sizes in inches; left and top: room beside the axes. A layout engine takes twice the time of all the rest."""
        figure = self._figure(figsize=(width, height))
        inside = (left / width, 0.24 / height, 1 - (left + 0.25) / width, 1 - (0.24 + top) / height)
        axes = figure.add_axes(inside)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(INK["grid"])
        axes.grid(color=INK["grid"], linewidth=0.6, axis="both")
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK["muted"], length=0, labelsize=9)
        axes.locator_params(axis="both", nbins=5)
        return figure, axes


def _svg(figure: Figure, says: str) -> str:
    import io

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r'<style type="text/css">.*?</style>'):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # figure_1, axes_1, ...: every drawing has them
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    for name, ink in INK.items():
        text = text.replace(ink, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    title = f"<title>{html.escape(says)}</title>"
    start = f'<svg {box.group(0)} role="img" xmlns:xlink="http://www.w3.org/1999/xlink">{title}'
    return re.sub(r"\n\s*", "\n", start + text[text.index(">") + 1 :]).strip()


# --------------------------------------------------------------------------------------- time ticks

UNITS = ((1, "s"), (60, "min"), (3600, "h"), (86400, "d"))
STEPS = tuple(
    unit * n for unit, ns in ((1, (1, 2, 5, 10, 15, 30)), (60, (1, 2, 5, 10, 15, 30)), (3600, (1, 2, 3, 6, 12)))
    for n in ns
)  # fmt: skip


def time_ticks(seconds: float, most: int = 6) -> list[tuple[float, str]]:
    """Round moments from 0 to `seconds`, at most `most` + 1 of them: seconds, and how they are written."""
    step = next((s for s in STEPS if seconds / s <= most), None)
    if step is None:
        step = 86400 * max(1, math.ceil(seconds / 86400 / most))
    size, unit = next((size, unit) for size, unit in reversed(UNITS) if step >= size)
    return [(i * step, f"{i * step // size:g} {unit}" if i else "0") for i in range(int(seconds // step) + 1)]
