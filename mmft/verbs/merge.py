"""`mmft merge run=DIR out=DIR`: one plain model of base and adapter, proved on held-out rows before it gets its name."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import UserError, nearest
from ..config.build import build
from ..data.prepare import prepared_data
from ..data.splits import split_rows
from ..models.load import load_model

log = logging.getLogger("mmft")

BASES = ("dequantised", "original")


@dataclass
class Merge:
    """The keys of conf/task/merge.yaml. Errors raised: UserError; then nothing is left behind."""

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

    def __call__(self, cfg: Any, overrides: list[str]) -> Path:
        from ..export import merge, publish
        from ..reports import terminal
        from ..runs.open import open_run, run_config, trained_weights

        run, kept = run_config(self.run, cfg, overrides)
        out = Path(self.out) if self.out is not None else run / "merged"
        self.check(run, out)
        if self.push is not None:
            publish.check(self.push, self.hub)
        weights, full = trained_weights(run, self.checkpoint)
        if full:
            raise UserError(f"run={self.run}: the whole model was trained, so there is nothing to merge; {weights} is a plain model already")
        rows = held_out(kept, self.samples)

        opened = open_run(self.run, cfg, overrides, self.checkpoint)
        inputs = merge.batches(opened.collator, rows)
        as_trained = merge.answer_logits(opened.model, inputs)
        with opened.base():
            untuned = merge.answer_logits(opened.model, inputs)
        effect = merge.largest_difference(as_trained, untuned)
        model, reference, quantised = opened.model, as_trained, opened.loaded.quantized
        opened.model = opened.loaded.model = None  # one copy of the weights at a time
        if quantised:
            del model
            model = self.unquantised(opened, weights)
            reference = merge.answer_logits(model, inputs)
        dtype = self.save_dtype(opened.loaded.dtype)
        model = merge.merged(model).to(dtype)
        name = str(dtype).removeprefix("torch.")
        coarser = max((name, str(opened.loaded.dtype).removeprefix("torch.")), key=merge.SHARE.__getitem__)
        allowed = self.tolerance if self.tolerance is not None else merge.tolerance(coarser, [*reference, *untuned])

        beside = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            check_room(model, out.parent)
            merge.save(model, opened.loaded.processor, generation_settings(run), beside, self.max_shard_size)
            architecture, model = type(model).__name__, None
            difference = self.compare(opened, beside, dtype, inputs, reference)
            facts = {
                "run": run.name, "base": opened.loaded.located.path, "revision": opened.loaded.located.revision, "checkpoint": self.checkpoint,
                "architecture": architecture, "dtype": name, "rows": [rows[i].id for i in range(len(rows))],
                "answer_tokens": sum(len(x) for x in reference), "largest_logit": merge.largest([*reference, *untuned]),
                "largest_difference": difference, "tolerance": allowed, "adapter_moves_logits_by": effect,
                "quantised_base": self.base if quantised else None,
                "difference_to_the_quantised_run": merge.largest_difference(as_trained, reference) if quantised else None,
            }  # fmt: skip
            if not difference <= allowed:
                raise UserError(
                    f"run={self.run}: the merged model is not the adapter: its logits differ by up to {difference:.3g} where {allowed:.3g} is allowed"
                    f" ({coarser}; the adapter itself moves them by {effect:.3g}); nothing was kept. A wider dtype (dtype=fp32) or tolerance=... may help"
                )
            finish(beside, run, facts, chat=bool(getattr(opened.loaded.processor, "chat_template", None)))
            os.replace(beside, out)
        except OSError as error:
            raise UserError(f"{out}: the merged model cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        run.record("merge", overrides, [out])
        terminal.show(terminal.pairs_table("Merged", table(out, facts)))
        if self.push is not None:
            log.info("pushed         %s", publish.push(out, self.push, self.hub, self.private))
        return out

    def check(self, run: Any, out: Path) -> None:
        """What can be wrong before a weight is read."""
        if out.exists():
            raise UserError(f"out={out}: exists already; a merge never writes over anything (choose a new out=...)")
        if not out.name:
            raise UserError(f"out={out}: name the folder to make")
        if self.base not in BASES:
            raise UserError(f"base={self.base}: no such choice.{nearest(self.base, BASES)} There are: {', '.join(BASES)}.")
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: at least one row must be compared")
        self.save_dtype(None)

    def save_dtype(self, own: Any) -> Any:
        import torch

        from ..models.device import DTYPES

        if self.dtype is None:
            return own
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: no such dtype.{nearest(self.dtype, DTYPES)} There are: bf16, fp16, fp32.")
        return getattr(torch, DTYPES[self.dtype])

    def unquantised(self, opened: Any, weights: Path) -> Any:
        """The base without quantisation, in the dtype the run computes in, under the same adapter."""
        from ..runs.open import with_adapter

        if self.base == "original":
            family = replace(opened.family, quantization=None, dtype=str(opened.loaded.dtype).removeprefix("torch."))
            return with_adapter(load_model(family, located=opened.loaded.located).model, weights)
        base = load_model(opened.family, located=opened.loaded.located).model
        return with_adapter(base.dequantize(opened.loaded.dtype), weights)

    def compare(self, opened: Any, folder: Path, dtype: Any, inputs: list[dict[str, Any]], reference: list[Any]) -> float:
        """The saved folder, loaded by plain transformers, against the adapter: inputs equal, logits as near as returned."""
        from ..export import merge

        model, processor = merge.reload(folder, dtype, opened.loaded.device, opened.family.attn_implementation)
        collator = build(
            opened.cfg.collator, processor=processor, family=opened.family, model_config=model.config, end_token_ids=opened.collator.end_token_ids
        )
        rows = held_out(opened.cfg, self.samples)
        odd = merge.same_inputs(inputs, merge.batches(collator, rows))
        if odd:
            raise UserError(f"run={self.run}: the saved processor makes other inputs than the run's ({odd} differs); nothing was kept")
        difference = merge.largest_difference(reference, merge.answer_logits(model, inputs))
        del model
        gc.collect()  # its files are mapped, and Windows renames no folder with a mapped file in it
        return difference


def held_out(cfg: Any, samples: int) -> Any:
    """The first held-out rows of a run's data; of its training rows where it held none out."""
    from ..config.validate import to_plain
    from ..evaluation.evaluate import Subset

    evaluation = {**to_plain(cfg.evaluation), "max_samples": samples}
    rows, held = split_rows(prepared_data(cfg), evaluation)
    return held if held is not None else Subset(rows, samples)


def generation_settings(run: Any) -> Any | None:
    """What the run generated with: limits and end tokens; None where it stored none (the base's own then stay)."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(run / "adapter") if (run / "adapter" / "generation_config.json").is_file() else None


def check_room(model: Any, folder: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free >> 20} MB free, the merged model needs {needed >> 20} MB; free some, or choose another out=...")


def finish(folder: Path, run: Any, facts: dict[str, Any], chat: bool) -> None:
    """merge.json and the model card; complains where a serving engine would not find its files."""
    from ..export import merge
    from ..export.model_card import card

    absent = merge.lacking(folder, chat)
    if absent:
        raise UserError(f"run={run.path}: the saved model lacks {', '.join(absent)}; nothing was kept")
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


def table(out: Path, facts: dict[str, Any]) -> dict[str, str]:
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
