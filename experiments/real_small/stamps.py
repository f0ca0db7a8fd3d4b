"""The captioned pictures of Tux Paint's stamps (GPL-2) as a folder that `data=imagefolder` reads: writes its metadata.jsonl.

    python experiments/real_small/stamps.py FOLDER        (what `dpkg-deb -x tuxpaint-stamps-default_*.deb FOLDER` unpacked)

Beside PICTURE.png lies PICTURE.txt: its first line is the English caption, the others are translations. A picture without one is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    rows = []
    for picture in sorted(folder.rglob("*.png")):
        words = picture.with_suffix(".txt")
        caption = words.read_text(encoding="utf-8").splitlines()[0].strip() if words.is_file() else ""
        if caption:
            rows.append({"file_name": picture.relative_to(folder).as_posix(), "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8", newline="\n")
    print(f"{folder}: {len(rows)} captioned pictures, {len({r['text'] for r in rows})} different captions")


if __name__ == "__main__":
    main()
