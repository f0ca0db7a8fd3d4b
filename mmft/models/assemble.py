"""A LLaVA put together from a language model and a vision tower: what fits is decided before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .hub import Located, locate

IMAGE = "<image>"
PROJECTOR = "multi_modal_projector"
# Weights of a two-tower checkpoint (CLIP, SigLIP) that are not the vision tower's.
OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

# Gives the language model's own template what it was written for: texts. Image parts become the image token and a newline.
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
# For a language model that never saw chats.
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
    """What will be built. skeleton: the model on meta tensors. new_rows: embedding rows that the language model had not."""

    llm: Located
    vision: Located
    config: Any
    vision_config: Any
    processor: Any
    skeleton: Any
    dtype: Any
    rows: int  # embedding rows of the language model as it is
    new_rows: list[int]
    notes: list[str]

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor of the checkpoint; a tied language head is not stored."""
        state = self.skeleton.state_dict()
        return {k: tuple(v.shape) for k, v in state.items() if not (self.config.tie_word_embeddings and k == "lm_head.weight")}


def find(key: str, path: str, hub: str, revision: str | None) -> Located:
    """`locate`, its errors in the words of this command."""
    try:
        return locate(path, hub, revision)
    except UserError as error:
        text = str(error).replace("model.path=", f"{key}=").replace("model.revision=", f"{key}_revision=").replace("model.hub=", "hub=")
        raise UserError(text) from None


def plan(llm: Located, vision: Located, dtype: str, layer: int, image_size: int | None) -> Assembly:
    """Read configs, tokenizer and image processor, and fit them together. Errors raised: UserError."""
    import torch
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from .device import DTYPES, choose_dtype

    text_config = _read(AutoConfig, llm, "llm")
    vision_config = _read(AutoConfig, vision, "vision")
    vision_config = getattr(vision_config, "vision_config", vision_config)
    notes: list[str] = []
    if dtype == "auto":
        chosen = getattr(torch, DTYPES.get(str(text_config.dtype).removeprefix("torch."), "float32"))
    else:
        chosen, _ = choose_dtype(dtype, "cpu", False)

    tokenizer = _tokenizer(llm)
    image_id, added = _image_token(tokenizer)
    rows = text_config.vocab_size
    new_rows = list(range(rows, image_id + 1))
    if added:
        spare = f"row {image_id} of {rows} was spare" if not new_rows else f"{len(new_rows)} row added to {rows}"
        notes.append(f"{IMAGE} is token {image_id}; {spare}")

    images = _image_processor(vision, image_size)
    seen = tower_tokens(vision_config, images, layer)
    text_config.vocab_size = rows + len(new_rows)
    strategy = "default" if seen.extra else "full"  # "default" drops the one class token before the patches
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=image_id, image_seq_length=seen.patches,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy, tie_word_embeddings=bool(text_config.tie_word_embeddings),
        dtype=chosen,
    )  # fmt: skip
    # mmft.adapters.lora reads this: what an adapter must train along, and therefore save
    config.mmft = {"modules_to_save": [PROJECTOR], "new_rows": new_rows}
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=seen.patch, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=seen.extra, chat_template=chat_template(tokenizer, notes), image_token=IMAGE,
    )  # fmt: skip
    notes.append(f"{seen.height} x {seen.width} pixels, {seen.patches} image tokens" + (", class token dropped" if seen.extra else ""))
    with torch.device("meta"):
        skeleton = LlavaForConditionalGeneration(config)
    return Assembly(llm, vision, config, vision_config, processor, skeleton, chosen, rows, new_rows, notes)


def _read(kind: Any, located: Located, key: str) -> Any:
    try:
        return kind.from_pretrained(located.folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{key}={located.path}: cannot be used: {str(error).strip().splitlines()[0]}") from None


def _tokenizer(llm: Located) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, llm, "llm")
    if not tokenizer.is_fast:
        raise UserError(f"llm={llm.path}: its tokenizer gives no character offsets, which the loss mask needs; add a tokenizer.json")
    return tokenizer


def _image_token(tokenizer: Any) -> tuple[int, bool]:
    """(id of `<image>`, whether it was added now)."""
    known = tokenizer.get_vocab().get(IMAGE)
    if known is not None and tokenizer.encode(IMAGE, add_special_tokens=False) == [known]:
        return known, False
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE), True


def _image_processor(vision: Located, image_size: int | None) -> Any:
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
class Seen:
    """What a tower makes of one processed picture: pixels, patch side, patch states, states before them (a class token)."""

    height: int
    width: int
    patch: int
    patches: int
    extra: int


def tower_tokens(vision_config: Any, images: Any, layer: int) -> Seen:
    """Run the tower on meta tensors over a processed picture. Errors raised: UserError for a tower without patch states."""
    import torch
    from PIL import Image
    from transformers import AutoModel

    name = vision_config.model_type
    refuse = f"vision: {name} returns no patch states that LLaVA can take; CLIP, SigLIP and DINOv2 towers do"
    patch = getattr(vision_config, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(refuse)
    # not square on purpose: a processor that keeps the shape would give every picture another number of tokens
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
    return Seen(height, width, patch, patches, extra)


def chat_template(tokenizer: Any, notes: list[str]) -> str:
    """The language model's own template, given messages whose image parts are text already."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        notes.append("the language model has no chat template; a plain one (User: ..., Assistant: ...) is used")
    tokenizer.chat_template = None  # the processor's is the one in use
    return AS_TEXT + (own or PLAIN)


def write_new_files(assembly: Assembly, folder: Path) -> None:
    """Everything but the weights: config, processor with tokenizer and template, generation settings."""
    from transformers import GenerationConfig

    assembly.config.architectures = ["LlavaForConditionalGeneration"]
    assembly.config.save_pretrained(folder)
    assembly.processor.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(assembly.llm.folder)
    except OSError:
        generation = GenerationConfig.from_model_config(assembly.config.text_config)
    generation.save_pretrained(folder)
