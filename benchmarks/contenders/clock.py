"""Runs a contender and writes down the processor time of its loop: from its first training pass to its last optimizer step.

    python clock.py OUT.json -m mmft words ...          or          python clock.py OUT.json script.py task.json

On a machine that does other work, wall time says little. It looks at the same doors as watch.py, and adds nothing to a step but two readings of a clock.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from watch import CLASSES, run_contender


def main() -> None:
    out, *words = sys.argv[1:]
    import torch
    import transformers
    from peft import PeftModel
    from torch.optim.optimizer import register_optimizer_step_post_hook

    models = (PeftModel, *(getattr(transformers, name) for name in CLASSES))
    seen: dict[str, float] = {}
    plain_call, plain_backward = torch.nn.Module.__call__, torch.Tensor.backward

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        if "begun" not in seen and isinstance(self, models) and "input_ids" in inputs and torch.is_grad_enabled():
            seen["latest"] = time.process_time()  # counts once a backward pass follows
        return plain_call(self, *args, **inputs)

    def backward(self: Any, *args: Any, **keys: Any) -> Any:
        seen.setdefault("begun", seen.get("latest", 0.0))
        return plain_backward(self, *args, **keys)

    torch.nn.Module.__call__, torch.Tensor.backward = call, backward
    register_optimizer_step_post_hook(lambda *_: seen.__setitem__("ended", time.process_time()))
    run_contender(words)
    Path(out).write_text(json.dumps({"seconds": seen["ended"] - seen["begun"]}), encoding="utf-8")


if __name__ == "__main__":
    main()
