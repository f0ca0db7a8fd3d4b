"""evaluation.keep: names of data configs, or folders of prepared data, become sections with their data and their metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ..common.errors import UserError, nearest
from .groups import group_options
from .key_types import check_keys

KEYS = ("evaluation.keep", "evaluation.keep_metrics")  # set before the keys of the sections, which they make
SECTION = ("data", "metrics", "max_new_tokens")
PREPARED = "prepared"  # the only key of `data` where a set is named by its folder

Compose = Callable[[list[str]], DictConfig]


def expand(cfg: DictConfig, compose: Compose, config_dir: str | None) -> None:
    """Replace the names in evaluation.keep by their sections, in place; what is a section already stays. Raises UserError.

    compose: returns the config of some words, not checked. A set is measured by what training on it would be measured by, or by
    evaluation.keep_metrics, which is null afterwards.
    """
    node = cfg.evaluation
    keep, metrics = node.get("keep"), node.get("keep_metrics")
    if not keep:
        if metrics is not None:
            raise UserError("evaluation.keep_metrics: says what is measured on the sets of evaluation.keep; name these too")
        return
    chosen = _metric_names(metrics, config_dir) if metrics is not None else None
    words = [] if chosen is None else [f"metrics=[{','.join(chosen)}]"]
    if OmegaConf.is_dict(keep):
        sections = OmegaConf.to_container(keep, resolve=False)
        assert isinstance(sections, dict)
        for section in sections.values():
            if isinstance(section, dict) and (chosen is not None or not section.get("metrics")):
                section["metrics"] = OmegaConf.to_container(compose(words).metrics, resolve=False)
    else:
        sections = {}
        for given in keep if OmegaConf.is_list(keep) else [keep]:
            name, data = _named(str(given), config_dir)
            if name in sections:
                raise UserError(f"evaluation.keep: names {name} twice")
            composed = compose([*words, *([] if PREPARED in data else [f"data={given}"])])
            data = data or OmegaConf.to_container(composed.data, resolve=False)
            sections[name] = {"data": data, "metrics": OmegaConf.to_container(composed.metrics, resolve=False)}
    with open_dict(node):
        node.keep = {name: {"max_new_tokens": None, **section} if isinstance(section, dict) else section for name, section in sections.items()}
        node.keep_metrics = None


def _named(given: str, config_dir: str | None) -> tuple[str, dict[str, Any]]:
    """(name of the set, its `data` if it is a folder of prepared data, else {})."""
    options = group_options(config_dir)["data"]
    if given in options:
        return re.sub(r"\W", "_", given), {}
    manifest = Path(given).expanduser() / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"evaluation.keep={given}: no such data set, nor a folder of prepared data.{nearest(given, options)} There are: {', '.join(options)}.")
    try:
        name = json.loads(manifest.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{manifest}: cannot be read ({error}); prepare the set again") from None
    return re.sub(r"\W", "_", str(name)), {PREPARED: str(Path(given).expanduser())}


def _metric_names(metrics: Any, config_dir: str | None) -> list[str]:
    names = [str(name) for name in (metrics if OmegaConf.is_list(metrics) else [metrics])]
    options = group_options(config_dir)["metrics"]
    for name in names:
        if name not in options:
            raise UserError(f"evaluation.keep_metrics={name}: no such metrics.{nearest(name, options)} There are: {', '.join(options)}.")
    return names


def check(keep: Any) -> None:
    """Check names and keys of the sections in a plain config. Raises UserError."""
    if not keep:
        return
    for name, section in keep.items():
        where = f"evaluation.keep.{name}"
        if not re.fullmatch(r"\w+", str(name)) or not isinstance(section, Mapping):
            raise UserError(f"{where}={section}: a set is added by its name, evaluation.keep=[NAME]; keys of its data are evaluation.keep.NAME.data.KEY=...")
        check_keys(where, section, dict.fromkeys(SECTION, ""))
        if not isinstance(section.get("data"), Mapping) or not {"_target_", PREPARED} & set(section["data"]):
            raise UserError(f"{where}.data: names no data set; evaluation.keep=[NAME] adds one")


def score_name(kept: str, score: str) -> str:
    """The name of a score of a kept set beside those of the run's own data: `keep.scenes.cider`."""
    return f"keep.{kept}.{score}"


def split_name(score: str) -> tuple[str, str] | None:
    """(kept set, score) of such a name; None for a score of the run's own data."""
    head, _, rest = score.partition(".")
    return (rest.partition(".")[0], rest.partition(".")[2]) if head == "keep" and "." in rest else None


def own_scores(names: Iterable[str]) -> list[str]:
    """Those names that are scores of the run's own data."""
    return [name for name in names if split_name(name) is None]
