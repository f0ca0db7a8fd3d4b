"""Collator: the base class. It opens images, checks encoded rows against them, and pads sequences to a batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError, UserError
from ..common.model_parts import is_encoder_decoder
from ..data.sample import Message, Sample, has_regions
from .box_styles import BoxStyle, check_whole_images, find_style, no_style
from .box_text import regions_of, write_boxes
from .image_sizes import image_file_sizes
from .types import SIZE_KEYS, Batch, Encoded, FamilyRules, Measure

if TYPE_CHECKING:
    import torch

    from ..common.records import Region
    from .types import Images, Tensors

log = logging.getLogger("mmft")

IGNORE = -100  # ignore_index of torch.nn.CrossEntropyLoss: the label of a token that carries no loss
# inputs that only the vision tower reads
PIXELS = ("pixel_values", "pixel_attention_mask", "pixel_mask", "high_res_pixel_values", "pixel_values_local")
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # processor outputs with one value per token


class Collator:
    """Base class of the collators. A subclass implements `encode` and sets `end_token_id`.

    `__call__` returns the training batch, `prompt` the batch to generate from; both open and preprocess images in the same way.

    processor: transformers' processor. family: rules of the model family. model_config: config of the loaded model.
    end_token_ids: ids that end a text, from the loaded model's generation config. max_length: tokens; a longer row is
    refused, never cut (null: no limit).
    """

    end_token_id: int  # the end token that is trained

    def __init__(
        self, *, processor: Any, family: FamilyRules, model_config: Any, end_token_ids: list[int], max_length: int | None = None
    ) -> None:
        self.processor, self.family, self.model_config = processor, family, model_config
        self.tokenizer = processor.tokenizer
        self.end_token_ids = end_token_ids
        self.max_length = max_length
        self._reported: set[str] = set()

    # --- for subclasses -----------------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[list[Encoded]], Tensors]:
        """The sequences of each sample, and the preprocessed images of all sequences in order.

        A row is one sequence, or several where its answers need different contexts. With `generation`, it is one that
        ends where the last answer begins.
        """
        raise NotImplementedError

    def measure(self, sample: Sample) -> Measure:
        """The size of a row. Subclasses do it without decoding images. Raises RowError, ImageError."""
        [row], _ = self.encode([self.written(sample)], [sample.load_images()], generation=False)
        return measured(row)

    def answer_ids(self, sample: Sample) -> list[int]:
        """The ids that the model has to write for the last answer, its end token included. Raises RowError.

        Subclasses do it without decoding images. The answer must carry loss.
        """
        [row], _ = self.encode([self.written(sample)], [sample.load_images()], generation=False)
        return last_answer(row[-1].ids, row[-1].labels)

    def unexpanded(self, sample: Sample, generation: bool) -> list[list[int]]:
        """The ids of each sequence of a row as an engine takes them that writes the images' tokens itself: with one placeholder for each image, or none
        where the engine puts them in front. Raises RowError, and UserError for a format for which this is not known.
        """
        raise UserError(f"{type(self).__name__}: it is not known how another engine writes images into prompts of this format; use backend=transformers")

    def check_row(self, sample: Sample) -> None:
        """Raises RowError for a row whose image places do not fit its images, or that has more or fewer images than the family can take."""
        check_placeholders(sample)
        wanted = self.family.images_per_row
        if wanted is not None and len(sample.images) != wanted:
            raise RowError(sample.id, f"{len(sample.images)} images; this model takes rows of {wanted}: rows with unequal numbers of images would change each other in a batch")

    def report_once(self, topic: str, message: str) -> None:
        """Log a message about the rows, the first time it applies."""
        if topic not in self._reported:
            self._reported.add(topic)
            log.info("%-14s %s", topic, message)

    # --- for callers --------------------------------------------------------------------------------------------

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The training batch: input_ids, attention_mask and labels (B, S), padded on the right, row_ids, and the image tensors.

        B is at least the number of samples; `row_ids` names the row of each sequence.
        Raises RowError for a row that is too long, has no token with loss, or whose image tokens do not match its images.
        """
        return self._batch(samples, generation=False)

    def uncached(self, samples: Sequence[Sample]) -> Batch:
        """The training batch; a feature cache around this collator does not keep these rows."""
        return self(samples)

    def prompt(self, samples: Sequence[Sample]) -> Batch:
        """The batch to generate from: one sequence per row, up to the last answer, without labels. Raises RowError.

        Padded on the left; for an encoder-decoder model on the right.
        """
        return self._batch(samples, generation=True)

    def decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        """Generated ids (B, T) as texts, without special tokens and surrounding white space."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]

    def split_answer(self, text: str, generated: bool = False) -> tuple[str, str]:
        """(reasoning, answer) of a reference, or of a text that the model has generated; metrics compare the answers."""
        return "", text

    # --- boxes ----------------------------------------------------------------------------------------------------

    def box_style(self) -> BoxStyle:
        """How this model writes boxes. Raises UserError if that is not known, or if the model would not see whole images."""
        style = find_style(self.family.boxes, self.model_config.model_type)
        if style is None:
            raise UserError(no_style(self.model_config.model_type))
        check_whole_images(self.processor)
        return style

    def written(self, sample: Sample, sizes: Sequence[tuple[int, int]] | None = None) -> Sample:
        """The sample with its boxes as texts that the model writes; a sample without boxes as it is.

        sizes: (width, height) of its images; None: those of the files. Raises RowError, UserError.
        """
        if not has_regions(sample.messages):
            return sample
        style, sizes = self.box_style(), list(sizes or image_file_sizes(sample))
        return write_boxes(sample, style, sizes, self._resized(style, sample, sizes))

    def regions_in(self, text: str, sample: Sample) -> list[Region]:
        """The boxes and points in a generated text, in pixels of the sample's image files; [] if the family writes none.

        In a row of several images they belong to the one of the row's own boxes, or to the first.
        """
        style = find_style(self.family.boxes, self.model_config.model_type)
        found = style.read(text) if style is not None and sample.images else []
        if style is None or not found:
            return []
        sizes = image_file_sizes(sample)
        return regions_of(found, sample, style, sizes, self._resized(style, sample, sizes))

    def _resized(self, style: BoxStyle, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The sizes of the images as the model sees them, where the style counts their pixels; else the given ones. Raises RowError."""
        if style.steps is not None:
            return sizes
        resized = self.row_sizes(sample, sizes) or self.final_sizes(sizes)
        if resized is None:
            raise RowError(sample.id, "its boxes are to be written in pixels of the resized image, and this model family does not tell that size;"
                                      " use model.boxes=thousandths")  # fmt: skip
        return resized

    def final_sizes(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """The sizes to which the processor will resize images of these sizes, if the family can tell."""
        try:
            final = [self.family.image_size(*size, {}, self.processor.image_processor) for size in sizes]
        except ValueError:
            return None
        return [size for size in final if size is not None] if None not in final else None

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a generated text: the trained one, then those of the model's generation config."""
        return list(dict.fromkeys([self.end_token_id, *self.end_token_ids]))

    @property
    def image_token_id(self) -> int:
        """The id of the token that image features replace."""
        config = self.model_config
        return config.image_token_id if getattr(config, "image_token_id", None) is not None else config.image_token_index

    # --- the two halves of a batch; the feature cache calls them one by one ---------------------------------------

    def encode_checked(self, samples: Sequence[Sample], generation: bool) -> tuple[list[list[Encoded]], Tensors]:
        """Encode samples and check each row: images, length, loss. Raises RowError."""
        for sample in samples:
            self.check_row(sample)
        loaded = [sample.load_images() for sample in samples]
        samples = [self.written(sample, [i.size for i in images]) for sample, images in zip(samples, loaded, strict=True)]
        images = [self.sized_images(sample, images) for sample, images in zip(samples, loaded, strict=True)]
        rows, tensors = self.encode(samples, images, generation)
        tensors = self._in_own_precision(tensors)
        for sample, row in zip(samples, rows, strict=True):
            tokens = max(len(sequence.ids) for sequence in row)
            if self.max_length is not None and tokens > self.max_length:
                raise RowError(
                    sample.id,
                    f"{tokens} tokens, more than collator.max_length={self.max_length}; rows are never cut (an image could be cut"
                    " through): raise the limit, or make images smaller with model.processor.max_pixels",
                )
            if not generation and not measured(row).loss_tokens:
                raise RowError(sample.id, NO_LOSS)
        self._check_images(samples, rows, tensors)
        return rows, tensors

    def assemble(self, samples: Sequence[Sample], rows: list[list[Encoded]], tensors: Tensors, generation: bool) -> Batch:
        """The batch of encoded rows and their image inputs: image tensors, or features computed before."""
        # an encoder counts positions from the start of the text, so it is padded on the right
        left = generation and not is_encoder_decoder(self.model_config)
        batch = self._pad([sequence for row in rows for sequence in row], left=left)
        if generation:
            del batch["labels"]
        else:  # lets an error message name the rows of a step
            batch["row_ids"] = [sample.id for sample, row in zip(samples, rows, strict=True) for _ in row]
            if (weights := _loss_weights(samples, rows, batch["labels"])) is not None:
                batch["loss_weights"] = weights
        batch.update(tensors)
        batch.update(self.family.batch_inputs(batch, self.model_config))
        return batch

    def image_keys(self, sample: Sample) -> list[str]:
        """A key of what the model sees of each image: the content hash of its file, with the size that the row asks for."""
        sizes = size_keys(sample)
        return [f"{sha256}{json.dumps(size, sort_keys=True)}" if size else sha256 for sha256, size in zip(sample.sha256, sizes)]

    def sized_images(self, sample: Sample, images: Images) -> Images:
        """The images of a row, resized where the row sets their sizes (SIZE_KEYS). Raises RowError."""
        sizes = self.row_sizes(sample, [image.size for image in images])
        return images if sizes is None else [image.resize(size) for image, size in zip(images, sizes, strict=True)]

    def row_sizes(self, sample: Sample, images: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """(width, height) of each image of a row that sets the size of at least one; None for all other rows. Raises RowError.

        images: (width, height) of the image files. The model's processor must not resize the images of such a row again.
        """
        wanted = size_keys(sample)
        if not any(wanted):
            return None
        sizes = []
        for (width, height), keys in zip(images, wanted, strict=True):
            try:
                size = self.family.image_size(width, height, keys, self.processor.image_processor)
            except ValueError as error:
                raise RowError(sample.id, f"{', '.join(f'{k}={v}' for k, v in keys.items())}: {error}") from None
            if size is None:
                named = ", ".join(sorted({key for keys in wanted for key in keys}))
                self.report_once("image sizes", f"{named} of rows (the first: {sample.id}) have no effect: this model has no such sizes; see model.processor")
                return None
            sizes.append(size)
        return sizes

    # --- internal -----------------------------------------------------------------------------------------------

    def _batch(self, samples: Sequence[Sample], generation: bool) -> Batch:
        return self.assemble(samples, *self.encode_checked(samples, generation), generation)

    def _in_own_precision(self, tensors: Tensors) -> Tensors:
        """Images that the processor gives in half precision (Llama 4's) in the precision of the model, which not every tower sees to itself."""
        import torch

        dtype = getattr(self.model_config, "dtype", None)
        half = {k for k, v in tensors.items() if isinstance(v, torch.Tensor) and v.dtype in (torch.bfloat16, torch.float16)}
        return {k: v.to(dtype) if k in half and dtype is not None else v for k, v in tensors.items()}

    def _check_images(self, samples: Sequence[Sample], rows: list[list[Encoded]], tensors: Tensors) -> None:
        """Each sequence must hold as many image tokens as its own images have features. Raises RowError.

        The batch total is not enough: two wrong rows can cancel out, and then one row reads the other's features.
        """
        features = self.family.features_per_image(tensors, self.model_config)
        if features is None:
            return
        image_token = self.image_token_id
        start = 0
        for sample, row in zip(samples, rows, strict=True):
            for sequence in row:
                expected = sum(features[start : start + sequence.n_images])
                start += sequence.n_images
                count = sequence.ids.count(image_token)
                if count != expected:
                    raise RowError(
                        sample.id, f"{count} image tokens in the text but {expected} image features for its {sequence.n_images} images"
                    )
        if start != len(features):
            raise RowError(samples[-1].id, f"{len(features)} images were processed for {start} images in this batch")

    def _pad(self, sequences: list[Encoded], left: bool) -> Batch:
        import numpy as np
        import torch

        length = max(len(s.ids) for s in sequences)

        def padded(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            array = np.full((len(values), length), fill, dtype=np.int64)
            for line, numbers in zip(array, values):
                line[length - len(numbers) if left else 0 : length if left else len(numbers)] = numbers
            return torch.from_numpy(array)

        batch = {
            "input_ids": padded([s.ids for s in sequences], self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(s.ids) for s in sequences], 0),
            "labels": padded([s.labels for s in sequences], IGNORE),
        }
        return batch | {key: padded([s.extra[key] for s in sequences], 0) for key in sequences[0].extra}


def _loss_weights(samples: Sequence[Sample], rows: list[list[Encoded]], labels: torch.Tensor) -> torch.Tensor | None:
    """(B, S) float32: the loss weight of each token of a training batch, 0 where it carries no loss; None if all weigh 1."""
    import torch

    sequences = [(sample.weight, sequence.weights) for sample, row in zip(samples, rows, strict=True) for sequence in row]
    if all(weight == 1 and own is None for weight, own in sequences):
        return None
    weights = (labels != IGNORE).float()
    for line, (weight, own) in zip(weights, sequences):
        if own is not None:
            line[: len(own)] *= torch.tensor(own, dtype=torch.float32)  # training batches are padded on the right
        line *= weight
    return weights


NO_LOSS = "no token of this row carries loss; its answer is empty"


def check_placeholders(sample: Sample) -> None:
    """Raises RowError if the messages of a row do not hold one image part for each of its images."""
    placeholders = sum(part["type"] == "image" for message in sample.messages for part in message["content"])
    if placeholders != len(sample.images):
        raise RowError(sample.id, f"{len(sample.images)} images but {placeholders} image places in its messages")


def size_keys(sample: Sample) -> list[dict[str, int]]:
    """For each image of a row the SIZE_KEYS of its image part."""
    parts: list[dict[str, Any]] = [dict(part) for message in sample.messages for part in message["content"] if part["type"] == "image"]
    return [{key: part[key] for key in SIZE_KEYS if part.get(key) is not None} for part in parts]


def even_weights(answer: Message, length: int) -> list[float] | None:
    """The weights of a sequence with one answer; None for the weight 1."""
    weight = float(answer.get("weight", 1.0))
    return None if weight == 1 else [weight] * length


def last_answer(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The last run of ids that carry loss."""
    end = max((i + 1 for i, label in enumerate(labels) if label != IGNORE), default=0)
    start = next((i + 1 for i in range(end - 1, -1, -1) if labels[i] == IGNORE), 0)
    return list(ids[start:end])


def measured(row: list[Encoded]) -> Measure:
    # the first label is never predicted: no token comes before it
    return Measure(max(len(s.ids) for s in row), sum(label != IGNORE for s in row for label in s.labels[1:]), len(row))
