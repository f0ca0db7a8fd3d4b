"""The catalogue of faults of a data set: each writes its file and its row, and says what must become of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def plain(color: Any, mode: str = "RGB", side: int = 32) -> Image.Image:
    return Image.new(mode, (side, side), color)


def grey(values: Any, kind: str) -> bytes:
    """A picture of 32 pixels side whose columns repeat `values`."""
    return encoded(Image.fromarray(np.tile(np.asarray(values).repeat(32 // len(values)), (32, 1))), kind)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png() -> bytes:
    """100 million pixels in 12 KB."""
    rows = zlib.compress(b"\0" * 1251 * 10_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed comment is 100 MB."""
    data = encoded(plain("red"), "PNG")
    return data[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)) + data[33:]


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def rotated() -> bytes:
    wide = Image.new("RGB", (48, 24), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 24, 24))  # the left half as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the left half is on top
    return encoded(wide, "JPEG", exif=exif, quality=95)


def palette() -> bytes:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    return encoded(image, "PNG", transparency=0)


def rgb16() -> bytes:
    """A 16-bit RGB PNG, written by hand since Pillow writes none: every value 0x8000."""
    rows = zlib.compress((b"\0" + b"\x80\x00" * 3 * 32) * 32)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    return encoded(plain((255, 0, 0)), kind, save_all=True, append_images=[plain((0, 0, 255))])


@dataclass
class Fault:
    """make(folder, name) -> the file, or None if it wrote it itself. dropped: how its reason begins; else `pixel` is its middle.

    name: the image's name in the row; row: changes of the row.
    """

    make: Callable[[Path, str], bytes | None] | None = None
    dropped: str | None = None
    pixel: tuple[int, int, int] | None = None
    name: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    raw: str | None = None
    changed: str | None = None


def file(data: bytes | Callable[[], bytes], dropped: str | None = None, pixel: Any = None) -> Fault:
    return Fault(lambda folder, name: data() if callable(data) else data, dropped, pixel)


def own(make: Callable[[Path], Any], dropped: str) -> Fault:
    return Fault(lambda folder, name: make(folder / name) and None, dropped)


def outside(path: Path) -> None:
    (path.parent.parent / "outside.png").write_bytes(encoded(plain("red"), "PNG"))
    path.symlink_to(path.parent.parent / "outside.png")


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(50 << 30)


BAD = "unreadable image"
IMAGE_FAULTS: dict[str, Fault] = {
    "missing": Fault(None, "missing image"),
    "empty": file(b"", f"{BAD}: NAME: the file is empty"),
    "text": file(b"hello", f"{BAD}: NAME: not a picture"),
    "error page": file(b"<!DOCTYPE html><html><body>404</body></html>", f"{BAD}: NAME: not a picture"),
    "JPEG cut in half": file(lambda: (d := encoded(noise(1), "JPEG"))[:len(d) // 2], BAD),
    "PNG cut in half": file(lambda: (d := encoded(noise(2), "PNG"))[:len(d) // 2], BAD),
    "WebP cut in half": file(lambda: (d := encoded(noise(3), "WEBP"))[:len(d) // 2], BAD),
    "GIF cut in half": file(lambda: (d := encoded(noise(4), "GIF"))[:len(d) // 2], BAD),
    "bit of PNG pixels flipped": file(lambda: flipped(encoded(noise(5), "PNG"), 2000), BAD),
    "bit of PNG header flipped": file(lambda: flipped(encoded(noise(6), "PNG"), 19), BAD),
    "100 megapixels in 12 KB": file(huge_png, f"{BAD}: NAME: 10000 x 10000 pixels"),
    "100 MB of comment": file(text_bomb, BAD),
    "50 GB file": own(sparse, f"{BAD}: NAME: 53687091200 bytes"),
    "a strip": file(lambda: encoded(Image.new("RGB", (3, 1000)), "PNG"), f"{BAD}: NAME: 3 x 1000 pixels"),
    "PostScript": file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", f"{BAD}: NAME: not a picture"),
    "vector": file(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", f"{BAD}: NAME: not a picture"),
    "a folder": own(lambda p: p.mkdir(), f"{BAD}: NAME: a folder"),
    "a pipe": own(lambda p: os.mkfifo(p), f"{BAD}: NAME: not a file"),
    "a link out of the root": own(outside, "image outside the data root"),
    "a link to itself": own(lambda p: p.symlink_to(p), BAD),
    "a path out of the root": Fault(None, "image outside the data root", name="../outside.png"),
    "a device": Fault(None, "image outside the data root", name="/dev/zero"),
    "a URL": Fault(None, "image is a URL", name="https://host.invalid/a.png"),
    "a name of 5,000 characters": Fault(None, BAD, name="x" * 5000 + ".png"),
    "a name with half a character": Fault(None, "missing image", name="a\ud800.png"),
    "a name with a null": Fault(None, "missing image", name="a\0.png"),
    "float with NaN": file(lambda: grey(np.array([0, np.nan], np.float32), "TIFF"), f"{BAD}: NAME: float values"),
    "numbers beyond 16 bits": file(lambda: grey(np.array([0, 70_000], np.int32), "TIFF"), f"{BAD}: NAME: whole-number values"),
    # --- faults that loaders pass silently, and what the picture must be
    "EXIF rotation": file(rotated, pixel=None),  # looked at on its own in the test
    "broken EXIF": file(lambda: encoded(plain((9, 99, 199)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), pixel=(9, 99, 199)),
    "hidden colour under alpha": file(lambda: encoded(plain((200, 0, 0, 0), "RGBA"), "PNG"), pixel=(255, 255, 255)),
    "grey with alpha": file(lambda: encoded(plain((10, 0), "LA"), "PNG"), pixel=(255, 255, 255)),
    "transparent palette entry": file(palette, pixel=(255, 255, 255)),
    "transparent RGB colour": file(lambda: encoded(plain((1, 2, 3)), "PNG", transparency=(1, 2, 3)), pixel=(255, 255, 255)),
    "16-bit grey PNG": file(lambda: grey(np.array([0, 32768], np.uint16), "PNG"), pixel=(128, 128, 128)),
    "16-bit grey TIFF": file(lambda: grey(np.array([0, 32768], np.uint16), "TIFF"), pixel=(128, 128, 128)),
    "16-bit RGB PNG": file(rgb16, pixel=(128, 128, 128)),
    "float TIFF of 0..1": file(lambda: grey(np.array([0, 0.2], np.float32), "TIFF"), pixel=(51, 51, 51)),
    "CMYK JPEG": file(lambda: encoded(plain((0, 0, 0, 0), "CMYK"), "JPEG"), pixel=(255, 255, 255)),
    "Lab colours": file(lambda: encoded(plain((128, 128, 128), "LAB"), "TIFF"), pixel=(119, 119, 119)),  # L* of 50
    "one bit": file(lambda: encoded(plain(1, "1"), "PNG"), pixel=(255, 255, 255)),
    "animated GIF": file(lambda: animated("GIF"), pixel=(255, 0, 0)),
    "animated PNG": file(lambda: animated("PNG"), pixel=(255, 0, 0)),
    "TIFF of several pages": file(lambda: animated("TIFF"), pixel=(255, 0, 0)),
    "PNG named .jpg": Fault(lambda f, n: encoded(plain((1, 2, 3)), "PNG"), None, (1, 2, 3), name="png.jpg"),
    "one pixel": file(lambda: encoded(plain((7, 8, 9), side=1), "PNG"), pixel=(7, 8, 9)),
}

USER, ANSWER = "<image>What is this?", "a thing"


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


ROW_FAULTS: dict[str, Fault] = {
    "broken JSON": Fault(raw='{"messages": [', dropped="broken JSON"),
    "not an object": Fault(raw="[1, 2]", dropped="broken JSON"),
    "JSON nested 100,000 deep": Fault(raw="[" * 100_000, dropped="broken JSON"),
    "empty answer": Fault(row=turns(("user", USER), ("assistant", "  \n")), dropped="empty answer"),
    "no answer": Fault(row=turns(("user", USER)), dropped="no answer"),
    "no messages": Fault(row={"messages": None}, dropped="no answer"),
    "roles out of order": Fault(row=turns(("user", USER), ("user", "again"), ("assistant", ANSWER)), dropped="role order"),
    "an unknown role": Fault(row=turns(("user", USER), ("tool", "x"), ("assistant", ANSWER)), dropped="role order"),
    "more images than places": Fault(row={"images": ["good0.png", "good1.png"]}, dropped="image count"),
    "more places than images": Fault(row=turns(("user", "<image><image>?"), ("assistant", ANSWER)), dropped="image count"),
    "no image": Fault(row={"images": [], **turns(("user", "What?"), ("assistant", ANSWER))}, dropped="no image"),
    "half a character": Fault(row=turns(("user", USER), ("assistant", "half \ud800")), dropped="bad text"),
    "half a character as id": Fault(row={"id": "x\ud800"}, dropped="bad text"),
    "a split nobody knows": Fault(row={"split": "holdout"}, dropped="unknown split"),
    "a turn that is no object": Fault(row={"messages": ["hello", 3]}, dropped="broken turn"),
    "a part of unknown kind": Fault(row=turns(("user", [{"type": "video", "video": "x"}]), ("assistant", ANSWER)), dropped="broken turn"),
    "a data: URI that is none": Fault(row=turns(("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]), ("assistant", ANSWER)),
                                      dropped="unreadable image"),
    "an id used before": Fault(row={"id": "good0"}, changed="duplicate id"),
}  # fmt: skip
