"""What a model type's small model is made of, and tools that make one: shrunken configs, tokenizers, saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_models import (  # for the modules of this package, which build with them
    CHATML,
    QWEN,
    SIDE,
    byte_fallback_words,
    byte_level_words,
    llama_tokenizer,
    qwen_tokenizer,
)
from small_models import _ends as ends
from small_models import _save as save

__all__ = [
    "CHATML", "LIBRARY", "QWEN", "SIDE", "WRITTEN", "ModelType", "byte_fallback_words", "byte_level_tokenizer", "byte_level_words", "ends", "grid_processors",
    "llama_tokenizer", "load", "merged", "qwen_tokenizer", "opened", "save", "shrink", "token_ids",
]  # fmt: skip

LIBRARY, WRITTEN = "library", "written from the family's documentation"


@dataclass(frozen=True)
class ModelType:
    """How one model type is built small, and how its row of docs/conformance.md describes it.

    build: writes a folder as save_pretrained leaves it. group: the option of the model group. collator: chat | caption.
    template: where the chat template comes from, LIBRARY or WRITTEN. architecture: its kind in a few words (dense, mixture of
    experts, hybrid linear attention, cross-attention, encoder-decoder, tiled, deepstack, native resolution, pooled projector, Q-Former).
    """

    build: Callable[[Path], None]
    architecture: str
    group: str = "auto"
    collator: str = "chat"
    template: str = WRITTEN


def load(kind: ModelType, folder: Path) -> tuple[Any, Any, Any]:
    """(model, collator, family) of a built folder, as a command with model=GROUP collator=COLLATOR model.path=FOLDER loads them."""
    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.models.load import build_collator, load_model

    cfg = compose([f"model={kind.group}", f"collator={kind.collator}", f"model.path={folder.as_posix()}", "model.processor={}"])
    family = build(cfg.model, "model")
    loaded = load_model(family)
    return loaded.model, build_collator(cfg.collator, family, loaded), family


def opened(model_class: Any, ending: str) -> Callable[[Any], Any]:
    """A builder for `save`: the model with its parameters of this ending at 0.5. They begin at 0, as before any training, and would hide what they scale."""

    def built(config: Any) -> Any:
        import torch

        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith(ending):
                torch.nn.init.constant_(parameter, 0.5)
        return model

    return built


# --- small configs --------------------------------------------------------------------------------------------------

# Values by the end of a key's name; the first rule that fits holds. None: the key is left out, so that the class derives it again.
RULES: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("layer_types", "layers_types", "layers_block_type", "number_of_conv_states"), None),
    (("num_hidden_layers", "num_layers", "depth", "n_layers", "encoder_layers", "decoder_layers"), 2),
    (("moe_intermediate_size", "expert_intermediate_size", "expert_hidden_dim"), 16),
    (("intermediate_size", "ffn_dim", "intermediate_dim"), 64),
    (("num_key_value_heads",), 2),
    (("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    (("head_dim",), 8),
    (("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    (("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    (("n_shared_experts",), 1),
    (("n_group", "topk_group"), 1),
    (("first_k_dense_replace",), 1),
    (("out_hidden_size", "hidden_size", "embed_dim", "d_model", "projection_dim"), 32),
    (("max_position_embeddings",), 1024),
    (("image_size",), SIDE),
)


def shrink(config_class: Any, /, *, start: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """A config of this class whose layers, widths, heads, experts and images are made small by RULES.

    start: values without which the class cannot be built. given: what the rules cannot know (token ids, rotary sections); nested
    dicts are merged into the configs of parts.
    """
    defaults = config_class(**(start or {})).to_dict()
    for key in ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype"):
        defaults.pop(key, None)
    return config_class(**merged(_small(defaults), given))


def _small(values: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for key, value in values.items():
        rule = next(((new,) for ends_, new in RULES if str(key).endswith(ends_)), None)
        if isinstance(value, dict):
            made[key] = _small(value)
        elif rule is None or value is None or isinstance(value, bool):
            made[key] = value
        elif rule[0] is not None and isinstance(value, int):
            made[key] = min(value, rule[0])
        elif rule[0] is not None:
            made[key] = value
    return made


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `values`, dicts inside dicts alike."""
    made = dict(values)
    for key, value in given.items():
        old = made.get(key)
        made[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return made


def token_ids(words: Any, **names: str) -> dict[str, int]:
    """config key -> id of a token: token_ids(words, image_token_id="<image>"). Every token must be in the vocabulary."""
    ids = {key: words.convert_tokens_to_ids(token) for key, token in names.items()}
    unknown = [names[key] for key, number in ids.items() if number is None or number == words.unk_token_id]
    assert not unknown, f"not in the vocabulary: {unknown}"
    return ids


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level_tokenizer(special: list[str], eos: str, pad: str | None = None, bos: str | None = None, **named: str) -> Any:
    """A byte-level BPE that adds nothing to a text. special: further special tokens; named: those that become attributes of the tokenizer."""
    from transformers import Qwen2Tokenizer

    words, merges = byte_level_words(Qwen2Tokenizer()._tokenizer.pre_tokenizer)
    made = Qwen2Tokenizer(
        vocab=words, merges=merges, unk_token=None, bos_token=bos, eos_token=eos, pad_token=pad or eos, extra_special_tokens=named, model_max_length=2048,
    )  # fmt: skip
    made.add_tokens(special, special_tokens=True)
    return made


# --- families with image_grid_thw -------------------------------------------------------------------------------------


def grid_processors(name: str, video: str | None, patch: int = 14, merge: int = 2, temporal: int = 2, least: int = 1, most: int = 4, **more: Any) -> dict[str, Any]:
    """The image processor (and the video processor) of a family of native resolution, for images of `least`**2 to `most`**2 features."""
    import transformers as t

    side = patch * merge
    sizes = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": temporal, "size": {"shortest_edge": (least * side) ** 2, "longest_edge": (most * side) ** 2}}
    made = {"image_processor": getattr(t, name)(**sizes | more)}
    if video is not None:
        made["video_processor"] = getattr(t, video)(**sizes | more)
    return made
