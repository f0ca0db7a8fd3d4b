"""prepare and the store: what is written, dropped, reported, reused and refused."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest
from small import Given, all_rows, caption_row, make, pictures, png, report

from mmft.common.errors import UserError
from mmft.data import prepare
from mmft.data.examine import Examiner
from mmft.data.prepared import PreparedData
from mmft.data.sample import BadRow, Row, assistant_turn, user_turn

REPOSITORY = Path(__file__).parents[2]


def files_of(prepared):
    return {p.relative_to(prepared.path).as_posix(): p.stat().st_mtime_ns for p in prepared.path.rglob("*") if p.is_file()}


def test_what_is_written_and_read_back(tmp_path):
    root = pictures(tmp_path / "photos", "a.png", "b.png", "sub/c.png")
    rows = [caption_row(n, f"  text {i} ", f"t:{i}", id=f"r{i}", references=["other"]) for i, n in enumerate(["a.png", "b.png", "sub/c.png"])]
    prepared = make(Given(name="set", root=str(root), given=rows, splits={"validation": 1, "by": "last"}), tmp_path)
    assert sorted(p.name for p in prepared.path.iterdir()) == ["images.arrow", "looks.arrow", "manifest.json", "report.jsonl", "train.arrow", "unusable_images.jsonl", "validation.arrow"]
    assert prepared.path.name == f"set-{prepared.manifest['key']}" and prepared.splits == {"train": 2, "validation": 1}
    sample = prepared.split("validation")[0]
    assert sample.id == "r2" and sample.images == ("sub/c.png",) and sample.root == root.as_posix()
    assert sample.references == ("text 2", "other") and sample.answer_text == "text 2" and sample.prompt_text == "Describe."
    assert sample.messages[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}
    assert sample.load_images()[0].getpixel((0, 0)) == (2, 0, 7)
    image = list(prepared.images())[0]

    assert (image["path"], image["sha256"], image["width"], image["height"]) == ("a.png", hashlib.sha256(png(0)).hexdigest(), 4, 4)
    assert prepared.manifest["images"] == 3 and prepared.manifest["rows_read"] == 3 and prepared.manifest["splits"]["train"] == {"rows": 2, "images": 2}
    copy = pickle.loads(pickle.dumps(prepared.split("train")))
    assert copy[1] == prepared.split("train")[1] and len(copy) == 2 and copy[-1].id == "r1"
    with pytest.raises(IndexError):
        copy[2]
    with pytest.raises(UserError, match="has no test split, only train, validation"):
        prepared.split("test")


def bad_rows(root):
    """One row of each fault with the kind that the report must give it."""
    outside = root.parent / "outside.png"
    outside.write_bytes(png(9))
    (root / "link.png").symlink_to(outside)
    (root / "cut.png").write_bytes(png(1, 40)[:60])
    (root / "zero.png").write_bytes(b"")
    user, answer = user_turn(1, "q"), assistant_turn("a")
    return [
        (caption_row("gone.png"), "missing image: gone.png"),
        (caption_row("cut.png"), "unreadable image: cut.png"),
        (caption_row("zero.png"), "unreadable image: zero.png: the file is empty"),
        (caption_row("a.png", "   "), "empty answer"),
        (caption_row("../outside.png"), "image outside the data root"),
        (caption_row(str(outside)), "image outside the data root"),
        (caption_row("link.png"), "image outside the data root"),
        (caption_row("http://host/a.png"), "image is a URL"),
        (caption_row("https://host/a.png"), "image is a URL"),
        (caption_row("a\0.png"), "missing image"),
        (caption_row(b"not a picture"), "unreadable image: not a picture in a known format"),
        (caption_row(""), "missing image"),
        (caption_row([]), "no image"),
        (Row(["a.png", "b.png"], [user, answer]), "image count: 1 placeholder in the text, 2 images"),
        (Row(["a.png"], [user]), "no answer"),
        (Row(["a.png"], [user, answer, user_turn(0, "more")]), "no answer: the last turn is the user's"),
        (Row(["a.png"], [answer, user, answer]), "role order"),
        (Row(["a.png"], [user, user_turn(0, "again"), answer]), "role order"),
        (Row(["a.png"], [user, {**answer, "role": "narrator"}, answer]), "role order: 'narrator'"),
        (Row(["a.png"], []), "no answer"),
        (caption_row("a.png", "half \ud800"), "bad text"),
        (caption_row("a.png", split="holdout"), "unknown split: 'holdout'"),
        (BadRow("", "wrong number of cells: 3, the header has 2"), "wrong number of cells"),
    ]


def test_every_fault_is_dropped_counted_and_named(tmp_path):
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    faults = bad_rows(root)
    rows = [caption_row("a.png", id="good", where="list.csv:1")]
    for i, (row, _) in enumerate(faults, 2):
        rows.append(BadRow(f"list.csv:{i}", row.reason) if isinstance(row, BadRow) else Row(row.images, row.messages, row.references, row.id, row.split, f"list.csv:{i}"))
    prepared = make(Given(root=str(root), given=rows, max_bad_share=0.99), tmp_path)
    assert [s.id for s in all_rows(prepared)] == ["good"]
    lines = {line["where"]: line for line in report(prepared)}
    for i, (_, reason) in enumerate(faults, 2):
        line = lines[f"list.csv:{i}"]
        assert line["action"] == "dropped" and line["reason"].startswith(reason), line
    assert prepared.manifest["dropped"] == len(faults) == sum(prepared.manifest["reasons"].values())
    assert any(f"{len(faults)} rows dropped" in line for line in prepared.describe())
    # the copies of dropped rows' bytes do not stay
    assert not list(prepared.path.glob("images/*/*"))


def test_too_many_bad_rows_stop_and_leave_only_a_report(tmp_path):
    root = pictures(tmp_path / "photos", "a.png")
    rows = [caption_row("a.png", where=f"f:{i}") for i in range(8)] + [caption_row(f"gone{i}.png", where=f"f:{8 + i}") for i in range(4)]
    source = Given(name="set", root=str(root), given=rows, max_bad_share=0.3)
    with pytest.raises(UserError) as caught:
        make(source, tmp_path)
    text = str(caught.value)
    assert "4 of 12 rows" in text and "\n" not in text
    assert all(f"f:{8 + i}: missing image: gone{i}.png" in text for i in range(3)) and "gone3" not in text
    (left,) = [p for p in (tmp_path / "prepared").iterdir() if not p.name.endswith(".lock")]
    assert left.name.endswith(".report.jsonl") and str(left) in text and len(left.read_text().splitlines()) == 4
    source.max_bad_share = 0.34
    make(source, tmp_path)
    assert not left.exists()  # answered by the set itself


def test_a_set_of_only_bad_rows_is_an_error_whatever_the_share(tmp_path):
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        make(Given(root=str(tmp_path), given=[caption_row("x.png"), caption_row("y.png")], max_bad_share=1.0), tmp_path)
    with pytest.raises(UserError, match="no rows"):
        make(Given(), tmp_path)


def test_one_bad_row_among_a_thousand_is_not_fatal(tmp_path):
    rows = [caption_row(png(i), where=f"f:{i}") for i in range(1000)] + [caption_row(b"junk", where="f:1000")]
    prepared = make(Given(given=rows), tmp_path)
    assert prepared.splits == {"train": 1000} and prepared.manifest["dropped"] == 1
    assert len(prepared.split("train")[999].load_images()) == 1


def test_text_only_rows_when_asked_for(tmp_path):
    rows = [caption_row(png(1)), caption_row([], "words only")]
    prepared = make(Given(given=rows, text_only=True), tmp_path)
    assert [s.images for s in all_rows(prepared)][1] == ()
    assert all_rows(prepared)[1].answer_text == "words only"


def test_duplicate_ids_become_unique_and_are_reported(tmp_path):
    rows = [caption_row(png(i), id="x", where=f"f:{i}") for i in range(3)] + [caption_row(png(9), id="x#2", where="f:3")]
    prepared = make(Given(given=rows), tmp_path)
    assert [s.id for s in all_rows(prepared)] == ["x", "x#2", "x#3", "x#2#2"]
    changed = report(prepared)
    assert [c["where"] for c in changed] == ["f:1", "f:2", "f:3"] and all(c["action"] == "changed" for c in changed)
    assert prepared.manifest["changed"] == 3 and prepared.manifest["dropped"] == 0


def test_paths_and_bytes_may_be_mixed_also_in_one_row(tmp_path):
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    prepared = make(Given(root=str(root), given=[caption_row(["b.png", png(77)]), caption_row("a.png"), caption_row(png(77))]), tmp_path)
    one, two, three = all_rows(prepared)
    assert [i.getpixel((0, 0))[0] for i in one.load_images()] == [1, 77]
    assert one.root == three.root == prepared.path.as_posix() and two.root == root.as_posix()
    assert three.images[0] == one.images[1] and three.images[0].endswith(".png")


def test_each_image_file_is_decoded_once(tmp_path, monkeypatch):
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    looked = []
    real = Examiner.examine
    monkeypatch.setattr(Examiner, "examine", lambda self, image, copy: looked.append(image) or real(self, image, copy))
    rows = [caption_row(("a.png", "./a.png", "b.png")[i % 3], f"t{i}") for i in range(300)]
    make(Given(root=str(root), given=rows), tmp_path)
    assert len(looked) == 2


def test_fingerprint_tells_content_not_place(tmp_path):
    def fingerprint(place, text="a", names=("a.png", "b.png"), first=0):
        root = tmp_path / place
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(first + i))
        return make(Given(name=place, root=str(root), given=[caption_row(n, text, id=str(i)) for i, n in enumerate(names)]), tmp_path).fingerprint

    base = fingerprint("one")
    assert base == fingerprint("two") == fingerprint("three", names=("x/other.png", "b.png"))
    assert base != fingerprint("four", text="b")
    assert base != fingerprint("five", first=1)
    stored = make(Given(name="bytes", given=[caption_row(png(i), "a", id=str(i)) for i in range(2)]), tmp_path)
    assert stored.fingerprint == base


def test_second_prepare_reuses(tmp_path):
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    source = Given(root=str(root), given=[caption_row("a.png"), caption_row("b.png")])
    first = make(source, tmp_path)
    before = files_of(first)
    assert files_of(make(source, tmp_path)) == before
    other = make(Given(root=str(root), given=source.given, splits={"validation": 1}), tmp_path)
    assert other.path != first.path


def test_a_changed_image_is_prepared_again(tmp_path, capsys):
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    source = Given(root=str(root), given=[caption_row("a.png"), caption_row("b.png")])
    first = make(source, tmp_path)
    (root / "b.png").write_bytes(png(200, 9))
    assert make(source, tmp_path).fingerprint != first.fingerprint
    assert "b.png has changed; preparing again" in capsys.readouterr().err


def test_a_prepared_set_with_its_own_images_can_be_moved(tmp_path):
    prepared = make(Given(given=[caption_row(png(3))]), tmp_path)
    moved = prepared.path.rename(tmp_path / "elsewhere")
    assert PreparedData(moved).split("train")[0].load_images()[0].getpixel((0, 0)) == (3, 0, 7)


def test_not_a_prepared_set(tmp_path):
    with pytest.raises(UserError, match="not a prepared data set"):
        PreparedData(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="another version"):
        PreparedData(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(prepare, "divide", fail)
    with pytest.raises(UserError, match="no space left|cannot be written"):
        make(Given(given=[caption_row(png(1))]), tmp_path)
    assert [p.name for p in (tmp_path / "prepared").iterdir() if not p.name.endswith(".lock")] == []


def test_a_source_that_fails_leaves_nothing(tmp_path):
    class Fails(Given):
        def read(self):
            yield caption_row(png(1))
            raise UserError("list.csv: gone")

    with pytest.raises(UserError, match="list.csv: gone"):
        make(Fails(), tmp_path)
    assert [p.name for p in (tmp_path / "prepared").iterdir() if not p.name.endswith(".lock")] == []


def test_what_a_crash_left_is_cleared_away(tmp_path):
    source = Given(given=[caption_row(png(1))])
    first = make(source, tmp_path)
    stale = first.path.with_name(f".{first.path.name}.tmp")
    first.path.rename(stale)  # as if the process had died before the last step, holding the lock
    (stale / "junk").write_text("x")
    second = make(source, tmp_path)
    assert second.path.is_dir() and not stale.exists() and not (second.path / "junk").exists()


SLOW = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from small import Given, caption_row, png
    from mmft.data.prepare import prepare
    class Slow(Given):
        def read(self):
            print("read", flush=True)
            for i in range(3):
                time.sleep(0.7)
                yield caption_row(png(i))
    print(prepare(Slow(), {out!r}).fingerprint)
""")


def test_two_processes_prepare_once(tmp_path):
    code = SLOW.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    words = " ".join(o for o, _ in outputs).split()
    assert words.count("read") == 1  # one did it
    assert len({w for w in words if w != "read"}) == 1  # both have it
    assert "another process is preparing" in outputs[0][1] + outputs[1][1]


FLAT = textwrap.dedent("""
    import resource, sys
    sys.path.insert(0, {tests!r})
    from small import Given, caption_row, png
    from mmft.data.prepare import prepare
    images = [png(i) for i in range(50)]
    class Many(Given):
        def read(self):
            for i in range({rows}):
                yield caption_row(images[i % 50], "a caption of an ordinary length, number %d" % i, "x:%d" % i)
    p = prepare(Many(splits={{"validation": 0.1}}), {out!r})
    assert p.splits == {{"train": {rows} * 9 // 10, "validation": {rows} // 10}}, p.splits
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory in Linux's units")
@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for rows in (50_000, 150_000):
        code = FLAT.format(tests=str(Path(__file__).parent), rows=rows, out=str(tmp_path / str(rows)))
        run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-1]))
    # 100,000 more rows are 25 MB of text; the arrays of numbers kept for each row take about 5 MB with their copies
    assert peaks[1] - peaks[0] < 20, peaks


def test_opening_maps_and_does_not_read(tmp_path):
    prepared = make(Given(given=[caption_row(png(i % 5), f"t{i}") for i in range(3000)]), tmp_path)
    rows, before = prepared.split("train"), pa.total_allocated_bytes()
    assert rows[2999].answer_text == rows[-1].answer_text == "t2999" and [rows[n].answer_text for n in (0, 1717)] == ["t0", "t1717"]
    size = (prepared.path / "train.arrow").stat().st_size
    assert size > 200_000 and pa.total_allocated_bytes() - before < size / 20


def test_manifest_is_plain_json_with_what_it_was_made_of(tmp_path):
    prepared = make(Given(name="set", given=[caption_row(png(1))]), tmp_path)
    manifest = json.loads((prepared.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["name"] == "set" and manifest["source"]["splits"]["by"] == "random"
    assert set(manifest["versions"]) == {"mmft", "python", "pillow", "pyarrow"}


def test_the_fingerprint_is_a_hash_of_the_rows_as_json(tmp_path):
    """Written in another way: json.dumps of each row, also with characters that JSON escapes."""
    odd = ["plain", 'quo"te', "back\\slash", "tab\tnew\nline", "\x01\x1f\x7f", "é 一只狗 😀", "\u2028", "</b>"]
    rows = [caption_row(png(n), f"{text} {n}", references=[f"{text} {n}", text], choices=[f"{text} {n}", text, "third"] if n % 2 else []) for n, text in enumerate(odd)]
    prepared = make(Given(given=rows, splits={"validation": 3}), tmp_path)
    total = hashlib.sha256()
    for split in ("train", "validation"):
        lines = hashlib.sha256()
        for row in prepared.split(split):
            messages = json.dumps(row.messages, ensure_ascii=False, separators=(",", ":"))
            cells = [row.id, messages, list(row.references), list(row.sha256), *([list(row.choices)] if row.choices else [])]
            lines.update(json.dumps(cells, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        total.update(f"{split}:{lines.hexdigest()}\n".encode())
    assert prepared.fingerprint == total.hexdigest()
