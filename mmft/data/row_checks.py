"""The rules that a row must meet to become a sample; each reason is `kind: detail`."""

from __future__ import annotations

from .sample import Message, PlainRow, Row, message_text
from .wording import shown

_USUAL = ["user", "assistant"]


def strip_texts(row: Row) -> None:
    """Strip white space around the answers and references, and put the training answer first among the references if it is missing."""
    if type(row) is PlainRow:
        return
    for message in row.messages:
        content = message["content"]
        if message["role"] == "assistant":
            parts = [p for p in content if p["type"] != "image"]
            if parts:
                first, last = parts[0], parts[-1]
                if first["type"] == "text":
                    first["text"] = first["text"].lstrip()
                if last["type"] == "text":
                    last["text"] = last["text"].rstrip()
        for part in content:
            if part["type"] == "text" and not part["text"]:
                message["content"] = [p for p in content if p["type"] != "text" or p["text"]]
                break
    answer = message_text(row.messages[-1]) if row.messages else ""
    references = [text for r in row.references if (text := r.strip())]
    row.references = references if answer in references else [answer, *references]
    if row.label is False:  # nothing is measured by a bad answer
        row.references = [text for text in row.references if text != answer]
    if row.rejected is not None:
        row.rejected = row.rejected.strip()


def problem(row: Row, text_only: bool = False) -> str | None:
    """Why `row` (after `strip_texts`) cannot be used, or None."""
    if type(row) is PlainRow and _is_unicode(row.answer) and _is_unicode(row.prompt) and _is_unicode(str(row.id)):
        return None
    if not row.messages:
        return "no answer: the row has no messages"
    if not row.images and not text_only:
        return "no image: the row names none (data.text_only=true keeps such rows)"
    reason = _role_problem(row.messages) or _content_problem(row.messages)
    if reason:
        return reason
    placeholders = 0
    for message in row.messages:
        for part in message["content"]:
            if part["type"] == "image":
                placeholders += 1
    if placeholders != len(row.images):
        return f"image count: {placeholders} placeholder{'s' * (placeholders != 1)} in the text, {len(row.images)} image{'s' * (len(row.images) != 1)}"
    for image in row.images:
        if not isinstance(image, bytes) and not str(image).strip():
            return "missing image: the image's name is empty"
        if not isinstance(image, bytes) and not _is_unicode(str(image)):
            return f"missing image: {shown(image)!r} is not a file name"
    for text in (row.id, *row.references, *row.choices, row.rejected):
        if text is not None and not _is_unicode(str(text)):
            return "bad text: its id, a reference, a choice or its rejected answer holds half of a surrogate pair, which is not a character"
    if row.rejected == "":
        return "empty rejected answer: there is nothing to compare the chosen answer with"
    if row.rejected is not None and row.label is False:
        return "broken pair: its chosen answer is labelled bad"
    if row.rejected is not None and row.rejected == message_text(row.messages[-1]).strip():
        return f"equal answers: the chosen and the rejected answer are both {shown(row.rejected)!r}"
    return None


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _role_problem(messages: list[Message]) -> str | None:
    roles = [m["role"] for m in messages]
    if roles == _USUAL:
        return None
    unknown = next((r for r in roles if r not in ("system", "user", "assistant", "tool")), None)
    if unknown is not None:
        return f"role order: {shown(unknown)!r} is not system, user, assistant or tool"
    if "assistant" not in roles:
        return "no answer: no assistant turn"
    turns = roles[1:] if roles[0] == "system" else roles
    allowed = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    for i, (before, role) in enumerate(zip(["", *turns], turns)):
        if role not in allowed.get(before, ()):
            return f"role order: turn {i + 1} is {role}'s; after an optional system turn, user and assistant must alternate (tool turns may follow an answer)"
    if turns[-1] != "assistant":
        return f"no answer: the last turn is the {turns[-1]}'s"
    return None


def _content_problem(messages: list[Message]) -> str | None:
    for i, message in enumerate(messages, 1):
        images = False
        for part in message["content"]:
            if part["type"] == "image":
                images = True
                break
        if images and message["role"] not in ("user", "tool"):
            return f"image count: turn {i} is {message['role']}'s and holds an image; only user and tool turns can"
        text = message_text(message)
        if not images and not text.strip():
            return "empty answer: the assistant says nothing" if message["role"] == "assistant" else f"empty turn: turn {i} is empty"
        if not _is_unicode(text):
            return f"bad text: turn {i} holds half of a surrogate pair, which is not a character"
    return None
