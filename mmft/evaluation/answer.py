"""Answer the prompts of `predict` and `compare`, generated or chosen; a prompt whose images cannot be read gets an error instead of an answer."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import UserError
from ..common.records import AnswerRecord
from ..config.plain import to_plain
from ..data.choices import LETTERS, as_choices, letters_in
from ..data.prepare import prepared_data
from ..data.sample import Sample
from .choose import check_choices
from .evaluate import Evaluator
from .generate import Answer
from .inputs import Asked, read_inputs, shared_prompt

if TYPE_CHECKING:
    from pathlib import Path


def prompts_of(given: object, prompt: object, together: bool, run: Path | None, cfg: DictConfig) -> Sequence[Asked]:
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


def with_choices(asked: Sequence[Asked], choose: object, cfg: DictConfig) -> Sequence[Asked]:
    """The prompts with what can be chosen: choose=; else the row's own choices, or those that the config gives to all rows.

    Unchanged where answers are generated. Raises UserError for a prompt without choices.
    """
    given = as_choices(choose, "choose")
    if given is None and cfg.evaluation.get("answer", "generate") != "choose":
        return asked
    common = given if given is not None else as_choices(to_plain(cfg.data).get("choices"), "data.choices")
    found = []
    for one in asked:
        sample = one.sample
        if sample is not None and (given is not None or not sample.choices):
            choices = letters_in(sample.prompt_text) if common == LETTERS else list(common or ())
            if not choices:
                reason = "its prompt does not name options A, B, ..." if common == LETTERS else "it has no choices: add choose=[A,B], or evaluation.answer=generate"
                raise UserError(f"{one.where}: {reason}")
            sample = replace(sample, choices=tuple(choices))
        found.append(replace(one, sample=sample))
    return found


class AskedSamples(Sequence[Sample]):
    """The samples at some positions of the prompts."""

    def __init__(self, asked: Sequence[Asked], positions: Sequence[int]):
        self.asked, self.positions = asked, positions

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> AskedSamples:
        """The samples of all prompts that have one."""
        return cls(asked, [i for i, prompt in enumerate(asked) if prompt.sample is not None])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.asked[self.positions[index]].sample


def answer_prompts(evaluator: Evaluator, model: Any, asked: Sequence[Asked], seed: int) -> Iterator[AnswerRecord]:
    """One record per prompt, in their order, each as soon as those before it are answered."""
    waiting: dict[int, AnswerRecord] = {}
    coming = 0
    for position, record in answers_as_finished(evaluator, model, asked, seed):
        waiting[position] = record
        while coming in waiting:
            yield waiting.pop(coming)
            coming += 1


def answers_as_finished(evaluator: Evaluator, model: Any, asked: Sequence[Asked], seed: int, done: Container[int] = ()) -> Iterator[tuple[int, AnswerRecord]]:
    """(position of a prompt, its record) of every prompt that is not in `done`, in the order in which the answers end.

    Without an answer, `error` says why and `prediction` is None. seed: for generation.do_sample.
    """
    from transformers import set_seed

    set_seed(seed)
    if evaluator.chooser is not None:
        check_choices({"answer": "choose"}, AskedSamples.of(asked), "the input")
    positions = []
    for position, prompt in enumerate(asked):
        if position in done:
            continue
        if prompt.sample is None or prompt.error:
            yield position, _record(evaluator, position, prompt, None, prompt.error)
        else:
            positions.append(position)
    for index, answer in evaluator.answers(model, AskedSamples(asked, positions)):
        position, error = positions[index], str(answer) if isinstance(answer, UserError) else ""
        yield position, _record(evaluator, position, asked[position], answer if isinstance(answer, Answer) else None, error)


def asked_identity(asked: Sequence[Asked]) -> dict[str, str]:
    """Hashes of what is asked: of the images (their files' sizes and times, or the contents that a prepared set knows), and of the texts."""
    images, texts = hashlib.sha256(), hashlib.sha256()
    for prompt in asked:
        sample = prompt.sample
        files = [] if sample is None else [[path.as_posix(), *_stamp(path)] for path in sample.image_paths]
        images.update(json.dumps([prompt.where, prompt.error, files, sample.sha256 if sample else ()]).encode("utf-8", "surrogatepass"))
        texts.update(json.dumps([sample.messages, sample.references, sample.choices] if sample else []).encode("utf-8", "surrogatepass"))
    return {"input": images.hexdigest(), "prompt": texts.hexdigest()}


def _stamp(path: Path) -> tuple[int, int]:
    """(size, time of the last change) of a file; zeros for a missing one."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _record(evaluator: Evaluator, position: int, asked: Asked, answer: Answer | None, error: str) -> AnswerRecord:
    sample, index = asked.sample, position if asked.number is None else asked.number
    if sample is None:
        return {"index": index, "id": asked.where, "prediction": None, "error": error}
    if answer is not None and (sample.references or answer.probabilities is not None):
        return evaluator.record(index, sample, answer)
    reasoning, text = evaluator.collator.split_answer(answer.text, generated=True) if answer else ("", None)
    record: AnswerRecord = {
        "index": index, "id": sample.id, "root": sample.root, "images": list(sample.images), "prompt": sample.prompt_text,
        "references": list(sample.references), "prediction": text,
        "truncated": answer is not None and answer.truncated, "metrics": {},
    }  # fmt: skip
    if reasoning:
        record["reasoning"] = reasoning
    if text and (boxes := evaluator.collator.regions_in(text, sample)):
        record["boxes"] = boxes
    if error:
        record["error"] = error
    return record
