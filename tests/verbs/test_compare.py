"""compare: base against tuned with one model in memory, run against run, in the terminal and on a page."""

import json
import re
import shutil

import pytest
from verb_data import lines


def page(run, out):
    """The page that the command names, as text."""
    (path,) = re.findall(r"^page  (.+)$", out, re.MULTILINE)
    assert path.startswith(str(run))
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_base_against_tuned_by_index(verb, run_copy, trained, monkeypatch):
    """The texts are those that training measured; the model is loaded once; the terminal stays within 80 columns."""
    from mmft.models import load

    loads = []
    real = load._read_weights
    monkeypatch.setattr(load, "_read_weights", lambda *values: loads.append(1) or real(*values))
    code, out, err = verb("compare", f"run={run_copy.as_posix()}", "index=[4,1]", run=False)
    assert code == 0, err
    assert len(loads) == 1 and max(map(len, out.splitlines()[:-1])) <= 80
    html = page(run_copy, out)
    assert html.count("data:image/") == 2 and not re.search(r"""(?:src|href)=["'](?!data:)""", html) and "<script" not in html
    shown = re.sub(r"<mark class=\"missing\">.*?</mark>|<[^>]+>", "", html)
    for i in (4, 1):
        for name in ("base", "tuned"):
            text = trained.lines(f"eval/{name}.jsonl")[i]["prediction"]
            assert (text.split() or ["(nothing"])[0] in out and all(word in shown for word in text.split())
    assert [m for m in re.findall(r"^(\d) {4,}", out, re.MULTILINE)] == ["4", "1"], out
    assert lines(run_copy / "verbs.jsonl")[-1]["verb"] == "compare"
    before = set((run_copy / "compare").iterdir())
    assert verb("compare", f"run={run_copy.as_posix()}", "index=[4,1]", run=False)[0] == 0
    assert set((run_copy / "compare").iterdir()) == before, "the same comparison replaces its page"
    assert verb("compare", f"run={run_copy.as_posix()}", "index=1", run=False)[0] == 0
    assert len(set((run_copy / "compare").iterdir())) == 2


def test_run_against_run(mmft, verb, trained, tmp_path, run_copy):
    """The same adapter twice says the same; letters name the runs."""
    code, out, err = verb("compare", f"run=[{trained.run.as_posix()},{run_copy.as_posix()}]", f"out={tmp_path.as_posix()}/page.html", run=False)
    assert code == 0, err
    assert re.search(r"^A +\S", out, re.MULTILINE) and re.search(r"^B +\S", out, re.MULTILINE)
    answers = {letter: re.findall(rf"^{letter}   +(.*)$", out, re.MULTILINE)[1:7] for letter in "AB"}  # the first is the legend
    assert answers["A"] == answers["B"] and len(answers["A"]) == 6
    assert "A against B" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_two_runs_are_compared_on_all_held_out_rows_that_both_measured(verb, trained, tmp_path, run_copy):
    """A is made to answer no row with its reference, B all of them; the sixth row of B is another one."""
    first = shutil.copytree(trained.run, tmp_path / "first")
    for run, right in ((first, 0.0), (run_copy, 1.0)):
        rows = lines(run / "eval" / "tuned.jsonl")
        for row in rows:
            row["prediction"] = row["references"][0] if right else "nothing of the kind"
            row["metrics"]["exact_match"] = right
        rows[5]["id"] += " of B" if right else ""
        (run / "eval" / "tuned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = verb("compare", f"run=[{first.as_posix()},{run_copy.as_posix()}]", "index=0", f"out={tmp_path.as_posix()}/page.html", run=False)
    assert code == 0, err
    table = out.split("A against B on all held-out rows of both")[1]
    assert re.search(r"exact_match +0\.000 +1\.000 +\+1\.000 +\+1\.000 to \+1\.000 +0\.002", table) and "5 rows, 1 reference per row." in table
    assert re.search(r"loss +[\d.]+ +[\d.]+ +\+0\.000 +\+0\.000 to \+0\.000 +1\.000", table), "the same losses on the same rows"
    assert "A against B on all held-out rows of both" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_own_pictures_one_of_them_broken(verb, run_copy, trained, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(trained.pictures / "1.png", tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    code, out, err = verb("compare", f"run={run_copy.as_posix()}", f"input={tmp_path.as_posix()}/in", "prompt=What <b>now</b>, then?", run=False)
    assert code == 1 and err.count("b.png") == 1 and "1 of 2 inputs" in err
    html = page(run_copy, out)
    assert "What &lt;b&gt;now&lt;/b&gt;, then?" in html and "<b>now" not in html and html.count("data:image/") == 1
    assert "Against the first answer" in html


def test_word_marks_stay_exact_for_markup_in_answers():
    from mmft.serving.page_html import answers_html, sample_html

    class One:
        label, kind = "<i>x", "base"

    html = answers_html([One(), One()], [("a red cat <script>", True), ("a red dog", True)], ["a red dog"])
    assert "<script>" not in html and "&lt;script&gt;" in html and html.count("mmft-answer base") == 2 and "✓ exact" in html
    assert '<mark class="missing">dog</mark>' in html

    from mmft.data.sample import Sample, assistant_turn, user_turn

    row = Sample("<id>", ("gone.png",), [user_turn(1, "<q>"), assistant_turn("<a>")], ("<a>",), "/nowhere")
    assert "&lt;q&gt;" in sample_html(row) and "<q>" not in sample_html(row) and "cannot be opened" in sample_html(row)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["index=6"], "index=6: the validation split has 6 rows, 0 to 5"),
        (["index=two"], "give a whole number"),
        (["index=1", "input=x.png"], "name one of them"),
        (["prompt=What?"], "go with input="),
        (["out={tmp}/there.html"], "exists already"),
        (["out={tmp}/a.csv"], "must end in .html"),
        (["run=[{run},{run}]"], "several different ones"),
        (["run=[{run},{run}x]"], "no such directory"),
        (["input={tmp}/empty"], "holds no image"),
        (["trainer.max_steps=3"], "brings its own trainer"),
    ],
)
def test_mistakes_are_one_line(verb, trained, tmp_path, words, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.html").write_text("kept", encoding="utf-8")
    words = [w.format(tmp=tmp_path.as_posix(), run=trained.run.as_posix()) for w in words]
    code, _, err = verb("compare", *words, run=not any(w.startswith("run=") for w in words))
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "there.html"] and not (trained.run / "compare").exists()


def test_no_run_is_asked_for(verb):
    code, _, err = verb("compare", run=False)
    assert code == 2 and "run must be given" in err


def test_a_wholly_trained_run_holds_no_base(mmft, trained, tmp_path):
    whole = [w for w in trained.words if not w.startswith("output_dir")]
    code, _, err = mmft(*whole, "lora=none", "trainer.max_steps=1", "trainer.save_steps=5", "evaluation.split=null", f"run_dir={tmp_path.as_posix()}/whole")
    assert code == 0, err
    code, _, err = mmft("compare", f"run={tmp_path.as_posix()}/whole", "input=x.png")
    assert code == 2 and "holds no base" in err and "run=[A,B]" in err
