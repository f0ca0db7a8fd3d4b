"""Hash the trained weights of a run, and compare the weights of two runs."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..adapters.convert import plain_checkpoint
from ..common.errors import UserError
from ..common.hashing import key_of, tensor_hash
from .directory import Run

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
    return _tensors_hash(weight_files(run))


# Keys of adapter_config.json that do not change what the adapter computes.
NO_EFFECT = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "lora_dropout", "init_lora_weights")


def adapter_hash(folder: Path) -> str:
    """sha256 of what an adapter's folder adds to its base: the tensors, and the config that scales and places them.

    Raises UserError if a file of it is missing or torn.
    """
    from safetensors import SafetensorError

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = _tensors_hash([folder / "adapter_model.safetensors"])
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {' '.join(str(error).split())[:200]}") from None
    return key_of(tensors, {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items() if k not in NO_EFFECT})


def _tensors_hash(files: list[Path]) -> str | None:
    from safetensors import safe_open

    hashes = {}
    for file in files:
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


def trained_weights(run: Run, checkpoint: int | None) -> tuple[Path, bool]:
    """(folder of the trained weights, whether they are a whole model). Raises UserError."""
    if checkpoint is not None:
        folder = run / "checkpoints" / f"checkpoint-{checkpoint}"
        if not folder.is_dir():
            there = sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("checkpoint-*") if p.name.split("-")[1].isdigit())
            raise UserError(f"checkpoint={checkpoint}: {run.path} has no such checkpoint; there are: {', '.join(map(str, there)) or 'none'}")
        return plain_checkpoint(run.path, folder), not (folder / "adapter_config.json").is_file()
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return run / name, name == "model"
    status = run.read_json("summary.json").get("status") if (run / "summary.json").is_file() else "unfinished"
    raise UserError(f"run={run.path}: this run is {status} and saved no adapter; name one of its checkpoints (checkpoint=N) or train it again")
