"""The registry of data sets: their published schemas, transforms of one's own, and records that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from conf.check import ConfigError
from conf.datasets import KNOWN, STAGE_VIEWS, TRANSFORMS, VIEWS, having
from conf.schema import Config, Data, Dataset, Quality
from launchers.selection import select
from launchers.submission import freeze, make_plan
from launchers.submit import Code, Undo, write
from post_training import data
from post_training.data import mix, transforms
from post_training.data.source import DataError, Source, assistant, system, user
from post_training.stages.common import load_config
from tests.in_process import own_cache  # noqa: F401  (a fixture)
from tests.records import PUBLISHED, SYSTEM
from tests.records import write as write_records
from tests.training import ROOT, real_data

# ------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_each_data_set_has_its_file_that_says_what_it_is(name: str) -> None:
    text = (ROOT / "conf" / "data" / f"{name}.yaml").read_text()
    assert yaml.safe_load(text)["name"] == name
    gives = re.search(r"^# gives: (.*)$", text, re.MULTILINE)
    assert gives is not None
    if name != "custom":
        assert tuple(re.sub(r"\([^)]*\)", "", gives[1]).replace(" ", "").split(",")) == KNOWN[name].views
    if KNOWN[name].hub_id is not None:
        for word in ("schema", "size", "licence"):
            assert re.search(rf"^# {word}: \S", text, re.MULTILINE), word
        assert re.search(rf"^# transform: {KNOWN[name].transform}\b", text, re.MULTILINE)
        assert str(KNOWN[name].hub_id) in text


def test_the_registry_and_its_files_are_the_same() -> None:
    assert {p.stem for p in (ROOT / "conf" / "data").glob("*.yaml")} == set(KNOWN)
    assert set(TRANSFORMS) == {name for name, found in transforms.TRANSFORMS.items() if found.file is None}
    assert set(STAGE_VIEWS.values()) == set(VIEWS)
    assert all(having(view) for view in VIEWS)


def loaded(tmp_path: Path, name: str, rows: list[Any], kind: str = "jsonl", **changes: Any) -> Source:
    """A data set from a file of these rows, all of them to train on; held-out ones are the same."""
    if kind == "parquet":
        path = str(tmp_path / "r.parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path = write_records(tmp_path / "r.jsonl", rows)
    return data.load(Data(name=name, path=path, eval_path=path, **changes))


def in_file_order(rows: Any, source: Source) -> list[Any]:
    """Rows, put back in the order of their records; none was dropped."""
    assert isinstance(source, mix.Mix)
    origins = source.parts[0].source.splits["train"].origins  # type: ignore[attr-defined]
    return [row for _, row in sorted(zip(origins, rows, strict=True), key=lambda pair: pair[0])]


THOUGHT = "<think>Okay, 6 times 7. That is 42.</think><answer>The product is \\boxed{42}.</answer>"
EXPECTED: list[tuple[str, str, list[Any]]] = [
    ("text", "documents", [{"text": r["text"]} for r in PUBLISHED["text"]]),
    ("alpaca", "demonstrations", [
        {"messages": [user("Name a colour."), assistant("Blue.")]},
        {"messages": [user("Add up.\n\n2 and 3"), assistant("5")]},
    ]),
    ("alpaca_cleaned", "demonstrations", [{"messages": [user("Add up.\n\n2 and 3"), assistant("5")]}]),
    ("dolly", "demonstrations", [
        {"messages": [user("When?\n\nIt was in 1969."), assistant("In 1969.")]},
        {"messages": [user("Think of a name."), assistant("Ada.")]},
    ]),
    ("ultrachat", "demonstrations", [
        {"messages": [user("Hello"), assistant("Hi"), user("Bye"), assistant("Bye")]},
    ]),
    ("slimorca", "demonstrations", [
        {"messages": [system(SYSTEM), user("2+2?"), assistant("4")]},
        {"messages": [user("3+3?"), assistant("6")]},
    ]),
    ("openthoughts", "demonstrations", [{"messages": [user("6*7?"), assistant(THOUGHT)]}]),
    ("gsm8k", "documents", [{"text": "6 times 7?\n6 times 7 is 42.\n#### 42"}]),
    ("gsm8k", "demonstrations", [
        {"messages": [user("6 times 7?"), assistant("<think>6 times 7 is 42.</think><answer>42</answer>")]},
    ]),
    ("gsm8k", "problems", [{"prompt": [user("6 times 7?")], "answer": "42"}]),
    ("hh_rlhf", "documents", [{"text": "Human: Hi\n\nAssistant: Hello there"}]),
    ("hh_rlhf", "demonstrations", [{"messages": [user("Hi"), assistant("Hello there")]}]),
    ("hh_rlhf", "preferences", [
        {"prompt": [user("Hi")], "chosen": [assistant("Hello there")], "rejected": [assistant("Go away")]},
    ]),
    ("ultrafeedback", "demonstrations", [{"messages": [user("2+2?"), assistant("4")]}]),
    ("ultrafeedback", "preferences", [
        {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ]),
    ("orca_dpo", "demonstrations", [
        {"messages": [system(SYSTEM), user("2+2?"), assistant("4")]},
        {"messages": [user("3+3?"), assistant("6")]},
    ]),
    ("orca_dpo", "preferences", [
        {"prompt": [system(SYSTEM), user("2+2?")],
         "chosen": [assistant("4")], "rejected": [assistant("Five, I think.")]},
        {"prompt": [user("3+3?")], "chosen": [assistant("6")], "rejected": [assistant("Seven, I think.")]},
    ]),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("name", "view", "rows"), EXPECTED, ids=[f"{name}-{view}" for name, view, _ in EXPECTED])
def test_published_records(tmp_path: Path, name: str, view: str, rows: list[Any], kind: str) -> None:
    source = loaded(tmp_path, name, PUBLISHED[name], kind)
    made = getattr(source, view)("train")
    assert in_file_order(list(made), source) == rows
    assert list(getattr(source, view)("held_out")) == list(made)
    assert made.column_names == list(rows[0])


def test_every_view_of_every_data_set_is_tested() -> None:
    tested = {(name, view) for name, view, _ in EXPECTED}
    given = {(n, v) for n, known in KNOWN.items() if n not in ("arithmetic", "custom") for v in known.views}
    assert tested == given


CUSTOM: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("documents", {"text": "words"}, {"text": "words"}),
    ("demonstrations", {"messages": [said := user("q"), assistant("a")]}, {"messages": [said, assistant("a")]}),
    ("demonstrations", {"prompt": "q", "completion": "a"}, {"messages": [user("q"), assistant("a")]}),
    ("problems", {"prompt": "q", "answer": 7}, {"prompt": [user("q")], "answer": "7"}),
    ("problems", {"prompt": [system("s"), user("q")], "answer": "7"},
     {"prompt": [system("s"), user("q")], "answer": "7"}),
    ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b"},
     {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}),
]  # fmt: skip


@pytest.mark.parametrize(("view", "record", "row"), CUSTOM)
def test_records_that_are_samples_already(tmp_path: Path, view: str, record: dict[str, Any], row: Any) -> None:
    assert list(getattr(loaded(tmp_path, "custom", [record] * 2), view)("train")) == [row] * 2


def test_each_hub_is_asked_for_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        calls.append((path, subset, split))
        return datasets.Dataset.from_list(PUBLISHED[name] * 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, known in KNOWN.items():
        if known.hub_id is not None:
            getattr(data.load(Data(name, held_out=1)), known.views[0])("train")
    assert calls == [
        ("tatsu-lab/alpaca", None, "train"),
        ("yahma/alpaca-cleaned", None, "train"),
        ("databricks/databricks-dolly-15k", None, "train"),
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
        ("HuggingFaceH4/ultrachat_200k", None, "test_sft"),
        ("Open-Orca/SlimOrca", None, "train"),
        ("open-thoughts/OpenThoughts-114k", None, "train"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("Anthropic/hh-rlhf", None, "train"),
        ("Anthropic/hh-rlhf", None, "test"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"),
        ("HuggingFaceH4/ultrafeedback_binarized", None, "test_prefs"),
        ("Intel/orca_dpo_pairs", None, "train"),
    ]


def test_a_text_file_is_paragraphs_and_a_folder_may_hold_a_readme(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / ".cache").mkdir(parents=True)
    (folder / "a.txt").write_text("One\nline.\n\nTwo.\n\nThree.\n")
    for beside in ("README.md", "LICENSE", ".gitattributes", ".cache/x.json"):
        (folder / beside).write_text("no record")
    source = data.load(Data("text", path=str(folder), held_out=1))
    texts = {r["text"].strip() for split in ("train", "held_out") for r in source.documents(split)}  # type: ignore[arg-type]
    assert texts == {"One\nline.", "Two.", "Three."}


def test_all_of_a_csv_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,answer\n1+1?,2\nNone or all?,None\n")
    source = data.load(Data("custom", path=f"{tmp_path}/r.csv", eval_path=f"{tmp_path}/r.csv"))
    assert {(r["prompt"][0]["content"], r["answer"]) for r in source.problems("train")} == {
        ("1+1?", "2"), ("None or all?", "None"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "view", "record", "why"),
    [
        ("text", "documents", {"text": " \n"}, "empty text"),
        ("alpaca", "demonstrations", {"instruction": "q", "input": "", "output": ""}, "an empty turn"),
        ("ultrachat", "demonstrations", {"messages": [user("a"), user("b"), assistant("c")]}, "turns out of order"),
        ("ultrachat", "demonstrations", {"messages": [user("a"), assistant("b"), user("c")]}, "turns out of order"),
        ("openthoughts", "demonstrations",
         {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "<|begin_of_thought|> so"}]},
         "a trace without thought or solution"),
        ("orca_dpo", "preferences", {"system": "", "question": "q", "chosen": "a", "rejected": "a"},
         "chosen and rejected are the same"),
        ("orca_dpo", "preferences", {"system": "", "question": "q", "chosen": "a", "rejected": " "}, "an empty answer"),
        ("hh_rlhf", "preferences",
         {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
         "chosen and rejected answer different prompts"),
        ("ultrafeedback", "preferences", {**PUBLISHED["ultrafeedback"][0], "score_rejected": 9.0},
         "the chosen answer is not scored higher"),
        ("custom", "problems", {"prompt": "q", "answer": " "}, "no answer to verify"),
    ],
)  # fmt: skip
def test_dropped_with_a_reason(tmp_path: Path, name: str, view: str, record: Any, why: str) -> None:
    good = PUBLISHED.get(name, [{"prompt": "q", "answer": "a"}])[0]
    source = loaded(tmp_path, name, [good, {**good, **record}, {**good, **record}])
    mix.REPORTS.clear()
    assert len(getattr(source, view)("train")) == 1
    assert mix.REPORTS[0]["sources"][0]["dropped"] == {why: 2}
    with pytest.raises(DataError, match=rf"no {VIEWS[view]} are left of 2 records; dropped: 2 {why}"):
        getattr(loaded(tmp_path, name, [{**good, **record}] * 2), view)("train")


def test_a_pair_that_is_scored_wrong_still_demonstrates(tmp_path: Path) -> None:
    record = {**PUBLISHED["ultrafeedback"][0], "score_rejected": 10.0}
    assert len(loaded(tmp_path, "ultrafeedback", [record]).demonstrations("train")) == 1


# ------------------------------------------------------------------------------------- transforms of one's own

SEED_TASKS = '''
from post_training.data import Drop, assistant, transform, user

@transform("seed_tasks", fields=("instruction",))
def seed_tasks(record):
    """One demonstration for each instance of a task."""
    if record["is_classification"]:
        raise Drop("a classification")
    for instance in record["instances"]:
        asked = f"{record['instruction']}\\n\\n{instance['input']}".strip()
        yield {"messages": [user(asked), assistant(instance["output"])], "category": record["name"]}

@transform("two_of_each")
def two_of_each(record):
    return [{"text": record["instruction"]}, {"text": record["name"]}]
'''


def own(tmp_path: Path, code: str, name: str = "mine.py") -> str:
    (tmp_path / name).write_text(code)
    return str(tmp_path / name)


def test_a_transform_of_ones_own_reads_the_seed_tasks(tmp_path: Path) -> None:
    path = real_data("self_instruct") / "seed_tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [t for t in tasks if not t["is_classification"]]
    asked = {f"{t['instruction']}\n\n{i['input']}".strip(): i["output"] for t in kept for i in t["instances"]}
    cfg = Data("custom", path=str(path), eval_path=str(path), transform="seed_tasks")
    cfg.transform_file = own(tmp_path, SEED_TASKS)
    mix.REPORTS.clear()
    rows = data.load(cfg).demonstrations("train")
    assert {r["messages"][0]["content"]: r["messages"][1]["content"] for r in rows} == asked
    assert len(rows) == sum(len(t["instances"]) for t in kept)
    (source,) = mix.REPORTS[0]["sources"]
    assert (source["records"], source["dropped"]) == (175, {"a classification": 175 - len(kept)})
    cfg.transform = "two_of_each"
    assert len(data.load(cfg).documents("train")) == 350


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("record['reply']", ["row 1: KeyError: 'reply' (line 4)", "raise Drop"]),
        ("3", ["row 1", "TypeError: 'int' object is not iterable"]),
        ("['text']", ["row 1: sample is text, and must be a dict"]),
        ("{'messages': 'hello'}", ["row 1: messages is text, and must be a list"]),
        ("{'messages': [{'role': 'user', 'content': 5}]}", ["row 1: messages turn 1: content is a number"]),
        ("{'text': 'x'}", ["row 1: messages is missing: demonstrations need", "there is text"]),
    ],
)
def test_what_a_transform_does_wrong(tmp_path: Path, code: str, words: list[str]) -> None:
    file = own(
        tmp_path, f"from post_training.data import transform\n@transform('w')\ndef w(record):\n    return {code}\n"
    )
    records = write_records(tmp_path / "r.jsonl", [{"a": "b"}])
    cfg = Data("custom", path=records, eval_path=records, transform="w", transform_file=file)
    with pytest.raises(DataError) as caught:
        data.load(cfg).demonstrations("train")
    for word in (*words, records, "\n  fix: "):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_there", ["ModuleNotFoundError", "(line 1)", "mend the file"]),
        ("from post_training.data import transform\n@transform('alpaca')\ndef a(r): ...", ["'alpaca' already"]),
        ("x = 1", ["data.transform=w: no such transform"]),
    ],
)
def test_transform_files_that_cannot_be_used(tmp_path: Path, code: str, words: list[str]) -> None:
    cfg = Data("custom", path="r.jsonl", transform="w" * 9, transform_file=own(tmp_path, code))
    with pytest.raises(DataError) as caught:
        data.load(cfg)
    for word in words:
        assert word.replace("=w:", f"={'w' * 9}:") in str(caught.value)


def selected(tmp_path: Path, *tokens: str) -> Any:
    given = ["cluster=local", "stage=sft", f"paths.output_base={tmp_path}/out", f"inputs.model={tmp_path}", *tokens]
    return select(given, only_one=True)


def test_a_transform_file_is_frozen_with_the_run(tmp_path: Path) -> None:
    records = write_records(tmp_path / "r.jsonl", [{"question": "q", "reply": "a"}] * 3)
    code = (
        "from post_training.data import assistant, transform, user\n@transform('mine')\n"
        "def mine(record): return {'messages': [user(record['question']), assistant(record['reply'])]}\n"
    )
    file = Path(own(tmp_path, code))
    tokens = ["data=custom", f"data.path={records}", f"data.transform_file={file}", "data.transform=mine"]
    tokens += ["data.held_out=1"]
    plan = make_plan(selected(tmp_path, *tokens))
    write(plan, Undo(), Code())
    run = plan.stages["sft"].run
    place = run.read_config()["data"]["transform_file"]
    assert (run.code / place).read_text() == code and Path(place).name == "mine.py"
    before = freeze(selected(tmp_path, *tokens).config("sft"), "sft", "p", {})

    # it is the text that counts, not the place
    elsewhere = own(tmp_path, code, "elsewhere.py")
    moved = selected(tmp_path, *tokens[:2], f"data.transform_file={elsewhere}", *tokens[3:]).config("sft")
    assert Path(freeze(moved, "sft", "p", {})["data"]["transform_file"]).parent == Path(place).parent
    file.write_text(code.replace("record['reply']", "'something else'"))
    changed = freeze(selected(tmp_path, *tokens).config("sft"), "sft", "p", {})
    assert changed["identity"] != before["identity"]

    # and the job takes its own copy, although the file was edited
    show = (
        "import sys, json, pathlib; from post_training import data;"
        "from post_training.stages.common import load_config;"
        "from post_training.run.directory import RunDirectory;"
        "cfg = load_config(RunDirectory(pathlib.Path(sys.argv[1])).read_config()).data;"
        "print(json.dumps(data.load(cfg).demonstrations('train')[0]))"
    )
    env = {**os.environ, "PYTHONPATH": str(run.code), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", show, str(run.root)], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"messages": [user("q"), assistant("a")]}


# --------------------------------------------------------------------------------- refused at submission


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["data.name=alpacas"], ["data.name=alpacas", "did you mean 'alpaca'"]),
        (["data=orca_dpo", "stage=base"], ["data.name=orca_dpo: has no plain text", "base.data=arithmetic", "gsm8k"]),
        (["data=gsm8k", "stage=rm"], ["data.name=gsm8k: has no preference pairs, which rm trains on", "hh_rlhf"]),
        (["data=ultrafeedback", "stage=grpo"], ["has no prompts with answers", "gsm8k"]),
        (["data=custom", "data.path=R", "data.transform=text"], ["data.transform=text: has no demonstrations"]),
        (["data=text", "stage=base"], ["data.path=null: text has no records of its own"]),
        (["data.path=R"], ["data.path=", "arithmetic is generated"]),
        (["data=custom", "data.path=R", "data.transform=mine"], ["data.transform=mine", "data.transform_file="]),
        (["data=custom", "data.path=R", "data.transform_file=M"], ["none of its transforms is asked for"]),
        (["data=custom", "data.path=R", "data.transform_file=M", "data.transform=yours"],
         ["data.transform=yours", "has no such transform", "mine"]),
        (["data=custom", "data.path=R", "data.transform_file=none.py", "data.transform=x"], ["No such file"]),
        (["data=custom", "data.path=R", "data.transform_file=B", "data.transform=x"], ["is no Python: line 1"]),
        (["data.quality.dedup=fuzzy"], ["data.quality.dedup=fuzzy", "near"]),
        (["data.quality.near_threshold=1.5"], ["must be between 0 and 1"]),
        (["data.quality.min_chars=9", "data.quality.max_chars=8"], ["data.quality.min_chars=9", "nothing would be"]),
        (["data.datasets=[{name: gsm8k, path: R}]", "data.path=R"], ["data.path=", "data.datasets says"]),
        (["data.datasets=[{name: gsm8k, path: R, weight: 0}]"], ["data.datasets[0].weight=0", "must be above 0"]),
        (["data.datasets=[{name: gsm9k}]"], ["data.datasets[0].name=gsm9k", "did you mean 'gsm8k'"]),
        (["data.datasets=[{name: arithmetic}, {name: gsm8k, path: no.jsonl}]"],
         ["data.datasets[1].path=no.jsonl", "no such file"]),
        (["data.datasets=[{name: arithmetic}, {name: text, path: R}]"],
         ["data.datasets[1].name=text: has no demonstrations"]),
        (["data.datasets=[{name: gsm8k, path: R, held_out: 0}]"], ["data.datasets[0].held_out=0"]),
        (["data.datasets=[{name: gsm8k, wait: 2}]"], ["data.datasets"]),
        (["data=gsm8k", "data.path=R", "data.subset=main"], ["data.subset=main: is a hub's"]),
        (["data.datasets=[{name: gsm8k, path: R, subset: main}]"], ["data.datasets[0].subset=main: is a hub's"]),
        (["data.datasets=[{name: arithmetic}, {name: gsm8k}]", "offline=true"],
         ["data.datasets[1].path=null: gsm8k would come from its hub"]),
    ],
)  # fmt: skip
def test_refused_at_submission(tmp_path: Path, tokens: list[str], words: list[str]) -> None:
    records = write_records(tmp_path / "r.jsonl", [{"a": "b"}])
    mine = own(tmp_path, "from post_training.data import transform\n@transform('mine')\ndef mine(r): ...\n")
    places = {"R": records, "M": mine, "B": own(tmp_path, "def x(:\n", "broken.py")}
    given = [re.sub(r"(?<=[=:])( ?)([RMB])(?=$|[},])", lambda m: m[1] + places[m[2]], token) for token in tokens]
    with pytest.raises(ConfigError) as caught:
        selected(tmp_path, *given)
    for word in (*words, "\n  fix: "):
        assert word in str(caught.value)


def test_a_mix_is_frozen_as_it_was_given(tmp_path: Path) -> None:
    records = write_records(tmp_path / "r.jsonl", PUBLISHED["gsm8k"] * 4)
    tokens = [f"data.datasets=[{{name: arithmetic, weight: 0.5}}, {{name: gsm8k, path: {records}, held_out: 1}}]"]
    cfg = selected(tmp_path, *tokens, "data.quality.dedup=exact").config("sft")
    frozen = freeze(cfg, "sft", "p", {})
    back: Config = load_config(json.loads(json.dumps(frozen)))
    assert back.data.datasets == [Dataset("arithmetic", weight=0.5), Dataset("gsm8k", path=records, held_out=1)]
    assert back.data.quality == Quality(dedup="exact")
    other = selected(tmp_path, tokens[0].replace("0.5", "0.6"), "data.quality.dedup=exact").config("sft")
    assert freeze(other, "sft", "p", {})["identity"] != frozen["identity"]


# ----------------------------------------------------------------------------------------- refused in the job


def refusal(cfg: Data, view: str = "demonstrations") -> str:
    with pytest.raises(DataError) as caught:
        getattr(data.load(cfg), view)("train")
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question": oops}\n', "r.jsonl, line 2: is not JSON: "),
        ("r.jsonl.gz", '{"question": "q", "answer": "#### 1"}\n\n{"question": "q', "r.jsonl.gz, line 3: is not JSON: "),
        ("r.json", '[{"question": "q"},\n{"question" "q"}]', "r.json, line 2: is not JSON: "),
        ("r.jsonl", '{"question": "q"}\n[1, 2]\n', "r.jsonl, line 2: is no record"),
        ("r.jsonl", "", "r.jsonl, no records"),
        ("r.csv", 'question,answer\n"1,2', "cannot be read"),
        ("r.parquet", "PAR1 no", "cannot be read"),
        ("r.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', "r.jsonl, row 2: answer is missing"),
        ("r.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": 3}\n',
         "r.jsonl, row 2: answer is a number, and must be text"),
        ("r.jsonl", '{"question": ["q"], "answer": "#### 1"}\n' * 2, "question is a list, and must be text"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    said = refusal(Data("gsm8k", path=str(path), eval_path=str(path)))
    assert words in said and str(path) in said


def test_a_bad_record_in_a_folder_is_named_by_its_own_file_and_row(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 4), ("c", 2)):
        write_records(tmp_path / f"folder/{name}.jsonl", PUBLISHED["gsm8k"] * count)
    rows = [*PUBLISHED["gsm8k"] * 2, {"question": "q", "answer": "none"}, *PUBLISHED["gsm8k"]]
    write_records(tmp_path / "folder/b.jsonl", rows)
    said = refusal(Data("gsm8k", path=f"{tmp_path}/folder", eval_path=f"{tmp_path}/folder/a.jsonl"))
    assert f"{tmp_path}/folder/b.jsonl, row 3: answer no '#### N'" in said


def test_a_split_that_is_not_there_and_one_that_is_a_part(tmp_path: Path) -> None:
    path = write_records(tmp_path / "r.jsonl", [{"text": f"text {i}"} for i in range(10)])
    assert "data.split=<one of them>" in refusal(Data("text", path=path, split="test"), "documents")
    source = data.load(Data("text", path=path, split="train[:60%]", eval_split="train[60%:]"))
    assert {r["text"] for r in source.documents("train")} == {f"text {i}" for i in range(6)}
    assert {r["text"] for r in source.documents("held_out")} == {f"text {i}" for i in range(6, 10)}


def test_a_lack_of_disk_or_network_is_no_fault_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise datasets.exceptions.DatasetGenerationError("an error") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path = write_records(tmp_path / "r.jsonl", PUBLISHED["gsm8k"])
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        data.load(Data("gsm8k", path=path)).problems("train")
