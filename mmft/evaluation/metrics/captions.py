"""Metrics of captions as COCO's evaluation computes them (pycocoevalcap, without Java): BLEU-4, ROUGE-L, CIDEr; METEOR by nltk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score
from .words import check_segmentation, has_cjk, tokenise

if TYPE_CHECKING:
    from .draws import Draws, Resampled


class CaptionMetric(Metric):
    """segmentation: how Han and kana are cut into words, `characters` or `jieba`."""

    LIBRARIES = ("pycocoevalcap",)

    def __init__(self, segmentation: str = "characters") -> None:
        check_segmentation(segmentation)
        self.segmentation = segmentation

    @property
    def libraries(self) -> tuple[str, ...]:
        return (*self.LIBRARIES, *(["jieba"] if self.segmentation == "jieba" else []))

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        chinese = any(has_cjk(text) for r in rows for text in r["references"])
        return f"Han and kana are cut into {'jieba words' if self.segmentation == 'jieba' else 'characters'}" if chinese else ""

    def words(self, row: AnswerRecord) -> tuple[list[str], list[list[str]]]:
        """The words of the answer and of each reference."""
        return tokenise(str(row["prediction"]), self.segmentation), [tokenise(r, self.segmentation) for r in row["references"]]

    def texts(self, rows: Sequence[AnswerRecord]) -> tuple[list[str], list[list[str]]]:
        """(answers, references of each) as words with one space between them."""
        pairs = [self.words(row) for row in rows]
        return [" ".join(p) for p, _ in pairs], [[" ".join(r) for r in references] for _, references in pairs]

    def coco(self, rows: Sequence[AnswerRecord]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """(references, predictions) as pycocoevalcap takes them: {sample: [text, ...]}."""
        answers, references = self.texts(rows)
        return dict(enumerate(references)), {i: [answer] for i, answer in enumerate(answers)}


class Bleu4(CaptionMetric):
    """Corpus BLEU-4 with the closest reference length.

    Nothing is smoothed: a corpus whose answers all have fewer than four words scores nearly 0 even when right.
    """

    SCORES = (Score("bleu4", "BLEU-4"),)

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        from pycocoevalcap.bleu.bleu import Bleu

        score, _ = Bleu(4).compute_score(*self.coco(rows), verbose=0)
        return {"bleu4": float(score[3])}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        from .caption_draws import bleu4

        return {"bleu4": bleu4(*self.texts(rows), draws)}


class RougeL(CaptionMetric):
    """Mean ROUGE-L (beta 1.2, best precision and best recall over the references)."""

    SCORES = (Score("rouge_l", "ROUGE-L"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        from pycocoevalcap.rouge.rouge import Rouge

        prediction, references = self.words(row)
        texts = [" ".join(r) for r in references if r]
        if not prediction or not texts:  # pycocoevalcap takes an empty text for one empty word, and calls two of them equal
            return {"rouge_l": 0.0}
        return {"rouge_l": float(Rouge().calc_score([" ".join(prediction)], texts))}


class Cider(CaptionMetric):
    """CIDEr (the D variant: clipped, length-penalised) of a corpus, 0..10.

    A word's weight is log(samples / samples whose references hold it), counted over the set that is measured: values of different
    sets, or of different sizes of one set, do not compare. Words that occur in every sample's references weigh nothing, so a single
    sample has no CIDEr and 0.0 is returned. Answers of one word reach 2.5 at most (only one of the four n-gram lengths exists), two
    words 5, three 7.5.
    """

    SCORES = (Score("cider", "CIDEr", top=10.0),)

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        from pycocoevalcap.cider.cider import Cider as CocoCider

        references, predictions = self.coco(rows)
        if len(rows) < 2 or not any(text for texts in references.values() for text in texts):
            return {"cider": 0.0}
        score, _ = CocoCider().compute_score(references, predictions)
        return {"cider": float(score)}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        from .caption_draws import cider

        return {"cider": cider(*self.texts(rows), draws)}


class Meteor(CaptionMetric):
    """Mean METEOR of the best reference: words that are equal, have one stem (Porter) or one meaning (WordNet), less a penalty for their order.

    Parameters of Banerjee and Lavie 2005 (alpha 0.9, beta 3, gamma 0.5), as nltk and Hugging Face's evaluate compute it: meanings are looked up by
    stems, so a word whose stem is no word (automobile) has no synonyms. COCO's tables have METEOR 1.5 instead, with other parameters, function
    words and paraphrases: its values do not compare.
    """

    SCORES = (Score("meteor", "METEOR"),)
    LIBRARIES = ("nltk",)

    def ready(self) -> None:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise UserError("metrics.meteor needs the files of WordNet, 10 MB: python -m nltk.downloader wordnet; or leave meteor out of metrics=[...]") from error

    def row(self, row: AnswerRecord) -> MetricValues:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score

        prediction, references = self.words(row)
        return {"meteor": float(meteor_score([r for r in references if r] or [[]], prediction, wordnet=wordnet))}

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        return "; ".join(filter(None, ["METEOR of 2005 with WordNet, not COCO's METEOR 1.5", super().note(rows)]))
