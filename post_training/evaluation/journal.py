"""What an evaluation has found so far, kept through stops and requeues: one JSON object a line, append-only.

An evaluation has no checkpoints. It writes each answer, or batch of figures, here as soon as it has it, and its next
attempt asks only what is missing. Keys say what was asked; model, data and config are the run's own, and frozen.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from post_training.run.directory import RunDirectory

NAME = "evaluation.jsonl"


class Journal:
    """Answers by key. Made by one attempt; a newer one fences it off (`Fenced`)."""

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self.path = run.checkpoints / NAME  # where restart=true sets it aside
        self.known: dict[str, Any] = {}
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a torn write: it is asked again
        self.resumed = len(self.known)

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Any:
        return self.known[key]

    def add(self, found: dict[str, Any]) -> None:
        """Keep values (JSON) under their keys; on the disk when this returns. Raises Fenced."""
        if not found:
            return
        lines = "".join(json.dumps({"key": k, "value": v}, separators=(",", ":")) + "\n" for k, v in found.items())
        with self.run.writing_as(self.attempt), self.path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                lines = "\n" + lines  # the last writer died in the middle of a line
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.known |= found


def key(*parts: Any) -> str:
    """A key from what was asked: kind, question, settings (anything JSON can hold)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
