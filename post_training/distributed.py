"""Ranks from SLURM's own variables, so that one srun task a GPU needs no launcher in between."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def set_rank_environment(env: MutableMapping[str, str] = os.environ) -> None:
    """Give torch.distributed its names for what srun says.

    MASTER_ADDR and MASTER_PORT come from the job script. Outside a step of several tasks nothing is set, and
    training runs in one process. Variables that are set already are kept.
    """
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and "RANK" not in env and tasks > 1:
        env["RANK"] = env["SLURM_PROCID"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = str(tasks)
        env["LOCAL_WORLD_SIZE"] = env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    if env.get("WORLD_SIZE") == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            env.pop(name, None)
