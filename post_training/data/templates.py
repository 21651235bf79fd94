"""Chat templates: how a conversation becomes text, and which of it is trained.

`{% generation %}` marks what the assistant says, the token that ends it included. Where a format's end token is
written `eos_token`, installing the template makes that token the tokenizer's end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.chat import FIX, PROBE, is_text, problem
from post_training.data.source import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """A format: its text, and the tokens that a tokenizer needs for it."""

    text: str
    special: tuple[str, ...] = ()  # left out of decoded text
    ordinary: tuple[str, ...] = ()  # tokens of their own that stay in decoded text
    end: str | None = None  # ends what the assistant says; None: the tokenizer's own end


USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

THINK_ANSWER = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The pipeline's own: turns between role tokens."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's ChatML, as huggingface.co/docs/transformers/chat_templating writes it."""

TULU3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""allenai/Llama-3.1-Tulu-3-8B's: roles as plain text, the tokenizer's own end."""

ALPACA = (
    "{% set preamble = 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.' %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### Response:' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{% if loop.first %}{{ preamble }}{% endif %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
)
"""tatsu-lab/stanford_alpaca's `prompt_no_input`; a system message takes the preamble's place, turns may follow."""

FORMATS: dict[str, Template | None] = {
    "think_answer": Template(THINK_ANSWER, (USER, ASSISTANT, SYSTEM, END), TAGS, END),
    "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>"), end="<|im_end|>"),
    "llama3": None,  # TRL's
    "qwen3": None,
    "tulu3": Template(TULU3),
    "alpaca": Template(ALPACA),
}


@cache
def named(name: str) -> Template:
    """A template of conf.chat.NAMES. Llama 3's and Qwen 3's are TRL's training templates.

    TRL's Qwen 3 opens every answer with a think block, as the official one does for the last, and trains the line
    break after <|im_end|> too.
    """
    known = FORMATS[name]
    if known is not None:
        return known
    import trl.chat_template_utils as theirs

    text = (Path(theirs.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text(encoding="utf-8")
    if name == "llama3":
        return Template(text, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), end="<|eot_id|>")
    return Template(text, ("<|im_start|>", "<|im_end|>"), end="<|im_end|>")


def choose(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Give the tokenizer its chat template.

    wanted: a name, a Jinja file, or a template's text, each in the place of whatever template it has; None: its own,
    which gets TRL's marks where TRL knows it, or think_answer where it has none. Raises DataError for a file that
    cannot be read.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, by name
        own = tokenizer.chat_template = own.get("default") or next(iter(own.values()))
    if wanted is None and own:
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if not has_generation_markers(own):
            try:
                tokenizer.chat_template = get_training_chat_template(tokenizer) or own
            except Exception:  # unknown to TRL: whoever needs masks says so (require_masks)
                tokenizer.chat_template = own
        return
    wanted = wanted or "think_answer"
    if wanted in FORMATS:
        template = named(wanted)
    elif is_text(wanted):
        template = Template(wanted)
    else:
        try:
            template = Template(Path(wanted).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"model.chat_template={wanted}: {error.strerror}\n  fix: {FIX}") from error
    vocabulary = tokenizer.get_vocab()
    special = [token for token in template.special if token not in vocabulary]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([token for token in template.ordinary if token not in vocabulary])
    if template.end is not None:
        tokenizer.eos_token = template.end
    tokenizer.chat_template = template.text


# ------------------------------------------------------------------------------------- the system prompt

_PRELUDE = re.compile(r"\{# system prompt #\}.*?\{# end of it #\}", re.DOTALL)


def set_system_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> None:
    """Make the template put a system message in front of conversations without one; None: none any more.

    It is part of the template, so every view of the records gets it alike (demonstrations, pairs, prompts), and so
    does whoever talks to the trained model.
    """
    text = _PRELUDE.sub("", str(tokenizer.chat_template))
    if prompt is not None:
        quoted = ascii(prompt).replace("#", "\\x23")  # Jinja reads the escapes of a Python string
        message = f"{{'role': 'system', 'content': {quoted}}}"
        text = (
            "{# system prompt #}{% if not messages or messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{message}] + messages %}}{{% endif %}}{{# end of it #}}{text}"
        )
    tokenizer.chat_template = text


# ------------------------------------------------------------------------------------------------- masks


def require_masks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError, with the rendered example, where the template cannot tell what is to be trained."""
    template = str(tokenizer.chat_template or "")
    tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    why = problem(template, **tokens)
    if why is None:
        try:
            out = tokenizer.apply_chat_template(PROBE, return_dict=True, return_assistant_tokens_mask=True)
        except Exception as error:
            why = f"cannot be used: {type(error).__name__}: {error}"
        else:
            if 1 not in out["assistant_masks"]:
                why = f"its marks cover no token of {tokenizer.decode(out['input_ids'])!r}"
    if why is not None:
        raise DataError(f"model.chat_template: {why}\n  fix: {FIX}")


# --------------------------------------------------------------------------------------- several formats


def mixed(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> str:
    """One template that renders the tokenizer's own format, or the one named by the variable `template_format`.

    Other formats keep their words and end with this tokenizer's end token, the one that generation stops at.
    """
    own = str(tokenizer.chat_template)
    prelude = _PRELUDE.match(own)
    text = prelude.group() if prelude else ""
    for i, name in enumerate(names):
        body = named(name).text
        end = named(name).end
        if end is not None:  # within an expression it stands in quotes, alone or before a line break
            body = body.replace(f"'{end}\\n'", "eos_token + '\\n'").replace(f"'{end}'", "eos_token")
            body = body.replace(end, "{{ eos_token }}")
        text += f"{{% {'elif' if i else 'if'} template_format == '{name}' %}}{body}"
    return f"{text}{{% else %}}{_PRELUDE.sub('', own)}{{% endif %}}"


def draw(names: list[str], seed: int) -> Any:
    """A function of a row's number that draws one of the formats, or the tokenizer's own, each as likely."""
    import random

    def formats(_: dict[str, Any], index: int) -> dict[str, Any]:
        name = random.Random(f"{seed} {index}").choice(["own", *names])
        return {"chat_template_kwargs": {"template_format": name}}

    return formats
