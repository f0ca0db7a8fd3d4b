"""Does the adapter look? Exact match with each held-out row's own picture, and with the next row's.

    python experiments/tiny_base/control.py outputs/tiny_shapes_1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BATCH = 64


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmft.data.images import open_image

    run = Path(sys.argv[1])
    rows = [json.loads(line) for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = [open_image(Path(row["root"], row["images"][0])) for row in rows]
    processor = AutoProcessor.from_pretrained(run / "adapter")
    processor.tokenizer.padding_side = "left"
    base = Path(__file__).parents[2] / "mmft" / "assets" / "tiny"
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), run / "adapter")
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for row in rows
    ]
    for name, shown in (("its own picture", pictures), ("the next row's picture", pictures[1:] + pictures[:1])):
        right: dict[str, list[bool]] = {}
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            batch = processor(text=texts[part], images=shown[part], padding=True, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=64)
            said = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows[part], said, strict=True):
                right.setdefault(row["prompt"], []).append(text.strip() == row["references"][0])
        every = [hit for hits in right.values() for hit in hits]
        print(f"{name}: {sum(every) / len(every):.3f} of {len(every)};", ", ".join(f"{q} {sum(h)}/{len(h)}" for q, h in right.items()))


if __name__ == "__main__":
    main()
