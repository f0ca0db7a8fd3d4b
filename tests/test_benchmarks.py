"""The benchmark: its check accepts equal work and names differences; the whole benchmark runs on small models (long)."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """run(name, **changes): a contender on the small fixture in this process, and the batches that watch.py recorded."""
    before, folder = list(sys.path), tmp_path_factory.mktemp("benchmark")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "contenders")]
    fixture, commands, recipe, watch = (importlib.import_module(n) for n in ("benchmarks.fixture", "benchmarks.commands", "recipe", "watch"))
    rows = fixture.photos(None, folder / "data", 8)
    fixture.build("qwen2vl", folder / "model", [row["text"] for row in rows], "quick")
    work = commands.Work("qwen2vl", str(folder / "model"), str(folder / "data" / "captions.jsonl"), epochs=1)

    def run(name: str, **changes):
        command = commands.script(name, work, folder / "-".join([name, *changes]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command.words)
            for key, value in changes.items():
                patch.setattr(recipe.Collate if key == "labels" else recipe, key, value)
            with watch.recording() as seen:
                importlib.import_module(commands.SCRIPTS[name].removesuffix(".py")).main()
        return seen

    yield run
    sys.path[:] = before


@pytest.mark.long
def test_the_check_names_what_a_loop_does_differently(loops):
    checks, recipe = importlib.import_module("benchmarks.checks"), importlib.import_module("recipe")
    plain = loops("plain")
    assert plain["pixels"] and not plain["features"] and len(plain["steps"]) == 2
    for same in ("hand", "hand_merged"):
        seen = loops(same)
        assert checks.differences(plain, seen) == []
        assert seen["features"] and not seen["pixels"] and seen["flops"] < 0.5 * plain["flops"]

    masked, order, rows = recipe.Collate.labels, recipe.order, recipe.rows

    def end_without_loss(self, batch):
        labels = masked(self, batch)
        labels[batch["input_ids"] == self.end] = recipe.IGNORE
        return labels

    def swapped(task):  # of two pictures of one size, so that ids and grids stay as they are
        found = rows(task)
        found[0]["image"], found[4]["image"] = found[4]["image"], found[0]["image"]
        return found

    assert checks.differences(plain, loops("hand", labels=end_without_loss))[0].startswith("step 1: other labels")
    assert checks.differences(plain, loops("hand", order=lambda *given: order(*given)[::-1]))[0] == "step 1: other token ids"
    at = order(recipe.SimpleNamespace(seed=42), 0, 8)
    (text,) = checks.differences(plain, loops("hand", order=lambda *given: [at[1], at[0], *at[2:]]))
    assert text == "step 1: other token ids, in another order"
    (text,) = checks.differences(plain, loops("hand", rows=swapped))
    assert text.startswith(("step 1: loss", "step 2: loss"))


def test_memory_of_child_processes_counts():
    """A process of some 10 MB with a child of 300 MB."""
    from benchmarks.process import Memory

    child = "import time; held = bytearray(b'x') * 300_000_000; time.sleep(3)"
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    watch = Memory(parent.pid)
    assert parent.wait() == 0
    watch.stop()
    assert 300e6 < watch.peak < 400e6


def quick(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_packed_rows_are_described_as_rows_apart(small, monkeypatch):
    """What the check of equal work sees of rows with one image, two and none."""
    from mmft.losses.packing import Packing

    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "contenders"), *sys.path])
    watch = importlib.import_module("watch")
    model, collator, _ = small.load("qwen2vl")
    batch = collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [1, 2], "Which?", "blue"), small.sample("c", [], "Two dogs", "3 cats")])
    batch.pop("row_ids")
    apart, packed = watch.described(batch), watch.described(Packing(model)(batch))
    assert packed == apart and [len(row["grid"] or ()) for row in apart] == [1, 2, 0]
    swapped = {**batch, "image_grid_thw": batch["image_grid_thw"][[0, 2, 1]]}
    assert watch.described(swapped) != apart


def test_skewed_rows_have_the_shares_and_lengths_that_are_said(tmp_path):
    from benchmarks import skewed

    rows = skewed.rows(None, tmp_path, 40)
    assert [sum(len(row["image"]) == k for row in rows) for k in (0, 1, 2)] == [6, 28, 6]
    words = sorted(len(row["text"].split()) for row in rows)
    assert 5 <= words[0] < 15 and 250 < words[-1] <= 400
    kinds = [sum(row["prompt"] in questions for row in rows) for *_, questions in skewed.KINDS]
    assert kinds == [15, 6, 19]  # 40 x 58, 23 and 77 of 158
    assert len({row["image"][0] for row in rows if row["image"]}) > 20 and all((tmp_path / name).is_file() for row in rows for name in row["image"])


def test_counts_of_a_product_and_what_follows_from_them():
    """By hand: (3, 4) x (4, 5) are 2 x 60 operations on 12 + 20 + 15 numbers of 4 bytes, which are 2 bytes on the GPU; adding reads and writes 15 numbers each."""
    import torch

    from benchmarks.roofline import Counts, Machine, at_depth, counted, of_rows

    a, b, c, table, ids = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5), torch.ones(1000, 8), torch.tensor([1, 1])
    assert counted(lambda: torch.mm(a, b)) == Counts(120, 94, 0, 1)
    assert counted(lambda: c + c) == Counts(0, 0, 90, 1)
    assert counted(lambda: torch.nn.functional.embedding(ids, table)) == Counts(0, 0, 64, 1), "not the whole table"
    assert at_depth(lambda text, vision: Counts(7 + 10 * text + 100 * vision), 28, 32) == Counts(7 + 280 + 3200)
    assert of_rows(lambda rows: Counts(5 + 3 * rows), 4) == Counts(17)
    machine = Machine("made up", flops=1000, bandwidth=10, share=0.5, launch=1)
    assert Counts(2000, 10, 20, 1).seconds(machine) == 2000 / 500 + 20 / 10
    assert Counts(2000, 100, 20, 1).seconds(machine) == 100 / 10 + 20 / 10 and Counts(2000, 10, 20, 9).seconds(machine) == 9


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_benchmark_of_rows_of_unequal_length_runs_on_a_small_model(tmp_path):
    """All contenders, packed and in another order, train on the same rows; loops are timed by the processor."""
    done = quick(["benchmarks.speed", "--quick", "--threads", "1", "--processor-time", "--only", "packed", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    (round_,) = found["rounds"]["skewed"]
    assert not found["problems"] and set(round_) == {"plain", "mmft_warm", "mmft_packed", "mmft_grouped", "hand"}
    assert all(0 < timed["loop"] < timed["wall"] for timed in round_.values())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_whole_benchmark_runs_on_small_models(tmp_path):
    done = quick(["benchmarks.speed", "--quick", "--threads", "1", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert not found["problems"]
    assert len(found["ratios"]) == 10 and all(ratio["measured"] > 0 for ratio in found["ratios"].values())
    assert (tmp_path / "speed.md").read_text(encoding="utf-8").count("| qwen2vl |") == 5
    assert not (tmp_path / "work").exists()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_gpu_benchmark_runs_on_small_shapes(tmp_path):
    done = quick(["benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for found in json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["models"].values():
        rungs = found["rungs"]
        assert {"baseline", "cache", "joint, K = 16", "skewed, padded", "compiled", "joint, K = 2, compiled"} <= set(rungs) and not found["odd"]
        assert all("samples_per_second" in rung for rung in rungs.values()) and ("skewed, packed" in rungs) == ("answers, features" in rungs)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["qwen2vl", "llava", "blip2"])
def test_the_rungs_are_predicted_from_counts(tmp_path, model):
    """Each part that is left out leaves work out; the counts of two layers of each part, which are extrapolated from one, are those of the whole small model."""
    done = quick(["benchmarks.predict", "--tiny", "--model", model, "--joint", "2", "4", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    flops = {name: rung["flops"] for name, rung in json.loads((tmp_path / "predicted.json").read_text(encoding="utf-8"))["rungs"].items()}
    assert flops["baseline"] > flops["no tower gradients"] > flops["supervised logits"] > flops["cache"] >= flops["merged batches"] > 0
    assert flops["merged batches"] < flops["joint, K = 2"] < flops["joint, K = 4"] and flops.get("skewed, packed", 0) < flops["skewed, padded"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_benchmark_of_generation_runs_on_a_small_model(tmp_path):
    """Each answer has the length that its question asks for, and all contenders give the same ones."""
    done = quick(["benchmarks.generate", "--quick", "--rows", "6", "--threads", "1", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))
    (answers,) = ({name: contender["answers"] for name, contender in r.items()} for r in found["rounds"])
    assert [[text.count("@") for text in texts] for texts in answers.values()] == [[n - 1 for n in found["lengths"]]] * 3
    assert len({json.dumps(texts) for texts in answers.values()}) == 1
    assert len(set("".join(answers["mmft"])) & set("abcd")) == 4, "which form of a number is written depends on the context"
    assert "| mmft |" in (tmp_path / "generate.md").read_text(encoding="utf-8")
