"""python -m tests.on_terminal TTY MODULE ARGS...: run a module with a terminal of its own.

For a process of the fork server's, which leads a session without a terminal: what it opens first becomes that.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    terminal = os.open(sys.argv[1], os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
