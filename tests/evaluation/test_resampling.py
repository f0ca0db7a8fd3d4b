"""Paired bootstrap: scores of resamples against sacrebleu, pycocoevalcap, scikit-learn, jiwer and scipy; intervals and p by hand."""

import logging
import random
import time

import numpy as np
import pytest

from mmft.evaluation import resampling
from mmft.evaluation.metrics.base import Metric, MetricSet, Score
from mmft.evaluation.metrics.captions import Bleu4, Cider
from mmft.evaluation.metrics.classes import Classes
from mmft.evaluation.metrics.defaults import default_metrics
from mmft.evaluation.metrics.draws import Draws
from mmft.evaluation.metrics.structured import Json

WORDS = ["a", "big", "small", "red", "blue", "star", "circle", "in", "on", "the", "top", "left", "center", "and"]


def row(i, prediction, references, metrics=None):
    return {"index": i, "id": str(i), "images": [f"{i}.png"], "references": references, "prediction": prediction, "metrics": metrics or {}}


def texts(seed, rows=30, skill=0.7, references=2):
    """Rows of captions; a share `skill` of the words of each answer is right."""
    draw, truth = random.Random(seed), random.Random(7)
    made = []
    for i in range(rows):
        said = [[truth.choice(WORDS) for _ in range(truth.randint(4, 9))] for _ in range(1 + i % references)]
        answer = [w if draw.random() < skill else draw.choice(WORDS) for w in said[0]]
        made.append(row(i, " ".join(answer), [" ".join(s) for s in said]))
    return made


def drawn(draws, number):
    """The rows of one resample, by number."""
    return np.repeat(np.arange(draws.counts.shape[1]), draws.counts[number]).tolist()


def own(metrics, rows):
    return [{**r, "metrics": metrics.row(r)} for r in rows]


def test_draws_are_seeded_and_have_as_many_rows_as_there_are():
    draws = Draws.of(50, 20)
    assert (draws.counts[0] == 1).all() and (draws.counts.sum(axis=1) == 50).all() and len(draws.counts) == 21
    assert (draws.counts == Draws.of(50, 20).counts).all() and (draws.counts[1] != draws.counts[2]).any()


def test_the_first_resample_is_the_corpus_score_of_every_metric():
    metrics = default_metrics()
    rows = own(metrics, texts(1))
    for metric in metrics.metrics.values():
        values = [r["metrics"] for r in rows]
        scores, wanted = metric.resampled(rows, values, Draws.of(len(rows), 5)), metric.corpus(rows, values)
        assert wanted and {name: v[0] for name, v in scores.items()} == pytest.approx(wanted, abs=1e-12)


def test_bleu_resamples_are_those_of_sacrebleus_paired_test(monkeypatch):
    """With sacrebleu's own draws: the mean and the interval of a system's scores, and its p-value from our differences."""
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    from mmft.evaluation.metrics.translation import Chrf, SacreBleu

    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    first, second = texts(1, 40, 0.55), texts(2, 40, 0.75)
    streams = [[r["references"][i] if i < len(r["references"]) else None for r in first] for i in (0, 1)]
    systems = [("base", [r["prediction"] for r in first]), ("tuned", [r["prediction"] for r in second])]
    indices = np.random.default_rng(12345).choice(40, size=(500, 40), replace=True)
    draws = Draws(np.stack([np.ones(40), *(np.bincount(one, minlength=40) for one in indices)]).astype(np.uint16))
    for metric, theirs, name in ((SacreBleu(), BLEU(tokenize="13a", force=True), "BLEU"), (Chrf(), CHRF(), "chrF2")):
        _, results = PairedTest(systems, {name: theirs}, streams, test_type="bs", n_samples=500)()
        result = results[name][1]
        one, two = (next(iter(metric.resampled(rows, [], draws).values())) for rows in (first, second))
        assert two[0] == pytest.approx(result.score, abs=1e-4)
        assert two[1:].mean() == pytest.approx(result.mean, abs=1e-4)
        gaps = np.abs(two[1:] - one[1:])
        p = ((gaps - gaps.mean() > abs(two[0] - one[0])).sum() + 1) / 501  # sacrebleu's own definition
        assert p == pytest.approx(result.p_value)


@pytest.mark.parametrize("metric", [Bleu4(), Cider()])
def test_caption_scores_are_computed_anew_for_each_resample(metric):
    """Against pycocoevalcap on the drawn rows; a row drawn twice is two rows."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider as CocoCider

    rows = texts(3, 12)
    rows[4]["prediction"], rows[5]["prediction"] = "", "star"
    draws = Draws.of(len(rows), 8)
    (name, scores), = metric.resampled(rows, [], draws).items()
    for number in range(9):
        picked = [rows[i] for i in drawn(draws, number)]
        references, answers = {i: r["references"] for i, r in enumerate(picked)}, {i: [r["prediction"]] for i, r in enumerate(picked)}
        wanted = Bleu(4).compute_score(references, answers, verbose=0)[0][3] if name == "bleu4" else CocoCider().compute_score(references, answers)[0]
        assert scores[number] == pytest.approx(wanted, abs=1e-9)
    assert len(set(scores.round(6))) > 5


def test_macro_f1_and_error_rates_of_resamples():
    sklearn = pytest.importorskip("sklearn.metrics")
    jiwer = pytest.importorskip("jiwer")
    from mmft.evaluation.metrics.error_rates import CharacterErrorRate, WordErrorRate

    draw = random.Random(5)
    wanted = [draw.choice(["cat", "dog", "cow"]) for _ in range(15)]
    given = [w if draw.random() < 0.6 else draw.choice(["cat", "dog", "bird"]) for w in wanted]
    rows, draws = [row(i, g, [w]) for i, (g, w) in enumerate(zip(given, wanted))], Draws.of(15, 10)
    f1 = Classes().resampled(rows, [{"class_accuracy": float(g == w)} for g, w in zip(given, wanted)], draws)
    cer = CharacterErrorRate().resampled(rows, [], draws)["cer"]
    for number in range(11):
        w, g = ([side[i] for i in drawn(draws, number)] for side in (wanted, given))
        assert f1["macro_f1"][number] == pytest.approx(sklearn.f1_score(w, g, labels=sorted(set(w)), average="macro", zero_division=0))
        assert f1["class_accuracy"][number] == pytest.approx(sklearn.accuracy_score(w, g))
        assert cer[number] == pytest.approx(jiwer.cer(w, g))
    captions = texts(4, 10, references=1)
    wer = WordErrorRate().resampled(captions, [], Draws.of(10, 10))["wer"]
    picked = [captions[i] for i in drawn(Draws.of(10, 10), 7)]
    assert wer[7] == pytest.approx(jiwer.wer([r["references"][0] for r in picked], [r["prediction"] for r in picked]))


def test_json_fields_of_resamples_by_hand():
    """Row 0: 1 of 2 fields right, 2 wanted. Row 1: no JSON, 1 wanted. Drawn 2 + 1 times: 2 common, 4 given, 5 wanted."""
    rows = [row(0, '{"a": 1, "b": 3}', ['{"a": 1, "b": 2}']), row(1, "no", ['{"c": 1}'])]
    scores = Json().resampled(rows, [{"json_valid": 1.0}, {"json_valid": 0.0}], Draws(np.array([[1, 1], [2, 1]], dtype=np.uint16)))
    assert scores["json_f1"][1] == pytest.approx(2 * 2 / (4 + 5)) and scores["json_precision"][1] == 2 / 4 and scores["json_recall"][1] == 2 / 5
    assert scores["json_valid"].tolist() == pytest.approx([1 / 2, 2 / 3])


def test_interval_and_p_of_a_mean_agree_with_scipy():
    scipy = pytest.importorskip("scipy.stats")
    metrics = default_metrics()
    first, second = own(metrics, texts(1, 60, 0.5)), own(metrics, texts(2, 60, 0.6))
    gap = resampling.differences(metrics, first, second)["token_f1"]
    a, b = ([r["metrics"]["token_f1"] for r in rows] for rows in (first, second))
    assert gap["value"] == pytest.approx(np.mean(b) - np.mean(a)) and gap["rows"] == 60 and gap["resamples"] == 1000
    found = scipy.bootstrap((b, a), lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis), paired=True, method="percentile", n_resamples=20000, rng=1)
    assert [gap["low"], gap["high"]] == pytest.approx([found.confidence_interval.low, found.confidence_interval.high], abs=0.15 * (gap["high"] - gap["low"]))
    # the mean of many rows is nearly normal: p is that of the paired z-test, and close to the t-test's
    assert gap["p"] == pytest.approx(scipy.ttest_rel(b, a).pvalue, abs=0.03)


def test_equal_models_and_a_gain_of_every_row():
    rows = own(default_metrics(), texts(1))
    same = resampling.differences(default_metrics(), rows, rows)
    assert same.keys() == {"exact_match", "exact_match_normalized", "contains", "token_f1", "vqa_accuracy", "bleu4", "rouge_l", "cider"}
    assert all((g["value"], g["low"], g["high"], g["p"]) == (0, 0, 0, 1) and resampling.is_noise(g) for g in same.values())
    metrics = MetricSet({"exact_match": default_metrics().metrics["exact_match"]})
    right = own(metrics, [row(i, "yes", ["yes"]) for i in range(9)])
    gap = resampling.differences(metrics, own(metrics, [row(i, "no", ["yes"]) for i in range(9)]), right)["exact_match"]
    assert (gap["value"], gap["low"], gap["high"]) == (1, 1, 1) and gap["p"] == pytest.approx(2 / 1001) and not resampling.is_noise(gap)


def test_p_of_three_rows_by_counting():
    """Gains 1, 0, 0: d is 0 in 8 of the 27 draws and never below; p is 2 * 8/27."""
    metrics = MetricSet({"exact_match": default_metrics().metrics["exact_match"]})
    first = own(metrics, [row(i, "no", ["yes"]) for i in range(3)])
    second = own(metrics, [row(0, "yes", ["yes"]), *first[1:]])
    gap = resampling.differences(metrics, first, second)["exact_match"]
    assert gap["value"] == pytest.approx(1 / 3) and gap["low"] == 0 and gap["high"] == 1
    assert gap["p"] == pytest.approx(16 / 27, abs=0.09)  # three standard errors of 1,000 draws


def test_only_rows_of_both_are_compared():
    metrics = default_metrics()
    first, second = own(metrics, texts(1)), own(metrics, texts(2))
    second[3]["references"] = ["another row"]
    assert len(resampling.paired(first, second[:20])) == 19
    assert resampling.differences(metrics, first, second[:20])["cider"]["rows"] == 19
    assert resampling.differences(metrics, first, second[3:4]) == {}


def test_the_loss_counts_tokens_not_rows():
    """Losses 1/1 and 3/3 tokens against 2/1 and 3/3: means 1 and 5/4 per token."""
    first = [{**row(0, "", ["a"]), "loss": 1.0, "loss_tokens": 1}, {**row(1, "", ["b"]), "loss": 3.0, "loss_tokens": 3}]
    second = [{**first[0], "loss": 2.0}, first[1]]
    gap = resampling.differences(MetricSet({}), first, second)["eval_loss"]
    assert gap["value"] == pytest.approx(1 / 4) and gap["low"] == 0 and gap["high"] == pytest.approx(1)


class Median(Metric):
    SCORES = (Score("median", "Median length"),)

    def __init__(self, seconds=0.0, broken=False):
        self.seconds, self.broken = seconds, broken

    def corpus(self, rows, values):
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        if self.broken:
            raise ValueError("no median today")
        return {"median": float(np.median([len(r["prediction"]) for r in rows]))}


def test_a_users_corpus_score_is_computed_again_for_fewer_resamples_or_has_no_interval(caplog):
    first, second = texts(1), texts(2)
    gap = resampling.differences(MetricSet({"median": Median()}), first, second)["median"]
    assert gap["resamples"] == 200 and gap["value"] == np.median([len(r["prediction"]) for r in second]) - np.median([len(r["prediction"]) for r in first])
    assert resampling.differences(MetricSet({"median": Median(seconds=0.03)}), first, second) == {}
    with caplog.at_level(logging.WARNING):
        assert resampling.differences(MetricSet({"median": Median(broken=True)}), first, second) == {}
    assert "metric median: its interval: ValueError: no median today" in caplog.text


def test_of_a_mix_each_source_has_the_differences_of_its_own_rows():
    metrics = default_metrics()
    first, second = (own(metrics, texts(seed, rows=40, skill=skill)) for seed, skill in ((1, 0.5), (2, 0.8)))
    for n, (one, other) in enumerate(zip(first, second)):
        for r, loss in ((one, 3.0 + n % 5), (other, 2.0 + n % 3)):
            r |= {"source": "chat" if n % 4 == 0 else "caps", "loss": loss, "loss_tokens": 2}
    whole = resampling.differences(metrics, first, second)
    for source in ("chat", "caps"):
        alone = resampling.differences(metrics, *([{k: v for k, v in r.items() if k != "source"} for r in rows if r["source"] == source] for rows in (first, second)))
        assert {name: gap for name, gap in whole.items() if name.endswith(f"/{source}")} == {f"{'loss' if name == 'eval_loss' else name}/{source}": gap for name, gap in alone.items()}
        numbers = [np.mean([r["loss"] / 2 for r in rows if r["source"] == source]) for rows in (first, second)]
        assert whole[f"loss/{source}"]["value"] == pytest.approx(numbers[1] - numbers[0]) and whole[f"loss/{source}"]["rows"] == len(first) // (4 if source == "chat" else 1) - (0 if source == "chat" else 10)
    assert {name for name in whole if "/" not in name} == {name.partition("/")[0].replace("loss", "eval_loss") for name in whole if "/" in name}
