"""A hash of a resolved config: two commands with the same hash train the same thing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig

from .validate import to_plain

# where a run lies, who watches it and what it need not compute twice change no result
NOT_IDENTITY = ("run_dir", "output_dir", "name", "logger", "objective", "vision_cache", "vision_cache_gb")


def config_identity(cfg: DictConfig | dict[str, Any]) -> str:
    """16 hex digits of the content of a resolved config: equal for two commands that would train the same thing."""
    plain = {k: v for k, v in to_plain(cfg).items() if k not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
