"""mmft against the plain Trainer loop, a loop written by hand, and peers: the same work, checked, in one run on one machine.

    python -m benchmarks.speed [--photos FOLDER] [--peer trl=ENV/bin/python] [--only ROW] [--repeats 3] [--quick]

Prints the table and writes speed.md and speed.json below --out. README.md beside this file says what is compared and checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import checks, commands, fixture, process, skewed
from .commands import PEERS, VARIANTS, Command, Work
from .process import Timed


@dataclass
class Group:
    """Contenders that take turns over one work. `watched`: watch.py runs each of them once before anything is timed."""

    family: str
    contenders: list[str]
    epochs: int = 2
    checkpointing: bool = False
    sweep: str = ""  # the field of Work that its points differ in
    points: tuple[Any, ...] = ()
    peers: bool = False
    watched: bool = True
    skewed: bool = False  # over the rows of skewed.py


@dataclass
class Row:
    """A row of the table: the quotient of two medians over the rounds of one group."""

    text: str
    target: float | None
    group: str
    above: tuple[str, Callable[[Timed], float]]
    below: tuple[str, Callable[[Timed], float]]


def loop(t: Timed) -> float:
    return t.loop


def counted(t: Timed) -> float:
    return t.loop + t.cache


def wall(t: Timed) -> float:
    return t.wall


def memory(t: Timed) -> float:
    return t.memory


# What a user would try: attention or the MLP, a part of either, and everything.
TARGETS = (
    ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"),
    ("o_proj", "down_proj"), ("gate_proj", "up_proj"), ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
WEIGHTS = (0, 0.05, 0.1, 0.25, 0.5, 1, 2, 4)  # of the second half of the rows against 1 of the first: it is 0 to 80 % of the draws
GROUPS = {
    "qwen2vl": Group("qwen2vl", ["plain", "mmft", "mmft_warm", "hand", "hand_merged"], peers=True),
    "eight": Group("qwen2vl", ["plain", "mmft"], epochs=8, watched=False),
    "blip2": Group("blip2", ["plain", "mmft_warm", "hand"]),
    "checkpointing": Group("qwen2vl", ["plain", "mmft_warm", "hand"], checkpointing=True),
    "sweep": Group("qwen2vl", ["plain", "mmft"], sweep="r", points=(1, 2, 4, 8, 16, 32, 64, 128), watched=False),
    "targets": Group("qwen2vl", ["plain", "mmft"], sweep="layers", points=TARGETS, watched=False),
    "weights": Group("qwen2vl", ["plain", "mmft"], sweep="weight", points=WEIGHTS, watched=False),
    "llava": Group("llava", ["plain", "mmft_warm", "hand"]),
    "skewed": Group("qwen2vl", ["plain", "mmft_warm", "mmft_packed", "mmft_grouped", "hand"], peers=True, skewed=True),
}
# What mmft's contenders over skewed rows are told beside the rest.
WORDS = {
    "mmft_packed": ["trainer.packing=true"],
    "mmft_grouped": ["trainer.train_sampling_strategy=group_by_length", "trainer.fold_accumulation=always"],
}
ROWS = {
    "warm": Row("Qwen2-VL fixture, {rows} photos, batch 2 x 2, warm cache: loop time", 0.45, "qwen2vl", ("mmft_warm", loop), ("plain", loop)),
    "two": Row("the same, 2 epochs, the pass that fills the cache counted", 0.60, "qwen2vl", ("mmft", counted), ("plain", loop)),
    "eight": Row("the same, {eight} epochs, counted", 0.50, "eight", ("mmft", counted), ("plain", loop)),
    "process": Row("whole process, 2 epochs", 0.75, "qwen2vl", ("mmft", wall), ("plain", wall)),
    "blip2": Row("BLIP-2 fixture, warm cache: loop time", 0.50, "blip2", ("mmft_warm", loop), ("plain", loop)),
    "checkpointing": Row("with gradient checkpointing on in both, warm cache: loop time", 0.38, "checkpointing", ("mmft_warm", loop), ("plain", loop)),
    "sweep": Row("{points}-point rank sweep against {points} processes of the plain loop, wall time", 0.30, "sweep", ("mmft", wall), ("plain", wall)),
    "targets": Row("{points}-point sweep over lora.target_modules against {points} processes of the plain loop, wall time", 0.45, "targets", ("mmft", wall), ("plain", wall)),
    "weights": Row("{points}-point sweep over the weight of a source of a mix against {points} processes of the plain loop, wall time", 0.45, "weights", ("mmft", wall), ("plain", wall)),
    "memory": Row("peak memory of one run", 1.0, "qwen2vl", ("mmft", memory), ("plain", memory)),
    "hand": Row("mmft's loop against a hand-written PyTorch loop with the same caches", 1.05, "qwen2vl", ("mmft_warm", loop), ("hand", loop)),
    "hand_merged": Row("the same, its micro-batches merged as mmft's are", None, "qwen2vl", ("mmft_warm", loop), ("hand_merged", loop)),
    "llava": Row("LLaVA fixture, warm cache: loop time", None, "llava", ("mmft_warm", loop), ("plain", loop)),
    "skewed": Row("Qwen2-VL fixture, {rows} rows of very different length, warm cache: loop time", None, "skewed", ("mmft_warm", loop), ("plain", loop)),
    "packed": Row("the same, packed", 0.40, "skewed", ("mmft_packed", loop), ("plain", loop)),
    "grouped": Row("the same, grouped by length", None, "skewed", ("mmft_grouped", loop), ("plain", loop)),
    "swift_best": Row("the same, packed, against ms-swift that groups rows by length", 0.60, "skewed", ("mmft_packed", loop), ("swift_best", loop)),
    "llamafactory_best": Row("the same, packed, against LLaMA-Factory that groups rows by length", 0.60, "skewed", ("mmft_packed", loop), ("llamafactory_best", loop)),
    "llamafactory_packed": Row("the same, packed, against LLaMA-Factory that packs", 0.60, "skewed", ("mmft_packed", loop), ("llamafactory_packed", loop)),
}
EXTRA = ("targets", "weights", "llava", "skewed", "packed", "grouped", "swift_best", "llamafactory_best", "llamafactory_packed")  # rows that are measured only if --only names them


@dataclass
class Benchmark:
    """The fixture, what has been measured so far, and what was found not to be the same work."""

    args: argparse.Namespace
    home: Path
    groups: dict[str, Group]
    peers: dict[str, str]  # name -> python of its environment
    n_rows: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, Timed]]] = field(default_factory=dict)
    flops: dict[str, dict[str, int]] = field(default_factory=dict)
    work: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # "group/contender" -> what was different
    speed: list[float] = field(default_factory=list)  # FLOP/s of the matrix product, before every round

    # --- what is run ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        size, data = "quick" if self.args.quick else "small", self.home / "data"
        rows = fixture.photos(self.args.photos, data, self.args.rows)
        self.n_rows = len(rows)
        if any(g.skewed for g in self.groups.values()):
            made = skewed.rows(self.args.photos, self.home / "skewed_data", self.args.rows)
            texts = [text for row in made for text in (row["text"], row["prompt"])]
            self.parameters["skewed"] = fixture.build("qwen2vl", self.home / "skewed", texts, size)
            say(f"fixture        qwen2vl, {self.parameters['skewed'] / 1e6:.1f} M parameters, {len(made)} rows of very different length")
        for family in sorted({g.family for g in self.groups.values() if not g.skewed}):
            self.parameters[family] = fixture.build(family, self.home / family, [row["text"] for row in rows], size)
            say(f"fixture        {family}, {self.parameters[family] / 1e6:.1f} M parameters, {self.n_rows} photos")

    def task(self, group: Group, **point: Any) -> Work:
        model, rows = self.home / group.family, self.home / "data" / "captions.jsonl"
        if group.skewed:
            model, rows = self.home / "skewed", self.home / "skewed_data" / "rows.jsonl"
        work = Work(group.family, str(model), str(rows), lr=commands.RATES[group.family], epochs=group.epochs, checkpointing=group.checkpointing, skewed=group.skewed)
        return dataclasses.replace(work, **point)

    def command(self, key: str, name: str, out: Path) -> list[Command]:
        """What one turn of a contender runs: one process, or for the plain loop's sweep one for each point."""
        group = self.groups[key]
        if name in ("mmft_warm", *WORDS):  # one home for all rounds: the first run there, which is not timed, fills the cache
            return [commands.mmft(self.task(group), out, self.home / "runs" / key / "warm", "disk", more=WORDS.get(name, ()))]
        if name == "mmft":
            first = {group.sweep: group.points[0]} if group.points else {}
            return [commands.mmft(self.task(group, **first), out, out / "home", "auto", group.sweep, group.points)]
        points = [{group.sweep: value} for value in group.points] or [{}]
        return [commands.script(name, self.task(group, **point), out / f"point{n}") for n, point in enumerate(points)]

    def names(self, key: str) -> list[str]:
        group = self.groups[key]
        more = [variant for name in self.peers for variant in VARIANTS.get(name, ())] if group.skewed else []
        return group.contenders + (list(self.peers) + more if group.peers else [])

    def python(self, name: str) -> str:
        return sys.executable if name.startswith("mmft") else self.peers.get(name.split("_")[0], sys.executable)

    def timed(self, command: Command, name: str) -> Timed:
        """One process; with --processor-time, its loop in processor seconds."""
        if not self.args.processor_time:
            return process.run(command, self.python(name), self.args.threads)
        report = command.out / "clock.json"
        found = process.run(commands.watched(command, report, "clock.py"), self.python(name), self.args.threads)
        found.loop = json.loads(report.read_text(encoding="utf-8"))["seconds"]
        return found

    def watch(self, key: str) -> None:
        """Every contender once under watch.py: the same rows, order, start and losses, or a problem. Not timed; fills the warm cache."""
        seen: dict[str, Any] = {}
        for name in self.names(key):
            folder = self.home / "runs" / key / "watched" / name
            (command,) = self.command(key, name, folder)
            report = folder / "watched.json"
            say(f"watching       {key}: {name}")
            try:
                process.run(commands.watched(command, report), self.python(name), self.args.threads)
            except RuntimeError as error:
                self.problems[f"{key}/{name}"] = str(error).strip().splitlines()[-1]
                if name == "plain":
                    raise
                continue
            seen[name] = json.loads(report.read_text(encoding="utf-8"))
            compare = checks.other_rows if has_other_order(name) else checks.differences
            if found := compare(seen["plain"], seen[name]):
                self.problems[f"{key}/{name}"] = "; ".join(found)
        self.flops[key] = {name: s["flops"] for name, s in seen.items()}
        first = seen["plain"]["steps"][0]
        self.work[key] = {
            "adapter": seen["plain"]["adapter"], "steps": len(seen["plain"]["steps"]), "first_batch": first["rows"], "first_loss": first["loss"],
            "supervised_tokens": sum(row["supervised"] for step in seen["plain"]["steps"] for row in step["rows"]),
            "pixels": [n for n, s in seen.items() if s["pixels"]], "features": [n for n, s in seen.items() if s["features"]],
        }  # fmt: skip

    def round(self, key: str, number: int) -> None:
        """One turn of every contender; its losses are compared with the plain loop's of the same round."""
        self.speed.append(process.multiplication_speed(self.args.threads))
        found: dict[str, Timed] = {}
        for name in self.names(key):
            if f"{key}/{name}" in self.problems:
                continue
            out = self.home / "runs" / key / f"round{number}" / name
            try:
                parts = [self.timed(c, name) for c in self.command(key, name, out)]
            except RuntimeError as error:
                if name == "plain":
                    raise
                self.problems[f"{key}/{name}"] = str(error).strip().splitlines()[-1]
                continue
            found[name] = added(name, parts)
            for a, b in zip(found["plain"].losses, found[name].losses, strict=True) if not has_other_order(name) else ():
                if different := checks.apart(a, b):
                    self.problems.setdefault(f"{key}/{name}", "; ".join(different))
            t = found[name]
            say(f"{key:<14} round {number}: {name:<13} loop {t.loop:7.2f} s  cache {t.cache:6.2f} s  process {t.wall:7.2f} s  {t.memory:6.0f} MB")
            shutil.rmtree(out / "home", ignore_errors=True)
        self.rounds.setdefault(key, []).append(found)

    # --- what is found --------------------------------------------------------------------------------------------

    def middle(self, key: str, name: str, what: Callable[[Timed], float]) -> float | None:
        values = [what(r[name]) for r in self.rounds.get(key, []) if name in r]
        return median(values) if values and f"{key}/{name}" not in self.problems else None

    def ratio(self, row: Row) -> tuple[float | None, list[float]]:
        """(quotient of the medians, quotient in each round)."""
        (a, above), (b, below) = row.above, row.below
        each = [above(r[a]) / below(r[b]) for r in self.rounds.get(row.group, []) if a in r and b in r]
        top, bottom = self.middle(row.group, a, above), self.middle(row.group, b, below)
        return (top / bottom if top is not None and bottom else None), each


def has_other_order(name: str) -> bool:
    """Whether a contender trains on the rows of an epoch in an order of its own, so that losses are not comparable."""
    return name == "mmft_grouped" or name.endswith("_best")


def added(name: str, parts: list[Timed]) -> Timed:
    """Several processes one after another as one: times add up, the memory is the largest."""
    return Timed(
        name, sum(p.wall for p in parts), max(p.memory for p in parts), sum(p.loop for p in parts), sum(p.cache for p in parts),
        [losses for p in parts for losses in p.losses], parts[0].times,
    )  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


# --- the table ----------------------------------------------------------------------------------------------------


def markdown(b: Benchmark, rows: dict[str, Row], place: dict[str, Any]) -> str:
    where = f"{place['cpu']}, {b.args.threads or place['cores']} threads, torch {place['torch']}, transformers {place['transformers']}, peft {place['peft']}"
    sizes = ", ".join(f"{family} {n / 1e6:.1f} M" for family, n in b.parameters.items())
    lines = [
        f"Commit {place['commit'][:12]}{' with changes' if place['changed'] else ''}; {where}; fp32; {sizes}; {b.n_rows} photos"
        f"{' that were drawn' if b.args.photos is None else ''}; medians of {b.args.repeats} interleaved rounds"
        f"{'; loops in processor time' if b.args.processor_time else ''}"
        f"{'; quick: sizes and steps of a self-check, not figures' if b.args.quick else ''}.",
        "", "| | at most | measured | in each round |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows.values():
        value, each = b.ratio(row)
        group = b.groups[row.group]
        text = row.text.format(rows=b.n_rows, eight=group.epochs, points=len(group.points))
        target = "" if row.target is None else f"{row.target:.2f}"
        lines.append(f"| {text} | {target} | {'-' if value is None else f'{value:.3f}'} | {', '.join(f'{v:.3f}' for v in each)} |")
    top = median(b.speed) if b.speed else 0.0
    lines += ["", f"This machine multiplies fp32 matrices at {top / 1e9:.0f} GFLOP/s (median over the rounds); the share is of that.", ""]
    lines += ["| work | contender | loop, s | cache, s | whole process, s | peak memory, MB | samples/s | loop's GFLOP | share | loop against plain |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for key, group in b.groups.items():
        samples = b.n_rows * group.epochs * max(len(group.points), 1)
        plain = b.middle(key, "plain", loop)
        for name in b.names(key):
            seconds = b.middle(key, name, loop)
            if seconds is None:
                lines.append(f"| {key} | {name} | {b.problems.get(f'{key}/{name}', 'not run')} | | | | | | | |")
                continue
            flops = b.flops.get(key, {}).get(name)
            work = f"{flops / 1e9:.0f} | {flops / seconds / top:.0%}" if flops and top else " | "
            cells = [b.middle(key, name, what) for what in (loop, lambda t: t.cache, wall, memory)]
            shown = f"{cells[0]:.2f} | {cells[1]:.2f} | {cells[2]:.2f} | {cells[3]:.0f} | {samples / seconds:.2f} | {work} | {seconds / plain:.3f}"
            lines.append(f"| {key} | {name} | {shown} |")
    for key, work in b.work.items():
        lines += ["", f"{key}: {work['steps']} steps, {work['supervised_tokens']} supervised tokens, adapter {work['adapter']}, first loss {work['first_loss']:.6f};"
                  f" pixels in {', '.join(work['pixels'])}; features in {', '.join(work['features']) or 'none'}."]  # fmt: skip
    lines += ["", f"Peers run: {', '.join(b.peers) or 'none'}."]
    if b.problems:
        lines += ["", "Not the same work, and so left out:", "", *(f"- {name}: {text}" for name, text in b.problems.items())]
    return "\n".join(lines) + "\n"


def write(b: Benchmark, rows: dict[str, Row], place: dict[str, Any], out: Path) -> str:
    text = markdown(b, rows, place)
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.md").write_text(text, encoding="utf-8")
    content = {
        "place": place, "arguments": {k: str(v) for k, v in vars(b.args).items()}, "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "ratios": {key: {"target": row.target, "measured": b.ratio(row)[0], "rounds": b.ratio(row)[1]} for key, row in rows.items()},
        "parameters": b.parameters, "rows": b.n_rows, "multiplication_flops": b.speed, "flops": b.flops, "work": b.work, "problems": b.problems,
        "rounds": {key: [{name: dataclasses.asdict(t) for name, t in r.items()} for r in rounds] for key, rounds in b.rounds.items()},
    }  # fmt: skip
    (out / "speed.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return text


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a COCO folder or a folder of pictures; default: pictures are drawn")
    parser.add_argument("--rows", type=int, help="photos to train on (32; 8 with --quick)")
    parser.add_argument("--repeats", type=int, help="interleaved rounds (5; 1 with --quick)")
    parser.add_argument("--only", action="append", choices=ROWS, help=f"a row of the table; may be given several times ({', '.join(EXTRA)} only so)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"a peer and the python of its environment: {', '.join(PEERS)}")
    parser.add_argument("--threads", type=int, help="threads of every contender; default: as many as torch takes by itself")
    parser.add_argument("--processor-time", action="store_true", help="the loop in seconds of the processor, for a machine that does other work too; use it with --threads 1")
    parser.add_argument("--contender", action="append", help="of a group, only these and plain; may be given several times")
    parser.add_argument("--unwatched", action="store_true", help="do not check the work before it is timed; the losses of every round are compared all the same")
    parser.add_argument("--quick", action="store_true", help="models of half a million parameters and few steps: checks the benchmark itself")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--keep", action="store_true", help="keep the fixture and every run below --out/work")
    args = parser.parse_args(words)
    args.rows = args.rows or (8 if args.quick else 32)
    args.repeats = args.repeats or (1 if args.quick else 5)
    for peer in args.peer:
        if peer.split("=")[0] not in PEERS or "=" not in peer:
            parser.error(f"--peer {peer}: NAME=PYTHON with a NAME of {', '.join(PEERS)}")
    return args


def main(words: list[str] | None = None) -> int:
    """0: everything measured was the same work; 1: a contender of ours was not, and is left out by name."""
    args = parsed(words)
    rows = {key: row for key, row in ROWS.items() if (key in args.only if args.only else key not in EXTRA)}
    groups = {key: group for key, group in GROUPS.items() if any(row.group == key for row in rows.values())}
    if args.quick:
        groups = {key: dataclasses.replace(g, epochs=min(g.epochs, 3), points=g.points[::3]) for key, g in groups.items()}
    if args.contender:
        groups = {key: dataclasses.replace(g, contenders=[name for name in g.contenders if name == "plain" or name in args.contender]) for key, g in groups.items()}
    home = args.out.resolve() / "work"
    shutil.rmtree(home, ignore_errors=True)
    os.environ |= process.OFFLINE
    b = Benchmark(args, home, groups, dict(peer.split("=", 1) for peer in args.peer))
    place = process.place()
    b.build()
    for key, group in groups.items():
        if group.watched and not args.unwatched:
            b.watch(key)
    for number in range(1, args.repeats + 1):
        for key in groups:
            b.round(key, number)
            text = write(b, rows, place, args.out)
    print("\n" + text)
    if not args.keep:
        shutil.rmtree(home)
    return 1 if any(name.split("/")[1].split("_")[0] not in b.peers for name in b.problems) else 0


if __name__ == "__main__":
    sys.exit(main())
