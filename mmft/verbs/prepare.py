"""`mmft prepare data=...`: turn a data set into mmft's format and report what became of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.prepare import prepared_data


@dataclass
class Prepare:
    """Prepare the configured data set below output_dir/data and print what is in it."""

    def __call__(self, cfg: Any, overrides: list[str]) -> Any:
        from ..data.prepared import describe

        prepared = prepared_data(cfg, download=True)
        print("\n".join(describe(prepared)))
        return prepared
