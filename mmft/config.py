"""From a command's words to one checked config, and from a config to objects; beside __main__ alone in importing Hydra."""

from __future__ import annotations

import copy
import itertools
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
    "CONFIG_DIR", "GROUPS", "arguments", "build", "check", "check_sweep", "compose", "compose_each", "compose_hydra", "expand",
    "first_values", "group_options", "nearest", "normalise",
    "own_keys", "resolve", "snapshot", "to_plain",
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
    cfg = _compose(overrides, config_dir, config_name)
    check(cfg)
    return cfg


def compose_hydra(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The same with Hydra's own settings in it, as the node `hydra`; not checked. Errors raised: UserError."""
    return _compose(overrides, config_dir, config_name, whole=True)


def compose_each(points: list[list[str]], config_dir: str | None = None, config_name: str = "config") -> list[DictConfig]:
    """`compose` of every point of a sweep, in a small part of the time. Errors raised: UserError.

    Hydra lays values over a config when it is whole: points that choose the same options are composed once, and their values laid
    over copies of it.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _check_words(normalise(list(dict.fromkeys(itertools.chain(*points)))), group_options(config_dir))
    plain = set(_top_level()) - set(GROUPS)
    wholes: dict[tuple[str, ...], DictConfig] = {}
    parsed: dict[str, Any] = {}
    configs = []
    for words in points:
        check_words(words)
        # a word that takes a key away, or that is Hydra's own, is left to Hydra with all the others
        values = [] if any(w.startswith("~") for w in words) else [w for w in normalise(words) if _is_value(w, plain)]
        choices = tuple(w for w in normalise(words) if w not in values)
        if choices not in wholes:
            wholes[choices] = _compose(list(choices), config_dir, config_name)
        cfg = copy.deepcopy(wholes[choices])
        parsed |= {w: OverridesParser.create().parse_override(w) for w in values if w not in parsed}
        try:
            ConfigLoaderImpl._apply_overrides_to_config([parsed[w] for w in values], cfg)
        except Exception as error:
            raise UserError(one_line(error)) from None
        check(cfg)
        configs.append(cfg)
    return configs


def _is_value(word: str, plain: set[str]) -> bool:
    """Whether a word sets a value and chooses no group's option: `lora.r=4`, `seed=1`."""
    key = word.lstrip("+").split("=", 1)[0]
    return key in plain or bool(re.fullmatch(r"(?!hydra\.)\w+(\.\w+)+", key))


def _top_level() -> list[str]:
    return [str(k) for k in OmegaConf.load(CONFIG_DIR / "config.yaml") if k != "defaults"]


def _compose(overrides: list[str], config_dir: str | None, config_name: str, whole: bool = False) -> DictConfig:
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
    _check_words(overrides, group_options(config_dir))
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


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """group -> the names of its yaml files, the shipped ones and those below `config_dir`."""
    roots = [CONFIG_DIR] + ([Path(config_dir)] if config_dir else [])
    return {
        group: sorted({f.relative_to(r / group).with_suffix("").as_posix() for r in roots for f in (r / group).rglob("*.yaml")})
        for group in GROUPS
    }


def _check_words(overrides: list[str], options: dict[str, list[str]]) -> None:
    """Answer a wrong group, option or top-level key before Hydra does: its own answers run over many lines."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    known = _top_level() + list(GROUPS)
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
