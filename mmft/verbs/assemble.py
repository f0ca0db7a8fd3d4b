"""`mmft assemble llm=... vision=... out=DIR`: build a LLaVA from a language model and a vision tower and check every weight."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ..common.errors import UserError

if TYPE_CHECKING:
    from ..models.assemble import Assembly
    from ..models.hub import Located

log = logging.getLogger("mmft")


@dataclass
class Assemble:
    """The keys of conf/task/assemble.yaml."""

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

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Path:
        """Write the model's folder and return it. Raises UserError; then nothing is left behind."""
        from ..models.assemble import locate_part, plan_assembly
        from ..models.load import progress_bars_on_terminals_only

        progress_bars_on_terminals_only()
        out = Path(self.out)
        if out.exists():
            raise UserError(f"out={self.out}: exists already; an assembly never writes over anything (choose another folder, or remove this one)")
        llm = locate_part("llm", self.llm, self.hub, self.llm_revision)
        vision = locate_part("vision", self.vision, self.hub, self.vision_revision)
        assembly = plan_assembly(llm, vision, self.dtype, self.layer, self.image_size)
        for note in assembly.notes:
            log.info("%s", note)
        self._check_disk_space(out, assembly)
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            self._write(assembly, staging, cfg.seed)
            os.replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        log.info("%s: train it with  mmft model=llava model.path=%s data=...", out, out.as_posix())
        return out

    def _check_disk_space(self, out: Path, assembly: Assembly) -> None:
        needed = sum(p.numel() for p in assembly.skeleton.parameters()) * assembly.dtype.itemsize
        parent = next(p for p in out.resolve().parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < needed * 1.05:
            raise UserError(f"out={self.out}: {needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free there")

    def _write(self, assembly: Assembly, folder: Path, seed: int) -> None:
        """Fill the folder: configs, weights, and assembly.json with sources, checks and hashes."""
        from ..models.assemble import write_config_files
        from ..models.assemble_weights import AssemblyChecks, verify, write_weights

        dtype = str(assembly.dtype).removeprefix("torch.")
        write_config_files(assembly, folder)
        shards, logits = write_weights(assembly, folder, seed)
        log.info("%d tensors written as %s", len(shards.digests), dtype)
        checks = AssemblyChecks()
        if self.check:
            checks = verify(assembly, folder, shards, logits)
            log.info("read back: every tensor equal; text without a picture differs by %.1g of the largest logit from the language model's; "
                     "two pictures differ by %.3g", checks["text_difference"], checks["image_difference"])  # fmt: skip
        record = {
            "llm": source(assembly.llm), "vision": source(assembly.vision), "dtype": dtype, "seed": seed,
            "trained_along": assembly.config.mmft, "notes": assembly.notes, "checks": checks, "sha256": shards.digests,
        }  # fmt: skip
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "assembly.json").write_text(text, encoding="utf-8", newline="\n")


def source(located: Located) -> dict[str, str]:
    """Where a part came from, as assembly.json records it."""
    return {key: value for key, value in asdict(located).items() if key != "folder"}
