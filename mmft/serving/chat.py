"""A conversation with a model in the terminal; pictures are attached by their path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.images import open_image
from ..data.sample import assistant_turn, user_turn
from ..evaluation.inputs import UNKNOWN, conversation
from .stream import stream

HELP = "/image PATH attaches a picture to your next words, /new starts over, /quit (or the end of input) leaves."


def chat(opened: Any) -> list[dict[str, Any]]:
    """Read lines from stdin until /quit or its end; returns the last conversation's messages."""
    from transformers import set_seed

    evaluator = opened.evaluator([])
    set_seed(opened.settings["seed"])
    say(f"{opened.run.name if opened.run else opened.loaded.located.path}. {HELP}")
    messages: list[dict[str, Any]] = []
    images: list[Path] = []
    waiting: list[Path] = []
    while (line := read_line()) is not None:
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                break
            elif word == "/new":
                messages, images, waiting = [], [], []
                say("A new conversation.")
            elif word == "/image":
                path = Path(rest.strip().strip("\"'")).expanduser()
                width, height = open_image(path).size
                waiting.append(path)
                say(f"{path.name}, {width} x {height}, goes with your next words.")
            elif word.startswith("/"):
                say(f"{word}: no such command. {HELP}")
            elif line.strip():
                turn = user_turn(len(waiting), line.strip())
                answer = reply(evaluator, opened.model, [*messages, turn], images + waiting)
                if answer:  # a turn without an answer would be a conversation no model was trained on
                    messages += [turn, assistant_turn(answer)]
                    images, waiting = images + waiting, []
        except UserError as error:
            print(f"mmft: {error}", file=sys.stderr)
    return messages


def reply(evaluator: Any, model: Any, messages: list[dict[str, Any]], images: list[Path]) -> str:
    """Print the answer while it is written, and return it."""
    asked = conversation("this conversation", images, [*messages, assistant_turn(UNKNOWN)])
    if asked.sample is None:
        raise UserError(asked.error)
    shown = text = ""
    for text in stream(evaluator, model, [asked.sample]):
        if text.startswith(shown):  # it is not where the last step strips what was printed already
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print("" if text else "(nothing written)", flush=True)
    return text


def read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
