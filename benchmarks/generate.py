"""Answers to held-out rows: mmft against transformers' `generate`, one by one and in batches in file order, with equal answers.

    python -m benchmarks.generate [--photos FOLDER] [--rows 256] [--repeats 3] [--dtype bfloat16] [--peer swift=PYTHON] [--quick]

The model is the Qwen2-VL fixture, changed so that each row's answer has a length that is known beforehand (fixture.count_down). Lengths are drawn
from a log-normal distribution: half of the answers have at most 24 tokens, a few have more than 150. Prints the table and writes generate.md and
generate.json below --out. Ends with 1 if an answer in fp32 is not that of one by one. A peer runs by the Python of its own environment.
--more adds rounds to those of generate.json, of the same commit and arguments; --without leaves a slow contender out of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from . import fixture, process
from .commands import HERE, ROOT

MEDIAN, SIGMA, MOST = 24, 0.9, 250  # of the answers' tokens
BATCH = 16


def lengths(rows: int, most: int) -> list[int]:
    """Tokens of each answer, its end token included."""
    draw = random.Random(0)
    return [min(max(round(math.exp(draw.gauss(math.log(min(MEDIAN, most / 4)), SIGMA))), 2), most) for _ in range(rows)]


def build(home: Path, photos: Path | None, rows: int, most: int, size: str) -> tuple[Path, Path, list[int]]:
    """(model folder, table of images and questions, length of each answer)."""
    captions = fixture.photos(photos, home / "data", rows)
    model = home / "model"
    fixture.build("qwen2vl", model, [row["text"] for row in captions], size)
    fixture.count_down(model, most)
    wanted = lengths(rows, most)
    table = home / "data" / "questions.jsonl"
    questions = [{"image": row["image"], "prompt": f"{fixture.PROMPT} {fixture.number(n)}"} for row, n in zip(captions, wanted, strict=True)]
    table.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    return model, table, wanted


def tasks(model: Path, table: Path, dtype: str, most: int, sizes: list[int], peers: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """What each contender is told. "by" names its function in contenders/generate_answers.py."""
    plain = {"model": str(model), "rows": str(table), "dtype": dtype, "max_new_tokens": most + 8}
    words = [
        "model=qwen2vl", f"model.path={model}", "model.device=cpu", f"model.dtype={dict(float32='fp32', bfloat16='bf16')[dtype]}",
        f"model.processor={{min_pixels:{56 * 56},max_pixels:{fixture.SIDE * fixture.SIDE}}}", f"generation.max_new_tokens={most + 8}",
    ]  # fmt: skip
    own = {"by": "transformers"}
    return {
        "one by one": plain | own | {"batch": 1}, f"batches of {BATCH}": plain | own | {"batch": BATCH},
        **{"mmft" + f", {size} rows" * (size != BATCH): plain | {"by": "mmft", "words": [*words, f"evaluation.batch_size={size}"]} for size in sizes},
        **{name: plain | {"by": name, "batch": BATCH} for name in peers},
    }  # fmt: skip


def run(task: dict[str, Any], out: Path, threads: int | None, python: str = sys.executable) -> dict[str, Any]:
    """One contender in a process of its own, by this Python."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "task.json").write_text(json.dumps(task), encoding="utf-8")
    env = os.environ | process.OFFLINE | ({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {})
    if python == sys.executable:
        env["PYTHONPATH"] = str(ROOT)
    command = [python, str(HERE / "contenders" / "generate_answers.py"), str(out / "task.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def markdown(rounds: list[dict[str, dict[str, Any]]], wanted: list[int], place: dict[str, Any], args: argparse.Namespace) -> str:
    head = (
        f"Commit {place['commit'][:12]}{' with changes' if place['changed'] else ''}; {place['cpu']}, {args.threads or place['cores']} threads, torch {place['torch']},"
        f" transformers {place['transformers']}; {args.dtype}; {len(wanted)} rows{'' if args.photos else ' with images that were drawn'}; answers of {min(wanted)} to {max(wanted)}"
        f" tokens, median {median(wanted):g}, mean {sum(wanted) / len(wanted):.1f}; medians of {len(rounds)} interleaved rounds"
        f"{'; quick: sizes of a self-check, not figures' if args.quick else ''}."
    )
    lines = [head, "", "| | rounds | wall, s | processor, s | rows/s | wall, against the fastest other in each round | processor, likewise | equal answers |", "|---|---|---|---|---|---|---|---|"]
    for name in rounds[0]:
        own = [r for r in rounds if name in r]
        wall, cpu = (median(r[name][what] for r in own) for what in ("wall", "cpu"))
        ratios = ["" if not ours(name) else ", ".join(f"{r[name][what] / min(r[n][what] for n in r if not ours(n)):.3f}" for r in own) for what in ("wall", "cpu")]
        right = min(equal(r[name], rounds[0]["one by one"]) for r in own)
        lines.append(f"| {name} | {len(own)} | {wall:.1f} | {cpu:.1f} | {len(wanted) / wall:.1f} | {ratios[0]} | {ratios[1]} | {right:.4f} |")
    return "\n".join(lines) + "\n"


def ours(name: str) -> bool:
    return name.startswith("mmft")


def equal(found: dict[str, Any], one_by_one: dict[str, Any]) -> float:
    """The share of rows whose answer is that of one by one."""
    pairs = list(zip(found["answers"], one_by_one["answers"], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def earlier(path: Path, place: dict[str, Any], wanted: list[int]) -> list[dict[str, dict[str, Any]]]:
    """The rounds of generate.json. Raises SystemExit if they are of another commit, machine or work."""
    before = json.loads(path.read_text(encoding="utf-8"))
    if (before["place"], before["lengths"]) != (place, wanted):
        raise SystemExit(f"{path}: its rounds are of another commit, machine or number of rows; run without --more")
    return before["rounds"]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a COCO folder or a folder of images; default: images are drawn")
    parser.add_argument("--rows", type=int, help="rows to answer (256; 16 with --quick)")
    parser.add_argument("--repeats", type=int, help="interleaved rounds (3; 1 with --quick)")
    parser.add_argument("--batch-size", type=int, action="append", help="mmft's evaluation.batch_size (16); may be given several times")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="swift or llamafactory, and the Python of its environment")
    parser.add_argument("--more", action="store_true", help="add rounds to those of generate.json below --out")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="with --more: a contender that does not run again")
    parser.add_argument("--quick", action="store_true", help="a self-check in a minute: a small model and short answers")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmark")
    args = parser.parse_args(words)
    args.rows, args.repeats = args.rows or (16 if args.quick else 256), args.repeats or (1 if args.quick else 3)
    home = args.out.resolve() / "generate"
    shutil.rmtree(home, ignore_errors=True)
    most = 24 if args.quick else MOST
    model, table, wanted = build(home, args.photos, args.rows, most, "quick" if args.quick else "small")
    peers = dict(peer.split("=", 1) for peer in args.peer)
    contenders, place = tasks(model, table, args.dtype, most, args.batch_size or [BATCH], peers), process.place()
    rounds = earlier(args.out / "generate.json", place, wanted) if args.more else []
    if args.without and not rounds:
        parser.error("--without needs --more: the first round has every contender")
    for number in range(len(rounds), len(rounds) + args.repeats):
        found: dict[str, dict[str, Any]] = {}
        for name, task in ((n, t) for n, t in contenders.items() if n not in args.without):
            found[name] = run(task, home / f"round{number}" / name.replace(",", "").replace(" ", "_"), args.threads, peers.get(name, sys.executable))
            right = equal(found[name], (rounds or [found])[0]["one by one"])
            print(f"round {number + 1}: {name:<14} {found[name]['wall']:7.1f} s, {found[name]['cpu']:7.1f} s of processor time, equal {right:.4f}", flush=True)
        rounds.append(found)
        text = markdown(rounds, wanted, place, args)
        (args.out / "generate.md").write_text(text, encoding="utf-8")
        (args.out / "generate.json").write_text(json.dumps({"place": place, "lengths": wanted, "rounds": rounds}, indent=1), encoding="utf-8")
    print("\n" + text)
    shutil.rmtree(home)
    wrong = [name for name in contenders if args.dtype == "float32" and any(equal(r[name], rounds[0]["one by one"]) < 1 for r in rounds if name in r)]
    for name in wrong:
        print(f"{name}: some answers are not those of one by one", file=sys.stderr)
    return 1 if any(ours(name) for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
