"""The commands of this study, one after another in one process: python run.py OUTPUT_DIR"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # command.py

from command import run

CLASSES = "[circle,square,triangle,star,diamond,cross,heart,ring]"


def main() -> None:
    out = sys.argv[1]
    data = ["data=classfolder", f"data.path={out}/shapes", "data.prompt=Name the shapes.", f"data.choices={CLASSES}", "data.splits.validation=160"]
    choose, write = ["evaluation.answer=choose", "metrics=[classes,calibration]"], ["evaluation.answer=generate", "metrics=[classes]"]
    for steps in (8, 40):
        run([*data, *choose, f"trainer.max_steps={steps}", "evaluation.base=false", "logger=none", f"run_dir={out}/steps-{steps}"], out)
    for norm in ("none", "token", "character", "prior"):
        run(["evaluate", f"run={out}/steps-40", *choose, f"evaluation.choice_norm={norm}", "base=true"], out)
    run(["evaluate", f"run={out}/steps-40", *write, "base=true"], out)
    for how in (choose, write):
        run(["evaluate", f"run={out}/steps-8", *how], out)


if __name__ == "__main__":
    main()
