"""Small data sets for tests of mixes: two tables of images and a file of chats without images."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLUMNS = "{image: image, text: answer, prompt: question, split: split}"
TRAIN, HELD_OUT = {"caps": 8, "chat": 8, "more": 6}, {"caps": 3, "chat": 2, "more": 3}


def table_rows(name: str, shade: int) -> list[str]:
    """Rows of a table, the training rows first."""
    words = ("red", "blue", "green")
    n, held_out = TRAIN[name], HELD_OUT[name]
    return [f"{name}{i}.png,What is {shade}?,{words[i % 3]} {words[(i + shade) % 3]},{'train' if i < n else 'validation'}" for i in range(n + held_out)]


def write_sources(folder: Path) -> Path:
    """caps.csv (11 rows), more.csv (9 rows) with images of their own, both.csv (the rows of both), chat.jsonl (10 rows of text)."""
    head, tables = "image,question,answer,split", {}
    for shade, name in enumerate(("caps", "more"), 1):
        for i in range(TRAIN[name] + HELD_OUT[name]):
            Image.new("RGB", (56, 56), (20 * i, 100 * shade, 40)).save(folder / f"{name}{i}.png")
        tables[name] = table_rows(name, shade)
        (folder / f"{name}.csv").write_text("\n".join([head, *tables[name]]), encoding="utf-8")
    (folder / "both.csv").write_text("\n".join([head, *tables["caps"], *tables["more"]]), encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"number {i}"}]} for i in range(10)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    return folder


def source(folder: Path, name: str, **keys: object) -> list[str]:
    """The words that add one of the data sets as a source of its own name."""
    words = {
        "caps": ["=table", f".path={(folder / 'caps.csv').as_posix()}", f".columns={COLUMNS}"],
        "more": ["=table", f".path={(folder / 'more.csv').as_posix()}", f".columns={COLUMNS}"],
        "chat": ["=messages", f".path={(folder / 'chat.jsonl').as_posix()}", ".text_only=true", ".splits={validation: 2, by: last}"],
    }[name]
    return [f"data.sources.{name}{word}" for word in (*words, *(f".{key}={value}" for key, value in keys.items()))]


def mix(folder: Path, *names: str) -> list[str]:
    return ["data=mix", *(word for name in names for word in source(folder, name))]
