"""Near-duplicates across the sources of a mix: reported with both sources, found once, and kept out of training on request."""

import pytest
from small import write_csv
from test_near import encoded, photo

from mmft.common.errors import UserError
from mmft.data import mix_near
from mmft.data.mix import Mix
from mmft.data.prepare import prepare
from mmft.data.sources.table import Table


def table(folder, name, pictures):
    """A table of pictures, each with its split."""
    for n, (data, _) in enumerate(pictures):
        (folder / f"{name}{n}.img").write_bytes(data)
    write_csv(folder / f"{name}.csv", ["image", "text", "split"], *([f"{name}{n}.img", f"text {n}", split] for n, (_, split) in enumerate(pictures)))


@pytest.fixture
def folder(tmp_path):
    """a trains 2 and 3, b holds out a copy of 2, and 3 itself; b trains a small copy of 7, which a holds out; copies of 9 are trained by both."""
    table(tmp_path, "a", [*((encoded(photo(n)), "train") for n in (0, 1, 2, 3, 9)), (encoded(photo(7)), "validation")])
    table(tmp_path, "b", [*((encoded(photo(n)), "train") for n in (20, 21)), (encoded(photo(2), "JPEG", quality=60), "validation"), (encoded(photo(3)), "test"),
                          (encoded(photo(7).resize((80, 60))), "train"), (encoded(photo(9), "JPEG", quality=60), "train")])  # fmt: skip
    return tmp_path


def mixed(folder, own=False, sources="ab", **keys):
    """own: the key splits.near of b itself."""
    columns = {"image": "image", "text": "text", "split": "split"}
    parts = {n: Table(name=n, path=str(folder / f"{n}.csv"), columns=columns, splits={"validation": 0, "near": own and n == "b"}) for n in sources}
    return Mix(sources=parts, **keys).prepare(lambda source: prepare(source, folder / "out"))


def ids(prepared):
    return [row.id for row in (prepared.split("train")[n] for n in range(prepared.splits["train"]))]


def test_pairs_of_two_sources_are_reported_and_trained_by_default(folder):
    prepared = mixed(folder)
    assert ids(prepared) == ["a/1", "a/2", "a/3", "a/5", "b/1", "b/2", "b/5", "b/6"], "only the identical image is left out"
    lines = prepared.describe()
    assert ("near-duplicates: 3 pairs of images of two sources look alike; 1 held-out image of b looks like training images of a, 1 held-out image of a looks like training"
            " images of b (data.splits.near=true leaves such training rows out)") in lines  # fmt: skip
    pairs = {tuple((i["source"], i["image"], *i["splits"]) for i in pair["images"]) for pair in prepared.alike()}
    assert pairs == {(("a", "a2.img", "train"), ("b", "b2.img", "validation")), (("a", "a4.img", "train"), ("b", "b5.img", "train")), (("a", "a5.img", "validation"), ("b", "b4.img", "train"))}


@pytest.mark.parametrize("keys", [{"splits": {"near": True}}, {"own": True}])
def test_training_rows_that_look_like_held_out_ones_are_left_out(folder, keys):
    prepared = mixed(folder, **keys)
    assert ids(prepared) == ["a/1", "a/2", "a/5", "b/1", "b/2", "b/6"] and prepared.splits["validation"] == 2
    lines = prepared.describe()
    assert "a: 1 training row is left out, because b holds out an image that looks like one of its own (the first: a/3)" in lines
    assert "a: 1 training row is left out, because b holds out an image that it shows (the first: a/4)" in lines
    assert "near-duplicates: 3 pairs of images of two sources look alike" in lines


def test_what_is_found_is_kept_until_a_source_changes(folder, monkeypatch):
    first = mixed(folder)
    files = list((folder / "out").glob(".mix-*.near_duplicates.jsonl"))
    assert len(files) == 1
    find = mix_near._find
    monkeypatch.setattr(mix_near, "_find", lambda *args: pytest.fail("found again"))
    assert list(mixed(folder).alike()) == list(first.alike())
    monkeypatch.setattr(mix_near, "_find", find)
    (folder / "b2.img").write_bytes(encoded(photo(30)))
    assert len(list(mixed(folder).alike())) == 2


def test_a_set_without_hashes_is_named(folder):
    prepared = mixed(folder)
    (prepared.parts["b"].path / "looks.arrow").unlink()
    again = mixed(folder)
    assert not list(again.alike()) and any(line.startswith("b: prepared by an earlier version") for line in again.describe())


def test_a_source_of_which_nothing_is_left_is_refused(folder):
    table(folder, "c", [(encoded(photo(7), "JPEG", quality=60), "train")])
    with pytest.raises(UserError, match=r"data.sources.c: every training row shows an image that a holds out, or a near-duplicate of one"):
        mixed(folder, sources="abc", splits={"near": True})


def test_keys_that_do_not_exist_are_refused(mmft):
    for words, message in ((["data.splits.near=perhaps"], "data.splits.near"), (["data.splits.validation=3"], "data.splits.validation")):
        code, _, err = mmft("prepare", "data=mix", "data.sources.a=coco", "data.sources.a.path=X", *words)
        assert code == 2 and message in err and "Traceback" not in err


def test_explore_shows_them_with_their_sources(mmft, folder):
    words = [f"data.sources.{n}{word}" for n in "ab" for word in ("=table", f".path={folder / n}.csv", ".columns={image: image, text: text, split: split}")]
    code, out, err = mmft("explore", "data=mix", *words)
    assert code == 0, err
    assert "3 pairs of images, 2 of them in different splits" in " ".join(out.split())
    page = next(path for path in folder.rglob("*.html"))
    assert "a: train" in page.read_text(encoding="utf-8") and "b: validation" in page.read_text(encoding="utf-8")


def test_near_duplicates_inside_a_source_name_the_key_of_that_source(folder):
    """data.splits.near=true of a mix does not keep them apart."""
    table(folder, "c", [(encoded(photo(30)), "train"), (encoded(photo(30), "JPEG", quality=60), "validation")])
    (line,) = [line for line in mixed(folder, sources="ac").describe() if line.startswith("c: near-duplicates")]
    assert "(data.sources.c.splits.near=true keeps such images together)" in line
