"""Qwen2-VL, and the families that resize images with its image processor: later Qwens, and models built from their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Family


@dataclass(kw_only=True)
class Qwen2VL(Family):
    model_types = (
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
        "cosmos3_omni", "exaone4_5",
    )  # fmt: skip

    def image_size(self, width: int, height: int, sizes: Mapping[str, int], image_processor: Any) -> tuple[int, int] | None:
        """The size that qwen-vl-utils resizes to. A bound that the row leaves out is the processor's, not the one of qwen-vl-utils.

        Without keys, the size that the processor resizes to; transformers' smart_resize differs for images thinner than a patch.
        """
        from qwen_vl_utils.vision_process import smart_resize
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as processor_resize

        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in sizes.values()):
            raise ValueError("a size is a whole number of pixels above 0")
        factor = image_processor.patch_size * image_processor.merge_size
        if "resized_height" in sizes or "resized_width" in sizes:
            if "resized_height" not in sizes or "resized_width" not in sizes:
                raise ValueError("resized_height and resized_width belong together")
            rows, columns = smart_resize(sizes["resized_height"], sizes["resized_width"], factor)
            return columns, rows
        # a bound of the row moves the processor's other bound where the two would exclude each other
        least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        least = sizes.get("min_pixels", min(least, sizes.get("max_pixels", least)))
        most = sizes.get("max_pixels", max(most, least))
        if least > most:
            raise ValueError("min_pixels is above max_pixels")
        rows, columns = (smart_resize if sizes else processor_resize)(height, width, factor, least, most)
        if not rows or not columns:
            raise ValueError(f"an image of {width} x {height} pixels would become thinner than one patch")
        return columns, rows
