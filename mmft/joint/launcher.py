"""`hydra/launcher=joint`, the default of `mmft -m`: the points of a sweep on one device, those that can be trained together."""

from __future__ import annotations

import gc
import logging
from typing import Any

from omegaconf import OmegaConf

from ..common.errors import UserError

log = logging.getLogger("mmft")


class Joint:
    """A launcher as mmft/sweeps/run.py calls it. most: points trained together at most; null: as memory allows; 1: one after another.

    processes: on a CPU, how many share the points of a group (joint/processes.py); null: one a core.
    """

    def __init__(self, most: int | None = None, processes: int | None = None):
        for key, value in {"most": most, "processes": processes}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"hydra.launcher.{key}={value}: must be a whole number above 0, or null")
        from ..sweeps.shared_base import Shared

        self.most, self.processes, self.shared = most, processes, Shared()

    def __call__(self, points: list[tuple[str, list[str], str]]) -> list[dict[str, Any]]:
        """What `run_point` returned for each (config as yaml, words, sweep directory)."""
        from ..models.fingerprint import import_while_hashing
        from ..sweeps.run import here
        from ..system.distributed import world_size
        from .partition import Candidate, divide

        if self.most == 1 or len(points) < 2 or world_size() > 1:
            return here(points, self.shared)
        candidates = [Candidate(n, OmegaConf.to_container(OmegaConf.create(text))) for n, (text, _, _) in enumerate(points)]
        import_while_hashing("transformers.trainer", "peft", model=candidates[0].settings["model"].get("path"))
        groups = divide(candidates, self.shared, self.most)
        results: dict[int, dict[str, Any]] = {}
        for group in groups.together:
            numbers = [c.number for c in group]
            results |= zip(numbers, self._group(group, points))
        for candidate, why in groups.alone:
            log.info("\n%-14s %s, since %s", "alone", _swept(points[candidate.number][1], points), why)
        rest = [c.number for c, _ in groups.alone] + [n for n, r in results.items() if r["status"] == "running"]
        results |= zip(rest, here([points[n] for n in rest], self.shared))
        return [results[n] for n in range(len(points))]

    def _group(self, group: list[Any], points: list[tuple[str, list[str], str]]) -> list[dict[str, Any]]:
        """What `run_point` returned for the points of one group, trained in step here or in parts side by side."""
        from .processes import dealt, how_many

        own = [points[c.number] for c in group]
        names = [_swept(words, points) for _, words, _ in own]
        parts = dealt([c.bytes for c in group], how_many(len(own), group[0].device, self.processes))
        said = " | ".join("; ".join(names[n] for n in part) for part in parts)
        side = f", shared by {len(parts)} processes" if len(parts) > 1 else ""
        log.info("\n%-14s %d points in step%s: %s", "joint", len(own), side, said)
        if len(parts) == 1:
            return together(own, names, self.shared)
        return self._apart(parts, own, names)

    def _apart(self, parts: list[list[int]], own: list[tuple[str, list[str], str]], names: list[str]) -> list[dict[str, Any]]:
        """Parts of a group in processes side by side. What all of them need is read here, once."""
        from ..pipeline.train import rehearse
        from ..sweeps.directory import Sweep
        from .processes import side_by_side

        sweeps = [Sweep(folder) for _, _, folder in own]
        planned = [sweep.planned(OmegaConf.create(text)) for sweep, (text, _, _) in zip(sweeps, own)]
        known = all((sweep.path / point.name / "base.json").is_file() for sweep, point in zip(sweeps, planned))  # points that go on
        try:
            rehearse(OmegaConf.create(own[0][0]), self.shared, base=not known)
        except Exception as error:  # the points meet it too, and say so in their own runs
            log.warning("%-14s each process prepares by itself: %s", "joint", " ".join(str(error).split()))
        self.shared.end_point()
        gc.freeze()  # a collection would write to every page the processes share
        jobs = [
            lambda part=part, n=n: together([own[i] for i in part], [names[i] for i in part], self.shared, len(own), f"{n}|")
            for n, part in enumerate(parts, 1)
        ]  # fmt: skip
        results: dict[int, dict[str, Any]] = {}
        for part, ended in zip(parts, side_by_side(jobs)):
            if ended.why is None:
                results |= zip(part, ended.answer)
                continue
            for n in part:
                point = planned[n]
                outcome = sweeps[n].outcome(point, point.config.get("objective", "eval_loss"))
                results[n] = outcome if outcome["status"] == "finished" else {**outcome, "reason": ended.why}
        return [results[n] for n in range(len(own))]


def together(points: list[tuple[str, list[str], str]], names: list[str], shared: Any, size: int | None = None, label: str = "") -> list[dict[str, Any]]:
    """One group, trained in step; each point is a run like any other. size, label: as Group has them."""
    from ..sweeps.directory import run_point
    from ..system.signals import listening
    from .scheduler import Group

    group = Group(shared, names, size, label)
    jobs = [lambda seat, point=point: run_point(*point, shared=Seated(shared, seat), wait=False) for point in points]
    shared.begin_point()
    try:
        with listening(shared.running):
            return group.run(jobs)
    finally:
        group = None  # its carrier holds every member's modules
        shared.end_point()


class Seated:
    """What the points of a process share, as one member of a group sees it: with its seat."""

    def __init__(self, shared: Any, seat: Any):
        self.shared, self.seat = shared, seat

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)

    def begin_point(self) -> None:
        """The peak of memory is the group's."""


def _swept(words: list[str], points: list[tuple[str, list[str], str]]) -> str:
    """The words by which a point differs from the others."""
    common = set.intersection(*(set(own) for _, own, _ in points))
    return " ".join(w for w in words if w not in common) or "point"
