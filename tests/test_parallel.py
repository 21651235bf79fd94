"""Ways of sharing a model over ranks beside the exactness table: FSDP2, CPU offload, 16-bit outputs, two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.check import ConfigError
from launchers import devcluster as dc
from launchers.selection import select
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from post_training.run.life import STOPPED
from post_training.stages.common import load_config
from post_training.stages.zero import fsdp_arguments, zero_config
from tests.slurm_fixture import wait_for
from tests.test_exact import check
from tests.training import Attempt, events, hold, make_config, make_run, metrics

ROOT = Path(__file__).resolve().parent.parent
PAIR = (
    "training.max_steps=8", "training.effective_batch_size=8", "training.per_device_train_batch_size=2",
    "checkpointing.save_steps=3", "logging.steps=2", "slurm.gpus_per_node=2", "data.num_documents=24",
    "data.num_demonstrations=24", "data.num_pairs=24",
)  # fmt: skip
"""The runs of the exactness table on two ranks: three steps a pass over the data, two a log line."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    run = make_run(folder, "base", "training.max_steps=2", "model.dropout=0.1", "seed=5", name="start")
    return Attempt(run).finish().model


def pair(folder: Path, start: Path, stage: str, strategy: str, name: str, *more: str) -> RunDirectory:
    strategy, _, offload = strategy.partition("_")
    inputs = {} if stage == "base" else {"model": start}
    sharing = (f"parallel.strategy={strategy}", f"parallel.offload={'true' if offload else 'false'}")
    return make_run(folder, stage, *PAIR, "model.dropout=0.1", *sharing, *more, name=name, **inputs)


@pytest.mark.parametrize(("stage", "strategy"), [("sft", "fsdp2"), ("dpo", "fsdp2"), ("sft", "zero3_offload")])
def test_resumed_exactly_and_as_ddp_learns(folder: Path, start: Path, stage: str, strategy: str) -> None:
    """Stopped after step 5, in the second pass and between two log lines."""
    calm = pair(folder, start, stage, strategy, f"{stage}-{strategy}-calm")
    run = hold(pair(folder, start, stage, strategy, f"{stage}-{strategy}"))
    plain = RunDirectory(folder / f"{stage}-ddp")
    if not plain.model.exists():
        Attempt(pair(folder, start, stage, "ddp", f"{stage}-ddp"), world_size=2).finish()
    first = Attempt(run, world_size=2)
    first.stop_at(4, lambda: run.request_stop(1))
    first.finish(STOPPED)
    Attempt(run, 2, world_size=2).finish()
    assert [e["step"] for e in events(run, "training_started")] == [0, 5]
    check(run, Attempt(calm, world_size=2).finish())

    ours, theirs = (load_file(r.model / "model.safetensors") for r in (run, plain))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(v.allclose(theirs[k], atol=1e-4) for k, v in ours.items())
    losses = [[line["loss"] for line in metrics(r) if "loss" in line] for r in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    parts = {p.name for p in (run.checkpoints / "checkpoint-8").iterdir() if p.is_dir()}
    whole = (run.checkpoints / "checkpoint-8" / "model.safetensors").exists()
    if strategy == "fsdp2":  # accelerate leaves FSDP off on a CPU, without a word: it must not have gone on as DDP
        assert parts == {"pytorch_model_fsdp_0", "optimizer_0"} and not whole
    else:
        assert parts == {"global_step8"}


@pytest.mark.parametrize(("stage", "strategy"), [("sft", "zero3"), ("base", "fsdp2")])
def test_the_output_is_whole_and_in_16_bits(folder: Path, start: Path, stage: str, strategy: str) -> None:
    from transformers import AutoModelForCausalLM

    sixteen = (
        "model.dtype=bfloat16", "training.max_steps=2", "checkpointing.inference_checkpoint_steps=1",
        "training.warmup_steps=0", f"{stage}.lr=0.01",
    )  # fmt: skip
    run = pair(folder, start, stage, strategy, f"{stage}-{strategy}-bf16", *sixteen)
    Attempt(run, world_size=2).finish()
    before = load_file(start / "model.safetensors")
    for written in (run.model, run.inference_checkpoints / "step-1"):
        after = load_file(written / "model.safetensors")
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
        assert {v.dtype for v in after.values()} == {torch.bfloat16}
        assert not any(v.equal(before[k].bfloat16()) for k, v in after.items() if k.endswith("proj.weight"))
    model, about = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not about["missing_keys"] and not about["mismatched_keys"]


def test_what_each_strategy_asks_for() -> None:
    def of(strategy: str, offload: str = "false") -> dict:
        cfg = load_config(make_config("sft", f"parallel.strategy={strategy}", f"parallel.offload={offload}"))
        return (zero_config(cfg) or {}).get("zero_optimization", {}) | fsdp_arguments(cfg)

    assert of("ddp") == {}
    assert of("zero2")["stage"] == 2 and "offload_optimizer" not in of("zero2")
    assert of("zero2", "true")["offload_optimizer"]["device"] == "cpu" and "offload_param" not in of("zero2", "true")
    assert of("zero3", "true")["offload_param"]["device"] == of("zero3", "true")["offload_optimizer"]["device"] == "cpu"
    assert of("zero3")["stage3_gather_16bit_weights_on_model_save"] is True
    assert of("fsdp2")["fsdp"] is True and of("fsdp2")["fsdp_config"]["version"] == 2


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (("stage=sft", "parallel=ddp", "parallel.offload=true"), "parallel.offload", "parallel=zero3_offload"),
        (("stage=sft", "parallel=fsdp2", "parallel.offload=true"), "parallel.offload", "parallel=zero3_offload"),
        (("stage=grpo", "parallel=fsdp2"), "parallel.strategy", "parallel=zero3"),
        (("stage=ppo", "parallel=fsdp2", "ppo.reward_model_weight=0"), "parallel.strategy", "parallel=zero3"),
        (("stage=sft", "parallel=fsdp2", "slurm.gpus_per_node=1"), "parallel.strategy", "parallel=ddp"),
        (("stage=grpo", "training.torch_compile=true"), "training.torch_compile", "base.training.torch_compile=true"),
        (("stage=sft", "training.torch_compile=true", "lora.r=4"), "training.torch_compile", "lora.r=null"),
        (("stage=sft", "training.torch_compile=true", "parallel=zero2"), "training.torch_compile", "parallel=ddp"),
    ],
)
def test_what_cannot_be_shared_so_is_refused(overrides: tuple[str, ...], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(["cluster=h100", "pipeline=full", *overrides], only_one=True)
    assert caught.value.key == key and fix in caught.value.fix


@pytest.mark.slurm
def test_two_nodes_under_srun(tmp_path: Path, devcluster: dc.Cluster) -> None:
    """ddp, zero2 and zero3, a task on each of two nodes: one after the other learns the same."""

    def command(module: str, *tokens: str) -> str:
        argv = [sys.executable, "-m", module, *tokens, f"paths.output_base={tmp_path}"]
        done = subprocess.run(argv, cwd=ROOT, env=devcluster.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    strategies = ("ddp", "zero2", "zero3")
    for strategy in strategies:
        command(
            "launchers.submit", "stage=base", "pipeline=quickstart", f"run_name={strategy}", f"parallel={strategy}",
            "cluster=dev", f"cluster.slurm_conf={devcluster.conf}", "slurm.num_nodes=2", "slurm.gpus_per_node=1",
            "training.max_steps=3", "training.per_device_train_batch_size=4", "training.effective_batch_size=8",
            "data.num_documents=64", "model.hidden_size=32", "model.intermediate_size=64", "model.num_heads=2",
            "logging.steps=1",
        )  # fmt: skip

    def states() -> dict[str, str]:
        return {r["pipeline"]: r["state"] for r in json.loads(command("launchers.status", "--json"))["runs"]}

    wait_for("runs on two nodes", lambda: not {"queued", "running", "waiting"} & set(states().values()), 400)
    runs = {strategy: RunDirectory(tmp_path / strategy / "base") for strategy in strategies}
    assert set(states().values()) == {"done"}, [run.slurm for run in runs.values()]
    jobs = devcluster.run("squeue", "--noheader", "--states=all", "--format=%i %D").split("\n")
    for run in runs.values():
        assert f"{summarise(ledger.read(run.ledger)).job_id} 2" in jobs
        about = manifest.read(run.checkpoints / "checkpoint-3")
        assert about is not None and about["world_size"] == 2
    losses = {name: [m["loss"] for m in metrics(run) if "loss" in m] for name, run in runs.items()}
    assert len(losses["ddp"]) == 3
    assert losses["zero2"] == pytest.approx(losses["ddp"], rel=1e-4)
    assert losses["zero3"] == pytest.approx(losses["ddp"], rel=1e-4)
    assert all("tokens_per_second_per_gpu" in m for m in metrics(runs["zero3"]) if "loss" in m)
