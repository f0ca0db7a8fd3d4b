"""The leaderboard from run directories that no training made: seeds, marks, fairness, plots, and its page in a browser."""

import csv
import json
import math
import shutil
import statistics
import subprocess

import pytest
import yaml

from mmft.reports import leaderboard, leaderboard_page, terminal

SCORES = {2: (0.5, 0.6, 0.7), 4: (0.86, 0.9, 0.94), 8: (0.89, 0.92, 0.95)}  # rank -> exact match of seeds 1, 2, 3


def run(folder, name, words, score, **more):
    """A finished run of words (key -> value) with ten held-out answers."""
    at = folder / name
    (at / "eval").mkdir(parents=True)
    settings = {"lora": {"r": words.get("lora.r", 4), "lora_alpha": 32, "use_rslora": False}, "seed": int(words.get("seed", 1)),
                "generation": {"max_new_tokens": more.pop("tokens", 8)}, "trainer": {"max_steps": 5},
                "collator": {"_target_": words.get("collator", "chat"), "max_length": more.pop("max_length", None)}}  # fmt: skip
    (at / "snapshot.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (at / "overrides.txt").write_text("".join(f"{k}={v}\n" for k, v in {**words, "trainer.max_steps": 5}.items()), encoding="utf-8")
    r = settings["lora"]["r"]
    summary = {"status": "finished", "metrics": {"exact_match": score, "token_f1": score}, "base_metrics": {"exact_match": 0.1}, "eval_loss": 1 - score,
               "base_eval_loss": 2.0, "trainable_parameters": 1000 * r, "peak_memory_mb": 900.0, "seconds": 10.0 + r, "samples_per_second": 50.0 - r,
               "data_fingerprint": "f", "held_out_samples": 10, **more}  # fmt: skip
    (at / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (at / "lora_plan.json").write_text(json.dumps({"rows": [{"part": "vision", "scale": None}, {"part": "language", "scale": 32 / r}]}), encoding="utf-8")
    rows = [{"index": i, "id": f"row-{i}", "images": [], "prompt": "What?", "references": ["a b"], "prediction": f"a <b> {r}" if i else "a b",
             "metrics": {"exact_match": float(i < score * 10), "token_f1": 0.5}} for i in range(10)]  # fmt: skip
    (at / "eval" / "tuned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (at / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 3 / s}) + "\n" for s in range(1, 6)), encoding="utf-8")


def plan(folder, names, objective="exact_match"):
    (folder / "plan.json").write_text(json.dumps({"objective": objective, "points": [{"name": n} for n in names]}), encoding="utf-8")


@pytest.fixture
def seeded(tmp_path):
    folder = tmp_path / "ranks"
    for r, scores in SCORES.items():
        for seed, score in enumerate(scores, 1):
            run(folder, f"lora.r-{r}_seed-{seed}", {"lora.r": r, "seed": seed}, score)
    plan(folder, [f"lora.r-{r}_seed-{s}" for r in SCORES for s in (1, 2, 3)])
    return folder


def test_mean_and_spread_over_seeds_by_hand(seeded):
    board = leaderboard.read(seeded)
    assert board.keys == ["lora.r", "seed"] and board.by == "exact_match"
    best = board.groups[0]
    assert best.values == ["8"] and best.n == 3
    assert best.mean == pytest.approx(0.92) and best.sd == pytest.approx(0.03) and best.error == pytest.approx(0.03 / math.sqrt(3))
    assert [g.values[0] for g in board.groups] == ["8", "4", "2"]


def test_a_failed_seed_is_in_no_mean_and_is_named(seeded):
    run(seeded, "lora.r-8_seed-4", {"lora.r": 8, "seed": 4}, 0.1, status="failed", seconds=0.1)
    plan(seeded, [*(f"lora.r-{r}_seed-{s}" for r in SCORES for s in (1, 2, 3)), "lora.r-8_seed-4"])
    board = leaderboard.read(seeded)
    best = board.groups[0]
    assert (best.values, best.n, best.seconds) == (["8"], 3, 18.0) and best.mean == pytest.approx(0.92) and best.loss == pytest.approx(0.08)
    assert "1 of 10 runs did not finish and are in no mean: lora.r-8_seed-4 failed." in board.notes


def test_the_cheapest_within_one_standard_error(seeded):
    """0.92 - 0.03/sqrt(3) = 0.9027: rank 4 with 0.900 is just outside, and inside once its mean is 0.903."""
    marks = {g.values[0]: g.marks for g in leaderboard.read(seeded).groups}
    assert marks == {"8": ["best", "cheapest within 1 s.e."], "4": [], "2": []}
    path = seeded / "lora.r-4_seed-3" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["metrics"]["exact_match"] = 0.95
    path.write_text(json.dumps(summary), encoding="utf-8")
    marks = {g.values[0]: g.marks for g in leaderboard.read(seeded).groups}
    assert marks == {"8": ["best"], "4": ["cheapest within 1 s.e."], "2": []}


def test_without_seeds_the_error_is_that_of_the_held_out_rows(tmp_path):
    run(tmp_path, "a", {"lora.r": 4}, 0.5)
    run(tmp_path, "b", {"lora.r": 8}, 0.6)
    plan(tmp_path, ["a", "b"])
    board = leaderboard.read(tmp_path)
    error = statistics.stdev([1.0] * 6 + [0.0] * 4) / math.sqrt(10)
    assert error > 0.1 and [(r.run, r.marks) for r in board.rows] == [("b", ["best"]), ("a", ["cheapest within 1 s.e.", "within noise of the best"])]
    board = leaderboard.read(tmp_path, "eval_loss")  # whose rows were not kept
    assert [r.marks for r in board.rows] == [["best"], []] and any("No standard error" in n for n in board.notes)


def test_differences_within_noise_of_the_best_are_marked_on_the_same_rows(tmp_path):
    """0.9 against 0.5 differs in 4 of 10 rows: the drawn number is binomial (10, 0.4), 1 to 7 between its 2.5 and 97.5 percent. 0.8: 0 to 3."""
    for name, score in (("a", 0.5), ("b", 0.8), ("c", 0.9)):
        run(tmp_path, name, {"lora.r": len(name)}, score)
    plan(tmp_path, ["a", "b", "c"])
    board = leaderboard.read(tmp_path)
    by_run = {r.run: r for r in board.rows}
    assert (by_run["a"].to_best["low"], by_run["a"].to_best["high"]) == pytest.approx((-0.7, -0.1)) and by_run["a"].marks == []
    assert (by_run["b"].to_best["low"], by_run["b"].to_best["high"]) == pytest.approx((-0.3, 0.0)) and "within noise of the best" in by_run["b"].marks
    assert by_run["c"].to_best is None and any("paired bootstrap over the rows of both (1,000 resamples)" in n for n in board.notes)
    rows = {r["run"]: r for r in csv.DictReader(leaderboard_page.table(board).splitlines())}
    assert float(rows["a"]["to_best"]) == pytest.approx(-0.4) and float(rows["b"]["to_best_p"]) > 0.05 > float(rows["a"]["to_best_p"]) and rows["c"]["to_best"] == ""
    assert "-0.400 (-0.700 to -0.100)" in leaderboard_page.markdown(board)
    # other rows cannot be compared
    path = tmp_path / "b" / "eval" / "tuned.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"row-', '"other-'), encoding="utf-8")
    assert {r.run: r for r in leaderboard.read(tmp_path).rows}["b"].to_best is None


def test_the_changing_scale_is_said_and_a_point_on_other_terms_is_flagged(tmp_path):
    for n, r in enumerate((2, 4, 8)):
        run(tmp_path, f"r-{r}", {"lora.r": r}, 0.5, tokens=8 if n else 99)
    run(tmp_path, "r-16", {"lora.r": 16}, 0.5, held_out_samples=7, data_fingerprint="other")
    run(tmp_path, "r-32", {"lora.r": 32, "collator": "prompt_loss"}, 0.5, max_length=99)
    plan(tmp_path, ["r-2", "never"])
    board = leaderboard.read(tmp_path)
    flags = {r.run: r.flags for r in board.rows}
    assert flags["r-32"] == ["its loss counts other labels: collator._target_=prompt_loss"], "a limit that refuses rows changes no label"
    assert flags["r-2"] == ["other generation: generation.max_new_tokens=99"] and flags["r-4"] == []
    assert flags["r-16"] == ["other data", "measured on 7 rows, most on 10"]
    notes = " ".join(board.notes)
    assert "alpha / r, here from 16 to 1" in notes and "1 planned points have no run yet: never" in notes


def test_the_table_fits_into_80_columns_and_the_csv_holds_every_run(seeded, capsys):
    board = leaderboard.read(seeded)
    terminal.show(terminal.leaderboard_table(board))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "0.920 ± 0.030 (3)" in out and "*+ r=8" in out
    leaderboard_page.write(seeded, board)
    rows = list(csv.DictReader((seeded / "leaderboard.csv").open(encoding="utf-8")))
    assert len(rows) == 9 and {r["scale"] for r in rows} == {"16.0", "8.0", "4.0"} and rows[0]["samples_per_second"] == "42.0"


@pytest.mark.parametrize("extra, plots", [([], 3), (["model"], 4), (["model", "lora.lora_dropout"], 4)])
def test_the_plots_follow_what_was_swept(tmp_path, extra, plots):
    for r in (2, 4):
        for n in (0, 1):
            run(tmp_path, f"{r}-{n}", {"lora.r": r, **{k: f"{k}{n}" if k == "model" else n / 10 for k in extra}}, 0.5 + r / 10 + n / 50)
    plan(tmp_path, [])
    if not extra:
        shutil.rmtree(tmp_path / "2-1")
        shutil.rmtree(tmp_path / "4-1")
    from mmft.reports.sweep_plots import draw

    titles = [p["title"] for p in draw(leaderboard.read(tmp_path))]
    assert len(titles) == plots and titles[0] == "Exact match against lora.r"
    assert any("over lora.r and model" in t for t in titles) == (extra == ["model"])
    assert any("Every point" in t for t in titles) == (len(extra) == 2)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no browser here: apt-get install chromium")
def test_a_click_on_a_heading_sorts_in_the_browser(seeded, tmp_path):
    """The page with three clicks added to its script; what the browser then holds is read back."""
    leaderboard_page.write(seeded, leaderboard.read(seeded))
    text = (seeded / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text.split('id="strip"')[1].split('class="text"')[0].replace("<b>\u2713</b>", "").replace("<b>\u2717</b>", "").replace("<b>\u2248</b>", "")
    probe = """
    const table = document.querySelector("#runs table"), heads = [...table.tHead.rows[0].cells];
    const order = name => { const at = heads.findIndex(h => h.textContent === name);
      heads[at].firstElementChild.click(); return [...table.tBodies[0].rows].map(r => r.cells[at].dataset.v).join(" "); };
    document.title = [order("lora.r"), order("lora.r"), order("Run")].join(" | ");
    </script>"""
    head, _, tail = text.rpartition("</script>")
    (tmp_path / "clicked.html").write_text(head + probe + tail, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "clicked.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    first, second, third = title.split(" | ")
    assert first == "2 2 2 4 4 4 8 8 8" and second == "8 8 8 4 4 4 2 2 2"
    assert third.split() == sorted(third.split()) and 'aria-sort="ascending"' in done.stdout


@pytest.mark.parametrize("values, said", [
    ([19.5, 38.9, 77.8, 116.7, 155.6, 233.5, 311.3, 622.6], [19.5, 38.9, 77.8, 155.6, 311.3, 622.6]),  # ranks 2 to 64, with 12 and 24 between
    ([100.0, 101.0, 150.0, 199.0, 200.0], [100.0, 150.0, 200.0]),
    ([5.0, 6.0], [5.0, 6.0]),
])  # fmt: skip
def test_labels_of_an_axis_do_not_run_into_each_other(values, said):
    from mmft.reports.sweep_plots import _spaced_labels

    assert _spaced_labels(values[::-1], 0.16) == said


def test_rows_cut_off_answers_and_rows_left_out_stand_beside_the_score(tmp_path):
    """Of runs that recorded them; the columns are absent where no run did."""
    counts = {"rows": 9, "references_per_row": 1.0, "truncated": 3, "left_out": 1}
    run(tmp_path, "a", {"lora.r": 4}, 0.5, answer_counts=counts)
    run(tmp_path, "b", {"lora.r": 8}, 0.6)
    leaderboard_page.write(tmp_path, leaderboard.read(tmp_path))
    assert ">9, 3 cut off, 1 left out</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "| 9, 3 cut off, 1 left out |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = {r["run"]: r for r in csv.DictReader((tmp_path / "leaderboard.csv").open(encoding="utf-8"))}
    assert [rows["a"][k] for k in ("rows", "truncated", "left_out")] == ["9", "3", "1"] and rows["b"]["truncated"] == ""
    shutil.rmtree(tmp_path / "a")
    leaderboard_page.write(tmp_path, leaderboard.read(tmp_path))
    assert ">Rows<" not in (tmp_path / "report.html").read_text(encoding="utf-8")
