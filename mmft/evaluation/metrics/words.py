"""Cut texts into words, in the two ways that the metrics need.

`normalise`  for answers (exact_match_normalized, contains, token_f1, vqa_accuracy, classes). The steps of SQuAD's evaluation:
             lower case, drop punctuation, drop a/an/the, one space between words. Extended to Unicode: NFKC first (full-width
             forms become plain ones), every Unicode punctuation mark counts, and each Han or kana character is a word, since
             those scripts put no spaces between words. A text is never normalised to nothing: an answer "A" stays "a" and "?"
             stays "?", otherwise an empty answer would agree with them. As in SQuAD, "3.5" and "35" become equal.
`tokenise`   for captions (bleu4, rouge_l, cider). Imitates the Penn Treebank tokeniser that COCO's evaluation runs in Java: lower
             case, contractions split ("it 's", "do n't"), numbers, times and hyphenated words whole, punctuation dropped. Unlike
             that tokeniser, brackets are dropped, and Han and kana are cut into characters or into jieba's words.
"""

from __future__ import annotations

import re
import string
import unicodedata

from ...common.errors import UserError

# Han (with extensions, and the iteration and zero signs), hiragana, katakana. Korean and Thai are not cut.
CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SEGMENTATIONS = ("characters", "jieba")
_CJK_CHARACTER = re.compile(f"([{CJK}])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """The text as words with one space between them, as the top of this file says."""
    text = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    text = bare if bare.strip() else text
    without = _ARTICLES.sub(" ", text)
    text = without if without.strip() else text
    return " ".join(_CJK_CHARACTER.sub(r" \1 ", text).split())


_DOTTED = r"(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|vs|jr|sr)\.(?!\w)"  # u.s. a.m. keep their dots, dr. too
_SPLIT_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_TOKEN = re.compile(
    rf"[{CJK}]+|{_DOTTED}|n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"
    rf"|[^\W{CJK}]+(?:(?:[-/&'@]|(?<=\d)[.,:](?=\d))[^\W{CJK}]+)*|[^\w\s]"
)
_KEPT = set("&%#@/*")  # punctuation that the Treebank tokeniser keeps as words; $ + = are symbols and stay anyway


def tokenise(text: str, segmentation: str = "characters") -> list[str]:
    """A caption's words, as the top of this file says. segmentation: of Han and kana, see SEGMENTATIONS."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = _SPLIT_WORDS.sub(lambda m: " ".join(g for g in m.groups() if g), text)
    tokens = [t for t in _TOKEN.findall(_CONTRACTION.sub(r" \1", text)) if t in _KEPT or not _is_mark(t)]
    return [word for token in tokens for word in (segment(token, segmentation) if has_cjk(token) else [token])]


def has_cjk(text: str) -> bool:
    return _CJK_CHARACTER.search(text) is not None


def segment(text: str, segmentation: str) -> list[str]:
    """A text of Han and kana in words."""
    if segmentation == "characters":
        return list(text)
    import jieba

    jieba.setLogLevel(60)  # it logs the loading of its dictionary
    return jieba.lcut(text)


def check_segmentation(name: str) -> None:
    """Raises UserError for an unknown segmentation."""
    if name not in SEGMENTATIONS:
        raise UserError(f"segmentation={name}: must be {' or '.join(SEGMENTATIONS)}")


def _is_mark(token: str) -> bool:
    return len(token) == 1 and unicodedata.category(token).startswith("P")
