"""loss_curve.png: what is drawn, and that odd logs do not stop it."""

import json
import warnings

import numpy
import pytest
from PIL import Image, ImageColor

from mmft.common.files import read_jsonl
from mmft.reports.loss_curve import EVAL, RATE, TRAIN, held_out, smooth, write_curve
from mmft.reports.run_files import series


def draw(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return write_curve(tmp_path)


def pixels_of(path, colour):
    picture = numpy.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(picture - ImageColor.getrgb(colour)).sum(-1) < 12).sum())


def test_all_three_lines_are_drawn(tmp_path):
    rows = [{"step": s, "loss": 3 / s, "learning_rate": 1e-3 / s} for s in range(1, 20)] + [{"step": s, "eval_loss": 4 / s} for s in (5, 10)]
    path = draw(tmp_path, rows)
    assert path.name == "loss_curve.png" and Image.open(path).size == (1440, 840)
    assert all(pixels_of(path, c) > 300 for c in (TRAIN, EVAL, RATE))


def test_the_held_out_line_is_of_the_loss_that_is_trained():
    """Of a preference objective its own loss: the cross entropy is another function, on another scale."""
    rows = [{"step": 5, "eval_loss": 9.0, "eval_preference_loss": 0.6}, {"step": 9, "eval_loss": 8.0, "eval_preference_loss": 0.5}]
    assert held_out(rows) == ([5, 9], [0.6, 0.5]) and held_out([{"step": 5, "eval_loss": 9.0}]) == ([5], [9.0])


@pytest.mark.parametrize("rows, shown, not_shown", [
    ([{"step": 1, "loss": 2.0}], TRAIN, EVAL),  # a single point is a dot
    ([{"step": 5, "eval_loss": 2.0}], EVAL, TRAIN),
    ([{"step": s, "loss": 10.0**-s} for s in range(1, 6)], TRAIN, RATE),  # log scale
    ([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.0}, {"step": 3, "loss": 1.0}, {"step": 4, "loss": "x"}], TRAIN, EVAL),
    ([{"step": s, "loss": 1.0, "learning_rate": 0.0} for s in range(200)], TRAIN, EVAL),
])  # fmt: skip
def test_odd_logs(tmp_path, rows, shown, not_shown):
    path = draw(tmp_path, rows)
    assert pixels_of(path, shown) > 20 and pixels_of(path, not_shown) == 0


def test_without_losses_there_is_no_picture(tmp_path):
    assert write_curve(tmp_path) is None and draw(tmp_path, [{"step": 1, "learning_rate": 1.0}, {"step": 2, "loss": float("inf")}]) is None
    assert not (tmp_path / "loss_curve.png").exists()


def test_reading_keeps_the_last_value_of_a_step_and_skips_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": 3}\nnot json\n[1]\n{"step": 2, "loss": 2}\n{"step": 3, "lo', encoding="utf-8")
    assert series(read_jsonl(path), "loss") == ([1, 2], [3, 2])
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_smooth_is_centred():
    assert smooth([0, 3, 6, 9, 30], 1) == [0, 3, 6, 15, 30]
    assert smooth([1.0, 2.0], 0) == [1.0, 2.0]
