"""What can go wrong for one attempt of a real training: hangs, full disks, lack of memory, zombies, other worlds."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from post_training import resume
from post_training.run import ledger, life, manifest, progress
from tests.training import Attempt, events, hold, make_run, metrics, weights

SCHEDULE = ["training.max_steps=6", "checkpointing.save_steps=2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the runs start from."""
    run = make_run(tmp_path_factory.mktemp("start"), "base", "training.max_steps=1", "seed=5", name="start")
    return Attempt(run).finish().model


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, start: Path) -> str:
    """The weights of the run that nothing happened to."""
    return weights(Attempt(make_run(tmp_path_factory.mktemp("calm"), "sft", *SCHEDULE, model=start)).finish())


def end(run: object, attempt: int, code: int) -> str:
    """What the job script makes of it."""
    return life.end(run, attempt, code, None).outcome  # type: ignore[arg-type]


def test_a_hang_dumps_what_every_rank_was_doing(tmp_path: Path, start: Path) -> None:
    """One of two ranks is held between two steps; the other waits for it in a collective."""
    run = hold(make_run(tmp_path, "sft", *SCHEDULE, "slurm.watchdog_minutes=0.15", model=start))
    run.announce(1)
    attempt = Attempt(run, world_size=2)
    attempt.wait_until(lambda: run.progress.exists() and "steps" in run.progress.read_text(), "a step")
    assert set(attempt.codes()) <= {life.HUNG, 1} and life.HUNG in attempt.codes()
    dumps = [run.stacks(1, rank).read_text() for rank in (0, 1)]
    assert "stop_requested" in dumps[0] and "_wish_of_all_ranks" in dumps[1]
    assert end(run, 1, life.HUNG) == "hung"


def test_lack_of_memory_is_told_from_a_crash(tmp_path: Path) -> None:
    """A model whose first matrix takes 17 GB, in a process that may have 12."""
    run = make_run(tmp_path, "base", *SCHEDULE, "model.hidden_size=65536", "model.num_heads=64")
    run.announce(1)
    attempt = Attempt(run)
    resource.prlimit(attempt.processes[0].pid, resource.RLIMIT_AS, (12 << 30, 12 << 30))
    attempt.finish(life.OUT_OF_MEMORY)
    assert end(run, 1, life.OUT_OF_MEMORY) == "out_of_memory"
    assert "allocate" in events(run, "attempt_ended")[-1]["reason"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        (pytest.fail if os.environ.get("CI", "").lower() in ("true", "1") else pytest.skip)(made.stderr)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_the_attempt_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, start: Path, calm: str
) -> None:
    run = hold(make_run(small_disk, "sft", *SCHEDULE, model=start))
    run.announce(1)
    filler = small_disk / "filler"
    attempt = Attempt(run)

    def fill() -> None:
        room = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"x" * (room - 64 * 1024))  # for the ledger, not for a checkpoint

    attempt.stop_at(3, fill)
    codes = attempt.codes()
    assert codes == [1]
    newest, broken = resume.newest_complete(run)
    assert newest is not None and newest.name == "checkpoint-2" and not broken
    assert not run.model.exists()
    assert "No space left" in str(run.error(1).read_text() + attempt.output())
    assert end(run, 1, 1) == "crashed"
    assert "o space left" in str(events(run, "attempt_ended")[-1]["reason"])
    filler.unlink()
    run.announce(2)
    Attempt(run, 2).finish()
    assert [e["folder"] for e in events(run, "set_aside")] == ["broken-checkpoint-4-attempt-2"]
    assert weights(run) == calm


def test_a_killed_save_leaves_no_checkpoint(tmp_path: Path, start: Path, calm: str) -> None:
    """Killed while it writes the files of its second checkpoint: no folder of a checkpoint's name is there."""
    run = make_run(tmp_path, "sft", *SCHEDULE, model=start)
    run.announce(1)
    attempt = Attempt(run)
    staged = run.staging(1) / "checkpoint-4"
    attempt.wait_until(staged.exists, "a save")
    attempt.kill()
    names = {p.name for p in run.checkpoints.iterdir()}
    assert "checkpoint-2" in names
    if "checkpoint-4" not in names:  # where the save was faster than the kill it is whole
        assert staged.exists()
    assert all(manifest.problem(p) is None for p in run.checkpoints.glob("checkpoint-*"))
    run.announce(2)
    Attempt(run, 2).finish()
    assert weights(run) == calm
    assert not list(run.checkpoints.glob(".attempt-*"))


def test_a_fenced_attempt_writes_nothing_more(tmp_path: Path, start: Path, calm: str) -> None:
    run = hold(make_run(tmp_path, "sft", *SCHEDULE, model=start))
    run.announce(1)
    zombie = Attempt(run)

    def begin_the_next() -> None:
        life.begin(run, "1", ["n2"])

    zombie.stop_at(3, begin_the_next)
    assert zombie.codes() == [1]
    assert "leaves without writing" in zombie.output()
    assert [line["step"] for line in metrics(run)][-1] == 2  # step 3 was done, and could not be logged
    assert not any(e.get("attempt") == 1 for e in ledger.read(run.ledger)[-1:])
    Attempt(run, 2).finish()
    assert weights(run) == calm
    assert [m["step"] for m in metrics(run) if "loss" in m] == [1, 2, 3, 4, 5, 6]


def test_another_world_size_says_what_holds(tmp_path: Path, start: Path) -> None:
    run = hold(make_run(tmp_path, "sft", *SCHEDULE, model=start))
    first = Attempt(run)
    first.stop_at(2, lambda: run.request_stop(1))
    first.finish(life.STOPPED)
    second = Attempt(run, 2, world_size=2)
    second.finish()
    said = events(run, "not_exact")
    assert len(said) == 1 and "2 ranks from a checkpoint of 1" in said[0]["reason"] and "not exact" in second.output()
    assert [m["step"] for m in metrics(run) if "loss" in m] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("every", "saved"),
    [
        (["save_minutes=0.00001"], {1, 2, 3, 4}),  # an interval shorter than a step
        (["save_minutes=auto", "mttf_hours=1e-9"], {1, 4}),  # failures expected sooner than a step; then none was seen
        (["save_minutes=auto"], {4}),
    ],
)
def test_saves_by_the_clock(tmp_path: Path, start: Path, every: list[str], saved: set[int]) -> None:
    given = [f"checkpointing.{key}" for key in ("save_steps=500", "save_total_limit=9", *every)]
    run = make_run(tmp_path, "sft", "training.max_steps=4", *given, model=start)
    Attempt(run, world_size=2).finish()
    assert {e["step"] for e in events(run, "checkpoint_saved")} >= saved
    if len(saved) == 1:
        assert len(events(run, "checkpoint_saved")) == 1


def test_a_stop_outlives_what_sigterm_does_to_dataloader_workers(tmp_path: Path, start: Path) -> None:
    given = ("training.dataloader_num_workers=2", "training.max_steps=5", "checkpointing.save_steps=500")
    run = hold(make_run(tmp_path, "sft", *given, model=start))
    attempt = Attempt(run)

    def preempt() -> None:
        assert len(psutil.Process(attempt.processes[0].pid).children()) == 2
        attempt.terminate()

    attempt.stop_at(2, preempt)
    attempt.finish(life.STOPPED)
    assert [e["step"] for e in events(run, "stopped")] == [3]  # the step that it was asked in was done
    assert resume.newest_complete(run)[0] == run.checkpoints / "checkpoint-3"


def test_an_evaluation_leaves_when_it_is_asked_to(tmp_path: Path, start: Path) -> None:
    run = make_run(tmp_path, "eval", "eval.num_problems=4000", "data.held_out=4000", "eval.batch_size=1", model=start)
    attempt = Attempt(run)
    attempt.wait_until(lambda: (progress.read(run) or {}).get("phase") == "evaluation", "the evaluation")
    attempt.processes[0].send_signal(signal.SIGTERM)
    attempt.finish(life.STOPPED)
    assert [e["attempt"] for e in events(run, "stopped")] == [1] and not run.model.exists()


def test_the_ledger_knows_where_the_time_went(tmp_path: Path, start: Path) -> None:
    """An attempt's phases against a clock of the test's own: what its files say when they appear."""
    run = make_run(tmp_path, "sft", "training.max_steps=3", "checkpointing.save_steps=2", model=start)
    begun = life.begin(run, "1", ["n1"]).attempt
    assert begun == 1
    started = events(run, "attempt_started")[-1]["time"]
    Attempt(run, 1).finish()
    life.end(run, 1, 0, None)
    ended = events(run, "attempt_ended")[-1]
    seconds = ended["seconds"]
    training = events(run, "training_started")[-1]["time"]
    logged = [m["time"] for m in metrics(run) if "loss" in m]
    assert sum(seconds.values()) <= ended["measured_until"] - started + 0.01
    assert seconds["startup"] <= training - started + 0.5
    # from the first step's start to the last step's log: steps, and the save at step 2
    assert abs(seconds["steps"] + seconds["saving"] - (ended["measured_until"] - training)) < 0.5
    assert seconds["steps"] >= (logged[1] - logged[0]) * 0.5
    assert ended["step"] == 3 and seconds["redone"] == 0 and ended["lead"]["needed"] > 0
