"""Render the pages' templates: one HTML file each, which opens offline."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A template of this folder with the pages' style sheet. Every value is escaped; one that the template lacks is an error."""
    return str(_template(template).render(css=(HERE / "page.css").read_text(encoding="utf-8"), **values))


@functools.cache
def _template(name: str) -> Any:
    """A template, compiled once for all pages that a process writes."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it. Returns the path."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path
