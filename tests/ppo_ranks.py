"""One of the two ranks of test_ppo: trains whole and in parts, and writes down what it saw.

    python -m tests.ppo_ranks FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.test_ppo import StopAt, make_trainer, prompts, weights_hash


def run(folder: Path, stop: int, resume: str | None = None) -> dict[str, Any]:
    """17 prompts make two rollouts of 8 a pass; a rollout lasts 4 steps."""
    trainer = make_trainer(
        folder, per_device_train_batch_size=2, rollout_batches=2, num_ppo_epochs=2, data=prompts(17), max_steps=14,
        policy_changes={"attention_dropout": 0.2}, callbacks=[StopAt(stop)], adaptive_kl=True,
    )  # fmt: skip
    seed, update, kls = torch.initial_seed(), trainer.kl.update, []
    trainer.kl.update = lambda kl, episodes: kls.append(kl) or update(kl, episodes)
    trainer.train(resume_from_checkpoint=resume)
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    end = weights_hash(trainer.model)
    return {"hash": end, "coef": trainer.kl.coef, "rewards": rewards, "kl": kls[-1], "seed": seed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    record = {"whole": run(out / "whole", 14), "part": run(out / "parts", 10)}
    torch.manual_seed(12345)
    record["rest"] = run(out / "parts", 14, str(out / "parts" / "checkpoint-10"))
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))
    sys.stdout.flush()
    os._exit(0)  # seen now and then: a thread of gloo's aborts the interpreter on its way out
