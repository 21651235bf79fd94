"""Chat: which model is meant, what it is asked, what it answers, and a conversation in a real (pseudo) terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import select
import shutil
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conf.schema import Config
from post_training import chat
from post_training.data.tokenizer import bytes_tokenizer
from post_training.run import manifest
from post_training.run.directory import RunDirectory
from post_training.speaker import ChatError, Chosen, Pieces, Sampling, Speaker, applies_template, fitted
from post_training.stages.common import build_model
from tests.test_imports import forbidding  # noqa: F401  (a fixture)
from tests.training import DEADLINE, ROOT, base_environment, make_config, server

# ------------------------------------------------------------------------------------------- models


def of_many_words(model: Any) -> None:
    """It says printable letters alone, which the bytes' tokenizer has first, and others with each context."""
    model.lm_head.weight[94:] = 0
    for layer in (model.model.embed_tokens, *(m for m in model.model.layers.modules() if hasattr(m, "weight"))):
        if layer.weight.ndim == 2:
            layer.weight.mul_(20)


def make_model(
    base: Path, pipeline: str, stage: str, technique: str, positions: int = 128, seed: int = 0,
    change: Callable[[Any], None] = of_many_words,
) -> RunDirectory:  # fmt: skip
    """A finished run with a tiny random model."""
    run = RunDirectory(base / pipeline / stage)
    run.create()
    positioned = f"model.max_position_embeddings={positions}"
    config = make_config(technique, positioned, f"seed={seed}", "model.tie_word_embeddings=false")
    model_keys = {k: config[k] for k in ("model", "seed")}
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), model_keys))
    tokenizer = bytes_tokenizer()
    model = build_model(cfg, tokenizer)  # type: ignore[arg-type]
    with torch.no_grad():
        change(model)
    run.model.mkdir()
    model.save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    run.config.write_text(yaml.safe_dump({"version": 1, "name": stage, "stage": technique, "inputs": {"model": None}}))
    manifest.write(run.model, stage=technique)
    return run


def endless(model: Any) -> None:
    """All tokens are equally likely: greedily token 0, which is `!`, until it is stopped."""
    model.model.norm.weight.zero_()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines: an older one with grpo, and a newer one with base, sft, dpo, an rm and an eval of sft."""
    base = tmp_path_factory.mktemp("outputs")
    make_model(base, "older", "grpo", "grpo", seed=7)
    for name, technique in (("base", "base"), ("sft", "sft"), ("dpo", "dpo"), ("rm", "rm")):
        make_model(base, "newer", name, technique, seed=len(name))
    make_model(base, "newer", "endless", "sft", positions=1_000_000, change=endless)
    judge = RunDirectory(base / "newer" / "eval_sft")
    judge.create()
    source = {"model": {"run_dir": str(base / "newer" / "sft"), "path": str(base / "newer" / "sft" / "model")}}
    judge.config.write_text(yaml.safe_dump({"stage": "eval", "inputs": source}))
    half = RunDirectory(base / "newer" / "half")
    half.create()
    half.config.write_text(yaml.safe_dump({"stage": "sft"}))
    for i, name in enumerate(("older", "newer")):
        os.utime(base / name, (1e9 + i, 1e9 + i))
    return base


# ---------------------------------------------------------------------------------- which model is meant


def test_a_model_is_found_by_what_it_is_called(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs.parent)
    sft = Chosen("sft", str(outputs / "newer" / "sft" / "model"), "sft")
    base = Path(outputs.name)
    for name in ("sft", "newer/sft", str(outputs / "newer" / "sft")):
        assert chat.find(name, outputs, None) == sft
    assert chat.find("sft", outputs, "newer") == sft
    relative = chat.find(f"{base}/newer/sft", Path("outputs"), None)
    assert (Path(relative.path).absolute(), relative.technique) == (Path(sft.path), "sft")
    folder = chat.find(sft.path, outputs, None)
    assert (folder.path, folder.technique) == (sft.path, "sft")
    assert chat.find("grpo", outputs, None).path == str(outputs / "older" / "grpo" / "model")
    assert chat.find("someone/model-7b", outputs, None) == Chosen("someone/model-7b", "someone/model-7b")


def test_a_checkpoint_is_of_its_stage(outputs: Path) -> None:
    checkpoint = outputs / "newer" / "base" / "inference_checkpoints" / "step-2"
    shutil.copytree(outputs / "newer" / "base" / "model", checkpoint)
    assert chat.find(str(checkpoint), outputs, None) == Chosen(str(checkpoint), str(checkpoint), "base")
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ChatError, match=r"not a complete output \(model.safetensors has 4 bytes"):
        chat.find(str(checkpoint), outputs, None)


def test_the_newest_pipeline_is_taken_and_no_older_one_in_its_place(outputs: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        shutil.copytree(outputs / "newer" / "sft", tmp_path / name / "sft")
        os.utime(tmp_path / name, (1e9 + i, 1e9 + i))
    assert chat.find("sft", tmp_path, None).path == str(tmp_path / "b" / "sft" / "model")
    (tmp_path / "b" / "sft" / "model" / manifest.NAME).unlink()
    with pytest.raises(ChatError, match=r"run=b/sft: not a complete output \(no manifest.json\)\n  fix: run=a/sft"):
        chat.find("sft", tmp_path, None)
    # a finished stage of another pipeline
    (tmp_path / "c").mkdir()
    stages = {"stages": {"sft": {"run_dir": str(tmp_path / "a" / "sft")}}}
    (tmp_path / "c" / "pipeline.json").write_text(json.dumps(stages))
    assert chat.find("c/sft", tmp_path, None).path == str(tmp_path / "a" / "sft" / "model")


@pytest.mark.parametrize(
    ("given", "run_name", "said"),
    [
        ("eval_sft", None, r"an evaluation.*\n  fix: run=.*newer/sft, which it judged"),
        ("rm", None, "a reward model: it gives scores"),
        ("half", None, r"not a complete output \(no manifest.json\)\n  fix: python -m launchers.status"),
        ("newer", None, r"a pipeline, not a stage\n  fix: run=newer/<one of base, "),
        ("{outputs}/newer", None, "a pipeline, not a stage"),
        ("stf", None, "no such run below .*\n  fix: did you mean 'sft'?"),
        ("newer/bse", None, "pipeline newer has no stage bse\n  fix: did you mean 'base'?"),
        ("newr/base", None, "no such run below .*\n  fix: did you mean 'newer/base'?"),
        ("dpo", "older", "pipeline older has no stage dpo\n  fix: one of grpo"),
        ("dpo", "newwer", r"run_name=newwer: not in .*\n  fix: did you mean 'newer'?"),
        ("{outputs}/newer/sftt", None, r"no such folder\n  fix: did you mean 'sft'?"),
        ("a b", None, "no such run below"),
    ],
)  # fmt: skip
def test_what_cannot_be_talked_to(outputs: Path, given: str, run_name: str | None, said: str) -> None:
    with pytest.raises(ChatError, match=said):
        chat.find(given.format(outputs=outputs), outputs, run_name)


def test_an_adapter_is_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ChatError, match=r"an adapter, not a model\n  fix: merge it first: .*stage=merge"):
        chat.find(str(tmp_path), tmp_path, None)


@pytest.mark.parametrize(
    ("technique", "has_template", "forced", "expected"),
    [("sft", True, None, True), ("base", True, None, False), (None, True, None, True), (None, False, None, False),
     ("base", True, "chat", True), ("sft", True, "raw", False), ("sft", False, "raw", False)],
)  # fmt: skip
def test_who_is_spoken_to_through_a_template(
    technique: str | None, has_template: bool, forced: str | None, expected: bool
) -> None:
    assert applies_template(Chosen("x", "x", technique), has_template, forced) is expected


@pytest.mark.parametrize(("technique", "forced"), [("sft", None), (None, "chat"), ("base", "chat")])
def test_a_template_that_is_missing_is_said(technique: str | None, forced: str | None) -> None:
    with pytest.raises(ChatError, match="has no chat template\n  fix: --raw"):
        applies_template(Chosen("x", "x", technique), False, forced)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "x"], "which model?"),
        (["run=sft", "run=dpo", "run=base"], "3 models: two at most"),
        (["run="], "run=: no value"),
        (["stage=sft"], "stage=sft: not a setting of chat"),
        (["run=sft", "--temperature", "hot"], "--temperature=hot: not a value"),
        (["run=sft", "--temperature", "-1"], "--temperature=-1"),
        (["run=sft", "--temperature", "nan"], "--temperature=nan"),
        (["run=sft", "--top-p", "0"], "--top-p=0"),
        (["run=sft", "--top-k", "2.5"], "--top-k=2.5"),
        (["run=sft", "--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["run=sft", "--top-p", "0.9"], "--top-p: of no effect at temperature 0"),
        (["run=sft", "--json"], "--json: for one question only"),
        (["run=sft", "--prompt", " "], "--prompt: empty"),
        (["run=nope/nothing/here"], "no such run"),
    ],
)  # fmt: skip
def test_bad_input_is_said_at_once(
    outputs: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.main([*argv, f"paths.output_base={outputs}"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and said in err and "\n  fix: " in err


def test_bad_input_needs_no_torch(outputs: Path, forbidding: dict[str, str]) -> None:  # noqa: F811
    for argv, code in ((["run=eval_sft", f"paths.output_base={outputs}"], 2), (["--help"], 0)):
        command = [sys.executable, "-m", "post_training.chat", *argv]
        done = subprocess.run(command, env=forbidding, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and "forbidden" not in done.stderr, done.stderr


# ----------------------------------------------------------------------------- what is asked, and said

words = st.text("ab ", min_size=1, max_size=6)


@settings(deadline=None)
@given(st.none() | words, st.lists(st.tuples(words, words), max_size=6), words, st.integers(1, 60), st.integers(1, 20))
def test_the_oldest_turns_go_when_the_context_is_full(
    system: str | None, turns: list[tuple[str, str]], last: str, context: int, wanted: int
) -> None:
    head = [{"role": "system", "content": system}] if system else []
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    question = [{"role": "user", "content": last}]

    def length(messages: list[dict[str, str]]) -> int:
        return sum(len(m["content"]) + 1 for m in messages)

    def whole(dropped: int) -> list[dict[str, str]]:
        return head + [m for turn in said[dropped:] for m in turn] + question

    room = min(wanted, max(1, context // 2))
    fits = [n for n in range(len(said) + 1) if length(whole(n)) + room <= context]
    fewest = fits[0] if fits else len(said)
    if length(whole(fewest)) >= context:
        with pytest.raises(ChatError, match=f"the model reads {context}"):
            fitted(whole(0), length, context, wanted)
        return
    left = context - length(whole(fewest))
    assert fitted(whole(0), length, context, wanted) == (whole(fewest), fewest, min(wanted, left))
    assert fitted(whole(0), length, None, wanted) == (whole(0), 0, wanted)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_are_the_text_and_no_half_characters(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces: list[str] = []
    streamer = Pieces(lambda x: tokenizer.decode(x, skip_special_tokens=True), pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(pieces) == whole
    assert len(pieces) == len(whole), "each character by itself, as soon as its last byte is there"


def test_text_that_ends_in_the_middle_of_a_character_is_said_at_the_end() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer("aé", add_special_tokens=False)["input_ids"][:-1]
    pieces: list[str] = []
    streamer = Pieces(tokenizer.decode, pieces.append)
    for value in [[[0]], *([i] for i in ids)]:
        streamer.put(torch.tensor(value))
    assert pieces == ["a"]
    streamer.end()
    assert pieces == ["a", "\ufffd"]


@torch.no_grad()
def greedy(speaker: Speaker, text: str, count: int) -> str:
    """The likeliest next token, again and again, without `generate`."""
    ids = speaker.tokenizer(text, add_special_tokens=False)["input_ids"]
    found: list[int] = []
    while len(found) < count:
        logits = speaker.model(input_ids=torch.tensor([ids + found])).logits[0, -1]
        found.append(int(logits.argmax()))
        if found[-1] == speaker.tokenizer.eos_token_id:
            break
    return speaker.tokenizer.decode(found, skip_special_tokens=True)


@pytest.fixture(scope="module")
def sft(outputs: Path) -> Speaker:
    return Speaker(chat.find("newer/sft", outputs, None))


@pytest.fixture
def fresh(sft: Speaker) -> Speaker:
    sft.set_system(None)
    sft.reset()
    sft.turn = 0
    return sft


SHORT = Sampling(max_new_tokens=6)


def test_a_conversation_is_remembered_until_it_is_reset(fresh: Speaker) -> None:
    said: list[str] = []
    first = fresh.ask("hi", SHORT, said.append)
    assert first.text == greedy(fresh, "<|user|>hi<|assistant|>", 6) == "".join(said)
    text = f"<|user|>hi<|assistant|>{first.text}<|end|><|user|>and?<|assistant|>"
    assert fresh.ask("and?", SHORT).text == greedy(fresh, text, 6)
    assert fresh.undo() and fresh.ask("and?", SHORT).text == greedy(fresh, text, 6)
    fresh.set_system("Be kind.")
    fresh.reset()
    assert fresh.ask("hi", SHORT).text == greedy(fresh, "<|system|>Be kind.<|user|>hi<|assistant|>", 6)
    assert fresh.undo() and not fresh.undo()
    fresh.set_system(None)
    assert fresh.messages == []


def test_what_no_longer_fits_is_forgotten_and_said(fresh: Speaker, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat.Talk([fresh], Sampling(max_new_tokens=4))
    for i in range(4):
        assert talk.line(f"{i} " + "x" * 30)
    assert "oldest turns were forgotten: the model reads 128 tokens" in capsys.readouterr().err
    questions = [m["content"][0] for m in fresh.messages if m["role"] == "user"]
    assert questions == ["1", "2", "3"]
    assert talk.line("y" * 200)
    assert "the prompt has 202 tokens, and the model reads 128" in capsys.readouterr().err
    assert [m["content"][0] for m in fresh.messages if m["role"] == "user"] == ["1", "2", "3"], "and goes on"
    assert talk.line("4") and fresh.messages[-2]["content"] == "4"


def test_an_answer_is_cut_or_stopped_or_ends(fresh: Speaker, outputs: Path) -> None:
    assert fresh.ask("hi", SHORT).finish in ("length", "end")
    endless_one = Speaker(chat.find("newer/endless", outputs, None))
    assert (endless_one.ask("hi", SHORT).finish, endless_one.messages[-1]["content"]) == ("length", "!!!!!!")
    pieces: list[str] = []
    stopped = endless_one.ask("hi", Sampling(max_new_tokens=500), pieces.append, lambda: len(pieces) >= 3)
    assert stopped.finish == "stopped" and stopped.text == "".join(pieces) and 3 <= len(pieces) <= 4
    assert endless_one.messages[-1] == {"role": "assistant", "content": stopped.text}, "the part that was said stays"
    endless_one.ends.append(0)
    ended = endless_one.ask("hi", SHORT)
    assert (ended.finish, ended.tokens) == ("end", 1)


def test_the_seed_decides_what_is_sampled(fresh: Speaker) -> None:
    def sampled(**settings: Any) -> str:
        fresh.reset()
        fresh.turn = 0
        return fresh.ask("hi", Sampling(max_new_tokens=20, **settings)).text

    one = sampled(temperature=1.0, seed=1)
    assert sampled(temperature=1.0, seed=1) == one != sampled(temperature=1.0, seed=2)
    likeliest = sampled()
    assert sampled(temperature=1.0, top_k=1, seed=1) == likeliest == sampled(temperature=1.0, top_p=1e-6, seed=5)
    assert one != likeliest
    again = fresh.ask("hi", Sampling(max_new_tokens=20, temperature=1.0, seed=1)).text
    fresh.undo()
    assert fresh.ask("hi", Sampling(max_new_tokens=20, temperature=1.0, seed=1)).text != again, "another turn's draw"


def test_a_base_model_goes_on_with_the_text(outputs: Path) -> None:
    base = Speaker(chat.find("base", outputs, None))
    assert not base.chat and "raw" in base.about()
    assert base.ask("2+2=", SHORT).text == greedy(base, "2+2=", 6)
    assert base.ask("2+2=", SHORT).text == greedy(base, "2+2=", 6), "nothing is remembered"
    with pytest.raises(ChatError, match="raw continuation has no system message"):
        base.set_system("Be kind.")
    with pytest.raises(ChatError, match="the prompt has 200 tokens, and the model reads 128"):
        base.ask("x" * 200, SHORT)
    spoken_to = Speaker(chat.find("base", outputs, None), "chat")
    assert spoken_to.ask("2+2=", SHORT).text == greedy(base, "<|user|>2+2=<|assistant|>", 6)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template\n  fix: --raw"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(
            '"num_hidden_layers": 1', '"num_hidden_layers": 2')), "lacks 9 weights"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(
            "LlamaForCausalLM", "LlamaForSequenceClassification")), "a reward model"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), "cannot render this: no"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole(outputs: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    shutil.copytree(outputs / "newer" / "sft", tmp_path / "p" / "sft")
    folder = tmp_path / "p" / "sft" / "model"
    spoil(folder)
    (folder / manifest.NAME).unlink()
    manifest.write(folder, stage="sft")
    with pytest.raises(ChatError, match=said):
        Speaker(chat.find("sft", tmp_path, None)).ask("hi", SHORT)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ChatError, match=r"run=some/model: some/model cannot be loaded: .*\n  fix: a stage's name"):
        Speaker(chat.find("some/model", tmp_path, None))


# --------------------------------------------------------------------------------------- one question


def test_one_answer_is_all_of_stdout(
    outputs: Path, fresh: Speaker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(fresh, "<|user|>hi<|assistant|>", 6)
    where = [f"paths.output_base={outputs}", "--max-new-tokens", "6"]
    for old_or_new in ("run=sft", str(outputs / "newer" / "sft")):
        assert chat.main([old_or_new, *where, "--prompt", "hi"]) == 0
        out, err = capsys.readouterr()
        assert out == f"{expected}\n" and "conversation, through its chat template" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert chat.main(["run=sft", *where, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert chat.main(["run=sft", *where, "--prompt", "hi", "--raw"]) == 0
    assert capsys.readouterr().out == f"{greedy(fresh, 'hi', 6)}\n"
    assert chat.main(["run=base", *where, "--prompt", "hi", "--system", "x"]) == 2
    assert chat.main(["run=sft", *where, "--prompt", "x" * 200]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "the model reads 128" in err


def test_two_models_answer_the_same_question(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run=sft", "run=grpo", f"paths.output_base={outputs}", "--prompt", "hi", "--max-new-tokens", "6"]
    found = {}
    for name in ("sft", "grpo"):
        speaker = Speaker(chat.find(name, outputs, None))
        found[name] = greedy(speaker, "<|user|>hi<|assistant|>", 6)
    assert found["sft"] != found["grpo"]
    assert chat.main(argv) == 0
    assert capsys.readouterr().out == f"== sft\n{found['sft']}\n== grpo\n{found['grpo']}\n"
    assert chat.main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["version"], printed["prompt"]) == (1, "hi")
    assert {a["run"]: a["answer"] for a in printed["answers"]} == found
    assert [a["mode"] for a in printed["answers"]] == ["chat", "chat"]
    twice = ["run=newer/sft", f"run={outputs}/newer/sft", *argv[2:], "--temperature", "1", "--json"]
    assert chat.main(twice) == 0
    one, other = json.loads(capsys.readouterr().out)["answers"]
    assert one["answer"] == other["answer"] and one["run"] != other["run"], "the same seed, told apart by their paths"


# ------------------------------------------------------------------------------------- in a terminal


class Terminal:
    """Chat as a process on a pseudo terminal, which a test reads from and types into."""

    def __init__(self, width: int, home: Path, *argv: str) -> None:
        self.ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        env = base_environment() | {"TERM": "xterm", "XDG_STATE_HOME": str(home), "INPUTRC": "/dev/null"}
        args = [os.ttyname(theirs), "post_training.chat", *argv]
        with Path(os.devnull).open("wb") as nowhere:
            self.process = server(False).start("tests.on_terminal", args, env, ROOT, nowhere)
        self.theirs = theirs  # held open: before the process has opened it there is nobody at the other end
        self.seen = ""

    def read(self, seconds: float) -> bool:
        """More of what it wrote; False where nothing came, or nobody is there any more."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        try:
            chunk = os.read(self.ours, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self.seen += chunk.decode(errors="replace")
        return bool(chunk)

    def until(self, text: str) -> str:
        """What it writes up to and with `text`, which is then behind us."""
        end = time.monotonic() + DEADLINE
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.seen}"
            if not self.read(0.2) and self.process.poll() is not None and not self.read(0.2):
                raise AssertionError(f"ended before {text!r}:\n{self.seen}")
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self, press: str = "") -> int:
        """Its exit status, once it has left.

        press: typed again where nothing comes of it for a while: a signal that finds readline on its way into
        waiting is seen when the next one comes.
        """
        began = pressed = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() - began < DEADLINE, f"does not leave:\n{self.seen}"
            self.read(0.05)
            if press and time.monotonic() - pressed > 20:
                self.type(press)
                pressed = time.monotonic()
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(width: int, *argv: str) -> Terminal:
            started = Terminal(width, tmp_path, *argv)
            stack.callback(started.close)
            return started

        yield start


def test_a_conversation_in_a_terminal(outputs: Path, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    where = f"paths.output_base={outputs}"
    screen = terminal(80, "run=endless", where, "--max-new-tokens", "900000")
    start = screen.until("> ")
    assert "endless: conversation, through its chat template" in start and "/help" in start
    assert "Warning" not in start and "%|" not in start
    # an answer without an end is stopped, and that alone
    screen.type("hello\r")
    screen.until("!!!!!!")
    screen.type("\x03")
    screen.until("[stopped]")
    screen.until("> ")
    screen.type("/set max_new_tokens 5\r")
    assert "max_new_tokens 5" in screen.until("seed 0")
    screen.until("> ")
    screen.type("again\r")
    assert re.search(r"!!!!!\r\n\[cut at 5 tokens\]", screen.until("tokens]"))
    screen.until("> ")
    for command, said in (("/undo", "forgotten"), ("/reset", "conversation is forgotten"), ("/nope", "no such command"),
                          ("/set temperature hot", "not a value"), ("/help", "twice leaves")):  # fmt: skip
        screen.type(f"{command}\r")
        screen.until(said)
        screen.until("> ")
    # line editing: the arrow brings back what was said
    screen.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A")
    screen.until("again")
    screen.type("\x03")
    screen.until("Ctrl-C again leaves")
    screen.until("> ")
    screen.type("\x04")
    assert screen.end() == 0
    kept = tmp_path / "post_training" / "chat_history"
    assert kept.read_text().splitlines()[:3] == ["hello", "/set max_new_tokens 5", "again"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    # and another conversation finds it; Ctrl-C twice leaves
    screen = terminal(80, "run=endless", where, "--max-new-tokens", "900000")
    screen.until("> ")
    screen.type("\x1b[A")
    screen.until("/help")
    screen.type("\x15hello\r")
    screen.until("!!!!!!")
    screen.type("\x03")
    screen.until("[stopped]")
    screen.until("> ")
    screen.type("\x03")
    assert screen.end(press="\x03") == 0
    assert "again leaves" not in screen.seen


def test_two_models_side_by_side_in_a_wide_terminal(outputs: Path, terminal: Callable[..., Terminal]) -> None:
    argv = ("run=sft", "run=endless", f"paths.output_base={outputs}", "--max-new-tokens", "5")
    screen = terminal(160, *argv, "--prompt", "hi")
    assert screen.end() == 0
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in screen.seen.splitlines()]
    assert any(line.split() == ["sft", "endless"] for line in lines), screen.seen
    assert any(line.rstrip().endswith("!!!!!") and line.index("!!!!!") >= 80 for line in lines)
    screen = terminal(80, *argv, "--prompt", "hi")
    assert screen.end() == 0
    assert screen.seen.index("== sft") < screen.seen.index("== endless") < screen.seen.index("!!!!!")


def test_one_question_that_is_interrupted(outputs: Path, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(80, "run=endless", f"paths.output_base={outputs}", "--max-new-tokens", "900000", "--prompt", "hi")
    screen.until("!!!")
    screen.type("\x03")
    assert screen.end() == 130


def test_a_models_words_are_no_commands_to_the_terminal() -> None:
    assert chat.shown("a\x1b[2J\x07b\r\n\tc\x9b") == "a[2Jb\n\tc"
