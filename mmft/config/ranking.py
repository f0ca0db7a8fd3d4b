"""`rank_by`: the score that ranks the runs of a sweep. The key was called `objective` before the group of that name existed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, open_dict

from .groups import group_options
from .words import split

SUPERVISED = {"_target_": "mmft.losses.objectives.Sft"}  # the section that conf/objective/sft.yaml composes to


def renamed(words: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The words with `rank_by=cider` for `objective=cider`; what names an option of the group `objective`, or nearly does, stays."""
    options = group_options(config_dir)["objective"]
    result = []
    for word in words:
        sign, key, value = split(word)
        if key == "objective" and value and sign in ("", "+", "++"):
            names = re.findall(r"[^\s,()\[\]{}\"']+", value)
            if not (set(names) & {*options, "glob"} or any(difflib.get_close_matches(name, options) for name in names)):
                word = f"rank_by={value}"
        result.append(word)
    return result


def settle(cfg: DictConfig) -> None:
    """Give the config of a run from before this group, or of a preset that ranks by the former key, both keys, in place."""
    former = cfg.get("objective")
    with open_dict(cfg):
        if isinstance(former, str):
            cfg.rank_by, cfg.objective = former, SUPERVISED
        elif former is None:
            cfg.objective = SUPERVISED
        if cfg.get("rank_by") is None:
            cfg.rank_by = "eval_loss"


def ranking(cfg: Mapping[str, Any]) -> str:
    """The score that ranks the run of a config, or of a snapshot of any age."""
    former = cfg.get("objective")
    return str(cfg.get("rank_by") or (former if isinstance(former, str) else None) or "eval_loss")


def is_supervised(objective: Any) -> bool:
    """Whether a section `objective` (None, or the former text: of a run from before the group) is that of supervised fine-tuning."""
    return not isinstance(objective, Mapping) or str(objective.get("_target_")) == SUPERVISED["_target_"]
