"""`mmft` on the built-in model: the files of a run, the loss, and settings that are refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SMALL = ["data.pictures=48", "trainer.per_device_train_batch_size=8", "data.splits.validation=8", "trainer.max_steps=4", "trainer.logging_steps=1", "evaluation.samples=2",
         "generation.max_new_tokens=12"]  # fmt: skip


def run_in(tmp_path: Path) -> Path:
    (run,) = [p for p in (tmp_path / "outputs").iterdir() if p.name != "data"]
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small default run, shared by the tests of its files."""
    from mmft.cli.main import main

    tmp_path = tmp_path_factory.mktemp("default")
    words = [*SMALL, "evaluation.sample_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.adam_beta2=0.98"]
    assert main([*words, f"output_dir={(tmp_path / 'outputs').as_posix()}"]) == 0
    return run_in(tmp_path)


def test_a_run_writes_all_its_files(finished):
    names = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert names >= {
        "snapshot.yaml", "overrides.txt", "env.json", "summary.json", "lora_plan.json", "metrics.jsonl", "loss_curve.png", "report.html",
        "DONE", "eval/base.jsonl", "eval/tuned.jsonl", "eval/samples.jsonl", "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json", "adapter/processor_config.json", "adapter/tokenizer.json", "adapter/generation_config.json",
    }  # fmt: skip
    assert not [n for n in names if "/." in f"/{n}"], "temporary files were left behind"


def test_the_summary_has_all_keys(finished):
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    metrics = {"exact_match", "exact_match_normalized", "contains", "token_f1", "vqa_accuracy", "bleu4", "rouge_l", "cider"}
    assert set(summary) >= {
        "status", "name", "seconds", "steps", "samples_per_second", "train_loss", "eval_loss", "metrics", "base_metrics",
        "trainable_parameters", "total_parameters", "peak_memory_mb", "supervised_tokens", "effective_batch_size", "seed",
    }  # fmt: skip
    assert summary["status"] == "finished" and summary["steps"] == 4 and summary["seed"] == 42
    assert summary["effective_batch_size"] == 8 and summary["held_out_samples"] == 8
    assert set(summary["metrics"]) == metrics == set(summary["base_metrics"])
    assert summary["train_loss"]["last"] != summary["train_loss"]["first"]
    assert 0 < summary["peak_memory_mb"] < 3000


def test_supervised_tokens_are_those_of_the_answers(finished):
    """Counted again from the text alone: the answer's tokens and one end token for each row trained on."""
    from transformers import AutoTokenizer

    from mmft.data.prepared import PreparedData

    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    env = json.loads((finished / "env.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    rows = PreparedData(Path(env["data"]["path"])).split("train")
    counts = [len(tokenizer(rows[i].answer_text)["input_ids"]) + 1 for i in range(len(rows))]
    assert len(rows) == 40
    # 4 steps of 8 of the 40 rows: between the 32 shortest and the 32 longest
    assert sum(sorted(counts)[:32]) <= summary["supervised_tokens"] <= sum(sorted(counts)[-32:])


def test_the_metrics_file_has_each_step_once(finished):
    rows = lines(finished / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "eval_loss" in r] == [2, 4]
    assert all(math.isfinite(r["loss"]) for r in rows if "loss" in r)


def test_snapshot_overrides_and_environment_describe_the_run(finished):
    snapshot = yaml.safe_load((finished / "snapshot.yaml").read_text(encoding="utf-8"))
    assert snapshot["trainer"]["adam_beta2"] == 0.98 and snapshot["data"]["pictures"] == 48
    words = (finished / "overrides.txt").read_text(encoding="utf-8").split("\n")
    assert "trainer.adam_beta2=0.98" in words and not any(w.startswith("+") for w in words)
    env = json.loads((finished / "env.json").read_text(encoding="utf-8"))
    assert env["model"]["revision"].startswith("sha256:") and len(env["data"]["fingerprint"]) == 64
    assert env["packages"]["transformers"] and env["hardware"]["cores"]


def test_held_out_rows_share_no_image_with_training(finished):
    from mmft.data.prepared import PreparedData

    env = json.loads((finished / "env.json").read_text(encoding="utf-8"))
    prepared = PreparedData(Path(env["data"]["path"]))
    train, held = ({h for i in range(len(s)) for h in s[i].sha256} for s in (prepared.split("train"), prepared.split("validation")))
    assert len(held) == 8 and not train & held
    assert {r["id"] for r in lines(finished / "eval/tuned.jsonl")} == {prepared.split("validation")[i].id for i in range(8)}


def test_the_adapter_loads_with_plain_peft_and_gives_the_measured_loss(finished):
    """Plain transformers and peft, labels made here from the text: the loss must be the summary's eval_loss."""
    import torch
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = json.loads((finished / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished / "adapter").eval()
    processor = AutoProcessor.from_pretrained(finished / "adapter")
    end = processor.tokenizer("<|im_end|>")["input_ids"]
    total = count = 0
    for row in lines(finished / "eval/tuned.jsonl"):
        image = Image.open(Path(row["root"], row["images"][0])).convert("RGB")
        user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": row["prompt"]}]}
        inputs = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        answer = torch.tensor([processor.tokenizer(row["references"][0])["input_ids"] + end])
        n = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
        with torch.no_grad():
            logits = model(**inputs).logits[0, n - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
        count += answer.shape[1]
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.long
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(mmft, tmp_path):
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = tmp_path / name
        code, _, err = mmft(*SMALL, f"seed={seed}", f"run_dir={run.as_posix()}", "logger=none", "evaluation.split=null")
        assert code == 0, err
        losses[name] = [r["loss"] for r in lines(run / "metrics.jsonl") if "loss" in r]
    assert losses["a"] == losses["b"] != losses["c"]


def test_a_failed_run_says_why_and_has_no_done(mmft, tmp_path):
    code, _, err = mmft(*SMALL, "trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.warmup_steps=0", "logger=none", "evaluation.base=false")
    run = run_in(tmp_path)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert code == 2 and "is not finite" in err and "shape-" in err and "Traceback" not in err
    assert summary["status"] == "failed" and "not finite" in summary["reason"]
    assert not (run / "DONE").exists() and not (run / "adapter").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["model.path=./nowhere"], "model.path=./nowhere: no such folder"),
        (["model.path=mmft:tini"], "Did you mean tiny?"),
        (["model.device=cudaa"], "Did you mean cuda?"),
        (["model.dtype=bf32"], "no such dtype"),
        (["model.hub=hugging", "model.path=a/b"], "Did you mean huggingface?"),
        (["lora.target_modules=[q_prog]"], "Did you mean q_proj?"),
        (["lora.scope=lang"], "Did you mean language?"),
        (["lora.target_modules=[qkv]"], "lies only in the vision part"),
        (["evaluation.split=test"], "data.splits.test=0.1"),
        (["data.splits.validation=0"], "evaluation.split=null"),
        (["trainer.eval_strategy=sometimes"], "trainer:"),
        (["trainer.early_stopping_patience=2"], "load_best_model_at_end"),
        (["data=table", "data.path=nowhere.csv"], "nowhere.csv"),
        (["model.processor.max_pixel=5"], "Did you mean max_pixels?"),
        (["run_dir=."], "exists already"),
    ],
)
def test_a_wrong_setting_is_one_line_and_writes_nothing(mmft, tmp_path, words, expected):
    small = [] if words[0].startswith("data=") else SMALL
    code, _, err = mmft(*small, *words)
    assert code == 2 and expected in err and "Traceback" not in err
    left = [p.name for p in (tmp_path / "outputs").glob("*")] if (tmp_path / "outputs").exists() else []
    assert all(name == "data" or (tmp_path / "outputs" / name / "summary.json").exists() for name in left)


def test_best_checkpoint_and_early_stopping_by_arguments_of_the_trainer(mmft, tmp_path):
    words = ["trainer.max_steps=30", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1",
             "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss", "trainer.early_stopping_patience=2",
             "trainer.learning_rate=0.2", "trainer.warmup_steps=0", "logger=none", "evaluation.base=false"]  # fmt: skip
    code, out, err = mmft(*SMALL, *words)
    assert code == 0, err
    run = run_in(tmp_path)
    rows = lines(run / "metrics.jsonl")
    evals = [r["eval_loss"] for r in rows if "eval_loss" in r]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] < 30, "a learning rate of 0.2 makes every evaluation worse, so it must stop early"
    assert summary["eval_loss"] == pytest.approx(min(evals), abs=1e-6), "the best adapter is the one that is saved and measured"


def test_a_sweep_names_its_runs_by_the_words_that_differ(mmft, tmp_path):
    code, out, err = mmft("-m", "lora.r=2,4", *SMALL, "trainer.max_steps=1", "logger=none", "evaluation.split=null")
    assert code == 0, err
    runs = sorted(p.parent for p in (tmp_path / "outputs" / "sweeps").rglob("DONE"))
    assert [r.name for r in runs] == ["lora.r-2", "lora.r-4"]
    ranks = [json.loads((r / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["r"] for r in runs]
    assert ranks == [2, 4]


def test_a_run_writes_nothing_to_stderr(tmp_path):
    """No line of a library, at exit neither. In a process of its own, as a user starts it."""
    words = ["data.pictures=24", "data.splits.validation=8", "trainer.max_steps=3", f"output_dir={tmp_path.as_posix()}"]
    done = subprocess.run([sys.executable, "-m", "mmft", *words], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]


@pytest.mark.long
def test_nor_does_a_sweep_in_several_processes(tmp_path):
    words = ["-m", "lora.r=2,4", "data.pictures=24", "data.splits.validation=8", "trainer.max_steps=3", f"output_dir={tmp_path.as_posix()}"]
    done = subprocess.run([sys.executable, "-m", "mmft", *words], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
