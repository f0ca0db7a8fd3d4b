"""Task metrics against the libraries' own results and counts done by hand."""

import json

import numpy as np
import pytest

from mmft.common.errors import UserError
from mmft.evaluation.metrics.base import MetricSet
from mmft.evaluation.metrics.captions import Bleu4, Cider, Meteor, RougeL
from mmft.evaluation.metrics.classes import OTHER, Classes
from mmft.evaluation.metrics.error_rates import Anls, CharacterErrorRate, WordErrorRate
from mmft.evaluation.metrics.quantities import NumberWithin, RelaxedAccuracy, number
from mmft.evaluation.metrics.structured import Json
from mmft.evaluation.metrics.translation import Chrf, SacreBleu
from mmft.evaluation.metrics.words import tokenise


def measure(metric, pairs):
    """(corpus scores, scores of each row) of (answer, references) pairs."""
    metrics = MetricSet({"m": metric})
    rows = [{"index": i, "id": str(i), "prediction": p, "references": [r] if isinstance(r, str) else list(r)} for i, (p, r) in enumerate(pairs)]
    for row in rows:
        row["metrics"] = metrics.row(row)
    return metrics.corpus(rows), [row["metrics"] for row in rows]


# --- transcriptions -----------------------------------------------------------------------------------------------


PAGES = [("the cat sat", "the cat sat"), ("the bat sat on", "the cat sat"), ("", "hello"), ("发票 1234", "发票 1243 元"), ("a\nb", "a b")]


@pytest.mark.parametrize("metric, function, name", [(CharacterErrorRate, "cer", "cer"), (WordErrorRate, "wer", "wer")])
def test_error_rates_equal_jiwer(metric, function, name):
    import jiwer

    corpus, rows = measure(metric(), PAGES)
    assert corpus[name] == pytest.approx(getattr(jiwer, function)([r for _, r in PAGES], [p for p, _ in PAGES]))
    assert [row[name] for row in rows] == pytest.approx([getattr(jiwer, function)(r, p) for p, r in PAGES])


def test_error_rates_by_hand():
    # "abc" -> "abd": 1 of 3; "ab" -> "": 2 of 2; together 3 of 5, not the mean of 1/3 and 1
    corpus, rows = measure(CharacterErrorRate(), [("abd", "abc"), ("", "ab")])
    assert corpus["cer"] == pytest.approx(3 / 5) and [r["cer"] for r in rows] == pytest.approx([1 / 3, 1.0])
    assert measure(CharacterErrorRate(), [("abcdef", "a")])[0]["cer"] == 5.0  # above 1
    assert measure(WordErrorRate(), [("a b c", ["x y z", "a b d"])])[0]["wer"] == pytest.approx(1 / 3)  # the nearest reference


@pytest.mark.parametrize("answer, references, score", [
    ("Hello", ["hello"], 1.0), ("hell", ["hello"], 0.8), ("h", ["hello"], 0.0), ("  hello   world", ["Hello World"], 1.0), ("abcd", ["abxy"], 0.5),
    ("helo", ["x", "hello"], 0.8), ("", ["a"], 0.0),
])  # fmt: skip
def test_anls_by_hand(answer, references, score):
    """1 - edits / longer length, 0 below 0.5: "hell" against "hello" is 1 edit of 5."""
    assert measure(Anls(), [(answer, references)])[0]["anls"] == pytest.approx(score)


# --- METEOR -------------------------------------------------------------------------------------------------------


def wordnet_of(folder, *synsets):
    """WordNet's files, in the format of wndb(5WN), with these sets of nouns of one meaning."""
    folder.mkdir(parents=True)
    for name in ("cntlist.rev", "index.sense", *(f"{kind}.{word}" for kind in ("index", "data") for word in ("adj", "adv", "verb", "noun"))):
        (folder / name).write_text("")
    for word in ("adj", "adv", "noun", "verb"):
        (folder / f"{word}.exc").write_text("")
    (folder / "lexnames").write_text("00 noun.artifact 1\n")
    (folder / "data.adj").write_text("  1 WordNet 3.0 Copyright\n")
    data, index, at = "", "", 0
    for words in synsets:
        line = f"{at:08d} 00 n {len(words):02x} {' '.join(f'{w} 0' for w in words)} 000 | a thing\n"
        index += "".join(f"{w} n 1 0 1 0 {at:08d}\n" for w in words)
        data, at = data + line, at + len(line)
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """nltk finds WordNet only below tmp_path/nltk_data."""
    pytest.importorskip("nltk")
    import nltk.corpus
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk_data")])
    omw = LazyCorpusLoader("omw-1.4", nltk.corpus.CorpusReader, ".*")
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, omw))
    return tmp_path / "nltk_data" / "corpora" / "wordnet"


@pytest.mark.parametrize("answer, references, score", [
    ("a red auto", ["a red car"], 1 - 0.5 / 27),  # a synonym; one chunk of three words: penalty 0.5 (1/3)^3
    ("cars", ["car"], 0.5),  # a stem; one chunk of one word: penalty 0.5
    ("red a car", ["a red car"], 0.5),  # three chunks of three words
    ("a car", ["a red car"], 0.5 * 10 * (2 / 3) / (2 / 3 + 9)),  # precision 1, recall 2/3, two chunks of two words
    ("a truck", ["x", "a car", ""], 0.5 * 0.5),  # the best reference: precision and recall 1/2
    ("", ["a car"], 0.0), ("a car", [""], 0.0),
])  # fmt: skip
def test_meteor_by_hand(wordnet, answer, references, score):
    """10 P R / (R + 9 P), times 1 - 0.5 (chunks / matches)^3 (Banerjee and Lavie 2005)."""
    wordnet_of(wordnet, ["car", "auto"])
    corpus, rows = measure(Meteor(), [(answer, references)])
    assert rows[0]["meteor"] == pytest.approx(score) and corpus["meteor"] == pytest.approx(score)


def test_meteor_without_the_files_of_wordnet_is_refused(wordnet):
    with pytest.raises(UserError, match=r"nltk.downloader wordnet; or leave meteor out"):
        MetricSet.from_config({"meteor": {"_target_": "mmft.evaluation.metrics.captions.Meteor"}})


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_json_fields_by_hand():
    reference = json.dumps({"total": 3, "items": [{"name": "tea", "n": 1}, {"name": "milk", "n": 2}], "tags": []})
    # fields of the reference: total, two names, two n, tags = 6
    answer = json.dumps({"total": 3.0, "items": [{"name": " milk ", "n": 2}, {"name": "tee", "n": 1}], "shop": "x"})
    # given: total, two names, two n, shop = 6; common: total, milk, both n = 4
    corpus, rows = measure(Json(), [(answer, reference), ("not json", reference), (f"```json\n{reference}\n```", reference)])
    assert rows[0] == {"json_f1": pytest.approx(8 / 12), "json_precision": pytest.approx(4 / 6), "json_recall": pytest.approx(4 / 6), "json_valid": 1.0}
    assert rows[1] == {"json_f1": 0.0, "json_precision": 0.0, "json_recall": 0.0, "json_valid": 0.0}
    assert rows[2]["json_f1"] == 1.0
    # together: common 4 + 0 + 6, given 6 + 0 + 6, wanted 18
    assert corpus == {"json_f1": pytest.approx(20 / 30), "json_precision": pytest.approx(10 / 12), "json_recall": pytest.approx(10 / 18), "json_valid": pytest.approx(2 / 3)}


@pytest.mark.parametrize("answer, reference, f1", [
    ("[1, 2, 2]", "[2, 2, 1]", 1.0), ("[1, 2]", "[2, 2, 1]", 4 / 5), ("true", "1", 0.0), ("null", "null", 1.0), ("{}", "{}", 1.0), ("{}", "[]", 0.0),
    ('{"a": "1"}', '{"a": 1}', 0.0), ('{"a": null}', '{"a": 0}', 0.0), ('{"价格": 3}', '{"价格": 3}', 1.0), ('"x"', '"x"', 1.0),
])  # fmt: skip
def test_json_values(answer, reference, f1):
    assert measure(Json(), [(answer, reference)])[0]["json_f1"] == pytest.approx(f1)


def test_json_schema_from_a_mapping_and_a_file(tmp_path):
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema), encoding="utf-8")
    for given in (schema, str(tmp_path / "s.json")):
        corpus, rows = measure(Json(given), [('{"n": 1}', "{}"), ('{"n": 1.5}', "{}"), ("n", "{}")])
        assert [r["json_schema"] for r in rows] == [1.0, 0.0, 0.0] and corpus["json_schema"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="cannot be read"):
        Json(str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match="is not a JSON Schema"):
        Json({"type": "nonsense"})


# --- classes ------------------------------------------------------------------------------------------------------


def test_classes_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    wanted = ["cat", "dog", "cat", "cow", "dog", "cat", "cow", "cat"]
    given = ["Cat.", "cat", "dog", "a cow", "dog", "sheep", "", "cat"]
    corpus, rows = measure(Classes(), list(zip(given, wanted, strict=True)))
    clean = ["cat", "cat", "dog", "cow", "dog", OTHER, OTHER, "cat"]
    assert corpus["class_accuracy"] == pytest.approx(sklearn.accuracy_score(wanted, clean))
    assert corpus["macro_f1"] == pytest.approx(sklearn.f1_score(wanted, clean, labels=["cat", "cow", "dog"], average="macro", zero_division=0))


def test_confusion_by_hand():
    metrics = MetricSet({"classes": Classes()})
    rows = [{"index": 10 + i, "prediction": p, "references": [r]} for i, (p, r) in enumerate([("cat", "Cat"), ("dog", "cat"), ("hen", "dog"), ("cat", "Cat")])]
    assert metrics.confusion(rows) == {"labels": ["Cat", "dog", OTHER], "counts": [[2, 1, 0], [0, 0, 1], [0, 0, 0]],
                                       "examples": [[10, 11, None], [None, None, 12], [None, None, None]]}  # fmt: skip


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, valid", [("[" * 3000, 0.0), ("1" * 400, 1.0), ('{"a": ' * 400 + "1" + "}" * 400, 1.0)])
def test_endless_answers_are_wrong_and_no_error(answer, valid):
    """What a model writes that repeats itself: an unfinished or very deep list is no JSON, and a number of 400 digits is one."""
    corpus, rows = measure(Json(), [(answer, '{"a": 3.0}'), ('{"a": 3}', '{"a": 3.0}')])
    assert rows[0] == {"json_f1": 0.0, "json_precision": 0.0, "json_recall": 0.0, "json_valid": valid}
    assert rows[1]["json_f1"] == 1.0 and corpus["json_recall"] == 0.5


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("about -3.5 m", -3.5), ("1,234,567.5", 1234567.5), ("1,23", 1), ("1e3", 1000), (".5", 0.5), ("none", None), ("3 of 4", 3), ("12,3456", 12),
])  # fmt: skip
def test_the_first_number_of_a_text(text, value):
    assert number(text) == value


@pytest.mark.parametrize("metric, answer, reference, score", [
    (NumberWithin(), "It is 12.", "12", 1), (NumberWithin(), "12.1", "12", 0), (NumberWithin(absolute=0.5), "12.5", "12", 1), (NumberWithin(absolute=0.5), "12.6", "12", 0),
    (NumberWithin(relative=0.05), "105", "100", 1), (NumberWithin(relative=0.05), "106", "100", 0), (NumberWithin(relative=0.05), "no idea", "100", 0),
    (NumberWithin(), "-7", ["8", "-7"], 1), (NumberWithin(relative=0.1), "-95", "-100", 1),
])  # fmt: skip
def test_numbers_within_a_tolerance(metric, answer, reference, score):
    assert measure(metric, [(answer, reference)])[0]["number_within"] == score


@pytest.mark.parametrize("answer, reference, score", [
    ("105", "100", 1), ("105.1", "100", 0), ("5%", "0.05", 1), ("5.2%", "5%", 1), ("5.3%", "5%", 0), ("Yes", "yes", 1), ("yes sir", "yes", 0), ("0", "0", 1),
    ("0.01", "0", 0), ("-9.6", "-10", 1), ("Red", ["blue", "red"], 1),
])  # fmt: skip
def test_relaxed_accuracy(answer, reference, score):
    assert measure(RelaxedAccuracy(), [(answer, reference)])[0]["relaxed_accuracy"] == score


# --- sacrebleu, Chinese -------------------------------------------------------------------------------------------


def test_bleu_and_chrf_are_sacrebleus_with_its_signature():
    from sacrebleu.metrics import BLEU, CHRF

    pairs = [("the cat sat on a mat", ["the cat sat on the mat", "a cat on a mat"]), ("dogs run in the park", ["dogs run in a green park", "some dogs run"])]
    streams = [[refs[i] for _, refs in pairs] for i in range(2)]
    for metric, theirs, name in ((SacreBleu(), BLEU(), "bleu"), (Chrf(), CHRF(), "chrf"), (Chrf(word_order=2), CHRF(word_order=2), "chrf")):
        expected = theirs.corpus_score([p for p, _ in pairs], streams)
        corpus, _ = measure(metric, pairs)
        assert corpus[name] == pytest.approx(expected.score)
        rows = [{"prediction": p, "references": r} for p, r in pairs]
        assert MetricSet({"m": metric}).info(rows)[name]["note"] == f"sacrebleu {theirs.get_signature()}"
    # a row with fewer references than another
    uneven = [pairs[0], ("dogs run", ["dogs run"])]
    assert measure(SacreBleu(), uneven)[0]["bleu"] == pytest.approx(BLEU().corpus_score([p for p, _ in uneven], [[uneven[0][1][0], "dogs run"], [uneven[0][1][1], None]]).score)


CHINESE = [("我来到北京清华大学", "我来到北京清华大学"), ("一只红色的猫坐着", "一只黑色的猫坐在桌子上")]


def test_chinese_is_cut_into_characters_or_jieba_words_and_the_output_says_which():
    import jieba

    assert tokenise("我来到北京清华大学 now") == [*"我来到北京清华大学", "now"]
    assert tokenise("我来到北京清华大学 now", "jieba") == [*jieba.lcut("我来到北京清华大学"), "now"] != tokenise("我来到北京清华大学 now")
    assert tokenise("我来到北京清华大学", "jieba") == ["我", "来到", "北京", "清华大学"]  # the example of jieba's own page
    for metric in (Bleu4, RougeL, Cider):
        by_character, by_word = (measure(metric(name), CHINESE)[0] for name in ("characters", "jieba"))
        assert by_character != by_word
        rows = [{"prediction": p, "references": [r]} for p, r in CHINESE]
        (info,) = MetricSet({"m": metric("jieba")}).info(rows).values()
        assert "jieba words" in info["note"]
        (info,) = MetricSet({"m": metric()}).info(rows).values()
        assert "characters" in info["note"]
    (info,) = MetricSet({"m": Bleu4()}).info([{"prediction": "a", "references": ["a"]}]).values()
    assert "note" not in info, "nothing is cut"
    rows = [{"prediction": p, "references": [r]} for p, r in CHINESE]
    assert "tok:zh" in MetricSet({"m": SacreBleu()}).info(rows)["bleu"]["note"]
    assert "words by jieba" in MetricSet({"m": SacreBleu(segmentation="jieba")}).info(rows)["bleu"]["note"]
    with pytest.raises(UserError, match="must be characters or jieba"):
        Bleu4("letters")


# --- rows that a metric cannot score ------------------------------------------------------------------------------


class Raises(Classes):
    def row(self, row):
        if row["id"] == "2":
            raise ZeroDivisionError("by nothing")
        return super().row(row)


def test_a_metric_that_raises_names_row_and_metric_and_the_value_is_missing(caplog):
    metrics = MetricSet({"mine": Raises()})
    rows = [{"id": str(i), "prediction": "a", "references": ["a"]} for i in range(4)]
    for row in rows:
        row["metrics"] = metrics.row(row)
    assert "metric mine: row 2: ZeroDivisionError: by nothing" in caplog.text and rows[2]["metrics"] == {}
    assert metrics.corpus(rows)["class_accuracy"] == 1.0 and metrics.info(rows)["class_accuracy"]["missing"] == 1


class Odd(Classes):
    """Returns for each row what its answer names; its check wants an answer, which no row has before training."""

    VALUES = {"text": {"class_accuracy": "good"}, "nan": {"class_accuracy": float("nan")}, "other": {"accuracy": 1.0}, "numpy": {"class_accuracy": np.float32(0.5)}}

    def row(self, row):
        return self.VALUES[row["prediction"]]

    def problem(self, row):
        return "is empty" if not row["prediction"] else None


def test_what_is_no_score_is_named_and_missing(caplog):
    from mmft.data.sample import Sample, assistant_turn, user_turn

    metrics = MetricSet({"odd": Odd()})
    rows = [{"id": answer, "prediction": answer, "references": ["a"]} for answer in Odd.VALUES]
    found = {row["id"]: metrics.row(row) for row in rows}
    assert found == {"text": {}, "nan": {}, "other": {}, "numpy": {"class_accuracy": 0.5}} and type(found["numpy"]["class_accuracy"]) is float
    for said in ("row text: ValueError: gives class_accuracy='good', which is no finite number", "row nan: ValueError: gives class_accuracy=nan",
                 "row other: ValueError: gives 'accuracy', and its SCORES are class_accuracy, macro_f1"):
        assert said in caplog.text
    sample = Sample("r0", (), [user_turn(0, "?"), assistant_turn("a")], ("a",), "/")
    with pytest.raises(UserError, match=r"odd can score none of the 1 rows: row r0 cannot be checked \(KeyError: 'prediction'\); leave odd out"):
        metrics.check([sample])


def test_rows_without_what_a_metric_needs_are_left_out_or_refused():
    from mmft.data.sample import Sample, assistant_turn, user_turn

    samples = [Sample(f"r{i}", (), [user_turn(0, "?"), assistant_turn(text)], (text,), "/") for i, text in enumerate(["a cat", "{}", "12"])]
    MetricSet({"json": Json(), "number": NumberWithin()}).check(samples)
    with pytest.raises(UserError, match="json can score none of the 1 rows: row r0 has a reference that is not JSON: 'a cat'; leave json out"):
        MetricSet({"json": Json()}).check(samples[:1])
    with pytest.raises(UserError, match="both give a score named json_f1"):
        MetricSet({"json": Json(), "other": Json()})
    rows = [{"id": s.id, "prediction": "{}", "references": list(s.references)} for s in samples]
    for row in rows:
        row["metrics"] = MetricSet({"json": Json()}).row(row)
    assert MetricSet({"json": Json()}).info(rows)["json_f1"]["missing"] == 1  # "a cat"; 12 is JSON
