"""Boxes from the command line: refused early where they cannot work, learned, measured, drawn, and written in the file's own pixels."""

from __future__ import annotations

import csv
import json
import re

import pytest
from PIL import Image

QUICK = ["data=drawn_boxes", "data.pictures=24", "data.splits.validation=8", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "evaluation.max_samples=4",
         "generation.max_new_tokens=8", "logger=none", "evaluation.samples=0"]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_metric_of_boxes_needs_boxes(mmft, tmp_path):
    words = [w for w in QUICK if "drawn_boxes" not in w]
    code, _, err = mmft("data=shapes", *words, "metrics=[mean_iou,token_f1]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 2 and "mean_iou can score none of the 4 rows" in err and "has no box as reference" in err and not (tmp_path / "run").exists()


def test_a_model_whose_boxes_are_unknown_is_refused_before_its_weights_and_the_named_way_works(mmft, small, tmp_path):
    folder = small("smolvlm")
    model = ["model=smolvlm", f"model.path={folder}", "evaluation.base=false", f"run_dir={tmp_path.as_posix()}/run"]
    code, _, err = mmft(*QUICK, *model)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    [way] = re.findall(r"add (model\.boxes=\w+)", err)
    assert "24 rows hold boxes" in err
    code, _, err = mmft(*QUICK, *model, way)
    assert code == 0, err
    rows = lines(tmp_path / "run" / "eval" / "tuned.jsonl")
    assert all(re.fullmatch(r"\[\d+, \d+, \d+, \d+\]", r["references"][0]) or ";" in r["references"][0] for r in rows)
    code, _, err = mmft(*QUICK, *model[:2], "model.boxes=thousandth")
    assert code == 2 and "Did you mean thousandths?" in err


def test_a_processor_that_crops_is_refused_and_the_named_way_works(mmft, small, tmp_path):
    model = ["model=llava", f"model.path={small('llava')}", "evaluation.base=false", "model.boxes=unit", f"run_dir={tmp_path.as_posix()}/run"]
    code, _, err = mmft(*QUICK, *model)
    assert code == 2 and "crops images (do_center_crop)" in err
    words = re.findall(r"'(model\.[^']+)'|(model\.\S+)", err.partition("; add ")[2])
    code, _, err = mmft(*QUICK, *model[:-1], *(a or b for a, b in words), f"run_dir={tmp_path.as_posix()}/whole")
    assert code == 0, err


@pytest.fixture(scope="module")
def page_parts():
    """A page's text -> the classes of what is drawn over its pictures."""
    return lambda text: re.findall(r'<(?:rect|path) class="(\w+)"', text)


def test_the_audit_draws_the_box_that_the_text_teaches(mmft, page_parts, tmp_path):
    code, out, err = mmft("audit", "data=drawn_boxes", "data.pictures=24", "data.splits.validation=4", "rows=2", "estimate=false", "generate=0", f"out={tmp_path.as_posix()}/a.html")
    assert code == 0, err
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page_parts(page) == ["reference", "tuned"] * 2
    boxes = [[float(n) for n in re.findall(r'(?:x|y|width|height)="([\d.]+)"', shape)] for shape in re.findall(r"<rect [^>]*>", page)]
    for row, taught in zip(boxes[::2], boxes[1::2], strict=True):
        assert max(abs(a - b) for a, b in zip(row, taught, strict=True)) <= 2 * 0.5 * 168 / 1000 + 0.01, "half a thousandth at both ends"


def test_a_run_measures_and_draws_boxes(mmft, page_parts, tmp_path):
    code, _, err = mmft(*QUICK, "data.lists=0.5", "metrics=[boxes,point_in_box]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err
    rows = lines(tmp_path / "run" / "eval" / "tuned.jsonl")
    assert [len(r["reference_boxes"]) >= 1 and "boxes" in r for r in rows] == [True] * 4
    first = rows[0]["reference_boxes"][0]
    wanted = [round(v / 168 * 1000) for v in first["box"]]
    assert str(wanted) in rows[0]["references"][0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["metrics"]) == {"mean_iou", "box_accuracy_50", "box_accuracy_75", "box_f1", "box_precision", "box_recall", "box_map", "box_map_50", "point_in_box"}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page_parts(page).count("reference") == sum(len(r["reference_boxes"]) for r in rows) and "Mean IoU" in page
    code, _, err = mmft("compare", f"run={tmp_path.as_posix()}/run", "index=[0,1]", f"out={tmp_path.as_posix()}/c.html")
    assert code == 0, err
    assert page_parts((tmp_path / "c.html").read_text(encoding="utf-8")).count("reference") == sum(len(r["reference_boxes"]) for r in rows[:2])


def test_predict_writes_boxes_in_pixels_of_the_file(mmft, tmp_path, monkeypatch):
    """The answer is given; 640 x 320 pixels: 250 thousandths are 160 and 80."""
    from mmft.collators.chat import ChatCollator

    monkeypatch.setattr(ChatCollator, "decode", lambda self, ids: ["red star [250, 250, 500, 1000]; tip [0, 500]"] * len(ids))
    Image.new("RGB", (640, 320)).save(tmp_path / "a.png")
    code, _, err = mmft("predict", f"input={tmp_path.as_posix()}/a.png", "prompt=Where?", f"out={tmp_path.as_posix()}/a.csv")
    assert code == 0, err
    [row] = csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8"))
    wanted = [{"label": "red star", "image": 0, "box": [160.0, 80.0, 320.0, 320.0]}, {"label": "tip", "image": 0, "point": [0.0, 160.0]}]
    assert json.loads(row["boxes"]) == wanted and row["prediction"].startswith("red star [250")
    code, _, err = mmft("predict", f"input={tmp_path.as_posix()}/a.png", "prompt=Where?", f"out={tmp_path.as_posix()}/a.jsonl", "model.boxes=unit")
    assert code == 0 and lines(tmp_path / "a.jsonl")[0]["boxes"][0]["box"] == [640.0, 320.0, 640.0, 320.0], "in another unit they are other boxes"
    monkeypatch.setattr(ChatCollator, "decode", lambda self, ids: ["a cat"] * len(ids))
    code, _, err = mmft("predict", f"input={tmp_path.as_posix()}/a.png", "prompt=Where?", f"out={tmp_path.as_posix()}/b.csv")
    assert code == 0 and next(csv.DictReader((tmp_path / "b.csv").open(encoding="utf-8")))["boxes"] == ""
