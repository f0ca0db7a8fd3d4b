"""Metrics against counts done by hand; the arithmetic stands beside each figure."""

import json
import math
import subprocess
import sys

import pytest

from mmft.common.errors import UserError
from mmft.evaluation.metrics.answers import vqa_accuracy
from mmft.evaluation.metrics.defaults import compute, default_metrics, per_sample
from mmft.evaluation.metrics.words import normalise, tokenise


def test_normalise_does_what_squad_does_and_reads_chinese():
    assert normalise("  The Cat, sat\ton a  MAT! ") == "cat sat on mat"
    assert normalise("It's 3.5%") == "its 35"  # SQuAD deletes marks, it does not put spaces for them
    assert normalise("theory of the an") == "theory of"  # articles as words only
    assert normalise("一辆红色的汽车。") == "一 辆 红 色 的 汽 车"
    assert normalise("ＡＢＣ，１２") == "abc12"  # full-width forms
    assert normalise("«Très bien»") == "très bien"


def test_normalise_never_empties_an_answer():
    assert normalise("A") == "a" and normalise("The.") == "the" and normalise("?") == "?"
    assert per_sample("", ["A"])["exact_match_normalized"] == 0.0
    assert per_sample("a.", ["A"])["exact_match_normalized"] == 1.0


@pytest.mark.parametrize(
    "prediction, references, strict, normalised",
    [
        ("red circle\n", ["red circle"], 1, 1),
        ("Red circle", ["red circle"], 0, 1),
        ("a red  circle.", ["x", "red circle"], 0, 1),
        ("red circles", ["red circle"], 0, 0),
        ("红色汽车", ["红色 汽车。"], 0, 1),
        ("", ["red"], 0, 0),
    ],
)
def test_exact_match(prediction, references, strict, normalised):
    row = per_sample(prediction, references)
    assert (row["exact_match"], row["exact_match_normalized"]) == (strict, normalised)


@pytest.mark.parametrize(
    "prediction, reference, found",
    [
        ("It is a red car, I think", "red car", 1),
        ("a scarred car", "red car", 0),  # not inside a word
        ("red sports car", "red car", 0),  # a run, not a bag
        ("图中是一辆红色汽车", "红色汽车", 1),
        ("", "red", 0),
        ("anything", "", 0),
    ],
)
def test_contains_is_of_whole_words(prediction, reference, found):
    assert per_sample(prediction, [reference])["contains"] == found


def test_token_f1_is_the_best_over_references_and_counts_repeats():
    # words: red car red | reference: red bus -> common 1 ("red" once), P 1/3, R 1/2 -> 2*(1/6)/(5/6) = 0.4
    assert per_sample("a red car, red", ["the red bus"])["token_f1"] == pytest.approx(0.4)
    assert per_sample("a red car, red", ["the red bus", "red car red"])["token_f1"] == 1.0
    assert per_sample("red", ["blue"])["token_f1"] == 0.0


@pytest.mark.parametrize("agree, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(agree, score):
    # 3 of 10: leaving one of the three out leaves 2 -> 2/3, three times; leaving another out -> 1, seven times: (2 + 7) / 10
    people = ["Two."] * agree + [f"answer {i}" for i in range(10 - agree)]
    assert vqa_accuracy("2", people) == pytest.approx(score)


def test_vqa_accuracy_with_fewer_people_can_still_reach_one():
    assert vqa_accuracy("yes", ["Yes"]) == 1.0 and vqa_accuracy("no", ["Yes"]) == 0.0
    assert vqa_accuracy("yes", ["yes", "no"]) == 0.5
    assert vqa_accuracy("dont", ["don't", "no", "do", "go", "so"]) == pytest.approx(1 / 3)


# What the Java tokeniser of COCO's evaluation (stanford-corenlp 3.4.1) makes of these, marks dropped.
TREEBANK = {
    "I don't know; it's the dog's ball.": "i do n't know it 's the dog 's ball",
    "You cannot park at 10:30 a.m. in the U.S. #1": "you can not park at 10:30 a.m. in the u.s. # 1",
    'He said "hello" and/or \'bye\'...': "he said hello and/or bye",
    "mid-air -- a black-and-white cat": "mid-air a black-and-white cat",
    "two men/women, 1,000 people": "two men/women 1,000 people",
    "it's 5 o'clock": "it 's 5 o'clock",
    "Mr. Smith vs. Dr. No": "mr. smith vs. dr. no",
    "red_ball foo_bar a+b=c": "red_ball foo_bar a + b = c",
    "costs $5.50 & 50% off!": "costs $ 5.50 & 50 % off",
    "3rd 1st 20's 1950s": "3rd 1st 20 's 1950s",
    "gonna wanna gotta it'll we've they'd I'm you're": "gon na wan na got ta it 'll we 've they 'd i 'm you 're",
}


@pytest.mark.parametrize("text", TREEBANK)
def test_tokenise_agrees_with_the_treebank_tokeniser(text):
    assert " ".join(tokenise(text)) == TREEBANK[text]


def test_tokenise_departs_from_it_where_it_says_so():
    assert tokenise("a shirt (red)") == ["a", "shirt", "red"]
    assert tokenise("一只猫。") == ["一", "只", "猫"]
    assert tokenise("") == tokenise("...!?") == []


def test_bleu4_by_hand():
    predictions = ["The cat sat on the mat.", "A dog runs in the green park"]
    references = [["the cat is on the mat"], ["a dog runs in the park today now"]]
    # n-grams found / written: 1: 5/6 + 6/7, 2: 3/5 + 4/6, 3: 1/4 + 3/5, 4: 0/3 + 2/4; lengths 13 against 14
    precisions = (5 + 6) / 13 * (3 + 4) / 11 * (1 + 3) / 9 * (0 + 2) / 7
    assert compute(predictions, references)["bleu4"] == pytest.approx(math.exp(1 - 14 / 13) * precisions**0.25, rel=1e-6)


def test_bleu4_takes_the_reference_of_the_closest_length():
    # every n-gram is in a reference and one reference has the same length: no penalty
    assert compute(["a b c d e"], [["a b c d e f g h", "x a b c d e", "b c d e a"]])["bleu4"] == pytest.approx(1.0, rel=1e-6)


def test_rouge_l_by_hand():
    # longest common subsequence "dogs run" = 2 of 2 written and of 4 wanted: P 1, R 1/2, beta 1.2
    assert per_sample("dogs run", ["dogs quickly run home"])["rouge_l"] == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    assert per_sample("", ["..."])["rouge_l"] == 0.0


def test_cider_by_hand():
    same = ["one red car parked here", "some dogs run outside today"]
    assert compute(same, [[s] for s in same])["cider"] == pytest.approx(10.0)
    # "red car" against itself: 1- and 2-grams agree of four lengths: 10 * 2/4. "blue car" against "blue bus": the
    # 1-gram vectors share one of two equal weights: 10 * (1/2)/4.
    assert compute(["red car", "blue car"], [["red car"], ["blue bus"]])["cider"] == pytest.approx((5 + 1.25) / 2)


def test_cider_weighs_words_by_the_set():
    # "dog" is in both samples' references (weight 0), so only the other word counts; one word of four lengths, and
    # 2-grams agree where the whole text does
    scores = compute(["dog", "dog"], [["dog"], ["dog"]])
    assert scores["cider"] == 0.0 and scores["exact_match"] == 1.0
    assert compute(["one red car parked here"], [["one red car parked here"]])["cider"] == 0.0  # a single sample has none


def test_compute_averages_and_has_every_key():
    scores = compute(["red", "blue", ""], [["red"], ["Blue."], ["green", "lime"]])
    assert tuple(scores) == tuple(s.name for s in default_metrics().scores)
    assert scores["exact_match"] == pytest.approx(1 / 3) and scores["exact_match_normalized"] == pytest.approx(2 / 3)
    assert all(type(v) is float and math.isfinite(v) for v in scores.values())


@pytest.mark.parametrize("predictions", [[""], ["", ""], ["...", "。"]])
def test_empty_texts_score_nothing_and_do_not_crash(predictions):
    scores = compute(predictions, [["a car"]] * len(predictions))
    assert scores.pop("bleu4") < 1e-6 and set(scores.values()) == {0.0}
    assert compute([""], [[""]])["exact_match"] == 1.0


def test_misuse_is_named():
    for call in (lambda: compute([], []), lambda: compute(["a"], []), lambda: compute(["a", "b"], [["a"], []])):
        with pytest.raises(UserError):
            call()
    with pytest.raises(UserError, match="sample 1"):
        compute(["a", "b"], [["a"], []])
    with pytest.raises(UserError):
        per_sample("a", "a")  # a bare text would be read as one reference a letter


def test_nothing_is_started_printed_or_imported_early(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a process was started (pycocoevalcap's tokeniser needs Java)")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    compute(["a red car", "a dog"], [["a red car"], ["the dog"]])
    assert capsys.readouterr() == ("", "")
    monkeypatch.undo()
    code = "import sys, json, mmft.evaluation.metrics.defaults; print(json.dumps([m for m in ('torch', 'numpy', 'pycocoevalcap') if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout) == []
