"""DeepSpeed ZeRO: the one place that says how `parallel.strategy=zero2` and `zero3` share a model over ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from conf.schema import Config


def zero_config(cfg: Config) -> dict[str, Any] | None:
    """The DeepSpeed config of a run, or None where its strategy is not ZeRO.

    `auto` is filled in by transformers from the trainer's arguments and the model.
    """
    if cfg.parallel.strategy not in ("zero2", "zero3"):
        return None
    stage = int(cfg.parallel.strategy[-1])
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # else a saved model holds placeholders
        }
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": cfg.model.dtype == "bfloat16"},
        "fp16": {"enabled": cfg.model.dtype == "float16"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as in every other run
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def prepare_zero(cfg: Config) -> None:
    """What DeepSpeed needs before it is imported and before ZeRO-3 loads a model: its device and process group."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not torch.cuda.is_available():
        # Its shared-memory collectives are compiled at first use under a lock file without an owner: a process killed
        # meanwhile would leave the lock, and every later attempt would wait for it. Gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    backend = cfg.parallel.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    timeout = timedelta(minutes=cfg.parallel.timeout_minutes)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
