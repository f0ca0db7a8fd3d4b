"""`mmft audit model=... data=...`: what the model will see and learn, and what training costs, before it is trained; with run=DIR rank=true which rows it did not learn."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.build import build
from ..config.plain import resolved
from ..config.settings import sharded_by
from ..data.prepare import prepared_data
from ..models.load import build_collator, load_skeleton, locate_model
from ..runs.directory import plain_name

if TYPE_CHECKING:
    from ..audit.audit import AuditResult
    from ..audit.rank import Ranking

log = logging.getLogger("mmft")


@dataclass
class Audit:
    """The keys of conf/task/audit.yaml. rank, run, checkpoint, worst, above: see `_rank`."""

    rows: int = 4
    count: int | None = 1000
    generate: int = 3
    estimate: bool = True
    gpu_memory_gb: float | None = None
    gpu_tflops: float | None = None
    out: str | None = None
    rank: bool = False
    run: str | None = None
    checkpoint: int | None = None
    worst: int | float = 0.05
    above: float | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> AuditResult | Ranking:
        """Print and write the audit. Raises AuditFailed (exit code 1) if a check fails; the page is written all the same."""
        if self.rank or self.run is not None:
            return self._rank(cfg, overrides)
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
        from ..collators.answers import AnswerCollator
        from ..data.augment import build_transforms
        from ..data.mix import mixing_of
        from ..data.selection import alternating
        from ..models.quantization import prepare_for_training
        from ..pipeline.policy import check_policy_keys
        from ..pipeline.preferences import usable_rows
        from ..pipeline.prepare import check_boxes, check_quantised, find_parents, plan_report
        from ..reports import terminal
        from ..rewrites.apply import rewrite_for_training
        from ..runs.parents import load_base, resolve_names
        from ..training.arguments import training_settings

        # everything light is checked before the weights are read
        self._check_keys()
        resolve_names(cfg)
        settings = resolved(cfg)
        family = build(cfg.model, "model")
        training_settings(settings["trainer"], output_dir="unused")
        build_transforms(settings.get("augment"))
        objective = build(settings["objective"], "objective")
        check_policy_keys(objective, settings)
        prepared = prepared_data(cfg)
        if not prepared.splits.get("train"):
            raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
        trained, _ = usable_rows(objective, prepared, prepared.split("train"), None, settings)
        rows = alternating(trained)
        mixing = mixing_of(prepared, trained)
        located = locate_model(family)
        skeleton = load_skeleton(family, located)
        check_boxes(prepared, family, located, skeleton.config.model_type)
        plan = plan_adapter(skeleton, settings["lora"])
        check_quantised(plan, family, skeleton, sharded_by(settings["trainer"]))
        start, below = find_parents(settings, family, located, plan)
        planned = plan_report(skeleton, plan, settings["trainer"])
        for text in prepared.describe():
            log.info("%-14s %s", "data", text)

        set_seed(cfg.seed)
        loaded = load_base(family, located, below, plan.method == "full")
        collator = build_collator(cfg.collator, family, loaded)
        collate = AnswerCollator(collator).sequences if objective.PREFERENCE else collator
        counts = count_tokens(collator, rows, self.count, collate)
        usable = audit.usable_rows(collate, rows, self.rows, counts)
        name = f"{plain_name(Path(located.path.split(':')[-1]).name)}, {prepared.manifest['name']}"
        result = audit.AuditResult(name, counts, [audit.check_rows(counts), *check_augmentation(settings.get("augment"), rows)])
        if usable:
            audit.look_at_rows(result, loaded.model, collator, usable, self.rows, collate)
            result.answers = audit.untrained_answers(loaded.model, collator, settings, usable[: self.generate])
        terminal.show(page.counts_table(counts))
        model = attach_adapter(prepare_for_training(loaded.model, loaded.quantization, settings["trainer"], family.path), plan, start.folder if start else None, bool(settings["trainer"].get("lora_fa")))
        rewrite_for_training(model, family.rewrites, cfg.seed)
        freeze(model)
        result.plan = {**adapter_report(model, plan, {row["part"]: row["rate"] for row in planned["rows"] if row["rate"] is not None}), "notes": planned["notes"]}
        terminal.show(terminal.plan_table(result.plan), page.checks_table(result.checks))
        if self.estimate and counts.lengths:
            result.estimate, result.gpu = audit.estimate_cost(
                model, collate, usable or [rows[0]], counts, settings, loaded.quantization, self.gpu_memory_gb, self.gpu_tflops
            )
            result.cost = page.cost_lines(result.estimate, counts.rows if mixing is None else mixing.draws, settings["trainer"], result.gpu)
            terminal.show(terminal.pairs_table("What training takes", result.cost))

        target = self._page(Path(settings["output_dir"]), name)
        page.write_page(target, result, prepared, [w.removeprefix("task.") for w in overrides if w != "task=audit"])
        log.info("\npage           %s", target)
        raise_failed(result.checks, f" (see {target})", result)
        return result

    def _rank(self, cfg: DictConfig, overrides: list[str]) -> Ranking:
        """Rank the training rows of a run by their loss, and list the worst ones.

        Writes audit/rank_NAME.jsonl (every row), .html (the worst ones with images) and _N.txt (the ids of the N worst ones, for
        data.without) into the run. worst: how many rows are listed, a number or a share; above: only those with a higher loss. Raises UserError.
        """
        from ..audit import rank, rank_page
        from ..config.settings import Settings
        from ..data.prepare import prepared_data
        from ..reports import terminal
        from ..runs.open import open_run, run_config
        from .evaluate import with_features

        if not self.rank or self.run is None:
            raise UserError("rank=true needs a run: mmft audit run=DIR rank=true" if self.rank else f"run={self.run}: a run is audited with rank=true, which ranks its training rows by loss; add it, or drop run=")
        rank.check_worst(self.worst, self.above)
        self._check_keys()
        run, run_cfg = run_config(self.run, cfg, overrides)
        prepared = prepared_data(run_cfg)
        if not prepared.splits.get("train"):
            raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
        opened = open_run(self.run, cfg, overrides, self.checkpoint)
        rows, left_out = rank.usable_rows(opened.collator, prepared.split("train"))
        if not len(rows):
            raise UserError(f"{prepared.path}: no training row can be computed, e.g. {left_out[0].row}: {left_out[0].reason}")
        settings: Settings = {**opened.settings, "evaluation": {**opened.settings["evaluation"], "split": "train"}}
        evaluator = opened.evaluator(rows)
        evaluator.collator = with_features(opened, settings, prepared, rows)
        ranking = rank.rank_rows(opened, evaluator, left_out)
        worst = ranking.worst(self.worst, self.above)
        if self.generate:
            rank.answer_worst(ranking, evaluator, opened.model, rank_page.SHOWN)

        identity = json.dumps([prepared.fingerprint, self.checkpoint])
        stem = f"audit/rank_{plain_name(prepared.manifest['name'])}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        # the number in its name says which rows it lists: a run that was trained without them must not find others there later
        ids = run.write_text(f"{stem}_{len(worst)}.txt", "".join(f"{row.sample.id}\n" for row in worst))
        lines = run.write_lines(f"{stem}.jsonl", [row.line(number) for number, row in enumerate(ranking.rows, 1)])
        about = f"{len(ranking.rows)} training rows of {prepared.manifest['name']}" + (f", checkpoint {self.checkpoint}" if self.checkpoint is not None else "")
        command = f"mmft ... data.without={ids}"
        page = rank_page.rank_page(run.name, ranking, worst, about, {"every row": str(lines), "ids of the listed rows": str(ids)}, command)
        target = Path(self.out) if self.out else run / f"{stem}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8", newline="\n")
        run.record("audit", overrides, [lines, ids, target])
        terminal.show(rank_page.worst_table(ranking))
        log.info("\n%d rows listed, %s\nleave out  %s\npage       %s", len(worst), ids, command, target)
        return ranking

    def _check_keys(self) -> None:
        if self.rows < 1 or self.generate < 0 or (self.count is not None and self.count < 1):
            raise UserError("rows and count must be above 0, generate 0 or more")
        if self.out and Path(self.out).exists():
            raise UserError(f"out={self.out}: exists already; choose another name, or remove it")

    def _page(self, output_dir: Path, name: str) -> Path:
        if self.out:
            return Path(self.out)
        return output_dir / f"audit_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{plain_name(name.replace(', ', '_'))}.html"
