"""SweepContext: the base model and the other work that the points of a sweep share in one process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.hashing import key_of, tensor_hash
from ..models.families.base import Family
from ..models.hub import Located
from ..models.load import Loaded, load_config
from ..models.quantization import saved_quantization
from ..pipeline.context import RunContext
from ..runs.parents import Parent, load_base

log = logging.getLogger("mmft")


@dataclass
class SharedBase:
    """The base model that was loaded last. digest: hash of its weights. loads: how often weights were read."""

    key: str | None = None
    loaded: Loaded | None = None
    digest: str | None = None
    loads: int = 0


@dataclass
class SweepContext(RunContext):
    """Created by whoever runs several points in one process, and passed to each of them.

    The base is shared as tensors, not as modules: each point gets new modules over the same weights, so no adapter, hook or frozen part
    of one point is left for the next. `end_point` checks that a point has not changed the weights; a changed base is loaded again.
    """

    base: SharedBase = field(default_factory=SharedBase)

    def load(self, family: Family, full_training: bool, located: Located, below: Sequence[Parent] = ()) -> Loaded:
        """The base for one point. Only the base used last is kept, so memory holds one.

        Quantised models are read for each point, because their preparation for training casts weights in place; so are fully trained ones.
        """
        if full_training or family.quantization or saved_quantization(load_config(family, located)):
            self.base.loads += 1
            return load_base(family, located, below, full_training)
        key = key_of(type(family).__name__, dataclasses.asdict(family), located.revision, [p.sha256 for p in below])
        if key != self.base.key or self.base.loaded is None:
            self.forget_base()
            self.base.loaded, self.base.key = load_base(family, located, below), key
            self.base.digest = weights_digest(self.base.loaded.model)
            self.base.loads += 1
        shared = self.base.loaded
        return dataclasses.replace(shared, model=modules_over(shared.model), processor=copy.deepcopy(shared.processor), notes=list(shared.notes))

    def begin_run(self) -> None:
        """Reset the peak of memory, which is to be the point's own; in a joint group it is the group's."""
        if self.member is not None:
            return
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # then the peak is that of all points so far
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident memory
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def end_point(self) -> None:
        """Free what the point held, and check that it left the base unchanged."""
        gc.collect()
        loaded = self.base.loaded
        if loaded is None:
            return
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        if loaded.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if weights_digest(loaded.model) != self.base.digest:
            log.warning("%-14s the last point changed weights of the shared base; it is loaded again for the next", "base")
            self.forget_base()

    def forget_base(self) -> None:
        """Drop the base model and what was computed with it."""
        self.base.key, self.base.loaded, self.base.digest = None, None, None
        self.base_memo.clear()
        gc.collect()


def modules_over(model: torch.nn.Module) -> torch.nn.Module:
    """New modules over the same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def weights_digest(model: torch.nn.Module) -> str:
    """One hash over names, dtypes, shapes and bytes of all parameters and buffers, read by several threads."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return key_of(list(tensors), list(pool.map(tensor_hash, tensors.values())))
