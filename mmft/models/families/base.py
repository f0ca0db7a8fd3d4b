"""Family: the keys of a model config, and the methods that a model family may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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
    (mmft/rewrites/).

    model_types: the model types of transformers that need this class; a checkpoint of one is refused with any other class
    (mmft/models/family_choice.py). Family itself names none: it serves every type without quirks.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    path: str
    hub: str = "huggingface"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    quantization: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    rewrites: str = "auto"

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        """Set values that the model needs and that its saved processor lacks. Raises UserError if they cannot be derived."""

    def arranged(self, images: list[Any]) -> Any:
        """The images of several texts in the form the processor takes them: by default a list for each text."""
        return images

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs from what the processor returned for the images of a batch, in lists where images differ in shape."""
        return outputs

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """Number of features that the model computes for each image of a batch, in order; None if the family cannot tell.

        By default, for processors that give a grid: t x h x w patches, of which spatial_merge_size x spatial_merge_size become one feature.
        """
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
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

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The module whose generation config holds the end token."""
        return model
