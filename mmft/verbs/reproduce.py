"""`mmft reproduce run=DIR [key=value ...]`: train a run's snapshot again in a new directory, then compare the two runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..common.errors import Incomplete, UserError
from ..config.build import build
from ..config.groups import GROUPS
from ..config.validate import check
from ..runs.directory import Run

if TYPE_CHECKING:
    from ..runs.compare import RunComparison

log = logging.getLogger("mmft")

TRAIN = "mmft.verbs.train.Train"


@dataclass
class Reproduce:
    """The keys of conf/task/reproduce.yaml. Further words change the new run."""

    run: str
    against: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> RunComparison:
        """Train, compare, and return the comparison. Raises UserError; Incomplete (exit code 1) if unchanged runs differ."""
        from ..reports import terminal
        from ..runs.compare import DIFFERENT, compare_runs, comparison_table
        from ..runs.open import run_folder

        first = Run(run_folder(self.run))
        changes = [w for w in overrides if not w.startswith(("task=", "task.", "output_dir=", "run_dir=", "name="))]
        if self.against is not None:
            if changes:
                raise UserError(f"{changes[0]}: against={self.against} compares two finished runs, so there is nothing to change; drop this word")
            second = Run(run_folder(self.against))
        else:
            changed = changed_config(first, cfg, changes)
            parent = {"run": first.name, "path": first.path.as_posix(), "changes": changes}
            words = ["reproduce", *(w.removeprefix("task.") for w in overrides if not w.startswith("task="))]
            second = self._train(first, changed, words, parent)
        result = compare_runs(first.path, second.path)
        result["changes"] = changes
        second.write_json("reproduce.json", result)
        second.record("reproduce", overrides, [second / "reproduce.json"])
        if not any(what == "base model" for what, *_ in result["inputs"]):  # another place of the same files is no change
            changes = [w for w in changes if not w.startswith("model.path=")]
        rows = comparison_table(result) | ({"changed on purpose": " ".join(changes)} if changes else {})
        terminal.show(terminal.pairs_table("Reproduced" if self.against is None else "Run against run", rows))
        for text in result["why"]:
            log.info("  %s", text)
        if result["verdict"] == DIFFERENT and not changes:
            raise Incomplete(f"{second.name} is not {first.name} again: {result['why'][0] if result['why'] else 'their results differ'}")
        return result


    def _train(self, first: Run, changed: DictConfig, words: list[str], parent: dict[str, Any]) -> Run:
        """Train the config again, from where the first run began. Raises UserError if an adapter that it builds on is not what it was."""
        from ..models.fingerprint import import_while_hashing
        from ..runs.parents import check_unchanged, extended

        import_while_hashing("transformers.trainer", "peft", model=changed.model.get("path"))
        if not any(word.startswith(("lora.start=", "model.adapters=")) for word in parent["changes"]):
            check_unchanged(first, changed.output_dir)
        if record := extended(first):  # it is the rest of another run, and begins with that one's last step
            from ..pipeline.extend import begin_extension

            begin_extension(Run(Path(record["path"])), changed, words, parent)  # changed.run_dir names the new run now
            return build(changed.task, "task")(changed, words)
        return build(changed.task, "task")(changed, words, parent)


def changed_config(run: Run, cfg: DictConfig, changes: list[str]) -> DictConfig:
    """The run's snapshot with the command's changes and its output directory, checked.

    Raises UserError for a run that never finished, a snapshot of another verb, and a change that a snapshot cannot take.
    """
    from ..runs.open import read_snapshot
    from ..runs.parents import COMBINED, recorded

    if not (run / "DONE").is_file():
        raise UserError(
            f"run={run.path}: never finished, so there is nothing to compare with; start it anew with:"
            f" mmft --config-dir {run.path.as_posix()} --config-name snapshot"
        )
    kept = read_snapshot(run.path)
    target = OmegaConf.select(kept, "task._target_")
    if target != TRAIN:
        raise UserError(f"{run / 'snapshot.yaml'}: its task is {target}, not a training ({TRAIN})")
    if OmegaConf.select(kept, "trainer.push_to_hub") and "trainer.push_to_hub=false" not in changes:
        raise UserError(f"{run / 'snapshot.yaml'}: would upload its checkpoints (trainer.push_to_hub); add trainer.push_to_hub=false")
    if any(p.get("role") == COMBINED for p in recorded(run)):
        words = " ".join((run / "overrides.txt").read_text(encoding="utf-8").split())
        raise UserError(f"run={run.path}: was combined from other runs, not trained; mmft {words} makes it again")
    pin_base(run, kept)
    for word in changes:
        key = word.split("=", 1)[0]
        if key.startswith("~") or "@" in key or key == "experiment" or key.startswith("hydra"):
            raise UserError(f"{word}: cannot be laid over a snapshot; name the keys it should change (lora.r=8, data=coco)")
        if key in GROUPS:
            kept[key] = cfg[key]
            if key == "model":
                kept.collator = cfg.collator  # each model has its own default collator
        else:
            OmegaConf.update(kept, key, OmegaConf.select(cfg, key), force_add=True)
    kept.output_dir, kept.run_dir = cfg.output_dir, cfg.run_dir
    kept.name = cfg.name or kept.name
    check(kept)
    return kept


def pin_base(run: Run, kept: DictConfig) -> None:
    """Take the base model at the commit that the run was trained on: a branch may have moved since."""
    model = run.read_json("env.json").get("model") or {}
    if model.get("hub") == "huggingface" and not str(model.get("revision")).startswith("sha256:"):
        kept.model.revision = model["revision"]
