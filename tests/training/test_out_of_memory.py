"""Real out-of-memory errors of a process with limited address space: the run goes on, or says what to change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import SMALL, rows
from places import ROOT

WORDS = ["data.pictures=600", "data.splits.validation=2", "trainer.max_steps=5", "trainer.logging_steps=1", "trainer.save_strategy=no", "evaluation.base=false",
         "generation.max_new_tokens=2", "logger=none", "lora.lora_dropout=0", "vision_cache=off", "audit=false", "trainer.per_device_train_batch_size=256"]  # fmt: skip


def limited(megabytes: int, run: Path, *words: str) -> tuple[int, str, int]:
    """(exit code, output, peak in MB above the memory at its third step) of a training limited from that step on."""
    # pages are returned at once, so that the limit bounds the memory in use
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/limited.py", str(megabytes), "2", *WORDS, *words, f"output_dir={(run.parent / 'o').as_posix()}", f"run_dir={run.as_posix()}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    return done.returncode, said, int(re.search(r"PEAK (-?\d+)", said)[1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_real_allocator_failure_halves_the_micro_batch(tmp_path):
    code, said, peak = limited(0, tmp_path / "whole")
    assert code == 0 and peak > 300, said[-2000:]
    code, said, _ = limited(peak * 3 // 5, tmp_path / "run")
    assert code == 0 and "micro-batches of 128 rows from here on, 2 a step" in said, said[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    first, *more = summary["out_of_memory"]
    print(f"\nsteps of 256 rows took at most {peak} MB; with {peak * 3 // 5} MB: {summary['out_of_memory']}")
    assert first["step"] >= 3 and first["per_device_train_batch_size"] == 128 and first["gradient_accumulation_steps"] == 2 and len(more) <= 1
    assert summary["times"]["train"] < summary["seconds"], "no second counts twice"
    assert summary["effective_batch_size"] == 256 and summary["steps"] == 5
    losses, others = ([r["loss"] for r in rows(tmp_path / name) if "loss" in r] for name in ("run", "whole"))
    assert len(losses) == 5 and losses == pytest.approx(others, abs=1e-3), "the same rows in every step"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_run_that_no_halving_helps_stops_and_says_what_to_change(tmp_path):
    code, said, _ = limited(3, tmp_path / "run")
    assert code == 2 and "Traceback" not in said, said[-3000:]
    last = next(line for line in said.splitlines() if line.startswith("mmft: "))
    assert "out of memory" in last and "trainer.gradient_checkpointing=true" in last and "trainer.per_device_train_batch_size" in last


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 35184372088832 bytes."


def test_out_of_memory_errors_are_recognised():
    import torch

    from mmft.system.memory import is_out_of_memory

    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(real.value) and is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(None)


@pytest.mark.parametrize("where, said", [
    ("update", "out of memory in the update of step 3: a smaller micro-batch would not help; try trainer.optim=adamw_bnb_8bit"),
    ("measure", "out of memory while measuring after step 3: try a smaller trainer.per_device_eval_batch_size"),
    ("load", "out of memory (" ),
])  # fmt: skip
def test_errors_that_smaller_micro_batches_cannot_help_say_what_would(mmft, tmp_path, monkeypatch, where, said):
    """During the optimizer's update half of the weights may be updated already: the run must not go on from them."""
    import torch

    from mmft.evaluation import evaluate
    from mmft.models import load

    def fails(*_, **__):
        raise RuntimeError(ALLOCATOR)

    if where == "load":
        monkeypatch.setattr(load, "_read_weights", fails)
    elif where == "measure":
        monkeypatch.setattr(evaluate, "sequence_losses", fails)
    else:
        step, calls = torch.optim.AdamW.step, []
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: fails() if len(calls) == 2 else calls.append(1) or step(self, *a, **k))
    run = tmp_path / "run"
    code, _, err = mmft(*SMALL, "trainer.eval_strategy=steps", "trainer.eval_steps=3", f"run_dir={run.as_posix()}")
    assert code == 2 and said in err and len(err.strip().splitlines()) <= 4, err
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "failed"
    if where == "update":
        monkeypatch.undo()
        assert sorted(p.name for p in (run / "checkpoints").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
