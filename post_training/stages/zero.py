"""How ranks share a model: the one place that says what `parallel.strategy=zero2`, `zero3` and `fsdp2` mean."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from conf.schema import Config

if TYPE_CHECKING:
    from transformers import Trainer


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
    if cfg.parallel.offload:
        on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = on_host
        if stage == 3:
            zero["offload_param"] = on_host
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


def fsdp_arguments(cfg: Config) -> dict[str, Any]:
    """TrainingArguments for torch's fully_shard, through accelerate; none where the strategy is another.

    Every decoder layer is a unit of its own. Checkpoints are written in parts, one a rank; a saved model is whole:
    post_training.stages.exact gathers it.
    """
    if cfg.parallel.strategy != "fsdp2":
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }


def fsdp_on_cpu(trainer: Trainer) -> None:
    """Turn FSDP on where accelerate has left it off without a word: on a CPU, where it would go on as DDP."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    trainer.is_fsdp_enabled = True
