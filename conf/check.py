"""What no type can say: ranges, choices and combinations of config values. Reads no file."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
import urllib.parse
from collections.abc import Iterable

from conf.datasets import KNOWN, STAGE_VIEWS, TRANSFORMS, VIEWS, having, views_of
from conf.schema import LENGTHS, TECHNIQUES, TEMPLATES, UNTRAINED, Config, Generation, Grpo, Reward, Rloo

GUARDRAILS = ("nan", "kl", "saturation", "entropy", "spike")
"""Rules of `guardrails`, the worst first."""
NOTIFIED = ("done", "failed", "stuck", "gated", "cancelled", "requeued", "pipeline")
"""What `notify.events` can name."""
MAIL_TYPES = (
    "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT", "TIME_LIMIT_90",
    "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS",
)  # fmt: skip
"""What sbatch takes as --mail-type."""
ADDRESS = re.compile(r"[^\s,;<>@]+@[^\s,;<>@]+")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "training.lr_scheduler": ("cosine", "linear", "constant", "constant_with_warmup"),
    "model.architecture": ("llama", "qwen3", "gpt2"),
    "parallel.strategy": ("ddp", "zero2", "zero3", "fsdp2"),
    "data.name": tuple(KNOWN),
    "data.quality.dedup": ("none", "exact", "near"),
    "cluster.scheduler": ("slurm", "local", "auto"),
    "container.runtime": ("apptainer", "singularity", "pyxis"),
    "guardrails.nan": ("off", "warn", "stop"),
    **{f"guardrails.{rule}": ("off", "warn", "stop", "lower_lr") for rule in GUARDRAILS[1:]},
    "base.packing": ("none", "wrapped"),
    "sft.loss_type": ("nll", "dft"),
    "distill.loss_type": ("nll", "dft"),
    "kto.loss_type": ("kto", "apo_zero_unpaired"),
    "ppo.value_init": ("policy", "rm"),
    "ppo.kl_estimator": ("k1", "k3"),
    "grpo.loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "grpo.scale_rewards": ("group", "batch", "none"),
    "grpo.importance_sampling_level": ("token", "sequence"),
    "grpo.generation.backend": ("transformers", "vllm", "vllm_server"),
    "rloo.generation.backend": ("transformers", "vllm", "vllm_server"),
    "eval.backend": ("transformers", "vllm"),
}
AT_LEAST: dict[str, float] = {
    "training.effective_batch_size": 1,
    "training.per_device_train_batch_size": 1,
    "training.max_length": 2,
    "training.warmup_steps": 0,
    "training.weight_decay": 0,
    "training.dataloader_num_workers": 0,
    "guardrails.kl_limit": 1e-6,
    "guardrails.entropy_floor": 0,
    "guardrails.spike_limit": 1,
    "guardrails.window": 2,
    "ppo.num_ppo_epochs": 1,
    "ppo.kl_target": 0.001,
    "ppo.kl_horizon": 1,
    "grpo.num_generations": 2,
    "grpo.num_iterations": 1,
    "grpo.steps_per_generation": 1,
    "rloo.num_generations": 2,
    "rloo.num_iterations": 1,
    "rloo.steps_per_generation": 1,
    "checkpointing.save_steps": 1,
    "checkpointing.save_total_limit": 1,
    "checkpointing.inference_checkpoint_steps": 1,
    "slurm.num_nodes": 1,
    "slurm.gpus_per_node": 0,
    "slurm.cpus_per_gpu": 1,
    "slurm.signal_time_seconds": 1,
    "slurm.max_failures": 1,
    "slurm.max_attempts_without_progress": 1,
    "slurm.watchdog_minutes": 0.05,
    "slurm.array_parallelism": 1,
    "checkpointing.mttf_hours": 0.01,
    "logging.steps": 1,
    "data.held_out": 1,
    "data.max_samples": 1,
    "data.quality.min_chars": 0,
    "data.quality.max_chars": 1,
    "data.quality.max_per_category": 1,
    "eval.num_problems": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.num_samples": 0,
    "eval.num_instructions": 0,
    "eval.num_fewshot": 0,
    "eval.task_limit": 1,
    "eval.judge.max_new_tokens": 1,
    "eval.judge.concurrency": 1,
    "eval.judge.timeout_seconds": 1,
    "eval.judge.max_retries": 0,
    "parallel.timeout_minutes": 1,
    "lora.r": 1,
    "lora.alpha": 1,
    "sft.kl_coef": 0,
    "sft.neftune_noise_alpha": 0,
    "distill.kl_coef": 0,
    "distill.neftune_noise_alpha": 0,
    "sample.num_prompts": 1,
    "sample.num_samples": 1,
    "sample.keep": 1,
    "sample.max_completion_length": 1,
    "sample.batch_size": 1,
    "grpo.generation.server_gpus": 1,
    "rloo.generation.server_gpus": 1,
    "grpo.generation.max_logprob_difference": 0,
    "rloo.generation.max_logprob_difference": 0,
}
LORA_STAGES = ("sft", "distill", "rm", "ppo", "dpo", "orpo", "kto", "grpo", "rloo")
FSDP2 = ("base", "sft", "dpo")
"""Stages that run under parallel=fsdp2."""
COMPILED = ("base", "sft", "distill")
"""Stages that run under training.torch_compile: their batches have few shapes, packed ones a single one."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")


class ConfigError(ValueError):
    """A config value that cannot be used. Its text names the key, the value, what is allowed and the fix."""

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        shown = "null" if value is None else value
        super().__init__(f"{key}={shown}: {problem}\n  fix: {fix}")


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid word most like `word`, as ' did you mean ...?', or the list of all."""
    options = sorted(valid)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(options)}"


def parse_wall_time(text: str) -> int:
    """Seconds of a SLURM time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (man sbatch, --time).

    Raises ConfigError when it is none of them or is zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(text).strip())
    if match:
        days, *rest = match.groups()
        parts = [int(p) for p in rest if p is not None]
        if days is not None:
            hours, minutes, seconds = (parts + [0, 0])[:3]
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:
            hours, minutes, seconds = 0, *(parts + [0])[:2]
        total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        in_range = seconds < 60 and (len(parts) < 3 or minutes < 60)
        if total > 0 and in_range:
            return total
    fix = "write minutes, HH:MM:SS or D-HH:MM:SS, as in 04:00:00"
    raise ConfigError("slurm.wall_time", text, "not a time limit", fix)


def lookup(cfg: Config, dotted: str) -> object:
    """The value at a dotted key."""
    value: object = cfg
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def generation(cfg: Config) -> Generation | None:
    """How a stage samples what it trains on, where it can be told."""
    return getattr(getattr(cfg, cfg.stage), "generation", None) if cfg.stage in ("grpo", "rloo") else None


def vllm_share(cfg: Config) -> float | None:
    """Share of a GPU's memory that vLLM takes; None where it has no part in the stage."""
    if cfg.stage == "eval":
        return cfg.eval.gpu_memory_utilization if cfg.eval.backend == "vllm" else None
    how = generation(cfg)
    if how is None or how.backend == "transformers":
        return None
    return how.gpu_memory_utilization or (0.3 if how.backend == "vllm" else 0.9)


def server_gpus(cfg: Config) -> int:
    """GPUs of the job on which nothing trains: they are vLLM's."""
    how = generation(cfg)
    return how.server_gpus if how is not None and how.backend == "vllm_server" and cfg.slurm.gpus_per_node else 0


def gpus_per_node(cfg: Config) -> int:
    """GPUs that a job asks for on each of its nodes: an evaluation is one process, and gets one at most."""
    return min(1, cfg.slurm.gpus_per_node) if cfg.stage == "eval" else cfg.slurm.gpus_per_node


def tasks_per_node(cfg: Config) -> int:
    """One task a GPU that trains; one CPU task where a node has none."""
    return max(1, gpus_per_node(cfg) - server_gpus(cfg))


def world_size(cfg: Config) -> int:
    """Ranks of a job."""
    return cfg.slurm.num_nodes * tasks_per_node(cfg)


def accumulation_steps(cfg: Config) -> int:
    """Forward passes per optimizer step on one rank, so that their product is the effective batch size."""
    return cfg.training.effective_batch_size // (cfg.training.per_device_train_batch_size * world_size(cfg))


def beyond(cfg: Config, positions: int) -> tuple[str, int, int] | None:
    """Key, value and what would fit, where a stage's rows are longer than its model has positions for; else None.

    Of a stage that samples only the completion is known; a prompt comes before it.
    """
    if cfg.stage in SAMPLING:
        longest = getattr(cfg, cfg.stage).max_completion_length
        return (f"{cfg.stage}.max_completion_length", longest, positions // 2) if longest >= positions else None
    longest = cfg.training.max_length
    return ("training.max_length", longest, positions) if longest > positions else None


def runs_here(cfg: Config) -> bool:
    """Whether the Python that submits runs the jobs too: then their packages are known."""
    return cfg.cluster.python is None and environment(cfg) is None


def environment(cfg: Config) -> str | None:
    """The key that says where the jobs' Python is, beside cluster.python: an environment's, or a container's."""
    given = {"slurm.venv": cfg.slurm.venv, "slurm.conda": cfg.slurm.conda, "container.image": cfg.container.image}
    return next((name for name, value in given.items() if value is not None), None)


def check_run(cfg: Config) -> None:
    """Refuse a stage's config that cannot work. Raises ConfigError for the first problem found."""
    if cfg.stage not in TECHNIQUES:
        raise ConfigError("stage", cfg.stage, "no such stage", nearest(cfg.stage, TECHNIQUES))
    for name, options in CHOICES.items():
        value = lookup(cfg, name)
        if value not in options:
            raise ConfigError(name, value, f"must be one of {', '.join(options)}", nearest(str(value), options))
    for name, least in AT_LEAST.items():
        value = lookup(cfg, name)
        if isinstance(value, int | float) and value < least:
            raise ConfigError(name, value, f"must be at least {least:g}", f"{name}={least:g}")
    _check_logging(cfg)
    if cfg.run_name is not None and not NAME.fullmatch(cfg.run_name):
        raise ConfigError("run_name", cfg.run_name, "is used as a folder's name", "use letters, digits and . _ - = , +")
    _check_slurm(cfg)
    check_notify(cfg)
    check_environment(cfg)
    _check_model(cfg)
    _check_data(cfg)
    if cfg.stage not in UNTRAINED:
        _check_length(cfg)
        _check_batch(cfg)
        _check_parallel(cfg)
        _check_lora(cfg)
    if not 0 < cfg.guardrails.lr_factor < 1:
        problem = "must be above 0 and below 1"
        raise ConfigError("guardrails.lr_factor", cfg.guardrails.lr_factor, problem, "guardrails.lr_factor=0.5")
    if cfg.stage == "merge" and cfg.merge.adapter is None:
        raise ConfigError("merge.adapter", None, "there is nothing to merge", "merge.adapter=<folder of an adapter>")
    if cfg.stage == "sample":
        _check_sample(cfg)
    if cfg.stage == "eval":
        _check_eval(cfg)
    if cfg.stage in ("sft", "distill"):
        for name in getattr(cfg, cfg.stage).random_templates:
            if name not in TEMPLATES:
                problem = f"must be some of {', '.join(TEMPLATES)}"
                raise ConfigError(f"{cfg.stage}.random_templates", name, problem, nearest(name, TEMPLATES))
    if cfg.stage in REWARDED:
        _check_reward(cfg)
    if cfg.stage == "dpo":
        _check_dpo(cfg)
    if cfg.stage == "eval":
        _check_benchmarks(cfg)
        _check_judge(cfg)
    _check_vllm(cfg)


def _check_eval(cfg: Config) -> None:
    how = cfg.eval
    if not 0 < how.temperature < math.inf:
        fix = "eval.temperature=1, or eval.num_samples=0 for greedy answers alone"
        raise ConfigError("eval.temperature", how.temperature, "must be above 0", fix)
    if how.num_samples > how.batch_size:
        problem = f"is more than eval.batch_size={how.batch_size}, the answers that are generated together"
        raise ConfigError("eval.num_samples", how.num_samples, problem, f"eval.batch_size={how.num_samples}")
    if how.text.name is None:
        for name in ("path", "subset", "split", "transform", "held_out"):
            if (value := getattr(how.text, name)) is not None:
                raise ConfigError(f"eval.text.{name}", value, "says not what it is", "eval.text.name=text")
    else:
        if how.text.name not in KNOWN:
            raise ConfigError("eval.text.name", how.text.name, "no such data set", nearest(how.text.name, KNOWN))
        _check_records(cfg, "eval.text", how.text.name, how.text.path, how.text.transform)
        views = views_of(how.text.name, how.text.transform)
        if views is not None and "documents" not in views:
            fix = f"one that has: {', '.join(having('documents'))}"
            raise ConfigError("eval.text.name", how.text.name, f"has no {VIEWS['documents']}", fix)


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""What TRL's DPOTrainer knows."""


def dpo_losses(cfg: Config) -> list[str]:
    """The losses of `dpo.loss_type`, which is one or a list."""
    given = cfg.dpo.loss_type
    return list(given) if isinstance(given, list | tuple) else [given]


def _check_dpo(cfg: Config) -> None:
    dpo, losses = cfg.dpo, dpo_losses(cfg)
    for loss in losses:
        if loss not in DPO_LOSSES:
            raise ConfigError("dpo.loss_type", loss, "no such loss", nearest(str(loss), DPO_LOSSES))
    if not losses or losses == ["sft"]:
        fix = "stage=sft for answers alone, or dpo.loss_type=[sigmoid,sft]"
        raise ConfigError("dpo.loss_type", ",".join(losses) or "[]", "compares no answers", fix)
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(losses):
        problem, fix = f"there are {len(losses)} losses", f"dpo.loss_weights=[{','.join(['1'] * len(losses))}]"
        raise ConfigError("dpo.loss_weights", dpo.loss_weights, problem, fix)
    smoothing = dpo.label_smoothing
    if not 0 <= smoothing < 0.5:
        problem = "must be at least 0 and below 0.5"
        raise ConfigError("dpo.label_smoothing", smoothing, problem, "dpo.label_smoothing=0.1")
    if smoothing and not {"robust", "exo_pair"} & set(losses):
        fix = "dpo.loss_type=robust, or dpo.label_smoothing=0"
        raise ConfigError("dpo.label_smoothing", smoothing, f"the loss {','.join(losses)} has no smoothing", fix)
    if not smoothing and "exo_pair" in losses:
        problem = "the loss exo_pair takes its logarithm"
        raise ConfigError("dpo.label_smoothing", smoothing, problem, "dpo.label_smoothing=1e-3")


SAMPLING = ("ppo", "grpo", "rloo")
"""Stages that train on their own samples."""

REWARDED = (*SAMPLING, "sample")
"""Stages whose samples are scored by rewards."""


def split_function(path: str) -> tuple[str, str]:
    """File and function of `file.py:function`; ("", "") where it is none."""
    file, colon, name = path.rpartition(":")
    return (file, name) if colon and file.endswith(".py") and name.isidentifier() else ("", "")


def _check_reward(cfg: Config) -> None:
    """Refuse rewards that pay for nothing, or more for an answer's form than for the answer."""
    stage = cfg.stage
    reward: Reward = getattr(cfg, stage).reward
    answers = reward.correct + reward.math_verify
    by_model = cfg.ppo.reward_model_weight if stage == "ppo" else 0.0
    paid = [answers, reward.format, reward.random, by_model, *(f.weight for f in reward.functions)]
    if not any(paid):
        also = " or ppo.reward_model_weight" if stage == "ppo" else ""
        raise ConfigError(f"{stage}.reward", "all 0", "nothing is rewarded", f"give {stage}.reward.correct{also}")
    if answers > 0 and reward.format >= answers:
        problem = f"form alone would pay as much as a right answer, which pays {answers:g}"
        raise ConfigError(f"{stage}.reward.format", reward.format, problem, f"{stage}.reward.format={answers / 10:g}")
    names = ["correct", "math_verify", "format", "random"]
    for function in reward.functions:
        _, name = split_function(function.path)
        if not name:
            fix = "write it as in rewards.py:brief"
            raise ConfigError(f"{stage}.reward.functions", function.path, "no file and function", fix)
        if name in names:
            problem = f"there is another reward named {name}, and their figures would be mixed"
            raise ConfigError(f"{stage}.reward.functions", function.path, problem, "give the function another name")
        names.append(name)


def _check_logging(cfg: Config) -> None:
    for target in cfg.logging.report_to:
        if target not in ("tensorboard", "wandb"):
            raise ConfigError("logging.report_to", target, "unknown", nearest(target, ("tensorboard", "wandb")))
    if "wandb" in cfg.logging.report_to:
        if runs_here(cfg) and importlib.util.find_spec("wandb") is None:
            fix = "pip install wandb (the extra [wandb]), or logging=tensorboard"
            raise ConfigError("logging.report_to", "wandb", "the package wandb is not installed", fix)
        if "WANDB_API_KEY" in cfg.slurm.env:
            fix = "leave it out, and export WANDB_API_KEY in the shell that submits"
            raise ConfigError("slurm.env.WANDB_API_KEY", "...", "a secret must not be in a frozen config", fix)


KEPT_OUT = ("-e", "--cleanenv", "-C", "--containall", "--compat", "-p", "--pid")
"""Options of apptainer that keep SLURM's variables from the ranks, or their numbers from the script."""


def check_environment(cfg: Config) -> None:
    """Refuse environments that exclude each other, and containers in which stages cannot run. Raises ConfigError."""
    how, slurm = cfg.container, cfg.slurm
    given = {"slurm.venv": slurm.venv, "slurm.conda": slurm.conda, "container.image": how.image}
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise ConfigError(several[1], given[several[1]], f"{several[0]} says which Python there is", "give one of them")
    if slurm.venv is not None and not slurm.venv.startswith(("/", "~")):
        raise ConfigError("slurm.venv", slurm.venv, "not a whole path", "write it as in /home/me/venv or ~/venv")
    if slurm.conda is not None and slurm.conda.startswith("-"):
        raise ConfigError("slurm.conda", slurm.conda, "no name or folder", "slurm.conda=<name>")
    if how.image is None:
        return
    if not how.image or how.image.startswith("-"):
        raise ConfigError("container.image", how.image, "no image", "container.image=/data/images/train.sif")
    if how.runtime != "pyxis" and "://" in how.image:
        problem = f"every rank would fetch it anew: {how.runtime} runs files and folders here"
        raise ConfigError("container.image", how.image, problem, f"{how.runtime} pull image.sif {how.image}")
    if how.runtime == "pyxis" and cfg.cluster.scheduler == "local":
        problem = "pyxis is a part of SLURM's srun, and this machine runs the stages itself"
        raise ConfigError("container.runtime", "pyxis", problem, "container.runtime=apptainer")
    for word in how.arguments:
        if how.runtime == "pyxis" and not re.match(r"--(no-)?container-", word):
            problem = "only --container-* options of srun are the container's"
            raise ConfigError("container.arguments", word, problem, "as in --container-remap-root")
        if how.runtime != "pyxis" and word in KEPT_OUT:
            problem = "ranks need SLURM's variables and the node's process numbers"
            raise ConfigError("container.arguments", word, problem, "leave it out; --contain and --no-home are fine")
    for mount in how.mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:[a-z+]+)?)?", mount):
            problem = "not a whole path without colon and comma, perhaps with the path inside and a flag"
            raise ConfigError("container.mounts", mount, problem, "write it as in /data, /data:/in or /data:/in:ro")


def check_notify(cfg: Config) -> None:
    """Refuse notices that cannot be sent, and secrets in the config. Raises ConfigError."""
    how = cfg.notify
    for event in how.events:
        if event not in NOTIFIED:
            raise ConfigError("notify.events", event, "nothing that is told", nearest(event, NOTIFIED))
    for address in how.mail.split(",") if how.mail is not None else ():
        if not ADDRESS.fullmatch(address.strip()):
            raise ConfigError("notify.mail", how.mail, "not an address", "notify.mail=name@example.org")
    if how.smtp is not None:
        if how.mail is None:
            raise ConfigError("notify.smtp", how.smtp, "nobody is written to", "notify.mail=<your address>")
        if not re.fullmatch(r"[A-Za-z0-9._-]+(:\d{1,5})?", how.smtp):
            raise ConfigError("notify.smtp", how.smtp, "not host or host:port", "notify.smtp=mail.example.org:25")
    if "POST_TRAINING_WEBHOOK" in cfg.slurm.env:
        fix = "leave it out, and export POST_TRAINING_WEBHOOK in the shell that submits"
        raise ConfigError("slurm.env.POST_TRAINING_WEBHOOK", "...", "a secret must not be in a frozen config", fix)
    user = cfg.slurm.mail_user
    if user is not None and not re.fullmatch(r"[^\s,;<>]+", user):
        raise ConfigError("slurm.mail_user", user, "not one address or user", "slurm.mail_user=name@example.org")
    for kind in cfg.slurm.mail_type:
        if kind.upper() not in MAIL_TYPES:
            raise ConfigError("slurm.mail_type", kind, "unknown to sbatch", nearest(kind.upper(), MAIL_TYPES))


def _check_slurm(cfg: Config) -> None:
    limit = parse_wall_time(cfg.slurm.wall_time)
    lead = cfg.slurm.signal_time_seconds
    if lead >= limit:
        raise ConfigError(
            "slurm.signal_time_seconds",
            lead,
            f"the job would be asked to stop before it starts: slurm.wall_time={cfg.slurm.wall_time} is {limit} s",
            f"slurm.signal_time_seconds={max(1, limit // 10)} or a longer slurm.wall_time",
        )
    minutes = str(cfg.slurm.wall_time).strip()
    if minutes.isdigit() and int(minutes) > 7 * 24 * 60:
        raise ConfigError(
            "slurm.wall_time",
            minutes,
            f"a plain number is minutes, and these are {int(minutes) // 1440} days; YAML reads an unquoted 24:00:00 so",
            'quote it in the file, as in "24:00:00", or write D-HH:MM:SS',
        )
    minutes_between = cfg.checkpointing.save_minutes
    positive = type(minutes_between) in (int, float) and minutes_between > 0
    if not (minutes_between in (None, "auto") or positive):
        raise ConfigError(
            "checkpointing.save_minutes", minutes_between, "neither minutes nor auto nor null",
            "checkpointing.save_minutes=auto",
        )  # fmt: skip
    for name in cfg.slurm.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("slurm.env", name, "no name of an environment variable", "letters, digits and _")
    if cfg.slurm.mem is not None and not re.fullmatch(r"\d+[KMGT]?", cfg.slurm.mem):
        raise ConfigError("slurm.mem", cfg.slurm.mem, "not an amount of memory", "write it as in 500G")
    if cfg.slurm.array_parallelism is not None and cfg.container.image is not None:
        problem = "a container's options name its run, and the elements of an array have one script"
        key = "slurm.array_parallelism"
        raise ConfigError(key, cfg.slurm.array_parallelism, problem, f"{key}=null")
    if cfg.cluster.scheduler == "local" and cfg.slurm.num_nodes != 1:
        raise ConfigError("slurm.num_nodes", cfg.slurm.num_nodes, "cluster=local is one machine", "slurm.num_nodes=1")


def _check_model(cfg: Config) -> None:
    if cfg.model.tokenizer == "train" and (cfg.model.vocab_size or 0) < 265:
        problem = "model.tokenizer=train needs to know how many tokens it may make, 265 or more"
        raise ConfigError("model.vocab_size", cfg.model.vocab_size, problem, "model.vocab_size=32000")
    if not 0 <= cfg.model.dropout < 1:
        raise ConfigError("model.dropout", cfg.model.dropout, "must be at least 0 and below 1", "model.dropout=0.1")
    if cfg.model.tokenizer == "train" and cfg.model.name_or_path is not None:
        problem = "a pretrained model brings its own"
        raise ConfigError("model.tokenizer", "train", problem, "model.tokenizer=bytes (unused), or no name_or_path")
    if cfg.model.hidden_size % cfg.model.num_heads:
        raise ConfigError(
            "model.num_heads", cfg.model.num_heads, f"must divide model.hidden_size={cfg.model.hidden_size}",
            f"model.num_heads={_nearest_divisor(cfg.model.hidden_size, cfg.model.num_heads)}",
        )  # fmt: skip
    heads, kv_heads = cfg.model.num_heads, cfg.model.num_kv_heads
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ConfigError(
            "model.num_kv_heads", kv_heads, f"must divide model.num_heads={heads}",
            f"model.num_kv_heads={_nearest_divisor(heads, kv_heads)}",
        )  # fmt: skip
    if cfg.model.name_or_path is None and cfg.model.architecture != "llama":
        fix = "model.architecture=llama, or model.name_or_path=<a pretrained model>"
        raise ConfigError("model.architecture", cfg.model.architecture, "a model from scratch is a llama", fix)
    if cfg.stage == "base" and cfg.training.max_length > cfg.model.max_position_embeddings:
        raise ConfigError(
            "training.max_length", cfg.training.max_length,
            f"the model has model.max_position_embeddings={cfg.model.max_position_embeddings}",
            f"training.max_length={cfg.model.max_position_embeddings}",
        )  # fmt: skip


def _check_data(cfg: Config) -> None:
    data, quality = cfg.data, cfg.data.quality
    if not 0 < quality.near_threshold < 1:
        fix = "data.quality.near_threshold=0.8, or data.quality.dedup=exact"
        raise ConfigError("data.quality.near_threshold", quality.near_threshold, "must be between 0 and 1", fix)
    if quality.min_chars is not None and quality.max_chars is not None and quality.min_chars > quality.max_chars:
        problem = f"is more than data.quality.max_chars={quality.max_chars}: nothing would be left"
        raise ConfigError("data.quality.min_chars", quality.min_chars, problem, "data.quality.min_chars=null")
    if data.datasets:
        for name in ("path", "subset", "split", "eval_path", "eval_split", "transform"):
            if getattr(data, name) is not None:
                fix = f"give {name} inside data.datasets" if name in ("path", "subset", "split", "transform") else ""
                problem = "data.datasets says which records there are"
                raise ConfigError(f"data.{name}", getattr(data, name), problem, fix or f"data.{name}=null")
        for number, part in enumerate(data.datasets):
            where = f"data.datasets[{number}]"
            if part.name not in KNOWN:
                raise ConfigError(f"{where}.name", part.name, "no such data set", nearest(part.name, KNOWN))
            if not 0 < part.weight < math.inf:
                problem = "must be above 0: 1 takes the whole set once"
                raise ConfigError(f"{where}.weight", part.weight, problem, "a positive number, or leave the set out")
            if part.held_out is not None and part.held_out < 1:
                raise ConfigError(f"{where}.held_out", part.held_out, "must be at least 1", f"{where}.held_out=1")
            _check_records(cfg, where, part.name, part.path, part.transform)
    else:
        _check_records(cfg, "data", data.name, data.path, data.transform)


def _check_records(cfg: Config, where: str, name: str, path: str | None, transform: str | None) -> None:
    """Refuse one data set that is not to be found, not to be read, or that the stage cannot train on."""
    known, view = KNOWN[name], STAGE_VIEWS.get(cfg.stage)
    if known.transform is None and (transform is not None or path is not None):
        key, value = ("transform", transform) if transform is not None else ("path", path)
        problem = f"{name} is generated: there is nothing to read"
        raise ConfigError(f"{where}.{key}", value, problem, f"{where}.name=custom, or {where}.{key}=null")
    if known.transform is not None and known.hub_id is None and path is None:
        fix = f"{where}.path=<file, folder or hub id>"
        raise ConfigError(f"{where}.path", None, f"{name} has no records of its own", fix)
    if transform is not None and transform not in TRANSFORMS and cfg.data.transform_file is None:
        fix = f"data.transform_file=<the file it is in>, or {nearest(transform, TRANSFORMS)}"
        raise ConfigError(f"{where}.transform", transform, "no such transform", fix)
    views = views_of(name, transform)
    if view is not None and views is not None and view not in views:
        key, value = ("transform", transform) if transform is not None else ("name", name)
        fix = f"one that has: {', '.join(having(view))}; for this stage alone, as in {cfg.stage}.data={having(view)[0]}"
        raise ConfigError(f"{where}.{key}", value, f"has no {VIEWS[view]}, which {cfg.stage} trains on", fix)


def _check_length(cfg: Config) -> None:
    given = [name for name in LENGTHS if getattr(cfg.training, name) is not None]
    names = ", ".join(LENGTHS)
    if len(given) != 1:
        shown = " and ".join(f"{n}={getattr(cfg.training, n)}" for n in given) or "none"
        problem = f"exactly one of {names} says how long to train"
        raise ConfigError("training", shown, problem, "keep one, set the others to null")
    value = getattr(cfg.training, given[0])
    if value <= 0:
        raise ConfigError(f"training.{given[0]}", value, "must be positive", f"training.{given[0]}=1")
    if given[0] == "num_training_tokens" and cfg.stage in SAMPLING:
        problem = f"{cfg.stage} samples its own tokens"
        raise ConfigError("training.num_training_tokens", value, problem, "use training.max_steps")


def _check_batch(cfg: Config) -> None:
    batch, per_device = cfg.training.effective_batch_size, cfg.training.per_device_train_batch_size
    world = world_size(cfg)
    if batch % (per_device * world):
        valid = [d for d in range(1, batch + 1) if batch % (d * world) == 0]
        fix = (
            f"training.per_device_train_batch_size={min(valid, key=lambda d: abs(d - per_device))}"
            if valid
            else f"training.effective_batch_size={max(1, round(batch / (per_device * world))) * per_device * world}"
        )
        raise ConfigError(
            "training.effective_batch_size", batch,
            f"must be a multiple of per_device_train_batch_size={per_device} x {world} ranks", fix,
        )  # fmt: skip
    if cfg.stage in ("grpo", "rloo"):
        _check_groups(cfg)
    if cfg.stage == "kto" and per_device < 2:
        problem = "the KL term compares the answers of one batch with each other, so a batch needs two or more"
        fix = "training.per_device_train_batch_size=2"
        raise ConfigError("training.per_device_train_batch_size", per_device, problem, fix)


def _check_groups(cfg: Config) -> None:
    """Refuse batches that cannot hold whole groups of completions of one prompt."""
    stage, batch = cfg.stage, cfg.training.effective_batch_size
    technique: Grpo | Rloo = getattr(cfg, stage)
    generations, wanted = technique.num_generations, technique.steps_per_generation
    at_once = cfg.training.per_device_train_batch_size * world_size(cfg)
    if batch % generations:
        raise ConfigError(
            f"{stage}.num_generations", generations, f"must divide training.effective_batch_size={batch}",
            f"{stage}.num_generations={_nearest_divisor(batch, generations)}",
        )  # fmt: skip
    if wanted is not None and wanted * at_once % generations:
        least = generations // math.gcd(generations, at_once)
        raise ConfigError(
            f"{stage}.steps_per_generation", wanted,
            f"makes {wanted * at_once} completions at once, no multiple of {stage}.num_generations={generations}",
            f"{stage}.steps_per_generation={-(-wanted // least) * least}",
        )  # fmt: skip
    if stage == "grpo" and cfg.grpo.loss_type == "luspo" and cfg.grpo.importance_sampling_level != "sequence":
        problem = "the loss luspo is made for ratios of whole sequences"
        fix = "grpo.importance_sampling_level=sequence"
        raise ConfigError("grpo.importance_sampling_level", cfg.grpo.importance_sampling_level, problem, fix)


def _check_parallel(cfg: Config) -> None:
    if cfg.parallel.strategy != "ddp" and world_size(cfg) == 1:
        problem = "there is one rank, which has nobody to share the model with"
        raise ConfigError("parallel.strategy", cfg.parallel.strategy, problem, "parallel=ddp, or more ranks")
    if cfg.parallel.offload and cfg.parallel.strategy not in ("zero2", "zero3"):
        problem = f"parallel.strategy={cfg.parallel.strategy} keeps all on the GPU"
        raise ConfigError("parallel.offload", "true", problem, "parallel=zero3_offload, or parallel.offload=false")
    if cfg.parallel.strategy == "fsdp2" and cfg.stage not in FSDP2:
        problem = f"{cfg.stage} has not been made to work with it"
        raise ConfigError("parallel.strategy", "fsdp2", problem, "parallel=zero3")
    if cfg.training.torch_compile and cfg.stage not in COMPILED:
        fix = f"give it to the stages that take it, as in {COMPILED[0]}.training.torch_compile=true"
        raise ConfigError("training.torch_compile", "true", f"{cfg.stage} has not been made to work with it", fix)
    if cfg.training.torch_compile and cfg.parallel.strategy != "ddp":
        problem = f"it has not been made to work with parallel.strategy={cfg.parallel.strategy}"
        raise ConfigError("training.torch_compile", "true", problem, "training.torch_compile=false, or parallel=ddp")
    if cfg.training.torch_compile and cfg.lora.r is not None:
        problem = "it has not been made to work with adapters"
        raise ConfigError("training.torch_compile", "true", problem, "training.torch_compile=false, or lora.r=null")


def _check_sample(cfg: Config) -> None:
    how = cfg.sample
    if how.temperature <= 0:
        problem = "every completion of a prompt would be the same"
        raise ConfigError("sample.temperature", how.temperature, problem, "sample.temperature=1")
    if not 0 < how.top_p <= 1:
        raise ConfigError("sample.top_p", how.top_p, "must be above 0 and at most 1", "sample.top_p=0.95")
    if how.keep > how.num_samples:
        problem = f"there are sample.num_samples={how.num_samples} to keep from"
        raise ConfigError("sample.keep", how.keep, problem, f"sample.keep={how.num_samples}")
    reward = how.reward
    most = sum(max(0.0, w) for w in (reward.correct, reward.math_verify, reward.format, reward.random))
    if how.min_reward > most and not reward.functions:
        problem = f"the most that sample.reward can give is {most:g}"
        raise ConfigError("sample.min_reward", how.min_reward, problem, f"sample.min_reward={most:g}")


def _check_lora(cfg: Config) -> None:
    lora = cfg.lora
    if not 0 <= lora.dropout < 1:
        raise ConfigError("lora.dropout", lora.dropout, "must be at least 0 and below 1", "lora.dropout=0.05")
    targets = lora.target_modules
    if targets != "all-linear" and not (isinstance(targets, list) and targets):
        fix = "lora.target_modules=all-linear, or a list as in [q_proj,v_proj]"
        raise ConfigError("lora.target_modules", targets, "neither all-linear nor a list of layers' names", fix)
    if lora.quantize not in (None, "nf4", "fp4"):
        raise ConfigError("lora.quantize", lora.quantize, "must be nf4, fp4 or null", "lora.quantize=nf4")
    if lora.r is None:
        if lora.quantize is not None:
            problem = "weights held in 4 bits cannot be trained; adapters beside them can"
            raise ConfigError("lora.quantize", lora.quantize, problem, "lora.r=16")
        return
    if cfg.stage not in LORA_STAGES:
        fix = f"give it to the stages that take it, as in sft.lora.r={lora.r}"
        raise ConfigError("lora.r", lora.r, f"{cfg.stage} trains all weights", fix)
    if cfg.parallel.strategy.startswith("fsdp"):
        problem = f"adapters are not written whole under parallel.strategy={cfg.parallel.strategy}"
        raise ConfigError("lora.r", lora.r, problem, "parallel=zero2 or zero3, or lora.r=null")
    if lora.quantize is not None and cfg.stage == "ppo":
        problem = "ppo has not been made to work with weights held in 4 bits"
        raise ConfigError("lora.quantize", lora.quantize, problem, "lora.quantize=null")
    if lora.quantize is not None and cfg.parallel.strategy == "zero3":
        problem = "ZeRO-3 cannot share weights held in 4 bits"
        raise ConfigError("lora.quantize", lora.quantize, problem, "parallel=zero2, or lora.quantize=null")
    if lora.quantize is not None and runs_here(cfg) and importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install bitsandbytes (the extra [qlora]), or lora.quantize=null"
        raise ConfigError("lora.quantize", lora.quantize, "the package bitsandbytes is not installed", fix)


def _check_vllm(cfg: Config) -> None:
    """Refuse what vLLM cannot do here. Whether it is installed is known in the job, which may have another Python."""
    how = generation(cfg)
    where = f"{cfg.stage}.generation" if how is not None else "eval"
    backend = how.backend if how is not None else cfg.eval.backend if cfg.stage == "eval" else "transformers"
    if backend == "transformers":
        return
    share = how.gpu_memory_utilization if how is not None else cfg.eval.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        problem = "must be above 0 and at most 1"
        raise ConfigError(f"{where}.gpu_memory_utilization", share, problem, f"{where}.gpu_memory_utilization=0.3")
    if runs_here(cfg) and importlib.util.find_spec("vllm") is None:
        fix = f"pip install vllm (the extra [vllm]), or {where}.backend=transformers"
        raise ConfigError(f"{where}.backend", backend, "the package vllm is not installed", fix)
    if how is None:
        return
    if cfg.model.dropout:
        problem = "the trained model drops out what vLLM keeps, and their log-probabilities are compared"
        raise ConfigError("model.dropout", cfg.model.dropout, problem, f"{cfg.stage}.model.dropout=0")
    longest = getattr(cfg, cfg.stage).max_completion_length
    if how.max_model_length is not None and how.max_model_length <= longest:
        problem = f"leaves no room for a prompt beside {cfg.stage}.max_completion_length={longest}"
        fix = f"{where}.max_model_length={2 * longest}"
        raise ConfigError(f"{where}.max_model_length", how.max_model_length, problem, fix)
    if cfg.lora.r is not None and cfg.lora.quantize is not None:
        problem = "it is given adapters merged into the start model, which is held in 4 bits"
        raise ConfigError(f"{where}.backend", backend, problem, f"{where}.backend=transformers, or lora.quantize=null")
    if backend == "vllm_server":
        gpus = cfg.slurm.gpus_per_node
        if cfg.slurm.num_nodes > 1:
            problem = "the server is for one node: on several, each rank has an engine of its own"
            raise ConfigError(f"{where}.backend", backend, problem, f"{where}.backend=vllm, or slurm.num_nodes=1")
        if gpus and how.server_gpus >= gpus:
            problem = f"none of slurm.gpus_per_node={gpus} would be left to train"
            fix = f"{where}.server_gpus={gpus - 1}" if gpus > 1 else f"{where}.backend=vllm"
            raise ConfigError(f"{where}.server_gpus", how.server_gpus, problem, fix)


def _check_benchmarks(cfg: Config) -> None:
    """Refuse benchmarks where lm-eval is not installed. Which there are is known in the job, and to preflight."""
    how = cfg.eval
    if not how.tasks:
        for name in ("tasks_path", "num_fewshot", "task_limit"):
            if getattr(how, name) is not None:
                fix = f"eval.tasks=[<a benchmark>], or eval.{name}=null"
                raise ConfigError(f"eval.{name}", getattr(how, name), "no benchmark is asked for", fix)
        return
    for name in how.tasks:
        if how.tasks.count(name) > 1:
            raise ConfigError("eval.tasks", name, "is there twice", "name it once")
    if runs_here(cfg) and importlib.util.find_spec("lm_eval") is None:
        fix = "pip install '.[lm-eval]' in the project's folder, or eval.tasks=[]"
        raise ConfigError("eval.tasks", ",".join(how.tasks), "the package lm-eval is not installed", fix)


def _check_judge(cfg: Config) -> None:
    """Refuse a judge that cannot be asked. Whether it answers is known in the job."""
    judge, key = cfg.eval.judge, "OPENAI_API_KEY"
    if judge.base_url is None:
        for name in ("model", "questions", "reference"):
            if getattr(judge, name) is not None:
                fix = f"eval.judge.base_url=<the judge's server>, or eval.judge.{name}=null"
                raise ConfigError(f"eval.judge.{name}", getattr(judge, name), "there is no judge", fix)
        return
    try:
        parts = urllib.parse.urlsplit(judge.base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), None
    if "@" in parts.netloc or parts.query:
        fix = f"leave it out, and export {key} in the shell that submits"
        raise ConfigError("eval.judge.base_url", "...", "a secret must not be in a frozen config", fix)
    if parts.scheme not in ("http", "https") or not host:
        fix = "write it as in http://node7:8000/v1"
        raise ConfigError("eval.judge.base_url", judge.base_url, "is no URL of a server", fix)
    if judge.model is None:
        fix = "eval.judge.model=<the judge's name at that server>"
        raise ConfigError("eval.judge.model", None, "the server has to be told which model judges", fix)
    if key in cfg.slurm.env:
        fix = f"leave it out, and export {key} in the shell that submits"
        raise ConfigError(f"slurm.env.{key}", "...", "a secret must not be in a frozen config", fix)
    if runs_here(cfg) and importlib.util.find_spec("openai") is None:
        fix = "pip install '.[judge]' in the project's folder, or eval.judge.base_url=null"
        raise ConfigError("eval.judge.base_url", judge.base_url, "the package openai is not installed", fix)


def check_job(cfg: Config) -> None:
    """Refuse what no job can ask for, whatever it does: slurm.* alone. Raises ConfigError."""
    _check_slurm(cfg)


def check_serve(cfg: Config) -> None:
    """Refuse a server that cannot be started as asked. Raises ConfigError."""
    serve = cfg.serve
    for name, options in {
        "serve.engine": ("auto", "vllm", "transformers"),
        "serve.dtype": ("auto", "float32", "bfloat16", "float16"),
    }.items():
        value = lookup(cfg, name)
        if value not in options:
            raise ConfigError(name, value, f"must be one of {', '.join(options)}", nearest(str(value), options))
    if serve.gpus < 1:
        raise ConfigError("serve.gpus", serve.gpus, "must be at least 1", "slurm.gpus_per_node=0 for a server on CPUs")
    for name in ("serve.port", "serve.page_port"):
        port = lookup(cfg, name)
        if isinstance(port, int) and not 1024 <= port <= 65535:
            raise ConfigError(name, port, "is no port that a user may take: 1024 to 65535", f"{name}=8000")
    try:
        parse_wall_time(serve.wall_time)
    except ConfigError as error:
        raise ConfigError("serve.wall_time", serve.wall_time, error.problem, error.fix) from None
    own = {
        "--host": "it answers on 127.0.0.1 alone", "--port": "serve.port says it", "--dtype": "serve.dtype says it",
        "--served-model-name": "it has the stage's name", "--tensor-parallel-size": "serve.gpus says it",
    }  # fmt: skip
    for argument in serve.arguments:
        flag = argument.partition("=")[0]
        if "key" in flag or "token" in flag:
            problem = "a secret must not be in a job script, nor among the processes that others see"
            raise ConfigError("serve.arguments", flag, problem, "export VLLM_API_KEY in the shell that submits")
        if flag in own:
            raise ConfigError("serve.arguments", argument, own[flag], "leave it out")
    for name in cfg.slurm.env:
        if name.endswith(("_API_KEY", "_TOKEN")):
            fix = f"leave it out, and export {name} in the shell that submits"
            raise ConfigError(f"slurm.env.{name}", "...", "a secret must not be in a job script", fix)
    if serve.engine == "vllm" and runs_here(cfg) and importlib.util.find_spec("vllm") is None:
        fix = "pip install vllm (the extra [vllm]), or serve.engine=transformers"
        raise ConfigError("serve.engine", "vllm", "the package vllm is not installed", fix)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
