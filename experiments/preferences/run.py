"""The commands of this study, one after another in one process: python run.py OUTPUT_DIR"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # command.py

from command import run


def main() -> None:
    out = sys.argv[1]
    data = ["data=table", f"data.path={out}/pairs/rows.jsonl", "data.columns.prompt=question", "data.columns.choices=both", "data.splits.validation=80"]
    measure = ["evaluation.answer=choose", "metrics=[classes]", "evaluation.samples=4", "logger=none"]
    pairs = [*data, "data.columns.text=right", "data.columns.rejected=wrong", *measure, f"lora.start={out}/sft", "evaluation.base=false"]
    run([*data, "data.columns.text=said", *measure, "trainer.max_steps=60", "trainer.per_device_train_batch_size=8", f"run_dir={out}/sft"], out)
    run(["evaluate", f"run={out}/sft", *data, "data.columns.text=right", *measure[:2]], out)
    steps = ["trainer.max_steps=60", "trainer.per_device_train_batch_size=8", "trainer.learning_rate=3e-4", "trainer.eval_strategy=steps", "trainer.eval_steps=15"]
    run(["-m", *pairs, *steps, "objective=dpo", "objective.beta=0.05,0.1,0.5", "rank_by=class_accuracy", "name=betas"], out)
    run(["-m", *pairs, *steps, "objective=sft,ipo,simpo,orpo,kto,mpo", "rank_by=class_accuracy", "name=objectives"], out)


if __name__ == "__main__":
    main()
