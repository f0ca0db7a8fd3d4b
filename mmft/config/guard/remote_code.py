"""Refuse keys through which a library would import or download code."""

from __future__ import annotations

import os
from typing import Any

from ...common.errors import UserError

MODULE_KEYS = ("lora.megatron_core", "lora.megatron_config")  # name a module that peft imports
# Arguments of a processor's loader that are no settings of the processor: other code, other files, a token.
LOADER_KEYS = ("code_revision", "revision", "token", "use_auth_token", "cache_dir", "subfolder", "force_download", "local_files_only", "proxies", "_from_auto")
# Set by the flag --trust-remote-code and inherited by the processes of a sweep; a file cannot set it.
TRUST_VARIABLE = "MMFT_TRUST_REMOTE_CODE"


def trusts_remote_code() -> bool:
    """Whether the command allows code that comes with a model to run."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def check(plain: dict[str, Any]) -> None:
    """Check a resolved config. Raises UserError."""
    _check_trust(plain, "")
    for key in MODULE_KEYS:
        section, _, name = key.partition(".")
        if (plain.get(section) or {}).get(name):
            raise UserError(f"{key}: names a module to import, which a config may not")
    model = plain.get("model") or {}
    if "/" in str(model.get("attn_implementation") or ""):
        raise UserError(f"model.attn_implementation={model['attn_implementation']}: is code from a hub; use sdpa, eager or flash_attention_2")
    for name in model.get("processor") or ():
        if name in LOADER_KEYS:
            raise UserError(f"model.processor.{name}: is no setting of a processor (model.revision=... names a revision)")


def _check_trust(node: Any, where: str) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        name = f"{where}.{key}" if where else str(key)
        if key == "trust_remote_code" and value not in (False, None):
            raise UserError(f"{name}: a config may not allow a model's own code to run; add the flag --trust-remote-code to the command, if you read that code")
        _check_trust(value, name)
