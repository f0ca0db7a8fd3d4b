"""Where the points of a sweep run: Hydra's launcher plugins carry them to other processes and machines."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mmft.config.plain import to_plain

from ..common.errors import UserError
from ..config import compose, sweep_overrides
from ..config.build import build
from ..config.command import Command
from . import gpu_placement

# The extra that brings a plugin, by the package of the plugin's class.
EXTRAS = {"hydra_joblib_launcher": "sweep", "hydra_submitit_launcher": "slurm", "hydra_ray_launcher": "ray"}
OURS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")


def sweep(command: Command) -> list[str]:
    """Run `mmft -m ...`; one line for each failed point. Errors raised: UserError, before anything is written."""
    from omegaconf import OmegaConf

    from . import run as sweeping
    from . import search

    OmegaConf.register_new_resolver("mmft_workers", gpu_placement.workers, replace=True)
    heads = {word: word.lstrip("+~").split("=", 1)[0] for word in command.overrides}
    for word, head in heads.items():
        if head.startswith(("hydra.", "hydra/")) and not head.startswith(OURS):
            raise UserError(f"{word}: not for sweeps; their directory is output_dir/sweeps/NAME, and name=WORD names it")
    words = sweep_overrides.first_values(command.overrides)
    if not any(head == "hydra/launcher" for head in heads.values()):
        words = ["hydra/launcher=joint", *words]
    cfg = compose.compose_hydra(words, command.config_dir, command.config_name)
    choices = cfg.hydra.runtime.choices
    chosen = choices["hydra/launcher"]
    launch = build(cfg.hydra.launcher, "hydra.launcher") if chosen == "joint" else sweeping.here if chosen == "basic" else Carried(cfg)
    # where and in which order points run says nothing about what they are
    bare = dataclasses.replace(command, overrides=[word for word, head in heads.items() if not head.startswith("hydra")])
    if choices["hydra/sweeper"] == "basic":
        return sweeping.sweep(bare, launch)
    return search.search(bare, cfg.hydra.sweeper, launch)


class Carried:
    """A launcher for sweeping.sweep: points, as run_point takes them, go through the Hydra launcher that a config chose."""

    def __init__(self, cfg: Any):
        self.cfg = cfg

    def __call__(self, points: list[tuple[str, list[str], str]]) -> list[dict[str, Any]]:
        """What run_point returned for each point. Errors raised: UserError for a plugin that is not installed, for jobs that are refused."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext
        from omegaconf import open_dict, read_write

        if not points:
            return []
        cfg = self.cfg.copy()
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = points[0][2], "."
            cfg.hydra.launcher = to_plain(cfg.hydra.launcher)
            for key in [k for k in cfg if k != "hydra"]:
                del cfg[key]
            cfg.points = [list(point[:2]) for point in points]
        try:
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(config_loader=Chosen(), callbacks=Callbacks()), task_function=job, config=cfg
            )
        except RuntimeError as error:
            missing = re.search(r"Unknown plugin class : 'hydra_plugins\.(\w+)", str(error))
            if missing and missing[1] in EXTRAS:
                raise UserError(f"this launcher is not installed: pip install mmft[{EXTRAS[missing[1]]}]") from None
            raise
        gpu_placement.hand_down()
        try:
            returned = launcher.launch([[f"point={n}"] for n in range(len(points))], initial_job_idx=0)
        except RuntimeError as error:
            if type(error).__module__ != "submitit.core.utils":  # what sbatch refuses, and jobs that ended without a word
                raise
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"hydra/launcher={cfg.hydra.runtime.choices['hydra/launcher']}: {said}; hydra.launcher.KEY=... sets what a job asks for"
                " (gpus_per_node=null: no GPU); what finished stays finished, and the same command goes on"
            ) from None
        return [r.return_value for r in returned]


class Chosen:
    """What a launcher asks for a job's config: every point was composed at the start, so it only picks one."""

    def load_sweep_config(self, master: Any, overrides: list[str]) -> Any:
        from omegaconf import open_dict, read_write

        cfg = master.copy()
        with read_write(cfg), open_dict(cfg):
            cfg.point = int(overrides[0].split("=")[1])
            cfg.points = [p if n == cfg.point else None for n, p in enumerate(master.points)]
            cfg.hydra.overrides.task = list(overrides)
        return cfg


def job(cfg: Any) -> dict[str, Any]:
    """One point in the process the launcher made; at module level, so that every launcher can name it to another process."""
    from hydra.core.hydra_config import HydraConfig

    from .directory import run_point

    chosen = HydraConfig.get()
    gpu_placement.place(str(chosen.runtime.choices["hydra/launcher"]))
    text, words = cfg.points[cfg.point]
    return run_point(text, list(words), str(chosen.sweep.dir))
