"""FeatureCache: the rows of a run as tokens and its images as features, each computed once; CachedCollator makes batches of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..collators.base import Collator
from ..collators.types import Batch, Encoded
from .image_features import Entry, FeatureLayout, Uncacheable, generates_from_features
from .store import Store

if TYPE_CHECKING:
    from ..data.sample import Sample

log = logging.getLogger("mmft")

ROWS_IN_MEMORY = 16384  # their texts take some megabytes
CHUNK = {"cpu": 8, "cuda": 32}  # rows encoded and images computed at once; larger chunks were not faster


class FeatureCache:
    """`images`: features by the sha256 of an image file. `rows`: token ids, labels and values per token, by row content.

    Both stores belong to one model, processor and collator (policy.py). The model is used in eval mode and without gradients, as it
    was loaded; an adapter acts only behind the features.
    """

    def __init__(self, collator: Collator, model: Any, layout: FeatureLayout, images: Store, rows: Store):
        self.collator, self.model, self.layout, self.images, self.rows = collator, model, layout, images, rows
        self.chunk = CHUNK.get(model.device.type, CHUNK["cpu"])

    def fill(self, samples: Iterable[Sample], generation: bool) -> None:
        """Compute what is missing of these samples, chunk by chunk; on a GPU the next chunk is read meanwhile."""
        with self.images.building(), self.rows.building():
            for group, with_images, (encoded, tensors) in self._encoded(self._missing(samples, generation), generation):
                images = self.layout.compute(self.model, tensors, len(self.image_keys(group, encoded))) if with_images else None
                self.add(group, encoded, images, generation)

    def _encoded(self, groups: Iterator[tuple[list[Sample], bool]], generation: bool) -> Iterator[tuple[list[Sample], bool, Any]]:
        """Each chunk with its encoded rows. On a GPU a thread reads the next chunk; on a CPU that took a fifth longer."""
        if self.model.device.type == "cpu":
            yield from ((group, with_images, self.collator.encode_checked(group, generation)) for group, with_images in groups)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for group, with_images in groups:
                upcoming = reader.submit(self.collator.encode_checked, group, generation)
                if waiting:
                    yield *waiting[:2], waiting[2].result()
                waiting = (group, with_images, upcoming)
            if waiting:
                yield *waiting[:2], waiting[2].result()

    def _missing(self, samples: Iterable[Sample], generation: bool) -> Iterator[tuple[list[Sample], bool]]:
        """Chunks of samples that are not stored yet: (samples, whether features of their images are missing)."""
        groups: dict[bool, list[Sample]] = {True: [], False: []}
        coming: set[str] = set()
        for sample in samples:
            missing = [k for k in self.collator.image_keys(sample) if k not in self.images and k not in coming]
            if not missing and row_key(sample, generation) in self.rows:
                continue
            coming.update(missing)
            group = groups[bool(missing)]
            group.append(sample)
            if len(group) == self.chunk:
                yield group, bool(missing)
                groups[bool(missing)] = []
        for with_images in (True, False):
            if groups[with_images]:
                yield groups[with_images], with_images

    def add(self, samples: Sequence[Sample], rows: Sequence[list[Encoded]], images: list[Entry] | None, generation: bool = False) -> None:
        """Store encoded samples. images: the features of all their images in order, if they were computed."""
        self.rows.add({row_key(s, generation): packed(row) for s, row in zip(samples, rows, strict=True)})
        if images is not None:
            self.images.add(dict(zip(self.image_keys(samples, rows), images, strict=True)))

    def has(self, samples: Sequence[Sample], generation: bool) -> bool:
        """Whether everything about these samples is stored."""
        return all(row_key(s, generation) in self.rows and all(k in self.images for k in self.collator.image_keys(s)) for s in samples)

    def image_keys(self, samples: Sequence[Sample], rows: Sequence[list[Encoded]]) -> list[str]:
        """The keys of the images of all sequences of these samples, in the order of their features."""
        keys = [self.collator.image_keys(s) for s in samples]
        return [key for own, row in zip(keys, rows, strict=True) for sequence in row for key in own[: sequence.n_images]]


class CachedCollator:
    """A collator whose batches hold image features instead of pixels; in all else the collator it wraps."""

    def __init__(self, collator: Collator, cache: FeatureCache):
        self.collator, self.cache = collator, cache
        self.generates = generates_from_features(cache.model)
        self.off = False

    def fill(self, samples: Iterable[Sample], generation: bool) -> None:
        """Compute what is missing of these samples now. If the features of an image cannot be separated, caching ends, not the run."""
        try:
            if not self.off:
                self.cache.fill(samples, generation)
        except Uncacheable as error:
            log.warning("%-14s off from here on: %s", "vision cache", error)
            self.off = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self._batch(samples, generation=False)

    def prompt(self, samples: Sequence[Sample]) -> Batch:
        return self._batch(samples, generation=True)

    def _batch(self, samples: Sequence[Sample], generation: bool) -> Batch:
        cached = self.generates or not generation
        if cached and not self.cache.has(samples, generation):
            self.fill(samples, generation)
        if self.off or not cached:
            return self.collator.prompt(samples) if generation else self.collator(samples)
        keys = [(row_key(s, generation), s.weight) for s in samples]
        last_keys, batch = self.cache.rows.last_batch
        if keys != last_keys:  # jointly trained runs of one order ask for the same batch one after another
            batch = self._assemble(samples, generation)
            self.cache.rows.last_batch = keys, batch
        if "row_ids" not in batch:
            return dict(batch)
        # the stored batch may be of other rows of the same content; a row of several sequences is named several times
        ids = [s.id for s in samples]
        return {**batch, "row_ids": [ids[i] for i in batch["row_ids"]]}

    def _assemble(self, samples: Sequence[Sample], generation: bool) -> Batch:
        rows = [unpacked(self.cache.rows[row_key(s, generation)]) for s in samples]
        images = [self.cache.images[key] for key in self.cache.image_keys(samples, rows)]
        batch = self.collator.assemble(samples, rows, self.cache.layout.inputs(images), generation)
        return batch if generation else {**batch, "row_ids": [i for i, row in enumerate(rows) for _ in row]}


def row_key(sample: Sample, generation: bool) -> str:
    """The key of a row; a prompt to generate from is another row than the training row."""
    return f"{sample.content}{'?' if generation else ''}"


class RowsInMemory(Sequence[Any]):
    """Rows that are read from their file once; the latest are kept, and the runs of one process share them."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows
        self._row = lru_cache(maxsize=ROWS_IN_MEMORY)(rows.__getitem__)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self._row(index)


def packed(row: list[Encoded]) -> dict[str, torch.Tensor]:
    """The sequences of an encoded row as tensors, end to end; `sizes` holds the tokens and images of each."""
    values: dict[str, Any] = {"sizes": [[len(s.ids), s.n_images] for s in row]}
    values |= {"ids": [i for s in row for i in s.ids], "labels": [i for s in row for i in s.labels]}
    values |= {f"extra.{k}": [i for s in row for i in s.extra[k]] for k in row[0].extra}
    tensors = {k: torch.tensor(v, dtype=torch.int32) for k, v in values.items()}
    if any(s.weights is not None for s in row):
        weights = [w for s in row for w in (s.weights if s.weights is not None else [1.0] * len(s.ids))]
        tensors["weights"] = torch.tensor(weights, dtype=torch.float32)
    return tensors


def unpacked(entry: dict[str, torch.Tensor]) -> list[Encoded]:
    arrays: dict[str, Any] = {k: v.numpy() for k, v in entry.items()}
    row, start = [], 0
    for length, n_images in arrays["sizes"].tolist():
        ids, labels = (arrays[k][start : start + length] for k in ("ids", "labels"))
        extra = {k.removeprefix("extra."): v[start : start + length] for k, v in arrays.items() if k.startswith("extra.")}
        row.append(Encoded(ids, labels, extra, n_images, arrays["weights"][start : start + length] if "weights" in arrays else None))
        start += length
    return row
