"""ChatCollator: the format of any chat model. The processor's chat template renders rows; loss on answers and their end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from ..common.errors import RowError, UserError
from .base import IGNORE, PER_TOKEN, Collator
from .control_tokens import Span, Tokens, hide, mark, unhide
from .types import Encoded, FamilyRules

if TYPE_CHECKING:
    from ..data.sample import Sample
    from .types import Images, Tensors


class Replacement(TypedDict):
    """One image placeholder that a processor expanded: its characters in the text, and the text written instead."""

    span: Span
    replacement: str


class ChatCollator(Collator):
    """The processor's chat template renders each row. `system` is added to rows without a system message (null: none).

    If the template writes no end token after an answer (LLaVA-1.5), the tokenizer's is added: a model that never saw an
    answer end does not stop when it generates.
    """

    def __init__(
        self,
        *,
        processor: Any,
        family: FamilyRules,
        model_config: Any,
        end_token_ids: list[int],
        max_length: int | None = None,
        system: str | None = None,
    ) -> None:
        """Raises UserError for a processor without a chat template, or if no answer would end."""
        super().__init__(
            processor=processor, family=family, model_config=model_config, end_token_ids=end_token_ids, max_length=max_length
        )
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        if not self.template:
            raise UserError("collator=chat: this model's processor has no chat template; use collator=caption, or add chat_template.jinja")
        self.system = system
        self.tokens = Tokens(self.tokenizer, self.template)
        probe = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
        self.ending: str | None = None  # the end token that the template writes after an answer; "" if it writes none
        _, _, self.ending = self._render(probe, "the chat template, tried on one turn")
        if not (self.ending or self.tokenizer.eos_token):
            raise UserError("collator=chat: neither the chat template nor the tokenizer has an end token, so no answer would ever end")
        self.end_token_id = self.tokens.encode(self.ending or self.tokenizer.eos_token)[0][-1]

    # --- text ---------------------------------------------------------------------------------------------------

    def _template(self, messages: list[dict[str, Any]], generation: bool, row: str) -> str:
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except TemplateError as error:  # a template calls raise_exception for conversations its model was not trained on
            raise RowError(row, f"the chat template refuses this conversation: {str(error).strip().splitlines()[0]}") from None

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        messages = sample.messages
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        return mark(messages, self.tokens.control)

    def _render(self, messages: list[dict[str, Any]], row: str) -> tuple[str, list[Span], str]:
        """The conversation as text, the spans that carry loss, and the end token that the template writes ("" for none).

        A span starts where the generation prompt of its turn ends, and ends after the end token: it is exactly what the
        model has to write itself.
        """
        text = self._template(messages, False, row)
        pieces: list[str] = []  # the text with end tokens added; `shift` is how much longer it is than `text[:copied]`
        spans, copied, shift, ending = [], 0, 0, ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._template(messages[:k], True, row)
            if not text.startswith(prompt):
                raise RowError(row, "the chat template renders a turn differently once an answer follows, so prompt and answer cannot be told apart")
            answer = "".join(p["text"] for p in message["content"] if p["type"] == "text").strip()
            if not answer:
                raise RowError(row, "an answer is empty, so nothing but its end would be learned")
            start = text.find(answer, len(prompt))
            if start < 0:
                raise RowError(row, "the chat template does not write this answer as it is")
            end = start + len(answer)
            control = self.tokens.control_at(text, end)
            if control and self.ending is not None and text[control[0] : control[1]] != self.ending:
                control = None  # it opens the next turn: this template writes no end token
            added = "" if control else self.tokenizer.eos_token or ""
            end, ending = (control[1], text[control[0] : control[1]]) if control else (end, "")
            pieces += [text[copied:end], added]
            spans.append((len(prompt) + shift, end + shift + len(added)))
            copied, shift = end, shift + len(added)
        return "".join(pieces) + text[copied:], spans, ending

    def _texts(self, sample: Sample, generation: bool) -> tuple[str, list[Span]]:
        text, spans, _ = self._render(self._messages(sample), sample.id)
        if not spans:
            raise RowError(sample.id, "no assistant message, so there is nothing to learn or to compare with")
        return (text[: spans[-1][0]], []) if generation else (text, spans)

    # --- ids ----------------------------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[Encoded], Tensors]:
        texts, spans = zip(*(self._texts(sample, generation) for sample in samples), strict=True)
        hidden = [hide(text) for text in texts]  # the processor must not see control tokens that a user typed
        try:
            out = self.processor(
                text=[text for text, _ in hidden],
                images=list(images) if any(images) else None,
                add_special_tokens=False,  # _row adds BOS to the ids
                padding=False,
                return_text_replacement_offsets=True,
            )
        except ValueError as error:
            names = ", ".join(s.id for s in samples)
            raise RowError(names, f"the processor refuses this batch: {str(error).strip().splitlines()[0]}") from None
        replaced: list[list[Replacement]] = out.pop("text_replacement_offsets", None) or [[]] * len(samples)
        per_token = {key: out.pop(key) for key in PER_TOKEN if key in out}
        rows = [
            self._row(sample, texts[i], spans[i], hidden[i], replaced[i], {k: list(v[i]) for k, v in per_token.items()}, len(images[i]))
            for i, sample in enumerate(samples)
        ]
        return rows, self._tensors(out)

    def _row(
        self,
        sample: Sample,
        text: str,
        spans: list[Span],
        hidden: tuple[str, list[Span]],
        replaced: list[Replacement],
        given: dict[str, list[int]],
        n_images: int,
    ) -> Encoded:
        """One row's ids, labels and per-token values from what the processor returned for it (`replaced`, `given`)."""
        if len(replaced) != n_images:
            raise RowError(sample.id, f"{n_images} images but {len(replaced)} image places in the rendered text")
        hidden_text, runs = hidden
        in_text: list[Replacement] = [{**r, "span": (unhide(r["span"][0], runs), unhide(r["span"][1], runs))} for r in replaced]
        expanded, moved = _expand(text, spans, in_text)
        ids, offsets = self.tokens.encode(expanded)
        # without marked runs, as in nearly every row, the processor saw exactly this text
        if (self.tokens.encode(_expand(hidden_text, [], replaced)[0])[0] if runs else ids) != given["input_ids"]:
            raise RowError(sample.id, "the processor tokenised this row in a way that cannot be followed, so its answer cannot be located")
        if any(a < start < b for start, _ in moved for a, b in offsets):
            # a token spans the border between prompt and answer; in generation the model never sees such a token
            ids, offsets = self.tokens.encode(expanded, cuts=[start for start, _ in moved])
        if ids != given["input_ids"]:
            given = self._retype(given, ids)
        labels = [IGNORE] * len(ids)
        for start, end in moved:
            for i, (a, b) in enumerate(offsets):
                if a >= start and b <= end and b > a:
                    labels[i] = ids[i]
        extra = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
        if self.tokens.bos and not text.startswith(self.tokens.bos):
            # Added as an id: as text, it would be the first word to SentencePiece and take the space before the real one.
            return Encoded([self.tokenizer.bos_token_id, *ids], [IGNORE, *labels], {k: [0, *v] for k, v in extra.items()})
        return Encoded(ids, labels, extra)

    def _retype(self, given: dict[str, list[int]], ids: list[int]) -> dict[str, list[int]]:
        """The token type ids of a row that was tokenized again: 1 for image tokens, 0 otherwise."""
        types = [int(i in self.processor.image_token_ids) for i in ids]
        return {key: types for key in given if key.endswith("type_ids")}

    def _tensors(self, out: dict[str, Any]) -> Tensors:
        from transformers import BatchFeature

        return dict(BatchFeature(dict(out), tensor_type="pt"))


def _expand(text: str, spans: list[Span], replaced: list[Replacement]) -> tuple[str, list[Span]]:
    """The text with its image placeholders expanded as the processor did, and the spans moved accordingly."""
    pieces, last = [], 0
    for item in replaced:
        start, end = item["span"]
        pieces += [text[last:start], item["replacement"]]
        last = end

    def moved(position: int) -> int:
        return position + sum(len(r["replacement"]) - (r["span"][1] - r["span"][0]) for r in replaced if r["span"][1] <= position)

    return "".join(pieces) + text[last:], [(moved(a), moved(b)) for a, b in spans]
