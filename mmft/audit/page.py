"""Show the audit: as one page that opens offline, and as tables for the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..reports import numbers
from ..reports.html import render, write_text
from ..reports.tables import expert_notes
from .checks import Check
from .counts import PERCENTILES, TokenCounts
from .estimate import Estimate, GpuEstimate
from .tokens import Piece

if TYPE_CHECKING:
    from rich.table import Table

    from ..common.records import Region
    from ..data.prepared import PreparedData
    from ..data.sample import Sample
    from ..reports.pictures import Marked, ShownPicture
    from .audit import AuditResult

PICTURE_SIDE = 300  # pixels
NAMED = 50  # refused rows named on the page


class ShownPiece(TypedDict):
    """One token, or a run of equal tokens. lines: its text, split at line breaks. title: its ids."""

    kind: str
    lines: list[str]
    title: str


class ShownRow(TypedDict):
    """One row token by token. pictures: with the boxes that the answer names. tokens: without padding. supervised: tokens with loss.

    weights: of their loss, where it is not 1.
    """

    id: str
    pictures: list[ShownPicture]
    tokens: int
    image_tokens: int
    supervised: int
    pieces: list[ShownPiece]
    weights: str


def shown_row(sample: Sample, pieces: list[Piece], taught: Sequence[Region]) -> ShownRow:
    """A row as the page shows it, with small pictures. taught: the boxes that its answer's text means, read back from that text."""
    from ..reports.pictures import SMALL, data_uri, overlay

    pictures: list[ShownPicture] = []
    drawn: list[Marked] = [("reference", "row", sample.regions), ("tuned", "text of the answer", taught)]
    for number, picture in enumerate(sample.load_images()):
        size = picture.size
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        pictures.append({"name": sample.images[number], "uri": data_uri(picture), "small": max(picture.size) < SMALL, "overlay": overlay(size, number, drawn)})
    size = {kind: sum(len(p.ids) for p in pieces if p.kind == kind) for kind in ("prompt", "image", "loss", "pad")}
    return {
        "id": sample.id, "pictures": pictures, "tokens": sum(size.values()) - size["pad"], "image_tokens": size["image"], "supervised": size["loss"],
        "pieces": [{"kind": p.kind, "lines": p.text.split("\n"), "title": f"{p.times}{_title(p.ids)}"} for p in pieces],
        "weights": ", ".join(dict.fromkeys(p.times.strip() for p in pieces if p.times)),
    }  # fmt: skip


def _title(ids: tuple[int, ...]) -> str:
    if len(set(ids)) > 1:
        return " ".join(map(str, ids))
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]} x{len(ids)}"


def lost_rows(prepared: PreparedData, counts: TokenCounts) -> list[tuple[str, str]]:
    """(row, reason) of the rows dropped by preparation, counted by reason, and of those the collator refuses, one by one."""
    dropped = [(f"{n} rows", f"changed or dropped when the set was prepared: {kind}") for kind, n in sorted(prepared.manifest["reasons"].items())]
    refused = counts.refused[:NAMED]
    rest = [("...", f"{len(counts.refused) - NAMED} more")] if len(counts.refused) > NAMED else []
    return dropped + refused + rest


def write_page(path: Path, result: AuditResult, prepared: PreparedData, overrides: list[str]) -> None:
    """Write the page of an audit."""
    counts = result.counts
    text = render(
        "audit.html.j2", date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"), shares=[percentile_name(s) for s in PERCENTILES],
        name=result.name, well=all(c.passed is not False for c in result.checks), overrides=" ".join(overrides), checks=result.checks,
        rows=result.rows, counted=counts.counted, all_rows=counts.rows, counts=counts.table(), weights=counts.weights_note(), lost=lost_rows(prepared, counts),
        plan=result.plan, experts=expert_notes(result.plan), answers=result.answers, cost=result.cost,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def percentile_name(share: int) -> str:
    return {0: "least", 50: "half", 100: "most"}.get(share, f"{share} %")


def counts_table(counts: TokenCounts) -> Table:
    from rich.text import Text

    from ..reports.terminal import new_table

    several = f" ({len(counts.lengths)} sequences)" if len(counts.lengths) != counts.counted else ""
    table = new_table(f"Tokens of {counts.counted} of {counts.rows} rows{several}", ("a row's", *(percentile_name(s) for s in PERCENTILES), "sum"))
    for what, values, total in counts.table():
        table.add_row(what, *(numbers.count(v) for v in values), numbers.count(total))
    if counts.weights:
        table.caption = Text(f"loss weights: {counts.weights_note()}")
    return table


def checks_table(checks: list[Check]) -> Table:
    from rich.text import Text

    from ..reports.terminal import new_table

    table = new_table("Checks", ("", "", ""), header=False)
    for column in table.columns[1:]:
        column.justify = "left"
    for check in checks:
        word, style = {None: ("not asked", "dim"), True: ("well", "green"), False: ("WRONG", "bold red")}[check.passed]
        table.add_row(Text(check.name, "dim"), Text(word, style), Text(check.detail, overflow="fold"))
    return table


def cost_lines(estimate: Estimate, rows: int, trainer: dict[str, Any], gpu: GpuEstimate | None) -> dict[str, str]:
    """The estimate in words, for the page and the terminal. rows: of an epoch. trainer: the config section."""

    def size(value: float) -> str:
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"

    accumulate = trainer.get("gradient_accumulation_steps", 1)
    steps = trainer.get("max_steps", -1)
    if steps <= 0:
        steps = -(-rows // (estimate.batch * accumulate)) * trainer.get("num_train_epochs", 3)
    lines = {
        "a batch": f"{estimate.batch} rows, about {estimate.tokens:,} tokens with padding (at most {estimate.longest:,})",
        "memory here": f"{size(estimate.memory)} (at most {size(estimate.memory_longest)}): weights {size(estimate.weights)}, "
                       f"optimizer {size(estimate.optimizer)}, activations and gradients {size(estimate.working)}",
        "time here": f"{estimate.seconds:.2f} s a step, {numbers.duration(estimate.seconds * steps)} for {steps:.0f} steps",
    }  # fmt: skip
    if gpu is not None:
        verdict = "fits" if gpu.fits else "does not fit"
        lines[f"GPU of {gpu.gigabytes:g} GB"] = (
            f"{verdict}: {size(gpu.memory)} at most; largest batch {gpu.largest_batch}; roughly {gpu.seconds:.2g} s a step at {gpu.tflops:g} Tflop/s,"
            f" {numbers.duration(gpu.seconds * steps)} in all"
        )
    return lines
