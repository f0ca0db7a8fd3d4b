"""`mmft combine run=[A,B] weights=[0.7,0.3]`: one adapter of several runs of one base, measured against them; how=soup chooses among seeds or checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from ..common.errors import UserError
from ..config.plain import resolved
from ..config.ranking import ranking
from ..config.snapshot import snapshot
from ..runs.directory import Run

if TYPE_CHECKING:
    from ..common.records import Environment, PlanReport, Summary
    from ..config.settings import Settings
    from ..evaluation.evaluate import Evaluator
    from ..export.combine import Ingredient
    from ..runs.open import OpenedRun
    from ..runs.parents import Parent

log = logging.getLogger("mmft")


@dataclass
class Combine:
    """The keys of conf/task/combine.yaml."""

    run: Any
    weights: Any = None
    how: str = "linear"
    density: float | None = None
    rank: int | None = None
    out: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Run:
        """Combine, measure, and return the new run. Raises UserError before weights are read where that is possible."""
        from ..data.prepare import prepared_data
        from ..data.selection import split_rows
        from ..evaluation.kept import kept_sets
        from ..export import combine
        from ..models.fingerprint import import_while_hashing
        from ..runs.open import open_run, run_config
        from ..runs.weights import trained_weights

        recipe = combine.Recipe(self.how, self.density, self.rank)
        recipe.check()
        if self.out is not None and Path(self.out).exists():
            raise UserError(f"out={self.out}: exists already; name a new directory")
        import_while_hashing("transformers", "peft", model=None)
        parents = self._parents(cfg)
        if len(parents) < 2:
            raise UserError(f"run={self.run}: is one adapter; name several, [A,B], or with how=soup a sweep's folder, or a run with checkpoints")
        found = combine.ingredients(parents, combine.check_weights(self._weights(), len(parents), self.how))
        home = _run_of(found[0].parent)
        run, run_cfg = run_config(home, cfg, overrides)
        settings = resolved(run_cfg)
        prepared = prepared_data(run_cfg)
        _, rows = split_rows(prepared, settings["evaluation"])
        if self.how == combine.SOUP and rows is None:
            raise UserError("how=soup: chooses by the held-out rows, and the first run held none out; evaluation.split=... names some")
        step = found[0].parent.folder.name.removeprefix("checkpoint-")
        opened = open_run(home, cfg, overrides, int(step) if step.isdigit() and trained_weights(run, None)[0] != found[0].parent.folder else None)
        combine.check_ingredients(found, opened, recipe)
        evaluator = opened.evaluator(rows) if rows is not None else None
        kept = kept_sets(settings) if evaluator is not None else []
        combine.load_all(opened, found)
        steps: list[dict[str, Any]] = []
        if self.how == combine.SOUP:
            assert evaluator is not None
            score, higher = self._objective(str(cfg.rank_by) if any(w.startswith("rank_by=") for w in overrides) else ranking(settings), evaluator, opened)
            soup = combine.Soup(opened.model, score, higher)
            found, steps = soup.cook(found), soup.steps
        alone = combine.single(found, recipe)
        if alone is None:
            combine.combine(opened.model, found, recipe, "combined")
        opened.model.set_adapter(alone.name if alone is not None else "combined")
        child = Run.create(settings["output_dir"], ["combined", run.name], self.out)
        self._save(child, run, opened, found, alone)
        self._describe(child, run, run_cfg, opened, found, steps, overrides, prepared)
        summary = self._measure(child, opened, settings, evaluator, kept, prepared)
        self._report(child, summary, opened, settings, found)
        return child

    def _parents(self, cfg: DictConfig) -> list[Parent]:
        """The adapters that run= names: of runs, of a sweep's finished runs, or a run's checkpoints and its end. Raises UserError."""
        from ..export.combine import SOUP
        from ..runs.catalog import catalog
        from ..runs.parents import COMBINED, find_adapter

        words = [str(word) for word in (self.run if isinstance(self.run, list) else [self.run])]
        if len(words) == 1 and self.how == SOUP:
            folder = Path(words[0])
            if (folder / "snapshot.yaml").is_file():
                words = [p.as_posix() for p in sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))] + words
            else:
                words = [run.path.as_posix() for run in catalog(folder) if run.status == "finished" and (run.path / "adapter").is_dir()][::-1]
        if len(set(words)) < len(words):
            raise UserError(f"run={self.run}: names a run twice; give it a larger weight instead")
        found = [find_adapter(word, COMBINED, "run", str(cfg.output_dir)) for word in words]
        for one in found:
            if not one.run:
                raise UserError(f"run={one.path}: is an adapter without a run; a combination is measured as its first run was, so all must be runs")
        return found

    def _weights(self) -> list[Any] | None:
        if self.weights is None or isinstance(self.weights, list):
            return self.weights
        return [self.weights]

    def _objective(self, name: str, evaluator: Evaluator, opened: OpenedRun) -> tuple[Any, bool]:
        """(a function that measures the model as it is, whether higher is better). Raises UserError."""
        if name == "eval_loss":
            return lambda: evaluator.losses(opened.model)[0], False
        direction = next((score.higher_is_better for score in evaluator.metrics.scores if score.name == name), None)
        if direction is None:
            raise UserError(f"rank_by={name}: a soup is chosen by eval_loss or by a metric of the run's own rows")
        return lambda: float(evaluator.measure(opened.model)[0][name]), direction

    def _save(self, child: Run, run: Run, opened: OpenedRun, found: Sequence[Ingredient], alone: Ingredient | None) -> None:
        """Write adapter/: weights, config, processor, generation config, and what it sits on."""
        import shutil

        from ..common.files import read_json
        from ..export import combine
        from ..runs.parents import CHAIN

        folder = child / "adapter"
        if alone is not None:
            combine.copy_single(alone, folder)
        else:
            combine.save_combined(opened.model, "combined", found[0], folder, read_json(found[0].parent.folder / combine.CONFIG))
        opened.loaded.processor.save_pretrained(folder)
        for name in ("generation_config.json", CHAIN):
            if (run / "adapter" / name).is_file():
                shutil.copy2(run / "adapter" / name, folder / name)

    def _describe(
        self, child: Run, run: Run, run_cfg: DictConfig, opened: OpenedRun, found: Sequence[Ingredient], steps: list[dict[str, Any]], overrides: list[str], prepared: Any,
    ) -> None:  # fmt: skip
        """Write what was combined and how: snapshot.yaml, overrides.txt, env.json, combine.json, lora_plan.json."""
        from ..adapters.attach import adapted_names
        from ..adapters.plan import AdapterPlan
        from ..adapters.report import adapter_report
        from ..common.files import read_json
        from ..common.model_parts import part_of
        from ..export.combine import CONFIG
        from ..runs.environment import environment
        from ..runs.open import read_snapshot
        from ..runs.parents import BELOW, recorded

        config = read_json(child / "adapter" / CONFIG)
        kept = read_snapshot(run.path)
        for section in ("data", "evaluation", "generation", "metrics", "output_dir"):
            kept[section] = run_cfg[section]
        for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            OmegaConf.update(kept, f"lora.{key}", config.get(key), force_add=True)
        OmegaConf.update(kept, "lora.start", None, force_add=True)
        OmegaConf.update(kept, "lora.parts", {}, merge=False, force_add=True)
        kept.name = child.name
        child.write_text("overrides.txt", "".join(f"{word}\n" for word in ["combine", *(w.removeprefix("task.") for w in overrides if not w.startswith("task="))]))
        env: Environment = environment(opened.loaded, prepared, opened.settings["seed"])
        before = cast("Environment", read_json(run / "env.json"))
        env["max_new_tokens"], env["kept_max_new_tokens"] = before.get("max_new_tokens"), before.get("kept_max_new_tokens") or {}
        env["parents"] = [p for p in recorded(run) if p.get("role") == BELOW] + [one.record() for one in found]
        child.write_json("env.json", env)
        child.write_json("combine.json", {
            "how": self.how, "density": self.density, "rank": self.rank, "parts": [one.record() for one in found], "soup": steps,
        })  # fmt: skip
        plan = cast("PlanReport", read_json(run / "lora_plan.json"))
        linear = {str(row.get("part")): int(row.get("linear") or 0) for row in plan.get("rows") or ()}
        active = opened.model.active_adapters[0]
        for name in [name for name in opened.model.peft_config if name != active]:
            opened.model.delete_adapter(name)
        adapted = {name: part_of(name) for name in adapted_names(opened.model)}
        for name, parameter in opened.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        child.write_json("lora_plan.json", adapter_report(opened.model, AdapterPlan("lora", str(plan.get("scope") or "language"), {"r": config["r"]}, adapted, linear)))
        child.write_text("snapshot.yaml", snapshot(kept))

    def _measure(self, child: Run, opened: OpenedRun, settings: Settings, evaluator: Evaluator | None, kept: Sequence[Any], prepared: Any) -> Summary:
        """Measure base and combination on the held-out rows and the kept sets, as training does, and write eval/."""
        from ..evaluation.kept import kept_results, merge
        from ..evaluation.measurement import base_results, measure, tuned_results

        summary: Summary = {"seed": settings["seed"], "data_fingerprint": prepared.fingerprint, "held_out_samples": len(evaluator.rows) if evaluator else 0}
        if evaluator is None:
            return summary
        summary |= {"max_new_tokens": evaluator.limit.max_new_tokens, "longest_reference": evaluator.limit.longest}
        evaluators = {k.name: opened.evaluator(k.rows, k) for k in kept}
        before, kept_before = None, {}
        if settings["evaluation"]["base"]:
            with opened.base() as model:
                before = measure(evaluator, model)
                kept_before = {name: measure(its, model) for name, its in evaluators.items()}
            summary |= base_results(before)
            child.write_lines("eval/base.jsonl", before.answers)
            child.write_json("base.json", {"loss": before.loss, "metrics": before.metrics})
        tuned = measure(evaluator, opened.model)
        summary |= tuned_results(evaluator.metrics, tuned, before)
        child.write_lines("eval/tuned.jsonl", tuned.answers)
        for k in kept:
            after = measure(evaluators[k.name], opened.model)
            merge(summary, kept_results(k, evaluators[k.name], kept_before.get(k.name), after))
            child.write_lines(f"eval/keep/{k.name}_tuned.jsonl", after.answers)
        return summary

    def _report(self, child: Run, values: Summary, opened: OpenedRun, settings: Settings, found: Sequence[Ingredient]) -> None:
        """Write summary and reports; show the combination beside each run that it is made of."""
        from ..evaluation.metrics.defaults import metric_set
        from ..loggers.base import Logger
        from ..pipeline.finish import complete_summary, show_result, write_reports
        from ..reports import terminal
        from ..runs.answers import measured_sides

        plan = child.read_json("lora_plan.json")
        values |= {"trainable_parameters": plan["trainable_parameters"], "total_parameters": plan["total_parameters"]}
        summary = complete_summary(child, "finished", values, opened.loaded.device)
        child.write_json("summary.json", summary)
        write_reports(child, Logger(hardware=False))
        show_result(child, summary, joint=False)
        runs = list(dict.fromkeys(_run_of(one.parent) for one in found))
        for path in runs:
            weight = sum(one.weight for one in found if _run_of(one.parent) == path)
            for sides in measured_sides([Run(path), child], metric_set(settings.get("metrics")), {}):
                sides[0].label, sides[1].label = "it", "combined"
                terminal.show(terminal.figures_table(sides, f"{path.name} (weight {weight:.3g}), and the combination"))


def _run_of(parent: Parent) -> Path:
    """The directory of the run that trained an adapter."""
    folder = parent.folder
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
