"""Metrics of boxes against hand counts, all permutations of small sets, and pycocotools used directly."""

from __future__ import annotations

import contextlib
import io
import itertools
import random

import pytest

from mmft.common.errors import UserError
from mmft.evaluation.metrics.base import MetricSet
from mmft.evaluation.metrics.boxes import BoxAccuracy, BoxF1, BoxMap, MeanIoU, PointInBox, iou_table


def box(*numbers, label="cat", image=0):
    return {"label": label, "image": image, "box" if len(numbers) == 4 else "point": list(map(float, numbers))}


def answer(wanted, given, index=0):
    return {"index": index, "id": str(index), "images": ["a.png"], "references": ["-"], "prediction": "-", "reference_boxes": wanted, "boxes": given}


def scored(metric, *rows):
    metrics = MetricSet({"m": metric})
    rows = [{**row, "metrics": metrics.row(row)} for row in rows]
    return metrics.corpus(rows), [row["metrics"] for row in rows]


def test_iou_by_hand():
    # 10 x 10 boxes: shifted by 5 in x they share 50 of 150, shifted by 5 in both 25 of 175
    wanted = [box(0, 0, 10, 10)]
    given = [box(0, 0, 10, 10), box(5, 0, 15, 10), box(5, 5, 15, 15), box(10, 0, 20, 10), box(9, 9, 1, 1), box(0, 0, 10, 10, image=1)]
    assert iou_table(given, wanted)[:, 0].tolist() == pytest.approx([1, 1 / 3, 1 / 7, 0, 0, 0])


def test_iou_agrees_with_pycocotools():
    from pycocotools import mask

    rng = random.Random(3)
    draw = lambda: [rng.uniform(0, 50), rng.uniform(0, 50), rng.uniform(1, 60), rng.uniform(1, 60)]  # noqa: E731
    a, b = [draw() for _ in range(30)], [draw() for _ in range(20)]
    corners = lambda x: [box(l, t, l + w, t + h) for l, t, w, h in x]  # noqa: E731, E741
    assert iou_table(corners(a), corners(b)) == pytest.approx(mask.iou(a, b, [0] * 20))


def test_single_boxes_score_their_iou():
    rows = [answer([box(0, 0, 10, 10)], [box(0, 0, 10, 6)]), answer([box(0, 0, 10, 10)], []), answer([box(0, 0, 10, 10)], [box(0, 0, 10, 8)])]
    corpus, each = scored(MeanIoU(), *rows)
    assert [v["mean_iou"] for v in each] == pytest.approx([0.6, 0, 0.8]) and corpus["mean_iou"] == pytest.approx(1.4 / 3)
    corpus, each = scored(BoxAccuracy(), *rows)
    assert each == [{"box_accuracy_50": 1, "box_accuracy_75": 0}, {"box_accuracy_50": 0, "box_accuracy_75": 0}, {"box_accuracy_50": 1, "box_accuracy_75": 1}]
    assert corpus == pytest.approx({"box_accuracy_50": 2 / 3, "box_accuracy_75": 1 / 3})
    assert [s.name for s in BoxAccuracy([0.5, 0.925]).scores] == ["box_accuracy_50", "box_accuracy_92_5"]


def test_assignment_is_the_best_of_all_permutations():
    """A greedy assignment would give the first answer to the first reference and leave less for the second."""
    wanted = [box(0, 0, 10, 10), box(4, 0, 14, 10)]
    given = [box(3, 0, 13, 10), box(0, 0, 1, 1), box(-4, 0, 6, 10)]
    table = iou_table(given, wanted)
    best = max(sum(table[i, j] for j, i in enumerate(order)) for order in itertools.permutations(range(3), 2)) / 2
    assert scored(MeanIoU(), answer(wanted, given))[0]["mean_iou"] == pytest.approx(best)


def test_matched_f1_counts_pairs_with_the_same_label():
    wanted = [box(0, 0, 10, 10), box(20, 0, 30, 10, label="A dog")]
    given = [box(0, 0, 10, 9), box(20, 0, 30, 10, label="dog."), box(20, 0, 30, 10, label="cow"), box(50, 50, 60, 60)]
    corpus, [row] = scored(BoxF1(), answer(wanted, given))
    assert row == pytest.approx({"box_precision": 2 / 4, "box_recall": 2 / 2, "box_f1": 4 / 6}) == corpus, "normalised: articles and points do not count"
    wrong = answer([box(0, 0, 10, 10)], [box(0, 0, 10, 10, label="dog")], 1)
    assert scored(BoxF1(), wrong)[1][0]["box_f1"] == 0 and scored(BoxF1(labels=False), wrong)[1][0]["box_f1"] == 1
    # over all boxes together: 2 of 5 boxes given, 2 of 3 wanted
    assert scored(BoxF1(), answer(wanted, given), wrong)[0] == pytest.approx({"box_precision": 2 / 5, "box_recall": 2 / 3, "box_f1": 4 / 8})
    assert scored(BoxF1(), answer(wanted, []))[0] == {"box_precision": 0, "box_recall": 0, "box_f1": 0}


def test_points():
    wanted = [box(0, 0, 10, 10), box(20, 0, 30, 10)]
    assert scored(PointInBox(), answer(wanted, [box(5, 5), box(6, 6)]))[0] == {"point_in_box": 0.5}, "two points in one box find one box"
    assert scored(PointInBox(), answer(wanted, [box(25, 5), box(0, 0, 4, 4)]))[0] == {"point_in_box": 1.0}, "the centre of a box"
    assert scored(PointInBox(), answer(wanted, [box(25, 11)]))[0] == {"point_in_box": 0.0}
    assert scored(PointInBox(), answer(wanted, []))[0] == {"point_in_box": 0.0}


def test_map_is_that_of_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = random.Random(7)
    rows, truth, found = [], [], []
    for image in range(12):
        wanted, given = [], []
        for place in range(rng.randint(1, 4)):
            left, top, label = rng.randint(0, 60), rng.randint(0, 60), rng.choice(["cat", "dog"])
            wanted.append(box(left, top, left + 30, top + 20, label=label))
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": 1 + (label == "dog"), "bbox": [left, top, 30, 20], "area": 600, "iscrowd": 0})
            left, top = left + rng.randint(-6, 6), top + rng.randint(-4, 4)
            given.append(box(left, top, left + 30, top + 20, label=label))
            found.append({"image_id": image, "category_id": 1 + (label == "dog"), "bbox": [left, top, 30, 20], "score": 1 / (1 + place)})
        rows.append(answer(wanted, given, image))
    rows[0]["boxes"].append(box(0, 0, 5, 5, label="a word that is no class"))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(12)], "annotations": truth, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], "info": {}}
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    corpus, each = scored(BoxMap(), *rows)
    assert 0.1 < judge.stats[0] < 0.9 and corpus == pytest.approx({"box_map": judge.stats[0], "box_map_50": judge.stats[1]}) and each[0] == {}
    assert scored(BoxMap(), answer([box(0, 0, 10, 10)], []))[0] == {"box_map": 0, "box_map_50": 0}
    assert scored(BoxMap(), answer([box(0, 0, 10, 10)], [box(0, 0, 10, 10)]))[0] == pytest.approx({"box_map": 1, "box_map_50": 1})


def test_keys_are_checked():
    for make in (lambda: BoxAccuracy([]), lambda: BoxAccuracy([0.5, 50]), lambda: BoxF1(iou=0)):
        with pytest.raises(UserError, match="above 0"):
            make()
