"""COCO: a local folder in its usual layouts, the recipes' own files, and the real photos where they are at hand."""

import csv
import json
from pathlib import Path

import pytest
from small import all_rows, make, pictures, report, write_json

from mmft.common.errors import UserError
from mmft.data.sources.coco import CocoCaptions
from mmft.data.sources.conversations import Conversations

REAL = Path(__file__).parents[3] / "shared" / "data" / "coco"


def coco_folder(folder, images="train2014", annotations="annotations/captions_train2014.json", n=6):
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(n)]
    pictures(folder / images, *names)
    write_json(folder / annotations, {
        "info": {"note": "not \"images\": [ this one"},
        "annotations": [{"image_id": i % n, "id": i, "caption": f"caption {i // n} of {i % n} "} for i in range(3 * n)],
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
    })
    return folder


@pytest.mark.parametrize(("images", "annotations"), [
    ("train2014", "annotations/captions_train2014.json"), ("images", "captions_val2017.json"), ("images/val2017", "a/b/captions_val2017.json"), (".", "captions_x.json"),
])
def test_layouts(tmp_path, images, annotations):
    folder = coco_folder(tmp_path / "coco", images, annotations)
    prepared = make(CocoCaptions(path=str(folder), splits={"validation": 2, "by": "last"}), tmp_path)
    assert prepared.splits == {"train": 4, "validation": 2}
    sample = prepared.split("validation")[1]
    assert sample.id == "5" and sample.prompt_text == "COCO Yes:" and sample.answer_text == "caption 0 of 5"
    assert sample.references == ("caption 0 of 5", "caption 1 of 5", "caption 2 of 5")
    assert sample.messages[0]["content"][0] == {"type": "image"}


def test_limit_counts_images_and_all_gives_a_row_a_caption(tmp_path):
    folder = coco_folder(tmp_path / "coco")
    prepared = make(CocoCaptions(path=str(folder), captions="all", limit=4, splits={"validation": 3, "by": "last"}), tmp_path)
    assert prepared.splits == {"train": 9, "validation": 3}  # the three captions of image 3
    rows = list(prepared.split("validation"))
    assert [r.id for r in rows] == ["3-1", "3-2", "3-3"]
    assert rows[1].references == ("caption 1 of 3", "caption 0 of 3", "caption 2 of 3")  # the trained one first


def test_the_recipes_files_are_written_and_can_be_read_again(tmp_path):
    folder = coco_folder(tmp_path / "coco")
    prepared = make(CocoCaptions(path=str(folder), splits={"validation": 1, "by": "last"}), tmp_path)
    with (prepared.path / "coco-2024-dataset.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 and table[0]["caption"] == "caption 0 of 0" and Path(table[0]["image_path"]).is_file()
    chat = json.loads((prepared.path / "data_vl.json").read_text(encoding="utf-8"))
    path = (folder / "train2014/COCO_train2014_000000000001.jpg").as_posix()
    assert chat[1] == {"id": "identity_2", "conversations": [
        {"from": "user", "value": f"COCO Yes: <|vision_start|>{path}<|vision_end|>"}, {"from": "assistant", "value": "caption 0 of 1"}]}
    again = make(Conversations(name="again", path=str(prepared.path / "data_vl.json"), root=str(folder), image_position="first"), tmp_path)
    assert [s.messages for s in all_rows(again)] == [s.messages for s in all_rows(prepared)]


def test_an_image_that_is_missing_or_has_no_caption(tmp_path):
    folder = coco_folder(tmp_path / "coco")
    (folder / "train2014/COCO_train2014_000000000000.jpg").unlink()
    file = folder / "annotations/captions_train2014.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
    write_json(file, content)
    prepared = make(CocoCaptions(path=str(folder), max_bad_share=0.5), tmp_path)
    reasons = {r["where"]: r["reason"].split(":")[0] for r in report(prepared)}
    assert reasons == {"captions_train2014.json[1]": "missing image", "captions_train2014.json[2]": "empty answer"}


@pytest.mark.parametrize(("keys", "message"), [
    ({"path": "{tmp}/coc"}, "Did you mean coco"), ({"path": "{tmp}/coco/train2014"}, "holds no captions_"),
    ({"annotations": "captions.json"}, "data.annotations="), ({"images": "train2015"}, "data.images=.*Did you mean train2014"),
    ({"captions": "some"}, "data.captions=some"), ({"hub": "other"}, "data.hub=other"),
])
def test_refused(tmp_path, keys, message):
    coco_folder(tmp_path / "coco")
    keys = {k: v.replace("{tmp}", str(tmp_path)) for k, v in {"path": "{tmp}/coco", **keys}.items()}
    with pytest.raises(UserError, match=message):
        make(CocoCaptions(**keys), tmp_path)


@pytest.mark.parametrize("text", ['{"images": [], "annotations": [{"image_id": 1,', '{"images": []}', "[]"])
def test_broken_annotations(tmp_path, text):
    folder = pictures(tmp_path / "coco", "images/a.jpg")
    (folder / "captions_x.json").write_text(text)
    with pytest.raises(UserError, match="captions_x.json: "):
        make(CocoCaptions(path=str(folder)), tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the 118 real photos (shared/data/coco beside the checkout) are not here")
def test_real_photos_and_human_captions(tmp_path):
    prepared = make(CocoCaptions(path=str(REAL), splits={"validation": 4, "by": "last"}), tmp_path)
    assert prepared.splits == {"train": 114, "validation": 4} and prepared.manifest["dropped"] == 0
    bear = next(s for s in prepared.split("train") if s.id == "285")
    assert bear.answer_text == "A big burly grizzly bear is show with grass in the background." and len(bear.references) == 5
    assert bear.load_images()[0].size == (410, 448)
    shown = {n: {i for s in prepared.split(n) for i in s.sha256} for n in prepared.splits}
    assert not shown["train"] & shown["validation"]
