"""Whether and where a run keeps its features: what forbids it, what it would take, and the reason that is printed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.model_parts import part_of
from ..data.augment import described
from ..system.disk import existing_parent
from .cache import Cache, packed
from .image_features import Taken, Uncacheable, depends_on_the_row, takes_features
from .store import Store

log = logging.getLogger("mmft")

MODES = ("auto", "memory", "disk", "off")
PARTS = ("vision", "connector", "qformer")  # what lies before the language model
SHARE = 0.25  # of the free memory that `auto` may fill
PROBED = 3  # rows from which sizes are drawn to the whole set


def forbidden(settings: dict[str, Any], plan: Any) -> str | None:
    """Why nothing before the language model may be kept, naming the module; None where it may. No model is needed."""
    for name, part in plan.adapted.items():
        if part in PARTS:
            return f"the adapter reaches {name}, which is computed anew at every step"
    if plan.method == "full" and plan.scope != "language":
        return f"lora.scope={plan.scope} trains the {plan.scope if plan.scope in PARTS else 'vision'} part"
    for name in plan.settings.get("modules_to_save") or []:
        if part_of(name) in PARTS:
            return f"lora.modules_to_save trains {name}"
    if on := described(settings.get("augment")):
        return f"augment.{on.split('(')[0]} changes the training pictures in every epoch"
    for key in ("fsdp", "deepspeed"):
        if settings["trainer"].get(key):
            return f"trainer.{key} spreads the model over processes"
    return None


def live(model: Any) -> str | None:
    """The first module before the language model that is trained, or whose dropout is on; asked once the model is set to train."""
    import torch

    for name, module in model.named_modules():
        if part_of(name) not in PARTS:
            continue
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            return f"{name} is trained"
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return f"{name} drops features at random"
    return None


def opened(
    settings: dict[str, Any], loaded: Any, plan: Any, collator: Any, prepared: Any, rows: Sequence[Any], seen: int, shared: Any = None,
    own: int = 0,
) -> Cache | None:
    """The cache that vision_cache asks for, with whatever earlier runs left in it, or None, with the reason said.

    rows: the training rows, of which `seen` will be seen. shared: what the runs of one process share (mmft/sweeps/shared_base.py).
    own: bytes that the run itself will leave on the disk.
    auto: in memory where a quarter of the free memory holds it, else on disk, else off; `vision_cache_gb` is the limit.
    Errors raised: UserError when a cache was asked for by name and cannot be.
    """
    mode = settings.get("vision_cache", "auto")
    if mode not in MODES:
        raise UserError(f"vision_cache={mode}: must be one of {', '.join(MODES)}")
    if mode == "off":
        return None
    reason = forbidden(settings, plan)
    if reason is None and not takes_features(loaded.model):
        reason = f"{type(loaded.model).__name__} takes no precomputed features in this transformers"
    if reason is None and depends_on_the_row(loaded.model):
        reason = f"{type(loaded.model).__name__} computes an image otherwise where its row has several"
    reason = reason or _few(settings, prepared, rows)
    if reason is None:
        try:
            probe = functools.partial(Probed, loaded.model, collator, rows)
            probed = probe() if shared is None else shared.probed(settings, loaded, collator, prepared, probe)
            need = probed.size(prepared, seen)
        except Uncacheable as error:
            reason = str(error)
    if reason is None:
        mode, reason = _place(mode, need, settings, own)
    if reason is not None:
        if settings["vision_cache"] != "auto":
            raise UserError(f"vision_cache={settings['vision_cache']}: {reason}; use vision_cache=off")
        log.info("%-14s off: %s", "vision cache", reason)
        return None
    log.info("%-14s %s, about %s", "vision cache", "in memory" if mode == "memory" else f"on disk, {_home(settings)}", _bytes(need))
    stores = _stores(mode, settings, loaded, collator) if shared is None else shared.features(mode, settings, loaded, collator, _stores)
    # its ways are of the modules that were probed: only the point that did so goes on with them
    taken, probed.taken = probed.taken, dataclasses.replace(probed.taken, ways=None)
    cache = Cache(collator, loaded.model, taken, *stores)
    cache.keep(probed.samples, probed.encoded, probed.images)
    return cache


def identities(settings: dict[str, Any], loaded: Any, collator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What shapes the features of an image, and what shapes the tokens of a row; their hashes name the folders."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "tokenizers", "pillow")}
    processor = loaded.processor
    image = {"processor": type(processor.image_processor).__name__, "settings": processor.image_processor.to_dict(), "given": settings["model"].get("processor")}
    features = {
        "format": 2, "weights": loaded.located.revision, "class": type(loaded.model).__name__, "dtype": str(loaded.dtype),
        "device": loaded.device.split(":")[0], "attention": getattr(loaded.model.config, "_attn_implementation", None),
        "quantization": settings["model"].get("quantization"), "image": image, "versions": versions,
    }  # fmt: skip
    rows = {
        "format": 1, "tokenizer": loaded.located.revision, "collator": settings["collator"], "ends": collator.end_token_ids,
        "template": getattr(collator, "template", None), "image": image, "versions": versions,
    }  # fmt: skip
    return features, rows


def _stores(mode: str, settings: dict[str, Any], loaded: Any, collator: Any) -> tuple[Store, Store]:
    described = identities(settings, loaded, collator)
    folders: list[Path | None] = [None, None]
    if mode == "disk":
        folders = [_home(settings) / f"{kind}-{key_of(d)}" for kind, d in zip(("images", "rows"), described)]
    return Store(folders[0], described[0]), Store(folders[1], described[1])


def key_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _home(settings: dict[str, Any]) -> Path:
    return Path(settings["output_dir"]) / "cache"


def _few(settings: dict[str, Any], prepared: Any, rows: Sequence[Any]) -> str | None:
    if not any(rows[i * len(rows) // PROBED].sha256 for i in range(min(PROBED, len(rows)))):
        return "these rows have no images"
    if any(len(rows[i].sha256) != len(rows[i].images) for i in range(min(PROBED, len(rows)))):
        return f"{prepared.path}: this set has no hashes of its images"
    return None


class Probed:
    """A few rows computed as the cache would keep them. Errors raised: Uncacheable."""

    def __init__(self, model: Any, collator: Any, rows: Sequence[Any]):
        self.taken = Taken()
        chosen = (rows[i * len(rows) // PROBED] for i in range(min(PROBED, len(rows))))
        self.samples = [sample for sample in chosen if sample.sha256]
        self.encoded, tensors = collator.encode_checked(self.samples, False)
        self.images = self.taken.compute(model, tensors, sum(len(s.sha256) for s in self.samples))

    def size(self, prepared: Any, seen: int) -> int:
        """Bytes of `seen` training rows, the held-out rows, and the images of both."""
        an_image = sum(t.nbytes for entry in self.images for t in entry.values()) / len(self.images)
        a_row = sum(t.nbytes for row in self.encoded for t in packed(row).values()) / len(self.encoded)
        parts = prepared.manifest["splits"]
        n_images = sum(p["images"] for name, p in parts.items() if name != "train")
        n_images += min(parts["train"]["images"], seen * max(len(s.sha256) for s in self.samples))
        return int(an_image * n_images + a_row * (seen + sum(p["rows"] for name, p in parts.items() if name != "train")))


def _place(mode: str, need: int, settings: dict[str, Any], own: int) -> tuple[str, str | None]:
    """(memory or disk, None), or (mode, why not)."""
    import psutil

    limit = int(float(settings["vision_cache_gb"]) * 2**30)
    if need > limit:
        return mode, f"it would take {_bytes(need)}, more than vision_cache_gb={settings['vision_cache_gb']}"
    free = psutil.virtual_memory().available
    if mode == "memory" and need > free:
        return mode, f"it would take {_bytes(need)} of memory, and {_bytes(free)} is free"
    if mode == "memory" or mode == "auto" and need <= SHARE * free:
        return "memory", None
    home = _home(settings)
    free = shutil.disk_usage(existing_parent(home)).free
    return "disk", None if need + own <= 0.9 * free else f"it would take {_bytes(need)} below {home} and the run itself {_bytes(own)}, and {_bytes(free)} is free"


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{max(n / 2**20, 0.1):.1f} MB"


def needed(settings: dict[str, Any], n_rows: int) -> int:
    """How many of the training rows a run will see: all of them, or fewer where max_steps ends it within the first epoch."""
    from ..system.distributed import world_size

    trainer = settings["trainer"]
    batch = trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1) * world_size()
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("num_train_epochs") or 1
    return min(int(steps * batch if steps > 0 else epochs * n_rows), n_rows)
