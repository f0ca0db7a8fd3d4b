"""The audit as one page that opens offline, and as tables for the terminal."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from ..reports import numbers
from .checks import Check
from .counts import SHARES, Counts
from .estimate import Estimate, OnGpu

PICTURE_SIDE = 300  # pixels
NAMED = 50  # refused rows named on the page


def shown_row(sample: Any, pieces: list[Any]) -> dict[str, Any]:
    """One row of the page: its pieces with their lines apart, its pictures small."""
    from ..reports.pictures import data_uri

    pictures = []
    for picture in sample.load_images():
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        pictures.append(data_uri(picture))
    size = {kind: sum(len(p.ids) for p in pieces if p.kind == kind) for kind in ("prompt", "image", "loss", "pad")}
    return {
        "id": sample.id, "pictures": pictures, "tokens": sum(size.values()) - size["pad"], "image_tokens": size["image"], "supervised": size["loss"],
        "pieces": [{"kind": p.kind, "lines": p.text.split("\n"), "title": str(p.ids[0]) if len(p.ids) == 1 else f"{p.ids[0]} x{len(p.ids)}"
                    if len(set(p.ids)) == 1 else " ".join(map(str, p.ids))} for p in pieces],
    }  # fmt: skip


def lost_rows(prepared: Any, counts: Counts) -> list[tuple[str, str]]:
    """(row, reason) of what preparing dropped, by kind, and what the collator refuses, one by one."""
    dropped = [(f"{n} rows", f"changed or dropped when the set was prepared: {kind}") for kind, n in sorted(prepared.manifest["reasons"].items())]
    refused = counts.refused[:NAMED]
    rest = [("...", f"{len(counts.refused) - NAMED} more")] if len(counts.refused) > NAMED else []
    return dropped + refused + rest


def write_page(path: Path, **values: Any) -> None:
    from ..reports.page import render

    text = render("audit.html.j2", date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"), shares=[share_name(s) for s in SHARES], **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def share_name(share: int) -> str:
    return {0: "least", 50: "half", 100: "most"}.get(share, f"{share} %")


def counts_table(counts: Counts) -> Any:
    from ..reports.terminal import _table

    table = _table(f"Tokens of {len(counts.lengths)} of {counts.rows} rows", ("a row's", *(share_name(s) for s in SHARES), "sum"))
    for what, values, total in counts.table():
        table.add_row(what, *(numbers.count(v) for v in values), numbers.count(total))
    return table


def checks_table(checks: list[Check]) -> Any:
    from rich.text import Text

    from ..reports.terminal import _table

    table = _table("Checks", ("", "", ""), header=False)
    for column in table.columns[1:]:
        column.justify = "left"
    for check in checks:
        word, style = {None: ("not asked", "dim"), True: ("well", "green"), False: ("WRONG", "bold red")}[check.good]
        table.add_row(Text(check.name, "dim"), Text(word, style), Text(check.found, overflow="fold"))
    return table


def cost(found: Estimate, rows: int, trainer: dict[str, Any], gpu: OnGpu | None) -> dict[str, str]:
    """The estimate in words, for both."""
    def gb(value: float) -> str:
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"

    accumulate = trainer.get("gradient_accumulation_steps", 1)
    steps = trainer.get("max_steps", -1)
    if steps <= 0:
        steps = -(-rows // (found.batch * accumulate)) * trainer.get("num_train_epochs", 3)
    said = {
        "a batch": f"{found.batch} rows, about {found.tokens:,} tokens with padding (at most {found.longest:,})",
        "memory here": f"{gb(found.memory)} (at most {gb(found.memory_longest)}): weights {gb(found.weights)}, optimizer {gb(found.optimizer)}, "
                       f"activations and gradients {gb(found.working)}",
        "time here": f"{found.seconds:.2f} s a step, {numbers.duration(found.seconds * steps)} for {steps:.0f} steps",
    }  # fmt: skip
    if gpu is not None:
        verdict = "fits" if gpu.fits else "does not fit"
        said[f"GPU of {gpu.gigabytes:g} GB"] = (
            f"{verdict}: {gb(gpu.memory)} at most; largest batch {gpu.largest_batch}; roughly {gpu.seconds:.2g} s a step at {gpu.tflops:g} Tflop/s,"
            f" {numbers.duration(gpu.seconds * steps)} in all"
        )
    return said
