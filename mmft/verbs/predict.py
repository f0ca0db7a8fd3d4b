"""`mmft predict run=DIR input=...`: answers for images, tables of questions and prepared splits, generated or chosen; `chat=true`: a conversation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import Incomplete, UserError, at_least
from ..common.hashing import key_of
from ..config.plain import to_plain

if TYPE_CHECKING:
    from ..common.records import AnswerRecord
    from ..evaluation.answer_table import AnswerFile
    from ..evaluation.choose import Chooser
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.inputs import Asked, Message
    from ..evaluation.metrics.base import MetricSet
    from ..runs.directory import Run
    from ..runs.open import OpenedRun, Opener

log = logging.getLogger("mmft")


@dataclass
class Predict:
    """The keys of conf/task/predict.yaml. Inputs that cannot be read are named on stderr and left unanswered (exit code 1).

    With out=, answers are kept as they come: a command that was killed goes on where it was when it is given again.
    """

    run: str | None = None
    checkpoint: int | None = None
    input: Any = None
    prompt: Any = None
    together: bool = False
    choose: Any = None
    out: str | None = None
    chat: bool = False
    backend: str = "transformers"
    vllm: Any = None
    check: int = 4

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> list[AnswerRecord] | list[Message] | Path:
        """Print the answers, or write them to out= and return its path. Raises UserError; Incomplete if some inputs could not be answered."""
        from ..serving.vllm.choice import opener_for

        at_least(self, check=0)
        if self.chat:
            return self._chat(cfg, overrides)
        with opener_for(self.backend, self.vllm, self.check, None) as opener:
            return self._predict(cfg, overrides, opener)

    def _chat(self, cfg: DictConfig, overrides: list[str]) -> list[Message]:
        from ..runs.open import any_config, open_any
        from ..serving.chat import chat

        if self.backend != "transformers":
            raise UserError(f"chat=true: goes with backend=transformers; mmft serve backend={self.backend} answers conversations, too")
        any_config(self.run, cfg, overrides, self.checkpoint)
        return chat(open_any(self.run, cfg, overrides, self.checkpoint))

    def _predict(self, cfg: DictConfig, overrides: list[str], opener: Opener) -> list[AnswerRecord] | Path:
        from ..evaluation.answer import AskedSamples
        from ..evaluation.answer_table import AnswerFile
        from ..evaluation.metrics.defaults import metric_set

        questions = self.questions(cfg, overrides)
        asked, chooser = questions.asked, questions.chooser
        metrics = metric_set(to_plain(questions.cfg.get("metrics")))
        if chooser is not None and self.backend == "vllm":
            raise UserError("choose=...: backend=vllm generates answers and does not choose; use backend=transformers")
        if self.out is None:
            opened = opener(self.run, cfg, overrides, self.checkpoint)
            records = print_answers(opened, questions.evaluator(opened), asked)
            raise_incomplete(finish(records, None, metrics), len(records))
            return records
        sets = {sample.choices for sample in AskedSamples.of(asked)} if chooser else set()
        with AnswerFile(Path(self.out), None if chooser is None else list(sets.pop()) if len(sets) == 1 else []) as table:
            opened = opener(self.run, cfg, overrides, self.checkpoint)
            write_answers(table, opened, questions.evaluator(opened), asked)
            unanswered = finish(table.records(), table, metrics)
        if questions.run is not None:
            questions.run.record("predict", overrides, [table.path])
        raise_incomplete(unanswered, len(asked), f" (all in {table.path})")
        return table.path

    def questions(self, cfg: DictConfig, overrides: list[str], given: Sequence[Asked] | None = None) -> Questions:
        """What is asked and how it is answered, checked before weights are read. given: prompts, in place of input=. Raises UserError."""
        from ..evaluation.answer import prompts_of, with_choices
        from ..evaluation.choose import Chooser
        from ..runs.open import any_config

        run, run_cfg = any_config(self.run, cfg, overrides, self.checkpoint)
        if given is None:
            given = prompts_of(self.input, self.prompt, self.together, run.path if run else None, run_cfg)
        chooser = Chooser.from_settings({**to_plain(run_cfg.evaluation), **({"answer": "choose"} if self.choose is not None else {})})
        return Questions(run, run_cfg, with_choices(given, self.choose, run_cfg), chooser)

    def answers(self, cfg: DictConfig, overrides: list[str], opener: Opener, given: Sequence[Asked] | None = None) -> list[AnswerRecord]:
        """The answers alone, one record for each prompt; nothing is printed. Raises UserError."""
        from ..evaluation.answer import answer_prompts
        from ..serving.vllm.choice import opener_for

        questions = self.questions(cfg, overrides, given)
        with opener_for(self.backend, self.vllm, self.check, opener) as chosen:
            opened = chosen(self.run, cfg, overrides, self.checkpoint)
            evaluator = questions.evaluator(opened)
            evaluator.announce = False
            return list(answer_prompts(evaluator, opened.model, questions.asked, opened.settings["seed"]))


@dataclass(frozen=True)
class Questions:
    """run: None for a model without one. cfg: the run's config with the command's changes. chooser: None where answers are generated."""

    run: Run | None
    cfg: DictConfig
    asked: Sequence[Asked]
    chooser: Chooser | None

    def evaluator(self, opened: OpenedRun) -> Evaluator:
        """The evaluator that answers these questions."""
        from ..evaluation.answer import AskedSamples

        evaluator = opened.evaluator(AskedSamples.of(self.asked))
        evaluator.chooser = self.chooser
        return evaluator


def print_answers(opened: OpenedRun, evaluator: Evaluator, asked: Sequence[Asked]) -> list[AnswerRecord]:
    """Print the answers in the order of the inputs, each as soon as it is there."""
    from ..evaluation.answer import answer_prompts

    evaluator.announce = False  # stdout has the answers alone
    records = []
    for record in answer_prompts(evaluator, opened.model, asked, opened.settings["seed"]):
        records.append(record)
        if record.get("error"):
            complain(record["error"])
        else:
            text = str(record["prediction"])
            chances = ", ".join(f"{choice} {p:.3f}" for choice, p in (record.get("probabilities") or {}).items())
            print(text if len(asked) == 1 else f"{record['id']}\n    {text}{f'  ({chances})' if chances else ''}", flush=True)
            if chances and len(asked) == 1:
                print(chances, file=sys.stderr)
    return records


def write_answers(table: AnswerFile, opened: OpenedRun, evaluator: Evaluator, asked: Sequence[Asked]) -> None:
    """Log the answers as they come. Those that an earlier command of the same kind has logged are not generated again."""
    from ..evaluation.answer import answers_as_finished, asked_identity

    how = None if evaluator.chooser is None else evaluator.chooser.norm
    generation = key_of({k: v for k, v in evaluator.generation.items() if v is not None}, opened.settings["seed"], *([] if how is None else [how]))
    told = table.begin({**opened.identity(), **asked_identity(asked), "generation setting": generation})
    if told:
        log.info("%-14s %s", "answers", told)
    for record in table.records():
        if record.get("error"):
            complain(record["error"])
    try:  # a continued command draws other numbers than it has drawn before
        for _, record in answers_as_finished(evaluator, opened.model, asked, opened.settings["seed"] + len(table.done), table.done):
            table.add(record)
            if record.get("error"):
                complain(record["error"])
    except KeyboardInterrupt:
        if table.done:
            complain(f"{len(table.done)} of {len(asked)} answers are kept; the same command goes on with the others")
        raise


def finish(records: Iterable[AnswerRecord], table: AnswerFile | None, metrics: MetricSet) -> int:
    """Write the table and show the metrics of answers with references; the number of inputs without an answer. Raises UserError if there is none."""
    total = answered = truncated = 0
    referenced: list[AnswerRecord] = []
    for record in records:
        total, answered, truncated = total + 1, answered + (not record.get("error")), truncated + bool(record.get("truncated"))
        if not record.get("error") and record["references"]:
            referenced.append(record)
    if not answered:
        if table is not None:
            table.drop()
        raise UserError(f"none of the {total} inputs could be answered; nothing was written" if total > 1 else "nothing was answered")
    if table is not None:
        table.finish()
        log.info("%d answers in %s", answered, table.path)
    if len(referenced) > 1:
        from ..evaluation.token_limit import count_answers
        from ..reports import terminal

        scores, counts = metrics.corpus(referenced), count_answers(referenced)
        values = {**{k: f"{v:.3f}" for k, v in scores.items()}, "references per row": f"{counts['references_per_row']:g}",
                  "rows left out": total - counts["rows"]}  # fmt: skip
        terminal.show(terminal.pairs_table(f"{len(referenced)} rows with references", values))
    if truncated:
        log.info("%d of %d answers stopped at the limit of new tokens (generation.max_new_tokens=N raises it)", truncated, answered)
    return total - answered


def raise_incomplete(unanswered: int, total: int, where: str = "") -> None:
    """Raises Incomplete if some inputs have no answer."""
    if unanswered:
        raise Incomplete(f"{unanswered} of {total} inputs could not be answered, each is named above; the other {total - unanswered} were{where}")


def complain(text: str) -> None:
    """Print a line to stderr above the progress bar."""
    from tqdm import tqdm

    tqdm.write(f"mmft: {text}", file=sys.stderr)
