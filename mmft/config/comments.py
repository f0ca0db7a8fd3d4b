"""The keys of a yaml file with their defaults and the comments behind or above them, for the reference and for editors."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

MODELINE = "# yaml-language-server:"  # names the schema of a file for editors


@dataclass
class Key:
    """One line of a reference table."""

    name: str
    default: str
    comment: str


def keys_of(text: str, prefix: str = "") -> list[Key]:
    """The keys of a yaml text in their order, nested blocks as dotted names, each with the comment behind it or above it."""
    lines = text.splitlines()

    def comment(line: int, column: int) -> str:
        behind = lines[line][column:].partition("#")[2].strip()
        above: list[str] = []
        while line and lines[line - 1].lstrip().startswith("#") and not lines[line - 1].startswith(("# @", MODELINE)):
            line -= 1
            above.insert(0, lines[line].lstrip(" #").strip())
        return "; ".join(filter(None, [" ".join(above) if line else "", behind]))  # line 0 opens the file: it is the file's own comment

    def walk(node: yaml.MappingNode, above: str) -> list[Key]:
        keys = []
        for key, value in node.value:
            name = f"{above}{key.value}"
            if key.value in ("_target_", "defaults"):
                continue
            if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
                keys += walk(value, f"{name}.")
                continue
            end = value.end_mark if isinstance(value, yaml.ScalarNode) or value.flow_style else key.end_mark
            shown = text[value.start_mark.index : value.end_mark.index].strip()
            keys.append(Key(f"{prefix}{name}", shown, comment(key.start_mark.line, end.column if end.line == key.start_mark.line else 0)))
        return keys

    node = yaml.compose(text)
    return walk(node, "") if isinstance(node, yaml.MappingNode) else []


def first_comment(text: str) -> str:
    """The comment lines at the top of a file, without Hydra's own."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @", MODELINE)):
            comment.append(line.lstrip("# ").strip())
    return " ".join(comment)
