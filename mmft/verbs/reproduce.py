"""`mmft reproduce run=DIR [key=value ...]`: run a snapshot again in a new directory, then compare the two runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..common.errors import Incomplete, UserError
from ..config.build import build
from ..config.library_keys import GROUPS
from ..config.validate import check
from ..runs.directory import Run

log = logging.getLogger("mmft")

TRAIN = "mmft.verbs.train.Train"


@dataclass
class Reproduce:
    """Exit code 1 when the runs differ although nothing was changed on purpose. Errors raised: UserError."""

    run: str
    against: str | None = None

    def __call__(self, cfg: Any, overrides: list[str]) -> dict[str, Any]:
        from ..reports import terminal
        from ..runs.compare import DIFFERENT, compare_runs, table
        from ..runs.open import run_folder

        first = Run(run_folder(self.run))
        changes = [w for w in overrides if not w.startswith(("task=", "task.", "output_dir=", "run_dir=", "name="))]
        if self.against is not None:
            if changes:
                raise UserError(f"{changes[0]}: against={self.against} compares two finished runs, so there is nothing to change; drop this word")
            second = Run(run_folder(self.against))
        else:
            kept = laid_over(first, cfg, changes)
            parent = {"run": first.name, "path": first.path.as_posix(), "changes": changes}
            words = ["reproduce", *(w.removeprefix("task.") for w in overrides if not w.startswith("task="))]
            second = build(kept.task)(kept, words, parent)
        result = {"changes": changes, **compare_runs(first.path, second.path)}
        second.write_json("reproduce.json", result)
        second.record("reproduce", overrides, [second / "reproduce.json"])
        rows = table(result) | ({"changed on purpose": " ".join(changes)} if changes else {})
        terminal.show(terminal.pairs_table("Reproduced" if self.against is None else "Run against run", rows))
        for text in result["why"]:
            log.info("  %s", text)
        if result["verdict"] == DIFFERENT and not changes:
            raise Incomplete(f"{second.name} is not {first.name} again: {result['why'][0] if result['why'] else 'their results differ'}")
        return result


def laid_over(run: Run, cfg: DictConfig, changes: list[str]) -> DictConfig:
    """The run's snapshot with the command's changes over it, checked; where it is written is the command's word.

    Errors raised: UserError for a run that never finished, a snapshot of another verb, a change that cannot be laid over.
    """
    from ..runs.open import read_snapshot

    if not (run / "DONE").is_file():
        raise UserError(
            f"run={run.path}: never finished, so there is nothing to compare with; start it anew with:"
            f" mmft --config-dir {run.path.as_posix()} --config-name snapshot"
        )
    kept = read_snapshot(run.path)
    target = OmegaConf.select(kept, "task._target_")
    if target != TRAIN:
        raise UserError(f"{run / 'snapshot.yaml'}: its task is {target}, not a training ({TRAIN})")
    if OmegaConf.select(kept, "trainer.push_to_hub") and not any(w.startswith("trainer.push_to_hub=") for w in changes):
        raise UserError(f"{run / 'snapshot.yaml'}: would upload its checkpoints (trainer.push_to_hub); add trainer.push_to_hub=false, or =true to allow it")
    pin_base(run, kept)
    for word in changes:
        key = word.split("=", 1)[0]
        if key.startswith("~") or "@" in key or key == "experiment" or key.startswith("hydra"):
            raise UserError(f"{word}: cannot be laid over a snapshot; name the keys it should change (lora.r=8, data=coco)")
        if key in GROUPS:
            kept[key] = cfg[key]
            if key == "model":
                kept.collator = cfg.collator  # a model brings its collator
        else:
            OmegaConf.update(kept, key, OmegaConf.select(cfg, key), force_add=True)
    kept.output_dir, kept.run_dir = cfg.output_dir, cfg.run_dir
    kept.name = cfg.name or kept.name
    check(kept)
    return kept


def pin_base(run: Run, kept: DictConfig) -> None:
    """A hub's branch moves on: the base is taken at the commit that the run was trained on."""
    model = run.read_json("env.json").get("model") or {}
    if model.get("hub") == "huggingface" and not str(model.get("revision")).startswith("sha256:"):
        kept.model.revision = model["revision"]


