"""`mmft merge run=DIR out=DIR`: write one plain model of base and adapter, after comparing it with both on held-out rows."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from ..runs.directory import Run

log = logging.getLogger("mmft")

BASES = ("dequantised", "original")


@dataclass
class Merge:
    """The keys of conf/task/merge.yaml."""

    run: str
    out: str | None = None
    checkpoint: int | None = None
    dtype: str | None = None
    base: str = "dequantised"
    max_shard_size: str = "5GB"
    samples: int = 8
    tolerance: float | None = None
    push: str | None = None
    hub: str = "huggingface"
    private: bool = True
    export: Any = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Path:
        """Write the merged model's folder and return it. Raises UserError; then nothing is left behind."""
        from ..adapters.merge import merge_adapter
        from ..export import formats, merge, merge_check, publish
        from ..reports import terminal
        from ..runs.open import open_run, run_config
        from ..runs.parents import recorded
        from ..runs.weights import trained_weights

        run, run_cfg = run_config(self.run, cfg, overrides)
        out = Path(self.out) if self.out is not None else run / "merged"
        self._check_keys(run, out)
        kinds = formats.chosen(self.export, out)
        weights, full = trained_weights(run, self.checkpoint)
        if full:
            raise UserError(f"run={self.run}: the whole model was trained, so there is nothing to merge; {weights} is a plain model already")
        rows = merge_check.compared_rows(run_cfg, self.samples)

        opened = open_run(self.run, cfg, overrides, self.checkpoint)
        loaded = opened.loaded
        if self.base == "original" and loaded.quantization is not None and loaded.quantization.saved:
            raise UserError(f"base=original: {loaded.located.path} is saved in {loaded.quantization.bits} bit and has no unquantised files; use base=dequantised")
        reference = merge_check.Reference.of_run(opened, rows)
        model = opened.model
        opened.model = loaded.model = None  # one copy of the weights at a time
        if loaded.quantized:
            del model
            model = merge.unquantised(opened, weights, self.base)
            reference = reference.of_unquantised(model)
        dtype = self._save_dtype(loaded.dtype)
        name = str(dtype).removeprefix("torch.")
        coarser = merge_check.coarser(name, str(loaded.dtype).removeprefix("torch."))
        tolerance = self.tolerance if self.tolerance is not None else merge_check.SHARE[coarser] * reference.largest

        model = merge_adapter(model).to(dtype)
        staging = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            merge.check_disk_space(model, out.parent)
            merge.save_merged(model, loaded.processor, merge.generation_config(run), staging, self.max_shard_size)
            architecture, model = type(model).__name__, None
            facts: merge_check.MergeFacts = {
                "run": run.name, "base": loaded.located.path, "revision": loaded.located.revision, "checkpoint": self.checkpoint,
                "architecture": architecture, "dtype": name, "rows": [rows[i].id for i in range(len(rows))],
                "answer_tokens": reference.answer_tokens, "largest_logit": reference.largest,
                "largest_difference": merge_check.check_saved(opened, staging, dtype, rows, reference), "tolerance": tolerance,
                "adapter_moves_logits_by": reference.effect, "quantised_base": self.base if loaded.quantized else None,
                "difference_to_the_quantised_run": reference.quantised_difference, "parents": recorded(run),
            }  # fmt: skip
            if not facts["largest_difference"] <= tolerance:
                raise UserError(
                    f"run={self.run}: the merged model is not the adapter: its logits differ by up to {facts['largest_difference']:.3g} where"
                    f" {tolerance:.3g} is allowed ({coarser}; the adapter itself moves them by {reference.effect:.3g}); nothing was kept."
                    " A wider dtype (dtype=fp32) or tolerance=... may help"
                )
            merge_check.write_record(staging, run, facts, chat=bool(getattr(loaded.processor, "chat_template", None)))
            os.replace(staging, out)
        except OSError as error:
            raise UserError(f"{out}: the merged model cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        written, shown = [out], merge_check.facts_table(out, facts)
        try:
            for kind in kinds:
                if kind == formats.GGUF:
                    export = formats.to_gguf(out, name)
                else:
                    export = formats.quantise(out, kind, loaded.device, dtype or loaded.dtype, opened.family.attn_implementation, reference)
                shown |= export.facts
                written += [export.path] if export.path != out else []
        finally:
            run.record("merge", overrides, written)
            terminal.show(terminal.pairs_table("Merged", shown))
        if self.push is not None:
            log.info("pushed         %s", publish.push(out, self.push, self.hub, self.private))
        return out

    def _check_keys(self, run: Run, out: Path) -> None:
        """Checks before any weight is read."""
        from ..export import publish

        if out.exists():
            raise UserError(f"out={out}: exists already; a merge never writes over anything (choose a new out=...)")
        if not out.name:
            raise UserError(f"out={out}: name the folder to make")
        if self.base not in BASES:
            raise UserError(f"base={self.base}: no such choice.{nearest(self.base, BASES)} There are: {', '.join(BASES)}.")
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: at least one row must be compared")
        self._save_dtype(None)
        if self.push is not None:
            publish.check(self.push, self.hub)

    def _save_dtype(self, default: torch.dtype | None) -> torch.dtype | None:
        import torch

        from ..models.device import DTYPES

        if self.dtype is None:
            return default
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: no such dtype.{nearest(self.dtype, DTYPES)} There are: bf16, fp16, fp32.")
        return getattr(torch, DTYPES[self.dtype])
