"""Metric of JSON answers: validity, precision, recall and F1 of the fields, agreement with a JSON Schema (jsonschema)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score, means

if TYPE_CHECKING:
    from .draws import Draws, Resampled

_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)
_INVALID = object()  # a text that is not JSON; None is JSON's null


class Json(Metric):
    """A field is a path of keys with a value that is no object or list: {"a": [{"b": 1}]} has the field a[].b = 1.

    The order of lists does not count, a field that occurs twice counts twice. Numbers are equal by value (3 and 3.0), texts by their
    characters without surrounding white space. An answer that is not JSON has no fields. A Markdown fence around the answer is
    removed. json_precision, json_recall and json_f1 of the corpus are those of all its fields together. schema: a JSON Schema, as a
    mapping or a file's path; json_schema is the share of answers that satisfy it.
    """

    SCORES = (
        Score("json_f1", "JSON fields, F1"), Score("json_precision", "JSON fields, precision"), Score("json_recall", "JSON fields, recall"),
        Score("json_valid", "Valid JSON"),
    )  # fmt: skip

    def __init__(self, schema: dict[str, Any] | str | None = None) -> None:
        self.validator: Any = None
        if schema is not None:
            self.validator = _validator(schema)

    @property
    def scores(self) -> tuple[Score, ...]:
        return (*self.SCORES, Score("json_schema", "Satisfies the schema")) if self.validator is not None else self.SCORES

    def problem(self, row: AnswerRecord) -> str | None:
        if (problem := super().problem(row)) is not None:
            return problem
        return None if any(parse(r) is not _INVALID for r in row["references"]) else f"has a reference that is not JSON: {row['references'][0][:60]!r}"

    def row(self, row: AnswerRecord) -> MetricValues:
        answer = parse(str(row["prediction"]))
        common, given, wanted = self._counts(row)
        values = {**_rates(common, given, wanted), "json_valid": float(answer is not _INVALID)}
        if self.validator is not None:
            values["json_schema"] = float(answer is not _INVALID and self.validator.is_valid(answer))
        return values

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        common, given, wanted = (sum(counts) for counts in zip(*map(self._counts, rows), strict=True))
        return {**_rates(common, given, wanted), **means([s.name for s in self.scores if s.name in ("json_valid", "json_schema")], values)}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        import numpy as np

        from .draws import ratio

        common, given, wanted = draws.sums(np.array([self._counts(row) for row in rows])).T
        agree = (given == 0) & (wanted == 0)  # two sides without fields, see _rates
        rates = {"json_f1": ratio(2 * common, given + wanted), "json_precision": ratio(common, given), "json_recall": ratio(common, wanted)}
        return {**{k: np.where(agree, 1.0, v) for k, v in rates.items()}, **draws.means([s.name for s in self.scores if s.name in ("json_valid", "json_schema")], values)}

    def _counts(self, row: AnswerRecord) -> tuple[int, int, int]:
        """(common fields, fields of the answer, fields of the reference) for the reference with the best F1."""
        answer = parse(str(row["prediction"]))
        given = Counter(fields(answer)) if answer is not _INVALID else Counter()
        counts = []
        for reference in map(parse, row["references"]):
            if reference is not _INVALID:
                wanted = Counter(fields(reference))
                counts.append(((given & wanted).total(), given.total(), wanted.total()))
        return max(counts, key=lambda c: _rates(*c)["json_f1"])


def parse(text: str) -> Any:
    """The value of a JSON text, _INVALID for any other text."""
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # what is nested a thousand times deep is a loop of the model's, as in `[[[[[`
        return _INVALID


def fields(value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of every field, in no particular order; an empty object or list is a field of its own. Answers may be nested deeper than Python's stack."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
        elif isinstance(value, list) and value:
            waiting += [(f"{path}[]", item) for item in value]
        elif isinstance(value, bool) or value is None:
            yield path, str(value)
        elif isinstance(value, (int, float)):
            yield path, value  # 3 and 3.0 are equal and have one hash; a number of 400 digits is no float
        else:
            yield path, value.strip() if isinstance(value, str) else ("{}" if isinstance(value, dict) else "[]")


def _rates(common: int, given: int, wanted: int) -> MetricValues:
    """Precision, recall and F1; two sides without fields agree."""
    if not given and not wanted:
        return {"json_f1": 1.0, "json_precision": 1.0, "json_recall": 1.0}
    return {"json_f1": 2 * common / (given + wanted), "json_precision": common / given if given else 0.0, "json_recall": common / wanted if wanted else 0.0}


def _validator(schema: dict[str, Any] | str) -> Any:
    """jsonschema's validator. Raises UserError for a file that cannot be read and for a schema that is not one."""
    try:
        import jsonschema
    except ImportError:
        raise UserError("metrics.json.schema needs the package jsonschema: pip install 'mmft[metrics]'") from None
    if isinstance(schema, str):
        try:
            schema = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"metrics.json.schema={schema}: cannot be read as JSON: {error}") from None
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"metrics.json.schema: is not a JSON Schema: {error.message}") from None
    return kind(schema)
