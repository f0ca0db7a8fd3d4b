"""Image features as the model's own `get_image_features` gives them, taken apart image by image and put together again."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from ..collators.base import PIXELS
from ..rewrites import tower
from ..rewrites.instead import Ways, instead


class Uncacheable(Exception):
    """Why this model's image features cannot be kept image by image."""


def takes_features(model: Any) -> bool:
    """Whether `forward` takes precomputed features (transformers 5.19 and newer, most families)."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters and hasattr(model, "get_image_features")


def depends_on_the_row(model: Any) -> bool:
    """Whether an image's features depend on the images beside it: LLaVA-OneVision cuts into tiles only the image that is its row's only one."""
    return "batch_num_images" in inspect.signature(model.get_image_features).parameters


def generates_from_features(model: Any) -> bool:
    """Whether `generate` does, too; BLIP-2 has one of its own, which insists on pixels."""
    return "pixel_values" not in inspect.signature(type(model).generate).parameters


@dataclass
class Taken:
    """How one model's image features come apart: made by `compute`, which learns it from what the model returns."""

    output: Any = None  # the class of the model's output
    stacked: bool = False  # (images, tokens, width) in one tensor, else one (tokens, width) tensor an image
    none: dict[str, None] = field(default_factory=dict)  # pixels that the model's forward wants to be told are not there
    levels: int = 0  # further features that enter deeper layers (Qwen3-VL's deepstack)
    ways: Ways | None = None  # how this model's tower is computed, known after the first pass

    def compute(self, model: Any, tensors: dict[str, Any], n_images: int) -> list[dict[str, Any]]:
        """One entry an image: `features` (tokens, width), `deep.N` alike, and `input.NAME` (1, ...), which the model takes beside.

        Errors raised: Uncacheable for a family whose output has no place for each image.
        """
        import torch

        known = inspect.signature(model.get_image_features).parameters
        given = {k: v.to(model.device) for k, v in tensors.items() if k in known}
        if self.ways is None:
            self.ways = tower.ways(model)
        with torch.no_grad(), instead(self.ways):
            output = model.get_image_features(**given, return_dict=True)
        pooled = output.pooler_output
        if pooled is None or len(pooled) != n_images:
            raise Uncacheable(f"{type(model).__name__} gives {0 if pooled is None else len(pooled)} features for {n_images} images")
        beside = {k: v for k, v in tensors.items() if k not in PIXELS}
        for name, tensor in beside.items():
            if tensor.shape[0] != n_images:
                raise Uncacheable(f"{type(model).__name__} takes {name}, which is not one value an image")
        forward = inspect.signature(type(model).forward).parameters
        self.none = {k: None for k in tensors if k in PIXELS and k in forward and forward[k].default is inspect.Parameter.empty}
        self.output, self.stacked = type(output), isinstance(pooled, torch.Tensor)
        deep = getattr(output, "deepstack_features", None) or []
        self.levels = len(deep)
        return [
            {
                "features": pooled[n].detach().cpu().clone(),
                **{f"deep.{level}": features[n].detach().cpu().clone() for level, features in enumerate(deep)},
                **{f"input.{name}": tensor[n : n + 1].clone() for name, tensor in beside.items()},
            }
            for n in range(n_images)
        ]

    def inputs(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's inputs for these images, in order, in place of their pixels."""
        import torch

        if not images:
            return {}
        features = [image["features"] for image in images]
        output = self.output(pooler_output=torch.stack(features) if self.stacked else tuple(features))
        if self.levels:
            output["deepstack_features"] = [tuple(image[f"deep.{n}"] for image in images) for n in range(self.levels)]
        beside = [name for name in images[0] if name.startswith("input.")]
        return {"mm_encoder_outputs": {"image": output}, **self.none, **{n.removeprefix("input."): torch.cat([i[n] for i in images]) for n in beside}}
