"""`mmft` or `mmft train`: train an adapter, or a whole model, and measure it against its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..models.fingerprint import import_while_hashing

if TYPE_CHECKING:
    from ..pipeline.context import RunContext
    from ..runs.directory import Run


@dataclass
class Train:
    """Train what the config says, into a new run directory. Raises UserError.

    audit: check end tokens and image-blindness on two rows first.
    """

    audit: bool = True

    def __call__(self, cfg: DictConfig, overrides: list[str], parent: Mapping[str, Any] | None = None, context: RunContext | None = None) -> Run:
        """parent: the run that this one repeats (parent.json). context: what the points of a sweep share."""
        imported = import_while_hashing("transformers.trainer", "peft", model=cfg.model.get("path"))
        from ..pipeline.context import RunContext
        from ..pipeline.run import train

        context = context or RunContext()
        return train(cfg, overrides, context, parent, self.audit, imported or context.imported)
