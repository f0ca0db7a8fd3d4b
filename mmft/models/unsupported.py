"""Model types of transformers that mmft refuses, each with the reason: they would be trained or used wrongly, or are no chat or caption models."""

from __future__ import annotations

_RENAMED = "when peft loads an adapter for it, transformers renames some of its layers (self_attn.k_proj.sconv), and those adapters stay random"
# model type -> what is wrong, as the end of "a TYPE is not supported: ..."; a way on follows if there is one
UNSUPPORTED: dict[str, str] = {
    "inkling2": _RENAMED, "inkling2_loop": _RENAMED,
    "hunyuan_vl": "transformers numbers the images of a whole batch for its rotary positions, so a row's result depends on the rows before it",
}
