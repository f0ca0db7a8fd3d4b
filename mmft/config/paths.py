"""Replace `~` by the home folder in every key that is a path, whether a file or the command gave its value."""

from __future__ import annotations

import os
import re

from omegaconf import DictConfig, OmegaConf

# Keys that are paths but whose names do not say so; see `is_path` for the others.
PATH_KEYS = ("task.run", "task.out", "task.input", "task.against", "task.llm", "task.vision", "data.without", "data.images", "data.annotations",
             "trainer.deepspeed", "trainer.fsdp_config", "trainer.accelerator_config")  # fmt: skip
_PATH_NAME = re.compile(r"(^|_)(path|root|dir|folder|file)$")
_COLUMNS = "data.columns"  # names of a table's columns
_SOURCE = re.compile(r"^data\.sources\.[^.]+\.")  # a source of a mix has the keys of a data set


def is_path(key: str) -> bool:
    """Whether a full key (`data.path`) holds a path, or a list of them."""
    key = re.sub(r"^evaluation\.keep\.\w+\.", "", key)
    key = _SOURCE.sub("data.", key)
    return key in PATH_KEYS or bool(_PATH_NAME.search(key.rpartition(".")[2])) and not key.startswith(_COLUMNS)


def expand_home(cfg: DictConfig) -> None:
    """Expand `~` and `~user` in a composed config, in place."""
    _expand(cfg, "")


def _expand(node: DictConfig, where: str) -> None:
    for key in list(node):
        name = f"{where}.{key}" if where else str(key)
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            _expand(value, name)
        elif not is_path(name):
            continue
        elif isinstance(value, str) and value.startswith("~"):
            node[key] = os.path.expanduser(value)
        elif OmegaConf.is_list(value):
            for i in range(len(value)):
                if not OmegaConf.is_interpolation(value, i) and isinstance(value[i], str) and value[i].startswith("~"):
                    value[i] = os.path.expanduser(value[i])
