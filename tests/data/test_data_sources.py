"""Each source on files written here: the rows it gives, in messages and references, and what it refuses."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import all_rows, make, pictures, png, report, write_csv, write_json, write_jsonl

from mmft.common.errors import UserError
from mmft.data.sources.conversations import Conversations
from mmft.data.sources.imagefolder import ImageFolder
from mmft.data.sources.llamafactory import LlamaFactory
from mmft.data.sources.messages import OpenAIMessages
from mmft.data.sources.saved import SavedDataset
from mmft.data.sources.table import Table

LOSSY = {"max_bad_share": 0.99}


def turns(sample):
    """[(role, "text with [] for each image")]"""
    return [(m["role"], "".join("[]" if p["type"] == "image" else p["text"] for p in m["content"])) for m in sample.messages]


def first_pixel(sample):
    return [image.getpixel((0, 0))[0] for image in sample.load_images()]


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_table_of_every_kind(tmp_path, kind):
    pictures(tmp_path, "i/a.png", "i/b.png")
    rows = [{"photo": "i/a.png", "caption": "uno, dos", "key": "k1"}, {"photo": "i/b.png", "caption": "三 \"quoted\"\nline", "key": "k2"}]
    file = tmp_path / f"t.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(file, ["photo", "caption", "key"], *[list(r.values()) for r in rows], delimiter="," if kind == "csv" else "\t")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        (write_json if kind == "json" else write_jsonl)(file, rows)
    source = Table(path=str(file), columns={"image": "photo", "text": "caption", "id": "key"}, prompt="Say.")
    samples = all_rows(make(source, tmp_path))
    assert [s.id for s in samples] == ["k1", "k2"]
    assert turns(samples[0]) == [("user", "[]Say."), ("assistant", "uno, dos")]
    assert samples[1].answer_text == '三 "quoted"\nline' and first_pixel(samples[1]) == [1]
    assert source.total() >= 2


def test_table_rows_are_named_by_their_line(tmp_path):
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], ["a.png", "two\nlines"], ["a.png", "ok"], ["a.png", ""], ["a.png"], ["gone.png", "x"])
    prepared = make(Table(path=str(tmp_path / "t.csv"), **LOSSY), tmp_path)
    found = {line["where"]: line["reason"] for line in report(prepared)}
    assert found == {  # the first row spans lines 2 and 3
        "t.csv:5": "empty answer: column text is empty",
        "t.csv:6": "wrong number of cells: 1, the header has 2",
        "t.csv:7": "missing image: gone.png: no such file",
    }


def test_table_splits_references_prompts_and_lists(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    write_jsonl(tmp_path / "t.jsonl", [
        {"image": ["a.png", "b.png"], "q": "<image> or <image>?", "text": ["left", "the left one"], "part": "train", "all": ["a"]},
        {"image": "c.png", "q": "What is <b>this</b>?", "text": 7, "part": "val", "all": None},
    ])
    columns = {"prompt": "q", "split": "part", "references": "all"}
    prepared = make(Table(path=str(tmp_path / "t.jsonl"), columns=columns), tmp_path)
    one, two = prepared.split("train")[0], prepared.split("validation")[0]
    assert turns(one)[0] == ("user", "[] or []?") and one.references == ("left", "the left one", "a")
    assert turns(two) == [("user", "[]What is <b>this</b>?"), ("assistant", "7")]


def test_table_prompt_with_too_few_placeholders_is_dropped(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    write_jsonl(tmp_path / "t.jsonl", [{"image": ["a.png", "b.png"], "q": "see <image>", "text": "x"}, {"image": "a.png", "q": "see", "text": "x"}])
    prepared = make(Table(path=str(tmp_path / "t.jsonl"), columns={"prompt": "q"}, **LOSSY), tmp_path)
    assert report(prepared)[0]["reason"].startswith("image count: 1 placeholder in the text, 2 images")


def test_parquet_with_the_bytes_of_images(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": png(5), "path": None}], "text": ["five"]}), tmp_path / "p.parquet")
    assert first_pixel(all_rows(make(Table(path=str(tmp_path / "p.parquet")), tmp_path))[0]) == [5]


def test_several_files_by_pattern_or_folder(tmp_path):
    pictures(tmp_path / "d", "a.png")
    for n in (1, 2):
        write_csv(tmp_path / "d" / f"{n}.csv", ["image", "text"], ["a.png", f"t{n}"])
    for path in (tmp_path / "d", tmp_path / "d" / "*.csv"):
        assert [s.answer_text for s in all_rows(make(Table(path=str(path)), tmp_path))] == ["t1", "t2"]


@pytest.mark.parametrize(("change", "message"), [
    ({"columns": {"text": "captoin"}}, "data.columns.text=captoin: t.csv has no such column. Did you mean caption\\? It has: image, caption."),
    ({"columns": {"txt": "caption"}}, "data.columns.txt: no such key. Did you mean text?"),
    ({"path": "{tmp}/tt.csv"}, "no such file or folder .* Did you mean t.csv?"),
    ({"path": "{tmp}/nowhere/t.csv"}, "no such file or folder"),
    ({"path": "{tmp}/a.png"}, "neither its name nor its content shows a format; name it with data.format="),
    ({"path": "{tmp}/*.arrow"}, "no file matches"),
    ({"root": "{tmp}/absent", "columns": {"text": "caption"}}, "data.root=.*no such folder"),
    ({"limit": 0}, "data.limit=0"),
    ({"max_bad_share": 2}, "data.max_bad_share=2"),
    ({"name": "a/b"}, "data.name='a/b'"),
])
def test_table_refuses_with_one_line(tmp_path, change, message):
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "caption"], ["a.png", "x"])
    keys = {"path": "{tmp}/t.csv", **change}
    with pytest.raises(UserError, match=message) as caught:
        make(Table(**{k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in keys.items()}), tmp_path)
    assert "\n" not in str(caught.value)


def test_limit_counts_rows(tmp_path):
    pictures(tmp_path, "a.png")
    write_csv(tmp_path / "t.csv", ["image", "text"], *[["a.png", str(i)] for i in range(9)])
    assert len(all_rows(make(Table(path=str(tmp_path / "t.csv"), limit=4), tmp_path))) == 4


@pytest.mark.parametrize("raw", [b"image,text\na.png,\xff\xfe\n", b""])
def test_a_file_that_is_broken_as_a_whole(tmp_path, raw):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(UserError, match="UTF-8|is empty"):
        make(Table(path=str(tmp_path / "t.csv")), tmp_path)


# --- conversations -----------------------------------------------------------------------------------------------


def chat(tmp_path, rows, **keys):
    pictures(tmp_path / "images_dl", "a.png", "b.png", "x/c.png")
    write_json(tmp_path / "chat.json", rows)
    return Conversations(path=str(tmp_path), images="images_dl", **keys)


def test_llava_both_ways_of_writing_it(tmp_path):
    rows = [
        {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "Tell me.\n<image>"}, {"from": "gpt", "value": "one"}]},
        {"id": 2, "image": "x/c.png", "conversations": [{"role": "human", "value": "<image>\nTell me."}, {"role": "gpt", "value": "two"}]},
        {"image": ["a.png", "b.png"], "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "user", "value": "<image>\nand <image>, which?"}, {"from": "assistant", "value": "b"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes, the <image> tag is text here"}]},
    ]
    samples = all_rows(make(chat(tmp_path, rows), tmp_path))
    assert [s.id for s in samples] == ["1", "2", "3"]
    assert turns(samples[0]) == [("user", "Tell me.[]"), ("assistant", "one")]
    assert turns(samples[1]) == [("user", "[]Tell me."), ("assistant", "two")] and first_pixel(samples[1]) == [2]
    assert turns(samples[2])[1:] == [("user", "[]and [], which?"), ("assistant", "b"), ("user", "sure?"), ("assistant", "yes, the <image> tag is text here")]
    assert samples[2].images == ("a.png", "b.png") and samples[2].prompt_text == "sure?"


def test_image_tag_in_a_row_without_images_is_text(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "a tag"}]},
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}]
    samples = all_rows(make(chat(tmp_path, rows, text_only=True), tmp_path))
    assert turns(samples[0])[0] == ("user", "What is <image>?") and turns(samples[1])[0] == ("user", "[]")


def test_counts_that_disagree_are_dropped(tmp_path):
    def row(image, value):
        return {"image": image, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]}

    rows = [row("a.png", "<image>"), row(["a.png", "b.png"], "<image>"), row("a.png", "<image><image>"), {"image": "a.png", "conversations": "?"}]
    prepared = make(chat(tmp_path, rows, **LOSSY), tmp_path)
    assert [(r["where"], r["reason"]) for r in report(prepared)] == [
        ("chat.json[2]", "image count: 1 placeholder in the text, 2 images; write <image> once for each image, or not at all"),
        ("chat.json[3]", "image count: 2 placeholders in the text, 1 image; write <image> once for each image, or not at all"),
        ("chat.json[4]", "no answer: the row has no turns"),
    ]


def test_images_without_placeholder_stand_before_the_first_user_turn(tmp_path):
    rows = [{"image": images, "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "x"},
                                                {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "y"}]} for images in ("a.png", ["a.png", "b.png"])]
    prepared = make(chat(tmp_path, rows), tmp_path)
    assert [turns(s)[1:4:2] for s in all_rows(prepared)] == [[("user", "[]Which?"), ("user", "Why?")], [("user", "[][]Which?"), ("user", "Why?")]]
    assert [n for n in prepared.manifest["notes"] if "2 rows have images but no <image>" in n]
    quiet = make(chat(tmp_path, rows, image_position="added"), tmp_path)
    assert quiet.fingerprint == prepared.fingerprint and quiet.manifest["notes"] == []


def test_qwen_form(tmp_path):
    pictures(tmp_path, "coco/1.png")
    absolute = (tmp_path / "coco/1.png").as_posix()
    rows = [{"id": f"identity_{i}", "conversations": [
        {"from": "user", "value": f"COCO Yes: <|vision_start|>{path}<|vision_end|>"}, {"from": "assistant", "value": "a kitchen"}]}
        for i, path in enumerate(("coco/1.png", absolute), 1)]
    write_json(tmp_path / "data_vl.json", rows)
    kept = all_rows(make(Conversations(name="kept", path=str(tmp_path / "data_vl.json")), tmp_path))
    assert turns(kept[0]) == [("user", "COCO Yes:[]"), ("assistant", "a kitchen")]
    first = all_rows(make(Conversations(path=str(tmp_path / "data_vl.json"), image_position="first"), tmp_path))
    assert [turns(s)[0] for s in first] == [("user", "[]COCO Yes:")] * 2
    assert first[0].images == first[1].images == ("coco/1.png",)


def test_conversations_missing_parts(tmp_path):
    source = chat(tmp_path, [{"image": "a.png", "conversation": []}])
    with pytest.raises(UserError, match=r"chat.json\[1\]: has no 'conversations'. Did you mean conversation"):
        make(source, tmp_path)
    with pytest.raises(UserError, match="data.images=.*Did you mean images_dl"):
        make(Conversations(path=str(tmp_path), images="image_dl"), tmp_path)
    with pytest.raises(UserError, match="data.image_position=last"):
        Conversations(path="x", image_position="last")


# --- messages ----------------------------------------------------------------------------------------------------


def test_openai_messages(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    uri = "data:image/png;base64," + base64.b64encode(png(9)).decode()

    def row(*parts, **more):
        return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "ok"}], **more}

    rows = [
        row({"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "image": "b.png"}),
        row({"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What?"}),
        {"messages": [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "images": ["b.png"]},
        row({"type": "image"}, {"type": "text", "text": "named by the row"}, images=["a.png"]),
        row({"type": "image_url", "image_url": {"url": "https://host/x.png"}}),
        row({"type": "image", "image": "data:image/png;base64,mmft.@"}),
        row({"type": "video", "video": "x.mp4"}),
        row({"type": "image"}),
    ]
    prepared = make(OpenAIMessages(path=str(write_jsonl(tmp_path / "m.jsonl", rows)), **LOSSY), tmp_path)
    samples = all_rows(prepared)
    assert [turns(s)[0][1] for s in samples] == ["Look: [][]", "[]What?", "[]what", "[]named by the row"]
    assert [first_pixel(s) for s in samples] == [[0, 1], [9], [1], [0]]
    reasons = [r["reason"] for r in report(prepared)]
    kinds = ["image is a URL: https://host", "unreadable image: a data: URI", "broken turn: turn 1 holds a part of type 'video'", "image count"]
    assert len(reasons) == 4 and all(any(r.startswith(k) for r in reasons) for k in kinds), reasons


def test_broken_lines_are_dropped(tmp_path):
    pictures(tmp_path, "a.png")
    good = json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, {"role": "assistant", "content": "x"}]})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{{broken\n\n[1]\n{good}\n", encoding="utf-8")
    prepared = make(OpenAIMessages(path=str(tmp_path / "m.jsonl"), **LOSSY), tmp_path)
    assert [(r["where"], r["reason"].split(":")[0]) for r in report(prepared)] == [("m.jsonl:2", "broken JSON"), ("m.jsonl:4", "broken JSON")]
    assert len(all_rows(prepared)) == 2


# --- folders and saved sets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder(tmp_path, kind):
    folder = pictures(tmp_path / "f", "a.png", "sub/b.png")
    rows = [{"file_name": "a.png", "text": "A"}, {"file_name": "sub/b.png", "text": "B"}]
    if kind == "csv":
        write_csv(folder / "metadata.csv", ["file_name", "text"], *[list(r.values()) for r in rows])
    else:
        write_jsonl(folder / "metadata.jsonl", rows)
    samples = all_rows(make(ImageFolder(path=str(folder)), tmp_path))
    assert [(s.answer_text, first_pixel(s)) for s in samples] == [("A", [0]), ("B", [1])]


def test_imagefolder_with_splits(tmp_path):
    folder = pictures(tmp_path / "f", "train/a.png", "validation/a.png")
    for part in ("train", "validation"):
        write_jsonl(folder / part / "metadata.jsonl", [{"file_name": "a.png", "text": part}])
    prepared = make(ImageFolder(path=str(folder)), tmp_path)
    assert {n: prepared.split(n)[0].images for n in prepared.splits} == {"train": ("train/a.png",), "validation": ("validation/a.png",)}
    with pytest.raises(UserError, match="holds no metadata.jsonl"):
        make(ImageFolder(path=str(tmp_path)), tmp_path)


def test_saved_dataset_and_its_splits(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    features = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["cat", "dog"])})

    def part(*numbers):
        return Dataset.from_list([{"image": {"bytes": png(n), "path": None}, "text": f"t{n}", "label": n % 2} for n in numbers], features=features)

    part(1, 2).save_to_disk(str(tmp_path / "one"))
    samples = all_rows(make(SavedDataset(path=str(tmp_path / "one")), tmp_path))
    assert [(s.answer_text, first_pixel(s), turns(s)[0]) for s in samples] == [("t1", [1], ("user", "[]")), ("t2", [2], ("user", "[]"))]
    labels = all_rows(make(SavedDataset(path=str(tmp_path / "one"), columns={"text": "label"}, prompt="Which?"), tmp_path))
    assert [s.answer_text for s in labels] == ["dog", "cat"]

    DatasetDict({"train": part(1, 2, 3), "test": part(3, 4)}).save_to_disk(str(tmp_path / "two"))
    prepared = make(SavedDataset(name="two", path=str(tmp_path / "two")), tmp_path)
    assert prepared.splits == {"train": 2, "test": 2} and prepared.manifest["dropped"] == 1  # picture 3 is held out
    assert report(prepared)[0]["reason"].startswith("image in two splits") and report(prepared)[0]["where"] == "train[3]"
    assert make(SavedDataset(path=str(tmp_path / "two"), split="test"), tmp_path).splits == {"train": 2}
    with pytest.raises(UserError, match="data.split=tset: .*Did you mean test"):
        make(SavedDataset(path=str(tmp_path / "two"), split="tset"), tmp_path)
    with pytest.raises(UserError, match="data.columns.text=caption"):
        make(SavedDataset(path=str(tmp_path / "one"), columns={"text": "caption"}), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no state.json"):
        make(SavedDataset(path=str(tmp_path / "empty")), tmp_path)


# --- LLaMA-Factory -----------------------------------------------------------------------------------------------


def test_llamafactory(tmp_path):
    pictures(tmp_path, "img/a.png", "img/b.png")
    write_json(tmp_path / "dataset_info.json", {
        "alp": {"file_name": "alp.json", "columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "sys", "history": "history", "images": "images"}},
        "share": {"file_name": "share.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"},
                  "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        "plain": {"file_name": "plain.json", "formatting": "sharegpt", "columns": {"images": "images"}},
        "far": {"hf_hub_url": "a/b"}, "rank": {"file_name": "alp.json", "ranking": True},
    })
    write_json(tmp_path / "alp.json", [{"instruction": "<image>Describe", "input": "briefly", "output": "A", "sys": "S", "history": [["hi", "ho"]], "images": ["img/a.png"]}])
    write_jsonl(tmp_path / "share.jsonl", [{"messages": [{"role": "user", "content": "<image><image>same?"}, {"role": "assistant", "content": "no"}], "images": ["img/a.png", "img/b.png"]}])
    write_json(tmp_path / "plain.json", [{"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "P"}], "images": ["img/b.png"]}])
    one = {n: all_rows(make(LlamaFactory(name=n, path=str(tmp_path), dataset=n), tmp_path))[0] for n in ("alp", "share", "plain")}
    assert turns(one["alp"]) == [("system", "S"), ("user", "hi"), ("assistant", "ho"), ("user", "[]Describe\nbriefly"), ("assistant", "A")]
    assert turns(one["share"]) == [("user", "[][]same?"), ("assistant", "no")] and first_pixel(one["share"]) == [0, 1]
    assert turns(one["plain"]) == [("user", "[]?"), ("assistant", "P")]
    for name, message in (("shar", "Did you mean share"), ("far", "use data=hub"), ("rank", "ranking set")):
        with pytest.raises(UserError, match=message):
            make(LlamaFactory(path=str(tmp_path), dataset=name), tmp_path)
