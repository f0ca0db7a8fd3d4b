"""Compose the config of a command with Hydra, and check it."""

from __future__ import annotations

import warnings
from pathlib import Path

from omegaconf import DictConfig, open_dict

from ..common.errors import UserError
from .guard.environment import guard
from .guard.hydra_section import check_composed, check_files
from .guard.secrets import check_words
from .library_keys import CONFIG_DIR
from .overrides import check_known, normalise
from .validate import check, one_line


def compose(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The composed and checked config of a command. Errors raised: UserError, one line."""
    cfg = compose_unchecked(overrides, config_dir, config_name)
    check(cfg)
    return cfg


def compose_hydra(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The same with Hydra's own settings in it, as the node `hydra`; not checked. Errors raised: UserError."""
    return compose_unchecked(overrides, config_dir, config_name, whole=True)


def compose_unchecked(overrides: list[str], config_dir: str | None, config_name: str, whole: bool = False) -> DictConfig:
    """As Hydra composes it, its keys and values as they are. whole: with Hydra's own settings. Errors raised: UserError."""
    from hydra import compose as hydra_compose
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    guard()
    check_words(overrides)
    overrides = normalise(overrides)
    search_path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir {config_dir}: no such directory; name the folder that holds your groups (model/, data/, ...)")
        check_files(Path(config_dir))
        search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve().as_posix()}")
    check_known(overrides, config_dir)
    GlobalHydra.instance().clear()
    try:
        # what hydra.initialize does, with two directories: its public form takes one
        Hydra.create_main_hydra2(task_name="mmft", config_search_path=search_path)
        with warnings.catch_warnings():
            # a launcher's preset is to bear its plugin's name, and is the better for the plugin's own check of its keys
            warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema")
            cfg = hydra_compose(config_name=config_name, overrides=overrides, return_hydra_config=True)
        check_composed(cfg.hydra)
        if not whole:
            with open_dict(cfg):
                del cfg["hydra"]
        return cfg
    except UserError:
        raise
    except Exception as error:  # Hydra raises a dozen kinds; each carries its reason in the first line
        raise UserError(one_line(error)) from None
    finally:
        GlobalHydra.instance().clear()
