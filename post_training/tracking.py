"""TensorBoard and W&B as one run over all attempts: no gap, no repeated step.

metrics.jsonl is the record: each attempt first cuts it to the step that it goes on from. TensorBoard's files can only
grow, so each attempt begins a new one that tells readers to forget what came after that step. W&B's rows cannot be
taken back, but steps that are run again give the same figures: each is sent once, and what a kill took from W&B's
buffers is sent again from metrics.jsonl. Transformers' own callbacks do neither, so report_to stays empty there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from conf.schema import Config
from post_training.run import ledger
from post_training.run.directory import RunDirectory, write_atomic
from post_training.run.secrets import without_secrets

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerControl, TrainerState, TrainingArguments

OF_THE_ATTEMPT = (
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos",
    "step", "max_steps", "time",
)  # fmt: skip
"""What describes one attempt and not the run, or is metrics.jsonl's own."""
FINISH_SECONDS = 30.0
"""Longest wait for uploads at an attempt's end: a stop has a deadline. The next attempt sends what is missing."""


def callbacks(cfg: Config, run: RunDirectory, attempt: int) -> list[TrainerCallback]:
    """The trackers that `logging.report_to` names. To be added before AttemptCallback: what they have written is
    made durable before a checkpoint counts as complete."""
    made: dict[str, TrainerCallback] = {
        "tensorboard": TensorBoard(run, attempt),
        "wandb": WeightsAndBiases(cfg, run),
    }
    return [made[name] for name in dict.fromkeys(cfg.logging.report_to)]


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a step under the names that Transformers gives them: train/loss, eval/loss, ..."""
    values = {
        name: value
        for name, value in logs.items()
        if name not in OF_THE_ATTEMPT and isinstance(value, int | float) and math.isfinite(value)
    }
    return dict(rewrite_logs(values))


class TensorBoard(TrainerCallback):
    """Event files in logs/, one an attempt."""

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run, self.suffix = run, f".attempt-{attempt}"
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            step = state.global_step
            # readers drop what earlier files say of purge_step and later
            purge_step = step + 1 if step else 0
            self.writer = SummaryWriter(str(self.run.logs), purge_step=purge_step, filename_suffix=self.suffix)
            if not step:
                config = json.dumps(without_secrets(self.run.read_config()), indent=1, default=str)
                self.writer.add_text("config", f"```\n{config}\n```", 0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.writer is not None:
            for name, value in scalars(logs).items():
                self.writer.add_scalar(name, value, state.global_step)
            self.writer.flush()  # out of this process: a kill takes nothing

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer is not None:
            self.writer.flush()
            self._sync()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer is not None:
            self.writer.close()
            self._sync()
            self.writer = None

    def _sync(self) -> None:
        """To the disk: the next attempt goes on from the checkpoint, also where this node dies."""
        for path in self.run.logs.glob(f"events.*{self.suffix}"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class WeightsAndBiases(TrainerCallback):
    """One W&B run for the run directory. Its troubles never end an attempt: they are told, and the next one mends them.

    SLURM's SIGTERM reaches W&B's own process as well and ends it, in the middle of a preemption: logging then fails
    while the attempt still has to save. Without a network, or without WANDB_API_KEY in the environment, the rows go
    to logs/wandb for `wandb sync`.
    """

    def __init__(self, cfg: Config, run: RunDirectory) -> None:
        self.cfg, self.run = cfg, run
        self.folder = run.logs / "wandb"
        self.handle: Any = None  # wandb's run; None on other ranks and where W&B does not work
        self.broken = False
        self.had = 0  # W&B has the rows up to this step from before

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._open(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.handle is not None:
            try:
                self._send(state.global_step, logs)
            except Exception as error:
                self._give_up(error)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.broken and state.global_step >= state.max_steps:
            self._open(state.global_step)  # no other attempt follows
        if self.handle is None:
            return
        try:
            offline, segment = self.handle.offline, Path(self.handle.dir).parent.name
            self.handle.finish()
            if offline:
                about = self._about()
                about["step"], about["segments"] = state.global_step, [*about["segments"], segment]
                self._write(about)
        except Exception as error:
            self._give_up(error)

    # -- helpers

    def _open(self, step: int) -> None:
        """Go on with the run, and send what it should have up to `step` and does not."""
        import wandb

        self.folder.mkdir(exist_ok=True)
        about = self._about()
        try:
            if self.broken:
                with contextlib.suppress(Exception, SystemExit):  # it cannot reach its dead process, and says so
                    wandb.teardown()
                self.broken = False
            mode = os.environ.get("WANDB_MODE") or ("offline" if self.cfg.offline else None)
            self.handle = self._init(about["id"], mode)
            if self.handle.offline:
                self._set_aside(about)
                self.had = about["step"]
            else:
                self.had = max(0, self.handle.starting_step - 1)
            for line in self._lines(step):
                self._send(line["step"], line)
        except Exception as error:
            self._give_up(error)

    def _init(self, run_id: str, mode: str | None) -> Any:
        import wandb

        frozen = self.run.read_config()
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, finish_timeout=FINISH_SECONDS)
        try:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or self.cfg.logging.wandb_project,
                id=run_id,
                resume="allow",
                group=self.run.pipeline,
                name=self.run.name,
                job_type=self.cfg.stage,
                config=without_secrets(frozen),
                dir=str(self.run.logs),
                mode=mode,  # type: ignore[arg-type]
                settings=settings,
            )
        except Exception as error:
            if mode == "offline":
                raise
            print(f"W&B cannot be reached, writing to {self.folder} for `wandb sync`: {error}", file=sys.stderr)
            return self._init(run_id, "offline")

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        row = scalars(values)
        if row and step > self.had:
            self.handle.log({**row, "train/global_step": step}, step=step)

    def _lines(self, last: int) -> Iterator[dict[str, Any]]:
        """metrics.jsonl up to a step."""
        if self.run.metrics.exists():
            for text in self.run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    if self.had < line["step"] <= last:
                        yield line
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a kill: of a step that is run again

    def _set_aside(self, about: Mapping[str, Any]) -> None:
        """Keep offline rows that a kill cut off from being synced: they are all sent again."""
        current = Path(self.handle.dir).parent.name
        for path in self.folder.glob(f"offline-run-*/run-{about['id']}.wandb"):
            if path.parent.name not in (*about["segments"], current) and not path.parent.is_symlink():
                path.rename(path.with_suffix(".wandb.incomplete"))

    def _give_up(self, error: Exception) -> None:
        self.handle, self.broken = None, True
        print(f"W&B failed, and the attempt goes on without it: {type(error).__name__}: {error}", file=sys.stderr)

    def _about(self) -> dict[str, Any]:
        """The W&B run of this run directory: its id, and which offline segments hold its rows up to which step."""
        restarts = sum(event["event"] == "restarted" for event in ledger.read(self.run.ledger))
        try:
            about: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            if about["restarts"] == restarts:
                return about
        except (OSError, ValueError, KeyError, TypeError):
            pass
        about = {"id": secrets.token_hex(4), "restarts": restarts, "step": 0, "segments": []}
        self._write(about)
        return about

    def _write(self, about: Mapping[str, Any]) -> None:
        write_atomic(self.folder / "run.json", json.dumps(about) + "\n")
