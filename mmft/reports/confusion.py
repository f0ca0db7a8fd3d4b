"""The confusion matrix of a run as the pages' templates take it: counts, shades, an example picture in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from ..common.records import AnswerRecord, ConfusionMatrix
from .pictures import data_uri, row_pictures

PICTURE_SIDE = 56  # pixels
MAX_PICTURES = 100


class Cell(TypedDict):
    """share: of the row's answers, 0..1. uri: picture of an example; None without one. title: of the example."""

    count: int
    share: float
    right: bool
    uri: str | None
    title: str


class ConfusionRow(TypedDict):
    label: str
    cells: list[Cell]


class ConfusionTable(TypedDict):
    """labels: of the columns (answers). rows: references."""

    labels: list[str]
    rows: list[ConfusionRow]


def confusion_table(matrix: ConfusionMatrix | None, answers: Sequence[AnswerRecord]) -> ConfusionTable | None:
    """The matrix without rows and columns that are empty; None without a matrix. answers: the rows that it was counted over."""
    if not matrix:
        return None
    by_index = {row.get("index", place): row for place, row in enumerate(answers)}
    counts, labels = matrix["counts"], matrix["labels"]
    columns = [j for j in range(len(labels)) if any(line[j] for line in counts) or any(counts[j])]
    pictures = 0
    rows: list[ConfusionRow] = []
    for i, line in enumerate(counts):
        if not any(line):
            continue
        cells: list[Cell] = []
        for j in columns:
            example = matrix["examples"][i][j]
            row = by_index.get(example) if example is not None else None
            picture = None
            if row is not None and pictures < MAX_PICTURES:
                picture = next((p for p in row_pictures({**row, "images": (row.get("images") or [])[:1]}, PICTURE_SIDE) if p is not None), None)
                pictures += picture is not None
            cells.append({"count": line[j], "share": line[j] / sum(line), "right": i == j, "uri": data_uri(picture) if picture else None,
                          "title": f"{row.get('id', example)}: {row.get('prediction') or ''}" if row is not None else ""})  # fmt: skip
        rows.append({"label": labels[i], "cells": cells})
    return {"labels": [labels[j] for j in columns], "rows": rows}
