"""The 118 photos with human captions: prepared, trained on and measured with each family, through the command line."""

import json
import subprocess
import sys

import pytest
import small_models
from places import ROOT, shared

FAMILIES = {"tiny": None, "qwen2vl": "qwen2vl", "llava": "llava", "blip2": "blip2"}


@pytest.fixture(scope="module")
def photos():
    return shared("data/coco")


@pytest.mark.parametrize("model", FAMILIES)
def test_a_family_trains_on_real_photos_and_is_measured_with_cider(mmft, tmp_path, photos, model):
    words = [f"model={model}", "experiment=debug", "data=coco", f"data.path={photos.as_posix()}", "data.limit=24", "data.splits.validation=6",
             "data.splits.by=last", "trainer.per_device_train_batch_size=2", f"run_dir={(tmp_path / 'run').as_posix()}"]  # fmt: skip
    if FAMILIES[model]:
        words.append(f"model.path={small_models.build(FAMILIES[model], tmp_path / 'small').as_posix()}")
    if model in ("tiny", "qwen2vl"):
        words.append("model.processor={max_pixels: 12544}")
    code, _, err = mmft(*words)
    assert code == 0, err
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2 and summary["base_eval_loss"] > 0 and summary["metrics"]["cider"] >= 0
    rows = [json.loads(line) for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = json.loads((photos / "captions_val2017.json").read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    by_file = {}
    for item in captions["annotations"]:
        by_file.setdefault(names[item["image_id"]], []).append(" ".join(item["caption"].split()))
    assert len(rows) == 4  # debug measures four of the six held-out rows
    for row in rows:
        assert sorted(" ".join(r.split()) for r in row["references"]) == sorted(by_file[row["images"][0].split("/")[-1]])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 4 and "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.long
def test_the_default_command_runs_in_a_process_of_its_own(tmp_path, photos):
    """As typed in a shell, from another directory than the checkout."""
    words = ["experiment=debug", "data=coco", f"data.path={photos}", "data.limit=12", "data.splits.validation=4", "logger=none"]
    done = subprocess.run([sys.executable, "-m", "mmft", *words], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "outputs").glob("*_tiny_coco/DONE"))) == 1
    assert max(map(len, done.stdout.splitlines())) < 200 and str(ROOT / "outputs") not in done.stdout
