"""Every family through the real command line with a small random model: train 2 steps, evaluate, reload with plain libraries."""

from __future__ import annotations

import csv
import json
import random

import pytest
import yaml
from small_models import GROUP, KINDS

from mmft.models.load import load_processor, locate_model

YAML_ONLY = ("qwen2_5vl", "qwen3vl", "smolvlm", "gemma3", "internvl", "llava_onevision")  # families that are a yaml file only


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Ten drawn pictures with a question and an answer each, as a CSV."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("drawn")
    rng = random.Random(0)
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        for n in range(10):
            name, colour = rng.choice(sorted(colours.items()))
            picture = Image.new("RGB", rng.choice([(56, 56), (84, 56), (112, 84)]), "white")
            at = rng.randrange(20)
            ImageDraw.Draw(picture).rectangle((at, at, at + 20 + n, at + 24), fill=colour)
            picture.save(folder / f"{n}.png")
            writer.writerow([f"{n}.png", "What is in the picture?", f"a {name} square"])
    return folder / "rows.csv"


def words(kind, small, drawn, *more):
    return (
        f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={drawn.as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 3}", "logger=none", "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.01", "trainer.warmup_steps=0", "trainer.logging_steps=1",
        "trainer.lr_scheduler_type=constant", "evaluation.batch_size=2", "generation.max_new_tokens=5", "name=small", *more,
    )  # fmt: skip


def run(mmft, tmp_path, *command):
    code, out, err = mmft(*command)
    assert code == 0, err[-2000:]
    folder = next(p for p in (tmp_path / "outputs").iterdir() if p.name != "data")
    assert (folder / "DONE").is_file()
    return folder, json.loads((folder / "summary.json").read_text(encoding="utf-8")), out


def plain_loss(model, collator, rows):
    """transformers' own loss of each row alone, weighted by its supervised tokens."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = {k: v for k, v in collator([row]).items() if k != "row_ids"}
            n = int((batch["labels"] != -100).sum())
            total, count = total + model(**batch, use_cache=False).loss.item() * n, count + n
    return total / count


def plain_answers(model, collator, rows, ends):
    import torch

    texts = []
    with torch.no_grad():
        for row in rows:
            prompt = collator.prompt([row])
            ids = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=ends, pad_token_id=collator.tokenizer.pad_token_id)
            texts += collator.decode(ids[:, prompt["input_ids"].shape[1] :])
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_train_two_steps_evaluate_reload(small, drawn, mmft, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    from mmft.data.prepared import PreparedData

    folder, summary, out = run(mmft, tmp_path, *words(kind, small, drawn, "lora.r=4"))
    if kind in YAML_ONLY:
        target = yaml.safe_load((folder / "snapshot.yaml").read_text(encoding="utf-8"))["model"]["_target_"]
        assert target in ("mmft.models.families.base.Family", "mmft.models.families.qwen2vl.Qwen2VL"), "no family module of its own"
    assert summary["status"] == "finished" and summary["steps"] == 2 and summary["effective_batch_size"] == 2
    assert summary["supervised_tokens"] == 2 * 2 * 4, "a, colour, square and the end, of two rows, twice"
    assert summary["eval_loss"] != summary["base_eval_loss"]
    plan = json.loads((folder / "lora_plan.json").read_text(encoding="utf-8"))
    assert {r["part"] for r in plan["rows"] if r["trainable"]} == {"language"}

    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    rows = [r for r in [PreparedData(environment["data"]["path"]).split("validation")[i] for i in range(3)]]
    processor = AutoProcessor.from_pretrained(folder / "adapter")
    collator = small.collator(kind)
    again = type(collator)(
        processor=processor, family=collator.family, model_config=collator.model_config, end_token_ids=collator.end_token_ids
    )
    base = AutoModelForImageTextToText.from_pretrained(small(kind)).eval()
    assert plain_loss(base, again, rows) == pytest.approx(summary["base_eval_loss"], abs=1e-5)
    tuned = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert plain_loss(tuned, again, rows) == pytest.approx(summary["eval_loss"], abs=1e-5)

    written = [json.loads(line) for line in (folder / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = GenerationConfig.from_pretrained(folder / "adapter").eos_token_id
    assert plain_answers(tuned, again, rows, ends) == [r["prediction"] for r in written], "a batch gives the same answers as single rows"
    assert any(r["prediction"] for r in written), "some answer is not empty"
    with tuned.disable_adapter():
        assert plain_loss(tuned, again, rows) == pytest.approx(summary["base_eval_loss"], abs=1e-5)


@pytest.mark.parametrize("mode", ["auto", "memory"])
def test_features_that_depend_on_the_other_images_of_a_row_are_not_cached(small, drawn, mmft, tmp_path, mode):
    """LLaVA-OneVision computes the same image differently alone and beside another one."""
    lines = [json.dumps({"image": f"{n}.png", "question": "What?", "answer": "a red square"}) for n in range(6)]
    lines += [json.dumps({"image": [f"{n}.png", f"{n + 1}.png"], "question": "Which?", "answer": "blue"}) for n in range(4)]
    (drawn.parent / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = words("llava_onevision", small, drawn.parent / "mixed.jsonl", "data.splits.validation=0", "evaluation.split=null", "trainer.max_steps=10")
    code, out, err = mmft(*command, f"vision_cache={mode}")
    if mode == "memory":
        assert code == 2 and "computes an image otherwise where its row has several; use vision_cache=off" in err
    else:
        assert code == 0, err
        assert "off: LlavaOnevisionForConditionalGeneration computes an image otherwise" in out


def test_full_training_saves_a_model_that_plain_transformers_loads(small, drawn, mmft, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmft.data.prepared import PreparedData

    folder, summary, _ = run(mmft, tmp_path, *words("llava", small, drawn, "lora=none", "trainer.learning_rate=0.001"))
    assert summary["trainable_parameters"] == summary["total_parameters"]
    assert not (folder / "adapter").exists()
    model, info = AutoModelForImageTextToText.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    data = PreparedData(environment["data"]["path"]).split("validation")
    collator = small.collator("llava")
    again = type(collator)(
        processor=AutoProcessor.from_pretrained(folder / "model"), family=collator.family, model_config=model.config,
        end_token_ids=collator.end_token_ids,
    )  # fmt: skip
    assert plain_loss(model.eval(), again, [data[i] for i in range(3)]) == pytest.approx(summary["eval_loss"], abs=1e-5)
    assert summary["eval_loss"] != summary["base_eval_loss"]


def test_the_projector_is_trained_with_the_adapter(small, drawn, mmft, tmp_path):
    """The LLaVA recipe: q and v of the language model, and the projector whole."""
    from safetensors.torch import load_file

    folder, _, _ = run(
        mmft, tmp_path,
        *words("llava", small, drawn, "lora.target_modules=[q_proj,v_proj]", "lora.modules_to_save=[multi_modal_projector]", "evaluation.split=null"),
    )  # fmt: skip
    saved, base = load_file(folder / "adapter" / "adapter_model.safetensors"), load_file(small("llava") / "model.safetensors")
    own = {k for k in saved if "multi_modal_projector" in k}
    assert len(own) == 4 and not any("vision_tower" in k for k in saved)
    for key in own:
        name = next(k for k in base if k.endswith(key.split("multi_modal_projector.")[1]) and "multi_modal_projector" in k)
        assert not saved[key].equal(base[name])


def test_a_projector_trained_in_a_bf16_base_can_be_evaluated_later(small, drawn, mmft, tmp_path):
    """The LLaVA recipe as on a GPU: an fp32 projector in a bf16 base, with autocast in training and without it in later verbs."""
    import torch
    from safetensors.torch import load_file

    folder, summary, _ = run(
        mmft, tmp_path,
        *words("llava", small, drawn, "model.dtype=bf16", "lora.target_modules=[q_proj,v_proj]", "lora.modules_to_save=[multi_modal_projector]"),
    )  # fmt: skip
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    whole = [v for k, v in saved.items() if "multi_modal_projector" in k and k.endswith("weight")]
    assert whole and not all(v.equal(v.to(torch.bfloat16).float()) for v in whole)  # fp32 values that bf16 cannot represent
    code, _, err = mmft("evaluate", f"run={folder.as_posix()}", "base=true")
    assert code == 0, err[-2000:]
    (file,) = (folder / "eval").glob("*_validation_*.json")
    again = json.loads(file.read_text(encoding="utf-8"))
    assert again["base_eval_loss"] == summary["base_eval_loss"] != summary["eval_loss"]
    assert again["eval_loss"] == pytest.approx(summary["eval_loss"], rel=2e-3)  # the run's own was measured under autocast


@pytest.mark.parametrize(
    ("bits", "line"),
    [("{load_in_4bit: true, bnb_4bit_quant_type: nf4}", r"4-bit base (nf4)"), ("{load_in_8bit: true}", "8-bit base")],
)
def test_quantised_bases_train_on_the_cpu(small, drawn, mmft, tmp_path, bits, line):
    folder, summary, out = run(mmft, tmp_path, *words("qwen2vl", small, drawn, f"model.quantization={bits}"))
    assert line in out
    assert summary["steps"] == 2 and summary["eval_loss"] != summary["base_eval_loss"]
    assert line in " ".join(json.loads((folder / "env.json").read_text(encoding="utf-8"))["notes"])


def test_without_bitsandbytes_the_run_says_so_and_loads_unquantised_weights(small, drawn, mmft, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder, summary, out = run(mmft, tmp_path, *words("qwen2vl", small, drawn, "model.quantization.load_in_8bit=true", "evaluation.split=null"))
    said = [text for text in out.splitlines() if "load_in_8bit" in text]
    assert len(said) == 1 and "is not possible here" in said[0] and "loading unquantised weights instead" in said[0]
    assert "8-bit base" not in out and summary["steps"] == 2


def test_image_limits_are_used_in_training_and_saved_with_the_adapter(small, drawn, mmft, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    limits = ("model.processor={min_pixels: 784, max_pixels: 3136}", "evaluation.split=null")
    folder, _, _ = run(mmft, tmp_path, *words("qwen2vl", small, drawn, *limits))
    again = AutoProcessor.from_pretrained(folder / "adapter")
    grid = again.image_processor([Image.new("RGB", (560, 560))], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert grid == [1, 4, 4], "3136 pixels are 56 x 56: 4 x 4 patches"
    family = small.family("qwen2vl", processor={"min_pixels": 784, "max_pixels": 3136})
    fresh = load_processor(family, locate_model(family))
    assert fresh.image_processor([Image.new("RGB", (560, 560))], return_tensors="pt")["image_grid_thw"][0].tolist() == grid


def test_rows_that_are_too_long_are_found_before_training(small, drawn, mmft, tmp_path):
    """A 112 x 84 picture gives 44 tokens; the first row, which is encoded when the model is loaded, has a smaller one."""
    code, _, err = mmft(*words("qwen2vl", small, drawn, "collator.max_length=41", "evaluation.split=null", "trainer.max_steps=20"))
    said = [line for line in err.splitlines() if line.startswith("mmft:")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err
    assert "rows are longer than collator.max_length=41" in said[0] and "(44 tokens)" in said[0] and "data.too_long=drop" in said[0]
    folder = next(p for p in (tmp_path / "outputs").iterdir() if p.name != "data")
    assert not (folder / "adapter").exists() and not (folder / "DONE").exists()
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"] == "failed"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_fails_while_training_is_one_line_and_leaves_no_adapter(small, drawn, mmft, tmp_path, monkeypatch, workers):
    """A picture whose file is damaged after the row check, which reads only its header."""
    import shutil

    from mmft.pipeline import check_rows

    drawn = shutil.copytree(drawn.parent, tmp_path / "drawn") / drawn.name  # other tests read the original
    whole = check_rows.scan

    def then_damage(collator, rows, progress=False):
        found = whole(collator, rows, progress)
        path = rows[len(rows) - 1].image_paths[0]
        path.write_bytes(path.read_bytes()[:-20])
        return found

    monkeypatch.setattr(check_rows, "scan", then_damage)
    settings = ("evaluation.split=null", "trainer.max_steps=20", f"trainer.dataloader_num_workers={workers}", "vision_cache=off")
    code, _, err = mmft(*words("qwen2vl", small, drawn, *settings))
    said = [line for line in err.splitlines() if line.startswith("mmft:")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err, err[-2000:]
    assert ".png" in said[0], "the file by its name"
    folder = next(p for p in (tmp_path / "outputs").iterdir() if p.name != "data")
    assert not (folder / "adapter").exists() and not (folder / "DONE").exists()
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"] == "failed"
