"""What each rewrite gains: a training step with all of them, and with one left out, in turn in one process.

    python -m benchmarks.rewrites [--photos FOLDER] [--family qwen2vl] [--rounds 15]
    OMP_NUM_THREADS=1 python -m benchmarks.rewrites --compiled        a step with compiled layers (trainer.torch_compile) / without, in processor time

Prints a table: time of a step with all rewrites / without this one (below 1 is a gain), and the same for the pass that computes image
features (patch_embed) and for a step of decoding (few_rows, on processors where it is applied). Use a quiet machine. Losses of all variants are compared; a variant that differs ends the command with 1.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import fixture, process

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "scope": "language"}
CLOSE = 1e-4  # of the first loss


@dataclass
class Variant:
    """One model with its optimizer. without: the rewrite that was left out, "" for none. compiled: its layers are."""

    without: str
    step: Callable[[], float]
    compiled: bool = False


def variants(folder: Path, captions: list[dict[str, str]], photos: Path, family_name: str, dropout: float) -> list[Variant]:
    """All rewrites, then each left out."""
    from mmft.rewrites.apply import IN_TRAINING

    names = ["", *(r.name for r in IN_TRAINING), "last_layer"] if dropout == 0.0 else ["", "seeded_dropout"]
    model, batch = loaded(folder, captions, photos, family_name)
    return [variant(name, copy.deepcopy(model), batch, dropout) for name in names]


def variant(without: str, model: Any, batch: dict[str, Any], dropout: float, compiled: bool = False, checkpointing: bool = False) -> Variant:
    """without: a rewrite's name; "seeded_dropout" for all of training. compiled, checkpointing: as trainer.torch_compile and trainer.gradient_checkpointing."""
    import torch
    from transformers import set_seed

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.freeze import freeze
    from mmft.adapters.plan import plan_adapter
    from mmft.losses.supervised import supervised_loss
    from mmft.rewrites.apply import IN_TRAINING, rewrite_for_training
    from mmft.training.compiled import Compile, compile_layers

    set_seed(0)
    plan = plan_adapter(model, {**LORA, "lora_dropout": dropout})
    model = attach_adapter(model, plan)
    if without == "seeded_dropout":
        rewrites = rewrite_for_training(model, "off", 0)
    else:
        rewrites = rewrite_for_training(model, "auto", 0, [r for r in IN_TRAINING if r.name != without])
    freeze(model)
    if without not in ("last_layer", "seeded_dropout"):
        rewrites.narrow(model, batch, lambda compare: compare())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        compile_layers(model, rewrites.replaced, Compile("inductor", None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        loss, count = supervised_loss(model, batch)
        loss = loss / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Variant(without, step, compiled)


def compiled_steps(folder: Path, captions: list[dict[str, str]], photos: Path, family_name: str, rounds: int) -> tuple[list[str], bool]:
    """(a table of steps with compiled layers beside the same step without, whether all gave the same losses), in seconds of processor time, medians of interleaved rounds."""
    model, batch = loaded(folder, captions, photos, family_name)
    settings = {"with all rewrites": ("", False), "the same, gradient checkpointing": ("", True), "without": ("seeded_dropout", False), "without, gradient checkpointing": ("seeded_dropout", True)}
    pairs = {
        name: [variant(without, copy.deepcopy(model), batch, 0.0, compiled, checkpointing) for compiled in (False, True)]
        for name, (without, checkpointing) in settings.items()
    }  # fmt: skip
    chosen, first, losses = [v for pair in pairs.values() for v in pair], {}, {}
    for v in chosen:
        began = time.process_time()
        losses[id(v)] = [v.step() for _ in range(3)]
        first[id(v)] = time.process_time() - began
    seconds: dict[int, list[float]] = {id(v): [] for v in chosen}
    draw = random.Random(0)
    for _ in range(rounds):
        for v in draw.sample(chosen, len(chosen)):
            began = time.process_time()
            v.step()
            seconds[id(v)].append(time.process_time() - began)
    lines = ["| | s | compiled, s | ratio | its first three steps, compiled, s |", "|---|---|---|---|---|"]
    for name, (plain, own) in pairs.items():
        a, b = median(seconds[id(plain)]), median(seconds[id(own)])
        lines.append(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.3f} | {first[id(own)]:.1f} |")
    start = losses[id(chosen[0])]
    return lines, all(abs(a - b) <= CLOSE * abs(b) for own in losses.values() for a, b in zip(own, start))


def loaded(folder: Path, captions: list[dict[str, str]], photos: Path, family_name: str, rewrites: str = "auto") -> tuple[Any, dict[str, Any]]:
    """(the fixture's model, a batch of four rows with image features in place of pixels)."""
    import hashlib

    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.data.sample import Sample, assistant_turn, user_turn
    from mmft.feature_cache.cache import CachedCollator, FeatureCache
    from mmft.feature_cache.image_features import FeatureLayout
    from mmft.feature_cache.store import Store
    from mmft.models.load import build_collator, load_model

    cfg = compose([f"model={family_name}", f"model.path={folder}", f"model.rewrites={rewrites}", "model.device=cpu"])
    family = build(cfg.model, "model")
    base = load_model(family)
    collator: Any = build_collator(cfg.collator, family, base)
    samples = []
    for n, row in enumerate(captions[:4]):
        digest = hashlib.sha256((photos / row["image"]).read_bytes()).hexdigest()
        turns = [user_turn(1, fixture.PROMPT), assistant_turn(row["text"])]
        samples.append(Sample(str(n), (row["image"],), turns, (row["text"],), photos.as_posix(), (digest,)))
    layout = FeatureLayout()
    _, tensors = collator.encode_checked(samples[:1], False)
    layout.compute(base.model, tensors, 1)
    batch = CachedCollator(collator, FeatureCache(collator, base.model, layout, Store(None), Store(None)))(samples)
    batch.pop("row_ids", None)
    return base.model, batch


def measure(chosen: list[Variant], rounds: int) -> tuple[dict[str, float], bool]:
    """(median seconds of a step of each variant, whether all gave the same losses).

    They take turns, in an order that is drawn for each round: a step is slower after one that left much memory to return.
    """
    first = {v.without: v.step() for v in chosen}
    same = all(abs(loss - first[""]) <= CLOSE * abs(first[""]) for loss in first.values())
    times: dict[str, list[float]] = {v.without: [] for v in chosen}
    draw = random.Random(0)
    for _ in range(rounds):
        for v in draw.sample(chosen, len(chosen)):
            began = time.perf_counter()
            v.step()
            times[v.without].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}, same


def feature_pass(folder: Path, captions: list[dict[str, str]], photos: Path, family_name: str, rounds: int) -> dict[str, float]:
    """Median seconds of the pass through the tower, with and without patch_embed."""
    import torch

    times: dict[str, list[float]] = {"auto": [], "off": []}
    models = {mode: loaded(folder, captions, photos, family_name, mode)[0] for mode in times}
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    from PIL import Image

    pixels = processor.image_processor([Image.open(photos / row["image"]).convert("RGB") for row in captions[:8]], return_tensors="pt")
    for _ in range(rounds):
        for mode, model in models.items():
            began = time.perf_counter()
            with torch.no_grad():
                model.get_image_features(**pixels)
            times[mode].append(time.perf_counter() - began)
    return {mode: median(values) for mode, values in times.items()}


def decoding(model: Any, rows: int, rounds: int, tokens: int = 20) -> tuple[float, bool]:
    """(seconds of decoding with few_rows / without, of `rows` texts of 200 tokens, medians of rounds in turn; whether all tokens were equal)."""
    import torch
    from transformers import DynamicCache

    from mmft.rewrites import few_rows

    prompt = torch.randint(100, 1000, (rows, 200), generator=torch.Generator().manual_seed(0))
    ways = {True: few_rows.faster_linear, False: lambda: None}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    written: dict[bool, list[list[int]]] = {}
    for number in range(rounds + 1):  # the first round is not counted
        for faster, way in ways.items():
            few_rows.faster_linear = way
            with torch.no_grad():
                cache = DynamicCache()
                last = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
                found, began = [last], time.perf_counter()
                for _ in range(tokens):
                    found.append(last := model(input_ids=last, past_key_values=cache).logits.argmax(-1))
            if number:
                seconds[faster].append(time.perf_counter() - began)
            written[faster] = torch.cat(found, dim=1).tolist()
    few_rows.faster_linear = ways[True]
    return median(seconds[True]) / median(seconds[False]), written[True] == written[False]


def decoding_table(model: Any, rounds: int) -> bool:
    """Print few_rows' gain by the number of rows; whether the tokens were equal."""
    from mmft.rewrites import few_rows

    if few_rows.faster_linear() is None:
        print("few_rows is not applied on this processor")
        return True
    same = True
    for rows in (1, 4, 16):
        ratio, equal = decoding(model, rows, rounds)
        print(f"| few_rows (a token of each of {rows} rows) | {ratio:.3f} |", flush=True)
        same &= equal
    return same


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewrites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--family", default="qwen2vl", choices=["qwen2vl", "llava"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="small", choices=["small", "quick"])
    parser.add_argument("--compiled", action="store_true", help="steps with compiled layers, and nothing else")
    parser.add_argument("--decoding", action="store_true", help="steps of decoding, and nothing else")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as home:
        data, folder = Path(home) / "data", Path(home) / args.family
        captions = fixture.photos(args.photos, data, 8)
        n = fixture.build(args.family, folder, [row["text"] for row in captions], args.size)
        place = process.place()
        print(f"commit {str(place['commit'])[:12]}, {place['cpu']}, torch {place['torch']}; {args.family}, {n / 1e6:.1f} M parameters, 4 rows a step, fp32", flush=True)
        if args.compiled:
            lines, same = compiled_steps(folder, captions, data, args.family, args.rounds)
            print(*lines, *([] if same else ["losses differ between the variants"]), sep="\n")
            return 0 if same else 1
        if args.decoding:
            return 0 if decoding_table(loaded(folder, captions, data, args.family)[0], args.rounds) else 1
        seconds, same = measure(variants(folder, captions, data, args.family, 0.0), args.rounds)
        print(f"a step with all rewrites: {seconds['']:.2f} s\n\n| rewrite | step with it / without it |\n|---|---|", flush=True)
        for name, value in list(seconds.items())[1:]:
            print(f"| {name} | {seconds[''] / value:.3f} |", flush=True)
        dropped, _ = measure(variants(folder, captions, data, args.family, 0.1), args.rounds)
        print(f"| all of training, with dropout 0.1 | {dropped[''] / dropped['seeded_dropout']:.3f} |")
        passes = feature_pass(folder, captions, data, args.family, args.rounds)
        print(f"| patch_embed (pass of image features) | {passes['auto'] / passes['off']:.3f} |")
        same &= decoding_table(loaded(folder, captions, data, args.family)[0], args.rounds)
    if not same:
        print("losses or tokens differ between the variants", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
