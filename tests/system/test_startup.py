"""Optional packages are imported only if a run uses them. Each test runs mmft in its own process, as a user does."""

from __future__ import annotations

import subprocess
import sys

import pytest

SMALL = ["data.pictures=12", "data.splits.validation=2", "trainer.max_steps=1", "evaluation.split=null", "logger=none", "output_dir=o"]
RUN = f"import sys; from mmft.cli.main import main; assert main({SMALL} + sys.argv[1:]) == 0; "
SHOWN = "print([name for name in ('bitsandbytes', 'datasets', 'pandas', 'scipy') if sys.modules.get(name)])"


def lines(folder, code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def last_line(folder, code, *words):
    return lines(folder, code, *words)[-1]


def test_answers_that_need_no_model_import_no_large_library(tmp_path):
    """Help, the config, the list of runs and the answer to a wrong key, one after another in one process."""
    (tmp_path / "o").mkdir()
    code = "import sys; from mmft.cli.main import main; "
    code += "print([main(words.split()) for words in ('--help', '--cfg job', 'runs output_dir=o', 'schema --help', 'lora.rr=4', 'predict --help')]); "
    code += "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy', 'PIL', 'pandas', 'pyarrow', 'scipy', 'matplotlib') if m in sys.modules])"
    assert lines(tmp_path, code)[-2:] == ["[0, 0, 2, 0, 2, 0]", "[]"], "there are no runs to list"


@pytest.mark.long
def test_a_plain_run_imports_no_optional_package(tmp_path):
    """In the second run: while a data set is written, pyarrow imports pandas."""
    last_line(tmp_path, RUN + SHOWN)
    assert last_line(tmp_path, RUN + SHOWN) == "[]"


@pytest.mark.parametrize("word", [pytest.param("model.quantization.load_in_4bit=true", marks=pytest.mark.long), "trainer.optim=adamw_8bit"])
@pytest.mark.long
def test_bitsandbytes_is_imported_if_a_setting_needs_it(tmp_path, word):
    assert "'bitsandbytes'" in last_line(tmp_path, RUN + SHOWN, word)


@pytest.mark.long
def test_bitsandbytes_is_imported_after_a_run_without_it(tmp_path):
    """As in a sweep, where one process trains a plain base and then a quantised one."""
    code = RUN + f"assert 'bitsandbytes' not in sys.modules; assert main([*{SMALL}, 'model.quantization.load_in_4bit=true']) == 0; "
    classes = "from peft.tuners.lora.bnb import Linear4bit; print(Linear4bit.__name__)"
    assert last_line(tmp_path, code + classes) == "Linear4bit"


@pytest.mark.long
def test_packages_that_are_imported_already_stay(tmp_path):
    code = "import scipy; from mmft.system import startup; startup.load('peft'); import sys; print(sys.modules['scipy'] is scipy, 'pandas' in sys.modules)"
    assert last_line(tmp_path, code) == "True False"


@pytest.mark.long
def test_imports_are_kept_from_the_garbage_collector_until_the_end(tmp_path):
    code = "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count())); from mmft.system import startup; "
    code += "sys.argv[1:] and gc.disable(); first = startup.load('peft'); print(first, gc.get_freeze_count() > 100_000, gc.isenabled(), startup.load('peft'))"
    assert lines(tmp_path, code)[-2:] == ["True True True False", "0"]
    assert lines(tmp_path, code, "off")[-2:] == ["True True False False", "0"]
