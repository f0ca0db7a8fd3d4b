"""Write the weights of an assembled LLaVA, one part at a time, then read them back and compare every tensor."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..common.errors import UserError
from ..common.hashing import tensor_hash
from ..common.safetensors_writer import Shards
from .assemble import OTHER_TOWER, PROJECTOR, Assembly
from .families.llava import Llava
from .load import Loaded, load_model, silent_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = "The sun rises in the east and"


class AssemblyChecks(TypedDict, total=False):
    """text_difference: of the logits after TEXT from the language model's, as a share of the largest. image_difference: the largest
    change of a logit when the image changes."""

    text_difference: float
    image_difference: float


def write_weights(assembly: Assembly, folder: Path, seed: int) -> tuple[Shards, torch.Tensor]:
    """(shards with the hash of every tensor, the language model's own logits (V,) after TEXT). One part is in memory at a time.

    Raises UserError for a weight that is missing, unexpected or of another shape.
    """
    shards = Shards(folder)
    expected = assembly.expected

    def add(name: str, tensor: torch.Tensor) -> None:
        if name not in expected:
            raise UserError(f"{name}: LLaVA has no place for this weight; this language model or tower is built in a way it cannot take")
        if tuple(tensor.shape) != expected[name]:
            raise UserError(f"{name}: is {tuple(tensor.shape)}, LLaVA needs {expected[name]}")
        shards.add(name, tensor.to(assembly.dtype) if tensor.is_floating_point() else tensor)

    llm = _language_model(assembly)
    logits = text_logits(llm, assembly.processor.tokenizer)
    base = llm.base_model_prefix
    inner = getattr(llm, base)
    tables = {id(llm.get_input_embeddings().weight), id(llm.get_output_embeddings().weight)}
    for name, tensor in inner.state_dict(keep_vars=True).items():
        add(f"model.language_model.{name}", _grown(tensor, assembly) if id(tensor) in tables else tensor)
    rest = {n: t for n, t in llm.state_dict(keep_vars=True).items() if not n.startswith(f"{base}.")}
    for name, tensor in rest.items():
        if name == "lm_head.weight" and assembly.config.tie_word_embeddings:
            continue
        add(name, _grown(tensor, assembly) if id(tensor) in tables else tensor)
    del llm, inner, rest, tensor
    gc.collect()

    tower = _tower(assembly)
    for name, tensor in tower.state_dict().items():
        add(f"model.vision_tower.{name}", tensor)
    del tower
    for name, tensor in _projector(assembly, seed).items():
        add(f"model.{PROJECTOR}.{name}", tensor)
    missing = sorted(set(expected) - set(shards.digests))
    if missing:
        raise UserError(f"{len(missing)} weights of LLaVA come from neither part, e.g. {missing[0]}")
    shards.close()
    return shards, logits


def _load(auto_class: Any, folder: Path, what: str, allowed: tuple[str, ...], **options: Any) -> PreTrainedModel:
    """A part in eval mode. allowed: prefixes of weights that may be unused. Raises UserError for missing or unused weights."""
    try:
        with silent_transformers():  # the errors below report wrong weights in one line
            model, info = auto_class.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{what}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    unused = sorted(k for k in info["unexpected_keys"] if not k.startswith(allowed))
    if missing:
        raise UserError(f"{what}: {len(missing)} weights are missing or of another shape, e.g. {missing[0]}; they would be random")
    if unused:
        raise UserError(f"{what}: {len(unused)} weights in the files belong to no layer, e.g. {unused[0]}")
    return model.eval()


def _language_model(assembly: Assembly) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    what = f"llm={assembly.llm.path}"
    model = _load(AutoModelForCausalLM, assembly.llm.folder, what, ("\0",), dtype=assembly.dtype)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{what}: its language head has a bias, and LLaVA's has none")
    return model


def _tower(assembly: Assembly) -> PreTrainedModel:
    from transformers import AutoModel

    # read in its own precision, so that weights are rounded at most once, when they are written
    return _load(AutoModel, assembly.vision.folder, f"vision={assembly.vision.path}", OTHER_TOWER, config=assembly.vision_config, dtype="auto")


def _grown(table: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """An embedding table (V, d) with its new rows, each the mean of the old ones: an average word of ordinary norm."""
    import torch

    table = table.detach()
    if not assembly.new_rows:
        return table
    mean = table[: assembly.rows].float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table[: assembly.rows], mean.expand(len(assembly.new_rows), -1)])


def _projector(assembly: Assembly, seed: int) -> dict[str, torch.Tensor]:
    """Random weights with the language model's standard deviation (text_config.initializer_range); biases are zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    std = getattr(assembly.config.text_config, "initializer_range", 0.02)
    weights = {}
    for name, meta in getattr(assembly.skeleton.model, PROJECTOR).state_dict().items():
        tensor = torch.zeros(meta.shape)
        weights[name] = tensor.normal_(0.0, std, generator=generator) if tensor.dim() > 1 else tensor
    return weights


def text_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The model's logits after the last token of TEXT, (V,) float32."""
    import torch

    ids = torch.tensor([tokenizer(TEXT)["input_ids"]], device=model.device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float().cpu()


def verify(assembly: Assembly, folder: Path, shards: Shards, logits: torch.Tensor) -> AssemblyChecks:
    """Load the written model as training does and check it.

    Raises UserError unless every tensor equals what was written, text without an image gives the language model's own logits, and
    two images give different outputs.
    """
    import torch

    name = str(assembly.dtype).removeprefix("torch.")
    family = Llava(path=str(folder), dtype=name, device="cpu")
    loaded = load_model(family)
    state = loaded.model.state_dict()
    for key, wanted in shards.digests.items():
        if tensor_hash(state[key]) != wanted:
            raise UserError(f"{key}: was not loaded as it was written")
    if assembly.config.tie_word_embeddings and state["lm_head.weight"].data_ptr() != state["model.language_model.embed_tokens.weight"].data_ptr():
        raise UserError("lm_head: is not tied to the embeddings as the language model's is")
    assembled = text_logits(loaded.model, loaded.processor.tokenizer)[: logits.shape[0]]
    scale = logits.abs().max().item()
    text = (assembled - logits).abs().max().item() / max(scale, 1e-9)
    # rounding of the same operations in one dtype; a model with a scaled or capped head differs by far more
    if text > (1e-4 if assembly.dtype == torch.float32 else 3e-2):
        raise UserError(f"llm={assembly.llm.path}: LLaVA continues a text differently ({text:.2g} of the largest logit); its head is scaled or capped, and LLaVA's is not")
    return {"text_difference": text, "image_difference": two_images(loaded)}


def two_images(loaded: Loaded) -> float:
    """The largest change of a logit when the image changes. Raises UserError if there is none."""
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(96, 128, 3, generator=generator) * 255).to(torch.uint8).numpy()
    pictures = [Image.fromarray(noise), Image.new("RGB", (128, 96), (200, 30, 30))]
    processor = loaded.processor
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    outputs = []
    for picture in pictures:
        batch = processor(text=[text], images=[picture], return_tensors="pt")
        batch["pixel_values"] = batch["pixel_values"].to(loaded.model.dtype)
        with torch.no_grad():
            outputs.append(loaded.model(**batch, use_cache=False, logits_to_keep=1).logits[0, -1].float())
    change = (outputs[0] - outputs[1]).abs().max().item()
    if not change > 0:
        raise UserError("two different pictures give the same output: the model is blind to them")
    return change
