"""From a command's words to one checked config, and from a config to objects; beside __main__ alone in importing Hydra."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from . import fields
from .errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "conf"
if not CONFIG_DIR.is_dir():  # installed from a wheel: conf/ is the package mmft.conf
    CONFIG_DIR = Path(__file__).resolve().parent / "conf"

GROUPS = ("task", "model", "collator", "data", "lora", "trainer", "logger", "experiment")
# Packages whose objects a `_target_` may name, beside mmft's own; set by the person at the keyboard, never by a file.
PACKAGES_VARIABLE = "MMFT_PACKAGES"


def nearest(word: str, known: Any) -> str:
    """` Did you mean X?` for the nearest of `known`, or an empty string."""
    match = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


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


# --- composing -------------------------------------------------------------------------------------------------


def normalise(overrides: list[str]) -> list[str]:
    """Let any key a library knows be set without Hydra's `++`, whether or not a yaml file lists it.

    `trainer.adam_beta2=0.95` becomes `++trainer.adam_beta2=0.95`; what is not a known key is found by `check`.
    """
    sections = {g for g in GROUPS if g != "experiment"} | {"generation", "evaluation"}
    return [f"++{o}" if re.match(r"[A-Za-z_]+\.[^=]*=", o) and o.split(".", 1)[0] in sections else o for o in overrides]


def compose(overrides: list[str], config_dir: str | None = None, config_name: str = "config") -> DictConfig:
    """The composed and checked config of a command. Errors raised: UserError, one line."""
    from hydra import compose as hydra_compose
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    overrides = normalise(overrides)
    search_path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir {config_dir}: no such directory; name the folder that holds your groups (model/, data/, ...)")
        search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve().as_posix()}")
    _check_words(overrides, group_options(config_dir))
    GlobalHydra.instance().clear()
    try:
        # what hydra.initialize does, with two directories: its public form takes one
        Hydra.create_main_hydra2(task_name="mmft", config_search_path=search_path)
        cfg = hydra_compose(config_name=config_name, overrides=overrides)
    except Exception as error:  # Hydra raises a dozen kinds; each carries its reason in the first line
        raise UserError(_one_line(error)) from None
    finally:
        GlobalHydra.instance().clear()
    check(cfg)
    return cfg


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
    compose(first, config_dir, config_name)
    for i, values in enumerate(choices):
        for value in values[1:]:
            compose([*first[:i], f"{overrides[i].split('=', 1)[0]}={value}", *first[i + 1 :]], config_dir, config_name)
    return [w.split("=", 1)[0] for w, c in zip(overrides, choices, strict=True) if c]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text += " (" + " ".join(str(cause).split()) + ")"
    return text


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

    top = list(OmegaConf.load(CONFIG_DIR / "config.yaml").keys())
    known = [k for k in top if k != "defaults"] + list(GROUPS)
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


# --- checking --------------------------------------------------------------------------------------------------


def check(cfg: DictConfig) -> None:
    """Every key and every simple value of a composed config, without importing torch. Errors raised: UserError."""
    plain = to_plain(cfg)
    # with run=..., words such as data.path=... are laid over the run's own config, and checked there
    laid_over = (plain.get("task") or {}).get("run") is not None
    _check_targets({"task": plain["task"]} if laid_over else plain)
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "config.yaml"))
    _check_keys("", plain, {k: "" for k in (*defaults, *GROUPS)})
    _check_keys("evaluation", plain["evaluation"], {k: "" for k in defaults["evaluation"]})
    for key, kind in (("seed", "int"), ("output_dir", "str"), ("name", "str | None"), ("run_dir", "str | None")):
        _check_value(key, plain.get(key), kind)
    for section, known in (
        ("trainer", fields.training_arguments()),
        ("lora", fields.lora_config()),
        ("generation", fields.generation_config()),
        ("model.quantization", fields.quantization_config()),
    ):
        node: Any = plain
        for part in section.split("."):
            node = (node or {}).get(part)
        if node and known:
            _check_keys(section, node, known)


def _check_keys(section: str, node: dict, known: dict[str, str]) -> None:
    for key, value in node.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in known:
            if section == "trainer" and key in fields.MANAGED_TRAINING_ARGUMENTS:
                raise UserError(f"{name}: mmft sets this itself (seed=..., output_dir=... and logger=... are at the top level)")
            hint = nearest(str(key), known)
            raise UserError(f"{name}: no such key.{hint.replace('mean ', f'mean {section}.') if section else hint}")
        _check_value(name, value, known[key])


_SIMPLE = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}


def _check_value(name: str, value: Any, annotation: str) -> None:
    """Refuse a value whose type the annotation (source text) excludes; annotations that are not simple are let through."""
    kinds = [k.strip() for k in annotation.replace("Optional[", "None | ").replace("]", "").split("|")]
    if not annotation or any(k not in _SIMPLE for k in kinds):
        return
    if isinstance(value, bool) and "bool" not in kinds or not any(isinstance(value, _SIMPLE[k]) for k in kinds):
        if isinstance(value, str) and "float" in kinds and _is_number(value):
            return  # yaml 1.1 reads 1e-4 as text; `arguments` turns it into the number
        raise UserError(f"{name}={value}: must be {' or '.join(k.replace('None', 'null') for k in kinds)}")


def _is_number(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), (int, float))
    except (ValueError, SyntaxError):
        return False


def _check_targets(node: Any, where: str = "") -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            target = resolve(node["_target_"], where)
            known = parameters(target)
            _check_keys(where, {k: v for k, v in node.items() if k != "_target_"}, known)
        for key, value in node.items():
            _check_targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check_targets(value, f"{where}[{i}]")


def parameters(target: Any) -> dict[str, str]:
    """name -> annotation (source text) of what a `_target_` takes from its config node."""
    names = {}
    for p in inspect.signature(target).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            names[p.name] = p.annotation if isinstance(p.annotation, str) else ""
    return names


# --- building --------------------------------------------------------------------------------------------------


def resolve(target: Any, where: str = "_target_") -> Any:
    """The class or function that a `_target_` names, if it is mmft's own or of a package in $MMFT_PACKAGES.

    The object's own `__module__` decides, not the text: `mmft.os.getcwd` reads like ours and is not.
    Errors raised: UserError.
    """
    allowed = {"mmft", *filter(None, re.split(r"[\s,:;]+", os.environ.get(PACKAGES_VARIABLE, "")))}
    refusal = UserError(
        f"{where}: _target_ {target} is refused: only objects of mmft may be built from a config"
        f" (add your own package's name to the environment variable {PACKAGES_VARIABLE})"
    )
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise refusal
    parts = target.split(".")
    if parts[0] not in allowed or any(p.startswith("__") for p in parts):
        raise refusal
    found: Any = None
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(parts[:i]).startswith(error.name):
                continue
            raise UserError(f"{where}: _target_ {target} needs the package {error.name}, which is not installed") from None
        break
    for name in parts[i:] if found is not None else ():
        if not hasattr(found, name):
            raise UserError(f"{where}: _target_ {target}: {found.__name__} has no {name}.{nearest(name, vars(found))}")
        found = getattr(found, name)
    if found is None:
        raise UserError(f"{where}: _target_ {target}: no such module")
    home = getattr(found, "__module__", None) or ""
    if home.split(".")[0] not in allowed or not callable(found):
        raise refusal
    return found


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
    _check_keys(where, values, known)
    values = arguments(values, known)
    return target(**values, **{k: v for k, v in extra.items() if k in known})


def arguments(values: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """Values with numbers that yaml read as text (`1e-4`) turned into numbers where the key wants one."""
    return {
        k: float(v) if isinstance(v, str) and "float" in known.get(k, "") and "str" not in known.get(k, "") and _is_number(v) else v
        for k, v in values.items()
    }


def to_plain(node: Any) -> Any:
    """A config node as plain dicts and lists, interpolations resolved. Errors raised: UserError naming the key."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except Exception as error:
        key = getattr(error, "full_key", None)
        if type(error).__name__ == "MissingMandatoryValue":
            key = str(key).removeprefix("task.")  # a verb's own keys are typed bare
            raise UserError(f"{key} must be given: add {key}=... to the command") from None
        raise UserError(f"{key}: {_one_line(error)}" if key else _one_line(error)) from None


# --- keeping ---------------------------------------------------------------------------------------------------


def snapshot(cfg: DictConfig) -> str:
    """The resolved config as yaml that composes again: `mmft --config-dir RUN --config-name snapshot`."""
    body = OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg)), sort_keys=False)
    return "# What this run resolved to; run it again with: mmft --config-dir THIS_FOLDER --config-name snapshot\n" + body
