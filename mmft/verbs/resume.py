"""`mmft resume run=DIR`: continue an unfinished run; the result is that of an uninterrupted one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.build import build
from ..config.snapshot import snapshot
from ..runs.directory import Run

MOVED = "model.path="


@dataclass
class Resume:
    """The keys of conf/task/resume.yaml. model.path=FOLDER names the base model's new place if it was moved."""

    run: str

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Run:
        """Train to the end and return the run. Raises UserError for a changed config."""
        from ..runs.open import read_snapshot, run_folder

        folder = run_folder(self.run)
        changes = [w for w in overrides if not w.startswith(("task=", "task.", "output_dir=", MOVED))]
        if changes:
            raise UserError(f"{changes[0]}: a run goes on as it began; drop this word (mmft reproduce run={self.run} {changes[0]} trains a changed one)")
        run_cfg = read_snapshot(folder)
        if any(w.startswith(MOVED) for w in overrides):
            self._move_base(folder, run_cfg, cfg.model.path, overrides)
        run_cfg.run_dir = folder.as_posix()
        words = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines() if (folder / "overrides.txt").is_file() else []
        return build(run_cfg.task, "task")(run_cfg, words)

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
