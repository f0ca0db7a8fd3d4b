"""Load any image-text-to-text model of transformers, with its processor, the way the config says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import libraries
from ..config import build, nearest
from ..errors import UserError
from ..targets import trusts_remote_code
from . import machine
from .locate import Located, locate

log = logging.getLogger("mmft")


@dataclass
class Loaded:
    """A model ready to be trained or used, with everything that shapes what it sees."""

    model: Any
    processor: Any
    located: Located
    device: str
    dtype: Any
    quantized: bool
    notes: list[str] = field(default_factory=list)  # the choices made, for the terminal and env.json


@dataclass(kw_only=True)
class Family:
    """A model group's keys. Subclasses hold the quirks of one family and nothing else.

    path: built-in (`mmft:tiny`), a local folder, or a hub id; hub: huggingface | modelscope; revision: branch, tag or
    commit. dtype: auto | bf16 | fp16 | fp32. device: auto | cuda | cpu | mps. attn_implementation: transformers' own
    (null: its default). quantization: BitsAndBytesConfig's keys. processor: keyword arguments of the processor, such as
    min_pixels and max_pixels (pixels of the resized image).
    """

    path: str
    hub: str = "huggingface"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    quantization: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None

    # --- what a family may answer differently -------------------------------------------------------------------

    def fix_processor(self, processor: Any, config: Any) -> None:
        """Mend a processor that was saved without what its model needs."""

    def features_per_image(self, batch: dict[str, Any], config: Any) -> list[int] | None:
        """How many features the model computes for each image of a batch, in order; None when the family cannot say."""
        return None

    def language_model(self, model: Any) -> Any:
        """The module whose generation settings end the text."""
        return model

    # --- loading ------------------------------------------------------------------------------------------------

    def locate(self) -> Located:
        return locate(self.path, self.hub, self.revision)

    def skeleton(self, located: Located) -> Any:
        """The model without weights (meta tensors), for checks that must come before the weights are read.

        Errors raised: UserError for a config.json that is no image-text-to-text model's.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        config = self._config(located)
        own_code = trusts_remote_code() and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
        if not own_code and type(config) not in AutoModelForImageTextToText._model_mapping:
            raise UserError(f"model.path={self.path}: a {config.model_type} is not a vision-language model (image and text in, text out)")
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trusts_remote_code())

    def _config(self, located: Located) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(located.folder, trust_remote_code=trusts_remote_code())
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"model.path={self.path}: its config.json cannot be used: {str(error).strip().splitlines()[0]}") from None

    def load_processor(self, located: Located, folder: Path | None = None) -> Any:
        """The processor, from `folder` (a run's adapter/) when given, with the image limits of the config."""
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(
                folder or located.folder, trust_remote_code=trusts_remote_code(), **(self.processor or {})
            )
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise UserError(f"model.path={self.path}: no usable processor: {str(error).strip().splitlines()[0]}") from None
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise UserError(f"model.path={self.path}: its processor handles no images, so this is not a vision-language model")
        known = {**processor.image_processor.to_dict(), **processor.to_dict(), "min_pixels": 0, "max_pixels": 0}
        for key, value in (self.processor or {}).items():
            if key not in known:
                raise UserError(f"model.processor.{key}: {type(processor).__name__} has no such setting.{nearest(key, known)}")
            if key in ("min_pixels", "max_pixels") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"model.processor.{key}={value}: must be a whole number of pixels above 0")
        self.fix_processor(processor, self._config(located))
        tokenizer = processor.tokenizer
        if "text" not in tokenizer.decode(tokenizer.encode("text", add_special_tokens=False)):
            # without its vocabulary file a tokenizer loads all the same, and then knows no word
            raise UserError(f"model.path={self.path}: its tokenizer has no vocabulary; tokenizer.json is missing from the files")
        if tokenizer.pad_token_id is None:
            # never a token that ends the text: it must stay distinguishable from padding
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.eos_token
        return processor

    def load(self, *, full_training: bool = False, located: Located | None = None) -> Loaded:
        """Read the weights. Errors raised: UserError; missing weights are one, never a warning.

        So are tensors that a layer of the model has no place for (a bias where the config says none): it would compute
        something else than what was trained. Layers that the model does not have at all are only noted.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText

        from .patches import as_products

        bars_on_terminals_only()
        located = located or self.locate()
        device = machine.choose_device(self.device)
        dtype, why = machine.choose_dtype(self.dtype, device, full_training)
        quantization, note = machine.choose_quantization(self.quantization, device)
        if quantization is not None and full_training:
            raise UserError("model.quantization and lora=none: quantised weights cannot be trained; use an adapter (lora=default)")
        notes = ["the model's own code may run (--trust-remote-code)"] if trusts_remote_code() else []
        notes += [f"{device}, {str(dtype).removeprefix('torch.')} ({why})", *([note] if note else [])]
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": self.attn_implementation}
        if quantization is not None:
            options |= {"quantization_config": quantization, "device_map": {"": device}}
            notes.append("8-bit base" if quantization.load_in_8bit else f"4-bit base ({quantization.bnb_4bit_quant_type})")
        if getattr(self._config(located), "quantization_config", None):  # weights that were saved so
            libraries.with_bitsandbytes()
        try:
            with _silent():  # its report of many lines is said in one below
                model, info = AutoModelForImageTextToText.from_pretrained(
                    located.folder, output_loading_info=True, use_safetensors=True, trust_remote_code=trusts_remote_code(), **options
                )
        except SafetensorError as error:
            raise UserError(f"model.path={self.path}: a weights file is torn ({error}); download it again") from None
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error) and quantization is None:
                raise
            why = "the weights have other shapes than its config.json says" if quantization is None else "these model.quantization settings do not work"
            raise UserError(f"model.path={self.path}: cannot be loaded: {why}") from None
        except (ValueError, OSError, ImportError) as error:
            raise UserError(f"model.path={self.path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        if info["missing_keys"] or info.get("mismatched_keys"):
            lost = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
            raise UserError(f"model.path={self.path}: {len(lost)} weights are missing or of another shape, e.g. {lost[0]}; the files are incomplete")
        if info["unexpected_keys"]:
            modules = {name for name, _ in model.named_modules()}
            for key in sorted(info["unexpected_keys"]):
                if key.endswith((".weight", ".bias")) and key.rpartition(".")[0] in modules:
                    raise UserError(f"model.path={self.path}: the files hold {key}, which config.json has no place for; they do not belong together")
            notes.append(f"{len(info['unexpected_keys'])} weights in the files are not used by {type(model).__name__}")
        if quantization is None:
            model.to(device)
        elif device == "cpu":
            for module in model.modules():
                # bitsandbytes repacks 4-bit weights at the first forward pass in eval mode on CPUs with AVX512-BF16, and
                # the packed form has no gradient: measuring the base model would end its training
                if getattr(module, "support_avx512bf16_for_cpu", False):
                    module.support_avx512bf16_for_cpu = False
        as_products(model)
        model.eval()
        return Loaded(model, self.load_processor(located), located, device, dtype, quantization is not None, notes)

    def collator(self, node: Any, loaded: Loaded) -> Any:
        """The collator that a config's `collator` node describes, for this model: training and every verb build it here."""
        return build(
            node, processor=loaded.processor, family=self, model_config=loaded.model.config, end_token_ids=self.end_token_ids(loaded)
        )

    def end_token_ids(self, loaded: Loaded) -> list[int]:
        """The ids that end a text, from the loaded model's generation settings (never from habit)."""
        ids = self.language_model(loaded.model).generation_config.eos_token_id
        if ids is None:
            ids = loaded.processor.tokenizer.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids or [])


@contextmanager
def _silent() -> Iterator[None]:
    """transformers' own log held back."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        library.set_verbosity(level)


def bars_on_terminals_only() -> None:
    """transformers' bars of loading and saving weights fill a log file with carriage returns; switch them off there."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
