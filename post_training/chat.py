"""Talk to a stage's model, or to two side by side.

    python -m post_training.chat run=grpo                           the newest pipeline's grpo
    python -m post_training.chat run=quickstart/sft run=quickstart/grpo
    python -m post_training.chat run=outputs/quickstart/grpo --prompt "26+27=?"

RUN is a run directory, a model's folder, a hub id, or a stage's name: of the newest pipeline below
paths.output_base=outputs that has it, or of run_name=NAME. Without --prompt: a conversation.

A model is spoken to through its chat template; one of stage base, and one without a template, goes on with your text.
With --prompt the answer alone goes to stdout. Exit status: 0, 2 for bad input, 130 for an answer stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from post_training.run import manifest
from post_training.run.directory import RunDirectory, is_there, load_yaml
from post_training.speaker import Answer, ChatError, Chosen, Sampling, Speaker

NO_TEXT = {
    "eval": "an evaluation: it has figures, and no model",
    "rm": "a reward model: it gives scores, and no answers",
    "prepare": "prepared data, and no model",
    "sample": "samples, and no model",
}
"""Stages whose output cannot be talked to."""
STATUS = "python -m launchers.status shows what is done"


# -------------------------------------------------------------------------------------- which model


def find(given: str, output_base: Path, run_name: str | None) -> Chosen:
    """The model that `run=` means; a name that is no run's is taken for a hub id. Raises ChatError."""
    path = Path(given).expanduser()
    if run_name is None and path.is_dir() and ("/" in given or given.startswith(".") or _is_run_or_model(path)):
        return _opened(path, given)
    if run_name is None and (given.startswith(("/", ".", "~")) or path.is_absolute()):
        raise ChatError(f"run={given}: no such folder", _near(path.name, _names(path.parent)) or STATUS)
    pipelines = _pipelines(output_base)
    name, stage = (run_name, given) if run_name is not None else given.split("/") if given.count("/") == 1 else ("", "")
    if name and (run_name is not None or name in pipelines):
        if name not in pipelines:
            fix = _near(name, list(pipelines)) or f"{output_base} holds {_listed(pipelines)}"
            raise ChatError(f"run_name={name}: not in {output_base}", fix)
        stages = _stages(pipelines[name])
        if stage not in stages:
            fix = _near(stage, list(stages)) or f"one of {_listed(stages)}"
            raise ChatError(f"run={given}: pipeline {name} has no stage {stage}", fix)
        return _opened(stages[stage], f"{name}/{stage}")
    if given in pipelines:
        fix = f"run={given}/<one of {_listed(_stages(pipelines[given]))}>"
        raise ChatError(f"run={given}: a pipeline, not a stage", fix)
    having = [pipeline for pipeline in pipelines.values() if given in _stages(pipeline)]
    # a stage that was never submitted (held back by a gate, say) makes no pipeline the newest that has it
    newest = [pipeline for pipeline in having if is_there(_stages(pipeline)[given] / "config.yaml")] or having
    if newest:
        try:
            return _opened(_stages(newest[0])[given], f"{newest[0].name}/{given}")
        except ChatError as error:
            # an older one is not taken unasked: its model is another one
            whole = [p.name for p in newest[1:] if _opens(_stages(p)[given])]
            raise ChatError(error.problem, f"run={whole[0]}/{given}" if whole else error.fix) from None
    known = [*pipelines, *(stage for pipeline in pipelines.values() for stage in _stages(pipeline))]
    known += [f"{name}/{stage}" for name, pipeline in pipelines.items() for stage in _stages(pipeline)]
    near = _near(given, known)
    if near or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        fix = near or f"a folder, a hub id, or {_listed(known)}"
        raise ChatError(f"run={given}: no such run below {output_base}", fix)
    return Chosen(given, given)


def _opens(run: Path) -> bool:
    try:
        _opened(run, run.name)
    except ChatError:
        return False
    return True


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def _listed(names: Any) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "nothing"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _pipelines(output_base: Path) -> dict[str, Path]:
    """Pipelines' folders by name, the newest first."""

    def changed(folder: Path) -> float:
        described = folder / "pipeline.json"
        return (described if is_there(described) else folder).stat().st_mtime

    folders = [output_base / name for name in _names(output_base) if not name.startswith(".")]
    # what another user keeps to himself is not there
    found = [folder for folder in folders if is_there(folder / "pipeline.json") or _runs_in(folder)]
    return {folder.name: folder for folder in sorted(found, key=changed, reverse=True)}


def _runs_in(folder: Path) -> list[str]:
    return [name for name in _names(folder) if is_there(folder / name / "config.yaml")]


def _stages(pipeline: Path) -> dict[str, Path]:
    """Run directories by stage; finished stages of another pipeline lie in its folder."""
    found = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for name, node in json.loads((pipeline / "pipeline.json").read_text(encoding="utf-8"))["stages"].items():
            folder = Path(node["run_dir"])
            found[str(name)] = folder if folder.is_dir() else pipeline / str(name)  # the outputs were moved
    for name in _runs_in(pipeline):
        found.setdefault(name, pipeline / name)
    return found


def _is_run_or_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "config.json", "adapter_config.json"))


def _opened(folder: Path, given: str) -> Chosen:
    """The model of a run directory or a model's folder. Raises ChatError where it has none to talk to."""
    config = folder / "config.yaml"
    if not config.exists():
        if stages := _runs_in(folder):
            fix = f"run={given.rstrip('/')}/<one of {_listed(stages)}>"
            raise ChatError(f"run={given}: a pipeline, not a stage", fix)
        model, name = folder, given
        above = [parent / "config.yaml" for parent in folder.absolute().parents[:2]]  # of model/, checkpoints/...
        config = next((path for path in above if path.exists()), config)
    else:
        model, name = RunDirectory(folder).model, given if "/" not in given else folder.resolve().name
    about: Any = {}
    if config.exists():
        try:
            about = load_yaml(config.read_text(encoding="utf-8"))
            technique = about.get("stage")
        except Exception as error:  # a YAML parser has many ways to say no
            raise ChatError(f"run={given}: {config} is damaged", "python -m launchers.status tells more") from error
    else:
        technique = (manifest.read(model) or {}).get("stage")
    technique = technique if isinstance(technique, str) else None
    if technique in NO_TEXT:
        source = (about.get("inputs") or {}).get("model") if technique in ("eval", "rm") else None
        judged = source.get("run_dir") if isinstance(source, dict) else None
        fix = f"run={judged}, {'which it judged' if technique == 'eval' else 'which it started from'}"
        raise ChatError(f"run={given}: {NO_TEXT[technique]}", fix if judged else "a stage that trains a policy")
    if (model.name == "model" or (model / manifest.NAME).exists()) and (why := manifest.problem(model)):
        raise ChatError(f"run={given}: not a complete output ({why})", STATUS)
    if not (model / "config.json").exists():
        if (model / "adapter_config.json").exists():
            merge = f"python -m launchers.submit stage=merge merge.adapter={model} inputs.model=<its model>"
            raise ChatError(f"run={given}: an adapter, not a model", f"merge it first: {merge}")
        raise ChatError(f"run={given}: not a complete output (no config.json)", STATUS)
    return Chosen(name, str(model), technique)


# ----------------------------------------------------------------------------------------- the screen


def shown(text: str) -> str:
    """A model's text for a terminal: without what would command it."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def note(text: str) -> None:
    """A word that is no part of an answer."""
    print(text, file=sys.stderr, flush=True)


class Interrupts:
    """Ctrl-C while an answer comes: once stops it, twice raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        self.count = 0

        def hear(*_: object) -> None:
            self.count += 1
            if self.count > 1:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def stopped(self) -> bool:
        return self.count > 0


WIDE = 100
"""Columns of a terminal from which on two models answer side by side."""


def ask_all(speakers: list[Speaker], text: str, sampling: Sampling, interrupts: Interrupts) -> list[Answer]:
    """Put a question to all, their answers on stdout as they come. One that Ctrl-C stops is the last."""
    on_terminal = sys.stdout.isatty()
    with interrupts.heard():
        if len(speakers) == 2 and on_terminal and shutil.get_terminal_size().columns >= WIDE:
            return _in_columns(speakers, text, sampling, interrupts)
        answers = []
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"== {speaker.chosen.name}", flush=True)

            def say(piece: str) -> None:
                print(shown(piece) if on_terminal else piece, end="", flush=True)

            answers.append(speaker.ask(text, sampling, say, interrupts.stopped))
            print(flush=True)
            _remark(speaker, answers[-1], len(speakers) > 1)
            if interrupts.stopped():
                break
        return answers


def _in_columns(speakers: list[Speaker], text: str, sampling: Sampling, interrupts: Interrupts) -> list[Answer]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = ["", ""]

    def table() -> Table:
        found = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for speaker in speakers:
            found.add_column(Text(speaker.chosen.name, style="bold"), ratio=1, overflow="fold")
        found.add_row(*map(Text, texts))
        return found

    answers = []
    with Live(console=Console(), get_renderable=table, refresh_per_second=12):
        for i, speaker in enumerate(speakers):

            def say(piece: str, i: int = i) -> None:
                texts[i] += shown(piece)

            answers.append(speaker.ask(text, sampling, say, interrupts.stopped))
            if interrupts.stopped():
                break
    for speaker, answer in zip(speakers, answers, strict=False):
        _remark(speaker, answer, True)
    return answers


def _remark(speaker: Speaker, answer: Answer, named: bool) -> None:
    who = f"{speaker.chosen.name}: " if named else ""
    if answer.dropped:
        context = speaker.context
        note(f"[{who}the {answer.dropped} oldest turns were forgotten: the model reads {context} tokens]")
    if answer.finish == "stopped":
        note(f"[{who}stopped]")
    elif answer.finish == "length":
        note(f"[{who}cut at {answer.tokens} tokens]")


# ----------------------------------------------------------------------------------- the conversation

HELP = """\
/reset              forget the conversation (the system message stays)
/undo               forget the last question and its answer
/system TEXT        the system message from here on; without TEXT: none
/set NAME VALUE     temperature, top_p, top_k, max_new_tokens or seed; /set alone shows them
/help, /exit        //text says /text
Ctrl-C stops an answer, twice leaves; Ctrl-D leaves"""


class Talk:
    """A conversation: what each line does."""

    def __init__(self, speakers: list[Speaker], sampling: Sampling) -> None:
        self.speakers, self.sampling = speakers, sampling
        self.interrupts = Interrupts()

    def line(self, text: str) -> bool:
        """Act on a line; False to leave."""
        text, self.interrupts.count = text.strip(), 0
        try:
            if text.startswith("//"):
                text = text[1:]
            elif text.startswith("/"):
                return self.command(*(text[1:].split(maxsplit=1) or [""]))
            if text:
                ask_all(self.speakers, text, self.sampling, self.interrupts)
        except ChatError as error:
            note(f"error: {error}")
        return True

    def command(self, name: str, rest: str = "") -> bool:
        """Act on a command; False to leave. Raises ChatError."""
        match name:
            case "exit" | "quit":
                return False
            case "help":
                note(HELP)
            case "reset":
                for speaker in self.speakers:
                    speaker.reset()
                note("the conversation is forgotten")
            case "undo":
                undone = [speaker.undo() for speaker in self.speakers]
                note("the last question and its answer are forgotten" if any(undone) else "there is nothing to undo")
            case "system":
                for speaker in self.speakers:
                    if speaker.chat or len(self.speakers) == 1:
                        speaker.set_system(rest or None)
                note("the system message is set" if rest else "no system message")
            case "set":
                key, _, value = rest.replace("=", " ").partition(" ")
                if key:
                    self.sampling = self.sampling.changed(key, value.strip())
                names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
                note(", ".join(f"{name} {getattr(self.sampling, name):g}" for name in names))
                if self.sampling.ignored:
                    note(f"({self.sampling.ignored}: of no effect at temperature 0)")
            case _:
                raise ChatError(f"/{name}: no such command", "/help; //text to say /text")
        return True


def history_file() -> Path:
    """Where lines are kept, for this user alone."""
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    return state / "post_training" / "chat_history"


HISTORY_LINES = 1000


def remember() -> Callable[[], None]:
    """Line editing with the lines of earlier conversations. Returns what keeps the newest line."""
    import readline

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        readline.read_history_file(path)
    except OSError as error:
        note(f"lines are not kept: {path}: {error.strerror}")
        return lambda: None
    readline.set_history_length(HISTORY_LINES)

    def keep() -> None:
        with contextlib.suppress(OSError):
            readline.append_history_file(1, path)

    return keep


def converse(talk: Talk) -> int:
    """Lines from a terminal or a pipe until Ctrl-D, /exit, or Ctrl-C twice. Returns the exit status."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    keep = remember() if on_terminal else lambda: None
    if on_terminal:
        note("/help for commands; Ctrl-C stops an answer, Ctrl-D leaves")
    asked_to_stop = False
    while True:
        try:
            line = input("> " if on_terminal else "")
            if line.strip():
                keep()
            asked_to_stop = False
            if not talk.line(line):
                return 0
            asked_to_stop = talk.interrupts.stopped()
        except EOFError:
            if on_terminal:
                print()
            return 0
        except KeyboardInterrupt:
            print()
            if asked_to_stop or talk.interrupts.count > 1:
                return 0
            asked_to_stop = True
            note("(Ctrl-C again leaves)")


# -------------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Chosen], Sampling]:
    """The command line: flags, the models to load, how they answer. Raises ChatError."""
    parser = argparse.ArgumentParser(
        prog="python -m post_training.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="run=RUN", help="once or twice; run_name=, paths.output_base=")
    parser.add_argument("--prompt", metavar="TEXT", help="one question, answered and done; -: from stdin")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", metavar="T", help="0: the likeliest answer (default)")
    parser.add_argument("--top-p", metavar="P", help="sample from the likeliest tokens that make up this share")
    parser.add_argument("--top-k", metavar="K", help="sample from so many likeliest tokens")
    parser.add_argument("--max-new-tokens", metavar="N", help=f"longest answer (default {Sampling.max_new_tokens})")
    parser.add_argument("--seed", metavar="N", help="of sampling; the same for both models (default 0)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--raw", dest="forced", action="store_const", const="raw", help="go on with the text as it is")
    how.add_argument("--chat", dest="forced", action="store_const", const="chat", help="apply the chat template")
    parser.add_argument("--json", action="store_true", help="with --prompt: answers as JSON")
    given = parser.parse_intermixed_args(argv)
    sampling = Sampling()
    for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed"):
        if (value := getattr(given, name)) is not None:
            sampling = sampling.changed(name, value, f"--{name.replace('_', '-')}")
    if sampling.ignored:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in sampling.ignored.split(" and "))
        raise ChatError(f"{flags}: of no effect at temperature 0", "--temperature 0.7")
    if given.json and given.prompt is None:
        raise ChatError("--json: for one question only", '--prompt "..."')
    if given.prompt is not None and not given.prompt.strip():
        raise ChatError("--prompt: empty", '--prompt "...", or - to read it from stdin')
    runs, output_base, run_name = [], Path("outputs"), None
    for setting in given.settings:
        name, equals, value = setting.partition("=")
        if name in ("run", "run_name", "paths.output_base") and equals and not value:
            raise ChatError(f"{setting}: no value", f"{name}=...")
        if equals and name == "run":
            runs.append(value)
        elif equals and name == "run_name":
            run_name = value
        elif equals and name == "paths.output_base":
            output_base = Path(value)
        elif equals and "/" not in name:
            raise ChatError(f"{setting}: not a setting of chat", "run=, run_name= or paths.output_base=")
        else:
            runs.append(setting)
    if not runs or len(runs) > 2:
        known = [f"run={name}/{s}" for name, p in _pipelines(output_base).items() for s in _stages(p)]
        known = [name for name in known if "/eval" not in name]
        problem = "which model?" if not runs else f"{len(runs)} models: two at most"
        raise ChatError(problem, f"run=<stage, folder or hub id>{f', as in {known[-1]}' if known else ''}")
    chosen = [find(run, output_base, run_name) for run in runs]
    if len({c.name for c in chosen}) < len(chosen):
        chosen = [Chosen(run, c.path, c.technique) for run, c in zip(runs, chosen, strict=True)]
    return given, chosen, sampling


def load(chosen: list[Chosen], forced: str | None, system: str | None) -> list[Speaker]:
    """The models, with a word about each on stderr. Raises ChatError."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    note("starting torch and transformers ...")
    import transformers  # noqa: F401  (takes seconds)

    speakers = []
    for one in chosen:
        note(f"loading {one.path} ...")
        speakers.append(Speaker(one, forced, system))
    for speaker in speakers:
        note(speaker.about())
    return speakers


def one_shot(speakers: list[Speaker], prompt: str, sampling: Sampling, as_json: bool) -> int:
    """One question. Returns the exit status."""
    interrupts = Interrupts()
    if not as_json:
        ask_all(speakers, prompt, sampling, interrupts)
        return 130 if interrupts.stopped() else 0
    answers = []
    with interrupts.heard():
        for speaker in speakers:
            began = time.monotonic()
            answer = speaker.ask(prompt, sampling, stopped=interrupts.stopped)
            answers.append(
                {
                    "run": speaker.chosen.name, "model": speaker.chosen.path, "mode": "chat" if speaker.chat else "raw",
                    "answer": answer.text, "tokens": answer.tokens, "finish": answer.finish,
                    "seconds": round(time.monotonic() - began, 3),
                }
            )  # fmt: skip
            if interrupts.stopped():
                return 130
    print(json.dumps({"version": 1, "prompt": prompt, "answers": answers}, indent=1))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        given, chosen, sampling = parse(sys.argv[1:] if argv is None else argv)
        prompt = given.prompt
        if prompt == "-" or (prompt is None and sys.stdin is None):
            prompt = _read_all().rstrip("\n")
            if not prompt.strip():
                raise ChatError("--prompt -: nothing on stdin", "echo 26+27=? | python -m post_training.chat ...")
        speakers = load(chosen, given.forced, given.system)
        if prompt is not None:
            return one_shot(speakers, prompt, sampling, given.json)
        return converse(Talk(speakers, sampling))
    except ChatError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `chat ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        print(f"error: stdout: {error.strerror}\n  fix: write the answer elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in its buffer
        return 1


def _read_all() -> str:
    """What is on stdin; nothing where it is closed. Raises ChatError for what is no text."""
    if sys.stdin is None:
        return ""
    text = sys.stdin.read()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ChatError("--prompt -: stdin is no UTF-8 text", "iconv -t UTF-8 <file> | ...") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
