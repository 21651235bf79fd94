"""Who is told how runs end: what is due, in which words, by a real HTTP server, a real mail server and a sendmail."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf import check
from conf.check import ConfigError, check_notify, check_run
from conf.schema import Cluster, Config, Notify, Slurm
from launchers import notify as command
from launchers.local import LocalRun, supervise
from launchers.preflight import check_webhook
from launchers.render import job_script, sbatch_options
from launchers.submit import snapshot
from post_training.run import ledger, life, manifest, notify
from post_training.run.directory import RunDirectory
from post_training.run.notify import Due, due

SECRET = "T0HIDDEN/B0HIDDEN/x9Y8z7W6v5"


class Hook:
    """A webhook that notes what it gets, and answers with `status`."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status, self.answer, self.gate = 200, b"ok", threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.gate.wait(30)
                outer.paths.append(self.path)
                outer.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.status)
                if outer.status in (301, 302, 307, 308):
                    self.send_header("Location", "/login")
                self.send_header("Content-Length", str(len(outer.answer)))
                self.end_headers()
                self.wfile.write(outer.answer)

            def do_GET(self) -> None:
                outer.got.append({"text": "a redirect was followed"})
                self.send_error(200)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/services/{SECRET}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def events(self) -> list[str]:
        return [item["post_training"]["event"] for item in self.got]

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    hook = Hook()
    monkeypatch.setenv(notify.ADDRESS, hook.address)
    try:
        yield hook
    finally:
        hook.close()


STUB = """
import os, sys, time
from pathlib import Path
from post_training.run import ledger, manifest
from post_training.run.directory import RunDirectory

run, attempt, behave = RunDirectory(Path(sys.argv[1])), int(os.environ["POST_TRAINING_ATTEMPT"]), os.environ["STUB"]
if behave == "crash":
    sys.exit(7)
if behave == "kill":
    os.kill(os.getpgrp(), 9)  # the job script, in whose group it is
    time.sleep(60)
if behave == "stop":
    sys.exit(85)
run.model.mkdir(exist_ok=True)
(run.model / "weights").write_text("w")
manifest.write(run.model, identity="x")
"""


class Bench:
    """A pipeline of two stages; `run` is the first one, with a real local job script around a stub."""

    def __init__(self, folder: Path, **asked: Any) -> None:
        self.folder = folder
        self.run = self.make("sft", **asked)
        stages = {name: {"run_dir": str(folder / name), "stage": "sft", "after": after} for name, after in
                  (("sft", []), ("dpo", ["sft"]), ("eval_dpo", ["dpo"]))}  # fmt: skip
        (folder / "pipeline.json").write_text(json.dumps({"version": 1, "name": folder.name, "stages": stages}))

    def make(self, name: str, **asked: Any) -> RunDirectory:
        run = RunDirectory(self.folder / name)
        run.create()
        slurm = {"max_failures": 2, "max_attempts_without_progress": 3}
        frozen = {
            "slurm": slurm, "cluster": {"scheduler": "local"}, "inputs": {"model": None}, "stage": "sft",
            "notify": vars(Notify(**asked)),
        }  # fmt: skip
        run.config.write_text(yaml.safe_dump(frozen))
        return run

    def done(self, name: str) -> None:
        run = self.make(name)
        ledger.append(run.ledger, "submitted", job_id=f"{name}-1", cluster="local")
        run.model.mkdir()
        if name.startswith("eval"):
            figures = {"version": 2, "headline": "accuracy", "figures": {"accuracy": {"value": 0.662}}}
            run.results.write_text(json.dumps(figures))
        manifest.write(run.model, identity="x")

    def script(self) -> None:
        for name, content in snapshot().items():
            if name.startswith("post_training/run/") or name == "post_training/__init__.py":
                path = self.run.code / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        (self.run.code / "post_training/train.py").write_text(STUB)
        slurm = Slurm(gpus_per_node=0, cpus_per_gpu=1)
        config = Config(cluster=Cluster(name="local", scheduler="local"), slurm=slurm)
        self.run.script.write_text(job_script(config, self.run, sys.executable))
        ledger.append(self.run.ledger, "submitted", job_id="local-1", cluster="local")

    def attempt(self, behave: str, **env: str) -> subprocess.CompletedProcess[str]:
        """One start of the job script, as the supervisor starts it."""
        full = {**os.environ, "POST_TRAINING_JOB_ID": "local-1", "STUB": behave, **env}
        full.pop("PYTHONPATH", None)
        done = subprocess.run(["bash", str(self.run.script)], env=full, capture_output=True, text=True, timeout=60)
        with self.run.stderr("local-1").open("a") as file:
            file.write(done.stderr)
        return done

    def events(self, name: str = "notified") -> list[dict[str, Any]]:
        return [event for event in ledger.read(self.run.ledger) if event["event"] == name]

    def end(self, outcome: str = "finished", action: str = "exit", reason: str | None = None, **more: Any) -> None:
        attempt = len(self.events("attempt_started")) + 1
        ledger.append(self.run.ledger, "attempt_started", attempt=attempt, job_id="17", nodes=["n3"], node="n3")
        ledger.append(
            self.run.ledger, "attempt_ended", attempt=attempt, code=1, outcome=outcome, action=action, reason=reason,
            **more,
        )  # fmt: skip


# ------------------------------------------------------------------------------------ the script at work


def test_done_is_told_once_and_nothing_is_written_of_the_address(tmp_path: Path, hook: Hook) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    bench.script()
    assert bench.attempt("stop").returncode == life.ASKED and hook.got == []  # `cancelled` is not asked for
    assert bench.attempt("finish").returncode == 0
    assert bench.attempt("finish").returncode == 0  # requeued although it is done
    assert hook.events == ["done"] and hook.paths == [f"/services/{SECRET}"]
    content = hook.got[0]
    assert content["text"].startswith("full/sft: done") and content["content"] == content["text"]
    about = content["post_training"]
    assert (about["pipeline"], about["stage"], about["job_id"]) == ("full", "sft", "local-1")
    assert about["run_dir"] == str(bench.run.root) and about["version"] == 1
    (told,) = bench.events()
    assert (told["what"], told["ways"], told["problems"]) == ("done", ["webhook"], {})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        text = path.read_bytes()
        assert b"0HIDDEN" not in text and b"x9Y8z7" not in text, path


def test_crashes_are_told_when_it_gives_up(tmp_path: Path, hook: Hook) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    bench.script()
    assert bench.attempt("crash").returncode == life.REQUEUE and hook.got == []
    assert bench.attempt("crash").returncode == 7
    (content,) = hook.got
    first, *more = content["text"].splitlines()
    assert first == "full/sft: failed, 2 attempts"
    assert more[0] == "exit status 7; gave up after 2 failures without progress (slurm.max_failures)"
    assert more[1] == "takes with it: dpo, eval_dpo"
    assert more[2].startswith("job local-1 on ") and str(bench.run.root) in more[2]


def test_the_supervisor_tells_where_the_script_could_not(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    bench.script()
    monkeypatch.setenv("STUB", "kill")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert supervise([LocalRun(bench.run, (), 1, 3600, 60)], progress=False) == 1
    assert hook.events == ["failed"] and hook.got[0]["post_training"]["attempt"] == 2


def test_a_hook_that_is_away_fails_no_run(tmp_path: Path, hook: Hook) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    bench.script()
    hook.close()
    done = bench.attempt("finish")
    assert done.returncode == 0 and "warning: notify by webhook: 127.0.0.1: Connection refused" in done.stderr
    assert bench.events()[0]["problems"] == {"webhook": "127.0.0.1: Connection refused"}
    assert life.main(["begin", str(bench.run.root), "--job-id", "local-1"]) == life.DONE
    assert len(bench.events()) == 1 and "0HIDDEN" not in done.stderr


def test_off_by_default(tmp_path: Path, hook: Hook) -> None:
    bench = Bench(tmp_path / "full")
    bench.end()
    assert notify.tell(bench.run) == [] and hook.got == [] and bench.events() == []
    config = bench.run.read_config()
    del config["notify"]  # of before there were any
    bench.run.config.write_text(yaml.safe_dump(config))
    assert notify.tell(bench.run) == []


@pytest.mark.parametrize("damage", ["{", "notify: [1]", "notify: {webhook: true, events: 3}\ninputs: {}"])
def test_damage_is_no_error(tmp_path: Path, hook: Hook, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    bench.end()
    bench.run.config.write_text(damage)
    assert notify.tell(bench.run) == [] and hook.got == []
    assert "warning: nobody was told how sft ended" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- what is due


def ends(*ways: tuple[str, str, str | None]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"event": "submitted", "time": 0, "job_id": "1", "cluster": "dev"}]
    for attempt, (outcome, action, reason) in enumerate(ways, 1):
        events.append({"event": "attempt_started", "time": attempt, "attempt": attempt, "job_id": "1"})
        ended = {"event": "attempt_ended", "time": attempt, "attempt": attempt, "outcome": outcome, "action": action}
        events.append({**ended, "reason": reason, "gave_up": action == "exit" and outcome in ("crashed", "stopped")})
    return events


FUTILE = str(life.futile(10, life.Limits(3, 10)))


@pytest.mark.parametrize(
    ("way", "what"),
    [
        (("finished", "exit", None), "done"),
        (("finished", "exit", "gate: accuracy 0.2 is below 0.3"), "gated"),
        (("crashed", "exit", "exit status 7; gave up after 3 failures"), "failed"),
        (("crashed", "exit", f"exit status 7; {FUTILE}"), "stuck"),
        (("stopped", "exit", FUTILE), "stuck"),
        (("cancelled", "exit", None), "cancelled"),
        (("stopped", "requeue", None), None),
        (("crashed", "requeue", "exit status 7"), None),
        (("preempted", "requeue", None), None),
    ],
)
def test_what_an_end_is_called(way: tuple[str, str, str | None], what: str | None) -> None:
    found = due(ends(way))
    assert (found.event if found else None) == what
    if found:
        told = {"event": "notified", "time": 9, "what": found.event, "attempt": found.attempt}
        assert due([*ends(way), told]) is None
        assert due([*ends(way), {**told, "what": "pipeline"}]) == found


def test_a_requeue_is_told_when_it_runs_again() -> None:
    events = ends(("stopped", "requeue", "wall time"), ("stopped", "requeue", None))
    assert due(events) is None and due(events[:-1]) == Due("requeued", 2, "wall time")
    assert due(events[:2]) is None  # a first start is none


def test_who_submits_again_is_told_again() -> None:
    events = ends(("crashed", "exit", "x"))
    told = {"event": "notified", "time": 9, "what": "failed", "attempt": 1}
    again = [*events, told, events[0]]
    assert due(again) is None
    assert due([*again, {**events[1], "attempt": 2}, {**events[2], "attempt": 2}]) == Due("failed", 2, "x")


EVENT = st.fixed_dictionaries(
    {
        "event": st.sampled_from(["submitted", "attempt_started", "attempt_ended", "cancelled", "notified", "x"]),
        "time": st.integers(0, 9), "attempt": st.integers(1, 3) | st.none(), "job_id": st.just("1"),
        "cluster": st.just("dev"), "outcome": st.sampled_from(["finished", "crashed", "stopped", "cancelled"]),
        "action": st.sampled_from(["exit", "requeue"]), "reason": st.none() | st.just("gate: x") | st.just(FUTILE),
        "what": st.sampled_from(list(notify.EVENTS)), "gave_up": st.booleans(),
    }
)  # fmt: skip


@given(st.lists(EVENT, max_size=12))
def test_each_is_told_once(events: list[dict[str, Any]]) -> None:
    found = due(events)
    if found is not None:
        assert found.event in notify.EVENTS and found.event != "pipeline"
        told = {"event": "notified", "time": 9, "what": found.event, "attempt": found.attempt}
        assert due([*events, told]) is None
        assert due([*events, {"event": "training_started", "time": 9}]) == found


def test_config_and_code_name_the_same_events() -> None:
    assert tuple(notify.EVENTS) == check.NOTIFIED


# ------------------------------------------------------------------------------------- the whole pipeline


def test_a_whole_pipeline_is_told_once(tmp_path: Path, hook: Hook) -> None:
    bench = Bench(tmp_path / "full", webhook=True, events=["pipeline"])
    bench.end()
    bench.run.model.mkdir()
    manifest.write(bench.run.model, identity="x")
    bench.done("dpo")
    assert notify.tell(bench.run) == []  # eval_dpo is not there
    bench.done("eval_dpo")
    ((message, ways),) = notify.tell(bench.run)
    assert ways == {"webhook": None} and message.title == "pipeline full: done, 3 stages"
    assert hook.got[0]["text"].splitlines() == [message.title, "eval_dpo accuracy 66.2 %", str(tmp_path / "full")]
    assert hook.got[0]["post_training"]["scores"] == {"eval_dpo": {"metric": "accuracy", "value": 0.662}}
    assert notify.tell(bench.run) == []  # another stage that ended at the same moment
    ledger.append(bench.run.ledger, "submitted", job_id="18", cluster="dev")  # trained anew
    bench.end()
    assert len(notify.tell(bench.run)) == 1


# ------------------------------------------------------------------------------------------- the ways


def test_a_hook_that_sends_elsewhere_took_nothing(hook: Hook) -> None:
    hook.status = 302
    with pytest.raises(RuntimeError, match="HTTP 302"):
        notify.post(hook.address, {"text": "x"})
    assert len(hook.got) == 1


def test_what_a_hook_says_is_shown_without_the_address(hook: Hook) -> None:
    hook.status, hook.answer = 404, f"no_service: {hook.address}\x1b[31m".encode()
    with pytest.raises(RuntimeError) as error:
        notify.post(hook.address, {"text": "x"})
    assert "HTTP 404 no_service" in str(error.value)
    assert "0HIDDEN" not in str(error.value) and "x9Y8" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["", "hooks.slack.com/services/T0HIDDEN", "file:///etc/SECRET", "https://", "http://[SECRET"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as error:
        notify.post(address, {"text": "x"})
    assert "0HIDDEN" not in str(error.value)


def test_a_deaf_hook_is_left_behind(hook: Hook) -> None:
    hook.gate.clear()
    message = notify.Message("t", "t", {"event": "test"})
    assert notify.send({"webhook": True}, [message], patience=0.2) == [{"webhook": "no answer within 0.2 s"}]


class MailServer(socketserver.StreamRequestHandler):
    """So much of SMTP (RFC 5321) as a client without password needs."""

    letters: list[str]

    def handle(self) -> None:
        def say(text: str) -> None:
            self.wfile.write(f"{text}\r\n".encode())

        say("220 here")
        while line := self.rfile.readline().decode().strip():
            match line.split()[0].upper():
                case "DATA":
                    say("354 go on")
                    text = b""
                    while not text.endswith(b"\r\n.\r\n"):
                        text += self.rfile.readline()
                    self.letters.append(text.decode())
                    say("250 taken")
                case "RCPT" if "refused" in line:
                    say("550 no such user")
                case "QUIT":
                    say("221 bye")
                    return
                case _:
                    say("250 ok")


@pytest.fixture
def mail_server() -> Iterator[tuple[str, list[str]]]:
    letters: list[str] = []
    handler = type("Handler", (MailServer,), {"letters": letters})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", letters
        finally:
            server.shutdown()
            thread.join()


def test_mail_by_a_server(tmp_path: Path, mail_server: tuple[str, list[str]]) -> None:
    server, letters = mail_server
    bench = Bench(tmp_path / "full", mail="a@example.org,b@example.org", smtp=server)
    bench.end("crashed", reason="ValueError: \x1b[31mof its own\nSubject: forged", gave_up=True)
    ((_, ways),) = notify.tell(bench.run)
    assert ways == {"mail": None}
    head, _, text = letters[0].partition("\r\n\r\n")
    assert "Subject: full/sft: failed" in head and "To: a@example.org,b@example.org" in head
    assert "forged" not in head and "ValueError:  [31mof its own Subject: forged" in text
    assert bench.events()[0]["ways"] == ["mail"]
    with pytest.raises(RuntimeError, match="no such user"):
        notify.mail("refused@example.org", "t", "t", server)


def test_mail_by_sendmail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sendmail = tmp_path / "bin" / "sendmail"
    sendmail.parent.mkdir()
    sendmail.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n/bin/cat >{tmp_path}/letter\n')
    sendmail.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sendmail.parent}:{os.environ['PATH']}")
    notify.mail("me@example.org", "full/sft: done", "text")
    assert (tmp_path / "arguments").read_text() == "-t -i\n"
    assert "To: me@example.org\nSubject: full/sft: done\n" in (tmp_path / "letter").read_text()
    sendmail.write_text("#!/bin/sh\necho no queue >&2\nexit 75\n")
    with pytest.raises(RuntimeError, match="sendmail: no queue"):
        notify.mail("me@example.org", "full/sft: done", "text")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"has no sendmail: set notify\.smtp"):
        notify.mail("me@example.org", "full/sft: done", "text")


# ------------------------------------------------------------------------------------------ the command


def test_the_command_sends_a_test(
    hook: Hook, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["--test", "cluster=local", "notify.webhook=true"]) == 0
    assert hook.events == ["test"] and "webhook: sent" in capsys.readouterr().out
    hook.status = 403
    assert command.main(["--test", "cluster=local", "notify.webhook=true", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["ways"] == {"webhook": "HTTP 403 ok"}
    assert command.main(["--test", "cluster=local"]) == 2
    assert "and no notify.mail: nobody is told anything" in capsys.readouterr().err
    monkeypatch.delenv(notify.ADDRESS)
    assert command.main(["--test", "cluster=local", "notify.webhook=true"]) == 2
    assert "POST_TRAINING_WEBHOOK is not set" in capsys.readouterr().err


def test_the_command_tells_what_nobody_could(tmp_path: Path, hook: Hook, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path / "full", webhook=True)
    ledger.append(bench.run.ledger, "submitted", job_id="local-1", cluster="local")
    ledger.append(bench.run.ledger, "attempt_started", attempt=1, job_id="local-1", nodes=["n3"], node="n3")
    assert command.main([f"paths.output_base={tmp_path}"]) == 0  # the machine was switched off
    assert hook.events == ["failed"] and "full/sft: failed\n  webhook: sent" in capsys.readouterr().out
    assert "its supervisor and its job are gone" in hook.got[0]["post_training"]["reason"]
    assert command.main([f"paths.output_base={tmp_path}"]) == 0
    assert len(hook.got) == 1 and capsys.readouterr().out == "nothing to tell\n"
    assert command.main(["paths.output_bass=x"]) == 2


# -------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(notify=Notify(events=["finished"])), "notify.events"),
        (Config(notify=Notify(mail="me")), "notify.mail"),
        (Config(notify=Notify(mail="a@b.c, Bcc: x@y.z")), "notify.mail"),
        (Config(notify=Notify(smtp="mail")), "notify.smtp"),
        (Config(notify=Notify(mail="a@b.c", smtp="me:password@mail")), "notify.smtp"),
        (Config(slurm=Slurm(env={"POST_TRAINING_WEBHOOK": "https://x"})), "slurm.env.POST_TRAINING_WEBHOOK"),
        (Config(slurm=Slurm(mail_user="a b")), "slurm.mail_user"),
        (Config(slurm=Slurm(mail_user="a@b.c", mail_type=["FAILED"])), "slurm.mail_type"),
    ],
)
def test_bad_configs(config: Config, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(config)
    assert error.value.key == key and error.value.fix


def test_good_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_notify(Config(notify=Notify(mail="a@b.c, d@e.f", smtp="mail.example.org:25")))
    asked = Config(notify=Notify(webhook=True))
    monkeypatch.delenv(notify.ADDRESS, raising=False)
    with pytest.raises(ConfigError, match=r"notify\.webhook=true: POST_TRAINING_WEBHOOK is not set"):
        check_webhook(asked)
    monkeypatch.setenv(notify.ADDRESS, "https://x")
    check_webhook(asked)


def test_slurm_writes_where_it_is_asked() -> None:
    run = RunDirectory(Path("/a/full/sft"))
    options = sbatch_options(Config(slurm=Slurm(mail_user="me@example.org")), run, [])
    assert (options["mail-user"], options["mail-type"]) == ("me@example.org", "FAIL,INVALID_DEPEND")
    assert not any(name.startswith("mail") for name in sbatch_options(Config(), run, []))
