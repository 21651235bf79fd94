"""The drill itself: cluster, undisturbed run, disturbed run, evidence, report. See tests/drill/__init__.py."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers import devcluster as dc
from launchers.slurm import TOKEN
from post_training.run import ledger, manifest
from post_training.run.accounting import account
from post_training.run.directory import RunDirectory
from tests.drill import faults as hands
from tests.drill import plan, verdict
from tests.drill.plan import Fault, Stage
from tests.drill.verdict import Evidence, Finding, Result, Sighting

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_NAME = "drill"
LOOK_SECONDS = 0.5
RECOVERY_SECONDS = 240.0
"""A run that has not gone on by then never will: requeue hold, start-up and the longest watchdog are far below."""
UNSEEN_SECONDS = 60.0
"""A submitted job is in the queue at once: one not seen by then is not known by what the drill takes it by."""
DISK_MB = 96
"""Size of each run's own disk: some checkpoints of a tiny model, soon filled."""

LONG = 2
"""A long stage trains so many times the steps of a short one."""

STAGES = (
    Stage("base", None, 60, 5, workers=1, overrides=("effective_batch_size=128",)),
    Stage("sft", "base", 60, 5, ranks=2, workers=1, overrides=("effective_batch_size=256",), long=True),
    Stage("dpo", "sft", 60, 5, workers=1, overrides=("effective_batch_size=64",), long=True),
    Stage("ppo", "sft", 60, 5, overrides=("effective_batch_size=64",), long=True),
    Stage("grpo", "ppo", 60, 5, overrides=("effective_batch_size=64",)),
)
"""The drilled pipeline: tiny models whose steps take long enough to be hit."""
DROPPED = ("rm", "eval_base", "eval_sft", "eval_rm", "eval_ppo", "eval_dpo", "eval_grpo")
"""Stages of pipeline=full that the drill leaves out."""


def overrides(stages: Sequence[Stage]) -> list[str]:
    """What the pipeline command is given: the drilled stages of pipeline=full, tiny, slow and saving often."""
    names = {stage.name for stage in stages}
    dropped = [*DROPPED, *(stage.name for stage in STAGES if stage.name not in names)]
    given = [
        "pipeline=full", f"run_name={RUN_NAME}", *(f"~pipeline.stages.{name}" for name in dropped),
        "training.num_train_epochs=null", "training.per_device_train_batch_size=16", "training.max_length=128",
        "training.warmup_steps=2", "logging.steps=1", "logging.report_to=[]", "data.num_documents=2000",
        "data.num_demonstrations=2000", "data.num_pairs=1000",
        "ppo.max_completion_length=24", "grpo.max_completion_length=24", "ppo.reward.random=1", "grpo.reward.random=1",
        "slurm.partition=low", f"slurm.wall_time={hands.WALL_MINUTES}", "slurm.signal_time_seconds=30",
        "slurm.max_failures=1000", "slurm.max_attempts_without_progress=1000", "slurm.watchdog_minutes=0.5",
    ]  # fmt: skip
    if "ppo" in names:
        given += ["pipeline.stages.ppo.reward_model=null", "pipeline.stages.ppo.overrides=[]"]
    for stage in stages:
        given += [f"{stage.name}.training.{override}" for override in stage.overrides]
        given += [f"{stage.name}.training.max_steps={stage.steps}", f"{stage.name}.slurm.num_nodes={stage.ranks}"]
        given += [f"{stage.name}.checkpointing.save_steps={stage.save_steps}"]
        given.append(f"{stage.name}.training.dataloader_num_workers={stage.workers}")
    return given


def chain(names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages of these names with all that they need, upstream first. Raises ValueError for an unknown one."""
    by_name = {stage.name: stage for stage in STAGES}
    wanted: set[str] = set()
    for name in names:
        if name not in by_name:
            raise ValueError(f"--stages {name}: no such stage; choose from {', '.join(by_name)}")
        here: str | None = name
        while here is not None:
            wanted.add(here)
            here = by_name[here].after
    return tuple(stage for stage in STAGES if stage.name in wanted)


# ------------------------------------------------------------------------------------------ one pipeline


@dataclass
class Seen:
    """What the watch saw of one run."""

    steps: dict[int, int] = field(default_factory=dict)  # attempt -> highest step in metrics.jsonl
    first: float | None = None  # when its job was first in the queue
    last: float | None = None  # when its job was first seen ended


class Pipeline:
    """A pipeline on a cluster: submitted once, then only watched."""

    def __init__(self, cluster: dc.Cluster, base: Path, stages: Sequence[Stage]) -> None:
        self.cluster, self.base, self.stages = cluster, base, stages
        self.views = {s.name: hands.View(RunDirectory(base / RUN_NAME / s.name), s) for s in stages}
        self.sightings: list[Sighting] = []
        self.seen = {stage.name: Seen() for stage in stages}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def submit(self) -> None:
        """The one command. Raises RuntimeError where it is refused."""
        argv = [
            sys.executable, "-m", "launchers.pipeline", *overrides(self.stages), "cluster=dev",
            f"cluster.slurm_conf={self.cluster.conf}", f"paths.output_base={self.base}",
        ]  # fmt: skip
        done = subprocess.run(argv, cwd=ROOT, env=self.cluster.env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Write down, while the block runs, what squeue and the run directories show."""
        self._thread.start()
        try:
            yield
        finally:
            self._ends.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(LOOK_SECONDS):
            for name, view in self.views.items():
                self._note_step(view, self.seen[name].steps)
            with contextlib.suppress(dc.DevClusterError):
                self._look()

    def _note_step(self, view: hands.View, steps: dict[int, int]) -> None:
        # the ledger first: the next attempt cuts the metrics before it says that it trains, so that what is read of
        # them after the ledger is never an earlier attempt's
        history = view.history
        if history.training and history.running:
            steps[history.attempts] = max(view.step(), steps.get(history.attempts, 0))

    def _look(self) -> None:
        now = time.time()
        text = self.cluster.run("squeue", "-h", "-t", "all", "-o", "%i|%T|%k", timeout=10)
        states: dict[str, list[str]] = {}
        for line in text.splitlines():
            job_id, state, comment = line.split("|", 2)
            root = comment.partition(TOKEN)[0]
            self.sightings.append(Sighting(now, job_id, state, root))
            states.setdefault(root, []).append(state)
        for name, view in self.views.items():
            seen, mine = self.seen[name], states.get(str(view.run.root), [])
            if mine and seen.first is None:
                seen.first = now
            if mine:  # else not submitted yet, or forgotten by SLURM
                # SLURM waits for a dead node to come back before it calls a job completed: no time of the run's
                live = any(s in verdict.LIVE and not (s == "COMPLETING" and view.done) for s in mine)
                seen.last = None if live else seen.last or now

    def ended(self, name: str) -> bool:
        """Whether the stage's job was seen ended."""
        return self.seen[name].last is not None

    def unfinished(self) -> list[Stage]:
        """Stages whose output is not whole yet."""
        return [stage for stage in self.stages if not self.views[stage.name].done]


def wait_until_ended(pipeline: Pipeline, say: Progress) -> None:
    """Wait until all jobs have ended, well or not. Raises RuntimeError where the queue does not show them."""
    start = time.monotonic()
    while not all(pipeline.ended(stage.name) for stage in pipeline.stages):
        say.line(" ".join(f"{name} {view.step()}/{view.stage.steps}" for name, view in pipeline.views.items()))
        time.sleep(LOOK_SECONDS)
        unseen = [stage.name for stage in pipeline.stages if pipeline.seen[stage.name].first is None]
        if unseen and time.monotonic() - start > UNSEEN_SECONDS:
            raise RuntimeError(f"squeue shows no job of {', '.join(unseen)} with its run directory in the comment")


class Progress:
    """One line that tells where the drill is: on a terminal always the same one, else a new one each 15 s."""

    def __init__(self, start: float) -> None:
        self.start, self._last, self._tty = start, 0.0, sys.stderr.isatty()
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._tty:
                print(f"\r\033[K[{now - self.start:4.0f} s] {text}", end="", file=sys.stderr, flush=True)
            elif now - self._last >= 15:
                self._last = now
                print(f"[{now - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def event(self, text: str) -> None:
        with self._lock:
            head = "\r\033[K" if self._tty else ""
            print(f"{head}[{time.monotonic() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- the faults


class Drill:
    """Strikes a pipeline: each stage's faults one after the other, each after the last one's recovery."""

    def __init__(self, pipeline: Pipeline, faults: Sequence[Fault], seed: int, say: Progress) -> None:
        self.pipeline, self.seed, self.say = pipeline, seed, say
        self.queues: dict[str, list[Fault]] = {stage.name: [] for stage in pipeline.stages}
        for fault in faults:
            self.queues[fault.stage].append(fault)
        self.results: list[Result] = []
        self.turns: dict[int, int] = {}
        self.outlived: dict[int, Result] = {}
        self.open = len(faults)
        self.ends = threading.Event()
        self._lock = threading.Lock()
        self._cluster_lock = threading.Lock()

    def run(self) -> None:
        """Until every fault has been met, or one of them was not survived."""
        threads = [threading.Thread(target=self._stage, args=(name,), daemon=True) for name in self.queues]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                self.say.line(self._where())
                time.sleep(LOOK_SECONDS)
        finally:
            self.ends.set()

    def _where(self) -> str:
        steps = " ".join(f"{name} {view.step()}/{view.stage.steps}" for name, view in self.pipeline.views.items())
        return f"{steps} | {len(self.results)} faults met, {self.open} to come"

    def _stage(self, name: str) -> None:
        view = self.pipeline.views[name]
        try:
            while self.open and not self.ends.is_set():
                with self._lock:
                    fault = self.queues[name].pop(0) if self.queues[name] else None
                if fault is not None:
                    self._meet(view, fault)
                elif view.done:  # none will be moved here any more
                    return
                else:
                    self.ends.wait(0.2)
        except hands.Stopped:
            return
        except BaseException as error:
            self._close(Result(0, "the drill itself", name, "failed", what=repr(error)))
            raise

    def _meet(self, view: hands.View, fault: Fault) -> None:
        target = hands.Target(self.pipeline.cluster, view, fault, self.ends)
        hand = hands.HANDS[fault.kind]
        while True:
            try:
                target.approach()
                alone = self._cluster_lock if fault.kind in hands.OF_THE_CLUSTER else contextlib.nullcontext()
                with alone:
                    target.check_alive()
                    with hand(target) as what:
                        result = self._recovery(view, fault, target.attempt, what)
                break
            except hands.Gone:
                continue
            except hands.Missed:
                result = None
                break
        if result is None:
            self._again(fault)
        else:
            self._close(result)

    def _recovery(self, view: hands.View, fault: Fault, attempt: int, what: str) -> Result | None:
        """Wait for what a fault must lead to; None where the run was done before it could tell."""
        struck, step = time.monotonic(), view.step()
        self.say.event(f"fault {fault.number}: {fault.kind} at step {step} of {view.stage.name}: {what}")
        state, why = "failed", f"no new attempt within {RECOVERY_SECONDS:g} s"
        while time.monotonic() - struck < RECOVERY_SECONDS:
            if self.ends.wait(0.1):
                raise hands.Stopped
            history = view.history
            if history.attempts > attempt and (history.training or view.done):
                state = "recovered"
                break
            if fault.kind == "controller" and view.step() >= min(step + 2, view.stage.steps):
                state = "recovered"
                break
            if view.done and self.pipeline.ended(view.stage.name):
                at = round(struck - self.say.start, 1)
                self.outlived[fault.number] = Result(
                    fault.number, fault.kind, view.stage.name, "outlived", at, what, attempt
                )
                return None
            if self.pipeline.ended(view.stage.name):
                why = "its job ended and nothing goes on"
                break
        seconds = time.monotonic() - struck
        ended = [e for e in ledger.read(view.run.ledger) if e["event"] == "attempt_ended" and e["attempt"] == attempt]
        outcome = ended[-1].get("outcome") if ended else None
        text = what if state == "recovered" else f"{what}: {why}"
        self.say.event(f"fault {fault.number}: {state} after {seconds:.1f} s, attempt {attempt} {outcome}")
        return Result(
            fault.number, fault.kind, fault.stage, state, round(struck - self.say.start, 1), text, attempt, outcome,
            round(seconds, 1),
        )  # fmt: skip

    def _again(self, fault: Fault) -> None:
        """Draw a fault anew for a stage that is not done. Where there is none, it is missed, unless it did strike a
        run, which was done before SLURM noticed anything."""
        with self._lock:
            turn = self.turns[fault.number] = self.turns.get(fault.number, 0) + 1
            new = plan.redraw(self.seed, fault, turn, self.pipeline.unfinished())
            if new is not None:
                self.queues[new.stage].append(new)
                self.queues[new.stage].sort(key=lambda fault: fault.at)
        if new is None:
            self._close(
                self.outlived.get(fault.number, Result(fault.number, fault.kind, fault.stage, "missed"))
            )
        else:
            self.say.event(f"fault {fault.number}: {fault.stage} was done before; now for {new.stage}")

    def _close(self, result: Result) -> None:
        with self._lock:
            self.results.append(result)
            self.open -= 1
        if result.state == "failed":
            self.ends.set()


# ------------------------------------------------------------------------------------------ the evidence


def collect(disturbed: Pipeline, reference: Pipeline, results: Sequence[Result]) -> list[Evidence]:
    """What was recorded of each stage."""
    found = []
    for stage in disturbed.stages:
        run, other, seen = disturbed.views[stage.name].run, reference.views[stage.name].run, disturbed.seen[stage.name]
        events = ledger.read(run.ledger)
        files = _files(run)
        damaged: dict[int, int] = {}
        for result in results:
            if result.kind == "truncate" and result.stage == stage.name and result.attempt is not None:
                damaged[result.attempt] = damaged.get(result.attempt, 0) + 1
        wall = seen.last - seen.first if seen.first is not None and seen.last is not None else None
        found.append(
            Evidence(
                stage.name, stage.after, str(run.root), stage.steps, stage.save_steps, events, _metrics(run), files,
                _metrics(other), _files(other),
                (run.model / manifest.NAME).stat().st_mtime if files is not None else None,
                seen.steps, damaged, _accounted(events), wall,
            )
        )  # fmt: skip
    return found


def _files(run: RunDirectory) -> dict[str, str] | None:
    if manifest.problem(run.model, hashes=True) is not None:
        return None
    found = manifest.read(run.model)
    return None if found is None else {name: entry["sha256"] for name, entry in found["files"].items()}


def _metrics(run: RunDirectory) -> list[dict[str, Any]]:
    if not run.metrics.exists():
        return []
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def _accounted(events: Sequence[ledger.Event]) -> float:
    return sum(account(events).seconds.values())


# ------------------------------------------------------------------------------------------- the report


def show_plan(seed: int, faults: Sequence[Fault], stages: Sequence[Stage]) -> str:
    """The drawn plan for people."""
    steps = {stage.name: stage.steps for stage in stages}
    rows = [("", "stage", "fault", "when", "what")]
    for fault in faults:
        step = max(1, round(fault.at * steps[fault.stage]))
        when = {"step": f"step {step}", "save": f"in a save after step {step}", "startup": "starting"}[fault.moment]
        rows.append((str(fault.number), fault.stage, fault.kind, when, plan.KINDS[fault.kind].help))
    return f"plan of seed {seed}:\n{_columns(rows)}"


def show(results: Sequence[Result], evidence: Sequence[Evidence], findings: Sequence[Finding]) -> str:
    """Faults, figures and verdict for people."""
    rows = [("", "fault", "stage", "at", "what happened", "attempt", "outcome", "recovery")]
    for r in sorted(results, key=lambda r: (r.at or 0, r.number)):
        at, seconds = f"{r.at:.0f} s" if r.at is not None else "", f"{r.seconds:.1f} s" if r.seconds else ""
        state = "" if r.state == "recovered" else f" [{r.state}]"
        rows.append(
            (str(r.number), r.kind, r.stage, at, r.what + state, str(r.attempt or ""), r.outcome or "-", seconds)
        )
    figures = [("stage", "attempts", "steps lost", "ledger's sum", "drill's clock")]
    for e in evidence:
        attempts = sum(event["event"] == "attempt_started" for event in e.events)
        lost = sum(verdict.lost_steps(e).values())
        figures.append((e.stage, str(attempts), str(lost), _seconds(e.accounted), _seconds(e.wall)))
    lines = [_columns(rows), "", _columns(figures), ""]
    lines += [f"BROKEN {f.rule}{f' ({f.stage})' if f.stage else ''}: {f.detail}" for f in findings]
    return "\n".join([*lines, "FAIL" if findings else "PASS"])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# --------------------------------------------------------------------------------------------- the drill


@dataclass(frozen=True)
class Outcome:
    """What a drill found."""

    seed: int
    faults: tuple[Fault, ...]
    results: tuple[Result, ...]
    evidence: tuple[Evidence, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the raw evidence."""
        stages = {
            e.stage: {
                "attempts": sum(event["event"] == "attempt_started" for event in e.events),
                "steps_lost": verdict.lost_steps(e),
                "ledger_seconds": e.accounted,
                "clock_seconds": e.wall,
            }
            for e in self.evidence
        }
        return {
            "seed": self.seed, "passed": self.passed, "seconds": round(self.seconds, 1), "stages": stages,
            "plan": [dataclasses.asdict(f) for f in self.faults],
            "faults": [dataclasses.asdict(r) for r in self.results],
            "findings": [dataclasses.asdict(f) for f in self.findings],
        }  # fmt: skip


def drill(
    seed: int, faults: Sequence[Fault], stages: Sequence[Stage], folder: Path, reference: Path | None, start: float
) -> Outcome:
    """Run the pipeline undisturbed (or take `reference`, where that was done before), then again with the faults."""
    say = Progress(start)
    with _cluster(folder / "cluster") as cluster:
        calm = Pipeline(cluster, reference or folder / "undisturbed", stages)
        calm.submit()  # what is finished there is reused
        if calm.unfinished():
            say.event("the undisturbed run")
            with calm.watched():
                wait_until_ended(calm, say)
        left = [stage.name for stage in calm.unfinished()]
        if left:
            raise RuntimeError(f"the undisturbed run did not finish {', '.join(left)}: see {calm.base}")
        struck = Pipeline(cluster, folder / "disturbed", stages)
        with _disks([view.run.root for view in struck.views.values()]):
            say.event("the disturbed run")
            with struck.watched():
                struck.submit()
                work = Drill(struck, faults, seed, say)
                work.run()
                if not any(result.state == "failed" for result in work.results):
                    wait_until_ended(struck, say)
                time.sleep(2 * LOOK_SECONDS)  # the watch's last look
            evidence = collect(struck, calm, work.results)
    findings = verdict.judge(evidence, struck.sightings, work.results)
    return Outcome(seed, tuple(faults), tuple(work.results), tuple(evidence), tuple(findings), time.monotonic() - start)


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[dc.Cluster]:
    """A cluster of one-GPU nodes, so that each rank has a node of its own. No grace: SLURM looks for its end rarely."""
    try:
        yield dc.up(folder, gpus=1, grace_s=0, slurmd_timeout_s=6)
    finally:
        dc.down(folder)


@contextlib.contextmanager
def _disks(folders: Sequence[Path]) -> Iterator[None]:
    """A small disk of its own for each run. Its files are put back into the folder when it is unmounted."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "drill", str(folder)], check=True)
            stack.callback(_unmount, folder)
        yield


def _unmount(folder: Path) -> None:
    copy = folder.with_name(f"{folder.name}.copy")
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(folder, copy, symlinks=True)
    # lazily: processes that were meant to live on may have files open there until the cluster is down
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()
    copy.rename(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill",
        description="Strike a pipeline on an emulated SLURM cluster with faults drawn from a seed; judge what is left. "
        "Exit status 0: passed, 1: not, 2: bad arguments.",
        epilog="faults: " + "; ".join(f"{kind.name}: {kind.help}" for kind in plan.KINDS.values()),
    )
    parser.add_argument("--seed", type=int, required=True, help="what the faults are drawn from")
    parser.add_argument("--faults", type=int, default=12, metavar="K", help="how many (default: %(default)s)")
    parser.add_argument("--stages", default="dpo,grpo", help="stages, with what they need (default: all)")
    parser.add_argument(
        "--steps", type=int, default=60, help="steps of base and grpo; the others train twice as long (%(default)s)"
    )
    parser.add_argument("--kinds", default=",".join(plan.KINDS), help="kinds of faults (default: all)")
    parser.add_argument("--reference", type=Path, help="folder of an undisturbed run, made there if need be, to reuse")
    parser.add_argument("--keep", action="store_true", help="keep the folder with both runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plan", action="store_true", help="print the plan and leave")
    return parser


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # so that a terminated drill cleans up


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    try:
        unknown = [kind for kind in kinds if kind not in plan.KINDS]
        if unknown:
            raise ValueError(f"--kinds {','.join(unknown)}: no such kind; choose from {', '.join(plan.KINDS)}")
        if args.faults < 0:
            raise ValueError(f"--faults {args.faults}: must be at least 0")
        if args.steps < 20:
            raise ValueError(f"--steps {args.steps}: must be at least 20, for faults to find their moment")
        stages = [
            dataclasses.replace(stage, steps=args.steps * (LONG if stage.long else 1))
            for stage in chain(args.stages.split(","))
        ]
        faults = plan.draw(args.seed, args.faults, stages, kinds)
    except ValueError as error:
        print(f"drill: {error}", file=sys.stderr)
        return 2
    print(show_plan(args.seed, faults, stages), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.plan:
        return 0
    if (why := dc.missing_message()) is not None:
        print(f"drill: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminate)
    folder = Path(tempfile.mkdtemp(prefix="ptdc-drill-", dir="/tmp"))  # short: sockets lie below it
    try:
        reference = args.reference.absolute() if args.reference else None
        outcome = drill(args.seed, faults, stages, folder, reference, time.monotonic())
    except (RuntimeError, dc.DevClusterError) as error:
        print(f"drill: {error}", file=sys.stderr)
        return 1
    finally:
        if args.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        print(f"\n{show(outcome.results, outcome.evidence, outcome.findings)} in {outcome.seconds:.0f} s")
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
