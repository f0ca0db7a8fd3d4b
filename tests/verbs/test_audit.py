"""`mmft audit` and the part of it that training runs: the coloured mask, the checks, the counts, the estimate."""

import json
import re
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("audit_mask.txt")
SMALL = ["data.pictures=40", "data.splits.validation=8"]


def found(mmft, tmp_path, *words: str):
    """(exit code, terminal, errors, page)"""
    page = tmp_path / "page.html"
    code, out, err = mmft("audit", *words, f"out={page}")
    return code, out, err, page.read_text(encoding="utf-8") if page.exists() else ""


@pytest.fixture
def blind(small, tmp_path):
    """A LLaVA whose projector is all zero: it runs, it trains, and never sees a picture."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "blind"
    shutil.copytree(small("llava"), folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [k for k in weights if k.endswith("multi_modal_projector.linear_2.weight")]
    weights[name] = weights[name] * 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_coloured_mask_is_the_golden_one(mmft, tmp_path, small):
    """Marks instead of colours, since a test is no terminal. The file was checked by hand against these rows."""
    table = tmp_path / "rows.jsonl"
    rows = [("0.png", "What is in the picture?", "a red square"), ("1.png", "Which colours?", "二只狗 and <|im_end|> typed"), ("2.png", "Describe this image.", "first\nsecond")]
    table.write_text("".join(json.dumps({"image": i, "question": q, "answer": a}) + "\n" for i, q, a in rows), encoding="utf-8")
    code, out, err, page = found(
        mmft, tmp_path, "model=llava", f"model.path={small('llava')}", "data=table", f"data.path={table}", f"data.root={small.root}",
        "data.columns.text=answer", "data.columns.prompt=question", "data.splits.validation=0", "generate=0", "estimate=false",
    )  # fmt: skip
    assert code == 0, err
    assert "\x1b[" not in out, "no colour codes outside a terminal"
    mask = out[out.index("What the model sees") : out.index("Tokens of")].strip() + "\n"
    assert mask == GOLDEN.read_text(encoding="utf-8")


def test_the_page_shows_every_token_of_the_same_rows_and_needs_nothing_else(mmft, tmp_path):
    code, out, err, page = found(mmft, tmp_path, *SMALL, "rows=3", "generate=1", "gpu_memory_gb=24")
    assert code == 0, err
    assert page.count('class="row"') == 3 and page.count("data:image/") == 3
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    for kind in ("prompt", "image", "loss", "pad"):
        assert f'class="t-{kind}' in page
    (image_tokens,) = {int(n) for n in re.findall(r"&lt;\|image_pad\|&gt; x(\d+)", page)}
    assert image_tokens == 9
    assert "GPU of 24 GB" in page and "fits" in out and "nothing wrong" in page
    assert "The untrained model" in out


def test_pieces_hold_every_id_and_their_kinds_are_those_of_the_batch(small):
    """On every family; a character of several tokens is not torn."""
    from mmft.audit.tokens import pieces

    for kind in ("qwen2vl", "llava", "llava_vicuna", "blip2", "gemma3"):
        collator = small.collator(kind)
        rows = [small.sample("a", [0], "What is this?", "a red square"), small.sample("b", [1], "Qué?", "二只狗 in the picture and more")]
        batch = collator(rows)
        for i in range(2):
            got = pieces(collator, batch, i)
            assert [t for p in got for t in p.ids] == batch["input_ids"][i].tolist(), kind
            assert sum(len(p.ids) for p in got if p.kind == "loss") == int((batch["labels"][i] != -100).sum())
            assert sum(len(p.ids) for p in got if p.kind == "pad") == int((batch["attention_mask"][i] == 0).sum())
            assert sum(len(p.ids) for p in got if p.kind == "image") == int((batch["input_ids"][i] == collator.image_token_id).sum()) > 0
        said = "".join(p.text for p in pieces(collator, batch, 1) if p.kind == "loss")
        assert "二只狗 in the picture and more" in said.replace(" 二", "二"), kind


def test_a_blind_model_is_found_and_training_refuses_it(mmft, tmp_path, blind):
    words = [*SMALL, "model=llava", f"model.path={blind}"]
    code, out, err, page = found(mmft, tmp_path, *words, "estimate=false", "generate=0")
    assert code == 1 and "image-blindness" in err and "does not see them" in err and err.count("\n") == 1
    assert "WRONG" in out and "something is wrong" in page
    short = [*words, "trainer.max_steps=1", "evaluation.split=null", "logger=none"]
    code, _, err = mmft(*short, f"run_dir={tmp_path / 'refused'}")
    assert code == 1 and "does not see them" in err and "audit=false" in err
    assert json.loads((tmp_path / "refused" / "summary.json").read_text(encoding="utf-8"))["status"] == "failed"
    code, _, err = mmft(*short, f"run_dir={tmp_path / 'trained'}", "audit=false")
    assert code == 0, err


@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2", "smolvlm", "gemma3", "internvl", "llava_onevision"])
def test_every_family_sees_its_pictures_and_ends_its_answers(small, kind):
    from mmft.audit.checks import quick_checks

    model, collator, _ = small.load(kind)
    rows = [small.sample("a", [0], "What is this?", "a red square"), small.sample("b", [1], "And this?", "two dogs")]
    assert [(c.name, c.passed) for c in quick_checks(model, collator, rows)] == [("end token", True), ("image-blindness", True)]


def test_an_answer_that_does_not_end_is_found(small):
    from mmft.audit.checks import check_end_token

    collator = small.collator("llava")
    batch = collator([small.sample("a", [0], "What?", "a red square", "More?", "two dogs")])
    assert check_end_token(collator, batch).detail.startswith("2 answers")
    last = int((batch["labels"][0] != -100).nonzero()[-1])
    batch["labels"][0, last] = -100
    check = check_end_token(collator, batch)
    assert check.passed is False and "a closes with" in check.detail.replace("an answer of ", "")


def test_rows_that_training_would_refuse_are_counted_and_named(mmft, tmp_path):
    code, out, err, page = found(mmft, tmp_path, *SMALL, "collator.max_length=35", "estimate=false", "generate=0")
    assert code == 1 and "collator.max_length=35" in err
    refused = int(re.search(r"refuses (\d+) of (\d+) rows", err).group(1))
    assert 0 < refused < 32 and page.count("more than collator.max_length=35") >= refused


def test_percentiles_are_nearest_ranks():
    from mmft.audit.counts import TokenCounts, percentile

    assert [percentile(list(range(1, 11)), share) for share in (0, 50, 90, 99, 100)] == [1, 5, 9, 10, 10]
    assert percentile([], 50) == 0
    assert TokenCounts(lengths=[10] * 5).padded(3) == 30


def test_the_watched_peak_is_the_profilers():
    """Against torch's own memory profile of the same operations."""
    import torch

    from mmft.audit.allocation_tracker import track_allocations

    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x = torch.randn(512, 64)

    def work() -> None:
        layers(x).pow(2).sum().backward()

    with track_allocations() as tracker:
        work()
    layers.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now = highest = 0
    for _, change in events:
        now += change
        highest = max(highest, now)
    assert tracker.peak == pytest.approx(highest, rel=0.01) and tracker.peak > 512 * 256 * 4


@pytest.mark.long
def test_the_estimate_of_memory_is_within_a_fifth_of_a_training_that_is_watched(small, tmp_path):
    """Small LoRA and full training of two families; time is measured by benchmarks/estimate.py, on a machine that is quiet."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from benchmarks.estimate import compare

    for words in (["model=tiny"], ["model=tiny", "lora=none"], ["model=llava", f"model.path={small('llava')}", "lora.r=8"]):
        figures = compare([*words, *SMALL, f"output_dir={tmp_path.as_posix()}"], steps=3)
        assert 0.8 < figures["memory_estimated"] / figures["memory_measured"] < 1.2, figures


@pytest.mark.parametrize("words, expected", [(["rows=0"], "rows and count"), (["out=."], "exists already"), (["model.path=mmft:tini"], "Did you mean")])
def test_a_wrong_setting_is_one_line(mmft, words, expected):
    code, _, err = mmft("audit", *SMALL, *words)
    assert code == 2 and expected in err and "Traceback" not in err
