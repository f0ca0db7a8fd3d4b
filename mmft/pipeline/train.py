"""`mmft` or `mmft train`: one straight line from a composed config to an adapter that has been measured."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.build import build
from ..config.plain import to_plain
from ..data.prepare import prepared_data
from ..data.splits import split_rows
from ..models.load import load_skeleton, locate_model
from ..runs.directory import Run
from .line import Line

log = logging.getLogger("mmft")


@dataclass
class Parts:
    """What a training is made of, before a weight is read."""

    prepared: Any
    rows: Any
    held_out: Any
    located: Any
    skeleton: Any
    plan: Any
    seconds: float  # that preparing the data took

    @classmethod
    def of(cls, cfg: Any, settings: dict[str, Any], family: Any, shared: Any) -> Parts:
        """Errors raised: UserError."""
        from ..adapters import lora
        from ..data.augment import augmented

        started = time.time()
        prepared = shared.prepared(cfg) if shared else prepared_data(cfg)
        seconds = time.time() - started
        rows, held_out = split_rows(prepared, settings["evaluation"])
        rows = augmented(rows, settings.get("augment"), settings["seed"])
        located = shared.locate(family) if shared else locate_model(family)
        skeleton = shared.skeleton(family) if shared else load_skeleton(family, located)
        return cls(prepared, rows, held_out, located, skeleton, lora.plan(skeleton, settings["lora"]), seconds)


def rehearse(cfg: Any, shared: Any, base: bool) -> None:
    """What comes before the first step of a run, so that `shared` has it for those that are forked from here; nothing is written.

    base: audit and measure the untouched model, too, as points do that begin anew. Errors raised: whatever the run would raise there.
    """
    from ..loggers.base import Logger

    settings = to_plain(cfg)
    family = build(cfg.model, "model")
    parts = Parts.of(cfg, settings, family, shared)
    run = Run(Path(settings["output_dir"]))
    run.writes = False
    line = Line(
        cfg, settings, run, Logger(hardware=False), family, parts.located, parts.plan, parts.prepared, parts.rows, parts.held_out, shared, base and cfg.task.get("audit", False)
    )  # fmt: skip
    line.load()
    if base:
        line.measure_base()
    line.attach()
