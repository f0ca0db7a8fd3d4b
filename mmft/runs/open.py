"""Load a finished run: config, model, adapter, processor, collator. Every verb after training starts here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..collators.types import BatchMaker
from ..common.errors import UserError, nearest
from ..common.files import read_json
from ..common.hashing import key_of
from ..config.build import build
from ..config.groups import default_metrics_section
from ..config.guard import moved_targets
from ..config.plain import has_interpolation, resolved
from ..config.ranking import settle
from ..config.settings import Settings
from ..config.validate import check
from ..evaluation.metrics.defaults import metric_set
from ..evaluation.token_limit import AUTO
from ..models.families.base import Family
from ..models.fingerprint import import_while_hashing, local_revision
from ..models.load import Loaded, build_collator, load_processor, locate_model
from .adapter import load_adapter
from .base_model import MOVED, locate_base
from .directory import Run
from .parents import BELOW_MOVED, below_of_run, check_below, find_below, load_base
from .weights import trained_weights

if TYPE_CHECKING:
    from ..data.sample import Sample
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.kept import KeptSet

FIXED = ("model", "collator", "lora", "trainer", "objective", "seed", "experiment")  # config groups and keys that a command cannot change for a run


@dataclass
class OpenedRun:
    """A run, or a model without one (run is None, see `open_any`), ready for use.

    cfg: the run's config with the command's evaluation, generation and data. settings: the same as plain values. model: the base with
    its adapter, or what stands for it. weights: the folder of the adapter, or of the trained model. maker: of evaluators, None: Evaluator. backend: what
    computes the answers and its version, "" for transformers.
    """

    run: Run | None
    cfg: DictConfig
    settings: Settings
    family: Family
    loaded: Loaded
    model: Any
    collator: BatchMaker
    weights: Path | None = None
    maker: Callable[..., Evaluator] | None = None
    backend: str = ""

    def identity(self) -> dict[str, str]:
        """What decides the model's answers to a prompt, apart from the generation settings, as hashes by the name that a user knows."""
        model = {k: v for k, v in self.settings["model"].items() if k not in ("path", "adapters")}  # the base may have been moved
        adapter = local_revision(self.weights) if self.weights is not None and self.weights.is_dir() else None
        computed = {"backend": self.backend} if self.backend else {}
        return {
            **computed, "model": key_of(self.loaded.located.revision, model, adapter, *self.loaded.below), "collator": key_of(self.settings["collator"]),
            "selection of metrics": key_of(self.settings.get("metrics")), "version of mmft or transformers": f"{__version__} {version('transformers')}",
        }  # fmt: skip

    @contextlib.contextmanager
    def base(self) -> Iterator[Any]:
        """The same model with its adapter switched off inside the block. Raises UserError after full training."""
        if self.run is None:
            raise UserError("run=null: a model without an adapter is its own base; name a run to compare with its base")
        if not hasattr(self.model, "disable_adapter"):
            raise UserError(f"{self.run.path}: the whole model was trained, so it holds no base to switch back to; evaluate the base with model=...")
        with self.model.disable_adapter():
            yield self.model

    def evaluator(self, rows: Sequence[Sample], kept: KeptSet | None = None) -> Evaluator:
        """An evaluator of `rows` with the run's collator, and with the run's or a kept set's metrics and generation settings."""
        from ..evaluation.choose import Chooser
        from ..evaluation.evaluate import Evaluator

        settings = self.settings
        generation, metrics = (kept.generation, kept.metrics) if kept else (settings["generation"], metric_set(settings.get("metrics")))
        chooser = Chooser.for_rows(settings["evaluation"], kept.rows) if kept else Chooser.from_settings(settings["evaluation"])
        return (self.maker or Evaluator)(rows, self.collator, generation, settings["evaluation"]["batch_size"],
                                         settings["trainer"].get("per_device_eval_batch_size", 8), metrics=metrics, chooser=chooser)  # fmt: skip


# What opens a run for a verb: `open_any`, or a caller's own function that keeps the loaded model
Opener = Callable[[str | Path | None, DictConfig, list[str], int | None], OpenedRun]


def open_any(path: str | Path | None, cfg: DictConfig, overrides: list[str], checkpoint: int | None = None) -> OpenedRun:
    """`open_run`; with path None, the model of the command's own model=... without an adapter. Raises UserError."""
    if path is not None:
        return open_run(path, cfg, overrides, checkpoint)
    import_while_hashing("transformers", "peft", model=cfg.model.get("path"))
    family = build(cfg.model, "model")
    located, below = locate_model(family), find_below(family.adapters or [], str(cfg.output_dir), family.hub)
    check_below(below, family, located)
    loaded = load_base(family, located, below)
    collator = build_collator(cfg.collator, family, loaded)
    return OpenedRun(None, cfg, resolved(cfg), family, loaded, loaded.model, collator)


def any_config(path: str | Path | None, cfg: DictConfig, overrides: list[str], checkpoint: int | None = None) -> tuple[Run | None, DictConfig]:
    """`run_config`; with path None, the command's own config. For checks before the weights are loaded. Raises UserError."""
    if path is None and checkpoint is not None:
        raise UserError(f"checkpoint={checkpoint}: checkpoints belong to a run; add run=DIR")
    return (None, cfg) if path is None else run_config(path, cfg, overrides)


def run_folder(path: str | Path) -> Path:
    """The directory of a run. Raises UserError if it is not one."""
    folder = Path(path)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"run={path}: no such directory.{nearest(folder.name, siblings)}")
    if not (folder / "snapshot.yaml").is_file():
        raise UserError(f"run={path}: holds no snapshot.yaml, so it is not a run directory of mmft")
    return folder


def read_snapshot(folder: Path) -> DictConfig:
    """The config of a run. It may come from a stranger, so only plain values are accepted. Raises UserError."""
    file = folder / "snapshot.yaml"
    try:
        text = file.read_text(encoding="utf-8")
        plain = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(plain, dict):
        raise UserError(f"{file}: holds no config")
    for key in plain:
        if key in ("hydra", "defaults"):
            raise UserError(f"{file}: carries a {key} section, which could start other programs; a snapshot of mmft has none, so this one was changed: remove it")
    if has_interpolation(plain):
        raise UserError(f"{file}: holds an interpolation (${{...}}); a snapshot of mmft has plain values only, so this one was changed: write the value")
    cfg = OmegaConf.create({"metrics": default_metrics_section(), **plain})  # runs from before the group have no such section
    moved_targets.update(cfg)
    settle(cfg)
    return cfg


def run_config(path: str | Path, cfg: DictConfig, overrides: list[str]) -> tuple[Run, DictConfig]:
    """The run and its own config, with the data, evaluation and generation keys of the command. Raises UserError."""
    folder = run_folder(path)
    kept = read_snapshot(folder)
    environment = read_json(folder / "env.json")
    auto = kept.generation.get("max_new_tokens") == AUTO
    for name, section in (kept.evaluation.get("keep") or {}).items():
        if auto and section.max_new_tokens is None:  # the limit that training derived
            section.max_new_tokens = (environment.get("kept_max_new_tokens") or {}).get(name)
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~").rpartition("@")[2]  # `data@data.sources.chat` is Hydra's name of `data.sources.chat`
        head = key.split(".")[0]
        if key == MOVED:
            kept.model.path = cfg.model.path
        elif key == BELOW_MOVED:
            OmegaConf.update(kept, key, cfg.model.adapters, force_add=True)
        elif head in FIXED:
            other_place = f"; {MOVED}=FOLDER alone is possible, if its base model was moved" if head == "model" else ""
            raise UserError(f"{word}: run={path} brings its own {head}; drop this word (train a new run to change it{other_place})")
        elif key in ("data", "metrics"):
            kept[key] = cfg[key]
        elif head in ("data", "evaluation", "generation", "metrics"):
            OmegaConf.update(kept, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    if kept.generation.get("max_new_tokens") == AUTO:  # the limit that training derived, whatever rows this command has
        kept.generation.max_new_tokens = environment.get("max_new_tokens") or AUTO
        for section in (kept.evaluation.get("keep") or {}).values():
            section.max_new_tokens = section.max_new_tokens or AUTO
    kept.output_dir = cfg.output_dir
    check(kept)  # while its task is still the training, so that every key is checked
    kept.task = cfg.task
    return Run(folder), kept


def open_run(path: str | Path, cfg: DictConfig, overrides: list[str], checkpoint: int | None = None) -> OpenedRun:
    """Load a run's model with its adapter: that of `checkpoint`, or the final one.

    Raises UserError for a run that never finished, a base model that has changed, and an adapter that does not fit.
    """
    run, kept = run_config(path, cfg, overrides)
    weights, full = trained_weights(run, checkpoint)
    import_while_hashing("transformers", "peft", model=str(weights) if full else kept.model.get("path"))
    family = build(kept.model, "model")
    if full:
        if any(word.lstrip("+").startswith(f"{MOVED}=") for word in overrides):
            raise UserError(f"run={path}: the whole model was trained, so no base model is read; drop {MOVED}=...")
        family.path, family.hub, family.revision = str(weights), "huggingface", None
        located = locate_model(family)
    else:
        located = locate_base(family, run.read_json("env.json")["model"], path)
    loaded = load_base(family, located, below_of_run(run, family.adapters, family.hub, str(kept.output_dir)) if not full else ())
    loaded.processor = load_processor(family, located, run / "adapter" if (run / "adapter").is_dir() else weights)
    model = loaded.model if full else load_adapter(loaded.model, weights)
    collator = build_collator(kept.collator, family, loaded)
    return OpenedRun(run, kept, resolved(kept), family, loaded, model, collator, weights)
