"""What of a config and of a text may be shown to others. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
IN_TEXT = re.compile(
    r"(?P<before>://)[^/@\s:]*:[^/@\s]*(?=@)"  # user:password@host
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[opsu]_[A-Za-z0-9]{20,}"
)
"""Passwords in addresses, and tokens of the hub, of OpenAI and of GitHub."""


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen config for others' eyes: without the job's environment and set-up lines, who is written to, and names
    that mean secrets."""
    kept = {}
    for name, value in config.items():
        if SECRET.search(str(name)) or name == "notify":
            continue
        if name == "slurm" and isinstance(value, Mapping):
            value = {key: inner for key, inner in value.items() if key not in ("env", "setup", "mail_user")}
        kept[str(name)] = without_secrets(value) if isinstance(value, Mapping) else value
    return kept


def masked(text: str) -> str:
    """A text for others' eyes: what looks like a password or a token becomes ***."""
    return IN_TEXT.sub(lambda found: f"{found['before'] or ''}***", text)
