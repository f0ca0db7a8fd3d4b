"""Write a checkpoint as safetensors shards while its tensors come by one at a time, so that no second copy is ever held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .hashing import tensor_hash

SHARD = 1 << 30  # bytes; the most that is kept in memory beside the tensors' owner


class Shards:
    """`add` every tensor, then `close`. `digests` maps each name to the sha256 of the tensor's bytes."""

    def __init__(self, folder: Path, shard: int = SHARD):
        self.folder, self.limit = folder, shard
        self.digests: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._bytes = self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Any) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if self._bytes and self._bytes + tensor.nbytes > self.limit:
            self._write()
        if name in self.digests:
            raise ValueError(f"{name} was written already")
        self.digests[name] = tensor_hash(tensor)
        self._open[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the files the names transformers looks for, and the index if there is more than one."""
        self._write()
        count = len(self._files)
        if count == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for i, names in enumerate(self._files):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._file(i).rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (self.folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8", newline="\n")

    def _file(self, i: int) -> Path:
        return self.folder / f"shard-{i}"

    def _write(self) -> None:
        from safetensors.torch import save_file

        if not self._open:
            return
        save_file(self._open, self._file(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._open))
        self._open, self._bytes = {}, 0
