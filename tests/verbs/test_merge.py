"""merge through the command line: every family, every kind of adapter, quantised bases, uploads, and what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub
from small_models import GROUP

QUICK = ["trainer.max_steps=1", "trainer.learning_rate=0.01", "trainer.warmup_steps=0", "trainer.per_device_train_batch_size=2", "logger=none", "evaluation.base=false", "evaluation.samples=0",
         "generation.max_new_tokens=3", "lora.init_lora_weights=false", "lora.lora_alpha=64", "lora.r=4"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where this file's runs lie; they share the prepared data."""
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def rows(place, small):
    """A table of three pictures and three captions."""
    file = place / "rows.csv"
    file.write_text("image,text\n" + "".join(f"{small.root.as_posix()}/{i}.png,a red square and {i} birds\n" for i in range(3)), encoding="utf-8")
    return ["data=table", f"data.path={file.as_posix()}", "data.columns.image=image", "data.columns.text=text", f"data.root={small.root.as_posix()}", "data.splits.validation=0"]


@pytest.fixture(scope="module")
def trained(place, small, rows):
    """trained("llava", "lora.use_dora=true") -> a run of one step on that small random model."""
    from mmft.cli.main import main

    def train(kind: str, *words: str, name: str) -> Path:
        run = place / name
        words = [*QUICK, *rows, "evaluation.split=null", f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "model.processor={}", *words]
        assert main([*words, f"output_dir={place.as_posix()}", f"run_dir={run.as_posix()}"]) == 0
        return run

    return train


@pytest.fixture(scope="module")
def tiny(place):
    """A run of the built-in model with held-out rows."""
    from mmft.cli.main import main

    words = [*QUICK, "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2", f"output_dir={place.as_posix()}"]
    assert main([*words, f"run_dir={(place / 'tiny').as_posix()}"]) == 0
    return place / "tiny"


@pytest.fixture
def merge(mmft, place):
    def command(run: Path, *words: str):
        return mmft("merge", f"run={run.as_posix()}", *words, f"output_dir={place.as_posix()}", output_dir=False)

    return command


def facts(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text(encoding="utf-8"))


def logits(model, processor, picture: Path):
    from PIL import Image

    text = "a red square"
    if getattr(processor, "chat_template", None):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = processor.apply_chat_template([user], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def plain(folder: Path, adapter: Path | None = None):
    """Loaded by transformers (and peft) alone."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def test_the_built_in_default_with_its_held_out_rows(merge, tiny, tmp_path):
    out = tmp_path / "a" / "merged"
    code, text, err = merge(tiny, f"out={out.as_posix()}")
    assert code == 0, err
    got = facts(out)
    held = [json.loads(line)["id"] for line in (tiny / "eval/tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    assert got["rows"][:2] == held and got["largest_difference"] <= got["tolerance"] < got["adapter_moves_logits_by"] / 10
    assert "largest difference" in text and f"{got['largest_difference']:.3g}" in text
    names = {p.name for p in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja", "model.safetensors", "README.md", "merge.json"}  # fmt: skip
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["max_new_tokens"] == 3
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "merged in float32" in card
    record = json.loads((tiny / "verbs.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert record["verb"] == "merge" and record["wrote"] == [out.resolve().as_posix()]
    assert [p.name for p in out.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("kind, words", [
    ("qwen2vl", ["lora.use_rslora=true", "lora.modules_to_save=[lm_head]"]),  # the head is tied to the token table
    ("qwen2_5vl", ["lora.target_modules=[q_proj,lm_head]"]),  # so is this one, with an adapter on it
    ("llava", ["lora.use_dora=true", "lora.modules_to_save=[multi_modal_projector]"]),
    pytest.param("llava_vicuna", ["lora.bias=lora_only"], marks=pytest.mark.long),
    ("blip2", ["lora.scope=all"]),
    pytest.param("smolvlm", [], marks=pytest.mark.long),
    pytest.param("gemma3", ["model.dtype=bf16"], marks=pytest.mark.long),
    pytest.param("internvl", ["lora.scope=all", "lora.rank_pattern={q_proj: 2}"], marks=pytest.mark.long),
])  # fmt: skip
def test_every_family_and_kind_of_adapter(merge, trained, small, kind, words):
    """Merged and adapter, both loaded without mmft, on a picture and a text that merging did not look at."""
    from transformers import AutoProcessor

    run = trained(kind, *words, name=kind)
    code, text, err = merge(run, "samples=2")
    assert code == 0, err
    out = run / "merged"
    processor = AutoProcessor.from_pretrained(out)
    picture = small.root / "2.png"
    a, b, base = (logits(plain(*where), processor, picture) for where in ((out,), (small(kind), run / "adapter"), (small(kind),)))
    moved = float((b - base).abs().max())
    assert moved > 0.3, "an adapter that does nothing would prove nothing"
    assert float((a - b).abs().max()) < (0.2 * moved if "model.dtype=bf16" in words else 5e-4 * float(b.abs().max()))
    if any("lm_head" in w for w in words):
        model = plain(out)
        assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
        assert torch.equal(model.get_input_embeddings().weight, plain(small(kind)).get_input_embeddings().weight)


@pytest.mark.parametrize("kind, quantization", [
    ("qwen2vl", "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: float32}"),
    ("llava", "{load_in_8bit: true}"),
])  # fmt: skip
@pytest.mark.long
def test_a_quantised_base_is_dequantised_and_the_difference_said(merge, trained, small, kind, quantization):
    run = trained(kind, f"model.quantization={quantization}", name=f"{kind}-quantised")
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        code, text, err = merge(run, "samples=2")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert code == 0 and not [line for line in said if "dequantized" in line], err
    got = facts(run / "merged")
    assert got["quantised_base"] == "dequantised" and got["largest_difference"] <= got["tolerance"]
    assert "the quantised run" in text and got["difference_to_the_quantised_run"] is not None
    assert "quantization_config" not in json.loads((run / "merged/config.json").read_text(encoding="utf-8"))
    code, text, err = merge(run, "samples=2", "base=original", f"out={(run / 'original').as_posix()}")
    assert code == 0, err
    if "4bit" in quantization:  # the weights alone are quantised: dequantised, they compute what the quantised run did
        assert got["difference_to_the_quantised_run"] < 1e-3 < facts(run / "original")["difference_to_the_quantised_run"]
    else:  # 8-bit rounds what flows through the layers too
        assert got["difference_to_the_quantised_run"] > 1e-3
    weights = [plain(run / name).get_input_embeddings().weight for name in ("merged", "original")]
    assert torch.equal(*weights), "the token table was never quantised"
    assert not plain(run / "merged").state_dict().keys() ^ plain(small(kind)).state_dict().keys()


def test_another_dtype_shards_and_more(merge, mmft, place, tmp_path):
    """Of a gentler adapter than `tiny`'s, whose logits half precision moves by more or less than is allowed, as rounding in training has it."""
    words = [*QUICK, "lora.lora_alpha=8", "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2"]
    assert mmft(*words, f"run_dir={(tmp_path / 'gentle').as_posix()}", f"output_dir={place.as_posix()}", output_dir=False)[0] == 0
    out = tmp_path / "half"
    code, _, err = merge(tmp_path / "gentle", f"out={out.as_posix()}", "dtype=bf16", "max_shard_size=1MB", "samples=1")
    assert code == 0, err
    assert len(list(out.glob("model-*.safetensors"))) >= 3 and (out / "model.safetensors.index.json").is_file()
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    got = facts(out)
    assert got["dtype"] == "bfloat16" and got["tolerance"] == pytest.approx(0.06 * got["largest_logit"])
    assert 1e-3 < got["largest_difference"] < got["tolerance"]


def test_a_dtype_that_rounds_the_adapter_away_is_said():
    from mmft.export.merge_check import facts_table

    facts = {"architecture": "A", "dtype": "bfloat16", "answer_tokens": 3, "rows": ["a"], "largest_logit": 9.0, "tolerance": 0.5, "quantised_base": None}
    assert "dtype=fp32" in facts_table(Path("x"), {**facts, "largest_difference": 0.3, "adapter_moves_logits_by": 0.4})["beware"]
    assert "beware" not in facts_table(Path("x"), {**facts, "largest_difference": 0.1, "adapter_moves_logits_by": 0.4})


# --- what goes wrong ----------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_merge_that_lost_the_adapter_is_an_error_and_nothing_stays(merge, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.adapters.merge.merge_adapter", lambda model: model.unload())
    code, _, err = merge(tiny, f"out={(tmp_path / 'out').as_posix()}", "samples=2")
    assert code == 2 and "the merged model is not the adapter" in err and err.count("\n") == 1
    assert left(tmp_path) == []
    code, _, err = merge(tiny, f"out={(tmp_path / 'out').as_posix()}", "samples=2", "tolerance=1000")
    assert code == 0, "a tolerance of one's own is taken at its word"


def test_a_processor_that_changed_on_the_way_is_an_error(merge, tiny, tmp_path, monkeypatch):
    from mmft.export import merge_check as merging

    def reload(*words):
        model, processor = real(*words)
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
        return model, processor

    real = merging.load_plain
    monkeypatch.setattr("mmft.export.merge_check.load_plain", reload)
    code, _, err = merge(tiny, f"out={(tmp_path / 'out').as_posix()}", "samples=1")
    assert code == 2 and "pixel_values differs" in err and left(tmp_path) == []


@pytest.mark.parametrize("words, expected", [
    (["out=OUT/there"], "exists already"),
    (["base=orignal"], "Did you mean original?"),
    (["dtype=bf32"], "no such dtype"),
    (["samples=0"], "at least one row"),
    (["checkpoint=7"], "no such checkpoint"),
    (["model=qwen2vl"], "brings its own model"),
    (["push=name"], "organisation/name"),
    (["push=a/b", "hub=modelscop"], "Did you mean modelscope?"),
    (["push=a/b"], "HF_HUB_OFFLINE"),
    (["outt=x"], "no such key"),
])  # fmt: skip
def test_a_wrong_command_is_one_line_and_writes_nothing(merge, tiny, tmp_path, words, expected):
    (tmp_path / "there").mkdir()
    if not words[0].startswith("out="):
        words = [*words, f"out={(tmp_path / 'new').as_posix()}"]
    code, _, err = merge(tiny, *(w.replace("OUT", tmp_path.as_posix()) for w in words))
    assert code == 2 and expected in err and err.count("\n") == 1 and left(tmp_path) == ["there"]


def test_a_run_that_cannot_be_opened_is_one_line_and_writes_nothing(merge, tiny, trained, small, tmp_path):
    from safetensors.torch import load_file, save_file

    def refused(run: Path, expected: str) -> None:
        code, _, err = merge(run, "samples=1")
        assert code == 2 and expected in err and err.count("\n") == 1, err
        assert not (run / "merged").exists() and not [n for n in left(run) if n.startswith(".")]

    run = Path(shutil.copytree(tiny, tmp_path / "run", ignore=shutil.ignore_patterns("merged")))
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    key = sorted(weights)[0]
    save_file({(k.replace("q_proj", "q_prj") if k == key else k): v for k, v in weights.items()} | {"more": torch.zeros(1)}, file)
    refused(run, "do not fit the base model")
    file.unlink()
    refused(run, "cannot be read")
    save_file(weights, file)
    snapshot = (run / "snapshot.yaml").read_text(encoding="utf-8")
    (run / "snapshot.yaml").write_text(snapshot.replace("path: mmft:tiny", f"path: {small('qwen2vl').as_posix()}"), encoding="utf-8")
    refused(run, "is not what it was trained on")
    (run / "snapshot.yaml").write_text(snapshot.replace("path: mmft:tiny", "path: ./moved"), encoding="utf-8")
    refused(run, "model.path=./moved: no such folder")
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    refused(run, "this run is unfinished")
    (run / "model").mkdir()
    refused(run, "nothing to merge")


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_name, words", [("huggingface", []), ("modelscope", ["private=false"])])
@pytest.mark.long
def test_push_to_either_hub(tiny, place, tmp_path, hub_name, words):
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path), "HF_TOKEN": "hf_secret", "MODELSCOPE_API_TOKEN": "ms_secret"}
        out = tmp_path / "out"
        command = [sys.executable, "-m", "mmft", "merge", f"run={tiny.as_posix()}", f"out={out.as_posix()}", "samples=1", "push=me/birds",
                   f"hub={hub_name}", *words, f"output_dir={place.as_posix()}"]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "me/birds" in done.stdout and "secret" not in done.stdout + done.stderr
        assert hub.uploads["me/birds"]["private"] is (not words), "private unless asked otherwise"
        sent = hub.repos["models", "me/birds"]
        assert {n: d for n, d in sent.items() if n != ".gitattributes"} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_push_that_is_refused_keeps_the_merged_model_and_says_how_to_go_on(tmp_path):
    """The same functions that merge calls, in a process of their own: the clients read their endpoint when imported."""
    code = (
        "import sys; from pathlib import Path; from mmft.export import publish; from mmft.common.errors import UserError\n"
        "try: publish.check('me/taken', sys.argv[1]); publish.push(Path(sys.argv[2]), sys.argv[3], sys.argv[1], True)\n"
        "except UserError as error: print(error)"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\n---\n", encoding="utf-8")

    def said(hub: Hub, *words: str, **tokens: str) -> str:
        environment = {**os.environ, **hub.environment(tmp_path), **tokens}
        return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=100).stdout.splitlines()[-1]

    with Hub() as hub:
        hub.add("models", "me/taken", {"x": "y"})
        assert "exists already" in said(hub, "huggingface", str(folder), "me/taken", HF_TOKEN="t")
        assert "exists already" in said(hub, "modelscope", str(folder), "me/taken", MODELSCOPE_API_TOKEN="t")
        assert hub.repos["models", "me/taken"] == {"x": b"y"}
        assert "nobody is logged in" in said(hub, "huggingface", str(folder), "me/new")
        hub.refuse = "/commit/"
        answer = said(hub, "huggingface", str(folder), "me/new", HF_TOKEN="t")
        assert "complete in" in answer and "hf upload me/new" in answer
