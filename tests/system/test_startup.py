"""What a run does not need is not imported; what it needs is found all the same. Each in a process of its own, as a user starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SMALL = ["data.pictures=12", "data.splits.validation=2", "trainer.max_steps=1", "evaluation.split=null", "logger=none", "output_dir=o"]
RUN = f"import sys; from mmft.__main__ import main; assert main({SMALL} + sys.argv[1:]) == 0; "
SHOWN = "print([name for name in ('bitsandbytes', 'datasets', 'pandas', 'scipy') if sys.modules.get(name)])"


def last_line(folder, code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_a_run_imports_none_of_them(tmp_path):
    """The second time: where a set is written, pyarrow looks for pandas."""
    last_line(tmp_path, RUN + SHOWN)
    assert last_line(tmp_path, RUN + SHOWN) == "[]"


@pytest.mark.parametrize("word", ["model.quantization.load_in_4bit=true", "trainer.optim=adamw_8bit"])
def test_bitsandbytes_is_found_where_it_is_asked_for(tmp_path, word):
    assert "'bitsandbytes'" in last_line(tmp_path, RUN + SHOWN, word)


def test_after_a_run_without_it_too(tmp_path):
    """As in a sweep, where one process trains a plain base and then a quantised one."""
    code = RUN + f"assert 'bitsandbytes' not in sys.modules; assert main([*{SMALL}, 'model.quantization.load_in_4bit=true']) == 0; "
    classes = "from peft.tuners.lora.bnb import Linear4bit; print(Linear4bit.__name__)"
    assert last_line(tmp_path, code + classes) == "Linear4bit"


def test_what_is_imported_already_stays(tmp_path):
    code = "import scipy; from mmft.system import startup; startup.load('peft'); import sys; print(sys.modules['scipy'] is scipy, 'pandas' in sys.modules)"
    assert last_line(tmp_path, code) == "True False"


def test_the_garbage_collector_is_as_before(tmp_path):
    code = "import gc, sys; from mmft.system import startup; sys.argv[1:] and gc.disable(); first = startup.load('peft'); "
    code += "print(first, gc.get_freeze_count(), gc.isenabled(), startup.load('peft'))"
    assert last_line(tmp_path, code) == "True 0 True False"
    assert last_line(tmp_path, code, "off") == "True 0 False False"
