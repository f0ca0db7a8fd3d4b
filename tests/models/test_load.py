"""Loading: what is wrong with the files is said in one line, and what the machine can do is chosen with a reason."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from small_models import KINDS

from mmft.common.errors import UserError
from mmft.common.model_parts import part_of, size
from mmft.models import device as machine
from mmft.models.families.base import Family
from mmft.models.load import end_token_ids, load_model, load_processor, load_skeleton, locate_model
from mmft.models.quantization import choose_quantization


@pytest.fixture
def broken(small, tmp_path):
    """A copy of a small model's folder to break: broken("qwen2vl", lambda folder: ...) -> its Family."""
    from small_models import family

    def make(kind, edit, **keys):
        folder = tmp_path / "model"
        shutil.copytree(small(kind), folder)
        edit(folder)
        return family(kind, folder, **keys)

    return make


def weights(folder, edit):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(folder):
    weights(folder, lambda t: t.pop(next(k for k in t if k.endswith("q_proj.weight"))))


def reshaped(folder):
    weights(folder, lambda t: t.update({k: t[k][:4].clone() for k in t if k.endswith("layers.0.self_attn.q_proj.weight")}))


def biased(folder):
    weights(folder, lambda t: t.update({k.replace("weight", "bias"): t[k][:, 0].clone() for k in list(t) if k.endswith("o_proj.weight")}))


def renamed(folder):
    weights(folder, lambda t: [t.update({k.replace("q_proj", "query"): t.pop(k)}) for k in list(t) if "q_proj" in k])


def torn(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without, r"1 weights are missing or of another shape, e\.g\. .*q_proj\.weight"),
        (renamed, "weights are missing"),
        (reshaped, "the weights have other shapes than its config.json says"),
        (biased, "the files hold .*o_proj.bias, which config.json has no place for"),
        (torn, "a weights file is torn"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*no file named model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "its config.json cannot be used"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "its config.json cannot be used.*nonsense"),
        (lambda f: (f / "tokenizer.json").unlink(), "its tokenizer has no vocabulary; tokenizer.json is missing"),
        (lambda f: [p.unlink() for p in f.glob("*processor*")], "no usable processor"),
        (lambda f: (f / "config.json").unlink(), "this folder has no config.json"),
    ],
)
def test_broken_files_are_errors_of_one_line(broken, edit, message, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=message) as caught:
        load_model(broken("qwen2vl", edit))
    assert str(caught.value).startswith("model.path=") and "\n" not in str(caught.value)
    assert not caplog.records, "nothing beside the one line"


def test_layers_the_model_does_not_have_are_noted_not_refused(broken):
    def more(folder):
        weights(folder, lambda t: t.update({"mtp.0.weight": next(iter(t.values())).clone()}))

    assert "1 weights in the files are not used by Qwen2VLForConditionalGeneration" in load_model(broken("qwen2vl", more)).notes


def test_a_language_model_is_refused_before_any_weight_is_read(broken):
    text = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    family = broken("qwen2vl", lambda f: (f / "config.json").write_text(json.dumps(text)))
    with pytest.raises(UserError, match="a qwen2 is not a vision-language model"):
        load_skeleton(family, locate_model(family))


def test_a_processor_without_images_is_refused(broken):
    def text_only(folder):
        for file in folder.glob("*processor*"):
            file.unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("processor_class", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    family = broken("llava", text_only)
    with pytest.raises(UserError, match="no usable processor|handles no images"):
        load_processor(family, locate_model(family))


def test_wrong_paths_name_the_nearest(small, tmp_path):
    folder = small("qwen2vl")
    with pytest.raises(UserError, match=r"qwen2v: no such folder.* Did you mean qwen2vl\?"):
        locate_model(Family(path=str(folder.parent / "qwen2v")))
    with pytest.raises(UserError, match=r"mmft:tyni: mmft ships no such model"):
        locate_model(Family(path="mmft:tyni"))
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        locate_model(Family(path="a/b/c"))
    with pytest.raises(UserError, match=r"model.hub=hugingface: no such hub\. Did you mean huggingface\?"):
        locate_model(Family(path="a/b", hub="hugingface"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"processor": {"max_pixel": 3136}}, r"model.processor.max_pixel: Qwen2VLProcessor has no such setting\. Did you mean max_pixels\?"),
        ({"processor": {"max_pixels": "many"}}, "model.processor.max_pixels=many: must be a whole number of pixels"),
        ({"processor": {"max_pixels": 0}}, "must be a whole number of pixels above 0"),
        ({"dtype": "bf61"}, r"model.dtype=bf61: no such dtype\. Did you mean bf16\?"),
        ({"device": "cude"}, r"model.device=cude: no such device\. Did you mean cuda\?"),
        ({"attn_implementation": "nonsense"}, "cannot be loaded: .*nonsense"),
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "exclude each other"),
        ({"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}}, "bnb_4bit_quant_type=nf5: must be nf4 or fp4"),
        ({"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float7"}}, "model.quantization: .*float7"),
    ],
)
def test_settings_that_cannot_be_are_errors_of_one_line(small, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(small.family("qwen2vl", **keys))
    assert "\n" not in str(caught.value)


def test_quantised_weights_cannot_be_trained_whole(small):
    with pytest.raises(UserError, match="quantised weights cannot be trained"):
        load_model(small.family("qwen2vl", quantization={"load_in_8bit": True}), full_training=True)


# --- the machine's choices ------------------------------------------------------------------------------------------


def test_dtype_follows_the_machine(monkeypatch):
    import torch

    assert machine.choose_dtype("auto", "cpu", False)[0] == torch.float32
    assert machine.choose_dtype("auto", "mps", False)[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert machine.choose_dtype("auto", "cuda", False)[0] == torch.bfloat16
    assert machine.choose_dtype("auto", "cuda:1", True)[0] == torch.float32, "weights that are trained stay fp32"
    assert machine.mixed_precision(torch.float32, "cuda", True) == {"bf16": True, "fp16": False}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert machine.choose_dtype("auto", "cuda", False) == (torch.float16, "this GPU has no bf16")
    for words, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)):
        assert machine.choose_dtype(words, "cpu", False)[0] == dtype
    assert machine.mixed_precision(torch.float16, "cuda", False) == {"bf16": False, "fp16": True}
    assert machine.mixed_precision(torch.float32, "cpu", False) == {"bf16": False, "fp16": False}


def test_the_choice_is_told_and_in_force(small):
    import torch

    loaded = load_model(small.family("llava", dtype="bf16"))
    assert loaded.notes == ["cpu, bfloat16 (as asked)"]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16} and not loaded.model.training


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_quantisation_that_cannot_work_falls_back_with_one_line(monkeypatch, device):
    if device == "cpu":
        monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    config, note = choose_quantization({"load_in_4bit": True}, device)
    assert config is None and note.startswith("load_in_4bit is not possible here (bitsandbytes") and "\n" not in note
    assert choose_quantization({"load_in_8bit": False}, device) == (None, "")


def test_measuring_a_4bit_base_first_changes_no_gradient(small):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in eval mode, and the packed form has no gradient."""
    import torch
    from peft import prepare_model_for_kbit_training

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.freeze import freeze
    from mmft.adapters.plan import plan_adapter
    from mmft.losses.supervised import supervised_loss

    results = []
    for measured in (False, True):
        model, collator, _ = small.load("qwen2vl", quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
        assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
        batch = collator([small.sample("a", [0], "What?", "a red square")])
        if measured:
            with torch.no_grad():
                supervised_loss(model.eval(), batch)
        torch.manual_seed(0)
        base = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapted = attach_adapter(base, plan_adapter(base, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]}))
        freeze(adapted)
        loss, count = supervised_loss(adapted.train(), batch)
        (loss / count).backward()
        results.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert len(results[0]) == 4
    assert all(g.equal(results[1][n]) for n, g in results[0].items())
    assert any(g.abs().max() > 0 for n, g in results[0].items() if ".layers.0." in n), "the gradient reaches the first layer"


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_part(small, kind):
    model, _, _ = small.load(kind)
    parts = {part_of(n) for n, _ in model.named_parameters()}
    assert "other" not in parts
    assert parts == {"vision", "connector", "language"} | ({"qformer"} if kind == "blip2" else set())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.visual.blocks.0.attn.qkv", "vision"),
        ("model.visual.merger.mlp.0", "connector"),
        ("model.visual.deepstack_merger_list.1.linear_fc1", "connector"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "vision"),
        ("model.multi_modal_projector.linear_1", "connector"),
        ("model.connector.modality_projection.proj", "connector"),
        ("model.text_model.layers.0.mlp.up_proj", "language"),
        ("query_tokens", "qformer"),
        ("qformer.encoder.layer.0.attention.attention.query", "qformer"),
        ("language_projection", "connector"),
        ("language_model.lm_head", "language"),
        ("lm_head", "language"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default", "language"),
        ("base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1", "connector"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_4bit_weights_count_as_the_weights_they_hold(small):
    whole, _, _ = small.load("qwen2vl")
    packed, _, _ = small.load("qwen2vl", quantization={"load_in_4bit": True})
    assert sum(size(p) for p in packed.parameters()) == sum(p.numel() for p in whole.parameters())


# --- the families' own quirks ---------------------------------------------------------------------------------------


def test_blip2_end_tokens_are_the_language_models_own(small):
    loaded = load_model(small.family("blip2"))
    newline = loaded.processor.tokenizer.encode("\n", add_special_tokens=False)
    assert end_token_ids(small.family("blip2"), loaded) == newline != [loaded.processor.tokenizer.eos_token_id]


def test_blip2_without_query_tokens_in_the_processor_is_mended(broken):
    def old(folder):
        file = folder / "processor_config.json"
        config = json.loads(file.read_text())
        config.pop("num_query_tokens")
        file.write_text(json.dumps(config))

    family = broken("blip2", old)
    assert load_processor(family, locate_model(family)).num_query_tokens == 6


def test_blip2_whose_image_token_does_not_fit_is_refused(broken):
    def other(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["image_token_index"] = 7
        file.write_text(json.dumps(config))

    family = broken("blip2", other)
    with pytest.raises(UserError, match="the model expects 7"):
        load_processor(family, locate_model(family))


def test_llava_without_patch_size_in_the_processor_is_mended(broken):
    def old(folder):
        file = folder / "processor_config.json"
        config = json.loads(file.read_text())
        for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
            config.pop(key)
        file.write_text(json.dumps(config))

    family = broken("llava", old)
    made = load_processor(family, locate_model(family))
    assert (made.patch_size, made.vision_feature_select_strategy, made.num_additional_image_tokens) == (14, "default", 1)


def test_llama_gets_a_padding_token_that_ends_nothing(small):
    from small_models import llama_tokenizer

    words = llama_tokenizer()
    assert words.pad_token_id not in (words.eos_token_id, words.bos_token_id)
