"""Row readers and prepare against arbitrary bytes and arbitrary JSON: a UserError, a BadRow row, or a row; nothing lost, no traceback."""

import csv
import io
import itertools
import json
import tempfile
from pathlib import Path

import pytest
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st
from small import Given, all_rows, png

from mmft.common.errors import UserError
from mmft.data.prepare import prepare
from mmft.data.readers import files
from mmft.data.row_checks import problem, strip_texts
from mmft.data.sample import BadRow, Row
from mmft.data.sources.columns import Columns
from mmft.data.sources.conversations import Conversations
from mmft.data.sources.messages import OpenAIMessages
from mmft.data.sources.table import Table

text = st.text(max_size=30)
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from(["a.png", "../a.png", "<image>", "data:image/png;base64,AAAA", "user", "assistant", "\ud800"]))
words = st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "image_url", "url", "path", "bytes", "messages", "conversations", "id", "split"])
anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | text, inner, max_size=4), max_leaves=12)
kind = st.sampled_from(["text", "image", "image_url", "input_text", "video", None])
part = st.fixed_dictionaries({"type": kind}, optional={"text": scalar, "image": anything, "image_url": anything, "path": scalar})
turn = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool"]) | anything, "from": st.sampled_from(["human", "gpt"]) | anything,
                                           "content": text | st.lists(part | anything, max_size=3) | anything, "value": text | anything})  # fmt: skip
record = st.fixed_dictionaries({}, optional={
    "messages": st.lists(turn, max_size=4) | anything, "conversations": st.lists(turn, max_size=4) | anything, "images": anything, "image": anything,
    "text": anything, "prompt": anything, "id": anything, "split": anything, "references": anything, "system": anything,
})  # fmt: skip


HOME, NUMBERS = tempfile.TemporaryDirectory(prefix="mmft-fuzz-"), itertools.count()


def written(name: str, data: bytes) -> Path:
    folder = Path(HOME.name, str(next(NUMBERS)))
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / name).write_bytes(data)
    return folder / name


def read_all(path: Path) -> list | None:
    try:
        return list(files.read(path))
    except UserError as error:
        assert str(error).count("\n") == 0 or "\n" in path.name
        return None


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"])
@given(data=st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
@examples(25)
def test_any_bytes_under_any_suffix(suffix, data):
    path = written(f"x{suffix}", data)
    for item in read_all(path) or ():
        assert isinstance(item, BadRow) or isinstance(item[1], dict)
    files.count([path])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.integers(0, 10_000))
@examples(25)
def test_damaged_tables(suffix, place, bit, cut):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, buffer = pa.table({"image": ["a.png"] * 20, "text": [f"text {i}" for i in range(20)]}), io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(table, buffer)
    else:
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    data = bytearray(buffer.getvalue())
    data[place % len(data)] ^= 1 << bit
    read_all(written(f"x{suffix}", bytes(data[: len(data) - cut % len(data)] if cut % 2 else data)))


@given(rows=st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12), min_size=2, max_size=2), max_size=6))
@examples(60)
def test_csv_round_trip_loses_no_cell(rows):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["image", "text"], *rows])
    found = read_all(written("x.csv", buffer.getvalue().encode()))
    assert found is not None
    kept = [list(values.values()) for _, values in (i for i in found if not isinstance(i, BadRow))]
    # what Python's own writer wrote and its reader reads: carriage returns as they are; a file with nulls is refused
    assert kept == [r for r in csv.reader(io.StringIO(buffer.getvalue(), newline="")) if r][1:] == rows


@given(rows=st.lists(record, max_size=5), array=st.booleans())
@example(rows=[{"messages": [], "system": [{}, None]}], array=False)
@example(rows=[{"images": [{}, None], "text": [{}, None]}], array=False)
@example(rows=[{"references": [{}, {}]}], array=False)
@example(rows=[{"images": {}}], array=False)
@example(rows=[{"images": {}, "system": {}}], array=False)
@example(rows=[{"messages": {"content": None, "": None}}], array=False)
@example(rows=[{"images": [{}, {}]}], array=False)
@examples(60)
def test_json_rows_are_all_accounted_for(rows, array):
    data = (json.dumps(rows) if array else "".join(json.dumps(r) + "\n" for r in rows)).encode()
    found = read_all(written("x.json" if array else "x.jsonl", data))
    assert found is not None and len(found) == len(rows)


@given(row=record, position=st.sampled_from(["kept", "first", "added"]))
@examples(150)
def test_any_record_becomes_a_row_or_says_why_not(row, position):
    columns = (Columns(image="image", text="text", prompt="prompt", system="system", references="references", id="id", split="split"),
               Columns(image="images", messages="messages"), Columns(image="image", messages="conversations"))  # fmt: skip
    for reader in columns:
        made = reader.row(row, "x:1", position=position)
        if isinstance(made, Row):
            strip_texts(made)
            reason = problem(made, text_only=True)
            assert reason is None or ": " in reason
        else:
            assert isinstance(made, BadRow) and made.reason


@pytest.mark.parametrize("source", ["messages", "conversations", "table"])
@given(rows=st.lists(record, min_size=1, max_size=5))
@examples(25)
def test_a_file_of_any_records_is_prepared_or_refused(source, rows):
    """The whole way to disk: rows read = rows kept + rows dropped, whatever they hold."""
    good = {"id": "good", "image": "a.png", "images": ["a.png"], "text": "a thing", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]}
    good["conversations"] = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    path = written("x.jsonl", "".join(json.dumps(r) + "\n" for r in [good, *rows]).encode())
    keys = {"path": str(path), "max_bad_share": 1.0}
    made = {"messages": lambda: OpenAIMessages(**keys), "conversations": lambda: Conversations(**keys, file="x.jsonl"), "table": lambda: Table(**keys)}[source]()
    try:
        prepared = prepare(made, path.parent / "out")
    except UserError:
        return
    kept = all_rows(prepared)
    assert len(kept) + prepared.manifest["dropped"] == len(rows) + 1 == prepared.manifest["rows_read"] and any(s.answer_text in ("x", "a thing") for s in kept)
    for sample in kept:
        assert sample.references and sample.load_images()


@given(answers=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=4))
@examples(30)
def test_answers_come_back_as_they_were(answers):
    from mmft.data.sample import assistant_turn, user_turn

    rows = [Row([png(i)], [user_turn(1, "?"), assistant_turn(a)], where=f"x:{i}") for i, a in enumerate(answers)]
    with tempfile.TemporaryDirectory() as out:
        try:
            prepared = prepare(Given(given=rows, max_bad_share=1.0), out)
        except UserError:
            assert not any(a.strip() for a in answers)
            return
        assert [s.answer_text for s in all_rows(prepared)] == [a.strip() for a in answers if a.strip()]
