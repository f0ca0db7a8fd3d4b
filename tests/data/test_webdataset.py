"""WebDataset shards: written by the package tarfile, read in place; every fault of a shard is one line."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from small import all_rows, make, png

from mmft.common.errors import UserError
from mmft.data.images import ImageError, inside
from mmft.data.prepare import prepare
from mmft.data.sources.webdataset import WebDataset, samples


def shard(path, files, mode="w"):
    """A tar file with these (name, bytes or text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def captions(first, last):
    return [file for n in range(first, last) for file in ((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", f"caption {n}\n"), (f"{n:04d}.json", json.dumps({"caption": f"other {n}", "width": 4})))]


@pytest.fixture
def shards(tmp_path):
    shard(tmp_path / "shards" / "000.tar", captions(0, 5))
    shard(tmp_path / "shards" / "001.tar", captions(5, 8))
    return tmp_path / "shards"


def source(path, **keys):
    return WebDataset(path=str(path), **{"columns": {"image": "image", "text": "txt", "id": "__key__"}, "splits": {"validation": 2}, **keys})


def test_samples_are_rows_and_images_stay_in_their_shards(shards, tmp_path):
    prepared = make(source(shards), tmp_path)
    rows = {row.id: row for row in all_rows(prepared)}
    assert prepared.splits == {"train": 6, "validation": 2}
    for n in range(8):
        row = rows[f"{n:04d}"]
        assert row.answer_text == f"caption {n}"
        (image,) = row.load_images()
        assert image.tobytes() == Image.open(io.BytesIO(png(n))).convert("RGB").tobytes()
    assert not (prepared.path / "images").exists(), "no image is copied"
    with tarfile.open(shards / "001.tar") as archive:  # the place is the one that tarfile knows
        member = archive.getmember("0006.png")
    place = inside(rows["0006"].image_paths[0])
    assert (place.archive, place.offset, place.size) == (shards / "001.tar", member.offset_data, member.size)


@pytest.mark.parametrize("pattern", ["{}/*.tar", "{}/{{000..001}}.tar", "{}"])
def test_forms_of_the_path(shards, tmp_path, pattern):
    assert make(source(pattern.format(shards)), tmp_path).fingerprint == make(source(shards), tmp_path).fingerprint


def test_a_key_of_the_json_file(shards, tmp_path):
    prepared = make(source(shards, columns={"image": "png", "text": "json.caption", "id": "__key__"}), tmp_path)
    assert {row.answer_text for row in all_rows(prepared)} == {f"other {n}" for n in range(8)}


def test_compressed_shards_are_the_same_rows(shards, tmp_path):
    packed = tmp_path / "packed"
    shard(packed / "000.tar.gz", captions(0, 5), "w:gz")
    shard(packed / "001.tgz", captions(5, 8), "w:gz")
    plain, found = make(source(shards), tmp_path), make(source(packed), tmp_path)
    assert plain.fingerprint == found.fingerprint and (found.path / "images").is_dir()


def test_conversations_several_pictures_and_classes(tmp_path):
    chat = [{"from": "human", "value": "<image><image>\nWhich?"}, {"from": "gpt", "value": "The first."}]
    path = shard(tmp_path / "a.tar", [("./x/1.left.png", png(1)), ("./x/1.right.png", png(2)), ("./x/1.json", json.dumps({"conversations": chat})), ("./x/1.cls", "7"), ("./x/._1.png", b"mac")])
    (row,) = all_rows(make(source(path, columns={"image": "images", "messages": "json.conversations", "id": "__key__"}, splits={}), tmp_path))
    assert row.id == "x/1" and row.answer_text == "The first." and [i.getpixel((0, 0))[0] for i in row.load_images()] == [1, 2]
    (row,) = all_rows(make(source(path, columns={"image": "right.png", "text": "cls"}, splits={}, prompt="Which class?"), tmp_path))
    assert row.answer_text == "7" and row.load_images()[0].getpixel((0, 0))[0] == 2


def test_training_and_the_cheap_scan_read_them(mmft, tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for n in range(24):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(buffer, "PNG")
        files += [(f"{n}.png", buffer.getvalue()), (f"{n}.txt", "a red square")]
    path = shard(tmp_path / "t.tar", files)
    code, _, err = mmft("data=webdataset", f"data.path={path}", "data.splits.validation=8", "trainer.max_steps=1", "evaluation.base=false", "logger=none", "generation.max_new_tokens=4")
    assert code == 0, err


def test_a_shard_that_changes_is_noticed(shards, tmp_path):
    first = make(source(shards), tmp_path)
    assert make(source(shards), tmp_path).path == first.path
    shard(shards / "001.tar", captions(5, 7))
    again = make(source(shards), tmp_path)
    assert again.splits == {"train": 5, "validation": 2}
    row = next(row for row in all_rows(first) if row.id == "0007")
    with pytest.raises(ImageError):
        row.load_images()


def test_touched_shards_are_hashed_and_accepted(shards, tmp_path):
    """A copy of a data set has new times; the set's own key has them, too, so it is prepared again with the same fingerprint."""
    import os

    first = make(source(shards), tmp_path)
    os.utime(shards / "000.tar", (1, 1))
    assert make(source(shards), tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, "block", "no end"])
def test_a_cut_shard_is_one_line(mmft, shards, kept):
    whole = (shards / "001.tar").read_bytes()
    with tarfile.open(shards / "001.tar") as archive:
        last = archive.getmembers()[-1]
    ends = {"block": last.offset, "no end": last.offset_data + 512}  # before a header, and after the last file
    (shards / "001.tar").write_bytes(whole[: ends[kept] if kept in ends else int(len(whole[: last.offset_data]) * kept)])
    code, _, err = mmft("prepare", "data=webdataset", f"data.path={shards}", "data.splits.validation=1")
    assert code == 2 and f"{shards / '001.tar'}: is cut off; fetch it again, or leave it out of data.path" in err and len(err.strip().splitlines()) == 1


def test_a_cut_packed_shard_is_named_wherever_it_is_cut(shards):
    """gzip stores without compressing here, so that the cuts fall on headers, on contents and on the ends of blocks."""
    packed = gzip.compress((shards / "001.tar").read_bytes(), 0)
    path = shards.parent / "c.tar.gz"
    for cut in (*range(3, len(packed), 509), len(packed) - 1):
        path.write_bytes(packed[:cut])
        with pytest.raises(UserError, match=r"c\.tar\.gz: is cut off; fetch it again"):
            list(samples(path, shards))


@pytest.mark.parametrize("place", [0.3, 0.6, "checksum"])
def test_a_damaged_packed_shard_is_one_line(mmft, shards, place):
    packed = bytearray(gzip.compress((shards / "001.tar").read_bytes(), 0 if place == "checksum" else 6))
    packed[-8 if place == "checksum" else int(len(packed) * place)] ^= 0x10
    (shards / "001.tar").unlink()
    (shards / "001.tgz").write_bytes(packed)
    code, _, err = mmft("prepare", "data=webdataset", f"data.path={shards}", "data.splits.validation=1")
    assert code == 2 and "001.tgz: is " in err and "; fetch it again, or leave it out of data.path" in err and len(err.strip().splitlines()) == 1


def test_a_first_sample_without_its_text_is_one_bad_row(mmft, tmp_path):
    path = shard(tmp_path / "a.tar", [("0.png", png(90)), *captions(0, 30)])
    words = ["prepare", "data=webdataset", f"data.path={path}", "data.splits.validation=1", "data.max_bad_share=0.1"]
    code, out, err = mmft(*words)
    assert code == 0 and "31 rows read, 30 images" in out + err and "1 empty answer" in out + err
    code, _, err = mmft(*words, "data.columns.text=tex")
    assert code == 2 and "data.columns.text=tex: a.tar/0 has no such column. Did you mean txt?" in err


@pytest.mark.parametrize(("files", "message"), [
    ([("../1.png", png(1)), ("../1.txt", "x")], "holds ../1.png, a name that leads out of it"), ([("/etc/1.png", png(1))], "holds /etc/1.png"), ([("a/../../1.png", png(1))], "leads out of it"),
])  # fmt: skip
def test_names_that_lead_out_are_one_line(mmft, shards, files, message):
    shard(shards / "002.tar", files)
    code, _, err = mmft("prepare", "data=webdataset", f"data.path={shards}")
    assert code == 2 and message in err and "002.tar" in err and len(err.strip().splitlines()) == 1


def test_other_sources_of_a_mix_lose_nothing(mmft, shards, tmp_path):
    good = shard(tmp_path / "good.tar", captions(0, 9))
    (shards / "001.tar").write_bytes((shards / "001.tar").read_bytes()[:700])
    words = ["prepare", "data=mix", "data.sources.a=webdataset", f"data.sources.a.path={good}", "data.sources.b=webdataset", f"data.sources.b.path={shards}"]
    code, _, err = mmft(*words)
    assert code == 2 and "data.sources.b: " in err and "is cut off" in err
    assert [path.name.split("-")[0] for path in (tmp_path / "outputs" / "data").iterdir() if path.is_dir()] == ["webdataset"]
    assert mmft(*words[:4])[0] == 0


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is not a tar file (empty file)"), (b"no tar at all" * 100, "is not a tar file"), (None, "no such file"),
])  # fmt: skip
def test_what_is_no_shard_is_one_line(mmft, tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.tar").write_bytes(content)
    code, _, err = mmft("prepare", "data=webdataset", f"data.path={tmp_path / 'x.tar'}")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_folders_without_shards_and_ranges_with_gaps(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no shard"):
        source(tmp_path / "empty").shards()
    with pytest.raises(UserError, match="there is no .*002.tar"):
        source(f"{shards}/{{000..002}}.tar").shards()


def test_bad_samples_are_rows_that_are_dropped(tmp_path):
    files = [*captions(0, 3), ("0003.png", b"no picture"), ("0003.txt", "x"), ("0004.txt", "no image"), ("0005.png", png(5)), ("0005.json", "{"), ("0005.txt", "x"), ("0006.png", png(6)), ("0006.txt", b"\xff\xfe\xff")]
    prepared = prepare(source(shard(tmp_path / "a.tar", files), max_bad_share=0.9, splits={}), tmp_path / "out")
    assert prepared.splits == {"train": 3}
    assert prepared.manifest["reasons"] == {"no image": 1, "unreadable file": 2, "unreadable image": 1}


def test_memory_does_not_grow_with_a_shard(tmp_path):
    """tarfile keeps every member it has seen unless it is told not to."""
    path = shard(tmp_path / "a.tar", [(f"{n}.txt", "x") for n in range(300)])
    archives = []
    real = tarfile.open

    def opened(*args, **keys):
        archives.append(real(*args, **keys))
        return archives[-1]

    tarfile.open = opened
    try:
        assert sum(1 for _ in samples(path, tmp_path)) == 300
    finally:
        tarfile.open = real
    assert len(archives[0].members) <= 2
