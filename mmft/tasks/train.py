"""`mmft` or `mmft train`: one straight line from a composed config to an adapter that has been measured."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import build, snapshot, to_plain
from ..distributed import is_main, share
from ..errors import UserError
from ..line import Line
from ..run import Run
from .prepare import prepared_data

log = logging.getLogger("mmft")


@dataclass
class Train:
    """Train what the config says, into a new run directory. Errors raised: UserError."""

    audit: bool = True

    def __call__(self, cfg: Any, overrides: list[str], parent: dict[str, Any] | None = None, shared: Any = None) -> Run:
        """`parent` describes the run that this one repeats (parent.json); `shared` is what the runs of a sweep share."""
        from .. import disk, libraries, memory

        fresh = libraries.load("transformers.trainer", "peft", model=cfg.model.get("path"))
        from ..augment import made
        from ..data.store import describe
        from ..environment import process_started
        from ..loggers.base import Logger
        from ..resuming import of_this_config, reopened
        from ..signals import listening
        from ..trainer import training_settings

        times = {"import": time.time() - process_started()} if fresh else {}
        # Everything light is built and checked before a weight is read and before anything is written.
        settings = to_plain(cfg)
        family, logger = build(cfg.model), build(cfg.logger) if is_main() else Logger(hardware=False)
        training_settings(settings["trainer"], output_dir=os.devnull)
        made(settings.get("augment"))
        given = Path(settings["run_dir"]) if settings["run_dir"] else None
        known = given if given and share(lambda: of_this_config(given, cfg)) else None
        if known and share(lambda: (known / "DONE").is_file()):  # a job that was killed behind its last line and queued again
            log.info("%-14s %s is finished already; mmft report run=%s shows it, mmft reproduce run=%s trains it again", "run", *[known] * 3)
            return Run(known)
        if shared:
            shared.begin_point()
        parts = Parts.of(cfg, settings, family, shared)
        times["prepare"] = parts.seconds
        need = disk.needed(parts.skeleton, parts.plan, settings, parts.located.folder, len(parts.rows), len(parts.held_out or ()))

        words = [settings["name"] or Path(parts.located.path.split(":")[-1]).name, "" if settings["name"] else parts.prepared.manifest["name"]]
        resumed = share(lambda: reopened(known)) if known else None
        place = given or Path(settings["output_dir"])
        together = shared.seat.size if shared and shared.seat else 1
        share(lambda: disk.check(place, need, together, disk.own(place) if resumed else 0))
        run = resumed.run if resumed else Run(share(lambda: Run.create(settings["output_dir"], words, settings["run_dir"]).path))
        log.info("run directory  %s", run.path)
        for text in describe(parts.prepared):
            log.info("%-14s %s", "data", text)
        with run.held(), listening(shared.running if shared else []) as listener:
            if resumed is None:
                run.write_text("snapshot.yaml", snapshot(cfg))
                run.write_text("overrides.txt", "".join(f"{word}\n" for word in overrides))
            if parent:
                run.write_json("parent.json", parent)
            line = Line(
                cfg, settings, run, logger, family, parts.located, parts.plan, parts.prepared, parts.rows, parts.held_out, shared,
                self.audit and resumed is None, times=times, resumed=resumed, listener=listener, need=need.bytes * together,
            )  # fmt: skip
            try:
                line.load()
                line.measure_base()
                line.attach()
                line.fit()
                line.measure_tuned()
                line.finish()
            except BaseException as error:
                try:
                    line.fail(error)
                except OSError as full:
                    if not disk.is_full(full):
                        raise
                    log.warning("%-14s no room for %s", "disk", run / "summary.json")
                if memory.is_out(error):
                    raise UserError(f"{run.path}: out of memory ({' '.join(str(error).split())[:160]}): try {memory.SMALLER}") from None
                if disk.is_full(error):
                    raise UserError(f"{run.path}: {getattr(error, 'strerror', error)}; its checkpoints are as they were: free some, and go on with mmft resume run={run.path}") from None
                raise
        return run


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
        from .. import lora
        from ..augment import augmented

        started = time.time()
        prepared = shared.prepared(cfg) if shared else prepared_data(cfg)
        seconds = time.time() - started
        rows, held_out = split_rows(prepared, settings["evaluation"])
        rows = augmented(rows, settings.get("augment"), settings["seed"])
        located = shared.locate(family) if shared else family.locate()
        skeleton = shared.skeleton(family) if shared else family.skeleton(located)
        return cls(prepared, rows, held_out, located, skeleton, lora.plan(skeleton, settings["lora"]), seconds)


def rehearse(cfg: Any, shared: Any, base: bool) -> None:
    """What comes before the first step of a run, so that `shared` has it for those that are forked from here; nothing is written.

    base: audit and measure the untouched model, too, as points do that begin anew. Errors raised: whatever the run would raise there.
    """
    from ..loggers.base import Logger

    settings = to_plain(cfg)
    family = build(cfg.model)
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


def split_rows(prepared: Any, evaluation: dict[str, Any]) -> tuple[Any, Any]:
    """(training rows, held-out rows or None). Errors raised: UserError for a split the set does not have."""
    from ..evaluation import Subset

    if not prepared.splits.get("train"):
        raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
    name = evaluation["split"]
    if name is None:
        return prepared.split("train"), None
    if not prepared.splits.get(name):
        raise UserError(
            f"evaluation.split={name}: the prepared set has no such rows, it holds {prepared.splits}; set data.splits.{name}=0.1,"
            " or evaluation.split=null to train without measuring"
        )
    return prepared.split("train"), Subset(prepared.split(name), evaluation["max_samples"])
