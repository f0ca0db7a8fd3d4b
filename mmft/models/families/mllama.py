"""Llama 3.2 Vision: images enter through cross-attention, from the image's own token to the next image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class Mllama(Family):
    """Every row has one image: the tokens before it read all places of images, and a row with fewer than others in its batch has empty ones."""

    model_types = ("mllama",)
    images_per_row = 1

    def batch_inputs(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
        """cross_attention_mask (B, S, images, tiles): 1 where a token reads a tile.

        As transformers' MllamaProcessor has it: a token reads the image before it, and images whose tokens follow each other are read
        together. The processor's own mask is replaced, as it does not know the padding of this batch.
        """
        tiles = batch.get("aspect_ratio_mask")  # (B, images, tiles): 1 for tiles that the image fills
        if tiles is None:
            return {}
        ids = batch["input_ids"]
        mask = tiles.new_zeros((*ids.shape, *tiles.shape[1:]))
        for row, of_row in enumerate(ids):
            end = following = ids.shape[1]
            starts = (of_row == config.image_token_index).nonzero().flatten().tolist()
            for n, start in reversed(list(enumerate(starts))):
                end = end if start == following - 1 else following
                mask[row, start:end, n] = tiles[row, n]
                following = start
        return {"cross_attention_mask": mask}
