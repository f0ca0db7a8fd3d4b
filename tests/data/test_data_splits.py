"""Splits by image content: the rule itself, on random multi-image rows, and exact counts by hand."""

import hashlib
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmft.common.errors import UserError
from mmft.data import row_numbers
from mmft.data.row_numbers import RowNumbers
from mmft.data.sources.base import BaseSource, Splits
from mmft.data.splits import DROPPED, MERGED, TEST, TRAIN, VALIDATION, assign, choose, later_rows


def numbers(folder, rows, own=None, prompts=None):
    """rows: a list of lists of content numbers. They are written in two batches."""
    written = RowNumbers(Path(folder))
    for some in (slice(0, len(rows) // 2), slice(len(rows) // 2, None)):
        given, keys = ((values or [least] * len(rows))[some] for values, least in ((own, -1), (prompts, 0)))
        written.add(given, [len(r) for r in rows[some]], [c for r in rows[some] for c in r], keys)
    written.close()
    return written


def divide(rows, splits, own=None, alike=None, merged=None):
    """The assignment of `numbers`."""
    with tempfile.TemporaryDirectory() as folder:
        written = numbers(folder, rows, own)
        return assign(written, [hashlib.sha256(b"%d" % c).digest() for c in range(written.n_contents)], splits, alike, merged)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("by", ["random", "last"])
def test_no_image_is_ever_in_two_splits(seed, by):
    rng = random.Random(seed)
    rows = [[rng.randrange(80) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))] for _ in range(120)]
    own = [rng.choice((-1, -1, -1, 0, 1)) for _ in rows] if seed % 3 == 0 else None
    splits = Splits(validation=rng.choice((0.1, 7)), test=rng.choice((0, 0.05, 5)), by=by, seed=seed)
    try:
        result = divide(rows, splits, own)
    except UserError:
        return  # one group may hold nearly all rows
    seen = {}
    for row, code in zip(rows, result.codes):
        if code < DROPPED:
            for image in row:
                assert seen.setdefault(image, code) == code
    if own is None:
        assert (result.codes < DROPPED).all()  # nothing is lost when the rows are ours to divide


@pytest.mark.parametrize("by", ["random", "last"])
def test_rows_read_in_parts_are_divided_as_rows_read_at_once(monkeypatch, by):
    """Rows with none to three images, some merged, some without images: parts of 7 rows against all 400 at once."""
    rng = random.Random(3)
    rows = [[rng.randrange(200) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3)))] for _ in range(400)]
    own, merged = [rng.choice((-1, -1, -1, 0, 1)) for _ in rows], np.array([rng.random() < 0.1 for _ in rows])
    alike = np.arange(200) // 2 * 2
    for given, pairs in ((None, None), (own, None), (None, alike), (own, alike)):
        splits = Splits(validation=30, test=0.1, by=by)
        at_once = divide(rows, splits, given, pairs, merged)
        with monkeypatch.context() as patch:
            patch.setattr(row_numbers, "AT_ONCE", 7)
            in_parts = divide(rows, splits, given, pairs, merged)
        assert in_parts.codes.tolist() == at_once.codes.tolist() and in_parts.notes == at_once.notes and in_parts.reasons == at_once.reasons
        assert (at_once.codes == TEST).any() and ((at_once.codes == MERGED) == merged).all()


def test_prompts_that_several_rows_have(tmp_path, monkeypatch):
    """Keys in buckets that hold five different ones on average: the keys that come twice, and the rows that are not the first of key and split, by counting."""
    monkeypatch.setattr(row_numbers, "AT_ONCE", 7)
    monkeypatch.setattr(row_numbers, "KEYS", 5)
    rng = random.Random(4)
    keys = [rng.choice((rng.randrange(1 << 63), rng.randrange(20) << 58)) for _ in range(500)]
    own = [rng.choice((-1, 0, 1)) for _ in keys]
    written = numbers(tmp_path, [[0]] * len(keys), own, keys)
    buckets = list(written.by_prompt())
    assert len(buckets) > 50 and sorted(row for b in buckets for rows, _ in b.parts() for row in rows.tolist()) == list(range(500))
    assert [key for b in buckets for key in b.repeated().tolist()] == sorted(key for key, n in Counter(keys).items() if n > 1)
    seen = set()
    assert later_rows(written).tolist() == [pair in seen or seen.add(pair) is not None for pair in zip(keys, own)]


def test_the_recipe_of_496_and_4():
    result = divide([[i] for i in range(500)], Splits(validation=4, by="last"))
    assert (result.codes[:496] == TRAIN).all() and (result.codes[496:] == VALIDATION).all()


def test_last_puts_test_after_validation():
    result = divide([[i] for i in range(10)], Splits(validation=3, test=2, by="last"))
    assert result.codes.tolist() == [TRAIN] * 5 + [VALIDATION] * 3 + [TEST] * 2


def test_last_keeps_captions_of_one_image_together():
    # the last row shows the image of row 0, so row 0 goes with it
    assert divide([[0], [1], [2], [0]], Splits(validation=2, by="last")).codes.tolist() == [VALIDATION, TRAIN, TRAIN, VALIDATION]


def test_rows_linked_through_others_are_one_group():
    result = divide([[0, 1], [1, 2], [2, 3], [4]], Splits(validation=1, by="last"))
    assert result.codes.tolist() == [TRAIN, TRAIN, TRAIN, VALIDATION]
    with pytest.raises(UserError, match="validation split has no rows .*the fewest that do are 3"):
        divide([[0, 1], [1, 2], [2, 0]], Splits(validation=1))


@pytest.mark.parametrize(("sizes", "count", "total"), [
    ([3, 2, 2], 4, 4),  # taking 3 first would end at 3
    ([5, 5, 5], 7, 5),  # nearest not above
    ([9], 4, 0),
    ([1] * 50, 13, 13),
    ([6, 4, 4, 3, 1], 8, 8),
    ([4, 6, 10, 15], 21, 21),
])
def test_choose_is_exact_where_groups_allow(sizes, count, total):
    chosen = choose(np.array(sizes), count)
    assert int(np.array(sizes)[chosen].sum()) == total


def test_choose_against_brute_force():
    rng = random.Random(5)
    for _ in range(200):
        sizes = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 9))]
        count = rng.randrange(1, 25)
        sums = {0}
        for size in sizes:
            sums |= {s + size for s in sums}
        assert int(np.array(sizes)[choose(np.array(sizes), count)].sum()) == max(s for s in sums if s <= count)


def test_a_count_that_groups_do_not_allow_is_noted():
    result = divide([[0], [0], [0], [1], [1], [1], [2], [2], [2]], Splits(validation=4, by="last"))
    assert (result.codes == VALIDATION).sum() == 3
    assert result.notes == ["validation: 3 rows, 4 were asked for; rows that share an image stay together"]


def test_random_depends_on_content_and_seed_only():
    rows = [[i] for i in range(200)]
    one = divide(rows, Splits(validation=20, seed=1)).codes
    again = divide(rows, Splits(validation=20, seed=1)).codes
    other = divide(rows, Splits(validation=20, seed=2)).codes
    assert one.tolist() == again.tolist() != other.tolist()
    assert (one == VALIDATION).sum() == 20
    assert np.flatnonzero(one == VALIDATION)[:5].tolist() == RANDOM_OF_SEED_1  # the same on every platform
    # turned round, the same images are drawn
    turned = divide(rows[::-1], Splits(validation=20, seed=1)).codes[::-1]
    assert turned.tolist() == one.tolist()


# sha256(b"1:" + sha256(b"<number>")) of the 200 contents, sorted; the first 20 numbers, in order, first five of them
RANDOM_OF_SEED_1 = sorted(sorted(range(200), key=lambda c: hashlib.sha256(b"1:" + hashlib.sha256(b"%d" % c).digest()).digest())[:20])[:5]


def test_own_splits_are_kept_and_training_rows_with_held_out_images_are_dropped():
    result = divide([[0], [1], [2], [2, 3]], Splits(), own=[0, 1, 1, 0])
    assert result.codes[:3].tolist() == [TRAIN, VALIDATION, VALIDATION] and result.codes[3] >= DROPPED
    assert result.reason(3) == "image in two splits: this train row shows an image of a held-out split"


def test_own_validation_is_not_cut_again_but_test_is():
    result = divide([[i] for i in range(10)], Splits(validation=3, test=2, by="last"), own=[1] + [0] * 9)
    assert [(result.codes == c).sum() for c in (TRAIN, VALIDATION, TEST)] == [7, 1, 2]
    assert "the data's own split is used" in result.notes[0]


@pytest.mark.parametrize(("splits", "name"), [
    ({"validation": 10}, "train"), ({"validation": 0.001}, "validation"), ({"validation": 5, "test": 5}, "train"),
])
def test_a_split_without_rows_is_an_error(splits, name):
    with pytest.raises(UserError, match=f"{name} split has no rows"):
        divide([[i] for i in range(10)], Splits(**splits))


def test_a_set_whose_rows_are_all_held_out_has_nothing_to_train_on():
    with pytest.raises(UserError, match="train split has no rows"):
        divide([[i] for i in range(10)], Splits(test=2), own=[1] * 10)


def test_no_held_out_rows_may_be_asked_for():
    assert (divide([[0], [1]], Splits()).codes == TRAIN).all()


@pytest.mark.parametrize("bad", [{"validation": -1}, {"validation": 1.0}, {"test": True}, {"by": "first"}, {"validation": "many"}])
def test_splits_refuses(bad):
    with pytest.raises(UserError, match="data.splits"):
        Splits(**bad)


def test_source_names_a_wrong_key():
    with pytest.raises(UserError, match="data.splits.validaton: no such key. Did you mean validation"):
        BaseSource(splits={"validaton": 4})
