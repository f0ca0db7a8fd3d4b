"""`mmft audit model=... data=...`: what the model will see and learn, and what training costs, before it is trained."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.build import build
from ..config.plain import resolved
from ..data.prepare import prepared_data
from ..models.load import build_collator, load_model, load_skeleton, locate_model
from ..runs.directory import plain_name

if TYPE_CHECKING:
    from ..audit.audit import AuditResult

log = logging.getLogger("mmft")


@dataclass
class Audit:
    """The keys of conf/task/audit.yaml."""

    rows: int = 4
    count: int | None = 1000
    generate: int = 3
    estimate: bool = True
    gpu_memory_gb: float | None = None
    gpu_tflops: float | None = None
    out: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> AuditResult:
        """Print and write the audit. Raises AuditFailed (exit code 1) if a check fails; the page is written all the same."""
        from ..models.fingerprint import import_while_hashing

        import_while_hashing("transformers.trainer", "peft", model=cfg.model.get("path"))
        from transformers import set_seed

        from ..adapters.attach import attach_adapter
        from ..adapters.freeze import freeze
        from ..adapters.plan import plan_adapter
        from ..adapters.report import adapter_report
        from ..audit import audit, page
        from ..audit.checks import check_augmentation, raise_failed
        from ..audit.counts import count_tokens
        from ..data.augment import build_transforms
        from ..data.mix import mixing_of
        from ..data.selection import alternating
        from ..models.quantization import prepare_for_training
        from ..pipeline.prepare import check_boxes
        from ..reports import terminal
        from ..rewrites.apply import rewrite_for_training
        from ..training.arguments import training_settings

        # everything light is checked before the weights are read
        self._check_keys()
        settings = resolved(cfg)
        family = build(cfg.model, "model")
        training_settings(settings["trainer"], output_dir="unused")
        build_transforms(settings.get("augment"))
        prepared = prepared_data(cfg)
        if not prepared.splits.get("train"):
            raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
        rows = alternating(prepared.split("train"))
        mixing = mixing_of(prepared, prepared.split("train"))
        located = locate_model(family)
        skeleton = load_skeleton(family, located)
        check_boxes(prepared, family, located, skeleton.config.model_type)
        plan = plan_adapter(skeleton, settings["lora"])
        for text in prepared.describe():
            log.info("%-14s %s", "data", text)

        set_seed(cfg.seed)
        loaded = load_model(family, full_training=plan.method == "full", located=located)
        collator = build_collator(cfg.collator, family, loaded)
        counts = count_tokens(collator, rows, self.count)
        usable = audit.usable_rows(collator, rows, self.rows, counts)
        name = f"{plain_name(Path(located.path.split(':')[-1]).name)}, {prepared.manifest['name']}"
        result = audit.AuditResult(name, counts, [audit.check_rows(counts), *check_augmentation(settings.get("augment"), rows)])
        if usable:
            audit.look_at_rows(result, loaded.model, collator, usable, self.rows)
            result.answers = audit.untrained_answers(loaded.model, collator, settings, usable[: self.generate])
        terminal.show(page.counts_table(counts))
        model = attach_adapter(prepare_for_training(loaded.model, loaded.quantization, settings["trainer"], family.path), plan)
        rewrite_for_training(model, family.rewrites, cfg.seed)
        freeze(model)
        result.plan = adapter_report(model, plan)
        terminal.show(terminal.plan_table(result.plan), page.checks_table(result.checks))
        if self.estimate and counts.lengths:
            result.estimate, result.gpu = audit.estimate_cost(
                model, collator, usable or [rows[0]], counts, settings, loaded.quantization, self.gpu_memory_gb, self.gpu_tflops
            )
            result.cost = page.cost_lines(result.estimate, counts.rows if mixing is None else mixing.draws, settings["trainer"], result.gpu)
            terminal.show(terminal.pairs_table("What training takes", result.cost))

        target = self._page(Path(settings["output_dir"]), name)
        page.write_page(target, result, prepared, [w.removeprefix("task.") for w in overrides if w != "task=audit"])
        log.info("\npage           %s", target)
        raise_failed(result.checks, f" (see {target})")
        return result

    def _check_keys(self) -> None:
        if self.rows < 1 or self.generate < 0 or (self.count is not None and self.count < 1):
            raise UserError("rows and count must be above 0, generate 0 or more")
        if self.out and Path(self.out).exists():
            raise UserError(f"out={self.out}: exists already; choose another name, or remove it")

    def _page(self, output_dir: Path, name: str) -> Path:
        if self.out:
            return Path(self.out)
        return output_dir / f"audit_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{plain_name(name.replace(', ', '_'))}.html"
