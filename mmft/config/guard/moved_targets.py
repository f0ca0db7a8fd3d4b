"""Current names of classes that older snapshots and presets name by an earlier module."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig, OmegaConf

# earlier module -> module of today
MOVED = {
    "mmft.tasks": "mmft.verbs",
    **{f"mmft.data.{name}": f"mmft.data.sources.{name}" for name in
       ("coco", "conversations", "hub", "imagefolder", "llamafactory", "messages", "saved", "scenes", "shapes", "table")},
    **{f"mmft.models.{name}": f"mmft.models.families.{name}" for name in ("blip2", "llava", "qwen2vl")},
    "mmft.models.family": "mmft.models.families.base",
    "mmft.joint.launch": "mmft.joint.launcher",
    "mmft.search": "mmft.sweeps.optuna_study",
}  # fmt: skip


def current(target: str) -> str:
    """A `_target_` with the module of today: mmft.data.table.Table -> mmft.data.sources.table.Table."""
    parts = target.split(".")
    for n in range(len(parts) - 1, 1, -1):
        module = MOVED.get(".".join(parts[:n]))
        if module is not None:
            return ".".join([module, *parts[n:]])
    return target


def update(node: object) -> None:
    """Replace every moved `_target_` below a config node, in place."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if key != "_target_":
            update(value)
        elif isinstance(value, str) and current(value) != value:
            node[key] = current(value)
