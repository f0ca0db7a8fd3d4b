"""Batches filled by tokens: every row once, none too large, as many in each epoch; exact losses, resume, mixes, sweeps and refusals."""

from __future__ import annotations

import json
import random

import pytest
from interrupted import final, killed_after
from interrupted import rows as logged
from mixed import mix, write_sources
from PIL import Image

from mmft.data.mixing import Mixing
from mmft.training.token_batches import RowSizes, TokenBatchSampler


def sizes(n, seed=0, several=False):
    draw = random.Random(seed)
    return RowSizes([draw.randint(5, 400) for _ in range(n)], [draw.choice((1, 1, 1, 3)) if several else 1 for _ in range(n)])


def positions(size, batch, packed=False):
    """What a batch holds, by its definition: rows padded to the longest, or end to end."""
    lengths = [size.lengths[row] for row in batch for _ in range(size.sequences[row])]
    return sum(lengths) if packed else len(lengths) * max(lengths)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n, several", [(1, False), (3, False), (17, True), (1000, False), (300, True)])
def test_every_row_once_no_batch_too_large_and_as_many_batches_in_each_epoch(n, several, packed):
    size = sizes(n, n, several)
    sampler = TokenBatchSampler(size, 1200, seed=1, packed=packed)
    for epoch in [0, 1, 2, *range(7, 40)]:  # also of a run that was extended
        sampler.epoch = epoch
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(n))
        assert max(positions(size, batch, packed) for batch in batches) <= 1200 and all(batches)
        assert len(batches) == len(sampler)


def test_the_order_depends_on_seed_and_epoch_and_the_longest_row_comes_first():
    size = sizes(200)
    made = TokenBatchSampler(size, 2000, seed=1)
    assert made.batches(0) == TokenBatchSampler(size, 2000, seed=1).batches(0)
    assert made.batches(0) != made.batches(1) and made.batches(0) != TokenBatchSampler(size, 2000, seed=2).batches(0)
    assert max(size.lengths) in [size.lengths[row] for row in made.batches(0)[0]]
    lengths = [max(size.lengths[row] for row in batch) for batch in made.batches(0)]
    assert lengths[1:] != sorted(lengths[1:], reverse=True), "short and long batches take turns"


def least_batches(lengths, limit):
    """The fewest padded batches there can be: the longest row is joined by as many of the next longest as fit beside it."""
    left, n = sorted(lengths, reverse=True), 0
    while left:
        left, n = left[limit // left[0] :], n + 1
    return n


def test_batches_are_full():
    """A thousand rows of 5 to 400 tokens: random batches of a fixed number of rows pad to 1.6 times the tokens."""
    size = sizes(1000)
    for packed, most in ((False, 1.07), (True, 1.0)):
        sampler = TokenBatchSampler(size, 4000, seed=0, packed=packed)
        assert sum(positions(size, batch, packed) for batch in sampler) <= most * sum(size.lengths)
        assert len(sampler) <= 1.06 * (packed and sum(size.lengths) / 4000 or least_batches(size.lengths, 4000))


def test_steps_know_their_rows():
    size = sizes(50)
    sampler = TokenBatchSampler(size, 900, seed=3, accumulate=2)
    each = [len(batch) for epoch in range(3) for batch in sampler.batches(epoch)]
    per_epoch = -(-len(sampler) // 2)
    counted, expected = [sampler.rows_until(step) for step in range(3 * per_epoch + 1)], [0]
    for epoch in range(3):
        own = each[epoch * len(sampler) : (epoch + 1) * len(sampler)]
        for step in range(per_epoch):
            expected.append(expected[-1] + sum(own[2 * step : 2 * step + 2]))
    assert counted == expected and counted[-1] == 150


def test_batches_fill_whole_steps_of_all_processes():
    size = sizes(200)
    sampler = TokenBatchSampler(size, 1500, seed=0, processes=2, accumulate=2)
    assert len(sampler) % 4 == 0 and {len(sampler.batches(epoch)) for epoch in range(3)} == {len(sampler)}


def test_a_weighted_mix_draws_what_it_says():
    size = sizes(60)
    mixing = Mixing({"a": 40, "b": 20}, {"a": 10, "b": 30})
    sampler = TokenBatchSampler(size, 1000, seed=0, mixing=mixing)
    drawn = [[row for batch in sampler.batches(epoch) for row in batch] for epoch in range(4)]
    assert [(sum(row < 40 for row in rows), sum(row >= 40 for row in rows)) for rows in drawn] == [(10, 30)] * 4
    assert sorted(row for rows in drawn for row in rows if row < 40) == list(range(40)), "no row of a source again before all came"


# --- from the command line ------------------------------------------------------------------------------------------

SMALL = ["data.columns={image: image, text: answer, prompt: question}", "data.splits.validation=0", "evaluation.split=null", "logger=none", "trainer.logging_steps=1"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Sixteen rows whose answers have 1 to 16 words."""
    folder = tmp_path_factory.mktemp("uneven")
    Image.new("RGB", (56, 56), (200, 40, 0)).save(folder / "a.png")
    lines = ["image,question,answer", *(f"a.png,What is it {n}?,{' '.join(['red'] * (n + 1))}" for n in range(16))]
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    return ["data=table", f"data.path={(folder / 'rows.csv').as_posix()}", *SMALL]


def summary(run):
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


STEPS = ["trainer.num_train_epochs=2", "lora.lora_dropout=0", "trainer.optim=sgd", "trainer.learning_rate=0.1"]


@pytest.fixture(scope="module")
def one_batch(uneven, tmp_path_factory):
    """All sixteen rows in one batch, twice."""
    from mmft.cli.main import main

    folder = tmp_path_factory.mktemp("one_batch")
    assert main([*uneven, *STEPS, "trainer.per_device_train_batch_size=16", f"run_dir={(folder / 'run').as_posix()}", f"output_dir={(folder / 'o').as_posix()}"]) == 0
    return folder / "run"


@pytest.mark.parametrize("packing", ["false", "true"])
def test_one_step_over_all_rows_is_that_of_one_batch_of_all_rows(mmft, tmp_path, uneven, one_batch, packing):
    """The loss is the mean over the supervised tokens of a step, however its rows lie in batches: 4 batches of unequal size, or one."""
    by_tokens = ["trainer.tokens_per_batch=250", "trainer.gradient_accumulation_steps=99", f"trainer.packing={packing}"]
    code, _, err = mmft(*uneven, *STEPS, *by_tokens, f"run_dir={(tmp_path / 'parts').as_posix()}")
    assert code == 0, err[-2000:]
    whole, parts = ([row["loss"] for row in logged(run) if "loss" in row] for run in (one_batch, tmp_path / "parts"))
    assert len(parts) == 2 and parts == pytest.approx(whole, rel=1e-5)
    one, other = summary(one_batch), summary(tmp_path / "parts")
    assert {key: one[key] for key in ("steps", "supervised_tokens", "effective_batch_size")} == {key: other[key] for key in ("steps", "supervised_tokens", "effective_batch_size")}


RESUMED = ["trainer.tokens_per_batch=250", "trainer.num_train_epochs=2", "lora.lora_dropout=0.2", "trainer.gradient_accumulation_steps=2",
           "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=30", "trainer.dataloader_num_workers=0"]  # fmt: skip


@pytest.mark.parametrize("more", [["trainer.packing=true"], pytest.param(["vision_cache=off", "augment.RandomRotation={degrees: 5}"], marks=pytest.mark.long)])
def test_a_stopped_run_goes_on_to_the_bit_with_other_workers(mmft, tmp_path, uneven, more):
    whole = tmp_path / "whole"
    code, _, err = mmft(*uneven, *RESUMED, *more, f"run_dir={whole.as_posix()}")
    assert code == 0, err[-2000:]
    steps = summary(whole)["steps"]
    assert steps >= 4 and summary(whole)["effective_batch_size"] == round(32 / steps)
    for step, workers in ((1, 0), (steps // 2, 1), (steps - 1, 0)):
        run = killed_after(whole, step, tmp_path / f"at{step}")
        snapshot = (run / "snapshot.yaml").read_text(encoding="utf-8")
        (run / "snapshot.yaml").write_text(snapshot.replace("dataloader_num_workers: 0", f"dataloader_num_workers: {workers}"), encoding="utf-8")
        code, _, err = mmft("resume", f"run={run.as_posix()}")
        assert code == 0 and final(run) == final(whole) and logged(run) == logged(whole), (step, err[-2000:])


def test_a_mix_counts_its_draws(mmft, tmp_path):
    folder = write_sources(tmp_path)
    words = [*mix(folder, "caps", "chat", "more"), "data.draws=24", "data.sources.caps.weight=1.5", "data.sources.chat.weight=0.5", "trainer.num_train_epochs=2",
             "trainer.tokens_per_batch=200", "evaluation.split=null", "logger=none"]  # fmt: skip
    code, _, err = mmft(*words, f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0, err[-2000:]
    assert {name: source["rows"] for name, source in summary(tmp_path / "run")["sources"].items()} == {"caps": 24, "chat": 8, "more": 16}


def test_points_of_a_sweep_train_together(mmft, tmp_path, uneven):
    words = [*uneven, "trainer.tokens_per_batch=250", "trainer.num_train_epochs=1", "lora.lora_dropout=0.1", "seed=1,2"]
    losses = {}
    for name, most in (("together", "null"), ("apart", "1")):
        code, out, err = mmft("-m", *words, "hydra/launcher=joint", "hydra.launcher.processes=1", f"hydra.launcher.most={most}", f"name={name}")
        assert code == 0 and ("2 points in step" in out) == (name == "together"), err[-2000:]
        runs = sorted((tmp_path / "outputs" / "sweeps" / name).glob("seed*"))
        losses[name] = [[row["loss"] for row in logged(run) if "loss" in row] for run in runs]
    assert len(losses["together"]) == 2 and losses["together"][0] != losses["together"][1]
    for together, apart in zip(losses["together"], losses["apart"], strict=True):
        assert together == pytest.approx(apart, abs=1e-4)


@pytest.mark.parametrize("words, message", [
    (["trainer.tokens_per_batch=20"], r"trainer.tokens_per_batch=20: row \S+ has (\d+) tokens; set it to \1 or more, or leave out long rows with collator.max_length=20"),
    (["trainer.tokens_per_batch=0"], "trainer.tokens_per_batch=0: must be a number of tokens above 0"),
    (["trainer.tokens_per_batch=many"], "trainer.tokens_per_batch"),
    (["trainer.tokens_per_batch=900", "trainer.train_sampling_strategy=sequential"], "not in that of trainer.train_sampling_strategy=sequential; leave one out"),
    (["trainer.tokens_per_batch=900", "trainer.gradient_accumulation_steps=2", "trainer.fold_accumulation=always"], "trainer.fold_accumulation=always: trainer.tokens_per_batch says"),
])  # fmt: skip
def test_wrong_values_are_one_line(mmft, uneven, words, message):
    import re

    code, out, err = mmft(*uneven, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith("mmft: ") and re.search(message, err) and "step 1" not in out, err
