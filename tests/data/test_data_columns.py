"""Columns in other forms: several text columns, keys inside cells, the number of a choice, answers of several people, lists of splits."""

import json

import pytest
from small import all_rows, make, pictures, write_jsonl

from mmft.common.errors import UserError
from mmft.data.sources.columns import Columns
from mmft.data.sources.saved import named_splits
from mmft.data.sources.table import Table


def rows_of(tmp_path, records, **keys):
    pictures(tmp_path, *[f"{n}.png" for n in range(len(records))])
    path = write_jsonl(tmp_path / "t.jsonl", [{"image": f"{n}.png", **r} for n, r in enumerate(records)])
    return all_rows(make(Table(path=str(path), **keys), tmp_path))


def test_several_columns_of_captions(tmp_path):
    (row,) = rows_of(tmp_path, [{"a": "one", "b": "", "c": "three"}], columns={"text": ["a", "b", "c"]})
    assert row.answer_text == "one" and row.references == ("one", "three")
    with pytest.raises(UserError, match="data.columns.text=d: .* has no such column"):
        rows_of(tmp_path, [{"a": "one"}], columns={"text": ["a", "d"]})


def test_a_first_row_without_a_column_that_others_have(tmp_path):
    """In JSON Lines a row may leave out a key: the first one has no prompt of its own."""
    rows = rows_of(tmp_path, [{"text": "one"}, {"text": "two", "q": "What?"}], columns={"prompt": "q"})
    assert [(row.prompt_text, row.answer_text) for row in rows] == [("", "one"), ("What?", "two")]
    with pytest.raises(UserError, match="data.columns.prompt=qq: t.jsonl has no such column. Did you mean q"):
        rows_of(tmp_path, [{"text": "one"}, {"text": "two", "q": "What?"}], columns={"prompt": "qq"})


def test_all_of_several_columns_are_trained(tmp_path):
    rows = rows_of(tmp_path, [{"a": "one", "b": "two"}], columns={"text": ["a", "b"]}, captions="all")
    assert [row.answer_text for row in rows] == ["one", "two"] and rows[1].references == ("two", "one")


@pytest.mark.parametrize("cell", [{"gt": {"total": "5", "menu": [1]}}, json.dumps({"gt": {"total": "5", "menu": [1]}}), str({"gt": {"total": "5", "menu": [1]}})])
def test_a_key_inside_a_cell(tmp_path, cell):
    (whole,) = rows_of(tmp_path, [{"truth": cell}], columns={"text": "truth.gt"})
    assert json.loads(whole.answer_text) == {"total": "5", "menu": [1]}
    (part,) = rows_of(tmp_path, [{"truth": cell}], columns={"text": "truth.gt.total"})
    assert part.answer_text == "5"


def test_a_column_whose_name_has_a_dot(tmp_path):
    (row,) = rows_of(tmp_path, [{"a.b": "mine", "a": {"b": "inner"}}], columns={"text": "a.b"})
    assert row.answer_text == "mine"


def test_a_key_that_some_cells_lack_drops_the_row(tmp_path):
    rows = rows_of(tmp_path, [{"t": {"x": "one"}}, {"t": {}}], columns={"text": "t.x"}, max_bad_share=0.5)
    assert [row.answer_text for row in rows] == ["one"]


def test_the_number_of_a_choice(tmp_path):
    rows = rows_of(tmp_path, [{"c": ["cat", "dog"], "n": 1}, {"c": ["yes", "no"], "n": "0"}], columns={"text": None, "choices": "c", "index": "n"})
    assert [(row.answer_text, row.choices) for row in rows] == [("dog", ("cat", "dog")), ("yes", ("yes", "no"))]


@pytest.mark.parametrize("number", [2, -1, None, True, "b", 0.5])
def test_a_number_of_no_choice_drops_the_row(tmp_path, number):
    with pytest.raises(UserError, match="no answer: column n is .*, and column c has 2 choices, counted from 0"):
        rows_of(tmp_path, [{"c": ["cat", "dog"], "n": number}], columns={"text": None, "choices": "c", "index": "n"})


def test_a_number_needs_choices():
    with pytest.raises(UserError, match="data.columns.index=n: counts the texts of a column of choices"):
        Table(path="x", columns={"index": "n"})


def test_answers_that_several_people_gave_stay_several(tmp_path):
    """VQA's accuracy counts how many people gave an answer."""
    ten = ["red"] * 4 + ["dark red"] * 6
    (first,) = rows_of(tmp_path, [{"text": ten}])
    assert first.answer_text == "red" and sorted(first.references) == sorted(ten)
    (common,) = rows_of(tmp_path, [{"text": ten}], captions="common")
    assert common.answer_text == "dark red" and common.references[0] == "dark red" and sorted(common.references) == sorted(ten)
    (given,) = rows_of(tmp_path, [{"text": "dark red", "all": ten}], columns={"references": "all"})
    assert given.answer_text == "dark red" and sorted(given.references) == sorted(ten)
    (own,) = rows_of(tmp_path, [{"text": "crimson", "all": ten}], columns={"references": "all"})
    assert own.references == ("crimson", *ten)


def test_of_equally_frequent_texts_the_first_one_is_common(tmp_path):
    (row,) = rows_of(tmp_path, [{"text": ["b", "a", "a", "b", "c"]}], captions="common")
    assert row.answer_text == "b"


def test_splits_as_a_list():
    loaded = {"train": 1, "val": 2, "extra": 3}
    assert named_splits(loaded, ["train", "val"], "x") == [("train", 1), ("val", 2)]
    assert named_splits(loaded, ["extra"], "x") == [(None, 3)] and named_splits(loaded, "val", "x") == [(None, 2)]
    with pytest.raises(UserError, match="data.split=vall: x has no such split. Did you mean val"):
        named_splits(loaded, ["train", "vall"], "x")
    with pytest.raises(UserError, match="extra is not a known name"):
        named_splits(loaded, ["train", "extra"], "x")


def test_columns_are_checked_by_name():
    Columns(text="a.b").check(["image", "a"], "t")
    with pytest.raises(UserError, match="data.columns.text=b.a"):
        Columns(text="b.a").check(["image", "a"], "t")
