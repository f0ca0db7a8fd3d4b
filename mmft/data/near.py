"""Near-duplicates: what images look like, as 200 bytes each, and the pairs of images that look alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

BITS = 64
SIDE = 32  # pixels of the small picture that is hashed
LOW = 8  # lowest frequencies of each direction, one bit each
COLOURS = 8  # pixels of the smaller picture whose colours are compared
SAMPLED = 64  # pixels of a side that are looked at: two for each of the small picture
ENOUGH = SAMPLED  # pixels of a side that a JPEG must keep where it is decoded for its hash
FLAT = 2000.0  # a picture whose frequencies all are smaller has no pattern: a wave of 2 grey levels (of 255) has 2 * 32 * 32 = 2048
AGREEMENT = 0.95  # least correlation of the colours of near-duplicates
LOOK = np.dtype([("known", "u1"), ("hash", "<u8"), ("colours", "u1", 3 * COLOURS * COLOURS)])  # of one image, in a file
FEW = 4096
AT_ONCE = 1 << 22  # pairs of hashes compared at once
CHECKED = 1 << 13  # pairs whose colours are compared at once
HEAD = 32  # images of one hash that are compared with images of other hashes; further ones are compared with these alone
LISTED = 1000  # pairs listed; all are counted


@cache
def _cosines() -> np.ndarray:
    """(LOW, SIDE): rows of the DCT-II matrix of length SIDE, scaled as by scipy.fftpack.dct."""
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))


@cache
def _ones() -> np.ndarray:
    """The number of ones in each 16-bit number."""
    return np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


def look(picture: Image.Image) -> bytes:
    """What an image looks like, as one element of LOOK: a perceptual hash and its colours. picture: RGB, upright."""
    small = shrunk(picture)
    number = perceptual_hash(small)
    return bytes(LOOK.itemsize) if number is None else b"\1" + number.to_bytes(8, "little") + small.reduce(SIDE // COLOURS).tobytes()


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture with SIDE x SIDE pixels, each the mean of four pixels of the large one: to read all of them takes as long as to decode them."""
    from PIL import Image

    return picture.resize((SAMPLED, SAMPLED), Image.Resampling.NEAREST).reduce(SAMPLED // SIDE)


def perceptual_hash(small: Image.Image) -> int | None:
    """64 bits that hardly change when an image is scaled, recompressed or cropped a little: `phash` of the package imagehash.

    small: SIDE x SIDE. A bit says whether one of its 8 x 8 lowest frequencies (DCT-II of the grey values) is above their median. None for a
    picture without a pattern. imagehash itself would load scipy.fftpack and PyWavelets at every preparation.
    """
    low = _cosines() @ np.asarray(small.convert("L"), np.float64) @ _cosines().T
    ordered = np.sort(low, axis=None)
    if max(-ordered[0], ordered[-2]) < FLAT:  # the last one is the mean
        return None
    return int.from_bytes(np.packbits(low > (ordered[BITS // 2 - 1] + ordered[BITS // 2]) / 2).tobytes(), "big")


def bit_count(values: np.ndarray) -> np.ndarray:
    """The number of ones in each uint64."""
    if hasattr(np, "bitwise_count"):  # from numpy 2.0 on
        return np.bitwise_count(values)
    return _ones()[np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 4)].sum(axis=-1, dtype=np.uint8)


def close_pairs(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Blocks (pairs, 3) of (i, j, differing bits) with i < j, each pair once. hashes: (n,) uint64.

    Two hashes that differ in at most `distance` bits are equal in one of distance + 1 bands of bits, so only hashes with an equal band are
    compared; of FEW hashes all.
    """
    if len(hashes) < 2:
        return
    edges = np.linspace(0, BITS, distance + 2).astype(int) if len(hashes) > FEW else np.zeros(2, int)
    masks = [np.uint64(((1 << int(high)) - 1) ^ ((1 << int(low)) - 1)) for low, high in zip(edges, edges[1:])]
    for number, mask in enumerate(masks):
        band = hashes & mask
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1], True])
        for low, high in zip(starts, starts[1:]):
            members = order[low:high]
            step = max(1, AT_ONCE // len(members))
            for first in range(0, len(members) - 1, step):
                rows = members[first : first + step]
                differing = hashes[rows, None] ^ hashes[None, members[first:]]
                bits = bit_count(differing)
                found = np.argwhere(bits <= distance)
                found = found[found[:, 1] > found[:, 0]]
                for earlier in masks[:number]:  # a pair that is equal in an earlier band was found there
                    found = found[(differing[found[:, 0], found[:, 1]] & earlier) != 0]
                if len(found):
                    i, j = rows[found[:, 0]], members[first:][found[:, 1]]
                    yield np.stack([np.minimum(i, j), np.maximum(i, j), bits[found[:, 0], found[:, 1]]], axis=1)


@dataclass
class NearDuplicates:
    """The near-duplicates among images 0, 1, ...: different files that look alike.

    pairs: (listed, 3), the closest ones as (image, image, differing bits). number: of all pairs. group: (images,) the number of the first
    image that an image looks like, directly or through others; its own number for most.
    """

    pairs: np.ndarray
    number: int
    group: np.ndarray


def near_duplicates(looks: np.ndarray, used: np.ndarray, distance: int, source: np.ndarray | None = None, contents: np.ndarray | None = None) -> NearDuplicates:
    """Pairs whose hashes differ in at most `distance` bits and whose colours agree. looks: (images,) LOOK. used: (images,) bool.

    source, contents: (images,) int. With them, pairs of one source and pairs with the same contents join groups, but are neither counted nor listed.
    The hash alone takes drawings and pages for near-duplicates whose dark places are alike.
    """
    result = NearDuplicates(np.zeros((0, 3), np.int64), 0, np.arange(len(looks)))
    joined = np.zeros((0, 2), np.int64)
    for candidates in _candidates(looks, np.flatnonzero(used & looks["known"].astype(bool)), distance):
        for start in range(0, len(candidates), CHECKED):
            pairs = candidates[start : start + CHECKED]
            pairs = pairs[_agreement(looks["colours"][pairs[:, 0]], looks["colours"][pairs[:, 1]]) >= AGREEMENT]
            if not len(pairs):
                continue
            joined = np.concatenate([joined, pairs[:, :2]])
            for kind in (source, contents):
                if kind is not None:
                    pairs = pairs[kind[pairs[:, 0]] != kind[pairs[:, 1]]]
            result.number += len(pairs)
            result.pairs = np.concatenate([result.pairs, pairs])
            result.pairs = result.pairs[np.lexsort((result.pairs[:, 1], result.pairs[:, 0], result.pairs[:, 2]))][:LISTED]
        if len(joined) > 1 << 20:
            result.group, joined = _join(result.group, joined), joined[:0]
    result.group = _join(result.group, joined)
    return result


def _candidates(looks: np.ndarray, images: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Blocks of pairs (image, image, differing bits), the first image before the second."""
    hashes = np.array(looks["hash"][images])
    order = np.argsort(hashes, kind="stable")
    place = np.empty(len(order), np.int64)  # of an image among those with its hash
    place[order] = np.arange(len(order)) - np.searchsorted(hashes[order], hashes[order])
    head = np.flatnonzero(place < HEAD)
    for block in close_pairs(hashes[head], distance):
        i, j = images[head[block[:, 0]]], images[head[block[:, 1]]]
        yield np.stack([i, j, block[:, 2].astype(np.int64)], axis=1)
    for further in np.unique(hashes[place >= HEAD]):
        same = np.flatnonzero(hashes == further)
        i, j = (side.reshape(-1) for side in np.meshgrid(images[same[:HEAD]], images[same[HEAD:]]))
        yield np.stack([np.minimum(i, j), np.maximum(i, j), np.zeros_like(i)], axis=1)


def _agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(pairs,) Pearson's correlation of the colours. one, other: (pairs, values) uint8."""
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (one.astype(np.float32), other.astype(np.float32)))
    return (a * b).sum(axis=1) / np.maximum(np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)), 1e-6)


def _join(group: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The groups after the images of each pair are joined; a group has the number of its first image."""
    parent = group.copy()

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = int(parent[item])
        return item

    for i, j in pairs.tolist():
        first, second = sorted((find(i), find(j)))
        parent[second] = first
    while (parent != parent[parent]).any():
        parent = parent[parent]
    return parent
