"""Several runs over one loaded base model: each has its own adapter, collator and settings, and the base is one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.build import build
from ..config.plain import resolved
from ..models.load import build_collator, load_processor
from ..runs.adapter import load_adapter
from ..runs.base_model import locate_base
from ..runs.open import OpenedRun, open_any, open_run, run_config, trained_weights
from ..runs.parents import below_of_run

if TYPE_CHECKING:
    from ..collators.types import BatchMaker

FIRST = "default"  # peft's name of the first adapter


@dataclass
class ServedModel:
    """One name that clients may ask for. adapter: peft's name of it, None: the adapters are off, or there is none."""

    name: str
    opened: OpenedRun
    adapter: str | None

    @property
    def collator(self) -> BatchMaker:
        return self.opened.collator

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """The loaded model as this one, for the block. One thread at a time."""
        model = self.opened.model
        if not hasattr(model, "peft_config"):
            yield model
        elif self.adapter is None:
            with model.disable_adapter():
                yield model
        else:
            model.set_adapter(self.adapter)
            yield model


def open_models(paths: Sequence[str], cfg: DictConfig, overrides: list[str], checkpoint: int | None) -> list[ServedModel]:
    """The base model and every run's, over one copy of the base's weights. No path: the model of model=... alone.

    Raises UserError for runs that do not share a base, and for two of one name.
    """
    if not paths:
        opened = open_any(None, cfg, overrides)
        return [ServedModel(base_name(opened), opened, None)]
    if checkpoint is not None and len(paths) > 1:
        raise UserError("checkpoint=... goes with one run; serve several by their final adapters")
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"run=[{','.join(paths)}]: two runs have the same name, by which clients ask for them; rename one directory")
    checked = [run_config(path, cfg, overrides) for path in paths]
    whole = [path for path, (run, _) in zip(paths, checked, strict=True) if trained_weights(run, checkpoint)[1]]
    if whole and len(paths) > 1:
        raise UserError(f"run={whole[0]}: the whole model was trained, so it shares no base with another run; serve it alone")
    first = open_run(paths[0], cfg, overrides, checkpoint)
    if whole:
        return [ServedModel(names[0], first, None)]
    base = base_name(first)
    if base in names:
        raise UserError(f"run={paths[names.index(base)]}: has the name of its base model; rename the directory")
    models = [ServedModel(base, first, None), ServedModel(names[0], first, FIRST)]
    for number, path in enumerate(paths[1:], 1):
        models.append(_next(path, names[number], f"run{number}", first, cfg, overrides))
    return models


def base_name(opened: OpenedRun) -> str:
    """The name of a base model for clients: its id on a hub, or its folder's name."""
    located = opened.loaded.located
    return located.path if located.hub in ("huggingface", "modelscope") else Path(located.path.split(":")[-1]).name


def _next(path: str, name: str, adapter: str, first: OpenedRun, cfg: DictConfig, overrides: list[str]) -> ServedModel:
    """One more run over the base of the first. Raises UserError."""
    assert first.run is not None
    run, kept = run_config(path, cfg, overrides)
    weights, _ = trained_weights(run, None)
    family = build(kept.model, "model")
    located = locate_base(family, run.read_json("env.json")["model"], path)
    settings = resolved(kept)
    other = _different(settings["model"], first.settings["model"])
    if not other and [p.sha256 for p in below_of_run(run, family.adapters, family.hub, str(kept.output_dir))] != first.loaded.below:
        other = "adapters"
    if located.revision != first.loaded.located.revision or other:
        what = f"model.{other} differs" if other else f"{located.path} is not {first.loaded.located.path}"
        raise UserError(f"run={path}: does not share its base model with {first.run.path} ({what}); serve them apart, each with its own port")
    loaded = replace(first.loaded, processor=load_processor(family, located, run / "adapter" if (run / "adapter").is_dir() else weights))
    try:
        load_adapter(first.model, weights, adapter)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"run={path}: its adapter cannot lie beside that of {first.run.path}: {str(error).strip().splitlines()[0]}; serve them apart") from None
    opened = OpenedRun(run, kept, settings, family, loaded, first.model, build_collator(kept.collator, family, loaded), weights)
    return ServedModel(name, opened, adapter)


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """A key that loads the base differently; "" if none does. The place of the base does not matter, nor the processor, which each run brings."""
    return next((key for key in sorted({*ours, *theirs} - {"path", "hub", "revision", "processor", "adapters"}) if ours.get(key) != theirs.get(key)), "")
