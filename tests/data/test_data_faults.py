"""Every fault of tests/data/faults.py at once through the command line: dropped and named, or shown as it must be; the rest trains."""

import json
import sys
from pathlib import Path

import pytest
from faults import ANSWER, IMAGE_FAULTS, ROW_FAULTS, USER, encoded, turns
from PIL import Image

from mmft.data.prepared import PreparedData

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")
GOOD = 12


def write(folder: Path) -> Path:
    """The data set: good rows, then a row for each fault."""
    folder.mkdir()
    lines = []
    for i in range(GOOD):
        (folder / f"good{i}.png").write_bytes(encoded(Image.new("RGB", (32, 32), (i, 0, 0)), "PNG"))
        lines.append(json.dumps({"id": f"good{i}", "images": [f"good{i}.png"], **turns(("user", USER), ("assistant", ANSWER))}))
    for i, (fault_name, fault) in enumerate(IMAGE_FAULTS.items()):
        name = fault.name or f"i{i}.png"
        if fault.make is not None:
            data = fault.make(folder, name)
            if data is not None:
                (folder / name).write_bytes(data)
        lines.append(json.dumps({"id": fault_name, "images": [name], **turns(("user", USER), ("assistant", ANSWER))}))
    for fault_name, fault in ROW_FAULTS.items():
        row = {"id": fault_name, "images": ["good0.png"], **turns(("user", USER), ("assistant", ANSWER)), **fault.row}
        lines.append(fault.raw if fault.raw is not None else json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(the prepared set, the report's lines by row number, words that name the data)."""
    from mmft.cli.main import main

    home = tmp_path_factory.mktemp("faults")
    words = ["data=messages", f"data.path={write(home / 'set')}", "data.max_bad_share=0.9", "data.splits.validation=0", f"output_dir={home / 'out'}"]
    assert main(["prepare", *words]) == 0
    (folder,) = (p for p in (home / "out" / "data").iterdir() if p.is_dir())
    report = {}
    for line in (folder / "report.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["action"] == "note":  # its images are forms of one picture, so near-duplicates are noted
            assert entry["reason"].startswith("near-duplicates")
            continue
        number = int(entry["where"].rpartition(":")[2])
        assert number not in report, "a row is named twice"
        report[number] = entry
    return PreparedData(folder), report, words


def place(name: str) -> int:
    return GOOD + 1 + [*IMAGE_FAULTS, *ROW_FAULTS].index(name)


@pytest.mark.parametrize("name", [n for n, f in {**IMAGE_FAULTS, **ROW_FAULTS}.items() if f.dropped])
def test_a_bad_row_is_dropped_and_named(prepared, name):
    fault = {**IMAGE_FAULTS, **ROW_FAULTS}[name]
    entry = prepared[1][place(name)]
    expected = fault.dropped.replace("NAME", f"i{[*IMAGE_FAULTS].index(name)}.png" if name in IMAGE_FAULTS else "")
    assert entry["action"] == "dropped" and entry["reason"].startswith(expected), entry["reason"][:300]


@pytest.mark.parametrize("name", [n for n, f in IMAGE_FAULTS.items() if not f.dropped])
def test_a_picture_that_loaders_get_wrong_is_shown_as_it_is(prepared, name):
    sample = next(s for s in prepared[0].split("train") if s.id == name)
    (image,) = sample.load_images()
    assert image.mode == "RGB" and place(name) not in prepared[1]
    if name == "EXIF rotation":
        assert image.size == (24, 48) and image.getpixel((12, 6))[0] > 240 and image.getpixel((12, 42))[0] < 15
    else:
        assert image.getpixel((image.width // 2, image.height // 2)) == IMAGE_FAULTS[name].pixel


def test_a_row_that_was_changed_is_named(prepared):
    entry = prepared[1][place("an id used before")]
    assert entry["action"] == "changed" and entry["reason"].startswith("duplicate id")


def test_nothing_is_lost(prepared):
    data, report, _ = prepared
    rows = GOOD + len(IMAGE_FAULTS) + len(ROW_FAULTS)
    dropped = [e for e in report.values() if e["action"] == "dropped"]
    assert data.manifest["rows_read"] == rows == data.splits["train"] + len(dropped)
    assert len(dropped) == sum(f.dropped is not None for f in {**IMAGE_FAULTS, **ROW_FAULTS}.values()) == data.manifest["dropped"]
    assert len(IMAGE_FAULTS) >= 28 and len(ROW_FAULTS) >= 12


@pytest.mark.parametrize("kind", ["model=tiny", "llava", "blip2"])
def test_what_is_left_trains_to_the_end(prepared, mmft, small, tmp_path, kind):
    """One epoch over every row that was kept, on each family: no picture that passed kills the run."""
    model = [kind] if kind == "model=tiny" else [f"model={kind}", f"model.path={small(kind)}", "model.quantization={}"]
    run = tmp_path / "run"
    code, _, err = mmft(*model, *prepared[2], "evaluation.split=null", "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=8",
                        "trainer.gradient_accumulation_steps=1", "trainer.save_strategy=no", "trainer.learning_rate=1e-4", "logger=none",
                        f"run_dir={run}", output_dir=False)  # fmt: skip
    assert code == 0 and (run / "DONE").is_file(), err
    steps = json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"]
    assert steps == -(-prepared[0].splits["train"] // 8)


def test_an_image_exchanged_after_preparation_stops_the_run_by_name(mmft, tmp_path):
    """Same size, same time: only the content tells."""
    import os

    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["image,text"]
    for i in range(8):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.bmp")
        rows.append(f"{i}.bmp,a thing")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    words = ["data=table", f"data.path={folder / 'rows.csv'}", "data.splits.validation=0"]
    assert mmft("prepare", *words)[0] == 0
    before = (folder / "3.bmp").stat()
    Image.new("RGB", (32, 32), (200, 200, 0)).save(folder / "3.bmp")
    os.utime(folder / "3.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "3.bmp").stat().st_size == before.st_size
    code, _, err = mmft(*words, "evaluation.split=null", "logger=none", "audit=false", "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=4")
    assert code == 2 and "3.bmp: changed image" in err and err.count("\n") == 1, err
