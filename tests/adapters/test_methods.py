"""lora.method: parameters counted by hand, plain peft on the original base, resume and reproduce to the bit, merging, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from interrupted import SMALL, assert_resumes_and_reproduces
from plain_peft import held_out_losses

from mmft.adapters.attach import attach_adapter
from mmft.adapters.methods import METHODS, REFUSED
from mmft.adapters.plan import plan_adapter
from mmft.adapters.report import adapter_report, planned_report
from mmft.common.errors import UserError
from mmft.training.disk_space import parameter_counts

R = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
OTHERS = [name for name in METHODS if METHODS[name].config != "LoraConfig"]
OPTIONS = {"oft": {"oft_block_size": 8}, "fourierft": {"n_frequency": 50}}

# Trained weights of q (32 -> 32) and v (32 -> 16) in two layers, r 4, by the formula of each method:
# VeRA d (r) and b (out); OFT 4 blocks of 8 x 7 / 2; IA3 one for each output; LoHa two pairs of r (in + out); HRA r vectors of the input's width;
# FourierFT its coefficients. LoKr: 32 = 4 x 8, 16 = 4 x 4; a factor of 4 x 4 and one of 8 x 8, or 4 x 8, whole since r is half of 8.
COUNTED = {
    "vera": 2 * (4 + 32 + 4 + 16), "oft": 4 * 4 * 28, "ia3": 2 * (32 + 16), "loha": 2 * (8 * (32 + 32) + 8 * (32 + 16)), "lokr": 2 * (16 + 64 + 16 + 32),
    "hra": 4 * 4 * 32, "fourierft": 4 * 50,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_trained_weights_counted_by_hand_before_and_after_peft(small, name):
    model, _, _ = small.load("llava")
    plan = plan_adapter(model, {**R, "target_modules": ["q_proj", "v_proj"], "method": name, "options": OPTIONS.get(name)})
    before, counts = planned_report(model, plan), parameter_counts(model, plan)
    tuned = attach_adapter(model, plan)
    after = adapter_report(tuned, plan)
    assert after["trainable_parameters"] == before["trainable_parameters"] == counts[0] == COUNTED[name]
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == COUNTED[name]
    assert after["rows"] == before["rows"] and after["adapter"] == METHODS[name].title
    row = next(r for r in after["rows"] if r["part"] == "language")
    assert row["method"] == METHODS[name].title and row["modules"] == 4
    assert row["r"] == ("4" if name in ("vera", "loha", "lokr", "hra") else "") and row["scale"] == (2.0 if name in ("loha", "lokr") else None)


def test_ia3_scales_the_input_of_the_second_layer_of_an_mlp(small):
    model, _, _ = small.load("llava")  # down_proj is 64 -> 32
    settings = {**R, "target_modules": ["k_proj", "down_proj"], "method": "ia3"}
    tuned = attach_adapter(model, plan := plan_adapter(model, settings))
    layer = tuned.base_model.model.model.language_model.layers[0]
    assert layer.mlp.down_proj.ia3_l["default"].shape == (1, layer.mlp.down_proj.in_features) and layer.self_attn.k_proj.ia3_l["default"].shape == (16, 1)
    assert "IA3 scales the input of down_proj, and the output of the others" in plan.notes
    other = plan_adapter(small.load("llava")[0], {**settings, "options": {"feedforward_modules": ["k_proj"]}})
    tuned = attach_adapter(small.load("llava")[0], other)
    assert tuned.base_model.model.model.language_model.layers[0].self_attn.k_proj.ia3_l["default"].shape == (1, 32)


def test_ranks_of_parts_and_dora(small):
    """LoHa has ranks by module; dora is LoRA with magnitudes."""
    model, _, _ = small.load("llava")
    settings = {**R, "scope": "all", "target_modules": "all-linear", "parts": {"vision": {"r": 2, "lora_alpha": 2}, "connector": {"r": 0}}}
    plan = plan_adapter(model, {**settings, "method": "loha"})
    assert {r["part"]: (r["r"], r["scale"]) for r in adapter_report(attach_adapter(model, plan), plan)["rows"] if r["modules"]} == {"vision": ("2", 1.0), "language": ("4", 2.0)}
    left_out = plan_adapter(model := small.load("llava")[0], {**settings, "parts": {"vision": {"r": 0}}, "method": "ia3"})
    assert set(left_out.adapted.values()) == {"connector", "language"}
    dora = plan_adapter(model, {**R, "target_modules": ["q_proj"], "method": "dora"})
    row = next(r for r in adapter_report(attach_adapter(model, dora), dora)["rows"] if r["part"] == "language")
    assert row["method"] == "DoRA" and row["trainable"] == 2 * (4 * 64 + 32)


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "vara"}, r"lora.method=vara: no such method. Did you mean vera\?"),
    ({"method": "boft"}, "lora.method=boft: holds a square matrix of each layer's width.*use lora.method=oft"),
    ({"method": "prefix_tuning"}, "puts trained tokens before the prompt"),
    ({"method": "adalora"}, "use lora.init_lora_weights=eva"),
    ({"method": "ia3", "use_rslora": True}, "lora.use_rslora=True: is a key of LoRA, and IA3 has nothing like it; drop it"),
    ({"method": "loha", "init_lora_weights": "pissa"}, "lora.init_lora_weights=pissa: is a key of LoRA"),
    ({"method": "oft", "bias": "all"}, "lora.bias=all: is a key of LoRA"),
    ({"method": "vera", "parts": {"language": {"r": 2}}}, "lora.rank_pattern=.*VeRA has nothing like it.*leave a part out"),
    ({"method": "hra", "r": 3}, "lora.r=3: HRA begins as the base model only with an even rank; use lora.r=4"),
    ({"method": "fourierft"}, r"lora.options.n_frequency=1000: .*v_proj has only 512 weights"),
    ({"method": "oft", "options": {"block_size": 8}}, r"lora.options.block_size: OFT has no such key. Did you mean oft_block_size\?"),
    ({"method": "oft", "options": {"oft_block_size": "8x"}}, "lora.options.oft_block_size=8x: must be int"),
    ({"method": "loha", "options": {"rank_dropout": 0.1}}, "lora.options.rank_dropout: LoHa has no such key. There are: none"),
    ({"options": {"oft_block_size": 8}}, "lora.options.oft_block_size: LoRA has no such key"),
    ({"method": "ia3", "options": {"feedforward_modules": ["down_proj"]}}, "no adapted layer is called down_proj"),
    ({"method": "ia3", "target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer, and IA3 adapts linear layers alone"),
])  # fmt: skip
def test_what_a_method_cannot_do_is_one_line(small, settings, message):
    model, _, _ = small.load("llava")
    with pytest.raises(UserError, match=message) as caught:
        plan_adapter(model, {**R, "target_modules": ["q_proj", "v_proj"], **settings})
    assert "\n" not in str(caught.value)


def test_every_method_of_the_installed_peft_is_known():
    from peft import PeftType

    there = {kind.value.lower() for kind in PeftType}
    assert there - {*METHODS, *REFUSED} == set(), "new in peft: try it, and add it to mmft/adapters/methods.py"
    assert all("; use " in reason for reason in REFUSED.values())


@pytest.mark.parametrize(("words", "expected"), [
    (["lora.method=loha", "model.quantization.load_in_4bit=true"], "lora.method=loha: peft does not train it over a base in 4 bit"),
    (["lora.method=ia3", "trainer.loraplus_lr_ratio=4"], "trainer.loraplus_lr_ratio: concerns the matrices A and B of LoRA"),
    (["lora.method=vera", "trainer.lora_fa=true"], "trainer.lora_fa: concerns the matrices A and B of LoRA"),
    (["lora=none", "+lora.method=ia3"], "lora.method: without lora.r the whole model is trained"),
])  # fmt: skip
def test_words_that_do_not_go_together_are_one_line(mmft, words, expected):
    code, _, err = mmft("data.pictures=22", "data.splits.validation=2", "logger=none", *words)
    assert code == 2 and expected in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("oft", "ia3") else pytest.mark.long) for name in OTHERS])
def test_fp32_adapters_on_a_half_precision_base(small, tmp_path, name):
    """Trained under autocast and measured without it; what is stored is loaded to the bit."""
    import torch

    from mmft.losses.supervised import supervised_logits, supervised_loss
    from mmft.runs.adapter import load_adapter

    model, collator, _ = small.load("llava", dtype="bf16")
    batch = collator([small.sample("a", [0], "What?", "a red square")])
    tuned = attach_adapter(model, plan_adapter(model, {**R, "target_modules": "all-linear", "method": name, "options": OPTIONS.get(name), "init_lora_weights": False}))
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = supervised_loss(tuned, batch)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in tuned.parameters() if p.requires_grad)
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        own = supervised_logits(tuned.eval(), batch)[0]
        again = supervised_logits(load_adapter(small.load("llava", dtype="bf16")[0], tmp_path), batch)[0]
        base = supervised_logits(small.load("llava", dtype="bf16")[0], batch)[0]
    assert again.equal(own) and not base.equal(own)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


TWO = [pytest.param(name, marks=() if name == "vera" else pytest.mark.long) for name in OTHERS]


@pytest.fixture(scope="module")
def trained(place):
    """A run of each method: six steps of the tiny model, dropout where the method has it."""
    from mmft.cli.main import main

    def run(name: str) -> Path:
        if not (place / name).is_dir():
            # linear layers of the tiny model; a rate at which each method moves
            words = [*SMALL, f"lora.method={name}", "lora.r=4", "lora.lora_alpha=8", "trainer.learning_rate=2e-2", "trainer.save_steps=3", f"output_dir={place.as_posix()}"]
            words = [w for w in words if w != "trainer.save_steps=1"]
            assert main([*words, f"run_dir={(place / name).as_posix()}"]) == 0
        return place / name

    return run


@pytest.mark.parametrize("name", TWO)
def test_plain_peft_loads_it_over_the_original_base(trained, name):
    """transformers and peft alone give the loss that the run measured with its own model at the end."""
    run = trained(name)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == name.upper()
    base, tuned = held_out_losses(run, SMALL, 2)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert tuned == pytest.approx(summary["eval_loss"], abs=2e-5) and abs(tuned - base) > 1e-3


@pytest.mark.parametrize("name", TWO)
def test_resume_and_reproduce_give_the_same_bytes(mmft, trained, tmp_path, name):
    assert_resumes_and_reproduces(mmft, trained(name), tmp_path)


@pytest.mark.parametrize("name", TWO)
def test_later_verbs_and_texts(mmft, trained, tmp_path, name):
    """merge compares logits with the run's own; evaluate finds the run's loss; card, report and plan name the method."""
    run = trained(name)

    def later(*words):
        code, out, err = mmft(*words, f"output_dir={run.parent.as_posix()}", output_dir=False)
        assert code == 0, err
        return out

    later("merge", f"run={run.as_posix()}", f"out={(tmp_path / 'merged').as_posix()}")
    facts = json.loads((tmp_path / "merged" / "merge.json").read_text(encoding="utf-8"))
    assert facts["largest_difference"] <= facts["tolerance"] < facts["adapter_moves_logits_by"] / 10
    later("evaluate", f"run={run.as_posix()}", "checkpoint=6")
    (again,) = (json.loads(file.read_text(encoding="utf-8")) for file in (run / "eval").glob("shapes*.json"))
    assert again["eval_loss"] == pytest.approx(json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval_loss"], abs=1e-5)
    title = METHODS[name].title
    card, report = (run / "adapter" / "README.md").read_text(encoding="utf-8"), (run / "report.md").read_text(encoding="utf-8")
    assert f" {title} adapter of " in card and f"- {title}, scope language" in card and f"\n- {title.lower()}\n" in card and f"| {title} |" in report
    assert ("lora_alpha" in card.split("## Training")[1].split("linear layers adapted")[0].split("```")[-1]) == ("lora_alpha" in METHODS[name].keys)


def test_keys_that_a_method_lacks_are_told_in_the_plan(small, trained):
    assert json.loads((trained("vera") / "lora_plan.json").read_text(encoding="utf-8"))["notes"] == ["VeRA has no alpha: lora.lora_alpha has no effect"]
    plan = plan_adapter(small.load("llava")[0], {**R, "lora_dropout": 0.1, "target_modules": ["q_proj"], "method": "ia3"})
    assert plan.notes[0] == "IA3 has no rank, no alpha and no dropout: lora.r, lora.lora_alpha and lora.lora_dropout have no effect"


def test_other_adapters_do_not_go_on_and_are_not_combined(mmft, trained, tmp_path):
    run = trained("vera").as_posix()
    copied = shutil.copytree(run, tmp_path / "copied").as_posix()
    for words in ([*SMALL, f"lora.start={run}"], ["combine", f"run=[{run},{copied}]", f"out={(tmp_path / 'both').as_posix()}"]):
        code, _, err = mmft(*words, f"output_dir={trained('vera').parent.as_posix()}", output_dir=False)
        assert code == 2 and "only LoRA adapters can be gone on with or combined" in err and err.count("\n") == 1, err


@pytest.mark.long
def test_a_sweep_over_methods_trains_each_and_says_why_alone(mmft, tmp_path):
    words = [w for w in SMALL if "save" not in w and "max_steps" not in w]
    code, out, err = mmft(*words, "trainer.max_steps=2", "lora.r=4", "lora.method=lora,vera,ia3", "name=methods", "-m")
    assert code == 0, err
    board = next((tmp_path / "outputs").rglob("leaderboard.csv")).read_text(encoding="utf-8")
    assert all(f",{name}," in board for name in ("lora", "vera", "ia3")), board
    assert "lora.method" in board.splitlines()[0]


@pytest.mark.long
def test_doctor_checks_a_method_on_a_model(mmft, small):
    words = ["doctor", "model=qwen2vl", f"model.path={small('qwen2vl').as_posix()}", "model.processor={}"]
    code, out, err = mmft(*words, "lora.method=oft", "lora.options.oft_block_size=8", output_dir=False)
    assert code == 0 and "save and merge" in out, err
    code, _, err = mmft(*words, "lora.method=boft", output_dir=False)
    assert code == 2 and "use lora.method=oft" in err and err.count("\n") == 1


# --- conformance on three families ----------------------------------------------------------------------------------

ATTACHED = ("adapter", "save and merge", "fast paths")  # the checks that attach an adapter


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("vera", "oft", "ia3") else pytest.mark.long) for name in METHODS])
@pytest.mark.parametrize("kind", ["qwen2vl", pytest.param("llava", marks=pytest.mark.long), pytest.param("blip2", marks=pytest.mark.long)])
def test_conformance(small, tmp_path, kind, name):
    from mmft.conformance.checks import CHECKS
    from mmft.conformance.subject import Subject

    model, collator, family = small.load(kind)
    subject = Subject.create(model, collator, family, tmp_path, {"method": name, "options": OPTIONS.get(name)})
    for check in ATTACHED:
        assert CHECKS[check](subject)  # raises where it fails


def test_a_method_that_drops_weights_fails_the_check(small, tmp_path, monkeypatch):
    """A save that loses half of an adapter is noticed, whatever the method."""
    from peft import PeftModel

    from mmft.conformance.checks import CHECKS
    from mmft.conformance.subject import Subject

    model, collator, family = small.load("qwen2vl")
    subject = Subject.create(model, collator, family, tmp_path, {"method": "ia3"})
    original = PeftModel.save_pretrained

    def torn(self, *args, **keys):
        for name, parameter in self.named_parameters():
            if ".q_proj.ia3_l" in name:
                parameter.data.fill_(1.0)
        original(self, *args, **keys)

    monkeypatch.setattr(PeftModel, "save_pretrained", torn)
    with pytest.raises(Exception, match="plain peft gives other logits"):
        CHECKS["save and merge"](subject)
