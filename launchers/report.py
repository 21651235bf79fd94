"""One self-contained HTML file on a pipeline: did it help, what did it cost, and what happened.

    python -m launchers.report [run_name=NAME ...] [paths.output_base=outputs] [--output FILE] [--json]

Written to <output_base>/<run_name>/report.html: no scripts, nothing from the network. Works for a pipeline that is
unfinished, running, failed or damaged; what is missing is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import report_sections as sections
from launchers import runs, states, table
from launchers.errors import LaunchError
from post_training.run.directory import write_atomic
from post_training.run.secrets import masked

if TYPE_CHECKING:
    import jinja2

NAME = "report.html"


# ------------------------------------------------------------------------------------------- the page


def gather(folder: Path, now: float) -> dict[str, Any]:
    """Everything that the page shows, as plain data and SVG text."""
    pipeline = sections.read_pipeline(folder, now)
    counts = Counter(row["state"] for row in pipeline.rows.values())
    times = [event["time"] for look in pipeline.looks for event in look.story.events]
    lost = sections.lost_time(pipeline)
    lines = sections.training(pipeline)  # notes damage
    hours = sections.gpu_hours(pipeline)
    clusters = dict.fromkeys(str(row["cluster"]) for row in pipeline.rows.values() if row["cluster"])
    return {
        "name": pipeline.name,
        "folder": str(folder),
        "made": sections.clock(now),
        "first": sections.clock(min(times)) if times else None,
        "last": sections.clock(max(times)) if times else None,
        "wall": table.duration(max(times) - min(times)) if times else None,
        "cluster": ", ".join(clusters),
        "states": [{"state": state, "count": counts[state]}
                   for state in sorted(states.STATES, key="done".__ne__) if counts[state]],
        "stages": len(pipeline.rows),
        "has_evals": any(pipeline.is_eval(look) for look in pipeline.looks),
        "reasons": [
            {"stage": row["stage"], "state": row["state"], "reason": row["reason"]}
            for row in pipeline.rows.values() if row["reason"] and row["state"] != "done"
        ],
        "verdict": sections.verdict(pipeline),
        "judged": sections.score_table(pipeline) if pipeline.judged else None,
        "score_charts": sections.score_charts(pipeline),
        "graph": sections.graph(pipeline),
        "timeline": sections.timeline(pipeline),
        "lost": lost,
        "gpu_hours": None if hours is None else f"{hours:.3g}",
        "attempts": sections.attempt_table(pipeline),
        "training": lines,
        "answers": sections.answers(pipeline),
        "configs": sections.configs(pipeline),
        "environments": sections.environments(pipeline),
        "data": sections.data_sets(pipeline),
        "problems": pipeline.problems,
    }  # fmt: skip


def _finalize(value: Any) -> Any:
    """What every expression of the template passes through before it is escaped."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in value)
        return masked(shown)
    return value


def environment_of_templates() -> jinja2.Environment:
    """Everything is escaped that is not our own drawing."""
    import jinja2

    from launchers.render import TEMPLATES

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip


def render(page: Mapping[str, Any]) -> str:
    """The page as text."""
    return environment_of_templates().get_template("report.html.j2").render(page)


# ---------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Arguments:
    output_base: Path
    names: list[str]
    output: Path | None
    as_json: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for a key that is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.report", description="One self-contained HTML file on a pipeline."
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run_name=NAME, paths.output_base=FOLDER")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"default: <output_base>/<run_name>/{NAME}")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON")
    given = parser.parse_intermixed_args(argv)
    if given.output is not None:
        if given.output.is_dir():  # an empty text is the current folder
            raise LaunchError(f"--output {given.output}: is a folder", f"--output {given.output / NAME}")
        if not given.output.parent.is_dir():
            raise LaunchError(f"--output {given.output}: there is no folder {given.output.parent}", "make it first")
    return Arguments(*runs.which(given.settings, "report"), given.output, given.json)


def write(folder: Path, output: Path, now: float) -> dict[str, Any]:
    """Make one report. Returns what is to be said of it. Raises LaunchError where it cannot be written."""
    began = time.monotonic()
    page = gather(folder, now)
    text = render(page).encode("utf-8", "replace").decode()
    try:
        write_atomic(output, text)
    except OSError as error:
        raise LaunchError(
            f"{output}: {error.strerror or error}", "--output FILE in a folder that is there and yours"
        ) from error
    path = output.absolute()
    return {
        "pipeline": folder.name, "report": str(path), "url": path.as_uri(), "bytes": len(text.encode()),
        "seconds": round(time.monotonic() - began, 2), "problems": page["problems"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        folders = runs.find_pipelines(arguments.output_base, arguments.names)
        if not folders:
            raise LaunchError(f"no pipelines in {arguments.output_base}", "submit one first: launchers.pipeline")
        if arguments.output is not None and len(folders) > 1:
            names = ", ".join(folder.name for folder in folders)
            raise LaunchError(f"--output={arguments.output}: one file for {names}", f"run_name={folders[-1].name}")
        made = [write(folder, arguments.output or folder / NAME, time.time()) for folder in folders]
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.as_json:
        print(json.dumps({"reports": made}, indent=1))
        return 0
    for one in made:
        print(f"{one['pipeline']}: {one['report']} ({one['bytes'] / 1e6:.2f} MB, {one['seconds']:.1f} s)")
        print(f"  {one['url']}")
        for problem in one["problems"]:
            print(f"  missing: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
