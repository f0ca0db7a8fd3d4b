"""Images inside parquet files are read where they lie: compressed or not, in dictionaries, lists and structs; what has no place of its own is copied."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small import all_rows, make

from mmft.common.errors import UserError
from mmft.data.images import MOST_PAGE, ImageError, inside
from mmft.data.sources.table import Table


def noise(number: int) -> bytes:
    """A picture that does not compress."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = 60) -> pa.Table:
    """A picture in a struct, one by itself, and a list of up to three; some stand in several rows, some are missing."""
    return pa.table({
        "image": [{"bytes": noise(n % 23), "path": f"{n}.png"} for n in range(count)],
        "plain": [noise(n) if n % 5 else None for n in range(count)],
        "several": [[{"bytes": noise(n + k), "path": None} for k in range(n % 4)] or None for n in range(count)],
        "text": [f"row {n}" for n in range(count)],
    })  # fmt: skip


def written(folder, **options):
    path = folder / "rows.parquet"
    pq.write_table(rows(), path, **{"row_group_size": 25, "data_page_size": 3000, "dictionary_pagesize_limit": 3000, **options})
    return path


def source(path, column="image", **more):
    return Table(path=str(path), columns={"image": column, "text": "text"}, near_distance=None, max_bad_share=0.5, **more)


LAYOUTS = [
    {"compression": "none", "use_dictionary": False}, {"compression": "none", "data_page_version": "2.0"}, {"compression": "snappy"}, {"compression": "snappy", "use_dictionary": False},
    {"compression": "zstd", "data_page_version": "2.0"}, {"compression": "gzip", "data_page_size": 1 << 20}, {"compression": "brotli", "data_page_version": "2.0", "use_dictionary": False},
]  # fmt: skip


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("column", ["image", "plain", "several"])
def test_images_are_not_copied_and_are_those_of_their_rows(tmp_path, options, column):
    path = written(tmp_path, **options)
    prepared = make(source(path, column), tmp_path)
    assert not (prepared.path / "images").exists() and not any(image["stored"] for image in prepared.images())
    expected = [[cell["bytes"] if isinstance(cell, dict) else cell for cell in (value if isinstance(value, list) else [value])]
                for value in rows()[column].to_pylist() if value is not None]  # fmt: skip
    samples = all_rows(prepared)
    assert len(samples) == len(expected)
    for sample, data in zip(samples, expected):
        assert sample.sha256 == tuple(hashlib.sha256(one).hexdigest() for one in data)
        assert [np.asarray(image).tolist() for image in sample.load_images()] == [np.asarray(Image.open(io.BytesIO(one))).tolist() for one in data]
    if options["compression"] == "none":
        whole, place = path.read_bytes(), inside(samples[0].image_paths[0])
        assert place.page is None and whole[place.offset : place.offset + place.size] == expected[0][0]


def test_a_set_is_the_same_whether_its_images_are_copied_or_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    inplace = make(source(written(tmp_path / "a", compression="snappy")), tmp_path / "a")
    codec = make(source(written(tmp_path / "b", compression="lz4")), tmp_path / "b")  # a codec with two framings
    delta = make(source(written(tmp_path / "c", use_dictionary=False, column_encoding={"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"})), tmp_path / "c")
    assert inplace.fingerprint == codec.fingerprint == delta.fingerprint and inplace.manifest["images"] == 60
    assert len(list((codec.path / "images").glob("*/*"))) == len(list((delta.path / "images").glob("*/*"))) == 23


def test_images_of_a_file_outside_the_root_are_copied(tmp_path):
    (tmp_path / "root").mkdir()
    prepared = make(source(written(tmp_path), root=str(tmp_path / "root")), tmp_path)
    assert len(list((prepared.path / "images").glob("*/*"))) == 23 and all(sample.load_images() for sample in all_rows(prepared))


def test_a_page_that_is_too_large_is_not_unpacked_for_one_image(tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.data.readers.parquet_places.MOST_PAGE", 1000)
    prepared = make(source(written(tmp_path, use_dictionary=False)), tmp_path)
    assert len(list((prepared.path / "images").glob("*/*"))) == 23
    huge = tmp_path / "rows.parquet" / f"@4+10~snappy~{MOST_PAGE + 1}@0+5" / "x"
    with pytest.raises(ValueError, match="more than"):
        inside(huge).read()


def test_a_file_that_changed_is_noticed(tmp_path):
    path = written(tmp_path, compression="none")
    sample = all_rows(make(source(path), tmp_path))[3]
    data = bytearray(path.read_bytes())
    place = inside(sample.image_paths[0])
    data[place.offset + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"rows.parquet/@\d+\+\d+/image-4: changed image"):
        sample.load_images()
    path.write_bytes(data[: place.offset + 10])
    with pytest.raises(ImageError, match="ends within it"):
        sample.load_images()
    path.unlink()
    with pytest.raises(UserError, match="missing image"):
        sample.load_images()


def test_damaged_pages_are_told_by_arrow(tmp_path):
    """Flipped bytes of page headers and bodies: either the rows are read as before, or one line names the file."""
    path = written(tmp_path, compression="snappy")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(good)
        data[rng.integers(4, len(good) - 2000)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(data)
        try:
            prepared = make(source(path), tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            for sample in all_rows(prepared):
                sample.load_images()
