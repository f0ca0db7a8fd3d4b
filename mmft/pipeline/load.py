"""Stage 2: load the base model, build collator and evaluator, audit two rows; keep features of frozen parts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..audit.checks import quick_checks, raise_failed
from ..collators.answers import AnswerCollator
from ..collators.base import Collator
from ..collators.types import BatchMaker
from ..common.errors import UserError
from ..common.hashing import key_of
from ..data.augment import augment_rows
from ..data.mix import mixing_of
from ..data.mixing import Mixing
from ..data.selection import good_rows, spread
from ..evaluation.choose import Chooser
from ..evaluation.evaluate import Evaluator
from ..evaluation.kept import KeptSet
from ..evaluation.token_limit import TokenLimit, token_limit
from ..feature_cache.cache import CachedCollator, RowsInMemory
from ..feature_cache.policy import open_cache, rows_seen, why_forbidden, why_not_frozen
from ..models.load import Loaded, build_collator
from ..system.console import shows_progress
from ..system.distributed import is_main
from ..training.compiled import check_compiler, wanted_compile
from ..training.token_batches import check_longest
from .check_rows import CheckedRows, check_kept, check_rows
from .context import RunContext
from .prepare import TrainingInputs

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")


@dataclass
class Base:
    """The loaded base model and what is measured and trained with it.

    rows: training rows, augmented, and from memory if they are cached. checked: the usable rows and their lengths. cached: the collator,
    if it uses the feature cache. kept: the sets of evaluation.keep with their evaluators. mixing: of a mix, the draws from its sources.
    """

    loaded: Loaded
    collator: BatchMaker
    evaluator: Evaluator | None
    rows: Sequence[Any]
    limit: TokenLimit
    checked: CheckedRows
    cached: CachedCollator | None = None
    kept: list[tuple[KeptSet, Evaluator]] = field(default_factory=list)
    mixing: Mixing | None = None
    by_row: bool = False


def load_base(inputs: TrainingInputs, context: RunContext, audit: bool) -> Base:
    """Read weights and processor. Raises UserError, also if the audit of the first rows fails."""
    from transformers import set_seed

    settings = inputs.settings
    set_seed(settings["seed"])
    loaded = context.load(inputs.family, inputs.full, inputs.located, inputs.below)
    for note in loaded.notes:
        log.info("%-14s %s", "model", note)
    if (wanted := wanted_compile(settings["trainer"])) is not None:
        check_compiler(wanted, loaded.model.device, loaded.quantized)
    collator = build_collator(inputs.cfg.collator, inputs.family, loaded)
    assert isinstance(collator, Collator)
    whole = AnswerCollator(collator) if inputs.objective.PREFERENCE else collator
    checked = check_rows(inputs, whole, context)
    rows = checked.rows
    whole([rows[0]])  # a collator that does not fit the model fails here, before any work is done
    check_longest(settings["trainer"], rows, checked.sizes)
    by_row = bool(settings["trainer"].get("packing")) and check_packing(inputs, loaded, collator, rows, context)
    if audit:
        checks = context.memo.once(inputs.base_key("audit"), lambda: quick_checks(loaded.model, collator, rows))
        raise_failed(checks, "; audit=false trains it all the same")
    checked_kept = check_kept(inputs, collator, context)
    batch_size, loss_batch_size = settings["evaluation"]["batch_size"], settings["trainer"].get("per_device_eval_batch_size", 8)
    evaluator = None
    if checked.held_out is not None:
        measured = good_rows(checked.held_out) if inputs.prepared.manifest.get("bad") else checked.held_out
        evaluator = Evaluator(measured, collator, settings["generation"], batch_size, loss_batch_size, is_main(), inputs.metrics,
                              Chooser.from_settings(settings["evaluation"]))  # fmt: skip
    kept = [
        (k, Evaluator(own, collator, k.generation, batch_size, loss_batch_size, is_main(), k.metrics, Chooser.for_rows(settings["evaluation"], own)))
        for k, own in checked_kept
    ]
    for each in ([evaluator] if evaluator else []) + [its for _, its in kept]:
        each.check_generation()
    limit = evaluator.limit if evaluator else token_limit(settings["generation"], map(collator.written, spread(inputs.prepared.split("train"))), collator.tokenizer)
    log.info("%-14s %s", "generation", limit.note)
    for one, its in kept:
        log.info("%-14s %s: %d rows of %s, %s", "kept", one.name, len(its.rows), one.split, its.limit.note)
    augmented = augment_rows(rows, settings["augment"] or {}, settings["seed"])
    return Base(loaded, collator, evaluator, augmented, limit, checked, kept=kept, mixing=mixing_of(inputs.prepared, rows), by_row=by_row)


def check_packing(inputs: TrainingInputs, loaded: Loaded, collator: Collator, rows: Sequence[Any], context: RunContext) -> bool:
    """Whether attention may compute each packed row alone (rewrites/row_attention.py). Raises UserError if `trainer.packing` would change what this model computes."""
    from ..losses.packing import why_not_packed
    from ..rewrites.base import Replaced
    from ..rewrites.row_attention import DEVICES, attend_by_row

    def compare() -> tuple[str | None, bool]:
        replaced = Replaced()
        if inputs.family.rewrites == "auto" and loaded.model.device.type in DEVICES and attend_by_row(loaded.model, replaced):
            apart = why_not_packed(loaded.model, collator, rows, loaded.quantized)
            replaced.remove()
            if apart is None:
                return None, True
        return why_not_packed(loaded.model, collator, rows, loaded.quantized), False

    why, by_row = context.memo.once(inputs.base_key("packing"), compare)
    if why is not None:
        raise UserError(f"trainer.packing=true: {why}; leave it out (trainer.tokens_per_batch=N saves most of the padding without it)")
    return by_row


def use_feature_cache(inputs: TrainingInputs, base: Base, context: RunContext, run_bytes: int) -> None:
    """Let collator, evaluator and rows use the feature cache, if the vision part is frozen; compute what the held-out rows need.

    run_bytes: what the run itself will leave on the disk.
    """
    seen = _rows_seen(inputs, base)
    collator: Any = base.collator
    assert isinstance(collator, Collator)
    cache = open_cache(
        inputs.settings, base.loaded, why_forbidden(inputs.settings, inputs.plan), collator, inputs.prepared, base.rows, seen, context.base_memo, run_bytes
    )
    if cache is None:
        return
    base.cached = base.collator = CachedCollator(collator, cache)
    rows = base.rows
    trained = list(base.mixing.sizes) if base.mixing else []
    base.rows = context.memo.once(key_of("rows", str(inputs.prepared.path), inputs.prepared.fingerprint, trained, len(rows)), lambda: RowsInMemory(rows))
    for evaluator in [*([base.evaluator] if base.evaluator else []), *(its for _, its in base.kept)]:
        evaluator.collator = base.cached
        for generation in (False, True)[: 1 + base.cached.generates]:
            base.cached.fill(evaluator.rows, generation)


def cache_training_rows(inputs: TrainingInputs, base: Base, model: torch.nn.Module) -> None:
    """Compute the features of all training rows, if all will be seen; otherwise each is computed at its first use.

    model: set up for training. Raises UserError if a part before the language model turns out not to be frozen.
    """
    if base.cached is None:
        return
    from tqdm import tqdm

    model.train()
    if (reason := why_not_frozen(model)) is not None:
        raise UserError(f"vision_cache: {reason}, so features cannot be kept; use vision_cache=off")
    model.eval()
    rows = base.rows
    if _rows_seen(inputs, base) == len(rows):
        hidden = not (is_main() and len(rows) > 64 and shows_progress())
        samples: Iterable[Any] = (rows[i] for i in range(len(rows)))
        if inputs.objective.PREFERENCE:
            answers = AnswerCollator(base.cached)
            samples = (answer for row in samples for answer, _ in answers.answers(row))
        base.cached.fill(tqdm(samples, total=len(rows), desc="features", leave=False, disable=hidden), False)


def _rows_seen(inputs: TrainingInputs, base: Base) -> int:
    """How many training rows the run will see."""
    by_tokens = inputs.settings["trainer"].get("tokens_per_batch")
    return rows_seen(inputs.settings, len(base.rows), base.mixing, base.checked.sizes.mean if by_tokens else None)
