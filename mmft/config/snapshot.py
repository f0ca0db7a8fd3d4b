"""Write the resolved config of a run as yaml that composes again."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from .plain import from_plain, resolved


def snapshot(cfg: DictConfig) -> str:
    """The resolved config as yaml: `mmft --config-dir RUN --config-name snapshot` composes it."""
    # run_dir is null: this run's directory is taken, and the next run needs its own
    body = OmegaConf.to_yaml(from_plain({**resolved(cfg), "run_dir": None}), sort_keys=False)
    return "# What this run resolved to; run it again with: mmft --config-dir THIS_FOLDER --config-name snapshot\n" + body
