"""Attention over packed rows, row by row: which masks are taken for rows, and that nothing else changes. Losses and gradients: tests/losses/test_packing.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import GROUP

from mmft.rewrites.base import Replaced
from mmft.rewrites.row_attention import PackedRows, attend_by_row, packed_rows


def causal_rows(lengths):
    """The mask of causal rows end to end, written element by element."""
    row = [n for n, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([[row[q] == row[k] and k <= q for k in range(len(row))] for q in range(len(row))])


def test_of_all_masks_of_three_tokens_exactly_those_of_causal_rows_are_rows():
    wanted = {tuple(causal_rows(lengths).flatten().tolist()): lengths for lengths in ((3,), (1, 2), (2, 1), (1, 1, 1))}
    for values in itertools.product((False, True), repeat=9):
        found = packed_rows(torch.tensor(values).view(1, 1, 3, 3))
        assert found == (PackedRows(wanted[values]) if values in wanted else None), values


@pytest.mark.parametrize("change", ["window", "both ways", "another row", "a hole"])
def test_masks_that_are_more_than_causal_rows_are_left_alone(change):
    """A sliding window shorter than a row, image tokens that see each other, a prefix that all rows share, a token that is hidden."""
    mask = causal_rows((5, 1, 9))
    assert packed_rows(mask[None, None]) == PackedRows((5, 1, 9))
    if change == "window":
        mask &= torch.ones(15, 15, dtype=torch.bool).triu(-6)
    elif change == "both ways":
        mask[7:10, 7:10] = True
    elif change == "another row":
        mask[6:, :2] = True
    else:
        mask[12, 8] = False
    assert packed_rows(mask[None, None]) is None


def test_a_batch_that_is_not_packed_has_the_same_bits_and_the_rewrite_can_be_taken_off(small):
    model, collator, _ = small.load("qwen2vl")
    batch = collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [], "Two dogs", "3 cats")])
    batch.pop("row_ids")
    model.eval()
    with torch.no_grad():
        plain = model(**batch).loss
        assert attend_by_row(model, replaced := Replaced()) and set(replaced.classes) == {"row_attention"}
        changed, generated = model(**batch).loss, model.generate(**{k: v[:1] for k, v in batch.items() if k in ("input_ids", "attention_mask")}, max_new_tokens=3)
        text, vision = model.config.text_config, model.config.vision_config
        assert text._attn_implementation == "mmft_row_attention" and vision._attn_implementation == "sdpa"
        replaced.remove()
        assert text._attn_implementation == "sdpa" and not replaced.classes
        assert torch.equal(plain, changed) and torch.equal(
            generated, model.generate(**{k: v[:1] for k, v in batch.items() if k in ("input_ids", "attention_mask")}, max_new_tokens=3)
        )


def test_eager_attention_is_left_alone(small):
    model, _, _ = small.load("qwen2vl", attn_implementation="eager")
    assert not attend_by_row(model, Replaced())


def test_what_attention_computes_grows_with_the_rows_and_not_with_their_square(mmft, small, tmp_path, monkeypatch):
    """From the command line: every call of sdpa in a packed step gets one row, and none a mask."""
    from PIL import Image

    lengths = (3, 40, 11, 7)
    rows = ["image,caption", *(f"{n}.png,{'a ' * count}dog" for n, count in enumerate(lengths))]
    for n in range(4):
        Image.new("RGB", (56, 56), (40 * n, 40, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "rows.csv").write_text("\n".join(rows), encoding="utf-8")
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query, key, value, attn_mask=None, **options):
        if torch.is_grad_enabled() and query.requires_grad:
            seen.append((query.shape[2], attn_mask is None, options["is_causal"]))
        return sdpa(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    words = [f"model={GROUP['qwen2vl']}", f"model.path={small('qwen2vl').as_posix()}", "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}",
             "data.columns={image: image, text: caption}", "data.splits.validation=0", "evaluation.split=null", "logger=none", "trainer.packing=true",
             "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=1", f"run_dir={(tmp_path / 'run').as_posix()}"]  # fmt: skip
    code, out, err = mmft(*words)
    assert code == 0 and "the 2 micro-batches of a step are computed as one" in out, err[-2000:]
    assert seen and all(without and causal for _, without, causal in seen)
    step = sorted(length for length, _, _ in seen[-4:])  # the last layer of the step; before it memory was estimated with two rows
    assert [b - a for a, b in itertools.pairwise(step)] == [4, 4, 29], "the four rows of the step differ by their captions alone"
