"""The conformance checks: families that pass all of them, and for every check a deliberately broken family that fails it."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from small_models import KINDS, MORE

from mmft.conformance.checks import CHECKS, run_checks
from mmft.conformance.subject import Subject


@pytest.fixture
def subject(small, tmp_path):
    def make(kind: str) -> Subject:
        model, _, family = small.load(kind)
        from small_models import collator

        return Subject.create(model, collator(kind, small(kind)), family, tmp_path / "images")

    return make


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_these_families_pass_every_check(subject, kind):
    checked = subject(kind)
    weights = {n: t.clone() for n, t in checked.model.state_dict().items()}
    results = run_checks(checked)
    after = checked.model.state_dict()
    assert after.keys() == weights.keys() and all(after[n].equal(t) for n, t in weights.items()), "no check changes the model"
    assert [r.name for r in results] == list(CHECKS)
    assert not [(r.name, r.detail) for r in results if r.passed is False]
    assert sum(r.passed is True for r in results) >= len(CHECKS) - 1


# --- one broken family for each check -------------------------------------------------------------------------------


def unknown_tower(s: Subject) -> None:
    """A part whose name says nothing, as a new family's tower may have."""
    s.model.register_module("aligner2000", torch.nn.Linear(2, 2))


def hides_the_answer(s: Subject) -> None:
    """A template that writes only the first word of every answer."""
    encode = s.collator.encode

    def cut(samples, images, generation):
        short = []
        for sample in samples:
            messages = [*sample.messages[:-1], {**sample.messages[-1], "content": [{"type": "text", "text": sample.references[0].split()[0]}]}]
            short.append(types.SimpleNamespace(**{k: getattr(sample, k) for k in ("id", "images", "references", "root")}, messages=messages))
        return encode(short, images, generation)

    s.collator.encode = cut


def too_many_image_tokens(s: Subject) -> None:
    """A tower that loses a feature of an image that is alone: the text has one place more."""
    features = s.model.get_image_features

    @functools.wraps(features)
    def fewer(*args, **kwargs):
        output = features(*args, **kwargs)
        if len(output.pooler_output) == 1:
            output.pooler_output = [f[:-1] for f in output.pooler_output]
        return output

    s.model.get_image_features = fewer


def ignores_pixels(s: Subject) -> None:
    """A projector whose weights are zero."""
    with torch.no_grad():
        for name, parameter in s.model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.zero_()


def reads_padding(s: Subject) -> None:
    """A batch of rows with one image each whose mask lets them read their padding on the left."""
    pad = s.collator._pad

    def unmasked(sequences, left):
        if any(sequence.n_images != 1 for sequence in sequences):  # these are for another check
            return pad(sequences, left)
        batch = pad(sequences, True)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    s.collator._pad = unmasked


def another_prompt(s: Subject) -> None:
    """A prompt in use that training never saw."""
    prompt = s.collator.prompt

    def longer(rows):
        batch = prompt(rows)
        batch["input_ids"] = torch.cat([batch["input_ids"], batch["input_ids"][:, -1:]], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    s.collator.prompt = longer


def cuts_gradients(s: Subject) -> None:
    """A language model whose first layer is detached from the loss."""
    layer = next(m for n, m in s.model.named_modules() if n.endswith("language_model.layers.0"))

    def detached(self, *args, **kwargs):
        with torch.no_grad():
            return type(self).forward(self, *args, **kwargs)

    layer.forward = types.MethodType(detached, layer)


def never_ends(s: Subject) -> None:
    """A collator that trains an end token at which generation does not stop."""
    type(s.collator).end_ids = property(lambda self: [self.tokenizer.pad_token_id])


def forgets_the_adapter(s: Subject) -> None:
    """A layer that computes with a copy of its weight, so that what is merged into the weight has no effect."""
    layer = next(m for n, m in s.model.named_modules() if n.endswith("language_model.layers.1.mlp.down_proj"))
    copied = layer.weight.detach().clone()
    layer.forward = lambda x: torch.nn.functional.linear(x, copied)


def other_features_alone(s: Subject) -> None:
    """A model that computes image features differently when it is asked for them alone, as the feature cache does."""
    features = s.model.get_image_features

    @functools.wraps(features)
    def scaled(*args, **kwargs):
        output = features(*args, **kwargs)
        output.pooler_output = [2 * f for f in output.pooler_output]
        return output

    s.model.get_image_features = scaled


def order_does_not_matter(s: Subject) -> None:
    """A collator that sorts the images of a row."""
    encode = s.collator.encode
    s.collator.encode = lambda samples, images, generation: encode(samples, [sorted(i, key=lambda image: image.tobytes()) for i in images], generation)


BROKEN = {
    "parts": unknown_tower, "labels": hides_the_answer, "image tokens": too_many_image_tokens, "sees the image": ignores_pixels, "padding": reads_padding,
    "prompt": another_prompt, "adapter": cuts_gradients, "end of text": never_ends, "save and merge": forgets_the_adapter, "fast paths": other_features_alone,
    "image counts": order_does_not_matter,
}  # fmt: skip


def test_every_check_has_a_broken_family():
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_a_broken_family_fails_its_check_and_no_other(subject, check, monkeypatch):
    s = subject("llava")
    if check == "end of text":
        monkeypatch.setattr(type(s.collator), "end_ids", type(s.collator).end_ids)  # restored behind the test
    BROKEN[check](s)
    failed = {r.name: r.detail for r in run_checks(s) if r.passed is False}
    assert set(failed) == {check}, failed
    assert "Error" not in failed[check].split(":")[0], "it fails for what it looks at, not for an accident"


# --- the command ----------------------------------------------------------------------------------------------------


def test_doctor_checks_a_model_of_ones_own(small, mmft):
    code, out, err = mmft("doctor", "model=llava", f"model.path={small('llava').as_posix()}")
    assert code == 0, err
    assert "1 of 1 models pass every check" in out and "| llava | LlavaForConditionalGeneration | yes |" in out


def test_doctor_names_what_is_wrong(small, mmft, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "blind"
    shutil.copytree(small("llava"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 0 if "multi_modal_projector" in k else v for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, err = mmft("doctor", "model=llava", f"model.path={folder.as_posix()}")
    assert code == 1 and "sees the image" in err and "WRONG   sees the image" in out and err.count("\n") == 1


@pytest.mark.parametrize("word, expected", [("model.path=./nowhere", "no such folder"), ("model=lava", "model=lava")])
def test_a_model_that_cannot_be_used_is_one_line(mmft, word, expected):
    code, _, err = mmft("doctor", word)
    assert code == 2 and expected in err and "Traceback" not in err
