"""CompletionCollator: the format of models without a chat template. The processor writes image and prompt as in use; the answer and the end token follow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError, UserError
from ..common.model_parts import is_encoder_decoder
from .base import IGNORE, PER_TOKEN, Collator, even_weights, measured
from .caption import plain_text
from .chat import joined_tensors
from .control_tokens import Tokens, frame_tokens, mark, pixel_tokens
from .image_sizes import image_file_sizes
from .types import Encoded, FamilyRules, Measure

if TYPE_CHECKING:
    import torch

    from ..data.sample import Sample
    from .types import Images, Tensors


class CompletionCollator(Collator):
    """A row is what the processor writes for its images and its prompt, then the answer and the end token, which carry loss.

    For PaliGemma that is the image's tokens, BOS, the prompt and a newline; for Florence-2 all of it is the encoder's text. `prompt`
    replaces the user's text in every row (null: keep the row's own). The end token is the first id of `end_token_ids`. Special tokens that
    neither frame a text nor stand for pixels (boxes, points) are encoded as these tokens and kept by `decode`.
    """

    def __init__(
        self, *, processor: Any, family: FamilyRules, model_config: Any, end_token_ids: list[int], max_length: int | None = None, prompt: str | None = None
    ) -> None:
        """Raises UserError for a processor that does not write images into a prompt."""
        super().__init__(processor=processor, family=family, model_config=model_config, end_token_ids=end_token_ids, max_length=max_length)
        self.fixed_prompt = prompt
        self.end_token_id = end_token_ids[0]
        self.encoder_decoder = is_encoder_decoder(model_config)
        self.tokens = Tokens(self.tokenizer, "")
        special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self.frame = frame_tokens(self.tokenizer, special, self.end_ids) | pixel_tokens(processor, special)
        self.dropped_ids = {special[token] for token in self.frame}
        self.image_text = self._find_image_text()

    def _find_image_text(self) -> str:
        """What stands for an image in a prompt; "" if the processor writes its one image into every prompt itself."""
        from PIL import Image

        blank = [Image.new("RGB", (64, 64))]
        place = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None) or ""
        without, placed = self._with_image("a", blank), self._with_image(f"{place}a", blank) if place else None
        if without is None and placed is None:
            raise UserError(
                f"collator=completion: {type(self.processor).__name__} writes no image into a prompt; use collator=chat, or the collator of the model's preset"
            )
        # a processor that writes the image itself reads a typed place as text, or as the same image (PaliGemma)
        return place if placed is not None and placed == (without or placed) else ""

    def _with_image(self, text: str, images: Images) -> list[int] | None:
        """The ids of a text in which the processor makes room for an image; None if it makes none."""
        with suppress(RowError, IndexError, StopIteration):
            out = self._call("", text, images)
            if self.family.image_places(out, self.model_config)[0]:
                return [int(i) for i in out["input_ids"][0]]
        return None

    # --- encoding -----------------------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[list[Encoded]], Tensors]:
        rows: list[list[Encoded]] = []
        parts: list[Tensors] = []
        for sample, own in zip(samples, images, strict=True):
            out = self._call(sample.id, self._prompt(sample), own)
            per_token = {key: out.pop(key)[0].tolist() for key in list(out) if key in (*PER_TOKEN, *self.family.answer_values)}
            rows.append([self._sequence(sample, per_token, generation)])
            parts.append({key: value for key, value in out.items() if key not in ("labels", "text_replacement_offsets")})
        return rows, parts[0] if len(parts) == 1 else joined_tensors(parts)

    def _call(self, row: str, text: str, images: Images) -> dict[str, Any]:
        """What the processor returns for one prompt: (1, S) tensors for the text, and the tensors of its images. Raises RowError."""
        from transformers.utils import logging as library_log

        level = library_log.get_verbosity()
        library_log.set_verbosity_error()  # some processors remark on every prompt without an image
        try:
            return dict(self.processor(text=[text], images=images or None, return_tensors="pt"))
        except (ValueError, TypeError) as error:
            raise RowError(row, f"the processor refuses this row: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
        finally:
            library_log.set_verbosity(level)

    def _sequence(self, sample: Sample, given: dict[str, list[int]], generation: bool) -> Encoded:
        prefix = given.pop("input_ids")
        given.pop("attention_mask", None)
        if not self.encoder_decoder and prefix[-1] == self.end_token_id:  # of tokenizers that end every text
            prefix, given = prefix[:-1], {key: values[:-1] for key, values in given.items()}
        if generation:
            return Encoded(prefix, [IGNORE] * len(prefix), given, len(sample.images))
        answer = plain_text(sample.messages[-1])
        if not answer:
            raise RowError(sample.id, "an answer is empty, so nothing but its end would be learned")
        target = [*self.tokens.encode(mark(answer, self.frame))[0], self.end_token_id]
        loss = sample.messages[-1].get("loss") is not False
        extra = {key: [*values, *[self.family.answer_values.get(key, 0)] * len(target)] for key, values in given.items()}
        return Encoded(
            prefix + target, [IGNORE] * len(prefix) + (target if loss else [IGNORE] * len(target)), extra, len(sample.images),
            even_weights(sample.messages[-1], len(prefix) + len(target)),
        )  # fmt: skip

    def _prompt(self, sample: Sample) -> str:
        roles = [m["role"] for m in sample.messages]
        if roles != ["user", "assistant"]:
            raise RowError(sample.id, f"its turns are {', '.join(roles)}; a model without a chat template takes one question and one answer")
        if not self.image_text and len(sample.images) != 1:
            raise RowError(sample.id, f"{len(sample.images)} images; this model's prompt holds exactly one")
        prompt = plain_text(sample.messages[0]) if self.fixed_prompt is None else self.fixed_prompt
        if typed := next((token for token in self.frame if token in prompt), None):
            raise RowError(sample.id, f"its prompt holds {typed}, which stands for an image or an end of text in this model; remove it from the text")
        return self.image_text * len(sample.images) + prompt

    def measure(self, sample: Sample) -> Measure:
        from PIL import Image

        self.check_row(sample)
        sizes = image_file_sizes(sample)
        blank = [Image.new("RGB", size) for size in sizes]  # the processor counts by size
        [row], _ = self.encode([self.written(sample, sizes)], [blank], generation=False)
        return measured(row)

    def decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        """Generated ids (B, T) as texts, without the tokens that frame a text or stand for pixels, and surrounding white space."""
        return self.tokens.decode(ids, self.dropped_ids)
