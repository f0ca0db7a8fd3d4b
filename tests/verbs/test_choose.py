"""evaluation.answer=choose from training to predict and compare: probabilities in files and on pages; rows without choices are refused."""

import csv
import json
import re

import pytest
from verb_data import QUESTION, draw, lines

CHOICES = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("square", "circle")]
GIVEN = f"[{','.join(CHOICES)}]"


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory):
    """(run, pictures): chosen while training, by base and tuned, with the metrics of classes."""
    from mmft.cli.main import main

    home = tmp_path_factory.mktemp("choose")
    draw(home / "pictures", 24)
    words = ["data=table", f"data.path={(home / 'pictures' / 'rows.csv').as_posix()}", "data.columns.prompt=prompt", "data.splits.validation=6",
             f"data.choices={GIVEN}", "evaluation.answer=choose", "evaluation.generate=true", "metrics=[classes,calibration]", "trainer.eval_strategy=steps",
             "trainer.eval_steps=2", "trainer.metric_for_best_model=class_accuracy", "trainer.load_best_model_at_end=true", "trainer.save_strategy=steps", "trainer.save_steps=2",
             "trainer.max_steps=4", "trainer.learning_rate=0.02", "trainer.warmup_steps=0", "logger=none", "evaluation.sample_steps=2",
             f"output_dir={(home / 'outputs').as_posix()}", f"run_dir={(home / 'outputs' / 'run').as_posix()}"]  # fmt: skip
    assert main(words) == 0
    return home / "outputs" / "run", home / "pictures"


def plain_probabilities(run, row):
    """Each choice's probability by plain peft and transformers: softmax of the summed log-likelihoods of its tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmft.data.images import open_image

    processor = AutoProcessor.from_pretrained(run / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    picture = open_image(f"{row['root']}/{row['images'][0]}")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}
    before = processor.apply_chat_template([user], add_generation_prompt=True)
    found = {}
    for choice in CHOICES:
        text = before + choice + processor.tokenizer.eos_token
        whole, prompt = (processor(text=t, images=[picture], return_tensors="pt", add_special_tokens=False) for t in (text, before))
        with torch.no_grad():
            logits = model(**whole).logits[0, :-1].log_softmax(-1)
        ids, start = whole["input_ids"][0, 1:], prompt["input_ids"].shape[1] - 1
        found[choice] = logits[start:].gather(1, ids[start:, None]).sum()
    values = torch.stack(list(found.values())).double().softmax(0).tolist()
    return dict(zip(found, values, strict=True))


def test_training_chooses_and_keeps_probabilities_that_plain_transformers_has(chosen_run):
    run, _ = chosen_run
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["metrics"]) == {"class_accuracy", "macro_f1", "ece"} == set(summary["base_metrics"])
    assert summary["metric_info"]["ece"]["higher_is_better"] is False
    rows = lines(run / "eval" / "tuned.jsonl")
    for row in rows:
        assert list(row["probabilities"]) == CHOICES and sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == max(CHOICES, key=row["probabilities"].get)
    assert rows[0]["probabilities"] == pytest.approx(plain_probabilities(run, rows[0]), abs=1e-5)
    assert summary["metrics"]["class_accuracy"] == sum(r["prediction"] in r["references"] for r in rows) / len(rows)
    measured = [m for m in lines(run / "metrics.jsonl") if "eval_class_accuracy" in m]
    assert [m["step"] for m in measured] == [2, 4] and all("eval_ece" in m for m in measured)
    assert all(s["probabilities"] for entry in lines(run / "eval" / "samples.jsonl") for s in entry["samples"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("Reliability diagram of") == 2 and "Calibration error (ECE) (lower is better)" in page and re.search(r'class="chance">p 0\.\d\d<', page)
    assert f"tuned: 6 answers, ECE {summary['metrics']['ece']:.3f}" in page


def test_evaluate_with_another_norm_and_generated_answers(mmft, chosen_run):
    run, _ = chosen_run
    for words, has in ((["evaluation.choice_norm=prior"], True), (["evaluation.answer=generate", "metrics=[classes]", "generation.max_new_tokens=4"], False)):
        code, _, err = mmft("evaluate", f"run={run.as_posix()}", *words, f"output_dir={run.parent.as_posix()}", output_dir=False)
        assert code == 0, err
        newest = max((run / "eval").glob("table_validation_*.json"), key=lambda p: p.stat().st_mtime_ns)
        rows = lines(newest.with_suffix(".jsonl"))
        assert all(("probabilities" in row) is has for row in rows) and ("ece" in json.loads(newest.read_text())["metrics"]) is has
        assert ("Reliability diagram" in newest.with_suffix(".html").read_text(encoding="utf-8")) is has
    by_norm = {json.loads(p.read_text()).get("choice_norm") for p in (run / "eval").glob("table_validation_*.json")}
    assert by_norm == {"prior", None}


def test_predict_writes_the_choice_and_the_probability_of_each(mmft, chosen_run, tmp_path):
    run, pictures = chosen_run
    words = ["predict", f"run={run.as_posix()}", f"input={pictures.as_posix()}"]
    code, _, err = mmft(*words, "choose=[a red square,a blue circle]", f"out={tmp_path.as_posix()}/a.csv", output_dir=False)
    assert code == 0, err
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and list(rows[0])[-2:] == ["p(a red square)", "p(a blue circle)"]
    for row in rows:
        chances = {c: float(row[f"p({c})"]) for c in ("a red square", "a blue circle")}
        assert row["prediction"] == max(chances, key=chances.get) and sum(chances.values()) == pytest.approx(1)
    # without choose=, those of the run; the held-out rows again as training chose them
    code, _, err = mmft(*words[:2], "input=validation", f"out={tmp_path.as_posix()}/b.jsonl", f"output_dir={run.parent.as_posix()}", output_dir=False)
    assert code == 0, err
    again, before = lines(tmp_path / "b.jsonl"), lines(run / "eval" / "tuned.jsonl")
    assert [r["prediction"] for r in again] == [r["prediction"] for r in before]
    assert [r["probabilities"] for r in again] == [pytest.approx(r["probabilities"], abs=1e-5) for r in before]
    code, out, err = mmft(*words[:2], f"input={pictures.as_posix()}/0.png", output_dir=False)
    assert code == 0 and out.strip() in CHOICES and f"{CHOICES[0]} 0." in err


def test_predict_with_a_table_of_choices_and_with_letters(mmft, chosen_run, tmp_path):
    run, pictures = chosen_run
    table = pictures / "asked.jsonl"
    rows = [{"image": "0.png", "prompt": "Which?", "choices": ["red", "blue"]}, {"image": "1.png", "prompt": "A. red B. blue C. green"}]
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["predict", f"run={run.as_posix()}", f"input={table.as_posix()}", "data.choices=null"]
    code, _, err = mmft(*words, output_dir=False)
    assert code == 2 and "asked.jsonl:2: it has no choices: add choose=[A,B]" in err
    code, _, err = mmft(*words, "choose=letters", output_dir=False)
    assert code == 2 and "asked.jsonl:1: its prompt does not name options A, B" in err
    table.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "choices": ["A", "B", "C"]}), encoding="utf-8")
    code, _, err = mmft(*words, f"out={tmp_path.as_posix()}/a.csv", output_dir=False)
    assert code == 0, err
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert [list(json.loads(row["probabilities"])) for row in csv.DictReader(file)] == [["red", "blue"], ["A", "B", "C"]]


def test_a_model_without_a_run_chooses(mmft, chosen_run, tmp_path):
    _, pictures = chosen_run
    code, out, err = mmft("predict", f"input={pictures.as_posix()}/0.png", f"prompt={QUESTION}", "choose=[cat,dog]")
    assert code == 0 and out.strip() in ("cat", "dog"), err


def test_compare_shows_what_base_and_tuned_choose(mmft, chosen_run, tmp_path):
    run, _ = chosen_run
    code, _, err = mmft("compare", f"run={run.as_posix()}", "index=[0,1]", f"out={tmp_path.as_posix()}/page.html", f"output_dir={run.parent.as_posix()}", output_dir=False)
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="chance"') == 4 and page.count("Reliability diagram of") == 2


def test_rows_without_choices_are_refused_before_training_and_the_ways_on_work(mmft, chosen_run, tmp_path):
    _, pictures = chosen_run
    words = ["data=table", f"data.path={(pictures / 'rows.csv').as_posix()}", "data.columns.prompt=prompt", "data.splits.validation=6", "trainer.max_steps=1",
             "evaluation.base=false", "logger=none", "generation.max_new_tokens=2"]  # fmt: skip
    code, _, err = mmft(*words, "evaluation.answer=choose", f"run_dir={tmp_path.as_posix()}/run")
    said = [line for line in err.splitlines() if line.startswith("mmft: ")]
    assert code == 2 and len(said) == 1 and "6 of 6 rows of validation have no choices" in said[0] and "data.choices=[A,B]" in said[0]
    assert not (tmp_path / "run").exists()
    code, _, err = mmft(*words, "metrics=[calibration]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 2 and "calibration needs the probabilities of evaluation.answer=choose" in err and not (tmp_path / "run").exists()
    code, _, err = mmft(*words, "evaluation.answer=chose")
    assert code == 2 and "must be generate or choose. Did you mean choose?" in err
    code, _, err = mmft(*words, "evaluation.choice_norm=tokens")
    assert code == 2 and "Did you mean token?" in err
    code, _, err = mmft(*words, "evaluation.answer=choose", f"data.choices={GIVEN}", "metrics=[calibration]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err


def test_a_missing_choice_is_named_and_counted(mmft, chosen_run):
    _, pictures = chosen_run
    words = ["prepare", "data=table", f"data.path={(pictures / 'rows.csv').as_posix()}", "data.columns.prompt=prompt", "data.choices=[a red square,a blue square]"]
    code, _, err = mmft(*words)
    assert code == 2 and "reference not among the choices" in err and "data.max_bad_share" in err
    code, out, err = mmft(*words, "data.max_bad_share=1", "data.splits.validation=1")
    assert code == 0 and re.search(r"\d+ reference not among the choices", out), err
