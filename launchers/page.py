"""A chat page on this machine for a server behind OpenAI's API:  python -m launchers.page --url http://127.0.0.1:8000/v1

gradio's page around the openai client. Started beside a server by `launchers.serve --page`; by hand also for the near
end of an ssh tunnel. A server's key, if it has one, comes from VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio
    import openai

# before gradio is imported: nobody is told that it runs, and nothing is fetched from elsewhere
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False", "GRADIO_NUM_PORTS": "1",
}  # fmt: skip

# whatever a text holds, the page asks no other machine for anything
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'


def messages(history: list[dict[str, Any]], text: str) -> list[dict[str, str]]:
    """OpenAI's messages of gradio's history, whose contents are texts or lists of parts, and a new question.

    Answers are escaped in that history.
    """

    def plain(content: Any) -> str:
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))

    turns = [(turn["role"], plain(turn["content"])) for turn in history]
    said = [{"role": role, "content": html.unescape(t) if role == "assistant" else t} for role, t in turns]
    return [*said, {"role": "user", "content": text}]


def answers(
    client: openai.OpenAI, model: str, raw: bool, history: list[dict[str, Any]], text: str, **sampling: Any
) -> Iterator[str]:
    """What the model says so far, again and again. raw: it goes on with the text, and sees no history."""
    said = ""
    if raw:
        for chunk in client.completions.create(model=model, prompt=text, stream=True, **sampling):
            said += (chunk.choices[0].text or "") if chunk.choices else ""
            yield text + said
        return
    turns: Any = messages(history, text)
    for part in client.chat.completions.create(model=model, messages=turns, stream=True, **sampling):
        said += (part.choices[0].delta.content or "") if part.choices else ""
        yield said


def build(url: str, model: str, raw: bool) -> gradio.Blocks:
    """The page."""
    import gradio
    import openai

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("VLLM_API_KEY") or "none", max_retries=0)

    def reply(text: str, history: list[dict[str, Any]], temperature: float, max_tokens: float) -> Iterator[str]:
        sampling = {"temperature": temperature, "max_tokens": int(max_tokens)}
        try:
            for said in answers(client, model, raw, history, text, **sampling):
                yield html.escape(said, quote=False)  # gradio shows the tags that HTML knows, such as img
        except openai.OpenAIError as error:
            raise gradio.Error(f"{url}: {error}", print_exception=False) from error

    about = (
        "A base model: it goes on with your text, knows no chat, and remembers nothing of the text before."
        if raw
        else "Answers come as the model makes them, its tags included. Temperature 0 takes the likeliest token."
    )
    return gradio.ChatInterface(
        reply,
        # what a model says is shown as text: its tags are to be seen
        chatbot=gradio.Chatbot(
            label=model, render_markdown=False, sanitize_html=True, scale=1, buttons=["copy"], layout="bubble"
        ),
        title=model,
        description=about,
        additional_inputs=[
            gradio.Slider(0.0, 2.0, 0.0, step=0.05, label="temperature"),
            gradio.Slider(1, 4096, 256, step=1, label="longest answer, tokens"),
        ],
        additional_inputs_accordion="sampling",
        fill_height=True,
        flagging_mode="never",
        analytics_enabled=False,
        api_visibility="private",
    )


def first_model(url: str) -> str:
    """The name of the model that a server has. Raises ValueError."""
    import openai

    try:
        client = openai.OpenAI(base_url=url, api_key=os.environ.get("VLLM_API_KEY") or "none", max_retries=0)
        names = [model.id for model in client.models.list(timeout=10)]
    except openai.OpenAIError as error:
        raise ValueError(
            f"--url {url}: no answer ({error})\n  fix: see whether the tunnel and the server run"
        ) from error
    if not names:
        raise ValueError(f"--url {url}: the server names no model\n  fix: --model NAME")
    return names[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="where the server's API is, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="name of the model in requests (default: the server's first)")
    parser.add_argument("--port", type=int, default=7860, help="port of the page on 127.0.0.1 (default 7860)")
    parser.add_argument("--raw", action="store_true", help="a base model: it goes on with texts")
    args = parser.parse_args(argv)
    os.environ.update(QUIET)
    try:
        import gradio  # noqa: F401
        import openai  # noqa: F401
    except ImportError as error:
        fix = "pip install '.[serve]' in the project's folder"
        print(f"error: not installed: {error.name}\n  fix: {fix}", file=sys.stderr)
        return 2
    try:
        page = build(args.url, args.model or first_model(args.url), args.raw)
        page.launch(
            server_name="127.0.0.1", server_port=args.port, share=False, inbrowser=False, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], enable_monitoring=False, pwa=False, head=HEAD,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --port {args.port}: {error}\n  fix: another --port", file=sys.stderr)
        return 2
    print(f"page: http://127.0.0.1:{args.port}   (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
