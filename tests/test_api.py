"""The Python API: the same results as the commands, one load of the model, no torch before a model is needed."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import ROOT
from verbs.verb_data import draw

import mmft
from mmft.config.python_words import as_words
from mmft.config.words import read

SETTINGS = {
    "data": "table", "data.columns": {"prompt": "prompt"}, "data.splits": {"validation": 6, "test": 3}, "logger": "none",
    "trainer": {"max_steps": 4, "learning_rate": 0.02, "warmup_steps": 0}, "generation.max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("api")
    draw(home / "pictures", 24)
    return home


@pytest.fixture(scope="module")
def data(home):
    return {**SETTINGS, "data.path": home / "pictures" / "rows.csv", "output_dir": home / "outputs"}


@pytest.fixture(scope="module")
def run(data, home):
    return mmft.train({**data, "run_dir": home / "outputs" / "first"})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- without a model ----------------------------------------------------------------------------------------------


def test_the_import_is_light_and_complete():
    code = ("import sys, mmft; heavy = {'torch', 'transformers', 'pandas', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules); assert not heavy, heavy; "
            "assert all(callable(getattr(mmft, name)) for name in mmft.__all__); mmft.open_run; "
            "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("before", ["from transformers import DynamicCache, GenerationConfig; from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor",
                                    "import transformers, peft; transformers.Trainer", "import torch, scipy, pandas"])  # fmt: skip
def test_a_program_may_import_the_libraries_first(before, tmp_path):
    small = ["data.pictures=24", "data.splits.validation=4", "trainer.max_steps=1", "evaluation.max_samples=2", "generation.max_new_tokens=2", "logger=none", f"output_dir={tmp_path}"]
    code = f"{before}\nimport mmft\nassert mmft.train({small!r}).status == 'finished'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n"), max_size=12),
    lambda inner: st.lists(inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(VALUES)
@example("null")
@example("${seed}")
@example("1e-4")
@example("it's \\ \"quoted\", [a] {b: c}")
@example(["", "true", "a,b"])
def test_a_value_is_read_back_as_it_is(value):
    """By Hydra's own grammar and OmegaConf."""
    from omegaconf import OmegaConf

    [word] = as_words({"data.prompt": value})
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, "x", read(word).value())
    [back] = OmegaConf.to_container(cfg, resolve=True).values()
    assert back == value and type(back) is type(value)


def test_mappings_nest_and_choose_options():
    given = {"model": "tiny", "lora": {"r": 4, "rank_pattern": {"layers.0.q": 8}}, "data.sources.chat": "messages", "metrics": ["cer", "json"], "seed": 3}
    assert as_words(given) == ["model=tiny", "lora.r=4", "lora.rank_pattern={layers.0.q:8}", "data.sources.chat=messages", "metrics=[cer,json]", "seed=3"]
    assert as_words(["lora.r=4"]) == ["lora.r=4"] and as_words(None) == []


@pytest.mark.parametrize("call, message", [
    (lambda: mmft.train("lora.r=4"), "give a list of words"),
    (lambda: mmft.train({"lora.r": {1, 2}}), "lora.r: a set is no value of a config"),
    (lambda: mmft.train({"lora": {"rr": 4}}), "lora.rr: no such key. Did you mean lora.r?"),
    (lambda: mmft.train(["task=predict"]), "task=predict: this is mmft train"),
    (lambda: mmft.open_run("no/such/run"), "no such directory"),
    (lambda: mmft.runs("no/such/folder"), "no such directory"),
    (lambda: mmft.prepare({"data": "table", "data.path": "missing.csv"}), "missing.csv"),
])  # fmt: skip
def test_a_mistake_is_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mmft.UserError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prepared_rows_are_those_of_the_file(data, home):
    with (home / "pictures" / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["image"] if "image" in row else row["file_name"]: row for row in csv.DictReader(file)}
    prepared = mmft.prepare({k: v for k, v in data.items() if k.split(".")[0] in ("data", "output_dir")})
    assert {name: len(samples) for name, samples in prepared.items()} == {"train": 15, "validation": 6, "test": 3}
    frame = prepared["train"].to_pandas()
    assert len(frame) == 15 and "source" not in frame
    for row in frame.itertuples():
        [path] = row.images
        written = rows[Path(path).name]
        assert Path(path).parent == home / "pictures" and row.prompt == written["prompt"] and row.answer in written.values() and row.references[0] == row.answer
    table = prepared["validation"].to_dataset()
    assert table.num_rows == 6 and table[0]["images"][0].size == prepared["validation"][0].load_images()[0].size
    assert table[0]["messages"][0] == {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": table[0]["prompt"]}]}
    assert [s.id for s in prepared["train"][2:4]] == [prepared["train"][2].id, prepared["train"][3].id]
    with pytest.raises(KeyError):
        prepared["trian"]


# --- with one -----------------------------------------------------------------------------------------------------


def test_train_is_the_command(run, data, home):
    from mmft.cli.main import main

    words = as_words({**data, "run_dir": home / "outputs" / "typed"})
    assert main(words) == 0
    ours, typed = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run.path, home / "outputs" / "typed"))
    assert ours == typed
    assert run.status == "finished" and run.config["trainer"]["max_steps"] == 4 and run.config["data"]["path"].endswith("rows.csv")
    logged = lines(run.path / "metrics.jsonl")
    frame = run.metrics()
    assert len(frame) == len(logged) and frame["loss"].dropna().tolist() == [row["loss"] for row in logged if "loss" in row]
    assert run.summary["eval_loss"] == json.loads((run.path / "summary.json").read_text(encoding="utf-8"))["eval_loss"]


def test_answers_are_those_that_training_measured_and_the_model_is_loaded_once(run, monkeypatch):
    from PIL import Image

    import mmft.runs.parents as opening

    loads = []
    load_model = opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *args, **keys: loads.append(1) or load_model(*args, **keys))
    measured = lines(run.path / "eval" / "tuned.jsonl")
    paths = [Path(row["root"], row["images"][0]) for row in measured]
    expected = [row["prediction"] for row in measured]
    prompts = [row["prompt"] for row in measured]
    with mmft.open_run(run.path) as opened:
        assert [r["prediction"] for r in opened.predict("validation")] == expected
        assert [r["prediction"] for r in opened.predict(paths, prompts)] == expected
        mixed = [paths[0], str(paths[1]), paths[2].read_bytes(), *map(Image.open, paths[3:])]
        records = opened.predict(mixed, prompts)
        assert [r["prediction"] for r in records] == expected
        assert [r["id"] for r in records[1:4]] == [paths[1].as_posix(), "images[2]", "images[3]"]
        [record] = opened.predict(paths[0], prompts[0])
        assert record["prediction"] == expected[0]
        evaluated = opened.evaluate({"evaluation.split": "validation"})
        assert evaluated["metrics"] == run.summary["metrics"] and evaluated["eval_loss"] == pytest.approx(run.summary["eval_loss"], abs=1e-6)
        [chosen] = opened.predict(paths[0], prompts[0], choose=["red", "a blue circle"])
        assert chosen["prediction"] in ("red", "a blue circle") and sum(chosen["probabilities"].values()) == pytest.approx(1)
        side_by_side = opened.compare(index=[0, 5])
        base = lines(run.path / "eval" / "base.jsonl")
        assert side_by_side["tuned"].tolist() == [expected[0], expected[5]] and side_by_side["base"].tolist() == [base[0]["prediction"], base[5]["prediction"]]
        assert Path(side_by_side.attrs["page"]).is_file()
        assert len(loads) == 1
        opened.predict(paths[0], prompts[0], overrides={"generation.max_new_tokens": 1})
        assert len(loads) == 1
    assert opened._opened is None


def test_an_image_that_cannot_be_read_leaves_the_others_answered(run, home, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    measured = lines(run.path / "eval" / "tuned.jsonl")[0]
    good, bad = run.predict([Path(measured["root"], measured["images"][0]), tmp_path / "torn.png"], [measured["prompt"]] * 2)
    assert good["prediction"] == measured["prediction"] and bad["prediction"] is None and "torn.png" in bad["error"]
    for images, prompt, message in (([good["id"]], ["a", "b"], "2 questions for 1 images"), ([], "a", "at least one image"), ([3], "a", "a int is no image")):
        with pytest.raises(mmft.UserError, match=message):
            run.predict(images, prompt)


def test_runs_is_a_frame(run, home):
    frame = mmft.runs(home / "outputs", where="status==finished and trainer.max_steps==4", show=["lora.r", "seed"])
    assert "first" in frame.index and frame.loc["first", "seed"] == 42 and frame.loc["first", "eval_loss"] == run.summary["eval_loss"]
    assert Path(frame.loc["first", "path"]) == run.path and str(frame["started"].dtype).startswith("datetime64")
    everything = mmft.runs(home / "outputs", by="eval_loss")
    assert {*run.summary["metrics"]} <= {*everything.columns} and everything["eval_loss"].is_monotonic_increasing
    assert mmft.open_run("fir", folder=home / "outputs").path == run.path


def test_a_run_is_shown_as_html(run, tmp_path):
    shown = run._repr_html_()
    assert f"{run.summary['eval_loss']:.3f}" in shown and shown.count("<tr>") == 1 + len([k for k in run.summary["metrics"] if "/" not in k]) + 1
    odd = tmp_path / "a <b> & c"
    odd.mkdir()
    assert "<b> &" not in mmft.Run(odd)._repr_html_().replace("<b>a", "") and "&lt;b&gt; &amp; c" in mmft.Run(odd)._repr_html_()
    assert "finished" in repr(run)


def test_merge_returns_a_plain_model(run, tmp_path):
    folder = run.merge(tmp_path / "merged", samples=2)
    assert folder == tmp_path / "merged" and (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


# --- the page and the notebook ------------------------------------------------------------------------------------


def test_the_page_runs_as_written(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(blocks) >= 6 and isinstance(names["run"], mmft.Run)


@pytest.mark.long
def test_the_notebook_runs_as_written(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    html = "".join(str(o["data"].get("text/html", "")) for o in outputs if "data" in o)
    assert "Held-out loss" in html and "<table" in html
    streams = "".join(o.text for o in outputs if o.output_type == "stream")
    assert re.search(r"\d+%\|", streams), "a progress bar is shown"
    assert len(list((tmp_path / "outputs").glob("*/adapter"))) == 1
