"""The live screen: what it shows of which runs, what its keys do, and that they work while squeue hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot

from launchers import runs, slurm, steer, table, top
from launchers.errors import LaunchError
from post_training.run import ledger
from tests.test_status import STARTED, TRAINING, Outputs, record, squeue_line

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    made = Outputs(tmp_path)
    made.run("base", "base", done=True, job_id="101", steps=300, loss=1.25)
    made.run("sft", after=("base",), job_id="102", events=(STARTED, TRAINING), steps=150, loss=2.5)
    made.run("rm", "rm", after=("sft",), job_id="103")
    made.run("sft", job_id="201", pipeline="other [b]it's")
    made.write_graphs()
    made.squeue(squeue_line("102", "RUNNING", "None") + squeue_line("103", "PENDING", "Dependency")
                + record("201", reason="Resources"))  # fmt: skip
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    return made


def screen(app: top.Top) -> list[str]:
    """What the terminal shows, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


async def until(pilot: Pilot[None], probe: Callable[[], object]) -> None:
    for _ in range(600):
        if probe():
            return
        await pilot.pause(0.02)
    raise AssertionError("\n".join(screen(pilot.app)))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(outputs: Outputs, size: tuple[int, int] = (80, 24), ascii_only: bool = False) -> AsyncIterator[Any]:
    app = top.Top(outputs.base, [], ascii_only)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.shot.rows)
        await pilot.pause()
        yield pilot
    app.looker.join(10)
    assert not app.looker.is_alive()


def played(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(play())


@pytest.mark.parametrize(
    ("size", "ascii_only"), [((80, 24), False), ((80, 24), True), ((200, 50), False), ((40, 10), False)]
)
def test_all_runs_stand_on_the_screen(outputs: Outputs, size: tuple[int, int], ascii_only: bool) -> None:
    async def play() -> None:
        async with running(outputs, size, ascii_only) as pilot:
            lines = screen(pilot.app)
            assert len(lines) == size[1] and all(len(line) == size[0] for line in lines)
            text = "\n".join(lines)
            assert text.isascii() or not ascii_only
            assert "1 running, 1 queued, 1 waiting, 1 done"[: size[0] - 25] in lines[0]
            order = [line.split()[0] for line in lines[2:6]]
            assert order[0] == "full/sft" and order[2:] == ["full/rm", "full/base"]  # running, queued, waiting, done
            assert "other [b]it's/sft"[:19] in lines[3]
            chosen = next(line for line in lines if line.startswith("full/sft: running"))
            assert lines.index(chosen) > 5
            if size[0] >= 80:
                assert ("####" if ascii_only else "████") in lines[2] and "150" in lines[2]
                assert "training started  attempt=1" in text and "attempt started" in text
                assert "2 min" in lines[2]  # 150 steps of a second, rounded
            if size[0] >= 200:
                assert "waits for sft" in lines[4] and "loss 2.500" in lines[2]

    played(play)


def test_keys_choose_sort_and_filter(outputs: Outputs) -> None:
    async def play() -> None:
        async with running(outputs) as pilot:
            app = pilot.app
            await pilot.press("j", "down")
            assert app.chosen["stage"] == "rm" and any(
                "full/rm: waiting, waits for sft" in line for line in screen(app)
            )
            await pilot.press("k", "end")
            assert app.chosen["stage"] == "base"
            await pilot.press("home")
            assert app.chosen["stage"] == "sft"
            # what is typed behind the slash is no command, however fast it comes
            await pilot.press("slash", *"rmq", "backspace")
            assert [row["stage"] for row in app.runs.rows] == ["rm"] and screen(app)[-1].startswith("/rm_")
            await pilot.press("enter", "s")
            assert app.order == "pipeline" and len(app.runs.rows) == 1 and app.chosen["stage"] == "rm"
            await pilot.press("escape")
            assert [row["stage"] for row in app.runs.rows] == ["base", "sft", "rm", "sft"] and app.chosen[
                "stage"
            ] == "rm"
            await pilot.press("question_mark")
            await pilot.pause()
            assert any("requeue it now" in line for line in screen(app))
            await pilot.press("c")  # closes the help, and cancels nothing
            await pilot.pause()
            assert len(app.screen_stack) == 1
            await pilot.press("q")
            await pilot.pause()
            assert not app.is_running

    played(play)


@pytest.mark.parametrize(("key", "what"), [("c", "cancel"), ("r", "requeue"), ("h", "hold"), ("u", "release")])
def test_it_asks_before_it_steers(outputs: Outputs, monkeypatch: pytest.MonkeyPatch, key: str, what: str) -> None:
    steered: list[str] = []

    def act(looks: list[runs.Look]) -> list[str]:
        if looks[0].name == "base":
            raise LaunchError("base: is done", "nothing to do")
        steered.extend(look.name for look in looks)
        return ["sft  was asked [to] save"]

    monkeypatch.setattr(steer, what, act)

    async def play() -> None:
        async with running(outputs) as pilot:
            app = pilot.app
            for answer in ("n", "q", "escape"):
                await pilot.press(key)
                await pilot.pause()
                assert any("full/sft" in line and "?" in line for line in screen(app)[3:-8])
                await pilot.press(answer)
                await pilot.pause()
            assert not steered and app.is_running
            await pilot.press(key, "y")
            await until(pilot, lambda: screen(app)[-1].startswith("sft  was asked [to] save"))
            assert steered == ["sft"]
            await pilot.press("end", key, "y")
            await until(pilot, lambda: screen(app)[-1].startswith("base: is done"))
            assert steered == ["sft"]

    played(play)


def test_logs_follow_what_is_written(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "LOG_EVERY_S", 0.05)
    run = runs.RunDirectory(outputs.base / "full" / "sft")
    run.stdout("102").write_text("".join(f"line {i} [red]\x1b[31m\n" for i in range(100)))
    run.stderr("102").write_text("Traceback\n")

    async def play() -> None:
        async with running(outputs) as pilot:
            app = pilot.app
            await pilot.press("enter")
            await until(pilot, lambda: "line 99 [red]" in screen(app)[-1])
            assert "\x1b" not in "".join(screen(app)) and "stdout of full/sft" in screen(app)[0]
            with run.stdout("102").open("a") as file:
                file.write("new\n")
            await until(pilot, lambda: screen(app)[-1].strip() == "new")
            await pilot.press("home")
            assert "line 0 " in screen(app)[1]
            await pilot.press("tab")
            await until(pilot, lambda: screen(app)[1].strip() == "Traceback")
            await pilot.press("q")
            await pilot.pause()
            assert len(app.screen_stack) == 1 and app.is_running

    played(play)


def test_a_look_shows_what_has_changed(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "EVERY_S", 0.05)

    async def play() -> None:
        async with running(outputs) as pilot:
            app = pilot.app
            await pilot.press("j")
            run = runs.RunDirectory(outputs.base / "full" / "sft")
            ledger.append(run.ledger, "stop_requested", attempt=1, signal="USR1")
            await until(pilot, lambda: any("stopping" in line for line in screen(app)))
            assert app.chosen["pipeline"].startswith("other")
            outputs.squeue("", 1, "slurm_load_jobs error: Unable to contact slurm controller")
            await until(pilot, lambda: "3 unknown, 1 done" in screen(app)[0])
            outputs.base.rename(outputs.base.with_name("moved"))
            await until(pilot, lambda: screen(app)[0].startswith("paths.output_base=/"))
            assert len(app.runs.rows) == 4  # what was seen last stays

    played(play)


def test_keys_work_while_squeue_hangs(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    hung, go_on = threading.Event(), threading.Event()

    def hang(*args: object, **more: object) -> slurm.Unknown:
        hung.set()
        go_on.wait(30)
        return slurm.Unknown("squeue did not answer within 15 s")

    async def play() -> None:
        async with running(outputs) as pilot:
            app = pilot.app
            monkeypatch.setattr(slurm, "jobs", hang)
            app.looker.wake.set()
            await until(pilot, hung.is_set)
            await pilot.press("j", "j")
            assert app.chosen["stage"] == "rm" and "full/rm: waiting" in "".join(screen(app))
            go_on.set()
            await until(pilot, lambda: "3 unknown" in screen(app)[0])

    played(play)


@given(st.integers(0, 300), st.booleans(), st.text(max_size=30), st.lists(st.floats(-1e3, 1e3), max_size=40))
def test_rows_have_the_terminals_width(width: int, ascii_only: bool, name: str, trend: list[float]) -> None:
    row = {"pipeline": name, "stage": name, "state": "running", "step": 3, "max_steps": 9, "eta_seconds": 99999.0,
           "eta_at_least": True, "gpus_held": 1_000_000, "tokens_per_second_per_gpu": 1e9, "loss": 1.0, "reward": None,
           "goodput": 1.0, "attempts": 3, "elapsed_seconds": 1e9, "job_id": name, "reason": name}  # fmt: skip
    columns = top.layout(width)
    cells = top.row_cells(row, trend, columns, ascii_only)
    assert [len(text) for text in cells] == [w for _, w in columns]
    assert sum(map(len, cells)) + len(cells) - 1 == max(width, 78)
    assert not ascii_only or "".join(cells).isascii()
    assert all(c.isprintable() for c in "".join(cells))


@given(st.lists(st.floats(-1e9, 1e9), max_size=50), st.integers(0, 60), st.booleans())
def test_sparklines(values: list[float], width: int, ascii_only: bool) -> None:
    line = table.spark(values, width, ascii_only)
    assert len(line) == min(width, len(values))
    shown = values[-width:] if width else []
    if shown and min(shown) < max(shown):
        low, high = ("_", "#") if ascii_only else ("▁", "█")
        assert line[shown.index(min(shown))] == low and line[shown.index(max(shown))] == high


def test_a_real_terminal_and_none(outputs: Outputs) -> None:
    """80x24, as over ssh; q leaves with status 0, and the terminal as it was."""
    argv = [sys.executable, "-m", "launchers.top", f"paths.output_base={outputs.base}"]
    said = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert said.returncode == 2 and "top needs a terminal" in said.stderr and not said.stdout
    said = subprocess.run([*argv[:3], "run_name=x", argv[3]], cwd=REPO, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "run_name=x" in said.stderr
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24", PYTHONIOENCODING="utf-8")
        os.execv(argv[0], argv)
    seen, code = b"", None
    try:
        deadline = time.monotonic() + 60
        pressed = False
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    data = os.read(terminal, 65536)
                except OSError:
                    break
                seen += data
            if b"full/rm" in seen and not pressed:
                pressed = True
                os.write(terminal, b"q")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
    assert code == 0, seen[-2000:].decode(errors="replace")
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen[seen.rindex(b"full/rm") :]
