"""Check the words of a command, and set the values they give in a composed config."""

from __future__ import annotations

import re

from omegaconf import DictConfig, OmegaConf

from ..common.errors import UserError, nearest
from .groups import GROUPS, group_options, top_level, verb_keys
from .key_lookup import annotation
from .plain import one_line
from .words import parse, read, readable, split

# Sections whose keys may be set although no yaml file lists them; the check of the config refuses unknown ones.
OPEN_SECTIONS = {*GROUPS, "generation", "evaluation", "augment"} - {"experiment"}
SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # of a source of a mix: what Hydra reads as part of a key
_OPEN_HYDRA = ("hydra.sweeper.", "hydra.launcher.ray.", "hydra.launcher.additional_parameters.")


def source_choice(word: str) -> tuple[str, str] | None:
    """(source, option) of a word that chooses the data set of a source of a mix: `data.sources.chat=messages`."""
    sign, key, value = split(word)
    name = re.fullmatch(r"data\.sources\.([^./@:\s]+)", key)
    return (name[1], value) if name and value and value[0] not in "{[" and value != "null" and sign in ("", "+") else None


def sets_value(word: str) -> bool:
    """Whether a word sets a key's value (`lora.r=4`, `seed=1`) and neither chooses a group's option nor concerns Hydra."""
    sign, key, value = split(word)
    if source_choice(word) or value is None or sign not in ("", "++") or key.startswith("hydra"):
        return False
    return "." in key and not re.search(r"[/@:\s]", key) or key not in GROUPS and key in top_level()


def chooses_option(word: str) -> bool:
    """Whether a word chooses a group's option or concerns Hydra: `lora=none`, `data.sources.chat=messages`, `hydra/launcher=joint`."""
    sign, key, value = split(word)
    return value is not None and sign != "~" and (key in GROUPS or key.startswith(("hydra/", "hydra.")) or source_choice(word) is not None)


def check_source_name(name: str) -> None:
    """Raises UserError unless `name` can name a source of a mix."""
    if not SOURCE_NAME.fullmatch(name):
        raise UserError(f"data.sources: {name!r} cannot name a source: use letters, digits, - and _")


def check_known(words: list[str], config_dir: str | None = None) -> None:
    """Refuse words that cannot be parsed and unknown groups, options and top-level keys. Raises UserError, one line each."""
    options = group_options(config_dir)
    known = top_level() + list(GROUPS)
    verb = next((split(word).value for word in words if word.startswith("task=")), "train")
    known += verb_keys(str(verb)) if verb in options["task"] else []
    sources: set[str] = set()
    for word in words:
        sign, key, value = split(word)
        if value is None and sign != "~":
            parse(word)  # raises
        if sign == "~" and (key.partition("@")[0] in known and key != "experiment" or re.fullmatch(r"evaluation\.\w+", key)):
            raise UserError(f"{word}: no config is without {key}; {f'choose another of its options, {key}=OPTION' if key in GROUPS else f'set it to another value, {key}=VALUE'}")
        if key.startswith("hydra") or sign == "~":
            continue
        head = re.split(r"[./@]", key)[0]
        if head not in known:
            if key.startswith(f"{head}.") or sign != "+":
                raise UserError(f"{key}: no such key.{nearest(head, known)} `mmft --help` lists the groups and keys.")
            continue
        if key.startswith("data.sources."):
            check_source_name(key.removeprefix("data.sources.").partition(".")[0])
        if "/" in key and key.partition("@")[0] not in options:
            raise UserError(f"{key}: no such group.{nearest(key, options)} `mmft --help` lists the groups and keys.")
        elif key in options or source_choice(word):
            override = parse(word)
            if override.is_sweep_override():
                raise _several_values(word)
            names, group = override.value(), key if key in options else "data"
            for name in names if isinstance(names, list) else [names]:
                if name is not None and str(name) not in options[group]:
                    raise UserError(f"{key}={name}: no such {group}.{nearest(str(name), options[group])} There are: {', '.join(options[group])}.")
            if key not in options and key in sources:
                raise UserError(f"{key}={names}: two sources have this name; give each source a name of its own")
            sources.add(key)


def hydra_words(words: list[str], cfg: DictConfig | None = None, several: bool = False) -> list[str]:
    """Words as Hydra parses them: text in quotes, `++` before keys that no yaml file need list, sources of a mix as options of the group data.

    cfg: a composed config, which gives the types of the keys. several: whether commas separate the values of a sweep. Raises UserError.
    """
    parsable = []
    for word in words:
        sign, key, value = split(word)
        if value is not None:
            word = f"{sign}{key}={readable(word, annotation(cfg, key) if cfg is not None else '', several)}"
        if source_choice(word):
            parsable.append(f"+data@{word.lstrip('+')}")
            continue
        is_open = key.split(".")[0] in OPEN_SECTIONS and "." in key or key.startswith(_OPEN_HYDRA)
        parsable.append(f"++{word}" if is_open and not sign and value is not None else word)
    return parsable


def set_values(cfg: DictConfig, words: list[str]) -> None:
    """Set the values of words for which `sets_value` holds, in place. Raises UserError."""
    for word in words:
        sign, key, _ = split(word)
        override = read(word, annotation(cfg, key))
        if override.is_sweep_override():
            raise _several_values(word)
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=sign == "++" or key.split(".")[0] in OPEN_SECTIONS)
        except Exception as error:  # OmegaConf raises several types; each has its reason in the first line
            raise UserError(f"{word}: {one_line(error)}") from None


def _several_values(word: str) -> UserError:
    return UserError(f"{word.lstrip('+')} holds several values: add -m to run each of them, or write a list as [a,b]")
