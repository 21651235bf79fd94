"""A language model as the judge of answers, behind any OpenAI-compatible server.

Two ways, after "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (Zheng et al. 2023, arXiv:2306.05685) and
AlpacaEval (Dubois et al. 2024, arXiv:2404.04475):

    judge            each answer alone, 1 to 10: the mean of what the judge says as "[[8]]"
    judge_win_rate   each answer beside a reference's, in both orders, since judges prefer what comes first:
                     the share of wins, a tie counted half

The prompts are MT-Bench's of FastChat (single-v1, single-math-v1, pair-v2), one turn. A judgement whose verdict cannot
be read is counted and left out, never guessed. Every judgement is kept in the evaluation's journal, so a later attempt
asks only what is missing; figures come from whole sets of judgements alone. The key of a server that wants one is in
OPENAI_API_KEY, and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from conf.schema import Judge as How
from post_training.data.source import DataError
from post_training.evaluation.figures import average
from post_training.evaluation.journal import Journal, key
from post_training.run.results import Figure

Row = dict[str, Any]
Messages = list[dict[str, str]]
SAMPLES = "judge.jsonl"
"""In an evaluation's output: one line a question, with the answer and what the judge said."""
KEY = "OPENAI_API_KEY"

QUESTIONS = (
    "My neighbour's dog barks every night. Write a short, friendly note that asks them to do something about it.",
    "Explain to a ten-year-old why the moon does not fall down.",
    "Name three things to check before buying a used bicycle, one sentence each.",
    "A train leaves at 14:35 and arrives at 17:10. How long does the journey take? Show how you got there.",
    "Write a Python function that returns the second largest number of a list, and say what it does with equal ones.",
    "Turn this into polite English: 'Your report is late again. Send it now.'",
    "Summarise in one sentence: The harbour froze in January, the ships stayed away, and bread became dear.",
    "I have rice, eggs, an onion and soy sauce. Suggest a dinner and describe the steps.",
    "All poets in the club own a cat. Mira is in the club and owns no cat. Is Mira a poet? Give the reason.",
    "Give two reasons for and two against working from home, and say which side you find stronger.",
)
"""Asked where `eval.judge.questions` names no file. Our own."""


@dataclass(frozen=True)
class Question:
    prompt: str
    reference_answer: str | None = None  # a right answer that the judge is shown


# ------------------------------------------------------------------------------------------- pure: prompts

SYSTEM_SINGLE = "You are a helpful assistant."
SINGLE = (
    "[Instruction]\nPlease act as an impartial judge and evaluate the quality of the response provided by an AI "
    "assistant to the user question displayed below. Your evaluation should consider factors such as the helpfulness, "
    "relevance, accuracy, depth, creativity, and level of detail of the response. Begin your evaluation by providing a "
    "short explanation. Be as objective as possible. After providing your explanation, you must rate the response on a "
    'scale of 1 to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\n'
    "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
)
SINGLE_REFERENCE = (
    "[Instruction]\nPlease act as an impartial judge and evaluate the quality of the response provided by an AI "
    "assistant to the user question displayed below. Your evaluation should consider correctness and helpfulness. You "
    "will be given a reference answer and the assistant's answer. Begin your evaluation by comparing the assistant's "
    "answer with the reference answer. Identify and correct any mistakes. Be as objective as possible. After providing "
    "your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: "
    '"[[rating]]", for example: "Rating: [[5]]".\n\n'
    "[Question]\n{question}\n\n[The Start of Reference Answer]\n{reference}\n[The End of Reference Answer]\n\n"
    "[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
)
SYSTEM_PAIR = (
    "Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the "
    "user question displayed below. You should choose the assistant that follows the user's instructions and answers "
    "the user's question better. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, "
    "depth, creativity, and level of detail of their responses. Begin your evaluation by comparing the two responses "
    "and provide a short explanation. Avoid any position biases and ensure that the order in which the responses were "
    "presented does not influence your decision. Do not allow the length of the responses to influence your "
    "evaluation. Do not favor certain names of the assistants. Be as objective as possible. After providing your "
    'explanation, output your final verdict by strictly following this format: "[[A]]" if assistant A is better, '
    '"[[B]]" if assistant B is better, and "[[C]]" for a tie.'
)
PAIR = (
    "[User Question]\n{question}\n\n[The Start of Assistant A's Answer]\n{a}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{b}\n[The End of Assistant B's Answer]"
)


def single(question: Question, answer: str) -> Messages:
    """The messages that ask for a rating."""
    form = SINGLE if question.reference_answer is None else SINGLE_REFERENCE
    text = form.format(question=question.prompt, answer=answer, reference=question.reference_answer)
    return [{"role": "system", "content": SYSTEM_SINGLE}, {"role": "user", "content": text}]


def pair(question: Question, a: str, b: str) -> Messages:
    """The messages that ask which of two answers is better."""
    text = PAIR.format(question=question.prompt, a=a, b=b)
    return [{"role": "system", "content": SYSTEM_PAIR}, {"role": "user", "content": text}]


def rating(text: str) -> float | None:
    """What the judge rates, 1 to 10, as FastChat reads it: [[8]], else [8]. None where that is not to be found."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    value = float(match[1]) if match else math.nan
    return value if 1 <= value <= 10 else None


def preference(text: str) -> float | None:
    """1.0 for [[A]], 0.0 for [[B]], 0.5 for a tie; None where there is no verdict, or several that differ."""
    verdicts = set(re.findall(r"\[\[([ABC])\]\]", text))
    return {"A": 1.0, "B": 0.0, "C": 0.5}[verdicts.pop()] if len(verdicts) == 1 else None


# --------------------------------------------------------------------------------------------- files


def questions(how: How) -> list[Question]:
    """The questions that are asked. Raises DataError with file and line."""
    if how.questions is None:
        return [Question(text) for text in QUESTIONS]
    found = []
    for number, record in _records("questions", how.questions):
        prompt, answer = record.get("prompt"), record.get("reference_answer")
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(answer, str | None):
            raise DataError(
                f"eval.judge.questions={how.questions}: line {number} has no prompt, or one that is no text\n"
                '  fix: {"prompt": "..."} on each line, and "reference_answer": "..." where there is one'
            )
        found.append(Question(prompt, answer))
    return found


def reference(how: How, asked: Iterable[Question]) -> dict[str, str] | None:
    """The reference's answer to each prompt; None where none is compared with. Raises DataError.

    `eval.judge.reference` is a JSONL file of {prompt, completion}, or the folder of an evaluation that a judge graded.
    """
    if how.reference is None:
        return None
    path = Path(how.reference).expanduser()
    if path.is_dir():
        path = next((p for p in (path / SAMPLES, path / "model" / SAMPLES) if p.is_file()), path / SAMPLES)
    found = {r.get("prompt"): r.get("completion") for _, r in _records("reference", str(path))}
    lacking = [q.prompt for q in asked if not isinstance(found.get(q.prompt), str)]
    if lacking:
        raise DataError(
            f"eval.judge.reference={how.reference}: has no answer to {len(lacking)} of the questions, as to "
            f"{lacking[0][:60]!r}\n"
            f"  fix: answers to the same questions, as another evaluation's model/{SAMPLES} has them"
        )
    return {str(prompt): str(answer) for prompt, answer in found.items()}


def _records(name: str, path: str) -> list[tuple[int, dict[str, Any]]]:
    """Lines of a JSONL file with their numbers, at least one. Raises DataError."""
    where, found = f"eval.judge.{name}={path}", []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}\n  fix: give a JSONL file that the job can read") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{where}: line {number} is no JSON object\n  fix: one object on each line")
        found.append((number, record))
    if not found:
        raise DataError(f"{where}: is empty\n  fix: give a file with records, or eval.judge.{name}=null")
    return found


# -------------------------------------------------------------------------------------------- the server


def check(how: How) -> None:
    """One cheap request, /models, before anything costs time. Raises DataError with URL, reason and fix."""
    try:
        import openai
    except ImportError:
        raise DataError(
            "eval.judge.base_url: the package openai is not installed here\n"
            "  fix: pip install '.[judge]' in the project's folder, or eval.judge.base_url=null"
        ) from None
    with openai.OpenAI(**_client(how)) as client:
        try:
            served = [model.id for model in client.models.list()]
        except openai.NotFoundError:  # some servers have no list
            return
        except openai.OpenAIError as error:
            raise unreachable(how, error) from None
    if served and how.model not in served:
        named = served[0] if len(served) == 1 else f"<one of {', '.join(served[:8])}>"
        raise DataError(
            f"eval.judge.model={how.model}: {how.base_url} serves no such model\n  fix: eval.judge.model={named}"
        )


def _client(how: How) -> dict[str, Any]:
    secret = os.environ.get(KEY) or "none"  # a local server asks for none, the client for some text
    return {
        "base_url": how.base_url, "api_key": secret, "timeout": how.timeout_seconds, "max_retries": how.max_retries,
    }  # fmt: skip


def unreachable(how: How, error: Exception) -> DataError:
    """What went wrong with the judge, in words, and never the key."""
    import openai

    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        reason = f"refuses the key in {KEY}" if os.environ.get(KEY) else "wants a key"
        fix = f"export {KEY} in the shell that submits"
    elif isinstance(error, openai.APIStatusError):
        said = " ".join(str(error.message).split())[:200].replace(os.environ.get(KEY) or "\0", "...")
        reason, fix = f"does not judge: {said}", "see the server's log; what was judged is kept"
    else:
        said = " ".join(str(error.__cause__ or error).split())[:200]
        reason = f"cannot be reached: {said or type(error).__name__}"
        fix = "start it, or eval.judge.base_url=<where it listens>; what was judged is kept"
    return DataError(f"eval.judge.base_url={how.base_url}: the judge {reason}\n  fix: {fix}")


def ask(
    how: How,
    wanted: Mapping[str, Messages],
    journal: Journal,
    pulse: Callable[..., None],
    told: Callable[[int, int], None],
) -> None:
    """Have the judge's words for all messages, by key, in the journal: what is there already is not asked again.

    pulse: called every second; what it raises ends the work at once, and what has come is kept. Raises DataError where
    the judge does not answer any more, after the client's own retries.
    """
    missing = {same: messages for same, messages in wanted.items() if same not in journal}
    told(len(wanted) - len(missing), len(wanted))
    if missing:
        asyncio.run(_ask(how, missing, journal, pulse, told))


async def _ask(
    how: How,
    missing: Mapping[str, Messages],
    journal: Journal,
    pulse: Callable[..., None],
    told: Callable[[int, int], None],
) -> None:
    import openai

    places = asyncio.Semaphore(how.concurrency)
    async with openai.AsyncOpenAI(**_client(how)) as client:

        async def judgement(same: str) -> tuple[str, str]:
            async with places:
                answer = await client.chat.completions.create(
                    model=str(how.model), messages=missing[same], temperature=0  # type: ignore[arg-type]
                )
            return same, (answer.choices[0].message.content or "") if answer.choices else ""

        running = {asyncio.create_task(judgement(same)) for same in missing}
        try:
            while running:
                finished, running = await asyncio.wait(running, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in finished if (error := task.exception()) is not None]
                come = dict(task.result() for task in finished if task.exception() is None)
                journal.add(come)
                if errors and isinstance(errors[0], openai.OpenAIError):
                    raise unreachable(how, errors[0]) from None
                if errors:
                    raise errors[0]
                if come:
                    told(len(come), 0)
                pulse()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


# ----------------------------------------------------------------------------------------------- figures


def run(
    answer: Callable[[list[str]], list[str]],
    cfg: Config,
    journal: Journal,
    pulse: Callable[..., None],
    told: Callable[[int, int], None],
) -> tuple[dict[str, Figure], list[Row]]:
    """Figures `judge` and, with a reference, `judge_win_rate`, and a row for each question.

    answer: the model's answers to a batch of prompts, asked for those that the journal does not have. told: called with
    how many judgements came since, and how many are to be asked beside those it knows of. Raises DataError.
    """
    how = cfg.eval.judge
    asked = questions(how)
    others = reference(how, asked)
    keys = [key("judge", "answer", q.prompt, how.max_new_tokens) for q in asked]
    missing = [(k, q.prompt) for k, q in zip(keys, asked, strict=True) if k not in journal]
    for start in range(0, len(missing), cfg.eval.batch_size):
        part = dict(missing[start : start + cfg.eval.batch_size])
        journal.add(dict(zip(part, answer(list(part.values())), strict=True)))
    answers = [str(journal[k]) for k in keys]
    wanted: list[dict[str, Messages]] = []
    for question, ours in zip(asked, answers, strict=True):
        messages = {"single": single(question, ours)}
        if others is not None:
            theirs = others[question.prompt]
            messages |= {"first": pair(question, ours, theirs), "second": pair(question, theirs, ours)}
        wanted.append(messages)
    named = [{part: key("judge", how.model, m) for part, m in messages.items()} for messages in wanted]
    ask(how, {k[p]: m[p] for k, m in zip(named, wanted, strict=True) for p in m}, journal, pulse, told)
    said = [{part: str(journal[same]) for part, same in k.items()} for k in named]
    rows = [_row(q, a, s, others) for q, a, s in zip(asked, answers, said, strict=True)]
    return figures(rows), rows


def _row(question: Question, answer: str, said: Mapping[str, str], others: Mapping[str, str] | None) -> Row:
    row: Row = {
        "prompt": question.prompt, "completion": answer, "rating": rating(said["single"]), "judgement": said["single"],
    }  # fmt: skip
    if others is not None:
        first, second = preference(said["first"]), preference(said["second"])
        win = None if first is None or second is None else (first + 1 - second) / 2
        row |= {
            "reference": others[question.prompt], "win": win, "preferences": [first, second],
            "judgement_first": said["first"], "judgement_second": said["second"],
        }  # fmt: skip
    return row


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Means of what could be read, each with its interval and count, and how many verdicts could not be.

    A question counts for judge_win_rate when both orders have a verdict: 1, 0.75, 0.5, 0.25 or 0. Raises DataError
    where no verdict of a kind can be read.
    """
    found: dict[str, Figure] = {}
    for name, part in (("judge", "rating"), ("judge_win_rate", "win")):
        values = [row[part] for row in rows if part in row]
        read = [value for value in values if value is not None]
        if values and not read:
            raise DataError(
                f"eval.judge.model: of {len(values)} verdicts none can be read, as [[8]] or [[A]]\n"
                "  fix: another judge: this one does not keep to the form that it is asked for"
            )
        if read:
            found[name] = average(read)
    verdicts = [v for row in rows for v in (row["rating"], *(row["preferences"] if "win" in row else ()))]
    found["judge_unread"] = Figure(float(verdicts.count(None)), count=len(verdicts))
    return found
