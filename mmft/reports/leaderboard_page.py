"""Write a leaderboard: report.html with plots and pictures, report.md, leaderboard.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ..common.records import AnswerRecord
from . import answers, numbers, sweep_plots
from .answers import Verdict
from .html import render, write_text
from .numbers import is_number
from .pictures import ShownPictures, shown_pictures
from .ranking import Leaderboard, RankedRun
from .run_files import read_answers
from .run_markdown import cell, table_line

MAX_PICTURES, MAX_RUNS = 8, 12  # of the section that shows the runs' answers to the same pictures


class RunAnswer(TypedDict):
    run: str
    text: str
    verdict: Verdict


class SharedSample(ShownPictures):
    """A held-out row with the answers of several runs."""

    id: str
    prompt: str
    reference: str
    answers: list[RunAnswer]


def write(folder: Path, board: Leaderboard) -> list[Path]:
    """Write report.html, report.md and leaderboard.csv into the folder; returns their paths."""
    kept = [m for m in board.main_kept if m != board.by]
    metrics = [m for m in _measured(board) if m not in (board.by, *kept)]
    page = render(
        "leaderboard.html.j2", board=board, numbers=numbers, metrics=metrics, kept=kept, labels=board.labels, plots=sweep_plots.draw(board),
        shared_samples=shared_samples(board),
    )
    return [write_text(folder / name, text) for name, text in (("report.html", page), ("report.md", markdown(board)), ("leaderboard.csv", table(board)))]


def _measured(board: Leaderboard) -> list[str]:
    return [m for m in board.labels if any(is_number(r.metrics.get(m)) for r in board.rows)]


def markdown(board: Leaderboard) -> str:
    gap = any(r.to_best for r in board.rows)
    head = ["run", *board.keys, "status", "base", board.label, *(["to the best"] if gap else []), *(["rows"] if board.counted else []),
            *(board.labels[m] for m in board.kept), "loss", "trainable", "time", "scale", "peak memory", "samples/s", ""]  # fmt: skip
    lines = [f"# {board.heading}", "", *_head(head)]
    for r in board.rows:
        run = f"[{cell(r.run)}]({r.run.replace(' ', '%20')}/report.html)" if r.report else cell(r.run)
        figures = [numbers.metric(r.base), numbers.metric(r.score), *([numbers.difference(r.to_best)] if gap else []), *([r.answered] if board.counted else []),
                   *(numbers.metric(r.metrics.get(m)) for m in board.kept), numbers.metric(r.loss), numbers.count(r.trainable),
                   numbers.duration(r.seconds), numbers.plain(r.scale), numbers.memory(r.memory), numbers.plain(r.speed)]  # fmt: skip
        lines.append(table_line([run, *map(cell, r.values), cell(r.status), *figures, ", ".join([*r.marks, *map(cell, r.flags)])]))
    if board.groups:
        over = [*board.setting_keys, "seeds", board.label, "spread", *(board.labels[m] for m in board.kept), "loss", "trainable", "scale", ""]
        lines += ["", "## Over seeds", "", *_head(over)]
        for g in board.groups:
            lines.append(table_line([*map(cell, g.values), str(g.n), numbers.metric(g.mean), numbers.metric(g.sd), *(numbers.metric(g.metrics.get(m)) for m in board.kept),
                                     numbers.metric(g.loss), numbers.count(g.trainable), numbers.plain(g.scale), ", ".join(g.marks)]))  # fmt: skip
    return "\n".join([*lines, *(f"\n{cell(note)}" for note in board.notes)]) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return [table_line(names), table_line(["---"] * len(names))]


def table(board: Leaderboard) -> str:
    """leaderboard.csv: a line for each run, numbers in full."""
    out = io.StringIO()
    metrics = _measured(board)
    writer = csv.writer(out, lineterminator="\n")
    counts = ("rows", "references_per_row", "truncated", "left_out") if board.counted else ()
    gap = ("to_best", "to_best_low", "to_best_high", "to_best_p") if any(r.to_best for r in board.rows) else ()
    writer.writerow(["run", "status", *board.keys, "eval_loss", *metrics, *gap, *counts, "trainable_parameters", "scale", "peak_memory_mb", "seconds",
                     "samples_per_second", "marks", "flags", "reason"])  # fmt: skip
    for r in board.rows:
        counted = [r.counts["rows"], r.counts["references_per_row"], r.counts["truncated"], r.counts["left_out"]] if r.counts else [None] * len(counts)
        gaps = [r.to_best["value"], r.to_best["low"], r.to_best["high"], r.to_best["p"]] if r.to_best else [None] * len(gap)
        values = [r.loss, *(r.metrics.get(m) for m in metrics), *gaps, *counted, r.trainable, r.scale, r.memory, r.seconds, r.speed]
        # a spreadsheet would take a text that starts with one of these for a formula
        words = [f"'{w}" if w[:1] in ("=", "+", "@") else w for w in [r.run, r.status, *map(str, r.values)]]
        writer.writerow([*words, *("" if v is None else v for v in values), "; ".join(r.marks), "; ".join(r.flags), r.reason])
    return out.getvalue()


def shared_samples(board: Leaderboard) -> list[SharedSample]:
    """Held-out rows that all runs answered, those on which the runs differ most first; of each seed group the best run."""
    runs = [g.rows[0] for g in board.groups] if board.groups else board.rows
    answered: list[tuple[RankedRun, dict[str | None, AnswerRecord]]] = []
    for run in runs:
        by_id = {a.get("id"): a for a in read_answers(run.path / "eval" / "tuned.jsonl", run.path)}
        if by_id and len(answered) < MAX_RUNS:
            answered.append((run, by_id))
    if not answered:
        return []
    first, by_id = answered[0]
    ranking = answers.ranking_of(list(by_id.values()), first.summary.get("metric_info") or {})
    common = [i for i in answered[0][1] if all(i in by_id for _, by_id in answered)]

    def agreement(i: str | None) -> tuple[int, float]:
        values = [ranking.value(by_id[i]) for _, by_id in answered]
        return -len({str(by_id[i].get("prediction")) for _, by_id in answered}), min(values) - max(values)

    samples: list[SharedSample] = []
    for i in sorted(common, key=agreement)[:MAX_PICTURES]:
        row = answered[0][1][i]
        samples.append({
            "id": str(i), "prompt": str(row.get("prompt") or ""), "reference": str((row.get("references") or [""])[0]),
            "answers": [{"run": r.run, "text": str(by_id[i].get("prediction") or ""), "verdict": answers.verdict(by_id[i])} for r, by_id in answered],
            **shown_pictures(row, 220, 2),
        })  # fmt: skip
    return samples
