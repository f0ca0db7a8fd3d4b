"""A collated row as coloured pieces: prompt, image, loss, pad; in colour, with marks where there is none, or for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..collators.base import IGNORE, Collator

# kind -> (style on a terminal, the next token's style, mark before, mark after). Two styles take turns, so borders show.
STYLES = {
    "prompt": ("default", "bright_black", "", ""),
    "image": ("black on cyan", "black on cyan", "[", "]"),
    "loss": ("black on green", "black on bright_green", "[[", "]]"),
    "pad": ("black on white", "black on white", "(", ")"),
}


@dataclass(frozen=True)
class Piece:
    """One token, or a run of image or padding tokens. text: what it stands for in the row."""

    kind: str
    text: str
    ids: tuple[int, ...]


def pieces(collator: Collator, batch: dict[str, Any], row: int) -> list[Piece]:
    """The tokens of one row of a training batch, in order; together they hold every id of the row."""
    ids, mask, labels = (batch[k][row].tolist() for k in ("input_ids", "attention_mask", "labels"))
    image = collator.image_token_id
    kinds = [
        "pad" if not there else "image" if token == image else "loss" if label != IGNORE else "prompt"
        for token, there, label in zip(ids, mask, labels, strict=True)
    ]
    found: list[Piece] = []
    i = behind = 0
    while i < len(ids):
        kind, end = kinds[i], i + 1
        if kind in ("image", "pad"):
            while end < len(ids) and kinds[end] == kind:
                end += 1
            text = collator.tokenizer.decode(ids[i]) if kind == "image" else "pad"
            found.append(Piece(kind, f"{text} x{end - i}", tuple(ids[i:end])))
        else:
            text = _text(collator.tokenizer, ids, behind, i, end)
            # a character whose bytes are spread over tokens becomes readable with its last one
            while "\ufffd" in text and end - i < 8 and end < len(ids) and kinds[end] == kind:
                end += 1
                text = _text(collator.tokenizer, ids, behind, i, end)
            found.append(Piece(kind, text, tuple(ids[i:end])))
        i, behind = end, i
    return found


def _text(tokenizer: Any, ids: list[int], behind: int, start: int, end: int) -> str:
    """The text of ids[start:end] behind the piece ids[behind:start]: a leading space shows only behind something."""
    before = tokenizer.decode(ids[behind:start], skip_special_tokens=False) if start else ""
    whole = tokenizer.decode(ids[behind:end], skip_special_tokens=False)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end], skip_special_tokens=False)


def marked(row: list[Piece]) -> str:
    """Plain text: `[image x9]`, `[[what carries loss]]`, `(pad x3)`; a line break is written as \\n and broken."""
    out, last = [], "prompt"
    for piece in row:
        if piece.kind != last or piece.kind in ("image", "pad"):
            out += [STYLES[last][3], STYLES[piece.kind][2]]
        out.append(_visible(piece.text))
        last = piece.kind
    return "".join([*out, STYLES[last][3]])


def coloured(row: list[Piece]) -> Any:
    """The same as rich's Text."""
    from rich.text import Text

    text = Text()
    for i, piece in enumerate(row):
        text.append(_visible(piece.text), style=STYLES[piece.kind][i % 2])
    return text


def legend(colour: bool) -> Any:
    if not colour:
        return "prompt  [image]  [[carries loss]]  (padding)"
    from rich.text import Text

    text = Text()
    for kind in STYLES:
        text.append(f" {kind} ", style=STYLES[kind][0])
        text.append("  ")
    return text


def _visible(text: str) -> str:
    return text.replace("\n", "\\n\n")
