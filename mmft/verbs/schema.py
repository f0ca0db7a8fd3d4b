"""`mmft schema`: JSON Schemas of the configuration, with which an editor completes and checks yaml files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..common.errors import UserError

log = logging.getLogger("mmft")


@dataclass
class Schema:
    """The keys of conf/task/schema.yaml."""

    out: str | None = None
    headers: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> dict[str, Any] | list[Path]:
        """Print the schema of a whole config, or write one file for each group. Raises UserError."""
        from ..config import schema

        if self.headers is not None and self.out is None:
            raise UserError(f"headers={self.headers}: the comments name the schemas' files, so add out=FOLDER")
        if self.out is None:
            whole = schema.schema("config")
            print(json.dumps(whole, indent=1, ensure_ascii=False))
            return whole
        paths = schema.write(Path(self.out))
        log.info("%-14s %s", "schemas", ", ".join(path.as_posix() for path in paths))
        if self.headers is not None:
            changed = schema.write_modelines(Path(self.headers), Path(self.out))
            log.info("%-14s %d files below %s name their schema", "headers", len(changed), self.headers)
        return paths
