"""`mmft resume run=DIR`: continue an unfinished run; the result is that of an uninterrupted one."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.build import build
from ..runs.directory import Run


@dataclass
class Resume:
    """The keys of conf/task/resume.yaml."""

    run: str

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Run:
        """Train to the end and return the run. Raises UserError for a changed config."""
        from ..runs.open import read_snapshot, run_folder

        folder = run_folder(self.run)
        changes = [w for w in overrides if not w.startswith(("task=", "task.", "output_dir="))]
        if changes:
            raise UserError(f"{changes[0]}: a run goes on as it began; drop this word (mmft reproduce run={self.run} {changes[0]} trains a changed one)")
        kept = read_snapshot(folder)
        kept.run_dir = folder.as_posix()
        words = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines() if (folder / "overrides.txt").is_file() else []
        return build(kept.task, "task")(kept, words)
