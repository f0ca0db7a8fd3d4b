"""Presets of known data sets: each against a stand-in of two rows a split that has the data set's own columns, through the real download code."""

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
from small import png, write_json

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from mmft.common.errors import UserError
from mmft.config.compose import compose
from mmft.data.prepare import prepared_data
found = {}
for name in sys.argv[2:]:
    try:
        prepared = prepared_data(compose([f"data={name}", "data.splits.validation=0", f"output_dir={sys.argv[1]}"]))
    except UserError as error:
        found[name] = {"error": str(error)}
        continue
    found[name] = {"splits": prepared.splits, "notes": prepared.manifest["notes"], "rows": [
        [row.id, len(row.images), [m["role"] for m in row.messages], row.prompt_text, row.answer_text, list(row.references), list(row.choices)]
        for split in prepared.splits for row in prepared.split(split)]}
print("ANSWER" + json.dumps(found))
"""


def image(number):
    return {"bytes": png(number), "path": f"{number}.png"}


def people(*answers):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]


RECEIPT = {"menu": [{"nm": "Tea", "cnt": "1", "price": "1,000"}], "total": {"total_price": "1,000"}}
TEN = ["red"] * 4 + ["dark red"] * 6
# name -> (repository, configuration, split -> rows with the data set's columns in its order)
SETS = {
    "docvqa": ("pixparse/docvqa-single-page-questions", "default", {s: [
        {"image": image(n), "question_id": 9 + n, "question": "What is the date?", "answers": ["1 May", "May 1", "May 1"], "data_split": s,
         "ocr_results": {"page": 1, "width": 4, "height": 4, "lines": [{"bounding_box": [0, 0, 1, 1], "text": "1 May"}]},
         "other_metadata": {"ucsf_document_id": "x", "ucsf_document_page_no": "1", "doc_id": 3, "image": "documents/x.png"}} for n in (k, k + 1)]
        for s, k in (("train", 0), ("validation", 2), ("test", 4))}),
    "chartqa": ("HuggingFaceM4/ChartQA", "default", {s: [
        {"image": image(n), "query": "How many?", "label": ["14"], "human_or_machine": 0} for n in (k, k + 1)] for s, k in (("train", 0), ("val", 2), ("test", 4))}),
    "textvqa": ("lmms-lab/textvqa", "default", {s: [
        {"image_id": f"i{n}", "question_id": 30 + n, "question": "What colour?", "question_tokens": ["what", "colour"], "image": image(n), "image_width": 4, "image_height": 4,
         "flickr_original_url": "https://x", "flickr_300k_url": "https://x", "answers": TEN, "image_classes": ["Car"], "set_name": s, "ocr_tokens": ["RED"]} for n in (k, k + 1)]
        for s, k in (("train", 0), ("validation", 2))}),
    "vqav2": ("lmms-lab/VQAv2", "default", {"validation": [
        {"question_type": "what", "multiple_choice_answer": "dark red", "answers": people(*TEN), "image_id": 1, "answer_type": "other", "question_id": 40 + n, "question": "Which?", "image": image(n)}
        for n in (0, 1)]}),
    "okvqa": ("lmms-lab/OK-VQA", "default", {"val2014": [
        {"question_id": f"{50 + n}", "image": image(n), "question": "Which sport?", "answers": ["race", "ride", "ride"], "question_type": "sports", "answer_type": "other"} for n in (0, 1)]}),
    "aokvqa": ("HuggingFaceM4/A-OKVQA", "default", {s: [
        {"image": image(n), "question_id": f"q{n}", "question": "What is the man awaiting?", "choices": ["skateboarder", "train", "delivery", "cab"], "correct_choice_idx": 3,
         "direct_answers": "['ride', 'cab']", "difficult_direct_answer": False, "rationales": ["A train would not be on the street."]} for n in (k, k + 1)] for s, k in (("train", 0), ("validation", 2))}),
    "scienceqa": ("lmms-lab/ScienceQA", "ScienceQA-IMG", {s: [
        {"image": image(n), "question": "Which is a solid?", "choices": ["water", "rock"], "answer": 1, "hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science",
         "topic": "physics", "category": "Materials", "skill": "Identify", "lecture": "", "solution": "Rock."} for n in (k, k + 1)] for s, k in (("train", 0), ("validation", 2), ("test", 4))}),
    "cord": ("naver-clova-ix/cord-v2", "default", {s: [
        {"image": image(n), "ground_truth": json.dumps({"gt_parse": RECEIPT, "meta": {"version": "2.0.0"}, "valid_line": [], "roi": {}})} for n in (k, k + 1)]
        for s, k in (("train", 0), ("validation", 2), ("test", 4))}),
    "flickr8k": ("jxie/flickr8k", "default", {s: [
        {"image": image(n), **{f"caption_{i}": f"caption {i} of {n} ." for i in range(5)}} for n in (k, k + 1)] for s, k in (("train", 0), ("validation", 2), ("test", 4))}),
    "flickr30k": ("lmms-lab/flickr30k", "default", {"test": [
        {"image": image(n), "caption": [f"caption {i} of {n}" for i in range(5)], "sentids": [str(i) for i in range(5)], "img_id": str(60 + n), "filename": f"{n}.jpg"} for n in (0, 1)]}),
    "nocaps": ("lmms-lab/NoCaps", "default", {s: [
        {"image": image(n), "image_coco_url": "https://x", "image_date_captured": "2018", "image_file_name": f"{n}.jpg", "image_height": 4, "image_width": 4, "image_id": 70 + n, "image_license": 0,
         "image_open_images_id": "x", "annotations_ids": [1, 2], "annotations_captions": captions} for n in (k, k + 1)]
        for s, k, captions in (("validation", 0, ["A baby.", "A small child."]), ("test", 2, []))}),
    "llava_onevision": ("lmms-lab/LLaVA-OneVision-Data", "llavar_gpt4_20k", {"train": [
        {"id": f"o{n}", "image": image(n), "conversations": [{"from": "human", "value": "<image>\nWhat does it say?"}, {"from": "gpt", "value": "Stop."}], "data_source": "llavar_gpt4_20k"} for n in (0, 1)]}),
    "the_cauldron": ("HuggingFaceM4/the_cauldron", "ai2d", {"train": [
        {"images": [image(n), image(n + 2)], "texts": [{"user": "Question: Which?", "assistant": "Answer: B", "source": "AI2D"}, {"user": "Sure?", "assistant": "Yes.", "source": "AI2D"}]} for n in (0, 1)]}),
    "rlaif_v": ("openbmb/RLAIF-V-Dataset", "default", {"train": [
        {"ds_name": "RLAIF-V", "image": image(n), "question": "What is it?", "chosen": "A dog.", "rejected": "A cat.", "origin_dataset": "COCO", "origin_split": "{}", "idx": n, "image_path": f"{n}.jpg"} for n in (0, 1)]}),
}  # fmt: skip
ASK, PAIR = ["user", "assistant"], {"train": 2, "validation": 2, "test": 2}
# name -> (splits, the first row: id, images, roles, prompt, answer, references, choices)
EXPECTED = {
    "docvqa": ({"train": 2, "validation": 2}, ["9", 1, ASK, "What is the date?", "May 1", ["May 1", "1 May", "May 1"], []]),
    "chartqa": (PAIR, ["1", 1, ASK, "How many?", "14", ["14"], []]),
    "textvqa": ({"train": 2, "validation": 2}, ["30", 1, ASK, "What colour?", "dark red", ["dark red", *["red"] * 4, *["dark red"] * 5], []]),
    "vqav2": ({"train": 2}, ["40", 1, ASK, "Which?", "dark red", ["dark red", *["red"] * 4, *["dark red"] * 5], []]),
    "okvqa": ({"train": 2}, ["50", 1, ASK, "Which sport?", "ride", ["ride", "race", "ride"], []]),
    "aokvqa": ({"train": 2, "validation": 2}, ["q0", 1, ASK, "What is the man awaiting?", "cab", ["cab"], ["skateboarder", "train", "delivery", "cab"]]),
    "scienceqa": (PAIR, ["1", 1, ASK, "Which is a solid?", "rock", ["rock"], ["water", "rock"]]),
    "cord": (PAIR, ["1", 1, ASK, "Write the receipt as JSON.", json.dumps(RECEIPT), [json.dumps(RECEIPT)], []]),
    "flickr8k": (PAIR, ["1", 1, ASK, "", "caption 0 of 0 .", [f"caption {i} of 0 ." for i in range(5)], []]),
    "flickr30k": ({"train": 2}, ["60", 1, ASK, "", "caption 0 of 0", [f"caption {i} of 0" for i in range(5)], []]),
    "nocaps": ({"train": 2}, ["70", 1, ASK, "", "A baby.", ["A baby.", "A small child."], []]),
    "llava_onevision": ({"train": 2}, ["o0", 1, ASK, "What does it say?", "Stop.", ["Stop."], []]),
    "the_cauldron": ({"train": 2}, ["1", 2, ASK * 2, "Sure?", "Yes.", ["Yes."], []]),
    "rlaif_v": ({"train": 2}, ["1", 1, ASK, "What is it?", "A dog.", ["A dog."], []]),
}  # fmt: skip


def repository(config, splits):
    """The files of a data set's repository: its card, which names the splits, and a parquet file for each."""
    folder = "data" if config == "default" else config
    card = "---\nconfigs:\n- config_name: " + config + "\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {folder}/{s}-*\n" for s in splits) + "---\n"
    files = {"README.md": card}
    for split, rows in splits.items():
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        files[f"{folder}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    home = tmp_path_factory.mktemp("known")
    with Hub() as server:
        for dataset, config, splits in SETS.values():
            server.add("datasets", dataset, repository(config, splits))
        environment = {**os.environ, **server.environment(home), "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(home / "out"), *SETS], env=environment, capture_output=True, text=True, timeout=280)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, done.stderr
    return json.loads(answers[0][6:])


@pytest.mark.parametrize("name", SETS)
def test_its_rows(prepared, name):
    found = prepared[name]
    splits, row = EXPECTED[name]
    assert "error" not in found, found
    assert found["splits"] == splits and found["rows"][0] == row
    assert found["notes"] == []


def test_every_preset_of_a_hub_is_here_and_cites_its_columns():
    folder = REPOSITORY / "conf" / "data"
    cited = {file.stem for file in folder.glob("*.yaml") if "\n# Columns: https://" in file.read_text(encoding="utf-8")}
    assert cited == {*SETS, "llava_instruct"}


def test_llava_instruct_of_two_photos(mmft, tmp_path):
    rows = [{"id": "000000033471", "image": f"{n}.png", "conversations": [{"from": "human", "value": "<image>\nWhat colours?"}, {"from": "gpt", "value": "Red."}]} for n in (0, 1)]
    write_json(tmp_path / "LLaVA-Instruct-150K" / "llava_instruct_150k.json", rows)
    (tmp_path / "train2017").mkdir()
    for n in (0, 1):
        (tmp_path / "train2017" / f"{n}.png").write_bytes(png(n))
    code, out, err = mmft("prepare", "data=llava_instruct", f"data.path={tmp_path / 'LLaVA-Instruct-150K'}", f"data.root={tmp_path / 'train2017'}", "data.splits.validation=1")
    assert code == 0 and "train 1 rows of 1 images, validation 1 rows of 1 images" in out, err
