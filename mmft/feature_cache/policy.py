"""Decide whether and where a run keeps image features, and say why not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.plan import AdapterPlan
from ..collators.base import Collator
from ..common.errors import UserError
from ..common.hashing import key_of
from ..common.memo import Memo
from ..common.model_parts import part_of
from ..common.private_api import attention_implementation
from ..config.settings import Settings, sharded_by
from ..data.augment import describe_transforms
from ..data.mixing import Mixing
from ..data.prepared import PreparedData
from ..data.selection import parts_of
from ..models.load import Loaded
from ..system.disk import existing_parent
from ..system.distributed import world_size
from .cache import FeatureCache, packed
from .image_features import FeatureLayout, Uncacheable, depends_on_the_row, takes_features
from .store import Store

if TYPE_CHECKING:
    from ..data.sample import Sample

log = logging.getLogger("mmft")

MODES = ("auto", "memory", "disk", "off")
PARTS = ("vision", "connector", "qformer")  # the parts before the language model
SHARE = 0.25  # of the free memory that `auto` may fill
PROBED = 3  # rows whose sizes are extrapolated to the whole set
DROPOUTS = (
    torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout,
)  # fmt: skip


def why_forbidden(settings: Settings, plan: AdapterPlan) -> str | None:
    """Why features must be computed at every step, naming the cause; None if they may be kept. Needs no model."""
    for name, part in (plan.adapted | plan.parameters).items():
        if part in PARTS:
            return f"the adapter reaches {name}, which is computed anew at every step"
    if plan.method == "full" and plan.scope != "language":
        return f"lora.scope={plan.scope} trains the {plan.scope if plan.scope in PARTS else 'vision'} part"
    for name in plan.settings.get("modules_to_save") or []:
        if part_of(name) in PARTS:
            return f"lora.modules_to_save trains {name}"
    if transforms := describe_transforms(settings.get("augment")):
        return f"augment.{transforms.split('(')[0]} changes the training pictures in every epoch"
    if key := sharded_by(settings["trainer"]):
        return f"trainer.{key} spreads the model over processes"
    return None


def why_adapted(model: torch.nn.Module) -> str | None:
    """Why the features of a finished run's model are not those of its base, naming an adapted module; None if they are."""
    if not hasattr(model, "peft_config"):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if part_of(name) in PARTS and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return f"the run has an adapter at {name}"
    return None


def why_not_frozen(model: torch.nn.Module) -> str | None:
    """The first module before the language model that is trained or has active dropout, in a model set to training; None if none."""
    for name, module in model.named_modules():
        if part_of(name) not in PARTS:
            continue
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            return f"{name} is trained"
        if isinstance(module, DROPOUTS) and module.training and module.p > 0:
            return f"{name} drops features at random"
    return None


def open_cache(
    settings: Settings, loaded: Loaded, forbidden: str | None, collator: Collator, prepared: PreparedData, rows: Sequence[Sample], seen: int,
    memo: Memo, run_bytes: int = 0,
) -> FeatureCache | None:  # fmt: skip
    """The cache that `vision_cache` asks for, with what earlier runs left in it; None if there is none, after saying why.

    forbidden: why features may not be kept, by `why_forbidden` or `why_adapted`. rows: the training rows, of which `seen` will be trained on,
    or the rows of an evaluation. memo: keeps stores and probed rows for all runs of one base. run_bytes:
    what the run itself will leave on the disk. `auto` keeps features in memory if a quarter of the free memory holds them, else on disk,
    else not at all; `vision_cache_gb` is the limit. Raises UserError if a cache was asked for by name and cannot be had.
    """
    mode = settings.get("vision_cache", "auto")
    if mode not in MODES:
        raise UserError(f"vision_cache={mode}: must be one of {', '.join(MODES)}")
    if mode == "off":
        return None
    reason = forbidden
    if reason is None and not takes_features(loaded.model):
        reason = f"{type(loaded.model).__name__} takes no precomputed features in this transformers"
    if reason is None and depends_on_the_row(loaded.model):
        reason = f"{type(loaded.model).__name__} computes an image otherwise where its row has several"
    reason = reason or _why_no_images(prepared, rows)
    if reason is None:
        key = key_of("probed", str(prepared.path), prepared.fingerprint, *identities(settings, loaded, collator))
        try:
            probed = memo.once(key, lambda: ProbedRows(loaded.model, collator, rows))
            need = probed.size(prepared, seen)
        except Uncacheable as error:
            reason = str(error)
    if reason is None:
        mode, reason = _choose_place(mode, need, settings, run_bytes)
    if reason is not None:
        if settings["vision_cache"] != "auto":
            raise UserError(f"vision_cache={settings['vision_cache']}: {reason}; use vision_cache=off")
        log.info("%-14s off: %s", "vision cache", reason)
        return None
    log.info("%-14s %s, about %s", "vision cache", "in memory" if mode == "memory" else f"on disk, {_folder(settings)}", _size(need))
    key = key_of(mode, settings["output_dir"], *identities(settings, loaded, collator))
    images, row_store = memo.once(key, lambda: _open_stores(mode, settings, loaded, collator))
    cache = FeatureCache(collator, loaded.model, probed.layout, images, row_store)
    cache.add(probed.samples, probed.encoded, probed.images)
    return cache


def identities(settings: Settings, loaded: Loaded, collator: Collator) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the features of an image, and what decides the tokens of a row; their hashes name the folders."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "tokenizers", "pillow")}
    processor = loaded.processor
    image = {"processor": type(processor.image_processor).__name__, "settings": processor.image_processor.to_dict(), "given": settings["model"].get("processor")}
    features = {
        "format": 3, "weights": loaded.located.revision, **({"below": loaded.below} if loaded.below else {}), "class": type(loaded.model).__name__, "dtype": str(loaded.dtype),
        "device": loaded.device.split(":")[0], "attention": attention_implementation(loaded.model.config),
        "quantization": settings["model"].get("quantization"), "rewrites": settings["model"].get("rewrites", "auto"), "image": image, "versions": versions,
    }  # fmt: skip
    rows = {
        "format": 2, "tokenizer": loaded.located.revision, "collator": settings["collator"], "ends": collator.end_token_ids,
        "template": getattr(collator, "template", None), "image": image, "versions": versions,
    }  # fmt: skip
    return features, rows


def _open_stores(mode: str, settings: Settings, loaded: Loaded, collator: Collator) -> tuple[Store, Store]:
    described_by = identities(settings, loaded, collator)
    folders: list[Path | None] = [None, None]
    if mode == "disk":
        folders = [_folder(settings) / f"{kind}-{folder_key(d)}" for kind, d in zip(("images", "rows"), described_by)]
    return Store(folders[0], described_by[0]), Store(folders[1], described_by[1])


def folder_key(described_by: dict[str, Any]) -> str:
    """16 hex digits that name the folder of a store."""
    return hashlib.sha256(json.dumps(described_by, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _folder(settings: Settings) -> Path:
    return Path(settings["output_dir"]) / "cache"


def _why_no_images(prepared: PreparedData, rows: Sequence[Sample]) -> str | None:
    if not any(row.sha256 for row in _spread(rows)):
        return "these rows have no images"
    if any(len(row.sha256) != len(row.images) for row in _spread(rows)):
        return f"{prepared.path}: this set has no hashes of its images"
    return None


def _spread(rows: Sequence[Sample]) -> list[Sample]:
    """PROBED rows, of a mix from each source."""
    return [part[i * len(part) // PROBED] for part in parts_of(rows).values() for i in range(min(PROBED, len(part)))]


class ProbedRows:
    """A few rows, computed as the cache would keep them. Raises Uncacheable."""

    def __init__(self, model: Any, collator: Collator, rows: Sequence[Sample]):
        self.layout = FeatureLayout()
        self.samples = [sample for sample in _spread(rows) if sample.sha256]
        self.encoded, tensors = collator.encode_checked(self.samples, False)
        self.images = self.layout.compute(model, tensors, sum(sequence.n_images for row in self.encoded for sequence in row))

    def size(self, prepared: PreparedData, seen: int) -> int:
        """Bytes of `seen` training rows, the held-out rows, and the images of both."""
        an_image = sum(t.nbytes for entry in self.images for t in entry.values()) / len(self.images)
        a_row = sum(t.nbytes for row in self.encoded for t in packed(row).values()) / len(self.encoded)
        parts = prepared.manifest["splits"]
        n_images = sum(p["images"] for name, p in parts.items() if name != "train")
        n_images += min(parts["train"]["images"], seen * max(len(s.sha256) for s in self.samples))
        return int(an_image * n_images + a_row * (seen + sum(p["rows"] for name, p in parts.items() if name != "train")))


def _choose_place(mode: str, need: int, settings: Settings, run_bytes: int) -> tuple[str, str | None]:
    """(memory or disk, None), or (mode, why not)."""
    import psutil

    limit = int(float(settings["vision_cache_gb"]) * 2**30)
    if need > limit:
        return mode, f"it would take {_size(need)}, more than vision_cache_gb={settings['vision_cache_gb']}"
    free = psutil.virtual_memory().available
    if mode == "memory" and need > free:
        return mode, f"it would take {_size(need)} of memory, and {_size(free)} is free"
    if mode == "memory" or mode == "auto" and need <= SHARE * free:
        return "memory", None
    folder = _folder(settings)
    free = shutil.disk_usage(existing_parent(folder)).free
    return "disk", None if need + run_bytes <= 0.9 * free else f"it would take {_size(need)} below {folder} and the run itself {_size(run_bytes)}, and {_size(free)} is free"


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{max(n / 2**20, 0.1):.1f} MB"


def rows_seen(settings: Settings, n_rows: int, mixing: Mixing | None = None, mean_tokens: float | None = None) -> int:
    """How many training rows a run will see: all, or fewer if max_steps ends it within the first epoch. mixing: the draws of a mix.

    mean_tokens: tokens of a row, for batches that are filled by tokens; it is then an estimate.
    """
    trainer = settings["trainer"]
    tokens, rows = trainer.get("tokens_per_batch"), trainer["per_device_train_batch_size"]
    if tokens and mean_tokens:
        rows = max(1, round(tokens / mean_tokens))
    batch = rows * trainer.get("gradient_accumulation_steps", 1) * world_size()
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("num_train_epochs") or 1
    drawn = int(steps * batch if steps > 0 else epochs * (n_rows if mixing is None else mixing.draws))
    return min(drawn, n_rows) if mixing is None or mixing.every_row_once else mixing.rows_seen(drawn)
