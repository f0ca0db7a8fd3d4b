"""Store: named tensors under content keys, in memory or in memory-mapped safetensors files that several processes share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.hashing import sha256

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")

PACK = 64 * 1024 * 1024  # bytes of new entries that are written as one file
Entry = dict[str, "torch.Tensor"]  # by name; entries may differ in the first dimension only


class Store:
    """Entries by key. Without `folder` they live as long as this object.

    With a folder, new entries are written in packs: one safetensors file that holds all tensors of one name end to end, and their
    offsets. A pack is named by the sha256 of its bytes, which is compared when the pack is opened: a damaged pack is removed, and its
    entries are computed again. If the disk is full, one warning says so, and further entries stay in memory.
    """

    def __init__(self, folder: Path | None, described_by: dict[str, Any] | None = None):
        self.folder = folder
        self._fresh: dict[str, Entry] = {}
        self._fresh_bytes = 0
        self._packs: dict[str, dict[str, Any]] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self.bytes = 0
        self.last_batch: tuple[list[tuple[str, float]], dict[str, Any]] = ([], {})  # keys and tensors of the batch made last (cache.py)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if described_by and not (folder / "key.json").is_file():
                    _write(folder / "key.json", json.dumps(described_by, indent=2, default=str).encode())
            except OSError as error:
                self._give_up(error)
            self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._fresh or key in self._where

    def __len__(self) -> int:
        return len(self._fresh) + len(self._where)

    def __getitem__(self, key: str) -> Entry:
        if key in self._fresh:
            return self._fresh[key]
        pack, n = self._where[key]
        tensors = self._packs[pack]
        return {name: tensors[name][at[n] : at[n + 1]] for name, at in tensors["at"].items()}

    def add(self, entries: dict[str, Entry]) -> None:
        """Store new entries; their tensors must not be views of larger ones."""
        for key, entry in entries.items():
            if key not in self:
                self._fresh[key] = entry
                size = sum(t.nbytes for t in entry.values())
                self._fresh_bytes, self.bytes = self._fresh_bytes + size, self.bytes + size
        if self.folder is not None and self._fresh_bytes > PACK:
            self.flush()

    def flush(self) -> None:
        """Write new entries to the disk; each file is complete or absent."""
        if self.folder is None or not self._fresh:
            return
        import torch
        from safetensors.torch import save

        # entries of different shapes cannot share a tensor: one pack for each kind
        kinds: dict[tuple, list[str]] = {}
        for key, entry in self._fresh.items():
            kinds.setdefault(tuple(sorted((n, tuple(t.shape[1:]), str(t.dtype)) for n, t in entry.items())), []).append(key)
        for kind, keys in kinds.items():
            tensors = {}
            for name, _, _ in kind:
                parts = [self._fresh[key][name] for key in keys]
                tensors[name] = torch.cat(parts)
                lengths = torch.tensor([0, *(p.shape[0] for p in parts)], dtype=torch.int64)
                tensors[f"{name}.at"] = lengths.cumsum(0)
            data = save(tensors, metadata={"keys": json.dumps(keys)})
            path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
            try:
                _write(path, data)
            except OSError as error:
                self._give_up(error)
                return
            self._open(path)
            for key in keys:
                del self._fresh[key]
        self._fresh_bytes = 0

    def refresh(self) -> None:
        """Open packs that this or another process has written since."""
        if self.folder is None:
            return
        from safetensors import SafetensorError

        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._packs:
                continue
            try:
                if sha256(path) != path.stem:
                    raise ValueError("its contents are not what its name says")
                self._open(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("%-14s %s is damaged (%s); it is removed and computed again", "cache", path, str(error).splitlines()[0])
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            self.bytes += path.stat().st_size

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Hold the store's lock in the block; entries that another process wrote before are opened first, and not written again."""
        if self.folder is None:
            yield
            return
        from filelock import FileLock

        with FileLock(self.folder / ".lock"):
            self.refresh()
            for key in [k for k in self._fresh if k in self._where]:
                size = sum(t.nbytes for t in self._fresh.pop(key).values())
                self._fresh_bytes, self.bytes = self._fresh_bytes - size, self.bytes - size
            try:
                yield
            finally:
                self.flush()

    def _open(self, path: Path) -> None:
        """Map a pack into memory: its bytes are read when they are used."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            keys = json.loads(file.metadata()["keys"])
        at = {n.removesuffix(".at"): t.tolist() for n, t in tensors.items() if n.endswith(".at")}
        self._packs[path.name] = {**{n: tensors[n] for n in at}, "at": at}
        self._where.update({key: (path.name, n) for n, key in enumerate(keys)})

    def _give_up(self, error: OSError) -> None:
        log.warning("%-14s %s: %s; from here on it is kept in memory (vision_cache=off does without)", "cache", self.folder, error.strerror or error)
        self.folder = None


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
