"""The model card: what it says is what the run's files say, a hub can read it, and nothing private is in it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reports"))
from fake_run import make_run

from mmft.export.model_card import card, without_folders, write_card
from mmft.runs.directory import Run


def edit(path: Path, **values) -> None:
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**held, **values}), encoding="utf-8")


def matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def run(tmp_path):
    made = make_run(tmp_path / "run", samples=6)
    edit(made / "env.json", model={"path": "Qwen/Qwen2-VL-2B-Instruct", "hub": "huggingface", "revision": "ab" * 20}, data={"fingerprint": "f" * 64})
    edit(made / "summary.json", held_out_samples=6)
    return made


def test_a_training_leaves_a_card_with_its_own_figures(mmft, tmp_path):
    run = tmp_path / "run"
    code, _, err = mmft("data.pictures=24", "data.splits.validation=4", "trainer.max_steps=1", "evaluation.max_samples=2", "generation.max_new_tokens=3",
                        "logger=none", f"run_dir={run.as_posix()}")  # fmt: skip
    assert code == 0, err
    text = (run / "adapter/README.md").read_text(encoding="utf-8")
    summary, env = (json.loads((run / f"{n}.json").read_text(encoding="utf-8")) for n in ("summary", "env"))
    assert f"| loss (lower is better) | {summary['base_eval_loss']:.3f} | {summary['eval_loss']:.3f} |" in text
    assert "On 2 held-out rows" in text and env["data"]["fingerprint"] in text and env["packages"]["peft"] in text
    assert "data.pictures=24" in text and tmp_path.as_posix() not in text, "no folder of this machine"
    assert "More Information Needed" not in text, "peft's empty form is replaced"
    assert "base_model" not in matter(text), "a hub could not look up mmft:tiny"
    assert (run / "report.md").is_file()


def test_the_front_matter_is_what_hubs_read(run):
    from huggingface_hub import ModelCard

    text = card(run, "adapter")
    data = ModelCard(text).data
    assert data.library_name == "peft" and data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and data.pipeline_tag == "image-text-to-text"
    assert {k: matter(text)[k] for k in ("license", "license_name", "license_link", "base_model_relation")} == {
        "license": "other", "license_name": "not-stated", "license_link": "LICENSE", "base_model_relation": "adapter"}  # fmt: skip
    assert matter(card(run, "merged"))["library_name"] == "transformers" and matter(card(run, "merged"))["base_model_relation"] == "finetune"
    assert f"commit `{'ab' * 6}`" in text


def test_a_local_base_is_named_without_its_folder(run):
    edit(run / "env.json", model={"path": "/home/jane/models/my-base", "hub": "local", "revision": "sha256:" + "c" * 64})
    text = card(run, "adapter")
    assert "`my-base`" in text and "jane" not in text and "base_model" not in matter(text)


@pytest.mark.parametrize("word, shown", [
    ("data.path=/home/jane/birds", "data.path=.../birds"),
    ("data.path='C:\\Users\\jane\\birds'", "data.path=.../birds"),
    ("data.path=~/birds/", "data.path=.../birds"),
    ("data.path=birds/2024", "data.path=birds/2024"),
    ("lora.r=8", "lora.r=8"),
    ("reproduce", "reproduce"),
])  # fmt: skip
def test_absolute_folders_are_cut(word, shown):
    assert without_folders(word) == shown


def test_a_run_without_held_out_rows_claims_nothing(run):
    edit(run / "summary.json", metrics={}, base_metrics={}, eval_loss=None, base_eval_loss=None)
    text = card(run, "adapter")
    assert "Not measured" in text and "Nothing was measured" in text and "|" not in text.split("## Figures")[1].split("##")[0]


def test_the_folder_that_holds_the_weights_gets_it(run):
    assert write_card(Run(run)) is None
    (run / "model").mkdir()
    assert write_card(Run(run)) == run / "model/README.md"
    assert matter((run / "model/README.md").read_text(encoding="utf-8"))["library_name"] == "transformers"
