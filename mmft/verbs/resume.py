"""`mmft resume run=DIR`: go on with an unfinished run; it ends as if it had not been stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError
from ..config.build import build


@dataclass
class Resume:
    """Nothing of the run's config can be changed on the way. Errors raised: UserError."""

    run: str

    def __call__(self, cfg: Any, overrides: list[str]) -> Any:
        from ..runs.open import read_snapshot, run_folder

        folder = run_folder(self.run)
        changes = [w for w in overrides if not w.startswith(("task=", "task.", "output_dir="))]
        if changes:
            raise UserError(f"{changes[0]}: a run goes on as it began; drop this word (mmft reproduce run={self.run} {changes[0]} trains a changed one)")
        kept = read_snapshot(folder)
        kept.run_dir = folder.as_posix()
        words = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines() if (folder / "overrides.txt").is_file() else []
        return build(kept.task)(kept, words)
