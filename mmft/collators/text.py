"""Rendered chat text to ids with character offsets, in which control tokens a user typed stay plain text.

A typed control token is wrapped in two private-use characters before the template is rendered; what is wrapped is later
read as the characters it is. (transformers' `sanitize_control_tokens` gives no offsets, and the loss mask needs them.)
"""

from __future__ import annotations

import re
from typing import Any

OPEN, CLOSE = "\U000f3c00", "\U000f3c01"  # private use: they mean nothing in any text, and are dropped from a user's


def control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """What must not be read from a user's text: special tokens, and added tokens that the template itself writes."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(t.content for t in added if t.special or (t.content in template and not t.content.isspace()))


def mark(messages: list[dict[str, Any]], control: tuple[str, ...]) -> list[dict[str, Any]]:
    """The messages with every control token inside their texts wrapped in the markers; the longest token wins."""
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def marked(text: str) -> str:
        return pattern.sub(rf"{OPEN}\g<0>{CLOSE}", text.replace(OPEN, "").replace(CLOSE, ""))

    return [
        {**m, "content": [{**p, "text": marked(p["text"])} if p["type"] == "text" else p for p in m["content"]]} for m in messages
    ]


def hide(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with a space for every marked run, and the (start, end) of those runs in the text as it was.

    Some processors (InternVL's, Idefics3's) count a typed `<image>` as a place for an image even when it is marked;
    what they do not see they cannot count.
    """
    runs = [m.span() for m in re.finditer(f"{OPEN}.*?{CLOSE}", text, re.DOTALL)]
    pieces, last = [], 0
    for start, end in runs:
        pieces += [text[last:start], " "]
        last = end
    return "".join(pieces) + text[last:], runs


def unhide(at: int, runs: list[tuple[int, int]]) -> int:
    """A position in a hidden text as the position of the same character in the text as it was."""
    for start, end in runs:
        if at > start:
            at += end - start - 1
    return at


class Tokens:
    """A tokenizer together with what its chat template treats as control tokens."""

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer, template)
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        head = tokenizer("")["input_ids"]
        self.bos = tokenizer.bos_token if tokenizer.bos_token and head[:1] == [tokenizer.bos_token_id] else ""

    def control_at(self, text: str, at: int) -> tuple[int, int] | None:
        """(start, end) of the control token that follows position `at`, white space between them allowed."""
        start = at + len(text[at:]) - len(text[at:].lstrip())
        found = [c for c in self.control if text.startswith(c, start)]
        return (start, start + len(max(found, key=len))) if found else None

    def encode(self, text: str, cuts: list[int] | None = None) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the (start, end) characters of each; marked control tokens are plain text.

        `cuts` are positions no token may reach over.
        """
        pieces = self._pieces(text, cuts or [])
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, literal in pieces:
            got, spans = self._piece(text[start:end], literal, first=not ids)
            ids += got
            offsets += [(start, end)] * len(got) if literal else [(a + start, b + start) for a, b in spans]
        return ids, offsets

    def _pieces(self, text: str, cuts: list[int]) -> list[tuple[int, int, bool]]:
        """(start, end, literal) runs of a text; the markers themselves belong to none."""
        if not cuts and OPEN not in text:
            return [(0, len(text), False)]
        pieces, start, literal = [], 0, False
        for i, char in enumerate(text):
            if char in (OPEN, CLOSE) or i in cuts:
                if i > start:
                    pieces.append((start, i, literal))
                start = i + 1 if char in (OPEN, CLOSE) else i
                literal = char == OPEN if char in (OPEN, CLOSE) else literal
        if start < len(text):
            pieces.append((start, len(text), literal))
        return pieces

    def _piece(self, piece: str, literal: bool, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": literal}
        if not first:
            # a leading newline keeps SentencePiece from putting its start-of-text space before a piece
            out = self.tokenizer("\n" + piece, **options)
            n = len(self._newline)
            if out["input_ids"][:n] == self._newline:
                return out["input_ids"][n:], [(a - 1, b - 1) for a, b in out["offset_mapping"][n:]]
        out = self.tokenizer(piece, **options)
        return out["input_ids"], [tuple(o) for o in out["offset_mapping"]]
