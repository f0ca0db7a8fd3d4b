"""Cache: the rows of a run as tokens and its images as features, each computed once; CachedCollator makes batches of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ..collators.base import Collator, Encoded
from .image_features import Taken, Uncacheable, generates_from_features
from .store import Store

log = logging.getLogger("mmft")

REMEMBERED = 16384  # rows; their texts take some megabytes
CHUNK = {"cpu": 8, "cuda": 32}  # rows read and images computed at once; more pays on neither


class Cache:
    """`images`: features by the sha256 of an image file. `rows`: token ids, labels and per-token values by row content.

    Both stores are made for one model, processor and collator (features/plan.py). The model is used in eval mode and
    without gradients, as it was loaded; what an adapter adds lies behind the features.
    """

    def __init__(self, collator: Collator, model: Any, taken: Taken, images: Store, rows: Store):
        self.collator, self.model, self.taken, self.images, self.rows = collator, model, taken, images, rows
        self.chunk = CHUNK.get(model.device.type, CHUNK["cpu"])

    def fill(self, samples: Iterable[Any], generation: bool) -> None:
        """Compute what is missing of these samples, chunk by chunk; on a GPU the next chunk is read meanwhile."""
        with self.images.building(), self.rows.building():
            for group, new, encoded in self._read(self._groups(samples, generation), generation):
                images = self.taken.compute(self.model, encoded[1], sum(len(s.sha256) for s in group)) if new else None
                self.keep(group, encoded[0], images, generation)

    def _read(self, groups: Iterator[tuple[list[Any], bool]], generation: bool) -> Iterator[tuple[list[Any], bool, Any]]:
        """Each chunk with its rows encoded. A GPU's next chunk is read in a thread, but on a CPU the model needs all cores: it took a fifth longer so."""
        if self.model.device.type == "cpu":
            yield from ((group, new, self.collator.encode_checked(group, generation)) for group, new in groups)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for group, new in groups:
                upcoming = reader.submit(self.collator.encode_checked, group, generation)
                if waiting:
                    yield *waiting[:2], waiting[2].result()
                waiting = (group, new, upcoming)
            if waiting:
                yield *waiting[:2], waiting[2].result()

    def _groups(self, samples: Iterable[Any], generation: bool) -> Iterator[tuple[list[Any], bool]]:
        """Chunks of samples that are not known yet: those with an image whose features are missing, and those without one."""
        groups: dict[bool, list[Any]] = {True: [], False: []}
        coming: set[str] = set()
        for sample in samples:
            missing = [s for s in sample.sha256 if s not in self.images and s not in coming]
            new = bool(missing)
            if not new and row_key(sample, generation) in self.rows:
                continue
            coming.update(missing)
            groups[new].append(sample)
            if len(groups[new]) == self.chunk:
                yield groups[new], new
                groups[new] = []
        for new in (True, False):
            if groups[new]:
                yield groups[new], new

    def keep(self, samples: Sequence[Any], rows: Sequence[Encoded], images: list[dict[str, Any]] | None, generation: bool = False) -> None:
        """Samples that have been encoded; `images`: the features of all their images in order, where they were computed."""
        self.rows.add({row_key(s, generation): packed(row) for s, row in zip(samples, rows, strict=True)})
        if images is not None:
            self.images.add(dict(zip((sha for s in samples for sha in s.sha256), images, strict=True)))

    def knows(self, samples: Sequence[Any], generation: bool) -> bool:
        return all(row_key(s, generation) in self.rows and all(i in self.images for i in s.sha256) for s in samples)


class CachedCollator:
    """A collator whose batches hold image features in place of pixels; otherwise the collator it was made of."""

    def __init__(self, collator: Collator, cache: Cache):
        self.collator, self.cache = collator, cache
        self.generates = generates_from_features(cache.model)
        self.off = False

    def fill(self, samples: Iterable[Any], generation: bool) -> None:
        """Compute what is missing of these samples now; an image whose features cannot be told apart ends the caching, not the run."""
        try:
            if not self.off:
                self.cache.fill(samples, generation)
        except Uncacheable as error:
            log.warning("%-14s off from here on: %s", "vision cache", error)
            self.off = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        return self._batch(samples, generation=False)

    def prompt(self, samples: Sequence[Any]) -> dict[str, Any]:
        return self._batch(samples, generation=True)

    def _batch(self, samples: Sequence[Any], generation: bool) -> dict[str, Any]:
        cached = self.generates or not generation
        if cached and not self.cache.knows(samples, generation):
            self.fill(samples, generation)
        if self.off or not cached:
            return self.collator.prompt(samples) if generation else self.collator(samples)
        wanted = [row_key(s, generation) for s in samples]
        last, batch = self.cache.rows.last
        if wanted != last:  # points that are trained in step, in one order, ask for the same batch one after the other
            batch = self._make(samples, generation)
            self.cache.rows.last = wanted, batch
        return {**batch, "row_ids": [s.id for s in samples]} if "row_ids" in batch else dict(batch)

    def _make(self, samples: Sequence[Any], generation: bool) -> dict[str, Any]:
        rows = [unpacked(self.cache.rows[row_key(s, generation)]) for s in samples]
        images = [self.cache.images[sha] for s in samples for sha in s.sha256]
        return self.collator.assemble(samples, rows, self.cache.taken.inputs(images), generation)


def row_key(sample: Any, generation: bool) -> str:
    return f"{sample.content}{'?' if generation else ''}"


class Remembered(Sequence):
    """Rows that are read from their file once; the last of them are kept, and the runs of one process share them."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows
        self._row = lru_cache(maxsize=REMEMBERED)(rows.__getitem__)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self._row(index)


def packed(row: Encoded) -> dict[str, Any]:
    import torch

    kinds = {"ids": row.ids, "labels": row.labels, **{f"extra.{k}": v for k, v in row.extra.items()}}
    return {k: torch.tensor(v, dtype=torch.int32) for k, v in kinds.items()}


def unpacked(entry: dict[str, Any]) -> Encoded:
    extra = {k.removeprefix("extra."): v.numpy() for k, v in entry.items() if k.startswith("extra.")}
    return Encoded(entry["ids"].numpy(), entry["labels"].numpy(), extra)
