"""Measures every run with the right labels, whatever it was trained with, and writes the tables into the README.

    python measure.py README.md REFUSALS.txt BLIP2_SWEEP CHAT_SWEEP

BLIP-2: loss of a caption's token with the row's own picture and with others. Chat models: loss of an answer's token (end token
included), exact match, tokens generated for an answer, the share of answers that end by themselves.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import put

LIMIT = 64  # tokens an answer may have; the longest right one is far below


def opened(run: Path) -> Any:
    from mmft.config.compose import compose
    from mmft.runs.open import open_any

    found = open_any(run, compose([]), [])
    found.model.eval()
    return found


def held_out(found: Any) -> list[Any]:
    from mmft.data.prepare import prepared_data

    return list(prepared_data(found.cfg).split("validation"))


def loss(found: Any, collator: Any, rows: list[Any]) -> float:
    from mmft.evaluation.evaluate import Evaluator

    return Evaluator(rows, collator, found.settings["generation"], 16, 16, progress=False).loss(found.model)


def right(found: Any) -> Any:
    """mmft's own chat collator over the run's processor."""
    from mmft.collators.chat import ChatCollator

    own = found.collator
    return ChatCollator(processor=own.processor, family=own.family, model_config=own.model_config, end_token_ids=own.end_token_ids)


def answers(found: Any, rows: list[Any]) -> tuple[float, float, float]:
    """(exact match, mean tokens generated, share ended by an end token); generation as mmft would do it for this run."""
    import torch

    exact, lengths, ended = [], [], []
    evaluator = found.evaluator(rows)
    evaluator.generation = {**evaluator.generation, "max_new_tokens": LIMIT}
    settings = evaluator.generation_config()
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        batch = found.collator.prompt(some)
        with torch.no_grad():
            ids = found.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        for row, own, text in zip(some, ids.tolist(), found.collator.decode(ids), strict=True):
            at = next((i for i, token in enumerate(own) if token in found.collator.end_ids), None)
            lengths.append(LIMIT if at is None else at + 1)
            ended.append(at is not None)
            exact.append(text in row.references)
    return statistics.mean(exact), statistics.mean(lengths), statistics.mean(ended)


def blip2_rows(runs: list[Path]) -> list[str]:
    from mmft.audit.checks import SwappedImages

    lines = ["| collator | seed | first step | last step | own picture | another's picture | difference |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        found = opened(run)
        rows = held_out(found)
        # a row of another colour in each row's place; colours follow one another in the set
        moved = [SwappedImages(row, rows[(i + 1) % len(rows)].load_images()) for i, row in enumerate(rows)]
        assert all(row.references != rows[(i + 1) % len(rows)].references for i, row in enumerate(rows))
        own, other = loss(found, found.collator, rows), loss(found, found.collator, moved)
        difference = "0, to the bit" if other == own else f"{other - own:+.6f}"
        first, last = steps(run)
        lines.append(f"| {kind(found)} | {found.cfg.seed} | {first:.3f} | {last:.3f} | {own:.6f} | {other:.6f} | {difference} |")
    return lines


def chat_rows(runs: list[Path]) -> list[str]:
    lines = ["| collator | seed | answer loss | exact match | tokens generated | answers that end |", "|---|---|---|---|---|---|"]
    for run in runs:
        found = opened(run)
        rows = held_out(found)
        exact, length, ended = answers(found, rows)
        lines.append(f"| {kind(found)} | {found.cfg.seed} | {loss(found, right(found), rows):.3f} | {exact:.3f} | {length:.1f} | {ended:.3f} |")
    return lines


def kind(found: Any) -> str:
    name = found.cfg.collator._target_.split(".")[-1]
    return f"{name} (mmft's own)" if found.cfg.collator._target_.startswith("mmft.") else f"**{name}**"


def steps(run: Path) -> tuple[float, float]:
    import json

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses[0], losses[-1]


def finished(sweep: Path) -> list[Path]:
    return sorted(p.parent for p in sweep.glob("*/DONE"))


def main() -> None:
    readme, refusals, blip2, chat = (Path(word) for word in sys.argv[1:5])
    put(readme, "refusals", "\n".join(f"- `{line}`" for line in refusals.read_text(encoding="utf-8").splitlines()))
    put(readme, "blip2", "\n".join(blip2_rows(finished(blip2))))
    put(readme, "chat", "\n".join(chat_rows(finished(chat))))


if __name__ == "__main__":
    main()
