"""`mmft doctor`: what works on this machine; with `model=NAME model.path=PATH`: whether mmft trains that model correctly."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ..common.errors import Incomplete
from . import doctor_checks

if TYPE_CHECKING:
    from ..conformance.checks import CheckResult

log = logging.getLogger("mmft")
MODEL = ("model=", "model.")  # words that name a model to check


@dataclass
class Doctor:
    """The keys of conf/task/doctor.yaml. timeout: seconds to wait for a hub."""

    timeout: float = 3

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> list[doctor_checks.Finding] | list[CheckResult]:
        """Print and return the findings. Raises UserError for a model that cannot be used; Incomplete (exit code 1) if a check fails."""
        if any(word.startswith(MODEL) for word in overrides):
            return check_model(cfg)
        return self._check_machine(cfg)

    def _check_machine(self, cfg: DictConfig) -> list[doctor_checks.Finding]:
        with ThreadPoolExecutor(2) as pool:  # the hubs answer while torch is imported
            answers = [pool.submit(doctor_checks.hub, *hub, self.timeout) for hub in doctor_checks.hubs()]
            findings = [
                doctor_checks.python(), *doctor_checks.packages(), *doctor_checks.machine(), doctor_checks.quantising(), doctor_checks.swanlab(),
                *doctor_checks.disk(cfg.output_dir), *(a.result() for a in answers), *doctor_checks.extras(),
            ]  # fmt: skip
        for f in findings:
            log.info("%-6s  %-12s %s%s", f.state, f.name, f.text, f"  ->  {f.fix}" if f.fix else "")
        broken = [f.name for f in findings if f.state == doctor_checks.BROKEN]
        if broken:
            raise Incomplete(f"needed and broken: {', '.join(broken)}", findings)
        return findings


def check_model(cfg: DictConfig) -> list[CheckResult]:
    """Run the conformance checks on the model of model=..., and print the results and the row of the table of models."""
    from ..models.fingerprint import import_while_hashing

    import_while_hashing("transformers", "peft", model=cfg.model.get("path"))
    import transformers

    from ..adapters.methods import LORA, choose
    from ..config.build import build
    from ..config.plain import to_plain
    from ..conformance.checks import run_checks
    from ..conformance.subject import Subject
    from ..conformance.table import TableRow, markdown
    from ..models.load import build_collator, load_model

    family = build(cfg.model, "model")
    adapter = {key: to_plain(cfg).get("lora", {}).get(key) for key in ("method", "options") if cfg.lora.get(key)}
    choose(str(adapter.get("method") or LORA), adapter.get("options"))
    loaded = load_model(family)
    collator = build_collator(cfg.collator, family, loaded)
    name, model_class = loaded.model.config.model_type, type(loaded.model).__name__
    with tempfile.TemporaryDirectory() as folder:
        results = run_checks(Subject.create(loaded.model, collator, family, Path(folder), adapter))
    for r in results:
        log.info("%-6s  %-15s %s", {True: "ok", False: "WRONG", None: "-"}[r.passed], r.name, r.detail)
    log.info("\n%s", markdown([TableRow(name, model_class, results)], transformers.__version__))
    failed = [r.name for r in results if r.passed is False]
    if failed:
        raise Incomplete(f"model.path={family.path}: {', '.join(failed)} went wrong; this model would not be trained or used correctly", results)
    return results
