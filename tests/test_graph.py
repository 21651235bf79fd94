"""The graph: order, errors, pretrained models; and what is decided about runs that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.check import ConfigError
from conf.schema import Config, Node, Slurm
from launchers import graph, slurm
from launchers.errors import LaunchError
from launchers.preflight import check_request
from launchers.submission import Found, decide, ended
from post_training.run.history import History


def nodes(**models: str | None) -> dict[str, Node]:
    return {name: Node(stage="sft", model=model) for name, model in models.items()}


def test_order_is_upstream_first_and_else_as_written() -> None:
    stages = {
        "c": Node(stage="ppo", model="b", reward_model="r"),
        "z": Node(stage="base"),
        "b": Node(stage="sft", model="z"),
        "r": Node(stage="rm", model="b"),
        "a": Node(stage="eval", model="z", after=["c"]),
    }
    graph.check(stages)
    assert graph.order(stages) == ["z", "b", "r", "c", "a"]
    assert graph.upstream(stages["c"]) == ["b", "r"]
    assert graph.order(nodes(late="root2", root1=None, early="root1", root2=None)) == [
        "root1",
        "early",
        "root2",
        "late",
    ]
    assert graph.upstream(Node(stage="ppo", model="b", reference="b", after=["b", "x"])) == ["b", "x"]


@given(st.data())
def test_order_of_any_graph_without_cycle(data: st.DataObject) -> None:
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 8)))]
    stages = {}
    for i, name in enumerate(names):
        after = data.draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else []
        stages[name] = Node(stage="sft", after=after)
    shuffled = dict(data.draw(st.permutations(list(stages.items()))))
    order = graph.order(shuffled)
    assert sorted(order) == sorted(names)
    assert all(order.index(up) < order.index(name) for name in names for up in stages[name].after)


@pytest.mark.parametrize(
    ("stages", "key", "words"),
    [
        (nodes(a="b", b="a"), "pipeline.stages.", "cycle"),
        (nodes(a="c", b="a", c="b", d=None), "pipeline.stages.", "cycle"),
        (nodes(a="a"), "pipeline.stages.a.model", "itself"),
        (nodes(sft=None, dpo="sftt"), "pipeline.stages.dpo.model", "did you mean 'sft'"),
        ({"a": Node(stage="sfft")}, "pipeline.stages.a.stage", "did you mean 'sft'"),
        ({"a": Node(stage="sft", after=["b"])}, "pipeline.stages.a.after", "no such stage"),
    ],
)
def test_wrong_graphs(stages: dict[str, Node], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        graph.check(stages)
    assert caught.value.key.startswith(key) and words in str(caught.value)


def test_cycle_names_its_stages() -> None:
    with pytest.raises(ConfigError) as caught:
        graph.check(nodes(a="c", b="a", c="b", d=None))
    shown = str(caught.value.value)
    assert {*shown.split(" -> ")} == {"a", "b", "c"} and shown.split(" -> ")[0] == shown.split(" -> ")[-1]


def test_without_base() -> None:
    stages = {
        "base": Node(stage="base"),
        "sft": Node(stage="sft", model="base"),
        "dpo": Node(stage="dpo", model="sft", reference="base", after=["base", "sft"]),
        "eval_base": Node(stage="eval", model="base"),
    }
    kept, freed = graph.without_base(stages)
    assert list(kept) == ["sft", "dpo", "eval_base"]
    assert freed == {"sft": ("model",), "dpo": ("reference",), "eval_base": ("model",)}
    assert kept["dpo"] == Node(stage="dpo", model="sft", reference=None, after=["sft"])
    assert kept["sft"].model is None and stages["sft"].model == "base"


def test_find() -> None:
    stages = nodes(eval_sft="sft", sft=None)
    assert graph.find(stages, "eval_sft", ("sft",))[1] is stages["eval_sft"]
    assert graph.find(stages, "kto", ("kto",)) == ("kto", Node(stage="kto"))
    with pytest.raises(ConfigError, match="did you mean 'eval_sft'"):
        graph.find(stages, "eval_sf", ("sft",))


# ------------------------------------------------------------------------------------------- decisions


def frozen(**changed: Any) -> dict[str, Any]:
    plain = {"stage": "sft", "seed": 0, "model": {}, "data": {}, "training": {"max_steps": 3}, "sft": {"lr": 1.0}}
    return {
        "identity": "old",
        "pipeline": "full",
        "parallel": {"strategy": "ddp"},
        "inputs": {"model": None},
        **plain,
        **changed,
    }


ROOT = Path("/o/full/sft")
UNKNOWN = slurm.Unknown("squeue did not answer")


@pytest.mark.parametrize(
    ("found", "decision"),
    [
        (Found(), "new"),
        (Found(frozen(), whole=True), "done"),
        (Found(frozen(), whole=True, live=True), "done"),
        (Found(frozen(), whole=True, live=UNKNOWN), "done"),
        (Found(frozen(), live=True), "live"),
        (Found(frozen(), supervised=True), "live"),
        (Found(frozen(), live=False), "again"),
    ],
)
def test_decisions(found: Found, decision: str) -> None:
    assert decide("sft", frozen(), found, ROOT) == decision


def test_another_config_is_refused_by_its_changed_keys() -> None:
    new = frozen(identity="new", sft={"lr": 2.0}, training={"max_steps": 3})
    for found in (Found(frozen(), whole=True), Found(frozen(), live=True), Found(frozen())):
        with pytest.raises(ConfigError) as caught:
            decide("sft", new, found, ROOT)
        assert "sft.lr: 1.0 -> 2.0" in str(caught.value) and "max_steps" not in str(caught.value)
        assert "run_name=full-2" in str(caught.value)


def test_unknown_is_not_gone() -> None:
    with pytest.raises(LaunchError, match="squeue did not answer"):
        decide("sft", frozen(), Found(frozen(), live=UNKNOWN, history=History(job_id="7")), ROOT)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (History(), True),
        (History(job_id="1"), False),
        (History(job_id="1", running=True), False),
        (History(job_id="1", outcome="crashed", action="requeue"), False),
        (History(job_id="1", outcome="stopped", action="requeue"), False),
        (History(job_id="1", outcome="stopped", action="exit"), False),  # preempted: SLURM requeues it
        (History(job_id="1", outcome="crashed", action="exit", gave_up=True), True),
        (History(job_id="1", outcome="finished", action="exit"), True),
        (History(job_id="1", cancelled=True), True),
    ],
)
def test_what_the_ledger_alone_can_tell(history: History, expected: bool) -> None:
    assert ended(history) is expected


# ------------------------------------------------------------------------------- what the cluster has

SINFO = """gpu*|up|2-00:00:00|4|96|1920000|gpu:h100:8(S:0-1)
gpu*|up|2-00:00:00|2|64|512000|gpu:a100:4,gpu:h100:2
cpu|up|infinite|10+|32|64000|(null)
old|down|1:00:00|1|8|1000|gpu:2
"""
SQUEUE = """12|PENDING|Dependency|0:00|1:00:00|2||gpu|2026-01-01T00:00:00|N/A|afterok:11(unfulfilled)|/a b/it's|x
13|RUNNING|None|1-02:03:04|UNLIMITED|1|n1|gpu|2026-01-01T00:00:00|2026-01-01T00:00:01|(null)|(null)
garbage
"""


def test_reading_slurm() -> None:
    partitions = slurm.parse_partitions(SINFO)
    assert partitions["gpu"].default and partitions["gpu"].max_seconds == 2 * 86400
    assert partitions["gpu"].groups[1].gpus == {"a100": 4, "h100": 2}
    assert partitions["cpu"].groups[0].nodes == 10 and partitions["cpu"].groups[0].gpus == {}
    assert partitions["cpu"].max_seconds is None and not partitions["old"].up
    assert slurm.parse_gres("gpu:2(IDX:0-1),license:3,gpu:h100:1") == {None: 2, "h100": 1}
    jobs = slurm.parse_jobs(SQUEUE)
    assert set(jobs) == {"12", "13"} and jobs["12"].comment == "/a b/it's|x" and jobs["13"].comment == ""
    assert (jobs["13"].elapsed, jobs["13"].limit, jobs["12"].live) == (93784, None, True)
    assert slurm.seconds("04:05") == 245 and slurm.seconds("INVALID") is None


def test_environment_of_slurm_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "x")
    env = slurm.clean_environment(None)
    assert env["SLURM_CONF"] == "x" and not {"SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_NTASKS"} & set(
        env
    )
    assert slurm.clean_environment("/c")["SLURM_CONF"] == "/c"


def test_failed_sources_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in ("#!/bin/sh\nexit 1\n", "#!/bin/sh\nexec sleep 60\n", None):
        if text is not None:
            (tmp_path / "squeue").write_text(text)
            (tmp_path / "squeue").chmod(0o755)
        else:
            (tmp_path / "squeue").unlink()
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if text else str(tmp_path))
        assert isinstance(slurm.jobs(["1"], timeout=0.5), slurm.Unknown)


@pytest.mark.parametrize(
    ("wanted", "key", "fix"),
    [
        ({"partition": "gpuu"}, "slurm.partition", "did you mean 'gpu'"),
        ({"gpus_per_node": 9}, "slurm.gpus_per_node", "slurm.gpus_per_node=8"),
        ({"partition": "cpu", "gpus_per_node": 1}, "slurm.gpus_per_node", "slurm.gpus_per_node=0"),
        ({"gpu_type": "v100", "gpus_per_node": 1}, "slurm.gpu_type", "did you mean"),
        ({"gpu_type": "a100", "gpus_per_node": 8}, "slurm.gpus_per_node", "slurm.gpus_per_node=4"),
        ({"gpus_per_node": 8, "num_nodes": 5}, "slurm.num_nodes", "slurm.num_nodes=4"),
        ({"gpus_per_node": 8, "cpus_per_gpu": 13}, "slurm.cpus_per_gpu", "slurm.cpus_per_gpu=12"),
        ({"gpus_per_node": 1, "mem": "2000G"}, "slurm.mem", "slurm.mem=1920000M"),
        ({"gpus_per_node": 1, "wall_time": "2-00:01:00"}, "slurm.wall_time", "slurm.wall_time=48:00:00"),
    ],
)
def test_requests_that_the_cluster_cannot_meet(wanted: dict[str, Any], key: str, fix: str) -> None:
    cfg = Config(slurm=Slurm(**{"cpus_per_gpu": 1, **wanted}))
    with pytest.raises(ConfigError) as caught:
        check_request(cfg, slurm.parse_partitions(SINFO))
    assert caught.value.key == key and fix in caught.value.fix


@pytest.mark.parametrize(
    "wanted",
    [
        {"gpus_per_node": 8, "num_nodes": 4, "cpus_per_gpu": 12},
        {"gpus_per_node": 2, "gpu_type": "h100", "num_nodes": 6},
        {"partition": "cpu", "gpus_per_node": 0, "num_nodes": 10, "wall_time": "30-00:00:00"},
        {"partition": "gpu,cpu", "gpus_per_node": 8},
    ],
)
def test_requests_that_it_can(wanted: dict[str, Any]) -> None:
    check_request(Config(slurm=Slurm(**{"cpus_per_gpu": 1, **wanted})), slurm.parse_partitions(SINFO))
