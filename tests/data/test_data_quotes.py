"""Quotes in CSV and TSV files: an unclosed or stray one is named with its line, or is text; it never merges rows."""

import csv

import pytest
from small import all_rows, make, pictures

from mmft.common.errors import UserError
from mmft.data.readers.files import ReadOptions, read
from mmft.data.sources.table import Table


def cells(path, **keys):
    return [list(values.values()) for _, values in read(path, ReadOptions(**keys))]


def rows_of(number, bad, at):
    """A header and rows `i.png,"text i"` of which one is replaced."""
    lines = [f'{i}.png,"text {i}"' for i in range(number)]
    lines[at] = bad
    return "image,text\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("text, line", [
    (rows_of(20, '9.png,"text 9', 9), 11),  # not closed
    (rows_of(20, '9.png,"text 9', 19), 21),  # in the last row
    (rows_of(3, '9.png,""text 9"', 1), 3),  # an empty cell with text behind it
    (rows_of(3, '9.png,"text" 9', 1), 3),
    (rows_of(3, '"9.png,"text 9"', 1), 3),  # in the image's cell
    ('image,text\n0.png,"two\nlines"\n1.png,"open\n2.png,"x"\n', 4),  # behind a row of two lines
    ('image,text,more\n0.png,"two\nlines","open\n1.png,x,y\n', 3),  # in the second line of a row
    ('image,text\n0.png,"open\n1.png,x\n2.png,y"\n3.png,z\n', 2),  # closed by a stray quote two rows later
    ('id,image,text\n7,a,"open\n8,b,x"\n', 2),  # no file names, but running numbers
    ('text,image\n"open,https://host/a\nx",https://host/b\n', 2),
])  # fmt: skip
def test_the_line_of_the_quote_is_named(tmp_path, text, line, end):
    (tmp_path / "t.csv").write_bytes(text.replace("\n", end).encode())
    with pytest.raises(UserError, match=rf"t.csv: line {line}: the quote that opens a cell here .*data.quotes=text") as caught:
        cells(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)
    physical = text.count("\n") - 1
    found = list(read(tmp_path / "t.csv", ReadOptions(quotes="text")))  # the way forward: every line is a row, or is named
    assert len(found) == physical


@pytest.mark.parametrize("text", ['a 12" pipe', 'say "hi" now', 'he said "hi"', '6"', 'a "b" "c"'])
def test_quotes_inside_a_cell_are_text(tmp_path, text):
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        (tmp_path / name).write_text(f"image{delimiter}text\na.png{delimiter}{text}\n")
        assert cells(tmp_path / name) == [["a.png", text]]


@pytest.mark.parametrize("cell", ["two\nlines", "a, b", 'a "b"', "two\n\nlines, with commas\nand 3 more", "first,\nsecond, third", '"', 'x"\ny', " , ", "1\n2"])
def test_what_python_writes_is_read_back(tmp_path, cell):
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([["image", "text"], ["a.png", cell], ["b.png", "plain"]])
        if name == "t.tsv" and cell == '"':
            continue  # a cell of one quote, written as four: the same as text of four quotes
        assert cells(tmp_path / name) == [["a.png", cell], ["b.png", "plain"]]


@pytest.mark.parametrize("text", ['"Stop" sign', '"open', 'x"', '"', '"a" and "b"', '""', 'a 5" wheel "'])
def test_quotes_of_a_tsv_that_encloses_nothing_are_text(tmp_path, text):
    (tmp_path / "t.tsv").write_text(f'image\ttext\na.png\t{text}\nb.png\the said "no"\nc.png\t"open\nd.png\tplain\n')
    notes = []
    found = [values for _, values in read(tmp_path / "t.tsv", note=notes.append)]
    assert [v["text"] for v in found] == [text, 'he said "no"', '"open', "plain"] and "quotes are read as text" in notes[0]


def test_the_note_reaches_the_user(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "t.tsv").write_text('image\ttext\na.png\t"Stop" sign\nb.png\tx\n')
    prepared = make(Table(path=str(tmp_path / "t.tsv")), tmp_path)
    assert [s.answer_text for s in all_rows(prepared)] == ['"Stop" sign', "x"] and "line 2" in prepared.manifest["notes"][0]


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path, monkeypatch):
    from mmft.data.readers import delimited

    monkeypatch.setattr(delimited, "LONGEST_ROW", 10_000)
    (tmp_path / "t.csv").write_text('image,text\na.png,"open\n' + "b.png,x\n" * 100_000)
    with pytest.raises(UserError, match="line 2"):
        cells(tmp_path / "t.csv")
