"""What the rungs of `benchmarks.gpu` should take on an H200, from operations that are counted on this CPU.

    python -m benchmarks.predict [--model qwen2vl] [--joint 2 4 8 16]      many minutes of one core

The model has its true widths, and one or two layers of each part, and one or two rows; `roofline.py` says how the counts of the whole
follow, and what the prediction assumes. The rungs "compiled" and "answers" are not predicted: how kernels are fused is the compiler's choice,
and a generated token waits for the host.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import gpu, process, skewed
from .roofline import H200, Counts, at_depth, counted, of_rows

DEPTHS = {"qwen2vl": (28, 32), "llava": (40, 24), "blip2": (32, 39)}  # layers of the language model and of the tower
ALONE = {
    "baseline": {}, "no tower gradients": {"frozen": True}, "supervised logits": {"frozen": True, "supervised": True},
    "cache": {"frozen": True, "supervised": True, "cached": True}, "merged batches": {"frozen": True, "supervised": True, "cached": True, "merged": True},
}  # fmt: skip


def ladder(family: str, shape: dict[str, Any], text: int, vision: int, checkpointing: bool) -> gpu.Ladder:
    """The ladder over a model of so few layers."""
    changed = copy.deepcopy(shape)
    changed["text"]["num_hidden_layers"] = text
    changed["vision"]["depth" if family == "qwen2vl" else "num_hidden_layers"] = vision
    if family == "llava":
        changed["vision"]["num_hidden_layers"] = vision + 1  # features are those of the layer before the last
    return gpu.Ladder(family, changed, SimpleNamespace(device="cpu", checkpointing=checkpointing, backend="aot_eager", joint=()))


class Predicted:
    """Counts of the rungs of one model; each ladder of few layers is built once."""

    def __init__(self, family: str, shape: dict[str, Any], depths: tuple[int, int], checkpointing: bool = True):
        self.family, self.depths = family, depths
        self.ladders = {layers: ladder(family, shape, *layers, checkpointing) for layers in ((1, 1), (2, 1), (1, 2))}

    def step(self, prepare: Callable[[gpu.Ladder], gpu.Rung]) -> Counts:
        """An optimizer step of four rows of a rung."""

        def few(text: int, vision: int) -> Counts:
            rung = prepare(self.ladders[text, vision])

            def rows(n: int) -> Counts:
                batch = rung.batch(rung.data[:n])
                return counted(lambda: rung.micro(batch, n))

            return of_rows(rows, rung.width) * (4 / rung.width) + counted(rung.update)

        return at_depth(few, *self.depths)

    def alone(self, keys: dict[str, bool]) -> Counts:
        return self.step(lambda own: own.alone(**keys))

    def joint(self, members: int) -> Counts:
        """A step of so many members: what all share, what each member adds, and what each of its rows adds."""

        def of(count: int, n: int) -> Callable[[int, int], Counts]:
            def few(text: int, vision: int) -> Counts:
                rung = self.ladders[text, vision].joint(count)
                batch = rung.batch(rung.data[:n])
                return counted(lambda: rung.micro(batch, n)) + counted(rung.update)

            return few

        one, two, wide = (at_depth(of(*size), *self.depths) for size in ((1, 1), (2, 1), (2, 2)))
        row = (wide - two) * 0.5
        member = two - one - row
        return one - member - row + member * members + row * (4 * members)

    def skewed(self, keys: dict[str, bool]) -> Counts:
        """A step of four rows of very different length: the mean over 16 rows, whose positions are counted in rows of the ladder's length."""
        rung = self.ladders[1, 1].alone()
        base = rung.data[0]["input_ids"].shape[1]
        answers = [words for words, _ in skewed.lengths(16)]
        lengths = [base - gpu.ANSWER + words for words in answers]
        packed = keys.pop("packed", False)
        groups = [lengths[i : i + 4] for i in range(0, 16, 4)]
        positions = sum(sum(group) if packed else 4 * max(group) for group in groups) / len(groups)

        def few(text: int, vision: int) -> Counts:
            own = self.ladders[text, vision].alone(**keys)
            return of_rows(lambda n: counted(lambda: own.micro(own.batch(own.data[:n]), n)), 4) + counted(own.update)

        whole, row = at_depth(few, *self.depths), positions / (4 * base)
        return Counts(whole.flops * row, whole.weights, whole.values * row, whole.kernels)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=gpu.TRUE, default="qwen2vl")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a self-check")
    parser.add_argument("--joint", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    args = parser.parse_args(words)
    predicted = Predicted(args.model, (gpu.TINY if args.tiny else gpu.TRUE)[args.model], (2, 2) if args.tiny else DEPTHS[args.model])
    best = ALONE["merged batches"]
    found = {name: (predicted.alone(keys), 4) for name, keys in ALONE.items()}
    found |= {f"joint, K = {k}": (predicted.joint(k), 4 * k) for k in args.joint}
    found |= {"skewed, padded": (predicted.skewed({**best}), 4)}
    if args.model != "blip2":
        found |= {"skewed, packed": (predicted.skewed({**best, "packed": True}), 4)}
    place, machine = process.place(), H200
    print(f"commit {place['commit'][:12]}, {args.model}, {machine.name}: {machine.flops / 1e12:.0f} TFLOP/s, of which {machine.share:.0%}, {machine.bandwidth / 1e12} TB/s, {machine.launch * 1e6:.0f} us a kernel")
    print("| rung | GFLOP | weights, GB | values, GB | kernels | computing, ms | launching, ms | samples/s | against baseline |\n|---|---|---|---|---|---|---|---|---|")
    base = 4 / found["baseline"][0].seconds(machine)
    for name, (c, samples) in found.items():
        busy = Counts(c.flops, c.weights, c.values).seconds(machine)
        speed = samples / c.seconds(machine)
        print(f"| {name} | {c.flops / 1e9:.0f} | {c.weights / 1e9:.1f} | {c.values / 1e9:.1f} | {c.kernels:.0f} | {busy * 1e3:.1f} | {c.kernels * machine.launch * 1e3:.1f} | {speed:.1f} | {speed / base:.2f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"place": place, "machine": vars(machine), "model": args.model, "tiny": args.tiny, "rungs": {name: vars(c) | {"seconds": c.seconds(machine)} for name, (c, _) in found.items()}}
    (args.out / "predicted.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
