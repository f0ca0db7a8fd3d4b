"""Rows with two answers, or with one that is labelled good or bad: TRL's, ms-swift's, RLHF-V's and LLaMA-Factory's forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..wording import shown
from .cells import UnusableRow, plain_text, structure_in_text

TRUE_OR_FALSE = {"true": True, "false": False, "1": True, "0": False}
REJECTED = ("rejected_response", "rejected_messages", "rejected")  # keys of records: ms-swift's two, TRL's


def rejected_answer(value: Any, chosen: Any, name: str) -> str:
    """The text of a rejected answer; "" for an empty one. name: of the cell in messages.

    value: the text, a message, or a list of messages whose last one is the answer. chosen: the chosen answer in any of these forms; where both
    are lists of messages, those before the answer must be the same. Raises UnusableRow.
    """
    value = structure_in_text(value)
    if value is None or value != value:  # NaN is an empty cell
        return ""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return plain_text(value, name).strip()
    if not value:
        return ""
    if all(isinstance(item, str) for item in value):
        if len(value) > 1:
            raise UnusableRow(f"several rejected answers: {name} holds {len(value)}; make a row of each")
        return str(value[0]).strip()
    turns = [_turn(item, name) for item in value]
    chosen = structure_in_text(chosen)
    if len(turns) > 1 or isinstance(chosen, (list, tuple)) and len(chosen) > 1:
        before = [_turn(item, "the chosen answer") for item in chosen] if isinstance(chosen, (list, tuple)) else []
        # a conversation's earlier turns may stand in one of the two only
        if len(turns) > 1 and turns[:-1] != before[:-1]:
            raise UnusableRow(f"broken pair: {name} differs from the chosen answer before the last turn; two answers to one conversation are compared")
    if turns[-1][0] not in ("assistant", "gpt"):
        raise UnusableRow(f"broken pair: the last turn of {name} is the {shown(turns[-1][0])}'s, not an answer")
    return turns[-1][1].strip()


def _turn(item: Any, name: str) -> tuple[str, str]:
    """(role, text) of a message. Raises UnusableRow."""
    if not isinstance(item, Mapping):
        raise UnusableRow(f"broken pair: {name} holds a turn that is not an object")
    content = item.get("value", item.get("content"))
    if isinstance(content, (list, tuple)):
        content = "".join(plain_text(p.get("text", ""), name) for p in content if isinstance(p, Mapping))
    return str(item.get("from", item.get("role"))), "" if content is None else plain_text(content, name)


def good_or_bad(value: Any) -> bool | None:
    """Whether a label says that an answer is good: true, false, 1 or 0, also as text; None for anything else."""
    if isinstance(value, (str, int)):
        return TRUE_OR_FALSE.get(str(value).strip().lower())
    return None


def pair_in(cell: Any) -> Mapping[str, Any] | None:
    """The object in a cell of RLHF-V: {"question": ..., "chosen": ..., "rejected": ...}, also as text; None for any other cell."""
    value = structure_in_text(cell) if isinstance(cell, str) else cell
    return value if isinstance(value, Mapping) and {"chosen", "rejected"} <= value.keys() else None


def record_answers(values: Mapping[str, Any], turns: Any) -> tuple[str | None, bool | None]:
    """(rejected answer or None, label or None) of a record of messages. turns: its own, whose last one is the chosen answer. Raises UnusableRow.

    In a record of messages only true and false are labels: other files have their own meaning for a number or a text called `label`.
    """
    # a field `rejected` of its own may mean something else in files that are no pairs
    key = next((k for k in REJECTED if k in values and (k != "rejected" or "chosen" in values or isinstance(values[k], (list, Mapping)))), None)
    if values.get("rejected_images") not in (None, [], values.get("images"), values.get("image")):
        raise UnusableRow("broken pair: rejected_images are other images; two answers to the same images are compared")
    turns = structure_in_text(turns)
    rejected = rejected_answer(values[key], turns if isinstance(turns, Sequence) else None, key) if key is not None else None
    label = values.get("label")
    return rejected, label if isinstance(label, bool) else None
