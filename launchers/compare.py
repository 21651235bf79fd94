"""The across-stages table: what each stage's model is worth on held-out problems, and what it answers.

python -m launchers.compare [run_name=quickstart] [paths.output_base=outputs] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from post_training.run import results
from post_training.run.results import Results

if TYPE_CHECKING:
    from rich.console import RenderableType

    from launchers.status import Look


@dataclass(frozen=True)
class Judged:
    """A stage and what its eval stage found; `samples` are the answers to the same problems."""

    stage: str
    parent: str | None  # the stage that it started from
    model: Path
    results: Results
    samples: list[dict[str, Any]]


def judged_stages(looks: list[Look]) -> list[Judged]:
    """The stages of one pipeline that have been judged, in the pipeline's order."""
    from launchers.status import real

    folders = {real(look.run.root): look.name for look in looks}
    evals = {
        look.inputs()["model"]: look
        for look in looks
        if look.config.get("stage") == "eval" and look.output_problem is None and "model" in look.inputs()
    }
    found = []
    for look in looks:
        judge = evals.get(real(look.run.root))
        if judge is None or look.config.get("stage") == "eval":
            continue
        found_there = results.read(judge.run)
        lines = judge.run.samples.read_text(encoding="utf-8").splitlines()
        parent = folders.get(look.inputs().get("model", ""))
        found.append(Judged(look.name, parent, look.run.model, found_there, [json.loads(x) for x in lines]))
    return found


def change(stage: Judged, stages: list[Judged]) -> tuple[float, bool] | None:
    """Score minus the parent's, and whether it lies outside both 95 % intervals; None where they cannot be compared."""
    parent = next((s for s in stages if s.stage == stage.parent), None)
    if parent is None or parent.results.headline != stage.results.headline:
        return None
    ours, theirs = stage.results.score, parent.results.score
    if ours is None or theirs is None or None in (ours.low, ours.high, theirs.low, theirs.high):
        return None
    return ours.value - theirs.value, ours.low > theirs.high or ours.high < theirs.low  # type: ignore[operator]


def best(stages: list[Judged]) -> Judged | None:
    """The stage with the highest held-out accuracy."""
    policies = [(s.results.score.value, s) for s in stages if s.results.headline == "accuracy" and s.results.score]
    return max(policies, key=lambda pair: pair[0])[1] if policies else None


NUM_SAMPLES = 3
"""Problems shown with every stage's answer."""
COLUMNS = (
    "perplexity_text", "perplexity_answers", "repetition", "reward", "length", "format", "steps", "steps_right",
)  # fmt: skip


def table(stages: list[Judged]) -> RenderableType:
    """For a terminal: one row a stage."""
    from rich.table import Table

    result = Table(title="held-out, greedy; +- is the half width of a 95 % interval", title_justify="left", box=None)
    for title in ("stage", "score", "+-", "vs parent", *(results.metric(name).title for name in COLUMNS)):
        result.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage in stages:
        values = stage.results
        row = [stage.stage, "", "", ""]
        if (score := values.score) is not None:
            unit = "" if values.headline == "accuracy" else " pairs"
            row[1] = f"{100 * score.value:.1f} %{unit}"
            row[2] = f"{50 * ((score.high or 0) - (score.low or 0)):.1f}"
        if (delta := change(stage, stages)) is not None:
            row[3] = f"{100 * delta[0]:+.1f}{'' if delta[1] else ' ~'}"
        row += [results.shown(name, values.figures.get(name)) for name in COLUMNS]
        result.add_row(*row)
    return result


def of_reward_model(stage: Judged) -> str | None:
    """What the table has no column for; None where the stage is no reward model."""
    names = {
        "margin": "margin", "brier": "Brier", "calibration_error": "calibration error", "mean_reward": "mean reward",
    }  # fmt: skip
    found = stage.results.figures
    if "calibration_error" not in found:
        return None
    return f"{stage.stage} : " + ", ".join(f"{word} {results.shown(k, found.get(k))}" for k, word in names.items())


def telling(stages: list[Judged], count: int) -> list[int]:
    """The problems on which the stages disagree most: those tell more than ones that all get right."""
    problems = range(min((len(s.samples) for s in stages), default=0))
    right = {i: sum(s.samples[i]["correct"] for s in stages) for i in problems}
    return sorted(problems, key=lambda i: abs(2 * right[i] - len(stages)))[:count]


def sample_lines(stages: list[Judged], count: int) -> list[str]:
    """The answers of every stage to the same few problems, one after the other."""
    lines = []
    with_samples = [s for s in stages if s.samples]
    for i in telling(with_samples, count):
        first = with_samples[0].samples[i]
        lines.append(f"{_one_line(first['prompt'])}   (answer {first['answer']})")
        for stage in with_samples:
            mark = "+" if stage.samples[i]["correct"] else "-"
            lines.append(f"  {mark} {stage.stage:6} {_one_line(stage.samples[i]['completion'])}")
    return lines


def _one_line(text: str, width: int = 110) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= width else f"{flat[: width - 3]}..."


def show(folder: Path) -> None:
    """Print a pipeline's table, samples, where the models are and how to talk to the best one."""
    from rich.console import Console

    from launchers.status import looks_of

    stages = judged_stages(looks_of(folder))
    if not stages:
        raise LaunchError(
            f"no stage of {folder} has been judged yet", "wait for an eval stage: python -m launchers.status"
        )
    console = Console(highlight=False, soft_wrap=True)
    shown = table(stages)
    # all of it, also where the output is a file or a narrow terminal: a score cut short is none
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(shown, options=unlimited).maximum)
    console.print(shown, markup=False)
    console.print("~ : within the error bars of its parent", markup=False)
    for stage in stages:
        if (line := of_reward_model(stage)) is not None:
            console.print(line, markup=False)
    console.print()
    console.print("answers to problems on which the stages disagree:", markup=False)
    for line in sample_lines(stages, NUM_SAMPLES):
        console.print(line, markup=False)
    console.print(f"\nmodels: {folder}/<stage>/model", markup=False)
    if (winner := best(stages)) is not None:
        prompt = winner.samples[0]["prompt"] if winner.samples else "..."
        console.print(f"talk to the best one ({winner.stage}):", markup=False)
        console.print(
            f"  {sys.executable} -m post_training.chat {winner.model} --prompt {_quoted(prompt)}", markup=False
        )


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(_one_line(text))


def main(argv: list[str] | None = None) -> int:
    from launchers.status import find_pipelines, looks_of, parse_arguments

    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        folders = find_pipelines(arguments.output_base, arguments.names)
        if arguments.as_json:
            rows = [
                {"pipeline": folder.name, "stage": s.stage, "parent": s.parent, "model": str(s.model)}
                | results.as_plain(s.results)
                for folder in folders
                for s in judged_stages(looks_of(folder))
            ]
            print(json.dumps({"stages": rows}, indent=1))
            return 0
        for folder in folders:
            show(folder)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
