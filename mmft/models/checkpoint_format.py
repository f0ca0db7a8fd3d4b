"""Refuse checkpoints that transformers cannot load as a vision-language model, from config.json alone, before weights are downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.files import read_json
from ..config.guard.remote_code import trusts_remote_code
from .unsupported import UNSUPPORTED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Converted checkpoints of InternVL, by the name of the original: (pattern, name of the counterpart).
INTERNVL = (
    (re.compile(r"InternVL3_5-(\d+B(?:-A\d+B)?)"), r"OpenGVLab/InternVL3_5-\1-HF"),
    (re.compile(r"InternVL3-(\d+B)"), r"OpenGVLab/InternVL3-\1-hf"),
)


def read_config(path: str, folder: Path) -> PretrainedConfig:
    """transformers' config of the checkpoint in `folder`, which `model.path=path` names. Raises UserError with a way forward."""
    import transformers
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind == "internvl_chat":
        raise UserError(f"model.path={path}: is in InternVL's own format, which transformers does not load; {_internvl_counterpart(path, raw)}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusts_remote_code())
    except ImportError as error:
        raise missing_library(path, error) from None
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
    hint = ""
    if raw.get("auto_map") and not trusts_remote_code():
        reason, hint = f"it needs code that comes with the model ({kind})", "; read that code, then add the flag --trust-remote-code"
    elif kind and kind not in transformers.CONFIG_MAPPING:
        hint = f"; if {kind} is newer than transformers {transformers.__version__}, install a newer one: pip install -U transformers"
    raise UserError(f"model.path={path}: its config.json cannot be used: {reason}{hint}")


def missing_library(path: str, error: ImportError) -> UserError:
    """What to say of a model that needs a library which is not installed; the tower of some types is a model of another package."""
    package = re.search(r"pip install ([\w.-]+)", str(error))
    way_on = f"; pip install {package.group(1)}" if package else ""
    return UserError(f"model.path={path}: cannot be loaded: {str(error).strip().splitlines()[0].split('. ')[0]}{way_on}")


def check_vision_language(path: str, config: PretrainedConfig) -> None:
    """Raises UserError unless the config is of an image-text-to-text model that mmft supports."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if reason := UNSUPPORTED.get(config.model_type):
        raise UserError(f"model.path={path}: a {config.model_type} is not supported: {reason}; docs/conformance.md lists the types that are")
    has_own_code = trusts_remote_code() and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if has_own_code or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return
    hint = f"; mmft assemble llm={path} vision=... builds one from it" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else ""
    raise UserError(f"model.path={path}: a {config.model_type} is not a vision-language model (image and text in, text out){hint}")


def _internvl_counterpart(path: str, raw: dict[str, object]) -> str:
    for name in (path, str(raw.get("_name_or_path") or "")):
        for pattern, counterpart in INTERNVL:
            if match := pattern.search(name):
                return f"its counterpart for transformers is model.path={match.expand(counterpart)}"
    return "InternVL3 and InternVL3.5 have counterparts for transformers, such as model.path=OpenGVLab/InternVL3-1B-hf"
