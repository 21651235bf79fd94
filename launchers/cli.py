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
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from conf.check import ConfigError
from launchers.errors import LaunchError

S = TypeVar("S")


def run(
    select: Callable[[list[str]], S],
    act: Callable[[S], int],
    usage: str,
    argv: Sequence[str] | None = None,
    sweep: Callable[[Sweep, list[S]], int] | None = None,
    sample: Callable[[list[str]], int | None] | None = None,
) -> int:
    """Run an entry point. Returns its exit status: 2, with one clear message, for what it refuses.

    select: from rewritten overrides to what they mean; raises ConfigError, LaunchError. Under -m every point of the
    sweep is selected before `act` does anything, so that a wrong last point leaves nothing behind. sweep: acts on all
    points of a sweep at once. sample: acts where a sampler is to choose them; None where the command names none.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(arg in ("-h", "--help") for arg in args):
            print(help_text(usage), end="")
            return 0
        from launchers.compose import rewrite, rewrite_stage

        tokens = [arg if arg.startswith("-") else rewrite_stage(rewrite(arg)) for arg in args]
        several = None
        if not any(token in ("-m", "--multirun") for token in tokens):
            sampler = next((token for token in tokens if token.startswith("hydra/sweeper=")), None)
            if sampler is not None:
                raise ConfigError("hydra/sweeper", sampler.partition("=")[2], "samples the points of a sweep", "add -m")
        if any(token.startswith("-") for token in tokens):
            multirun = [token for token in tokens if token not in ("-m", "--multirun")]
            if sample is not None and len(multirun) < len(tokens) and (status := sample(multirun)) is not None:
                return status
            if len(multirun) < len(tokens) and not any(token.startswith(("-", "hydra")) for token in multirun):
                points, several = expand(multirun)
            else:
                status, points = _through_hydra(tokens)
                if status:
                    return status
        else:
            points = [tokens]
        selected = [select(point) for point in points]
        if sweep is not None and several is not None:
            return sweep(several, selected)
        status = 0
        for selection in selected:
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


@dataclass(frozen=True)
class Sweep:
    """The points of a multirun, each with a pipeline's folder of its own."""

    name: str
    points: dict[str, dict[str, str]]  # what differs between the points, by folder: keys and values


MAX_POINTS = 1000
"""Of one command. Parts of a larger sweep share what is the same in them."""


def expand(tokens: list[str]) -> tuple[list[list[str]], Sweep | None]:
    """The overrides of each point of a multirun, and what the sweep is.

    None where nothing differs but which stage of a pipeline is meant. Raises ConfigError.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from launchers.compose import split, swept, translate
    from launchers.selection import composer

    try:
        sweep = swept(tokens)
        parsed = OverridesParser.create(config_loader=composer().loader).parse_overrides(tokens)
        count = 1
        for override in parsed:
            if override.is_sweep_override() and override.is_discrete_sweep():
                values = list(islice(override.sweep_string_iterator(), MAX_POINTS + 1))
                key = override.get_key_element().lstrip("+")
                if not values:
                    raise ConfigError(key, split(override.input_line or "")[2], "has no value to try", "give one")
                count *= len(values)
                if count > MAX_POINTS:
                    problem = f"makes more than {MAX_POINTS} points"
                    fix = "fewer values, or a part of them at a time: the parts share what is equal"
                    raise ConfigError(key, split(override.input_line or "")[2], problem, fix)
            elif override.is_sweep_override():
                problem = "is a range to sample from, and nothing samples"
                key, value = split(override.input_line or "")[1:]
                raise ConfigError(key, value, problem, "hydra/sweeper=optuna, or a list of values")
        points = BasicSweeper.split_arguments(parsed, None)[0]
    except (HydraException, OmegaConfBaseException) as error:
        found = translate(error, tokens)
        wrong = next((token for token in tokens if f"'{split(token)[2]}'" in found.problem), None)
        if found.key == "config" and wrong is not None:  # a function of Hydra's that refuses what it is given
            found = ConfigError(*split(wrong)[1:], found.problem, "values by commas, or range(first,last,step)")
        raise found from error
    points = [list(point) for point in dict.fromkeys(map(tuple, points))]  # a value that is given twice
    keys = {key for key in sweep if key not in ("stage", "stages.selected")}
    if not keys:
        return points, None
    return name_points(points, keys)


def name_points(
    points: list[list[str]], keys: set[str], alike: bool = False
) -> tuple[list[list[str]], Sweep]:  # fmt: skip
    """Give each point of a sweep a folder by what differs. alike: points may be the same.

    Raises ConfigError where two that are not would have the same folder.
    """
    from launchers.compose import split
    from launchers.selection import composer

    given = next((v for token in points[0] if (v := split(token)[2]) and split(token)[1] == "run_name"), None)
    own = "run_name" in keys
    result: list[list[str]] = []
    found: dict[str, dict[str, str]] = {}
    bases: dict[tuple[str, ...], str] = {}
    for point in points:
        chosen = tuple(token for token in point if split(token)[1] in ("pipeline", "pipeline.name"))
        if chosen not in bases:
            bases[chosen] = str(composer().config(chosen).pipeline.name)
        values = {_shown(split(token)[1]): split(token)[2] or "" for token in point if split(token)[1] in keys}
        rest = [token for token in point if split(token)[1] != "run_name"]
        name = values["run_name"] if own else point_name(unquoted(given) if given else bases[chosen], point, keys)
        name = unquoted(str(name))
        several = {"stage", "stages.selected"} & {split(token)[1] for token in point}
        if name in found and not several and not (alike and found[name] == values):
            two = " and ".join(",".join(f"{k}={v}" for k, v in one.items()) for one in (found[name], values))
            raise ConfigError(
                next(iter(values)), two, f"would both have the folder {name}", "a run_name for each, or one at a time"
            )
        found[name] = values
        result.append([*rest, f"run_name='{_quoted(name)}'"])
    words = ",".join(sorted(_shown(key) for key in keys))
    name = unquoted(given) if given and not own else _clean(f"{'-'.join(dict.fromkeys(bases.values()))}-{words}")
    return result, Sweep(name, found)


def _shown(key: str) -> str:
    return key.removeprefix("stages.").replace(".choices.", ".")


def unquoted(value: str) -> str:
    """A value as it stands in an override, without its quotes."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(f"\\{value[0]}", value[0])
    return value


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")


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
            parts.append(value if key == "pipeline" else f"{_shown(key)}={value}")
    return f"{pipeline}-{_clean(','.join(sorted(map(str, parts))))}" if parts else None


def _clean(text: str) -> str:
    """A text as a part of a folder's name."""
    text = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)
    return f"{text[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if len(text) > 120 else text


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
