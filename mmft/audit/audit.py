"""The steps of `mmft audit`: choose rows, show them, check the model, let it answer, estimate what training takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..collators.types import BatchMaker
from ..common.errors import UserError
from ..common.records import AnswerRecord, PlanReport
from ..config.settings import Settings
from ..evaluation.choose import Chooser, check_choices
from ..evaluation.evaluate import Evaluator
from ..evaluation.metrics.defaults import metric_set
from ..models.quantization import Quantization, uses_checkpointing
from . import tokens
from .checks import Check, check_blindness, check_end_token
from .counts import Collate, TokenCounts
from .estimate import Estimate, GpuEstimate, estimate, on_gpu
from .page import ShownRow, shown_row

if TYPE_CHECKING:
    import torch

    from ..common.records import Region
    from ..data.sample import Sample

log = logging.getLogger("mmft")
SPARE = 16  # rows beyond those asked for that are tried when the collator refuses some


@dataclass
class AuditResult:
    """What an audit found. name: model and data set. rows: shown token by token. cost: the estimate in words."""

    name: str
    counts: TokenCounts
    checks: list[Check]
    rows: list[ShownRow] = field(default_factory=list)
    answers: list[AnswerRecord] = field(default_factory=list)
    plan: PlanReport = field(default_factory=PlanReport)
    estimate: Estimate | None = None
    gpu: GpuEstimate | None = None
    cost: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What `--json` prints: all but the rows with their pictures, which the page has."""
        return {name: value for name, value in vars(self).items() if name != "rows"}


def usable_rows(collator: Collate, rows: Sequence[Sample], n: int, counts: TokenCounts) -> list[Sample]:
    """The first rows that the collator accepts, at least `n` of them if there are as many near the start."""
    refused = {row for row, _ in counts.refused}
    first = (rows[i] for i in range(min(len(rows), n + len(refused) + SPARE)))
    return [row for row in first if row.id not in refused and _collates(collator, row)]


def _collates(collator: Collate, row: Sample) -> bool:
    try:
        collator([row])
    except UserError:
        return False
    return True


def check_rows(counts: TokenCounts) -> Check:
    """The collator must accept every counted row."""
    refused, example = len(counts.refused), ""
    if refused:
        example = f", e.g. {counts.refused[0][0]}: {counts.refused[0][1]}"
    return Check("rows", f"the collator refuses {refused} of {refused + counts.counted} rows looked at{example}", not refused)


def look_at_rows(result: AuditResult, model: torch.nn.Module, collator: BatchMaker, usable: list[Sample], n: int, collate: Collate) -> None:
    """Show the first `n` usable rows token by token, in the terminal and in the result, and check them. collate: makes the batches of training."""
    by_id = {sample.id: sample for sample in usable[:n]}
    batch = collate(list(by_id.values()))
    shown = [by_id[row] for row in batch["row_ids"]]  # a row of several sequences is shown once for each
    rows = [tokens.pieces(collator, batch, i) for i in range(len(shown))]
    print_rows(shown, rows)
    result.rows = [shown_row(sample, pieces, _taught(collator, sample)) for sample, pieces in zip(shown, rows, strict=True)]
    result.checks += [check_end_token(collator, batch), check_blindness(model, collator, usable[:2])]


def _taught(collator: BatchMaker, sample: Sample) -> list[Region]:
    """The boxes in the text that a row trains, read as those of a generated answer."""
    return collator.regions_in(collator.written(sample).answer_text, sample) if sample.regions else []


def print_rows(samples: list[Sample], rows: list[list[tokens.Piece]]) -> None:
    """Print rows token by token: in colour on a terminal, else with marks."""
    from rich.console import Console

    console = Console(highlight=False)
    colour = console.is_terminal and not console.no_color
    log.info("\nWhat the model sees:  %s", "" if colour else tokens.legend(False))
    if colour:
        console.print(tokens.legend(True))
    for sample, pieces in zip(samples, rows, strict=True):
        log.info("\n%s", sample.id)
        if colour:
            console.print(tokens.coloured(pieces))
        else:
            print(tokens.marked(pieces))


def untrained_answers(model: torch.nn.Module, collator: BatchMaker, settings: Settings, rows: list[Sample]) -> list[AnswerRecord]:
    """Let the untrained model answer these rows, and print the answers."""
    if not rows:
        return []
    check_choices(settings["evaluation"], rows, "the audited rows")
    evaluator = Evaluator(rows, collator, settings["generation"], settings["evaluation"]["batch_size"], metrics=metric_set(settings.get("metrics")),
                          chooser=Chooser.from_settings(settings["evaluation"]))  # fmt: skip
    texts = evaluator.generate(model)
    answers = [evaluator.record(i, sample, text) for i, (sample, text) in enumerate(zip(rows, texts, strict=True))]
    log.info("\nThe untrained model's answers")
    for row in answers:
        log.info("  %s  %r  (reference %r)", row["id"], row["prediction"], row["references"][0] if row["references"] else "")
    return answers


def estimate_cost(
    model: Any, collator: Collate, rows: list[Sample], counts: TokenCounts, settings: Settings, quantization: Quantization | None,
    gigabytes: float | None, tflops: float | None,
) -> tuple[Estimate, GpuEstimate | None]:
    """(memory and time of a step on this machine, the same on a GPU of `gigabytes` or None)."""
    trainer = settings["trainer"]
    if uses_checkpointing(trainer):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.get("activation_checkpointing_kwargs"))
    here = estimate(model, collator, rows, counts, trainer)
    if gigabytes is None:
        return here, None
    return here, on_gpu(here, gigabytes, tflops, 16 if quantization is None else 4 if quantization.bits <= 4 else 8)
