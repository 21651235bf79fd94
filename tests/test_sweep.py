"""Sweeps: points, what they share, arrays, limits; pure, on this machine, and on a real SLURM."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from conf.check import ConfigError
from launchers import cli, compare, pipeline, points, render, sampler, site, slurm
from launchers import devcluster as dc
from launchers.compose import rewrite, rewrite_stage
from launchers.errors import LaunchError
from launchers.selection import Selection, select
from launchers.submission import Plan, make_plans, stale
from launchers.sweep import _rounds
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests.slurm_fixture import wait_for
from tests.test_submission import job
from tests.test_submit import Bench, bench, cluster

__all__ = ["bench", "cluster"]  # fixtures


def expanded(*tokens: str) -> tuple[list[list[str]], cli.Sweep]:
    given, sweep = cli.expand([rewrite_stage(rewrite(token)) for token in tokens])
    assert sweep is not None
    return given, sweep


def planned(base: Path, *tokens: str) -> dict[str, Plan]:
    """The plans of a sweep's points on a cluster that is not asked, by the folder."""
    given, _ = expanded(*tokens, "cluster=h100", f"paths.output_base={base}")
    plans = make_plans([select(point, only_one=False) for point in given], ask=False)
    return {plan.name: plan for plan in plans}


def decisions(plan: Plan) -> dict[str, str]:
    return {name: stage.decision for name, stage in plan.stages.items()}


# ------------------------------------------------------------------------------------------- the points


def test_points_have_folders_by_what_differs() -> None:
    given, sweep = expanded("pipeline=dpo", "dpo.beta=0.1,0.3", "sft.training.max_steps=5,6", "seed=1")
    assert sweep.name == "dpo-dpo.beta,sft.training.max_steps" and len(given) == 4
    assert sweep.points["dpo-dpo.beta=0.1,sft.training.max_steps=6"] == {
        "dpo.beta": "0.1", "sft.training.max_steps": "6"
    }  # fmt: skip
    assert "run_name='dpo-dpo.beta=0.1,sft.training.max_steps=6'" in given[1] and "seed=1" in given[1]
    assert expanded("dpo.beta=0.1,0.10,0.3")[1].points.keys() == {"full-dpo.beta=0.1", "full-dpo.beta=0.3"}
    _, named = expanded("run_name=\"my sweep's\"", "dpo.beta=0.1,0.3")
    assert (named.name, next(iter(named.points))) == ("my sweep's", "my sweep's-dpo.beta=0.1")
    _, own = expanded("run_name=a,b", "pipeline=dpo")
    assert list(own.points) == ["a", "b"]
    _, both = expanded("pipeline=dpo,rlhf")
    assert list(both.points) == ["dpo-dpo", "rlhf-rlhf"] and both.name == "dpo-rlhf-pipeline"
    assert cli.expand(["++stages.selected=sft,dpo", "seed=1"])[1] is None, "one pipeline's stages have one folder"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["model.name_or_path=a/b,a-b"], r"model\.name_or_path=a/b and .*=a-b: would both have the folder"),
        (["seed=range(0,1001)"], r"seed=range\(0,1001\): makes more than 1000 points"),
        (["seed=range(0,40)", "dpo.beta=range(0,30)"], "makes more than 1000 points"),
        (["seed=range(0,10000000000)"], "makes more than 1000 points"),
        (["seed=range(3,3)"], r"seed=range\(3,3\): has no value to try"),
        (["sft.lr=interval(0,1)"], r"sft\.lr=interval\(0,1\): is a range to sample from.*\n.*hydra/sweeper=optuna"),
        (["pipeline=dpo,nosuch"], "pipeline=nosuch"),
        (["sft.lr=choice()"], "sft.lr"),
    ],
)
def test_points_that_cannot_be(tokens: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expanded(*tokens)


def test_a_sweep_over_no_key_of_ours_names_the_nearest(bench: Bench) -> None:
    message = bench.refused("pipeline", "dpo.betta=0.1,0.3", "-m")
    assert "dpo.betta" in message and "did you mean 'dpo.beta'" in message
    message = bench.refused("pipeline", "cluster.name=a,b", "-m")
    assert "is one for all points of a sweep" in message


def test_stages_of_one_pipeline_come_one_after_the_other() -> None:
    def selection(run_name: str, wanted: str) -> Selection:
        return select(["cluster=local", f"stage={wanted}", f"run_name={run_name}"], only_one=True)

    given = [selection(name, wanted) for wanted in ("sft", "dpo") for name in ("a", "b")]
    rounds = _rounds(given)
    assert [[(s.run_name, s.wanted[0]) for s in one] for one in rounds] == [
        [("a", "sft"), ("b", "sft")], [("a", "dpo"), ("b", "dpo")],
    ]  # fmt: skip


def test_a_sweep_keeps_its_points_in_one_file(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="sweep=s: not in"):
        points.read(tmp_path, "s")
    points.record(tmp_path, "s", {"a": {"seed": "1"}})
    points.record(tmp_path, "s", {"b": {"seed": "2"}, "../c": {"seed": "3"}})
    assert points.read(tmp_path, "s") == {}, "no folders"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert points.read(tmp_path, "s") == {"a": {"seed": "1"}, "b": {"seed": "2"}}
    with pytest.raises(LaunchError, match="one of: s"):
        points.read(tmp_path, "t")
    for text in ("{", '{"version": 1, "points": 3}', '{"version": 2, "points": {}}'):
        (points.folder(tmp_path, "s") / "sweep.json").write_text(text)
        with pytest.raises(LaunchError, match=r"cannot be read|has version 2"):
            points.read(tmp_path, "s")


# ------------------------------------------------------------------------------------------ what is shared


def test_what_is_the_same_in_several_points_is_planned_once(tmp_path: Path) -> None:
    plans = planned(tmp_path, "pipeline=dpo", "dpo.beta=0.1,0.3,0.5")
    first, second, third = plans.values()
    assert set(decisions(first).values()) == {"new"}
    expected = {name: "shared" if name in ("base", "sft", "eval_base", "eval_sft") else "new" for name in first.stages}
    assert decisions(second) == decisions(third) == expected
    sft = second.stages["sft"]
    assert sft.owner is first.stages["sft"] and sft.run.root == tmp_path / first.name / "sft"
    assert second.stages["dpo"].frozen["inputs"]["model"]["run_dir"] == str(sft.run.root)
    assert second.description()["stages"]["sft"]["run_dir"] == str(sft.run.root)
    first.stages["sft"].job_id = "7"
    assert sft.waits_on == "7"
    assert not list(tmp_path.iterdir())


def test_an_evaluation_with_another_gate_is_another_run(tmp_path: Path) -> None:
    tokens = ("pipeline=dpo", "eval_sft.gate.metric=accuracy", "eval_sft.gate.at_least=0.2,0.3")
    _, second = planned(tmp_path, *tokens).values()
    assert {name: d for name, d in decisions(second).items() if d != "shared"} == {"eval_sft": "new"}


def test_what_changes_no_output_makes_no_second_point(tmp_path: Path) -> None:
    _, second = planned(tmp_path, "pipeline=dpo", "slurm.max_failures=1,2").values()
    assert set(decisions(second).values()) == {"shared"}


def test_a_job_follows_the_elements_of_an_array() -> None:
    child = job("9_3", dependency="aftercorr:7_*(unfulfilled),afterok:5_2(unfulfilled),afterok:6(unfulfilled)")
    assert not stale(child, ["7_3", "5_2", "6"])
    assert stale(child, ["7_2"]) and stale(child, ["5_3"])


def test_the_script_of_an_array(tmp_path: Path) -> None:
    cfg = select(["cluster=h100", "stage=base"], only_one=True).config("base")
    runs = {number: RunDirectory(tmp_path / f"it's p{number}" / "base") for number in (0, 1, 3)}
    array = render.Array("s/base", tmp_path / "100% a", runs, 2, ("7",))
    script = tmp_path / "job.sh"
    script.write_text(render.job_script(cfg, runs[0], "/bin/python", ["5"], array=array))
    text = script.read_text()
    assert "#SBATCH --array=0-1,3%2\n" in text and "#SBATCH --dependency=afterok:5,aftercorr:7\n" in text
    assert f"{tmp_path}/100%% a/%a/slurm-%A_%a.out" in text
    # the id of an element, never $SLURM_JOB_ID: of one element that is the whole array's
    assert not re.search(r"(scontrol|scancel)[^\n]*SLURM_JOB_ID", text)
    start = text[text.index("RUN_DIRS=(") : text.index("PYTHON=")]
    for number, run in runs.items():
        shell = f'SLURM_ARRAY_TASK_ID={number}\n{start}\nprintf %s "$RUN_DIR"'
        assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout == str(run.root)
    if shutil.which("shellcheck") is not None:
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_shared_run_that_fails_takes_dependents_of_all_points(tmp_path: Path) -> None:
    base = RunDirectory(tmp_path / "a" / "base")
    dependents = [RunDirectory(tmp_path / name / "sft") for name in ("a", "b", "other")]
    for run in (base, *dependents):
        run.create()
        run.config.write_text("cluster: {scheduler: slurm}\n")
        ledger.append(run.ledger, "submitted", job_id="1", cluster="dev")
    for run in dependents:
        stages = {"base": {"run_dir": str(base.root)}, "sft": {"run_dir": str(run.root), "after": ["base"]}}
        (run.root.parent / "pipeline.json").write_text(json.dumps({"stages": stages}))
    ledger.append(base.ledger, "shared", pipelines=["b", "../other", 3, "gone"])
    ledger.append(base.ledger, "shared", pipelines="damaged")
    assert [folder.name for folder in life.pipelines_of(base)] == ["a", "b", "gone"]
    life.cancel_dependents(base, "upstream base failed")
    told = {run.pipeline: summarise(ledger.read(run.ledger)).reason for run in dependents}
    assert told == {"a": "upstream base failed", "b": "upstream base failed", "other": None}


def test_on_this_machine_a_shared_stage_that_fails_leaves_the_other_points_out(bench: Bench) -> None:
    bench.behave("sft", "crash")
    done = bench("pipeline", "pipeline=dpo", "dpo.beta=0.1,0.3", "slurm.max_failures=1", "-m")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "dpo-dpo.beta=0.3: left out: sft of dpo-dpo.beta=0.1 did not finish" in done.stderr
    assert not (bench.base / "dpo-dpo.beta=0.3").exists()


# --------------------------------------------------------------------------------------- the points' table


def judged(base: Path, point: str, **scores: float | None) -> None:
    """A pipeline whose stages have been judged, each with this accuracy; None: not yet."""
    stages: dict[str, Any] = {}
    for stage, score in scores.items():
        root = base / (point if stage != "sft" else "p-a")  # one run for all points
        for name, technique in ((stage, stage), (f"eval_{stage}", "eval")):
            run = RunDirectory(root / name)
            run.create()
            source = {"path": str(root / stage / "model"), "run_dir": str(root / stage), "identity": None}
            inputs = {"model": source} if technique == "eval" else {}
            config = {"stage": technique, "name": name, "inputs": inputs, "data": {"name": "d"}}
            run.config.write_text(json.dumps(config))
            stages[name] = {"run_dir": str(run.root), "stage": technique, "after": []}
            if score is not None:
                run.model.mkdir(exist_ok=True)
                if technique == "eval":
                    figure = {"value": score, "low": score - 0.05, "high": score + 0.05}
                    found = {"accuracy": figure, "perplexity_text": {"value": 10 * score}}
                    run.results.write_text(json.dumps({"version": 2, "headline": "accuracy", "figures": found}))
                manifest.write(run.model)
    (base / point / "pipeline.json").write_text(json.dumps({"stages": stages}))


def test_one_table_of_all_points_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    judged(tmp_path, "p-a", sft=0.2, dpo=0.4, grpo=0.5)
    judged(tmp_path, "p-b", sft=0.2, dpo=0.5, grpo=0.7)
    judged(tmp_path, "p-c", sft=0.2, dpo=0.3, grpo=None)
    points.record(tmp_path, "p", {f"p-{x}": {"dpo.beta": f"0.{i}", "seed": "1"} for i, x in enumerate("abc", 1)})
    where = ["sweep=p", "paths.output_base=."]
    assert compare.main(where) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "the best accuracy of grpo first" in " ".join(lines[0])
    assert lines[1] == ["dpo.beta", "seed", "dpo", "grpo", "pipeline"], "sft is the same for all"
    assert lines[2] == ["1", "0.2", "1", "50.0", "%", "+-", "5.0", "70.0", "%", "+-", "5.0", "p-b"]
    assert lines[4] == ["-", "0.3", "1", "30.0", "%", "+-", "5.0", "-", "p-c"]
    assert compare.main([*where, "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["rank"], row["pipeline"], row["dpo.beta"], row["grpo_score"]) for row in rows] == [
        ("1", "p-b", "0.2", "0.7"), ("2", "p-a", "0.1", "0.5"), ("", "p-c", "0.3", ""),
    ]  # fmt: skip
    assert compare.main([*where, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["by"], told["metric"]) == ("grpo", "accuracy")
    assert told["points"][0]["scores"]["dpo"] == {"headline": "accuracy", "score": 0.5, "low": 0.45, "high": 0.55}
    assert compare.main([*where, "--markdown"]) == 0
    assert "| 1 | 0.2 | 1 |" in capsys.readouterr().out
    assert compare.main([*where, "--all"]) == 0 and "side by side" in capsys.readouterr().out
    # what a sampler looked at decides: here a figure of which less is better
    points.record(tmp_path, "p", {}, "eval_dpo/perplexity_text")
    assert compare.main([*where, "--json"]) == 0
    assert [point["pipeline"] for point in json.loads(capsys.readouterr().out)["points"]] == ["p-c", "p-a", "p-b"]
    assert compare.main(["sweep=q", where[1]]) == 2 and "sweep=q: not in" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- on a real SLURM

SWEEP = ("pipeline=dpo", "dpo.beta=0.1,0.3", "slurm.max_failures=1", "-m")
POINTS = ("dpo-dpo.beta=0.1", "dpo-dpo.beta=0.3")


def jobs_of(bench: Bench) -> dict[str, slurm.JobRecord]:
    """What squeue shows of a sweep's jobs, by `<point>/<stage>`."""
    found = slurm.jobs(user="root", conf=bench.env["SLURM_CONF"])
    assert not isinstance(found, slurm.Unknown)
    folders = {job_id: Path(seen.folder).resolve() for job_id, seen in found.items() if seen.folder}
    return {
        f"{root.parent.name}/{root.name}": found[job_id]
        for job_id, root in folders.items()
        if root.parent.parent == bench.base.resolve()
    }


def summaries(bench: Bench, *names: str) -> dict[str, Any]:
    return {name: summarise(ledger.read(bench.run(*name.split("/")).ledger)) for name in names}


@pytest.mark.slurm
def test_points_share_what_is_queued_and_fail_together(cluster: Bench, devcluster: dc.Cluster, tmp_path: Path) -> None:
    cluster.behave("base", "wait")
    done = cluster("pipeline", *SWEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep dpo-dpo.beta: 2 points, 12 jobs to submit" in done.stdout
    seen = jobs_of(cluster)
    assert len(seen) == 12 and f"{POINTS[1]}/sft" not in seen
    sft = seen[f"{POINTS[0]}/sft"].job_id
    assert {seen[f"{point}/dpo"].dependency for point in POINTS} == {f"afterok:{sft}(unfulfilled)"}
    # the same again, and with a point more: what is queued is taken
    again = cluster("pipeline", *SWEEP)
    assert again.returncode == 0 and "2 points, 0 jobs" in again.stdout, again.stdout + again.stderr
    more = cluster("pipeline", "pipeline=dpo", "dpo.beta=0.3,0.5", "slurm.max_failures=1", "-m")
    assert more.returncode == 0 and "2 points, 4 jobs" in more.stdout, more.stdout + more.stderr
    assert jobs_of(cluster)["dpo-dpo.beta=0.5/dpo"].dependency == f"afterok:{sft}(unfulfilled)"
    assert set(points.read(cluster.base, "dpo-dpo.beta")) == {*POINTS, "dpo-dpo.beta=0.5"}

    cluster.behave("sft", "crash")
    cluster.behave("base", None)
    wait_for("no job is left", lambda: not any(job.live for job in jobs_of(cluster).values()), 60)
    dependents = [f"{point}/{stage}" for point in (*POINTS, "dpo-dpo.beta=0.5") for stage in ("dpo", "eval_grpo")]
    for name, history in summaries(cluster, *dependents).items():
        assert history.cancelled and history.reason.startswith("upstream sft failed"), (name, history)
    cluster.behave("sft", "wait")
    done = cluster("pipeline", *SWEEP)
    assert done.returncode == 0 and "10 jobs to submit" in done.stdout, done.stdout + done.stderr
    assert summaries(cluster, f"{POINTS[0]}/base")[f"{POINTS[0]}/base"].attempts == 1


@pytest.mark.slurm
def test_points_as_elements_of_arrays(cluster: Bench, devcluster: dc.Cluster) -> None:
    """Never more of a stage at a time than asked for; a requeue, a failure and a look are those of one element."""
    tokens = ("pipeline=dpo", "dpo.beta=0.1,0.3,0.5", "slurm.array_parallelism=2", "slurm.max_failures=1", "-m")
    names = ["dpo-dpo.beta=0.1", "dpo-dpo.beta=0.3", "dpo-dpo.beta=0.5"]
    cluster.behave("dpo", "wait")
    cluster.behave(f"{names[2]}.dpo", "crash")
    done = cluster("pipeline", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = jobs_of(cluster)
    assert len(seen) == 4 + 3 * 4, sorted(seen)
    array, _, _ = seen[f"{names[0]}/dpo"].job_id.partition("_")
    assert [seen[f"{name}/dpo"].job_id for name in names] == [f"{array}_{i}" for i in range(3)]
    assert "_" not in seen[f"{names[0]}/sft"].job_id
    assert seen[f"{names[1]}/grpo"].dependency == f"aftercorr:{array}_*(unfulfilled)"
    assert seen[f"{names[1]}/dpo"].dependency == f"afterok:{seen[f'{names[0]}/sft'].job_id}(unfulfilled)"

    def states() -> list[str]:
        now = jobs_of(cluster)
        return [now[f"{name}/dpo"].state for name in names]

    wait_for("two at a time", lambda: states().count("RUNNING") == 2, 60)
    run = cluster.run(names[0], "dpo")
    out = run.stdout(f"{array}_0")
    wait_for("the first trains", lambda: out.exists() and "rank 0" in out.read_text(), 30)
    third = jobs_of(cluster)[f"{names[2]}/dpo"]
    assert (third.state, third.reason) == ("PENDING", "JobArrayTaskLimit")
    run.ledger.rename(cluster.folder / "ledger")  # as if the command had died before it wrote that down
    again = cluster("pipeline", *tokens)
    assert again.returncode == 0 and "3 points, 0 jobs" in again.stdout, again.stdout + again.stderr
    assert ledger.read(run.ledger)[0]["job_id"] == f"{array}_0"
    (cluster.folder / "ledger").rename(run.ledger)

    devcluster.run("scontrol", "requeue", f"{array}_0")
    wait_for("the third has its turn and fails", lambda: states()[2] == "FAILED", 60)
    assert states().count("RUNNING") <= 2
    wait_for("the first has ended", lambda: not summarise(ledger.read(run.ledger)).running, 60)
    cluster.behave("dpo", None)
    wait_for("no job is left", lambda: not any(job.live for job in jobs_of(cluster).values()), 90)
    for name in names[:2]:
        models = {stage: manifest.problem(cluster.run(name, stage).model) for stage in ("dpo", "grpo", "eval_grpo")}
        assert set(models.values()) == {None}, (name, models)
    found = summaries(cluster, f"{names[0]}/dpo", f"{names[2]}/dpo", f"{names[2]}/grpo", f"{names[2]}/eval_grpo")
    assert (found[f"{names[0]}/dpo"].attempts, found[f"{names[0]}/dpo"].job_id) == (2, f"{array}_0")
    assert found[f"{names[2]}/dpo"].gave_up
    assert "it broke" in cluster.run(names[2], "dpo").stderr(f"{array}_2").read_text()
    for stage in ("grpo", "eval_grpo"):
        assert found[f"{names[2]}/{stage}"].reason.startswith("upstream dpo failed"), found


@pytest.mark.slurm
def test_a_limit_on_jobs_leaves_what_was_taken_and_the_same_command_adds_the_rest(
    cluster: Bench, tmp_path: Path
) -> None:  # fmt: skip
    real = dc.shutil.which("sbatch", path=cluster.env["PATH"])
    shim = tmp_path / "bin"
    shim.mkdir()
    (shim / "sbatch").write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/full ] && [ $(wc -l < {tmp_path}/taken) -ge 9 ]; then\n"
        "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, "
        f"user'\"'\"'s size and/or time limits)' >&2; exit 1\nfi\necho >> {tmp_path}/taken\nexec {real} \"$@\"\n"
    )
    (shim / "sbatch").chmod(0o755)
    (tmp_path / "full").touch()
    (tmp_path / "taken").touch()
    cluster.env["PATH"] = f"{shim}:{cluster.env['PATH']}"
    cluster.behave("base", "wait")
    done = cluster("pipeline", *SWEEP)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "9 of 12 jobs submitted: grpo: SLURM refused the job: sbatch: error: AssocMaxSubmitJobLimit" in done.stderr
    assert "fix: the same command when some have ended" in done.stderr
    before = jobs_of(cluster)
    assert len(before) == 9 and f"{POINTS[1]}/dpo" in before
    assert sorted(path.name for path in (cluster.base / POINTS[1]).iterdir() if path.is_dir()) == ["dpo"]
    (tmp_path / "full").unlink()
    done = cluster("pipeline", *SWEEP)
    assert done.returncode == 0 and "3 jobs to submit" in done.stdout, done.stdout + done.stderr
    after = jobs_of(cluster)
    assert len(after) == 12 and {name: job.job_id for name, job in before.items()}.items() <= {
        name: job.job_id for name, job in after.items()
    }.items()


@pytest.mark.slurm
def test_arrays_are_no_longer_than_the_cluster_takes(cluster: Bench, tmp_path: Path) -> None:
    """Cut at MaxArraySize, and halved where an array as a whole breaks a limit on jobs."""
    sweep = ("pipeline=dpo", "slurm.array_parallelism=2", "-m")
    cluster.behave("base", "wait")
    found = site.write(cluster.base, "dev", site.Site(asked=time.time(), max_array_size=2))
    done = cluster("pipeline", *sweep, "dpo.beta=0.1,0.3,0.5", "run_name=cut")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = (jobs_of(cluster)[f"cut-dpo.beta={beta}/dpo"].job_id for beta in (0.1, 0.3, 0.5))
    array = first.partition("_")[0]
    assert (first, second) == (f"{array}_0", f"{array}_1") and third.partition("_") != (array, "_", "0")
    found.unlink()
    real = dc.shutil.which("sbatch", path=cluster.env["PATH"])
    shim = tmp_path / "bin"
    shim.mkdir()
    (shim / "sbatch").write_text(
        '#!/bin/sh\nfor last; do :; done\n'
        "if grep -q -e '--array=.*0-2' \"$last\"; then echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1; fi\n"
        f'exec {real} "$@"\n'
    )
    (shim / "sbatch").chmod(0o755)
    cluster.env["PATH"] = f"{shim}:{cluster.env['PATH']}"
    done = cluster("pipeline", *sweep, "dpo.lr=0.1,0.2,0.3", "run_name=halved")
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [jobs_of(cluster)[f"halved-dpo.lr={lr}/dpo"].job_id for lr in (0.1, 0.2, 0.3)]
    assert len(set(ids)) == 3 and len({job_id.partition("_")[0] for job_id in ids}) == 2, ids


# ------------------------------------------------------------------------------------------------ a sampler

OPTUNA = (
    "-m", "hydra/sweeper=optuna", "pipeline=pretrain", "base.lr=interval(0.0001,0.001)",
    "sweep.metric=eval_base/accuracy", "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_jobs=2", "slurm.max_failures=1",
)  # fmt: skip


def score_by_rate(bench: Bench) -> None:
    """What an evaluation finds follows from base.lr: best at 5e-4, and above 8e-4 it fails."""
    stub = bench.stub / "train.py"
    usual = "run.results.write_text(found.read_text() if found.exists() else usual)\n"
    text = stub.read_text()
    assert usual in text
    stub.write_text(
        text.replace(
            usual,
            "rate = RunDirectory(Path(config['inputs']['model']['run_dir'])).read_config()['base']['lr']\n"
            "        assert rate < 8e-4\n"
            '        found = {"value": 1 - abs(rate - 5e-4) * 1000}\n'
            "        import json\n"
            '        found = {"version": 2, "headline": "accuracy", "figures": {"accuracy": found}}\n'
            "        run.results.write_text(json.dumps(found))\n",
        )
    )


def test_a_sampler_learns_from_its_trials_and_goes_on(bench: Bench) -> None:
    score_by_rate(bench)
    done = bench("pipeline", *OPTUNA, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    path = points.folder(bench.base, "pretrain-base.lr") / "trials.jsonl"
    first = sampler.read_trials(path, "eval_base/accuracy")
    assert len(first) == 2 and {trial.state for trial in first} == {"done"}
    best = max(first, key=lambda trial: trial.value or 0.0)
    assert f"best of 2 trials: eval_base/accuracy {100 * (best.value or 0):.1f} % with base.lr=" in done.stdout
    assert f"/{best.folder}" in done.stdout and "the best accuracy of base first" in done.stdout
    rate = float(best.params["base.lr"])
    assert best.value == pytest.approx(1 - abs(rate - 5e-4) * 1000) and 1e-4 <= rate <= 1e-3
    # with more trials: the first ones count, the one that was interrupted comes first, and one fails
    lines = path.read_text().splitlines()
    other = {**json.loads(lines[-1]), "state": "asked", "value": None}
    other |= {"folder": "pretrain-base.lr=0.0009", "params": {"base.lr": "0.0009"}}
    path.write_text("\n".join([*lines, json.dumps(other), "{damaged"]) + "\n")
    done = bench("pipeline", *OPTUNA, "hydra.sweeper.n_trials=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrain-base.lr: 2 trials before, and 1 to go on" in done.stdout
    after = {trial.folder: trial for trial in sampler.read_trials(path, "eval_base/accuracy")}
    assert len(after) == 4 and after["pretrain-base.lr=0.0009"].state == "failed"
    assert after["pretrain-base.lr=0.0009"].why.startswith("eval_base failed")
    assert [after[trial.folder] for trial in first] == first


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["sweep.metric=eval_base/accuracy", "seed=1"], "there is nothing to choose"),
        (["base.lr=interval(0,1)"], "sweep.metric=null: a sampler needs to know what to make better"),
        (["base.lr=interval(0,1)", "sweep.metric=eval_bas/accuracy"], "did you mean 'eval_base/accuracy'"),
        (["base.lr=interval(0,1)", "sweep.metric=eval_base/length"], "neither more nor less is better"),
        (["base.lr=interval(0,1)", "sweep.metric=eval_base/pass@4"], "eval.num_samples=8"),
        (["base.lrr=interval(0,1)", "sweep.metric=eval_base/accuracy"], "did you mean 'base.lr'"),
        (["base.lr=interval(0,1)", "sweep.metric=eval_base/accuracy", "hydra.sweeper.n_trial=3"], "n_trial"),
        (["base.lr=interval(0,1)", "sweep.metric=eval_base/accuracy", "dry_run=true"], "dry_run"),
    ],
)
def test_a_sampler_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: list[str], words: str
) -> None:  # fmt: skip
    common = ["-m", "hydra/sweeper=optuna", "pipeline=pretrain", "cluster=local", f"paths.output_base={tmp_path}/out"]
    assert pipeline.main([*common, *tokens]) == 2
    said = capsys.readouterr().err
    assert words in said and "fix:" in said and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())


def test_a_sampler_needs_its_package_and_a_multirun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(["hydra/sweeper=optuna", "base.lr=interval(0,1)"]) == 2
    assert "fix: add -m" in capsys.readouterr().err
    monkeypatch.setattr(sampler, "find_spec", lambda name: None)
    assert pipeline.main(["-m", "hydra/sweeper=optuna", "base.lr=interval(0,1)"]) == 2
    assert "fix: pip install '.[optuna]'" in capsys.readouterr().err
    assert pipeline.main(["-m", "hydra/sweeper=ax", "base.lr=interval(0,1)"]) == 2
    assert "fix: hydra/sweeper=optuna" in capsys.readouterr().err
