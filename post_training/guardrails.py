"""Guardrails: what the logged figures say about a training that goes wrong, and what is done about it.

The rules are pure functions of the lines logged so far, which the Trainer keeps in its state and thus in every
checkpoint: a resumed run decides as the one that was never stopped. `Guard` is the hands.

The KL is that of a whole completion in nats, the sum over its tokens; where a stage logs the mean of its tokens
(grpo, rloo), that is multiplied by the mean completion's length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from conf.check import GUARDRAILS
from conf.schema import Guardrails
from post_training.data.source import DataError
from post_training.run import ledger
from post_training.run.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

Line = Mapping[str, Any]
SATURATED = 0.02
"""A mean reward that moved by less than this share of itself from one window to the next has stopped rising."""
RUN_OFF = 1.5
"""A mean KL or length that grew by this factor from one window to the next runs off."""
LEAST_KL = 1.0
"""Nats per completion below which a growing KL is no run-off: it starts from 0."""


class GuardrailStop(DataError):
    """A guardrail ended the run. Starting again would end the same way."""


@dataclass(frozen=True)
class Alarm:
    """A rule that holds for the newest line, and in what way."""

    rule: str
    reason: str


# ------------------------------------------------------------------------------------------ the rules, pure


def completion_kl(line: Line) -> float | None:
    """KL to the reference of a mean completion, nats; None where the line has none."""
    if "kl" not in line:
        return None
    return float(line["kl"]) * float(line.get("completions/mean_length", 1.0))


def completion_length(line: Line) -> float | None:
    """Mean tokens of the sampled completions; None where none were sampled."""
    return line.get("completions/mean_length", line.get("completion_length"))


def nan(lines: Sequence[Line], limits: Guardrails) -> str | None:
    """The loss is no finite number."""
    loss = lines[-1]["loss"]
    return None if math.isfinite(loss) else f"the loss is {loss}"


def kl(lines: Sequence[Line], limits: Guardrails) -> str | None:
    """The policy is too far from its reference."""
    now = completion_kl(lines[-1])
    if now is None or not now > limits.kl_limit:
        return None
    return f"KL to the reference {now:.3g} nats a completion, above guardrails.kl_limit={limits.kl_limit:g}"


def saturation(lines: Sequence[Line], limits: Guardrails) -> str | None:
    """The reward has stopped rising and the KL or the length has not: what is left to gain is paid for in drift."""
    window = limits.window
    if len(lines) < 2 * window:
        return None
    before, now = lines[-2 * window : -window], lines[-window:]
    rewards = [_mean(part, lambda line: line.get("reward")) for part in (before, now)]
    if rewards[0] is None or rewards[1] is None or rewards[1] - rewards[0] > SATURATED * abs(rewards[0]):
        return None
    for name, value, least in (("KL", completion_kl, LEAST_KL), ("length", completion_length, 0.0)):
        was, is_now = _mean(before, value), _mean(now, value)
        if was is not None and is_now is not None and is_now > max(RUN_OFF * was, least):
            return (
                f"reward {rewards[0]:.3g} -> {rewards[1]:.3g}, mean {name} {was:.3g} -> {is_now:.3g} "
                f"from one {window} log lines to the next"
            )
    return None


def entropy(lines: Sequence[Line], limits: Guardrails) -> str | None:
    """A policy that samples has become nearly certain, compared with what it was at its start."""
    window = limits.window
    if len(lines) <= window or completion_length(lines[-1]) is None:
        return None
    first, now = _mean(lines[:window], lambda line: line.get("entropy")), lines[-1].get("entropy")
    if first is None or now is None or not now < limits.entropy_floor * first:
        return None
    return f"entropy {now:.3g} nats a token, {first:.3g} at the start: below guardrails.entropy_floor of that"


def spike(lines: Sequence[Line], limits: Guardrails) -> str | None:
    """The loss jumped: by more than spike_limit deviations (1.4826 of the median absolute one) over the median."""
    before = [line["loss"] for line in lines[-limits.window - 1 : -1] if math.isfinite(line["loss"])]
    loss = lines[-1]["loss"]
    if len(before) < limits.window or not math.isfinite(loss):
        return None
    middle = median(before)
    # losses that hardly move, or lie near 0, would make a spike of nothing
    deviation = max(1.4826 * median(abs(x - middle) for x in before), 0.02 * abs(middle), 0.01)
    if loss - middle <= limits.spike_limit * deviation:
        return None
    return f"loss {loss:.4g}, {(loss - middle) / deviation:.3g} deviations above the median {middle:.4g}"


RULES: dict[str, Callable[[Sequence[Line], Guardrails], str | None]] = {
    "nan": nan, "kl": kl, "saturation": saturation, "entropy": entropy, "spike": spike,
}  # fmt: skip
assert tuple(RULES) == GUARDRAILS

Streaks = dict[str, int]
"""For how many lines in a row each rule has held."""


def look(lines: Sequence[Line], streaks: Streaks, limits: Guardrails) -> tuple[list[Alarm], Streaks]:
    """Alarms of the newest of the training's lines, and the streaks after it. Pure.

    A rule that goes on holding raises its alarm again only after `window` more lines.
    """
    alarms: list[Alarm] = []
    after: Streaks = {}
    for name, rule in RULES.items():
        if getattr(limits, name) != "off" and (reason := rule(lines, limits)) is not None:
            if streaks.get(name, 0) % limits.window == 0:
                alarms.append(Alarm(name, reason))
            after[name] = streaks.get(name, 0) + 1
    return alarms, after


def training_lines(log_history: Sequence[Line]) -> list[Line]:
    """The training's own lines: neither evaluations nor the summary at the end."""
    return [line for line in log_history if "loss" in line]


def _mean(lines: Sequence[Line], value: Callable[[Line], float | None]) -> float | None:
    """Mean over the lines, None where one of them lacks the figure or has none that is finite."""
    values = [value(line) for line in lines]
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return fmean(known) if len(known) == len(values) else None


# ---------------------------------------------------------------------------------------------- the hands


class Guard(TrainerCallback):
    """Does what the config says about each alarm. To be added last: the line is written down before it may stop."""

    def __init__(self, limits: Guardrails, run: RunDirectory, attempt: int, trainer: Trainer) -> None:
        self.limits, self.run, self.attempt, self.trainer = limits, run, attempt, trainer
        self.lines: list[Line] = []
        self.streaks: Streaks = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.lines, self.streaks = [], {}
        for line in training_lines(state.log_history):  # of earlier attempts, whose alarms were heard
            self.lines.append(line)
            self.streaks = look(self.lines, self.streaks, self.limits)[1]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        self.lines.append(logs)
        alarms, self.streaks = look(self.lines, self.streaks, self.limits)
        for rule in self._agreed([alarm.rule for alarm in alarms]):
            reason = next((alarm.reason for alarm in alarms if alarm.rule == rule), "as rank 0 says")
            self._act(rule, reason, state)

    def _agreed(self, rules: list[str]) -> list[str]:
        """Rank 0's word on all ranks, in case a figure is not the same on each."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return rules
        import torch

        said = torch.tensor([int(name in rules) for name in GUARDRAILS], device=self.trainer.accelerator.device)
        dist.broadcast(said, 0)
        return [name for name, held in zip(GUARDRAILS, said.tolist(), strict=True) if held]

    def _act(self, rule: str, reason: str, state: TrainerState) -> None:
        action = getattr(self.limits, rule)
        if state.is_world_process_zero:
            print(f"guardrail {rule} at step {state.global_step}: {reason}; {action}", file=sys.stderr)
            with self.run.writing_as(self.attempt):
                ledger.append(
                    self.run.ledger, "guardrail", attempt=self.attempt, step=state.global_step, rule=rule,
                    action=action, reason=reason,
                )  # fmt: skip
        if action == "lower_lr":
            lower_learning_rate(self.trainer, self.limits.lr_factor)
        elif action == "stop":
            raise GuardrailStop(
                f"guardrail {rule}: {reason} at step {state.global_step}\n"
                f"  fix: a lower learning rate or a stronger pull to the reference in a new run_name, or "
                f"guardrails.{rule}=warn to go on all the same"
            )


def lower_learning_rate(trainer: Trainer, factor: float) -> None:
    """Multiply the rest of the learning-rate schedule. The optimizer's and the schedule's own state hold it, and so
    does every checkpoint."""
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate wraps it
    scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["lr"] * factor
