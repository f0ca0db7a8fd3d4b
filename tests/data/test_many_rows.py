"""Rows in record batches: ids, order, texts and fingerprint are those of a plain loop over the rows; rows that are read quickly are those that are read slowly."""

import hashlib
import json

import pytest
from small import all_rows, make, pictures, report, write_jsonl

from mmft.data import row_text
from mmft.data.sources.columns import Columns
from mmft.data.sources.messages import OpenAIMessages
from mmft.data.sources.table import Table

TEXTS = ["plain", 'quote " and \\ back', "two\nlines\tand a tab", "bell \x07, delete \x7f, line \u2028 end", "汉字 ünïcode", "(brackets) [in] {text}", "a dog", "array of dots"]


def lines_hash(rows) -> str:
    """The hash of rows (id, messages, references, image hashes), from what docs/data.md says of the fingerprint."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    return hashlib.sha256("".join(encode([id, encode(messages), references, images]) + "\n" for id, messages, references, images in rows).encode()).hexdigest()


def fingerprint(**splits) -> str:
    return hashlib.sha256("".join(f"{name}:{lines_hash(rows)}\n" for name, rows in splits.items()).encode()).hexdigest()


def test_ids_order_report_and_fingerprint_are_those_of_a_plain_loop(tmp_path):
    """2,600 rows, so three record batches; repeated ids within one and across them; broken lines and rows between."""
    root = pictures(tmp_path / "photos", *(f"{n}.png" for n in range(7)))
    digests = [hashlib.sha256((root / f"{n}.png").read_bytes()).hexdigest() for n in range(7)]
    lines, expected, changed, dropped, times = [], {"train": [], "validation": []}, [], [], {}

    def name(wanted):
        id = wanted
        while id in times:
            times[wanted] += 1
            id = f"{wanted}#{times[wanted]}"
        times[id] = 1
        return id

    for n in range(2600):
        where = len(lines) + 1
        if n % 97 == 5:
            lines.append('{"image": "0.png", "text"' if n % 2 else json.dumps({"image": "gone.png", "text": "x"}))
            dropped.append(where)
            continue
        split = "validation" if n % 7 == 6 else "train"
        id = {100: "twice", 200: "twice", 1500: "twice", 1501: "twice#2", 1502: "id100", 2500: "id2499"}.get(n, f"id{n}")
        text, prompt = TEXTS[n % len(TEXTS)], [f"What is {n}?", None, "", f"Tell \n me {n}"][n % 4 if split == "train" else 0]
        lines.append(json.dumps({"image": f"{n % 7}.png", "text": f" {text} ", "prompt": prompt, "id": id, "split": split}))
        own = name(id)
        if own != id:
            changed.append((where, id, own))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt or "Say it."}]}, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        expected[split].append((own, messages, [text], [digests[n % 7]]))
    table = root / "t.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    prepared = make(Table(path=str(table), prompt="Say it.", max_bad_share=0.5, near_distance=None,
                          columns={"image": "image", "text": "text", "prompt": "prompt", "id": "id", "split": "split"}), tmp_path)  # fmt: skip
    assert changed and [s.id for s in all_rows(prepared)] == [row[0] for rows in expected.values() for row in rows]
    assert [s.messages for s in all_rows(prepared)] == [row[1] for rows in expected.values() for row in rows]
    assert prepared.fingerprint == fingerprint(**expected)
    found = report(prepared)
    assert [(int(line["where"].partition(":")[2]), line["id"], line["reason"].rpartition(" ")[2]) for line in found if line["action"] == "changed"] == changed
    assert [int(line["where"].partition(":")[2]) for line in found if line["action"] == "dropped"] == dropped
    assert [line["where"] for line in found if line["action"] != "note"] == [f"t.jsonl:{n}" for n in sorted([*dropped, *(c[0] for c in changed)])]


CELLS = [
    {}, {"text": None}, {"text": ""}, {"text": "  "}, {"text": 5}, {"text": True}, {"text": ["a", "b"]}, {"text": "['a', 'b']"}, {"text": "[broken"}, {"text": '{"a": 1}'},
    {"text": "array(['x'])"}, {"text": "a b"}, {"text": "(a) b"}, {"text": {"raw": "coco"}}, {"image": ["a.png", "b.png"]}, {"image": "['a.png']"}, {"image": None}, {"image": ""},
    {"image": "data:image/png;base64,iVBORw0KGgo="}, {"image": "file:///a.png"}, {"image": "http://host/a.png"}, {"image": " a.png"}, {"image": "a b.png"}, {"image": "ä/b-c_d.png"},
    {"image": "/9j/" + "A" * 60}, {"image": "x" * 300}, {"image": {"path": "a.png"}}, {"prompt": "What?"}, {"prompt": " "}, {"prompt": "<image> What?"}, {"prompt": "<image><image>"},
    {"prompt": ["q"]}, {"prompt": "['q']"}, {"prompt": 7}, {"id": 3}, {"id": ""}, {"id": float("nan")}, {"split": "val"}, {"split": " "}, {"split": 1},
]  # fmt: skip


@pytest.mark.parametrize("prompt", [None, "Describe <image> it.", "Describe."])
def test_plain_rows_are_those_of_the_general_reader(prompt):
    """`references` names a column that no record has, which leaves every row as it is and is read by the general code."""
    names = {"image": "image", "text": "text", "prompt": "prompt", "id": "id", "split": "split"}
    plain, general = Columns(**names), Columns(**names, references="none")
    kinds = set()
    for cells in CELLS:
        record = {"image": "a.png", "text": "an answer", **cells}
        one, other = (list(columns.rows(record, "t:1", prompt)) for columns in (plain, general))
        assert len(one) == len(other) == 1
        kinds.add(type(one[0]).__name__)
        for key in ("images", "messages", "references", "id", "split", "where", "notes", "boxes_unit", "rejected", "label", "reason"):
            assert getattr(one[0], key, None) == getattr(other[0], key, None), (cells, key)
        assert list(getattr(one[0], "choices", [])) == []
    assert kinds == {"PlainRow", "Row", "BadRow"}


@pytest.mark.parametrize("most", [None, 300])
def test_messages_are_written_as_the_encoder_of_json_writes_them(tmp_path, monkeypatch, most):
    """Weights, reasoning, image sizes, several turns: what the quick writer leaves to json, and what it does not; hashed at once, and a row or two at a time."""
    if most:
        monkeypatch.setattr(row_text, "MOST_BYTES", most)
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    rows = [
        {"images": ["a.png"], "messages": [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": text}]} for text in TEXTS
    ] + [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "image", "image": "a.png", "min_pixels": 16}, {"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": "one", "weight": 0.5}, {"role": "user", "content": "and?"},
                      {"role": "assistant", "content": "two", "reasoning_content": 'hm "quoted"'}]},
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> or <image>"}, {"role": "assistant", "content": "b", "loss": True}]},
    ]  # fmt: skip
    write_jsonl(root / "m.jsonl", rows)
    prepared = make(OpenAIMessages(path=str(root / "m.jsonl"), near_distance=None), tmp_path)
    samples = all_rows(prepared)
    assert len(samples) == len(rows)
    assert samples[-2].messages[2]["weight"] == 0.5 and samples[-2].messages[4]["reasoning_content"] == 'hm "quoted"'
    assert prepared.fingerprint == fingerprint(train=[(s.id, s.messages, list(s.references), list(s.sha256)) for s in samples])


def test_a_row_gets_the_first_hundred_answers_of_the_rows_with_its_image_and_prompt(tmp_path):
    """1,300 held-out rows of one image in two record batches, every answer twice; the training rows keep their own answer."""
    root = pictures(tmp_path / "photos", "a.png", "b.png")
    held_out = [{"image": "a.png", "text": f"answer {n // 2}", "split": "val"} for n in range(1300)]
    table = write_jsonl(root / "t.jsonl", [{"image": "b.png", "text": f"training {n}", "split": "train"} for n in range(20)] + held_out)
    prepared = make(Table(path=str(table), columns={"image": "image", "text": "text", "split": "split"}), tmp_path)
    first = [f"answer {n}" for n in range(100)]
    for n, row in enumerate(prepared.split("validation")):
        own = f"answer {n // 2}"
        assert list(row.references) == [own, *(text for text in first if text != own)][:100]
    assert all(list(row.references) == [f"training {n}"] for n, row in enumerate(prepared.split("train")))
    rows = {split: [(s.id, s.messages, list(s.references), list(s.sha256)) for s in prepared.split(split)] for split in ("train", "validation")}
    assert prepared.fingerprint == fingerprint(**rows)
    assert "1300 held-out rows have the answers of other rows with the same images and prompt as references, too" in prepared.manifest["notes"]
