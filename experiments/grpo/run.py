"""The commands of this study, one after another in one process: python run.py OUTPUT_DIR"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # command.py

from command import run

VARIANTS = {
    "dapo": [], "grpo": ["objective.loss_type=grpo"], "dr_grpo": ["objective.loss_type=dr_grpo", "objective.scale_rewards=none"],
    "gspo": ["objective.loss_type=grpo", "objective.importance_sampling_level=sequence", "objective.num_iterations=2"], "kl": ["objective.beta=0.1"],
}  # fmt: skip


def main() -> None:
    out = sys.argv[1]
    data = ["data=table", f"data.path={out}/pictures/rows.jsonl", "data.columns.prompt=question", "data.splits.validation=80"]
    measure = ["metrics=[exact_match]", "evaluation.samples=4", "logger=none"]
    run([*data, "data.columns.text=said", *measure, "trainer.max_steps=60", "trainer.per_device_train_batch_size=8", f"run_dir={out}/start"], out)
    run(["evaluate", f"run={out}/start", *data, "data.columns.text=right", *measure[:1]], out)
    later = [*data, "data.columns.text=right", *measure, f"lora.start={out}/start", "evaluation.base=false", "trainer.max_steps=40", "trainer.learning_rate=3e-4", "trainer.logging_steps=4"]
    steps = ["objective=grpo", "trainer.per_device_train_batch_size=32", "trainer.eval_strategy=steps", "trainer.eval_steps=10", "evaluation.generate=true"]
    for name, words in VARIANTS.items():
        for seed in (1, 2) if name == "dapo" else (1,):
            run([*later, *steps, *words, f"seed={seed}", f"run_dir={out}/{name}-{seed}"], out)
    run([*later, "trainer.per_device_train_batch_size=4", "trainer.eval_strategy=steps", "trainer.eval_steps=10", "evaluation.generate=true", "seed=1", f"run_dir={out}/sft-1"], out)


if __name__ == "__main__":
    main()
