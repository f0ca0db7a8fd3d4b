"""Cross-entropy of the supervised tokens, with logits computed only where a label is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..collators.base import IGNORE
from .encoder_decoder import decoder_logits, splits_rows

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # of the loss, by which a sum over groups may differ from it
CHUNK = 256  # tokens whose losses are computed at once for the groups, which limits memory


@dataclass(frozen=True)
class RowGroups:
    """index: (B,) int64, the group of each sequence of a batch, in 0 ... count - 1."""

    index: torch.Tensor
    count: int


def supervised_loss(model: Any, batch: dict[str, Any], label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the loss over supervised tokens, their number), both 0-d tensors."""
    loss, count, _ = grouped_loss(model, batch, label_smoothing)
    return loss, count


def grouped_loss(
    model: Any, batch: dict[str, Any], label_smoothing: float = 0.0, groups: RowGroups | None = None, pack: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`supervised_loss`, and with `groups` the same two numbers of each group, see `group_sums`.

    pack: lays the batch out in one sequence before the model gets it (losses/packing.py); the supervised tokens keep their order.
    """
    logits, targets, keep = supervised_logits(model, batch if pack is None else pack(batch))
    weights = token_weights(batch)
    loss = summed_loss(logits, targets, weights, label_smoothing)
    return loss, keep.sum(), None if groups is None else group_sums(logits, targets, batch["labels"], groups, label_smoothing, weights)


def token_weights(batch: dict[str, Any]) -> torch.Tensor | None:
    """(n,) float32: the loss weights of the supervised tokens in order, from `loss_weights` (B, S); None where all weigh 1."""
    weights = batch.get("loss_weights")
    return None if weights is None else weights[:, 1:][batch["labels"][:, 1:] != IGNORE]


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, label_smoothing: float = 0.0) -> torch.Tensor:
    """The sum of w_i times the cross-entropy of token i. It is divided by the number of tokens: a weight of 0.3 is 0.3 of a token's gradient."""
    import torch.nn.functional as F

    targets = targets.to(logits.device)
    if weights is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    each = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return (each * weights.to(each)).sum()


def group_sums(
    logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor, groups: RowGroups, label_smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """(groups, 2) float32: the sum of the loss over the supervised tokens of each group, and their number. Without gradients.

    logits (n, V), targets (n,), weights (n,): of the supervised tokens in order. labels (B, S): of the batch, which say how many each sequence has. The
    loss that is trained stays one sum over all tokens, so that its bits do not depend on groups.
    """
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        parts = zip(logits.split(CHUNK), targets.to(logits.device).split(CHUNK))
        losses = [F.cross_entropy(part.float(), wanted, reduction="none", label_smoothing=label_smoothing) for part, wanted in parts]
        loss = torch.cat(losses) if losses else logits.new_zeros(0, dtype=torch.float32)
        loss = loss if weights is None else loss * weights.to(loss)
        tokens = (labels[:, 1:] != IGNORE).sum(dim=1).to(logits.device)
        group = groups.index.to(logits.device).repeat_interleave(tokens, output_size=len(loss))
        member = F.one_hot(group, groups.count).float()
        return torch.stack([member.T @ loss, member.sum(dim=0)], dim=1)


def check_sum(parts: float, whole: float) -> None:
    """Raises RuntimeError unless the losses of the groups add up to that of the whole; both are sums, rounded in other places."""
    if not abs(parts - whole) <= TOLERANCE * max(1.0, abs(whole)):
        raise RuntimeError(f"the losses of the sources add up to {parts}, and the loss of all rows is {whole}")


def sequence_losses(model: Any, batch: dict[str, Any]) -> list[tuple[float, int]]:
    """(sum of the loss over its supervised tokens, their number) of each of the B sequences."""
    import torch
    import torch.nn.functional as F

    logits, targets, keep = supervised_logits(model, batch)
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu().double()
    sums = torch.zeros(len(keep), dtype=torch.float64).index_add_(0, keep.cpu().nonzero()[:, 0], losses)
    return list(zip(sums.tolist(), keep.sum(dim=1).tolist(), strict=True))


def supervised_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits (n, V), their target tokens (n,), their positions as a mask (B, S)) of the n supervised tokens of a batch.

    Position i-1 predicts the token at position i, so logits are kept where the NEXT label is one. The language head then computes n
    positions instead of B x S. A model that takes no `logits_to_keep` returns all logits, and the same positions are selected.
    """
    import torch

    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids", "loss_weights")}
    labels = batch["labels"]
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][keep[:, :-1]]
    if splits_rows(model):
        logits = decoder_logits(model, inputs, labels)
    else:
        options = {"logits_to_keep": keep} if takes_logits_to_keep(model) else {}
        logits = model(**inputs, use_cache=False, **options).logits
    if logits.dim() == 3:
        logits = logits[keep]
    if logits.shape[0] != targets.shape[0]:
        raise RuntimeError(f"{type(model).__name__} gave {logits.shape[0]} logits for {targets.shape[0]} supervised tokens")
    return logits, targets, keep


# Model types whose forward writes to logits (B, S, V) and so cannot give (n, V).
WHOLE_LOGITS = ("chameleon",)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model, under adapters and wrappers, passes a mask `logits_to_keep` (B, S) to its language head."""
    from transformers import modeling_utils

    if not hasattr(modeling_utils, "slice_logits_to_keep") or splits_rows(model):  # transformers 5.21 introduced the mask
        return False
    inner = getattr(model, "module", model)  # DistributedDataParallel
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if getattr(getattr(inner, "config", None), "model_type", None) in WHOLE_LOGITS:
        return False
    parameters = inspect.signature(type(inner).forward).parameters
    # BLIP-2 takes **kwargs and passes them to its language model as long as no labels are given
    return "logits_to_keep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
