"""PiSSA and OLoRA change the base weights while they train; what is saved is a plain adapter over the original base."""

from __future__ import annotations

import json

import pytest

SMALL = ["data.pictures=24", "data.splits.validation=8", "trainer.max_steps=4", "trainer.per_device_train_batch_size=2", "logger=none", "lora.r=4", "lora.lora_alpha=8"]


@pytest.mark.parametrize("more", [["lora.init_lora_weights=pissa"], ["lora.init_lora_weights=olora"], ["lora.init_lora_weights=pissa", "lora.use_rslora=true"]])
@pytest.mark.long
def test_the_saved_adapter_gives_the_trained_model_over_the_original_base(mmft, tmp_path, more):
    run = tmp_path / "run"
    code, _, err = mmft(*SMALL, *more, f"run_dir={run.as_posix()}")
    assert code == 0, err[-2000:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 8 and config["init_lora_weights"] is True
    code, _, err = mmft("evaluate", f"run={run.as_posix()}", "base=true")
    assert code == 0, err[-2000:]
    (again,) = (json.loads(file.read_text(encoding="utf-8")) for file in (run / "eval").glob("shapes*.json"))
    assert again["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-4)
    assert again["base_eval_loss"] == pytest.approx(summary["base_eval_loss"], abs=1e-6), "the base is the original one"
    assert abs(summary["eval_loss"] - summary["base_eval_loss"]) > 1e-3, "four steps changed something"


def test_plain_peft_loads_it(mmft, tmp_path):
    """transformers and peft alone, on the original base: the loss of a row equals that of mmft's own evaluation."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = tmp_path / "run"
    code, _, err = mmft(*SMALL, "lora.init_lora_weights=pissa", f"run_dir={run.as_posix()}")
    assert code == 0, err[-2000:]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, run / "adapter")
    with model.disable_adapter():
        pass
    for name, parameter in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in before:
            assert torch.equal(parameter, before[plain]), f"{plain}: loading changed the base"
