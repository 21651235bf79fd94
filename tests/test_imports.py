"""The login node's side is light: nothing in launchers or conf imports torch, transformers, trl or datasets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "deepspeed")
MODULES = [
    "launchers.submit", "launchers.pipeline", "launchers.status", "launchers.compare", "launchers.devcluster",
    "launchers.local", "launchers.executor", "launchers.render", "conf.schema", "conf.check", "post_training.run.life",
    "launchers.prefetch", "conf.chat", "post_training.chat", "launchers.push", "launchers.card", "launchers.report",
    "launchers.sweep", "launchers.points", "launchers.sampler",
    "launchers.charts", "post_training.run.environment", "launchers.serve", "launchers.page",
    "launchers.steer", "launchers.cancel", "launchers.requeue", "launchers.hold", "launchers.release",
    "launchers.repair",
    "launchers.logs", "launchers.why",
    "launchers.doctor", "launchers.site",
    "launchers.plan", "launchers.simulate",
    "launchers.notify", "post_training.run.notify",
    "launchers.charts", "launchers.top", "launchers.eta",
    "launchers.frozen", "post_training.run.environment", "launchers.serve", "launchers.page",
    "launchers.charts", "post_training.run.environment", "launchers.serve", "launchers.page",
    "launchers.logs", "launchers.why",
]  # fmt: skip


@pytest.fixture
def forbidding(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing one of the heavy packages is an error."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\n"
        f"class Forbid:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY + ('post_training.train', 'post_training.stages')!r}:\n"
        f"            raise SystemExit('forbidden import: ' + name)\n"
        f"sys.meta_path.insert(0, Forbid())\n"
    )
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_the_guard_guards(forbidding: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", "import torch"], env=forbidding, capture_output=True, text=True)
    assert done.returncode == 1 and "forbidden import: torch" in done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_import(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & {{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["launchers.submit", "--help"],
        ["launchers.pipeline", "--help"],
        ["launchers.submit", "--cfg", "job"],
        ["launchers.submit", "stage=base", "dry_run=true", "cluster=dev"],
        ["launchers.pipeline", "dry_run=true", "cluster=local"],
        ["launchers.serve", "--help"],
        ["launchers.logs", "--help"],
        ["launchers.doctor", "--help"],
        ["launchers.serve", "inputs.model=a/b", "cluster=h100", "serve.engine=transformers", "dry_run=true"],
        ["launchers.pipeline", "dry_run=true", "cluster=local", "sft.lr=1e-5,1e-4", "-m"],
        ["launchers.plan", "--help"],
        ["launchers.plan", "cluster=dev", "--no-queue", "--step-seconds", "sft=1"],
    ],
)
def test_commands(argv: list[str], forbidding: dict[str, str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, "-m", *argv], env=forbidding, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr
    assert list(work.iterdir()) == []  # and nothing is written


def test_start_up_is_quick(tmp_path: Path) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "launchers.pipeline", "dry_run=true", "cluster=local"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules
    for late in ("submitit", "rich", "psutil", "asyncio"):
        assert late not in modules, f"{late} is not needed for a dry run"
