"""`mmft compare run=DIR` (base against tuned) or `run=[A,B]` (run against run): the same samples, side by side."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from omegaconf import DictConfig

from ..common.errors import Incomplete, UserError
from ..config.plain import to_plain
from ..runs.directory import Run, plain_name
from .predict import complain

if TYPE_CHECKING:
    from ..common.records import PlanReport
    from ..evaluation.inputs import Asked
    from ..reports.answers_page import Side
    from ..runs.open import Opener

log = logging.getLogger("mmft")
SPREAD = 8  # samples compared when none is named


class Compared(NamedTuple):
    """The models' answers to the same samples, and the page that shows them."""

    sides: list[Side]
    page: Path


@dataclass
class Compare:
    """The keys of conf/task/compare.yaml. A run is loaded once and its adapter switched off for the base; runs are loaded in turn."""

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

    def __call__(self, cfg: DictConfig, overrides: list[str], opener: Opener | None = None) -> Compared | None:
        """Write the page and return it with the sides; None from ui=true. Raises UserError; Incomplete if an input could not be answered.

        opener: opens the models, None: they are loaded here.
        """
        from ..evaluation.metrics.base import MetricSet
        from ..evaluation.metrics.defaults import metric_set
        from ..runs.answers import add_metrics, drop_unanswered, label_runs, measured_sides, run_sides
        from ..runs.open import open_any

        paths = [str(p) for p in (self.run if isinstance(self.run, list) else [self.run])]
        run, run_cfg = self._check_runs(paths, cfg, overrides)
        if self.ui:
            from ..serving.page import serve

            serve(paths, self.checkpoint, cfg, overrides, self.port, self.host)
            return None
        asked, description = self._prompts(run, run_cfg)
        page = self._page(run, run_cfg, paths, asked, description)
        sides = [side for path in paths for side in run_sides(path, cfg, overrides, self.checkpoint, asked, len(paths) == 1, opener or open_any)]
        if len(paths) > 1:
            label_runs(sides)
        reasons = drop_unanswered(sides)
        for reason in reasons:
            complain(reason)
        if not sides[0].rows:
            raise UserError("none of the inputs could be answered; nothing was written")
        metrics = metric_set(to_plain(run_cfg.get("metrics")))
        add_metrics(sides, metrics)
        kept = {name: MetricSet.from_config(to_plain(section.metrics)) for name, section in (run_cfg.evaluation.get("keep") or {}).items()}
        measured = measured_sides([Run(Path(path)) for path in paths], metrics, kept) if self.input is None and self.checkpoint is None else []
        print_tables(sides, measured)
        write_page(page, run, sides, measured, description, self.out is not None)
        run.record("compare", overrides, [page])
        log.info("\npage  %s", page)
        if reasons:
            raise Incomplete(f"{len(reasons)} of {len(asked)} inputs could not be answered, each is named above; the others were compared")
        return Compared(sides, page)

    def _check_runs(self, paths: list[str], cfg: DictConfig, overrides: list[str]) -> tuple[Run, DictConfig]:
        """(the first run, its config), after checking all runs before a model is loaded. Raises UserError."""
        from ..runs.open import run_config
        from ..runs.weights import trained_weights

        if len(set(paths)) < len(paths) or not paths:
            raise UserError(f"run={self.run}: name one run, or several different ones as [A,B]")
        if len(paths) > 1 and self.checkpoint is not None:
            raise UserError("checkpoint=... goes with one run; compare several by their final adapters")
        configs = [run_config(path, cfg, overrides) for path in paths]
        for run, _ in configs:
            _, full = trained_weights(run, self.checkpoint)
            if full and len(paths) == 1:
                raise UserError(f"run={run.path}: the whole model was trained, so it holds no base; compare it with another run: run=[A,B]")
        return configs[0]

    def _prompts(self, run: Run, cfg: DictConfig) -> tuple[Sequence[Asked], str]:
        """(the prompts, a description of them). Raises UserError."""
        from ..data.prepare import prepared_data
        from ..data.selection import evaluation_rows
        from ..evaluation.answer import prompts_of, with_choices
        from ..evaluation.inputs import Asked

        if self.input is not None:
            if self.index is not None:
                raise UserError("index= and input= are two choices of samples; name one of them")
            return with_choices(prompts_of(self.input, self.prompt, self.together, run.path, cfg), None, cfg), f"input {self.input}"
        if self.prompt is not None or self.together:
            raise UserError("prompt= and together= go with input=; samples of the data set bring their own prompt")
        split = cfg.evaluation.split
        prepared = prepared_data(cfg)
        rows = evaluation_rows(prepared, {"split": split, "max_samples": None})
        selected = sample_indices(self.index, len(rows), split)
        asked = [Asked(rows[i].id, rows[i], number=i) for i in selected]
        return with_choices(asked, None, cfg), f"{prepared.manifest['name']}, {split} {', '.join(map(str, selected))}"

    def _page(self, run: Run, cfg: DictConfig, paths: list[str], asked: Sequence[Asked], description: str) -> Path:
        """The path of the page: out=, which must not exist, or a name that only the same comparison gets. Raises UserError."""
        if self.out is not None:
            page = Path(self.out)
            if page.suffix.lower() not in (".html", ".htm"):
                raise UserError(f"out={page}: must end in .html")
            if page.exists():
                raise UserError(f"out={page}: exists already; choose another name or remove it")
            return page
        identity = [[Path(p).resolve().as_posix() for p in paths], self.checkpoint, description, to_plain(cfg.generation), to_plain(cfg.data),
                    [a.where for a in asked], [a.sample.prompt_text for a in asked if a.sample],
                    *([cfg.evaluation.get("choice_norm")] if cfg.evaluation.get("answer") == "choose" else [])]  # fmt: skip
        code = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return run / "compare" / f"{plain_name(description)[:60]}_{code}.html"


def sample_indices(index: object, n: int, split: str | None) -> list[int]:
    """The indices of index=; without it, up to SPREAD evenly spread ones of n. Raises UserError for one that the split does not have."""
    if index is None:
        return sorted({(2 * k + 1) * n // (2 * min(SPREAD, n)) for k in range(min(SPREAD, n))})
    indices = index if isinstance(index, list) else [index]
    for i in indices:
        if isinstance(i, bool) or not isinstance(i, int):
            raise UserError(f"index={i}: give a whole number, or several as [0,3,7]")
        if not 0 <= i < n:
            raise UserError(f"index={i}: the {split} split has {n} rows, 0 to {n - 1}")
    return list(dict.fromkeys(indices))


def print_tables(sides: list[Side], measured: list[list[Side]]) -> None:
    """Print the sides, their answers, their metrics if there are any, and what was measured on all held-out rows."""
    from ..reports.answers_page import measured_title
    from ..reports.terminal import figures_table, samples_table, show, sides_table

    figures = [figures_table(sides)] if sides[0].figures else []
    show(sides_table(sides), samples_table(sides), *figures, *(figures_table(two, measured_title(two)) for two in measured))


def write_page(page: Path, run: Run, sides: list[Side], measured: list[list[Side]], description: str, exclusive: bool) -> None:
    """Write the page atomically. exclusive: raise UserError if it exists by now."""
    from ..common.files import read_json
    from ..reports.answers_page import comparison_page
    from ..reports.html import write_text
    from ..reports.tables import plan_rows

    parts = plan_rows(cast("PlanReport", read_json(run / "lora_plan.json"))) if len(sides) == 2 and sides[0].label == "base" else []
    text = comparison_page(" against ".join(s.label for s in sides), description, sides, parts, measured)
    if exclusive and page.exists():
        raise UserError(f"out={page}: exists already; choose another name or remove it")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, text)
    except OSError as error:
        raise UserError(f"{page}: cannot be written: {error.strerror or error}") from None
