"""Attempts inside the test's own process: what they leave behind in it is undone, and what is asked of a refusal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import datasets
import pytest
import torch

from post_training import train
from post_training.run.directory import RunDirectory


@contextlib.contextmanager
def training_here() -> Iterator[None]:
    """Training inside the test's own process, whose signal handler, environment and threads come back after."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TENSORBOARD_LOGGING_DIR", "ACCELERATE_TORCH_DEVICE"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def here() -> Iterator[None]:
    """As `training_here`, for one test."""
    with training_here():
        yield


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` caches stays out of the user's home. For a module that imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def refused(capsys: pytest.CaptureFixture[str], run: RunDirectory) -> str:
    """What a run that ends with status 2 says; nothing half-made is left."""
    capsys.readouterr()
    assert train.run_attempt(run, 1) == 2
    assert not run.model.exists() and not list(run.root.glob("model.partial*"))
    assert not list(run.checkpoints.glob("checkpoint-*"))
    said = capsys.readouterr().err
    assert "error: " in said and "\n  fix: " in said and "Traceback" not in said
    return said
