"""What a training step takes, in memory and time, from a few small steps measured on this machine.

    memory = weights + optimizer + the larger of activations and UPDATE x gradients
      weights      the bytes of all parameters and buffers as they are loaded
      optimizer    8 bytes for each trained weight with AdamW (others: disk.STATES)
      activations  a + b x tokens: what a forward and a backward pass hold at most beside the gradients. Measured here on
                   one row and on a few, and drawn out to a batch in a straight line, since all but the attention's small
                   part grows with the tokens
      gradients    as large as the trained weights; they are there when the activations are gone, and the update makes
                   copies of its own (UPDATE). Kept over several micro-batches they come on top of the activations
    seconds  = a + b x tokens, measured in the same steps (collating, forward, backward, clipping, update)

For a GPU that is not here: frozen weights and activations at two bytes a number, RESERVED for CUDA itself, SLACK for
what its allocator cannot use; time from the counted operations, at USED of the GPU's rate. That last figure is rough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..collators.base import Collator
from ..common.model_parts import size
from ..common.tensors import to_device
from ..losses.supervised import supervised_loss
from ..training.disk_space import optimizer_bytes

RESERVED = 0.6e9  # bytes: CUDA context and libraries
SLACK = 1.08
USED = 0.35  # of the rate on paper; what training loops of this size commonly reach
RATES = {12: 50, 16: 65, 24: 70, 32: 100, 48: 150, 80: 312, 96: 400, 141: 800}  # GB -> dense bf16 Tflop/s of common GPUs
UPDATE = 3  # gradients, and two temporary copies while all of them are updated at once
MANY = 4  # rows of the larger measured batch


@dataclass
class Measured:
    """One small step: tokens of the padded batch, seconds, most bytes held by activations, operations."""

    rows: int
    tokens: int
    seconds: float
    activations: float
    flops: float


@dataclass
class Estimate:
    """Bytes and seconds of a step of `batch` rows, `tokens` an average batch has and `longest` the largest can have."""

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
    bytes_each: int  # of an activation here

    @property
    def memory(self) -> float:
        return self.weights + self.optimizer + self.working

    @property
    def memory_longest(self) -> float:
        return self.memory - self.working + self.working_longest

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory, "memory_longest": self.memory_longest}


def estimate(model: Any, collator: Collator, rows: Sequence[Any], counts: Any, trainer: dict[str, Any]) -> Estimate:
    """Measure a model that is ready to be trained (adapter attached, frozen parts frozen) and draw the line to a batch."""
    batch = trainer.get("per_device_train_batch_size", 8)
    few, many = measure(model, collator, rows, 1), None
    if batch > 1:
        many = measure(model, collator, rows, min(MANY if few.seconds < 20 else 2, batch))
    tokens, longest = counts.padded(batch), batch * max(counts.lengths)

    def drawn(key: str, at: int) -> float:
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
        return max(drawn("activations", at) + gradients * (accumulate > 1), UPDATE * gradients)

    return Estimate(
        batch=batch, tokens=tokens, longest=longest,
        weights=float(sum(t.nbytes for t in [*model.parameters(), *model.buffers()])), gradients=gradients,
        optimizer=float(number * optimizer_bytes(trainer.get("optim", "adamw_torch"))),
        working=working(tokens), working_longest=working(longest),
        seconds=drawn("seconds", tokens) * accumulate, flops=drawn("flops", tokens) * accumulate,
        trained=number, frozen=sum(size(p) for p in model.parameters() if not p.requires_grad),
        bytes_each=min((p.element_size() for p in floats), default=4),
    )  # fmt: skip


def measure(model: Any, collator: Collator, rows: Sequence[Any], n: int) -> Measured:
    """Steps over `n` rows: one to warm up and count operations, three timed, one watched. The weights stay what they are."""
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
    for parameter in trained:  # with gradients in place, what is made on the way is activations alone
        parameter.grad = torch.zeros_like(parameter)
    activations = _peak(backward, kind)
    optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    return Measured(n, tokens, seconds, activations, float(operations.get_total_flops()))


def _peak(work: Any, kind: str) -> float:
    """The most bytes that tensors made during `work()` hold at one time."""
    import torch

    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from .allocation_tracker import held

    with held() as watched:
        work()
    return watched.highest


@dataclass
class OnGpu:
    """The same training on a GPU of `gigabytes`: memory in bytes, whether it fits, the largest batch, rough seconds."""

    gigabytes: float
    memory: float
    fits: bool
    largest_batch: int
    seconds: float
    tflops: float


def on_gpu(here: Estimate, gigabytes: float, tflops: float | None, bits: int = 16) -> OnGpu:
    """`bits`: 16, or 8 and 4 for a quantised base."""
    # frozen weights are counted anew: here they may be fp32, there they are bf16 or quantised
    fixed = here.frozen * {16: 2.0, 8: 1.05, 4: 0.56}[bits] + here.trained * 4 + here.optimizer
    scale = min(2 / here.bytes_each, 1.0)
    rate = tflops or RATES[min(RATES, key=lambda size_: (abs(size_ - gigabytes), size_))]
    room = gigabytes * 1e9 - RESERVED - fixed * SLACK
    a_row = here.working_longest * scale * SLACK / here.batch
    return OnGpu(
        gigabytes, (fixed + here.working_longest * scale) * SLACK + RESERVED, room >= a_row * here.batch,
        max(int(room // a_row), 0), here.flops / (rate * 1e12 * USED), rate,
    )  # fmt: skip
