"""Environments and containers: job scripts that run in them, to the end and through a requeue on a real SLURM.

No Apptainer and no enroot can be had from Debian or PyPI: programs of these names stand on PATH that take the real
ones' options (refusing others) and run the command in a root file system of its own, by unshare and chroot. There is
no scontrol in it, and nothing of the node but what was bound.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf.check import ConfigError, check_run, runs_here
from conf.schema import Cluster, Config, Container, Notify, Paths, Slurm
from launchers.preflight import check_places
from launchers.render import container, job_script, mounts, python_of
from launchers.submission import folders_of
from launchers.submit import snapshot
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise
from tests.slurm_fixture import wait_for
from tests.test_failures import SlurmRun, runs
from tests.test_notify import Hook, hook

__all__ = ["hook", "runs"]

ENTER = """#!/bin/bash
# enter IMAGE BINDS FOLDER COMMAND...: BINDS are source[:destination[:flags]], by commas
image=$1 binds=$2 folder=$3
shift 3
export IMAGE=$image BINDS=$binds FOLDER=$folder
exec @UNSHARE@ bash -c '
  set -e
  mount --make-rprivate /
  IFS=, read -ra all <<<"$BINDS"
  for bind in @OWN@ "${all[@]}"; do
    source=${bind%%:*} rest=${bind#"${bind%%:*}"}
    destination=${rest#:} destination=${destination%%:*}
    destination=${destination:-$source}
    [ -e "$source" ] || { echo "FATAL: mount source $source does not exist" >&2; exit 255; }
    mkdir -p "$IMAGE$destination"
    mount --rbind "$source" "$IMAGE$destination"
    case $bind in *:ro) mount -o remount,bind,ro "$IMAGE$destination" ;; esac
  done
  unset LD_LIBRARY_PATH
  export PATH=/usr/local/bin:/usr/bin:/bin PYTHONPATH=/of/the/image TEXT=image  # an image may set these
  exec /usr/sbin/chroot "$IMAGE" /bin/sh -c "cd \\"\\$FOLDER\\" && exec \\"\\$@\\"" sh "$@"
' enter "$@"
"""
APPTAINER = """#!/bin/bash
printf '%s\\n' "apptainer $*" >>"@LOG@"
binds="" folder=/
if [ "$1" = --silent ]; then shift; fi
if [ "$1" != exec ]; then echo "Error for command: $1" >&2; exit 255; fi
shift
while [[ $1 == -* ]]; do
  case $1 in
    --bind) binds=$2; shift 2 ;;
    --pwd) folder=$2; shift 2 ;;
    --nv | --no-home) shift ;;
    *) echo "Error for command exec: unknown flag: $1" >&2; exit 255 ;;
  esac
done
image=$1
shift
[ -d "$image" ] || { echo "FATAL: could not open image $image" >&2; exit 255; }
exec "@HERE@/enter" "$image" "$binds" "$folder" "$@"
"""
SRUN = """#!/bin/bash
# what pyxis, a plugin of srun, does with --container-*: the task runs in the image
options=() image="" binds="" folder=/
while [[ $1 == -* ]]; do
  case $1 in
    --container-image=*) image=${1#*=} ;;
    --container-mounts=*) binds=${1#*=} ;;
    --container-workdir=*) folder=${1#*=} ;;
    --container-remap-root | --no-container-mount-home) ;;
    --container-*) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
    *) options+=("$1") ;;
  esac
  shift
done
printf '%s\\n' "srun ${image:-host} $*" >>"@LOG@"
if [ -n "$image" ]; then set -- "@HERE@/enter" "$image" "$binds" "$folder" "$@"; fi
exec @SRUN@ "${options[@]}" "$@"
"""
UNSHARE = "unshare --mount" if os.getuid() == 0 else "unshare --user --map-root-user --mount"


class Runtime:
    """The stand-ins, and an image: a root file system with a Python that has PyYAML, and without SLURM."""

    def __init__(self, folder: Path) -> None:
        self.here, self.image, self.log = folder / "bin", folder / "my image", folder / "log"
        self.here.mkdir()
        for name in ("usr/bin", "usr/lib", "usr/lib64", "etc", "proc", "dev"):
            (self.image / name).mkdir(parents=True)
        for name in ("lib", "lib64", "bin"):
            (self.image / name).symlink_to(f"usr/{name}")
        for program in ("env", "sh"):
            shutil.copy(shutil.which(program) or "", self.image / "usr/bin" / program)
        python = self.image / "usr/bin/python3"
        prefix = os.path.realpath(sys.prefix)
        python.write_text(f'#!/bin/sh\nexec {prefix}/bin/python "$@"\n')
        python.chmod(0o755)
        own = ["/usr/lib", "/usr/lib64", "/proc", "/dev", prefix, os.path.realpath(sys.base_prefix)]
        texts = {"enter": ENTER, "apptainer": APPTAINER, "srun": SRUN}
        for name, text in texts.items():
            for word, value in {
                "HERE": str(self.here), "LOG": str(self.log), "OWN": " ".join(dict.fromkeys(own)), "UNSHARE": UNSHARE,
                "SRUN": shutil.which("srun") or "srun",
            }.items():  # fmt: skip
                text = text.replace(f"@{word}@", value)
            (self.here / name).write_text(text)
            (self.here / name).chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    why = subprocess.run([*UNSHARE.split(), "true"], capture_output=True, text=True)
    if why.returncode != 0:
        (pytest.fail if os.environ.get("CI", "").lower() in ("true", "1") else pytest.skip)(why.stderr)
    runtime = Runtime(tmp_path)
    monkeypatch.setenv("PATH", f"{runtime.here}:{os.environ['PATH']}")
    yield runtime


# ----------------------------------------------------------------------------- on this machine, without SLURM

STUB = """
import os, shutil, sys
from pathlib import Path
from post_training.run import manifest
from post_training.run.directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
seen = [sys.prefix, os.getcwd(), shutil.which("scontrol"), os.environ.get("TEXT"), os.environ["PYTHONPATH"],
        os.path.exists("/usr/share")]
(run.root / "seen").write_text("\\n".join(map(str, seen)))
run.model.mkdir()
(run.model / "weights").write_text("w")
manifest.write(run.model, identity="x")
"""


def local_run(root: Path, config: Config) -> tuple[RunDirectory, subprocess.CompletedProcess[str]]:
    """The job script of a run on this machine, with a stub for training, run to its end."""
    run = RunDirectory(root)
    run.create()
    for name, content in snapshot().items():
        if name.startswith("post_training/run/") or name == "post_training/__init__.py":
            path = run.code / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (run.code / "post_training/train.py").write_text(STUB)
    run.config.write_text(yaml.safe_dump({"slurm": {"max_failures": 1}, "inputs": {"model": None}}))
    run.script.write_text(job_script(config, run, python_of(config)))
    env = {**os.environ, "POST_TRAINING_JOB_ID": "local-1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", str(run.script)], env=env, capture_output=True, text=True, timeout=60)
    return run, done


def config_of(base: Path, scheduler: str = "local", env: dict[str, str] | None = None, **more: Any) -> Config:
    slurm = Slurm(gpus_per_node=0, cpus_per_gpu=1, env=env or {}, **{k: v for k, v in more.items() if k != "container"})
    return Config(
        cluster=Cluster(name=scheduler, scheduler=scheduler), slurm=slurm, paths=Paths(output_base=str(base)),
        container=more.get("container", Container()),
    )  # fmt: skip


def test_a_run_in_apptainer(tmp_path: Path, runtime: Runtime) -> None:
    base = tmp_path / "it's 1 base"
    asked = Container(image=str(runtime.image), mounts=["/etc:/in:ro"])
    config = config_of(base, env={"TEXT": "it's $X"}, container=asked)
    run, done = local_run(base / "full" / "sft", config)
    assert done.returncode == 0, done.stderr
    prefix, folder, scontrol, text, path, share = (run.root / "seen").read_text().splitlines()
    assert prefix == os.path.realpath(sys.prefix) and folder == str(run.root) and scontrol == "None"
    assert text == "it's $X" and path == str(run.code) and share == "False"
    assert summarise(ledger.read(run.ledger)).outcome == "finished" and manifest.problem(run.model) is None
    calls = runtime.calls()
    assert all(call.startswith("apptainer --silent exec --bind /etc:/in:ro,") for call in calls)
    words = ("run.life begin", "post_training.train ", "run.life end")
    assert [next(word for word in words if word in call) for call in calls] == list(words)


def test_an_image_that_is_gone_runs_nothing(tmp_path: Path, runtime: Runtime) -> None:
    config = config_of(tmp_path / "base", container=Container(image=str(tmp_path / "gone.sif")))
    run, done = local_run(tmp_path / "base" / "full" / "sft", config)
    assert done.returncode == 255 and "could not open image" in done.stderr and not run.ledger.exists()


def test_a_run_in_a_virtual_environment(tmp_path: Path) -> None:
    venv = tmp_path / "it's mine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "there.pth").write_text(f"{Path(yaml.__file__).parent.parent}\n")
    config = config_of(tmp_path, venv=str(venv))
    check_run(replace(config, training=replace(config.training, max_steps=1)))
    check_places(config)
    run, done = local_run(tmp_path / "full" / "sft", config)
    assert done.returncode == 0, done.stderr
    assert (run.root / "seen").read_text().splitlines()[0] == str(venv)
    shutil.rmtree(venv)
    with pytest.raises(ConfigError, match=r"slurm\.venv=.*holds no virtual environment"):
        check_places(config)
    _, done = local_run(tmp_path / "full" / "dpo", config)
    assert done.returncode == 2 and "error: slurm.venv cannot be activated on" in done.stderr


CONDA = """#!/bin/bash
# the hook of conda defines a shell function, as the real one does
[ "$*" = "shell.bash hook" ] || exit 1
cat <<'END'
conda() {
  [ "$1" = activate ] && [ "$2" = "it's mine" ] || { echo "EnvironmentNameNotFound: $2" >&2; return 1; }
  echo "${NEVER_SET_BY_ANYBODY}" >/dev/null
  export PATH="@ENV@/bin:$PATH" CONDA_DEFAULT_ENV="$2"
}
END
"""


def test_a_run_in_a_conda_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conda"
    (folder / "bin").mkdir(parents=True)
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "bin" / "conda").write_text(CONDA.replace("@ENV@", str(folder / "env")))
    (folder / "env" / "bin" / "python").write_text(f'#!/bin/sh\nTEXT=conda exec {sys.executable} "$@"\n')
    for path in (folder / "bin" / "conda", folder / "env" / "bin" / "python"):
        path.chmod(0o755)
    monkeypatch.delenv("CONDA_EXE", raising=False)
    config = config_of(tmp_path, conda="it's mine", setup=[f"export PATH={folder}/bin:$PATH"])
    run, done = local_run(tmp_path / "full" / "sft", config)
    assert done.returncode == 0, done.stderr
    assert (run.root / "seen").read_text().splitlines()[3] == "conda"
    _, done = local_run(tmp_path / "full" / "dpo", replace(config, slurm=replace(config.slurm, conda="other")))
    assert done.returncode == 2 and "error: slurm.conda cannot be activated on" in done.stderr
    _, done = local_run(tmp_path / "full" / "rm", replace(config, slurm=replace(config.slurm, setup=[])))
    assert done.returncode == 2 and "error: slurm.conda cannot be activated on" in done.stderr


# ------------------------------------------------------------------------------------------- on a real SLURM


@pytest.mark.slurm
def test_runs_in_containers_are_requeued_though_these_have_no_scontrol(
    runs: Callable[..., SlurmRun], runtime: Runtime, hook: Hook
) -> None:
    """All at once, since each waits for the hold after a requeue: stopped on request, requeued, done.

    They tell it too: what the submitter's environment has reaches the nodes and the containers, and is written nowhere.
    """
    ways = {
        "apptainer": Container(image=str(runtime.image)),
        "killed": Container(image=str(runtime.image)),
        "pyxis": Container(image=str(runtime.image), runtime="pyxis", arguments=["--container-remap-root"]),
        "host-python": Container(image=str(runtime.image), runtime="pyxis", host_python=sys.executable),
    }
    started = {}
    for name, asked in ways.items():
        run = runs("wait finish", name)
        run.cfg = replace(run.cfg, container=asked, paths=Paths(output_base=str(run.run.root.parent)))
        asked_to_tell = vars(Notify(events=["done", "requeued"], webhook=True))
        run.run.config.write_text(yaml.safe_dump({**run.run.read_config(), "notify": asked_to_tell}))
        with (run.run.code / "post_training/train.py").open("a") as file:
            file.write(
                "import shutil\n(run.root / f'inside-{attempt}').write_text("
                "f\"{shutil.which('scontrol')} {os.environ['SLURM_JOB_ID']} {os.environ['CUDA_VISIBLE_DEVICES']}\")\n"
            )
        started[name] = run.submit(python="python3")
    for name, run in started.items():
        run.rank(1)
        if name == "killed":
            wait_for("the guard", lambda run=run: any("guard" in call for call in runtime.calls()), 30)
            os.kill(run.shell(), 9)
        else:
            run.cluster.run("scancel", "--batch", "--signal=USR1", run.job_id)
    for name, run in started.items():
        run.finish()
        first = run.ends(2)[0]
        assert first["action"] == "requeue", (name, first)
        assert first["outcome"] == ("crashed" if name == "killed" else "stopped"), (name, first)
        assert run.history().attempts == 2
        scontrol, job_id, gpu = (run.run.root / "inside-2").read_text().split()
        assert (scontrol, job_id, gpu.isdigit()) == ("None", run.job_id, True), name
        told = [item["post_training"] for item in hook.got if item["post_training"]["stage"] == name]
        assert [(item["event"], item["attempt"]) for item in told] == [("requeued", 2), ("done", 2)]
        files = [path for path in run.run.root.rglob("*") if path.is_file()]
        assert len(files) > 20 and not any(b"0HIDDEN" in path.read_bytes() for path in files)
    calls = "\n".join(call for call in runtime.calls() if "host-python" in call and "run.life" in call)
    assert calls == ""  # not in the container: the node's own Python


# ------------------------------------------------------------------------------------------------- pure


def test_what_a_container_sees() -> None:
    given = ["/data", "/scratch/me:/in:ro"]
    assert mounts(given, ["/data/x", "/database", "/out/a", "/out", "/scratch/me"]) == [*given, "/database", "/out"]
    with pytest.raises(ConfigError, match="no path with a comma or colon"):
        mounts([], ["/out,1"])
    assert mounts(["/out"], ["/out/a,b"]) == ["/out"]


@given(
    st.lists(st.sampled_from(["/a", "/a/b", "/a/b/c", "/ab", "/d", "/"])), st.lists(st.sampled_from(["/a", "/d:/e"]))
)
def test_each_folder_is_seen_once(folders: list[str], own: list[str]) -> None:
    found = mounts(own, folders)
    assert found[: len(own)] == own
    for folder in folders:
        assert any((folder + "/").startswith(mount.split(":")[0].rstrip("/") + "/") for mount in found)
    rest = found[len(own) :]
    assert len(set(rest)) == len(rest)
    assert not any(a != b and (a + "/").startswith(b.rstrip("/") + "/") for a in rest for b in rest)


def test_gpus_are_given_to_apptainer() -> None:
    run = RunDirectory(Path("/out/full/sft"))

    def words(**asked: Any) -> list[str]:
        config = replace(config_of(Path("/out"), "slurm"), container=Container(image="/i.sif", **asked))
        found = container(replace(config, slurm=Slurm(gpus_per_node=8)), run, ["/data/model", "/out/x"])
        assert found is not None
        return found["command"]

    assert words() == [
        "apptainer", "--silent", "exec", "--nv", "--bind", "/data/model,/out", "--pwd", "/out/full/sft", "/i.sif",
    ]  # fmt: skip
    assert "--nv" not in words(arguments=["--rocm"])
    assert words(runtime="singularity")[0] == "singularity"
    assert container(Config(), run, []) is None


def test_folders_that_a_frozen_config_names() -> None:
    judge = {"questions": "/q.jsonl", "reference": None}
    frozen = {
        "model": {"name_or_path": "/models/llama", "tokenizer": "bytes"}, "merge": {"adapter": "/adapter"},
        "data": {"path": "/data/x", "eval_path": None, "datasets": [{"path": "org/name"}, {"path": "/data/y"}]},
        "inputs": {"model": {"path": "/other/sft/model"}, "data": None}, "seed": 1,
        "eval": {"tasks_path": None, "text": {"path": None}, "judge": judge},
    }  # fmt: skip
    assert folders_of(frozen) == ["/adapter", "/data/x", "/data/y", "/models/llama", "/other/sft/model", "/q.jsonl"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(slurm=Slurm(venv="venv")), "slurm.venv"),
        (Config(slurm=Slurm(venv="/v", conda="c")), "slurm.conda"),
        (Config(slurm=Slurm(conda="c"), container=Container(image="/i")), "container.image"),
        (Config(slurm=Slurm(conda="--help")), "slurm.conda"),
        (Config(container=Container(image="docker://nvcr.io/nvidia/pytorch")), "container.image"),
        (Config(container=Container(image="")), "container.image"),
        (Config(container=Container(image="/i", runtime="docker")), "container.runtime"),
        (Config(container=Container(image="/i", arguments=["--cleanenv"])), "container.arguments"),
        (Config(container=Container(image="/i", runtime="pyxis", arguments=["--nv"])), "container.arguments"),
        (Config(container=Container(image="/i", mounts=["data"])), "container.mounts"),
        (Config(container=Container(image="/i", mounts=["/a,/b"])), "container.mounts"),
        (
            Config(container=Container(image="/i", runtime="pyxis"), cluster=Cluster(scheduler="local")),
            "container.runtime",
        ),
    ],
)
def test_bad_configs(config: Config, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(config)
    assert error.value.key == key and error.value.fix


def test_packages_of_another_python_are_not_looked_for_here() -> None:
    assert runs_here(Config()) and python_of(Config()) == sys.executable
    for config, python in (
        (Config(slurm=Slurm(venv="/v")), "/v/bin/python"), (Config(slurm=Slurm(conda="c")), "python"),
        (Config(container=Container(image="/i")), "python3"), (Config(cluster=Cluster(python="/p")), "/p"),
    ):  # fmt: skip
        assert not runs_here(config) and python_of(config) == python


def test_an_image_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"container\.image=.*there is no such file"):
        check_places(Config(container=Container(image=str(tmp_path / "x.sif"))))
    check_places(Config(container=Container(image="nvcr.io#nvidia/pytorch:25.01-py3", runtime="pyxis")))
