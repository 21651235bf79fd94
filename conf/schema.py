"""The configuration: one dataclass per group, one line of help with units per key.

Hydra checks names and types against these classes; what no type can say is checked in `conf.check`.
Nothing here imports torch, transformers or trl.
"""

# ruff: noqa: RUF009  (`key` makes a dataclass field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

CONFIG_VERSION = 1


def key(default: Any, help: str) -> Any:
    """A config key with its default and its line of help."""
    if isinstance(default, list | dict) or hasattr(default, "__dataclass_fields__"):
        return field(default_factory=lambda: _copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _copy(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | dict) else type(value)()


# --------------------------------------------------------------------------------------------- groups


@dataclass
class Model:
    """Of a pretrained model the keys from `architecture` on describe it for the memory estimate: its own config.json,
    where it is a local folder, is believed before them; without vocab_size nothing is estimated."""

    name_or_path: str | None = key(None, "hub id or folder of the start model; null: built from the keys below")
    dtype: str = key("bfloat16", "dtype of the weights while training: float32, bfloat16 or float16")
    attn_implementation: str = key("sdpa", "attention kernel: sdpa, eager, flash_attention_2, ...")
    tokenizer: str = key("bytes", "'bytes', 'train' (BPE, on the base stage's documents), hub id or folder")
    chat_template: str | None = key(
        None,
        "think_answer, chatml, llama3, qwen3, tulu3, alpaca, or a Jinja file; null: the tokenizer's own, if any",
    )
    architecture: str = key("llama", "layers are as in llama, qwen3 or gpt2; from scratch: llama")
    hidden_size: int = key(128, "from scratch: width of the residual stream")
    intermediate_size: int = key(512, "from scratch: width of the MLP")
    num_layers: int = key(2, "from scratch: number of decoder layers")
    num_heads: int = key(4, "from scratch: number of attention heads; must divide hidden_size")
    num_kv_heads: int | None = key(None, "from scratch: heads of keys and values; divides num_heads; null: num_heads")
    head_dim: int | None = key(None, "from scratch: width of a head; null: hidden_size / num_heads")
    vocab_size: int | None = key(
        None,
        "from scratch: least rows of the embedding; tokenizer=train: most tokens, of which 265 are bytes, roles, tags",
    )
    max_position_embeddings: int = key(1024, "from scratch: longest sequence, tokens")
    initializer_range: float = key(0.02, "from scratch: standard deviation of the random weights")
    tie_word_embeddings: bool = key(True, "from scratch: input and output embeddings are one matrix")
    dropout: float = key(0.0, "from scratch: dropout of attention weights, 0 up to 1; off in rm, dpo, orpo and kto")


@dataclass
class Dataset:
    """One of several data sets that are mixed; what is null is as in `data`, or as the data set has it."""

    name: str = key(MISSING, "what the records are, as in data.name")
    path: str | None = key(None, "records, as in data.path; null: the data set's own hub id")
    subset: str | None = key(None, "configuration on the hub; null: the data set's own")
    split: str | None = key(None, "split, as in data.split")
    weight: float = key(1.0, "1: the whole set once; 0.3: a seeded 30 % of it; 2.5: twice, and a seeded half")
    transform: str | None = key(None, "transform of the records, as in data.transform")
    held_out: int | None = key(None, "records never trained on; null: data.held_out")


@dataclass
class Quality:
    dedup: str = key("none", "duplicates dropped: none, exact (but for white space) or near (MinHash, slower)")
    near_threshold: float = key(0.8, "dedup=near: samples are duplicates from this Jaccard similarity on, 0 to 1")
    min_chars: int | None = key(None, "samples whose answer (or text) is shorter are dropped, characters; null: none")
    max_chars: int | None = key(None, "samples that are longer as a whole are dropped, characters; null: none")
    max_per_category: int | None = key(None, "at most so many samples of each category of each data set; null: all")


@dataclass
class Data:
    name: str = key("arithmetic", "what the records are: a file in conf/data/ (arithmetic is generated)")
    path: str | None = key(
        None, "records: file, folder (JSON, JSONL, .gz, CSV, Parquet, .txt) or hub id; null: the data set's own hub id"
    )
    subset: str | None = key(None, "configuration on the hub (hh_rlhf: folder); null: the data set's own")
    split: str | None = key(None, "split, as in train or train[:10%]; null: the data set's own, of local files all")
    eval_path: str | None = key(None, "held-out records, as in path; null: from eval_split, or kept from the others")
    eval_split: str | None = key(None, "split of held-out records; null: the data set's own, or kept from split")
    held_out: int = key(1024, "records or problems never trained on, used by evaluation")
    datasets: list[Dataset] = key([], "several data sets mixed, as in [{name: alpaca, weight: 0.5}, {name: gsm8k}]")
    transform: str | None = key(None, "function that turns a record into samples; null: the data set's own")
    transform_file: str | None = key(None, "Python file with transforms of your own; frozen with the run")
    quality: Quality = key(Quality(), "which samples are dropped before training")
    max_samples: int | None = key(None, "at most so many training samples, after filters, mixing and shuffling")
    num_documents: int = key(25600, "arithmetic: documents for the base stage")
    num_demonstrations: int = key(8000, "arithmetic: demonstrations for sft")
    num_pairs: int = key(2000, "arithmetic: preference pairs for rm, dpo, orpo and kto")
    num_prompts: int = key(4000, "arithmetic: prompts for ppo, grpo and rloo")
    worked_fraction: float = key(0.7, "arithmetic: share of base documents with worked columns, 0 to 1")
    system_prompt: str | None = key(None, "system message of conversations that have none; null: none is added")
    seed: int = key(0, "seed of generation, of the held-out split, of mixing and of shuffling records")


@dataclass
class Training:
    max_steps: int | None = key(None, "length in optimizer steps (exactly one of the four lengths is given)")
    num_training_samples: int | None = key(None, "length in samples (prompts for ppo, grpo and rloo)")
    num_training_tokens: int | None = key(None, "length in tokens of the prepared records; not for ppo, grpo and rloo")
    num_train_epochs: float | None = key(None, "length in passes over the data")
    effective_batch_size: int = key(64, "samples per optimizer step over all ranks (ppo, grpo, rloo: completions)")
    per_device_train_batch_size: int = key(8, "samples per forward pass on one rank; accumulation is derived")
    max_length: int = key(1024, "longest training sequence, tokens; longer ones are cut")
    lr_scheduler: str = key("cosine", "learning-rate schedule: cosine, linear, constant or constant_with_warmup")
    warmup_steps: int = key(0, "optimizer steps of linear warm-up")
    weight_decay: float = key(0.0, "AdamW weight decay")
    adam_beta2: float = key(0.999, "AdamW decay of squared gradients")
    max_grad_norm: float = key(1.0, "gradient norm is clipped to this")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")
    torch_compile: bool = key(False, "base, sft, distill: the model is compiled, which takes the first step minutes")
    dataloader_num_workers: int = key(0, "processes that prepare batches, on each rank; 0: the trainer itself")


@dataclass
class Lora:
    r: int | None = key(None, "rank of LoRA adapters, the only weights that are trained; null: all weights are trained")
    alpha: int = key(32, "adapters are scaled by alpha / r")
    dropout: float = key(0.0, "dropout of what goes into the adapters, 0 up to 1")
    target_modules: Any = key("all-linear", "layers with adapters: all-linear (all but the head), or a list of names")
    quantize: str | None = key(None, "start model held in 4 bits, nf4 or fp4 (QLoRA); needs bitsandbytes; null: not")


@dataclass
class Checkpointing:
    save_steps: int = key(500, "optimizer steps between full checkpoints")
    save_minutes: Any = key(None, "minutes between full checkpoints, beside save_steps; auto: by cost and risk; null")
    mttf_hours: float = key(24.0, "save_minutes=auto: hours between failures expected before any was seen")
    save_total_limit: int = key(2, "full checkpoints kept")
    inference_checkpoint_steps: int | None = key(None, "steps between models saved for inference only; null: none")


@dataclass
class Slurm:
    partition: str | None = key(None, "SLURM partition; null: the cluster's default")
    account: str | None = key(None, "account to charge")
    qos: str | None = key(None, "quality of service")
    num_nodes: int = key(1, "nodes of one job")
    gpus_per_node: int = key(8, "GPUs and tasks on each node; 0: one CPU task a node")
    gpu_type: str | None = key(None, "GRES type, as in --gpus-per-node=h100:8; null: any")
    cpus_per_gpu: int = key(8, "CPU cores of each task")
    mem: str | None = key(None, "memory of each node, as in 500G; null: the cluster's default")
    wall_time: str = key("24:00:00", "time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    signal_time_seconds: int = key(300, "seconds before the wall time at which the job is asked to save and leave")
    max_failures: int = key(3, "crashes, hangs and lacks of memory without progress before a run gives up")
    max_attempts_without_progress: int = key(10, "attempts without progress, however they ended, before it gives up")
    watchdog_minutes: float = key(30.0, "minutes without a step after which an attempt counts as hung and is ended")
    health_check: str | None = key(None, "shell line run on each node before training; a node that fails it is avoided")
    modules: list[str] = key([], "environment modules loaded in the job")
    setup: list[str] = key([], "shell lines run in the job before Python starts (your text, taken as it is)")
    venv: str | None = key(None, "folder of a virtual environment, activated in the job; its Python runs the stages")
    conda: str | None = key(None, "name or folder of a conda environment, activated in the job, whose Python it takes")
    env: dict[str, str] = key({}, "environment variables of the job; secrets belong in your own environment")
    constraint: str | None = key(None, "node features wanted, as in --constraint")
    exclude: str | None = key(None, "nodes not to be used, as in --exclude")
    mail_user: str | None = key(None, "address that SLURM's controller writes to, as in --mail-user; null: to nobody")
    mail_type: list[str] = key(["FAIL", "INVALID_DEPEND"], "mail_user: of what SLURM writes, as in --mail-type")
    array_parallelism: int | None = key(
        None, "sweeps: points that run a stage at a time, which is one job array then; null: a job each, no limit"
    )


@dataclass
class Container:
    """Training in a container. The job script itself stays on the node, where SLURM's commands are; the stages' Python
    is the container's (cluster.python, by default its python3), and needs what this project needs."""

    image: str | None = key(None, "apptainer: .sif file or folder; pyxis: .sqsh file or URI; null: no container")
    runtime: str = key("apptainer", "what runs it: apptainer, singularity, or pyxis (srun's --container-image, enroot)")
    mounts: list[str] = key([], "folders seen inside beside paths.output_base and inputs, as in /data or /data:/in:ro")
    arguments: list[str] = key([], "further options of `apptainer exec`, or --container-* options of srun")
    host_python: str | None = key(
        None, "the node's own Python (3.10 or later, with PyYAML) for the script's bookkeeping; null: the container's"
    )


@dataclass
class Notify:
    """Who is told how runs end. The webhook's address is a secret: it stands in POST_TRAINING_WEBHOOK alone, in the
    environment of the shell that submits."""

    events: list[str] = key(
        ["done", "failed", "stuck", "gated", "pipeline"],
        "what is told, of a run: done, failed, stuck (stopped without progress), gated, cancelled, requeued; pipeline: "
        "its last stage is done",
    )
    webhook: bool = key(False, "posted to the address in POST_TRAINING_WEBHOOK (Slack, Mattermost, Discord, ...)")
    mail: str | None = key(None, "mailed by the job itself to these addresses, by commas; see slurm.mail_user too")
    smtp: str | None = key(None, "mail server without password, host or host:port; null: the node's own sendmail")


@dataclass
class Cluster:
    name: str = key("auto", "auto, local, dev, h100 or your own file in conf/cluster/")
    scheduler: str = key("auto", "slurm, local (this machine, no SLURM) or auto (slurm_cluster where SLURM answers)")
    slurm_cluster: str = key("h100", "auto: the conf/cluster/ file taken where SLURM answers")
    slurm_conf: str | None = key(None, "path exported as SLURM_CONF; null: the system's")
    python: str | None = key(None, "Python of the jobs; null: the one that submits")
    gpu_memory_gb: float | None = key(None, "memory of one GPU, GiB: what cannot fit is refused; null: not checked")


@dataclass
class Sweep:
    metric: str | None = key(None, "what a sampler (-m hydra/sweeper=optuna) makes better: <eval stage>/<figure>")


@dataclass
class Parallel:
    strategy: str = key("ddp", "how ranks share the work: ddp, zero2 or zero3 (DeepSpeed), or fsdp2 (torch)")
    offload: bool = key(False, "zero2, zero3: optimizer state, under zero3 the weights too, in the node's own memory")
    backend: str | None = key(None, "torch.distributed backend; null: nccl with GPUs, else gloo")
    timeout_minutes: int = key(60, "minutes a collective may take; more than slurm.watchdog_minutes, which tells why")


@dataclass
class Logging:
    steps: int = key(10, "optimizer steps between log lines")
    report_to: list[str] = key(["tensorboard"], "besides metrics.jsonl: tensorboard, wandb")
    wandb_project: str = key("post-training", "W&B's project; WANDB_PROJECT, _ENTITY, _MODE and _API_KEY hold as ever")


@dataclass
class Paths:
    data: str = key("data", "folder of local data sets, for data.path=${paths.data}/...")
    output_base: str = key("outputs", "folder of all pipelines; a run's folder is <output_base>/<run_name>/<stage>")


@dataclass
class Inputs:
    model: str | None = key(None, "folder or hub id of the model to train; null: what the pipeline says")
    reference: str | None = key(None, "folder or hub id of the frozen reference; null: what the pipeline says")
    reward_model: str | None = key(None, "folder or hub id of the reward model; null: what the pipeline says")
    data: str | None = key(None, "output folder of a sample stage to train on; null: what the pipeline says")


# ------------------------------------------------------------------------------------------ techniques


@dataclass
class Base:
    lr: float = key(3e-4, "peak learning rate")
    packing: str = key("none", "none: a row is a document; wrapped: documents end to end, cut into rows of max_length")


@dataclass
class Sft:
    lr: float = key(2e-5, "peak learning rate")
    packing: bool = key(False, "several samples in one row (best-fit decreasing); needs flash_attention_2")
    random_templates: list[str] = key([], "formats drawn per sample beside model.chat_template, as in [chatml,alpaca]")
    loss_type: str = key("nll", "nll, or dft: each token's loss weighted by its probability (arXiv:2508.05629)")
    kl_coef: float = key(0.0, "weight of the per-token KL to the start model, held as a frozen copy; 0: none")
    neftune_noise_alpha: float | None = key(None, "strength of noise on embeddings (arXiv:2310.05914); null: none")


@dataclass
class Distill(Sft):
    """As sft, on traces in think/answer form alone."""

    lr: float = key(1e-5, "peak learning rate")


@dataclass
class Merge:
    adapter: str | None = key(None, "folder of the LoRA adapter that is merged into the stage's model")


@dataclass
class Rm:
    lr: float = key(1e-5, "peak learning rate")
    center_rewards_coefficient: float | None = key(None, "weight that pulls mean rewards to 0; null: off")


@dataclass
class RewardFunction:
    """A Python function of the user's own, f(prompts, completions, **columns) -> one number or None each."""

    path: str = key(MISSING, "a file and a function in it, as in rewards.py:brief; the file is frozen with the run")
    weight: float = key(1.0, "weight of what it returns; 0: not called")


@dataclass
class Reward:
    correct: float = key(1.0, "weight of the verifier: 1 for the right number, else 0")
    format: float = key(0.1, "weight of the format check: 1 for <think>...</think><answer>...</answer>, else 0")
    random: float = key(0.0, "weight of a coin flip per completion: a control that must not teach anything")
    math_verify: float = key(0.0, "weight of the verifier for formulas: 1 where math-verify finds them equal, else 0")
    functions: list[RewardFunction] = key([], "functions of your own, as in [{path: 'rewards.py:brief', weight: 0.2}]")


@dataclass
class Ppo:
    lr: float = key(1e-6, "peak learning rate of policy and value head")
    reward: Reward = key(Reward(), "weights of the verifiable rewards")
    reward_model_weight: float = key(0.0, "weight of the reward model's score; 0: no reward model is loaded")
    value_init: str = key("policy", "value head's start: policy (all values 0), or rm (the reward model's score head)")
    kl_coef: float = key(0.05, "weight of the per-token KL penalty to the reference; with adaptive_kl its start")
    kl_estimator: str = key("k1", "KL estimate in the penalty: k1 (log ratio) or k3 (never negative)")
    adaptive_kl: bool = key(False, "kl_coef is steered so that the KL of a whole completion stays near kl_target")
    kl_target: float = key(6.0, "adaptive_kl: wanted KL of a completion, nats")
    kl_horizon: float = key(10000, "adaptive_kl: completions it takes to react")
    num_ppo_epochs: int = key(1, "passes over each rollout")
    clip_range: float = key(0.2, "the policy ratio is clipped to 1 +- this")
    value_clip_range: float = key(0.2, "values are clipped to those of the rollout +- this")
    value_coef: float = key(0.1, "weight of the value loss")
    gamma: float = key(1.0, "discount per token")
    lam: float = key(0.95, "GAE lambda")
    whiten_advantages: bool = key(True, "advantages of a rollout are scaled to mean 0 and deviation 1, over all ranks")
    whiten_rewards: bool = key(False, "token rewards of a rollout are scaled to deviation 1, their mean kept")
    reward_clip: float | None = key(None, "a completion's score is clipped to +- this; null: not")
    missing_eos_penalty: float | None = key(None, "taken off the score of a completion that was cut off; null: nothing")
    entropy_coef: float = key(0.0, "weight of an entropy bonus")
    temperature: float = key(1.0, "sampling temperature of rollouts")
    max_completion_length: int = key(256, "longest completion, tokens")


@dataclass
class Dpo:
    lr: float = key(1e-6, "peak learning rate")
    beta: float = key(0.1, "strength of the pull to the reference")
    loss_type: Any = key("sigmoid", "TRL's loss: sigmoid, ipo, hinge, robust, ...; or a list, as in [sigmoid,sft]")
    loss_weights: list[float] | None = key(None, "weight of each loss of a list; null: 1 each")
    label_smoothing: float = key(0.0, "robust: share of wrong labels, 0 up to 0.5; exo_pair: smoothing, above 0")
    precompute_ref_log_probs: bool = key(False, "the reference is asked once, before training, and not kept in memory")


@dataclass
class Orpo:
    lr: float = key(8e-6, "peak learning rate")
    beta: float = key(0.1, "weight of the odds ratio beside the loss on the chosen answer (lambda in the paper)")


@dataclass
class Kto:
    lr: float = key(1e-6, "peak learning rate")
    beta: float = key(0.1, "strength of the pull to the reference")
    desirable_weight: float = key(1.0, "weight of the losses of good answers")
    undesirable_weight: float = key(1.0, "weight of the losses of bad answers")
    loss_type: str = key("kto", "TRL's loss: kto, or apo_zero_unpaired (no KL term)")
    precompute_ref_log_probs: bool = key(False, "the reference is asked once, before training, and not kept in memory")


@dataclass
class Generation:
    """Who samples the completions that are trained on."""

    backend: str = key("transformers", "transformers, vllm (within each rank) or vllm_server (on GPUs of its own)")
    gpu_memory_utilization: float | None = key(
        None, "vllm: share of a GPU's memory it takes, above 0 to 1; null: 0.3 within ranks, 0.9 as a server"
    )
    max_model_length: int | None = key(None, "vllm: longest prompt and completion, tokens; null: the model's context")
    max_logprob_difference: float = key(
        0.1, "vllm: nats a token by which its log-probs of samples may differ from the trained model's, on average"
    )
    server_gpus: int = key(1, "vllm_server: GPUs of the node that are vLLM's, an engine on each; the others train")


@dataclass
class Grpo:
    lr: float = key(1e-6, "peak learning rate")
    reward: Reward = key(Reward(), "weights of the verifiable rewards")
    num_generations: int = key(8, "completions per prompt, 2 or more; must divide effective_batch_size")
    num_iterations: int = key(1, "passes over each generation")
    steps_per_generation: int | None = key(None, "forward passes that one generation serves; null: one optimizer step")
    beta: float = key(0.0, "weight of the KL to the reference (k3, per token); 0: no reference is loaded")
    temperature: float = key(1.0, "sampling temperature")
    max_completion_length: int = key(256, "longest completion, tokens")
    loss_type: str = key("dapo", "TRL's loss: grpo, dr_grpo, dapo, bnpo, cispo, sapo, luspo or vespo")
    epsilon: float = key(0.2, "the policy ratio is clipped below at 1 - this")
    epsilon_high: float | None = key(None, "the policy ratio is clipped above at 1 + this (DAPO: 0.28); null: epsilon")
    scale_rewards: str = key("group", "advantages are divided by the deviation of: group, batch or none (Dr. GRPO)")
    importance_sampling_level: str = key("token", "the policy ratio is of each token, or of the sequence (GSPO)")
    mask_truncated_completions: bool = key(False, "completions that were cut off are left out of the loss (DAPO)")
    generation: Generation = key(Generation(), "who samples the completions")


@dataclass
class Rloo:
    lr: float = key(1e-6, "peak learning rate")
    reward: Reward = key(Reward(), "weights of the verifiable rewards")
    num_generations: int = key(8, "completions per prompt, 2 or more; must divide effective_batch_size")
    num_iterations: int = key(1, "passes over each generation")
    steps_per_generation: int | None = key(None, "forward passes that one generation serves; null: one optimizer step")
    beta: float = key(0.05, "weight of the KL to the reference (k1, taken off the reward); 0: no reference is loaded")
    temperature: float = key(1.0, "sampling temperature")
    max_completion_length: int = key(256, "longest completion, tokens")
    epsilon: float = key(0.2, "the policy ratio is clipped below at 1 - this")
    epsilon_high: float | None = key(None, "the policy ratio is clipped above at 1 + this; null: epsilon")
    normalize_advantages: bool = key(False, "advantages of each generation are scaled to mean 0 and deviation 1")
    mask_truncated_completions: bool = key(False, "completions that were cut off are left out of the loss")
    generation: Generation = key(Generation(), "who samples the completions")


@dataclass
class Guardrails:
    """Rules over the logged figures. Each: off, warn, stop (the run gives up) or lower_lr (from then on)."""

    nan: str = key("stop", "the loss is no finite number: off, warn or stop")
    kl: str = key("warn", "KL to the reference above kl_limit: off, warn, stop or lower_lr")
    kl_limit: float = key(15.0, "kl: nats per completion")
    saturation: str = key("warn", "reward stands still while KL or length grow by half: off, warn, stop or lower_lr")
    entropy: str = key("warn", "ppo, grpo, rloo: entropy below entropy_floor: off, warn, stop or lower_lr")
    entropy_floor: float = key(0.1, "entropy: share of its mean over the first log lines")
    spike: str = key("warn", "loss above its median by spike_limit deviations: off, warn, stop or lower_lr")
    spike_limit: float = key(10.0, "spike: robust standard deviations")
    window: int = key(20, "log lines that a rule compares with, and until an alarm that holds on is raised again")
    lr_factor: float = key(0.5, "lower_lr: the learning rate is multiplied by this, above 0 and below 1")


@dataclass
class Sample:
    reward: Reward = key(Reward(format=0.0), "weights of the verifiable rewards that say which completions are good")
    num_prompts: int | None = key(None, "prompts asked, the first ones of the data; null: all")
    num_samples: int = key(8, "completions sampled for each prompt")
    keep: int = key(1, "different completions kept for each prompt: the best ones, of equals the shortest")
    min_reward: float = key(1.0, "completions with less than this are never kept")
    temperature: float = key(1.0, "sampling temperature")
    top_p: float = key(1.0, "sampled from the likeliest tokens that make up this share, above 0 up to 1")
    max_completion_length: int = key(256, "longest completion, tokens; one that is cut there is not kept")
    batch_size: int = key(16, "prompts sampled together; after each batch the work so far is safe")


@dataclass
class EvalText:
    name: str | None = key(None, "what it is, as in data.name; null: the line's base stage's, or the data's own")
    path: str | None = key(None, "records, as in data.path; null: the data set's own hub id")
    subset: str | None = key(None, "configuration on the hub; null: the data set's own")
    split: str | None = key(None, "split, as in data.split")
    transform: str | None = key(None, "transform of the records, as in data.transform")
    held_out: int | None = key(None, "documents that are held out; null: data.held_out")


@dataclass
class Judge:
    """A language model behind an OpenAI-compatible server. A key that it wants is in the job's OPENAI_API_KEY."""

    base_url: str | None = key(None, "the server, as in http://node7:8000/v1 or https://api.openai.com/v1; null: none")
    model: str | None = key(None, "the judge's name at that server")
    questions: str | None = key(None, "JSONL of {prompt[, reference_answer]}; null: ten built-in questions")
    reference: str | None = key(None, "JSONL of {prompt, completion} to compare with, or an eval's folder; null: none")
    max_new_tokens: int = key(1024, "longest answer to a question, tokens")
    concurrency: int = key(8, "judgements asked for at once")
    timeout_seconds: float = key(120.0, "seconds until a judgement that does not come is asked for again")
    max_retries: int = key(5, "times a judgement is asked for again when the server refuses or fails")


@dataclass
class Eval:
    max_new_tokens: int = key(256, "longest answer, tokens")
    batch_size: int = key(256, "prompts per generation batch")
    num_problems: int = key(512, "held-out problems or records scored")
    num_samples: int = key(0, "answers sampled for each problem: pass@k and majority; 0: greedy answers alone")
    temperature: float = key(1.0, "sampling temperature of num_samples, above 0")
    num_instructions: int = key(0, "prompts with rules that a program checks; 0: none")
    text: EvalText = key(EvalText(), "text on which forgetting is measured, as in {name: text, path: ...}")
    base_text: dict[str, Any] = key({}, "that base stage's data, where it is not this one's; filled in at submission")
    backend: str = key("transformers", "who generates the answers: transformers or vllm")
    gpu_memory_utilization: float = key(0.5, "vllm: share of the GPU's memory that it takes, above 0 to 1")
    tasks: list[str] = key([], "benchmarks of lm-eval, as in [gsm8k,ifeval,mmlu]; needs the extra [lm-eval]")
    tasks_path: str | None = key(None, "folder with YAML files of your own lm-eval tasks; null: lm-eval's alone")
    num_fewshot: int | None = key(None, "worked examples in a benchmark's prompts; null: as each task has it")
    task_limit: int | None = key(None, "documents of each benchmark that are asked, the first ones; null: all")
    judge: Judge = key(Judge(), "a language model that grades the answers; off without base_url")


@dataclass
class Serve:
    """What `launchers.serve` starts; says nothing about any run."""

    engine: str = key("auto", "vllm, transformers, or auto: vllm where the server has GPUs and vLLM is installed")
    gpus: int = key(1, "GPUs of the server, over which the model is shared; none where slurm.gpus_per_node=0")
    port: int | None = key(None, "port on the server's node, 1024 to 65535; null: a free one")
    page_port: int = key(7860, "--page: the first free port from this one on")
    dtype: str = key("auto", "dtype of the weights: float32, bfloat16, float16, or auto: what the engine takes")
    wall_time: str = key("04:00:00", "time limit of the server's job: minutes, HH:MM:SS or D-HH:MM:SS")
    arguments: list[str] = key([], "further arguments of the engine's own command, as in ['--max-model-len=8192']")


@dataclass
class Prepare:
    stages: list[str] = key([], "stages of the pipeline whose data is prepared; []: all of base, sft, rm and dpo")
    num_proc: int | None = key(None, "processes that tokenise; null: as many as the job has CPU cores")
    targets: dict[str, Any] = key({}, "what those stages' data depends on; filled in at submission")


# ---------------------------------------------------------------------------------------------- graph


@dataclass
class Gate:
    """What an eval stage must find before the stages that take the judged model start. At most one of the bounds.

    The figure's value is compared, not its interval. The evaluation is done whatever the gate says; where it does not
    hold, its job ends with an error, and the stages behind it do not start.
    """

    metric: str | None = key(None, "the figure: accuracy, pass@8, perplexity_text, <task>/<metric>; null: the headline")
    at_least: float | None = key(None, "it must be at least this, in its own unit: accuracy is a share, 0 to 1")
    at_most: float | None = key(None, "it must be at most this, in its own unit")
    max_drop: float | None = key(None, "it may be worse than the parent's by at most this, in its own unit")
    parent: str | None = key(
        None, "max_drop: the eval stage compared with; null: that of the model which the judged stage started from"
    )


@dataclass
class Node:
    """One stage in a pipeline's graph."""

    stage: str = key(MISSING, "what it does: a file in conf/stage/")
    model: str | None = key(None, "the stage whose output it trains or evaluates")
    reference: str | None = key(None, "the stage whose output is its frozen reference; null: its own start model")
    reward_model: str | None = key(None, "the stage whose output scores its samples")
    data: str | None = key(None, "the sample stage whose records it trains on: sft and distill; null: data.*")
    after: list[str] = key([], "further stages that must be done first")
    overrides: list[str] = key([], "Hydra overrides for this stage alone")
    gate: Gate | None = key(Gate(), "eval: what it must find before the stages that take the judged model start")


@dataclass
class Pipeline:
    name: str = key("full", "name of the pipeline; its folder, unless run_name says otherwise")
    stages: dict[str, Node] = key({}, "the graph: name -> stage")


@dataclass
class Config:
    """Everything. `stage` names what a run does; `pipeline` is the graph that it is one stage of."""

    stage: str = key("sft", "the stage to submit: a technique (base, sft, rm, ...), or a name in the pipeline")
    run_name: str | None = key(None, "folder of this pipeline under paths.output_base; null: the pipeline's name")
    seed: int = key(0, "seed of initialisation, data order, dropout and sampling")
    offline: bool = key(False, "never ask a hub: models and data must be local files")
    dry_run: bool = key(False, "print graph and scripts; write and submit nothing")
    restart: bool = key(False, "start again from scratch what would go on; checkpoints and logs are set aside")
    model: Model = key(Model(), "the model")
    data: Data = key(Data(), "the records")
    training: Training = key(Training(), "length, batch and optimizer")
    checkpointing: Checkpointing = key(Checkpointing(), "what is saved, and when")
    slurm: Slurm = key(Slurm(), "what each job asks for; under cluster=local wall time, signal and CPUs hold too")
    cluster: Cluster = key(Cluster(), "where jobs run")
    container: Container = key(Container(), "the container in which stages run")
    notify: Notify = key(Notify(), "who is told how runs end")
    lora: Lora = key(Lora(), "adapters instead of all weights; not for base")
    parallel: Parallel = key(Parallel(), "how ranks share the work")
    logging: Logging = key(Logging(), "what is logged, and where to")
    paths: Paths = key(Paths(), "folders")
    inputs: Inputs = key(Inputs(), "models from outside the pipeline")
    base: Base = key(Base(), "base stage: a causal LM from scratch")
    sft: Sft = key(Sft(), "sft stage: supervised fine-tuning, loss on assistant tokens")
    distill: Distill = key(Distill(), "distill stage: supervised fine-tuning on reasoning traces")
    merge: Merge = key(Merge(), "merge stage: an adapter merged into its model")
    rm: Rm = key(Rm(), "rm stage: Bradley-Terry reward model")
    ppo: Ppo = key(Ppo(), "ppo stage")
    dpo: Dpo = key(Dpo(), "dpo stage")
    orpo: Orpo = key(Orpo(), "orpo stage: odds-ratio preference optimisation, no reference")
    kto: Kto = key(Kto(), "kto stage: Kahneman-Tversky optimisation, single answers marked good or bad")
    grpo: Grpo = key(Grpo(), "grpo stage")
    rloo: Rloo = key(Rloo(), "rloo stage: REINFORCE with the other completions' mean reward as the baseline")
    guardrails: Guardrails = key(Guardrails(), "what is done when training goes wrong")
    sample: Sample = key(Sample(), "sample stage: rejection sampling, records for sft from a model's best answers")
    eval: Eval = key(Eval(), "eval stage: held-out judgement of one model")
    serve: Serve = key(Serve(), "launchers.serve: an OpenAI-compatible server for a stage's model")
    prepare: Prepare = key(Prepare(), "prepare stage: data tokenised and packed before its stages start, on CPUs")
    pipeline: Pipeline = key(Pipeline(), "the graph of stages")
    sweep: Sweep = key(Sweep(), "points sampled by an optimiser, under -m")
    stages: dict[str, Any] = key({}, "what `<stage>.<key>=...` on the command line sets for one stage alone")


TECHNIQUES = (
    "base", "sft", "distill", "merge", "rm", "ppo", "dpo", "orpo", "kto", "grpo", "rloo", "sample", "eval", "prepare",
)  # fmt: skip
"""Stages with a section of their own in the config, and a file in post_training/stages/."""

UNTRAINED = ("merge", "sample", "eval", "prepare")
"""Stages that take no steps: length, batch, parallel and lora say nothing about them."""

TEMPLATES = ("think_answer", "chatml", "llama3", "qwen3", "tulu3", "alpaca")
"""Chat templates that have a name; their texts are in post_training/data/templates.py."""

PREPARABLE = ("base", "sft", "rm", "dpo")
"""Techniques whose data can be prepared before they start."""

LENGTHS = ("max_steps", "num_training_samples", "num_training_tokens", "num_train_epochs")
