"""merge export=: quantised models against plain bitsandbytes, and GGUF through a stand-in for llama.cpp's converter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


@pytest.fixture
def merge(verb, tmp_path, monkeypatch):
    monkeypatch.delenv("MMFT_LLAMA_CPP", raising=False)
    return lambda *words: verb("merge", f"out={tmp_path / 'merged'}", "samples=3", *words)


@pytest.mark.parametrize("kind, plain", [("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}), ("int8", {"load_in_8bit": True})])
def test_it_is_what_bitsandbytes_makes_of_the_merged_model(merge, tmp_path, trained, kind, plain):
    """Logits of the saved folder equal those of the merged folder quantised by transformers alone; the sizes are those of the files."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    code, out, err = merge(f"export=[{kind}]")
    assert code == 0 and err == "", err
    folder = tmp_path / f"merged-{kind}"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert plain.items() <= config["quantization_config"].items() and (folder / "chat_template.jinja").is_file()
    record = json.loads((folder / "quantised.json").read_text(encoding="utf-8"))
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (folder, tmp_path / "merged")]
    assert [record["bytes"], record["merged_bytes"]] == sizes and sizes[0] < sizes[1] and 0 <= record["same_likeliest_token"] <= 1
    assert f"{record['largest_difference']:.3g}" in " ".join(out.split()) and record["largest_difference"] > 0
    row = trained.lines("eval/tuned.jsonl")[0]
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(Path(row["root"], row["images"][0])).convert("RGB")], return_tensors="pt")
    asked = BitsAndBytesConfig(**plain, bnb_4bit_compute_dtype=torch.float32)
    with torch.no_grad():
        ours = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})(**inputs).logits
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32, quantization_config=asked, device_map={"": "cpu"})(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


CONVERTER = """import pathlib, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2])) if "--mmproj" not in sys.argv else {"--outfile": sys.argv[-1]}
assert (pathlib.Path(sys.argv[1]) / "config.json").is_file()
%s
pathlib.Path(arguments["--outfile"]).write_bytes(b"GGUF" + " ".join(sys.argv[2:]).encode())
"""


def converter(tmp_path: Path, middle: str = "") -> str:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER % middle, encoding="utf-8")
    return str(tmp_path / "llama.cpp")


def test_gguf_through_the_converter(merge, tmp_path, monkeypatch, trained):
    folder = converter(tmp_path)
    monkeypatch.setenv("MMFT_LLAMA_CPP", folder)
    from mmft.cli.main import main

    assert main(["merge", f"run={trained.run}", f"out={tmp_path / 'merged'}", "samples=1", "export=gguf", f"output_dir={trained.outputs}"]) == 0
    assert (tmp_path / "merged.gguf").read_bytes() == f"GGUF--outtype f32 --outfile {tmp_path / 'merged.gguf'}".encode()
    assert (tmp_path / "merged.mmproj.gguf").read_bytes() == f"GGUF--outtype f32 --mmproj --outfile {tmp_path / 'merged.mmproj.gguf'}".encode()


def test_gguf_without_a_checkout_says_the_commands(merge, tmp_path):
    code, out, err = merge("export=gguf")
    said = re.sub(r"\s+", " ", out)
    assert code == 0 and "python LLAMA_CPP/convert_hf_to_gguf.py" in said and "--mmproj" in said and not list(tmp_path.glob("*.gguf")) and (tmp_path / "merged").is_dir()


@pytest.mark.parametrize("middle, message", [("sys.exit('NotImplementedError: Architecture Odd not supported')", "Architecture Odd not supported"), ("sys.exit(0)", "it wrote no GGUF file")])
def test_a_converter_that_fails_keeps_the_merged_model(merge, tmp_path, monkeypatch, trained, capfd, middle, message):
    from mmft.cli.main import main

    monkeypatch.setenv("MMFT_LLAMA_CPP", converter(tmp_path, middle))
    code = main(["merge", f"run={trained.run}", f"out={tmp_path / 'merged'}", "samples=1", "export=gguf", f"output_dir={trained.outputs}"])
    err = capfd.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1 and (tmp_path / "merged" / "config.json").is_file() and not list(tmp_path.glob("*.gguf"))


def test_mistakes_are_one_line_before_weights_are_read(merge, tmp_path, monkeypatch, verb, trained):
    code, _, err = merge("export=gguff")
    assert code == 2 and "no such form. Did you mean gguf?" in err
    (tmp_path / "merged-nf4").mkdir()
    code, _, err = merge("export=[nf4]")
    assert code == 2 and "merged-nf4 exists already" in err and not (tmp_path / "merged").exists()
    monkeypatch.setenv("MMFT_LLAMA_CPP", str(tmp_path))
    code, _, err = verb("merge", f"out={tmp_path / 'other'}", "export=gguf")
    assert code == 2 and "holds no convert_hf_to_gguf.py" in err and not (tmp_path / "other").exists()
