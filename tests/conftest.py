"""What all tests share."""

import os
import signal

import hypothesis
import pytest

from tests.slurm_fixture import devcluster

LONG = (
    "test_drill", "test_exact", "test_pipelines", "test_records", "test_failures", "test_pipeline", "test_train",
    "test_local", "test_outages", "test_submit", "test_steer", "test_sweep",
)  # fmt: skip
"""Files that take minutes. They are handed out first, so that no worker is left alone with one at the end."""

# What CI says of a commit does not hang on chance; elsewhere each run tries new examples.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI", "").lower() in ("true", "1"):
    hypothesis.settings.load_profile("ci")

# Whoever starts tests in the background (nohup, a CI) hands down ignored signals; tests send real ones to programs
# that must get them. Handlers are not inherited, so the programs start with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# xdist tells its workers that they have a terminal of 80 columns; what they start has none
os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


__all__ = ["devcluster"]
