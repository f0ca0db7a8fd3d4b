"""What the runs of one sweep share inside one process: prepared data, the loaded base, and the base's measurements."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.hashing import key_of, tensor_hash
from ..config.plain import to_plain
from ..models.load import load_model, load_skeleton

log = logging.getLogger("mmft")


@dataclass
class Shared:
    """Made by whoever runs several points in one process and handed from point to point.

    The base is shared as tensors, not as modules: each point gets new modules over the same weights, so neither adapters,
    nor hooks, nor frozen parts of one point are left for the next. That the weights stayed what they were is checked
    after each point (`end_point`); a base that changed is loaded again.
    """

    known: dict[str, Any] = field(default_factory=dict)  # what is found out once
    stores: dict[str, Any] = field(default_factory=dict)  # what is computed with the base, and goes with it
    base_key: str | None = None
    base: Any = None
    digest: str | None = None
    loads: int = 0  # how often weights were read
    running: list[Any] = field(default_factory=list)  # the listener for signals, while one listens (signals.py)
    seat: Any = None  # of a point that is trained in step with others (mmft/joint/)

    def prepared(self, cfg: Any) -> Any:
        """The prepared set, looked for once for each data config."""
        from ..data.prepare import prepared_data

        return _once(self.known, key_of("prepared", to_plain(cfg.data), cfg.output_dir), lambda: prepared_data(cfg))

    def rows(self, prepared: Any, make: Any) -> Any:
        """The training rows of a set, each read once for all points."""
        return _once(self.known, key_of("rows", str(prepared.path), prepared.fingerprint), make)

    def locate(self, family: Any) -> Any:
        """The model's files, hashed or asked for at the hub once for each model config."""
        return _once(self.known, key_of("located", _described(family)), family.locate)

    def skeleton(self, family: Any) -> Any:
        """The model without weights, made once for each model config."""
        return _once(self.known, key_of("skeleton", _described(family)), lambda: load_skeleton(family, self.locate(family)))

    def measure(self, key: str, measure: Any) -> Any:
        """`measure()`, once for each key; a copy, which its point may change."""
        return copy.deepcopy(_once(self.known, key, measure))

    def load(self, family: Any, full_training: bool, located: Any) -> Any:
        """The base for one point; only the last one used is kept, so that memory holds one.

        Quantised models are read for each point, since preparing them for training casts their weights in place; so are
        those that are trained whole.
        """
        if full_training or family.quantization:
            self.loads += 1
            return load_model(family, full_training=full_training, located=located)
        key = key_of(_described(family), located.revision)
        if key != self.base_key:
            self.forget()
            self.base, self.base_key = load_model(family, located=located), key
            self.digest = weights_digest(self.base.model)
            self.loads += 1
        return dataclasses.replace(self.base, model=modules_over(self.base.model), processor=copy.deepcopy(self.base.processor), notes=list(self.base.notes))

    def features(self, mode: str, settings: dict[str, Any], loaded: Any, collator: Any, make: Any) -> Any:
        """The stores of image features and rows (features/plan.py), one pair for each base, processor and collator."""
        from ..feature_cache.policy import identities

        key = key_of(mode, settings["output_dir"], *identities(settings, loaded, collator))
        return _once(self.stores, key, lambda: make(mode, settings, loaded, collator))

    def probed(self, settings: dict[str, Any], loaded: Any, collator: Any, prepared: Any, make: Any) -> Any:
        """A few rows of a set as the stores would keep them, computed once for each of those."""
        from ..feature_cache.policy import identities

        return _once(self.stores, key_of("probed", str(prepared.path), prepared.fingerprint, *identities(settings, loaded, collator)), make)

    def begin_point(self) -> None:
        """Peak memory is to be this point's own."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # then the peak is that of the points so far
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident memory
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def end_point(self) -> None:
        """Free what the point held, and prove that it left the base as it was."""
        gc.collect()
        if self.base is None:
            return
        for parameter in self.base.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        if self.base.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
        if weights_digest(self.base.model) != self.digest:
            log.warning("%-14s the last point changed weights of the shared base; it is loaded again for the next", "base")
            self.forget()

    def forget(self) -> None:
        self.base, self.base_key, self.digest = None, None, None
        self.stores.clear()
        gc.collect()


def _once(known: dict[str, Any], key: str, make: Any) -> Any:
    if key not in known:
        known[key] = make()
    return known[key]


def _described(family: Any) -> tuple[str, dict[str, Any]]:
    """A model config as what tells it from others."""
    return type(family).__name__, dataclasses.asdict(family)


def modules_over(model: Any) -> Any:
    """New modules over the same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def weights_digest(model: Any) -> str:
    """One hash over names, dtypes, shapes and bytes of all parameters and buffers, which several threads read."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return key_of(list(tensors), list(pool.map(tensor_hash, tensors.values())))
