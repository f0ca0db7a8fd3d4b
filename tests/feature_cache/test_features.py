"""Features computed once: the same losses and answers as without, refusals, what a key covers, damage, a full disk, two processes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from safetensors.torch import load_file
from small_models import GROUP, KINDS

SMALL = ["data.pictures=24", "data.splits.validation=4", "trainer.max_steps=4", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4",
         "generation.max_new_tokens=4", "evaluation.samples=0", "logger=none"]  # fmt: skip
KEPT = ("qwen2vl", "qwen2_5vl", "qwen3vl", "llava", "llava_vicuna", "blip2")  # the families whose features must be cacheable


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six pictures of three sizes, each with two rows of different length: images repeat, batches are padded."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("table")
    lines = ["image,question,answer"]
    for n in range(6):
        picture = Image.new("RGB", [(56, 56), (84, 56), (112, 84)][n % 3], "white")
        ImageDraw.Draw(picture).rectangle((n * 4, n, n * 4 + 20, 30 + n), fill=[(220, 30, 30), (30, 30, 220)][n % 2])
        picture.save(folder / f"{n}.png")
        lines += [f"{n}.png,What is in the picture?,a {'red' if n % 2 == 0 else 'blue'} square", f"{n}.png,Which colours do you see?,{'red' if n % 2 == 0 else 'blue'}"]
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.csv"


def words(small, kind, table, *more):
    return (
        f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={table.as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 2}", "logger=none", "trainer.num_train_epochs=2",
        "trainer.per_device_train_batch_size=3", "trainer.learning_rate=0.01", "trainer.logging_steps=1", "generation.max_new_tokens=5", *more,
    )  # fmt: skip


def trained(mmft, tmp_path, name, *command):
    code, out, err = mmft(*command, f"run_dir={(tmp_path / name).as_posix()}")
    assert code == 0, err[-2000:]
    run = tmp_path / name
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    answers = [json.loads(line)["prediction"] for name in ("base", "tuned") for line in (run / "eval" / f"{name}.jsonl").read_text().splitlines()]
    return run, losses, answers, out


def difference(a: Path, b: Path) -> float:
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses_weights_and_answers_with_and_without(small, table, mmft, tmp_path, kind):
    plain, losses, answers, _ = trained(mmft, tmp_path, "plain", *words(small, kind, table, "vision_cache=off"))
    kept, same, again, out = trained(mmft, tmp_path, "kept", *words(small, kind, table, "vision_cache=auto"))
    assert "in memory" in out or kind not in KEPT, out
    assert len(losses) >= 6 and max(abs(a - b) for a, b in zip(losses, same, strict=True)) < 1e-5
    assert answers == again and difference(plain, kept) < 1e-4
    assert json.loads((plain / "summary.json").read_text())["supervised_tokens"] == json.loads((kept / "summary.json").read_text())["supervised_tokens"]


@pytest.mark.parametrize("kind", ["qwen2vl", "blip2"])
def test_gradients_equal_those_of_the_pixel_path(small, kind):
    """One batch through stock transformers with pixels, and from a cache: every adapter gradient."""
    import torch

    from mmft.adapters.freeze import freeze
    from mmft.adapters.lora import attach, plan
    from mmft.feature_cache.cache import Cache, CachedCollator
    from mmft.feature_cache.image_features import Taken
    from mmft.feature_cache.store import Store
    from mmft.losses.supervised import supervised_loss

    model, collator, _ = small.load(kind)
    samples = [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")]
    samples = [replace(s, sha256=tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in s.image_paths)) for s in samples]
    taken = Taken()
    _, tensors = collator.encode_checked(samples[:1], False)
    taken.compute(model, tensors, 1)
    cached = CachedCollator(collator, Cache(collator, model, taken, Store(None), Store(None)))
    torch.manual_seed(0)
    adapted = attach(model, plan(model, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "scope": "language"}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    freeze(adapted)
    adapted.train()
    gradients = []
    for batch in (collator(samples), cached(samples)):
        adapted.zero_grad()
        loss, _ = supervised_loss(adapted, batch)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in adapted.parameters() if p.requires_grad)])
    assert "pixel_values" in collator(samples) and cached(samples).get("pixel_values") is None
    assert any(float(g.abs().max()) > 1e-3 for g in gradients[0][1:])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2vl", "qwen3vl", "llava", "blip2"])
def test_the_lean_pass_gives_the_stock_towers_features_and_leaves_it_as_it_was(small, monkeypatch, kind):
    """MLPs in blocks of five rows, which divide no picture's patches."""
    import torch

    from mmft.feature_cache.image_features import Taken
    from mmft.rewrites import tower

    monkeypatch.setattr(tower, "BLOCK", 1)
    monkeypatch.setattr(tower, "FEWEST", 5)
    monkeypatch.setattr(tower, "_gives_the_same", lambda mlp, rows: True)  # whatever this processor rounds
    model, collator, _ = small.load(kind)
    samples = [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")]
    tensors = collator.encode_checked(samples, False)[1]
    with torch.no_grad():
        stock = model.get_image_features(**{k: v for k, v in tensors.items() if k in ("pixel_values", "image_grid_thw")}, return_dict=True).pooler_output
    rows: list[int] = []
    for module, _, _ in tower.ways(model):
        for inner in module.modules() if isinstance(module, torch.nn.Module) else []:
            if isinstance(inner, torch.nn.Linear):
                inner.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).shape[0]))
    taken = Taken()
    lean = taken.compute(model, tensors, 2)
    assert any("mlp" in type(module).__name__.lower() for module, _, _ in taken.ways)
    kinds = {name if name != "forward" else type(module).__name__ for module, name, _ in taken.ways}
    assert ("apply_rotary_pos_emb_vision" in kinds) == kind.startswith("qwen") and ("QuickGELUActivation" in kinds) == (kind in ("qwen2vl", "llava"))
    assert rows and max(rows) == 5  # the MLPs really were computed in blocks
    assert all("forward" not in vars(module) for module in model.modules())
    for own, entry in zip(stock, lean, strict=True):
        assert torch.allclose(own, entry["features"], atol=1e-5, rtol=1e-5)
        assert float(own.abs().max()) > 1e-2


def test_an_mlp_that_rounds_otherwise_in_blocks_is_left_whole(small, monkeypatch):
    import torch

    from mmft.rewrites import tower

    model, _, _ = small.load("qwen2vl")
    whole = type(next(m for n, m in model.named_modules() if n.endswith("blocks.0.mlp")))
    forward = whole.forward
    cut = {}
    for name, other in (("alike", lambda self, x: x.cumsum(1)), ("a bit off", lambda self, x: x.cumsum(1) * (1 + 2e-7 * (len(x) > 300)))):
        monkeypatch.setattr(whole, "forward", other)
        cut[name] = [m for m, _, _ in tower.ways(model) if isinstance(m, torch.nn.Module) and type(m) is whole]
    monkeypatch.setattr(whole, "forward", forward)
    assert cut["alike"] and not cut["a bit off"]


def test_a_hooked_module_is_left_alone(small, monkeypatch):
    from mmft.rewrites import tower

    monkeypatch.setattr(tower, "_gives_the_same", lambda mlp, rows: True)
    model, _, _ = small.load("qwen2vl")
    mlp = next(module for module, name, _ in tower.ways(model) if name == "forward" and "mlp" in type(module).__name__.lower())
    mlp.forward = mlp.forward  # as accelerate's hooks put theirs around it
    assert mlp not in [module for module, _, _ in tower.ways(model)]


@pytest.mark.parametrize("more, named", [
    (["lora.scope=all"], "visual"),
    (["lora=none"], "lora.scope=all trains"),
    (["lora.modules_to_save=[merger]"], "merger"),
    (["vision_cache_gb=0.00001"], "vision_cache_gb"),
])  # fmt: skip
def test_a_cache_that_cannot_be_is_refused_by_name_and_auto_does_without(mmft, tmp_path, more, named):
    code, out, err = mmft(*SMALL, "vision_cache=memory", *more)
    assert code == 2 and "vision_cache=memory" in err and named in err and err.count("\n") <= 2, err
    code, out, err = mmft(*SMALL, *more)
    assert code == 0 and "vision cache   off: " in out and named in out, err


def test_a_wrong_mode_is_one_line(mmft):
    code, _, err = mmft(*SMALL, "vision_cache=ram")
    assert code == 2 and "vision_cache=ram: must be one of auto, memory, disk, off" in err


def packs(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "outputs" / "cache").rglob("*.safetensors"))


def test_a_disk_cache_is_found_again_and_every_key_counts(mmft, tmp_path, monkeypatch):
    """The second run computes no feature; a change of what shapes features or tokens uses nothing of the first's."""
    from mmft.feature_cache import image_features

    computed = []
    compute = image_features.Taken.compute
    monkeypatch.setattr(image_features.Taken, "compute", lambda self, model, tensors, n: computed.append(n) or compute(self, model, tensors, n))
    trained(mmft, tmp_path, "first", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert sum(computed) >= 24
    first = packs(tmp_path)
    computed.clear()
    _, losses, _, _ = trained(mmft, tmp_path, "second", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert sum(computed) <= 3, "three rows are looked at to learn sizes"
    assert packs(tmp_path) == first
    for change, kind in (("model.processor={max_pixels: 12544}", "images"), ("model.dtype=bf16", "images"), ("model.attn_implementation=eager", "images"),
                         ("collator.system=Look well.", "rows")):  # fmt: skip
        before = {p.name for p in (tmp_path / "outputs" / "cache").iterdir()}
        trained(mmft, tmp_path, kind + change[:14].replace(".", "-").replace("=", "-"), *SMALL, "vision_cache=disk", change)
        added = {p.name for p in (tmp_path / "outputs" / "cache").iterdir()} - before
        assert any(name.startswith(kind) for name in added), f"{change} must not share {kind}"


def test_a_damaged_pack_is_said_removed_and_computed_again(mmft, tmp_path):
    _, losses, _, _ = trained(mmft, tmp_path, "first", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    kept = packs(tmp_path)
    for pack in kept:
        data = bytearray(pack.read_bytes())
        data[-5] ^= 1
        pack.write_bytes(bytes(data))
    _, again, _, out = trained(mmft, tmp_path, "second", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert out.count("is damaged") == len(kept) and losses == again
    assert packs(tmp_path) == kept, "the same contents bear the same names"


def test_a_full_disk_is_said_and_the_run_goes_on(mmft, tmp_path, monkeypatch):
    import errno

    from mmft.feature_cache import store

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, losses, _, _ = trained(mmft, tmp_path, "first", *SMALL, "vision_cache=off")
    monkeypatch.setattr(store, "_write", full)
    run, same, _, out = trained(mmft, tmp_path, "second", *SMALL, "vision_cache=disk")
    assert "No space left on device; from here on it is kept in memory" in out and (run / "DONE").is_file()
    assert max(abs(a - b) for a, b in zip(losses, same, strict=True)) < 1e-5 and not packs(tmp_path)


@pytest.mark.long
def test_two_processes_build_one_cache(tmp_path):
    """One fills it, the other waits and finds it: no image's features are on disk twice, both runs end the same."""
    command = [sys.executable, "-m", "mmft", *SMALL, "trainer.max_steps=10", "vision_cache=disk", f"output_dir={(tmp_path / 'outputs').as_posix()}"]
    started = [subprocess.Popen([*command, f"run_dir={(tmp_path / name).as_posix()}"], cwd=ROOT) for name in ("a", "b")]
    assert [p.wait(timeout=280) for p in started] == [0, 0]
    assert difference(tmp_path / "a", tmp_path / "b") == 0.0
    from safetensors import safe_open

    keys = []
    for pack in packs(tmp_path):
        with safe_open(pack, "pt") as file:
            keys += json.loads(file.metadata()["keys"])
    assert keys and len(keys) == len(set(keys))
