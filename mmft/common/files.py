"""Read text, JSON, YAML and JSON Lines files that may be missing or torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str | None:
    """The file's text, or None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; {} where it is missing or torn."""
    try:
        value = json.loads(read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping (a run's snapshot.yaml); {} where it is missing or torn."""
    import yaml

    try:
        value = yaml.safe_load(read_text(path) or "")
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The file's rows; a torn line (the last one of a killed run) is left out."""
    rows = []
    for line in (read_text(path) or "").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
