"""Image features as the model's own `get_image_features` computes them, split by image and joined again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..collators.base import PIXELS

INTERMEDIATE = ("last_hidden_state", "hidden_states", "attentions", "vision_outputs", "qformer_outputs")  # outputs, by the end of their names, that `forward` does not read
Entry = dict[str, torch.Tensor]  # what is kept of one image: `features` (tokens, width), `deep.N` alike, `input.NAME` (1, ...)


class Uncacheable(Exception):
    """Why the image features of this model cannot be kept for each image."""


def takes_features(model: Any) -> bool:
    """Whether `forward` takes precomputed features (transformers 5.19 and newer, most families) that depend on the image alone.

    InstructBLIP's Q-Former reads the prompt too, and the features of models with a codebook (Emu3) are rows of the token table.
    """
    if hasattr(model, "get_image_tokens") or hasattr(getattr(model, "model", None), "get_image_tokens"):
        return False
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters or not hasattr(model, "get_image_features"):
        return False
    return "qformer_input_ids" not in inspect.signature(type(model).get_image_features).parameters


def feature_arguments(model: Any) -> set[str]:
    """The names of the arguments of `get_image_features`, those that it hands on to the inner model's among them."""
    inner = getattr(getattr(model, "model", None), "get_image_features", None)
    return {name for method in (model.get_image_features, inner) if method is not None for name in inspect.signature(method).parameters}


def depends_on_the_row(model: Any) -> bool:
    """Whether features are not of one image: LLaVA-OneVision tiles only a row's only image, Granite Docling joins the images of a row."""
    return not {"batch_num_images", "tile_fine_mask"}.isdisjoint(feature_arguments(model))


def generates_from_features(model: Any) -> bool:
    """Whether `generate` takes precomputed features too. BLIP-2 has its own `generate`, which needs pixels."""
    return "pixel_values" not in inspect.signature(type(model).generate).parameters


@dataclass
class FeatureLayout:
    """How one model's image features are split by image: learned by `compute` from what the model returns.

    output: the class of the model's output. stacked: one tensor (images, tokens, width), else one (tokens, width) for each image.
    required_pixels: pixel arguments that the model's forward requires, passed as None. levels: further features that enter deeper layers
    (Qwen3-VL's deepstack).
    """

    output: Any = None
    stacked: bool = False
    required_pixels: dict[str, None] = field(default_factory=dict)
    levels: int = 0

    def compute(self, model: Any, tensors: dict[str, Any], n_images: int) -> list[Entry]:
        """One entry for each image. Raises Uncacheable if the model's output has no separate place for each image."""
        parameters = feature_arguments(model)
        arguments = {k: v.to(model.device) for k, v in tensors.items() if k in parameters}
        with torch.no_grad():
            output = model.get_image_features(**arguments, return_dict=True)
        pooled = output.pooler_output
        for name in output:
            if name not in ("pooler_output", "deepstack_features") and not name.endswith(INTERMEDIATE):
                raise Uncacheable(f"{type(model).__name__} gives {name} beside the features of each image")
        if pooled is None or len(pooled) != n_images:
            raise Uncacheable(f"{type(model).__name__} gives {0 if pooled is None else len(pooled)} features for {n_images} images")
        others = {k: v for k, v in tensors.items() if k not in PIXELS}
        for name, tensor in others.items():
            if tensor.shape[0] != n_images:
                raise Uncacheable(f"{type(model).__name__} takes {name}, which is not one value an image")
        forward = inspect.signature(type(model).forward).parameters
        self.required_pixels = {k: None for k in tensors if k in PIXELS and k in forward and forward[k].default is inspect.Parameter.empty}
        self.output, self.stacked = type(output), isinstance(pooled, torch.Tensor)
        deep = getattr(output, "deepstack_features", None) or []
        self.levels = len(deep)
        return [
            {
                "features": pooled[n].detach().cpu().clone(),
                **{f"deep.{level}": features[n].detach().cpu().clone() for level, features in enumerate(deep)},
                **{f"input.{name}": tensor[n : n + 1].clone() for name, tensor in others.items()},
            }
            for n in range(n_images)
        ]

    def inputs(self, images: Sequence[Entry]) -> dict[str, Any]:
        """The model's inputs for these images, in order, in place of their pixels."""
        if not images:
            return {}
        features = [image["features"] for image in images]
        required = {k: None for k, p in inspect.signature(self.output).parameters.items() if p.default is inspect.Parameter.empty}
        output = self.output(**required | {"pooler_output": torch.stack(features) if self.stacked else tuple(features)})
        if self.levels:
            output["deepstack_features"] = [tuple(image[f"deep.{n}"] for image in images) for n in range(self.levels)]
        others = [name for name in images[0] if name.startswith("input.")]
        return {
            "mm_encoder_outputs": {"image": output}, **self.required_pixels,
            **{n.removeprefix("input."): torch.cat([i[n] for i in images]) for n in others},
        }  # fmt: skip
