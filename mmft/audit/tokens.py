"""Show a collated row token by token, by kind (prompt, image, loss, pad): in colour, with marks, or for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..collators.base import IGNORE
from ..collators.types import Batch, BatchMaker

if TYPE_CHECKING:
    from rich.text import Text

# kind -> (style on a terminal, style of every second token, mark before, mark after). Alternating styles show where tokens end.
STYLES = {
    "prompt": ("default", "bright_black", "", ""),
    "image": ("black on cyan", "black on cyan", "[", "]"),
    "loss": ("black on green", "black on bright_green", "[[", "]]"),
    "pad": ("black on white", "black on white", "(", ")"),
}


@dataclass(frozen=True)
class Piece:
    """One token, or a run of image or padding tokens. text: as it appears in the row. weight: of its loss."""

    kind: str
    text: str
    ids: tuple[int, ...]
    weight: float = 1.0

    @property
    def times(self) -> str:
        """The weight of its loss as text; "" where it weighs 1 or carries none."""
        return f"x{self.weight:g} " if self.kind == "loss" and self.weight != 1 else ""


def pieces(collator: BatchMaker, batch: Batch, row: int) -> list[Piece]:
    """All tokens of one row of a training batch, in order."""
    ids, mask, labels = (batch[k][row].tolist() for k in ("input_ids", "attention_mask", "labels"))
    image = collator.image_token_id
    weights = batch["loss_weights"][row].tolist() if "loss_weights" in batch else [1.0] * len(ids)
    kinds = [
        "pad" if not attended else "image" if token == image else "loss" if label != IGNORE else "prompt"
        for token, attended, label in zip(ids, mask, labels, strict=True)
    ]
    result: list[Piece] = []
    i = previous = 0
    while i < len(ids):
        kind, end = kinds[i], i + 1
        if kind in ("image", "pad"):
            while end < len(ids) and kinds[end] == kind:
                end += 1
            text = collator.tokenizer.decode(ids[i]) if kind == "image" else "pad"
            result.append(Piece(kind, f"{text} x{end - i}", tuple(ids[i:end])))
        else:
            text = _text(collator.tokenizer, ids, previous, i, end)
            # the bytes of one character may be spread over several tokens; it can be decoded with its last one
            while "\ufffd" in text and end - i < 8 and end < len(ids) and kinds[end] == kind:
                end += 1
                text = _text(collator.tokenizer, ids, previous, i, end)
            result.append(Piece(kind, text, tuple(ids[i:end]), round(weights[i], 6)))
        i, previous = end, i
    return result


def _text(tokenizer: Any, ids: list[int], previous: int, start: int, end: int) -> str:
    """The text of ids[start:end] after the piece ids[previous:start]; some tokenizers drop a leading space at the start of a text."""
    before = tokenizer.decode(ids[previous:start], skip_special_tokens=False) if start else ""
    whole = tokenizer.decode(ids[previous:end], skip_special_tokens=False)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end], skip_special_tokens=False)


def marked(row: list[Piece]) -> str:
    """Plain text: `[image x9]`, `[[tokens with loss]]`, `[[x0.3 with that weight]]`, `(pad x3)`; a line break is shown as \\n and starts a new line."""
    out, last, times = [], "prompt", ""
    for piece in row:
        if piece.kind != last or piece.kind in ("image", "pad") or piece.times != times:
            out += [STYLES[last][3], STYLES[piece.kind][2], piece.times]
        out.append(_visible(piece.text))
        last, times = piece.kind, piece.times
    return "".join([*out, STYLES[last][3]])


def coloured(row: list[Piece]) -> Text:
    """The row in colour."""
    from rich.text import Text

    text, times = Text(), ""
    for i, piece in enumerate(row):
        if piece.times and piece.times != times:
            text.append(piece.times, style="bold")
        text.append(_visible(piece.text), style=STYLES[piece.kind][i % 2])
        times = piece.times
    return text


def legend(colour: bool) -> Text | str:
    """How the kinds of tokens look, in colour or with marks."""
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
