"""Stages 7 and 8: write summary.json and the reports, and show the result."""

from __future__ import annotations

import logging

from ..common.errors import Preempted, Pruned
from ..common.records import Summary
from ..export.model_card import write_card
from ..loggers.base import Logger
from ..reports import terminal
from ..reports.loss_curve import write_curve
from ..reports.run_markdown import write_markdown
from ..reports.run_page import write_report
from ..runs.directory import Run
from ..runs.environment import peak_memory_mb

log = logging.getLogger("mmft")


def complete_summary(run: Run, status: str, values: Summary, device: str) -> Summary:
    """The values that the stages have produced, with defaults for those of stages that did not run."""
    defaults: Summary = {
        "steps": 0, "samples_per_second": None, "train_loss": {"first": None, "last": None}, "eval_loss": None, "base_eval_loss": None,
        "metrics": {}, "base_metrics": {}, "supervised_tokens": 0, "effective_batch_size": None, "trainable_parameters": None, "total_parameters": None,
    }  # fmt: skip
    head: Summary = {"status": status, "name": run.name, "seconds": round(run.seconds, 3)}
    return {**head, **defaults, **values, "peak_memory_mb": round(peak_memory_mb(device), 1)}


def status_of(error: BaseException) -> str:
    """The status of a run that ended with an error."""
    if isinstance(error, Pruned):
        return "pruned"
    if isinstance(error, Preempted):
        return "preempted"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def write_reports(run: Run, logger: Logger) -> None:
    """Model card, loss curve, page and text; DONE marks the directory as complete."""
    write_card(run)
    write_curve(run.path)
    write_report(run.path)
    write_markdown(run.path)
    logger.finish("finished")
    run.write_text("DONE", "")


def show_result(run: Run, summary: Summary, joint: bool) -> None:
    """The tables of a run in the terminal; one line for a jointly trained run."""
    if joint:
        log.info("%-14s eval loss %s, report %s", "finished", summary["eval_loss"], run / "report.html")
        return
    tables = terminal.results_tables(summary) if summary["metrics"] or summary["eval_loss"] is not None else []
    if (by_source := terminal.sources_table(summary)) is not None:
        tables.append(by_source)
    terminal.show(*tables, terminal.summary_table(summary))
    log.info("report         %s", run / "report.html")
