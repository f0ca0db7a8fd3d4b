"""A later command notices files that appeared, were repaired, changed or went; a file with a new time alone is not prepared again."""

import importlib.util
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small import all_rows, make, pictures, png, write_csv

from mmft.common.errors import UserError
from mmft.data import images
from mmft.data.download import Download
from mmft.data.images import ImageError
from mmft.data.sources.classfolder import ClassFolder
from mmft.data.sources.table import Table

LOSSY = {"max_bad_share": 0.99}


@pytest.fixture
def table(tmp_path):
    """A table of a.png and b.png, of which b.png is missing."""
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "A"], ["b.png", "B"])
    return Table(path=str(tmp_path / "t.csv"), **LOSSY)


def answers(prepared):
    return [s.answer_text for s in all_rows(prepared)]


def test_a_missing_image_that_appears_is_noticed_by_the_command(mmft, tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    write_csv(tmp_path / "t.csv", ["image", "text"], *([f"{i}.png", f"text {i}"] for i in range(20)))
    (tmp_path / "7.png").unlink()
    words = ["prepare", "data=table", f"data.path={tmp_path / 't.csv'}", "data.max_bad_share=0.1"]
    assert "1 rows dropped" in mmft(*words)[1]
    (tmp_path / "7.png").write_bytes(png(7))
    code, out, err = mmft(*words)
    assert code == 0 and "7.png was missing and is there now; preparing again" in err and "dropped" not in out and "train 18 rows" in out
    assert mmft(*words)[2] == ""  # and then it is as it should be


@pytest.mark.parametrize("broken", [b"", b"text", png(1)[:40]])
def test_a_repaired_image_is_noticed(table, tmp_path, capsys, broken):
    (tmp_path / "b.png").write_bytes(broken)
    assert answers(make(table, tmp_path)) == ["A"]
    (tmp_path / "b.png").write_bytes(png(1))
    assert answers(make(table, tmp_path)) == ["A", "B"]
    assert "b.png could not be used and has changed; preparing again" in capsys.readouterr().err


def test_several_files_are_counted(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "A"], *([f"{i}.png", str(i)] for i in range(3)))
    source = Table(path=str(tmp_path / "t.csv"), **LOSSY)
    make(source, tmp_path)
    pictures(tmp_path, "0.png", "1.png")
    assert answers(make(source, tmp_path)) == ["A", "0", "1"]
    assert "0.png and 1 more were missing and are there now" in capsys.readouterr().err


def test_a_file_that_may_not_be_read_is_noticed_when_it_may(table, tmp_path, capsys):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("the superuser reads every file")
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "b.png").chmod(0)
    assert answers(make(table, tmp_path)) == ["A"]
    (tmp_path / "b.png").chmod(0o644)  # neither its size nor its time of writing changes
    assert answers(make(table, tmp_path)) == ["A", "B"]


def test_a_link_that_led_out_and_now_is_a_file(table, tmp_path, capsys):
    inner = tmp_path / "in"
    pictures(inner, "a.png")
    (tmp_path / "out.png").write_bytes(png(5))
    (inner / "b.png").symlink_to(tmp_path / "out.png")
    write_csv(inner / "t.csv", ["image", "text"], ["a.png", "A"], ["b.png", "B"])
    source = Table(path=str(inner / "t.csv"), **LOSSY)
    assert answers(make(source, tmp_path)) == ["A"]
    (inner / "b.png").unlink()
    (inner / "b.png").write_bytes(png(6))
    assert answers(make(source, tmp_path)) == ["A", "B"] and "has changed; preparing again" in capsys.readouterr().err


def test_a_new_time_alone_is_hashed_once_and_not_prepared_again(table, tmp_path, capsys, monkeypatch):
    from mmft.data import staleness

    (tmp_path / "b.png").write_bytes(png(1))
    first = make(table, tmp_path)
    made = (first.path / "manifest.json").stat().st_mtime_ns
    for name in ("a.png", "b.png"):
        os.utime(tmp_path / name, (1, 1))
    hashed, real = [], staleness.sha256
    monkeypatch.setattr(staleness, "sha256", lambda path: hashed.append(path.name) or real(path))
    for _ in range(2):
        assert (make(table, tmp_path).path / "manifest.json").stat().st_mtime_ns == made
    assert sorted(hashed) == ["a.png", "b.png"] and capsys.readouterr().err == ""


def test_content_that_changes_with_size_kept_is_noticed(table, tmp_path, capsys):
    pictures(tmp_path, "x.bmp")
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "A"])
    first = make(table, tmp_path)
    data = bytearray((tmp_path / "a.png").read_bytes())
    other = png(200)
    assert len(other) == len(data)
    (tmp_path / "a.png").write_bytes(other)
    os.utime(tmp_path / "a.png", (2, 2))
    assert make(table, tmp_path).fingerprint != first.fingerprint and "a.png has changed" in capsys.readouterr().err


def test_an_image_that_went_is_named(table, tmp_path, capsys):
    (tmp_path / "b.png").write_bytes(png(1))
    make(table, tmp_path)
    (tmp_path / "b.png").unlink()
    assert answers(make(table, tmp_path)) == ["A"] and "b.png is gone; preparing again" in capsys.readouterr().err


def test_an_archive_that_appears_or_changes(table, tmp_path, capsys):
    assert answers(make(table, tmp_path)) == ["A"]
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("b.png", png(1))
    assert answers(make(table, tmp_path)) == ["A", "B"] and "more.zip has appeared; preparing again" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("b.png", png(9, 5))
    prepared = make(table, tmp_path)
    assert "more.zip has changed" in capsys.readouterr().err and all_rows(prepared)[1].load_images()[0].getpixel((0, 0))[0] == 9


def test_a_new_image_in_a_class_folder_is_another_set(tmp_path):
    pictures(tmp_path / "f", "cat/1.png", "dog/2.png")
    source = ClassFolder(path=str(tmp_path / "f"))
    first = make(source, tmp_path)
    pictures(tmp_path / "f", "x", "y", "dog/3.png")
    (tmp_path / "f/x").unlink()
    (tmp_path / "f/y").unlink()
    assert first.splits == {"train": 2} and make(source, tmp_path).splits == {"train": 3}


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 60


def test_heic_names_its_package_and_is_tried_again_when_it_is_installed(tmp_path, capsys, monkeypatch):
    import sys
    import types

    from PIL import Image

    pictures(tmp_path, "a.png")
    (tmp_path / "b.heic").write_bytes(HEIC)
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "A"], ["b.heic", "B"])
    source = Table(path=str(tmp_path / "t.csv"), **LOSSY)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name))
    prepared = make(source, tmp_path)
    text = (prepared.path / "report.jsonl").read_text()
    assert "b.heic: a HEIC file, which needs the package pillow-heif (pip install 'mmft[heic]')" in text
    make(source, tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    stand_in = types.ModuleType("pillow_heif")  # decodes every file to one image; the real package is tried below
    stand_in.register_heif_opener = lambda: Image.register_open("HEIF", lambda *a: (_ for _ in ()).throw(SyntaxError), lambda head: True)
    stand_in.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    make(source, tmp_path)
    assert "1 HEIC image can be read now; preparing again" in capsys.readouterr().err


def test_heic_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    from PIL import Image

    heif.register_heif_opener()
    Image.new("RGB", (64, 32), (200, 30, 60)).save(tmp_path / "a.heic", quality=100)
    image = images.open_image(tmp_path / "a.heic")
    assert image.mode == "RGB" and image.size == (64, 32) and abs(image.getpixel((30, 15))[0] - 200) < 6


class Unsteady(BaseHTTPRequestHandler):
    """/busy.png answers 503 twice, then well; /later.png answers 404 until the server's flag is set."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        busy = self.path == "/busy.png" and self.server.asked.count("/busy.png") <= 2
        if busy or self.path == "/later.png" and not self.server.repaired:
            self.send_error(503 if busy else 404)
            return
        body = png(len(self.path))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Unsteady)
    made.asked, made.repaired = [], False
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_downloads_are_repeated(server):
    host = f"127.0.0.1:{server.server_address[1]}"
    assert Download(hosts=[host]).fetch(f"http://{host}/busy.png") == png(9) and len(server.asked) == 3
    server.asked.clear()
    with pytest.raises(ImageError, match="answers 404"):
        Download(hosts=[host]).fetch(f"http://{host}/later.png")
    assert len(server.asked) == 1  # a 404 is no passing trouble
    with pytest.raises(ImageError, match="answers 503"):
        Download(hosts=[host], timeout=0.1).fetch(f"http://{host}/busy.png")  # no time for a second request


def test_failed_downloads_are_tried_by_the_next_prepare_alone(mmft, server, tmp_path):
    host = f"127.0.0.1:{server.server_address[1]}"
    write_csv(tmp_path / "t.csv", ["image", "text"], *([f"http://{host}/{n}.png", n] for n in ("ok", "fine", "later")), ["http://elsewhere.example/x.png", "x"])
    words = ["data=table", f"data.path={tmp_path / 't.csv'}", f"data.download.hosts=['{host}']", "data.max_bad_share=0.9", "data.splits.validation=0"]
    assert "2 rows dropped" in mmft("prepare", *words)[1]
    server.asked.clear()
    server.repaired = True
    code, out, err = mmft("prepare", *words)
    assert code == 0 and "1 image could not be downloaded; preparing again" in err and "1 rows dropped" in out and server.asked == ["/later.png"]
    assert mmft("prepare", *words)[2] == "" and len(server.asked) == 1  # what may not be requested is not tried again


def test_images_outside_the_table_s_folder(tmp_path, monkeypatch):
    """Without data.root, images may lie anywhere in the working directory if the table does; with it, below it alone."""
    pictures(tmp_path / "work", "img/a.png")
    (tmp_path / "work/tables").mkdir()
    write_csv(tmp_path / "work/tables/t.csv", ["image", "text"], ["../img/a.png", "A"])
    source = Table(path=str(tmp_path / "work/tables/t.csv"))
    monkeypatch.chdir(tmp_path / "work/img")
    with pytest.raises(UserError, match="image outside the data root: ../img/a.png .*run mmft in a folder that holds both, or set data.root"):
        make(source, tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    assert all_rows(make(source, tmp_path))[0].load_images()[0].getpixel((0, 0)) == (0, 0, 7)
    with pytest.raises(UserError, match="image outside the data root"):
        make(Table(path=source.path, root=str(tmp_path / "work/tables")), tmp_path)
    assert all_rows(make(Table(path=source.path, root=str(tmp_path / "work/img")), tmp_path))[0].answer_text == "A"
