"""evaluate: the very figures of training, files that name what was measured, a page, and a model without a run."""

import json
import re

import pytest
from verb_data import draw, lines


@pytest.fixture
def evaluated(verb, run_copy, capfd):
    """evaluate(...) on a fresh copy of the run -> (its summary, the NAME of its files)."""

    def call(*words):
        before = set((run_copy / "eval").glob("*.json"))
        code, out, err = verb("evaluate", f"run={run_copy.as_posix()}", *words, run=False)
        assert code == 0, err
        (new,) = set((run_copy / "eval").glob("*.json")) - before
        return json.loads(new.read_text(encoding="utf-8")), new.stem

    return call


def test_it_gives_what_training_measured_to_the_last_digit(evaluated, trained, run_copy):
    """Loss, metrics and every answer, of the adapter and of the base with the adapter switched off."""
    summary, name = evaluated("base=true")
    trained_summary = trained.json("summary.json")
    for key in ("eval_loss", "metrics", "base_eval_loss", "base_metrics"):
        assert summary[key] == trained_summary[key], key
    assert lines(run_copy / "eval" / f"{name}.jsonl") == trained.lines("eval/tuned.jsonl")
    assert lines(run_copy / "eval" / f"{name}_base.jsonl") == trained.lines("eval/base.jsonl")
    assert summary["eval_loss"] != summary["base_eval_loss"], "or nothing was switched"


def test_each_evaluation_has_files_of_its_own_and_the_same_one_replaces_them(evaluated, verb, run_copy):
    held = {p.name: p.read_bytes() for p in (run_copy / "eval").iterdir()}
    names = [evaluated(*words)[1] for words in ([], ["evaluation.split=test"], ["checkpoint=2"], ["evaluation.max_samples=4"], ["generation.max_new_tokens=3"])]
    assert len(set(names)) == 5 and "_test_" in names[1] and "_checkpoint-2_" in names[2]
    files = {p.name for p in (run_copy / "eval").iterdir()}
    assert verb("evaluate", f"run={run_copy.as_posix()}", "evaluation.split=test", run=False)[0] == 0
    assert {p.name for p in (run_copy / "eval").iterdir()} == files
    assert {name: (run_copy / "eval" / name).read_bytes() for name in held} == held, "training's own files stay as they are"
    written = [line["wrote"] for line in lines(run_copy / "verbs.jsonl")][-6:]  # other verbs were here before
    assert len(written) == 6 and written[1] == written[5] == [f"eval/{names[1]}{end}" for end in (".jsonl", ".json", ".html")]


def test_a_checkpoint_and_another_split_are_really_measured(evaluated):
    final, early, test = evaluated()[0], evaluated("checkpoint=2")[0], evaluated("evaluation.split=test")[0]
    assert final["rows"] == early["rows"] == 6 and test["rows"] == 3
    assert len({final["eval_loss"], early["eval_loss"], test["eval_loss"]}) == 3
    assert evaluated("checkpoint=4")[0]["eval_loss"] == final["eval_loss"]


def test_another_data_set(evaluated, tmp_path):
    draw(tmp_path / "others", 5)
    summary, name = evaluated("data=table", f"data.path={(tmp_path / 'others' / 'rows.csv').as_posix()}", "data.name=others", "data.splits.validation=0",
                              "evaluation.split=train")  # fmt: skip
    assert name.startswith("others_train_") and summary["rows"] == 5


def test_a_model_without_a_run_gets_a_directory(mmft, trained, tmp_path):
    code, out, err = mmft("evaluate", *[w for w in trained.words if not w.startswith(("output_dir", "trainer"))])
    assert code == 0, err
    (folder,) = [p for p in (tmp_path / "outputs").iterdir() if p.name != "data"]
    (figures,) = (folder / "eval").glob("*.json")
    figures = json.loads(figures.read_text(encoding="utf-8"))
    assert figures["eval_loss"] == trained.json("summary.json")["base_eval_loss"] and figures["metrics"] == trained.json("summary.json")["base_metrics"]
    assert (folder / "snapshot.yaml").is_file() and f"{figures['eval_loss']:.3f}" in out


def test_the_page_shows_every_sample_best_first_and_asks_for_nothing_from_outside(evaluated, trained, run_copy):
    _, name = evaluated("base=true")
    page = (run_copy / "eval" / f"{name}.html").read_text(encoding="utf-8")
    rows = trained.lines("eval/tuned.jsonl")
    assert page.count("data:image/") == len(rows) == page.count('<article class="sample">')
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page) and "<script" not in page
    order = [int(i) for i in re.findall(r'<p class="id">(\d+) ', page)]
    scores = [rows[i]["metrics"]["token_f1"] for i in order]
    assert sorted(order) == list(range(6)) and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["evaluate", "run=nowhere"], "run=nowhere: no such directory"),
        (["evaluate", "run={run}", "checkpoint=3"], "there are: 2, 4"),
        (["evaluate", "run={run}", "seed=1"], "brings its own seed"),
        (["evaluate", "run={run}", "lora.r=2"], "brings its own lora"),
        (["evaluate", "run={run}", "evaluation.split=tests"], "holds no tests rows|has no such rows"),
        (["evaluate", "run={run}", "evaluation.split=null"], "evaluation.split must be given"),
        (["evaluate", "run={run}", "generation.num_return_sequences=2"], "one text is kept"),
        (["evaluate", "run={run}", "chekpoint=2"], "Did you mean checkpoint?"),
        (["evaluate", "base=true"], "its own base"),
        (["evaluate", "checkpoint=2"], "checkpoints belong to a run"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(mmft, trained, words, expected):
    before = sorted(p.name for p in (trained.run / "eval").iterdir())
    code, _, err = mmft(*[w.format(run=trained.run.as_posix()) for w in words])
    assert code == 2 and re.search(expected, err) and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in (trained.run / "eval").iterdir()) == before


def test_several_runs_with_m(mmft, trained, run_copy, tmp_path):
    code, out, err = mmft("-m", "evaluate", f"run={trained.run.as_posix()},{run_copy.as_posix()}", "evaluation.max_samples=2")
    assert code == 0, err
    names = [{p.name for p in (run / "eval").glob("*.json")} for run in (trained.run, run_copy)]
    assert names[0] == names[1] and len(names[0]) == 1
    for new in (trained.run / "eval").glob(next(iter(names[0])).replace(".json", "*")):
        new.unlink()
