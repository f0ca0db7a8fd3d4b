"""Which environment variables a config may read with ${oc.env:NAME}: places, never secrets, since what is read is written down."""

from __future__ import annotations

import os
import re
from typing import Any

from omegaconf import OmegaConf

# Names that clusters use for places and jobs. More are named in this variable by the person at the keyboard, never by a file.
NAMES_VARIABLE = "MMFT_ENV"
_ALLOWED = re.compile(r"HOME|USER|LOGNAME|USERNAME|HOSTNAME|PWD|TMPDIR|TMP|TEMP|SCRATCH|WORK|PROJECT|DATA|DATASETS|HF_HOME|CUDA_VISIBLE_DEVICES|SLURM_[A-Z_]*ID")
_NONE = object()


def read(name: str, default: Any = _NONE) -> Any:
    """The value of one environment variable, as OmegaConf's own resolver gives it. Errors raised: KeyError, PermissionError."""
    if not _ALLOWED.fullmatch(name) and name not in re.split(r"[\s,:;]+", os.environ.get(NAMES_VARIABLE, "")):
        raise PermissionError(f"a config may not read the environment variable {name}; if it holds no secret, add its name to {NAMES_VARIABLE}")
    if name in os.environ:
        return os.environ[name]
    if default is _NONE:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


def guard() -> None:
    """Put `read` in the place of OmegaConf's resolver, in this process."""
    OmegaConf.register_new_resolver("oc.env", read, replace=True)
