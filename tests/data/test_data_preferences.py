"""Rows with two answers or a labelled one: every source's form, rows that cannot be compared, and what they do to a set's identity."""

import json

import pytest
from small import all_rows, make, pictures, report, write_csv, write_jsonl

from mmft.common.errors import UserError
from mmft.data.sources.conversations import Conversations
from mmft.data.sources.llamafactory import LlamaFactory
from mmft.data.sources.messages import OpenAIMessages
from mmft.data.sources.table import Table

LOSSY = {"max_bad_share": 0.99}
PAIR = {"prompt": "question", "text": "chosen", "rejected": "rejected"}  # RLAIF-V's columns


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def pairs(prepared):
    return [(s.prompt_text, s.answer_text, s.rejected, s.label) for s in all_rows(prepared)]


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    return tmp_path


def test_columns_as_rlaif_v_has_them(folder):
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "question": "What?", "chosen": " a dog ", "rejected": "a cat\n"}])
    assert pairs(make(Table(path=str(folder / "t.jsonl"), columns=PAIR), folder)) == [("What?", "a dog", "a cat", None)]


def test_question_and_answers_in_one_cell_as_rlhf_v_has_them(folder):
    cell = {"question": "What?", "chosen": "a dog", "rejected": "a cat"}
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "text": json.dumps(cell)}, {"image": "b.png", "text": cell}])
    assert pairs(make(Table(path=str(folder / "t.jsonl")), folder)) == [("What?", "a dog", "a cat", None)] * 2


@pytest.mark.parametrize("row", [
    {"prompt": user("What?"), "chosen": assistant("a dog"), "rejected": assistant("a cat")},
    {"chosen": user("What?") + assistant("a dog"), "rejected": user("What?") + assistant("a cat")},
    {"prompt": "What?", "chosen": "a dog", "rejected": "a cat"},
    {"prompt": user("What?"), "chosen": assistant([{"type": "text", "text": "a dog"}]), "rejected": assistant([{"type": "text", "text": "a cat"}])},
    {"messages": user("<image>What?") + assistant("a dog"), "rejected_response": "a cat"},
    {"messages": user("<image>What?") + assistant("a dog"), "rejected_messages": user("<image>What?") + assistant("a cat")},
], ids=["trl", "trl, whole conversations", "trl, texts", "trl, parts", "ms-swift", "ms-swift, messages"])  # fmt: skip
def test_rows_of_messages(folder, row):
    write_jsonl(folder / "t.jsonl", [{"images": ["a.png"], **row}])
    assert pairs(make(OpenAIMessages(path=str(folder / "t.jsonl")), folder)) == [("What?", "a dog", "a cat", None)]


def test_columns_of_messages(folder):
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "prompt": user("What?"), "chosen": assistant("a dog"), "rejected": assistant("a cat")}])
    source = Table(path=str(folder / "t.jsonl"), columns={"prompt": "prompt", "text": "chosen", "rejected": "rejected"}, image_position="added")
    assert pairs(make(source, folder)) == [("What?", "a dog", "a cat", None)]


def test_a_rejected_answer_to_other_images_is_refused(folder):
    row = {"images": ["a.png"], "messages": user("What?") + assistant("a dog"), "rejected_response": "a cat"}
    write_jsonl(folder / "t.jsonl", [{**row, "rejected_images": ["b.png"]}, {**row, "rejected_images": ["a.png"]}])
    prepared = make(OpenAIMessages(path=str(folder / "t.jsonl"), **LOSSY), folder)
    assert len(all_rows(prepared)) == 1 and "rejected_images are other images" in report(prepared)[0]["reason"]


def test_conversations_with_a_rejected_response(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
    (folder / "chat.json").write_text(json.dumps([{"image": "a.png", "conversations": turns, "rejected": {"from": "gpt", "value": "a cat"}}]), encoding="utf-8")
    assert pairs(make(Conversations(path=str(folder / "chat.json")), folder)) == [("What?", "a dog", "a cat", None)]


def test_llamafactorys_ranking_sets_and_kto_tag(folder):
    entries = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": {"chosen": "chosen", "rejected": "rejected", "images": "images"}},
        "alpaca": {"file_name": "alpaca.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad", "images": "images"}},
        "labels": {"file_name": "labels.json", "formatting": "sharegpt", "columns": {"kto_tag": "ok", "images": "images"}},
        "unnamed": {"file_name": "pairs.json", "ranking": True},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    human = {"from": "human", "value": "<image>What?"}
    dog, cat = {"from": "gpt", "value": "a dog"}, {"from": "gpt", "value": "a cat"}
    files = {
        "pairs.json": [{"images": ["a.png"], "conversations": [human], "chosen": dog, "rejected": cat}],
        "alpaca.json": [{"images": ["a.png"], "instruction": "<image>What?", "input": "", "good": "a dog", "bad": "a cat"}],
        "labels.json": [{"images": ["a.png"], "conversations": [human, dog], "ok": False}],
    }
    for name, rows in files.items():
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    for name in ("pairs", "alpaca"):
        assert pairs(make(LlamaFactory(path=str(folder), dataset=name), folder)) == [("What?", "a dog", "a cat", None)], name
    assert pairs(make(LlamaFactory(path=str(folder), dataset="labels"), folder)) == [("What?", "a dog", "", False)]
    with pytest.raises(UserError, match='where the chosen answers stand; add "chosen"'):
        make(LlamaFactory(path=str(folder), dataset="unnamed"), folder)


def test_labels_and_the_references_of_bad_answers(folder):
    rows = [(True, "a dog"), (False, "a cat"), (None, "a cow")]
    write_jsonl(folder / "t.jsonl", [{"images": ["a.png"], "prompt": user("What?"), "completion": assistant(text), "label": label} for label, text in rows])
    prepared = make(OpenAIMessages(path=str(folder / "t.jsonl")), folder)
    assert [(s.answer_text, s.label, s.references) for s in all_rows(prepared)] == [("a dog", True, ("a dog",)), ("a cat", False, ()), ("a cow", None, ("a cow",))]
    assert prepared.manifest["bad"] == 1 and prepared.manifest.get("rejected", 0) == 0
    write_jsonl(folder / "s.jsonl", [{"images": ["a.png"], "messages": user("What?") + assistant("a dog"), "label": 0}])
    assert all_rows(make(OpenAIMessages(path=str(folder / "s.jsonl")), folder))[0].label is None, "a number is some other label of the file"


def test_a_column_of_labels(folder):
    write_csv(folder / "t.csv", ["image", "text", "good"], ["a.png", "a dog", "True"], ["a.png", "a cat", "0"], ["a.png", "a cow", ""], ["a.png", "an ox", "fine"])
    samples = all_rows(make(Table(path=str(folder / "t.csv"), columns={"label": "good"}, prompt="?"), folder))
    assert [s.label for s in samples] == [True, False, None, None]


def test_a_label_beside_boxes_is_their_text(folder):
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "o": [[1, 1, 3, 2]], "l": "cat"}])
    [sample] = all_rows(make(Table(path=str(folder / "t.jsonl"), columns={"objects": "o", "label": "l"}, prompt="?"), folder))
    assert sample.label is None and sample.regions[0]["label"] == "cat"


def test_rows_that_cannot_be_compared_are_named_and_counted(folder):
    rows = [
        {"chosen": "a dog", "rejected": "a cat"}, {"chosen": "a dog", "rejected": " a dog "}, {"chosen": "a dog", "rejected": ""}, {"chosen": "a dog", "rejected": None},
        {"chosen": "", "rejected": "a cat"}, {"chosen": "a dog", "rejected": ["a cat", "a cow"]}, {"chosen": "a dog", "rejected": {"text": 1}},
        {"chosen": user("A?") + assistant("a dog"), "rejected": user("B?") + assistant("a cat")}, {"chosen": "a dog", "rejected": user("a cat")},
    ]  # fmt: skip
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "question": "What?", **row} for row in rows])
    prepared = make(Table(path=str(folder / "t.jsonl"), columns=PAIR, **LOSSY), folder)
    found = {line["where"]: line["reason"] for line in report(prepared) if line["action"] == "dropped"}
    assert found["t.jsonl:2"] == "equal answers: the chosen and the rejected answer are both 'a dog'"
    assert found["t.jsonl:3"] == found["t.jsonl:4"] == "empty rejected answer: there is nothing to compare the chosen answer with"
    assert found["t.jsonl:5"].startswith("empty answer") and found["t.jsonl:6"].startswith("several rejected answers: column rejected holds 2")
    assert all(found[f"t.jsonl:{n}"].startswith("broken pair") for n in (7, 8, 9)), found
    assert "before the last turn" in found["t.jsonl:8"] and "the user's, not an answer" in found["t.jsonl:9"]
    assert prepared.manifest["reasons"] == {"broken pair": 3, "empty answer": 1, "empty rejected answer": 2, "equal answers": 1, "several rejected answers": 1}
    assert prepared.manifest["rejected"] == 1 and len(found) == 8
    (folder / "again.jsonl").write_bytes((folder / "t.jsonl").read_bytes())
    with pytest.raises(UserError, match="8 of 9 rows cannot be used .*equal answers"):
        make(Table(path=str(folder / "again.jsonl"), columns=PAIR), folder)


def test_a_pair_whose_better_answer_is_labelled_bad_is_no_pair(folder):
    rows = [{"image": "a.png", "question": "What?", "chosen": "a dog", "rejected": "a cat", "good": good} for good in (False, True, None)]
    write_jsonl(folder / "t.jsonl", rows)
    prepared = make(Table(path=str(folder / "t.jsonl"), columns={**PAIR, "label": "good"}, **LOSSY), folder)
    assert [(line["where"], line["reason"]) for line in report(prepared) if line["action"] == "dropped"] == [("t.jsonl:1", "broken pair: its chosen answer is labelled bad")]


def test_captions_of_one_image_are_not_grouped_when_they_are_compared(folder):
    with pytest.raises(UserError, match="data.captions=group: makes one row of several, and so loses their rejected answers"):
        Table(path="t.csv", captions="group", columns=PAIR)


def test_answers_and_labels_belong_to_a_sets_identity(folder):
    rows = [{"image": "a.png", "question": "What?", "chosen": "a dog", "rejected": "a cat"}]
    fingerprints = set()
    for n, change in enumerate(({}, {"rejected": "a cow"}, {"good": True}, {"good": False})):
        write_jsonl(folder / f"{n}.jsonl", [{**row, **change} for row in rows])
        compared = {"prompt": "question", "text": "chosen", "label": "good"} if "good" in change else PAIR
        for columns in (compared, {"prompt": "question", "text": "chosen"}):
            fingerprints.add(make(Table(path=str(folder / f"{n}.jsonl"), columns=columns), folder).fingerprint)
    assert len(fingerprints) == 5, "four sets with answers to compare, and the one without them"
