"""`mmft` or `mmft train`: one straight line from a composed config to an adapter that has been measured."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import build, snapshot, to_plain
from ..distributed import is_main, share
from ..errors import Pruned, UserError
from ..run import Run
from .prepare import prepared_data

log = logging.getLogger("mmft")


@dataclass
class Train:
    """Train what the config says, into a new run directory. Errors raised: UserError."""

    audit: bool = True

    def __call__(self, cfg: Any, overrides: list[str], parent: dict[str, Any] | None = None, shared: Any = None) -> Run:
        """`parent` describes the run that this one repeats (parent.json); `shared` is what the runs of a sweep share."""
        from .. import lora
        from ..data.store import describe
        from ..loggers.base import Logger
        from ..trainer import training_settings

        # Everything light is built and checked before a weight is read and before anything is written.
        settings = to_plain(cfg)
        family, logger = build(cfg.model), build(cfg.logger) if is_main() else Logger(hardware=False)
        training_settings(settings["trainer"], output_dir=os.devnull)
        if shared:
            shared.begin_point()
        prepared = shared.prepared(cfg) if shared else prepared_data(cfg)
        rows, held_out = split_rows(prepared, settings["evaluation"])
        located = shared.locate(family) if shared else family.locate()
        plan = lora.plan(family.skeleton(located), settings["lora"])

        words = [settings["name"] or Path(located.path.split(":")[-1]).name, "" if settings["name"] else prepared.manifest["name"]]
        run = Run(share(lambda: Run.create(settings["output_dir"], words, settings["run_dir"]).path))
        log.info("run directory  %s", run.path)
        for text in describe(prepared):
            log.info("%-14s %s", "data", text)
        run.write_text("snapshot.yaml", snapshot(cfg))
        run.write_text("overrides.txt", "".join(f"{word}\n" for word in overrides))
        if parent:
            run.write_json("parent.json", parent)
        line = Line(cfg, settings, run, logger, family, located, plan, prepared, rows, held_out, shared, self.audit)
        try:
            line.load()
            line.measure_base()
            line.fit()
            line.measure_tuned()
            line.finish()
        except BaseException as error:
            line.fail(error)
            raise
        return run


def split_rows(prepared: Any, evaluation: dict[str, Any]) -> tuple[Any, Any]:
    """(training rows, held-out rows or None). Errors raised: UserError for a split the set does not have."""
    from ..evaluation import Subset

    if not prepared.splits.get("train"):
        raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
    name = evaluation["split"]
    if name is None:
        return prepared.split("train"), None
    if not prepared.splits.get(name):
        raise UserError(
            f"evaluation.split={name}: the prepared set has no such rows, it holds {prepared.splits}; set data.splits.{name}=0.1,"
            " or evaluation.split=null to train without measuring"
        )
    return prepared.split("train"), Subset(prepared.split(name), evaluation["max_samples"])


@dataclass
class Line:
    """One training from loaded model to finished directory; each method is one station, in this order."""

    cfg: Any
    settings: dict[str, Any]
    run: Run
    logger: Any
    family: Any
    located: Any
    plan: Any
    prepared: Any
    rows: Any
    held_out: Any
    shared: Any = None
    audit: bool = True
    summary: dict[str, Any] = field(default_factory=dict)
    base: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    def load(self) -> None:
        """Read weights and processor, build collator and evaluator, look at the first row."""
        from transformers import set_seed
        from transformers.utils.logging import disable_progress_bar

        from ..audit.checks import quick, refuse
        from ..environment import environment
        from ..evaluation import Evaluator

        if not sys.stderr.isatty():
            disable_progress_bar()
        set_seed(self.settings["seed"])
        started = time.time()
        full = self.plan.method == "full"
        self.loaded = self.shared.load(self.family, full, self.located) if self.shared else self.family.load(full_training=full, located=self.located)
        for note in self.loaded.notes:
            log.info("%-14s %s", "model", note)
        model = self.loaded.model
        self.collator = build(
            self.cfg.collator,
            processor=self.loaded.processor,
            family=self.family,
            model_config=model.config,
            end_token_ids=self.family.end_token_ids(self.loaded),
        )
        self.collator([self.rows[0]])  # a collator that does not fit the model says so now
        if self.audit:
            refuse(quick(model, self.collator, self.rows), "; audit=false trains it all the same")
        evaluation = self.settings["evaluation"]
        if self.held_out is not None:
            loss_batch = self.settings["trainer"].get("per_device_eval_batch_size", 8)
            self.evaluator = Evaluator(
                self.held_out, self.collator, self.settings["generation"], evaluation["batch_size"], loss_batch, progress=is_main()
            )
        self.run.write_json("env.json", environment(self.loaded, self.prepared, self.settings["seed"]))
        self.logger.start(self.run.path, self.run.name, self.settings)
        self.times["load"] = time.time() - started

    def measure_base(self) -> None:
        """The untouched model on the held-out rows, before an adapter or a training step can change it."""
        if self.held_out is None or not self.settings["evaluation"]["base"]:
            return
        started = time.time()

        def measure() -> tuple[float, dict[str, float], list[dict[str, Any]]]:
            return self.evaluator.loss(self.loaded.model), *self.evaluator.measure(self.loaded.model)

        found = self.shared.measure(self._base_key(), measure) if self.shared else measure()
        self.summary["base_eval_loss"], self.summary["base_metrics"], self.base = found
        self.run.write_lines("eval/base.jsonl", self.base)
        self.times["measure_base"] = time.time() - started

    def _base_key(self) -> str:
        """Equal for two runs whose untouched models give the same answers to the same rows."""
        from ..shared import key_of

        s = self.settings
        drawn = s["seed"] if s["generation"].get("do_sample") else None
        rows = (s["evaluation"]["split"], s["evaluation"]["max_samples"], s["evaluation"]["batch_size"], s["trainer"].get("per_device_eval_batch_size"))
        full = self.plan.method == "full"  # it may be loaded in another precision
        return key_of(s["model"], s["collator"], s["generation"], rows, drawn, full, self.located.revision, self.prepared.fingerprint)

    def fit(self) -> None:
        """Attach the adapter and train it."""
        from transformers import PrinterCallback, ProgressCallback, set_seed

        from .. import lora
        from ..callbacks import Progress, Pruning, Recorder, Samples
        from ..distributed import total
        from ..freeze import freeze
        from ..models.machine import mixed_precision
        from ..report import terminal
        from ..search import is_point
        from ..trainer import SupervisedTrainer, training_settings, whole_weights

        set_seed(self.settings["seed"])
        model = self.loaded.model
        if self.loaded.quantized:
            from peft import prepare_model_for_kbit_training

            given = self.settings["trainer"]
            checkpointing = bool(given.get("activation_checkpointing") or given.get("gradient_checkpointing"))
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        self.model = lora.attach(model, self.plan)
        freeze(self.model)
        self.plan_report = lora.report(self.model, self.plan)
        self.run.write_json("lora_plan.json", self.plan_report)
        if is_main():
            terminal.show(terminal.plan_table(self.plan_report))

        full = self.plan.method == "full"
        precision = mixed_precision(self.loaded.dtype, self.loaded.device, full)
        trainer_settings = {**precision, **self.settings["trainer"]}
        args, callbacks = training_settings(
            trainer_settings,
            output_dir=str(self.run / "checkpoints"),
            seed=self.settings["seed"],
            data_seed=self.settings["seed"],
            report_to=[],
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=trainer_settings.pop("use_cpu", self.loaded.device == "cpu"),
        )
        evaluation = self.settings["evaluation"]
        callbacks.append(Recorder(self.run, self.logger))
        if is_point(self.run.path):
            callbacks.append(Pruning(self.run, self.settings["objective"], self.summary))
        if self.held_out is not None:
            callbacks.append(Samples(self.run, self.logger, self.evaluator, evaluation["samples"], evaluation["sample_steps"]))
        self.trainer = SupervisedTrainer(
            model=self.model,
            args=args,
            train_dataset=self.rows,
            eval_dataset=self.held_out,
            data_collator=self.collator,
            processing_class=self.loaded.processor,
            callbacks=callbacks,
            evaluator=getattr(self, "evaluator", None),
            generate=evaluation["generate"],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.trainer.add_callback(Progress)
        started = time.time()
        result = self.trainer.train()
        self.times["train"] = time.time() - started
        self.weights = whole_weights(self.trainer)
        history = [h["loss"] for h in self.trainer.state.log_history if "loss" in h]
        self.summary |= {
            "steps": self.trainer.state.global_step,
            "samples_per_second": result.metrics["train_samples_per_second"],
            "train_loss": {"first": history[0] if history else None, "last": history[-1] if history else None},
            "supervised_tokens": int(total(self.trainer.supervised_tokens)),
            "effective_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }

    def measure_tuned(self) -> None:
        """Save what was trained, then measure it on the same held-out rows as the base."""
        from ..saving import save_trained

        save_trained(self.run, self.model, self.plan, self.loaded, self.located, self.evaluator.generation_config() if self.held_out else None, self.weights)
        if self.held_out is None:
            return
        started = time.time()
        self.summary["eval_loss"] = self.evaluator.loss(self.model)
        self.summary["metrics"], self.tuned = self.evaluator.measure(self.model)
        self.run.write_lines("eval/tuned.jsonl", self.tuned)
        self.logger.samples(self.summary["steps"], self.tuned[: self.settings["evaluation"]["samples"]], tag="held out")
        values = {"eval_loss": self.summary["eval_loss"], **{f"eval_{k}": v for k, v in self.summary["metrics"].items()}}
        self.logger.scalars(self.summary["steps"], values)
        self.times["measure_tuned"] = time.time() - started

    def finish(self) -> None:
        """Write the summary, the picture and the report, and say how it went."""
        from ..card import write_card
        from ..report import terminal
        from ..report.curve import write_curve
        from ..report.markdown import write_markdown
        from ..report.page import write_report

        self._write_summary("finished")
        if not is_main():
            return
        write_card(self.run)
        write_curve(self.run.path)
        write_report(self.run.path)
        write_markdown(self.run.path)
        self.logger.finish("finished")
        self.run.write_text("DONE", "")
        tables = [terminal.results_table(self.summary)] if self.tuned else []
        terminal.show(*tables, terminal.summary_table(self.summary))
        log.info("report         %s", self.run / "report.html")

    def fail(self, error: BaseException) -> None:
        """Leave a directory that says what happened."""
        self.summary["reason"] = str(error) or type(error).__name__
        status = "pruned" if isinstance(error, Pruned) else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._write_summary(status)
        self.logger.finish(status)

    def _write_summary(self, status: str) -> None:
        from ..environment import peak_memory_mb

        plan = getattr(self, "plan_report", {})
        device = getattr(getattr(self, "loaded", None), "device", "cpu")
        empty = {"steps": 0, "samples_per_second": None, "train_loss": {"first": None, "last": None}, "eval_loss": None}
        empty |= {"base_eval_loss": None, "metrics": {}, "base_metrics": {}, "supervised_tokens": 0, "effective_batch_size": None}
        self.summary = {
            "status": status,
            "name": self.run.name,
            "seconds": round(self.run.seconds, 3),
            **empty,
            **self.summary,
            "trainable_parameters": plan.get("trainable_parameters"),
            "total_parameters": plan.get("total_parameters"),
            "peak_memory_mb": round(peak_memory_mb(device), 1),
            "seed": self.settings["seed"],
            "data_fingerprint": self.prepared.fingerprint,
            "held_out_samples": len(self.held_out) if self.held_out is not None else 0,
            "times": {k: round(v, 3) for k, v in self.times.items()},
        }
        self.run.write_json("summary.json", self.summary)
