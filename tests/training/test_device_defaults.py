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
