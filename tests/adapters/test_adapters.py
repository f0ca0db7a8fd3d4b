"""LoRA: the plan counted by hand on small models, what it refuses, and that peft does what was planned."""

from __future__ import annotations

import re

import pytest

from mmft.adapters.attach import attach_adapter
from mmft.adapters.freeze import freeze
from mmft.adapters.parts import target_pattern
from mmft.adapters.plan import plan_adapter
from mmft.adapters.report import adapter_report
from mmft.common.errors import UserError
from mmft.common.model_parts import PARTS
from mmft.models.load import load_skeleton, locate_model

R = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def skeleton(small):
    skeletons = {}

    def get(kind):
        if kind not in skeletons:
            family = small.family(kind)
            skeletons[kind] = load_skeleton(family, locate_model(family))
        return skeletons[kind]

    return get


# part -> linear layers. Language: 7 in each of 2 layers and lm_head, OPT 6 in each and lm_head. Vision, two blocks each:
# Qwen2-VL qkv, proj, fc1, fc2; Qwen2.5-VL qkv, proj, gate, up, down; CLIP and SigLIP q, k, v, out, fc1, fc2; BLIP-2 qkv,
# projection, fc1, fc2; InternVL q, k, v, projection, fc1, fc2. Connector: two layers, two more for Qwen3-VL's
# deepstack, one in BLIP-2, SmolVLM, none in
# Gemma 3 (a parameter). Q-Former, two layers: self-attention 4 each, cross-attention 4 in the first, feed-forward 2 each.
LINEAR = {
    "qwen2vl": {"vision": 8, "connector": 2, "language": 15},
    "qwen2_5vl": {"vision": 10, "connector": 2, "language": 15},
    "qwen3vl": {"vision": 8, "connector": 4, "language": 15},
    "llava": {"vision": 12, "connector": 2, "language": 15},
    "blip2": {"vision": 8, "connector": 1, "qformer": 16, "language": 13},
    "smolvlm": {"vision": 12, "connector": 1, "language": 15},
    "gemma3": {"vision": 12, "language": 15},
    "internvl": {"vision": 12, "connector": 2, "language": 15},
    "llava_onevision": {"vision": 12, "connector": 2, "language": 15},
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_of_each_part_counted_by_hand(skeleton, kind):
    plan = plan_adapter(skeleton(kind), {**R, "target_modules": "all-linear", "scope": "all"})
    assert {part: n for part, n in plan.linear.items() if n} == LINEAR[kind]
    assert plan.linear["other"] == 0, "every layer's part is known"


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("scope", ["language", "vision", "all"])
def test_all_linear_means_the_scope_without_the_head(skeleton, kind, scope):
    plan = plan_adapter(skeleton(kind), {**R, "target_modules": "all-linear", "scope": scope})
    wanted = sum(n for part, n in LINEAR[kind].items() if scope in ("all", part)) - (scope != "vision")
    assert len(plan.adapted) == wanted
    assert not any("lm_head" in name for name in plan.adapted)
    assert set(plan.adapted.values()) <= (set(PARTS) if scope == "all" else {scope})


def test_a_module_name_means_the_language_model_unless_scope_says_otherwise(skeleton):
    """CLIP has q_proj too: LLaVA's recipe means the language model's."""
    plan = plan_adapter(skeleton("llava"), {**R, "target_modules": ["q_proj", "v_proj"]})
    assert sorted(plan.adapted) == [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    both = plan_adapter(skeleton("llava"), {**R, "target_modules": ["q_proj", "v_proj"], "scope": "all"})
    assert len(both.adapted) == 8 and sum(part == "vision" for part in both.adapted.values()) == 4


def test_names_shared_with_the_vision_mlp_stay_in_the_scope(skeleton):
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(plan_adapter(skeleton("qwen2_5vl"), {**R, "target_modules": seven}).adapted) == 14
    assert len(plan_adapter(skeleton("qwen2_5vl"), {**R, "target_modules": seven, "scope": "all"}).adapted) == 14 + 6


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen2vl", {"target_modules": ["q_proj", "v_prj"]}, r"no linear layer is called v_prj\. Did you mean v_proj\?"),
        ("qwen2vl", {"target_modules": ["qkv"]}, "qkv lies only in the vision part, outside lora.scope=language; use lora.scope=all"),
        ("llava", {"target_modules": ["q_proj"], "scope": "visoin"}, r"lora.scope=visoin: no such scope\. Did you mean vision\?"),
        ("llava", {"target_modules": r".*q_proj"}, "reaches model.vision_tower.*in the vision part, outside lora.scope=language"),
        ("llava", {"target_modules": "q_proj"}, r"for layers of that name write \[q_proj\]"),
        ("llava", {"target_modules": ".*q_prj"}, "matches no linear layer"),
        ("llava", {"target_modules": "(q_proj"}, "is not a regular expression"),
        ("llava", {"target_modules": None}, "name the layers to adapt"),
        ("llava", {"target_modules": ["linear_1"]}, "linear_1 lies only in the connector part"),
        ("llava", {"target_modules": ["q_proj"], "modules_to_save": ["multimodal_projector"]}, "no module multimodal_projector. Did you mean multi_modal_projector?"),
        ("llava", {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 8}}, "rank_pattern.v_proj: matches none of the 2 adapted"),
        ("llava", {"target_modules": ["q_proj"], "alpha_pattern": {"(": 8}}, "is not a regular expression"),
        ("llava", {"target_modules": ["q_proj"], "exclude_modules": ["o_proj"]}, "excludes none of the 2 targets"),
        ("llava", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no layer is left to adapt"),
        ("llava", {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "there is no layer 7; layers go from 0 to 1"),
        ("llava", {"target_modules": ["linear_1"], "layers_to_transform": [0], "scope": "all"}, "none of the 1 targets lies in a numbered layer"),
        ("llava", {"target_modules": ["q_proj"], "layers_pattern": "layers"}, "no effect without lora.layers_to_transform"),
        ("llava", {"r": None, "target_modules": ["q_proj"]}, "without lora.r the whole model is trained"),
        ("llava", {"r": 0, "target_modules": ["q_proj"]}, "lora.r=0: must be a whole number above 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_in_one_line(skeleton, kind, settings, message):
    with pytest.raises(UserError, match=message.replace("Did you mean multi_modal_projector?", r"Did you mean multi_modal_projector\?")) as caught:
        plan_adapter(skeleton(kind), {**R, **settings})
    assert "\n" not in str(caught.value)


def test_excluded_layers_and_chosen_layers(skeleton):
    some = plan_adapter(skeleton("llava"), {**R, "target_modules": "all-linear", "exclude_modules": ["down_proj", "up_proj"]})
    assert len(some.adapted) == 10
    by_pattern = plan_adapter(skeleton("llava"), {**R, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"})
    assert len(by_pattern.adapted) == 8
    last = plan_adapter(skeleton("llava"), {**R, "target_modules": "all-linear", "layers_to_transform": [1]})
    assert len(last.adapted) == 7 and all(".layers.1." in n for n in last.adapted)
    assert last.adapted == plan_adapter(skeleton("llava"), {**R, "target_modules": "all-linear", "layers_to_transform": 1}).adapted


def test_a_numbered_module_of_the_merger_is_not_a_layer(skeleton):
    """`visual.merger.mlp.0` ends in a number; peft does not count that as layer 0."""
    plan = plan_adapter(skeleton("qwen2vl"), {**R, "target_modules": "all-linear", "layers_to_transform": [0], "scope": "all"})
    assert not any("merger" in n for n in plan.adapted) and len(plan.adapted) == 4 + 7


@pytest.mark.parametrize("kind", [*LINEAR, "llava_vicuna"])
def test_peft_adapts_exactly_the_planned_modules(small, kind):
    """Trainable parameters by the formula: r x (in + out) for each adapted layer."""
    from peft.tuners.lora import LoraLayer

    model, _, _ = small.load(kind)
    shapes = {n: m.weight.shape for n, m in model.named_modules() if hasattr(m, "weight") and m.weight is not None}
    plan = plan_adapter(model, {**R, "target_modules": "all-linear", "scope": "all"})
    adapted = attach_adapter(model, plan)
    names = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert names == set(plan.adapted)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == sum(4 * sum(shapes[n]) for n in plan.adapted)
    table = adapter_report(adapted, plan)
    assert table["trainable_parameters"] == trainable
    assert table["total_parameters"] == sum(p.numel() for p in adapted.parameters())
    assert {r["part"]: r["linear"] for r in table["rows"] if r["linear"]} == LINEAR[kind.removesuffix("_vicuna")]
    assert all(r["scale"] == 2.0 and r["r"] == "4" for r in table["rows"] if r["modules"])


def test_the_report_counted_by_hand(small):
    model, _, _ = small.load("llava")
    plan = plan_adapter(model, {**R, "target_modules": ["q_proj", "v_proj"]})
    rows = {r["part"]: r for r in adapter_report(attach_adapter(model, plan), plan)["rows"]}
    # hidden 32, 4 heads and 2 key-value heads of 8: q is 32 -> 32, v is 32 -> 16; r 4, two layers
    assert rows["language"]["trainable"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert (rows["language"]["modules"], rows["language"]["linear"]) == (4, 15)
    assert rows["vision"]["trainable"] == rows["connector"]["trainable"] == 0
    assert rows["connector"]["total"] == 24 * 32 + 32 + 32 * 32 + 32


def test_rank_and_alpha_patterns(small):
    model, _, _ = small.load("llava")
    settings = {**R, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 16}}
    adapted = attach_adapter(model, plan := plan_adapter(model, settings))
    layers = adapted.base_model.model.model.language_model.layers
    assert layers[0].self_attn.v_proj.r["default"] == 2 and layers[0].self_attn.q_proj.r["default"] == 4
    assert [layer.self_attn.q_proj.scaling["default"] for layer in layers] == [8 / 4, 16 / 4]
    assert next(r["r"] for r in adapter_report(adapted, plan)["rows"] if r["part"] == "language") == "2, 4"


def test_rslora_scale_is_alpha_over_the_square_root_of_r(small):
    model, _, _ = small.load("qwen2vl")
    adapted = attach_adapter(model, plan := plan_adapter(model, {**R, "target_modules": ["q_proj"], "use_rslora": True}))
    assert next(r["scale"] for r in adapter_report(adapted, plan)["rows"] if r["part"] == "language") == 8 / 4**0.5


def test_dora_trains_one_magnitude_for_each_output(small):
    model, collator, _ = small.load("qwen2vl")
    adapted = attach_adapter(model, plan_adapter(model, {**R, "target_modules": ["q_proj"], "use_dora": True}))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 2 * (4 * 64 + 32)
    freeze(adapted)
    gradients(adapted.train(), collator, small)
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def gradients(model, collator, small):
    from mmft.losses.supervised import supervised_loss

    loss, count = supervised_loss(model, collator([small.sample("a", [0], "What?", "a red square")]))
    (loss / count).backward()


@pytest.mark.parametrize("scope", ["language", "all"])
def test_modules_to_save_are_trained_saved_and_loaded(small, tmp_path, scope):
    import torch
    from peft import PeftModel

    model, collator, family = small.load("llava")
    settings = {**R, "target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"], "scope": scope}
    plan = plan_adapter(model, settings)
    assert not any("projector" in n for n in plan.adapted), "trained as a whole, so not adapted as well"
    adapted = attach_adapter(model, plan)
    table = {r["part"]: r for r in adapter_report(adapted, plan)["rows"]}
    assert table["connector"]["trainable"] == table["connector"]["total"] == 24 * 32 + 32 + 32 * 32 + 32
    freeze(adapted)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    gradients(adapted.train(), collator, small)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0).step()
    moved = {n for n, p in adapted.named_parameters() if p.requires_grad and not p.equal(before[n])}
    assert sum("multi_modal_projector" in n for n in moved) == 4
    adapted.save_pretrained(tmp_path / "adapter")
    batch = {k: v for k, v in collator([small.sample("a", [1], "Which?", "blue")]).items() if k not in ("labels", "row_ids")}
    adapted.eval()
    again = PeftModel.from_pretrained(small.load("llava")[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        assert again(**batch).logits.equal(adapted(**batch).logits)


def test_trained_weights_are_fp32_on_a_half_precision_base(small):
    import torch

    model, _, _ = small.load("llava", dtype="bf16")
    adapted = attach_adapter(model, plan_adapter(model, {**R, "target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_full_training_of_one_scope(small):
    model, _, _ = small.load("qwen2vl")
    plan = plan_adapter(model, {"r": None, "scope": "vision"})
    table = {r["part"]: r for r in adapter_report(attach_adapter(model, plan), plan)["rows"]}
    assert plan.method == "full" and table["vision"]["trainable"] == table["vision"]["total"] > 0 == table["language"]["trainable"]


def test_target_pattern_matches_only_the_planned_names(skeleton):
    names = {n for n, m in skeleton("llava").named_modules() if n}
    adapted = set(plan_adapter(skeleton("llava"), {**R, "target_modules": ["q_proj", "v_proj"]}).adapted)
    assert {n for n in names if re.fullmatch(target_pattern(adapted), n)} == adapted


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "nonsense"}, {"lora_dropout": 0.1, "use_dora": True, "target_modules": ["q_proj"], "bias": "nonsense"},
    {"init_lora_weights": "pissa_niter_few"},
])  # fmt: skip
def test_settings_that_peft_refuses_are_one_line(small, settings):
    model, _, _ = small.load("qwen2vl")
    plan = plan_adapter(model, {**R, "target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match="^lora: peft refuses these settings: ") as caught:
        attach_adapter(model, plan)
    assert "\n" not in str(caught.value)
