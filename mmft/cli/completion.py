"""Completion of commands in bash and zsh: `mmft --shell-completion bash` prints the script, which asks `complete` at every press of Tab."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.groups import CONFIG_DIR, GROUPS, group_options, top_level, verb_keys, verbs

VARIABLE = "MMFT_COMPLETE"  # the line up to the cursor; set by the scripts
FLAGS = ("--config-dir", "--config-name", "--cfg", "--help", "--json", "--multirun", "--resolve", "--shell-completion", "--version")
NAMES = ("run", "against", "diff")  # keys of verbs that take names of runs
SCRIPTS = {
    "bash": r'''_mmft() {
  local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}"
  local cur="${line##* }"
  local head="${cur%"${cur##*[=:]}"}"
  COMPREPLY=($(MMFT_COMPLETE="$line" mmft 2>/dev/null))
  if [[ ${#COMPREPLY[@]} -eq 0 && $cur == *=* ]]; then
    COMPREPLY=($(compgen -f -- "${cur#*=}"))
  else
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
  fi
  [[ ${COMPREPLY[0]} == *[=.] || -d ${COMPREPLY[0]} ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -F _mmft mmft
''',
    "zsh": r'''_mmft() {
  local -a found
  found=("${(@f)$(MMFT_COMPLETE="${(j: :)words[1,CURRENT-1]} $PREFIX" mmft 2>/dev/null)}")
  if [[ -n $found[1] ]]; then
    if [[ $found[1] == *[=.] ]]; then compadd -Q -S '' -- "${found[@]}"; else compadd -Q -- "${found[@]}"; fi
  elif compset -P '*='; then
    _files
  fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _mmft mmft
''',
}  # fmt: skip


def complete(line: str) -> list[str]:
    """What the last word of a line can be, whole words; [] where a file may stand."""
    words = line.split(" ")
    current, before = words[-1], [word for word in words[1:-1] if word]
    config_dir = next((b for a, b in zip(before, before[1:]) if a == "--config-dir"), None)
    if current.startswith("-"):
        return _beginning(FLAGS, current)
    verb = next((word for word in before if word in verbs()), None)
    key, equals, value = current.partition("=")
    if equals:
        head = value[: max(value.rfind("["), value.rfind(",")) + 1]  # of a list
        return [f"{key}={head}{found}" for found in _beginning(_values(key, verb, before, config_dir), value[len(head) :])]
    first = [] if any("=" not in word and not word.startswith("-") for word in before) else list(verbs())
    return _beginning([*first, *_keys(current, verb)], current)


def _beginning(names: Iterable[str], start: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(start)]


def _keys(current: str, verb: str | None) -> list[str]:
    """Keys with what follows them: `=`, or `.` for a section."""
    if "." in current:
        section = current.rpartition(".")[0]
        return [f"{section}.{name}{'.' if _is_section(node) else '='}" for name, node in _properties(section).items() if name not in ("defaults", "_target_")]
    groups = [f"{group}=" for group in GROUPS if group != "task"]
    sections = [f"{group}." for group in GROUPS if group not in ("task", "experiment")] if current else []
    own = [f"{key}=" for key in verb_keys(verb or "train")]
    return [*own, *groups, *(f"{key}{'.' if _is_section(_properties('').get(key, {})) else '='}" for key in top_level()), *sections]


def _is_section(node: dict[str, Any]) -> bool:
    return "object" in json.dumps(node.get("type", "")) and "properties" in node


def _values(key: str, verb: str | None, before: list[str], config_dir: str | None) -> list[str]:
    if key in GROUPS:
        return group_options(config_dir)[key]
    if verb is not None and key in NAMES and key in verb_keys(verb):
        return _runs(before)
    section, _, name = key.rpartition(".")
    node = _properties(section).get(name, {}) if section or verb is None or name not in verb_keys(verb) else _properties("task").get(name, {})
    kinds = json.dumps(node)
    return [str(value) for value in node.get("enum", ()) if isinstance(value, str)] or (["true", "false"] if '"boolean"' in kinds else [])


def _runs(before: list[str]) -> list[str]:
    from ..runs.catalog import catalog

    folder = Path(next((word.partition("=")[2] for word in before if word.startswith("output_dir=")), "outputs"))
    return ["last", "best", *(run.path.as_posix() for run in catalog(folder))] if folder.is_dir() else []


def _properties(section: str) -> dict[str, dict[str, Any]]:
    """The keys of a section, "" for the top level, as the shipped schema has them."""
    schema = json.loads((CONFIG_DIR / "schema" / "config.json").read_text(encoding="utf-8"))
    node = schema
    for piece in filter(None, section.split(".")):
        node = node.get("properties", {}).get(piece, {})
        while "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
    found: dict[str, dict[str, Any]] = node.get("properties", {})
    return found
