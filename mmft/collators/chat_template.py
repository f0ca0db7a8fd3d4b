"""ChatTemplate: a model's chat template renders conversations to text, with the spans that the model has to write itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import RowError, UserError
from .control_tokens import Span, Tokens

# How reasoning opens and closes, in templates and in the texts of rows.
THINK_BLOCKS = (("<think>", "</think>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))
# How a template takes contents: as lists of parts; as strings from all but users; as strings if they are text alone; as strings.
FORMS = ("parts", "users", "text", "string")
LIST = re.compile(r"""['"]text['"]\s*:\s*['"]qz""")  # a list that a template wrote as it is, or as JSON
PROBE = "the chat template, tried on one turn"
QUESTION, ANSWER, REASONING, SYSTEM = "qzuestion", "qzanswer", "qzreasoning", "qzsystem"  # texts that no template contains


@dataclass(frozen=True)
class Turn:
    """One message as the template reads it; control tokens in its texts are marked (control_tokens.mark).

    content: texts, and None for an image. loss: whether an assistant's turn is trained. weight: of its loss.
    """

    role: str
    content: tuple[str | None, ...]
    reasoning: str = ""
    loss: bool = True
    weight: float = 1.0

    @property
    def text(self) -> str:
        return "".join(text for text in self.content if text is not None).strip()


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, up to one of its answers. spans: what carries loss. n_images: its images, the first of the row.

    weights: of the loss of each span.
    """

    text: str
    spans: list[Span]
    n_images: int
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """One answer in the context in which the model writes it: `text[start:end]` is what it has to write."""

    text: str
    start: int
    end: int  # after the end token, if the template writes one
    ended: bool  # the template writes an end token
    loss: bool
    n_images: int
    weight: float = 1.0


class ChatTemplate:
    """A processor's chat template, and what a few renderings of it tell about it.

    form: how it takes the content of messages (FORMS). writes_reasoning: whether it reads `reasoning_content`. opens: whether
    the generation prompt opens a think block. think: the marks of such a block. ending: the end token it writes after an answer ("" if it writes none).
    """

    def __init__(self, processor: Any, template: str, tokens: Tokens, image_text: str, opening: str = "") -> None:
        """image_text: what stands for an image in a string. opening: what the processor puts before a text that does not begin with it.

        Raises UserError for a template that cannot be used.
        """
        self.processor, self.template, self.tokens, self.image_text, self.opening = processor, template, tokens, image_text, opening
        self.think = next((block for block in THINK_BLOCKS if block[1] in template or block[0] in template), THINK_BLOCKS[0])
        self.writes_reasoning, self.opens = False, False
        self.form = self._choose_form()
        user, answer = Turn("user", (QUESTION,)), Turn("assistant", (ANSWER,))
        self.opens = _opened(self._render([user], True, PROBE)) is not None
        self.writes_reasoning = self._contains([user, replace(answer, reasoning=REASONING)], REASONING)
        rendered = self._render([user, answer], False, PROBE)
        self.tail = rendered[rendered.rfind(ANSWER) + len(ANSWER) :] if ANSWER in rendered else ""  # what follows the last answer
        token = tokens.control_at(self.tail, 0)
        self.ending = self.tail[slice(*token)] if token else ""

    # --- what callers use ---------------------------------------------------------------------------------------

    def turn_tokens(self) -> set[str]:
        """The control tokens that open or close a turn: those the template writes around short texts, but for reasoning."""
        user, answer = Turn("user", (QUESTION,)), Turn("assistant", (ANSWER,))
        texts = [self._render([user, answer], False, PROBE), self._render([user], True, PROBE)]
        for extra in ([Turn("system", (SYSTEM,)), user, answer], [user, answer, Turn("tool", (QUESTION,)), answer]):
            with suppress(RowError):
                texts.append(self._render(extra, False, PROBE))
        thinking = {mark for block in THINK_BLOCKS for mark in block}
        return {token for token in self.tokens.control if token not in thinking and any(token in text for text in texts)}

    def sequences(self, turns: Sequence[Turn], row: str) -> list[Rendered]:
        """The conversation as one text, or as several where answers that are trained need different contexts. Raises RowError.

        Some templates render earlier turns differently from the last one (they leave out old reasoning). Each answer is
        trained behind exactly the prompt behind which the model would write it; answers share a text where that is the same.
        """
        answers = self._answers(turns, row)
        shared: list[list[_Answer]] = []  # the first of each list gives the text
        for answer in reversed(answers):
            matching = next((group for group in shared if group[0].text.startswith(answer.text[: answer.end])), None)
            if matching is not None:
                matching.append(answer)
            elif answer.loss:
                shared.append([answer])
        if not shared:
            raise RowError(row, "every answer has loss: false, so there is nothing to learn")
        return [self._joined(group[0], group[::-1]) for group in reversed(shared)]

    def prompt(self, turns: Sequence[Turn], row: str) -> Rendered:
        """The conversation up to where the model writes its last answer, without spans. Raises RowError."""
        *earlier, last = self._answers(turns, row)
        last = replace(last, loss=True)
        before = [a for a in earlier if last.text.startswith(a.text[: a.end]) and a.end <= last.start]
        whole = self._joined(last, [*before, last])
        return replace(whole, text=whole.text[: whole.spans[-1][0]], spans=[])

    def split_answer(self, text: str, generated: bool) -> tuple[str, str]:
        """(reasoning, answer) of a text; a generated text that never closes the block which its prompt opens is all reasoning."""
        closed = any(closing in text for _, closing in THINK_BLOCKS)
        return (text, "") if generated and self.opens and not closed else _split_reasoning(text)

    # --- rendering ----------------------------------------------------------------------------------------------

    def _render(self, turns: Sequence[Turn], generation: bool, row: str) -> str:
        from jinja2 import TemplateError

        messages = [self._message(turn) for turn in turns]
        try:
            text: str = self.processor.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
            return text if text.startswith(self.opening) else self.opening + text
        except TemplateError as error:  # a template calls raise_exception for conversations its model was not trained on
            raise RowError(row, f"the chat template refuses this conversation: {_line(error)}") from None
        except (TypeError, AttributeError, KeyError) as error:
            raise RowError(row, f"the chat template cannot render this conversation: {_line(error)}") from None

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role}
        content = list(turn.content)
        if turn.reasoning and self.writes_reasoning:
            message["reasoning_content"] = turn.reasoning
        elif turn.reasoning and not self.opens:
            gap = _gap(self.think)
            block = f"{self.think[0]}{gap}{turn.reasoning}{gap}{self.think[1]}{gap * 2}"
            content = [block + turn.text]  # one text: some templates write the first part of an answer alone
        as_list = {"parts": True, "users": turn.role == "user", "text": None in content, "string": False}
        if not as_list[self.form]:
            message["content"] = "".join(self.image_text if text is None else text for text in content)
        else:
            message["content"] = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in content]
        return message

    def _choose_form(self) -> str:
        """The first form in which the template writes all texts, the image, and reasoning if it handles reasoning at all."""
        error: RowError | None = None
        thinks = "reasoning_content" in self.template or self.think[1] in self.template
        for reasoning in (True, False) if thinks else (False,):
            for form in FORMS:
                try:
                    if self._form_works(form, reasoning):
                        return form
                except RowError as refused:
                    error = error or refused
        reason = f": {error.reason}" if error else ""
        raise UserError("collator=chat: this model's chat template writes neither lists of content parts nor strings"
                        f"{reason}; give the model's folder a chat_template.jinja that writes messages with images")  # fmt: skip

    def _form_works(self, form: str, reasoning: bool) -> bool:
        self.form = form
        user, shown = Turn("user", (QUESTION,)), Turn("user", (None, QUESTION))
        answer = Turn("assistant", (ANSWER,))
        whole, plain = self._render([shown, answer], False, PROBE), self._render([user, answer], False, PROBE)
        if len(whole) <= len(plain) or any(t not in text for t in (QUESTION, ANSWER) for text in (whole, plain)) or LIST.search(whole + plain):
            return False
        try:
            system = self._render([Turn("system", (SYSTEM,)), shown, answer], False, PROBE)
            if SYSTEM not in system or LIST.search(system):
                return False
        except RowError as refused:
            if "refuses" not in refused.reason:  # a template may refuse system turns, but not fail in the middle of one
                return False
        if not reasoning:
            return True
        block = replace(answer, content=(f"{self.think[0]}\n{REASONING}\n{self.think[1]}\n\n{ANSWER}",))
        self.writes_reasoning = True
        try:
            return self._contains([shown, replace(answer, reasoning=REASONING)], REASONING) or self._contains([shown, block], REASONING)
        finally:
            self.writes_reasoning = False

    def _contains(self, turns: list[Turn], text: str) -> bool:
        writes, self.writes_reasoning = self.writes_reasoning, True
        try:
            return text in self._render(turns, False, PROBE)
        except RowError:
            return False
        finally:
            self.writes_reasoning = writes

    # --- answers ------------------------------------------------------------------------------------------------

    def _answers(self, turns: Sequence[Turn], row: str) -> list[_Answer]:
        turns = [self._normalized(turn) for turn in turns]
        answers = [self._answer(turns, k, row) for k, turn in enumerate(turns) if turn.role == "assistant"]
        if not answers:
            raise RowError(row, "no assistant message, so there is nothing to learn or to compare with")
        for turn in turns:
            if turn.role in ("system", "tool") and any(text and text.strip() not in answers[-1].text for text in turn.content):
                raise RowError(row, f"the chat template leaves out the {turn.role} turn, so the model would not see it")
        return answers

    def _normalized(self, turn: Turn) -> Turn:
        """An answer whose text holds its reasoning, with the reasoning apart, if the template reads it from there."""
        reasoning, text = _split_reasoning(turn.text)
        if turn.role != "assistant" or not self.writes_reasoning or turn.reasoning or not reasoning or not text:
            return turn
        return replace(turn, content=(text,), reasoning=reasoning)

    def _answer(self, turns: Sequence[Turn], k: int, row: str) -> _Answer:
        """Answer `k` in its own context: the generation prompt before it, then what the model has to write."""
        turn = turns[k]
        if not turn.text:
            raise RowError(row, "an answer is empty, so nothing but its end would be learned")
        prompt, full = self._render(turns[:k], True, row), self._render(turns[: k + 1], False, row)
        inner, visible = _split_reasoning(turn.text)
        body = full.removesuffix(self.tail).rstrip()
        visible = turn.text if body.endswith(turn.text) or not visible else visible
        end = len(body) if body.endswith(visible) else full.rfind(visible) + len(visible)
        if end < len(visible):
            raise RowError(row, "the chat template does not write this answer as it is")
        reasoning = turn.reasoning.strip() or ("" if visible == turn.text else inner)
        start = len(prompt)
        if not full.startswith(prompt) or reasoning not in full[start:end]:
            target = self._target(prompt, full[:end], turn, inner, visible, row)
            full, end = prompt + target + full[end:], len(prompt + target)
        token = self.tokens.control_at(full, end)
        if token and full[slice(*token)] != self.ending:
            token = None
        n_images = sum(text is None for t in turns[: k + 1] for text in t.content)
        return _Answer(full, start, token[1] if token else end, token is not None, turn.loss, n_images, turn.weight)

    def _target(self, prompt: str, full: str, turn: Turn, inner: str, visible: str, row: str) -> str:
        """What the model has to write after `prompt`, for a template that renders a finished answer differently."""
        space = prompt[len(prompt.rstrip()) :]
        block = _opened(prompt)
        if block is not None:  # the prompt opens a think block: the model writes the rest of it, then its answer
            if inner and not turn.reasoning:
                written = turn.text.removeprefix(block[0])
                return written.removeprefix(space) if space and written.startswith(space) else written
            gap = "\n" if space else ""
            return f"{turn.reasoning.strip()}{gap}{block[1]}{gap * 2}{visible}"
        if turn.reasoning or (inner and visible != turn.text):
            raise RowError(row, "the chat template leaves out this answer's reasoning; remove it from the row, or use a chat_template.jinja that writes it")
        before = full[: len(full) - len(visible)]
        lead = before[len(before.rstrip()) :]
        return (lead[len(space) :] if lead.startswith(space) else "") + visible

    def _joined(self, head: _Answer, answers: list[_Answer]) -> Rendered:
        """The text of `head` with the tokenizer's end token after each answer that the template does not end itself."""
        eos = self.tokens.tokenizer.eos_token or ""
        pieces: list[str] = []
        spans: list[Span] = []
        copied = shift = 0
        for answer in answers:
            added = "" if answer.ended else eos
            pieces += [head.text[copied : answer.end], added]
            if answer.loss:
                spans.append((answer.start + shift, answer.end + shift + len(added)))
            copied, shift = answer.end, shift + len(added)
        return Rendered("".join(pieces) + head.text[copied:], spans, head.n_images, tuple(answer.weight for answer in answers if answer.loss))


def _split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's text that holds a closed think block; ("", text) otherwise."""
    for opening, closing in THINK_BLOCKS:
        if closing in text:
            before, _, after = text.rpartition(closing)
            return before.strip().removeprefix(opening).strip(), after.strip()
    return "", text


def _opened(prompt: str) -> tuple[str, str] | None:
    """The think block that a prompt opens and leaves open."""
    return next((block for block in THINK_BLOCKS if prompt.rstrip().endswith(block[0])), None)


def _gap(block: tuple[str, str]) -> str:
    """What stands between a mark of a think block and a text."""
    return "\n" if block[0].isascii() else ""


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
