"""A table of evaluations (eval/*.json of the runs) in a README: python measure.py README.md RUN..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # table.py

from table import put

from mmft.evaluation.metrics.words import normalise


def main() -> None:
    norms = ("generate", "none", "token", "character", "prior")
    lines = ["| model | answers | class accuracy | macro-F1 | ECE | answers that are no class |", "|---|---|---|---|---|---|"]
    for run in map(Path, sys.argv[2:]):
        files = [(json.loads(p.read_text(encoding="utf-8")), p) for p in sorted((run / "eval").glob("classfolder_*.json"))]
        for side, title in (("base", "base"), ("", f"tuned, {json.loads((run / 'summary.json').read_text(encoding='utf-8'))['steps']} steps")):
            for found, path in sorted(files, key=lambda f: norms.index(f[0].get("choice_norm", "generate"))):
                if side and not found["base"]:
                    continue
                metrics = found["base_metrics" if side else "metrics"]
                answers = path.with_name(f"{path.stem}{'_base' if side else ''}.jsonl").read_text(encoding="utf-8").splitlines()
                classes = {normalise(r) for line in answers for r in json.loads(line)["references"]}
                other = sum(normalise(json.loads(line)["prediction"]) not in classes for line in answers)
                how = f"chosen, {found['choice_norm']}" if "choice_norm" in found else "generated"
                ece = f"{metrics['ece']:.3f}" if "ece" in metrics else "-"
                lines.append(f"| {title} | {how} | {metrics['class_accuracy']:.3f} | {metrics['macro_f1']:.3f} | {ece} | {other} of {len(answers)} |")
    put(Path(sys.argv[1]), "table", "\n".join(lines))


if __name__ == "__main__":
    main()
