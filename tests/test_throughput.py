"""Tokens a second and MFU: counted against TRL's own count, the arithmetic against torch's, the clock a made one."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from launchers import runs, status
from post_training import throughput, train
from post_training.run.directory import RunDirectory
from post_training.run.life import STOPPED
from post_training.throughput import Meter, peak_flops, row_lengths, training_flops
from tests.training import make_run, metrics

STEPS = 4


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training inside this process, on a clock that goes on by a second each time a meter looks at it: two looks are
    a step, of which the second begins the next one."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    torch.set_num_threads(1)
    ticks = iter(range(10**6))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("throughput"), "base", "training.max_steps=1", name="start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        handler = signal.getsignal(signal.SIGTERM)
        assert train.run_attempt(run, 1) == 0
        signal.signal(signal.SIGTERM, handler)
    return run.model


SCHEDULE = (f"training.max_steps={STEPS}", "checkpointing.save_steps=3", "checkpointing.inference_checkpoint_steps=2")


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("base", ()), ("sft", ()), ("sft", ("sft.packing=true",)), ("dpo", ()), ("rm", ()), ("kto", ()),
        ("grpo", ("grpo.num_iterations=2",)),
    ],
)  # fmt: skip
def test_real_tokens_a_second(tmp_path: Path, start: Path, stage: str, overrides: tuple[str, ...]) -> None:
    """Each step takes a second of the made clock, so tokens a second are the step's tokens: as TRL counts them."""
    run = make_run(tmp_path, stage, *SCHEDULE, *overrides, **({} if stage == "base" else {"model": start}))
    assert train.run_attempt(run, 1) == 0
    found = lines(run)
    assert len(found) == STEPS
    assert "mfu" not in found[0]
    rates = [line["tokens_per_second_per_gpu"] for line in found]
    counted = [line["num_tokens"] for line in found if "num_tokens" in line]
    if stage == "grpo":  # TRL counts what is generated, we what is trained on: every answer twice here
        assert rates[0] == rates[1] == counted[0] and rates[2] == rates[3] == counted[1] - counted[0]
        assert "generated_tokens_per_second_per_gpu" not in found[1]
        sampled = [line["generated_tokens_per_second_per_gpu"] for line in found[::2]]
        assert sampled == [8 * line["completions/mean_length"] for line in found[::2]]
        assert all(0 < n < rate for n, rate in zip(sampled, rates[::2], strict=True))
    else:
        assert rates == [n - before for n, before in zip(counted, [0, *counted], strict=False)]
        assert all("generated_tokens_per_second_per_gpu" not in line for line in found)


@pytest.mark.usefixtures("here")
def test_right_after_a_resume_it_is_about_this_attempt_alone(tmp_path: Path, start: Path) -> None:
    calm = make_run(tmp_path, "sft", *SCHEDULE, name="calm", model=start)
    assert train.run_attempt(calm, 1) == 0
    run = make_run(tmp_path, "sft", *SCHEDULE, "logging.steps=3", model=start)
    run.request_stop(1)
    assert train.run_attempt(run, 1) == STOPPED
    assert train.run_attempt(run, 2) == 0
    each = [line["tokens_per_second_per_gpu"] for line in lines(calm)]
    found = {line["step"]: line["tokens_per_second_per_gpu"] for line in lines(run)}
    assert found == {1: each[0], 3: (each[1] + each[2]) / 2}  # steps 2 and 3, in the two seconds of this attempt


@pytest.mark.usefixtures("here")
def test_ppo_counts_what_it_trains_on_and_what_it_samples(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    count = Meter.count

    def watched(self: Meter, batch: dict[str, torch.Tensor]) -> None:
        seen.append((int((batch["attention_mask"] > 0).sum()), int(batch["mask"].sum())))
        count(self, batch)

    monkeypatch.setattr(Meter, "count", watched)
    run = make_run(tmp_path, "ppo", "training.max_steps=2", "ppo.num_ppo_epochs=2", model=start)
    assert train.run_attempt(run, 1) == 0
    first, second = lines(run)
    assert len(seen) == 4  # two micro-batches a step
    assert first["tokens_per_second_per_gpu"] == seen[0][0] + seen[1][0]
    assert second["tokens_per_second_per_gpu"] == seen[2][0] + seen[3][0]
    assert first["generated_tokens_per_second_per_gpu"] == seen[0][1] + seen[1][1]
    assert "generated_tokens_per_second_per_gpu" not in second


@pytest.mark.usefixtures("here")
def test_mfu_where_the_gpu_s_peak_is_known(tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 1e9)
    found: list[float] = []
    monkeypatch.setattr(
        throughput, "training_flops", lambda *args: found.append(training_flops(*args)) or found[-1]
    )
    run = make_run(tmp_path, "sft", *SCHEDULE, model=start)
    assert train.run_attempt(run, 1) == 0
    assert [line["mfu"] for line in lines(run)] == [float(f"{n / 1e9:.4g}") for n in found] and len(found) == STEPS


def test_saves_and_evaluations_are_no_step_and_ranks_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    meter, nothing = Meter(), (None, None, None)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=2, device=torch.device("cpu"), bf16=True, fp16=False),
        accelerator=SimpleNamespace(reduce=lambda counts, reduction: counts * 2), model=None,
    )  # fmt: skip
    assert meter.figures(trainer) == {}
    for event, at in (
        ("begin", 1), ("end", 3), ("save", 103), ("begin", 104), ("end", 107), ("begin", 108), ("end", 109),
        ("evaluate", 300), ("begin", 301), ("end", 302),
    ):  # fmt: skip
        now = float(at)
        getattr(meter, f"on_{event}" if event in ("save", "evaluate") else f"on_step_{event}")(*nothing)
    meter.count({"attention_mask": torch.ones(2, 32, dtype=torch.long)})
    assert meter.seconds == 2 + 3 + 2 + 1
    assert meter.figures(trainer) == {"tokens_per_second_per_gpu": 64 * 2 / 8 / 2}
    assert meter.figures(trainer) == {}


def test_rows_are_counted_without_padding_in_every_form() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    forms: list[tuple[dict[str, Any], list[int] | None]] = [
        ({"attention_mask": mask, "input_ids": mask}, [2, 3]),
        ({"prompt_mask": mask, "completion_mask": torch.tensor([[1, 0], [1, 1]])}, [3, 5]),
        ({"chosen_attention_mask": mask, "rejected_attention_mask": mask[:, :2]}, [2, 3, 1, 2]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}, [3, 1, 2]),
        ({"input_ids": mask}, None),
    ]
    for batch, expected in forms:
        lengths = row_lengths(batch)
        assert (None if lengths is None else lengths.tolist()) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_the_arithmetic_is_what_torch_counts(tied: bool, lora: bool) -> None:
    """All of attention's scores are counted, as PaLM does: with an eager attention torch computes all of them."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(2 * 40).view(2, 40) % 96
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    tolerance = 0.06 if lora else 0.01  # the first layer's adapters need no gradient of what goes into them
    assert training_flops(model, 80, 2 * 40**2) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_peaks_go_by_the_gpu_s_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak_flops("cpu", torch.bfloat16) is None


def test_status_shows_them_where_there_are_any(tmp_path: Path) -> None:
    run = make_run(tmp_path / "pipe", "sft")
    run.metrics.parent.mkdir(exist_ok=True)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    (row,) = runs.collect(tmp_path, [])
    assert row["tokens_per_second_per_gpu"] is None and row["mfu"] is None
    assert "TOK/S/GPU" not in "\n".join(status.lines([row], 200))
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 2, "loss": 1.0, "tokens_per_second_per_gpu": 12345.6, "mfu": 0.417}) + "\n")
    (row,) = runs.collect(tmp_path, [])
    assert (row["tokens_per_second_per_gpu"], row["mfu"]) == (12345.6, 0.417)
    table = "\n".join(status.lines([row], 200))
    assert "TOK/S/GPU" in table and "12346" in table and "42 %" in table
