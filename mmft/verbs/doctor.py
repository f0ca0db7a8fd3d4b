"""`mmft doctor`: what works on this machine, one line each, with the fix."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from omegaconf import DictConfig

from ..common.errors import Incomplete
from . import doctor_checks

log = logging.getLogger("mmft")


@dataclass
class Doctor:
    """The keys of conf/task/doctor.yaml. timeout: seconds to wait for a hub."""

    timeout: float = 3

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> list[doctor_checks.Finding]:
        """Print and return the findings. Raises Incomplete (exit code 1) if something needed is broken."""
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
            raise Incomplete(f"needed and broken: {', '.join(broken)}")
        return findings
