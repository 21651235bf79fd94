"""A model that answers: loaded once, asked again and again, its words given out as they come.

What decides (settings, what fits into the context, when text is whole) is pure; torch and transformers are imported
when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


class ChatError(Exception):
    """What cannot be done, and how to mend it."""

    def __init__(self, problem: str, fix: str) -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n  fix: {fix}")


# ----------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0: the likeliest; top_p 1 and top_k 0: from all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0

    def changed(self, name: str, value: str, shown: str = "") -> Sampling:
        """With one setting changed. shown: how the key is written in messages. Raises ChatError."""
        shown = shown or name
        rules: dict[str, tuple[type, Callable[[Any], bool], str]] = {
            "temperature": (float, lambda x: 0 <= x < math.inf, "0 (the likeliest answer) or more, as in 0.7"),
            "top_p": (float, lambda x: 0 < x <= 1, "above 0, at most 1 (1: off)"),
            "top_k": (int, lambda x: x >= 0, "a whole number, 0 (off) or more"),
            "max_new_tokens": (int, lambda x: x >= 1, "a whole number, 1 or more"),
            "seed": (int, lambda x: 0 <= x < 2**63, "a whole number, 0 or more"),
        }
        if name not in rules:
            raise ChatError(f"{shown}: no such setting", f"one of {', '.join(rules)}")
        kind, good, fix = rules[name]
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or not good(number):
            raise ChatError(f"{shown}={value}: not a value for it", fix)
        return replace(self, **{name: number})

    @property
    def ignored(self) -> str | None:
        """What does nothing at temperature 0; None where nothing is ignored."""
        names = [name for name, off in (("top_p", 1.0), ("top_k", 0)) if getattr(self, name) != off]
        return " and ".join(names) if names and self.temperature == 0 else None


def fitted(
    messages: Messages, length: Callable[[Messages], int], context: int | None, wanted: int
) -> tuple[Messages, int, int]:
    """What of a conversation the model can still read: messages, turns left out, tokens that the answer may have.

    The oldest turns (a question and its answer) go first, the system message and the last question stay. An answer
    is given room for `wanted` tokens, or half the context where that is less.

    length: tokens of a conversation as the model reads it. context: tokens that the model can read; None: any.
    Raises ChatError where the last question alone is too long.
    """
    if context is None:
        return messages, 0, wanted
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns, dropped = messages[len(system) :], 0
    room = min(wanted, max(1, context // 2))
    while len(turns) > 2 and length(system + turns) + room > context:
        turns, dropped = turns[2:], dropped + 1
    return system + turns, dropped, min(wanted, space(length(system + turns), context))


def space(tokens: int, context: int) -> int:
    """Tokens that are left for an answer. Raises ChatError where there are none."""
    if tokens >= context:
        raise ChatError(f"the prompt has {tokens} tokens, and the model reads {context} with its answer", "say less")
    return context - tokens


class Pieces:
    """A streamer for `generate`: text as soon as it is certain. Bytes of a character wait for its last one.

    Only the last few tokens are decoded again for each new one, as in vLLM and TGI.
    """

    def __init__(self, decode: Callable[[list[int]], str], say: Callable[[str], None]) -> None:
        self.decode, self.say = decode, say
        self.ids: list[int] = []
        self.begin = self.said = 0  # ids from `begin` are decoded; those up to `said` have been said
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each new token."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        self._say(last=False)

    def end(self) -> None:
        self._say(last=True)

    def _say(self, last: bool) -> None:
        before, after = self.decode(self.ids[self.begin : self.said]), self.decode(self.ids[self.begin :])
        if len(after) > len(before) and (last or not after.endswith("\ufffd")):
            self.say(after[len(before) :])
            self.begin, self.said = self.said, len(self.ids)


# ------------------------------------------------------------------------------------------------ a model


@dataclass(frozen=True)
class Chosen:
    """A model to talk to. path: a folder or hub id. technique: of the stage that made it, where that is known."""

    name: str
    path: str
    technique: str | None = None


@dataclass(frozen=True)
class Answer:
    """finish: `end` (the model's own), `length` (max_new_tokens or the context), `stopped` (Ctrl-C)."""

    text: str
    tokens: int
    finish: str
    dropped: int = 0  # turns that no longer fitted


def applies_template(chosen: Chosen, has_template: bool, forced: str | None) -> bool:
    """Whether a model is spoken to through its chat template; else it goes on with raw text.

    Models of stage base have a template, for the stages after them, but were not trained on it. forced: `chat`, `raw`
    or None. Raises ChatError where there is no template to apply.
    """
    if forced == "raw" or (forced is None and chosen.technique == "base"):
        return False
    if has_template:
        return True
    if forced == "chat" or chosen.technique is not None:
        raise ChatError(
            f"run={chosen.name}: {chosen.path} has no chat template",
            "--raw, to have it go on with your text; or its chat_template.jinja put back",
        )
    return False  # a base model from elsewhere


class Speaker:
    """A loaded model and its side of the conversation."""

    def __init__(self, chosen: Chosen, forced: str | None = None, system: str | None = None) -> None:
        """Load it, on a GPU where there is one. Raises ChatError."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # what is wrong is said below
        logging.disable_progress_bar()
        self.chosen = chosen
        try:
            config = AutoConfig.from_pretrained(chosen.path)
            if any("SequenceClassification" in name for name in config.architectures or []):
                raise ChatError(f"run={chosen.name}: a reward model: it gives scores, no answers", "another model")
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(chosen.path)
            self.chat = applies_template(chosen, self.tokenizer.chat_template is not None, forced)
            self.model, about = AutoModelForCausalLM.from_pretrained(chosen.path, output_loading_info=True)
        except ChatError:
            raise
        except Exception as error:  # loaders raise whatever their files make them
            lines = str(error).strip().splitlines() or [type(error).__name__]
            fix = "a whole output: python -m launchers.status shows what is done"
            if not Path(chosen.path).exists():
                fix = "a stage's name, a folder, or a hub id that this machine can reach"
            raise ChatError(f"run={chosen.name}: {chosen.path} cannot be loaded: {lines[0]}", fix) from error
        if missing := sorted(about["missing_keys"]):
            raise ChatError(
                f"run={chosen.name}: {chosen.path} lacks {len(missing)} weights ({missing[0]}, ...)", "a whole model"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval().to(self.device)
        about_text = self.model.config.get_text_config()
        self.context: int | None = getattr(about_text, "max_position_embeddings", None)
        ends = self.model.generation_config.eos_token_id
        own = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        self.ends: list[int] = sorted({*own, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])})
        self.messages: Messages = []
        self.turn = 0
        self.set_system(system)

    def about(self) -> str:
        """What it is and how it is spoken to, in a line."""
        parameters = sum(p.numel() for p in self.model.parameters())
        size = f"{parameters / 1e6:.2f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} G"
        dtype = str(self.model.dtype).removeprefix("torch.")
        how = "conversation, through its chat template" if self.chat else "raw: it goes on with each text by itself"
        return f"{self.chosen.name}: {how} ({size} parameters, {dtype}, {self.device})"

    def set_system(self, text: str | None) -> None:
        """The system message from here on; None: none, or the template's own. Raises ChatError for a raw model."""
        if text and not self.chat:
            raise ChatError(f"run={self.chosen.name}: raw continuation has no system message", "--chat, or none")
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def undo(self) -> bool:
        """Forget the last question and its answer; False where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        self.messages = self.messages[:-2]
        return True

    def ask(
        self,
        text: str,
        sampling: Sampling,
        say: Callable[[str], None] = lambda piece: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Its answer, which joins the conversation where there is one. Raises ChatError.

        say: is given each piece of the answer as it comes. stopped: asked before each token.
        """
        dropped = 0
        if self.chat:
            asked = [*self.messages, {"role": "user", "content": text}]
            asked, dropped, most = fitted(asked, lambda m: len(self._ids(m)), self.context, sampling.max_new_tokens)
            ids = self._ids(asked)
        else:
            ids = self.tokenizer(text)["input_ids"]
            most = min(sampling.max_new_tokens, space(len(ids), self.context)) if self.context else (
                sampling.max_new_tokens
            )  # fmt: skip
        if not ids:
            raise ChatError("the prompt has no tokens", "say something")
        out = self._generate(ids, most, sampling, say, stopped)
        self.turn += 1
        finish = "end" if out and out[-1] in self.ends else "stopped" if stopped() else "length"
        answer = Answer(self._decode(out), len(out), finish, dropped)
        if self.chat:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _ids(self, messages: Messages) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like
            problem = f"run={self.chosen.name}: its chat template cannot render this: {str(error).splitlines()[0]}"
            raise ChatError(problem, "no --system message, where it knows none; or --raw") from error
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _generate(
        self, ids: list[int], most: int, sampling: Sampling, say: Callable[[str], None], stopped: Callable[[], bool]
    ) -> list[int]:
        import torch

        def stop(seen: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((seen.shape[0],), stopped(), dtype=torch.bool, device=seen.device)

        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            names = ("temperature", "top_p", "top_k")
            how = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
        torch.manual_seed(sampling.seed + self.turn)
        given = torch.tensor([ids], device=self.device)
        try:
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    **how,
                    max_new_tokens=most,
                    eos_token_id=self.ends or None,
                    pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
                    streamer=Pieces(self._decode, say),  # type: ignore[arg-type]
                    stopping_criteria=[stop],
                )
        except torch.OutOfMemoryError as error:
            problem = f"run={self.chosen.name}: out of memory after {len(ids)} tokens"
            raise ChatError(problem, "a shorter conversation: /reset") from error
        found: list[int] = out[0, len(ids) :].tolist()
        return found
