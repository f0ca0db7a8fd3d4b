"""Apply all rewrites to a model with one call, and take them off with one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common.errors import UserError
from .base import Replaced, Rewrite, apply
from .few_rows import FewRows
from .gated_mlp import GatedMlp
from .last_layer import ReadPositions, narrow_if_equal
from .lora_linear import LoraLinear
from .patch_embed import PatchEmbed
from .rms_norm import RmsNorm
from .row_attention import attend_by_row
from .seeded_dropout import DropoutStream, seed_dropout

log = logging.getLogger("mmft")

MODES = ("auto", "off")  # of model.rewrites
ON_LOAD: tuple[Rewrite, ...] = (PatchEmbed(), FewRows())  # on the loaded model, for every verb
IN_TRAINING: tuple[Rewrite, ...] = (LoraLinear(), GatedMlp(), RmsNorm())  # on a model with an adapter, while it is trained


class Rewrites:
    """The rewrites of one model: what was applied, and the objects that training drives.

    dropout: the stream of the adapter's dropout masks; the Trainer tells it the step. positions: what the last layer reads; None if it
    computes all positions.
    """

    def __init__(self) -> None:
        self.replaced = Replaced()
        self.dropout: DropoutStream | None = None
        self.positions: ReadPositions | None = None

    @property
    def classes(self) -> dict[str, set[type]]:
        """Rewrite name -> classes of the modules it was applied to."""
        return self.replaced.classes

    def narrow(self, model: torch.nn.Module, batch: dict[str, Any], once: Callable[[Callable[[], bool]], bool]) -> None:
        """Let the last layer compute only the positions that the loss reads, if that gives the same logits."""
        self.positions = narrow_if_equal(model, batch, self.replaced, once)

    def attend_by_row(self, model: torch.nn.Module) -> None:
        """Let attention compute each packed row alone; pipeline/load.py has compared whether the model can."""
        if attend_by_row(model, self.replaced):
            log.info("%-14s each packed row is computed by itself", "attention")

    def remove(self) -> None:
        """Give every module its own forward back. Dropout keeps its seeded masks."""
        self.replaced.remove()
        self.positions = None


def rewrite_loaded(model: torch.nn.Module, mode: str) -> Rewrites:
    """Apply the rewrites that every verb uses, as `model.rewrites` says. Raises UserError for an unknown mode."""
    if mode not in MODES:
        raise UserError(f"model.rewrites={mode}: must be auto or off")
    rewrites = Rewrites()
    if mode == "auto":
        for rewrite in ON_LOAD:
            apply(rewrite, model, rewrites.replaced)
    return rewrites


def rewrite_for_training(model: torch.nn.Module, mode: str, seed: int, selected: Sequence[Rewrite] = IN_TRAINING) -> Rewrites:
    """Apply the rewrites of training to a model with its adapter. seed: of the adapter's dropout. selected: for measurements."""
    rewrites = Rewrites()
    if mode == "auto" and hasattr(model, "peft_config"):
        rewrites.dropout = seed_dropout(model, seed)
        for rewrite in selected:
            apply(rewrite, model, rewrites.replaced)
    return rewrites
