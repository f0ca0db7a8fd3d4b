"""The JSON array reader: the same rows as json.load, at any chunk size, with memory that does not grow."""

import json
import random
import tracemalloc

import pytest

from mmft.common.errors import UserError
from mmft.data.readers import files, json_files


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_array_equals_json_load(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    rng = random.Random(3)
    rows = [{"n": i, "t": "ab\"[]{},\\ é 三 😀" * rng.randrange(4), "l": [1, -2.5e-3, None, True, {"x": []}]} for i in range(20)] + [123, 4567, "s", []]
    for indent in (None, 2):
        path = tmp_path / f"a{indent}.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
        assert [v for v, _ in json_files.json_array(path)] == rows
        path.write_text(json.dumps({"skip": {"rows": [9]}, "also": rows, "rows": rows, "after": 1}, indent=indent), encoding="utf-8")
        assert [v for v, _ in json_files.json_array(path, "rows")] == rows


def test_empty_array_and_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff [ ] ", encoding="utf-8")
    assert list(json_files.json_array(tmp_path / "a.json")) == []


@pytest.mark.parametrize("text", ["[1, 2", '[{"a": 1} {"a": 2}]', "[1, nope]", '{"a": 1', ""])
def test_broken_arrays_are_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json: ") as caught:
        list(json_files.json_array(tmp_path / "a.json", "rows" if text.startswith("{") else None))
    assert "\n" not in str(caught.value)


def test_json_lines_under_the_name_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert [r for r in files.read(tmp_path / "a.json")] == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]


def test_memory_is_a_few_chunks(tmp_path):
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"id": i, "value": "x" * 200}) for i in range(100_000)) + "]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    assert sum(1 for _ in files.read(path)) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000, peak


def test_counts_of_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"value": "x" * 50}] * 5000))
    assert 4500 < files.count([path]) < 5500
    (tmp_path / "a.jsonl").write_text("{}\n" * 7)
    assert files.count([tmp_path / "a.jsonl"]) == 7 and files.count([tmp_path / "a.jsonl", tmp_path / "absent.json"]) is None
