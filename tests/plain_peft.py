"""The loss of a run's held-out rows by transformers and peft alone, on the base model that its adapter names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def held_out_losses(run: Path, words: list[str], rows: int, quantization: Any = None) -> tuple[float, float]:
    """(base, tuned): mean loss over the answer tokens of the first validation rows. words: those of the run's data. quantization: a config of transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmft.collators.chat import ChatCollator
    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data

    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    given = {} if quantization is None else {"quantization_config": quantization}
    base = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32, **given)
    cfg = compose([w for w in words if w.startswith("data.")] + [f"output_dir={run.parent.as_posix()}"])
    held_out = prepared_data(cfg).split("validation")
    ends = [base.config.get_text_config().eos_token_id]
    collator = ChatCollator(processor=AutoProcessor.from_pretrained(run / "adapter"), family=build(cfg.model, "model"), model_config=base.config, end_token_ids=ends)
    batch = collator([held_out[i] for i in range(rows)])
    return loss(base, batch), loss(PeftModel.from_pretrained(base, run / "adapter"), batch)


def loss(model: Any, batch: dict[str, Any]) -> float:
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")}).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100))
