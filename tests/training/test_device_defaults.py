"""What the trainer's null keys mean on devices that are made up here: this machine has no GPU."""

from __future__ import annotations

import pytest

from mmft.training.arguments import training_settings
from mmft.training.device_defaults import Machine, describe_device, loader_defaults

UNSET = {"dataloader_num_workers": None, "dataloader_pin_memory": None, "optim": "adamw_torch_fused"}
GPU = {"device": "cuda", "cores": 16, "processes": 1, "shared": 8 << 30, "forks": True}


@pytest.mark.parametrize("machine, given, cached, workers, pinned", [
    ({}, {}, False, 4, True),
    ({"cores": 3}, {}, False, 2, True),  # a core is left to the loop
    ({"cores": 16, "processes": 8}, {}, False, 1, True),
    ({"cores": 1}, {}, False, 0, True),
    ({"shared": 64 << 20}, {}, False, 0, True),  # a container's default
    ({"forks": False}, {}, False, 0, True),
    ({}, {}, True, 0, True),
    ({}, {"dataloader_num_workers": 9, "dataloader_pin_memory": False}, False, 9, False),
    ({"shared": 64 << 20}, {"dataloader_num_workers": 2}, False, 2, True),  # as asked
    ({"device": "cpu"}, {}, False, 0, False),
    ({"device": "mps"}, {}, False, 0, False),
    ({"device": "cpu"}, {"dataloader_num_workers": 3}, False, 3, False),
    ({"device": "cpu"}, {"dataloader_num_workers": 3}, True, 0, False),
])  # fmt: skip
def test_workers_and_memory(machine, given, cached, workers, pinned):
    made = Machine(**{**GPU, **machine})
    values, note = loader_defaults({**UNSET, **given}, made, cached)
    assert (values["dataloader_num_workers"], values["dataloader_pin_memory"]) == (workers, pinned)
    assert values.get("accelerator_config") == ({"non_blocking": True} if pinned else None)
    assert (note is None) == (made.device != "cuda")
    if note is not None:
        assert note.startswith(f"{workers} data workers") and ("64 MB of shared memory" in note) == (made.shared < 2**30 and "dataloader_num_workers" not in given)
    args, _ = training_settings({**UNSET, **given, **values}, output_dir="unused", use_cpu=True)  # the library takes them
    assert args.dataloader_num_workers == workers and args.accelerator_config.non_blocking == pinned


def test_settings_of_the_user_for_accelerate_are_kept():
    values, _ = loader_defaults({**UNSET, "accelerator_config": {"use_seedable_sampler": False}}, Machine(**GPU), False)
    assert "accelerator_config" not in values


def test_what_is_printed():
    assert describe_device(UNSET, Machine(**GPU), {"bf16": True, "fp16": False}).startswith("bf16, adamw_torch_fused")
    assert describe_device(UNSET, Machine(**GPU), {}).startswith("fp32, ")
    assert describe_device(UNSET, Machine(**{**GPU, "device": "cpu"}), {}) is None


def test_this_machine():
    here = Machine.here("cpu")
    assert here.device == "cpu" and here.cores >= 1 and here.processes == 1 and Machine.here("cuda:1").device == "cuda"


def test_wrong_values_are_one_line(mmft):
    code, _, err = mmft("trainer.dataloader_num_workers=some", "--cfg", "job")
    assert code == 2 and err == "mmft: trainer.dataloader_num_workers=some: must be int or null\n"


class OnDevice:
    """What some functions ask of a model: its device, and that it can be set to training."""

    def __init__(self, kind: str):
        import torch

        self.device = torch.device(kind)

    def train(self):
        return self


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_what_suits_a_cpu_alone_is_not_done_elsewhere(kind, monkeypatch):
    """The meta device stands for any that is no CPU."""
    import threading

    import numpy as np
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from mmft.feature_cache.cache import FeatureCache
    from mmft.joint.processes import process_count
    from mmft.rewrites import lora_linear, seeded_dropout
    from mmft.training import accumulation

    cpu, called = kind == "cpu", []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    left, right = torch.ones(64, 32, device=kind), torch.ones(32, 4, device=kind)
    with Recorded():  # a product with few columns by its transpose, which is copied first
        y = lora_linear.thin_product(left, right)
    assert y.shape == (64, 4) and ("aten::clone" in called, y.is_contiguous()) == (cpu, not cpu)

    drawn = []
    monkeypatch.setattr(np.random, "SFC64", lambda key, own=np.random.SFC64: drawn.append(key) or own(key))
    monkeypatch.setattr(torch, "Generator", lambda device: type("Made", (), {"manual_seed": lambda self, seed: None})())
    mask = seeded_dropout.DropoutStream(3).draw(0, 0, torch.Size((2, 5, 8)), torch.device(kind), 6554)
    assert mask.shape == (2, 5, 8) and mask.device.type == kind and bool(drawn) == cpu

    monkeypatch.setattr(accumulation, "padding_ratio", lambda *given: 9.0)
    monkeypatch.setattr(accumulation, "passes_that_fit", lambda work, device, most, sharers: most)
    trainer = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    rows, collator = list(range(8)), lambda rows: {"row_ids": rows}
    assert accumulation.merged_micro_batches(trainer, OnDevice(kind), collator, rows) == (1 if cpu else 4), "padding is dear on a CPU"
    assert accumulation.merged_micro_batches(trainer, OnDevice(kind), collator, rows, joint=True) == (1 if cpu else 4)

    threads = []
    reading = type("Reading", (), {"encode_checked": lambda self, group, generation: threads.append(threading.current_thread())})()
    cache = FeatureCache(reading, OnDevice(kind), None, None, None)
    assert len(list(cache._encoded(iter([([1], True), ([2], True)]), False))) == 2
    assert all(thread is threading.main_thread() for thread in threads) == cpu, "elsewhere the next rows are read beside the device"

    assert (process_count(4, kind, 4) > 1) == (cpu and not torch.cuda.is_available()), "a process that has used a GPU cannot be forked"
