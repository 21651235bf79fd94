"""Standard benchmarks through lm-eval (EleutherAI's lm-evaluation-harness), on a model that is loaded already.

    tasks = load(cfg)                                             before the model: what fails, fails early
    figures, rows = run(model, tokenizer, tasks, cfg, journal, pulse)

Tasks, prompts, filters, metrics and their errors are lm-eval's own, and so are its two model classes. Between them
stands `Remembering`, which keeps every answer in the evaluation's journal: after a stop only what is missing is asked,
in the batches in which it would have been asked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import math
import numbers
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.check import nearest
from conf.schema import Config
from post_training.data.source import DataError
from post_training.evaluation.journal import Journal, key
from post_training.run.results import Figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
SAMPLES = "benchmarks.jsonl"
"""In an evaluation's output: one line a document of a task and filter."""


# ---------------------------------------------------------------------------------------------- the tasks


def load(cfg: Config) -> Any:
    """The tasks of `eval.tasks` with their data, as lm-eval's TaskDict.

    Raises DataError where lm-eval is not installed, and for a task that is unknown, not complete here, or not safe.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            "eval.tasks: the package lm-eval is not installed here\n"
            "  fix: pip install '.[lm-eval]' in the project's folder, or eval.tasks=[]"
        )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks as many processes as the node has cores
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    wanted, own = list(cfg.eval.tasks), cfg.eval.tasks_path
    with _quiet():
        manager = TaskManager(include_path=own, include_defaults=False) if own is not None else None
        known = manager.task_index if manager is not None else {}
        if manager is None or any(name not in known or known[name].kind is Kind.GROUP for name in wanted):
            manager = TaskManager(include_path=own)  # reads some ten thousand files
        index = manager.task_index
        for name in wanted:
            if name not in index:
                raise DataError(f"eval.tasks={name}: lm-eval has no such task\n  fix: {nearest(name, index)}")
            unsafe = next((t for t in _members(name, index) if (index[t].cfg or {}).get("unsafe_code")), None)
            if unsafe is not None:
                raise DataError(
                    f"eval.tasks={name}: {unsafe} runs code that the model wrote, with your rights, on this machine\n"
                    "  fix: leave it out; run it by lm-eval itself, in a container, on the stage's model"
                )
        built = [_loaded(manager, name) for name in wanted]
        try:
            return manager.load([task for part in built for task in (part if isinstance(part, list) else [part])])
        except ValueError as error:  # one task in two of them
            raise DataError(f"eval.tasks={','.join(wanted)}: {error}\n  fix: leave one of the two out") from error


def _members(name: str, index: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """The tasks that a task, group or tag is made of."""
    if name in seen or name not in index:
        return
    entry = index[name]
    parts = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if isinstance(parts, str) or not parts:
        yield name
        return
    for part in parts:
        child = part if isinstance(part, str) else part.get("task") or part.get("group")
        yield from _members(child, index, seen | {name}) if isinstance(child, str) else ()


def _loaded(manager: Any, name: str) -> Any:
    """One task, group or list of tasks, with its data. Raises DataError."""
    try:
        return manager._load_spec(name)
    except ImportError as error:
        raise DataError(
            f"eval.tasks={name}: {str(error).splitlines()[0]}\n"
            "  fix: install what it needs; lm-eval lists its extras at https://pypi.org/project/lm-eval"
        ) from error
    except Exception as error:  # of a hub, a file, or the task's own code
        index = manager.task_index
        sets = {(index[task].cfg or {}).get("dataset_path") for task in _members(name, index)}
        shown = ", ".join(sorted(str(s) for s in sets if s is not None)[:3]) or "of its own"
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"eval.tasks={name}: its data ({shown}) cannot be read here: {type(error).__name__}: {words}\n"
            "  fix: fetch it where the network is, with the jobs' HF_HOME: "
            f"python -c \"from lm_eval.tasks import TaskManager; TaskManager().load(['{name}'])\"; "
            "or give a task on local files with eval.tasks_path"
        ) from error


class _Cut(logging.Filter):
    """Counts lm-eval's complaints of prompts that are longer than the model reads, and passes on errors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "runcat" in str(record.msg)
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _quiet() -> Iterator[_Cut]:
    """Without lm-eval's warnings, one a prompt."""
    cut, loggers = _Cut(), [logging.getLogger(name) for name in _loggers()]
    for logger in loggers:
        logger.addFilter(cut)
    try:
        yield cut
    finally:
        for logger in loggers:
            logger.removeFilter(cut)


def _loggers() -> list[str]:
    """Names of lm-eval's loggers: a filter holds for the logger that is called, not for those below it."""
    modules = (
        "evaluator", "evaluator_utils", "utils", "api.task", "api.model", "api.metrics", "api.registry", "api.group",
        "api.samplers", "tasks", "tasks.manager", "tasks._index", "tasks._factory", "filters.extraction",
        "models.huggingface", "models.utils", "models.utils_hf", "models.vllm_causallms", "config.task",
    )  # fmt: skip
    return [f"lm_eval.{name}" for name in modules]


# ------------------------------------------------------------------------------------------- the questions


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    cfg: Config,
    journal: Journal,
    pulse: Callable[..., None],
    told: Callable[[int, int], None],
) -> tuple[dict[str, Figure], list[Row]]:
    """Ask the tasks of `load`, and what came out: figures `<task>/<metric>`, and a row for each document.

    pulse: called before each forward pass or step of vLLM; what it raises ends the work, and what was answered is kept.
    told: called with how many batches were answered since, and how many are to be asked beside those it knows of.
    Raises DataError for a task that asks for more tokens than the model has positions for.
    """
    from lm_eval.evaluator import evaluate

    from post_training.adapters import randomness_kept

    with randomness_kept(), _quiet() as cut:
        lm = _remembering(model, tokenizer, cfg, journal, pulse, told)
        _prepare(tasks["tasks"], cfg.eval.num_fewshot)
        chat = tokenizer.chat_template is not None
        found = evaluate(
            lm=lm, task_dict=tasks, limit=cfg.eval.task_limit, apply_chat_template=chat, fewshot_as_multiturn=chat,
        )  # fmt: skip
    assert found is not None
    if cut.count:
        print(f"benchmarks: {cut.count} batches held prompts longer than the model reads; their beginnings were cut")
    return figures(found, cfg.eval.tasks), [r for name, s in found["samples"].items() for r in rows(name, s)]


def _prepare(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Seeds and shots, as lm_eval.simple_evaluate sets them by default, which does much else besides."""
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from transformers import set_seed

    set_seed(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # 0: the task is made to be asked so
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def figures(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Figure]:
    """What lm-eval found (its EvalResults), as `<task>/<metric>[,<filter>]`, with value +- 1.96 standard errors.

    Of a group that has a figure of its own (mmlu) that alone, not its tasks'. What is no finite number is left out.
    """
    groups, subtasks = found.get("groups", {}), found.get("group_subtasks", {})
    inside = {below for name in groups for below in _below(name, subtasks)} - set(tasks)
    result: dict[str, Figure] = {}
    for name, values in found["results"].items():
        if name in inside:
            continue
        leaves = [t for t in (_below(name, subtasks) or [name]) if t in found["n-samples"]]
        count = sum(found["n-samples"][t]["effective"] for t in leaves)
        for metric, value in values.items():
            short, comma, how = metric.partition(",")
            if not comma or short.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{short}_stderr,{how}")
            half = 1.96 * float(stderr) if _is_number(stderr) else None
            value = float(value)
            low, high = (None, None) if half is None else (value - half, value + half)
            result[f"{name}/{short}" if how == "none" else f"{name}/{metric}"] = Figure(value, low, high, count)
    return result


def _below(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Everything in a group, its groups' tasks too."""
    return [t for child in subtasks.get(name, ()) for t in (child, *_below(child, subtasks))]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def rows(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each document and filter: what was asked and answered, and each metric's value.

    Of a multiple choice `completion` is the likeliest choice; of a scored text it is the text.
    """
    return [
        {
            "task": task, "document": s["doc_id"], "filter": s["filter"], "prompt": s["arguments"][0][0],
            "answer": s["target"] if isinstance(s["target"], str | int | float) else str(s["target"]),
            "completion": _completion(s),
            "metrics": {name: float(s[name]) for name in s["metrics"] if isinstance(s[name], numbers.Real)},
        }
        for s in samples
    ]  # fmt: skip


def _completion(sample: Mapping[str, Any]) -> str:
    first = sample["resps"][0][0]
    if isinstance(first, str):  # generated
        return first
    if isinstance(first, tuple | list):  # (log-likelihood, whether greedy) of each choice
        best = max(range(len(sample["resps"])), key=lambda i: sample["resps"][i][0][0])
        return str(sample["arguments"][best][1])
    return str(sample["arguments"][0][0])


# ------------------------------------------------------------------------------------------- who answers


def batch_size(most: int, longest: int, bytes_per_token: int, memory: int) -> int:
    """Prompts of one forward pass: at most `most`, and no more than fit into memory (bytes), `longest` tokens each."""
    return max(1, min(most, memory // max(1, longest * bytes_per_token)))


def planned(requests: Sequence[tuple[str, Sequence[Any]]], size: int) -> list[list[int]]:
    """Indices of (key, arguments) in chunks that are asked at once, long prompts first.

    It depends on the requests alone, so a later attempt asks in the same chunks.
    """

    def place(i: int) -> tuple[Any, ...]:
        same, arguments = requests[i]
        return (-len(arguments[0]), *map(str, arguments), same)

    order = sorted(range(len(requests)), key=place)
    return [order[i : i + size] for i in range(0, len(order), size)]


def _remembering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
    journal: Journal,
    pulse: Callable[..., None],
    told: Callable[[int, int], None],
) -> Any:
    """lm-eval's LM whose answers are the journal's, or asked of the model and kept there."""
    import lm_eval
    from lm_eval.api.model import LM
    from transformers import set_seed

    how = cfg.eval
    plain = _transformers(model, tokenizer, cfg)
    by_vllm: list[Any] = []

    def asked() -> Any:
        if how.backend != "vllm":
            return plain
        if not by_vllm:
            by_vllm.append(_vllm(model, tokenizer, cfg, pulse))
        return by_vllm[0]

    class Remembering(LM):
        """Prompts are made by one class, whoever answers, so that both backends are asked the same."""

        tokenizer_name = plain.tokenizer_name
        apply_chat_template = staticmethod(plain.apply_chat_template)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(float(a), bool(b)) for a, b in self._answers("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self._answers("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._answers("generate_until", requests)

        def _answers(self, kind: str, requests: list[Any]) -> list[Any]:
            times: Counter[str] = Counter()
            keys = []
            for request in requests:
                same = key(kind, lm_eval.__version__, request.args)
                keys.append(f"{same}-{times[same]}" if times[same] else same)
                times[same] += 1
            if kind == "generate_until":
                _require_room(requests, plain)
            chunks = planned([(k, r.args) for k, r in zip(keys, requests, strict=True)], how.batch_size)
            missing = [chunk for chunk in chunks if any(keys[i] not in journal for i in chunk)]
            told(len(chunks) - len(missing), len(chunks))
            for chunk in missing:
                pulse()
                set_seed(int(keys[chunk[0]][:8], 16))  # for tasks that sample
                lm = asked()
                lm.fit(kind, [requests[i] for i in chunk])
                answers = getattr(lm, kind)([requests[i] for i in chunk])
                journal.add({keys[i]: answer for i, answer in zip(chunk, answers, strict=True)})
                told(1, 0)
            return [journal[k] for k in keys]

    return Remembering()


def _require_room(requests: Sequence[Any], lm: Any) -> None:
    """Refuse answers that leave no room for a prompt. Raises DataError."""
    for request in requests:
        longest = int(request.args[1].get("max_gen_toks", lm.max_gen_toks))
        if longest >= lm.max_length:
            fix = "another task" if "max_gen_toks" in request.args[1] else f"eval.max_new_tokens={lm.max_length // 4}"
            raise DataError(
                f"eval.tasks={request.task_name}: its answers have up to {longest} tokens, and prompt and answer "
                f"together at most {lm.max_length} in this model\n  fix: {fix}"
            )


def _transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> Any:
    """lm-eval's HFLM around the model."""
    import torch
    from lm_eval.models.huggingface import HFLM

    most, shape = cfg.eval.batch_size, model.config
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = {
        "generate_until": 2 * shape.num_hidden_layers * heads * width * model.dtype.itemsize,  # keys and values
        "loglikelihood": 3 * 4 * shape.vocab_size,  # logits, as float32, and their softmax
    }

    class Transformers(HFLM):
        @property
        def max_gen_toks(self) -> int:
            """Of tasks that do not say it themselves; lm-eval's own is 256 too."""
            return cfg.eval.max_new_tokens

        def fit(self, kind: str, requests: Sequence[Any]) -> None:
            """Choose the batch size for requests whose first has the longest prompt."""
            longest = len(self.tokenizer(str(requests[0].args[0]))["input_ids"])
            if kind == "generate_until":
                longest += max(int(r.args[1].get("max_gen_toks", self.max_gen_toks)) for r in requests)
            on_gpu = self.device.type == "cuda"
            memory = torch.cuda.mem_get_info(self.device)[0] // 2 if on_gpu else CPU_MEMORY
            each = per_token["generate_until" if kind == "generate_until" else "loglikelihood"]
            self.batch_size_per_gpu = batch_size(most, min(longest, self.max_length), each, memory)

    return Transformers(pretrained=model, tokenizer=tokenizer, batch_size=most)


CPU_MEMORY = 2 * 1024**3
"""Bytes for what a batch needs on a CPU."""


def _vllm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: Config, pulse: Callable[..., None]
) -> Any:
    """lm-eval's VLLM around our engine, which is given the model's weights. Raises DataError."""
    import torch

    from post_training.vllm_engine import Engine, vllm_usable, write_config

    with vllm_usable():
        import vllm  # noqa: F401

    class Lending(Engine):
        """An engine that lm-eval starts."""

        def start(self, **settings: Any) -> Any:
            from lm_eval.models.vllm_causallms import VLLM

            class Vllm(VLLM):
                def fit(self, kind: str, requests: Sequence[Any]) -> None:
                    """It batches by itself."""

                def modify_gen_kwargs(self, *given: Any, **named: Any) -> Any:  # type: ignore[override]
                    """As transformers decodes: without special tokens. Those that end an answer are given as ids."""
                    kwargs, until, most = VLLM.modify_gen_kwargs(*given, **named)
                    ends = [i for i in tokenizer.convert_tokens_to_ids(until) if i in tokenizer.all_special_ids]
                    return kwargs | {"skip_special_tokens": True, "stop_token_ids": ends}, until, most

            del settings["skip_tokenizer_init"]
            self.lm = Vllm(
                pretrained=settings.pop("model"), batch_size=cfg.eval.batch_size, max_gen_toks=cfg.eval.max_new_tokens,
                max_model_len=-1, **settings,
            )  # fmt: skip
            self.lm._max_length = None  # as many as vLLM found to fit
            return self.lm.model

    gc.collect()  # an engine that answered before this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        write_config(model, Path(folder))
        tokenizer.save_pretrained(folder)
        engine = Lending(
            folder,
            {
                "dtype": str(model.dtype).removeprefix("torch."),
                "gpu_memory_utilization": cfg.eval.gpu_memory_utilization,
                "max_num_seqs": cfg.eval.batch_size,
            },
        )
    engine.load((name, value.detach()) for name, value in model.named_parameters())
    engine.before_each_step(pulse)
    return engine.lm
