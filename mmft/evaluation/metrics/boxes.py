"""Metrics of boxes and points, in pixels of the image files: IoU, accuracy at an IoU, matched F1, pointing, mean average precision.

Boxes of answer and reference are assigned one to one so that the sum of their IoU is largest (Hungarian method, scipy).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues, Region
from .base import Metric, Score
from .words import normalise

if TYPE_CHECKING:
    import numpy as np


class MeanIoU(Metric):
    """The IoU of each reference box with the answer's box assigned to it, 0 without one; the mean over the boxes of a row, then over rows."""

    SCORES = (Score("mean_iou", "Mean IoU"),)
    LIBRARIES = ("scipy",)

    def problem(self, row: AnswerRecord) -> str | None:
        return no_box(row)

    def row(self, row: AnswerRecord) -> MetricValues:
        found = assigned(row)
        return {"mean_iou": sum(found) / len(found)}


class BoxAccuracy(Metric):
    """The share of reference boxes whose assigned box has at least this IoU, for each of `thresholds`; the mean over rows."""

    LIBRARIES = ("scipy",)

    def __init__(self, thresholds: Sequence[float] = (0.5, 0.75)) -> None:
        if not thresholds or not all(0 < t <= 1 for t in thresholds):
            raise UserError(f"metrics.box_accuracy.thresholds={list(thresholds)}: each must lie above 0 and at most at 1")
        self.thresholds = tuple(thresholds)

    @property
    def scores(self) -> tuple[Score, ...]:
        return tuple(Score(_name(t), f"Boxes with IoU of {t:g} or more") for t in self.thresholds)

    def problem(self, row: AnswerRecord) -> str | None:
        return no_box(row)

    def row(self, row: AnswerRecord) -> MetricValues:
        found = assigned(row)
        return {_name(t): sum(iou >= t for iou in found) / len(found) for t in self.thresholds}


class BoxF1(Metric):
    """Precision, recall and F1 of boxes: a pair counts if its IoU is at least `iou` and, with `labels`, both have the same normalised label.

    Of the corpus: over all boxes of all rows together.
    """

    SCORES = (Score("box_f1", "Boxes, F1"), Score("box_precision", "Boxes, precision"), Score("box_recall", "Boxes, recall"))
    LIBRARIES = ("scipy",)

    def __init__(self, iou: float = 0.5, labels: bool = True) -> None:
        if not 0 < iou <= 1:
            raise UserError(f"metrics.box_f1.iou={iou:g}: must lie above 0 and at most at 1")
        self.iou, self.labels = iou, labels

    def problem(self, row: AnswerRecord) -> str | None:
        return no_box(row)

    def row(self, row: AnswerRecord) -> MetricValues:
        return _rates(*self._counts(row))

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        hits, given, wanted = (sum(counts) for counts in zip(*map(self._counts, rows), strict=True))
        return _rates(hits, given, wanted)

    def _counts(self, row: AnswerRecord) -> tuple[int, int, int]:
        """(pairs that count, boxes of the answer, boxes of the reference)"""
        import numpy as np

        given, wanted = _boxes(row.get("boxes")), _boxes(row["reference_boxes"])
        table = iou_table(given, wanted)
        allowed = table >= self.iou
        if self.labels:
            allowed &= np.array([[normalise(a["label"]) == normalise(b["label"]) for b in wanted] for a in given], bool).reshape(table.shape)
        # a pair that counts weighs more than all IoU together, so that the number of pairs is the largest possible
        hits = sum(bool(allowed[i, j]) for i, j in _assign(allowed * (1 + len(wanted)) + table))
        return hits, len(given), len(wanted)


class PointInBox(Metric):
    """The share of reference boxes that hold a point of the answer, each point counted once; of a box in the answer, its centre is taken."""

    SCORES = (Score("point_in_box", "Point in box"),)
    LIBRARIES = ("scipy",)

    def problem(self, row: AnswerRecord) -> str | None:
        return no_box(row)

    def row(self, row: AnswerRecord) -> MetricValues:
        import numpy as np

        wanted, given = _boxes(row["reference_boxes"]), row.get("boxes") or []
        table = np.array([[_holds(box, point) for box in wanted] for point in given], float).reshape(len(given), len(wanted))
        return {"point_in_box": sum(table[i, j] for i, j in _assign(table)) / len(wanted)}


class BoxMap(Metric):
    """COCO's mean average precision (pycocotools) over IoU 0.50 to 0.95, and at 0.5; classes are the normalised labels.

    Generated boxes have no scores: those of an answer are ranked in the order in which they are written.
    """

    SCORES = (Score("box_map", "mAP, IoU 0.50 to 0.95"), Score("box_map_50", "mAP at IoU 0.5"))
    LIBRARIES = ("pycocotools",)

    def problem(self, row: AnswerRecord) -> str | None:
        return no_box(row)

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        names = sorted({normalise(r["label"]) for row in rows for r in _boxes(row["reference_boxes"])})
        number = {name: i for i, name in enumerate(names, 1)}
        images: list[dict[str, Any]] = []
        wanted: list[dict[str, Any]] = []
        given: list[dict[str, Any]] = []
        for row in rows:
            for image in range(max(len(row.get("images", ())), 1)):
                images.append({"id": len(images) + 1})
                for region in _boxes(row["reference_boxes"]):
                    if region["image"] == image:
                        wanted.append({"id": len(wanted) + 1, "iscrowd": 0, **_coco(region, images[-1]["id"], number)})
                for place, region in enumerate(_boxes(row.get("boxes"))):
                    if region["image"] == image and normalise(region["label"]) in number:
                        given.append({"score": 1 / (1 + place), **_coco(region, images[-1]["id"], number)})
        if not given:
            return {"box_map": 0.0, "box_map_50": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            truth = COCO()
            truth.dataset = {"images": images, "annotations": wanted, "categories": [{"id": i, "name": n} for n, i in number.items()], "info": {}}
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(given), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {"box_map": float(evaluation.stats[0]), "box_map_50": float(evaluation.stats[1])}


def no_box(row: AnswerRecord) -> str | None:
    """What these metrics cannot score: a row without a reference box."""
    return None if any("box" in region for region in row.get("reference_boxes") or ()) else "has no box as reference"


def iou_table(given: Sequence[Region], wanted: Sequence[Region]) -> np.ndarray[Any, Any]:
    """(boxes given, boxes wanted) IoU of each pair; 0 for boxes in different images and for boxes without an area."""
    import numpy as np

    a = np.array([r["box"] for r in given], float).reshape(-1, 1, 4)
    b = np.array([r["box"] for r in wanted], float).reshape(1, -1, 4)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    common = sides[..., 0] * sides[..., 1]
    areas = [np.clip(x[..., 2] - x[..., 0], 0, None) * np.clip(x[..., 3] - x[..., 1], 0, None) for x in (a, b)]
    table = common / np.maximum(areas[0] + areas[1] - common, 1e-9)
    same = np.array([[x["image"] == y["image"] for y in wanted] for x in given], bool).reshape(table.shape)
    return np.where(same, table, 0.0)


def assigned(row: AnswerRecord) -> list[float]:
    """For each reference box the IoU with the answer's box that is assigned to it; 0 without one."""
    given, wanted = _boxes(row.get("boxes")), _boxes(row["reference_boxes"])
    table = iou_table(given, wanted)
    found = [0.0] * len(wanted)
    for i, j in _assign(table):
        found[j] = float(table[i, j])
    return found


def _assign(table: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """The one-to-one pairs (row, column) with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    return list(zip(rows.tolist(), columns.tolist()))


def _boxes(regions: Sequence[Region] | None) -> list[Region]:
    return [region for region in regions or () if "box" in region]


def _name(threshold: float) -> str:
    return f"box_accuracy_{threshold * 100:g}".replace(".", "_")


def _rates(hits: int, given: int, wanted: int) -> MetricValues:
    return {"box_f1": 2 * hits / (given + wanted), "box_precision": hits / given if given else 0.0, "box_recall": hits / wanted}


def _holds(box: Region, region: Region) -> bool:
    left, top, right, bottom = box["box"]
    x, y = region["point"] if "point" in region else ((region["box"][0] + region["box"][2]) / 2, (region["box"][1] + region["box"][3]) / 2)
    return region["image"] == box["image"] and left <= x <= right and top <= y <= bottom


def _coco(region: Region, image: int, number: dict[str, int]) -> dict[str, Any]:
    left, top, right, bottom = region["box"]
    width, height = max(right - left, 0.0), max(bottom - top, 0.0)
    return {"image_id": image, "category_id": number[normalise(region["label"])], "bbox": [left, top, width, height], "area": width * height}
