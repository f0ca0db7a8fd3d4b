"""Paths that tests use; not in conftest.py, because several files have that name and cannot be imported by it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def shared(name: str) -> Path:
    """A folder of ../shared, or a skip that says what is not there."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not there: this check needs its files")
    return path
