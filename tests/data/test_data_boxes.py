"""Boxes and points of rows: every format they come in, placed in texts, in pixels of their image; what is wrong with them is named and counted."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from small import all_rows, make, report, write_json, write_jsonl

from mmft.common.errors import UserError
from mmft.data.sample import text_of
from mmft.data.sources.coco_instances import CocoInstances
from mmft.data.sources.conversations import Conversations
from mmft.data.sources.drawn_boxes import DrawnBoxes
from mmft.data.sources.messages import OpenAIMessages
from mmft.data.sources.table import Table


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (100, 60)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 40), "red").save(tmp_path / "b.png")
    return tmp_path


def table(folder, rows, **keys):
    """The prepared samples of rows of image `a.png` with the given further cells."""
    write_jsonl(folder / "t.jsonl", [{"image": "a.png", "q": "Where?", **row} for row in rows])
    keys.setdefault("columns", {"prompt": "q", "objects": "objects"})
    return make(Table(path=str(folder / "t.jsonl"), max_bad_share=1.0, **keys), folder)


CAT, DOG = {"label": "cat", "image": 0, "box": [10, 20, 30, 40]}, {"label": "dog", "image": 0, "box": [0, 0, 50, 50]}


@pytest.mark.parametrize("objects, regions", [
    ([{"label": "cat", "box": [10, 20, 30, 40]}, {"label": "dog", "box": [0, 0, 50, 50]}], [CAT, DOG]),
    ([{"category": "cat", "bbox_2d": [10, 20, 30, 40], "image": 0}], [CAT]),
    ({"bbox": [[10, 20, 30, 40], [0, 0, 50, 50]], "categories": ["cat", "dog"]}, [CAT, DOG]),
    ({"ref": ["cat", "dog"], "bbox": [[10, 20, 30, 40], [0, 0, 50, 50]]}, [CAT, DOG]),
    ({"ref": ["cat"], "bbox": [[0.1, 0.5, 0.3, 1]], "bbox_type": "norm1"}, [{"label": "cat", "image": 0, "box": [10, 30, 30, 60]}]),
    ([{"label": "nose", "point": [7, 8]}], [{"label": "nose", "image": 0, "point": [7, 8]}]),
    ('[{"label": "cat", "box": [10, 20, 30, 40]}]', [CAT]),
    ([{"label": "cat", "box": [-0.6, 20, 30, 60.4]}], [{"label": "cat", "image": 0, "box": [0, 20, 30, 60]}]),
])  # fmt: skip
def test_a_column_of_objects_becomes_the_list_that_is_answered(folder, objects, regions):
    [row] = all_rows(table(folder, [{"objects": objects}]))
    assert row.regions == regions and row.messages[-1]["content"] == [{"type": "regions", "regions": regions}]
    assert row.prompt_text == "Where?" and len(row.references) == 1


def test_other_numbers_need_their_key(folder):
    xywh = [{"label": "cat", "box": [10, 20, 20, 20]}]
    assert all_rows(table(folder, [{"objects": xywh}], boxes="xywh"))[0].regions == [CAT]
    shares = [{"label": "cat", "box": [100, 500, 300, 1000]}, {"label": "nose", "point": [500, 500]}]
    assert all_rows(table(folder, [{"objects": shares}], boxes_unit="thousandths"))[0].regions == [
        {"label": "cat", "image": 0, "box": [10, 30, 30, 60]}, {"label": "nose", "image": 0, "point": [50, 30]},
    ]  # fmt: skip
    for keys, said in (({"boxes": "xyhw"}, "data.boxes=xyhw: must be xyxy or xywh"), ({"boxes_unit": "pixel"}, "Did you mean pixels?")):
        with pytest.raises(UserError, match=said):
            Table(path="x", **keys)


def test_boxes_stand_where_the_text_has_them(folder):
    [row] = all_rows(table(folder, [{"text": "A <ref-object> at <bbox>, and <ref-object><bbox>.", "objects": {"ref": ["cat", "dog"], "bbox": [CAT["box"], DOG["box"]]}}]))
    assert [p["type"] for p in row.messages[-1]["content"]] == ["text", "ref", "text", "box", "text", "ref", "box", "text"]
    assert row.answer_text == "A cat at [10, 20, 30, 40], and dog[0, 0, 50, 50]." == row.references[0]
    [row] = all_rows(table(folder, [{"q": "What is at <bbox>?", "text": "a cat", "objects": [CAT["box"]]}]))
    assert row.regions == [] and row.answer_text == "a cat" and row.prompt_text == "What is at [10, 20, 30, 40]?"
    [row] = all_rows(table(folder, [{"text": "A <bbox> is a tag.", "objects": None}]))
    assert row.answer_text == "A <bbox> is a tag.", "of a row without objects it is text"


def test_a_phrase_and_its_box_as_refcoco_has_them(folder):
    keys = {"columns": {"objects": "bbox", "label": "answer", "text": None}, "prompt": "Where is <ref-object>?", "boxes": "xywh"}
    row = {"bbox": [10, 20, 20, 20], "answer": ["the left cat", "a grey cat"]}
    [first] = all_rows(table(folder, [row], **keys))
    assert first.prompt_text == "Where is the left cat?" and first.regions == [{**CAT, "label": "the left cat"}]
    each = all_rows(table(folder, [row], captions="all", **keys))
    assert [r.prompt_text for r in each] == ["Where is the left cat?", "Where is a grey cat?"]
    assert [r.regions[0]["box"] for r in each] == [CAT["box"]] * 2


SWIFT = {
    "messages": [{"role": "user", "content": "<image><image>Find the <ref-object>."}, {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.png", "b.png"],
    "objects": {"ref": ["sheep"], "bbox": [[90.9, 16.8, 95, 21.8], [36.9, 8, 49.5, 9]], "image_id": [0, 1]},
}  # fmt: skip


@pytest.mark.parametrize("source", [OpenAIMessages, Conversations])
def test_ms_swifts_rows(folder, source):
    key = "messages" if source is OpenAIMessages else "conversations"
    write_jsonl(folder / "t.jsonl", [{key: SWIFT["messages"], "images": SWIFT["images"], "objects": SWIFT["objects"]}])
    [row] = all_rows(make(source(path=str(folder / "t.jsonl"), boxes="xywh"), folder))  # ms-swift's are corners, whatever the key says
    assert row.regions == [{"label": "sheep", "image": 0, "box": [90.9, 16.8, 95, 21.8]}, {"label": "sheep", "image": 1, "box": [36.9, 8, 49.5, 9]}]
    assert [p["type"] for p in row.messages[0]["content"]] == ["image", "image", "text", "ref", "text"]
    point = {"messages": [{"role": "user", "content": "<image>Open it"}, {"role": "assistant", "content": "click('<bbox>')"}], "images": ["a.png"],
             "objects": {"ref": [], "bbox": [[61, 22]]}}  # fmt: skip
    write_jsonl(folder / "t.jsonl", [{**point, key: point["messages"]}])
    [row] = all_rows(make(source(path=str(folder / "t.jsonl")), folder))
    assert row.answer_text == "click('[61, 22]')" and row.regions == [{"label": "", "image": 0, "point": [61, 22]}]


BAD = {
    "box outside image": [{"label": "cat", "box": [10, 20, 130, 40]}],
    "box order": [{"label": "cat", "box": [30, 20, 10, 40]}],
    "box without label": [[10, 20, 30, 40]],
    "not a box": [{"label": "cat", "box": [10, "20", 30, 40]}],
    "box without image": [{"label": "cat", "box": [10, 20, 30, 40], "image": 1}],
    "not text": [{"label": {"name": "cat"}, "box": [10, 20, 30, 40]}],
}
MORE = {"not a box": [7, [{"label": "cat"}], [{"label": "cat", "box": [1, 2, 3]}], [{"label": "c", "box": [True, 0, 5, 5]}], {"ref": ["c"], "bbox": [[1, 2, 3, 4]], "bbox_type": "x"}]}


def test_what_is_wrong_with_a_box_is_named_and_counted(folder):
    wrong = [*BAD.values(), *MORE["not a box"]]
    prepared = table(folder, [{"objects": DOG["box"] and [DOG]}, {"objects": [CAT]}, *({"objects": o} for o in wrong)])
    assert len(all_rows(prepared)) == 2 and prepared.manifest["dropped"] == len(wrong) and prepared.manifest["boxes"] == 2
    assert prepared.manifest["reasons"] == {**dict.fromkeys(BAD, 1), "not a box": 6}
    reasons = [line["reason"] for line in report(prepared)]
    assert "box outside image: cat [10, 20, 130, 40] is not inside the image of 100 x 60 pixels" in reasons
    assert any("data.boxes=xywh reads left, top, width, height" in r for r in reasons)


@pytest.mark.parametrize("row, said", [
    ({"text": "a cat", "objects": [CAT]}, "box count: no <bbox> in the texts, 1 boxes"),
    ({"text": "<bbox> <bbox>", "objects": [CAT]}, "box count: 2 <bbox> in the texts, 1 boxes"),
    ({"text": "<ref-object><ref-object><bbox>", "objects": [CAT]}, "box count: more <ref-object> in the texts than labels"),
    ({"text": "", "objects": None}, "empty answer: column text and objects is empty"),
])
def test_places_and_boxes_must_agree(folder, row, said):
    with pytest.raises(UserError, match=said):
        table(folder, [row])


def test_numbers_that_look_like_another_unit_are_noticed(folder):
    Image.new("RGB", (2000, 1500)).save(folder / "a.png")
    rows = [{"objects": [{"label": "cat", "box": [10 * i, 500, 700, 1000 - i]}]} for i in range(5)]
    assert any("add data.boxes_unit=thousandths" in note for note in table(folder, rows).manifest["notes"])
    prepared = table(folder, rows, boxes_unit="thousandths")
    assert prepared.manifest["notes"] == [] and all_rows(prepared)[0].regions[0]["box"] == [0, 750, 1400, 1500]
    far = {"objects": [{"label": "cat", "box": [10, 500, 1700, 900]}]}
    assert table(folder, [*rows, far]).manifest["notes"] == []
    shares = [{"objects": [{"label": "cat", "box": [0.1, 0.2, 0.5, 1]}]}]
    assert any("add data.boxes_unit=unit" in note for note in table(folder, shares).manifest["notes"])
    assert all_rows(table(folder, shares, boxes_unit="unit"))[0].regions[0]["box"] == [200, 300, 1000, 1500]


def test_coco_instances(folder):
    write_json(folder / "annotations" / "instances_val2017.json", {
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "traffic light"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 20, 20], "iscrowd": 0, "segmentation": []},
            {"id": 2, "image_id": 9, "category_id": 5, "bbox": [0, 0, 80, 40], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 3, "bbox": [0, 0, 90, 50], "iscrowd": 1},
        ],
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}, {"id": 9, "file_name": "b.png"}],
    })  # fmt: skip
    prepared = make(CocoInstances(path=str(folder)), folder)
    first, second = all_rows(prepared)
    light = {"label": "traffic light", "image": 0, "box": [0, 0, 50, 50]}
    assert first.regions == [CAT, light, light] and first.prompt_text == "Find all objects."
    assert second.regions == [{**light, "box": [0, 0, 80, 40]}]
    assert "1 images without a box are left out" in prepared.manifest["notes"]
    assert len(all_rows(make(CocoInstances(path=str(folder), limit=1), folder))) == 1


def test_drawn_boxes_enclose_what_was_drawn(tmp_path):
    """The pixels that differ from the background are the independent count."""
    import numpy as np

    source = DrawnBoxes(pictures=24, lists=0.5, fewest=1, most=1, splits={"validation": 0})
    for row in all_rows(make(source, tmp_path)):
        [image], [region] = row.load_images(), row.regions
        pixels = np.asarray(image).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 60)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        left, top, right, bottom = region["box"]
        assert left <= seen[0] and top <= seen[1] and right >= seen[2] and bottom >= seen[3]
        assert (seen[2] - seen[0]) * (seen[3] - seen[1]) > 0.45 * (right - left) * (bottom - top)
        assert row.prompt_text in (f"Where is the {region['label']}?", "Find all shapes.")


def test_the_set_on_disk_keeps_everything(folder):
    prepared = table(folder, [{"objects": [CAT]}])
    kept = json.loads(json.dumps(all_rows(prepared)[0].messages))
    assert kept[-1]["content"][0]["regions"] == [CAT] and text_of(kept[-1]["content"]) == "cat [10, 20, 30, 40]"
    moved = table(folder, [{"objects": [{**CAT, "box": [11, 20, 30, 40]}]}])
    assert moved.fingerprint != prepared.fingerprint and all_rows(moved)[0].content != all_rows(prepared)[0].content
