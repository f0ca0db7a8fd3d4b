"""Packed rows: loss and gradients of each family are those of its rows one by one; what cannot be packed is refused."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from small_models import CAPTIONS, GROUP, KINDS, MORE

from mmft.collators.base import IGNORE
from mmft.losses import packing
from mmft.losses.packing import Packing, why_not_packed
from mmft.losses.supervised import RowGroups, grouped_loss
from mmft.rewrites.base import Replaced
from mmft.rewrites.row_attention import attend_by_row

# By transformers' source: the BLIP classes make an attention mask of ones where none is given; T5 reads prompts and answers in two places; for
# layers with a sliding window Gemma 3's mask looks the images up by the position in a row, and not in the sequence.
REFUSED = {
    "gemma3": "gemma3 with sdpa attention gives other logits for packed rows", "blip2": "blip-2 with sdpa attention gives other logits for packed rows", "instructblip": "instructblip with sdpa attention",
    "blip2_t5": "an encoder-decoder model", "instructblip_t5": "an encoder-decoder model",
}  # fmt: skip
PACKED = [kind for kind in (*KINDS, *MORE) if kind not in REFUSED]


def rows(small, kind):
    """Rows of one image, of two, of none, with two answers; BLIP's of one image each."""
    if kind in CAPTIONS:
        return [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "", "blue"), small.sample("c", [2], "And?", "12 birds stand")]
    return [
        small.sample("a", [0], "What is in the picture?", "a red square", "And?", "birds"),
        small.sample("b", [1, 2], "Which?", "blue"),
        small.sample("c", [], "Two dogs", "3 cats"),
    ]


def grads(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def packed_step(model, batch):
    """(loss, supervised tokens, gradients) of a packed batch."""
    loss, count, _ = grouped_loss(model, batch, pack=Packing(model))
    loss.backward()
    return loss.item(), int(count), grads(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PACKED)
def test_loss_and_gradients_equal_those_of_plain_transformers_row_by_row(small, kind, attention):
    """Golden: transformers' own loss of each row in a batch of its own, without padding and without packing.

    With sdpa both with a mask over the packed sequence, as on a GPU, and row by row, as on a CPU.
    """
    model, collator, _ = small.load(kind, attn_implementation=attention)
    samples = rows(small, kind)
    assert why_not_packed(model, collator, samples) is None
    found, replaced = [packed_step(model, collator(samples))], Replaced()
    if attention == "sdpa":
        assert attend_by_row(model, replaced) and why_not_packed(model, collator, samples) is None
        found.append(packed_step(model, collator(samples)))
        replaced.remove()
    expected, tokens = 0.0, 0
    for sample in samples:
        alone = {k: v for k, v in collator([sample]).items() if k != "row_ids"}
        n = int((alone["labels"][:, 1:] != IGNORE).sum())
        plain = model(**alone, use_cache=False).loss * n
        plain.backward()
        expected, tokens = expected + plain.item(), tokens + n
    theirs = grads(model)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for loss, count, packed in found:
        assert count == tokens and loss == pytest.approx(expected, rel=1e-6)
        assert packed.keys() == theirs.keys()
        for name in theirs:
            assert float((packed[name] - theirs[name]).abs().max()) <= 1e-6 * largest, name


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_is_refused_by_name(small, kind):
    model, collator, _ = small.load(kind)
    assert REFUSED[kind] in why_not_packed(model, collator, rows(small, kind))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_transformers_packed_masks_a_model_is_refused(small, monkeypatch, attention):
    """As with an attention that does not read position ids: a token sees every earlier row."""
    from transformers import masking_utils

    model, collator, _ = small.load("llava", attn_implementation=attention)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert f"llava with {attention} attention gives other logits for packed rows" in why_not_packed(model, collator, rows(small, "llava"))


def test_rows_that_see_each_other_are_noticed_where_rounding_hides_it(small, monkeypatch):
    """In bf16 logits may differ by some hundredths, so a row is also packed behind another answer, which must change nothing."""
    model, collator, _ = small.load("qwen2vl")
    monkeypatch.setattr(packing, "CLOSE", {})
    seen = packing.supervised_logits
    calls = []

    def leaking(model, batch):
        logits, *others = seen(model, batch)
        calls.append(1)
        return (logits + (logits.abs().max() * 0.2 if len(calls) == 3 else 0), *others)

    monkeypatch.setattr(packing, "supervised_logits", leaking)
    assert "lets packed rows see each other" in why_not_packed(model, collator, rows(small, "qwen2vl"))


def test_an_error_of_the_model_is_the_reason(small):
    model, collator, _ = small.load("llava")
    model.forward = lambda **inputs: (_ for _ in ()).throw(ValueError("position_ids is\nno argument"))
    assert why_not_packed(model, collator, rows(small, "llava")) == "llava with sdpa attention cannot compute packed rows (ValueError: position_ids is no argument)"


def test_positions_begin_anew_with_every_row_and_images_have_those_of_the_model(small):
    """By hand: an image of 56 x 56 pixels is 2 x 2 features behind <|vision_start|>; its two rows and columns take the positions of two tokens."""
    import torch

    model, collator, _ = small.load("qwen2vl")
    first, second = small.sample("a", [0], "What?", "red"), small.sample("b", [], "Two dogs", "3 cats")
    batch = collator([first, second])
    packed = Packing(model)(batch)
    a, b = (int(n) for n in batch["attention_mask"].sum(1))
    assert packed["input_ids"].shape == (1, a + b) and packed["position_ids"].shape == (4, 1, a + b) and "attention_mask" not in packed
    assert packed["input_ids"][0].tolist() == [*batch["input_ids"][0, :a].tolist(), *batch["input_ids"][1, :b].tolist()]
    text, *spatial = packed["position_ids"][:, 0].tolist()
    assert text == [*range(a), *range(b)]
    at = batch["input_ids"][0].tolist().index(model.config.image_token_id)
    assert [axis[at : at + 4] for axis in spatial] == [[at] * 4, [at, at, at + 1, at + 1], [at, at + 1] * 2]
    for axis in spatial:
        assert axis[:at] == list(range(at)) and axis[at + 4 : a] == list(range(at + 2, a - 2)) and axis[a:] == list(range(b))
    assert packed["labels"][0, a] == IGNORE, "the last token of a row predicts nothing of the next"
    assert torch.equal(packed["pixel_values"], batch["pixel_values"])


def test_sums_of_groups_do_not_depend_on_packing(small):
    import torch

    model, collator, _ = small.load("llava")
    batch = collator(rows(small, "llava"))
    groups = RowGroups(torch.tensor([0, 1, 0]), 2)
    with torch.no_grad():
        apart, packed = grouped_loss(model, batch, groups=groups), grouped_loss(model, batch, groups=groups, pack=Packing(model))
    assert packed[2][:, 1].tolist() == apart[2][:, 1].tolist()
    assert packed[2][:, 0].tolist() == pytest.approx(apart[2][:, 0].tolist(), rel=1e-5)


# --- from the command line ------------------------------------------------------------------------------------------

SMALL = ["data.pictures=14", "data.splits.validation=2", "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
         "evaluation.base=false", "evaluation.samples=0", "generation.max_new_tokens=2", "logger=none"]  # fmt: skip


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("words", [[], pytest.param(["vision_cache=off", "model.rewrites=off"], marks=pytest.mark.long),
                                   pytest.param(["trainer.gradient_checkpointing=true", "trainer.label_smoothing_factor=0.1"], marks=pytest.mark.long)])  # fmt: skip
def test_a_packed_run_has_the_losses_of_an_unpacked_one(mmft, tmp_path, words):
    """Three steps with cached features and rewrites, without, and with checkpoints. With mmft's dropout a row drops the same values; torch's own draws others.

    Packed with rewrites, the micro-batches of a step are one sequence.
    """
    dropout = 0 if "model.rewrites=off" in words else 0.3
    words = [*SMALL, f"lora.lora_dropout={dropout}", "trainer.optim=sgd", "trainer.learning_rate=0.1", *words]
    for name, more in {"apart": ["trainer.fold_accumulation=off"], "packed": ["trainer.packing=true"]}.items():
        code, _, err = mmft(*words, *more, f"run_dir={(tmp_path / name).as_posix()}")
        assert code == 0, err[-2000:]
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "apart"), rel=1e-5) and len(losses(tmp_path / "packed")) == 3
    apart, packed = adapter(tmp_path / "apart"), adapter(tmp_path / "packed")
    folded = [json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))["micro_batches_folded"] for name in ("apart", "packed")]
    assert folded == [1, 1 if "model.rewrites=off" in words else 2]
    assert max(float((apart[k] - packed[k]).abs().max()) for k in apart) < 1e-6 < max(float(w.abs().max()) for k, w in apart.items() if "lora_B" in k)


def test_refusals_come_before_training(mmft, small, tmp_path):
    from PIL import Image

    for n in range(6):
        Image.new("RGB", (56, 56), (40 * n, 40, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "rows.csv").write_text("image,caption\n" + "".join(f"{n}.png,a red square\n" for n in range(6)), encoding="utf-8")
    words = ["data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}", "data.columns={image: image, text: caption}", "data.splits={validation: 2}", *SMALL[2:]]
    code, out, err = mmft(f"model={GROUP['blip2']}", f"model.path={small('blip2').as_posix()}", *words, "trainer.packing=true")
    assert code == 2 and err.count("\n") == 1 and "mmft: trainer.packing=true: blip-2 with sdpa attention gives other logits" in err and "step 1" not in out, err
    code, _, err = mmft(*SMALL, "trainer.packing=true", "trainer.neftune_noise_alpha=5")
    assert code == 2 and err.count("\n") == 1 and "trainer.packing=true: the noise of trainer.neftune_noise_alpha" in err
    code, out, err = mmft("-m", "lora.r=2,4", *SMALL, "trainer.max_steps=1", "evaluation.split=null", "trainer.packing=true", "model.attn_implementation=eager", "name=packed")
    assert code == 0 and out.count("since trainer.packing=true: attention would be computed over the rows of all points") == 2, err[-2000:]
