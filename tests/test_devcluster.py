"""launchers.devcluster, mostly on the real thing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from launchers import devcluster as dc
from tests.slurm_fixture import job, require_slurm, short_folder, submit, wait_for, wait_state

ROOT = Path(__file__).resolve().parent.parent
slurm = pytest.mark.slurm


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder; whatever cluster a test leaves in it is taken down."""
    require_slurm()
    path = short_folder()
    try:
        yield path
    finally:
        if (path / dc.MARKER).exists() or not path.exists():
            dc.down(path)
        shutil.rmtree(path, ignore_errors=True)


def cli(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launchers.devcluster", *argv]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=90, check=False
    )


def has_step(cluster: dc.Cluster, job_id: str) -> bool:
    """Whether the first srun of a job runs."""
    return f"{job_id}.0" in cluster.run("squeue", "-s", "-h").split()


def left_over(path: Path) -> list[str]:
    """Everything that lives and knows of the folder, found without devcluster's help."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            texts = [*process.cmdline(), *process.environ().values(), process.cwd()]
            texts += [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any(str(path) in text for text in texts):
            found.append(f"{process.pid} {process.cmdline()}")
    return found


# The cluster as its users see it.


@slurm
def test_nodes_are_idle_with_eight_h100s_each(devcluster: dc.Cluster) -> None:
    nodes = {node.name: (node.state, node.gres) for node in devcluster.node_states()}
    assert nodes == dict.fromkeys(("n1", "n2", "n3", "n4"), ("idle", "gpu:h100:8"))


@slurm
def test_a_job_sees_its_gpus_and_its_requests_fit(devcluster: dc.Cluster, tmp_path: Path) -> None:
    whole = ("--gpus-per-node=h100:8", "--cpus-per-gpu=8", "--mem=500G", "--nodes=4")
    text = 'echo "$CUDA_VISIBLE_DEVICES"; srun --ntasks-per-node=1 sh -c \'echo "$CUDA_VISIBLE_DEVICES"\''
    job_id = submit(devcluster, tmp_path / "whole", text, *whole)
    part = submit(devcluster, tmp_path / "part", 'echo "$CUDA_VISIBLE_DEVICES"', "--gpus-per-node=3")
    wait_state(devcluster, job_id, "COMPLETED")
    wait_state(devcluster, part, "COMPLETED")
    assert (tmp_path / "whole.out").read_text().split() == ["0,1,2,3,4,5,6,7"] * 5
    assert len((tmp_path / "part.out").read_text().strip().split(",")) == 3


@slurm
def test_srun_over_two_nodes_has_four_ranks(devcluster: dc.Cluster, tmp_path: Path) -> None:
    text = "srun sh -c 'echo \"$SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $SLURM_NTASKS\"'"
    job_id = submit(devcluster, tmp_path / "job", text, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    wait_state(devcluster, job_id, "COMPLETED")
    ranks = sorted(line.split() for line in (tmp_path / "job.out").read_text().splitlines())
    assert [(rank, local, size) for rank, _, local, size in ranks] == [
        ("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4"),
    ]  # fmt: skip
    first, second = ranks[0][1], ranks[2][1]
    assert first != second
    assert [node for _, node, _, _ in ranks] == [first, first, second, second]


@slurm
def test_afterok_survives_a_requeue_of_its_parent(devcluster: dc.Cluster, tmp_path: Path) -> None:
    text = """
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ -n "$SLURM_RESTART_COUNT" ] && exit 0
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
    """
    parent = submit(devcluster, tmp_path / "parent", text)
    child = submit(devcluster, tmp_path / "child", "echo child", f"--dependency=afterok:{parent}")
    wait_for("the requeue", lambda: job(devcluster, parent)["Restarts"] == "1")
    assert job(devcluster, child)["JobState"] == "PENDING"
    seen = wait_state(devcluster, parent, "COMPLETED")
    assert (seen["JobId"], seen["Restarts"]) == (parent, "1")
    wait_state(devcluster, child, "COMPLETED", timeout=10)
    assert (tmp_path / "parent.out").read_text().count("start") == 2
    assert (tmp_path / "child.out").read_text() == "child\n"


WHOLE = ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8")


@slurm
def test_high_preempts_low_which_is_requeued(folder: Path, tmp_path: Path) -> None:
    # No grace time here: SLURM looks for its end every 30 s only.
    cluster = dc.up(folder, grace_s=0)
    text = """
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ -n "$SLURM_RESTART_COUNT" ] && exit 0
    srun sleep 300
    """
    low = submit(cluster, tmp_path / "low", text, "--partition=low", *WHOLE)
    wait_for("the step of the low job", partial(has_step, cluster, low))
    high = submit(cluster, tmp_path / "high", "echo high", "--partition=high", *WHOLE)
    gpu = submit(cluster, tmp_path / "gpu", "sleep 1", "--partition=gpu", *WHOLE)
    assert wait_state(cluster, high, "COMPLETED")["Restarts"] == "0"
    seen = wait_state(cluster, low, "COMPLETED")
    assert (seen["JobId"], seen["Restarts"]) == (low, "1")
    assert (tmp_path / "low.out").read_text().splitlines()[-1] == "start 1"
    assert wait_state(cluster, gpu, "COMPLETED")["Restarts"] == "0"


@slurm
def test_a_job_that_ends_within_its_grace_is_not_requeued(devcluster: dc.Cluster, tmp_path: Path) -> None:
    """A fact of SLURM on which job scripts depend: they must requeue themselves before they end."""
    for end, state, restarts in (
        ("exit 0", "COMPLETED", "0"),
        ("exit 3", "FAILED", "0"),
        ("scontrol requeue $SLURM_JOB_ID; sleep 60", "COMPLETED", "1"),
    ):
        text = f'[ -n "$SLURM_RESTART_COUNT" ] && exit 0; srun sleep 300; {end}'
        low = submit(devcluster, tmp_path / "low", text, "--partition=low", *WHOLE)
        wait_for("the step of the low job", partial(has_step, devcluster, low))
        high = submit(devcluster, tmp_path / "high", "echo high", "--partition=high", *WHOLE)
        wait_state(devcluster, high, "COMPLETED")
        assert wait_state(devcluster, low, "COMPLETED", "FAILED")["JobState"] == state
        assert job(devcluster, low)["Restarts"] == restarts


# Its life.


@slurm
def test_two_clusters_side_by_side(devcluster: dc.Cluster, folder: Path, tmp_path: Path) -> None:
    other = dc.up(folder)
    assert not set(other.ports.values()) & set(devcluster.ports.values())
    held = [submit(each, tmp_path / f"held{i}", "true", "--hold") for i, each in enumerate((devcluster, other))]
    job_id = submit(other, tmp_path / "job", "echo $SLURM_CONF", "--gpus-per-node=8", "--nodes=4")
    wait_state(other, job_id, "COMPLETED")
    assert (tmp_path / "job.out").read_text().strip() == str(other.conf)
    assert devcluster.run("squeue", "-h", "-n", "job") == ""
    devcluster.run("scancel", held[0])
    assert other.run("squeue", "-h", "-o", "%i").split() == [held[1]]
    dc.down(folder)
    assert {node.state for node in devcluster.node_states()} == {"idle"}


@slurm
def test_down_leaves_no_process_and_no_folder(folder: Path, tmp_path: Path) -> None:
    cluster = dc.up(folder)
    # Processes that ignore signals, that left their session, and a daemon that left its parents.
    text = "srun bash -c \"trap '' TERM INT; setsid sleep 301 & (setsid sleep 302 &) ; sleep 303\" & sleep 304"
    submit(cluster, tmp_path / "job", text, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    wait_for("the job's processes", lambda: sum(" '30" in line for line in left_over(folder)) == 7)
    client = subprocess.Popen(["srun", "sleep", "305"], env=cluster.env, stderr=subprocess.DEVNULL)
    # Someone's editor, started from a shell in which SLURM_CONF is exported, and a look at a log.
    editor = subprocess.Popen(["sleep", "306"], env=cluster.env)
    look = subprocess.Popen(["tail", "-f", str(cluster.dir / "log/slurmctld.log")], stdout=subprocess.DEVNULL)
    try:
        done = cli("down", "--dir", str(folder))
        assert (done.returncode, done.stderr) == (0, "")
        assert not folder.exists()
        assert client.wait(timeout=10) != 0
        assert editor.poll() is None and look.poll() is None, "down killed a process that is not the cluster's"
    finally:
        for process in (client, editor, look):
            process.kill()
            process.wait()
    assert left_over(folder) == []
    assert all(dc._is_free(port) for port in cluster.ports.values())


@slurm
def test_the_command_line_from_up_to_down(folder: Path) -> None:
    # capture_output returns only when nobody holds the pipes any more: the daemons must not.
    first = cli("up", "--json", POST_TRAINING_DEVCLUSTER=str(folder), SLURM_JOB_ID="7", SBATCH_PARTITION="no")
    assert first.returncode == 0, first.stderr
    data = json.loads(first.stdout)
    assert data["running"] and data["conf"] == str(folder / "slurm.conf")
    assert [daemon["name"] for daemon in data["daemons"]] == ["munged", "slurmctld", "n1", "n2", "n3", "n4"]
    assert all(psutil.pid_exists(daemon["pid"]) for daemon in data["daemons"])
    assert [node["state"] for node in data["nodes"]] == ["idle"] * 4

    again = cli("up", "--json", "--dir", str(folder))
    assert (again.returncode, json.loads(again.stdout)) == (0, data)
    assert "already running" in cli("up", "--dir", str(folder)).stdout
    assert json.loads(cli("status", "--json", "--dir", str(folder)).stdout) == data
    table = cli("status", "--dir", str(folder)).stdout
    assert f"\nexport SLURM_CONF={folder}/slurm.conf\n" in table and "slurmctld" in table

    refused = cli("up", "--accounting", "--dir", str(folder))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert cli("down", "--dir", str(folder)).returncode == 0
    gone = cli("status", "--json", "--dir", str(folder))
    assert gone.returncode == 1 and not json.loads(gone.stdout)["running"]
    assert "no dev cluster" in cli("down", "--dir", str(folder)).stdout
    assert not folder.exists()


@slurm
def test_up_after_its_daemons_were_killed(folder: Path, tmp_path: Path) -> None:
    cluster = dc.up(folder)
    held = submit(cluster, tmp_path / "job", "echo ran", "--hold")
    cluster.restart_controller()  # so that the job is in the saved state
    before = cluster.pids()
    for name in ("n2", "munged"):
        os.kill(before[name], signal.SIGKILL)
    wait_for("two dead daemons", lambda: len(cluster.pids()) == len(before) - 2)
    assert not dc.status(folder).running
    some = dc.up(folder).pids()
    assert {name for name in before if before[name] != some[name]} == {"n2", "munged"}

    dc._kill_all(folder)  # as a reboot
    taken_port = cluster.ports["n3"]
    with socket.socket() as taken:  # another program took a port meanwhile
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", taken_port))
        taken.listen()
        cluster = dc.up(folder)
    known = dc.load(folder)
    assert known == cluster and known.ports["n3"] != taken_port
    cluster.run("scontrol", "release", held)
    wait_state(cluster, held, "COMPLETED")


@slurm
def test_faults_on_purpose(folder: Path, tmp_path: Path) -> None:
    cluster = dc.up(folder)
    job_id = submit(cluster, tmp_path / "job", "echo start; srun sleep 300", "-w", "n2")
    wait_for("the step", partial(has_step, cluster, job_id))
    cluster.restart_controller()
    assert job(cluster, job_id)["JobState"] == "RUNNING"

    cluster.stop_node("n2")  # its steps go on
    assert "n2" not in cluster.pids() and "srun" in str(left_over(folder))
    cluster.start_node("n2")
    assert job(cluster, job_id)["JobState"] == "RUNNING"

    cluster.fail_node("n2")
    wait_for("the job's processes to be gone", lambda: "'300'" not in str(left_over(folder)), timeout=5)
    assert {name for name in cluster.daemons if name not in cluster.pids()} == {"n2"}
    wait_for("the job to be requeued", lambda: job(cluster, job_id)["Restarts"] == "1")
    cluster.start_node("n2")
    wait_state(cluster, job_id, "RUNNING")
    with pytest.raises(dc.DevClusterError, match="no node 'n5'; the nodes are n1, n2, n3, n4"):
        cluster.stop_node("n5")


@slurm
def test_an_up_that_fails_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shutil.copytree(dc.TEMPLATES, tmp_path / "templates")
    with (broken / "slurm.conf.j2").open("a") as file:
        file.write("\nNoSuchKey=1\n")
    monkeypatch.setattr(dc, "TEMPLATES", broken)
    with pytest.raises(dc.DevClusterError, match=r"(?s)slurmctld ended.*NoSuchKey") as error:
        dc.up(folder)
    assert error.value.code == 1
    assert left_over(folder) == []
    assert folder.is_dir() and not any(folder.iterdir())  # it was there before
    folder.rmdir()
    with pytest.raises(dc.DevClusterError):
        dc.up(folder)
    assert not folder.exists()


@slurm
def test_a_terminated_up_leaves_nothing(folder: Path) -> None:
    for stop in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-m", "launchers.devcluster", "up", "--dir", str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for("the first log", lambda: (folder / "log/slurmctld.out").exists())
        process.send_signal(stop)
        assert process.wait(timeout=30) != 0
        assert left_over(folder) == []
        assert not (folder / dc.MARKER).exists()


@slurm
def test_accounting(folder: Path, tmp_path: Path) -> None:
    require_slurm(accounting=True)
    cluster = dc.up(folder, accounting=True)
    job_id = submit(cluster, tmp_path / "job", "true", "--gpus-per-node=2", "--comment=token")
    wait_state(cluster, job_id, "COMPLETED")
    ask = ("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,Comment,AllocTRES")
    line = wait_for("sacct", lambda: cluster.run(*ask).startswith("COMPLETED") and cluster.run(*ask))
    assert line and line.startswith("COMPLETED|token|") and "gres/gpu=2" in line
    dc.down(folder)
    assert left_over(folder) == [] and not folder.exists()


# Without SLURM.


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_TRAINING_DEVCLUSTER", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert dc.default_dir() == Path("/home/ada/.local/state/post_training/devcluster")
    monkeypatch.setenv("POST_TRAINING_DEVCLUSTER", "~/dc")
    assert dc.default_dir() == Path("/home/ada/dc")


def test_rendering_is_pure_and_complete() -> None:
    ports = {"slurmctld": 1, "slurmdbd": 2, "n1": 3, "n2": 4, "n3": 5, "n4": 6}
    cluster = dc.Cluster(Path("/nowhere"), ports, accounting=True, grace_s=7)
    texts = dc.render(cluster, "host")
    assert texts == dc.render(cluster, "host")
    assert set(texts) == {"slurm.conf", "gres.conf", "slurmdbd.conf"}
    conf = texts["slurm.conf"].splitlines()
    assert "SlurmctldHost=host(127.0.0.1)" in conf and "AccountingStoragePort=2" in conf
    assert "NodeName=n4 NodeHostname=host NodeAddr=127.0.0.1 Port=6" in conf
    assert "PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=7" in conf
    assert texts["gres.conf"].splitlines()[3] == (
        "NodeName=n4 Name=gpu Type=h100 File=/nowhere/dev/n4-nvidia[0-7] Flags=nvidia_gpu_env"
    )
    assert "slurmdbd" not in dc.render(dc.Cluster(Path("/nowhere"), ports), "host")["slurm.conf"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/tmp/with blank", "no blanks"),
        ("/tmp/a,b", "no blanks"),
        ("/tmp/" + "x" * 80, "at most"),
        ("/dev/null", "not a folder"),
    ],
)
def test_folders_that_cannot_be(path: str, message: str) -> None:
    for act in (dc.up, dc.down, dc.status):
        with pytest.raises(dc.DevClusterError, match=message) as error:
            act(path)
        assert error.value.code == 2


def test_the_environment_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("KEPT", "1")
    env = dc.Cluster(Path("/nowhere"), {}).env
    assert env["SLURM_CONF"] == "/nowhere/slurm.conf" and env["KEPT"] == "1"
    assert [key for key in env if key.startswith(("SLURM_", "SQUEUE_"))] == ["SLURM_CONF"]


def test_what_is_missing_is_said_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = dc._find
    monkeypatch.setattr(dc, "_find", lambda program: None if program == "slurmd" else "/bin/true")
    assert dc.main(["up", "--dir", str(folder / "c")]) == 2
    text = capsys.readouterr().err
    assert text == f"devcluster: not installed: slurmd. Try: {dc.APT}\n"
    monkeypatch.setattr(dc, "_find", lambda program: None if program == "mariadbd" else "/bin/true")
    assert dc.main(["up", "--accounting", "--dir", str(folder / "c")]) == 2
    assert dc.APT_ACCOUNTING in capsys.readouterr().err
    monkeypatch.setattr(dc, "_find", lambda program: real("true"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("up", "down"):
        assert dc.main([command, "--dir", str(folder / "c")]) == 2
        text = capsys.readouterr().err
        assert "needs root" in text and text.count("\n") == 1
    assert not (folder / "c").exists()


def test_only_its_own_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(dc, "_find", lambda program: "/bin/true")
    path = Path("/tmp") / f"ptdc-foreign-{os.getpid()}"
    path.mkdir()
    try:
        (path / "thesis.tex").touch()
        for marker in (None, "not json", "[]", json.dumps({"made_by": dc.MADE_BY, "dir": "/elsewhere"})):
            if marker is not None:
                (path / dc.MARKER).write_text(marker)
            for act in (dc.up, dc.down):
                with pytest.raises(dc.DevClusterError):
                    act(path)
            assert (path / "thesis.tex").exists()
    finally:
        shutil.rmtree(path)


def test_a_mknod_that_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "mknod", refused)
    with pytest.raises(dc.DevClusterError, match=r"mknod .*: Operation not permitted") as error:
        dc.up(folder)
    assert error.value.code == 2 and not any(folder.iterdir())
