"""A Python for job scripts, whose training processes are forked instead of waiting for their imports.

    with python_without_imports(folder) as python: ...     # cluster.python=<python>

The job script and all that it runs are the real ones, and `python -m post_training.train RUN_DIR` runs to the letter
in a process that the tests' fork server has made, on the run's own snapshot of the code. The job's own process waits
for it, passes SIGTERM on, and takes it along when it is killed. What goes to stderr is in the job's stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("conf", "launchers", "post_training", "templates", "tests")
CLIENT = """
import json, os, signal, socket, sys
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect(sys.argv[1])
request = {"args": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}
socket.send_fds(channel, [json.dumps(request).encode()], [1])
pid = int(channel.recv(100) or sys.exit("the tests have ended"))
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
code = int(channel.recv(100) or sys.exit("the tests have ended"))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def python_without_imports(folder: Path) -> Iterator[Path]:
    """Such a Python in `folder`, whose path must be short: a socket's path holds 107 characters.

    On leaving, waits for the processes that it has started.
    """
    from tests.training import server

    server(compiler=False)  # not in the threads, of which each would start its own
    client, python, path = folder / "client.py", folder / "python", folder / "socket"
    client.write_text(CLIENT)
    forked = shlex.join([sys.executable, "-ISs", str(client), str(path)])
    python.write_text(
        f'#!/bin/bash\nif [ "$2" = post_training.train ]; then shift; exec {forked} "$@"; fi\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(64)
        thread = threading.Thread(target=_accept, args=(listener,))
        thread.start()
        try:
            yield python
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _accept(listener: socket.socket) -> None:
    threads = []
    with contextlib.suppress(OSError):  # the listener is shut
        while True:
            connection, _ = listener.accept()
            threads.append(threading.Thread(target=_serve, args=(connection,)))
            threads[-1].start()
    for thread in threads:
        thread.join()


def _serve(connection: socket.socket) -> None:
    """One training process, from its request to its end."""
    from tests.training import server

    with connection:
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 1)
        if not message:
            return
        request = json.loads(message)
        with os.fdopen(fds[0], "wb") as output:
            process = server(compiler=False).start(
                "tests.shim", request["args"], request["env"], Path(request["cwd"]), output
            )
        try:
            connection.send(str(process.pid).encode())
            while process.poll() is None:
                if connection in select.select([connection, process], [], [])[0]:
                    raise ConnectionError  # it says nothing while it lives
            connection.send(str(process.returncode).encode())
        except OSError:  # the job was killed
            process.kill()
            process.wait()


if __name__ == "__main__":  # the forked process: after its own name come a module and its arguments
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]  # imported from here, and not from the run's snapshot
    elsewhere = [p for p in sys.path if p and Path(p) != ROOT]
    sys.path[:] = [*os.environ["PYTHONPATH"].split(os.pathsep), *elsewhere]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
