"""The feature cache: the same losses and answers as without it, refusals, keys, damaged files, a full disk, two processes."""

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
CACHED = ("qwen2vl", "qwen2_5vl", "qwen3vl", "llava", "llava_vicuna", "blip2")  # the families whose features must be cacheable


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


def train(mmft, tmp_path, name, *command):
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


@pytest.mark.parametrize("kind", [k if k in ("qwen2vl", "llava", "blip2") else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_losses_weights_and_answers_are_the_same_with_and_without_cache(small, table, mmft, tmp_path, kind):
    plain, losses, answers, _ = train(mmft, tmp_path, "plain", *words(small, kind, table, "vision_cache=off"))
    cached, same, again, out = train(mmft, tmp_path, "cached", *words(small, kind, table, "vision_cache=auto"))
    assert "in memory" in out or kind not in CACHED, out
    assert len(losses) >= 6 and max(abs(a - b) for a, b in zip(losses, same, strict=True)) < 1e-5
    assert answers == again and difference(plain, cached) < 1e-4
    assert json.loads((plain / "summary.json").read_text())["supervised_tokens"] == json.loads((cached / "summary.json").read_text())["supervised_tokens"]


@pytest.mark.parametrize("kind", ["qwen2vl", "blip2"])
def test_gradients_equal_those_from_pixels(small, kind):
    """One batch with pixels, and the same batch from the cache: all gradients of the adapter."""
    import torch

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.freeze import freeze
    from mmft.adapters.plan import plan_adapter
    from mmft.feature_cache.cache import CachedCollator, FeatureCache
    from mmft.feature_cache.image_features import FeatureLayout
    from mmft.feature_cache.store import Store
    from mmft.losses.supervised import supervised_loss

    model, collator, _ = small.load(kind)
    samples = [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")]
    samples = [replace(s, sha256=tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in s.image_paths)) for s in samples]
    layout = FeatureLayout()
    _, tensors = collator.encode_checked(samples[:1], False)
    layout.compute(model, tensors, 1)
    cached = CachedCollator(collator, FeatureCache(collator, model, layout, Store(None), Store(None)))
    torch.manual_seed(0)
    adapted = attach_adapter(model, plan_adapter(model, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "scope": "language"}))
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


@pytest.mark.parametrize("kind", CACHED)
def test_features_are_split_by_image(small, kind):
    """Two images computed together give the features that each gives alone, and those of a direct call of get_image_features."""
    import inspect

    import torch

    from mmft.feature_cache.image_features import FeatureLayout

    model, collator, _ = small.load(kind)
    samples = [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")]
    tensors = collator.encode_checked(samples, False)[1]
    arguments = {k: v for k, v in tensors.items() if k in inspect.signature(model.get_image_features).parameters}
    with torch.no_grad():
        direct = model.get_image_features(**arguments, return_dict=True).pooler_output
    together = FeatureLayout().compute(model, tensors, 2)
    alone = [FeatureLayout().compute(model, collator.encode_checked([s], False)[1], 1)[0] for s in samples]
    assert len(together) == 2 and float(direct[0].abs().max()) > 1e-2
    for n, (entry, single) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(entry["features"], direct[n]) and entry.keys() == single.keys()
        for name in entry:
            assert torch.allclose(entry[name], single[name], atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize("more, named", [
    (["lora.scope=all"], "visual"),
    (["lora=none"], "lora.scope=all trains"),
    (["lora.modules_to_save=[merger]"], "merger"),
    (["vision_cache_gb=0.00001"], "vision_cache_gb"),
])  # fmt: skip
@pytest.mark.long
def test_an_impossible_cache_is_refused_by_name_and_auto_runs_without_one(mmft, tmp_path, more, named):
    code, out, err = mmft(*SMALL, "vision_cache=memory", *more)
    assert code == 2 and "vision_cache=memory" in err and named in err and err.count("\n") <= 2, err
    code, out, err = mmft(*SMALL, *more)
    assert code == 0 and "vision cache   off: " in out and named in out, err


def test_a_wrong_mode_is_one_line(mmft):
    code, _, err = mmft(*SMALL, "vision_cache=ram")
    assert code == 2 and "vision_cache=ram: must be one of auto, memory, disk, off" in err


def packs(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "outputs" / "cache").rglob("*.safetensors"))


@pytest.mark.long
def test_a_disk_cache_is_used_again_unless_a_key_changes(mmft, tmp_path, monkeypatch):
    """The second run computes no feature; after a change of anything that decides features or tokens, nothing is used again."""
    from mmft.feature_cache import image_features

    computed = []
    compute = image_features.FeatureLayout.compute
    monkeypatch.setattr(image_features.FeatureLayout, "compute", lambda self, model, tensors, n: computed.append(n) or compute(self, model, tensors, n))
    train(mmft, tmp_path, "first", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert sum(computed) >= 24
    first = packs(tmp_path)
    computed.clear()
    _, losses, _, _ = train(mmft, tmp_path, "second", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert sum(computed) <= 3, "three rows are computed to estimate sizes"
    assert packs(tmp_path) == first
    for change, kind in (("model.processor={max_pixels: 12544}", "images"), ("model.dtype=bf16", "images"), ("model.attn_implementation=eager", "images"), ("model.rewrites=off", "images"),
                         ("collator.system=Look well.", "rows")):  # fmt: skip
        before = {p.name for p in (tmp_path / "outputs" / "cache").iterdir()}
        train(mmft, tmp_path, kind + change[:14].replace(".", "-").replace("=", "-"), *SMALL, "vision_cache=disk", change)
        added = {p.name for p in (tmp_path / "outputs" / "cache").iterdir()} - before
        assert any(name.startswith(kind) for name in added), f"{change} must not share {kind}"


@pytest.mark.long
def test_a_damaged_pack_is_reported_removed_and_computed_again(mmft, tmp_path):
    _, losses, _, _ = train(mmft, tmp_path, "first", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    written = packs(tmp_path)
    for pack in written:
        data = bytearray(pack.read_bytes())
        data[-5] ^= 1
        pack.write_bytes(bytes(data))
    _, again, _, out = train(mmft, tmp_path, "second", *SMALL, "vision_cache=disk", "trainer.max_steps=10")
    assert out.count("is damaged") == len(written) and losses == again
    assert packs(tmp_path) == written, "the same contents have the same names"


@pytest.mark.long
def test_a_full_disk_is_reported_and_the_run_goes_on(mmft, tmp_path, monkeypatch):
    import errno

    from mmft.feature_cache import store

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, losses, _, _ = train(mmft, tmp_path, "first", *SMALL, "vision_cache=off")
    monkeypatch.setattr(store, "_write", full)
    run, same, _, out = train(mmft, tmp_path, "second", *SMALL, "vision_cache=disk")
    assert "No space left on device; from here on it is kept in memory" in out and (run / "DONE").is_file()
    assert max(abs(a - b) for a, b in zip(losses, same, strict=True)) < 1e-5 and not packs(tmp_path)


def test_what_another_process_wrote_meanwhile_is_not_written_again(tmp_path):
    """Entries of the first rows, which each process computes before it holds the lock."""
    import torch

    from mmft.feature_cache.store import Store

    one, two = Store(tmp_path), Store(tmp_path)
    for store, more in ((one, "b"), (two, "c")):
        store.add({"a": {"x": torch.ones(2, 3)}, more: {"x": torch.zeros(1, 3)}})
    for store in (one, two, one):
        with store.building():
            pass
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and len(one) == len(two) == 3
    assert one["a"]["x"].equal(two["a"]["x"]) and one["c"]["x"].equal(torch.zeros(1, 3))


@pytest.mark.long
def test_two_processes_build_one_cache(tmp_path):
    """One fills it, the other waits for it: no image has its features on disk twice, and both runs give the same adapter."""
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
