"""Stages that learn from rewards and preferences: settings, logged figures, the user's own functions, bad input.

Everything here trains in this process, a tiny model for a few steps.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Trainer

from conf.check import ConfigError
from launchers.selection import select
from launchers.submission import make_plan
from launchers.submit import Code, Undo, write
from post_training import train
from post_training.run.directory import RunDirectory
from post_training.stages import common
from post_training.stages.grpo import group_figures
from tests.in_process import training_here
from tests.records import write as write_records
from tests.training import make_run, metrics


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """The model that all stages start from."""
    run = make_run(folder, "base", "training.max_steps=2", "seed=5", name="start")
    assert train.run_attempt(run, 1) == 0
    return run.model


@pytest.fixture(scope="module")
def scorer(folder: Path, start: Path) -> Path:
    """A reward model."""
    run = make_run(folder, "rm", "training.max_steps=4", "rm.lr=1e-2", name="scorer", model=start)
    assert train.run_attempt(run, 1) == 0
    return run.model


def trainer_of(run: RunDirectory) -> Trainer:
    stage = common.open_stage(run)
    return importlib.import_module(f"post_training.stages.{stage.cfg.stage}").build_trainer(stage)


def logged(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


# ------------------------------------------------------------------------------------------ grpo and rloo

SHORT = ("training.max_steps=2", "checkpointing.save_steps=100")
RECIPES = {
    "dapo": ["grpo.epsilon_high=0.28", "grpo.mask_truncated_completions=true"],
    "dr_grpo": ["grpo.loss_type=dr_grpo", "grpo.scale_rewards=none"],
    "gspo": ["grpo.loss_type=grpo", "grpo.importance_sampling_level=sequence", "grpo.epsilon=3e-4",
             "grpo.epsilon_high=4e-4"],
}  # fmt: skip


def test_the_papers_settings_reach_trl(tmp_path: Path, start: Path) -> None:
    seen = {}
    for name, overrides in RECIPES.items():
        args = trainer_of(make_run(tmp_path, "grpo", *SHORT, *overrides, name=name, model=start)).args
        seen[name] = (args.loss_type, args.epsilon, args.epsilon_high, args.scale_rewards,
                      args.importance_sampling_level, args.mask_truncated_completions)  # fmt: skip
    assert seen == {
        "dapo": ("dapo", 0.2, 0.28, "group", "token", True),
        "dr_grpo": ("dr_grpo", 0.2, None, "none", "token", False),
        "gspo": ("grpo", 3e-4, 4e-4, "group", "sequence", False),
    }


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_group_figures_and_kl_are_logged(tmp_path: Path, start: Path, stage: str) -> None:
    run = make_run(tmp_path, stage, *SHORT, f"{stage}.beta=0.1", model=start)
    assert train.run_attempt(run, 1) == 0
    for line in logged(run):
        assert 0 < line["groups/informative"] <= 1 and line["groups/reward_std"] > 0
        assert line["groups/reward_mean"] == pytest.approx(line["reward"], abs=1e-6)
        assert line["groups/reward_mean"] <= line["groups/reward_best"] <= 1.1
        assert {"kl", "entropy", "completions/mean_length", "rewards/random/mean"} <= set(line)
    assert logged(run)[0]["kl"] == pytest.approx(0, abs=1e-6)  # the model is its own reference
    assert abs(logged(run)[1]["kl"]) > 1e-9 and (stage == "rloo" or logged(run)[1]["kl"] > 0)  # k3 is never negative


@given(st.lists(st.lists(st.floats(-2, 2, width=16), min_size=3, max_size=3), min_size=1, max_size=5))
def test_group_figures_as_written_out(groups: list[list[float]]) -> None:
    def mean(x: list[float]) -> float:
        return sum(x) / len(x)

    deviations = [math.sqrt(sum((r - mean(g)) ** 2 for r in g) / 2) for g in groups]
    figures = group_figures(torch.tensor(groups))
    assert figures["reward_mean"] == pytest.approx(mean([mean(g) for g in groups]), abs=1e-5)
    assert figures["reward_std"] == pytest.approx(mean(deviations), abs=1e-5)
    assert figures["reward_best"] == pytest.approx(mean([max(g) for g in groups]), abs=1e-5)
    assert figures["informative"] == pytest.approx(mean([float(max(g) - min(g) > 1e-6) for g in groups]))


# ---------------------------------------------------------------------------- reward functions of one's own


def submitted(base: Path, *overrides: str) -> Any:
    """What `launchers.submit stage=grpo` would write, and its run."""
    tokens = ["cluster=local", "stage=grpo", f"inputs.model={base / 'm'}", f"paths.output_base={base}", *overrides]
    (base / "m").mkdir(exist_ok=True)
    (base / "m" / "config.json").write_text("{}")
    selection = select(tokens, only_one=True)
    return make_plan(selection, ask=False)


def test_the_file_is_frozen_with_the_run(tmp_path: Path) -> None:
    file, moved = tmp_path / "my rewards.py", tmp_path / "elsewhere" / "my rewards.py"
    file.write_text("def brief(prompts, completions, **_):\n    return [0.0 for _ in completions]\n")
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())

    def plan(path: Path) -> Any:
        return submitted(tmp_path, f"grpo.reward.functions=[{{path: '{path}:brief', weight: 0.5}}]")

    first = plan(file)
    write(first, Undo(), Code())
    planned = first.stages["grpo"]
    (function,) = yaml.safe_load(planned.run.config.read_text())["grpo"]["reward"]["functions"]
    place, _, name = function["path"].rpartition(":")
    assert place == f"functions/{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}/my rewards.py"
    assert (name, function["weight"]) == ("brief", 0.5)
    copy = planned.run.code / place
    assert copy.read_bytes() == file.read_bytes()
    assert plan(moved).stages["grpo"].frozen["identity"] == planned.frozen["identity"], "what counts is what it says"
    file.write_text(file.read_text().replace("0.0", "1.0"))
    with pytest.raises(ConfigError, match=r"grpo\.reward\.functions"):
        plan(file)  # the run's folder holds another reward
    assert "0.0" in copy.read_text()


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        (None, "no.py:f", "No such file"),
        ("def f(:\n", "r.py:f", "line 1"),
        ("def g(): pass\n", "r.py:f", "defines no function f"),
        ("def f(): pass\n", "r.py", "no file and function"),
        ("def f(): pass\n", "r.txt:f", "no file and function"),
        ("def correct(): pass\n", "r.py:correct", "another reward named correct"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_submission(
    tmp_path: Path, source: str | None, path: str, says: str
) -> None:
    if source is not None:
        (tmp_path / "r.py").write_text(source)
    with pytest.raises(ConfigError) as error:
        submitted(tmp_path, f"grpo.reward.functions=[{{path: '{tmp_path / path}'}}]")
    assert error.value.key == "grpo.reward.functions" and says in error.value.problem and error.value.fix


def test_rewards_that_cannot_teach_are_refused_at_submission(tmp_path: Path) -> None:
    for overrides, key in (
        (["grpo.reward.correct=0", "grpo.reward.format=0"], "grpo.reward"),
        (["grpo.reward.format=1"], "grpo.reward.format"),
        (["grpo.loss_type=luspo"], "grpo.importance_sampling_level"),
        (["grpo.loss_type=dapoo"], "grpo.loss_type"),
        (["grpo.num_generations=1"], "grpo.num_generations"),
    ):
        with pytest.raises(ConfigError) as error:
            submitted(tmp_path, *overrides)
        assert error.value.key == key and error.value.fix


@pytest.mark.parametrize("stage", ["grpo", "rloo", "ppo"])
def test_a_function_of_ones_own_teaches_and_a_bad_one_ends_the_run(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    def attempt(name: str, source: str) -> tuple[int, RunDirectory]:
        place = f"functions/{hashlib.sha256(source.encode()).hexdigest()[:16]}/{name}.py"
        run = make_run(
            tmp_path, stage, *SHORT, f"{stage}.reward.random=0", f"{stage}.reward.correct=0",
            f"{stage}.reward.functions=[{{path: '{place}:f', weight: 2.0}}]",
            name=name, model=start,
        )  # fmt: skip
        (run.code / place).parent.mkdir(parents=True)
        (run.code / place).write_text(source)
        return train.run_attempt(run, 1), run

    good = "def f(prompts, completions, answer, completion_ids, **_):\n    return [len(i) for i in completion_ids]"
    code, run = attempt("good", good)
    assert code == 0
    assert logged(run)[0]["reward"] > 2
    code, run = attempt("bad", "def f(prompts, completions, **_):\n    return [float('nan') for _ in completions]")
    assert code == 2
    said = capsys.readouterr().err
    assert "error: reward function bad.py:f: gave nan for completion " in said and "fix: " in said
    assert "Traceback" not in said
    assert "reward function bad.py:f: gave nan" in run.error(1).read_text()
    assert not run.model.exists() and not list(run.root.glob("model.partial*"))


# ------------------------------------------------------------------------------------------------------ ppo

SETTINGS = {
    "value_init": "rm", "kl_coef": 0.3, "kl_estimator": "k3", "adaptive_kl": True, "kl_target": 2.0, "kl_horizon": 50,
    "value_clip_range": 0.1, "whiten_advantages": False, "whiten_rewards": True, "reward_clip": 0.9,
    "missing_eos_penalty": 0.25, "entropy_coef": 0.01,
}  # fmt: skip
FIGURES = ("reward", "kl", "kl_coef", "clip_fraction", "value_loss", "explained_variance", "entropy",
           "completion_length", "score_rm", "rewards/random")  # fmt: skip


def test_ppo_takes_its_settings_and_logs_its_figures(tmp_path: Path, start: Path, scorer: Path) -> None:
    overrides = [f"ppo.{k}={v}" for k, v in SETTINGS.items()]
    run = make_run(
        tmp_path, "ppo", *SHORT, *overrides, "ppo.reward_model_weight=0.5", model=start, reward_model=scorer
    )
    trainer = trainer_of(run)
    assert {k: getattr(trainer.args, k) for k in SETTINGS if k != "value_init"} == {
        k: v for k, v in SETTINGS.items() if k != "value_init"
    }
    assert torch.equal(trainer.model.value_head.weight, trainer.reward_model.score.weight)
    assert train.run_attempt(run, 1) == 0
    for line in logged(run):
        assert set(FIGURES) <= set(line) and all(math.isfinite(line[name]) for name in FIGURES)
        assert -0.9 - 0.25 <= line["reward"] <= 0.9, "clipped, and less for those that were cut off"
    assert logged(run)[1]["kl_coef"] != logged(run)[0]["kl_coef"], "it adapts"


def test_the_reward_model_may_lend_its_head_alone(tmp_path: Path, start: Path, scorer: Path) -> None:
    run = make_run(tmp_path, "ppo", *SHORT, "ppo.value_init=rm", model=start, reward_model=scorer)
    trainer = trainer_of(run)
    assert trainer.model.value_head.weight.abs().sum() > 0 and trainer.reward_model is None
    plain = trainer_of(make_run(tmp_path, "ppo", *SHORT, name="plain", model=start))
    assert plain.model.value_head.weight.abs().sum() == 0


def test_under_adapters_ppos_reference_is_the_policy_without_them(tmp_path: Path, start: Path) -> None:
    """It holds no second model, asks without dropout, and a checkpoint holds what is trained alone."""
    run = make_run(tmp_path, "ppo", *SHORT, "lora.r=4", "lora.dropout=0.5", model=start)
    trainer: Any = trainer_of(run)
    assert trainer.ref_model is None
    rows = [trainer.train_dataset[i] for i in range(4)]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        made = trainer._make_rollout(rows)
        given = made["input_ids"], made["attention_mask"], made["mask"].shape[1]
        trainer.model.eval()
        (asked,) = trainer._evaluate_reference(*given)
        policy = trainer._evaluate_policy(*given)[0]
        trainer.ref_model = common.load_causal_lm(common.load_config(run.read_config()), str(start), trainer.tokenizer)
        (expected,) = trainer._evaluate_reference(*given)
    torch.testing.assert_close(asked, expected)
    assert (policy - expected).abs().max() > 0.1
    trainer.save_model(str(tmp_path / "saved"))
    kept = load_file(tmp_path / "saved" / "model.safetensors")
    assert all("lora_" in name or name.startswith("value_head.") for name in kept) and len(kept) == 2 * 7 + 2

    another = shutil.copytree(start, tmp_path / "another")
    other: Any = trainer_of(make_run(tmp_path, "ppo", *SHORT, "lora.r=4", name="o", model=start, reference=another))
    assert other.ref_model is not None


# ------------------------------------------------------------------------------ dpo, kto, orpo, rm: preferences


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        # the policy is its own reference at first, so that all margins are 0
        (["dpo.loss_type=ipo", "dpo.beta=0.2"], (1 / (2 * 0.2)) ** 2),
        (["dpo.loss_type=[robust]", "dpo.label_smoothing=0.2"], math.log(2)),
        (["dpo.loss_type=[sigmoid,hinge]", "dpo.loss_weights=[0.5,3.0]"], 0.5 * math.log(2) + 3),
        (["dpo.precompute_ref_log_probs=true"], math.log(2)),
    ],
)
def test_dpo_trains_on_the_losses_that_it_is_told(
    tmp_path: Path, start: Path, overrides: list[str], first: float
) -> None:
    run = make_run(tmp_path, "dpo", *SHORT, *overrides, model=start)
    assert train.run_attempt(run, 1) == 0
    assert logged(run)[0]["loss"] == pytest.approx(first, rel=1e-4)
    assert {"rewards/accuracies", "rewards/margins"} <= set(logged(run)[0])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["dpo.loss_type=sigmod"], "dpo.loss_type"),
        (["dpo.loss_type=[sigmoid,nll]"], "dpo.loss_type"),
        (["dpo.loss_type=[]"], "dpo.loss_type"),
        (["dpo.loss_type=sft"], "dpo.loss_type"),
        (["dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[1.0]"], "dpo.loss_weights"),
        (["dpo.label_smoothing=0.1"], "dpo.label_smoothing"),
        (["dpo.loss_type=robust", "dpo.label_smoothing=0.5"], "dpo.label_smoothing"),
        (["dpo.loss_type=exo_pair"], "dpo.label_smoothing"),
    ],
)
def test_dpo_losses_that_cannot_be_are_refused_at_submission(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        select(["cluster=local", "stage=dpo", "pipeline=dpo", *overrides], only_one=True)
    assert error.value.key == key and error.value.fix


def log_prob(model: Any, tokenizer: Any, prompt: list[Any], answer: list[Any]) -> torch.Tensor:
    """Sum of the log-probabilities of an answer's tokens, its closing mark with them. Written out."""
    whole = tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = torch.tensor([whole])
    logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
    return logprobs.gather(1, ids[0, 1:, None])[len(asked) - 1 :].sum()


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [("dpo", []), ("dpo", ["dpo.precompute_ref_log_probs=true"]), ("kto", ["kto.precompute_ref_log_probs=true"]),
     ("kto", []), ("orpo", []), ("rm", [])],
)  # fmt: skip
def test_held_out_pairs_are_judged_at_the_end(
    tmp_path: Path, start: Path, stage: str, overrides: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from post_training import data

    run = make_run(
        tmp_path, stage, *overrides, "training.max_steps=6", f"{stage}.lr=1e-2", "eval.num_problems=10", model=start
    )
    assert train.run_attempt(run, 1) == 0
    figures = json.loads(run.held_out.read_text())
    (line,) = [line for line in metrics(run) if "eval_loss" in line]
    assert line["step"] == 6 and line["eval_loss"] == figures["loss"]
    if stage in ("rm", "orpo"):
        prefix = "" if stage == "rm" else "rewards/"
        accuracy, margin = ("accuracy", "margin") if stage == "rm" else ("accuracies", "margins")
        assert figures["rows"] == 8 and 0 <= figures[prefix + accuracy] <= 1 and math.isfinite(figures[prefix + margin])
        return
    tokenizer = AutoTokenizer.from_pretrained(start)
    trained, before = (AutoModelForCausalLM.from_pretrained(path) for path in (run.model, start))
    margins = []
    with torch.no_grad():
        for pair in data.load(common.open_stage(run).cfg.data).preferences("held_out").select(range(8)):
            good, bad = (
                log_prob(trained, tokenizer, pair["prompt"], pair[side])
                - log_prob(before, tokenizer, pair["prompt"], pair[side])
                for side in ("chosen", "rejected")
            )
            margins.append(0.1 * float(good - bad))
    assert figures["rewards/margins"] == pytest.approx(sum(margins) / 8, rel=1e-3, abs=1e-4)
    assert figures["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 8)
    assert sum(margins) > 0, "it learned something"


@pytest.mark.parametrize("stage", ["rm", "dpo", "orpo", "kto"])
def test_pairs_whose_prompt_leaves_no_room_are_left_out(tmp_path: Path, start: Path, stage: str) -> None:
    """No answer of theirs could be compared. Each is counted; and kto's held-out pairs are still judged as pairs."""

    def pairs(count: int, long: int) -> str:
        rows = [{"prompt": f"{'long ' * 20 if i % long == 1 else 'short'} {i}", "chosen": f"a{i}", "rejected": f"b{i}"}
                for i in range(count)]  # fmt: skip
        return write_records(tmp_path / f"{count}.jsonl", rows)

    options = ["data.name=custom", f"data.path={pairs(24, 3)}", f"data.eval_path={pairs(16, 3)}", "eval.num_problems=9"]
    run = make_run(tmp_path, stage, *options, "training.max_steps=4", model=start)
    assert train.run_attempt(run, 1) == 0
    losses = [line["loss"] for line in logged(run)]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    report = json.loads(run.data_report.read_text())[-1]  # others are of this process's earlier runs
    assert (report["rows"], report["too_long"]) == (24, 8)
    trainer = trainer_of(run)
    assert len(trainer.train_dataset) == (32 if stage == "kto" else 16)
    assert json.loads(run.held_out.read_text())["rows"] == len(trainer.eval_dataset) == (16 if stage == "kto" else 8)
    if stage == "kto":
        prompts = [trainer.processing_class.decode(ids) for ids in trainer.eval_dataset["prompt_ids"]]
        assert all(prompts[i : i + 2] == prompts[i + 2 : i + 4] for i in range(0, 16, 4))


def test_the_reference_s_word_is_kept_for_later_attempts(tmp_path: Path, start: Path, scorer: Path) -> None:
    """Asked once, of the start model or of another one, which is then let go; a checkpoint changes none of it."""
    other = make_run(tmp_path, "base", "training.max_steps=2", "seed=9", name="other")
    assert train.run_attempt(other, 1) == 0
    for reference in (start, other.model):
        options = ["training.max_steps=4", "checkpointing.save_steps=2", "data.num_pairs=16"]
        name = reference.parent.name
        run = make_run(
            tmp_path, "dpo", *options, "dpo.precompute_ref_log_probs=true", name=f"once-{name}", model=start,
            reference=reference,
        )  # fmt: skip
        usual = make_run(tmp_path, "dpo", *options, name=f"usual-{name}", model=start, reference=reference)
        first = trainer_of(run)
        assert first.ref_model is None and not [m for m in first.accelerator._models if m is not first.model]
        kept = {p.name: p.read_bytes() for p in run.reference_log_probs.iterdir()}
        assert sorted(kept) == ["eval-8.arrow", "train-16.arrow"]
        assert train.run_attempt(run, 1) == train.run_attempt(usual, 1) == 0
        assert {p.name: p.read_bytes() for p in run.reference_log_probs.iterdir()} == kept
        losses = [[line["loss"] for line in logged(r)] for r in (run, usual)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
