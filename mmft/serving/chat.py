"""A conversation with a model in the terminal; images are attached by their path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..data.images import open_image
from ..data.sample import assistant_turn, user_turn
from ..evaluation.evaluate import Evaluator
from ..evaluation.inputs import UNKNOWN_ANSWER, Message, conversation
from ..runs.open import OpenedRun
from .stream import stream

if TYPE_CHECKING:
    import torch

HELP = "/image PATH attaches a picture to your next words, /new starts over, /quit (or the end of input) leaves."


def chat(opened: OpenedRun) -> list[Message]:
    """Read lines from stdin until /quit or its end; returns the last conversation's messages."""
    from transformers import set_seed

    evaluator = opened.evaluator([])
    set_seed(opened.settings["seed"])
    print_notice(f"{opened.run.name if opened.run else opened.loaded.located.path}. {HELP}")
    messages: list[Message] = []
    images: list[Path] = []
    new_images: list[Path] = []  # attached since the last answer
    while (line := read_line()) is not None:
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                break
            elif word == "/new":
                messages, images, new_images = [], [], []
                print_notice("A new conversation.")
            elif word == "/image":
                path = Path(rest.strip().strip("\"'")).expanduser()
                width, height = open_image(path).size
                new_images.append(path)
                print_notice(f"{path.name}, {width} x {height}, goes with your next words.")
            elif word.startswith("/"):
                print_notice(f"{word}: no such command. {HELP}")
            elif line.strip():
                turn = user_turn(len(new_images), line.strip())
                answer = reply(evaluator, opened.model, [*messages, turn], images + new_images)
                if answer:  # no model was trained on a conversation with an empty answer
                    messages += [turn, assistant_turn(answer)]
                    images, new_images = images + new_images, []
        except UserError as error:
            print(f"mmft: {error}", file=sys.stderr)
    return messages


def reply(evaluator: Evaluator, model: torch.nn.Module, messages: Sequence[Message], images: Sequence[Path]) -> str:
    """Print the answer while it is generated, and return it. Raises UserError."""
    question = conversation("this conversation", images, [*messages, assistant_turn(UNKNOWN_ANSWER)])
    if question.sample is None:
        raise UserError(question.error)
    printed = text = ""
    for text in stream(evaluator, model, [question.sample]):
        if text.startswith(printed):  # false where the last text is stripped of white space that was printed already
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print("" if text else "(nothing written)", flush=True)
    return text


def read_line() -> str | None:
    """The next line of stdin; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def print_notice(text: str) -> None:
    """Print to stderr: stdout has the answers alone."""
    print(text, file=sys.stderr, flush=True)
