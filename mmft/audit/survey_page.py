"""Show a survey: as one page that opens offline, and as tables for one screen of the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from ..reports import numbers
from ..reports.html import render, write_text
from .findings import LONG
from .page import percentile_name
from .survey import SHARES, Part, Survey, shares

if TYPE_CHECKING:
    from rich.table import Table

    from ..data.sample import Sample
    from ..reports.pictures import ShownPictures

SIDE = 220  # pixels of a picture on the page
SHOWN = 30  # findings of each kind shown on the page
SHORT = 160  # characters of a text on the page
SIZE_STEPS = (112, 224, 336, 448, 672, 1024, 1536, 2048)  # of the longer side
ASPECT_STEPS = ((1 / 3, "taller than 1:3"), (1 / 2, "1:3 to 1:2"), (3 / 4, "1:2 to 3:4"), (4 / 3, "3:4 to 4:3"), (2, "4:3 to 2:1"), (3, "2:1 to 3:1"))


class Bar(TypedDict):
    """One bar of a diagram. share: of all, 0 to 1. width: of the longest bar, in percent."""

    name: str
    count: int
    share: str
    width: float


class ShownRow(TypedDict):
    """A row of the data set on the page."""

    id: str
    pictures: ShownPictures
    prompt: str
    answer: str


def bars(counts: Iterable[tuple[str, int]], whole: int | None = None) -> list[Bar]:
    """Diagram bars in the given order. whole: what the shares are of; null: the sum."""
    listed = list(counts)
    whole = sum(n for _, n in listed) if whole is None else whole
    longest = max((n for _, n in listed), default=0) or 1
    return [{"name": name, "count": n, "share": numbers.percent(n, whole), "width": round(100 * n / longest, 1)} for name, n in listed]


def size_bars(sizes: np.ndarray) -> list[Bar]:
    """Images by their longer side. sizes: (images, 2)."""
    longer = sizes.max(axis=1) if len(sizes) else np.zeros(0)
    found = np.bincount(np.searchsorted(SIZE_STEPS, longer), minlength=len(SIZE_STEPS) + 1).tolist()
    names = [f"up to {SIZE_STEPS[0]}", *(f"{a + 1} to {b}" for a, b in zip(SIZE_STEPS, SIZE_STEPS[1:])), f"above {SIZE_STEPS[-1]}"]
    return bars([(name, n) for name, n in zip(names, found) if n])


def aspect_bars(aspects: np.ndarray) -> list[Bar]:
    """Images by width : height."""
    found = np.bincount(np.searchsorted([step for step, _ in ASPECT_STEPS], aspects), minlength=len(ASPECT_STEPS) + 1).tolist()
    return bars([(name, n) for name, n in zip([name for _, name in ASPECT_STEPS] + ["wider than 3:1"], found) if n])


def short(text: str, longest: int = SHORT) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest].rstrip()}…"


def write_page(path: Path, found: Survey, overrides: Sequence[str], pictures: int) -> None:
    """Write the page of a survey. pictures: of each source and split."""
    from ..data.selection import spread

    parts = [{
        "name": part.name, "rows": len(part.rows), "images": len(part.sizes), "without": part.without_image, "several": part.several_images, "boxes": part.with_boxes,
        "sizes": size_bars(part.sizes), "aspects": aspect_bars(part.aspects), "answers": bars(((short(a) or "(empty)", n) for a, n in part.answers), len(part.rows)),
        "distinct": part.distinct, "languages": bars(part.languages.most_common(12), sum(part.languages.values())),
        "looked_at": sum(part.languages.values()), "shown": [shown_row(row) for row in spread(part.rows, pictures)],
    } for part in found.parts]  # fmt: skip
    measured = [(part.name, [(what, [_figure(v) for v in part.percentiles(values)]) for what, values in _measures(part)]) for part in found.parts]
    text = render(
        "explore.html.j2", date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"), name=found.name, overrides=" ".join(overrides), survey=found, parts=parts,
        measured=measured, shares=[percentile_name(s) for s in SHARES], long=LONG, shown=SHOWN, count=numbers.count, percent=numbers.percent, short=short,
        repeats=[{"held": shown_row(r.held_out), "split": r.split, "training": shown_row(r.training)} for r in found.repeats[:SHOWN]],
        alike=[{"bits": pair.bits, "images": [(where, shown_image(root, image)) for root, image, where in pair.images]} for pair in found.alike[:SHOWN]],
        contradictions=[[(split, shown_row(row)) for split, row in c.rows[:6]] for c in found.contradictions[:SHOWN]],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _measures(part: Part) -> list[tuple[str, np.ndarray]]:
    sizes = part.sizes
    images = [("image width", sizes[:, 0]), ("image height", sizes[:, 1]), ("width : height", part.aspects)] if len(sizes) else []
    return [*images, ("answer, characters", part.characters), ("answer, words", part.words)]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def shown_image(root: str, image: str) -> ShownRow:
    """An image alone; its path stands in place of the row's id."""
    from ..reports.pictures import shown_pictures

    return {"id": image, "pictures": shown_pictures({"root": root, "images": [image]}, SIDE, 1), "prompt": "", "answer": ""}


def shown_row(row: Sample) -> ShownRow:
    from ..common.records import AnswerRecord
    from ..reports.pictures import boxes_of, shown_pictures

    record: AnswerRecord = {"root": row.root, "images": list(row.images)}
    boxes: AnswerRecord = {"boxes": row.regions}
    return {"id": row.id, "pictures": shown_pictures(record, SIDE, 2, [boxes_of("tuned", "boxes of the row", boxes)]), "prompt": short(row.prompt_text),
            "answer": short(row.answer_text) or "(empty)"}  # fmt: skip


# -- the terminal --


def summary_tables(found: Survey) -> list[Table]:
    """The survey in at most two tables: a line for each source and split, then what stands out."""
    from rich.text import Text

    from ..reports.terminal import new_table, pairs_table

    table = new_table(f"{found.name}: {found.rows_read:,} rows read", ("", "rows", "images", "half at most", "words", "answers"))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for part in found.parts:
        words = part.percentiles(part.words)
        table.add_row(Text(part.name), numbers.count(len(part.rows)), numbers.count(len(part.sizes)), _typical(part.sizes),
                      f"{words[1]}, {words[3]}" if words else "", numbers.count(part.distinct))  # fmt: skip
    table.caption = Text("half at most: width and height; words: half of the answers have at most so many, 99 % at most so many; answers: different ones")
    return [table, pairs_table("What stands out", findings(found))]


def _typical(sizes: np.ndarray) -> str:
    return "" if not len(sizes) else "x".join(str(int(v)) for v in np.percentile(sizes, 50, axis=0, method="inverted_cdf"))


def findings(found: Survey) -> dict[str, str]:
    """What stands out in a data set, in words."""
    sizes = np.concatenate([part.sizes for part in found.parts] or [np.zeros((0, 2), np.int32)])
    languages = shares((name, n) for part in found.parts for name, n in part.languages.items())
    merged: dict[str, float] = {}
    for name, _, share in languages:
        merged[name] = merged.get(name, 0) + share
    answers: dict[str, int] = {}
    for part in found.parts:
        for text, n in part.answers:
            answers[text] = answers.get(text, 0) + n
    frequent = sorted(answers.items(), key=lambda item: -item[1])[:3]
    once = not frequent or frequent[0][1] == 1
    lines = {"frequent answers": "every answer is there once" if once else "; ".join(f"{numbers.percent(n, found.rows)} {short(text, 50) or '(empty)'}" for text, n in frequent)}
    lines |= {"languages": ", ".join(f"{name} {share:.0%}" for name, share in sorted(merged.items(), key=lambda item: -item[1])[:4])}
    if len(sizes):
        aspects = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
        low, half, high = np.percentile(aspects, (0, 50, 100), method="inverted_cdf")
        lines["images"] = f"{_extent(sizes.min(axis=0))} to {_extent(sizes.max(axis=0))} pixels; width : height {low:.2f} to {high:.2f}, half at most {half:.2f}"
    lines["left out or changed"] = ", ".join(f"{r.rows} {r.reason}" for r in found.left_out[:4]) or "nothing"
    torn = sum(pair.split for pair in found.alike)
    near = f"{found.near} pairs of images" + (f", {torn} of them in different splits" if torn else "")
    lines["near-duplicates"] = "not looked for" if found.near is None else near if found.near else "none"
    lines["held-out texts in training"] = f"{found.repeated} rows, {found.repeated_long} of them with answers of {LONG} or more words" if found.repeated else "none"
    lines["contradictions"] = f"{found.contradicting} questions about the same images have several answers ({found.contradicting_rows} rows)" if found.contradicting else "none"
    return lines


def _extent(size: np.ndarray) -> str:
    return f"{size[0]}x{size[1]}"
