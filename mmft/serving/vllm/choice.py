"""The keys backend, vllm and check of a verb: what opens its run or model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ...common.errors import UserError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from ...runs.open import OpenedRun, Opener

BACKENDS = ("transformers", "vllm")


def check_backend(backend: str, keys: Any) -> None:
    """Raises UserError for an unknown backend, and for vllm=... with another."""
    if backend not in BACKENDS:
        raise UserError(f"backend={backend}: no such backend.{nearest(str(backend), BACKENDS)} There are: {', '.join(BACKENDS)}.")
    if backend != "vllm" and keys:
        raise UserError("vllm=...: has an effect with backend=vllm only; add that, or drop it")


@contextmanager
def opener_for(backend: str, keys: Any, rows: int, usual: Opener | None) -> Iterator[Opener]:
    """What opens the run or model of a verb, for the block, at whose end vLLM is closed. usual: without vLLM; None: `open_any`.

    keys: of vLLM's EngineArgs. rows: held-out rows that are first answered by transformers, too. Raises UserError for an unknown backend.
    """
    check_backend(backend, keys)
    if backend != "vllm":
        from ...runs.open import open_any

        yield usual or open_any
        return
    with ExitStack() as stack:

        def opener(path: str | Path | None, cfg: DictConfig, overrides: list[str], checkpoint: int | None) -> OpenedRun:
            from .backend import served_by_vllm

            served = stack.enter_context(served_by_vllm([] if path is None else [str(path)], cfg, overrides, checkpoint, keys, rows))
            return served.models[-1].opened

        yield opener
