"""The report: every section from pipelines made by hand, damaged ones too; and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.datasets import KNOWN
from launchers import charts, report, runs
from launchers import report_sections as sections
from post_training.run import accounting, environment, manifest
from post_training.run.directory import Fenced, RunDirectory
from post_training.run.results import Figure, Results
from post_training.run.results import write as write_results
from post_training.run.secrets import masked
from tests.test_status import JUNK, VALUES

ROOT = Path(__file__).resolve().parent.parent
START = 1_795_255_000.0
EVIL = "<script>alert(1)</script>"


class Made:
    """A pipeline on disk, with the times that a test wants."""

    def __init__(self, base: Path, name: str = "tiny") -> None:
        self.folder, self.stages = base / name, {}
        self.folder.mkdir(parents=True)

    def run(
        self, name: str, stage: str, after: tuple[str, ...] = (), events: tuple[dict[str, Any], ...] = (),
        metrics: Sequence[dict[str, Any]] = (), done: bool = True, **config: Any,
    ) -> RunDirectory:  # fmt: skip
        run = RunDirectory(self.folder / name)
        run.create()
        inputs = {
            key: {"path": str(run.root.parent / parent / "model"), "run_dir": str(run.root.parent / parent)}
            for key, parent in zip(("model", "reward_model"), after, strict=False)
        }
        plain = {
            "version": 1, "name": name, "stage": stage, "pipeline": self.folder.name, "identity": f"id-{name}",
            "seed": 0, "inputs": inputs, "training": {"max_steps": 60, "effective_batch_size": 8},
            "data": {"name": "arithmetic"}, "cluster": {"scheduler": "slurm", "slurm_conf": None},
            "slurm": {"num_nodes": 2, "gpus_per_node": 8, "wall_time": "24:00:00"}, **config,
        }  # fmt: skip
        run.config.write_text(yaml.safe_dump(plain))
        run.ledger.write_text("".join(json.dumps({"version": 1, **event}) + "\n" for event in events))
        if metrics:
            run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        if done and stage != "eval":
            self.finish(run)
        self.stages[name] = {"run_dir": str(run.root), "stage": stage, "after": list(after)}
        self.describe()
        return run

    def finish(self, run: RunDirectory) -> None:
        run.model.mkdir(exist_ok=True)
        (run.model / "weights").write_text("w")
        manifest.write(run.model)

    def judge(
        self, name: str, figures: dict[str, Figure], samples: Sequence[dict[str, Any]] = (), headline: str = "accuracy",
        at: float = 200.0,
    ) -> RunDirectory:  # fmt: skip
        run = self.run(f"eval_{name}", "eval", (name,), whole(at, at + 5))
        run.model.mkdir()
        write_results(run.model, Results(headline, figures, {}, 1.0))
        run.samples.write_text("".join(json.dumps(line) + "\n" for line in samples))
        manifest.write(run.model)
        return run

    def describe(self) -> None:
        (self.folder / "pipeline.json").write_text(
            json.dumps({"version": 1, "name": self.folder.name, "cluster": "h100", "stages": self.stages})
        )

    def page(self) -> str:
        return report.render(report.gather(self.folder, START + 5000))


def event(at: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": START + at, "event": name, **fields}


def started(at: float, attempt: int, job_id: str = "7") -> dict[str, Any]:
    return event(at, "attempt_started", attempt=attempt, job_id=job_id, node="n1", nodes=["n1", "n2"])


def training(at: float, attempt: int, step: int) -> dict[str, Any]:
    return event(at, "training_started", attempt=attempt, step=step)


def ended(
    at: float, attempt: int, outcome: str, step: int, reason: str | None = None, **seconds: float
) -> dict[str, Any]:
    action = "exit" if outcome in ("finished", "cancelled") else "requeue"
    return event(
        at, "attempt_ended", attempt=attempt, code=0, outcome=outcome, action=action, reason=reason, gave_up=False,
        step=step, seconds=seconds or None, measured_until=START + at - 1,
    )  # fmt: skip


def whole(at: float, until: float) -> tuple[dict[str, Any], ...]:
    """A run of one attempt."""
    return (
        event(0, "submitted", job_id="7", cluster="h100"), started(at, 1), training(at + 2, 1, 0),
        ended(until, 1, "finished", 60, startup=2, steps=until - at - 4),
    )  # fmt: skip


def lines(steps: int, every: int = 1, **names: float) -> list[dict[str, Any]]:
    return [
        {"step": i, "max_steps": steps, "time": START + i} | {name: by * (1 + 1 / i) for name, by in names.items()}
        for i in range(1, steps + 1, every)
    ]


def share(value: float, low: float, high: float) -> Figure:
    return Figure(value, low, high, 100)


def sample(prompt: str, answer: str, completion: str, correct: bool) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "completion": completion, "correct": correct}


REQUEUED = (
    event(0, "submitted", job_id="7", cluster="h100"),
    started(10, 1), training(20, 1, 0), event(30, "checkpoint_saved", attempt=1, step=10, seconds=1.0),
    ended(40, 1, "crashed", 17, "exit status 137", startup=10, steps=18, saving=1),
    started(60, 2), training(70, 2, 10), event(80, "stop_requested", attempt=2, signal="USR1"),
    event(85, "checkpoint_saved", attempt=2, step=33, seconds=1.0), event(86, "stopped", attempt=2, step=33),
    ended(88, 2, "stopped", 33, None, startup=10, redone=5, steps=10, saving=1),
    started(100, 3), training(110, 3, 33), event(115, "guardrail", attempt=3, step=40, rule="kl", action="warn",
                                                 reason="KL 20 above 15"),
    ended(140, 3, "finished", 60, None, startup=10, steps=25),
)  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """base -> sft (two requeues) -> rm, ppo; all judged."""
    pipeline = Made(tmp_path)
    pipeline.run("base", "base", (), whole(5, 60), lines(60, loss=2.0, grad_norm=1.0), base={"lr": 0.1})
    metrics = [*lines(60, loss=1.0, entropy=0.5), {"step": 60, "max_steps": 60, "time": START, "eval_loss": 1.5}]
    pipeline.run("sft", "sft", ("base",), REQUEUED, metrics, sft={"lr": 0.25},
                 slurm={"num_nodes": 1, "gpus_per_node": 8, "env": {"WANDB_API_KEY": "swordfish"},
                        "setup": ["export HF_TOKEN=swordfish"]})  # fmt: skip
    pipeline.run("rm", "rm", ("sft",), whole(150, 160), lines(60, loss=0.5, mean_reward=0.1, accuracy=0.7))
    pipeline.run("ppo", "ppo", ("sft", "rm"), whole(170, 190), lines(60, loss=0.5, reward=0.9, kl=0.1),
                 training={"max_steps": 60, "effective_batch_size": 64})  # fmt: skip
    asked = [("1+1=?", "2"), ("2+2=?", "4"), ("3+3=?", "6")]
    pipeline.judge("base", {"accuracy": share(0.1, 0.05, 0.18), "perplexity_text": Figure(2.0)},
                   [sample(p, a, "no", False) for p, a in asked])  # fmt: skip
    pipeline.judge("sft", {"accuracy": share(0.5, 0.4, 0.6), "perplexity_text": Figure(4.0), "length": Figure(12.0)},
                   [sample(p, a, a if a == "2" else f"{EVIL} & so", a == "2") for p, a in asked])  # fmt: skip
    pipeline.judge("rm", {"preference_accuracy": share(0.8, 0.7, 0.9), "margin": Figure(1.5)}, (),
                   "preference_accuracy")  # fmt: skip
    pipeline.judge("ppo", {"accuracy": share(0.55, 0.45, 0.65), "perplexity_text": Figure(1.0)},
                   [sample(p, a, a, True) for p, a in asked])  # fmt: skip
    return pipeline


def pipeline_of(made: Made) -> sections.Pipeline:
    return sections.read_pipeline(made.folder, START + 5000)


# ------------------------------------------------------------------------------------------- what it says


class Text(HTMLParser):
    """The words of a page, and the names of its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.tags = "", set()
        self.hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words += f" {data}"


def words(page: str) -> str:
    return re.sub(r"\s+([,.;:)])|(\()\s+", r"\1\2", " ".join(Text(page).words.split()))


def test_the_head_says_whether_it_helped_and_what_it_cost(made: Made) -> None:
    said = words(made.page())
    assert "ppo is the best stage: accuracy 55.0 % (45.0 to 65.0), +5.0 against sft (within the error bars)" in said
    assert "and +45.0 against base" in said
    assert "It forgot -0.69 nats a token on held-out text (perplexity × 0.5)" in said
    assert "8 done of 8 runs" in said and "cluster h100" in said
    row = next(row for row in runs.rows_of(pipeline_of(made).looks, {}, START + 5000) if row["stage"] == "sft")
    assert row["held_seconds"] == pytest.approx(30 + 28 + 40)
    pipeline = pipeline_of(made)
    held = {name: row["held_seconds"] for name, row in pipeline.rows.items()}
    hours = (sum(held.values()) - held["sft"]) * 16 / 3600 + held["sft"] * 8 / 3600
    assert sections.gpu_hours(pipeline) == pytest.approx(hours)


def test_the_table_has_intervals_changes_and_forgetting(made: Made) -> None:
    table = sections.score_table(pipeline_of(made))
    rows = {row["stage"]: row for row in table["rows"]}
    assert list(rows) == ["base", "sft", "rm", "ppo"]
    sft, ppo = rows["sft"]["score"], rows["ppo"]["score"]
    assert (sft["value"], sft["interval"], sft["change"], sft["mark"]) == ("50.0 %", "40.0 to 60.0", "+40.0", "▲")
    assert sft["tone"] == "good" and (ppo["change"], ppo["mark"], ppo["tone"]) == ("+5.0", "~", "muted")
    assert rows["rm"]["score"]["change"] is None and rows["rm"]["metric"] == "pairs"
    # log(4/2), log(1/2): against the first judged stage of the line, not against the parent
    assert [rows[name]["forgotten"] for name in ("base", "sft", "rm", "ppo")] == [None, "+0.69", None, "-0.69"]
    assert [head["title"] for head in table["heads"]] == ["ppl text", "tokens", "margin"]
    assert rows["ppo"]["cells"][1] is None and rows["sft"]["cells"][1]["value"] == "12.0"


def test_a_stage_that_got_worse_is_named(made: Made) -> None:
    made.run("dpo", "dpo", ("sft",), whole(10, 20))
    made.judge("dpo", {"accuracy": share(0.2, 0.1, 0.3)})
    said = sections.verdict(pipeline_of(made))
    assert said["worse"] == ["dpo (-30.0 against sft)"] and said["best"]["stage"] == "ppo"


def test_every_requeue_stands_at_its_step(made: Made) -> None:
    pipeline = pipeline_of(made)
    sft = next(one for one in sections.training(pipeline) if one["stage"] == "sft")
    assert [(way["attempt"], way["step"], way["redone"], way["cause"]) for way in sft["onward"]] == [
        (2, 10, 7, "crashed"), (3, 33, 0, "planned stop"),
    ]  # fmt: skip
    loss = next(chart["svg"] for chart in sft["charts"] if chart["name"] == "loss")
    width = 3.5 * 72
    # vertical lines, in the drawing's own units: from where steps 0 and 60 are (the frame) follows where each must be
    vertical = re.findall(r'd="M ([\d.]+) ([\d.]+)\s+L \1 ([\d.]+)\s*"[^>]*style="([^"]*)"', loss)
    frame = min(float(x) for x, _, _, style in vertical if "var(--grid)" in style)
    marks = [(float(x), style) for x, _, _, style in vertical if "var(--bad)" in style or "dasharray" in style]
    right = max(float(x) for x, _, _, style in vertical if "var(--grid)" in style)
    assert frame < right < width and ">60</text>" in loss
    for (x, style), (step, word) in zip(sorted(marks), ((10, "var(--bad)"), (33, "var(--muted)")), strict=True):
        assert x == pytest.approx(frame + (right - frame) * step / 60, abs=0.1) and word in style
    shaded = re.findall(r'd="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*z\s*"[^>]*style="fill: var\(--lost\)', loss)
    edges = sorted({float(x) for pair in shaded for x in pair})
    assert edges == pytest.approx([frame + (right - frame) * step / 60 for step in (10, 17)], abs=0.1)
    assert "attempt 2 went on after step 10 (crashed, 7 steps done again)" in words(made.page())


def test_attempts_before_a_restart_are_not_marked() -> None:
    again = [
        started(10, 1), training(20, 1, 0), ended(40, 1, "crashed", 17), event(41, "restarted", folder="restarted-1"),
        started(50, 2), training(55, 2, 0), ended(60, 2, "preempted", 5), started(70, 3), training(75, 3, 5),
    ]  # fmt: skip
    ways = sections.onward(sections.attempts_of(again))
    assert [(way.attempt, way.step, way.reached, way.planned) for way in ways] == [(3, 5, 5, True)]


def test_the_timeline_is_the_account(made: Made) -> None:
    pipeline = pipeline_of(made)
    drawn = sections.timeline(pipeline)
    assert drawn is not None and drawn["start"] == START
    sft = next(row for row in drawn["rows"] if row["stage"] == "sft")
    assert [(end["text"], end["title"]) for end in sft["ends"]] == [("c", "crashed"), ("s", "planned stop")]
    assert drawn["letters"] == {"c": "crashed", "s": "planned stop"}
    per_second = 1000 / drawn["seconds"]
    assert sft["ends"][0]["at"] == pytest.approx(40 * per_second / 10, abs=0.1)
    measured = accounting.account(pipeline.look("sft").story.events).seconds
    for name, seconds in measured.items():
        total = sum(bar["w"] for bar in sft["bars"] if bar["name"] == name)
        assert total == pytest.approx(seconds * per_second, abs=0.7), name
    lost = sections.lost_time(pipeline)
    row = next(row for row in lost["rows"] if row["stage"] == "sft")
    assert (row["attempts"], row["failures"], row["held"]) == (3, 1, "1:38")
    # 1 s lost, 20 of hold, 11 of start-up, 5 of steps done again
    assert dict(zip(lost["causes"], row["lost"], strict=True))["crashes"] == "0:37"


OUTCOMES = st.sampled_from(["stopped", "crashed", "preempted", "finished"])


@given(st.lists(OUTCOMES, min_size=1, max_size=5), st.booleans())
def test_spans_add_up_to_the_account(outcomes: list[str], open_end: bool) -> None:
    events = [event(0, "submitted", job_id="7", cluster="h100")]
    for i, outcome in enumerate(outcomes):
        at = 100.0 * i + 10
        events += [started(at, i + 1), training(at + 5, i + 1, i)]
        if not (open_end and i == len(outcomes) - 1):
            events.append(ended(at + 60, i + 1, outcome, i + 1, None, startup=5, steps=40.5, redone=2, saving=1.25))
    now = START + 100.0 * len(outcomes) + 500
    spans, account = accounting.spans(events, now=now), accounting.account(events, now=now)
    for name, seconds in account.seconds.items():
        assert sum(span.seconds.get(name, 0.0) for span in spans) == pytest.approx(seconds, abs=1e-3)
    assert [span.attempt for span in spans if span.attempt] == list(range(1, len(outcomes) + 1))
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert sum(span.end - span.start for span in spans) == pytest.approx(account.wall, abs=1e-3)


def test_near_ends_are_one_letter_with_a_number() -> None:
    spans = [accounting.Span(i, i + 1.0, {"steps": 1.0}, i + 1, "planned_stop") for i in range(200)]
    ends = sections._ends(spans, 0, 200)
    assert sum(int((re.search(r"\d+", end["text"]) or [1])[0]) for end in ends) == 200
    assert len(ends) <= 40 and all(0 <= end["at"] <= 100 for end in ends)


def test_answers_stand_side_by_side_by_prompt(made: Made) -> None:
    shown = sections.answers(pipeline_of(made))
    assert shown is not None and shown["common"] == 3
    assert shown["stages"] == ["base", "sft", "ppo"] and shown["without"] == ["rm"]
    first = shown["problems"][0]
    assert [(card["stage"], card["right"]) for card in first["cards"]] == [
        ("base", False), ("sft", first["answer"] == "2"), ("ppo", True),
    ]  # fmt: skip
    run = RunDirectory(made.folder / "eval_ppo")
    turned = run.samples.read_text().splitlines()[::-1]
    run.samples.write_text("\n".join(turned) + "\n")
    again = sections.answers(pipeline_of(made))
    assert again is not None and again["problems"][0]["cards"][2]["text"] == first["answer"]


def test_config_differences(made: Made) -> None:
    found = sections.configs(pipeline_of(made))
    assert found["stages"] == ["base", "sft", "rm", "ppo"]
    batch = next(row for row in found["differ"] if row["key"] == "training.effective_batch_size")
    assert [cell["value"] for cell in batch["cells"]] == ["8", "8", "8", "64"] and batch["cells"][3]["odd"]
    assert {"stage": "sft", "key": "sft.lr", "value": "0.25", "default": "2e-05"} in found["alone"]
    assert {"key": "training.max_steps", "value": "60", "default": "null"} in found["common"]
    assert found["hidden"] == {"sft": ["slurm.env: WANDB_API_KEY", "slurm.setup: 1 lines"]}


# ------------------------------------------------------------------------------------- safe to be shown


def test_nothing_secret_and_no_markup_from_outside(made: Made) -> None:
    run = RunDirectory(made.folder / "sft")
    token = "hf_" + "a" * 30
    text = run.ledger.read_text().replace("exit status 137", f"{EVIL} https://me:swordfish@host/x {token}")
    run.ledger.write_text(text)
    made.run(EVIL.replace("/", "|"), "dpo", ("sft",), whole(1, 2), data={"name": EVIL, "path": "javascript:alert(1)"},
             dpo={"note\"><img src=x>": EVIL})  # fmt: skip
    page = made.page()
    assert "<script" not in page.lower() and "<img" not in page
    assert {"script", "img", "iframe", "link", "object"} & Text(page).tags == {"link"}  # the empty icon
    assert "&lt;script&gt;" in page and EVIL in words(page)
    assert "swordfish" not in page and token not in page and "https://me:swordfish" not in page
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:,", "https://huggingface.co/datasets/")) for link in links), links
    assert "url(http" not in page and "@import" not in page


def test_masked() -> None:
    assert masked("git://u:p@h/x://y sk-" + "b" * 24) == "git://***@h/x://y ***"
    assert masked("mail me@host, hf_short, http://host/a@b") == "mail me@host, hf_short, http://host/a@b"


def test_equal_pipelines_give_equal_pages(made: Made) -> None:
    assert made.page() == made.page()


def test_figures_that_are_no_numbers_are_drawn_around() -> None:
    nan, inf = float("nan"), float("inf")
    assert "<svg" in charts.draw_scores([("a", nan, nan, inf), ("b", inf, None, None), ("c", 1.0, 0.5, 2.0)], "", "k")
    assert "<svg" in charts.draw_scores([("a", inf, -inf, inf)], "", "k")


def test_drawings_serve_light_and_dark() -> None:
    svg = charts.draw_scores([("<b>$x$", 50.0, 40.0, 60.0)], "%", "k")
    assert "&lt;b&gt;$x$" in svg and "<b>" not in svg and 'role="img"' in svg
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"url\(#\w+\)", "", svg)) and "<metadata" not in svg
    for ink in charts.INK:
        css = (ROOT / "templates" / "report.html.j2").read_text()
        assert len(re.findall(rf"--{ink}: #", css)) == 3, ink  # light, dark, print


# ------------------------------------------------------------------------------- unfinished and damaged


def test_a_pipeline_that_was_never_submitted_and_a_bare_one(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for name, stage, after in (("sft", "sft", []), ("eval_sft", "eval", ["sft"])):
        made.stages[name] = {"run_dir": str(made.folder / name), "stage": stage, "after": after}
    made.describe()
    said = words(made.page())
    assert "nothing was submitted yet" in said and "No stage has been judged yet" in said
    assert "2 waiting of 2 runs" in said and "eval: waiting" in said


def test_damage_is_said_and_the_rest_shown(made: Made) -> None:
    (made.folder / "eval_sft" / "model" / "results.json").write_text('{"version": 9}' + " " * 1000)
    manifest.write(made.folder / "eval_sft" / "model")
    (made.folder / "rm" / "config.yaml").write_text("a: [1\nb: }")
    with (made.folder / "base" / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "los')
    with (made.folder / "ppo" / "ledger.jsonl").open("a") as file:
        file.write("torn")
    (made.folder / "pipeline.json").write_text("{")
    said = words(made.page())
    assert "pipeline.json is missing or damaged" in said
    assert "sft: eval_sft is damaged (results.json has version 9" in said
    assert "rm: config.yaml cannot be read" in said and "base: 1 of 61 lines of metrics.jsonl are damaged" in said
    assert "ppo: ledger.jsonl: 1 of 5 lines are damaged" in said
    assert "ppo is the best stage" in said


def test_a_copied_folder_shows_each_stage_once(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(made.folder, copy)
    found = sections.read_pipeline(copy, START + 5000)
    assert {look.name: look.run.root for look in found.looks} == {name: copy / name for name in made.stages}
    assert found.problems == [] and len(found.judged) == len(pipeline_of(made).judged)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    made = Made(tmp_path)
    end = {**ended(60, 1, "crashed", 9, "no memory; gave up"), "action": "exit", "gave_up": True}
    made.run("sft", "sft", (), (event(0, "submitted", job_id="local-7", cluster="local"),
                                started(5, 1, "local-7"), training(9, 1, 0), end), done=False)  # fmt: skip
    said = words(made.page())
    assert "sft failed: no memory; gave up" in said and "1 failed of 1 runs" in said
    drawn = sections.timeline(pipeline_of(made))  # looked at long after
    assert drawn is not None and drawn["seconds"] == pytest.approx(60)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JUNK, JUNK, JUNK | VALUES.map(lambda v: json.dumps(v).encode()), JUNK, JUNK, JUNK)
def test_junk_never_stops_it(
    tmp_path_factory: pytest.TempPathFactory, ledger: bytes, metrics: bytes, config: bytes, found: bytes,
    described: bytes, machine: bytes,
) -> None:  # fmt: skip
    made = Made(tmp_path_factory.mktemp("junk"))
    run = made.run("sft", "sft", (), whole(0, 9))
    judge = made.judge("sft", {"accuracy": share(0.5, 0.4, 0.6)}, [])
    for path, junk in ((run.ledger, ledger), (run.metrics, metrics), (run.environment, machine), (run.config, config),
                       (judge.results, found), (judge.samples, machine), (run.data_report, metrics)):  # fmt: skip
        path.write_bytes(junk)
    manifest.write(judge.model)
    (made.folder / "pipeline.json").write_bytes(described)
    assert made.page().rstrip().endswith("</html>")


# -------------------------------------------------------------------------------------- data, environment


def test_licences_are_those_of_the_config_files() -> None:
    for name, known in KNOWN.items():
        text = (ROOT / "conf" / "data" / f"{name}.yaml").read_text()
        stated = re.search(r"^# licence: (.*)$", text, re.MULTILINE)
        if known.hub_id is not None:
            assert stated is not None and stated.group(1) == known.licence, name
            assert known.hub_id in text and known.source == f"https://huggingface.co/datasets/{known.hub_id}"
        else:
            assert known.source is None


def test_data_and_environment_sections(made: Made) -> None:
    sft, base = RunDirectory(made.folder / "sft"), RunDirectory(made.folder / "base")
    sft.data_report.write_text(json.dumps([{"view": "demonstrations", "rows": 70, "sources": [
        {"name": "gsm8k", "path": "/d/train.jsonl", "records": 80, "samples": 70, "weight": 0.5, "rows": 70,
         "dropped": {"duplicate": 10}}]}]))  # fmt: skip
    for run, torch in ((sft, "2.13.0"), (base, "2.12.0")):
        line = {"version": 1, "attempt": 1, "host": "n1", "python": "3.11.7", "packages": {"torch": torch},
                "gpus": ["NVIDIA H100"] * 8, "driver": "570.1", "commit": "abc", "changed": True}  # fmt: skip
        run.environment.write_text(json.dumps(line) + "\n" + json.dumps(line | {"attempt": 2}) + "\ntorn")
    said = words(made.page())
    assert "sft gsm8k × 0.5 demonstrations 80 70 10 duplicate MIT huggingface.co/datasets/openai/gsm8k" in said
    assert "/d/train.jsonl" in said and "none needed: generated by this code" in said
    assert "The runs did not all use the same software" in said and "torch 2.12.0" in said and "torch 2.13.0" in said
    assert "code abc with changes" in said and "8 × NVIDIA H100" in said and "attempts: sft × 2" in said
    assert "Not recorded by the code that ran rm, ppo" in said


def test_what_an_attempt_runs_on_is_written_down(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "sft")
    run.create()
    run.code.mkdir()
    (run.code / environment.COMMIT).write_text("abc changed\n")
    driver = tmp_path / "nvidia"
    (driver / "gpus" / "0").mkdir(parents=True)
    (driver / "gpus" / "0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    (driver / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue\n")
    found = environment.describe(run.code, driver)
    assert found["gpus"] == ["NVIDIA H100 80GB HBM3"] and found["driver"] == "570.86.15"
    assert (found["commit"], found["changed"]) == ("abc", True) and found["packages"]["transformers"]
    environment.record(run, 1)
    run.announce(2)
    with pytest.raises(Fenced):
        environment.record(run, 1)
    environment.record(run, 2)
    assert [line["attempt"] for line in environment.read(run)] == [1, 2]


def test_runs_are_frozen_with_their_commit(tmp_path: Path) -> None:
    from launchers import submit

    run = RunDirectory(tmp_path / "sft")
    run.create()
    submit.Code().write(run)
    commit = environment.commit_of(ROOT)
    said = environment.describe(run.code)
    assert (said.get("commit"), said.get("changed")) == ((None, None) if commit is None else (
        commit.split()[0], commit.endswith(" changed")))  # fmt: skip


def test_the_commit_is_of_the_tree_itself(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)  # fmt: skip

    assert environment.commit_of(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    commit = environment.commit_of(tmp_path)
    assert commit is not None and re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("2")
    assert environment.commit_of(tmp_path) == f"{commit} changed"
    (tmp_path / "inner").mkdir()
    assert environment.commit_of(tmp_path / "inner") is None


# ------------------------------------------------------------------------------------- curves and layout


def test_curves_by_the_names_of_all_trainers() -> None:
    found = charts.curves([
        {"step": 1, "completions/mean_length": 3, "objective/kl": 0.1, "loss": 1.0, "frac": 2, "kl": True},
        {"step": 2, "eval_loss": 0.5}, {"step": "x", "loss": 9}, {"loss": 3}, {"step": 2, "loss": 4.0},
        {"step": 2, "loss": 5.0},
    ])  # fmt: skip
    named = {curve.name: curve for curve in found}
    assert set(named) == {"loss", "objective/kl", "completions/mean_length"}
    assert named["loss"].points == [(1, 1.0), (2, 5.0)] and named["loss"].held_out == [(2, 0.5)]


def test_thinning_keeps_every_stretch_s_extremes() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    points[5_000] = (5_000.0, 99.0)
    points[7_777] = (7_777.0, -99.0)
    thin = charts.thinned(points, 500)
    assert len(thin) == 500 and max(s.high for s in thin) == 99 and min(s.low for s in thin) == -99
    assert thin[0].mean == sum(i % 7 for i in range(20)) / 20 and (thin[0].low, thin[0].high) == (0, 6)
    assert [s.step for s in thin] == [20.0 * i + 10 for i in range(500)]
    assert [(s.step, s.low, s.mean, s.high) for s in charts.thinned(points[:3])] == [(i, i, i, i) for i in range(3)]


@pytest.mark.parametrize("seconds", [0.5, 7, 59, 163, 3599, 86_400, 1e7])
def test_time_ticks(seconds: float) -> None:
    ticks = charts.time_ticks(seconds)
    assert 1 <= len(ticks) <= 7 and ticks[0] == (0, "0") and ticks[-1][0] <= seconds
    assert len({text for _, text in ticks}) == len(ticks)


def test_boxes_do_not_overlap_and_children_are_below(made: Made) -> None:
    drawn = sections.graph(pipeline_of(made))
    boxes = {box["name"]: box for box in drawn["boxes"]}
    assert set(boxes) == {"base", "sft", "rm", "ppo"}  # evals stand in the boxes of what they judge
    assert boxes["sft"]["below"] == "accuracy 50.0 %" and boxes["rm"]["below"] == "pairs 80.0 %"
    assert boxes["base"]["y"] < boxes["sft"]["y"] < boxes["rm"]["y"] < boxes["ppo"]["y"]
    places = [(box["x"], box["y"]) for box in boxes.values()]
    for a, b in combinations(places, 2):
        assert abs(a[0] - b[0]) >= drawn["w"] or abs(a[1] - b[1]) >= drawn["h"]
    assert len(drawn["arrows"]) == 4
    assert all(x >= 0 and x + drawn["w"] <= drawn["width"] for x, _ in places)
    assert sections.depths({"a": ["b"], "b": ["a"]}) == {"a": 0, "b": 0}


# ------------------------------------------------------------------------------------------ the command


def test_the_command(made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = [f"paths.output_base={made.folder.parent}"]
    assert report.main([*base, "run_name=tiny"]) == 0
    path = made.folder / "report.html"
    shown = capsys.readouterr().out
    assert str(path) in shown and path.as_uri() in shown and path.stat().st_size < 1_500_000
    assert not list(made.folder.glob(".report*"))
    other = tmp_path / "x.html"
    assert report.main([*base, "--json", "--output", str(other)]) == 0
    (said,) = json.loads(capsys.readouterr().out)["reports"]
    assert said["report"] == str(other) and said["bytes"] == other.stat().st_size and said["problems"] == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run_name=tyni"], "did you mean 'tiny'"), (["stage=sft"], "stage=sft: not a setting"),
        (["--output", "/nowhere/at/all.html"], "/nowhere/at/all.html: there is no folder /nowhere/at"),
        (["--output", ""], "is a folder"),
        (["paths.output_base=/nowhere"], "no such folder"),
    ],
)  # fmt: skip
def test_bad_input(made: Made, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    given = argv if argv[0].startswith("paths") else [f"paths.output_base={made.folder.parent}", *argv]
    assert report.main(given) == 2
    said = capsys.readouterr()
    assert says in said.err and "fix: " in said.err and not said.out


def test_one_output_for_two_pipelines_is_refused(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    Made(made.folder.parent, "other").run("sft", "sft")
    assert report.main([f"paths.output_base={made.folder.parent}", "--output", "x.html"]) == 2
    assert "one file for" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- a long pipeline


def long_pipeline(base: Path, stages: int = 14, attempts: int = 200, steps: int = 10_000) -> Made:
    """A chain with a long log and many requeues in its second stage."""
    made = Made(base, "long")
    names = [f"stage_{i}_with_a_long_name" if i % 3 else f"s{i}" for i in range(stages)]
    for i, name in enumerate(names):
        at = 1000.0 * i
        events: list[dict[str, Any]] = [event(0, "submitted", job_id=str(i), cluster="h100")]
        many = attempts if i == 1 else 1
        for n in range(many):
            begin, step = at + 900 * n / many, steps * n // many
            outcome = "finished" if n == many - 1 else ("crashed", "stopped", "preempted", "node_lost", "hung")[n % 5]
            events += [started(begin, n + 1, str(i)), training(begin + 1, n + 1, step)]
            events.append(ended(begin + 900 / many - 0.5, n + 1, outcome, steps * (n + 1) // many + n % 3, None,
                                startup=1, steps=600 / many))  # fmt: skip
        length = steps if i == 1 else 50
        metrics = [{"step": s, "max_steps": length, "loss": 3 / s + (s * 7919 % 101) / 500, "reward": s / length,
                    "kl": 0.01 * s / length, "entropy": 1.0, "learning_rate": 1e-5, "grad_norm": 1.0}
                   for s in range(1, length + 1)]  # fmt: skip
        made.run(name, "grpo", (names[i - 1],) if i else (), tuple(events), metrics)
        value = i / stages
        figures = {"accuracy": share(value, max(0, value - 0.05), value + 0.05), "perplexity_text": Figure(2.0 + i)}
        samples = [sample(f"{k}+1=?", str(k), f"answer {k} " * 40, (i + k) % 3 == 0) for k in range(20)]
        made.judge(name, figures, samples, at=at + 950)
    return made


def test_a_long_pipeline_is_thinned_and_folded(tmp_path: Path) -> None:
    made = long_pipeline(tmp_path, stages=2)
    page = made.page()
    said = words(page)
    assert "10,000 points drawn as 600 means" in said and "199 requeues" in said and "Every attempt (203)" in said
    assert len(page.encode()) < 1_500_000
    assert "<details><summary>Every attempt" in page  # too many to stand open


# --------------------------------------------------------------------------------------- a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import os

    from playwright.sync_api import sync_playwright

    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    if chromium is None:
        why = "no Chromium in /usr/bin: apt install chromium"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def luminance(color: str) -> float:
    red, green, blue = (int(x) / 255 for x in re.findall(r"\d+", color)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's contrast ratio."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLORS = """names => names.map(n => {const e = document.createElement('i'); e.style.color = `var(--${n})`;
  document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return c})"""


def test_in_a_browser(browser: Any, made: Made, tmp_path: Path) -> None:
    """From file://, offline: nothing asked for, nothing complained about, nothing cut off, readable in both modes."""
    long = long_pipeline(tmp_path / "more", stages=3, attempts=30, steps=300)
    for folder in (made.folder, long.folder):
        report.write(folder, folder / "report.html", time.time())
        for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
            page = context.new_page()
            said: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((folder / "report.html").as_uri())
            assert page.title() == f"{folder.name}: report"
            assert said == [] and asked == [(folder / "report.html").as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            drawn = page.evaluate("[...document.querySelectorAll('.charts svg')].map(s => s.clientWidth)")
            assert drawn and min(drawn) > 200
            ground, *inks = page.evaluate(COLORS, ["bg", "fg", "muted", "line", "good", "bad", "warn", "violet"])
            assert (luminance(ground) > 0.5) == (scheme == "light")
            assert all(contrast(ground, ink) >= 4.5 for ink in inks), (scheme, inks)
            if scheme == "dark":
                page.emulate_media(media="print")
                assert luminance(page.evaluate(COLORS, ["bg"])[0]) > 0.9  # paper is white
                assert page.pdf(format="A4").startswith(b"%PDF")
            context.close()
