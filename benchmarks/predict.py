"""What the rungs of `benchmarks.gpu` should take on an H200, from operations that are counted here, without numbers and without a GPU.

    python -m benchmarks.predict [--models qwen2vl llava blip2] [--joint 2 4 8 16]      about a minute for each model, on one core

Each rung is built and run as `benchmarks.gpu` runs it, at the model's true widths, bf16, adapters in fp32, but on tensors that have only shapes (`shapes.py`), and with one or
two layers: every count is linear in the layers of both parts, and in the number of adapters that are trained jointly; it is quadratic in the tokens of an answer, each of which
reads the keys and values of those before it. What is counted is compared with the machine's figures (`roofline.py`). The rungs "compiled" are not predicted: how kernels are fused is the compiler's choice.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import gpu, process
from .roofline import H200, Counting, Counts, Machine
from .shapes import ShapesOnly

# Layers of the language model and of the tower. LLaVA reads the features before the tower's last layer, which is computed beside those counted here.
DEPTHS = {"qwen2vl": (28, 32), "llava": (40, 23), "blip2": (32, 39)}
TINY = {"qwen2vl": (2, 2), "llava": (2, 1), "blip2": (2, 2)}
FEW = (1, 1), (2, 1), (1, 2)  # layers of the models that are counted
TOKENS = 3, 4, 5  # of the answers that are counted
Prepared = Callable[[int], tuple[float, int]]


@dataclass(frozen=True)
class Prediction:
    """counts: of a step. samples: that it trains or answers. memory: the most bytes that are held at once, weights included."""

    counts: Counts
    samples: int
    memory: float

    def samples_per_second(self, machine: Machine) -> float:
        return self.samples / self.counts.seconds(machine)

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(self.counts + other.counts, self.samples + other.samples, self.memory + other.memory)

    def __mul__(self, times: float) -> Prediction:
        return Prediction(self.counts * times, round(self.samples * times), self.memory * times)

    def __sub__(self, other: Prediction) -> Prediction:
        return self + other * -1


def at(of: Callable[[int], Prediction], first: int, second: int, wanted: int) -> Prediction:
    """What is linear in a number, from two of its values."""
    one, two = of(first), of(second)
    return one + (two - one) * ((wanted - first) / (second - first))


def at_length(of: Mapping[int, Prediction], wanted: int) -> Prediction:
    """What is quadratic in the tokens of an answer, from three lengths in a row; the most that is held at once is linear in them."""
    first, second, third = sorted(of)
    straight = at(of.__getitem__, first, second, wanted)
    bend = of[third] + of[first] - of[second] * 2
    return dataclasses.replace(straight + bend * ((wanted - first) * (wanted - second) / 2), samples=of[first].samples, memory=straight.memory)


def at_depth(few: Sequence[Prediction], text: int, vision: int) -> Prediction:
    """The prediction for so many layers. few: of the models of FEW."""
    one, deeper, taller = few
    return one + (deeper - one) * (text - 1) + (taller - one) * (vision - 1)


def ladder(family: str, shape: dict[str, Any], layers: tuple[int, int], half: bool = True) -> gpu.Ladder:
    """The ladder of `benchmarks.gpu` over a model of so few layers, in the precision of a GPU. To be called, and its rungs to be run, inside `ShapesOnly`."""
    changed = copy.deepcopy(shape)
    changed["text"]["num_hidden_layers"] = layers[0]
    changed["vision"]["depth" if family == "qwen2vl" else "num_hidden_layers"] = layers[1] + (family == "llava")
    return gpu.Ladder(family, changed, SimpleNamespace(device="cpu", half=half, checkpointing=True, backend="", joint=()))


def predicted(own: gpu.Ladder, prepare: Callable[[], Prepared]) -> Prediction:
    """A step of a rung after the first, in which the optimizer makes its state. Rows of different length: the mean over all."""
    weights = sum(p.numel() * p.element_size() for p in own.base.parameters())
    with Counting() as counting:
        step = prepare()
        steps = 1
        if isinstance(step, gpu.Rung):
            step.make_state()
            steps = 4 if step.uneven else 1
        counting.counts = Counts()
        samples = [step(number)[1] for number in range(steps)]
    return Prediction(counting.counts * (1 / steps), samples[0], weights + counting.peak)


def of_few_layers(own: gpu.Ladder, joint: Sequence[int]) -> dict[str, Prediction]:
    """Rung -> its prediction for the layers that the ladder's model has."""
    found = {name: predicted(own, prepare) for name, prepare in own.rungs().items() if name != "compiled" and not name.startswith("answers")}
    members = {n: predicted(own, lambda: own.joint(n)) for n in (1, 2)} if joint else {}  # noqa: B023  # called at once
    found |= {f"joint, K = {k}": at(members.__getitem__, 1, 2, k) for k in joint}
    if own.family != "blip2":
        for cached in (False, True):
            tokens = {n: predicted(own, lambda: own.answers(cached, n)) for n in TOKENS}  # noqa: B023
            found[f"answers, {'features' if cached else 'pixels'}"] = at_length(tokens, gpu.TOKENS)
    return found


def predict(family: str, shape: dict[str, Any], depths: tuple[int, int], joint: Sequence[int], half: bool = True) -> dict[str, Prediction]:
    """Rung -> its prediction for so many layers of the language model and of the tower."""
    with ShapesOnly():
        few = [of_few_layers(ladder(family, shape, layers, half), joint) for layers in FEW]
    return {name: at_depth([found[name] for found in few], *depths) for name in few[0]}


def table(found: dict[str, Prediction], machine: Machine) -> list[str]:
    """The prediction as lines of markdown, with an empty column for what a GPU will measure."""
    lines = ["| rung | GFLOP | GB read and written | kernels | GPU, ms | launches, ms | samples/s | against its first | memory, GB | measured samples/s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, p in found.items():
        c, first = p.counts, found[gpu.kind_of(name, list(found))]
        busy, launches = c.busy(machine) * 1e3, c.kernels * machine.launch * 1e3
        speed = p.samples_per_second(machine)
        lines.append(
            f"| {name} | {c.flops / 1e9:.0f} | {(c.weights + c.values) / 1e9:.1f} | {c.kernels:.0f} | {busy:.1f} | {launches:.1f} |"
            f" {speed:.1f} | {speed / first.samples_per_second(machine):.2f} | {p.memory / 1e9:.1f} | |"
        )
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=gpu.TRUE, default=["qwen2vl"])
    parser.add_argument("--tiny", action="store_true", help="small shapes: a self-check")
    parser.add_argument("--joint", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    args = parser.parse_args(words)
    place, machine = process.place(), H200
    print(f"commit {place['commit'][:12]}, torch {place['torch']}, transformers {place['transformers']}, peft {place['peft']}")
    print(f"{machine.name}: {machine.flops / 1e12:.0f} TFLOP/s, of which {machine.share:.0%}, {machine.bandwidth / 1e12} TB/s, {machine.launch * 1e6:.0f} us a kernel")
    models: dict[str, Any] = {}
    for family in args.models:
        began = time.perf_counter()
        found = predict(family, (gpu.TINY if args.tiny else gpu.TRUE)[family], (TINY if args.tiny else DEPTHS)[family], args.joint)
        print(f"\n{family}, counted in {time.perf_counter() - began:.0f} s", *table(found, machine), sep="\n", flush=True)
        models[family] = {name: vars(p.counts) | {"samples": p.samples, "seconds": p.counts.seconds(machine), "memory": p.memory} for name, p in found.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"place": place, "machine": vars(machine), "tiny": args.tiny, "models": models}
    (args.out / "predicted.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
