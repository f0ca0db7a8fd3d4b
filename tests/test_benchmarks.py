"""The benchmark: its check accepts equal work and names differences; the whole benchmark runs on small models (long)."""

import importlib
import json
import os
import subprocess
import sys
import time

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
    """A process of some 10 MB with a child of 300 MB, which lives until it was seen: on a busy machine nobody looks for seconds."""
    from benchmarks.process import Memory

    child = "import sys; held = bytearray(b'x') * 300_000_000; sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"], stdin=subprocess.PIPE)
    watch = Memory(parent.pid)
    deadline = time.monotonic() + 60
    while watch.peak < 300e6 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.communicate()
    assert parent.returncode == 0
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


def test_a_plain_process_trains_on_the_draws_of_its_weight(tmp_path):
    """12 rows, two halves of 6, 12 draws in each of 2 epochs: by hand, how often each row comes, and what mmft is told."""
    from benchmarks import commands

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": "a.jpg", "text": str(n)}) + "\n" for n in range(12)), encoding="utf-8")
    for weight, second in ((0, 0), (0.5, 4), (1, 6), (2, 8)):
        work = commands.Work("qwen2vl", "model", str(rows), weight=weight)
        task = json.loads((commands.script("plain", work, tmp_path / str(weight)).out / "task.json").read_text(encoding="utf-8"))
        epochs = task["drawn"][:12], task["drawn"][12:]
        assert [sum(row >= 6 for row in epoch) for epoch in epochs] == [second, second] and len(task["drawn"]) == 24
        for own, draws in ((range(6), 2 * (12 - second)), (range(6, 12), 2 * second)):
            assert {task["drawn"].count(row) for row in own} <= {draws // 6, -(-draws // 6)}, "no row comes again before all of its half came"
    words = commands.mmft(work, tmp_path / "sweep", tmp_path, sweep="weight", points=(0, 0.5)).words
    assert {"data=mix", "data.draws=12", f"data.sources.first.path={tmp_path / 'first.jsonl'}", "data.sources.second.weight=0,0.5"} <= set(words)
    assert [len((tmp_path / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()) for half in ("first", "second")] == [6, 6]
    plain = commands.script("plain", commands.Work("qwen2vl", "model", str(rows)), tmp_path / "all")
    assert json.loads((plain.out / "task.json").read_text(encoding="utf-8"))["drawn"] is None


def test_counts_of_a_product_and_what_follows_from_them():
    """By hand: (3, 4) x (4, 5) are 2 x 60 operations on 12 + 20 + 15 numbers of 4 bytes; adding reads and writes 15 numbers each."""
    import torch

    from benchmarks.predict import Prediction, at, at_depth, at_length
    from benchmarks.roofline import Counting, Counts, Machine, counted

    a, b, c, table, ids = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5), torch.ones(1000, 8), torch.tensor([1, 1])
    assert counted(lambda: torch.mm(a, b)) == Counts(120, 188, 0, 1)
    assert counted(lambda: c.addmm_(a, b)) == Counts(120, 4 * (47 + 15), 0, 1), "in place: what is added to is read and written"
    assert counted(lambda: c + c) == Counts(0, 0, 180, 1) and counted(lambda: c.t()) == Counts()
    assert counted(lambda: torch.nn.functional.embedding(ids, table)) == Counts(0, 0, 128, 1), "not the whole table"
    q = torch.ones(2, 3, 5, 4)  # 2 rows, 3 heads, 5 positions of width 4: two products of 5 x 4 x 5 for each head
    assert counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)).flops == 2 * 3 * 2 * (2 * 5 * 4 * 5)
    with Counting() as counting:
        first = a + 1  # 48 bytes
        second = first * 2  # 48 more
        del first
        second.add_(1)
        third = torch.zeros(5)  # 20, when the first is gone
        del second, third
    assert (counting.peak, counting.held) == (96, 0)

    def of(flops):
        return Prediction(Counts(flops), 4, 7.0)

    assert at(lambda n: of(5 + 3 * n), 1, 2, 16) == of(5 + 48)
    assert at_length({n: of(7 + 3 * n + 5 * n * n) for n in (3, 4, 5)}, 64) == of(7 + 3 * 64 + 5 * 64 * 64)
    assert at_depth([of(7 + 10 * text + 100 * vision) for text, vision in ((1, 1), (2, 1), (1, 2))], 28, 32) == of(7 + 280 + 3200)
    machine = Machine("made up", flops=1000, bandwidth=10, share=0.5, launch=1)
    assert Counts(2000, 10, 20, 1).seconds(machine) == 2000 / 500 + 20 / 10
    assert Counts(2000, 100, 20, 1).seconds(machine) == 100 / 10 + 20 / 10 and Counts(2000, 10, 20, 9).seconds(machine) == 9


def test_without_numbers_shapes_and_masks_are_real():
    """A product of matrices that no machine holds; how many rows a mask selects is known; what would come from numbers is 0 or true."""
    import torch

    from benchmarks.roofline import counted
    from benchmarks.shapes import ShapesOnly

    with ShapesOnly():
        layer, x = torch.nn.Linear(1 << 20, 1 << 20, bias=False, dtype=torch.bfloat16), torch.ones(3, 1 << 20, dtype=torch.bfloat16)
        assert counted(lambda: layer(x)).flops == 2 * 3 << 40
        mask = torch.tensor([[1, 0, 1], [0, 0, 1]]) > 0
        rows = torch.zeros(2, 3, 8)
        assert rows[mask].shape == (3, 8) and int(mask.sum()) == 3
        rows[mask] = 1.0
        assert rows.argmax(-1).tolist() == [[0, 0, 0]] * 2 and bool((rows == rows).all()) and not bool((rows > 1).any()) and float(rows.sum()) == 1.0
        layer(x).sum().backward()
        assert layer.weight.grad.shape == (1 << 20, 1 << 20) and layer.to(torch.float32).weight.dtype == torch.float32


def test_start_up_is_compared_by_medians_and_a_process_costs_what_its_children_cost():
    from benchmarks.startup import Cost, Row, cost, table

    measured = [Row("import", "libraries", [], "libraries"), Row("import", "ours", [], "libraries")]
    found = {"libraries": [Cost(4, 5, 100), Cost(9, 9, 100), Cost(5, 6, 100)], "ours": [Cost(2, 3, 50), Cost(3, 3, 50), Cost(5, 3, 50)]}
    assert table(measured, found)[2:] == ["| `libraries` | 5.00 | 6.00 | 100 |  |  |", "| `ours` | 3.00 | 3.00 | 50 | 0.60 (0.33 to 1.00) | libraries |"]
    busy = "import time\nheld = bytearray(b'x') * 200_000_000\nwhile time.process_time() < 0.4: pass"
    own = cost(["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"])
    assert 0.4 <= own.processor < 2 and own.wall >= 0.4 and own.memory > 190, "of the largest process"
    with pytest.raises(RuntimeError, match="ended with 3"):
        cost(["-c", "import sys; sys.exit(3)"])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_benchmark_of_start_up_runs(tmp_path):
    done = quick(["benchmarks.startup", "--rounds", "1", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    costs = json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))["costs"]
    assert len(costs) == 12 and all(len(each) == 1 and each[0]["processor"] > 0 for each in costs.values())
    assert costs["mmft --help"][0]["processor"] < costs["import torch"][0]["processor"] < costs["mmft, one step"][0]["processor"]


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
def test_the_benchmark_of_sweeps_over_targets_and_weights_runs_on_a_small_model(tmp_path):
    """Each point has the losses of a plain process with its layers, or on its draws."""
    done = quick(["benchmarks.speed", "--quick", "--threads", "1", "--only", "targets", "--only", "weights", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert not found["problems"] and all(ratio["measured"] > 0 for ratio in found["ratios"].values())
    for rounds in found["rounds"].values():
        losses = rounds[0]["mmft"]["losses"]
        assert [len(each) for each in losses] == [4, 4, 4] and len({each[-1] for each in losses}) == 3, "three points, of 16 rows each"


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
def test_what_is_predicted_is_what_the_rungs_compute(model):
    """Every rung of the small shapes in fp32: what is extrapolated from fewer layers and members, without numbers, against a count of the rung itself, with numbers."""
    from types import SimpleNamespace

    from benchmarks import gpu, predict
    from benchmarks.roofline import Counting

    found = predict.predict(model, gpu.TINY[model], predict.TINY[model], [4], half=False)
    own = gpu.Ladder(model, gpu.TINY[model], SimpleNamespace(device="cpu", checkpointing=True, backend="", joint=[4]))
    for name, prepare in own.rungs().items():
        if name.endswith("compiled"):
            continue
        step = prepare()
        if isinstance(step, gpu.Rung):
            step.make_state()
        steps = 4 if name.startswith("skewed") else 1
        with Counting() as counting:
            for number in range(steps):
                step(number)
        real, said = counting.counts * (1 / steps), found[name].counts
        assert said.flops == pytest.approx(real.flops, rel=0.02 if name.startswith("answers") else 1e-9), name
        assert said.kernels == pytest.approx(real.kernels, rel=0.02), name
        # the cache of keys and values grows with every token of an answer, and is taken as it grows over the first ones
        assert said.weights + said.values == pytest.approx(real.weights + real.values, rel=0.1 if name.startswith("answers") else 0.05), name
    flops = {name: p.counts.flops for name, p in found.items()}
    assert flops["baseline"] > flops["no tower gradients"] > flops["supervised logits"] > flops["cache"] >= flops["merged batches"] > 0
    assert flops["merged batches"] < flops["joint, K = 4"] and flops.get("skewed, packed", 0) < flops["skewed, padded"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_predictions_are_printed_and_written(tmp_path):
    done = quick(["benchmarks.predict", "--tiny", "--models", "blip2", "--joint", "2", "4", "--out", str(tmp_path)])
    assert done.returncode == 0 and done.stdout.count("| joint, K = ") == 2, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "predicted.json").read_text(encoding="utf-8"))["models"]["blip2"]
    assert found["joint, K = 4"]["flops"] > found["joint, K = 2"]["flops"] > 0 and found["baseline"]["samples"] == 4


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_operations_of_qwen2vl_2b_by_hand():
    """A merged step over cached features at the true size: the products of the frozen weights, forward, again for the checkpoint, and for the gradient of their input.

    4 rows of 100 image tokens and 36 others. A layer's seven matrices have 46.8 million weights; the head computes 64 positions.
    """
    from benchmarks import gpu, predict

    found = predict.predict("qwen2vl", gpu.TRUE["qwen2vl"], predict.DEPTHS["qwen2vl"], [])
    tokens, weights = 4 * 136, 1536 * (2 * 1536 + 2 * 256 + 3 * 8960)
    frozen = 2 * tokens * weights * 28 * 3 + 2 * 64 * 1536 * 151936 * 2
    assert frozen < found["merged batches"].counts.flops < 1.06 * frozen, "adapters of rank 16 and attention add some per cent"
    assert 2209e6 * 2 < found["merged batches"].memory < 2209e6 * 2 + 4e9


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
