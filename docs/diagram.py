"""Draw docs/_static/packages.svg from the code: the packages by their imports, and the path of a sample through them.

`python docs/diagram.py` writes the file. A package stands above all packages that it imports. The imports are read with `ast`; so are
the functions of the path, so a step whose function was renamed is an error here.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "_static" / "packages.svg"

# The path of a training row: what there is, and the function that makes it.
PATH = [
    ("config", "mmft/config/compose.py", "compose"),
    ("row of a source", "mmft/data/sources/base.py", "BaseSource.limited_rows"),
    ("prepared data on disk", "mmft/data/prepare.py", "prepared_data"),
    ("sample", "mmft/data/prepared.py", "Rows.__getitem__"),
    ("image", "mmft/data/images.py", "open_image"),
    ("token ids and labels", "mmft/collators/chat.py", "ChatCollator.encode"),
    ("batch", "mmft/collators/base.py", "Collator.assemble"),
    ("image features, kept", "mmft/feature_cache/cache.py", "CachedCollator.__call__"),
    ("logits and loss", "mmft/losses/supervised.py", "supervised_loss"),
    ("step", "mmft/training/trainer.py", "SupervisedTrainer.training_step"),
    ("checkpoint", "mmft/training/checkpoint_writer.py", "CheckpointWriter.publish"),
    ("adapter folder", "mmft/adapters/save.py", "save_trained"),
    ("answers and metrics", "mmft/evaluation/evaluate.py", "Evaluator.measure"),
    ("report.html", "mmft/reports/run_page.py", "write_report"),
    ("run, loaded again", "mmft/runs/open.py", "open_run"),
]

BOX, GAP, TOP, LEFT, CHARS = 200, 14, 64, 24, 31  # width of a box, space between boxes, margins, characters a line
COLUMNS = 3
PATH_LEFT = LEFT + COLUMNS * (BOX + GAP) + 40
WIDTH = PATH_LEFT + 270
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif"
MONO = "ui-monospace, Consolas, 'DejaVu Sans Mono', monospace"


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of mmft that a file imports, as parts of dotted names."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "mmft")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            if module[:1] == ("mmft",):
                yield from [module] if len(module) > 1 else [(*module, alias.name) for alias in node.names]


def packages() -> dict[str, str]:
    """name -> purpose of each package, from the first sentence of its docstring; folders without a docstring hold no code."""
    purposes = {}
    for init in sorted((ROOT / "mmft").glob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        if doc:
            sentence = re.split(r"[.;](?:\s|$)", doc.replace("\n", " ").replace("`", ""))[0]
            sentence = re.sub(rf"^{init.parent.name}: ", "", sentence, flags=re.IGNORECASE)
            short = sentence if len(sentence) <= 3 * CHARS else sentence.split(":")[0]
            purposes[init.parent.name] = short[0].upper() + short[1:]
    return purposes


def imports(names: list[str]) -> dict[str, set[str]]:
    """package -> the packages that its modules import."""
    edges: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        for file in (ROOT / "mmft" / name).rglob("*.py"):
            edges[name] |= {module[1] for module in imported(file) if module[1] in edges}
        edges[name].discard(name)
    return edges


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """package -> its height: one more than the highest package that it imports. Raises ValueError for a cycle."""
    heights: dict[str, int] = {}
    while len(heights) < len(edges):
        free = [n for n in edges if n not in heights and edges[n] <= heights.keys()]
        if not free:
            raise ValueError(f"packages import each other: {', '.join(sorted(edges.keys() - heights.keys()))}")
        heights |= {n: 1 + max((heights[m] for m in edges[n]), default=-1) for n in free}
    return heights


def direct(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others: a -> c is left out where a -> b -> c."""

    def reach(name: str) -> set[str]:
        return edges[name].union(*(reach(m) for m in edges[name]))

    return [(a, b) for a in edges for b in sorted(edges[a]) if not any(b in reach(m) for m in edges[a] - {b})]


def defined(file: Path, name: str) -> bool:
    """Whether a file defines a function, or a method as CLASS.METHOD."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part), None)
        if node is None:
            return False
        body = node.body
    return True


def drawing() -> str:
    """The picture as SVG. Raises ValueError if packages import each other or a function of the path does not exist."""
    for _, file, function in PATH:
        if not (ROOT / file).is_file() or not defined(ROOT / file, function):
            raise ValueError(f"docs/diagram.py: {file} has no {function}")
    purposes = packages()
    edges = imports(list(purposes))
    heights = levels(edges)
    texts = {name: textwrap.wrap(purpose, CHARS) for name, purpose in purposes.items()}
    steps: dict[str, list[int]] = {}
    for number, (_, file, _) in enumerate(PATH, 1):
        steps.setdefault(file.split("/")[1], []).append(number)

    places: dict[str, tuple[float, float, float]] = {}  # package -> x, y, height of its box
    y = TOP + 0.0
    for level in range(max(heights.values()), -1, -1):
        row = sorted(n for n in heights if heights[n] == level)
        tall = 34 + 13 * max(len(texts[n]) for n in row)
        x = LEFT + (COLUMNS * (BOX + GAP) - GAP - len(row) * (BOX + GAP) + GAP) / 2
        for i, name in enumerate(row):
            places[name] = (x + i * (BOX + GAP), y, tall)
        y += tall + 24
    height = y + 8

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" font-family="{FONT}">',
        "<title>The packages of mmft by their imports, and the path of a sample</title>",
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
        text(LEFT, 28, "Packages: each imports only from packages below it", 15, weight=600),
        text(LEFT, 46, "Lines: imports that do not follow from other lines. Numbers: steps on the right.", 11, "#5b6472"),
        text(PATH_LEFT, 28, "The path of a training row", 15, weight=600),
        text(PATH_LEFT, 46, "What there is, and the function that makes it.", 11, "#5b6472"),
    ]
    for upper, lower in direct(edges):
        ux, uy, tall = places[upper]
        lx, ly, _ = places[lower]
        x1, y1, x2, y2 = ux + BOX / 2, uy + tall, lx + BOX / 2, ly
        bend = max(14.0, (y2 - y1) / 2)
        parts.append(f'<path d="M{x1:g} {y1:g}C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" fill="none" stroke="#b6bfcc"/>')
    for name, (x, y, tall) in places.items():
        on_path = name in steps
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{tall:g}" rx="6" fill="{"#eaf2fd" if on_path else "#f5f6f8"}" '
                     f'stroke="{"#3b78c4" if on_path else "#aab2be"}"/>')  # fmt: skip
        parts.append(text(x + 10, y + 19, name, 13, weight=600))
        parts += [text(x + 10, y + 35 + 13 * i, line, 10.5, "#444c58") for i, line in enumerate(texts[name])]
        for i, number in enumerate(reversed(steps.get(name, []))):
            parts += badge(x + BOX - 15 - 21 * i, y + 15, number)
    pitch = (height - TOP - 16) / len(PATH)
    parts.append(f'<path d="M{PATH_LEFT + 9} {TOP + 9}V{TOP + 9 + pitch * (len(PATH) - 1):g}" stroke="#3b78c4" stroke-width="1.5"/>')
    for i, (what, file, function) in enumerate(PATH):
        middle = TOP + 9 + i * pitch
        parts += badge(PATH_LEFT + 9, middle, i + 1)
        parts.append(text(PATH_LEFT + 28, middle - 1, what, 13, weight=600))
        parts.append(text(PATH_LEFT + 28, middle + 14, file.removeprefix("mmft/"), 10.5, "#444c58", MONO))
        parts.append(text(PATH_LEFT + 28, middle + 28, function, 10.5, "#444c58", MONO))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, size: float, colour: str = "#1c2128", font: str = "", weight: int = 0) -> str:
    more = (f' font-family="{font}"' if font else "") + (f' font-weight="{weight}"' if weight else "")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{more}>{escape(words)}</text>'


def badge(x: float, y: float, number: int) -> list[str]:
    """A step's number in a disc around (x, y)."""
    return [
        f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="#3b78c4"/>',
        f'<text x="{x:g}" y="{y + 3.5:g}" font-size="10" fill="#ffffff" text-anchor="middle" font-weight="600">{number}</text>',
    ]


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
    print(TARGET)
