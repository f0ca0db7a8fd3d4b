"""Evaluation rows with pictures, and loggers built from the shipped yaml files."""

import os

import pytest
from PIL import Image


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (320, 160), (200, 30, 30)).save(folder / "a.png")
    Image.new("RGB", (40, 40), (30, 30, 200)).save(folder / "b.png")
    common = {"root": folder.as_posix(), "prompt": "What colour?", "metrics": {}}
    return [
        {"index": 0, "id": "one", "images": ["a.png"], "references": ["red", "dark red"], "prediction": "a red\n```field", **common},
        {"index": 1, "id": "two", "images": ["a.png", "b.png"], "references": ["red, blue"], "prediction": "", **common},
        {"index": 2, "id": "three", "images": ["gone.png"], "references": ["none"], "prediction": "green", **common},
    ]


@pytest.fixture
def make_logger():
    """Builds logger=NAME as the command line would."""

    def make(name: str, *overrides: str):
        from hydra import compose, initialize_config_dir

        from mmft.config.build import build
        from mmft.config.groups import CONFIG_DIR

        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            return build(compose(overrides=[f"+logger={name}", *overrides]).logger)

    return make


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An environment where nobody is logged in to SwanLab, and where its settings files are not the developer's."""
    for name in [n for n in os.environ if n.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return monkeypatch
