"""Images in zip and tar files beside a table: found, read one at a time, and never unpacked."""

import io
import tarfile
import zipfile

import pytest
from small import all_rows, make, pictures, png, report, write_csv

from mmft.data.archives import Archives
from mmft.data.images import ImageError
from mmft.data.sources.table import Table


def pack(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)


def table(tmp_path, *images, **keys):
    write_csv(tmp_path / "t.csv", ["image", "text"], *([image, image] for image in images))
    return Table(path=str(tmp_path / "t.csv"), **{"max_bad_share": 0.99, **keys})


def pixels(prepared):
    return {s.answer_text: s.load_images()[0].getpixel((0, 0))[0] for s in all_rows(prepared)}


def test_ways_of_naming_a_member(tmp_path):
    pictures(tmp_path, "file.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number, name in enumerate(["a.png", "deep/er/b.png", "images/c.png", "file.png"], 1):
            archive.writestr(name, png(number))
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        info = tarfile.TarInfo("./d.png")
        info.size = len(png(5))
        archive.addfile(info, io.BytesIO(png(5)))
    names = ["a.png", "images/a.png", "images.zip/a.png", "er/b.png", "deep\\er\\b.png", "images/c.png", "d.png", "more/d.png", "file.png"]
    prepared = make(table(tmp_path, *names), tmp_path)
    assert pixels(prepared) == dict(zip(names, [1, 1, 1, 2, 2, 3, 5, 5, 0]))  # a file wins over a member
    assert not (tmp_path / "a.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.png", "images.zip", "more.tar", "prepared", "t.csv"]


def test_what_cannot_be_read_is_named(tmp_path):
    pack(tmp_path / "x.zip", p__a="", q__a="")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in (("p/a.png", png(1)), ("q/a.png", png(2)), ("empty.png", b""), ("text.png", b"hello"), ("ok.png", png(3))):
            archive.writestr(name, data)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "photos.tar.gz").write_bytes(b"\x1f\x8b")
    prepared = make(table(tmp_path, "a.png", "empty.png", "text.png", "gone.png", "ok.png"), tmp_path)
    assert [line["reason"] for line in report(prepared) if line["action"] == "dropped"] == [
        "missing image: a.png: no such file; x.zip holds p/a.png, x.zip q/a.png: write the folder, too",
        "unreadable image: empty.png: the file is empty", "unreadable image: text.png: not a picture in a known format",
        "missing image: gone.png: no such file; photos.tar.gz is not read: unpack it, or pack the images as .zip or .tar",
    ]  # fmt: skip
    assert any(note.startswith("broken.zip: cannot be read as an archive") for note in prepared.manifest["notes"]) and pixels(prepared) == {"ok.png": 3}
    assert pixels(make(table(tmp_path, "p/a.png", "q/a.png"), tmp_path)) == {"p/a.png": 1, "q/a.png": 2}  # the way that is named


def test_a_member_that_unpacks_to_too_much_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", b"\0" * 300_000_000)
    assert (tmp_path / "x.zip").stat().st_size < 1_000_000
    archives = Archives(tmp_path)
    with pytest.raises(ImageError, match="300000000 bytes, more than"):
        archives.read(archives.find("bomb.png"))
    archives.close()


def test_members_that_are_no_files_are_not_read(tmp_path):
    """A link in a tar file names a file outside of it."""
    (tmp_path / "secret.png").write_bytes(png(9))
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.DIRTYPE, "dir.png"), (tarfile.FIFOTYPE, "pipe.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.png"
            archive.addfile(info)
        info = tarfile.TarInfo("ok.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
    prepared = make(table(folder, "link.png", "hard.png", "dir.png", "pipe.png", "ok.png"), tmp_path)
    assert pixels(prepared) == {"ok.png": 1} and prepared.manifest["dropped"] == 4


def test_many_threads_read_one_archive(tmp_path):
    names = [f"{i}.png" for i in range(200)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(i, 20))
    assert pixels(make(table(tmp_path, *names), tmp_path)) == {name: i for i, name in enumerate(names)}
