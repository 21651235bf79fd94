"""Gates: what is decided, which stages wait for them, what is refused, and what follows in the job and on the login
node. Whole chains that a gate stops are in test_submit.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf.check import ConfigError
from conf.schema import Gate, Node
from launchers import graph, runs, slurm
from launchers.compose import rewrite
from launchers.errors import LaunchError
from launchers.selection import Selection, select
from launchers.submission import Found, Plan, _check_same_gate, identity, make_plan
from launchers.submit import Code, Undo, write
from post_training.run import gate, ledger, life, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise
from post_training.run.results import Figure, Results


def found(value: float | None, name: str = "accuracy", headline: str | None = "accuracy") -> Results:
    figures = {} if value is None else {name: Figure(value, value - 0.05, value + 0.05)}
    return Results(headline, {**figures, "length": Figure(12.0)})


PARENT = {"name": "eval_sft", "run_dir": "/o/p/eval_sft"}


@pytest.mark.parametrize(
    ("held", "ours", "parent", "why"),
    [
        ({"metric": "accuracy", "at_least": 0.3}, found(0.3), None, None),
        ({"metric": "accuracy", "at_least": 0.3}, found(0.213), None,
         "accuracy 0.213 (0.16 to 0.26) is below at_least 0.3"),
        # the value counts, not the interval; and where both look alike, all digits are shown
        ({"metric": "accuracy", "at_least": 0.3}, found(0.2999999), None,
         "accuracy 0.2999999 (0.25 to 0.35) is below at_least 0.3"),
        ({"metric": "accuracy", "at_least": 0.0}, found(0.0), None, None),
        ({"metric": "length", "at_most": 12}, found(0.5), None, None),
        ({"metric": "length", "at_most": 11.5}, found(0.5), None, "length 12 is above at_most 11.5"),
        # without a metric: the headline
        ({"metric": None, "at_least": 0.3}, found(0.2), None, "accuracy 0.2 (0.15 to 0.25) is below at_least 0.3"),
        ({"metric": None, "at_least": 0.3}, found(0.2, headline=None), None,
         "the evaluation has no headline figure, and the gate names none"),
        ({"metric": "accuracy", "at_least": 0.3}, found(None), None,
         "the evaluation found no accuracy (it found: length)"),
        ({"metric": "accuracy", "at_least": 0.3}, Results(), None,
         "the evaluation found no accuracy (it found nothing)"),
        # compared with the parent's
        ({"metric": "accuracy", "max_drop": 0.1}, found(0.7), found(0.8), None),  # 0.8 - 0.7 > 0.1 in binary
        ({"metric": "accuracy", "max_drop": 0.0}, found(0.8), found(0.7), None),
        ({"metric": "accuracy", "max_drop": 0.05, "parent": PARENT}, found(0.5), found(0.75),
         "accuracy 0.5 (0.45 to 0.55) is worse than eval_sft's 0.75 (0.7 to 0.8) by 0.25, more than max_drop 0.05"),
        # lower is better
        ({"metric": "perplexity_text", "max_drop": 1.0}, found(14.0, "perplexity_text"), found(12.5, "perplexity_text"),
         "perplexity_text 14 (14 to 14) is worse than the parent's evaluation's 12.5 (12 to 13) by 1.5, "
         "more than max_drop 1"),
        ({"metric": "perplexity_text", "max_drop": 1.0}, found(2.0, "perplexity_text"), found(12.5, "perplexity_text"),
         None),
        ({"metric": "accuracy", "max_drop": 0.1, "parent": PARENT}, found(0.7), found(None),
         "eval_sft found no accuracy to compare with (it found: length)"),
        ({"metric": "accuracy", "max_drop": 0.1, "parent": PARENT}, found(0.7), None,
         "eval_sft found no accuracy to compare with"),
        ({"metric": "length", "max_drop": 0.1}, found(0.7), found(0.7),
         "of length neither more nor less is better, so it cannot drop"),
    ],
)  # fmt: skip
def test_decisions(held: dict[str, Any], ours: Results, parent: Results | None, why: str | None) -> None:
    assert gate.decide(held, ours, parent) == why


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_bounds_hold_on_one_side_and_a_drop_is_measured_from_the_parent(value: float, bound: float, was: float) -> None:
    low = gate.decide({"metric": "accuracy", "at_least": bound}, found(value))
    high = gate.decide({"metric": "accuracy", "at_most": bound}, found(value))
    assert (low is None) == (value >= bound) and (high is None) == (value <= bound)
    better = gate.decide({"metric": "accuracy", "max_drop": bound}, found(value), found(was))
    ours, theirs = found(value, "repetition"), found(was, "repetition")
    lower = gate.decide({"metric": "repetition", "max_drop": bound}, ours, theirs)
    assert (better is None) == (was - value <= bound + gate.ROUNDING)
    assert (lower is None) == (value - was <= bound + gate.ROUNDING)


# ------------------------------------------------------------------------------------------- the graph


def node(stage: str, model: str | None = None, **more: Any) -> Node:
    return Node(stage=stage, model=model, **more)


STAGES = {
    "base": node("base"),
    "sft": node("sft", "base"),
    "rm": node("rm", "sft"),
    "ppo": node("ppo", "sft", reference="sft", reward_model="rm"),
    "sample": node("sample", "sft"),
    "best": node("sft", "sft", data="sample"),
    "eval_base": node("eval", "base"),
    "eval_sft": node("eval", "sft"),
    "eval_rm": node("eval", "rm"),
    "eval_ppo": node("eval", "ppo"),
    "eval_best": node("eval", "best"),
}


def test_what_takes_the_judged_model_comes_after_a_gated_eval() -> None:
    assert {name: n.after for name, n in graph.with_gates(STAGES).items() if n.after} == {}
    gated = {
        **STAGES,
        "eval_sft": node("eval", "sft", gate=Gate("accuracy", at_least=0.3)),
        "eval_rm": node("eval", "rm", gate=Gate(at_least=0.6)),
        "eval_ppo": node("eval", "ppo", gate=Gate("accuracy", max_drop=0.05)),
        "eval_best": node("eval", "best", gate=Gate("accuracy", max_drop=0.0, parent="eval_ppo")),
    }
    graph.check(gated)
    after = {name: n.after for name, n in graph.with_gates(gated).items() if n.after}
    assert after == {
        "rm": ["eval_sft"], "ppo": ["eval_sft", "eval_rm"], "sample": ["eval_sft"], "best": ["eval_sft"],
        "eval_ppo": ["eval_sft"],  # compared with the judge of sft, from which ppo started
        "eval_best": ["eval_ppo"],
    }  # fmt: skip
    again = graph.with_gates(graph.with_gates(gated))
    assert {name: n.after for name, n in again.items() if n.after} == after
    assert again["eval_ppo"].gate == Gate("accuracy", max_drop=0.05, parent="eval_sft")
    # a pretrained model takes the place of base: its judge's gate still comes first
    first = {**STAGES, "eval_base": node("eval", "base", gate=Gate(at_least=0.1))}
    kept, _ = graph.without_base(graph.with_gates(first))
    assert kept["sft"].after == ["eval_base"] and kept["eval_base"].gate == Gate(at_least=0.1)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["eval_sft.gate.metric=acuracy", "eval_sft.gate.at_least=0.3"],
         ["eval_sft.gate.metric=acuracy", "did you mean 'accuracy'?"]),
        (["eval_sft.gate.metric=zzz", "eval_sft.gate.at_least=0.3"], ["valid: ", "<task>/<metric>", "pass@K", "judge"]),
        (["eval_sft.gate.metric=pass@0", "eval_sft.gate.at_least=0.3"], ["no figure of an evaluation"]),
        (["eval_sft.gate.metric=accuracy"], ["has no bound", "eval_sft.gate.at_least=0.3"]),
        (["eval_sft.gate={at_least: 0.1, at_most: 0.3}"], ["has 2 bounds", "fix: eval_sft.gate.at_most=null"]),
        (["eval_sft.gate={metric: accuracy, at_least: 30}"], ["share from 0 to 1", "eval_sft.gate.at_least=0.3"]),
        (["eval_sft.gate={at_least: x}"], ["eval_sft.gate.at_least", "Float"]),
        (["eval_sft.gate.max_drop=-0.1"], ["at least 0"]),
        (["eval_sft.gate={metric: length, max_drop: 1}"], ["neither more nor less is better"]),
        (["eval_base.gate.max_drop=0.1"], ["base started from no stage", "eval_base.gate.at_least"]),
        (["~pipeline.stages.eval_base", "eval_sft.gate.max_drop=0.1"],
         ["no eval stage judges base", "add eval_base: {stage: eval, model: base}"]),
        (["pipeline.stages.eval_base.model=sft", "eval_ppo.gate.max_drop=0.1"],
         ["eval_base and eval_sft judge sft", "eval_ppo.gate.parent=eval_base"]),
        (["eval_ppo.gate={max_drop: 0.1, parent: sft}"], ["no other eval stage", "did you mean 'eval_sft'?"]),
        (["eval_ppo.gate={at_least: 0.1, parent: eval_sft}"], ["what max_drop compares with", "gate.parent=null"]),
        (["eval_ppo.gate.max_drop=0.1", "eval_ppo.data.seed=3"], ["other data: data.seed=0, here 3"]),
        (["eval_sft.gate={metric: gsm8k/exact_match, at_least: 0.1}"],
         ["eval_sft.eval.tasks=[]: without it eval_sft finds no gsm8k/", "fix: eval_sft.eval.tasks=[gsm8k]"]),
        (["eval_sft.gate={metric: pass@16, at_least: 0.1}", "eval.num_samples=8"],
         ["eval_sft.eval.num_samples=8: without it eval_sft finds no pass@16", "eval_sft.eval.num_samples=16"]),
        (["eval_sft.gate={metric: pass@6, at_least: 0.1}", "eval.num_samples=8"], ["eval_sft.gate.metric=pass@4"]),
        (["eval_sft.gate={metric: majority, at_least: 0.1}"], ["eval_sft.eval.num_samples=0"]),
        (["eval_sft.gate={metric: instructions, at_least: 0.1}"], ["eval_sft.eval.num_instructions=0"]),
        (["eval_ppo.gate={metric: judge, max_drop: 0.1}", "eval_ppo.eval.judge.base_url=http://localhost:1/v1",
          "eval_ppo.eval.judge.model=m"],
         ["eval_sft.eval.judge.base_url=null: without it eval_sft finds no judge, the metric of eval_ppo.gate"]),
        (["eval_sft.gate={metric: judge_win_rate, at_least: 0.5}", "eval.judge.base_url=http://localhost:1/v1",
          "eval.judge.model=m"], ["eval_sft.eval.judge.reference"]),
        (["sft.gate.at_least=0.1"], ["a gate belongs to an eval stage", "fix: eval_sft.gate={at_least: 0.1}"]),
        (["eval_rm.gate={metric: accuracy, at_least: 0.1}"], ["rm, which is a reward model", "preference_accuracy"]),
        (["eval_sft.gate={metric: margin, at_least: 0.1}"], ["sft, which is no reward model"]),
        (["eval_sfd.gate.at_least=0.1"], ["eval_sfd.gate.at_least=0.1", "has no stage eval_sfd", "eval_sft"]),
        (["eval_sft.gate.at_leest=0.1"], ["no such key", "did you mean", "at_least"]),
        (["eval_sft.gate.at_least=0.1", "pipeline.stages.eval_sft.after=[ppo]"], ["cycle"]),
    ],
)  # fmt: skip
def test_what_is_refused_at_submission(tokens: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        select(["cluster=local", "pipeline=rlhf", *map(rewrite, tokens)], only_one=False)
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------- in the job


def make_eval(root: Path, held: dict[str, Any] | None, accuracy: float) -> RunDirectory:
    """An eval's run directory, its output whole."""
    run = RunDirectory(root)
    run.create()
    config = {"stage": "eval", "name": root.name, "inputs": {}, "slurm": {"max_failures": 3}}
    run.config.write_text(yaml.safe_dump(config | ({} if held is None else {"gate": held})))
    run.model.mkdir(exist_ok=True)
    results.write(run.model, found(accuracy))
    manifest.write(run.model)
    return run


def test_a_closed_gate_ends_the_job_with_an_error_whenever_it_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"metric": "accuracy", "at_least": 0.3, "at_most": None, "max_drop": None, "parent": None}
    run = make_eval(tmp_path / "eval_sft", held, 0.2)
    (run.model / manifest.NAME).rename(run.root / "manifest")
    assert life.begin(run, "7", ["n1"]).attempt == 1
    (run.root / "manifest").rename(run.model / manifest.NAME)
    ending = life.end(run, 1, 0, None)
    why = "gate: accuracy 0.2 (0.15 to 0.25) is below at_least 0.3"
    assert ending == life.Ending("finished", "exit", life.GATED, why)
    history = summarise(ledger.read(run.ledger))
    assert (history.failures, history.gave_up, history.reason) == (0, False, why)
    assert manifest.problem(run.model) is None
    # SLURM requeues a job that ended within its preemption grace: it must not let its dependents start then
    assert life.main(["begin", str(run.root), "--job-id", "7", "--nodes", "n1"]) == life.GATED
    assert why in capsys.readouterr().err
    assert life.GATED not in (life.STOPPED, life.HUNG, life.OUT_OF_MEMORY, life.REQUEUE, life.DONE, life.BUSY)
    # also where its script was killed behind its output
    assert life.begin(run, "7", ["n1"]) == life.Begun(code=life.GATED, says=why)
    for changed in ({**held, "at_least": 0.2}, None):
        run = make_eval(run.root, changed, 0.2)
        assert life.begin(run, "7", ["n1"]) == life.Begun(code=life.DONE)


def test_what_waits_on_slurm_behind_a_closed_gate_is_told_why(tmp_path: Path) -> None:
    run = make_eval(tmp_path / "eval_sft", {"metric": "accuracy", "at_least": 0.3}, 0.2)
    config = run.read_config() | {"cluster": {"scheduler": "slurm"}}
    run.config.write_text(yaml.safe_dump(config))
    waiting = RunDirectory(tmp_path / "ppo")
    waiting.create()
    ledger.append(waiting.ledger, "submitted", job_id="8", cluster="h100")
    stages = {"eval_sft": {"run_dir": str(run.root)}, "ppo": {"run_dir": str(waiting.root), "after": ["eval_sft"]}}
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    for _ in range(2):  # said once
        assert life.begin(run, "7", ["n1"]).code == life.GATED
        assert [event.get("reason") for event in ledger.read(waiting.ledger)][1:] == [
            "gate of eval_sft: accuracy 0.2 (0.15 to 0.25) is below at_least 0.3"
        ]


def test_results_that_are_missing_or_damaged_hold_no_gate(tmp_path: Path) -> None:
    parent = make_eval(tmp_path / "eval_sft", None, 0.8)
    held = {"metric": "accuracy", "max_drop": 0.1, "parent": {"name": "eval_sft", "run_dir": str(parent.root)}}
    run = make_eval(tmp_path / "eval_ppo", held, 0.7)
    assert gate.failure(run, held) is None and gate.failure(run, None) is None
    parent.results.write_text('{"version": 9}')
    assert f"{parent.results} cannot be read: results.json has version 9" in str(gate.failure(run, held))
    parent.results.unlink()
    assert gate.failure(run, held) == f"there is no {parent.results}"
    assert gate.failure(run, {"metric": "accuracy", "at_least": "x"}) is not None
    run.results.unlink()
    assert gate.failure(run, held) == f"there is no {run.results}"


# ---------------------------------------------------------------------------------- on the login node


class Folder:
    """Pipelines that are planned in this process, and whose runs are done by hand."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def select(self, *tokens: str, stage: str | None = None) -> Selection:
        chosen = ["cluster=local", "pipeline=dpo", f"paths.output_base={self.base}", *map(rewrite, tokens)]
        return select([*chosen, *([f"stage={stage}"] if stage else [])], only_one=stage is not None)

    def plan(self, *tokens: str, stage: str | None = None) -> Plan:
        return make_plan(self.select(*tokens, stage=stage), ask=False)

    def done(self, plan: Plan, **accuracies: float) -> None:
        """Write the plan's runs, and finish some of them; an eval's accuracy where its name is given with one."""
        write(plan, Undo(), Code())
        for name in ("base", "sft", *accuracies):
            run = plan.stages[name].run
            run.model.mkdir(exist_ok=True)
            if name in accuracies:
                results.write(run.model, found(accuracies[name]))
            manifest.write(run.model, identity=plan.stages[name].frozen["identity"])

    def rows(self) -> dict[str, tuple[str, str | None]]:
        return {row["stage"]: (row["state"], row["reason"]) for row in runs.collect(self.base, ["dpo"])}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "outputs")


def decisions(plan: Plan) -> dict[str, str]:
    return {name: planned.decision for name, planned in plan.stages.items()}


def test_a_gate_is_no_part_of_what_a_run_is(folder: Folder) -> None:
    plain, gated = folder.plan(), folder.plan("eval_sft.gate.at_least=0.3", "eval_dpo.gate.max_drop=0.1")
    for name, planned in plain.stages.items():
        assert "gate" not in planned.frozen and "gate" not in plain.description()["stages"][name]
        other = gated.stages[name].frozen
        assert planned.frozen["identity"] == other["identity"] == identity(other)
    frozen = gated.stages["eval_dpo"].frozen["gate"]
    assert frozen == gated.description()["stages"]["eval_dpo"]["gate"] == {
        "metric": None, "at_least": None, "at_most": None, "max_drop": 0.1,
        "parent": {"name": "eval_sft", "run_dir": str(folder.base / "dpo" / "eval_sft")},
    }  # fmt: skip
    assert gated.stages["dpo"].after == ["sft", "eval_sft"] and plain.stages["dpo"].after == ["sft"]


def test_a_closed_gate_holds_back_what_is_not_done_and_nothing_else(folder: Folder) -> None:
    folder.done(folder.plan("eval_sft.gate.at_least=0.3"), eval_sft=0.2)
    closed = folder.plan("eval_sft.gate.at_least=0.3")
    assert decisions(closed) == {
        "base": "done", "sft": "done", "eval_base": "again", "eval_sft": "done",
        "dpo": "held", "grpo": "held", "eval_dpo": "held", "eval_grpo": "held",
    }  # fmt: skip
    assert {planned.held_by for planned in closed.stages.values()} == {None, "eval_sft"}
    why = "accuracy 0.2 (0.15 to 0.25) is below at_least 0.3"
    assert closed.stages["eval_sft"].gate_problem == why
    rows = folder.rows()
    assert rows["eval_sft"] == ("gated", f"gate: {why}") and rows["sft"] == ("done", None)
    assert rows["grpo"] == ("waiting", f"gate of eval_sft: {why}") and rows["eval_base"][1] == "not submitted yet"
    with pytest.raises(ConfigError, match="comes after eval_sft, whose gate does not hold: accuracy") as caught:
        folder.plan("eval_sft.gate.at_least=0.3", stage="dpo")
    assert "fix: another bound, as in eval_sft.gate.at_least=" in str(caught.value)

    # one stage with another bound: what status says of the gate follows
    alone = folder.plan("eval_sft.gate.at_least=0.1", stage="dpo")
    assert decisions(alone) == {"dpo": "again"}
    write(alone, Undo(), Code())
    assert folder.rows()["eval_sft"] == ("done", None) and folder.rows()["grpo"] == ("waiting", "not submitted yet")
    for tokens in (["eval_sft.gate.at_least=0.2"], ["eval_sft.gate=null"], []):
        opened = folder.plan(*tokens)
        assert "held" not in decisions(opened).values() and opened.stages["eval_sft"].decision == "done"


def test_another_pipelines_evaluation_is_judged_by_this_ones_gate(folder: Folder) -> None:
    folder.done(folder.plan("run_name=first"), eval_sft=0.2)
    closed = folder.plan("eval_sft.gate.at_least=0.3")
    assert closed.stages["eval_sft"].elsewhere and closed.stages["dpo"].decision == "held"
    write(closed, Undo(), Code())
    assert folder.rows()["eval_sft"][0] == "gated"
    assert {row["state"] for row in runs.collect(folder.base, ["first"]) if row["stage"] == "eval_sft"} == {"done"}


def test_a_gate_on_the_last_stage_is_told_and_holds_nothing(folder: Folder) -> None:
    made = folder.plan()
    folder.done(made, **{name: 0.5 for name in made.stages if name.startswith("eval")}, dpo=0.0, grpo=0.0)
    plan = folder.plan("eval_grpo.gate.at_least=0.9")
    assert set(decisions(plan).values()) == {"done"}
    assert plan.stages["eval_grpo"].gate_problem == "accuracy 0.5 (0.45 to 0.55) is below at_least 0.9"


def test_the_gate_of_a_job_in_the_queue_stays_what_it_was() -> None:
    now = {"metric": "accuracy", "at_least": 0.3}
    job = slurm.JobRecord("7", "PENDING", "None", 0, 60, 1, "", "gpu", "", "", "", "")
    for was in (None, {"metric": "accuracy", "at_least": 0.2}):
        live = Found({"gate": was} if was else {}, live=True, job=job, history=History(job_id="7"))
        with pytest.raises(LaunchError, match=r"its gate would change \((none|accuracy at_least 0.2) -> ") as caught:
            _check_same_gate("eval_sft", live, now)
        assert "scancel 7 first" in str(caught.value)
        _check_same_gate("eval_sft", live, was)
