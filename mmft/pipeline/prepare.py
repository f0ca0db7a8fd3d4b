"""Stage 1: everything a training needs before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..adapters.methods import METHODS, check_base
from ..adapters.plan import AdapterPlan, plan_adapter
from ..adapters.report import planned_report
from ..adapters.starts import check_start_base
from ..adapters.stored import check_start, read_adapter
from ..collators.box_styles import check_whole_images, find_style, no_style
from ..common.errors import UserError
from ..common.hashing import key_of
from ..common.records import PlanReport
from ..config.build import build
from ..config.settings import Section, Settings, sharded_by
from ..config.validate import to_plain
from ..data.mix import mixing_of
from ..data.mixing import Mixing
from ..data.prepare import prepared_data
from ..data.prepared import PreparedData
from ..data.selection import good_rows, split_rows
from ..evaluation.choose import check_choices
from ..evaluation.kept import KeptSet, kept_sets
from ..evaluation.metrics.base import MetricSet
from ..evaluation.metrics.defaults import metric_set
from ..evaluation.rewards import Reward
from ..losses.objectives import Objective, Sft
from ..models.families.base import Family
from ..models.hub import Located
from ..models.load import load_processor, load_skeleton, locate_model
from ..models.quantization import saved_quantization
from ..runs.parents import START, Parent, check_below, check_sits_on, find_adapter, find_below
from ..training.compiled import check_compile
from ..training.ema import check_ema
from ..training.rates import check_rates, rate_notes, rate_of
from .context import RunContext
from .policy import check_policy_keys, policy_rewards
from .preferences import usable_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingInputs:
    """The settings and data of a training, its model without weights, and the plan of its adapter. mixing: of a mix, the draws of an epoch.

    objective: what is learned from the rows. held_out: with the rows that are labelled bad, if the objective compares. start: the adapter to go on
    with. below: the adapters merged into the base. planned: what is trained, by part. rewards: of answers that are sampled in training; [] where
    none are.
    """

    cfg: DictConfig
    settings: Settings
    family: Family
    prepared: PreparedData
    rows: Sequence[Any]
    held_out: Sequence[Any] | None
    located: Located
    skeleton: torch.nn.Module
    plan: AdapterPlan
    metrics: MetricSet
    kept: list[KeptSet] = dataclasses.field(default_factory=list)
    mixing: Mixing | None = None
    objective: Objective = dataclasses.field(default_factory=Sft)
    start: Parent | None = None
    below: list[Parent] = dataclasses.field(default_factory=list)
    planned: PlanReport = dataclasses.field(default_factory=lambda: PlanReport())
    rewards: list[Reward] = dataclasses.field(default_factory=list)

    @property
    def epoch_rows(self) -> int:
        """Rows that are trained in an epoch."""
        return len(self.rows) if self.mixing is None else self.mixing.draws

    @property
    def full(self) -> bool:
        """Whether the whole model is trained, not an adapter."""
        return self.plan.method == "full"

    def base_key(self, what: str, *more: object) -> str:
        """A key that is equal for two runs whose base model gives the same result for `what`."""
        s = self.settings
        return key_of(what, s["model"], s["collator"], self.full, self.located.revision, [p.sha256 for p in self.below], self.prepared.fingerprint, *more)


def prepare_inputs(cfg: DictConfig, context: RunContext) -> TrainingInputs:
    """Prepare the data, find the model's files, plan the adapter. Raises UserError."""
    settings: Settings = to_plain(cfg)
    family: Family = build(cfg.model, "model")
    objective: Objective = build(settings["objective"], "objective")
    check_policy_keys(objective, settings)
    check_compile(settings)
    prepared = context.memo.once(key_of("prepared", settings["data"], settings["output_dir"]), lambda: prepared_data(cfg))
    rows, held_out = usable_rows(objective, prepared, *split_rows(prepared, settings["evaluation"]), settings)
    measured_rows = good_rows(held_out) if held_out is not None and prepared.manifest.get("bad") else held_out
    mixing = mixing_of(prepared, rows)
    _check_order(settings, mixing)
    metrics = metric_set(settings.get("metrics"))
    rewards = policy_rewards(objective, metrics, rows, mixing, settings)
    check_choices(settings["evaluation"], measured_rows or (), str(settings["evaluation"]["split"]))
    metrics.check(measured_rows or (), answer=settings["evaluation"].get("answer", "generate"))
    kept = kept_sets(settings, context.memo.once)
    for measured in (metrics, *(k.metrics for k in kept)):
        measured.check_training()
    located, skeleton = locate_and_outline(family, context)
    check_boxes(prepared, family, located, skeleton.config.model_type)
    plan = plan_adapter(skeleton, settings["lora"])
    check_quantised(plan, family, skeleton, sharded_by(settings["trainer"]))
    start, below = find_parents(settings, family, located, plan)
    planned = plan_report(skeleton, plan, settings["trainer"])
    return TrainingInputs(cfg, settings, family, prepared, rows, held_out, located, skeleton, plan, metrics, kept, mixing, objective, start, below, planned, rewards)


def plan_report(skeleton: torch.nn.Module, plan: AdapterPlan, trainer: Section) -> PlanReport:
    """What will be trained in each part and at which rate, from a model without weights. Raises UserError for a rate that acts on nothing."""
    report = planned_report(skeleton, plan, fixed_a=bool(trainer.get("lora_fa")))
    trained = [row for row in report["rows"] if row["trainable"]]
    check_ema(trainer)
    check_rates(trainer, [row["part"] for row in trained], plan.settings if plan.method == "lora" else None, plan.adapter)
    for row in trained:
        row["rate"] = rate_of(trainer, row["part"])
    report["notes"] = [*plan.notes, *rate_notes(trainer)]
    return report


def check_quantised(plan: AdapterPlan, family: Family, skeleton: Any, sharded: str | None) -> None:
    """Raises UserError for an adapter that peft does not train over a base in so few bits, or that cannot begin on this base. sharded: as `sharded_by` says."""
    if plan.method == "lora":
        asked = next((bits for key, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)) if (family.quantization or {}).get(key)), None)
        saved = saved_quantization(skeleton.config)
        check_base(METHODS[plan.adapter], saved.bits if saved else asked)
        check_start_base(plan.settings, asked is not None or saved is not None, saved is not None, sharded)


def find_parents(settings: Settings, family: Family, located: Located, plan: AdapterPlan) -> tuple[Parent | None, list[Parent]]:
    """(the adapter of lora.start, those of model.adapters), checked as far as files without weights tell. Raises UserError."""
    below = find_below(family.adapters or [], settings["output_dir"], family.hub)
    check_below(below, family, located)
    word = settings["lora"].get("start")
    if word is None:
        return None, below
    start = find_adapter(str(word), START, "lora.start", settings["output_dir"], family.hub)
    if settings["run_dir"] and start.folder.resolve().is_relative_to(Path(settings["run_dir"]).resolve()):
        raise UserError(f"lora.start={word}: lies in run_dir={settings['run_dir']}, the run that is to be trained; it cannot be its own start, nor the reference of its objective")
    check_sits_on(start, located, below)
    check_start(read_adapter(start.folder), plan, start.path)
    return start, below


def _check_order(settings: Settings, mixing: Mixing | None) -> None:
    """Raises UserError for an order of rows that draws from the sources of a mix would not keep."""
    order = settings["trainer"].get("train_sampling_strategy")
    if mixing is not None and not mixing.every_row_once and order not in (None, "random", "group_by_length"):
        raise UserError(
            f"trainer.train_sampling_strategy={order}: rows that are drawn by weight come in a random order; use random or group_by_length,"
            " or leave out the weights and data.draws"
        )


def check_boxes(prepared: PreparedData, family: Family, located: Located, model_type: str) -> None:
    """Raises UserError if rows hold boxes and it is not known how the model writes them, or it would not see whole images; or for an unknown model.boxes."""
    style, rows = find_style(family.boxes, model_type), prepared.manifest.get("boxes", 0)
    if style is None and rows:
        raise UserError(f"{prepared.manifest['name']}: {rows} rows hold boxes, and {no_style(model_type)}")
    if rows:
        check_whole_images(load_processor(family, located))


def locate_and_outline(family: Family, context: RunContext) -> tuple[Located, torch.nn.Module]:
    """(the model's files, the model without weights), found once for each model config. Raises UserError."""
    identity = (type(family).__name__, dataclasses.asdict(family))
    located = context.memo.once(key_of("located", identity), lambda: locate_model(family))
    return located, context.memo.once(key_of("skeleton", identity), lambda: load_skeleton(family, located))
