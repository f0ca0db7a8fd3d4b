"""Every declared dependency is used by code that can be named, and every library that mmft imports is declared."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

IMPORTED_AS = {
    "hydra-core": "hydra", "pillow": "PIL", "qwen-vl-utils": "qwen_vl_utils", "charset-normalizer": "charset_normalizer", "optuna": "optuna",
    "pillow-heif": "pillow_heif",
    "pyyaml": "yaml", "sacrebleu": "sacrebleu", "imagehash": "imagehash", "scikit-learn": "sklearn",
}  # fmt: skip
# Dependencies that another library imports for mmft: (the library's file, the words in it that import them).
USED_THROUGH = {
    "num2words": ("transformers/models/smolvlm/processing_smolvlm.py", "num2words"),
    "tensorboard": ("torch/utils/tensorboard/__init__.py", "import tensorboard"),
    "timm": ("transformers/models/timm_wrapper/modeling_timm_wrapper.py", "import timm"),
    "pyarrow": ("datasets/arrow_dataset.py", "import pyarrow"),
}
# Libraries that come with a declared one and are imported through it: name -> the declared dependency that brings it.
BROUGHT_BY = {
    "omegaconf": "hydra-core", "huggingface_hub": "transformers", "tokenizers": "transformers", "yaml": "hydra-core", "tqdm": "transformers",
    "requests": "modelscope", "packaging": "transformers", "pynvml": "an optional extra of the machine", "hydra_plugins": "the launcher extras",
    "typing_extensions": "torch", "starlette": "fastapi", "submitit": "the slurm extra", "modelscope_hub": "modelscope",
}  # fmt: skip


def declared() -> dict[str, set[str]]:
    """Distribution -> the groups that declare it ("" for the package itself)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, set[str]] = {}
    for group, lines in groups.items():
        for line in lines:
            found.setdefault(re.match(r"[A-Za-z0-9_.-]+", line)[0].lower(), set()).add(group)
    return found


def imports() -> dict[str, set[str]]:
    """Top-level library -> the files of mmft that import it."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "mmft").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(file.relative_to(ROOT).as_posix())
    return {k: v for k, v in found.items() if k and k not in sys.stdlib_module_names and k != "mmft" and not k.startswith("_")}


def test_every_dependency_is_used():
    used = imports()
    for name, groups in declared().items():
        if groups <= {"dev", "docs"}:
            continue
        library = IMPORTED_AS.get(name, name.replace("-", "_"))
        if library in used or _is_launcher(name):
            continue
        assert name in USED_THROUGH, f"{name} is declared in pyproject.toml and imported nowhere in mmft/"
        file, words = USED_THROUGH[name]
        whole = next((Path(p) / file for p in sys.path if (Path(p) / file).is_file()), None)
        assert whole is not None and words in whole.read_text(encoding="utf-8"), f"{name}: {file} does not import it any more"


def _is_launcher(name: str) -> bool:
    """Hydra loads a launcher plugin by the name that a preset of conf/hydra/launcher gives."""
    presets = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
    return name.startswith("hydra-") and name.endswith("-launcher") and (name.replace("-", "_") in presets or name.split("-")[1] in presets)


def test_every_import_is_declared():
    known = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared()} | set(BROUGHT_BY)
    for library, files in imports().items():
        assert library in known, f"{library} is imported by {', '.join(sorted(files)[:3])} and not declared in pyproject.toml"


def test_every_extra_that_is_named_exists():
    """In messages, pages, yaml files and the Dockerfile: mmft[NAME], /source[NAME,NAME], '.[NAME]'."""
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M))
    files = [*(ROOT / "mmft").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "Dockerfile"]
    named = {extra for file in files for found in re.findall(r"(?:mmft|/source|\.)\[([a-z,]+)\]['\"]", file.read_text(encoding="utf-8")) for extra in found.split(",")}
    assert {"serve", "wandb", "mlflow", "trackio", "ui", "dev", "metrics"} <= named <= extras, named - extras
