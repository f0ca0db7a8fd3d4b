"""RunContext: what the runs of one process share, and the place of a run among others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import Self

from ..common.memo import Memo
from ..models.families.base import Family
from ..models.hub import Located
from ..models.load import Loaded
from ..runs.parents import Parent, load_base
from ..system.signals import Listener
from ..training.callbacks import TrialReporter
from ..training.trainer import JointMember


@dataclass
class RunContext:
    """A single run has a context of its own; the points of a sweep in one process share one (mmft/sweeps/context.py).

    memo: values that hold for all runs. base_memo: values computed with the loaded base model. listener: of an enclosing block.
    member: the place in a group of jointly trained runs. reporter: of a run that is a trial of a search. sharers: processes that share
    the machine's memory. imported: the libraries were imported for this run.
    """

    memo: Memo = field(default_factory=Memo)
    base_memo: Memo = field(default_factory=Memo)
    listener: Listener | None = None
    member: JointMember | None = None
    reporter: TrialReporter | None = None
    sharers: int = 1
    imported: bool = False

    def load(self, family: Family, full_training: bool, located: Located, below: Sequence[Parent] = ()) -> Loaded:
        """The model of a run, which the run may change. below: adapters to merge into it."""
        return load_base(family, located, below, full_training)

    def begin_run(self) -> None:
        """Called before a run prepares anything."""

    def with_changes(self, **changes: object) -> Self:
        """The same shared values for a run with another place."""
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    @property
    def runs_at_once(self) -> int:
        """The number of runs that train jointly."""
        return self.member.size if self.member else 1
