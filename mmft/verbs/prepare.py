"""`mmft prepare data=...`: convert a data set into mmft's format and report dropped and changed rows."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from ..data.prepare import prepared_data
from ..data.prepared import PreparedData


@dataclass
class Prepare:
    """The keys of conf/task/prepare.yaml."""

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> PreparedData:
        """Prepare the configured data set below output_dir/data and print what is in it. Raises UserError."""
        prepared = prepared_data(cfg, download=True)
        print("\n".join(prepared.describe()))
        return prepared
