"""The groups of the configuration, and the keys that transformers, peft and bitsandbytes settings have.

Importing those libraries takes 10-30 s; a wrong key must be answered in under two. The keys are
therefore read from the installed files with `ast`, so they are always those of the installed version.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
if not CONFIG_DIR.is_dir():  # installed from a wheel: conf/ is the package mmft.conf
    CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"

GROUPS = ("task", "model", "collator", "data", "lora", "trainer", "logger", "experiment")

# Written by mmft itself into TrainingArguments; a user's value would be overwritten.
MANAGED_TRAINING_ARGUMENTS = (
    "output_dir", "seed", "data_seed", "report_to", "remove_unused_columns", "label_names", "run_name",
    "hub_token",  # a secret must not lie in a config that is saved with the run
)
# transformers.EarlyStoppingCallback's own arguments, kept beside TrainingArguments in the trainer group.
EARLY_STOPPING = {"early_stopping_patience": "int | None", "early_stopping_threshold": "float"}
# mmft's own keys of the trainer group: whether the micro-batches of a step are computed as one, and what becomes of a step
# whose loss or gradient is not finite.
OWN_TRAINER = {**EARLY_STOPPING, "fold_accumulation": "str", "nonfinite": "str", "nonfinite_limit": "int"}


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
    """name -> annotation of every key of the trainer group ({} when transformers cannot be read)."""
    own = _dataclass_fields(_class("transformers", "training_args.py", "TrainingArguments"))
    usable = {k: v for k, v in own.items() if k not in MANAGED_TRAINING_ARGUMENTS}
    return {**usable, **OWN_TRAINER} if usable else {}


@cache
def lora_config() -> dict[str, str]:
    """name -> annotation of LoraConfig's keys, those it inherits from PeftConfig excepted."""
    own = _dataclass_fields(_class("peft", "tuners/lora/config.py", "LoraConfig"))
    own.pop("layer_replication", None)
    # two additions: which parts may be adapted, and no rank at all for training without an adapter
    return {**own, "r": "int | None", "scope": "str"} if own else {}


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


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """group -> the names of its yaml files, the shipped ones and those below `config_dir`."""
    roots = [CONFIG_DIR] + ([Path(config_dir)] if config_dir else [])
    return {
        group: sorted({f.relative_to(r / group).with_suffix("").as_posix() for r in roots for f in (r / group).rglob("*.yaml")})
        for group in GROUPS
    }


def top_level() -> list[str]:
    """The keys of conf/config.yaml."""
    return [str(k) for k in OmegaConf.load(CONFIG_DIR / "config.yaml") if k != "defaults"]


# torchvision.transforms.v2's names and keys, in the order in which they are applied; the size stays the picture's own.
AUGMENT_TRANSFORMS = {
    "RandomResizedCrop": ("scale", "ratio"),
    "RandomRotation": ("degrees", "fill"),
    "RandomHorizontalFlip": ("p",),
    "ColorJitter": ("brightness", "contrast", "saturation", "hue"),
}


METRICS = ("exact_match", "exact_match_normalized", "contains", "token_f1", "vqa_accuracy", "bleu4", "rouge_l", "cider")
