"""Splits by image content: the rule itself, on random multi-image rows, and exact counts by hand."""

import hashlib
import random

import numpy as np
import pytest

from mmft.common.errors import UserError
from mmft.data.sources.base import BaseSource, Splits
from mmft.data.splits import DROPPED, TEST, TRAIN, VALIDATION, assign, choose


def divide(rows, splits, own=None):
    """rows: a list of lists of content numbers."""
    offsets = np.cumsum([0] + [len(r) for r in rows]).astype(np.int64)
    contents = np.array([c for r in rows for c in r], dtype=np.int32)
    n = max((c for r in rows for c in r), default=-1) + 1
    digests = [hashlib.sha256(b"%d" % c).digest() for c in range(n)]
    return assign(np.array([-1] * len(rows) if own is None else own, dtype=np.int8), offsets, contents, digests, splits)


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
        if code != DROPPED:
            for image in row:
                assert seen.setdefault(image, code) == code
    assert sorted(np.flatnonzero(result.codes == DROPPED)) == sorted(result.dropped)
    if own is None:
        assert not result.dropped  # nothing is lost when the rows are ours to divide


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
    assert result.codes.tolist() == [TRAIN, VALIDATION, VALIDATION, DROPPED]
    assert list(result.dropped) == [3] and "image in two splits" in result.dropped[3]


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


def test_no_held_out_rows_may_be_asked_for():
    assert (divide([[0], [1]], Splits()).codes == TRAIN).all()


@pytest.mark.parametrize("bad", [{"validation": -1}, {"validation": 1.0}, {"test": True}, {"by": "first"}, {"validation": "many"}])
def test_splits_refuses(bad):
    with pytest.raises(UserError, match="data.splits"):
        Splits(**bad)


def test_source_names_a_wrong_key():
    with pytest.raises(UserError, match="data.splits.validaton: no such key. Did you mean validation"):
        BaseSource(splits={"validaton": 4})
