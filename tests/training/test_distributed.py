"""One model trained by two processes (gloo, on the CPU): the losses of one process, one run directory, one writer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

WORDS = ["data.pictures=40", "data.splits.validation=6", "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.eval_strategy=steps",
         "trainer.eval_steps=2", "trainer.save_strategy=steps", "trainer.save_steps=3", "lora.lora_dropout=0", "evaluation.batch_size=4",
         "evaluation.samples=2", "evaluation.sample_steps=2", "generation.max_new_tokens=4", "logger=none", "model.device=cpu"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(tmp_path: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}", "-m", "mmft"]
    return subprocess.run([*launcher, *words, f"output_dir={tmp_path.as_posix()}"], capture_output=True, text=True, env=environment, timeout=280)


def logged(run: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.long
@pytest.mark.parametrize("words", [[], ["trainer.fsdp=full_shard", "trainer.fsdp_config={fsdp_version: 2}", "trainer.save_strategy=no"]], ids=["ddp", "fsdp"])
def test_two_processes_train_like_one_with_the_same_global_batch(mmft, tmp_path, words):
    from safetensors.torch import load_file

    out = tmp_path / "outputs"
    code, _, err = mmft(*WORDS, "trainer.per_device_train_batch_size=8", f"run_dir={(out / 'one').as_posix()}")
    assert code == 0, err
    done = torchrun(out, *WORDS, "trainer.per_device_train_batch_size=4", *words, "name=two")
    assert done.returncode == 0, done.stderr[-3000:]
    one = out / "one"
    (two,) = out.glob("*_two")  # one directory, named by the main process
    for key in ("loss", "eval_loss", "grad_norm"):
        a, b = logged(one, key), logged(two, key)
        assert len(a) == len(b) >= 2 and max(abs(x - y) for x, y in zip(a, b)) < 1e-5 * max(map(abs, a)), (key, a, b)
    first, second = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (one, two))
    for key in ("status", "steps", "supervised_tokens", "effective_batch_size", "trainable_parameters", "metrics", "held_out_samples"):
        assert first[key] == second[key], key
    assert abs(first["eval_loss"] - second["eval_loss"]) < 1e-4
    assert json.loads((two / "env.json").read_text(encoding="utf-8"))["placement"]["processes"] == 2
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and all(a[key].shape == b[key].shape and float((a[key] - b[key]).abs().max()) < 1e-4 for key in a)
    files = [{p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} for run in (one, two)]
    # beside what the Trainer writes for each process, exactly the files of a run on one
    assert {f for f in files[1] if not f.startswith("checkpoints/")} == {f for f in files[0] if not f.startswith("checkpoints/")}
    assert len((two / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert done.stdout.count("run directory") == 1  # only one process writes to stdout


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    from mmft.runs.directory import Run

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wrote in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        run = Run(tmp_path)
        run.write_json("summary.json", {"rank": rank})
        run.append_line("metrics.jsonl", {"rank": rank})
        assert (tmp_path / "summary.json").exists() is wrote and (tmp_path / "metrics.jsonl").exists() is wrote


def test_each_process_of_a_machine_uses_its_own_gpu(monkeypatch):
    import torch

    from mmft.models.device import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"


@pytest.mark.long
def test_two_processes_share_the_batches_that_are_filled_by_tokens(mmft, tmp_path):
    """Two batches a step, in one process one after another or in two processes: the rows of every step are the same, and so are its loss and weights."""
    from safetensors.torch import load_file

    words = ["data.pictures=40", "data.splits.validation=6", "evaluation.split=null", "trainer.num_train_epochs=2", "trainer.logging_steps=1", "lora.lora_dropout=0",
             "trainer.tokens_per_batch=180", "logger=none", "model.device=cpu"]  # fmt: skip
    out = tmp_path / "outputs"
    code, _, err = mmft(*words, "trainer.gradient_accumulation_steps=2", f"run_dir={(out / 'one').as_posix()}")
    assert code == 0, err
    done = torchrun(out, *words, "name=two")
    assert done.returncode == 0, done.stderr[-3000:]
    (two,) = out.glob("*_two")
    first, second = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (out / "one", two))
    for key in ("steps", "supervised_tokens", "effective_batch_size"):
        assert first[key] == second[key], key
    assert logged(two, "loss") == pytest.approx(logged(out / "one", "loss"), rel=1e-4)
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out / "one", two))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


@pytest.mark.long
def test_pairs_on_two_processes_are_those_of_one(mmft, tmp_path):
    """The mean is over all pairs of a step, and the logged rewards are of both processes."""
    from compared import draw, pairs
    from safetensors.torch import load_file

    drawn, out = draw(tmp_path / "drawn"), tmp_path / "outputs"
    words = ["objective=dpo", *pairs(drawn), "trainer.max_steps=2", "trainer.logging_steps=1", "trainer.optim=sgd", "trainer.learning_rate=1.0",
             "trainer.max_grad_norm=0", "lora.lora_dropout=0", "trainer.train_sampling_strategy=sequential", "model.device=cpu"]  # fmt: skip
    code, _, err = mmft(*words, "trainer.per_device_train_batch_size=4", f"run_dir={(out / 'one').as_posix()}")
    assert code == 0, err
    done = torchrun(out, *words, "trainer.per_device_train_batch_size=2", f"run_dir={(out / 'two').as_posix()}")
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "grad_norm", "reward_margin", "reward_accuracy"):
        assert logged(out / "one", key) == pytest.approx(logged(out / "two", key), abs=1e-5), key
    a, b = (load_file(out / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5 and max(float(a[key].abs().max()) for key in a if "lora_B" in key) > 1e-3
