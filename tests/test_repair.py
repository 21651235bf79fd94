"""Repair: what is wrong is found from a frozen snapshot, what is done about it makes it right, and what is healthy, or
not known, is left alone; and a really broken set of runs on a real SLURM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launchers import repair, slurm
from launchers.repair import Act, Run, Snapshot, plan
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests.slurm_fixture import job, wait_state
from tests.test_failures import SlurmRun, _argv, runs

__all__ = ["runs"]


def record(
    job_id: str, folder: str = "", state: str = "PENDING", reason: str = "None", after: tuple[str, ...] = ()
) -> slurm.JobRecord:  # fmt: skip
    dependency = ",".join(f"afterok:{up}(unfulfilled)" for up in after)
    return slurm.JobRecord(job_id, state, reason, 0, 60, 1, "", "gpu", "", "", dependency, folder)


def snapshot(runs: list[Run], jobs: list[slurm.JobRecord], **more: Any) -> Snapshot:
    return Snapshot(base=("/o",), runs=tuple(runs), jobs={None: tuple(jobs)}, **more)


def a_run(name: str, job_id: str | None = None, *upstream: str, **more: Any) -> Run:
    given = {"expected": job_id is not None and not more.get("running"), **more}
    return Run(f"/o/p/{name}", f"p/{name}", job_id=job_id, upstream=tuple(f"/o/p/{up}" for up in upstream), **given)


SFT = a_run("sft", "1", running=True, attempts=2)
RUNS = record("1", "/o/p/sft", "RUNNING")
NEVER = "DependencyNeverSatisfied"
CASES: dict[str, tuple[Snapshot, list[tuple[str, str]]]] = {
    "a job of an array is known by its id": (
        snapshot([a_run("sft", "5_1")], [record("5_1", "/o/p"), record("5_2", "/o/p")]), []
    ),
    "several tasks of an array": (
        snapshot(
            [a_run("sft", "5_1"), a_run("dpo", "6_1", "sft")],
            [record("5_1", "/o/p/sft"), record("5_2", "/o/p/sft"), record("6_1", "/o/p/sft", after=("5_1",))],
        ), [],
    ),
    "its upstream gave up": (
        snapshot([a_run("sft", "1", expected=False), a_run("dpo", "2", "sft")],
                 [record("2", "/o/p/dpo", reason=NEVER, after=("1",))]),
        [("never starts", "cancel")],
    ),
    "and what waits for that": (
        snapshot([a_run("sft", "1", expected=False), a_run("dpo", "2", "sft"), a_run("grpo", "3", "dpo")],
                 [record("2", "/o/p/dpo", after=("1",)), record("3", "/o/p/grpo", after=("2",))]),
        [("never starts", "cancel"), ("never starts", "cancel")],
    ),
    "it waits for the job before the last": (
        snapshot([SFT, a_run("dpo", "2", "sft")], [RUNS, record("2", "/o/p/dpo", reason=NEVER, after=("9",))]),
        [("waits in vain", "wait_for")],
    ),
    "all it needs is done": (
        snapshot([a_run("sft", "1", done=True), a_run("dpo", "2", "sft")],
                 [record("2", "/o/p/dpo", reason=NEVER, after=("1",))]),
        [("waits in vain", "wait_for")],
    ),
    "its start failed": (
        snapshot([a_run("sft", "1")], [record("1", "/o/p/sft", reason="launch failed requeued held")]),
        [("held", "release")],
    ),
    "held by an administrator": (
        snapshot([a_run("sft", "1")], [record("1", "/o/p/sft", reason="JobHeldAdmin")]), [("held", "")]
    ),
    "held by scontrol": (
        snapshot([a_run("sft", "1")], [record("1", "/o/p/sft", reason="JobHeldUser")]), [("held", "")]
    ),
    "held by us": (
        snapshot([a_run("sft", "1", held_by="ann")], [record("1", "/o/p/sft", reason="JobHeldUser")]), []
    ),
    "two jobs": (snapshot([SFT], [RUNS, record("2", "/o/p/sft")]), [("duplicate", "cancel")]),
    "two jobs that run": (snapshot([SFT], [RUNS, record("2", "/o/p/sft", "RUNNING")]), [("duplicate", "")]),
    "a job that nobody wrote down": (
        snapshot([a_run("sft")], [record("2", "/o/p/sft")]), [("unknown job", "adopt")]
    ),
    "its folder is gone": (snapshot([SFT], [RUNS, record("2", "/o/p/rm")]), [("orphan", "cancel")]),
    "a job of another folder": (snapshot([SFT], [RUNS, record("2", "/elsewhere/p/rm")]), []),
    "its job is gone": (snapshot([SFT], []), [("vanished", "close")]),
    "its job ended": (snapshot([SFT], [replace(RUNS, state="FAILED")]), [("vanished", "close")]),
    "its job was requeued": (snapshot([SFT], [replace(RUNS, state="PENDING")]), []),
    "its job is gone before it started": (snapshot([a_run("sft", "1")], []), [("vanished", "lost")]),
    "done and not closed": (snapshot([replace(SFT, done=True)], []), [("not closed", "finish")]),
    "a wish that did not reach its job": (
        snapshot([a_run("sft", "1", cancel_job="1")], [record("1", "/o/p/sft")]), [("cancelled", "cancel")]
    ),
    "cancelled, and its job asked to leave": (snapshot([replace(SFT, cancel_job="1")], [RUNS]), []),
    "a local one": (snapshot([replace(SFT, local=True)], []), [("vanished", "close")]),
    "a local one that lives": (snapshot([replace(SFT, local=True, owned=True)], []), []),
    "on another cluster": (snapshot([replace(SFT, elsewhere="b")], []), []),
    "temporary files": (snapshot([], [], leftovers=("/o/p/.x.1.tmp",)), [("leftover", "unlink")]),
    "half made": (snapshot([], [], half_made=("/o/p/rm",)), [("half made", "rmtree")]),
    "half made, and a job is to come": (
        snapshot([], [record("2", "/o/p/rm")], half_made=("/o/p/rm",)), [("orphan", "cancel")]
    ),
    "not ours": (
        snapshot([a_run("sft", "1", expected=False), a_run("dpo", "2", "sft")],
                 [record("2", "/o/p/dpo", after=("1",))], foreign=frozenset("2")),
        [("never starts", "")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    seen, expected = CASES[name]
    assert [(finding.kind, finding.act.do if finding.act else "") for finding in plan(seen)] == expected


def test_slurm_does_not_answer() -> None:
    silent = {None: slurm.Unknown("squeue did not answer")}
    seen = replace(CASES["its job is gone"][0], jobs=silent, half_made=("/o/p/rm",))
    (finding,) = plan(seen)
    assert finding.kind == "unknown" and finding.act is None and "squeue did not answer" in finding.what


# --------------------------------------------------------------------------------------------- simulated


def done(seen: Snapshot, act: Act) -> Snapshot:
    """The snapshot after an act; SLURM does nothing of its own."""
    found = list(seen.runs)
    jobs = {conf: list(some) for conf, some in seen.jobs.items() if not isinstance(some, slurm.Unknown)}
    mine = jobs.get(act.conf, [])

    def on_run(**changes: Any) -> None:
        found[:] = [replace(run, **changes) if run.folder == act.target else run for run in found]

    def on_job(**changes: Any) -> None:
        mine[:] = [replace(job, **changes) if job.job_id == act.job_id else job for job in mine]

    match act.do:
        case "cancel":
            on_job(state="CANCELLED")
            on_run(cancelled=True, expected=False)
        case "wait_for":
            on_job(dependency=",".join(f"afterok:{i}(unfulfilled)" for i in act.ids), reason="Dependency")
        case "release":
            on_job(reason="None")
        case "adopt":
            on_run(job_id=act.job_id, expected=True, running=False, cancelled=False, cancel_job=None, held_by=None)
        case "close" | "lost" | "finish":
            on_run(running=False, expected=False)
        case "unlink":
            return replace(seen, leftovers=tuple(p for p in seen.leftovers if p != act.target))
        case "rmtree":
            return replace(seen, half_made=tuple(p for p in seen.half_made if p != act.target))
    return replace(seen, runs=tuple(found), jobs={**seen.jobs, **{conf: tuple(some) for conf, some in jobs.items()}})


@st.composite
def broken(draw: st.DrawFn) -> Snapshot:
    """Anything at all: runs, and jobs of theirs or of nobody's."""
    names = "abcdef"[: draw(st.integers(1, 6))]
    ids = st.sampled_from(["1", "2", "3", "4", "5", "7_1", "7_2"])
    found = []
    for number, name in enumerate(names):
        running = draw(st.booleans())
        job_id = draw(st.none() | ids)
        if job_id in {run.job_id for run in found}:  # a job is one run's
            job_id = None
        found.append(
            a_run(
                name, job_id, *draw(st.sets(st.sampled_from(names[:number]))) if number else (),
                running=running, expected=not running and draw(st.booleans()), done=draw(st.booleans()),
                cancelled=draw(st.booleans()), cancel_job=draw(st.none() | ids), attempts=1,
                local=draw(st.integers(0, 5)) == 0, owned=draw(st.booleans()),
                held_by=draw(st.sampled_from([None, "ann"])), here=draw(st.integers(0, 5)) > 0,
                elsewhere=draw(st.sampled_from([None, None, None, "other"])),
            )
        )  # fmt: skip
    folders = st.sampled_from([*(run.folder for run in found), "/o/p/gone", "/x/other", ""])
    reasons = ["None", "Dependency", NEVER, "JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "Priority"]
    jobs = [
        record(
            job_id, draw(folders), draw(st.sampled_from(["PENDING", "PENDING", "RUNNING", "COMPLETING", "FAILED"])),
            draw(st.sampled_from(reasons)), tuple(draw(st.sets(ids, max_size=2))),
        )
        for job_id in draw(st.sets(ids))
    ]  # fmt: skip
    foreign = frozenset(draw(st.sets(ids, max_size=1)))
    return snapshot(found, jobs, foreign=foreign, leftovers=("/o/p/.x.tmp",), half_made=("/o/p/half",))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(broken())
def test_a_plan_that_was_done_leaves_nothing_to_do(seen: Snapshot) -> None:
    acts = [finding.act for finding in plan(seen) if finding.act is not None]
    jobs = {job.job_id: job for some in seen.jobs.values() if not isinstance(some, slurm.Unknown) for job in some}
    for act in acts:
        if act.job_id is not None:
            assert act.job_id not in seen.foreign and jobs[act.job_id].live
            assert act.do != "cancel" or jobs[act.job_id].state == "PENDING"
    after = seen
    for act in acts:
        after = done(after, act)
    assert [finding for finding in plan(after) if finding.act is not None] == []


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.sampled_from(["RUNNING", "PENDING", "COMPLETING"]), st.data())
def test_what_is_healthy_is_left_alone(stages: int, finished: int, state: str, data: st.DataObject) -> None:
    """A chain as it is submitted: some stages done, the next one at work, all others waiting."""
    found, jobs = [], []
    for number in range(stages):
        after = [str(up) for up in data.draw(st.sets(st.integers(0, number - 1), max_size=2))] if number else []
        if number < finished:
            found.append(a_run(str(number), str(number + 1), *after, done=True, expected=False))
            if data.draw(st.booleans()):  # squeue still remembers
                jobs.append(record(str(number + 1), f"/o/p/{number}", "COMPLETED"))
            continue
        waits = tuple(str(int(up) + 1) for up in after if int(up) >= finished)
        first = number == finished
        running = first and state != "PENDING"
        found.append(a_run(str(number), str(number + 1), *after, running=running))
        waits = () if first else waits
        reason = "Dependency" if waits else data.draw(st.sampled_from(["Priority", "Resources", "BeginTime"]))
        jobs.append(record(str(number + 1), f"/o/p/{number}", state if first else "PENDING", reason, waits))
    assert plan(snapshot(found, jobs)) == []


# ----------------------------------------------------------------------------------------------- on files


def test_local_runs_and_leftovers(tmp_path: Path, capsys: Any) -> None:
    for name in ("sft", "dpo"):
        run = RunDirectory(tmp_path / "p" / name)
        run.create()
        run.config.write_text(yaml.safe_dump({"stage": "sft", "cluster": {"scheduler": "local"}, "inputs": {}}))
        ledger.append(run.ledger, "submitted", job_id="local-1", cluster="local")
        ledger.append(run.ledger, "attempt_started", attempt=1, job_id="local-1")
    whole = RunDirectory(tmp_path / "p" / "dpo")
    whole.model.mkdir()
    manifest.write(whole.model, identity="x")
    temporary, young = tmp_path / "p/sft/.config.yaml.77.tmp", tmp_path / "p/sft/slurm/.job.sh.78.tmp"
    half = RunDirectory(tmp_path / "p" / "rm")
    half.create()
    for path in (temporary, young):
        path.write_text("")
    for path in (temporary, half.slurm, half.root):
        os.utime(path, (1, 1))
    argv = [f"paths.output_base={tmp_path}"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert repair.main(argv) == 1
    text = capsys.readouterr().out
    assert "p/sft  vanished: attempt 1 was never closed: its supervisor and its job are gone" in text
    assert "4 to repair: the same command with --apply does it" in text
    assert repair.main([*argv, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["findings"]
    assert sorted(f["kind"] for f in told) == ["half made", "leftover", "not closed", "vanished"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert repair.main([*argv, "--apply"]) == 0, capsys.readouterr().out
    assert not temporary.exists() and young.exists() and not half.root.exists()
    assert summarise(ledger.read(whole.ledger)).outcome == "finished"
    history = summarise(ledger.read(tmp_path / "p/sft/ledger.jsonl"))
    assert history.gave_up and "the same command goes on" in str(history.reason)
    capsys.readouterr()
    assert repair.main(argv) == 0 and "nothing to repair" in capsys.readouterr().out
    assert repair.main(["paths.output_base=/no/such"]) == 2


def test_what_a_run_waits_for_is_what_its_pipeline_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation compares with a model that it does not wait for."""
    folder = tmp_path / "p"
    stages = {"base": [], "sft": ["base"], "dpo": ["sft"], "eval_dpo": ["dpo"], "by_hand": None}
    lines = []
    for number, (name, after) in enumerate(stages.items(), 1):
        run = RunDirectory(folder / name)
        run.create()
        inputs: dict[str, Any] = {up: {"run_dir": str(folder / up), "path": "x"} for up in after or ["dpo"]}
        if name in ("eval_dpo", "by_hand"):
            inputs["reference"] = {"run_dir": str(folder / "sft"), "path": "x", "derived": True}
        run.config.write_text(yaml.safe_dump({"cluster": {"scheduler": "slurm"}, "inputs": inputs}))
        ledger.append(run.ledger, "submitted", job_id=str(number), cluster="h100")
        up = {"base": "", "by_hand": "3"}.get(name, str(number - 1))
        wait = f"afterok:{up}(unfulfilled)" if up else ""
        lines.append(f"{number}|PENDING|Priority|0:00|1:00|1||gpu|N/A|N/A|{wait}|{run.root}")
    described = {n: {"run_dir": str(folder / n), "after": a} for n, a in stages.items() if a is not None}
    (folder / "pipeline.json").write_text(json.dumps({"stages": described}))
    asked: list[tuple[str, ...]] = []

    def answer(*argv: str, **options: Any) -> str:
        asked.append(argv)
        return "ClusterName = h\n" if argv[0] == "scontrol" else "\n".join(lines)

    monkeypatch.setattr(slurm, "_ask", answer)
    assert plan(repair.take(tmp_path, [])) == []
    assert [argv[0] for argv in asked].count("squeue") == 1
    lines.pop(0)  # base is gone, and all that waits for it
    found = plan(repair.take(tmp_path, []))
    assert [finding.kind for finding in found] == ["vanished", *["never starts"] * 4]


# ---------------------------------------------------------------------------------------- on a real SLURM


@pytest.mark.slurm
def test_a_broken_set_is_repaired(runs: Callable[..., SlurmRun], capsys: Any) -> None:
    made: dict[str, SlurmRun] = {}

    def make(name: str, *upstream: str) -> SlurmRun:
        made[name] = run = runs("wait", name)
        config = run.run.read_config()
        config["inputs"] = {up: {"run_dir": str(made[up].run.root), "path": str(made[up].run.model)} for up in upstream}
        run.run.config.write_text(yaml.safe_dump(config))
        return run

    def by_hand(run: RunDirectory | Path, *options: str, written: bool = True) -> str:
        root = run if isinstance(run, Path) else run.root
        job_id = cluster.run(
            "sbatch", "--parsable", "-p", "gpu", "-o", "/dev/null", f"--comment={root}", *options, "--wrap=sleep 600"
        ).strip()  # fmt: skip
        if written and isinstance(run, RunDirectory):
            ledger.append(run.ledger, "submitted", job_id=job_id, cluster="dev")
        extra.append(job_id)
        return job_id

    extra: list[str] = []
    later = "--begin=now+3600"
    dead = make("dead")
    cluster, base = dead.cluster, dead.run.root.parent.parent
    try:
        dead.submit()
        dead.rank(1)
        never = by_hand(make("never", "dead").run, f"--dependency=afterok:{dead.job_id}", "--kill-on-invalid-dep=no")
        told = [p for p in psutil.process_iter() if any(str(dead.run.root) in argument for argument in _argv(p))]
        told.append(psutil.Process(dead.shell()))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # all that could still tell, its guard too
            for process in told:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        old = by_hand(make("again").run, later)
        vain = by_hand(make("vain", "again").run, f"--dependency=afterok:{old}", "--kill-on-invalid-dep=no")
        cluster.run("scancel", old)
        new = by_hand(made["again"].run, later)
        double = by_hand(made["again"].run, later, written=False)
        unknown = by_hand(make("unknown").run, later, written=False)
        orphan = by_hand(base / "it's 1 pipe" / "gone", later)
        well = by_hand(make("well").run, later)
        wait_state(cluster, dead.job_id, "FAILED", "CANCELLED", "COMPLETED", timeout=60)
        argv = [f"paths.output_base={base}"]
        assert repair.main([*argv, "--json"]) == 1
        told = json.loads(capsys.readouterr().out)["findings"]
        found = {(f["where"].rpartition("/")[2], f["kind"], f["act"]["do"], f["act"]["job_id"]) for f in told}
        assert found == {
            ("dead", "vanished", "close", None), ("never", "never starts", "cancel", never),
            ("vain", "waits in vain", "wait_for", vain), ("again", "duplicate", "cancel", double),
            ("unknown", "unknown job", "adopt", unknown), (orphan, "orphan", "cancel", orphan),
        }  # fmt: skip
        assert all(job(cluster, i)["JobState"] == "PENDING" for i in (never, vain, new, double, unknown, orphan, well))
        assert repair.main([*argv, "--apply"]) == 0, capsys.readouterr().out
        assert "vain" in capsys.readouterr().out
        assert [job(cluster, i)["JobState"] for i in (never, double, orphan)] == ["CANCELLED"] * 3
        assert [job(cluster, i)["JobState"] for i in (vain, new, unknown, well)] == ["PENDING"] * 4
        assert job(cluster, vain)["Dependency"] == f"afterok:{new}(unfulfilled)"
        assert summarise(ledger.read(made["unknown"].run.ledger)).job_id == unknown
        assert made["dead"].history().gave_up and made["never"].history().reason == "waited for dead, which ended"
        assert repair.main(argv) == 0, capsys.readouterr().out
    finally:
        cluster.run("scancel", *extra, check=False)
