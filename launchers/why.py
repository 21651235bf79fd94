"""Why an attempt ended as it did, and what to do about it. Pure: a frozen snapshot in, an explanation out.

The snapshot holds what the ledger, the error file, the stacks of a hang and the output of the attempt say
(launchers.logs reads them). `PATTERNS` is the table of what is recognised in that output.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from post_training.run import life


@dataclass(frozen=True)
class Line:
    """One line of an attempt's output. rank: who wrote it; None: the job script, or SLURM."""

    text: str
    rank: int | None = None
    stream: str = "err"


@dataclass(frozen=True)
class Snapshot:
    """What is known of an attempt's end, and of the run around it."""

    name: str  # pipeline/stage
    state: str = "unknown"  # launchers.states: of the run, now
    reason: str | None = None  # why it is in that state
    attempt: int | None = None  # the attempt that is explained; None: none has ended
    attempts: int = 0
    running: bool = False  # this very attempt still runs
    job_id: str | None = None
    nodes: tuple[str, ...] = ()
    lost_nodes: tuple[str, ...] = ()
    outcome: str | None = None  # post_training.run.life
    ended_for: str | None = None  # the reason in the ledger
    action: str | None = None
    code: int | None = None
    gave_up: bool = False
    stop_signal: str | None = None
    asked: str | None = None  # what a user asked for while it ran, and who: "hold, by ann"
    step: int | None = None  # last step that it did
    checkpoint_step: int = 0  # newest complete checkpoint of the run when the attempt ended
    error: str | None = None  # slurm/error-N: what the first rank that failed says
    lines: tuple[Line, ...] = ()  # the end of its output, both streams
    stacks: Mapping[int, str] = field(default_factory=dict)  # by rank, of a hang
    ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)  # frozen config, "section.key" to value
    local: bool = False


@dataclass(frozen=True)
class Explanation:
    """One end in plain words."""

    kind: str  # the class of the end: one of KINDS
    cause: str | None  # the pattern that was recognised
    words: str  # the paragraph
    rank: int | None  # the first rank that failed
    exception: str | None  # the line that ended it
    frame: str | None  # file:line, function and text of the line in the user's code
    lines: tuple[str, ...]  # the last lines that matter
    do: tuple[str, ...]  # what to do, the best first


KINDS = {
    "done": "done",
    "planned_stop": "planned stop",
    "stopped": "stopped on request",
    "preempted": "preempted",
    "node_lost": "node lost",
    "out_of_memory": "out of memory",
    "crashed": "crashed",
    "hung": "hung",
    "cancelled": "cancelled",
    "gated": "held by a gate",
    "waiting": "not started",
    "vanished": "vanished",
    "running": "running",
}
"""The classes of an end in plain words."""


# ------------------------------------------------------------------------------- what is recognised


@dataclass(frozen=True)
class Pattern:
    """Something that outputs say when they go wrong. In `do`, {names} are filled in from the snapshot."""

    name: str
    regex: re.Pattern[str]
    says: str
    do: tuple[str, ...]
    consequence: bool = False  # what ranks say after another one has failed: believed only where nothing else is found


def _pattern(name: str, regex: str, says: str, *do: str, consequence: bool = False) -> Pattern:
    return Pattern(name, re.compile(regex), says, do, consequence)


PATTERNS = (
    _pattern(
        "cuda_memory",
        r"CUDA out of memory|CUDA error: out of memory|torch\.(cuda\.)?OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"
        r"|No available memory for the cache blocks|Free memory on device .* is less than desired GPU memory",
        "the memory of a GPU ran out",
        "{smaller_batch}",
        "{gradient_checkpointing}",
        "{sharding}",
        "slurm.env.PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True where much is 'reserved but unallocated'",
        "the command that submitted it with dry_run=true shows the estimate of its memory, term by term",
    ),
    _pattern(
        "gpu_hardware",
        r"uncorrectable ECC error|NVRM: Xid|Xid \(PCI|GPU has fallen off the bus|GPU is lost|CUDA error: unknown error"
        r"|CUDA error: hardware stack error|No CUDA GPUs are available|CUDA-capable device\(s\) is/are busy"
        r"|system not yet initialized|Unable to determine the device handle|CUDA error: unspecified launch failure",
        "a GPU of {node} does not work: this is the hardware or its driver, not your code",
        "keep away from it: slurm.exclude={node}, then the command that submitted it again; tell the administrators",
        "slurm.health_check='nvidia-smi -q -d ECC' (or the site's own check) leaves such nodes before training starts",
    ),
    _pattern(
        "device_assert",
        r"device-side assert triggered|CUDA error: an illegal memory access|srcIndex < srcSelectDimSize",
        "a kernel read outside its tensors: most often token ids that the model's embedding does not have",
        "check that tokenizer and model belong together: the vocabulary of inputs.model and model.chat_template",
        "slurm.env.CUDA_LAUNCH_BLOCKING=1 for one attempt shows the line that did it",
    ),
    _pattern(
        "driver",
        r"NVIDIA driver on your system is too old|no kernel image is available|CUDA driver version is insufficient",
        "the node's driver or GPU does not go with this build of torch",
        "a torch build for the cluster's driver in cluster.python, or slurm.constraint for other nodes",
    ),
    _pattern(
        "shared_memory",
        r"insufficient shared memory|out of shared memory|torch_shm_manager|/dev/shm.*No space left",
        "the shared memory of the node (/dev/shm) ran out: DataLoader workers hand their batches over in it",
        "training.dataloader_num_workers=0, or fewer; or ask for a larger /dev/shm",
    ),
    _pattern(
        "host_memory",
        life.SLURM_OOM.pattern + r"|\bMemoryError\b|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory"
        r"|Killed process \d+",
        "the main memory of the node ran out",
        "{more_memory}",
        "training.dataloader_num_workers=0, or fewer: each holds a copy of what it reads",
    ),
    _pattern(
        "disk_full",
        r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]",
        "the disk is full, or your quota is used up",
        "make room (old checkpoints: checkpointing.save_total_limit=1 keeps the newest alone), then {again}",
    ),
    _pattern(
        "file_system",
        r"Stale file handle|Transport endpoint is not connected|Input/output error|Read-only file system",
        "the file system went away for a while",
        "{again}; where it comes back, tell the administrators: {node} and the path in the lines above",
    ),
    _pattern(
        "missing_module",
        r"ModuleNotFoundError|No module named|ImportError: |cannot open shared object file"
        r"|GLIBC(XX)?_[\d.]+' not found",
        "the Python environment of the job lacks something",
        "install it where cluster.python points, or load what it needs with slurm.modules and slurm.setup; "
        "the job's own python is {python}",
    ),
    _pattern(
        "command_not_found",
        r"command not found|Lmod has detected|Unable to locate a modulefile|execve\(\): .*: No such file|"
        r"bad interpreter: No such file",
        "the job script could not find a command",
        "check slurm.modules, slurm.setup and cluster.python on a compute node, which may see other paths",
    ),
    _pattern(
        "hub",
        r"couldn't connect to 'https://huggingface\.co'|Max retries exceeded with url|LocalEntryNotFoundError"
        r"|OfflineModeIsEnabled|RepositoryNotFoundError|GatedRepoError|401 Client Error|403 Client Error"
        r"|cannot find the requested files in the (disk|local) cache",
        "a model or a data set could not be had from the hub",
        "on the login node: python -m launchers.prefetch, with the same settings: compute nodes often have no internet",
        "where it is private or gated: HF_TOKEN in your environment, and its licence accepted",
    ),
    _pattern(
        "state_dict",
        r"Error\(s\) in loading state_dict|size mismatch for ",
        "the weights do not fit the model",
        "inputs.model and the model's settings must be of one architecture; restart=true where checkpoints are not",
    ),
    _pattern(
        "open_files",
        r"Too many open files",
        "the limit of open files is reached",
        "slurm.setup=['ulimit -n 65536'], or fewer training.dataloader_num_workers",
    ),
    _pattern(
        "permission",
        r"PermissionError|Permission denied",
        "a file may not be read or written",
        "the path stands in the lines above: give your account the right to it, or choose another",
    ),
    _pattern(
        "port",
        r"EADDRINUSE|Address already in use",
        "the port of the rendezvous was taken",
        "{again}: the next attempt takes another port",
    ),
    _pattern(
        "srun",
        r"srun: error: (Unable to create step|Unable to confirm allocation|Task launch for|.*launch failed)"
        r"|Communication connection failure|Zero Bytes were transmitted|task launch failed",
        "SLURM could not start the processes on {node}",
        "{again}; where it comes back on one node: slurm.exclude={node}",
    ),
    _pattern(
        "time_limit",
        r"DUE TO TIME LIMIT",
        "the wall time came before the attempt had left",
        "ask earlier: slurm.signal_time_seconds={later}",
    ),
    _pattern(
        "killed",
        r"line \d+: +\d+ Killed\b",
        "its processes were killed by SIGKILL, and nothing says by whom: somebody's kill -9, or the kernel for memory",
        "see whether memory ran out (MaxRSS of sacct, `dmesg` on {node}); if so, {more_memory}",
    ),
    _pattern(
        "segfault",
        r"Segmentation fault|core dumped|Fatal Python error",
        "a process died in compiled code",
        "slurm.env.PYTHONFAULTHANDLER=1 shows where; often packages that do not go together, or a bad node ({node})",
    ),
    _pattern(
        "collective_timeout",
        r"Watchdog caught collective operation timeout|collective operation timeout|NCCL watchdog thread terminated"
        r"|Timed out waiting \d+ms for (recv|send) operation",
        "a collective (NCCL, gloo) timed out: one rank did not come, and the others waited for it",
        "look at the rank that is not among those who complain: python -m launchers.logs {name} --rank R",
        "where it comes back on the same node: slurm.exclude; slurm.env.NCCL_DEBUG=INFO says which link is slow",
        consequence=True,
    ),
    _pattern(
        "collective",
        r"DistBackendError|nccl(System|Remote|Internal|UnhandledCuda)Error|NCCL WARN|NCCL error"
        r"|Connection (reset|closed) by peer|Broken pipe|DistNetworkError|DistStoreError|recvValue failed"
        r"|The client socket has timed out|failed to connect to",
        "the connection between the ranks broke: most often since one of them had died",
        "look for the first rank that died, above these lines: python -m launchers.logs {name} --lines 400",
        "where no rank did: slurm.health_check, slurm.env.NCCL_DEBUG=INFO, and the network of {node}",
        consequence=True,
    ),
)  # fmt: skip
"""What outputs say, as PyTorch 2, NCCL, vLLM, Linux and SLURM 20 to 25 word it; the first that matches counts."""

NOISE = re.compile(
    r"^\s*$|^frame #\d+:|^Exception raised from "
    r"|^(srun|slurmstepd): (Job step|Terminating|launch/slurm|error: \*\*\* STEP|Force)"
    r"|ProcessGroupNCCL\.cpp|ProcessGroupGloo\.cpp|destroy_process_group|leaked semaphore|^W?\[?W\d{4}"
    r"|(Future|User|Deprecation)Warning|^\s*warnings\.warn|NCCL INFO|it/s\]|examples/s\]|s/it\]"
    r"|^To suppress this warning|^Setting OMP_NUM_THREADS|^Compile with `TORCH_USE_CUDA_DSA`|^CUDA kernel errors might"
    r"|^For debugging consider"
)
"""Lines that say nothing of why."""
SLURM_SAYS = re.compile(r"^(slurmstepd|srun|slurmd)(-\S+)?: ")


def recognise(texts: Iterable[str]) -> Pattern | None:
    """The pattern that these texts show, the table's first; consequences only where there is nothing else."""
    found = list(texts)
    for consequence in (False, True):
        for pattern in PATTERNS:
            if pattern.consequence == consequence and any(pattern.regex.search(text) for text in found):
                return pattern
    return None


# ------------------------------------------------------------------------------------- tracebacks


@dataclass(frozen=True)
class Trace:
    """One traceback of a rank, as it was printed."""

    rank: int | None
    lines: tuple[str, ...]  # from `Traceback` to the exception's last line
    exception: str  # the line that names it
    frame: str | None  # the innermost frame in code that is not a package's

    @property
    def consequence(self) -> bool:
        """Whether it only says that another rank is gone."""
        if self.exception.startswith(("KeyboardInterrupt", "SystemExit")):
            return True
        found = recognise([self.exception])
        return found is not None and found.consequence


_BEGIN = re.compile(r"^(\s*[|+\s-]*)(?:Exception Group )?Traceback \(most recent call last\):\s*$")
_FRAME = re.compile(r'^\s*[|\s]*File "(?P<file>[^"]*)", line (?P<line>\d+)(?:, in (?P<function>.*))?$')
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:: .*|:)?$")
_GROUP = re.compile(r"^\s*\| ((?:\w+\.)*\w*ExceptionGroup: .*)")
_GROUP_END = re.compile(r"^ *\+-{30,}$")
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_PACKAGES = re.compile(r"(^<)|/(site|dist)-packages/|/lib/python3[^/]*/|/lib64/python3[^/]*/")
_LONGEST = 60


def tracebacks(lines: Iterable[Line]) -> list[Trace]:
    """All tracebacks, in the order in which they ended; those of one rank that are chained are one."""
    found: list[Trace] = []
    open_ones: dict[int | None, list[str]] = {}
    body: dict[int | None, bool] = {}  # whether frames were seen since `Traceback`
    chained: dict[int | None, list[str]] = {}

    def close(rank: int | None) -> None:
        block = open_ones.pop(rank, None)
        if block is None:
            return
        while block and not block[-1].strip():
            block.pop()
        trace = _trace(rank, block)
        if trace is not None:
            found.append(trace)

    for line in lines:
        rank, text = line.rank, line.text.rstrip()
        block = open_ones.get(rank)
        if _BEGIN.match(text):
            before = chained.pop(rank, None)
            if block is not None and before is None and not (block and body.get(rank) is False):
                close(rank)
                block = None
            open_ones[rank] = [*(block or before or []), text]
            body[rank] = True
            continue
        if block is None:
            if text.startswith(_CHAINED) and found and found[-1].rank == rank:
                last = found.pop()
                chained[rank] = [*last.lines, "", text, ""]
            elif text.strip():
                chained.pop(rank, None)
            continue
        block.append(text)
        if _GROUP_END.match(text):
            close(rank)
        elif body[rank] and text and not text[0].isspace() and not text.startswith(("|", "+")):
            if _EXCEPTION.match(text) or ":" in text:
                close(rank)  # the line that names the exception
            else:
                open_ones.pop(rank)  # no traceback after all
    for rank in list(open_ones):
        close(rank)
    return found


def _trace(rank: int | None, block: list[str]) -> Trace | None:
    exception = next((text for text in reversed(block) if text.strip() and not text[0].isspace()), "")
    if not exception or _BEGIN.match(exception):
        group = next((match[1] for text in block if (match := _GROUP.match(text))), None)
        exception = group or next((said for text in reversed(block) if (said := text.strip(" |+-"))), "Traceback")
    frame = None
    for index, text in enumerate(block):
        match = _FRAME.match(text)
        if match and not _PACKAGES.search(match["file"]):
            code = block[index + 1].strip() if index + 1 < len(block) and not _FRAME.match(block[index + 1]) else ""
            where = f"{match['file']}:{match['line']}" + (f", in {match['function']}" if match["function"] else "")
            frame = f"{where}: {code}" if code else where
    if len(block) > _LONGEST:
        block = [*block[:6], f"  ... {len(block) - _LONGEST} lines ...", *block[-(_LONGEST - 6) :]]
    return Trace(rank, tuple(block), exception.strip(), frame)


def first_failure(lines: Iterable[Line], error: str | None = None) -> Trace | None:
    """The traceback that ended an attempt: the one that the first failing rank wrote down, or else the first that
    does not merely say that another rank is gone."""
    traces = tracebacks(lines)
    if error:
        kind, _, text = error.partition(":")
        for trace in traces:
            named = trace.exception.partition(":")[0].rpartition(".")[2]
            if named == kind.rpartition(".")[2] and text.strip()[:60] in "\n".join(trace.lines):
                return trace
    return next((trace for trace in traces if not trace.consequence), traces[0] if traces else None)


# ------------------------------------------------------------------------------------------ hangs

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):", re.MULTILINE)


def standing(stacks: str) -> tuple[str, ...]:
    """Where the main thread stood, innermost frame first, from what faulthandler wrote (it lists it last)."""
    parts = _THREAD.split(stacks)
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', parts[-1]) if len(parts) > 1 else []
    return tuple(f"{function} ({file.rsplit('/', 1)[-1]}:{line})" for file, line, function in frames)


def odd_ones(stacks: Mapping[int, str], ranks: int) -> tuple[list[int], str]:
    """The ranks that stood elsewhere than most, and a sentence on them. Those that wrote nothing are the oddest."""
    stood = {rank: standing(text) for rank, text in stacks.items()}
    silent = [rank for rank in range(ranks) if rank not in stood]
    if silent and stood:
        most = Counter(where[0] for where in stood.values() if where).most_common(1)
        rest = f"; the others stood in {most[0][0]}" if most else ""
        return silent, f"{_ranks(silent)} left no stack: stuck where Python cannot look, stopped or gone{rest}"
    counts = Counter(where[:1] for where in stood.values())
    if not stood:
        return [], ""
    common, times = counts.most_common(1)[0]
    if len(counts) > 1 and times > len(stood) / 2:
        odd = sorted(rank for rank, where in stood.items() if where[:1] != common)
        where = stood[odd[0]][0] if stood[odd[0]] else "nowhere"
        return odd, f"{_ranks(odd)} stood in {where}, the other {times} in {common[0] if common else 'nowhere'}"
    if len(counts) > 1:
        first = sorted(stood.items())[:4]
        shown = "; ".join(f"rank {rank} in {where[0] if where else 'nowhere'}" for rank, where in first)
        return [], f"they stood apart: {shown}"
    who = "it stood" if ranks == 1 else "all ranks stood"
    return [], f"{who} in {common[0]}" if common else ""


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


# ------------------------------------------------------------------------------------- exit codes

_OWN = {
    0: "ended as if all were well",
    life.UNUSABLE: "its config or data cannot be used: trying again does not help",
    life.STOPPED: "saved and left on request",
    life.HUNG: "its watchdog ended it",
    life.OUT_OF_MEMORY: "ran out of memory",
    life.DEADLINE: "did not answer the stop request in time",
    life.GATED: "done, and its gate does not hold",
    126: "the command may not be executed",
    127: "the command was not found",
}
_SIGNALS = {
    "SIGKILL": "killed from outside",
    "SIGTERM": "asked to leave from outside",
    "SIGABRT": "it gave itself up: an assertion in compiled code, or NCCL's watchdog",
    "SIGSEGV": "a fault in compiled code",
    "SIGBUS": "a mapped file or shared memory went away: /dev/shm or a disk is full",
    "SIGINT": "interrupted",
    "SIGFPE": "a division by zero in compiled code",
    "SIGILL": "an instruction that this processor does not have: a build for another one",
}


def exit_words(code: int | None) -> str:
    """An exit status in words: `137: SIGKILL, killed from outside, ...`."""
    if code is None:
        return ""
    if code in _OWN:
        return f"{code}: {_OWN[code]}"
    number = code - 128 if code > 128 else -code if code < 0 else 0
    try:
        name = signal.Signals(number).name if number else ""
    except ValueError:
        name = ""
    return f"{code}: {name}" + (f", {_SIGNALS[name]}" if name in _SIGNALS else "") if name else str(code)


# ------------------------------------------------------------------------------------ explaining


class _Words(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return f"{{{key}}}"


def node_of(seen: Snapshot, rank: int | None) -> str | None:
    """The node of a rank: the job script starts as many on each, node after node."""
    count = len(seen.nodes)
    if count == 1:
        return seen.nodes[0]
    if rank is None or not count or seen.ranks % count or not 0 <= rank < seen.ranks:
        return None
    return seen.nodes[rank * count // seen.ranks]


def fillings(seen: Snapshot, rank: int | None = None) -> dict[str, str]:
    """What stands for the {names} in a pattern's advice; an empty text makes the advice go away.

    rank: the one that failed first.
    """
    batch, strategy = seen.settings.get("training.per_device_train_batch_size"), seen.settings.get("parallel.strategy")
    mem, lead = seen.settings.get("slurm.mem"), seen.settings.get("slurm.signal_time_seconds")
    node = ",".join(dict.fromkeys(seen.lost_nodes)) or node_of(seen, rank) or "its node"
    smaller = f"{max(1, batch // 2)} (it was {batch})" if isinstance(batch, int) and batch > 1 else ""
    stage = seen.name.rpartition("/")[2]
    return {
        "node": node,
        "name": seen.name,
        "again": f"give the command that submitted it again: it goes on from step {seen.checkpoint_step}"
        if seen.gave_up else "it goes on by itself",
        "smaller_batch": f"{stage}.training.per_device_train_batch_size={smaller}; the effective batch stays"
        if smaller else "",
        "gradient_checkpointing": "" if seen.settings.get("training.gradient_checkpointing") is True
        else f"{stage}.training.gradient_checkpointing=true: a third slower, much less memory",
        "sharding": "" if strategy in ("zero3", "fsdp2") or seen.ranks < 2
        else f"parallel=zero3 (it is {strategy or 'ddp'}), or slurm.num_nodes={2 * _nodes(seen)} with it",
        "more_memory": "slurm.mem=" + (_doubled(mem) or "more") + (f" (it was {mem})" if mem else " (it was not set)")
        if not seen.local else "a machine with more free memory, or fewer runs beside it",
        "python": str(seen.settings.get("cluster.python") or "the one that submitted it"),
        "later": str(2 * lead) if isinstance(lead, int) else "more",
    }  # fmt: skip


def _nodes(seen: Snapshot) -> int:
    nodes = seen.settings.get("slurm.num_nodes")
    return nodes if isinstance(nodes, int) else max(1, len(seen.nodes))


def _doubled(mem: Any) -> str:
    match = re.fullmatch(r"(\d{1,9})([KMGT]?)B?", str(mem or ""), re.IGNORECASE)
    return f"{2 * int(match[1])}{match[2]}" if match else ""


_FIX = re.compile(r"^\s+fix: (.*)")
_UPSTREAM = re.compile(r"^(?:upstream (?P<up>\S+) (?:failed|was cancelled)|gate of (?P<gate>[^:\s]+):)")


def explain(seen: Snapshot) -> Explanation:
    """One end, or the lack of one, in plain words."""
    kind = kind_of(seen)
    if kind in ("waiting", "gated", "done", "running") or seen.attempt is None:
        return _no_failure(seen, kind)
    trace = first_failure(seen.lines, seen.error) if kind in FAILURES else None
    error = seen.error or (trace.exception if trace else None)
    where = [f"attempt {seen.attempt} of {seen.name}", f"job {seen.job_id}" if seen.job_id else ""]
    on = f" on {_some(seen.nodes)}" if seen.nodes else ""
    head = f"{', '.join(word for word in where if word)}{on}: {KINDS[kind]}"
    pattern = _cause(seen, kind, trace)
    rank = trace.rank if trace else None
    if rank is None and pattern is not None:
        rank = next(
            (line.rank for line in seen.lines if line.rank is not None and pattern.regex.search(line.text)), None
        )
    fill = _Words(fillings(seen, rank))
    words = [head + (f": {said}." if (said := _what(seen, kind, pattern, error, fill)) else ".")]
    if kind in FAILURES:
        if seen.ranks > 1 and rank is not None:
            there = f" on {node_of(seen, rank)}" if len(seen.nodes) > 1 and node_of(seen, rank) else ""
            words.append(f"Rank {rank}{there} was the first to fail.")
        if kind == "hung" and (stood := odd_ones(seen.stacks, seen.ranks)[1]):
            words.append(f"{stood[:1].upper()}{stood[1:]}.")
    if seen.code is not None and not (kind == "planned_stop" and seen.code == life.STOPPED):
        words.append(f"Exit status {exit_words(seen.code)}.")
    words.append(_progress(seen))
    words.append(_follows(seen, kind))
    return Explanation(
        kind=kind,
        cause=pattern.name if pattern else None,
        words=" ".join(word for word in words if word),
        rank=rank,
        exception=trace.exception if trace else (seen.error or None),
        frame=trace.frame if trace else None,
        lines=_lines_that_matter(seen, trace) if kind in FAILURES or kind == "vanished" else (),
        do=_do(seen, kind, pattern, fill),
    )


FAILURES = ("crashed", "out_of_memory", "hung", "vanished")


def kind_of(seen: Snapshot) -> str:
    """The class of the end: a key of KINDS."""
    if seen.state in ("done", "gated") and seen.outcome in ("finished", None):
        return seen.state
    if seen.outcome is not None:
        if seen.outcome == "finished":
            return "done"
        if seen.outcome == "stopped":
            return "planned_stop" if seen.stop_signal == "USR1" else "stopped"
        return {"failed": "crashed"}.get(seen.outcome, seen.outcome if seen.outcome in KINDS else "crashed")
    if seen.attempt is not None and seen.running:
        return "vanished" if seen.state in ("failed", "cancelled") else "running"
    if seen.state == "cancelled":
        return "cancelled"
    return "vanished" if seen.state == "failed" else "running" if seen.state in ("running", "stopping") else "waiting"


def _cause(seen: Snapshot, kind: str, trace: Trace | None) -> Pattern | None:
    if kind not in FAILURES:
        return None
    # what named the failure first, then what was said around it; our own words have their own fix
    for texts in ([seen.error or "", seen.ended_for or ""], [trace.exception] if trace else [],
                  [line.text for line in seen.lines if line.stream == "err"]):  # fmt: skip
        found = recognise(texts)
        if found is not None and not found.consequence:
            return found
    if kind == "out_of_memory":
        return next(pattern for pattern in PATTERNS if pattern.name == "host_memory")
    if seen.code == life.UNUSABLE or kind == "hung":
        return None
    if trace is not None and not trace.consequence:
        return None  # an error of its own: what the others said of it does not matter
    texts = [seen.error or "", seen.ended_for or "", *(line.text for line in seen.lines)]
    if (found := recognise(texts)) is not None:
        return found
    by_code = {137: "killed", 139: "segfault", 135: "shared_memory", 127: "command_not_found"}
    return next((p for p in PATTERNS if p.name == by_code.get(seen.code or 0) and not seen.stop_signal), None)


def _what(seen: Snapshot, kind: str, pattern: Pattern | None, error: str | None, fill: _Words) -> str:
    said = pattern.says.format_map(fill) if pattern else ""
    if kind == "node_lost":
        return seen.ended_for or f"lost {_some(seen.lost_nodes) or 'a node'}"
    if kind == "planned_stop":
        asked = f"it was asked to save and leave ({seen.asked})" if seen.asked else ""
        asked = asked or "it was asked to save before its wall time"
        return asked + (f"; {seen.ended_for}" if seen.ended_for else ", and did")
    if kind in ("stopped", "preempted", "cancelled"):
        usual = {"stopped": f"a user asked it to ({seen.asked})" if seen.asked else "somebody asked it to",
                 "preempted": "SLURM gave its nodes to a job that comes first",
                 "cancelled": "scancel"}[kind]  # fmt: skip
        return f"{usual}; {seen.ended_for}" if seen.ended_for and seen.ended_for not in usual else usual
    if kind == "vanished":
        return seen.reason or "its job is gone and recorded no end"
    reason = (seen.ended_for or "").partition("; gave up after")[0]
    return said or (error or "").strip() or reason


def _progress(seen: Snapshot) -> str:
    if seen.step is None and not seen.checkpoint_step:
        return "No step was done."
    step = f"Its last step was {seen.step}; the" if seen.step is not None else "The"
    return f"{step} newest complete checkpoint is step {seen.checkpoint_step}." if seen.checkpoint_step else (
        f"Its last step was {seen.step}; there is no checkpoint yet.")  # fmt: skip


def _follows(seen: Snapshot, kind: str) -> str:
    if seen.gave_up:
        match = re.search(r"gave up after .*", seen.ended_for or "")
        return f"The run {match[0]}." if match else "The run gave up, and its dependents were cancelled."
    if seen.attempt is not None and seen.attempt < seen.attempts:
        return f"Attempt {seen.attempt + 1} " + ("went on from there." if seen.checkpoint_step else "began anew.")
    if seen.action == "requeue" and seen.state not in ("failed", "cancelled"):
        return "It was requeued under the same id" + (f": {seen.reason}." if seen.reason else ".")
    if seen.action == "requeue":
        return "It was to be started again, and was not."
    return ""


def _lines_that_matter(seen: Snapshot, trace: Trace | None) -> tuple[str, ...]:
    """The traceback's end where there is one, else the last lines that are no noise; and what SLURM says."""
    found: list[str] = []
    slurm = [line.text for line in seen.lines if SLURM_SAYS.match(line.text) and not NOISE.search(line.text)]
    if trace is not None:
        frames = [index for index, text in enumerate(trace.lines) if _FRAME.match(text)]
        innermost = frames and _FRAME.match(trace.lines[frames[-1]])
        # a frame of ours is shown by itself; a package's with its line
        mine = trace.frame is not None and innermost and not _PACKAGES.search(innermost["file"])
        rest = trace.lines[frames[-1] + (1 if mine else 0) :] if frames else trace.lines
        said = [text for text in rest if text.strip() and not (mine and text.startswith("    "))]
        found += said[-8:] or [trace.exception]
        slurm = [text for text in slurm if "Exited with exit code" not in text]
    else:
        others = [line for line in seen.lines if not NOISE.search(line.text) and not SLURM_SAYS.match(line.text)]
        errors = [line.text for line in others if line.stream == "err"]
        found += (errors or [line.text for line in others])[-6:]
    return (*found, *(text for text in slurm[-3:] if text not in found))


def _do(seen: Snapshot, kind: str, pattern: Pattern | None, fill: _Words) -> tuple[str, ...]:
    again = fill["again"]
    own = [match[1].strip() for line in seen.lines if (match := _FIX.match(line.text))]
    if kind in ("planned_stop", "preempted") and not seen.gave_up:
        return ("nothing: it goes on by itself",)
    if kind == "planned_stop" or (seen.gave_up and "max_attempts_without_progress" in (seen.ended_for or "")):
        return (
            "it saved nothing in all these attempts: a longer slurm.wall_time, or a smaller checkpointing.save_steps",
            "then the command that submitted it again",
        )
    if kind in ("stopped", "cancelled"):
        return (f"to go on from step {seen.checkpoint_step}: the command that submitted it again",)
    if kind == "node_lost":
        first = "nothing: it goes on by itself on other nodes" if not seen.gave_up else again
        bad = ",".join(dict.fromkeys(seen.lost_nodes))
        return (first, f"where {bad} goes on to fail: slurm.exclude={bad}") if bad else (first,)
    if kind == "vanished":
        return (
            f"the command that submitted it again: it goes on from step {seen.checkpoint_step}",
            "sacct -j {} shows what SLURM kept of it".format(seen.job_id or "JOBID") if not seen.local
            else "journalctl -k or dmesg says whether the kernel killed it for its memory",
        )  # fmt: skip
    found: list[str] = []
    if seen.code == life.UNUSABLE and own:
        found += [own[-1], "then the command that submitted it again: the mended settings are frozen anew"]
    elif kind == "hung":
        odd = odd_ones(seen.stacks, seen.ranks)[0]
        who = f" --rank {odd[0]}" if odd else ""
        found += [
            f"read what each rank was doing: logs/stacks/attempt-{seen.attempt}-rank-*.txt",
            f"python -m launchers.logs {seen.name} --attempt {seen.attempt}{who}",
            f"where steps are only slow: slurm.watchdog_minutes={_more(seen.settings.get('slurm.watchdog_minutes'))}",
        ]
    if pattern is not None:
        found += [text for text in (item.format_map(fill) for item in pattern.do) if text]
    elif not found and own:
        found.append(own[-1])
    if not found:
        found.append(f"read more of it: python -m launchers.logs {seen.name} --attempt {seen.attempt} --lines 200")
    if seen.gave_up and not any("command that submitted it" in text for text in found):
        found.append(again)
    return tuple(found)


def _more(value: Any) -> str:
    return f"{2 * value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else "more"


def _some(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _no_failure(seen: Snapshot, kind: str) -> Explanation:
    """A run of which no attempt has ended badly: it waits, runs, is done or is held back."""
    state = seen.state if kind in ("waiting", "running") else KINDS[kind]
    words = f"{seen.name}: {state}" + (f": {seen.reason}." if seen.reason else ".")
    do: list[str] = []
    match = _UPSTREAM.match(seen.reason or "")
    if kind == "gated":
        stage = seen.name.rpartition("/")[2]
        do = [f"another bound, as in {stage}.gate.at_least=..., no gate ({stage}.gate=null), or a new run_name"]
    elif match:
        pipeline = seen.name.rpartition("/")[0]
        other = match["up"] or match["gate"]
        target = f"{pipeline}/{other}" if pipeline else other
        do = [f"see why: python -m launchers.logs {target} --why", "mend that, then the same command again"]
    elif kind in ("vanished", "cancelled"):
        do = ["to start it: the command that submitted it again"]
    elif seen.state == "unknown":
        do = ["mend what is named there, or ask its owner; nothing else is known of it"]
    elif kind == "waiting" and "never" in (seen.reason or ""):
        do = ["the command that submitted it again mends the chain"]
    elif kind == "waiting":
        do = ["nothing: it starts by itself"] if seen.job_id else ["submit it"]
    elif kind == "running":
        do = [f"nothing: python -m launchers.logs {seen.name} -f follows it"]
    else:
        do = ["nothing"]
    return Explanation(kind, None, words, None, None, None, (), tuple(do))
