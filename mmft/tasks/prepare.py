"""`mmft prepare data=...`: turn a data set into mmft's format and report what became of every row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import build


@dataclass
class Prepare:
    """Prepare the configured data set below output_dir/data and print what is in it."""

    def __call__(self, cfg: Any, overrides: list[str]) -> Any:
        from ..data.store import describe

        prepared = prepared_data(cfg, download=True)
        print("\n".join(describe(prepared)))
        return prepared


def prepared_data(cfg: Any, download: bool = False) -> Any:
    """The prepared set of a config, made now or found; every verb that needs data calls this."""
    from ..data.prepare import prepare

    return prepare(build(cfg.data), Path(cfg.output_dir) / "data", download)
