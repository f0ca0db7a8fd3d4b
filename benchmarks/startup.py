"""What a command takes before it does its work: imports and short commands, in processor time, wall time and memory.

    python -m benchmarks.startup                   about four minutes: 5 rounds in a drawn order, after one that is not counted
    python -m benchmarks.startup --rounds 1 --only import

Each command is a process of its own. Rows of the kind "import" compare what mmft imports for a training with the same imports as Python does them by default, and with one
measure of `mmft/system/startup.py` left out. Rows of the kind "command" are whole commands with the built-in tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import process
from .commands import ROOT

LIBRARIES = "import torch, transformers.trainer, peft"
OURS = "from mmft.system import startup; {}startup.load('transformers.trainer', 'peft')"
NO_COLLECTION = "import contextlib; startup.without_garbage_collection = contextlib.nullcontext; startup.keep_from_garbage_collection = lambda: None; "
SHORT = ["data.pictures=12", "data.splits.validation=2", "trainer.max_steps=1", "logger=none"]


@dataclass(frozen=True)
class Row:
    """A command whose words are handed to Python. against: the row that it is divided by."""

    kind: str
    name: str
    words: list[str]
    against: str = LIBRARIES


@dataclass(frozen=True)
class Cost:
    """Processor seconds of the process and its children, seconds, and the highest resident memory of the largest of them in MB, at least that of this script, whose copy each begins as."""

    processor: float
    wall: float
    memory: float


def rows(home: Path) -> list[Row]:
    """What is measured. home: has a finished run `first` and a picture, and takes further runs."""
    ours = "mmft's import of the same"
    train = ["-m", "mmft", *SHORT, f"output_dir={home.as_posix()}"]
    return [
        Row("import", "import torch", ["-c", "import torch"]),
        Row("import", LIBRARIES, ["-c", LIBRARIES]),
        Row("import", ours, ["-c", OURS.format("")]),
        Row("import", "without hiding packages", ["-c", OURS.format("startup.OPTIONAL = (); ")], ours),
        Row("import", "with garbage collection", ["-c", OURS.format(NO_COLLECTION)], ours),
        Row("command", "mmft --help", ["-m", "mmft", "--help"]),
        Row("command", "mmft --cfg job", ["-m", "mmft", "--cfg", "job"]),
        Row("command", "mmft runs", ["-m", "mmft", "runs", f"output_dir={home.as_posix()}"]),
        Row("command", "mmft doctor", ["-m", "mmft", "doctor", f"output_dir={home.as_posix()}"]),
        Row("command", "mmft predict, one picture", ["-m", "mmft", "predict", f"run={(home / 'first').as_posix()}", f"input={(home / 'red.png').as_posix()}", "prompt=What is this?"]),
        Row("command", "mmft, one step, nothing measured", [*train, "evaluation.split=null"]),
        Row("command", "mmft, one step", train),
    ]


def cost(words: list[str]) -> Cost:
    """Errors raised: RuntimeError with the end of its output when the process fails."""
    env = {k: v for k, v in os.environ.items() if k != "MMFT_PACKAGES"} | process.OFFLINE | {"PYTHONPATH": str(ROOT), "MODELSCOPE_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        started = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(started.pid, 0)
        wall = time.perf_counter() - began
        started.returncode = os.waitstatus_to_exitcode(status)
        if started.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(words)} ended with {started.returncode}:\n{output.read().decode(errors='replace')[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / (1024 if sys.platform == "linux" else 2**20))


def middle(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(c, name) for c in costs) for name in ("processor", "wall", "memory")))


def table(measured: list[Row], found: dict[str, list[Cost]]) -> list[str]:
    """Medians as lines of markdown; the ratio is of processor time, of medians, with that of each round behind."""
    lines = ["| | processor s | s | memory, MB | processor time against | |", "|---|---|---|---|---|---|"]
    for row in measured:
        m, ratio = middle(found[row.name]), ""
        if row.name != row.against and row.against in found:
            each = sorted(a.processor / b.processor for a, b in zip(found[row.name], found[row.against]))
            ratio = f"{m.processor / middle(found[row.against]).processor:.2f} ({each[0]:.2f} to {each[-1]:.2f})"
        lines.append(f"| `{row.name}` | {m.processor:.2f} | {m.wall:.2f} | {m.memory:.0f} | {ratio} | {row.against if ratio else ''} |")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["import", "command"])
    parser.add_argument("--seconds", type=float, default=1e9, help="after so many no further round is begun")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    args = parser.parse_args(words)
    from PIL import Image

    began, order = time.perf_counter(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        Image.new("RGB", (56, 56), "red").save(home / "red.png")
        if args.only != "import":
            cost(["-m", "mmft", *SHORT, f"output_dir={home.as_posix()}", f"run_dir={(home / 'first').as_posix()}"])
        measured = [row for row in rows(home) if args.only in (None, row.kind)]
        found: dict[str, list[Cost]] = {row.name: [] for row in measured}
        for number in range(args.rounds + 1):
            if number > 1 and time.perf_counter() - began > args.seconds:
                break
            costs = {row.name: cost(row.words) for row in order.sample(measured, len(measured))}
            if number:  # the first round compiles and reads files
                for name, own in costs.items():
                    found[name].append(own)
                write(args.out, measured, found)  # after every round: a script that is stopped leaves what it has measured
    print((args.out / "startup.md").read_text(encoding="utf-8"), end="")
    return 0


def write(out: Path, measured: list[Row], found: dict[str, list[Cost]]) -> None:
    """startup.md and startup.json."""
    place = process.place()
    text = [
        f"Commit {place['commit'][:12]}{' with changes' if place['changed'] else ''}, {place['cpu']}, {place['cores']} cores, torch {place['torch']}, transformers {place['transformers']}, peft {place['peft']};"
        f" medians of {len(found[measured[0].name])} interleaved rounds.", "", *table(measured, found),
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "startup.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    (out / "startup.json").write_text(json.dumps({"place": place, "costs": {n: [vars(c) for c in costs] for n, costs in found.items()}}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
