"""What a preference objective adds to a training: which rows it can use, the reference's log-probabilities, and its measurements."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapters.convert import changes_base
from ..adapters.frozen import FrozenAdapter
from ..collators.answers import AnswerCollator, other_answers
from ..common.errors import UserError
from ..common.hashing import key_of
from ..common.records import MetricValues
from ..config.settings import Settings, sharded_by
from ..data.augment import describe_transforms
from ..data.prepared import PreparedData
from ..data.sample import has_regions
from ..data.selection import good_rows
from ..evaluation.preferences import AsReference, PreferenceEvaluator, reference_log_probs, without_adapter
from ..feature_cache.cache import CachedCollator
from ..feature_cache.policy import folder_key, identities
from ..feature_cache.store import Store
from ..losses.objectives import Objective
from ..system.distributed import is_main, share
from .context import RunContext

if TYPE_CHECKING:
    from ..data.sample import Sample
    from .load import Base
    from .prepare import TrainingInputs

log = logging.getLogger("mmft")

REFERENCE = "reference"  # the key of a store's only entry


@dataclass
class Preferences:
    """objective: what is trained. collator: of its batches. evaluator: of the held-out rows. before: the scores of the reference, or of the base
    model for an objective without one.
    """

    objective: Objective
    collator: AnswerCollator
    evaluator: PreferenceEvaluator | None = None
    before: MetricValues = field(default_factory=dict)


def usable_rows(
    objective: Objective, prepared: PreparedData, rows: Sequence[Sample], held_out: Sequence[Sample] | None, settings: Settings
) -> tuple[Sequence[Sample], Sequence[Sample] | None]:
    """(training rows, held-out rows) that the objective can use. Raises UserError if a row lacks what it needs."""
    if not objective.PREFERENCE:
        if not prepared.manifest.get("bad"):
            return rows, held_out
        name = f"objective={objective.NAME}"
        return _good_rows(name, rows, "train"), None if held_out is None else _good_rows(name, held_out, str(settings["evaluation"]["split"]))
    name = f"objective={objective.NAME}"
    if transforms := describe_transforms(settings.get("augment")):
        raise UserError(f"{name}: compares answers to one and the same image, and augment.{transforms.split('(')[0]} changes it in every epoch; leave it out")
    if settings["trainer"].get("label_smoothing_factor"):
        raise UserError(f"{name}: trainer.label_smoothing_factor smooths the cross entropy, which this objective does not train; leave it out")
    if settings["trainer"].get("packing"):
        raise UserError(f"{name}: compares answers side by side in a batch, so trainer.packing=true cannot be; trainer.tokens_per_batch=N saves most of the padding")
    if settings["trainer"].get("fold_accumulation") == "always":
        raise UserError(f"{name}: computes each micro-batch by itself, so trainer.fold_accumulation=always cannot be; leave it out")
    for split, own in (("train", rows), (str(settings["evaluation"]["split"]), held_out)):
        _check_answers(objective, prepared, split, own or ())
    return rows, held_out


def _good_rows(objective: str, rows: Sequence[Sample], split: str) -> Sequence[Sample]:
    """The rows without those that are labelled bad. Raises UserError if none is left."""
    good = good_rows(rows)
    if not len(good):
        raise UserError(f"{objective}: all {len(rows)} rows of {split} are labelled bad (label=false); objective=kto learns from such answers")
    if len(good) < len(rows):
        log.info("%-14s %d of %d rows of %s are labelled bad (label=false); objective=kto learns from them, too", "left out", len(rows) - len(good), len(rows), split)
    return good


def _check_answers(objective: Objective, prepared: PreparedData, split: str, rows: Sequence[Sample]) -> None:
    """Raises UserError if rows lack a rejected answer, or a label where that is enough."""
    lacking: list[str] = []
    weighted: list[str] = []
    boxed: list[str] = []
    labels: set[bool | None] = set()
    for i in range(len(rows)):
        row = rows[i]
        if len(row.sha256) != len(row.images):  # the reference is kept by the content of a row
            raise UserError(f"objective={objective.NAME}: {prepared.path}: row {row.id} has no hashes of its images; remove the set, and it is prepared again")
        if not row.rejected and (objective.PAIRS or row.label is None):
            lacking.append(row.id)
        if row.weight != 1 or row.messages[-1].get("weight", 1.0) != 1:
            weighted.append(row.id)
        if row.rejected and has_regions(row.messages[-1:]):
            boxed.append(row.id)
        labels |= {True, False} if row.rejected else {row.label}
    where = f"objective={objective.NAME}: {prepared.manifest['name']}"
    if weighted and split == "train":
        raise UserError(f"{where}: {len(weighted)} of {len(rows)} rows of {split} have a loss weight, e.g. {weighted[0]}; it compares answers of equal weight:"
                        " leave out `weight` (data.columns.weight, data.sources.NAME.loss_weight), or use objective=sft")  # fmt: skip
    if boxed:
        raise UserError(f"{where}: {len(boxed)} of {len(rows)} rows of {split} have boxes in the chosen answer, e.g. {boxed[0]}; a rejected answer is text in which no"
                        " boxes are placed, so the two would differ in how they are written: write boxes as text in both, or use objective=sft")  # fmt: skip
    if lacking:
        what, key = ("rejected answer", "data.columns.rejected") if objective.PAIRS else ("rejected answer and no label", "data.columns.label")
        others = "objective=kto takes single answers with a label, objective=sft trains the answers alone" if objective.PAIRS else "objective=sft trains the answers alone"
        older = "" if prepared.manifest.get("rejected") else f" (if the data has them, {prepared.path} was prepared before mmft read them: remove it)"
        raise UserError(f"{where}: {len(lacking)} of {len(rows)} rows of {split} have no {what}, e.g. {lacking[0]}{older}; {key}=COLUMN names the column, {others}")
    if split == "train" and len(labels) == 1:
        kind, other = ("good", "bad") if labels == {True} else ("bad", "good")
        raise UserError(f"{where}: all {len(rows)} rows of train are labelled {kind}; it learns from the difference to {other} ones")


def prepare_preferences(inputs: TrainingInputs, base: Base, context: RunContext, model: Any) -> Preferences | None:
    """Everything that is computed with the untouched model; None for objective=sft. model: the base, prepared for training, without adapter, or with
    that of lora.start.
    """
    objective = inputs.objective
    if not objective.PREFERENCE:
        return None
    held_out = base.checked.held_out
    others = None
    if objective.MISMATCHED:
        others = {**other_answers(base.rows), **(other_answers(held_out) if held_out is not None else {})}
    collator = AnswerCollator(base.collator, others)
    size = inputs.settings["trainer"].get("per_device_eval_batch_size", 8)
    if objective.REFERENCE:
        rows = [own[i] for own in (base.rows, held_out or ()) for i in range(len(own))]
        collator.reference = _reference(inputs, base, context, model, collator, rows, size)
    found = Preferences(objective, collator)
    if held_out is not None:
        found.evaluator = PreferenceEvaluator(held_out, collator, objective, size, _as_reference(inputs, model) if inputs.start else None)
        if inputs.settings["evaluation"]["base"]:
            found.before = found.evaluator.measure_reference() if objective.REFERENCE else {**found.evaluator.measure(model), "kl": 0.0}
            if _how_reference(inputs) is None:
                del found.before["kl"]
    return found


def attached(inputs: TrainingInputs, preferences: Preferences, model: Any) -> None:
    """Called once the adapter is on the model, before it is trained: a reference that is this adapter as it is now is copied here."""
    if preferences.evaluator is not None and inputs.start is None:
        preferences.evaluator.as_reference = _as_reference(inputs, model)


def _how_reference(inputs: TrainingInputs) -> Literal["off", "first"] | None:
    """How the trained model becomes the reference for a while: with its adapter off, or with the adapter that it began with; None if it cannot.

    The first adapter: with lora.start, and where the initialisation subtracted it from the base weights (PiSSA), so that only both together
    are the base.
    """
    settings = inputs.plan.settings
    if inputs.full or settings.get("bias") not in (None, "none"):
        return None
    if inputs.start is None and not changes_base(settings):
        return "off"
    return None if sharded_by(inputs.settings["trainer"]) else "first"  # no process would hold the whole adapter


def _as_reference(inputs: TrainingInputs, model: Any) -> AsReference | None:
    """What makes the trained model the reference for a while. model: as training begins."""
    how = _how_reference(inputs)
    return without_adapter if how == "off" else FrozenAdapter.of(model).switched if how == "first" else None


def _reference(
    inputs: TrainingInputs, base: Base, context: RunContext, model: Any, collator: AnswerCollator, rows: Sequence[Sample], size: int
) -> dict[str, float]:
    """The log-probabilities of the reference model: computed once, and kept below output_dir/cache for every run with the same rows and base.

    The reference is the base model, or the adapter of lora.start. They are found again by what decides them: the model with its precision, the
    rendering of the rows, all rows in order, and the batch size, since the shape of a batch changes the last digits.
    """
    digest = hashlib.sha256("\n".join(f"{row.content} {row.rejected!r}" for row in (rows[i] for i in range(len(rows)))).encode("utf-8", "surrogatepass")).hexdigest()
    plain = base.collator.collator if isinstance(base.collator, CachedCollator) else base.collator
    described_by = {
        "model and rows": identities(inputs.settings, base.loaded, plain),  # type: ignore[arg-type]
        "rows": digest, "batch": size, "mismatched": inputs.objective.MISMATCHED, "whole model": inputs.full,
        **({"start": inputs.start.sha256} if inputs.start else {}),
    }  # fmt: skip
    folder = Path(inputs.settings["output_dir"]) / "cache" / f"{REFERENCE}-{folder_key(described_by)}"
    return context.memo.once(key_of(REFERENCE, str(folder)), lambda: share(lambda: _kept(folder, described_by, model, collator, rows, size, str(inputs.start.path) if inputs.start else "the base model")))


def _kept(folder: Path, described_by: dict[str, Any], model: Any, collator: AnswerCollator, rows: Sequence[Sample], size: int, name: str) -> dict[str, float]:
    """The log-probabilities in a folder, computed now if it does not hold them. name: of the model, for the log."""
    import torch

    store, began = Store(folder, described_by), time.time()
    with store.building():
        known = REFERENCE in store
        if not known:
            values = reference_log_probs(model, collator, rows, size, is_main())
            contents = torch.frombuffer(bytearray(b"".join(map(bytes.fromhex, values))), dtype=torch.uint8).view(-1, 32)
            store.add({REFERENCE: {"content": contents, "log_probs": torch.tensor(list(values.values()))}})
    entry = store[REFERENCE]
    keys = [bytes(row).hex() for row in entry["content"].numpy()]
    where = f"read from {folder}" if known else f"computed in {time.time() - began:.1f} s"
    log.info("%-14s log-probabilities of %d answers under %s, %s", "reference", len(keys), name, where)
    return dict(zip(keys, entry["log_probs"].tolist(), strict=True))
