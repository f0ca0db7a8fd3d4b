"""Compare the estimate of memory and time by `mmft audit` with a measured training.

    python benchmarks/estimate.py [key=value ...]        a model and data as for mmft; without words: three commands that run anywhere
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mmft.models.load import build_collator, load_model, load_skeleton, locate_model


def compare(words: list[str], steps: int = 6) -> dict[str, Any]:
    """Estimate, then train `steps` steps through the Trainer: bytes and seconds of a step, both ways.

    Measured memory is the highest sum of weights, gradients, optimizer state and activations over the last steps, read from the GPU's
    allocator or by tracking every storage; tracking is slow, so time is measured in separate steps.
    """
    import torch

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.freeze import freeze
    from mmft.adapters.plan import plan_adapter
    from mmft.audit.allocation_tracker import track_allocations
    from mmft.audit.counts import count_tokens
    from mmft.audit.estimate import estimate
    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.config.plain import to_plain
    from mmft.data.prepare import prepared_data
    from mmft.models.device import mixed_precision
    from mmft.rewrites.apply import rewrite_for_training
    from mmft.training.arguments import training_settings
    from mmft.training.trainer import SupervisedTrainer

    cfg = compose([*words, "logger=none"])
    settings = to_plain(cfg)
    family = build(cfg.model, "model")
    rows = prepared_data(cfg).split("train")
    located = locate_model(family)
    plan = plan_adapter(load_skeleton(family, located), settings["lora"])
    loaded = load_model(family, full_training=plan.method == "full", located=located)
    model = loaded.model
    collator = build_collator(cfg.collator, family, loaded)
    model = attach_adapter(model, plan)
    rewrites = rewrite_for_training(model, family.rewrites, 1)
    freeze(model)
    trainer = settings["trainer"]
    if trainer.get("activation_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.get("activation_checkpointing_kwargs"))
    guess = estimate(model, collator, rows, count_tokens(collator, rows, 200), trainer)

    def train(n: int) -> list[float]:
        own = {**mixed_precision(loaded.dtype, loaded.device, plan.method == "full"), **trainer, "max_steps": n, "learning_rate": 0.0, "save_strategy": "no", "logging_strategy": "no"}
        with tempfile.TemporaryDirectory() as folder:
            args, _ = training_settings(
                own, output_dir=folder, seed=1, data_seed=1, report_to=[], remove_unused_columns=False, label_names=["labels"],
                use_cpu=loaded.device == "cpu", disable_tqdm=True,
            )  # fmt: skip
            times = Times()
            SupervisedTrainer(
                model=model, args=args, rows=rows, held_out=None, collator=collator, processor=loaded.processor, callbacks=[times], rewrites=rewrites
            ).train()
        model.zero_grad(set_to_none=True)
        return [b - a for a, b in itertools.pairwise(times.ends)]

    from transformers import TrainerCallback

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if loaded.device.startswith("cuda"):
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    weights = guess.weights
    train(2)
    seconds = sorted(train(steps))[(steps - 1) // 2]  # from the end of one step to the end of the next, loading included
    if loaded.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        train(steps)
        memory = float(torch.cuda.max_memory_allocated())
    else:
        with track_allocations() as tracker:
            train(steps)
        memory = weights + tracker.peak
    return {
        "words": " ".join(words), "device": loaded.device, "memory_estimated": guess.memory, "memory_measured": memory,
        "seconds_estimated": guess.seconds, "seconds_measured": seconds,
    }  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    folder = tempfile.mkdtemp()
    cases = [words] if words else [["data.pictures=400"], ["data.pictures=400", "lora=none"], ["data.pictures=400", "trainer.per_device_train_batch_size=32"]]
    print("| command | memory, estimated | measured | ratio | step, estimated | measured | ratio |\n|---|---|---|---|---|---|---|")
    for case in cases:
        f = compare([*case, f"output_dir={Path(folder).as_posix()}"], steps=8)
        print(
            f"| {' '.join(case)} ({f['device']}) | {f['memory_estimated'] / 1e6:.1f} MB | {f['memory_measured'] / 1e6:.1f} MB | {f['memory_estimated'] / f['memory_measured']:.2f}"
            f" | {f['seconds_estimated']:.3f} s | {f['seconds_measured']:.3f} s | {f['seconds_estimated'] / f['seconds_measured']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
