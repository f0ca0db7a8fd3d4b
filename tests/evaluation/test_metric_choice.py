"""metrics=[...] from the command line to the leaderboard: chosen, refused before training, a user's own class, lower is better."""

import csv
import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """pictures(texts, name) -> a CSV of pictures and texts."""
    folder = tmp_path_factory.mktemp("metric_choice")

    def write(texts, name):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "text"])
            for n, text in enumerate(texts):
                Image.new("RGB", (28, 28), (n * 20 % 255, 80, 120)).save(folder / f"{name}{n}.png")
                writer.writerow([f"{name}{n}.png", text])
        return folder / f"{name}.csv"

    return write


def words(path, *more):
    return ["data=table", f"data.path={path.as_posix()}", "data.splits.validation=4", "data.splits.by=last", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2",
            "generation.max_new_tokens=4", "logger=none", "evaluation.samples=0", *more]  # fmt: skip


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_chosen_metrics_reach_summary_rows_and_page_with_their_direction(mmft, pictures, tmp_path):
    code, out, err = mmft(*words(pictures(["a cat", "a dog"] * 5, "plain")), "metrics=[cer,classes]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err
    summary = read(tmp_path / "run" / "summary.json")
    assert set(summary["metrics"]) == set(summary["base_metrics"]) == {"cer", "class_accuracy", "macro_f1"}
    assert summary["metric_info"]["cer"]["higher_is_better"] is False and set(summary["confusion"]["labels"]) <= {"a cat", "a dog", "(other)"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(r["metrics"]) == {"cer", "class_accuracy"} for r in rows) and "cider" not in out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Character error rate (lower is better)" in page and "Confusion matrix" in page
    # another selection for a finished run, without training it again
    code, out, err = mmft("evaluate", f"run={tmp_path.as_posix()}/run", "metrics=[text,chrf]")
    assert code == 0 and "token_f1" in out and "chrf" in out and "cer" not in out.split("metric")[-1].split()


def test_a_metric_that_no_row_can_have_is_refused_before_weights_and_the_way_forward_works(mmft, pictures, tmp_path):
    path = pictures(["a cat", "a dog"] * 5, "plain")
    code, _, err = mmft(*words(path), "metrics=[json,cer]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 2 and "json can score none of the 4 rows" in err and "leave json out of metrics=[...]" in err
    assert len([line for line in err.splitlines() if line.startswith("mmft: ")]) == 1 and not (tmp_path / "run").exists()
    code, _, err = mmft(*words(path), "metrics=[cer]", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err


def test_an_objective_must_be_measured(mmft, pictures):
    path = pictures(["a cat", "a dog"] * 5, "plain")
    code, _, err = mmft(*words(path), "rank_by=cer")
    assert code == 2 and "rank_by=cer: no such metric." in err and "metrics=[...] adds others" in err
    code, _, err = mmft(*words(path), "metrics=[cer]", "rank_by=cider")
    assert code == 2 and "There are: eval_loss, cer" in err


MINE = '''
from mmft.evaluation.metrics.base import Metric, Score


class Length(Metric):
    """How far the answer's length is from `wanted`; lower is better."""

    SCORES = (Score("length_error", "Length error", higher_is_better=False, top=None),)

    def __init__(self, wanted: int = 10) -> None:
        self.wanted = wanted

    def row(self, row):
        if row["references"][0] == "a hen":
            raise RuntimeError("no hens")
        return {"length_error": float(abs(len(row["prediction"]) - self.wanted))}
'''


def test_a_users_class_ranks_a_sweep_with_lower_values_first(mmft, pictures, tmp_path, monkeypatch):
    package, config = tmp_path / "mine_metrics", tmp_path / "conf" / "metrics"
    package.mkdir()
    config.mkdir(parents=True)
    (package / "__init__.py").write_text(MINE, encoding="utf-8")
    (config / "length.yaml").write_text("length:\n  _target_: mine_metrics.Length\n  wanted: 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = pictures(["a cat", "a dog", "a hen"] * 5, "hens")
    command = [*words(path, "evaluation.base=false"), "metrics=[length]", "rank_by=length_error", "--config-dir", str(tmp_path / "conf")]
    code, _, err = mmft(*command)
    assert code == 2 and "MMFT_PACKAGES" in err
    monkeypatch.setenv("MMFT_PACKAGES", "mine_metrics")
    code, out, err = mmft("-m", *command, "generation.max_new_tokens=1,6", "generation.min_new_tokens=1")
    assert code == 0, err
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    with (folder / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(r["length_error"]) for r in rows]
    assert values == sorted(values) and values[0] < values[1] and "Length error" in (folder / "report.html").read_text(encoding="utf-8")
    summary = read(folder / rows[0]["run"] / "summary.json")
    assert 0 < summary["metric_info"]["length_error"]["missing"] < 4 and "metric length: row" in out + err and "no hens" in out + err


def test_the_best_checkpoint_by_a_metric_where_lower_is_better(mmft, pictures, tmp_path):
    more = ["metrics=[cer]", "evaluation.generate=true", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1",
            "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=cer", "trainer.learning_rate=0.02", "trainer.max_steps=4"]  # fmt: skip
    code, _, err = mmft(*words(pictures(["a cat", "a dog"] * 5, "plain")), *more, f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [row["eval_cer"] for row in rows if "eval_cer" in row]
    assert len(set(measured)) > 1, "or the choice cannot be seen"
    assert read(tmp_path / "run" / "summary.json")["metrics"]["cer"] == pytest.approx(min(measured))


def test_a_data_set_names_its_metrics_and_the_command_overrides_them(mmft, pictures, tmp_path):
    path = pictures(["a cat", "a dog"] * 5, "plain")
    folder = tmp_path / "conf" / "data"
    folder.mkdir(parents=True)
    (folder / "pages.yaml").write_text(f"defaults:\n  - table\n  - override /metrics@_global_.metrics: [cer, wer]\npath: {path.as_posix()}\n", encoding="utf-8")
    for more, expected in (([], {"cer", "wer"}), (["metrics=[anls]"], {"anls"})):
        code, out, err = mmft("--config-dir", str(tmp_path / "conf"), "data=pages", *more, "--cfg", "job", output_dir=False)
        assert code == 0, err
        import yaml

        assert set(yaml.safe_load(out)["metrics"]) == expected


def test_a_missing_library_is_named_with_its_installation(mmft, pictures, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jiwer" else real(name, *a))
    code, _, err = mmft(*words(pictures(["a cat", "a dog"] * 5, "plain")), "metrics=[cer]")
    assert code == 2 and "metrics.cer needs the package jiwer: pip install 'mmft[metrics]'" in err
