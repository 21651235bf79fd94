"""Site files: the worked example is whole and composes, and a user's own files may stand outside of the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conf.check import ConfigError, check_run
from conf.schema import Config
from launchers import compose
from launchers.compose import CONF, Composer, groups, keys
from launchers.preflight import check_places, check_webhook
from launchers.render import job_script
from post_training.run.directory import RunDirectory

EXAMPLE = CONF / "cluster" / "example_site.yaml"
ROOT = CONF.parent
MINE = """# @package _global_
defaults: [example_site, _self_]
slurm: {account: my project}
notify: {mail: me@example.org}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside conf/, with a file of a user's own."""
    folder = tmp_path / "it's 1 conf"
    (folder / "cluster").mkdir(parents=True)
    (folder / "cluster" / "me.yaml").write_text(MINE)
    monkeypatch.setenv(compose.OWN, str(folder))
    groups.cache_clear()
    yield folder
    groups.cache_clear()


def config(cluster: str) -> Config:
    cfg = Composer().config([f"cluster={cluster}", "stage=base"])
    check_run(cfg)
    check_places(cfg)
    check_webhook(cfg)
    return cfg


def test_the_example_composes_and_renders() -> None:
    cfg = config("example_site")
    text = job_script(cfg, RunDirectory(Path("/out/full/base")), "/python")
    for line in (
        "#SBATCH --gpus-per-node=h100:8", "#SBATCH --partition=gpu", "module load cuda/12.8",
        "export NCCL_SOCKET_IFNAME=ib0", "export HF_HOME=/shared/hf",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "health nvidia-smi" in text or "'nvidia-smi -L >/dev/null'" in text
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_each_line_of_the_example_is_explained_and_each_key_exists() -> None:
    """A line of help cannot be checked, but that one stands there can, and that it is not about a key of the past."""
    lines = EXAMPLE.read_text().splitlines()
    for line in lines:
        if re.match(r" +[\w]+:.", line):
            assert re.search(r"\S {2,}# \S|# \S", line), line
    plain = yaml.safe_load(EXAMPLE.read_text())
    dotted = {f"{section}.{name}" for section, values in plain.items() for name in values}
    assert dotted <= set(keys()), dotted - set(keys())
    left_out = {"slurm.max_failures", "slurm.max_attempts_without_progress", "slurm.watchdog_minutes"}
    known = {name for name, key in keys().items() if name.startswith(("container.", "notify.")) and not key.section}
    assert known <= dotted and not left_out & dotted


def test_a_users_own_file_stands_on_top_of_the_sites(own: Path) -> None:
    cfg = config("me")
    assert (cfg.slurm.account, cfg.notify.mail) == ("my project", "me@example.org")
    assert (cfg.slurm.gpu_type, cfg.cluster.name) == ("h100", "example_site")
    assert "me" in groups()["cluster"] and "h100" in groups()["cluster"]
    with pytest.raises(ConfigError, match="did you mean 'me'"):
        compose.check_token("cluster=mee")


def test_commands_find_it_also_where_hydra_itself_runs(own: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "launchers.submit", "stage=base", "cluster=me", "--cfg", "job"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "account: my project" in done.stdout, done.stderr


def test_a_folder_that_is_gone_is_said(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compose.OWN, str(own / "gone"))
    groups.cache_clear()
    with pytest.raises(ConfigError, match=r"POST_TRAINING_CONF=.*: no such folder"):
        groups()
