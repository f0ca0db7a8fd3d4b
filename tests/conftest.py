"""Shared by all tests: no network, two threads, commands run in this process."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("SWANLAB_MODE", "offline")
os.environ.pop("MMFT_PACKAGES", None)

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests/hub.py, tests/places.py and tests/small_models.py

# Fast tests that together call every library that mmft builds on; CI runs them with the newest and with the oldest versions.
COMPAT = (
    "adapters/test_adapters.py", "collators/test_chat.py", "common/test_private_api.py", "config/test_words.py", "losses/test_supervised.py",
    "models/test_load.py", "rewrites/test_patch_embed.py", "rewrites/test_rms_norm.py", "training/test_sampling.py", "training/test_neftune.py", "test_dependencies.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.path.as_posix().endswith(f"tests/{name}") for name in COMPAT):
            item.add_marker(pytest.mark.compat)


def pytest_collection_finish(session):
    """What the test modules have imported is a million objects, which every full collection would look at: several in each run of mmft.

    A command does the same after its imports (mmft/system/startup.py), but here they are made before. A training of two steps of the tiny model
    takes 0.64 of the processor time (medians of 8).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure(config):
    gc.unfreeze()  # nanobind would report frozen objects as leaks


@pytest.fixture
def mmft(capfd, tmp_path):
    """Run a command as a user would, in this process: mmft("lora.r=4", ...) -> (exit code, stdout, stderr)."""
    from mmft.cli.main import main

    def command(*words: str, output_dir: bool = True) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([*words, *([f"output_dir={(tmp_path / 'outputs').as_posix()}"] if output_dir else [])])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return command


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Small random models of every family as local folders: small("qwen2vl") -> folder (tests/small_models.py)."""
    from small_models import Small

    return Small(tmp_path_factory.mktemp("small"))
