"""generation.max_new_tokens: derived from the references, the same for every verb of a run; answers that reach it are counted."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

SHORT, LONG = "a red cat", "a red cat sits on a mat and looks at the dog beside it"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """table(texts, name) -> a CSV of that many pictures and texts."""
    folder = tmp_path_factory.mktemp("pictures")

    def write(texts: list[str], name: str = "rows") -> Path:
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "text"])
            for n, text in enumerate(texts):
                Image.new("RGB", (28, 28), (n * 20 % 255, 80, 120)).save(folder / f"{name}{n}.png")
                writer.writerow([f"{name}{n}.png", text])
        return path

    return write


def words(path: Path, *more: str) -> list[str]:
    return ["data=table", f"data.path={path.as_posix()}", "data.splits.validation=4", "data.splits.by=last", "trainer.max_steps=1",
            "trainer.per_device_train_batch_size=2", "logger=none", "evaluation.samples=0", *more]  # fmt: skip


def tokens(text: str) -> int:
    """Tokens of a text with its end token, by the tokenizer's own file."""
    from tokenizers import Tokenizer

    import mmft

    return len(Tokenizer.from_file(str(Path(mmft.__file__).parent / "assets" / "tiny" / "tokenizer.json")).encode(text, add_special_tokens=False).ids) + 1


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """(run, its stderr and stdout): eight rows to train on, four held out, the longest held-out text LONG."""
    import contextlib
    import io

    from mmft.cli.main import main

    home = tmp_path_factory.mktemp("limit")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main([*words(table([SHORT] * 8 + [SHORT, LONG, SHORT, SHORT])), f"output_dir={home.as_posix()}", f"run_dir={(home / 'run').as_posix()}"]) == 0
    return home / "run", out.getvalue()


def expected(longest: str) -> int:
    return tokens(longest) * 5 // 4 + 8


def test_the_limit_is_that_of_the_longest_held_out_reference_and_is_recorded(trained):
    run, output = trained
    assert read(run / "summary.json")["max_new_tokens"] == read(run / "env.json")["max_new_tokens"] == expected(LONG) > tokens(LONG)
    assert read(run / "summary.json")["longest_reference"] == tokens(LONG)
    assert "max_new_tokens: auto" in (run / "snapshot.yaml").read_text(encoding="utf-8")
    assert read(run / "adapter" / "generation_config.json")["max_new_tokens"] == expected(LONG)
    assert output.count("at most") == 1 and f"at most {expected(LONG)} new tokens (the longest of 4 references has {tokens(LONG)})" in output


@pytest.mark.long
def test_every_verb_of_the_run_uses_the_recorded_limit(trained, table, mmft):
    """A set with shorter references does not shorten it, one with longer references is named."""
    run, _ = trained
    for text, more in ((SHORT, ""), (" ".join([LONG] * 9), "too few for all references of 4 of 4 rows")):
        path = table([text] * 4, f"other{len(text)}")
        code, out, err = mmft("evaluate", f"run={run.as_posix()}", "data=table", f"data.path={path.as_posix()}", "data.splits.validation=0", "evaluation.split=train")
        assert code == 0, err
        newest = max((run / "eval").glob("*.json"), key=lambda p: p.stat().st_mtime)
        assert read(newest)["max_new_tokens"] == expected(LONG) and read(newest)["longest_reference"] == tokens(text) and more in out + err
    code, out, err = mmft("evaluate", f"run={run.as_posix()}", "generation.max_new_tokens=auto")  # typed: still the run's own
    assert code == 0 and f"at most {expected(LONG)} new tokens" in out + err


def test_answers_without_an_end_are_marked_counted_and_shown(trained, mmft):
    run, _ = trained
    generation = ["generation.max_new_tokens=3", "generation.min_new_tokens=3"]  # the end token is forbidden before the limit
    code, out, err = mmft("evaluate", f"run={run.as_posix()}", "base=true", *generation)
    assert code == 0, err
    newest = max((run / "eval").glob("*.json"), key=lambda p: p.stat().st_mtime)
    summary = read(newest)
    assert summary["answer_counts"] == summary["base_answer_counts"] == {"rows": 4, "references_per_row": 1.0, "truncated": 4, "left_out": 0}
    assert [row["truncated"] for row in rows(newest.with_suffix(".jsonl"))] == [True] * 4
    text = " ".join(out.split())
    assert "4 rows, 1 reference per row." in text and "base 4, tuned 4" in text
    assert f"The longest reference has {tokens(LONG)} tokens, more than generation.max_new_tokens=3" in text
    page = newest.with_suffix(".html").read_text(encoding="utf-8")
    assert "base 4, tuned 4" in page and "cut off</span>" in page


@pytest.mark.parametrize("more", [[], ["generation.num_beams=2"], ["generation.do_sample=true"]])
def test_an_end_token_at_the_last_place_is_an_end(trained, mmft, tmp_path, more):
    from transformers import AutoTokenizer

    run, _ = trained
    end = AutoTokenizer.from_pretrained(run / "adapter").eos_token_id
    code, _, err = mmft("predict", f"run={run.as_posix()}", "input=validation", f"out={tmp_path.as_posix()}/a.jsonl", "generation.max_new_tokens=3",
                        "generation.min_new_tokens=2", f"generation.forced_eos_token_id={end}", *more)  # fmt: skip
    assert code == 0, err
    assert [row["truncated"] for row in rows(tmp_path / "a.jsonl")] == [False] * 4


def test_predict_marks_them_in_the_csv_and_says_how_many(trained, mmft, tmp_path):
    run, _ = trained
    code, out, err = mmft("predict", f"run={run.as_posix()}", "input=validation", f"out={tmp_path.as_posix()}/a.csv", "generation.max_new_tokens=3",
                          "generation.min_new_tokens=3")  # fmt: skip
    assert code == 0, err
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert [row["truncated"] for row in csv.DictReader(file)] == ["true"] * 4
    assert "4 of 4 answers stopped at the limit of new tokens" in out + err and "references per row" in out


def test_the_longest_of_several_references_counts_and_a_row_whose_shortest_fits_is_not_too_long(table, mmft, tmp_path):
    path = tmp_path / "rows.jsonl"
    for n in range(8):
        Image.new("RGB", (28, 28), (n * 30, 0, 0)).save(tmp_path / f"{n}.png")
    path.write_text("".join(json.dumps({"image": f"{n}.png", "text": [SHORT, LONG]}) + "\n" for n in range(8)), encoding="utf-8")
    code, out, err = mmft(*words(path, "evaluation.base=false"), f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["max_new_tokens"] == expected(LONG) and summary["answer_counts"]["references_per_row"] == 2
    code, out, err = mmft("evaluate", f"run={tmp_path.as_posix()}/run", f"generation.max_new_tokens={tokens(SHORT)}")
    assert code == 0 and "too few" not in out + err


def test_without_held_out_rows_the_training_rows_decide(table, mmft, tmp_path):
    path = table([SHORT, LONG, SHORT, SHORT], "all")
    code, _, err = mmft(*words(path, "data.splits.validation=0", "evaluation.split=null"), f"run_dir={tmp_path.as_posix()}/run")
    assert code == 0, err
    assert read(tmp_path / "run" / "env.json")["max_new_tokens"] == expected(LONG)
    code, out, err = mmft("predict", f"run={tmp_path.as_posix()}/run", f"input={path.parent.as_posix()}/all0.png", f"out={tmp_path.as_posix()}/a.jsonl", "prompt=What?")
    assert code == 0, err


def test_a_model_without_references_has_a_plain_default(mmft, table, tmp_path):
    path = table([SHORT], "alone")
    code, out, err = mmft("predict", f"input={path.parent.as_posix()}/alone0.png", "prompt=What?", f"out={tmp_path.as_posix()}/a.jsonl", "generation.min_new_tokens=64")
    assert code == 0, err
    assert rows(tmp_path / "a.jsonl")[0]["truncated"] is True, "64 tokens without an end: the limit without references"


@pytest.mark.parametrize("given", ["0", "-3", "ten", "1.5", "true", "Auto"])
def test_a_wrong_limit_is_refused_at_once_with_the_way_forward(mmft, table, given):
    code, _, err = mmft(*words(table([SHORT] * 6, "wrong")), f"generation.max_new_tokens={given}")
    assert code == 2 and "must be a whole number of tokens above 0, or auto" in err and len(err.strip().splitlines()) == 1


def test_a_length_given_in_another_way_is_left_alone(trained, mmft, tmp_path):
    run, _ = trained
    code, _, err = mmft("evaluate", f"run={run.as_posix()}", "generation.max_new_tokens=null", "generation.max_length=120")
    assert code == 0, err


BEST = ["trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.load_best_model_at_end=true"]


@pytest.mark.parametrize("metric", ["cider", "eval_cider", "exact_match", "rouge_l"])
def test_a_text_metric_that_nobody_measures_is_refused_and_the_way_forward_works(mmft, table, tmp_path, metric):
    base = words(table([SHORT] * 8, "best"), *BEST, f"trainer.metric_for_best_model={metric}")
    code, _, err = mmft(*base)
    assert code == 2 and "evaluation.generate=true" in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "outputs").exists()
    if metric == "eval_cider":
        code, _, err = mmft(*base, "evaluation.generate=true", f"run_dir={tmp_path.as_posix()}/run")
        assert code == 0, err


def test_an_unknown_best_metric_names_the_nearest(mmft, table):
    code, _, err = mmft(*words(table([SHORT] * 8, "best"), *BEST, "trainer.metric_for_best_model=cidr"))
    assert code == 2 and "Did you mean cider?" in err
