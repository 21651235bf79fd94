"""The local supervisor, with the real job script around a stub in the trainer's place."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import post_training.run
from conf.schema import Cluster, Config, Slurm
from launchers import local, render
from post_training.run import ledger
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests import training

REPO = Path(__file__).resolve().parent.parent
DEADLINE = 90.0

# Stands for post_training.train: what it does is in <run>/plan.json, attempt by attempt. It leaves SIGUSR1 at
# its default action, so a signal that reached it would kill it.
STUB = """
import json, os, sys, time
from pathlib import Path
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
run, attempt = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"])
plan = json.loads((run.root / "plan.json").read_text())
act = plan[min(attempt, len(plan)) - 1]
(run.root / f"started-{attempt}").write_text(str(os.getpid()))
if act == "crash":
    sys.exit("the stub crashed as told")
while act == "wait" and not (run.root / "release").exists():
    if run.stop_requested(attempt):
        ledger.append(run.ledger, "checkpoint_saved", attempt=attempt, step=attempt, seconds=0.1)
        ledger.append(run.ledger, "stopped", attempt=attempt, step=attempt)
        sys.exit(85)
    time.sleep(0.02)
run.model.mkdir(exist_ok=True)
(run.model / "weights").write_text("w")
manifest.write(run.model)
"""

DRIVER = """
import json, sys
from pathlib import Path
from launchers import local
from post_training.run.directory import RunDirectory
spec = json.loads(Path(sys.argv[1]).read_text())
local.GRACE_SECONDS, local.DEBOUNCE_SECONDS = spec["grace"], 0.0
runs = [local.LocalRun(RunDirectory(Path(r["root"])), tuple(r["after"]), r["cpus"], r["wall"], r["lead"])
        for r in spec["runs"]]
sys.exit(local.supervise(runs, spec["capacity"]))
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for a condition; the deadline is there only so that a broken build ends."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)
    return value


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes that work below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


class World:
    """A pipeline folder, and supervisors started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[dict[str, Any]] = []
        self.supervisors: list[subprocess.Popen[str]] = []

    def add(
        self, name: str, after: list[str] | None = None, plan: list[str] | None = None, cpus: int = 1,
        wall: int = 3600, lead: int = 60, max_failures: int = 3, script: str | None = None, tasks: int = 1,
    ) -> RunDirectory:  # fmt: skip
        run = RunDirectory(self.folder / "my 'pipeline'" / name)
        run.create()
        after = after or []
        inputs = {f"from_{n}": {"path": str(self.run(n).model), "run_dir": str(self.run(n).root)} for n in after}
        config = {"slurm": {"max_failures": max_failures}, "inputs": inputs}
        run.config.write_text(json.dumps(config))
        (run.root / "plan.json").write_text(json.dumps(plan or ["finish"]))
        package = run.code / "post_training"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "run").symlink_to(Path(post_training.run.__file__).parent)
        (package / "train.py").write_text(STUB)
        slurm = Slurm(gpus_per_node=0 if tasks == 1 else tasks, cpus_per_gpu=cpus, signal_time_seconds=lead)
        cfg = Config(cluster=Cluster(name="local", scheduler="local"), slurm=slurm)
        run.script.write_text(script or render.job_script(cfg, run, sys.executable))
        self.runs.append({"root": str(run.root), "after": after, "cpus": cpus, "wall": wall, "lead": lead})
        return run

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(next(Path(r["root"]) for r in self.runs if Path(r["root"]).name == name))

    def start(self, capacity: int = 4, grace: float = 10) -> subprocess.Popen[str]:
        spec = self.folder / "spec.json"
        spec.write_text(json.dumps({"runs": self.runs, "capacity": capacity, "grace": grace}))
        out = (self.folder / f"supervisor-{len(self.supervisors)}.txt").open("w")
        supervisor = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(spec)], stdout=out, stderr=out, cwd=REPO, text=True,
            start_new_session=True, env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
        out.close()
        self.supervisors.append(supervisor)
        return supervisor

    def said(self, number: int = -1) -> str:
        number = range(len(self.supervisors))[number]
        return (self.folder / f"supervisor-{number}.txt").read_text()

    def supervise(self, capacity: int = 4, grace: float = 10) -> int:
        return self.start(capacity, grace).wait(DEADLINE)

    def release(self, *names: str) -> None:
        for name in names:
            (self.run(name).root / "release").touch()

    def started(self, name: str, attempt: int = 1) -> int:
        """The stub's process, once this attempt runs."""
        path = self.run(name).root / f"started-{attempt}"
        return int(until(lambda: path.exists() and path.read_text(), f"{name} starts attempt {attempt}"))

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in ledger.read(self.run(name).ledger) if e["event"] == kind]

    def time_of(self, name: str, kind: str) -> float:
        return float(self.events(name, kind)[0]["time"])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
        until(lambda: not processes_in(tmp_path / "my 'pipeline'"), "every process of the jobs ends")
    finally:
        for supervisor in made.supervisors:
            if supervisor.poll() is None:
                supervisor.kill()
            supervisor.wait()
        for process in processes_in(tmp_path):
            process.kill()


def test_a_chain_runs_in_the_graphs_order_and_is_not_run_again(world: World) -> None:
    world.add("base")
    world.add("sft", ["base"])
    world.add("rm", ["sft"])
    world.runs.reverse()
    assert world.supervise() == 0
    assert world.time_of("base", "attempt_ended") <= world.time_of("sft", "attempt_started")
    assert world.time_of("sft", "attempt_ended") <= world.time_of("rm", "attempt_started")
    ids = {name: world.events(name, "submitted")[0]["job_id"] for name in ("base", "sft", "rm")}
    assert sorted(ids.values()) == ["local-1", "local-2", "local-3"]
    assert world.events("base", "submitted")[0]["cluster"] == "local"
    assert world.supervise() == 0
    assert "base: already done" in world.said()
    assert all(len(world.events(name, "attempt_started")) == 1 for name in ids)
    assert all(len(world.events(name, "submitted")) == 1 for name in ids)


def test_an_evaluation_whose_gate_does_not_hold_takes_its_dependents_with_it(world: World) -> None:
    world.add("sft")
    judged = world.add("eval", ["sft"])
    world.add("ppo", ["sft", "eval"])
    world.add("dpo", ["sft"])
    gate = {"metric": "accuracy", "at_least": 0.3}
    judged.config.write_text(json.dumps(json.loads(judged.config.read_text()) | {"gate": gate}))
    for _ in range(2):  # the second supervisor finds it done
        assert world.supervise() == 1
        why = f"there is no {judged.results}"
        assert f"eval: done; gate: {why}" in world.said() and "failed" not in world.said()
        assert f"ppo: cancelled: gate of eval: {why}" in world.said() and "dpo: failed" not in world.said()
        assert world.events("ppo", "cancelled")[-1]["reason"] == f"gate of eval: {why}"
        assert not world.events("ppo", "attempt_started")
        assert [event["outcome"] for event in world.events("eval", "attempt_ended")] == ["finished"]
        assert len(world.events("dpo", "attempt_ended")) == 1
    judged.results.write_text('{"version": 2, "headline": "accuracy", "figures": {"accuracy": {"value": 0.3}}}')
    assert world.supervise() == 0
    assert world.events("ppo", "attempt_ended")[0]["outcome"] == "finished"


def test_branches_run_side_by_side(world: World) -> None:
    world.add("base")
    for name in ("left", "right"):
        world.add(name, ["base"], plan=["wait"])
    supervisor = world.start(capacity=2)
    world.started("left"), world.started("right")  # both, though neither can end yet
    world.release("left", "right")
    assert supervisor.wait(DEADLINE) == 0


def test_one_core_runs_one_at_a_time_the_longest_chain_first(world: World) -> None:
    world.add("eval")
    world.add("wide", cpus=64)  # clipped to the machine
    world.add("sft")
    world.add("rm", ["sft"])
    world.add("ppo", ["rm"])
    assert world.supervise(capacity=1) == 0
    spans = sorted((world.time_of(n, "attempt_started"), world.time_of(n, "attempt_ended"), n)
                   for n in ("eval", "wide", "sft", "rm", "ppo"))  # fmt: skip
    assert [name for _, _, name in spans][:2] == ["sft", "rm"]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_wall_time_signals_the_batch_shell_alone_and_the_run_goes_on_under_its_id(world: World) -> None:
    run = world.add("sft", plan=["wait", "finish"], wall=64, lead=60, tasks=2)
    world.add("rm", ["sft"])
    assert world.supervise() == 0
    first, second = world.events("sft", "attempt_ended")
    # 85: both ranks saw the stop request; a rank that got SIGUSR1 would have died of it
    assert (first["code"], first["outcome"], first["action"], first["reason"]) == (85, "stopped", "requeue", None)
    assert [e["signal"] for e in world.events("sft", "stop_requested")] == ["USR1"]
    assert second["outcome"] == "finished"
    assert {e["job_id"] for e in world.events("sft", "attempt_started")} == {"local-1"}
    assert len(world.events("sft", "submitted")) == 1
    assert run.failure_count.read_text() == "0\n"
    assert "requeued" in world.said()


def test_a_crash_is_tried_again_until_it_gives_up(world: World) -> None:
    world.add("flaky", plan=["crash", "crash", "finish"])
    world.add("hopeless", plan=["crash"], max_failures=2)
    assert world.supervise() == 1
    assert len(world.events("flaky", "attempt_started")) == 3
    assert [e["outcome"] for e in world.events("flaky", "attempt_ended")] == ["crashed", "crashed", "finished"]
    assert [e["action"] for e in world.events("hopeless", "attempt_ended")] == ["requeue", "exit"]


def test_a_failure_cancels_its_dependents_and_other_branches_finish(world: World) -> None:
    world.add("sft")
    world.add("rm", ["sft"], plan=["crash"], max_failures=1)
    world.add("ppo", ["rm"])
    world.add("grpo", ["ppo"])
    world.add("dpo", ["sft"], plan=["wait"])
    supervisor = world.start()
    until(lambda: world.events("grpo", "cancelled"), "grpo is cancelled")
    world.release("dpo")
    assert supervisor.wait(DEADLINE) == 1
    for name in ("ppo", "grpo"):
        reason = world.events(name, "cancelled")[0]["reason"]
        assert reason.startswith("upstream rm failed: exit status 1; gave up after 1 failures without progress")
        assert not world.events(name, "attempt_started")
    assert world.events("dpo", "attempt_ended")[0]["outcome"] == "finished"
    said = world.said()
    assert "rm failed: exit status 1" in said and "the stub crashed as told" in said
    assert "give the same command again:\n  python -c" in said

    (world.run("rm").root / "plan.json").write_text('["finish"]')  # the user mends it
    assert world.supervise() == 0
    assert world.events("rm", "submitted")[0]["job_id"] == world.events("rm", "submitted")[1]["job_id"]
    assert len(world.events("dpo", "attempt_started")) == 1


def test_a_job_that_cannot_begin_fails_with_its_reason_in_the_ledger(world: World) -> None:
    world.add("sft")
    world.add("rm", ["sft"])
    world.run("sft").script.write_text("exit 0\n")  # says it is done, and left no output
    assert world.supervise() == 1
    history = summarise(ledger.read(world.run("rm").ledger))
    assert (history.outcome, history.action, history.running) == ("crashed", "exit", False)
    assert "not a complete output" in (history.reason or "")


def test_a_job_that_answers_nothing_is_killed_after_the_wall_time(world: World) -> None:
    script = 'trap "" USR1 TERM\necho 1 >started-1\nwhile :; do sleep 0.05; done\n'
    world.add("stuck", script=script, wall=2, lead=1)
    assert world.supervise(grace=1) == 1
    assert "stuck: failed: killed at the wall time of 2 s" in world.said()
    assert world.events("stuck", "attempt_ended")[0]["reason"] == "killed at the wall time of 2 s"


def test_what_a_script_leaves_behind_is_killed(world: World) -> None:
    run = world.add("leaky", script="sleep 1000 & echo $! >late; exit 0\n")
    assert world.supervise() == 0
    pid = int((run.root / "late").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it ends")
    until(lambda: not local.owned(run), "the lock is free")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_saves_and_the_same_command_goes_on(world: World, number: signal.Signals) -> None:
    world.add("base")
    world.add("sft", ["base"], plan=["wait"])
    world.add("rm", ["sft"])
    supervisor = world.start()
    world.started("sft")
    os.kill(supervisor.pid, number)
    assert supervisor.wait(DEADLINE) == 130
    assert not processes_in(world.folder / "my 'pipeline'")
    assert "saving, Ctrl-C again to kill" in world.said()
    ended = world.events("sft", "attempt_ended")[0]
    assert (ended["code"], ended["outcome"], ended["action"]) == (85, "stopped", "exit")
    assert world.events("sft", "cancelled")[0]["reason"] == "stopped by the user"
    assert world.events("rm", "cancelled")[0]["reason"] == "stopped by the user"
    world.release("sft")
    assert world.supervise() == 0
    assert [e["job_id"] for e in world.events("sft", "attempt_started")] == ["local-2", "local-2"]
    assert len(world.events("base", "attempt_started")) == 1


def test_a_second_stop_kills(world: World) -> None:
    run = world.add("stuck", script='trap "" TERM\necho 1 >started-1\nwhile :; do sleep 0.05; done\n')
    supervisor = world.start()
    world.started("stuck")
    os.kill(supervisor.pid, signal.SIGINT)
    until(lambda: "Ctrl-C again" in world.said(), "it asks")
    assert supervisor.poll() is None
    os.kill(supervisor.pid, signal.SIGINT)
    assert supervisor.wait(DEADLINE) == 130
    until(lambda: not local.owned(run), "the lock is free")


def test_a_killed_supervisors_job_is_waited_for_and_not_run_twice(world: World) -> None:
    run = world.add("sft", plan=["wait"])
    world.add("rm", ["sft"])
    first = world.start()
    pid = world.started("sft")
    first.kill()
    first.wait()
    assert psutil.pid_exists(pid) and local.owned(run)
    second = world.start()
    until(lambda: "sft: its job of an earlier supervisor still runs" in world.said(), "it sees the job")
    world.release("sft")
    assert second.wait(DEADLINE) == 0
    assert len(world.events("sft", "attempt_started")) == 1
    assert len(world.events("sft", "submitted")) == 1
    assert world.time_of("sft", "attempt_ended") <= world.time_of("rm", "attempt_started")


def test_a_stop_reaches_the_job_of_a_killed_supervisor(world: World) -> None:
    world.add("sft", plan=["wait"])
    first = world.start()
    world.started("sft")
    first.kill()
    first.wait()
    second = world.start()
    until(lambda: "still runs" in world.said(), "it sees the job")
    os.kill(second.pid, signal.SIGINT)
    assert second.wait(DEADLINE) == 130
    assert world.events("sft", "attempt_ended")[0]["code"] == 85
    world.release("sft")
    assert world.supervise() == 0
    assert len(world.events("sft", "attempt_started")) == 2


def test_a_job_that_died_with_its_supervisor_goes_on_and_is_no_failure(world: World) -> None:
    run = world.add("sft", plan=["wait", "finish"])
    first = world.start()
    world.started("sft")
    first.kill()
    first.wait()
    for process in processes_in(run.root):
        process.kill()
    until(lambda: not local.owned(run), "everything died")
    assert world.supervise() == 0
    ended = world.events("sft", "attempt_ended")
    assert [e["outcome"] for e in ended] == ["node_lost", "finished"]
    assert summarise(ledger.read(run.ledger)).failures == 0


def test_a_killed_batch_shell_is_a_crash_and_starts_again(world: World) -> None:
    run = world.add("sft", plan=["wait", "finish"])
    supervisor = world.start()
    rank = psutil.Process(world.started("sft"))
    shell = next(p for p in rank.parents() if p.cmdline()[:1] == ["bash"] and os.getpgid(p.pid) == p.pid)
    shell.kill()
    assert supervisor.wait(DEADLINE) == 0
    ended = world.events("sft", "attempt_ended")
    assert [(e["attempt"], e["outcome"], e["action"]) for e in ended] == [
        (1, "crashed", "requeue"), (2, "finished", "exit"),
    ]  # fmt: skip
    assert len(world.events("sft", "submitted")) == 1
    assert run.failure_count.read_text() == "1\n"


def real_run(world: World, name: str, *overrides: str) -> RunDirectory:
    """A tiny run that really trains, with the job script it has on this machine."""
    run = training.make_run(world.folder / "my 'pipeline'", "base", "training.max_steps=8", *overrides, name=name)
    run.code.symlink_to(REPO)
    slurm = Slurm(gpus_per_node=0, cpus_per_gpu=1, signal_time_seconds=60, max_failures=3)
    cfg = Config(cluster=Cluster(name="local", scheduler="local"), slurm=slurm, offline=True)
    run.script.write_text(render.job_script(cfg, run, sys.executable))
    world.runs.append({"root": str(run.root), "after": [], "cpus": 1, "wall": 3600, "lead": 60})
    return run


def pass_steps(run: RunDirectory, first: int, last: int) -> None:
    """Let these steps go on. Rank 0 is then held at the end of the next (the run was made with training.hold)."""
    for step in range(first, last + 1):
        writer = until(lambda: at_gate(run), f"step {step}")
        os.write(writer, b"0\n")
        os.close(writer)
        until(lambda step=step: any(line["step"] >= step for line in training.metrics(run)), f"step {step} is logged")


def at_gate(run: RunDirectory) -> int | None:
    try:
        return os.open(run.stop_request, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def ranks(run: RunDirectory) -> list[psutil.Process]:
    return [p for p in processes_in(run.root) if "post_training.train" in p.cmdline()]


def test_whatever_is_killed_the_weights_are_those_of_an_undisturbed_run(world: World) -> None:
    calm = real_run(world, "calm")
    assert world.supervise() == 0, world.said()
    world.runs.clear()
    run = training.hold(real_run(world, "disturbed"))

    first = world.start()
    pass_steps(run, 1, 3)
    (rank,) = ranks(run)
    rank.kill()  # a trainer: a crash; the supervisor starts it again from step 2
    until(lambda: len(training.events(run, "attempt_started")) == 2, "it starts again")
    pass_steps(run, 3, 5)
    first.kill()  # the supervisor alone: the job goes on, and a new supervisor waits for it
    first.wait()
    second = world.start()
    until(lambda: "still runs" in world.said(), "it sees the job")
    assert len(training.events(run, "attempt_started")) == 2
    second.kill()
    second.wait()
    for process in processes_in(run.root):  # everything
        process.kill()
    until(lambda: not local.owned(run), "everything died")

    third = world.start()
    writer = until(lambda: at_gate(run), "step 5 again")
    regular = run.slurm / "no_stop"
    regular.write_text("0\n")
    regular.replace(run.stop_request)  # held no more
    os.write(writer, b"0\n")
    os.close(writer)
    assert third.wait(DEADLINE) == 0, world.said()
    assert training.weights(run) == training.weights(calm)
    ended = training.events(run, "attempt_ended")
    assert [e["outcome"] for e in ended] == ["crashed", "node_lost", "finished"]
    assert len(training.events(run, "attempt_started")) == 3
    assert {e["job_id"] for e in training.events(run, "attempt_started")} == {"local-2"}
    assert [e["step"] for e in training.events(run, "training_started")] == [0, 2, 4]
    assert [line["step"] for line in training.metrics(run) if "loss" in line] == list(range(1, 9))


def test_two_supervisors_run_one_run_once(world: World) -> None:
    world.add("sft", plan=["wait"])
    world.add("rm", ["sft"])
    first = world.start()
    world.started("sft")
    second = world.start()
    until(lambda: "rm: another supervisor" in world.said(), "the second waits")
    world.release("sft")
    assert (first.wait(DEADLINE), second.wait(DEADLINE)) == (0, 0)
    for name in ("sft", "rm"):
        assert len(world.events(name, "attempt_started")) == 1


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    runs = [local.LocalRun(RunDirectory(tmp_path / a), (b,), 1, 60, 10) for a, b in (("x", "y"), ("y", "x"))]
    with pytest.raises(ValueError, match="cycle"):
        local.supervise(runs)


def test_the_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    run = RunDirectory(tmp_path / "p" / "sft")
    run.create()
    lines = [{"step": i, "max_steps": 300, "time": 100.0 + i, "loss": 2.5} for i in range(1, 151)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = local._Job(local.LocalRun(run, (), 1, 60, 10), 0, 1, job_id="local-1", state="running", pid=1)
    job.first_started = job.started = 10.0
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(local._Screen(True).table([job], 100.0, 60))
    text = console.export_text()
    assert "150/300" in text and "loss 2.500" in text and "1:30" in text and "2:30" in text
    assert max(len(line) for line in text.splitlines()) <= 60
