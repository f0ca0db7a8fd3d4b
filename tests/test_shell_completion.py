"""Completion: what a word can become, and Tab in real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from mmft.cli.completion import complete
from mmft.config.groups import group_options
from mmft.config.key_table import EFFECTIVE


@pytest.mark.parametrize("line, found", [
    ("mmft pred", ["predict"]), ("mmft model=qwen2", ["model=qwen2_5vl", "model=qwen2vl"]), ("mmft metrics=[cer,ang", []), ("mmft metrics=[cer,anl", ["metrics=[cer,anls"]),
    ("mmft predict toge", ["together="]), ("mmft toge", []), ("mmft predict together=", ["together=true", "together=false"]), ("mmft lora.use_r", ["lora.use_rslora="]),
    ("mmft evaluation.answer=c", ["evaluation.answer=choose"]), ("mmft model.quantization.load_in_4", ["model.quantization.load_in_4bit="]), ("mmft --js", ["--json"]),
    ("mmft predict inpu", ["input="]), ("mmft predict input=pho", []), ("mmft evalu", ["evaluate", "evaluation."]), ("mmft seed=3 predi", ["predict"]),
])  # fmt: skip
def test_a_word_is_completed(line, found):
    assert complete(line) == found


def test_all_options_and_keys_of_a_library_are_offered():
    assert complete("mmft data=") == [f"data={name}" for name in group_options()["data"]]
    assert {f"generation.{key}=" for key in EFFECTIVE["generation"]} <= {*complete("mmft generation.")}


def test_runs_are_offered(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "snapshot.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert complete(f"mmft report output_dir={tmp_path} run=") == ["run=last", "run=best", f"run={(tmp_path / 'a' / 'b').as_posix()}"]
    assert complete(f"mmft report output_dir={tmp_path}/no run=") == []


SHELLS = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}


@pytest.mark.parametrize("shell", [pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name}")) for name in SHELLS])
def test_tab_completes_in_a_real_shell(shell, tmp_path):
    """The line is typed into a terminal with Tab after each word, then printed by an `echo` put in front of it."""
    command = tmp_path / "bin" / "mmft"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -m mmft \"$@\"\n", encoding="utf-8")
    command.chmod(0o755)
    (tmp_path / "holiday.jpg").write_bytes(b"")
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb", "PS1": "> ", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
    script = tmp_path / "script"
    script.write_text(subprocess.run([command, "--shell-completion", shell], env=environment, capture_output=True, text=True, check=True).stdout, encoding="utf-8")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(SHELLS[shell], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path, start_new_session=True)
    os.close(theirs)
    seen = ""

    def read_until(pattern: str, seconds: float = 20) -> None:
        nonlocal seen
        end = time.time() + seconds
        while not re.search(pattern, seen) and time.time() < end:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode("utf-8", "replace")

    try:
        os.write(ours, f". {script} && echo rea''dy\n".encode())
        read_until(r"ready\r?\n")
        assert "ready" in seen, seen
        for typed, expected in (("mmft predi\t", "predict "), ("model=smolvlm2\t", "model=smolvlm2"), (" inpu\t", "input="), ("holi\t", "holiday.jpg")):
            os.write(ours, typed.encode())
            read_until(re.escape(expected) + r"\s?")
            assert expected in seen, seen
            time.sleep(0.3)
        os.write(ours, b"\x01echo DONE \n")
        read_until(r"\nDONE ")
        read_until(r"\nDONE [^\n]*\n", 5)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    [line] = re.findall(r"\nDONE ([^\r\n]*)", seen)[-1:]
    assert line.split() == ["mmft", "predict", "model=smolvlm2", "input=holiday.jpg"], seen
    assert Path(tmp_path / "holiday.jpg").is_file()
