"""Chat templates: their names, and whether one can tell what is trained from what is not.

Pure, and light enough for a login node: templates are rendered here by Jinja alone, as transformers renders them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.check import ConfigError, nearest
from conf.schema import TEMPLATES as NAMES

BEGIN, END = "\x02", "\x03"
PROBE = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 4+4?"},
    {"role": "assistant", "content": "That is 8."},
]
"""The conversation that shows what a template marks."""

FIX = f"model.chat_template={'|'.join(NAMES)}, or a Jinja file with {{% generation %}} around what the assistant says"


def is_text(template: str) -> bool:
    """Whether this is a template's text: a frozen config holds that of a file."""
    return "{{" in template or "{%" in template


def render(template: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """The text of a conversation, `{% generation %}` blocks between BEGIN and END. Raises jinja2.TemplateError."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "2000-01-01"}
    return environment.from_string(template).render(messages=messages, **variables)


def problem(template: str, **variables: Any) -> str | None:
    """Why a template cannot say what is trained, with the example as it renders it, or None where it can.

    variables: what the template may use beside `messages`: bos_token, eos_token.
    """
    import jinja2

    try:
        text = render(template, PROBE, **{"bos_token": "", "eos_token": "<eos>", **variables})
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        return f"cannot render a conversation of user and assistant: {error}"
    except Exception as error:  # what a template's expressions raise
        return f"cannot render a conversation of user and assistant: {type(error).__name__}: {error}"
    trained = "".join(part.split(END)[0] for part in text.split(BEGIN)[1:])
    shown = f"; rendered, with [[...]] around what is trained:\n{text.replace(BEGIN, '[[').replace(END, ']]')}"
    if BEGIN not in text:
        return f"has no {{% generation %}} marks, so assistant tokens cannot be told from the user's{shown}"
    if not trained.strip():
        return f"its {{% generation %}} marks cover nothing{shown}"
    for message in PROBE:
        if message["role"] == "user" and message["content"] in trained:
            return f"its {{% generation %}} marks cover what the user says{shown}"
    if PROBE[-1]["content"] not in trained:
        return f"its {{% generation %}} marks do not cover what the assistant says{shown}"
    return None


def check(key: str, template: str | None, masked: bool) -> None:
    """Refuse a template that is neither a name nor a Jinja file; where `masked`, also one that cannot mask.

    Raises ConfigError. A name and null always pass: a tokenizer's own template is known to the job alone.
    """
    if template is None or template in NAMES:
        return
    text = template
    if not is_text(template):
        path = Path(template).expanduser()
        if not path.is_file():
            valid = f"one of {', '.join(NAMES)}, null, or a path to a Jinja file"
            near = nearest(template, NAMES)
            raise ConfigError(key, template, "no such file", near if near.startswith("did") else valid)
        text = path.read_text(encoding="utf-8")
    if masked and (why := problem(text)) is not None:
        raise ConfigError(key, template, why, FIX)
