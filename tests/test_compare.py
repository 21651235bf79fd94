"""The across-stages table: what is compared with what, and that every form of it says the same."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from launchers import compare, worth
from launchers.compare import Cell, Column, Sheet
from launchers.runs import looks_of
from launchers.worth import best, forgotten, outside
from post_training.run import ledger, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure, Results

ROOT = Path(__file__).resolve().parent.parent


def share(value: float, half: float, count: int = 100) -> Figure:
    return Figure(value, value - half, value + half, count)


class Made:
    """A pipeline's folder, written as the launcher and the stages write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Any] = {}

    def run(self, name: str, technique: str, model: str | None = None, **config: Any) -> RunDirectory:
        run = RunDirectory(self.folder / name)
        run.create()
        source = None
        if model is not None:  # a stage of this pipeline, or a hub id
            start = self.folder / model
            made = model in self.stages
            source = {"path": str(start / "model") if made else model, "run_dir": str(start) if made else None}
        about = {"version": 1, "name": name, "stage": technique, "identity": "x", "inputs": {"model": source}} | config
        run.config.write_text(yaml.safe_dump(about))
        self.stages[name] = {"run_dir": str(run.root), "stage": technique, "after": [model] if model else []}
        (self.folder / "pipeline.json").write_text(json.dumps({"stages": self.stages}))
        return run

    def stage(self, name: str, model: str | None = None, technique: str = "sft") -> RunDirectory:
        run = self.run(name, technique, model)
        run.model.mkdir()
        (run.model / "config.json").write_text("{}")
        manifest.write(run.model, stage=technique)
        return run

    def judged(
        self, of: str, found: Results, samples: tuple[dict[str, Any], ...] = (), name: str = "", data: str = "sums"
    ) -> RunDirectory:
        run = self.run(name or f"eval_{of}", "eval", of, data={"name": data})
        run.model.mkdir()
        results.write(run.model, found)
        (run.model / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        manifest.write(run.model, stage="eval")
        return run

    def undone(self, of: str) -> RunDirectory:
        run = self.run(f"eval_{of}", "eval", of, data={"name": "sums"})
        ledger.append(run.ledger, "submitted", job_id="local-1", cluster="local")
        return run


def asked(prompt: str, answer: str, completion: str, correct: bool) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "completion": completion, "correct": correct}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """base, sft, rm from sft, grpo from sft; grpo is judged to be no better than sft within its error bars."""
    pipeline = Made(tmp_path / "first")
    text = {"base": Figure(2.0, 1.9, 2.1), "sft": Figure(4.0, 3.8, 4.2), "grpo": Figure(2.1, 2.0, 2.2)}
    scores = {"base": share(0.0, 0.0), "sft": share(0.5, 0.05), "grpo": share(0.55, 0.05)}
    for name, parent in (("base", None), ("sft", "base"), ("grpo", "sft")):
        pipeline.stage(name, parent, "base" if name == "base" else "sft")
        found = {"accuracy": scores[name], "perplexity_text": text[name], "length": Figure(12.5)}
        if name == "grpo":
            found |= {"pass@8": share(0.9, 0.05), "pass@2": share(0.7, 0.05), "gsm8k/exact_match": Figure(0.25)}
        samples = (asked("1+1=?", "2", "2", name != "base"), asked("2+2=?", "4", "4", name == "grpo"))
        pipeline.judged(name, Results("accuracy", found), samples)
    pipeline.stage("rm", "sft", "rm")
    pipeline.judged(
        "rm", Results("preference_accuracy", {"preference_accuracy": share(0.85, 0.03), "margin": Figure(3.9)})
    )
    return pipeline


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = compare.main(list(argv))
    said = capsys.readouterr()
    return status, said.out, said.err


# ------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (share(0.5, 0.1), share(0.8, 0.1), True),
        (share(0.8, 0.1), share(0.5, 0.1), True),
        (share(0.5, 0.1), share(0.65, 0.1), False),
        (Figure(0.5, 0.4, 0.6), Figure(0.7, 0.6, 0.8), False),  # they touch
        (Figure(0.7, 0.6, 0.8), Figure(0.5, 0.4, 0.6), False),
        (Figure(0.5, 0.4, 0.6), Figure(0.9), None),
        (Figure(0.5, None, 0.6), share(0.9, 0.1), None),
    ],
)
def test_outside_the_error_bars_is_where_intervals_do_not_overlap(
    ours: Figure, theirs: Figure, expected: bool | None
) -> None:
    assert outside(ours, theirs) is expected
    assert worth.mark(expected) == {True: "*", False: "~", None: ""}[expected]


def test_a_stage_is_compared_with_the_nearest_judged_one_that_it_comes_from(made: Made) -> None:
    rows = {row["stage"]: row for row in worth.rows_of([worth.read_pipeline(made.folder)])}
    assert list(rows) == ["base", "sft", "grpo", "rm"]
    changes = {name: row["score"]["change"] for name, row in rows.items()}
    assert changes["base"] is None and changes["rm"] is None  # nothing before it; judged by something else
    assert changes["sft"] == {"value": 0.5, "outside": True, "mark": "*", "against": "base"}
    assert changes["grpo"]["value"] == pytest.approx(0.05) and changes["grpo"]["mark"] == "~"
    # a stage between that nobody judged
    made.stage("merged", "sft", "merge")
    made.stage("late", "merged")
    made.judged("late", Results("accuracy", {"accuracy": share(0.7, 0.05)}))
    late = worth.rows_of([worth.read_pipeline(made.folder)])[-1]
    assert (late["stage"], late["parent"], late["score"]["change"]["against"]) == ("late", "merged", "sft")
    assert "merged" not in {row["stage"] for row in worth.rows_of([worth.read_pipeline(made.folder)])}


def test_other_problems_are_not_compared(made: Made) -> None:
    made.stage("other", "sft")
    figures = {"accuracy": share(0.9, 0.01), "perplexity_text": Figure(3.0)}
    made.judged("other", Results("accuracy", figures), data="gsm8k")
    row = worth.rows_of([worth.read_pipeline(made.folder)])[-1]
    assert row["stage"] == "other" and row["score"]["change"] is None and row["forgot"] is None


def test_what_was_forgotten_is_counted_from_the_first_of_the_line(made: Made) -> None:
    stages = worth.read_pipeline(made.folder).judged
    lost = {stage.stage: forgotten(stage, stages) for stage in stages}
    assert lost["base"] is None and lost["rm"] is None
    assert lost["sft"] is not None and lost["grpo"] is not None
    assert lost["sft"]["value"] == pytest.approx(math.log(4.0) - math.log(2.0))
    assert (lost["sft"]["mark"], lost["sft"]["against"]) == ("*", "base")
    assert lost["grpo"]["value"] == pytest.approx(math.log(2.1 / 2.0)) and lost["grpo"]["mark"] == "~"


def test_losses_on_other_texts_are_not_counted(made: Made) -> None:
    """What an evaluation says of its text decides, whatever its problems are from."""
    for name, text in (("same", "a"), ("other", "b")):
        made.stage(name, "sft")
        on_theirs = Results("accuracy", {"accuracy": share(0.9, 0.01), "perplexity_text": Figure(3.0)}, {"text": text})
        made.judged(name, on_theirs, data="gsm8k")
    judged = worth.read_pipeline(made.folder).judged
    stages = [replace(s, results=replace(s.results, settings={"text": "a"} | s.results.settings)) for s in judged]
    same, other = stages[-2:]
    assert other.stage == "other" and forgotten(other, stages) is None
    lost = forgotten(same, stages)
    assert lost is not None and lost["value"] == pytest.approx(math.log(3.0 / 2.0))
    figures = {row["stage"]: row["figures"] for row in worth.rows_of([worth.Pipeline(made.folder, stages)])}
    assert figures["same"]["perplexity_text"]["change"]["value"] == pytest.approx(-1.0)
    assert figures["other"]["perplexity_text"]["change"] is figures["same"]["accuracy"]["change"] is None


def test_a_start_model_from_elsewhere_is_the_first_of_the_line(tmp_path: Path) -> None:
    pipeline = Made(tmp_path / "hub")
    pipeline.stage("sft", "Qwen/Qwen3-0.6B")
    pipeline.judged("Qwen/Qwen3-0.6B", Results("accuracy", {"accuracy": share(0.2, 0.1)}), name="eval_base")
    pipeline.judged("sft", Results("accuracy", {"accuracy": share(0.6, 0.1)}))
    base, sft = worth.rows_of([worth.read_pipeline(pipeline.folder)])
    assert (base["stage"], base["model"], base["parent"]) == ("base", "Qwen/Qwen3-0.6B", None)
    assert sft["parent"] == "base" and sft["score"]["change"]["mark"] == "*"


def test_two_evaluations_of_one_stage(made: Made) -> None:
    """Other figures make one row; the same figures twice make two, each with its evaluation's name."""
    made.judged("sft", Results(None, {"arc/acc": Figure(0.4, 0.3, 0.5)}), name="bench_sft")
    made.judged("sft", Results("accuracy", {"accuracy": share(0.1, 0.05)}), name="hard_sft", data="gsm8k")
    rows = worth.rows_of([worth.read_pipeline(made.folder)])
    assert [row["row"] for row in rows] == ["base", "sft (eval_sft, bench_sft)", "sft (hard_sft)", "grpo", "rm"]
    assert rows[1]["figures"].keys() == {"accuracy", "perplexity_text", "length", "arc/acc"}
    assert rows[1]["score"]["value"] == 0.5 and rows[2]["score"]["value"] == 0.1
    assert rows[3]["score"]["change"]["value"] == pytest.approx(0.05), "grpo was asked what eval_sft asked"


def test_outputs_that_were_moved_are_still_one_pipeline(made: Made, tmp_path: Path) -> None:
    before = worth.rows_of([worth.read_pipeline(made.folder)])
    moved = tmp_path / "elsewhere" / "first"
    moved.parent.mkdir()
    made.folder.rename(moved)
    after = worth.rows_of([worth.read_pipeline(moved)])
    assert [row | {"model": ""} for row in after] == [row | {"model": ""} for row in before]
    assert after[1]["model"] == str(moved / "sft" / "model")


def test_a_copy_is_read_from_its_own_folder(made: Made, tmp_path: Path) -> None:
    """Its pipeline.json and configs name the runs that it was copied from, which are still there."""
    before = worth.rows_of([worth.read_pipeline(made.folder)])
    copy = tmp_path / "elsewhere" / "first"
    shutil.copytree(made.folder, copy)
    after = worth.rows_of([worth.read_pipeline(copy)])
    assert [row | {"model": ""} for row in after] == [row | {"model": ""} for row in before]
    assert all(row["model"].startswith(str(copy)) for row in after)


def test_the_best_model_is_no_reward_model(made: Made) -> None:
    stages = worth.read_pipeline(made.folder).judged
    winner = best(stages)
    assert winner is not None and winner.stage == "grpo"
    assert best([s for s in stages if s.stage == "rm"]) is None
    assert best([]) is None
    texts = [
        replace(s, results=Results("perplexity_text", s.results.figures))
        for s in stages if s.stage != "rm"
    ]  # fmt: skip
    lowest = best(texts)
    assert lowest is not None and lowest.stage == "base"


# ---------------------------------------------------------------------------- every form says the same


def markdown_tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown text, escapes undone."""
    tables: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not header:
            header = cells
            tables.append([])
        elif not set(cells[0]) <= {"-", ":"}:
            tables[-1].append(dict(zip(header, cells, strict=True)))
    return tables


def test_terminal_markdown_csv_and_json_say_the_same(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"paths.output_base={made.folder.parent}"
    _, printed, _ = run(capsys, where)
    _, document, _ = run(capsys, where, "--markdown")
    _, text, _ = run(capsys, where, "--csv")
    _, plain, _ = run(capsys, where, "--json")
    assert "\r\n" in text, "RFC 4180"
    lines = list(csv.DictReader(io.StringIO(text)))
    found = json.loads(plain)
    assert found["version"] == 1 and found["pipelines"] == ["first"] and found["not_judged"] == []
    (rows,) = markdown_tables(document)
    assert len(rows) == len(lines) == len(found["stages"]) == 4
    titles = {"perplexity_text": "ppl text", "length": "tokens", "pass@8": "pass@8", "pass@2": "pass@2",
              "gsm8k/exact_match": "gsm8k/exact_match"}  # fmt: skip
    for cells, line, row in zip(rows, lines, found["stages"], strict=True):
        # terminal and Markdown: the same cells
        shown = next(x for x in printed.splitlines() if x.split()[:1] == [row["stage"]])
        assert shown.split() == " ".join(cells.values()).split()
        # Markdown and JSON: numbers as they are shown
        assert cells["stage"] == row["row"] == line["stage"]
        assert cells["score"].startswith(f"{100 * row['score']['value']:.1f} %")
        assert float(cells["+-"]) == pytest.approx(50 * (row["score"]["high"] - row["score"]["low"]), abs=0.05)
        change, lost = row["score"]["change"], row["forgot"]
        assert cells["vs parent"] == (f"{100 * change['value']:+.1f} {change['mark']}" if change else "")
        assert cells["forgot"] == (f"{lost['value']:+.2f} {lost['mark']}" if lost else "-")
        # CSV and JSON: the same numbers
        for key, value in (("score", row["score"]), ("forgot", lost), ("score_change", change)):
            assert (float(line[key]) if line[key] else None) == (value["value"] if value else None)
            if key != "score":
                assert line[f"{key}_mark"] == (value["mark"] if value else "")
        for name, title in titles.items():
            figure = row["figures"].get(name)
            assert line[name] == (str(figure["value"]) if figure else "")
            mark = ((figure or {}).get("change") or {}).get("mark", "")
            wanted = f"{results.shown(name, Figure(figure['value']))} {mark}".strip() if figure else "-"
            assert cells[title] == wanted
    assert [row["perplexity_text_change_mark"] for row in lines] == ["", "*", "*", ""]
    # what matters first, and no column for what nobody has
    assert list(rows[0]) == ["stage", "score", "+-", "vs parent", "forgot", "pass@2", "pass@8", "gsm8k/exact_match",
                             "ppl text", "tokens"]  # fmt: skip
    assert "rm : margin 3.90" in printed and "rm : margin 3.90" in document


EVIL = "a|b\\c *d* <img src=x> `e` [f](g) &amp; \x1b[31m\nnext"


def test_cells_are_shown_to_the_letter(made: Made) -> None:
    shown = compare.markdown(Sheet(EVIL, [Column("stage", [Cell(EVIL)]), Column(EVIL, [Cell("1")])], [EVIL]))
    assert "\x1b" not in shown and len(shown.splitlines()) == 7
    ((row,),) = markdown_tables(shown)
    flat = "a|b\\c *d* <img src=x> `e` [f](g) &amp; [31m next"
    assert row == {"stage": flat, flat: "1"}
    cell = shown.splitlines()[4].removeprefix("| ").removesuffix(" | 1 |")
    assert not re.search(r"(?<!\\)[|*<`\[&]", cell)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.lists(st.text(max_size=30), min_size=2, max_size=2)), min_size=2,
             max_size=12),
    st.integers(40, 200),
)  # fmt: skip
def test_a_table_is_folded_and_never_cut(columns: list[tuple[str, list[str]]], width: int) -> None:
    given = [
        Column(worth.one_line(title), [Cell(worth.one_line(text), "*" if i else "") for text in cells])
        for i, (title, cells) in enumerate(columns)
    ]
    tables = [[line.plain for line in table] for table in compare.terminal(Sheet("", given), width)]
    widths = [max(map(cell_len, compare._texts(column))) for column in given]
    widest = max(width, widths[0] + 2 + max(widths[1:]))  # of a column that alone is too wide
    assert all(cell_len(line) <= widest for table in tables for line in table)
    for table in tables:
        assert all(line.startswith(cell.text) for line, cell in zip(table[1:], given[0].cells, strict=True))
    together = " ".join(line for table in tables for line in table)
    assert all(cell.text in together for column in given for cell in column.cells)


def test_samples_are_of_the_same_problems(made: Made) -> None:
    lines = compare.sample_lines(worth.read_pipeline(made.folder).judged, 1, 60)
    assert lines == ["1+1=?   (answer 2)", "  - base 2", "  + sft  2", "  + grpo 2"] or lines[0].startswith("2+2=?")
    assert all(len(line) <= 60 for line in lines)


def test_answers_are_no_commands_to_the_terminal(made: Made) -> None:
    made.stage("evil", "sft")
    made.judged("evil", Results("accuracy", {"accuracy": share(0.6, 0.1)}), (
        asked("1+1=?", "2", "\x1b]0;owned\x07\x1b[2J[bold]2", False), asked("2+2=?", "4", "4", False)))  # fmt: skip
    done = on_terminal(80, f"paths.output_base={made.folder.parent}")
    assert "]0;owned [2J[bold]2" in done and "\x1b[2J" not in done and "\x07" not in done


# ------------------------------------------------------------------------------- not judged, damaged, none


def test_what_is_not_judged_is_no_row_but_is_named(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.stage("dpo", "sft")
    half = made.undone("dpo")
    partial = half.root / "model.partial-1"
    partial.mkdir()
    results.write(partial, Results("accuracy", {"accuracy": share(0.99, 0.01)}))
    where = f"paths.output_base={made.folder.parent}"
    status, printed, _ = run(capsys, where)
    assert status == 0
    assert "not judged yet: dpo: eval_dpo is cancelled (its supervisor and its job are gone" in printed
    assert "99.0" not in printed
    _, document, _ = run(capsys, where, "--markdown")
    assert r"- not judged yet: dpo: eval\_dpo is cancelled" in document and "99.0" not in document
    _, plain, _ = run(capsys, where, "--json")
    (missing,) = json.loads(plain)["not_judged"]
    told = [missing[key] for key in ("stage", "judge", "state", "fix")]
    assert told == ["dpo", "eval_dpo", "cancelled", None]
    _, text, _ = run(capsys, where, "--csv")
    last = list(csv.DictReader(io.StringIO(text)))[-1]
    assert (last["stage"], last["state"], last["score"]) == ("dpo", "cancelled", "")


@pytest.mark.parametrize(
    ("written", "fix"),
    [('{"version": 2, "figures": []}', "remove {model}"), ("not json", "remove {model}"),
     ('{"version": 7}', "read it with the code that wrote it")],
)  # fmt: skip
def test_damage_is_said_with_its_fix_and_the_others_are_shown(
    made: Made, written: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.folder / "eval_sft" / "model"
    (folder / "results.json").write_text(written)
    (folder / manifest.NAME).unlink()
    manifest.write(folder, stage="eval")
    status, printed, _ = run(capsys, f"paths.output_base={made.folder.parent}")
    assert status == 1
    with pytest.raises(ValueError, match="eval_sft: "):
        worth.judged_stages(looks_of(made.folder))
    line = next(line for line in printed.splitlines() if line.startswith("not read: sft: eval_sft is damaged"))
    assert fix.format(model=folder) in line
    assert re.findall(r"^(\w+) +[0-9.]+ %", printed, re.M) == ["base", "grpo", "rm"]


def test_a_file_that_is_shorter_than_its_manifest_says_is_not_judged(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.folder / "eval_sft" / "model" / "results.json").write_text("{}")
    status, printed, _ = run(capsys, f"paths.output_base={made.folder.parent}")
    assert status == 0 and "not judged yet: sft: eval_sft is" in printed
    assert "50.0 %" not in printed


def test_damaged_samples_leave_the_figures(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.folder / "eval_sft" / "model"
    (folder / "samples.jsonl").write_text('[1]\n{"prompt": 1}\n')
    (folder / manifest.NAME).unlink()
    manifest.write(folder, stage="eval")
    status, printed, _ = run(capsys, f"paths.output_base={made.folder.parent}")
    assert status == 0 and "50.0 %" in printed


def test_nothing_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Made(tmp_path / "new").stage("base")
    status, printed, _ = run(capsys, f"paths.output_base={tmp_path}")
    assert (status, printed.strip()) == (1, "new: no stage has been judged yet")
    status, plain, _ = run(capsys, f"paths.output_base={tmp_path}", "--json")
    assert status == 1 and json.loads(plain)["stages"] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["stage=sft"], "stage=sft: not a setting of compare"), (["run_name="], "run_name=: no value"),
     (["run_name=frist"], "did you mean 'first'?"), (["paths.output_base=/nowhere/x"], "no such folder")],
)  # fmt: skip
def test_bad_input(made: Made, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, f"paths.output_base={made.folder.parent}", *argv)
    assert (status, out) == (2, "") and said in err and "\n  fix: " in err


# ------------------------------------------------------------------------------------ several pipelines


@pytest.fixture
def two(made: Made) -> Path:
    """A second pipeline, whose sft is better than the first's beyond the error bars, and which has no grpo."""
    second = Made(made.folder.parent / "second")
    second.stage("base", None, "base")
    second.judged("base", Results("accuracy", {"accuracy": share(0.0, 0.01)}))
    second.stage("sft", "base")
    second.judged("sft", Results("accuracy", {"accuracy": share(0.7, 0.05)}))
    return made.folder.parent


def test_pipelines_side_by_side(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["run_name=first", "run_name=second", f"paths.output_base={two}"]
    status, printed, _ = run(capsys, *names)
    assert status == 0
    assert printed.index("first: held-out") < printed.index("second: held-out") < printed.index("side by side")
    _, document, _ = run(capsys, *names, "--markdown")
    *own, together = markdown_tables(document)
    assert len(own) == 2
    assert list(together[0]) == ["stage", "first", "second", "vs first"]
    assert [list(row.values()) for row in together] == [
        ["base", "0.0 % +- 0.0", "0.0 % +- 1.0", "+0.0 ~"], ["sft", "50.0 % +- 5.0", "70.0 % +- 5.0", "+20.0 *"],
        ["grpo", "55.0 % +- 5.0", "-", ""], ["rm", "85.0 % pairs +- 3.0", "-", ""],
    ]  # fmt: skip
    for row in together:
        assert any(line.split() == " ".join(row.values()).split() for line in printed.splitlines())
    _, text, _ = run(capsys, *names, "--csv")
    _, plain, _ = run(capsys, *names, "--json")
    lines = {(line["pipeline"], line["stage"]): line for line in csv.DictReader(io.StringIO(text))}
    assert (lines["second", "sft"]["beside"], lines["second", "sft"]["beside_mark"]) == (str(0.7 - 0.5), "*")
    beside = {(row["pipeline"], row["stage"]): row["beside"] for row in json.loads(plain)["stages"]}
    assert beside["first", "sft"] is None and beside["second", "sft"]["value"] == 0.7 - 0.5


def test_a_sweep_is_one_table_unless_all_are_asked_for(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lr in range(4):
        point = Made(two / f"quickstart-sft.lr={lr}")
        point.stage("sft")
        point.judged("sft", Results("accuracy", {"accuracy": share(0.1 * lr, 0.05)}))
    status, printed, _ = run(capsys, f"paths.output_base={two}")
    assert status == 0 and "held-out, greedy" not in printed and "side by side" in printed and "--all" in printed
    header = next(line for line in printed.splitlines() if line.startswith("stage")).split()
    assert [name for name in header if "=" in name] == [f"quickstart-sft.lr={lr}" for lr in range(4)]
    _, printed, _ = run(capsys, f"paths.output_base={two}", "--all")
    assert printed.count("held-out, greedy") == 6
    _, printed, _ = run(capsys, f"paths.output_base={two}", "run_name=quickstart-sft.lr=2")
    assert "side by side" not in printed and printed.count("held-out, greedy") == 1


# ---------------------------------------------------------------------------------- a terminal, the end


def on_terminal(width: int, *argv: str) -> str:
    """What the command writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    command = [sys.executable, "-m", "launchers.compare", *argv]
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env) as process:
        os.close(theirs)
        said = b""
        try:
            while chunk := os.read(ours, 65536):
                said += chunk
        except OSError:  # EIO: its other end is closed
            pass
        finally:
            os.close(ours)
            process.kill() if process.poll() is None and not said else None
    return said.decode()


def test_a_terminal_of_80_columns(made: Made) -> None:
    said = on_terminal(80, f"paths.output_base={made.folder.parent}")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said).replace("\r\n", "\n")
    table = plain[: plain.index("forgot :")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert [line.split()[0] for line in table.splitlines() if line].count("stage") == 2, "folded"
    assert "\x1b[32m" in said, "better beyond the error bars is green"
    assert "ppl text" in table and "tokens" in table


def test_the_commands_at_the_end(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder.parent)
    pipeline = worth.read_pipeline(made.folder)
    (_, chat), (_, report) = compare.commands([pipeline])
    words = shlex.split(chat)
    assert words[1:] == ["-m", "post_training.chat", "run=first/grpo", "--prompt", "1+1=?"]
    assert Path(words[0]).resolve() == Path(sys.executable).resolve()
    assert (made.folder.parent / words[3].removeprefix("run=") / "config.yaml").exists()
    assert shlex.split(report)[1:] == ["-m", "launchers.report", "run_name=first", "paths.output_base=."]
    (made.folder.parent / "outputs").mkdir()
    made.folder.rename(made.folder.parent / "outputs" / "first")
    (_, chat), (_, report) = compare.commands([worth.read_pipeline(Path("outputs/first"))])
    assert shlex.split(chat)[3] == "run=outputs/first/grpo"
    assert shlex.split(report)[3:] == ["run_name=first"]


def test_the_local_pipeline_shows_it_at_its_end(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.show(made.folder) == 0
    printed = capsys.readouterr().out
    assert "55.0 %" in printed and "post_training.chat" in printed and "launchers.report" in printed
    assert f"models: {made.folder}/<stage>/model" in printed
