"""Supervised stages: adapters, KL, NEFTune, DFT, packing, and what base and distill add."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.check import LORA_STAGES, ConfigError, check_run
from post_training import data, train
from post_training.adapters import new_tokens
from post_training.run import manifest
from post_training.run.directory import RunDirectory
from post_training.run.life import STOPPED
from post_training.stages import common
from tests.in_process import here, refused  # noqa: F401  (a fixture)
from tests.training import ROOT, events, make_config, make_run, metrics, real_data, weights

pytestmark = pytest.mark.usefixtures("here")
LORA = ("lora.r=4", "lora.alpha=8", "training.warmup_steps=0", "sft.lr=1e-2", "dpo.lr=1e-2", "rm.lr=1e-2",
        "orpo.lr=1e-2", "kto.lr=1e-2", "grpo.lr=1e-2", "rloo.lr=1e-2", "ppo.lr=1e-2")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """The model that the stages start from."""
    run = make_run(folder, "base", "training.max_steps=4", "base.lr=1e-2", "seed=5", name="start")
    assert train.run_attempt(run, 1) == 0
    return run.model


def trained(folder: Path, name: str, *overrides: str, stage: str = "sft", **inputs: Path) -> RunDirectory:
    run = make_run(folder, stage, *overrides, name=name, **inputs)
    assert train.run_attempt(run, 1) == 0
    return run


def trainer_of(folder: Path, name: str, start: Path, *overrides: str, stage: str = "sft") -> Any:
    run = make_run(folder, stage, "training.max_steps=2", *overrides, name=name, model=start)
    return importlib.import_module(f"post_training.stages.{stage}").build_trainer(common.open_stage(run))


def losses(run: RunDirectory) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


# ---------------------------------------------------------------------------------------------------- losses


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def by_hand(logits: Any, start_logits: Any, labels: Any, kl_coef: float, dft: bool) -> tuple[float, float]:
    """Loss and mean KL in Python's floats, token by token."""
    loss = kl_sum = 0.0
    count = 0
    for row, start_row, targets in zip(logits.tolist(), start_logits.tolist(), labels.tolist(), strict=True):
        for position, target in enumerate(targets[1:]):
            if target == -100:
                continue
            p, q = log_softmax(row[position]), log_softmax(start_row[position])
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            loss += -p[target] * (math.exp(p[target]) if dft else 1.0) + kl_coef * kl
            kl_sum += kl
            count += 1
    return loss / count, kl_sum / count


@pytest.mark.parametrize("how", ["nll", "dft", "kl", "kl and dft", "kl and adapters"])
def test_losses_are_what_their_formulas_say(folder: Path, start: Path, how: str) -> None:
    """The trained model is moved away from its start first, so that there is a KL."""
    options = [f"sft.loss_type={'dft' if 'dft' in how else 'nll'}", f"sft.kl_coef={0.3 if 'kl' in how else 0}"]
    trainer = trainer_of(folder, how, start, *options, *(["lora.r=4"] if "adapters" in how else []))
    start_model = common.load_causal_lm(trainer_config(folder, how), str(start), trainer.processing_class)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "norm" not in name:
                parameter += 0.3 * torch.randn_like(parameter, generator=None)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = {k: v for k, v in batch.items() if k != "labels"}
    trainer.model.train()
    with torch.no_grad():
        expected, kl = by_hand(
            trainer.model(**seen).logits.double(), start_model(**seen).logits.double(), batch["labels"],
            0.3 if "kl" in how else 0.0, "dft" in how,
        )  # fmt: skip
    assert kl > 0.05, "else the KL is not tested"
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    logged = trainer._metrics["train"]
    if "kl" in how:
        assert logged["kl"] == [pytest.approx(kl, rel=1e-4)]
        assert logged["num_tokens"] == [int(seen["attention_mask"].sum())]
        loss.backward()
        moved = [p for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in moved)
        if trainer.start_model is not None:
            assert not any(p.requires_grad or p.grad is not None for p in trainer.start_model.parameters())
    trainer._metrics["train"].clear()
    halves = torch.tensor(2 * int((batch["labels"][:, 1:] != -100).sum()))  # as if two such batches made a step
    assert trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=halves).item() == pytest.approx(
        expected / 2, rel=1e-4
    )


def trainer_config(folder: Path, name: str) -> Any:
    return common.load_config(RunDirectory(folder / name).read_config())


def test_what_trl_logs_is_logged_with_the_kl_as_well(folder: Path, start: Path) -> None:
    plain, with_kl = (
        trained(folder, f"logs-{coef}", "training.max_steps=1", f"sft.kl_coef={coef}", model=start) for coef in (0, 0.1)
    )
    ours, theirs = metrics(with_kl)[0], metrics(plain)[0]
    assert set(ours) - set(theirs) == {"kl"}
    assert ours["kl"] == pytest.approx(0, abs=1e-6), "before its first step the model is its start"
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_kl_keeps_the_model_near_its_start(folder: Path, start: Path) -> None:
    def distance(coef: float) -> float:
        run = trained(folder, f"near-{coef}", "training.max_steps=6", "sft.lr=1e-2", f"sft.kl_coef={coef}", model=start)
        return float(metrics(run)[5]["kl"])

    assert 0 < distance(30) < 0.5 * distance(0.01)


def test_neftune_draws_noise_while_training_alone(folder: Path, start: Path) -> None:
    """Uniform noise of at most alpha / sqrt(tokens x width) on each embedding (Jain 2023)."""
    trainer = trainer_of(folder, "noise", start, "sft.neftune_noise_alpha=5")
    from transformers.trainer import activate_neftune

    ids = torch.arange(40)[None]
    embeddings = trainer.model.get_input_embeddings()
    handle = activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)
    clean = embeddings.eval()(ids)
    noise = embeddings.train()(ids) - clean
    handle.remove()
    bound = 5 / math.sqrt(40 * 32)
    assert 0.9 * bound < noise.abs().max() <= bound + 1e-6
    runs = [
        trained(folder, f"noise-{alpha}", "training.max_steps=2", f"sft.neftune_noise_alpha={alpha}", model=start)
        for alpha in ("null", 5)
    ]
    assert losses(runs[0])[0] != losses(runs[1])[0]


# --------------------------------------------------------------------------------------------------- packing


def test_packed_samples_do_not_see_each_other(folder: Path, start: Path) -> None:
    """With sdpa too: the positions say where a sample begins, and the summed loss is that of the samples alone."""
    sums = []
    for packing in (False, True):
        trainer = trainer_of(folder, f"pack-{packing}", start, f"sft.packing={packing}")
        trainer.model.eval()
        total, count = 0.0, 0
        for batch in trainer.get_train_dataloader():
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            with torch.no_grad():
                total += float(trainer.compute_loss(trainer.model, dict(batch))) * tokens
            count += tokens
        sums.append((total, count))
    assert len(trainer.train_dataset) < 48 / 1.5
    assert sums[1] == (pytest.approx(sums[0][0], rel=1e-5), sums[0][1])


@pytest.mark.parametrize("packing", [True, False])
def test_lengths_with_packing_and_adapters(folder: Path, start: Path, packing: bool) -> None:
    """Samples are samples, however many are in a row, and tokens are tokens."""
    options = (f"sft.packing={packing}", "lora.r=2", "checkpointing.save_steps=100")
    trainer = trainer_of(folder, f"length-{packing}", start, *options)
    rows = len(trainer.train_dataset)
    assert rows < 32 if packing else rows == 48
    size = sum(common.token_counts(trainer.train_dataset))
    steps = {
        "num_training_samples=48": math.ceil(rows / 8),  # one pass, in rows
        f"num_training_tokens={size}": round(rows / 8),
        "num_train_epochs=1": math.ceil(rows / 8),
    }
    for length, expected in steps.items():
        run = trained(folder, f"{packing}-{length}", f"training.{length}", *options, model=start)
        assert metrics(run)[-1]["step"] == expected, length


@pytest.mark.parametrize("packing", ["none", "wrapped"])
def test_base_packs_documents_end_to_end(folder: Path, packing: str) -> None:
    from post_training.stages.base import build_trainer

    options = ("training.max_steps=null", "training.num_training_samples=128", "training.max_length=32")
    run = make_run(folder, "base", *options, f"base.packing={packing}", name=f"base-{packing}")
    stage = common.open_stage(run)
    trainer = build_trainer(stage)
    texts = data.load(stage.cfg.data).documents("train")["text"]
    rows = [row["input_ids"] for row in trainer.train_dataset]
    tokens = [[*stage.tokenizer(text)["input_ids"], stage.tokenizer.eos_token_id] for text in texts]
    if packing == "wrapped":  # cut every 32 tokens; only the last row is shorter
        end_to_end = [i for document in tokens for i in document]
        tokens = [end_to_end[i : i + 32] for i in range(0, len(end_to_end), 32)]
    assert sorted(rows) == sorted(tokens)
    assert trainer.args.max_steps == math.ceil(128 * len(rows) / 64 / 8)


# -------------------------------------------------------------------------------------------------- adapters


def merged_by_hand(start: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha/r B A for each adapted layer."""
    state, parts = load_file(start / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in [n for n in parts if ".lora_A." in n]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        delta = parts[name.replace("lora_A", "lora_B")] @ parts[name]
        state[layer] = state[layer] + config["lora_alpha"] / config["r"] * delta
    return state


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_adapters_are_trained_and_a_plain_model_is_handed_on(folder: Path, start: Path, stage: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options = (*LORA, "training.max_steps=3", "distill.lr=1e-2")
    run = trained(folder, f"lora-{stage}", *options, stage=stage, model=start)
    assert manifest.problem(run.model, hashes=True) is None
    loader = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    model, info = loader.from_pretrained(run.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not hasattr(model, "peft_config")
    expected, ours = merged_by_hand(start, run.model / "adapter"), load_file(run.model / "model.safetensors")
    before = load_file(start / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], ours[k])}
    assert changed == {k for k in before if "_proj." in k}, "all linear layers and nothing else"
    for name in before:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)
    if stage == "rm":
        head = load_file(run.model / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
        assert torch.equal(ours["score.weight"], head)
    kept = {p.suffix for p in (run.model / "adapter").iterdir()}
    assert not kept & {".bin", ".pt", ".md"}


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_under_adapters_the_reference_is_the_model_without_them(folder: Path, start: Path, stage: str) -> None:
    """No second model is held, and what the reference says is what the start model says. Another one is loaded."""
    from trl.trainer.utils import add_fused_lm_head

    from post_training.stages.dpo import reference

    trainer = trainer_of(folder, f"reference-{stage}", start, *LORA, stage=stage)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    asked = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.ref_model = common.load_causal_lm(
        trainer_config(folder, f"reference-{stage}"), str(start), trainer.processing_class
    )
    add_fused_lm_head(trainer.ref_model)
    for ours, theirs in zip(asked, trainer.compute_ref_log_probs(trainer.ref_model, batch), strict=True):
        torch.testing.assert_close(ours, theirs)
    another = shutil.copytree(start, folder / f"another-{stage}")
    run = make_run(folder, stage, *LORA, "training.max_steps=1", name=f"to-{stage}", model=start, reference=another)
    assert reference(common.open_stage(run), precomputed=False) is not None


def test_inference_checkpoints_under_adapters_are_plain_and_change_nothing(folder: Path, start: Path) -> None:
    options = (*LORA, "lora.dropout=0.2", "training.max_steps=4")
    without = trained(folder, "lora-without", *options, model=start)
    with_them = trained(folder, "lora-with", *options, "checkpointing.inference_checkpoint_steps=1", model=start)
    assert weights(without) == weights(with_them) and losses(without) == losses(with_them)
    kept = sorted(with_them.inference_checkpoints.iterdir())
    assert [p.name for p in kept] == [f"step-{n}" for n in (1, 2, 3, 4)]
    assert len({(p / "model.safetensors").read_bytes() for p in kept}) == 4
    assert (kept[-1] / "model.safetensors").read_bytes() == (with_them.model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_template_s_new_tokens_are_trained_too(folder: Path, tied: bool) -> None:
    """Their embeddings are random in a pretrained model; those of the tokens it knows stay as they are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                    tie_word_embeddings=tied)
    )  # fmt: skip
    pretrained = folder / f"pretrained-{tied}"
    model.save_pretrained(pretrained)
    tokenizer.save_pretrained(pretrained)
    run = trained(folder, f"new-tokens-{tied}", *LORA, "training.max_steps=3", model=pretrained)
    stage = common.open_stage(run)
    new = new_tokens(stage)
    assert len(new) == 8 and min(new) == 258
    ours, was = load_file(run.model / "model.safetensors"), load_file(pretrained / "model.safetensors")
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    first = common.load_causal_lm(stage.cfg, str(pretrained), stage.tokenizer).state_dict()
    for name in names:
        assert torch.equal(ours[name][:258], was[name]), name
        moved = [i for i in new if not torch.equal(ours[name][i], first[name][i])]
        roles = stage.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        assert set(roles) <= set(moved), name
    assert ("lm_head.weight" in ours) is not tied
    again = make_run(folder, "sft", *LORA, "training.max_steps=3", name=f"new-again-{tied}", model=pretrained)
    again.request_stop(1)
    assert train.run_attempt(again, 1) == STOPPED
    assert train.run_attempt(again, 2) == 0
    assert [e["step"] for e in events(again, "training_started")] == [0, 1]
    assert weights(again) == weights(run), "every attempt draws the same new rows"


@pytest.mark.qlora
def test_qlora_trains_resumes_and_merges(folder: Path, start: Path) -> None:
    """bitsandbytes' kernels for the CPU hold the start model in four bits; the output is the 16 or 32-bit one."""
    plain = (*LORA, "training.max_steps=4", "sft.kl_coef=0.1")
    options = (*plain, "lora.quantize=nf4")
    calm = trained(folder, "qlora", *options, model=start)
    expected, ours = merged_by_hand(start, calm.model / "adapter"), load_file(calm.model / "model.safetensors")
    before = load_file(start / "model.safetensors")
    assert {k for k in before if not torch.equal(before[k], ours[k])} == {k for k in before if "_proj." in k}
    for name in before:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-2, atol=1e-3)  # adapters are bfloat16
    full = trained(folder, "lora-beside", *plain, model=start)
    assert losses(calm) == pytest.approx(losses(full), abs=0.1) and losses(calm) != losses(full)
    stopped = make_run(folder, "sft", *options, name="qlora-stopped", model=start)
    stopped.request_stop(1)
    assert train.run_attempt(stopped, 1) == STOPPED
    assert train.run_attempt(stopped, 2) == 0
    assert weights(stopped) == weights(calm) and losses(stopped) == losses(calm)


def test_merge_makes_a_model_of_an_adapter(folder: Path, start: Path) -> None:
    source = trained(folder, "adapter-source", *LORA, "training.max_steps=2", model=start)
    adapter = source.model / "adapter"
    run = trained(folder, "merge", f"merge.adapter={adapter}", stage="merge", model=start)
    assert manifest.problem(run.model, hashes=True) is None
    assert weights(run) == weights(source)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.model / "adapter" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("other", ["model.hidden_size=64", "model.num_layers=2"])
def test_an_adapter_for_another_model_is_refused(
    folder: Path, start: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smaller model lacks a layer of it, or has it in another shape."""
    larger = trained(folder, f"larger-{other}", other, "training.max_steps=1", stage="base").model
    adapter = trained(folder, f"theirs-{other}", *LORA, "training.max_steps=1", model=larger).model / "adapter"
    run = make_run(folder, "merge", f"merge.adapter={adapter}", name=f"wrong-{other}", model=start)
    said = refused(capsys, run)
    assert f"{adapter}: is an adapter for another model" in said
    assert f"fix: inputs.model={larger}" in said
    assert ("has no layer model.layers.1" if "layers" in other else "has 32 ") in said


def test_an_adapter_is_no_start_model(folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(folder, "only-adapter", *LORA, "training.max_steps=1", model=start).model / "adapter"
    said = refused(capsys, make_run(folder, "sft", "training.max_steps=1", name="on-adapter", model=adapter))
    assert "is an adapter, not a model" in said and "stage=merge" in said
    from launchers.preflight import _check_source

    with pytest.raises(ConfigError, match="is an adapter, not a model"):
        _check_source("inputs.model", str(adapter), None)
    none = make_run(folder, "merge", f"merge.adapter={start}", name="no-adapter", model=start)
    assert "holds no adapter" in refused(capsys, none)


def test_layers_that_are_not_there(folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("lora.r=2", "training.max_steps=1", "lora.target_modules=[q_proj,query]")
    said = refused(capsys, make_run(folder, "sft", *options, name="targets", model=start))
    assert "lora.target_modules=query" in said and "q_proj" in said and "up_proj" in said
    only = trained(folder, "only-q", *LORA, "training.max_steps=1", "lora.target_modules=[q_proj]", model=start)
    parts = load_file(only.model / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in parts} == {"q_proj"}


@pytest.mark.parametrize(
    ("stage", "overrides", "key"),
    [
        ("base", ["lora.r=4"], "lora.r"),
        ("ppo", ["lora.r=4", "lora.quantize=nf4"], "lora.quantize"),
        ("sft", ["lora.r=0"], "lora.r"),
        ("sft", ["lora.quantize=nf4"], "lora.quantize"),
        ("sft", ["lora.r=4", "lora.quantize=int8"], "lora.quantize"),
        ("sft", ["lora.r=4", "lora.dropout=1"], "lora.dropout"),
        ("sft", ["lora.r=4", "lora.target_modules=q_proj"], "lora.target_modules"),
        ("sft", ["lora.r=4", "lora.target_modules=[]"], "lora.target_modules"),
        ("sft", ["sft.loss_type=sum"], "sft.loss_type"),
        ("sft", ["sft.kl_coef=-1"], "sft.kl_coef"),
        ("base", ["base.packing=bfd"], "base.packing"),
        ("base", ["model.tokenizer=train", "model.vocab_size=200"], "model.vocab_size"),
        ("merge", [], "merge.adapter"),
        ("sample", ["sample.temperature=0"], "sample.temperature"),
        ("sample", ["sample.keep=9"], "sample.keep"),
        ("sample", ["sample.min_reward=2"], "sample.min_reward"),
        ("sample", ["sample.top_p=0"], "sample.top_p"),
    ],
)
def test_refused_at_submission(stage: str, overrides: list[str], key: str) -> None:
    length = [] if stage in ("merge", "sample") else ["training.max_steps=1"]
    with pytest.raises(ConfigError) as caught:
        check_run(common.load_config(make_config(stage, *length, *overrides)))
    assert caught.value.key == key and caught.value.fix


def test_adapters_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bits on ZeRO-3 or without the package, adapters under FSDP."""
    import importlib.util

    from conf import check

    shared = common.load_config(make_config("sft", "training.max_steps=1", "lora.r=4", "parallel.strategy=fsdp2"))
    with pytest.raises(ConfigError, match="not written whole"):
        check._check_lora(shared)
    options = ("training.max_steps=1", "lora.r=4", "lora.quantize=nf4")
    pair = ("parallel.strategy=zero3", "slurm.gpus_per_node=2", "training.per_device_train_batch_size=2")
    with pytest.raises(ConfigError, match="ZeRO-3"):
        check_run(common.load_config(make_config("sft", *options, *pair)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        check_run(common.load_config(make_config("sft", *options)))


# ------------------------------------------------------------------------------------------------- tokenizer


TEXTS = ["the cat and the hat", "the cat sat on 123 mats", "Grüße, 1234!"] * 3


def test_a_trained_tokenizer_reads_anything_and_keeps_digits_single() -> None:
    from post_training.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(iter(TEXTS), 290)
    assert 265 < len(tokenizer) <= 290
    for text in [*TEXTS, "unseen: ŷ\n\t😀 <think>7</think>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("12345") == list("12345")
    assert len(tokenizer("the cat")["input_ids"]) < len("the cat")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|user|>"


def test_the_same_texts_make_the_same_tokenizer() -> None:
    """In processes that hash strings differently, too."""
    import os
    import subprocess
    import sys

    code = (
        "import hashlib; from post_training.data.tokenizer import train_tokenizer;"
        f"t = train_tokenizer(iter({TEXTS!r} + [str(i * 7919) + ' words' + 'ab' * (i % 5) for i in range(500)]), 330);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    seen = set()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout)
    assert len(seen) == 1


@pytest.mark.parametrize(("name", "millions"), [("125m", 110), ("400m", 400), ("1_3b", 1300)])
def test_decoders_are_as_large_as_they_say(name: str, millions: int) -> None:
    from omegaconf import OmegaConf

    from conf.schema import Model

    file = OmegaConf.load(ROOT / "conf" / "model" / f"decoder_{name}.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), file))
    assert isinstance(model, Model) and model.hidden_size % model.num_heads == 0
    width, layers = model.hidden_size, model.num_layers
    count = model.vocab_size * width + layers * (4 * width**2 + 3 * width * model.intermediate_size)
    assert count == pytest.approx(1e6 * millions, rel=0.01)
    if name == "400m":
        assert (width, model.num_heads, layers, model.max_position_embeddings) == (1024, 16, 24, 1024)


# ----------------------------------------------------------------------------------------------------- safety


def test_safety_on_real_records(folder: Path, start: Path) -> None:
    """The pipeline's own stage and overrides, on harmlessness pairs as published."""
    from omegaconf import OmegaConf

    node = OmegaConf.load(ROOT / "conf" / "pipeline" / "safety.yaml").stages.safety
    assert (node.stage, node.model, node.reference, list(node.overrides)) == ("dpo", "sft", "sft", ["data=hh_rlhf"])
    path = real_data("hh_rlhf") / "harmless-base-test.jsonl.gz"
    run = trained(
        folder, "safety", "data.name=hh_rlhf", f"data.path={path}", "data.max_samples=64", "training.max_steps=3",
        "training.max_length=128", "dpo.lr=1e-2", stage="dpo", model=start, reference=start,
    )  # fmt: skip
    logged = [line for line in metrics(run) if "rewards/margins" in line]
    assert len(logged) == 3 and logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert all(math.isfinite(line["loss"]) for line in logged) and weights(run) != weights(RunDirectory(start.parent))
