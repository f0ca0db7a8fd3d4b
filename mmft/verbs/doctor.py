"""`mmft doctor`: what works on this machine, one line each with the fix; exit code 1 when something needed is broken."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..common.errors import Incomplete
from . import doctor_checks

log = logging.getLogger("mmft")


@dataclass
class Doctor:
    """timeout: seconds to wait for a hub. Errors raised: Incomplete (exit code 1) when something needed is broken."""

    timeout: float = 3

    def __call__(self, cfg: Any, overrides: list[str]) -> list[doctor_checks.Finding]:
        with ThreadPoolExecutor(2) as pool:  # the hubs are asked while torch is imported
            asked = [pool.submit(doctor_checks.hub, *hub, self.timeout) for hub in doctor_checks.hubs()]
            found = [
                doctor_checks.python(), *doctor_checks.packages(), *doctor_checks.machine(), doctor_checks.quantising(), doctor_checks.swanlab(),
                *doctor_checks.disk(cfg.output_dir), *(a.result() for a in asked), *doctor_checks.extras(),
            ]  # fmt: skip
        for f in found:
            log.info("%-6s  %-12s %s%s", f.state, f.name, f.text, f"  ->  {f.fix}" if f.fix else "")
        broken = [f.name for f in found if f.state == doctor_checks.BROKEN]
        if broken:
            raise Incomplete(f"needed and broken: {', '.join(broken)}")
        return found
