"""Check the section `hydra`, whose classes Hydra itself builds: a file may set folders there, only the command may choose a launcher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...common.errors import UserError
from ..groups import CONFIG_DIR
from .targets import HYDRA_PARTS, PACKAGES_VARIABLE, allowed_packages

HARMLESS = ("run", "sweep", "output_subdir", "verbose")  # keys that build and call nothing
# Entries in the defaults list of mmft's config.yaml, so that a copy of that file is accepted.
_OWN_DEFAULTS = {("hydra", "mmft"), ("override hydra/job_logging", "none"), ("override hydra/hydra_logging", "none")}


def check_files(config_dir: Path) -> None:
    """Refuse a file below `config_dir` that changes Hydra's section by a key, a package or its defaults list. Raises UserError.

    A user's own launchers and sweepers (hydra/launcher/NAME.yaml) are used only when the command names them; files that replace those
    of Hydra or mmft are refused. `check_composed` checks their content.
    """
    for file in sorted(config_dir.rglob("*.yaml")):
        parts = file.relative_to(config_dir).with_suffix("").parts
        if parts[0] == "hydra":
            if parts[1:2] not in (("launcher",), ("sweeper",)) or parts[-1] == "basic" or (CONFIG_DIR / Path(*parts)).with_suffix(".yaml").is_file():
                raise _refusal(file, "takes the place of Hydra's own settings")
            continue
        try:
            text = file.read_text(encoding="utf-8")
            content = OmegaConf.to_container(OmegaConf.load(file))
        except Exception:  # no file for Hydra, or one that Hydra refuses when it is chosen
            continue
        packages = re.findall(r"(?m)^\s*#\s*@package\s+(\S+)", text)
        if any(p.split(".")[0].strip("_") == "hydra" for p in packages):
            raise _refusal(file, "is placed in Hydra's section")
        if not isinstance(content, dict):
            continue
        section = content.get("hydra")
        section = section if isinstance(section, dict) else {}
        for key in section:
            # the search space builds nothing; the sweeper is chosen by the defaults list or the command
            search_space = key == "sweeper" and isinstance(section[key], dict) and not {"_target_", "custom_search_space"} & set(section[key])
            if key not in HARMLESS and not search_space:
                raise _refusal(file, f"its hydra section sets {key}")
        for entry in content.get("defaults") or ():
            for key, value in (entry.items() if isinstance(entry, dict) else [(entry, None)]):
                shipped = re.fullmatch(r"override /?hydra/(launcher|sweeper)", str(key)) and str(value) in _shipped(str(key).rpartition("/")[2])
                if re.search(r"(^|[\s/@])_?(global_\.)?hydra\b", str(key)) and (str(key), str(value)) not in _OWN_DEFAULTS and not shipped:
                    raise _refusal(file, f"its defaults list changes {key}")


def _shipped(group: str) -> set[str]:
    return {"basic"} | {f.stem for f in (CONFIG_DIR / "hydra" / group).glob("*.yaml")}


def check_composed(hydra: Any) -> None:
    """Refuse classes in Hydra's section that are neither Hydra's own nor a plugin's. Raises UserError."""
    plain = OmegaConf.to_container(hydra, resolve=False)
    _walk(plain, "hydra")
    for key in ("job_logging", "hydra_logging"):
        _logging(plain.get(key), f"hydra.{key}")
    variables = [str(k).upper() for k in (plain.get("job") or {}).get("env_set") or {}]
    odd = next((v for v in variables if v.startswith(("LD_", "DYLD_", "PYTHON", "MMFT_", "PATH", "HYDRA", "HF_"))), None)
    if odd:
        raise UserError(f"hydra.job.env_set.{odd}: could start other programs; set it in your shell")


def _walk(node: Any, where: str) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None:
            words = str(target).split(".")
            own = words[:3] == ["hydra", "_internal", "core_plugins"] or words[0] == "hydra_plugins" or target in HYDRA_PARTS
            # a longer path could lead through a plugin's module to a library that it imports
            if not (own and len(words) <= 5) and words[0] not in allowed_packages() - {"mmft"}:
                raise UserError(f"{where}: _target_ {target} is refused: only Hydra's own launchers, sweepers and plugins may stand here"
                                f" (add your own package's name to the environment variable {PACKAGES_VARIABLE})")
        for key, value in node.items():
            _walk(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _walk(value, f"{where}[{i}]")


def _logging(node: Any, where: str) -> None:
    """Check a logging section: logging.config.dictConfig calls the value of `()` and imports what `class` and `ext://` name."""
    if isinstance(node, dict):
        for key, value in node.items():
            known = str(value).startswith(("logging.", "colorlog."))
            if key == "()" and not known or key == "class" and not known or isinstance(value, str) and "ext://" in value and not value.startswith("ext://sys.std"):
                raise UserError(f"{where}.{key}: {value} is refused: only classes of logging and colorlog may stand here")
            _logging(value, f"{where}.{key}")
    elif isinstance(node, list):
        for value in node:
            _logging(value, where)


def _refusal(file: Path, what: str) -> UserError:
    return UserError(f"{file}: {what}, which could start other programs; remove it (or give hydra/...=... or hydra.KEY=... on the command line)")
