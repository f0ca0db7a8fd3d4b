"""Answer prompts batch by batch; a prompt whose images cannot be read gets an error instead of an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..common.records import AnswerRecord
from ..config.plain import to_plain
from ..data.prepare import prepared_data
from .evaluate import Answer, Evaluator
from .inputs import Asked, read_inputs, shared_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.sample import Sample


def prompts_of(given: object, prompt: object, together: bool, run: Path | None, cfg: DictConfig) -> list[Asked]:
    """The prompts of a command's input=, prompt= and together=, before any weight is read.

    Without prompt=, inputs that bring none get the prompt that all held-out rows of the run share. Raises UserError.
    """

    @cache
    def default_prompt() -> str | None:
        if prompt is not None:
            return str(prompt)
        shared = shared_prompt(run)
        if shared:
            print(f"prompt: {shared} (that of the run's held-out rows; prompt=... asks something else)", file=sys.stderr)
        return shared

    asked = read_inputs(given, default_prompt, together, to_plain(cfg.evaluation)["split"], lambda: prepared_data(cfg))
    unprompted = next((a for a in asked if a.sample is not None and not a.sample.prompt_text and default_prompt() is None), None)
    if unprompted is not None and str(cfg.collator.get("_target_", "")).endswith("ChatCollator"):
        raise UserError(f"{unprompted.where}: what is to be asked? The run was trained with more than one prompt: add prompt=\"...\" to the command")
    return asked


def answer_prompts(evaluator: Evaluator, model: Any, asked: list[Asked], seed: int) -> Iterator[AnswerRecord]:
    """One record per prompt, in order. Without an answer, `error` says why and `prediction` is None. seed: for generation.do_sample."""
    from tqdm import tqdm
    from transformers import set_seed

    set_seed(seed)
    size = max(1, evaluator.batch_size)
    bar = tqdm(total=len(asked), desc="answers", leave=False, disable=None if len(asked) > size else True)
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        batch, reasons = readable_batch(evaluator.collator, [a.sample for a in part if a.sample is not None])
        answers = iter(evaluator.answer(model, batch) if batch is not None else ())
        for i, a in enumerate(part, start):
            error = a.error or reasons.get(id(a.sample), "")
            yield _record(evaluator, i if a.number is None else a.number, a, None if error else next(answers), error)
        bar.update(len(part))
    bar.close()


def readable_batch(collator: BatchMaker, samples: list[Sample]) -> tuple[Batch | None, dict[int, str]]:
    """(prompt batch of the readable samples or None, why the others are not, by id() of the sample).

    Samples are tried one by one only if their batch fails, so a good batch opens each image once.
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


def _record(evaluator: Evaluator, index: int, asked: Asked, answer: Answer | None, error: str) -> AnswerRecord:
    sample = asked.sample
    if sample is None:
        return {"index": index, "id": asked.where, "prediction": None, "error": error}
    if answer is not None and sample.references:
        return evaluator.record(index, sample, answer)
    reasoning, text = evaluator.collator.split_answer(answer.text, generated=True) if answer else ("", None)
    record: AnswerRecord = {
        "index": index, "id": sample.id, "root": sample.root, "images": list(sample.images), "prompt": sample.prompt_text,
        "references": list(sample.references), "prediction": text,
        "truncated": answer is not None and answer.truncated, "metrics": {},
    }  # fmt: skip
    if reasoning:
        record["reasoning"] = reasoning
    if error:
        record["error"] = error
    return record
