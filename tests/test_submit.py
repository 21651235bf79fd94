"""The commands as people run them: exit status, one clear message, nothing left behind; and chains on a real SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launchers import devcluster as dc
from launchers import slurm
from launchers.executor import RunExecutor, RunJob
from launchers.render import job_script
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests.slurm_fixture import wait_for

ROOT = Path(__file__).resolve().parent.parent
NASTY = "it's 100% %j"

TRAIN = """
import os, sys, time
from pathlib import Path
from post_training.run import manifest
from post_training.run.directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
config = run.read_config()
print("stage", config["name"], "rank", os.environ.get("SLURM_PROCID"), flush=True)
names = (f"{config['pipeline']}.{config['name']}", config["name"])
files = [Path(__file__).with_name(f"behave-{name}") for name in names]
behave = next((file.read_text() for file in files if file.exists()), "finish")
if behave == "crash":
    print("it broke", file=sys.stderr)
    sys.exit(7)
while behave == "wait" and any(file.exists() for file in files):
    time.sleep(0.1)
if os.environ.get("SLURM_PROCID", "0") == "0":
    for source in config["inputs"].values():
        assert source is None or manifest.problem(Path(source["path"])) is None
    run.model.mkdir(exist_ok=True)
    (run.model / "weights").write_text(config["name"])
    if config["stage"] == "eval":
        found = Path(__file__).with_name(f"results-{config['name']}")
        usual = '{"metric": "accuracy", "score": 0.5, "score_low": 0.4, "score_high": 0.6}'
        run.results.write_text(found.read_text() if found.exists() else usual)
        run.samples.write_text("")
    manifest.write(run.model, identity=config["identity"])
"""


class Bench:
    """A folder with a stub for the training side, and the commands run in it."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.base, self.stub = folder, folder / NASTY, folder / "stub"
        self.stub.mkdir()
        (self.stub / "train.py").write_text(TRAIN)
        (self.stub / "python").write_text(
            f'#!/bin/bash\nif [ "$2" = post_training.train ]; then shift 2; set -- "{self.stub}/train.py" "$@"; fi\n'
            f'exec "{sys.executable}" "$@"\n'
        )
        (self.stub / "python").chmod(0o755)
        self.env = {**env, "PYTHONPATH": str(ROOT)}
        self.cluster = "local"

    def __call__(self, command: str, *tokens: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        argv = [
            sys.executable, "-m", f"launchers.{command}", f"cluster={self.cluster}",
            f"paths.output_base='{self.quoted}'",
            f"cluster.python={self.stub}/python", *tokens,
        ]  # fmt: skip
        return subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout)

    @property
    def quoted(self) -> str:
        return str(self.base).replace("'", "\\'")

    def refused(self, command: str, *tokens: str) -> str:
        """Run what must be refused: status 2, one message, and nothing that was not there before."""
        before = self.files()
        done = self(command, *tokens)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and done.stderr.startswith("error:") and "fix:" in done.stderr
        assert self.files() == before
        return done.stderr

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def run(self, pipeline: str, stage: str) -> RunDirectory:
        return RunDirectory(self.base / pipeline / stage)

    def behave(self, stage: str, how: str | None) -> None:
        path = self.stub / f"behave-{stage}"
        if how is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(how)

    def finds(self, stage: str, **figures: float) -> None:
        """What an eval stage finds; by default an accuracy of 0.5."""
        plain = {name: {"value": value, "low": value - 0.05, "high": value + 0.05} for name, value in figures.items()}
        found = {"version": 2, "headline": next(iter(figures), None), "figures": plain}
        (self.stub / f"results-{stage}").write_text(json.dumps(found))

    def status(self, pipeline: str) -> dict[str, dict[str, Any]]:
        """What status says of a pipeline's runs, by stage."""
        argv = [sys.executable, "-m", "launchers.status", f"run_name={pipeline}", f"paths.output_base={self.base}"]
        done = subprocess.run([*argv, "--json"], cwd=self.folder, env=self.env, capture_output=True, text=True)
        return {row["stage"]: row for row in json.loads(done.stdout)["runs"]}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, dict(os.environ))


# --------------------------------------------------------------------------------- without SLURM: refusals


@pytest.mark.parametrize(
    ("command", "tokens", "words"),
    [
        ("submit", ["stage=sfft"], ["stage=sfft", "did you mean 'sft'"]),
        ("submit", ["stage=sft"], ["stage=sft", "output of base", "launchers.submit stage=base"]),
        ("pipeline", ["training.max_step=1"], ["training.max_step=1", "did you mean 'training.max_steps'"]),
        ("pipeline", ["model.name_or_path=/no/such"], ["model.name_or_path=/no/such", "no such file"]),
        ("pipeline", ["sft.data=gsm8k", "sft.data.path=no.jsonl"], ["data.path=no.jsonl", "no such file", "stage sft"]),
        ("pipeline", ["slurm.wall_time=1:2:3:4"], ["slurm.wall_time=1:2:3:4", "HH:MM:SS"]),
        ("pipeline", ["slurm.signal_time_seconds=999999"], ["slurm.signal_time_seconds=999999", "wall_time"]),
        ("pipeline", ["paths.output_base=/etc/hostname/x"], ["paths.output_base", "not a folder"]),
        ("pipeline", ["paths.output_base=/proc/x/y"], ["paths.output_base"]),
        ("pipeline", ["pipeline.stages.sft.model=grpo"], ["cycle"]),
        ("pipeline", ["offline=true", "model.name_or_path=org/model"], ["offline"]),
        ("pipeline", ["stage=sft"], ["stage=sft", "launchers.submit"]),
        ("pipeline", ["sft.lr=1,2"], ["-m"]),
        ("pipeline", ["-m", "sft.lr=1,x"], ["sft.lr=x", "Float"]),
        ("pipeline", ["cluster.scheduler=slurm", "PATH="], ["sbatch"]),
    ],
)
def test_refused(bench: Bench, command: str, tokens: list[str], words: list[str]) -> None:
    if "PATH=" in tokens:
        bench.env["PATH"] = "/nonexistent"
    message = bench.refused(command, *(token for token in tokens if token != "PATH="))
    for word in words:
        assert word in message


def test_an_unknown_flag_is_no_traceback(bench: Bench) -> None:
    done = bench("submit", "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--nonsense" in done.stderr


def test_dry_run_shows_graph_and_scripts_and_writes_nothing(bench: Bench) -> None:
    before = bench.files()
    bench.cluster = "dev"  # nobody asks it anything
    done = bench("pipeline", "dry_run=true", "pipeline=rlhf")
    assert done.returncode == 0, done.stderr
    assert "sft        sft   to submit after base" in done.stdout
    assert "#SBATCH --dependency='afterok:<job of base>'" in done.stdout
    assert done.stdout.count("#!/bin/bash") == 8 and bench.files() == before


# ------------------------------------------------------------------------------------- on this machine


def test_a_local_pipeline_runs_once_and_is_reused(bench: Bench) -> None:
    done = bench("pipeline", "pipeline=rlhf")
    assert done.returncode == 0, done.stdout + done.stderr
    described = json.loads((bench.base / "rlhf/pipeline.json").read_text())
    assert described["name"] == "rlhf" and described["cluster"] == "local" and described["version"] == 1
    assert described["stages"]["ppo"] == {
        "run_dir": str(bench.run("rlhf", "ppo").root),
        "stage": "ppo",
        "after": ["sft", "rm"],
        "identity": bench.run("rlhf", "ppo").read_config()["identity"],
    }
    sft = bench.run("rlhf", "sft")
    config = sft.read_config()
    assert config["inputs"]["model"]["path"] == str(bench.run("rlhf", "base").model)
    assert config["inputs"]["model"]["identity"] == bench.run("rlhf", "base").read_config()["identity"]
    assert "sft" in config and "dpo" not in config and "pipeline" in config and config["name"] == "sft"
    assert (sft.code / "post_training/run/life.py").exists() and (sft.code / "conf/config.yaml").exists()
    assert (bench.base / "rlhf/.submit.lock").exists()

    before = {p: p.stat().st_mtime_ns for p in bench.base.rglob("*") if p.is_file() and p.name != "pipeline.json"}
    again = bench("pipeline", "pipeline=rlhf")
    assert again.returncode == 0 and "nothing to submit" in again.stdout and "submitted" not in again.stdout
    after = {p: p.stat().st_mtime_ns for p in bench.base.rglob("*") if p.is_file() and p.name != "pipeline.json"}
    assert before.keys() == after.keys() and before == after

    message = bench.refused("pipeline", "pipeline=rlhf", "sft.lr=0.5")
    assert "sft.lr: 2e-05 -> 0.5" in message and "run_name=rlhf-2" in message

    # what determines no weights is no other config; a new name reuses what is the same
    assert bench("pipeline", "pipeline=rlhf", "slurm.max_failures=1", "logging.steps=1").returncode == 0
    new = bench("pipeline", "pipeline=rlhf", "run_name=rlhf-2", "rm.rm.lr=0.5")
    assert new.returncode == 0, new.stdout + new.stderr
    assert sorted(p.name for p in (bench.base / "rlhf-2").iterdir() if p.is_dir()) == [
        "eval_ppo", "eval_rm", "ppo", "rm",
    ]  # fmt: skip
    config = bench.run("rlhf-2", "rm").read_config()
    assert config["inputs"]["model"]["path"] == str(sft.model)
    one = bench("submit", "pipeline=rlhf", "stage=eval_sft", "run_name=rlhf-3", "eval.num_problems=9")
    assert one.returncode == 0, one.stdout + one.stderr
    assert [p.name for p in (bench.base / "rlhf-3").iterdir() if p.is_dir()] == ["eval_sft"]
    described = json.loads((bench.base / "rlhf-3/pipeline.json").read_text())
    assert described["stages"]["sft"]["run_dir"] == str(sft.root)


def test_what_failed_goes_on_with_the_same_command(bench: Bench) -> None:
    bench.behave("sft", "crash")
    tokens = ("pipeline=dpo", "slurm.max_failures=1")
    done = bench("pipeline", *tokens)
    assert done.returncode not in (0, 2)
    assert manifest.problem(bench.run("dpo", "base").model) is None
    assert manifest.problem(bench.run("dpo", "dpo").model) is not None
    (bench.run("dpo", "sft").code / "marker").write_text("the code of a run that has started stays")
    bench.behave("sft", None)
    done = bench("pipeline", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest.problem(bench.run("dpo", "eval_grpo").model) is None
    assert (bench.run("dpo", "sft").code / "marker").exists()


def test_restart_sets_aside_what_was_made_and_starts_from_scratch(bench: Bench) -> None:
    tokens = ("pipeline=dpo", "slurm.max_failures=1")
    bench.behave("sft", "crash")
    bench("pipeline", *tokens)
    sft = bench.run("dpo", "sft")
    made = {
        sft.checkpoints / "checkpoint-5" / "weights": "5", sft.inference_checkpoints / "step-5" / "weights": "i",
        sft.metrics: '{"step": 5}\n',
    }  # fmt: skip
    for number in (1, 2):
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        ledger.append(sft.ledger, "checkpoint_saved", attempt=number, step=5, seconds=1.0)
        before = bench.files()
        dry = bench("pipeline", *tokens, "restart=true", "dry_run=true")
        assert "sft        sft   to submit from scratch after base" in dry.stdout, dry.stdout + dry.stderr
        assert bench.files() == before
        bench.behave("sft", "crash" if number == 1 else None)
        done = bench("pipeline", *tokens, "restart=true")
        assert "to go on from scratch" in done.stdout, done.stdout + done.stderr
        aside = sft.root / f"restarted-{number}"
        for path, text in made.items():
            assert (aside / path.relative_to(sft.root)).read_text() == text and not path.exists()
        assert summarise(ledger.read(sft.ledger)).checkpoint_step == 0
    assert done.returncode == 0, done.stdout + done.stderr
    events = [event["event"] for event in ledger.read(bench.run("dpo", "base").ledger)]
    assert "restarted" not in events and events.count("attempt_started") == 1
    message = bench.refused("pipeline", *tokens, "restart=true")
    assert "restart=true: there is nothing to start from scratch: base is done" in message
    assert "run_name=dpo-2" in message
    message = bench.refused("pipeline", *tokens, "sft.restart=true")
    assert "sft is done" in message and "base" not in message


def test_a_lead_that_was_seen_to_be_too_short_is_reported(bench: Bench) -> None:
    assert bench("submit", "stage=base").returncode == 0
    run = bench.run("full", "base")

    def measured(step: float, needed: float | None) -> None:
        lead = {"longest_step": step, "save": 20.0, "teardown": 4.5, "needed": needed}
        ledger.append(run.ledger, "attempt_ended", attempt=1, code=85, outcome="stopped", action="requeue",
                      reason=None, lead=lead)  # fmt: skip

    measured(400.0, 424.5)
    measured(40.0, 64.5)  # the newest counts
    measured(40.0, None)
    command = ("pipeline", "run_name=other", "seed=1")
    short = bench(*command, "slurm.signal_time_seconds=60", "dry_run=true")
    assert short.returncode == 0
    (warning, fix) = short.stderr.strip().splitlines()
    assert warning.startswith("warning: slurm.signal_time_seconds=60 (stage base): to save and leave took 64 s")
    assert str(run.root) in warning and "(longest step 40 s, save 20 s, teardown 4 s)" in warning
    assert fix == "  fix: base.slurm.signal_time_seconds=80"
    # other models, ranks and techniques say nothing about this one
    for tokens in (
        ("slurm.signal_time_seconds=80",), ("slurm.signal_time_seconds=60", "model.num_layers=3"),
        ("slurm.signal_time_seconds=60", "slurm.gpus_per_node=2"),
    ):  # fmt: skip
        assert bench(*command, *tokens, "dry_run=true").stderr == "", tokens


def test_a_gate_stops_the_chain_behind_it_and_another_bound_goes_on(bench: Bench) -> None:
    """pipeline=gated: sft learned too little; then ppo forgot too much."""
    bench.finds("eval_sft", accuracy=0.213)
    bench.finds("eval_rm", preference_accuracy=0.8)
    bench.finds("eval_ppo", accuracy=0.15)
    done = bench("pipeline", "pipeline=gated")
    assert done.returncode == 1, done.stdout + done.stderr
    why = "accuracy 0.213 (0.16 to 0.26) is below at_least 0.3"
    assert f"\neval_sft: gate: {why}\n  fix: another bound, as in eval_sft.gate.at_least=" in done.stderr
    assert "failed" not in done.stderr
    held = ("rm", "ppo", "dpo", "grpo", "eval_rm", "eval_ppo", "eval_dpo", "eval_grpo")
    for name in held:  # nothing of them began
        run = bench.run("gated", name)
        assert summarise(ledger.read(run.ledger)).attempts == 0 and not run.model.exists(), name
    seen = bench.status("gated")
    assert (seen["eval_sft"]["state"], seen["eval_sft"]["reason"]) == ("gated", f"gate: {why}")
    assert {(seen[n]["state"], seen[n]["reason"]) for n in held} == {("cancelled", f"gate of eval_sft: {why}")}
    assert seen["eval_sft"]["score"] == 0.213 and seen["base"]["state"] == seen["eval_base"]["state"] == "done"

    # the same command starts nothing, and says why
    dry = bench("pipeline", "pipeline=gated", "dry_run=true")
    assert f"done before after sft; its gate does not hold: {why}" in dry.stdout, dry.stdout + dry.stderr
    assert "left out (gate of eval_sft)" in dry.stdout and "#!/bin/bash" not in dry.stdout
    done = bench("pipeline", "pipeline=gated")
    assert done.returncode == 1 and "nothing to submit" in done.stdout, done.stdout + done.stderr
    assert f"eval_sft: gate: {why}; left out: rm, dpo, eval_rm, ppo," in done.stderr and "fix: another" in done.stderr
    assert summarise(ledger.read(bench.run("gated", "rm").ledger)).attempts == 0
    assert "comes after eval_sft, whose gate does not hold" in bench.refused("submit", "pipeline=gated", "stage=dpo")

    # another bound: the evaluation is reused, and the chain goes on to the next gate
    done = bench("pipeline", "pipeline=gated", "eval_sft.gate.at_least=0.2")
    assert done.returncode == 1, done.stdout + done.stderr
    worse = "accuracy 0.15 (0.1 to 0.2) is worse than eval_sft's 0.213 (0.16 to 0.26) by 0.063, more than max_drop 0.05"
    assert f"\neval_ppo: gate: {worse}\n" in done.stderr
    seen = bench.status("gated")
    states = {name: row["state"] for name, row in seen.items()}
    assert {name for name, state in states.items() if state != "done"} == {"eval_ppo", "grpo", "eval_grpo"}
    assert states["eval_ppo"] == "gated" and seen["grpo"]["reason"] == f"gate of eval_ppo: {worse}"
    assert summarise(ledger.read(bench.run("gated", "eval_sft").ledger)).attempts == 1
    done = bench("pipeline", "pipeline=gated", "eval_sft.gate.at_least=0.2", "eval_ppo.gate=null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["state"] for row in bench.status("gated").values()} == {"done"}


def test_a_sweep_makes_a_pipeline_a_point_and_shares_what_is_the_same(bench: Bench) -> None:
    done = bench("pipeline", "pipeline=dpo", "sft.lr=1e-5,1e-4", "-m")
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(p.name for p in bench.base.iterdir() if p.name != ".sweeps")
    assert names == ["dpo-sft.lr=0.0001", "dpo-sft.lr=1e-05"]
    assert [p.name for p in (bench.base / ".sweeps").iterdir()] == ["dpo-sft.lr"]
    assert (bench.base / names[1] / "base").is_dir() and not (bench.base / names[0] / "base").exists()
    assert {p.name for p in bench.folder.iterdir()} == {NASTY, "stub"}  # Hydra left nothing


# ---------------------------------------------------------------------------------------- on a real SLURM


@pytest.fixture
def cluster(bench: Bench, devcluster: dc.Cluster) -> Iterator[Bench]:
    bench.env = {**devcluster.env, "PYTHONPATH": str(ROOT), "POST_TRAINING_DEVCLUSTER": str(devcluster.dir)}
    bench.env["SQUEUE_FORMAT"], bench.env["SBATCH_PARTITION"] = "%A", "nosuch"  # a user's own settings do no harm
    bench.cluster = "dev"
    try:
        yield bench
    finally:
        devcluster.run("scancel", "-u", "root")
        wait_for("an empty queue", lambda: not devcluster.run("squeue", "-h"), timeout=60)


def job_of(run: RunDirectory) -> RunJob:
    submitted = [event for event in ledger.read(run.ledger) if event["event"] == "submitted"]
    return RunJob(run.slurm, submitted[-1]["job_id"])


def records(bench: Bench, devcluster: dc.Cluster) -> dict[str, slurm.JobRecord]:
    found = slurm.jobs(user="root", conf=str(devcluster.conf))
    assert not isinstance(found, slurm.Unknown)
    return {Path(job.folder).name: job for job in found.values() if job.folder.startswith(f"{bench.base}/")}


@pytest.mark.slurm
def test_a_chain_on_slurm(cluster: Bench, devcluster: dc.Cluster) -> None:
    shape = ("slurm.num_nodes=2", "slurm.gpus_per_node=2", "eval.slurm.num_nodes=1")
    cluster.behave("base", "wait")
    # two at once, and once more: one chain
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: cluster("pipeline", "pipeline=dpo", *shape), range(2)))
    both.append(cluster("pipeline", "pipeline=dpo", *shape))
    assert [done.returncode for done in both] == [0, 0, 0], [done.stdout + done.stderr for done in both]
    assert sum("nothing to submit" in done.stdout for done in both) == 2
    seen = records(cluster, devcluster)
    assert len(seen) == 8
    assert seen["sft"].dependency.startswith(f"afterok:{seen['base'].job_id}")
    assert seen["sft"].state == "PENDING" and seen["sft"].reason == "Dependency"

    # a changed config is refused while the job is in the queue
    changed = cluster("submit", "pipeline=dpo", "stage=dpo", "dpo.lr=1", *shape)
    assert changed.returncode == 2 and "run_name=dpo-2" in changed.stderr, changed.stdout + changed.stderr

    job = job_of(cluster.run("dpo", "grpo"))
    assert job.state == "PENDING" and not job.done() and job.job_id == seen["grpo"].job_id
    cluster.behave("base", None)
    assert job.result() == cluster.run("dpo", "grpo").model  # waits
    assert job.state == "COMPLETED" and job.done() and job.exception() is None
    said = [line for line in (job.stdout() or "").splitlines() if line and not line.startswith("===")]
    assert sorted(said) == [f"{rank}: stage grpo rank {rank}" for rank in range(4)]
    assert job.paths.stdout.name == f"slurm-{job.job_id}.out" and job.paths.stderr.exists()
    assert job.paths.submission_file == cluster.run("dpo", "grpo").script
    assert not [p for p in job.paths.folder.iterdir() if "submission_file" in p.name or p.suffix == ".pkl"]
    events = [event for n in ("base", "sft", "dpo", "grpo") for event in ledger.read(cluster.run("dpo", n).ledger)]
    started = [event["time"] for event in events if event["event"].startswith("attempt")]
    assert started == sorted(started) and len(started) == 8
    models = [cluster.run("dpo", name).model for name in seen]
    wait_for("all done", lambda: all(manifest.problem(model) is None for model in models), 60)
    again = cluster("pipeline", "pipeline=dpo")
    assert "nothing to submit" in again.stdout, again.stdout + again.stderr


@pytest.mark.slurm
def test_a_failure_takes_its_dependents_and_the_same_command_goes_on(
    cluster: Bench, devcluster: dc.Cluster
) -> None:  # fmt: skip
    tokens = ("pipeline=rlhf", "slurm.max_failures=1", "ppo.reward_model_weight=1")
    cluster.behave("sft", "crash")
    done = cluster("pipeline", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    failed = job_of(cluster.run("rlhf", "sft"))
    error = failed.exception()
    assert "it broke" in str(error) and type(error).__name__ == "FailedJobError" and failed.state == "FAILED"
    wait_for("no dependent is left", lambda: not any(j.live for j in records(cluster, devcluster).values()), 60)
    assert records(cluster, devcluster)["ppo"].state == "CANCELLED"
    assert manifest.problem(cluster.run("rlhf", "eval_base").model) is None
    cluster.behave("sft", None)
    done = cluster("pipeline", *tokens)
    assert done.returncode == 0 and "submitted again" in done.stdout, done.stdout + done.stderr
    assert job_of(cluster.run("rlhf", "ppo")).result() == cluster.run("rlhf", "ppo").model
    inputs = cluster.run("rlhf", "ppo").read_config()["inputs"]
    assert {role: source["path"] for role, source in inputs.items() if source is not None} == {
        "model": str(cluster.run("rlhf", "sft").model), "reference": str(cluster.run("rlhf", "sft").model),
        "reward_model": str(cluster.run("rlhf", "rm").model),
    }  # fmt: skip


@pytest.mark.slurm
def test_a_gate_on_slurm_cancels_what_waits_behind_it(cluster: Bench, devcluster: dc.Cluster) -> None:
    tokens = ("pipeline=dpo", "eval_sft.gate={metric: accuracy, at_least: 0.6}")
    done = cluster("pipeline", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = records(cluster, devcluster)
    waits = ours["dpo"].dependency
    assert ours["sft"].job_id in waits and ours["eval_sft"].job_id in waits
    assert ours["eval_sft"].job_id not in ours["eval_dpo"].dependency
    wait_for("no job is left", lambda: not any(j.live for j in records(cluster, devcluster).values()), 120)
    ended = {name: job.state for name, job in records(cluster, devcluster).items()}
    held = ("dpo", "grpo", "eval_dpo", "eval_grpo")
    assert ended["eval_sft"] == "FAILED" and {ended[name] for name in held} == {"CANCELLED"}, ended
    assert manifest.problem(cluster.run("dpo", "eval_sft").model) is None
    history = summarise(ledger.read(cluster.run("dpo", "eval_sft").ledger))
    assert (history.outcome, history.failures, history.attempts, history.gave_up) == ("finished", 0, 1, False)
    why = "accuracy 0.5 (0.4 to 0.6) is below at_least 0.6"
    seen = cluster.status("dpo")
    assert (seen["eval_sft"]["state"], seen["eval_sft"]["reason"]) == ("gated", f"gate: {why}")
    for name in held:
        assert (seen[name]["state"], seen[name]["reason"]) == ("cancelled", f"gate of eval_sft: {why}"), seen[name]
        assert seen[name]["attempts"] == 0 and not cluster.run("dpo", name).model.exists()

    again = cluster("pipeline", *tokens)
    assert again.returncode == 1 and f"eval_sft: gate: {why}; left out: dpo, grpo, " in again.stderr, again.stderr
    assert "nothing to submit" in again.stdout
    lower = cluster("pipeline", "pipeline=dpo", "eval_sft.gate.at_least=0.5")
    assert lower.returncode == 0, lower.stdout + lower.stderr
    assert job_of(cluster.run("dpo", "grpo")).result() == cluster.run("dpo", "grpo").model
    assert cluster.status("dpo")["eval_sft"]["attempts"] == 1


@pytest.mark.slurm
def test_one_stage_after_another(cluster: Bench, devcluster: dc.Cluster) -> None:
    assert "output of base" in cluster.refused("submit", "stage=sft")
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    again = cluster("submit", "stage=base")
    assert again.returncode == 0 and "queued or running already" in again.stdout
    assert cluster("submit", "stage=eval_base").returncode == 0
    seen = records(cluster, devcluster)
    assert seen["eval_base"].dependency.startswith(f"afterok:{seen['base'].job_id}")
    job = job_of(cluster.run("full", "eval_base"))
    # as if the command had died between sbatch and its note: the queue knows
    cluster.run("full", "eval_base").ledger.rename(cluster.folder / "ledger")
    again = cluster("submit", "stage=eval_base")
    assert f"{job.job_id} queued or running already" in " ".join(again.stdout.split()), again.stdout + again.stderr
    (cluster.folder / "ledger").rename(cluster.run("full", "eval_base").ledger)
    job.cancel()
    wait_for("cancelled", lambda: job.state == "CANCELLED")
    assert type(job.exception()).__name__ == "UncompletedJobError"


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["slurm.partition=gpuu"], ["slurm.partition=gpuu", "did you mean 'gpu'"]),
        (["slurm.gpus_per_node=16", "training.per_device_train_batch_size=1"], ["slurm.gpus_per_node=16", "at most 8"]),
        (["slurm.gpu_type=a100"], ["slurm.gpu_type=a100", "h100"]),
        (["slurm.num_nodes=8", "training.per_device_train_batch_size=1"], ["slurm.num_nodes=8", "has 4"]),
    ],
)
def test_what_the_cluster_lacks(cluster: Bench, tokens: list[str], words: list[str]) -> None:
    message = cluster.refused("pipeline", *tokens)
    for word in words:
        assert word in message


@pytest.mark.slurm
def test_a_chain_that_breaks_at_submission_leaves_nothing(cluster: Bench, devcluster: dc.Cluster) -> None:
    cluster.behave("base", "wait")
    before = cluster.files()
    done = cluster("pipeline", "pipeline=dpo", "grpo.slurm.constraint=nosuch")
    assert done.returncode == 2 and "grpo" in done.stderr and "Invalid feature" in done.stderr
    assert "Traceback" not in done.stderr
    assert cluster.files() == before
    found = slurm.jobs(user="root", conf=str(devcluster.conf))
    assert not isinstance(found, slurm.Unknown)
    mine = [job for job in found.values() if job.folder.startswith(f"{cluster.base}/")]
    assert len(mine) == 3 and not any(job.live for job in mine)


@pytest.mark.slurm
def test_no_answer_is_not_gone(cluster: Bench, tmp_path: Path) -> None:
    cluster.behave("base", "wait")
    assert cluster("submit", "stage=base").returncode == 0
    shim = tmp_path / "bin"
    shim.mkdir()
    (shim / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2\nexit 1\n")
    (shim / "squeue").chmod(0o755)
    path = cluster.env["PATH"]
    cluster.env["PATH"] = f"{shim}:{path}"
    done = cluster("submit", "stage=base")
    assert done.returncode == 2 and done.stderr.startswith("error: base: cannot tell"), done.stderr
    assert sum(event["event"] == "submitted" for event in ledger.read(cluster.run("full", "base").ledger)) == 1
    cluster.env["PATH"] = path


@pytest.mark.slurm
def test_a_submission_that_times_out_is_found_by_its_comment(cluster: Bench, tmp_path: Path) -> None:
    shim = tmp_path / "bin"
    shim.mkdir()
    real = subprocess.run(["which", "sbatch"], env=cluster.env, capture_output=True, text=True).stdout.strip()
    (shim / "sbatch").write_text(
        f'#!/bin/sh\n{real} "$@" >/dev/null\n'
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2\nexit 1\n"
    )
    (shim / "sbatch").chmod(0o755)
    cluster.env["PATH"] = f"{shim}:{cluster.env['PATH']}"
    cluster.behave("base", "wait")
    done = cluster("submit", "stage=base")
    assert done.returncode == 0, done.stderr
    job = job_of(cluster.run("full", "base"))
    assert not job.done()


@pytest.mark.slurm
def test_executor_is_submitits(
    devcluster: dc.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    import submitit

    from launchers.selection import select

    monkeypatch.setenv("PATH", devcluster.env["PATH"])
    monkeypatch.setenv("POST_TRAINING_DEVCLUSTER", str(devcluster.dir))
    cfg = select(["cluster=dev", "stage=base"], only_one=True).config("base")
    run = RunDirectory(tmp_path / "p" / "base")
    run.create()
    run.config.write_text(f"cluster: {{slurm_conf: {devcluster.conf}}}\n")
    text = textwrap.dedent(job_script(cfg, run, "/bin/false"))
    executor = RunExecutor(run, text, "dev", str(devcluster.conf))
    assert isinstance(executor, submitit.SlurmExecutor)
    job = executor.submit_run()
    assert isinstance(job, submitit.SlurmJob) and ledger.read(run.ledger)[0]["job_id"] == job.job_id
    assert job.get_info()["comment"].startswith(f"{run.root} token=")
    job.wait()
    assert job.state == "FAILED"
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        job.result()
