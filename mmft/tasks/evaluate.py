"""`mmft evaluate run=DIR [data=...] [base=true]`: all metrics of training on any prepared split."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("mmft")


@dataclass
class Evaluate:
    run: str | None = None
    checkpoint: int | None = None
    base: bool = False

    def __call__(self, cfg: Any, overrides: list[str]) -> dict[str, Any]:
        from ..opened import open_run
        from .prepare import prepared_data
        from .train import split_rows

        opened = open_run(self.run, cfg, overrides, self.checkpoint)
        _, rows = split_rows(prepared_data(opened.cfg), opened.settings["evaluation"])
        evaluator = opened.evaluator(rows)
        loss = evaluator.loss(opened.model)
        metrics, _ = evaluator.measure(opened.model)
        log.info("loss %.6f", loss)
        return {"eval_loss": loss, "metrics": metrics}
