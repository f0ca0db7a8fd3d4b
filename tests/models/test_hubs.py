"""Models from both hubs: the real download code against the loopback stand-in of tests/hub.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub import Hub

# Locates each case of the standard input: path, hub, revision. One process: importing the clients of both hubs takes seconds.
LOCATE = """
import json, sys
from mmft.common.errors import UserError
from mmft.models.hub import locate
for name, (path, hub, revision) in json.load(sys.stdin).items():
    try:
        found = locate(path, hub, revision)
        answer = {"revision": found.revision, "files": sorted(p.name for p in found.folder.iterdir()), "hub": found.hub, "path": found.path}
    except UserError as error:
        answer = {"error": str(error)}
    print("ANSWER" + json.dumps([name, answer]))
"""
CASES = {
    "with a pickle": ("small/with-pickle", "huggingface", "main"),
    "modelscope": ("small/llava", "modelscope", None),
    "missing on huggingface": ("small/lava", "huggingface", None),
    "missing on modelscope": ("small/lava", "modelscope", None),
    "another revision": ("small/llava", "huggingface", "v9"),
}


@pytest.fixture(scope="module")
def hub(small):
    with Hub() as stand_in:
        stand_in.add_folder("models", "small/llava", small("llava"))
        # what must not be downloaded: a pickle can run code
        files = {p.name: p for p in small("llava").iterdir()} | {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}
        stand_in.add("models", "small/with-pickle", files)
        yield stand_in


def located(hub, home, cases, **environment):
    """case -> what was found, or the error."""
    done = subprocess.run([sys.executable, "-c", LOCATE], input=json.dumps(cases), capture_output=True, text=True, timeout=200,
                          env={**os.environ, **hub.environment(home), **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ANSWER"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(hub, home):
    return located(hub, home, CASES)


def test_huggingface_resolves_the_branch_and_takes_safe_files_only(hub, home, found):
    sha, model = hub.sha("models", "small/with-pickle"), found["with a pickle"]
    assert model["revision"] == sha and model["hub"] == "huggingface"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(model["files"])
    assert not {"pytorch_model.bin", "modeling.py"} & set(model["files"])
    assert any("/revision/main" in c for c in hub.calls) and not any("pytorch_model.bin" in c for c in hub.calls if "resolve" in c)
    offline = located(hub, home, {"again": CASES["with a pickle"]}, HF_HUB_OFFLINE="1")["again"]
    assert offline["revision"] == sha, "from the cache, still known by its commit"


def test_modelscope_is_known_by_its_contents(found, small):
    from mmft.models.fingerprint import local_revision

    model = found["modelscope"]
    assert model["hub"] == "modelscope" and model["revision"] == local_revision(small("llava"))
    assert {"config.json", "model.safetensors"} <= set(model["files"])


@pytest.mark.parametrize("which", ["huggingface", "modelscope"])
def test_what_a_hub_does_not_have_is_one_line(found, which):
    error = found[f"missing on {which}"]["error"]
    assert error.startswith("model.path=small/lava: ") and "\n" not in error
    assert ("no such model" in error) if which == "huggingface" else ("could not be downloaded from ModelScope" in error)


def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path):
    error = located(hub, tmp_path, {"x": ("small/llava", "huggingface", None)}, HF_ENDPOINT="http://127.0.0.1:9")["x"]["error"]
    assert "could not be downloaded" in error and "HF_ENDPOINT" in error and "\n" not in error


def test_a_revision_that_is_not_there_is_one_line(found):
    assert found["another revision"]["error"] == "model.revision=v9: small/llava has no such branch, tag or commit"


@pytest.mark.long
def test_a_run_from_the_hub_records_the_commit_and_its_adapter_names_the_model(hub, tmp_path, small):
    """The whole command, in a process of its own: endpoints are read when the libraries are imported."""
    import csv
    import random

    from PIL import Image

    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        for n in range(4):
            # noise: a plain colour leaves nothing after the tower's first layer norm, and training would call it blind
            Image.frombytes("RGB", (56, 56), random.Random(n).randbytes(3 * 56 * 56)).save(tmp_path / f"{n}.png")
            rows.writerow([f"{n}.png", "a red square"])
    command = ["model=llava", "model.path=small/llava", "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}", "data.splits.validation=0",
               "evaluation.split=null", "logger=none", "trainer.max_steps=1", f"run_dir={(tmp_path / 'run').as_posix()}",
               f"output_dir={(tmp_path / 'outputs').as_posix()}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mmft", *command], capture_output=True, text=True, timeout=240, env={**os.environ, **hub.environment(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sha = hub.sha("models", "small/llava")
    model = json.loads((tmp_path / "run" / "env.json").read_text(encoding="utf-8"))["model"]
    assert (model["path"], model["hub"], model["revision"]) == ("small/llava", "huggingface", sha)
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("small/llava", sha)
