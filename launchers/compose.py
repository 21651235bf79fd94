"""Overrides in, typed configs out: the pipeline's, and each stage's own.

Hydra does the composing; this module decides which overrides each stage gets, and says what is wrong with
them in our own words. What a stage is made of, later over earlier:

    conf/config.yaml and its groups, conf/stage/<stage>.yaml
    the node's `overrides` in conf/pipeline/<pipeline>.yaml
    key=value          of the command line
    <stage>.key=value  of the command line
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from conf.check import ConfigError, nearest
from conf.schema import LENGTHS, TECHNIQUES, Config, Gate, Node

CONF = Path(__file__).resolve().parent.parent / "conf"
OWN = "POST_TRAINING_CONF"
"""The environment variable with a folder laid out as conf/, whose files stand beside the project's: a site's, yours."""
ONE_FOR_ALL = ("stage", "pipeline", "cluster", "run_name", "dry_run", "stages", "paths", "sweep")
"""Root keys that cannot differ between the stages of one pipeline."""
_TOKEN = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[^=]+?)(?:=(?P<value>.*))?", re.DOTALL)


# ------------------------------------------------------------------------------------------- the schema


def own_folder() -> Path | None:
    """The folder that POST_TRAINING_CONF names; None where it is not set. Raises ConfigError where there is none."""
    given = os.environ.get(OWN)
    if not given:
        return None
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            OWN, given, "no such folder", f"export {OWN}=<a folder with cluster/<site>.yaml>, or unset it"
        )
    return folder


def search_path() -> list[str]:
    """Where Hydra looks for files beside conf/, as hydra.searchpath has it."""
    own = own_folder()
    return [] if own is None else [f"file://{own}"]


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Config groups and their options, from the files there are."""
    own = own_folder()
    names = sorted(p.name for p in CONF.iterdir() if p.is_dir() and any(p.glob("*.yaml")))
    folders = {name: [CONF / name, *([own / name] if own else [])] for name in names}
    return {name: tuple(sorted({f.stem for p in places for f in p.glob("*.yaml")})) for name, places in folders.items()}


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    name: str  # dotted
    default: Any
    help: str
    section: bool  # holds further keys


def _walk(cls: type, prefix: str) -> Iterable[Key]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            default = item.default
        section = dataclasses.is_dataclass(hints[item.name])
        yield Key(prefix + item.name, default, item.metadata["help"], section)
        if section:
            yield from _walk(hints[item.name], f"{prefix}{item.name}.")


@cache
def keys() -> dict[str, Key]:
    """Every key of the config by its dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


# ------------------------------------------------------------------------------------------- overrides


def split(token: str) -> tuple[str, str, str | None]:
    """Prefix, key and value of an override as it stands on the command line."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return "", token, None
    return match["prefix"] or "", match["key"], match["value"]


def swept(tokens: Iterable[str]) -> set[str]:
    """Keys that have several values, under -m one for each point."""
    parsed = [(token, OverridesParser.create().parse_override(token)) for token in tokens]
    return {split(token)[1] for token, override in parsed if override.is_sweep_override()}


def _is_open(key: str) -> bool:
    """Whether `key` is inside a dictionary with keys of the user's choice, to which Hydra adds with ++ alone."""
    return key.startswith("slurm.env.")


def check_token(token: str) -> None:
    """Refuse what Hydra would take although it cannot be meant: new keys, deleted keys, a group's unknown option."""
    prefix, key, value = split(token)
    if key in groups() and not prefix and value is not None and value not in groups()[key]:
        raise ConfigError(key, value, f"no such file in conf/{key}", nearest(value, groups()[key]))
    if prefix and not key.startswith(("slurm.env.", "stages.", "pipeline.stages.", "hydra.")):
        if key not in keys():
            raise unknown_key(key, value)
        if prefix == "~":
            raise ConfigError(key, token, "keys cannot be deleted", f"{key}=null, or leave it out for its default")


def rewrite(token: str) -> str:
    """`<stage>.<section>.<key>=v`, which sets a key for one stage alone, as an override that Hydra knows.

    `sft.training.max_steps=3` becomes `++stages.sft.training.max_steps=3`, so that sweeps over it work as over
    any other key. Keys of a technique's own section (`sft.lr`, `ppo.reward.correct`) are for every stage and
    stay what they are. A group's choice, as in `sft.data=gsm8k`, goes to `stages.<stage>.choices`, and an eval
    stage's gate, as in `eval_sft.gate.at_least=0.3`, to the graph.
    """
    prefix, key, value = split(token)
    if prefix == "~" or value is None:
        return token
    if _is_open(key):
        return f"++{key}={value}"
    first, _, rest = key.partition(".")
    section = rest.partition(".")[0]
    known = keys()
    if first in ("stages", "hydra") or (first in known and first not in TECHNIQUES):
        return token
    if section == "gate":  # of the graph, not of the stage's config
        return f"{prefix}pipeline.stages.{first}.{rest}={value}"
    if (section not in known and rest not in groups()) or f"{first}.{section}" in known:
        return token
    if section in ONE_FOR_ALL:
        raise ConfigError(key, value, "is the same for all stages of a pipeline", f"{rest}={value}")
    if rest in groups():
        return f"++stages.{first}.choices.{rest}={value}"
    return f"++stages.{first}.{rest}={value}"


def rewrite_stage(token: str) -> str:
    """`stage=<a name in the pipeline's graph>` as an override that Hydra knows: it takes files of conf/stage alone."""
    prefix, key, value = split(token)
    if key != "stage" or prefix or value is None or all(v.strip() in groups()["stage"] for v in value.split(",")):
        return token
    return f"++stages.selected={value}"


def exclusive_lengths(layer: Sequence[str]) -> list[str]:
    """The layer, with the lengths that it does not mention set to null where it gives one of them.

    The four lengths exclude each other: who says `training.max_steps=3` does not mean the epochs of a layer below.
    """
    mentioned, given = set(), False
    for token in layer:
        _, key, value = split(token)
        section, _, name = key.partition(".")
        if section == "training" and name in LENGTHS:
            mentioned.add(name)
            given |= value != "null"
    others = [f"training.{name}=null" for name in LENGTHS if name not in mentioned]
    return [*(others if given else []), *layer]


@dataclass(frozen=True)
class Layers:
    """What one command says, sorted by whom it is for."""

    everywhere: tuple[str, ...]
    alone: Mapping[str, tuple[str, ...]]  # by name in the graph, or technique
    choices: Mapping[str, str]  # of the groups that are one for all: pipeline, cluster, stage
    selected: str | None  # `stage=` of submit

    @classmethod
    def of(cls, tokens: Iterable[str]) -> Layers:
        """Sort rewritten tokens. Later ones win, as in Hydra."""
        everywhere: list[str] = []
        alone: dict[str, list[str]] = {}
        choices: dict[str, str] = {}
        selected = None
        for token in tokens:
            _, key, value = split(token)
            value = value or ""
            if key in ("stage", "pipeline", "cluster"):
                choices[key] = value
            elif key == "stages.selected":
                selected = value
            elif key.startswith("stages."):
                _, name, rest = key.split(".", 2) if key.count(".") > 1 else ("", key.partition(".")[2], "")
                if not rest:
                    raise ConfigError(
                        key,
                        value,
                        "says nothing about a stage",
                        "write <stage>.<key>=<value>, as in sft.training.max_steps=3",
                    )
                inner = rest.removeprefix("choices.")
                alone.setdefault(name, []).append(f"{'++' if _is_open(inner) else ''}{inner}={value}")
            elif key != "dry_run":
                everywhere.append(token)
        return cls(
            tuple(everywhere), {k: tuple(v) for k, v in alone.items()}, choices, selected or choices.get("stage")
        )


def stage_overrides(
    layers: Layers, pipeline: str, cluster: str, name: str, node: Node, names: Iterable[str]
) -> tuple[str, ...]:
    """The overrides from which one stage is composed: its groups, then values, later layers over earlier ones.

    names: all names of the graph. A technique that is no name in it stands for all of its stages.
    """
    layer_list: list[Sequence[str]] = [[rewrite(t) for t in node.overrides], layers.everywhere]
    if node.stage not in set(names):
        layer_list.append(layers.alone.get(node.stage, ()))
    layer_list.append(layers.alone.get(name, ()))
    chosen = {"pipeline": pipeline, "stage": node.stage, "cluster": cluster}
    values: list[str] = []
    for layer in layer_list:
        plain = []
        for token in layer:
            prefix, key, value = split(token)
            if key in ("stage", "pipeline", "cluster", "stages"):
                raise ConfigError(
                    f"pipeline.stages.{name}.overrides", token, "is the same for all stages", "leave it out"
                )
            if key in groups() and not prefix and value is not None:
                chosen[key] = value
            else:
                plain.append(token)
        values += exclusive_lengths(plain)
    return (*(f"{group}={choice}" for group, choice in chosen.items()), *values)


# ------------------------------------------------------------------------------------------- composing


class _Loader(ConfigLoaderImpl):
    """Hydra's composition without Hydra's own config in it, with what configs of one command share done once.

    A pipeline composes a config for each of its stages. They share the files, and what is merged before the stage's
    own file: this way a config takes a tenth of the time.
    """

    @cached_property
    def _cached(self) -> CachingConfigRepository:
        return CachingConfigRepository(self.repository)

    @cached_property
    def _merged(self) -> dict[tuple[str, ...], bytes]:
        return {}  # what comes before a stage's file, by its files; pickled, since deepcopy takes six times as long

    def compose(self, overrides: list[str]) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        self.validate_sweep_overrides_legal(parsed, run_mode=RunMode.RUN, from_shell=True)
        wanted = create_defaults_list(
            repo=self._cached, config_name="config", overrides_list=parsed, prepend_hydra=False, skip_missing=False
        )
        cfg = self._compose_config_from_defaults_list(defaults=wanted.defaults, repo=self._cached)
        OmegaConf.set_struct(cfg, True)
        self._apply_overrides_to_config(wanted.config_overrides, cfg)
        return cfg

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        paths = tuple(str(default.config_path) for default in defaults)
        shared = next((i for i, path in enumerate(paths) if path.startswith("stage/")), len(paths))
        key = paths[:shared]
        if key not in self._merged:
            self._merged[key] = pickle.dumps(super()._compose_config_from_defaults_list(defaults[:shared], repo))
        cfg = cast(DictConfig, pickle.loads(self._merged[key]))
        with flag_override(cfg, "no_deepcopy_set_nodes", True):
            for default in defaults[shared:]:
                try:
                    cfg.merge_with(self._load_single_config(default, repo).config)
                except OmegaConfBaseException as error:  # in Hydra's words, which `translate` reads
                    text = f"In '{default.config_path}': {type(error).__name__} raised while composing config:\n{error}"
                    raise ConfigCompositionException(text) from error
        return cfg

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        # merging takes nodes over without copying them: the cached ones must stay as they are
        result = copy.copy(super()._load_single_config(default, repo))
        result.config = copy.deepcopy(result.config)
        return result


def _devcluster_conf() -> str:
    from launchers.devcluster import default_dir

    return str(default_dir() / "slurm.conf")


def register() -> None:
    """Tell Hydra of the schema, and OmegaConf of the resolver in conf/cluster/dev.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("devcluster_conf", _devcluster_conf, replace=True)


@dataclass
class Composer:
    """Composes configs from overrides. Raises ConfigError for what the schema does not allow."""

    conf: Path = CONF
    _done: dict[tuple[str, ...], Config] = field(default_factory=dict)

    @cached_property
    def loader(self) -> _Loader:
        from hydra import version

        version.setbase("1.3")
        register()
        path = create_config_search_path(str(self.conf))
        for place in search_path():
            path.prepend(OWN, place, anchor="schema")  # which must be the last
        return _Loader(config_search_path=path)

    def config(self, overrides: Sequence[str]) -> Config:
        """The config that conf/config.yaml and these overrides make."""
        known = self._done.get(tuple(overrides))
        if known is None:
            known = self._done[tuple(overrides)] = translated(lambda: self._compose(overrides), overrides)
        return known

    def _compose(self, overrides: Sequence[str]) -> Config:
        for token in overrides:
            check_token(token)
        ours = [token for token in overrides if not split(token)[1].startswith("hydra.")]
        return cast(Config, OmegaConf.to_object(self.loader.compose(ours)))


# ------------------------------------------------------------------------------------------- what went wrong


def translated(make: Callable[[], Config], overrides: Sequence[str]) -> Config:
    """Hydra's and OmegaConf's exceptions as ConfigError: key, value, what is allowed, and the nearest valid one."""
    try:
        return make()
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise translate(error, overrides) from error


def unknown_key(key: str, value: object) -> ConfigError:
    """The refusal of a key that the schema lacks."""
    known = list(keys())
    parts = key.split(".")
    if key.startswith("pipeline.stages.") and len(parts) > 3:
        known = [f"{'.'.join(parts[:3])}.{f.name}" for f in dataclasses.fields(Node)]
        known += [f"{'.'.join(parts[:3])}.gate.{f.name}" for f in dataclasses.fields(Gate)]
    same = [k for k in known if k.rpartition(".")[2] == parts[-1]]
    depth = next((i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in known), 0)
    parent = ".".join(parts[:depth])
    hint = nearest(key, known)
    if same and not any(k.partition(".")[0] == parts[0] for k in same):
        hint = f"did you mean '{same[0]}'?" if len(same) == 1 else f"did you mean one of {', '.join(same)}?"
    elif not hint.startswith("did you mean"):
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
        hint = f"{parent} has: {', '.join(siblings)}" if parent else "--help lists every key"
    return ConfigError(key, value, "no such key", hint)


def _value_of(key: str, overrides: Iterable[str]) -> object:
    found: object = "?"
    for token in overrides:
        _, name, value = split(token)
        if name == key:
            found = value
    return found


def translate(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """What Hydra or OmegaConf refused, as one of our errors."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = f"{error}"
    if isinstance(error, OverrideParseException):
        _, key, value = split(error.override)
        if value is None:
            fix = (
                nearest(key, keys()) if key in keys() or key in groups() else "write key=value; --help lists every key"
            )
            return ConfigError(key, "", "is not an override", fix if key not in keys() else f"{key}=<value>")
        return ConfigError(key, value, "cannot be read as a value", f"quote it, as in '{key}=\"{value}\"'")
    if match := re.match(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text, re.DOTALL):
        file, rest = f"conf/{match[1]}.yaml", match[2]
        if unknown := re.match(r"Key '([^']+)' not in", rest):
            full = re.search(r"full_key: (\S+)", rest)
            inner = unknown_key(full[1] if full else unknown[1], "...")
            return ConfigError(inner.key, f"(in {file})", inner.problem, inner.fix)
        full = re.search(r"full_key: (\S+)", rest)
        return ConfigError(full[1] if full else file, f"(in {file})", rest.splitlines()[0], f"mend {file}")
    if match := re.match(r"Could not override '([^']+)'", text):
        key = match[1].split("@")[0]
        return unknown_key(key, _value_of(key, overrides))
    if match := re.match(r"Multiple values for ([^\s.]+)", text):
        return ConfigError(match[1], " and ".join(_all_values(match[1], overrides)), "is given twice", "give it once")
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)", text):
        _, key, value = split(match[1])
        return ConfigError(
            key, value, "several values", f"add -m to run one after the other, or give a list: {key}=[{value}]"
        )
    if match := re.match(r"Error merging override (.*)", text, re.DOTALL):
        _, key, value = split(match[1].strip())
        at = str(getattr(cause, "full_key", None) or key)
        if isinstance(cause, OmegaConfBaseException) and "not in" in f"{cause}" and at not in keys():
            return unknown_key(at, value)
        first = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        return ConfigError(at, value, first, _expected(at))
    where = str(getattr(cause, "full_key", None) or "config")
    first = (
        str(getattr(cause, "msg", None) or cause).strip().splitlines()[0]
        if str(cause).strip()
        else type(cause).__name__
    )
    return ConfigError(where, _value_of(where, overrides), first, _expected(where))


def _all_values(key: str, overrides: Iterable[str]) -> list[str]:
    return [value or "" for _, name, value in map(split, overrides) if name == key]


def _expected(key: str) -> str:
    known = keys().get(key)
    if known is None:
        return "--help lists every key"
    shown = "null" if known.default is None or known.section else repr(known.default)
    return f"{key}: {known.help}" if known.section else f"{key}: {known.help} (default {shown})"
