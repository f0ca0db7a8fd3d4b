"""Choices of rows: for all rows, from a column, as letters in the prompt; what is refused, and that they belong to a set's identity."""

import json

import pytest
from small import all_rows, make, pictures, report, write_csv, write_jsonl

from mmft.common.errors import UserError
from mmft.data.choices import letters_in
from mmft.data.sources.classfolder import ClassFolder
from mmft.data.sources.conversations import Conversations
from mmft.data.sources.table import Table

LOSSY = {"max_bad_share": 0.99}


def test_choices_for_all_rows_of_any_source(tmp_path):
    pictures(tmp_path, "c/cat/1.png", "c/dog/2.png")
    assert [s.choices for s in all_rows(make(ClassFolder(path=str(tmp_path / "c"), choices=["cat", "dog"]), tmp_path))] == [("cat", "dog")] * 2
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "cat"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "a", "image": "c/cat/1.png", "conversations": turns}]), encoding="utf-8")
    assert all_rows(make(Conversations(path=str(tmp_path / "chat.json"), root=str(tmp_path), choices=["cat", "dog"]), tmp_path))[0].choices == ("cat", "dog")


def test_a_column_of_choices(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "text": "2", "o": [1, 2, 3]}, {"image": "b.png", "text": "dog", "o": "['cat', 'dog']"}, {"image": "b.png", "text": "free", "o": None}]
    write_jsonl(tmp_path / "t.jsonl", rows)
    samples = all_rows(make(Table(path=str(tmp_path / "t.jsonl"), columns={"choices": "o"}, prompt="?"), tmp_path))
    assert [s.choices for s in samples] == [("1", "2", "3"), ("cat", "dog"), ()]
    samples = all_rows(make(Table(path=str(tmp_path / "t.jsonl"), columns={"choices": "o"}, prompt="?", choices=["free", "bound"]), tmp_path))
    assert [s.choices for s in samples] == [("1", "2", "3"), ("cat", "dog"), ("free", "bound")], "a row's own come first"


def test_rows_that_nothing_can_be_chosen_from_are_named_and_counted(tmp_path):
    pictures(tmp_path, "a.png")
    rows = [("cat", ["cat", "dog"]), ("Cat", ["cat", "dog"]), ("cat", ["cat"]), ("cat", ["cat", "dog", "cat"]), ("cat", {"A": "cat"})]
    write_jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "text": text, "o": o} for text, o in rows])
    prepared = make(Table(path=str(tmp_path / "t.jsonl"), columns={"choices": "o"}, prompt="?", **LOSSY), tmp_path)
    assert {line["where"]: line["reason"] for line in report(prepared)} == {
        "t.jsonl:2": "reference not among the choices: 'Cat' is none of cat, dog",
        "t.jsonl:3": "too few choices: 1, and a choice needs at least two",
        "t.jsonl:4": "duplicate choices: 'cat' is there twice",
        "t.jsonl:5": 'not text: column o holds an object; write it as text ({"a": 1} as "{\\"a\\": 1}")',
    }
    assert prepared.manifest["reasons"]["reference not among the choices"] == 1 and prepared.manifest["dropped"] == 4


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Which?\nA. cat\nB. dog\nC. bird", "ABC"), ("Which? (A) cat (B) dog", "AB"), ("Options: A) cat B) dog C) a B. B. King record", "ABC"),
        ("A: 1\nB: 2", "AB"), ("Example: A. x B. y. Now: A. cat B. dog C. cow", "ABC"), ("A. cat", ""), ("A cat or a dog?", ""), ("B. cat C. dog", ""),
        ("U.S.A. cat B. dog", ""), ("A.cat\nB.dog", "AB"),
    ],
)  # fmt: skip
def test_letters_in_a_prompt(text, letters):
    assert letters_in(text) == list(letters)


def test_letters_are_the_choices_only_when_asked_for(tmp_path):
    pictures(tmp_path, "a.png")
    rows = [["a.png", "Which?\nA. cat\nB. dog", "B"], ["a.png", "Which?\nA. cat\nB. dog", "dog"], ["a.png", "What?", "A"]]
    write_csv(tmp_path / "t.csv", ["image", "q", "text"], *rows)
    source = {"path": str(tmp_path / "t.csv"), "columns": {"prompt": "q"}, **LOSSY}
    assert [s.choices for s in all_rows(make(Table(**source), tmp_path))] == [(), (), ()]
    prepared = make(Table(**source, choices="letters"), tmp_path)
    assert [s.choices for s in all_rows(prepared)] == [("A", "B")]
    assert [line["reason"] for line in report(prepared)] == [
        "reference not among the choices: 'dog' is none of A, B", "no options: data.choices=letters, and the prompt does not name A, B, ... in order",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["cat"], "data.choices=[cat]: too few choices"), (["cat", "dog", "cat"], "'cat' is there twice"), (["cat", " "], "a choice has no text"),
        ("leters", "Did you mean letters?"), ([True, False], '["yes","no"]'), ([["cat"], "dog"], "is no text"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_before_a_row_is_read(given, said):
    with pytest.raises(UserError) as error:
        Table(path="nowhere.csv", choices=given)
    assert said in str(error.value)


def test_choices_are_part_of_a_sets_identity_and_sets_without_them_keep_theirs(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "cat"], ["b.png", "dog"])
    sets = [make(Table(path=str(tmp_path / "t.csv"), prompt="?", choices=choices), tmp_path) for choices in (None, ["cat", "dog"], ["cat", "dog", "cow"])]
    assert len({s.fingerprint for s in sets}) == 3 and len({s.path for s in sets}) == 3
    assert "choices" not in sets[0].manifest["source"] and "choices" not in sets[0].manifest["source"]["columns"]
