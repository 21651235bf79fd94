"""Guardrails: each rule against made-up histories, decisions that a resume does not change, and what is done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.check import ConfigError
from conf.schema import Guardrails
from launchers.selection import select
from launchers.submission import freeze
from post_training import train
from post_training.guardrails import RULES, Alarm, Streaks, completion_kl, look, training_lines
from post_training.run import environment, life
from post_training.run.directory import RunDirectory
from tests.test_rl import folder, here, start  # noqa: F401  (fixtures)
from tests.training import events, make_run, metrics, weights

WINDOW = 4
LIMITS = Guardrails(window=WINDOW)


def heard(lines: list[dict[str, Any]], limits: Guardrails = LIMITS) -> list[tuple[int, str]]:
    """(line number, rule) of every alarm while the lines come in."""
    found, streaks = [], {}
    for n in range(1, len(lines) + 1):
        alarms, streaks = look(lines[:n], streaks, limits)
        found += [(n - 1, alarm.rule) for alarm in alarms]
    return found


def steady(count: int, **figures: float) -> list[dict[str, Any]]:
    calm = {"loss": 0.5, "kl": 0.1, "entropy": 1.0, "reward": 0.5, "completion_length": 20.0}
    return [{**calm, "loss": 0.5 + 0.01 * (i % 3), **figures} for i in range(count)]


def test_a_calm_history_raises_nothing() -> None:
    assert heard(steady(50)) == []
    assert heard([{"loss": 5 * 0.9**i} for i in range(50)]) == []
    better = [{**line, "reward": i / 20, "completion_length": 20.0 * 1.2**i} for i, line in enumerate(steady(20))]
    assert heard(better) == [], "longer answers that pay are no run-off"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_nan(loss: float) -> None:
    assert heard([*steady(2), {"loss": loss}, {"loss": 0.5}]) == [(2, "nan")]


@pytest.mark.parametrize(
    ("line", "kl"),
    [
        ({"kl": 16.0}, 16.0),  # ppo: of the whole completion
        ({"kl": 0.2, "completions/mean_length": 80.0}, 16.0),  # grpo and rloo: of a token
        ({"kl": 0.2}, 0.2),
        ({}, None),
    ],
)
def test_kl_is_that_of_a_completion(line: dict[str, float], kl: float | None) -> None:
    assert completion_kl(line) == (None if kl is None else pytest.approx(kl))
    assert heard([{"loss": 1.0, **line}]) == ([(0, "kl")] if kl is not None and kl > 15 else [])


def test_an_alarm_that_holds_on_is_raised_again_after_a_window_and_one_that_ends_starts_anew() -> None:
    far, near = {"loss": 0.5, "kl": 20.0}, {"loss": 0.5, "kl": 1.0}
    assert heard([near, *[far] * 9, near, far]) == [(1, "kl"), (5, "kl"), (9, "kl"), (11, "kl")]


def test_saturation() -> None:
    still = steady(WINDOW, kl=2.0)
    assert heard(still + steady(WINDOW, kl=4.0)) == [(2 * WINDOW - 1, "saturation")]
    assert heard(still + steady(WINDOW, kl=2.0, completion_length=40.0))[-1][1] == "saturation"
    assert heard(still + steady(WINDOW, kl=4.0, reward=0.6)) == [], "it still pays"
    assert heard(steady(WINDOW, kl=0.001) + steady(WINDOW, kl=0.5)) == [], "a KL near 0 is no run-off"
    falling = heard(steady(WINDOW, kl=2.0, reward=-0.5) + steady(WINDOW, kl=4.0, reward=-0.6))
    assert falling[-1][1] == "saturation"


def test_entropy_collapse_is_for_those_who_sample() -> None:
    assert heard([*steady(WINDOW), *steady(1, entropy=0.09)]) == [(WINDOW, "entropy")]
    assert heard([*steady(WINDOW), *steady(1, entropy=0.11)]) == []
    supervised = [{"loss": 0.5, "entropy": 1.0}] * WINDOW + [{"loss": 0.5, "entropy": 0.01}]
    assert heard(supervised) == [], "sft and dpo are to grow certain"


def test_spike() -> None:
    assert heard([*steady(WINDOW + 2), {"loss": 5.0}]) == [(WINDOW + 2, "spike")]
    assert heard([*steady(WINDOW + 2), {"loss": 0.4}]) == []
    assert heard([*steady(WINDOW - 1), {"loss": 5.0}]) == [], "too little to compare with"
    around_zero = [{"loss": (-1) ** i * 1e-4} for i in range(20)]
    assert heard([*around_zero, {"loss": 0.05}]) == []


def test_off_is_off() -> None:
    off = Guardrails(**dict.fromkeys(RULES, "off"), window=WINDOW)
    assert heard([{"loss": math.nan, "kl": 99.0}], off) == []


FIGURES = st.fixed_dictionaries(
    {"loss": st.one_of(st.floats(-5, 5), st.just(math.nan))},
    optional={
        "kl": st.floats(-1, 40), "reward": st.floats(-1, 1), "entropy": st.floats(0, 3),
        "completion_length": st.floats(1, 100), "completions/mean_length": st.floats(1, 100),
    },
)  # fmt: skip


@given(st.lists(FIGURES, max_size=20), st.integers(0, 20), st.integers(2, 5))
def test_a_resumed_run_decides_as_one_that_was_never_stopped(lines: list[Any], cut: int, window: int) -> None:
    limits = Guardrails(window=window)

    def follow(known: list[Any], coming: list[Any]) -> list[tuple[int, list[Alarm]]]:
        streaks: Streaks = {}
        for n in range(1, len(known) + 1):
            _, streaks = look(known[:n], streaks, limits)
        found = []
        for n in range(len(known) + 1, len(known) + len(coming) + 1):
            alarms, streaks = look((known + coming)[:n], streaks, limits)
            found.append((n, alarms))
        return found

    whole = follow([], lines)
    assert repr(follow(lines[:cut], lines[cut:])) == repr(whole[cut:])  # nan is not equal to itself
    for n, alarms in whole:
        assert ("nan" in [a.rule for a in alarms]) <= (not math.isfinite(lines[n - 1]["loss"]))


@given(st.lists(FIGURES, min_size=1, max_size=15))
def test_no_history_breaks_a_rule(lines: list[Any]) -> None:
    for rule in RULES.values():
        said = rule(lines, Guardrails(window=2))
        assert said is None or said


def test_only_the_training_s_own_lines_count() -> None:
    assert training_lines([{"loss": 1.0}, {"eval_loss": 2.0}, {"train_loss": 1.0, "train_runtime": 1.0}]) == [
        {"loss": 1.0}
    ]


# ------------------------------------------------------------------------------------------- what is done

PPO = ("training.max_steps=4", "checkpointing.save_steps=100", "ppo.lr=1e-3", "training.lr_scheduler=constant")
TIGHT = "guardrails.kl_limit=1e-6"  # above it from the second step on


def test_warn_says_so_and_goes_on(tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run = make_run(tmp_path, "ppo", *PPO, TIGHT, "ppo.kl_estimator=k3", model=start)
    assert train.run_attempt(run, 1) == 0
    said = events(run, "guardrail")
    assert [(e["rule"], e["action"], e["step"]) for e in said] == [("kl", "warn", 2)]
    assert "guardrail kl at step 2: KL to the reference" in capsys.readouterr().err


def test_stop_is_a_failure_with_its_reason(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    run = make_run(tmp_path, "ppo", *PPO, TIGHT, "ppo.kl_estimator=k3", "guardrails.kl=stop", model=start)
    assert train.run_attempt(run, 1) == life.UNUSABLE
    assert not run.model.exists()
    assert run.error(1).read_text().startswith("guardrail kl: KL to the reference ")
    assert "fix: " in capsys.readouterr().err
    assert max(line["step"] for line in metrics(run)) == 2, "the line that stopped it is written down"
    outcome, reason = life.classify(life.Evidence(code=life.UNUSABLE, error=run.error(1).read_text().strip()))
    assert outcome == "crashed" and reason is not None and "guardrail kl" in reason


def test_a_loss_that_is_nan_ends_the_run(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    from post_training.stages import ppo

    real = ppo.policy_loss

    def poisoned(*args: Any) -> Any:
        loss, *rest = real(*args)
        return (loss * math.nan, *rest)

    monkeypatch.setattr(ppo, "policy_loss", poisoned)
    run = make_run(tmp_path, "ppo", *PPO, model=start)
    assert train.run_attempt(run, 1) == life.UNUSABLE
    assert "guardrail nan: the loss is nan at step 1" in run.error(1).read_text()


def test_lower_lr_holds_from_then_on_and_over_a_resume(tmp_path: Path, start: Path) -> None:  # noqa: F811
    """Stopped after the alarm, and saved: the schedule goes on lowered, and ends with the same weights."""
    options = [*PPO, TIGHT, "ppo.kl_estimator=k3", "guardrails.kl=lower_lr", "guardrails.window=2",
               "guardrails.saturation=off", "guardrails.lr_factor=0.25"]  # fmt: skip

    def rates(run: RunDirectory) -> list[float]:
        return [line["learning_rate"] for line in metrics(run) if "loss" in line]

    whole = make_run(tmp_path, "ppo", *options, name="whole", model=start)
    assert train.run_attempt(whole, 1) == 0
    steps = [e["step"] for e in events(whole, "guardrail")]
    assert steps == [2, 4], "it holds from step 2 on, and is raised again after each window"
    assert rates(whole)[-1] == pytest.approx(1e-3 * 0.25)

    parts = make_run(tmp_path, "ppo", *options, "checkpointing.save_steps=1", name="parts", model=start)
    for attempt in range(1, 5):
        parts.request_stop(attempt)  # leaves after its first step
        code = train.run_attempt(parts, attempt)
    assert code == 0
    assert [e["step"] for e in events(parts, "training_started")] == [0, 1, 2, 3]
    assert [e["step"] for e in events(parts, "guardrail")] == steps
    assert rates(parts) == rates(whole)
    assert weights(parts) == weights(whole)
    assert [line["attempt"] for line in environment.read(parts)] == [1, 2, 3, 4]


def test_they_are_part_of_a_run_s_identity_only_where_they_change_weights(tmp_path: Path) -> None:
    def identity(*overrides: str) -> str:
        tokens = ["cluster=local", "stage=sft", f"inputs.model={tmp_path}", f"paths.output_base={tmp_path}"]
        (tmp_path / "config.json").write_text("{}")
        selection = select([*tokens, *overrides], only_one=True)
        return str(freeze(selection.config("sft"), "sft", "p", {})["identity"])

    plain = identity()
    assert identity("guardrails.kl=stop", "guardrails.kl_limit=3") == plain
    lowering = identity("guardrails.spike=lower_lr")
    assert lowering != plain and identity("guardrails.spike=lower_lr", "guardrails.spike_limit=5") != lowering


@pytest.mark.parametrize(
    "token", ["guardrails.kl=abort", "guardrails.nan=lower_lr", "guardrails.lr_factor=1", "guardrails.window=1"]
)
def test_what_cannot_be_is_refused_at_submission(token: str) -> None:
    with pytest.raises(ConfigError) as error:
        select(["cluster=local", "pipeline=full", token], only_one=False)
    assert error.value.key == token.partition("=")[0] and error.value.fix
