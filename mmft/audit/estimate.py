"""Estimate memory and time of a training step from a few small steps measured on this machine.

    memory = weights + optimizer + max(activations, UPDATE x gradients)
      weights      bytes of all parameters and buffers as loaded
      optimizer    8 bytes per trained weight with AdamW (others: training/disk_space.py)
      activations  a + b x tokens: the peak of a forward and backward pass without gradients. Measured for one row and for a few, and
                   extrapolated linearly to a batch, since all but attention's small part grows linearly with the tokens
      gradients    as large as the trained weights. They are complete when the activations are freed, and the update makes
                   temporary copies (UPDATE). With gradient accumulation they add to the activations
    seconds  = a + b x tokens, measured in the same steps (collate, forward, backward, clip, update)

For a GPU that is not present: frozen weights and activations take two bytes per number, RESERVED is for CUDA itself, SLACK for
what its allocator cannot use. Time follows from the counted operations at USED of the GPU's peak rate, which is rough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..common.model_parts import size
from ..common.tensors import to_device
from ..losses.supervised import supervised_loss
from ..training.disk_space import optimizer_bytes
from .allocation_tracker import track_allocations
from .counts import Collate, TokenCounts

if TYPE_CHECKING:
    import torch

    from ..data.sample import Sample

RESERVED = 0.6e9  # bytes: CUDA context and libraries
SLACK = 1.08
USED = 0.35  # of the GPU's peak rate; what training loops of this size commonly reach
RATES = {12: 50, 16: 65, 24: 70, 32: 100, 48: 150, 80: 312, 96: 400, 141: 800}  # GB -> dense bf16 Tflop/s of common GPUs
UPDATE = 3  # gradients and two temporary copies while all weights are updated at once
MANY = 4  # rows of the larger measured batch


@dataclass
class MeasuredStep:
    """One small step. tokens: of the padded batch. activations: peak bytes. flops: floating-point operations."""

    rows: int
    tokens: int
    seconds: float
    activations: float
    flops: float


@dataclass
class Estimate:
    """Bytes and seconds of a step of `batch` rows. tokens: of an average padded batch; longest: of the largest possible one.

    working: max(activations, UPDATE x gradients) of an average batch, working_longest of the largest. trained, frozen: weights.
    """

    batch: int
    tokens: int
    longest: int
    weights: float
    gradients: float
    optimizer: float
    working: float
    working_longest: float
    seconds: float
    flops: float
    trained: int
    frozen: int
    bytes_each: int  # of one activation on this machine

    @property
    def memory(self) -> float:
        return self.weights + self.optimizer + self.working

    @property
    def memory_longest(self) -> float:
        return self.memory - self.working + self.working_longest

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory, "memory_longest": self.memory_longest}


def estimate(model: torch.nn.Module, collator: Collate, rows: Sequence[Sample], counts: TokenCounts, trainer: dict[str, Any]) -> Estimate:
    """Measure a model that is ready for training (adapter attached, other parts frozen) and extrapolate to a batch.

    trainer: the config section.
    """
    batch, limit = trainer.get("per_device_train_batch_size", 8), trainer.get("tokens_per_batch")
    mean = sum(counts.lengths) / len(counts.lengths)
    if limit:  # rows are taken until a batch is full
        batch = max(1, round(limit / (mean * counts.per_row)))
    sequences = round(batch * counts.per_row)
    few, many = measure(model, collator, rows, 1), None
    if batch > 1:
        many = measure(model, collator, rows, min(MANY if few.seconds < 20 else 2, batch))
    tokens, longest = round(sequences * mean) if trainer.get("packing") else counts.padded(sequences), sequences * max(counts.lengths)
    if limit:
        tokens = longest = limit

    def extrapolated(key: str, at: int) -> float:
        a, b = getattr(few, key), getattr(many or few, key)
        if many is None or many.tokens <= few.tokens or b <= a:
            return max(a, b) * at / (many or few).tokens
        return a + (b - a) / (many.tokens - few.tokens) * (at - few.tokens)

    trained = [p for p in model.parameters() if p.requires_grad]
    number = sum(p.numel() for p in trained)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    accumulate = trainer.get("gradient_accumulation_steps", 1)
    gradients = float(sum(p.nbytes for p in trained))

    def working(at: int) -> float:
        return max(extrapolated("activations", at) + gradients * (accumulate > 1), UPDATE * gradients)

    return Estimate(
        batch=batch, tokens=tokens, longest=longest,
        weights=float(sum(t.nbytes for t in [*model.parameters(), *model.buffers()])), gradients=gradients,
        optimizer=float(number * optimizer_bytes(trainer.get("optim", "adamw_torch"))),
        working=working(tokens), working_longest=working(longest),
        seconds=extrapolated("seconds", tokens) * accumulate, flops=extrapolated("flops", tokens) * accumulate,
        trained=number, frozen=sum(size(p) for p in model.parameters() if not p.requires_grad),
        bytes_each=min((p.element_size() for p in floats), default=4),
    )  # fmt: skip


def measure(model: Any, collator: Collate, rows: Sequence[Sample], n: int) -> MeasuredStep:
    """Run steps over `n` rows: one to warm up and count operations, three timed, one for its memory. The weights do not change."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    chosen = [rows[i * len(rows) // n] for i in range(n)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    kind = model.device.type

    def backward() -> int:
        batch = to_device(collator(chosen), model.device)
        batch.pop("row_ids", None)
        with torch.autocast(kind, dtype=half or torch.bfloat16, enabled=half is not None):
            loss, count = supervised_loss(model, batch)
        (loss / count).backward()
        return batch["input_ids"].numel()

    def step() -> float:
        started = time.perf_counter()
        backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    was_training = model.training
    model.train()
    with FlopCounterMode(display=False) as operations:
        tokens = backward()
    optimizer.zero_grad(set_to_none=True)
    seconds = sorted(step() for _ in range(3))[1]
    for parameter in trained:  # gradients exist already, so that all new tensors are activations
        parameter.grad = torch.zeros_like(parameter)
    activations = _peak(backward, kind)
    optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    return MeasuredStep(n, tokens, seconds, activations, float(operations.get_total_flops()))


def _peak(work: Callable[[], object], kind: str) -> float:
    """Peak bytes of the tensors made during `work()`."""
    import torch

    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with track_allocations() as tracker:
        work()
    return float(tracker.peak)


@dataclass
class GpuEstimate:
    """The same training on a GPU of `gigabytes`. memory: bytes. seconds: of a step, roughly. tflops: the rate assumed."""

    gigabytes: float
    memory: float
    fits: bool
    largest_batch: int
    seconds: float
    tflops: float


def on_gpu(here: Estimate, gigabytes: float, tflops: float | None, bits: int = 16) -> GpuEstimate:
    """Estimate for a GPU. bits: of a frozen weight there, 16, or 8 or 4 for a quantised base (here they may be fp32)."""
    fixed = here.frozen * {16: 2.0, 8: 1.05, 4: 0.56}[bits] + here.trained * 4 + here.optimizer
    scale = min(2 / here.bytes_each, 1.0)
    rate = tflops or RATES[min(RATES, key=lambda size_: (abs(size_ - gigabytes), size_))]
    available = gigabytes * 1e9 - RESERVED - fixed * SLACK
    per_row = here.working_longest * scale * SLACK / here.batch
    return GpuEstimate(
        gigabytes, (fixed + here.working_longest * scale) * SLACK + RESERVED, available >= per_row * here.batch,
        max(int(available // per_row), 0), here.flops / (rate * 1e12 * USED), rate,
    )  # fmt: skip
