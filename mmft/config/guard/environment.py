"""Decide which environment variables a config may read with ${oc.env:NAME}. Values read are written into the run, so never secrets."""

from __future__ import annotations

import os
import re

from omegaconf import OmegaConf

# Names that clusters use for folders and jobs. The user allows more in this variable; a file cannot set it.
NAMES_VARIABLE = "MMFT_ENV"
_ALLOWED = re.compile(r"HOME|USER|LOGNAME|USERNAME|HOSTNAME|PWD|TMPDIR|TMP|TEMP|SCRATCH|WORK|PROJECT|DATA|DATASETS|HF_HOME|CUDA_VISIBLE_DEVICES|SLURM_[A-Z_]*ID")
_NO_DEFAULT = object()


def read(name: str, default: object = _NO_DEFAULT) -> str | None:
    """An environment variable's value, as OmegaConf's own resolver returns it. Raises KeyError, PermissionError."""
    if not _ALLOWED.fullmatch(name) and name not in re.split(r"[\s,:;]+", os.environ.get(NAMES_VARIABLE, "")):
        raise PermissionError(f"a config may not read the environment variable {name}; if it holds no secret, add its name to {NAMES_VARIABLE}")
    if name in os.environ:
        return os.environ[name]
    if default is _NO_DEFAULT:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


def install() -> None:
    """Replace OmegaConf's resolver `oc.env` by `read`, in this process."""
    OmegaConf.register_new_resolver("oc.env", read, replace=True)
