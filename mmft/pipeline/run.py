"""One training, stage by stage: from a composed config to a finished run directory."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..adapters.convert import write_start
from ..adapters.save import save_trained
from ..common.errors import Pruned, UserError
from ..common.files import read_json
from ..common.records import Summary
from ..config.build import build
from ..config.snapshot import snapshot
from ..config.validate import to_plain
from ..data.augment import build_transforms
from ..data.mix import PreparedMix
from ..data.selection import parts_of
from ..evaluation.kept import kept_results, merge
from ..evaluation.measurement import Measurement, base_results, measure, tuned_results
from ..loggers.base import Logger
from ..losses.policy import Grpo
from ..models.hub import Located
from ..reports import terminal
from ..runs.base_model import check_base
from ..runs.directory import Run
from ..runs.environment import environment, process_started, version
from ..runs.parents import Parent, chain_of, check_same, extended, resolve_names
from ..system.disk import is_disk_full
from ..system.distributed import is_main, share
from ..system.memory import ADVICE, is_out_of_memory
from ..system.signals import Listener, listening
from ..training.arguments import training_settings
from ..training.checkpoints import bytes_on_disk
from ..training.disk_space import check_disk, disk_need
from ..training.loop import Policy, TrainingJob, TrainingLoop
from ..training.resume import Resumed, is_run_of, reopen
from .attach import Adapted, attach
from .context import RunContext
from .finish import complete_summary, show_result, status_of, write_reports
from .load import Base, load_base, use_feature_cache
from .measure import kept_files, measure_base, measure_kept_base, read_base_measurement, write_base_measurement
from .notify import notify
from .prepare import TrainingInputs, prepare_inputs

log = logging.getLogger("mmft")


class Training:
    """One training. The stages are methods in the order in which `run` calls them; each returns what the next ones need.

    times: seconds by stage, for summary.json. summary: the values for summary.json that stages have produced so far.
    """

    def __init__(self, inputs: TrainingInputs, run: Run, logger: Logger, context: RunContext, audit: bool, times: dict[str, float]):
        self.inputs, self.run_dir, self.logger, self.context, self.audit = inputs, run, logger, context, audit
        self.extends = [record] if (record := extended(run)) else []  # the run that this one is the rest of
        self.times = times
        self.device = "cpu"
        self.summary: Summary = {
            "seed": inputs.settings["seed"], "data_fingerprint": inputs.prepared.fingerprint, "held_out_samples": len(inputs.held_out or ()), "times": times,
        }  # fmt: skip

    def run(self, listener: Listener, resumed: Resumed | None, run_bytes: int, imported: bool) -> None:
        """All stages. run_bytes: what the run will leave on the disk. imported: this process had to import the libraries first."""
        base = self.load(resumed, run_bytes)
        before, kept_before = self.measure_base(base, resumed)
        with self.timed("cache"):
            adapted = attach(self.inputs, base, self.context, run_bytes)
        if adapted.preferences is not None:
            self.summary["base_metrics"] = {**self.summary.get("base_metrics", {}), **adapted.preferences.before}
        self.fit(base, adapted, listener, resumed, imported)
        self.measure_tuned(base, adapted, before, kept_before)
        self.finish()

    def load(self, resumed: Resumed | None, run_bytes: int) -> Base:
        """Load the base, record the environment, start the logger, open the feature cache."""
        inputs, run = self.inputs, self.run_dir
        with self.timed("load"):
            base = load_base(inputs, self.context, self.audit)
            self.device = base.loaded.device
            env = environment(base.loaded, inputs.prepared, inputs.settings["seed"])
            env["max_new_tokens"] = base.limit.max_new_tokens
            if base.kept:
                env["kept_max_new_tokens"] = {kept.name: evaluator.limit.max_new_tokens for kept, evaluator in base.kept}
            self.summary |= {"max_new_tokens": base.limit.max_new_tokens, "longest_reference": base.limit.longest}
            if inputs.rewards:
                env["packages"]["trl"] = version("trl")
            if parents := [p.record() for p in (*inputs.below, *([inputs.start] if inputs.start else []))] + self.extends:
                env["parents"] = parents
            if resumed is None or not (run / "env.json").is_file():
                run.write_json("env.json", env)
            else:  # env.json keeps what the run began on; each later part is added
                run.append_line("resumed.jsonl", {"step": resumed.step, **env})
            self.logger.start(run.path, run.name, inputs.settings)
        self.summary["held_out_samples"] = len(base.checked.held_out or ())
        if base.checked.dropped:
            self.summary["dropped_rows"] = len(base.checked.dropped)
            run.write_lines("dropped_rows.jsonl", [{"split": split, "id": p.row, "tokens": p.tokens} for split, p in base.checked.dropped])
        if not base.loaded.quantized and not inputs.rewards:  # GRPOTrainer takes pixels
            with self.timed("cache"):
                use_feature_cache(inputs, base, self.context, run_bytes)
        return base

    def measure_base(self, base: Base, resumed: Resumed | None) -> tuple[Measurement | None, dict[str, Measurement]]:
        """(the base model on the held-out rows, on each kept set), measured now, or read where a resumed run has measured it before."""
        run, wanted = self.run_dir, self.inputs.settings["evaluation"]["base"]
        with self.timed("measure_base"):
            measured = read_base_measurement(run) if resumed and base.evaluator and wanted else None
            measured = measured or measure_base(self.inputs, base, self.context)
            earlier = {k.name: m for k, _ in base.kept if (m := read_base_measurement(run, kept_files(k.name, "base")))} if resumed and wanted else {}
            kept = earlier if len(earlier) == len(base.kept) else measure_kept_base(self.inputs, base, self.context)
        if measured is None and not kept:
            del self.times["measure_base"]
        if measured is not None:
            self.summary |= base_results(measured)
            write_base_measurement(run, measured)
        for one, evaluator in base.kept:
            if one.name in kept:
                merge(self.summary, kept_results(one, evaluator, kept[one.name], None))
                write_base_measurement(run, kept[one.name], kept_files(one.name, "base"))
        return measured, kept

    def fit(self, base: Base, adapted: Adapted, listener: Listener, resumed: Resumed | None, imported: bool) -> None:
        """Train, then save the trained weights."""
        inputs, run, context, preferences = self.inputs, self.run_dir, self.context, adapted.preferences
        run.write_json("lora_plan.json", adapted.report)
        if adapted.initial is not None and run.writes:
            write_start(run.path, adapted.initial)
        self.summary |= {"trainable_parameters": adapted.report["trainable_parameters"], "total_parameters": adapted.report["total_parameters"]}
        loop = TrainingLoop(TrainingJob(
            run=run, logger=self.logger, settings=inputs.settings, loaded=base.loaded, model=adapted.model, rewrites=adapted.rewrites, full=inputs.full,
            collator=preferences.collator if preferences else base.collator, rows=base.rows, sizes=base.checked.sizes, held_out=base.checked.held_out, evaluator=base.evaluator, listener=listener, mixing=base.mixing, cached=base.cached is not None,
            checkpoint=resumed.checkpoint if resumed else None, member=context.member, reporter=context.reporter, sharers=context.sharers,
            objective=preferences.objective if preferences else None, preferences=preferences.evaluator if preferences else None,
            policy=Policy(inputs.objective, inputs.rewards, base.limit.max_new_tokens) if isinstance(inputs.objective, Grpo) else None,
        ))  # fmt: skip
        try:
            loop.run()
        except BaseException as error:
            self.summary |= loop.facts()
            if isinstance(error, Pruned):
                self.summary["eval_loss"] = loop.last_eval_loss()
            raise
        self.summary |= loop.finished_facts()
        self._describe_sources(base)
        self.times["train"] = loop.seconds
        if imported and loop.first_step_at:  # what a user waits for; later runs of a process start warm
            self.times["to_first_step"] = loop.first_step_at - process_started()
        assert loop.trainer is not None
        state_dict = loop.trainer.gathered_weights()
        if run.writes:
            settings = base.evaluator.generation_config() if base.evaluator else None
            save_trained(
                run.path, adapted.model, inputs.plan, base.loaded.processor, _base_of(inputs.located, inputs.below), settings, state_dict, adapted.initial,
                chain_of(read_json(run / "env.json")),
            )

    def _describe_sources(self, base: Base) -> None:
        """Add to each source of a mix what was planned, to what was trained; also sources that are only held out."""
        if not isinstance(self.inputs.prepared, PreparedMix) or base.mixing is None:
            return
        trained, held_out = self.summary.get("sources") or {}, parts_of(base.checked.held_out or ())
        self.summary["sources"] = {
            name: {
                "weight": source.weight, "training_rows": base.mixing.sizes.get(name, 0), "draws": base.mixing.counts.get(name, 0),
                "held_out": len(held_out.get(name, ())), "rows": 0, "tokens": 0, **trained.get(name, {}),
            } for name, source in self.inputs.prepared.mix.sources.items()
        }  # fmt: skip

    def measure_tuned(self, base: Base, adapted: Adapted, before: Measurement | None, kept_before: dict[str, Measurement]) -> None:
        """Measure the tuned model on the same rows as the base."""
        if base.evaluator is None and not base.kept:
            return
        with self.timed("measure_tuned"):
            measured = measure(base.evaluator, adapted.model) if base.evaluator else None
            kept = {one.name: measure(evaluator, adapted.model) for one, evaluator in base.kept}
            compared = adapted.preferences.evaluator if adapted.preferences else None
            preferred = compared.measure(adapted.model) if compared else {}
        with self.timed("compare"):
            if measured is not None:
                self.summary |= tuned_results(self.inputs.metrics, measured, before)
            for one, evaluator in base.kept:
                merge(self.summary, kept_results(one, evaluator, kept_before.get(one.name), kept[one.name]))
                self.run_dir.write_lines(f"eval/{kept_files(one.name, 'tuned')}.jsonl", kept[one.name].answers)
        if compared is not None:
            self.summary["metrics"] = {**self.summary.get("metrics", {}), **preferred}
            self.summary["metric_info"] = {**self.summary.get("metric_info", {}), **compared.info(preferred)}
        if measured is not None:
            self._log_tuned(measured)

    def _log_tuned(self, measured: Measurement) -> None:
        steps = self.summary["steps"]
        self.run_dir.write_lines("eval/tuned.jsonl", measured.answers)
        self.logger.samples(steps, measured.answers[: self.inputs.settings["evaluation"]["samples"]], tag="held out")
        self.logger.scalars(steps, {"eval_loss": measured.loss, **{f"eval_{k}": v for k, v in self.summary["metrics"].items()}})

    def finish(self) -> None:
        """Write summary and reports, and show them."""
        summary = self.write_summary("finished")
        if is_main():
            write_reports(self.run_dir, self.logger)
            show_result(self.run_dir, summary, joint=self.context.member is not None)
            notify(self.run_dir, "finished", summary["eval_loss"])

    def fail(self, error: BaseException) -> None:
        """Leave a directory that says what happened."""
        self.summary["reason"] = str(error) or type(error).__name__
        status = status_of(error)
        summary = self.write_summary(status)
        self.logger.finish(status)
        notify(self.run_dir, status, summary["eval_loss"])

    def write_summary(self, status: str) -> Summary:
        self.summary["times"] = {k: round(v, 3) for k, v in self.times.items()}
        summary = complete_summary(self.run_dir, status, self.summary, self.device)
        self.run_dir.write_json("summary.json", summary)
        return summary

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's time to the stage's."""
        began = time.time()
        try:
            yield
        finally:
            self.times[stage] = self.times.get(stage, 0.0) + time.time() - began


def train(cfg: DictConfig, overrides: list[str], context: RunContext, parent: Mapping[str, Any] | None, audit: bool, imported: bool) -> Run:
    """Train what the config says, into a new run directory, or go on with an unfinished run of the same config. Raises UserError.

    overrides: the words of the command, recorded in the run. parent: the run that this one repeats (parent.json). imported: this process
    had to import the libraries first.
    """
    resolve_names(cfg)
    times = {"import": time.time() - process_started()} if imported else {}
    # everything light is built and checked before a weight is read and before anything is written
    logger = build(cfg.logger, "logger") if is_main() else Logger(hardware=False)
    training_settings(to_plain(cfg.trainer), output_dir=os.devnull)
    build_transforms(to_plain(cfg.get("augment")) or {})
    wanted = Path(cfg.run_dir) if cfg.run_dir else None
    earlier = wanted if wanted and share(lambda: is_run_of(wanted, cfg)) else None
    if earlier and share(lambda: (earlier / "DONE").is_file()):  # a job that was killed after its last line and queued again
        log.info("%-14s %s is finished already; mmft report run=%s shows it, mmft reproduce run=%s trains it again", "run", *[earlier] * 3)
        return Run(earlier)
    context.begin_run()
    began = time.time()
    inputs = prepare_inputs(cfg, context)
    times["prepare"] = time.time() - began
    need = disk_need(inputs.skeleton, inputs.plan, inputs.settings, inputs.located.folder, inputs.epoch_rows, len(inputs.held_out or ()))
    place = wanted or Path(cfg.output_dir)
    if earlier and (earlier / "env.json").is_file():
        check_base(inputs.located, Run(earlier).read_json("env.json")["model"], earlier)
        check_same(Run(earlier), [*inputs.below, *([inputs.start] if inputs.start else [])])
    elif earlier and (record := extended(earlier)):
        data = (read_json(Path(record["path"]) / "env.json").get("data") or {}).get("fingerprint")
        if data not in (None, inputs.prepared.fingerprint):
            raise UserError(f"run={record['path']}: its data has changed since (then {data}, now {inputs.prepared.fingerprint}); lora.start=RUN goes on with other data")
    resumed = share(lambda: reopen(earlier)) if earlier else None
    share(lambda: check_disk(place, need, context.runs_at_once, bytes_on_disk(place) if resumed else 0))
    words = [cfg.name or Path(inputs.located.path.split(":")[-1]).name, "" if cfg.name else inputs.prepared.manifest["name"]]
    run = resumed.run if resumed else Run(share(lambda: Run.create(cfg.output_dir, words, cfg.run_dir).path))
    log.info("run directory  %s", run.path)
    for text in inputs.prepared.describe():
        log.info("%-14s %s", "data", text)
    if is_main() and context.member is None:  # before the weights are read: a plan that is not what was meant can still be stopped
        terminal.show(terminal.plan_table(inputs.planned))
    with run.locked(), listening(context.listener) as listener:
        if resumed is None:
            run.write_text("snapshot.yaml", snapshot(cfg))
            run.write_text("overrides.txt", "".join(f"{word}\n" for word in overrides))
        if parent and resumed is None:
            run.write_json("parent.json", parent)
        training = Training(inputs, run, logger, context, audit and resumed is None, times)
        try:
            training.run(listener, resumed, need.bytes * context.runs_at_once, imported)
        except BaseException as error:
            _record_failure(training, error)
            raise
    return run


def rehearse(cfg: DictConfig, context: RunContext, measure_first: bool) -> None:
    """Do what comes before the first step of a run and keep its results in the context, for processes that are forked from here.

    Nothing is written. measure_first: audit and measure the base model too, as runs do that are not resumed.
    """
    inputs = prepare_inputs(cfg, context)
    base = load_base(inputs, context, measure_first and bool(cfg.task.get("audit", False)))
    if not base.loaded.quantized and not inputs.rewards:
        use_feature_cache(inputs, base, context, 0)
    if measure_first:
        measure_base(inputs, base, context)
        measure_kept_base(inputs, base, context)
    attach(inputs, base, context)


def _record_failure(training: Training, error: BaseException) -> None:
    """Write the summary of a failed run. Raises UserError in place of out-of-memory and disk-full errors."""
    run = training.run_dir
    try:
        training.fail(error)
    except OSError as write_error:
        if not is_disk_full(write_error):
            raise
        log.warning("%-14s no room for %s", "disk", run / "summary.json")
    if is_out_of_memory(error):
        raise UserError(f"{run.path}: out of memory ({' '.join(str(error).split())[:160]}): try {ADVICE}") from None
    if is_disk_full(error):
        why = getattr(error, "strerror", error)
        raise UserError(f"{run.path}: {why}; its checkpoints are as they were: free some, and go on with mmft resume run={run.path}") from None


def _base_of(located: Located, below: Sequence[Parent]) -> tuple[str, str | None]:
    """(path, revision) of the base model for adapter_config.json; over merged adapters a text that no library can take for a model's name."""
    on_hub = located.hub in ("huggingface", "modelscope")
    path = located.path if on_hub else str(located.folder)
    if below:
        return f"{path} with {' and '.join(p.path for p in below)} merged into it", None
    return path, located.revision if located.hub == "huggingface" else None
