"""BLEU and chrF as sacrebleu computes them, with its signature; both 0..100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...common.private_api import sacrebleu_counts
from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score
from .words import check_segmentation, has_cjk, tokenise

if TYPE_CHECKING:
    from .draws import Draws, Resampled


class _SacreMetric(Metric):
    LIBRARIES = ("sacrebleu",)

    def prepare(self, text: str) -> str:
        return text

    def scorer(self, rows: Sequence[AnswerRecord]) -> Any:
        """sacrebleu's metric object."""
        raise NotImplementedError

    def texts(self, rows: Sequence[AnswerRecord]) -> tuple[list[str], list[list[str | None]]]:
        """(answers, streams of references). Rows with fewer references than others have None in the further streams, as sacrebleu wants it."""
        most = max(len(r["references"]) for r in rows)
        streams = [[self.prepare(r["references"][i]) if i < len(r["references"]) else None for r in rows] for i in range(most)]
        return [self.prepare(str(r["prediction"])) for r in rows], streams

    def corpus_score(self, rows: Sequence[AnswerRecord]) -> tuple[float, str]:
        """(score, signature)."""
        scorer = self.scorer(rows)
        return float(scorer.corpus_score(*self.texts(rows)).score), str(scorer.get_signature())

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        return {self.SCORES[0].name: self.corpus_score(rows)[0]}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        import numpy as np

        counts, score = sacrebleu_counts(self.scorer(rows), *self.texts(rows))
        return {self.SCORES[0].name: np.array([score(sums) for sums in draws.sums(np.array(counts, dtype=np.float64))])}

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        return f"sacrebleu {self.corpus_score(rows)[1]}" if rows else ""


class SacreBleu(_SacreMetric):
    """tokenize: sacrebleu's tokenizer (13a, zh, char, intl, ...); null: zh if a reference has Han characters, else 13a.

    segmentation=jieba cuts Han and kana into jieba's words instead, and then splits at white space.
    """

    SCORES = (Score("bleu", "BLEU", top=100.0),)

    def __init__(self, tokenize: str | None = None, lowercase: bool = False, segmentation: str = "characters") -> None:
        check_segmentation(segmentation)
        self.tokenize, self.lowercase, self.segmentation = tokenize, lowercase, segmentation

    @property
    def libraries(self) -> tuple[str, ...]:
        return (*self.LIBRARIES, *(["jieba"] if self.segmentation == "jieba" else []))

    def prepare(self, text: str) -> str:
        return " ".join(tokenise(text, "jieba")) if self.segmentation == "jieba" else text

    def scorer(self, rows: Sequence[AnswerRecord]) -> Any:
        from sacrebleu.metrics import BLEU

        chinese = any(has_cjk(text) for r in rows for text in r["references"])
        tokenize = "none" if self.segmentation == "jieba" else self.tokenize or ("zh" if chinese else "13a")
        return BLEU(tokenize=tokenize, lowercase=self.lowercase, force=True)

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        return super().note(rows) + (", words by jieba" if self.segmentation == "jieba" else "")


class Chrf(_SacreMetric):
    """Character n-gram F-score; word_order=2 is chrF++."""

    SCORES = (Score("chrf", "chrF", top=100.0),)

    def __init__(self, word_order: int = 0) -> None:
        self.word_order = word_order

    def scorer(self, rows: Sequence[AnswerRecord]) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF(word_order=self.word_order)

    def row(self, row: AnswerRecord) -> MetricValues:
        return {"chrf": float(self.scorer([row]).sentence_score(str(row["prediction"]), row["references"]).score)}
