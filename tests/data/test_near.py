"""Near-duplicates: hashes as imagehash computes them, all close pairs, reports, and splits that keep look-alikes together."""

import io
import itertools
import json

import imagehash
import numpy as np
import pytest
from PIL import Image
from small import Given, caption_row, make, pictures, report, write_csv

from mmft.common.errors import UserError
from mmft.data import near
from mmft.data.row_numbers import RowNumbers
from mmft.data.sources.base import DISTANCE, Splits
from mmft.data.splits import DROPPED, assign


def photo(number: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of smooth random patches: like a photo it survives scaling and recompression."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def copies(number: int) -> list[bytes]:
    """The picture, recompressed, and half as large: three files with other bytes."""
    one = photo(number)
    return [encoded(one), encoded(one, "JPEG", quality=60), encoded(one.resize((80, 60)))]


def noise(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("make_picture", [photo, noise, lambda n: photo(n, (33, 200)), lambda n: photo(n).convert("L").convert("RGB")])
def test_the_hash_is_that_of_imagehash(make_picture):
    for number in range(12):
        small = near.shrunk(make_picture(number))
        bits = imagehash.phash(small).hash.flatten()
        assert near.perceptual_hash(small) == int("".join("1" if bit else "0" for bit in bits), 2)


def test_a_picture_without_a_pattern_has_no_hash():
    assert [near.perceptual_hash(Image.new("RGB", (32, 32), colour)) for colour in ("black", "white", "red")] == [None] * 3
    faint = Image.fromarray(np.tile(np.linspace(100, 101, 32).round().astype(np.uint8), (32, 1))).convert("RGB")
    clear = Image.fromarray(np.tile(np.linspace(90, 110, 32).round().astype(np.uint8), (32, 1))).convert("RGB")
    assert near.perceptual_hash(faint) is None and near.perceptual_hash(clear) is not None


def test_bits_are_counted_in_both_ways(monkeypatch):
    values = np.random.default_rng(0).integers(0, 1 << 63, (5, 7), dtype=np.uint64)
    expected = [[bin(int(v)).count("1") for v in row] for row in values]
    assert near.bit_count(values).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)  # numpy before 2.0
    assert near.bit_count(values).tolist() == expected


@pytest.mark.parametrize("few", [0, 4096])
@pytest.mark.parametrize("distance", [0, 1, 6, 16])
def test_all_close_pairs_are_found_once(monkeypatch, distance, few):
    monkeypatch.setattr(near, "FEW", few)  # in bands, or all with all
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 63, 120, dtype=np.uint64)
    for number in range(0, 60, 3):  # neighbours with 1 to 20 other bits
        flipped = rng.choice(64, number % 20 + 1, replace=False)
        hashes[number + 1] = hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64))
    hashes = np.unique(hashes)
    expected = {(i, j, bits) for i, j in itertools.combinations(range(len(hashes)), 2) if (bits := bin(int(hashes[i] ^ hashes[j])).count("1")) <= distance}
    found = [tuple(pair) for block in near.close_pairs(hashes, distance) for pair in block.tolist()]
    assert len(found) == len(set(found)) and set(found) == expected and (distance < 1 or expected)


def looks(hashes, colours=None):
    """LOOK elements with these hashes; their colours agree unless they are given as seeds."""
    found = np.zeros(len(hashes), near.LOOK)
    found["hash"], found["known"] = hashes, 1
    for number, seed in enumerate(colours or [0] * len(hashes)):
        found["colours"][number] = np.random.default_rng(seed).integers(0, 256, 192)
    return found


def test_groups_follow_chains_and_equal_hashes():
    a = 0b1111
    found = looks([a, 0, a ^ 0b11 << 10, 1 << 40, a, a ^ 0b1111 << 10])  # 0 ~ 4, 0 ~ 2 ~ 5; 5 is 4 bits from 0
    used = np.array([True, False, True, True, True, True])
    alike = near.near_duplicates(found, used, 2)
    assert alike.group.tolist() == [0, 1, 0, 3, 0, 0]
    assert sorted(map(tuple, alike.pairs.tolist())) == [(0, 2, 2), (0, 4, 0), (2, 4, 2), (2, 5, 2)] and alike.number == 4
    assert near.near_duplicates(found, used & False, 2).group.tolist() == list(range(6))


def test_colours_decide_where_hashes_are_alike():
    alike = near.near_duplicates(looks([7, 7, 7, 7], [1, 2, 1, 2]), np.ones(4, bool), 4)
    assert alike.group.tolist() == [0, 1, 0, 1] and alike.pairs.tolist() == [[0, 2, 0], [1, 3, 0]]


def test_many_images_of_one_hash_and_a_neighbour_of_them():
    hashes = [5] * 100 + [4]
    alike = near.near_duplicates(looks(hashes), np.ones(101, bool), 1)
    assert set(alike.group.tolist()) == {0}
    # pairs among the first 32 and with the neighbour, and of each further image with the first 32
    assert alike.number == 32 * 31 // 2 + 32 + 68 * 32 and len(alike.pairs) == near.LISTED


def test_a_look_is_kept_in_200_bytes_or_so():
    (found,) = np.frombuffer(near.look(photo(1)), near.LOOK)
    assert near.LOOK.itemsize == 201 and found["known"] == 1 and found["hash"] == near.perceptual_hash(near.shrunk(photo(1)))
    assert abs(found["colours"].astype(int).reshape(8, 8, 3) - np.asarray(photo(1).resize((8, 8), Image.Resampling.BOX)).astype(int)).max() < 30
    assert np.frombuffer(near.look(Image.new("RGB", (9, 9))), near.LOOK)["known"][0] == 0


def source(**keys):
    rows = [caption_row(image, f"row {n}.{kind}") for n in range(8) for kind, image in enumerate(copies(n))]
    return Given(given=rows, **keys)


def sides(prepared):
    """The splits that each of the eight pictures is in."""
    found = {n: set() for n in range(8)}
    for split in prepared.splits:
        for row in prepared.split(split):
            found[int(row.answer_text.split()[1].split(".")[0])].add(split)
    return found


def test_pairs_are_reported_with_their_splits(tmp_path):
    prepared = make(source(splits=Splits(validation=8)), tmp_path)
    pairs = [json.loads(line) for line in (prepared.path / "near_duplicates.jsonl").read_text(encoding="ascii").splitlines()]
    assert len(pairs) == 8 * 3 and all(pair["bits"] <= DISTANCE for pair in pairs)
    names = {image["images"][i]["image"] for image in pairs for i in (0, 1)}
    assert all((prepared.path / name).is_file() for name in names) and len(names) == 24
    split = sides(prepared)
    torn = [n for n, sides_of in split.items() if len(sides_of) == 2]
    assert torn, "without near=true look-alikes are divided"
    held_out = sum(len({r.sha256[0] for r in prepared.split("validation") if f"row {n}." in r.answer_text}) for n in torn)
    (note,) = [n for n in prepared.manifest["notes"] if n.startswith("near-duplicates")]
    assert "24 pairs of images look alike" in note and f"{held_out} held-out image" in note and "data.splits.near=true" in note


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_never_split(tmp_path, seed):
    prepared = make(source(splits=Splits(validation=0.25, test=3, near=True, seed=seed)), tmp_path)
    assert all(len(split) == 1 for split in sides(prepared).values())
    assert prepared.splits == {"train": 15, "validation": 6, "test": 3}
    (note,) = [n for n in prepared.manifest["notes"] if n.startswith("near-duplicates")]
    assert "held-out" not in note


def test_given_splits_lose_the_rows_that_look_like_held_out_ones(tmp_path):
    rows = [caption_row(image, f"row {n}.{kind}", split="test" if (n, kind) == (3, 1) else "train") for n in range(4) for kind, image in enumerate(copies(n))]
    kept = make(Given(given=rows), tmp_path)
    assert kept.splits == {"train": 11, "test": 1}
    prepared = make(Given(given=rows, splits=Splits(near=True)), tmp_path / "near")
    assert prepared.splits == {"train": 9, "test": 1}
    dropped = [line["reason"] for line in report(prepared) if line["action"] == "dropped"]
    assert len(dropped) == 2 and all(reason.startswith("near-duplicate in two splits: this train row shows a near-duplicate") for reason in dropped)


def test_assignment_without_near_is_what_it_was(tmp_path):
    rows = RowNumbers(tmp_path)
    rows.add([-1] * 6, [1] * 6, range(6), range(6))
    rows.close()
    digests = [bytes([n]) * 32 for n in range(6)]
    splits = Splits(validation=2)
    plain = assign(rows, digests, splits).codes
    assert (assign(rows, digests, splits, np.arange(6)).codes == plain).all() and (plain < DROPPED).all()
    together = assign(rows, digests, splits, np.array([0, 0, 2, 2, 4, 4])).codes
    assert (together[::2] == together[1::2]).all() and (together == 1).sum() == 2


def test_no_distance_means_no_hashes(tmp_path):
    prepared = make(source(near_distance=None, splits=Splits(validation=3)), tmp_path)
    assert not (prepared.path / "near_duplicates.jsonl").exists() and "near_duplicates" not in prepared.manifest
    hashed = make(source(splits=Splits(validation=3)), tmp_path / "hashed")
    assert prepared.fingerprint == hashed.fingerprint and hashed.manifest["near_duplicates"] == 24
    assert not [path for path in hashed.path.iterdir() if path.suffix == ".looks"]


@pytest.mark.parametrize(("words", "message"), [
    (["data.near_distance=40"], "data.near_distance=40: must be a number of bits from 0 to 16"),
    (["data.near_distance=0.5"], "data.near_distance=0.5: must be"),
    (["data.near_distance=null", "data.splits.near=true"], "data.splits.near=true: data.near_distance=null"),
    (["data.splits.near=yess"], "data.splits.near=yess: must be true or false"),
])  # fmt: skip
def test_wrong_values_are_one_line(mmft, words, message):
    code, _, err = mmft("prepare", *words, "data.pictures=4")
    assert code == 2 and message in err and "\n" not in err.strip() and "Traceback" not in err


def test_images_all_alike_cannot_be_divided(mmft, tmp_path):
    for n, data in enumerate(copies(1)):
        (tmp_path / f"{n}.img").write_bytes(data)
    table = write_csv(tmp_path / "t.csv", ["image", "text"], *[[f"{n}.img", "x"] for n in range(3)])
    words = ["prepare", "data=table", f"data.path={table}", "data.splits.validation=1"]
    assert mmft(*words)[0] == 0
    code, _, err = mmft(*words, "data.splits.near=true")
    assert code == 2 and "rows that share an image or show near-duplicates stay together, and the fewest that do are 3" in err


def test_plain_pictures_are_no_near_duplicates(tmp_path):
    folder = pictures(tmp_path / "plain", *[f"{n}.png" for n in range(5)])
    prepared = make(Given(given=[caption_row(f"{n}.png") for n in range(5)], root=str(folder)), tmp_path)
    assert prepared.manifest["notes"] == []


def test_names_of_splits_errors():
    with pytest.raises(UserError, match="data.splits.near=1: must be true or false"):
        Splits(near=1)


def test_drawings_are_not_looked_at(mmft, tmp_path):
    """Two shapes in the places of two others are another picture; the drawn sets keep the names of their folders."""
    from mmft.config.build import build
    from mmft.config.compose import compose

    source = build(compose(["data.pictures=12", "data.splits.validation=2"]).data, "data")
    assert source.near_distance is None and "near_distance" not in source.settings()
    assert build(compose(["data.near_distance=10"]).data, "data").settings()["near_distance"] == 10
    code, out, err = mmft("prepare", "data.pictures=12", "data.splits.validation=2")
    assert code == 0 and "near-duplicates" not in out, err
