"""From a command's words to one checked config, and from a config to objects; beside __main__ and expanding.py alone in importing Hydra."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from .checking import arguments, check, check_keys, one_line, to_plain
from .errors import UserError, nearest
from .fields import CONFIG_DIR, GROUPS
from .hydra_section import check_composed, check_files
from .interpolation import guard
from .secrecy import check_words
from .targets import parameters, resolve

__all__ = [
    "CONFIG_DIR", "GROUPS", "arguments", "build", "check", "check_known", "compose", "compose_hydra", "compose_unchecked", "group_options", "nearest", "normalise",
    "own_keys", "resolve", "snapshot", "to_plain", "top_level",
]  # fmt: skip

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


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """group -> the names of its yaml files, the shipped ones and those below `config_dir`."""
    roots = [CONFIG_DIR] + ([Path(config_dir)] if config_dir else [])
    return {
        group: sorted({f.relative_to(r / group).with_suffix("").as_posix() for r in roots for f in (r / group).rglob("*.yaml")})
        for group in GROUPS
    }


def top_level() -> list[str]:
    """The keys of conf/config.yaml."""
    return [str(k) for k in OmegaConf.load(CONFIG_DIR / "config.yaml") if k != "defaults"]


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


def build(node: Any, **extra: Any) -> Any:
    """The object a config node describes: its `_target_` called with its other keys (nested nodes built first).

    `extra` are the live objects a config cannot hold (a processor, a run). Errors raised: UserError.
    """
    plain = to_plain(node)
    where = str(getattr(node, "_get_full_key", lambda _: "")(None)) or "config"
    return _build(plain, where, extra)


def _build(node: Any, where: str, extra: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(v, f"{where}[{i}]", {}) for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {k: _build(v, f"{where}.{k}", {}) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return values
    target = resolve(node["_target_"], where)
    known = parameters(target)
    check_keys(where, values, known)
    values = arguments(values, known)
    return target(**values, **{k: v for k, v in extra.items() if k in known})


def snapshot(cfg: DictConfig) -> str:
    """The resolved config as yaml that composes again: `mmft --config-dir RUN --config-name snapshot`."""
    # a directory of its own for every run: the one this run was given is taken
    body = OmegaConf.to_yaml(OmegaConf.create({**to_plain(cfg), "run_dir": None}), sort_keys=False)
    return "# What this run resolved to; run it again with: mmft --config-dir THIS_FOLDER --config-name snapshot\n" + body
