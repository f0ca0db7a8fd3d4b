"""CaptionCollator: BLIP-2's format. Image tokens, an optional prompt, the caption, the end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError, UserError
from ..common.model_parts import is_encoder_decoder
from .base import IGNORE, Collator, even_weights, last_answer, measured
from .types import Encoded, FamilyRules, Measure

if TYPE_CHECKING:
    from ..data.sample import Message, Sample
    from .types import Images, Tensors


class CaptionCollator(Collator):
    """A row is `<image>` once per query, BOS, prompt, answer, end token; loss on the answer and the end token.

    The image tokens come first and after any padding, as Blip2Processor writes them. The prompt is the user's text;
    `prompt` replaces it in every row (null: keep the row's own). The end token is the first id of `end_token_ids`.
    """

    def __init__(
        self,
        *,
        processor: Any,
        family: FamilyRules,
        model_config: Any,
        end_token_ids: list[int],
        max_length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        """Raises UserError for a processor that is not BLIP-2's."""
        super().__init__(
            processor=processor, family=family, model_config=model_config, end_token_ids=end_token_ids, max_length=max_length
        )
        if getattr(processor, "num_query_tokens", None) is None:
            raise UserError(f"collator=caption: BLIP-2's format, and {type(processor).__name__} has no query tokens; use collator=chat")
        self.fixed_prompt = prompt
        self.end_token_id = end_token_ids[0]
        self.encoder_decoder = is_encoder_decoder(model_config)
        # Byte-level tokens (OPT's) hold the space before a word; SentencePiece (Vicuna's, T5's) adds it to every text itself.
        self._spaces_words = not self.encoder_decoder and self._plain("a b") == [*self._plain("a"), *self._plain(" b")]

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[list[Encoded]], Tensors]:
        rows = [[self._sequence(sample, generation)] for sample in samples]
        pixels = self.processor.image_processor([row_images[0] for row_images in images], return_tensors="pt")
        return rows, {"pixel_values": pixels["pixel_values"], **self._question_tensors(samples)}

    def _question_tensors(self, samples: Sequence[Sample]) -> Tensors:
        """The prompts for InstructBLIP's Q-Former, which reads them with its own tokenizer; {} for BLIP-2."""
        tokenizer = getattr(self.processor, "qformer_tokenizer", None)
        if tokenizer is None:
            return {}
        limit = self.model_config.qformer_config.max_position_embeddings
        tokens = tokenizer([self._prompt(s) for s in samples], padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"qformer_input_ids": tokens["input_ids"], "qformer_attention_mask": tokens["attention_mask"]}

    def _prompt(self, sample: Sample) -> str:
        return plain_text(next(m for m in sample.messages if m["role"] != "system")) if self.fixed_prompt is None else self.fixed_prompt

    def measure(self, sample: Sample) -> Measure:
        self.check_row(sample)
        return measured([self._sequence(self.written(sample), generation=False)])

    def unexpanded(self, sample: Sample, generation: bool) -> list[list[int]]:
        self.check_row(sample)
        return [[i for i in self._sequence(self.written(sample), generation).ids if i != self.image_token_id]]

    def answer_ids(self, sample: Sample) -> list[int]:
        sequence = self._sequence(self.written(sample), generation=False)
        return last_answer(sequence.ids, sequence.labels)

    def _sequence(self, sample: Sample, generation: bool) -> Encoded:
        if len(sample.images) != 1:
            raise RowError(
                sample.id, f"{len(sample.images)} images; this model's caption format takes exactly one (collator=chat takes several)"
            )
        turns = [m for m in sample.messages if m["role"] != "system"]
        if len(turns) != 2:
            raise RowError(sample.id, f"{len(turns)} messages; the caption format takes one question and one answer")
        prompt = self._prompt(sample)
        answer = plain_text(turns[1])
        prefix = [self.image_token_id] * self.processor.num_query_tokens + self._bos() + self._plain(prompt) + self._encoder_end()
        if generation:
            return Encoded(prefix, [IGNORE] * len(prefix), {}, 1)
        # After a prompt the answer starts a new word, and OPT's tokens include the space before a word.
        target = [*self._plain(f" {answer}" if prompt and self._spaces_words else answer), self.end_token_id]
        loss = turns[1].get("loss") is not False
        return Encoded(
            prefix + target, [IGNORE] * len(prefix) + (target if loss else [IGNORE] * len(target)), {}, 1, even_weights(turns[1], len(prefix) + len(target))
        )

    def _bos(self) -> list[int]:
        """The ids the tokenizer puts before a text (OPT: `</s>`, id 2; T5: nothing); OPT puts nothing after it."""
        return [] if self.encoder_decoder else self.tokenizer("")["input_ids"][:1]

    def _encoder_end(self) -> list[int]:
        """The ids the tokenizer puts after an encoder's text (T5: `</s>`, id 1)."""
        return self.tokenizer("")["input_ids"][-1:] if self.encoder_decoder else []

    def _plain(self, text: str) -> list[int]:
        """Ids of a text in which `<image>` or `</s>` are the characters a user typed, not control tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] if text else []


def plain_text(message: Message) -> str:
    return " ".join(p["text"].strip() for p in message["content"] if p["type"] == "text").strip()
