"""EVA, CorDA, LoRA-GA and LoftQ: first matrices against formulas in numpy; saved over the original base; resume and reproduce to the bit; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import SMALL, assert_resumes_and_reproduces
from plain_peft import held_out_losses

from mmft.adapters.attach import attach_adapter
from mmft.adapters.plan import plan_adapter
from mmft.adapters.report import adapter_report
from mmft.adapters.starts import StartSources, check_start_base
from mmft.common.errors import UserError

R = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"], "scope": "language"}
LAYERS = [f"model.language_model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")]


class Begun:
    """A small model with an adapter that began with three batches of two rows; `weight`: the base's weights before."""

    def __init__(self, small, kind: str, **settings):
        self.model, self.collator, _ = small.load(kind)
        self.small = small
        self.weight = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.before, self.collator, _ = small.load(kind)  # for the test's own formulas
        self.plan = plan_adapter(self.model, {**R, **settings})
        torch.manual_seed(0)
        self.tuned = attach_adapter(self.model, self.plan, sources=StartSources(self.batches, dict))

    def batches(self, single: bool = False):
        samples = [self.small.sample(str(i), [i % 3], f"What is {i}?", "a red square and a blue one " * (1 + i % 2)) for i in range(6)]
        step = 1 if single else 2
        return [self.collator(samples[i : i + step]) for i in range(0, 6, step)]

    def layer(self, name: str):
        layer = self.tuned.get_submodule(f"base_model.model.{name}")
        return layer, layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.scaling["default"]

    def inputs(self, name: str, single: bool = False) -> list[tuple[torch.Tensor, dict]]:
        """(inputs of the layer, batch) of the untouched model."""
        seen = []
        hook = self.before.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
        batches = self.batches(single)
        with torch.no_grad():
            for batch in batches:
                self.before.eval()(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")})
        hook.remove()
        return list(zip(seen, batches, strict=True))


def test_eva_begins_with_the_main_directions_of_the_inputs(small):
    """The directions of a principal component analysis in numpy, over the real tokens of all batches; peft's is incremental and randomised."""
    begun = Begun(small, "llava", init_lora_weights="eva", eva_config={"rho": 1.0, "tau": 0.999})
    for name in LAYERS:
        _, a, b, _ = begun.layer(name)
        x = np.concatenate([x[batch["attention_mask"].bool()].double().numpy() for x, batch in begun.inputs(name)])
        _, values, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
        shared = np.linalg.norm(a.double().numpy() @ directions[:4].T) ** 2 / 4  # 1: the same four-dimensional space
        assert shared > 0.97 and not b.any(), (name, shared, values[:6])
    config = begun.tuned.peft_config["default"]
    assert config.init_lora_weights is True and config.eva_config is None, "a plain adapter for plain peft"


def test_eva_moves_ranks_and_leaves_layers_out(small):
    begun = Begun(small, "llava", init_lora_weights="eva", r=2, eva_config={"rho": 2.0}, target_modules="all-linear", scope="all")
    ranks = [m.r["default"] for m in begun.tuned.modules() if hasattr(m, "lora_A") and m.r]
    assert sum(ranks) == 2 * 28 and max(ranks) <= 4 and len(set(ranks)) > 1, "the budget of ranks is spent, on some layers more"
    table = adapter_report(begun.tuned, begun.plan)["rows"]
    assert sum(row["modules"] for row in table) == len(ranks) == len(begun.plan.adapted)
    assert {r for row in table for r in row["r"].split(", ") if r} == set(map(str, ranks))
    assert {m.scaling["default"] for m in begun.tuned.modules() if hasattr(m, "lora_A") and m.r} == {4.0}, "alpha follows the rank"


def test_corda_takes_the_part_of_the_weights_that_its_inputs_order(small):
    """s B A = U_r S_r V_r' C^-1 for the singular value decomposition of W C; C: mean over rows of the covariance of inputs that are divided by their largest value."""
    begun = Begun(small, "llava", init_lora_weights="corda")
    for name in LAYERS:
        layer, a, b, scale = begun.layer(name)
        w, c = begun.weight[f"{name}.weight"].double().numpy(), 0.0
        for x, _ in begun.inputs(name, single=True):
            x = x.double().numpy()[0]
            x = x / abs(x.max())
            c = c + x.T @ x / 6
        c = c + np.eye(len(c)) * np.trace(c) / len(c) * 0.01
        u, s, v = np.linalg.svd(w @ c)
        wanted = (u[:, :4] * s[:4]) @ v[:4] @ np.linalg.inv(c)
        taken = scale * (b @ a).double().numpy()
        assert abs(taken - wanted).max() < 2e-2 * abs(wanted).max(), name
        assert abs(layer.base_layer.weight.double().numpy() + taken - w).max() < 1e-5, "nothing is lost"
        assert not hasattr(layer.base_layer, "eigens") and not hasattr(layer.base_layer, "covariance_matrix")


def test_lora_ga_begins_with_directions_of_the_gradient(small):
    """A: the first r right singular vectors of the gradient of the mean loss; B: the next r left ones. plain autograd."""
    import torch.nn.functional as F

    begun = Begun(small, "llava", init_lora_weights="lora_ga")
    model = begun.before.eval()
    model.requires_grad_(False)
    for name in LAYERS:
        model.get_submodule(name).weight.requires_grad_(True)
    for batch in begun.batches():
        logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")}).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).backward()
    for name in LAYERS:
        layer, a, b, scale = begun.layer(name)
        u, _, v = np.linalg.svd(model.get_submodule(name).weight.grad.double().numpy(), full_matrices=False)
        a, b = a.double().numpy(), b.double().numpy()
        assert abs(a.T @ a - v[:4].T @ v[:4]).max() < 1e-2, name
        unit = b / np.linalg.norm(b, axis=0)
        assert abs(unit @ unit.T - u[:, 4:8] @ u[:, 4:8].T).max() < 2e-2, name
        assert abs(layer.base_layer.weight.double().numpy() + scale * b @ a - begun.weight[f"{name}.weight"].double().numpy()).max() < 1e-5
    assert all(p.grad is None for p in begun.tuned.parameters())


@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
@pytest.mark.long
def test_the_adapted_model_begins_as_the_base_in_every_family(small, kind, start):
    begun = Begun(small, kind, init_lora_weights=start, r=2, target_modules="all-linear", scope="all")
    batch = {k: v for k, v in begun.batches()[0].items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        first, base = begun.tuned.eval()(**batch).logits, begun.before.eval()(**batch).logits
    assert (first - base).abs().max() < 1e-3 * base.abs().max()
    assert {n for n, p in begun.tuned.named_parameters() if p.requires_grad} == {n for n, _ in begun.tuned.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(("settings", "message"), [
    ({"init_lora_weights": "eva", "eva_config": {"rho": "much"}}, "lora.eva_config.rho=much: must be a number"),
    ({"init_lora_weights": "corda", "corda_config": {"corda_method": "kpn"}}, "lora.corda_config.corda_method=kpn: must be one of ipm, kpm"),
    ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, "lora.corda_config.cache_file: no such key"),
    ({"eva_config": {"rho": 1.0}}, "lora.eva_config: has an effect with lora.init_lora_weights=eva alone"),
    ({"init_lora_weights": "eva", "init_batches": 0}, "lora.init_batches=0: must be a whole number of batches above 0"),
    ({"init_lora_weights": "eva", "r": 16}, "takes 64 directions .twice eva_config.rho times the rank. of .*, which has (32|64)"),
    ({"init_lora_weights": "lora_ga", "r": 24}, "takes 48 directions .twice the rank. of .*, which has 32; lower lora.r"),
    ({"init_lora_weights": "corda", "target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_one_line(small, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_adapter(small.load("llava")[0], {**R, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("start", "base", "message"), [
    ("loftq", (False, False, None), "this base is not quantised; add model.quantization.load_in_4bit=true"),
    ("loftq", (True, True, None), "needs the weights before they were quantised"),
    ("corda", (True, False, None), "quantised ones would be rounded; use loftq or eva"),
    ("eva", (False, False, "fsdp"), "needs the base whole on one device; drop trainer.fsdp"),
])  # fmt: skip
def test_bases_that_it_cannot_begin_on(start, base, message):
    with pytest.raises(UserError, match=message):
        check_start_base({"init_lora_weights": start}, *base)


def test_too_few_tokens_and_a_layer_that_takes_no_part(small):
    with pytest.raises(UserError, match=r"a batch has \d+ tokens, and rank 4 needs 32 in each"):
        Begun(small, "llava", init_lora_weights="eva", eva_config={"use_label_mask": True, "rho": 4.0})
    with pytest.raises(UserError, match=r"layers.1.mlp.fc1 takes no part in answering the first 3 batches; leave it out"):
        Begun(small, "llava", init_lora_weights="lora_ga", scope="all", r=2, target_modules=r".*vision_tower.*\.1\..*fc1")


# --- whole runs -----------------------------------------------------------------------------------------------------

SHORT = [*(w for w in SMALL if w != "trainer.save_steps=1"), "trainer.save_steps=3", "lora.r=4", "lora.lora_alpha=8", "lora.init_batches=2", "trainer.learning_rate=3e-3"]
STARTS = {"eva": [], "corda": [], "lora_ga": ["+lora.lora_ga_config.stable_gamma=64"], "pissa": [], "loftq": ["model.quantization.load_in_4bit=true"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from mmft.cli.main import main

    place = tmp_path_factory.mktemp("starts")

    def run(start: str) -> Path:
        if not (place / start).is_dir():
            assert main([*SHORT, f"lora.init_lora_weights={start}", *STARTS[start], f"output_dir={place.as_posix()}", f"run_dir={(place / start).as_posix()}"]) == 0
        return place / start

    return run


MOST = [pytest.param(start, marks=() if start == "corda" else pytest.mark.long) for start in STARTS]


@pytest.mark.parametrize("start", MOST)
def test_plain_peft_gives_the_trained_model_over_the_original_base(mmft, trained, start):
    """Also a checkpoint, which sits on the changed base while it is trained, as later verbs open it."""
    run = trained(start)
    quantization = None
    if start == "loftq":
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=True)
    base, tuned = held_out_losses(run, SHORT, 2, quantization)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    close = 0.05 if start == "loftq" else 1e-4  # bitsandbytes computes quantised layers in other ways inside a training and outside it
    assert tuned == pytest.approx(summary["eval_loss"], abs=close) and abs(tuned - base) > (1 if start == "loftq" else 1e-3)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["init_lora_weights"] is True and not any(config[f"{key}_config"] for key in ("eva", "corda", "lora_ga"))
    code, _, err = mmft("evaluate", f"run={run.as_posix()}", "checkpoint=6", f"output_dir={run.parent.as_posix()}", output_dir=False)
    assert code == 0, err
    (again,) = (json.loads(file.read_text(encoding="utf-8")) for file in (run / "eval").glob("shapes*.json"))
    assert again["eval_loss"] == pytest.approx(summary["eval_loss"], abs=close)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.long
def test_resume_and_reproduce_give_the_same_bytes(mmft, trained, tmp_path, start):
    assert_resumes_and_reproduces(mmft, trained(start), tmp_path)


def test_a_checkpoint_on_a_changed_base_is_no_start(mmft, trained):
    run = trained("corda")
    code, _, err = mmft(*SHORT, f"lora.start={(run / 'checkpoints' / 'checkpoint-3').as_posix()}", f"output_dir={run.parent.as_posix()}", output_dir=False)
    assert code == 2 and "changed the base, and sits on that base; name the run" in err and err.count("\n") == 1, err


@pytest.mark.long
def test_loftq_leaves_the_smallest_error_that_its_rank_can_leave(tmp_path):
    """The norm of W - Q - s B A is that of the singular values of W - Q beyond the rank, in numpy; Q from transformers alone."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.models.load import load_model, locate_model

    family = build(compose([]).model, "model")
    folder = locate_model(family).folder
    original = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    names = [n for n, m in original.named_modules() if n.endswith("q_proj") and "language" in n]
    weights = {n: original.get_submodule(n).weight.detach() for n in names}
    family.quantization = {"load_in_4bit": True}
    model = load_model(family).model
    plan = plan_adapter(model, {**R, "target_modules": ["q_proj"], "init_lora_weights": "loftq"})
    tuned = attach_adapter(model, plan, sources=StartSources(lambda single: [], lambda: weights))
    assert set(plan.adapted) == set(names)
    quantised = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    for name in names:
        layer = tuned.get_submodule(f"base_model.model.{name}")
        q = dequantize_module_weight(quantised.get_submodule(name)).double().numpy()
        residual = weights[name].double().numpy() - q
        left = residual - layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double().numpy()
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(np.linalg.svd(residual)[1][4:]), rel=1e-3)
        assert np.linalg.norm(left) < np.linalg.norm(residual)
