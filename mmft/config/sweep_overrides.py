"""Expand the words of a sweep into points, and compose the config of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ..common.errors import UserError
from .build import build
from .compose import compose_options, finish, set_all, split_words
from .groups import group_options
from .guard.secrets import check_words
from .overrides import check_known
from .plain import to_plain
from .ranking import renamed
from .words import parse, split, sweep_values


def expand(words: list[str], config_dir: str | None = None) -> tuple[list[list[str]], list[str]]:
    """(the words of every point, the last swept key changing fastest; the swept keys). Raises UserError."""
    from hydra.core.override_parser.types import Glob

    choices, keys = [], []
    for word in words:
        override = parse_sweep(word)
        if override is None:
            choices.append([word])
            continue
        sign, key, _ = split(word)
        value = override.value()
        try:
            values = value.filter(group_options(config_dir).get(key, [])) if isinstance(value, Glob) else sweep_values(override)
        except Exception:
            raise UserError(f"{word}: an interval is for a search to draw from: add hydra/sweeper=optuna, or name values as {sign}{key}=1,2,3") from None
        if not values:
            raise UserError(f"{word}: matches no option of {sign}{key}")
        keys.append(key)
        choices.append([f"{sign}{key}={v}" for v in values])
    return [list(point) for point in itertools.product(*choices)], keys


def first_values(words: list[str]) -> list[str]:
    """Each swept word with its first value, the others as they are; a glob is left out."""
    from hydra.core.override_parser.types import Glob

    first = []
    for word in words:
        override = parse_sweep(word)
        if override is None:
            first.append(word)
        elif not isinstance(override.value(), Glob):
            value = override.value().start if override.is_interval_sweep() else sweep_values(override)[0]
            first.append(f"{word.split('=', 1)[0]}={value}")
    return first


def check_sweep(words: list[str], config_dir: str | None, config_name: str) -> tuple[list[str], DictConfig]:
    """Compose and check every value of a sweep once, the other swept keys at their first value. Raises UserError.

    Returns the swept keys and the config of the first values.
    """
    choices = [_all_values(word) for word in words]
    first = [f"{word.split('=', 1)[0]}={values[0]}" if values else word for word, values in zip(words, choices, strict=True)]
    others = [[*first[:i], f"{words[i].split('=', 1)[0]}={value}", *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]]
    configs = compose_each([first, *others], config_dir, config_name)
    return [word.split("=", 1)[0] for word, values in zip(words, choices, strict=True) if values], configs[0]


def compose_each(points: list[list[str]], config_dir: str | None = None, config_name: str = "config") -> list[DictConfig]:
    """`compose` of every point of a sweep, in a fraction of the time. Raises UserError.

    Points that choose the same options are composed by Hydra once, and their values are set in copies of that config.
    """
    points = [renamed(point, config_dir) for point in points]
    words = list(dict.fromkeys(itertools.chain(*points)))
    check_words(words)
    check_known(words, config_dir)
    composed: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for point in points:
        options, values = split_words(point)
        if tuple(options) not in composed:
            composed[tuple(options)] = compose_options(options, config_dir, config_name)
        cfg = copy.deepcopy(composed[tuple(options)])
        set_all(cfg, values, config_dir)
        finish(cfg)
        configs.append(cfg)
    _check_data(configs)
    return configs


def _check_data(configs: Sequence[DictConfig]) -> None:
    """Build every data set of the points: its class refuses values that no table of keys knows. Nothing is read. Raises UserError."""
    seen: list[Any] = []
    for cfg in configs:
        data = to_plain(cfg.get("data"))
        if data and data not in seen and (to_plain(cfg.get("task")) or {}).get("run") is None:
            seen.append(data)
            build(data, "data")


def parse_sweep(word: str) -> Any:
    """Hydra's Override of a word that gives several values; None for other words and for those that compose reports as unreadable."""
    try:
        override = parse(word, several=True)
    except UserError:
        return None
    return override if override.is_sweep_override() else None


def _all_values(word: str) -> list[str]:
    override = parse_sweep(word)
    try:
        return sweep_values(override) if override is not None else []
    except Exception:  # an interval or a glob has no list of values
        return []
