"""`hydra/launcher=joint`, the default of `mmft -m`: points on one device, trained jointly where they can be."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from omegaconf import OmegaConf

from ..common.errors import UserError
from ..config.plain import to_plain
from ..config.ranking import ranking
from ..config.settings import Settings
from ..models.fingerprint import import_while_hashing
from ..sweeps.directory import PointResult, Sweep
from ..sweeps.points import PointJob, run_point
from ..sweeps.run import run_here, run_with
from ..system.distributed import world_size
from ..system.signals import listening

if TYPE_CHECKING:
    from ..sweeps.context import SweepContext
    from .partition import Candidate

log = logging.getLogger("mmft")


class Joint:
    """A sweep's launcher. most: points that are trained jointly at most (null: as memory allows, 1: one after another).

    processes: on a CPU, processes that share the points of a group (null: one for each core).
    """

    def __init__(self, most: int | None = None, processes: int | None = None):
        for key, value in {"most": most, "processes": processes}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"hydra.launcher.{key}={value}: must be a whole number above 0, or null")
        self.most, self.processes = most, processes

    def __call__(self, jobs: list[PointJob]) -> list[PointResult]:
        if self.most == 1 or len(jobs) < 2 or world_size() > 1:
            return run_here(jobs)
        settings = [cast(Settings, to_plain(OmegaConf.create(job.config))) for job in jobs]
        import_while_hashing("transformers.trainer", "peft", model=settings[0]["model"].get("path"))
        from ..sweeps.context import SweepContext
        from .partition import Candidate, partition

        context = SweepContext()
        parts = partition([Candidate(n, s) for n, s in enumerate(settings)], context, self.most)
        results: dict[int, PointResult] = {}
        for group in parts.groups:
            results |= zip([c.number for c in group], self._run_group(group, jobs, context))
        for candidate, why in parts.alone:
            log.info("\n%-14s %s, since %s", "alone", _differing_words(jobs[candidate.number], jobs), why)
        rest = [c.number for c, _ in parts.alone] + [n for n, r in results.items() if r["status"] == "running"]
        results |= zip(rest, run_with(context, [jobs[n] for n in rest]))
        return [results[n] for n in range(len(jobs))]

    def _run_group(self, group: Sequence[Candidate], jobs: Sequence[PointJob], context: SweepContext) -> list[PointResult]:
        """One group, trained jointly in this process, or divided among several."""
        from .processes import divide, process_count

        members = [jobs[c.number] for c in group]
        names = [_differing_words(job, jobs) for job in members]
        shares = divide([c.bytes for c in group], process_count(len(members), group[0].device, self.processes))
        shown = " | ".join("; ".join(names[n] for n in share) for share in shares)
        divided = f", shared by {len(shares)} processes" if len(shares) > 1 else ""
        log.info("\n%-14s %d points in step%s: %s", "joint", len(members), divided, shown)
        if len(shares) == 1:
            return train_jointly(members, names, context)
        return self._run_in_processes(shares, members, names, context)

    def _run_in_processes(self, shares: list[list[int]], members: list[PointJob], names: list[str], context: SweepContext) -> list[PointResult]:
        """Shares of a group in forked processes. What all of them need is computed here, once, before the fork."""
        from ..pipeline.run import rehearse
        from .processes import run_side_by_side

        sweeps = [Sweep(job.sweep_dir) for job in members]
        configs = [OmegaConf.create(job.config) for job in members]
        points = [sweep.planned(cfg) for sweep, cfg in zip(sweeps, configs)]
        resumed = all(point and (sweep.path / point.name / "base.json").is_file() for sweep, point in zip(sweeps, points))
        try:
            rehearse(configs[0], context, measure_first=not resumed)
        except Exception as error:  # the points fail in the same way, and say so in their own runs
            log.warning("%-14s each process prepares by itself: %s", "joint", " ".join(str(error).split()))
        context.end_point()
        tasks = [
            lambda share=share, n=n: train_jointly(
                [members[i] for i in share], [names[i] for i in share], context.with_changes(sharers=len(shares)), len(members), f"{n}|"
            )
            for n, share in enumerate(shares, 1)
        ]  # fmt: skip
        gc.freeze()  # the children inherit this; a collection there would copy every page they share
        try:
            outcomes = run_side_by_side(tasks)
        finally:
            gc.unfreeze()
        results: dict[int, PointResult] = {}
        for share, outcome in zip(shares, outcomes):
            if outcome.why is None:
                results |= zip(share, cast("list[PointResult]", outcome.result))
                continue
            for n in share:
                point = points[n]
                assert point is not None
                result = sweeps[n].result(point, ranking(point.config))
                results[n] = result if result["status"] == "finished" else {**result, "reason": outcome.why}
        return [results[n] for n in range(len(members))]


def train_jointly(jobs: list[PointJob], names: list[str], context: SweepContext, size: int | None = None, label: str = "") -> list[PointResult]:
    """One group in this process; each point is a run like any other. size, label: see Group."""
    from .scheduler import Group, Member

    group = Group(context.base, names, size, label)
    context.begin_run()
    try:
        with listening(context.listener) as listener:

            def run_member(job: PointJob, member: Member) -> PointResult:
                return run_point(job, context.with_changes(member=member, listener=listener), wait=False)

            return group.run([partial(run_member, job) for job in jobs])
    finally:
        group.close()  # its stacked model holds the modules of every member
        context.end_point()


def _differing_words(job: PointJob, jobs: Sequence[PointJob]) -> str:
    """The words by which a point differs from the others."""
    common = set.intersection(*(set(other.words) for other in jobs))
    return " ".join(w for w in job.words if w not in common) or "point"
