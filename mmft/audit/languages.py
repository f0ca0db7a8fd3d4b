"""Tell the language, or at least the script, of a text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

LETTERS = 20  # a text with fewer letters is too short to tell its language
SURE = 0.8  # the least probability with which a language is named
_SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "THAI", "HEBREW", "BENGALI", "TAMIL")


def script(text: str) -> str:
    """The script of most letters of a text: `Latin`, `Chinese`, `Japanese`, ...; "" without letters."""
    counts = Counter(unicodedata.name(c, "").split(" ")[0].split("-")[0] for c in text if c.isalpha())
    kana = counts["HIRAGANA"] + counts["KATAKANA"]
    if kana and kana + counts["CJK"] >= max(counts.values()):
        return "Japanese"
    name = counts.most_common(1)[0][0] if counts else ""
    return {"CJK": "Chinese", "HANGUL": "Korean"}.get(name, name.capitalize() if name in _SCRIPTS else "other" if name else "")


def language_teller() -> Any:
    """text -> a name for its language: a code (en, de) where the package py3langid is installed and sure, else its script."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return lambda text: f"{script(text)} letters" if script(text) else "no letters"
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def tell(text: str) -> str:
        written = script(text)
        if not written:
            return "no letters"
        if written in ("Chinese", "Japanese", "Korean"):
            return written
        if sum(c.isalpha() for c in text) < LETTERS:
            return f"short, {written} letters"
        code, probability = identifier.classify(text)
        return code if probability >= SURE else f"unsure, {written} letters"

    return tell
