"""`mmft audit model=... data=...`: what the model will see and learn, and what it costs, before hours are spent."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..config.build import build
from ..config.validate import to_plain
from ..data.prepare import prepared_data
from ..models.load import build_collator, load_model, load_skeleton, locate_model
from ..runs.directory import plain_name

log = logging.getLogger("mmft")


@dataclass
class Audit:
    rows: int = 4
    count: int | None = 1000
    generate: int = 3
    estimate: bool = True
    gpu_memory_gb: float | None = None
    gpu_tflops: float | None = None
    out: str | None = None

    def __call__(self, cfg: Any, overrides: list[str]) -> dict[str, Any]:
        """Errors raised: AuditFailed (exit code 1) when something is wrong; the page is written all the same."""
        from ..adapters import lora
        from ..models.fingerprint import import_while_hashing

        import_while_hashing("transformers.trainer", "peft", model=cfg.model.get("path"))
        from ..adapters.freeze import freeze
        from ..audit import checks, counts, page, tokens
        from ..data.augment import made
        from ..data.prepared import describe
        from ..reports import terminal
        from ..training.trainer import training_settings

        settings = to_plain(cfg)
        if self.rows < 1 or self.generate < 0 or (self.count is not None and self.count < 1):
            raise UserError("rows and count must be above 0, generate 0 or more")
        if self.out and Path(self.out).exists():
            raise UserError(f"out={self.out}: exists already; choose another name, or remove it")
        family = build(cfg.model)
        training_settings(settings["trainer"], output_dir="unused")
        made(settings.get("augment"))
        prepared = prepared_data(cfg)
        if not prepared.splits.get("train"):
            raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
        rows = prepared.split("train")
        located = locate_model(family)
        plan = lora.plan(load_skeleton(family, located), settings["lora"])
        for text in describe(prepared):
            log.info("%-14s %s", "data", text)

        loaded, collator = self._load(cfg, family, located, plan)
        model = loaded.model
        found = counts.count(collator, rows, self.count)
        left_out = {row for row, _ in found.refused}
        usable = [r for r in (rows[i] for i in range(min(len(rows), self.rows + len(left_out) + 16))) if r.id not in left_out and _collates(collator, r)]
        asked = [checks.Check("rows", f"the collator refuses {len(found.refused)} of {len(found.refused) + len(found.lengths)} rows looked at"
                              + (f", e.g. {found.refused[0][0]}: {found.refused[0][1]}" if found.refused else ""), not found.refused)]  # fmt: skip
        asked += checks.augmentation(settings.get("augment"), rows)
        shown, answers, cost = [], [], {}
        if usable:
            first = usable[: self.rows]
            batch = collator(first)
            shown = [page.shown_row(row, tokens.pieces(collator, batch, i)) for i, row in enumerate(first)]
            self._print_rows(first, collator, batch)
            asked += [checks.end_token(collator, batch), checks.blindness(model, collator, usable[:2])]
            answers = self._answers(model, collator, settings, usable)
        terminal.show(page.counts_table(found))
        model = lora.attach(_prepared_for_bits(loaded, settings), plan)
        freeze(model)
        plan_report = lora.report(model, plan)
        terminal.show(terminal.plan_table(plan_report), page.checks_table(asked))
        result: dict[str, Any] = {}
        if self.estimate and found.lengths:
            result = self._estimate(model, collator, usable or [rows[0]], found, settings, loaded)
            cost = result.pop("words")
            terminal.show(terminal.pairs_table("What training takes", cost))

        name = f"{plain_name(Path(located.path.split(':')[-1]).name)}, {prepared.manifest['name']}"
        # every value of the page is at hand; it is written even when a check came out badly
        target = Path(self.out) if self.out else Path(settings["output_dir"]) / (
            f"audit_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{plain_name(name.replace(', ', '_'))}.html")  # fmt: skip
        page.write_page(
            target, name=name, well=all(c.good is not False for c in asked), overrides=" ".join(w.removeprefix("task.") for w in overrides if w != "task=audit"), checks=asked, rows=shown,
            counted=len(found.lengths), all_rows=found.rows, counts=found.table(), lost=page.lost_rows(prepared, found), plan=plan_report,
            answers=answers, cost=cost,
        )  # fmt: skip
        log.info("\npage           %s", target)
        checks.refuse(asked, f" (see {target})")
        return {"checks": asked, "counts": found, "plan": plan_report, **result}

    def _load(self, cfg: Any, family: Any, located: Any, plan: Any) -> tuple[Any, Any]:
        from transformers import set_seed

        set_seed(cfg.seed)
        loaded = load_model(family, full_training=plan.method == "full", located=located)
        return loaded, build_collator(cfg.collator, family, loaded)

    def _print_rows(self, samples: list[Any], collator: Any, batch: dict[str, Any]) -> None:
        from rich.console import Console

        from ..audit import tokens

        console = Console(highlight=False)
        colour = console.is_terminal and not console.no_color
        log.info("\nWhat the model sees:  %s", "" if colour else tokens.legend(False))
        if colour:
            console.print(tokens.legend(True))
        for i, sample in enumerate(samples):
            row = tokens.pieces(collator, batch, i)
            log.info("\n%s", sample.id)
            if colour:
                console.print(tokens.coloured(row))
            else:
                print(tokens.marked(row))

    def _answers(self, model: Any, collator: Any, settings: dict[str, Any], rows: list[Any]) -> list[dict[str, Any]]:
        from ..evaluation.evaluate import Evaluator

        asked = rows[: self.generate]
        if not asked:
            return []
        evaluator = Evaluator(asked, collator, settings["generation"], settings["evaluation"]["batch_size"])
        found = [evaluator.record(i, s, t) for i, (s, t) in enumerate(zip(asked, evaluator.generate(model), strict=True))]
        log.info("\nThe untrained model's answers")
        for row in found:
            log.info("  %s  %r  (reference %r)", row["id"], row["prediction"], row["references"][0] if row["references"] else "")
        return found

    def _estimate(self, model: Any, collator: Any, rows: list[Any], found: Any, settings: dict[str, Any], loaded: Any) -> dict[str, Any]:
        from ..audit import estimate, page

        trainer = settings["trainer"]
        if trainer.get("activation_checkpointing") or trainer.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.get("activation_checkpointing_kwargs"))
        here = estimate.estimate(model, collator, rows, found, trainer)
        gpu = None
        if self.gpu_memory_gb is not None:
            wanted = settings["model"].get("quantization") or {}
            bits = 4 if wanted.get("load_in_4bit") else 8 if wanted.get("load_in_8bit") else 16
            gpu = estimate.on_gpu(here, self.gpu_memory_gb, self.gpu_tflops, bits)
        return {"estimate": here, "gpu": gpu, "words": page.cost(here, found.rows, trainer, gpu)}


def _collates(collator: Any, row: Any) -> bool:
    try:
        collator([row])
    except UserError:
        return False
    return True


def _prepared_for_bits(loaded: Any, settings: dict[str, Any]) -> Any:
    if not loaded.quantized:
        return loaded.model
    from peft import prepare_model_for_kbit_training

    given = settings["trainer"]
    return prepare_model_for_kbit_training(
        loaded.model, use_gradient_checkpointing=bool(given.get("activation_checkpointing") or given.get("gradient_checkpointing"))
    )
