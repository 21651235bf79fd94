"""What all tests share."""

import signal

from tests.slurm_fixture import devcluster

# Whoever starts tests in the background (nohup, a CI) hands down ignored signals; tests send real ones to programs
# that must get them. Handlers are not inherited, so the programs start with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

__all__ = ["devcluster"]
