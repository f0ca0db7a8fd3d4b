"""Several captions of an image: which are trained, which are references, for every source that reads columns."""

import json

import pytest
from small import all_rows, make, pictures, png, write_csv, write_json, write_jsonl

from mmft.common.errors import UserError
from mmft.data.sources.coco import CocoCaptions
from mmft.data.sources.imagefolder import ImageFolder
from mmft.data.sources.saved import SavedDataset
from mmft.data.sources.table import Table

LAST = {"validation": 1, "by": "last"}


def rows(prepared, split):
    return [(s.answer_text, s.references) for s in prepared.split(split)]


@pytest.fixture
def flickr(tmp_path):
    """A row for every caption: three of a.png, two of b.png, one of c.png, the rows of an image apart from each other."""
    pictures(tmp_path, "a.png", "b.png", "c.png")
    write_csv(tmp_path / "captions.txt", ["image", "caption"], ["a.png", "a1"], ["c.png", "c1"], ["b.png", "b1"], ["a.png", "a2"], ["b.png", "b2"], ["a.png", "a3"])
    return {"path": str(tmp_path / "captions.txt"), "columns": {"text": "caption"}}


def test_rows_of_an_image_are_grouped(flickr, tmp_path):
    prepared = make(Table(**flickr, captions="group", splits=LAST), tmp_path)
    assert rows(prepared, "train") == [("a1", ("a1", "a2", "a3")), ("c1", ("c1",))] and rows(prepared, "validation") == [("b1", ("b1", "b2"))]
    assert prepared.manifest["rows_read"] == 6 and prepared.manifest["merged"] == 3 and prepared.manifest["dropped"] == 0
    assert "6 rows became 3, one for each of their images and prompts (data.captions=group)" in prepared.manifest["notes"]


def test_without_grouping_a_held_out_row_has_all_captions_of_its_image(flickr, tmp_path):
    prepared = make(Table(**flickr, splits={"validation": 3, "by": "last"}), tmp_path)
    assert rows(prepared, "validation") == [("a1", ("a1", "a2", "a3")), ("a2", ("a2", "a1", "a3")), ("a3", ("a3", "a1", "a2"))]
    assert rows(prepared, "train") == [("c1", ("c1",)), ("b1", ("b1",)), ("b2", ("b2",))]
    assert any(n.startswith("3 held-out rows have the answers of other rows") for n in prepared.manifest["notes"])


def test_another_question_about_an_image_is_another_row(tmp_path):
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "q", "text"], ["a.png", "color?", "red"], ["a.png", "shape?", "star"], ["a.png", "color?", "crimson"])
    prepared = make(Table(path=str(tmp_path / "t.csv"), columns={"prompt": "q"}, captions="group"), tmp_path)
    assert rows(prepared, "train") == [("red", ("red", "crimson")), ("star", ("star",))]


def test_the_same_image_under_two_names_is_one(tmp_path):
    for name in ("a.png", "copy.png"):
        (tmp_path / name).write_bytes(png(1))
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "x"], ["copy.png", "y"])
    assert rows(make(Table(path=str(tmp_path / "t.csv"), captions="group"), tmp_path), "train") == [("x", ("x", "y"))]


def test_grouping_keeps_splits_that_the_rows_name(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "t.csv", ["image", "text", "part"], ["a.png", "x", "train"], ["b.png", "y", "test"], ["a.png", "z", "train"], ["b.png", "w", "test"])
    prepared = make(Table(path=str(tmp_path / "t.csv"), columns={"split": "part"}, captions="group"), tmp_path)
    assert rows(prepared, "train") == [("x", ("x", "z"))] and rows(prepared, "test") == [("y", ("y", "w"))]


def test_at_most_a_hundred_references_come_from_other_rows(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], *([("b.png", "a.png")[i > 0], f"text {i}"] for i in range(131)))
    prepared = make(Table(path=str(tmp_path / "t.csv"), splits={"validation": 130, "by": "last"}), tmp_path)
    assert {len(r) for _, r in rows(prepared, "validation")} == {100} and all(a == r[0] for a, r in rows(prepared, "validation"))


def test_all_captions_of_a_list(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "text": ["one", "two"], "k": 7}, {"image": "b.png", "text": "three", "k": 8}])
    prepared = make(Table(path=str(tmp_path / "t.jsonl"), columns={"id": "k"}, captions="all"), tmp_path)
    assert [(s.id, s.answer_text, s.references) for s in all_rows(prepared)] == [
        ("7-1", "one", ("one", "two")), ("7-2", "two", ("two", "one")), ("8", "three", ("three",))]


@pytest.mark.parametrize("captions, expected", [("first", ["A"]), ("all", ["A", "B"]), ("group", ["A"])])
def test_every_captioned_source(tmp_path, captions, expected):
    from datasets import Dataset

    pictures(tmp_path / "f", "a.png")
    write_jsonl(tmp_path / "f/metadata.jsonl", [{"file_name": "a.png", "text": ["A", "B"]}])
    Dataset.from_list([{"image": {"bytes": png(1), "path": None}, "text": ["A", "B"]}]).save_to_disk(str(tmp_path / "saved"))
    write_json(tmp_path / "f/captions_x.json", {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": c} for c in "AB"]})
    for name, source in (("f", ImageFolder), ("saved", SavedDataset), ("f", CocoCaptions)):
        prepared = make(source(name=source.__name__, path=str(tmp_path / name), captions=captions), tmp_path)
        assert [s.answer_text for s in all_rows(prepared)] == expected and all(sorted(s.references) == ["A", "B"] for s in all_rows(prepared))


def test_a_wrong_word_is_one_line(mmft, tmp_path):
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a", "b"])
    code, _, err = mmft("prepare", "data=table", f"data.path={tmp_path / 't.csv'}", "data.captions=grouped")
    assert code == 2 and "data.captions=grouped: must be first, common, all, group. Did you mean group?" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="data.captions=none"):
        CocoCaptions(path="x", captions="none")


LONG = "lengthy " * 60  # 480 characters


@pytest.mark.parametrize("name, content", [
    ("image.csv", f"image,text\n{LONG}.png,x\na.png,y\n"),
    ("image64.csv", f"image,text\n{'QUJD' * 200},x\na.png,y\n"),
    ("url.csv", f"image,text\nhttps://host.example/{'x' * 900}.png,x\na.png,y\n"),
    ("id.jsonl", "\n".join(json.dumps({"image": i, "text": "x", "id": LONG}) for i in ("gone.png", "a.png"))),
    ("split.jsonl", "\n".join(json.dumps({"image": "a.png", "text": "x", "split": s}) for s in (LONG, "train"))),
    ("list.csv", f"image,text\na.png,\"['{LONG}', 'it's']\"\na.png,y\n"),
    ("broken.csv", "image,text\na.png,y\n" + f"a.png,y,{LONG}\n"),
    ("long-name.csv", f"image,text\n{'x' * 5000}.png,x\na.png,y\n"),
])  # fmt: skip
def test_no_message_or_report_repeats_a_long_cell(mmft, tmp_path, name, content):
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    columns = [f"data.columns.{key}={key}" for key in ("id", "split") if key in name]
    words = ["prepare", "data=table", f"data.path={tmp_path / name}", "data.splits.validation=0", *columns]
    code, _, refusal = mmft(*words, "data.max_bad_share=0.1")
    assert code == 2 and refusal.count("\n") == 1 and "1 of 2 rows cannot be used" in refusal
    left = "".join(p.read_text() for p in (tmp_path / "outputs").rglob("*.jsonl"))
    code, out, err = mmft(*words, "data.max_bad_share=0.5")
    assert code == 0 and "1 rows dropped" in out, err
    reports = "".join(p.read_text() for p in (tmp_path / "outputs").rglob("*.jsonl"))
    for text in (refusal, left, out, err, reports):
        assert LONG[:200] not in text and "QUJD" * 50 not in text and "x" * 200 not in text


def test_column_names_are_shortened_too(mmft, tmp_path):
    (tmp_path / "t.csv").write_text(",".join([LONG] + [f"c{i}" for i in range(50)]) + "\n" + ",".join("x" * 51) + "\n")
    code, _, err = mmft("prepare", "data=table", f"data.path={tmp_path / 't.csv'}")
    assert code == 2 and "data.columns.image=image" in err and LONG[:200] not in err and "and 31 more" in err
