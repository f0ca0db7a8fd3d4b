"""Answer the rows of task.json: by transformers' `generate` in batches of one size in file order, or by mmft.

    python generate_answers.py TASK.json

Writes result.json: seconds of wall time and of processor time from the loaded model to the last answer, and the answers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def by_transformers(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(task["model"])
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    folder = Path(task["rows"]).parent
    answers: list[str] = []
    watch = Watch()
    for start in range(0, len(rows), task["batch"]):
        part = rows[start : start + task["batch"]]
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}] for row in part]
        texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        images = [[Image.open(folder / row["image"]).convert("RGB")] for row in part]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=task["max_new_tokens"])
        answers += [t.strip() for t in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
    return {**watch.read(), "answers": answers}


def by_mmft(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """What `mmft predict` does between loading the model and writing the file. features: computed before the watch starts."""
    from mmft.config.compose import compose
    from mmft.evaluation.answer import answer_prompts, prompts_of
    from mmft.runs.open import open_any

    cfg = compose(task["words"])
    opened = open_any(None, cfg, [])
    asked = prompts_of(task["rows"], None, False, None, cfg)
    evaluator = opened.evaluator([])
    watch = Watch()
    answers = [str(record["prediction"]) for record in answer_prompts(evaluator, opened.model, asked, 0)]
    return {**watch.read(), "answers": answers}


class Watch:
    """Wall time and processor time of this process since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.began[0], "cpu": time.process_time() - self.began[1]}


def main() -> None:
    path = Path(sys.argv[1])
    task = json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    result = (by_mmft if "words" in task else by_transformers)(task, rows)
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
