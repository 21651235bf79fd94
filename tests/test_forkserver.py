"""The fork server of the training tests: its processes are real ones, and nothing of it outlives the tests."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forkserver import ROOT, ForkedProcess, ForkServer

MODULE = """
import atexit, json, os, signal, sys, threading
atexit.register(lambda: print("left in order", flush=True))
def what(): return {
    "argv": sys.argv[1:], "name": __name__, "cwd": os.getcwd(), "env": dict(os.environ), "session": os.getsid(0),
    "fds": sorted(map(int, os.listdir("/proc/self/fd"))), "threads": threading.active_count(),
    "dispositions": {s: str(signal.getsignal(getattr(signal, s))) for s in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")},
}
if sys.argv[1] == "say":
    print(json.dumps(what()))
elif sys.argv[1] == "exit":
    sys.exit(int(sys.argv[2]))
elif sys.argv[1] == "raise":
    raise ValueError("on its way")
elif sys.argv[1] == "wait":
    print("waiting", flush=True)
    signal.pause()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "forked_module.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ForkServer]:
    server = ForkServer(("json",), os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"})
    yield server
    server.close()


def start(server: ForkServer, folder: Path, *args: str, **env: str) -> ForkedProcess:
    with (folder / "out").open("wb") as output:
        return server.start("forked_module", args, env, folder, output)


def test_it_is_python_m_with_its_own_everything(server: ForkServer, folder: Path) -> None:
    process = start(server, folder, "say", "a b", A="1")
    assert process.wait() == 0
    assert process.poll() == process.returncode == 0
    first, last = (folder / "out").read_text().splitlines()
    said = json.loads(first)
    assert last == "left in order"
    assert (said["argv"], said["name"], said["cwd"]) == (["say", "a b"], "__main__", str(folder))
    assert said["env"].keys() - {"LC_CTYPE"} == {"A"}
    assert said["session"] == process.pid
    assert len(said["fds"]) == 4, "0, 1, 2, and the one that listed them"
    assert said["threads"] == 1
    assert all(said["dispositions"][s].endswith(("SIG_DFL", "0")) for s in ("SIGTERM", "SIGUSR1", "SIGHUP"))
    assert "default_int_handler" in said["dispositions"]["SIGINT"]


def test_exit_status(server: ForkServer, folder: Path) -> None:
    assert start(server, folder, "exit", "75").wait() == 75
    assert start(server, folder, "raise").wait() == 1
    assert "ValueError: on its way" in (folder / "out").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_it(server: ForkServer, folder: Path, number: signal.Signals) -> None:
    other, process = start(server, folder, "wait"), start(server, folder, "wait")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(number)
    assert process.wait() == -number
    process.send_signal(number)  # it has ended: nothing happens
    assert other.poll() is None


TESTS_OF_ITS_OWN = """
import os, sys
from pathlib import Path
from tests.forkserver import ForkServer
folder = Path(sys.argv[1])
server = ForkServer((), os.environ)
process = server.start("forked_module", ["wait"], os.environ, folder, (folder / "out").open("wb"))
print(server._server.pid, process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_when_the_tests_are_killed(folder: Path) -> None:
    tests = subprocess.Popen(
        [sys.executable, "-c", TESTS_OF_ITS_OWN, str(folder)], env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert tests.stdout is not None
    descriptors = [os.pidfd_open(int(pid)) for pid in tests.stdout.readline().split()]
    try:
        tests.kill()
        tests.communicate()
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 60)[0], "still there"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
