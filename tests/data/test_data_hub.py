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

# Prepares each case of the standard input, a list of words, in a folder of its own. One process: importing the clients of both hubs takes seconds.
SCRIPT = """
import json, sys
from mmft.config.build import build
from mmft.config.compose import compose
from mmft.data.prepare import prepare
from mmft.common.errors import UserError
for name, words in json.load(sys.stdin).items():
    try:
        prepared = prepare(build(compose(words).data), sys.argv[1] + "/" + name)
    except UserError as error:
        found = {"error": str(error)}
    else:
        found = {
            "splits": prepared.splits, "fingerprint": prepared.fingerprint, "revision": prepared.manifest["stamp"]["revision"],
            "rows": [[s.id, list(s.references), s.prompt_text, s.load_images()[0].getpixel((0, 0))[0]] for n in prepared.splits for s in prepared.split(n)],
            "files": sorted(p.name for p in prepared.path.iterdir() if p.is_file())}
    print("ANSWER" + json.dumps([name, found]))
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


def prepared_in_a_process(hub, folder, cases, **variables):
    """case -> what was prepared, or the error."""
    environment = {**os.environ, **hub.environment(folder), "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder / "out")], input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=250)
    answers = dict(json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ANSWER"))
    assert answers.keys() == cases.keys(), done.stderr
    return answers


MISSING = {
    "dataset": (["data.dataset=ybelkada/footbal-dataset"], "data.dataset=ybelkada/footbal-dataset: not found on the Hugging Face hub"),
    "revision": (["data.revision=v2"], "data.revision=v2: ybelkada/football-dataset has no such branch"),
    "split": (["data.split=test"], "data.split=test"),
    "column": (["data.columns.text=caption"], "data.columns.text=caption: "),
    "modelscope": (["data.hub=modelscope", "data.dataset=a/b"], "data.dataset=a/b: "),
}
CASES = {
    "football": ["data=football"],
    "football from modelscope": ["data=football", "data.hub=modelscope"],
    "coco500": ["data=coco500", "data.limit=2", "data.splits.validation=1"],
    "coco500 from a copy": ["data=coco500", "data.hub=huggingface", f"data.dataset={COCO}", "data.limit=3", "data.splits.validation=1"],
    "large": ["data=hub", "data.dataset=owner/large", "data.limit=4", "data.splits.validation=0"],
    **{f"no {name}": ["data=football", *words] for name, (words, _) in MISSING.items()},
}
LARGE = {f"data/train-{n:05d}-of-00004.parquet": [{"image": {"bytes": png(10 * n + i), "path": None}, "text": f"row {n}.{i}"} for i in range(3)] for n in range(4)}


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory):
    hub.add("datasets", "owner/large", {"README.md": "A card.", **{name: parquet(rows) for name, rows in LARGE.items()}})
    return prepared_in_a_process(hub, tmp_path_factory.mktemp("hub"), CASES)


def test_football_of_six_pictures(found, hub):
    answer = found["football"]
    assert answer["splits"] == {"train": 5, "validation": 1} and answer["revision"] == hub.sha("datasets", FOOTBALL)
    assert answer["rows"][5] == ["6", ["player 5"], "", 5]


def test_the_same_set_from_modelscope_has_the_same_fingerprint(found):
    there = found["football from modelscope"]
    assert found["football"]["fingerprint"] == there["fingerprint"] and there["revision"].startswith("master@")


def test_coco500_from_modelscope_joins_the_captions_of_an_image(found):
    answer = found["coco500"]
    assert answer["rows"] == [["7", ["caption 0", "caption 2"], "COCO Yes:", 7], ["8", ["caption 1", "caption 4"], "COCO Yes:", 8]]
    assert {"coco-2024-dataset.csv", "data_vl.json"} <= set(answer["files"])


def test_coco500_from_a_hub_copy(found, hub):
    answer = found["coco500 from a copy"]
    assert [r[0] for r in answer["rows"]] == ["7", "8", "9"] and answer["rows"][1][1] == ["caption 1", "caption 4"]
    assert any(f"{COCO}/resolve/" + hub.sha("datasets", COCO) in c for c in hub.calls)  # pinned to the commit


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_one_line(found, name):
    error = found[f"no {name}"]["error"]
    assert error.startswith("data.") and MISSING[name][1] in error and "\n" not in error


def test_no_network_is_one_line(hub, tmp_path):
    error = prepared_in_a_process(hub, tmp_path, {"football": ["data=football"]}, HF_ENDPOINT="http://127.0.0.1:9")["football"]["error"]
    assert "cannot be reached" in error and "HF_ENDPOINT" in error


def test_a_limit_downloads_only_the_files_that_hold_its_rows(found, hub):
    """Four files of three rows: a limit of four rows needs two of them; images of the others would be most of a large data set."""
    assert [row[1] for row in found["large"]["rows"]] == [["row 0.0"], ["row 0.1"], ["row 0.2"], ["row 1.0"]]
    fetched = {name for call in hub.calls for name in LARGE if call.split(" ")[0] == "GET" and name in call and "/resolve/" in call}
    assert fetched == set(list(LARGE)[:2])
