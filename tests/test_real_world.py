"""Inputs that people have on their disks, one named case each: the input is made here, and its right result is a fact of the input.

If the handed cases lie beside the project (../shared/cases), each is run with the same expectations.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmft.data.prepared import PreparedData

HANDED = Path(__file__).resolve().parents[2] / "shared" / "cases"
TRAIN = ("trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "data.splits.validation=4")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (number * 12 % 256, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


def images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def table(folder: Path, name: str, texts: list[str], quote: str = "") -> None:
    """A CSV of one picture for each text, in img/."""
    names = [f"img/{n}.png" for n in range(len(texts))]
    images(folder, names)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    lines = ["image,text", *(f"{image},{quote}{text}{quote}" for image, text in zip(names, texts, strict=True))]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def birds(n: int = 20) -> list[str]:
    return [f"a bird {i}" for i in range(n)]


@dataclass
class Ran:
    """What the commands of a case printed, and what they left in the folder."""

    folder: Path
    command: str
    mmft: Callable[..., tuple[int, str, str]]
    outcomes: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def code(self) -> int:
        return self.outcomes[-1][0]

    @property
    def out(self) -> str:
        return " ".join(self.outcomes[-1][1].split())

    @property
    def err(self) -> str:
        return self.outcomes[-1][2]

    def samples(self) -> list[Any]:
        """All rows of the set that was prepared last."""
        assert self.code == 0, self.err
        manifests = [*(self.folder / "outputs" / "data").glob("*/manifest.json")]
        prepared = PreparedData(max(manifests, key=lambda m: m.stat().st_mtime_ns).parent)
        return [s for name in prepared.splits for s in prepared.split(name)]

    def held_out(self) -> list[Any]:
        [manifest] = (self.folder / "outputs" / "data").glob("*/manifest.json")
        return list(PreparedData(manifest.parent).split("validation"))

    def run(self) -> Path:
        """The one training run."""
        assert self.code == 0, self.err
        [done] = (self.folder / "outputs").glob("*/DONE")
        return done.parent

    def refused(self, *parts: str) -> None:
        """One line on stderr that holds all of these."""
        assert self.code == 2 and self.err.count("\n") == 1 and "Traceback" not in self.err, self.err
        assert all(part in self.err for part in parts), self.err


def content(sample: Any, role: str) -> list[dict[str, Any]]:
    return next(m["content"] for m in sample.messages if m["role"] == role)


def text(sample: Any, role: str = "assistant") -> str:
    return "".join(part["text"] for part in content(sample, role) if part["type"] == "text")


# --- the inputs, and what is right for them ---------------------------------------------------------------------------


def rows_without_placeholder(folder: Path) -> str:
    names = [f"img/{n}.png" for n in range(10)]
    images(folder, names)
    rows = [{"images": [name], "messages": [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": f"y {name}"}]} for name in names]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "mmft prepare data=messages data.path=m.jsonl"


def images_go_before_the_first_user_turn(ran: Ran) -> None:
    samples = ran.samples()
    assert len(samples) == 10 and all([p["type"] for p in content(s, "user")] == ["image", "text"] for s in samples)
    assert len(re.findall(r"before the first user turn", ran.out)) == 1 and "10 rows" in ran.out


def open_quote(folder: Path) -> str:
    table(folder, "t.csv", birds(), '"')
    lines = (folder / "t.csv").read_text(encoding="utf-8").splitlines()
    lines[10] = lines[10].rstrip('"')
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "mmft prepare data=table data.path=t.csv"


def line_11_is_named(ran: Ran) -> None:
    ran.refused("t.csv", "line 11")


def open_quote_at_end(folder: Path) -> str:
    table(folder, "t.csv", birds())
    lines = (folder / "t.csv").read_text(encoding="utf-8").splitlines()
    lines[5] = 'img/4.png,"a bird 4'
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "mmft prepare data=table data.path=t.csv"


def line_6_is_named(ran: Ran) -> None:
    ran.refused("t.csv", "line 6")


def python_list_in_cell(folder: Path) -> str:
    table(folder, "t.csv", [f"['a dog {n}', 'a brown dog']" for n in range(20)], '"')
    return "mmft prepare data=table data.path=t.csv"


def the_list_is_a_text_and_references(ran: Ran) -> None:
    by_text = {text(s): s.references for s in ran.samples()}
    assert by_text == {f"a dog {n}": (f"a dog {n}", "a brown dog") for n in range(20)}


def captions_txt(folder: Path) -> str:
    images(folder / "img", [f"{n}.png" for n in range(20)])
    lines = ["image,caption", *(f"{n}.png,caption {k} of {n} ." for n in range(20) for k in range(5))]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (
        "mmft prepare data=table data.path=captions.txt data.root=img data.columns.text=caption data.captions=group data.splits.validation=4"
    )


def five_references_each(ran: Ran) -> None:
    assert len(ran.samples()) == 20 and len(ran.held_out()) == 4
    for sample in ran.held_out():
        [name] = sample.images
        assert set(sample.references) == {f"caption {k} of {Path(name).stem} ." for k in range(5)}


def array_in_jsonl(folder: Path) -> str:
    images(folder, [f"img/{n}.png" for n in range(20)])
    rows = [{"image": f"img/{n}.png", "text": t} for n, t in enumerate(birds())]
    (folder / "a.jsonl").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return "mmft prepare data=table data.path=a.jsonl"


def twenty_rows(ran: Ran) -> None:
    texts = {text(s) for s in ran.samples()}
    assert len(texts) == len(ran.samples()) == 20 and all(re.fullmatch(r"a (bird|cat) \d+", t) for t in texts)


def rows_under_a_key(folder: Path) -> str:
    images(folder, [f"img/{n}.png" for n in range(20)])
    rows = [{"image": f"img/{n}.png", "text": t} for n, t in enumerate(birds())]
    (folder / "b.json").write_text(json.dumps({"version": 3, "data": rows}, indent=1), encoding="utf-8")
    return "mmft prepare data=table data.path=b.json"


def twenty_rows_and_the_key_is_said(ran: Ran) -> None:
    twenty_rows(ran)
    assert re.search(r"rows .*\bdata\b", ran.out)


def answer_is_an_object(folder: Path) -> str:
    names = [f"img/{n}.png" for n in range(20)]
    images(folder, names)
    answer = {"label": "cat", "n": 2}
    rows = [{"images": [n], "messages": [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": answer}]} for n in names]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "mmft prepare data=messages data.path=m.jsonl"


def the_answer_is_json(ran: Ran) -> None:
    if ran.code:  # by name: the row and the way on
        ran.refused("m.jsonl")
        assert "JSON" in ran.err or "object" in ran.err
        return
    assert {text(s) for s in ran.samples()} == {'{"label": "cat", "n": 2}'}


def chinese_words(folder: Path) -> str:
    table(folder, "资料/说明.csv", birds())
    shutil.move(folder / "img", folder / "资料" / "img")
    return "mmft prepare data=table data.path=资料/说明.csv data.prompt=这是什么？"


def twenty_rows_with_a_chinese_prompt(ran: Ran) -> None:
    assert len(ran.samples()) == 20
    assert {text(s, "user") for s in ran.samples()} <= {"这是什么？", "描述这张图片。"}


def brackets_and_equals(folder: Path) -> str:
    table(folder, "captions (2).csv", birds())
    return "mmft prepare data=table 'data.path=captions (2).csv' data.name=a=b"


def missing_picture(folder: Path) -> str:
    table(folder, "t.csv", birds())
    (folder / "spare").mkdir()
    shutil.move(folder / "img" / "7.png", folder / "spare" / "7.png")
    command = "mmft prepare data=table data.path=t.csv data.max_bad_share=0.1"
    return f"{command}; cp spare/7.png img/7.png; {command}"


def it_comes_back(ran: Ran) -> None:
    assert len(ran.samples()) == 20 and "img/7.png was missing and is there now" in ran.err


def placeholder_in_prompt(folder: Path) -> str:
    table(folder, "t.csv", birds())
    return "mmft prepare data=table data.path=t.csv 'data.prompt=\"<image>Describe.\"'"


def the_prompt_holds_the_image(ran: Ran) -> None:
    for sample in ran.samples():
        assert [p["type"] for p in content(sample, "user")] == ["image", "text"] and text(sample, "user") == "Describe."


def base64_cells(folder: Path) -> str:
    lines = ["image\ttext", *(f"{base64.b64encode(png(n)).decode()}\tx {n}" for n in range(10))]
    (folder / "t.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "mmft prepare data=table data.path=t.tsv"


def ten_images(ran: Ran) -> None:
    samples = ran.samples()
    assert {text(s) for s in samples} == {f"x {n}" for n in range(10)}
    assert all(image.size == (40, 40) for s in samples for image in s.load_images())


def colon_in_name(folder: Path) -> str:
    names = [f"cam2:2025-02-0{n}T11:21:31.png" for n in range(1, 5)]
    images(folder, names)
    (folder / "t.csv").write_text("\n".join(["image,text", *(f"{n},x {i}" for i, n in enumerate(names, 1))]) + "\n", encoding="utf-8")
    return "mmft prepare data=table data.path=t.csv data.splits.validation=1"


def four_files(ran: Ran) -> None:
    assert {text(s) for s in ran.samples()} == {f"x {n}" for n in range(1, 5)}


def one_long_row(folder: Path) -> str:
    texts = birds(40)
    for n in (30, 35):
        texts[n] = " ".join(["word"] * 400)
    table(folder, "t.csv", texts)
    return shlex.join(["mmft", "data=table", "data.path=t.csv", "collator.max_length=256", "vision_cache=off", "trainer.num_train_epochs=1",
                       "trainer.per_device_train_batch_size=4", "data.splits.validation=4", "evaluation.base=false"])  # fmt: skip


def both_long_rows_are_named(ran: Ran) -> None:
    ran.refused("collator.max_length=256", "data.too_long=drop")
    assert len(re.findall(r"\(\d+ tokens\)", ran.err)) == 2 and not list((ran.folder / "outputs").glob("*/DONE"))


def cut_answers(folder: Path) -> str:
    table(folder, "t.csv", [f"the bird {n} stands in green grass " * 12 for n in range(20)])
    return shlex.join(["mmft", "data=table", "data.path=t.csv", "generation.max_new_tokens=8", "generation.min_new_tokens=8", *TRAIN])


def cut_answers_are_counted(ran: Ran) -> None:
    """If an answer or a reference does not fit, log, summary and report say so. Without a limit in the command, it is that of the references."""
    summary = json.loads((ran.run() / "summary.json").read_text(encoding="utf-8"))
    report = " ".join((ran.run() / "report.md").read_text(encoding="utf-8").split())
    base, tuned = (summary[key]["truncated"] for key in ("base_answer_counts", "answer_counts"))
    fits = summary["max_new_tokens"] > summary["longest_reference"]
    assert summary["answer_counts"]["rows"] == 4 and summary["longest_reference"] > 60
    if "generation.max_new_tokens" in ran.command:
        assert tuned == 4 and not fits
    for text in (ran.out, report):
        assert (f"(generation.max_new_tokens): base {base}, tuned {tuned}." in text) == (base + tuned > 0), text
        assert ("Answers cut off" in text) == (base + tuned > 0) and ("more than generation.max_new_tokens" in text) == (not fits), text


def group_by_length(folder: Path) -> str:
    table(folder, "t.csv", [f"a bird {n}" + " and a tree" * (n % 5) for n in range(20)])
    return shlex.join(["mmft", "data=table", "data.path=t.csv", "trainer.train_sampling_strategy=group_by_length", *TRAIN])


def two_steps_are_trained(ran: Ran) -> None:
    steps = [json.loads(line) for line in (ran.run() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(row.get("step", 0) for row in steps) == 2


def best_metric_not_measured(folder: Path) -> str:
    table(folder, "t.csv", birds())
    return shlex.join(["mmft", "data=table", "data.path=t.csv", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_strategy=steps",
                       "trainer.save_steps=1", "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=cider", *TRAIN])  # fmt: skip


def the_key_that_measures_it_is_named(ran: Ran) -> None:
    ran.refused("trainer.metric_for_best_model=cider", "evaluation.generate=true")


def neftune(folder: Path) -> str:
    table(folder, "t.csv", birds())
    return shlex.join(["mmft", "data=table", "data.path=t.csv", "trainer.neftune_noise_alpha=20", *TRAIN])


def noise_changes_the_adapter(ran: Ran) -> None:
    noisy = (ran.run() / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(ran.folder / "outputs")
    again = execute(ran.folder, ran.command.replace("trainer.neftune_noise_alpha=20", ""), ran.mmft)
    assert again.run() and noisy != (again.run() / "adapter" / "adapter_model.safetensors").read_bytes()


CASES: dict[str, tuple[Callable[[Path], str], Callable[[Ran], None]]] = {
    "01-images-without-placeholder": (rows_without_placeholder, images_go_before_the_first_user_turn),
    "02-open-quote": (open_quote, line_11_is_named),
    "03-open-quote-at-end": (open_quote_at_end, line_6_is_named),
    "04-python-list-in-cell": (python_list_in_cell, the_list_is_a_text_and_references),
    "05-captions-txt-five-per-image": (captions_txt, five_references_each),
    "06-array-in-jsonl": (array_in_jsonl, twenty_rows),
    "07-rows-under-a-key": (rows_under_a_key, twenty_rows_and_the_key_is_said),
    "08-answer-is-an-object": (answer_is_an_object, the_answer_is_json),
    "09-chinese-words": (chinese_words, twenty_rows_with_a_chinese_prompt),
    "10-brackets-and-equals": (brackets_and_equals, twenty_rows),
    "11-missing-picture-comes-back": (missing_picture, it_comes_back),
    "12-placeholder-in-prompt": (placeholder_in_prompt, the_prompt_holds_the_image),
    "13-base64-cells": (base64_cells, ten_images),
    "14-colon-in-name": (colon_in_name, four_files),
    "15-one-long-row": (one_long_row, both_long_rows_are_named),
    "16-cut-answers": (cut_answers, cut_answers_are_counted),
    "17-group-by-length": (group_by_length, two_steps_are_trained),
    "18-best-metric-not-measured": (best_metric_not_measured, the_key_that_measures_it_is_named),
    "19-neftune": (neftune, noise_changes_the_adapter),
}
TRAINED = ("16-cut-answers", "17-group-by-length", "19-neftune")


def execute(folder: Path, command: str, mmft: Callable[..., tuple[int, str, str]]) -> Ran:
    """Run a line of commands separated by `;` in `folder`. `cp` is the only other program."""
    ran = Ran(folder, command, mmft)
    for part in command.split("; "):
        program, *words = shlex.split(part)
        if program == "cp":
            shutil.copy(folder / words[0], folder / words[1])
            continue
        assert program == "mmft"
        more = () if words[0] == "prepare" else ("logger=none", "evaluation.samples=0")
        ran.outcomes.append(mmft(*words, *more, f"output_dir={(folder / 'outputs').as_posix()}", output_dir=False))
    return ran


@pytest.mark.parametrize("case", CASES)
def test_case(case, mmft, tmp_path, monkeypatch):
    make, check = CASES[case]
    monkeypatch.chdir(tmp_path)
    check(execute(tmp_path, make(tmp_path), mmft))


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case in TRAINED else ()) for case in CASES])
def test_handed_case(case, mmft, tmp_path, monkeypatch):
    if not (HANDED / case).is_dir():
        pytest.skip("the handed cases (../shared/cases) are not beside the project")
    shutil.copytree(HANDED / case, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    command = (HANDED / case / "command").read_text(encoding="utf-8").strip()
    CASES[case][1](execute(tmp_path / "case", command, mmft))
