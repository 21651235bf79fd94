"""What status says: every state from every mixture of sources, and the same in table and JSON."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launchers import local, runs, site, slurm, states, status, table
from launchers.errors import LaunchError
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import History, summarise

REPO = Path(__file__).resolve().parent.parent
NOT_WHOLE = "no manifest.json"


def job(state: str, reason: str = "None", elapsed: int | None = 65) -> slurm.JobRecord:
    return slurm.JobRecord("7", state, reason, elapsed, 3600, 2, "n[1-2]", "gpu", "N/A", "N/A", "", "")


def story(*events: str, cluster: str = "h100", job_id: str = "7") -> History:
    """A history from short words, through the real ledger events."""
    told: list[dict[str, Any]] = []
    for number, word in enumerate(events):
        fields: dict[str, Any] = {
            "submitted": {"event": "submitted", "job_id": job_id, "cluster": cluster},
            "started": {"event": "attempt_started", "attempt": number, "job_id": job_id, "node": "n1"},
            "training": {"event": "training_started", "attempt": number, "step": 0},
            "stop": {"event": "stop_requested", "attempt": number, "signal": "USR1"},
            "requeue": {"outcome": "stopped", "action": "requeue", "reason": None},
            "failed": {"outcome": "failed", "action": "requeue", "reason": "exit status 1"},  # ledgers of version 0.1
            "crash": {"outcome": "crashed", "action": "requeue", "reason": "exit status 1"},
            "gave up": {"outcome": "crashed", "action": "exit", "reason": "exit status 1; gave up"},
            "lost": {"outcome": "node_lost", "action": "requeue", "reason": "n3 is gone"},
            "memory": {"outcome": "out_of_memory", "action": "requeue", "reason": None},
            "no memory": {"outcome": "out_of_memory", "action": "exit", "reason": "CUDA; gave up"},
            "hung": {"outcome": "hung", "action": "exit", "reason": "no step for 30 minutes; gave up"},
            "preempted": {"outcome": "preempted", "action": "exit", "reason": None},
            "killed": {"outcome": "cancelled", "action": "exit", "reason": "scancel"},
            "late": {"outcome": "stopped", "action": "requeue", "reason": "left without saving (status 124)"},
            "stopped": {"outcome": "stopped", "action": "exit", "reason": "stopped on request"},
            "finished": {"outcome": "finished", "action": "exit", "reason": None},
            "cancelled": {"event": "cancelled", "reason": "upstream rm failed: exit status 1"},
        }[word]  # fmt: skip
        told.append({"time": 1000.0 + number, "event": "attempt_ended", **fields})
    return summarise(told)


RUNNING = ("submitted", "started", "training")
UNKNOWN = slurm.Unknown("squeue did not answer within 15 s")
SLURM_CASES: list[tuple[tuple[str, ...], Any, str, str | None]] = [
    # the ledger alone
    ((), None, "waiting", "not submitted yet"),
    (("cancelled",), None, "cancelled", "upstream rm failed: exit status 1"),
    # pending
    (("submitted",), job("PENDING", "Dependency"), "waiting", "waits for sft, rm"),
    (("submitted",), job("PENDING", "DependencyNeverSatisfied"), "waiting", "an upstream job failed: can never start"),
    (("submitted",), job("PENDING", "Priority"), "queued", "other jobs come first"),
    (("submitted",), job("PENDING", "Resources"), "queued", "waits for free nodes"),
    (("submitted",), job("PENDING", "QOSMaxJobsPerUserLimit"), "queued", "you run as many jobs as the QOS allows"),
    (("submitted",), job("PENDING", "QOSGrpNewLimit"), "queued", "a limit of the QOS is reached (QOSGrpNewLimit)"),
    (("submitted",), job("PENDING", "AssocGrpX"), "queued", "a limit of your account is reached (AssocGrpX)"),
    (("submitted",), job("PENDING", "ReqNodeNotAvail, UnavailableNodes:n3"), "queued",
     "a node it needs is down, drained or reserved"),
    (("submitted",), job("PENDING", "NewReason"), "queued", "SLURM says: NewReason"),
    (("submitted",), job("CONFIGURING"), "queued", "the nodes are being made ready"),
    # pending again: a requeue by the script, by SLURM in the middle of an attempt, and after a preemption
    ((*RUNNING, "requeue"), job("PENDING", "BeginTime"), "requeued", "held for a moment after a requeue"),
    (RUNNING, job("PENDING", "NodeFailure"), "requeued", "a node failed; SLURM starts it again"),
    ((*RUNNING, "stop", "stopped"), job("PENDING", "BeginTime"), "requeued", "held for a moment after a requeue"),
    ((*RUNNING, "gave up", "submitted"), job("PENDING", "Priority"), "queued", "other jobs come first"),
    ((*RUNNING, "lost"), job("PENDING", "BeginTime"), "requeued",
     "held for a moment after a requeue; the last attempt lost a node: n3 is gone"),
    ((*RUNNING, "memory"), job("PENDING", "Priority"), "requeued",
     "other jobs come first; the last attempt ran out of memory"),
    ((*RUNNING, "failed"), job("PENDING", "Priority"), "requeued",
     "other jobs come first; the last attempt crashed: exit status 1"),
    ((*RUNNING, "stop", "preempted"), job("PENDING", "BeginTime"), "requeued",
     "held for a moment after a requeue; the last attempt was preempted"),
    ((*RUNNING, "stop", "late"), job("PENDING", "BeginTime"), "requeued",
     "held for a moment after a requeue; left without saving (status 124)"),
    (RUNNING, job("REQUEUED"), "requeued", "SLURM is requeueing it"),
    (RUNNING, job("REQUEUE_HOLD"), "requeued", "held: python -m launchers.release"),
    (RUNNING, job("PREEMPTED"), "requeued", "preempted by a job that comes first"),
    # running
    (("submitted",), job("RUNNING"), "running", "starting"),
    (("submitted", "started"), job("RUNNING"), "running", "starting"),
    (RUNNING, job("RUNNING"), "running", None),
    ((*RUNNING, "stop"), job("RUNNING"), "stopping", "asked to save and leave"),
    ((*RUNNING, "cancelled"), job("RUNNING"), "stopping", "asked to save and leave"),
    ((*RUNNING, "stop", "requeue"), job("RUNNING"), "requeued", "SLURM is about to requeue it"),
    (RUNNING, job("SUSPENDED"), "running", "suspended by SLURM"),
    (RUNNING, job("COMPLETING"), "stopping", "ending"),
    ((*RUNNING, "crash"), job("COMPLETING"), "requeued", "SLURM is requeueing it"),
    ((*RUNNING, "gave up"), job("COMPLETING"), "failed", "exit status 1; gave up"),
    # ended, and squeue still remembers
    ((*RUNNING, "gave up"), job("FAILED", "NonZeroExitCode"), "failed", "exit status 1; gave up"),
    (RUNNING, job("FAILED"), "failed", "job 7 failed"),
    (RUNNING, job("TIMEOUT"), "failed", "job 7 was killed at its wall time"),
    (RUNNING, job("OUT_OF_MEMORY"), "failed", "job 7 ran out of memory on a node"),
    (RUNNING, job("NODE_FAIL"), "failed", "job 7 lost a node, and SLURM did not requeue it"),
    (RUNNING, job("CANCELLED"), "cancelled", "scancel"),
    (("submitted", "cancelled"), job("CANCELLED"), "cancelled", "upstream rm failed: exit status 1"),
    (RUNNING, job("COMPLETED"), "failed", "job 7 ended without a complete output: no manifest.json"),
    (RUNNING, job("NEW_STATE"), "unknown", "SLURM says: NEW_STATE"),
    # forgotten: the sources contradict each other
    (RUNNING, None, "failed", "SLURM no longer knows job 7 and the run did not finish"),
    ((*RUNNING, "requeue"), None, "failed", "SLURM no longer knows job 7 and it was to be started again"),
    ((*RUNNING, "stop", "stopped"), None, "cancelled", "stopped on request"),
    ((*RUNNING, "gave up"), None, "failed", "exit status 1; gave up"),
    ((*RUNNING, "no memory"), None, "failed", "ran out of memory: CUDA; gave up"),
    ((*RUNNING, "hung"), job("FAILED"), "failed", "hung: no step for 30 minutes; gave up"),
    ((*RUNNING, "killed"), None, "cancelled", "scancel"),
    ((*RUNNING, "preempted"), None, "failed",
     "SLURM no longer knows job 7 and it was to be started again; the last attempt was preempted"),
    ((*RUNNING, "finished"), None, "failed", "it finished, but its output is not complete: no manifest.json"),
    (("submitted",), None, "cancelled", "SLURM no longer knows job 7 and it never started"),
    # SLURM does not answer
    (("submitted",), UNKNOWN, "unknown", "squeue did not answer within 15 s (the ledger says: submitted)"),
    (RUNNING, UNKNOWN, "unknown", "squeue did not answer within 15 s (the ledger says: running)"),
    ((*RUNNING, "stop", "stopped"), UNKNOWN, "unknown", "squeue did not answer within 15 s (the ledger says: stopped)"),
    ((*RUNNING, "gave up"), UNKNOWN, "failed", "exit status 1; gave up"),
    ((*RUNNING, "hung"), UNKNOWN, "failed", "hung: no step for 30 minutes; gave up"),
    ((*RUNNING, "lost"), UNKNOWN, "unknown", "squeue did not answer within 15 s (the ledger says: node_lost)"),
    (("submitted", "cancelled"), UNKNOWN, "cancelled", "upstream rm failed: exit status 1"),
]  # fmt: skip


@pytest.mark.parametrize(("events", "record", "state", "reason"), SLURM_CASES)
def test_state_of_a_slurm_run(events: tuple[str, ...], record: Any, state: str, reason: str | None) -> None:
    assert states.row_state(story(*events), NOT_WHOLE, record, False, ("sft", "rm")) == (state, reason)


@pytest.mark.parametrize("record", [None, UNKNOWN, job("RUNNING"), job("COMPLETING"), job("PENDING"), job("FAILED")])
@pytest.mark.parametrize("events", [(*RUNNING, "finished"), RUNNING, ("submitted", "cancelled"), ()])
def test_a_whole_output_is_done_whatever_else_is_said(events: tuple[str, ...], record: Any) -> None:
    assert states.row_state(story(*events), None, record, False)[0] == "done"


GONE = "its supervisor and its job are gone and"
LOCAL_CASES: list[tuple[tuple[str, ...], bool, tuple[str, ...], str, str | None]] = [
    (("submitted",), True, ("sft",), "waiting", "waits for sft"),
    (("submitted",), True, (), "queued", "waits for free cores"),
    (("submitted", "started"), True, (), "running", "starting"),
    (RUNNING, True, (), "running", None),
    ((*RUNNING, "stop"), True, (), "stopping", "asked to save and leave"),
    ((*RUNNING, "crash"), True, (), "requeued", "the last attempt crashed: exit status 1"),
    ((*RUNNING, "requeue"), True, (), "requeued", "starts again at once"),
    ((*RUNNING, "gave up"), True, (), "failed", "exit status 1; gave up"),
    (("submitted",), False, (), "cancelled", f"{GONE} it never started; the same command goes on"),
    (RUNNING, False, (), "failed", f"{GONE} the run did not finish; the same command goes on"),
    ((*RUNNING, "requeue"), False, (), "failed", f"{GONE} it was to be started again; the same command goes on"),
    ((*RUNNING, "cancelled"), False, (), "cancelled", "upstream rm failed: exit status 1"),
    ((*RUNNING, "gave up"), False, (), "failed", "exit status 1; gave up"),
]


@pytest.mark.parametrize(("events", "alive", "waits_for", "state", "reason"), LOCAL_CASES)
def test_state_of_a_local_run(
    events: tuple[str, ...], alive: bool, waits_for: tuple[str, ...], state: str, reason: str | None
) -> None:
    history = story(*events, cluster="local", job_id="local-1")
    assert states.row_state(history, NOT_WHOLE, None, alive, waits_for) == (state, reason)


def test_every_state_has_a_case() -> None:
    seen = {case[2] for case in SLURM_CASES} | {case[3] for case in LOCAL_CASES}
    assert seen | {"done", "gated"} == set(states.STATES)


# ------------------------------------------------------------------------------------ whole pipelines


class Outputs:
    """An outputs folder, and an squeue that says what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.base, self.bin, self.graph = folder / "outputs", folder / "bin", {}
        self.bin.mkdir()
        self.base.mkdir()
        self.squeue("")

    def squeue(self, answer: str, code: int = 0, error: str = "") -> None:
        path = self.bin / "squeue"
        (self.bin / "answer").write_text(answer)
        path.write_text(
            f'#!/bin/sh\necho "$@" >>"{self.bin}/calls"\ncat "{self.bin}/answer"\necho "{error}" >&2\nexit {code}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[str]:
        path = self.bin / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def run(
        self, name: str, stage: str = "sft", after: tuple[str, ...] = (), job_id: str | None = None, done: bool = False,
        events: tuple[dict[str, Any], ...] = (), results: dict[str, Any] | None = None, pipeline: str = "full",
        cluster: str = "h100", steps: int = 0, **figures: float,
    ) -> RunDirectory:  # fmt: skip
        run = RunDirectory(self.base / pipeline / name)
        run.create()
        inputs = {
            key: {"path": str(run.root.parent / parent / "model"), "run_dir": str(run.root.parent / parent)}
            for key, parent in zip(("model", "reward_model"), after, strict=False)
        }
        config = {
            "name": name, "stage": stage, "inputs": inputs, "training": {"max_steps": 300},
            "cluster": {"scheduler": "local" if cluster == "local" else "slurm", "slurm_conf": None},
            "slurm": {"wall_time": "24:00:00", "num_nodes": 2},
        }  # fmt: skip
        run.config.write_text(json.dumps(config))
        if job_id:
            ledger.append(run.ledger, "submitted", job_id=job_id, cluster=cluster)
        for event in events:
            ledger.append(run.ledger, **event)
        run.metrics.write_text("".join(
            json.dumps({"step": i, "max_steps": 300, "time": 1000.0 + i, **figures}) + "\n" for i in range(1, steps + 1)
        ))  # fmt: skip
        if done:
            run.model.mkdir()
            (run.model / "weights").write_text("w")
            if results is not None:
                run.results.write_text(json.dumps(results))
            manifest.write(run.model)
        self.graph.setdefault(pipeline, {})[name] = {"run_dir": str(run.root), "stage": stage, "after": list(after)}
        return run

    def write_graphs(self) -> None:
        for name, stages in self.graph.items():
            text = json.dumps({"version": 1, "name": name, "cluster": "h100", "stages": stages})
            (self.base / name / "pipeline.json").write_text(text)

    def status(self, *argv: str, columns: int | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
        env.pop("COLUMNS", None)
        if columns:
            env["COLUMNS"] = str(columns)
        command = [sys.executable, "-m", "launchers.status", f"paths.output_base={self.base}", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    def rows(self, *argv: str) -> dict[str, dict[str, Any]]:
        said = self.status("--json", *argv)
        assert said.returncode == 0, said.stderr
        return {row["stage"]: row for row in json.loads(said.stdout)["runs"]}


STARTED = {"event": "attempt_started", "attempt": 1, "job_id": "102", "node": "n1"}
TRAINING = {"event": "training_started", "attempt": 1, "step": 0}


def squeue_line(job_id: str, state: str, reason: str) -> str:
    return f"{job_id}|{state}|{reason}|1:05|1-00:00:00|2|n[1-2]|gpu|N/A|N/A|(null)|/some/run\n"


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    made = Outputs(tmp_path)
    made.run("base", "base", done=True, job_id="101", steps=300, loss=1.25)
    made.run("sft", after=("base",), job_id="102", events=(STARTED, TRAINING), steps=150, loss=2.5)
    made.run("rm", "rm", after=("sft",), job_id="103")
    made.run("ppo", "ppo", after=("sft", "rm"), job_id="104", steps=1, reward=0.75)
    made.run("eval_base", "eval", after=("base",), job_id="105", done=True,
             results={"score": 0.5, "metric": "accuracy"})  # fmt: skip
    made.write_graphs()
    made.squeue(squeue_line("102", "RUNNING", "None") + squeue_line("103", "PENDING", "Dependency")
                + squeue_line("104", "PENDING", "Dependency"))  # fmt: skip
    return made


def test_one_squeue_call_tells_the_whole_pipeline(outputs: Outputs) -> None:
    rows = outputs.rows()
    assert {name: row["state"] for name, row in rows.items()} == {
        "base": "done", "sft": "running", "rm": "waiting", "ppo": "waiting", "eval_base": "done",
    }  # fmt: skip
    assert len(outputs.calls()) == 1 and "--jobs=102,103,104" in outputs.calls()[0]
    assert rows["rm"]["reason"] == "waits for sft" and rows["ppo"]["reason"] == "waits for sft, rm"
    sft = rows["sft"]
    assert (sft["step"], sft["max_steps"], sft["loss"], sft["attempts"]) == (150, 300, 2.5, 1)
    assert (sft["elapsed_seconds"], sft["limit_seconds"], sft["nodes"], sft["node_list"]) == (65, 86400, 2, "n[1-2]")
    assert (rows["base"]["score"], rows["base"]["metric"]) == (0.5, "accuracy")
    assert rows["eval_base"]["score"] == 0.5 and sft["score"] is None
    assert rows["ppo"]["reward"] == 0.75


def test_a_job_is_found_though_its_submission_was_not_written_down(outputs: Outputs) -> None:
    """The command died between sbatch's answer and the ledger's line."""
    dpo, kto = outputs.run("dpo", "dpo", after=("sft",)), outputs.run("kto", "kto", after=("sft",))
    outputs.write_graphs()
    known = (outputs.bin / "answer").read_text()
    ours = squeue_line("110", "PENDING", "Dependency").replace("/some/run", f"{dpo.root} token=ab12")
    outputs.squeue(known + ours)
    rows = outputs.rows()
    assert (rows["dpo"]["state"], rows["dpo"]["job_id"]) == ("waiting", "110")
    assert rows["dpo"]["reason"] == "waits for sft"
    assert (rows["kto"]["state"], rows["kto"]["job_id"]) == ("waiting", None)
    assert rows["kto"]["reason"] == "not submitted yet" and kto.root.is_dir()
    assert len(outputs.calls()) == 1 and "--jobs" not in outputs.calls()[0]
    outputs.squeue("", code=1, error="slurm_load_jobs error")
    rows = outputs.rows()
    assert rows["dpo"]["state"] == rows["kto"]["state"] == "unknown"
    assert rows["base"]["state"] == "done"


def test_nothing_is_asked_where_all_is_done(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    made.run("base", done=True, job_id="101")
    made.run("sft", after=("base",), job_id="local-1", cluster="local")
    assert made.rows()["base"]["state"] == "done"
    assert not made.calls()


def test_the_table_says_what_the_json_says(outputs: Outputs) -> None:
    rows = outputs.rows()
    text = outputs.status().stdout.splitlines()
    assert text[0].startswith("pipeline full: done not before ")
    assert text[-1].startswith("goodput ")
    shown = {line.split()[0]: line for line in text[2:-1]}
    assert list(shown) == list(rows)
    for name, row in rows.items():
        cells = status.cells(row)
        for key in ("job", "state", "time", "step", "value", "score"):
            assert cells[key] in shown[name], (name, key)
        assert (row["reason"] or "") in shown[name]
    assert "1:05/1-00:00:00" in shown["sft"] and "█████░░░░░" in shown["sft"] and "150/300" in shown["sft"]
    assert "loss 2.500" in shown["sft"] and "reward 0.750" in shown["ppo"]


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_the_table_fits_its_terminal(outputs: Outputs, columns: int) -> None:
    text = outputs.status(columns=columns).stdout
    assert all(len(line) <= columns for line in text.splitlines())
    assert all(word in text for word in ("sft", "running", "waits for sft, rm"))
    assert columns < 80 or all(word in text for word in ("150/300", "0.500"))


def test_without_pipeline_json_the_folders_speak(outputs: Outputs) -> None:
    def without_clock() -> dict[str, dict[str, Any]]:
        timed = ("goodput", "held_seconds", "seconds", "lost_by_cause", "eta_seconds", "changed")
        return {name: {k: v for k, v in row.items() if k not in timed} for name, row in outputs.rows().items()}

    with_graph = without_clock()
    (outputs.base / "full" / "pipeline.json").unlink()
    assert without_clock() == with_graph
    (outputs.base / "full" / "pipeline.json").write_text('{"stages": [1]}')
    assert without_clock() == with_graph


# --------------------------------------------------------------------------------- at scale: one call


def record(job_id: str, state: str = "PENDING", reason: str = "Priority", start: str = "N/A", comment: str = "") -> str:
    return f"{job_id}|{state}|{reason}|0:00|4:00:00|2||gpu|N/A|{start}|(null)|{comment}\n"


def test_any_number_of_jobs_is_one_call(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{outputs.bin}:{os.environ['PATH']}")
    ids = [str(7_000_000 + i) for i in range(1200)]
    outputs.squeue("".join(record(i) for i in [*ids, "1"]))
    found = slurm.jobs(ids)
    assert not isinstance(found, slurm.Unknown) and set(found) == set(ids)
    (call,) = outputs.calls()
    assert f"--jobs={','.join(ids)}" in call.split() and "--array" in call.split()
    many = [str(700_000_000 + i) for i in range(20_000)]  # more than one argument holds: all jobs are asked for
    found = slurm.jobs(many)
    assert found == {} and len(outputs.calls()) == 2 and "--jobs" not in outputs.calls()[1]
    assert slurm.jobs([]) == {} and len(outputs.calls()) == 2


def test_the_elements_of_an_array_are_jobs(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    for i in range(3):
        made.run(f"sft_{i}", job_id=f"123_{i}")
    made.squeue(record("123_0", "RUNNING", "None") + record("123_2", reason="JobArrayTaskLimit"))
    rows = made.rows()
    assert [rows[f"sft_{i}"]["state"] for i in range(3)] == ["running", "cancelled", "queued"]
    assert rows["sft_2"]["reason"] == "the sweep's limit of jobs at a time is reached"
    assert len(made.calls()) == 1 and "--jobs=123" in made.calls()[0].split()


def test_slurms_expected_start_is_told_and_counted(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    step = {"event": "checkpoint_saved", "attempt": 1, "step": 100}
    again = {"event": "attempt_ended", "attempt": 1, "outcome": "stopped", "action": "requeue", "reason": None}
    made.run("sft", job_id="7", events=({**STARTED, "job_id": "7"}, TRAINING, step, again), steps=100)
    start = time.time() + 2 * 3600
    made.squeue(record("7", start=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start))))
    row = made.rows()["sft"]
    assert row["reason"].startswith("other jobs come first; SLURM expects to start it at ")
    assert row["reason"].endswith("in 2 h") and row["expected_start"] == pytest.approx(start, abs=1.5)
    assert row["eta_seconds"] == pytest.approx(2 * 3600 + 200, abs=5) and not row["eta_at_least"]
    made.squeue(record("7"))
    row = made.rows()["sft"]
    assert row["expected_start"] is None and row["eta_at_least"] and row["eta_seconds"] == pytest.approx(200, abs=2)
    made.squeue(record("7", reason="BeginTime"))  # the requeue hold, of which nearly nothing is over
    row = made.rows()["sft"]
    assert not row["eta_at_least"] and row["eta_seconds"] == pytest.approx(321, abs=5)
    site.write(made.base, "h100", site.Site(asked=time.time(), requeue_hold_seconds=6.0))
    assert made.rows()["sft"]["eta_seconds"] == pytest.approx(321, abs=5)  # the config names no cluster
    config = made.base / "full" / "sft" / "config.yaml"
    config.write_text(config.read_text().replace('"cluster": {', '"cluster": {"name": "h100", '))
    assert made.rows()["sft"]["eta_seconds"] == pytest.approx(206, abs=5)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7000, "2 h"), (100000, "28 h"), (200000, "2 days")]
)
def test_rough_times(seconds: float, said: str) -> None:
    assert states.roughly(seconds) == said


def test_accounting_is_asked_only_where_it_is_wanted(outputs: Outputs) -> None:
    sacct = outputs.bin / "sacct"
    sacct.write_text(f'#!/bin/sh\necho "$@" >>"{outputs.bin}/sacct_calls"\n'
                     'echo "103|TIMEOUT|0:15|2026-11-22T01:02:03|n3"\n')  # fmt: skip
    sacct.chmod(0o755)
    outputs.squeue(squeue_line("102", "RUNNING", "None"))
    without = outputs.rows()
    assert not (outputs.bin / "sacct_calls").exists() and without["rm"]["accounting"] is None
    rows = outputs.rows("--sacct")
    assert rows["rm"]["accounting"]["state"] == "TIMEOUT" and rows["rm"]["state"] == without["rm"]["state"]
    assert rows["rm"]["reason"].endswith("accounting says TIMEOUT, status 0:15, at 2026-11-22 01:02:03")
    assert rows["sft"]["accounting"] is None and rows["ppo"]["accounting"] is None
    (call,) = (outputs.bin / "sacct_calls").read_text().splitlines()
    assert "--jobs=103,104" in call
    sacct.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    assert "(sacct: Slurm accounting storage is disabled)" in outputs.rows("--sacct")["rm"]["reason"]


# ----------------------------------------------------------------------------------- filters and order


def test_filters_choose_rows_and_the_pipeline_stays_whole(outputs: Outputs) -> None:
    assert set(outputs.rows("--state", "running,done")) == {"base", "sft", "eval_base"}
    assert set(outputs.rows("--state=running", "--state=waiting", "--stage", "sft,rm")) == {"sft", "rm"}
    assert set(outputs.rows("--stage=eval")) == {"eval_base"}  # a technique
    old = RunDirectory(outputs.base / "full" / "rm")
    write_ledger(old, (90000, "submitted", {"job_id": "103", "cluster": "h100"}))
    assert set(outputs.rows("--since", "1h")) == {"base", "sft", "ppo", "eval_base"}
    assert set(outputs.rows("--since", "2d")) == {"base", "sft", "rm", "ppo", "eval_base"}
    assert set(outputs.rows("--since", "2100-01-01")) == set()
    said = outputs.status("--state", "running")
    assert said.stdout.splitlines()[-1] == "1 of 5 runs" and "rm" not in said.stdout
    one = json.loads(outputs.status("--state", "done", "--json").stdout)
    assert all(row["held_seconds"] == 0 for row in one["runs"])
    assert [p["pipeline"] for p in one["pipelines"]] == ["full"] and one["pipelines"][0]["held_seconds"] > 0
    assert "none of 5 runs" in outputs.status("--state", "failed").stdout


def test_mine_is_what_i_own(outputs: Outputs) -> None:
    rows = [{"run_dir": str(outputs.base / "full" / "sft")}, {"run_dir": "/nowhere"}, {"run_dir": "\0"}]
    assert status.select(rows, status.Wanted(user=os.getuid())) == rows[:1]
    assert status.select(rows, status.Wanted(user=os.getuid() + 1)) == []
    assert set(outputs.rows("--mine")) == {"base", "sft", "rm", "ppo", "eval_base"}


@pytest.mark.parametrize("by", status.SORTS)
def test_every_order_is_one_table_of_all(outputs: Outputs, by: str) -> None:
    said = outputs.status("--sort", by).stdout.splitlines()
    assert said[0].split()[:2] == ["PIPELINE", "STAGE"] and len(said) == 6
    assert sorted(line.split()[1] for line in said[1:]) == ["base", "eval_base", "ppo", "rm", "sft"]


def test_orders() -> None:
    def row(name: str, **fields: Any) -> dict[str, Any]:
        empty = {"state": "done", "changed": None, "elapsed_seconds": None, "eta_seconds": None, "goodput": None}
        return {"stage": name, "pipeline": "p", **empty, **fields}

    rows = [row("a"), row("b", state="failed", changed=5.0, elapsed_seconds=3, eta_seconds=9.0, goodput=0.5),
            row("c", state="running", changed=9.0, elapsed_seconds=4, eta_seconds=1.0, goodput=0.25)]  # fmt: skip

    def names(by: str | None) -> str:
        return "".join(r["stage"] for r in status.order(rows, by))

    assert (names(None), names("state"), names("changed"), names("time")) == ("abc", "bca", "cba", "cba")
    assert (names("eta"), names("goodput"), names("stage"), names("pipeline")) == ("cba", "cba", "abc", "abc")
    assert sorted(status.INTEREST) == sorted(states.STATES)


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("3d", 259200), ("1w", 604800)])
def test_since(text: str, ago: float) -> None:
    assert status.parse_since(text, 1e9) == 1e9 - ago


@given(st.text(max_size=12))
@example("99999999d")
@example("0001-01-01")
@example("²h")
def test_since_never_breaks(text: str) -> None:
    try:
        assert isinstance(status.parse_since(text, 1e9), float | int)
    except LaunchError:
        pass


@pytest.mark.parametrize(("height", "width"), [(22, 80), (48, 200), (8, 40)])
def test_a_thousand_runs_fit_a_terminal(outputs: Outputs, height: int, width: int) -> None:
    one = outputs.rows()
    found = ["done"] * 900 + ["waiting"] * 97 + ["failed", "running", "unknown"]
    rows = [{**one["sft"], "pipeline": f"p{i}", "state": state, "reason": None} for i, state in enumerate(found)]
    rows[-1]["reason"] = "x" * 300
    view = status.View(rows, runs.pipelines_of(rows), 1000)
    shown = status.fit(view, width, height, False, False, False)
    assert len(shown) <= height and all(len(line) <= width for line in shown)
    states_shown = [line for line in shown if "sft" in line]
    assert "failed" in states_shown[0] and "unknown" in states_shown[1] and "running" in states_shown[2]
    rest = shown[-1].split()
    assert rest[0] == "..." and int(rest[1]) == 1000 - len(states_shown) and f"{900} done" in shown[-1]
    view = status.View(rows[:2], runs.pipelines_of(rows[:2]), 2)
    assert status.fit(view, 200, 48, False, False, False) == list(status.lines(rows[:2], 200))


def test_looking_again_reads_only_what_has_changed(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{outputs.bin}:{os.environ['PATH']}")
    read: list[str] = []
    for module, name in ((table, "read_history"), (table, "read_metrics"), (runs, "_read_config")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: read.append(name) or real(*given))
    files = runs.Files(keep=True)

    def rows() -> list[dict[str, Any]]:
        clocks = {"eta_seconds", "seconds", "held_seconds", "goodput", "elapsed_seconds", "lost_by_cause"}
        read.clear()
        found = runs.collect(outputs.base, [], files=files)
        return [{k: v for k, v in row.items() if k not in clocks} for row in found]

    first = rows()
    assert len(read) == 15 and rows() == first and read == []
    sft = RunDirectory(outputs.base / "full" / "sft")
    ledger.append(sft.ledger, "checkpoint_saved", attempt=1, step=7, seconds=1.0)
    changed = {row["stage"]: row for row in rows()}
    assert read == ["read_history"] and changed["sft"]["checkpoint_step"] == 7
    (outputs.base / "full" / "base" / "model" / "weights").unlink()
    assert {row["stage"]: row for row in rows()}["base"]["state"] == "cancelled"  # its job is gone too
    (outputs.base / "full" / "rm" / "config.yaml").write_text("a: [1")
    assert {row["stage"]: row for row in rows()}["rm"]["state"] == "unknown"


# ------------------------------------------------------------------------------------------ bad input


def test_names_with_blanks_and_quotes(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    made.run("s'f \"t", job_id="7", pipeline="it's \"mine\" $(x) \x1b[31m")
    made.write_graphs()
    made.squeue(record("7", "RUNNING", "None"))
    (row,) = made.rows().values()
    assert (row["state"], row["stage"]) == ("running", "s'f \"t")
    said = made.status()
    assert said.returncode == 0 and "\x1b" not in said.stdout and "it's \"mine\" $(x)" in said.stdout


def test_clocks_that_go_back(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    run = made.run("sft", job_id="7")
    write_ledger(
        run,
        (100, "submitted", {"job_id": "7", "cluster": "h100"}),
        (-5000, "attempt_started", {"attempt": 1, "job_id": "7"}),
        (200, "training_started", {"attempt": 1, "step": 0}),
        (-900, "checkpoint_saved", {"attempt": 1, "step": 5, "seconds": 1.0}),
    )
    made.squeue(record("7", "RUNNING", "None"))
    row = made.rows()["sft"]
    assert row["state"] == "running" and row["changed"] <= time.time()
    assert all(value >= 0 for value in row["seconds"].values()) and row["elapsed_seconds"] == 0


def test_anothers_folder_is_not_looked_into_and_the_rest_is_shown(outputs: Outputs) -> None:
    """As nobody, in a process of its own: root may look everywhere."""
    code = (
        "import os, sys\n"
        "from launchers import runs\n"
        "from pathlib import Path\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for row in runs.collect(Path(sys.argv[1]), []): print(row['stage'], row['state'], row['reason'])\n"
    )
    outputs.run("secret", job_id="106", pipeline="theirs")
    (outputs.base / "theirs").chmod(0o700 if os.getuid() == 0 else 0)
    (outputs.base / "full" / "sft" / "ledger.jsonl").chmod(0o600 if os.getuid() == 0 else 0)
    reach = outputs.base
    while os.getuid() == 0 and reach != Path(tempfile.gettempdir()) and reach != reach.parent:
        reach.chmod(0o755)
        reach = reach.parent
    env = {**os.environ, "PATH": f"{outputs.bin}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    (outputs.bin / "squeue").chmod(0o755)
    (outputs.bin / "calls").touch()
    (outputs.bin / "calls").chmod(0o666)
    said = subprocess.run([sys.executable, "-c", code, str(outputs.base)], env=env, capture_output=True, text=True,
                          cwd=outputs.base, check=False)  # fmt: skip
    (outputs.base / "theirs").chmod(0o755)
    assert said.returncode == 0, said.stderr
    lines = dict(line.split(" ", 1) for line in said.stdout.splitlines())
    assert lines["sft"] == "unknown ledger.jsonl cannot be read: Permission denied"
    assert lines["rm"] == "waiting waits for sft" and "secret" not in lines


# ----------------------------------------------------------------------------- where the time went


def write_ledger(run: RunDirectory, *events: tuple[float, str, dict[str, Any]]) -> None:
    """A ledger with times of its own: seconds before now."""
    now = time.time()
    lines = [{"time": now - before, "event": event, **fields, "version": 1} for before, event, fields in events]
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ended(outcome: str, action: str, until: float, **seconds: float) -> dict[str, Any]:
    return {"attempt": 1, "code": 0, "outcome": outcome, "action": action, "reason": None, "step": 9,
            "seconds": seconds, "measured_until": time.time() - until}  # fmt: skip


@pytest.fixture
def timed(outputs: Outputs) -> Outputs:
    """base: finished after a node was lost; sft: runs; rm: requeued by SLURM, and nobody closed its attempt."""
    base, sft, rm = (RunDirectory(outputs.base / "full" / name) for name in ("base", "sft", "rm"))
    submitted = {"job_id": "101", "cluster": "h100"}
    write_ledger(
        base,
        (1000, "submitted", submitted),
        (990, "attempt_started", STARTED),
        (600, "attempt_ended", ended("node_lost", "requeue", 800, startup=10, steps=180)),
        (500, "attempt_started", STARTED | {"attempt": 2}),
        (100, "attempt_ended", {**ended("finished", "exit", 105, startup=15, redone=80, steps=300), "attempt": 2}),
    )
    write_ledger(
        sft,
        (300, "submitted", {**submitted, "job_id": "102"}),
        (200, "attempt_started", STARTED),
        (190, "training_started", TRAINING),
    )
    seconds = {"startup": 10.0, "steps": 150.0, "saving": 30.0}
    figures = {"version": 1, "attempt": 1, "step": 9, "time": time.time() - 10, "phase": "steps", "seconds": seconds}
    (sft.slurm / "progress.json").write_text(json.dumps(figures))
    write_ledger(
        rm,
        (300, "submitted", {**submitted, "job_id": "103"}),
        (250, "attempt_started", STARTED | {"job_id": "103"}),
        (240, "training_started", TRAINING),
        (200, "checkpoint_saved", {"attempt": 1, "step": 4, "seconds": 2.0}),
    )
    outputs.squeue(squeue_line("102", "RUNNING", "None") + squeue_line("103", "PENDING", "NodeFailure"))
    return outputs


def test_every_second_of_a_row_has_a_name(timed: Outputs) -> None:
    rows = timed.rows()
    base, sft, rm = rows["base"], rows["sft"], rows["rm"]
    assert base["goodput"] == pytest.approx(480 / 790, abs=1e-3) and base["outcome"] == "finished"
    assert base["seconds"] == pytest.approx(
        {"queued": 10, "hold": 100, "startup": 25, "steps": 480, "redone": 80, "saving": 0, "evaluation": 0,
         "teardown": 5, "lost": 200, "stopped": 0}, abs=0.1)  # fmt: skip
    assert base["lost_by_cause"] == pytest.approx(
        {"node_lost": 200 + 100 + 15 + 80, "first_startup": 10, "teardown": 5}, abs=0.1
    )
    assert sum(sft["seconds"].values()) >= 300  # a live row is told up to the moment of the look
    assert sft["seconds"]["startup"] == pytest.approx(10, abs=0.1)
    assert sft["seconds"]["saving"] == 30 and 0 < sft["goodput"] < 1
    assert (rm["state"], rm["reason"]) == ("requeued", "a node failed; SLURM starts it again")
    assert rm["seconds"]["lost"] >= 200 and rm["seconds"]["steps"] == pytest.approx(38, abs=0.1)


def test_a_pipeline_is_its_rows_added_up_and_the_table_says_the_same(timed: Outputs) -> None:
    said = json.loads(timed.status("--json").stdout)
    (pipeline,) = said["pipelines"]
    assert pipeline["pipeline"] == "full"
    for name, total in pipeline["seconds"].items():
        assert total == pytest.approx(sum(row["seconds"][name] for row in said["runs"]), abs=0.01)
    held = sum(row["held_seconds"] for row in said["runs"])
    assert pipeline["goodput"] == pytest.approx(pipeline["seconds"]["steps"] / held, abs=1e-3)
    lines = list(status.lines(said["runs"], 200))
    assert lines[-1] == status.goodput_line(pipeline)
    assert f"goodput {100 * pipeline['goodput']:.0f} %" in lines[-1]
    shown = lines[-1].partition("lost to ")[2].split(", ")
    assert len(shown) == len(pipeline["lost_by_cause"]) and shown[0].startswith("lost nodes 6:")
    for row in said["runs"]:
        line = next(line for line in lines[2:] if line.split()[0] == row["stage"])
        assert (status.percent(row["goodput"]) or row["stage"]) in line
    narrow = list(status.lines(said["runs"], 60))
    assert "GOODPUT" in lines[1] and "GOODPUT" not in narrow[1]
    assert " ".join(" ".join(narrow).split()).endswith(lines[-1])


def test_a_dead_run_holds_nothing_after_its_last_sign_of_life(timed: Outputs) -> None:
    timed.squeue("", 1, "slurm_load_jobs error: Invalid job id specified")
    sft = timed.rows()["sft"]
    assert sft["state"] == "failed"
    assert sft["held_seconds"] == pytest.approx(190, abs=0.1) and sft["seconds"]["stopped"] >= 10


def test_what_is_not_known_is_not_told(timed: Outputs) -> None:
    timed.squeue("", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    sft = timed.rows()["sft"]
    assert sft["state"] == "unknown"
    assert sum(sft["seconds"].values()) == pytest.approx(290, abs=0.1)  # up to its last sign of life
    assert timed.rows()["ppo"]["goodput"] is None


def test_without_held_time_there_is_no_goodput(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    made.run("sft", job_id="101")
    made.squeue(squeue_line("101", "PENDING", "Priority"))
    (row,) = made.rows().values()
    assert row["goodput"] is None and row["lost_by_cause"] == {}
    assert "oodput" not in made.status().stdout.lower()


def test_every_outcome_and_cause_has_words() -> None:
    outcomes = {"preempted", "node_lost", "out_of_memory", "crashed", "hung", "cancelled"}
    assert outcomes <= set(states.OUTCOMES) and outcomes <= set(status.CAUSES)


def test_a_silent_slurm_makes_states_unknown_but_not_finished_ones(outputs: Outputs) -> None:
    outputs.squeue("", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    rows = outputs.rows()
    assert rows["base"]["state"] == "done"
    assert rows["sft"]["state"] == "unknown" and "Unable to contact slurm controller" in rows["sft"]["reason"]


def test_a_forgotten_job_is_a_failure(outputs: Outputs) -> None:
    outputs.squeue("", 1, "slurm_load_jobs error: Invalid job id specified")
    rows = outputs.rows()
    assert rows["sft"]["state"] == "failed" and rows["sft"]["reason"].startswith("SLURM no longer knows job 102")
    assert rows["base"]["state"] == "done"


def test_a_local_run_lives_while_its_lock_is_held(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    run = made.run("sft", job_id="local-1", cluster="local", events=({**STARTED, "job_id": "local-1"}, TRAINING))
    lock = local._take_lock(run)
    assert lock is not None
    assert made.rows()["sft"]["state"] == "running"
    os.close(lock)
    row = made.rows()["sft"]
    assert row["state"] == "failed" and "the same command goes on" in row["reason"]


def test_a_reused_run_shows_the_other_ones_figures(tmp_path: Path) -> None:
    made = Outputs(tmp_path)
    first = made.run("sft", done=True, job_id="101", steps=300, loss=1.5, pipeline="old")
    made.graph["new"] = {"sft": {"run_dir": str(first.root), "stage": "sft", "after": []}}
    judge = made.run("eval_sft", "eval", done=True, results={"score": 0.9, "metric": "accuracy"}, pipeline="new")
    config = json.loads(judge.config.read_text())
    config["inputs"] = {"model": {"path": str(first.model), "run_dir": str(first.root)}}
    judge.config.write_text(json.dumps(config))
    made.write_graphs()
    rows = made.rows("run_name=new")
    assert rows["sft"]["state"] == "done" and rows["sft"]["run_dir"] == str(first.root)
    assert (rows["sft"]["step"], rows["sft"]["score"]) == (300, 0.9)


def test_damage_is_shown_and_the_rest_stays(outputs: Outputs) -> None:
    (outputs.base / "full" / "rm" / "config.yaml").write_text("a: [1\nb: }")
    (outputs.base / "full" / "ppo" / "ledger.jsonl").write_text('{"event": "submitted", "time": 1}\nnot json\n')
    with (outputs.base / "full" / "sft" / "ledger.jsonl").open("a") as file:
        file.write('{"torn": ')
    rows = outputs.rows()
    assert rows["rm"]["state"] == "unknown" and "config.yaml" in rows["rm"]["reason"]
    assert rows["ppo"]["state"] == "unknown" and "2 of 2 lines are damaged" in rows["ppo"]["reason"]
    assert rows["sft"]["state"] == "running" and "1 of 4 lines are damaged" in rows["sft"]["reason"]
    assert rows["base"]["state"] == "done"


def test_a_stage_that_was_never_submitted_waits(outputs: Outputs) -> None:
    outputs.graph["full"]["grpo"] = {"run_dir": str(outputs.base / "full" / "grpo"), "stage": "grpo", "after": ["ppo"]}
    outputs.write_graphs()
    assert (outputs.rows()["grpo"]["state"], outputs.rows()["grpo"]["reason"]) == ("waiting", "not submitted yet")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run_name=ful"], ["run_name=ful", "did you mean 'full'?"]),
        (["paths.output_base=/nowhere/outputs"], ["paths.output_base=/nowhere/outputs", "no such folder"]),
        (["pipeline=full"], ["pipeline=full", "run_name=NAME"]),
        (["run_name="], ["run_name=", "no value"]),
        (["--watch=0"], ["--watch=0", "at least 0.1"]),
        (["--state=runing"], ["--state=runing", "did you mean 'running'?"]),
        (["--sort=size"], ["--sort=size", "one of: pipeline"]),
        (["--since=soon"], ["--since=soon", "2h"]),
    ],
)
def test_bad_input_is_one_message(outputs: Outputs, argv: list[str], says: list[str]) -> None:
    said = outputs.status(*argv)
    assert said.returncode == 2 and not said.stdout and "Traceback" not in said.stderr
    assert all(part in said.stderr for part in says), said.stderr
    assert not outputs.calls()


def test_arguments() -> None:
    given = status.parse_arguments(["--watch", "run_name=a,b", "run_name=c", "--json"])
    assert (given.names, given.watch, given.as_json) == (["a", "b", "c"], 5.0, True)
    given = status.parse_arguments(["run_name=a", "--watch", "2", "paths.output_base=x"])
    assert (given.names, given.watch, given.output_base) == (["a"], 2.0, Path("x"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("00:01:30", 90), ("1-12", 129600), (None, None), ("x", None)]
)
def test_wall_times(text: str | None, seconds: int | None) -> None:
    assert runs.wall_seconds(text) == seconds


def test_it_starts_without_the_heavy_imports(outputs: Outputs) -> None:
    code = (
        "import sys; from launchers import status; status.main(sys.argv[1:]);"
        "heavy = {'torch', 'hydra', 'omegaconf', 'rich', 'psutil', 'jinja2', 'submitit'};"
        "sys.exit(repr(sorted(heavy & set(sys.modules))))"
    )
    env = {**os.environ, "PATH": f"{outputs.bin}:{os.environ['PATH']}"}
    said = subprocess.run([sys.executable, "-c", code, f"paths.output_base={outputs.base}"], cwd=REPO, env=env,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert said.stderr.strip() == "[]"


# ---------------------------------------------------------------------------------------------- junk

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\0", "\ud800"])
)
NAMES = st.sampled_from(["event", "time", "step", "max_steps", "loss", "reward", "attempt", "job_id", "cluster",
                         "outcome", "action", "reason", "run_dir", "stage", "inputs", "slurm", "score", "seconds",
                         "measured_until", "phase", "startup", "steps"])  # fmt: skip
EVENTS = st.sampled_from(["submitted", "attempt_started", "checkpoint_saved", "attempt_ended", "cancelled", "x"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2))
EVENT_LIKE = st.builds(
    lambda event, rest: {"time": 1.0, **rest, "event": event}, EVENTS, st.dictionaries(NAMES, VALUES, max_size=6)
)
LINES = st.binary(max_size=40) | st.builds(lambda value: json.dumps(value).encode(), VALUES | EVENT_LIKE)
JUNK = st.lists(LINES, max_size=6).map(b"\n".join)


@settings(max_examples=150, deadline=None)
@given(
    ledger_text=JUNK, metrics=JUNK, config=JUNK | VALUES.map(lambda v: json.dumps(v).encode()), results=JUNK, graph=JUNK
)
@example(
    b'{"time": 1, "event": "cancelled", "reason": "\\u0000"}',
    b"",
    b'{"inputs": {"model": {"run_dir": "\\u0000"}}}',
    b"",
    b"",
)
@example(
    b'{"time": NaN, "event": "submitted", "job_id": "1", "cluster": "x"}',
    b'{"step": 1e999}',
    b"stage: eval",
    b"{}",
    b"",
)
@example(b"", b"[" * 7000, b"[" * 7000, b"[" * 100000, b"[" * 100000)
def test_junk_never_stops_a_look(
    ledger_text: bytes, metrics: bytes, config: bytes, results: bytes, graph: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "jobs", lambda ids, conf=None: slurm.Unknown("not asked"))
        run = RunDirectory(Path(folder) / "full" / "sft")
        run.create()
        run.ledger.write_bytes(ledger_text)
        run.metrics.write_bytes(metrics)
        (run.slurm / "progress.json").write_bytes(results)
        run.config.write_bytes(config)
        run.model.mkdir()
        run.results.write_bytes(results)
        (run.model / manifest.NAME).write_bytes(results)
        (run.root.parent / "pipeline.json").write_bytes(graph)
        (row,) = runs.collect(Path(folder), ["full"])
        assert row["state"] in states.STATES
        json.dumps({"runs": [row], "pipelines": runs.pipelines_of([row])}, allow_nan=False)
        for width in (20, 80, 200):
            shown = list(status.lines([row], width))
            assert all(len(line) <= width for line in shown)
            "\n".join(shown).encode()


def test_metrics_are_read_from_the_tail_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = {"step": 0, "max_steps": 20000}
    lines = [json.dumps(first), *(json.dumps({"step": i, "time": i * 2.0, "loss": 3.0}) for i in range(1, 10001))]
    lines[1] = json.dumps({"step": 1, "reward": 9.0})  # far before the tail: not seen
    path.write_text("\n".join(lines) + '\n{"step": 10001, "lo')
    metrics = table.read_metrics(path)
    assert (metrics.step, metrics.max_steps, metrics.loss, metrics.reward) == (10000, 20000, 3.0, None)
    assert (metrics.seconds_per_step, metrics.eta_seconds) == (2.0, 20000.0)


def test_no_argument_means_every_pipeline_in_outputs() -> None:
    arguments = status.parse_arguments([])
    assert (arguments.output_base, arguments.names, arguments.watch, arguments.as_json) == (
        Path("outputs"),
        [],
        None,
        False,
    )
    assert status.parse_arguments(["--watch", "run_name=a"]).watch == status.WATCH_SECONDS
    assert status.parse_arguments(["--watch", "2"]).watch == 2
