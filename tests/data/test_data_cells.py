"""Cells of tables: lists that are written as text, images in every encoding, and values that are not text."""

import base64
import json

import pytest
from small import png

from mmft.data.readers.text import unreadable_text
from mmft.data.sources.cells import UnusableRow, image_cells, texts
from mmft.data.sources.turns import read_turns

PNG = png(3)
BASE64 = base64.b64encode(PNG).decode()
LARGE = png(3, 300)


@pytest.mark.parametrize("cell, expected", [
    ('["a", "b"]', ["a", "b"]), ("['a', 'b']", ["a", "b"]), ("[ 'a' ,\n 'b' ]", ["a", "b"]), ("('a', 'b')", ["a", "b"]), ("['a' 'b']", ["a", "b"]),
    ("['a'\n 'b']", ["a", "b"]), ("array(['a', 'b'], dtype=object)", ["a", "b"]), ("""['it\\'s', "b"]""", ["it's", "b"]), ('["a, b", "c]"]', ["a, b", "c]"]),
    ("['a']", ["a"]), ("['猫', '犬']", ["猫", "犬"]), ("[u'a', u'b']", ["a", "b"]), ("['a', '']", ["a"]), (["a", None, " b "], ["a", "b"]), ([["a"], ["b"]], ["a", "b"]),
    # text that is no list
    ("[10, 20]", ["[10, 20]"]), ("[1] a dog", ["[1] a dog"]), ("(a dog)", ["(a dog)"]), ("['a'] and ['b']", ["['a'] and ['b']"]), ("[]", ["[]"]), ("a ['b']", ["a ['b']"]),
    ('{"a": "b"}', ['{"a": "b"}']), ("('a')", ["('a')"]), ('["a", 1]', ['["a", 1]']), ("[cat]", ["[cat]"]),
    # numbers may be labels
    (7, ["7"]), (0, ["0"]), (2.5, ["2.5"]), ({"raw": "a"}, ["a"]), ([{"answer": "a"}, {"answer": "b"}], ["a", "b"]), (None, []), ("  ", []),
])  # fmt: skip
def test_texts(cell, expected):
    assert texts(cell) == expected


@pytest.mark.parametrize("cell, kind", [
    (True, "true"), (False, "false"), (float("nan"), "NaN"), ({"a": 1}, "an object"), ([True], "true"), (b"a", "a bytes"), ([{"x": "y"}], "an object"),
    ("['it's', 'b']", "looks like a list of texts but is not one"),
])  # fmt: skip
def test_values_that_are_not_text(cell, kind):
    with pytest.raises(UnusableRow, match=kind):
        texts(cell, "column text")


@pytest.mark.parametrize("cell", [
    BASE64, "data:image/png;base64," + BASE64, "data:;base64," + BASE64, BASE64.rstrip("="), BASE64.replace("+", "-").replace("/", "_"),
    "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)), "\r\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)) + "\r\n", f"  {BASE64}\n",
    PNG, repr(PNG), BASE64.encode(), repr(BASE64.encode()), {"bytes": PNG, "path": "x.png"}, {"bytes": BASE64}, {"bytes": list(PNG)}, {"base64": BASE64},
    {"url": "data:image/png;base64," + BASE64}, str({"bytes": PNG, "path": None}), json.dumps({"bytes": BASE64}), [PNG], memoryview(PNG),
])  # fmt: skip
def test_encoded_images(cell):
    assert image_cells(cell) == [PNG]


def test_a_large_base64_image():
    assert image_cells(base64.b64encode(LARGE).decode()) == [LARGE]


@pytest.mark.parametrize("cell, expected", [
    ("a.png", ["a.png"]), ("cam1:10:20.png", ["cam1:10:20.png"]), ("images/QkFTRTY0QkFTRTY0QkFTRTY0QkFTRTY0QkFTRTY0QkFTRTY0.jpg",) * 1 + (None,),
    ("['a.png', 'b.png']", ["a.png", "b.png"]), ('["a.png"]', ["a.png"]), ("[a.png, b.png]", ["a.png", "b.png"]), ("[1] a.png", ["[1] a.png"]),
    ({"path": "a.png"}, ["a.png"]), ({"file_name": "a.png"}, ["a.png"]), ([{"path": "a.png"}, "b.png"], ["a.png", "b.png"]), ("", []), (None, []), (float("nan"), []),
    ("AAAA.png", ["AAAA.png"]), ("Qk" * 30 + ".bmp", ["Qk" * 30 + ".bmp"]), ("(1).png", ["(1).png"]),
])  # fmt: skip
def test_paths_stay_paths(cell, expected):
    assert image_cells(cell) == ([cell] if expected is None else expected)


@pytest.mark.parametrize("cell", ["data:image/png;base64,@@", "data:,x", {"bytes": "not base64!"}, {"bytes": -1}, {"bytes": 10**12}, 5, True])
def test_cells_that_hold_no_image(cell):
    with pytest.raises(UnusableRow, match="image"):
        image_cells(cell)


@pytest.mark.parametrize("turns", [
    [{"user": "q", "assistant": "r"}], [{"question": "q", "answer": "r"}], [{"q": "q", "a": "r"}], [["q", "r"]], [{"human": "q", "gpt": "r"}],
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "r"}]}],
    json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]), str([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]),
    [{"question": "q", "answers": ["r", "s"]}], [{"instruction": "q", "output": "r"}],
])  # fmt: skip
def test_conversations(turns):
    read = read_turns(turns, ["a.png"])
    assert [(m["role"], [p.get("text", p["type"]) for p in m["content"]]) for m in read.messages] == [("user", ["image", "q"]), ("assistant", ["r"])]
    assert read.images == ["a.png"] and len(read.notes) == 1


def test_keys_of_turns_that_training_reads():
    size = {"min_pixels": 784, "resized_height": 28}
    read = read_turns([{"role": "user", "content": [{"type": "image", "image": "a.png", **size}, "q"]},
                       {"role": "assistant", "content": "r", "loss": False, "reasoning_content": "hm"}, {"role": "user", "content": "q"},
                       {"role": "assistant", "content": "s", "weight": 0}, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "u", "loss": True}], [])  # fmt: skip
    assert read.messages[0]["content"][0] == {"type": "image", **size}
    assert [m.get("loss") for m in read.messages] == [None, False, None, False, None, None] and read.messages[1]["reasoning_content"] == "hm"
    for broken, message in (({"loss": "no"}, "must be true or false"), ({"weight": "much"}, "must be a number, 0 or above"), ({"weight": -1}, "must be a number, 0 or above")):
        with pytest.raises(UnusableRow, match=message):
            read_turns([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", **broken}], [])
    with pytest.raises(UnusableRow, match="max_pixels=many"):
        read_turns([{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": "many"}]}], [])


@pytest.mark.parametrize("text, encoding, named", [
    ("描述这张图片，一只猫坐在桌子上。", "gbk", "gb18030"), ("描述这张图片，一只猫坐在桌子上。", "gb18030", "gb18030"), ("一隻貓坐在桌子上，旁邊有書。", "big5", "big5"),
    ("猫が机の上に座っています。", "shift_jis", "cp932"), ("кошка сидит на столе и смотрит", "cp1251", "cp1251"), ("кошка сидит на столе и смотрит", "koi8-r", "koi8_r"),
    ("고양이가 책상 위에 앉아 있다", "euc_kr", "cp949"), ("un café très élégant près de l'été", "latin-1", "cp1252"), ("Straße und Größe aus Übermut", "cp1252", "cp1252"),
    ("描述这张图片，一只猫", "utf-16-le", "utf_16_le"), ("描述这张图片，一只猫", "utf-16-be", "utf_16_be"),
])  # fmt: skip
def test_encodings_are_named_and_can_be_read(tmp_path, text, encoding, named):
    from mmft.common.errors import UserError
    from mmft.data.readers.files import ReadOptions, read

    path = tmp_path / "t.csv"
    path.write_bytes(("image,text\n" + f"a.png,{text}\n" * 5).encode(encoding))
    with pytest.raises(UserError, match=rf"t.csv: is not UTF-8 text.*; it looks like {named} .*data.encoding={named}") as caught:
        list(read(path))
    assert "\n" not in str(caught.value)
    assert [values["text"] for _, values in read(path, ReadOptions(encoding=named))] == [text] * 5  # the way that is named
    assert "UTF-8" in str(unreadable_text(path, None))
