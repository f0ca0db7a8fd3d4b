"""mmft benchmark with a stand-in for lmms-eval: a module of that name that asks ten rows through the server and writes files in its form."""

from __future__ import annotations

import json
import sys

import pytest

STAND_IN = """
import argparse, base64, json, os, pathlib, urllib.request
p = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "output_path", "limit"): p.add_argument("--" + name)
p.add_argument("--log_samples", action="store_true")
a = p.parse_args()
given = dict(word.split("=", 1) for word in a.model_args.split(","))
rows = [json.loads(line) for line in open(ROWS)][: int(a.limit or 10)]
assert a.model == "openai" and os.environ["OPENAI_API_BASE"] == given["base_url"]
if a.tasks == "broken": raise SystemExit("ValueError: no such task: broken")
out = pathlib.Path(a.output_path) / given["model_version"]
out.mkdir(parents=True)
right, samples = 0, []
for row in rows:
    url = "data:image/png;base64," + base64.b64encode((pathlib.Path(row["root"]) / row["images"][0]).read_bytes()).decode()
    body = {"model": given["model_version"], "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["prompt"]}]}]}
    request = urllib.request.Request(given["base_url"] + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": "Bearer none"})
    answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    samples.append({"resps": ["[LMMS_EVAL_REQUEST_FAILED after 5 retries]" if a.tasks == "lossy" else answer]})
    right += answer == row["references"][0]
(out / "x_samples_drawn.jsonl").write_text("\\n".join(map(json.dumps, samples)))
(out / "20261129_x_results.json").write_text(json.dumps({
    "results": {"drawn": {"alias": "drawn", "acc,none": right / len(rows), "acc_stderr,none": 0.1, "errors,strict": 1 - right / len(rows), "samples": len(rows)}, "group": {"alias": "group"}},
    "higher_is_better": {"drawn": {"acc": True, "errors": False}}, "n-samples": {"drawn": {"original": 10, "effective": len(rows)}}}))
"""


@pytest.fixture
def environment(tmp_path, monkeypatch, trained):
    """A python that has the stand-in."""
    rows = [row for row in trained.lines("eval/tuned.jsonl")] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:10])), encoding="utf-8")
    (tmp_path / "site" / "lmms_eval").mkdir(parents=True)
    (tmp_path / "site" / "lmms_eval" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "site" / "lmms_eval" / "__main__.py").write_text(STAND_IN.replace("ROWS", repr(str(tmp_path / "rows.jsonl"))), encoding="utf-8")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nPYTHONPATH={tmp_path / 'site'} exec {sys.executable} \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("MMFT_LMMS_EVAL", str(tmp_path / "env"))
    return tmp_path / "env"


def share(rows: list[dict]) -> float:
    """Of the ten rows, those that training saw answered as the reference says."""
    ten = (rows * 2)[:10]
    return sum(row["prediction"] == row["references"][0] for row in ten) / 10


def test_scores_are_those_of_the_answers_that_training_measured(mmft, run_copy, trained, environment, tmp_path):
    home = f"output_dir={trained.outputs.as_posix()}"
    folder = tmp_path / "folder"
    folder.mkdir()
    run = run_copy.rename(folder / "copy")
    summary = (run / "summary.json").read_bytes()
    code, out, err = mmft("benchmark", f"run={run}", "tasks=[drawn]", "base=true", "check=1", home, output_dir=False)
    assert code == 0 and err == "", err
    kept = json.loads((run / "benchmarks.json").read_text(encoding="utf-8"))["tasks"]
    tuned, base = (share(trained.lines(f"eval/{side}.jsonl")) for side in ("tuned", "base"))
    assert tuned != base and kept["drawn"]["tuned"]["scores"] == {"acc": tuned, "errors_strict": 1 - tuned} and kept["drawn"]["base"]["scores"]["acc"] == base
    assert kept["drawn"]["tuned"]["rows"] == 10 and "group" not in kept and (run / "summary.json").read_bytes() == summary
    code, out, err = mmft("runs", "--json", f"folder={folder}", "by=bench.drawn.acc", "show=[base.bench.drawn.acc]", home, output_dir=False)
    assert code == 0 and [(row["bench.drawn.acc"], row["base.bench.drawn.acc"]) for row in json.loads(out)] == [(tuned, base)], err
    for metric, value in (("bench.drawn.acc", tuned), ("bench.drawn.errors_strict", 1 - tuned)):
        code, out, err = mmft("report", f"run={folder}", f"by={metric}", home, output_dir=False)
        assert code == 0 and f"{value:.3f}" in out, err


@pytest.mark.parametrize("words, message", [
    ([], "tasks must be given"), (["tasks=['--model']"], "cannot be the name of a task"), (["tasks=[broken]", "check=0"], "ValueError: no such task: broken"),
    (["tasks=[lossy]", "check=0", "limit=2"], "lmms-eval got no answer to 2 requests"), (["tasks=[drawn]", "limit=0"], "limit=0: must be 1 or more"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_keeps_nothing(verb, run_copy, environment, words, message):
    code, _, err = verb("benchmark", f"run={run_copy}", *words, run=False)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (run_copy / "benchmarks.json").exists()


def test_the_environment_is_asked_for(verb, monkeypatch, tmp_path, trained):
    for given, message in ((None, "needs lmms-eval in an environment of its own"), (str(tmp_path), "holds no python"), (sys.executable, "lmms-eval cannot be imported there")):
        monkeypatch.delenv("MMFT_LMMS_EVAL", raising=False)
        if given:
            monkeypatch.setenv("MMFT_LMMS_EVAL", given)
        code, _, err = verb("benchmark", "tasks=[mme]")
        assert code == 2 and message in err and err.count("\n") == 1, err
