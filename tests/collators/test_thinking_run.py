"""A thinking model from rows to metrics through the command line: rows of several sequences, sizes of images, answers without loss."""

from __future__ import annotations

import json
import shutil

import pytest
from chat_models import TEMPLATES


@pytest.fixture(scope="module")
def words(small, tmp_path_factory):
    """The small Qwen2-VL with a template that opens a think block, and twelve rows; every other one has two answers."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("thinking")
    shutil.copytree(small("qwen2vl"), folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATES["open"], encoding="utf-8")
    rows = []
    for n in range(12):
        Image.new("RGB", (56, 28 * (n % 3 + 1)), (20 * n, 0, 0)).save(folder / f"{n}.png")  # rows that share an image are not split
        image = {"type": "image", "image": f"{n}.png"} | ({"max_pixels": 1600} if n % 4 == 0 else {})
        row = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "red", "reasoning_content": "it looks red"}]
        if n % 2:
            row += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nblue"}]
        if n == 3:
            row[1]["loss"] = False
        rows.append({"messages": row})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [
        "model=qwen2vl", f"model.path={(folder / 'model').as_posix()}", "data=messages", f"data.path={(folder / 'rows.jsonl').as_posix()}",
        "data.splits={validation: 3, by: last}", "logger=none", "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=3",
        "trainer.learning_rate=0.01", "evaluation.base=false",
    ]  # fmt: skip


def test_training_counts_every_answer_once_with_and_without_the_feature_cache(words, mmft, tmp_path):
    adapters = []
    for cache in ("off", "memory"):
        run = tmp_path / cache
        code, out, err = mmft(*words, f"vision_cache={cache}", f"run_dir={run.as_posix()}")
        assert code == 0, err[-2000:]
        summary = json.loads((run / "summary.json").read_text())
        adapters.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
        records = [json.loads(line) for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [r["references"] for r in records] == [["blue"], ["red"], ["blue"]], "without their reasoning"
    assert adapters[0] == adapters[1]
    # the small vocabulary's ids of what the model writes, by the tokenizer alone
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words[1].partition("=")[2])
    red, blue = (len(tokenizer(text)["input_ids"]) for text in ("it looks red\n</think>\n\nred<|im_end|>", "well\n</think>\n\nblue<|im_end|>"))
    assert summary["supervised_tokens"] == 8 * red + 4 * blue  # rows 0 to 8; row 3's first answer carries no loss


def test_an_audit_shows_each_sequence(words, mmft):
    code, out, err = mmft("audit", *words, "rows=2")
    assert code == 0, err[-2000:]
    assert "[[it looks red" in out and "[[well" in out and "red<|im_end|>]]" in out and "blue<|im_end|>]]" in out
    assert "Tokens of 9 of 9 rows (12 sequences)" in out
