"""Rates, weight decay, ranks and full training by part of the model: one step against hand arithmetic on plain peft's gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmft.adapters.attach import attach_adapter
from mmft.adapters.plan import plan_adapter
from mmft.adapters.report import adapter_report, planned_report

ASSETS = Path(__file__).resolve().parents[2] / "mmft" / "assets" / "tiny"
ROWS = ["data.pictures=12", "data.splits.validation=2", "trainer.per_device_train_batch_size=10"]  # all rows in one step
SMALL = [*ROWS, "lora.r=2", "lora.lora_alpha=4", "lora.lora_dropout=0", "evaluation.split=null", "trainer.logging_steps=1", "trainer.warmup_steps=0",
         "logger=none", "audit=false", "trainer.lr_scheduler_type=constant", "trainer.max_steps=1", "trainer.max_grad_norm=0"]  # fmt: skip
SGD = [*SMALL, "trainer.optim=sgd", "trainer.learning_rate=0.1"]


class Home:
    def __init__(self, folder: Path):
        self.outputs = folder

    def train(self, name: str, *words: str) -> Path:
        from mmft.cli.main import main

        assert main([*words, f"output_dir={self.outputs.as_posix()}", f"run_dir={(self.outputs / name).as_posix()}"]) == 0
        return self.outputs / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`begun`: an adapter of all parts whose matrices B are not zero."""
    made = Home(tmp_path_factory.mktemp("rates"))
    made.train("begun", *SGD, "lora.scope=all")
    return made


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def batch_of(run: Path) -> dict:
    """All training rows as one batch, by the run's collator."""
    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data
    from mmft.runs.open import open_run

    opened = open_run(run, compose([f"output_dir={run.parent.as_posix()}"]), [])
    batch = opened.collator(list(prepared_data(opened.cfg).split("train")))
    batch.pop("row_ids")
    return batch


@pytest.fixture(scope="module")
def gradients(home):
    """name -> gradient of the mean loss over all rows, in the model of `begun`, by plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32), home.outputs / "begun" / "adapter", is_trainable=True)
    model.eval()
    model(**batch_of(home.outputs / "begun"), use_cache=False).loss.backward()
    return {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}


def part(name: str) -> str:
    return "connector" if ".merger." in name else "vision" if ".visual." in name else "language"


def check_step(before, after, gradients, rate, decay=lambda name: 0.0):
    """W' = W - rate (g + decay W) of every tensor."""
    assert before.keys() == after.keys() == gradients.keys()
    for name, value in before.items():
        wanted = value - rate(name) * (gradients[name] + decay(name) * value)
        moved = (wanted - value).abs().max().clamp(min=1e-6)
        assert (after[name] - wanted).abs().max() <= 1e-3 * moved, (name, (after[name] - wanted).abs().max(), moved)


def test_each_part_steps_at_its_own_rate_with_its_own_decay(home, gradients):
    words = ["trainer.learning_rates.vision=0.01", "trainer.learning_rates.connector=0.03", "trainer.weight_decay=0.02", "trainer.weight_decays={vision: 0.5}"]
    run = home.train("by_part", *SGD, "lora.scope=all", "lora.start=begun", *words)
    rates, decays = {"vision": 0.01, "connector": 0.03, "language": 0.1}, {"vision": 0.5, "connector": 0.02, "language": 0.02}
    check_step(adapter(home.outputs / "begun"), adapter(run), gradients, lambda n: rates[part(n)], lambda n: decays[part(n)])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][0]
    assert {k: v for k, v in logged.items() if k.startswith("learning_rate/")} == {f"learning_rate/{p}": v for p, v in rates.items()}
    assert logged["learning_rate"] == 0.1, "that of the language model"
    plan = json.loads((run / "lora_plan.json").read_text())
    assert {row["part"]: row["rate"] for row in plan["rows"]} == rates and {row["method"] for row in plan["rows"]} == {"LoRA"}


def test_lora_plus_multiplies_the_rate_of_b(home, gradients):
    run = home.train("plus", *SGD, "lora.scope=all", "lora.start=begun", "trainer.loraplus_lr_ratio=4", "trainer.learning_rates.vision=0.01")
    rates = {"vision": 0.01, "connector": 0.1, "language": 0.1}
    check_step(adapter(home.outputs / "begun"), adapter(run), gradients, lambda n: rates[part(n)] * (4 if ".lora_B." in n else 1))


def test_a_part_trained_whole_beside_the_adapter_steps_too(home):
    """lora.whole=[connector]: its weights are saved with the adapter, and stepped from those of the base."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = home.train("whole", *SGD, "lora.whole=[connector]", "trainer.learning_rates.connector=0.02")
    still = home.train("still", *SGD, "lora.whole=[connector]", "trainer.learning_rate=0")
    base = {name: p for name, p in AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32).named_parameters() if ".merger." in name}
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32), still / "adapter", is_trainable=True).eval()
    model(**batch_of(still), use_cache=False).loss.backward()
    grads = {n.replace(".default", "").replace(".modules_to_save", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    before, after = adapter(still), adapter(run)
    saved = [name for name in before if ".lora_" not in name]
    assert len(saved) == len(base) and all(torch.equal(before[f"base_model.model.{name}"], p) for name, p in base.items())
    check_step(before, after, grads, lambda n: 0.02 if n in saved else 0.1)
    rows = {row["part"]: row["method"] for row in json.loads((run / "lora_plan.json").read_text())["rows"]}
    assert rows == {"vision": "frozen", "connector": "whole", "language": "LoRA"}


def test_lora_fa_leaves_a_and_steps_b_with_the_fitting_gradient(home, gradients):
    """The first step of Adam is rate x sign(g) where g is not tiny; g = grad_B (A A^T)^-1 / s^2 in double precision."""
    words = [word for word in SMALL if not word.startswith("trainer.learning_rate=")]
    run = home.train("fa", *words, "trainer.learning_rate=0.01", "lora.scope=all", "lora.start=begun", "trainer.lora_fa=true")
    before, after = adapter(home.outputs / "begun"), adapter(run)
    agree = total = 0
    for name, value in before.items():
        if ".lora_A." in name:
            assert torch.equal(value, after[name]), name
            continue
        a = before[name.replace("lora_B", "lora_A")].double()
        fitting = gradients[name].double() @ torch.linalg.inv(a @ a.T) / 4.0
        clear = fitting.abs() > 0.05 * fitting.abs().max()
        agree += int((((after[name] - value) + 0.01 * fitting.sign()).abs()[clear] < 1e-4).sum())
        total += int(clear.sum())
    assert total > 1000 and agree / total > 0.98
    assert json.loads((run / "summary.json").read_text())["trainable_parameters"] == sum(v.numel() for n, v in after.items() if ".lora_B." in n)


def test_a_part_has_its_own_rank_and_alpha_and_zero_leaves_it_out(home, mmft):
    code, out, err = mmft(*SGD, "lora.scope=all", "lora.parts.vision.r=4", "lora.parts.vision.lora_alpha=16", "lora.parts.connector.r=0",
                          f"run_dir={(home.outputs / 'ranks').as_posix()}", f"output_dir={home.outputs.as_posix()}", output_dir=False)  # fmt: skip
    assert code == 0, err
    saved = adapter(home.outputs / "ranks")
    ranks = {part(name): value.shape[0] for name, value in saved.items() if ".lora_A." in name}
    assert ranks == {"vision": 4, "language": 2}
    rows = {row["part"]: (row["method"], row["r"], row["scale"]) for row in json.loads((home.outputs / "ranks" / "lora_plan.json").read_text())["rows"]}
    assert rows == {"vision": ("LoRA", "4", 4.0), "connector": ("frozen", "", None), "language": ("LoRA", "2", 2.0)}
    assert out.index("Adapter plan") < out.index("model   "), "the plan is shown before the weights are read"
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForImageTextToText

    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(ASSETS), home.outputs / "ranks" / "adapter")
    assert {m.scaling["default"] for n, m in plain.named_modules() if isinstance(m, LoraLayer) and ".visual." in n} == {4.0}


def test_the_top_layers_alone_are_trained(home):
    words = [word for word in SGD if not word.startswith("lora.")]
    run = home.train("top", *words, "lora=none", "lora.scope=language", "lora.top_layers=1")
    before, after = load_file(ASSETS / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name].float(), after[name].float())}
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in before if "layers." in name and "visual" not in name}
    assert changed and all(f"layers.{max(layers)}." in name for name in changed) and len(layers) > 1
    row = json.loads((run / "lora_plan.json").read_text())["rows"][-1]
    assert (row["part"], row["method"]) == ("language", "top 1 layers") and row["trainable"] < row["total"]


SETTINGS = [
    {"scope": "all"}, {"scope": "language", "use_dora": True}, {"scope": "all", "bias": "all"}, {"scope": "language", "whole": ["connector"], "use_rslora": True},
    {"scope": "all", "parts": {"vision": {"r": 2}, "language": {"lora_alpha": 3}}, "bias": "lora_only"}, {"scope": "vision", "lora_bias": True},
    {"r": None, "scope": "language", "top_layers": 1}, {"r": None, "scope": "connector"}, {"scope": "language", "trainable_token_indices": [5, 6, 7]},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
def test_the_plan_before_the_weights_is_what_is_attached(small, kind):
    for own in SETTINGS:
        adapters = {} if "r" in own else {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
        skeleton, _, _ = small.load(kind)
        plan = plan_adapter(skeleton, {**adapters, **own})
        rates = dict.fromkeys(("vision", "connector", "language"), 0.5)
        planned = planned_report(skeleton, plan, rates)
        assert planned == adapter_report(attach_adapter(skeleton, plan), plan, rates), own


REFUSED = [
    (["trainer.learning_rates.vision=1e-5"], "trainer.learning_rates.vision: nothing in the vision part is trained; trained are: language"),
    (["trainer.learning_rates.langauge=1e-5"], "Did you mean language?"),
    (["trainer.learning_rates.language=fast"], "must be a number"),
    (["trainer.weight_decays.connector=0.1"], "nothing in the connector part is trained"),
    (["lora.scope=all", "lora.parts.audio.r=4"], "lora.parts.audio: this model has no parameters in a part audio; it has vision"),
    (["lora.parts.vision.r=4"], "outside lora.scope=language"),
    (["lora.scope=all", "lora.parts.vision.rank=4"], "rank is no key of a part"),
    (["lora.scope=all", "lora.parts.vision.r=-1"], "must be a whole number"),
    (["lora.whole=[qformer]"], "lora.whole.qformer: this model has no parameters in a part qformer"),
    (["lora.whole=[language]"], "lora=none lora.scope=language"),
    (["lora.whole=connector"], "must be a list of parts"),
    (["lora.top_layers=2"], "lora.layers_to_transform"),
    (["lora=none", "lora.scope=language", "lora.top_layers=99"], "part has"),
    (["lora=none", "lora.top_layers=1"], "add lora.scope=language"),
    (["lora=none", "trainer.loraplus_lr_ratio=4"], "lora=none has none"),
    (["trainer.loraplus_lr_ratio=-4"], "must be a number above 0"),
    (["trainer.lora_fa=true", "trainer.optim=sgd"], "is a form of AdamW"),
    (["trainer.lora_fa=true", "lora.use_dora=true"], "drop lora.use_dora"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_what_acts_on_nothing_is_refused_by_name(mmft, home, words, expected):
    code, out, err = mmft(*ROWS, "logger=none", *words, f"output_dir={home.outputs.as_posix()}", output_dir=False)
    assert code == 2 and expected in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_rates_are_swept_in_step_and_resumed_exactly(home, mmft):
    words = [word for word in SMALL if not word.startswith("trainer.max_steps")] + ["trainer.learning_rate=0.01", "trainer.loraplus_lr_ratio=2", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    place = f"output_dir={home.outputs.as_posix()}"
    code, out, err = mmft("-m", *words, "trainer.max_steps=2", "trainer.learning_rates.language=0.01,0.002", "name=rates", "hydra.launcher.processes=1", place, output_dir=False)
    assert code == 0 and "2 points in step" in out, err
    alone = home.train("alone", *words, "trainer.max_steps=2", "trainer.learning_rates.language=0.002")
    joint = adapter(home.outputs / "sweeps" / "rates" / "trainer.learning_rates.language-0.002")
    assert all(torch.allclose(value, adapter(alone)[name], rtol=1e-3, atol=1e-5) for name, value in joint.items())
    home.train("half", *words, "trainer.max_steps=1", "trainer.learning_rates.language=0.002")
    code, out, err = mmft("resume", f"run={(home.outputs / 'half').as_posix()}", "trainer.max_steps=2", f"run_dir={(home.outputs / 'both').as_posix()}", place, output_dir=False)
    assert code == 0, err
    one, other = ((home.outputs / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("alone", "both"))
    assert one == other
