"""What a compute node sees: one process of launchers.doctor's job.  python doctor_job.py <folder>

Copied into the job's folder, which lies below paths.output_base as runs do, and started there by the Python of the
jobs: it needs the standard library alone. Rank r writes node-<r>.json anew after every step, so that a step which hangs
or kills the process loses only itself. request.json says what to look at:

    {"packages": [names], "hub": URL, "ranks": N, "deadline_s": seconds for each wait on another rank}
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

LINES = 200
"""Lines that each rank appends to one file."""
LINE_BYTES = 120
FLIPS = 200
BYTES = 32 << 20
"""Size of the tensor that the ranks add up."""
ROUNDS = 4
COLLECTIVE_S = 45


class Node:
    """One rank's findings, and how it meets the others: through files, before any network is known to work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.ranks = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
        self.request: dict[str, Any] = json.loads((folder / "request.json").read_text())
        self.facts: dict[str, Any] = {"rank": self.rank}

    def write(self) -> None:
        """Replace this rank's file."""
        place = self.folder / f"node-{self.rank}.json"
        temporary = place.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(self.facts, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)

    def step(self, name: str, act: Callable[[], Any]) -> None:
        """Keep what a step finds, or why it failed."""
        self.facts["at"] = name  # where it hung, if it never ends
        self.write()
        try:
            self.facts[name] = act()
        except Exception as error:
            self.facts[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.facts["at"] = None
        self.write()

    def wait(self, what: str, there: Callable[[], bool]) -> float:
        """Poll until so, and return the seconds that took. Raises TimeoutError."""
        begin = time.monotonic()
        while not there():
            if time.monotonic() - begin > self.request["deadline_s"]:
                raise TimeoutError(f"{what}: not within {self.request['deadline_s']:g} s")
            time.sleep(0.01)
        return time.monotonic() - begin

    def say(self, name: str) -> None:
        """Tell the other ranks."""
        (self.folder / f"{name}-{self.rank}").touch()

    def all_said(self, name: str) -> float:
        """Wait for every rank, and return the seconds that took. A listing makes NFS look at the folder anew."""
        wanted = {f"{name}-{rank}" for rank in range(self.ranks)}
        return self.wait(f"{name} of every rank", lambda: wanted <= {path.name for path in self.folder.iterdir()})

    def meet(self, name: str) -> float:
        self.say(name)
        return self.all_said(name)


def can_open(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------- this node


def about(node: Node) -> dict[str, Any]:
    """Names, Python, packages, limits and room."""
    temporary = os.environ.get("TMPDIR") or "/tmp"
    limits = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[0] for name in ("memlock", "nofile")
    }
    return {
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "machine": _read("/proc/sys/kernel/random/boot_id"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in node.request["packages"]},
        "limits": {name: None if value == resource.RLIM_INFINITY else value for name, value in limits.items()},
        "cores": len(os.sched_getaffinity(0)),
        "shm_bytes": room("/dev/shm"),
        "tmp": temporary,
        "tmp_bytes": room(temporary),
        "base_bytes": room(str(node.folder)),
        "clock": time.time(),
        "scontrol": scontrol(),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def room(path: str) -> int | None:
    """Bytes that a user may still write there."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def scontrol() -> dict[str, Any]:
    """Whether a job can requeue itself from here."""
    path = shutil.which("scontrol")
    if path is None:
        return {"path": None}
    try:
        done = subprocess.run([path, "ping"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"path": path, "answers": False, "said": "no answer within 20 s"}
    said = (done.stdout + done.stderr).strip()
    return {"path": path, "answers": done.returncode == 0 and " UP" in said, "said": said[-300:]}


def master(node: Node) -> dict[str, Any]:
    """Whether the first node's name, by which ranks find each other, is known here; and whether its port is free."""
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    found = sorted({str(item[4][0]) for item in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)})
    result: dict[str, Any] = {"name": name, "port": port, "addresses": found}
    if node.rank == 0:
        with socket.socket() as listener:
            listener.bind(("", port))
            result["free"] = True
    return result


def internet(node: Node) -> dict[str, Any]:
    """Whether the hub answers, through a proxy where the environment names one. Any answer of HTTP is one."""
    url = node.request["hub"]
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8) as answer:
            return {"url": url, "reached": True, "said": str(answer.status)}
    except urllib.error.HTTPError as error:
        return {"url": url, "reached": True, "said": str(error.code)}
    except (OSError, ValueError) as error:
        return {"url": url, "reached": False, "said": str(getattr(error, "reason", error))[:200]}


def gpus() -> dict[str, Any]:
    """GPUs as SLURM, the driver and torch see them."""
    found: dict[str, Any] = {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "driver": None, "names": []}
    if tool := shutil.which("nvidia-smi"):
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
        found["names"] = (
            [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []
        )
        found["driver"] = done.returncode == 0
        found["said"] = "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-300:]
    return found


# ------------------------------------------------------------------------------------- the shared folder


def shared(node: Node) -> dict[str, Any]:
    """What the folder of the runs is like, seen from several nodes at once."""
    found: dict[str, Any] = {"skew_s": skew(node.folder, f"skew-{node.rank}")}
    node.meet("begin")
    flips(node, found)
    appended(node, found)
    fresh(node, found)
    locked(node, found)
    return found


def skew(folder: Path, name: str) -> float:
    """Seconds that the file server's clock is ahead of this machine's: the time of a new file, and the time here."""
    path = folder / name
    before = time.time()
    with path.open("w") as file:
        file.write("x")
        file.flush()
        os.fsync(file.fileno())
    after, seen = time.time(), path.stat().st_mtime
    path.unlink()
    return seen - before if seen < before else max(0.0, seen - after)


def flips(node: Node, found: dict[str, Any]) -> None:
    """Rank 0 renames new texts over a file; the others read it all the while: it must always be there, and whole."""
    place = node.folder / "flip"
    texts = {b"a" * 1000, b"b" * 9000}
    if node.rank == 0:
        for i in range(FLIPS):
            temporary = place.with_suffix(".tmp")
            temporary.write_bytes(sorted(texts)[i % 2])
            temporary.replace(place)
            if i == 0:
                node.say("flipping")
        (node.folder / "flipped").touch()
    else:
        waited = node.wait("a renamed file", lambda: can_open(place))
        torn = missing = reads = 0
        while reads < 50 or (not (node.folder / "flipped").exists() and reads < 20000):
            reads += 1
            try:
                torn += place.read_bytes() not in texts
            except OSError:
                missing += 1
        found |= {"rename_seen_s": waited, "reads": reads, "torn": torn, "missing": missing}
    node.meet("flips")


def appended(node: Node, found: dict[str, Any]) -> None:
    """All ranks append lines to one file at once; none may be lost or mixed."""
    place = node.folder / "append"
    with place.open("ab", buffering=0) as file:
        for i in range(LINES):
            file.write(f"{node.rank:03} {i:05} ".encode().ljust(LINE_BYTES - 1, b".") + b"\n")
        os.fsync(file.fileno())
    node.meet("appended")
    if node.rank == 0:
        lines = place.read_bytes().splitlines(keepends=True)
        whole = {line for line in lines if len(line) == LINE_BYTES and line.endswith(b".\n")}
        found |= {"lines": len(whole), "lines_written": LINES * node.ranks, "lines_bad": len(lines) - len(whole)}


def fresh(node: Node, found: dict[str, Any]) -> None:
    """How soon a change inside an existing file is seen elsewhere: that is how a run learns that it is to stop."""
    place = node.folder / "notice"
    if node.rank == 0:
        place.write_text("0")
    node.meet("notice")
    if node.rank != 0:
        node.wait("the file to be there", lambda: can_open(place))
        place.read_text()
    node.meet("noticing")
    begin = time.monotonic()
    if node.rank == 0:
        with place.open("r+") as file:
            file.write("1")
            file.flush()
            os.fsync(file.fileno())
    else:
        node.wait("a change in a file", lambda: place.read_text() == "1")
        found["notice_s"] = time.monotonic() - begin
    node.meet("noticed")


def locked(node: Node, found: dict[str, Any]) -> None:
    """Rank 0 holds a lock; nobody else may get it."""
    place = node.folder / "lock"
    with place.open("a") as file:
        if node.rank == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        node.meet("locked")
        if node.rank != 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found["lock_kept"] = False
            except BlockingIOError:
                found["lock_kept"] = True
        node.meet("unlocked")


# ------------------------------------------------------------------------------------------- collectives


def torch_sees() -> dict[str, Any]:
    """torch, and the GPUs that it can use."""
    begin = time.monotonic()
    torch = importlib.import_module("torch")
    seconds = time.monotonic() - begin
    cuda = torch.cuda.is_available()
    nccl = bool(cuda and torch.distributed.is_nccl_available())
    return {
        "seconds": seconds,
        "version": torch.__version__,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "nccl": nccl,
    }


def all_reduce(node: Node) -> dict[str, Any]:
    """Add up a tensor over all ranks, and check the sum. Bandwidth as in nccl-tests: 2 (n - 1) / n of the bytes / s.

    NCCL where every rank has a GPU, else gloo.
    """
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    from datetime import timedelta

    node.meet("torch")
    seen = [
        json.loads((node.folder / f"node-{rank}.json").read_text()).get("torch") or {} for rank in range(node.ranks)
    ]
    lacking = [rank for rank, one in enumerate(seen) if "version" not in one]
    if lacking:
        raise RuntimeError(f"rank {lacking[0]} has no torch")
    backend = "nccl" if all(one.get("nccl") for one in seen) else "gloo"
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    begin = time.monotonic()
    dist.init_process_group(
        backend, init_method=address, rank=node.rank, world_size=node.ranks, timeout=timedelta(seconds=COLLECTIVE_S)
    )
    try:
        device = "cuda" if backend == "nccl" else "cpu"
        tensor = torch.full((BYTES // 4,), float(node.rank + 1), device=device)
        dist.all_reduce(tensor)
        right = bool((tensor == node.ranks * (node.ranks + 1) / 2).all())
        started = time.monotonic() - begin
        begin = time.monotonic()
        for _ in range(ROUNDS):
            tensor.fill_(1.0)
            dist.all_reduce(tensor)
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - begin) / ROUNDS
    finally:
        dist.destroy_process_group()
    share = 2 * (node.ranks - 1) / node.ranks
    return {
        "backend": backend, "right": right, "first_s": started, "seconds": seconds,
        "gb_per_s": share * BYTES / seconds / 1e9, "bytes": BYTES, "ranks": node.ranks,
    }  # fmt: skip


def main(folder: Path) -> None:
    node = Node(folder)
    node.step("about", lambda: about(node))
    node.step("master", lambda: master(node))
    node.step("gpus", gpus)
    if node.ranks > 1:
        node.step("shared", lambda: shared(node))
    else:
        node.step("shared", lambda: {"skew_s": skew(folder, "skew-0")})
    if node.rank == 0:
        node.step("internet", lambda: internet(node))
    node.step("torch", torch_sees)
    if "error" not in node.facts["torch"]:
        node.step("all_reduce", lambda: all_reduce(node))
    else:  # the others need not wait for this rank in vain
        with contextlib.suppress(OSError):
            node.say("torch")
    node.facts["done"] = True
    node.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
