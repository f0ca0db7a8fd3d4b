"""One small run, trained once for the tests of the verbs that read it, and a way to call them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from verb_data import draw, lines


@dataclass
class Trained:
    """run: base and tuned measured on 6 held-out rows, checkpoints of step 2 and 4. pictures: 24 PNGs and rows.csv."""

    outputs: Path
    run: Path
    pictures: Path
    words: list[str]

    def lines(self, name: str) -> list[dict]:
        return lines(self.run / name)

    def json(self, name: str) -> dict:
        return json.loads((self.run / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    import mmft
    from mmft.cli.main import main

    home = tmp_path_factory.mktemp("verbs")
    draw(home / "pictures", 24)
    model = Path(shutil.copytree(Path(mmft.__file__).parent / "assets" / "tiny", home / "tiny"))
    words = [f"model.path={model.as_posix()}", "data=table", f"data.path={(home / 'pictures' / 'rows.csv').as_posix()}",
             "data.columns.prompt=prompt", "data.splits.validation=6", "data.splits.test=3", "trainer.max_steps=4", "trainer.save_strategy=steps",
             "trainer.save_steps=2", "trainer.learning_rate=0.02", "trainer.warmup_steps=0", "generation.max_new_tokens=8", "logger=none",
             f"output_dir={(home / 'outputs').as_posix()}"]  # fmt: skip
    assert main([*words, f"run_dir={(home / 'outputs' / 'first').as_posix()}"]) == 0
    return Trained(home / "outputs", home / "outputs" / "first", home / "pictures", words)


@pytest.fixture
def verb(mmft, trained):
    """verb("evaluate", ...) -> (exit code, stdout, stderr) of a command about the trained run."""

    def call(name, *words, run=True):
        own = [f"run={trained.run.as_posix()}"] if run is True else []
        return mmft(name, *own, *words, f"output_dir={trained.outputs.as_posix()}", output_dir=False)

    return call


@pytest.fixture
def run_copy(trained, tmp_path):
    """A copy of the run, to be changed or added to."""
    return Path(shutil.copytree(trained.run, tmp_path / "copy"))
