"""."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..config.build import build
from ..config.snapshot import snapshot
from ..config.plain import to_plain
from ..pipeline.line import Line
from ..pipeline.train import Parts
from ..runs.directory import Run
from ..system.disk import is_disk_full
from ..system.distributed import is_main, share
from ..training.checkpoints import bytes_on_disk

log = logging.getLogger("mmft")


@dataclass
class Train:
    """Train what the config says, into a new run directory. Errors raised: UserError."""

    audit: bool = True

    def __call__(self, cfg: Any, overrides: list[str], parent: dict[str, Any] | None = None, shared: Any = None) -> Run:
        """`parent` describes the run that this one repeats (parent.json); `shared` is what the runs of a sweep share."""
        from ..models.fingerprint import import_while_hashing
        from ..system import memory
        from ..training import disk_space

        fresh = import_while_hashing("transformers.trainer", "peft", model=cfg.model.get("path"))
        from ..data.augment import made
        from ..data.prepared import describe
        from ..loggers.base import Logger
        from ..runs.environment import process_started
        from ..system.signals import listening
        from ..training.resume import of_this_config, reopened
        from ..training.trainer import training_settings

        times = {"import": time.time() - process_started()} if fresh else {}
        # Everything light is built and checked before a weight is read and before anything is written.
        settings = to_plain(cfg)
        family, logger = build(cfg.model, "model"), build(cfg.logger, "logger") if is_main() else Logger(hardware=False)
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
        need = disk_space.needed(parts.skeleton, parts.plan, settings, parts.located.folder, len(parts.rows), len(parts.held_out or ()))

        words = [settings["name"] or Path(parts.located.path.split(":")[-1]).name, "" if settings["name"] else parts.prepared.manifest["name"]]
        resumed = share(lambda: reopened(known)) if known else None
        place = given or Path(settings["output_dir"])
        together = shared.seat.size if shared and shared.seat else 1
        share(lambda: disk_space.check(place, need, together, bytes_on_disk(place) if resumed else 0))
        run = resumed.run if resumed else Run(share(lambda: Run.create(settings["output_dir"], words, settings["run_dir"]).path))
        log.info("run directory  %s", run.path)
        for text in describe(parts.prepared):
            log.info("%-14s %s", "data", text)
        with run.locked(), listening(shared.running if shared else []) as listener:
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
                    if not is_disk_full(full):
                        raise
                    log.warning("%-14s no room for %s", "disk", run / "summary.json")
                if memory.is_out(error):
                    raise UserError(f"{run.path}: out of memory ({' '.join(str(error).split())[:160]}): try {memory.SMALLER}") from None
                if is_disk_full(error):
                    raise UserError(f"{run.path}: {getattr(error, 'strerror', error)}; its checkpoints are as they were: free some, and go on with mmft resume run={run.path}") from None
                raise
        return run
