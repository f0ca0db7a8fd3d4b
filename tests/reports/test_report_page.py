"""report.html from whole, partial and hostile run directories."""

import html.parser
import json
import re

import pytest
from fake_run import make_run

from mmft.reports import answers
from mmft.reports.answers import AnswerPair
from mmft.reports.run_page import view, write_report


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page; void tags aside, every tag must be closed in order."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [a for t, a in self.tags if t == tag]


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


def report(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_whole_run_shows_everything_in_one_offline_file(run_dir):
    page = report(run_dir)
    text = " ".join(page.text.split())
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    for part in ("tiny_shapes done", "2026-01-31 12:34:56", "mmft model=tiny data=shapes lora.r=16", "Base against tuned", "1 min 24 s", "1.28 GB",
                 "294.9 K", "28 of 29", "lora_alpha: 32", "packages.transformers", "Samples while training", "step 200"):  # fmt: skip
        assert part in text, part
    for name in ("base_metrics", "metrics"):
        assert f"{summary[name]['cider']:.3f}" in text
    assert "Not in this run directory" not in text
    assert len(page.all("article")) == 24 + 4 and len(page.all("img")) == 1 + 24 + 4
    # nothing is fetched, nothing runs
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all(i["src"].startswith("data:image/") for i in page.all("img"))
    source = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source and "default-src 'none'" in source
    assert len(source) < 600_000
    assert [p.name for p in run_dir.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("gone", ["summary.json", "metrics.jsonl", "eval/tuned.jsonl", "eval/base.jsonl", "eval/samples.jsonl", "lora_plan.json", "snapshot.yaml",
                                  "overrides.txt", "env.json", "DONE"])  # fmt: skip
def test_a_missing_file_is_tolerated_and_named(run_dir, gone):
    (run_dir / gone).unlink()
    text = report(run_dir).text
    assert (gone in text) == (gone not in ("eval/samples.jsonl", "DONE"))
    assert "tiny_shapes" in text or gone == "summary.json"


def test_an_empty_directory_and_torn_files_still_give_a_page(tmp_path):
    (tmp_path / "a_run").mkdir()
    page = report(tmp_path / "a_run")
    assert "a_run unfinished" in " ".join(page.text.split()) and "summary.json (summary)" in page.text and not page.all("img")
    torn = make_run(tmp_path / "torn")
    (torn / "summary.json").write_text('{"name": "x', encoding="utf-8")
    (torn / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo', encoding="utf-8")
    (torn / "eval" / "tuned.jsonl").write_text('{"index": 0}\nnull\n{"index": 1, "pre', encoding="utf-8")
    assert len(report(torn).all("article")) == 24 + 4


HOSTILE = '<script>alert(1)</script><img src=x onerror="a()">&amp;\' {{ 7351*9173 }} {% raw %}'


def test_every_text_is_escaped(run_dir):
    (run_dir / "overrides.txt").write_text(HOSTILE, encoding="utf-8")
    (run_dir / "snapshot.yaml").write_text(HOSTILE, encoding="utf-8")
    (run_dir / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    for name in ("summary.json", "lora_plan.json"):
        value = json.loads((run_dir / name).read_text(encoding="utf-8"))
        value.update(name=HOSTILE, status=HOSTILE, scope=HOSTILE, modules_to_save=[HOSTILE])
        if "rows" in value:
            value["rows"][0].update(part=HOSTILE, r=HOSTILE)
        else:
            value["metrics"][HOSTILE] = 0.5
        (run_dir / name).write_text(json.dumps(value), encoding="utf-8")
    row = {"index": 0, "id": HOSTILE, "root": HOSTILE, "images": [HOSTILE], "prompt": HOSTILE, "references": ["one " + HOSTILE, "b"], "prediction": "one " + HOSTILE, "metrics": {}}
    for name in ("base", "tuned"):
        (run_dir / "eval" / f"{name}.jsonl").write_text(json.dumps({**row, "prediction": f"{name} {HOSTILE}"}) + "\n", encoding="utf-8")
    (run_dir / "eval" / "samples.jsonl").write_text(json.dumps({"step": HOSTILE, "samples": [row]}), encoding="utf-8")
    page = report(run_dir)
    assert not page.all("script") and all("onerror" not in a for _, a in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 12 and str(7351 * 9173) not in page.text
    assert "picture not found" in page.text


def test_full_training_has_no_adapter_to_miss(run_dir):
    (run_dir / "lora_plan.json").unlink()
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    (run_dir / "summary.json").write_text(json.dumps({**summary, "method": "full"}), encoding="utf-8")
    assert "Not in this run directory" not in report(run_dir).text


def test_better_and_worse_are_told_apart_also_for_the_loss(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary.update(metrics={"exact_match": 0.2}, base_metrics={"exact_match": 0.5}, eval_loss=1.0, base_eval_loss=2.0)
    path.write_text(json.dumps(summary), encoding="utf-8")
    rows = {r["name"]: r for r in view(run_dir)["figures"][0]["metrics"]}
    assert (rows["exact_match"]["change"], rows["exact_match"]["kind"]) == ("-0.300", "bad")
    assert (rows["eval_loss"]["change"], rows["eval_loss"]["kind"]) == ("-1.000", "good")


@pytest.mark.parametrize("scores, said", [
    ({"exact_match": 0.2, "cider": 1.5}, "Scores with a bar are fractions of 1, CIDEr goes to 10 (its word weights counted over this set only). Bars:"),
    ({"exact_match": 0.2}, "Scores with a bar are fractions of 1. Bars:"),
    ({"chrf": 41.0}, "Scores with a bar are fractions of 1, BLEU and chrF go to 100. Bars:"),
    ({"cer": 1.7}, None),
])
def test_what_the_scores_of_this_run_mean(run_dir, scores, said):
    path = run_dir / "summary.json"
    infos = {"cer": {"label": "Character error rate", "higher_is_better": False, "top": 1.0}, "chrf": {"label": "chrF", "higher_is_better": True, "top": 100.0}}
    summary = {**json.loads(path.read_text(encoding="utf-8")), "metrics": scores, "base_metrics": scores, "metric_info": infos}
    path.write_text(json.dumps(summary), encoding="utf-8")
    text = " ".join(report(run_dir).text.split())
    assert said in text if said else "fractions of 1" not in text


# --- choosing and comparing ---


def _pairs(f1s):
    return [AnswerPair(i, {}, *({"prediction": "", "metrics": {"token_f1": f1}} for f1 in pair)) for i, pair in enumerate(f1s)]


def test_select_mixes_gains_worst_and_a_spread():
    # 4 gains, 4 of no use, 22 between
    chosen = answers.select(_pairs([(0.0, 1.0)] * 4 + [(0.5, 0.5)] * 22 + [(0.0, 0.0)] * 4), limit=12)
    assert [c.index for c in chosen if c.reason == "largest gain"] == [0, 1, 2, 3]
    assert [c.index for c in chosen if c.reason == "worst answer"] == [26, 27, 28, 29]
    spread = [c.index for c in chosen if c.reason == "even spread"]
    assert spread == [6, 12, 17, 23] and len(chosen) == 12
    assert [c.reason for c in answers.select(_pairs([(0, 1)] * 5), limit=12)] == [""] * 5


@pytest.mark.parametrize("count", range(1, 60))
def test_select_never_repeats_or_exceeds(count):
    chosen = [c.index for c in answers.select(_pairs([(0.1, 0.1 * (i % 7)) for i in range(count)]), limit=24)]
    assert len(chosen) == len(set(chosen)) == min(count, 24)


@pytest.mark.parametrize("text, reference, pieces", [
    ("a red circle", "a red circle", [("same", "a red circle")]),
    ("A red circle.", "a red circle", [("same", "A red circle.")]),
    ("a blue circle", "a red circle", [("same", "a"), ("same", " "), ("extra", "blue"), ("same", " "), ("missing", "red"), ("same", " "), ("same", "circle")]),
    ("a circle on white", "a red circle on white", [("same", "a"), ("same", " "), ("missing", "red"), ("same", " "), ("same", "circle on white")]),
    ("no idea", "a red circle", [("extra", "no idea")]),
    ("", "a red circle", []),
    ("红色的车", "红色汽车", [("same", "红色"), ("extra", "的"), ("missing", "汽"), ("same", "车")]),
])  # fmt: skip
def test_difference(text, reference, pieces):
    found = answers.difference(text, reference)
    assert [p for p in found if p[1]] == pieces
    joined = re.sub(r"\s+", " ", "".join(p for k, p in found if k != "missing")).strip()
    assert joined == re.sub(r"\s+", " ", text)


def test_a_very_long_text_is_not_compared():
    assert answers.difference("word " * 700, "word") == [("same", "word " * 700)]


def test_base_and_tuned_are_joined_by_index_in_whatever_order():
    base = [{"index": 2, "prediction": "b2"}, {"index": 0, "prediction": "b0"}]
    pairs = answers.pair(base, [{"index": 0, "prediction": "t0"}, {"index": 1, "prediction": "t1"}])
    assert [(p.index, p.base and p.base["prediction"], p.tuned and p.tuned["prediction"]) for p in pairs] == [(0, "b0", "t0"), (1, None, "t1"), (2, "b2", None)]
