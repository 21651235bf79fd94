"""The judge: what it is asked, how it is read, and a local server that plays it, well and badly."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conf.check import ConfigError, check_run
from conf.schema import Config
from launchers.submission import changes
from post_training.data.source import DataError
from post_training.evaluation import judge
from post_training.evaluation.figures import average
from post_training.evaluation.journal import Journal
from post_training.evaluation.judge import Question
from post_training.run.directory import RunDirectory
from post_training.run.results import Figure
from post_training.stages.common import load_config
from tests.training import make_config

SECRET = "sk-very-secret-42"


class Server:
    """Speaks /v1/models and /v1/chat/completions. `say` makes the judge's words, or a status, from what was asked."""

    def __init__(self) -> None:
        self.say: Callable[[str], str | int] = lambda text: "Rating: [[7]]"
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.models = ["judge"]
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                server.keys.add(self.headers.get("Authorization"))
                models = [{"id": m, "object": "model", "created": 0, "owned_by": "us"} for m in server.models]
                self.answer(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions" and body["model"] == "judge" and body["temperature"] == 0
                server.asked.append(body["messages"][-1]["content"])
                said = server.say(server.asked[-1])
                if isinstance(said, int):
                    self.answer(said, {"error": {"message": f"no: {self.headers.get('Authorization')}"}})
                    return
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                self.answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "judge",
                                  "choices": [choice]})  # fmt: skip

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = Server()
    yield started
    started.close()


def config(url: str, *overrides: str) -> Config:
    how = (f"eval.judge.base_url={url}", "eval.judge.model=judge", "cluster.python=/elsewhere/python")
    return load_config(make_config("eval", *how, *overrides))


def journal(folder: Path, attempt: int = 1) -> Journal:
    run = RunDirectory(folder)
    if attempt == 1:
        run.create()
    run.announce(attempt)
    return Journal(run, attempt)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def answers(prompts: list[str]) -> list[str]:
    return [f"answer to {p}" for p in prompts]


def calm(*_: object) -> None:
    pass


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Rating: [[8]]", 8.0), ("[[7.5]]", 7.5), ("Rating: [9]", 9.0), ("[[10]] and [3]", 10.0), ("[[1]]", 1.0),
        ("Rating: 8", None), ("[[eight]]", None), ("[[0]]", None), ("[[11]]", None), ("[[85]]", None), ("", None),
    ],
)  # fmt: skip
def test_a_rating_is_read_as_fastchat_reads_it(text: str, value: float | None) -> None:
    assert judge.rating(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Both are fine. [[A]]", 1.0), ("[[B]]", 0.0), ("[[C]]", 0.5), ("[[A]] ... so [[A]]", 1.0),
        ("[[A]] or [[B]]", None), ("A is better", None), ("[[D]]", None), ("", None),
    ],
)  # fmt: skip
def test_a_preference_is_not_guessed(text: str, value: float | None) -> None:
    assert judge.preference(text) == value


def test_what_the_judge_is_shown() -> None:
    question = Question("What is {braces}?", "A pair of {}")
    (system, user) = judge.single(question, "an {answer}")
    assert system["role"] == "system" and '"[[rating]]"' in user["content"]
    for part in ("[Question]\nWhat is {braces}?\n", "Reference Answer]\nA pair of {}\n", "Answer]\nan {answer}\n"):
        assert part in user["content"]
    assert "Reference" not in judge.single(Question("q"), "a")[1]["content"]
    (system, user) = judge.pair(question, "ours", "theirs")
    assert '"[[C]]" for a tie' in system["content"]
    assert user["content"].index("Assistant A's Answer]\nours\n") < user["content"].index("B's Answer]\ntheirs\n")


def test_intervals_of_means() -> None:
    """By hand: mean 6, deviation sqrt(((4-6)^2 + 0 + (8-6)^2) / 2) = 2, half width 1.96 * 2 / sqrt(3)."""
    half = 1.96 * 2 / 3**0.5
    assert average([4, 6, 8]) == Figure(6, pytest.approx(6 - half), pytest.approx(6 + half), 3)  # type: ignore[arg-type]
    assert average([5]) == Figure(5, None, None, 1)


# ----------------------------------------------------------------------------------------------- the whole


def test_grades_and_wins(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four questions: the judge rates by a table, likes whatever comes first on two of them, and ours on one."""
    names = ["one", "two", "three", "four"]
    prompts = [*(f"question {n}" for n in names), "7*8?"]
    records = [{"prompt": p} for p in prompts[:-1]] + [{"prompt": "7*8?", "reference_answer": "56"}]
    asked = write(tmp_path / "q.jsonl", *records)
    theirs = write(tmp_path / "r.jsonl", *({"prompt": p, "completion": f"theirs to {p}"} for p in prompts))
    marks = {"question one": 4, "question two": 9, "question three": 2, "7*8?": 10}

    def say(text: str) -> str:
        question = next(q for q in (*marks, "question four") if q in text)
        if "Assistant A" not in text:
            return f"[[{marks[question]}]]" if question in marks else "It is very good."
        if question == "question one":  # ours, wherever it is
            return "[[A]]" if text.index("answer to") < text.index("theirs to") else "[[B]]"
        return {"question two": "[[A]]", "question three": "[[C]]", "question four": "?", "7*8?": "[[B]]"}[question]

    server.say = say
    cfg = config(server.url, f"eval.judge.questions={asked}", f"eval.judge.reference={theirs}")
    judge.check(cfg.eval.judge)
    kept = journal(tmp_path / "run")
    figures, rows = judge.run(answers, cfg, kept, calm, calm)
    assert figures["judge"] == average([4, 9, 2, 10])
    assert figures["judge_win_rate"] == average([1, 0.5, 0.5, 0.5])
    assert figures["judge_unread"] == Figure(3.0, count=15)
    assert [row["win"] for row in rows] == [1, 0.5, 0.5, None, 0.5] and rows[3]["rating"] is None
    assert rows[0]["completion"] == "answer to question one" and rows[0]["reference"] == "theirs to question one"
    assert len(server.asked) == 15 and sum("Reference Answer]\n56" in text for text in server.asked) == 1
    assert server.keys == {f"Bearer {SECRET}"}
    assert SECRET not in kept.path.read_text() + capsys.readouterr().out + json.dumps(rows)
    told: list[tuple[int, int]] = []
    kept = journal(tmp_path / "run", 2)
    again = judge.run(lambda prompts: pytest.fail("asked again"), cfg, kept, calm, lambda *now: told.append(now))
    assert told == [(15, 15)]
    assert again == (figures, rows) and len(server.asked) == 15


def test_busy_and_failing_servers_are_asked_again(server: Server, tmp_path: Path) -> None:
    """Each request fails twice, with 429 and with 500."""
    times: Counter[str] = Counter()

    def say(text: str) -> str | int:
        times[text] += 1
        return {1: 429, 2: 500}.get(times[text], "[[6]]")

    server.say = say
    figures, rows = judge.run(answers, config(server.url), journal(tmp_path / "run"), calm, calm)
    assert figures == {"judge": Figure(6, 6, 6, 10), "judge_unread": Figure(0.0, count=10)}
    assert set(times.values()) == {3} and [r["prompt"] for r in rows] == list(judge.QUESTIONS)


def test_a_judge_that_goes_away_leaves_no_figures_and_loses_no_judgements(server: Server, tmp_path: Path) -> None:
    lost = threading.Event()

    def say(text: str) -> str | int:
        if len(server.asked) > 4:
            lost.set()
        return 503 if lost.is_set() else "[[6]]"

    server.say = say
    cfg = config(server.url, "eval.judge.concurrency=1", "eval.judge.max_retries=1")
    kept = journal(tmp_path / "run")
    with pytest.raises(DataError, match=rf"{server.url}: the judge does not judge: .*503.*\n  fix: .*is kept") as said:
        judge.run(answers, cfg, kept, calm, calm)
    assert SECRET not in str(said.value) and len(kept.known) == 10 + 4
    came: list[str] = []

    def back(text: str) -> str:
        came.append(text)
        return "[[8]]"

    server.say, cfg.eval.judge.concurrency = back, 4
    found, _ = judge.run(answers, cfg, journal(tmp_path / "run", 2), calm, calm)
    assert found["judge"].value == pytest.approx((4 * 6 + 6 * 8) / 10) and len(came) == 6


def test_a_stop_request_does_not_wait_for_the_judge(server: Server, tmp_path: Path) -> None:
    """It is seen although no judgement comes; what has come is kept."""
    slow = threading.Event()

    def say(text: str) -> str:
        if len(server.asked) > 3:
            slow.wait(30)
        return "[[6]]"

    def pulse() -> None:
        if len(server.asked) > 3:
            raise KeyboardInterrupt

    server.say = say
    cfg = config(server.url, "eval.judge.concurrency=1")
    with pytest.raises(KeyboardInterrupt):
        judge.run(answers, cfg, journal(tmp_path / "run"), pulse, calm)
    assert not slow.is_set()
    slow.set()
    assert len(journal(tmp_path / "run", 2).known) == 10 + 3


def test_words_without_a_verdict_are_no_figure(server: Server, tmp_path: Path) -> None:
    server.say = lambda text: "As a language model I cannot rate."
    with pytest.raises(DataError, match="of 10 verdicts none can be read"):
        judge.run(answers, config(server.url), journal(tmp_path / "run"), calm, calm)


# ---------------------------------------------------------------------------------------- what is refused


def test_a_judge_is_looked_for_before_anything_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.models = ["other"]
    with pytest.raises(DataError, match=r"model=judge: .* serves no such model\n  fix: eval.judge.model=other"):
        judge.check(config(server.url).eval.judge)
    url = f"http://127.0.0.1:{free_port()}/v1"
    gone = config(url, "eval.judge.max_retries=0").eval.judge
    with pytest.raises(DataError, match=rf"base_url={url}: the judge cannot be reached: .*refused.*\n  fix: start it"):
        judge.check(gone)


def free_port() -> int:
    from tests import training

    return training.free_port()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"), ("no json\n", "line 1 is no JSON object"), ('\n[1]\n', "line 2 is no JSON object"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "line 2 has no prompt"), ('{"prompt": 3}\n', "line 1 has no prompt"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_read(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"eval.judge.questions={path}: {problem}"):
        judge.questions(config("http://here", f"eval.judge.questions={path}").eval.judge)


def test_a_reference_answers_all_questions(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / judge.SAMPLES, {"prompt": "a", "completion": "x"}, {"prompt": "c", "completion": "z"})
    how = config("http://here", f"eval.judge.reference={tmp_path}").eval.judge
    assert judge.reference(how, [Question("a")]) == {"a": "x", "c": "z"}
    with pytest.raises(DataError, match="has no answer to 1 of the questions, as to 'b'"):
        judge.reference(how, [Question("a"), Question("b")])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["eval.judge.base_url=localhost:8000"], "eval.judge.base_url"),
        (["eval.judge.base_url=http://"], "eval.judge.base_url"),
        (["eval.judge.base_url=http://me:pass@there/v1"], "eval.judge.base_url"),
        (["eval.judge.base_url=http://there/v1?key=abc"], "eval.judge.base_url"),
        (["eval.judge.base_url=http://there:port/v1"], "eval.judge.base_url"),
        (["eval.judge.model=null"], "eval.judge.model"),
        (["eval.judge.base_url=null"], "eval.judge.model"),
        (["eval.judge.concurrency=0"], "eval.judge.concurrency"),
        (["slurm.env.OPENAI_API_KEY=sk-1"], "slurm.env.OPENAI_API_KEY"),
    ],
)
def test_what_is_refused_at_submission(overrides: list[str], key: str) -> None:
    check_run(config("http://there:8000/v1"))
    with pytest.raises(ConfigError) as error:
        check_run(config("http://there:8000/v1", *overrides))
    assert error.value.key == key and error.value.fix
    for secret in ("pass", "abc", "sk-1"):
        assert secret not in str(error.value)


def test_where_a_judge_listens_makes_no_other_run() -> None:
    def frozen(*overrides: str) -> dict[str, Any]:
        return make_config("eval", *overrides) | {"inputs": {}}

    plain = frozen()
    of_before = {**plain, "eval": {k: v for k, v in plain["eval"].items() if k != "judge"}}
    assert changes(of_before, plain) == {}
    one = frozen("eval.judge.base_url=http://a/v1", "eval.judge.model=judge")
    assert changes(plain, one)
    there = frozen("eval.judge.base_url=http://b/v1", "eval.judge.model=judge", "eval.judge.max_retries=1")
    assert changes(one, there) == {}
    other = frozen("eval.judge.base_url=http://a/v1", "eval.judge.model=other")
    assert changes(one, other) == {"eval.judge.model": ("judge", "other")}
