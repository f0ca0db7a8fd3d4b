"""Mixtures of experts: what the plan says of expert tensors, what target_parameters adapts, and that peft computes what was trained."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from model_types import TYPES, load
from safetensors.torch import load_file

from mmft.adapters.attach import attach_adapter
from mmft.adapters.experts import expert_tensors
from mmft.adapters.merge import merge_adapter
from mmft.adapters.plan import plan_adapter
from mmft.adapters.report import adapter_report
from mmft.common.errors import UserError

R = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": False}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LAYER = "model.language_model.layers.{}.mlp.experts.{}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers of width 32 with four experts of width 16, two of them for each token."""
    path = tmp_path_factory.mktemp("experts") / "model"
    TYPES["qwen3_5_moe"].build(path)
    return path


@pytest.fixture
def model(folder):
    return load(TYPES["qwen3_5_moe"], folder)[0]


def test_expert_tensors_by_name_and_size(model):
    shapes = {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}  # gate and up, 16 each, in one tensor
    assert expert_tensors(model) == {LAYER.format(i, name): shape for i in (0, 1) for name, shape in shapes.items()}


def test_the_plan_lists_experts_that_stay_frozen(model):
    plan = plan_adapter(model, R)
    report = adapter_report(attach_adapter(model, plan), plan)
    assert [(e["name"], e["shape"], e["tensors"], e["adapted"], e["total"]) for e in report["experts"]] == [
        (LAYER.format("*", "gate_up_proj"), [4, 32, 32], 2, 0, 2 * 4 * 32 * 32), (LAYER.format("*", "down_proj"), [4, 32, 16], 2, 0, 2 * 4 * 32 * 16),
    ]  # fmt: skip
    assert not plan.parameters and not any("gate" in name.split(".")[-1] and "proj" not in name for name in plan.adapted), "routers stay as they are"


def test_a_router_is_adapted_if_it_is_named(model):
    plan = plan_adapter(model, R | {"target_modules": ["shared_expert_gate"]})
    assert sorted(plan.adapted) == [f"model.language_model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]


def test_the_merged_experts_are_base_plus_scaled_product(model, tmp_path):
    """W_e + (alpha / r) B_e A_e of each expert, from the saved matrices; peft keeps those of all experts in one matrix each."""
    before = {name: model.get_parameter(name).detach().clone() for name in expert_tensors(model)}
    plan = plan_adapter(model, R | {"target_parameters": BOTH})
    assert set(plan.parameters) == set(before) and set(plan.parameters.values()) == {"language"}
    tuned = attach_adapter(model, plan)
    report = adapter_report(tuned, plan)
    assert [e["adapted"] for e in report["experts"]] == [2, 2]
    linear = sum(4 * (m.in_features + m.out_features) for n, m in model.named_modules() if n in plan.adapted for m in [getattr(m, "base_layer", m)])
    assert report["trainable_parameters"] == linear + 2 * 4 * 4 * ((32 + 32) + (32 + 16)), "r x experts x (in + out), in two layers"
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    merged = merge_adapter(tuned)
    for i in (0, 1):
        # peft wraps the parameters of a module one around the other, in the module's order: the outer wrapper is the last one's
        for name, wrapper in (("down_proj", "experts"), ("gate_up_proj", "experts.base_layer")):
            key = f"base_model.model.model.language_model.layers.{i}.mlp.{wrapper}.lora_"
            a, b = saved[f"{key}A.weight"].view(4, 4, -1), saved[f"{key}B.weight"]
            b = b.view(b.shape[0], 4, 4)  # (out, rank, experts)
            wanted = before[LAYER.format(i, name)] + 16 / 4 * torch.stack([b[:, :, e] @ a[e] for e in range(4)])
            assert torch.allclose(merged.get_parameter(LAYER.format(i, name)), wanted, atol=1e-5)


@pytest.mark.parametrize("settings, expected", [
    ({"target_parameters": BOTH, "lora_dropout": 0.05}, "set lora.lora_dropout=0"),
    ({"target_parameters": ["experts.gate_proj"]}, "Did you mean experts.gate_up_proj?"),
    ({"target_parameters": ["qqq"]}, "There are: experts.down_proj, experts.gate_up_proj."),
    ({"target_parameters": ["shared_expert.up_proj.weight"]}, "lora.target_modules adapts linear layers"),
    ({"target_parameters": BOTH, "scope": "vision"}, "outside lora.scope=vision"),
])  # fmt: skip
def test_what_cannot_be_adapted_is_one_line(model, settings, expected):
    with pytest.raises(UserError) as caught:
        plan_adapter(model, R | settings)
    assert expected in str(caught.value) and str(caught.value).startswith("lora.target_parameters") and "\n" not in str(caught.value)


def test_a_dense_model_says_that_it_has_no_experts(small):
    with pytest.raises(UserError, match=r"This model has no expert tensors\."):
        plan_adapter(small.load("llava")[0], R | {"target_parameters": BOTH})


def test_experts_alone(model):
    plan = plan_adapter(model, R | {"target_modules": [], "target_parameters": BOTH})
    trainable = {n for n, p in attach_adapter(model, plan).named_parameters() if p.requires_grad}
    assert not plan.adapted and trainable and all(".experts." in n for n in trainable)


# --- through the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from PIL import Image

    path, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    with (path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        for n in range(8):
            Image.frombytes("RGB", (64, 64), rng.randbytes(3 * 64 * 64)).save(path / f"{n}.png")
            writer.writerow([f"{n}.png", "What is in the picture?", rng.choice(["a red square", "a blue square"])])
    return path / "rows.csv"


def test_a_run_trains_experts_and_every_later_verb_uses_them(folder, rows, mmft, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = tmp_path / "run"
    code, out, err = mmft(
        "model=qwen3_5_moe", f"model.path={folder.as_posix()}", "model.processor={}", "data=table", f"data.path={rows.as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 3}", "logger=none", "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.05", "trainer.warmup_steps=0", "evaluation.batch_size=2", "generation.max_new_tokens=3",
        "lora.r=4", "lora.lora_dropout=0", "lora.target_parameters=[mlp.experts.gate_up_proj, mlp.experts.down_proj]", f"run_dir={run.as_posix()}",
    )  # fmt: skip
    assert code == 0, err[-2000:]
    assert "expert tensors model.language_model.layers.*.mlp.experts.gate_up_proj: 2 of 4 x 32 x 32" in " ".join(out.split()) and "2 adapted" in out
    plan = json.loads((run / "lora_plan.json").read_text(encoding="utf-8"))
    assert [e["adapted"] for e in plan["experts"]] == [2, 2]
    assert (run / "report.html").read_text(encoding="utf-8").count("expert tensors") == 2
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(float(t.abs().max()) > 0 for n, t in saved.items() if ".experts." in n and "lora_B" in n), "the experts' adapters were trained"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    code, out, err = mmft("evaluate", f"run={run.as_posix()}")
    assert code == 0, err[-2000:]
    (again,) = (json.loads(file.read_text(encoding="utf-8")) for file in (run / "eval").glob("*.json"))
    assert again["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-4)
    code, _, err = mmft("merge", f"run={run.as_posix()}", f"out={(tmp_path / 'merged').as_posix()}")
    assert code == 0, err[-2000:]
    tuned = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), run / "adapter").eval()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-3)


def test_joint_training_says_why_such_a_point_trains_alone():
    from mmft.joint.partition import why_alone

    settings = {"lora": {"r": 4, "target_parameters": BOTH}, "trainer": {}, "model": {}, "logger": "none", "objective": {"_target_": "mmft.losses.objectives.Sft"}}
    assert "lora.target_parameters" in why_alone(settings) and why_alone(settings | {"lora": {"r": 4}}) is None
