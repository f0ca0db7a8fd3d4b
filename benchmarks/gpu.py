"""On a GPU: three models at their true shapes with random weights, and what each optimisation of mmft adds, one rung after another.

    python -m benchmarks.gpu [--models qwen2vl llava blip2]        no network, within ten minutes
    python -m benchmarks.gpu --tiny --device cpu                   the same code on small shapes: a self-check, without useful figures
    python -m benchmarks.predict                                   what the rungs should take on an H200, from operations counted here

Rows are random pixels and random words of equal length, prepared as tensors: no rung reads or resizes photos. Each rung has the
optimisations of all earlier rungs. The rungs that begin with "skewed" have answers of very different length, those that begin with
"answers" generate; each of these is compared with the first of its kind.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import process, skewed
from .commands import LAYERS

COMPILING = 60  # seconds that a compiled rung may take before its first step; it is not begun with fewer left
TOKENS = 32  # of a generated answer
QUESTION, ANSWER = 20, 16  # made-up tokens before and behind; the answer carries loss
# Figures of the published configurations; what is not named is transformers' default for the class.
QWEN = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TRUE: dict[str, dict[str, Any]] = {
    "qwen2vl": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                 "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768, "rope_parameters": QWEN},
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
        "side": 280,
    },
    "llava": {  # Qwen1.5-4B behind CLIP-L/336
        "text": {"model_type": "qwen2", "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 20,
                 "num_key_value_heads": 20, "vocab_size": 151936, "max_position_embeddings": 32768},
        "vision": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                   "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768},
        "side": 336,
    },
    "blip2": {  # OPT-2.7b behind ViT-g and a Q-Former
        "text": {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "vocab_size": 50304, "word_embed_proj_dim": 2560, "dropout": 0.0},
        "vision": {}, "qformer": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "side": 224,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "qwen2vl": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
                 "vocab_size": 512, "tie_word_embeddings": True, "rope_parameters": QWEN | {"mrope_section": [2, 3, 3]}},
        "vision": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 64}, "side": 56,
    },
    "llava": {
        "text": {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "vocab_size": 512},
        "vision": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 32},
        "side": 56,
    },
    "blip2": {
        "text": {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
                 "word_embed_proj_dim": 64, "dropout": 0.0},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
        "qformer": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 32,
                    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "side": 56,
    },
}  # fmt: skip

# --- models and rows ----------------------------------------------------------------------------------------------


def built(family: str, shape: dict[str, Any], device: str, dtype: Any) -> Any:
    """The model on the device, seeded; every image token and the padding stand at the end of the vocabulary."""
    import torch
    import transformers as t

    last = shape["text"]["vocab_size"] - 1
    if family == "qwen2vl":
        vision = shape["vision"] | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
        ids = {"image_token_id": last, "video_token_id": last - 1, "vision_start_token_id": last - 2, "vision_end_token_id": last - 3}
        config = t.Qwen2VLConfig(text_config=shape["text"] | {"pad_token_id": None}, vision_config=vision, tie_word_embeddings=True, **ids)
    elif family == "llava":
        config = t.LlavaConfig(vision_config=shape["vision"], text_config=shape["text"], image_token_id=last, vision_feature_layer=-2)
    else:
        config = t.Blip2Config(
            vision_config=shape["vision"], qformer_config=shape["qformer"], text_config=shape["text"], num_query_tokens=32, image_token_index=last
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = t.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval()


def rows(family: str, shape: dict[str, Any], n: int, dtype: Any, answers: list[int] | None = None) -> list[dict[str, Any]]:
    """n made-up rows of batch size one, on the CPU: input_ids, attention_mask, labels and the image tensors. answers: tokens of each answer."""
    import torch

    side, vocabulary = shape["side"], shape["text"]["vocab_size"]
    places = {"qwen2vl": (side // 28) ** 2, "llava": (side // 14) ** 2, "blip2": 32}[family]
    draw = torch.Generator().manual_seed(1)
    made = []
    for answer in answers or [ANSWER] * n:
        words = torch.randint(4, vocabulary - 8, (QUESTION + answer,), generator=draw)
        ids = torch.cat([torch.full((places,), vocabulary - 1), words])[None]
        labels = ids.clone()
        labels[:, :-answer] = -100
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if family == "qwen2vl":
            row["pixel_values"] = torch.randn((side // 14) ** 2, 3 * 2 * 14 * 14, generator=draw).to(dtype)
            row["image_grid_thw"] = torch.tensor([[1, side // 14, side // 14]])
            row["mm_token_type_ids"] = (ids == vocabulary - 1).long()
        else:
            row["pixel_values"] = torch.randn(1, 3, side, side, generator=draw).to(dtype)
        made.append(row)
    return made


def batched(chosen: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    length = max(row["input_ids"].shape[1] for row in chosen)
    behind = {"input_ids": 4, "labels": -100, "attention_mask": 0, "mm_token_type_ids": 0}
    grown = [{k: torch.nn.functional.pad(v, (0, length - v.shape[1]), value=behind[k]) if k in behind else v for k, v in row.items()} for row in chosen]
    return {key: torch.cat([row[key] for row in grown]) for key in chosen[0]}


def moved(batch: Any, device: str) -> Any:
    if isinstance(batch, dict):
        return type(batch)(**{k: moved(v, device) for k, v in batch.items()}) if type(batch) is not dict else {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(v, device) for v in batch)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


# --- the ladder ---------------------------------------------------------------------------------------------------


@dataclass
class Rung:
    """A rung that is ready to run. micro: forward and backward pass of a batch on the device, returns its loss; update: of the weights.

    data: rows. batch: rows -> a batch. width: rows of a micro-batch. samples: that a step trains. device: where batches go. trained: parameters.
    uneven: the rows differ in length.
    """

    micro: Callable[[Any, int], Any]
    update: Callable[[], None]
    data: list[dict[str, Any]]
    batch: Callable[[list[dict[str, Any]]], dict[str, Any]]
    width: int
    samples: int
    device: str
    trained: list[Any]
    uneven: bool = False

    def make_state(self) -> None:
        """An update by gradients of zero, with which the optimizer makes its state."""
        for p in self.trained:
            p.grad = p.detach() * 0
        self.update()

    def __call__(self, number: int) -> tuple[float, int]:
        """Step `number`: (its loss, samples)."""
        chosen = [self.data[(4 * number + i) % len(self.data)] for i in range(4)]
        tokens = sum(int((row["labels"] != -100).sum()) for row in chosen)
        total = 0.0
        for at in range(0, 4, self.width):
            total = total + self.micro(moved(self.batch(chosen[at : at + self.width]), self.device), tokens)
        self.update()
        return float(total), self.samples


class Ladder:
    """Steps of 4 rows for each rung: what one optimizer step does, with adapters of the same start over the same weights."""

    def __init__(self, family: str, shape: dict[str, Any], args: argparse.Namespace):
        import torch

        self.family, self.shape, self.args, self.device = family, shape, args, args.device
        self.half = getattr(args, "half", args.device != "cpu")  # bf16, and adapters in fp32 under autocast
        self.dtype = torch.bfloat16 if self.half else torch.float32
        self.base = built(family, shape, args.device, self.dtype)
        self.rows = rows(family, shape, 16, self.dtype)
        self.kept: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []  # rows, and the same with features
        self.layers = rf".*language_model.*\.({'|'.join(LAYERS[family])})"
        self.parameters = sum(p.numel() for p in self.base.parameters())

    def rungs(self) -> dict[str, Callable[[], Callable[[int], tuple[float, int]]]]:
        """Name -> what prepares it: a step that takes its number and returns (loss of the first member, samples)."""
        best = {"frozen": True, "supervised": True, "cached": True, "merged": True}
        answers = [words for words, _ in skewed.lengths(len(self.rows))]
        uneven = rows(self.family, self.shape, len(answers), self.dtype, answers)
        found: dict[str, Callable[[], Callable[[int], tuple[float, int]]]] = {
            "baseline": lambda: self.alone(),
            "no tower gradients": lambda: self.alone(frozen=True),
            "supervised logits": lambda: self.alone(frozen=True, supervised=True),
            "cache": lambda: self.alone(frozen=True, supervised=True, cached=True),
            "merged batches": lambda: self.alone(**best),
        }
        found |= {f"joint, K = {k}": lambda k=k: self.joint(k) for k in self.args.joint}
        found |= {"skewed, baseline": lambda: self.alone(data=uneven), "skewed, padded": lambda: self.alone(**best, data=uneven)}
        if self.family != "blip2":  # which cannot be packed, and whose `generate` takes no features
            found |= {"skewed, packed": lambda: self.alone(**best, packed=True, data=uneven)}
            found |= {"answers, pixels": lambda: self.answers(cached=False), "answers, features": lambda: self.answers(cached=True)}
        found |= {"compiled": lambda: self.alone(**best, compiled=True)}  # last, because compiling takes long
        return found | {f"joint, K = {k}, compiled": lambda k=k: self.joint(k, compiled=True) for k in self.args.joint}

    def peft(self, model: Any) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(2)
        made = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=self.layers))
        for p in made.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return made

    def features(self, data: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Rows with features in place of pixels, as mmft keeps them: computed once for all rungs. data: other rows than the ladder's."""
        from mmft.feature_cache.image_features import FeatureLayout

        data = data or self.rows
        if known := next((cached for rows, cached in self.kept if rows is data), None):
            return known
        self.layout = FeatureLayout()
        cached: list[dict[str, Any]] = []
        for row in data:
            tensors = {k: v for k, v in row.items() if k in ("pixel_values", "image_grid_thw")}
            (entry,) = self.layout.compute(self.base, tensors, 1)
            cached.append({k: v for k, v in row.items() if k not in tensors} | {"entry": entry})
        self.kept.append((data, cached))
        return cached

    def alone(
        self, frozen: bool = False, supervised: bool = False, cached: bool = False, merged: bool = False, compiled: bool = False, packed: bool = False,
        data: list[dict[str, Any]] | None = None,
    ) -> Rung:  # fmt: skip
        """One adapter, two micro-batches of two rows a step, or one of four. data: other rows than the ladder's."""
        import torch

        from mmft.adapters.freeze import freeze
        from mmft.losses.packing import Packing
        from mmft.losses.supervised import supervised_loss
        from mmft.rewrites.base import Replaced
        from mmft.sweeps.context import modules_over
        from mmft.training.compiled import Compile, compile_layers

        model = modules_over(self.base)
        if self.args.checkpointing and not frozen:
            model.enable_input_require_grads()  # what tutorials write before gradient checkpointing
        model = self.peft(model)
        if frozen:
            freeze(model)
        if self.args.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        if compiled:
            compile_layers(model, Replaced(), Compile(self.args.backend, None))
        used = self.features(data) if cached else data or self.rows
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        pack = Packing(model) if packed else lambda batch: batch

        def micro(batch: dict[str, Any], tokens: int) -> Any:
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half):
                if supervised:
                    loss, _ = supervised_loss(model, pack(batch))
                    loss = loss / tokens
                else:
                    loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss
            loss.backward()
            return loss.detach()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

        return Rung(micro, update, used, self.batch, 4 if merged else 2, 4, self.device, trained, data is not None)

    def answers(self, cached: bool, tokens: int = TOKENS) -> Callable[[int], tuple[float, int]]:
        """Greedy answers of so many tokens to 16 prompts at once: transformers' `generate` over pixels, or mmft's loop over cached features."""
        import torch
        from transformers import GenerationConfig

        from mmft.evaluation.decode import decode, group_size

        model = self.base
        last = model.config.text_config.vocab_size - 1
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=[last], pad_token_id=last, use_cache=True)
        prompts = [
            {k: v[:, :-ANSWER] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in row.items() if k != "labels"}
            for row in (self.features() if cached else self.rows)
        ]  # fmt: skip

        def step(number: int) -> tuple[float, int]:
            with torch.no_grad():
                if cached:
                    size = group_size(16)
                    groups = ((list(range(i, i + size)), moved(self.batch(prompts[i : i + size]), self.device)) for i in range(0, 16, size))
                    written = [done.ids for done in sorted(decode(model, groups, settings, 16), key=lambda done: done.key)]
                else:
                    batch = moved(self.batch(prompts), self.device)
                    written = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
            return float(sum(sum(ids) for ids in written) / len(written)), len(written)

        return step

    def batch(self, chosen: list[dict[str, Any]]) -> dict[str, Any]:
        if "entry" not in chosen[0]:
            return batched(chosen)
        return batched([{k: v for k, v in row.items() if k != "entry"} for row in chosen]) | self.layout.inputs([row["entry"] for row in chosen])

    def joint(self, members: int, compiled: bool = False) -> Rung:
        """K adapters over one pass of the base, four cached rows of each, as mmft trains the points of a sweep."""
        import torch

        from mmft.joint.stacked_model import MemberBatch, RowOwners, joint_losses, stack_models
        from mmft.rewrites.apply import rewrite_for_training
        from mmft.rewrites.base import Replaced
        from mmft.sweeps.context import modules_over
        from mmft.training.compiled import Compile, compile_layers

        data, owners = self.features(), RowOwners()
        models = {n: self.peft(modules_over(self.base)) for n in range(members)}
        rewrites = {n: rewrite_for_training(model, "auto", 0) for n, model in models.items()}
        kwargs = {"use_reentrant": False} if self.args.checkpointing else None
        stacked = stack_models(self.base, models, rewrites, owners, kwargs)
        if compiled:
            # what no sweep of mmft does yet: these layers would be compiled anew for rows of other lengths
            compile_layers(stacked, Replaced(), Compile(self.args.backend, None, dynamic=False))
        trained = [[p for p in m.parameters() if p.requires_grad] for m in models.values()]
        optimizers = [torch.optim.AdamW(own, lr=1e-4, fused=True) for own in trained]

        def micro(batch: dict[str, Any], tokens: int) -> Any:
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half):
                each = [loss / tokens for loss, *_ in joint_losses(stacked, owners, [MemberBatch(n, batch, 0.0) for n in models])]
            sum(each).backward()
            return each[0].detach()

        def update() -> None:
            for own, optimizer in zip(trained, optimizers):
                torch.nn.utils.clip_grad_norm_(own, 1.0, foreach=True)
                optimizer.step()
                optimizer.zero_grad()

        return Rung(micro, update, data, self.batch, 4, 4 * members, self.device, [p for own in trained for p in own])


def measured(prepare: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """First loss, the loss after three steps, samples a second after three steps of warming up, and the highest GPU memory in GB."""
    import torch

    cuda = device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = prepare()
    first = [step(n)[0] for n in range(3)]
    wait()
    started, samples, number = time.perf_counter(), 0, 3
    while time.perf_counter() - started < seconds or number < 5:
        samples += step(number)[1]
        number += 1
    wait()
    took = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"first_loss": first[0], "third_loss": first[2], "samples_per_second": samples / took, "memory_gb": memory, "steps": number}


def climb(family: str, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    import torch

    ladder = Ladder(family, (TINY if args.tiny else TRUE)[family], args)
    print(f"\n{family}, {ladder.parameters / 1e6:.0f} M parameters, checkpointing {'on' if args.checkpointing else 'off'}", flush=True)
    print("| rung | samples/s | against baseline | GPU memory, GB | first loss | third loss |\n|---|---|---|---|---|---|", flush=True)
    found: dict[str, Any] = {"parameters": ladder.parameters, "rungs": {}}
    for name, prepare in ladder.rungs().items():
        if time.perf_counter() + (COMPILING if name.endswith("compiled") else 0) * (not args.tiny) > deadline:
            found["rungs"][name] = {"skipped": "out of time"}
            print(f"| {name} | out of time | | | | |", flush=True)
            continue
        try:
            m = measured(prepare, args.device, args.seconds)
        except torch.OutOfMemoryError:
            found["rungs"][name] = {"skipped": "out of memory"}
            print(f"| {name} | out of memory | | | | |", flush=True)
            continue
        found["rungs"][name] = m
        against = m["samples_per_second"] / found["rungs"].get(kind_of(name, found["rungs"]), m).get("samples_per_second", float("nan"))
        memory = "" if m["memory_gb"] is None else f"{m['memory_gb']:.1f}"
        print(f"| {name} | {m['samples_per_second']:.2f} | {against:.2f} | {memory} | {m['first_loss']:.5f} | {m['third_loss']:.5f} |", flush=True)
    found["odd"] = odd(found["rungs"], 1e-4 if args.device == "cpu" else 0.05)
    for text in found["odd"]:
        print(f"not the same work: {text}", flush=True)
    return found


def odd(rungs: dict[str, Any], tolerance: float) -> list[str]:
    """Rungs whose losses leave those of the first rung of their kind: fp32 agrees to 1e-4, bf16 to a few hundredths of losses of about ten.

    Of answers the token ids are compared, in fp32: in bf16 the largest of two nearly equal logits may be another in another batch.
    """
    found = []
    for name, m in rungs.items():
        base, answers = rungs[kind_of(name, rungs)], name.startswith("answers")
        if "first_loss" not in m or "first_loss" not in base or answers and tolerance > 1e-4:
            continue
        found += [
            f"{name}: {key.replace('_', ' ')} {m[key]:.5f}, {kind_of(name, rungs)} {base[key]:.5f}"
            for key in ("first_loss", "third_loss") if not abs(m[key] - base[key]) <= tolerance
        ]  # fmt: skip
    return found


def kind_of(name: str, rungs: Iterable[str]) -> str:
    """The rung that another is compared with: the first one with the same word before a comma, or the baseline."""
    word = name.split(",")[0]
    return next((other for other in rungs if other.split(",")[0] == word), name) if word in ("skewed", "answers") else "baseline"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TRUE, default=list(TRUE))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: runs every rung, measures nothing of interest")
    parser.add_argument("--joint", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, help="time of one rung (4; 0 with --tiny)")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which no further rung is begun, a compiled one a minute earlier")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="gradient checkpointing off in every rung")
    parser.add_argument("--backend", help="of torch.compile (inductor; aot_eager with --tiny)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    args = parser.parse_args(words)
    began = time.perf_counter()
    args.seconds = args.seconds if args.seconds is not None else 0.0 if args.tiny else 4.0
    args.backend = args.backend or ("aot_eager" if args.tiny else "inductor")
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny --device cpu checks the script itself, and no figures come of it")
    place = process.place() | {"gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None}
    print(f"commit {place['commit'][:12]}, {place['gpu'] or place['cpu']}, torch {place['torch']}, transformers {place['transformers']}, peft {place['peft']}")
    if args.tiny:
        print("a self-check on small shapes: these are no figures")
    deadline = began + args.limit
    found = {}
    for family in args.models:
        left = deadline - time.perf_counter()
        found[family] = climb(family, args, time.perf_counter() + (left if family == args.models[-1] else left / 2))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.json").write_text(json.dumps({"place": place, "tiny": args.tiny, "models": found}, indent=1), encoding="utf-8")
    return 1 if any(f["odd"] for f in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
