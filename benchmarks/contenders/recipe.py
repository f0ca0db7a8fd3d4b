"""What the scripts beside this one share: the task they are given, the usual collation with a processor, and what they write.

Nothing here comes from mmft: this is the tutorial's code that a user would otherwise write, and it runs in a peer's environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

IGNORE = -100


def task() -> SimpleNamespace:
    """The fields of the task.json named on the command line; benchmarks/commands.py writes it."""
    return SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def write_result(task: SimpleNamespace, **values: Any) -> None:
    Path(task.out, "result.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def trained(trainer: Any) -> dict[str, Any]:
    """`trainer.train()` to its end: seconds of the loop and the loss of each step, as `write_result` takes them."""
    started = time.perf_counter()
    trainer.train()
    loop = time.perf_counter() - started
    return {"loop": loop, "cache": 0.0, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def rows(task: SimpleNamespace) -> list[dict[str, Any]]:
    """The rows {image, text} in the order of the file, images as paths; of the skewed rows {image: [paths], prompt, text}.

    Where rows are drawn: those of all epochs, in the order in which they are trained.
    """
    file = Path(task.rows)
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if task.drawn is not None:
        found = [found[i] for i in task.drawn]
    return [
        {**row, "image": [str(file.parent / i) for i in row["image"]] if isinstance(row["image"], list) else str(file.parent / row["image"])}
        for row in found
    ]


def pictures(row: dict[str, Any]) -> list[str]:
    """The paths of a row's images."""
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def processor(task: SimpleNamespace) -> Any:
    from transformers import AutoProcessor

    loaded = AutoProcessor.from_pretrained(task.model)
    loaded.tokenizer.padding_side = "right"
    return loaded


def lora_config(task: SimpleNamespace) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=task.r, lora_alpha=task.alpha, lora_dropout=0.0, target_modules=targets(task), bias="none")


def targets(task: SimpleNamespace) -> str:
    """The named layers of the language model alone; LLaVA's tower has a q_proj, too, and BLIP-2's has fc1 and fc2."""
    return rf".*language_model.*\.({'|'.join(task.targets)})"


class Collate:
    """Rows -> the processor's tensors and labels: loss on the answer and its end token only, one text padded to the longest."""

    def __init__(self, task: SimpleNamespace, processor: Any):
        self.processor, self.prompt, self.family = processor, task.prompt, task.family
        self.end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>") if self.family != "blip2" else None
        self.opening = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        images = [[Image.open(path).convert("RGB") for path in pictures(row)] for row in rows]
        texts = [self.text(row) for row in rows]
        flat = [image for own in images for image in own]
        given = flat or None if self.family == "blip2" or len(flat) != len(rows) else [[i] for i in flat]
        batch = dict(self.processor(text=texts, images=given, padding=True, return_tensors="pt"))
        batch["labels"] = self.labels(batch)
        return batch

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        user = {"role": "user", "content": [*({"type": "image"} for _ in pictures(row)), {"type": "text", "text": row.get("prompt", self.prompt)}]}
        return [user, {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]}]

    def text(self, row: dict[str, Any]) -> str:
        if self.family == "blip2":
            return row["text"] + "\n"  # BLIP-2's OPT ends a caption with a newline
        return self.processor.apply_chat_template(self.messages(row), tokenize=False)

    def labels(self, batch: dict[str, Any]) -> Any:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.clone()
        for n in range(ids.shape[0]):
            row = ids[n].tolist()
            if self.family == "blip2":
                first, last = self.processor.num_query_tokens + 1, int(mask[n].sum())  # behind the placeholders and BOS
            else:
                width = len(self.opening)
                first = next(i for i in range(len(row) - width, -1, -1) if row[i : i + width] == self.opening) + width
                last = row.index(self.end, first) + 1
            labels[n, :first] = IGNORE
            labels[n, last:] = IGNORE
        return labels


def order(task: SimpleNamespace, epoch: int, n: int) -> list[int]:
    """The order in which the stock Trainer (accelerate's seedable sampler) takes rows in an epoch."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(task.seed + epoch)).tolist()
