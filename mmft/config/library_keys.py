"""The keys that the installed transformers, peft and bitsandbytes accept, without importing them.

Importing those libraries takes 10-30 s, and a wrong key must be reported in under two. The keys are read from the installed files
with `ast`.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

# Arguments of transformers.EarlyStoppingCallback, in the trainer group beside TrainingArguments.
EARLY_STOPPING = {"early_stopping_patience": "int | None", "early_stopping_threshold": "float"}
# Keys that mmft adds to the trainer group: whether the micro-batches of a step are merged, how batches are filled and laid out, what happens
# when the loss or gradient of a step is not finite, and rates and weight decay by part of the model.
OWN_TRAINER = {
    **EARLY_STOPPING, "fold_accumulation": "str", "tokens_per_batch": "int | None", "packing": "bool", "nonfinite": "str", "nonfinite_limit": "int",
    "learning_rates": "dict | None", "weight_decays": "dict | None", "loraplus_lr_ratio": "float | None", "lora_fa": "bool", "ema_decay": "float | None",
}  # fmt: skip
# Keys of TrainingArguments that may be null: the device decides (training/device_defaults.py).
BY_DEVICE = {"dataloader_num_workers": "int | None", "dataloader_pin_memory": "bool | None"}
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # of TrainingArguments; mmft compiles the layers itself (training/compiled.py)
# `r: null` is training without an adapter. method and options: another method of peft, and its keys.
OWN_LORA = {
    "r": "int | None", "scope": "str", "start": "str | None", "parts": "dict | None", "whole": "list | None", "top_layers": "int | None", "method": "str", "options": "dict | None",
    "init_batches": "int",
}  # fmt: skip
OWN_KEYS = {*OWN_TRAINER, *OWN_LORA} - {"r"}  # keys of these sections that are mmft's, not the library's


def _library_file(package: str, relative: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    return path if path.is_file() else None


def _class(package: str, relative: str, name: str) -> ast.ClassDef | None:
    path = _library_file(package, relative)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _dataclass_fields(node: ast.ClassDef | None) -> dict[str, str]:
    if node is None:
        return {}
    return {
        n.target.id: ast.unparse(n.annotation)
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")
    }


@cache
def training_arguments() -> dict[str, str]:
    """name -> annotation of every key of the trainer group; {} where transformers cannot be read."""
    keys = _dataclass_fields(_class("transformers", "training_args.py", "TrainingArguments"))
    return {**keys, **{k: v for k, v in BY_DEVICE.items() if k in keys}, **OWN_TRAINER} if keys else {}


@cache
def lora_config() -> dict[str, str]:
    """name -> annotation of LoraConfig's keys, those inherited from PeftConfig included, and of mmft's own."""
    keys = _dataclass_fields(_class("peft", "tuners/lora/config.py", "LoraConfig"))
    for base in ("PeftConfigMixin", "PeftConfig"):
        keys |= _dataclass_fields(_class("peft", "config.py", base))
    return {**keys, **OWN_LORA} if keys else {}


@cache
def generation_config() -> dict[str, str]:
    """name -> "" for each key GenerationConfig takes from its keyword arguments."""
    node = _class("transformers", "generation/configuration_utils.py", "GenerationConfig")
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None) if node else None
    names = {}
    for assign in ast.walk(init) if init else ():
        # the settings are the lines `self.NAME = kwargs.pop("NAME", default)`
        if not (isinstance(assign, ast.Assign) and "kwargs.pop(" in ast.unparse(assign.value)):
            continue
        target = assign.targets[0]
        if isinstance(target, ast.Attribute) and not target.attr.startswith("_"):
            names[target.attr] = ""
    names.pop("transformers_version", None)
    return names


@cache
def quantization_config() -> dict[str, str]:
    """name -> annotation of BitsAndBytesConfig's constructor arguments."""
    node = _class("transformers", "utils/quantization_config.py", "BitsAndBytesConfig")
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None) if node else None
    if init is None:
        return {}
    return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in init.args.args if a.arg != "self"}


def sections() -> dict[str, dict[str, str]]:
    """section -> its keys with their annotations."""
    return {
        "trainer": training_arguments(), "lora": lora_config(), "generation": generation_config(), "model.quantization": quantization_config(),
    }  # fmt: skip
