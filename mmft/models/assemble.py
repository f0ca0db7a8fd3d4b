"""Plan a LLaVA made of a language model and a vision tower: whether they fit is decided before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from .hub import Located, locate

if TYPE_CHECKING:
    import torch
    from transformers import (
        BaseImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PretrainedConfig,
        PreTrainedTokenizerBase,
    )

IMAGE = "<image>"
PROJECTOR = "multi_modal_projector"
# Weights of a two-tower checkpoint (CLIP, SigLIP) that are not the vision tower's.
OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

# Turns message parts into plain text, which the language model's own template expects. An image becomes the image token and a newline.
AS_TEXT = (
    "{%- set ns = namespace(out=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string or message.content is not iterable -%}{%- set ns.out = ns.out + [message] -%}"
    "{%- else -%}{%- set ns.text = '' -%}"
    "{%- for part in message.content -%}"
    "{%- set ns.text = ns.text + ('<image>\\n' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}"
    "{%- set ns.out = ns.out + [dict(message, content=ns.text)] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- set messages = ns.out %}"
)
# For a language model without a chat template.
PLAIN = (
    "{%- for message in messages -%}"
    "{{- '' if message.role == 'system' else 'User: ' if message.role == 'user' else 'Assistant: ' -}}"
    "{{- message.content -}}"
    "{{- eos_token + '\\n' if message.role == 'assistant' and eos_token else '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)


@dataclass
class Assembly:
    """The LLaVA to build. skeleton: the model on meta tensors. new_rows: embedding rows added to those of the language model."""

    llm: Located
    vision: Located
    config: LlavaConfig
    vision_config: PretrainedConfig
    processor: LlavaProcessor
    skeleton: LlavaForConditionalGeneration
    dtype: torch.dtype
    rows: int  # embedding rows of the language model
    new_rows: list[int]
    notes: list[str]

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor of the checkpoint. A tied language head is not stored."""
        state = self.skeleton.state_dict()
        return {k: tuple(v.shape) for k, v in state.items() if not (self.config.tie_word_embeddings and k == "lm_head.weight")}


def locate_part(key: str, path: str, hub: str, revision: str | None) -> Located:
    """`locate` for the key `llm` or `vision`; its UserError names the keys of this command."""
    try:
        return locate(path, hub, revision)
    except UserError as error:
        text = str(error).replace("model.path=", f"{key}=").replace("model.revision=", f"{key}_revision=").replace("model.hub=", "hub=")
        raise UserError(text) from None


def plan_assembly(llm: Located, vision: Located, dtype: str, layer: int, image_size: int | None) -> Assembly:
    """Read configs, tokenizer and image processor, and derive LLaVA's config and processor from them. Raises UserError."""
    import torch
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from .device import DTYPES, choose_dtype

    text_config = _read(AutoConfig, llm, "llm")
    vision_config = _read(AutoConfig, vision, "vision")
    vision_config = getattr(vision_config, "vision_config", vision_config)
    notes: list[str] = []
    if dtype == "auto":
        weights_dtype = getattr(torch, DTYPES.get(str(text_config.dtype).removeprefix("torch."), "float32"))
    else:
        weights_dtype, _ = choose_dtype(dtype, "cpu", False)

    tokenizer = _tokenizer(llm)
    image_id, added = _image_token(tokenizer)
    rows = text_config.vocab_size
    new_rows = list(range(rows, image_id + 1))
    if added:
        spare = f"row {image_id} of {rows} was spare" if not new_rows else f"{len(new_rows)} row added to {rows}"
        notes.append(f"{IMAGE} is token {image_id}; {spare}")

    images = _image_processor(vision, image_size)
    output = tower_output(vision_config, images, layer)
    text_config.vocab_size = rows + len(new_rows)
    strategy = "default" if output.class_tokens else "full"  # "default" drops the one class token before the patches
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=image_id, image_seq_length=output.patches,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy, tie_word_embeddings=bool(text_config.tie_word_embeddings),
        dtype=weights_dtype,
    )  # fmt: skip
    # read by mmft.adapters.plan: what must be trained, and therefore saved, with every adapter
    config.mmft = {"modules_to_save": [PROJECTOR], "new_rows": new_rows}
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=output.patch_size, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=output.class_tokens, chat_template=chat_template(tokenizer, notes), image_token=IMAGE,
    )  # fmt: skip
    notes.append(f"{output.height} x {output.width} pixels, {output.patches} image tokens" + (", class token dropped" if output.class_tokens else ""))
    with torch.device("meta"):
        skeleton = LlavaForConditionalGeneration(config)
    return Assembly(llm, vision, config, vision_config, processor, skeleton, weights_dtype, rows, new_rows, notes)


def _read(auto_class: Any, located: Located, key: str) -> Any:
    """`auto_class.from_pretrained` of a part. Raises UserError."""
    try:
        return auto_class.from_pretrained(located.folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{key}={located.path}: cannot be used: {str(error).strip().splitlines()[0]}") from None


def _tokenizer(llm: Located) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, llm, "llm")
    if not tokenizer.is_fast:
        raise UserError(f"llm={llm.path}: its tokenizer gives no character offsets, which the loss mask needs; add a tokenizer.json")
    return tokenizer


def _image_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """(id of `<image>`, whether it was added to the tokenizer)."""
    image_id = tokenizer.get_vocab().get(IMAGE)
    if image_id is not None and tokenizer.encode(IMAGE, add_special_tokens=False) == [image_id]:
        return image_id, False
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE), True


def _image_processor(vision: Located, image_size: int | None) -> BaseImageProcessor:
    from transformers import AutoImageProcessor

    images = _read(AutoImageProcessor, vision, "vision")
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        if getattr(images, "do_center_crop", False):
            images.size, images.crop_size = {"shortest_edge": image_size}, square
        else:
            images.size = square
    return images


@dataclass
class TowerOutput:
    """Output of a vision tower for one image.

    height, width: of the processed image, in pixels. patch_size: in pixels. patches: number of patch states. class_tokens: states
    before them (0 or 1).
    """

    height: int
    width: int
    patch_size: int
    patches: int
    class_tokens: int


def tower_output(vision_config: PretrainedConfig, images: BaseImageProcessor, layer: int) -> TowerOutput:
    """Run the tower on meta tensors over a processed image. Raises UserError for a tower that LLaVA cannot use."""
    import torch
    from PIL import Image
    from transformers import AutoModel

    name = vision_config.model_type
    refuse = f"vision: {name} returns no patch states that LLaVA can take; CLIP, SigLIP and DINOv2 towers do"
    patch = getattr(vision_config, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(refuse)
    # not square on purpose: with a processor that keeps the shape, the number of tokens would differ between images
    pixels = images([Image.new("RGB", (640, 400))], return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(vision_config)
        states = tower(pixels.to("meta"), output_hidden_states=True, return_dict=True).hidden_states
        state = states[layer]
    except IndexError:
        raise UserError(f"layer={layer}: the tower has {len(states)} hidden states; -1 is the last, -2 the usual choice") from None
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"vision: {name} does not take its image processor's {height} x {width} pixels ({reason}); try image_size=...") from None
    patches = (height // patch) * (width // patch)
    if state.dim() != 3 or state.shape[1] < patches:
        raise UserError(refuse)
    extra = state.shape[1] - patches
    if extra > 1:
        raise UserError(f"vision: {name} puts {extra} tokens before its patches (registers), and LLaVA can drop one; use a tower without registers")
    return TowerOutput(height, width, patch, patches, extra)


def chat_template(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> str:
    """The language model's own template, preceded by AS_TEXT; it is removed from the tokenizer."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        notes.append("the language model has no chat template; a plain one (User: ..., Assistant: ...) is used")
    tokenizer.chat_template = None  # the processor's template is used instead
    return AS_TEXT + (own or PLAIN)


def write_config_files(assembly: Assembly, folder: Path) -> None:
    """Write everything but the weights: config, processor with tokenizer and template, generation config."""
    from transformers import GenerationConfig

    assembly.config.architectures = ["LlavaForConditionalGeneration"]
    assembly.config.save_pretrained(folder)
    assembly.processor.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(assembly.llm.folder)
    except OSError:
        generation = GenerationConfig.from_model_config(assembly.config.text_config)
    generation.save_pretrained(folder)
