"""Before it serves: whether the server answers the first held-out rows as `predict` does."""

from __future__ import annotations

import json
import logging
import queue
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import UserError
from ..data.prepare import prepared_data
from ..data.sample import Sample
from ..data.selection import evaluation_rows
from ..evaluation.generate import by_length
from .adapters import ServedModel
from .chat_request import RequestError, body_of, parse
from .engine import Engine
from .jobs import Job, Piece

log = logging.getLogger("mmft")


@contextmanager
def checked_engine(models: Sequence[ServedModel], places: int | None, waiting: int, rows: int) -> Iterator[Engine]:
    """A running engine for the block, compared with `predict` on this many held-out rows of each model; 0: not compared. Raises UserError.

    places: rows in a batch of one model; None: evaluation.batch_size of the last one. waiting: requests that may wait.
    """
    engine = Engine(models, places if places is not None else models[-1].opened.settings["evaluation"]["batch_size"], waiting)
    try:
        if rows:
            for line in check_parity(engine, models, rows):
                log.info("%-14s %s", "checked", line)
        else:
            engine.start()
        yield engine
    finally:
        engine.close()


def check_parity(engine: Engine, models: Sequence[ServedModel], rows: int) -> list[str]:
    """A line about each model: that its answers are those of `predict`, or why that cannot be checked. The engine must not run yet.

    Rows become requests with their images as data, and go the way of every request; all models' rows are in the engine at once. Raises UserError for a
    row that is answered differently.
    """
    found = {served.name: held_out(served, rows) for served in models}
    asked = {name: chosen for name, chosen in found.items() if not isinstance(chosen, str)}
    predicted = {served.name: predict(served, asked[served.name]) for served in models if served.name in asked}
    engine.start()
    with tempfile.TemporaryDirectory(prefix="mmft-serve-") as folder:
        served_answers = ask(engine, asked, Path(folder))
    for name, answers in predicted.items():
        for sample, ours, theirs in zip(asked[name], served_answers[name], answers, strict=True):
            if ours != theirs:
                raise UserError(f"run={name}: the server answers row {sample.id} with {ours[:200]!r} where predict answers {theirs[:200]!r}; nothing is served"
                                " (check=0 serves without this check; please report it)")  # fmt: skip
    notes = []
    for name, chosen in found.items():
        notes.append(f"{name}: not compared with predict: {chosen}" if isinstance(chosen, str) else f"{name}: {len(chosen)} held-out rows answered as predict does")
    return notes


def held_out(served: ServedModel, rows: int) -> list[Sample] | str:
    """The first held-out rows that a request can express, in the order in which predict answers them; or why there are none."""
    opened = served.opened
    if opened.run is None:
        return "it is no run, so it has no held-out rows"
    try:
        found = evaluation_rows(prepared_data(opened.cfg), {**opened.settings["evaluation"], "max_samples": None})
    except UserError as error:
        return str(error)
    chosen: list[Sample] = []
    for i in range(min(len(found), 64)):
        if len(chosen) == rows:
            break
        try:
            body_of("", found[i])
            opened.collator.prompt([found[i]])
        except (UserError, OSError):
            continue
        chosen.append(found[i])
    if not chosen:
        return "none of the first held-out rows can be sent as a request"
    return [chosen[i] for i in by_length(opened.collator, chosen)]


def predict(served: ServedModel, rows: Sequence[Sample]) -> list[str]:
    """The answers of `predict` to these rows, generated greedily."""
    evaluator = served.opened.evaluator(rows)
    evaluator.generation = {**evaluator.generation, "do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
    evaluator.chooser, evaluator.progress, evaluator.announce = None, False, False
    with served.use() as model:
        answers = evaluator.generate(model)
    return [evaluator.collator.split_answer(answer.text, generated=True)[1] for answer in answers]


def ask(engine: Engine, rows: dict[str, list[Sample]], folder: Path) -> dict[str, list[str]]:
    """The server's answers to the rows of each model, all asked at once. Raises UserError for a row that is refused."""
    jobs: list[Job] = []
    pieces: dict[tuple[str, int], queue.SimpleQueue[Piece]] = {}
    for name, samples in rows.items():
        for i, sample in enumerate(samples):
            body = json.dumps(body_of(name, sample, temperature=0)).encode()
            try:
                request = parse(body, folder / f"{len(jobs)}", sample.id)
            except RequestError as error:
                raise UserError(f"run={name}: the server refuses row {sample.id}: {error.message}; check=0 serves without this check") from None
            pieces[name, i] = queue.SimpleQueue[Piece]()
            jobs.append(Job(request, pieces[name, i].put))
    if jobs:
        engine.submit(jobs)
    answers: dict[str, list[str]] = {}
    for name, samples in rows.items():
        answers[name] = []
        for i, sample in enumerate(samples):
            text = ""
            while True:
                piece = pieces[name, i].get()
                if piece.error is not None:
                    raise UserError(f"run={name}: the server refuses row {sample.id}: {piece.error.message}; check=0 serves without this check")
                text += piece.text
                if piece.finish is not None:
                    break
            answers[name].append(text)
    return answers
