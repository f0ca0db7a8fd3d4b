"""Whether vLLM and SGLang find the modules of a saved adapter: their rules, restated from their sources (vLLM 0.33.0, SGLang 0.5.23).

The expected names are what vLLM's own `parse_fine_tuned_lora_name` and `WeightsMapper` return for such keys, cut out of its source and run once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

# kind of tests/small_models.py -> vLLM's name of the first layer's q_proj
EXPECTED = {
    "qwen2vl": "language_model.model.layers.0.self_attn.q_proj",
    "qwen2_5vl": "language_model.model.layers.0.self_attn.q_proj",
    "qwen3vl": "language_model.model.layers.0.self_attn.q_proj",
    "llava": "language_model.model.layers.0.self_attn.q_proj",
    "gemma3": "language_model.model.layers.0.self_attn.q_proj",
    "internvl": "language_model.model.layers.0.self_attn.q_proj",
    "smolvlm": "model.text_model.layers.0.self_attn.q_proj",
    "blip2": "language_model.model.decoder.layers.0.self_attn.q_proj",
}
# how SGLang calls the layers in which it joins modules (srt/lora/utils.py)
JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def saved(small, kind: str, folder: Path, **settings) -> tuple[Path, str, int]:
    """(folder of an adapter that mmft saves, architecture, layers of the language model)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.plan import plan_adapter
    from mmft.adapters.save import save_trained

    model = AutoModelForImageTextToText.from_pretrained(small(kind))
    architecture, layers = type(model).__name__, model.config.get_text_config().num_hidden_layers
    plan = plan_adapter(model, {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", **settings})
    adapted = attach_adapter(model, plan)
    return save_trained(folder, adapted, plan, AutoProcessor.from_pretrained(small(kind)), (str(small(kind)), None), None), architecture, layers


@pytest.mark.parametrize("kind", ["qwen2vl", *(pytest.param(kind, marks=pytest.mark.long) for kind in EXPECTED if kind != "qwen2vl")])
def test_both_engines_find_every_module(small, tmp_path, kind):
    from mmft.adapters.stored import read_adapter
    from mmft.serving.vllm.adapter_names import ARCHITECTURES, unplaced, vllm_name

    folder, architecture, layers = saved(small, kind, tmp_path)
    stored = read_adapter(folder)
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in stored.shapes), "what vLLM parses"
    assert architecture in ARCHITECTURES and unplaced(architecture, stored.ranks) == []
    names = {vllm_name(architecture, module): module for module in stored.ranks}
    home = EXPECTED[kind].split("0.self_attn")[0]
    assert EXPECTED[kind] in names and all(re.match(rf"{re.escape(home)}\d+\.", name) for name in names) and len(names) == len(stored.ranks)
    # SGLang: a list of names, whose last words it joins; a tensor belongs to the layer whose number it holds
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert isinstance(config["target_modules"], list) and set(config["target_modules"]) == set(stored.ranks)
    wrapped = {JOINED.get(name.split(".")[-1], name.split(".")[-1]) for name in config["target_modules"]}
    places: dict[int, set[str]] = {}
    for module in stored.ranks:
        number = int(re.search(r"layers\.(\d+)\.", module).group(1))
        places.setdefault(number, set()).add(module.split(".")[-1])
        assert number < layers and JOINED.get(module.split(".")[-1], module.split(".")[-1]) in wrapped
    assert len(places) == layers and all({"q_proj", "k_proj", "v_proj"} <= found for found in places.values()), "SGLang joins the three"


def test_plain_peft_reads_the_names_as_it_read_the_expression(small, tmp_path):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    folder, _, _ = saved(small, "qwen2vl", tmp_path, target_modules=["q_proj", "v_proj", "down_proj"])
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(small("qwen2vl")), folder)
    loaded = {name.replace(".default.", "."): value for name, value in model.named_parameters() if ".lora_" in name}
    stored = load_file(folder / "adapter_model.safetensors")
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], value) for name, value in stored.items())


def test_a_name_outside_the_language_model_is_found_out():
    from mmft.serving.vllm.adapter_names import unplaced

    assert unplaced("Qwen3VLForConditionalGeneration", ["model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    assert unplaced("Qwen2VLForConditionalGeneration", ["model.layers.0.mlp.up_proj"]) == [], "its mapper also knows the names before transformers 4.52"
    assert unplaced("UnknownForConditionalGeneration", ["x"]) == []
