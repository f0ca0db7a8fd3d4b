"""`mmft benchmark run=DIR tasks=[...]`: public benchmarks by lmms-eval, which asks the run through the server of `mmft serve`."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

from omegaconf import DictConfig

from ..common.errors import UserError
from ..common.records import BenchmarkRecord

log = logging.getLogger("mmft")


@dataclass
class Benchmark:
    """The keys of conf/task/benchmark.yaml."""

    run: str
    tasks: list[str] = field(default_factory=list)
    checkpoint: int | None = None
    base: bool = False
    limit: int | None = None
    batch: int | None = None
    check: int = 4

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> BenchmarkRecord:
        """Run the tasks, keep their results with the run, and return them. Raises UserError."""
        from ..reports import benchmarks, terminal
        from ..runs.open import run_config
        from ..serving import lmms_eval
        from ..serving.listener import check_installed, listening

        self._check_keys()
        check_installed()
        python = lmms_eval.interpreter()
        run, _ = run_config(self.run, cfg, overrides)
        with listening("127.0.0.1", 0) as listener:
            from ..serving.adapters import open_models

            models = open_models([self.run], cfg, overrides, self.checkpoint)
            asked = {"tuned": models[-1], **({"base": models[0]} if self.base and len(models) > 1 else {})}
            if self.base and len(models) == 1:
                raise UserError(f"base=true: the whole model of run={self.run} was trained, so it holds no base")
            from ..serving.engine import Engine
            from ..serving.parity import check_parity
            from ..serving.server import Server, background

            places = self.batch if self.batch is not None else models[-1].opened.settings["evaluation"]["batch_size"]
            engine = Engine(models, places, 1024)
            try:
                if self.check:
                    for line in check_parity(engine, models, self.check):
                        log.info("%-14s %s", "checked", line)
                else:
                    engine.start()
                with background(Server(engine), listener) as url:
                    measured = {side: lmms_eval.measure(python, url, served.name, self.tasks, self.limit, run / "benchmarks" / side) for side, served in asked.items()}
            finally:
                engine.close()
        record = benchmarks.add(run.path, measured, self.limit, self.checkpoint)
        run.record("benchmark", overrides, [run / benchmarks.FILE, *(run / "benchmarks" / side for side in asked)])
        terminal.show(benchmarks.table(record))
        return record

    def _check_keys(self) -> None:
        if not self.tasks:
            raise UserError("tasks must be given: names of lmms-eval, as in tasks=[mme,mmmu_val]")
        for task in self.tasks:
            if not re.fullmatch(r"[\w.-]+", str(task)) or str(task).startswith("-"):
                raise UserError(f"tasks={task}: cannot be the name of a task")
        for name, value, least in (("limit", self.limit, 1), ("batch", self.batch, 1), ("check", self.check, 0)):
            if value is not None and value < least:
                raise UserError(f"{name}={value}: must be {least} or more")
