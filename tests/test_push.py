"""Outputs on a hub that is a small server on this machine: what is sent, what the card says, what never leaves."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, snapshot_download
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from launchers import card, push
from post_training.run import ledger, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure, Results
from tests.training import make_run

SECRET = "wandb0123456789abcdef0123456789abcdef"
TOKEN = "hf_" + "t" * 30


class Hub:
    """A hub that takes commits. Each repository: whether it is private, its files, and the names of its commits."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse: tuple[str, int] | None = None  # a part of a path, and the status it is answered with
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                hub.asked.append(f"{self.command} {path}")
                status, headers, out = hub.answer(self.command, path, body, self.headers.get("Authorization"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(out)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(out)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sha(self, repo: dict[str, Any]) -> str:
        return hashlib.sha1(json.dumps([repo["name"], *repo["commits"]]).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes, who: str | None) -> tuple[int, dict[str, str], bytes]:
        if self.refuse is not None and self.refuse[0] in path:
            return self.refuse[1], {}, b'{"error": "refused"}'
        if path.startswith("/objects/"):  # signed addresses need no token
            if hashlib.sha256(body).hexdigest() != path[9:]:
                return 400, {}, b""
            self.objects[path[9:]] = body
            return 200, {}, b""
        if who != f"Bearer {TOKEN}":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            key = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            self.repos[key] = {
                "name": key, "private": asked.get("visibility") == "private", "files": {}, "commits": [],
            }  # fmt: skip
            return _json({"url": f"{self.url}/{key.removeprefix('models/')}"})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}}
                if o["oid"] not in self.objects
                else o
                for o in json.loads(body)["objects"]
            ]
            return _json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            repo = self.repos[f"{'datasets' if found[1] else 'models'}/{found[2]}"]
            content = repo["files"].get(found[3])
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": self.sha(repo)}, content
        found = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(\w+)/(\w+).*)?", path)
        if found is None or found[1] not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        repo, files = self.repos[found[1]], self.repos[found[1]]["files"]
        match found[2]:
            case None | "revision":
                names = [{"rfilename": name} for name in files]
                about = {"id": found[1].partition("/")[2], "private": repo["private"], "sha": self.sha(repo)}
                return _json({**about, "siblings": names, "tags": [], "downloads": 0})
            case "tree":
                return _json([{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in files.items()])
            case "preupload":
                return _json({"files": [
                    {
                        "path": f["path"], "shouldIgnore": False,
                        "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".jsonl")) else "regular",
                        "oid": self._remote(f["path"], files.get(f["path"])),
                    }
                    for f in json.loads(body)["files"]
                ]})  # fmt: skip
            case "commit":
                for line in map(json.loads, body.decode().splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        repo["commits"].append(value["summary"])
                    elif line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                return _json(
                    {
                        "commitUrl": f"{self.url}/{found[1].removeprefix('models/')}/commit/x",
                        "commitOid": self.sha(repo),
                    }
                )
        return 404, {}, b""

    def _remote(self, name: str, content: bytes | None) -> str | None:
        if content is None:
            return None
        large = name.endswith((".safetensors", ".jsonl"))
        return hashlib.sha256(content).hexdigest() if large else _oid(content)


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The hub, empty, and an environment in which it is the hub; with secrets that must go nowhere."""
    server.repos, server.objects, server.asked, server.refuse = {}, {}, [], None
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return server


# ------------------------------------------------------------------------------------------- a pipeline made by hand


def output(run: RunDirectory, files: dict[str, str | bytes], folder: Path | None = None, **about: Any) -> None:
    """A whole output, and the ledger of one attempt that made it."""
    folder = folder or run.model
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    config = run.read_config()
    manifest.write(folder, stage=config["stage"], identity=config["identity"], **about)


def story(run: RunDirectory, attempts: int = 1) -> None:
    ledger.append(run.ledger, "submitted", job_id="7", cluster="h100")
    for number in range(1, attempts + 1):
        ledger.append(run.ledger, "attempt_started", attempt=number, job_id="7", node="node-of-mine-17")
        ledger.append(run.ledger, "training_started", attempt=number, step=0)
        last = number == attempts
        ledger.append(
            run.ledger, "attempt_ended", attempt=number, code=0, outcome="finished" if last else "stopped",
            action="exit" if last else "requeue", reason=None,
        )  # fmt: skip


def a_model(kind: str = "LlamaForCausalLM") -> dict[str, str | bytes]:
    return {
        "config.json": json.dumps({"architectures": [kind], "transformers_version": "5.17.0"}),
        "model.safetensors": bytes(range(256)) * 8,
        "tokenizer.json": '{"model": {"vocab": {"/usr/bin/env": 1}}}',
        "tokenizer_config.json": json.dumps({"name_or_path": "/home/me/models/start", "model_max_length": 64}),
        "chat_template.jinja": "{{ messages }}",
    }


def link(run: RunDirectory, **changes: Any) -> None:
    """Change a frozen config, and let its inputs name the identities of their runs."""
    config = run.read_config()
    for source in config["inputs"].values():
        if source and source.get("run_dir"):
            source["identity"] = f"id-{Path(source['run_dir']).name}"
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        config[section] = {**config[section], key: value} if key else value
    run.config.write_text(yaml.safe_dump(config))


def judge(
    folder: Path, run: RunDirectory, found: Results, samples: list[dict[str, Any]], name: str = ""
) -> RunDirectory:
    judging = make_run(folder, "eval", name=name or f"eval_{run.name}", model=run.model)
    link(judging)
    lines = "".join(json.dumps(s) + "\n" for s in samples)
    output(judging, {"results.json": json.dumps(results.as_plain(found)), "samples.jsonl": lines})
    story(judging)
    return judging


def accuracy(value: float, low: float, high: float, **others: float) -> Results:
    return Results("accuracy", {"accuracy": Figure(value, low, high, 64)} | {k: Figure(v) for k, v in others.items()})


SAMPLES = [{"prompt": "2+3=?", "answer": "5", "completion": "<answer>5</answer>", "correct": True}]


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A pipeline of one's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.glob("*/*/*/config.yaml"):
        config.write_text(config.read_text().replace(str(made), str(tmp_path)))
    return tmp_path / "outputs of me" / "pipe"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """outputs/pipe with base -> sft -> dpo, two of them judged, all with local paths and secrets in their configs."""
    top = tmp_path_factory.mktemp("made")
    pipe = top / "outputs of me" / "pipe"
    paths = f"paths.output_base={pipe.parent}"
    base = make_run(pipe, "base", paths)
    sft = make_run(pipe, "sft", paths, "sft.lr=3e-4", model=base.model)
    dpo = make_run(pipe, "dpo", paths, "data.name=ultrafeedback", model=sft.model)
    for run in (base, sft, dpo):
        secret = {"WANDB_API_KEY": SECRET, "NETRC": "machine api login user"}
        link(run, slurm__env=secret, slurm__account="rich-account", slurm__setup=[f"export KEY={SECRET}"])
        output(run, a_model(), step=40)
        story(run, attempts=3 if run is sft else 1)
    link(sft, data__path=str(top / "records of me" / "mine.jsonl"), data__name="custom")
    sft.metrics.write_text('{"step": 40, "num_tokens": 12345.0}\n')
    report = [{"view": "demonstrations", "rows": 17, "sources": [{"name": "custom", "rows": 17}]}]
    sft.data_report.write_text(json.dumps(report))
    judge(pipe, sft, accuracy(0.25, 0.2, 0.3, format=0.5), SAMPLES)
    judge(pipe, dpo, accuracy(0.5, 0.45, 0.55, format=0.9), SAMPLES)
    return top


def command(folder: Path, *argv: str) -> list[str]:
    return [f"paths.output_base={folder.parent}", *argv]


def card_of(folder: Path, capsys: pytest.CaptureFixture[str], stage: str = "dpo", *argv: str) -> str:
    assert push.main(command(folder, f"stage={stage}", "--card", *argv)) == 0
    return capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the push


def test_a_model_goes_up_whole_and_can_be_verified(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(folder, "stage=dpo", "repo=me/sums", "license=mit")
    assert push.main(argv) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"pushed pipe/dpo (id-dpo): {hub.url}/me/sums\n"
    repo = hub.repos["models/me/sums"]
    assert repo["private"] and repo["commits"] == ["pipe/dpo (id-dpo)"]
    assert repo["files"].keys() == {*a_model(), "README.md", "training_config.yaml", "lineage.json", "manifest.json"}
    down = tmp_path / "down"
    snapshot_download("me/sums", endpoint=hub.url, token=TOKEN, local_dir=down)
    assert manifest.problem(down, hashes=True) is None
    assert (down / "model.safetensors").read_bytes() == (folder / "dpo/model/model.safetensors").read_bytes()
    assert ModelCard.load(down / "README.md").data.license == "mit"

    hub.asked.clear()
    assert push.main(argv) == 0
    assert capsys.readouterr().out.startswith("nothing new: there already is pipe/dpo (id-dpo)")
    assert len(repo["commits"]) == 1 and not [a for a in hub.asked if a.startswith("PUT")]


def test_nothing_of_this_machine_is_pushed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 0
    files = hub.repos["models/me/sums"]["files"]
    for name, content in files.items():
        for private in (
            SECRET,
            TOKEN,
            str(tmp_path),
            str(Path.home()),
            "node-of-mine",
            "rich-account",
            "of me",
            "machine",
        ):
            assert private not in content.decode(errors="replace"), (name, private)
    assert json.loads(files["tokenizer_config.json"]) == {"name_or_path": "start", "model_max_length": 64}
    assert b"/usr/bin/env" in files["tokenizer.json"], "a vocabulary is no place for corrections"
    config = yaml.safe_load(files["training_config.yaml"])
    assert config["dpo"]["beta"] == 0.1 and config["data"]["name"] == "ultrafeedback"
    assert not {"paths", "cluster", "inputs", "logging"} & config.keys() and "env" not in config["slurm"]


def test_a_secret_in_a_file_stops_the_push(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "dpo/model")
    output(RunDirectory(folder / "dpo"), {**a_model(), "notes.txt": f"key: {SECRET}"})
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 2
    said = capsys.readouterr().err
    assert "notes.txt holds something that looks like a secret: nothing was pushed" in said and SECRET not in said
    assert hub.repos == {} and hub.asked == []


def test_a_dry_run_asks_nobody(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "dpo/model")
    state = {"training_args.bin": b"pickle", "optimizer.pt": b"state", "adapter/README.md": "of others"}
    output(RunDirectory(folder / "dpo"), {**a_model(), **state})
    argv = command(folder, "stage=dpo", "repo=me/sums", "--dry-run")
    assert push.main(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"to {hub.url}/me/sums: a private model\n")
    assert re.search(r"\n  model\.safetensors +2 kB\n", said) and "\n# pipe/dpo\n" in said
    assert "left out: adapter/README.md, optimizer.pt, training_args.bin" in said
    assert push.main([*argv, "--public", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["public"] and plain["files"]["model.safetensors"] == 2048 and plain["card"] in said + "\n"
    assert not state.keys() & plain["files"].keys()
    assert hub.asked == []


def test_what_a_later_push_lacks_goes(hub: Hub, folder: Path) -> None:
    run = RunDirectory(folder / "dpo")
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 0
    hub.repos["models/me/sums"]["files"][".gitattributes"] = b"by the hub"
    shutil.rmtree(run.model)
    parts: dict[str, str | bytes] = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 99 for i in (1, 2)}
    output(run, {k: v for k, v in a_model().items() if k != "model.safetensors"} | parts)
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 0
    names = hub.repos["models/me/sums"]["files"].keys()
    assert "model.safetensors" not in names and {*parts, ".gitattributes"} <= names


def test_others_repositories_are_left_alone(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(folder, "stage=dpo", "repo=me/sums")

    def refused(words: str) -> None:
        before = json.dumps(hub.repos, default=repr)
        assert push.main(argv) == 1
        assert words in capsys.readouterr().err and json.dumps(hub.repos, default=repr) == before

    def there(kind: str, private: bool, **files: bytes) -> None:
        hub.repos = {f"{kind}/me/sums": {"name": kind, "private": private, "files": files, "commits": ["x"]}}

    there("datasets", True)
    refused("repo=me/sums: is there as a dataset, and this is a model\n  fix: repo=<user>/<another name>")
    there("models", True, **{"pytorch_model.bin": b"theirs"})
    refused("repo=me/sums: holds pytorch_model.bin, which no push from here put there")
    there("models", False)
    refused("repo=me/sums: is public\n  fix: --public")
    assert push.main([*argv, "--public"]) == 0


def test_records_become_a_data_set(hub: Hub, folder: Path) -> None:
    run = make_run(folder, "sample", model=folder / "sft" / "model")
    link(run)
    report = {"version": 1, "prompts": 4, "answered": 2, "kept": 2, "completions": 8, "reward": 0.25}
    records = "".join(json.dumps({"messages": [], "reward": 1.0}) + "\n" for _ in range(2))
    output(run, {"records.jsonl": records, "results.json": json.dumps(report)})
    assert push.main(command(folder, "stage=sample", "repo=me/records", "--public")) == 0
    repo = hub.repos["datasets/me/records"]
    assert not repo["private"] and repo["files"]["records.jsonl"].decode() == records
    text = repo["files"]["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["configs"][0]["data_files"] == [
        {"split": "train", "path": "records.jsonl"}
    ]
    assert 'load_dataset("me/records"' in text and "| prompts asked | 4 |" in text


def test_an_inference_checkpoint(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(folder / "dpo")
    argv = command(folder, "stage=dpo", "repo=me/sums")
    assert push.main([*argv, "step=20"]) == 2
    assert "dpo has no inference checkpoint of this step" in capsys.readouterr().err
    output(run, a_model(), run.inference_checkpoints / "step-20", step=20)
    assert push.main([*argv, "step=30"]) == 2
    assert "fix: one of: 20" in capsys.readouterr().err
    assert push.main([*argv, "checkpoint=checkpoints/checkpoint-20"]) == 2
    assert "only inference checkpoints can be pushed" in capsys.readouterr().err
    assert push.main([*argv, "checkpoint=inference_checkpoints/step-20"]) == 0
    repo = hub.repos["models/me/sums"]
    assert repo["commits"] == ["pipe/dpo step 20 (id-dpo)"]
    text = repo["files"]["README.md"].decode()
    assert "This checkpoint was not evaluated." in text
    assert ModelCard(text).data.eval_results is None, "the end's figures are not the checkpoint's"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "manifest.json").unlink(), "no manifest.json"),
        (lambda m: (m / "model.safetensors").write_bytes(bytes(2048)), "model.safetensors is damaged"),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda m: (m / "manifest.json").write_text('{"files": 3}'), "manifest.json is damaged"),
        (lambda m: (m / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_pushed(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    damage(folder / "dpo" / "model")
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 2
    words = capsys.readouterr().err
    assert f"its output is not whole: {said}" in words and "\n  fix: " in words and hub.asked == []


def test_a_manifest_cannot_reach_out_of_its_folder(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = folder / "dpo" / "outside.txt"
    outside.write_text("private")
    path = folder / "dpo/model/manifest.json"
    about = json.loads(path.read_text())
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"private").hexdigest()}
    path.write_text(json.dumps({**about, "files": {**about["files"], "../outside.txt": entry}}))
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 2
    assert "names a file outside of its folder" in capsys.readouterr().err and hub.asked == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["stage=dop", "repo=me/x"], "stage=dop: no such stage in .*\n  fix: did you mean 'dpo'?"),
        (["stage=eval_dpo", "repo=me/x"], "stage=eval_dpo: an output of eval is not pushed"),
        (["stage=dpo", "repo=me/x", "run_name=pip"], "run_name=pip: not in .*\n  fix: did you mean 'pipe'?"),
        (["stage=dpo"], "repo=: where to?"),
        (["repo=me/x"], "stage=: which output"),
        (["stage=dpo", "repo=x"], "repo=x: not a repository's name"),
        (["stage=dpo", "repo=me/x", "licence=mit"], "licence=mit: not a setting of push"),
        (["stage=dpo", "repo=me/x", "license=MIT or so"], "license=MIT or so: not a licence's identifier"),
        (["stage=dpo", "repo=me/x", "step=2", "checkpoint=step-2"], "step=2: beside checkpoint="),
        (["stage=dpo", "repo=me/x", "step=two"], "step=two: not a step"),
        (["stage=dpo", "repo=me/x", "offline=true"], "offline=true: a push asks the hub"),
        (["stage=dpo", "repo=me/x", "--output=x.md"], "--output=x.md: there is nothing to write"),
    ],
)
def test_what_is_asked_wrongly(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert push.main(command(folder, *argv)) == 2
    assert re.search(said.replace("?", r"\?"), capsys.readouterr().err) and hub.asked == []


def test_hubs_say_no_in_words(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(folder, "stage=dpo", "repo=me/sums")

    def refused(status: int, *words: str) -> None:
        assert push.main(argv) == status
        said = capsys.readouterr().err
        assert all(word in said for word in ("error: ", "\n  fix: ", *words)), said
        assert TOKEN not in said and "Traceback" not in said

    for path, code, words in (
        ("/api/repos/create", 403, "this token may not write there"),
        ("/commit/", 403, "this token may not write there"),
        ("/api/repos/create", 400, "the hub refused (400)"),
        ("/api/repos/create", 429, "the hub asks to wait"),
        ("/objects/", 403, "this token may not write there"),
    ):
        hub.refuse = (path, code)
        refused(1, words)
        assert all(repo["files"] == {} for repo in hub.repos.values()), "a push is there whole or not at all"
        hub.repos = {}
    hub.refuse = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(1, "the hub does not know this token")
    monkeypatch.delenv("HF_TOKEN")
    refused(2, "no token of a hub", "hf auth login")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(2, "HF_HUB_OFFLINE is set in this shell")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(1, "the hub does not answer")


# -------------------------------------------------------------------------------------------------------- the card


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as a renderer sees them: rows of cells."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            children = tokens[i + 1].children or []
            assert {c.type for c in children} <= {"text", "text_special", "code_inline", "html_inline"}, children
            assert all(c.content in ("<code>", "</code>") for c in children if c.type == "html_inline")
            found[-1][-1].append("".join(c.content for c in children if c.type != "html_inline"))
    return found


def test_the_card_says_what_is_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ModelCard(card_of(folder, capsys, "dpo", "license=apache-2.0"))
    data = shown.data.to_dict()
    assert data["library_name"] == "transformers" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["HuggingFaceH4/ultrafeedback_binarized"] and "base_model" not in data
    assert data["tags"][:3] == ["dpo", "trl", "post-training"]
    assert {r.metric_type: r.metric_value for r in shown.data.eval_results} == {"accuracy": 0.5, "format": 0.9}
    found = {table[0][0]: table for table in tables(shown.text)}
    worth, made = (t for t in tables(shown.text) if t[0][0] == "stage")
    assert worth == [
        ["stage", "accuracy", "form", "vs parent"],
        ["sft", "25.0 % (20.0 to 30.0)", "0.50", ""],
        ["dpo", "50.0 % (45.0 to 55.0)", "0.90", "+25.0 *"],
    ]
    assert [row[0] for row in made] == ["stage", "base", "sft", "dpo"]
    assert made[2] == ["sft", "supervised fine-tuning", "base", "custom: mine.jsonl", "40", "12,345"]
    assert found["data set"][2][:4] == ["custom: mine.jsonl", "-", "sft", "sft: custom 17"]
    assert found["held-out problem"][1] == ["2+3=?", "<answer>5</answer>", "yes"]
    assert "5 attempts in 3 runs (2 requeues, 0 failures)" in shown.text
    assert "- sft: " in shown.text and "`sft.lr=0.0003`" in shown.text
    assert "Not evaluated: base." in shown.text
    assert "license" not in ModelCard(card_of(folder, capsys)).data.to_dict(), "no licence is made up"


def test_a_start_from_the_hub(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("Qwen/Qwen3-0.6B", "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b"):
        link(RunDirectory(folder / "sft"), inputs={"model": {"path": path, "run_dir": None, "identity": None}})
        shown = ModelCard(card_of(folder, capsys))
        assert shown.data.base_model == "Qwen/Qwen3-0.6B" and "going back to Qwen/Qwen3-0.6B" in shown.text
    link(RunDirectory(folder / "sft"), inputs={"model": {"path": "/home/me/start", "run_dir": None}})
    shown = ModelCard(card_of(folder, capsys))
    assert shown.data.base_model is None and "going back to start (a local folder)" in shown.text


def test_versions_are_those_that_the_run_wrote_down(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "## Versions\n\nnot recorded." in card_of(folder, capsys)
    run = RunDirectory(folder / "dpo")
    first, second = {"torch": "2.12.0"}, {"trl": "1|16", "torch": "2.13.0"}
    lines = [json.dumps({"attempt": 1, "packages": first}), json.dumps({"attempt": 2, "packages": second})]
    run.environment.write_text("\n".join(lines))
    assert "## Versions\n\ntorch 2.13.0, trl 1&#124;16." in card_of(folder, capsys)


def test_changes_within_the_intervals_are_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "eval_dpo")
    judge(folder, RunDirectory(folder / "dpo"), accuracy(0.28, 0.22, 0.33), SAMPLES)
    assert "+3.0 &#126; |" in card_of(folder, capsys)
    link(RunDirectory(folder / "eval_dpo"), data__name="gsm8k")
    assert "+3.0" not in card_of(folder, capsys), "other problems were asked"


def test_private_records_are_not_quoted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "2+3=?" in card_of(folder, capsys)
    link(RunDirectory(folder / "eval_dpo"), data__path="/home/me/ours.jsonl")
    assert "2+3=?" not in card_of(folder, capsys)


def test_a_reward_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rm = make_run(folder, "rm", model=folder / "sft" / "model")
    link(rm)
    output(rm, a_model("LlamaForSequenceClassification"))
    judge(folder, rm, Results("preference_accuracy", {"preference_accuracy": Figure(0.8, 0.7, 0.9, 64)}), [])
    shown = ModelCard(card_of(folder, capsys, "rm"))
    assert shown.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in shown.text
    worth = tables(shown.text)[0]
    assert worth[-1] == ["rm", "-", "80.0 % (70.0 to 90.0)", ""], "no change where the scores are of two kinds"


def test_benchmarks_have_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "eval_dpo")
    figures = {"accuracy": Figure(0.5, 0.4, 0.6, 64), "gsm8k/exact_match": Figure(0.25, 0.2, 0.3, 100)}
    found = Results("accuracy", figures, {"samples": 4})
    judge(folder, RunDirectory(folder / "dpo"), found, SAMPLES)
    shown = ModelCard(card_of(folder, capsys))
    assert ["gsm8k", "exact_match", "0.250 (0.200 to 0.300)", "100"] in [r for t in tables(shown.text) for r in t]
    assert "`samples=4`" in shown.text
    assert any(r.dataset_type == "gsm8k" and r.metric_type == "exact_match" for r in shown.data.eval_results)


# ---------------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "manifest.json").unlink(), "eval_dpo: it is not whole (no manifest.json)"),
        (lambda m: (m / "results.json").write_text((m / "results.json").read_text().replace("0.5", "0.9")),
         "eval_dpo: its output is damaged (results.json is damaged)"),
        (lambda m: (m / "samples.jsonl").unlink(), "eval_dpo: it is not whole (samples.jsonl is missing)"),
    ],
)  # fmt: skip
def test_an_evaluation_that_is_not_whole_is_not_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    damage(folder / "eval_dpo" / "model")
    shown = ModelCard(card_of(folder, capsys))
    assert said in shown.text and shown.data.eval_results is None
    assert "This model was not evaluated. The stages before it were:" in shown.text
    assert "Not evaluated: base, dpo." in shown.text


def test_an_evaluation_of_results_that_no_code_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[]", '{"version": 99}', "no json", '{"version": 2, "figures": {"accuracy": {"value": "x"}}}'):
        shutil.rmtree(folder / "eval_dpo" / "model")
        output(RunDirectory(folder / "eval_dpo"), {"results.json": text, "samples.jsonl": ""})
        assert "eval_dpo: its output cannot be read (" in card_of(folder, capsys)


def test_damage_elsewhere_in_the_pipeline_is_no_hindrance(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = card_of(folder, capsys)
    other = make_run(folder, "grpo", model=folder / "sft" / "model")
    output(other, a_model())
    judging = judge(folder, other, accuracy(0.1, 0.0, 0.2), [])
    shutil.rmtree(judging.model)
    output(judging, {"results.json": "no json", "samples.jsonl": ""})
    assert card_of(folder, capsys) == before


def test_an_evaluation_of_a_run_that_was_here_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(RunDirectory(folder / "dpo"), identity="another")
    text = card_of(folder, capsys)
    assert "it judged another run that was in this folder" in text and "50.0 %" not in text


def test_ancestors_that_are_gone(folder: Path, capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    shutil.rmtree(folder / "base")
    link(RunDirectory(folder / "sft"), identity="id-new")  # another run is where dpo's parent was
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 0
    files = hub.repos["models/me/sums"]["files"]
    text = files["README.md"].decode()
    assert (
        "Not known of the stage sft: how it was made, and what it is worth (its folder holds another run now)" in text
    )
    assert "25.0 %" not in text, "what another run is worth"
    runs = json.loads(files["lineage.json"])["runs"]
    assert [(r["name"], r["identity"], r.get("not_known")) for r in runs] == [
        ("sft", "id-sft", "its folder holds another run now"), ("dpo", "id-dpo", None),
    ]  # fmt: skip
    link(RunDirectory(folder / "sft"), identity="id-sft")
    text = card_of(folder, capsys)
    assert "Not known of the stage base: how it was made, and what it is worth (its folder is gone)" in text


def test_outputs_that_were_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = card_of(folder, capsys)
    moved = folder.parent.parent / "elsewhere" / "pipe"
    moved.parent.mkdir()
    folder.rename(moved)
    after = card_of(moved, capsys)
    lines = "## How it was made"
    assert after.partition(lines)[2].partition("## Limits")[0] == before.partition(lines)[2].partition("## Limits")[0]


def test_a_run_that_failed(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(folder / "dpo")
    shutil.rmtree(run.model)
    ledger.append(run.ledger, "attempt_started", attempt=2, job_id="7", node="n")
    ledger.append(
        run.ledger, "attempt_ended", attempt=2, code=1, outcome="crashed", action="exit", reason="CUDA error; gave up"
    )
    assert push.main(command(folder, "stage=dpo", "repo=me/sums")) == 2
    said = capsys.readouterr().err
    assert "not whole: no manifest.json; the run failed: CUDA error; gave up" in said and "launchers.status" in said


@pytest.mark.parametrize("text", ["", "[]", "stage: dpo", "stage: [dpo]", "a: b: c", "stage: dpo\ninputs: 3\ndata: []"])
def test_configs_that_are_damaged(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "dpo" / "config.yaml").write_text(text)
    status = push.main(command(folder, "stage=dpo", "repo=me/sums", "--dry-run"))
    captured = capsys.readouterr()
    assert (status == 0) == text.startswith("stage: dpo"), captured
    assert (status == 2) == ("error: stage=dpo" in captured.err)


JUNK: list[Any] = [None, 3, "x", "/a/b", [], {}, [1], {"a": 1}, [{"name": 3}], True, float("nan")]


def places(value: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """Every place in plain data, as a container and a key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        if depth > 1:
            yield from places(value[key], depth - 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_value_anywhere_is_no_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    which = data.draw(st.sampled_from(["dpo", "sft", "eval_dpo"]))
    path = folder / which / "config.yaml"
    before = path.read_text()
    config = yaml.safe_load(before)
    for container, key in data.draw(st.lists(st.sampled_from(list(places(config))), min_size=1, max_size=3)):
        container[key] = data.draw(st.sampled_from(JUNK))
    try:
        path.write_text(yaml.safe_dump(config))
        assert push.main(command(folder, "stage=dpo", "repo=me/x", "--dry-run")) in (0, 2)
    finally:
        path.write_text(before)
    captured = capsys.readouterr()
    assert "\n# pipe/dpo\n" in captured.out or captured.err.startswith("error: stage=dpo")


def test_damaged_records_are_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "[]", "3\n", '{"step": "x"}', "\x00", '{"num_tokens": []}\n{"num_tokens"'):
        for name in ("sft", "dpo"):
            run = RunDirectory(folder / name)
            for path in (run.ledger, run.metrics, run.data_report, run.model / "config.json"):
                path.write_text(text)
        (folder / "pipeline.json").write_text(text)
        about = json.loads((folder / "dpo/model/manifest.json").read_text())
        about["files"]["config.json"]["bytes"] = len(text)
        (folder / "dpo/model/manifest.json").write_text(json.dumps(about))
        assert "\n# pipe/dpo\n" in card_of(folder, capsys)


# ------------------------------------------------------------------------------------------------------- escaping

nasty = st.lists(
    st.sampled_from([
        "\n---\n", "---", "|", "`", "```", '"', "'", "\\", "<b>", "</code>", "<script>", "&amp;", "#", "[x](y)",
        "![i](u)", "*a*", "_a_", "~~", "$x$", "\n", "\r", "\t", "\x00", "\u2028", ": ", "- ", "{{ x }}", "{% if %}",
        "é", "💥", "@me", "https://x.y", "a", "1. ", "> ",
    ])
).map("".join)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nasty, nasty, nasty, nasty, nasty)
def test_no_text_breaks_the_card(name: str, answer: str, metric: str, value: str, prompt: str) -> None:
    member = card.Member("k", name or "x", name or "y", value, None, name or None, {
        "stage": "sft", "sft": {"lr": value, "loss_type": name}, "data": {"name": "custom", "path": f"/a/{value}"},
    }, {"model": f"local:{prompt}", "reference": f"hub:{value}"})  # fmt: skip
    figures = {metric or "m": Figure(0.5, 0.4, 0.6, 3), f"task{metric}/{name}": Figure(1.0)}
    found = card.Evaluation(
        member, Results(metric or "m", figures, {name: value, "x": metric}),
        [{"prompt": prompt, "completion": answer, "correct": True}], {"data": {"name": "arithmetic"}},
    )  # fmt: skip
    cleaner = card.Cleaner({})
    facts = card.gather([member], {"k": found}, found, [answer], Path("/nonexistent"), "policy", None)
    body = card.environment_of_cards().get_template("model_card.md.j2").render(**facts, repo="me/x")
    text = f"---\n{card.card_data([member], found, 'policy', None, name)}\n---\n\n{body}"
    shown = ModelCard(text)
    assert shown.data.library_name == "transformers" and len(shown.data.eval_results) == len(figures)
    tokens = MarkdownIt("commonmark").parse(shown.text)
    heads = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert heads[1:] == ["Use", "What it is worth", "How it was made", "Data", "Limits", "Versions"]
    assert not {"html_block", "hr"} & {t.type for t in tokens}
    assert [t.info for t in tokens if t.type == "fence"] == ["python"]
    for table in tables(shown.text):
        assert len({len(row) for row in table}) == 1
    answers = next(t for t in tables(shown.text) if t[0][0] == "held-out problem")
    assert answers[1][1] == card.flat(answer) and answers[1][0] == card.flat(prompt)
    compile(next(t.content for t in tokens if t.type == "fence"), "snippet", "exec")
    assert json.loads(card.lineage_file([member], cleaner))["runs"][0]["identity"] == cleaner.text(value)
    assert yaml.safe_load(card.config_file(member.config, cleaner))["stage"] == "sft"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/scratch/me/data/gsm8k.jsonl", "gsm8k.jsonl"), ("~/models/mine", "mine"), ("/a b/c d/e f.txt", "e f.txt"),
        ("rewards in /scratch/me/r.py:brief", "rewards in r.py:brief"), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://example.org/a/b", "https://example.org/a/b"), ("https://me:pw@example.org/a", "https://example.org/a"),
        ("<think>a</think><answer>1/2</answer>", "<think>a</think><answer>1/2</answer>"), ("3/4 = 6/8", "3/4 = 6/8"),
        (f"key hf_{'a' * 20}", "key ***"), (f"x{SECRET}y", "x***y"), ("all-linear", "all-linear"),
        ("functions/0a1b/rewards.py:brief", "functions/0a1b/rewards.py:brief"), ("", ""), ("/", "/"),
    ],
)  # fmt: skip
def test_what_is_cleaned(text: str, cleaned: str) -> None:
    assert card.Cleaner({"MY_API_KEY": SECRET, "TOKENIZERS_PARALLELISM": "all-linear"}).text(text) == cleaned


def test_keys_that_are_called_like_secrets() -> None:
    plain = {"api_key": "x", "tokenizer": "bytes", "num_training_tokens": 3, "a": [{"HF_TOKEN": "y", "b": "/x/y"}]}
    assert card.Cleaner({}).value(plain) == {"tokenizer": "bytes", "num_training_tokens": 3, "a": [{"b": "y"}]}


def test_a_card_in_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "card.md"
    assert push.main(command(folder, "stage=dpo", "--card", f"--output={there}")) == 0
    capsys.readouterr()
    assert there.read_text() == card_of(folder, capsys)
    assert push.main(command(folder, "stage=dpo", "--card", f"--output={tmp_path / 'no' / 'card.md'}")) == 2
    assert "fix: a folder that you can write" in capsys.readouterr().err


def test_a_name_in_two_pipelines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(folder.parent / "second", "dpo")
    output(other, a_model())
    assert push.main(command(folder, "stage=dpo", "--card")) == 2
    assert "is in several pipelines\n  fix: say which one: run_name=" in capsys.readouterr().err
    assert "# second/dpo" in card_of(folder, capsys, "dpo", "run_name=second")
