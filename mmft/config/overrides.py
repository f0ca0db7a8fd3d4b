"""The words of a command as Hydra overrides: quoting, `++`, and answers to wrong keys."""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from ..common.errors import UserError, nearest
from .library_keys import CONFIG_DIR, GROUPS, group_options, top_level


def own_keys(verb: str) -> list[str]:
    """The keys of conf/task/VERB.yaml."""
    return [str(k) for k in OmegaConf.load(CONFIG_DIR / "task" / f"{verb}.yaml") if k != "_target_"]


def as_text(word: str) -> str:
    """KEY=VALUE with the value quoted for Hydra where its grammar has no place for it or would read it as something else.

    That is a value with spaces in it or with characters that Hydra does not know; lists, quoted values and plain words stay.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString

    key, _, value = word.partition("=")
    if not value or value[0] in "[{\"'":
        return word
    try:
        OverridesParser.create().parse_override(word)
        if not re.search(r"\s", value):
            return word
    except Exception:  # its lexer and its parser raise several kinds; quoted, every text can be read
        pass
    # a question may hold ${...}: that is no interpolation
    return f"{key}=" + QuotedString(value.replace("${", "\\${"), Quote.double).with_quotes()


def normalise(overrides: list[str]) -> list[str]:
    """Let any key a library knows be set without Hydra's `++`, whether or not a yaml file lists it.

    `trainer.adam_beta2=0.95` becomes `++trainer.adam_beta2=0.95`; what is not a known key is found by `check`.
    """
    sections = {g for g in GROUPS if g != "experiment"} | {"generation", "evaluation", "augment"}
    open_ended = ("hydra.sweeper.", "hydra.launcher.ray.", "hydra.launcher.additional_parameters.")
    return [
        f"++{o}" if re.match(r"[A-Za-z_]+\.[^=]*=", o) and (o.split(".", 1)[0] in sections or o.startswith(open_ended)) else o
        for o in overrides
    ]


def check_known(overrides: list[str], config_dir: str | None) -> None:
    """Answer a wrong group, option or top-level key before Hydra does, whose own answers run over many lines. Errors raised: UserError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    options = group_options(config_dir)
    known = top_level() + list(GROUPS)
    verb = next((w.split("=", 1)[1] for w in overrides if w.startswith("task=")), "train")
    known += own_keys(verb) if verb in options["task"] else []
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except Exception:
            raise UserError(
                f"{word.lstrip('+')!r} cannot be read as key=value; quote it if the value holds spaces or commas: 'key=\"a, b\"'"
            ) from None
        if override.is_sweep_override():
            raise UserError(f"{word.lstrip('+')} holds several values: add -m to run each of them, or write a list as [a,b]")
        key = override.key_or_group
        if key.startswith("hydra") or override.is_delete():
            continue
        head = key.split(".")[0].split("/")[0].split("@")[0]
        if head not in known:
            if word.lstrip("+").startswith(f"{head}.") or not override.is_add():
                raise UserError(f"{key}: no such key.{nearest(head, known)} `mmft --help` lists the groups and keys.")
        elif key in options:
            values = override.value()
            for value in values if isinstance(values, list) else [values]:
                if value is not None and str(value) not in options[key]:
                    raise UserError(
                        f"{key}={value}: no such {key}.{nearest(str(value), options[key])} There are: {', '.join(options[key])}."
                    )
