"""Training processes without the wait for imports: a server imports the libraries once and forks from there.

    server = ForkServer(("torch", "trl"), env)
    process = server.start("post_training.train", [run], env, cwd, output)     # as subprocess.Popen

Each process is a real one, with a pid and session of its own, and runs `python -m <module>` to the letter: argv,
environment, folder, output, signals as a fresh interpreter has them. What it shares with the server is what an
import leaves behind, so variables that libraries read while they are imported must be given to the server.
The server has one thread (OMP_NUM_THREADS=1), else forking would not be sound. It ends, and ends its children,
when the tests' process is gone: then its socket reads end of file.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent


class ForkedProcess:
    """A process of the server's. The part of subprocess.Popen that tests use."""

    def __init__(self, args: Sequence[str], channel: socket.socket) -> None:
        self.args, self._channel = args, channel
        message, fds, *_ = socket.recv_fds(channel, 100, 1)
        if not message:
            raise RuntimeError("the fork server has ended; see its message above")
        self.pid, self._pidfd = int(message), fds[0]
        self.returncode: int | None = None

    def fileno(self) -> int:
        """What select may wait for: readable once it has ended."""
        return self._channel.fileno()

    def poll(self) -> int | None:
        """Exit status (minus the signal's number where one ended it), or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, once it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            message = self._channel.recv(100)
            self.returncode = int(message) if message else -signal.SIGKILL  # the server ended, and it with it
            self._channel.close()
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Does nothing to a process that has ended."""
        if self.poll() is None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:  # ended since
                pass

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts the server, which imports `modules` under the environment `env`."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver", str(other.fileno()), *modules],
                env=dict(env), cwd=ROOT, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def start(
        self, module: str, args: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO
    ) -> ForkedProcess:
        """`python -m module *args` with its output, standard error included, in `output`."""
        request = {"module": module, "args": list(args), "env": dict(env), "cwd": str(cwd)}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._control, [json.dumps(request).encode()], [output.fileno(), theirs.fileno()])
        return ForkedProcess([module, *args], ours)

    def close(self) -> None:
        """End the server, and what it started."""
        self._control.close()
        self._server.wait()


# ---------------------------------------------------------------------------------- in the server process


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for every request. Returns the request in the forked process; None in the server, when told to end."""
    children: dict[int, tuple[int, socket.socket]] = {}  # pidfd: pid, where its exit status goes
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not control:
                    pid, channel = children.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _send(channel, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                    channel.close()
                    continue
                message, fds, *_ = socket.recv_fds(control, 1 << 20, 2)
                if not message:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)  # not waited for yet, so it is there
                        try:
                            os.killpg(pid, signal.SIGKILL)  # what it has started
                        except ProcessLookupError:  # it has come to no session of its own
                            pass
                    return None
                output, channel = fds[0], socket.socket(fileno=fds[1])
                pid = os.fork()
                if pid == 0:
                    os.setsid()
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    for fd in (output, control.detach(), channel.detach()):
                        os.close(fd)
                    for fd, (_, other) in children.items():
                        os.close(fd)
                        other.close()
                    return dict(json.loads(message))
                os.close(output)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid, channel
                selector.register(pidfd, selectors.EVENT_READ)
                _send(channel, str(pid), pidfd)


def _send(channel: socket.socket, text: str, *fds: int) -> None:
    try:
        socket.send_fds(channel, [text.encode()], fds)
    except OSError:  # nobody waits for it
        pass


def run(request: dict[str, Any]) -> None:
    """The forked process: as `python -m module *args` from here on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [request["module"], *request["args"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end ends the server
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # so that no collection in a child walks, and thereby copies, what was imported
    request = serve(control)
    if request is not None:
        run(request)


if __name__ == "__main__":
    main()
