"""Load any image-text-to-text model of transformers, with its processor and collator, as the config says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..collators.types import BatchMaker
from ..common.errors import UserError, nearest
from ..config.build import build
from ..config.guard.remote_code import trusts_remote_code
from ..rewrites.apply import rewrite_loaded
from ..system.console import shows_progress
from .checkpoint_format import check_vision_language, missing_library, read_config
from .device import choose_device, choose_dtype
from .families.base import Family
from .family_choice import check_family
from .hub import Located, locate
from .quantization import Quantization, asked_quantization, check_saved, choose_quantization, saved_quantization

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass
class Loaded:
    """A model ready for training or use.

    quantization: None for unquantised weights. notes: the choices made, shown in the terminal and stored in env.json. below: hashes of the
    adapters that are merged into the weights (runs/parents.py).
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    located: Located
    device: str
    dtype: torch.dtype
    quantization: Quantization | None = None
    notes: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> bool:
        return self.quantization is not None


def locate_model(family: Family) -> Located:
    """The local folder and revision of a family's model, downloaded if needed.

    Raises UserError, also if config.json does not describe an image-text-to-text model; then no weights are downloaded.
    """
    return locate(family.path, family.hub, family.revision, lambda folder: _check(family, read_config(family.path, folder)))


def _check(family: Family, config: PretrainedConfig) -> None:
    check_vision_language(family.path, config)
    check_family(family, config.model_type)


def load_config(family: Family, located: Located) -> PretrainedConfig:
    """transformers' config of the model. Raises UserError."""
    return read_config(family.path, located.folder)


def load_skeleton(family: Family, located: Located) -> PreTrainedModel:
    """The model on the meta device, for checks that need no weights. Raises UserError."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = load_config(family, located)
    _check(family, config)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trusts_remote_code())
    except ImportError as error:
        raise missing_library(family.path, error) from None


def load_processor(family: Family, located: Located, folder: Path | None = None) -> ProcessorMixin:
    """The processor with the config's settings, read from `folder` (a run's adapter/) if given. Raises UserError."""
    from transformers import AutoProcessor

    settings = family.processor or {}
    try:
        processor = AutoProcessor.from_pretrained(folder or located.folder, trust_remote_code=trusts_remote_code(), **settings)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        if not any(located.folder.glob("*processor*.json")):
            reason = "its files are missing; copy them from the checkpoint that the model comes from (processor_config.json, tokenizer.json, ...)"
        raise UserError(f"model.path={family.path}: no usable processor: {reason}") from None
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"model.path={family.path}: its processor handles no images, so this is not a vision-language model")
    known = {**processor.image_processor.to_dict(), **processor.to_dict(), "min_pixels": 0, "max_pixels": 0}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"model.processor.{key}: {type(processor).__name__} has no such setting.{nearest(key, known)}")
        if key in ("min_pixels", "max_pixels") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"model.processor.{key}={value}: must be a whole number of pixels above 0")
    # values that the processor's class hands to the image processor at every call hide the settings of the image processor
    hidden = settings.keys() & getattr(processor, "images_kwargs", {}).keys()
    if hidden:
        processor.images_kwargs = processor.images_kwargs | {key: settings[key] for key in hidden}
    family.fix_processor(processor, load_config(family, located))
    tokenizer = processor.tokenizer
    if "text" not in tokenizer.decode(tokenizer.encode("text", add_special_tokens=False)):
        # a tokenizer whose vocabulary file is missing loads without an error and knows no word
        raise UserError(f"model.path={family.path}: its tokenizer has no vocabulary; tokenizer.json is missing from the files")
    if tokenizer.pad_token_id is None:
        # preferably not the token that ends a text: padding must stay distinguishable from it
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.eos_token
    return processor


def load_model(family: Family, *, full_training: bool = False, located: Located | None = None) -> Loaded:
    """Read weights and processor.

    Raises UserError, also for missing weights and for weights that a layer of the model cannot take (a bias where the config says
    none): the model would compute something else than what was trained. Weights of layers that the model does not have are noted.
    """
    progress_bars_on_terminals_only()
    located = located or locate_model(family)
    device = choose_device(family.device)
    dtype, why = choose_dtype(family.dtype, device, full_training)
    quantization = saved_quantization(load_config(family, located))
    to_quantize = None
    if quantization is not None:
        note = check_saved(quantization, family.quantization, device, full_training, family.path)
    else:
        to_quantize, note = choose_quantization(family.quantization, device)
        quantization = asked_quantization(to_quantize) if to_quantize is not None else None
    if quantization is not None and full_training:
        raise UserError("model.quantization and lora=none: quantised weights cannot be trained; use an adapter (lora=default)")
    notes = ["the model's own code may run (--trust-remote-code)"] if trusts_remote_code() else []
    notes += [f"{device}, {str(dtype).removeprefix('torch.')} ({why})", *([note] if note else [])]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": family.attn_implementation}
    if quantization is not None:
        options |= {"device_map": {"": device}, **({"quantization_config": to_quantize} if to_quantize is not None else {})}
        notes.append(str(quantization))
    processor = load_processor(family, located)  # before the weights: a folder without one is refused in seconds
    model, info = _read_weights(family, located, options)
    unused = _check_weights(family, model, info)
    if unused:
        notes.append(f"{unused} weights in the files are not used by {type(model).__name__}")
    if quantization is None:
        model.to(device)
    elif device == "cpu":
        _keep_4bit_trainable_on_cpu(model)
    family.fix_model(model)
    rewrite_loaded(model, family.rewrites)
    model.eval()
    return Loaded(model, processor, located, device, dtype, quantization, notes)


def _read_weights(family: Family, located: Located, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, transformers' loading info). Raises UserError."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        with silent_transformers():  # its loading report takes many lines; `_check_weights` reports the same in one
            return AutoModelForImageTextToText.from_pretrained(
                located.folder, output_loading_info=True, use_safetensors=True, trust_remote_code=trusts_remote_code(), **options
            )
    except SafetensorError as error:
        raise UserError(f"model.path={family.path}: a weights file is torn ({error}); download it again") from None
    except RuntimeError as error:
        quantised = "device_map" in options
        if "ignore_mismatched_sizes" not in str(error) and not quantised:
            raise
        why = f"these model.quantization settings do not work ({str(error).strip().splitlines()[0][:120]})" if quantised else "the weights have other shapes than its config.json says"
        raise UserError(f"model.path={family.path}: cannot be loaded: {why}") from None
    except ImportError as error:
        raise missing_library(family.path, error) from None
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={family.path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def _check_weights(family: Family, model: PreTrainedModel, info: dict[str, Any]) -> int:
    """The number of weights in the files that no layer of the model uses. Raises UserError for missing or misplaced weights."""
    missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if missing:
        raise UserError(f"model.path={family.path}: {len(missing)} weights are missing or of another shape, e.g. {missing[0]}; the files are incomplete")
    modules = {name for name, _ in model.named_modules()}
    for key in sorted(info["unexpected_keys"]):
        if key.endswith((".weight", ".bias")) and key.rpartition(".")[0] in modules:
            raise UserError(f"model.path={family.path}: the files hold {key}, which config.json has no place for; they do not belong together")
    return len(info["unexpected_keys"])


def _keep_4bit_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights.

    On CPUs with AVX512-BF16 it does so in the first forward pass in eval mode. The packed form has no gradient, so evaluating the base
    model before training would make it untrainable.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def build_collator(node: DictConfig, family: Family, loaded: Loaded) -> BatchMaker:
    """The collator that a config's `collator` node describes, for this model; training and every verb build it here."""
    return build(
        node, "collator", processor=loaded.processor, family=family, model_config=loaded.model.config, end_token_ids=end_token_ids(family, loaded)
    )


def end_token_ids(family: Family, loaded: Loaded) -> list[int]:
    """The ids that end a text, from the loaded model's generation config, else from its tokenizer."""
    ids = family.language_model(loaded.model).generation_config.eos_token_id
    if ids is None:
        ids = loaded.processor.tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or [])


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Suppress transformers' log inside the block."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def progress_bars_on_terminals_only() -> None:
    """Switch off transformers' progress bars if stderr is a file, which they would fill with carriage returns."""
    if not shows_progress():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
