"""What a run says, attempt by attempt and rank by rank, and why it ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Cluster, Config, Slurm
from launchers import devcluster as dc
from launchers import logs, runs, why
from launchers.executor import RunExecutor
from launchers.render import job_script
from launchers.submit import snapshot
from launchers.why import Line, Snapshot, explain
from post_training.run import ledger, life, manifest
from post_training.run.directory import ATTEMPT_MARK, RunDirectory
from tests.slurm_fixture import wait_for, wait_state

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------- lines and files


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        (b"  0%|   | 0/9\r 50%|# | 4/9\r100%|##| 9/9\r", "100%|##| 9/9"),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07and \x1b]8;;http://x\x1b\\a link", "red and a link"),
        (b"a\x00b\x07c\x1b[2Jd\x9b31me", "abcd\ufffd31me"),
        (b"\xff\xfe caf\xc3\xa9", "\ufffd\ufffd caf\xe9"),
        ("right\u202eleft\tand tab".encode(), "rightleft    and tab"),
    ],
)
def test_lines_are_shown_as_a_terminal_ends_up_with_them(data: bytes, text: str) -> None:
    assert logs.parse_line(data, "err", 1) == Line(text, 0, "err")


@given(st.binary(max_size=300))
def test_nothing_in_a_log_reaches_the_terminal_as_a_control_character(data: bytes) -> None:
    assert logs.parse_line(data, "out", 4).text.isprintable()


@pytest.mark.parametrize(
    ("data", "ranks", "rank", "text"),
    [
        (b"3: step 7", 4, 3, "step 7"),
        (b" 3:  indented", 16, 3, " indented"),
        (b"4: step 7", 4, None, "4: step 7"),  # there is no such rank
        (b"3: step 7", 1, 0, "3: step 7"),  # one rank is not labelled
        (b"3: step 7", 0, None, "3: step 7"),  # from before ranks were labelled
        (b"0: slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-11-22T01:00:00 ***", 2, None,
         "slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-11-22T01:00:00 ***"),
        (b"1: 10%\r1: 20%", 2, 1, "1: 20%"),
        (b"1: [rank1]: ValueError: no", 2, 1, "ValueError: no"),
    ],
)  # fmt: skip
def test_ranks_of_lines(data: bytes, ranks: int, rank: int | None, text: str) -> None:
    assert logs.parse_line(data, "out", ranks) == Line(text, rank, "out")


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.booleans(), st.data())
def test_lines_come_back_from_the_end_as_they_stand(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], closed: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("back") / "log"
    path.write_bytes(b"\n".join(lines) + (b"\n" if closed and lines else b""))
    size = path.stat().st_size
    old, logs.CHUNK = logs.CHUNK, data.draw(st.integers(1, 50))
    try:
        with path.open("rb") as file:
            found = [line for _, line in logs.lines_back(file, 0, size)][::-1]
    finally:
        logs.CHUNK = old
    assert found == path.read_bytes().split(b"\n")[: -1 if path.read_bytes().endswith(b"\n") else None] or not size


def mark(attempt: int, ranks: int = 1, job_id: str = "17", nodes: str = "n1") -> str:
    word = "rank" if ranks == 1 else "ranks"
    return f"\n=== attempt {attempt} of job {job_id}: {ranks} {word} on {nodes} at 2026-11-22T01:00:00+0000\n"


def lines_of(path: Path, attempt: int, newest: bool, count: int = 100, **more: Any) -> list[str]:
    return [line.text for line in logs.last_lines(path, "err", attempt, newest, 1, count, **more).lines]


def test_attempts_are_told_apart(tmp_path: Path) -> None:
    log = tmp_path / "slurm-17.err"
    log.write_text(f"{mark(1)}one\nfirst end{mark(2)}two\n{mark(2)}two again{mark(3)}three\n")
    assert lines_of(log, 1, False) == ["one", "first end"]
    assert lines_of(log, 2, False) == ["two", "two again"]  # sent away from its nodes before it began
    assert lines_of(log, 3, True) == ["three"]
    assert lines_of(log, 4, True) == []  # it said nothing yet
    assert lines_of(log, 2, False, count=1) == ["two again"]
    old = tmp_path / "slurm-16.err"
    old.write_text("of all\nattempts\n")
    read = logs.last_lines(old, "err", 2, True, 1, 9)
    assert [line.text for line in read.lines] == ["of all", "attempts"] and read.part and not read.part.marked
    assert logs.last_lines(tmp_path / "none", "err", 1, True, 1, 9).problem == "not there yet"


def test_long_files_are_read_from_their_ends(tmp_path: Path) -> None:
    log = tmp_path / "slurm-17.err"
    size = 3 << 30
    with log.open("wb") as file:  # sparse: a long line of nothing between two attempts and the end
        file.write(f"{mark(1, 2)}0: one\n{mark(2, 2)}0: two\n".encode())
        file.truncate(size)
        file.seek(size)
        file.write(b"\n1: the end\n0: of it\n")
    read = logs.last_lines(log, "err", 2, True, 2, 2)
    assert [(line.rank, line.text) for line in read.lines] == [(1, "the end"), (0, "of it")] and read.cut
    one = logs.last_lines(log, "err", 2, True, 2, 5, rank=1, searched=1 << 20)
    assert [line.text for line in one.lines] == ["the end"] and one.cut


def test_marks_at_the_edges_of_pieces_are_found(tmp_path: Path) -> None:
    log = tmp_path / "slurm-17.err"
    piece = logs.PIECE
    with log.open("wb") as file:
        for attempt in (1, 2, 3):
            file.write(b"x" * (piece - 3 * attempt) + mark(attempt).encode())
    with log.open("rb") as opened:
        found = [int(m["attempt"]) for _, m in logs.marks_back(opened, log.stat().st_size)]
    assert found == [3, 2, 1]


def test_streams_are_merged_by_time_where_they_bear_it() -> None:
    said = ("2026-11-22 01:00:01,5 a", "  more of a", "2026-11-22 01:00:03 c")
    out = [Line(text, 0, "out") for text in said]
    err = [Line("[INFO|2026-11-22 01:00:02,000] b", 0, "err")]
    lines, order = logs.merge(out, err)
    assert [line.text[-1] for line in lines] == ["a", "a", "b", "c"] and order == "by the times in the lines"
    lines, order = logs.merge(out, [Line("no time", 0, "err"), *err])
    assert lines[-1] is err[0] and order.startswith("stdout, then stderr")


# ----------------------------------------------------------------------------- what outputs really say


def traceback_of(code: str) -> list[str]:
    """What a real Python prints."""
    done = subprocess.run([sys.executable, "-ISs", "-c", code], capture_output=True, text=True)
    return done.stderr.splitlines()


CUDA_OOM = """\
Traceback (most recent call last):
  File "/data/outputs/full/sft/code/post_training/train.py", line 187, in run_attempt
    return train(run, attempt, progress, watchdog)
  File "/data/outputs/full/sft/code/post_training/stages/sft.py", line 88, in compute_loss
    outputs = model(**inputs)
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1751, in _wrapped_call_impl
    return self._call_impl(*args, **kwargs)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.10 GiB of \
which 1.06 GiB is free. Including non-PyTorch memory, this process has 78.03 GiB memory in use. Of the allocated \
memory 75.02 GiB is allocated by PyTorch, and 1.20 GiB is reserved by PyTorch but unallocated."""
NCCL_TIMEOUT = """\
[rank0]:[E621 02:07:08.408271257 ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog caught collective operation timeout: \
WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for 600060 \
milliseconds before timing out.
[rank0]:[E621 02:07:08.465150152 ProcessGroupNCCL.cpp:1664] [PG 1 Rank 0] Exception (either an error or timeout) \
detected by watchdog at work: 1580, last enqueued NCCL work: 1582, last completed NCCL work: 1579.
terminate called after throwing an instance of 'c10::DistBackendError'
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x57 (0x7a71e4e84617 in /x/libc10.so)
srun: error: n1: task 0: Aborted (core dumped)
srun: Terminating StepId=17.1"""
ECC = """\
Traceback (most recent call last):
  File "/data/outputs/full/sft/code/post_training/train.py", line 76, in train
    trainer.train()
RuntimeError: CUDA error: uncorrectable ECC error encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""
SLURM_OOM = """\
slurmstepd: error: Detected 1 oom_kill event in StepId=17.1. Some of the step tasks have been OOM Killed.
srun: error: nid001277: tasks 1-3: Out Of Memory
srun: Terminating StepId=17.1
slurmstepd: error: *** STEP 17.1 ON nid001277 CANCELLED AT 2026-12-05T07:16:01 ***"""
SLURM_OOM_OLD = """\
slurmstepd: error: Detected 1 oom-kill event(s) in step 17.0 cgroup. Some of your processes may have been killed by \
the cgroup out-of-memory handler.
srun: error: Orion-01-01: task 4: Out Of Memory"""
DISK = """\
Traceback (most recent call last):
  File "/opt/venv/lib/python3.11/site-packages/torch/serialization.py", line 967, in save
    _save(obj, opened_zipfile, pickle_module, pickle_protocol)
RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470
OSError: [Errno 28] No space left on device: '/data/full/sft/checkpoints/.attempt-2/checkpoint-40/optimizer.pt'"""
SHM = """\
RuntimeError: DataLoader worker (pid 31337) is killed by signal: Bus error. It is possible that dataloader's workers \
are out of shared memory. Please try to raise your shared memory limit."""
HUB = """\
OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.
Check your internet connection or see how to run the library in offline mode."""
DEVICE_ASSERT = """\
/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1553: indexSelectLargeIndex: block: [231,0,0], thread: [0,0,0] \
Assertion `srcIndex < srcSelectDimSize` failed.
RuntimeError: CUDA error: device-side assert triggered"""
GLOO_PEER = """\
Traceback (most recent call last):
  File "/data/outputs/full/sft/code/post_training/train.py", line 80, in train
    trainer.accelerator.wait_for_everyone()
RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:39211"""

SAID = {
    "cuda_memory": (CUDA_OOM, "out_of_memory", 87, "cuda_memory", "training.per_device_train_batch_size=4 (it was 8)"),
    "slurm's oom": (SLURM_OOM, "out_of_memory", 137, "host_memory", "slurm.mem=1000G (it was 500G)"),
    "slurm's oom of old": (SLURM_OOM_OLD, "out_of_memory", 137, "host_memory", "slurm.mem=1000G"),
    "killed without a word": ("", "crashed", 137, "killed", "slurm.mem=1000G"),
    "killed, bash says": ("job.sh: line 209: 13939 Killed    srun", "crashed", 137, "killed", "MaxRSS"),
    "ecc": (ECC, "crashed", 1, "gpu_hardware", "slurm.exclude=n2"),
    "xid": ("[71.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", "crashed", 1, "gpu_hardware",
            "slurm.exclude=n2"),
    "nccl timeout": (NCCL_TIMEOUT, "crashed", 134, "segfault", "PYTHONFAULTHANDLER"),
    "disk": (DISK, "crashed", 1, "disk_full", "checkpointing.save_total_limit=1"),
    "quota": ("OSError: [Errno 122] Disk quota exceeded", "crashed", 1, "disk_full", "make room"),
    "shared memory": (SHM, "crashed", 1, "shared_memory", "training.dataloader_num_workers=0"),
    "hub": (HUB, "crashed", 1, "hub", "launchers.prefetch"),
    "device assert": (DEVICE_ASSERT, "crashed", 1, "device_assert", "tokenizer and model belong together"),
    "peer": (GLOO_PEER, "crashed", 1, "collective", "the first rank that died"),
    "module": ("ModuleNotFoundError: No module named 'flash_attn'", "crashed", 1, "missing_module", "cluster.python"),
    "library": ("ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory", "crashed", 1,
                "missing_module", "slurm.modules"),
    "no command": ("/var/spool/slurmd/job00017/slurm_script: line 40: module: command not found", "crashed", 127,
                   "command_not_found", "slurm.setup"),
    "stale": ("OSError: [Errno 116] Stale file handle", "crashed", 1, "file_system", "goes on by itself"),
    "fault": ("srun: error: n2: task 0: Segmentation fault (core dumped)", "crashed", 139, "segfault", "n2"),
    "driver": ("RuntimeError: The NVIDIA driver on your system is too old (found 11040).", "crashed", 1, "driver",
               "cluster.python"),
    "srun": ("srun: error: Unable to create step for job 17: Requested node configuration is not available", "crashed",
             1, "srun", "slurm.exclude=n2"),
    "port": ("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
             "port: 10119, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use", "crashed", 1,
             "port", "another port"),
    "files": ("OSError: [Errno 24] Too many open files: '/proc/self/fd'", "crashed", 1, "open_files", "ulimit -n"),
    "weights": ("RuntimeError: Error(s) in loading state_dict for Llama:\n\tsize mismatch for lm_head.weight",
                "crashed", 1, "state_dict", "inputs.model"),
    "wall time": ("slurmstepd: error: *** JOB 17 ON n2 CANCELLED AT 2026-11-22T03:00:00 DUE TO TIME LIMIT ***",
                  "crashed", 143, "time_limit", "slurm.signal_time_seconds=600"),
    "permission": ("PermissionError: [Errno 13] Permission denied: '/data/x'", "crashed", 1, "permission", "path"),
}  # fmt: skip
SETTINGS = {
    "training.per_device_train_batch_size": 8, "slurm.mem": "500G", "slurm.signal_time_seconds": 300,
    "slurm.watchdog_minutes": 30, "parallel.strategy": "ddp",
}  # fmt: skip


def ended(text: str | list[str] = "", outcome: str = "crashed", code: int | None = 1, **more: Any) -> Snapshot:
    """An attempt of a run of two ranks that ended so and was requeued."""
    said = text.splitlines() if isinstance(text, str) else text
    lines = tuple(logs.parse_line(line.encode(), "err", 1) for line in said)
    known: dict[str, Any] = {
        "name": "full/sft", "state": "requeued", "attempt": 2, "attempts": 2, "job_id": "17", "nodes": ("n2",),
        "action": "requeue", "step": 340, "checkpoint_step": 300, "ranks": 2, "settings": SETTINGS,
    }  # fmt: skip
    return Snapshot(lines=lines, outcome=outcome, code=code, **(known | more))


@pytest.mark.parametrize("case", SAID)
def test_what_outputs_say_is_recognised(case: str) -> None:
    text, outcome, code, cause, advice = SAID[case]
    told = explain(ended(text, outcome, code))
    assert told.cause == cause, told
    assert any(advice in item for item in told.do), told.do
    assert not any("{" in item for item in (*told.do, told.words))
    assert "on n2" in told.words and "step 300" in told.words


def test_every_pattern_is_shown_to_work_and_every_advice_has_its_words() -> None:
    shown = {cause for *_, cause, _ in SAID.values()} | {"collective_timeout"}
    assert shown == {pattern.name for pattern in why.PATTERNS}
    for pattern in why.PATTERNS:
        for item in (*pattern.do, pattern.says):
            assert "{" not in item.format_map(why._Words(why.fillings(ended()))), item


@pytest.mark.parametrize(
    "text",
    ["{'loss': '0.12', 'grad_norm': '0.3'}", "Tokenizing: 100%|###| 8000/8000 [00:01<00:00, 4.5 examples/s]",
     "W0621 torch/distributed/elastic: Setting OMP_NUM_THREADS", "the model is out of this world", ""],
)  # fmt: skip
def test_what_is_said_every_day_is_no_cause(text: str) -> None:
    assert why.recognise([text]) is None


def test_a_timeout_of_the_others_is_a_consequence() -> None:
    only = NCCL_TIMEOUT.splitlines()[:2]
    assert explain(ended(only, code=134)).cause == "collective_timeout"
    told = explain(ended([*only, *CUDA_OOM.splitlines()], "out_of_memory", 87))
    assert told.cause == "cuda_memory"


def labelled(*parts: tuple[int, list[str]]) -> tuple[Line, ...]:
    return tuple(Line(text, rank) for rank, texts in parts for text in texts)


def test_the_first_rank_that_failed_is_found_among_many_tracebacks() -> None:
    real = traceback_of("def reward(x):\n    return x['answer']\nreward({})")
    peer = GLOO_PEER.splitlines()
    # those whose peer went away are often quicker to say so
    lines = labelled((0, peer[:2]), (1, real[:1]), (0, peer[2:]), (1, real[1:]), (2, peer))
    trace = why.first_failure(lines)
    assert trace is not None and (trace.rank, trace.exception) == (1, "KeyError: 'answer'")
    told = explain(replace(ended(ranks=3), lines=lines))
    assert told.rank == 1 and "Rank 1 was the first to fail" in told.words and "KeyError: 'answer'" in told.words
    assert told.cause is None and told.lines[-1] == "KeyError: 'answer'"
    # two of their own: the one that the first rank wrote down
    other = traceback_of("raise ValueError('mine')")
    both = labelled((0, real), (1, other))
    found = why.first_failure(both, "ValueError: mine")
    assert found is not None and found.rank == 1


def test_the_node_of_the_rank_that_failed_is_named() -> None:
    lines = labelled((3, ["RuntimeError: CUDA error: uncorrectable ECC error encountered"]))
    seen = replace(ended(nodes=("n1", "n2"), ranks=4), lines=lines)
    told = explain(seen)
    assert "a GPU of n2 does not work" in told.words and "Rank 3 on n2 was the first to fail" in told.words
    assert any("slurm.exclude=n2" in item for item in told.do)
    assert [why.node_of(seen, rank) for rank in (0, 1, 2, 3, 4, None)] == ["n1", "n1", "n2", "n2", None, None]


def test_real_tracebacks_are_read_whole() -> None:
    chained = traceback_of(
        "def load(x):\n try:\n  return x['a']\n except KeyError as e:\n  raise RuntimeError('no a:\\n  look') from e\n"
        "import json\ntry:\n json.loads('{')\nexcept ValueError:\n load({})"
    )
    (trace,) = why.tracebacks(Line(text) for text in chained)
    assert trace.exception == "RuntimeError: no a:" and trace.lines[0].startswith("Traceback")
    assert len([line for line in trace.lines if line.startswith("Traceback")]) == 3
    assert trace.frame is not None or "<string>" in "".join(trace.lines)
    group = traceback_of("raise ExceptionGroup('two', [ValueError(1), TypeError(2)])")
    assert any("ExceptionGroup" in t.exception for t in why.tracebacks(Line(text) for text in group))
    framed = why.first_failure(tuple(Line(text, 1) for text in CUDA_OOM.splitlines()))
    assert framed is not None and framed.frame is not None
    assert framed.frame.endswith("stages/sft.py:88, in compute_loss: outputs = model(**inputs)")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from([
    "Traceback (most recent call last):", '  File "a.py", line 1, in f', "    x", "ValueError: y", "", "words",
    "During handling of the above exception, another exception occurred:", "  | ValueError: z",
])), max_size=25))  # fmt: skip
def test_torn_tracebacks_break_nothing(parts: list[tuple[int | None, str]]) -> None:
    lines = tuple(Line(text, rank) for rank, text in parts)
    for trace in why.tracebacks(lines):
        assert trace.lines and trace.exception
    assert explain(replace(ended(), lines=lines)).words


def stack(function: str, line: int = 7) -> str:
    return (
        "no step for 1800 s\nThread 0x00007f10 (most recent call first):\n"
        '  File "/opt/post_training/attempt.py", line 90 in run\n\n'
        "Thread 0x00007f20 (most recent call first):\n"
        f'  File "/opt/torch/distributed/distributed_c10d.py", line {line} in {function}\n'
        '  File "/opt/post_training/train.py", line 60 in train\n'
    )


def test_a_hang_names_the_odd_rank() -> None:
    stacks = {0: stack("all_reduce"), 1: stack("read_shard"), 2: stack("all_reduce")}
    told = explain(ended(outcome="hung", code=86, stacks=stacks, ranks=3))
    assert "Rank 1 stood in read_shard" in told.words and "all_reduce" in told.words
    assert any("--rank 1" in item for item in told.do) and any("watchdog_minutes=60" in item for item in told.do)
    silent = explain(ended(outcome="hung", code=86, stacks={0: stacks[0], 2: stacks[2]}, ranks=3))
    assert "Rank 1 left no stack" in silent.words
    assert why.odd_ones({0: stack("f")}, 1) == ([], "it stood in f (distributed_c10d.py:7)")
    assert why.odd_ones({}, 2) == ([], "")


ENDS = {
    "planned stop": (ended("", "stopped", 85, stop_signal="USR1"), "planned stop", "nothing: it goes on by itself"),
    "preempted": (ended("", "preempted", 85, stop_signal="TERM"), "preempted", "nothing: it goes on by itself"),
    "node lost": (ended("", "node_lost", 137, lost_nodes=("n2",), ended_for="lost n2"), "lost n2", "slurm.exclude=n2"),
    "cancelled": (ended("", "cancelled", 143, action="exit", state="cancelled"), "scancel", "to go on from step 300"),
    "gave up": (
        ended("ValueError: x", "crashed", 1, action="exit", gave_up=True, state="failed", error="ValueError: x",
              ended_for="ValueError: x; gave up after 3 failures without progress (slurm.max_failures)"),
        "The run gave up after 3 failures", "goes on from step 300"),
    "data": (ended("error: data.path=/x: no such file\n  fix: data.path=/y", "crashed", 2, action="exit", gave_up=True),
             "cannot be used", "data.path=/y"),
    "vanished": (ended("", None, None, running=True, state="failed", action=None,  # type: ignore[arg-type]
                       reason="SLURM no longer knows job 17 and the run did not finish"), "no longer knows",
                 "sacct -j 17"),
    "waits": (Snapshot("full/dpo", "queued", "other jobs come first", job_id="18"), "other jobs come first", "nothing"),
    "gate": (Snapshot("full/eval", "gated", "gate: score 0.2, not at least 0.5"), "held by a gate", "eval.gate=null"),
    "behind a gate": (Snapshot("full/dpo", "waiting", "gate of eval_sft: score 0.2"), "gate of eval_sft",
                      "launchers.logs full/eval_sft --why"),
    "upstream": (Snapshot("full/dpo", "cancelled", "upstream sft failed: ValueError: x"), "upstream sft failed",
                 "launchers.logs full/sft --why"),
    "runs": (Snapshot("full/sft", "running", None, attempts=1, job_id="17"), "running", "-f follows it"),
    "done": (Snapshot("full/sft", "done", attempt=1, outcome="finished", code=0), "done", "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_every_class_of_an_end_has_its_words_and_its_advice(case: str) -> None:
    seen, words, advice = ENDS[case]
    told = explain(seen)
    assert words in told.words and any(advice in item for item in told.do), told
    assert told.kind in why.KINDS


@pytest.mark.parametrize(
    ("code", "words"),
    [(137, "137: SIGKILL, killed"), (139, "139: SIGSEGV"), (-9, "-9: SIGKILL"), (85, "85: saved and left"), (1, "1"),
     (143, "143: SIGTERM"), (255, "255"), (None, ""), (life.GATED, "88: done, and its gate")],
)  # fmt: skip
def test_exit_codes_in_words(code: int | None, words: str) -> None:
    assert why.exit_words(code).startswith(words)


# ------------------------------------------------------------------------------- runs written by hand


class Run:
    """A run directory written by hand."""

    def __init__(self, root: Path, **slurm: Any) -> None:
        self.run = RunDirectory(root)
        self.run.create()
        frozen = {
            "stage": "sft", "cluster": {"name": "none", "scheduler": "local"}, "inputs": {"model": None},
            "slurm": {"num_nodes": 1, "gpus_per_node": 2, "max_failures": 3, **slurm},
        }  # fmt: skip
        self.run.config.write_text(yaml.safe_dump(frozen))

    def event(self, name: str, **fields: Any) -> None:
        ledger.append(self.run.ledger, name, **fields)

    def begin(self, attempt: int, node: str = "n1") -> None:
        self.event("attempt_started", attempt=attempt, job_id="local-1", node=node, nodes=[node], restart_count=0)
        for path in (self.run.stdout("local-1"), self.run.stderr("local-1")):
            self.say(path, mark(attempt, 2, "local-1", node))

    def end(self, attempt: int, outcome: str, action: str, code: int = 1, **more: Any) -> None:
        self.event("attempt_ended", attempt=attempt, code=code, outcome=outcome, action=action,
                   **{"reason": None, "gave_up": False, "lost_nodes": [], "step": 7, **more})  # fmt: skip

    @staticmethod
    def say(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text)


@pytest.fixture
def made(tmp_path: Path) -> Run:
    made = Run(tmp_path / 'it\'s "1" base' / "full" / "sft")
    made.event("submitted", job_id="local-1", cluster="local")
    return made


def shown(made: Run, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints."""
    base = made.run.root.parent.parent
    status = logs.main(["sft", f"paths.output_base={base}", *argv])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


def test_the_newest_attempt_of_all_ranks_and_the_error_first(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = made.run.stdout("local-1"), made.run.stderr("local-1")
    made.begin(1)
    made.say(out, "0: old\n")
    made.end(1, "stopped", "requeue", 85)
    made.begin(2)
    made.say(out, "0: {'loss': 1}\n1: {'loss': 2}\n")
    made.say(err, "".join(f"1: {line}\n" for line in CUDA_OOM.splitlines()) + "0: \x1b[31mand on\n")
    made.run.error(2).write_text("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    made.end(2, "out_of_memory", "requeue", 87, reason="OutOfMemoryError: CUDA out of memory")
    text = shown(made, capsys)
    assert text.splitlines()[0].startswith("full/sft, attempt 2 of 2, job local-1 on n1: out of memory at step 7")
    assert text.index("the error of rank 1 that ended it") < text.index("[0] {'loss': 1}") < text.index("[0] and on")
    assert "[1] {'loss': 2}" in text and "old" not in text and "\x1b" not in text and "--why" in text
    one = shown(made, capsys, "--rank", "0", "--attempt", "1")
    assert "[0] old" in one and "loss" not in one
    data = json.loads(shown(made, capsys, "--json", "--lines", "3"))[0]
    assert data["attempt"] == 2 and data["error"]["rank"] == 1 and len(data["lines"]) == 3
    told = shown(made, capsys, "--why")
    assert "out of memory: the memory of a GPU ran out. Rank 1 was the first" in " ".join(told.split())
    facts = json.loads(shown(made, capsys, "--why", "--json"))[0]
    assert facts["cause"] == "cuda_memory" and facts["code_words"] == "87: ran out of memory" and facts["rank"] == 1
    assert facts["words"].split()[:4] == told.split()[:4]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--attempt", "9"], "no attempt 9"),
        (["--rank", "2"], "no rank 2"),
        (["-f", "--why"], "do not go together"),
        (["--lines", "-1"], "fewer than none"),
        (["stfx"], "stfx"),
        (["frobnicate=1"], "frobnicate"),
    ],
)
def test_what_makes_no_sense_is_refused(
    made: Run, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    made.begin(1)
    stage = ["sft"] if argv != ["stfx"] else []
    status = logs.main([f"paths.output_base={made.run.root.parent.parent}", *stage, *argv])
    said = capsys.readouterr()
    assert status == 2 and says in said.err and "Traceback" not in said.err


def test_runs_that_never_began_and_damaged_ones_are_shown(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(made, capsys)
    assert "no attempt yet, job local-1: has not begun" in text and "not there yet" in text
    assert "never started" in shown(made, capsys, "--why")
    made.begin(1)
    made.end(1, "crashed", "requeue", "x")  # type: ignore[arg-type]
    with made.run.ledger.open("a") as file:
        file.write('{"time": 1, "event": "attempt_ended", "attempt": 2, "outc')
    made.run.stderr("local-1").unlink()
    made.run.stderr("local-1").mkdir()  # cannot be read
    text = shown(made, capsys)
    assert "cannot be read: Is a directory" in text
    assert "crashed" in shown(made, capsys, "--why")


def test_a_run_of_before_is_shown_whole_and_says_so(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in (1, 2):
        made.event("attempt_started", attempt=attempt, job_id="local-1", node="n1")
        made.say(made.run.stdout("local-1"), f"of attempt {attempt}\n")
    text = shown(made, capsys)
    assert "of attempt 1" in text and "of attempt 2" in text and "all of them" in text


def following(made: Run, rank: int | None = None) -> tuple[logs.Follower, io.StringIO]:
    """A follower that has shown what is there, and what it says."""
    to = io.StringIO()
    (look,) = runs.choose(["sft", f"paths.output_base={made.run.root.parent.parent}"], "logs")
    target = logs.target_of(look, None)
    follower = logs.Follower(look, rank, to)
    follower.begin(target, target.read(9, rank))
    return follower, to


def test_following_goes_on_over_attempts_waits_for_files_and_survives_a_cut(made: Run) -> None:
    out, err = made.run.stdout("local-1"), made.run.stderr("local-1")
    follower, to = following(made)
    assert not follower.poll() and to.getvalue() == ""  # no file yet
    made.begin(1)
    made.say(out, "0: one\n1: half")
    assert follower.poll() and to.getvalue() == "--- attempt 1 began on n1\n[0] one\n"
    made.say(out, " and half\n")
    made.say(err, "1: 10%\r1: 90%\n")
    follower.poll()
    made.end(1, "stopped", "requeue", 85, step=400)
    made.begin(2, "n2")
    made.say(out, "0: two\n")
    follower.poll()
    first, *rest = to.getvalue().splitlines()[2:]
    assert (first, rest[0]) == ("[1] half and half", "[1] 1: 90%")
    assert rest[1] == "--- attempt 1 ended: stopped at step 400; requeued"
    assert rest[2].startswith("--- attempt 2 began on n2, 0:00 after attempt 1") and rest[3] == "[0] two"
    assert follower.over(quiet=True) == 1, "nobody runs it"
    out.write_text("0: anew\n")
    follower.poll()
    assert to.getvalue().endswith("-- slurm-local-1.out was cut or replaced: from its beginning\n[0] anew\n")
    made.event("cancelled", reason="by hand")
    made.event("submitted", job_id="local-2", cluster="local")  # a new job of the same run
    made.say(made.run.stdout("local-2"), mark(3, 2, "local-2") + "1: of the new job\n")
    follower.poll()
    assert to.getvalue().endswith("--- attempt 3 began on n1\n[1] of the new job\n")


def test_following_one_rank_shows_nothing_of_the_others(made: Run) -> None:
    made.begin(1)
    made.say(made.run.stdout("local-1"), "0: shown before\n")
    follower, to = following(made, rank=1)
    made.say(made.run.stdout("local-1"), "0: no\n1: yes\n")
    follower.poll()
    assert to.getvalue() == "[1] yes\n"


@pytest.mark.parametrize(("outcome", "action", "status"), [("finished", "exit", 0), ("crashed", "exit", 1)])
def test_following_ends_with_the_run(made: Run, monkeypatch: Any, outcome: str, action: str, status: int) -> None:
    made.begin(1)
    made.end(1, outcome, action, gave_up=status == 1)
    if status == 0:
        made.run.model.mkdir()
        (made.run.model / "weights").write_text("w")
        manifest.write(made.run.model, identity="x")
    monkeypatch.setattr(logs.time, "sleep", lambda _: None)
    follower, to = following(made)
    assert follower.follow() == status
    assert to.getvalue().splitlines()[-1].startswith("--- full/sft: " + ("done" if status == 0 else "over; why:"))


def test_interrupted_it_leaves_cleanly(made: Run, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    made.begin(1)
    monkeypatch.setattr(logs.time, "sleep", interrupt)
    assert logs.main(["sft", f"paths.output_base={made.run.root.parent.parent}", "-f"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_earlier_attempts_lack_of_memory_is_not_this_ones(made: Run) -> None:
    made.begin(1)
    made.say(made.run.stderr("local-1"), SLURM_OOM + "\n")
    made.run.config.write_text(made.run.config.read_text() + "gate: null\n")
    made.run.announce(1)
    assert life.end(made.run, 1, 137, None).outcome == "out_of_memory"
    made.begin(2)
    made.run.announce(2)
    made.say(made.run.stderr("local-1"), "ValueError: of its own\n")
    assert life.end(made.run, 2, 1, None).outcome == "crashed"


# --------------------------------------------------------------------------------- real job scripts

STUB = """
import os, sys, time
from pathlib import Path
from post_training.run import ledger, life, manifest
from post_training.run.directory import RunDirectory
from post_training.run.progress import Progress

run, attempt, rank = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"]), 0
rank = int(os.environ.get("SLURM_PROCID") or os.environ["RANK"])
print(f"hello from {rank} in {attempt}", flush=True)
print(f"bar 1\\rbar 2 of {rank} in {attempt}", file=sys.stderr, flush=True)
if (run.root / "fails").exists():
    if rank == 1:
        run.error(attempt).write_text("ValueError: row 7 has no answer\\n")
        raise ValueError("row 7 has no answer")
    while not run.error(attempt).exists():
        time.sleep(0.02)
    raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:39211")
(run.root / f"rank-{attempt}-{rank}").touch()
while attempt == 1:
    if run.stop_requested(attempt):
        if rank == 0:
            ledger.append(run.ledger, "checkpoint_saved", attempt=attempt, step=4, seconds=0.1)
            ledger.append(run.ledger, "stopped", attempt=attempt, step=4)
        sys.exit(life.STOPPED)
    time.sleep(0.05)
if rank == 0:
    run.model.mkdir(exist_ok=True)
    (run.model / "weights").write_text("w")
    manifest.write(run.model, identity="x")
"""


def ready(run: RunDirectory, cfg: Config) -> None:
    """A run directory with its code, its stub and its script."""
    run.create()
    for name, content in snapshot().items():
        if name.startswith("post_training/run/") or name == "post_training/__init__.py":
            path = run.code / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (run.code / "post_training/train.py").write_text(STUB)
    run.config.write_text(yaml.safe_dump({"stage": "sft", "slurm": vars(cfg.slurm), "cluster": vars(cfg.cluster),
                                          "inputs": {"model": None}}))  # fmt: skip
    run.script.write_text(job_script(cfg, run, sys.executable))


def test_two_ranks_of_a_real_script_of_which_one_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "it's 1 base" / "full" / "sft")
    cfg = Config(cluster=Cluster(name="local", scheduler="local"),
                 slurm=Slurm(gpus_per_node=2, cpus_per_gpu=1, max_failures=3))  # fmt: skip
    ready(run, cfg)
    (run.root / "fails").touch()
    ledger.append(run.ledger, "submitted", job_id="local-1", cluster="local")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID")}
    for attempt in (1, 2):
        with run.stdout("local-1").open("ab") as out, run.stderr("local-1").open("ab") as err:
            script = subprocess.Popen(["bash", str(run.script)], env={**env, "POST_TRAINING_JOB_ID": "local-1"},
                                      stdout=out, stderr=err, start_new_session=True)  # fmt: skip
            try:
                assert script.wait(120) == life.REQUEUE
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(script.pid, signal.SIGKILL)
        said = run.stderr("local-1").read_text()
        assert len(ATTEMPT_MARK.findall(said)) == attempt
    argv = [f"paths.output_base={run.root.parent.parent}", "sft"]
    assert logs.main(argv) == 0
    text = capsys.readouterr().out
    assert "the error of rank 1 that ended it:" in text and "ValueError: row 7 has no answer" in text
    assert "[0] hello from 0 in 2" in text and "[1] bar 2 of 1 in 2" in text and "0 in 1" not in text
    assert logs.main([*argv, "--why"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "crashed: ValueError: row 7 has no answer. Rank 1 was the first to fail" in told
    assert logs.main([*argv, "--attempt", "1", "--rank", "0"]) == 0
    one = capsys.readouterr().out
    assert "[0] hello from 0 in 1" in one and "from 1" not in one


@pytest.mark.slurm
def test_ranks_and_attempts_on_slurm_and_following_across_a_requeue(devcluster: dc.Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "it's 1 base" / "full" / "sft")
    cfg = Config(
        cluster=Cluster(name="dev", scheduler="slurm", slurm_conf=str(devcluster.conf)),
        slurm=Slurm(partition="gpu", gpus_per_node=1, num_nodes=2, cpus_per_gpu=1, wall_time="10"),
    )
    ready(run, cfg)
    job_id = RunExecutor(run, job_script(cfg, run, sys.executable), "dev", str(devcluster.conf)).submit_run().job_id
    argv = [sys.executable, "-m", "launchers.logs", "sft", f"paths.output_base={run.root.parent.parent}"]
    follower = subprocess.Popen([*argv, "-f"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for rank in (0, 1):
            wait_for(f"rank {rank}", (run.root / f"rank-1-{rank}").exists, 60)
        devcluster.run("scancel", "--batch", "--signal=USR1", job_id)
        wait_state(devcluster, job_id, "COMPLETED", timeout=120)
        text, _ = follower.communicate(timeout=90)
    finally:
        follower.kill()
        follower.wait()
        devcluster.run("scancel", job_id, check=False)
    assert follower.returncode == 0, text
    lines = text.splitlines()
    for expected in ("[0] hello from 0 in 1", "[1] hello from 1 in 1", "[1] bar 2 of 1 in 2", "[0] hello from 0 in 2"):
        assert expected in lines, text
    (end,) = [i for i, line in enumerate(lines) if line.startswith("--- attempt 1 ended: planned stop")]
    (begin,) = [i for i, line in enumerate(lines) if line.startswith("--- attempt 2 began on ")]
    assert lines.index("[1] hello from 1 in 1") < end < begin < lines.index("[1] hello from 1 in 2")
    assert "requeued; SLURM holds it" in lines[end] and lines[-1] == "--- full/sft: done"
    done = subprocess.run([*argv, "--attempt", "1", "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    (facts,) = json.loads(done.stdout)
    assert {line["rank"] for line in facts["lines"]} >= {0, 1} and facts["attempts_marked"]
    assert not any("in 2" in line["text"] for line in facts["lines"])
    assert ATTEMPT_MARK.findall(run.stderr(job_id).read_text())[0][1:3] == (job_id, "2")


def test_an_attempt_that_a_user_asked_to_leave_is_told_as_such() -> None:
    told = explain(
        ended("", "stopped", 124, asked="hold, by ann", checkpoint_step=0, step=None, attempt=1, stop_signal="USR1")
    )
    assert "asked to save and leave (hold, by ann)" in told.words and "began anew" in told.words, told.words
    assert "wall time" not in told.words
