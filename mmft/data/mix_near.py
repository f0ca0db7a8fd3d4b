"""Near-duplicates across the sources of a mix: pairs of images of two sources that look alike, and training rows that show one of a held-out image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from .near import near_duplicates
from .prepared import NEAR, AlikeImage, AlikePair, ImageFile, PreparedData

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1  # of the file with the result


class Leak(TypedDict):
    """Training images of `source` that look like held-out images of `other`: their sha256, and the number of those held-out images."""

    source: str
    other: str
    images: list[str]
    held_out: int


@dataclass(frozen=True)
class AcrossSources:
    """number: of all pairs of images of two sources that look alike, identical ones left out. pairs: the closest. unknown: sources whose images were not hashed."""

    number: int = 0
    pairs: list[AlikePair] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def near_across(parts: Mapping[str, PreparedData], trained: Sequence[str], folder: Path) -> AcrossSources:
    """What looks alike in the sources `parts`, of which `trained` are trained. It is found once for these sets and kept in a file in `folder`.

    The distance is the smallest data.near_distance of the sources. Sources that look for no near-duplicates, and those that were prepared by a version that did not keep
    its hashes, are left out.
    """
    unknown = [name for name, part in parts.items() if not part.has_looks and part.manifest["images"]]
    known = {name: part for name, part in parts.items() if part.has_looks}
    if len(known) < 2:
        return AcrossSources(unknown=unknown)
    key = json.dumps([VERSION, [[name, name in trained, part.manifest["key"], part.fingerprint] for name, part in known.items()]])
    file = folder / f".mix-{hashlib.sha256(key.encode()).hexdigest()[:12]}.{NEAR}"
    try:
        found = json.loads(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        found = _find(known, trained)
        try:
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(found), encoding="ascii")
            os.replace(temporary, file)
        except OSError:  # a folder that cannot be written: it is found again by the next command
            pass
    return AcrossSources(**found, unknown=unknown)


class _Found(TypedDict):
    number: int
    pairs: list[AlikePair]
    leaks: list[Leak]


def _find(parts: Mapping[str, PreparedData], trained: Sequence[str]) -> _Found:
    import pyarrow as pa

    names = list(parts)
    images = {name: part.looks() for name, part in parts.items()}
    digests = pa.concat_arrays([digests for digests, _ in images.values()])
    looks = np.concatenate([looks for _, looks in images.values()])
    source = np.repeat(np.arange(len(names)), [len(looks) for _, looks in images.values()])
    contents = digests.dictionary_encode().indices.to_numpy()
    alike = near_duplicates(looks, np.ones(len(looks), dtype=bool), min(part.near_distance for part in parts.values()), source, contents)
    splits = {split: np.concatenate([_shown(part, split, images[name][0]) for name, part in parts.items()]) for split in ("train", "validation", "test")}
    held_out, trains = splits["validation"] | splits["test"], splits["train"] & np.isin(source, [names.index(name) for name in trained if name in parts])
    leaks: list[Leak] = []
    for i in range(len(names)):
        for j in range(len(names)):
            theirs = held_out & (source == j)
            own = trains & (source == i) & ~np.isin(contents, contents[theirs])  # rows that show the same image are left out in any case
            both = np.intersect1d(alike.group[own], alike.group[theirs])
            if i != j and len(both):
                shown = np.isin(alike.group, both)
                images_of = digests.take(pa.array(np.flatnonzero(shown & own))).to_pylist()
                leaks.append({"source": names[i], "other": names[j], "images": images_of, "held_out": int((shown & theirs).sum())})
    return {"number": alike.number, "pairs": _described(alike.pairs, parts, names, source, digests, splits), "leaks": leaks}


def _described(pairs: np.ndarray, parts: Mapping[str, PreparedData], names: list[str], source: np.ndarray, digests: pa.Array, splits: dict[str, np.ndarray]) -> list[AlikePair]:
    """The pairs with the first file of each image."""
    wanted: dict[int, str] = {i: digests[i].as_py() for i in np.unique(pairs[:, :2]).tolist()}
    files: dict[tuple[str, str], ImageFile] = {}
    for number, name in enumerate(names):
        own = {digest for i, digest in wanted.items() if source[i] == number}
        for image in parts[name].images() if own else ():
            if image["sha256"] in own:
                files.setdefault((name, image["sha256"]), image)

    def described(i: int) -> AlikeImage:
        file = files[names[source[i]], wanted[i]]
        return {"image": file["path"], "stored": file["stored"], "splits": [split for split, there in splits.items() if there[i]], "source": names[source[i]]}

    return [{"bits": bits, "images": [described(i), described(j)]} for i, j, bits in pairs.tolist()]


def _shown(part: PreparedData, split: str, digests: pa.Array) -> np.ndarray:
    """(images,) bool: whether rows of a split show an image."""
    import pyarrow.compute as pc

    return pc.is_in(digests, value_set=part.image_hashes(split)).to_numpy(zero_copy_only=False)
