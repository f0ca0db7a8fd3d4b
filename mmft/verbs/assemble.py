"""`mmft assemble llm=... vision=... out=DIR`: a LLaVA from a language model and a vision tower, checked weight by weight."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError

log = logging.getLogger("mmft")


@dataclass
class Assemble:
    llm: str
    vision: str
    out: str
    hub: str = "huggingface"
    llm_revision: str | None = None
    vision_revision: str | None = None
    dtype: str = "auto"
    layer: int = -2
    image_size: int | None = None
    check: bool = True

    def __call__(self, cfg: Any, overrides: list[str]) -> Path:
        """Errors raised: UserError; then nothing is left behind."""
        from ..models import assemble
        from ..models.load import progress_bars_on_terminals_only

        progress_bars_on_terminals_only()
        out = Path(self.out)
        if out.exists():
            raise UserError(f"out={self.out}: exists already; an assembly never writes over anything (choose another folder, or remove this one)")
        llm = assemble.find("llm", self.llm, self.hub, self.llm_revision)
        vision = assemble.find("vision", self.vision, self.hub, self.vision_revision)
        plan = assemble.plan(llm, vision, self.dtype, self.layer, self.image_size)
        for note in plan.notes:
            log.info("%s", note)
        self._room(out, plan)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            self._write(plan, beside, cfg.seed)
            os.replace(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        log.info("%s: train it with  mmft model=llava model.path=%s data=...", out, out.as_posix())
        return out

    def _room(self, out: Path, plan: Any) -> None:
        needed = sum(p.numel() for p in plan.skeleton.parameters()) * plan.dtype.itemsize
        parent = next(p for p in out.resolve().parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < needed * 1.05:
            raise UserError(f"out={self.out}: {needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free there")

    def _write(self, plan: Any, folder: Path, seed: int) -> None:
        from ..models.assemble import write_new_files
        from ..models.assemble_weights import verify, write

        write_new_files(plan, folder)
        shards, logits = write(plan, folder, seed)
        log.info("%d tensors written as %s", len(shards.digests), str(plan.dtype).removeprefix("torch."))
        found = {}
        if self.check:
            found = verify(plan, folder, shards, logits)
            log.info("read back: every tensor equal; text without a picture differs by %.1g of the largest logit from the language model's; "
                     "two pictures differ by %.3g", found["text_difference"], found["image_difference"])  # fmt: skip
        record = {
            "llm": {"path": plan.llm.path, "hub": plan.llm.hub, "revision": plan.llm.revision},
            "vision": {"path": plan.vision.path, "hub": plan.vision.hub, "revision": plan.vision.revision},
            "dtype": str(plan.dtype).removeprefix("torch."), "seed": seed,
            "trained_along": plan.config.mmft, "notes": plan.notes, "checks": found, "sha256": shards.digests,
        }  # fmt: skip
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "assembly.json").write_text(text, encoding="utf-8", newline="\n")
