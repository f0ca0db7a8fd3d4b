"""Hub sources through the real download code of datasets and modelscope, against a loopback stand-in of both hubs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from small import png

REPOSITORY = Path(__file__).parents[2]
FOOTBALL, COCO = "ybelkada/football-dataset", "modelscope/coco_2014_caption"

SCRIPT = """
import json, sys
from mmft.config.build import build
from mmft.config.compose import compose
from mmft.data.prepare import prepare
from mmft.common.errors import UserError
try:
    prepared = prepare(build(compose(sys.argv[2:]).data), sys.argv[1])
except UserError as error:
    print("ANSWER" + json.dumps({"error": str(error)}))
else:
    print("ANSWER" + json.dumps({
        "splits": prepared.splits, "fingerprint": prepared.fingerprint, "revision": prepared.manifest["stamp"]["revision"],
        "rows": [[s.id, list(s.references), s.prompt_text, s.load_images()[0].getpixel((0, 0))[0]] for n in prepared.splits for s in prepared.split(n)],
        "files": sorted(p.name for p in prepared.path.iterdir() if p.is_file())}))
"""


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub():
    players = parquet([{"image": {"bytes": png(i), "path": None}, "text": f"player {i}"} for i in range(6)])
    captions = parquet([{"image_id": n, "caption": f"caption {i}", "image": {"bytes": png(n), "path": None}} for i, n in enumerate((7, 8, 7, 9, 8))])
    card = "---\nconfigs:\n- config_name: coco_2014_caption\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    with Hub() as server:
        server.add("datasets", FOOTBALL, {"README.md": "A card.", "data/train-00000-of-00001.parquet": players})
        server.add("datasets", COCO, {"README.md": card, "data/train-00000-of-00001.parquet": captions})
        yield server


def prepared_in_a_process(hub, folder, *overrides, **variables):
    environment = {**os.environ, **hub.environment(folder), "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder / "out"), *overrides], env=environment, capture_output=True, text=True, timeout=120)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, done.stderr
    return json.loads(answers[0][6:])


@pytest.fixture
def run(hub, tmp_path):
    return lambda *overrides, **variables: prepared_in_a_process(hub, tmp_path, *overrides, **variables)


@pytest.fixture(scope="module")
def football(hub, tmp_path_factory):
    return prepared_in_a_process(hub, tmp_path_factory.mktemp("football"), "data=football")


def test_football_of_six_pictures(football, hub):
    answer = football
    assert answer["splits"] == {"train": 5, "validation": 1} and answer["revision"] == hub.sha("datasets", FOOTBALL)
    assert answer["rows"][5] == ["6", ["player 5"], "", 5]


def test_the_same_set_from_modelscope_has_the_same_fingerprint(run, football):
    there = run("data=football", "data.hub=modelscope")
    assert football["fingerprint"] == there["fingerprint"] and there["revision"].startswith("master@")


def test_coco500_from_modelscope_joins_the_captions_of_an_image(run):
    answer = run("data=coco500", "data.limit=2", "data.splits.validation=1")
    assert answer["rows"] == [["7", ["caption 0", "caption 2"], "COCO Yes:", 7], ["8", ["caption 1", "caption 4"], "COCO Yes:", 8]]
    assert {"coco-2024-dataset.csv", "data_vl.json"} <= set(answer["files"])


def test_coco500_from_a_hub_copy(run, hub):
    before = len(hub.calls)
    answer = run("data=coco500", "data.hub=huggingface", f"data.dataset={COCO}", "data.limit=3", "data.splits.validation=1")
    assert [r[0] for r in answer["rows"]] == ["7", "8", "9"] and answer["rows"][1][1] == ["caption 1", "caption 4"]
    assert any("/resolve/" + hub.sha("datasets", COCO) in c for c in hub.calls[before:])  # pinned to the commit


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.dataset=ybelkada/footbal-dataset"], "data.dataset=ybelkada/footbal-dataset: not found on the Hugging Face hub"),
    (["data.revision=v2"], "data.revision=v2: ybelkada/football-dataset has no such branch"),
    (["data.split=test"], "data.split=test"),
    (["data.columns.text=caption"], "data.columns.text=caption: "),
    (["data.hub=modelscope", "data.dataset=a/b"], "data.dataset=a/b: "),
])
def test_what_is_not_there_is_one_line(run, overrides, message):
    error = run("data=football", *overrides)["error"]
    assert error.startswith("data.") and message in error and "\n" not in error


def test_no_network_is_one_line(run):
    error = run("data=football", HF_ENDPOINT="http://127.0.0.1:9")["error"]
    assert "cannot be reached" in error and "HF_ENDPOINT" in error


def test_a_limit_downloads_only_the_files_that_hold_its_rows(hub, tmp_path):
    """Four files of three rows: a limit of four rows needs two of them; images of the others would be most of a large data set."""
    files = {f"data/train-{n:05d}-of-00004.parquet": parquet([{"image": {"bytes": png(10 * n + i), "path": None}, "text": f"row {n}.{i}"} for i in range(3)]) for n in range(4)}
    hub.add("datasets", "owner/large", {"README.md": "A card.", **files})
    before = len(hub.calls)
    answer = prepared_in_a_process(hub, tmp_path, "data=hub", "data.dataset=owner/large", "data.limit=4", "data.splits.validation=0")
    assert [row[1] for row in answer["rows"]] == [["row 0.0"], ["row 0.1"], ["row 0.2"], ["row 1.0"]]
    fetched = {name for call in hub.calls[before:] for name in files if call.split(" ")[0] == "GET" and name in call and "/resolve/" in call}
    assert fetched == set(list(files)[:2])
