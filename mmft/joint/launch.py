"""`hydra/launcher=joint`, the default of `mmft -m`: the points of a sweep on one device, those that can be trained together."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import OmegaConf

from ..errors import UserError

log = logging.getLogger("mmft")


class Joint:
    """A launcher as mmft/sweeping.py calls it. most: points trained together at most; null: as memory allows; 1: one after another."""

    def __init__(self, most: int | None = None):
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise UserError(f"hydra.launcher.most={most}: must be a whole number above 0, or null")
        from ..shared import Shared

        self.most, self.shared = most, Shared()

    def __call__(self, points: list[tuple[str, list[str], str]]) -> list[dict[str, Any]]:
        """What `run_point` returned for each (config as yaml, words, sweep directory)."""
        from ..distributed import world_size
        from ..sweeping import here
        from .grouping import Candidate, divide

        if self.most == 1 or len(points) < 2 or world_size() > 1:
            return here(points, self.shared)
        candidates = [Candidate(n, OmegaConf.to_container(OmegaConf.create(text))) for n, (text, _, _) in enumerate(points)]
        groups = divide(candidates, self.shared, self.most)
        results: dict[int, dict[str, Any]] = {}
        for group in groups.together:
            numbers = [c.number for c in group]
            log.info("\n%-14s %d points in step: %s", "joint", len(group), "; ".join(_swept(points[n][1], points) for n in numbers))
            results |= zip(numbers, together([points[n] for n in numbers], self.shared))
        for candidate, why in groups.alone:
            log.info("\n%-14s %s, since %s", "alone", _swept(points[candidate.number][1], points), why)
        rest = [c.number for c, _ in groups.alone] + [n for n, r in results.items() if r["status"] == "running"]
        results |= zip(rest, here([points[n] for n in rest], self.shared))
        return [results[n] for n in range(len(points))]


def together(points: list[tuple[str, list[str], str]], shared: Any) -> list[dict[str, Any]]:
    """One group, trained in step; each point is a run like any other."""
    from ..signals import listening
    from ..sweep import run_point
    from .group import Group

    group = Group(shared, [_swept(words, points) for _, words, _ in points])
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
