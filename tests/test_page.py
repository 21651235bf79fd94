"""The chat page, in a real browser, in front of a server of the test's own."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers import page as chat_page

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = "/usr/bin/chromium"
ANSWER = [
    "<think> 6+7=13",
    " 2+2+1=5</think>",
    "<answer>53</answer>",
    "<img src=http://127.0.0.2/x onerror=alert(1)> &amp; <b>",
]


class Server:
    """OpenAI's chat completions as a stream of ANSWER, its second half held back until `go` is set."""

    def __init__(self) -> None:
        self.go, self.asked, self.gets = threading.Event(), list[dict[str, Any]](), list[str]()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.gets.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(
                    json.dumps({"object": "list", "data": [{"id": "tiny/sft", "object": "model"}]}).encode()
                )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
                if body["messages"][-1]["content"] == "fail":
                    self.send_response(503)
                    self.end_headers()
                    self.wfile.write(b'{"error": {"message": "the engine is gone"}}')
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for number, piece in enumerate(ANSWER):
                    if number == 2:
                        outer.go.wait(30)
                    chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": piece}}]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.go.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[str]:
    """The page's address; its server's one model is found by itself."""
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_API_KEY": "abc", "GRADIO_TEMP_DIR": str(tmp_path / "tmp")}
    argv = [sys.executable, "-m", "launchers.page", "--url", server.url, "--port", str(port)]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}" in process.stdout.readline(), (tmp_path / "err").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_question_is_answered_as_it_is_written(server: Server, page: str) -> None:
    if not Path(CHROMIUM).exists() or importlib.util.find_spec("playwright") is None:
        ci = os.environ.get("CI", "").lower() in ("true", "1")
        (pytest.fail if ci else pytest.skip)(f"needs {CHROMIUM} and playwright")
    from playwright import sync_api

    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            view = browser.new_page(viewport={"width": 380, "height": 700})
            requests: list[str] = []
            alerts: list[str] = []
            errors: list[str] = []
            view.on("request", lambda request: requests.append(request.url))
            view.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
            view.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
            view.goto(page)
            sync_api.expect(view).to_have_title("tiny/sft")
            box = view.get_by_role("textbox").first
            box.fill("26+27=?")
            box.press("Enter")
            bot = view.get_by_test_id("bot")
            sync_api.expect(bot).to_contain_text("<think> 6+7=13 2+2+1=5</think>", timeout=20000)
            assert "53" not in bot.inner_text()  # the rest is not written yet
            server.go.set()
            # tags are shown, and HTML is text
            sync_api.expect(bot).to_contain_text("".join(ANSWER))
            sync_api.expect(view.get_by_test_id("user")).to_contain_text("26+27=?")
            box.fill("and?")
            box.press("Enter")
            sync_api.expect(bot).to_have_count(2)
            sync_api.expect(bot.last).to_contain_text("".join(ANSWER))
            box.fill("fail")
            box.press("Enter")
            sync_api.expect(view.get_by_text("the engine is gone").first).to_be_visible()
            assert not alerts and bot.locator("img").count() == 0
            assert not errors
            # all of it is this machine's: no fonts, no scripts, no figures for anybody
            assert {url.split("/")[2] for url in requests if url.startswith("http")} == {page.removeprefix("http://")}
            # not even where HTML asks for it
            address = json.dumps(f"{server.url}/picture")
            image = f"new Promise(done => {{ const i = new Image(); i.onload = i.onerror = done; i.src = {address} }})"
            view.evaluate(f"{image}.then(() => 0)")
            assert server.gets == ["/v1/models"]
            wide = view.evaluate("document.documentElement.scrollWidth")
            assert wide <= 380
        finally:
            browser.close()
    first, second, _ = server.asked
    assert first["path"] == "/v1/chat/completions" and first["model"] == "tiny/sft" and first["stream"] is True
    assert first["key"] == "Bearer abc" and first["temperature"] == 0
    assert [m["content"] for m in second["messages"]] == ["26+27=?", "".join(ANSWER), "and?"]


def test_messages_of_gradios_history() -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c &lt;b&gt;", "metadata": None},
    ]
    assert chat_page.messages(history, "d") == [
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c <b>"}, {"role": "user", "content": "d"},
    ]  # fmt: skip


def test_a_base_model_goes_on_with_the_text() -> None:
    asked: dict[str, Any] = {}

    class Client:
        completions = property(lambda self: self)

        def create(self, **given: Any) -> list[Any]:
            asked.update(given)
            return [type("C", (), {"choices": [type("T", (), {"text": t})]}) for t in ("2", " and")]

    said = list(chat_page.answers(Client(), "m", True, [{"role": "user", "content": "x"}], "1+1=", max_tokens=3))  # type: ignore[arg-type]
    assert said == ["1+1=2", "1+1=2 and"]
    assert asked == {"model": "m", "prompt": "1+1=", "stream": True, "max_tokens": 3}


def test_what_stands_in_the_way_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in chat_page.QUIET:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    assert chat_page.main(["--url", f"http://127.0.0.1:{free_port()}/v1"]) == 2
    assert "no answer" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert chat_page.main(["--url", "http://127.0.0.1:1/v1"]) == 2
    assert "not installed: gradio\n  fix: pip install '.[serve]' in the project's folder" in capsys.readouterr().err
