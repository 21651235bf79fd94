"""The contract of both sides: run directory, ledger, history, manifest, and the life of a job."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from post_training.run import directory, ledger, life, manifest
from post_training.run.directory import Fenced, RunDirectory, write_atomic
from post_training.run.history import History, summarise
from post_training.run.life import (
    DEADLINE,
    DONE,
    HUNG,
    OUT_OF_MEMORY,
    STOPPED,
    UNUSABLE,
    Ending,
    Evidence,
    Limits,
    Word,
    classify,
    decide,
    parse_word,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "my pipe's" / "sft")
    run.create()
    return run


def configure(
    run: RunDirectory, max_failures: int = 3, max_attempts_without_progress: int = 9, exclude: str | None = None,
    scheduler: str = "local", **inputs: dict[str, Any] | None,
) -> None:  # fmt: skip
    sources = {"model": None, "reference": None, "reward_model": None} | inputs
    slurm = {
        "max_failures": max_failures, "max_attempts_without_progress": max_attempts_without_progress,
        "exclude": exclude,
    }  # fmt: skip
    run.config.write_text(yaml.safe_dump({"inputs": sources, "slurm": slurm, "cluster": {"scheduler": scheduler}}))


def complete(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(text)
    manifest.write(folder)
    return folder


# ----------------------------------------------------------------------------------------- write_atomic


def test_write_atomic_replaces_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "a long text that goes\n")
    write_atomic(path, "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_write_atomic_leaves_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(directory.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_write_atomic_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the text, then the rename, then fsync of the folder that holds the new name."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        done.append(f"rename to {target}")
        return replace(self, target)

    monkeypatch.setattr(directory.os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_atomic(tmp_path / "file", "text")
    assert len(done) == 3
    assert done[0].startswith(f"fsync {tmp_path}/.file")
    assert done[1:] == [f"rename to {tmp_path}/file", f"fsync {tmp_path}"]


# ----------------------------------------------------------------------------------------------- ledger


def test_append_and_read(run: RunDirectory) -> None:
    assert ledger.read(run.ledger) == []
    before = time.time()
    written = [ledger.append(run.ledger, "submitted", job_id="7", cluster="é\n\u2028"), ledger.append(run.ledger, "x")]
    assert ledger.read(run.ledger) == written
    assert [e["event"] for e in written] == ["submitted", "x"]
    assert all(e["version"] == 1 and before - 0.001 <= e["time"] <= time.time() + 0.001 for e in written)
    assert written[0]["cluster"] == "é\n\u2028"


@pytest.mark.parametrize("torn", [b'{"time": 1, "eve', b"\xff\xfe", b"{}", b"x"])
def test_a_torn_line_costs_no_other(run: RunDirectory, torn: bytes) -> None:
    first = ledger.append(run.ledger, "first")
    with run.ledger.open("ab") as file:
        file.write(torn)
    second, third = ledger.append(run.ledger, "second"), ledger.append(run.ledger, "third")
    assert ledger.read(run.ledger) == [first, second, third]
    assert torn in run.ledger.read_bytes()  # nothing is taken away


JUNK = st.one_of(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["event", "time", "step", "x"]), inner, max_size=4)
        ),
        max_leaves=8,
    ).map(json.dumps),
)


@given(before=st.lists(JUNK, max_size=3), after=st.lists(JUNK, max_size=3))
def test_parse_finds_events_among_junk(before: list[str], after: list[str]) -> None:
    event = {"time": 1.5, "event": "checkpoint_saved", "step": 3, "version": 1}
    found = ledger.parse("\n".join([*before, json.dumps(event), *after]))
    assert event in found
    assert all(isinstance(e["event"], str) and "time" in e for e in found)
    summarise(found)


@pytest.mark.parametrize("line", ['{"event": "x"}', '{"time": 1}', '{"time": 1, "event": 2}', '["event", "time"]', "1"])
def test_parse_takes_whole_events_only(line: str) -> None:
    assert ledger.parse(f'{line}\n{{"time": 1, "event": "x"}}\n{line}') == [{"time": 1, "event": "x"}]


def test_parse_outlives_absurd_lines() -> None:
    event = {"time": 1.5, "event": "x"}
    lines = ["[" * 200_000, "9" * 10_000, '{"event": "e", "time": ' + "[" * 200_000, json.dumps(event)]
    assert ledger.parse("\n".join(lines)) == [event]


WRITER = """
import sys
from pathlib import Path
from post_training.run import ledger
sys.stdin.read()  # all start at once, when it is closed
for i in range(150):
    ledger.append(Path(sys.argv[1]), "checkpoint_saved", writer=sys.argv[2], step=i, padding="x" * (i * 7 % 900))
"""


def test_appends_of_several_processes_stay_whole(run: RunDirectory) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run.ledger), str(n)],
            stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for n in range(4)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [w.wait() for w in writers] == [0] * 4
    lines = run.ledger.read_text().splitlines()
    assert len(lines) == 600
    found = [json.loads(line) for line in lines]
    for n in range(4):
        assert [e["step"] for e in found if e["writer"] == str(n)] == list(range(150))


# --------------------------------------------------------------------------------------------- manifest


def test_manifest_of_a_whole_folder(tmp_path: Path) -> None:
    folder = complete(tmp_path / "model")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_bytes(b"123")
    manifest.write(folder, step=7)
    written = manifest.read(folder)
    assert written is not None and written["step"] == 7
    assert written["files"] == {
        "model.safetensors": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "sub/x": {"bytes": 3, "sha256": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"},
    }
    assert manifest.problem(folder) is None and manifest.problem(folder, hashes=True) is None
    manifest.write(folder)  # it is no part of itself
    assert set(manifest.read(folder)["files"]) == {"model.safetensors", "sub/x"}


def test_all_is_on_the_disk_before_the_manifest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-7"
    (folder / "parts").mkdir(parents=True)
    for name in ("model.safetensors", "parts/rank-0.pt"):
        (folder / name).write_text("weights")
    durable: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        assert not (folder / manifest.NAME).exists()
        durable.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), folder))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("post_training.run.manifest.write_atomic", lambda path, text: path.write_text(text))
    manifest.write(folder)
    assert sorted(durable) == [".", "model.safetensors", "parts", "parts/rank-0.pt"]


def test_manifest_finds_what_is_wrong(tmp_path: Path) -> None:
    assert manifest.problem(tmp_path / "nowhere") == "no manifest.json"
    folder = complete(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_text("weighty")  # as long as before
    assert manifest.problem(folder) is None
    assert manifest.problem(folder, hashes=True) == "model.safetensors is damaged"
    weights.write_text("more than before")
    assert manifest.problem(folder) == "model.safetensors has 16 bytes, not 7"
    weights.write_text("short")
    assert manifest.problem(folder) == "model.safetensors has 5 bytes, not 7"
    weights.unlink()
    assert manifest.problem(folder) == "model.safetensors is missing"
    weights.mkdir()
    assert manifest.problem(folder) == "model.safetensors is missing"


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\x00"])
def test_a_damaged_manifest_is_a_problem_and_no_crash(tmp_path: Path, text: str) -> None:
    folder = complete(tmp_path / "model")
    (folder / "a").write_text("a")
    (folder / manifest.NAME).write_text(text)
    assert manifest.problem(folder) in ("no manifest.json", "manifest.json is damaged")


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o750, 0o640), (0o700, 0o600), (0o775, 0o664), (0o755, 0o644)])
def test_files_get_what_their_folder_grants(tmp_path: Path, folder_mode: int, file_mode: int) -> None:
    folder = complete(tmp_path / "model")
    (folder / "model.safetensors").chmod(0o600)
    folder.chmod(folder_mode)
    manifest.write(folder)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == file_mode


# ---------------------------------------------------------------------------------------- stop requests


def test_a_stop_request_stops_its_attempt_alone(run: RunDirectory) -> None:
    assert not run.stop_requested(1)
    run.request_stop(1)
    assert run.stop_requested(1)
    assert not run.stop_requested(2) and not run.stop_requested(11)
    run.request_stop(123)
    run.request_stop(2)  # shorter than what it replaces
    assert run.stop_requested(2) and not run.stop_requested(123)


def test_a_stop_request_is_written_in_place(run: RunDirectory) -> None:
    """NFS clients see new content of a file they know, but a renamed one only after a minute."""
    before = run.stop_request.stat().st_ino
    run.request_stop(3)
    assert run.stop_request.stat().st_ino == before


def test_create_leaves_a_runs_request_alone(run: RunDirectory) -> None:
    run.request_stop(4)
    run.create()
    assert run.stop_requested(4)


def test_no_file_no_stop(run: RunDirectory) -> None:
    run.stop_request.unlink()
    assert not run.stop_requested(1)


# ---------------------------------------------------------------------------------------------- history


def story(*steps: tuple[str, dict[str, Any]]) -> History:
    return summarise({"time": 100.0 + i, "event": name, **fields} for i, (name, fields) in enumerate(steps))


def submitted(job_id: str = "7") -> tuple[str, dict[str, Any]]:
    return "submitted", {"job_id": job_id, "cluster": "h100"}


def started(attempt: int, job_id: str = "7") -> tuple[str, dict[str, Any]]:
    return "attempt_started", {"attempt": attempt, "job_id": job_id, "node": "n1"}


def saved(step: int) -> tuple[str, dict[str, Any]]:
    return "checkpoint_saved", {"attempt": 1, "step": step, "seconds": 0.1}


def ended(attempt: int, outcome: str, action: str, reason: str | None = None) -> tuple[str, dict[str, Any]]:
    fields = {"attempt": attempt, "code": 1, "outcome": outcome, "action": action, "reason": reason}
    return "attempt_ended", fields


TRAINING = ("training_started", {"attempt": 1, "step": 0})
ASKED = ("stop_requested", {"attempt": 1, "signal": "USR1"})


def test_history_of_nothing() -> None:
    assert summarise([]) == History()


def test_history_follows_an_attempt() -> None:
    assert story(submitted()) == History(job_id="7", cluster="h100", submitted=100.0)
    now = story(submitted(), started(1))
    assert (now.running, now.training, now.stopping, now.attempts) == (True, False, False, 1)
    assert (now.attempt_started, now.attempt_ended) == (101.0, None)
    now = story(submitted(), started(1), TRAINING, saved(10), ASKED)
    assert (now.running, now.training, now.stopping, now.checkpoint_step) == (True, True, True, 10)
    now = story(submitted(), started(1), TRAINING, saved(10), ASKED, ended(1, "stopped", "requeue", "late"))
    assert (now.running, now.training, now.stopping) == (False, False, False)
    assert (now.outcome, now.action, now.reason, now.attempt_ended) == ("stopped", "requeue", "late", 105.0)


def test_a_new_attempt_forgets_how_the_last_one_ended() -> None:
    now = story(submitted(), started(1), ended(1, "failed", "requeue", "exit status 1"), started(2))
    assert (now.outcome, now.action, now.reason) == (None, None, None)
    assert (now.running, now.attempts, now.failures) == (True, 2, 1)  # but not that it failed


def test_failures_count_up_and_progress_sets_them_back() -> None:
    failed = [ended(1, "failed", "requeue"), started(2), ended(2, "failed", "requeue")]
    assert story(started(1), *failed).failures == 2
    assert story(started(1), *failed, started(3), saved(5)).failures == 0
    assert story(started(1), saved(5), *failed, started(3), saved(5)).failures == 2  # the same step again: no progress
    assert story(started(1), saved(5), *failed, started(3), saved(4)).failures == 2
    assert story(started(1), *failed, started(3), ended(3, "stopped", "requeue")).failures == 2


def test_submitting_again_starts_with_a_clean_count() -> None:
    """A run that gave up and is submitted on purpose gets all of its attempts again."""
    gave_up = [
        submitted("7"),
        started(1),
        ended(1, "failed", "requeue"),
        started(2),
        ended(2, "failed", "exit", "gave up"),
    ]
    assert story(*gave_up).failures == 2
    now = story(*gave_up, submitted("8"))
    assert (now.failures, now.job_id, now.outcome, now.action, now.reason) == (0, "8", None, None, None)
    assert now.attempts == 2  # numbers go on: old processes must not be taken for new ones


def test_cancelled_and_submitted_again() -> None:
    now = story(submitted(), started(1), ("cancelled", {"reason": "by ann"}))
    assert (now.cancelled, now.reason, now.running) == (True, "by ann", False)
    now = story(submitted(), started(1), ("cancelled", {"reason": "by ann"}), submitted("8"))
    assert (now.cancelled, now.reason) == (False, None)


WHOLE = [
    submitted(), started(3), TRAINING, ASKED, saved(10), ended(3, "failed", "exit", "why"),
    ("cancelled", {"reason": "by ann"}),
]  # fmt: skip
FIELDS = {"job_id", "cluster", "attempt", "step", "outcome", "action", "run_dir", "time"}


@pytest.mark.parametrize(
    ("name", "fields", "lacking"),
    [(n, f, k) for n, f in WHOLE for k in sorted(FIELDS & {*f, "time"}) if (n, k) not in {
        # fields that are told to people, not folded
        ("checkpoint_saved", "attempt"), ("attempt_ended", "attempt"), ("training_started", "attempt"),
        ("training_started", "step"), ("training_started", "time"), ("stop_requested", "attempt"),
        ("stop_requested", "time"), ("checkpoint_saved", "time"), ("cancelled", "time"),
    }],
)  # fmt: skip
def test_events_that_lack_a_field_are_passed_over(name: str, fields: dict[str, Any], lacking: str) -> None:
    """Another version's line, or a damaged one, must not hide the whole run from `status`."""
    before = [submitted("6"), started(2, "6"), saved(4)]
    expected = story(*before)
    event = {"time": 200.0, "event": name, **fields}
    base = [{"time": 100.0 + i, "event": n, **f} for i, (n, f) in enumerate(before)]
    assert summarise([*base, event]) != expected  # whole, it counts
    del event[lacking]
    assert summarise([*base, event]) == expected
    assert summarise([*base, {**event, lacking: ["x"]}]) == expected


@given(st.lists(st.dictionaries(
    st.sampled_from(["job_id", "cluster", "attempt", "step", "outcome", "action", "reason", "run_dir"]),
    st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers())),
).flatmap(lambda d: st.sampled_from([n for n, _ in WHOLE]).map(lambda n: {"time": 1.0, **d, "event": n}))))  # fmt: skip
def test_no_ledger_breaks_its_summary(events: list[dict[str, Any]]) -> None:
    history = summarise(events)
    assert isinstance(history.attempts, int) and isinstance(history.checkpoint_step, int)
    assert history.failures <= len(events)


# ------------------------------------------------------------------------------------------------- life

def saw(code: int, signal: str | None = None, **evidence: Any) -> Evidence:
    return Evidence(code, signal, **evidence)


PREEMPTED, LOST, CANCELLED, RUNNING = Word("preempted"), Word("node_lost", ("n3",)), Word("cancelled"), Word("running")
UNSAVED = "left without saving (status 1)"
OUTCOMES = [
    (saw(0, whole=True), "finished", None),
    (saw(1, whole=True), "finished", None),  # it broke after its last word
    (saw(DEADLINE, "USR1", whole=True), "finished", None),
    (saw(0, "TERM", whole=True, word=CANCELLED), "finished", None),  # before it saw the request
    (saw(STOPPED, "USR1", answered=True), "stopped", None),
    (saw(DEADLINE, "USR1"), "stopped", "left without saving (status 124)"),
    (saw(1, "USR1", hung=True), "stopped", UNSAVED),
    (saw(STOPPED, "TERM", answered=True), "stopped", "stopped on request"),
    (saw(STOPPED, None, answered=True), "stopped", "stopped on request"),  # the processes got SIGTERM alone
    (saw(STOPPED, None, answered=True, word=PREEMPTED), "preempted", None),
    (saw(1, "TERM", word=PREEMPTED), "preempted", UNSAVED),
    (saw(1, "TERM", word=LOST), "node_lost", "lost n3"),
    (saw(1, None, word=LOST), "node_lost", "lost n3"),  # srun noticed before the script was told
    (saw(1, "TERM", word=CANCELLED), "cancelled", UNSAVED),
    (saw(STOPPED, "TERM", word=CANCELLED, answered=True), "cancelled", None),
    (saw(HUNG), "hung", "no step for slurm.watchdog_minutes; what each rank was doing is in logs/stacks"),
    (saw(137, hung=True), "hung", "no step for slurm.watchdog_minutes; what each rank was doing is in logs/stacks"),
    (saw(OUT_OF_MEMORY, error="OutOfMemoryError: CUDA"), "out_of_memory", "OutOfMemoryError: CUDA"),
    (saw(137, stderr="srun: error: n1: task 0: Out Of Memory\n"), "out_of_memory", "killed for its memory"),
    (saw(137, stderr="slurmstepd: error: Detected 1 oom_kill event in StepId=7.0."), "out_of_memory",
     "killed for its memory"),
    (saw(1), "crashed", "exit status 1"),
    (saw(1, word=RUNNING), "crashed", "exit status 1"),
    (saw(1, error="ValueError: no"), "crashed", "ValueError: no"),
    (saw(0), "crashed", "ended without a complete output"),
]  # fmt: skip


@pytest.mark.parametrize(("evidence", "outcome", "reason"), OUTCOMES)
def test_classify(evidence: Evidence, outcome: str, reason: str | None) -> None:
    assert classify(evidence) == (outcome, reason)


LIMITS = Limits(max_failures=3, max_attempts_without_progress=5)
DECISIONS = [
    # outcome, code, word, signal, failures and attempts without progress before -> action, exit code, gave up, by SLURM
    ("finished", 0, Word(), None, 2, 9, ("exit", 0, False, False)),
    ("stopped", STOPPED, Word(), "USR1", 9, 0, ("requeue", 0, False, False)),  # planned ones are no failures
    ("stopped", STOPPED, Word(), "USR1", 0, 4, ("exit", 1, True, False)),  # but must lead somewhere
    ("stopped", STOPPED, Word(), "TERM", 0, 0, ("exit", 143, False, True)),
    ("stopped", STOPPED, RUNNING, None, 0, 0, ("requeue", 0, False, False)),  # SLURM ends nothing: we go on
    ("preempted", STOPPED, PREEMPTED, None, 2, 9, ("requeue", 143, False, True)),
    ("node_lost", 1, LOST, "TERM", 2, 9, ("requeue", 143, False, True)),
    ("node_lost", 1, Word(), None, 2, 0, ("requeue", 0, False, False)),  # a failed health check: ours to requeue
    ("cancelled", 1, CANCELLED, "TERM", 0, 0, ("exit", 143, False, True)),
    ("crashed", 7, Word(), None, 0, 0, ("requeue", 0, False, False)),
    ("crashed", 7, Word(), None, 2, 0, ("exit", 7, True, False)),
    ("hung", HUNG, Word(), None, 2, 0, ("exit", HUNG, True, False)),
    ("out_of_memory", 137, Word(), None, 2, 0, ("exit", 137, True, False)),
    ("crashed", 0, Word(), None, 2, 0, ("exit", 1, True, False)),
    ("crashed", UNUSABLE, Word(), None, 0, 0, ("exit", 2, True, False)),  # trying again would not help
    ("crashed", 7, Word(), None, 0, 4, ("exit", 1, True, False)),
]


@pytest.mark.parametrize(("outcome", "code", "word", "signal", "failures", "without", "expected"), DECISIONS)
def test_decide(
    outcome: str, code: int, word: Word, signal: str | None, failures: int, without: int, expected: tuple[Any, ...]
) -> None:
    history = History(failures=failures, attempts_without_progress=without)
    ending = decide(outcome, "why", code, word, signal, history, LIMITS)
    assert (ending.action, ending.exit_code, ending.gave_up, ending.by_slurm) == expected
    assert ending.outcome == outcome
    if ending.gave_up:
        assert str(ending.reason).startswith("why")


# what scontrol and sinfo said on a real SLURM 22.05 while the job was being ended
JOB = "JobId=3 JobName=x JobState={} Reason=None Dependency=(null) Requeue=1 Restarts={} ExitCode=0:0 PreemptTime={}"


@pytest.mark.parametrize(
    ("job", "nodes", "word"),
    [
        (JOB.format("COMPLETING", 0, "None"), "n1:comp", CANCELLED),
        (JOB.format("RUNNING", 0, "2026-11-21T11:00:47"), "n2:alloc", PREEMPTED),  # within its grace
        (JOB.format("COMPLETING", 1, "None"), "n2:comp", PREEMPTED),  # the grace is over
        (JOB.format("COMPLETING", 1, "None"), "n3:comp n4:down", Word("node_lost", ("n4",))),
        (JOB.format("RUNNING", 0, "None"), "n3:mix n4:down*", Word("node_lost", ("n4",))),
        (JOB.format("RUNNING", 0, "None"), "n3:mix", RUNNING),
        ("", "", Word()),  # the controller does not answer
    ],
)
def test_slurms_word(job: str, nodes: str, word: Word) -> None:
    assert parse_word(job, nodes, restart_count=0) == word
    if word == PREEMPTED and "Restarts=1" in job:
        assert parse_word(job, nodes, restart_count=1) == CANCELLED


def test_the_lead_is_the_sum_of_what_a_stop_takes() -> None:
    assert life.lead({"longest_step": 2.0, "save": 3.0}, 1.5)["needed"] == 6.5
    assert life.lead({"longest_step": 2.0, "save": None}, None)["needed"] == 2.0
    assert life.lead(None, 1.0)["needed"] is None


def begin(run: RunDirectory, job_id: str, node: str, **how: Any) -> int | None:
    return life.begin(run, job_id, [node], **how).attempt


def test_begin_numbers_attempts_in_the_ledger(run: RunDirectory) -> None:
    configure(run)
    assert [begin(run, "7", "n1"), begin(run, "7", "n2")] == [1, 2]
    started = [e for e in ledger.read(run.ledger) if e["event"] == "attempt_started"]
    assert [(e["attempt"], e["job_id"], e["node"]) for e in started] == [(1, "7", "n1"), (2, "7", "n2")]


def test_begin_of_a_finished_run_starts_nothing(run: RunDirectory) -> None:
    configure(run)
    complete(run.model)
    assert begin(run, "7", "n1") is None
    assert ledger.read(run.ledger) == []


def test_begin_refuses_an_input_that_is_not_whole(run: RunDirectory, tmp_path: Path) -> None:
    source = complete(tmp_path / "base" / "model")
    configure(run, model={"path": str(source), "run_dir": str(source.parent)})
    (source / "model.safetensors").write_text("torn")
    with pytest.raises(RuntimeError, match=r"inputs\.model=.*not a complete output.*4 bytes, not 7"):
        begin(run, "7", "n1")
    refused = summarise(ledger.read(run.ledger))
    assert refused.gave_up and "not a complete output" in str(refused.reason) and refused.attempts == 0
    complete(source)
    assert begin(run, "7", "n1") == 1


def test_begin_takes_models_from_outside_the_pipeline_as_they_are(run: RunDirectory, tmp_path: Path) -> None:
    configure(
        run, model={"path": "Qwen/Qwen3-0.6B", "run_dir": None}, reference={"path": str(tmp_path), "run_dir": None}
    )
    assert begin(run, "7", "n1") == 1


def test_end_writes_what_happened_and_the_count(run: RunDirectory) -> None:
    configure(run, max_failures=2)
    first = begin(run, "7", "n1")
    assert life.end(run, first, 1, None).action == "requeue"
    assert run.failure_count.read_text() == "1\n"
    second = begin(run, "7", "n1")
    ledger.append(run.ledger, "checkpoint_saved", attempt=second, step=5, seconds=0.1)
    assert life.end(run, second, 1, None).action == "requeue"  # there was progress: the count began anew
    assert run.failure_count.read_text() == "1\n"
    third = begin(run, "7", "n1")
    ending = life.end(run, third, 9, None)
    assert (ending.action, ending.exit_code) == ("exit", 9)
    assert run.failure_count.read_text() == "2\n"
    last = ledger.read(run.ledger)[-1]
    assert {k: last[k] for k in ("event", "attempt", "code", "outcome", "action", "reason")} == {
        "event": "attempt_ended", "attempt": 3, "code": 9, "outcome": "crashed", "action": "exit",
        "reason": "exit status 9; gave up after 2 failures without progress (slurm.max_failures)",
    }  # fmt: skip


def test_a_run_that_gave_up_may_fail_again_after_it_is_submitted_again(run: RunDirectory) -> None:
    configure(run, max_failures=2)
    for _ in range(2):
        ending = life.end(run, begin(run, "7", "n1"), 1, None)
    assert ending.action == "exit"
    ledger.append(run.ledger, "submitted", job_id="8", cluster="h100")
    assert life.end(run, begin(run, "8", "n1"), 1, None).action == "requeue"


def last(run: RunDirectory, event: str) -> dict[str, Any]:
    return next(e for e in reversed(ledger.read(run.ledger)) if e["event"] == event)


def test_an_attempt_without_an_end_is_closed_by_the_next(run: RunDirectory) -> None:
    """Its node died with the script on it; SLURM started the job again."""
    configure(run)
    begin(run, "7", "n1")
    assert begin(run, "7", "n2") == 2
    closed = last(run, "attempt_ended")
    assert (closed["attempt"], closed["outcome"], closed["lost_nodes"]) == (1, "node_lost", ["n1"])
    assert run.failure_count.read_text() == "0\n"
    life.stop(run, 2, "TERM", Word("preempted"))
    assert begin(run, "7", "n2") == 3
    assert last(run, "attempt_ended")["outcome"] == "preempted"


def test_a_node_that_was_lost_twice_is_avoided(run: RunDirectory) -> None:
    configure(run)
    for _ in range(3):
        begun = life.begin(run, "7", ["n1", "n2"])
    assert (begun.attempt, begun.code, begun.says) == (None, life.AVOID, "n1")
    assert last(run, "avoided")["nodes"] == ["n1"]
    assert begin(run, "7", "n2") == 3


def test_a_node_that_fails_its_health_check_is_avoided_at_once(run: RunDirectory) -> None:
    configure(run, exclude="n9")
    attempt = begin(run, "7", "n1")
    assert attempt is not None
    assert life.end(run, attempt, 1, None, unhealthy="n1").action == "requeue"
    assert life.begin(run, "7", ["n1"]).says == "n9,n1"  # and those that the config excludes


def test_another_jobs_run_is_left_alone_until_slurm_says_that_it_is_gone(run: RunDirectory) -> None:
    configure(run)
    ledger.append(run.ledger, "submitted", job_id="7", cluster="h100")
    refused = life.begin(run, "8", ["n1"])
    assert (refused.attempt, refused.code, refused.says) == (None, life.BUSY, "7")
    assert begin(run, "7", "n1") == 1
    assert life.begin(run, "8", ["n1"]).code == life.BUSY
    assert begin(run, "8", "n1", gone="7") == 2
    assert last(run, "attempt_ended")["outcome"] == "crashed"
    assert begin(run, "9", "n1", sole=True) == 3
    with pytest.raises(RuntimeError, match="on cluster other"):  # whose jobs this cluster's SLURM cannot know
        run.announce(4)
        ledger.append(run.ledger, "attempt_started", attempt=4, job_id="9", slurm_cluster="other")
        begin(run, "10", "n1", gone="9", cluster="here")


def test_an_older_attempt_can_write_nothing(run: RunDirectory) -> None:
    configure(run)
    begin(run, "7", "n1")
    with run.writing_as(1):
        pass
    begin(run, "7", "n2")
    with pytest.raises(Fenced), run.writing_as(1):
        pass
    with pytest.raises(Fenced):
        life.end(run, 1, 1, None)


def test_no_attempt_begins_while_one_writes(run: RunDirectory) -> None:
    configure(run)
    begin(run, "7", "n1")
    with run.writing_as(1):
        other = subprocess.Popen(
            [sys.executable, "-m", "post_training.run.life", "begin", str(run.root), "--job-id", "7", "--nodes", "n2"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1.5)
        assert run.newest_attempt() == 1
    assert other.communicate(timeout=30)[0] == "2\n"


def test_attempts_without_progress_are_limited(run: RunDirectory) -> None:
    configure(run, max_attempts_without_progress=2)
    for _ in range(2):
        ending = life.end(run, begin(run, "7", "n1") or 0, STOPPED, "USR1")
    assert ending.gave_up and ending.action == "exit" and "max_attempts_without_progress" in str(ending.reason)
    ledger.append(run.ledger, "submitted", job_id="7", cluster="h100")
    for step in range(5):
        attempt = begin(run, "7", "n1") or 0
        ledger.append(run.ledger, "checkpoint_saved", attempt=attempt, step=step + 1, seconds=0.1)
        assert life.end(run, attempt, STOPPED, "USR1").action == "requeue"
    for _ in range(2):
        begin(run, "7", "n1")  # lost each time: nobody recorded an end
    with pytest.raises(RuntimeError, match="max_attempts_without_progress"):
        begin(run, "7", "n2")


def test_a_run_that_gives_up_takes_its_dependents_with_it(run: RunDirectory) -> None:
    configure(run, max_failures=1, scheduler="slurm")
    names: dict[str, list[str]] = {
        "base": [], "dpo": [run.name], "grpo": ["dpo"], "done": [run.name], "other": ["base"],
    }  # fmt: skip
    stages: dict[str, Any] = {run.name: {"run_dir": str(run.root), "after": []}}
    for name, after in names.items():
        other = RunDirectory(run.root.parent / f"{name} run")
        other.create()
        ledger.append(other.ledger, "submitted", job_id="9", cluster="h100")
        stages[name] = {"run_dir": str(other.root), "after": after}
    complete(RunDirectory(run.root.parent / "done run").model)
    (run.root.parent / "pipeline.json").write_text(json.dumps({"stages": stages}))
    life.end(run, begin(run, "7", "n1") or 0, 9, None)
    said = {name: summarise(ledger.read(Path(entry["run_dir"]) / "ledger.jsonl")) for name, entry in stages.items()}
    assert {name for name, history in said.items() if history.cancelled} == {"dpo", "grpo"}
    assert said["grpo"].reason == f"upstream {run.name} failed: {said[run.name].reason}"


@pytest.mark.parametrize(
    ("happened", "requeued"),
    [
        ([], True),  # the script was killed while its processes trained
        ([("stop_requested", {"signal": "TERM"})], False),  # by SLURM, which was ending the job
        ([("stop_requested", {"signal": "USR1"})], True),
        ([("attempt_ended", {"outcome": "stopped", "action": "requeue", "reason": None})], True),  # before scontrol
        ([("attempt_ended", {"outcome": "crashed", "action": "exit", "reason": "x"})], False),
        ([("attempt_ended", {"outcome": "finished", "action": "exit", "reason": None})], False),
        ([("attempt_started", {"attempt": 2, "job_id": "7"})], False),
    ],
)
def test_the_guard_requeues_what_the_script_could_not(
    run: RunDirectory, happened: list[tuple[str, dict[str, Any]]], requeued: bool
) -> None:
    configure(run)
    begin(run, "7", "n1")
    for event, fields in happened:
        ledger.append(run.ledger, event, **{"attempt": 1, **fields})
    assert life.guard(run, 1) is requeued
    if not happened:
        assert summarise(ledger.read(run.ledger)).outcome == "crashed"


def test_a_full_disk_is_waited_for(run: RunDirectory) -> None:
    tries = []

    def write() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "written"

    assert life.patiently(write, 60) == "written"
    with pytest.raises(OSError, match="No space"):
        tries.clear()
        life.patiently(write, 0)
    with pytest.raises(FileNotFoundError):  # not the disk's fault: at once
        life.patiently(lambda: Path("/none/none").write_text(""), 60)


def test_an_end_that_finds_no_room_is_recorded_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the ledger's line, none for the failure count: the second try must not write the line again."""
    configure(run)
    attempt = begin(run, "7", "n1") or 0
    real, tries = life.write_atomic, []

    def full(path: Path, text: str) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(life, "write_atomic", full)
    life.patiently(lambda: life.end(run, attempt, 1, None), 60)
    assert len([e for e in ledger.read(run.ledger) if e["event"] == "attempt_ended"]) == 1
    assert len(tries) == 2 and run.failure_count.read_text() == "1\n"


def test_end_of_a_finished_attempt(run: RunDirectory) -> None:
    configure(run)
    attempt = begin(run, "7", "n1")
    complete(run.model)
    assert life.end(run, attempt, 0, None) == Ending("finished", "exit", 0)
    assert run.failure_count.read_text() == "0\n"


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "post_training.run.life", *map(str, args)], capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_the_scripts_commands(run: RunDirectory, tmp_path: Path) -> None:
    configure(run, max_failures=1)
    begun = command("begin", run.root, "--job-id", "7", "--nodes", "n1")
    assert (begun.returncode, begun.stdout) == (0, "1\n")
    assert command("stop", run.root, "--attempt", 1, "--signal", "USR1").returncode == 0
    assert run.stop_requested(1)
    assert command("end", run.root, "--attempt", 1, "--code", STOPPED, "--signal", "USR1").stdout == "requeue\n"
    assert command("begin", run.root, "--job-id", "7", "--nodes", "n1").stdout == "2\n"
    assert command("end", run.root, "--attempt", 2, "--code", 9, "--signal", "").stdout == "exit 9\n"
    assert [e["event"] for e in ledger.read(run.ledger)] == [
        "attempt_started", "stop_requested", "attempt_ended", "attempt_started", "attempt_ended",
    ]  # fmt: skip
    configure(run, model={"path": str(tmp_path / "x"), "run_dir": str(tmp_path)})
    refused = command("begin", run.root, "--job-id", "7", "--nodes", "n1")
    assert refused.returncode == 2 and refused.stdout == "" and "no manifest.json" in refused.stderr
    complete(run.model)
    done = command("begin", run.root, "--job-id", "7", "--nodes", "n1")
    assert (done.returncode, done.stdout) == (DONE, "")


# ------------------------------------------------------------------------------------------------ paths


def test_layout(run: RunDirectory) -> None:
    inside = {
        run.config: "config.yaml", run.code: "code", run.checkpoints: "checkpoints", run.model: "model",
        run.inference_checkpoints: "inference_checkpoints", run.results: "model/results.json", run.logs: "logs",
        run.metrics: "logs/metrics.jsonl", run.script: "slurm/job.sh", run.stop_request: "slurm/stop_request",
        run.failure_count: "slurm/failure_count", run.ledger: "ledger.jsonl",
        run.stdout("7"): "slurm/slurm-7.out", run.stderr("7"): "slurm/slurm-7.err",
    }  # fmt: skip
    assert {p.relative_to(run.root).as_posix() for p in inside} == set(inside.values())
    assert all(p == run.root / name for p, name in inside.items())
    assert (run.name, run.pipeline) == ("sft", "my pipe's")


def test_no_run_directory_touches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunDirectory(tmp_path / "none").read_config()
    assert list(tmp_path.iterdir()) == []
