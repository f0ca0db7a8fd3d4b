"""evaluation.keep: base and tuned model on what must not be lost, from the command line to summary, pages, sweeps and later verbs."""

import csv
import json
import re

import pytest

QUICK = ["data.pictures=24", "data.splits.validation=4", "trainer.max_steps=3", "trainer.learning_rate=0.01", "trainer.warmup_steps=0",
         "trainer.per_device_train_batch_size=4", "evaluation.samples=0", "generation.max_new_tokens=6", "logger=none", "lora.r=2"]  # fmt: skip
KEEP = ["evaluation.keep=scenes", "evaluation.keep.scenes.data.pictures=20", "evaluation.keep.scenes.data.splits.validation=5",
        "evaluation.keep_metrics=[exact_match,cider]"]  # fmt: skip
SCENES = [word.replace("evaluation.keep.scenes.", "") for word in KEEP[1:3]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    from mmft.cli.main import main

    place = tmp_path_factory.mktemp("kept")
    assert main([*QUICK, *KEEP, f"output_dir={place.as_posix()}", f"run_dir={(place / 'run').as_posix()}"]) == 0
    return place / "run"


def test_the_summary_has_both_models_with_the_difference_and_the_rows(kept_run, mmft):
    summary = read(kept_run / "summary.json")
    names = {"keep.scenes.exact_match", "keep.scenes.cider", "keep.scenes.loss"}
    assert names < set(summary["metrics"]) and names < set(summary["base_metrics"]) and names < set(summary["gains"])
    assert summary["keep"]["scenes"]["rows"] == 5 and summary["keep"]["scenes"]["answer_counts"]["references_per_row"] == 1
    base, tuned = (rows(kept_run / "eval" / "keep" / f"scenes_{which}.jsonl") for which in ("base", "tuned"))
    assert len(base) == len(tuned) == 5 and [r["id"] for r in base] == [r["id"] for r in tuned]
    # by hand from the rows: the share of equal answers, the loss per token
    equal = [sum(r["prediction"].strip() == r["references"][0] for r in which) / 5 for which in (base, tuned)]
    assert [summary[k]["keep.scenes.exact_match"] for k in ("base_metrics", "metrics")] == equal
    loss = sum(r["loss"] for r in tuned) / sum(r["loss_tokens"] for r in tuned)
    assert summary["metrics"]["keep.scenes.loss"] == pytest.approx(loss) and summary["gains"]["keep.scenes.loss"]["rows"] == 5
    assert summary["gains"]["keep.scenes.loss"]["value"] == pytest.approx(loss - summary["base_metrics"]["keep.scenes.loss"])
    # the base is the model itself on that set, as another verb measures it
    code, _, err = mmft("evaluate", "data=scenes", *SCENES, "metrics=[exact_match,cider]", "generation.max_new_tokens=6")
    assert code == 0, err
    (alone,) = re.findall(r"^page +(.+)\.html$", err + _, re.M)
    with open(f"{alone}.json", encoding="utf-8") as file:
        measured = json.load(file)
    assert measured["metrics"]["exact_match"] == equal[0] and measured["eval_loss"] == pytest.approx(summary["base_metrics"]["keep.scenes.loss"])


def test_pages_card_and_terminal_show_it(kept_run, mmft):
    html, text, card = (kept_run / name for name in ("report.html", "report.md", "adapter/README.md"))
    assert "Kept: scenes, base against tuned" in html.read_text(encoding="utf-8") and "Kept, scenes: CIDEr" in html.read_text(encoding="utf-8")
    assert "## Kept: scenes, base against tuned" in text.read_text(encoding="utf-8")
    page = card.read_text(encoding="utf-8")
    assert "What was to be kept, `scenes`" in page and page.count("| 95 % interval |") == 2 and "| keep.scenes" not in page
    code, out, _ = mmft("report", f"run={kept_run.as_posix()}", output_dir=False)
    assert code == 0 and "Kept: scenes, base against tuned" in out and "5 rows, 1 reference per row." in out and max(map(len, out.splitlines())) <= 100


def test_evaluate_measures_it_again_and_adds_another_set(kept_run, mmft):
    """The same values, up to the rounding of other batches; a set that training did not know, with metrics and a limit of its own."""
    summary, place = read(kept_run / "summary.json"), f"output_dir={kept_run.parent.as_posix()}"
    before = set((kept_run / "eval").glob("*.json"))
    code, out, err = mmft("evaluate", f"run={kept_run.as_posix()}", "base=true", place, output_dir=False)
    assert code == 0, err
    (first,) = set((kept_run / "eval").glob("*.json")) - before
    again = read(first)
    assert again["metrics"] == pytest.approx(summary["metrics"], abs=1e-5) and again["base_metrics"] == pytest.approx(summary["base_metrics"], abs=1e-5)
    assert again["gains"].keys() == summary["gains"].keys()
    for name, gain in again["gains"].items():
        assert [gain[k] for k in ("value", "low", "high")] == pytest.approx([summary["gains"][name][k] for k in ("value", "low", "high")], abs=1e-4), name
    answers = [[json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").splitlines()] for path in (
        kept_run / "eval" / f"{first.stem}_keep_scenes_base.jsonl", kept_run / "eval" / "keep" / "scenes_base.jsonl")]  # fmt: skip
    assert answers[0] == answers[1]
    code, out, err = mmft("evaluate", f"run={kept_run.as_posix()}", "evaluation.keep=shapes", "evaluation.keep.shapes.data.pictures=12", "evaluation.keep.shapes.data.splits.validation=3",
                          "evaluation.keep_metrics=token_f1", "evaluation.max_samples=3", place, output_dir=False)  # fmt: skip
    assert code == 0, err
    (second,) = set((kept_run / "eval").glob("*.json")) - before - {first}
    other = read(second)
    assert {n for n in other["metrics"] if n.startswith("keep.")} == {"keep.shapes.token_f1", "keep.shapes.loss"} and "Kept: shapes" in out


@pytest.mark.parametrize(("words", "message"), [
    (["evaluation.keep=scense"], "evaluation.keep=scense: no such data set, nor a folder of prepared data. Did you mean scenes?"),
    (["evaluation.keep=table", "evaluation.keep.table.data.path=/no/such.csv"], "evaluation.keep=table: "),
    ([*KEEP[:2], "evaluation.keep.scenes.data.splits.validation=0"], "evaluation.keep=scenes: has no held-out rows: its splits are {'train': 20}"),
    ([*KEEP[:3], "evaluation.keep_metrics=[json]"], "evaluation.keep=scenes: evaluation.keep_metrics: json can score none of the 5 rows"),
    (["evaluation.keep_metrics=cider"], "evaluation.keep_metrics: says what is measured on the sets of evaluation.keep; name these too"),
    ([*KEEP, "rank_by=keep.scenes.bleu4"], "rank_by=keep.scenes.bleu4: no such metric."),
    ([*KEEP, "trainer.metric_for_best_model=keep.scenes.cider", "trainer.eval_strategy=epoch"], "are measured before and after training, not during it"),
])  # fmt: skip
def test_a_set_that_cannot_be_measured_is_refused_in_one_line_before_training(mmft, tmp_path, words, message):
    code, out, err = mmft(*QUICK, *words, f"run_dir={tmp_path.as_posix()}/run")
    assert code == 2 and message in err and not (tmp_path / "run").exists(), err
    assert len([line for line in err.splitlines() if line.startswith("mmft: ")]) == 1 and "Traceback" not in err


def test_the_ways_on_of_these_messages_work(tmp_path):
    from mmft.config.compose import compose
    from mmft.config.plain import resolved
    from mmft.evaluation.kept import kept_sets

    words = [*KEEP[:2], "evaluation.keep.scenes.data.splits.validation=0.1", "evaluation.keep_metrics=[cider]", "rank_by=keep.scenes.cider", f"output_dir={tmp_path.as_posix()}"]
    (kept,) = kept_sets(resolved(compose(words)))
    assert len(kept.rows) == 2 and list(kept.metrics.metrics) == ["cider"]


def test_prepared_folders_and_hydras_own_way_name_a_set(kept_run):
    from mmft.config.compose import compose
    from mmft.config.plain import resolved
    from mmft.evaluation.kept import kept_sets

    (folder,) = (kept_run.parent / "data").glob("scenes-*/")
    (by_folder,) = kept_sets(resolved(compose([f"evaluation.keep={folder.as_posix()}", "evaluation.keep_metrics=cider"])))
    place = f"output_dir={kept_run.parent.as_posix()}"
    (by_group,) = kept_sets(resolved(compose(["+data@evaluation.keep.old.data=scenes", "evaluation.keep.old.data.pictures=20", "evaluation.keep.old.data.splits.validation=5", place])))
    assert by_folder.prepared.fingerprint == by_group.prepared.fingerprint == read(kept_run / "summary.json")["keep"]["scenes"]["fingerprint"]
    assert (by_folder.name, by_group.name) == ("scenes", "old") and list(by_folder.metrics.metrics) == ["cider"] and len(by_group.metrics.metrics) == 8


def test_the_snapshot_of_a_run_carries_it(kept_run):
    """What `reproduce` and --config-name snapshot train again."""
    from omegaconf import OmegaConf

    from mmft.config.compose import compose
    from mmft.runs.open import read_snapshot

    first = OmegaConf.to_container(read_snapshot(kept_run).evaluation)
    assert first["keep"]["scenes"]["data"]["pictures"] == 20 and list(first["keep"]["scenes"]["metrics"]) == ["exact_match", "cider"]
    assert OmegaConf.to_container(compose([], kept_run.as_posix(), "snapshot").evaluation) == first
    changed = compose(["evaluation.keep_metrics=[cer]", "evaluation.keep.scenes.data.pictures=30"], kept_run.as_posix(), "snapshot").evaluation.keep.scenes
    assert list(changed.metrics) == ["cer"] and changed.data.pictures == 30


@pytest.mark.parametrize("launcher", ["basic", "joint"])
@pytest.mark.long
def test_a_sweep_ranks_by_it_and_measures_the_base_once(mmft, tmp_path, monkeypatch, launcher):
    from mmft.evaluation import measurement
    from mmft.pipeline import measure

    measured = []
    monkeypatch.setattr(measure, "measure", lambda evaluator, model: measured.append(len(evaluator.rows)) or measurement.measure(evaluator, model))
    code, out, err = mmft("-m", *QUICK[:-1], *KEEP, "lora.r=1,2", "rank_by=keep.scenes.cider", f"hydra/launcher={launcher}")
    assert code == 0, err
    assert measured == [4, 5], "own rows and kept rows, once for both points"
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    with (sweep / "leaderboard.csv").open(encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    values = [float(p["keep.scenes.cider"]) for p in points]
    assert values == sorted(values, reverse=True) and all("keep.scenes.loss" in p for p in points)
    for p in points:
        summary = read(sweep / p["run"] / "summary.json")
        assert summary["metrics"]["keep.scenes.cider"] == float(p["keep.scenes.cider"])
    assert points[1]["to_best"] and float(points[1]["to_best"]) == pytest.approx(values[1] - values[0])
    page, text = ((sweep / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "scenes: Exact match" in page and "scenes: Exact match" in text and "ranked by scenes: CIDEr" in out
