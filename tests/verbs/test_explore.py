"""`mmft explore`: every count against a count by hand, the page offline and complete, rows that training would refuse."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from mmft.audit import survey_page
from mmft.audit.languages import language_teller, script
from mmft.audit.survey import survey
from mmft.config.compose import compose
from mmft.data.prepare import prepared_data

LONG = "one two three four five six seven eight"
# (picture, width, height, split, question, answer)
ROWS = [
    ("a", 40, 20, "train", "What?", "yes"), ("a", 40, 20, "train", "What?", "No."), ("a", 40, 20, "train", "Who?", "yes"),
    ("b", 10, 30, "train", "What?", "yes"), ("c", 300, 200, "train", "What?", "no"), ("d", 20, 20, "train", "Tell.", LONG),
    ("e", 20, 20, "validation", "What?", "yes"), ("f", 24, 20, "validation", "Tell.", LONG), ("f", 24, 20, "validation", "How?", "a longer answer"),
    ("g", 20, 20, "test", "Tell.", "一只狗坐在桌子上，旁边有一本书。"),
]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    for number, (name, width, height) in enumerate(sorted({row[:3] for row in ROWS})):
        Image.new("RGB", (width, height), (20 * number, 10, 3)).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{p}.png", "q": q, "text": a, "split": s} for p, _, _, s, q, a in ROWS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["data=table", f"data.path={tmp_path / 't.jsonl'}", "data.columns.prompt=q", "data.columns.split=split"]


@pytest.fixture
def found(table, tmp_path):
    return survey(prepared_data(compose([*table, f"output_dir={tmp_path}"])))


def test_counts_of_each_split(found):
    for part in found.parts:
        rows = [row for row in ROWS if row[3] == part.split]
        assert len(part.rows) == len(rows) and part.distinct == len({row[5] for row in rows})
        assert sorted(map(tuple, part.sizes.tolist())) == sorted((w, h) for _, w, h in {row[:3] for row in rows})
        assert part.answers == Counter(row[5] for row in rows).most_common()
        assert part.characters.tolist() == [len(row[5]) for row in rows] and part.words.tolist() == [len(row[5].split()) for row in rows]
    train = found.parts[0]
    assert train.answers[0] == ("yes", 3) and train.percentiles(train.words) == [1, 1, 8, 8, 8]
    assert train.percentiles(train.sizes[:, 0]) == [10, 20, 300, 300, 300]  # widths 10, 20, 40, 300
    assert sorted(train.aspects.tolist()) == [10 / 30, 1.0, 1.5, 2.0]


def test_texts_that_occur_in_training(found):
    assert (found.repeated, found.repeated_long) == (2, 1)
    first, second = found.repeats  # the long answer first
    assert (first.held_out.id, first.training.id, first.split) == ("8", "6", "validation") and first.words == 8
    assert (second.held_out.id, second.training.id) == ("7", "1")


def test_contradictions_ignore_case_and_a_full_stop(found):
    assert (found.contradicting, found.contradicting_rows) == (1, 2)
    ((one, two),) = [c.rows for c in found.contradictions]
    assert [(split, row.answer_text) for split, row in (one, two)] == [("train", "yes"), ("train", "No.")]


def test_bars_add_up():
    import numpy as np

    sizes = np.array([[112, 50], [113, 20], [2048, 9], [2049, 9], [448, 449]])
    assert [(b["name"], b["count"]) for b in survey_page.size_bars(sizes)] == [("up to 112", 1), ("113 to 224", 1), ("449 to 672", 1), ("1537 to 2048", 1), ("above 2048", 1)]
    aspects = np.array([0.1, 1 / 3, 0.5, 0.75, 1, 4 / 3, 2, 3, 3.1])
    counted = {b["name"]: b["count"] for b in survey_page.aspect_bars(aspects)}
    assert counted == {"taller than 1:3": 2, "1:3 to 1:2": 1, "1:2 to 3:4": 1, "3:4 to 4:3": 2, "4:3 to 2:1": 1, "2:1 to 3:1": 1, "wider than 3:1": 1}


def test_the_terminal_has_one_screen_and_the_page_has_everything(mmft, table, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = mmft("explore", *table, "pictures=2", f"out={page}")
    assert code == 0, err
    assert len(out.splitlines()) <= 30 and all(len(line) <= 80 for line in out.splitlines() if not line.startswith("page"))
    assert "2 rows, 1 of them with answers of 8 or more words" in " ".join(out.split()) and "1 questions about the same images" in " ".join(out.split())
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text
    # 2 + 2 + 1 shown rows, 2 x 2 of repeats, 2 of a contradiction
    assert text.count("data:image/png") == 2 + 2 + 1 + 4 + 2
    assert "taller than 1:3" in text and "Chinese" in text and LONG in text


def test_rows_that_training_refuses_are_explored_and_still_refused(mmft, table, tmp_path):
    (tmp_path / "c.png").write_bytes(b"no image")
    assert mmft(*table, "prepare")[0] == 2
    page = tmp_path / "page.html"
    code, out, err = mmft("explore", *table, f"out={page}")
    assert code == 0 and "1 unreadable image" in out, err
    assert "t.jsonl" in page.read_text(encoding="utf-8") and "not a picture in a known format" in page.read_text(encoding="utf-8")
    code, _, err = mmft("prepare", *table)
    assert code == 2 and "1 of 10 rows cannot be used (data.max_bad_share=0.01 allows 0)" in err and "report.jsonl" in err
    assert mmft("prepare", *table, "data.max_bad_share=0.2")[0] == 0


def test_a_mix_is_shown_by_source(mmft, table, tmp_path):
    words = [f"data.sources.{name}{word.removeprefix('data')}" for name in ("one", "two") for word in table]
    page = tmp_path / "page.html"
    code, out, err = mmft("explore", "data=mix", *words, f"out={page}")
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    for name in ("one: train", "two: train", "one: validation", "two: test"):
        assert f"<h2>{name}</h2>" in text and name in out


def test_what_cannot_be_done_is_one_line(mmft, table, tmp_path):
    (tmp_path / "there.html").write_text("mine", encoding="utf-8")
    for word, message in ((f"out={tmp_path / 'there.html'}", "exists already"), ("pictures=-1", "pictures=-1: must be")):
        code, _, err = mmft("explore", *table, word)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "there.html").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("text", "name"), [
    ("a dog", "Latin"), ("一只狗", "Chinese"), ("机の上の猫", "Japanese"), ("책상 위의 고양이", "Korean"), ("кошка на столе", "Cyrillic"), ("قطة على الطاولة", "Arabic"), ("12 + 3", ""),
])  # fmt: skip
def test_scripts(text, name):
    assert script(text) == name


def test_languages():
    tell = language_teller()
    texts = {
        "en": "A small brown dog is lying asleep under the kitchen table next to a red bowl.", "de": "Ein kleiner brauner Hund schläft unter dem Küchentisch neben einer roten Schüssel.",
        "fr": "Un petit chien brun dort sous la table de la cuisine à côté d'un bol rouge.", "es": "Un pequeño perro marrón duerme debajo de la mesa de la cocina junto a un plato rojo.",
        "ru": "Маленькая коричневая собака спит под кухонным столом рядом с красной миской.",
    }  # fmt: skip
    assert {name: tell(text) for name, text in texts.items()} == {name: name for name in texts}
    assert tell("yes") == "short, Latin letters" and tell("42") == "no letters" and tell("一只狗") == "Chinese"


def test_without_the_package_scripts_are_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    assert language_teller()("A small brown dog") == "Latin letters"
