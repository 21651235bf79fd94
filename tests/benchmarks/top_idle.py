"""What the live screen takes of a core while it shows many runs:  python -m tests.benchmarks.top_idle [--seconds 60]

Starts launchers.top in a terminal of 80x24 on the tree of tests.benchmarks.status_scale, in which every running run
writes its metrics and progress on and on, as real ones do. Prints the CPU time of the process (psutil, its children
included) over so many seconds after the first look, as a share of one core, its memory, and the keys' response.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import psutil

from tests.benchmarks import status_scale

ROOT = Path(__file__).resolve().parent.parent.parent


def write_on(base: Path, over: threading.Event) -> None:
    """What running runs do: every ten seconds a line of metrics, and progress.json anew."""
    figures = list(base.glob("*/*/slurm/progress.json"))
    step = 4000
    while not over.wait(10):
        step += 1
        for path in figures:
            found = json.loads(path.read_text()) | {"time": time.time(), "step": step}
            path.with_suffix(".tmp").write_text(json.dumps(found))
            path.with_suffix(".tmp").replace(path)
            line = {"step": step, "max_steps": 9000, "time": time.time(), "loss": 2.0, "tokens_per_second_per_gpu": 1.0}
            with (path.parent.parent / "logs" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pipelines", type=int, default=200, help="of five runs each")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="top-idle-"))
    over, pid = threading.Event(), 0
    try:
        base = folder / "outputs"
        print(status_scale.make(base, given.pipelines))
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "launchers.top", f"paths.output_base={base}"])
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        threading.Thread(target=write_on, args=(base, over), daemon=True).start()

        def read(until: float, wanted: bytes | None = None) -> bytes:
            seen = b""
            while time.monotonic() < until and (wanted is None or wanted not in seen):
                if select.select([terminal], [], [], 0.05)[0]:
                    seen += os.read(terminal, 65536)
            return seen

        began = time.monotonic()
        read(began + 120, b"GPUs |")
        process = psutil.Process(pid)
        first = process.cpu_times()
        print(f"first look after {time.monotonic() - began:.1f} s, {first.user + first.system:.2f} s of CPU")
        read(time.monotonic() + 2)
        calls = folder / "bin" / "calls"
        looks = len(calls.read_text().splitlines())
        before, start = process.cpu_times(), time.monotonic()
        read(start + given.seconds)
        after, seconds = process.cpu_times(), time.monotonic() - start
        used = sum(getattr(after, name) - getattr(before, name) for name in
                   ("user", "system", "children_user", "children_system"))  # fmt: skip
        looks = len(calls.read_text().splitlines()) - looks
        memory = process.memory_info().rss / 2**20
        print(f"{100 * used / seconds:.1f} % of one core over {seconds:.0f} s and {looks} looks, {memory:.0f} MB")
        waits = []
        for key in (b"j", b"k") * 5:
            pressed = time.monotonic()
            os.write(terminal, key)
            select.select([terminal], [], [], 10)
            waits.append(time.monotonic() - pressed)
            read(time.monotonic() + 0.3)
        print(f"a key shows after {1000 * sorted(waits)[len(waits) // 2]:.0f} ms (median of {len(waits)})")
    finally:
        over.set()
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
