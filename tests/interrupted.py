"""A small run of six steps, and what tests of stopped runs need: a killed copy of it, damaged files, and its results without the clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from places import ROOT

SMALL = ["data.pictures=22", "data.splits.validation=2", "trainer.max_steps=6", "trainer.logging_steps=2", "trainer.per_device_train_batch_size=4",
         "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=10", "lora.lora_dropout=0.2", "evaluation.base=false",
         "generation.max_new_tokens=2", "logger=none"]  # fmt: skip


def final(run: Path) -> bytes:
    """The saved adapter."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without the values that depend on the clock."""
    clock = ("seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a SIGKILL right after `step` would have left it, with a torn log row of a step that was not saved."""
    shutil.copytree(run, copy)
    for name in ("DONE", "summary.json", "report.html", "report.md", "loss_curve.png"):
        (copy / name).unlink()
    shutil.rmtree(copy / "adapter")
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')
    return copy


def assert_resumes(mmft, whole: Path, step: int, copy: Path, *words: str) -> Path:
    """A run that was killed after `step` ends with the adapter and the log of the whole run. words: more of them for the command. Returns the copy."""
    run = killed_after(whole, step, copy)
    code, out, err = mmft("resume", f"run={run.as_posix()}", *words, output_dir=False)
    assert code == 0 and f"from step {step}" in out, err
    assert final(run) == final(whole) and rows(run) == rows(whole)
    return run


def assert_resumes_and_reproduces(mmft, whole: Path, folder: Path) -> None:
    """The same bytes after a kill at step 3, and from the snapshot. whole: lies in its output_dir."""
    home = f"output_dir={whole.parent.as_posix()}"
    assert_resumes(mmft, whole, 3, folder / "run", home)
    code, out, err = mmft("reproduce", f"run={whole.as_posix()}", f"run_dir={(folder / 'again').as_posix()}", home, output_dir=False)
    assert code == 0 and "identical to the bit" in out, err


FAULTS = ("deleted", "truncated", "zeroed", "flipped")


def harm(path: Path, fault: str) -> None:
    """Damage a file in one of the ways of FAULTS."""
    data = bytearray(path.read_bytes())
    if fault == "deleted":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[len(data) // 3] ^= 4
        path.write_bytes(data)


def start(run: Path, out: Path, *words: str) -> subprocess.Popen:
    """`mmft SMALL WORDS` in a process of its own, with as many threads as this one: with more, sums round otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "mmft", *SMALL, *words, f"output_dir={out.as_posix()}", f"run_dir={run.as_posix()}"], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the path exists or the process has ended, at most two minutes."""
    for _ in range(1200):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.1)
