"""The words of a sweep: its points, and the checked config of each."""

from __future__ import annotations

import copy
import itertools
import re

from omegaconf import DictConfig

from ..common.errors import UserError
from . import compose
from .guard.secrets import check_words
from .library_keys import GROUPS, group_options, top_level
from .overrides import check_known, normalise
from .validate import check, one_line


def expand(overrides: list[str], config_dir: str | None = None) -> tuple[list[list[str]], list[str]]:
    """(the words of every point of a sweep, the last key changing fastest; the swept keys). Errors raised: UserError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    choices, keys = [], []
    for word in overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except Exception:  # an unreadable word is answered by compose
            choices.append([word])
            continue
        if not parsed.is_sweep_override():
            choices.append([word])
            continue
        key, value = word.split("=", 1)[0], parsed.value()
        try:
            values = value.filter(group_options(config_dir).get(key.lstrip("+"), [])) if isinstance(value, Glob) else list(parsed.sweep_string_iterator())
        except Exception:
            raise UserError(f"{word}: an interval is for a search to draw from: add hydra/sweeper=optuna, or name values as {key}=1,2,3") from None
        if not values:
            raise UserError(f"{word}: matches no option of {key}")
        keys.append(key.lstrip("+"))
        choices.append([f"{key}={v}" for v in values])
    return [list(point) for point in itertools.product(*choices)], keys


def first_values(overrides: list[str]) -> list[str]:
    """Each swept word at its first value, the others as they are; a glob is left out, `expand` says what it matches."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    words = []
    for word in overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
            if isinstance(parsed.value(), Glob):
                continue
            value = parsed.value().start if parsed.is_interval_sweep() else next(parsed.sweep_string_iterator())
        except Exception:  # no sweep, or unreadable, which compose answers
            words.append(word)
        else:
            words.append(f"{word.split('=', 1)[0]}={value}")
    return words


def check_sweep(overrides: list[str], config_dir: str | None, config_name: str) -> list[str]:
    """Compose and check every value of a sweep once, the other swept keys at their first value; returns the swept keys.

    Errors raised: UserError.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = []
    for word in overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
            choices.append(list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [])
        except Exception:  # an unreadable word is answered by compose; an interval has no list of values
            choices.append([])
    first = [f"{w.split('=', 1)[0]}={c[0]}" if c else w for w, c in zip(overrides, choices, strict=True)]
    others = [[*first[:i], f"{overrides[i].split('=', 1)[0]}={value}", *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]]
    compose_each([first, *others], config_dir, config_name)
    return [w.split("=", 1)[0] for w, c in zip(overrides, choices, strict=True) if c]


def compose_each(points: list[list[str]], config_dir: str | None = None, config_name: str = "config") -> list[DictConfig]:
    """`compose` of every point of a sweep, in a small part of the time. Errors raised: UserError.

    Hydra lays values over a config when it is whole: points that choose the same options are composed once, and their values laid
    over copies of it.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = list(dict.fromkeys(itertools.chain(*points)))
    check_words(words)
    check_known(normalise(words), config_dir)
    plain = set(top_level()) - set(GROUPS)
    values = {word: OverridesParser.create().parse_override(word) for word in normalise(words) if _is_value(word, plain)}
    wholes: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for point in points:
        typed = normalise(point)
        own, choices = [values[w] for w in typed if w in values], tuple(w for w in typed if w not in values)
        if not all(map(_is_choice, choices)):  # one takes a key away, say: Hydra knows in what order
            own, choices = [], tuple(typed)
        if choices not in wholes:
            wholes[choices] = compose.compose_unchecked(list(choices), config_dir, config_name)
        cfg = copy.deepcopy(wholes[choices])
        try:
            ConfigLoaderImpl._apply_overrides_to_config(own, cfg)  # it has no public form
        except Exception as error:
            raise UserError(one_line(error)) from None
        check(cfg)
        configs.append(cfg)
    return configs


def _is_value(word: str, plain: set[str]) -> bool:
    """Whether a word sets a value and chooses no group's option: `lora.r=4`, `seed=1`."""
    key = word.lstrip("+").split("=", 1)[0]
    return key in plain or bool(re.fullmatch(r"(?!hydra\.)\w+(\.\w+)+", key))


def _is_choice(word: str) -> bool:
    """Whether a word chooses an option of a group, or is Hydra's own: `lora=none`, `hydra/launcher=joint`."""
    key = word.lstrip("+").split("=", 1)[0]
    return key in GROUPS or key.startswith(("hydra/", "hydra."))
