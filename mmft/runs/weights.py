"""Hash the trained weights of a run, and compare the weights of two runs."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..common.hashing import tensor_hash

if TYPE_CHECKING:
    import torch


class WeightsComparison(TypedDict):
    """hashes: of both runs; None without weights. largest: norm of the difference as a share of the first run's norm.

    where: the tensor with the largest difference of one entry (`entry`). unmatched: tensors that only one run has.
    """

    hashes: list[str | None]
    largest: float
    where: str | None
    entry: float
    unmatched: list[str]


def weight_files(run: Path) -> list[Path]:
    """The safetensors files of a run's adapter/, or of its model/ after full training."""
    return sorted((run / "adapter").glob("*.safetensors")) or sorted((run / "model").glob("*.safetensors"))


def weights_hash(run: Path) -> str | None:
    """sha256 over name, dtype, shape and bytes of every trained tensor, in the order of their names; None without any."""
    from safetensors import safe_open

    hashes = {}
    for file in weight_files(run):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # not a mapping
                hashes[key] = tensor_hash(tensors.get_tensor(key))
    if not hashes:
        return None
    digest = hashlib.sha256()
    for key in sorted(hashes):
        digest.update(f"{key}\0{hashes[key]}\n".encode())
    return digest.hexdigest()


def compare_weights(first: Path, second: Path) -> WeightsComparison:
    """Compare the trained weights of two runs."""
    from safetensors import SafetensorError

    try:
        hashes = [weights_hash(run) for run in (first, second)]
    except (OSError, SafetensorError) as error:
        return {"hashes": [None, None], "largest": math.inf, "where": None, "entry": 0.0, "unmatched": [f"readable weights ({error})"]}
    result: WeightsComparison = {"hashes": hashes, "largest": 0.0, "where": None, "entry": 0.0, "unmatched": []}
    if None in hashes:
        result["unmatched"] = ["trained weights"]
    if None in hashes or hashes[0] == hashes[1]:
        return result
    a, b = (_tensors(run) for run in (first, second))
    result["unmatched"] = sorted(a.keys() ^ b.keys()) or sorted(f"{k} {list(a[k].shape)}" for k in a if a[k].shape != b[k].shape)
    if result["unmatched"]:
        return result
    gap = size = 0.0
    for key in sorted(a):
        x, y = a[key].double(), b[key].double()
        difference = (x - y).abs()
        gap, size = gap + float(difference.square().sum()), size + float(x.square().sum())
        entry = float(difference.max()) if difference.numel() else 0.0
        if not entry <= result["entry"]:  # also if it is not a number
            result["entry"], result["where"] = entry, key
    result["largest"] = math.sqrt(gap / size) if size else math.inf
    return result


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: value for file in weight_files(run) for key, value in load_file(file).items()}
