"""JSON Schemas of the configuration, for editors: of a whole config (config.yaml, presets, snapshots), and of each group's files.

Nothing is listed here: keys, defaults and comments come from the yaml files, types from the classes they name and from the installed libraries.
A schema accepts what mmft accepts: where a type is not simple, any value is allowed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from . import key_table, library_keys
from .choices import ANSWERS, AUGMENT_TRANSFORMS, CHOICE_NORMS
from .comments import MODELINE, first_comment, keys_of
from .groups import CONFIG_DIR, GROUPS
from .guard.targets import parameters, resolve
from .key_lookup import TOP_LEVEL_TYPES
from .key_types import kinds

Schema = dict[str, Any]
DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft that yaml-language-server reads
GLOBAL = "# @package _global_"  # begins a file whose keys are those of a whole config
NAMES = (*(group for group in GROUPS if group != "experiment"), "hydra", "config")
LIVE = ("processor", "family", "model_config", "end_token_ids", "sweep_dir", "objective", "space")  # passed by mmft; no keys of a config
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"  # yaml 1.1 reads 1e-4 as text, which mmft takes for a number
_INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}  # ${seed}, and ??? for a key that must be given
_DEFAULTS: Schema = {"type": ["array", "object"], "description": "Hydra's defaults list: the files that this one is based on."}


def schema(name: str) -> Schema:
    """The schema of a group's files, or `config`: of a whole config."""
    group_schemas = _groups()
    if name == "config":
        body = _whole(group_schemas)
    elif name == "hydra":
        body = {"description": "Settings of Hydra, its sweepers and launchers, which Hydra checks itself.", "type": "object"}
    else:
        body = group_schemas[name]
    needed = {group: node for group, node in group_schemas.items() if f"#/definitions/{group}" in json.dumps(body) or name == "config"}
    return {"$schema": DRAFT, "title": f"mmft: {name}", **body, **({"definitions": needed} if needed else {})}


def write(folder: Path) -> list[Path]:
    """Write NAME.json for each schema. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json" for name in NAMES]
        for path in paths:
            path.write_text(json.dumps(schema(path.stem), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written: {error.strerror or error}") from None
    return paths


def name_of(file: Path, text: str) -> str:
    """The schema of a yaml file below a folder of groups."""
    return "config" if GLOBAL in text.split("\n\n")[0] or file.stem == "config" and file.parent == CONFIG_DIR else _group_of(file)


def modeline(file: Path, text: str, schemas: Path) -> str:
    """The comment that names a file's schema. schemas: the folder of the schemas."""
    return f"{MODELINE} $schema={Path(os.path.relpath(schemas / f'{name_of(file, text)}.json', file.parent)).as_posix()}"


def write_modelines(folder: Path, schemas: Path) -> list[Path]:
    """Put `modeline` below the first comment of every yaml file of a folder; the files that changed. Raises UserError."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UserError(f"headers={folder}: holds no yaml files")
    changed = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(MODELINE)]
        place = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        lines.insert(place, modeline(file, text, schemas))
        new = "\n".join(lines) + "\n"
        if new != text:
            file.write_text(new, encoding="utf-8", newline="\n")
            changed.append(file)
    return changed


def _group_of(file: Path) -> str:
    return next((part for part in reversed(file.parent.parts) if part in NAMES), "config")


def value_schema(annotation: str) -> Schema:
    """The schema of a value by its annotation as source text; {} for one that is not simple, as mmft checks it."""
    allowed = kinds(annotation)
    if not annotation or any(kind not in _TYPES for kind in allowed):
        return {}
    texts = [] if "str" in allowed else [_INTERPOLATION, *([{"type": "string", "pattern": _NUMBER}] if "float" in allowed else [])]
    return {"anyOf": [{"type": [_TYPES[kind] for kind in dict.fromkeys(allowed)]}, *texts]}


# --- groups ---------------------------------------------------------------------------------------------------------


def _files(group: str) -> list[tuple[Path, str]]:
    return [(file, file.read_text(encoding="utf-8")) for file in sorted((CONFIG_DIR / group).rglob("*.yaml"))]


def _targets(group: str) -> dict[str, dict[str, str]]:
    """class -> its keys with their annotations, of every class that a file of the group names."""
    found: dict[str, dict[str, str]] = {}
    listed = {key for _, text in _files(group) for key in yaml.safe_load(text) or {}}

    def look(node: Any) -> None:
        if isinstance(node, Mapping):
            target = node.get("_target_")
            if isinstance(target, str) and target not in found:
                try:
                    keys = parameters(resolve(target, group))
                    found[target] = {key: kind for key, kind in keys.items() if key not in LIVE or key in listed}
                except UserError:  # a package that is not installed
                    found[target] = {}
            for value in node.values():
                look(value)

    for _, text in _files(group):
        plain = yaml.safe_load(text) or {}
        look(plain.get(group) if GLOBAL in text else plain)
    return found


def _comments(group: str) -> dict[str, str]:
    """key -> what the files of a group say about it; that of the first file where they differ."""
    said: dict[str, str] = {}
    for _, text in _files(group):
        if GLOBAL not in text:
            for key in keys_of(text):
                said.setdefault(key.name, key.comment) if key.comment else None
    return said


def _described(name: str, body: Schema, comments: Mapping[str, str]) -> Schema:
    return {"description": comments[name], **body} if name in comments else dict(body)


@cache
def _groups() -> dict[str, Schema]:
    """The schema of each group's section; they take a second."""
    return {group: _group(group) for group in GROUPS if group != "experiment"}


def _group(group: str) -> Schema:
    if group in ("lora", "trainer"):
        return _library(group)
    targets, comments = _targets(group), _comments(group)
    if group == "metrics":
        return _metrics(targets, comments)
    everything = sorted({key for keys in targets.values() for key in keys})
    properties: Schema = {"defaults": _DEFAULTS, "_target_": {"type": "string", "description": "The class that this file builds."}}
    for key in everything:
        annotations = sorted({keys[key] for keys in targets.values() if key in keys})
        bodies = [value_schema(annotation) for annotation in annotations]
        body = {} if not all(bodies) else bodies[0] if len(bodies) == 1 else {"anyOf": [each for body in bodies for each in body["anyOf"]]}
        properties[key] = _described(key, body, comments)
    properties |= _nested(group, everything)
    own = {"defaults", "_target_"}
    known = sorted(targets)
    rules: list[Schema] = [_only(own | {*everything}, unless=known)]
    for target in known:
        if targets[target]:
            typed = {key: value_schema(kind) for key, kind in targets[target].items() if value_schema(kind)}
            rules.append({"if": {"required": ["_target_"], "properties": {"_target_": {"const": target}}}, "then": {"propertyNames": {"enum": sorted(own | {*targets[target]})}, "properties": typed}})
    return {"type": "object", "properties": properties, "allOf": rules}


def _only(names: Iterable[str], unless: list[str]) -> Schema:
    """No other keys, but beside a class that is not among `unless`: a user's own class has its own keys."""
    foreign = {"required": ["_target_"], "properties": {"_target_": {"not": {"anyOf": [{"enum": unless}, {"pattern": "^mmft[.]"}]}}}}
    return {"if": foreign, "else": {"propertyNames": {"enum": sorted(names)}}}


def _nested(group: str, keys: Iterable[str]) -> Schema:
    """Keys that hold sections of a group."""
    either: Schema = {"anyOf": [{"$ref": f"#/definitions/{group}"}, {"type": "null"}]}
    found = {"data": "sources", "logger": "loggers"}.get(group)
    nested: Schema = {found: {"type": "object", "additionalProperties": either}} if found is not None and found in keys else {}
    return nested | ({"quantization": _section("model.quantization", library_keys.quantization_config(), {})} if group == "model" else {})


def _library(section: str) -> Schema:
    comments = _comments(section)
    return _section(section, library_keys.sections()[section], comments)


def _section(section: str, known: Mapping[str, str], comments: Mapping[str, str]) -> Schema:
    """A section that takes the keys of a library's class: those that act in mmft, and mmft's own."""
    names = [*key_table.EFFECTIVE[section], *(key for key in known if key in library_keys.OWN_KEYS)]
    properties = {key: {"description": f"{key_table.CLASSES[section][0]}.{key}", **_described(key, value_schema(known.get(key, "")), comments)} for key in sorted(names)}
    for key, reason in key_table.UNSUPPORTED[section].items():  # may be switched off, as mmft's check allows
        properties[key] = {"description": f"Not supported: {reason}.", "enum": list(key_table.OFF)}
    return {"type": ["object", "null"], "properties": {"defaults": _DEFAULTS, **properties}, "additionalProperties": False}


def _metrics(targets: Mapping[str, Mapping[str, str]], comments: Mapping[str, str]) -> Schema:
    """Metrics by their names, each a class with its keys."""
    everything = sorted({key for keys in targets.values() for key in keys})
    metric: Schema = {
        "type": ["object", "null"],
        "properties": {"_target_": {"type": "string"}, **{key: {} for key in everything}},
        "allOf": [_only({"_target_", *everything}, sorted(targets))],
    }
    return {"type": "object", "properties": {"defaults": _DEFAULTS}, "additionalProperties": metric}


# --- a whole config -------------------------------------------------------------------------------------------------


def _whole(groups: Mapping[str, Schema]) -> Schema:
    """config.yaml, presets, and what `mmft --cfg job` prints."""
    text = (CONFIG_DIR / "config.yaml").read_text(encoding="utf-8")
    plain = yaml.safe_load(text)
    comments = {key.name: key.comment for key in keys_of(text) if key.comment}
    properties: Schema = {"defaults": _DEFAULTS, "hydra": {"type": "object"}}
    for key in plain:
        if key != "defaults":
            properties[key] = _described(key, value_schema(TOP_LEVEL_TYPES.get(key, "")), comments)
    enums = {"answer": ANSWERS, "choice_norm": CHOICE_NORMS}
    own = {key: _described(f"evaluation.{key}", {"enum": list(enums[key])} if key in enums else {}, comments) for key in plain["evaluation"]}
    properties["evaluation"] = {"type": "object", "properties": own, "additionalProperties": False}
    generation = {key.removeprefix("generation."): text for key, text in comments.items() if key.startswith("generation.")}
    properties["generation"] = _section("generation", library_keys.generation_config(), generation)
    properties["augment"] = {**properties["augment"], "anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": False, "properties": {
        name: {"type": ["object", "null"], "properties": {key: {} for key in keys}, "additionalProperties": False} for name, keys in AUGMENT_TRANSFORMS.items()}}]}  # fmt: skip
    properties |= {group: {"$ref": f"#/definitions/{group}"} for group in groups}
    return {"type": "object", "properties": properties, "additionalProperties": False, "description": first_comment(text)}
