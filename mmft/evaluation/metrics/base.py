"""Metric: the base class of a config's metrics. MetricSet: all metrics of a run."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import UserError
from ...common.records import AnswerRecord, ConfusionMatrix, MetricInfo, MetricValues
from ...config.build import build
from ...data.sample import Sample

if TYPE_CHECKING:
    from .draws import Draws, Resampled

log = logging.getLogger("mmft")
MAX_NAMED = 3  # failed rows named for each metric; the others are counted


@dataclass(frozen=True)
class Score:
    """One number that a metric gives. name: its key in summary.json. top: the value at which a report's bar is full; None: no bar."""

    name: str
    label: str
    higher_is_better: bool = True
    top: float | None = 1.0


class Metric:
    """A metric is a subclass of this and a yaml file in conf/metrics/. Its constructor's arguments are the yaml's keys.

    A subclass sets SCORES and implements `row`, or `corpus` for a value that is no mean over rows. LIBRARIES: packages it imports.
    NEEDS_PROBABILITIES: it reads those of evaluation.answer=choose. AFTER_TRAINING: training refuses it.
    """

    SCORES: ClassVar[tuple[Score, ...]] = ()
    LIBRARIES: ClassVar[tuple[str, ...]] = ()
    NEEDS_PROBABILITIES: ClassVar[bool] = False
    AFTER_TRAINING: ClassVar[bool] = False

    @property
    def scores(self) -> tuple[Score, ...]:
        return self.SCORES

    @property
    def libraries(self) -> tuple[str, ...]:
        return self.LIBRARIES

    def ready(self) -> None:
        """Raises UserError if something beside the rows is missing."""

    def problem(self, row: AnswerRecord) -> str | None:
        """Why this row cannot be scored, whatever the answer is; None if it can. Called before training, without a prediction."""
        return None if row.get("references") else "has no reference"

    def row(self, row: AnswerRecord) -> MetricValues:
        """The scores of one row, by name."""
        return {}

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        """The scores of all rows. values: what `row` returned for each of them. Default: the means."""
        return means([score.name for score in self.scores], values)

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        """`corpus` of every resample of the rows. Default: means over rows; a `corpus` of the subclass is called for some resamples.

        A subclass whose corpus score follows from sums over rows computes all resamples at once here.
        """
        if type(self).corpus is Metric.corpus:
            return draws.means([score.name for score in self.scores], values)
        return draws.recomputed(lambda numbers: self.corpus([rows[i] for i in numbers], [values[i] for i in numbers]))

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        """What has to be known to compare the scores with others: a signature, the segmentation of Chinese."""
        return ""

    def confusion(self, rows: Sequence[AnswerRecord]) -> ConfusionMatrix | None:
        """Counts of (reference, answer), for metrics of classes."""
        return None


def unanswered(sample: Sample) -> AnswerRecord:
    """What a metric knows of a row before it is answered."""
    return {
        "id": sample.id, "prompt": sample.prompt_text, "references": list(sample.references), "reference_boxes": sample.regions, "choices": list(sample.choices),
    }  # fmt: skip


def problem_of(metric: Metric, row: AnswerRecord) -> str | None:
    """What `metric.problem` says, or that it raised an error: it may be a user's own code."""
    try:
        return metric.problem(row)
    except Exception as error:
        return f"cannot be checked ({type(error).__name__}: {' '.join(str(error).split())[:160]})"


def _scores(metric: Metric, values: MetricValues) -> MetricValues:
    """What a metric returned, numbers of other libraries as Python's. Raises ValueError for a score that it has not declared or that is no finite number."""
    known = [score.name for score in metric.scores]
    result: MetricValues = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"gives {name!r}, and its SCORES are {', '.join(known)}")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"gives {name}={' '.join(repr(value).split())[:80]}, which is no finite number")
        result[name] = value if type(value) in (int, float) else float(value)
    return result


def means(names: Iterable[str], values: Sequence[MetricValues]) -> MetricValues:
    """The mean of each score over the rows that have it."""
    result: MetricValues = {}
    for name in names:
        numbers = [v[name] for v in values if name in v]
        if numbers:
            result[name] = sum(numbers) / len(numbers)
    return result


def _whole_sources(problems: Sequence[tuple[str, str]], samples: Sequence[Sample]) -> str:
    """` (all of chat)`: the sources of a mix of which no row is left."""
    left_out = {row for row, _ in problems}
    kept = {sample.source for sample in samples if sample.id not in left_out}
    sources = [source for source in dict.fromkeys(sample.source for sample in samples) if source not in kept]
    return f" (all of {', '.join(sources)})" if any(sources) else ""


@dataclass
class MetricSet:
    """The metrics of a run, by the names of their config sections. Raises UserError for a missing library and a name used twice."""

    metrics: Mapping[str, Metric]
    _failures: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        for key, metric in self.metrics.items():
            for library in metric.libraries:
                if importlib.util.find_spec(library) is None:
                    raise UserError(f"metrics.{key} needs the package {library}: pip install 'mmft[metrics]', or leave {key} out of metrics=[...]")
            for score in metric.scores:
                if score.name in owners:
                    raise UserError(f"metrics: {owners[score.name]} and {key} both give a score named {score.name}; keep one of them")
                owners[score.name] = key

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> MetricSet:
        """The metrics of the config's section `metrics`. Raises UserError."""
        found = cls({key: build(node, f"metrics.{key}") for key, node in section.items() if node is not None})
        for metric in found.metrics.values():
            metric.ready()
        return found

    def only(self, score: str) -> MetricSet:
        """The metric that gives a score, alone. Raises UserError if there is none."""
        for key, metric in self.metrics.items():
            if any(one.name == score for one in metric.scores):
                return MetricSet({key: metric})
        raise UserError(f"metrics: none gives {score}")

    @property
    def scores(self) -> list[Score]:
        return [score for metric in self.metrics.values() for score in metric.scores]

    def check_training(self) -> None:
        """Raises UserError for a metric that is not for training."""
        for key, metric in self.metrics.items():
            if metric.AFTER_TRAINING:
                raise UserError(f"metrics: {key} is never used in training; leave it out, and measure the finished run: mmft evaluate run=DIR metrics=[{key}]")

    def check(self, samples: Sequence[Sample], choice: str = "metrics", answer: str = "generate") -> None:
        """Refuse a metric that can score none of these rows; say how many rows a metric leaves out. Raises UserError.

        choice: the key that chose these metrics. answer: evaluation.answer.
        """
        for key, metric in self.metrics.items():
            if metric.NEEDS_PROBABILITIES and answer != "choose":
                raise UserError(f"{choice}: {key} needs the probabilities of evaluation.answer=choose, and this is evaluation.answer={answer}; leave {key} out, or choose")
            problems: list[tuple[str, str]] = []
            for sample in samples:
                if (problem := problem_of(metric, unanswered(sample))) is not None:
                    problems.append((sample.id, problem))
            if problems and len(problems) == len(samples):
                raise UserError(f"{choice}: {key} can score none of the {len(samples)} rows: row {problems[0][0]} {problems[0][1]}; leave {key} out of {choice}=[...]")
            if problems:
                rows = f"{len(problems)} of {len(samples)} rows{_whole_sources(problems, samples)}"
                log.info("%-14s %s leaves out %s, e.g. %s, which %s", "metrics", key, rows, *problems[0])

    def row(self, row: AnswerRecord) -> MetricValues:
        """All scores of one row. A metric that raises is named with the row, and its value is missing."""
        values: MetricValues = {}
        for key, metric in self.metrics.items():
            if row.get("prediction") is None or problem_of(metric, row) is not None:
                continue
            try:
                values |= _scores(metric, metric.row(row))
            except Exception as error:  # a metric may be a user's own code
                self.fail(key, f"row {row.get('id', row.get('index'))}", error)
        return values

    def with_sources(self, rows: Sequence[AnswerRecord]) -> MetricValues:
        """All scores over rows whose `metrics` are those of `row`, of a mix also those of each source as `SCORE/SOURCE`.

        Raises UserError if there is no row with an answer.
        """
        values = self.corpus(rows)
        for source in dict.fromkeys(row["source"] for row in rows if row.get("source") and row.get("prediction") is not None):
            values |= {f"{name}/{source}": value for name, value in self.corpus([row for row in rows if row.get("source") == source]).items()}
        return values

    def corpus(self, rows: Sequence[AnswerRecord]) -> MetricValues:
        """All scores over rows whose `metrics` are those of `row`. Raises UserError if there is no row with an answer."""
        answered = [r for r in rows if r.get("prediction") is not None]
        if not answered:
            raise UserError("metrics: no predictions to measure; is the evaluation split empty?")
        values: MetricValues = {}
        for key, metric in self.metrics.items():
            usable = [r for r in answered if problem_of(metric, r) is None]
            if not usable:
                continue
            try:
                values |= _scores(metric, metric.corpus(usable, [r.get("metrics") or {} for r in usable]))
            except Exception as error:
                self.fail(key, f"all {len(usable)} rows together", error)
        return values

    def info(self, rows: Sequence[AnswerRecord]) -> dict[str, MetricInfo]:
        """What a report has to know of each score: label, direction, bar, note, rows without a value."""
        result: dict[str, MetricInfo] = {}
        for key, metric in self.metrics.items():
            usable = [r for r in rows if r.get("prediction") is not None and problem_of(metric, r) is None]
            with_values = [r.get("metrics") or {} for r in usable]
            by_row = {name for v in with_values for name in v}
            no_row_worked = type(metric).row is not Metric.row and not by_row & {s.name for s in metric.scores}
            for score in metric.scores:
                result[score.name] = {"label": score.label, "higher_is_better": score.higher_is_better, "top": score.top}
                if note := self._note(key, metric, usable):
                    result[score.name]["note"] = note
                scored = sum(score.name in v for v in with_values) if score.name in by_row or no_row_worked else len(usable)
                if scored < len(rows):
                    result[score.name]["missing"] = len(rows) - scored
        return result

    def confusion(self, rows: Sequence[AnswerRecord]) -> ConfusionMatrix | None:
        """The confusion matrix of the first metric that has one."""
        return next((c for metric in self.metrics.values() if (c := metric.confusion([r for r in rows if r.get("prediction") is not None])) is not None), None)

    def _note(self, key: str, metric: Metric, rows: Sequence[AnswerRecord]) -> str:
        try:
            return metric.note(rows)
        except Exception as error:
            self.fail(key, "its note", error)
            return ""

    def fail(self, key: str, where: str, error: Exception) -> None:
        self._failures[key] = self._failures.get(key, 0) + 1
        if self._failures[key] <= MAX_NAMED:
            more = "; further failures are only counted" if self._failures[key] == MAX_NAMED else ""
            log.warning("mmft: metric %s: %s: %s: %s%s", key, where, type(error).__name__, " ".join(str(error).split())[:200], more)
