"""Batches of rows of similar length: an order that depends on seed and epoch alone, with little padding."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from mmft.training.sampling import LengthGroupedSampler


def order(lengths, batch=4, seed=0, epoch=0):
    sampler = LengthGroupedSampler(lengths, batch, seed)
    sampler.epoch = epoch
    return list(sampler)


@pytest.mark.parametrize("n", [1, 3, 16, 17, 1000])
def test_every_row_once_and_the_longest_first(n):
    lengths = [random.Random(n + i).randint(5, 400) for i in range(n)]
    drawn = order(lengths)
    assert sorted(drawn) == list(range(n))
    assert lengths[drawn[0]] == max(lengths)


def test_the_order_depends_on_seed_and_epoch():
    lengths = [random.Random(i).randint(5, 400) for i in range(300)]
    assert order(lengths) == order(lengths)
    assert order(lengths) != order(lengths, epoch=1) and order(lengths) != order(lengths, seed=1)


def padded(lengths, drawn, batch):
    return sum(batch * max(lengths[i] for i in drawn[k : k + batch]) for k in range(0, len(drawn), batch))


def test_batches_have_little_padding():
    """A thousand rows of 5 to 400 tokens: a random order pads each batch of 4 to about its longest row, 1.6 times the tokens."""
    lengths = [random.Random(i).randint(5, 400) for i in range(1000)]
    at_random = list(range(1000))
    random.Random(0).shuffle(at_random)
    assert padded(lengths, at_random, 4) > 1.4 * sum(lengths)
    assert padded(lengths, order(lengths), 4) < 1.06 * sum(lengths)


@pytest.fixture
def uneven(tmp_path):
    """Sixteen rows whose answers have 1 to 16 words."""
    Image.new("RGB", (56, 56), (200, 40, 0)).save(tmp_path / "a.png")
    lines = ["image,question,answer", *(f"a.png,What is it {n}?,{' '.join(['red'] * (n + 1))}" for n in range(16))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    return [
        "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}", "data.columns={image: image, text: answer, prompt: question}",
        "data.splits.validation=0", "evaluation.split=null", "logger=none", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1",
    ]  # fmt: skip


def test_the_key_groups_rows_and_a_sweep_does_too(mmft, tmp_path, uneven):
    """With 16 rows a megabatch is two batches of 2: the first batch holds the longest row and rows of its megabatch."""
    words = [*uneven, "trainer.train_sampling_strategy=group_by_length", "trainer.num_train_epochs=1"]
    code, _, err = mmft(*words, f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0, err[-2000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]
    code, _, err = mmft(*uneven, "trainer.num_train_epochs=1", f"run_dir={(tmp_path / 'random').as_posix()}")
    plain = [json.loads(line)["loss"] for line in (tmp_path / "random" / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]
    assert len(losses) == len(plain) == 8 and losses != plain
    code, out, err = mmft("-m", "lora.r=2,4", *words, "trainer.max_steps=1", "name=two")
    assert code == 0 and "2 points in step" in out, err[-2000:]
