"""Debian's stamps of Tux Paint as a folder of captioned pictures: FOLDER/*.png and FOLDER/metadata.jsonl, which `data=imagefolder` reads.

    python experiments/real_folder/stamps.py /usr/share/tuxpaint/stamps FOLDER        (package tuxpaint-stamps-default, GPL-2)

Taken: photos and drawings stored as PNG with an English caption of at most 12 words. Left out: letters, digits, money and mirror
images, so that no picture is another one again; the same file under a second name counts once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

LEFT_OUT = ("symbols/alphabets", "symbols/numbers", "symbols/money")
WORDS = 12


def main() -> None:
    stamps, folder = map(Path, sys.argv[1:3])
    folder.mkdir(parents=True, exist_ok=True)
    rows, seen = [], set()
    for picture in sorted(stamps.rglob("*.png")):
        name, text = picture.relative_to(stamps).as_posix(), picture.with_suffix(".txt")
        if name.startswith(LEFT_OUT) or not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8").splitlines()[0].strip()  # the lines below it are translations
        digest = hashlib.sha256(picture.read_bytes()).hexdigest()
        if not 0 < len(caption.split()) <= WORDS or digest in seen:
            continue
        seen.add(digest)
        file = name.replace("/", "-")
        shutil.copyfile(picture, folder / file)
        rows.append({"file_name": file, "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"{folder}: {len(rows)} pictures, {len({row['text'] for row in rows})} captions")


if __name__ == "__main__":
    main()
