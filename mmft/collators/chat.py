"""Any chat model's format: the processor's own chat template, loss on the assistant's words and their end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError, UserError
from .base import IGNORE, PER_TOKEN, Collator, Encoded
from .text import Tokens, hide, mark, unhide

if TYPE_CHECKING:
    from ..data.sample import Sample


class ChatCollator(Collator):
    """Rows are rendered by the chat template of the processor; `system` is put before rows that bring no system message.

    Where the template writes no end token after an answer (LLaVA-1.5), the model's own is added: an answer that is never
    ended in training never ends in use.
    """

    def __init__(
        self,
        *,
        processor: Any,
        family: Any,
        model_config: Any,
        end_token_ids: list[int],
        max_length: int | None = None,
        system: str | None = None,
    ):
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
        self.ending: str | None = None  # the end token that the template writes after an answer, if it writes one
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
        except TemplateError as error:  # templates refuse with raise_exception what their model was not trained on
            raise RowError(row, f"the chat template refuses this conversation: {str(error).strip().splitlines()[0]}") from None

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        messages = sample.messages
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        return mark(messages, self.tokens.control)

    def _render(self, messages: list[dict[str, Any]], row: str) -> tuple[str, list[tuple[int, int]], str]:
        """The conversation as text, the character spans (start, end) that carry loss, and the template's end token.

        A span starts where the generation prompt of its turn ends, and closes behind the end token: what the model will
        have to write itself, exactly.
        """
        full = self._template(messages, False, row)
        pieces: list[str] = []
        spans, done, shift, ending = [], 0, 0, ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:k], True, row)
            if not full.startswith(before):
                raise RowError(row, "the chat template renders a turn differently once an answer follows, so prompt and answer cannot be told apart")
            answer = "".join(p["text"] for p in message["content"] if p["type"] == "text").strip()
            if not answer:
                raise RowError(row, "an answer is empty, so nothing but its end would be learned")
            at = full.find(answer, len(before))
            if at < 0:
                raise RowError(row, "the chat template does not write this answer as it is")
            end = at + len(answer)
            control = self.tokens.control_at(full, end)
            if control and self.ending is not None and full[control[0] : control[1]] != self.ending:
                control = None  # it opens the next turn; the template ends none
            added = "" if control else self.tokenizer.eos_token or ""
            end, ending = (control[1], full[control[0] : control[1]]) if control else (end, "")
            pieces += [full[done:end], added]
            spans.append((len(before) + shift, end + shift + len(added)))
            done, shift = end, shift + len(added)
        return "".join(pieces) + full[done:], spans, ending

    def _texts(self, sample: Sample, generation: bool) -> tuple[str, list[tuple[int, int]]]:
        text, spans, _ = self._render(self._messages(sample), sample.id)
        if not spans:
            raise RowError(sample.id, "no assistant message, so there is nothing to learn or to compare with")
        return (text[: spans[-1][0]], []) if generation else (text, spans)

    # --- ids ----------------------------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[list[Any]], generation: bool) -> tuple[list[Encoded], dict[str, Any]]:
        texts, spans = zip(*(self._texts(sample, generation) for sample in samples), strict=True)
        hidden = [hide(text) for text in texts]  # control tokens that a user typed are no concern of the processor's
        try:
            out = self.processor(
                text=[text for text, _ in hidden],
                images=list(images) if any(images) else None,
                add_special_tokens=False,  # BOS is put before the ids below
                padding=False,
                return_text_replacement_offsets=True,
            )
        except ValueError as error:
            names = ", ".join(s.id for s in samples)
            raise RowError(names, f"the processor refuses this batch: {str(error).strip().splitlines()[0]}") from None
        replaced = out.pop("text_replacement_offsets", None) or [[]] * len(samples)
        per_token = {key: out.pop(key) for key in PER_TOKEN if key in out}
        rows = [
            self._row(sample, texts[i], spans[i], hidden[i], replaced[i], {k: list(v[i]) for k, v in per_token.items()}, len(images[i]))
            for i, sample in enumerate(samples)
        ]
        return rows, self._tensors(out)

    def _row(
        self, sample: Sample, text: str, spans: list, hidden: tuple, replaced: list[dict], given: dict[str, list[int]], n_images: int
    ) -> Encoded:
        if len(replaced) != n_images:
            raise RowError(sample.id, f"{n_images} images but {len(replaced)} image places in the rendered text")
        seen, runs = hidden
        expanded, moved = _expand(text, spans, [r | {"span": tuple(unhide(at, runs) for at in r["span"])} for r in replaced])
        ids, offsets = self.tokens.encode(expanded)
        # nothing hidden, as in nearly every row: what the processor saw is this very text
        if (self.tokens.encode(_expand(seen, [], replaced)[0])[0] if runs else ids) != given["input_ids"]:
            raise RowError(sample.id, "the processor tokenised this row in a way that cannot be followed, so its answer cannot be located")
        if any(a < start < b for start, _ in moved for a, b in offsets):
            # a token reaches over the border between prompt and answer; the model in use never sees such a token
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
            # as an id, not as text: SentencePiece puts its space before a text's first word, and BOS would be that word
            return Encoded([self.tokenizer.bos_token_id, *ids], [IGNORE, *labels], {k: [0, *v] for k, v in extra.items()})
        return Encoded(ids, labels, extra)

    def _retype(self, given: dict[str, list[int]], ids: list[int]) -> dict[str, list[int]]:
        kinds = [int(i in self.processor.image_token_ids) for i in ids]
        return {key: kinds for key in given if key.endswith("type_ids")}

    def _tensors(self, out: dict[str, Any]) -> dict[str, Any]:
        from transformers import BatchFeature

        return dict(BatchFeature(dict(out), tensor_type="pt"))


def _expand(text: str, spans: list[tuple[int, int]], replaced: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text with its image placeholders expanded as the processor did, and the spans moved along with it."""
    pieces, last = [], 0
    for item in replaced:
        start, end = item["span"]
        pieces += [text[last:start], item["replacement"]]
        last = end

    def moved(at: int) -> int:
        return at + sum(len(r["replacement"]) - (r["span"][1] - r["span"][0]) for r in replaced if r["span"][1] <= at)

    return "".join(pieces) + text[last:], [(moved(a), moved(b)) for a, b in spans]
