"""The logger that does nothing, the promise that a failing one stops nothing, and the hardware readings."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from mmft.common.errors import UserError
from mmft.loggers.base import Logger, grouped, sample_text
from mmft.loggers.hardware import Hardware
from mmft.loggers.multi import Multi


@dataclass(kw_only=True)
class Recorder(Logger):
    fail_at: str = ""
    calls: list = field(default_factory=list)

    def _note(self, name, *rest):
        self.calls.append((name, *rest))
        if name == self.fail_at:
            raise RuntimeError("disk\nfull")

    def open(self, run_dir, name, config):
        self._note("open", run_dir, name, config)

    def write_scalars(self, step, values):
        self._note("scalars", step, values)

    def write_samples(self, step, rows, tag):
        self._note("samples", step, rows, tag)

    def close(self, status):
        self._note("close", status)


def run_through(logger, tmp_path):
    logger.start(tmp_path, "name", {"seed": 1})
    for step in (1, 2):
        logger.scalars(step, {"loss": 1.5, "note": "text", "flag": True, "count": 2})
    logger.samples(2, [{"index": 0}], "samples")
    logger.finish("done")
    return logger


def test_none_does_nothing(make_logger, tmp_path, capsys):
    logger = run_through(make_logger("none"), tmp_path)
    assert type(logger) is Logger and not logger.hardware
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_values_that_are_no_numbers_are_left_out_and_hardware_is_added_once_a_step(tmp_path):
    logger = Recorder()
    run_through(logger, tmp_path)
    logger = Recorder()
    logger.start(tmp_path, "name", {})
    logger.scalars(1, {"loss": 1.5, "note": "text", "flag": True, "count": 2})
    logger.scalars(1, {"eval_loss": 1.0})
    first, second = logger.calls[1][2], logger.calls[2][2]
    assert {k: v for k, v in first.items() if not k.startswith("hardware/")} == {"loss": 1.5, "count": 2.0}
    assert first["hardware/rss_mb"] > 1 and second == {"eval_loss": 1.0}
    assert not any(k.startswith("hardware/") for k in run_through(Recorder(hardware=False), tmp_path).calls[1][2])


@pytest.mark.parametrize("fail_at, expected", [
    ("", ["open", "scalars", "scalars", "samples", "close"]),
    ("open", ["open", "close"]),
    ("scalars", ["open", "scalars", "close"]),
    ("samples", ["open", "scalars", "scalars", "samples", "close"]),
    ("close", ["open", "scalars", "scalars", "samples", "close"]),
])  # fmt: skip
def test_a_failing_logger_says_so_once_and_is_off(fail_at, expected, tmp_path, capsys):
    logger = run_through(Recorder(fail_at=fail_at), tmp_path)
    assert [c[0] for c in logger.calls] == expected
    assert capsys.readouterr().err == ("mmft: Recorder logger is off: disk full\n" if fail_at else "")


def test_of_several_loggers_one_failing_leaves_the_other_running(tmp_path, capsys):
    good, bad = Recorder(), Recorder(fail_at="scalars")
    run_through(Multi(loggers={"bad": bad, "good": good}), tmp_path)
    assert [c[0] for c in good.calls] == ["open", "scalars", "scalars", "samples", "close"]
    assert [c[0] for c in bad.calls] == ["open", "scalars", "close"]
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_is_not_swallowed(tmp_path):
    class Stopped(Logger):
        def write_scalars(self, step, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stopped().scalars(1, {"loss": 1.0})


def test_names_and_texts():
    assert [grouped(n) for n in ("loss", "eval_loss", "base_cider", "hardware/rss_mb")] == ["train/loss", "eval/loss", "base/cider", "hardware/rss_mb"]
    text = sample_text({"prompt": "p", "references": ["r1", "r2"], "prediction": "<b>x</b>\n```\n# no heading"})
    assert text.count("**reference**") == 2 and "````\n<b>x</b>\n```\n# no heading\n````" in text


def test_hardware_reads_this_process():
    import psutil

    sampler = Hardware()
    first = sampler.read()
    assert "cpu_percent" not in first  # a share needs two readings
    assert first["rss_mb"] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.5)
    until = time.monotonic() + 0.3
    used = time.process_time()
    while time.monotonic() < until:
        pass
    busy = sampler.read()
    assert busy["cpu_percent"] == pytest.approx(100 * (time.process_time() - used) / 0.3 / psutil.cpu_count(), rel=0.5)
    assert 0 < busy["cpu_percent"] <= 110 and all(type(v) is float for v in busy.values())
    assert sampler.read()["cpu_percent"] == busy["cpu_percent"]  # too soon to say anything new


def test_hardware_of_a_gpu_without_a_driver_library(monkeypatch):
    class Cuda:
        is_available = is_initialized = staticmethod(lambda: True)
        memory_allocated = staticmethod(lambda: 2**20)
        max_memory_allocated = staticmethod(lambda: 2**21)

    monkeypatch.setitem(sys.modules, "torch", type("Torch", (), {"cuda": Cuda}))
    readings = Hardware().read()
    assert readings["gpu_memory_mb"] == 1.0 and readings["gpu_peak_memory_mb"] == 2.0 and "gpu_percent" not in readings


def test_loggers_import_nothing_heavy_and_refuse_wrong_keys(make_logger):
    code = (
        "import sys, json, mmft.loggers.tensorboard, mmft.loggers.multi, mmft.loggers.swanlab;"
        "print(json.dumps([m for m in ('torch', 'tensorboard', 'swanlab', 'numpy', 'PIL', 'matplotlib') if m in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout) == []
    with pytest.raises(UserError, match="picture_size"):
        make_logger("tensorboard", "+logger.picture_sice=3")
    with pytest.raises(UserError, match="online, local, offline"):
        make_logger("swanlab", "logger.mode=cloudy")
