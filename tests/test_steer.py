"""Cancel, requeue, hold and release: which runs a command line means, what a wish decides, and what becomes of it on a
real SLURM and on this machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import slurm, steer
from launchers.errors import LaunchError
from launchers.runs import choose, collect
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise
from tests.slurm_fixture import job, wait_state
from tests.test_failures import SlurmRun, runs
from tests.test_local import World, until, world

__all__ = ["runs", "world"]

# ----------------------------------------------------------------------------------- which runs are meant


def pipeline(folder: Path, *stages: str, elsewhere: dict[str, Path] | None = None) -> None:
    """A pipeline's folder, each stage after the one before."""
    described = {}
    for number, name in enumerate(stages):
        run = RunDirectory((elsewhere or {}).get(name, folder / name))
        run.create()
        run.config.write_text("stage: sft\ncluster: {scheduler: slurm}\n")
        described[name] = {"run_dir": str(run.root), "after": list(stages[max(0, number - 1) : number])}
    folder.mkdir(exist_ok=True)
    (folder / "pipeline.json").write_text(json.dumps({"stages": described}))


def meant(base: Path, *words: str, newest: bool = False) -> list[str]:
    return [f"{look.pipeline}/{look.name}" for look in choose([*words, f"paths.output_base={base}"], "x", newest)]


@pytest.mark.parametrize("words", [("",), ("", "run_name=a"), ("/",), ("run_name=,",)])
def test_an_empty_word_is_no_run_and_never_all_of_them(tmp_path: Path, words: tuple[str, ...]) -> None:
    """As an unset variable of a script makes it."""
    pipeline(tmp_path / "a", "sft", "dpo")
    with pytest.raises(LaunchError, match=r"not a run|not a setting|no value"):
        meant(tmp_path, *words)


def test_a_run_may_be_named_by_its_folder(tmp_path: Path) -> None:
    pipeline(tmp_path / "a", "sft", "dpo")
    assert meant(tmp_path, f"{tmp_path}/a/sft/") == meant(tmp_path, "a/sft/") == ["a/sft"]
    with pytest.raises(LaunchError, match=r"run_name=a for all of that pipeline"):
        meant(tmp_path, "a")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    pipeline(tmp_path / "full", "base", "sft", "dpo")
    pipeline(tmp_path / "dpo", "base", "sft", "dpo")
    pipeline(tmp_path / "full-sft.lr=1e-5,data=a", "base", "sft")
    return tmp_path


def test_stages_and_pipelines_are_chosen(base: Path) -> None:
    assert meant(base, "full/sft") == ["full/sft"]
    assert meant(base, "run_name=full") == ["full/base", "full/sft", "full/dpo"]
    assert meant(base, "run_name=full", "sft", "dpo") == ["full/sft", "full/dpo"]
    assert meant(base, "run_name=full", "run_name=dpo", "sft") == ["full/sft", "dpo/sft"]
    assert meant(base, "full/sft", "full/sft") == ["full/sft"]
    # a pair is that pair, and no other mixture
    assert meant(base, "full/sft", "dpo/dpo") == ["full/sft", "dpo/dpo"]
    # as the points of a sweep are called
    assert meant(base, "full-sft.lr=1e-5,data=a/sft") == ["full-sft.lr=1e-5,data=a/sft"]
    assert meant(base, "run_name=full-sft.lr=1e-5,data=a", "base") == ["full-sft.lr=1e-5,data=a/base"]
    os.utime(base / "dpo" / "pipeline.json")
    assert len(meant(base, "sft", newest=True)) == 1
    (base / "full/rm/slurm").mkdir(parents=True)
    (base / "full/rm/config.yaml").write_text("stage: rm\n")
    assert meant(base, "rm") == ["full/rm"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sft"], "several pipelines"),
        ([], "several pipelines"),
        (["sfft"], "no such stage"),
        (["full/sfft"], "did you mean 'sft'"),
        (["fulll/sft"], "did you mean 'full'"),
        (["run_name=full", "run_name=full-sft.lr=1e-5,data=a", "dpo"], "dpo: no such stage in run_name=full-sft.lr"),
        (["stage=sft"], "not a setting"),
        (["run_name="], "no value"),
    ],
)
def test_what_is_not_meant_is_said(base: Path, words: list[str], problem: str) -> None:
    with pytest.raises(LaunchError) as error:
        meant(base, *words)
    assert problem in str(error.value)


@pytest.mark.parametrize("command", ["cancel", "requeue", "hold", "release"])
def test_a_command_without_a_run_does_nothing(command: str, tmp_path: Path, capsys: Any) -> None:
    pipeline(tmp_path / "only", "sft")
    assert steer.run_command(command, [f"paths.output_base={tmp_path}"]) == 2
    assert f"say what to {command}" in capsys.readouterr().err
    assert not (tmp_path / "only/sft/ledger.jsonl").exists()


def test_a_shared_stage_of_another_pipeline_is_left_alone_unless_named(base: Path) -> None:
    pipeline(base / "point", "base", "sft", elsewhere={"base": base / "full/base"})
    words = ["run_name=point", f"paths.output_base={base}"]
    assert [look.name for look in steer.own_runs(choose(words, "x"), words)] == ["sft"]
    words.append("base")
    assert [look.name for look in steer.own_runs(choose(words, "x"), words)] == ["base"]


# ------------------------------------------------------------------------------------------ pure decisions

LIMITS = life.Limits(3, 10)
outcomes = st.sampled_from(["stopped", "preempted", "node_lost", "cancelled", "out_of_memory", "hung", "crashed"])
words = st.builds(life.Word, st.sampled_from([None, "preempted", "node_lost", "cancelled", "running"]))


@settings(deadline=None)
@given(outcomes, words, st.sampled_from([None, "USR1", "TERM"]), st.sampled_from([0, 7, 85, 124]), st.integers(0, 5))
def test_a_cancelled_run_does_not_come_back_however_it_ends(
    outcome: str, word: life.Word, sent: str | None, code: int, failures: int
) -> None:
    ending = life.decide(outcome, None, code, word, sent, History(cancel_wish="ann", failures=failures), LIMITS)
    assert (ending.action, ending.cancelled, ending.gave_up) == ("exit", True, False)
    assert ending.reason == "cancelled by ann"
    assert life.decide("finished", None, 0, word, sent, History(cancel_wish="ann"), LIMITS).outcome == "finished"


def test_a_wish_stands_until_the_run_is_submitted_again() -> None:
    def told(*events: tuple[str, dict[str, Any]]) -> History:
        return summarise({"event": name, "time": 1.0 + n, **fields} for n, (name, fields) in enumerate(events))

    submitted = ("submitted", {"job_id": "7", "cluster": "h100"})
    asked = ("asked", {"what": "cancel", "user": "ann", "job_id": "7"})
    started = ("attempt_started", {"attempt": 1, "job_id": "7"})
    again = ("submitted", {"job_id": "8", "cluster": "h100"})
    assert told(submitted, asked, started).cancel_wish == "ann"
    assert told(submitted, asked, submitted).cancel_wish == "ann"  # written late, of the same job
    assert told(submitted, asked, again).cancel_wish is None
    assert told(submitted, ("asked", {"what": "hold", "user": "ann", "job_id": "7"})).held_by == "ann"
    assert told(submitted, ("asked", {"what": 3})).cancel_wish is None


def record(job_id: str, dependency: str = "", state: str = "PENDING") -> slurm.JobRecord:
    return slurm.JobRecord(job_id, state, "Dependency", 0, 60, 1, "", "gpu", "", "", dependency, f"/x/{job_id}")


def test_dependents_are_found_through_the_queue() -> None:
    jobs = [
        record("1", state="RUNNING"), record("2", "afterok:1(unfulfilled)"), record("3", "afterok:12(unfulfilled)"),
        record("4", "afterok:9(unfulfilled),afterok:2(unfulfilled)"), record("5", "afterany:1(unfulfilled)"),
        record("6_1", "afterok:7_2(unfulfilled)"), record("8", "afterok:6_1(unfulfilled)"), record("12"),
    ]  # fmt: skip
    assert [job.job_id for job in steer.dependents(["1"], jobs)] == ["2", "4"]
    assert [job.job_id for job in steer.dependents(["7_2"], jobs)] == ["6_1", "8"]
    assert steer.dependents(["7_1"], jobs) == []
    loop = [record("1", "afterok:2(unfulfilled)"), record("2", "afterok:1(unfulfilled)")]
    assert [job.job_id for job in steer.dependents(["1"], loop)] == ["2"]


def test_the_job_of_another_user_is_not_touched(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:  # fmt: skip
    run = RunDirectory(base / "full/sft")
    ledger.append(run.ledger, "submitted", job_id="7", cluster="h100")
    asked = []

    def answer(*argv: str, **options: Any) -> str | slurm.Unknown:
        asked.append(argv[0])
        if argv[0] == "scancel":
            return slurm.Unknown("scancel: error: Kill job error on job id 7: Access/permission denied")
        return "7|ann\n" if "--format=%i|%u" in argv else "7|PENDING|Priority|0:00|1:00|1||gpu|N/A|N/A|(null)|(null)\n"

    monkeypatch.setattr(slurm, "_ask", answer)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    argv = ["full/sft", f"paths.output_base={base}"]
    assert steer.run_command("cancel", argv) == 1
    assert "job 7 is ann's: only ann can cancel it" in capsys.readouterr().out
    assert "scancel" not in asked and not any(e["event"] == "asked" for e in ledger.read(run.ledger))
    monkeypatch.setattr(os, "getuid", lambda: 0)  # SLURM's refusal is shown
    assert steer.run_command("cancel", argv) == 1
    assert "Access/permission denied" in capsys.readouterr().out


def test_slurm_does_not_answer(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What can be done without it is done, and said."""
    for stage, running in ("sft", True), ("dpo", False):
        run = RunDirectory(base / "full" / stage)
        ledger.append(run.ledger, "submitted", job_id="7", cluster="h100")
        if running:
            ledger.append(run.ledger, "attempt_started", attempt=1, job_id="7")
    monkeypatch.setattr(slurm, "_ask", lambda *argv, **options: slurm.Unknown("squeue did not answer within 15 s"))
    words = ["full/sft", "full/dpo", f"paths.output_base={base}"]
    for command in ("hold", "release", "requeue"):
        assert steer.run_command(command, words) == 1
        assert capsys.readouterr().out.count("nothing done: squeue did not answer") == 2
    assert steer.run_command("cancel", words) == 1
    out = capsys.readouterr().out
    assert "sft  asked to save and leave; SLURM does not answer" in out
    assert "dpo  noted: it ends when it starts; SLURM does not answer" in out
    assert RunDirectory(base / "full/sft").stop_requested(1)
    begun = life.begin(RunDirectory(base / "full/dpo"), "7", ["n1"])
    assert begun.code == life.CANCELLED and begun.says == f"cancelled by {steer.me()}"
    assert summarise(ledger.read(RunDirectory(base / "full/dpo").ledger)).cancelled


# ---------------------------------------------------------------------------------------- on a real SLURM


@pytest.fixture
def chain(runs: Callable[..., SlurmRun]) -> Iterator[Callable[..., list[SlurmRun]]]:
    """Submits sft, and dpo after it, as a pipeline."""

    def make(behave: str, **options: Any) -> list[SlurmRun]:
        made = [runs(behave, "sft", **options), runs("finish", "dpo")]
        stages = {r.run.name: {"run_dir": str(r.run.root), "after": ["sft"][:n]} for n, r in enumerate(made)}
        (made[0].run.root.parent / "pipeline.json").write_text(json.dumps({"stages": stages}))
        made[0].submit()
        made[1].submit(made[0].job_id)
        return made

    yield make


def command(name: str, run: SlurmRun, *words: str) -> int:
    return steer.run_command(name, [*(words or [run.run.name]), f"paths.output_base={run.run.root.parent.parent}"])


def states(run: SlurmRun) -> dict[str, tuple[str, str | None]]:
    rows = collect(run.run.root.parent.parent, [])
    return {row["stage"]: (row["state"], row["reason"]) for row in rows}


@pytest.mark.slurm
def test_cancel_saves_first_takes_its_dependents_along_and_goes_on_later(
    chain: Callable[..., list[SlurmRun]], capsys: Any
) -> None:  # fmt: skip
    sft, dpo = chain("wait finish")
    sft.rank(1)
    assert command("cancel", sft) == 0
    out = capsys.readouterr().out
    assert f"job {sft.job_id} saves and leaves" in out and "cancelled; saved at step 1" in out, out
    user = steer.me()
    (end,) = sft.ends()
    assert (end["outcome"], end["action"], end["reason"]) == ("cancelled", "exit", f"cancelled by {user}")
    assert job(sft.cluster, sft.job_id)["JobState"] == "CANCELLED"
    wait_state(sft.cluster, dpo.job_id, "CANCELLED")
    assert states(sft) == {
        "sft": ("cancelled", f"cancelled by {user}"),
        "dpo": ("cancelled", f"upstream sft was cancelled by {user}"),
    }
    assert sft.history().failures == 0 and dpo.history().attempts == 0
    assert command("cancel", sft) == 0 and "nothing to cancel: cancelled" in capsys.readouterr().out
    first = sft.job_id
    sft.submit()  # what the pipeline's command does
    dpo.submit(sft.job_id)
    for run in (sft, dpo):
        wait_state(run.cluster, run.job_id, "COMPLETED", timeout=60)
    assert first != sft.job_id and sft.history().attempts == 2 and sft.history().checkpoint_step == 1
    assert command("cancel", sft, "run_name=" + sft.run.pipeline) == 0
    assert capsys.readouterr().out.count("done already") == 2


@pytest.mark.slurm
def test_a_queued_run_is_cancelled_and_now_does_not_wait_for_a_save(
    chain: Callable[..., list[SlurmRun]], capsys: Any
) -> None:  # fmt: skip
    sft, dpo = chain("deaf")
    sft.rank(1)
    assert command("cancel", dpo, "dpo") == 0
    assert f"dpo  job {dpo.job_id} cancelled" in capsys.readouterr().out
    assert dpo.history().reason == f"cancelled by {steer.me()}" and sft.history().running
    assert command("cancel", sft, "sft", "--now") == 0
    assert "cancelled; nothing was saved" in capsys.readouterr().out
    assert job(sft.cluster, sft.job_id)["JobState"] == "CANCELLED" and sft.history().cancelled


@pytest.mark.slurm
def test_a_wish_outlives_a_requeue_that_comes_in_between(runs: Callable[..., SlurmRun]) -> None:
    """The next attempt finds it, whoever wrote it and whoever requeued the job."""
    run = runs("wait finish").submit()
    run.rank(1)
    ledger.append(run.run.ledger, "asked", what="cancel", user="ann", job_id=run.job_id)  # and then the command dies
    run.cluster.run("scontrol", "requeue", run.job_id)  # as SLURM does at a preemption
    wait_state(run.cluster, run.job_id, "CANCELLED", timeout=60)
    history = run.history()
    assert history.attempts == 1 and history.cancelled and history.reason == "cancelled by ann"


@pytest.mark.slurm
def test_the_wall_time_comes_while_a_run_is_cancelled(runs: Callable[..., SlurmRun]) -> None:
    run = runs("wait finish").submit()
    run.rank(1)
    ledger.append(run.run.ledger, "asked", what="cancel", user="ann", job_id=run.job_id)
    shell = run.shell()
    for _ in range(3):
        os.kill(shell, signal.SIGUSR1)
    assert [(e["outcome"], e["action"]) for e in run.ends()] == [("cancelled", "exit")]
    wait_state(run.cluster, run.job_id, "CANCELLED", timeout=60)
    assert run.history().checkpoint_step == 1


@pytest.mark.slurm
def test_requeue_saves_and_goes_on_under_the_same_id(chain: Callable[..., list[SlurmRun]], capsys: Any) -> None:
    sft, dpo = chain("wait finish")
    sft.rank(1)
    assert command("requeue", sft, "run_name=" + sft.run.pipeline) == 0
    out = capsys.readouterr().out
    assert f"job {sft.job_id} saves and is requeued" in out and "saved at step 1" in out, out
    assert "dpo  nothing to requeue: waits for other jobs" in out
    (end,) = sft.ends()
    assert (end["outcome"], end["action"]) == ("stopped", "requeue")
    assert job(sft.cluster, sft.job_id)["Restarts"] == "1"
    assert command("requeue", sft) == 0 and "nothing to requeue" in capsys.readouterr().out
    assert command("cancel", sft) == 0  # of one that waits to go on
    out = capsys.readouterr().out
    assert f"dpo  job {dpo.job_id} cancelled: waited for sft" in out and "goes on from there" in out, out
    assert sft.history().cancelled and dpo.history().reason == f"upstream sft was cancelled by {steer.me()}"


@pytest.mark.slurm
def test_hold_saves_and_release_lets_go(chain: Callable[..., list[SlurmRun]], capsys: Any) -> None:
    sft, dpo = chain("wait wait")
    sft.rank(1)
    name = "run_name=" + sft.run.pipeline
    assert command("hold", sft, name) == 0
    out = capsys.readouterr().out
    assert "saves, and is then held" in out and f"dpo  job {dpo.job_id} held" in out, out
    assert "saved at step 1" in out and "python -m launchers.release" in out
    seen = states(sft)
    assert seen["sft"] == ("requeued", "held by the user: python -m launchers.release")
    assert seen["dpo"][1] == "held by the user: python -m launchers.release"
    assert command("requeue", sft) == 0 and "launchers.release lets it go" in capsys.readouterr().out
    assert command("hold", sft) == 0 and "is held already" in capsys.readouterr().out
    assert sft.history().held_by == steer.me()
    assert command("release", sft, name) == 0 and capsys.readouterr().out.count("released") == 2
    sft.rank(2)
    assert states(sft)["dpo"] == ("waiting", "waits for sft")


# ---------------------------------------------------------------------------------------- on this machine


def local_command(capsys: Any, name: str, world: World, *words: str) -> str:
    """What the command said; it must have worked."""
    assert steer.run_command(name, [*words, f"paths.output_base={world.folder}"]) == 0, capsys.readouterr()
    return str(capsys.readouterr().out)


def test_a_local_run_is_cancelled_and_goes_on_later(world: World, capsys: Any) -> None:
    sft = world.add("sft", plan=["wait", "finish"])
    dpo, rm = world.add("dpo", after=["sft"]), world.add("rm")
    supervisor = world.start()
    until(lambda: (sft.root / "started-1").exists(), "sft runs")
    out = local_command(capsys, "cancel", world, "sft")
    assert "sft  local-1 saves and leaves" in out and "cancelled; saved at step 1" in out
    assert supervisor.wait(60) == 1
    user = steer.me()
    assert summarise(ledger.read(sft.ledger)).reason == f"cancelled by {user}"
    assert summarise(ledger.read(dpo.ledger)).reason == f"upstream sft was cancelled by {user}"
    assert manifest.problem(rm.model) is None and "To go on from here" in world.said()
    assert world.supervise() == 0 and manifest.problem(dpo.model) is None
    assert summarise(ledger.read(sft.ledger)).attempts == 2


def test_a_local_run_is_requeued_killed_and_not_held(world: World, capsys: Any) -> None:
    sft = world.add("sft", plan=["wait", "wait"])
    supervisor = world.start()
    until(lambda: summarise(ledger.read(sft.ledger)).running and (sft.root / "started-1").exists(), "sft runs")
    assert steer.run_command("hold", ["sft", f"paths.output_base={world.folder}"]) == 1
    assert "runs on this machine, where nothing queues" in capsys.readouterr().out
    assert "saved at step 1; goes on" in local_command(capsys, "requeue", world, "sft")
    until(lambda: (sft.root / "started-2").exists(), "it goes on")
    out = local_command(capsys, "cancel", world, "sft", "--now")
    assert "local-1 killed" in out and "cancelled; saved at step 1" in out
    assert supervisor.wait(60) == 1
    history = summarise(ledger.read(sft.ledger))
    assert history.cancelled and history.attempts == 2 and history.checkpoint_step == 1
