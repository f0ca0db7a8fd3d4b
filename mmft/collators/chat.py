"""ChatCollator: the format of any chat model. The processor's chat template renders rows; loss on answers and their end tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError, UserError, nearest
from .base import IGNORE, PER_TOKEN, Collator, last_answer
from .chat_template import ChatTemplate, Rendered, Turn
from .control_tokens import Span, Tokens, frame_tokens, hide, mark, pixel_tokens, unhide
from .image_sizes import image_file_sizes
from .types import Encoded, FamilyRules, Measure, Replacement

if TYPE_CHECKING:
    import torch

    from ..data.sample import Sample
    from .types import Images, Tensors


Sizes = tuple[tuple[int, int], ...]  # (width, height) of some images
# Processors that cut images into tiles, or keep their shape, tell at least two of these apart.
TRIAL_SIZES: Sizes = ((64, 64), (1024, 1024), (1600, 200), (200, 1600), (900, 1200), (1200, 900), (500, 375))


@dataclass(frozen=True)
class Expansion:
    """What a processor writes for an image: the placeholder, and the text or, where that is enough, the number of tokens it adds."""

    placeholder: str
    text: str
    added: int | None


class ChatCollator(Collator):
    """The processor's chat template renders each row. `system` is added to rows without a system message (null: none).

    If the template writes no end token after an answer (LLaVA-1.5), the tokenizer's is added: a model that never saw an
    answer end does not stop when it generates.

    answer_tokens: special tokens that an answer may hold (boxes, points, OCR): in an assistant's text they are encoded as
    these tokens, and `decode` keeps them. `auto`: every special token that neither opens nor closes a turn nor stands for
    pixels. prompt_tokens: special tokens that are read as such in the texts of all other turns, too; there, all others are text.
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
        answer_tokens: str | Sequence[str] = "auto",
        prompt_tokens: Sequence[str] = (),
    ) -> None:
        """Raises UserError for a processor without a usable chat template, if no answer would end, or for a wrong token."""
        super().__init__(
            processor=processor, family=family, model_config=model_config, end_token_ids=end_token_ids, max_length=max_length
        )
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        if not self.template:
            raise UserError("collator=chat: this model's processor has no chat template; use collator=completion (BLIP-2: caption), or add chat_template.jinja")
        self.system = system
        self.tokens = Tokens(self.tokenizer, self.template)
        rope = getattr(getattr(model_config, "text_config", None), "rope_parameters", None) or {}
        # rotary positions that differ for image tokens; some processors give the tokens' types only if they are asked to
        self._has_multimodal_positions = "mrope_section" in rope and "mm_token_type_ids" in processor.model_input_names
        self.chat = ChatTemplate(processor, self.template, self.tokens, self._image_text(), self._opening())
        if not (self.chat.ending or self.tokenizer.eos_token):
            raise UserError("collator=chat: neither the chat template nor the tokenizer has an end token, so no answer would ever end")
        self.end_token_id = self.tokens.encode(self.chat.ending or self.tokenizer.eos_token)[0][-1]
        self._choose_tokens(answer_tokens, prompt_tokens)
        self._expansions: dict[tuple[Sizes, bool], list[Expansion]] = {}

    def _choose_tokens(self, answer_tokens: str | Sequence[str], prompt_tokens: Sequence[str]) -> None:
        """Which control tokens are plain text in an answer, and which in other turns; which ids `decode` drops."""
        control = self.tokens.control
        frame = frame_tokens(self.tokenizer, control, self.end_ids) | pixel_tokens(self.processor, control) | self.chat.turn_tokens()
        special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        free = [token for token in special if token not in frame]
        if isinstance(answer_tokens, str) and answer_tokens != "auto":
            raise UserError(f"collator.answer_tokens={answer_tokens}: must be auto, or a list of special tokens")
        for key, listed in (("answer_tokens", [] if isinstance(answer_tokens, str) else answer_tokens), ("prompt_tokens", prompt_tokens)):
            for token in listed:
                if token in frame:
                    raise UserError(f"collator.{key}: {token} opens or closes a turn or stands for an image, and a text may not write it")
                if token not in special:
                    raise UserError(f"collator.{key}: {token!r} is not a special token of this model.{nearest(token, free)}")
        kept = set(free if isinstance(answer_tokens, str) else answer_tokens)
        self.answer_control = [t for t in control if t in frame or (t in special and t not in kept)]
        self.prompt_control = [t for t in control if t not in set(prompt_tokens)]
        self.dropped_ids = {i for token, i in special.items() if token not in kept}

    def _image_text(self) -> str:
        """What stands for an image in a template that accepts only strings: the token that the processor expands."""
        token = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None) or ""
        edges = [getattr(self.model_config, f"vision_{edge}_token_id", None) for edge in ("start", "end")]
        if token and None not in edges:
            start, end = self.tokenizer.convert_ids_to_tokens(edges)
            return f"{start}{token}{end}"
        return token

    def _opening(self) -> str:
        """The special token that the processor itself puts before a text that lacks it (Molmo 2, Llama 3.2 Vision); "" for others."""
        with suppress(RowError, TypeError, KeyError, IndexError):  # of processors that take no text without an image
            first, *rest = self._call(["a"], [[]], "a text", False)["input_ids"][0]
            if first in self.tokenizer.all_special_ids and rest == self.tokenizer("a", add_special_tokens=False)["input_ids"]:
                return str(self.tokenizer.convert_ids_to_tokens(int(first)))
        return ""

    def decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        """Generated ids (B, T) as texts, without special tokens (but for `answer_tokens`) and surrounding white space."""
        return self.tokens.decode(ids, self.dropped_ids)

    def split_answer(self, text: str, generated: bool = False) -> tuple[str, str]:
        return self.chat.split_answer(text, generated)

    # --- text ---------------------------------------------------------------------------------------------------

    def _turns(self, sample: Sample) -> list[Turn]:
        turns = []
        if self.system and sample.messages[0]["role"] != "system":
            turns.append(Turn("system", (mark(self.system, self.prompt_control),)))
        for message in sample.messages:
            control = self.answer_control if message["role"] == "assistant" else self.prompt_control
            content = tuple(mark(p["text"], self.answer_control if p.get("tokens") else control) if p["type"] == "text" else None for p in message["content"])
            reasoning = mark(str(message.get("reasoning_content") or ""), control).strip()
            turns.append(Turn(message["role"], content, reasoning, message.get("loss") is not False, float(message.get("weight", 1.0))))
        return turns

    def _rendered(self, sample: Sample, generation: bool) -> list[Rendered]:
        turns = self._turns(sample)
        if generation:
            return [self.chat.prompt(turns, sample.id)]
        rendered = self.chat.sequences(turns, sample.id)
        if len(rendered) > 1:
            self.report_once("chat template", "renders earlier turns differently from the last one: rows of several answers become one sequence"
                             f" for each context, so that every answer is trained as it would be generated (the first: {sample.id})")  # fmt: skip
        if any(turn.reasoning for turn in turns) and not (self.chat.writes_reasoning or self.chat.opens):
            self.report_once("reasoning", f"the chat template does not read reasoning_content; it is trained as {self.chat.think[0]}..."
                             f"{self.chat.think[1]} before the answer")  # fmt: skip
        return rendered

    # --- size ---------------------------------------------------------------------------------------------------

    def measure(self, sample: Sample) -> Measure:
        self.check_row(sample)
        sizes = image_file_sizes(sample)
        sample = self.written(sample, sizes)
        texts = self._rendered(sample, generation=False)
        final = self.row_sizes(sample, sizes) or self.final_sizes(sizes)
        counts = [self._count(sample, text, tuple(final or sizes)[: text.n_images], final is not None) for text in texts]
        return Measure(max(tokens for tokens, _ in counts), sum(loss for _, loss in counts), len(texts))

    def answer_ids(self, sample: Sample) -> list[int]:
        text = self._rendered(self.written(sample), generation=False)[-1]  # the answer's tokens do not depend on what stands for an image
        return last_answer(*self._labelled(text.text, text.spans, *self.tokens.encode(text.text)))

    def _count(self, sample: Sample, rendered: Rendered, sizes: Sizes, final: bool) -> tuple[int, int]:
        """(tokens, tokens with loss) of a text whose images have these sizes; final: the processor will not resize them."""
        hidden_text, runs = hide(rendered.text)
        text, spans, added = rendered.text, rendered.spans, 0
        if sizes:
            if final:
                expansions = [self._expand_blank(self.chat.image_text, (size,), True, sample)[0] for size in sizes]
            elif self._size_matters(sample):  # then what is written for an image may depend on the images beside it, too
                expansions = self._expand_blank(hidden_text, sizes, False, sample)
            else:
                expansions = self._expand_blank(self.chat.image_text, TRIAL_SIZES[:1], False, sample) * len(sizes)
            placeholder = expansions[0].placeholder
            at = [m.start() for m in re.finditer(re.escape(placeholder), hidden_text)]
            self._check_replaced(sample, rendered, len(at))
            if all(e.added is not None for e in expansions):
                added = sum(e.added or 0 for e in expansions)
            else:
                replaced: list[Replacement] = [
                    {"span": (unhide(a, runs), unhide(a + len(placeholder), runs)), "replacement": e.text} for a, e in zip(at, expansions)
                ]
                text, spans = _expand(text, spans, replaced)
        ids, labels = self._labelled(text, spans, *self.tokens.encode(text))
        bos = self._adds_bos(text)
        return len(ids) + added + bos, sum(label != IGNORE for label in labels[0 if bos else 1 :])

    def _size_matters(self, sample: Sample) -> bool:
        """Whether the processor writes different tokens for images of different sizes."""
        try:
            first, *others = (self._expand_blank(self.chat.image_text, (size,), False, sample) for size in TRIAL_SIZES)
        except RowError:  # it refuses one of them
            return True
        return any(other != first for other in others)

    def _expand_blank(self, text: str, sizes: Sizes, final: bool, sample: Sample) -> list[Expansion]:
        """What the processor writes for images of these sizes in a text; it is asked once, with blank images. Raises RowError."""
        from PIL import Image

        key = (sizes, final)
        if key not in self._expansions:
            out = self._call([text], [[Image.new("RGB", size) for size in sizes]], sample.id, final)
            [replaced] = out["text_replacement_offsets"]
            if len(replaced) != len(sizes):
                raise RowError(sample.id, f"{len(sizes)} images but {len(replaced)} image places in the rendered text")
            self._expansions[key] = [self._as_expansion(text[slice(*r["span"])], r["replacement"]) for r in replaced]
        return self._expansions[key]

    def _as_expansion(self, placeholder: str, written: str) -> Expansion:
        if not (written.startswith(self.tokens.control) and written.endswith(self.tokens.control)):
            return Expansion(placeholder, written, None)
        # control tokens at both ends: the text around an image is tokenized as it is around the placeholder
        return Expansion(placeholder, "", len(self.tokens.encode(written)[0]) - len(self.tokens.encode(placeholder)[0]))

    # --- ids ----------------------------------------------------------------------------------------------------

    def unexpanded(self, sample: Sample, generation: bool) -> list[list[int]]:
        self.check_row(sample)
        rows = []
        for text in self._rendered(self.written(sample), generation):
            ids, _ = self._cut(text.text, text.spans, *self.tokens.encode(text.text))
            rows.append([self.tokenizer.bos_token_id, *ids] if self._adds_bos(text.text) else ids)
        return rows

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[list[Encoded]], Tensors]:
        rendered = [self._rendered(sample, generation) for sample in samples]
        sized = [self.row_sizes(s, [i.size for i in own]) is not None for s, own in zip(samples, images, strict=True)]
        rows: list[list[Encoded]] = []
        parts: list[Tensors] = []
        # rows that set the sizes of their images are processed apart: a processor resizes all images of a call, or none
        for keep_size, group in groupby(range(len(samples)), key=sized.__getitem__):
            indices = list(group)
            encoded, tensors = self._process([samples[i] for i in indices], [rendered[i] for i in indices], [images[i] for i in indices], keep_size)
            rows += encoded
            parts.append(tensors)
        return rows, parts[0] if len(parts) == 1 else joined_tensors(parts)

    def _process(
        self, samples: list[Sample], rendered: list[list[Rendered]], images: list[Images], keep_size: bool
    ) -> tuple[list[list[Encoded]], Tensors]:
        flat = [(sample, text, own[: text.n_images]) for sample, texts, own in zip(samples, rendered, images, strict=True) for text in texts]
        hidden = [hide(text.text) for _, text, _ in flat]  # the processor must not see control tokens that a user typed
        texts = [text for text, _ in hidden]
        try:
            out = self._call(texts, [own for *_, own in flat], ", ".join(s.id for s in samples), keep_size)
        except RowError:
            if len(samples) == 1 or not self.family.images_apart:
                raise
            # some processors take no rows of different lengths; and if one row is at fault, it is named
            alone = [self._process([s], [r], [i], keep_size) for s, r, i in zip(samples, rendered, images, strict=True)]
            return [row for rows, _ in alone for row in rows], joined_tensors([tensors for _, tensors in alone])
        replaced: list[list[Replacement]] = out.pop("text_replacement_offsets")
        per_token = {key: out.pop(key) for key in [*out] if key in PER_TOKEN or key.endswith("type_ids")}
        sequences: Iterator[Encoded] = iter([
            self._sequence(sample, text, hidden[i], replaced[i], {k: list(v[i]) for k, v in per_token.items()})
            for i, (sample, text, _) in enumerate(flat)
        ])  # fmt: skip
        return [[next(sequences) for _ in texts] for texts in rendered], self._tensors(out)

    def _replaced(self, texts: list[str], out: dict[str, Any]) -> list[list[Replacement]]:
        """What stands for each image of each text, asked of a processor that does not return it."""
        token, images = getattr(self.processor, "image_token", None), count()
        if not token or not hasattr(self.processor, "replace_image_token"):
            return [[] for _ in texts]
        return [
            [{"span": match.span(), "replacement": self.processor.replace_image_token(out, next(images))} for match in re.finditer(re.escape(token), text)]
            for text in texts
        ]

    def _call(self, texts: list[str], images: list[Images], names: str, keep_size: bool) -> dict[str, Any]:
        """What the processor returns for these texts and their images, with what it wrote for each image in `text_replacement_offsets`. Raises RowError."""
        try:
            out = self.processor(
                text=list(texts),  # some processors write into this list
                images=self.family.arranged(images) if any(images) else None,
                add_special_tokens=False,  # _sequence adds BOS to the ids
                padding=False,
                return_text_replacement_offsets=True,
                text_kwargs={"return_tensors": None, "verbose": False},  # the texts differ in length, and some processors ask for tensors by default
                **({"return_mm_token_type_ids": True} if self._has_multimodal_positions else {}),
                images_kwargs={"return_tensors": "pt"},  # as in use; without, Llama 4's tiles are not joined
                **({"do_resize": False} if keep_size else {}),
            )
        except ValueError as error:
            raise RowError(names, f"the processor refuses this batch: {str(error).strip().splitlines()[0]}") from None
        if not any(out.get("text_replacement_offsets") or []):
            out["text_replacement_offsets"] = self._found_replacements(texts, out) if any(images) else [[] for _ in texts]
        return out

    def _found_replacements(self, texts: list[str], out: dict[str, Any]) -> list[list[Replacement]]:
        """What the processor wrote for each image, where it does not say so itself."""
        by_family = [self.family.replacements(text, self.processor) for text in texts]
        if any(by_family):
            return [replacements or [] for replacements in by_family]
        if all(self.tokens.encode(text)[0] == ids for text, ids in zip(texts, out["input_ids"], strict=True)):
            return [self._written_by_template(text) for text in texts]
        return self._replaced(texts, out)

    def _written_by_template(self, text: str) -> list[Replacement]:
        """The places of images in a text whose template itself writes all their tokens, so that the processor replaces nothing."""
        token = re.escape(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        return [{"span": m.span(), "replacement": m.group()} for m in re.finditer(f"(?:{token})+", text)]

    def _sequence(
        self, sample: Sample, rendered: Rendered, hidden: tuple[str, list[Span]], replaced: list[Replacement], given: dict[str, list[int]]
    ) -> Encoded:
        """Ids, labels and per-token values of a text, from what the processor returned for it (`replaced`, `given`)."""
        self._check_replaced(sample, rendered, len(replaced))
        hidden_text, runs = hidden
        in_text: list[Replacement] = [{**r, "span": (unhide(r["span"][0], runs), unhide(r["span"][1], runs))} for r in replaced]
        expanded, spans = _expand(rendered.text, rendered.spans, in_text)
        ids, offsets = self.tokens.encode(expanded)
        # without marked runs, as in nearly every row, the processor saw exactly this text
        if (self.tokens.encode(_expand(hidden_text, [], replaced)[0])[0] if runs else ids) != given["input_ids"]:
            raise RowError(sample.id, "the processor tokenised this row in a way that cannot be followed, so its answer cannot be located")
        ids, offsets = self._cut(expanded, spans, ids, offsets)
        labels, places = _labels(spans, ids, offsets)
        weights = [rendered.weights[place] if place >= 0 else 0.0 for place in places] if any(w != 1 for w in rendered.weights) else None
        if ids != given["input_ids"]:
            given = self._retype(given, ids)
        extra = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
        if self._adds_bos(rendered.text):
            # Added as an id: as text, it would be the first word to SentencePiece and take the space before the real one.
            ids, labels, extra = [self.tokenizer.bos_token_id, *ids], [IGNORE, *labels], {k: [0, *v] for k, v in extra.items()}
            weights = None if weights is None else [0.0, *weights]
        return Encoded(ids, labels, extra, rendered.n_images, weights)

    def _check_replaced(self, sample: Sample, rendered: Rendered, count: int) -> None:
        if count != rendered.n_images:
            raise RowError(sample.id, f"{rendered.n_images} images but {count} image places in the rendered text")

    def _adds_bos(self, text: str) -> bool:
        return bool(self.tokens.bos) and not text.startswith(self.tokens.bos)

    def _labelled(self, text: str, spans: list[Span], ids: list[int], offsets: list[Span]) -> tuple[list[int], list[int]]:
        """The ids of a text and their labels; tokenized again if a token spans the border between prompt and answer."""
        ids, offsets = self._cut(text, spans, ids, offsets)
        return ids, _labels(spans, ids, offsets)[0]

    def _cut(self, text: str, spans: list[Span], ids: list[int], offsets: list[Span]) -> tuple[list[int], list[Span]]:
        if any(a < start < b for start, _ in spans for a, b in offsets):
            # in generation the model never sees such a token
            return self.tokens.encode(text, cuts=[start for start, _ in spans])
        return ids, offsets

    def _retype(self, given: dict[str, list[int]], ids: list[int]) -> dict[str, list[int]]:
        """The token type ids of a row that was tokenized again: as the processor makes them, else 1 for image tokens and 0 otherwise."""
        types = [int(i in self.processor.image_token_ids) for i in ids]
        makers = {key: getattr(self.processor, f"create_{key}", None) for key in given if key.endswith("type_ids")}
        return {key: types if maker is None else list(maker([ids])[0]) for key, maker in makers.items()}

    def _tensors(self, out: dict[str, Any]) -> Tensors:
        from transformers import BatchFeature

        return dict(BatchFeature(self.family.image_inputs(dict(out)), tensor_type="pt"))


def _labels(spans: list[Span], ids: list[int], offsets: list[Span]) -> tuple[list[int], list[int]]:
    """(label of each token, number of the span that it lies in, -1 for none)."""
    labels, places = [IGNORE] * len(ids), [-1] * len(ids)
    for number, (start, end) in enumerate(spans):
        for i, (a, b) in enumerate(offsets):
            if a >= start and b <= end and b > a:
                labels[i], places[i] = ids[i], number
    return labels, places


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


def joined_tensors(parts: list[Tensors]) -> Tensors:
    """Image tensors of several processor calls, in order; each has one entry per image or patch in its first dimension."""
    import torch

    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
