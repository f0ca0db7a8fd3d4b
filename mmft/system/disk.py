"""Sizes of folders and free space on disks."""

from __future__ import annotations

import errno
from pathlib import Path


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def megabytes(n: float) -> str:
    """`1.5 GB` or `20 MB`."""
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.0f} MB"
