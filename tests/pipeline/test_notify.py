"""The command of MMFT_NOTIFY at the end of a run."""

from __future__ import annotations

import json
import sys

import pytest

SMALL = ["trainer.max_steps=1", "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2", "evaluation.base=false", "generation.max_new_tokens=2", "logger=none"]


@pytest.fixture
def command(tmp_path):
    """A program that writes what it was told."""
    program = tmp_path / "tell it.py"
    program.write_text(f"import json, os, sys; open({str(tmp_path / 'told.json')!r}, 'w').write(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items() if k.startswith('MMFT_')}}]))", encoding="utf-8")
    return f"{sys.executable} '{program}' extra"


def test_it_is_told_how_a_run_ended(mmft, tmp_path, monkeypatch, command):
    monkeypatch.setenv("MMFT_NOTIFY", command)
    assert mmft(*SMALL, f"run_dir={tmp_path / 'good'}")[0] == 0
    words, facts = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    loss = json.loads((tmp_path / "good" / "summary.json").read_text(encoding="utf-8"))["eval_loss"]
    assert words == ["extra", "good", "finished"] and facts["MMFT_RUN"] == str(tmp_path / "good") and float(facts["MMFT_LOSS"]) == loss
    assert mmft(*SMALL, "trainer.learning_rate=1e30", "trainer.max_steps=8", "trainer.warmup_steps=0", "lora=none", "trainer.max_grad_norm=0", f"run_dir={tmp_path / 'bad'}")[0] != 0
    words, facts = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert words[1:] == ["bad", "failed"] == [words[1], facts["MMFT_STATUS"]]


@pytest.mark.parametrize("given, message", [("no-such-program", "No such file"), ("python -c 'raise SystemExit(3)'", "it ended with code 3"), ("'half", "No closing quotation")])
def test_a_command_that_fails_changes_nothing(mmft, tmp_path, monkeypatch, given, message):
    from mmft.pipeline.notify import notify
    from mmft.runs.directory import Run

    said: list[str] = []
    monkeypatch.setattr("mmft.pipeline.notify.warn", said.append)
    monkeypatch.setenv("MMFT_NOTIFY", given.replace("python", sys.executable))
    (tmp_path / "run").mkdir()
    notify(Run(tmp_path / "run"), "finished", None)
    assert len(said) == 1 and message in said[0]
