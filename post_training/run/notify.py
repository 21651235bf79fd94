"""Who is told when a run has ended, or a whole pipeline: a webhook and mail, both off by default.

What is to be told follows from the ledger, so that whoever looks at it comes to the same: the job script's own
commands (run.life), the local supervisor, and `python -m launchers.notify` for ends that nobody could record. The
event `notified` says that it was told, which holds over requeues too.

The webhook's address is a secret: it comes from the environment alone (POST_TRAINING_WEBHOOK), and is in no config,
script, ledger or log. Whatever goes wrong here is said in the ledger and on stderr, and never fails a run; it takes a
few seconds at most, and nothing is sent while a job is still to be requeued.

Only the standard library.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.run import ledger, manifest, results, secrets
from post_training.run.directory import RunDirectory
from post_training.run.history import is_sound, summarise
from post_training.run.ledger import Event

ADDRESS = "POST_TRAINING_WEBHOOK"
"""The environment variable with the webhook's address."""
PATIENCE_S = 5.0
"""How long all of it may take."""
VERSION = 1
EVENTS: dict[str, str] = {
    "done": "done",
    "failed": "failed",
    "stuck": "stopped without progress",
    "gated": "held back by its gate",
    "cancelled": "cancelled",
    "requeued": "started again",
    "pipeline": "done",
}
"""What can be told, and the word that says so; `pipeline`: the last of a pipeline's stages is done."""
Told = dict[str, str | None]
"""By way (webhook, mail): why a message did not arrive; None where it did."""
FUTILE = "slurm.max_attempts_without_progress"
"""What the reason of a run that stopped without progress names, see run.life."""


# ------------------------------------------------------------------------------------ deciding, pure


@dataclass(frozen=True)
class Due:
    """Something that happened to a run and that nobody was told of."""

    event: str
    attempt: int
    reason: str | None = None


def due(events: Iterable[Event]) -> Due | None:
    """What a ledger's newest lines say that was not told yet. Pure.

    A job that is to be requeued has told nothing: `requeued` is due once it runs again.
    """
    found: Due | None = None
    attempt, why, again = 0, None, False
    for event in events:
        if not is_sound(event):
            continue
        match event["event"]:
            case "submitted":
                found, again = None, False
            case "attempt_started":
                attempt = event["attempt"]
                found = Due("requeued", attempt, why) if again else None
                again = False
            case "attempt_ended":
                attempt = event["attempt"] if isinstance(event.get("attempt"), int) else attempt
                why, again = event["reason"], event["action"] == "requeue"
                found = None if again else Due(_ended(event), attempt, why)
            case "cancelled":
                found, again = Due("cancelled", attempt, event["reason"]), False
            case "notified":
                if found is not None and (event.get("what"), event.get("attempt")) == (found.event, found.attempt):
                    found = None
    return found


def is_told(events: Iterable[Event], what: Due) -> bool:
    """Whether somebody was told of this since the newest submission and the newest start. Pure."""
    told = False
    for event in events:
        if event["event"] in ("submitted", "attempt_started"):
            told = False
        elif event["event"] == "notified":
            told |= (event.get("what"), event.get("attempt")) == (what.event, what.attempt)
    return told


def _ended(event: Event) -> str:
    """What an end without a requeue is called."""
    reason = event["reason"] or ""
    if event["outcome"] == "finished":
        return "gated" if reason.startswith("gate: ") else "done"
    if event.get("gave_up"):
        return "stuck" if FUTILE in reason else "failed"
    return "cancelled"


def plain(text: str) -> str:
    """A text for other programs' screens: no control characters, nothing that looks like a secret."""
    return secrets.masked(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)).strip()


def body(text: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is posted: `text` is what Slack and Mattermost show, `content` (2,000 characters at most) what Discord does;
    programs find the figures in `post_training`."""
    return {"text": text, "content": text[:2000], "post_training": {"version": VERSION, **about}}


# ------------------------------------------------------------------------------------------ the words


@dataclass(frozen=True)
class Message:
    """One thing that is told."""

    title: str  # one line
    text: str  # the title, and what else there is to know
    about: dict[str, Any]

    @property
    def event(self) -> str:
        return str(self.about["event"])


def of_run(run: RunDirectory, config: Mapping[str, Any], events: list[Event], what: Due) -> Message:
    """What is told of one run."""
    history = summarise(events)
    step = max(history.checkpoint_step, history.last_step)
    name, where = f"{run.pipeline}/{run.name}", ", ".join(history.nodes)
    parts = [EVENTS[what.event]]
    found = _results(run) if what.event in ("done", "gated") else None
    score = f"{found.headline} {results.shown(found.headline, found.score)}" if found and found.headline else None
    if what.event == "requeued":
        parts = [f"attempt {what.attempt} has begun"]
    if score:
        parts.append(score)
    elif step:
        parts.append(f"step {step}")
    if history.attempts > 1 and what.event != "requeued":
        parts.append(f"{history.attempts} attempts")
    title = plain(f"{name}: {', '.join(parts)}")
    lines = [title]
    if what.reason:
        why = what.reason.removeprefix("gate: ") if what.event == "gated" else what.reason
        lines.append(plain(f"the last attempt: {why}" if what.event == "requeued" else why)[:600])
    if what.event in ("failed", "stuck", "gated", "cancelled") and (lost := _dependents(run)):
        lines.append(plain(f"takes with it: {', '.join(lost)}"))
    lines.append(plain(f"job {history.job_id}{f' on {where}' if where else ''}, {run.root}"))
    about = {
        "event": what.event, "pipeline": run.pipeline, "stage": run.name, "technique": config.get("stage"),
        "job_id": history.job_id, "nodes": history.nodes, "attempt": what.attempt, "step": step or None,
        "reason": plain(what.reason) if what.reason else None, "run_dir": str(run.root), "time": round(time.time(), 3),
        "headline": found.headline if found else None, "score": found.score.value if found and found.score else None,
    }  # fmt: skip
    return Message(title, "\n".join(lines), about)


def of_pipeline(folder: Path, stages: Mapping[str, Path]) -> Message:
    """What is told of a pipeline all of whose stages are done."""
    scores = {}
    for name, root in stages.items():
        found = _results(RunDirectory(root))
        if found is not None and found.headline is not None and found.score is not None:
            scores[name] = (found.headline, found.score)
    shown = [f"{name} {metric} {results.shown(metric, figure)}" for name, (metric, figure) in scores.items()]
    title = plain(f"pipeline {folder.name}: done, {len(stages)} stages")
    lines = [title, *([plain(", ".join(shown))] if shown else []), plain(str(folder))]
    about = {
        "event": "pipeline", "pipeline": folder.name, "stages": len(stages), "run_dir": str(folder),
        "time": round(time.time(), 3),
        "scores": {name: {"metric": metric, "value": figure.value} for name, (metric, figure) in scores.items()},
    }  # fmt: skip
    return Message(title, "\n".join(lines), about)


def _results(run: RunDirectory) -> results.Results | None:
    try:
        return results.read(run)
    except (OSError, ValueError):
        return None


def _stages(run: RunDirectory) -> dict[str, Any]:
    """The stages of the pipeline that this run is in; none where its pipeline.json cannot be read."""
    try:
        stages = json.loads((run.root.parent / "pipeline.json").read_text())["stages"]
        return {name: entry for name, entry in stages.items() if isinstance(entry["run_dir"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _dependents(run: RunDirectory) -> list[str]:
    """Stages that cannot start any more where this one has no output, the next ones first."""
    stages, lost = _stages(run), [run.name]
    for _ in stages:
        lost += [n for n, entry in stages.items() if n not in lost and set(lost) & set(entry.get("after") or ())]
    return [n for n in lost[1:] if manifest.problem(RunDirectory(Path(stages[n]["run_dir"])).model) is not None]


# -------------------------------------------------------------------------------------------- sending


def post(address: str, content: Mapping[str, Any], timeout: float = PATIENCE_S) -> None:
    """POST as JSON. Raises RuntimeError, in words without the address.

    A hook that sends elsewhere (to a page where one logs in) has taken nothing.
    """
    import urllib.error
    import urllib.parse
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            return None

    address = address.strip()
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RuntimeError(f"{ADDRESS} is no address of the form https://...")
    headers = {"Content-Type": "application/json", "User-Agent": "post-training"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as answer:
            answer.read(1000)
    except urllib.error.HTTPError as error:
        said = ""
        with contextlib.suppress(OSError):
            said = error.read(300).decode(errors="replace")
        for secret in (address, parts.path.strip("/"), *parts.path.split("/"), parts.query):
            said = said.replace(secret, "***") if len(secret) > 5 else said
        raise RuntimeError(plain(f"HTTP {error.code} {said}")[:200]) from None
    except urllib.error.URLError as error:
        raise RuntimeError(f"{parts.hostname}: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except (OSError, ValueError) as error:  # http.client's own errors may hold the address
        raise RuntimeError(f"{parts.hostname}: {getattr(error, 'strerror', None) or type(error).__name__}") from None


def mail(to: str, title: str, text: str, server: str | None = None, timeout: float = PATIENCE_S) -> None:
    """Send a mail through `server` (host or host:port, no password), else through this node's sendmail.

    Raises RuntimeError.
    """
    import smtplib
    from email.message import EmailMessage

    letter = EmailMessage()
    letter["To"], letter["Subject"] = to, title
    letter["From"] = f"{getpass.getuser()}@{socket.getfqdn()}"
    letter.set_content(text + "\n")
    try:
        if server is not None:
            host, _, port = server.partition(":")
            with smtplib.SMTP(host, int(port or 25), timeout=timeout) as smtp:
                smtp.send_message(letter)
            return
        program = shutil.which("sendmail", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib")
        if program is None:
            raise RuntimeError(f"{socket.gethostname()} has no sendmail: set notify.smtp, or use slurm.mail_user")
        done = subprocess.run([program, "-t", "-i"], input=letter.as_bytes(), capture_output=True, timeout=timeout)
        if done.returncode != 0:
            said = plain(done.stderr.decode(errors="replace"))
            raise RuntimeError(f"sendmail: {said or f'status {done.returncode}'}"[:200])
    except (OSError, smtplib.SMTPException, subprocess.SubprocessError, ValueError) as error:
        raise RuntimeError(plain(f"{server or 'sendmail'}: {error}")[:200]) from None


def channels(asked: Mapping[str, Any], message: Message) -> dict[str, Callable[[], None]]:
    """By name, what sends a message in the ways that a config's section `notify` asks for."""
    ways: dict[str, Callable[[], None]] = {}
    if asked.get("webhook"):
        address = os.environ.get(ADDRESS, "")
        ways["webhook"] = lambda: post(address, body(message.text, message.about))
    if asked.get("mail"):
        ways["mail"] = lambda: mail(asked["mail"], message.title, message.text, asked.get("smtp"))
    return ways


def send(asked: Mapping[str, Any], messages: list[Message], patience: float = PATIENCE_S) -> list[Told]:
    """Send all messages in all ways at once. For each: why it did not arrive, by way; None where it did.

    A name server that does not answer cannot be given up any other way than by leaving its thread behind.
    """
    told: list[Told] = [{} for _ in messages]

    def work(place: int, way: str, do: Callable[[], None]) -> None:
        try:
            do()
            told[place][way] = None
        except Exception as error:
            told[place][way] = plain(str(error) or type(error).__name__)

    threads = []
    for place, message in enumerate(messages):
        for way, do in channels(asked, message).items():
            told[place][way] = f"no answer within {patience:g} s"
            threads.append(threading.Thread(target=work, args=(place, way, do), daemon=True))
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [dict(ways) for ways in told]


def tell(run: RunDirectory, what: Due | None = None) -> list[tuple[Message, Told]]:
    """Tell what is due of this run, and of its pipeline where that is done; write it down. Never raises.

    what: something that the ledger does not say. Returns what was sent, with what `send` says of it.
    """
    try:
        return _tell(run, what)
    except Exception as error:  # nothing that goes wrong here may end a run
        print(f"warning: nobody was told how {run.name} ended: {type(error).__name__}", file=sys.stderr)
        return []


def _tell(run: RunDirectory, what: Due | None) -> list[tuple[Message, Told]]:
    config = run.read_config()
    asked = config.get("notify") or {}
    if not (asked.get("webhook") or asked.get("mail")):
        return []
    events = ledger.read(run.ledger)
    what = what or due(events)
    if what is None:
        return []
    wanted = asked.get("events") or []
    messages = [of_run(run, config, events, what)] if what.event in wanted else []
    if "pipeline" in wanted and what.event == "done" and (whole := _whole_pipeline(run)):
        messages.append(of_pipeline(run.root.parent, whole))
    if not messages:
        return []
    told = send(asked, messages)
    for message, ways in zip(messages, told, strict=True):
        problems = {way: why for way, why in ways.items() if why is not None}
        ledger.append(
            run.ledger, "notified", what=message.event, attempt=what.attempt, ways=sorted(ways), problems=problems
        )
        for way, why in problems.items():
            print(f"warning: notify by {way}: {why}", file=sys.stderr)
    return list(zip(messages, told, strict=True))


def _whole_pipeline(run: RunDirectory) -> dict[str, Path] | None:
    """The stages' run directories where all are done, for the first who asks: two may end at the same moment."""
    stages = {name: Path(entry["run_dir"]) for name, entry in _stages(run).items()}
    if not stages:
        return None
    jobs = []
    for name, root in stages.items():
        if manifest.problem(RunDirectory(root).model) is not None:
            return None
        history = summarise(ledger.read(RunDirectory(root).ledger))
        if root == run.root or root.parent == run.root.parent:
            jobs.append(f"{name}={history.job_id}.{history.attempts}")
        if history.outcome == "finished" and (history.reason or "").startswith("gate: "):
            return None
    mark = hashlib.sha256("\n".join(jobs).encode()).hexdigest()[:12]
    try:
        os.close(os.open(run.root.parent / f".told-{mark}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return None
    return stages
