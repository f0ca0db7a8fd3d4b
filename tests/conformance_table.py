"""Write docs/conformance.md: the conformance checks on a small random model of every model type that transformers lists.

    python tests/conformance_table.py                    # all types; writes the page and the count in README.md
    python tests/conformance_table.py --only glm4v llava # prints these types and what their checks saw
    python tests/conformance_table.py --update glm4v     # writes the rows of these types anew, and of refused ones, and keeps all other rows

Run it after a change of transformers or of a check.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "conformance.md"
COUNT = re.compile(r"\d+ of \d+ types pass every check that applies")
HEAD = """\
# Model types: what is checked

Each row is a random model of some thousand weights, with the type's own config, processor and image processor, and a tokenizer that is trained on a
few sentences with the type's special tokens. `mmft doctor model=auto model.path=PATH` makes the same checks on any checkpoint, with its real weights.
For every check the tests have a deliberately broken family that fails it. Types in which a check fails, or that have no small model yet, are loaded
all the same; refused types are not.

| check | what must hold |
|---|---|
"""


def types() -> dict[str, str]:
    """model type -> class name, as the installed transformers maps them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return {kind: name if isinstance(name, str) else name[0] for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()}


def row(kind: str, model_class: str, folder: Path) -> Any:
    """The row of one type. A type that cannot be built or loaded fails its first check."""
    from model_types import TYPES, load

    from mmft.conformance.checks import CHECKS, CheckResult, run_checks
    from mmft.conformance.subject import Subject
    from mmft.conformance.table import TableRow
    from mmft.models.unsupported import UNSUPPORTED

    if kind in UNSUPPORTED:
        return TableRow(kind, model_class, refused=UNSUPPORTED[kind])
    if kind not in TYPES:
        return TableRow(kind, model_class)
    made = TYPES[kind]
    try:
        made.build(folder)
        model, collator, family = load(made, folder)
        results = run_checks(Subject.create(model, collator, family, folder / "images"))
    except Exception as error:
        results = [CheckResult(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") for name in [*CHECKS][:1]]
    return TableRow(kind, model_class, results, architecture=made.architecture, template=made.template)


def rows(wanted: Iterable[str]) -> list[Any]:
    """The rows of these types, each printed in a line as soon as it is known."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    known, made = types(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in wanted:
            made.append(row(kind, known[kind], Path(folder) / kind))
            wrong = [f"\n    {r.name}: {r.detail}" for r in made[-1].results if r.passed is False]
            print(kind, made[-1].refused or ("not built" if not made[-1].results else "ok" if not wrong else "".join(wrong)), flush=True)
    return made


def page(made: list[Any]) -> str:
    import transformers

    from mmft.conformance.checks import CHECKS
    from mmft.conformance.table import markdown

    checks = "".join(f"| {name} | {' '.join(str(check.__doc__).split())} |\n" for name, check in CHECKS.items())
    return f"{HEAD}{checks}\n## Results\n\n{markdown(made, transformers.__version__, 'types')}"


def updated(old: str, made: list[Any]) -> str:
    """The page `old` with these rows in place of its own; the count is made again."""
    new, names = page(made), {r.name for r in made}
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in new.split("## Results")[1].splitlines() if line.startswith("| ")}
    kept = [lines.get(line.split(" | ")[0].removeprefix("| "), line) if line.startswith("| ") else line for line in old.splitlines()]
    notes = [line for line in (*kept, *new.splitlines()) if line.startswith("- ")]
    fresh = {line for line in new.splitlines() if line.startswith("- ")}
    notes = sorted({line for line in notes if line in fresh or re.split(r"[:,]", line[2:])[0] not in names})
    text = "\n".join([*[line for line in kept if not line.startswith("- ")], *notes]).rstrip() + "\n"
    rows_ = [line for line in text.split("## Results")[1].splitlines() if line.startswith("| ")][2:]
    passing = sum("**no**" not in line and "| refused |" not in line and "| not built |" not in line for line in rows_)
    return COUNT.sub(f"{passing} of {len(rows_)} types pass every check that applies", text)


def write(text: str) -> None:
    """The page, and the count in README.md."""
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    readme, found = ROOT / "README.md", COUNT.search(text)
    assert found
    readme.write_text(COUNT.sub(found.group(), readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", metavar="TYPE", help="print these types; nothing is written")
    arguments.add_argument("--update", nargs="*", metavar="TYPE", help="rewrite the rows of these types and of refused types")
    words = arguments.parse_args()
    if words.only:
        for made in rows(words.only):
            print("\n".join([f"\n{made.name} ({made.architecture})", *(f"  {r.passed!s:5} {r.name:15} {r.detail}" for r in made.results)]))
    elif words.update is not None:
        from mmft.models.unsupported import UNSUPPORTED

        write(updated(PAGE.read_text(encoding="utf-8"), rows(dict.fromkeys([*words.update, *UNSUPPORTED]))))
    else:
        write(page(rows(types())))


if __name__ == "__main__":
    main()
