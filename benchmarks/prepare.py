"""What preparation costs, and what near-duplicates it finds: python -m benchmarks.prepare [--photos COCO_FOLDER] [--rows 1000000].

Three tables: prepare against a bare read, sha256 and decode of the same photos on as many threads; hits and false hits of near-duplicates among
recompressed, resized and cropped copies of the photos; time and memory of a table of many rows with few images.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mmft.data import near
from mmft.data.images import decode, open_image
from mmft.data.prepare import prepare
from mmft.data.sources.base import DISTANCE
from mmft.data.sources.drawing import draw, random_scene
from mmft.data.sources.table import Table

COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 75": lambda p: _saved(p, "JPEG", quality=75),
    "JPEG, quality 30": lambda p: _saved(p, "JPEG", quality=30),
    "WebP, quality 50": lambda p: _saved(p, "WEBP", quality=50),
    "half as large": lambda p: _saved(p.resize((p.width // 2, p.height // 2)), "JPEG", quality=90),
    "a quarter as large": lambda p: _saved(p.resize((p.width // 4, p.height // 4)), "JPEG", quality=90),
    "224 x 224, stretched": lambda p: _saved(p.resize((224, 224)), "JPEG", quality=90),
    "cropped by 2 % a side": lambda p: _saved(_cropped(p, 0.02), "JPEG", quality=90),
    "cropped by 5 % a side": lambda p: _saved(_cropped(p, 0.05), "JPEG", quality=90),
    "cropped by 10 % a side": lambda p: _saved(_cropped(p, 0.10), "JPEG", quality=90),
    "cropped by 2 %, half as large, quality 50": lambda p: _saved(_cropped(p, 0.02).resize((p.width // 2, p.height // 2)), "JPEG", quality=50),
}


def _saved(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    return picture.crop((round(width * share), round(height * share), round(width * (1 - share)), round(height * (1 - share))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of photos, or of COCO with images/")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=["time", "near", "rows"])
    args = parser.parse_args()
    wanted = args.only or ["time", "near", "rows"]
    photos = sorted(p for p in ((args.photos / "images" if (args.photos / "images").is_dir() else args.photos).iterdir() if args.photos else ()) if p.suffix == ".jpg")
    if photos and "time" in wanted:
        print("\n".join(times(photos, args.repeats)))
    if photos and "near" in wanted:
        print("\n".join(hits(photos)))
    if "rows" in wanted:
        print("\n".join(many_rows(args.rows)))


# --- time of photos -----------------------------------------------------------------------------------------------


def times(photos: list[Path], repeats: int) -> list[str]:
    """Seconds of `repeats` interleaved rounds: bare, prepare without near-duplicates, prepare. Processor time is not disturbed by other work."""
    found: dict[str, list[tuple[float, float]]] = {"bare read, sha256, decode": [], "prepare, data.near_distance=null": [], "prepare": []}
    with tempfile.TemporaryDirectory() as folder:
        images = turned(photos, Path(folder) / "photos")
        table = Path(folder) / "t.jsonl"
        table.write_text("".join(json.dumps({"image": str(p), "text": f"photo {n}"}) + "\n" for n, p in enumerate(images)), encoding="utf-8")
        runs = (lambda: bare(images), lambda: prepared(table, Path(folder) / "out", None), lambda: prepared(table, Path(folder) / "out", DISTANCE))
        for number in range(repeats + 1):
            for name, run in zip(found, runs, strict=True):
                start = time.perf_counter(), time.process_time()
                run()
                if number:  # the first round fills the page cache
                    found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = ({name: statistics.median(round[i] for round in rounds) for name, rounds in found.items()} for i in (0, 1))
    lines = [f"\n{len(images)} photos, {os.cpu_count()} processors, median of {repeats} rounds\n", "| | seconds | images/s | of bare | processor seconds | of bare |", "|---|---|---|---|---|---|"]
    bare_wall, bare_cpu = next(iter(wall.values())), next(iter(cpu.values()))
    return [*lines, *(f"| {name} | {wall[name]:.2f} | {len(images) / wall[name]:.0f} | {wall[name] / bare_wall:.2f} | {cpu[name]:.2f} | {cpu[name] / bare_cpu:.2f} |" for name in found)]


def turned(photos: list[Path], folder: Path) -> list[Path]:
    """Eight different pictures of each photo: mirrored, and turned by quarters."""
    folder.mkdir()
    files = []
    for n, path in enumerate(photos):
        picture = open_image(path)
        for turn in (None, *Image.Transpose):
            files.append(folder / f"{n}-{'' if turn is None else turn.value}.jpg")
            files[-1].write_bytes(_saved(picture if turn is None else picture.transpose(turn), "JPEG", quality=90))
    return files


def bare(images: list[Path]) -> None:
    """The least that must be done with every image, in as many threads as prepare has."""

    def one(path: Path) -> None:
        data = path.read_bytes()
        hashlib.sha256(data).digest()
        Image.open(io.BytesIO(data)).convert("RGB").load()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(one, images))


def prepared(table: Path, out: Path, distance: int | None) -> None:
    prepare(Table(path=str(table), near_distance=distance), out)
    shutil.rmtree(out)


# --- near-duplicates ----------------------------------------------------------------------------------------------


def hits(photos: list[Path], count: int = 100) -> list[str]:
    """Hits among copies of `count` photos, and false hits among different photos and among drawn pictures, by distance."""
    distances = (4, 6, 8, 10, 12, 16)
    lines = [f"\nCopies of {count} photos that are found, by data.near_distance (default {DISTANCE})\n",
             f"| copy | {' | '.join(map(str, distances))} |", f"|---|{'---|' * len(distances)}"]  # fmt: skip
    originals = [open_image(p) for p in photos]
    own = looks([path.read_bytes() for path in photos])
    chosen = random.Random(0).sample(range(len(photos)), count)
    turns = []  # one copy of each photo, the kinds in turn
    for kind, (name, make) in enumerate(COPIES.items()):
        copies = looks([make(originals[i]) for i in chosen])
        turns += [(chosen[n], copies[n]) for n in range(kind, count, len(COPIES))]
        lines.append(f"| {name} | {' | '.join(str(sum(alike(own[i], copy, d) for i, copy in zip(chosen, copies))) for d in distances)} |")
    lines.append(f"| one copy of each photo, the kinds in turn | {' | '.join(str(sum(alike(own[i], copy, d) for i, copy in turns)) for d in distances)} |")
    mixed = np.concatenate([own, np.array([copy for _, copy in turns], near.LOOK)])
    drawn = looks([_saved(draw(random_scene(random.Random(n), 168, 2, 3)), "PNG") for n in range(1000)])
    lines += ["\nFalse hits: pairs of pictures that are not copies\n", f"| pictures | pairs | {' | '.join(map(str, distances))} |", f"|---|---|{'---|' * len(distances)}"]
    true = {(i, len(own) + n) for n, (i, _) in enumerate(turns)}
    for name, pictures, right in ((f"{len(own)} photos and these {count} copies", mixed, true), ("1000 drawings of two or three shapes", drawn, set())):
        found = [{tuple(pair[:2]) for pair in near.near_duplicates(pictures, np.ones(len(pictures), bool), d).pairs.tolist()} for d in distances]
        lines.append(f"| {name} | {len(pictures) * (len(pictures) - 1) // 2 - len(right):,} | {' | '.join(str(len(pairs - right)) for pairs in found)} |")
    return lines


def looks(files: list[bytes]) -> np.ndarray:
    """What preparation notes of these files."""
    return np.frombuffer(b"".join(near.look(decode(data, least=near.ENOUGH).picture) for data in files), near.LOOK)


def alike(one: np.ndarray, other: np.ndarray, distance: int) -> bool:
    return near.near_duplicates(np.array([one, other], near.LOOK), np.ones(2, bool), distance).number == 1


# --- many rows ----------------------------------------------------------------------------------------------------

CHILD = "import sys; from benchmarks.prepare import measure; measure(sys.argv[1], sys.argv[2])"


def many_rows(count: int) -> list[str]:
    """Time and peak memory of a process that prepares `count` rows with 100 images, and time to open the set and read a row."""
    lines = ["\nA table of captions (JSONL), 100 different images\n", "| rows | seconds | rows/s | peak memory | to open and read a row |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for n in range(100):
            Image.new("RGB", (32, 32), (n, 2 * n, 7)).save(Path(folder) / f"{n}.png")
        for rows in (count // 10, count):
            table = Path(folder) / f"{rows}.jsonl"
            with table.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"image": f"{n % 100}.png", "text": f"caption number {n} of the table"}) + "\n" for n in range(rows))
            done = subprocess.run([sys.executable, "-c", CHILD, str(table), f"{folder}/out"], capture_output=True, text=True, check=True)
            seconds, peak, opened = json.loads(done.stdout.splitlines()[-1])
            lines.append(f"| {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {peak:.0f} MB | {opened:.3f} s |")
    return lines


def measure(table: str, out: str) -> None:
    start = time.perf_counter()
    found = prepare(Table(path=table), out)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # pages of a file that is mapped to be read would count, too
    start = time.perf_counter()
    again = prepare(Table(path=table), out)
    assert again.split("train")[len(found.split("train")) // 2].id
    print(json.dumps([seconds, peak, time.perf_counter() - start]))


if __name__ == "__main__":
    main()
