"""Overrides to configs: layers, lengths, per-stage keys, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.check import ConfigError, check_run
from conf.schema import LENGTHS, Config
from launchers.cli import help_text, point_name
from launchers.compose import (
    Composer,
    Layers,
    check_token,
    exclusive_lengths,
    groups,
    keys,
    rewrite,
    rewrite_stage,
    split,
)
from launchers.selection import select, sources
from launchers.submission import changes, determining, freeze, identity

COMPOSER = Composer()


def config(stage: str, *tokens: str, pipeline: str = "full", only_one: bool = False) -> Config:
    given_tokens = [f"pipeline={pipeline}", "cluster=local", *tokens]
    return select([rewrite_stage(rewrite(t)) for t in given_tokens], only_one).config(stage)


# ------------------------------------------------------------------------------------------- rewriting


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("sft.training.max_steps=3", "++stages.sft.training.max_steps=3"),
        ("rm.slurm.wall_time=01:00:00", "++stages.rm.slurm.wall_time=01:00:00"),
        ("eval_sft.eval.num_problems=5", "++stages.eval_sft.eval.num_problems=5"),
        ("sft.sft.lr=1", "++stages.sft.sft.lr=1"),
        ("sft.seed=1,2", "++stages.sft.seed=1,2"),
        ("sft.data=hh_rlhf", "++stages.sft.choices.data=hh_rlhf"),
        ("ppo.model.dtype=float16", "++stages.ppo.model.dtype=float16"),
        ("sft.slurm.env.A=b=c", "++stages.sft.slurm.env.A=b=c"),
        ("slurm.env.A=b", "++slurm.env.A=b"),
        # a technique's own keys, and everything else, stay what they are
        ("sft.lr=1", "sft.lr=1"),
        ("ppo.reward.correct=0", "ppo.reward.correct=0"),
        ("training.max_steps=3", "training.max_steps=3"),
        ("inputs.model=/x", "inputs.model=/x"),
        ("data.seed=1", "data.seed=1"),
        ("pipeline.stages.sft.model=base", "pipeline.stages.sft.model=base"),
        ("~pipeline.stages.rm", "~pipeline.stages.rm"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("sft.lrr=1", "sft.lrr=1"),
    ],
)
def test_rewrite(token: str, expected: str) -> None:
    assert rewrite(token) == expected


@pytest.mark.parametrize("token", ["sft.cluster=dev", "sft.paths.output_base=/x", "sft.run_name=x"])
def test_keys_of_the_whole_pipeline_are_not_for_one_stage(token: str) -> None:
    with pytest.raises(ConfigError, match="same for all stages"):
        rewrite(token)


def test_stage_names_of_the_graph_pass_hydra() -> None:
    assert rewrite_stage("stage=sft") == "stage=sft"
    assert rewrite_stage("stage=sft,dpo") == "stage=sft,dpo"
    assert rewrite_stage("stage=eval_sft") == "++stages.selected=eval_sft"
    assert rewrite_stage("stage=sft,eval_sft") == "++stages.selected=sft,eval_sft"


# ---------------------------------------------------------------------------------------------- layers


def test_later_layers_win() -> None:
    # stage file: 3 epochs and batch 64; then the command line; then the stage's own key
    assert config("sft").training.num_train_epochs == 3
    assert config("sft", "training.effective_batch_size=32").training.effective_batch_size == 32
    both = ("training.effective_batch_size=32", "sft.training.effective_batch_size=16")
    assert config("sft", *both).training.effective_batch_size == 16
    assert config("dpo", *both).training.effective_batch_size == 32
    assert config("sft", *reversed(both)).training.effective_batch_size == 16


def test_node_overrides_are_below_the_command_line() -> None:
    node = "pipeline.stages.sft.overrides=['training.effective_batch_size=8','sft.lr=0.5']"
    assert config("sft", node).training.effective_batch_size == 8
    assert config("sft", node).sft.lr == 0.5
    assert config("dpo", node).training.effective_batch_size == 64
    assert config("sft", node, "training.effective_batch_size=16").training.effective_batch_size == 16


def test_group_choice_for_one_stage() -> None:
    tokens = ("rm.data.path=/etc/hostname", "rm.data=hh_rlhf")
    assert config("rm", *tokens).data.name == "hh_rlhf"
    assert config("sft", *tokens).data.name == "arithmetic"
    tokens = ("data=gsm8k", "data.path=/etc/hostname", "rm.data=hh_rlhf", "rm.data.held_out=7", "dpo.data=hh_rlhf")
    assert (config("rm", *tokens).data.name, config("rm", *tokens).data.held_out) == ("hh_rlhf", 7)
    assert config("sft", *tokens).data.name == "gsm8k"


def test_a_technique_stands_for_all_of_its_stages() -> None:
    assert config("eval_sft", "eval.slurm.wall_time=10").slurm.wall_time == "10"
    assert config("sft", "eval.slurm.wall_time=10").slurm.wall_time != "10"
    tokens = ("eval.eval.num_problems=5", "eval_sft.eval.num_problems=6")
    assert config("eval_sft", *tokens).eval.num_problems == 6


def test_environment_variables_need_no_plus() -> None:
    cfg = config("sft", "slurm.env.A=1", "sft.slurm.env.B='x y'")
    assert cfg.slurm.env == {"A": "1", "B": "x y"}
    assert config("dpo", "slurm.env.A=1", "sft.slurm.env.B=2").slurm.env == {"A": "1"}


@pytest.mark.parametrize("layer", ["{}", "sft.{}", "pipeline.stages.sft.overrides=['{}']"])
def test_a_length_replaces_the_length_of_a_layer_below(layer: str) -> None:
    cfg = config("sft", layer.format("training.max_steps=3"))
    assert {n: getattr(cfg.training, n) for n in LENGTHS if getattr(cfg.training, n) is not None} == {"max_steps": 3}


def test_two_lengths_in_one_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_steps=3 and num_train_epochs=2.0.*exactly one"):
        config("sft", "training.max_steps=3", "training.num_train_epochs=2")
    with pytest.raises(ConfigError, match="none"):
        config("sft", "training.num_train_epochs=null")


@given(st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(["null", "3", "7"])), max_size=6))
def test_exclusive_lengths_leave_what_is_mentioned(layer: list[tuple[str, str]]) -> None:
    tokens = [f"training.{name}={value}" for name, value in layer]
    result = exclusive_lengths(tokens)
    assert result[len(result) - len(tokens) :] == tokens
    added = [split(t)[1].removeprefix("training.") for t in result[: len(result) - len(tokens)]]
    if all(value == "null" for _, value in layer):
        assert added == []
    else:
        assert set(added) == set(LENGTHS) - {name for name, _ in layer}


def test_configs_of_one_command_do_not_mix() -> None:
    # files are read once and merged many times: what one config gets must not be in the next
    first = COMPOSER.config(["cluster=dev", "pipeline=rlhf", "++slurm.env.A=1", "training.max_steps=3"])
    second = COMPOSER.config(["cluster=local"])
    assert (first.pipeline.name, second.pipeline.name) == ("rlhf", "full")
    assert set(second.pipeline.stages) == set(Composer().config(["cluster=local"]).pipeline.stages)
    assert second.slurm.env == {} and second.training.max_steps is None
    assert dataclasses.asdict(second) == dataclasses.asdict(Composer().config(["cluster=local"]))


def test_every_stage_of_every_pipeline_composes_and_is_valid(tmp_path: Path) -> None:
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "hh_rlhf/harmless-base-test.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pipeline in groups()["pipeline"]:
        # batches of these are for few ranks
        for cluster in ("local", "dev") if pipeline in ("quickstart", "gated", "records") else ("local", "dev", "h100"):
            tokens = [f"pipeline={pipeline}", f"cluster={cluster}", f"paths.data={tmp_path}"]
            selection = select(tokens, only_one=False)
            assert set(selection.configs) == set(selection.stages)


# --------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("token", "key", "words"),
    [
        ("training.max_step=3", "training.max_step", "training.max_steps"),
        ("trainning.max_steps=3", "trainning.max_steps", "training.max_steps"),
        ("lr=3", "lr", "sft.lr"),
        ("sft.lrr=3", "sft.lrr", "sft.lr"),
        ("sft.training.max_step=3", "training.max_step", "training.max_steps"),
        ("zzz=1", "zzz", "--help"),
        ("+foo=1", "foo", "no such key"),
        ("++training.foo=1", "training.foo", "no such key"),
        ("~seed", "seed", "cannot be deleted"),
        ("pipeline.stages.sft.modell=base", "pipeline.stages.sft.modell", "pipeline.stages.sft.model"),
        ("training.max_steps=abc", "training.max_steps", "Integer"),
        ("seed=1.5", "seed", "Integer"),
        ("offline=maybe", "offline", "bool"),
        ("slurm.modules=x", "slurm.modules", "list"),
        ("training=3", "training", "Training"),
        ("model=3", "model", "conf/model"),
        ("pipeline=ful", "pipeline", "full"),
        ("data=gsm8", "data", "gsm8k"),
        ("sft.data=gsm8", "data", "gsm8k"),
        ("cluster=h10", "cluster", "h100"),
        ("training.max_steps=1,2", "training.max_steps", "-m"),
        ("training.max_steps", "training.max_steps", "training.max_steps=<value>"),
        ("slurm.modules=[a", "slurm.modules", "quote"),
        ("foo.training.max_steps=3", "foo.training.max_steps", "no stage foo"),
        ("sfft.training.max_steps=3", "sfft.training.max_steps", "did you mean 'sft'"),
        ("model.dtype=float31", "model.dtype", "float32"),
        ("pipeline.stages.sft.overrides=['cluster=dev']", "pipeline.stages.sft.overrides", "same for all"),
        ("inputs.model=/etc", "inputs.model", "<stage>.inputs.model"),
    ],
)
def test_wrong_overrides(token: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("sft", token)
    assert caught.value.key == key
    assert words in str(caught.value) and "fix:" in str(caught.value)
    assert "Error" not in str(caught.value) and "hydra" not in str(caught.value).lower()


def test_wrong_key_in_a_file(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from launchers import compose

    shutil.copytree(compose.CONF, tmp_path / "conf")
    (tmp_path / "conf/stage/sft.yaml").write_text("# @package _global_\nstage: sft\ntraining: {max_step: 3}\n")
    with pytest.raises(ConfigError) as caught:
        Composer(tmp_path / "conf").config(["cluster=local"])
    assert "conf/stage/sft.yaml" in str(caught.value) and "training.max_steps" in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(k for k, v in keys().items() if not v.section)), st.data())
def test_one_wrong_letter_finds_the_key(name: str, data: st.DataObject) -> None:
    last = name.rpartition(".")[2]
    if len(last) < 6:
        return
    position = data.draw(st.integers(len(name) - len(last), len(name) - 1))
    wrong = name[:position] + name[position + 1 :]
    if wrong.rpartition(".")[2] in {known.rpartition(".")[2] for known in keys()}:
        return  # another key's name by chance
    from launchers.compose import unknown_key

    assert f"'{name}'" in str(unknown_key(wrong, 1))


def test_check_token_lets_open_dictionaries_grow() -> None:
    for token in ("++slurm.env.A=1", "~pipeline.stages.rm", "+pipeline.stages.x={stage: sft}", "seed=1"):
        check_token(token)
    assert "rm" not in select(["~pipeline.stages.rm", "cluster=local", "~pipeline.stages.eval_rm",
                               "pipeline.stages.ppo.reward_model=null"], only_one=False).stages  # fmt: skip


def test_help_has_every_key_and_group() -> None:
    text = help_text("usage: x")
    for name, key in keys().items():
        assert name in text and key.help in text
    for options in groups().values():
        assert ", ".join(options) in text


def test_point_names() -> None:
    point = ["cluster=local", "++stages.sft.sft.lr=0.1", "seed=2", "model.name_or_path=a/b c"]
    assert point_name("full", point, {"stages.sft.sft.lr", "seed"}) == "full-seed=2,sft.sft.lr=0.1"
    assert point_name("full", point, {"model.name_or_path"}) == "full-model.name_or_path=a-b-c"
    assert point_name("full", ["++stages.selected=sft"], {"stages.selected"}) is None
    long = point_name("full", [f"slurm.setup=[{'x' * 300}]"], {"slurm.setup"})
    assert long is not None and len(long) < 130


# ---------------------------------------------------------------------------------- inputs and identity


def test_inputs_follow_the_graph() -> None:
    selection = select(["cluster=local", "pipeline=full", "ppo.reward_model_weight=1"], only_one=False)
    found = sources(selection, "ppo")
    assert {k: v for k, v in found.items() if v is not None} == {
        "model": "stage:sft", "reference": "stage:sft", "reward_model": "stage:rm"
    }  # fmt: skip
    selection = select(["cluster=local", "pipeline=full", "ppo.reward_model_weight=0"], only_one=False)
    assert sources(selection, "ppo")["reward_model"] is None
    selection = select(["pipeline=full", "cluster=local", "ppo.reward_model_weight=0", "ppo.value_init=rm"], False)
    assert sources(selection, "ppo")["reward_model"] == "stage:rm", "its score head is the value head's start"
    for token in ("ppo.reward_model_weight=1", "ppo.value_init=rm"):
        alone = select(["pipeline=dpo", "cluster=local", "stage=ppo", "ppo.reward_model_weight=0", token], True)
        with pytest.raises(ConfigError, match=token) as caught:
            sources(alone, "ppo")
        assert "inputs.reward_model=" in caught.value.fix


def test_a_pretrained_model_takes_the_place_of_base(tmp_path) -> None:  # type: ignore[no-untyped-def]
    selection = select(["cluster=local", "pipeline=full", f"model.name_or_path={tmp_path}"], only_one=False)
    assert "base" not in selection.wanted and "eval_base" in selection.wanted
    assert sources(selection, "sft")["model"] == f"path:{tmp_path}"
    assert sources(selection, "eval_base")["model"] == f"path:{tmp_path}"
    assert sources(selection, "rm")["model"] == "stage:sft"


def test_one_stage_takes_the_model_that_the_command_names(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokens = ["cluster=local", "pipeline=full", "stage=dpo"]
    named = select([*tokens, f"model.name_or_path={tmp_path}"], only_one=True)
    assert sources(named, "dpo")["model"] == f"path:{tmp_path}"
    given_input = select([*tokens, f"inputs.model={tmp_path}"], only_one=True)
    assert sources(given_input, "dpo")["model"] == f"path:{tmp_path}"
    assert sources(select(tokens, only_one=True), "dpo")["model"] == "stage:sft"


BASE = config("sft")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(keys())), st.data())
def test_identity_is_of_what_determines_the_weights(name: str, data: st.DataObject) -> None:
    key = keys()[name]
    if key.section or isinstance(key.default, list | dict) or name in ("stage", "data.transform_file", "lora.r"):
        return  # of a file its text counts: tests/test_data_sets.py; with lora.r the whole section does: see below
    cfg = dataclasses.replace(BASE)
    *path, last = name.split(".")
    node: object = cfg
    for part in path:
        setattr(node, part, dataclasses.replace(getattr(node, part)))
        node = getattr(node, part)
    old = getattr(node, last)
    value = data.draw(
        st.booleans() if isinstance(old, bool)
        else st.integers(1, 9999) if isinstance(old, int)
        else st.floats(0.001, 10) if isinstance(old, float)
        else st.text("abc", min_size=1, max_size=5)
    )  # fmt: skip
    setattr(node, last, value)
    before, after = (freeze(c, "sft", "p", {}) for c in (BASE, cfg))
    determines = (
        name.split(".")[0] in ("seed", "model", "data", "training", "sft", "stage")
        or name in ("parallel.strategy", "parallel.offload")
    ) and name != "training.dataloader_num_workers"
    assert (before["identity"] != after["identity"]) == (determines and old != value)
    assert set(changes(before, after)) == ({name} if determines and old != value else set())


def test_adapters_are_part_of_the_identity_where_there_are_any() -> None:
    plain, unused, small, large = (
        freeze(dataclasses.replace(BASE, lora=dataclasses.replace(BASE.lora, r=r, alpha=alpha)), "sft", "p", {})
        for r, alpha in ((None, 16), (None, 32), (8, 16), (8, 32))
    )
    assert plain["identity"] == unused["identity"]
    assert len({plain["identity"], small["identity"], large["identity"]}) == 3


def test_identity_outlives_yaml_and_takes_inputs_by_identity() -> None:
    import yaml

    inputs = {"model": {"path": "/a/model", "run_dir": "/a", "identity": "1234"}}
    frozen = freeze(BASE, "sft", "p", inputs)
    again = yaml.safe_load(yaml.safe_dump(frozen))
    assert identity(again) == frozen["identity"] == identity(frozen)
    moved = freeze(BASE, "other", "q", {"model": {"path": "/b/model", "run_dir": "/b", "identity": "1234"}})
    assert moved["identity"] == frozen["identity"]
    other = freeze(BASE, "sft", "p", {"model": {"path": "/a/model", "run_dir": "/a", "identity": "5678"}})
    assert other["identity"] != frozen["identity"]
    assert "wall_time" not in str(determining(frozen))


def test_layers_sort_tokens() -> None:
    layers = Layers.of(
        ["pipeline=dpo", "stage=sft", "a=1", "++stages.sft.b=2", "dry_run=true", "++stages.x.choices.data=c"]
    )
    assert layers.everywhere == ("a=1",)
    assert layers.alone == {"sft": ("b=2",), "x": ("data=c",)}
    assert (layers.choices, layers.selected) == ({"pipeline": "dpo", "stage": "sft"}, "sft")


def test_check_run_refuses_impossible_combinations() -> None:
    for token in ("slurm.wall_time=1:2:3:4", "slurm.signal_time_seconds=999999", "model.num_heads=3", "slurm.mem=lots"):
        with pytest.raises(ConfigError, match="fix:"):
            check_run(config("sft", token))


GRPO = ("slurm.num_nodes=1", "slurm.gpus_per_node=2", "training.effective_batch_size=16",
        "training.per_device_train_batch_size=2", "grpo.num_generations=8")  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "overrides", "key", "fix"),
    [
        ("sft", ("parallel=zero2", "slurm.gpus_per_node=0"), "parallel.strategy", "parallel=ddp"),
        ("sft", ("parallel.strategy=zero1",), "parallel.strategy", "zero"),
        ("sft", ("model.dropout=1",), "model.dropout", "model.dropout=0.1"),
        ("sft", ("training.dataloader_num_workers=-1",), "training.dataloader_num_workers", "=0"),
        ("kto", ("training.per_device_train_batch_size=1",), "training.per_device_train_batch_size", "=2"),
        ("grpo", ("grpo.num_iterations=0",), "grpo.num_iterations", "=1"),
        ("grpo", (*GRPO, "grpo.steps_per_generation=3"), "grpo.steps_per_generation", "grpo.steps_per_generation=4"),
    ],
)
def test_techniques_refuse_what_cannot_work(stage: str, overrides: tuple[str, ...], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(stage, f"stage={stage}", *overrides, only_one=True)
    assert caught.value.key == key
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("sft", ("parallel=zero3", "slurm.gpus_per_node=2")),
        ("eval", ("parallel=zero3", "slurm.gpus_per_node=0")),
        ("grpo", (*GRPO, "grpo.steps_per_generation=2")),
        ("grpo", (*GRPO, "grpo.num_iterations=3")),
    ],
)
def test_techniques_take_what_works(stage: str, overrides: tuple[str, ...]) -> None:
    check_run(config(stage, f"stage={stage}", *overrides, only_one=True))
