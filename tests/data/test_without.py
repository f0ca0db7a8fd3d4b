"""data.without: rows that are left out by their ids, while all other rows stay in their splits."""

import pytest
from small import pictures, report, write_csv

from mmft.common.errors import UserError
from mmft.config.build import build
from mmft.config.compose import compose
from mmft.data.prepare import prepare, prepared_data
from mmft.data.without import read_ids


@pytest.fixture
def table(tmp_path):
    names = [f"{n}.png" for n in range(20)]
    pictures(tmp_path, *names)
    return write_csv(tmp_path / "t.csv", ["image", "text", "name"], *[[name, f"text {n}", f"row-{n}"] for n, name in enumerate(names)])


def prepared(table, tmp_path, *words):
    cfg = compose(["data=table", f"data.path={table}", "data.columns.id=name", "data.splits.validation=4", "data.splits.test=3", f"output_dir={tmp_path}", *words])
    return prepared_data(cfg)


def members(found):
    return {name: [row.id for row in found.split(name)] for name in found.splits}


def test_the_other_rows_stay_where_they_are(table, tmp_path):
    whole = members(prepared(table, tmp_path))
    out = {whole["train"][0], whole["train"][5], whole["validation"][1]}
    file = tmp_path / "without.txt"
    file.write_text("# wrong labels\n" + "\n".join(sorted(out)) + "\n\n", encoding="utf-8")
    found = prepared(table, tmp_path, f"data.without={file}")
    assert members(found) == {name: [i for i in ids if i not in out] for name, ids in whole.items()}
    assert found.manifest["reasons"] == {"left out by hand": 3} and found.manifest["dropped"] == 3
    assert {line["id"] for line in report(found)} == out


def test_a_set_is_prepared_again_when_the_ids_change_and_only_then(table, tmp_path):
    file = tmp_path / "without.txt"
    file.write_text("row-1\nrow-2\n", encoding="utf-8")
    first = prepared(table, tmp_path, f"data.without={file}")
    file.write_text('{"id": "row-2", "loss": 3.5}\nrow-1\n', encoding="utf-8")
    assert prepared(table, tmp_path, f"data.without={file}").path == first.path
    assert prepared(table, tmp_path, "data.without=[row-1,row-2]").path == first.path
    file.write_text("row-1\n", encoding="utf-8")
    assert prepared(table, tmp_path, f"data.without={file}").path != first.path


def test_unknown_ids_are_noted_and_only_unknown_ones_refused(table, tmp_path):
    found = prepared(table, tmp_path, "data.without=[row-1,row-77]")
    assert found.manifest["notes"] == ["data.without=['row-1', 'row-77']: 1 of its 2 ids are no row's, e.g. row-77"]
    with pytest.raises(UserError, match=r"none of its 2 ids is that of a row \(it names a; a row's id is row-0\)"):
        prepared(table, tmp_path, "data.without=[a,b]")


def test_a_split_is_not_emptied(table, tmp_path):
    held_out = members(prepared(table, tmp_path))["test"]
    with pytest.raises(UserError, match="leaves out every row of the test split"):
        prepared(table, tmp_path, f"data.without=[{','.join(held_out)}]")


@pytest.mark.parametrize(("text", "message"), [
    (None, "No such file or directory; name a file with one row id in each line"), ("\n# nothing\n", "names no row"), ('{"ID": 3}\n', "line 1 is neither a row id nor an object with one"),
])  # fmt: skip
def test_wrong_files_are_one_line(mmft, table, tmp_path, text, message):
    file = tmp_path / "ids.txt"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    code, _, err = mmft("prepare", "data=table", f"data.path={table}", f"data.without={file}")
    assert code == 2 and f"data.without={file}: {message}" in err and len(err.strip().splitlines()) == 1


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "ids.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_ids(str(tmp_path / "ids.png"))


def test_a_mix_takes_ids_with_their_source(table, tmp_path):
    words = [word for name in ("one", "two") for word in (f"data.sources.{name}=table", f"data.sources.{name}.path={table}", f"data.sources.{name}.columns.id=name",
             f"data.sources.{name}.splits.validation=4", f"data.sources.{name}.splits.seed={len(name)}", f"data.sources.{name}.without=null")]  # fmt: skip
    words = ["data=mix", *words, f"output_dir={tmp_path}"]
    whole = prepared_data(compose(words))
    out = [next(row.id for row in whole.split("train") if row.source == name) for name in ("one", "two")]
    found = prepared_data(compose([*words, f"data.without=[{','.join(out)}]"]))
    assert {row.id for row in whole.split("train")} - {row.id for row in found.split("train")} == set(out)
    assert [row.id for row in whole.split("validation")] == [row.id for row in found.split("validation")]
    with pytest.raises(UserError, match="three/row-1 names no source; ids begin with one of one/, two/"):
        prepared_data(compose([*words, "data.without=[three/row-1]"]))


def test_keys_of_sets_without_it_are_unchanged(table, tmp_path):
    """Sets that were prepared before these keys existed are found again."""
    source = build(compose(["data=table", f"data.path={table}"]).data, "data")
    assert not {"without", "near_distance"} & source.settings().keys() and "near" not in source.settings()["splits"]
    assert "index" not in source.settings()["columns"]
    assert prepare(source, tmp_path).splits
