"""generation.max_new_tokens: derive it from the references, check it against them, count the answers that reach it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.records import AnswerCounts, AnswerRecord
from ..data.sample import Sample

AUTO = "auto"
WITHOUT_REFERENCES = 64  # tokens; the limit if no reference is known
# The limit leaves an answer room beyond the longest reference, so that a slightly longer one is not cut.
MARGIN, EXTRA = 1.25, 8
CHUNK = 256  # references tokenised at once


@dataclass(frozen=True)
class TokenLimit:
    """max_new_tokens: the limit in use; None if the settings bound the length in another way (generation.max_length).

    longest: tokens of the longest reference with its end token, of `references` references in `rows` rows; 0 without any.
    too_long: number of rows of which no reference fits into the limit. derived: whether the limit comes from the references.
    """

    max_new_tokens: int | None
    longest: int = 0
    references: int = 0
    rows: int = 0
    too_long: int = 0
    derived: bool = False

    @property
    def note(self) -> str:
        """One line for the log."""
        if self.derived and self.references:
            return f"at most {self.max_new_tokens} new tokens (the longest of {self.references} references has {self.longest})"
        if self.derived:
            return f"at most {self.max_new_tokens} new tokens (no reference is known; generation.max_new_tokens=N changes it)"
        if self.too_long:
            return (f"at most {self.max_new_tokens} new tokens, too few for all references of {self.too_long} of {self.rows} rows: the longest has"
                    f" {self.longest} (generation.max_new_tokens={AUTO} leaves enough)")  # fmt: skip
        return f"at most {self.max_new_tokens} new tokens" if self.max_new_tokens is not None else ""


def token_limit(generation: Mapping[str, Any], samples: Iterable[Sample], tokenizer: Any) -> TokenLimit:
    """The limit that `generation` asks for, by the references of `samples`.

    auto: MARGIN times the longest reference plus EXTRA; WITHOUT_REFERENCES without any.
    """
    given = generation.get("max_new_tokens")
    if given == AUTO and generation.get("max_length") is not None:
        return TokenLimit(None)
    if given is None:
        return TokenLimit(None)
    longest = references = rows = too_long = 0
    for shortest_of_row, longest_of_row, count in _lengths(samples, tokenizer):
        rows += 1
        references += count
        longest = max(longest, longest_of_row)
        too_long += given != AUTO and shortest_of_row > given
    if given != AUTO:
        return TokenLimit(int(given), longest, references, rows, too_long)
    limit = int(MARGIN * longest) + EXTRA if references else WITHOUT_REFERENCES
    return TokenLimit(limit, longest, references, rows, 0, derived=True)


def _lengths(samples: Iterable[Sample], tokenizer: Any) -> Iterable[tuple[int, int, int]]:
    """(shortest, longest, number) of each row's references in tokens, the end token included; rows without references are left out."""
    chunk: list[list[str]] = []
    for sample in samples:
        if sample.references:
            reasoning = sample.messages[-1].get("reasoning_content") or ""  # the model writes it before its answer
            chunk.append([reasoning + reference for reference in sample.references])
        if len(chunk) == CHUNK:
            yield from _chunk_lengths(chunk, tokenizer)
            chunk = []
    if chunk:
        yield from _chunk_lengths(chunk, tokenizer)


def _chunk_lengths(chunk: Sequence[Sequence[str]], tokenizer: Any) -> Iterable[tuple[int, int, int]]:
    texts = [text for references in chunk for text in references]
    lengths = iter([len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]])
    for references in chunk:
        of_row = [next(lengths) for _ in references]
        yield min(of_row), max(of_row), len(of_row)


def count_answers(records: Sequence[AnswerRecord]) -> AnswerCounts:
    """What stands next to every score: rows measured, references per row, answers that reached the limit, rows left out."""
    measured = [r for r in records if r.get("prediction") is not None and r.get("references")]
    return {
        "rows": len(measured),
        "references_per_row": round(sum(len(r["references"]) for r in measured) / len(measured), 3) if measured else 0.0,
        "truncated": sum(bool(r.get("truncated")) for r in measured),
        "left_out": len(records) - len(measured),
    }
