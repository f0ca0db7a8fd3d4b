"""Runs a contender and writes down what reached the model: the rows of every training batch, the first adapter, the losses.

    python watch.py OUT.json -m mmft words ...          or          python watch.py OUT.json script.py task.json

It looks at two doors, the call of the transformers model (some replace its `forward`) and that of PEFT's wrapper, which for a causal
language model goes on to `forward` past the first, and at `backward`. Where both are called, the inner counts. A contender cannot tell
the difference, and is never timed here. FLOPs are counted from the first training batch on.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLASSES = ("Qwen2VLForConditionalGeneration", "LlavaForConditionalGeneration", "Blip2ForConditionalGeneration")
IGNORE = -100


def short(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def adapter_hash(model: Any) -> str:
    """Of every adapter matrix by its plain name; equal for two models whose adapters are equal to the last bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted((n.replace("base_model.model.", ""), p) for n, p in model.named_parameters() if "lora_" in n):
        digest.update(name.encode() + parameter.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def described(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row of a batch without its padding: a hash of its ids, one of what carries loss, its grid, and how much carries loss.

    A supervised position is read from `labels`, or from the mask of the logits that are kept. Rows that are packed into one sequence are
    told apart by their positions.
    """
    given = inputs.get("attention_mask")
    if (given is None or given.dim() == 4) and inputs.get("position_ids") is not None:
        inputs = unpacked(inputs)
    ids, mask, labels, keep = inputs["input_ids"], inputs["attention_mask"], inputs.get("labels"), inputs.get("logits_to_keep")
    if labels is not None and labels.shape != ids.shape:
        labels = whole(labels, keep, ids)
    grids, kinds, rows = inputs.get("image_grid_thw"), inputs.get("mm_token_type_ids"), []
    waiting = grids.tolist() if grids is not None else []
    for n in range(ids.shape[0]):
        real = mask[n].bool()
        if labels is not None:
            target = [(p, int(v)) for p, v in enumerate(labels[n][real].tolist()) if v != IGNORE and p > 0]
        else:
            row = ids[n].tolist()
            offset = int(real.int().argmax())  # rows that are padded on the left begin later
            target = [(p + 1 - offset, row[p + 1]) for p, kept in enumerate(keep[n].tolist()) if kept]
        row = ids[n][real].tolist()
        grid, places = None, int((kinds[n][real] == 1).sum()) if grids is not None else 0
        while places > 0:  # 2 x 2 patches are one feature
            own = waiting.pop(0)
            grid, places = [*(grid or []), own], places - own[0] * own[1] * own[2] // 4
        rows.append({"ids": short(row), "labels": short(target), "grid": grid, "tokens": len(row), "supervised": len(target)})
    return rows


def unpacked(inputs: dict[str, Any]) -> dict[str, Any]:
    """Packed rows as a padded batch: a row begins where the positions in its text begin with 0."""
    import torch

    positions = inputs["position_ids"]
    text = positions[0, 0] if positions.dim() == 3 else positions[0]
    starts = (text == 0).nonzero().squeeze(1).tolist()
    sizes = [b - a for a, b in zip(starts, [*starts[1:], len(text)])]

    def padded(values: Any, fill: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence(list(values[0].split(sizes)), True, fill)

    fills = {"input_ids": 0, "labels": IGNORE, "logits_to_keep": 0, "mm_token_type_ids": 0}
    given = {key: padded(inputs[key], fill) for key, fill in fills.items() if isinstance(inputs.get(key), torch.Tensor)}
    return {**inputs, **given, "attention_mask": padded(torch.ones_like(inputs["input_ids"]), 0)}


def whole(labels: Any, keep: Any, ids: Any) -> Any:
    """Labels at every position, where a loop passes only those of the logits it keeps: the last ones, or for a single row a mask of them."""
    full = ids.new_full(ids.shape, IGNORE)
    if isinstance(keep, int):
        full[:, -keep:] = labels
    else:
        full[0, keep.nonzero()[:-1, 0] + 1] = labels[0, 1:]  # the logit at a position is for the label behind it
    return full


@contextmanager
def recording() -> Iterator[dict[str, Any]]:
    """What reaches a model within the block: `adapter` (its hash at the first training batch), `steps` (rows and loss of each optimizer
    step), `shapes` of the batches, how many came as `pixels` and as `features`, and the `flops` from the first batch on."""
    import torch
    import transformers
    from peft import PeftModel
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    models = (PeftModel, *(getattr(transformers, name) for name in CLASSES))
    seen: dict[str, Any] = {"adapter": None, "steps": [], "shapes": [], "features": 0, "pixels": 0, "text": 0}
    batch: list[dict[str, Any]] = []  # of the latest forward pass; it counts once a backward pass follows
    given: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    plain_call, plain_backward = torch.nn.Module.__call__, torch.Tensor.backward

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        if isinstance(self, models) and torch.is_grad_enabled() and "input_ids" in inputs:
            if seen["adapter"] is None:
                seen["adapter"] = adapter_hash(self)
                counter.__enter__()
            if not seen["shapes"]:
                counter.flop_counts.clear()  # passes that only try how much memory one takes lie before the first backward
            batch[:] = described(inputs)
            given.update(shape=list(inputs["input_ids"].shape), kind="features" if inputs.get("mm_encoder_outputs") else "pixels" if inputs.get("pixel_values") is not None else "text")
        return plain_call(self, *args, **inputs)

    def backward(self: Any, *args: Any, **keys: Any) -> Any:
        losses.append(self.item())
        if batch:
            rows.extend(batch)
            batch.clear()
            seen["shapes"].append(given["shape"])
            seen[given["kind"]] += 1
        return plain_backward(self, *args, **keys)

    def stepped(*_: Any) -> None:
        seen["steps"].append({"loss": sum(losses), "rows": list(rows)})
        rows.clear()
        losses.clear()

    torch.nn.Module.__call__, torch.Tensor.backward = call, backward
    hook = register_optimizer_step_pre_hook(stepped)
    try:
        yield seen
    finally:
        torch.nn.Module.__call__, torch.Tensor.backward = plain_call, plain_backward
        hook.remove()
        if seen["adapter"] is not None:
            counter.__exit__(None, None, None)
        seen["flops"] = counter.get_total_flops()


def run_contender(words: list[str]) -> None:
    """Run `-m module words` or `script words` in this process."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, "")
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def main() -> None:
    out, *words = sys.argv[1:]
    with recording() as seen:
        run_contender(words)
    Path(out).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
