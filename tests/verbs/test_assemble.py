"""`mmft assemble`: small random language models and towers put together, compared with their parts, then trained."""

import json
from pathlib import Path

import pytest
import torch

SIDE = 56
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWERS = {"clip": (16, 1), "siglip": (16, 0), "dinov2": (16, 1)}  # patches of 14 pixels, class tokens


def language_model(folder: Path, tied: bool = True, spare: int = 0, template: str | None = CHATML, kind: str = "qwen2", **keys) -> Path:
    from small_models import TEXT, qwen_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    words = qwen_tokenizer()
    words.chat_template = template
    ends = {"bos_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **TEXT | ends, vocab_size=len(words) + spare, tie_word_embeddings=tied, **keys)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = GenerationConfig(eos_token_id=[words.eos_token_id, words.pad_token_id], pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tower(folder: Path, kind: str) -> Path:
    """CLIP as a two-tower checkpoint (as published), SigLIP and DINOv2 as towers alone."""
    import transformers as t

    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
    square = {"height": SIDE, "width": SIDE}
    torch.manual_seed(2)
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
        model = t.CLIPModel(t.CLIPConfig(vision_config=small, text_config=text, projection_dim=8))
        images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    elif kind == "siglip":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**small))
        images = t.SiglipImageProcessor(size=square)
    elif kind == "registers":
        model = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**small | {"image_size": 112}, num_register_tokens=4))
        images = t.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    else:
        model = t.Dinov2Model(t.Dinov2Config(**small | {"image_size": 112}))
        images = t.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    made = {kind: tower(root / kind, kind) for kind in (*TOWERS, "registers")}
    return made | {"llm": language_model(root / "llm"), "untied": language_model(root / "untied", tied=False, spare=7, template=None)}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tensor_of_the_result_equals_its_part(mmft, tmp_path, parts, kind):
    """Read with plain transformers, from both sides; nothing of mmft is used to compare."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "made"
    code, text, err = mmft("assemble", f"llm={parts['llm']}", f"vision={parts[kind]}", f"out={out}")
    assert code == 0, err
    made, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(made).__name__ == "LlavaForConditionalGeneration" and not info["missing_keys"] and not info["unexpected_keys"]
    llm = AutoModelForCausalLM.from_pretrained(parts["llm"])
    rows = llm.config.vocab_size
    state, own = made.state_dict(), llm.model.state_dict()
    table = state["model.language_model.embed_tokens.weight"]
    assert table.shape[0] == rows + 1 and torch.equal(table[:rows], own.pop("embed_tokens.weight"))
    assert torch.allclose(table[rows], table[:rows].mean(0), atol=1e-6), "a new row starts as the mean of the others"
    assert len(own) > 10 and all(torch.equal(state[f"model.language_model.{k}"], v) for k, v in own.items())

    if kind == "clip":
        from transformers import CLIPModel

        own = CLIPModel.from_pretrained(parts[kind]).vision_model.state_dict()
    else:
        from transformers import AutoModel

        own = AutoModel.from_pretrained(parts[kind]).state_dict()
    assert len(own) > 10 and all(torch.equal(state[f"model.vision_tower.{k}"], v) for k, v in own.items())

    patches, extra = TOWERS[kind]
    config, processor = made.config, AutoProcessor.from_pretrained(out)
    assert config.image_token_id == rows < table.shape[0] == config.text_config.vocab_size
    assert config.vision_feature_select_strategy == processor.vision_feature_select_strategy == ("default" if extra else "full")
    assert (processor.patch_size, processor.num_additional_image_tokens, config.image_seq_length) == (14, extra, patches)
    assert sorted(made.generation_config.eos_token_id) == sorted([processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id])
    assert config.mmft == {"modules_to_save": ["multi_modal_projector"], "new_rows": [rows]}
    assert json.loads((out / "assembly.json").read_text(encoding="utf-8"))["checks"]["image_difference"] > 0


def test_a_spare_row_is_used_and_the_table_kept(mmft, tmp_path, parts):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    out = tmp_path / "made"
    code, _, err = mmft("assemble", f"llm={parts['untied']}", f"vision={parts['clip']}", f"out={out}", "dtype=bf16")
    assert code == 0, err
    made = AutoModelForImageTextToText.from_pretrained(out)
    llm = AutoModelForCausalLM.from_pretrained(parts["untied"], dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16 and made.config.image_token_id == llm.config.vocab_size - 7
    assert torch.equal(made.lm_head.weight, llm.lm_head.weight)
    assert torch.equal(made.get_input_embeddings().weight, llm.get_input_embeddings().weight)
    assert made.config.mmft["new_rows"] == []


@pytest.mark.parametrize("llm", ["llm", "untied"])
def test_the_template_says_what_the_language_models_own_says(mmft, tmp_path, parts, llm):
    from transformers import AutoProcessor, AutoTokenizer

    out = tmp_path / "made"
    assert mmft("assemble", f"llm={parts[llm]}", f"vision={parts['dinov2']}", f"out={out}", "check=false")[0] == 0
    processor = AutoProcessor.from_pretrained(out)
    words = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}  # noqa: E731
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([asked, words("assistant", "A cat."), words("user", "Sure?")], tokenize=False, add_generation_prompt=True)
    if llm == "llm":
        plain = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
        own = AutoTokenizer.from_pretrained(parts[llm])
        assert text == own.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert text == processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True), "plain texts still work"
    else:
        assert text == "User: <image>\nWhat?\nAssistant: A cat.<|im_end|>\nUser: Sure?\nAssistant: "


def test_the_result_trains_with_projector_and_new_row_and_its_adapter_brings_them_back(mmft, tmp_path, parts):
    from safetensors.torch import load_file

    out = tmp_path / "made"
    assert mmft("assemble", f"llm={parts['llm']}", f"vision={parts['dinov2']}", f"out={out}")[0] == 0
    run = tmp_path / "run"
    small = ["data.pictures=24", "data.splits.validation=6", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4",
             "generation.max_new_tokens=4", "logger=none", "model=llava"]  # fmt: skip
    code, text, err = mmft(*small, f"model.path={out}", f"run_dir={run}", "trainer.max_steps=3", "trainer.learning_rate=0.01")
    assert code == 0, err
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any("multi_modal_projector" in k for k in stored), "a random projector that is not trained stays random"
    assert any("trainable_tokens_delta" in k for k in stored), "the new row is trained and saved"
    before = load_file(out / "model.safetensors")["model.multi_modal_projector.linear_1.weight"]
    after = next(v for k, v in stored.items() if "multi_modal_projector.linear_1.weight" in k)
    assert not torch.equal(before, after)
    code, text, err = mmft("evaluate", f"run={run}")
    assert code == 0, err
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert f"{summary['eval_loss']:.3f}" in text


def test_the_two_stages_as_presets(mmft, tmp_path, parts):
    """Stage one trains the projector and nothing else; stage two starts from its model."""
    from safetensors.torch import load_file

    out = tmp_path / "made"
    assert mmft("assemble", f"llm={parts['llm']}", f"vision={parts['clip']}", f"out={out}", "check=false")[0] == 0
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["data=shapes", "data.pictures=24", "data.splits.validation=6", "trainer.max_steps=2", "trainer.per_device_train_batch_size=4",
             "generation.max_new_tokens=4", "logger=none"]  # fmt: skip
    code, _, err = mmft("experiment=llava_align", f"model.path={out}", f"run_dir={first}", *small)
    assert code == 0, err
    before, after = load_file(out / "model.safetensors"), {}
    for file in (first / "model").glob("*.safetensors"):
        after |= load_file(file)
    name = lambda k: k.replace("model.language_model", "language_model.model").replace("model.vision_tower", "vision_tower").replace(  # noqa: E731
        "model.multi_modal_projector", "multi_modal_projector")  # fmt: skip
    changed = {k for k, v in before.items() if not torch.equal(v, after[k] if k in after else after[name(k)])}
    assert changed == {f"model.multi_modal_projector.linear_{i}.{w}" for i in (1, 2) for w in ("weight", "bias")}

    code, _, err = mmft("experiment=llava_tune", f"model.path={first / 'model'}", f"run_dir={second}", *small)
    assert code == 0, err
    plan = json.loads((second / "lora_plan.json").read_text(encoding="utf-8"))
    rows = {r["part"]: r for r in plan["rows"]}
    assert rows["language"]["modules"] == 4 and rows["vision"]["trainable"] == 0  # q and v of two layers
    assert rows["connector"]["trainable"] == rows["connector"]["total"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"out": "."}, "exists already"),
        ({"llm": "./nowhere"}, "llm=./nowhere: no such folder"),
        ({"vision": "registers"}, "puts 5 tokens before its patches"),
        ({"vision": "llm"}, "vision="),
        ({"layer": "7"}, "has 3 hidden states"),
        ({"vision": "clip", "image_size": "70"}, "does not take"),
        ({"llm": "granite"}, "scaled or capped"),
        ({"llm": "biased"}, "bias"),
        ({"llm": "torn"}, "weights are missing"),
    ],
)
def test_parts_that_do_not_fit_are_one_line_and_leave_nothing(mmft, tmp_path, parts, change, expected):
    words = {"llm": "llm", "vision": "dinov2", "out": str(tmp_path / "made")} | change
    if words["llm"] == "granite":
        parts = parts | {"granite": language_model(tmp_path / "granite", kind="granite", logits_scaling=8.0)}
    elif words["llm"] == "biased":
        parts = parts | {"biased": language_model(tmp_path / "biased", kind="phi", tied=False)}
    elif words["llm"] == "torn":
        from safetensors.torch import load_file, save_file

        folder = language_model(tmp_path / "torn")
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        parts = parts | {"torn": folder}
    code, _, err = mmft("assemble", *(f"{k}={parts.get(v, v)}" for k, v in words.items()))
    assert code == 2 and expected in err and "Traceback" not in err and err.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if "made" in p.name]


def test_shards_hold_one_piece_each_and_an_index(tmp_path):
    from mmft.common.safetensors_writer import Shards

    shards = Shards(tmp_path, shard=1000)
    for i in range(5):
        shards.add(f"t{i}", torch.full((100,), float(i)))  # 400 bytes: two a file
    shards.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 2000 and sorted(index["weight_map"]) == [f"t{i}" for i in range(5)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
