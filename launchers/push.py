"""Publish an output on a hub, with its card, its config and its lineage.

    python -m launchers.push stage=grpo repo=<user/name> [run_name=quickstart] [paths.output_base=outputs]
        [step=N | checkpoint=inference_checkpoints/step-N] [license=apache-2.0] [--public] [--dry-run] [--json]
    python -m launchers.push stage=grpo --card [--output card.md]

A policy or reward model becomes a model repository, a sample stage's records a data set. A new repository is private
unless --public is given, and a public one is never pushed to without it. The token is that of HF_TOKEN or of
`hf auth login`. What is pushed was read and compared with its manifest before, and goes up in one commit: a repository
holds all of a push or nothing of it. Pushing the same again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import card, runs
from launchers.errors import LaunchError
from launchers.preflight import HUB_ID
from post_training.run import manifest
from post_training.run.directory import write_atomic

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from launchers.runs import Look

SETTINGS = ("stage", "repo", "run_name", "paths.output_base", "step", "checkpoint", "license", "offline")
NEVER = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "*.log", "events.out*",
         "README.md", "*.py")  # fmt: skip
"""Names that are never pushed, in whatever folder of an output: state, logs, others' cards, and code."""
LOCAL_KEYS = re.compile(r"(^|_)(name_or_path|path|file|dir|folder)$")
CLEANED = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", "held_out.json",
           "results.json")  # fmt: skip
"""Files in which libraries write down where a model came from; vocabularies and templates go as they are."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", "records.jsonl")
LARGEST_TEXT = 20_000_000


class HubError(LaunchError):
    """The hub refused, or does not answer: exit status 1."""


@dataclass(frozen=True)
class Arguments:
    stage: str
    repo: str | None
    run_name: str | None
    output_base: Path
    step: int | None
    license: str | None
    offline: bool
    public: bool
    dry_run: bool
    card: bool
    output: Path | None
    as_json: bool


@dataclass(frozen=True)
class File:
    """One file of a push: a path here, or what is made for it."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Push:
    """What goes where. `kind`: model or dataset, as hubs call them."""

    repo: str
    kind: str
    public: bool
    message: str
    files: list[File]
    left_out: list[str]
    readme: str


# ------------------------------------------------------------------------------------------------- what is asked


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line. Raises LaunchError for what is not known here."""
    parser = argparse.ArgumentParser(
        prog="python -m launchers.push", description="Publish an output on a hub, with its card, config and lineage."
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"{', '.join(SETTINGS)}")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", help="a new repository is private (the default)")
    who.add_argument("--public", action="store_true", help="a new repository is public, and a public one is accepted")
    parser.add_argument("--dry-run", action="store_true", help="show files, card and target; the hub is not asked")
    parser.add_argument("--card", action="store_true", help="make the card alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="--card: write it there, not to the terminal")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_intermixed_args(argv)
    values: dict[str, str] = {}
    for setting in given.settings:
        name, equals, value = setting.partition("=")
        if name == "dry_run" and value in ("true", "false"):  # as other commands write it
            given.dry_run = given.dry_run or value == "true"
        elif name not in SETTINGS or not equals:
            raise LaunchError(f"{setting}: not a setting of push", f"one of {', '.join(SETTINGS)}, as in stage=grpo")
        elif not value:
            raise LaunchError(f"{setting}: no value", f"{name}=<value>")
        else:
            values[name] = value
    if "stage" not in values:
        raise LaunchError("stage=: which output is to be pushed?", "stage=<stage>, as in stage=grpo")
    repo = values.get("repo")
    if repo is None and not given.card:
        raise LaunchError("repo=: where to?", "repo=<user>/<name>, or --card for the card alone")
    if repo is not None and (not HUB_ID.fullmatch(repo) or "/" not in repo):
        raise LaunchError(f"repo={card.flat(repo)}: not a repository's name", "repo=<user>/<name>, as in repo=me/sums")
    if given.output is not None and not given.card:
        raise LaunchError(f"--output={given.output}: there is nothing to write", "--card --output FILE")
    license = values.get("license")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise LaunchError(
            f"license={card.flat(license)}: not a licence's identifier on a hub", "as in apache-2.0, mit, cc-by-4.0"
        )
    return Arguments(
        values["stage"], repo, values.get("run_name"), Path(values.get("paths.output_base", "outputs")),
        _step(values), license, _is_true(values.get("offline")), given.public, given.dry_run, given.card,
        given.output, given.json,
    )  # fmt: skip


def _step(values: Mapping[str, str]) -> int | None:
    """The inference checkpoint that is asked for, by its step."""
    if "step" in values and "checkpoint" in values:
        raise LaunchError(f"step={values['step']}: beside checkpoint=", "one of the two")
    if (text := values.get("step")) is not None:
        if not re.fullmatch(r"\d{1,12}", text):
            raise LaunchError(f"step={card.flat(text)}: not a step", "step=<number>, as in step=500")
        return int(text)
    if (text := values.get("checkpoint")) is None:
        return None
    found = re.fullmatch(r"(?:inference_checkpoints/)?step-(\d{1,12})/?", text)
    if found is None:
        raise LaunchError(
            f"checkpoint={card.flat(text)}: only inference checkpoints can be pushed (others hold optimizer state)",
            "checkpoint=inference_checkpoints/step-<N>",
        )
    return int(found[1])


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "on", "yes", "true")


def find(arguments: Arguments) -> Look:
    """The run that is meant. Raises LaunchError where there is none, or several."""
    names = [arguments.run_name] if arguments.run_name else []
    folders = runs.find_pipelines(arguments.output_base, names)
    looks = [look for folder in folders for look in runs.looks_of(folder)]
    found = [look for look in looks if look.name == arguments.stage and (look.config or look.config_problem)]
    if not found:
        import difflib

        there = list(dict.fromkeys(look.name for look in looks if look.config.get("stage") not in card.UNPUBLISHED))
        close = difflib.get_close_matches(arguments.stage, there, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(there)}"
        where = f"pipeline {arguments.run_name}" if arguments.run_name else str(arguments.output_base)
        known = any(look.name == arguments.stage for look in looks)
        problem = "was never started in" if known else "no such stage in"
        raise LaunchError(f"stage={card.flat(arguments.stage)}: {problem} {where}", fix if there else None)
    if len({runs.real(look.run.root) for look in found}) > 1:
        several = ", ".join(f"run_name={look.pipeline}" for look in found)
        raise LaunchError(f"stage={arguments.stage}: is in several pipelines", f"say which one: {several}")
    look = found[0]
    if look.config_problem:
        raise LaunchError(f"stage={look.name}: {look.config_problem}", f"look at {look.run.config}")
    technique = look.config.get("stage")
    if technique in card.UNPUBLISHED:
        what = "what it found is in the card of the stage that it judged" if technique == "eval" else "it has no model"
        raise LaunchError(f"stage={look.name}: an output of {technique} is not pushed", what)
    if not isinstance(technique, str) or technique not in card.TECHNIQUES:
        raise LaunchError(
            f"stage={look.name}: its config names no stage that is known here", f"look at {look.run.config}"
        )
    return look


def folder_of(look: Look, step: int | None, hashes: bool) -> Path:
    """The folder to push. Raises LaunchError where it is not whole; contents are read when `hashes`."""
    folder = look.run.model if step is None else look.run.inference_checkpoints / f"step-{step}"
    try:
        problem = manifest.problem(folder, hashes)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = f"{manifest.NAME} cannot be read ({type(error).__name__})"
    if problem is None:
        return folder
    if step is not None and not folder.is_dir():
        there = sorted(int(p.name[5:]) for p in look.run.inference_checkpoints.glob("step-*") if p.name[5:].isdecimal())
        fix = (
            f"one of: {', '.join(map(str, there))}"
            if there
            else "checkpointing.inference_checkpoint_steps=<N> makes some"
        )
        raise LaunchError(f"step={step}: {look.name} has no inference checkpoint of this step", fix)
    what = "its output" if step is None else f"its checkpoint step-{step}"
    why = f"; the run {_end_of(look)}" if step is None and not folder.is_dir() else ""
    raise LaunchError(
        f"stage={look.name}: {what} is not whole: {problem}{why}",
        f"see python -m launchers.status run_name={look.pipeline}, and push when it is done",
    )


def _end_of(look: Look) -> str:
    """How a run without an output stands, by its ledger."""
    history = look.story.history
    if history.gave_up or history.cancelled:
        return f"{'was cancelled' if history.cancelled else 'failed'}: {card.flat(history.reason or history.outcome)}"
    return "has not finished"


# ------------------------------------------------------------------------------------------------- what is pushed


def prepare(look: Look, folder: Path, arguments: Arguments, environment: Mapping[str, str]) -> Push:
    """Everything that a push sends. Reads files; asks no hub. Raises LaunchError where something private is in it."""
    assert arguments.repo is not None
    made = card.make(look, folder, arguments.repo, arguments.license, arguments.step, environment)
    cleaner = card.Cleaner(environment, [m.config for m in card.lineage(look)])
    about = manifest.read(folder)
    assert about is not None
    files, left_out = [], []
    for name in sorted(about["files"]):
        path = folder / name
        if name.startswith("/") or ".." in Path(name).parts or folder.resolve() not in path.resolve().parents:
            raise LaunchError(f"{folder / manifest.NAME}: names a file outside of its folder: {name}", "make it anew")
        if any(fnmatch(path.name, pattern) for pattern in NEVER):
            left_out.append(name)
        elif path.name in CLEANED:
            files.append(File(name, _without_places(path, cleaner)))
        else:
            files.append(File(name, path))
    for name, text in (
        (card.CARD_FILE, made.readme),
        (card.CONFIG_FILE, made.config),
        (card.LINEAGE_FILE, made.lineage),
    ):
        files.append(File(name, text.encode()))
    files.append(File(manifest.NAME, _manifest(about, files)))
    for file in files:
        if cleaner.secret_in(_text(file)):
            raise LaunchError(
                f"{file.name} holds something that looks like a secret: nothing was pushed",
                f"take it out of {file.content if isinstance(file.content, Path) else 'the run'}, and change it",
            )
    step = "" if arguments.step is None else f" step {arguments.step}"
    return Push(
        repo=arguments.repo,
        kind="dataset" if made.kind == "dataset" else "model",
        public=arguments.public,
        message=card.flat(f"{look.pipeline}/{look.name}{step} ({look.config.get('identity')})"),
        files=sorted(files, key=lambda f: f.name),
        left_out=left_out,
        readme=made.readme,
    )


def _without_places(path: Path, cleaner: card.Cleaner) -> Path | bytes:
    """A file as it is, or its text without where on this machine things were."""

    def clean(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: clean(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(item, key) for item in value]
        return (
            (card.hub_id(value) or cleaner.text(value)) if isinstance(value, str) and LOCAL_KEYS.search(key) else value
        )

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return path
    cleaned = clean(found, "")
    return path if cleaned == found else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _manifest(about: Mapping[str, Any], files: list[File]) -> bytes:
    """The manifest of what is pushed, with which a download is verified: the run's own, but for the files made here."""
    entries = {
        f.name: {"bytes": f.size, "sha256": hashlib.sha256(f.content).hexdigest()}
        if isinstance(f.content, bytes)
        else about["files"][f.name]
        for f in sorted(files, key=lambda f: f.name)
    }
    return (json.dumps({**about, "files": entries}, indent=1) + "\n").encode()


def _text(file: File) -> str:
    """What is text in a file; nothing of weights."""
    if isinstance(file.content, bytes):
        return file.content.decode(errors="replace")
    if file.name.endswith(WEIGHTS[:4]) or file.size > LARGEST_TEXT:
        return ""
    return file.content.read_text(encoding="utf-8", errors="replace")


def shown(push: Push, endpoint: str) -> str:
    """A dry run, for people."""
    visibility = "public" if push.public else "private"
    width = max(len(f.name) for f in push.files)
    lines = [f"to {endpoint}/{'datasets/' if push.kind == 'dataset' else ''}{push.repo}: a {visibility} {push.kind}"]
    lines += [f"  {f.name:{width}}  {_bytes(f.size):>8}" for f in push.files]
    lines.append(f"  {'in all':{width}}  {_bytes(sum(f.size for f in push.files)):>8}")
    if push.left_out:
        lines.append(f"left out: {', '.join(push.left_out)}")
    return "\n".join([*lines, f"commit: {push.message}", "", f"{card.CARD_FILE}:", "", push.readme])


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def as_plain(push: Push, endpoint: str) -> dict[str, Any]:
    """A push for programs."""
    return {
        "endpoint": endpoint, "repo": push.repo, "kind": push.kind, "public": push.public, "commit": push.message,
        "files": {f.name: f.size for f in push.files}, "left_out": push.left_out, "card": push.readme,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the hub


def send(push: Push, api: HfApi) -> tuple[str, bool]:
    """Create the repository where it is not there, and commit. Returns its address, and whether anything was new.

    Raises HubError where the repository is not one to push this to, and what huggingface_hub raises.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    other = "model" if push.kind == "dataset" else "dataset"
    there = _info(api, push.repo, push.kind)
    stale: set[str] = set()
    if there is None:
        if _info(api, push.repo, other) is not None:
            raise HubError(
                f"repo={push.repo}: is there as a {other}, and this is a {push.kind}", "repo=<user>/<another name>"
            )
        api.create_repo(push.repo, repo_type=push.kind, private=not push.public)
        there = _info(api, push.repo, push.kind)
        if there is None:
            raise HubError(
                f"repo={push.repo}: was made, and cannot be seen with this token", "a token that can read it"
            )
    else:
        if not there.private and not push.public:
            raise HubError(f"repo={push.repo}: is public", "--public, where all the world may see it; or another repo=")
        stale = _stale(push, api, there)
    present = {s.rfilename for s in there.siblings or ()}
    operations: list[Any] = [
        CommitOperationAdd(f.name, f.content if isinstance(f.content, bytes) else str(f.content)) for f in push.files
    ]
    operations += [CommitOperationDelete(name) for name in sorted(stale & present)]
    done = api.create_commit(push.repo, operations, commit_message=push.message, repo_type=push.kind)
    address = f"{api.endpoint}/{'datasets/' if push.kind == 'dataset' else ''}{push.repo}"
    return address, done.oid != there.sha


def _info(api: HfApi, repo: str, kind: str) -> Any:
    """What the hub says of a repository; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(repo, repo_type=kind)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and "invalid" in str(error).lower():
            raise
        return None


def _stale(push: Push, api: HfApi, there: Any) -> set[str]:
    """Files of an earlier push that are not in this one. Raises HubError for a repository that is not ours."""
    present = {s.rfilename for s in there.siblings or ()}
    listed: set[str] = set()
    if manifest.NAME in present:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(
                push.repo, manifest.NAME, repo_type=push.kind, revision=there.sha, local_dir=folder
            )
            try:
                listed = set(json.loads(Path(path).read_text(encoding="utf-8"))["files"])
            except (ValueError, KeyError, TypeError):
                listed = set()
    foreign = sorted(name for name in present - listed if name.endswith(WEIGHTS))
    if foreign:
        raise HubError(
            f"repo={push.repo}: holds {foreign[0]}, which no push from here put there", "repo=<user>/<another name>"
        )
    return listed - {f.name for f in push.files}


def why_not(error: Exception, repo: str) -> HubError:
    """What an error of the hub's library means, and what helps."""
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading ..."
    first = card.flat(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set in this shell", "unset HF_HUB_OFFLINE, on a node that has internet")
    if code == 401:
        return HubError(f"repo={repo}: the hub does not know this token", "hf auth login, or another HF_TOKEN")
    if code == 403:
        return HubError(
            f"repo={repo}: this token may not write there", "a token with write access, or your own name in repo="
        )
    if code == 404:
        return HubError(
            f"repo={repo}: not found, or not for you", "the name of a user or organisation you can write for"
        )
    if code == 429:
        return HubError("the hub asks to wait", "the same command again later: what was uploaded is not sent again")
    if code is not None:
        return HubError(
            f"repo={repo}: the hub refused ({code}): {first}", "mend what it says, then the same command again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return HubError(f"{error.filename}: {error.strerror}", "the same command again when it can be read")
    import httpx

    if isinstance(error, httpx.HTTPError | ConnectionError | TimeoutError):
        return HubError(
            f"the hub does not answer: {first}",
            "run this on a node that has internet, or try again: what was uploaded is not sent again",
        )
    return HubError(f"repo={repo}: {type(error).__name__}: {first}", "mend what it says, then the same command again")


def act(arguments: Arguments, environment: Mapping[str, str]) -> int:
    """Do what the command line says. Raises LaunchError."""
    look = find(arguments)
    if arguments.card:
        folder = folder_of(look, arguments.step, hashes=False)
        made = card.make(look, folder, arguments.repo, arguments.license, arguments.step, environment)
        if arguments.output is None:
            print(json.dumps({"card": made.readme}) if arguments.as_json else made.readme.rstrip())
            return 0
        try:
            write_atomic(arguments.output, made.readme)
        except OSError as error:
            raise LaunchError(
                f"--output={arguments.output}: {error.strerror}", "a folder that you can write"
            ) from error
        print(f"written: {arguments.output}")
        return 0
    folder_of(look, arguments.step, hashes=False)
    endpoint = (environment.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not arguments.dry_run:
        token = _token(arguments, environment)
    push = prepare(look, folder_of(look, arguments.step, hashes=True), arguments, environment)
    if arguments.dry_run:
        print(json.dumps(as_plain(push, endpoint), indent=1) if arguments.as_json else shown(push, endpoint))
        return 0
    from huggingface_hub import HfApi

    try:
        address, new = send(push, HfApi(endpoint=endpoint, token=token))
    except LaunchError:
        raise
    except Exception as error:  # of the hub's library, of its HTTP client, of the network
        raise why_not(error, push.repo) from error
    if arguments.as_json:
        print(json.dumps({**as_plain(push, endpoint), "url": address, "changed": new}, indent=1))
    else:
        print(f"{'pushed' if new else 'nothing new: there already is'} {push.message}: {address}")
    return 0


def _token(arguments: Arguments, environment: Mapping[str, str]) -> str:
    """The user's token. Raises LaunchError where the hub cannot be asked at all."""
    if arguments.offline:
        raise LaunchError("offline=true: a push asks the hub", "leave it out, or --dry-run")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if _is_true(environment.get(name)):
            raise LaunchError(
                f"{name} is set in this shell", f"unset {name}, on a node that has internet; or --dry-run"
            )
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise LaunchError(
            "no token of a hub: pushing needs one with write access",
            "hf auth login, or export HF_TOKEN=...; or --dry-run",
        )
    return token


def main(argv: list[str] | None = None) -> int:
    try:
        return act(parse_arguments(sys.argv[1:] if argv is None else argv), os.environ)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `push --card | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
