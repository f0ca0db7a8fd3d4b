"""Terminal tables: within 80 columns, whole numbers, no colour codes away from a terminal."""

import io
import json

import pytest
from fake_run import make_run

from mmft.reports import numbers
from mmft.reports.terminal import pairs_table, plan_table, results_tables, show, summary_table


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def files(tmp_path):
    run_dir = make_run(tmp_path / "run", samples=4)
    return [json.loads((run_dir / name).read_text(encoding="utf-8")) for name in ("summary.json", "lora_plan.json")]


def printed(*tables, file=None):
    file = file or io.StringIO()
    show(*tables, file=file)
    return file.getvalue()


def test_tables_fit_and_hold_the_numbers(files):
    summary, plan = files
    summary["metrics"] = {"exact_match": 0.8125, "cider": 8.5, "own_metric": 1.0}
    summary["base_metrics"] = {"exact_match": 0.02, "cider": 9.5}
    plan["rows"][0]["part"], plan["rows"][2]["r"] = "connector", "64 (q_proj 128, v_proj 8)"
    plan["rows"][2].update(trainable=123_456_789_012, total=987_654_321_098)
    text = printed(pairs_table("Run", {"model": "tiny", "run directory": "outputs/" + "x" * 100}), plan_table(plan), *results_tables(summary), summary_table(summary))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in text and "\u2026" not in text
    cells = [line.split() for line in lines]
    assert ["exact_match", "0.020", "0.812", "+0.792"] in cells
    assert ["cider", "9.500", "8.500", "-1.000"] in cells
    assert ["own_metric", "-", "1.000", "-"] in cells
    assert ["loss", "3.610", "0.353", "-3.257"] in cells
    assert any("123.46 B" in line and "987.65 B" in line for line in lines)
    assert any(c[:2] == ["time", "1"] for c in cells) and text.count("x") > 100


def test_title_and_notes_are_wrapped_at_the_width_of_the_terminal_not_of_a_narrow_table():
    from rich.text import Text

    table = pairs_table("3 rows of shapes, split validation", {"cer": "0.812"})
    table.caption = Text("The longest reference has 26 tokens, more than generation.max_new_tokens=8; generation.max_new_tokens=auto fits it.")
    lines = [line.rstrip() for line in printed(table).splitlines()]
    assert lines[1] == "3 rows of shapes, split validation" and lines[3].startswith("The longest reference has 26 tokens, more than generation.max_new_tokens=8;")
    assert len(lines) == 5 and max(map(len, lines)) <= 80 and table.caption is not None


def test_a_loss_that_was_logged_once_is_shown_once():
    assert "train loss   4.500 -> 1.250" in printed(summary_table({"train_loss": {"first": 4.5, "last": 1.25}}))
    text = printed(summary_table({"train_loss": {"first": 4.5, "last": 4.5}}))
    assert "train loss   4.500" in text and "->" not in text


def test_names_are_not_read_as_markup_and_colours_only_reach_a_terminal(files):
    summary, _ = files
    assert "[red]x[/]" in printed(summary_table({**summary, "name": "[red]x[/]"}))
    assert "\x1b[" in printed(*results_tables(summary), file=Terminal())


def test_empty_files_print_nothing_wrong():
    assert "nan" not in printed(*results_tables({}), plan_table({}), summary_table({}))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_old_consoles_encoding_is_enough(files, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(*results_tables(files[0]), plan_table(files[1]), summary_table(files[0]), file=stream)
    stream.flush()
    assert b"exact_match" in stream.buffer.getvalue()


def test_numbers():
    assert [numbers.count(n) for n in (0, 9216, 18432, 2_410_000, 7e9, None, float("nan"))] == ["0", "9,216", "18.4 K", "2.41 M", "7.00 B", "-", "-"]
    assert [numbers.duration(s) for s in (3.21, 59.97, 102, 7500, None)] == ["3.2 s", "1 min 00 s", "1 min 42 s", "2 h 05 min", "-"]
    assert [numbers.memory(m) for m in (512, 1536)] == ["512 MB", "1.50 GB"]
    assert numbers.change(0.25, 0.5) == "+0.250" and numbers.change(None, 1) == "-" and numbers.percent(1, 0) == "-"
    assert numbers.percent(1, 1000) == "0.10%" and numbers.percent(1, 2) == "50%"
