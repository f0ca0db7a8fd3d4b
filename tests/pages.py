"""The commands and files that docs/ and the READMEs show, as tests need them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

# In the order a reader meets them: later pages use what the tutorial made.
ORDER = ("tutorial", "howto/train", "howto/prepare", "howto/audit", "howto/evaluate", "howto/predict", "howto/compare", "howto/merge")


@dataclass(frozen=True)
class Shown:
    """One command of a page: its words without `mmft`, and where it stands."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: mmft {shlex.join(self.words)}"


def pages() -> list[Path]:
    """docs/*.md and docs/howto/*.md, the tutorial first, then the READMEs; what the build generates is left out."""
    found = [p for p in (ROOT / "docs").rglob("*.md") if p.relative_to(ROOT / "docs").parts[0] != "reference"]

    def rank(path: Path) -> tuple[int, str]:
        name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)

    return [*sorted(found, key=rank), ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md"]


def words_of(line: str) -> tuple[str, ...] | None:
    """The words behind `mmft`, `python -m mmft` or a launcher's `-m mmft` in a line; None where it is another command."""
    found = re.match(r"\s*(?:mmft\b(?!\.)|(?:python|torchrun|accelerate launch)\b.*?-m mmft\b)(.*)", line.split(" && ")[-1])
    return tuple(shlex.split(found[1], comments=True)) if found else None


def commands() -> list[Shown]:
    """Every command in a bash block, and every inline `mmft ...` that is whole."""
    found: dict[Shown, None] = {}
    for path in pages():
        if not path.is_file():
            continue
        text, page = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if (words := words_of(line)) is not None:
                    found[Shown(page, words)] = None
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        for line in re.findall(r"`((?:mmft|python -m mmft) [^`]+)`", prose):
            if not re.search(r"\.\.\.|VERB|key=value|^mmft -m$", line):
                found[Shown(page, words_of(" ".join(line.split())) or ())] = None
    return list(found)


def saved_files() -> dict[str, str]:
    """path -> text of every block that a page tells its reader to save: "... Save as `PATH`:" above it."""
    found = {}
    for path in pages():
        if path.is_file():
            for name, text in re.findall(r"Save as\s+`([^`]+)`:\n\n```\w+\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M):
                found[name] = text
    return found


def key_cells() -> list[str]:
    """What the column `mmft` of docs/coming-from.md says, one inline code each."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    script = next(i for i, row in enumerate(rows) if row[0] == "| in the script")
    ours = [row[1] for row in rows[:script]] + [row[1] for row in rows[script:]]
    return [code for cell in ours for code in re.findall(r"`([^`]+)`", cell) if "=" in code]
