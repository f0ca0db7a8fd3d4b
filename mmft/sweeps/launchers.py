"""Choose a launcher for the points of a sweep; let Hydra's launcher plugins carry them to other processes and machines."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ..common.errors import UserError
from ..common.private_api import hydra_callbacks
from ..config import compose, sweep_overrides
from ..config.build import build
from ..config.command import Command
from ..config.plain import to_plain
from . import gpu_placement
from .directory import PointResult
from .points import Launcher, PointJob, run_point
from .run import run_here, run_sweep
from .search import run_search

# The extra that brings a plugin, by the package of the plugin's class.
EXTRAS = {"hydra_joblib_launcher": "sweep", "hydra_submitit_launcher": "slurm", "hydra_ray_launcher": "ray"}
ALLOWED = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")  # Hydra's keys that a sweep may set


def launch_sweep(command: Command) -> list[str]:
    """Run `mmft -m ...`; returns one line for each failed point. Raises UserError before anything is written."""
    OmegaConf.register_new_resolver("mmft_workers", gpu_placement.workers, replace=True)
    keys = {word: word.lstrip("+~").split("=", 1)[0] for word in command.overrides}
    for word, key in keys.items():
        if key.startswith(("hydra.", "hydra/")) and not key.startswith(ALLOWED):
            raise UserError(f"{word}: not for sweeps; their directory is output_dir/sweeps/NAME, and name=WORD names it")
    words = sweep_overrides.first_values(command.overrides)
    if not any(key == "hydra/launcher" for key in keys.values()):
        words = ["hydra/launcher=joint", *words]
    cfg = compose.compose_hydra(words, command.config_dir, command.config_name)
    choices = cfg.hydra.runtime.choices
    name = choices["hydra/launcher"]
    launch: Launcher = build(cfg.hydra.launcher, "hydra.launcher") if name == "joint" else run_here if name == "basic" else HydraLauncher(cfg)
    # where and in which order points run does not change what they are
    plain = dataclasses.replace(command, overrides=[word for word, key in keys.items() if not key.startswith("hydra")])
    if choices["hydra/sweeper"] == "basic":
        return run_sweep(plain, launch)
    return run_search(plain, cfg.hydra.sweeper, launch)


class HydraLauncher:
    """A launcher that passes points to the Hydra launcher plugin which the config chose."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    def __call__(self, jobs: list[PointJob]) -> list[PointResult]:
        """What run_point returned for each job. Raises UserError if the plugin is not installed, or refuses the jobs."""
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        if not jobs:
            return []
        cfg = self.cfg.copy()
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = jobs[0].sweep_dir, "."
            cfg.hydra.launcher = to_plain(cfg.hydra.launcher)
            for key in [k for k in cfg if k != "hydra"]:
                del cfg[key]
            cfg.points = [[job.config, job.words] for job in jobs]
        try:
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(config_loader=PointLoader(), callbacks=hydra_callbacks()), task_function=run_job, config=cfg
            )
        except RuntimeError as error:
            missing = re.search(r"Unknown plugin class : 'hydra_plugins\.(\w+)", str(error))
            if missing and missing[1] in EXTRAS:
                raise UserError(f"this launcher is not installed: pip install mmft[{EXTRAS[missing[1]]}]") from None
            raise
        gpu_placement.pass_to_children()
        try:
            returned = launcher.launch([[f"point={n}"] for n in range(len(jobs))], initial_job_idx=0)
        except RuntimeError as error:
            if type(error).__module__ != "submitit.core.utils":  # what sbatch refuses, and jobs that ended without a word
                raise
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"hydra/launcher={cfg.hydra.runtime.choices['hydra/launcher']}: {said}; hydra.launcher.KEY=... sets what a job asks for"
                " (gpus_per_node=null: no GPU); what finished stays finished, and the same command goes on"
            ) from None
        return [r.return_value for r in returned]


class PointLoader:
    """Hydra's config loader for launchers. Every point was composed at the start, so it only selects one."""

    def load_sweep_config(self, master: Any, overrides: list[str]) -> Any:
        cfg = master.copy()
        with read_write(cfg), open_dict(cfg):
            cfg.point = int(overrides[0].split("=")[1])
            cfg.points = [p if n == cfg.point else None for n, p in enumerate(master.points)]
            cfg.hydra.overrides.task = list(overrides)
        return cfg


def run_job(cfg: DictConfig) -> PointResult:
    """One point in the process that the launcher started; a module-level function, so that launchers can pass it by name."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    gpu_placement.claim_gpu(str(hydra.runtime.choices["hydra/launcher"]))
    config, words = cfg.points[cfg.point]
    return run_point(PointJob(config, list(words), str(hydra.sweep.dir)))
