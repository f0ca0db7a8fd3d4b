"""LlamaFactory: an entry of a LLaMA-Factory dataset_info.json (alpaca, sharegpt or openai formatting; ranking sets and kto_tag, too)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError, nearest
from ..readers import files
from ..sample import BadRow, Row
from ..wording import listed
from .base import FileKeys, Stamp, file_stamp
from .cells import UnusableRow
from .preferences import good_or_bad, rejected_answer
from .turns import conversation_row

# LLaMA-Factory's defaults for what an entry leaves out.
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(kw_only=True)
class LlamaFactory(FileKeys):
    """path: the folder of dataset_info.json (or the file). dataset: the name of the entry.

    Image paths are relative to `root`, or to that folder.
    """

    path: str
    dataset: str

    def folder(self) -> Path:
        place = files.existing(self.path)
        return place if place.is_dir() else place.parent

    def entry(self) -> dict[str, Any]:
        """The entry of the data set. Raises UserError if there is none, or if its format cannot be trained on."""
        place = files.existing(self.path)
        info = files.existing(place / "dataset_info.json", folder=False) if place.is_dir() else place
        try:
            entries = json.loads(info.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{info}: broken JSON: {error}") from None
        if self.dataset not in entries:
            raise UserError(f"data.dataset={self.dataset}: {info} has no such entry.{nearest(self.dataset, entries)}")
        entry = entries[self.dataset]
        remote = next((k for k in REMOTE if k in entry), None)
        if "file_name" not in entry:
            raise UserError(f"{info}: {self.dataset} names no file_name" + (f" but {remote}={entry[remote]}; use data=hub data.dataset=..." if remote else ""))
        unnamed = [key for key in ("chosen", "rejected") if entry.get("ranking") and not entry.get("columns", {}).get(key)]
        if unnamed:
            raise UserError(f"{info}: {self.dataset} is a ranking set, and its columns do not say where the {unnamed[0]} answers stand; add \"{unnamed[0]}\" to them")
        if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
            raise UserError(f"{info}: {self.dataset} has formatting={entry['formatting']}; alpaca, sharegpt and openai can be read")
        return entry

    def files(self) -> list[Path]:
        return files.find_files(str(self.folder() / self.entry()["file_name"]))

    def data_root(self) -> Path:
        return Path(self.root).expanduser() if self.root else self.folder()

    def stamp(self) -> Stamp:
        return {"entry": self.entry(), "files": [file_stamp(f) for f in self.files()], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return files.count(self.files(), self.options())

    def read(self) -> Iterator[Row | BadRow]:
        entry = self.entry()
        columns = entry.get("columns", {})
        alpaca = entry.get("formatting", "alpaca") == "alpaca"
        needed = columns.get("prompt", ALPACA_COLUMNS["prompt"]) if alpaca else columns.get("messages", "conversations")
        wanted = [needed, *(columns[k] for k in ("images", "system", "response", "kto_tag", *(("chosen", "rejected") if entry.get("ranking") else ())) if columns.get(k))]

        def check(values: dict[str, Any], where: str) -> None:
            for column in wanted:
                if column not in values:
                    raise UserError(f"{where}: has no column {column!r}.{nearest(column, values)} It has: {listed(values)}.")

        def convert(values: dict[str, Any], where: str) -> Iterator[Row | BadRow]:
            row = self._alpaca(values, columns, entry, where) if alpaca else self._sharegpt(values, columns, entry, where)
            yield self._compared(row, values, columns, entry)

        for file in self.files():
            yield from self.convert_file(file, check, convert)

    def _alpaca(self, values: dict[str, Any], columns: dict[str, str], entry: dict[str, Any], where: str) -> Row | BadRow:
        cell = {k: values.get(columns.get(k, default)) for k, default in ALPACA_COLUMNS.items()}
        if entry.get("ranking"):
            cell["response"] = values.get(columns["chosen"])
        words = "\n".join(str(cell[k]) for k in ("prompt", "query") if cell[k])
        turns = []
        for pair in (values.get(columns["history"]) or []) if columns.get("history") else []:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        turns += [{"role": "user", "content": words}, {"role": "assistant", "content": cell["response"] or ""}]
        return self._row(values, turns, columns, where)

    def _sharegpt(self, values: dict[str, Any], columns: dict[str, str], entry: dict[str, Any], where: str) -> Row | BadRow:
        tags = {**(OPENAI_TAGS if entry["formatting"] == "openai" else SHAREGPT_TAGS), **entry.get("tags", {})}
        roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
        turns = values.get(columns.get("messages", "conversations"))
        if entry.get("ranking") and isinstance(turns, list):
            turns = [*turns, values.get(columns["chosen"])]
        return self._row(values, turns, columns, where, roles=roles, role_key=tags["role_tag"], text_key=tags["content_tag"])

    @staticmethod
    def _compared(row: Row | BadRow, values: dict[str, Any], columns: dict[str, str], entry: dict[str, Any]) -> Row | BadRow:
        """The row with its rejected answer, of a ranking set, and its label (kto_tag)."""
        if isinstance(row, BadRow):
            return row
        if entry.get("ranking"):
            cell = values.get(columns["rejected"])
            tag = entry.get("tags", {}).get("content_tag")
            try:
                row.rejected = rejected_answer(cell[tag] if tag and isinstance(cell, Mapping) and tag in cell else cell, None, f"column {columns['rejected']}")
            except UnusableRow as error:
                return BadRow(row.where, str(error), row.id)
        if columns.get("kto_tag"):
            row.label = good_or_bad(values.get(columns["kto_tag"]))
        return row

    @staticmethod
    def _row(values: dict[str, Any], turns: Any, columns: dict[str, str], where: str, **keys: Any) -> Row | BadRow:
        images = values.get(columns["images"]) if columns.get("images") else None
        system = values.get(columns["system"]) if columns.get("system") else None
        name = values.get("id")
        return conversation_row(turns, images, where, id=None if name is None else str(name), system=system, **keys)
