"""predict out=...: a command that was killed goes on where it was; a changed one begins anew and says so."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT
from verb_data import lines

# Runs a command that kills itself once 9 answers are logged.
KILLED = """
import os, signal, sys
from mmft.cli.main import main
from mmft.evaluation.answer_table import AnswerFile
add = AnswerFile.add
def killing(self, row):
    add(self, row)
    if len(self.done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerFile.add = killing
main(sys.argv[1:])
"""


class Stop(BaseException):
    """Ends a command in this process as a kill would: nothing handles it."""


@pytest.fixture
def command(trained):
    """The words of a predict command over the 24 pictures."""

    def words(out, *more):
        return ["predict", f"run={trained.run.as_posix()}", f"input={trained.pictures.as_posix()}", f"out={out.as_posix()}", "evaluation.batch_size=4",
                f"output_dir={trained.outputs.as_posix()}", *more]  # fmt: skip

    return words


@pytest.fixture
def generated(monkeypatch):
    """The indices of the rows that were answered in this process; `stop(n, error)` raises the error once n answers are logged."""
    from mmft.evaluation.answer_table import AnswerFile

    class Indices(list):
        after, error = None, Stop

        def stop(self, after, error=Stop):
            self.after, self.error = after, error

    counted, add = Indices(), AnswerFile.add

    def counting(table, row):
        add(table, row)
        counted.append(row["index"])
        if len(counted) == counted.after:
            counted.clear()
            counted.after = None
            raise counted.error

    monkeypatch.setattr(AnswerFile, "add", counting)
    return counted


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.long
def test_a_killed_command_goes_on(mmft, command, generated, tmp_path):
    out, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    assert mmft(*command(whole), output_dir=False)[0] == 0 and len(generated) == 24
    generated.clear()
    ended = subprocess.run([sys.executable, "-c", KILLED, *command(out)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == -9 and not out.exists()
    with (tmp_path / ".a.jsonl.partial").open("ab") as file:  # the line that a kill tears
        file.write(b'{"index": 3, "predic')
    code, stdout, err = mmft(*command(out), output_dir=False)
    assert code == 0 and "9 are there from a command that was stopped" in stdout, err
    assert len(generated) == 15 and out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "whole.jsonl"]


def test_an_interrupted_command_says_that_it_goes_on(mmft, command, generated, tmp_path):
    out = tmp_path / "a.csv"
    generated.stop(9, KeyboardInterrupt)
    code, _, err = mmft(*command(out), output_dir=False)
    assert code == 130 and "9 of 24 answers are kept; the same command goes on with the others" in err and not out.exists()
    assert mmft(*command(out), output_dir=False)[0] == 0 and len(generated) == 15
    assert [row["image"].rsplit("/", 1)[1] for row in csv.DictReader(out.open(encoding="utf-8", newline=""))] == sorted(f"{n}.png" for n in range(24))


@pytest.mark.parametrize(
    "change, told", [("prompt=Which colour?", "another prompt"), ("generation.max_new_tokens=3", "another generation setting"), ("checkpoint=2", "another model"), ("input", "another input")]
)
def test_a_changed_command_begins_anew(mmft, command, generated, trained, tmp_path, change, told):
    out = tmp_path / "a.jsonl"
    pictures = shutil.copytree(trained.pictures, tmp_path / "pictures")
    words = [w if not w.startswith("input=") else f"input={pictures.as_posix()}" for w in command(out)]
    generated.stop(5)
    with pytest.raises(Stop):
        mmft(*words, output_dir=False)
    if change == "input":
        os.utime(pictures / "3.png", ns=(1, (pictures / "3.png").stat().st_mtime_ns + 10**9))
    else:
        words.append(change)
    code, stdout, err = mmft(*words, output_dir=False)
    assert code == 0, err
    assert f"5 of a command that was stopped are dropped, since it had {told}\n" in stdout
    assert len(generated) == 24 and [row["index"] for row in lines(out)] == list(range(24))


def test_two_commands_do_not_write_one_file(command, mmft, tmp_path):
    from mmft.evaluation.answer_table import AnswerFile

    with AnswerFile(tmp_path / "a.jsonl"):
        code, _, err = mmft(*command(tmp_path / "a.jsonl"), output_dir=False)
    assert code == 2 and "another command is writing it now" in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_keeps_its_order_and_its_unreadable_rows(mmft, command, trained, generated, tmp_path):
    rows = [{"image": (trained.pictures / f"{n}.png").as_posix()} for n in (5, 3, 99, 1, 0, 2, 98, 4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "a.csv"
    words = [w if not w.startswith("input=") else f"input={tmp_path.as_posix()}/q.jsonl" for w in command(out)]
    generated.stop(6)
    with pytest.raises(Stop):
        mmft(*words, output_dir=False)
    code, _, err = mmft(*words, output_dir=False)
    assert code == 1 and err.count("99.png") == 1 and err.count("98.png") == 1 and "2 of 8 inputs could not be answered" in err
    assert len(generated) == 2
    found = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    assert [row["image"].rsplit("/", 1)[1] for row in found] == [f"{n}.png" for n in (5, 3, 99, 1, 0, 2, 98, 4)]
    assert [bool(row["error"]) for row in found] == [False, False, True, False, False, False, True, False]


def test_a_models_own_sampling_settings_add_no_lines(small, mmft, tmp_path):
    """Published models bring do_sample, temperature, top_p, top_k and a penalty. Only the penalty acts on greedy answers; stderr stays empty."""
    from small_models import GROUP

    model = shutil.copytree(small("qwen2vl"), tmp_path / "model")
    own = tmp_path / "own"
    own.mkdir()
    for n in range(3):
        shutil.copy(small.root / f"{n}.png", own)
    settings = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    (model / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1}), encoding="utf-8")
    found = []
    for penalty in (1.0, 5.0):
        words = [f"model={GROUP['qwen2vl']}", f"model.path={model.as_posix()}", f"generation.repetition_penalty={penalty}", "generation.max_new_tokens=12"]
        code, out, err = mmft("predict", *words, f"input={own.as_posix()}", "prompt=Which?", "evaluation.batch_size=2")
        assert (code, err) == (0, "")
        found.append(out)
    assert found[0] != found[1] and found[0].count(".png\n") == 3
