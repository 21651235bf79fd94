"""What the entry points that take overrides share: reading the command line, multirun, help, errors.

A plain command composes its configs itself (launchers.compose). Hydra's own machinery runs for Hydra's own
flags: -m (multirun), --cfg, --info.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from conf.check import ConfigError
from launchers.errors import LaunchError

S = TypeVar("S")


def run(
    select: Callable[[list[str]], S], act: Callable[[S], int], usage: str, argv: Sequence[str] | None = None
) -> int:
    """Run an entry point. Returns its exit status: 2, with one clear message, for what it refuses.

    select: from rewritten overrides to what they mean; raises ConfigError, LaunchError. Under -m every point of the
    sweep is selected before `act` does anything, so that a wrong last point leaves nothing behind.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(arg in ("-h", "--help") for arg in args):
            print(help_text(usage), end="")
            return 0
        from launchers.compose import rewrite, rewrite_stage

        tokens = [arg if arg.startswith("-") else rewrite_stage(rewrite(arg)) for arg in args]
        if any(token.startswith("-") for token in tokens):
            status, points = _through_hydra(tokens)
            if status:
                return status
        else:
            points = [tokens]
        status = 0
        for selection in [select(point) for point in points]:
            status = max(status, act(selection))
            sys.stdout.flush()
        return status
    except (ConfigError, LaunchError) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _through_hydra(args: list[str]) -> tuple[int, list[list[str]]]:
    """Let Hydra act on its own flags. Returns its exit status, and under -m the overrides of each point."""
    import logging
    import tempfile

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from launchers.compose import CONF, check_token, register, search_path, swept, translate

    def is_override(arg: str) -> bool:
        return not arg.startswith("-") and ("=" in arg or arg.startswith("~"))

    tokens = [arg for arg in args if is_override(arg)]
    flags = [arg for arg in args if not is_override(arg)]
    multirun = any(arg in ("-m", "--multirun") for arg in flags)
    for token in tokens:
        if not multirun:
            check_token(token)
    sweep = swept(tokens) if multirun else set()
    points: list[list[str]] = []

    def task(cfg: DictConfig) -> None:
        point = list(HydraConfig.get().overrides.task)
        if not any(token.startswith("run_name=") for token in point):
            name = point_name(str(cfg.pipeline.name), point, sweep)
            point += [f"run_name='{name}'"] if name else []
        points.append(point)

    register()
    before = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us
    logging.raiseExceptions = False  # nor a traceback for `--info | head`
    try:
        with tempfile.TemporaryDirectory(prefix="post_training-sweep-") as folder:
            # Hydra writes a file and folders for every sweep: none of them here
            extra = [f"hydra.sweep.dir={folder}"] if multirun else []
            quoted = [place.replace("\\", "\\\\").replace("'", "\\'") for place in search_path()]
            extra += [f"hydra.searchpath=['{place}']" for place in quoted]
            sys.argv = [before[0], *flags, *extra, *tokens]
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="hydra")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error, tokens) from error
    except SystemExit as error:  # argparse's, after its own message
        return (error.code if isinstance(error.code, int) else 2), []
    finally:
        sys.argv = before
    return 0, points


def point_name(pipeline: str, point: Sequence[str], sweep: set[str]) -> str | None:
    """The folder of one point of a sweep, from the overrides that differ between the points. Pure.

    None where no setting is swept: several stages of one pipeline stay in one folder.
    """
    from launchers.compose import split

    parts = []
    for token in point:
        _, key, value = split(token)
        if key in sweep and key not in ("stage", "stages.selected"):
            shown = key.removeprefix("stages.").replace(".choices.", ".")
            parts.append(value if key == "pipeline" else f"{shown}={value}")
    if not parts:
        return None
    text = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(sorted(map(str, parts))))
    if len(text) > 120:
        text = f"{text[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{pipeline}-{text}"


def help_text(usage: str) -> str:
    """Usage, the groups with their options, and every key with its default and its line of help."""
    from launchers.compose import groups, keys

    lines = [usage.strip(), "", "Groups, chosen with <group>=<option>:", ""]
    lines += [f"  {name:10} {', '.join(options)}" for name, options in groups().items()]
    lines += ["", "Keys, set with <key>=<value>, or for one stage alone with <stage>.<key>=<value>.", ""]
    lines += ["Defaults are the schema's; files of the chosen groups set many of them: --cfg job shows the result.", ""]
    for key in keys().values():
        if key.section:
            lines += ["", f"  {key.name}: {key.help}"]
        else:
            shown = _plain(key.default)
            lines.append(f"    {f'{key.name}={shown}':46} {key.help}")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
