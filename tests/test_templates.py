"""Chat templates: each as its makers write it, masks that cover what the assistant says, and what is refused."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conf import chat
from conf.check import ConfigError
from conf.schema import TEMPLATES, Config, Model, Sft
from launchers.preflight import check_paths
from post_training.data import templates
from post_training.data.source import DataError
from post_training.data.tokenizer import bytes_tokenizer, load_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\n4"},
]

# The official templates, as their makers publish them (a test's own copy: TRL's files are not read here).
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # huggingface.co/docs/transformers/chat_templating
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)  # meta-llama/Meta-Llama-3-8B-Instruct
TULU3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)  # allenai/Llama-3.1-Tulu-3-8B
QWEN3 = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n2+2=4\n</think>\n\n4<|im_end|>\n"
)  # Qwen/Qwen3-0.6B, of the last question alone
STANFORD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)  # tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT["prompt_no_input"]


def tokenizer_of(name: str | None, **changes: Any) -> PreTrainedTokenizerFast:
    return load_tokenizer(Model(chat_template=name), None, **changes)


shared = cache(tokenizer_of)
"""For tests that change nothing."""


def text(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@pytest.mark.parametrize(("name", "official"), [("chatml", CHATML), ("llama3", LLAMA3), ("tulu3", TULU3)])
@pytest.mark.parametrize("asked", [False, True])
def test_renders_as_the_official_template(name: str, official: str, asked: bool) -> None:
    ours, theirs = tokenizer_of(name), tokenizer_of(name)
    ours.bos_token = theirs.bos_token = "<|pad|>"  # some token, to see where it goes
    theirs.chat_template = official
    talk = TALK[:-1] if asked else TALK
    assert text(ours, talk, add_generation_prompt=asked) == text(theirs, talk, add_generation_prompt=asked)


def test_qwen3_renders_as_the_official_template() -> None:
    assert text(tokenizer_of("qwen3"), [TALK[0], *TALK[3:]]) == QWEN3
    asked = text(tokenizer_of("qwen3"), TALK[:2], add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n")


def test_alpaca_renders_as_stanford_writes_it() -> None:
    tokenizer = tokenizer_of("alpaca")
    prompt = STANFORD.format(instruction="Hi!")
    assert text(tokenizer, TALK[1:2], add_generation_prompt=True) == prompt
    assert text(tokenizer, TALK[1:3]) == f"{prompt}Hello.{tokenizer.eos_token}"
    assert text(tokenizer, TALK[:2]) == "Be kind.\n\n### Instruction:\nHi!"


SAID = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<|"), min_size=1).filter(
    lambda said: said == said.strip() and "think" not in said
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20)
@given(turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_exactly_what_the_assistant_says_and_its_end_is_trained(name: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = shared(name)
    messages = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = tokenizer.decode([i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m])
    before, after = ("<think>\n\n</think>\n\n", "\n") if name == "qwen3" else ("", "")
    assert trained == "".join(f"{before}{said}{tokenizer.eos_token}{after}" for _, said in turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_end_and_roles_are_single_tokens(name: str) -> None:
    tokenizer = tokenizer_of(name)
    template = templates.named(name)
    assert tokenizer.eos_token == (template.end or "<|end|>")
    assert len(tokenizer) == 265 + len(set(template.special) - {"<|user|>", "<|assistant|>", "<|system|>", "<|end|>"})
    for token in (*template.special, *template.ordinary):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_comes_back_from_a_folder_unchanged(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, system_prompt="Be 'good'.")
    tokenizer.save_pretrained(tmp_path)
    for again in (name, None):
        loaded = load_tokenizer(Model(chat_template=again), str(tmp_path), "Be 'good'.")
        assert (loaded.chat_template, loaded.eos_token, len(loaded)) == (
            tokenizer.chat_template, tokenizer.eos_token, len(tokenizer),
        )  # fmt: skip


# ------------------------------------------------------------------------------ the tokenizer's own template


def saved(folder: Path, template: str) -> str:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_own_template_gets_trls_marks_where_trl_knows_it(tmp_path: Path) -> None:
    loaded = load_tokenizer(Model(), saved(tmp_path, LLAMA3))
    assert "generation" in loaded.chat_template
    templates.require_masks(loaded)


def test_own_template_with_marks_stays(tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert load_tokenizer(Model(), saved(tmp_path, own)).chat_template == own


def test_a_name_takes_the_place_of_the_own_template(tmp_path: Path) -> None:
    path = saved(tmp_path, LLAMA3)
    assert load_tokenizer(Model(chat_template="tulu3"), path).chat_template == templates.named("tulu3").text


BAD = {
    "no marks": ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "has no {% generation %} marks"),
    "covers nothing": (
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
        "marks cover nothing",
    ),
    "covers the user": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "cover what the user says",
    ),
    "misses the answer": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}"
        "{% endif %}{% endfor %}",
        "do not cover what the assistant says",
    ),
    "syntax": ("{% for m in messages %}\n{{ m.content }", "line 2: "),
    "refuses": ("{{ raise_exception('not today') }}{% generation %}{% endgeneration %}", "not today"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_cannot_mask_is_refused_with_the_example(case: str, tmp_path: Path) -> None:
    template, why = BAD[case]
    file = tmp_path / "bad.jinja"
    file.write_text(template)
    cfg = Config(model=Model(chat_template=str(file)))
    cfg.paths.output_base = str(tmp_path)
    with pytest.raises(ConfigError) as at_submission:
        check_paths(cfg)
    assert why in str(at_submission.value) and "fix: model.chat_template=" in str(at_submission.value)
    if case not in ("syntax", "refuses"):
        assert "What is 2+3?" in str(at_submission.value), "the rendered example"
    cfg.stage = "dpo"  # masks nothing
    check_paths(cfg)
    with pytest.raises(DataError) as in_the_job:
        templates.require_masks(load_tokenizer(Model(chat_template=template), None))
    assert why in str(in_the_job.value) and "fix:" in str(in_the_job.value)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        chat.check("model.chat_template", "chatmL", True)
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(Model(chat_template=str(tmp_path / "none.jinja")), None)


def test_a_frozen_config_holds_the_files_text(tmp_path: Path) -> None:
    from launchers.submission import freeze

    file = tmp_path / "mine.jinja"
    file.write_text(templates.CHATML)
    frozen = [freeze(Config(model=Model(chat_template=given)), "sft", "p", {}) for given in (str(file), "chatml")]
    assert [f["model"]["chat_template"] for f in frozen] == [templates.CHATML, "chatml"]
    assert frozen[0]["identity"] != frozen[1]["identity"]
    loaded = load_tokenizer(Model(chat_template=frozen[0]["model"]["chat_template"]), None)
    assert loaded.chat_template == templates.CHATML


# ------------------------------------------------------------------------------------- the system prompt


@settings(max_examples=40)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_system_prompt_is_put_before_conversations_without_one(prompt: str) -> None:
    tokenizer = bytes_tokenizer()
    templates.set_system_prompt(tokenizer, prompt)
    templates.set_system_prompt(tokenizer, prompt)  # in the place of the one before
    said = [{"role": "system", "content": prompt}, TALK[1]]
    plain = bytes_tokenizer()
    assert text(tokenizer, [TALK[1]]) == text(plain, said)
    assert text(tokenizer, [TALK[1]], add_generation_prompt=True) == text(plain, said, add_generation_prompt=True)
    assert text(tokenizer, TALK) == text(plain, TALK)
    templates.set_system_prompt(tokenizer, None)
    assert tokenizer.chat_template == plain.chat_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_prompt_under_every_template(name: str) -> None:
    tokenizer = tokenizer_of(name, system_prompt="Be kind.")
    assert text(tokenizer, TALK[1:]) == text(tokenizer_of(name), TALK)
    templates.require_masks(tokenizer)


# --------------------------------------------------------------------------------------- several formats


def test_each_format_in_turn_ends_with_the_own_end() -> None:
    own = tokenizer_of("think_answer", system_prompt="Be kind.")
    names = [name for name in TEMPLATES if name != "think_answer"]
    mixed = templates.mixed(own, names)
    assert text(own, TALK[1:], chat_template=mixed, template_format="own") == text(own, TALK[1:])
    for name in names:
        theirs = tokenizer_of(name)
        expected = text(theirs, TALK).replace(templates.named(name).end or "<|end|>", "<|end|>")
        assert text(own, TALK[1:], chat_template=mixed, template_format=name) == expected


def test_formats_are_drawn_by_seed_and_row() -> None:
    names = ["chatml", "alpaca"]

    def drawn(seed: int) -> list[str]:
        draw = templates.draw(names, seed)
        return [draw({}, i)["chat_template_kwargs"]["template_format"] for i in range(600)]

    assert drawn(0) == drawn(0) != drawn(1)
    counts = Counter(drawn(0))
    assert set(counts) == {"own", *names} and min(counts.values()) > 150


def test_unknown_formats_are_refused() -> None:
    from conf.check import check_run

    cfg = Config(sft=Sft(random_templates=["chatml", "alpacca"]))
    cfg.training.max_steps = 1
    with pytest.raises(ConfigError, match=r"sft\.random_templates=alpacca.*\n.*did you mean 'alpaca'"):
        check_run(cfg)
