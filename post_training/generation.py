"""Completions by vLLM for TRL's trainers that sample groups: weights brought over, and checked to have arrived.

TRL brings weights to vLLM too, and has a client for vLLM's server. Its engine starts with the start model's weights,
so that a sync which does nothing is not seen until much later; it writes into vLLM's parameters, which vLLM has
repacked by then on CPUs; and its server takes new weights over NCCL alone, and from anyone on the node.
Here the engine starts with random weights, gets the model's before it samples, through vLLM's own `reload_weights`,
and what it says of its samples is compared with what the trained model says of them, every time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from trl.generation.vllm_generation import VLLMGeneration

from conf.check import generation, vllm_share
from post_training.data.source import DataError
from post_training.stages.common import Stage
from post_training.vllm_engine import Engine, Engines, Samples, Weights, write_config

if TYPE_CHECKING:
    from peft import PeftModel

NOT_EXACT = (
    "samples by vLLM: weights, optimizer, the order of prompts and the seed of each generation are kept; vLLM does not "
    "promise the same probabilities to the last bit in another process, so the weights may not be the same bits"
)
"""What holds, and what does not, where a run that samples by vLLM is resumed."""


class VllmGeneration(VLLMGeneration):
    """What TRL's trainers ask for completions. TRL's own walks through the weights, ZeRO's and FSDP's parts too."""

    def __init__(self, stage: Stage, trainer: Any) -> None:
        self.stage, self.trainer = stage, trainer
        how = generation(stage.cfg)
        assert how is not None
        self.how = how
        self.sampled: list[list[float]] | None = None  # log-probs of the newest samples of this rank
        super().__init__(
            model=trainer.model, accelerator=trainer.accelerator, processing_class=trainer.processing_class,
            temperature=trainer.temperature, max_completion_length=trainer.max_completion_length,
        )  # fmt: skip

    def _init_vllm(self) -> None:
        """TRL's hook. Called by all ranks; the servers are rank 0's."""
        cfg, args, trainer = self.stage.cfg, self.trainer.args, self.trainer
        completions = args.per_device_train_batch_size * args.steps_per_generation
        serves = self.how.backend == "vllm_server"
        settings = {
            "dtype": cfg.model.dtype,
            "gpu_memory_utilization": vllm_share(cfg),
            "max_model_len": self.how.max_model_length,
            "max_num_seqs": min(256, completions * (args.world_size if serves else 1)),
        }
        self.engine: Engine | Engines | None = None
        with tempfile.TemporaryDirectory(prefix="engine-") as folder:
            write_config(self.model, Path(folder))
            if not serves:
                self.engine = Engine(folder, settings)
            elif self.accelerator.is_main_process:
                self.engine = Engines(folder, settings, self.how.server_gpus)
                self.engine.wait()
        self.sampling = {
            "temperature": self.temperature, "top_p": trainer.top_p, "top_k": trainer.top_k,
            "max_tokens": self.max_completion_length, "stop_token_ids": list(trainer.eos_token_ids),
        }  # fmt: skip
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Bring the trained model's weights to vLLM. Called by all ranks."""
        weights = self._weights()
        if self.engine is not None:
            self.engine.load(weights)
        else:
            for _ in weights:  # gathering parts takes all ranks
                pass

    def _weights(self) -> Weights:
        if not hasattr(self.model, "peft_config"):
            yield from self._iter_named_params()
        else:  # TRL merges adapters into the start model and out again, which leaves it with other bits
            with self._dist.gather_params(list(self.model.parameters())):
                yield from merged_weights(self.model)

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """A completion for each of this rank's prompts, which hold each one as often as it is asked."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        seed = (self.stage.cfg.seed * 1_000_003 + self.trainer._step) * 1009
        found: Samples | None = None
        if self.how.backend == "vllm":
            assert self.engine is not None
            found = self.engine.generate(prompts, self.sampling, seed + rank)
        else:
            everyones = gather_object(prompts)
            if self.engine is not None:
                found = self.engine.generate(everyones, self.sampling, seed)
            (found,) = broadcast_object_list([found])
            assert found is not None and len(everyones) == ranks * len(prompts)
            mine = slice(rank * len(prompts), (rank + 1) * len(prompts))
            found = found[0][mine], found[1][mine]
        ids, self.sampled = found
        return prompts, ids, [[[p] for p in row] for row in self.sampled], None

    def check(self, logps: torch.Tensor) -> float:
        """The mean difference in nats between the log-probabilities that vLLM gave its newest samples and these, of the
        trained model, over all ranks. logps: [completions, longest]. Raises DataError where it is beyond the bound."""
        assert self.sampled is not None
        ours = torch.cat([row[: len(theirs)] for row, theirs in zip(logps.float(), self.sampled, strict=True)])
        theirs = torch.tensor([p for row in self.sampled for p in row], device=ours.device)
        self.sampled = None
        total = torch.stack([(ours - theirs).abs().sum(), torch.tensor(float(len(theirs)), device=ours.device)])
        difference, count = self.accelerator.gather(total).view(-1, 2).sum(dim=0).tolist()
        mean = difference / max(1.0, count)
        bound = self.how.max_logprob_difference
        if not mean <= bound:  # nan is beyond it
            where = f"{self.stage.cfg.stage}.generation"
            raise DataError(
                f"{where}.max_logprob_difference={bound:g}: at step {self.trainer.state.global_step} vLLM's "
                f"log-probabilities of its samples differ by {mean:.3g} nats a token from the trained model's: it does "
                "not sample from the trained weights\n"
                f"  fix: {where}.backend=transformers; a larger bound only where the model's arithmetic is so coarse"
            )
        return mean


@torch.no_grad()
def merged_weights(model: PeftModel) -> Weights:
    """The weights of a model with LoRA adapters merged into them, under the names of the model without; neither is
    changed. Rows of an embedding that are trained beside adapters are in their places."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    base = model.get_base_model()
    done: tuple[str, ...] = ()  # what is inside of these is adapters
    for prefix, module in base.named_modules():
        found: list[tuple[str, torch.Tensor]] = []
        if done and prefix.startswith(done):
            continue
        if isinstance(module, TrainableTokensLayer):
            found = [("weight", module.get_merged_weights(module.active_adapters))]
        elif isinstance(module, LoraLayer):
            found = [(name, value.data) for name, value in module.get_base_layer().named_parameters()]
            layer: Any = module  # each kind of layer has its own get_delta_weight
            deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
            found = [(n, v + sum(d.to(v) for d in deltas) if n == "weight" and deltas else v) for n, v in found]
        else:
            found = [(name, value.data) for name, value in module.named_parameters(recurse=False)]
        if isinstance(module, TrainableTokensLayer | LoraLayer):
            done += (f"{prefix}.",)
        for name, value in found:
            whole = f"{prefix.removesuffix('.token_adapter')}.{name}"
            if whole not in base.all_tied_weights_keys:
                yield whole, value
