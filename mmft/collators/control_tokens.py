"""Tokenize rendered chat text with character offsets; control tokens that a user typed stay plain text.

Every control token in a message is wrapped in two private-use characters before the template renders it, and what is wrapped
is tokenized as plain characters. (transformers' `sanitize_control_tokens` gives no offsets, and the loss mask needs them.)
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Private-use characters have no meaning in any text; those in a user's text are removed.
OPEN, CLOSE = "\U000f3c00", "\U000f3c01"

Span = tuple[int, int]  # (start, end) characters of a text


# Names of special tokens that stand for pixels, or enclose them.
PIXEL_NAMES = re.compile(r"image|img|vision|video|frame|audio|media|row_\d+_col", re.IGNORECASE)

# Names that special tokens of turns and texts have, also in a vocabulary whose chat template does not use them.
FRAME_NAMES = re.compile(
    r"im_(start|end|sep)|(start|begin|end)_?of_?(text|turn|utterance|sentence|sequence|message)|\W(eo[stm]|bos|pad|unk|mask)(_id)?\W|header_id|^</?s>$",
    re.IGNORECASE,
)


def control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The tokens a user must not be able to type: special tokens, and added tokens that the template itself writes."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(t.content for t in added if t.special or (t.content in template and not t.content.isspace()))


def pixel_tokens(processor: Any, control: Iterable[str]) -> set[str]:
    """Those of `control` that stand for pixels: named as such, or an attribute of the processor."""
    named = {value for value in vars(processor).values() if isinstance(value, str)}
    return {token for token in control if token in named or PIXEL_NAMES.search(token)}


def frame_tokens(tokenizer: Any, control: Iterable[str], end_token_ids: Iterable[int]) -> set[str]:
    """Those of `control` that begin, end or fill a text or a turn: named as such, or known to the tokenizer or the model as such."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
    ids = [i for i in end_token_ids if i is not None]
    known = {getattr(tokenizer, name, None) for name in names} | set(tokenizer.convert_ids_to_tokens(ids))
    return {token for token in control if token in known or FRAME_NAMES.search(token)}


def mark(text: str, control: Iterable[str]) -> str:
    """The text with every control token wrapped in OPEN and CLOSE; where tokens overlap, the longest."""
    pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
    return re.sub(pattern, rf"{OPEN}\g<0>{CLOSE}", text.replace(OPEN, "").replace(CLOSE, ""))


def hide(text: str) -> tuple[str, list[Span]]:
    """The text with each marked run replaced by one space, and the spans of those runs in the original text.

    Some processors (InternVL's, Idefics3's) count a typed `<image>` as an image placeholder even when it is marked.
    """
    runs = [m.span() for m in re.finditer(f"{OPEN}.*?{CLOSE}", text, re.DOTALL)]
    pieces, last = [], 0
    for start, end in runs:
        pieces += [text[last:start], " "]
        last = end
    return "".join(pieces) + text[last:], runs


def unhide(position: int, runs: list[Span]) -> int:
    """The position in the original text of a position in the text that `hide` returned."""
    for start, end in runs:
        if position > start:
            position += end - start - 1
    return position


class Tokens:
    """A tokenizer together with the control tokens of its chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer, template)
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        first_ids = tokenizer("")["input_ids"]
        self.bos: str = tokenizer.bos_token if tokenizer.bos_token and first_ids[:1] == [tokenizer.bos_token_id] else ""

    def control_at(self, text: str, position: int) -> Span | None:
        """The span of the control token that follows `position`, with or without white space between."""
        start = position + len(text[position:]) - len(text[position:].lstrip())
        matches = [c for c in self.control if text.startswith(c, start)]
        return (start, start + len(max(matches, key=len))) if matches else None

    def encode(self, text: str, cuts: list[int] | None = None) -> tuple[list[int], list[Span]]:
        """The ids of a text and the character span of each; marked control tokens are tokenized as plain text.

        `cuts` are positions that no token may span.
        """
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end, literal in self._pieces(text, cuts or []):
            piece_ids, spans = self._piece(text[start:end], literal, first=not ids)
            ids += piece_ids
            offsets += [(start, end)] * len(piece_ids) if literal else [(a + start, b + start) for a, b in spans]
        return ids, offsets

    def decode(self, ids: torch.Tensor | list[list[int]], dropped: Container[int]) -> list[str]:
        """Generated ids (B, T) as texts, without the tokens in `dropped` and surrounding white space; other special tokens stay."""
        kept = [[i for i in map(int, row) if i not in dropped] for row in (ids if isinstance(ids, list) else ids.tolist())]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)]

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

    def _piece(self, piece: str, literal: bool, first: bool) -> tuple[list[int], list[Span]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": literal, "verbose": False}  # long texts are refused by mmft, with their row
        if not first:
            # After a newline, SentencePiece does not put its start-of-text space before the piece.
            out = self.tokenizer("\n" + piece, **options)
            n = len(self._newline)
            if out["input_ids"][:n] == self._newline:
                return out["input_ids"][n:], [(a - 1, b - 1) for a, b in out["offset_mapping"][n:]]
        out = self.tokenizer(piece, **options)
        return out["input_ids"], [tuple(o) for o in out["offset_mapping"]]
