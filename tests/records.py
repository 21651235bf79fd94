"""Records in the schemas in which the data sets are published, and files to put them in. No record is a real one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful assistant."
TRACE = (
    "<|begin_of_thought|>\n\nOkay, 6 times 7. That is 42.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nThe product is \\boxed{42}.\n\n<|end_of_solution|>"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}  # in the order of the hub's files


PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"text": "Rain fell all day.\nThen it stopped.", "meta": {"pile_set_name": "Pile-CC"}},
        {"text": "def f(): pass", "meta": {"pile_set_name": "Github"}},
    ],
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Blue.", "text": "Below is an instruction..."},
        {"instruction": "Add up.", "input": "2 and 3", "output": "5", "text": "Below is an instruction..."},
    ],
    "alpaca_cleaned": [{"output": "5", "input": "2 and 3", "instruction": "Add up."}],
    "dolly": [
        {"instruction": "When?", "context": "It was in 1969.", "response": "In 1969.", "category": "closed_qa"},
        {"instruction": "Think of a name.", "context": "", "response": "Ada.", "category": "brainstorming"},
    ],
    "ultrachat": [
        {
            "prompt": "Hello",
            "prompt_id": "f0e1",
            "messages": [said("user", "Hello"), said("assistant", "Hi"), said("user", "Bye"), said("assistant", "Bye")],
        }
    ],
    "slimorca": [
        {
            "conversations": [
                {"from": "system", "value": SYSTEM, "weight": None},
                {"from": "human", "value": "2+2?", "weight": 0.0},
                {"from": "gpt", "value": "4", "weight": 1.0},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "", "weight": None},
                {"from": "human", "value": "3+3?", "weight": 0.0},
                {"from": "gpt", "value": "6", "weight": 1.0},
            ]
        },
    ],
    "openthoughts": [
        {
            "system": "Your role as an assistant involves thoroughly exploring questions...",
            "conversations": [{"from": "user", "value": "6*7?"}, {"from": "assistant", "value": TRACE}],
        }
    ],
    "gsm8k": [{"question": "6 times 7?", "answer": "6 times 7 is <<6*7=42>>42.\n#### 42"}],
    "hh_rlhf": [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello there", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}
    ],
    "ultrafeedback": [
        {
            "prompt": "2+2?",
            "prompt_id": "ab12",
            "chosen": [said("user", "2+2?"), said("assistant", "4")],
            "rejected": [said("user", "2+2?"), said("assistant", "5")],
            "messages": [said("user", "2+2?"), said("assistant", "4")],
            "score_chosen": 9.0,
            "score_rejected": 3.5,
        }
    ],
    "orca_dpo": [
        {"system": SYSTEM, "question": "2+2?", "chosen": "4", "rejected": "Five, I think."},
        {"system": "", "question": "3+3?", "chosen": "6", "rejected": "Seven, I think."},
    ],
}


def write(path: Path, rows: list[Any]) -> str:
    """A JSON Lines file, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)
