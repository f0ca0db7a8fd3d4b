"""Mix: the keys of `data=mix`, several data sets in one run. PreparedMix: their prepared sets, read as one."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..common.errors import UserError, nearest
from ..config.build import in_place
from ..config.overrides import check_source_name
from .mix_near import Leak, near_across
from .mixing import Mixing, mixing
from .prepared import FORMAT, AlikePair, ImageFile, Manifest, PreparedData, SplitCounts
from .sample import Sample
from .selection import MixedRows, Selection, Weighted
from .sources.base import BaseSource, from_keys
from .without import read_ids
from .wording import shown

if TYPE_CHECKING:
    import pyarrow as pa

ADD = "add data.sources.NAME=OPTION with any name and an option of data, e.g. data.sources.captions=coco"


@dataclass(frozen=True)
class MixSplits:
    """near: leave out training rows that show a near-duplicate of an image which another source holds out."""

    near: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.near, bool):
            raise UserError(f"data.splits.near={self.near}: must be true or false")


@dataclass(kw_only=True)
class Mix:
    """name: of run directories and reports. sources: name -> data source. draws: training rows drawn in an epoch (null: as many as
    there are). without: ids of rows that are left out, each with its source (`chat/17`), a file or a list. splits: see MixSplits; how many rows are held out is a key
    of each source. The rows lie in the order of the
    sources' names. Raises UserError for sources that cannot be mixed.
    """

    name: str = "mix"
    sources: Mapping[str, BaseSource] = field(default_factory=dict)
    draws: int | None = None
    without: str | Sequence[str] | None = None
    splits: Mapping[str, bool] | MixSplits = field(default_factory=lambda: MixSplits())

    def __post_init__(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise UserError(f"data.sources={self.sources}: must be data sets by name; {ADD}")
        known = [name for name, source in self.sources.items() if isinstance(source, BaseSource)]
        for name, source in self.sources.items():
            check_source_name(str(name))
            if isinstance(source, Mix):
                raise UserError(f"data.sources.{name}=mix: a mix cannot be a source of a mix; name its sources here")
            if not isinstance(source, BaseSource):
                raise UserError(f"data.sources.{name}: no data set is chosen for this source.{nearest(str(name), known)} Choose one with data.sources.{name}=OPTION")
            _check_weight(name, source.weight)
            if source.loss_weight is not None and not _positive(source.loss_weight):
                raise UserError(f"data.sources.{name}.loss_weight={source.loss_weight}: must be a number above 0, or null for 1; weight=0 trains none of the source")
        if not isinstance(self.splits, MixSplits):
            self.splits = from_keys(MixSplits, self.splits, "data.splits")
        self.sources = dict(sorted(self.sources.items()))  # the order in which they are typed changes nothing
        if self.sources and not self.trained:
            raise UserError("data.sources: every weight is 0, so nothing would be trained; give one source a weight above 0, or none")
        if self.draws is not None and (isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1):
            raise UserError(f"data.draws={self.draws}: must be a whole number of rows above 0, or null for as many as there are")

    @property
    def trained(self) -> list[str]:
        """The sources whose training rows are used."""
        return [name for name, source in self.sources.items() if source.weight != 0]

    def mixing(self, sizes: Mapping[str, int]) -> Mixing:
        """sizes: training rows of each trained source."""
        return mixing(sizes, {name: self.sources[name].weight for name in sizes}, self.draws)

    def prepare(self, prepare: Callable[[BaseSource], PreparedData]) -> PreparedMix:
        """Every source prepared by itself, in order. Raises UserError that names the source; the sets of the others stay."""
        if not self.sources:
            raise UserError(f"data=mix: there are no sources; {ADD}")
        self._leave_out()
        parts = {}
        for name, source in self.sources.items():
            where = f"data.sources.{name}"
            try:
                parts[name] = prepare(source)
            except UserError as error:
                raise UserError(f"{where}: {in_place(str(error), where, vars(source))}") from None
        return PreparedMix(self, parts)


    def _leave_out(self) -> None:
        """Give every source the ids of `without` that are its own. Raises UserError for an id of no source."""
        for each in sorted(read_ids(self.without)) if self.without is not None else ():
            name, _, own = each.partition("/")
            if name not in self.sources:
                raise UserError(f"data.without={self.without}: {shown(each, 60)} names no source; ids begin with one of {', '.join(f'{n}/' for n in self.sources)}")
            source = self.sources[name]
            source.without = [*(read_ids(source.without) if source.without is not None else ()), own]


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_weight(name: str, weight: object) -> None:
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise UserError(f"data.sources.{name}.weight={weight}: must be a number, 0 or above (0: the rows are only held out), or null")


class PreparedMix(PreparedData):
    """The prepared sets of a mix as one set: each split holds the rows of all sources, one source after another.

    parts: source -> its prepared set. A training row that shows a held-out image of another source is left out. The fingerprint is one
    hash of the names and fingerprints of the sources: weights do not change it, since the held-out rows stay the same.
    Raises UserError if no training row of a source is left.
    """

    def __init__(self, mix: Mix, parts: Mapping[str, PreparedData]) -> None:
        self.mix, self.parts = mix, dict(parts)
        self.path = next(iter(self.parts.values())).path.parent
        self.fingerprint = _hash({name: part.fingerprint for name, part in self.parts.items()})
        self._kept: dict[str, list[int]] = {}  # training rows of the sources that lose some
        self._notes: list[str] = []
        held_out = {name: part.held_out_images() for name, part in self.parts.items()}
        self.across = near_across(self.parts, mix.trained, self.path)
        for name in mix.trained:
            self._leave_out(name, {other: images for other, images in held_out.items() if other != name})
        self._note_near()
        self.splits = {}
        for name in ("train", "validation", "test"):
            if self._sources(name):
                self.splits[name] = len(self.split(name))
        self.manifest = self._manifest()

    def split(self, name: str) -> Sequence[Sample]:
        if not self._sources(name):
            raise UserError(f"data={self.mix.name}: no source has a {name} split; hold rows out with data.sources.NAME.splits.{name}=...")
        return MixedRows({source: self._rows(source, name) for source in self._sources(name)})

    def images(self) -> Iterator[ImageFile]:
        for part in self.parts.values():
            yield from part.images()

    def alike(self) -> Iterator[AlikePair]:
        """The closest pairs of images of two sources."""
        yield from self.across.pairs

    def close(self) -> None:
        for part in self.parts.values():
            part.close()

    def describe(self) -> list[str]:
        lines = [f"{name}: {in_place(line, f'data.sources.{name}', vars(self.mix.sources[name]))}" for name, part in self.parts.items() for line in part.describe()]
        sizes = {name: len(self._rows(name, "train")) for name in self.mix.trained}
        held_out_only = [f"{name}: only held out (weight 0)" for name in self.parts if name not in self.mix.trained]
        return [*lines, *self._notes, *self.mix.mixing(sizes).describe(), *held_out_only]

    def mixing(self, rows: Sequence[Sample]) -> Mixing:
        """The draws from training rows that may have lost some since they were prepared. rows: a MixedRows."""
        assert isinstance(rows, MixedRows)
        return self.mix.mixing({name: len(part) for name, part in rows.parts.items()})

    def _sources(self, split: str) -> list[str]:
        """The sources that have rows in a split."""
        names = self.mix.trained if split == "train" else list(self.parts)
        return [name for name in names if self.parts[name].splits.get(split)]

    def _rows(self, source: str, split: str) -> Sequence[Sample]:
        rows = self.parts[source].split(split)
        rows = Selection(rows, self._kept[source]) if split == "train" and source in self._kept else rows
        weight = self.mix.sources[source].loss_weight
        return rows if weight in (None, 1) or split != "train" else Weighted(rows, float(weight))

    def _leave_out(self, source: str, held_out: Mapping[str, pa.Array]) -> None:
        """Leave out the training rows of a source that show an image which another one holds out."""
        import pyarrow as pa

        part = self.parts[source]
        leaks = {name: part.rows_that_show(images) for name, images in held_out.items()}
        same = set().union(*leaks.values())
        near = {leak["other"]: part.rows_that_show(pa.array(leak["images"], pa.string())) - same for leak in self.across.leaks if leak["source"] == source and self._keeps_apart(leak)}
        alike = set().union(*near.values())
        if not same and not alike:
            return
        left_out = same | alike
        self._kept[source] = [i for i in range(part.splits["train"]) if i not in left_out]
        others = ", ".join(name for name in self.parts if leaks.get(name) or near.get(name))
        if not self._kept[source]:
            raise UserError(f"data.sources.{source}: every training row shows an image that {others} holds out{', or a near-duplicate of one' if alike else ''};"
                            f" hold out fewer rows there, or set data.sources.{source}.weight=0")  # fmt: skip
        for rows, by, what in ((same, leaks, "an image that it shows"), (alike, near, "an image that looks like one of its own")):
            if rows:
                first = part.split("train")[min(rows)].id
                count = f"{len(rows)} training row{'s are' if len(rows) > 1 else ' is'} left out"
                self._notes.append(f"{source}: {count}, because {', '.join(name for name, found in by.items() if found)} holds out {what} (the first: {source}/{first})")

    def _keeps_apart(self, leak: Leak) -> bool:
        """Whether the mix, or one of the two sources, has data.splits.near=true."""
        flags = (self.mix.splits, *(self.mix.sources[name].splits for name in (leak["source"], leak["other"])))
        return any(getattr(splits, "near", False) for splits in flags)

    def _note_near(self) -> None:
        """What is said of near-duplicates across sources, and of sources for which nothing is known."""
        found = self.across
        if found.number:
            pairs = "1 pair of images of two sources looks alike" if found.number == 1 else f"{found.number} pairs of images of two sources look alike"
            apart = [leak for leak in found.leaks if not self._keeps_apart(leak)]
            leaking = [f"{leak['held_out']} held-out image{'s' * (leak['held_out'] > 1)} of {leak['other']} look{'s' * (leak['held_out'] == 1)} like training images of {leak['source']}" for leak in apart]
            self._notes.append(f"near-duplicates: {pairs}" + (f"; {', '.join(leaking)} (data.splits.near=true leaves such training rows out)" if leaking else ""))
        if found.unknown and len(self.parts) > 1:
            names = ", ".join(name for name in found.unknown if self.mix.sources[name].near_distance is not None)
            if names:
                self._notes.append(f"{names}: prepared by an earlier version, so near-duplicates in other sources are not looked for; delete the prepared set to prepare it again")

    def _manifest(self) -> Manifest:
        """The counts of all sources together."""
        manifests = {name: part.manifest for name, part in self.parts.items()}
        splits: dict[str, SplitCounts] = {
            split: {"rows": rows, "images": sum(manifests[name]["splits"][split]["images"] for name in self._sources(split))} for split, rows in self.splits.items()
        }
        reasons: Counter[str] = Counter()
        for manifest in manifests.values():
            reasons.update(manifest["reasons"])
        every = list(manifests.values())
        return {
            "rejected": sum(m.get("rejected", 0) for m in every), "bad": sum(m.get("bad", 0) for m in every),
            "boxes": sum(m.get("boxes", 0) for m in every), "format": FORMAT, "name": self.mix.name, "key": _hash({name: m["key"] for name, m in manifests.items()})[:12],
            "source": {name: m["source"] for name, m in manifests.items()}, "stamp": {name: m["stamp"] for name, m in manifests.items()},
            "fingerprint": self.fingerprint, "root": None, "splits": splits, "images": sum(m["images"] for m in every),
            "rows_read": sum(m["rows_read"] for m in every), "dropped": sum(m["dropped"] for m in every), "changed": sum(m["changed"] for m in every),
            "merged": sum(m["merged"] for m in every), "archives": None, "reasons": dict(sorted(reasons.items())), "notes": self._notes,
            "created": max(m["created"] for m in every), "versions": every[0]["versions"],
        }  # fmt: skip


def mixing_of(prepared: PreparedData, rows: Sequence[Sample]) -> Mixing | None:
    """The draws of an epoch from training rows of `prepared`; None for a single data set."""
    return prepared.mixing(rows) if isinstance(prepared, PreparedMix) else None


def _hash(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(list(values.items())).encode()).hexdigest()
