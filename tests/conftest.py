"""What all tests share."""

from tests.slurm_fixture import devcluster

__all__ = ["devcluster"]
