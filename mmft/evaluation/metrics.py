"""Scores of generated texts against references: pure functions of strings, nothing is downloaded or started.

Two ways to cut a text into words, because the metrics come from two traditions:

`normalise`  for answers (exact_match_normalized, contains, token_f1, vqa_accuracy). The steps of SQuAD's
             evaluation: lower case, drop punctuation, drop a/an/the, one space between words. Made unicode-aware:
             NFKC first (full-width forms become plain ones), every unicode punctuation mark counts, and each Han
             or kana character is a word, since those scripts put no spaces between words. A text is never
             normalised to nothing: an answer "A" stays "a" and "?" stays "?", or a model that says nothing would
             agree with them. As in SQuAD, "3.5" and "35" become equal.
`tokenise`   for captions (bleu4, rouge_l, cider). An imitation of the Penn Treebank tokeniser that COCO's
             evaluation starts Java for: lower case, contractions split ("it 's", "do n't"), numbers, times and
             hyphenated words whole, punctuation dropped. Unlike it, brackets are dropped and Han and kana
             characters stand alone.

All scores are fractions 0..1, cider excepted (0..10).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ..common.errors import UserError
from ..config.choices import METRICS

SAMPLE_METRICS = ("exact_match", "exact_match_normalized", "contains", "token_f1", "vqa_accuracy", "rouge_l")


# Han (with extensions, and the iteration and zero signs), hiragana, katakana. Korean and Thai are left alone.
CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"([{CJK}])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# VQA's own list of number words, which its evaluation reads as digits.
_NUMBER_WORDS = {w: str(n) for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])} | {"none": "0"}


def compute(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every metric over a set: predictions[i] against all of references[i].

    The metrics of `per_sample` are means over the samples; bleu4 and cider are of the whole corpus.
    Errors raised: UserError when there is nothing to measure, the lengths differ, or a sample has no reference.
    """
    if len(predictions) != len(references):
        raise UserError(f"metrics: {len(predictions)} predictions for {len(references)} lists of references")
    if not predictions:
        raise UserError("metrics: no predictions to measure; is the evaluation split empty?")
    rows = [per_sample(p, r, where=f"sample {i}") for i, (p, r) in enumerate(zip(predictions, references, strict=True))]
    scores = {name: sum(row[name] for row in rows) / len(rows) for name in SAMPLE_METRICS}
    cut = [tokenise(p) for p in predictions]
    cut_references = [[tokenise(r) for r in refs] for refs in references]
    scores["bleu4"] = bleu4(cut, cut_references)
    scores["cider"] = cider(cut, cut_references)
    return {name: scores[name] for name in METRICS}


def per_sample(prediction: str, references: Sequence[str], where: str = "sample") -> dict[str, float]:
    """The metrics that one sample has by itself; `where` names it in errors. Errors raised: UserError."""
    if isinstance(references, str) or not references:
        raise UserError(f"metrics: {where} has no list of references")
    words, reference_words = normalise(prediction).split(), [normalise(r).split() for r in references]
    return {
        "exact_match": float(prediction.strip() in {r.strip() for r in references}),
        "exact_match_normalized": float(words in reference_words),
        "contains": float(any(_holds(words, r) for r in reference_words)),
        "token_f1": max(_f1(words, r) for r in reference_words),
        "vqa_accuracy": vqa_accuracy(prediction, references),
        "rouge_l": rouge_l(tokenise(prediction), [tokenise(r) for r in references]),
    }


# --- answers ---------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """The text as words with one space between them, cleaned as the top of this file says."""
    text = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    text = bare if bare.strip() else text
    without = _ARTICLES.sub(" ", text)
    text = without if without.strip() else text
    return " ".join(_CJK_CHARACTER.sub(r" \1 ", text).split())


def _holds(words: list[str], wanted: list[str]) -> bool:
    """Whether `wanted` stands in `words` as a run of whole words."""
    if not wanted:
        return not words
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _f1(words: list[str], wanted: list[str]) -> float:
    """SQuAD's F1 of two bags of words; two empty texts agree."""
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2.0 * common / (len(words) + len(wanted))  # = 2PR/(P+R) with P, R = common / each length


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA's consensus accuracy: min(people who gave this answer / 3, 1).

    Formula: Antol et al., "VQA: Visual Question Answering", 2015, section 3, and the evaluation page of VQA v2,
    which averages it over every set of nine of the ten people. So with ten or more references: the mean over all
    sets that leave one out. With fewer there are no nine others, and one answer could never score 1: then it is
    min(agreeing / min(3, number of references), 1); with a single reference that is a normalised exact match.
    Texts are compared by `normalise` with number words read as digits; the official script's table of contractions
    is not needed, for normalising drops apostrophes.
    """
    answer = _vqa_form(prediction)
    agree = sum(_vqa_form(r) == answer for r in references)
    people = len(references)
    if people < 10:
        return min(agree / min(3, people), 1.0)
    left_out_agrees = min((agree - 1) / 3, 1.0) if agree else 0.0
    return (agree * left_out_agrees + (people - agree) * min(agree / 3, 1.0)) / people


def _vqa_form(text: str) -> list[str]:
    return [_NUMBER_WORDS.get(w, w) for w in normalise(text).split()]


# --- captions --------------------------------------------------------------------------------------------------

_DOTTED = r"(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|vs|jr|sr)\.(?!\w)"  # u.s. a.m. keep their dots, dr. too
_SPLIT_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_TOKEN = re.compile(
    rf"[{CJK}]|{_DOTTED}|n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"
    rf"|[^\W{CJK}]+(?:(?:[-/&'@]|(?<=\d)[.,:](?=\d))[^\W{CJK}]+)*|[^\w\s]"
)
_KEPT = set("&%#@/*")  # punctuation that the Treebank tokeniser keeps as words; $ + = are symbols and stay anyway


def tokenise(text: str) -> list[str]:
    """A caption's words, cut as the top of this file says."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = _SPLIT_WORDS.sub(lambda m: " ".join(g for g in m.groups() if g), text)
    return [t for t in _TOKEN.findall(_CONTRACTION.sub(r" \1", text)) if t in _KEPT or not _is_mark(t)]


def _is_mark(token: str) -> bool:
    return len(token) == 1 and unicodedata.category(token).startswith("P")


def bleu4(predictions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """Corpus BLEU-4 with the closest reference length, as COCO's evaluation computes it (pycocoevalcap).

    Nothing is smoothed: a corpus whose answers all have fewer than four words scores nearly 0 even when right.
    """
    from pycocoevalcap.bleu.bleu import Bleu

    score, _ = Bleu(4).compute_score(*_coco(predictions, references), verbose=0)
    return float(score[3])


def rouge_l(prediction: list[str], references: Sequence[list[str]]) -> float:
    """ROUGE-L of one sample (beta 1.2, best precision and best recall over the references; pycocoevalcap)."""
    from pycocoevalcap.rouge.rouge import Rouge

    kept = [" ".join(r) for r in references if r]
    if not prediction or not kept:  # pycocoevalcap would take the empty text for one empty word, and call two of them equal
        return 0.0
    return float(Rouge().calc_score([" ".join(prediction)], kept))


def cider(predictions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """CIDEr (the D variant: clipped, length-penalised) of a corpus, 0..10; pycocoevalcap.

    A word's weight is log(samples / samples whose references hold it), counted over the very set that is measured:
    figures of different sets, or of different sizes of one set, do not compare. Words that every sample's references
    hold weigh nothing, so a single sample has no CIDEr and 0.0 is returned. Answers of one word reach 2.5 at most
    (only one of the four n-gram lengths exists), two words 5, three 7.5.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(predictions) < 2 or not any(r for refs in references for r in refs):
        return 0.0
    score, _ = Cider().compute_score(*_coco(predictions, references))
    return float(score)


def _coco(predictions, references):
    """(references, predictions) as pycocoevalcap takes them: {sample: [text, ...]}."""
    gts = {i: [" ".join(r) for r in refs] for i, refs in enumerate(references)}
    return gts, {i: [" ".join(p)] for i, p in enumerate(predictions)}
