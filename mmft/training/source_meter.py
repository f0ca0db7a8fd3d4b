"""SourceMeter: loss, tokens and rows of each source of a mix while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from ..common.records import TrainedSource
from ..data.selection import source_of
from ..losses.supervised import RowGroups, check_sum
from ..system.distributed import is_main, total


class SourceState(TypedDict):
    """A SourceMeter in a checkpoint, over all processes."""

    window: list[list[float]]
    trained: list[list[int]]


@dataclass
class SourceMeter:
    """names: the sources. window: (sources + 1, 2) float32, the sum of the loss and the number of supervised tokens of each source since the
    last log, and in the last line those of the whole batches. trained: (sources, 2) int64, rows and supervised tokens of the whole training.

    unit: what the losses are means over: tokens, or the pairs or answers of a preference objective.
    A row that becomes several sequences counts as so many rows.
    """

    names: Sequence[str]
    device: torch.device
    unit: str = "tokens"
    window: torch.Tensor = field(init=False)
    trained: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.window = torch.zeros(len(self.names) + 1, 2, device=self.device)
        self.trained = torch.zeros(len(self.names), 2, dtype=torch.int64, device=self.device)

    def groups(self, row_ids: Sequence[str]) -> RowGroups:
        """The source of each sequence of a batch. row_ids: of its rows."""
        places = {name: place for place, name in enumerate(self.names)}
        return RowGroups(torch.tensor([places[source_of(row)] for row in row_ids]), len(self.names))

    def add(self, sums: torch.Tensor, loss: torch.Tensor, count: torch.Tensor, groups: RowGroups, tokens: torch.Tensor | None = None) -> None:
        """Count a batch. sums: its `group_sums`. loss, count: of the whole batch, as they are trained. groups: of its rows. tokens: (groups,)
        supervised tokens, where `sums` counts something else (see `unit`).
        """
        own = torch.cat([sums, torch.stack([loss.float(), count.float()])[None].to(sums.device)]).to(self.device)
        self.window += own
        self.trained[:, 0] += torch.bincount(groups.index, minlength=groups.count).to(self.device)
        self.trained[:, 1] += own[:-1, 1].long() if tokens is None else tokens.to(self.device)

    def drain(self) -> dict[str, float]:
        """The mean loss of a supervised token of each source since the last log, the number of these tokens, and begin anew.

        Raises RuntimeError if the sources do not add up to the loss that is trained.
        """
        whole = torch.as_tensor(total(self.window)).tolist()
        self.window.zero_()
        *sources, (loss, tokens) = whole
        check_sum(sum(s[0] for s in sources), loss)
        values: dict[str, float] = {}
        for name, (own_loss, own_tokens) in zip(self.names, sources):
            if own_tokens:
                values |= {f"loss/{name}": own_loss / own_tokens, f"{self.unit}/{name}": int(own_tokens)}
        return values

    def facts(self) -> dict[str, TrainedSource]:
        """What summary.json says of each source, over all processes."""
        return {name: {"rows": rows, "tokens": tokens} for name, (rows, tokens) in zip(self.names, torch.as_tensor(total(self.trained)).tolist())}

    def state(self) -> SourceState:
        """For a checkpoint; every process must call it."""
        return {"window": torch.as_tensor(total(self.window)).tolist(), "trained": torch.as_tensor(total(self.trained)).tolist()}

    def restore(self, state: SourceState) -> None:
        """Go on from a checkpoint; the main process carries the counts of all."""
        if is_main():
            self.window = torch.tensor(state["window"], device=self.device)
            self.trained = torch.tensor(state["trained"], device=self.device)
