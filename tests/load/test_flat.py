"""Memory and open files stay constant while 600,000 rows are prepared and 10,000 steps are trained."""

import csv
import json
import sys
from pathlib import Path

import pytest
from watching import mmft

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600), pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")]


def pictures(folder, n, side=56):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (side, side), (i * 40 % 256, i * 7 % 256, 90)).save(folder / f"{i}.png")
    return folder


def test_preparing_600000_rows_uses_constant_memory(tmp_path):
    rows = 600_000
    folder = pictures(tmp_path / "pictures", 100, side=8)
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        writer.writerows((f"{i % 100}.png", f"caption number {i} of an ordinary length, as a person writes them") for i in range(rows))
    seen = mmft(["prepare", "data=table", f"data.path={folder / 'rows.csv'}", "data.splits.validation=0.1", f"output_dir={tmp_path / 'out'}"], tmp_path / "log.txt")
    assert seen.code == 0, seen.output
    (prepared,) = (tmp_path / "out" / "data").glob("table-*/manifest.json")
    manifest = json.loads(prepared.read_text(encoding="utf-8"))
    assert manifest["rows_read"] == rows and manifest["dropped"] == 0 and sum(p["rows"] for p in manifest["splits"].values()) == rows
    first, last, files, files_last = seen.tenths()
    print(f"\n{rows} rows in {seen.seconds:.0f} s: {first:.0f} MB, then {last:.0f} MB (most {max(seen.memory):.0f}); {files} open files, then {files_last}; at most {max(seen.files)}")
    # the second pass has a file open for each of the two splits, the first one has the source
    new = {Path(name).name for name in seen.open_files()} - {Path(name).name for name in seen.open_files(first=True)}
    assert last < first * 1.05 and new == {"train.arrow", "validation.arrow"} and files_last <= files + 1, seen.open_files()


def test_training_10000_steps_uses_constant_memory_and_logs_every_step(tmp_path, small):
    steps, every = 10_000, 10
    folder = pictures(tmp_path / "pictures", 16)
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "text"], *([f"{i}.png", f"a picture, number {i}"] for i in range(16))])
    seen = mmft([
        "model=qwen2vl", f"model.path={small('qwen2vl')}", "model.processor={}", "model.dtype=fp32", "data=table", f"data.path={folder / 'rows.csv'}",
        "data.splits.validation=0", "evaluation.split=null", "lora.r=2", f"trainer.max_steps={steps}", "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=1", f"trainer.logging_steps={every}", "trainer.save_strategy=no", "trainer.dataloader_num_workers=0",
        "logger=tensorboard", "audit=false", f"run_dir={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}",
    ], tmp_path / "log.txt")  # fmt: skip
    assert seen.code == 0, seen.output[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row["step"] for row in lines if "loss" in row]
    first, last, files, files_last = seen.tenths()
    print(f"\n{steps} steps in {seen.seconds:.0f} s: {first:.0f} MB, then {last:.0f} MB (most {max(seen.memory):.0f}); {files} open files, then {files_last}; at most {max(seen.files)}")
    assert logged == [1, *range(every, steps + 1, every)], "a step is logged never or twice"
    assert last < first * 1.05 and files_last <= files, seen.open_files()
