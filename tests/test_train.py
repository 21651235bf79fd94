"""Attempts of every stage as processes: outputs, checkpoints, lengths, and that stops lose and change nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from conf.check import accumulation_steps
from post_training import resume, train
from post_training.attempt import AttemptCallback
from post_training.data.arithmetic import Arithmetic
from post_training.distributed import set_rank_environment
from post_training.run import ledger, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from post_training.run.life import STOPPED
from post_training.stages import common
from tests.in_process import here  # noqa: F401  (a fixture)
from tests.training import Attempt, events, hold, make_config, make_run, metrics, weights

STEPS = 8
SCHEDULE = [f"training.max_steps={STEPS}", "checkpointing.save_steps=2", "checkpointing.inference_checkpoint_steps=3"]
STAGES = ("base", "sft", "rm", "ppo", "dpo", "orpo", "kto", "grpo", "rloo")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a pipe's runs")


@pytest.fixture(scope="module")
def start(pipeline: Path) -> Path:
    """The model that all stages but base start from."""
    run = make_run(pipeline, "base", "training.max_steps=4", "seed=5", name="start")
    return Attempt(run).finish().model


def inputs(stage: str, start: Path) -> dict[str, Path]:
    return {} if stage == "base" else {"model": start}


# ----------------------------------------------------------------- every stage, undisturbed and disturbed


@dataclass
class Story:
    """One config three times: never stopped; stopped and resumed; and, for sft, resumed from damaged files."""

    stage: str
    undisturbed: RunDirectory
    resumed: RunDirectory
    resumed_from: int
    resume_output: str
    after_stop: dict[str, Any] = field(default_factory=dict)


HOW = {
    "base": "SIGKILL", "sft": "request", "rm": "request", "ppo": "SIGTERM", "dpo": "request", "orpo": "SIGTERM",
    "kto": "SIGKILL", "grpo": "SIGTERM", "rloo": "request",
}  # fmt: skip


@pytest.fixture(scope="module", params=STAGES)
def story(request: pytest.FixtureRequest, pipeline: Path, start: Path) -> Story:
    stage, how = request.param, HOW[request.param]
    undisturbed = make_run(pipeline, stage, *SCHEDULE, **inputs(stage, start))
    disturbed = hold(make_run(pipeline, stage, *SCHEDULE, name=f"{stage}-disturbed", **inputs(stage, start)))
    calm, first = Attempt(undisturbed), Attempt(disturbed)
    if how == "SIGKILL":
        first.stop_at(5, first.kill)  # step 5 is done and lost; step 4 was saved
        assert first.codes() == [-signal.SIGKILL]
        expected = 4
    else:
        first.stop_at(2, first.terminate if how == "SIGTERM" else lambda: disturbed.request_stop(1))
        first.finish(STOPPED)
        expected = 3  # asked at the end of step 2, after the look for requests: the next one is the last
    after = {
        "output": disturbed.model.exists(),
        "stopped": [(e["attempt"], e["step"]) for e in events(disturbed, "stopped")],
        "newest": resume.newest_complete(disturbed)[0],
        "logged": [line["step"] for line in metrics(disturbed)],
    }
    calm.finish()
    second = Attempt(disturbed, 2)
    second.finish()
    return Story(stage, undisturbed, disturbed, expected, second.output(), after)


def test_output_is_whole_and_says_what_it_is(story: Story) -> None:
    run = story.undisturbed
    assert manifest.problem(run.model, hashes=True) is None
    about = manifest.read(run.model)
    assert about is not None
    assert (about["stage"], about["identity"], about["step"]) == (story.stage, f"id-{story.stage}", STEPS)
    assert not (run.root / "model.partial").exists()


def test_output_loads_as_what_it_is(story: Story, start: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loader = AutoModelForSequenceClassification if story.stage == "rm" else AutoModelForCausalLM
    model, info = loader.from_pretrained(story.undisturbed.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(story.undisturbed.model)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(start).get_vocab()
    assert "{% generation %}" in tokenizer.chat_template
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer("<|user|>1+1=?", return_tensors="pt")
    assert model(**batch).logits.shape == ((1, 1) if story.stage == "rm" else (1, 6, len(tokenizer)))
    assert all(p.isfinite().all() for p in model.parameters())
    trained, before = model.get_input_embeddings().weight, AutoModelForCausalLM.from_pretrained(start)
    assert not torch.equal(trained, before.get_input_embeddings().weight)


def test_metrics_have_every_step(story: Story) -> None:
    lines = [line for line in metrics(story.undisturbed) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["max_steps"] for line in lines} == {STEPS}
    assert all(math.isfinite(line["loss"]) and line["learning_rate"] >= 0 for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_no_pickle_leaves_the_house(story: Story) -> None:
    run = story.undisturbed
    folders = [run.model, *run.inference_checkpoints.iterdir()]
    assert not [p for folder in folders for p in folder.rglob("*") if p.suffix in PICKLES]
    assert all((folder / "model.safetensors").is_file() for folder in folders)


def test_files_are_as_readable_as_their_folder(story: Story) -> None:
    run = story.undisturbed
    for folder in (run.model, *run.checkpoints.glob("checkpoint-*"), *run.inference_checkpoints.iterdir()):
        granted = folder.stat().st_mode & 0o666
        assert granted & 0o044, "the test's own umask hides everything"
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {granted}


def test_checkpoints_are_whole_and_only_the_newest_stay(story: Story) -> None:
    run = story.undisturbed
    assert [e["step"] for e in events(run, "checkpoint_saved")] == [2, 4, 6, 8]
    assert [step for step, _ in resume.checkpoint_steps(run)] == [6, 8]
    for step, folder in resume.checkpoint_steps(run):
        assert manifest.problem(folder, hashes=True) is None
        about = manifest.read(folder)
        assert about is not None and (about["step"], about["attempt"], about["world_size"]) == (step, 1, 1)
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(about["files"])


def test_inference_checkpoints_come_on_their_schedule(story: Story) -> None:
    run = story.undisturbed
    assert {p.name for p in run.inference_checkpoints.iterdir()} == {"step-3", "step-6"}
    seen = set()
    for folder in run.inference_checkpoints.iterdir():
        assert manifest.problem(folder, hashes=True) is None
        seen.add((folder / "model.safetensors").read_bytes())
    assert len(seen | {(run.model / "model.safetensors").read_bytes()}) == 3


def test_a_stop_saves_its_very_step_and_hands_nothing_on(story: Story) -> None:
    assert not story.after_stop["output"]
    newest = story.after_stop["newest"]
    assert newest is not None and newest.name == f"checkpoint-{story.resumed_from}"
    if HOW[story.stage] == "SIGKILL":
        assert story.after_stop["stopped"] == []
    else:
        assert story.after_stop["stopped"] == [(1, story.resumed_from)]
        assert max(story.after_stop["logged"]) == story.resumed_from


def test_the_next_attempt_goes_on_from_there(story: Story) -> None:
    started = [(e["attempt"], e["step"]) for e in events(story.resumed, "training_started")]
    assert started == [(1, 0), (2, story.resumed_from)]
    assert "set aside" not in story.resume_output


def test_resumed_ends_with_the_same_weights_bit_for_bit(story: Story) -> None:
    assert weights(story.resumed) == weights(story.undisturbed)
    assert manifest.problem(story.resumed.model, hashes=True) is None


def test_resumed_logs_each_step_once_with_the_same_numbers(story: Story) -> None:
    def numbers(run: RunDirectory) -> list[tuple[int, float, float]]:
        return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run) if "loss" in m]

    assert numbers(story.resumed) == numbers(story.undisturbed)


# ----------------------------------------------------------------------------- damage, early stops, eval


def test_damaged_checkpoint_is_set_aside_and_an_early_stop_is_kept(pipeline: Path, start: Path) -> None:
    """Two runs side by side. One finds its newest checkpoint damaged; the other was asked to stop at start-up."""
    wanted = make_run(pipeline, "sft", *SCHEDULE, name="calm", model=start)
    damaged = hold(make_run(pipeline, "sft", *SCHEDULE, name="damaged", model=start))
    calm, first = Attempt(wanted), Attempt(damaged)
    first.stop_at(4, lambda: damaged.request_stop(1))
    first.finish(STOPPED)
    calm.finish()
    optimizer = damaged.checkpoints / "checkpoint-5" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, the size as before
    optimizer.write_bytes(content)
    (damaged.checkpoints / "checkpoint-7").mkdir()  # a save that was killed

    early = make_run(pipeline, "sft", *SCHEDULE, name="early", model=start)
    early.request_stop(1)
    second, asked = Attempt(damaged, 2), Attempt(early)
    second.finish()
    asked.finish(STOPPED)
    assert "set aside checkpoint-5: optimizer.pt is damaged" in second.output()
    assert "set aside checkpoint-7: no manifest.json" in second.output()
    broken = {p.name for p in damaged.checkpoints.iterdir() if p.name.startswith("broken")}
    assert broken == {"broken-checkpoint-5-attempt-2", "broken-checkpoint-7-attempt-2"}
    assert [(e["attempt"], e["step"]) for e in events(damaged, "training_started")] == [(1, 0), (2, 4)]
    assert [m["step"] for m in metrics(damaged) if "loss" in m] == list(range(1, STEPS + 1))
    assert weights(damaged) == weights(wanted)

    assert [e["step"] for e in events(early, "stopped")] == [1]
    third = Attempt(early, 2)  # the old request is still in the file: it is not for this attempt
    third.finish()
    assert weights(early) == weights(wanted)


def test_eval_of_a_policy_and_of_a_reward_model(pipeline: Path, start: Path) -> None:
    scorer = pipeline / "rm" / "model"
    if not scorer.exists():
        scorer = Attempt(make_run(pipeline, "rm", "training.max_steps=1", model=start)).finish().model
    policy = make_run(pipeline, "eval", "eval.num_problems=6", model=start)
    judged = make_run(pipeline, "eval", "data.held_out=20", "eval.num_problems=20", name="eval_rm", model=scorer)
    for attempt in [Attempt(policy), Attempt(judged)]:
        attempt.finish()
    for run, metric, count in ((policy, "accuracy", 6), (judged, "preference_accuracy", 20)):
        assert manifest.problem(run.model, hashes=True) is None
        result = results.read(run)
        score, figures = result.score, result.figures
        assert (result.headline, score.count) == (metric, count)
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert run is policy or (0 < figures["brier"].value < 1 and 0 <= figures["calibration_error"].value <= 0.5)
        assert summarise(ledger.read(run.ledger)).training
    samples = [json.loads(line) for line in (policy.model / "samples.jsonl").read_text().splitlines()]
    result = results.read(policy)
    assert len(samples) == 6
    assert all(sum(map(int, s["prompt"].removesuffix("=?").split("+"))) == int(s["answer"]) for s in samples)
    assert result.score.value == sum(s["correct"] for s in samples) / 6
    assert all(1 < result.figures[name].value < 400 for name in ("perplexity_text", "perplexity_answers"))


# -------------------------------------------------------------------------------------------- two ranks

PAIR = ["slurm.gpus_per_node=2", "training.per_device_train_batch_size=2", *SCHEDULE]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_ranks_train_stop_together_and_resume_exactly(stage: str, pipeline: Path, start: Path) -> None:
    calm = make_run(pipeline, stage, *PAIR, name=f"{stage}-calm-pair", model=start)
    run = hold(make_run(pipeline, stage, *PAIR, name=f"{stage}-pair", model=start))
    undisturbed, first = Attempt(calm, world_size=2), Attempt(run, world_size=2)
    # one rank alone is told by SLURM, or rank 0 alone reads the request
    told = (lambda: first.processes[1].send_signal(signal.SIGTERM)) if stage == "ppo" else (lambda: run.request_stop(1))
    first.stop_at(2, told)
    first.finish(STOPPED)
    undisturbed.finish()
    (stopped,) = events(run, "stopped")
    assert stopped["step"] in ((2, 3) if stage == "ppo" else (3,))  # rank 1 may have been before its own look
    newest, broken = resume.newest_complete(run)
    assert newest is not None and newest.name == f"checkpoint-{stopped['step']}" and not broken
    about = manifest.read(newest)
    assert about is not None and about["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(about["files"])

    Attempt(run, 2, world_size=2).finish()
    assert [e["step"] for e in events(run, "training_started")] == [0, stopped["step"]]
    assert weights(run) == weights(calm)
    assert [m["step"] for m in metrics(run) if "loss" in m] == list(range(1, STEPS + 1))


def test_two_ranks_learn_from_the_same_batches_as_one(pipeline: Path, start: Path) -> None:
    """8 samples a step: 2 a rank, on 2 ranks, accumulated twice, give the losses of one rank."""
    config = OmegaConf.create(make_config("sft", *PAIR))
    assert accumulation_steps(config) == 2
    pair, alone = pipeline / "sft-calm-pair", pipeline / "sft"
    runs = []
    for root, options, ranks in ((pair, PAIR, 2), (alone, SCHEDULE, 1)):
        if not (root / "model").exists():  # run alone, not with the tests above
            Attempt(make_run(pipeline, "sft", *options, name=root.name, model=start), world_size=ranks).finish()
        runs.append(RunDirectory(root))
    state = json.loads((runs[0].checkpoints / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(STEPS * 8 / 48)
    losses = [[m["loss"] for m in metrics(run) if "loss" in m] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# ------------------------------------------------------------------------- in this process: data, lengths


def batches(run: RunDirectory, stage: str) -> list[dict[str, torch.Tensor]]:
    """What the stage's trainer hands to the model."""
    import importlib

    trainer = importlib.import_module(f"post_training.stages.{stage}").build_trainer(common.open_stage(run))
    return list(trainer.get_train_dataloader())


@pytest.mark.usefixtures("here")
def test_sft_learns_what_the_assistant_says_and_nothing_else(tmp_path: Path, start: Path) -> None:
    from transformers import AutoTokenizer

    ids_of = AutoTokenizer.from_pretrained(start).convert_tokens_to_ids
    assistant, end = ids_of("<|assistant|>"), ids_of("<|end|>")
    rows = 0
    for batch in batches(make_run(tmp_path, "sft", *SCHEDULE, model=start), "sft"):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            first, last = ids.index(assistant) + 1, ids.index(end)
            expected = [i if first <= n <= last else -100 for n, i in enumerate(ids)]
            assert labels == expected
            assert last > first > 1
            rows += 1
    assert rows == 48


@pytest.mark.usefixtures("here")
def test_base_learns_every_token_and_the_end(tmp_path: Path, start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    run = make_run(tmp_path, "base", *SCHEDULE)
    texts = []
    for batch in batches(run, "base"):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            kept = [i for i in ids if i != tokenizer.pad_token_id]
            assert labels == kept + [-100] * (len(ids) - len(kept))
            assert kept[-1] == tokenizer.eos_token_id
            texts.append(tokenizer.decode(kept[:-1]))
    documents = Arithmetic(common.load_config(run.read_config()).data).documents("train")["text"]
    assert sorted(texts) == sorted(documents)


@pytest.mark.usefixtures("here")
def test_kto_sees_good_and_bad_answers_and_learns_the_answers_alone(tmp_path: Path, start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    run = make_run(tmp_path, "kto", *SCHEDULE, model=start)
    pairs = Arithmetic(common.load_config(run.read_config()).data).preferences("train")
    expected = {(r["prompt"][0]["content"], r[side][0]["content"], side == "chosen") for r in pairs
                for side in ("chosen", "rejected")}  # fmt: skip
    seen = []
    for batch in batches(run, "kto"):
        for ids, mask, good in zip(batch["input_ids"], batch["completion_mask"], batch["label"], strict=True):
            prompt, answer = (tokenizer.decode(ids[mask == m], skip_special_tokens=True) for m in (0, 1))
            seen.append((prompt, answer, bool(good)))
    assert len(seen) == 2 * len(pairs)
    assert set(seen) == expected
    assert [good for *_, good in seen] != [True, False] * len(pairs), "in the order of the pairs"


@pytest.mark.usefixtures("here")
def test_orpo_learns_the_answers_of_a_pair_alone(tmp_path: Path, start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    run = make_run(tmp_path, "orpo", *SCHEDULE, model=start)
    pairs = Arithmetic(common.load_config(run.read_config()).data).preferences("train")
    seen = set()
    for batch in batches(run, "orpo"):
        for chosen, rejected in zip(batch["chosen_labels"], batch["rejected_labels"], strict=True):
            seen.add(tuple(tokenizer.decode(labels[labels != -100]) for labels in (chosen, rejected)))
    assert seen == {tuple(r[side][0]["content"] + "<|end|>" for side in ("chosen", "rejected")) for r in pairs}


@pytest.mark.usefixtures("here")
def test_dropout_is_on_where_it_is_kept_and_off_where_answers_are_compared(tmp_path: Path) -> None:
    import importlib

    made = make_run(tmp_path, "base", "model.dropout=0.25", "training.max_steps=1", name="start")
    assert train.run_attempt(made, 1) == 0

    def dropout(stage: str) -> set[float]:
        run = make_run(tmp_path, stage, *SCHEDULE, **({} if stage == "base" else {"model": made.model}))
        run.config.write_text(run.config.read_text().replace("dropout: 0.0", "dropout: 0.25"))
        trainer = importlib.import_module(f"post_training.stages.{stage}").build_trainer(common.open_stage(run))
        config = getattr(trainer.model, "policy", trainer.model).config
        assert config.attention_dropout == 0.25, "handed on to the next stages"
        return {m.attention_dropout for m in trainer.model.modules() if hasattr(m, "attention_dropout")}

    assert {stage: dropout(stage) for stage in STAGES} == {
        stage: {0.0} if stage in ("rm", "dpo", "orpo", "kto") else {0.25} for stage in STAGES
    }


def tokens_of_documents(run: RunDirectory) -> int:
    """Bytes and an end for each document."""
    return sum(len(t) + 1 for t in Arithmetic(common.load_config(run.read_config()).data).documents("train")["text"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("max_steps=3", 3),
        ("num_training_samples=17", 3),  # 8 a step: two are not enough
        ("num_training_samples=16", 2),
        ("num_train_epochs=0.5", 4),  # 64 documents, 8 a step
        ("num_train_epochs=1.25", 10),
        ("num_training_tokens={tokens}", 5),
    ],
)
def test_each_length_gives_its_steps(tmp_path: Path, length: str, steps: int) -> None:
    run = make_run(tmp_path, "base", name="count")
    tokens = int(5.45 * 8 * tokens_of_documents(run) / 64)  # 5 with the ends counted, 6 without
    run = make_run(tmp_path, "base", "checkpointing.save_steps=100", "training." + length.format(tokens=tokens))
    assert train.run_attempt(run, 1) == 0
    about = manifest.read(run.model)
    assert about is not None and about["step"] == steps
    assert [m["step"] for m in metrics(run) if "loss" in m] == list(range(1, steps + 1))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "orpo", "kto"])
def test_tokens_are_a_length_of_other_stages_too(tmp_path: Path, start: Path, stage: str) -> None:
    """Prompt and answer, for pairs both answers with it, are what a sample's tokens are; kto's samples are answers."""
    run = make_run(tmp_path, stage, name="count")
    source = Arithmetic(common.load_config(run.read_config()).data)

    def size(*texts: str) -> int:  # two role tokens and an end; the four tags are one token each
        text = "".join(texts)
        tags = ("<think>", "</think>", "<answer>", "</answer>")
        return len(text) - sum(len(t) - 1 for t in tags) + 3

    if stage == "sft":
        sizes = [size(*(m["content"] for m in r["messages"])) for r in source.demonstrations("train")]
    else:
        rows = source.preferences("train")
        sizes = [size(r["prompt"][0]["content"], r[k][0]["content"]) for r in rows for k in ("chosen", "rejected")]
    per_step = 8 * sum(sizes) / len(sizes) * (1 if stage in ("sft", "kto") else 2)
    run = make_run(tmp_path, stage, f"training.num_training_tokens={int(4.3 * per_step)}", model=start)
    assert train.run_attempt(run, 1) == 0
    about = manifest.read(run.model)
    assert about is not None and about["step"] == 4


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("stage", "steps"), [("ppo", 2), ("grpo", 5), ("rloo", 5), ("dpo", 2)])
def test_samples_are_prompts(tmp_path: Path, start: Path, stage: str, steps: int) -> None:
    """grpo answers each of its prompts 4 times, so that its batch of 8 holds 2 of them."""
    from post_training.stages.common import trainer_arguments

    run = make_run(tmp_path, stage, "training.max_steps=null", "training.num_training_samples=9", model=start)
    assert trainer_arguments(common.open_stage(run), 1e-3)["max_steps"] == steps


def test_tokens_to_steps() -> None:
    from post_training.stages.common import steps_for_tokens

    def steps(tokens: int) -> int:
        options = [f"training.num_training_tokens={tokens}", "training.effective_batch_size=4"]
        return steps_for_tokens(OmegaConf.create(make_config("sft", *options)), [10, 20, 30])

    assert [steps(n) for n in (1, 80, 119, 121, 800)] == [1, 1, 1, 2, 10]  # 4 samples of 20 tokens a step


@pytest.mark.usefixtures("here")
def test_data_that_cannot_be_used_ends_with_status_2(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "sft", *SCHEDULE, "data.name=gsm8k", f"data.path={tmp_path}/none.jsonl", model=start)
    monkeypatch.setattr("sys.argv", ["train", str(run.root)])
    monkeypatch.setenv("POST_TRAINING_ATTEMPT", "1")
    assert train.main() == 2
    assert f"error: data.path={tmp_path}/none.jsonl: no such file" in capsys.readouterr().err
    assert not run.model.exists()


@pytest.mark.usefixtures("here")
def test_sft_refuses_a_template_without_marks(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(start, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    run = make_run(tmp_path, "sft", *SCHEDULE, model=model)
    assert train.run_attempt(run, 1) == 2
    said = capsys.readouterr().err
    assert "model.chat_template: has no {% generation %} marks" in said and "fix:" in said
    assert "has no {% generation %} marks" in run.error(1).read_text()


# ------------------------------------------------------------------------------------------ small pieces


def checkpoint(run: RunDirectory, step: int, whole: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text(f"state {step}")
    if whole:
        manifest.write(folder)
    return folder


def test_newest_complete_goes_by_number_and_wholeness(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert resume.newest_complete(run) == (None, [])
    nine, ten = checkpoint(run, 9), checkpoint(run, 10)
    checkpoint(run, 100, whole=False)
    (run.checkpoints / "broken-checkpoint-200-attempt-1").mkdir()
    (run.checkpoints / "checkpoint-x").mkdir()
    (run.checkpoints / "checkpoint-300").write_text("a file")
    found, broken = resume.newest_complete(run)
    assert found == ten
    assert [(p.name, why) for p, why in broken] == [("checkpoint-100", "no manifest.json")]
    (ten / "optimizer.pt").write_text("state 1!")  # as long as before
    assert resume.newest_complete(run)[0] == nine


def test_set_aside_deletes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    target = resume.set_aside(run, checkpoint(run, 7, whole=False), attempt=3)
    assert target == run.checkpoints / "broken-checkpoint-7-attempt-3"
    assert (target / "optimizer.pt").read_text() == "state 7"
    assert resume.checkpoint_steps(run) == []


@pytest.mark.parametrize(("limit", "left"), [(1, [100]), (2, [20, 100]), (9, [3, 20, 100])])
def test_rotation_keeps_the_newest_whole_ones(tmp_path: Path, limit: int, left: list[int]) -> None:
    run = RunDirectory(tmp_path / "run")
    for step in (100, 20, 3):
        checkpoint(run, step)
    checkpoint(run, 50, whole=False)
    resume.rotate(run, limit)
    assert [step for step, _ in resume.checkpoint_steps(run)] == sorted([*left, 50])


def test_metrics_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    lines = ['{"step": 1, "loss": 3}', '{"step": 2}', '{"step": 3}', "[4]", '{"loss": 1}', '{"step": 5, "lo']
    run.metrics.write_text("\n".join(lines))
    config = common.load_config(make_config("sft", *SCHEDULE))
    AttemptCallback(run, 1, config.checkpointing, None, None, None)._cut_metrics(2)  # type: ignore[arg-type]
    assert run.metrics.read_text() == "".join(f"{line}\n" for line in lines[:2])


def test_grpo_asks_in_an_order_of_each_pass_s_own() -> None:
    """A sampler made in the middle of a run goes on as one that was there from the start; the first pass is TRL's."""
    from trl.trainer.utils import RepeatSampler

    from post_training.stages.grpo import EpochSampler

    shape = {"data_source": range(10), "mini_repeat_count": 2, "batch_size": 2, "repeat_count": 3, "seed": 7}
    epoch = 0
    sampler = EpochSampler(**shape, epoch=lambda: epoch)
    passes = []
    for epoch in range(3):
        passes.append(list(sampler))
        assert passes[-1] == list(EpochSampler(**shape, epoch=lambda e=epoch: e))
    assert passes[0] == list(RepeatSampler(**shape))
    assert len({tuple(order) for order in passes}) == 3
    assert all(sorted(order) == sorted(passes[0]) for order in passes)


SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, {}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
         {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8"},
         {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, {}),  # one task trains alone
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, {}),  # the batch script is no step
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {}),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8", "RANK": "2", "WORLD_SIZE": "4"}, {"RANK": "2", "WORLD_SIZE": "4"}),
    ],
)  # fmt: skip
def test_ranks_come_from_slurm(env: dict[str, str], expected: dict[str, str]) -> None:
    env = dict(env)
    set_rank_environment(env)
    assert {k: v for k, v in env.items() if not k.startswith("SLURM")} == expected
