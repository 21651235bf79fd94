"""Tell what nobody was told of: runs whose jobs were killed or cancelled before they could say so themselves.

    python -m launchers.notify [run_name=NAME ...] [paths.output_base=outputs] [--json]
    python -m launchers.notify --test [cluster=SITE] [notify.webhook=true] [notify.mail=ADDRESS] [notify.smtp=HOST]

Without --test it looks at all pipelines as status does, and sends what each run's frozen config asks for: fit for cron.
Each end is told once. --test sends one message from this machine with the config that stages would get, and says what
came of it: from a compute node as `srun python -m launchers.notify --test ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from conf.check import ConfigError
from launchers.errors import LaunchError
from post_training.run import ledger, notify
from post_training.run.directory import RunDirectory


def missed(row: dict[str, Any], events: list[ledger.Event]) -> notify.Due | None:
    """What is to be told of a run, a row of status, whose ledger may lack its end. Pure."""
    if (what := notify.due(events)) is not None and what.event != "requeued":
        return what
    if row["state"] not in ("failed", "cancelled"):
        return None
    last = next((e for e in reversed(events) if e["event"] in ("submitted", "attempt_started", "attempt_ended")), None)
    if last is None or (last["event"] == "attempt_ended" and last.get("action") == "exit"):
        return None  # the ledger has its end
    found = notify.Due(row["state"], int(row["attempts"]), row["reason"])
    return None if notify.is_told(events, found) else found


def catch_up(output_base: Path, names: list[str]) -> list[dict[str, Any]]:
    """Tell what is due of all runs; what was sent. Asks SLURM once. Raises LaunchError."""
    from launchers.runs import collect

    sent = []
    for row in collect(output_base, names):
        run = RunDirectory(Path(row["run_dir"]))
        what = missed(row, ledger.read(run.ledger)) if row["state"] != "unknown" else None
        if what is not None:
            sent += [{"title": message.title, "ways": ways} for message, ways in notify.tell(run, what)]
    return sent


def test(tokens: list[str]) -> list[dict[str, Any]]:
    """Send one message as stages with this config would. Raises ConfigError."""
    from dataclasses import asdict

    from conf.check import check_notify
    from launchers.compose import Composer, rewrite

    cfg = Composer().config([rewrite(token) for token in tokens])
    check_notify(cfg)
    if not cfg.notify.webhook and cfg.notify.mail is None:
        raise ConfigError(
            "notify.webhook", "false", "and no notify.mail: nobody is told anything",
            f"notify.webhook=true with {notify.ADDRESS} exported, or notify.mail=<address>",
        )  # fmt: skip
    if cfg.notify.webhook and not os.environ.get(notify.ADDRESS):
        raise ConfigError("notify.webhook", "true", f"{notify.ADDRESS} is not set", f"export {notify.ADDRESS}=...")
    title = f"a test from {os.uname().nodename}: messages about runs arrive here"
    about = {"event": "test", "time": round(time.time(), 3)}
    message = notify.Message(title, title, about)
    return [{"title": title, "ways": notify.send(asdict(cfg.notify), [message])[0]}]


def shown(sent: list[dict[str, Any]]) -> str:
    """What was sent, a line each."""
    lines = []
    for item in sent:
        ways = [f"{way}: {'sent' if why is None else f'not sent: {why}'}" for way, why in item["ways"].items()]
        lines += [item["title"], *(f"  {line}" for line in ways)]
    return "\n".join(lines) or "nothing to tell"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--test", action="store_true", help="send one message now, from this machine")
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    args = parser.parse_args(argv)
    try:
        if args.test:
            sent = test(args.settings)
        else:
            from launchers.runs import which

            sent = catch_up(*which(args.settings, "notify"))
    except (ConfigError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(sent) if args.json else shown(sent))
    return int(any(why is not None for item in sent for why in item["ways"].values()))


if __name__ == "__main__":
    sys.exit(main())
