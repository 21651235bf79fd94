"""The ledger: a run's append-only record, one JSON object a line.

Every line has `time` (seconds since the epoch), `event` and `version`. The events:

    submitted          job_id, cluster                 a job was queued for this run
    shared             pipelines                       folders beside its own pipeline's whose stages wait for this run
    restarted          folder                          what was there was set aside: the run starts from scratch
    attempt_started    attempt, job_id, node, nodes, restart_count      the job script began
    training_started   attempt, step                   the first step is about to run, after `step` done ones
    not_exact          attempt, reason                 what holds for this resume instead of bit-exactness
    stop_requested     attempt, signal                 the script was asked to stop
    checkpoint_saved   attempt, step, seconds          a complete checkpoint, manifest included
    guardrail          attempt, step, rule, action, reason      the logged figures look wrong, and what was done
    set_aside          attempt, folder, reason         a checkpoint that is not whole was renamed, not deleted
    stopped            attempt, step                   the attempt saved and left on request
    attempt_ended      attempt, code, outcome, action, reason, ...      see run.life
    avoided            job_id, nodes                   the job was requeued away from these nodes before it began
    cancelled          reason                          by the user, or because an upstream stage failed
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

VERSION = 1
Event = dict[str, Any]


def append(ledger: Path, event: str, **fields: Any) -> Event:
    """Add one event and make it durable.

    One O_APPEND write does not mix with another's; the lock keeps us from taking another's write in progress for
    a torn line. A file system without locks can thus make an empty line, which `parse` passes over.
    """
    entry: Event = {"time": round(time.time(), 3), "event": event, **fields, "version": VERSION}
    line = json.dumps(entry, separators=(",", ":")) + "\n"
    descriptor = os.open(ledger, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line  # the last writer died in the middle of a line: leave its piece alone
        data = line.encode()
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, "only a part of the line found room", str(ledger))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


def parse(text: str) -> list[Event]:
    """The events of a ledger's text. Lines that are not whole events (a torn write) are left out."""
    events = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("event"), str) and "time" in entry:
            events.append(entry)
    return events


def read(ledger: Path) -> list[Event]:
    """The events so far; none where there is no ledger yet."""
    try:
        return parse(ledger.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return []
