"""Types of the collators' interface: an encoded sequence, a batch, and the two Protocols on either side of a collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..common.records import Region
    from ..data.sample import Sample

    Images = list[Image.Image]  # the images of one row, in the order of its image parts
    Tensors = dict[str, torch.Tensor]  # a model's image inputs, or what stands in for them, by argument name

# A batch by argument name of the model's forward: tensors, and in a training batch also `row_ids`, a list of str, and `loss_weights` (B, S) where
# some tokens weigh other than 1.
Batch = dict[str, Any]

# Keys of an image part that set the size of this image, as in the rows of Qwen's models (qwen-vl-utils), in pixels.
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")


@dataclass
class Encoded:
    """One sequence of token ids. `labels` equals `ids` where a token carries loss and IGNORE elsewhere; both have the same length.

    weights: of the loss of each token, as long as `labels`; None where all weigh 1.
    """

    ids: list[int]
    labels: list[int]
    extra: dict[str, list[int]]  # further values per token, e.g. mm_token_type_ids
    n_images: int  # the sequence shows the first n_images images of its row
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Measure:
    """The size of one row before it is collated; of a row with several sequences, `tokens` is the longest and `sequences` their number."""

    tokens: int
    loss_tokens: int
    sequences: int = 1


class Replacement(TypedDict):
    """One image placeholder that a processor expanded: its characters in the text, and the text written instead."""

    span: tuple[int, int]
    replacement: str


class FamilyRules(Protocol):
    """What a collator needs to know about a model family; mmft.models.families.base.Family implements it.

    boxes: how the model writes boxes, see mmft.collators.box_styles.
    """

    boxes: str

    images_per_row: ClassVar[int | None]  # the number of images that every row must have
    images_apart: ClassVar[bool]  # whether the image inputs of two batches, one behind the other, are those of one batch
    answer_values: ClassVar[Mapping[str, int]]  # inputs with one value per token that are not 0 at the tokens of an answer: that value

    def replacements(self, text: str, processor: Any) -> list[Replacement] | None:
        """What the processor writes for each image placeholder of a text; None if the processor itself tells."""
        ...

    def image_places(self, batch: dict[str, Any], config: Any) -> list[int]:
        """The number of places for image features in each sequence of a batch."""
        ...

    def batch_inputs(self, batch: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
        """Inputs of the model that follow from a whole batch, such as masks between tokens and images."""
        ...

    def arranged(self, images: list[Images]) -> Any:
        """The images of several texts in the form the processor takes them."""
        ...

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs from what the processor returned for the images of a batch, in lists where images differ in shape."""
        ...

    def features_per_image(self, batch: dict[str, Any], config: Any) -> list[int] | None:
        """The number of features the model computes for each image of a batch, in order; None if the family cannot tell."""
        ...

    def image_size(self, width: int, height: int, sizes: Mapping[str, int], image_processor: Any) -> tuple[int, int] | None:
        """(width, height) in pixels that `sizes` (of SIZE_KEYS) ask for; None if the family has no such keys. Raises ValueError."""
        ...


class BatchMaker(Protocol):
    """What the trainer, the evaluator and every verb use of a collator.

    Implemented by mmft.collators.base.Collator, and by mmft.feature_cache.cache.CachedCollator, which wraps one.
    """

    @property
    def tokenizer(self) -> Any: ...

    @property
    def max_length(self) -> int | None: ...

    @property
    def image_token_id(self) -> int: ...

    @property
    def end_token_id(self) -> int: ...

    @property
    def end_token_ids(self) -> list[int]: ...

    @property
    def end_ids(self) -> list[int]: ...

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The training batch."""
        ...

    def uncached(self, samples: Sequence[Sample]) -> Batch:
        """The training batch of rows that no cache should keep."""
        ...

    def prompt(self, samples: Sequence[Sample]) -> Batch:
        """The batch to generate from."""
        ...

    def measure(self, sample: Sample) -> Measure:
        """The size of a row, without decoding its images."""
        ...

    def answer_ids(self, sample: Sample) -> list[int]:
        """The ids that the model has to write for the last answer."""
        ...

    def decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        """Generated token ids as texts."""
        ...

    def split_answer(self, text: str, generated: bool = False) -> tuple[str, str]:
        """(reasoning, answer) of a reference, or of a generated text."""
        ...

    def written(self, sample: Sample) -> Sample:
        """The sample with its boxes as the model writes them."""
        ...

    def regions_in(self, text: str, sample: Sample) -> list[Region]:
        """The boxes and points in a generated text, in pixels of the sample's image files."""
        ...
