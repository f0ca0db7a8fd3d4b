"""Hash a resolved config: two commands with the same hash train the same thing."""

from __future__ import annotations

import hashlib
import json

from omegaconf import DictConfig

from .plain import resolved
from .ranking import is_supervised
from .settings import Settings

# Keys that change no result: where a run is written, what observes it, and what it may cache.
NOT_IDENTITY = ("run_dir", "output_dir", "name", "logger", "rank_by", "vision_cache", "vision_cache_gb")


def config_identity(cfg: DictConfig | Settings) -> str:
    """16 hex digits, equal for two configs that would train the same thing."""
    plain = {key: value for key, value in resolved(cfg).items() if key not in NOT_IDENTITY}
    if is_supervised(plain.get("objective")):  # as in the snapshots of runs from before there were others
        plain.pop("objective", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
