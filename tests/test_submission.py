"""What a command is going to do about what is there already. No SLURM: its answers are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.check import ConfigError
from conf.schema import Config
from launchers import slurm
from launchers.compose import rewrite, rewrite_stage
from launchers.selection import Selection, select
from launchers.submission import Planned, _check_restart, changes, live_jobs, make_plan, stale
from post_training.run import manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History
from tests.training import make_config


def job(job_id: str, comment: str = "", state: str = "PENDING", **more: str) -> slurm.JobRecord:
    text = {"reason": "None", "partition": "gpu", "submit_time": "", "start_time": "", "dependency": "", **more}
    return slurm.JobRecord(
        job_id=job_id, state=state, elapsed=0, limit=60, nodes=1, node_list="", comment=comment, **text
    )  # fmt: skip


def answer(monkeypatch: pytest.MonkeyPatch, *jobs: slurm.JobRecord, why: str | None = None) -> None:
    """What squeue says from now on."""
    found = slurm.Unknown(why) if why is not None else {job.job_id: job for job in jobs}
    monkeypatch.setattr(slurm, "jobs", lambda *args, **options: found)


def test_jobs_are_known_by_the_folder_in_their_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other = tmp_path / "p" / "sft", tmp_path / "p" / "rm"
    root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "p")
    history = History(job_id="7")
    for comment in (f"{root}", f"{root} token=0a1b2c3d", f"{tmp_path}/link/sft token=0a1b2c3d"):
        answer(monkeypatch, job("9", comment))
        assert live_jobs({root: History()}, None) == {root: job("9", comment)}
    answer(monkeypatch, job("9", f"{root}"), job("7", f"{root} token=0"), job("10", f"{root}"))
    found = live_jobs({root: history}, None)[root]
    assert isinstance(found, slurm.JobRecord) and found.job_id == "7"  # the ledger's
    answer(monkeypatch, job("7", f"{other} token=0"))  # another cluster's job of the same number
    assert live_jobs({root: history}, None) == {}
    answer(monkeypatch, job("7", "the site's own words"))
    assert live_jobs({root: history}, None) == {root: job("7", "the site's own words")}
    answer(monkeypatch, job("7", f"{root} token=0", state="FAILED"))
    assert live_jobs({root: history}, None) == {}


def test_without_an_answer_only_the_ledger_says_that_a_job_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, why="timed out")
    histories = {
        Path("/p/written"): History(job_id="1"),
        Path("/p/not_written"): History(),  # the command may have died between sbatch and its note
        Path("/p/gave_up"): History(job_id="2", outcome="crashed", action="exit", gave_up=True),
    }
    assert live_jobs(histories, None).keys() == {Path("/p/written"), Path("/p/not_written")}


@pytest.mark.parametrize(
    ("waiting", "needs", "expected"),
    [
        (job("9", dependency="afterok:7(unfulfilled),afterok:8(unfulfilled)"), ["7", "8"], False),
        (job("9", dependency="afterok:7(unfulfilled)"), [], False),
        (job("9", dependency="afterok:6(unfulfilled)"), ["7"], True),  # its parent was submitted anew since
        (job("9", dependency="(null)"), ["7"], True),
        (job("9", dependency="afterok:7(failed)", reason="DependencyNeverSatisfied"), ["7"], True),
        (job("9", dependency="(null)", state="RUNNING"), ["7"], False),
    ],
)
def test_a_job_that_waits_for_the_wrong_ones_is_stale(
    waiting: slurm.JobRecord, needs: list[str], expected: bool
) -> None:  # fmt: skip
    assert stale(waiting, needs) is expected


@pytest.mark.parametrize(
    ("decisions", "refused"),
    [
        ({"base": "done", "sft": "again", "dpo": "live"}, False),
        ({"base": "new"}, False),
        ({"base": "done", "sft": "live"}, True),
        ({"base": "done"}, True),
    ],
)
def test_a_restart_that_would_do_nothing_is_refused(decisions: dict[str, str], refused: bool) -> None:
    def planned(name: str, decision: str) -> Planned:
        run = RunDirectory(Path("/o/p") / name)
        return Planned(name, Config(restart=True), {"pipeline": "p"}, run, decision, [], job_id="5")

    stages = {name: planned(name, decision) for name, decision in decisions.items()}
    if not refused:
        _check_restart(stages)
        return
    with pytest.raises(ConfigError, match="restart=true: there is nothing to start from scratch: base is done"):
        _check_restart(stages)


def test_a_run_of_before_torch_compile_goes_on_and_a_compiled_one_is_another() -> None:
    plain, compiled = (make_config("sft", f"training.torch_compile={on}") | {"inputs": {}} for on in ("false", "true"))
    of_before = {**plain, "training": {k: v for k, v in plain["training"].items() if k != "torch_compile"}}
    assert changes(of_before, plain) == {}
    assert changes(of_before, compiled) == {"training.torch_compile": (None, True)}


def test_a_run_of_before_benchmarks_goes_on_and_one_with_them_is_another() -> None:
    def frozen(*overrides: str) -> dict[str, Any]:
        return make_config("eval", *overrides) | {"inputs": {}}

    plain, new = frozen(), ("tasks", "tasks_path", "num_fewshot", "task_limit", "judge")
    of_before = {**plain, "eval": {k: v for k, v in plain["eval"].items() if k not in new}}
    assert changes(of_before, plain) == {}
    asked = frozen("eval.tasks=[gsm8k]")
    assert changes(of_before, asked)["eval.tasks"] == (None, ["gsm8k"])
    assert changes(asked, frozen("eval.tasks=[gsm8k]", "eval.num_fewshot=8")) == {"eval.num_fewshot": (None, 8)}


# ------------------------------------------------------------------------------------------ evaluations


def chosen(tokens: list[str], only_one: bool) -> Selection:
    """What a command with these tokens means."""
    return select([rewrite_stage(rewrite(token)) for token in tokens], only_one)


def test_an_evaluation_of_before_samples_and_start_models_goes_on() -> None:
    def frozen(*overrides: str, reference: dict[str, object] | None = None) -> dict[str, Any]:
        model = {"path": "/m", "run_dir": "/r", "identity": "m1"}
        return make_config("eval", *overrides) | {"inputs": {"model": model, "reference": reference}}

    now = frozen()
    new = ("num_samples", "temperature", "num_instructions", "text", "base_text")
    of_before = {**now, "eval": {k: v for k, v in now["eval"].items() if k not in new}}
    start = {"path": "/s", "run_dir": "/q", "identity": "s1"}
    assert changes(of_before, now) == {}
    assert changes(of_before, frozen(reference={**start, "derived": True})) == {}, "it follows from the model"
    assert changes(of_before, frozen("eval.base_text={name: text, path: /t}")) == {}, "as does this"
    assert changes(of_before, frozen(reference=start)) == {"inputs.reference": (None, "s1")}
    assert changes(of_before, frozen("eval.temperature=0.5")) == {}, "nothing is sampled"
    assert changes(of_before, frozen("eval.num_samples=4", "eval.temperature=0.5")).keys() == {
        "eval.num_samples", "eval.temperature",
    }  # fmt: skip
    assert changes(of_before, frozen("eval.num_instructions=4")).keys() == {"eval.num_instructions"}
    assert "eval.text.path" in changes(of_before, frozen("eval.text={name: text, path: /t}"))


def test_an_evaluation_knows_the_model_that_its_stage_started_from(tmp_path: Path) -> None:
    """Its dependencies stay what they are, whether the judged stage is in the same command or was there before."""
    common = ("cluster=local", f"paths.output_base={tmp_path}")
    plan = make_plan(chosen(["pipeline=full", *common], only_one=False), ask=False)
    references = {n: p.frozen["inputs"]["reference"] for n, p in plan.stages.items() if p.cfg.stage == "eval"}
    starts = {name: Path(found["path"]).parent.name if found else None for name, found in references.items()}
    assert starts == {
        "eval_base": None, "eval_sft": "base", "eval_rm": None, "eval_ppo": "sft", "eval_dpo": "sft",
        "eval_grpo": "ppo",
    }  # fmt: skip
    assert all(found is None or found["derived"] for found in references.values())
    assert {name: p.after for name, p in plan.stages.items() if p.cfg.stage == "eval"} == {
        f"eval_{name}": [name] for name in ("base", "sft", "rm", "ppo", "dpo", "grpo")
    }
    sft = plan.stages["sft"]
    sft.run.create()
    sft.run.config.write_text(yaml.safe_dump(sft.frozen))
    sft.run.model.mkdir()
    manifest.write(sft.run.model, identity=sft.frozen["identity"])
    alone = make_plan(chosen(["pipeline=full", "stage=eval_sft", *common], only_one=True), ask=False)
    assert alone.stages["eval_sft"].frozen == plan.stages["eval_sft"].frozen
    given = chosen(["pipeline=full", "stage=eval_sft", f"inputs.reference={tmp_path}", *common], only_one=True)
    asked = make_plan(given, ask=False).stages["eval_sft"].frozen
    assert asked["inputs"]["reference"]["path"] == str(tmp_path) and "derived" not in asked["inputs"]["reference"]
    assert asked["identity"] != alone.stages["eval_sft"].frozen["identity"]


def test_all_stages_of_a_line_are_measured_on_the_base_stages_text(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    common = ["pipeline=full", "cluster=local", f"paths.output_base={tmp_path}"]

    def texts(*tokens: str) -> dict[str, Any]:
        plan = make_plan(chosen([*common, *tokens], only_one=False), ask=False)
        return {n: p.frozen["eval"]["base_text"] for n, p in plan.stages.items() if p.cfg.stage == "eval"}

    assert not any(texts().values()), "the same data"
    found = texts("base.data=text", f"base.data.path={text}", "eval_base.data=text", f"eval_base.data.path={text}")
    assert found.pop("eval_base") == {} and len(found) == 5
    assert all((of["name"], of["path"]) == ("text", str(text)) for of in found.values())
    given = f"eval.text={{name:text,path:{text}}}"
    assert not any(texts("base.data=text", f"base.data.path={text}", given).values())
    with pytest.raises(ConfigError, match=r"eval\.text\.name=ultrachat: has no plain text"):
        texts("eval.text={name:ultrachat}")
    with pytest.raises(ConfigError, match=r"eval\.text\.path=/none\.jsonl: no such file"):
        texts("eval.text={name:text,path:/none.jsonl}")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("eval.num_samples=300", "eval.num_samples=300: is more than eval.batch_size=256"),
        ("eval.num_samples=-1", "eval.num_samples=-1: must be at least 0"),
        ("eval.temperature=0", "eval.temperature=0.0: must be above 0"),
        ("eval.num_instructions=-1", "eval.num_instructions=-1: must be at least 0"),
    ],
)
def test_an_evaluation_that_cannot_be_asked_so(tmp_path: Path, token: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(["pipeline=full", "cluster=local", f"paths.output_base={tmp_path}", token], only_one=False)
