"""Compare a merged model with base and adapter: equal inputs, and logits within rounding."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from omegaconf import DictConfig

from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..common.records import ParentRecord
from ..common.tensors import eval_mode, to_device
from ..config.build import build
from ..config.plain import to_plain
from ..data.prepare import prepared_data
from ..data.selection import Subset, split_rows
from ..losses.supervised import supervised_logits
from ..runs.directory import Run
from ..runs.open import OpenedRun
from .merge import load_plain, missing_files
from .model_card import card

if TYPE_CHECKING:
    import torch

    from ..data.sample import Sample

# The largest difference of a logit that rounding explains, as a share of the largest logit. Adapter and base add their products in
# the computing dtype, the merged weight is rounded once to it: some tens of roundings (2^-24, 2^-11, 2^-8), summed over the layers.
# fp32: adapters of every part of a deep model were measured at 2.1e-4; a lost adapter moves logits a thousand times as much.
SHARE = {"float32": 5e-4, "float16": 1e-2, "bfloat16": 6e-2}


class MergeFacts(TypedDict):
    """merge.json: what was merged, and how far its logits are from those of base and adapter.

    rows: ids of the compared rows. adapter_moves_logits_by: the largest difference that the adapter makes. quantised_base: None,
    `dequantised` or `original`. difference_to_the_quantised_run: of the reference's logits from those of the run as trained. parents: see ParentRecord.
    """

    run: str
    base: str
    revision: str
    checkpoint: int | None
    architecture: str
    dtype: str
    rows: list[str]
    answer_tokens: int
    largest_logit: float
    largest_difference: float
    tolerance: float
    adapter_moves_logits_by: float
    quantised_base: str | None
    difference_to_the_quantised_run: float | None
    parents: list[ParentRecord]


@dataclass
class Reference:
    """What the merged model is compared with.

    inputs: one batch per row. logits: of base and adapter, for the answers. effect: the largest change of a logit by the adapter.
    largest_untuned: the largest logit of the base. quantised_difference: see MergeFacts.
    """

    inputs: list[Batch]
    logits: list[torch.Tensor]
    effect: float
    largest_untuned: float
    quantised_difference: float | None = None

    @classmethod
    def of_run(cls, opened: OpenedRun, rows: Sequence[Sample]) -> Reference:
        """The logits of the run as it was trained."""
        inputs = batches(opened.collator, rows)
        tuned = answer_logits(opened.model, inputs)
        with opened.base():
            untuned = answer_logits(opened.model, inputs)
        return cls(inputs, tuned, largest_difference(tuned, untuned), largest_logit(untuned))

    def of_unquantised(self, model: torch.nn.Module) -> Reference:
        """The same rows through the adapter over an unquantised base, which is what can be merged."""
        logits = answer_logits(model, self.inputs)
        return replace(self, logits=logits, quantised_difference=largest_difference(self.logits, logits))

    @property
    def largest(self) -> float:
        """The largest logit, with or without the adapter."""
        return max(self.largest_untuned, largest_logit(self.logits))

    @property
    def answer_tokens(self) -> int:
        return sum(len(x) for x in self.logits)


def compared_rows(cfg: DictConfig, n: int) -> Sequence[Sample]:
    """The first `n` held-out rows of a run's data; of its training rows if it held none out. Raises UserError."""
    rows, held_out = split_rows(prepared_data(cfg), {**to_plain(cfg.evaluation), "max_samples": n})
    return held_out if held_out is not None else Subset(rows, n)


def batches(collator: BatchMaker, rows: Sequence[Sample]) -> list[Batch]:
    """One training batch per row (so without padding, whose logits mean nothing)."""
    result = [collator([rows[i]]) for i in range(len(rows))]
    for batch in result:
        batch.pop("row_ids", None)
    return result


def answer_logits(model: torch.nn.Module, inputs: list[Batch]) -> list[torch.Tensor]:
    """The logits that predict each row's answer: (answer tokens, V), float32 on the CPU."""
    import torch

    result = []
    with torch.no_grad(), eval_mode(model):
        for batch in inputs:
            result.append(supervised_logits(model, to_device(batch, model.device))[0].float().cpu())
    return result


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest absolute difference between two models' logits; infinite if one is not a number."""
    gaps = [float((a - b).abs().max()) for a, b in zip(first, second, strict=True)]
    return max(math.inf if math.isnan(gap) else gap for gap in gaps)


def largest_logit(logits: list[torch.Tensor]) -> float:
    return max(float(x.abs().max()) for x in logits)


def coarser(first: str, second: str) -> str:
    """The dtype of two that rounds more."""
    return max((first, second), key=SHARE.__getitem__)


def check_saved(opened: OpenedRun, folder: Path, dtype: torch.dtype, rows: Sequence[Sample], reference: Reference) -> float:
    """The largest difference of a logit between the saved folder, loaded by plain transformers, and the reference.

    Raises UserError if the saved processor makes other inputs than the run's.
    """
    model, processor = load_plain(folder, dtype, opened.loaded.device, opened.family.attn_implementation)
    collator = build(
        opened.cfg.collator, "collator", processor=processor, family=opened.family, model_config=model.config, end_token_ids=opened.collator.end_token_ids
    )
    differing = differing_input(reference.inputs, batches(collator, rows))
    if differing:
        raise UserError(f"run={opened.run.path if opened.run else folder}: the saved processor makes other inputs than the run's ({differing} differs); nothing was kept")
    difference = largest_difference(reference.logits, answer_logits(model, reference.inputs))
    del model
    gc.collect()  # its files are mapped, and Windows cannot rename a folder with a mapped file
    return difference


def differing_input(first: list[Batch], second: list[Batch]) -> str | None:
    """The first key that differs between the batches of two processors, or None."""
    import torch

    for a, b in zip(first, second, strict=True):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b or not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]):
                return key
    return None


def write_record(folder: Path, run: Run, facts: MergeFacts, chat: bool) -> None:
    """Write merge.json and the model card. Raises UserError if a serving engine would miss a file."""
    missing = missing_files(folder, chat)
    if missing:
        raise UserError(f"run={run.path}: the saved model lacks {', '.join(missing)}; nothing was kept")
    (folder / "merge.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    notes = [
        f"merged in {facts['dtype']}; reloaded with plain transformers, its logits differ from base + adapter by at most"
        f" {facts['largest_difference']:.3g} (allowed {facts['tolerance']:.3g}, largest logit {facts['largest_logit']:.3g}; the adapter itself"
        f" moves logits by up to {facts['adapter_moves_logits_by']:.3g}), over {facts['answer_tokens']} answer tokens of {len(facts['rows'])} held-out rows"
    ]
    if facts["quantised_base"]:
        kind = "the quantised base was dequantised" if facts["quantised_base"] == "dequantised" else "the base's own unquantised files were used"
        notes.append(f"{kind} before merging; against the quantised run logits differ by up to {facts['difference_to_the_quantised_run']:.3g}")
    (folder / "README.md").write_text(card(run.path, "merged", notes), encoding="utf-8", newline="\n")


def facts_table(out: Path, facts: MergeFacts) -> dict[str, str]:
    """The merge in a few lines, for the terminal."""
    from ..reports import numbers

    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 2**20
    files = len(list(out.glob("*.safetensors")))
    rows = {
        "model": f"{out} ({facts['architecture']}, {facts['dtype']}, {numbers.memory(size)}, {files} file{'s' if files > 1 else ''} of weights)",
        "compared": f"{facts['answer_tokens']} answer tokens of {len(facts['rows'])} held-out rows, reloaded with plain transformers",
        "largest difference": f"{facts['largest_difference']:.3g} of a logit (allowed {facts['tolerance']:.3g}, largest logit {facts['largest_logit']:.3g})",
        "the adapter itself": f"moves logits by up to {facts['adapter_moves_logits_by']:.3g}",
    }
    if facts["largest_difference"] > facts["adapter_moves_logits_by"] / 2:
        rows["beware"] = f"{facts['dtype']} rounds away much of what this adapter does; dtype=fp32 keeps it, or use the adapter unmerged"
    if facts["quantised_base"]:
        rows["the quantised run"] = f"differs by up to {facts['difference_to_the_quantised_run']:.3g} (base: {facts['quantised_base']})"
    return rows
