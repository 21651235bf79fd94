"""The ledger: a run's append-only record, one JSON object a line.

Every line has `time` (seconds since the epoch), `event` and `version`. The events:

    submitted          job_id, cluster                 a job was queued for this run
    shared             pipelines                       folders beside its own pipeline's whose stages wait for this run
    restarted          folder                          what was there was set aside: the run starts from scratch
    attempt_started    attempt, job_id, node, nodes, restart_count      the job script began
    training_started   attempt, step                   the first step is about to run, after `step` done ones
    not_exact          attempt, reason                 what holds for this resume instead of bit-exactness
    asked              what, user, job_id              a person asked for it: what is cancel, requeue, hold or release.
                                                    A cancel stands until the run is submitted again: no attempt of that
                                                    job begins any more, and the running one is not followed by another
    stop_requested     attempt, signal                 the script was asked to stop
    checkpoint_saved   attempt, step, seconds          a complete checkpoint, manifest included
    guardrail          attempt, step, rule, action, reason      the logged figures look wrong, and what was done
    set_aside          attempt, folder, reason         a checkpoint that is not whole was renamed, not deleted
    stopped            attempt, step                   the attempt saved and left on request
    attempt_ended      attempt, code, outcome, action, reason, ...      see run.life
    avoided            job_id, nodes                   the job was requeued away from these nodes before it began
    notified           what, attempt, ways, problems   somebody was told of it, or could not be; see run.notify
    cancelled          reason                          by the user, or because an upstream stage failed
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
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


_TWO_IN_A_LINE = re.compile(r"\}\s*,\s*\{")


def parse_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects, in their order, and how many lines there are; empty ones do not count.

    A look reads a hundred thousand lines, so all are parsed as one array where that must come to the same: as many
    objects as lines, and no line can hold two. Otherwise, as behind a torn write, one by one.
    """
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    if not _TWO_IN_A_LINE.search(text):
        try:
            found = json.loads("[" + ",\n".join(lines) + "]")
        except (ValueError, RecursionError):
            found = []
        if len(found) == len(lines) and all(type(entry) is dict for entry in found):
            return found, len(lines)
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found, len(lines)


def parse(text: str) -> list[Event]:
    """The events of a ledger's text. Lines that are not whole events (a torn write) are left out."""
    return [entry for entry in parse_lines(text)[0] if isinstance(entry.get("event"), str) and "time" in entry]


def read(ledger: Path) -> list[Event]:
    """The events so far; none where there is no ledger yet."""
    try:
        return parse(ledger.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return []
