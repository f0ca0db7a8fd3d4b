"""mmft runs, and the short names of runs that every verb takes. The runs are small files written by hand, so every expectation is a fact of them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmft.common.errors import UserError
from mmft.runs.catalog import catalog
from mmft.runs.condition import parse_condition

INFO = {"cider": {"label": "CIDEr", "higher_is_better": True, "top": None}, "cer": {"label": "CER", "higher_is_better": False, "top": 1.0}}


def write_run(folder: Path, r: int, seed: int, cider: float | None, *, status: str = "finished", age: int = 0, objective: str = "cider", data: str = "d1") -> Path:
    """age: seconds before now. The loss is 1 / r."""
    folder.mkdir(parents=True)
    (folder / "snapshot.yaml").write_text(
        f"# comment\nseed: {seed}\nobjective: {objective}\nlora:\n  r: {r}\n  target_modules:\n  - q_proj\n  - v_proj\nmodel:\n  path: org/Name-2B\ndata:\n  name: |-\n"
        f"    two\n    lines\n", encoding="utf-8")  # fmt: skip
    metrics = {} if cider is None else {"cider": cider, "cer": 1 - cider}
    (folder / "summary.json").write_text(json.dumps({
        "status": status, "eval_loss": 1 / r, "seconds": 60.0 * r, "metrics": metrics, "base_metrics": {"cider": 0.05}, "metric_info": INFO if metrics else {},
        "data_fingerprint": data, "held_out_samples": 4}), encoding="utf-8")  # fmt: skip
    (folder / "env.json").write_text(json.dumps({"packages": {"torch": f"2.{r}"}, "device": "cpu"}), encoding="utf-8")
    (folder / "overrides.txt").write_text(f"lora.r={r}\n", encoding="utf-8")
    time = 1_700_000_000 - age
    os.utime(folder / "snapshot.yaml", (time, time))
    return folder


@pytest.fixture
def outputs(tmp_path):
    """Two single runs, three points of a sweep three folders down, a failed run; and folders that hold no runs of their own."""
    home = tmp_path / "outputs"
    write_run(home / "2026-01-02_alpha", 4, 1, 0.3, age=500)
    write_run(home / "2026-01-03_beta", 16, 1, 0.9, age=400, data="d2")
    for r, seed, cider, age in ((8, 1, 0.5, 300), (8, 2, 0.7, 200), (32, 1, 0.6, 100)):
        write_run(home / "sweeps" / "ranks" / f"lora.r-{r}_seed-{seed}", r, seed, cider, age=age)
    (home / "sweeps" / "ranks" / "plan.json").write_text('{"points": []}', encoding="utf-8")
    write_run(home / "broken", 64, 1, None, status="failed", age=50)
    write_run(home / "sweeps" / "ranks" / "earlier" / "lora.r-8_seed-1", 8, 1, 0.99)
    write_run(home / "data" / "copy", 8, 1, 0.99)
    write_run(home / "2026-01-02_alpha" / "checkpoints" / "odd", 8, 1, 0.99)
    return home


def listed(mmft, home: Path, *words: str) -> list[dict]:
    out = home.parent / "list.json"
    code, _, err = mmft("runs", f"folder={home.as_posix()}", f"out={out.as_posix()}", *words)
    assert code == 0, err
    return json.loads(out.read_text(encoding="utf-8"))


def names(rows: list[dict]) -> list[str]:
    return [row["run"].rpartition("/")[2] for row in rows]


def test_every_run_at_any_depth_is_listed_the_newest_first(mmft, outputs):
    assert names(listed(mmft, outputs)) == ["broken", "lora.r-32_seed-1", "lora.r-8_seed-2", "lora.r-8_seed-1", "2026-01-03_beta", "2026-01-02_alpha"]


@pytest.mark.parametrize("where, expected", [
    ("lora.r>8 and status==finished", {"lora.r-32_seed-1", "2026-01-03_beta"}),
    ("lora.r in [8, 4] and not seed==2", {"lora.r-8_seed-1", "2026-01-02_alpha"}),
    ("cider >= 0.6 or status == failed", {"lora.r-32_seed-1", "lora.r-8_seed-2", "2026-01-03_beta", "broken"}),
    ("eval_loss<0.1", {"lora.r-32_seed-1", "2026-01-03_beta", "broken"}),
    ("model.path == 'org/Name-2B' and lora.r == 64", {"broken"}),
    ("data.name == 'two\\nlines' and lora.r == 4", {"2026-01-02_alpha"}),
    ("q_proj in lora.target_modules and lora.r==32", {"lora.r-32_seed-1"}),
    ("cider == null", {"broken"}),
    ("base.cider < 0.1 and cider < 0.4", {"2026-01-02_alpha"}),
    ("lora.r > eight", set()),
    ("nothing.of.the.kind > 1", set()),
])  # fmt: skip
def test_conditions(mmft, outputs, where, expected):
    assert set(names(listed(mmft, outputs, f"where={where}"))) == expected


@pytest.mark.parametrize("where", [
    "__import__('os').system('touch harm')", "lora.r > int('3')", "print(1) == 1", "lora.r > 8 > 2", "lora.r >", "[x for x in y]", "lambda: 1", "a if b else c",
    "f'{seed}' == 1", "seed == 1 + 1", "seed", "1 == 1", "(" * 300,
])  # fmt: skip
def test_anything_but_comparisons_is_one_line_and_is_not_executed(mmft, outputs, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = mmft("runs", f"folder={outputs.as_posix()}", f"where={where}")
    assert code == 2 and err.count("\n") == 1 and "lora.r>8 and status==finished" in err and not (tmp_path / "harm").exists(), err
    assert listed(mmft, outputs, "where=lora.r>8 and status==finished"), "the form that the message shows works"


def test_a_condition_without_a_file():
    values = {"a.b": "12", "c": True, "d": 0}
    assert parse_condition("a.b > 11 and c == true and d != null")(values.get)
    assert not parse_condition("c > 0 and a.b == 13")(values.get)
    with pytest.raises(UserError, match="no key"):
        parse_condition("3 > a")


def test_sorted_by_a_score_in_its_own_direction_with_more_columns(mmft, outputs):
    rows = listed(mmft, outputs, "by=cider", "show=[lora.r,base.cider,data.name]", "where=status==finished")
    assert [row["cider"] for row in rows] == [0.9, 0.7, 0.6, 0.5, 0.3] and {row["base.cider"] for row in rows} == {0.05}
    assert [row["lora.r"] for row in rows] == [16, 8, 32, 8, 4] and rows[0]["data.name"] == "two\nlines"
    assert [row["cer"] for row in listed(mmft, outputs, "by=cer", "top=2")] == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("word, expected", [
    ("by=ciderr", "Did you mean cider?"), ("show=[lora.rr]", "Did you mean lora.r?"), ("out=list.xml", ".csv, .json, .html"), ("folder=nowhere", "no such directory"),
    ("run=[alpha]", "no such directory, and no run below"), ("diff=[last]", "name two runs"), ("tag=[x]", "name the runs"), ("delete=true", "name the runs"),
])  # fmt: skip
def test_mistakes_are_one_line(mmft, outputs, word, expected):
    words = [] if word.startswith("folder") else [f"folder={outputs.as_posix()}"]
    code, _, err = mmft("runs", *words, word, f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 2 and expected in err and err.count("\n") == 1, err


def test_the_terminal_has_80_columns_and_says_what_has_no_place(mmft, outputs):
    code, out, err = mmft("runs", f"folder={outputs.as_posix()}", "by=cider", "show=[lora.r,seed,model.path,base.cider,status,held_out_samples,steps,data_fingerprint]")
    assert code == 2 and "show=steps" in err, "a column that no run has"
    code, out, err = mmft("runs", f"folder={outputs.as_posix()}", "by=cider", "show=[lora.r,seed,model.path,base.cider,status,held_out_samples,data_fingerprint]")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "No place for" in out and "seconds" in out, err


def test_csv_and_page(mmft, outputs, tmp_path):
    for name in ("list.csv", "list.html"):
        code, _, err = mmft("runs", f"folder={outputs.as_posix()}", "show=[lora.target_modules]", f"out={(tmp_path / name).as_posix()}", "disk=true")
        assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "list.csv").open(encoding="utf-8", newline="")))
    assert rows[0]["lora.target_modules"] == '["q_proj", "v_proj"]' and float(rows[0]["eval_loss"]) == 1 / 64
    sizes = {row["run"]: int(row["disk"]) for row in rows}
    assert sizes["broken"] == sum(p.stat().st_size for p in (outputs / "broken").iterdir())
    page = (tmp_path / "list.html").read_text(encoding="utf-8")
    assert '<th class="n"><button type="button">eval_loss</button></th>' in page and '<th><button type="button">status</button></th>' in page
    assert page.count("<tr>") == 7 and "default-src 'none'" in page


def test_the_difference_of_two_runs(mmft, outputs):
    code, out, err = mmft("runs", "diff=[2026-01-02,last]", f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["lora.r", "4", "32"] in lines and ["packages.torch", "2.4", "2.32"] in lines and ["cider", "0.300", "0.600"] in lines
    assert not any(line[:1] == ["seed"] for line in lines), "equal values are not listed"


def test_tags_are_written_shown_found_and_taken_away(mmft, outputs):
    words = [f"folder={outputs.as_posix()}", f"output_dir={outputs.as_posix()}"]
    assert mmft("runs", *words, "tag=[baseline,'好']", "run=[last,2026-01-02]", output_dir=False)[0] == 0
    rows = listed(mmft, outputs, "where=baseline in tags")
    assert names(rows) == ["lora.r-32_seed-1", "2026-01-02_alpha"] and rows[0]["tags"] == ["baseline", "好"]
    assert mmft("runs", *words, "untag=[baseline,'好']", "run=last", output_dir=False)[0] == 0
    assert names(listed(mmft, outputs, "where='好' in tags")) == ["2026-01-02_alpha"] and not (outputs / "sweeps" / "ranks" / "lora.r-32_seed-1" / "tags.json").exists()


def test_only_named_finished_runs_are_deleted_and_only_if_told_so(mmft, outputs):
    words = ["runs", "delete=true", f"output_dir={outputs.as_posix()}"]
    code, _, err = mmft(*words, "run=[2026-01-02,broken]", "force=true", output_dir=False)
    assert code == 2 and "only finished runs" in err and (outputs / "2026-01-02_alpha").is_dir(), "nothing is deleted if one of them may not be"
    code, _, err = mmft(*words, "run=[2026-01-02]", output_dir=False)
    assert code == 2 and "force=true" in err and (outputs / "2026-01-02_alpha").is_dir()
    code, out, err = mmft(*words, "run=[2026-01-02,sweeps/ranks/lora.r-32]", "force=true", output_dir=False)
    assert code == 0 and "trains it again" in out, err
    assert names(listed(mmft, outputs)) == ["broken", "lora.r-8_seed-2", "lora.r-8_seed-1", "2026-01-03_beta"]


def test_a_name_stands_for_a_run_in_every_verb(mmft, outputs):
    """`report run=best`: of the runs on the data of the newest finished one (not 0.9 on other data), and not the failed newest."""
    for word, expected in (("last", "lora.r-32_seed-1"), ("best", "lora.r-8_seed-2"), ("2026-01-03", "2026-01-03_beta"), ("lora.r-32", "lora.r-32_seed-1"),
                           ("lora.r-8_seed-1", "lora.r-8_seed-1"), ("sweeps/ranks/lora.r-3", "lora.r-32_seed-1")):  # fmt: skip
        code, out, err = mmft("report", f"run={word}", f"output_dir={outputs.as_posix()}", output_dir=False)
        assert code == 0 and f"{word} is " in out and next(outputs.rglob(f"{expected}/report.html"), None), (word, err)
        next(outputs.rglob(f"{expected}/report.html")).unlink()


@pytest.mark.parametrize("word, expected", [("lora.r-8", "2 runs below"), ("2026", "type more of the name"), ("lasst", "Did you mean last?"), ("2027", "no run below")])
def test_a_name_that_means_no_run_or_several_is_one_line(mmft, outputs, word, expected):
    for verb in ("report", "evaluate", "merge"):
        code, _, err = mmft(verb, f"run={word}", f"output_dir={outputs.as_posix()}", output_dir=False)
        assert code == 2 and expected in err and err.count("\n") == 1, err


def test_a_directory_wins_over_a_short_name(mmft, outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "here" / "last", 2, 1, 0.1).parent)
    code, out, err = mmft("report", "run=last", f"output_dir={outputs.as_posix()}", output_dir=False)
    assert code == 0 and " is " not in out and (tmp_path / "here" / "last" / "report.html").is_file(), err


def test_torn_files_do_not_hide_the_other_runs(mmft, outputs):
    (outputs / "broken" / "summary.json").write_text('{"status": "fin', encoding="utf-8")
    (outputs / "2026-01-02_alpha" / "snapshot.yaml").write_text("lora: [", encoding="utf-8")
    rows = {row["run"]: row for row in listed(mmft, outputs, "show=[lora.r]")}
    assert len(rows) == 6 and rows["broken"]["status"] == "unfinished" and rows["2026-01-02_alpha"]["lora.r"] is None and rows["2026-01-03_beta"]["lora.r"] == 16


def test_the_catalog_of_a_thousand_runs_reads_only_what_is_asked_for(tmp_path, monkeypatch):
    """Names come from the folders alone; a condition on one section parses that section of each config, and no whole config."""
    from mmft.runs import catalog as module

    for n in range(1000):
        write_run(tmp_path / f"{n % 10}" / f"run{n}", n % 64 + 1, n, n / 1000, age=n)
    parsed: list[int] = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda text: parsed.append(len(text)) or load(text))
    runs = catalog(tmp_path)
    assert [run.path.name for run in runs[:3]] == ["run0", "run1", "run2"] and not parsed
    condition = parse_condition("lora.r > 32 and cider < 0.5")
    assert sum(condition(run.value) for run in runs) == sum(n % 64 + 1 > 32 and n < 500 for n in range(1000))
    assert len(parsed) <= 1000 and max(parsed) < 80, "the lora section alone"


def test_it_imports_no_torch(outputs):
    code = "import sys; from mmft.cli.main import main; assert main(sys.argv[1:]) == 0; print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "runs", f"folder={outputs.as_posix()}", "by=cider"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def child(home: Path, name: str, **parent: str) -> None:
    """A finished run whose env.json names a parent; with role=config its snapshot does, as before its weights are loaded."""
    run = write_run(home / name, 4, 1, 0.4)
    if parent["role"] != "config":
        (run / "env.json").write_text(json.dumps({"packages": {}, "parents": [{"run": Path(parent["path"]).name, "sha256": "0" * 64, "steps": None, **parent}]}), encoding="utf-8")
    else:
        snapshot = (run / "snapshot.yaml").read_text(encoding="utf-8").replace("lora:\n", f"lora:\n  start: {parent['path']}\n")
        (run / "snapshot.yaml").write_text(snapshot, encoding="utf-8")


@pytest.mark.parametrize("role, expected", [("start", "started from it"), ("below", "cannot be opened without it"), ("extended", "goes on with its training"),
                                            ("combined", "combines it"), ("config", "started from it")])  # fmt: skip
def test_a_run_that_others_build_on_is_deleted_only_if_told_so(mmft, outputs, role, expected):
    parent = outputs / "2026-01-02_alpha"
    child(outputs, "child", role=role, path=parent.as_posix())
    words = ["runs", "delete=true", "force=true", f"output_dir={outputs.as_posix()}"]
    code, _, err = mmft(*words, "run=[2026-01-02,2026-01-03]", output_dir=False)
    assert code == 2 and expected in err and "child" in err and "parents=true" in err and err.count("\n") == 1, err
    assert parent.is_dir() and (outputs / "2026-01-03_beta").is_dir(), "nothing is deleted"
    code, out, err = mmft(*words, "run=[2026-01-03]", output_dir=False)
    assert code == 0 and not (outputs / "2026-01-03_beta").exists(), err
    if role == "start":
        code, _, err = mmft(*words, "run=[2026-01-02,child]", output_dir=False)
        assert code == 0 and not parent.exists() and not (outputs / "child").exists(), "parent and child together"
    else:
        code, out, err = mmft(*words, "run=[2026-01-02]", "parents=true", output_dir=False)
        assert code == 0 and not parent.exists() and expected in out + err, "told so: deleted, and the child is named"


def test_a_checkpoint_as_a_start_and_a_run_of_the_same_name_elsewhere(mmft, outputs):
    """A start inside the run counts; an equal name with other weights does not."""
    child(outputs, "child", role="start", path=(outputs / "2026-01-02_alpha" / "checkpoints" / "checkpoint-3").as_posix())
    child(outputs, "other", role="start", path=(outputs.parent / "elsewhere" / "2026-01-03_beta").as_posix())
    words = ["runs", "delete=true", "force=true", f"output_dir={outputs.as_posix()}"]
    assert mmft(*words, "run=[2026-01-02]", output_dir=False)[0] == 2
    assert mmft(*words, "run=[2026-01-03]", output_dir=False)[0] == 0
