"""Family: the keys of a model config, and the methods that a model family may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...collators.types import Replacement

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(kw_only=True)
class Family:
    """The keys of the `model` group. A subclass holds the quirks of one model family and nothing else.

    path: built-in (`mmft:tiny`), a local folder, or a hub id. hub: huggingface | modelscope. revision: a branch, tag or
    commit. dtype: auto | bf16 | fp16 | fp32. device: auto | cuda | cpu | mps. attn_implementation: a name that transformers
    knows (null: its default). quantization: keys of BitsAndBytesConfig. processor: keyword arguments of the processor, such
    as min_pixels and max_pixels (pixels of the resized image). rewrites: auto | off, faster equal forms of modules
    (mmft/rewrites/). boxes: how the model writes boxes and points (mmft/collators/box_styles.py); auto: as its type was trained to.

    adapters: runs or folders whose adapters are merged into the weights (mmft/runs/parents.py).

    model_types: the model types of transformers that need this class; a checkpoint of one is refused with any other class
    (mmft/models/family_choice.py). Family itself names none: it serves every type without quirks.
    images_per_row: the number of images that every row must have; None if rows may differ.
    images_apart: whether the image inputs of two batches, one behind the other, are those of one batch.
    answer_values: values, at the tokens of an answer, of the model's inputs that have one value per token; 0 for those not named.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    images_per_row: ClassVar[int | None] = None
    images_apart: ClassVar[bool] = True
    answer_values: ClassVar[Mapping[str, int]] = {}

    path: str
    hub: str = "huggingface"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    quantization: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    rewrites: str = "auto"
    boxes: str = "auto"
    adapters: list[str] | None = None

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        """Set values that the model needs and that its saved processor lacks. Raises UserError if they cannot be derived."""

    def fix_model(self, model: PreTrainedModel) -> None:
        """Make a loaded model usable whose class in the installed transformers is not; nothing by default."""

    def arranged(self, images: list[Any]) -> Any:
        """The images of several texts in the form the processor takes them: by default a list for each text."""
        return images

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs from what the processor returned for the images of a batch, in lists where images differ in shape."""
        return outputs

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """Number of features that the model computes for each image of a batch, in order; None if the family cannot tell.

        By default, for processors that give a grid: t x h x w patches, of which merge x merge become one feature.
        """
        vision = getattr(config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None)
        if merge is None:
            return None
        grid = batch.get("image_grid_thw")
        if grid is None:
            return None if "pixel_values" in batch else []
        return [int(n) // merge**2 for n in grid.prod(dim=-1)]

    def image_size(self, width: int, height: int, sizes: Mapping[str, int], image_processor: Any) -> tuple[int, int] | None:
        """(width, height) in pixels to resize an image to, for the size keys of its row; None if the family has no such keys.

        sizes: some of mmft.collators.types.SIZE_KEYS; empty for an image beside one with keys. Raises ValueError for wrong values.
        """
        return None

    def replacements(self, text: str, processor: Any) -> list[Replacement] | None:
        """What the processor writes for each image placeholder of a text; None if the processor itself tells."""
        return None

    def image_places(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int]:
        """The number of places for image features in each sequence of a batch: its image tokens."""
        token = config.image_token_id if getattr(config, "image_token_id", None) is not None else getattr(config, "image_token_index", None)
        return [int(n) for n in (batch["input_ids"] == token).sum(-1)] if token is not None else [0] * len(batch["input_ids"])

    def batch_inputs(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
        """Inputs of the model that follow from a whole batch (input_ids (B, S) and image tensors), such as masks between tokens and images."""
        return {}

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The module whose generation config holds the end token."""
        return model
