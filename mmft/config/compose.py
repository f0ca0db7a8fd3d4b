"""Compose the config of a command, and check it."""

from __future__ import annotations

import copy
import os
import warnings
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, open_dict

from ..common.errors import UserError
from . import keep, ranking
from .groups import CONFIG_DIR, default_metrics_section, shipped_files
from .guard import environment, moved_targets
from .guard.hydra_section import check_composed, check_files
from .guard.secrets import check_words
from .overrides import check_known, chooses_option, hydra_words, set_values, sets_value
from .paths import expand_home
from .plain import one_line
from .validate import check
from .words import parse, quote, split


def compose(words: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The composed and checked config of a command. Raises UserError, one line."""
    cfg = compose_unchecked(words, config_dir, config_name)
    finish(cfg)
    return cfg


def compose_hydra(words: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The same with Hydra's settings as the node `hydra`, without the check of keys and values. Raises UserError."""
    return compose_unchecked(words, config_dir, config_name, with_hydra=True)


def finish(cfg: DictConfig) -> None:
    """Update moved class names, expand `~`, check every key and value. Raises UserError."""
    moved_targets.update(cfg)
    ranking.settle(cfg)
    if "metrics" not in cfg:  # the snapshot of a run from before this group existed
        with open_dict(cfg):
            cfg.metrics = default_metrics_section()
    expand_home(cfg)
    check(cfg)


def compose_unchecked(words: list[str], config_dir: str | None, config_name: str, with_hydra: bool = False) -> DictConfig:
    """The config with all values set, not yet checked. with_hydra: keep the node `hydra`. Raises UserError."""
    words = ranking.renamed(words, config_dir)
    check_words(words)
    check_known(words, config_dir)
    options, values = split_words(words)
    cfg = compose_options(options, config_dir, config_name, with_hydra)
    if isinstance(cfg.get("objective"), str) and (chosen := next((w for w in words if w.startswith("objective=")), None)):
        raise UserError(f"{chosen}: a yaml file says objective: {cfg.objective}, the former name of the key that ranks runs; write rank_by: {cfg.objective} there")
    set_all(cfg, values, config_dir)
    return cfg


def set_all(cfg: DictConfig, values: list[str], config_dir: str | None) -> None:
    """Set the values of words in a composed config, those that make the sections of evaluation.keep first. Raises UserError."""
    names = [word for word in values if split(word).key in keep.KEYS]
    set_values(cfg, names)
    keep.expand(cfg, lambda words: compose_options(words, config_dir, "config"), config_dir)
    set_values(cfg, [word for word in values if word not in names])


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(words for Hydra, words that set values). With a word such as `~lora.r` all are Hydra's, which knows their order."""
    values = [word for word in words if sets_value(word)]
    options = [word for word in words if word not in values]
    return (options, values) if all(map(chooses_option, options)) else (words, [])


def compose_options(options: list[str], config_dir: str | None, config_name: str, with_hydra: bool = False) -> DictConfig:
    """The config that Hydra composes from the chosen options, before values are set. Raises UserError.

    Options of the shipped files, which a process that runs several commands chooses again and again, are composed once and copied: 25 to 40 ms for a further command instead of 134.
    """
    environment.install()
    main_dir, options = search_path(options, config_dir, config_name)
    if config_dir is not None or any(split(word).key.startswith("hydra.") for word in options):  # Hydra's own keys may name other folders
        return _by_hydra(options, main_dir, config_dir, config_name, with_hydra)
    place = os.getcwd() if with_hydra else ""  # Hydra's section holds it
    return copy.deepcopy(_shipped(tuple(options), main_dir, config_name, with_hydra, shipped_files(), place))


@lru_cache(maxsize=32)
def _shipped(options: tuple[str, ...], main_dir: str, config_name: str, with_hydra: bool, files: frozenset[tuple[str, int, int]], place: str) -> DictConfig:
    """`_by_hydra` for options of the shipped files. files: their names, times and sizes, so that an edited file is read again. place: the working directory."""
    return _by_hydra(list(options), main_dir, None, config_name, with_hydra)


def _by_hydra(options: list[str], main_dir: str, config_dir: str | None, config_name: str, with_hydra: bool) -> DictConfig:
    """The config that Hydra composes. main_dir: of the primary config. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(main_dir, job_name="mmft", version_base="1.3"), warnings.catch_warnings():
            # a launcher's preset must have its plugin's name, and the plugin's check of its keys is welcome
            warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema")
            if config_dir is not None:  # a user's file precedes a shipped one of the same name; Hydra would put it last
                GlobalHydra.instance().config_loader().get_search_path().prepend("user", f"file://{Path(config_dir).expanduser().resolve().as_posix()}")
            cfg = hydra_compose(config_name=config_name, overrides=_replacing(hydra_words(options), config_name), return_hydra_config=True)
        moved_targets.update(cfg.hydra)
        check_composed(cfg.hydra)
        if not with_hydra:
            with open_dict(cfg):
                del cfg["hydra"]
        return cfg
    except UserError:
        raise
    except Exception as error:  # Hydra raises a dozen types; each has its reason in the first line
        raise UserError(one_line(error)) from None


def _replacing(words: list[str], config_name: str) -> list[str]:
    """Words of Hydra, without the `+` before a source of a mix that a yaml file's defaults list chooses already: such a word replaces it."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    added = [word for word in words if word.startswith("+data@")]
    if not added:
        return words
    others = [word for word in words if word not in added]
    chosen = {entry.package for entry in GlobalHydra.instance().config_loader().compute_defaults_list(config_name, others, RunMode.RUN).defaults}
    return [word.lstrip("+") if word in added and split(word).key.removeprefix("data@") in chosen else word for word in words]


def search_path(words: list[str], config_dir: str | None, config_name: str) -> tuple[str, list[str]]:
    """(Hydra's main folder, the words with `hydra.searchpath` for the other folder). Raises UserError.

    The main folder is the one with the primary config, since Hydra looks for that file before it reads the search path.
    """
    if config_dir is None:
        return str(CONFIG_DIR), words
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such directory; name the folder that holds your groups (model/, data/, ...)")
    check_files(Path(config_dir).expanduser())
    main, other = (folder, CONFIG_DIR) if (folder / f"{config_name}.yaml").is_file() else (CONFIG_DIR, folder)
    typed = [word for word in words if word.startswith("hydra.searchpath=")]
    paths = [f"file://{other.as_posix()}", *(path for word in typed for path in parse(word).value())]
    return str(main), [*(word for word in words if word not in typed), f"hydra.searchpath=[{','.join(map(quote, paths))}]"]
