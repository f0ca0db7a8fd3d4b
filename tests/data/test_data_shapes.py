"""Every row of the table of input shapes in docs/data.md is prepared as a command: what it becomes, or how it is refused and what works then."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import png

from mmft.data.prepared import PreparedData
from mmft.data.sample import Sample, text_of

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


class Shape(NamedTuple):
    name: str
    file: str
    content: str
    words: list[str]
    becomes: str


def shapes() -> list[Shape]:
    """The rows of the table under `## Input shapes`; code is taken out of its backquotes."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").partition("## Input shapes")[2].splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 5 or cells[0] in ("input", "---"):
            continue
        file, content, words = (c.strip("`").strip().replace("\\|", "|") for c in cells[1:4])
        found.append(Shape(cells[0], file, content, shlex.split(words), cells[4].replace("\\|", "|")))
    return found


SHAPES = shapes()


def escaped(text: str) -> str:
    """Text whose line ends and tabs are written as \\n, \\r and \\t."""
    return re.sub(r"\\(\\|n|r|t)", lambda m: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[m.group(1)], text)


def write(folder: Path, shape: Shape) -> Path:
    """The shape's file beside the images that all shapes have. Returns what data.path names."""
    for name, number in (("a.png", 0), ("b.png", 1), ("c.png", 2), ("photo.jfif", 3), ("cam1:2024-01-01T10:20:30.png", 4)):
        (folder / name).write_bytes(png(number))
    with zipfile.ZipFile(folder / "pics.zip", "w") as archive:
        archive.writestr("z.png", png(5))
        archive.writestr("deep/more/y.png", png(6))
    with tarfile.open(folder / "pics.tar", "w") as archive:
        member = tarfile.TarInfo("t.png")
        member.size = len(png(7))
        archive.addfile(member, io.BytesIO(png(7)))
    if shape.file.endswith("/"):
        for place, name in zip(shape.file.split(", "), shape.content.split("; ")):
            (folder / "tree" / place).mkdir(parents=True)
            (folder / "tree" / place / name).write_bytes(png(ord(name[0])))
        return folder / "tree"
    encoding, mark, text = shape.content.partition(": ")
    if not mark or not re.fullmatch(r"[a-z0-9_-]+", encoding):
        encoding, text = "utf-8", shape.content
    letters = base64.b64encode(png(0)).decode()
    wrapped = "\\n".join(letters[i : i + 60] for i in range(0, len(letters), 60))
    text = escaped(text).replace("{A}", letters).replace("{A:wrapped}", wrapped)
    path = folder / shape.file
    if encoding in ("parquet", "arrow"):
        table = pa.Table.from_pylist(json.loads(text))
        if encoding == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    else:
        path.write_bytes(text.encode(encoding))
    return folder if shape.file == "metadata.csv" else path


def keys(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words}


def prepared_by(mmft, folder: Path, words: list[str]) -> tuple[PreparedData | None, str]:
    """(the prepared set or None, what the command said)."""
    defaults = ["data=table", "data.splits.validation=0"]
    code, out, err = mmft("prepare", *(w for w in defaults if w.partition("=")[0] not in keys(words)), *words)
    assert (code == 0) == (" in " in out), (out, err)
    if code:
        assert code == 2 and err.count("\n") == 1 and all(len(word) <= 200 for word in err.split()), err
        return None, err
    (name,) = re.findall(r"fingerprint \w+, in (.*)", out)
    return PreparedData(name), out


def first(sample: Sample) -> tuple[str, str]:
    texts = ["".join("[image]" if p["type"] == "image" else text_of([p]) for p in m["content"]) for m in sample.messages]
    return texts[0], texts[1]


@pytest.mark.parametrize("shape", SHAPES, ids=[s.name for s in SHAPES])
def test_shape(mmft, tmp_path, shape):
    folder = tmp_path / "set"
    folder.mkdir()
    path = f"data.path='{write(folder, shape)}'"
    data, said = prepared_by(mmft, folder, [path, *shape.words])
    if shape.becomes.startswith("refused: "):
        reason, _, way = shape.becomes.removeprefix("refused: ").partition("; works with ")
        assert data is None and reason in said, said
        if way:
            words = shlex.split(way)
            data, said = prepared_by(mmft, folder, [path, *(w for w in shape.words if w.partition("=")[0] not in keys(words)), *words])
            assert data is not None, said
        return
    assert data is not None, said
    samples = list(data.split("train"))
    count, prompt, answer, rest = re.fullmatch(r"(\d+) rows?; `(.*?)` → `(.*?)`(.*)", shape.becomes).groups()
    assert sum(data.splits.values()) == int(count), said
    assert first(samples[0]) == (escaped(prompt), escaped(answer))
    assert samples[0].load_images() and data.manifest["dropped"] == 0
    assert list(samples[0].references) == (re.findall(r"`(.*?)`", rest) or [first(samples[0])[1] if len(samples[0].messages) == 2 else samples[0].answer_text])


def test_the_page_has_enough_shapes():
    assert len(SHAPES) >= 60 and len({s.name for s in SHAPES}) == len(SHAPES)
    assert sum(s.becomes.startswith("refused") for s in SHAPES) >= 15
