"""The resolved config of a run as yaml that composes again."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from .validate import to_plain


def snapshot(cfg: DictConfig) -> str:
    """The resolved config as yaml that composes again: `mmft --config-dir RUN --config-name snapshot`."""
    # a directory of its own for every run: the one this run was given is taken
    body = OmegaConf.to_yaml(OmegaConf.create({**to_plain(cfg), "run_dir": None}), sort_keys=False)
    return "# What this run resolved to; run it again with: mmft --config-dir THIS_FOLDER --config-name snapshot\n" + body
