"""Write docs/conformance.md: the conformance checks on the small random model of every kind.

    python tests/conformance_table.py

Run it after a change of transformers or of a check.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_models import KINDS, MORE, Small

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"
HEAD = """\
# Model families: what is checked

Each row is a random model of a few thousand weights, with the family's own config, processor and image processor, a tokenizer that is
trained on a few sentences, and a chat template that is written for the tests. `mmft doctor model=NAME model.path=PATH` makes the same
checks on any checkpoint, with its real weights. For every check the tests have a deliberately broken family that fails it.

| check | what must hold |
|---|---|
"""


def main() -> None:
    import transformers

    from mmft.conformance.checks import CHECKS, run_checks
    from mmft.conformance.subject import Subject
    from mmft.conformance.table import TableRow, markdown

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = Small(Path(folder))
        for kind in [*KINDS, *MORE]:
            model, collator, family = small.load(kind)
            rows.append(TableRow(kind, type(model).__name__, run_checks(Subject.create(model, collator, family, Path(folder) / "images"))))
            print(kind, "ok" if rows[-1].passed else [(r.name, r.detail) for r in rows[-1].results if r.passed is False], flush=True)
    checks = "".join(f"| {name} | {' '.join(str(check.__doc__).split())} |\n" for name, check in CHECKS.items())
    PAGE.write_text(f"{HEAD}{checks}\n## Results\n\n{markdown(rows, transformers.__version__)}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
