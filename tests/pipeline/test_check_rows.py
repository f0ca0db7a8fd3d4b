"""Rows that cannot be trained are found before the first step, all of them, with their lengths."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image


@pytest.fixture
def table(tmp_path):
    """Twelve rows; the answers of rows 3, 7 and 11 have 60 words."""
    Image.new("RGB", (56, 56), (200, 40, 0)).save(tmp_path / "a.png")
    answers = [" ".join(["red"] * (60 if n % 4 == 3 else 2)) for n in range(12)]
    lines = ["image,question,answer", *(f"a.png,What is it {n}?,{a}" for n, a in enumerate(answers))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    return [
        "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}", "data.columns={image: image, text: answer, prompt: question}",
        "data.splits.validation=0", "evaluation.split=null", "logger=none", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2",
        "collator.max_length=60",
    ]  # fmt: skip


def test_all_long_rows_are_named_before_training(mmft, tmp_path, table):
    code, out, err = mmft(*table, f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 2 and "step" not in out and err.count("\n") == 1, err
    assert "3 of 12 rows are longer than collator.max_length=60" in err
    assert len(re.findall(r"\(\d+ tokens\)", err)) == 3, "each with its length"
    assert "data.too_long=drop" in err


def test_long_rows_of_every_split_are_named_at_once(mmft, tmp_path, table):
    """By rows: the last four are held out, and rows 3 and 7 are trained on, row 11 is measured."""
    images = [f"a{n}.png" for n in range(12)]
    lines = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    for n, name in enumerate(images):
        Image.new("RGB", (56, 56), (n * 20, 40, 0)).save(tmp_path / name)
        lines[n + 1] = lines[n + 1].replace("a.png", name)
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    words = [w for w in table if not w.startswith(("evaluation.split", "data.splits"))]
    code, out, err = mmft(*words, "data.splits.validation=4", "data.splits.by=last", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 2 and "step" not in out and err.count("\n") == 1, err
    assert "train: 2 of 8 rows" in err and "validation: 1 of 4 rows" in err and len(re.findall(r"\(\d+ tokens\)", err)) == 3


def test_the_way_on_drops_them_and_counts_them(mmft, tmp_path, table):
    run = tmp_path / "run"
    code, out, err = mmft(*table, "data.too_long=drop", f"run_dir={run.as_posix()}")
    assert code == 0, err[-2000:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    dropped = [json.loads(line) for line in (run / "dropped_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert summary["dropped_rows"] == len(dropped) == 3 and all(row["tokens"] > 60 for row in dropped)
    assert "3 of 12 rows of train are longer" in out


def test_a_limit_below_every_row_is_an_error_in_both_modes(mmft, tmp_path, table):
    for mode in ("refuse", "drop"):
        code, _, err = mmft(*table, "collator.max_length=3", f"data.too_long={mode}", f"run_dir={(tmp_path / mode).as_posix()}")
        assert code == 2 and "collator.max_length=3" in err, err


def test_a_wrong_mode_is_one_line(mmft, table):
    code, _, err = mmft(*table, "data.too_long=cut")
    assert code == 2 and "data.too_long=cut: must be refuse or drop" in err
