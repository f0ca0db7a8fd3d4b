"""`mmft compare run=DIR` (base against tuned) or `run=[A,B]` (run against run): the same samples, side by side."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import Incomplete, UserError
from ..config.validate import to_plain
from ..evaluation.inputs import Asked
from ..runs.directory import plain_name
from .predict import answer_all, ask_for, complain

log = logging.getLogger("mmft")
SPREAD = 8  # samples compared when none is named


@dataclass
class Compare:
    """Keys as in conf/task/compare.yaml. One run is loaded once, its adapter switched off for the base; several one after another."""

    run: Any = None
    checkpoint: int | None = None
    index: Any = None
    input: Any = None
    prompt: Any = None
    together: bool = False
    out: str | None = None
    ui: bool = False
    port: int = 7860
    host: str = "127.0.0.1"

    def __call__(self, cfg: Any, overrides: list[str]) -> Any:
        from ..runs.open import run_config, trained_weights

        paths = [str(p) for p in (self.run if isinstance(self.run, list) else [self.run])]
        if len(set(paths)) < len(paths) or not paths:
            raise UserError(f"run={self.run}: name one run, or several different ones as [A,B]")
        if len(paths) > 1 and self.checkpoint is not None:
            raise UserError("checkpoint=... goes with one run; compare several by their final adapters")
        opened = [run_config(path, cfg, overrides) for path in paths]
        for run, _ in opened:  # before the first model is loaded
            if trained_weights(run, self.checkpoint)[1] and len(paths) == 1:
                raise UserError(f"run={run.path}: the whole model was trained, so it holds no base; compare it with another run: run=[A,B]")
        if self.ui:
            from ..serving.page import serve

            return serve(paths, self.checkpoint, cfg, overrides, self.port, self.host)
        run, kept = opened[0]
        asked, what = self.asked(run, kept)
        page = self.page(run, kept, paths, asked, what)
        sides = [side for path in paths for side in answers(path, cfg, overrides, self.checkpoint, asked, len(paths) == 1)]
        bad = name_sides(sides, paths)
        show(sides)
        write(page, run, sides, what, self.out is not None)
        run.record("compare", overrides, [page])
        log.info("\npage  %s", page)
        if bad:
            raise Incomplete(f"{bad} of {len(asked)} inputs could not be answered, each is named above; the others were compared")
        return sides

    def asked(self, run: Any, kept: Any) -> tuple[list[Asked], str]:
        """(the samples, what they are in words). Errors raised: UserError."""
        from ..data.prepare import prepared_data
        from .evaluate import rows_of

        if self.input is not None:
            if self.index is not None:
                raise UserError("index= and input= are two choices of samples; name one of them")
            return ask_for(self.input, self.prompt, self.together, run, kept), f"input {self.input}"
        if self.prompt is not None or self.together:
            raise UserError("prompt= and together= go with input=; samples of the data set bring their own prompt")
        evaluation = to_plain(kept.evaluation)
        prepared = prepared_data(kept)
        rows = rows_of(prepared, evaluation | {"max_samples": None})
        chosen = indices(self.index, len(rows), evaluation["split"])
        return [Asked(rows[i].id, rows[i], number=i) for i in chosen], f"{prepared.manifest['name']}, {evaluation['split']} {', '.join(map(str, chosen))}"

    def page(self, run: Any, kept: Any, paths: list[str], asked: list[Asked], what: str) -> Path:
        """Where the page goes. The same comparison replaces its own page; a page named by out= must not exist."""
        if self.out is not None:
            page = Path(self.out)
            if page.suffix.lower() not in (".html", ".htm"):
                raise UserError(f"out={page}: must end in .html")
            if page.exists():
                raise UserError(f"out={page}: exists already; choose another name or remove it")
            return page
        decides = [[Path(p).resolve().as_posix() for p in paths], self.checkpoint, what, to_plain(kept.generation), to_plain(kept.data),
                   [a.where for a in asked], [a.sample.prompt_text for a in asked if a.sample]]  # fmt: skip
        code = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return run / "compare" / f"{plain_name(what)[:60]}_{code}.html"


def indices(given: Any, n: int, split: str) -> list[int]:
    """The samples to show. Errors raised: UserError for a number that the split does not have."""
    if given is None:
        return sorted({(2 * k + 1) * n // (2 * min(SPREAD, n)) for k in range(min(SPREAD, n))})
    chosen = given if isinstance(given, list) else [given]
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int):
            raise UserError(f"index={i}: give a whole number, or several as [0,3,7]")
        if not 0 <= i < n:
            raise UserError(f"index={i}: the {split} split has {n} rows, 0 to {n - 1}")
    return list(dict.fromkeys(chosen))


def answers(path: str, cfg: Any, overrides: list[str], checkpoint: int | None, asked: list[Asked], with_base: bool) -> Iterator[Any]:
    """The answers of one run (base first when asked for) as report.answers.Side; its model is let go of afterwards."""
    from ..reports.answers import Side
    from ..runs.open import open_run

    opened = open_run(path, cfg, overrides, checkpoint)
    about = f"{path}{f', checkpoint {checkpoint}' if checkpoint is not None else ''}"
    for kind in ("base", "tuned") if with_base else ("tuned",):
        with opened.base() if kind == "base" else contextlib.nullcontext():
            rows = list(answer_all(opened, asked))
        yield Side(kind, kind, f"{opened.loaded.located.path}, the adapter switched off" if kind == "base" else about, rows)


def name_sides(sides: list[Any], paths: list[str]) -> int:
    """Give runs letters, name what could not be answered and leave it out of every side; returns how many those were."""
    from ..evaluation import metrics

    if len(paths) > 1:
        for i, side in enumerate(sides):
            side.label, side.kind = chr(ord("A") + i) if i < 26 else str(i), "base" if i == 0 else "tuned"
    broken: dict[int, str] = {}
    for side in sides:
        for row in side.rows:
            if row.get("error"):
                broken.setdefault(row["index"], row["error"])
    for reason in broken.values():
        complain(reason)
    if sides and len(broken) == len(sides[0].rows):
        raise UserError("none of the inputs could be answered; nothing was written")
    for side in sides:
        side.rows = [r for r in side.rows if r["index"] not in broken]
        known = [r for r in side.rows if r["references"]]
        if len(known) > 1:
            side.figures = metrics.compute([r["prediction"] for r in known], [r["references"] for r in known])
    return len(broken)


def show(sides: list[Any]) -> None:
    from ..reports import terminal
    from ..reports.side_by_side import figures_table, samples_table, sides_table

    tables = [sides_table(sides), samples_table(sides)]
    terminal.show(*tables, *([figures_table(sides)] if sides[0].figures else []))


def write(page: Path, run: Any, sides: list[Any], what: str, exclusive: bool) -> None:
    """The page, written beside and renamed."""
    from ..common.files import read_json
    from ..reports.answers import comparison_page
    from ..reports.page import plan_rows

    plan = read_json(run / "lora_plan.json")
    text = comparison_page(" against ".join(s.label for s in sides), what, sides, plan_rows(plan) if len(sides) == 2 and sides[0].label == "base" else [])
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        beside = page.with_name(f".{page.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{page}: cannot be written: {error.strerror or error}") from None
    if exclusive and page.exists():
        beside.unlink()
        raise UserError(f"out={page}: exists already; choose another name or remove it")
    os.replace(beside, page)
