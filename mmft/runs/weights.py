"""The trained weights of a run as one hash, and how far those of two runs are apart."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from ..common.hashing import tensor_hash


def weight_files(run: Path) -> list[Path]:
    """The safetensors of a run's adapter/, or of its model/ after full training."""
    return sorted((run / "adapter").glob("*.safetensors")) or sorted((run / "model").glob("*.safetensors"))


def weights_hash(run: Path) -> str | None:
    """sha256 over name, dtype, shape and bytes of every trained tensor, by name; None without any."""
    from safetensors import safe_open

    found = {}
    for file in weight_files(run):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # not a mapping
                found[key] = tensor_hash(tensors.get_tensor(key))
    if not found:
        return None
    digest = hashlib.sha256()
    for key in sorted(found):
        digest.update(f"{key}\0{found[key]}\n".encode())
    return digest.hexdigest()


def compare_weights(first: Path, second: Path) -> dict[str, Any]:
    """The trained weights: both hashes, and the difference's norm against the weights' own, overall ("largest").

    "where" is the tensor with the largest single difference ("entry").
    """
    from safetensors import SafetensorError

    try:
        hashes = [weights_hash(run) for run in (first, second)]
    except (OSError, SafetensorError) as error:
        return {"hashes": [None, None], "largest": math.inf, "where": None, "entry": None, "unmatched": [f"readable weights ({error})"]}
    found: dict[str, Any] = {"hashes": hashes, "largest": 0.0, "where": None, "entry": 0.0, "unmatched": []}
    if hashes[0] == hashes[1]:
        found["unmatched"] = [] if hashes[0] else ["trained weights"]
        return found
    if None in hashes:
        found["unmatched"] = ["trained weights"]
        return found
    a, b = (_tensors(run) for run in (first, second))
    found["unmatched"] = sorted(a.keys() ^ b.keys()) or sorted(f"{k} {list(a[k].shape)}" for k in a if a[k].shape != b[k].shape)
    if found["unmatched"]:
        return found
    gap = size = 0.0
    for key in sorted(a):
        x, y = a[key].double(), b[key].double()
        apart = (x - y).abs()
        gap, size = gap + float(apart.square().sum()), size + float(x.square().sum())
        entry = float(apart.max()) if apart.numel() else 0.0
        if not entry <= found["entry"]:
            found["entry"], found["where"] = entry, key
    found["largest"] = math.sqrt(gap / size) if size else math.inf
    return found


def _tensors(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value for file in weight_files(run) for key, value in load_file(file).items()}
