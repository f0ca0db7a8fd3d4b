"""One training, station by station: load, measure the base, attach, fit, measure again, finish."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import Preempted, Pruned, UserError
from ..models.load import build_collator, load_model
from ..runs.directory import Run
from ..system.distributed import is_main

log = logging.getLogger("mmft")

SIZES = ("r", "lora_alpha", "lora_dropout")  # keys of an adapter that change numbers, and not what is computed


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
    resumed: Any = None  # resuming.py, of a run that goes on
    listener: Any = None  # signals.py
    need: int = 0  # bytes that the run itself will leave on the disk
    cache: Any = None  # features/cache.py, where what is frozen is computed once

    def load(self) -> None:
        """Read weights and processor, build collator and evaluator, look at the first row."""
        from transformers import set_seed

        from ..audit.checks import quick, refuse
        from ..evaluation.evaluate import Evaluator
        from ..runs.environment import environment

        set_seed(self.settings["seed"])
        started = time.time()
        full = self.plan.method == "full"
        self.loaded = self.shared.load(self.family, full, self.located) if self.shared else load_model(self.family, full_training=full, located=self.located)
        for note in self.loaded.notes:
            log.info("%-14s %s", "model", note)
        model = self.loaded.model
        self.collator = build_collator(self.cfg.collator, self.family, self.loaded)
        self.collator([self.rows[0]])  # a collator that does not fit the model says so now
        if self.audit:
            refuse(self._once("audit", lambda: quick(model, self.collator, self.rows)), "; audit=false trains it all the same")
        evaluation = self.settings["evaluation"]
        if self.held_out is not None:
            loss_batch = self.settings["trainer"].get("per_device_eval_batch_size", 8)
            self.evaluator = Evaluator(
                self.held_out, self.collator, self.settings["generation"], evaluation["batch_size"], loss_batch, progress=is_main()
            )
        now = environment(self.loaded, self.prepared, self.settings["seed"])
        if self.resumed is None or not (self.run / "env.json").is_file():
            self.run.write_json("env.json", now)
        else:  # what it began on, and what each later part of it ran on
            self.run.append_line("resumed.jsonl", {"step": self.resumed.step, **now})
        self.logger.start(self.run.path, self.run.name, self.settings)
        self.times["load"] = time.time() - started
        if not self.loaded.quantized:  # preparing a quantised model for training casts some of its weights: cached behind that
            self.cache_features()

    def cache_features(self) -> None:
        """Where the vision part is frozen: its features of the held-out images, and from here on batches made of features."""
        from ..feature_cache.cache import CachedCollator, Remembered
        from ..feature_cache.policy import needed, opened

        started = time.time()
        self.cached_rows = needed(self.settings, len(self.rows))
        self.cache = opened(self.settings, self.loaded, self.plan, self.collator, self.prepared, self.rows, self.cached_rows, self.shared, self.need)
        if self.cache is not None:
            self.collator = CachedCollator(self.collator, self.cache)
            self.rows = self.shared.rows(self.prepared, lambda: Remembered(self.rows)) if self.shared else Remembered(self.rows)
            if self.held_out is not None:
                self.evaluator.collator = self.collator
                for generation in (False, True)[: 1 + self.collator.generates]:
                    self.collator.fill(self.held_out, generation)
        self.times["cache"] = time.time() - started

    def measure_base(self) -> None:
        """The untouched model on the held-out rows, before an adapter or a training step can change it."""
        if self.held_out is None or not self.settings["evaluation"]["base"]:
            return
        started = time.time()

        def measure() -> tuple[float, dict[str, float], list[dict[str, Any]]]:
            return self.evaluator.loss(self.loaded.model), *self.evaluator.measure(self.loaded.model)

        if self.resumed and (self.run / "base.json").is_file():
            known = self.run.read_json("base.json")
            found = known["loss"], known["metrics"], [json.loads(row) for row in (self.run / "eval" / "base.jsonl").read_text(encoding="utf-8").splitlines()]
        else:
            s = self.settings
            rows = (s["evaluation"]["split"], s["evaluation"]["max_samples"], s["evaluation"]["batch_size"], s["trainer"].get("per_device_eval_batch_size"))
            found = self._once("base", measure, s["generation"], rows, s["seed"] if s["generation"].get("do_sample") else None)
        self.summary["base_eval_loss"], self.summary["base_metrics"], self.base = found
        self.run.write_lines("eval/base.jsonl", self.base)
        self.run.write_json("base.json", {"loss": found[0], "metrics": found[1]})
        self.times["measure_base"] = time.time() - started

    def _once(self, what: str, ask: Any, *more: Any) -> Any:
        """What `ask()` finds out about the untouched model and this set, asked once for all points of a sweep that agree in them and in `more`."""
        from ..common.hashing import key_of

        if self.shared is None:
            return ask()
        full = self.plan.method == "full"  # it may be loaded in another precision
        return self.shared.measure(key_of(what, self.settings["model"], self.settings["collator"], full, self.located.revision, self.prepared.fingerprint, *more), ask)

    def attach(self) -> None:
        """The adapter, over a model of which nothing else is trained; what is frozen is computed for the training rows."""
        from transformers import set_seed

        from ..adapters import lora
        from ..adapters.freeze import freeze

        set_seed(self.settings["seed"])
        model = self.loaded.model
        if self.loaded.quantized:
            from peft import prepare_model_for_kbit_training

            given = self.settings["trainer"]
            checkpointing = bool(given.get("activation_checkpointing") or given.get("gradient_checkpointing"))
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        self.model = lora.attach(model, self.plan, self.settings["seed"])
        freeze(self.model)
        if self.loaded.quantized:
            self.cache_features()
        if self.cache is not None:
            self._cache_training_rows()
        self._narrow()

    def fit(self) -> None:
        """Train what was attached."""
        from ..adapters import lora
        from ..reports import terminal
        from ..runs.environment import process_started
        from ..system.distributed import total
        from ..training.loop import Steps
        from ..training.trainer import whole_weights

        seat = self.shared.seat if self.shared else None
        self.plan_report = lora.report(self.model, self.plan)
        self.run.write_json("lora_plan.json", self.plan_report)
        if is_main() and seat is None:
            terminal.show(terminal.plan_table(self.plan_report))

        steps = Steps(self, seat)
        steps.run()
        self.trainer = steps.trainer
        self.times["train"] = steps.seconds + self.trainer.seconds_before
        if "import" in self.times and steps.first:  # what a user waits for; later points of a process start warm
            self.times["to_first_step"] = steps.first - process_started()
        self.weights = whole_weights(self.trainer)
        self.summary |= {
            "samples_per_second": round(steps.samples / max(self.times["train"], 1e-9), 3),
            "trained_together": seat.size if seat else 1,  # the time and the memory are those of so many points at once
            "supervised_tokens": int(total(self.trainer.supervised_tokens)),
        }

    def _narrow(self) -> None:
        """Where a LoRA is trained, its last layer computes only what is read."""
        from ..common.tensors import to_device
        from ..rewrites.last_layer import checked

        trainer = self.settings["trainer"]
        if self.plan.method == "full" or any(trainer.get(key) for key in ("torch_compile", "fsdp", "deepspeed")):
            return
        batch = to_device(self.collator([self.rows[0]]), self.model.device)
        adapter = {k: v for k, v in self.settings["lora"].items() if k not in SIZES}
        self.model.places = checked(self.model, batch, lambda compare: self._once("last layer", compare, adapter))

    def _cache_training_rows(self) -> None:
        """All of them, where all will be seen; else each when its turn comes."""
        from tqdm import tqdm

        from ..feature_cache.policy import live

        self.model.train()
        if (reason := live(self.model)) is not None:
            raise UserError(f"vision_cache: {reason}, so features cannot be kept; use vision_cache=off")
        self.model.eval()
        started = time.time()
        if self.cached_rows == len(self.rows):
            bar = None if is_main() and len(self.rows) > 64 else True
            self.collator.fill(tqdm((self.rows[i] for i in range(len(self.rows))), total=len(self.rows), desc="features", leave=False, disable=bar), False)
        self.times["cache"] += time.time() - started

    def measure_tuned(self) -> None:
        """Save what was trained, then measure it on the same held-out rows as the base."""
        from ..adapters.save import save_trained

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
        from ..export.model_card import write_card
        from ..reports import terminal
        from ..reports.curve import write_curve
        from ..reports.markdown import write_markdown
        from ..reports.page import write_report

        self._write_summary("finished")
        if not is_main():
            return
        write_card(self.run)
        write_curve(self.run.path)
        write_report(self.run.path)
        write_markdown(self.run.path)
        self.logger.finish("finished")
        self.run.write_text("DONE", "")
        if self.shared and self.shared.seat:
            log.info("%-14s eval loss %s, report %s", "finished", self.summary["eval_loss"], self.run / "report.html")
            return
        tables = [terminal.results_table(self.summary)] if self.tuned else []
        terminal.show(*tables, terminal.summary_table(self.summary))
        log.info("report         %s", self.run / "report.html")

    def fail(self, error: BaseException) -> None:
        """Leave a directory that says what happened."""
        self.summary["reason"] = str(error) or type(error).__name__
        status = "pruned" if isinstance(error, Pruned) else "preempted" if isinstance(error, Preempted) else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._write_summary(status)
        self.logger.finish(status)

    def _write_summary(self, status: str) -> None:
        from ..runs.environment import peak_memory_mb

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
