"""`mmft predict run=DIR input=...`: answers for images, tables of questions and prepared splits; `chat=true`: a conversation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..common.errors import Incomplete, UserError
from ..config.validate import to_plain
from ..evaluation.inputs import Asked, read_inputs, shared_prompt

log = logging.getLogger("mmft")


@dataclass
class Predict:
    """Keys as in conf/task/predict.yaml. Inputs that cannot be read are named on stderr and left unanswered (exit code 1)."""

    run: str | None = None
    checkpoint: int | None = None
    input: Any = None
    prompt: Any = None
    together: bool = False
    out: str | None = None
    chat: bool = False

    def __call__(self, cfg: Any, overrides: list[str]) -> list[dict[str, Any]]:
        from ..runs.open import any_config, open_any

        run, kept = any_config(self.run, cfg, overrides, self.checkpoint)
        if self.chat:
            from ..serving.chat import chat

            return chat(open_any(self.run, cfg, overrides, self.checkpoint))
        asked = ask_for(self.input, self.prompt, self.together, run, kept)
        table = None
        if self.out is not None:
            from ..evaluation.answer_table import AnswerFile

            table = AnswerFile(Path(self.out))
        rows = []
        try:
            opened = open_any(self.run, cfg, overrides, self.checkpoint)
            for row in answer_all(opened, asked):
                rows.append(row)
                if row.get("error"):
                    complain(row["error"])
                elif table is None:
                    print(row["prediction"] if len(asked) == 1 else f"{row['id']}\n    {row['prediction']}", flush=True)
                if table is not None:
                    table.add(row)
            finish(rows, table)
        finally:
            if table is not None:
                table.discard()
        if table is not None and run is not None:
            run.record("predict", overrides, [table.path])
        bad = sum(bool(r.get("error")) for r in rows)
        if bad:
            raise Incomplete(f"{bad} of {len(rows)} inputs could not be answered, each is named above; the other {len(rows) - bad} were"
                             f"{f' (all in {table.path})' if table is not None else ''}")  # fmt: skip
        return rows


def ask_for(given: Any, prompt: Any, together: bool, run: Any, kept: Any) -> list[Asked]:
    """The prompts of a command, before a weight is read. Errors raised: UserError."""
    from ..data.prepare import prepared_data

    @cache
    def words() -> str | None:
        if prompt is not None:
            return str(prompt)
        shared = shared_prompt(run)
        if shared:
            print(f"prompt: {shared} (that of the run's held-out rows; prompt=... asks something else)", file=sys.stderr)
        return shared

    asked = read_inputs(given, words, together, to_plain(kept.evaluation)["split"], lambda: prepared_data(kept))
    silent = next((a for a in asked if a.sample is not None and not a.sample.prompt_text and words() is None), None)
    if silent is not None and str(kept.collator.get("_target_", "")).endswith("ChatCollator"):
        raise UserError(f"{silent.where}: what is to be asked? The run was trained with more than one prompt: add prompt=\"...\" to the command")
    return asked


def answer_all(opened: Any, asked: list[Asked]) -> Iterator[dict[str, Any]]:
    """One record a prompt in their order, as in eval/*.jsonl; where it has no answer, `error` says why and `prediction` is None."""
    from tqdm import tqdm
    from transformers import set_seed

    evaluator = opened.evaluator([])
    set_seed(opened.settings["seed"])  # for generation.do_sample=true
    size = max(1, evaluator.batch_size)
    bar = tqdm(total=len(asked), desc="answers", leave=False, disable=None if len(asked) > size else True)
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        samples = [a.sample for a in part if a.sample is not None]
        batch, reasons = readable(opened.collator, samples)
        texts = iter(evaluator.answer(opened.model, batch) if batch is not None else ())
        for i, a in enumerate(part, start):
            error = a.error or reasons.get(id(a.sample), "")
            yield record(evaluator, i if a.number is None else a.number, a, None if error else next(texts), error)
        bar.update(len(part))
    bar.close()


def readable(collator: Any, samples: list[Any]) -> tuple[Any, dict[int, str]]:
    """(prompt batch of the samples that can be read, or None; reasons of the others by the sample's id()).

    Samples are looked at one by one only when their batch fails: a good batch opens each picture once.
    """
    reasons: dict[int, str] = {}
    try:
        return (collator.prompt(samples) if samples else None), reasons
    except UserError:
        pass
    good = []
    for sample in samples:
        try:
            collator.prompt([sample])
            good.append(sample)
        except UserError as error:
            reasons[id(sample)] = str(error)
    return (collator.prompt(good) if good else None), reasons


def record(evaluator: Any, index: int, asked: Asked, text: str | None, error: str) -> dict[str, Any]:
    sample = asked.sample
    if sample is None:
        return {"index": index, "id": asked.where, "prediction": None, "error": error}
    if text is None or not sample.references:
        row = {"index": index, "id": sample.id, "root": sample.root, "images": list(sample.images), "prompt": sample.prompt_text,
               "references": list(sample.references), "prediction": text, "metrics": {}}  # fmt: skip
        return {**row, "error": error} if error else row
    return evaluator.record(index, sample, text)


def finish(rows: list[dict[str, Any]], table: Any) -> None:
    """Put the answers in their place and say what they are worth. Errors raised: UserError when there is none."""
    good = [r for r in rows if not r.get("error")]
    if not good:
        raise UserError(f"none of the {len(rows)} inputs could be answered; nothing was written" if len(rows) > 1 else "nothing was answered")
    if table is not None:
        table.finish()
        log.info("%d answers in %s", len(good), table.path)
    known = [r for r in good if r["references"]]
    if len(known) > 1:
        from ..evaluation import metrics
        from ..reports import terminal

        scores = metrics.compute([r["prediction"] for r in known], [r["references"] for r in known])
        terminal.show(terminal.pairs_table(f"{len(known)} rows with references", {k: f"{v:.3f}" for k, v in scores.items()}))


def complain(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"mmft: {text}", file=sys.stderr)
