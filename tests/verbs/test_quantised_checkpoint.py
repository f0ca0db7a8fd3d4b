"""A base whose own files are quantised: treated as quantised by training, sweeps and every later verb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_models import GROUP

SHORT = ["model.processor={}", "logger=none", "trainer.max_steps=1", "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.01", "trainer.warmup_steps=0",
         "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2", "evaluation.samples=0", "generation.max_new_tokens=3",
         "lora.init_lora_weights=false", "lora.lora_alpha=16", "lora.r=2"]  # fmt: skip
BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small):
    """saved("qwen2vl", "nf4") -> a folder whose weights are saved quantised, as transformers saves them."""
    home = tmp_path_factory.mktemp("saved")

    def make(kind: str, bits: str) -> Path:
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

        folder = home / f"{kind}-{bits}"
        if not folder.is_dir():
            model = AutoModelForImageTextToText.from_pretrained(
                small(kind), quantization_config=BitsAndBytesConfig(**BITS[bits]), device_map={"": "cpu"}, dtype=torch.float32
            )
            shutil.copytree(small(kind), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def train(mmft, outputs, tmp_path):
    def command(kind: str, folder: Path, *words: str, name: str = "run"):
        run = tmp_path / name
        result = mmft(*SHORT, f"model={GROUP[kind]}", f"model.path={folder.as_posix()}", *words, f"run_dir={run.as_posix()}", f"output_dir={outputs.as_posix()}", output_dir=False)
        return run, *result

    return command


@pytest.mark.parametrize("kind, bits, line", [
    ("qwen2vl", "nf4", "4-bit base (nf4), as it was saved"),
    pytest.param("qwen2vl", "fp4", "4-bit base (fp4), as it was saved", marks=pytest.mark.long),
    pytest.param("qwen2_5vl", "nested", "4-bit base (nf4), as it was saved", marks=pytest.mark.long),
    ("llava", "int8", "8-bit base, as it was saved"),
    pytest.param("smolvlm", "nf4", "4-bit base (nf4), as it was saved", marks=pytest.mark.long),
])  # fmt: skip
def test_it_trains_and_merges_as_quantised(train, mmft, saved, outputs, kind, bits, line):
    """The merged model is that of the dequantised weights: compared with transformers' own dequantisation and peft."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = saved(kind, bits)
    run, code, out, err = train(kind, folder)
    assert code == 0, err
    assert line in out
    code, out, err = mmft("merge", f"run={run.as_posix()}", "samples=2", f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 0, err
    facts = json.loads((run / "merged/merge.json").read_text(encoding="utf-8"))
    assert facts["quantised_base"] == "dequantised" and facts["largest_difference"] <= facts["tolerance"]
    assert "quantization_config" not in json.loads((run / "merged/config.json").read_text(encoding="utf-8"))
    merged, info = AutoModelForImageTextToText.from_pretrained(run / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = AutoModelForImageTextToText.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32).dequantize(torch.float32)
    wanted = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    state = merged.state_dict()
    assert state.keys() == wanted.keys() and all(torch.allclose(state[k].float(), wanted[k].float(), atol=1e-5) for k in state)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_the_weights_that_are_not_quantised_are_prepared(small, saved, bits):
    """peft's preparation: no gradient in the base, and half-precision weights in fp32."""
    from small_models import family

    from mmft.models.load import load_model
    from mmft.models.quantization import prepare_for_training

    loaded = load_model(family("qwen2vl", saved("qwen2vl", bits), dtype="bf16"))
    assert loaded.quantized and loaded.quantization.bits == (4 if bits == "nf4" else 8) and loaded.quantization.saved
    assert any(p.dtype == torch.bfloat16 for p in loaded.model.parameters())
    model = prepare_for_training(loaded.model, loaded.quantization, {}, "x")
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.dtype == torch.bfloat16 for p in model.parameters() if type(p).__name__ != "Params4bit")


@pytest.mark.parametrize("bits", BITS)
def test_training_the_weights_themselves_is_refused_before_they_are_read(mmft, outputs, saved, monkeypatch, bits):
    import transformers

    folder = saved("qwen2vl", bits)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    words = [*SHORT[:-3], "lora=none", "model=qwen2vl", f"model.path={folder.as_posix()}", f"output_dir={outputs.as_posix()}"]
    code, _, err = mmft(*words, output_dir=False)
    assert code == 2 and "quantised weights cannot be trained" in err and "lora=default" in err, err


def test_other_bits_are_refused_and_the_same_bits_noted(train, saved):
    run, code, out, err = train("qwen2vl", saved("qwen2vl", "nf4"), "model.quantization.load_in_8bit=true")
    assert code == 2 and "saved in 4 bit (nf4), so model.quantization.load_in_8bit is not possible" in err
    run, code, out, err = train("qwen2vl", saved("qwen2vl", "nf4"), "model.quantization.load_in_4bit=true", name="same")
    assert code == 0 and "model.quantization has no effect" in out, err


def test_where_bitsandbytes_does_not_load_it_is_refused(train, saved, monkeypatch):
    import sys

    folder = saved("qwen2vl", "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    run, code, out, err = train("qwen2vl", folder)
    assert code == 2 and "which cannot be read here" in err and "unquantised checkpoint" in err


def test_there_is_no_original_to_merge_into(train, mmft, saved, outputs):
    run, code, _, err = train("qwen2vl", saved("qwen2vl", "nf4"))
    assert code == 0, err
    code, _, err = mmft("merge", f"run={run.as_posix()}", "samples=1", "base=original", f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 2 and "base=dequantised" in err and not (run / "merged").exists()


@pytest.mark.long
def test_points_of_a_sweep_do_not_share_it(mmft, saved, outputs, tmp_path):
    """Preparation changes the base in place: each point reads it again, and none is trained jointly. Each equals the run made alone."""
    folder = saved("qwen2vl", "nf4")
    words = [*SHORT, "model=qwen2vl", f"model.path={folder.as_posix()}", f"output_dir={outputs.as_posix()}"]
    code, out, err = mmft("-m", *words, "trainer.learning_rate=0.01,0.02", "name=saved-quantised", output_dir=False)
    assert code == 0, err
    points = [p.parent for p in (outputs / "sweeps/saved-quantised").glob("**/adapter")]
    assert len(points) == 2
    code, _, err = mmft(*words, "trainer.learning_rate=0.02", f"run_dir={(tmp_path / 'alone').as_posix()}", output_dir=False)
    assert code == 0, err
    alone = (tmp_path / "alone/adapter/adapter_model.safetensors").read_bytes()
    assert alone in [(p / "adapter/adapter_model.safetensors").read_bytes() for p in points]


def test_it_can_be_audited(mmft, saved, outputs, tmp_path):
    """With the estimate, which takes steps over the prepared base."""
    words = ["model=qwen2vl", "model.processor={}", f"model.path={saved('qwen2vl', 'nf4').as_posix()}", *SHORT[6:8], "generate=0", "gpu_memory_gb=24"]
    code, out, err = mmft("audit", *words, f"out={(tmp_path / 'page.html').as_posix()}", f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 0 and "GPU of 24 GB" in out, err


@pytest.mark.parametrize("values, bits, method", [
    ({"quant_method": "gptq", "bits": 4}, 4, "gptq"),
    ({"quant_method": "awq", "w_bit": 4}, 4, "awq"),
    ({"quant_method": "fp8"}, 8, "fp8"),
    ({"quant_method": "mxfp4"}, 4, "mxfp4"),
    ({"quant_method": "hqq", "bits": 3}, 3, "hqq"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 8, "bitsandbytes"),
    ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4, "bitsandbytes"),
    ({"load_in_8bit": True}, 8, "bitsandbytes"),
])  # fmt: skip
def test_every_way_of_saying_it_in_config_json(values, bits, method):
    from mmft.models.quantization import saved_quantization

    config = type("Config", (), {"quantization_config": values})()
    found = saved_quantization(config)
    assert (found.bits, found.method, found.saved) == (bits, method, True)
    assert saved_quantization(type("Config", (), {})()) is None
