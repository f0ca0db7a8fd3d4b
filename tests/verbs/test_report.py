"""report through the command line: on whole, failed, unfinished and moved runs, and the leaderboard of a folder of runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reports"))
from fake_run import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "there" / "run", samples=6)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_both_reports_come_back_from_the_files_alone(mmft, run):
    before = files(run)
    code, out, err = mmft("report", f"run={run.as_posix()}")
    assert code == 0, err
    after = files(run)
    assert {n: after[n] for n in before} == before, "a report changes nothing that it reads"
    assert set(after) - set(before) == {"report.html", "report.md", "loss_curve.png", "verbs.jsonl"}
    record = json.loads(after["verbs.jsonl"])
    assert record["verb"] == "report" and record["wrote"] == ["report.html", "report.md", "loss_curve.png"]
    first = after["report.md"]
    for name in ("report.html", "report.md", "loss_curve.png"):
        (run / name).unlink()
    assert mmft("report", f"run={run.as_posix()}")[0] == 0 and (run / "report.md").read_bytes() == first


def test_the_markdown_holds_the_figures_and_breaks_on_no_text(mmft, run):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "eval/tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0]["prediction"] = "a | b\n# not a heading <script>alert(1)</script> `code`"
    (run / "eval/tuned.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert mmft("report", f"run={run.as_posix()}")[0] == 0
    text = (run / "report.md").read_text(encoding="utf-8")
    a, b = summary["base_metrics"]["token_f1"], summary["metrics"]["token_f1"]
    assert f"| Token F1 | {a:.3f} | {b:.3f} | {b - a:+.3f} |" in text
    assert "a \\| b \\# not a heading \\<script\\>alert(1)\\</script\\> \\`code\\`" in text
    tables = [block.splitlines() for block in re.split(r"\n(?!\|)", text) if "\n|" in block]
    cells = [{line.replace("\\|", "").count("|") for line in block if line.startswith("|")} for block in tables]
    assert len(cells) >= 3 and all(len(counts) == 1 for counts in cells), "every row of a table has the cells of its head"


@pytest.mark.parametrize("lost", [["summary.json", "eval/tuned.jsonl"], ["lora_plan.json", "env.json"], ["metrics.jsonl"], ["snapshot.yaml", "overrides.txt"]])
def test_a_run_that_stopped_half_way_still_gets_its_report(mmft, run, lost):
    for name in lost:
        (run / name).unlink()
    (run / "DONE").unlink(missing_ok=True)
    code, out, err = mmft("report", f"run={run.as_posix()}")
    assert code == 0, err
    text = (run / "report.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in lost)
    assert ("unfinished, " in text) == ("summary.json" in lost)


def test_a_failed_run_says_why(mmft, run):
    (run / "summary.json").write_text(json.dumps({"status": "failed", "reason": "step 3: the loss is not finite"}), encoding="utf-8")
    assert mmft("report", f"run={run.as_posix()}")[0] == 0
    assert "failed, " in (text := (run / "report.md").read_text(encoding="utf-8")) and "step 3: the loss is not finite" in text


def test_a_moved_run_finds_its_pictures_beside_it(mmft, tmp_path, run):
    """outputs/RUN and outputs/data/SET move together; the rows still name the old place."""
    outputs = tmp_path / "outputs"
    (outputs / "data").mkdir(parents=True)
    shutil.move(run, outputs / "run")
    shutil.move(outputs / "run" / "pictures", outputs / "data" / "pictures")
    assert mmft("report", f"run={(outputs / 'run').as_posix()}")[0] == 0
    page = (outputs / "run/report.html").read_text(encoding="utf-8")
    assert page.count("picture not found") == 0 and page.count("data:image/") > 6
    shutil.rmtree(outputs / "data")
    assert mmft("report", f"run={(outputs / 'run').as_posix()}")[0] == 0
    assert (outputs / "run/report.html").read_text(encoding="utf-8").count("picture not found") >= 6


@pytest.fixture
def sweep(tmp_path):
    """Four runs that differ in rank and seed; one failed, one was stopped before it had a summary."""
    folder = tmp_path / "sweep"
    for name, rank, seed, score in (("r-2", 2, 1, 0.25), ("r-4", 4, 1, 0.75), ("r-8", 8, 2, None), ("r-16", 16, 1, None)):
        run = folder / name
        run.mkdir(parents=True)
        snapshot = {"lora": {"r": rank, "lora_alpha": 8}, "seed": seed, "name": None, "run_dir": f"sweep/{name}", "output_dir": "outputs"}
        (run / "snapshot.yaml").write_text(yaml.safe_dump(snapshot), encoding="utf-8")
        if score is not None:
            summary = {"status": "finished", "metrics": {"exact_match": score, "cider": 1 - score}, "base_metrics": {"exact_match": 0.125}, "eval_loss": 1 - score, "seconds": 30}
            (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "r-8" / "summary.json").write_text(json.dumps({"status": "failed", "reason": "x"}), encoding="utf-8")
    (folder / "data").mkdir()
    return folder


def test_a_folder_of_runs_becomes_a_leaderboard(mmft, sweep):
    code, out, err = mmft("report", f"run={sweep.as_posix()}")
    assert code == 0, err
    text = (sweep / "report.md").read_text(encoding="utf-8").splitlines()
    assert text[2].split("|")[1:4] == [" run ", " lora.r ", " seed "], "the settings that differ and no others"
    assert [line.split("|")[1].strip() for line in text[4:8]] == ["r-4", "r-2", "r-16", "r-8"]
    assert [c.strip() for c in text[4].split("|")][2:8] == ["4", "1", "finished", "0.125", "0.750", "0.250"]
    assert "failed" in text[7] and "unfinished" in text[6] and text[4].endswith("best |")
    assert out.index("r-4") < out.index("r-2") < out.index("r-16") and "r=4 seed=1" in out
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert page.index(">r-4<") < page.index(">r-2<") < page.index(">r-8<")
    assert json.loads((sweep / "verbs.jsonl").read_text(encoding="utf-8"))["wrote"] == ["report.html", "report.md", "leaderboard.csv"]


@pytest.mark.parametrize("by, first", [("cider", "r-2"), ("eval_loss", "r-4")])
def test_ranked_by_another_metric(mmft, sweep, by, first):
    assert mmft("report", f"run={sweep.as_posix()}", f"by={by}")[0] == 0
    assert (sweep / "report.md").read_text(encoding="utf-8").splitlines()[4].startswith(f"| {first} |")


def test_links_lead_to_the_runs_own_pages(mmft, sweep):
    assert mmft("report", f"run={(sweep / 'r-4').as_posix()}")[0] == 0
    assert mmft("report", f"run={sweep.as_posix()}")[0] == 0
    assert "](r-4/report.html)" in (sweep / "report.md").read_text(encoding="utf-8")
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert 'href="r-4/report.html"' in page and 'href="r-2/report.html"' not in page


@pytest.mark.parametrize("words, expected", [
    (["run=OUT/swep"], "Did you mean sweep?"),
    (["run=OUT/sweep/data"], "holds no run"),
    (["run=OUT/sweep", "by=exactmatch"], "Did you mean exact_match?"),
    (["run=OUT/sweep/r-4", "by=cider"], "is one run"),
    ([], "run must be given"),
])  # fmt: skip
def test_a_wrong_command_is_one_line_and_writes_nothing(mmft, sweep, tmp_path, words, expected):
    before = files(sweep)
    code, _, err = mmft("report", *(w.replace("OUT", tmp_path.as_posix()) for w in words))
    assert code == 2 and expected in err and err.count("\n") == 1 and files(sweep) == before


def test_several_runs_at_once(mmft, sweep):
    code, _, err = mmft("-m", "report", f"run={(sweep / 'r-2').as_posix()},{(sweep / 'r-4').as_posix()}")
    assert code == 0, err
    assert (sweep / "r-2/report.html").is_file() and (sweep / "r-4/report.html").is_file()
