"""`mmft resume run=DIR`: continue an unfinished run, or train a finished one for more steps or epochs as a new run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..common.errors import UserError
from ..config.build import build
from ..config.snapshot import snapshot
from ..config.validate import check
from ..runs.directory import Run

MOVED = "model.path="
BESIDE = ("task=", "task.", "output_dir=", MOVED)  # words that change nothing of the run
PARENTS = ("lora.start", "model.adapters")  # where the adapters that a run builds on are now
NEW_RUN = ("run_dir=", "name=")  # of the run that continues a finished one


@dataclass
class Resume:
    """The keys of conf/task/resume.yaml. model.path=FOLDER names the base model's new place if it was moved; lora.start and model.adapters
    those of adapters.
    """

    run: str

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Run:
        """Train to the end and return the run. Raises UserError for a changed config."""
        from ..runs.open import read_snapshot, run_folder

        folder = run_folder(self.run)
        moved = [key for key in PARENTS if any(w.startswith(f"{key}=") for w in overrides)]
        changes = [w for w in overrides if not w.startswith((*BESIDE, *(f"{key}=" for key in moved)))]
        if (folder / "DONE").is_file() and moved:
            raise UserError(f"{moved[0]}: says where the adapter of a stopped run is now, and {self.run} is finished; drop this word")
        if (folder / "DONE").is_file() and any(not w.startswith(NEW_RUN) for w in changes):
            return self._extend(Run(folder), read_snapshot(folder), cfg, changes, overrides)
        if changes:
            raise UserError(
                f"{changes[0]}: a run goes on as it began, and {self.run} is not finished; drop this word (mmft reproduce run={self.run} {changes[0]} trains a changed one)"
            )
        run_cfg = read_snapshot(folder)
        if any(w.startswith(MOVED) for w in overrides):
            self._move_base(folder, run_cfg, cfg.model.path, overrides)
        if moved:
            self._move_parents(folder, run_cfg, cfg, moved, overrides)
        run_cfg.run_dir = folder.as_posix()
        words = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines() if (folder / "overrides.txt").is_file() else []
        return build(run_cfg.task, "task")(run_cfg, words)

    def _extend(self, run: Run, run_cfg: DictConfig, cfg: DictConfig, changes: list[str], overrides: list[str]) -> Run:
        """A new run that goes on where a finished one ended."""
        from ..models.fingerprint import import_while_hashing
        from ..pipeline.extend import AMOUNT, begin_extension
        from ..runs.parents import COMBINED, recorded
        from ..system.distributed import share

        if any(p.get("role") == COMBINED for p in recorded(run)):
            raise UserError(f"run={self.run}: was combined from other runs, so there is no training to continue; mmft ... lora.start={self.run} trains its adapter")
        for word in changes:
            key, _, value = word.partition("=")
            if word.startswith(NEW_RUN):
                continue
            if key not in AMOUNT:
                raise UserError(
                    f"{word}: a finished run is continued for more steps or epochs alone ({' or '.join(AMOUNT)}); for other settings begin a new"
                    f" training with its adapter: mmft ... lora.start={self.run} {word}"
                )
            before, now = run_cfg.trainer.get(key.partition(".")[2]), OmegaConf.select(cfg, key)
            if not isinstance(now, (int, float)) or isinstance(before, (int, float)) and before > 0 and now <= before:
                raise UserError(f"{word}: {self.run} was trained for {before}; give a larger number, that of the whole training")
            if key == AMOUNT[0] and not any(w.startswith(f"{AMOUNT[1]}=") for w in changes):
                run_cfg.trainer.max_steps = -1  # which would end the training before its epochs
            OmegaConf.update(run_cfg, key, now, force_add=True)
        if any(w.startswith(MOVED) for w in overrides):
            run_cfg.model.path = cfg.model.path
        run_cfg.output_dir, run_cfg.run_dir, run_cfg.name = cfg.output_dir, cfg.run_dir, cfg.name or run_cfg.get("name")
        check(run_cfg)
        import_while_hashing("transformers.trainer", "peft", model=run_cfg.model.get("path"))
        words = ["resume", *(w.removeprefix("task.") for w in overrides if not w.startswith("task="))]
        run_cfg.run_dir = share(lambda: begin_extension(run, run_cfg, words, {"changes": changes}).path.as_posix())
        return build(run_cfg.task, "task")(run_cfg, words)

    def _move_parents(self, folder: Path, run_cfg: DictConfig, cfg: DictConfig, moved: list[str], overrides: list[str]) -> None:
        """Write the new places of the adapters that the run builds on into its snapshot. Raises UserError if they are not the same."""
        from ..runs.parents import START, check_same, find_adapter, find_below, resolve_names

        for key in moved:
            if not OmegaConf.select(run_cfg, key):
                raise UserError(f"{key}: {self.run} builds on no such adapter; drop this word")
            OmegaConf.update(run_cfg, key, OmegaConf.select(cfg, key))
        resolve_names(run_cfg)
        start, hub = run_cfg.lora.get("start"), str(run_cfg.model.get("hub") or "huggingface")
        found = find_below(list(run_cfg.model.get("adapters") or ()), str(run_cfg.output_dir), hub)
        run = Run(folder)
        check_same(run, found + ([find_adapter(start, START, "lora.start", str(run_cfg.output_dir), hub)] if start else []))
        run.write_text("snapshot.yaml", snapshot(run_cfg))
        run.record("resume", overrides, [run / "snapshot.yaml"])

    def _move_base(self, folder: Path, run_cfg: DictConfig, path: str, overrides: list[str]) -> None:
        """Write the base model's new place into the run's snapshot, which later verbs read. Raises UserError if its files differ."""
        from ..models.fingerprint import import_while_hashing
        from ..runs.base_model import locate_base

        run = Run(folder)
        if not (run / "env.json").is_file():
            raise UserError(f"run={self.run}: was stopped before it recorded its base model, so the files at {MOVED}{path} cannot be compared; start it anew")
        import_while_hashing("transformers", "peft", model=path)
        run_cfg.model.path = path
        locate_base(build(run_cfg.model, "model"), run.read_json("env.json")["model"], self.run)
        run.write_text("snapshot.yaml", snapshot(run_cfg))
        run.record("resume", overrides, [run / "snapshot.yaml"])
