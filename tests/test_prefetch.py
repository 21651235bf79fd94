"""Downloads for nodes without internet, from a hub that is a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conf.check import ConfigError
from conf.schema import Config
from launchers import prefetch
from launchers.compose import rewrite, rewrite_stage
from launchers.hub import cache_of, in_cache
from launchers.preflight import check_paths
from launchers.selection import select
from post_training.data.tokenizer import bytes_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = (
    "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
    "  - {split: test, path: main/test.jsonl}\n- config_name: other\n  data_files: nothing.jsonl\n---\n"
)
SUM = json.dumps({"question": "2+3?", "answer": "Add.\n#### 5"}) + "\n"


class Hub:
    """A hub of a few repositories. `asked`: the paths of all requests."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos, self.asked = repos, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/\w+)?", path):
            repo = f"{match[1]}/{match[2]}"
            if repo in self.repos:
                files = [{"rfilename": name} for name in self.repos[repo]]
                about = {"id": match[2], "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
                return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/\w+", path):
            files = self.repos.get(f"{match[1]}/{match[2]}", {})
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            content = self.repos.get(f"{'datasets' if match[1] else 'models'}/{match[2]}", {}).get(match[3])
            if content is not None:
                return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}, content
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save_pretrained(folder)
    tokenizer = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = {"model.safetensors": b"safe" * 100, "pytorch_model.bin": b"pickle", "config.json": b"{}"}
    made = Hub({
        "models/some/model": {**tokenizer, **weights},
        "models/some/words": {**tokenizer, "model.safetensors": b"not wanted"},
        "datasets/openai/gsm8k": {
            "README.md": README.encode(),
            "main/train.jsonl": SUM.encode() * 40,
            "main/test.jsonl": SUM.encode() * 10,
        },
    })  # fmt: skip
    yield made
    made.server.shutdown()


def environment(hub_url: str, home: Path) -> dict[str, str]:
    gone = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    kept = {k: v for k, v in os.environ.items() if k not in gone}
    return kept | {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip


def run(hub_url: str, home: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launchers.prefetch", "cluster=local", f"paths.output_base={home}", *overrides]
    return subprocess.run(command, env=environment(hub_url, home), cwd=home, capture_output=True, text=True)


SFT = ("stage=sft", "model.name_or_path=some/model", "data=gsm8k", "offline=true")


def test_what_is_downloaded_is_there_offline(hub: Hub, tmp_path: Path) -> None:
    cache = cache_of({"HF_HOME": str(tmp_path)})
    planned = run(hub.url, tmp_path, *SFT, "dry_run=true")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.splitlines() == [
        "model     some/model  to download (model.name_or_path)",
        "dataset   openai/gsm8k  to download (data.name)",
    ]
    assert not cache.exists()

    cfg = Config(offline=True, stage="sft")
    cfg.model.name_or_path, cfg.data.name, cfg.paths.output_base = "some/model", "gsm8k", str(tmp_path)
    cfg.slurm.env = {"HF_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"model\.name_or_path=some/model: .*\n  fix: python -m launchers\.prefetch"):
        check_paths(cfg)

    done = run(hub.url, tmp_path, *SFT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"model +some/model +\S+ k?B downloaded: ", done.stdout)
    assert "sft: everything is there; now the same with offline=true" in done.stdout
    assert in_cache("model", "some/model", cache) and in_cache("dataset", "openai/gsm8k", cache)
    names = {path.name for path in cache.glob("models--some--model/snapshots/*/*")}
    assert "model.safetensors" in names and "tokenizer.json" in names and "pytorch_model.bin" not in names
    check_paths(cfg)

    again = run(hub.url, tmp_path, *SFT)
    assert again.returncode == 0 and again.stdout.count("there already") == 2

    hub.asked.clear()
    code = (
        "from conf.schema import *; from post_training import data; from post_training.data.tokenizer import *\n"
        "load_tokenizer(Model(), 'some/model')\n"
        "source = data.load(Data(name='gsm8k', held_out=5))\n"
        "print(len(source.problems('train')), len(source.problems('held_out')))"
    )
    offline = environment(hub.url, tmp_path) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    job = subprocess.run([sys.executable, "-c", code], env=offline, cwd=tmp_path, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1] == "40 5"
    assert hub.asked == []


def test_a_tokenizer_alone_comes_without_weights(hub: Hub, tmp_path: Path) -> None:
    done = run(hub.url, tmp_path, "stage=base", "model.tokenizer=some/words")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in cache_of({"HF_HOME": str(tmp_path)}).glob("models--some--words/snapshots/*/*")}
    assert "tokenizer.json" in names and "model.safetensors" not in names


def test_what_cannot_be_had_is_said_and_the_rest_is_done(hub: Hub, tmp_path: Path) -> None:
    done = run(hub.url, tmp_path, "stage=sft", "model.name_or_path=no/such", "data=gsm8k")
    assert done.returncode == 1
    assert "error: model.name_or_path=no/such: the hub has none of this name" in done.stderr
    assert "fix: mend model.name_or_path" in done.stderr and "1 of 2 could not be downloaded" in done.stderr
    assert "openai/gsm8k" in done.stdout


def test_no_internet_is_said_in_words(tmp_path: Path) -> None:
    done = run("http://127.0.0.1:9", tmp_path, "stage=sft", "model.name_or_path=some/model")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: model.name_or_path=some/model: the hub does not answer" in done.stderr
    assert "fix: run this on a node that has internet" in done.stderr


def wanted(tmp_path: Path, *overrides: str, only_one: bool = False) -> list[tuple[str, str, str]]:
    tokens = ["cluster=local", f"paths.output_base={tmp_path}", *overrides]
    selection = select([rewrite_stage(rewrite(token)) for token in tokens], only_one=only_one)
    return [(item.kind, item.repo, item.key) for item in prefetch.wanted(selection)]


def test_a_pipeline_wants_each_thing_once(tmp_path: Path) -> None:
    local = tmp_path / "records.jsonl"
    local.write_text(SUM)
    assert wanted(tmp_path, "pipeline=full") == []
    found = wanted(
        tmp_path, "pipeline=full", "model.name_or_path=Qwen/Qwen3-0.6B", "sft.data=gsm8k", "grpo.data=gsm8k",
        "rm.data=hh_rlhf", "eval_sft.data=gsm8k", f"eval_sft.data.path={local}", "dpo.inputs.reference=other/model",
    )  # fmt: skip
    assert found == [
        ("model", "Qwen/Qwen3-0.6B", "model.name_or_path"),
        ("dataset", "openai/gsm8k", "data.name"),
        ("dataset", "Anthropic/hh-rlhf", "data.name"),
        ("model", "other/model", "dpo.inputs.reference"),
    ]


def test_a_broken_off_download_is_no_download(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b"
    for path in ("refs/main", "snapshots/1/config.json", "blobs/1"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    assert in_cache("model", "a/b", tmp_path) and not in_cache("dataset", "a/b", tmp_path)
    (folder / "blobs" / "2.incomplete").write_text("")
    assert not in_cache("model", "a/b", tmp_path)


def test_cache_is_where_the_hub_library_looks() -> None:
    for env in ({"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b", "HF_HOME": "/a"}, {"XDG_CACHE_HOME": "/c"}, {}):
        code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
        clean = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **env}
        theirs = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True).stdout.strip()
        assert str(cache_of(env)) == theirs
