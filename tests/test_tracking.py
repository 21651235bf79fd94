"""TensorBoard and W&B over the attempts of a run: each step once, and the figures of metrics.jsonl."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from conf import check
from conf.check import ConfigError, check_run
from post_training import tracking
from post_training.run import ledger
from post_training.run.directory import RunDirectory
from post_training.run.life import STOPPED
from post_training.stages.common import load_config
from tests.training import Attempt, hold, make_config, make_run, metrics

STEPS = 8
BOTH = "logging.report_to=[tensorboard,wandb]"
SCHEDULE = [f"training.max_steps={STEPS}", "checkpointing.save_steps=2", BOTH, "slurm.env.SOME_PASS=hunter2"]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


# ------------------------------------------------------------------------------------------ reading back


def tensorboard_rows(run: RunDirectory, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Step and value of a curve, as TensorBoard shows it."""
    events = EventAccumulator(str(run.logs), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def wandb_records(path: Path) -> list[Record]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type) behind seven bytes.

    wandb 0.31 reads these files in Go alone.
    """
    data, found, piece = path.read_bytes(), [], b""
    assert data[:4] == b":W&B"
    offset = 7
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        if kind == 0:  # padding
            break
        piece += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(piece))
            piece = b""
    return found


def segments(run: RunDirectory) -> list[list[Record]]:
    """What `wandb sync` would send: the offline segments in order."""
    paths = sorted(run.logs.glob("wandb/offline-run-*/*.wandb"))
    return [wandb_records(path) for path in paths]


def wandb_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of all segments; `_step` is W&B's own."""
    rows = []
    for record in (record for records in segments(run) for record in records):
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({"_step": record.history.step.num} | items)
    return rows


def logged(run: RunDirectory, name: str = "loss") -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(run) if name in line]


def is_one_run(run: RunDirectory) -> None:
    """Each step once, in both, and the figures of metrics.jsonl."""
    for name in ("loss", "grad_norm", "learning_rate"):
        wanted = logged(run, name)
        assert [step for step, _ in wanted] == list(range(1, STEPS + 1))
        assert tensorboard_rows(run, f"train/{name}") == [(step, np.float32(value)) for step, value in wanted]
        assert [(row["_step"], row[f"train/{name}"]) for row in wandb_rows(run)] == wanted
        assert [(row["train/global_step"], row[f"train/{name}"]) for row in wandb_rows(run)] == wanted
    runs = [record.run for records in segments(run) for record in records if record.HasField("run")]
    assert len({one.run_id for one in runs}) == 1
    assert {(one.run_group, one.display_name, one.project) for one in runs} == {
        (run.pipeline, run.name, "post-training")
    }
    assert all(one.resume for one in runs)  # so that `wandb sync` appends


# ------------------------------------------------------------------------------------------ real attempts


def test_killed_stopped_and_resumed_it_is_one_run(tmp_path: Path) -> None:
    run = hold(make_run(tmp_path / "pipe", "base", *SCHEDULE))
    first = Attempt(run, 1, WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.1", **OFFLINE)

    def kill() -> None:
        """With W&B's rows in part on the disk: the first four, since the fifth waits for a sixth."""
        first.wait_until(lambda: len(wandb_rows(run)) == 4, "rows in W&B's file")
        first.kill()

    first.stop_at(6, kill)  # steps 1 to 5 are logged, 4 is saved
    assert first.codes() == [-signal.SIGKILL]
    assert [step for step, _ in tensorboard_rows(run)] == [1, 2, 3, 4, 5]
    hold(run)
    second = Attempt(run, 2, **OFFLINE)
    second.first_step = 5
    second.stop_at(6, lambda: run.request_stop(2))
    second.finish(STOPPED)
    Attempt(run, 3, **OFFLINE).finish()
    is_one_run(run)
    names = {path.name.rpartition(".")[2] for path in run.logs.glob("events.*")}
    assert names == {"attempt-1", "attempt-2", "attempt-3"}
    config = [record.run.config for records in segments(run) for record in records if record.HasField("run")]
    assert all("hunter2" not in str(one) and "base" in str(one) for one in config)
    assert not [p for p in run.logs.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]


def test_a_signal_that_ends_wandb_too_costs_neither_the_attempt_nor_a_row(tmp_path: Path) -> None:
    """SLURM sends SIGTERM to every process of the step. W&B's own dies of it while the trainer has yet to save."""
    run = hold(make_run(tmp_path / "pipe", "base", *SCHEDULE))

    def end_wandb(attempt: Attempt) -> None:
        (service,) = [p for p in psutil.Process(attempt.processes[0].pid).children() if "wandb" in p.name()]
        service.terminate()
        attempt.wait_until(lambda: service.status() == psutil.STATUS_ZOMBIE, "W&B's end")  # its parent does not wait

    def preempt(attempt: Attempt) -> None:
        attempt.terminate()
        end_wandb(attempt)

    first = Attempt(run, 1, **OFFLINE)
    first.stop_at(3, lambda: preempt(first))
    first.finish(STOPPED)
    assert "W&B failed, and the attempt goes on without it" in first.output()
    hold(run)
    second = Attempt(run, 2, **OFFLINE)
    second.first_step = 5
    second.stop_at(6, lambda: end_wandb(second))
    second.finish()
    assert "W&B failed, and the attempt goes on without it" in second.output()
    is_one_run(run)


def test_two_ranks_report_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "pipe", "base", *SCHEDULE, "slurm.gpus_per_node=2")
    Attempt(run, 1, world_size=2, **OFFLINE).finish()
    is_one_run(run)
    assert len(segments(run)) == 1 and len(list(run.logs.glob("events.*"))) == 1


# ------------------------------------------------------------------------------------- what the server has


class FakeRun:
    """W&B's run as the server would answer: it has rows up to a step."""

    offline, dir = False, "/nowhere/run-1/files"

    def __init__(self, starting_step: int) -> None:
        self.starting_step, self.rows, self.finished = starting_step, [], False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row["train/loss"]))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("had", "sent"), [(0, [1, 2, 3, 4, 5, 6]), (2, [3, 4, 5, 6]), (4, [5, 6]), (5, [6]), (6, [])])
def test_online_a_gap_is_filled_and_nothing_is_sent_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had: int, sent: list[int]
) -> None:
    """An attempt goes on from step 4 with metrics up to 5 (not cut yet), and does 5 and 6; the server has `had`."""
    run = make_run(tmp_path / "pipe", "base", *SCHEDULE)
    lines = [{"step": i, "max_steps": 8, "time": 1.0, "loss": i / 10} for i in range(1, 6)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    server = FakeRun(had + 1 if had else 0)
    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or server)
    callback = tracking.WeightsAndBiases(load_config(run.read_config()), run)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=8)
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in (5, 6):
        state.global_step = step
        callback.on_log(None, state, None, {"loss": step / 10, "train_runtime": 3.0})  # type: ignore[arg-type]
    callback.on_train_end(None, state, None)  # type: ignore[arg-type]
    assert server.rows == [(step, step / 10) for step in sent] and server.finished
    assert (given["resume"], given["group"], given["name"], given["job_type"]) == ("allow", "pipe", "base", "base")


def test_without_a_way_to_wandb_the_rows_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "pipe", "base", *SCHEDULE)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked: list[Any] = []

    def init(**settings: Any) -> Any:
        asked.append(settings["mode"])
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    callback = tracking.WeightsAndBiases(load_config(run.read_config()), run)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=8)
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    callback.on_log(None, state, None, {"loss": 1.0})  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert asked == [None, "offline"] and "api_key not configured" in said and "goes on without it" in said


def test_the_wandb_run_is_the_run_directorys_until_it_is_restarted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "pipe", "base", *SCHEDULE)
    cfg = load_config(run.read_config())
    (run.logs / "wandb").mkdir()

    def about() -> dict[str, Any]:
        return tracking.WeightsAndBiases(cfg, run)._about()

    first = about()
    assert about() == first
    moved = run.root.rename(tmp_path / "elsewhere")
    run = RunDirectory(moved)
    assert about() == first
    ledger.append(run.ledger, "restarted")
    again = about()
    assert again["id"] != first["id"] and (again["step"], again["segments"]) == (0, [])


# --------------------------------------------------------------------------------------------- the rest


def test_no_secret_leaves() -> None:
    config = {
        "slurm": {"env": {"HF_TOKEN": "x"}, "setup": ["export A=x"], "partition": "gpu"},
        "model": {"tokenizer": "bytes", "hub_token": "x", "inner": {"API_KEY": "x", "num_training_tokens": 5}},
        "password": "x",
    }
    assert tracking.without_secrets(config) == {
        "slurm": {"partition": "gpu"},
        "model": {"tokenizer": "bytes", "inner": {"num_training_tokens": 5}},
    }


def test_what_describes_the_attempt_is_not_sent() -> None:
    logs = {"loss": 1.5, "eval_loss": 2.5, "train_runtime": 9.0, "step": 3, "text": "x", "grad_norm": float("nan")}
    assert tracking.scalars(logs) == {"train/loss": 1.5, "eval/loss": 2.5}


def test_report_to_names_the_trackers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "pipe", "base")
    both = [tracking.WeightsAndBiases, tracking.TensorBoard]
    for report_to, kinds in (([], []), (["tensorboard"], both[1:]), (["wandb", "tensorboard"], both)):
        cfg = load_config(run.read_config())
        cfg.logging.report_to = report_to
        assert [type(one) for one in tracking.callbacks(cfg, run, 1)] == kinds


def test_wandb_that_is_not_installed_is_refused_at_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(make_config("sft", BOTH, "training.max_steps=8"))
    check_run(cfg)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging.report_to=wandb: the package wandb is not installed\n  fix: pip"):
        check_run(cfg)
    cfg.cluster.python = "/opt/python"  # another Python runs the jobs: not known here
    check_run(cfg)


def test_an_api_key_in_the_config_is_refused_and_not_printed() -> None:
    cfg = load_config(make_config("sft", BOTH, "slurm.env.WANDB_API_KEY=hunter2"))
    with pytest.raises(ConfigError, match="export WANDB_API_KEY") as refused:
        check_run(cfg)
    assert "hunter2" not in str(refused.value)
