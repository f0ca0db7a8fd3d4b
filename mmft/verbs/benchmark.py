"""`mmft benchmark run=DIR tasks=[...]`: public benchmarks by lmms-eval, which asks the run through the server of `mmft serve`."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

from omegaconf import DictConfig

from ..common.errors import UserError, at_least
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
            from ..serving.parity import checked_engine
            from ..serving.server import Server, background

            with checked_engine(models, self.batch, 1024, self.check) as engine, background(Server(engine), listener) as url:
                measured = {side: lmms_eval.measure(python, url, served.name, self.tasks, self.limit, run / "benchmarks" / side) for side, served in asked.items()}
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
        at_least(self, limit=1, batch=1, check=0)
